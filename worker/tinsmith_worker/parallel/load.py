"""Reading a base from its safetensors files, each rank its own rows and nothing else."""

import json
from collections.abc import Iterator
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

_INDEX = "model.safetensors.index.json"


def read_sharded(path: str | Path, group: Group, *, dtype: torch.dtype, offload: bool = False) -> Any:
    """The transformers model in folder or hub id `path`, cut among the ranks; `offload`: as in `shard`. No
    host ever holds more of it than its ranks' parts. ValueError if its files do not name what the model is
    made of."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    model = empty_model(AutoConfig.from_pretrained(folder), dtype=dtype)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    give_memory(shard(model, group, offload=offload), group.device, offload=offload)
    _fill(model, folder)
    return model


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


def _fill(model: Any, folder: Path) -> None:
    wanted: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    read: set[int] = set()
    for name, part_of in _tensors(folder):
        if (parameter := wanted.get(name)) is not None:
            _copy(parameter, part_of)
            read.add(id(parameter))
    missing = sorted(name for name, parameter in wanted.items() if id(parameter) not in read)
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
    shape = tuple(part_of.get_shape())
    if shape != tuple(parameter.shape):
        raise ValueError(f"its files hold a tensor of shape {shape} where the model has {parameter.shape}")
    if not isinstance(parameter, DTensor):
        parameter.copy_(part_of[:])
        return
    ours = parameter.to_local()
    # As torch.chunk cuts: equal parts but for the last ones, which may be shorter or empty.
    start = -(-shape[0] // parameter.device_mesh.size()) * parameter.device_mesh.get_local_rank()
    if len(ours):
        ours.copy_(part_of[start : start + len(ours)])
