"""Preferences: of two answers to a question, learn to give the kind that was preferred.

--loss dpo (pairs, against a reference: the weights before the first step), kto (single answers, marked
desirable or not) or orpo (pairs, no reference, supervised learning in it). All three are custom losses:
computed here, from the logprobs that the service returns, and sent back as gradients. The toy preference is
for short answers; the base gives long ones too. Held-out pairs show whether it learnt the preference, its own
answers whether it acts on it. --data FILE takes pairs of your own: {"prompt", "chosen", "rejected"}, JSON
Lines.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinsmith_cookbook import answers, data, options, preferences, schedules, toys, tracking
from tinsmith_cookbook.data import Batches, Pair
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=60, short=20)
ASKED = 40
LEARNING_RATES = {"dpo": 5e-4, "kto": 5e-4, "orpo": 1e-3}


def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[str, Any]:
    policy, reference = (
        client.create_lora_training_client(settings.base, rank=settings.rank, seed=settings.seed).result()
        for _ in range(2)  # the second is never stepped: it stays what the first was
    )
    renderer = Renderer.of(policy)
    pairs, held_out = data.split(read(settings), settings.val_set_size, settings.seed)
    if not held_out:
        raise data.BadData(f"--val-set-size {settings.val_set_size} leaves no pair to be judged by")
    steps = math.ceil(settings.epochs * len(pairs) / settings.batch) if settings.epochs else settings.steps
    batches = Batches(pairs, settings.batch, steps, settings.seed)
    peak = settings.learning_rate or LEARNING_RATES[settings.loss]
    words_before = words(policy, renderer, held_out)

    for step, batch in enumerate(batches):
        rate = schedules.learning_rate(
            step, steps, peak, kind=settings.schedule, warmup_ratio=settings.warmup_ratio
        )
        datums, loss = LOSSES[settings.loss](renderer, batch, reference, settings.beta)
        forward_backward = policy.forward_backward_custom(datums, loss)
        optim_step = policy.optim_step(tinker.AdamParams(learning_rate=rate, grad_clip_norm=settings.clip))
        metrics = forward_backward.result().metrics
        optim_step.result()

        numbers = {"loss": metrics["loss:sum"], "accuracy": metrics["accuracy"], "learning_rate": rate}
        if (step + 1) % settings.eval_every == 0 or step + 1 == steps:
            numbers["held_out_accuracy"] = prefers(policy, reference, renderer, held_out, settings.loss)
        tracker.log(step, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()), flush=True)

    return {
        "loss_first": tracker.column("loss")[0],
        "loss_last": tracker.column("loss")[-1],
        "held_out_accuracy": tracker.column("held_out_accuracy")[-1],
        "words_before": words_before,
        "words_after": words(policy, renderer, held_out),
        "path": policy.save_state("final", overwrite=True).result().path,
    }


def read(settings: argparse.Namespace) -> list[Pair]:
    return data.read_pairs(Path(settings.data)) if settings.data else toys.brevity(384, settings.seed)


# -- a batch as datums, and its loss ---------------------------------------------------------------------


def _paired(renderer: Renderer, batch: Sequence[Pair]) -> list[tinker.Datum]:
    return [preferences.completion(renderer, p.prompt, a) for p in batch for a in (p.chosen, p.rejected)]


def _dpo(
    renderer: Renderer, batch: Sequence[Pair], reference: tinker.TrainingClient, beta: float
) -> tuple[list[tinker.Datum], preferences.Loss]:
    datums = _paired(renderer, batch)
    return datums, preferences.dpo(preferences.totals(reference, datums), beta=beta)


def _kto(
    renderer: Renderer, batch: Sequence[Pair], reference: tinker.TrainingClient, beta: float
) -> tuple[list[tinker.Datum], preferences.Loss]:
    """Every other pair gives its chosen answer, the others their rejected one: they are never compared."""
    desirable = [i % 2 == 0 for i in range(len(batch))]
    said = [p.chosen if good else p.rejected for p, good in zip(batch, desirable, strict=True)]
    others = [*said[1:], said[0]]
    datums = [
        preferences.completion(renderer, p.prompt, answer)
        for row in (said, others)
        for p, answer in zip(batch, row, strict=True)
    ]
    return datums, preferences.kto(preferences.totals(reference, datums), desirable, beta=beta)


def _orpo(
    renderer: Renderer, batch: Sequence[Pair], reference: tinker.TrainingClient, beta: float
) -> tuple[list[tinker.Datum], preferences.Loss]:
    return _paired(renderer, batch), preferences.orpo(weight=beta)


LOSSES = {"dpo": _dpo, "kto": _kto, "orpo": _orpo}


# -- what came of it -------------------------------------------------------------------------------------


def prefers(
    policy: tinker.TrainingClient,
    reference: tinker.TrainingClient,
    renderer: Renderer,
    held_out: Sequence[Pair],
    loss: str,
) -> float:
    """The share of held-out pairs whose chosen answer gained more likelihood than the rejected one; for orpo,
    which has no reference, is likelier per token."""
    datums = _paired(renderer, held_out)
    scores = preferences.totals(policy, datums)
    if loss == "orpo":
        scores = [s / data.counted([d]) for s, d in zip(scores, datums, strict=True)]
    else:
        scores = [s - r for s, r in zip(scores, preferences.totals(reference, datums), strict=True)]
    return preferences.accuracy([c - r for c, r in zip(scores[::2], scores[1::2], strict=True)])


def words(policy: tinker.TrainingClient, renderer: Renderer, held_out: Sequence[Pair]) -> float:
    """In an answer of the model's own, on average."""
    sampler = policy.save_weights_and_get_sampling_client().result()
    said = answers.sampled(sampler, renderer, [p.prompt for p in held_out[:ASKED]], seed=0)
    return sum(len(s.message["content"].split()) for s in said) / len(said)


def parser() -> argparse.ArgumentParser:
    made = options.parser("dpo", __doc__, STEPS)
    made.add_argument("--loss", choices=list(LOSSES), default="dpo")
    made.add_argument("--data", metavar="FILE")
    made.add_argument("--beta", type=float, default=0.1, help="orpo: the weight of its odds-ratio term")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--learning-rate", type=float, help=f"default {LEARNING_RATES}")
    made.add_argument("--schedule", choices=["constant", "linear", "cosine"], default="cosine")
    made.add_argument("--warmup-ratio", type=float, default=0.1)
    made.add_argument("--clip", type=float, default=0.0, help="the gradient's global norm; 0: not at all")
    made.add_argument("--epochs", type=float, help="instead of --steps")
    made.add_argument("--eval-every", type=int, default=5)
    made.add_argument("--batch", type=int, default=8, help="pairs a step")
    made.add_argument("--val-set-size", type=float, default=0.15)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result = train(client, settings, tracker)
    lines = {name: tracker.line(name) for name in ("loss", "accuracy", "held_out_accuracy")}
    tracking.draw(
        settings.out / "curve.png", f"{settings.loss.upper()}, {settings.base}", lines, xlabel="step"
    )
    tracking.write_result(settings.out, result)


if __name__ == "__main__":
    main()
