"""Triton kernels that draw a token from each of N rows of logits: what top-k and top-p leave, how likely
each block of it is, and the token.

A row's sums are added up in an order that follows from its own data.

Shapes: N rows, V vocabulary, B blocks of it.
"""

import triton
import triton.language as tl


@triton.jit
def _key(x):
    """An integer for each float, in their order."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _count(logits_V, warmth, highest, key, vocabulary, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Of all logits whose key is at least this: how many, or the sum of exp(logit - highest)."""
    total = tl.full((), 0.0, tl.float64)
    for at in range(0, vocabulary, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(logits_V + columns, mask=columns < vocabulary, other=float("-inf")) * warmth
        weights = tl.exp(x - highest) if MASS else tl.full((BLOCK,), 1.0, tl.float32)
        total += tl.sum(tl.where((columns < vocabulary) & (_key(x) >= key), weights, 0.0), 0)
    return total


@triton.jit
def _search(logits_V, warmth, highest, wanted, vocabulary, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of which `_count` is at least `wanted`, two bits of it with each reading."""
    key = tl.full((), -(1 << 31), tl.int32)
    for pair in range(16):
        unit = tl.full((), 1, tl.int32) << (30 - 2 * pair)
        first = tl.full((), 0.0, tl.float64)
        second = tl.full((), 0.0, tl.float64)
        third = tl.full((), 0.0, tl.float64)
        for at in range(0, vocabulary, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = tl.load(logits_V + columns, mask=inside, other=float("-inf")) * warmth
            weights = tl.exp(x - highest) if MASS else tl.full((BLOCK,), 1.0, tl.float32)
            weights = tl.where(inside, weights, 0.0)
            keys = _key(x)
            first += tl.sum(tl.where(keys >= key + unit, weights, 0.0), 0)
            second += tl.sum(tl.where(keys >= key + 2 * unit, weights, 0.0), 0)
            third += tl.sum(tl.where(keys >= key + 3 * unit, weights, 0.0), 0)
        steps = (first >= wanted).to(tl.int32) + (second >= wanted).to(tl.int32)
        key += unit * (steps + (third >= wanted).to(tl.int32))
    return key


@triton.jit
def narrow(
    logits_NV, warmth_N, top_k_N, top_p_N, least_N, last_N, vocabulary, stride, BLOCK: tl.constexpr
):  # fmt: skip
    """What top-k, then top-p leave of a row: the logits above `least`, and of those that equal it the ones
    up to the token `last`, as a stable sort would have it. (Everything: -inf, V.)"""
    row = tl.program_id(0).to(tl.int64)
    logits_V, warmth = logits_NV + row * stride, tl.load(warmth_N + row)
    top_k, top_p = tl.load(top_k_N + row), tl.load(top_p_N + row)
    if (top_k >= vocabulary) & (top_p >= 1):
        tl.store(least_N + row, float("-inf"))
        tl.store(last_N + row, vocabulary)
        return
    highest = tl.full((), float("-inf"), tl.float32)
    for at in range(0, vocabulary, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(logits_V + columns, mask=columns < vocabulary, other=float("-inf")) * warmth
        highest = tl.maximum(highest, tl.max(x, 0))
    key = tl.full((), -(1 << 31), tl.int32)
    ties = tl.full((), 1.0, tl.float64) * vocabulary  # how many of those that equal the least stay
    if top_k < vocabulary:
        key = _search(logits_V, warmth, highest, top_k, vocabulary, False, BLOCK)
        ties = top_k - _count(logits_V, warmth, highest, key + 1, vocabulary, False, BLOCK)
    if top_p < 1:
        total = _count(logits_V, warmth, highest, key, vocabulary, True, BLOCK)
        if top_k < vocabulary:
            above = _count(logits_V, warmth, highest, key + 1, vocabulary, True, BLOCK)
            total = above + ties * tl.exp(_value(key) - highest)
        wanted = top_p * total
        of_k = key
        key = _search(logits_V, warmth, highest, wanted, vocabulary, True, BLOCK)
        key = tl.maximum(tl.minimum(key, _key(highest)), of_k)
        above = _count(logits_V, warmth, highest, key + 1, vocabulary, True, BLOCK)
        needed = tl.ceil((wanted - above) / tl.exp(_value(key) - highest))
        needed = tl.maximum(needed, 1.0)  # the best token always stays
        ties = tl.where(key == of_k, tl.minimum(needed, ties), needed)
    seen = 0
    last = vocabulary
    for at in range(0, vocabulary, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        x = tl.load(logits_V + columns, mask=inside, other=float("-inf")) * warmth
        equal = (inside & (_key(x) == key)).to(tl.int32)
        number = seen + tl.cumsum(equal, 0)
        last = tl.minimum(last, tl.min(tl.where((equal > 0) & (number >= ties), columns, vocabulary), 0))
        seen += tl.sum(equal, 0)
    tl.store(least_N + row, _value(key))
    tl.store(last_N + row, last)


@triton.jit
def _kept(x, columns, least, last):
    """-inf where `narrow` left nothing. What is not a number stays, so that it is seen."""
    return tl.where((x < least) | ((x == least) & (columns > last)), float("-inf"), x)


@triton.jit
def summarise(
    logits_NV, warmth_N, least_N, last_N, most_NB, sums_NB, best_NB, vocabulary, stride, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every block of what is left of a row's logits times 1 / temperature: the largest, where it is, the
    sum of exp."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x = tl.load(logits_NV + row * stride + columns, mask=inside, other=float("-inf"))
    x = _kept(x * tl.load(warmth_N + row), columns, tl.load(least_N + row), tl.load(last_N + row))
    most = tl.max(x, 0)
    best = tl.min(tl.where(x == most, columns, vocabulary), 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    at = row * blocks + block
    tl.store(most_NB + at, most)
    tl.store(best_NB + at, best)
    tl.store(sums_NB + at, tl.sum(tl.where(inside, tl.exp(x - shift), 0.0), 0))


@triton.jit
def draw(
    logits_NV, warmth_N, uniform_N, least_N, last_N, most_NB, sums_NB, best_NB, tokens_N, logprobs_N,
    log_sums_N, vocabulary, stride, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A row's token by inverse CDF of its uniform number, or the likeliest one if that is negative, its
    logprob, and the log of the sum of exp."""
    row = tl.program_id(0).to(tl.int64)
    of_row = tl.arange(0, BLOCKS)
    exists = of_row < blocks
    most = tl.load(most_NB + row * blocks + of_row, mask=exists, other=float("-inf"))
    sums = tl.load(sums_NB + row * blocks + of_row, mask=exists, other=0.0)
    highest = tl.max(most, 0)
    masses = tl.where(exists & (most > float("-inf")), sums * tl.exp(most - highest), 0.0)
    total = tl.sum(tl.where(exists, sums * tl.exp(most - highest), 0.0), 0)
    uniform = tl.load(uniform_N + row)
    warmth = tl.load(warmth_N + row)
    if uniform < 0:
        block = tl.min(tl.where(most == highest, of_row, blocks - 1), 0)
        token = tl.load(best_NB + row * blocks + block)
    else:
        wanted = uniform * total
        reached = tl.cumsum(masses, 0)
        # Rounding may leave nothing beyond `wanted`: then the last that has any chance.
        last = tl.max(tl.where(masses > 0, of_row, 0), 0)
        block = tl.minimum(tl.min(tl.where((reached > wanted) & (masses > 0), of_row, BLOCKS), 0), last)
        rest = wanted - tl.sum(tl.where(of_row < block, masses, 0.0), 0)
        columns = tl.arange(0, BLOCK)
        inside = block * BLOCK + columns < vocabulary
        x = tl.load(logits_NV + row * stride + block * BLOCK + columns, mask=inside, other=float("-inf"))
        x = _kept(x * warmth, block * BLOCK + columns, tl.load(least_N + row), tl.load(last_N + row))
        chances = tl.where(inside, tl.exp(x - highest), 0.0)
        reached_here = tl.cumsum(chances, 0)
        last_here = tl.max(tl.where(chances > 0, columns, 0), 0)
        first_here = tl.min(tl.where((reached_here > rest) & (chances > 0), columns, BLOCK), 0)
        token = block * BLOCK + tl.minimum(first_here, last_here)
    token = tl.minimum(token, vocabulary - 1)
    log_sum = highest + tl.log(total)
    tl.store(tokens_N + row, token.to(tl.int64))
    tl.store(logprobs_N + row, tl.load(logits_NV + row * stride + token) * warmth - highest - tl.log(total))
    tl.store(log_sums_N + row, log_sum)
