"""The worker process around an engine that can be told to fail. The journal and the object store are real."""

import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from tests.e2e.wire import datum
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import TrainOutput
from tinsmith_api.journal import identities, leases, snapshots
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.objects import DirectoryStore
from tinsmith_api.journal.operations import Operation, Outcome
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import payloads, runs
from tinsmith_worker.channel import Channel
from tinsmith_worker.contract import AdapterState, Answer, Failure, LoraSpec, OptimizerParams, T, Work
from tinsmith_worker.null_engine import NullEngine, NullSampler
from tinsmith_worker.process import Worker, WorkerSettings

POISON, INFINITE, BREAKING, CROWDED = 666, 777, 888, 999


class CountingEngine(NullEngine):
    """weights[0] counts the tokens stepped with. A pass that meets POISON breaks half-way, after having
    counted some; a gradient that met INFINITE makes the step a Failure, and one that met BREAKING breaks it.
    CROWDED finds no room as often as `crowds` says.

    `device_seconds`: answers, errors among them, come so long after everything was begun."""

    def __init__(self) -> None:
        super().__init__()
        self.device_seconds = 0.0
        self.gradients: dict[str, float] = {}
        self.passes: list[list[str]] = []
        self.crowds = 0

    def create(self, run_id: str, spec: LoraSpec) -> None:
        super().create(run_id, spec)
        self.gradients[run_id] = 0.0

    def restore(self, run_id: str, state: AdapterState) -> None:
        super().restore(run_id, state)
        self.gradients[run_id] = 0.0 if state.gradient is None else float(state.gradient[0])

    def state(self, run_id: str) -> AdapterState:
        from dataclasses import replace

        return replace(super().state(run_id), gradient=np.float32([self.gradients[run_id]]))

    def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        self.passes.append([w.run_id for w in work])
        for one in work:
            if not one.given.forward_only:
                self.gradients[one.run_id] += np.inf if INFINITE in one.given.tokens_T else one.given.tokens
                if BREAKING in one.given.tokens_T:
                    self.gradients[one.run_id] = -1.0
            if POISON in one.given.tokens_T:
                raise RuntimeError("out of memory, say")
            if CROWDED in one.given.tokens_T and self.crowds:
                self.crowds -= 1
                raise MemoryError("no room")
        return super().forward_backward(work)

    def begin_forward_backward(self, work: Sequence[Work]) -> Answer[list[TrainOutput]]:
        return self._later(lambda: self.forward_backward(work))

    def begin_optim_steps(
        self, steps: Sequence[tuple[str, OptimizerParams]]
    ) -> Answer[list[dict[str, float] | Failure]]:
        return self._later(lambda: self.optim_steps(steps))

    def _later(self, compute: Callable[[], T]) -> Answer[T]:
        if not self.device_seconds:
            found = compute()
            return Answer(lambda: found)
        found: Future[T] = Future()
        is_done = threading.Event()
        try:
            found.set_result(compute())
        except Exception as error:
            found.set_exception(error)

        def wait() -> None:
            self.wait()
            is_done.set()

        return Answer(lambda: found.result(is_done.wait(20)), wait)

    def wait(self) -> None:
        time.sleep(self.device_seconds)

    def _step(self, run_id: str, params: OptimizerParams) -> dict[str, float] | Failure:
        gradient = self.gradients[run_id]
        if gradient < 0:
            raise RuntimeError("a kernel that does not run, say")
        self.gradients[run_id] = 0.0
        if not np.isfinite(gradient):
            return Failure("not finite")
        super()._step(run_id, params)
        return {"grad_norm": gradient}


def _received(line: socket.socket) -> bytes:
    try:
        return line.recv(1 << 16)
    except OSError:
        return b""


