"""Triton kernels of the family `attention`: block-causal attention and its kin, forward and backward.

The mask is the lengths of at most 32 scales. Each program adds them up itself, finds for every row of its tile where
what it sees ends (or, for keys, where those who see them begin) and runs through whole tiles without a mask, then
through the few that a boundary crosses; the kernel of the keys masks all that it runs through. Scores live in
registers, sums in float32. Every sum has one order, so runs are bit-equal.

With a table (`sees`, of the keys `seen_by`), which is a switch fixed when a kernel is compiled, each row has a few
ranges of its own, and the same loops run once a range, with a mask at both its ends. With `offsets` besides, the rows
are several images one after another: a program serves a tile of one of them, counted from its first token, so that each
comes out bit for bit as it does alone.

The backward is two kernels: one a query tile (dq, and delta = rowsum(dout out) - dlse on the way), one a key tile
(dk and dv, over all query heads that share the key head). Each forms the scores again: 7 products where one kernel
with atomics needs 5.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "attention_backward", "attention_forward"]

MAX_SCALES = 32
_MAX_SCALES = tl.constexpr(MAX_SCALES)
UNIT = 8  # elements that strides are counted in: 16 bytes or more, so that every load may take as many
_UNIT = tl.constexpr(UNIT)
_FAR = tl.constexpr(2**30)  # beyond all tokens; a few steps more still fit 32 bits, as a pipelined loop counts them
_LEAST = tl.constexpr(-1e38)  # below every score
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_IMAGES = tl.constexpr(32)  # looked at in one step

# Sizes and strides, none of which is to be compiled in.
_SCALARS = [
    *("queries", "keys", "heads", "share", "rows", "group", "images", "ranges", "scales", "prefix"),
    *(f"{name}_{step}" for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
      for step in ("batch", "head", "row")),
]  # fmt: skip


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a program holds (`held` rows of queries, or of keys) and what it passes by at a time (`passed` rows).

    Without spills, also where rows have several ranges, which takes registers. On Hopper as `python -m bench tune
    attention` found them for schedules, at a shape of 64 and one of 128 channels; elsewhere the largest.
    """

    held: int
    passed: int
    warps: int
    stages: int


def _roomy(capability: int) -> bool:
    """Whether a block may have 227 KB of shared memory: Hopper and Blackwell, but not the latter's consumer cards."""
    return 90 <= capability < 120


def forward_tile(width: int, itemsize: int, capability: int, one_range: bool = True) -> Tile:
    """Tile of the forward kernel: queries held, keys passed."""
    if itemsize == 4:
        if not one_range and width > 64:
            return Tile(32, 16, 8, 2)
        return Tile(32, 32, 8, 2)
    if width <= 64:
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3) if _roomy(capability) else Tile(128, 32, 8, 3)


def query_tile(width: int, itemsize: int, capability: int, one_range: bool = True) -> Tile:
    """Tile of the backward kernel of the queries: queries held, keys passed."""
    if itemsize == 4:
        return Tile(32, 32, 8, 2) if width <= 64 else Tile(16, 16, 8, 1)
    if width <= 64:
        return Tile(64, 64, 4, 3) if _roomy(capability) else Tile(128, 64, 8, 2)
    return Tile(128, 64, 8, 3) if _roomy(capability) and one_range else Tile(64, 64, 8, 2)


def key_tile(width: int, itemsize: int, capability: int, one_range: bool = True) -> Tile:
    """Tile of the backward kernel of the keys: keys held, queries passed. Padded channels cost registers for masks."""
    if itemsize == 4:
        return Tile(32, 32, 8, 2) if width <= 64 else Tile(16, 16, 8, 2)
    if width <= 64:
        return Tile(64, 32, 4, 2) if _roomy(capability) else Tile(128, 32, 8, 2 if one_range else 1)
    if _roomy(capability) and not one_range:
        return Tile(64, 32, 8, 1)
    if _roomy(capability):
        # (64, 32, 4, 2) takes 23 % less time at 128 channels, but spills.
        return Tile(64, 32, 8, 1) if width != _block(width) else Tile(64, 64, 8, 2)
    return Tile(64, 32, 8, 2)


# ---- where scales begin and end --------------------------------------------------------------------------------------


