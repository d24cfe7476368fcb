"""Layers are compiled around an attention that is one kernel's call, which only a GPU has in half precision: here is
one for every machine and dtype, in plain torch.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
) -> Any:
    def differentiate() -> Any:
        parts = [x.detach().requires_grad_() for x in (query, key, value)]
        return torch.autograd.grad(self._each(*parts, scale), parts, gradient)

    # Within an operator of ours autograd is off, on this thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(differentiate).result()


def _read(self: Any, layer: int, *given: Any) -> tuple[torch.Tensor, tuple[()]]:
    return self.attend(layer, *given), ()