class House:
    """A journal, an object store and workers on them."""

    def __init__(self, folder: Path, device_seconds: float = 0.0) -> None:
        self.folder = folder
        self.device_seconds = device_seconds
        self.journal = Store(f"sqlite:///{folder / 'journal.db'}")
        self.objects = DirectoryStore(folder / "objects")
        self.tenant = self.journal.write(self._tenant).result()
        self.worker: Worker | None = None

    def _tenant(self, c) -> str:  # type: ignore[no-untyped-def]
        key = identities.create_key(c, "t")
        tenant = identities.tenant_of_key(c, identities.sha256(key))
        assert tenant
        blank = {
            "tags": [],
            "user_metadata": {},
            "sdk_version": None,
            "project_id": None,
            "display_name": None,
        }
        self.session = identities.create_session(c, tenant, blank)
        return tenant

    def start(self, name: str, **settings: float) -> None:
        ours, theirs = socket.socketpair()
        self.line = ours
        # Somebody must read what the worker says, or it will have to wait.
        threading.Thread(
            target=lambda: [None for _ in iter(lambda: _received(ours), b"")], daemon=True
        ).start()
        self.engine = CountingEngine()
        self.engine.device_seconds = self.device_seconds
        self.journal.write(lambda c: leases.register_worker(c, name, "m", {})).result()
        self.worker = Worker(
            worker_id=name,
            base_model="m",
            journal=Store(str(self.journal.url)),
            objects=self.objects,
            engine=self.engine,
            sampler=NullSampler(),
            channel=Channel(theirs.detach()),
            settings=WorkerSettings(**{"snapshot_seconds": 3600.0, **settings}),  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=self.worker.run)
        self.thread.start()

    def drain(self) -> None:
        self.line.sendall(b"drain\n")
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        self.line.close()

    def run(self, name: str) -> str:
        row = {"id": name, "tenant_id": self.tenant, "session_id": self.session, "base_model": "m"}
        lora = {"rank": 1, "seed": 1, "train_attn": True, "train_mlp": True, "train_unembed": True}
        more = {"lora": lora, "user_metadata": {}, "created_at": 0, "epoch": 0, "snapshot_seq": -1}
        self.journal.write(lambda c: c.execute(runs.insert().values(**row, **more))).result()
        assert self.outcome(self.submit(name, 0, ops.CREATE_MODEL, b"{}")).error is None
        return name

    def forget_snapshot(self) -> None:
        """As if the last worker had been killed before it could take one."""
        gone = runs.update().values(snapshot_seq=-1, snapshot_key=None)
        self.journal.write(lambda c: c.execute(gone)).result()

    def submit(
        self, run: str, seq: int, kind: str, payload: bytes, *, ring: bool = True, tokens: int = 0
    ) -> str:
        operation = Operation(run, seq, kind, self.tenant, "m", payload=payload, tokens=tokens)
        request_id = self.journal.write(lambda c: ops.submit(c, operation)).result()[0].request_id
        if ring:
            self.line.sendall(f"ring {request_id}\n".encode())
        return request_id

    def train(self, run: str, seq: int, *tokens: int, ring: bool = True) -> str:
        message = pb.ForwardBackwardRequest(data=[datum([*tokens, 0])], loss_fn="cross_entropy", seq_id=seq)
        body = message.SerializeToString()
        return self.submit(run, seq, ops.FORWARD_BACKWARD, body, ring=ring, tokens=len(tokens))

    def step(self, run: str, seq: int, *, ring: bool = True) -> str:
        return self.submit(run, seq, ops.OPTIM_STEP, json.dumps({"adam_params": {}}).encode(), ring=ring)

    def train_and_step(self, run: str, turn: int) -> str:
        """The step of the `turn`th pair of calls, after a pass over two tokens."""
        self.train(run, 2 * turn - 1, 1, 2)
        return self.step(run, 2 * turn)

    def outcome(self, request_id: str, *, pause: float = 0.01) -> Outcome:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = self.journal.read(lambda c: ops.outcome(c, request_id, self.tenant)).result()
            if found and found.state != ops.QUEUED:
                return found
            time.sleep(pause)
        raise AssertionError("never finished")

    def queued(self, request_id: str) -> bool:
        (found,) = self.journal.read(lambda c: ops.look_up(c, [request_id])).result()
        return found.state == ops.QUEUED

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        def run(c: sa.Connection) -> list[tuple[object, ...]]:
            done = c.exec_driver_sql(statement)
            return [tuple(row) for row in done] if done.returns_rows else []

        return self.journal.write(run).result()

    def another_tenant(self, name: str) -> str:
        def enter(c: sa.Connection) -> str:
            key = identities.create_key(c, name)
            tenant = identities.tenant_of_key(c, identities.sha256(key))
            assert tenant
            return tenant

        return self.journal.write(enter).result()

    def gradient_of(self, request_id: str) -> float:
        body = self.outcome(request_id).body
        assert body is not None, self.outcome(request_id).error
        return float(json.loads(body)["metrics"]["grad_norm"])


