"""The frozen base model: any Hugging Face causal LM whose linear maps and attention can be replaced by ours.

Shapes: T packed tokens, D hidden, V vocabulary.
"""

import collections
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from tinsmith.errors import InvalidInput
from tinsmith_worker import attention_call
from tinsmith_worker.activations import Activations, Keeping
from tinsmith_worker.adapters import ALIGNMENT, MOST_MEMBERS, Adapter, Kind, Site
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.attention_call import Caller
from tinsmith_worker.contract import AdapterState, LoraSpec, ModelFacts
from tinsmith_worker.copies import free_bytes
from tinsmith_worker.experts import Mixture, expert_sites, is_mixture, trouble
from tinsmith_worker.four_bit import is_four_bit, read_four_bit
from tinsmith_worker.head import Head
from tinsmith_worker.lora import Current, Deltas, Group, Pass, deltas, register
from tinsmith_worker.packed import triton_kernels
from tinsmith_worker.stream import LEAST_ROWS, Segment, Stream


class Base:
    """A frozen causal LM over packed streams. One thread at a time.

    `sites` are the places an adapter can act on, the output embedding last. `kernels`: whether Triton's are
    used. `is_deterministic`: whether bits must depend on nobody else's rows. `keeping`: what training passes
    keep of their activations; None: as memory allows.
    """

    def __init__(self, model: Any, *, tokenizer: str = "") -> None:
        """Take over `model`, a transformers causal LM: freeze it, replace its linears and its attention.

        InvalidInput if its architecture is one that this would not compute rightly.
        """
        # cuBLAS is deterministic with workspaces of a fixed size only, and torch looks once, at the first
        # product. This is the size that torch takes on a Hopper GPU anyway.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        model.eval().requires_grad_(False)
        architecture = type(model).__name__
        try:
            self._take_over(model, architecture, tokenizer)
        except (InvalidInput, torch.OutOfMemoryError):
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            # Only running it tells what a model does: one unlike all others breaks somewhere in here.
            raise InvalidInput(
                f"{architecture} cannot be served: it does not run, or not train, in packed passes ({error})"
            ) from error

    def _take_over(self, model: Any, architecture: str, tokenizer: str) -> None:
        layers = self._look_at(model, architecture, tokenizer)
        expected = self._probe_alone(architecture)
        together = self._linears_given_the_same(layers)
        self.sites = tuple(self._replace_linears(layers, together))
        output = model.get_output_embeddings()
        head_site = next(name for name, module in model.named_modules() if module is output)
        inputs, outputs, group = output.weight.shape[1], output.weight.shape[0], self.sites[-1].group + 1
        self.head = Head(group, output.weight, output.bias)
        self.sites += (Site(head_site, "unembed", inputs, outputs, group),)
        attention_call.take(model)
        self.can_compile = self._check_against(expected, architecture)
        self._layers = [Layer(layer, n, self._current) for n, (_, layer) in enumerate(layers)]

    def _look_at(self, model: Any, architecture: str, tokenizer: str) -> list[tuple[str, nn.Module]]:
        """What can be known of the model before anything of it is replaced; its layers, with their paths."""
        self._model, self._decoder = model, model.base_model
        config = model.config.get_text_config()
        self._embedding = model.get_input_embeddings()
        output = model.get_output_embeddings()
        _refuse_unsupported(model, config, architecture)
        self.device, self.dtype = output.weight.device, output.weight.dtype
        self.facts = ModelFacts(
            vocab_size=min(output.weight.shape[0], self._embedding.weight.shape[0]),
            max_context_length=int(config.max_position_embeddings),
            architecture=architecture,
            tokenizer=tokenizer,
        )
        self._current = Current()
        self._groups: list[Group] = []
        self._mixtures: list[Mixture] = []
        # Whether they lie whole where they lie: not those of a base in parts, or in four bits.
        self.weights_stay = not any(map(is_four_bit, model.modules()))
        self.kernels = self.device.type == "cuda" and triton_kernels() is not None
        self.is_deterministic = False
        self.is_compiled = False
        self.keeping: Keeping | None = None
        self.kept = Keeping()  # by the last training pass
        layers = decoder_layers(self._decoder, config)
        self.activations = Activations(len(layers))
        self._beside_bytes, self._careful_passes = _BESIDE_ACTIVATIONS, 0
        return layers

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device, dtype: torch.dtype, four_bit: bool = False
    ) -> Self:
        """Read a model folder or a hub id. InvalidInput if its architecture is not supported."""
        if four_bit:
            return cls(read_four_bit(path, device=device, dtype=dtype), tokenizer=str(path))
        # File by file to where it is wanted: the host never holds all of it.
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device})
        return cls(model, tokenizer=str(path))

    def compile(self) -> None:
        """Compile the layers for training passes, at the first one: half a minute, less when cached."""
        assert self.can_compile
        self.is_compiled = True
        for part in self._compiled_parts:
            part.compile()

    def run_eagerly(self) -> None:
        """As before `compile`."""
        self.is_compiled = False
        self.activations = Activations(self.activations.layers)
        for part in self._compiled_parts:
            part.run_eagerly()

    @property
    def runs_compiled(self) -> bool:
        """Whether a pass runs what is compiled, where its attention lets it."""
        return self.is_compiled

    @property
    def _compiled_parts(self) -> list["Layer | Mixture"]:
        return [*self._layers, *self._mixtures]

    def join_groups(self) -> None:
        """Lay weights that are multiplied with the same input side by side. Training sees the same weights; a
        CPU may round their products otherwise, unless it is deterministic."""
        transposed = self.device.type == "cpu" and not self.is_deterministic
        if self.weights_stay:
            for group in self._groups:
                group.join(transposed=transposed)

    def forward(
        self, stream: Stream, acting: dict[Kind, Deltas] | None = None, *, only_forward: bool = False
    ) -> torch.Tensor:
        """Hidden states [T, D] after the final norm. With gradients on, `backward` must be the next call.

        `acting`: what the adapters do instead of what the stream's segments say; its groups are joined.
        `only_forward`: no `backward` follows, and with gradients on the bits are those of a pass that trains,
        whose compiled layers round otherwise.
        """
        embedded_1TD = self._embedding(stream.tokens_T.unsqueeze(0))
        as_training = torch.is_grad_enabled()
        train = as_training and not only_forward
        if as_training:
            # Every parameter is frozen: this is what makes autograd record the pass at all.
            embedded_1TD.requires_grad_(True)
        make = functools.partial(self._deltas, train=train)
        now = Pass(
            stream.attention,
            acting or make(stream.segments, len(stream.tokens_T)),
            train=train,
            may_compile=self.runs_compiled and stream.attention.may_compile,
            keeping=(self.keeping or self._as_memory_allows(len(stream.tokens_T)))
            if as_training
            else Keeping(),
            segments=stream.segments,
            separate=self.is_deterministic,
            make=make,
        )
        self._current.now, self._current.joined = now, acting is not None
        before = self._allocated()
        try:
            output = self._decoder(
                inputs_embeds=embedded_1TD, position_ids=stream.positions_T.unsqueeze(0), use_cache=False
            )
        except BaseException:
            self._current.now = None
            raise
        if not train:
            self._current.now = None
        else:
            self.kept = now.keeping
            if stream.segments:  # else there are too few rows to tell
                self.activations.learn(now.keeping, len(stream.tokens_T), self._allocated() - before)
        hidden_1TD: torch.Tensor = output.last_hidden_state
        return hidden_1TD.squeeze(0)

    def _deltas(self, segments: Sequence[Segment], rows: int, *, train: bool) -> dict[Kind, Deltas]:
        block = LEAST_ROWS if self.is_deterministic and self.device.type == "cpu" else None
        return deltas(segments, rows, self.device, kernels=self.kernels, train=train, block=block)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _as_memory_allows(self, tokens: int) -> Keeping:
        if self._careful_passes:
            self._careful_passes -= 1
            return Keeping(self.activations.layers)
        if self.device.type != "cuda":
            return Keeping()
        self.activations.always_lean = self.is_deterministic
        return self.activations.keeping(tokens, free_bytes(self.device) - self._beside_bytes)

    def leave_more_room(self) -> None:
        """A pass found less room than it was thought to have: the next few keep as little as can be, all
        others somewhat less than before."""
        self._careful_passes = 16
        self._beside_bytes = min(self._beside_bytes + (1 << 30), 2 * _BESIDE_ACTIVATIONS)

    def backward(self, hidden_TD: torch.Tensor, gradient_TD: torch.Tensor) -> None:
        """From dL/dhidden of the last `forward` to the adapters' gradients."""
        try:
            hidden_TD.backward(gradient_TD)
        finally:
            self._current.now = None

    @property
    def has_experts(self) -> bool:
        return any(site.experts for site in self.sites)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text unless a request says otherwise: its generation config names them."""
        given = self._model.generation_config.eos_token_id
        if given is None:
            return frozenset()
        return frozenset([given] if isinstance(given, int) else given)

    def blank_adapter(
        self, spec: LoraSpec, *, device: torch.device | None = None, frozen: torch.Tensor | None = None
    ) -> Adapter:
        """One whose weights are zero, on the base's device unless told another; or those of `frozen` [P], of
        the base's dtype, which is sampled only. InvalidInput if this base does not train such."""
        if spec.method != "lora":
            raise InvalidInput(
                f"this is of a run of method {spec.method!r}, which a single-tenant worker trains and "
                "samples: this one serves LoRA"
            )
        return Adapter(spec, self.sites, device=device or self.device, dtype=self.dtype, frozen=frozen)

    def new_adapter(self, spec: LoraSpec) -> Adapter:
        """A fresh adapter, drawn from the spec's seed."""
        adapter = self.blank_adapter(spec)
        adapter.initialise()
        return adapter

    def adapter_of(
        self, state: AdapterState, *, optimizer: bool = False, device: torch.device | None = None
    ) -> Adapter:
        """An adapter as `state` has it; without `optimizer` its weights alone, as a sampler holds them."""
        adapter = self.blank_adapter(state.spec, device=device)
        adapter.take(state, optimizer=optimizer)
        return adapter

    def _replace_linears(
        self, layers: list[tuple[str, nn.Module]], together: list[list[nn.Module]]
    ) -> Iterator[Site]:
        """`together`: linears that are given the same input, in the order they are called in."""
        prefix = f"{self._model.base_model_prefix}."
        group_of = {id(linear): group for group in together for linear in group}
        number = 0
        for path, layer in layers:
            names = {id(m): name for name, m in layer.named_modules() if _takes_adapters(m)}
            for linear in [m for m in layer.modules() if _takes_adapters(m)]:
                if id(linear) not in names:
                    continue  # was replaced with its group
                linears: list[Any] = group_of.get(id(linear), [linear])
                of_group = [names.pop(id(one)) for one in linears]
                at_attention = any(word in of_group[0].lower() for word in ("attn", "attention"))
                kind: Kind = "attn" if at_attention else "mlp"
                group = Group(number, linears, kind, self._current)
                self._groups.append(group)
                for name, one, member in zip(of_group, linears, group.members, strict=True):
                    parent_name, _, child = name.rpartition(".")
                    parent = layer.get_submodule(parent_name)
                    setattr(parent, child, member)
                    # The attention function is handed the module that calls it, and nothing of ours.
                    self._let_call(parent)
                    yield Site(f"{prefix}{path}.{name}", kind, one.in_features, one.out_features, number)
                number += 1
            for name, block in [(n, m) for n, m in layer.named_modules() if is_mixture(m)]:
                yield from expert_sites(f"{prefix}{path}.{name}", block, number)
                self._mixtures.append(Mixture(block, number, self._current))
                number += 1

    def _let_call(self, module: Any) -> None:
        """Have our attention know who it works for, when this module calls it."""
        if not hasattr(module, "tinsmith_caller"):
            module.tinsmith_caller = Caller(self._current, getattr(module, "layer_idx", 0))
            module.tinsmith_key = register(module.tinsmith_caller)

    def _linears_given_the_same(self, layers: list[tuple[str, nn.Module]]) -> list[list[nn.Module]]:
        """Linears of one module that the untouched model calls one after the other on one tensor."""
        groups: list[list[nn.Module]] = []
        last: list[Any] = [None]  # what the call before was given; held, or its memory could be used again

        def watch(parent: nn.Module) -> Callable[[nn.Module, Any], None]:
            def see(linear: nn.Module, inputs: Any) -> None:
                given = (parent, inputs[0], inputs[0]._version)
                joins = last[0] is not None and all(
                    a is b or (type(a) is int and a == b) for a, b in zip(given, last[0], strict=True)
                )
                if joins and len(groups[-1]) < MOST_MEMBERS and linear not in groups[-1]:
                    groups[-1].append(linear)
                else:
                    groups.append([linear])
                # Only so do the As of a group lie on top of each other in an adapter's buffer.
                last[0] = given if inputs[0].shape[-1] % ALIGNMENT == 0 else None

            return see

        hooks = [
            child.register_forward_pre_hook(watch(parent))
            for _, layer in layers
            for parent in layer.modules()
            for child in parent.children()
            if _takes_adapters(child)
        ]
        with torch.no_grad():
            self._decoder(input_ids=self._probe_tokens()[None, : _PROBE_LENGTHS[0]], use_cache=False)
        for hook in hooks:
            hook.remove()
        calls = collections.Counter(id(linear) for group in groups for linear in group)
        return [group for group in groups if all(calls[id(linear)] == 1 for linear in group)]

    def _probe_alone(self, architecture: str) -> list[torch.Tensor]:
        """The untouched model's logits of a few sequences, each by itself.

        InvalidInput unless they are the output embedding's product with the decoder's last hidden states and
        nothing else: that is all our head computes.
        """
        given: list[torch.Tensor] = []
        product: list[torch.Tensor] = []

        def see(_: Any, inputs: Any, output: torch.Tensor) -> None:
            given.append(inputs[0].float())
            product.append(output.float())

        sequences = [tokens_T.unsqueeze(0) for tokens_T in self._probe_tokens().split(_PROBE_LENGTHS)]
        hook = self._model.get_output_embeddings().register_forward_hook(see)
        with torch.no_grad():
            logits = [self._model(input_ids=one, use_cache=False).logits.float() for one in sequences]
            hook.remove()
            states = [self._decoder(input_ids=one, use_cache=False).last_hidden_state for one in sequences]
        # The same model on the same tokens: what differs at all is no rounding.
        if any((x - y).norm() > 1e-3 * y.norm() for x, y in zip(given, states, strict=True)):
            raise InvalidInput(
                f"{architecture} cannot be served: it changes its states before the output embedding"
            )
        if not all(torch.equal(made, said) for made, said in zip(product, logits, strict=True)):
            raise InvalidInput(
                f"{architecture} cannot be served: it changes its logits after the output embedding, "
                "as logit scaling and soft caps do"
            )
        return [said.squeeze(0) for said in logits]

    def _probe_tokens(self) -> torch.Tensor:
        numbers_T = torch.arange(sum(_PROBE_LENGTHS), device=self.device)
        return (numbers_T * 7919 + 13) % self.facts.vocab_size

    def _check_against(self, expected: list[torch.Tensor], architecture: str) -> bool:
        """Packed through our attention, linears and head, the base must say what it said by itself, and
        its gradients must come through. Whether its layers could be compiled."""
        adapter = self.new_adapter(LoraSpec(rank=1, seed=0))  # B is zero: it adds nothing
        adapter.open_gradient()
        hidden_TD, in_one_call = self._check_packed(expected, architecture, adapter)
        # Not the same everywhere: a norm's gradient would be zero.
        self.backward(hidden_TD, torch.linspace(-1, 1, hidden_TD.numel()).view_as(hidden_TD).to(hidden_TD))
        assert adapter.gradient is not None
        if not 0 < float(adapter.gradient.norm()) < float("inf"):
            raise InvalidInput(
                f"{architecture} cannot be trained: its gradients do not come through or are not finite"
            )
        return in_one_call and self.kernels

    def _check_packed(
        self, expected: list[torch.Tensor], architecture: str, adapter: Adapter | None
    ) -> tuple[torch.Tensor, bool]:
        """InvalidInput unless packed the base says what it said by itself. The last hidden states, of a pass
        that trains if there is an adapter, and whether attention was one kernel's work."""
        attention = CausalSequences(np.array(_PROBE_LENGTHS))
        positions_T = torch.cat([torch.arange(n, device=self.device) for n in _PROBE_LENGTHS])
        segment = Segment(0, len(positions_T), adapter)
        with torch.set_grad_enabled(adapter is not None):
            hidden_TD = self.forward(Stream(self._probe_tokens(), positions_T, (segment,), attention))
        found = self.head.logits(hidden_TD.detach(), None)
        wanted = torch.cat(expected)
        error = float((found - wanted).norm() / wanted.norm())
        # Depth multiplies what rounding starts, more so where it may choose another expert; a wrong position
        # or mask is off by about 100 %.
        rounding = 0.5 if self.has_experts else 0.25
        if not error < (1e-3 if self.dtype == torch.float32 else rounding):
            raise InvalidInput(
                f"{architecture} cannot be served: packed, its logits differ by {error:.1%} from its own; "
                "it does something with attention, positions or logits that this engine does not know of"
            )
        return hidden_TD, attention.in_one_call


