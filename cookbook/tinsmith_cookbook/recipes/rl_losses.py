"""All losses for reinforcement learning side by side: the recipe rl.py once with each, at the same time, as
runs of one service; and some of them with two updates a batch, or two steps behind.

On samples of the very weights that are trained, with one update a batch, all of them have the same gradient
(every ratio is 1) and give the same curve. They differ once the ratio does.

Each leaves its metrics in a folder of its own under --out; the table and the curve are made from these.
"""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook import options, tracking
from tinsmith_cookbook.recipes import rl
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=25, short=6)
PROBLEMS = 6
WAYS = (
    *(f"--loss {loss}" for loss in rl.LOSSES),
    "--loss ppo --updates 2",
    "--loss importance_sampling --behind 2",
    "--loss cispo --behind 2",
)


def name(way: str) -> str:
    return way.removeprefix("--loss ").replace(" --", " ")


async def train(client: tinker.ServiceClient, settings: argparse.Namespace) -> list[dict[str, Any]]:
    async def one(way: str) -> dict[str, Any]:
        common = (
            f"--base {settings.base} --steps {settings.steps} --seed {settings.seed} --problems {PROBLEMS}"
        )
        out = settings.out / name(way).replace(" ", "_")
        own = options.read(rl.parser(), [*way.split(), *common.split(), "--out", str(out)])
        with tracking.Tracker(own.out, config=vars(own)) as tracker:
            result = await rl.train(client, own, tracker)
        reward = tracker.column("reward")
        return {
            "loss": name(way),
            "reward_first_3": sum(reward[:3]) / 3,
            "reward_last_3": sum(reward[-3:]) / 3,
            **result,
            "largest_kl": max(tracker.column("kl")),
        }

    return list(await asyncio.gather(*map(one, WAYS)))


def parser() -> argparse.ArgumentParser:
    return options.parser("rl_losses", __doc__, STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with connect(settings.out) as client:
        table = asyncio.run(train(client, settings))
    lines = {}
    for row in table:
        rows = tracking.read(settings.out / row["loss"].replace(" ", "_") / "metrics.jsonl")
        lines[row["loss"]] = ([r["step"] for r in rows], [r["reward"] for r in rows])
    title = f"Sums, every loss, {settings.base}"
    tracking.draw(settings.out / "curve.png", title, lines, xlabel="step", ylabel="share of right answers")
    gains = [row["accuracy_after"] - row["accuracy_before"] for row in table]
    tracking.write_result(settings.out, {"ways": len(table), "smallest_gain": min(gains)}, table)


if __name__ == "__main__":
    main()
