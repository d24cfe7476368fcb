"""Triton kernels for what adapters add to the base's products, for the head's slopes and for AdamW.

They run on CUDA (and anywhere in Triton's interpreter). All of them add up in an order that follows from the
adapter's own rows alone: packed with others or alone, the bits are the same.

An adapter's matrices are found by their place: how many times 16 elements they lie from an anchor tensor.
Told so, the compiler knows that they are aligned and loads 16 bytes at a time.

Shapes: N rows, I inputs or outputs of a linear map, R rank, M members of a group of maps, V vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def _pick(member, first, second, third):
    found = first
    if member == 1:
        found = second
    if member == 2:
        found = third
    return found


@triton.jit(do_not_specialize=["adapters"])
def shrink(
    x0, x1, x2, u_NR, anchor, places, adapters, tiles, ranks, scales, width0, width1, width2, stride,
    OF_A: tl.constexpr, MEMBERS: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """u = scale * x Aᵀ (OF_A), the As of all members being one [members * R, I]; or scale * dy B of each
    member, B being [O, R]. One tile of rows."""
    tile = tl.program_id(0)
    start, stop, adapter = (
        tl.load(tiles + 3 * tile),
        tl.load(tiles + 3 * tile + 1),
        tl.load(tiles + 3 * tile + 2),
    )
    if adapter < 0:
        return
    rank = tl.load(ranks + adapter) * STEP
    member = tl.program_id(2)
    if OF_A:
        width = rank * MEMBERS
        place = places + adapter
    else:
        width = rank
        place = places + (1 + member) * adapters + adapter
    first = tl.program_id(1) * WIDTH
    if first >= width:
        return
    if MEMBERS > 1 and not OF_A:
        x_NI = _pick(member, x0, x1, x2)
        inputs = _pick(member, width0, width1, width2)
    else:
        x_NI = x0
        inputs = width0
    weight = anchor + tl.load(place) * 16
    rows = start + tl.arange(0, ROWS)
    columns = first + tl.arange(0, WIDTH)
    depth = tl.arange(0, DEPTH)
    x_rows = x_NI + rows[:, None].to(tl.int64) * inputs
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(0, inputs, DEPTH):
        within = at + depth < inputs
        x = tl.load(x_rows + at + depth[None, :], mask=(rows < stop)[:, None] & within[None, :], other=0.0)
        if OF_A:
            pointers = weight + columns[None, :] * inputs + (at + depth)[:, None]
        else:
            pointers = weight + (at + depth)[:, None] * rank + columns[None, :]
        w = tl.load(pointers, mask=within[:, None] & (columns < width)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    total *= tl.load(scales + adapter)
    pointers = u_NR + rows[:, None].to(tl.int64) * stride + member * rank + columns[None, :]
    tl.store(
        pointers, total.to(u_NR.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < width)[None, :]
    )


@triton.jit(do_not_specialize=["adapters"])
def expand(
    u_NR, y0, y1, y2, bias0, bias1, bias2, anchor, places, adapters, tiles, ranks, width0, width1, width2,
    stride,
    OF_A: tl.constexpr, MEMBERS: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = u Bᵀ + bias of each member; or du A of all (OF_A). Rows without an adapter get the bias alone."""
    tile = tl.program_id(1)
    start, stop, adapter = (
        tl.load(tiles + 3 * tile),
        tl.load(tiles + 3 * tile + 1),
        tl.load(tiles + 3 * tile + 2),
    )
    if OF_A:
        member = 0
        y_NO = y0
        outputs = width0
    else:
        member = tl.program_id(2)
        y_NO = _pick(member, y0, y1, y2)
        outputs = _pick(member, width0, width1, width2)
    block = tl.program_id(0)
    if block * WIDTH >= outputs:
        return
    rows = start + tl.arange(0, ROWS)
    columns = block * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if adapter >= 0:
        rank = tl.load(ranks + adapter) * STEP
        if OF_A:
            width = rank * MEMBERS
            place = places + adapter
        else:
            width = rank
            place = places + (1 + member) * adapters + adapter
        weight = anchor + tl.load(place) * 16
        depth = tl.arange(0, DEPTH)
        u_rows = u_NR + rows[:, None].to(tl.int64) * stride + member * rank
        for at in range(0, width, DEPTH):
            within = at + depth < width
            u = tl.load(
                u_rows + at + depth[None, :], mask=(rows < stop)[:, None] & within[None, :], other=0.0
            )
            if OF_A:
                pointers = weight + (at + depth)[:, None] * outputs + columns[None, :]
            else:
                pointers = weight + columns[None, :] * rank + (at + depth)[:, None]
            w = tl.load(pointers, mask=within[:, None] & (columns < outputs)[None, :], other=0.0)
            total = tl.dot(u, w, total, input_precision="ieee")
    if BIAS0 and member == 0:
        total += tl.load(bias0 + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    if BIAS1 and member == 1:
        total += tl.load(bias1 + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    if BIAS2 and member == 2:
        total += tl.load(bias2 + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    pointers = y_NO + rows[:, None].to(tl.int64) * outputs + columns[None, :]
    tl.store(
        pointers, total.to(y_NO.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < outputs)[None, :]
    )


@triton.jit(do_not_specialize=["adapters"])
def correlate(
    narrow_NR, wide0, wide1, wide2, anchor, partial, places, adapters, chunks, ranks, width0, width1, width2,
    stride, room, OF_A: tl.constexpr, MEMBERS: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """gradient += duᵀ x of all As as one [members * R, I] (OF_A), or dyᵀ u of each member's B [O, R], over a
    chunk of one adapter's rows.

    Where an adapter has several chunks (their slots are not negative), each is left in `partial` for `fold`,
    laid out as the group's matrices are in the gradient.
    """
    chunk = tl.program_id(1)
    start, stop = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1)
    adapter, slot = tl.load(chunks + 4 * chunk + 2), tl.load(chunks + 4 * chunk + 3)
    rank = tl.load(ranks + adapter) * STEP
    group = tl.load(places + adapter)
    if OF_A:
        member = 0
        first = tl.program_id(2) * DEPTH
        wide_NI = wide0
        inputs = width0
        width = rank * MEMBERS
        place = group
    else:
        member = tl.program_id(2) % MEMBERS
        first = tl.program_id(2) // MEMBERS * DEPTH
        wide_NI = _pick(member, wide0, wide1, wide2)
        inputs = _pick(member, width0, width1, width2)
        width = rank
        place = tl.load(places + (1 + member) * adapters + adapter)
    block = tl.program_id(0)
    if (first >= width) | (block * WIDTH >= inputs):
        return
    across = first + tl.arange(0, DEPTH)
    columns = block * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((DEPTH, WIDTH), tl.float32)
    for at in range(start, stop, ROWS):
        rows = at + tl.arange(0, ROWS)
        inside = rows < stop
        narrow = tl.load(
            narrow_NR + rows[:, None].to(tl.int64) * stride + member * rank + across[None, :],
            mask=inside[:, None] & (across < width)[None, :],
            other=0.0,
        )
        wide = tl.load(
            wide_NI + rows[:, None].to(tl.int64) * inputs + columns[None, :],
            mask=inside[:, None] & (columns < inputs)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(narrow), wide, total, input_precision="ieee")
    if OF_A:
        at_ = across[:, None] * inputs + columns[None, :]
        mask = (across < width)[:, None] & (columns < inputs)[None, :]
    else:
        total = tl.trans(total)
        at_ = columns[:, None] * rank + across[None, :]
        mask = (columns < inputs)[:, None] & (across < width)[None, :]
    if slot < 0:
        target = anchor + place * 16
        total += tl.load(target + at_, mask=mask, other=0.0)
        tl.store(target + at_, total, mask=mask)
    else:
        target = partial + slot.to(tl.int64) * room + (place - group) * 16
        tl.store(target + at_, total, mask=mask)


@triton.jit(do_not_specialize=["adapters"])
def fold(
    partial, anchor, places, adapters, spans, ranks, last_width, room,
    MEMBERS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient += the partial sums of an adapter's chunks, one after the other, for all matrices of a group:
    from the first A to the end of the last B, which has `last_width` rows."""
    span = tl.program_id(1)
    adapter, first, stop = (
        tl.load(spans + 3 * span),
        tl.load(spans + 3 * span + 1),
        tl.load(spans + 3 * span + 2),
    )
    group = tl.load(places + adapter)
    last = tl.load(places + MEMBERS * adapters + adapter)
    elements = (last - group) * 16 + tl.load(ranks + adapter) * STEP * last_width
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < elements:
        target = anchor + group * 16 + at
        total = tl.load(target, mask=at < elements, other=0.0)
        parts = partial + first.to(tl.int64) * room + at
        for _ in range(first, stop):
            total += tl.load(parts, mask=at < elements, other=0.0)
            parts += room
        tl.store(target, total, mask=at < elements)


@triton.jit
def log_sums(logits_NV, maxima_N, sums_N, vocabulary, BLOCK: tl.constexpr):
    """Every row's maximum, and log of the sum of exp of what is left without it, in one reading."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, vocabulary, BLOCK):
        logits = tl.load(
            logits_NV + row * vocabulary + at + columns, mask=at + columns < vocabulary, other=float("-inf")
        )
        now = tl.maximum(most, logits)
        shift = tl.where(now == float("-inf"), 0.0, now)  # -inf - -inf is not a number
        total = total * tl.exp(most - shift) + tl.exp(logits - shift)
        most = now
    # max passes over what is not a number, the sum does not.
    highest = tl.max(most, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(maxima_N + row, shift)
    tl.store(sums_N + row, tl.log(tl.sum(total * tl.exp(most - shift), 0)))


@triton.jit(do_not_specialize=["width"])
def logit_slopes(
    logits_NV, sums_N, targets_NK, slopes_NK, dlogits_NV, vocabulary, width, BLOCK: tl.constexpr
):
    """dL/dlogits = onehot(target) * slope - softmax * sum of slopes."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    logits = tl.load(logits_NV + row * vocabulary + columns, mask=inside, other=0.0)
    softmax = tl.exp(logits - tl.load(sums_N + row))
    total = 0.0
    hit = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, width):
        slope = tl.load(slopes_NK + row * width + k)
        hit += tl.where(columns == tl.load(targets_NK + row * width + k), slope, 0.0)
        total += slope
    tl.store(
        dlogits_NV + row * vocabulary + columns,
        (hit - softmax * total).to(dlogits_NV.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def adamw(
    weights, compute, gradient, moment1, moment2, norm, elements,
    decay, beta1, beta2, step_size, root_of_correction2, eps, clip,
    HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step on flat buffers: clip, AdamW, refresh the copy, zero the gradient. A norm that is not finite
    changes nothing but the gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    length = tl.load(norm)
    if tl.abs(length) < float("inf"):
        g = tl.load(gradient + at, mask=inside, other=0.0)
        if clip > 0:
            g *= tl.minimum(clip / (length + 1e-6), 1.0)
        m = tl.load(moment1 + at, mask=inside, other=0.0)
        v = tl.load(moment2 + at, mask=inside, other=0.0)
        w = tl.load(weights + at, mask=inside, other=0.0)
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + g * g * (1 - beta2)
        w = w * decay - step_size * (m / (tl.sqrt(v) / root_of_correction2 + eps))
        tl.store(weights + at, w, mask=inside)
        tl.store(moment1 + at, m, mask=inside)
        tl.store(moment2 + at, v, mask=inside)
        if HAS_COPY:
            tl.store(compute + at, w.to(compute.dtype.element_ty), mask=inside)
    tl.store(gradient + at, tl.zeros((BLOCK,), tl.float32), mask=inside)
