"""A base whose layers are kept in four bits: NF4 with double quantization (Dettmers et al. 2023, "QLoRA"), by
bitsandbytes. Embeddings and norms stay as they are.

A product multiplies with the weights made whole again, in the dtype of the rest, and forgets them: one
reading and one writing of the layer more for each product, little beside a pass of thousands of tokens.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def read_four_bit(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model in folder or hub id `path`, its layers cut to four bits as they are read: they
    are never all there in full. ValueError without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "a base in four bits needs bitsandbytes: pip install 'tinsmith[four-bit]'"
        ) from error
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map={"": device}, quantization_config=settings
    )
    for module in model.modules():
        if is_four_bit(module):
            # At its first call on some CPUs the library would rearrange the weights for a kernel of its own.
            module.support_avx512bf16_for_cpu = False
    return model


def is_four_bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")


def whole_weight(linear: nn.Linear) -> torch.Tensor:
    """[O, I], in the dtype the model computes in."""
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
