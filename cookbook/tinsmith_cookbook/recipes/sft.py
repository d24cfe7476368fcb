"""Supervised fine-tuning on conversations from files, with all that a real run wants.

Alpaca, ShareGPT and chat files (--data, may be repeated); warm-up and decay; a held-out share whose loss is
watched, and which ends the run when it stops falling; packing; checkpoints from which a run that was killed
goes on exactly (--resume: the same bits as if nothing had happened). Without --data it makes files of its
own: sums, which the base can do, answered in a JSON form it has never seen.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinsmith_cookbook import answers, data, options, schedules, toys, tracking
from tinsmith_cookbook.data import Batches, Conversation
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=120, short=50)
ASKED = 60  # held-out questions that are asked before and after


def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker, at: "Standing"
) -> dict[str, Any]:
    training = open_run(client, settings, at.path)
    renderer = Renderer.of(training)
    rows, held_out = data.split(read(settings), settings.val_set_size, settings.seed)
    examples = data.examples(rows, renderer, longest=settings.sequence_len)
    if settings.packing:
        examples = data.pack(examples, settings.sequence_len)
    watched = [data.datum(e) for e in data.examples(held_out, renderer, longest=settings.sequence_len)]
    steps = math.ceil(settings.epochs * len(examples) / settings.batch) if settings.epochs else settings.steps
    batches = Batches(examples, settings.batch, steps, settings.seed)
    if at.step == 0:
        at.exact_before = exact(training, renderer, held_out)

    for step in range(at.step, at.step if at.worse >= settings.patience else steps):
        rate = schedules.learning_rate(
            step, steps, settings.learning_rate, kind=settings.schedule, warmup_ratio=settings.warmup_ratio
        )
        batch = [data.datum(example) for example in batches[step]]
        forward_backward = training.forward_backward(batch, "cross_entropy")
        optim_step = training.optim_step(tinker.AdamParams(learning_rate=rate, grad_clip_norm=settings.clip))
        numbers = {
            "loss": forward_backward.result().metrics["loss:sum"] / data.counted(batch),
            "learning_rate": rate,
        }
        optim_step.result()

        if watched and ((step + 1) % settings.eval_every == 0 or step + 1 == steps):
            numbers["val_loss"] = loss(training, watched)
            at.judge(numbers["val_loss"])
        tracker.log(step, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()), flush=True)
        is_best = "val_loss" in numbers and at.worse == 0
        is_over = step + 1 == steps or at.worse >= settings.patience
        if is_over or is_best or (step + 1) % settings.save_every == 0:
            at.save(training, settings.out, step + 1, is_best)
        if is_over:
            break

    if at.best_path and at.best_path != at.path:
        training = client.create_training_client_from_state(at.best_path).result()
    return {
        "steps": at.step,
        "val_loss": at.best,
        "exact_before": at.exact_before,
        "exact_after": exact(training, renderer, held_out),
        "path": at.best_path or at.path,
    }


def open_run(
    client: tinker.ServiceClient, settings: argparse.Namespace, path: str | None
) -> tinker.TrainingClient:
    if path:
        return client.create_training_client_from_state_with_optimizer(path).result()
    return client.create_lora_training_client(settings.base, rank=settings.rank, seed=settings.seed).result()


def read(settings: argparse.Namespace) -> list[Conversation]:
    files = settings.data
    if not files:
        pairs = list(toys.sums(600, settings.seed))  # all different: what is held out is asked nowhere else
        files = [
            toys.write(settings.out / "alpaca.jsonl", toys.json_alpaca(pairs[:400])),
            toys.write(settings.out / "sharegpt.jsonl", toys.json_sharegpt(pairs[400:])),
        ]
    return [conversation for file in files for conversation in data.read(*data.named(str(file)))]


def loss(training: tinker.TrainingClient, watched: list[tinker.Datum]) -> float:
    return training.forward(watched, "cross_entropy").result().metrics["loss:sum"] / data.counted(watched)


def exact(training: tinker.TrainingClient, renderer: Renderer, held_out: Sequence[Conversation]) -> float:
    """The share of held-out conversations whose last turn the model writes as it stands there."""
    asked = held_out[:ASKED]
    if not asked:
        return math.nan
    sampler = training.save_weights_and_get_sampling_client().result()
    said = answers.greedy(sampler, renderer, [c.messages[:-1] for c in asked], tools=[c.tools for c in asked])
    return sum(s.message == c.messages[-1] for s, c in zip(said, asked, strict=True)) / len(asked)


# -- where a run stands ----------------------------------------------------------------------------------


@dataclass
class Standing:
    """What a resumed run needs to know. worse: evaluations in a row that were no better than the best."""

    step: int = 0
    path: str | None = None
    best: float = math.inf
    best_path: str | None = None
    worse: int = 0
    exact_before: float = math.nan

    def judge(self, val_loss: float) -> None:
        self.worse = 0 if val_loss < self.best else self.worse + 1
        self.best = min(self.best, val_loss)

    def save(self, training: tinker.TrainingClient, out: Path, step: int, is_best: bool) -> None:
        """A checkpoint, and then the file that names it: whole or not at all. is_best: `best` was measured
        on these very weights."""
        self.step, self.path = step, training.save_state(f"step-{step}").result().path
        if is_best:
            self.best_path = self.path
        (out / "standing.new").write_text(json.dumps(asdict(self)))
        os.replace(out / "standing.new", out / "standing.json")

    @classmethod
    def read(cls, out: Path) -> "Standing":
        file = out / "standing.json"
        return cls(**json.loads(file.read_text())) if file.exists() else cls()


def parser() -> argparse.ArgumentParser:
    made = options.parser("sft", __doc__, STEPS)
    made.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="JSON Lines or JSON, or alpaca:FILE, sharegpt:FILE, chat:FILE; may be repeated",
    )
    made.add_argument("--sequence-len", type=int, default=512)
    made.add_argument("--packing", action="store_true", help="several examples in one sequence")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--learning-rate", type=float, default=2e-3)
    made.add_argument("--schedule", choices=["constant", "linear", "cosine"], default="cosine")
    made.add_argument("--warmup-ratio", type=float, default=0.08)
    made.add_argument(
        "--batch", type=int, default=16, help="examples a step; the service makes its own passes"
    )
    made.add_argument("--clip", type=float, default=0.0, help="the gradient's global norm; 0: not at all")
    made.add_argument("--epochs", type=float, help="instead of --steps")
    made.add_argument("--val-set-size", type=float, default=0.15, help="the share that is held out")
    made.add_argument("--eval-every", type=int, default=10)
    made.add_argument(
        "--patience", type=int, default=3, help="evaluations without a better one that end the run"
    )
    made.add_argument("--save-every", type=int, default=25)
    made.add_argument("--resume", action="store_true", help="go on where the run in --out stands")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    at = Standing.read(settings.out) if settings.resume else Standing()
    with (
        connect(settings.out) as client,
        tracking.Tracker(
            settings.out, also=settings.track, config=vars(settings), first_step=at.step
        ) as tracker,
    ):
        result = train(client, settings, tracker, at)
    lines = {name: tracker.line(name) for name in ("loss", "val_loss")}
    title = f"SFT, {settings.base}"
    tracking.draw(settings.out / "curve.png", title, lines, xlabel="step", ylabel="loss per token")
    tracking.write_result(settings.out, result)


if __name__ == "__main__":
    main()
