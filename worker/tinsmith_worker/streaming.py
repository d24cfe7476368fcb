"""Tokens on their way to whoever reads them as they come, beside the engine's thread.

Nothing here has to arrive: the journal gets the whole, and a reader that misses a piece waits for that. So
nobody ever waits for a reader either; what there is no room for is left out.
"""

import base64
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_worker import answers
from tinsmith_worker.contract import SampledPiece

# That wait to be sent, of all streams.
PIECES_AT_MOST = 1 << 14
# Of one message: the API reads lines of a MiB at most, and has a quarter of that for one reader.
_MESSAGE_BYTES = 32 << 10


class Streaming:
    """`send` is `Line.send`: it is given the word "piece", whom it is for, the sample, and pb.SampledPieces
    in base64."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._waiting: dict[tuple[str, str], list[SampledPiece]] = {}  # by whom they are for, and the sample
        self._count = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="streaming", daemon=True).start()

    def send(self, to: str, request_id: str, pieces: Sequence[SampledPiece]) -> None:
        """Returns at once."""
        with self._changed:
            if self._count + len(pieces) <= PIECES_AT_MOST:
                self._waiting.setdefault((to, request_id), []).extend(pieces)
                self._count += len(pieces)
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                to, request_id = next(iter(self._waiting))
                pieces = self._waiting.pop((to, request_id))
            for message in _messages(map(answers.piece, pieces)):
                self._send("piece", to, request_id, base64.b64encode(message.SerializeToString()).decode())
            with self._changed:
                self._count -= len(pieces)


def _messages(pieces: Iterable[pb.SampledPiece]) -> Iterator[pb.SampledPieces]:
    message, size = pb.SampledPieces(), 0
    for piece in pieces:
        if size and size + piece.ByteSize() > _MESSAGE_BYTES:
            yield message
            message, size = pb.SampledPieces(), 0
        message.pieces.append(piece)
        size += piece.ByteSize()
    yield message
