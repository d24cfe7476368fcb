"""A fleet whose parts can be broken one by one: each worker reaches its servers through lines of its own and,
as root where the kernel has them, lives in a network namespace of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.chaos.proxy import Proxy
from tests.conftest import RunningFleet

if TYPE_CHECKING:
    from tinsmith_api.journal.objects import ObjectStore

MODEL = "tinsmith/tiny"


class Namespace:
    """A network namespace with one link to this machine. A link that is down swallows what is sent over it."""

    def __init__(self, number: int) -> None:
        unique = os.getpid() % 10_000
        self.name = f"tinsmith-{os.getpid()}-{number}"
        self.link, inner = f"tsm{unique}a{number}", f"tsm{unique}b{number}"
        network = f"10.213.{unique % 250}.{4 * number}"
        front, last = network.rsplit(".", 1)
        self.outside, inside = f"{front}.{int(last) + 1}", f"{front}.{int(last) + 2}"
        try:
            _ip("netns", "add", self.name)
            _ip("link", "add", self.link, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", self.name)
            _ip("addr", "add", f"{self.outside}/30", "dev", self.link)
            _ip("link", "set", self.link, "up")
            _ip("-n", self.name, "addr", "add", f"{inside}/30", "dev", inner)
            _ip("-n", self.name, "link", "set", inner, "up")
            _ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        _ip("link", "set", self.link, "up")

    def close(self) -> None:
        for words in (("link", "del", self.link), ("netns", "del", self.name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*words)


def can_isolate() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        Namespace(63).close()
    except subprocess.CalledProcessError:
        return False
    return True


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Lines:
    """What joins one worker with its servers."""

    def __init__(self, fleet: "Breakable", number: int) -> None:
        self.namespace = Namespace(number) if fleet.isolates else None
        host = self.namespace.outside if self.namespace else "127.0.0.1"
        # The queue that a worker reads is named after it; nothing else tells whose id is whose.
        self.redis = Proxy(fleet.redis.port, host, watch=r"tinsmith\.worker\.(w-[0-9a-f]{12})")
        self.postgres = Proxy(fleet.postgres.port, host)
        self.s3 = Proxy(fleet.s3_line.port, host)
        self.all = [self.redis, self.postgres, self.s3]

    @property
    def worker_id(self) -> str:
        """Of the worker at the other end, once it reads its queue; of the last one before."""
        return self.redis.seen

    def close(self) -> None:
        for proxy in self.all:
            proxy.close()
        if self.namespace:
            self.namespace.close()


class Breakable(RunningFleet):
    """The tiny base, deterministic. Everybody reaches the object store through `s3_line`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.lines: dict[str, Lines] = {}
        self.isolates = can_isolate()
        chosen = {"snapshot_seconds": 0.5, "deterministic": "true", "poll_seconds": 5, **settings}
        super().__init__(folder, model=MODEL, **chosen)

    def start(self) -> None:
        self.s3_line = Proxy(self.s3.port)
        super().start()
        self.wait_for_workers(2)

    def environment(self, name: str) -> dict[str, str]:
        told = super().environment(name)
        told["TINSMITH_S3_ENDPOINT"] = f"http://127.0.0.1:{self.s3_line.port}"
        if not name.startswith("worker"):
            return told
        lines = self.lines.get(name)
        if lines is None:
            lines = self.lines[name] = Lines(self, len(self.lines))
        for variable, proxy in (
            ("TINSMITH_DATABASE", lines.postgres),
            ("TINSMITH_REDIS", lines.redis),
            ("TINSMITH_S3_ENDPOINT", lines.s3),
        ):
            told[variable] = told[variable].replace(
                f"127.0.0.1:{proxy.target_port}", f"{proxy.host}:{proxy.port}"
            )
        return told

    def start_one(self, name: str) -> None:
        environment = self.environment(name)
        command = [sys.executable, "-m", "tinsmith_api.cli", *self.commands[name]]
        if name in self.lines and (namespace := self.lines[name].namespace):
            command = ["ip", "netns", "exec", namespace.name, *command]
        with self._guard, open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            self.starts[name] = self.starts.get(name, 0) + 1

    def workers(self) -> list[str]:
        """The names of the worker processes that are kept; the one that holds most open runs first."""
        held = dict(
            self.sql(
                "select worker_id, count(*) from runs join sessions on sessions.id = session_id "
                "where finished_at is null and exists (select 1 from operations where subject = runs.id "
                "and operations.state = 'queued') group by worker_id"
            )
        )
        kept = [name for name in self.commands if name.startswith("worker") and name not in self.paused]
        return sorted(kept, key=lambda name: -held.get(self.lines[name].worker_id, 0))

    def wait_for_workers(self, count: int, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while len(self.ready_workers()) < count:
            assert time.monotonic() < deadline, f"no {count} workers in {seconds} s:\n{self.log_text()}"
            time.sleep(0.1)

    def sql(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """As in RunningFleet; waits while the database is being restarted."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return super().sql(statement, *arguments)
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def kill_postgres(self) -> None:
        """The server with all its processes, as when a machine loses its power."""
        parent = self.postgres.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        self.postgres.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), 9)
        while any(Path(f"/proc/{child}").exists() for child in children):
            time.sleep(0.01)

    def objects(self) -> "ObjectStore":
        from tinsmith_api.journal.objects import open_store

        return open_store(str(self.settings["objects"]), endpoint=self.s3.url)

    def stop(self) -> int:
        try:
            return super().stop()
        finally:
            for lines in self.lines.values():
                lines.close()
            self.s3_line.close()


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of its own at `folder`; only root can make one."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
