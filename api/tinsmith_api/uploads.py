"""Large bodies: how much of them is held at a time, by whom they are read, and what they may be read into.

A body's bytes are bounded, but what they are read into is not: two bytes can name an empty datum or list,
which takes thirty times as much memory. The parts of a large body are counted before it is read.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from weakref import WeakValueDictionary

from fastapi import Request
from google.protobuf.message import Message

from tinsmith.errors import InvalidInput
from tinsmith_api.bodies import READ_IN_THREAD_BYTES, Made, off_loop, read_body
from tinsmith_api.limits import TooMany

MAX_PARTS = 1_000_000
"""Messages, lists, objects and texts in one body. Official clients send at most some thousands."""
MAX_NUMBERS = 4_000_000
"""In one body of JSON, where each takes up to 40 bytes. Protobuf has them in blobs, without this limit."""


class Uploads:
    """Of one process. A tenant's large bodies are read one at a time, so that they hold nobody else up."""

    def __init__(self, at_most_bytes: int) -> None:
        self._at_most_bytes = at_most_bytes
        self._held: Counter[str] = Counter()  # bytes, by tenant
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def receive(self, tenant_id: str, request: Request, limit: int) -> AsyncIterator[bytes]:
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

    async def in_turn(self, tenant_id: str, size: int, read: Callable[[], Made]) -> Made:
        """`read()` of a body of `size` bytes; of a large one in a thread, and after this tenant's others."""
        if size <= READ_IN_THREAD_BYTES:
            return read()
        async with self._turns.setdefault(tenant_id, asyncio.Lock()):
            return await off_loop(size, read)


def check_json(body: bytes) -> None:
    """InvalidInput if `body` has too many parts; brackets and commas in texts are counted, too."""
    if len(body) <= READ_IN_THREAD_BYTES:
        return
    _check(body.count(b"{") + body.count(b"[") + body.count(b'"') // 2)
    if body.count(b",") > MAX_NUMBERS:
        raise InvalidInput(
            f"the body holds more than {MAX_NUMBERS:,} values: send less at a time, or as protobuf"
        )


def check_protobuf(body: bytes, kind: type[Message]) -> None:
    """InvalidInput if `body`, a message of this kind, has too many parts."""
    if len(body) > READ_IN_THREAD_BYTES:
        _check(_count(memoryview(body), kind.DESCRIPTOR))


def _check(parts: int) -> None:
    if parts > MAX_PARTS:
        raise InvalidInput(f"the body is made of more than {MAX_PARTS:,} parts: send less at a time")


def _count(body: memoryview, kind: Any) -> int:  # a descriptor, of which there are two implementations
    """Messages and numbers in it, until there are too many. Where it is broken its reader will say so."""
    parts, todo = 0, [(0, len(body), kind)]
    while todo and parts <= MAX_PARTS:
        at, end, of = todo.pop()
        while at < end and parts <= MAX_PARTS:
            tag, at = _varint(body, at, end)
            field, wire_type = of.fields_by_number.get(tag >> 3), tag & 7
            if wire_type == 2:
                size, at = _varint(body, at, end)
                if field is not None and field.message_type is not None:
                    parts += 1
                    todo.append((at, min(at + size, end), field.message_type))
                elif field is not None and field.type not in (field.TYPE_BYTES, field.TYPE_STRING):
                    parts += size  # packed, a byte or more for each
                at += size
            elif wire_type == 0:
                parts += 1
                _, at = _varint(body, at, end)
            elif wire_type in (1, 5):
                parts += 1
                at += 8 if wire_type == 1 else 4
            else:
                return parts  # a group, or none at all: no message of ours
    return parts


def _varint(body: memoryview, at: int, end: int) -> tuple[int, int]:
    """(its value, what follows); at the end if it is broken."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            return value, end
        byte = body[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return value, end
