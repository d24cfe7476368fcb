"""What the device computes while the next work is packed: begun in order, taken up in order."""

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class _Entry:
    run_ids: frozenset[str]
    arrived: Future[None] | None  # None: it is here
    take_up: Callable[[], None]


class UnderWay:
    """Used on the engine's thread. Another one waits for the device and says so (`on_arrival`)."""

    def __init__(self, on_arrival: Callable[[], None]) -> None:
        self._entries: deque[_Entry] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._on_arrival = on_arrival

    def holds(self, run_id: str) -> bool:
        return any(run_id in entry.run_ids for entry in self._entries)

    def begin(
        self, run_ids: Collection[str], wait: Callable[[], None] | None, take_up: Callable[[], None]
    ) -> None:
        """`take_up` is called when `wait` is over and everything before was taken up; now, if there is
        nothing to wait for."""
        arrived = self._thread.submit(wait) if wait else None
        self._entries.append(_Entry(frozenset(run_ids), arrived, take_up))
        if arrived is None:
            self.take_up()
        else:
            arrived.add_done_callback(lambda _: self._on_arrival())

    def take_up(self, *, keep: int = 0) -> None:
        """All but the last so many, waiting for them."""
        while len(self._entries) > keep:
            self._entries.popleft().take_up()

    def take_up_arrived(self) -> None:
        while self._entries and ((arrived := self._entries[0].arrived) is None or arrived.done()):
            self._entries.popleft().take_up()
