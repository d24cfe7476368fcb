"""The worker process around an engine that can be told to fail. The journal and the object store are real."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.wire import datum
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import TrainOutput
from tinsmith_api.journal import identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.objects import DirectoryStore
from tinsmith_api.journal.operations import Operation, Outcome
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import runs
from tinsmith_worker.channel import Channel
from tinsmith_worker.contract import AdamParams, AdapterState, Failure, LoraSpec, Work
from tinsmith_worker.null_engine import NullEngine, NullSampler
from tinsmith_worker.process import Worker, WorkerSettings

POISON, INFINITE = 666, 777


class CountingEngine(NullEngine):
    """weights[0] counts the tokens stepped with. A pass that meets POISON breaks half-way, after having
    counted some; a gradient that met INFINITE makes the step a Failure."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, float] = {}
        self.passes: list[list[str]] = []

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
            if POISON in one.given.tokens_T:
                raise RuntimeError("out of memory, say")
        return super().forward_backward(work)

    def optim_step(self, run_id: str, params: AdamParams) -> dict[str, float] | Failure:
        gradient = self.gradients[run_id]
        self.gradients[run_id] = 0.0
        if not np.isfinite(gradient):
            return Failure("not finite")
        super().optim_step(run_id, params)
        return {"grad_norm": gradient}


class House:
    """A journal, an object store and workers on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Store(f"sqlite:///{folder / 'journal.db'}")
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
        self.engine = CountingEngine()
        self.worker = Worker(
            worker_id=name,
            base_model="m",
            journal=Store(str(self.journal.url)),
            objects=DirectoryStore(self.folder / "objects"),
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

    def submit(self, run: str, seq: int, kind: str, payload: bytes, *, ring: bool = True) -> str:
        operation = Operation(run, seq, kind, self.tenant, "m", payload=payload)
        request_id = self.journal.write(lambda c: ops.submit(c, operation)).result()[0].request_id
        if ring:
            self.line.sendall(f"ring {request_id}\n".encode())
        return request_id

    def train(self, run: str, seq: int, *tokens: int, ring: bool = True) -> str:
        message = pb.ForwardBackwardRequest(data=[datum([*tokens, 0])], loss_fn="cross_entropy", seq_id=seq)
        return self.submit(run, seq, ops.FORWARD_BACKWARD, message.SerializeToString(), ring=ring)

    def step(self, run: str, seq: int, *, ring: bool = True) -> str:
        return self.submit(run, seq, ops.OPTIM_STEP, json.dumps({"adam_params": {}}).encode(), ring=ring)

    def outcome(self, request_id: str) -> Outcome:
        for _ in range(1000):
            found = self.journal.read(lambda c: ops.outcome(c, request_id, self.tenant)).result()
            if found and found.state != ops.QUEUED:
                return found
            time.sleep(0.01)
        raise AssertionError("never finished")

    def gradient_of(self, request_id: str) -> float:
        body = self.outcome(request_id).body
        assert body is not None, self.outcome(request_id).error
        return float(json.loads(body)["metrics"]["grad_norm"])


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
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


def test_a_step_that_failed_and_cleared_its_gradient_does_so_in_a_replay_too(house: House) -> None:
    house.run("a")
    house.train("a", 1, INFINITE, 1)
    assert house.outcome(house.step("a", 2)).error is not None
    house.outcome(house.train("a", 3, 1, 2))
    house.line.close()  # as if the control plane had died: the worker leaves
    house.thread.join(timeout=20)
    # A snapshot was taken on leaving; without it the replay starts from nothing.
    house.journal.write(
        lambda c: c.execute(runs.update().values(snapshot_seq=-1, snapshot_key=None))
    ).result()
    restore_payloads(house)
    house.start("w2")
    assert house.gradient_of(house.step("a", 4)) == 2


def restore_payloads(house: House) -> None:
    from tinsmith_api.journal.tables import payloads

    first = pb.ForwardBackwardRequest(data=[datum([INFINITE, 1, 0])], loss_fn="cross_entropy", seq_id=1)
    third = pb.ForwardBackwardRequest(data=[datum([1, 2, 0])], loss_fn="cross_entropy", seq_id=3)
    step = json.dumps({"adam_params": {}}).encode()
    bodies = {0: b"{}", 1: first.SerializeToString(), 2: step, 3: third.SerializeToString()}
    for seq, body in bodies.items():
        found = house.journal.read(lambda c, seq=seq: ops.find(c, "a", seq)).result()
        assert found is not None
        row = {"request_id": found.request_id, "body": body}
        house.journal.write(lambda c, row=row: c.execute(payloads.insert().values(row))).result()


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
