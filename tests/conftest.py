"""Real services for tests, on free ports and in fresh directories: the embedded form and the distributed."""

import collections
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.compatibility.plugin import Plugin

# Many processes share few cores here, and threads that wait for one another in a loop take what others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from tests import servers
    from tinsmith_api.journal.objects import ObjectStore


def pytest_configure(config: pytest.Config) -> None:
    """Note what is driven of the official SDK, and have everything written to memory, where there is room for it: what
    is tested syncs thousands of times, and no test takes the machine's power away. With --basetemp it goes where that
    says, and stays."""
    config.pluginmanager.register(Plugin(), "compatibility")
    memory = Path("/dev/shm")
    if config.option.basetemp or not memory.is_dir() or shutil.disk_usage(memory).free < 4 << 30:
        return
    for left in memory.glob("tinsmith-tests-*-*"):  # by one that was killed
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"tinsmith-tests-{os.getpid()}-", dir=memory)
    os.chmod(folder, 0o755)  # PostgreSQL is run by somebody else, where tests are run by root
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    config.option.basetemp = Path(folder) / "pytest"
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


FORMS = ("embedded", "fleet")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that processes that divide the tests end together."""
    slow = collections.Counter(_group(item.nodeid) for item in items if item.get_closest_marker("slow"))
    size = collections.Counter(_group(item.nodeid) for item in items)
    items.sort(key=lambda item: (-slow[_group(item.nodeid)], -size[_group(item.nodeid)]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: one group of tests after another, each by one process. The marks that --dist loadgroup reads do nothing
    where pytest is 9.2 and pytest-xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def _group(nodeid: str) -> str:
    """Tests of a file belong together, and all for which one of the session's services is started; where services are
    killed there are others."""
    file, _, test = nodeid.partition("::")
    given = test.partition("[")[2].removesuffix("]").split("-")
    form = next((form for form in FORMS if form in given), "")
    return file if file == "tests/e2e/test_crash.py" else form or file


class RunningService:
    """Starts on construction. `url` and `key` are what a client needs; `other_key` is another tenant's."""

    def __init__(self, folder: Path, *arguments: str, config: str = "") -> None:
        self.folder = folder
        self.arguments = list(arguments)
        folder.mkdir(parents=True, exist_ok=True)
        if config:
            (folder / "config.toml").write_text(config)
            self.arguments += ["--config", str(folder / "config.toml")]
        self.key = "tml-test-key-of-the-first-tenant"
        self.start()

    def start(self, port: int = 0) -> None:
        self.log = open(self.folder / "service.log", "a")  # noqa: SIM115
        command = [sys.executable, "-m", "tinsmith_api.cli", "serve", "--data-dir", str(self.folder)]
        before = (self.folder / "service.log").stat().st_size
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *self.arguments],
            env={**os.environ, "TINSMITH_API_KEY": self.key, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.url = self._wait_for("http://127.0.0.1:", before)
        self.wait_ready()

    def restart(self) -> None:
        """Start again on the same directory and the same port."""
        port = int(self.url.rsplit(":", 1)[1])
        self.process.wait(timeout=60)
        self.start(port)

    def wait_ready(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_text()
            try:
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log_text()}")

    def worker_pid(self) -> int:
        """The newest worker process of this service; waits for one that is being started."""
        pattern = f"tinsmith_worker.*--data-dir {self.folder}( |$)"
        for _ in range(200):
            if found := subprocess.run(
                ["pgrep", "-f", pattern], capture_output=True, text=True
            ).stdout.split():
                return int(found[-1])
            time.sleep(0.05)
        raise AssertionError(f"no worker:\n{self.log_text()}")

    def kill_worker(self) -> None:
        os.kill(self.worker_pid(), signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to everything at once."""
        worker = self.worker_pid()
        self.process.kill()
        os.kill(worker, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=60)

    def new_key(self, tenant: str) -> str:
        return self.admin("keys", "create", tenant)

    def admin(self, *words: str) -> str:
        command = [sys.executable, "-m", "tinsmith_api.cli", "admin", *words, "--data-dir", str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def sql(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Asked of the database, with ? for arguments."""
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.folder / "journal.db")) as connection:
            return connection.execute(statement, arguments).fetchall()

    def database_bytes(self) -> bytes:
        """Everything the database holds."""
        return b"".join(f.read_bytes() for f in self.folder.glob("journal.db*"))

    def log_text(self) -> str:
        return (self.folder / "service.log").read_text()

    def objects(self) -> "ObjectStore":
        from tinsmith_api.journal.objects import open_store

        return open_store(str(self.folder / "objects"))

    def _wait_for(self, text: str, start: int) -> str:
        for _ in range(600):
            for word in (self.folder / "service.log").read_bytes()[start:].decode().split():
                if word.startswith(text):
                    return word
            assert self.process.poll() is None, self.log_text()
            time.sleep(0.05)
        raise AssertionError(self.log_text())


