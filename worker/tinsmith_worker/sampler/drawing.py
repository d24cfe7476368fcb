"""A token for each row of logits, its logprob, the likeliest tokens: by Triton's kernels, or in plain torch.

Shapes: N rows, V vocabulary, B blocks of it, K likeliest tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tinsmith_worker.copies import to_device
from tinsmith_worker.sampler.distribution import COLDEST, Filters, distribution, draw

# Tokens [N] and their logprobs [N]; then logprobs and ids [N, K] of the likeliest, where they are asked for.
Taken = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
# Temperature, top_k (-1: off) and top_p (1: off) of a row.
Setting = tuple[float, int, float]

# Columns of logits that a program reads at once, when it draws and when it looks for where to cut.
_BLOCK, _SEARCHED = 4096, 8192


def draw_in_torch(
    logits_NV: torch.Tensor, settings: Sequence[Setting], uniforms: np.ndarray, width: int
) -> Taken:
    filters = Filters.of(list(settings), logits_NV.shape[1], logits_NV.device)
    logprobs_NV = distribution(logits_NV, filters)
    uniform_N1 = to_device(uniforms[:, None], logits_NV.device)
    tokens_N1 = draw(logprobs_NV, uniform_N1, filters.greedy_N)
    chosen_N = logprobs_NV.gather(-1, tokens_N1)[:, 0]
    table = logprobs_NV.topk(min(width, logprobs_NV.shape[1]), dim=-1) if width else ()
    return tokens_N1[:, 0], chosen_N, tuple(table)


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