@pytest.fixture(params=[0.0, 0.03], ids=["at once", "later"])
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    """Whose engine answers at once, or when its device has done it."""
    made = House(tmp_path, request.param)
    made.start("w1")
    yield made
    if made.thread.is_alive():
        made.drain()
    made.journal.close()


def test_what_breaks_a_pass_fails_alone_and_its_neighbours_lose_and_gain_nothing(house: House) -> None:
    for name in ("a", "b", "c"):
        house.run(name)
        house.outcome(house.train(name, 1, 1, 2, 3))
    # Submitted together, rung together: they share a pass.
    waiting = {
        name: house.train(name, 2, *tokens, ring=False)
        for name, tokens in (("a", [4, 5]), ("b", [POISON]), ("c", [6, 7, 8, 9]))
    }
    house.line.sendall("".join(f"ring {r}\n" for r in waiting.values()).encode())
    failed = house.outcome(waiting["b"])
    assert failed.error is not None
    assert failed.error["category"] == "server"
    assert "out of memory" in failed.error["error"]
    assert house.outcome(waiting["a"]).error is None
    assert house.outcome(waiting["c"]).error is None
    gradients = {name: house.gradient_of(house.step(name, 3)) for name in "abc"}
    assert gradients == {"a": 5, "b": 3, "c": 7}, "half of a broken pass was left in a gradient"


@pytest.mark.parametrize(("crowds", "gradient"), [(1, 5), (2, 3)])
def test_a_pass_without_room_on_the_device_has_another_try(house: House, crowds: int, gradient: int) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2, 3))
    house.engine.crowds = crowds
    failed = house.outcome(house.train("a", 2, CROWDED, 4)).error
    assert (failed is None) == (crowds == 1)
    assert failed is None or "no room" in failed["error"]
    assert house.gradient_of(house.step("a", 3)) == gradient, "half of a broken pass was left in the gradient"


def test_what_breaks_steps_that_are_taken_together_fails_alone(house: House) -> None:
    for name, tokens in (("a", [4, 5]), ("b", [BREAKING]), ("c", [6, 7, 8])):
        house.run(name)
        house.outcome(house.train(name, 1, *tokens))
    waiting = {name: house.step(name, 2, ring=False) for name in ("a", "b", "c")}
    house.line.sendall("".join(f"ring {r}\n" for r in waiting.values()).encode())
    failed = house.outcome(waiting["b"])
    assert failed.error is not None
    assert "does not run" in failed.error["error"]
    assert [house.gradient_of(waiting[name]) for name in ("a", "c")] == [2, 3]
    assert [house.engine.state(name).step for name in ("a", "c")] == [1, 1]


