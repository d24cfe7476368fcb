"""Copies between host memory and the device."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")

# What crosses at once. Results of a pass come the same way, and wait for one of these at most: 0.3 ms.
_PART_BYTES = 16 << 20
# Left on the device beside clones: torch would stop it to look for memory.
_NOT_FOR_CLONES = 2 << 30


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`, without waiting for it; on a CPU it shares the array's memory."""
    on_host = torch.from_numpy(array)
    if device.type != "cuda":
        return on_host.to(device)
    # From pinned memory the copy queues up behind the kernels under way; from other memory the host waits.
    return on_host.pin_memory().to(device, non_blocking=True)


class OnTheWay:
    """Tensors on their way to host memory, behind whatever the device has to do before. `wait` (None if they
    are here) waits for them alone, on any thread."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.wait: Callable[[], None] | None = None
        self._tensors = list(tensors)
        if not tensors or not tensors[0].is_cuda:
            return
        self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(self._tensors, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        # Blocking: a thread that spins would take the time of the one that feeds the device.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(tensors[0].device))
        self.wait = event.synchronize

    def arrays(self) -> list[npt.NDArray[np.float32]]:
        if self.wait:
            self.wait()
        return [tensor.numpy() for tensor in self._tensors]


def free_bytes(device: torch.device) -> int:
    """What a CUDA device has left, with what torch holds of it and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def on_host(flat: torch.Tensor) -> npt.NDArray[np.float32]:
    """A copy of a float32 tensor, for which this waits."""
    # numpy asks for memory in large pages: half the time of such a copy is the system finding small ones.
    found = np.empty(flat.shape, np.float32)
    torch.from_numpy(found).copy_(flat.detach())
    return found


class HostCopier:
    """Brings flat float32 tensors to host memory as they are when it is asked, beside what the device goes on
    computing: they are cloned there, which takes a thousandth of a second a gigabyte, and fetched by a thread
    and a stream of their own.

    At most `room_bytes` of clones wait for that: a sixteenth of the device unless given. What has no room
    among them, or on the device, is fetched while the caller waits. A CPU, where nothing else computes, has
    no room at all: the caller copies.
    """

    def __init__(self, device: torch.device, *, room_bytes: int | None = None) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        if room_bytes is None:
            room_bytes = torch.cuda.get_device_properties(device).total_memory // 16 if self._stream else 0
        self._room_bytes = room_bytes
        self._cloned_bytes = 0
        self._counting = threading.Lock()
        self._buffers: list[torch.Tensor] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copies")

    def begin(
        self, named: Mapping[str, torch.Tensor], make: Callable[..., T], *, leave: bool = False
    ) -> "Future[T]":
        """What `make` makes of the copies, by their names. `leave`: nobody writes to the tensors any more, no
        clone is needed. MemoryError, before anything is copied, where the host has no room."""
        if not self._room_bytes:
            copied: Future[T] = Future()
            copied.set_result(make(**{name: on_host(tensor) for name, tensor in named.items()}))
            return copied
        tensors = list(named.values())
        size = sum(tensor.nbytes for tensor in tensors)
        has_room = self._has_room(size, needs_more=not leave)
        found = {name: np.empty(tensor.shape, np.float32) for name, tensor in named.items()}
        if self._stream and not all(tensor.is_cuda for tensor in tensors):
            # What lies in host memory may be being written there by the device.
            torch.cuda.current_stream(self._device).synchronize()
        held = [t.detach() if leave or not has_room else t.detach().clone() for t in tensors]
        with self._counting:
            self._cloned_bytes += size
        moment = self._now()

        def fetch() -> T:
            self._fetch(held, list(found.values()), moment, size)
            return make(**found)

        done = self._thread.submit(fetch)
        if not has_room:
            wait([done])
        return done

    def close(self) -> None:
        self._thread.shutdown()

    def _has_room(self, size: int, *, needs_more: bool) -> bool:
        if self._cloned_bytes + size > self._room_bytes:
            return False
        return not (needs_more and self._stream) or free_bytes(self._device) >= size + _NOT_FOR_CLONES

    def _now(self) -> Any:
        """After what the device has been given until now. None: a CPU is never behind."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _fetch(
        self, held: list[torch.Tensor], found: list[npt.NDArray[np.float32]], moment: Any, size: int
    ) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                if moment is not None:
                    self._stream.wait_event(moment)
                for array in found:  # the memory of each is free for others then
                    self._fetch_one(held.pop(0), torch.from_numpy(array))
        finally:
            held.clear()
            with self._counting:
                self._cloned_bytes -= size

    def _fetch_one(self, flat: torch.Tensor, target: torch.Tensor) -> None:
        """Through two pinned buffers by turns: while one is filled the other is emptied."""
        if not self._buffers:
            sizes = [_PART_BYTES // 4] * 2
            self._buffers = [torch.empty(n, pin_memory=self._stream is not None) for n in sizes]
        step = self._buffers[0].numel()
        filled: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        for number, start in enumerate(range(0, flat.numel(), step)):
            part = flat[start : start + step]
            buffer = self._buffers[number % 2][: part.numel()]
            buffer.copy_(part, non_blocking=True)
            arrived = self._arrival()
            if filled is not None:
                _empty(*filled)
            filled = arrived, buffer, target[start : start + step]
        if filled is not None:
            _empty(*filled)

    def _arrival(self) -> Any:
        if self._stream is None:
            return None
        # Blocking: a thread that spins would take the time of the one that feeds the device.
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event


def _empty(arrived: Any, buffer: torch.Tensor, target: torch.Tensor) -> None:
    if arrived is not None:
        arrived.synchronize()
    target.copy_(buffer)
