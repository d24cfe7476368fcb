"""Copies between host memory and the device."""

from collections.abc import Sequence

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


def to_host(tensors: Sequence[torch.Tensor]) -> list[npt.NDArray[np.float32]]:
    """All of them, waiting for the device once."""
    if not tensors or not tensors[0].is_cuda:
        return [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]
