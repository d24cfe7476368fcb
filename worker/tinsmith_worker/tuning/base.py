"""The model of a single-tenant worker: its own weights are trained, or a PEFT method's, one run's at a time.

Shapes: T packed tokens, N rows, D hidden, V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tinsmith.errors import InvalidInput
from tinsmith_worker import attention_call
from tinsmith_worker.activations import Activations
from tinsmith_worker.adapters import Adapter, Kind
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.contract import LoraSpec
from tinsmith_worker.experts import is_mixture
from tinsmith_worker.head import Head
from tinsmith_worker.lora import Deltas, accumulate
from tinsmith_worker.model import Base, Layer
from tinsmith_worker.stream import Segment, Stream
from tinsmith_worker.tuning.methods import Wrapped
from tinsmith_worker.tuning.weights import Form, Tuned

# Every run's is its own if its seed is; one is small, and made anew in a moment.
_FORMS_KEPT = 16
_LEARNED_ROWS = 256


class TunedBase(Base):
    """A Base whose modules are transformers' own. Before a pass its parameters become those of the run, or
    the sampler, that the pass is for: pointers are exchanged, nothing is copied. All rows are one's.

    `reserve_bytes` of a GPU are left for passes: a chunk of the head's logits with its gradients, and layers'
    activations, which are computed anew where there is little room."""

    reserve_bytes = 12 << 30

    def _take_over(self, model: Any, architecture: str, tokenizer: str) -> None:
        layers = self._look_at(model, architecture, tokenizer)
        if any(map(is_mixture, model.modules())):
            raise InvalidInput(
                f"{architecture} cannot be served by a single-tenant worker: it is a mixture of experts"
            )
        expected = self._probe_alone(architecture)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                self._let_call(module)
        self.sites = ()
        self.kernels = self.can_compile = False
        self.facts = replace(self.facts, single_tenant=True)
        output = model.get_output_embeddings()
        self.head = _Head(0, output.weight, output.bias)
        self._all: tuple[nn.Parameter, ...] = tuple(model.parameters())
        self._whole = _whole(model)
        self._forms: dict[str, Form] = {}
        # What the model is made into: None is the base as it came.
        self._form: Form | None = None
        self._wrapped: Wrapped | None = None
        self._parameters: tuple[nn.Parameter, ...] = ()
        self._hooks: list[Any] = []
        self._active: Tuned | None = None
        self._kept_by: dict[str, Activations] = {}  # by method and settings
        attention_call.take(model)
        self._check_packed(expected, architecture, None)
        self._plain_layers = [layer for _, layer in layers]
        self._layers = [Layer(layer, n, self._current) for n, layer in enumerate(self._plain_layers)]

    def forward(
        self, stream: Stream, acting: dict[Kind, Deltas] | None = None, *, only_forward: bool = False
    ) -> torch.Tensor:
        adapters = {id(segment.adapter): segment.adapter for segment in stream.segments}
        assert len(adapters) == 1, "a pass of a single-tenant worker is one run's"
        (adapter,) = adapters.values()
        assert adapter is None or isinstance(adapter, Tuned)
        self._become(adapter)
        if adapter is not None and torch.is_grad_enabled():
            self._look_up_activations(adapter)
        return super().forward(stream, only_forward=only_forward)

    def _look_up_activations(self, adapter: Tuned) -> None:
        kind = f"{adapter.spec.method} {adapter.spec.settings}"
        if (known := self._kept_by.get(kind)) is None:
            known = self.activations = self._kept_by[kind] = Activations(self.activations.layers)
            self._learn(adapter)
        self.activations = known

    def _learn(self, adapter: Tuned) -> None:
        """How much the layers keep of a token, by a pass too small to be in the way: else the first one would
        keep all of it, whether there is room or not. Methods differ in it manifold."""
        rows = min(_LEARNED_ROWS, self.facts.max_context_length)
        rows_T = torch.arange(rows, device=self.device)
        attention = CausalSequences(np.array([rows]), is_deterministic=self.is_deterministic)
        segment = Segment(0, rows, adapter)
        Base.forward(self, Stream(torch.zeros_like(rows_T), rows_T, (segment,), attention))

    def _deltas(self, segments: Sequence[Segment], rows: int, *, train: bool) -> dict[Kind, Deltas]:
        return {}

    def blank_adapter(
        self, spec: LoraSpec, *, device: torch.device | None = None, frozen: torch.Tensor | None = None
    ) -> Tuned:
        reserve = self.reserve_bytes
        return Tuned(self.form_of(spec), device or self.device, frozen, reserve_bytes=reserve)

    def form_of(self, spec: LoraSpec) -> Form:
        """InvalidInput if there is no such method, or none with these settings on this model."""
        if spec.method == "full":
            return self._whole
        key = json.dumps(vars(spec), sort_keys=True)
        if key not in self._forms:
            self._become(None)
            wrapped = self._wrap(spec)
            wrapped.unwrap()
            self._forms[key] = wrapped.form
            for old in list(self._forms)[:-_FORMS_KEPT]:
                del self._forms[old]
        return self._forms[key]

    def _wrap(self, spec: LoraSpec) -> Wrapped:
        return Wrapped(self._model, spec, self._plain_layers)

    def release(self, adapter: Adapter | None) -> None:
        """Hold nothing of it any more."""
        if adapter is not None and adapter is self._active:
            self._become(None)

    def _become(self, adapter: Tuned | None) -> None:
        if adapter is self._active:
            return
        form = adapter.form if adapter else None
        if form is not self._form:
            self._leave_form()
            self._enter_form(form)
        if adapter is not None:
            views = adapter.tensors_of(adapter.compute)
            for parameter, view in zip(self._parameters, views, strict=True):
                parameter.data = view
        self._active = adapter

    def _enter_form(self, form: Form | None) -> None:
        if form is self._whole:
            self._parameters = self._all
        elif form is not None:
            self._wrapped = self._wrap(form.spec)
            self._parameters = self._wrapped.parameters
        for number, parameter in enumerate(self._parameters):
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take_gradient(number)))
        self._form = form

    def _leave_form(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._form is self._whole:
            for parameter, initial in zip(self._all, self._whole.initial, strict=True):
                parameter.requires_grad_(False)
                parameter.data = initial
        elif self._wrapped is not None:
            self._wrapped.unwrap()
        self._form, self._wrapped, self._parameters, self._hooks = None, None, (), []

    def _take_gradient(self, number: int) -> Callable[[torch.Tensor], None]:
        """What autograd calls when the gradient of a pass is complete: it is added to the float32 sum."""

        def take(parameter: torch.Tensor) -> None:
            assert self._active is not None
            assert parameter.grad is not None
            self._active.gradients[number].add_(parameter.grad)
            parameter.grad = None

        return take


class _Head(Head):
    """The output embedding, whose own gradient counts if it is trained."""

    def _backward_adapter(
        self,
        adapter: Adapter | None,
        dlogits_NV: torch.Tensor,
        shrunk_NR: torch.Tensor | None,
        hidden_ND: torch.Tensor,
        gradient_ND: torch.Tensor,
    ) -> None:
        assert isinstance(adapter, Tuned)
        weight, bias = adapter.form.unembedding
        if weight >= 0:
            accumulate(adapter.gradients[weight], dlogits_NV.T, hidden_ND)
        if bias >= 0:
            adapter.gradients[bias].add_(dlogits_NV.sum(0))


def _whole(model: Any) -> Form:
    """All parameters of a transformers model; one that stands in two places is there once."""
    named: dict[str, nn.Parameter] = dict(model.named_parameters())
    output = model.get_output_embeddings()
    parameters = tuple(named.values())
    at = {id(parameter): number for number, parameter in enumerate(parameters)}
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    return Form(
        LoraSpec(0, 0, method="full"),
        tuple(named),
        tuple(parameter.data for parameter in parameters),
        model.config.__class__.from_dict(config).to_json_string(),
        (at[id(output.weight)], -1 if output.bias is None else at[id(output.bias)]),
    )
