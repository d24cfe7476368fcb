"""What a person at a terminal sees while calls take long."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

_SECONDS_UNTIL_SHOWN = 5.0


class Progress:
    """How many results of those being waited for have come, as one line of tqdm; nothing before five
    seconds, and nothing where no terminal is or tqdm is not installed. `wanted` False, or
    TINSMITH_PROGRESS=0, switches it off; True shows it without a terminal too."""

    def __init__(self, wanted: bool | None = None) -> None:
        if wanted is None and os.environ.get("TINSMITH_PROGRESS"):
            wanted = os.environ["TINSMITH_PROGRESS"] not in ("0", "false", "no")
        self._wanted = sys.stderr.isatty() if wanted is None else wanted
        self._lock = threading.Lock()
        self._bar: Any = None
        self._open = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For one result."""
        if not self._wanted:
            yield
            return
        with self._lock:
            self._open += 1
            bar = self._bar = self._bar or _bar()
            if bar is not None:
                bar.total += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if bar is not None and bar is self._bar:
                    bar.update(1)
                    if not self._open:
                        self._close()

    def note(self, reason: str | None) -> None:
        """Why it takes so long, from the service."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_postfix_str(reason or "")

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None

    class Bar(tqdm):  # type: ignore[type-arg]
        monitor_interval = 0  # it would be a thread of its own

    return Bar(total=0, desc="tinsmith", unit="call", delay=_SECONDS_UNTIL_SHOWN, leave=False)
