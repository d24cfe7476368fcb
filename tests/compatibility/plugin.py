"""While tests run: which of them drove what of the official SDK."""

import sys
from collections.abc import Iterator

import pytest

from tests.compatibility import page
from tests.compatibility.recorder import RECORDER, WORKS

# There the SDK meets a running service; elsewhere stand-ins.
WITH_A_SERVICE = ("tests/e2e/", "tests/cookbook/")
LAST = "tests/compatibility/"


class Plugin:
    def __init__(self) -> None:
        self.driven: page.Driven = {}  # by tests that passed; by a file what its fixtures did

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.nodeid.startswith(LAST))  # they look at what the others did

    def pytest_collection_finish(self) -> None:
        if "tinker" in sys.modules:
            RECORDER.attach()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        yield from self._noted(item.nodeid.split("::")[0])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from self._noted(item.nodeid.split("[")[0])

    def _noted(self, test: str) -> Iterator[None]:
        RECORDER.seen = {}
        yield
        if not test.startswith(WITH_A_SERVICE):
            return
        its = self.driven.setdefault(test, {})
        for name, outcome in RECORDER.seen.items():
            if its.get(name) != WORKS:
                its[name] = outcome
