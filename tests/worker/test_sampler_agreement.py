"""How near the sampler's logprobs are to the trainer's in float32, and both to the truth.

Bounds are two to three times what was measured on a Xeon of the fourth generation (docs/sampling.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker import tiny
from tests.worker.test_sampler import forward_of, run
from tinsmith_worker import tiny_base
from tinsmith_worker.contract import LoraSpec, SampleInput, Work
from tinsmith_worker.engine import TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import TorchSampler

Float = npt.NDArray[np.float64]
QUESTIONS = ["What is 3 + 4?", "Reverse the word: lamp", "Write the number 12 in words", "Sort: 5 2 9"]


def test_in_float32_sampler_and_trainer_are_as_near_the_truth_as_rounded_logits_are() -> None:
    """The built-in base, which is trained: its logits reach 25, where float32 has steps of 2e-6."""
    words = AutoTokenizer.from_pretrained(tiny_base.FOLDER)
    prompts = [
        words.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True, return_dict=False
        )
        for said in QUESTIONS
    ]
    found = compared(trained_base(), [np.array(prompt, np.int32) for prompt in prompts])
    texts, sampled, trained = found
    true = truth(trained_base(), texts)
    for said in (sampled, trained):
        assert_near(said, true, mean=6e-7, most=1e-5)
    assert_near(sampled, trained, mean=8e-7, most=2e-5)


def test_depth_leaves_sampler_and_trainer_near_each_other() -> None:
    """28 random layers: of what is left, all is the layers' rounding."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, tiny.VOCABULARY, 10 + n).astype(np.int32) for n in range(4)]
    _, sampled, trained = compared(tiny.model(num_hidden_layers=28), prompts)
    assert_near(sampled, trained, mean=1.5e-6, most=1e-5)


def assert_near(found: Float, expected: Float, *, mean: float, most: float) -> None:
    apart = np.abs(found - expected)
    assert apart.mean() < mean, (apart.mean(), apart.max())
    assert apart.max() < most, (apart.mean(), apart.max())


def trained_base() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=torch.float32)


def compared(
    model: Any, prompts: Sequence[npt.NDArray[np.int32]]
) -> tuple[list[tuple[int, Any]], Float, Float]:
    """Texts with the lengths of their prompts, and what sampler and trainer say of the tokens after them."""
    base = Base(model)
    engine = TorchEngine(base)
    engine.create("run", LoraSpec(8, 0))
    asked = [
        SampleInput(str(n), "", prompt, 4, 32, seed=n, stop_tokens=()) for n, prompt in enumerate(prompts)
    ]
    found = run(TorchSampler(base), *asked)
    texts, sampled, trained = [], [], []
    for one in asked:
        for sequence in found[one.request_id].sequences:
            text = np.concatenate([one.prompt, sequence.tokens])
            texts.append((len(one.prompt), text))
            sampled.append(sequence.logprobs)
            (said,) = engine.forward_backward([Work("run", forward_of(text))])
            trained.append(said.logprobs_TK[len(one.prompt) - 1 :, 0])
    return texts, np.concatenate(sampled).astype(np.float64), np.concatenate(trained).astype(np.float64)


def truth(model: Any, texts: Sequence[tuple[int, npt.NDArray[np.int32]]]) -> Float:
    """By transformers in float64."""
    exact, said = model.double(), []
    for start, text in texts:
        ids = torch.from_numpy(text.astype(np.int64))
        with torch.no_grad():
            logprobs_TV = exact(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        said.append(logprobs_TV.gather(1, ids[1:, None])[start - 1 :, 0].numpy())
    return np.concatenate(said)
