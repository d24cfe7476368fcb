"""A fleet that can be harmed: each worker reaches its servers through proxies of its own and, as root where the
kernel has them, lives in a network namespace of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.proxy import Proxy
from tests.conftest import RunningFleet


class Wires:
    """What joins one worker with its servers."""

    def __init__(self, servers: dict[str, int], namespace: "Namespace | None") -> None:
        host = namespace.outside if namespace else "127.0.0.1"
        self.host, self.namespace = host, namespace
        # The queue a worker reads is named after it; nothing else tells which of the ids is whose.
        watch = {"redis": r"tinsmith\.worker\.(w-[0-9a-f]{12})"}
        self.proxies = {name: Proxy(port, host, watch.get(name, "")) for name, port in servers.items()}

    def address(self, server: str) -> str:
        return f"{self.host}:{self.proxies[server].port}"

    @property
    def worker_id(self) -> str:
        return self.proxies["redis"].seen

    def cut(self) -> None:
        for proxy in self.proxies.values():
            proxy.cut()

    def heal(self) -> None:
        for proxy in self.proxies.values():
            proxy.heal()

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        if self.namespace:
            self.namespace.close()


class Namespace:
    """A network namespace with one link to this machine. A link that is down swallows what is sent over it."""

    def __init__(self, number: int) -> None:
        self.name = f"tinsmith-{os.getpid()}-{number}"
        self.link, inner = f"ts{os.getpid() % 100000}a{number}", f"ts{os.getpid() % 100000}b{number}"
        network = f"10.213.{os.getpid() % 64 * 4 + number // 64}.{number % 64 * 4}"
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


def has_namespaces() -> bool:
    """Whether this process may make them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        Namespace(63).close()
    except subprocess.CalledProcessError:
        return False
    return True


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class ChaosFleet(RunningFleet):
    """A RunningFleet on the tiny base, deterministic, whose parts can be broken one by one."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.wires: dict[str, Wires] = {}
        self.isolates = has_namespaces()
        self.joined = 0
        super().__init__(folder, **{"deterministic": "true", "snapshot_seconds": 0.5, **settings})

    def environment(self, name: str) -> dict[str, str]:
        given = super().environment(name)
        if not name.startswith("worker"):
            return given
        if name not in self.wires:
            ports = {"postgres": self.postgres.port, "redis": self.redis.port, "s3": self.s3.port}
            namespace = Namespace(len(self.wires)) if self.isolates else None
            self.wires[name] = Wires(ports, namespace)
        wires = self.wires[name]
        for setting, server in (("DATABASE", "postgres"), ("REDIS", "redis"), ("S3_ENDPOINT", "s3")):
            direct = f"127.0.0.1:{getattr(self, server).port}"
            given[f"TINSMITH_{setting}"] = given[f"TINSMITH_{setting}"].replace(direct, wires.address(server))
        return given

    def start_one(self, name: str) -> None:
        environment = self.environment(name)
        wires = self.wires.get(name)
        inside = ["ip", "netns", "exec", wires.namespace.name] if wires and wires.namespace else []
        command = [*inside, sys.executable, "-m", "tinsmith_api.cli", *self.commands[name]]
        with self._guard, open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            self.starts[name] = self.starts.get(name, 0) + 1

    def workers(self) -> list[str]:
        """Names of the worker processes that are kept running, the one that holds most runs first."""
        held = {
            row[0]: row[1]
            for row in self.sql(
                "select worker_id, count(*) from runs join sessions on sessions.id = session_id "
                "where finished_at is null group by worker_id"
            )
        }
        kept = [name for name in self.commands if name.startswith("worker") and name not in self.paused]
        return sorted(kept, key=lambda name: -held.get(self.wires[name].worker_id, 0))

    def join_worker(self) -> str:
        self.joined += 1
        name = f"worker-joined{self.joined}"
        self.commands[name] = self.commands["worker0"]
        self.start_one(name)
        return name

    @contextlib.contextmanager
    def down(self, names: Sequence[str]) -> Iterator[None]:
        """These processes are not started again meanwhile."""
        self.paused.update(names)
        try:
            yield
        finally:
            self.paused.difference_update(names)

    def kill_postgres(self) -> None:
        """The server and every process of it: a machine that lost its power leaves none."""
        children = [pid for pid, parent in _parents() if parent == self.postgres.process.pid]
        self.postgres.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            time.sleep(0.01)

    def stop(self) -> int:
        try:
            return super().stop()
        finally:
            for wires in self.wires.values():
                wires.close()


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all there are."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
