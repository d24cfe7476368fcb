"""The line between a worker and whoever started it: names of operations one way, of results the other.

The embedded form's doorbell and wake-up: a socket pair, one line a message. Parent to worker: `ring ID`,
`cancel ID`, `drain`. Worker to parent: `ready`, `done ID`.
"""

import socket
from collections.abc import Callable, Iterator


class Channel:
    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._reader = self._socket.makefile("rb")

    def messages(self) -> Iterator[list[list[str]]]:
        """Batches of messages, each split into words; ends when the other side is gone."""
        while True:
            first = self._reader.readline()
            if not first:
                return
            lines = [first]
            # What is buffered already came along; handle it in one go.
            while b"\n" in (waiting := self._reader.peek()):
                lines.append(self._reader.readline())
                if len(waiting) == len(lines[-1]):
                    break
            yield [line.decode().split() for line in lines]

    def send(self, *words: str) -> None:
        try:
            self._socket.sendall((" ".join(words) + "\n").encode())
        except OSError:
            return  # the other side is gone; `messages` ends and the process with it


Announce = Callable[[str], None]
