"""`python -m tinsmith_worker`: one worker process, started by `tinsmith serve` or as `tinsmith worker`.

Where the database, Redis and the objects are comes by environment, so that no password shows among the
processes: TINSMITH_DATABASE, TINSMITH_REDIS, TINSMITH_OBJECTS, TINSMITH_S3_*.
"""

import argparse
import logging
import math
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tinsmith_api.journal import metrics
from tinsmith_api.journal.objects import ObjectStore, open_store
from tinsmith_api.journal.store import Store
from tinsmith_worker.channel import Channel, Line
from tinsmith_worker.contract import Engine, Sampler
from tinsmith_worker.intake import Drain
from tinsmith_worker.null_engine import NullEngine, NullSampler
from tinsmith_worker.parallel.launch import (
    Followers,
    Place,
    end_with_leader,
    place_in_environment,
    start_followers,
)
from tinsmith_worker.process import Worker, WorkerSettings
from tinsmith_worker.tokenizer_files import keep_tokenizer

DEFAULT_PATH = "tiny"
"""Names the base model that comes with the package."""

# Samplers of a run that trains everything are each as large as the base.
_WHOLE_MODELS_HELD = 4

log = logging.getLogger("tinsmith.worker")


def main() -> None:
    given = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Ctrl-C reaches the whole process group; the parent decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN if given.channel is not None else _leave)
    signal.signal(signal.SIGTERM, _leave)
    place, followers = _place(given)
    if place is not None and place.rank > 0:
        _follow(given, place)
    metrics.serve(given.metrics_port)
    worker_id = given.worker_id or f"w-{uuid.uuid4().hex[:12]}"
    # A worker has nothing better to do than to wait for the database: its results must not be lost.
    journal = Store(os.environ["TINSMITH_DATABASE"], patience_seconds=math.inf)
    objects = _open_objects()
    channel = _open_channel(given, worker_id)
    try:
        engine, sampler = _open_engine(given, place)
    except (OSError, ValueError) as error:
        sys.exit(_cannot_serve(given, error))
    engine.facts = replace(engine.facts, tokenizer_files=keep_tokenizer(objects, engine.facts.tokenizer))
    worker = Worker(
        worker_id=worker_id,
        base_model=given.base_model,
        journal=journal,
        objects=objects,
        engine=engine,
        sampler=sampler,
        channel=channel,
        settings=WorkerSettings(
            pass_tokens=given.pass_tokens,
            gap_seconds=given.gap_seconds,
            snapshot_seconds=given.snapshot_seconds,
            storage_patience_seconds=given.storage_patience_seconds,
            idle_seconds=given.idle_seconds,
            slot_bytes=given.slot_bytes,
            host_bytes=given.host_bytes,
            role=given.role,
            samplers_held=_WHOLE_MODELS_HELD if given.single_tenant else WorkerSettings.samplers_held,
        ),
    )
    when_told_to_stop(
        lambda: worker.inbox.put(Drain()),
        [signal.SIGTERM, signal.SIGINT] if given.channel is None else [signal.SIGTERM],
    )
    worker.run()
    engine.close()
    if followers is not None:
        followers.let_go()


def _place(given: argparse.Namespace) -> tuple[Place | None, Followers | None]:
    """Where in a group this process is, and the followers if it had to start them itself."""
    place = place_in_environment()
    if given.sampler == "vllm" and given.role == "sample":
        if place is not None or given.nproc > 1:
            sys.exit(
                "tinsmith: a worker that only starts vLLM is one process; vLLM has options for more GPUs"
            )
        return None, None
    if place is not None or given.engine == "null" or (given.nproc == 1 and given.parallel == "none"):
        return place, None
    return start_followers(given.nproc, [sys.executable, "-m", "tinsmith_worker", *sys.argv[1:]])


