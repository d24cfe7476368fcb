"""Tokens on their way to whoever reads them as they come, beside the engine's thread.

Nothing here has to arrive: the journal gets the whole, and a reader that misses a piece waits for that. So
nobody ever waits for a reader either; what there is no room for is left out.
"""

import base64
import queue
import threading
from collections.abc import Callable, Sequence

from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_worker import answers
from tinsmith_worker.contract import SampledPiece

_MESSAGES_AT_MOST = 1024


class Streaming:
    """`send` is `Line.send`: it is given the word "piece", whom it is for, the sample, and pb.SampledPieces
    in base64."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._waiting: queue.Queue[tuple[str, str, Sequence[SampledPiece]]] = queue.Queue(_MESSAGES_AT_MOST)
        threading.Thread(target=self._run, name="streaming", daemon=True).start()

    def send(self, to: str, request_id: str, pieces: Sequence[SampledPiece]) -> None:
        """Returns at once."""
        try:
            self._waiting.put_nowait((to, request_id, pieces))
        except queue.Full:
            return

    def _run(self) -> None:
        while True:
            to, request_id, pieces = self._waiting.get()
            message = pb.SampledPieces(pieces=map(answers.piece, pieces))
            self._send("piece", to, request_id, base64.b64encode(message.SerializeToString()).decode())
