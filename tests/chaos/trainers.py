"""Tenants that train whatever is broken around them, as clients that repeat what was not answered."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from tests.chaos.fleet import MODEL
from tests.conftest import RunningFleet
from tests.e2e.wire import datum
from tinsmith.wire import tinsmith_pb2 as pb

STEPS = 60
PACE_SECONDS = 0.1
"""A step takes at least so long, so that faults strike in the middle."""

_PATIENCE_SECONDS = 150.0
_UNDER_WAY = 4


@dataclass
class Outcome:
    """All that one tenant was told, by number, and its weights at the end.

    times: (when a result came, when its call had been accepted).
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    futures: dict[int, str] = field(default_factory=dict)
    times: list[tuple[float, float]] = field(default_factory=list)
    weights: dict[str, bytes] = field(default_factory=dict)
    repeats: int = 0
    is_over: bool = False

    def recovered_at(self, fault: float) -> float | None:
        """When the first result came of a call that was made after the fault."""
        return next((came for came, called in list(self.times) if called > fault), None)


class Trainer:
    """One tenant, one run: STEPS steps with a save after every sixth, four calls under way."""

    def __init__(self, fleet: RunningFleet, key: str, number: int) -> None:
        self.fleet = fleet
        self.number = number
        self.outcome = Outcome()
        self.run = ""
        self._http = httpx.Client(headers={"x-api-key": key, "accept": "application/x-protobuf"}, timeout=20)
        self._calls = 0
        self._sent: list[tuple[str, dict[str, Any] | bytes, str]] = []

    def train(self) -> None:
        self.run = self._create()
        seq_id, pending = 0, []
        for step in range(STEPS):
            due = time.monotonic() + PACE_SECONDS
            for path, call in self._calls_of(step, seq_id):
                seq_id += 1
                request_id = self._submit(path, call)
                pending.append((seq_id, request_id, time.monotonic()))
            while len(pending) > _UNDER_WAY:
                self._result(*pending.pop(0))
            time.sleep(max(0.0, due - time.monotonic()))
        for waiting in pending:
            self._result(*waiting)
        path = f"tinker://{self.run}/weights/step-{STEPS - 1}"
        (prefix,) = self.fleet.sql("select object_prefix from checkpoints where path = ?", path)[0]
        self.outcome.weights = self.fleet.objects().get(prefix)

    def check_again(self) -> None:
        """What was answered once is answered the same ever after, and a call that is sent again is the same."""
        for number, request_id in self.outcome.futures.items():
            again = self._fetch(request_id)
            assert again == self.outcome.answers[number], f"tenant {self.number}: {number} changed its answer"
        for path, call, request_id in self._sent[:: max(1, len(self._sent) // 20)]:
            assert self._post(path, call)["request_id"] == request_id, f"{path} was taken for a new call"

    def load(self, path: str) -> None:
        """A new run from a checkpoint."""
        session = self._post("create_session", {"tags": []})["session_id"]
        call = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
        made = self._post("load_weights", call)
        assert b":train:" in self._fetch(made["request_id"])
        self.finish(session)

    def finish(self, session: str = "") -> None:
        session = session or self.run.split(":train:")[0]
        self._post(f"sessions/{session}/finish", {"reason": {"type": "success"}})

    def _create(self) -> str:
        session = self._post("create_session", {"tags": []})["session_id"]
        lora = {"rank": 4, "seed": self.number}
        call = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": lora}
        self._result(0, self._submit("create_model", call), time.monotonic())
        return f"{session}:train:0"

    def _calls_of(self, step: int, seq_id: int) -> list[tuple[str, dict[str, Any] | bytes]]:
        drawn = np.random.default_rng(1000 * self.number + step)
        data = [datum(drawn.integers(0, 1000, length).tolist()) for length in (9, 25, 14)]
        message = pb.ForwardBackwardRequest(
            model_id=self.run, seq_id=seq_id + 1, data=data, loss_fn="cross_entropy"
        )
        adam = {"learning_rate": 1e-3, "grad_clip_norm": 1.0}
        calls: list[tuple[str, dict[str, Any] | bytes]] = [
            ("forward_backward", message.SerializeToString()),
            ("optim_step", {"model_id": self.run, "seq_id": seq_id + 2, "adam_params": adam}),
        ]
        if step % 6 == 5:
            calls.append(
                ("save_weights", {"model_id": self.run, "seq_id": seq_id + 3, "path": f"step-{step}"})
            )
        return calls

    def _submit(self, path: str, call: dict[str, Any] | bytes) -> str:
        request_id = str(self._post(path, call)["request_id"])
        self._sent.append((path, call, request_id))
        return request_id

    def _result(self, number: int, request_id: str, called: float) -> None:
        self.outcome.answers[number] = self._fetch(request_id)
        self.outcome.futures[number] = request_id
        self.outcome.times.append((time.monotonic(), called))

    def _fetch(self, request_id: str) -> bytes:
        while True:
            answer = self._send("retrieve_future", {"request_id": request_id})
            if answer.status_code == 200:
                assert b'"category"' not in answer.content, answer.text
                return answer.content
            assert answer.status_code == 408, answer.text

    def _post(self, path: str, body: dict[str, Any] | bytes) -> dict[str, Any]:
        answer = self._send(path, body)
        assert answer.status_code == 200, answer.text
        decoded: dict[str, Any] = answer.json() if answer.content else {}
        return decoded

    def _send(self, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
        """To any API process, again and again on whatever the official SDK repeats."""
        until = time.monotonic() + _PATIENCE_SECONDS
        kind = "application/x-protobuf" if isinstance(body, bytes) else "application/json"
        content = body if isinstance(body, bytes) else httpx.Request("POST", "http://x", json=body).content
        while True:
            self._calls += 1
            url = self.fleet.urls[(self._calls + self.number) % len(self.fleet.urls)]
            try:
                answer = self._http.post(
                    f"{url}/api/v1/{path}", content=content, headers={"content-type": kind}
                )
                if answer.status_code not in (409, 429) and answer.status_code < 500:
                    return answer
                problem = answer.text
            except httpx.TransportError as error:
                problem = repr(error)
            self.outcome.repeats += 1
            assert time.monotonic() < until, f"{path} was not answered for {_PATIENCE_SECONDS} s: {problem}"
            time.sleep(0.1)


def train_all(
    fleet: RunningFleet, keys: list[str], meanwhile: Callable[[list[Trainer], threading.Event], None]
) -> list[Trainer]:
    """All tenants at once; `meanwhile` runs beside them until its event is set. The first error of any rises."""
    trainers = [Trainer(fleet, key, number) for number, key in enumerate(keys)]
    finished = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            finished.set()

    def train(trainer: Trainer) -> None:
        try:
            trainer.train()
        finally:
            trainer.outcome.is_over = True

    threads = [threading.Thread(target=guarded, args=(lambda t=t: train(t),)) for t in trainers]
    breaking = threading.Thread(target=guarded, args=(lambda: meanwhile(trainers, finished),))
    for thread in (*threads, breaking):
        thread.start()
    for thread in threads:
        thread.join()
    finished.set()
    breaking.join()
    if failures:
        raise failures[0]
    return trainers
