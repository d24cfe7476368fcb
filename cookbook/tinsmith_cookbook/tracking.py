"""What a run leaves: metrics.jsonl, a curve, a result table; W&B, MLflow, TensorBoard when asked."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Numbers = Mapping[str, float]
Rows = Sequence[Mapping[str, Any]]


class Tracker:
    """Writes each step's numbers as they come, one JSON object a line, and sends them where else they are
    wanted. The libraries of the others are imported only when they are named.

        with Tracker(Path("runs/sft"), also=["tensorboard"], config={"seed": 0}) as tracker:
            tracker.log(step, {"loss": 1.2})
    """

    def __init__(
        self,
        out: Path,
        *,
        also: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        first_step: int = 0,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.file = out / "metrics.jsonl"
        self.rows = _before(self.file, first_step)
        self._sinks = [_SINKS[name](out, dict(config or {})) for name in also]
        self._open = self.file.open("w")
        for row in self.rows:
            self._write(row)

    def log(self, step: int, numbers: Numbers) -> None:
        row = {"step": step, **{name: float(value) for name, value in numbers.items()}}
        self.rows.append(row)
        self._write(row)
        for send, _ in self._sinks:
            send(step, {name: value for name, value in row.items() if name != "step"})

    def column(self, name: str) -> list[float]:
        """The values of one number, of the steps that have it."""
        return [row[name] for row in self.rows if name in row]

    def line(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one number, for `draw`."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def close(self) -> None:
        self._open.close()
        for _, close in self._sinks:
            close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._open.write(json.dumps(row) + "\n")
        self._open.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _before(file: Path, step: int) -> list[dict[str, Any]]:
    """What a run that is resumed at `step` keeps; the steps from there on are taken again."""
    if step == 0 or not file.exists():
        return []
    return [row for row in read(file) if row["step"] < step]


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


# -- elsewhere: (send, close) of one run, through the service's own library ------------------------------

Sink = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]


def _library(name: str, distribution: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"--track {distribution} needs its library: pip install {distribution} ({error.name} is missing)"
        ) from None


def _wandb(out: Path, config: dict[str, Any]) -> Sink:
    run = _library("wandb", "wandb").init(project="tinsmith", name=out.name, config=config, dir=str(out))
    return (lambda step, numbers: run.log(numbers, step=step)), run.finish


def _mlflow(out: Path, config: dict[str, Any]) -> Sink:
    mlflow = _library("mlflow", "mlflow")
    mlflow.set_experiment("tinsmith")
    mlflow.start_run(run_name=out.name)
    mlflow.log_params(config)
    return (lambda step, numbers: mlflow.log_metrics(numbers, step=step)), mlflow.end_run


def _tensorboard(out: Path, config: dict[str, Any]) -> Sink:
    writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(out / "tensorboard"))
    writer.add_text("config", json.dumps(config, default=str))

    def send(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


_SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
}


# -- the end of a run ------------------------------------------------------------------------------------


def draw(
    file: Path, title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], **labels: Any
) -> None:
    """A PNG with one line per name, (xs, ys) each. labels: what matplotlib's axes.set takes (xlabel, ylabel,
    xscale, ylim …)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, (xs, ys)), (style, color) in zip(
        lines.items(), itertools.product(("-", "--", ":"), _COLORS), strict=False
    ):
        marker = "o" if len(xs) < 25 else ""
        axes.plot(xs, ys, style, label=name, color=color, linewidth=2, marker=marker, markersize=4)
    axes.set(title=title, **labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 4:
        figure.legend(frameon=False, loc="outside right upper")
    elif len(lines) > 1:
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


_COLORS = ["#1f6f8b", "#d1603d", "#5b8c5a", "#7a5c99", "#c9a227", "#6b6b6b"]


def write_result(out: Path, result: Mapping[str, Any], table: Rows = ()) -> None:
    """result.json: what came out, one flat object; and its rows, if it has any, as a table (table.md)."""
    (out / "result.json").write_text(json.dumps({**result, "table": list(table)}, indent=1) + "\n")
    if table:
        text = markdown(table)
        (out / "table.md").write_text(text + "\n")
        print(text)
    print("  ".join(f"{name} {shown(value)}" for name, value in result.items()))


def markdown(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([shown(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
