"""The frozen base model: any Hugging Face causal LM whose linear maps and attention can be replaced by ours.

Shapes: T packed tokens, D hidden, V vocabulary.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from tinsmith.errors import InvalidInput
from tinsmith_worker.adapters import Adapter, Kind, Site
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.contract import AdapterState, LoraSpec, ModelFacts
from tinsmith_worker.head import Head
from tinsmith_worker.lora import Current, LoraLinear, Pass
from tinsmith_worker.stream import Segment, Stream

_ATTENTION = "tinsmith"


class Base:
    """A frozen causal LM over packed streams. One thread at a time.

    `sites` are the places an adapter can act on, the output embedding last. `grouped_deltas` and
    `one_by_one` choose between the fast way and the one whose bits depend on nobody else's rows.
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
        self._model, self._decoder = model, model.base_model
        config = model.config.get_text_config()
        self._embedding = model.get_input_embeddings()
        output = model.get_output_embeddings()
        _refuse_unsupported(model, config, architecture)
        head_site = next(name for name, module in model.named_modules() if module is output)
        self.head = Head(head_site, output.weight, output.bias)
        self.device, self.dtype = output.weight.device, output.weight.dtype
        self.facts = ModelFacts(
            vocab_size=min(output.weight.shape[0], self._embedding.weight.shape[0]),
            max_context_length=int(config.max_position_embeddings),
            architecture=architecture,
            tokenizer=tokenizer,
        )
        self._current = Current()
        expected = self._probe_alone(architecture)
        self.sites = (
            *self._replace_linears(config),
            Site(head_site, "unembed", inputs=output.weight.shape[1], outputs=output.weight.shape[0]),
        )
        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)
        self.grouped_deltas = (
            self.device.type == "cuda" and self.dtype == torch.bfloat16 and fit_grouped_products(self.sites)
        )
        self.one_by_one = False
        self._check_against(expected, architecture)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Read a model folder or a hub id. InvalidInput if its architecture is not supported."""
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return cls(model.to(device=device), tokenizer=str(path))

    def forward(self, stream: Stream) -> torch.Tensor:
        """Hidden states [T, D] after the final norm. With gradients on, backward reaches the adapters."""
        embedded_1TD = self._embedding(stream.tokens_T.unsqueeze(0))
        if torch.is_grad_enabled():
            # Every parameter is frozen: this is what makes autograd record the pass at all.
            embedded_1TD.requires_grad_(True)
        self._current.now = Pass(stream, grouped=self.grouped_deltas)
        try:
            output = self._decoder(
                inputs_embeds=embedded_1TD, position_ids=stream.positions_T.unsqueeze(0), use_cache=False
            )
        finally:
            self._current.now = None
        hidden_1TD: torch.Tensor = output.last_hidden_state
        return hidden_1TD.squeeze(0)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text unless a request says otherwise: its generation config names them."""
        given = self._model.generation_config.eos_token_id
        if given is None:
            return frozenset()
        return frozenset([given] if isinstance(given, int) else given)

    def new_adapter(self, spec: LoraSpec) -> Adapter:
        """A fresh adapter, drawn from the spec's seed."""
        adapter = Adapter(spec, self.sites, device=self.device, dtype=self.dtype)
        adapter.initialise()
        return adapter

    def adapter_of(self, state: AdapterState, *, optimizer: bool = False) -> Adapter:
        """An adapter as `state` has it; without `optimizer` its weights alone, as a sampler holds them."""
        adapter = Adapter(state.spec, self.sites, device=self.device, dtype=self.dtype)
        adapter.take(state, optimizer=optimizer)
        return adapter

    def _replace_linears(self, config: Any) -> Iterator[Site]:
        prefix = f"{self._model.base_model_prefix}."
        for path, layer in _layers(self._decoder, config):
            for name, linear in list(layer.named_modules()):
                if not isinstance(linear, nn.Linear):
                    continue
                kind: Kind = "attn" if "attn" in name.lower() or "attention" in name.lower() else "mlp"
                site = Site(f"{prefix}{path}.{name}", kind, linear.in_features, linear.out_features)
                parent_name, _, child = name.rpartition(".")
                parent = layer.get_submodule(parent_name)
                setattr(parent, child, LoraLinear(linear, site, self._current))
                # The attention function is handed the module that calls it, and nothing of ours.
                parent.tinsmith_current = self._current  # type: ignore[assignment]
                yield site

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

    def _check_against(self, expected: list[torch.Tensor], architecture: str) -> None:
        """Packed through our attention, linears and head, the base must say what it said by itself, and
        its gradients must come through."""
        positions_T = torch.cat([torch.arange(n, device=self.device) for n in _PROBE_LENGTHS])
        adapter = self.new_adapter(LoraSpec(rank=1, seed=0))  # B is zero: it adds nothing
        adapter.open_gradient()
        segment = Segment(0, len(positions_T), adapter)
        attention = CausalSequences(np.array(_PROBE_LENGTHS))
        with torch.enable_grad():
            hidden_TD = self.forward(Stream(self._probe_tokens(), positions_T, (segment,), attention))
        found = self.head.logits(hidden_TD.detach(), None)
        wanted = torch.cat(expected)
        error = float((found - wanted).norm() / wanted.norm())
        # Depth multiplies what rounding starts; a wrong position or mask is off by about 100 %.
        if not error < (1e-3 if self.dtype == torch.float32 else 0.25):
            raise InvalidInput(
                f"{architecture} cannot be served: packed, its logits differ by {error:.1%} from its own; "
                "it does something with attention, positions or logits that this engine does not know of"
            )
        # Not the same everywhere: a norm's gradient would be zero.
        hidden_TD.backward(torch.linspace(-1, 1, hidden_TD.numel()).view_as(hidden_TD).to(hidden_TD))
        assert adapter.gradient is not None
        if not 0 < float(adapter.gradient.norm()) < float("inf"):
            raise InvalidInput(
                f"{architecture} cannot be trained: its gradients do not come through or are not finite"
            )


