"""Work is begun while the device still computes what came before it."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worker.test_process import House
from tinsmith_api.journal import operations as ops
from tinsmith_worker.under_way import UnderWay


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A worker whose device computes nothing before `house.go` is set."""
    made = House(tmp_path, device_seconds=1.0)
    made.start("w1")
    made.go = threading.Event()  # type: ignore[attr-defined]
    made.go.set()  # type: ignore[attr-defined]
    made.engine.wait = lambda: made.go.wait(20) and None  # type: ignore[attr-defined, method-assign]
    yield made
    made.go.set()  # type: ignore[attr-defined]
    if made.thread.is_alive():
        made.drain()
    made.journal.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_pass_is_begun_while_the_device_computes_and_no_third_one(house: House) -> None:
    house.run("a")
    house.go.clear()  # type: ignore[attr-defined]
    first = house.train("a", 1, 1, 2)
    until(lambda: len(house.engine.passes) == 1)
    step = house.step("a", 2)
    second = house.train("a", 3, 3)
    until(lambda: len(house.engine.passes) == 2)
    third = house.train("a", 4, 4)
    time.sleep(0.1)
    assert len(house.engine.passes) == 2
    assert all(house.queued(r) for r in (first, step, second, third))
    house.go.set()  # type: ignore[attr-defined]
    assert house.gradient_of(step) == 2
    assert house.gradient_of(house.step("a", 5)) == 2
    assert len(house.engine.passes) == 3


def test_a_save_comes_after_the_results_of_what_it_covers(house: House) -> None:
    house.run("a")
    house.train("a", 1, 1, 2)
    step = house.step("a", 2)
    house.outcome(step)
    house.go.clear()  # type: ignore[attr-defined]
    last = house.train("a", 3, 1, 2, 3)
    until(lambda: len(house.engine.passes) == 2)
    house.line.sendall(b"drain\n")
    time.sleep(0.05)
    assert house.queued(last)
    house.go.set()  # type: ignore[attr-defined]
    house.thread.join(20)
    assert not house.queued(last)
    house.start("w2")
    assert house.gradient_of(house.step("a", 4)) == 3, "the snapshot missed what was under way"


def test_a_run_with_work_under_way_is_not_let_go_of(house: House) -> None:
    house.run("a")
    house.go.clear()  # type: ignore[attr-defined]
    waiting = house.train("a", 1, 1, 2)
    until(lambda: house.worker is not None and house.worker.under_way.holds("a"))
    assert house.worker is not None
    assert not house.worker._is_idle(house.worker.held["a"])
    house.go.set()  # type: ignore[attr-defined]
    assert house.outcome(waiting).error is None
    until(lambda: house.worker is not None and house.worker._is_idle(house.worker.held["a"]))


def test_a_pass_that_breaks_late_takes_what_was_queued_behind_it_along_and_nobody_else(house: House) -> None:
    house.run("a")
    house.run("b")
    house.go.clear()  # type: ignore[attr-defined]
    broken = house.train("a", 1, 666)
    until(lambda: len(house.engine.passes) == 1)
    behind = house.train("a", 2, 5)
    until(lambda: len(house.engine.passes) == 2)
    house.go.set()  # type: ignore[attr-defined]
    failed = house.outcome(broken)
    assert failed.error is not None
    assert failed.state == ops.FAILED
    assert house.outcome(behind).error is None
    assert house.gradient_of(house.step("a", 3)) == 1, "its gradient has something of the broken pass"
    assert house.outcome(house.train("b", 1, 1)).error is None


def test_entries_are_taken_up_in_order_even_if_a_later_one_arrives_first() -> None:
    taken: list[int] = []
    arrivals: list[None] = []
    under_way = UnderWay(lambda: arrivals.append(None))
    gate = threading.Event()
    under_way.begin(["a"], lambda: gate.wait(10) and None, lambda: taken.append(1))
    under_way.begin(["b"], lambda: None, lambda: taken.append(2))
    under_way.take_up_arrived()
    assert taken == []
    assert under_way.holds("a")
    under_way.begin(["c"], None, lambda: taken.append(3))
    assert taken == [1, 2, 3]
    assert not under_way.holds("a")
    gate.set()
