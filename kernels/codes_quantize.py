"""Triton kernels of residual quantization: float32-exact codes from a float16 search on tensor cores.

A depth is two launches. The search is a matrix product of float16 copies whose epilogue keeps, of every 64 codes, the
one whose score may be the greatest, in four bytes. The finish looks at those, adds up in float64 whatever the bound
below leaves open, and subtracts the row that won.

Scores. Code k of row r scores r . e_k - |e_k|^2 / 2 (cosine: r . e_k / max(|e_k|, 1e-12)); the greatest is nearest.

The bound. Let r' = 2^a r and e' = 2^b e be scaled so that the largest elements of the row and of the codebook lie in
[2^14, 2^15), h' = |e'|^2 / 2 and A = 2^(a - b), so that everything below is in units of 2^(a + b). With u = 2^-11 and
y = 2^-25, float16 is off by at most u |v| + y for each operand v, so that by Cauchy and Schwarz the product is off by

    operands      (2 u + u^2) |r'| |e'| + (1 + u) y sqrt(C) (|r'| + |e'|) + C y^2
    accumulation  C 2^-22 |r'| |e'|   tensor cores add groups of products to the sum, every addend cut off (not rounded)
                                      at 2^-23 of the group's largest at worst: below 1.125 C such cuts, allowed twice
    epilogue      2^-15.9 (|r'| |e'| + A h')   low seven bits of the score replaced, and float32 roundings

All of it is covered by w = slope (|r'| + floor) (|e'| + floor) + EPSILON A h', with slope = 2^-10 + C 2^-22 + 2^-15
and floor = 2^-14 sqrt(C); what is left over pays for roundings of the bound itself. (For cosine h' = 0 and e' is
2^14 e / |e|, itself rounded to float32: 2^-23 |r'| |e'| more, paid likewise.) What the search keeps is up = score + w:
the true score lies in [up - 2 w, up], so a code whose up is below another's up - 2 w is not the nearest.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "Plan", "bound", "finish_tile", "plan", "residual_quantize", "search_tile"]

SUBTILE = 64  # codes that share one word: six bits name the best of them, the seventh says that it is not alone
EPSILON = 2.0**-15
_SUBTILE = tl.constexpr(SUBTILE)
_EPSILON = tl.constexpr(EPSILON)
_TIE = tl.constexpr(2.0**-44)  # of a loss in float64: more than the roundings of a sum of 2,048 terms

# Bytes of rows in work at a time, beside the codebook's float16 copy: with VILA-U's 33.6 MB this stays below 64 MB.
ROW_BYTES = 29_500_000


@dataclass(frozen=True)
class SearchTile:
    """A program's share of the search: `rows` by `codes`, `channels` at a time; `group` blocks of rows share codes."""

    rows: int
    codes: int
    channels: int
    warps: int
    stages: int
    group: int


def search_tile(channels: int, capability: int) -> SearchTile:
    """Tile of the search.

    Two blocks of 128 x 128 on a multiprocessor take turns: the epilogue of one (seven instructions an element, most at
    half rate) runs under the product of the other. A tile of 128 x 256 asks L2 for less but is alone on its
    multiprocessor: measured on an H100 (`python -m bench tune codes`) it is 7 to 12 % slower at 1,024 channels too.
    Before Hopper operands go through registers, and 99 KB of shared memory have to do (sm_86, sm_89).
    """
    width = 16 if channels <= 16 else 32 if channels <= 32 else 64
    if capability < 90:
        return SearchTile(128, 128, min(width, 32), warps=8, stages=3, group=8)
    return SearchTile(128, 128, width, warps=4, stages=3, group=8)


@dataclass(frozen=True)
class FinishTile:
    """How the finish compares the codes of a crowded subtile: `codes` at a time, `channels` a warp.

    Few rows come to that, but a kernel is as slow as its slowest row, and each step waits for its loads: 64 codes of
    256 channels take 64 steps of 4 x 64. `registers` a thread: left alone, ptxas spills a few bytes of some variants
    to get down to 64.
    """

    codes: int
    channels: int
    registers: int


