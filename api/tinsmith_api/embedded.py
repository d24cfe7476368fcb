"""The embedded form: a worker child per base model, the doorbell and the wake-up over a socket pair."""

import asyncio
import functools
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from tinsmith_api.journal import leases
from tinsmith_api.journal.store import Store
from tinsmith_api.settings import Settings

log = logging.getLogger("tinsmith")

# A worker that lives shorter than this is not restarted at once: its start itself fails.
_HEALTHY_SECONDS = 20.0
_MAX_PAUSE_SECONDS = 10.0
# How long a worker may take to finish its pass and write its snapshots when asked to stop.
_DRAIN_SECONDS = 60.0


@dataclass
class Child:
    base_model: str
    path: str
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    writer: asyncio.StreamWriter | None = None
    process: asyncio.subprocess.Process | None = None


class Workers:
    """Starts the workers, starts them again when they die, and carries names to and from them."""

    def __init__(
        self,
        settings: Settings,
        journal: Store,
        *,
        on_done: Callable[[str], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.journal = journal
        self.on_done = on_done
        self.on_ready = on_ready
        self.children = {name: Child(name, path) for name, path in settings.models.items()}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        await asyncio.wrap_future(self.journal.write(leases.stop_all_workers))
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self.children.values()]

    @property
    def ready(self) -> bool:
        return all(child.ready.is_set() for child in self.children.values())

    def ring(self, base_model: str, request_id: str) -> None:
        """Tell the worker of this base model that an operation is ready. If it is down, it finds the
        operation in the journal when it starts."""
        self._send(base_model, f"ring {request_id}\n")

    def cancel(self, base_model: str, request_id: str) -> None:
        self._send(base_model, f"cancel {request_id}\n")

    async def stop(self) -> None:
        """Let every worker finish its pass and write its snapshots."""
        self._stopping.set()
        for child in self.children.values():
            self._send(child.base_model, "drain\n")
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_DRAIN_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _send(self, base_model: str, line: str) -> None:
        writer = self.children[base_model].writer
        if writer is not None and not writer.is_closing():
            writer.write(line.encode())

    async def _keep(self, child: Child) -> None:
        pause = 0.1
        while not self._stopping.is_set():
            started = time.monotonic()
            worker_id = f"w-{uuid.uuid4().hex[:12]}"
            try:
                code = await self._live(child, worker_id)
            finally:
                if child.process is not None and child.process.returncode is None:
                    child.process.kill()
                    await child.process.wait()
            await asyncio.wrap_future(
                self.journal.write(functools.partial(leases.stop_worker, worker_id=worker_id))
            )
            if self._stopping.is_set():
                return
            log.error("the worker of %s ended with code %s; starting another", child.base_model, code)
            pause = (
                0.1 if time.monotonic() - started > _HEALTHY_SECONDS else min(2 * pause, _MAX_PAUSE_SECONDS)
            )
            await asyncio.sleep(pause)

    async def _live(self, child: Child, worker_id: str) -> int:
        """From one worker's start to its end; its exit code."""
        ours, theirs = socket.socketpair()
        settings = self.settings
        command = [sys.executable, "-m", "tinsmith_worker"]
        arguments = {
            "worker-id": worker_id,
            "base-model": child.base_model,
            "path": child.path,
            "journal": str(self.journal.url),
            "objects": settings.folder / "objects",
            "data-dir": settings.folder,
            "channel": theirs.fileno(),
            "engine": settings.engine,
            "pass-tokens": settings.pass_tokens,
            "gap-seconds": settings.gap_seconds,
            "snapshot-seconds": settings.snapshot_seconds,
        }
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        if settings.deterministic:
            command.append("--deterministic")
        # Threads that wait for each other by spinning take the cores from the control plane beside them.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        child.process = await asyncio.create_subprocess_exec(
            *command, pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()
        reader, child.writer = await asyncio.open_connection(sock=ours)
        try:
            while line := await reader.readline():
                word, *rest = line.decode().split()
                if word == "done":
                    self.on_done(rest[0])
                elif word == "ready":
                    child.ready.set()
                    self.on_ready()
                    log.info("%s is ready", child.base_model)
        except ConnectionResetError:
            pass
        child.ready.clear()
        child.writer.close()
        return await child.process.wait()
