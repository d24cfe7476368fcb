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
from tinsmith_worker.sampler import TorchSampler

BUILT_IN = "tiny"


def open_engine(path: str, *, deterministic: bool, pass_tokens: int) -> tuple[Engine, Sampler]:
    """`path`: a folder or a hub id; "tiny" is the built-in base, which comes with the package."""
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
    if on_gpu:
        engine.warm_up()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    return engine, TorchSampler(base, tokenizer)
