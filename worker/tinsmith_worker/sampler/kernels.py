"""Triton kernels for a step that gives each of N sequences its next logits: attention over pages, and what
adapters add.

What changes from step to step they read from the device's memory, so that a recorded step (a CUDA graph) can
be replayed for other sequences and other adapters. All of them add up in an order that follows from a row's
own data.

Shapes: N rows, H query heads, G key/value heads, C channels of a head, I inputs and O outputs of a linear
map, R rank, S parts of a sum.
"""

import triton
import triton.language as tl


@triton.jit
def store(
    k_NGC, v_NGC, keys_EGC, values_EGC, tables_NW, positions_N, k_row, k_head, v_row, v_head, width, groups,
    CHANNELS: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write one key head of one row to its cell."""
    row, group, channels = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDE)
    mask = channels < CHANNELS
    position = tl.load(positions_N + row)
    page = tl.load(tables_NW + row * width + position // PAGE).to(tl.int64)
    cell = ((page * PAGE + position % PAGE) * groups + group) * CHANNELS + channels
    k = tl.load(k_NGC + row * k_row + group * k_head + channels, mask=mask, other=0.0)
    tl.store(keys_EGC + cell, k, mask=mask)
    v = tl.load(v_NGC + row * v_row + group * v_head + channels, mask=mask, other=0.0)
    tl.store(values_EGC + cell, v, mask=mask)


@triton.jit
def attend(
    q_NHC, keys_EGC, values_EGC, tables_NW, positions_N, parts_NHSC, sums_NHS,
    scale, q_row, q_head, width, groups,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    LEAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One part of what one row sees, for the HEADS query heads of one key head. `sums` is log2 of the sum of
    exp2, -inf where a part is empty."""
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seen = tl.load(positions_N + row) + 1
    step = tl.cdiv(tl.cdiv(seen, SPLITS), LEAST) * LEAST
    start = part * step
    heads, channels, block = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    is_head, is_channel = heads < HEADS, channels < CHANNELS
    head = group * HEADS + heads
    sum_at = sums_NHS + (row * groups * HEADS + head) * SPLITS + part
    if start >= seen:
        tl.store(sum_at, tl.full((ROWS,), float("-inf"), tl.float32), mask=is_head)
        return
    of_heads = is_head[:, None] & is_channel[None, :]
    q = tl.load(q_NHC + row * q_row + head[:, None] * q_head + channels[None, :], mask=of_heads, other=0.0)
    in_bits = scale * 1.4426950408889634  # exp2 is what the hardware has
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE), tl.float32)
    stop = tl.minimum(start + step, seen)
    for at in range(start, stop, BLOCK):
        positions = at + block
        inside = positions < stop
        page = tl.load(tables_NW + row * width + positions // PAGE, mask=inside, other=0).to(tl.int64)
        cells = ((page * PAGE + positions % PAGE) * groups + group) * CHANNELS
        where = cells[:, None] + channels[None, :]
        kept = inside[:, None] & is_channel[None, :]
        k = tl.load(keys_EGC + where, mask=kept, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * in_bits
        scores = tl.where(inside[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        fade = tl.exp2(most - now)
        weights = tl.exp2(scores - now[:, None])
        v = tl.load(values_EGC + where, mask=kept, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        most = now
    tl.store(sum_at, most + tl.log2(total), mask=is_head)
    part_at = parts_NHSC + ((row * groups * HEADS + head) * SPLITS + part)[:, None] * CHANNELS
    tl.store(part_at + channels[None, :], mixed / total[:, None], mask=of_heads)


@triton.jit
def join_parts(
    parts_NHSC, sums_NHS, out_NHC,
    CHANNELS: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The parts of one head of one row, by their weight."""
    at = tl.program_id(0).to(tl.int64)
    parts, channels = tl.arange(0, MOST), tl.arange(0, WIDE)
    sums = tl.load(sums_NHS + at * SPLITS + parts, mask=parts < SPLITS, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    weights = weights / tl.sum(weights, 0)
    mask = (sums > float("-inf"))[:, None] & (channels < CHANNELS)[None, :]
    where = parts_NHSC + (at * SPLITS + parts)[:, None] * CHANNELS + channels[None, :]
    mixed = tl.sum(tl.load(where, mask=mask, other=0.0) * weights[:, None], 0)
    # A row whose numbers are not finite must not pass for one that is.
    mixed = tl.where(tl.sum(weights, 0) > 0, mixed, float("nan"))
    tl.store(out_NHC + at * CHANNELS + channels, mixed.to(out_NHC.dtype.element_ty), mask=channels < CHANNELS)


@triton.jit
def shrink(
    x_NI, u_SNX, anchor, places_A, tiles, count, ranks, scales, inputs, stride, part_stride, members, span,
    STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """u = scale * x Aᵀ over a part of the inputs, for every LANES-th tile of at most ROWS rows of one
    adapter."""
    part = tl.program_id(2)
    offsets, columns_, depth = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    for tile in range(tl.program_id(0), tl.load(count), LANES):
        start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
        adapter = tl.load(tiles + 3 * tile + 2)
        place = tl.load(places_A + adapter)
        width = tl.load(ranks + adapter) * STEP * members
        scale = tl.load(scales + adapter)
        weight = anchor + place * 16
        rows = start + offsets
        for first in range(tl.program_id(1) * WIDTH, width, WIDTH * tl.num_programs(1)):
            if place > -(1 << 60):
                columns = first + columns_
                total = tl.zeros((ROWS, WIDTH), tl.float32)
                for at in range(part * span, tl.minimum(part * span + span, inputs), DEPTH):
                    within = at + depth < inputs
                    x = tl.load(
                        x_NI + rows[:, None] * inputs + (at + depth)[None, :],
                        mask=(rows < stop)[:, None] & within[None, :], other=0.0,
                    )  # fmt: skip
                    w = tl.load(
                        weight + columns[None, :] * inputs + (at + depth)[:, None],
                        mask=within[:, None] & (columns < width)[None, :], other=0.0,
                    )  # fmt: skip
                    total = tl.dot(x, w, total, input_precision="ieee")
                where = u_SNX + part * part_stride + rows[:, None] * stride + columns[None, :]
                tl.store(where, total * scale, mask=(rows < stop)[:, None] & (columns < width)[None, :])


@triton.jit
def fold(u_SNX, u_NX, columns, stride, part_stride, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the parts that `shrink` left, in the dtype in which adapters are multiplied."""
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(u_SNX + part * part_stride + row * stride + at, mask=at < columns, other=0.0)
    tl.store(u_NX + row * stride + at, total.to(u_NX.dtype.element_ty), mask=at < columns)


@triton.jit
def expand(
    u_NX, y_NO, anchor, places_MA, blocks, tiles, count, ranks, adapters, outputs, stride,
    STEP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y += u Bᵀ in WIDTH columns of one member: `blocks` says which, and where they are in B and in y."""
    block = tl.program_id(0)
    member, of_member = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    of_all, size = tl.load(blocks + 4 * block + 2), tl.load(blocks + 4 * block + 3)
    offsets, columns, depth = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    for tile in range(tl.program_id(1), tl.load(count), LANES):
        start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
        adapter = tl.load(tiles + 3 * tile + 2)
        place = tl.load(places_MA + (1 + member) * adapters + adapter)
        rank = tl.load(ranks + adapter) * STEP
        rows = start + offsets
        if place > -(1 << 60):
            weight = anchor + place * 16
            y_at = y_NO + rows[:, None] * outputs + (of_all + columns)[None, :]
            mask = (rows < stop)[:, None] & (columns < size)[None, :]
            total = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
            for at in range(0, rank, DEPTH):
                within = at + depth < rank
                u = tl.load(
                    u_NX + rows[:, None] * stride + (member * rank + at + depth)[None, :],
                    mask=(rows < stop)[:, None] & within[None, :], other=0.0,
                )  # fmt: skip
                w = tl.load(
                    weight + (of_member + columns)[None, :] * rank + (at + depth)[:, None],
                    mask=within[:, None] & (columns < size)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(u, w, total, input_precision="ieee")
            tl.store(y_at, total.to(y_NO.dtype.element_ty), mask=mask)