def finish_tile(channels: int, num_codes: int, cosine: bool, capability: int) -> FinishTile:
    """Tile of the finish.

    Measured on an H100 (`python -m bench tune codes`). At 256 channels and 2,048 codes 16 codes at a time take .206 ms
    a call where four take .256, though their registers leave room for half as many rows on a multiprocessor; at 16,384
    codes .972 for 1.054, at 32 channels and 4,096 codes .119 for .122, at 1,024 channels and 16,384 codes 2.68 for 2.76
    (32 channels a warp). Cosine, fewer codes and GPUs before Hopper spill with those tiles.
    """
    if capability >= 90 and not cosine:
        if 128 < channels <= 256 and 16 * SUBTILE < num_codes <= 32 * SUBTILE:
            return FinishTile(16, 64, 168)
        if channels > 16 and num_codes > 32 * SUBTILE:
            return FinishTile(16, 64, 168) if channels <= 256 else FinishTile(16, 32, 128)
    return FinishTile(4, 64, 96)


def bound(channels: int) -> tuple[float, float]:
    """(slope, floor) of the bound in the module's docstring."""
    return 2.0**-10 + channels * 2.0**-22 + 2.0**-15, 2.0**-14 * math.sqrt(channels)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _exponent_to_14(peak):
    """The power of two, at most 2^126, that brings a float32 `peak` >= 0 into [2^14, 2^15); as its exponent."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(14 - exponent, 126)


@triton.jit
def _power_of_two(exponent):
    """2^exponent as float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _put_row(
    values, channel, row, channels, padded, peaks, halves, row_scale, row_width, slope, floor, COSINE: tl.constexpr
):
    """Writes the float16 copy of a residual (zero where `channel` is outside), and A and slope (|r'| + floor).

    A = 0 marks a row that takes code 0 without a search: one that is not finite or, for cosine, zero.
    """
    size = tl.abs(values)
    finite = tl.sum((size < float("inf")).to(tl.int32), axis=0) == channel.shape[0]
    size = tl.where(finite, size, 0.0)
    peak = tl.max(size, axis=0)
    exponent = _exponent_to_14(peak)
    if COSINE:
        scale = tl.where(finite & (peak > 0), 1.0, 0.0)
    else:
        # A h' must not overflow: h' is at most 2^40. A row this much smaller than the codebook only rounds more.
        book = _exponent_to_14(tl.load(peaks).to(tl.float32))
        exponent = tl.minimum(exponent, book + 86)
        scale = tl.where(finite, _power_of_two(tl.maximum(exponent - book, -126)), 0.0)
    scaled = tl.where(finite, values, 0.0) * _power_of_two(exponent)
    # C 2^-24 for the sum and the rounding of the root, at most 2^-13, are within the 2^-10 that is added.
    width = slope * (tl.sqrt(tl.sum(scaled * scaled, axis=0)) * 1.0009765625 + floor)
    tl.store(halves + row * padded + channel, scaled.to(tl.float16), mask=channel < padded)
    tl.store(row_scale + row, scale)
    tl.store(row_width + row, width)


