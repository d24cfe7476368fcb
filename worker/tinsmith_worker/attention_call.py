"""How transformers' layers call for attention: they are handed that of the stream under way.

Shapes: T packed tokens, H query heads, G key/value heads, C channels of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import library, nn
from transformers import AttentionInterface

from tinsmith.errors import InvalidInput
from tinsmith_worker.lora import Current, owner_of

_NAME = "tinsmith"


def take(model: Any) -> None:
    """Have this transformers model call `_attention`. Its attention modules want a `tinsmith_caller`."""
    AttentionInterface.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)


@dataclass(frozen=True, eq=False)
class Caller:
    """Who calls for attention."""

    current: Current
    layer: int


def _attention(
    module: nn.Module,
    query_1HTC: torch.Tensor,
    key_1GTC: torch.Tensor,
    value_1GTC: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer. Hands over to the attention of the stream under way."""
    config: Any = module.config
    window = others.get("sliding_window")
    if window is not None and window < config.max_position_embeddings:
        raise InvalidInput(
            f"{type(module).__name__} attends through a sliding window, which is not supported"
        )
    if any(others.get(name) is not None for name in ("softcap", "s_aux")):
        raise InvalidInput(f"{type(module).__name__} caps its attention scores or has sinks: not supported")
    called: Any = module
    scale = scaling if scaling is not None else query_1HTC.shape[-1] ** -0.5
    parts = [x.squeeze(0).transpose(0, 1) for x in (query_1HTC, key_1GTC, value_1GTC)]
    if torch.compiler.is_compiling():
        output_THC = _attend(*parts, called.tinsmith_key, scale)
    else:
        output_THC = called.tinsmith_caller.current.now.attention.attend(called.layer_idx, *parts, scale)
    return output_THC.unsqueeze(0), None


@library.custom_op("tinsmith::attend", mutates_args=())
def _attend(
    query_THC: torch.Tensor, key_TGC: torch.Tensor, value_TGC: torch.Tensor, key: torch.Tensor, scale: float
) -> torch.Tensor:
    caller = owner_of(key)
    now = caller.current.now
    output_THC, kept = now.attention.forward(caller.layer, query_THC, key_TGC, value_TGC, scale)
    if now.train:
        now.kept[int(key)] = kept
    return output_THC


@_attend.register_fake
def _(
    query_THC: torch.Tensor, key_TGC: torch.Tensor, value_TGC: torch.Tensor, key: torch.Tensor, scale: float
) -> torch.Tensor:
    return query_THC.new_empty(query_THC.shape)


@library.custom_op("tinsmith::attend_backward", mutates_args=())
def _attend_backward(
    gradient_THC: torch.Tensor,
    query_THC: torch.Tensor,
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    output_THC: torch.Tensor,
    key: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    now = owner_of(key).current.now
    kept = now.kept.pop(int(key))
    found = now.attention.backward(gradient_THC, query_THC, key_TGC, value_TGC, output_THC, kept, scale)
    dq, dk, dv = (x.contiguous() for x in found)
    return dq, dk, dv


@_attend_backward.register_fake
def _(
    gradient_THC: torch.Tensor,
    query_THC: torch.Tensor,
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    output_THC: torch.Tensor,
    key: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (query_THC, key_TGC, value_TGC))
    return dq, dk, dv


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate_attention(ctx: Any, gradient_THC: torch.Tensor) -> tuple[Any, ...]:
    query_THC, key_TGC, value_TGC, key, output_THC = ctx.saved_tensors
    found = _attend_backward(gradient_THC, query_THC, key_TGC, value_TGC, output_THC, key, ctx.scale)
    return *found, None, None


_attend.register_autograd(_differentiate_attention, setup_context=_keep_attention)
