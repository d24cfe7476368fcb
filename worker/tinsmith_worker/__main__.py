"""`python -m tinsmith_worker`: one worker process, started by `tinsmith serve`."""

import argparse
import logging
import signal
import sys
from pathlib import Path

from tinsmith_api.journal.objects import open_store
from tinsmith_api.journal.store import Store
from tinsmith_worker.channel import Channel
from tinsmith_worker.contract import Engine, Sampler
from tinsmith_worker.intake import Drain
from tinsmith_worker.null_engine import NullEngine, NullSampler
from tinsmith_worker.process import Worker, WorkerSettings

DEFAULT_PATH = "tiny"
"""Names the base model that is made on first use."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tinsmith worker", description=__doc__)
    parser.add_argument("--worker-id", required=True)
    parser.add_argument("--base-model", required=True, help="the name clients use")
    parser.add_argument(
        "--path", default=DEFAULT_PATH, help="a folder or a hub id; 'tiny': the built-in base"
    )
    parser.add_argument("--journal", required=True, help="database URL")
    parser.add_argument("--objects", required=True, help="directory of checkpoints and snapshots")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the built-in base is kept")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the parent")
    parser.add_argument("--engine", choices=["torch", "null"], default="torch")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--pass-tokens", type=int, default=WorkerSettings.pass_tokens)
    parser.add_argument("--gap-seconds", type=float, default=WorkerSettings.gap_seconds)
    parser.add_argument("--snapshot-seconds", type=float, default=WorkerSettings.snapshot_seconds)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Ctrl-C reaches the whole process group; the parent decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine, sampler = _open_engine(given)
    except (OSError, ValueError) as error:
        sys.exit(f"tinsmith: cannot serve {given.base_model} from {given.path}: {error}")
    worker = Worker(
        worker_id=given.worker_id,
        base_model=given.base_model,
        journal=Store(given.journal),
        objects=open_store(given.objects),
        engine=engine,
        sampler=sampler,
        channel=Channel(given.channel),
        settings=WorkerSettings(given.pass_tokens, given.gap_seconds, given.snapshot_seconds),
    )
    signal.signal(signal.SIGTERM, lambda *_: worker.inbox.put(Drain()))
    worker.run()


def _open_engine(given: argparse.Namespace) -> tuple[Engine, Sampler]:
    if given.engine == "null":
        return NullEngine(), NullSampler()
    from tinsmith_worker.open_engine import open_engine

    return open_engine(
        given.path,
        data_dir=given.data_dir,
        deterministic=given.deterministic,
        pass_tokens=given.pass_tokens,
    )


if __name__ == "__main__":
    main()