@triton.jit(do_not_specialize=["level"])
def quantize_codes_kernel(
    codebook,  # [num_codes, channels], strides book_entry, 1
    peaks,  # [tables] size of the largest element of each table (not read if COSINE)
    halves,  # [num_codes, padded] float16
    code_half,  # [num_codes] float32: h' (1 - EPSILON)
    code_norm,  # [num_codes] float32: |e'| + floor
    num_codes,
    channels,
    padded,
    book_entry,
    level,
    floor,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of codes,). The search's view of a codebook."""
    code = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_C)
    known = code < num_codes
    at = codebook + code.to(tl.int64)[:, None] * book_entry + channel[None, :]
    values = tl.load(at, mask=known[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
    wide = values.to(tl.float64)
    square = tl.sum(wide * wide, axis=1)
    if COSINE:
        inverse = 16384.0 / tl.maximum(tl.sqrt(square), 1e-12)
        scaled = (wide * inverse[:, None]).to(tl.float32)
        norm = tl.sqrt(square) * inverse
        half = tl.zeros([BLOCK_K], tl.float32)
    else:
        scale = _power_of_two(_exponent_to_14(tl.load(peaks + level).to(tl.float32)))
        scaled = values * scale
        norm = tl.sqrt(square) * scale
        half = (norm * norm * (0.5 - 0.5 * _EPSILON)).to(tl.float32)
    at = halves + code.to(tl.int64)[:, None] * padded + channel[None, :]
    tl.store(at, scaled.to(tl.float16), mask=known[:, None] & (channel < padded)[None, :])
    tl.store(code_half + code, half, mask=known)
    tl.store(code_norm + code, (norm * (1 + 2.0**-20)).to(tl.float32) + floor, mask=known)


@triton.jit
def quantize_rows_kernel(
    x,  # [rows, channels], strides x_row, x_channel
    residual,  # [rows, channels] float32
    peaks,  # [tables]
    halves,  # [rows, padded] float16
    row_scale,  # [rows] float32: A
    row_width,  # [rows] float32: slope (|r'| + floor)
    channels,
    padded,
    x_row,
    x_channel,
    slope,
    floor,
    COSINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (rows,). The residual before the first depth, and the search's view of it."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < channels
    at = x + row * x_row + channel.to(tl.int64) * x_channel
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + row * channels + channel, values, mask=inside)
    _put_row(values, channel, row, channels, padded, peaks, halves, row_scale, row_width, slope, floor, COSINE)


@triton.jit
def _put_words(
    product,
    row,
    block,
    scale,
    width,
    code_half,
    code_norm,
    words,
    rows,
    num_codes,
    subtiles,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The epilogue: of a block of products, one word a row and subtile.

    Codes beyond the last stand for the last, so that nothing here is masked: it ties with itself, and a tie is decided
    among codes that exist.
    """
    PARTS: tl.constexpr = BLOCK_K // _SUBTILE
    code = block * BLOCK_K + tl.arange(0, BLOCK_K)
    known = tl.minimum(code, num_codes - 1)
    half = tl.load(code_half + known)
    norm = tl.load(code_norm + known)
    up = (product - scale[:, None] * half[None, :]) + width[:, None] * norm[None, :]
    # With its index in its low bits a score needs no second register, and no two scores of a subtile are equal.
    bits = (up.to(tl.int32, bitcast=True) & -128) | ((code % _SUBTILE) * 2)[None, :]
    score = tl.reshape(bits.to(tl.float32, bitcast=True), [BLOCK_N, PARTS, _SUBTILE])
    best = tl.max(score, axis=2)
    second = tl.max(tl.where(score == best[:, :, None], float("-inf"), score), axis=2)
    half = tl.max(tl.reshape(half, [PARTS, _SUBTILE]), axis=1)
    norm = tl.max(tl.reshape(norm, [PARTS, _SUBTILE]), axis=1)
    radius = width[:, None] * norm[None, :] + scale[:, None] * (half * (1.01 * _EPSILON))[None, :]
    crowded = second >= best - 2 * radius
    word = best.to(tl.int32, bitcast=True) | crowded.to(tl.int32)
    subtile = block * PARTS + tl.arange(0, PARTS)
    at = words + row[:, None] * subtiles + subtile[None, :]
    tl.store(at, word, mask=(row < rows)[:, None] & (subtile < subtiles)[None, :])


@triton.jit
def quantize_search_kernel(
    row_halves,  # [rows, padded] float16
    code_halves,  # [num_codes, padded] float16
    row_scale,  # [rows]
    row_width,  # [rows]
    code_half,  # [num_codes]
    code_norm,  # [num_codes]
    words,  # [rows, subtiles] int32: the bits of the greatest score, its code's place in bits 1-6, bit 0: not alone
    rows,
    num_codes,
    padded,
    subtiles,
    span,
    GROUP: tl.constexpr,
    NARROW: tl.constexpr,  # all channels fit into one block
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of rows x runs of `span` blocks of codes,), in groups that share their operands in L2.

    Offsets are 32-bit: rows come in chunks, and the codebook's copy has fewer than 2^31 elements.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    runs = tl.cdiv(tl.cdiv(num_codes, BLOCK_K), span)
    group = tl.program_id(0) // (GROUP * runs)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * runs)
    row = (group * GROUP + inner % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    run = inner // height
    present = tl.minimum(row, rows - 1)
    channel = tl.arange(0, BLOCK_C)
    scale = tl.load(row_scale + present)
    width = tl.load(row_width + present)
    row_at = row_halves + present[:, None] * padded + channel[None, :]
    if NARROW:
        left = tl.load(row_at)
        for block in range(run * span, run * span + span):
            code = tl.minimum(block * BLOCK_K + tl.arange(0, BLOCK_K), num_codes - 1)
            right = tl.load(code_halves + code[None, :] * padded + channel[:, None])
            product = tl.dot(left, right)
            _put_words(product, row, block, scale, width, code_half, code_norm, words, rows, num_codes, subtiles,
                       BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        code = tl.minimum(run * BLOCK_K + tl.arange(0, BLOCK_K), num_codes - 1)
        code_at = code_halves + code[None, :] * padded + channel[:, None]
        product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for _ in range(0, padded, BLOCK_C):
            product = tl.dot(tl.load(row_at), tl.load(code_at), product)
            row_at += BLOCK_C
            code_at += BLOCK_C
        _put_words(product, row, run, scale, width, code_half, code_norm, words, rows, num_codes, subtiles,
                   BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit
def _exact_loss(residual, entry, channel, inside, COSINE: tl.constexpr):
    """In float64: squared distance of a row to one code, or its negative cosine times |r|."""
    left = tl.load(residual + channel, mask=inside, other=0.0).to(tl.float64)
    right = tl.load(entry + channel, mask=inside, other=0.0).to(tl.float64)
    if COSINE:
        return -tl.sum(left * right, axis=0) / tl.maximum(tl.sqrt(tl.sum(right * right, axis=0)), 1e-12)
    return tl.sum((left - right) * (left - right), axis=0)


@triton.jit
def _exact_losses(residual, codebook, code, known, channels, book_entry, COSINE: tl.constexpr, BLOCK_C: tl.constexpr):
    """`_exact_loss` of some codes; inf where not known."""
    total = tl.zeros([code.shape[0], BLOCK_C], tl.float64)
    square = tl.zeros([code.shape[0], BLOCK_C], tl.float64)
    entry = codebook + code.to(tl.int64)[:, None] * book_entry
    for begin in range(0, channels, BLOCK_C):
        channel = begin + tl.arange(0, BLOCK_C)
        inside = channel < channels
        left = tl.load(residual + channel, mask=inside, other=0.0).to(tl.float64)
        right = tl.load(entry + channel[None, :], mask=known[:, None] & inside[None, :], other=0.0).to(tl.float64)
        if COSINE:
            total -= left[None, :] * right
            square += right * right
        else:
            difference = left[None, :] - right
            total += difference * difference
    loss = tl.sum(total, axis=1)
    if COSINE:
        loss = loss / tl.maximum(tl.sqrt(tl.sum(square, axis=1)), 1e-12)
    return tl.where(known, loss, float("inf"))


@triton.jit(do_not_specialize=["level", "next_table"])
def quantize_finish_kernel(
    words,  # [rows, subtiles] int32
    residual,  # [rows, channels] float32: read, then what is left, unless LAST
    codebook,  # [num_codes, channels], strides book_entry, 1
    code_half,  # [num_codes]
    code_norm,  # [num_codes]
    row_scale,  # [rows]: read, then of the next depth, unless LAST
    row_width,  # [rows]: likewise
    codes,  # [rows, depth] int64; column `level` is written
    peaks,  # [tables]
    halves,  # [rows, padded] float16, for the next depth
    num_codes,
    channels,
    padded,
    subtiles,
    book_entry,
    depth,
    level,
    next_table,
    slope,
    floor,
    COSINE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROBE_K: tl.constexpr,
    PROBE_C: tl.constexpr,
):
    """Grid: (rows,). Decides a depth: the one code that the bound leaves or, among several, the nearest in float64."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < channels
    if not LAST:
        values = tl.load(residual + row * channels + channel, mask=inside, other=0.0)  # early, for its latency
    subtile = tl.arange(0, BLOCK_T)
    present = subtile < subtiles
    word = tl.load(words + row * subtiles + subtile, mask=present, other=0)
    up = tl.where(present, word.to(tl.float32, bitcast=True), float("-inf"))
    top = tl.max(up, axis=0)
    at = tl.min(tl.where((up == top) & present, subtile, BLOCK_T), axis=0)
    place = (tl.sum(tl.where(subtile == at, word, 0), axis=0) >> 1) & (_SUBTILE - 1)
    chosen = tl.minimum(at * _SUBTILE + place, num_codes - 1)
    scale = tl.load(row_scale + row)
    radius = tl.load(row_width + row) * tl.load(code_norm + chosen)
    radius += scale * tl.load(code_half + chosen) * (1.01 * _EPSILON)
    candidate = (up >= top - 2 * radius) & present
    alone = tl.sum(tl.where(candidate, 1 + (word & 1), 0), axis=0) == 1
    chosen = tl.where(alone & (scale != 0.0), chosen, 0)
    at = tl.min(tl.where(candidate, subtile, BLOCK_T), axis=0)
    at = tl.where(alone | (scale == 0.0), BLOCK_T, at)
    least = tl.full([], float("inf"), tl.float64)
    while at < BLOCK_T:
        # In the order of the codes, and only a loss that is smaller by more than rounding takes over: equal ones go to
        # the lowest index, in whatever order they were added up.
        word_at = tl.sum(tl.where(subtile == at, word, 0), axis=0)
        begin = at * _SUBTILE
        if word_at & 1 == 0:
            code = tl.minimum(begin + ((word_at >> 1) & (_SUBTILE - 1)), num_codes - 1)
            entry = codebook + code.to(tl.int64) * book_entry
            loss = _exact_loss(residual + row * channels, entry, channel, inside, COSINE)
            smaller = loss + tl.abs(loss) * _TIE < least
            chosen = tl.where(smaller, code, chosen)
            least = tl.where(smaller, loss, least)
        else:
            end = tl.minimum(begin + _SUBTILE, num_codes)
            while begin < end:
                probe = begin + tl.arange(0, PROBE_K)
                losses = _exact_losses(
                    residual + row * channels, codebook, probe, probe < end, channels, book_entry, COSINE, PROBE_C
                )
                loss = tl.min(losses, axis=0)
                first = tl.min(tl.where(losses == loss, probe, num_codes - 1), axis=0)
                smaller = loss + tl.abs(loss) * _TIE < least
                chosen = tl.where(smaller, first, chosen)
                least = tl.where(smaller, loss, least)
                begin += PROBE_K
        at = tl.min(tl.where(candidate & (subtile > at), subtile, BLOCK_T), axis=0)
    tl.store(codes + row * depth + level, chosen.to(tl.int64))
    if not LAST:
        entry = codebook + chosen.to(tl.int64) * book_entry + channel
        values -= tl.load(entry, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # whoever still reads this row's state must not see the next depth's
        tl.store(residual + row * channels + channel, values, mask=inside)
        peaks += next_table
        _put_row(values, channel, row, channels, padded, peaks, halves, row_scale, row_width, slope, floor, COSINE)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _row_warps(width: int) -> int:
    """Warps of a program that works on one row of `width` elements, eight a thread."""
    return min(8, max(1, width // 256))


def _runs(row_blocks: int, code_blocks: int, narrow: bool) -> tuple[int, int]:
    """(programs along the codes, blocks of codes of each): a narrow search keeps its rows and streams the codes, as
    long as some 1,024 programs remain, several for each place on a GPU."""
    span = max(1, min(code_blocks, row_blocks * code_blocks // 1024)) if narrow else 1
    return triton.cdiv(code_blocks, span), span


@dataclass(frozen=True)
class Plan:
    """How a call is cut up, and what it needs beside its outputs.

    Args:
        rows: rows in work at a time.
        padded: channels of the float16 copies.
        tile: of the search.
        finish: of what follows it.
        places: where each piece of the workspace begins: name -> (byte, dtype, shape).
        size: bytes of the workspace.
    """

    rows: int
    padded: int
    tile: SearchTile
    finish: FinishTile
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    size: int


@functools.lru_cache(maxsize=256)
def plan(rows: int, num_codes: int, channels: int, cosine: bool, in_place: bool, capability: int) -> Plan:
    """The plan of a call with `rows` rows; `in_place` says that the output can hold the float32 residual meanwhile."""
    tile = search_tile(channels, capability)
    padded = triton.cdiv(channels, tile.channels) * tile.channels
    subtiles = triton.cdiv(num_codes, SUBTILE)
    row_bytes = 2 * padded + 4 * subtiles + 8 + (0 if in_place else 4 * channels)
    chunks = triton.cdiv(rows, max(tile.rows, ROW_BYTES // row_bytes))
    chunk = min(rows, triton.cdiv(triton.cdiv(rows, chunks), tile.rows) * tile.rows)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "code_halves": (torch.float16, (num_codes, padded)),
        "code_half": (torch.float32, (num_codes,)),
        "code_norm": (torch.float32, (num_codes,)),
        "row_halves": (torch.float16, (chunk, padded)),
        "row_scale": (torch.float32, (chunk,)),
        "row_width": (torch.float32, (chunk,)),
        "words": (torch.int32, (chunk, subtiles)),
    }
    if not in_place:
        shapes["residual"] = (torch.float32, (chunk, channels))
    places, size = {}, 0
    for name, (dtype, shape) in shapes.items():
        places[name] = (size, dtype, shape)
        size += triton.cdiv(math.prod(shape) * dtype.itemsize, 256) * 256
    return Plan(chunk, padded, tile, finish_tile(channels, num_codes, cosine, capability), places, size)


def residual_quantize(
    x: torch.Tensor,
    codebook: torch.Tensor,
    peaks: torch.Tensor,
    cosine: bool,
    cut: Plan,
    workspace: torch.Tensor,
    held: torch.Tensor | None,
    codes: torch.Tensor,
) -> None:
    """Fills codes (N, D) int64, contiguous.

    Args:
        x: (N, C), any strides.
        codebook: (K, C) or (D, K, C), last dimension contiguous.
        peaks: (1,) or (D,), the size of the largest element of each table.
        cosine: the metric.
        cut: `plan` of this call.
        workspace: (cut.size,) uint8, aligned to 256 bytes.
        held: (N, C) float32, contiguous, where the residual is kept meanwhile, or None if the plan holds it.
        codes: the output.
    """
    rows, depth = codes.shape
    num_codes, channels = codebook.shape[-2:]
    piece = {
        name: workspace[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for name, (begin, dtype, shape) in cut.places.items()
    }
    slope, floor = bound(channels)
    padded, tile, finish, subtiles = cut.padded, cut.tile, cut.finish, piece["words"].shape[1]
    block_c = triton.next_power_of_2(padded)
    warps = _row_warps(max(block_c, subtiles))
    narrow = padded == tile.channels
    book = (piece["code_half"], piece["code_norm"])
    state = (piece["row_scale"], piece["row_width"])
    for begin in range(0, rows, cut.rows):
        part = x[begin : begin + cut.rows]
        count = part.shape[0]
        residual = piece["residual"] if held is None else held[begin:]
        row_blocks = triton.cdiv(count, tile.rows)
        runs, span = _runs(row_blocks, triton.cdiv(num_codes, tile.codes), narrow)
        quantize_rows_kernel[(count,)](
            part, residual, peaks, piece["row_halves"], *state, channels, padded, *part.stride(), slope, floor,
            COSINE=cosine, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
        for d in range(depth):
            table = codebook if codebook.ndim == 2 else codebook[d]
            if codebook.ndim == 3 or d == begin == 0:
                block = max(1, 2048 // block_c)
                quantize_codes_kernel[(triton.cdiv(num_codes, block),)](
                    table, peaks, piece["code_halves"], *book, num_codes, channels, padded, table.stride(0), d, floor,
                    COSINE=cosine, BLOCK_K=block, BLOCK_C=block_c, num_warps=4,
                )  # fmt: skip
            quantize_search_kernel[(row_blocks * runs,)](
                piece["row_halves"], piece["code_halves"], *state, *book, piece["words"],
                count, num_codes, padded, subtiles, span,
                GROUP=tile.group, NARROW=narrow, BLOCK_N=tile.rows, BLOCK_K=tile.codes, BLOCK_C=tile.channels,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            last = d + 1 == depth
            quantize_finish_kernel[(count,)](
                piece["words"], residual, table, *book, *state, codes[begin:], peaks, piece["row_halves"],
                num_codes, channels, padded, subtiles, table.stride(0), depth, d,
                0 if codebook.ndim == 2 or last else d + 1, slope, floor,
                COSINE=cosine, LAST=last, BLOCK_T=triton.next_power_of_2(subtiles), BLOCK_C=block_c,
                PROBE_K=finish.codes, PROBE_C=min(finish.channels * warps, block_c), num_warps=warps,
                maxnreg=finish.registers,
            )  # fmt: skip


def _cases() -> list[tuple]:
    """What to compile, as in `unifiedar.kernels.codes`: the models' widths, and narrow ones, for both kinds of GPU.

    Divisors say what a launch would find out: the search's operands are always aligned and padded, rows of the other
    kernels mostly.
    """
    cases: list[tuple] = []
    pointers = {
        **dict.fromkeys(("halves", "row_halves", "code_halves"), "*fp16"),
        **dict.fromkeys(("residual", "row_scale", "row_width", "code_half", "code_norm"), "*fp32"),
        "words": "*i32",
        "codes": "*i64",
        "slope": "fp32",
        "floor": "fp32",
    }
    search = ("row_halves", "code_halves", "words", "padded")
    packed = ("x", "residual", "codebook", "halves", "words", "channels", "padded", "book_entry", "x_row")

    def add(
        kernel,
        options: dict[str, int],
        feature: str,
        divisible: tuple[str, ...],
        archs: tuple[int, ...] = (80, 90),
        /,
        **constants: int | bool,
    ) -> None:
        types = {**pointers, **dict.fromkeys(("x", "codebook", "peaks"), f"*{feature}")}
        names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        signature = {**names, **dict.fromkeys(constants, "constexpr")}
        divisors = dict.fromkeys([name for name in divisible if name in names], 16)
        cases.append((kernel, signature, constants, options, divisors, archs))

    def add_finish(
        channels: int, block: int, num_codes: int, arch: int, feature: str, divisible: tuple[str, ...], cosine: bool
    ) -> None:
        tile, words = finish_tile(channels, num_codes, cosine, arch), triton.next_power_of_2(num_codes // SUBTILE)
        warps = _row_warps(max(block, words))
        options = {"num_warps": warps, "maxnreg": tile.registers}
        shape = {"BLOCK_T": words, "BLOCK_C": block}
        shape |= {"PROBE_K": tile.codes, "PROBE_C": min(tile.channels * warps, block)}
        for last in (False, True):
            aligned = () if last else divisible
            add(quantize_finish_kernel, options, feature, aligned, (arch,), COSINE=cosine, LAST=last, **shape)

    for channels, feature in ((1024, "fp32"), (1152, "bf16"), (256, "fp32"), (32, "fp32"), (8, "fp16")):
        for tile in (search_tile(channels, 80), search_tile(channels, 90)):
            padded = triton.cdiv(channels, tile.channels) * tile.channels
            shape = {"BLOCK_N": tile.rows, "BLOCK_K": tile.codes, "BLOCK_C": tile.channels, "GROUP": tile.group}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            add(quantize_search_kernel, options, feature, search, NARROW=padded == tile.channels, **shape)
        block = triton.next_power_of_2(padded)
        rows = {"num_warps": _row_warps(max(block, 256))}
        for cosine in (False, True):
            for divisible in (packed, ()) if channels == 1024 else (packed,) if channels > 128 else ((),):
                blocks = {"BLOCK_K": max(1, 2048 // block), "BLOCK_C": block}
                add(quantize_codes_kernel, {"num_warps": 4}, feature, divisible, COSINE=cosine, **blocks)
                for num_codes, arch in itertools.product((2048, 16384) if channels == 256 else (16384,), (80, 90)):
                    add_finish(channels, block, num_codes, arch, feature, divisible, cosine)
                neighbours = {"x_channel": 1} if divisible else {}  # a launch sees a stride of one
                add(quantize_rows_kernel, rows, feature, divisible, COSINE=cosine, BLOCK_C=block, **neighbours)
    return cases


COMPILE_CASES = _cases()