@triton.jit
def _begins(lengths, scales, prefix):
    """First token of each scale [32]; of scales that are not there, a place that no token has."""
    at = tl.arange(0, _MAX_SCALES)
    length = tl.load(lengths + at, mask=at < scales, other=0).to(tl.int32)
    return tl.where(at < scales, prefix + tl.cumsum(length, 0) - length, _FAR)


@triton.jit
def _ends_of(begins, position, keys):
    """End of what each position sees: the next boundary, or the last key's end."""
    later = tl.where(begins[None, :] > position[:, None], begins[None, :], keys)
    return tl.minimum(tl.min(later, 1), keys)


@triton.jit
def _begins_of(begins, position):
    """First position that sees each position: the boundary at or before it, or 0."""
    earlier = tl.where(begins[None, :] <= position[:, None], begins[None, :], 0)
    return tl.maximum(tl.max(earlier, 1), 0)


@triton.jit
def _range_of(table, tokens, token, index):
    """Begin and end of a range of what each token sees, or is seen by; an empty one is from afar to 0."""
    at = table + 2 * index * tokens.to(tl.int64) + token
    begin, end = tl.load(at), tl.load(at + tokens)
    return tl.where(begin < end, begin, _FAR), tl.where(begin < end, end, 0)


@triton.jit
def _steps(begin, end, BLOCK: tl.constexpr):
    """(first, whole, part, last) for the ranges of a tile's rows: from `whole` to `part` every row sees every key.

    All of them are whole steps of BLOCK from `first`, but for the last.
    """
    first, last = tl.min(begin, 0), tl.max(end, 0)
    latest = tl.max(tl.where(begin < end, begin, 0), 0)
    whole = first + tl.cdiv(tl.maximum(latest - first, 0), BLOCK) * BLOCK
    part = whole + tl.maximum(tl.min(end, 0) - whole, 0) // BLOCK * BLOCK
    return first, whole, part, last


@triton.jit
def _place(tiles, rows, group):
    """(rank of a tile, row of heads) of this program.

    Groups of `group` heads, whose keys and values stay in L2, go one after another; within a group the first rank of
    all its heads goes first.
    """
    program = tl.program_id(0)
    first = program // (group * tiles) * group
    size = tl.minimum(group, rows - first)
    within = program - first * tiles
    return within // size, first + within % size


