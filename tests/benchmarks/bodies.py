"""Where a call's body is best kept: in a row of the journal, or in a file of its own with its name in the row.

python tests/benchmarks/bodies.py [FOLDER]   (docs/decisions/0002-bodies-in-rows.md)
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import payloads

ROUNDS = 200


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        store = Store(f"sqlite:///{folder}/journal.db")
        for size in (1_000, 131_000, 1_000_000):
            body = os.urandom(size)
            rows = [
                _timed(lambda i=i, body=body: _row(store, f"r{len(body)}-{i}", body)) for i in range(ROUNDS)
            ]
            files = [
                _timed(lambda i=i, body=body: _file(store, Path(folder), f"f{len(body)}-{i}", body))
                for i in range(ROUNDS)
            ]
            print(f"{size:>9} bytes: row {_ms(rows)}, file and row {_ms(files)}")
        store.close()


def _row(store: Store, name: str, body: bytes) -> None:
    store.write(lambda c: c.execute(payloads.insert().values(request_id=name, body=body))).result()


def _file(store: Store, folder: Path, name: str, body: bytes) -> None:
    with open(folder / name, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    _row(store, name, name.encode())


def _timed(write) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    write()
    return time.perf_counter() - start


def _ms(taken: list[float]) -> str:
    ordered = sorted(taken)
    p95 = ordered[int(0.95 * len(ordered))]
    return f"p50 {statistics.median(ordered) * 1e3:.2f} p95 {p95 * 1e3:.2f} ms"


if __name__ == "__main__":
    main()
