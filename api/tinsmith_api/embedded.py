"""The embedded form: a worker child per base model, the doorbell and the wake-up over a socket pair."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from tinsmith_api.journal import leases
from tinsmith_api.journal.store import Store
from tinsmith_api.settings import Settings, environment, worker_arguments

log = logging.getLogger("tinsmith")

# A worker that lives shorter than this is not restarted at once: its start itself fails.
_HEALTHY_SECONDS = 20.0
_MAX_PAUSE_SECONDS = 10.0
# How long a worker may take to finish its pass and write its snapshots when asked to stop.
_DRAIN_SECONDS = 60.0
# A step of a sample that somebody reads as it is sampled: 128 sequences, with 20 alternatives a token.
_LINE_BYTES = 1 << 20


@dataclass
class Child:
    base_model: str
    path: str
    worker_id: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    was_ready: bool = False
    writer: asyncio.StreamWriter | None = None
    process: asyncio.subprocess.Process | None = None


class Workers:
    """Starts the workers, starts them again when they die, and carries names to and from them.

    `on_failure` gets a sentence when a base model cannot be served at all: its worker ended by itself, with
    an error, and none was ever ready. It is not started again.
    """

    def __init__(
        self,
        settings: Settings,
        journal: Store,
        *,
        on_done: Callable[[str], None],
        on_piece: Callable[[str, str], None],
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
        command: Sequence[str] = (sys.executable, "-m", "tinsmith_worker"),
    ) -> None:
        self.settings = settings
        self.journal = journal
        self.on_done = on_done
        self.on_piece = on_piece
        self.on_ready = on_ready
        self.on_failure = on_failure
        self.command = command
        self.children = {name: Child(name, path) for name, path in settings.models.items()}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        await asyncio.wrap_future(self.journal.write(leases.stop_all_workers))
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self.children.values()]

    @property
    def ready(self) -> bool:
        return all(child.ready.is_set() for child in self.children.values())

    def ring(self, worker_id: str, request_id: str) -> None:
        """Tell this worker that an operation is ready. If it is down, the next one finds the operation in the
        journal when it starts."""
        for child in self.children.values():
            if child.worker_id == worker_id:
                self._send(child.base_model, f"ring {request_id}\n")

    async def stop(self) -> None:
        """Let every worker finish its pass and write its snapshots. One that is still loading has none."""
        self._stopping.set()
        for child in self.children.values():
            if child.ready.is_set():
                self._send(child.base_model, "drain\n")
            else:
                _kill(child)
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
        """One worker after the other until told to stop. Nothing that goes wrong here ends it."""
        pause = 0.1
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                code = await self._live(child)
                if self._stopping.is_set():
                    return
                # A code below zero is a signal: it was killed, and another one may live.
                if code > 0 and not child.was_ready:
                    self.on_failure(
                        f"the worker of {child.base_model} could not start from {child.path!r} "
                        f"(exit status {code}): its own lines in the log above say why"
                    )
                    return
                log.error("the worker of %s ended with code %s; starting another", child.base_model, code)
            except Exception:
                log.exception("running a worker of %s failed; starting another", child.base_model)
            finally:
                _kill(child)
                if child.process is not None:
                    await child.process.wait()
            pause = (
                0.1 if time.monotonic() - started > _HEALTHY_SECONDS else min(2 * pause, _MAX_PAUSE_SECONDS)
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _live(self, child: Child) -> int:
        """From one worker's start to its end; its exit code."""
        await self._register(child)
        ours, theirs = socket.socketpair()
        try:
            await self._spawn(child, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()  # or the end of the worker would not end the stream
        reader, child.writer = await asyncio.open_connection(sock=ours, limit=_LINE_BYTES)
        try:
            await self._listen(child, reader)
        finally:
            child.ready.clear()
            child.writer.close()
        assert child.process is not None
        return await child.process.wait()

    async def _register(self, child: Child) -> None:
        """Here and not in the worker: one that outlived its control plane must not enter itself behind the
        one that took its place. The one before is gone by now."""
        worker_id = f"w-{uuid.uuid4().hex[:12]}"

        def statement(connection: sa.Connection) -> None:
            leases.stop_worker(connection, child.worker_id, died=True)
            leases.register_worker(connection, worker_id, child.base_model, {})

        await asyncio.wrap_future(self.journal.write(statement))
        child.worker_id = worker_id

    async def _spawn(self, child: Child, channel: int) -> None:
        command = [
            *self.command,
            *worker_arguments(self.settings, child.base_model, child.path),
            *("--worker-id", child.worker_id, "--channel", str(channel)),
        ]
        # Threads that wait for each other by spinning take the cores from the control plane beside them.
        variables = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **environment(self.settings)}
        child.process = await asyncio.create_subprocess_exec(*command, pass_fds=[channel], env=variables)
        if self._stopping.is_set():
            _kill(child)

    async def _listen(self, child: Child, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionResetError):
            while line := await reader.readline():
                word, *rest = line.decode().split()
                if word == "done":
                    self.on_done(rest[0])
                elif word == "piece":
                    self.on_piece(rest[1], rest[2])
                elif word == "ready":
                    child.was_ready = True
                    child.ready.set()
                    self.on_ready()
                    log.info("%s is ready", child.base_model)


def _kill(child: Child) -> None:
    if child.process is not None and child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
