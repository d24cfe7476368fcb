"""While tests run: a test fails that gets of the official SDK what docs/compatibility.md says it does not give."""

import importlib.metadata
import sys
from collections.abc import Iterator

import pytest

from tests.compatibility import page
from tests.compatibility.recorder import RECORDER

# There the SDK meets a running service; elsewhere stand-ins.
WITH_A_SERVICE = ("tests/e2e/", "tests/cookbook/")


class Plugin:
    def pytest_collection_finish(self) -> None:
        if "tinker" in sys.modules:
            RECORDER.attach()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        yield from watched(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from watched(item.nodeid)


def watched(test: str) -> Iterator[None]:
    RECORDER.seen = {}
    yield
    if RECORDER.seen and test.startswith(WITH_A_SERVICE):
        denied = page.denied(importlib.metadata.version("tinker"), {test: RECORDER.seen})
        assert denied == [], "run `make compatibility`"
