"""docs/compatibility.md says what tests show, and nothing of the newest SDK is left out."""

import importlib.metadata

import pytest

from tests.compatibility import page
from tests.compatibility.plugin import watched
from tests.compatibility.recorder import RECORDER, WORKS, Recorder, commands, methods
from tests.versions.environments import ROOT, VERSIONS

NEWEST = importlib.metadata.version("tinker")


def test_the_page_is_what_the_record_says() -> None:
    assert page.PAGE.read_text() == page.render(page.load()), "run `make compatibility`"


def test_every_method_and_command_of_every_version_is_driven() -> None:
    record = page.load()
    assert sorted(record) == sorted(VERSIONS)
    assert sorted(record[NEWEST]) == sorted([*methods(), *commands()])
    missing = {
        f"{version}: {name}"
        for version, its in record.items()
        for name, entry in its.items()
        if entry["state"] == page.NOT_DRIVEN and name not in page.OUT_OF_REACH
    }
    assert missing == set()


def test_every_test_that_the_record_names_exists() -> None:
    named = {entry["by"] for its in page.load().values() for entry in its.values() if "by" in entry}
    missing = []
    for test in named:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        if f"def {name.split('::')[-1]}" not in text and name:
            missing.append(test)
    assert missing == []


def test_a_test_for_which_something_works_that_the_page_denies_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {NEWEST: {"A.b": {"state": "refused: x"}, "A.c": {"state": WORKS}}}
    monkeypatch.setattr(page, "load", lambda: record)
    monkeypatch.setattr(RECORDER, "seen", {})

    def run(test: str, **seen: str) -> None:
        watching = watched(test)
        next(watching)
        RECORDER.seen = {f"A.{name}": outcome for name, outcome in seen.items()}
        with pytest.raises(StopIteration):
            next(watching)

    run("tests/e2e/test_x.py::test", b="refused: x", c=WORKS)
    run("tests/client/test_x.py::test", b=WORKS)  # of a stand-in
    with pytest.raises(AssertionError, match="make compatibility"):
        run("tests/e2e/test_x.py::test", b=WORKS)


def test_a_method_works_when_its_result_was_had_and_is_refused_when_it_was_not() -> None:
    recorder = Recorder()

    class Future:
        def __init__(self, outcome: Exception | int) -> None:
            self.outcome = outcome

        def result(self) -> int:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

    class Client:
        def give(self, outcome: Exception | int) -> Future:
            return Future(outcome)

    give = recorder._watched("Client.give", Client.give)
    future = give(Client(), ValueError("no such thing"))
    assert recorder.seen == {}
    with pytest.raises(ValueError, match="no such thing"):
        future.result()
    assert recorder.seen == {"Client.give": "refused: no such thing"}
    assert give(Client(), 3).result() == 3
    assert recorder.seen == {"Client.give": WORKS}
    with pytest.raises(ValueError, match="no such thing"):
        give(Client(), ValueError("no such thing")).result()
    assert recorder.seen == {"Client.give": WORKS}


def test_a_command_is_known_by_its_words() -> None:
    recorder = Recorder()
    recorder.command(("-f", "json", "run", "list", "--limit", "0"), 0, "")
    recorder.command(("checkpoint", "info", "tinker://a/weights/b"), 1, "Error: no such checkpoint\n")
    assert recorder.seen == {
        "tinker run list": WORKS,
        "tinker checkpoint info": "refused: Error: no such checkpoint",
    }


def test_a_record_that_a_run_contradicts_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"1.0": {"A.b": {"state": WORKS, "by": "t.py::test"}, "A.c": {"state": page.NOT_DRIVEN}}}
    monkeypatch.setattr(page, "load", lambda: record)
    has = ["A.b", "A.c"]
    assert page.stale("1.0", has, {"t.py::test": {"A.b": WORKS}, "other": {"A.b": "refused: x"}}) == []
    assert page.stale("1.0", has, {"other": {"A.b": WORKS}}) == []
    assert page.stale("1.0", has, {"t.py::test": {}}) == ["A.b: t.py::test does not show that it works"]
    assert page.stale("1.0", has, {"other": {"A.c": WORKS}}) == ["A.c: works in other"]
    assert page.stale("1.0", [*has, "A.d"], {}) == ["A.d: the SDK has it"]
