"""The types users hold."""

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith.types import Datum, ModelInput, PromptProvenanceSpan, SampledProvenanceSpan, TensorData


def test_lists_arrays_and_tensors_of_equal_values_are_the_same_input() -> None:
    tokens = ModelInput.from_ints([1, 2])
    given = [
        [1, 2],
        np.array([1, 2]),
        np.array([1, 2], np.int32),
        torch.tensor([1, 2]),
        TensorData([1, 2], "int64", [2]),
    ]
    for value in given:
        target = Datum(tokens, {"target_tokens": value}).loss_fn_inputs["target_tokens"]
        assert (target.dtype, target.shape, target.tolist()) == ("int64", [2], [1, 2])
    weights = [
        [1, 0],
        np.array([1.0, 0.0]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
    ]
    for value in weights:
        weight = Datum(tokens, {"weights": value}).loss_fn_inputs["weights"]
        assert (weight.dtype, weight.shape, weight.tolist()) == ("float32", [2], [1.0, 0.0])


def test_two_dimensional_inputs_keep_their_shape() -> None:
    tensor = TensorData(np.arange(6).reshape(2, 3).T)
    assert tensor.shape == [3, 2]
    assert tensor.data == [0, 3, 1, 4, 2, 5]
    assert TensorData([1, 2, 3, 4], "float32", [2, 2]).to_torch().shape == (2, 2)


def test_a_token_beyond_int32_is_refused_not_wrapped() -> None:
    with pytest.raises(OverflowError):
        ModelInput.from_ints([2**31])


def test_a_model_input_grows_without_changing_the_old_one() -> None:
    start = ModelInput.from_ints(range(3))
    grown = start.append_int(9)
    assert (start.to_ints(), start.length) == ([0, 1, 2], 3)
    assert (grown.to_ints(), grown.length) == ([0, 1, 2, 9], 4)


def test_provenance_must_tile_the_tokens() -> None:
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    prompt = PromptProvenanceSpan(sequence_id="q", length=2)
    sampled = SampledProvenanceSpan(sequence_id="q", length=1)
    with_spans = datum.with_provenance([prompt, sampled], [prompt, sampled])
    assert with_spans.model_input_spans == [prompt, sampled]
    with pytest.raises(tinsmith.InvalidInput, match="cover 2 of 3"):
        datum.with_provenance([prompt], [prompt, sampled])