class RunningFleet:
    """The distributed form on this machine: PostgreSQL, Redis and an S3 server, API processes, workers, jobs and
    beat, each a process that is started again when it ends, as any supervisor would.

    Answers like RunningService. `settings` are those of the processes, by name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str = "tinsmith/tiny",
        workers: int = 2,
        apis: int = 2,
        roles: Sequence[str] = (),
        **settings: object,
    ) -> None:
        """`roles`: of the workers, if they are not to do everything."""
        from tests import servers
        from tinsmith_api.journal.s3 import make_bucket

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.key = "tml-test-key-of-the-first-tenant"
        self.postgres = servers.Postgres(folder / "postgres")
        self.redis = servers.Redis(folder / "redis")
        self.s3 = servers.Moto(folder / "s3")
        os.environ.update(self.s3.environment)
        make_bucket("s3://tinsmith", endpoint=self.s3.url)
        self.settings = {
            "database": self.postgres.url,
            "redis": self.redis.url,
            "objects": "s3://tinsmith/test",
            "s3_endpoint": self.s3.url,
            "s3_public_endpoint": self.s3.url,
            "data_dir": str(folder / "data"),
            **settings,
        }
        self.ports = [servers.free_port() for _ in range(apis)]
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.commands = {f"api{i}": ["api", "--port", str(port)] for i, port in enumerate(self.ports)}
        self.commands |= {f"worker{i}": ["worker", "--pool", model] for i in range(workers)}
        for number, role in enumerate(roles):
            self.commands[f"worker{number}"] += ["--role", role]
        self.commands |= {"jobs": ["jobs"], "beat": ["beat"]}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: dict[str, int] = {}
        self.paused: set[str] = set()  # not started again until somebody says so
        self._guard = threading.RLock()
        self.start()

    def environment(self, name: str) -> dict[str, str]:
        """What the process of this name is told."""
        said = {f"TINSMITH_{key.upper()}": str(value) for key, value in self.settings.items()}
        return {
            **os.environ,
            **said,
            "TINSMITH_API_KEY": self.key,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def start(self) -> None:
        self._stopping = threading.Event()
        for name in self.commands:
            self.start_one(name)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        self.wait_ready()

    def restart(self) -> None:
        self.start()

    def start_one(self, name: str) -> None:
        command = [sys.executable, "-m", "tinsmith_api.cli", *self.commands[name]]
        with self._guard, open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment(name), stdout=log, stderr=subprocess.STDOUT
            )
            self.starts[name] = self.starts.get(name, 0) + 1

    def _keep(self) -> None:
        while not self._stopping.wait(0.1):
            with self._guard:
                for name, process in list(self.processes.items()):
                    if process.poll() is not None and name not in self.paused and not self._stopping.is_set():
                        self.start_one(name)

    def wait_ready(self, seconds: float = 180) -> None:
        """Every API answers, and a worker is ready."""
        deadline = time.monotonic() + seconds
        for url in self.urls:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    answer = httpx.get(
                        f"{url}/api/v1/get_server_capabilities", headers={"x-api-key": self.key}, timeout=60
                    )
                    if answer.status_code == 200 and answer.json()["supported_models"]:
                        break
                time.sleep(0.05)
            else:
                raise AssertionError(f"not ready after {seconds} s:\n{self.log_text()}")
        while not self.ready_workers():
            assert time.monotonic() < deadline, self.log_text()
            time.sleep(0.05)

    def ready_workers(self) -> list[str]:
        """Their ids."""
        rows = self.sql(
            "select id from workers where stopped_at is null and ready_at is not null "
            "and extract(epoch from clock_timestamp()) - heartbeat_at < 3"
        )
        return [row[0] for row in rows]

    def sql(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Asked of the database, with ? for arguments."""
        import psycopg

        with psycopg.connect(self.postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
            cursor = connection.execute(statement.replace("?", "%s"), arguments)
            return cursor.fetchall() if cursor.description else []

    def worker_pid(self) -> int:
        """Of the worker that holds most."""
        return self.processes["worker0"].pid

    def kill_worker(self) -> None:
        """All of them, so that whoever holds a run is among them."""
        for name in self.commands:
            if name.startswith("worker"):
                self.processes[name].kill()

    def kill(self) -> None:
        self._stopping.set()
        self._keeper.join()
        for process in self.processes.values():
            process.kill()
            process.wait()

    def stop(self) -> int:
        """The worst exit status; SIGTERM first, and the servers last."""
        self._stopping.set()
        self._keeper.join()
        codes = []
        self.processes["beat"].terminate()
        self.processes["beat"].wait(
            timeout=60
        )  # or Celery may be given a job while it closes, and log an error
        for name in sorted(self.processes, reverse=True):  # workers before APIs
            self.processes[name].terminate()
        for process in self.processes.values():
            codes.append(process.wait(timeout=60))
        for server in (self.s3, self.redis, self.postgres):
            server.stop()
        # Beat and jobs leave by the signal they were sent, or with 0.
        return max(abs(code) if code not in (-signal.SIGTERM,) else 0 for code in codes)

    def new_key(self, tenant: str) -> str:
        return self.admin("keys", "create", tenant)

    def database_bytes(self) -> bytes:
        """Everything the database holds, as text."""
        tables = self.sql("select table_name from information_schema.tables where table_schema = 'public'")
        rows = [self.sql(f"select * from {table}") for (table,) in tables]
        assert any(rows)
        return repr(rows).encode()

    def admin(self, *words: str) -> str:
        command = [sys.executable, "-m", "tinsmith_api.cli", "admin", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=self.environment("admin")
        ).stdout.strip()

    def log_text(self) -> str:
        return "\n".join(
            f"== {name}\n{file.read_text()}"
            for name in self.commands
            if (file := self.folder / f"{name}.log").exists()
        )

    def objects(self) -> "ObjectStore":
        from tinsmith_api.journal.objects import open_store

        return open_store("s3://tinsmith/test", endpoint=self.s3.url)


@pytest.fixture(scope="session", params=FORMS)
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService | RunningFleet]:
    """The tiny base on the torch engine, shared by the session's tests: each makes sessions of its own."""
    folder = tmp_path_factory.mktemp("service")
    running: RunningService | RunningFleet
    if request.param == "embedded":
        running = RunningService(folder, "--deterministic")
    else:
        running = RunningFleet(folder, workers=1, deterministic="true")
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.fixture(scope="session", params=FORMS)
def null_service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService | RunningFleet]:
    """The null engine: everything but computing."""
    folder = tmp_path_factory.mktemp("null")
    running: RunningService | RunningFleet
    if request.param == "embedded":
        given = ("--engine", "null", "--model", "base/null")
        running = RunningService(folder, *given, config="gap_seconds = 2.0\npoll_seconds = 2.0\n")
    else:
        running = RunningFleet(folder, model="base/null", engine="null", gap_seconds=2.0, poll_seconds=2.0)
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator["servers.Postgres"]:
    from tests import servers

    server = servers.Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def new_database(postgres: "servers.Postgres") -> Callable[..., str]:
    """Makes a database with the journal's tables, or with nothing if `empty`, and says its URL."""
    import psycopg

    from tinsmith_api.journal.store import Store

    numbers = itertools.count()

    def create(name: str, like: str = "") -> str:
        with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"create database {name} {like}")
        return postgres.url.removesuffix("postgres") + name

    Store(create("ours")).close()  # migrated once, and copied from then on

    def make(*, empty: bool = False) -> str:
        return create(f"test{next(numbers)}", "" if empty else "template ours")

    return make
