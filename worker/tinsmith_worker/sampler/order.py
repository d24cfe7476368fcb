"""Rows in the order of their adapters, so that each adapter has one stretch of them."""

from collections.abc import Iterable
from typing import TypeVar

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.stream import Segment

Item = TypeVar("Item")


def by_adapter(items: Iterable[Item], adapters: Iterable[Adapter | None]) -> list[Item]:
    """Items of one adapter together, adapters and items in the order they first appear; those of the base
    alone lead, so that they are no gap among the rows of adapters."""
    found: dict[int, list[Item]] = {id(None): []}
    for item, adapter in zip(items, adapters, strict=True):
        found.setdefault(id(adapter), []).append(item)
    return [item for group in found.values() for item in group]


def segments(rows: Iterable[tuple[Adapter | None, int]]) -> tuple[Segment, ...]:
    """One segment for each stretch of rows of one adapter, given (adapter, rows) in their order."""
    found: list[Segment] = []
    end = 0
    for adapter, count in rows:
        start = found.pop().start if found and found[-1].adapter is adapter else end
        end += count
        found.append(Segment(start, end, adapter))
    return tuple(found)
