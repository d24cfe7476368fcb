"""What the service remembers of a run: its checkpoints, its curve, its cost."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.connection import Connection
from tinsmith.errors import InvalidInput


class Table(list[dict[str, Any]]):
    """Rows as dicts, all with the same columns; None where there is nothing."""

    @property
    def columns(self) -> list[str]:
        return list(self[0]) if self else []

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self]

    def to_csv(self, file: str | Path | None = None) -> str:
        """As CSV, also written to `file` if one is given."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self)
        if file is not None:
            Path(file).write_text(text.getvalue())
        return text.getvalue()

    def to_pandas(self) -> Any:
        """As a pandas.DataFrame; needs pandas here."""
        import pandas

        return pandas.DataFrame(list(self), columns=self.columns)


@dataclass(frozen=True)
class Cost:
    """`tokens` and `calls` of finished passes; `steps` of the optimizer; how long its calls waited and were
    computed, None if the service did not note it (a pass shared with other runs counts in full);
    `storage_bytes` of its checkpoints now; `usage` in tokens by kind, samples of its weights included, and
    what that costs by the service's price list, if it has one."""

    tokens: int
    calls: int
    steps: int
    queue_seconds: float | None
    compute_seconds: float | None
    storage_bytes: int
    usage: Mapping[str, int]
    estimated_cost_usd: float | None


def find_checkpoint(connection: Connection, run_id: str, wanted: str | int) -> str:
    """The path of one of the run's checkpoints. InvalidInput lists those there are."""
    if isinstance(wanted, str) and wanted.startswith("tinker://"):
        return wanted
    listed = connection.get(f"training_runs/{run_id}/checkpoints")["checkpoints"]
    paths = {
        c["checkpoint_id"].rpartition("/")[2]: c["tinker_path"]
        for c in listed
        if c["checkpoint_type"] == "training"
    }
    if isinstance(wanted, str):
        found = [path for name, path in paths.items() if name == wanted]
    else:
        found = [
            path
            for name, path in paths.items()
            if (end := re.search(r"\d+$", name)) and int(end[0]) == wanted
        ]
    if len(found) != 1:
        known = ", ".join(sorted(paths)) or "none"
        raise InvalidInput(f"{len(found)} checkpoints of {run_id} are called {wanted!r}; it has {known}")
    return str(found[0])


def metrics(connection: Connection, run_id: str) -> Table:
    rows: list[dict[str, Any]] = []
    cursor: int | None = 0
    while cursor is not None:
        page = connection.get(f"training_runs/{run_id}/metrics", after=cursor, limit=1000)
        rows += page["rows"]
        cursor = page["next"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: row.get(name) for name in columns} for row in rows)


def cost(connection: Connection, run_id: str) -> Cost:
    answer = connection.get(f"training_runs/{run_id}/cost")
    known: dict[str, Any] = {name: answer.get(name) for name in Cost.__dataclass_fields__}
    return Cost(**known)