_PROBE_LENGTHS = [40, 24]


def fit_grouped_products(sites: Sequence[Site]) -> bool:
    """grouped_mm loads 16 bytes at a time. The head, whose size is the vocabulary's, does without."""
    return all(site.inputs % 8 == site.outputs % 8 == 0 for site in sites if site.kind != "unembed")


def _layers(decoder: Any, config: Any) -> list[tuple[str, nn.Module]]:
    """(path within the decoder, module) of every decoder layer."""
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return [(f"{path}.{i}", layer) for i, layer in enumerate(module)]
    return []


def _refuse_unsupported(model: Any, config: Any, architecture: str) -> None:
    refused = f"{architecture} cannot be served: "
    if type(model.get_output_embeddings()) is not nn.Linear:
        kind = type(model.get_output_embeddings()).__name__
        raise InvalidInput(refused + f"its output embedding is a {kind}, not a plain nn.Linear")
    if not model._supports_attention_backend:
        raise InvalidInput(refused + "transformers has no exchangeable attention (AttentionInterface) for it")
    layers = _layers(model.base_model, config)
    if not any(isinstance(m, nn.Linear) for _, layer in layers for m in layer.modules()):
        raise InvalidInput(refused + "its layers hold no nn.Linear that an adapter could act on")
    for path, layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                raise InvalidInput(
                    refused + f"{path}.{name} is a {type(module).__name__}, not a plain nn.Linear"
                )
            if isinstance(module, nn.Linear):
                continue
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                raise InvalidInput(
                    refused + f"{path}.{name} ({type(module).__name__}) holds weights outside of nn.Linear, "
                    "as fused experts or convolutions do"
                )
    for module in model.modules():
        # These stretch all positions by the longest sequence at hand: tenants would change each other.
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            raise InvalidInput(refused + f"its rotary positions are of the type {module.rope_type!r}")


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
    current: Any = module.tinsmith_current
    output_THC = current.now.attention.attend(
        module.layer_idx,
        *(x.squeeze(0).transpose(0, 1) for x in (query_1HTC, key_1GTC, value_1GTC)),
        scaling if scaling is not None else query_1HTC.shape[-1] ** -0.5,
    )
    return output_THC.unsqueeze(0), None
