"""A short memory for what would be read again and again."""

import time
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Memory(Generic[Value]):
    """What was read lately: at most `size` values, each for `seconds`."""

    def __init__(self, seconds: float, size: int = 4096) -> None:
        self.seconds = seconds
        self.size = size
        self._values: dict[str, tuple[float, Value]] = {}

    def get(self, key: str) -> Value | None:
        found = self._values.get(key)
        return found[1] if found and found[0] > time.monotonic() else None

    def put(self, key: str, value: Value) -> Value:
        if len(self._values) >= self.size:
            self._values.pop(next(iter(self._values)))
        self._values[key] = (time.monotonic() + self.seconds, value)
        return value

    def forget(self, key: str) -> None:
        self._values.pop(key, None)

    def forget_this(self, key: str, value: Value) -> None:
        """Unless it was read anew since."""
        if (found := self._values.get(key)) is not None and found[1] is value:
            del self._values[key]
