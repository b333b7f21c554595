"""Triton kernels of VAR's residual pyramid: exact codes of every scale, and the sums that codes stand for.

A scale is two launches. `pyramid_search_kernel` averages what is left down to the scale and finds the nearest codes;
`pyramid_part_kernel` looks them up, upsamples, convolves and subtracts. Sums of known codes need no order: their
parts are one launch for all scales, then one adds them up and one averages them down.

Maps in work are (B, H W, C) float32, contiguous, so that pixels are rows. All products are float32's (no TF32).

The search. Code k of a row z scores |e_k|^2 / 2 - z . e_k; the least is nearest. In float32, with u = 2^-24, the
product is off by at most C u |z| |e_k|, in whatever order and fused or not; |e_k|^2 / 2, made in float64, by its
rounding; and two subtractions by 2 u (|e_k|^2 / 2 + 1.01 |z| |e_k|). All of it is below w_k = slope (|z| |e_k| +
|e_k|^2 / 2), slope = (C + 8) u, whose own roundings are in the 8. The search keeps score - w_k and, of the other codes,
the least such. If that is above score + w_k of the best, the best is the nearest; else the row is decided in float64
among all codes of the program. Programs that share a row meet in a word: the float64 distance, its last bits replaced
by the code. The least word wins, so of distances that agree in the bits above (40 for 4,096 codes) the lowest code.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = [
    "COMPILE_CASES",
    "PartTile",
    "SearchTile",
    "multiscale_lookup",
    "multiscale_quantize",
    "next_scale_input",
    "part_tile",
    "search_tile",
]

_PIXELS = tl.constexpr(32)  # of a map, in one step of an average
REGISTERS = 255  # said to ptxas, which else spills a few bytes of small kernels to get down to 32 or 64
_PROBE = tl.constexpr(32)  # codes of one step of an exact comparison


@dataclass(frozen=True)
class SearchTile:
    """A program's share of the search: `rows` of one picture by a run of codes, `codes` at a time."""

    rows: int
    codes: int
    warps: int


@dataclass(frozen=True)
class PartTile:
    """A program's share of a part: `height` x `width` pixels of one picture, all channels."""

    height: int
    width: int
    warps: int


