"""What of the official SDK was driven, and with which outcome. Works in any environment that has an SDK.

A method counts as driven when a script or a test calls it, not when the SDK calls itself. It `works` once its
result was had; otherwise the sentence it was refused with is kept.
"""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

WORKS = "works"
CLASSES = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient", "APIFuture")
# Public by their names, for the SDK's own use by what they do.
INTERNAL = {"holder", "get_telemetry", "create", "on_queue_state_change", "execute"}
# What newer SDKs answer with at once stands for the client it will become.
STANDS_FOR = {
    "BackcompatTrainingClientFuture": "TrainingClient",
    "BackcompatSamplingClientFuture": "SamplingClient",
}
# With this, get_audit_log_async of some versions ends whoever awaits it, before it asks the service anything.
ITS_OWN_FAULT = "called from incorrect event loop"
FETCHES = ("result", "result_async", "future", "coroutine")


def methods() -> list[str]:
    """`Class.method` of everything public in the SDK at hand."""
    return [
        f"{name}.{method}"
        for name in CLASSES
        if (kind := _class(name)) is not None
        for method in sorted(dir(kind))
        if not method.startswith("_") and method not in INTERNAL and callable(getattr(kind, method))
    ]


def commands() -> list[str]:
    """`tinker group command` of everything its command line has."""
    import click
    from tinker.cli.__main__ import main_cli

    def below(group: Any, path: str) -> Iterator[str]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if hasattr(command, "list_commands"):
                yield from below(command, f"{path} {name}")
            else:
                yield f"{path} {name}"

    return list(below(main_cli, "tinker"))


class Recorder:
    def __init__(self) -> None:
        self.seen: dict[str, str] = {}  # since it was last emptied

    def note(self, name: str, outcome: str) -> None:
        if self.seen.get(name) != WORKS:
            self.seen[name] = outcome

    def command(self, words: tuple[str, ...], returncode: int, said: str) -> None:
        """A call of the command line, without its name: options may stand anywhere."""
        line = "tinker " + " ".join(words)
        for name in commands():
            if all(f" {part} " in f" {line} " for part in name.split()):
                self.note(name, WORKS if returncode == 0 else f"refused: {said.strip()[-200:]}")

    def attach(self) -> None:
        """Watch every public method of the SDK, from now on and for good."""
        for name in (*CLASSES, *STANDS_FOR):
            kind = _class(name)
            if kind is None or name == "APIFuture":  # those are watched one by one, as they are given out
                continue
            for method in dir(kind):
                if method.startswith("_") or method in INTERNAL or method in FETCHES:
                    continue
                found = inspect.getattr_static(kind, method)
                shown = f"{STANDS_FOR.get(name, name)}.{method}"
                if isinstance(found, staticmethod | classmethod):
                    setattr(kind, method, type(found)(self._watched(shown, found.__func__)))
                elif callable(found):
                    setattr(kind, method, self._watched(shown, found))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if _called_by_the_sdk():
                return function(*args, **kwargs)
            return self._outcome(name, lambda: function(*args, **kwargs))

        return watched

    def _outcome(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            given = call()
        except Exception as error:
            self.note(name, f"refused: {error}"[:200])
            raise
        if inspect.iscoroutine(given):
            return self._awaited(name, given)
        if hasattr(given, "result"):
            return self._watch_future(name, given)
        self.note(name, WORKS)
        return given

    async def _awaited(self, name: str, given: Any) -> Any:
        try:
            found = await given
        except Exception as error:
            self.note(name, f"refused: {error}"[:200])
            raise
        return self._outcome(name, lambda: found)

    def _watch_future(self, name: str, future: Any) -> Any:
        """`name` has its outcome when somebody has the future's."""
        import tinker

        is_sdks = isinstance(future, tinker.APIFuture)

        def watched(fetch: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if is_sdks and not _called_by_the_sdk():
                    self.note(f"APIFuture.{fetch}", WORKS)
                return self._outcome(name, lambda: function(*args, **kwargs))

            return call

        for fetch in FETCHES:
            if hasattr(future, fetch):
                setattr(future, fetch, watched(fetch, getattr(future, fetch)))
        return future


RECORDER = Recorder()


def _class(name: str) -> Any:
    """None if this version has none. Not all that are given to users are named at the top."""
    import tinker

    if hasattr(tinker, name):
        return getattr(tinker, name)
    module = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    try:
        return getattr(importlib.import_module(f"tinker.lib.public_interfaces.{module}"), name)
    except ModuleNotFoundError:
        return None


def _called_by_the_sdk() -> bool:
    """Whether the function that asks was called from inside the SDK."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.split(".")[0] == "tinker"
