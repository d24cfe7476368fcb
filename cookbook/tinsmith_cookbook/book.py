"""Run every recipe at its short setting, compare what came out with what must, and write one page: `make
cookbook`."""

import argparse
import base64
import contextlib
import functools
import html
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith_cookbook import service, tracking
from tinsmith_cookbook.registry import RECIPES, Recipe

LIMIT_SECONDS = 600
GRACE_SECONDS = 30


@dataclass(frozen=True)
class Run:
    recipe: Recipe
    seed: int
    seconds: float
    command: str
    result: Mapping[str, Any]
    faults: list[str]
    curve: bytes | None


def run(recipe: Recipe, out: Path, seed: int, base: str, environment: Mapping[str, str]) -> Run:
    arguments = [*recipe.arguments, "--short", "--base", base, "--seed", str(seed)]
    command = [sys.executable, "-m", f"tinsmith_cookbook.recipes.{recipe.module}", *arguments]
    folder = out / recipe.name / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in ("result.json", "curve.png"):
        (folder / left).unlink(missing_ok=True)
    started = time.perf_counter()
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--out", str(folder)],
            env=dict(environment),
            stdout=log,
            stderr=log,
            # Shells start background jobs deaf to it, and children inherit that.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status: int | str = child.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"stopped after {LIMIT_SECONDS} s"
            child.send_signal(signal.SIGINT)  # so that it stops the service that it started itself
            _end(child)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {}
    curve = None
    if status == 0:
        result = json.loads((folder / "result.json").read_text())
        curve = (folder / "curve.png").read_bytes()
    faults = recipe.misses(result) if status == 0 else [f"it failed ({status}): {_tail(folder / 'log')}"]
    shown = shlex.join(["python", *command[1:]])
    return Run(recipe, seed, seconds, shown, result, faults, curve)


def _end(child: "subprocess.Popen[bytes]") -> None:
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-400:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinsmith_cookbook.book", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the registry; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", default="tinsmith/tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/cookbook"))
    given = parser.parse_args(argv)
    known = {recipe.name: recipe for recipe in RECIPES}
    if unknown := [name for name in given.only or () if name not in known]:
        parser.error(f"no recipe {unknown[0]!r}: there are {', '.join(known)}")
    chosen = [known[name] for name in given.only] if given.only else RECIPES

    given.out.mkdir(parents=True, exist_ok=True)
    runs = []
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        own = {name: value for name, value in os.environ.items() if name not in service.ADDRESS}
        shared = dict(os.environ)
        if not service.in_environment() and not all(recipe.has_own_service for recipe in chosen):
            url, key = stack.enter_context(service.embedded(given.out, "--deterministic"))
            shared |= {"TINSMITH_BASE_URL": url, "TINSMITH_API_KEY": key}
        for recipe in chosen:
            for seed in given.seeds:
                print(f"{recipe.name}, seed {seed} … ", end="", flush=True)
                runs.append(
                    run(recipe, given.out, seed, given.base, own if recipe.has_own_service else shared)
                )
                print(f"{runs[-1].seconds:.0f} s", "; ".join(runs[-1].faults) or "as it must be", flush=True)
                # Written after each, so that there is something to look at when the machine goes away.
                seconds = time.perf_counter() - started
                (given.out / "index.html").write_text(page(runs, given.base, seconds))
    print(f"{sum(not r.faults for r in runs)} of {len(runs)} runs as they must be, {seconds / 60:.1f} min")
    print(f"The page: {given.out / 'index.html'}")
    sys.exit(any(r.faults for r in runs))


# -- the page --------------------------------------------------------------------------------------------


def page(runs: Sequence[Run], base: str, seconds: float) -> str:
    by_recipe: dict[str, list[Run]] = {}
    for one in runs:
        by_recipe.setdefault(one.recipe.name, []).append(one)
    good = sum(not one.faults for one in runs)
    summary = (
        f"{good} of {len(runs)} runs as they must be · {seconds / 60:.1f} minutes · base {html.escape(base)}"
    )
    rows = "".join(_row(group) for group in by_recipe.values())
    sections = "".join(_section(group) for group in by_recipe.values())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Tinsmith cookbook</title><style>{_STYLE}</style>
