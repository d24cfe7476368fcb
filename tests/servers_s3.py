"""S3 servers of different strictness, and what stands between them and us on a bad day.

Moto (tests/servers.py) checks no signature and encrypts as asked. OpenStack Swift with s3api checks signatures and
refuses encryption; the system's packages (Debian 12: 2.30, which refuses conditional puts and boto3's bulk deletes
too) are taken before the wheel, which is newer and milder. Either runs as whoever runs the tests.
"""

import asyncio
import getpass
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from tests.servers import Server, free_port, missing

_KINDS = ("account", "container", "object")
_PROGRAMS = ("swift-ring-builder", "swift-proxy-server", *(f"swift-{kind}-server" for kind in _KINDS))

_SWIFT = "[swift-hash]\nswift_hash_path_suffix = tests\n\n[storage-policy:0]\nname = one\ndefault = yes\n"

_STORAGE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
user = {user}
workers = 0
log_level = WARNING

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

# The order of s3api, its authentication and the large objects is prescribed by s3api. Nothing answers as
# memcache: Swift does without.
_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 0
log_level = WARNING

[pipeline:main]
pipeline = catch_errors gatekeeper cache s3api tempauth slo dlo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{nobody}

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:slo]
use = egg:swift#slo

[filter:dlo]
use = egg:swift#dlo
"""


class Swift:
    environment: ClassVar = {"AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing"}

    def __init__(self, folder: Path) -> None:
        self._programs = _find_programs()
        self.folder = folder
        (folder / "devices" / "d1").mkdir(parents=True)
        (folder / "swift.conf").write_text(_SWIFT)
        self._servers: list[Server] = []
        try:
            for kind in _KINDS:
                port = free_port()
                self._make_ring(kind, port)
                self._start(kind, _STORAGE, port)
            self.port = free_port()
            self._start("proxy", _PROXY, self.port)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        for server in reversed(self._servers):
            server.stop()

    def _make_ring(self, kind: str, port: int) -> None:
        builder = str(self.folder / f"{kind}.builder")
        for words in (
            ["create", "4", "1", "0"],  # 16 partitions, one replica
            ["add", f"r1z1-127.0.0.1:{port}/d1", "1"],
            ["rebalance"],
        ):
            command = [self._programs["swift-ring-builder"], builder, *words]
            done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
            assert done.returncode == 0, done.stdout + done.stderr

    def _start(self, kind: str, template: str, port: int) -> None:
        folder = self.folder / kind
        folder.mkdir()
        config = folder / "server.conf"
        values = {"port": port, "kind": kind, "folder": self.folder, "user": getpass.getuser(), "nobody": 9}
        config.write_text(template.format(**values))
        self._servers.append(Server(folder, [self._programs[f"swift-{kind}-server"], str(config)], port))


def _find_programs() -> dict[str, str]:
    for path in (None, str(Path(sys.executable).parent)):
        found = {name: where for name in _PROGRAMS if (where := shutil.which(name, path=path))}
        if len(found) == len(_PROGRAMS):
            return found
    missing(
        "no OpenStack Swift, the strict one of two S3 servers: neither the wheel swift (Linux) nor the system's "
        "swift-proxy, swift-account, swift-container and swift-object"
    )
    return {}


class Flaky:
    """Stands before the HTTP server at `url`. The switches may be turned at any time, from any thread.

    failing: answers 503. fail_next: so many of the next requests are answered 503. delay_seconds: waits before
    a request goes on; turned down, also those that wait already go on. These three count for requests whose
    first line is one of `only`'s. cut_next: so many of the next long answers end after 1,000 bytes.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._upstream_port = parts.hostname or "", parts.port or 80
        self.failing = False
        self.fail_next = 0
        self.delay_seconds = 0.0
        self.cut_next = 0
        self.only: Callable[[str], bool] = lambda line: True
        self.heads: deque[str] = deque(maxlen=1000)  # of the requests, as they came
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        )
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, name="flaky", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lines(self) -> list[str]:
        """The first lines of the requests."""
        return [head.split("\r\n")[0] for head in self.heads]

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side has left, or we are being stopped
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head.decode())
        arrived_at = self._loop.time()
        if self.only(self.lines()[-1]):
            while self._loop.time() - arrived_at < self.delay_seconds:  # noqa: ASYNC110 - it may change
                await asyncio.sleep(0.01)
            if self.failing or self.fail_next > 0:
                self.fail_next = max(0, self.fail_next - 1)
                await self._refuse(head, reader, writer)
                return
        up_reader, up_writer = await asyncio.open_connection(self._host, self._upstream_port)
        # One request for each connection, so that the head of every request is seen here.
        up_writer.write(head[:-2] + b"connection: close\r\n\r\n")
        sending = asyncio.create_task(_pass_on(reader, up_writer))
        try:
            passed = 0
            while chunk := await up_reader.read(1 << 16):
                if passed + len(chunk) > 1000 and self.cut_next > 0:
                    self.cut_next -= 1
                    writer.write(chunk[: max(0, 1000 - passed)])
                    await writer.drain()
                    return
                passed += len(chunk)
                writer.write(chunk)
                await writer.drain()
        finally:
            sending.cancel()
            up_writer.close()

    async def _refuse(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:])
        }
        if "expect" not in said:  # else the body comes only when asked for
            await reader.readexactly(int(said.get("content-length", "0")))
        writer.write(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()
