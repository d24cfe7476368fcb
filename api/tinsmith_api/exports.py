"""What leaves in a form of its own: archives of checkpoints, traces of sessions."""

import datetime
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from tinsmith_api.journal.objects import Damaged, ObjectStore

Json = dict[str, Any]

# What a checkpoint holds for this service alone; an archive leaves it out, an export has none of it.
_OURS = ("optimizer.safetensors", "tinsmith.json")


def archive(objects: ObjectStore, prefix: str) -> Iterator[bytes]:
    """A tar of what others load of the checkpoint under `prefix`, piece by piece. Damaged if a file is not
    what its checksum says."""
    entries = objects.entries(prefix)
    for name in [name for name in entries if name not in _OURS]:
        head = tarfile.TarInfo(name)
        head.size, _ = entries[name]
        yield head.tobuf()
        sha256 = hashlib.sha256()
        for piece in objects.stream(prefix, name)[1]:
            sha256.update(piece)
            yield piece
        if sha256.hexdigest() != entries[name].sha256:
            raise Damaged(f"{prefix}: {name} does not match its checksum")
        yield bytes(-head.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


_PHASES = (
    ("queue wait", "submitted_at", "started_at"),
    ("compute", "started_at", "finished_at"),
    ("result wait", "finished_at", "retrieved_at"),
)


def trace(rows: Sequence[Any]) -> bytes:
    """A trace of these operations in the Trace Event Format, which Perfetto reads: a process for each run and
    each sampler, in it a track for each operation, on that its three phases."""
    beginning = min((row.submitted_at for row in rows), default=0.0)
    processes = {subject: number for number, subject in enumerate(dict.fromkeys(r.subject for r in rows), 1)}
    events: list[Json] = []
    for subject, pid in processes.items():
        named = {"ph": "M", "pid": pid, "tid": 0}
        events.append({**named, "name": "process_name", "args": {"name": subject}})
        events.append({**named, "name": "process_sort_index", "args": {"sort_index": pid}})
    for row in rows:
        track = {"cat": "operation", "id": row.request_id, "pid": processes[row.subject], "tid": 0}
        about = {"seq_id": row.seq_id, "state": row.state, "tokens": row.tokens, "error": row.error}
        for name, start, end, args in _slices(row, about):
            slice_ = {**track, "name": name}
            events.append({**slice_, "ph": "b", "ts": _microseconds(start - beginning), "args": args})
            events.append({**slice_, "ph": "e", "ts": _microseconds(end - beginning)})
    began_at = datetime.datetime.fromtimestamp(beginning, datetime.UTC).isoformat()
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"began_at": began_at}}
    return json.dumps(whole).encode()


def _slices(row: Any, about: Json) -> Iterator[tuple[str, float, float, Json]]:
    """(name, start, end, arguments), the operation itself first."""
    known = [
        t for t in (row.submitted_at, row.started_at, row.finished_at, row.retrieved_at) if t is not None
    ]
    yield f"{row.kind} {row.seq_id}", row.submitted_at, max(known), about
    for name, start, end in _PHASES:
        began, ended = getattr(row, start), getattr(row, end)
        if began is not None and ended is not None:
            yield name, began, max(began, ended), {}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
