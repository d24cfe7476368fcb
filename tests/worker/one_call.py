"""Layers are compiled around an attention that is one kernel's call, which only a GPU has in half precision: here is
one for every machine and dtype, in plain torch.

Shapes: L tokens of a sequence, H query heads, G key/value heads, C channels of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.sampler.cache import Prefill


@contextmanager
def attention_in_one_call() -> Iterator[None]:
    kernels: Any = CausalSequences.forward, CausalSequences.backward, Prefill.forward
    ours: Any = _forward, _backward, _read
    try:
        CausalSequences.forward, CausalSequences.backward, Prefill.forward = ours  # type: ignore[method-assign]
        yield
    finally:
        CausalSequences.forward, CausalSequences.backward, Prefill.forward = kernels  # type: ignore[method-assign]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """And with no compiler, which takes half a minute, behind the programs that are made of layers."""
    compiled: Any = torch.compile

    def compile(function: Any, dynamic: bool, backend: Any = "") -> Any:
        return compiled(function, dynamic=dynamic, backend="aot_eager")

    torch._dynamo.reset()
    try:
        torch.compile = compile  # type: ignore[assignment]
        with attention_in_one_call():
            yield
    finally:
        torch.compile = compiled


def _forward(self: Any, layer: int, *given: Any) -> tuple[torch.Tensor, tuple[()]]:
    return self._each(*given), ()


def _backward(
    self: Any, gradient: Any, query: Any, key: Any, value: Any, output: Any, kept: Any, scale: float
) -> tuple[torch.Tensor, ...]:
    """By hand: on a GPU the thread that autograd works on is the one that waits for this."""
    found = tuple(map(torch.zeros_like, (query, key, value)))
    start = 0
    for length in self._lengths:
        rows = slice(start, start + length)
        of_one = _differentiate(gradient[rows], query[rows], key[rows], value[rows], scale)
        for into, part in zip(found, of_one, strict=True):
            into[rows] = part
        start = rows.stop
    return found


def _differentiate(
    gradient_LHC: torch.Tensor,
    query_LHC: torch.Tensor,
    key_LGC: torch.Tensor,
    value_LGC: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """dL/dquery, dL/dkey, dL/dvalue of one sequence."""
    groups, repeats = key_LGC.shape[1], query_LHC.shape[1] // key_LGC.shape[1]
    key_LHC, value_LHC = (x.repeat_interleave(repeats, 1) for x in (key_LGC, value_LGC))
    d_HLC, q_HLC, k_HLC, v_HLC = (
        x.transpose(0, 1).float() for x in (gradient_LHC, query_LHC, key_LHC, value_LHC)
    )
    later_LL = torch.ones(len(query_LHC), len(query_LHC), dtype=torch.bool, device=d_HLC.device).triu(1)
    p_HLL = (scale * q_HLC @ k_HLC.mT).masked_fill(later_LL, -torch.inf).softmax(-1)
    dp_HLL = d_HLC @ v_HLC.mT
    ds_HLL = scale * p_HLL * (dp_HLL - (dp_HLL * p_HLL).sum(-1, keepdim=True))
    of_queries, of_keys, of_values = ds_HLL @ k_HLC, ds_HLL.mT @ q_HLC, p_HLL.mT @ d_HLC
    shared = [x.unflatten(0, (groups, repeats)).sum(1) for x in (of_keys, of_values)]
    return [x.transpose(0, 1) for x in (of_queries, *shared)]


def _read(self: Any, layer: int, *given: Any) -> tuple[torch.Tensor, tuple[()]]:
    return self.attend(layer, *given), ()
