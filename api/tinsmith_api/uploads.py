"""Large bodies: how much of them is held at a time, and who reads them."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from weakref import WeakValueDictionary

from fastapi import Request

from tinsmith.errors import InvalidInput
from tinsmith_api import readings
from tinsmith_api.bodies import Readable, read_body
from tinsmith_api.limits import TooMany

READ_APART_BYTES = 1 << 20
"""Reading a body larger than this takes longer than other requests should wait for."""

_READERS = 2
# What a pipe is given at a time.
_PIECE = 1 << 20


class Uploads:
    """Of one process. A tenant's large bodies are read one at a time, so that they hold nobody else up."""

    def __init__(self, at_most_bytes: int) -> None:
        self._at_most_bytes = at_most_bytes
        self._held: Counter[str] = Counter()  # bytes, by tenant
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._free = asyncio.Semaphore(_READERS)
        self._idle: list[_Reader] = []

    @contextlib.asynccontextmanager
    async def receive(self, tenant_id: str, request: Request, limit: int) -> AsyncIterator[Readable]:
        """The body, held until the block ends; TooMany while this tenant's others leave no room."""
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if self._held[tenant_id] > own and self._held[tenant_id] + size > self._at_most_bytes:
                raise TooMany(
                    f"{self._held[tenant_id]:,} bytes of yours are being received now, the limit is "
                    f"{self._at_most_bytes:,}: send fewer bodies at a time",
                    1,
                )
            self._held[tenant_id] += size
            own += size

        try:
            yield await read_body(request, limit, hold)
        finally:
            self._held[tenant_id] -= own
            if not self._held[tenant_id]:
                del self._held[tenant_id]

    async def read(
        self, tenant_id: str, body: Readable, reading: Callable[..., bytes], **given: Any
    ) -> bytes:
        """`reading(body, **given)`, which is one of READINGS; of a large body in another process, and after
        this tenant's others."""
        if len(body) <= READ_APART_BYTES:
            return reading(body, **given)
        async with self._turns.setdefault(tenant_id, asyncio.Lock()), self._free:
            return await asyncio.to_thread(self._ask, body, reading.__name__, given)

    def _ask(self, body: Readable, reading: str, given: dict[str, Any]) -> bytes:
        for _ in range(2):  # one that was idle may have been killed long ago
            reader = self._idle.pop() if self._idle else _Reader()
            try:
                read = reader.ask(body, reading, given)
            except (OSError, EOFError):
                reader.stop()
                continue
            except InvalidInput:
                self._idle.append(reader)
                raise
            self._idle.append(reader)
            return read
        raise InvalidInput(f"nothing could read this body of {len(body):,} bytes: send less at a time")

    def stop(self) -> None:
        while self._idle:
            self._idle.pop().stop()


class _Reader:
    """A process that runs `readings`; one question at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", readings.__name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, body: Readable, reading: str, given: dict[str, Any]) -> bytes:
        """OSError or EOFError if the process has ended."""
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        question = {"reading": reading, "given": given, "size": len(body)}
        questions.write(json.dumps(question).encode() + b"\n")
        with memoryview(body) as whole:
            for start in range(0, len(whole), _PIECE):
                questions.write(whole[start : start + _PIECE])
        questions.flush()
        line = answers.readline()
        if not line:
            raise EOFError
        said = json.loads(line)
        if "call" in said:
            raise readings.InvalidCall(said["error"], **said["call"])
        if "error" in said:
            raise InvalidInput(said["error"])
        read = answers.read(said["size"])
        if len(read) < said["size"]:
            raise EOFError
        return read

    def stop(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # closes the pipes, and waits
            pass
