"""The torch engine and its sampler on one base model, on the GPU when there is one."""

import os
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from tinsmith_worker import tiny_base
from tinsmith_worker.contract import Engine, Sampler
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.null_engine import NullSampler
from tinsmith_worker.sampler import SamplerSettings, TorchSampler

BUILT_IN = "tiny"


def open_engine(
    path: str, *, deterministic: bool, pass_tokens: int, exact_logprobs: bool = False, role: str = "both"
) -> tuple[Engine, Sampler]:
    """`path`: a folder or a hub id; "tiny" is the built-in base, which comes with the package.
    `exact_logprobs`: what is sampled is scored by the engine."""
    transformers_logging.disable_progress_bar()
    if path == BUILT_IN:
        path = str(tiny_base.FOLDER)
    on_gpu = torch.cuda.is_available()
    # Activations come in sizes that differ from pass to pass: of fixed segments, fragments would be left.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    base = Base.load(
        path,
        device=torch.device("cuda" if on_gpu else "cpu"),
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    engine = TorchEngine(base, EngineSettings(max_tokens_per_pass=pass_tokens, deterministic=deterministic))
    if on_gpu and (role != "sample" or exact_logprobs):
        engine.warm_up()
    elif base.can_compile:
        base.compile()
    if role == "train":
        return engine, NullSampler()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    settings = SamplerSettings()
    if on_gpu and role == "sample":
        # Nothing else wants the memory, but for activations of prompts and what steps are recorded with.
        free = torch.cuda.mem_get_info(base.device)[0]
        settings = SamplerSettings(max_sequences=512, cache_bytes=free * 7 // 10, adapter_bytes=free // 10)
    sampler = TorchSampler(base, tokenizer, settings, score=engine.score if exact_logprobs else None)
    sampler.warm_up()
    return engine, sampler
