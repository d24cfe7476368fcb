"""The database under the journal: one writing thread with group commit, and readers beside it.

A write is a function of a connection. Functions that wait together are committed together, so a busy
service pays for one flush to disk where an idle one pays for one per call. A function may be run twice
(when another one of its group failed and the group was rolled back, or when the connection broke before it
was known whether it was committed), so it must do nothing but SQL, and nothing more the second time.
"""

import fcntl
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

log = logging.getLogger("tinsmith")

Result = TypeVar("Result")
Statement = Callable[[sa.Connection], Result]
_Job = tuple[Statement[Any], "Future[Any]", float]  # what, for whom, since when

# Beyond this many functions a group's first waiter would wait for the others longer than for the disk.
_GROUP = 64
# Processes that start together bring the schema up to date one after the other.
_MIGRATION_LOCK = 7_465_217


class Unavailable(Exception):  # noqa: N818 - the name says what is wrong
    """The database could not be reached for as long as this process waits for it."""


class Store:
    """Opens `url` ("sqlite:////path/to/file" or a PostgreSQL URL) and brings its schema up to date.

    A server that is gone is waited for, at most `patience_seconds` from the moment of asking; then
    Unavailable.
    """

    def __init__(self, url: str, *, patience_seconds: float = 20.0) -> None:
        self.url = sa.make_url(url)
        self.patience_seconds = patience_seconds
        self._is_sqlite = self.url.get_backend_name() == "sqlite"
        # Two processes write to one SQLite file. A lock file makes the second wait in line and wake at
        # once; SQLite's own waiting sleeps in growing steps.
        self._turn_file = open(f"{self.url.database}.turn", "wb") if self._is_sqlite else None  # noqa: SIM115
        # Errors are logged, and their parameters are bodies of calls, hashes of keys, secrets that sign.
        options: dict[str, Any] = {"hide_parameters": True}
        if not self._is_sqlite:
            options["connect_args"] = _TO_POSTGRESQL
        self._writes = sa.create_engine(self.url, pool_size=1, max_overflow=0, **options)
        self._reads = sa.create_engine(self.url, pool_size=16, isolation_level="AUTOCOMMIT", **options)
        self._mine = threading.local()  # each reading thread keeps its connection
        if self._is_sqlite:
            for engine in (self._writes, self._reads):
                sa.event.listen(engine, "connect", _prepare_sqlite)
            sa.event.listen(self._writes, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
        else:
            for engine in (self._writes, self._reads):
                sa.event.listen(engine, "connect", _prepare_postgresql)
        with self._turn():
            self._repeat_while_gone(self._migrate, time.monotonic())
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="journal-read")
        self._readers_apart = ThreadPoolExecutor(2, thread_name_prefix="journal-read-apart")
        self._writer = threading.Thread(target=self._write_forever, name="journal-write", daemon=True)
        self._writer.start()

    def write(self, statement: Statement[Result]) -> "Future[Result]":
        """Run `statement` in a transaction; the future is done when it is on disk."""
        done: Future[Result] = Future()
        # From here on it cannot be cancelled: who stops waiting does not undo what was asked for.
        done.set_running_or_notify_cancel()
        self._jobs.put((statement, done, time.monotonic()))
        return done

    def read(self, statement: Statement[Result]) -> "Future[Result]":
        """Run `statement` outside a transaction: each SELECT sees what is committed by then."""
        if not self._is_sqlite:
            return self._readers.submit(self._read, statement, time.monotonic())
        # A lookup in the file takes less time than handing it to another thread.
        done: Future[Result] = Future()
        try:
            done.set_result(self._read(statement, time.monotonic()))
        except Exception as error:
            done.set_exception(error)
        return done

    def read_apart(self, statement: Statement[Result]) -> "Future[Result]":
        """As `read`, always on another thread, and none that lookups wait for: for what finds more than a few
        rows."""
        return self._readers_apart.submit(self._read, statement, time.monotonic())

    def close(self) -> None:
        """Commit what was asked for, then let go of the file."""
        self._jobs.put(None)
        self._writer.join()
        self._readers.shutdown()
        self._readers_apart.shutdown()
        self._writes.dispose()
        self._reads.dispose()
        if self._turn_file:
            self._turn_file.close()

    def _read(self, statement: Statement[Result], asked_at: float) -> Result:
        return self._repeat_while_gone(lambda: self._read_once(statement), asked_at)

    def _read_once(self, statement: Statement[Result]) -> Result:
        if getattr(self._mine, "connection", None) is None:
            self._mine.connection = self._reads.connect()
        try:
            return statement(self._mine.connection)
        except sa.exc.DBAPIError as error:
            if _is_gone(error):
                self._mine.connection.invalidate()
                self._mine.connection.close()
                self._mine.connection = None
            raise

    def _repeat_while_gone(self, attempt: Callable[[], Result], asked_at: float) -> Result:
        """Until the database answers, be it with an error of its own; Unavailable when patience is over. From
        when it was asked for: who stood in line meanwhile has waited as well."""
        until = asked_at + self.patience_seconds
        pause = 0.05
        while True:
            try:
                return attempt()
            except sa.exc.DBAPIError as error:
                if not _is_gone(error):
                    raise
                # Once more in any case: a deadlock is over by then.
                if time.monotonic() >= until and pause > 0.05:
                    raise Unavailable(f"the database does not answer: {error.orig}") from error
                if pause == 0.05:
                    log.warning("the database does not answer (%s); trying again", str(error.orig).strip())
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _write_forever(self) -> None:
        job = self._jobs.get()
        while job is not None:
            group = [job]
            while len(group) < _GROUP and group[-1] is not None and not self._jobs.empty():
                group.append(self._jobs.get())  # type: ignore[arg-type]
            last = group[-1]
            try:
                self._commit([g for g in group if g is not None])
            except BaseException:  # this thread lives as long as the process: without it nothing is written
                log.exception("answering a group of writes failed")
            job = None if last is None else self._jobs.get()

    def _commit(self, group: "list[_Job]") -> None:
        def attempt() -> list[Any]:
            with self._turn(), self._writes.begin() as connection:
                return [statement(connection) for statement, _, _ in group]

        try:
            results = self._repeat_while_gone(attempt, group[0][2])
        except BaseException as error:  # whatever it was belongs to who asked, not to this thread
            if len(group) == 1 or isinstance(error, Unavailable):
                for _, done, _ in group:
                    done.set_exception(error)
                return
            for job in group:
                self._commit([job])
            return
        for (_, done, _), result in zip(group, results, strict=True):
            done.set_result(result)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._turn_file is None:
            yield
            return
        fcntl.flock(self._turn_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turn_file, fcntl.LOCK_UN)

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._writes.begin() as connection:
            if not self._is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


