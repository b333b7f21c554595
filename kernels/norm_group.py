"""Triton kernels of group norm with SiLU, for maps in channels-last layout: (B, pixels, C), contiguous.

Three launches. `group_norm_parts_kernel` finds mean and squared distances to it of every channel in a run of pixels;
`group_norm_moments_kernel` puts the runs and the channels of a group together; `group_norm_apply_kernel` uses them.
So x is read twice and written once, and no atomics are needed. Everything in between is float32. Where groups are small
`group_norm_whole_kernel` does it all in one launch, a program for a group. Launches begin while the ones before end.

A convolution's bias costs nothing here: it moves means alone (`shift` of the moments). Where the norm is of a sum,
`add_maps_kernel` makes the sum and its parts in one pass, also of a map that stands in four phases, as a convolution
of an upsampled map leaves it whose weights `phase_weights_kernel` summed.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent

__all__ = ["COMPILE_CASES", "add_maps", "chunks", "group_norm", "group_norm_whole", "phase_weights", "whole"]

# The interpreter knows no assembly.
_PLAIN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"))

# Entries of a group, up to which maps are normed in one launch. Of four times as many (640 channels at 32 x 32) that is
# 1.4 to 1.6 times as fast for 8 pictures and more, but half as fast for one, on an H100.
WHOLE = 8192


@dataclass(frozen=True)
class Tile:
    """What a program has in registers: `pixels` x `channels`."""

    pixels: int
    channels: int
    warps: int


def tile_of(channels: int) -> Tile:
    """As wide as an eighth of padding at most allows, 16 to 128 channels; 32 elements a thread."""
    width = 128
    while width > 16 and triton.cdiv(channels, width) * width * 8 > channels * 9:
        width //= 2
    return Tile(pixels=4096 // width, channels=width, warps=4)


def apply_tile(channels: int) -> Tile:
    """Half as high: addresses of 32 elements that are not read in packs take more than the registers there are."""
    tile = tile_of(channels)
    return Tile(tile.pixels // 2, tile.channels, tile.warps)


def add_tile(channels: int) -> Tile:
    """Half as high again: two maps come in, and sums of distances stay."""
    tile = apply_tile(channels)
    return Tile(tile.pixels // 2, tile.channels, tile.warps)


@dataclass(frozen=True)
class Whole:
    """Groups of a picture that a program of `group_norm_whole_kernel` takes, and its tile."""

    groups: int
    pixels: int
    channels: int
    warps: int


def whole(pixels: int, channels: int, groups: int) -> Whole | None:
    """How maps whose groups are small are normed in one launch; None for larger ones.

    It does not depend on how many pictures there are, so neither does what is computed for one.
    """
    width = channels // groups
    if pixels * width > WHOLE or width > 128:
        return None
    count = min(triton.cdiv(16, width), groups)
    block = triton.next_power_of_2(count * width)
    return Whole(count, min(triton.next_power_of_2(pixels), 2048 // block), block, 4)


def _run(pixels: int, channels: int) -> int:
    """Pixels of a run: so many that a picture has 500 to 1,000 programs, if it has so many tiles.

    It does not depend on how many pictures there are, so neither does what is computed for one.
    """
    tile = tile_of(channels)
    tiles = triton.cdiv(pixels, tile.pixels) * triton.cdiv(channels, tile.channels)
    return tile.pixels * max(1, tiles // 528)


def chunks(pixels: int, channels: int) -> int:
    """How many runs the pixels of a picture make."""
    return triton.cdiv(pixels, _run(pixels, channels))


@triton.jit
def _save_parts(parts, which, channel, channels, inside, near, total, squares, count):
    """Mean and squared distances to it, of sums and squared sums of distances to `near`, over the axis of pixels.

    `near` is the mean of the run's first tile, one of T, so that at most a share of T / (T + 1) of the squares cancels.
    """
    step = tl.div_rn(tl.sum(total, axis=0), count)  # of a constant, exactly zero
    apart = tl.maximum(tl.sum(squares, axis=0) - count * step * step, 0.0)
    at = parts + which * 2 * channels + channel
    tl.store(at, near + step, mask=inside)
    tl.store(at + channels, apart, mask=inside)


@triton.jit
def group_norm_parts_kernel(
    x,  # [batch, pixels, channels]
    parts,  # [batch, chunks, 2, channels] float32: mean, sum of squared distances to it
    pixels,
    channels,
    chunks,
    run,  # pixels of a run, a multiple of BLOCK_P
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (batch * chunks * blocks of channels,), neighbours in memory at the same time."""
    if PDL:
        cuda.gdc_wait()
    across = tl.cdiv(channels, BLOCK_C)
    which = (tl.program_id(0) // across).to(tl.int64)
    low = ((tl.program_id(0) // across) % chunks) * run
    channel = (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    left = tl.minimum(pixels - low, run)
    pixel = tl.arange(0, BLOCK_P)
    start = x + ((which // chunks) * pixels + low) * channels
    at = start + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    present = (pixel < left)[:, None] & inside[None, :]
    tile = tl.load(at, mask=present, other=0.0).to(tl.float32)
    near = tl.div_rn(tl.sum(tile, axis=0), tl.minimum(left, BLOCK_P).to(tl.float32))
    total = tl.where(present, tile - near[None, :], 0.0)
    squares = total * total
    for begin in range(BLOCK_P, left, BLOCK_P):
        at += BLOCK_P * channels
        present = (begin + pixel < left)[:, None] & inside[None, :]
        tile = tl.load(at, mask=present, other=0.0).to(tl.float32)
        apart = tl.where(present, tile - near[None, :], 0.0)
        total += apart
        squares += apart * apart
    if PDL:
        cuda.gdc_launch_dependents()
    _save_parts(parts, which, channel, channels, inside, near, total, squares, left.to(tl.float32))


@triton.jit
def _add_tile(
    x, residual, shift, out, picture, pixel, channel, present, pixels, channels, width,
    RESIDUAL: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """Stores a tile of x + shift + residual, with x as it is or in phases; returns it as stored, in float32."""
    at = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
    if PHASES:
        row, column = pixel // width, pixel % width
        high, wide = pixels // width // 2 + 1, width // 2 + 1
        place = (picture * high + row // 2 + row % 2) * wide + column // 2 + column % 2
        source = (place * 4 + (row % 2) * 2 + column % 2)[:, None] * channels + channel[None, :]
    else:
        source = at
    tile = tl.load(x + source, mask=present, other=0.0).to(tl.float32) + shift[None, :]
    if RESIDUAL:
        tile += tl.load(residual + at, mask=present, other=0.0).to(tl.float32)
    rounded = tile.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=present)
    return rounded.to(tl.float32)


@triton.jit
def add_maps_kernel(
    x,  # [batch, pixels, channels], or with PHASES [batch, height / 2 + 1, width / 2 + 1, 4, channels]
    residual,  # [batch, pixels, channels], read if RESIDUAL
    shift,  # [channels]
    out,  # [batch, pixels, channels]
    parts,  # as above, written if PARTS: of what `out` holds, rounded
    pixels,
    channels,
    chunks,
    run,  # pixels of a run, a multiple of BLOCK_P
    width,  # pixels of a row, for PHASES
    RESIDUAL: tl.constexpr,
    PHASES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (batch * chunks * blocks of channels,)."""
    if PDL:
        cuda.gdc_wait()
    across = tl.cdiv(channels, BLOCK_C)
    which = (tl.program_id(0) // across).to(tl.int64)
    picture = which // chunks
    low = ((tl.program_id(0) // across) % chunks) * run
    channel = (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    moved = tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)
    left = tl.minimum(pixels - low, run)
    pixel = tl.arange(0, BLOCK_P)
    present = (pixel < left)[:, None] & inside[None, :]
    tile = _add_tile(
        x, residual, moved, out, picture, low + pixel, channel, present, pixels, channels, width, RESIDUAL, PHASES
    )
    near = tl.div_rn(tl.sum(tl.where(present, tile, 0.0), axis=0), tl.minimum(left, BLOCK_P).to(tl.float32))
    total = tl.where(present, tile - near[None, :], 0.0)
    squares = total * total
    for begin in range(BLOCK_P, left, BLOCK_P):
        present = (begin + pixel < left)[:, None] & inside[None, :]
        tile = _add_tile(
            x, residual, moved, out, picture, low + begin + pixel, channel, present, pixels, channels, width,
            RESIDUAL, PHASES,
        )  # fmt: skip
        apart = tl.where(present, tile - near[None, :], 0.0)
        total += apart
        squares += apart * apart
    if PDL:
        cuda.gdc_launch_dependents()
    if PARTS:
        _save_parts(parts, which, channel, channels, inside, near, total, squares, left.to(tl.float32))


@triton.jit
def phase_weights_kernel(
    weight,  # [outs, 3, 3, ins]
    out,  # [2, 2, outs, 2, 2, ins]
    outs,
    ins,
    BLOCK: tl.constexpr,
):
    """Grid: (outs, blocks of ins). Sums in float32, rounded once."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < ins
    row = tl.program_id(0).to(tl.int64)
    for phase in tl.static_range(4):
        for tap in tl.static_range(4):
            total = tl.zeros([BLOCK], tl.float32)
            for i in tl.static_range(3):
                for j in tl.static_range(3):
                    # The upsampled map repeats pixels: of phase 0, taps 1 and 2 see the same one, of phase 1, 0 and 1.
                    if (i + 1 - phase // 2) // 2 == tap // 2 and (j + 1 - phase % 2) // 2 == tap % 2:
                        at = weight + (row * 9 + (3 * i + j)) * ins + channel
                        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = out + ((phase * outs + row) * 4 + tap) * ins + channel
            tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_moments_kernel(
    parts,  # as above
    weight,  # [channels]
    shift,  # [channels], what is added to x before the norm; read if SHIFT
    moments,  # [batch, 2, channels] float32: mean of the channel's group less shift, weight / sqrt(variance + eps)
    eps,
    pixels,
    channels,
    chunks,
    run,
    width,  # channels of a group
    SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,  # runs at a time
    BLOCK_W: tl.constexpr,  # at least width
    PDL: tl.constexpr,
):
    """Grid: (batch, groups)."""
    if PDL:
        cuda.gdc_wait()
    picture = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK_W)
    channel = tl.program_id(1) * width + offset
    inside = offset < width
    start = parts + picture * chunks * 2 * channels
    entries = 1.0 * pixels * width
    moved = tl.zeros([BLOCK_W], tl.float32)
    if SHIFT:
        moved = tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_W], tl.float32)
    for begin in range(0, chunks, BLOCK_N):
        chunk = begin + tl.arange(0, BLOCK_N)
        present = (chunk < chunks)[:, None] & inside[None, :]
        at = start + chunk.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        share = tl.minimum(run, pixels - chunk * run).to(tl.float32)
        means = tl.load(at, mask=present, other=0.0) + moved[None, :]
        total += tl.sum(tl.where(present, means * share[:, None], 0.0), axis=0)
    mean = tl.div_rn(tl.sum(total, axis=0), entries)
    total = tl.zeros([BLOCK_W], tl.float32)
    for begin in range(0, chunks, BLOCK_N):
        chunk = begin + tl.arange(0, BLOCK_N)
        present = (chunk < chunks)[:, None] & inside[None, :]
        at = start + chunk.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        share = tl.minimum(run, pixels - chunk * run).to(tl.float32)
        step = tl.load(at, mask=present, other=0.0) + moved[None, :] - mean
        squares = tl.load(at + channels, mask=present, other=0.0)
        total += tl.sum(tl.where(present, squares + step * step * share[:, None], 0.0), axis=0)
    variance = tl.sum(total, axis=0) / entries
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    if PDL:
        cuda.gdc_launch_dependents()
    at = moments + picture * 2 * channels + channel
    tl.store(at, mean - moved, mask=inside)
    tl.store(at + channels, scale, mask=inside)


# y / (1 + 2^(-y log2 e)) with the multiplier's own powers and reciprocals, as exact as float32 sums are; spelled out, a
# division and subnormal powers take as many instructions again as all else in a norm.
_SILU: tl.constexpr = tl.constexpr("""{
.reg .f32 a;
mul.f32 a, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 a, a;
add.f32 a, a, 0f3F800000;
rcp.approx.ftz.f32 a, a;
mul.f32 $0, $1, a;
}""")


@triton.jit
def _store_normed(apart, scale, shift, to, present, SILU: tl.constexpr):
    """Stores a tile's norm, of distances to the mean, and SiLU of it."""
    y = apart * scale[None, :] + shift[None, :]
    if SILU:
        if _PLAIN:
            y = y / (1.0 + tl.exp(-y))
        else:
            y = tl.inline_asm_elementwise(_SILU, "=f,f", [y], tl.float32, is_pure=True, pack=1)
    tl.store(to, y.to(to.dtype.element_ty), mask=present)


@triton.jit
def _present(pixel, pixels, inside, EVEN: tl.constexpr):
    """Which of a tile's entries there are, where all of its pixels are there if EVEN."""
    if EVEN:
        return tl.broadcast_to(inside[None, :], [pixel.shape[0], inside.shape[0]])
    else:
        return (pixel < pixels)[:, None] & inside[None, :]


@triton.jit
def _of_groups(channel_sums, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sums over each channel's group, of sums of channels from the first of a group on."""
    if GROUPS == 1:
        return tl.zeros([BLOCK_C], tl.float32) + tl.sum(channel_sums, axis=0)
    of_group = (tl.arange(0, BLOCK_C) // WIDTH)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    sums = tl.sum(tl.where(of_group, channel_sums[:, None], 0.0), axis=0)
    return tl.sum(tl.where(of_group, sums[None, :], 0.0), axis=1)


@triton.jit(do_not_specialize=["pixels"])
def group_norm_whole_kernel(
    x,  # [batch, pixels, channels]
    weight,  # [channels]
    bias,  # [channels]
    shift,  # [channels], read if SHIFT
    out,  # as x
    eps,
    pixels,
    channels,
    WIDTH: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # that a program takes
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    ONCE: tl.constexpr,  # whether all pixels are one tile
    EVEN: tl.constexpr,  # whether tiles are full
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least WIDTH GROUPS
    BLOCK_G: tl.constexpr,  # at least GROUPS
    PDL: tl.constexpr,
):
    """Grid: (batch * blocks of groups,). All of a picture's pixels; read again, if not ONCE, out of a cache."""
    if PDL:
        cuda.gdc_wait()
    blocks = tl.cdiv(channels, WIDTH * GROUPS)
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.arange(0, BLOCK_C)
    channel = (tl.program_id(0) % blocks) * (WIDTH * GROUPS) + place
    inside = (place < WIDTH * GROUPS) & (channel < channels)
    pixel = tl.arange(0, BLOCK_P)
    start = picture * pixels * channels
    offset = pixel[:, None] * channels + channel[None, :]
    # Channels that are not there are left out once pixels are summed up, not of every pixel.
    present = _present(pixel, pixels, inside, EVEN)
    tile = tl.load(x + start + offset, mask=present, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    low = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    moved = tl.zeros([BLOCK_C], tl.float32)
    if SHIFT:
        moved = tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)
    count = 1.0 * pixels
    if ONCE:
        if SHIFT:
            tile += moved[None, :]
            if not EVEN:
                tile = tl.where(present, tile, 0.0)
        mean = _of_groups(tl.sum(tile, axis=0), GROUPS, WIDTH, BLOCK_C, BLOCK_G)
        mean = tl.div_rn(mean, count * WIDTH)
        apart = tile - mean[None, :]
        if not EVEN:
            apart = tl.where(present, apart, 0.0)
        squares = tl.where(inside, tl.sum(apart * apart, axis=0), 0.0)
    else:
        near = tl.div_rn(tl.sum(tile, axis=0), tl.minimum(pixels, BLOCK_P).to(tl.float32))
        total = tile - near[None, :]
        distance = total * total
        for begin in range(BLOCK_P, pixels, BLOCK_P):
            present = _present(begin + pixel, pixels, inside, EVEN)
            tile = tl.load(x + start + begin * channels + offset, mask=present, other=0.0).to(tl.float32)
            apart = tile - near[None, :]
            if not EVEN:
                apart = tl.where(present, apart, 0.0)
            total += apart
            distance += apart * apart
        # Of channels, then of their groups: as `_save_parts` and `group_norm_moments_kernel` do.
        step = tl.div_rn(tl.sum(total, axis=0), count)
        squares = tl.maximum(tl.sum(distance, axis=0) - count * step * step, 0.0)
        means = near + step + moved
        mean = tl.div_rn(_of_groups(tl.where(inside, means, 0.0), GROUPS, WIDTH, BLOCK_C, BLOCK_G), 1.0 * WIDTH)
        squares = tl.where(inside, squares + (means - mean) * (means - mean) * count, 0.0)
        mean -= moved
    variance = _of_groups(squares, GROUPS, WIDTH, BLOCK_C, BLOCK_G) / (count * WIDTH)
    scale = scale / tl.sqrt(variance + eps)
    if PDL:
        cuda.gdc_launch_dependents()
    if ONCE:
        _store_normed(apart, scale, low, out + start + offset, present, SILU)
    else:
        # From the last pixels on, which the nearest cache may still hold.
        last = (pixels - 1) // BLOCK_P * BLOCK_P
        for back in range(0, pixels, BLOCK_P):
            begin = last - back
            present = _present(begin + pixel, pixels, inside, EVEN)
            at = start + begin * channels
            tile = tl.load(x + at + offset, mask=present, other=0.0).to(tl.float32)
            _store_normed(tile - mean[None, :], scale, low, out + at + offset, present, SILU)


@triton.jit
def group_norm_apply_kernel(
    x,
    moments,  # as above
    bias,  # [channels]
    out,  # as x
    pixels,
    channels,
    blocks,  # of pixels in a picture
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (batch * blocks * blocks of channels,)."""
    if PDL:
        cuda.gdc_wait()
    across = tl.cdiv(channels, BLOCK_C)
    which = (tl.program_id(0) // across).to(tl.int64)
    picture = which // blocks
    channel = (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    at = moments + picture * 2 * channels + channel
    mean = tl.load(at, mask=inside, other=0.0)
    scale = tl.load(at + channels, mask=inside, other=0.0)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    pixel = (which % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    present = (pixel < pixels)[:, None] & inside[None, :]
    offset = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
    tile = tl.load(x + offset, mask=present, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
    _store_normed(tile - mean[None, :], scale, shift, out + offset, present, SILU)


def _group_block(chunks: int, width: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_W of the moments' kernel: at most 2,048 entries."""
    block_w = triton.next_power_of_2(width)
    return min(triton.next_power_of_2(chunks), max(1, 2048 // block_w)), block_w


def add_maps(
    x: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    phases: bool,
    out: torch.Tensor,
    parts: torch.Tensor | None,
) -> None:
    """Fills out (B, C, H, W), in channels-last layout, with x + shift + residual, and parts of it if there are any.

    x and residual are as out, or x with `phases` (B, 4 C, H / 2 + 1, W / 2 + 1).
    """
    batch, channels, height, width = out.shape
    pixels, tile = height * width, add_tile(channels)
    run = 2 * tile.pixels if parts is None else _run(pixels, channels)
    runs = triton.cdiv(pixels, run)
    add_maps_kernel[(batch * runs * triton.cdiv(channels, tile.channels),)](
        x, x if residual is None else residual, shift, out, shift if parts is None else parts,
        pixels, channels, runs, run, width,
        RESIDUAL=residual is not None, PHASES=phases, PARTS=parts is not None,
        BLOCK_P=tile.pixels, BLOCK_C=tile.channels, num_warps=tile.warps, **dependent(x),
    )  # fmt: skip


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    parts: torch.Tensor,
    moments: torch.Tensor,
    out: torch.Tensor,
    *,
    parted: bool = False,
) -> None:
    """Fills out from x + shift, both maps (B, C, H, W) in channels-last layout.

    parts and moments are workspace, as above; with `parted`, parts are those of x already.
    """
    batch, channels, height, width = x.shape
    pixels, tile = height * width, tile_of(channels)
    runs, run = parts.shape[1], _run(pixels, channels)
    across = triton.cdiv(channels, tile.channels)
    if not parted:
        group_norm_parts_kernel[(batch * runs * across,)](
            x, parts, pixels, channels, runs, run,
            BLOCK_P=tile.pixels, BLOCK_C=tile.channels, num_warps=tile.warps, **dependent(x),
        )  # fmt: skip
    block_n, block_w = _group_block(runs, channels // groups)
    group_norm_moments_kernel[(batch, groups)](
        parts, weight, weight if shift is None else shift, moments, eps,
        pixels, channels, runs, run, channels // groups,
        SHIFT=shift is not None, BLOCK_N=block_n, BLOCK_W=block_w, num_warps=4, **dependent(x),
    )  # fmt: skip
    tile = apply_tile(channels)
    blocks = triton.cdiv(pixels, tile.pixels)
    group_norm_apply_kernel[(batch * blocks * across,)](
        x, moments, bias, out, pixels, channels, blocks,
        SILU=silu, BLOCK_P=tile.pixels, BLOCK_C=tile.channels, num_warps=tile.warps, **dependent(x),
    )  # fmt: skip


def group_norm_whole(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    out: torch.Tensor,
    one: Whole,
) -> None:
    """As `group_norm`, in one launch, for maps that `whole` has a tile for."""
    batch, channels, height, width = x.shape
    group_norm_whole_kernel[(batch * triton.cdiv(groups, one.groups),)](
        x, weight, bias, weight if shift is None else shift, out, eps, height * width, channels,
        WIDTH=channels // groups, GROUPS=one.groups, SHIFT=shift is not None, SILU=silu,
        ONCE=height * width <= one.pixels, EVEN=height * width % one.pixels == 0,
        BLOCK_P=one.pixels, BLOCK_C=one.channels, BLOCK_G=triton.next_power_of_2(one.groups), num_warps=one.warps,
        **dependent(x),
    )  # fmt: skip


def phase_weights(weight: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (4 O, I, 2, 2) from weight (O, I, 3, 3), both in channels-last layout."""
    outs, ins = weight.shape[:2]
    block = min(1024, max(32, triton.next_power_of_2(ins)))
    phase_weights_kernel[(outs, triton.cdiv(ins, block))](weight, out, outs, ins, BLOCK=block, num_warps=4)


def _cases() -> list[tuple]:
    """As `COMPILE_CASES` of the other families, at the widths of VAR's (160, 640) and RQ-VAE's (512) networks.

    Groups of five channels are not read in packs, so the moments' kernel is compiled one way only.
    """
    cases: list[tuple] = []

    def add(kernel, warps: int, types: dict[str, str], packed: tuple[str, ...], **constants: int | bool) -> None:
        for arch in (80, 90):
            launch = {"launch_pdl": True} if arch == 90 and "PDL" in kernel.arg_names else {}
            fixed = constants | ({"PDL": bool(launch)} if "PDL" in kernel.arg_names else {})
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in fixed}
            signature = {**names, **dict.fromkeys(fixed, "constexpr")}
            for divisors in (dict.fromkeys(packed, 16), {}) if packed else ({},):
                cases.append((kernel, signature, fixed, {"num_warps": warps, **launch}, divisors, (arch,)))

    for name, channels, side in (("bf16", 160, 256), ("fp16", 640, 16), ("fp32", 512, 8)):
        tile, runs = tile_of(channels), chunks(side * side, channels)
        types = {"x": f"*{name}", "out": f"*{name}", "weight": f"*{name}", "bias": f"*{name}"}
        types |= dict.fromkeys(("residual", "shift"), f"*{name}")
        types |= {"parts": "*fp32", "moments": "*fp32", "eps": "fp32"}
        blocks = {"BLOCK_P": tile.pixels, "BLOCK_C": tile.channels}
        add(group_norm_parts_kernel, tile.warps, types, ("x", "parts", "channels"), **blocks)
        tile = apply_tile(channels)
        blocks = {"BLOCK_P": tile.pixels, "BLOCK_C": tile.channels}
        packed: tuple[str, ...] = ("x", "moments", "bias", "out", "channels")
        for silu in (True, False):
            add(group_norm_apply_kernel, tile.warps, types, packed, SILU=silu, **blocks)
        tile = add_tile(channels)
        blocks = {"BLOCK_P": tile.pixels, "BLOCK_C": tile.channels}
        packed = ("x", "residual", "shift", "out", "parts", "channels")
        for residual, phases, with_parts in ((True, False, True), (False, True, True), (True, False, False)):
            flags = {"RESIDUAL": residual, "PHASES": phases, "PARTS": with_parts}
            add(add_maps_kernel, tile.warps, types, packed, **flags, **blocks)
        if one := whole(side * side, channels, 32):
            constants = {"WIDTH": channels // 32, "GROUPS": one.groups, "SHIFT": True, "SILU": True}
            constants |= {
                "ONCE": side * side <= one.pixels,
                "EVEN": side * side % one.pixels == 0,
                "BLOCK_P": one.pixels,
                "BLOCK_C": one.channels,
            }
            constants["BLOCK_G"] = triton.next_power_of_2(one.groups)
            # Groups of 20 channels begin on 8 bytes.
            packed = ("x", "out", "channels") if channels // 32 % 16 == 0 else ()
            add(group_norm_whole_kernel, one.warps, types, packed, **constants)
        block_n, block_w = _group_block(runs, channels // 32)
        for shift in (True, False):
            add(group_norm_moments_kernel, 4, types, (), SHIFT=shift, BLOCK_N=block_n, BLOCK_W=block_w)
        block = max(32, triton.next_power_of_2(channels))
        add(phase_weights_kernel, 4, types, (), BLOCK=block)
    return cases


COMPILE_CASES = _cases()
