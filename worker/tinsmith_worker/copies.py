"""Copies from host memory to the device that do not make the host wait."""

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; on a CPU it shares the array's memory."""
    on_host = torch.from_numpy(array)
    if device.type != "cuda":
        return on_host.to(device)
    # From pinned memory the copy queues up behind the kernels under way; from other memory the host waits.
    return on_host.pin_memory().to(device, non_blocking=True)
