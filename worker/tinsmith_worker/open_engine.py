"""The torch engine and its sampler on one base model, on the GPU when there is one."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from tinsmith_worker import tiny_base
from tinsmith_worker.contract import Engine, Sampler
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.null_engine import NullSampler
from tinsmith_worker.parallel.engine import GroupEngine
from tinsmith_worker.parallel.group import Group
from tinsmith_worker.parallel.launch import Place
from tinsmith_worker.parallel.load import read_sharded, read_zero
from tinsmith_worker.parallel.shard import ShardedBase
from tinsmith_worker.sampler import SamplerSettings, TorchSampler

BUILT_IN = "tiny"


@dataclass(frozen=True)
class Holding:
    """How a worker holds its base. parallel: whole on every rank ("none"), or each layer cut among them
    ("fsdp2", "deepspeed"); then with `offload` in host memory until it runs, and with `offload_folder` in
    files there, by deepspeed. quantize: "nf4" for layers in four bits."""

    parallel: str = "none"
    offload: bool = False
    offload_folder: str = ""
    quantize: str = ""

    @property
    def is_cut(self) -> bool:
        return self.parallel != "none"

    def check(self) -> None:
        """ValueError for what does not go together."""
        if self.quantize and self.is_cut:
            raise ValueError("a base in four bits cannot be cut: leave out quantize, or take parallel none")
        if self.offload and not self.is_cut:
            raise ValueError("offload is for a base that is cut: it needs parallel fsdp2 (nproc may be 1)")
        if self.offload_folder and self.parallel != "deepspeed":
            raise ValueError("an offload folder needs parallel deepspeed (nproc may be 1)")
        if self.offload_folder and self.offload:
            raise ValueError("offload is to host memory, an offload folder is on a disk: leave out one")


def open_engine(
    path: str,
    *,
    deterministic: bool,
    pass_tokens: int,
    exact_logprobs: bool = False,
    role: str = "both",
    place: Place | None = None,
    holding: Holding = Holding(),
    single_tenant: bool = False,
) -> tuple[Engine, Sampler]:
    """`path`: a folder or a hub id; "tiny" is the built-in base, which comes with the package.
    `exact_logprobs`: what is sampled is scored by the engine. With a `place` as one of a group: this returns
    in the leader, and ends the process of a follower. `single_tenant`: runs train all weights, or by another
    method than LoRA."""
    holding.check()
    if single_tenant and (holding not in (Holding(), Holding("fsdp2")) or exact_logprobs):
        raise ValueError(
            "a single-tenant worker holds its base whole or cut by fsdp2: leave out parallel deepspeed, "
            "offload, quantize and exact_logprobs"
        )
    if exact_logprobs and holding.is_cut:
        raise ValueError("exact logprobs are scored by one process: they need parallel none")
    transformers_logging.disable_progress_bar()
    path = str(tiny_base.FOLDER) if path == BUILT_IN else path
    # Activations come in sizes that differ from pass to pass: of fixed segments, fragments would be left.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    settings = EngineSettings(max_tokens_per_pass=pass_tokens, deterministic=deterministic)
    device = _device(place.local_rank if place else 0)
    group = Group(place, device) if place else None
    if single_tenant:
        return _open_tuned(path, settings, role, device, group, holding)
    base = read_base(path, holding, group, device)
    engine = TorchEngine(base, settings)
    if group is not None:
        engine = GroupEngine(base, group, settings)
        _follow(engine, group)
    on_gpu = device.type == "cuda"
    if on_gpu and (role != "sample" or exact_logprobs):
        engine.warm_up()
    elif base.can_compile:
        base.compile()
    if role == "train":
        return engine, NullSampler()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    sampling = SamplerSettings()
    if on_gpu and role == "sample":
        # Nothing else wants the memory, but for activations of prompts and what steps are recorded with.
        free = torch.cuda.mem_get_info(base.device)[0]
        sampling = SamplerSettings(max_sequences=512, cache_bytes=free * 7 // 10, adapter_bytes=free // 10)
    sampler = TorchSampler(base, tokenizer, sampling, score=engine.score if exact_logprobs else None)
    sampler.warm_up()
    return engine, sampler


def _follow(engine: GroupEngine, group: Group) -> None:
    """Unless this process is the leader, do what that one does, and end."""
    if group.leads:
        return
    engine.follow()
    group.close()
    raise SystemExit


def _open_tuned(
    path: str,
    settings: EngineSettings,
    role: str,
    device: torch.device,
    group: Group | None,
    holding: Holding,
) -> tuple[Engine, Sampler]:
    # PEFT takes a second or two to import, and no other worker needs it.
    from tinsmith_worker.tuning.base import TunedBase
    from tinsmith_worker.tuning.engine import TunedEngine, TunedSampler
    from tinsmith_worker.tuning.group import ShardedTunedEngine, ShardedTunedSampler, TunedGroupEngine
    from tinsmith_worker.tuning.shards import ShardedTunedBase

    engine: TunedEngine
    if holding.is_cut and group is not None:
        cut = ShardedTunedBase(read_sharded(path, group, dtype=_dtype(device)), group, tokenizer=path)
        engine = ShardedTunedEngine(cut, group, settings)
    else:
        base = TunedBase.load(path, device=device, dtype=_dtype(device))
        engine = TunedGroupEngine(base, group, settings) if group else TunedEngine(base, settings)
    engine.base.pass_tokens = settings.max_tokens_per_pass
    if group is not None:
        assert isinstance(engine, GroupEngine)
        _follow(engine, group)
    engine.warm_up()
    if role == "train":
        return engine, NullSampler()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    if isinstance(engine, ShardedTunedEngine):
        # They lie in host memory, and none ever leaves the model's.
        sampling = SamplerSettings(adapter_bytes=1 << 62)
        return engine, ShardedTunedSampler(engine.base, tokenizer, sampling)
    return engine, TunedSampler(engine.base, tokenizer)


def _device(number: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= (there := torch.cuda.device_count()):
        raise ValueError(f"a process for every GPU, and no more: this machine has {there} of them")
    return torch.device("cuda", number)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def read_base(path: str, holding: Holding, group: Group | None, device: torch.device) -> Base:
    """All ranks of a group, if there is one, call this together."""
    dtype = _dtype(device)
    if holding.parallel == "fsdp2" and group is not None:
        model = read_sharded(path, group, dtype=dtype, offload=holding.offload)
        return ShardedBase(model, group, tokenizer=path)
    if holding.parallel == "deepspeed" and group is not None:
        model = read_zero(path, group, dtype=dtype, offload=holding.offload, folder=holding.offload_folder)
        return ShardedBase(model, group, tokenizer=path)
    return Base.load(path, device=device, dtype=dtype, four_bit=holding.quantize == "nf4")
