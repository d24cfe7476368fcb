"""Copies between host memory and the device."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch


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
