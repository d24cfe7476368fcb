"""States that no process holds as a whole: written and read tensor by tensor. No torch.

Their files are those of a run that trains all weights (`checkpoints`), byte by byte what one process writes
that holds everything.
"""

import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import Float32
from tinsmith_worker import checkpoints
from tinsmith_worker.checkpoints import Body
from tinsmith_worker.contract import AdapterState

log = logging.getLogger("tinsmith.worker")

FLATS = ("weights", "moment1", "moment2", "gradient")
Pieces = Callable[[], Iterator[Body]]
# (which flat array, the number of the tensor in it, its values)
Tensors = Iterator[tuple[str, int, Float32]]

_MAX_HEADER = 1 << 26
_PATIENCE_SECONDS = 120.0


class Store(Protocol):
    """What is read of an object store (`tinsmith_api.journal.objects`, which an engine must not know)."""

    def entries(self, prefix: str) -> Mapping[str, Any]: ...
    def stream(self, prefix: str, name: str) -> tuple[int, Iterator[bytes]]: ...


@dataclass(frozen=True, kw_only=True)
class Held(AdapterState):
    """A state whose arrays are one process's rows, while `handle` lives. `size`: of a whole flat array.
    `tensor`: all of a tensor, by its flat array and its number in `tensors`; called on any thread."""

    size: int
    tensor: Callable[[str, int], Float32]
    handle: Any


@dataclass(frozen=True, kw_only=True)
class Stored(AdapterState):
    """A state that is in files only. Its arrays are empty; None where the files have none. `read` may be
    called often."""

    read: Callable[[], Tensors]


def tensors_of(state: AdapterState, flats: list[str]) -> Tensors:
    """Those of these arrays, of a state in files or a whole one; from the start again after an OSError."""
    if isinstance(state, Stored):
        yield from (found for found in _patiently(state.read) if found[0] in flats)
        return
    for flat in flats:
        for number, (_, offset, shape) in enumerate(state.tensors):
            yield flat, number, getattr(state, flat)[offset : offset + math.prod(shape)].reshape(shape)


def write(state: Held) -> dict[str, Pieces]:
    """What `checkpoints.write` makes of the whole, each file piece by piece."""
    files = export(state) | {checkpoints.SPEC: _one(checkpoints.spec_file(state, state.size))}
    flats = [flat for flat in FLATS[1:] if getattr(state, flat) is not None]
    if flats or state.step:
        tensors: dict[str, Any] = {"step": np.array([state.step], np.int64)}
        tensors |= {flat: _Later((state.size,), functools.partial(_flat, state, flat)) for flat in flats}
        files[checkpoints.OPTIMIZER] = _safetensors(tensors)
    return files


def export(state: Held) -> dict[str, Pieces]:
    """What `checkpoints.export` makes of the whole."""
    weights = {
        name: _Later(shape, functools.partial(_tensor, state, number))
        for number, (name, _, shape) in enumerate(state.tensors)
    }
    files = checkpoints.in_files(weights, checkpoints.FILE_BYTES, _safetensors, _one)
    return {checkpoints.MODEL_CONFIG: _one(state.config.encode()), **files}


def _tensor(state: Held, number: int) -> Iterator[Float32]:
    yield state.tensor("weights", number)


def _flat(state: Held, flat: str) -> Iterator[Float32]:
    """All of an array, with the zeros between its tensors."""
    end = 0
    for number, (_, offset, shape) in enumerate(state.tensors):
        yield np.zeros(offset - end, np.float32)
        yield state.tensor(flat, number)
        end = offset + math.prod(shape)
    yield np.zeros(state.size - end, np.float32)


@dataclass(frozen=True)
class _Later:
    """An array of float32 that is there when it is needed, part by part."""

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Float32]]
    dtype = np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


def _safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Pieces:
    def pieces() -> Iterator[Body]:
        yield checkpoints.header(tensors, metadata)
        for values in tensors.values():
            for part in values.parts() if isinstance(values, _Later) else [values]:
                yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data

    return pieces


def _one(body: bytes) -> Pieces:
    return lambda: iter([body])


# -- reading -----------------------------------------------------------------------------------------------