def _follow(given: argparse.Namespace, place: Place) -> None:
    """Be a rank that others lead. Signals are the leader's business: this process ends when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_leader()
    try:
        _open_engine(given, place)
    except (OSError, ValueError) as error:
        sys.exit(_cannot_serve(given, error))


def _cannot_serve(given: argparse.Namespace, error: Exception) -> str:
    return f"tinsmith: cannot serve {given.base_model} from {given.path}: {error}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinsmith worker", description=__doc__)
    parser.add_argument("--worker-id", default="", help="default: a new one")
    parser.add_argument("--base-model", required=True, help="the name clients use")
    parser.add_argument(
        "--path", default=DEFAULT_PATH, help="a folder or a hub id; 'tiny': the built-in base"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        required=True,
        help="of the service it works for: processes are told apart by it",
    )
    parser.add_argument("--channel", type=int, help="descriptor of the socket to the parent, if there is one")
    parser.add_argument("--lease-seconds", type=float, default=6.0)
    parser.add_argument("--metrics-port", type=int, default=0)
    parser.add_argument("--engine", choices=["torch", "null"], default="torch")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument(
        "--exact-logprobs",
        action="store_true",
        help="score what was sampled by the trainer's forward: with --deterministic, the logprobs of a later "
        "forward_backward bit for bit",
    )
    parser.add_argument(
        "--role",
        choices=["train", "sample", "both"],
        default="both",
        help="what it is given to do: a pool may have workers of its own for either",
    )
    parser.add_argument("--sampler", choices=["tinsmith", "vllm"], default="tinsmith")
    parser.add_argument("--vllm", default="vllm", help="with --sampler vllm: its program and options")
    parser.add_argument("--parallel", choices=["none", "fsdp2", "deepspeed"], default="none")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--single-tenant", action="store_true")
    parser.add_argument("--offload-folder", default="")
    parser.add_argument("--quantize", choices=["", "nf4"], default="")
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a GPU; torchrun says it itself")
    parser.add_argument("--pass-tokens", type=int, default=WorkerSettings.pass_tokens)
    parser.add_argument("--gap-seconds", type=float, default=WorkerSettings.gap_seconds)
    parser.add_argument("--snapshot-seconds", type=float, default=WorkerSettings.snapshot_seconds)
    parser.add_argument(
        "--storage-patience-seconds", type=float, default=WorkerSettings.storage_patience_seconds
    )
    parser.add_argument("--idle-seconds", type=float, default=WorkerSettings.idle_seconds)
    parser.add_argument("--slot-bytes", type=int, default=WorkerSettings.slot_bytes)
    parser.add_argument("--host-bytes", type=int, default=WorkerSettings.host_bytes)
    return parser


def _leave(*_: object) -> None:
    """Asked to stop while the base is still loading: there is nothing to hand over."""
    log.info("stopped before the base model was loaded")
    os._exit(0)


def when_told_to_stop(stop: Callable[[], None], numbers: Sequence[signal.Signals]) -> None:
    """Python runs its own handlers on the main thread, once that wakes up; and a signal may be another's."""
    told, telling = socket.socketpair()
    telling.setblocking(False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(telling.detach())

    def listen() -> None:
        while told.recv(1):
            stop()

    threading.Thread(target=listen, name="signals", daemon=True).start()


def _open_objects() -> ObjectStore:
    said = {
        name: os.environ.get(f"TINSMITH_S3_{name.upper()}", "")
        for name in ("endpoint", "region", "encryption", "kms_key")
    }
    try:
        return open_store(os.environ["TINSMITH_OBJECTS"], **said)
    except (OSError, ValueError) as error:
        sys.exit(f"tinsmith: {error}")


def _open_channel(given: argparse.Namespace, worker_id: str) -> Line:
    if given.channel is not None:
        return Channel(given.channel)
    from tinsmith_worker.fleet_channel import FleetChannel

    return FleetChannel(
        Store(os.environ["TINSMITH_DATABASE"], patience_seconds=math.inf),
        os.environ["TINSMITH_REDIS"],
        worker_id,
        given.base_model,
        lease_seconds=given.lease_seconds,
        on_given_up=_begin_anew,
    )


def _begin_anew() -> None:
    """Everything in this process belongs to others by now: be a new worker."""
    os.execv(sys.executable, [sys.executable, "-m", "tinsmith_worker", *sys.argv[1:]])


def _open_engine(given: argparse.Namespace, place: Place | None) -> tuple[Engine, Sampler]:
    if given.engine == "null":
        return NullEngine(), NullSampler()
    if given.sampler == "vllm" and given.exact_logprobs:
        raise ValueError("exact logprobs are the trainer's: they need sampler tinsmith")
    if given.sampler == "vllm" and given.single_tenant:
        raise ValueError("vLLM samples adapters here, not whole models: single tenants need sampler tinsmith")
    if given.sampler == "vllm" and given.role == "sample":
        return _open_vllm(given)
    from tinsmith_worker.open_engine import Holding, open_engine

    by_vllm = given.sampler == "vllm" and given.role == "both"
    engine, sampler = open_engine(
        given.path,
        deterministic=given.deterministic,
        exact_logprobs=given.exact_logprobs,
        role="train" if by_vllm else given.role,
        pass_tokens=given.pass_tokens,
        place=place,
        holding=Holding(given.parallel, given.offload, given.offload_folder, given.quantize),
        single_tenant=given.single_tenant,
    )
    return engine, _open_vllm(given)[1] if by_vllm else sampler


def _open_vllm(given: argparse.Namespace) -> tuple[Engine, Sampler]:
    from tinsmith_worker import tiny_base
    from tinsmith_worker.vllm import open_vllm

    path = str(tiny_base.FOLDER) if given.path == DEFAULT_PATH else given.path
    return open_vllm(path, given.vllm)


if __name__ == "__main__":
    main()