# A server that is cut off is noticed in seconds: by the kernel's probes when nothing is under way, and by its
# unacknowledged bytes when something is.
_TO_POSTGRESQL = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "tinsmith",
}
# Between two statements of a transaction there is nothing but a function's own lines. Less than a lease.
_IDLE_IN_TRANSACTION_SECONDS = 3
# Deadlock and serialization failures: nothing was done, and the next attempt finds another order.
_TRY_AGAIN = {"40001", "40P01"}


def _is_gone(error: sa.exc.DBAPIError) -> bool:
    """Whether the connection broke, or could not be made, or the attempt is worth repeating as it is."""
    if error.connection_invalidated:
        return True
    code = getattr(error.orig, "sqlstate", None)
    if code is not None:
        # 57P01..03: shut down, crashed, starting up; 25P03: this process stood still in a transaction;
        # 53300: too many connections just now.
        return code in _TRY_AGAIN or code[:2] == "08" or code in {"57P01", "57P02", "57P03", "25P03", "53300"}
    return isinstance(error, sa.exc.OperationalError) and type(error.orig).__module__.startswith("psycopg")


def _prepare_postgresql(connection: Any, _: object) -> None:
    """Let the server notice in seconds that this process is gone. One that is cut off or stopped in the
    middle of a transaction keeps its locks: nobody could give up a worker that was touching its own row."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SET idle_in_transaction_session_timeout = '{_IDLE_IN_TRANSACTION_SECONDS}s';"
            "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3;"
            "SET tcp_user_timeout = '10s'"
        )
    connection.commit()


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself, see above
    cursor = connection.cursor()
    # 8 KiB pages and a checkpoint every 64 MiB: bodies of ~100 KiB are the rule.
    for pragma in (
        "page_size=8192",
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=30000",
        "wal_autocheckpoint=8192",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