<header><h1>Tinsmith cookbook</h1><p>{summary}</p></header>
<main><table><thead><tr><th>recipe<th>what must come out<th>what came out<th>seeds<th>seconds</tr></thead>
<tbody>{rows}</tbody></table>{sections}</main></html>
"""


def _row(group: Sequence[Run]) -> str:
    recipe = group[0].recipe
    faults = [fault for one in group for fault in one.faults]
    wanted = "<br>".join(f"{html.escape(n)} {_bounds(*b)}" for n, b in recipe.outcome.items())
    found = "<br>".join(_spread([one.result.get(name) for one in group]) for name in recipe.outcome)
    mark = f'<b class="bad">✗</b> {html.escape(faults[0])}' if faults else f'<b class="good">✓</b> {found}'
    seeds = ", ".join(str(one.seed) for one in group)
    seconds = sum(one.seconds for one in group) / len(group)
    link = f'<a href="#{recipe.name}">{html.escape(recipe.name)}</a>'
    return f"<tr><td>{link}<td>{wanted}<td>{mark}<td>{seeds}<td class=number>{seconds:.0f}</tr>"


def _section(group: Sequence[Run]) -> str:
    recipe, first = group[0].recipe, group[0]
    # Its path is of a service that is gone.
    numbers = {k: v for k, v in first.result.items() if k not in ("table", "path")}
    facts = "".join(
        f"<dt>{html.escape(name)}<dd>{_spread([one.result.get(name) for one in group])}" for name in numbers
    )
    pictures = [base64.b64encode(one.curve).decode() for one in group if one.curve]
    curves = "".join(f'<img alt="curve" src="data:image/png;base64,{p}">' for p in pictures)
    faults = "".join(f'<p class="bad">{html.escape(f)}</p>' for one in group for f in one.faults)
    return f"""<section id="{recipe.name}"><h2>{html.escape(recipe.title)}</h2>{faults}
<pre>{html.escape(first.command)}</pre><div class="sides"><div>{curves}</div><dl>{facts}</dl></div>
{_table(first.result.get("table") or [])}</section>"""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "path"))
    head = "".join(f"<th>{html.escape(name)}" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(tracking.shown(row.get(n, '')))}" for n in names) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _spread(values: Sequence[Any]) -> str:
    """One value, or the mean and the range over seeds."""
    numbers = [v for v in values if isinstance(v, int | float)]
    if len(numbers) < 2 or len(numbers) < len(values):
        return html.escape(tracking.shown(values[0]))
    mean = sum(numbers) / len(numbers)
    return f"{mean:.4g} <small>({min(numbers):.4g} to {max(numbers):.4g})</small>"


def _bounds(low: float, high: float) -> str:
    if low == float("-inf") or high == float("inf"):
        return f"≥ {low:.4g}" if high == float("inf") else f"≤ {high:.4g}"
    return f"{low:.4g}" if high - low < 1e-5 else f"{low:.4g} … {high:.4g}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2529; --page: #fbfaf8; --line: #d9d5cd; --soft: #f0ede7;
  --link: #1f6f8b; --good: #3f7d3e; --bad: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3e6; --page: #15191b; --line: #343b3f; --soft:
#1f2528;
  --link: #7cc4dd; --good: #86c27c; --bad: #ef8a72; } }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 0 0 .5rem; font-size: 1.15rem; }
header p { margin: .2rem 0 1.5rem; opacity: .75; }
a { color: var(--link); } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid
var(--line); } th { font-weight: 600; opacity: .75; } .number { text-align: right; }
section { margin-top: 2.2rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
pre { margin: 0 0 .8rem; padding: .5rem .8rem; background: var(--soft); border-radius: 6px; font-size: .8rem;
  white-space: pre-wrap; word-break: break-word; }
.sides { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.sides > div { flex: 1 1 26rem; } img { width: 100%; max-width: 40rem; border-radius: 6px; background: #fff; }
dl { flex: 1 1 16rem; display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; align-content: start;
margin: 0;
  font-size: .88rem; }
dt { opacity: .75; } dd { margin: 0; font-variant-numeric: tabular-nums; word-break: break-word; }
small { opacity: .75; }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg); } }
"""


if __name__ == "__main__":
    main()
