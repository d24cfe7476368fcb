"""The line between a worker and whoever started it: names of operations one way, of results the other.

The embedded form's doorbell and wake-up: a socket pair, one line a message. Parent to worker: `ring ID`,
`drain`, `share` (in a fleet). Worker to parent: `ready`, `done ID`, `piece TO ID TOKENS`, `leaving`.
"""

import socket
import threading
from collections.abc import Iterator
from typing import Protocol


class Line(Protocol):
    """What a worker needs of whoever rings for it: `Channel` here, or `fleet_channel.FleetChannel`."""

    def messages(self) -> Iterator[list[list[str]]]: ...
    def send(self, *words: str) -> None: ...
    def close(self) -> None: ...


class Channel:
    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._sending = threading.Lock()

    def messages(self) -> Iterator[list[list[str]]]:
        """Batches of messages, each split into words; ends when the other side is gone."""
        rest = b""
        while received := self._receive():
            *lines, rest = (rest + received).split(b"\n")
            if lines:
                yield [line.decode().split() for line in lines]

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except ConnectionResetError:
            return b""

    def send(self, *words: str) -> None:
        line = (" ".join(words) + "\n").encode()
        try:
            with self._sending:  # from several threads; a line may take more than one write
                self._socket.sendall(line)
        except OSError:
            return  # the other side is gone; `messages` ends and the process with it

    def close(self) -> None:
        self._socket.close()
