"""The parent of the workers, with small programs in the place of workers."""

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from tinsmith.errors import InvalidInput
from tinsmith_api.embedded import Workers
from tinsmith_api.house import PERIODS, House
from tinsmith_api.journal import checkpoints, identities, leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import operations, results, sampled_sequences, tenants
from tinsmith_api.journal.tables import workers as worker_rows
from tinsmith_api.service import Service
from tinsmith_api.settings import Settings, open_objects

# Says that it is ready, waits to be told to leave, and leaves.
GOOD = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1]))
channel.sendall(b"ready\\n")
channel.recv(100)
"""
LOADING_FOR_EVER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"


class Flaky(Store):
    """A journal on a disk that is full while `broken`."""

    broken = False

    def write(self, statement: Any) -> "Future[Any]":
        if not self.broken:
            return super().write(statement)
        failed: Future[Any] = Future()
        failed.set_exception(OSError("No space left on device"))
        return failed


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, models={"m": "/where/m/is"}, engine="null")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Flaky]:
    opened = Flaky(f"sqlite:///{tmp_path / 'journal.db'}")
    yield opened
    opened.close()


def start(settings: Settings, journal: Store, *programs: str) -> tuple[Workers, list[str]]:
    """Workers that run these programs one after the other, the last one for ever; sentences of failure."""
    sentences: list[str] = []
    folder = settings.folder
    (folder / "turn").write_text("0")
    for number, program in enumerate(programs):
        (folder / f"{number}.py").write_text(program)
    pick = (
        "import pathlib, runpy, sys; folder = pathlib.Path(sys.argv[1]); turn = int((folder / 'turn').read_text()); "
        f"(folder / 'turn').write_text(str(turn + 1)); runpy.run_path(folder / f'{{min(turn, {len(programs) - 1})}}.py')"
    )
    workers = Workers(
        settings,
        journal,
        on_done=lambda _: None,
        on_piece=lambda *_: None,
        on_ready=lambda: None,
        on_failure=sentences.append,
        command=(sys.executable, "-c", pick, str(folder)),
    )
    return workers, sentences


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(body(), 30)

    asyncio.run(limited())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what is waited for happens in another process
        await asyncio.sleep(0.02)


def test_a_worker_is_entered_before_it_starts_and_its_forerunner_is_out(
    settings: Settings, journal: Flaky
) -> None:
    dies_later = GOOD + "sys.exit(3)"
    workers, sentences = start(settings, journal, dies_later, GOOD)

    async def body() -> None:
        await workers.start()
        await until(lambda: workers.ready)
        journal.broken = True
        workers.ring(workers.children["m"].worker_id, "x")  # and the first one dies
        await until(lambda: not workers.ready)
        await asyncio.sleep(0.5)
        journal.broken = False
        await until(lambda: workers.ready)
        rows = journal.read(lambda c: c.execute(sa.select(worker_rows)).all()).result()
        assert {row.id: row.stopped_at is None for row in rows} == {
            row.id: row.id == workers.children["m"].worker_id for row in rows
        }
        assert [(row.base_model, row.facts) for row in rows] == [("m", {})] * 2
        await workers.stop()

    run(body)
    assert sentences == [], "one that was ready once is started again"


def test_a_base_model_that_cannot_be_loaded_is_given_up_in_one_sentence(
    settings: Settings, journal: Flaky
) -> None:
    workers, sentences = start(settings, journal, "import sys; sys.exit(1)")

    async def body() -> None:
        await workers.start()
        await until(lambda: bool(sentences))
        await asyncio.sleep(0.5)
        await workers.stop()

    run(body)
    (sentence,) = sentences
    assert "worker of m " in sentence
    assert "'/where/m/is'" in sentence
    assert (settings.folder / "turn").read_text() == "1"


def test_a_worker_killed_while_loading_is_started_again(settings: Settings, journal: Flaky) -> None:
    workers, sentences = start(settings, journal, "import os; os.kill(os.getpid(), 9)", GOOD)

    async def body() -> None:
        await workers.start()
        await until(lambda: workers.ready)
        await workers.stop()

    run(body)
    assert sentences == []


def test_a_journal_that_fails_for_a_while_does_not_end_the_keeping_of_workers(
    settings: Settings, journal: Flaky
) -> None:
    workers, _ = start(settings, journal, GOOD)

    async def body() -> None:
        await workers.start()
        journal.broken = True
        await asyncio.sleep(0.5)
        assert not workers.ready
        journal.broken = False
        await until(lambda: workers.ready)
        await workers.stop()

    run(body)


def test_a_program_that_cannot_be_started_is_tried_again(settings: Settings, journal: Flaky) -> None:
    workers, _ = start(settings, journal, GOOD)
    workers.command, later = ["/no/such/program"], workers.command

    async def body() -> None:
        await workers.start()
        await asyncio.sleep(0.5)
        workers.command = later
        await until(lambda: workers.ready)
        await workers.stop()

    run(body)


def test_stopping_waits_for_no_worker_that_is_still_loading(settings: Settings, journal: Flaky) -> None:
    workers, _ = start(settings, journal, LOADING_FOR_EVER)

    async def body() -> None:
        await workers.start()
        await until(lambda: (settings.folder / "turn").read_text() == "1")
        started = time.monotonic()
        await workers.stop()
        assert time.monotonic() - started < 5

    run(body)


def test_a_call_of_a_model_that_is_not_served_is_refused_and_not_journaled(settings: Settings) -> None:
    service = Service(settings)
    operation = Operation("r", 1, ops.OPTIM_STEP, "t", "gone", payload=b"{}")

    async def body() -> None:
        with pytest.raises(InvalidInput, match="this service has m"):
            await service.submit(operation)
        assert await service.read_apart(lambda c: c.execute(sa.select(operations)).all()) == []

    run(body)
    service.journal.close()


def test_housekeeping_forgets_everything_old_however_much_there_is(settings: Settings) -> None:
    journal, objects = Store(settings.database_url), open_objects(settings)
    house = House(settings, journal, objects)

    def fill(c: sa.Connection) -> None:
        identities.create_key(c, "somebody")
        tenant = c.execute(sa.select(tenants.c.id)).scalar_one()
        c.execute(
            results.insert(), [{"request_id": str(i), "body": b"", "finished_at": 1.0} for i in range(1201)]
        )
        blank = {"tenant_id": tenant, "tokens": b"", "logprobs": b"", "created_at": 1.0}
        c.execute(sampled_sequences.insert(), [{"id": str(i), **blank} for i in range(1201)])
        checkpoints.discard_objects(c, "checkpoints/r/1")
        c.exec_driver_sql("update garbage set delete_after = 1")

    def left(c: sa.Connection) -> list[int]:
        return [
            c.exec_driver_sql(f"select count(*) from {table}").scalar_one()
            for table in ("results", "sampled_sequences", "garbage")
        ]

    journal.write(fill).result()
    objects.put("checkpoints/r/1", {"x": b"1"})
    for chore in PERIODS:
        house.do(chore)
    assert journal.read(left).result() == [0, 0, 0]
    assert not (settings.folder / "objects/checkpoints/r/1").exists()
    journal.close()


def test_jobs_give_up_nobody_who_only_had_no_database(settings: Settings, journal: Flaky) -> None:
    fleet = settings.model_copy(update={"redis": SecretStr("redis://nowhere"), "lease_seconds": 1.0})
    house = House(fleet, journal, open_objects(settings))

    def enter(c: sa.Connection) -> None:
        for name in ("lives", "died"):
            leases.register_worker(c, name, "m", {})
            leases.describe_worker(c, name, {"vocab_size": 7})
        c.execute(worker_rows.update().values(heartbeat_at=worker_rows.c.heartbeat_at - 60))

    journal.write(enter).result()
    beating = threading.Timer(
        0.3, lambda: journal.write(lambda c: leases.beat(c, "lives", "m", dead_after_seconds=None))
    )
    beating.start()
    house.do("sweep")
    beating.join()
    living = sa.select(worker_rows.c.id).where(worker_rows.c.stopped_at.is_(None))
    assert journal.read(lambda c: c.execute(living).scalars().all()).result() == ["lives"]


def test_a_job_that_takes_long_is_not_begun_twice(settings: Settings, journal: Flaky) -> None:
    class Slow(House):
        began = 0

        def sweep(self) -> None:
            self.began += 1
            gate.wait(10)

    gate, house = threading.Event(), Slow(settings, journal, open_objects(settings))
    first = threading.Thread(target=house.do, args=["sweep"])
    first.start()
    while not house.began:
        time.sleep(0.01)
    house.do("sweep")
    assert house.began == 1
    gate.set()
    first.join()
    house.do("sweep")
    assert house.began == 2
