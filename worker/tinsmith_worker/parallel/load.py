"""Reading a base from its safetensors files, each rank its own rows and nothing else."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tinsmith_worker.parallel.group import Group
from tinsmith_worker.parallel.shard import shard
from tinsmith_worker.parallel.zero import Parts

_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"
_EXPERT = re.compile(r"(?P<path>.*\.)experts\.(?P<expert>\d+)\.(?P<map>gate|up|down)_proj\.weight")
_INDEX = "model.safetensors.index.json"


def read_sharded(path: str | Path, group: Group, *, dtype: torch.dtype, offload: bool = False) -> Any:
    """The transformers model in folder or hub id `path`, cut among the ranks; `offload`: as in `shard`. No
    host ever holds more of it than its ranks' parts. ValueError if its files do not name what the model is
    made of."""
    model, folder = _empty(path, dtype)
    give_memory(shard(model, group, offload=offload), group.device, offload=offload)
    _fill(model, folder, lambda _, parameter, part_of: _copy(parameter, part_of))
    return model


def read_zero(
    path: str | Path, group: Group, *, dtype: torch.dtype, offload: bool = False, folder: str = ""
) -> Any:
    """The same cut by DeepSpeed; `offload` and `folder`: as in `Parts`. A host holds a tensor more than its
    ranks' parts. ValueError also without DeepSpeed."""
    model, files = _empty(path, dtype)
    parts = Parts(model, group, offload=offload, folder=folder)
    give_memory_beside(model, parts, group.device)

    def take(name: str, parameter: Any, part_of: Any) -> None:
        if name not in parts:
            _copy(parameter, part_of)
        elif group.leads:
            parts.take(name, part_of[:].to(dtype))
        else:
            parts.take(name, torch.empty(parameter.shape, dtype=dtype))

    _fill(model, files, take)
    return model


def _empty(path: str | Path, dtype: torch.dtype) -> tuple[Any, Path]:
    """A model without memory for its parameters, and the folder of its files."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    model = empty_model(AutoConfig.from_pretrained(folder), dtype=dtype)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, folder


def empty_model(config: Any, *, dtype: torch.dtype) -> Any:
    """A model without memory for its parameters; its buffers, which no file holds, are there."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def give_memory(model: Any, device: torch.device, *, offload: bool = False) -> None:
    """Memory on `device` for what this rank holds of an empty model's parameters, not written to yet; with
    `offload` the parts of layers get theirs in the host's."""
    buffers = {
        (module, name): buffer.to(device, copy=True)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    model.to_empty(device="cpu" if offload else device)
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
    model.tie_weights()


def give_memory_beside(model: Any, parts: Parts, device: torch.device) -> None:
    """Memory on `device` for all of an empty model but those parts, not written to yet."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is not None and f"{path}.{name}" not in parts:
                whole = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
    model.tie_weights()


def _fill(model: Any, folder: Path, take: Callable[[str, Any, Any], None]) -> None:
    """`take` is given every parameter with its name and what reads the rows that are asked for, but for
    experts, of whom each has tensors of its own in the files and a place in a stack in the model."""
    wanted: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    # How many tensors of the files are still to come for each.
    left = {
        id(p): len(p) * (1 + name.endswith(_GATE_UP)) if p.dim() == 3 else 1 for name, p in wanted.items()
    }
    for name, part_of in _tensors(folder):
        if (parameter := wanted.get(name)) is not None:
            take(name, parameter, part_of)
            left[id(parameter)] = 0
        elif found := _EXPERT.fullmatch(name):
            stack = wanted[found["path"] + (_DOWN if found["map"] == "down" else _GATE_UP)]
            _copy_expert(stack, int(found["expert"]), found["map"], part_of)
            left[id(stack)] -= 1
    missing = sorted(name for name, parameter in wanted.items() if left[id(parameter)] > 0)
    if missing:
        raise ValueError(
            f"its safetensors files hold no {missing[0]} ({len(missing)} of {len(wanted)} parameters are "
            "missing): save it anew with save_pretrained of a current transformers"
        )


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor in the files: its name, and what reads the rows that are asked for."""
    names = ["model.safetensors"]
    if (folder / _INDEX).exists():
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    for name in names:
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_slice(key)


@torch.no_grad()
def _copy(parameter: Any, part_of: Any) -> None:
    _check_shape(part_of, parameter)
    ours, start = _own_rows(parameter)
    if len(ours):
        ours.copy_(part_of[start : start + len(ours)])


@torch.no_grad()
def _copy_expert(stack: Any, expert: int, which: str, part_of: Any) -> None:
    """`stack` [E, O, I]; of gate and up, each half of O is one."""
    ours, start = _own_rows(stack)
    if not start <= expert < start + len(ours):
        return
    weight_OI = ours[expert - start]
    if which != "down":
        weight_OI = weight_OI.chunk(2)[which == "up"]
    _check_shape(part_of, weight_OI)
    weight_OI.copy_(part_of[:])


def _own_rows(parameter: Any) -> tuple[torch.Tensor, int]:
    """What this rank has of it, and with which row that begins."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    # As torch.chunk cuts: equal parts but for the last ones, which may be shorter or empty.
    each = -(-parameter.shape[0] // parameter.device_mesh.size())
    return parameter.to_local(), each * parameter.device_mesh.get_local_rank()


def _check_shape(part_of: Any, wanted: Any) -> None:
    shape = tuple(part_of.get_shape())
    if shape != tuple(wanted.shape):
        raise ValueError(f"its files hold a tensor of shape {shape} where the model has {wanted.shape}")