_PROBE_LENGTHS = [40, 24]

# What a backward needs beside the activations: a chunk of the head's logits, a layer's gradients, fragments.
_BESIDE_ACTIVATIONS = 6 << 30


class Layer:
    """A decoder layer's `forward` as the pass under way wants it: compiled, its activations kept or not."""

    def __init__(self, layer: nn.Module, number: int, current: Current) -> None:
        self._number = number
        self._eager: Callable[..., Any] = layer.forward
        self._whole = self._lean = self._eager
        self._current = current
        layer.forward = self

    def run_eagerly(self) -> None:
        self._whole = self._lean = self._eager

    def compile(self) -> None:
        # All layers are one piece of code, compiled once, and for any number of tokens.
        self._whole = torch.compile(self._eager, dynamic=True)
        self._lean = torch.compile(self._eager, dynamic=True, backend=_lean)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self._current.now
        if now is None:
            return self._eager(*args, **kwargs)
        again = self._number < now.keeping.recomputed_layers
        lean = self._number < now.keeping.recomputed_layers + now.keeping.lean_layers
        run = (self._lean if lean else self._whole) if now.may_compile else self._eager
        if again:
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return run(*args, **kwargs)


def _lean(program: Any, inputs: Any) -> Any:
    """torch's compiler, told to make anew in the backward what costs no product."""
    from torch._inductor.compile_fx import compile_fx  # takes seconds, and CPUs never ask for it

    # Any budget between what that leaves of the activations and all of them means the same.
    with functorch_config.patch(activation_memory_budget=0.9):
        return compile_fx(program, inputs)


