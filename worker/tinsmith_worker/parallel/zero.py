"""A base of which every rank holds a part of every layer in DeepSpeed's keeping (ZeRO-3): on the GPUs, in
the hosts' memory, or on disks.

DeepSpeed cuts the weights, keeps the parts and brings them together again. By itself it does so when a
module's own `forward` is called, and those of the linear maps never are: here it is told layer by layer.
Embeddings, norms and biases are whole on every rank.
"""

import collections
import contextlib
import fcntl
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinsmith.errors import InvalidInput
from tinsmith_worker.experts import is_mixture
from tinsmith_worker.model import decoder_layers
from tinsmith_worker.parallel.group import Group

# How many layers' weights may be there in full: of the one that runs, and of the one that comes next.
_LAYERS_AT_ONCE = 2


class Parts:
    """The weights of the linear maps in a model's layers, by name. All ranks make it together."""

    def __init__(self, model: Any, group: Group, *, offload: bool = False, folder: str = "") -> None:
        """`model` has no memory for these weights yet: `take` brings them. `offload`: their parts are kept in
        the hosts' memory; with `folder` in files there, on a disk of every machine. ValueError without
        DeepSpeed, or without what it reads disks with; InvalidInput for a mixture of experts."""
        if any(map(is_mixture, model.modules())):
            raise InvalidInput(
                f"{type(model).__name__} cannot be cut by deepspeed: it is a mixture of experts, which are "
                "no linear maps; take parallel fsdp2"
            )
        names = {module: name for name, module in model.named_modules()}
        layers = decoder_layers(model.base_model, model.config.get_text_config())
        linears = [[m for m in layer.modules() if isinstance(m, nn.Linear)] for _, layer in layers]
        self._linears = {f"{names[linear]}.weight": linear for of_layer in linears for linear in of_layer}
        self._device = group.device
        self._deepspeed = _deepspeed(group)
        self._settings = _settings(model.dtype, "nvme" if folder else "cpu" if offload else "none")
        if folder:
            load_disk_access()
            largest = max(linear.weight.numel() for linear in self._linears.values())
            of_zero = self._settings["zero_optimization"]
            of_zero["offload_param"] |= {
                "nvme_path": own_place(folder, group.rank),
                "buffer_size": -(-largest // group.ranks),
                "buffer_count": _LAYERS_AT_ONCE * max(map(len, linears)),
            }
        self._disk: Any = None
        gathering = _Gathering(linears, group.device)
        for number, (_, layer) in enumerate(layers):
            gathering.follow(layer, number)

    def __contains__(self, name: str) -> bool:
        return name in self._linears

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def take(self, name: str, weight_OI: torch.Tensor) -> None:
        """Cut a weight among the ranks. All call this with the same name; the leader's weight counts."""
        linear = self._linears[name]
        linear.weight = nn.Parameter(weight_OI.to(self._device), requires_grad=False)
        keeper = self._deepspeed.zero.Init(
            module=nn.ParameterList([linear.weight]),
            config_dict_or_path=self._settings,
            param_swapper=self._disk,
        )
        self._disk = keeper.param_swapper


class _Gathering:
    """Has a layer's weights brought together before it runs, forward or backward, and forgotten after it.

    On a GPU that is done on a stream of its own: it begins while the layer before still computes.
    """

    def __init__(self, linears: Sequence[Sequence[nn.Linear]], device: torch.device) -> None:
        self._linears = linears
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ends: collections.deque[Any] = collections.deque()  # of layers that may be computing still

    def follow(self, layer: nn.Module, number: int) -> None:
        forget = functools.partial(self._forget, number)
        layer.register_forward_pre_hook(functools.partial(self._gather, number, number + 1))
        layer.register_forward_hook(forget)
        layer.register_full_backward_pre_hook(functools.partial(self._gather, number, number - 1))
        layer.register_full_backward_hook(forget)

    def _gather(self, number: int, next_number: int, *_: Any) -> None:
        # Asked for well ahead of the GPU, all layers would be there in full.
        while len(self._ends) >= _LAYERS_AT_ONCE:
            self._ends.popleft().synchronize()
        weights = self._weights(number)
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            weights[0].all_gather_coalesced(weights).wait()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if 0 <= next_number < len(self._linears):
            self._read_ahead(self._weights(next_number))

    def _read_ahead(self, weights: list[Any]) -> None:
        """Begin to read what is on a disk."""
        on_disk = [weight for weight in weights if weight.ds_tensor.status.name == "NOT_AVAILABLE"]
        if not on_disk:
            return
        if self._stream is not None:
            # When this layer is forgotten its buffers are read into again: they must have been copied from.
            self._stream.synchronize()
        on_disk[0].nvme_swapper.swap_in(on_disk, async_op=True)

    def _forget(self, number: int, *_: Any) -> None:
        weights = self._weights(number)
        weights[0].partition(weights)
        if self._stream is not None:
            self._ends.append(torch.cuda.current_stream().record_event())

    def _weights(self, number: int) -> list[Any]:
        return [linear.weight for linear in self._linears[number]]


def _deepspeed(group: Group) -> Any:
    """The library, told of the group."""
    os.environ.setdefault("DS_ACCELERATOR", group.device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("parallel deepspeed needs DeepSpeed: pip install 'tinsmith[deepspeed]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An operator for CPUs that it would compile, for minutes, to no use here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(group.device.index or 0)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed


def _settings(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # it means nothing here, and must be given
        "bf16": {"enabled": dtype == torch.bfloat16},
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 4},
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # or it replaces torch.nn.functional.linear, for everybody
            "offload_param": {"device": device, "pin_memory": torch.cuda.is_available()},
        },
    }


def load_disk_access() -> None:
    """What DeepSpeed reads disks with, compiled once on a machine. ValueError where it cannot be."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    class DiskAccess(AsyncIOBuilder):
        def cxx_args(self) -> list[str]:
            # What debuggers would be told is a third of the work, for each of a dozen files.
            return [*super().cxx_args(), "-g0"]

    builder = DiskAccess()
    if not builder.is_compatible():
        raise ValueError(
            "to keep a base on disks DeepSpeed needs libaio's headers and a C++ compiler "
            "(Debian, Ubuntu: apt install libaio-dev g++)"
        )
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    # Of Tinsmith alone, so that a lock in it is somebody's who holds it too, or of one that was killed.
    place = cache / f"tinsmith-{sys.implementation.cache_tag}-torch{torch.__version__}"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "compiling", "w") as compiling, _environment(TORCH_EXTENSIONS_DIR=str(place)):
        fcntl.flock(compiling, fcntl.LOCK_EX)
        for left in place.rglob("lock"):
            left.unlink()  # PyTorch would wait for it for ever
        builder.load()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def own_place(folder: str | Path, rank: int) -> str:
    """A place in `folder` that is this process's until it ends: DeepSpeed clears it at its start, of what a
    killed one left, too. ValueError if another one has it."""
    place = Path(folder) / f"rank{rank}"
    place.mkdir(parents=True, exist_ok=True)
    held = os.open(place / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{place} is another worker's: give each an offload folder of its own") from error
    return str(place)
