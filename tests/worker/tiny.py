"""Small random models, adapters and batches, and the same training done with transformers + PEFT."""

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tinsmith.wire.batch import TrainInput
from tinsmith.wire.losses import LOSSES
from tinsmith_worker.contract import AdapterState, Engine, Failure, LoraSpec, OptimizerParams
from tinsmith_worker.model import Base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
VOCABULARY = 160


def model(
    family: str = "qwen3", *, tied: bool = True, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A two-layer model whose weights follow from its shape alone: called twice, it is the same model twice."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        **changes,
    }
    config = {
        "qwen3": Qwen3Config,
        "llama": LlamaConfig,
        "qwen3_moe": Qwen3MoeConfig,
        "qwen2_moe": Qwen2MoeConfig,
        "deepseek_v3": DeepseekV3Config,
    }[family](**shape)
    torch.manual_seed(17)
    # Rounded after it is drawn: drawn in bfloat16 it could be another model.
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)


def base(family: str = "qwen3", **options: Any) -> Base:
    return Base(model(family, **options))


def trained(of: Base, spec: LoraSpec, seed: int = 3, spread: float = 0.1) -> AdapterState:
    """An adapter as if trained a while: A and B both random, so that every gradient is worth comparing.

    A wide base wants a smaller `spread`: with large deltas its numbers depend on every rounding. So does a
    small rank, whose deltas are scaled by 32 over it.
    """
    spread *= min(1.0, (spec.rank / 8) ** 0.5)
    fresh = of.new_adapter(spec).state()
    random = np.random.default_rng(seed).normal(0, spread, fresh.weights.shape).astype(np.float32)
    for (_, start, shape), (_, stop, _) in zip(
        fresh.tensors, (*fresh.tensors[1:], ("", len(random), ())), strict=True
    ):
        random[start + math.prod(shape) : stop] = 0
    return replace(fresh, weights=random)


def batch(
    loss: str = "cross_entropy",
    lengths: tuple[int, ...] = (7, 30, 12),
    *,
    seed: int = 0,
    width: int = 0,
    forward_only: bool = False,
    **settings: float,
) -> TrainInput:
    """Random data for any loss. `width` K gives 2-D targets. Logprobs are near what a random model says."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    columns: dict[str, Any] = {}
    for name in LOSSES[loss].inputs:
        columns[name] = {
            "weights": random.normal(size=(tokens, max(width, 1))),
            "logprobs": random.normal(-math.log(VOCABULARY), 0.3, tokens),
            "advantages": random.normal(size=tokens) * (random.random(tokens) < 0.8),
        }.get(name, random.random(tokens) < 0.7)
    for name, default in LOSSES[loss].settings.items():
        columns[name] = np.full(tokens, settings.get(name, default))
    return TrainInput(
        loss=loss,
        forward_only=forward_only,
        lengths_S=np.array(lengths, np.int64),
        tokens_T=random.integers(0, VOCABULARY, tokens).astype(np.int32),
        targets_TK=random.integers(0, VOCABULARY, (tokens, max(width, 1))),
        target_widths_S=np.full(len(lengths), width, np.int64),
        columns={name: np.asarray(values, np.float32) for name, values in columns.items()},
    )


def step(engine: Engine, run_id: str, params: OptimizerParams) -> dict[str, float] | Failure:
    """The step of one run."""
    return engine.optim_steps([(run_id, params)])[0]


def peft(of: Any, state: AdapterState) -> PeftModel:
    """transformers + PEFT with the weights of `state`."""
    spec = state.spec
    modules = ATTENTION * spec.train_attn + MLP * spec.train_mlp + ["lm_head"] * spec.train_unembed
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT doubts adapters at tied embeddings, and that is what we compare
        wrapped = get_peft_model(of, LoraConfig(r=spec.rank, lora_alpha=32, target_modules=modules))
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, values in tensors(state, state.weights).items():
            parameters[peft_name(name)].copy_(torch.from_numpy(values))
    return wrapped.eval()


def peft_name(name: str) -> str:
    return name.replace(".weight", ".default.weight")


def tensors(state: AdapterState, flat: Any) -> dict[str, Any]:
    """A flat buffer of `state` by tensor name."""
    return {name: flat[at : at + math.prod(shape)].reshape(shape) for name, at, shape in state.tensors}


@dataclass
class Reference:
    logprobs: torch.Tensor
    losses: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def reference(of: PeftModel, given: TrainInput) -> Reference:
    """The same forward and backward, one sequence at a time, by autograd through the whole model."""
    of.zero_grad(set_to_none=True)
    device = next(of.parameters()).device
    logprobs, losses, start = [], [], 0
    for length in given.lengths_S.tolist():
        rows = slice(start, start + length)
        tokens = torch.from_numpy(given.tokens_T[rows].astype(np.int64)).to(device)
        logits = of(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()
        targets = torch.from_numpy(given.targets_TK[rows]).to(device)
        lp = logits.log_softmax(1).gather(1, targets)
        loss = loss_by_autograd(
            given.loss, lp, {n: torch.from_numpy(c[rows]).to(device) for n, c in given.columns.items()}
        )
        loss.sum().backward()
        logprobs.append(lp.detach())
        losses.append(loss.detach())
        start += length
    gradients = {n: p.grad for n, p in of.named_parameters() if p.grad is not None}
    return Reference(torch.cat(logprobs), torch.cat(losses), gradients)


def loss_by_autograd(loss: str, logprobs_NK: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """The documented formulas for one sequence, as plain torch: [N]."""
    if loss == "cross_entropy":
        return (-columns["weights"] * logprobs_NK).sum(1)
    lp, q, A = logprobs_NK[:, 0], columns["logprobs"], columns["advantages"]
    r = torch.exp(lp - q)
    if loss == "importance_sampling":
        return -r * A
    if loss == "dro":
        return -(lp * A - columns["beta"] / 2 * (lp - q) ** 2)
    if loss == "stable_reinforce":
        surrogate = -torch.clamp(r, max=1).detach() * A * lp + columns["kl_coeff"] / 2 * (lp - q) ** 2
        return surrogate * (columns["sampled_mask"] != 0)
    low, high = columns["clip_low_threshold"], columns["clip_high_threshold"]
    if loss == "ppo":
        return -torch.minimum(r * A, torch.clamp(r, low, high) * A)
    if loss == "cispo":
        return -torch.clamp(r, low, high).detach() * lp * A
    assert loss == "gspo"
    mask = columns["sequence_ratio_mask"] != 0
    mean = (lp.detach() - q)[mask].mean() if mask.any() else torch.zeros(())
    s = torch.exp(mean + lp - lp.detach())
    return -torch.minimum(s * A, torch.clamp(s, low, high) * A)


def worst(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest number where that is above 1."""
    a, b = torch.as_tensor(found), torch.as_tensor(expected).to("cpu")
    assert a.shape == b.shape
    return float((a - b).abs().max() / max(1.0, float(b.abs().max())))