def decoder_layers(decoder: Any, config: Any) -> list[tuple[str, nn.Module]]:
    """(path within the decoder, module) of every decoder layer."""
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return [(f"{path}.{i}", layer) for i, layer in enumerate(module)]
    return []


def _takes_adapters(module: nn.Module) -> bool:
    """Not a map to one number, as a shared expert's gate is: like a router it is left alone."""
    return isinstance(module, nn.Linear) and module.out_features > 1


def _refuse_unsupported(model: Any, config: Any, architecture: str) -> None:
    refused = f"{architecture} cannot be served: "
    if type(model.get_output_embeddings()) is not nn.Linear:
        kind = type(model.get_output_embeddings()).__name__
        raise InvalidInput(refused + f"its output embedding is a {kind}, not a plain nn.Linear")
    if not model._supports_attention_backend:
        raise InvalidInput(refused + "transformers has no exchangeable attention (AttentionInterface) for it")
    layers = decoder_layers(model.base_model, config)
    if not any(isinstance(m, nn.Linear) for _, layer in layers for m in layer.modules()):
        raise InvalidInput(refused + "its layers hold no nn.Linear that an adapter could act on")
    for path, layer in layers:
        mixtures = {name: module for name, module in layer.named_modules() if is_mixture(module)}
        for mixture in mixtures.values():
            if said := trouble(mixture):
                raise InvalidInput(refused + said)
        if mixtures and any(map(is_four_bit, layer.modules())):
            raise InvalidInput(refused + "in four bits: its experts, most of its weights, would stay whole")
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear and not is_four_bit(module):
                raise InvalidInput(
                    refused + f"{path}.{name} is a {type(module).__name__}, not a plain nn.Linear"
                )
            if isinstance(module, nn.Linear) or any(name.startswith(f"{mixture}.") for mixture in mixtures):
                continue
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                raise InvalidInput(
                    refused + f"{path}.{name} ({type(module).__name__}) holds weights outside of nn.Linear, "
                    "as convolutions do"
                )
    for module in model.modules():
        # These stretch all positions by the longest sequence at hand: tenants would change each other.
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            raise InvalidInput(refused + f"its rotary positions are of the type {module.rope_type!r}")
