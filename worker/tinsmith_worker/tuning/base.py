"""The model of a single-tenant worker: its own weights are trained, or a PEFT method's, one run's at a time.

Shapes: T packed tokens, N rows, D hidden, V vocabulary.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tinsmith.errors import InvalidInput
from tinsmith_worker import attention_call
from tinsmith_worker.activations import Activations, Keeping
from tinsmith_worker.adapters import Adapter, Kind
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.contract import LoraSpec
from tinsmith_worker.experts import is_mixture
from tinsmith_worker.head import Head
from tinsmith_worker.lora import Deltas, accumulate
from tinsmith_worker.model import Base, Layer
from tinsmith_worker.packed import triton_kernels
from tinsmith_worker.stream import LEAST_ROWS, Segment, Stream
from tinsmith_worker.tuning.methods import Wrapped
from tinsmith_worker.tuning.weights import Form, Tuned

log = logging.getLogger("tinsmith.worker")

# Every run's is its own if its seed is; one is small, and made anew in a moment.
_FORMS_KEPT = 16
# Of a pass that is in nobody's way.
_FEW_ROWS = 256
_USUAL_LENGTH = 512


class TunedBase(Base):
    """A Base whose modules are transformers' own. Before a pass its parameters become those of the run, or
    the sampler, that the pass is for: pointers are exchanged, nothing is copied. All rows are one's.

    `reserve_bytes` of a GPU are left for passes: a chunk of the head's logits with its gradients, and layers'
    activations, which are computed anew where there is little room. `pass_tokens`: for passes of about so
    many layers are compiled."""

    reserve_bytes = 12 << 30
    pass_tokens = 8192

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
        self.kernels = False
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
        self._kept_by: dict[str, Activations] = {}  # by method and settings, compiled or not
        attention_call.take(model)
        _, in_one_call = self._check_packed(expected, architecture, None)
        self.can_compile = in_one_call and triton_kernels() is not None
        self._plain_layers = [layer for _, layer in layers]
        self._layers = [Layer(layer, n, self._current) for n, layer in enumerate(self._plain_layers)]

    def compile(self) -> None:
        """Compile the layers, all of it now, by passes of every kind: programs are made to suit the first
        pass, however small a run's is, and would have other bits than those of the worker that replays it.
        Where torch's compiler does not work, layers stay as they are."""
        super().compile()
        try:
            self._rehearse()
        except Exception:
            log.exception("the layers of this base cannot be compiled: training is slower")
            self.run_eagerly()

    @property
    def runs_compiled(self) -> bool:
        """Not within a method of PEFT: its modules, which look about as they run, would be cut into twenty
        programs."""
        return self.is_compiled and self._wrapped is None

    def _rehearse(self) -> None:
        """There alone, and there and back, with the base's own weights. Nothing is kept of it."""
        self._become(None)
        # Like the width of no model: torch's compiler takes equal sizes for one.
        stream = self._stream(max(_FEW_ROWS, self.pass_tokens) - LEAST_ROWS)
        with torch.no_grad():
            Base.forward(self, stream)
        self._enter_form(self._whole)
        try:
            # All layers but the last are lean as well, and there is room for that everywhere.
            self.keeping = Keeping(recomputed_layers=len(self._layers) - 1)
            hidden_TD = Base.forward(self, stream)
            Base.backward(self, hidden_TD, torch.zeros_like(hidden_TD))
            with torch.no_grad():
                Base.forward(self, stream)
        finally:
            self.keeping = None
            self._leave_form()

    def _stream(self, rows: int, adapter: Tuned | None = None) -> Stream:
        """So many rows, which count for `adapter` if there is one."""
        length = min(_USUAL_LENGTH, self.facts.max_context_length)
        rows_T = torch.arange(rows, device=self.device)
        lengths_S = np.diff([*range(0, rows, length), rows])
        attention = CausalSequences(lengths_S, is_deterministic=self.is_deterministic)
        segments = (Segment(0, rows, adapter),) if adapter else ()
        return Stream(torch.zeros_like(rows_T), rows_T % length, segments, attention)

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
        kind = f"{adapter.spec.method} {adapter.spec.settings} {self.runs_compiled}"
        if (known := self._kept_by.get(kind)) is None:
            known = self.activations = self._kept_by[kind] = Activations(self.activations.layers)
            self._learn(adapter)
        self.activations = known

    def _learn(self, adapter: Tuned) -> None:
        """How much the layers keep of a token, lean or not, by passes too small to be in the way: else the
        first one would keep all of it, whether there is room or not. Methods differ in it manifold."""
        given, stream = self.keeping, self._stream(_FEW_ROWS, adapter)
        kinds = [Keeping()] + [Keeping(lean_layers=len(self._layers))] * self.runs_compiled
        try:
            for keeping in kinds:
                self.keeping = keeping
                Base.forward(self, stream)
        finally:
            self.keeping = given

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
        """What autograd calls when the gradient of a pass is complete: it is added to the float32 sum of the
        run, unless the pass was nobody's."""

        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if self._active is not None:
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
