"""What is broken, how, and for how long. Each method of Faults is one kill point."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.fleet import Breakable
from tests.chaos.trainers import Trainer
from tests.servers import wait_until

KINDS = [
    *["kill worker"] * 3,
    *["kill api"] * 2,
    *["kill redis"] * 2,
    *["kill postgresql"] * 2,
    *["stop worker past its lease"] * 2,
    *["cut worker off"] * 2,
    "drain worker",
    "a worker joins and is drained",
    "kill beat",
    "kill jobs",
    "object store answers 503",
    "object store is slow",
    "object store is full",
]
"""What is drawn from; "cut worker off" closes its connections, "silence" below swallows its packets."""

AS_ROOT = ["silence worker", "silence worker"]
DISK = ["fill disk", "fill disk", "kill worker"]
"""For a fleet whose objects are in a directory on a small disk."""

# How often the next fault does not wait until everybody goes on after the last.
_AT_ONCE = 0.25


@dataclass
class Fault:
    """seconds: until every tenant that was still training had the result of a call made after the fault;
    None if nobody was, or if the next fault came first."""

    kind: str
    at: float
    seconds: float | None = None


@dataclass
class Faults:
    fleet: Breakable
    random: random.Random
    kinds: list[str]
    lease_seconds: float
    most: int
    log: list[Fault] = field(default_factory=list)

    def strike(self, trainers: list[Trainer], finished: threading.Event) -> None:
        """One fault after the other until the tenants are through."""
        while not finished.wait(self.random.uniform(0.2, 1.5)) and len(self.log) < self.most:
            fault = Fault(self.random.choice(self.kinds), time.monotonic())
            self.log.append(fault)
            getattr(self, fault.kind.replace(" ", "_"))()
            if self.random.random() >= _AT_ONCE:
                self._wait(fault, trainers, finished)

    def _wait(self, fault: Fault, trainers: list[Trainer], finished: threading.Event) -> None:
        ends = []
        for trainer in trainers:
            outcome = trainer.outcome
            while (end := outcome.recovered_at(fault.at)) is None and not outcome.is_over:
                if finished.wait(0.02):
                    break
            if end is not None:
                ends.append(end)
        fault.seconds = max(ends, default=fault.at) - fault.at if ends else None

    # -- processes that die

    def kill_worker(self) -> None:
        self._signal(self.fleet.workers()[0], signal.SIGKILL)

    def kill_api(self) -> None:
        self._signal(self.random.choice(["api0", "api1"]), signal.SIGKILL)

    def kill_beat(self) -> None:
        self._signal("beat", signal.SIGKILL)

    def kill_jobs(self) -> None:
        self._signal("jobs", signal.SIGKILL)

    def kill_redis(self) -> None:
        self.fleet.redis.kill()
        time.sleep(self.random.uniform(0, 3))
        self.fleet.redis.start()

    def kill_postgresql(self) -> None:
        self.fleet.kill_postgres()
        time.sleep(self.random.uniform(0, 3))
        self.fleet.postgres.start()

    # -- workers that come and go

    def drain_worker(self) -> None:
        name = self.fleet.workers()[0]
        with self._not_restarted(name):
            self._signal(name, signal.SIGTERM)
            self._left(name)

    def a_worker_joins_and_is_drained(self) -> None:
        fleet = self.fleet
        fleet.commands["worker-extra"] = fleet.commands["worker0"]
        with self._not_restarted("worker-extra"):
            before = set(fleet.ready_workers())
            fleet.start_one("worker-extra")
            wait_until(lambda: set(fleet.ready_workers()) - before, 60, "a worker's joining")
            time.sleep(1)
            # Another one may have joined meanwhile; the line tells which one this is.
            wait_until(lambda: fleet.lines["worker-extra"].worker_id in fleet.ready_workers(), 60, "its ring")
            fleet.admin("workers", "drain", fleet.lines["worker-extra"].worker_id)
            self._left("worker-extra")
            del fleet.commands["worker-extra"], fleet.processes["worker-extra"]

    @contextlib.contextmanager
    def _not_restarted(self, name: str) -> Iterator[None]:
        self.fleet.paused.add(name)
        try:
            yield
        finally:
            self.fleet.paused.discard(name)

    def _left(self, name: str) -> None:
        code = self.fleet.processes[name].wait(timeout=90)
        assert code == 0, f"{name} was drained and left with {code}"

    # -- workers that are taken for dead and are not

    def stop_worker_past_its_lease(self) -> None:
        self.fleet.wait_for_workers(2)
        name = self.fleet.workers()[0]
        pid = self.fleet.processes[name].pid
        with self._zombie(name):
            os.kill(pid, signal.SIGSTOP)
            try:
                self._given_up(name)
            finally:
                os.kill(pid, signal.SIGCONT)

    def cut_worker_off(self) -> None:
        self.fleet.wait_for_workers(2)
        name = self.fleet.workers()[0]
        with self._zombie(name):
            for line in self.fleet.lines[name].all:
                line.cut()
            try:
                self._given_up(name)
            finally:
                for line in self.fleet.lines[name].all:
                    line.heal()

    def silence_worker(self) -> None:
        self.fleet.wait_for_workers(2)
        name = self.fleet.workers()[0]
        namespace = self.fleet.lines[name].namespace
        assert namespace is not None
        with self._zombie(name):
            namespace.cut()
            try:
                self._given_up(name)
            finally:
                namespace.heal()

    def _given_up(self, name: str) -> None:
        """Wait until the others took it for dead, and have computed on without it for a moment."""
        worker_id = self.fleet.lines[name].worker_id
        asked = "select count(*) from workers where id = ? and stopped_at is null"
        wait_until(
            lambda: self.fleet.sql(asked, worker_id) == [(0,)], 8 * self.lease_seconds, "its being given up"
        )
        time.sleep(1)

    @contextlib.contextmanager
    def _zombie(self, name: str) -> Iterator[None]:
        """What the others made of its runs stays as it is when it wakes, and it becomes a new worker."""
        fleet, worker_id = self.fleet, self.fleet.lines[name].worker_id
        yield
        kept = fleet.sql("select request_id, md5(body) from results")
        wait_until(lambda: fleet.lines[name].worker_id != worker_id, 60, "its beginning anew")
        after = dict(fleet.sql("select request_id, md5(body) from results"))
        assert all(after[request_id] == digest for request_id, digest in kept), "a result was changed"
        held = "select count(*) from runs join sessions on sessions.id = session_id where worker_id = ? "
        queued = "and exists (select 1 from operations where subject = runs.id and state = 'queued')"
        wait_until(lambda: fleet.sql(held + queued, worker_id) == [(0,)], 30, "its losing its runs")

    # -- the object store

    def object_store_answers_503(self) -> None:
        self._store(status=503)

    def object_store_is_full(self) -> None:
        self._store(status=507)

    def object_store_is_slow(self) -> None:
        self._store(delay_seconds=0.3)

    def _store(self, status: int = 0, delay_seconds: float = 0.0) -> None:
        line = self.fleet.s3_line
        line.status, line.delay_seconds = status, delay_seconds
        try:
            time.sleep(self.random.uniform(1, 6))
        finally:
            line.heal()

    def fill_disk(self) -> None:
        filler = Path(str(self.fleet.settings["objects"])) / "filler"
        try:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * (64 << 10))
            time.sleep(self.random.uniform(1, 4))
        finally:
            filler.unlink()

    def _signal(self, name: str, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # another fault was faster
            os.kill(self.fleet.processes[name].pid, number)