def test_a_step_that_failed_and_cleared_its_gradient_does_so_in_a_replay_too(house: House) -> None:
    house.run("a")
    house.train("a", 1, INFINITE, 1)
    assert house.outcome(house.step("a", 2)).error is not None
    house.outcome(house.train("a", 3, 1, 2))
    house.line.shutdown(socket.SHUT_RDWR)  # as if the control plane had died: the worker leaves
    house.thread.join(timeout=20)
    # A snapshot was taken on leaving; without it the replay starts from nothing.
    house.forget_snapshot()
    restore_payloads(house, a_step_and_its_calls())
    house.start("w2")
    assert house.gradient_of(house.step("a", 4)) == 2


def a_step_and_its_calls() -> dict[int, bytes]:
    first = pb.ForwardBackwardRequest(data=[datum([INFINITE, 1, 0])], loss_fn="cross_entropy", seq_id=1)
    third = pb.ForwardBackwardRequest(data=[datum([1, 2, 0])], loss_fn="cross_entropy", seq_id=3)
    step = json.dumps({"adam_params": {}}).encode()
    return {0: b"{}", 1: first.SerializeToString(), 2: step, 3: third.SerializeToString()}


def restore_payloads(house: House, bodies: dict[int, bytes]) -> None:
    """As if the snapshot that purged them had never been taken."""
    calls = house.journal.read(lambda c: ops.history(c, "a", -1)).result()
    rows = [{"request_id": o.request_id, "body": bodies[o.seq_id]} for o in calls if o.seq_id in bodies]
    house.journal.write(lambda c: c.execute(payloads.insert(), rows)).result()


def test_a_replay_does_not_change_results_or_count_twice(house: House) -> None:
    house.run("a")
    passed = house.train("a", 1, 1, 2, 3)
    before = house.outcome(passed).body
    house.drain()
    house.start("w2")
    assert house.gradient_of(house.step("a", 2)) == 3
    assert house.outcome(passed).body == before


def test_what_was_submitted_while_no_worker_lived_is_executed_by_the_next(house: House) -> None:
    house.run("a")
    house.drain()
    late = [house.train("a", 1, 1, 2, ring=False), house.step("a", 2, ring=False)]
    house.start("w2")
    assert house.gradient_of(late[1]) == 2


def test_a_worker_that_leaves_takes_a_snapshot_and_the_next_replays_nothing(house: House) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2, 3))
    house.outcome(house.step("a", 2))
    house.outcome(house.train("a", 3, 1, 2))
    house.drain()
    house.start("w2")
    assert house.gradient_of(house.step("a", 4)) == 2
    assert house.engine.passes == [], "the accumulated gradient was computed again"
    assert house.engine.state("a").step == 2


def test_runs_share_a_pass_when_they_wait_together(house: House) -> None:
    names = [house.run(f"r{i}") for i in range(5)]
    waiting = [house.train(name, 1, 1, 2, 3, ring=False) for name in names]
    house.engine.passes.clear()
    house.line.sendall("".join(f"ring {r}\n" for r in waiting).encode())
    for request_id in waiting:
        assert house.outcome(request_id).error is None
    assert len(house.engine.passes) < 5


def test_a_result_that_cannot_be_kept_is_a_failure_and_the_run_is_what_it_says(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2, 3))

    def breaks(metrics: dict[str, float]) -> bytes:
        raise ValueError("no such number in JSON")

    monkeypatch.setattr("tinsmith_worker.answers.optim_step", breaks)
    failed = house.outcome(house.step("a", 2))
    assert failed.error is not None
    assert "could not be kept" in failed.error["error"]
    monkeypatch.undo()
    house.outcome(house.train("a", 3, 1, 2))
    house.drain()
    house.start("w2")
    assert house.gradient_of(house.step("a", 4)) == 2
    assert house.engine.state("a").step == 2, "the step whose result was lost was lost with it"


