"""A token for each row of logits, its logprob, the likeliest tokens: by Triton's kernels, or in plain torch.

Shapes: N rows, V vocabulary, B blocks of it, K likeliest tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tinsmith_worker.copies import to_device
from tinsmith_worker.sampler.distribution import COLDEST, Filters, distribution

# Tokens [N] and their logprobs [N]; then logprobs and ids [N, K] of the likeliest, where they are asked for.
Taken = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
# Temperature, top_k (-1: off) and top_p (1: off) of a row.
Setting = tuple[float, int, float]

# Columns of logits that a program reads at once, when it draws and when it looks for where to cut.
_BLOCK, _SEARCHED = 4096, 8192
# And of those that plain torch sums up first.
_LANES = 64


def draw_in_torch(
    logits_NV: torch.Tensor, settings: Sequence[Setting], uniforms: np.ndarray, width: int
) -> Taken:
    (_, vocabulary), device = logits_NV.shape, logits_NV.device
    x_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    if any(t not in (0, 1) for t, _, _ in settings):
        warmth = [1 / max(t, COLDEST) if t else 1.0 for t, _, _ in settings]
        x_NV *= to_device(np.array(warmth, np.float32), device)[:, None]
    cut = [row for row, (t, k, p) in enumerate(settings) if t and (0 < k < vocabulary or p < 1)]
    if cut:
        rows_M = to_device(np.array(cut), device)
        filters = Filters.of([settings[row] for row in cut], vocabulary, device)
        x_NV[rows_M] = distribution(logits_NV[rows_M], filters)
    chances_NV = x_NV.exp()
    tokens_N, total_N = _by_blocks(chances_NV, to_device(uniforms, device))
    tokens_N.clamp_(max=vocabulary - 1)  # where nothing is a number
    if greedy := [row for row, (t, _, _) in enumerate(settings) if not t]:
        rows_M = to_device(np.array(greedy), device)
        tokens_N[rows_M] = logits_NV[rows_M].argmax(-1)
    log_sum_N1 = total_N.log().float()[:, None]
    chosen_N1 = x_NV.gather(1, tokens_N[:, None]) - log_sum_N1
    if not width:
        return tokens_N, chosen_N1[:, 0], ()
    likeliest = x_NV.topk(min(width, vocabulary), dim=-1)
    return tokens_N, chosen_N1[:, 0], (likeliest.values - log_sum_N1, likeliest.indices)


def _by_blocks(chances_NV: torch.Tensor, uniform_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N] by inverse CDF of a uniform number each, and the sum of all chances: the block first, then
    the token in it, so that the chances are read once."""
    rows, vocabulary = chances_NV.shape
    blocks_NBX = F.pad(chances_NV, (0, -vocabulary % _LANES)).view(rows, -1, _LANES)
    reached_NB = blocks_NBX.sum(-1).double().cumsum(-1)
    total_N = reached_NB[:, -1]
    # Rounding must not carry it to where nothing is left.
    wanted_N1 = torch.minimum(uniform_N * total_N, total_N * (1 - 2**-52))[:, None]
    block_N1 = torch.searchsorted(reached_NB, wanted_N1, right=True).clamp_(max=reached_NB.shape[1] - 1)
    within_NX = blocks_NBX.gather(1, block_N1[:, :, None].expand(-1, -1, _LANES))[:, 0]
    rest_N1 = wanted_N1 - F.pad(reached_NB, (1, 0)).gather(1, block_N1)
    # A block's own sum may round otherwise: then its last token that has a chance.
    may_NX = within_NX > 0
    is_first_NX = may_NX & (within_NX.double().cumsum(-1) > rest_N1)
    last_N = _LANES - 1 - may_NX.flip(-1).byte().argmax(-1)
    lane_N = torch.where(is_first_NX.any(-1), is_first_NX.byte().argmax(-1), last_N)
    return block_N1[:, 0] * _LANES + lane_N, total_N


def draw_by_kernels(
    logits_NV: torch.Tensor, settings: Sequence[Setting], uniforms: np.ndarray, width: int
) -> Taken:
    """The same up to rounding. Nothing is sorted: top-k and top-p are a least logit, found bit by bit, and
    the last token of those that equal it."""
    from tinsmith_worker.sampler import draw_kernels as kernels

    (rows, vocabulary), device, stride = logits_NV.shape, logits_NV.device, logits_NV.stride(0)
    of_rows = [
        (1 / max(t, COLDEST), u, p) if t else (1.0, -1.0, 1.0)
        for (t, _, p), u in zip(settings, uniforms, strict=True)
    ]
    most_kept = [k if t and 0 < k < vocabulary else vocabulary for t, k, _ in settings]
    warmth_N, uniform_N, top_p_N = to_device(np.array(of_rows, np.float32).T.copy(), device)
    least_N = torch.full((rows,), -torch.inf, dtype=torch.float32, device=device)
    last_N = torch.full((rows,), vocabulary, dtype=torch.int32, device=device)
    is_narrowed = min(most_kept) < vocabulary or min(p for _, _, p in of_rows) < 1
    if is_narrowed:
        kernels.narrow[(rows,)](
            logits_NV, warmth_N, to_device(np.array(most_kept, np.int32), device), top_p_N, least_N, last_N,
            vocabulary, stride, BLOCK=_SEARCHED, num_warps=16,
        )  # fmt: skip
    blocks = -(-vocabulary // _BLOCK)
    most_NB, sums_NB = logits_NV.new_empty((2, rows, blocks))
    best_NB = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    tokens_N = torch.empty(rows, dtype=torch.int64, device=device)
    chosen_N, log_sums_N = logits_NV.new_empty((2, rows))
    kernels.summarise[(rows, blocks)](
        logits_NV, warmth_N, least_N, last_N, most_NB, sums_NB, best_NB, vocabulary, stride, blocks,
        BLOCK=_BLOCK,
    )  # fmt: skip
    kernels.draw[(rows,)](
        logits_NV, warmth_N, uniform_N, least_N, last_N, most_NB, sums_NB, best_NB, tokens_N, chosen_N,
        log_sums_N, vocabulary, stride, blocks,
        BLOCK=_BLOCK, BLOCKS=max(2, 1 << (blocks - 1).bit_length()), num_warps=8,
    )  # fmt: skip
    if not width:
        return tokens_N, chosen_N, ()
    scaled_NV = logits_NV * warmth_N[:, None]
    if is_narrowed:
        least_N1, ids_V = least_N[:, None], torch.arange(vocabulary, device=device)
        is_cut_NV = (scaled_NV < least_N1) | ((scaled_NV == least_N1) & (ids_V > last_N[:, None]))
        scaled_NV.masked_fill_(is_cut_NV, -torch.inf)
    scaled_NK, ids_NK = scaled_NV.topk(min(width, vocabulary), dim=-1)
    return tokens_N, chosen_N, (scaled_NK - log_sums_N[:, None], ids_NK)
