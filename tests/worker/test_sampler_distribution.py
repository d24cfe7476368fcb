import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tinsmith_worker.sampler.distribution import Filters, distribution, draw, random_stream
from tinsmith_worker.sampler.drawing import draw_in_torch

VOCAB = 50


def logits(rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(7))


def distribution_of(logits_NV: torch.Tensor, *settings: tuple[float, int, float]) -> torch.Tensor:
    return distribution(logits_NV, Filters.of(list(settings), logits_NV.shape[-1], logits_NV.device))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [-1, 1, 5, VOCAB + 3])
@pytest.mark.parametrize("top_p", [0.05, 0.7, 1.0])
def test_the_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    given_NV = logits(4)
    wanted_NV = TemperatureLogitsWarper(temperature)(None, given_NV)
    if top_k > 0:
        wanted_NV = TopKLogitsWarper(top_k)(None, wanted_NV)
    wanted_NV = TopPLogitsWarper(top_p)(None, wanted_NV).log_softmax(-1)
    found_NV = distribution_of(given_NV, *[(temperature, top_k, top_p)] * 4)
    assert torch.equal(found_NV.isinf(), wanted_NV.isinf())
    torch.testing.assert_close(found_NV, wanted_NV, atol=1e-5, rtol=0)


def test_rows_of_other_settings_do_not_touch_each_other() -> None:
    given_NV = logits(4)
    settings = [(1.0, -1, 1.0), (0.0, -1, 1.0), (0.5, 3, 1.0), (1.5, -1, 0.6)]
    together_NV = distribution_of(given_NV, *settings)
    for row, setting in enumerate(settings):
        assert torch.equal(together_NV[row], distribution_of(given_NV[row : row + 1], setting)[0])


def test_what_filters_leave_sums_to_one() -> None:
    found_NV = distribution_of(logits(3), (1.0, 7, 1.0), (1.0, -1, 0.5), (0.7, 4, 0.9))
    torch.testing.assert_close(found_NV.exp().sum(-1), torch.ones(3))


def test_of_equal_logits_top_k_keeps_exactly_k_the_lowest_ids() -> None:
    found_NV = distribution_of(torch.zeros(1, 10), (1.0, 3, 1.0))
    assert found_NV.isfinite()[0].tolist() == [True] * 3 + [False] * 7


def test_top_p_zero_keeps_the_best_token() -> None:
    given_NV = logits(1)
    found_NV = distribution_of(given_NV, (1.0, -1, 0.0))
    assert found_NV[0].isfinite().nonzero().flatten().tolist() == [int(given_NV.argmax())]


def test_temperature_zero_is_greedy_with_the_plain_models_logprobs() -> None:
    given_NV = logits(2)
    filters = Filters.of([(0.0, 3, 0.2), (0.0, -1, 1.0)], VOCAB, given_NV.device)
    found_NV = distribution(given_NV, filters)
    torch.testing.assert_close(found_NV, given_NV.log_softmax(-1))
    drawn_NK = draw(found_NV, torch.tensor([[0.01, 0.99], [0.5, 0.7]]), filters.greedy_N)
    assert drawn_NK.tolist() == [[best] * 2 for best in given_NV.argmax(-1).tolist()]


@pytest.mark.parametrize("temperature", [1e-45, 1e-9, 1e-3])
def test_a_tiny_temperature_is_nearly_greedy_not_nan(temperature: float) -> None:
    given_NV = logits(1)
    found_NV = distribution_of(given_NV, (temperature, -1, 1.0))
    assert not found_NV.isnan().any()
    assert float(found_NV[0, given_NV.argmax()]) == 0.0


def test_draws_follow_the_probabilities() -> None:
    logprobs_NV = distribution_of(logits(1, 8), (1.0, 6, 1.0))
    uniform_NK = torch.from_numpy(random_stream(3, 0).random((1, 100_000)))
    drawn = draw(logprobs_NV, uniform_NK, torch.tensor([False]))[0]
    counts = torch.bincount(drawn, minlength=8).double()
    expected = logprobs_NV[0].double().exp() * len(drawn)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[possible].sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one seed in a thousand would be above


def test_the_ends_of_the_interval_draw_possible_tokens_only() -> None:
    logprobs_NV = torch.tensor([[-torch.inf, 0.5, 0.5, -torch.inf]]).log_softmax(-1)
    ends_NK = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    assert draw(logprobs_NV, ends_NK, torch.tensor([False])).tolist() == [[1, 2]]


SETTINGS = [(1.0, -1, 1.0), (0.0, 5, 0.5), (0.7, 6, 1.0), (2.0, -1, 0.6), (1.0, 20, 0.9), (1.3, -1, 1.0)]


@pytest.mark.parametrize("vocab", [8, 64, 1000])
def test_a_drawn_token_is_the_inverse_cdf_of_the_distribution(vocab: int) -> None:
    given_NV = logits(600, vocab)
    settings = SETTINGS * 100
    uniforms = random_stream(1, 0).random(600)
    tokens_N, chosen_N, (values_NK, ids_NK) = draw_in_torch(given_NV, settings, uniforms, 4)
    filters = Filters.of(settings, vocab, given_NV.device)
    wanted_NV = distribution(given_NV, filters)
    wanted_N = draw(wanted_NV, torch.from_numpy(uniforms)[:, None], filters.greedy_N)[:, 0]
    assert torch.equal(tokens_N, wanted_N)
    torch.testing.assert_close(chosen_N, wanted_NV.gather(1, tokens_N[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(values_NK, wanted_NV.topk(4).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(values_NK, wanted_NV.gather(1, ids_NK), atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_no_draw_is_of_a_token_that_cannot_be(uniform: float) -> None:
    given_NV = torch.full((2, 300), -torch.inf)
    given_NV[0, [70, 129]] = 0.0
    given_NV[1, :] = torch.linspace(0, -200, 300)  # most of these vanish in float32
    tokens = draw_in_torch(given_NV, [(1.0, -1, 1.0)] * 2, np.full(2, uniform), 0)[0]
    assert int(tokens[0]) in (70, 129)
    assert given_NV[1, tokens[1]] > -110


def test_what_is_not_a_number_is_told() -> None:
    given_NV = logits(3, 70)
    given_NV[1, 66] = torch.nan
    tokens_N, chosen_N, _ = draw_in_torch(given_NV, SETTINGS[:1] * 3, np.array([0.1, 0.999, 0.5]), 0)
    assert chosen_N.isnan().tolist() == [False, True, False]
    assert int(tokens_N.max()) < 70


def test_a_stream_depends_on_seed_and_index_alone() -> None:
    again = [random_stream(5, 1).random(4) for _ in range(2)]
    assert np.array_equal(*again)
    streams = [random_stream(seed, index).random() for seed in (0, 5, 2**64 - 1) for index in range(3)]
    assert len(set(streams)) == 9
    assert random_stream(-1, 0).random() == random_stream(2**64 - 1, 0).random()