def test_a_snapshot_never_covers_a_call_without_result(house: House) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2))
    assert house.worker is not None
    waiting = house.train("a", 2, 3, 4, ring=False)
    epoch = house.worker.intake.known["a"]

    def record(c):  # type: ignore[no-untyped-def]
        return snapshots.record(c, "a", seq_id=2, key="k", worker_id="w1", epoch=epoch)

    with pytest.raises(snapshots.Unfinished):
        house.journal.write(record).result()
    house.line.sendall(f"ring {waiting}\n".encode())
    assert house.outcome(waiting).error is None


def test_one_damaged_checkpoint_fails_its_load_and_nothing_else(house: House) -> None:
    house.run("a")
    house.run("b")
    folder = house.folder / "objects" / "bad"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("")
    call = {"path": "tinker://x/weights/bad", "optimizer": False, "object_prefix": "bad"}
    failed = house.outcome(house.submit("a", 1, ops.LOAD_WEIGHTS, json.dumps(call).encode()))
    assert failed.error is not None
    assert house.outcome(house.train("b", 1, 1, 2)).error is None
    assert house.gradient_of(house.step("a", 2)) == 0


def test_a_snapshot_that_cannot_be_restored_fails_its_run_and_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.run("a")
    house.run("b")
    house.outcome(house.train("a", 1, 1, 2))
    house.drain()

    def refuses(self: CountingEngine, run_id: str, state: AdapterState) -> None:
        raise RuntimeError("made for another base")

    monkeypatch.setattr(CountingEngine, "restore", refuses)
    waiting = house.step("a", 2, ring=False)
    house.start("w2")
    failed = house.outcome(waiting)
    assert failed.error is not None
    assert "another base" in failed.error["error"]
    later = house.outcome(house.step("a", 3))
    assert later.error is not None, "a later call must not wait for the ones that failed"
    monkeypatch.undo()
    assert house.run("c")


def test_a_call_that_cannot_be_replayed_fails_its_run_and_is_not_skipped(house: House) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2))
    house.outcome(house.train("a", 2, 3, 4, 5))
    house.drain()
    house.forget_snapshot()
    restore_payloads(house, {0: b"{}"})
    house.start("w2")
    failed = house.outcome(house.step("a", 3))
    assert failed.error is not None
    assert "could not be brought back" in failed.error["error"]


def test_bodies_of_forwards_are_not_kept_and_not_replayed(house: House) -> None:
    house.run("a")
    message = pb.ForwardBackwardRequest(
        data=[datum([1, 2, 0])], loss_fn="cross_entropy", forward_only=True, seq_id=1
    )
    house.outcome(house.submit("a", 1, ops.FORWARD, message.SerializeToString()))
    kept = house.journal.read(lambda c: [o for o in ops.history(c, "a", 0) if o.payload is not None]).result()
    assert kept == []
    house.drain()
    house.start("w2")
    assert house.gradient_of(house.step("a", 2)) == 0


def test_a_call_that_arrives_after_its_run_was_dropped_is_not_lost(house: House) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2))
    assert house.worker is not None
    house.worker._drop("a")  # between two batches: the engine's thread is waiting
    assert house.gradient_of(house.step("a", 2)) == 2


def test_a_worker_given_up_for_dead_can_take_nothing(house: House) -> None:
    house.run("a")
    house.journal.write(lambda c: leases.stop_worker(c, "w1")).result()
    assert house.journal.write(lambda c: leases.take(c, "a", "w1")).result() is None


def test_a_worker_that_waits_hears_that_it_must_stop_whichever_thread_is_told() -> None:
    program = (
        "import queue, signal, threading, time; from tinsmith_worker.__main__ import when_told_to_stop\n"
        "told = queue.SimpleQueue()\n"
        "for _ in range(6): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
        "when_told_to_stop(lambda: told.put(None), [signal.SIGTERM])\n"
        "while True: print(flush=True); told.get()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(20):
        assert select.select([process.stdout], [], [], 20)[0]
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        process.send_signal(signal.SIGCONT)  # a signal that comes now is often not the main thread's
        process.terminate()
    process.kill()
    process.wait()