@triton.jit
def _place_in_images(offsets, images, tokens, rows, group, BLOCK: tl.constexpr):
    """(tile, image's first token, its end, row of heads) of this program.

    Like `_place`, with slots in place of tiles. The slots of an image begin at first // BLOCK + image, which leaves
    room for all its tiles without counting those of others; a slot that is left over has a tile behind the end.
    """
    slot, row = _place(tokens // BLOCK + images, rows, group)
    found = tl.zeros([_IMAGES], tl.int32)
    for at in range(0, images, _IMAGES):
        image = at + tl.arange(0, _IMAGES)
        first = tl.minimum(tl.load(offsets + image, mask=image < images, other=0), tokens)
        found += ((first // BLOCK + image <= slot) & (image < images)).to(tl.int32)
    image = tl.sum(found, 0) - 1
    first = tl.minimum(tl.load(offsets + image), tokens)
    end = tl.minimum(tl.load(offsets + image + 1, mask=image + 1 < images, other=tokens), tokens)
    tile = slot - first // BLOCK - image
    return tile, first, end, row


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _exponential(scores, factor, shift, PRECISION: tl.constexpr):
    """exp(softmax_scale scores - shift), with factor and shift as `_in_base` makes them.

    One multiplication fewer in base 2, which moves large scores by a rounding that half precision does not see.
    """
    if PRECISION == "tf32x3":
        return tl.exp2((scores * factor - shift) * _LOG2_E)
    else:
        return tl.exp2(scores * factor - shift)


@triton.jit
def _in_base(value, PRECISION: tl.constexpr):
    """From natural exponents to those of `_exponential`."""
    if PRECISION == "tf32x3":
        return value
    else:
        return value * _LOG2_E


@triton.jit
def _take(at, row, rows, channel, CHECK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Loads rows by channels, or channels by rows if `row` and `channel` come that way round; 0 outside."""
    WHOLE: tl.constexpr = channel.shape[0] * channel.shape[1] == WIDTH
    if CHECK_ROWS and WHOLE:
        return tl.load(at, mask=row < rows, other=0.0)
    elif CHECK_ROWS:
        return tl.load(at, mask=(row < rows) & (channel < WIDTH), other=0.0)
    elif WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=channel < WIDTH, other=0.0)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _visible(key, first, end):
    if first is None:
        return key < end[:, None]
    else:
        return (key >= first[:, None]) & (key < end[:, None])


@triton.jit
def _pass_keys(
    total, top, weight, held, k_at, v_at, key, keys, first, end, channel, factor,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: (weighted sum, largest score, sum of weights) with a tile of keys more.

    `first` is None where every row sees from the first key on.
    """
    k = _take(k_at, key[None, :], keys, channel[:, None], MASKED, WIDTH)
    scores = tl.dot(held, k, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(_visible(key[None, :], first, end), scores * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        if first is not None:  # a row may have seen nothing yet: no difference of infinities
            new_top = tl.maximum(new_top, _LEAST)
        weights = _exponential(scores, 1.0, new_top[:, None], PRECISION)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = _exponential(scores, factor, new_top[:, None], PRECISION)
    fade = _exponential(top, 1.0, new_top, PRECISION)
    weight = weight * fade + tl.sum(weights, 1)
    v = _take(v_at, key[:, None], keys, channel[None, :], MASKED, WIDTH)
    total = _dot(weights.to(v.dtype), v, total * fade[:, None], PRECISION)
    return total, new_top, weight


@triton.jit(do_not_specialize=_SCALARS)
def attention_forward_kernel(
    q,  # [batch, heads, queries, width], strides q_batch, q_head, q_row in units, 1
    k,  # [batch, heads / share, keys, width]
    v,  # like k
    lengths,  # [scales] int32 or int64; not looked at with a table
    sees,  # [ranges, 2, keys] int32: begins and ends of the keys that each token sees; None: to the end of its scale
    offsets,  # [images] int32: first token of each, with a table and as many queries as keys; None: one image
    out,  # like q
    lse,  # [batch, heads, queries] float32, contiguous
    queries,
    keys,
    heads,
    share,  # query heads a key head
    rows,  # batch * heads
    group,
    images,
    ranges,
    scales,
    prefix,
    softmax_scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,  # 1, or 0 for as many as `ranges` says
):
    """Grid: (tiles of queries * batch * heads,), with offsets (slots of `_place_in_images` * batch * heads,).

    The last tiles see most keys, and go first.
    """
    if offsets is None:
        tiles = tl.cdiv(queries, BLOCK_M)
        rank, row = _place(tiles, rows, group)
        query = (tiles - 1 - rank) * BLOCK_M + tl.arange(0, BLOCK_M)
        query_end, key_end = queries, keys
    else:
        tile, origin, query_end, row = _place_in_images(offsets, images, queries, rows, group, BLOCK_M)
        tiles = tl.cdiv(query_end - origin, BLOCK_M)
        if tile >= tiles:
            return
        query = origin + (tiles - 1 - tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        key_end = query_end
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    k += (batch * k_batch + head // share * k_head) * _UNIT
    v += (batch * v_batch + head // share * v_head) * _UNIT
    q += (batch * q_batch + head * q_head) * _UNIT
    out += (batch * out_batch + head * out_head) * _UNIT

    wide = query.to(tl.int64)[:, None] * _UNIT
    channel = tl.arange(0, BLOCK_D)
    q_at = q + wide * q_row + channel[None, :]
    held = _take(q_at, query[:, None], query_end, channel[None, :], True, WIDTH)

    factor = _in_base(softmax_scale, PRECISION)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = tl.arange(0, BLOCK_N)
    k_from = k + (key.to(tl.int64) * _UNIT)[None, :] * k_row + channel[:, None]
    v_from = v + (key.to(tl.int64) * _UNIT)[:, None] * v_row + channel[None, :]
    for index in range(RANGES if RANGES else ranges):
        if sees is None:
            position = tl.minimum(query + keys - queries, keys - 1)
            first, end = None, _ends_of(_begins(lengths, scales, prefix), position, keys)
            whole, part, last = 0, tl.min(end, 0) // BLOCK_N * BLOCK_N, tl.max(end, 0)
            k_at, v_at = k_from, v_from
        else:
            token = tl.minimum(query, query_end - 1) + keys - queries
            first, end = _range_of(sees, keys, token, index)
            begin, whole, part, last = _steps(first, end, BLOCK_N)
            k_at = k_from + begin.to(tl.int64) * _UNIT * k_row
            v_at = v_from + begin.to(tl.int64) * _UNIT * v_row
            for head_at in range(begin, whole, BLOCK_N):
                total, top, weight = _pass_keys(
                    total, top, weight, held, k_at, v_at, head_at + key, key_end, first, end, channel, factor,
                    True, WIDTH, PRECISION,
                )  # fmt: skip
                k_at += BLOCK_N * _UNIT * k_row
                v_at += BLOCK_N * _UNIT * v_row
        for _ in range(whole, part, BLOCK_N):
            total, top, weight = _pass_keys(
                total, top, weight, held, k_at, v_at, key, key_end, first, end, channel, factor, False, WIDTH, PRECISION
            )
            k_at += BLOCK_N * _UNIT * k_row
            v_at += BLOCK_N * _UNIT * v_row
        for tail_at in range(part, last, BLOCK_N):
            total, top, weight = _pass_keys(
                total, top, weight, held, k_at, v_at, tail_at + key, key_end, first, end, channel, factor,
                True, WIDTH, PRECISION,
            )  # fmt: skip
            k_at += BLOCK_N * _UNIT * k_row
            v_at += BLOCK_N * _UNIT * v_row

    inside = query < query_end
    log_sum = top + tl.log(weight) if PRECISION == "tf32x3" else (top + tl.log2(weight)) * _LN_2
    tl.store(lse + row.to(tl.int64) * queries + query, log_sum, mask=inside)
    out_at = out + wide * out_row + channel[None, :]
    total = total / weight[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside[:, None] & (channel < WIDTH)[None, :])


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _pass_keys_back(
    total, held, grad, lse, delta, k_at, v_at, key, keys, first, end, channel, factor,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a query tile (but for the factor) with a tile of keys more; `first` as in `_pass_keys`."""
    k = _take(k_at, key[:, None], keys, channel[None, :], MASKED, WIDTH)
    v = _take(v_at, key[:, None], keys, channel[None, :], MASKED, WIDTH)
    scores = tl.dot(held, tl.trans(k), input_precision=PRECISION)
    weights = _exponential(scores, factor, lse[:, None], PRECISION)
    if MASKED:
        weights = tl.where(_visible(key[None, :], first, end), weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    return _dot(grad_scores.to(k.dtype), k, total, PRECISION)


@triton.jit(do_not_specialize=_SCALARS)
def attention_backward_queries_kernel(
    grad,  # [batch, heads, queries, width], strides grad_batch, grad_head, grad_row in units, 1
    grad_lse,  # [batch, heads, queries] float32, contiguous, or None
    q,  # like grad
    k,  # [batch, heads / share, keys, width]
    v,  # like k
    out,  # like grad
    lse,  # [batch, heads, queries] float32, contiguous
    lengths,  # as forward
    sees,  # as forward
    offsets,  # as forward
    delta,  # [batch, heads, queries] float32, contiguous; written
    grad_q,  # like grad; written
    queries,
    keys,
    heads,
    share,
    rows,
    group,
    images,
    ranges,
    scales,
    prefix,
    softmax_scale,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    grad_q_batch,
    grad_q_head,
    grad_q_row,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,  # 1, or 0 for as many as `ranges` says
):
    """Grid: as forward. Fills grad_q and delta."""
    if offsets is None:
        tiles = tl.cdiv(queries, BLOCK_M)
        rank, row = _place(tiles, rows, group)
        query = (tiles - 1 - rank) * BLOCK_M + tl.arange(0, BLOCK_M)
        query_end, key_end = queries, keys
    else:
        tile, origin, query_end, row = _place_in_images(offsets, images, queries, rows, group, BLOCK_M)
        tiles = tl.cdiv(query_end - origin, BLOCK_M)
        if tile >= tiles:
            return
        query = origin + (tiles - 1 - tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        key_end = query_end
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    k += (batch * k_batch + head // share * k_head) * _UNIT
    v += (batch * v_batch + head // share * v_head) * _UNIT
    q += (batch * q_batch + head * q_head) * _UNIT
    out += (batch * out_batch + head * out_head) * _UNIT
    grad += (batch * grad_batch + head * grad_head) * _UNIT
    grad_q += (batch * grad_q_batch + head * grad_q_head) * _UNIT

    wide = query.to(tl.int64)[:, None] * _UNIT
    inside = query < query_end
    channel = tl.arange(0, BLOCK_D)
    line = channel[None, :]
    held = _take(q + wide * q_row + line, query[:, None], query_end, line, True, WIDTH)
    held_grad = _take(grad + wide * grad_row + line, query[:, None], query_end, line, True, WIDTH)
    held_out = _take(out + wide * out_row + line, query[:, None], query_end, line, True, WIDTH)
    row_delta = tl.sum(held_grad.to(tl.float32) * held_out.to(tl.float32), 1)
    at = row.to(tl.int64) * queries + query
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + at, mask=inside, other=0.0)
    tl.store(delta + at, row_delta, mask=inside)
    row_lse = _in_base(tl.load(lse + at, mask=inside, other=float("inf")), PRECISION)

    factor = _in_base(softmax_scale, PRECISION)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = tl.arange(0, BLOCK_N)
    k_from = k + (key.to(tl.int64) * _UNIT)[:, None] * k_row + line
    v_from = v + (key.to(tl.int64) * _UNIT)[:, None] * v_row + line
    for index in range(RANGES if RANGES else ranges):
        if sees is None:
            position = tl.minimum(query + keys - queries, keys - 1)
            first, end = None, _ends_of(_begins(lengths, scales, prefix), position, keys)
            whole, part, last = 0, tl.min(end, 0) // BLOCK_N * BLOCK_N, tl.max(end, 0)
            k_at, v_at = k_from, v_from
        else:
            token = tl.minimum(query, query_end - 1) + keys - queries
            first, end = _range_of(sees, keys, token, index)
            begin, whole, part, last = _steps(first, end, BLOCK_N)
            k_at = k_from + begin.to(tl.int64) * _UNIT * k_row
            v_at = v_from + begin.to(tl.int64) * _UNIT * v_row
            for head_at in range(begin, whole, BLOCK_N):
                total = _pass_keys_back(
                    total, held, held_grad, row_lse, row_delta, k_at, v_at, head_at + key, key_end, first, end,
                    channel, factor, True, WIDTH, PRECISION,
                )  # fmt: skip
                k_at += BLOCK_N * _UNIT * k_row
                v_at += BLOCK_N * _UNIT * v_row
        for _ in range(whole, part, BLOCK_N):
            total = _pass_keys_back(
                total, held, held_grad, row_lse, row_delta, k_at, v_at, key, key_end, first, end, channel, factor,
                False, WIDTH, PRECISION,
            )  # fmt: skip
            k_at += BLOCK_N * _UNIT * k_row
            v_at += BLOCK_N * _UNIT * v_row
        for tail_at in range(part, last, BLOCK_N):
            total = _pass_keys_back(
                total, held, held_grad, row_lse, row_delta, k_at, v_at, tail_at + key, key_end, first, end,
                channel, factor, True, WIDTH, PRECISION,
            )  # fmt: skip
            k_at += BLOCK_N * _UNIT * k_row
            v_at += BLOCK_N * _UNIT * v_row
    total *= softmax_scale
    tl.store(
        grad_q + wide * grad_q_row + line, total.to(grad_q.dtype.element_ty), mask=inside[:, None] & (line < WIDTH)
    )


@triton.jit
def _pass_queries(
    total_k, total_v, k, v, q_at, grad_at, lse, delta, query, queries, offset, begin, end, channel, factor,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys (but for the factor) and values with a tile of queries more.

    `end` is None where every key is seen up to the last query.
    """
    line = channel[None, :]
    inside = query < queries
    q = _take(q_at, query[:, None], queries, line, True, WIDTH)
    grad = _take(grad_at, query[:, None], queries, line, True, WIDTH)
    row_lse = tl.load(lse + query, mask=inside, other=float("inf"))  # no weight beyond the last query
    row_lse = _in_base(row_lse, PRECISION)
    row_delta = tl.load(delta + query, mask=inside, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    weights = _exponential(scores, factor, row_lse[None, :], PRECISION)
    weights = tl.where(begin[:, None] <= (query + offset)[None, :], weights, 0.0)
    if end is not None:
        weights = tl.where((query + offset)[None, :] < end[:, None], weights, 0.0)
    total_v = _dot(weights.to(grad.dtype), grad, total_v, PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - row_delta[None, :])
    total_k = _dot(grad_scores.to(q.dtype), q, total_k, PRECISION)
    return total_k, total_v


@triton.jit(do_not_specialize=_SCALARS)
def attention_backward_keys_kernel(
    grad,  # [batch, heads, queries, width], strides grad_batch, grad_head, grad_row in units, 1
    q,  # like grad
    k,  # [batch, heads / share, keys, width]
    v,  # like k
    lse,  # [batch, heads, queries] float32, contiguous
    lengths,  # as forward
    seen_by,  # [ranges, 2, keys] int32: begins and ends of the tokens that see each key; None: from its scale on
    offsets,  # as forward
    delta,  # [batch, heads, queries] float32, contiguous
    grad_k,  # like k; written
    grad_v,  # like k; written
    queries,
    keys,
    heads,
    share,
    rows,  # batch * heads / share
    group,
    images,
    ranges,
    scales,
    prefix,
    softmax_scale,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_k_batch,
    grad_k_head,
    grad_k_row,
    grad_v_batch,
    grad_v_head,
    grad_v_row,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr,  # 1, or 0 for as many as `ranges` says
):
    """Grid: (tiles of keys * batch * key heads,), with offsets (slots of `_place_in_images` * batch * key heads,).

    The first tiles are seen by most queries, and go first.
    """
    if offsets is None:
        rank, row = _place(tl.cdiv(keys, BLOCK_N), rows, group)
        key = rank * BLOCK_N + tl.arange(0, BLOCK_N)
        query_end, key_end = queries, keys
    else:
        tile, origin, key_end, row = _place_in_images(offsets, images, keys, rows, group, BLOCK_N)
        key = origin + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if origin + tile * BLOCK_N >= key_end:
            return
        query_end = key_end
    groups = heads // share
    batch, head = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    k += (batch * k_batch + head * k_head) * _UNIT
    v += (batch * v_batch + head * v_head) * _UNIT
    grad_k += (batch * grad_k_batch + head * grad_k_head) * _UNIT
    grad_v += (batch * grad_v_batch + head * grad_v_head) * _UNIT

    wide = key.to(tl.int64)[:, None] * _UNIT
    channel = tl.arange(0, BLOCK_D)
    line = channel[None, :]
    held_k = _take(k + wide * k_row + line, key[:, None], key_end, line, True, WIDTH)
    held_v = _take(v + wide * v_row + line, key[:, None], key_end, line, True, WIDTH)
    offset = keys - queries  # position of the first query

    factor = _in_base(softmax_scale, PRECISION)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    ahead = tl.arange(0, BLOCK_M)
    for index in range(RANGES if RANGES else ranges):
        if seen_by is None:
            begin = _begins_of(_begins(lengths, scales, prefix), tl.minimum(key, keys - 1))
            end, last = None, queries
        else:
            begin, end = _range_of(seen_by, keys, tl.minimum(key, key_end - 1), index)
            last = tl.max(end, 0) - offset
        first = tl.maximum(tl.min(begin, 0) - offset, 0)
        for sharer in range(share):
            query_head = head * share + sharer
            row_at = (batch * heads + query_head) * queries
            q_at = q + (batch * q_batch + query_head * q_head) * _UNIT
            grad_at = grad + (batch * grad_batch + query_head * grad_head) * _UNIT
            # One loop with the mask: a second one without it costs 20 to 100 registers, and those spill.
            for at in range(first, last, BLOCK_M):
                query = at + ahead
                far = query.to(tl.int64)[:, None] * _UNIT
                total_k, total_v = _pass_queries(
                    total_k, total_v, held_k, held_v, q_at + far * q_row + line, grad_at + far * grad_row + line,
                    lse + row_at, delta + row_at, query, query_end, offset, begin, end, channel, factor,
                    WIDTH, PRECISION,
                )  # fmt: skip
    inside = (key < key_end)[:, None] & (line < WIDTH)
    total_k *= softmax_scale
    tl.store(grad_k + wide * grad_k_row + line, total_k.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + wide * grad_v_row + line, total_v.to(grad_v.dtype.element_ty), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


NEAR_BYTES = 16 << 20  # of keys and values (or queries and gradients) in use at a time, a third of an H100's L2


def _block(width: int) -> int:
    """Channels of a tile: 32, 64 or 128."""
    return max(32, triton.next_power_of_2(width))


def _group(rows: int, bytes_a_row: int) -> int:
    """Heads whose tiles are interleaved, so that long tiles of all go first: as many as L2 holds, 16 at least."""
    return min(rows, max(16, NEAR_BYTES // bytes_a_row))


def aligned(x: torch.Tensor) -> bool:
    """Whether the kernels can read a tensor (B, H, L, D) in place."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(step % UNIT == 0 or size == 1 for step, size in zip(x.stride()[:3], x.shape[:3], strict=True))
    )


def _strides(x: torch.Tensor) -> list[int]:
    """Of batch, heads and rows, in units; of a dimension of one, where any would do, perhaps rounded."""
    return [step // UNIT for step in x.stride()[:3]]


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _programs(tokens: int, tile: int, offsets: torch.Tensor | None) -> int:
    """A row of heads: one a tile, or a slot where there are several images (see `_place_in_images`)."""
    return triton.cdiv(tokens, tile) if offsets is None else tokens // tile + offsets.shape[0]


def _sizes(
    lengths: torch.Tensor | None, table: torch.Tensor | None, offsets: torch.Tensor | None
) -> tuple[int, int, int]:
    """Images, ranges a row and scales."""
    images = 1 if offsets is None else offsets.shape[0]
    return images, 1 if table is None else table.shape[0], 0 if lengths is None else lengths.shape[0]


def _one(table: torch.Tensor | None) -> int:
    """RANGES: 1 is compiled in, which saves registers; other numbers compile nothing new."""
    return int(table is None or table.shape[0] == 1)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    prefix: int,
    softmax_scale: float,
    capability: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    sees: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> None:
    """Fills out and lse.

    Args:
        q: (B, H, Lq, D); k, v: (B, G, L, D), Lq at most L; `aligned`.
        lengths: (S,) int32 or int64, of the scales, contiguous; None with sees.
        prefix: tokens before the first scale.
        softmax_scale: factor on the scores, not negative.
        capability: of the device, 90 for 9.0.
        out: like q.
        lse: (B, H, Lq) float32, contiguous.
        sees: (R, 2, L) int32, contiguous: for every token the keys that it sees, as R disjoint ranges [begin, end),
            some perhaps empty; None: those to the end of its scale.
        offsets: (N,) int32, ascending from 0, contiguous, with sees and Lq = L: the first token of each of N images, of
            which each sees itself alone; None is one.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    rows = batch * heads
    tile = forward_tile(width, q.element_size(), capability, bool(_one(sees)))
    attention_forward_kernel[(_programs(queries, tile.held, offsets) * rows,)](
        q, k, v, lengths, sees, offsets, out, lse, queries, keys, heads, heads // k.shape[1],
        rows, _group(rows, 2 * keys * width * k.element_size()), *_sizes(lengths, sees, offsets), prefix,
        softmax_scale,
        *_strides(q), *_strides(k), *_strides(v), *_strides(out),
        WIDTH=width, PRECISION=_precision(q.dtype), BLOCK_M=tile.held, BLOCK_N=tile.passed, BLOCK_D=_block(width),
        RANGES=_one(sees), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    lse: torch.Tensor,
    lengths: torch.Tensor | None,
    prefix: int,
    softmax_scale: float,
    capability: int,
    delta: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    *,
    sees: torch.Tensor | None = None,
    seen_by: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> None:
    """Fills grad_q, grad_k and grad_v.

    Args:
        grad: gradient of out, like q, `aligned`.
        grad_lse: of lse, like lse, or None.
        q, k, v, out, lse, lengths, prefix, softmax_scale, capability, sees, offsets: as `attention_forward` had and
            left them.
        delta: workspace like lse.
        grad_q, grad_k, grad_v: like q, k, v.
        seen_by: with sees, (P, 2, L) int32, contiguous: the tokens that see each key, likewise.
    """
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    share, size, block = heads // groups, q.element_size(), _block(width)
    shape = {"WIDTH": width, "PRECISION": _precision(q.dtype), "BLOCK_D": block}
    rows = batch * heads
    tile = query_tile(width, size, capability, bool(_one(sees)))
    attention_backward_queries_kernel[(_programs(queries, tile.held, offsets) * rows,)](
        grad, grad_lse, q, k, v, out, lse, lengths, sees, offsets, delta, grad_q, queries, keys, heads, share,
        rows, _group(rows, 2 * keys * width * size), *_sizes(lengths, sees, offsets), prefix, softmax_scale,
        *_strides(grad), *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(grad_q),
        **shape, RANGES=_one(sees), BLOCK_M=tile.held, BLOCK_N=tile.passed,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    rows = batch * groups
    tile = key_tile(width, size, capability, bool(_one(seen_by)))
    attention_backward_keys_kernel[(_programs(keys, tile.held, offsets) * rows,)](
        grad, q, k, v, lse, lengths, seen_by, offsets, delta, grad_k, grad_v, queries, keys, heads, share,
        rows, _group(rows, 2 * share * queries * width * size), *_sizes(lengths, seen_by, offsets), prefix,
        softmax_scale,
        *_strides(grad), *_strides(q), *_strides(k), *_strides(v), *_strides(grad_k),
        *_strides(grad_v),
        **shape, RANGES=_one(seen_by), BLOCK_M=tile.passed, BLOCK_N=tile.held,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _cases() -> list[tuple]:
    """What to compile, as in `unifiedar.kernels.codes`: the models' head sizes, a narrow one, float32, each with the
    tile of each kind of GPU, and some with tables and images. Divisors are what `aligned` guarantees."""
    cases: list[tuple] = []
    kernels = (
        (attention_forward_kernel, forward_tile, "sees"),
        (attention_backward_queries_kernel, query_tile, "sees"),
        (attention_backward_keys_kernel, key_tile, "seen_by"),
    )
    tensors = ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
    for width, feature in ((64, "bf16"), (96, "bf16"), (128, "bf16"), (40, "fp16"), (64, "fp32"), (128, "fp32")):
        size = 4 if feature == "fp32" else 2
        types = {
            **dict.fromkeys(tensors, f"*{feature}"),
            **dict.fromkeys(("lse", "grad_lse", "delta"), "*fp32"),
            **dict.fromkeys(("lengths", "offsets", "sees", "seen_by"), "*i32"),
            "softmax_scale": "fp32",
        }
        masks = ("schedule", "packed", "table") if width in (64, 128) and size == 2 else ("schedule",)
        for (kernel, tile_of, table), arch, mask in itertools.product(kernels, (80, 90), masks):
            tile = tile_of(width, size, arch, mask != "table")
            held, passed = ("BLOCK_N", "BLOCK_M") if table == "seen_by" else ("BLOCK_M", "BLOCK_N")
            absent = {"schedule": (table, "offsets"), "packed": ("lengths",), "table": ("lengths", "offsets")}[mask]
            constants = {
                "WIDTH": width,
                "PRECISION": "tf32x3" if size == 4 else "tf32",
                held: tile.held,
                passed: tile.passed,
                "BLOCK_D": _block(width),
                "RANGES": int(mask != "table"),
                **dict.fromkeys(absent),
            }
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
            signature = {**names, **dict.fromkeys(constants, "constexpr")}
            divisors = {name: 16 for name in names if name in tensors}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            cases.append((kernel, signature, constants, options, divisors, (arch,)))
            if "grad_lse" in names and width == 64 and size == 2 and mask == "schedule":  # most training has none
                without = {**constants, "grad_lse": None}
                cases.append((kernel, {**signature, "grad_lse": "constexpr"}, without, options, divisors, (arch,)))
    return cases


COMPILE_CASES = _cases()