def open_stored(store: Store, prefix: str) -> Stored:
    """What lies under `prefix`, read once to its end, so that nothing is begun with what is damaged:
    InvalidInput."""
    entries = store.entries(prefix)
    body = b"".join(store.stream(prefix, checkpoints.SPEC)[1]) if checkpoints.SPEC in entries else b"{}"
    spec, tensors, size = checkpoints.read_spec(body)

    def read() -> Tensors:
        return _read(store, prefix, entries, tensors, size)

    found: dict[str, set[int]] = {}
    step = 0
    for flat, number, values in read():
        step = int(values[0]) if flat == "step" else step
        found.setdefault(flat, set()).add(number)
    for flat in {*found, "weights"} - {"step"}:
        is_whole = len(found.get(flat, ())) == len(tensors)
        checkpoints.expect(is_whole, f"its files do not hold all of its {flat}")
    checkpoints.expect(step >= 0, f"its step is {step}")
    weights, moment1, moment2, gradient = (
        np.empty(0, np.float32) if flat in found else None for flat in FLATS
    )
    assert weights is not None
    return Stored(spec, tensors, weights, moment1, moment2, gradient, step, read=read)


def _read(
    store: Store,
    prefix: str,
    entries: Mapping[str, Any],
    tensors: tuple[tuple[str, int, tuple[int, ...]], ...],
    size: int,
) -> Tensors:
    numbers = {name: number for number, (name, _, _) in enumerate(tensors)}
    for file in sorted(name for name in entries if name.endswith(".safetensors")):
        reader = _Reader(store.stream(prefix, file)[1], file)
        described = reader.header()
        for name, (dtype, shape) in described.items():
            if file != checkpoints.OPTIMIZER:
                number = numbers.get(name, -1)
                checkpoints.expect(
                    number >= 0 and (dtype, shape) == ("F32", tensors[number][2]),
                    f"{name} is not what {checkpoints.SPEC} says",
                )
                yield "weights", number, reader.floats(shape)
            elif name == "step":
                checkpoints.expect((dtype, shape) == ("I64", (1,)), "its step is no integer")
                yield "step", 0, reader.bytes(8).view(np.int64)
            else:
                is_one = name in FLATS[1:] and (dtype, shape) == ("F32", (size,))
                checkpoints.expect(is_one, f"{name} is not float32 {size}")
                end = 0
                for number, (_, offset, shape) in enumerate(tensors):
                    reader.floats((offset - end,))
                    yield name, number, reader.floats(shape)
                    end = offset + math.prod(shape)
                reader.floats((size - end,))
        reader.finish(entries[file].sha256)


class _Reader:
    """A safetensors file from its beginning to its end."""

    def __init__(self, pieces: Iterator[bytes], name: str) -> None:
        self._pieces, self._name = pieces, name
        self._left = memoryview(b"")
        self._sum = hashlib.sha256()

    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each tensor by name, in the order of their values."""
        length = int(self.bytes(8).view("<u8")[0])
        checkpoints.expect(length <= _MAX_HEADER, f"{self._name} has a header of {length} bytes")
        try:
            given = json.loads(self.bytes(length).tobytes())
            given.pop("__metadata__", None)
            ordered = sorted(given.items(), key=lambda one: one[1]["data_offsets"])
            return {name: (about["dtype"], tuple(about["shape"])) for name, about in ordered}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"this is no adapter checkpoint: {self._name}: {error}") from None

    def floats(self, shape: tuple[int, ...]) -> Float32:
        return self.bytes(4 * math.prod(shape)).view(np.float32).reshape(shape)

    def bytes(self, count: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        found = np.empty(count, np.uint8)
        filled = 0
        while filled < count:
            if not self._left:
                self._next()
            part = self._left[: count - filled]
            found[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            self._left = self._left[len(part) :]
            filled += len(part)
        return found

    def finish(self, sha256: str) -> None:
        is_over = not self._left and next(self._pieces, None) is None
        if not is_over or self._sum.hexdigest() != sha256:
            raise InvalidInput(
                f"the checkpoint's files are gone or damaged: {self._name} does not match its checksum"
            )

    def _next(self) -> None:
        piece = next(self._pieces, None)
        checkpoints.expect(piece is not None, f"{self._name} ends too early")
        self._sum.update(piece or b"")
        self._left = memoryview(piece or b"")


def _patiently(read: Callable[[], Tensors]) -> Tensors:
    """From the start again while the store does not answer."""
    until, pause = time.monotonic() + _PATIENCE_SECONDS, 0.1
    while True:
        try:
            yield from read()
            return
        except OSError as error:
            if time.monotonic() + pause > until:
                raise
            log.warning("%s; reading it again", error)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
