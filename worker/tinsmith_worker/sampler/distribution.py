"""From logits to the distribution a token is drawn from, and the drawing.

Shapes: N rows, M of them narrowed, V vocabulary, K draws of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch

# Streams of random numbers of one request: sample i has stream i, what is drawn for the prompt this one.
PROMPT_STREAM = 1 << 63

# Logits that differ at all in float32 differ by more; a smaller divisor could only make a NaN of 0 / 0.
COLDEST = 1e-7


def random_stream(seed: int, stream: int) -> np.random.Generator:
    """Uniform numbers that depend on (seed, stream) alone, both taken modulo 2^64.

    Philox is counter-based: streams of one seed do not overlap, and nothing is shared between requests.
    """
    mask = (1 << 64) - 1
    key = np.array([seed & mask, stream & mask], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class Filters:
    """How each of N rows is sampled. Tensors live where the logits do.

    greedy_N: temperature 0. temperature_N: 1 where greedy. cut_M: the rows that top-k or top-p narrow, with
    top_k_M (the vocabulary size where off) and top_p_M (1 where off).
    """

    greedy_N: torch.Tensor
    temperature_N: torch.Tensor
    cut_M: torch.Tensor
    top_k_M: torch.Tensor
    top_p_M: torch.Tensor

    @classmethod
    def of(cls, settings: list[tuple[float, int, float]], vocab_size: int, device: torch.device) -> "Filters":
        """settings: (temperature, top_k, top_p) of every row; top_k -1 and top_p 1 are off."""
        temperatures = [max(t, COLDEST) if t else 1.0 for t, _, _ in settings]
        temperature_N = torch.tensor(temperatures, dtype=torch.float32, device=device)
        greedy_N = torch.tensor([t == 0 for t, _, _ in settings], device=device)
        cut = [
            (row, k if k > 0 else vocab_size, p)
            for row, (t, k, p) in enumerate(settings)
            if t > 0 and (0 < k < vocab_size or p < 1)
        ]
        return cls(
            greedy_N=greedy_N,
            temperature_N=temperature_N,
            cut_M=torch.tensor([row for row, _, _ in cut], dtype=torch.int64, device=device),
            top_k_M=torch.tensor([k for _, k, _ in cut], dtype=torch.int64, device=device),
            top_p_M=torch.tensor([p for _, _, p in cut], dtype=torch.float64, device=device),
        )


def plain_logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    """[N, V]. Less is lost to rounding than in torch's log_softmax, and as little as the trainer loses."""
    shifted_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    return shifted_NV - shifted_NV.exp().sum(-1, keepdim=True).log()


def distribution(logits_NV: torch.Tensor, filters: Filters) -> torch.Tensor:
    """[N, V] logprobs after temperature, then top-k, then top-p (the order of Hugging Face's generate).

    -inf outside the support; it sums to one inside. A greedy row is the plain model's.
    """
    # The maximum is taken off first, or a small temperature would overflow.
    shifted_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)
    logprobs_NV = torch.log_softmax(shifted_NV / filters.temperature_N[:, None], dim=-1)
    if len(filters.cut_M):
        kept_MV = _cut(logprobs_NV[filters.cut_M], filters.top_k_M, filters.top_p_M)
        logprobs_NV[filters.cut_M] = kept_MV
    return logprobs_NV


def _cut(logprobs_MV: torch.Tensor, top_k_M: torch.Tensor, top_p_M: torch.Tensor) -> torch.Tensor:
    # A stable order: of equal logits, the lower token id is kept, always.
    sorted_MV, order_MV = logprobs_MV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(sorted_MV.shape[-1], device=sorted_MV.device)
    among_k_MV = rank_V < top_k_M[:, None]
    chances_MV = _chances(sorted_MV) * among_k_MV
    # The smallest set that reaches top_p of what top-k left; the best token always stays.
    wanted_M = (top_p_M * chances_MV.sum(dim=-1)).to(torch.int64)
    before_MV = chances_MV.cumsum(dim=-1) - chances_MV
    kept_MV = among_k_MV & ((before_MV < wanted_M[:, None]) | (top_p_M[:, None] >= 1) | (rank_V == 0))
    cut_MV = torch.full_like(logprobs_MV, -torch.inf)
    cut_MV.scatter_(-1, order_MV, sorted_MV.masked_fill(~kept_MV, -torch.inf))
    return torch.log_softmax(cut_MV, dim=-1)


def draw(logprobs_NV: torch.Tensor, uniform_NK: torch.Tensor, greedy_N: torch.Tensor) -> torch.Tensor:
    """[N, K] token ids by inverse CDF, one per uniform number in [0, 1); the likeliest where greedy."""
    cdf_NV = _chances(logprobs_NV).cumsum(dim=-1)
    total_N1 = cdf_NV[:, -1:]
    wanted_NK = torch.minimum((uniform_NK * total_N1).to(torch.int64), total_N1 - 1)
    tokens_NK = torch.searchsorted(cdf_NV, wanted_NK, right=True).clamp_(max=logprobs_NV.shape[-1] - 1)
    return torch.where(greedy_N[:, None], logprobs_NV.argmax(dim=-1, keepdim=True), tokens_NK)


def _chances(logprobs_NV: torch.Tensor) -> torch.Tensor:
    """Probabilities in units of 2^-53. Sums of integers do not depend on their order: a token without a
    chance is never drawn, and a GPU's parallel sums are the same each time."""
    return (logprobs_NV.double().exp_() * 2.0**53).to(torch.int64)
