"""A base in four bits computes what its weights, made whole again by the library, would compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from tests.worker import tiny
from tinsmith.errors import InvalidInput
from tinsmith_worker.contract import AdamParams, LoraSpec, SampleInput, SampleOutput, Work
from tinsmith_worker.engine import TorchEngine
from tinsmith_worker.four_bit import is_four_bit, read_four_bit
from tinsmith_worker.model import Base
from tinsmith_worker.open_engine import Holding, open_engine
from tinsmith_worker.sampler import TorchSampler

CPU = torch.device("cpu")
SPEC = LoraSpec(8, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    # As wide as two blocks of the second quantization: 64 weights share a scale, 256 scales share one.
    tiny.model(tied=False, hidden_size=128, intermediate_size=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> TorchEngine:
    return TorchEngine(Base.load(folder, device=CPU, dtype=torch.float32, four_bit=True))


@pytest.fixture(scope="module")
def whole(folder: Path) -> TorchEngine:
    """A base with the weights that four bits leave of it, as plain linears."""
    cut = dict(read_four_bit(folder, device=CPU, dtype=torch.float32).named_modules())
    plain = tiny.model(tied=False, hidden_size=128, intermediate_size=256)
    changed = 0
    with torch.no_grad():
        for name, module in plain.named_modules():
            if is_four_bit(cut[name]):
                weight = dequantize_4bit(cut[name].weight.data, cut[name].weight.quant_state)
                changed += 0.02 < float((weight - module.weight).norm() / module.weight.norm()) < 0.2
                module.weight.copy_(weight)
    assert changed == 14, "every linear of two layers, and no more than four bits lose"
    return TorchEngine(Base(plain))


@pytest.mark.parametrize("loss", ["cross_entropy", "ppo"])
def test_logprobs_and_gradients_are_those_of_the_dequantized_base(
    loss: str, engine: TorchEngine, whole: TorchEngine
) -> None:
    state, given = tiny.trained(engine.base, SPEC), tiny.batch(loss, (33, 12, 50))
    found = []
    for one in (engine, whole):
        one.restore("run", state)
        (output,) = one.forward_backward([Work("run", given)])
        found.append((output.logprobs_TK, output.losses_T, one.state("run").gradient))
    for ours, theirs in zip(*found, strict=True):
        assert tiny.worst(ours, theirs) <= 1e-5


def test_it_trains(engine: TorchEngine) -> None:
    engine.create("run", SPEC)
    given = tiny.batch("cross_entropy", (30, 20), seed=4)
    given.columns["weights"][:] = 1
    seen = []
    for _ in range(8):
        (output,) = engine.forward_backward([Work("run", given)])
        seen.append(float(output.losses_T.sum()))
        tiny.step(engine, "run", AdamParams(1e-2))
    assert seen[-1] < 0.5 * seen[0]


def test_it_samples_what_it_scores(engine: TorchEngine) -> None:
    sampler = TorchSampler(engine.base)
    sampler.hold("adapter", tiny.trained(engine.base, SPEC))
    sampler.add(SampleInput("r", "adapter", np.arange(10, 20, dtype=np.int32), 2, 12, seed=1))
    (done,) = [one for _ in range(40) if sampler.busy for one in sampler.step()]
    assert isinstance(done, SampleOutput)
    engine.restore("run", tiny.trained(engine.base, SPEC))
    for sequence in done.sequences:
        tokens = np.concatenate([np.arange(10, 20), sequence.tokens])
        given = tiny.batch("cross_entropy", (len(tokens) - 1,), forward_only=True)
        given.tokens_T[:], given.targets_TK[:, 0] = tokens[:-1], tokens[1:]
        (output,) = engine.forward_backward([Work("run", given)])
        assert tiny.worst(sequence.logprobs, output.logprobs_TK[-len(sequence.tokens) :, 0]) <= 5e-5


def test_the_layers_take_about_four_bits_a_weight(engine: TorchEngine) -> None:
    layers = [m for m in engine.base._decoder.modules() if hasattr(m, "_linear")]
    stored = weights = 0
    for module in layers:
        weight = module._linear[0].weight
        state = weight.quant_state
        parts = (weight, state.absmax, state.state2.absmax)
        stored += sum(part.numel() * part.element_size() for part in parts)
        weights += module.in_features * module.out_features
    assert len(layers) == 14
    assert 4.1 <= 8 * stored / weights <= 4.3


def test_a_mixture_is_refused_with_a_sentence(tmp_path: Path) -> None:
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    tiny.model("qwen3_moe", **shape).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="in four bits: its experts"):
        Base.load(tmp_path, device=CPU, dtype=torch.float32, four_bit=True)


@pytest.mark.parametrize(
    "holding, sentence",
    [
        (Holding("fsdp2", quantize="nf4"), "four bits cannot be cut"),
        (Holding("deepspeed", quantize="nf4"), "four bits cannot be cut"),
        (Holding("fsdp2", offload_folder="/scratch"), "needs parallel deepspeed"),
        (Holding("deepspeed", offload=True, offload_folder="/scratch"), "leave out one"),
        (Holding(offload=True), "needs parallel fsdp2"),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_sentence(holding: Holding, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_engine("tiny", deterministic=False, pass_tokens=64, holding=holding)
