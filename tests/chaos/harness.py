"""Break everything, again and again, while three tenants train; nothing may be lost, and no bit be different.

`make chaos` runs the long form and prints the table of docs/reliability.md; tests/chaos/test_chaos.py a short
one. The faults follow from the seed; when exactly they strike, the machine decides.
"""

import argparse
import contextlib
import os
import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import faults
from tests.chaos.faults import Faults
from tests.chaos.fleet import Breakable, small_disk
from tests.chaos.trainers import STEPS, Outcome, Trainer, train_all
from tinsmith.wire import tinsmith_pb2 as pb

TENANTS = 3
DISK_MIB = 1024
"""Room for what all rounds leave: the faults are what fills it."""
RECOVERY_SECONDS = 15.0
"""What is promised for a dead worker at the default lease of six seconds."""


@dataclass
class Report:
    lease_seconds: float
    rounds: int = 0
    repeats: int = 0
    checkpoints: int = 0
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def points(self) -> int:
        return sum(self.counts.values())

    def table(self) -> str:
        lines = ["| fault | times | everybody goes on after: median | longest |", "|---|---|---|---|"]
        for kind, count in sorted(self.counts.items()):
            seconds = self.recoveries[kind]
            times = f"{statistics.median(seconds):.1f} s | {max(seconds):.1f} s" if seconds else "– | –"
            lines.append(f"| {kind} | {count} | {times} |")
        return "\n".join(lines)


def run(
    folder: Path, *, points: int, seed: int, lease_seconds: float, kinds: list[str], **settings: Any
) -> Report:
    """Rounds of training under faults until there were `points`; AssertionError if anything is wrong."""
    chance, report = random.Random(seed), Report(lease_seconds)
    with _fleet(folder, lease_seconds=lease_seconds, **settings) as fleet:
        if fleet.isolates:
            kinds = kinds + faults.AS_ROOT if "kill api" in kinds else kinds
        keys = [fleet.new_key(f"tenant-{number}") for number in range(TENANTS)]
        calm = [trainer.outcome for trainer in train_all(fleet, keys, lambda _, finished: None)]
        while report.points < points:
            breaking = Faults(fleet, chance, kinds, lease_seconds, most=points - report.points)
            with _watching(fleet) as seen:
                trainers = train_all(fleet, keys, breaking.strike)
            check(fleet, calm, trainers, chance)
            report.rounds += 1
            report.checkpoints += len(seen)
            report.repeats += sum(trainer.outcome.repeats for trainer in trainers)
            for fault in breaking.log:
                report.counts[fault.kind] += 1
                if fault.seconds is not None:
                    report.recoveries[fault.kind].append(fault.seconds)
            struck = ", ".join(fault.kind for fault in breaking.log)
            print(f"round {report.rounds}: every bit the same, {report.points} in all ({struck})", flush=True)
            fleet.wait_for_workers(2)
    return report


@contextlib.contextmanager
def _fleet(folder: Path, **settings: Any) -> Iterator[Breakable]:
    fleet = Breakable(folder, **settings)
    try:
        yield fleet
    except BaseException:
        (folder / "all.log").write_text(fleet.log_text())
        fleet.kill()
        fleet.stop()
        raise
    fleet.wait_for_workers(2)
    status = fleet.stop()
    assert status == 0, fleet.log_text()


@contextlib.contextmanager
def _watching(fleet: Breakable) -> Iterator[set[str]]:
    """Read every checkpoint as soon as it is listed: it is whole from its first moment."""
    seen: set[str] = set()
    failures: list[BaseException] = []
    ended = threading.Event()
    # Those of rounds before were read before.
    listed = "select path, object_prefix, ready_at from checkpoints where ready_at > ?"
    since = time.time()

    def watch() -> None:
        try:
            objects = fleet.objects()
            while not ended.wait(0.3):
                for path, prefix, _ in fleet.sql(listed, since):
                    if path not in seen:
                        objects.get(prefix)
                        seen.add(path)
        except BaseException as error:
            failures.append(error)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        ended.set()
        watching.join()
    if failures:
        raise failures[0]


def check(fleet: Breakable, calm: list[Outcome], trainers: list[Trainer], chance: random.Random) -> None:
    """What must hold after every round."""
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
    assert fleet.sql("select count(*) from checkpoints where ready_at is null") == [(0,)]
    for trainer in trainers:
        saved = fleet.sql("select path, object_prefix from checkpoints where run_id = ?", trainer.run)
        assert len(saved) == STEPS // 6
        for _, prefix in saved:
            assert fleet.objects().get(prefix)
        trainer.load(chance.choice(sorted(saved))[0])
        trainer.finish()


def _without_names(answer: bytes) -> bytes:
    if answer.startswith(b"{"):
        return b"" if b":train:" in answer else answer
    # Equal messages may have unequal bytes: maps are written in any order.
    return pb.ForwardBackwardOutput.FromString(answer).SerializeToString(deterministic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=110)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lease-seconds", type=float, default=6.0)
    parser.add_argument("--only", action="append", metavar="FAULT", help="instead of all; may be repeated")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs and data there")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _long(folder, given)


def _long(folder: Path, given: argparse.Namespace) -> None:
    common = {"seed": given.seed, "lease_seconds": given.lease_seconds}
    started = time.monotonic()
    report = run(folder / "s3", points=given.points, kinds=given.only or faults.KINDS, **common)
    _show("objects in S3", report, given.seed, started)
    if os.geteuid() == 0 and not given.only:
        started = time.monotonic()
        with small_disk(folder / "objects", DISK_MIB) as disk:
            points = max(1, given.points // 10)
            report = run(folder / "disk", points=points, kinds=faults.DISK, objects=str(disk), **common)
        _show(f"objects in a directory on a disk of {DISK_MIB} MiB", report, given.seed, started)


def _show(title: str, report: Report, seed: int, started: float) -> None:
    print(
        f"\n{title}: seed {seed}, lease {report.lease_seconds:g} s; {report.points} faults in {report.rounds} rounds "
        f"of {TENANTS} tenants × {STEPS} steps, {time.monotonic() - started:.0f} s; "
        f"{report.repeats} requests repeated, {report.checkpoints} checkpoints read when they appeared\n"
    )
    print(report.table(), "\n", flush=True)
    if report.lease_seconds <= 6:
        assert max(report.recoveries["kill worker"], default=0.0) <= RECOVERY_SECONDS


if __name__ == "__main__":
    main()
