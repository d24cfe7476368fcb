"""What every recipe understands: --base --steps --seed --out --short, and where else to track."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TRACKERS = ("wandb", "mlflow", "tensorboard")


@dataclass(frozen=True)
class Steps:
    """How many a recipe takes: as it is meant to be, and at its short setting."""

    full: int
    short: int


def parser(
    recipe: str, doc: str | None, steps: Steps, base: str = "tinsmith/tiny"
) -> argparse.ArgumentParser:
    """A parser with the common arguments, for a recipe to add its own to; read it with `read`."""
    made = argparse.ArgumentParser(
        prog=f"python -m tinsmith_cookbook.recipes.{recipe}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--base", default=base, help=f"the base model (default {base})")
    made.add_argument("--steps", type=int, help=f"default {steps.full}, short {steps.short}")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("runs") / recipe, help=f"default runs/{recipe}")
    made.add_argument("--short", action="store_true", help="a small setting that still shows the effect")
    made.add_argument("--track", action="append", choices=TRACKERS, default=[], help="may be repeated")
    made.set_defaults(_steps=steps)
    return made


def read(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, `steps` filled in and the folder `out` made."""
    given = made.parse_args(argv)
    if given.steps is None:
        given.steps = given._steps.short if given.short else given._steps.full
    if given.steps < 1:
        made.error("--steps must be at least 1")
    given.out.mkdir(parents=True, exist_ok=True)
    return given
