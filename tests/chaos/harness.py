"""Kill everything, again and again, while three tenants train; nothing may be lost, and no bit be different.

`make chaos` runs the long form and prints the table of docs/reliability.md; tests/chaos/test_chaos.py a short
one. The faults follow from the seed; when exactly they strike, the machine decides.
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.chaos.proxy import CUT, PASS, REFUSE, SLOW, Proxy
from tests.conftest import RunningFleet
from tests.e2e.wire import datum
from tinsmith.wire import tinsmith_pb2 as pb

MODEL = "tinsmith/tiny"
TENANTS = 3
STEPS = 24
LEASE_SECONDS = 2.0
_PATIENCE_SECONDS = 150.0


class Breakable(RunningFleet):
    """A fleet whose workers reach their servers through lines of their own that can be cut, and everybody the
    object store through one that can refuse."""

    def __init__(self, folder: Path, workers: int = 2, **settings: object) -> None:
        self.lines: dict[str, dict[str, Proxy]] = {}
        super().__init__(
            folder,
            workers=workers,
            lease_seconds=LEASE_SECONDS,
            snapshot_seconds=0.5,
            deterministic="true",
            poll_seconds=5,
            **settings,
        )

    def start(self) -> None:
        self.s3_line = Proxy(self.s3.port)
        for name in self.commands:
            if name.startswith("worker"):
                self.lines[name] = {
                    "database": Proxy(self.postgres.port),
                    "redis": Proxy(self.redis.port),
                    "s3_endpoint": Proxy(self.s3_line.port),
                }
        super().start()

    def environment(self, name: str) -> dict[str, str]:
        told = super().environment(name)
        told["TINSMITH_S3_ENDPOINT"] = f"http://127.0.0.1:{self.s3_line.port}"
        for setting, line in self.lines.get(name, {}).items():
            variable = f"TINSMITH_{setting.upper()}"
            told[variable] = told[variable].replace(f":{_port(told[variable])}", f":{line.port}")
        return told


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


# -- what is trained -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """All that one tenant was told, by number, and its weights at the end."""

    answers: dict[int, bytes] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    futures: dict[int, str] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)
    repeats: int = 0


class Trainer:
    """One tenant: a client that repeats what was not answered, as the official SDK does, on any API process."""

    def __init__(self, fleet: RunningFleet, key: str, number: int) -> None:
        self.fleet = fleet
        self.number = number
        self.outcome = Outcome()
        self._http = httpx.Client(headers={"x-api-key": key, "accept": "application/x-protobuf"}, timeout=20)
        self._calls = 0

    def train(self) -> Outcome:
        session = self._post("create_session", {"tags": []})["session_id"]
        lora = {"rank": 4, "seed": self.number}
        made = self._post(
            "create_model",
            {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": lora},
        )
        self.run = f"{session}:train:0"
        self._result(0, made["request_id"])
        seq_id, pending = 0, []
        for step in range(STEPS):
            message = pb.ForwardBackwardRequest(
                model_id=self.run, seq_id=seq_id + 1, data=self._data(step), loss_fn="cross_entropy"
            )
            adam = {"learning_rate": 1e-3, "grad_clip_norm": 1.0}
            pending.append((seq_id + 1, self._post("forward_backward", message.SerializeToString())))
            stepped = {"model_id": self.run, "seq_id": seq_id + 2, "adam_params": adam}
            pending.append((seq_id + 2, self._post("optim_step", stepped)))
            seq_id += 2
            if step % 6 == 5:
                seq_id += 1
                saved = {"model_id": self.run, "seq_id": seq_id, "path": f"step-{step}"}
                pending.append((seq_id, self._post("save_weights", saved)))
            while len(pending) > 4:
                number, future = pending.pop(0)
                self._result(number, future["request_id"])
        for number, future in pending:
            self._result(number, future["request_id"])
        path = f"tinker://{self.run}/weights/step-{STEPS - 1}"
        (prefix,) = self.fleet.sql("select object_prefix from checkpoints where path = ?", path)[0]
        self.outcome.weights = self.fleet.objects().get(prefix)
        return self.outcome

    def check_again(self) -> None:
        """What was answered once is answered the same ever after."""
        for number, request_id in self.outcome.futures.items():
            again = self._fetch(request_id)
            assert again == self.outcome.answers[number], f"tenant {self.number}: {number} changed its answer"

    def _data(self, step: int) -> list[pb.Datum]:
        drawn = np.random.default_rng(1000 * self.number + step)
        return [datum(drawn.integers(0, 1000, length).tolist()) for length in (9, 25, 14)]

    def _result(self, number: int, request_id: str) -> None:
        self.outcome.answers[number] = self._fetch(request_id)
        self.outcome.futures[number] = request_id
        self.outcome.times.append(time.monotonic())

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
        decoded: dict[str, Any] = answer.json()
        return decoded

    def _send(self, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
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
    fleet: RunningFleet, keys: list[str], faults: Callable[[threading.Event], None]
) -> list[Trainer]:
    trainers = [Trainer(fleet, key, number) for number, key in enumerate(keys)]
    finished = threading.Event()
    failures: list[BaseException] = []

    def run(trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:
            failures.append(error)
            finished.set()

    threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
    breaking = threading.Thread(target=faults, args=(finished,))
    for thread in (*threads, breaking):
        thread.start()
    for thread in threads:
        thread.join()
    finished.set()
    breaking.join()
    if failures:
        raise failures[0]
    return trainers


# -- what is broken --------------------------------------------------------------------------------------


@dataclass
class Faults:
    """Each of these is one kill point. `log` has (kind, when)."""

    fleet: Breakable
    random: random.Random
    kinds: list[str]
    log: list[tuple[str, float]] = field(default_factory=list)
    most: int = 10**9

    def until(self, finished: threading.Event) -> None:
        while not finished.wait(self.random.uniform(0.5, 2.0)) and len(self.log) < self.most:
            kind = self.random.choice(self.kinds)
            self.log.append((kind, time.monotonic()))
            getattr(self, kind.replace(" ", "_"))()

    def _worker(self) -> str:
        return self.random.choice([name for name in self.fleet.commands if name.startswith("worker")])

    def _signal(self, name: str, number: int) -> int:
        pid = self.fleet.processes[name].pid
        os.kill(pid, number)
        return pid

    def kill_worker(self) -> None:
        self._signal(self._worker(), signal.SIGKILL)

    def drain_worker(self) -> None:
        self._signal(self._worker(), signal.SIGTERM)

    def kill_api(self) -> None:
        self._signal(self.random.choice(["api0", "api1"]), signal.SIGKILL)

    def kill_beat(self) -> None:
        self._signal("beat", signal.SIGKILL)

    def kill_jobs(self) -> None:
        self._signal("jobs", signal.SIGKILL)

    def kill_redis(self) -> None:
        self.fleet.redis.kill()
        time.sleep(self.random.uniform(0, 1))
        self.fleet.redis.start()

    def kill_postgresql(self) -> None:
        self.fleet.postgres.kill()
        time.sleep(self.random.uniform(0, 1))
        self.fleet.postgres.start()

    def stop_worker_past_its_lease(self) -> None:
        pid = self._signal(self._worker(), signal.SIGSTOP)
        time.sleep(2.5 * LEASE_SECONDS)
        os.kill(pid, signal.SIGCONT)

    def cut_worker_off(self) -> None:
        lines = self.fleet.lines[self._worker()].values()
        with _mode(lines, CUT):
            time.sleep(2.5 * LEASE_SECONDS)

    def object_store_answers_503(self) -> None:
        with _mode([self.fleet.s3_line], REFUSE):
            time.sleep(self.random.uniform(1, 3))

    def object_store_is_slow(self) -> None:
        with _mode([self.fleet.s3_line], SLOW):
            time.sleep(self.random.uniform(1, 3))


KINDS = [
    "kill worker",
    "kill worker",
    "kill worker",
    "drain worker",
    "kill api",
    "kill api",
    "kill redis",
    "kill redis",
    "kill postgresql",
    "kill postgresql",
    "kill beat",
    "kill jobs",
    "stop worker past its lease",
    "cut worker off",
    "object store answers 503",
    "object store is slow",
]


@contextmanager
def _mode(lines: Any, mode: str) -> Iterator[None]:
    for line in lines:
        line.become(mode)
    try:
        yield
    finally:
        for line in lines:
            line.become(PASS)


# -- what must hold --------------------------------------------------------------------------------------


def check(fleet: Breakable, calm: list[Outcome], trainers: list[Trainer]) -> None:
    for before, trainer in zip(calm, trainers, strict=True):
        seen = trainer.outcome
        assert seen.answers.keys() == before.answers.keys()
        for number, answer in before.answers.items():
            # Names of runs differ between rounds, numbers must not.
            assert _without_names(seen.answers[number]) == _without_names(answer), (
                f"tenant {trainer.number}: the answer to {number} differs"
            )
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert seen.weights[name] == before.weights[name], f"tenant {trainer.number}: {name} differs"
        trainer.check_again()
    assert fleet.sql("select count(*) from operations where state = 'queued'") == [(0,)]
    for path, prefix in fleet.sql("select path, object_prefix from checkpoints where ready_at is not null"):
        assert fleet.objects().get(prefix), path
    assert fleet.sql("select count(*) from checkpoints where ready_at is null") == [(0,)]


def _without_names(answer: bytes) -> bytes:
    if answer.startswith(b"{"):
        return b"" if b":train:" in answer else answer
    # Equal messages may have unequal bytes: maps are written in any order.
    return pb.ForwardBackwardOutput.FromString(answer).SerializeToString(deterministic=True)


@dataclass
class Report:
    points: int
    rounds: int
    repeats: int
    recoveries: dict[str, list[float]]

    def table(self) -> str:
        lines = [
            "| fault | times | longest silence of a tenant after it, seconds: median | longest |",
            "|---|---|---|---|",
        ]
        for kind, seconds in sorted(self.recoveries.items()):
            lines.append(
                f"| {kind} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |"
            )
        return "\n".join(lines)


def run(folder: Path, *, points: int, seed: int, kinds: list[str] = KINDS, workers: int = 2) -> Report:
    """Rounds of training under faults until there were `points` of them; AssertionError if anything is wrong."""
    fleet = Breakable(folder, workers=workers)
    keys = [fleet.new_key(f"tenant-{number}") for number in range(TENANTS)]
    calm = [trainer.outcome for trainer in train_all(fleet, keys, lambda _: None)]
    chance = random.Random(seed)
    report = Report(0, 0, 0, defaultdict(list))
    while report.points < points:
        faults = Faults(fleet, chance, kinds, most=points - report.points)
        trainers = train_all(fleet, keys, faults.until)
        check(fleet, calm, trainers)
        report.rounds += 1
        report.points += len(faults.log)
        report.repeats += sum(trainer.outcome.repeats for trainer in trainers)
        ends = [when for _, when in faults.log[1:]] + [float("inf")]
        for (kind, when), end in zip(faults.log, ends, strict=True):
            report.recoveries[kind].append(max(_silence(t.outcome.times, when, end) for t in trainers))
        print(f"round {report.rounds}: {len(faults.log)} faults, {report.points} in all; every bit the same")
    fleet.wait_ready()
    assert fleet.stop() == 0, fleet.log_text()
    return report


def _silence(times: list[float], start: float, end: float) -> float:
    """The longest time without a result that began between one fault and the next, or was under way then."""
    gaps = [after - max(before, start) for before, after in pairwise(times) if after > start and before < end]
    return max(gaps, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        report = run(Path(folder), points=given.points, seed=given.seed)
    print(
        f"\nseed {given.seed}: {report.points} faults in {report.rounds} rounds of {TENANTS} tenants × {STEPS} "
        f"steps, {time.monotonic() - started:.0f} s; {report.repeats} requests repeated; lease {LEASE_SECONDS} s\n"
    )
    print(report.table())


if __name__ == "__main__":
    main()
