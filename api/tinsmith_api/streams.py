"""Tokens that came before their sample was finished, between the workers and whoever reads them."""

import asyncio
import uuid
from collections import deque
from collections.abc import Sequence

# Of one reader. Whoever reads slower than is sampled gets the rest from the journal, when it is there.
_WAITING_BYTES = 256 << 10
_MESSAGE_BYTES = 160  # what a message takes beside its characters


class Pieces:
    """What waits for one reader: (sample, pb.SampledPieces in base64), in the order in which it came."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, str]] = deque()
        self._bytes = 0
        self._came = asyncio.Event()

    def put(self, request_id: str, pieces: str) -> None:
        """Kept if there is room."""
        size = len(pieces) + _MESSAGE_BYTES
        if self._bytes + size <= _WAITING_BYTES:
            self._waiting.append((request_id, pieces))
            self._bytes += size
            self._came.set()

    async def next(self) -> tuple[str, str]:
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        request_id, pieces = self._waiting.popleft()
        self._bytes -= len(pieces) + _MESSAGE_BYTES
        return request_id, pieces


class Streams:
    """Who reads which samples. `name`: of this process, to the workers."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self._readers: dict[str, Pieces] = {}

    def open(self, request_ids: Sequence[str]) -> Pieces:
        """Until `close` is called, what comes of these samples is kept here."""
        pieces = Pieces()
        self._readers |= dict.fromkeys(request_ids, pieces)
        return pieces

    def close(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._readers.pop(request_id, None)

    def put(self, request_id: str, pieces: str) -> None:
        if (reader := self._readers.get(request_id)) is not None:
            reader.put(request_id, pieces)