def _channels(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def search_tile(rows: int) -> SearchTile:
    """Tile of the search for pictures of `rows` rows.

    A thread holds three words for each of rows x codes / threads scores and its share of the operands, all channels: of
    the largest 255 registers, so that two programs are on a multiprocessor.
    """
    return SearchTile(min(triton.next_power_of_2(rows), 32), 64, warps=4)


def _runs(row_programs: int, num_codes: int, tile: SearchTile) -> tuple[int, int]:
    """(runs of codes, codes of each): some 264 programs, two a multiprocessor, of at least 64 codes each."""
    wanted = max(1, min(264 // row_programs, triton.cdiv(num_codes, 64)))
    span = triton.cdiv(triton.cdiv(num_codes, wanted), tile.codes) * tile.codes
    return triton.cdiv(num_codes, span), span


def part_tile(pixels: int) -> PartTile:
    """Tile of the parts, for `pixels` pixels in all: with their border 60 of 64 or 100 of 128 rows are used.

    The step of a generation, whose strides are not known, takes the small one: the large one spills.
    """
    return PartTile(8, 8, warps=8) if pixels >= 132 * 64 else PartTile(4, 8, warps=8)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(step, SCALES: tl.constexpr):
    """(h, w, where its codes begin, its convolution) of scale `step`; SCALES holds (h, w, convolution) of each."""
    h = 1
    w = 1
    phi = 0
    begin = 0
    at = 0
    for s in tl.static_range(len(SCALES) // 3):
        here = step == s
        h = tl.where(here, SCALES[3 * s], h)
        w = tl.where(here, SCALES[3 * s + 1], w)
        phi = tl.where(here, SCALES[3 * s + 2], phi)
        begin = tl.where(here, at, begin)
        at += SCALES[3 * s] * SCALES[3 * s + 1]
    return h, w, begin, phi


@triton.jit
def pyramid_begin_kernel(
    features,  # [batch, channels, height, width], any strides
    rest,  # [batch, height width, channels] float32
    codebook,  # [num_codes, channels], strides book_entry, 1
    code_half,  # [num_codes] float32: |e|^2 / 2
    code_norm,  # [num_codes] float32: |e|
    words,  # [count] int64: set to the largest
    pixels,
    size,
    width,
    channels,
    num_codes,
    count,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    book_entry,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of pixels, of codes or of words, whichever are most,). What the search starts from."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    inside = (channel < channels)[None, :]
    pixel = item % size
    at = (item // size) * stride_b + (pixel // width) * stride_y + (pixel % width) * stride_x
    at = features + at[:, None] + channel[None, :].to(tl.int64) * stride_c
    present = (item < pixels)[:, None] & inside
    values = tl.load(at, mask=present, other=0.0).to(tl.float32)
    tl.store(rest + item[:, None] * channels + channel[None, :], values, mask=present)
    known = item < num_codes
    at = codebook + item[:, None] * book_entry + channel[None, :]
    entry = tl.load(at, mask=known[:, None] & inside, other=0.0).to(tl.float64)
    square = tl.sum(entry * entry, axis=1)
    tl.store(code_half + item, (0.5 * square).to(tl.float32), mask=known)
    tl.store(code_norm + item, tl.sqrt(square).to(tl.float32), mask=known)
    tl.store(words + item, tl.full([BLOCK_N], 0x7FFFFFFFFFFFFFFF, tl.int64), mask=item < count)


@triton.jit
def _averages(maps, row, h, w, height, width, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Means [BLOCK_N, BLOCK_C] of the windows `row` of a map at `maps` (height width, channels) averaged to h x w."""
    channel = tl.arange(0, BLOCK_C)
    i = row // w
    j = row % w
    top = i * height // h
    bottom = ((i + 1) * height + h - 1) // h
    left = j * width // w
    right = ((j + 1) * width + w - 1) // w
    begin = tl.min(top, axis=0) * width
    end = tl.max(bottom, axis=0) * width
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(begin, end, _PIXELS):
        pixel = first + tl.arange(0, _PIXELS)
        y = (pixel // width)[None, :]
        x = (pixel % width)[None, :]
        within = (y >= top[:, None]) & (y < bottom[:, None]) & (x >= left[:, None]) & (x < right[:, None])
        present = (pixel < end)[:, None] & (channel < channels)[None, :]
        values = tl.load(maps + pixel[:, None] * channels + channel[None, :], mask=present, other=0.0)
        total = tl.dot(within.to(tl.float32), values, total, input_precision="ieee")
    down = tl.broadcast_to((bottom - top).to(tl.float32)[:, None], [BLOCK_N, BLOCK_C])
    across = tl.broadcast_to((right - left).to(tl.float32)[:, None], [BLOCK_N, BLOCK_C])
    return tl.div_rn(tl.div_rn(total, down), across)


@triton.jit(do_not_specialize=["step"])
def pyramid_search_kernel(
    rest,  # [batch, height width, channels] float32
    codebook,  # [num_codes, channels], strides book_entry, 1
    code_half,  # [num_codes]
    code_norm,  # [num_codes]
    words,  # [batch, length] int64
    height,
    width,
    channels,
    num_codes,
    length,
    book_entry,
    step,
    span,
    slope,
    bits,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of rows of all pictures, runs of `span` codes). Lowers the words of scale `step`, by atomics whose
    order does not matter."""
    h, w, offset, _ = _scale(step, SCALES)
    blocks = tl.cdiv(h * w, BLOCK_N)
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.arange(0, BLOCK_N)
    row = (tl.program_id(0) % blocks) * BLOCK_N + place
    present = row < h * w
    channel = tl.arange(0, BLOCK_C)
    inside = (channel < channels)[None, :]
    maps = rest + picture * height * width * channels
    z = _averages(maps, tl.minimum(row, h * w - 1), h, w, height, width, channels, BLOCK_N, BLOCK_C)
    radius = slope * tl.sqrt(tl.sum(z * z, axis=1))

    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, num_codes)
    best = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)
    other = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)
    holder = tl.zeros([BLOCK_N, BLOCK_K], tl.int32) + begin
    for first in range(begin, end, BLOCK_K):
        code = first + tl.arange(0, BLOCK_K)
        known = code < end
        at = codebook + code[None, :].to(tl.int64) * book_entry + channel[:, None]
        entry = tl.load(at, mask=known[None, :] & (channel < channels)[:, None], other=0.0).to(tl.float32)
        half = tl.load(code_half + code, mask=known, other=float("inf")) * (1 - slope)
        norm = tl.load(code_norm + code, mask=known, other=0.0)
        product = tl.dot(z, entry, input_precision="ieee")
        low = (half[None, :] - radius[:, None] * norm[None, :]) - product
        lower = low < best
        other = tl.minimum(other, tl.maximum(low, best))
        holder = tl.where(lower, code[None, :], holder)
        best = tl.where(lower, low, best)
    least = tl.min(best, axis=1)
    chosen = tl.min(tl.where(best == least[:, None], holder, end - 1), axis=1)
    other = tl.where((best == least[:, None]) & (holder == chosen[:, None]), other, best)
    half = tl.load(code_half + chosen)
    norm = tl.load(code_norm + chosen)
    # The 2^-100 stands for what products lose that are smaller than float32's least.
    clear = tl.min(other, axis=1) > least + (radius * norm + slope * half) * 2.001 + 2.0**-100
    entry = tl.load(codebook + chosen[:, None].to(tl.int64) * book_entry + channel[None, :], mask=inside, other=0.0)
    difference = z.to(tl.float64) - entry.to(tl.float64)
    distance = tl.sum(difference * difference, axis=1)

    open_at = tl.min(tl.where(present & ~clear, place, BLOCK_N), axis=0)
    while open_at < BLOCK_N:
        mine = tl.sum(tl.where((place == open_at)[:, None], z, 0.0), axis=0).to(tl.float64)
        nearest = tl.full([], float("inf"), tl.float64)
        pick = begin
        probe = begin
        while probe < end:
            probed = probe + tl.arange(0, _PROBE)
            exists = probed < end
            at = codebook + probed[:, None].to(tl.int64) * book_entry + channel[None, :]
            wide = tl.load(at, mask=exists[:, None] & inside, other=0.0).to(tl.float64)
            apart = tl.sum((mine[None, :] - wide) * (mine[None, :] - wide), axis=1)
            apart = tl.where(exists & (apart == apart), apart, float("inf"))
            closest = tl.min(apart, axis=0)
            lowest = tl.min(tl.where(apart == closest, probed, num_codes - 1), axis=0)
            pick = tl.where(closest < nearest, lowest, pick)
            nearest = tl.minimum(closest, nearest)
            probe += _PROBE
        chosen = tl.where(place == open_at, pick, chosen)
        distance = tl.where(place == open_at, nearest, distance)
        open_at = tl.min(tl.where(present & ~clear & (place > open_at), place, BLOCK_N), axis=0)

    distance = tl.where(distance == distance, distance, float("inf"))
    word = ((distance.to(tl.int64, bitcast=True) >> bits) << bits) | chosen.to(tl.int64)
    tl.atomic_min(words + picture * length + offset + row, word, mask=present, sem="relaxed")


@triton.jit
def _cubic(distance):
    """Weight of cubic convolution (a = -0.75) at a distance of up to 2."""
    near = (1.25 * distance - 2.25) * distance * distance + 1
    far = ((-0.75 * distance + 3.75) * distance - 6.0) * distance + 3.0
    return tl.where(distance <= 1, near, far)


@triton.jit(do_not_specialize=["first", "skip", "mask"])
def pyramid_part_kernel(
    codes,  # [batch, codes] int64, strides code_b, 1: those of all scales but for the first `skip`; not read if VECTORS
    table,  # [num_codes, channels], strides table_entry, 1; or VECTORS: [batch, h w, channels], also table_b, table_c
    weight,  # [count, 9, channels in, channels out], any strides
    bias,  # [count, channels], contiguous
    base,  # [batch, channels, height, width], any strides: what the part is added to
    total,  # [steps, batch, height width, channels] float32: the result; may be `base`
    out,  # [batch, channels, height, width], contiguous: the result once more, rounded
    batch,
    height,
    width,
    channels,
    num_codes,
    ratio,
    first,
    skip,
    mask,
    code_b,
    table_b,
    table_entry,
    table_c,
    weight_p,
    weight_t,
    weight_i,
    weight_o,
    base_b,
    base_c,
    base_y,
    base_x,
    SCALES: tl.constexpr,
    VECTORS: tl.constexpr,
    PHI: tl.constexpr,
    SIGN: tl.constexpr,  # of the part; 0: there is no base
    OUT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_H: tl.constexpr,  # pixels of a tile with its border, if PHI
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of all pictures, steps from scale `first` on). The low bits `mask` of a code word are its code; one
    outside [0, num_codes) stands for zeros. Offsets within a picture and in the table are 32-bit."""
    step = tl.program_id(1)
    h, w, offset, p = _scale(first + step, SCALES)
    across = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * across
    picture = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top = tile // across * TILE_H
    left = tile % across * TILE_W
    channel = tl.arange(0, BLOCK_C)
    inside = (channel < channels)[None, :]

    # Upsampled, for the tile and the pixels around it.
    border = 1 if PHI else 0
    spot = tl.arange(0, BLOCK_H)
    y = top - border + spot // (TILE_W + 2 * border)
    x = left - border + spot % (TILE_W + 2 * border)
    on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    one = tl.full([], 1.0, tl.float32)
    at_y = (y.to(tl.float32) + 0.5) * tl.div_rn(one * h, one * height) - 0.5
    at_x = (x.to(tl.float32) + 0.5) * tl.div_rn(one * w, one * width) - 0.5
    low_y = tl.floor(at_y)
    low_x = tl.floor(at_x)
    upsampled = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for a in range(4):  # not unrolled: with sixteen rows in flight some variants spill
        i = tl.minimum(tl.maximum(low_y.to(tl.int32) + (a - 1), 0), h - 1)
        line = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        for b in tl.static_range(4):
            j = tl.minimum(tl.maximum(low_x.to(tl.int32) + (b - 1), 0), w - 1)
            if VECTORS:
                at = ((i * w + j) * table_entry)[:, None] + (channel * table_c)[None, :]
                values = tl.load(table + picture * table_b + at, mask=on_map[:, None] & inside, other=0.0)
            else:
                code = tl.load(codes + picture * code_b + (offset - skip + i * w + j), mask=on_map, other=-1)
                code = tl.where(on_map, code & mask, -1)
                known = (code >= 0) & (code < num_codes)
                at = (code.to(tl.int32) * table_entry)[:, None] + channel[None, :]
                values = tl.load(table + at, mask=known[:, None] & inside, other=0.0)
            line += _cubic(tl.abs(at_x - low_x - (b - 1)))[:, None] * values.to(tl.float32)
        upsampled += _cubic(tl.abs(at_y - low_y - (a - 1)))[:, None] * line

    pixel = tl.arange(0, TILE_H * TILE_W)
    y = pixel // TILE_W
    x = pixel % TILE_W
    if PHI:
        convolved = tl.zeros([TILE_H * TILE_W, BLOCK_C], tl.float32)
        source = tl.arange(0, BLOCK_C)[:, None]
        corner = tl.broadcast_to((y * (TILE_W + 2) + x)[:, None], [TILE_H * TILE_W, BLOCK_C])
        square = (source < channels) & inside
        at = weight + p * weight_p + source * weight_i + channel[None, :] * weight_o
        for ty in range(3):  # not unrolled: with all nine matrices in flight some variants spill
            for tx in tl.static_range(3):
                shifted = tl.gather(upsampled, corner + (ty * (TILE_W + 2) + tx), axis=0)
                matrix = tl.load(at + (ty * 3 + tx) * weight_t, mask=square, other=0.0).to(tl.float32)
                convolved = tl.dot(shifted, matrix, convolved, input_precision="ieee")
        convolved += tl.load(bias + p * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        part = (1 - ratio) * tl.gather(upsampled, corner + (TILE_W + 3), axis=0) + ratio * convolved
    else:
        part = upsampled
    y += top
    x += left
    present = ((y < height) & (x < width))[:, None] & inside
    if SIGN != 0:
        at = (y * base_y + x * base_x)[:, None] + (channel * base_c)[None, :]
        part = tl.load(base + picture * base_b + at, mask=present, other=0.0).to(tl.float32) + SIGN * part
    size = height * width * channels
    at = ((y * width + x) * channels)[:, None] + channel[None, :]
    tl.store(total + (step * batch + picture) * size + at, part, mask=present)
    if OUT:
        at = (channel * height * width)[None, :] + (y * width + x)[:, None]
        tl.store(out + picture * size + at, part.to(out.dtype.element_ty), mask=present)


@triton.jit
def pyramid_sum_kernel(
    parts,  # [steps, batch, size, channels] float32: read; the running sums, if IN_PLACE
    out,  # [batch, channels, size], or [steps, batch, channels, size] if CUMULATIVE; contiguous; not if IN_PLACE
    batch,
    size,
    channels,
    steps,
    IN_PLACE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of pixels of all pictures,). Adds up from the first step on."""
    blocks = tl.cdiv(size, BLOCK_N)
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    present = (pixel < size)[:, None] & (channel < channels)[None, :]
    at = parts + (picture * size + pixel)[:, None] * channels + channel[None, :]
    turned = out + (picture * channels + channel[None, :]) * size + pixel[:, None]
    stride = tl.full([], 1, tl.int64) * batch * size * channels
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for _ in range(steps):
        total += tl.load(at, mask=present, other=0.0)
        if IN_PLACE:
            tl.store(at, total, mask=present)
        if CUMULATIVE:
            tl.store(turned, total.to(out.dtype.element_ty), mask=present)
            turned += stride
        at += stride
    if not (IN_PLACE or CUMULATIVE):
        tl.store(turned, total.to(out.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["first"])
def pyramid_pool_kernel(
    maps,  # [steps, batch, height width, channels] float32
    out,  # [batch, length, channels], contiguous: scales from `first` on, one behind the other
    batch,
    height,
    width,
    channels,
    length,
    first,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of the largest scale's rows of all pictures, steps). Map `step` averaged to `first + step`."""
    step = tl.program_id(1)
    h, w, offset, _ = _scale(first + step, SCALES)
    _, _, skipped, _ = _scale(first, SCALES)
    picture = (tl.program_id(0) % batch).to(tl.int64)
    begin = (tl.program_id(0) // batch) * BLOCK_N
    row = begin + tl.arange(0, BLOCK_N)
    if begin < h * w:
        at = maps + (step * batch + picture) * height * width * channels
        row_at = tl.minimum(row, h * w - 1)
        mean = _averages(at, row_at, h, w, height, width, channels, BLOCK_N, BLOCK_C)
        channel = tl.arange(0, BLOCK_C)
        present = (row < h * w)[:, None] & (channel < channels)[None, :]
        at = out + (picture * length + offset - skipped + row)[:, None] * channels + channel[None, :]
        tl.store(at, mean.to(out.dtype.element_ty), mask=present)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _launch_parts(
    codes: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    scales: tuple[int, ...],
    first: int,
    steps: int,
    total: torch.Tensor,
    *,
    skip: int = 0,
    mask: int = -1,
    base: torch.Tensor | None = None,
    sign: int = 0,
    out: torch.Tensor | None = None,
) -> None:
    """The kernel's arguments are those above; `codes` is `table` where this holds vectors, `base` (B, C, H, W)."""
    height, width = scales[-3:-1]
    _, batch, size, channels = total.shape
    tile = part_tile(0 if out is not None else batch * size * steps)
    border = 2 if weight.shape[0] else 0
    vectors = table.ndim == 3
    base_strides = (0, 0, 0, 0) if base is None else base.stride()
    tiles = triton.cdiv(height, tile.height) * triton.cdiv(width, tile.width)
    pyramid_part_kernel[(batch * tiles, steps)](
        codes, table, weight, bias, total if base is None else base, total, total if out is None else out,
        batch, height, width, channels, table.shape[-2], ratio, first, skip, mask,
        0 if vectors else codes.stride(0), table.stride(0) if vectors else 0, table.stride(-2), table.stride(-1),
        *weight.stride(), *base_strides,
        SCALES=scales, VECTORS=vectors, PHI=bool(border), SIGN=sign, OUT=out is not None,
        TILE_H=tile.height, TILE_W=tile.width,
        BLOCK_H=triton.next_power_of_2((tile.height + border) * (tile.width + border)), BLOCK_C=_channels(channels),
        num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip


def _launch_pool(maps: torch.Tensor, scales: tuple[int, ...], first: int, out: torch.Tensor) -> None:
    steps, batch, _, channels = maps.shape
    height, width = scales[-3:-1]
    most = max(h * w for h, w in zip(scales[3 * first :: 3], scales[3 * first + 1 :: 3], strict=True))
    rows = min(16, triton.next_power_of_2(most))
    pyramid_pool_kernel[(triton.cdiv(most, rows) * batch, steps)](
        maps, out, batch, height, width, channels, out.shape[1], first,
        SCALES=scales, BLOCK_N=rows, BLOCK_C=_channels(channels), num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def multiscale_quantize(
    features: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    scales: tuple[int, ...],
    rest: torch.Tensor,
    norms: torch.Tensor,
    words: torch.Tensor,
) -> int:
    """Fills words (B, L) int64, contiguous; their low bits are the codes.

    Args:
        features: (B, C, H, W), any strides.
        codebook: (K, C), last dimension contiguous.
        weight: (P, 9, C in, C out), any strides; P = 0: no convolutions.
        bias: (P, C), contiguous.
        ratio: of the convolutions.
        scales: h, w and convolution of each scale, in one tuple.
        rest: (B, H W, C) float32, contiguous: workspace.
        norms: (2, K) float32, contiguous: workspace.
        words: the output.

    Returns:
        The mask of the codes' bits.
    """
    batch, size, channels = rest.shape
    num_codes, length = codebook.shape[0], words.shape[1]
    height, width = scales[-3:-1]
    bits = max(1, (num_codes - 1).bit_length())
    block_c = _channels(channels)
    block = max(1, 2048 // block_c)
    pyramid_begin_kernel[(triton.cdiv(max(batch * size, num_codes, words.numel()), block),)](
        features, rest, codebook, norms[0], norms[1], words,
        batch * size, size, width, channels, num_codes, words.numel(), *features.stride(), codebook.stride(0),
        BLOCK_N=block, BLOCK_C=block_c, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    maps = rest.view(batch, height, width, channels).permute(0, 3, 1, 2)
    mask = (1 << bits) - 1
    steps = len(scales) // 3
    for step in range(steps):
        rows = scales[3 * step] * scales[3 * step + 1]
        tile = search_tile(rows)
        programs = batch * triton.cdiv(rows, tile.rows)
        count, span = _runs(programs, num_codes, tile)
        pyramid_search_kernel[(programs, count)](
            rest, codebook, norms[0], norms[1], words,
            height, width, channels, num_codes, length, codebook.stride(0), step, span, (channels + 8) * 2.0**-24, bits,
            SCALES=scales, BLOCK_N=tile.rows, BLOCK_K=tile.codes, BLOCK_C=block_c, num_warps=tile.warps,
            maxnreg=REGISTERS,
        )  # fmt: skip
        if step + 1 < steps:
            _launch_parts(
                words, codebook, weight, bias, ratio, scales, step, 1, rest[None], mask=mask, base=maps, sign=-1
            )
    return mask


def multiscale_lookup(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    scales: tuple[int, ...],
    maps: torch.Tensor,
    out: torch.Tensor,
    what: str,
) -> None:
    """Fills out, contiguous: (B, C, H, W) for "sum", (n, B, C, H, W) for "cumulative", (B, L', C) for "inputs".

    Args:
        codes: (B, L'') int64, last dimension contiguous: those of the first n scales.
        codebook, weight, bias, ratio, scales: as above.
        maps: (n, B, H W, C) float32, contiguous: workspace.
        out: the output.
        what: which of the three.
    """
    steps, batch, size, channels = maps.shape
    _launch_parts(codes, codebook, weight, bias, ratio, scales, 0, steps, maps)
    block = 1024 // _channels(channels)
    pyramid_sum_kernel[(triton.cdiv(size, block) * batch,)](
        maps, out, batch, size, channels, steps,
        IN_PLACE=what == "inputs", CUMULATIVE=what == "cumulative",
        BLOCK_N=block, BLOCK_C=_channels(channels), num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    if what == "inputs":
        _launch_pool(maps, scales, 1, out)


def next_scale_input(
    features_hat: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    scales: tuple[int, ...],
    step: int,
    total: torch.Tensor,
    out: torch.Tensor,
    following: torch.Tensor,
) -> None:
    """Fills out (B, C, H, W) and following (B, h' w', C), contiguous; the latter is empty at the last step.

    Args:
        features_hat: (B, C, H, W), any strides.
        codes: (B, h w) int64, last dimension contiguous, or (B, h w, C) floating, any strides.
        codebook, weight, bias, ratio, scales: as above.
        step: the scale of the codes.
        total: (1, B, H W, C) float32, contiguous: workspace.
        out, following: the outputs.
    """
    skip = sum(scales[3 * s] * scales[3 * s + 1] for s in range(step))
    table = codes if codes.ndim == 3 else codebook
    _launch_parts(
        codes, table, weight, bias, ratio, scales, step, 1, total, skip=skip, base=features_hat, sign=1, out=out
    )
    if following.shape[1]:
        _launch_pool(total, scales, step + 1, following)


def _cases() -> list[tuple]:
    """What to compile, as in `unifiedar.kernels.codes`: VAR's schedule and width, and one that is not square."""
    cases: list[tuple] = []
    var = []
    for side, p in zip((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (0, 0, 1, 1, 1, 2, 2, 3, 3, 3), strict=True):
        var += [side, side, p]
    odd = (1, 1, 0, 2, 3, 0, 5, 9, 0)
    pointers = {
        **dict.fromkeys(("rest", "code_half", "code_norm", "total", "parts", "maps"), "*fp32"),
        **dict.fromkeys(("words", "codes"), "*i64"),
        **dict.fromkeys(("ratio", "slope"), "fp32"),
    }
    packed = [
        *("rest", "codebook", "table", "total", "parts", "maps", "base", "weight", "channels"),
        *("book_entry", "table_entry", "base_b", "base_y", "base_x", "weight_t", "weight_i"),
    ]

    def add(kernel, options: dict[str, int], feature: str, aligned: bool, **constants) -> None:
        features = dict.fromkeys(("features", "codebook", "table", "weight", "bias", "base", "out"), f"*{feature}")
        if constants.get("SIGN") == -1:
            features["base"] = "*fp32"
        names = {n: {**features, **pointers}.get(n, "i32") for n in kernel.arg_names if n not in constants}
        signature = {**names, **dict.fromkeys(constants, "constexpr")}
        divisors = dict.fromkeys([name for name in packed if name in names], 16) if aligned else {}
        cases.append((kernel, signature, constants, options, divisors))

    for scales, channels, feature in ((tuple(var), 32, "fp32"), (odd, 32, "bf16"), (odd, 12, "fp16")):
        aligned = channels % 32 == 0
        four, wide = {"num_warps": 4, "maxnreg": REGISTERS}, {"BLOCK_C": _channels(channels)}
        # Pixels or channels are neighbours, and what begins cannot know which.
        add(pyramid_begin_kernel, four, feature, False, BLOCK_N=2048 // wide["BLOCK_C"], **wide)
        for rows in (1, 4, 16, 256):
            tile = search_tile(rows)
            shape = {"SCALES": scales, "BLOCK_N": tile.rows, "BLOCK_K": tile.codes, **wide}
            add(pyramid_search_kernel, {"num_warps": tile.warps, "maxnreg": REGISTERS}, feature, aligned, **shape)
        for pixels, phi in ((256, True), (256, False), (256 * 64, True), (256 * 64, False)):
            piece = part_tile(pixels)
            options = {"num_warps": piece.warps, "maxnreg": REGISTERS}
            halo = triton.next_power_of_2((piece.height + 2 * phi) * (piece.width + 2 * phi))
            shape = {
                "SCALES": scales,
                "PHI": phi,
                "TILE_H": piece.height,
                "TILE_W": piece.width,
                "BLOCK_H": halo,
                **wide,
            }
            inner = {"table_c": 1, **({"weight_o": 1} if phi else {})}  # a launch sees strides of one
            part = pyramid_part_kernel
            whole = aligned and (phi or pixels > 256 or feature == "fp32")  # else a thread has four halves of a row
            add(part, options, feature, whole, SIGN=0, VECTORS=False, OUT=False, **inner, **shape)
            add(part, options, feature, whole, SIGN=-1, VECTORS=False, OUT=False, base_c=1, **inner, **shape)
            if pixels == 256:
                add(part, options, feature, False, SIGN=1, VECTORS=False, OUT=True, table_c=1, **shape)
                add(part, options, feature, False, SIGN=1, VECTORS=True, OUT=True, **shape)
        for in_place, cumulative in ((True, False), (False, True), (False, False)):
            use = {"IN_PLACE": in_place, "CUMULATIVE": cumulative, "BLOCK_N": 1024 // wide["BLOCK_C"]}
            add(pyramid_sum_kernel, four, feature, aligned, **use, **wide)
        for rows in (1, 16):
            add(pyramid_pool_kernel, four, feature, aligned, SCALES=scales, BLOCK_N=rows, **wide)
    return cases


COMPILE_CASES = _cases()
