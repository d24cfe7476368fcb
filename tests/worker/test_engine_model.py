"""What the base takes and refuses, and what the engine needs to run."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from tests.worker import tiny
from tinsmith.errors import InvalidInput
from tinsmith_worker.contract import LoraSpec
from tinsmith_worker.engine import TorchEngine
from tinsmith_worker.model import Base

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
REFUSED = {
    "layers hold weights outside of nn.Linear": (
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16),
        "fused experts",
    ),
    "no nn.Linear": (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100), "no nn.Linear"),
    "attention that cannot be exchanged": (
        BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=100),
        "AttentionInterface",
    ),
    "logits scaled after the output embedding": (GraniteConfig(**SHAPE, logits_scaling=8.0), "logits differ"),
    "attention scores that are capped": (Gemma2Config(**SHAPE, head_dim=16), "caps its attention"),
    "a sliding window in use": (MistralConfig(**SHAPE, sliding_window=16), "sliding window"),
    "positions that stretch with the longest sequence": (
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "rotary positions",
    ),
}


@pytest.mark.parametrize("config, sentence", REFUSED.values(), ids=REFUSED.keys())
def test_architectures_it_would_compute_wrongly_are_refused_with_a_sentence(
    config: object, sentence: str
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Base(AutoModelForCausalLM.from_config(config))


def test_a_model_with_learned_positions_is_served_rightly_or_not_at_all() -> None:
    """Loading compares packed sequences with the untouched model: what it accepts, it computes."""
    config = OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    base = Base(AutoModelForCausalLM.from_config(config))
    assert {site.kind for site in base.sites} == {"attn", "mlp", "unembed"}


def test_a_base_whose_packed_logits_are_not_its_own_is_refused() -> None:
    class Scaled(torch.nn.Linear):
        """An output embedding that does more than multiply, which the engine's head cannot know."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    model = tiny.model(tied=False)
    head = Scaled(64, tiny.VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(InvalidInput, match="logits differ"):
        Base(model)


def test_sites_are_all_linears_of_the_layers_and_the_output_embedding() -> None:
    base = tiny.base()
    names = [site.name for site in base.sites]
    expected = [f"model.layers.0.self_attn.{n}" for n in tiny.ATTENTION] + [
        f"model.layers.0.mlp.{n}" for n in tiny.MLP
    ]
    assert names[:7] == expected
    assert names[-1] == "lm_head"
    assert [site.kind for site in base.sites].count("attn") == 8
    assert [site.kind for site in base.sites].count("mlp") == 6


def test_facts_tell_what_requests_are_validated_against() -> None:
    facts = tiny.base("llama").facts
    assert (facts.vocab_size, facts.max_context_length, facts.architecture) == (160, 512, "LlamaForCausalLM")


@pytest.mark.parametrize("rank", [0, -5, 257])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    engine = TorchEngine(tiny.base())
    with pytest.raises(InvalidInput, match="rank must be from 1 to 256"):
        engine.create("run", LoraSpec(rank, 0))
    assert not engine.holds("run")


def test_an_adapter_that_would_train_nothing_is_refused() -> None:
    engine = TorchEngine(tiny.base())
    with pytest.raises(InvalidInput, match="train nothing"):
        engine.create("run", LoraSpec(8, 0, train_attn=False, train_mlp=False, train_unembed=False))


def test_a_dropped_run_is_gone() -> None:
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(8, 0))
    assert engine.holds("run")
    engine.drop("run")
    engine.drop("run")
    assert not engine.holds("run")


def test_a_frozen_adapter_costs_its_weights_alone() -> None:
    base = tiny.base()
    adapter = base.adapter_of(tiny.trained(base, LoraSpec(8, 0)))
    assert adapter.gradient is None
    assert adapter.moment1 is None
    assert adapter.compute is adapter.weights


def test_the_engine_runs_without_web_database_or_protobuf_packages() -> None:
    """A GPU image may hold torch, transformers, numpy and safetensors only."""
    program = """
import sys
for name in ("sqlalchemy", "alembic", "fastapi", "starlette", "pydantic", "google.protobuf", "uvicorn", "peft"):
    sys.modules[name] = None
import tinsmith_worker.engine, tinsmith_worker.checkpoints
assert not any(name.startswith("tinsmith_api") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_checkpoints_need_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import tinsmith_worker.checkpoints"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
