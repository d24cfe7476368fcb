"""What the base takes and refuses, and what the engine needs to run."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from tests.worker import tiny
from tinsmith.errors import InvalidInput
from tinsmith_worker import packed
from tinsmith_worker.contract import LoraSpec, SampleInput, SampleOutput
from tinsmith_worker.engine import TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import TorchSampler

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
    "experts with biases": (
        GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
        "GptOssExperts are more, or others, than gate, up and down",
    ),
    "no nn.Linear": (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100), "no nn.Linear"),
    "attention that cannot be exchanged": (
        BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=100),
        "AttentionInterface",
    ),
    "logits scaled after the output embedding": (
        GraniteConfig(**SHAPE, logits_scaling=1.05),
        "changes its logits after",
    ),
    "logits that are capped at last": (
        Gemma2Config(**SHAPE, head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=30.0),
        "changes its logits after",
    ),
    "attention scores that are capped": (
        Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=None),
        "caps its attention",
    ),
    "a sliding window in use": (MistralConfig(**SHAPE, sliding_window=16), "sliding window"),
    "positions that stretch with the longest sequence": (
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "rotary positions",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config, sentence", REFUSED.values(), ids=REFUSED.keys())
def test_architectures_it_would_compute_wrongly_are_refused_with_a_sentence(
    config: object, sentence: str, dtype: torch.dtype
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Base(AutoModelForCausalLM.from_config(config).to(dtype))


def test_a_model_with_learned_positions_is_served_rightly_or_not_at_all() -> None:
    """Loading compares packed sequences with the untouched model: what it accepts, it computes."""
    config = OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    base = Base(AutoModelForCausalLM.from_config(config))
    assert {site.kind for site in base.sites} == {"attn", "mlp", "unembed"}


class Scaled(torch.nn.Linear):
    """An output embedding that does more than multiply, which the engine's head cannot know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.9 * super().forward(x)


class Detached(torch.nn.Module):
    """Says what it should and lets no gradient through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


class Unlike(torch.nn.Module):
    """An attention-like module that asks the config for what it does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.missing


def test_an_output_embedding_that_does_more_than_multiply_is_refused() -> None:
    model = tiny.model(tied=False, dtype=torch.bfloat16)
    head = Scaled(64, tiny.VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(InvalidInput, match="output embedding is a Scaled"):
        Base(model)


def test_states_changed_on_their_way_to_the_output_embedding_are_refused() -> None:
    model = tiny.model(dtype=torch.bfloat16)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.95,))
    with pytest.raises(InvalidInput, match="states before the output embedding"):
        Base(model)


def test_a_model_that_cannot_train_is_refused() -> None:
    model = tiny.model()
    model.model.norm = torch.nn.Sequential(model.model.norm, Detached())
    with pytest.raises(InvalidInput, match=r"cannot be served: it does not run, or not train"):
        Base(model)


def test_a_model_that_breaks_in_the_probe_is_refused_with_one_sentence() -> None:
    model = tiny.model()
    model.model.norm = Unlike()
    with pytest.raises(InvalidInput, match=r"Qwen3ForCausalLM cannot be served: .*'missing'"):
        Base(model)


def test_linears_that_are_given_the_same_input_are_one_group() -> None:
    groups: dict[int, list[str]] = {}
    for site in tiny.base().sites:
        groups.setdefault(site.group, []).append(site.name.rpartition(".")[2])
    of_layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(groups.values()) == [*of_layer, *of_layer, ["lm_head"]]


def test_inputs_whose_width_would_leave_gaps_between_adapters_matrices_make_no_groups() -> None:
    sites = tiny.base(hidden_size=72).sites
    assert len({site.group for site in sites}) == len(sites)


def test_without_a_c_compiler_triton_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are compiled where they run; an image may hold nothing to do so."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert packed.triton_kernels.__wrapped__() is None


def test_heads_whose_values_are_narrower_than_their_queries_train_and_sample_as_in_transformers() -> None:
    config = DeepseekV3Config(
        **(SHAPE | {"num_key_value_heads": 2}), first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    prompt = torch.arange(20)[None]
    wanted = model.generate(
        input_ids=prompt, attention_mask=prompt >= 0, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    sampler = TorchSampler(Base(model))
    sampler.add(
        SampleInput("r", "", np.arange(20, dtype=np.int32), 2, 8, seed=0, temperature=0, stop_tokens=())
    )
    answers = [answer for _ in range(9) for answer in sampler.step()]
    assert isinstance(answers[0], SampleOutput), answers
    for sequence in answers[0].sequences:
        assert sequence.tokens.tolist() == wanted[0, 20:].tolist()


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
