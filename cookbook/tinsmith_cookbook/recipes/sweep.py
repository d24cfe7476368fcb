"""A sweep of learning rate × rank, all runs at once on one base.

Every run is an adapter on the same frozen base, so a sweep costs one service and not one machine per run:
each step submits the passes of all runs and only then waits for them. The plot is held-out loss against
learning rate, a line per rank. The learning rate decides; with alpha fixed its best value hardly depends on
rank.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook import data, options, schedules, toys, tracking
from tinsmith_cookbook.data import Batches, Conversation
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=40, short=12)
RATES, RANKS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (4, 16, 64)
BATCH, ROWS, HELD_OUT = 8, 200, 24


def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[tuple[int, float], float]:
    points = [(rank, rate) for rank in settings.ranks for rate in settings.rates]
    creating = [
        client.create_lora_training_client(settings.base, rank=r, seed=settings.seed) for r, _ in points
    ]
    runs = dict(zip(points, [created.result() for created in creating], strict=True))
    renderer = Renderer.of(next(iter(runs.values())))
    rows, held_out = data.split(read(settings), HELD_OUT, settings.seed)
    batches = Batches(data.examples(rows, renderer), BATCH, settings.steps, settings.seed)
    watched = [data.datum(example) for example in data.examples(held_out, renderer)]

    for step, examples in enumerate(batches):
        batch = [data.datum(example) for example in examples]
        part = schedules.learning_rate(step, settings.steps, 1.0, warmup_ratio=0.1)
        passed = {}
        for (rank, rate), run in runs.items():
            passed[rank, rate] = run.forward_backward(batch, "cross_entropy")
            run.optim_step(tinker.AdamParams(learning_rate=rate * part))
        losses = {p: f.result().metrics["loss:sum"] / data.counted(batch) for p, f in passed.items()}
        tracker.log(step, {f"rank {rank}, {rate:g}": loss for (rank, rate), loss in losses.items()})
        print(f"step {step}: losses {min(losses.values()):.3f} to {max(losses.values()):.3f}", flush=True)

    ends = {point: run.forward(watched, "cross_entropy") for point, run in runs.items()}
    return {point: end.result().metrics["loss:sum"] / data.counted(watched) for point, end in ends.items()}


def read(settings: argparse.Namespace) -> list[Conversation]:
    file = settings.data or toys.write(
        settings.out / "alpaca.jsonl", toys.json_alpaca(toys.sums(ROWS, settings.seed))
    )
    return data.read(file)


def summary(losses: dict[tuple[int, float], float]) -> dict[str, Any]:
    """best_rate of each rank, and over how many steps of the grid those spread (0: the same rate is best for
    all)."""
    ranks, rates = (sorted(set(column)) for column in zip(*losses, strict=True))
    best = {rank: min(rates, key=lambda rate: _finite(losses[rank, rate])) for rank in ranks}
    places = [rates.index(rate) for rate in best.values()]
    rank, rate = min(losses, key=lambda point: _finite(losses[point]))
    return {
        "best_loss": losses[rank, rate],
        "best_rank": rank,
        "best_rate": rate,
        "worst_loss": max(map(_finite, losses.values())),
        "grid_steps_between_ranks": max(places) - min(places),
    }


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def parser() -> argparse.ArgumentParser:
    made = options.parser("sweep", __doc__, STEPS)
    made.add_argument("--data", metavar="FILE", help="Alpaca, ShareGPT or chat")
    made.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    made.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        losses = train(client, settings, tracker)
    lines = {
        f"rank {r}": (settings.rates, [losses[r, rate] for rate in settings.rates]) for r in settings.ranks
    }
    labels = {
        "xlabel": "learning rate",
        "ylabel": "held-out loss per token",
        "xscale": "log",
        "yscale": "log",
    }
    title = f"{len(losses)} runs at once, {settings.base}"
    tracking.draw(settings.out / "curve.png", title, lines, **labels)
    table = [{"rank": r, **{f"{rate:g}": losses[r, rate] for rate in settings.rates}} for r in settings.ranks]
    tracking.write_result(settings.out, summary(losses), table)


if __name__ == "__main__":
    main()
