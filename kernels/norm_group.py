"""Triton kernels of group norm with SiLU, for maps in channels-last layout: (B, pixels, C), contiguous.

Three launches. `group_norm_parts_kernel` finds mean and squared distances to it of every channel in a run of pixels;
`group_norm_moments_kernel` puts the runs and the channels of a group together; `group_norm_apply_kernel` uses them.
So x is read twice and written once, and no atomics are needed. Everything in between is float32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "chunks", "group_norm"]


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
def group_norm_parts_kernel(
    x,  # [batch, pixels, channels]
    parts,  # [batch, chunks, 2, channels] float32: mean, sum of squared distances to it
    pixels,
    channels,
    chunks,
    run,  # pixels of a run, a multiple of BLOCK_P
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (batch * chunks, blocks of channels). Tiles are joined as Chan et al. (1979) join samples."""
    which = tl.program_id(0).to(tl.int64)
    low = (which % chunks) * run
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    left = tl.minimum(pixels - low, run)
    start = x + ((which // chunks) * pixels + low) * channels
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    seen = 0.0
    for begin in range(0, run, BLOCK_P):
        pixel = begin + tl.arange(0, BLOCK_P)
        present = (pixel < left)[:, None] & inside[None, :]
        at = start + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        tile = tl.load(at, mask=present, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(left - begin, 0), BLOCK_P).to(tl.float32)
        own = tl.div_rn(tl.sum(tile, axis=0), tl.maximum(count, 1.0))  # of a constant, exactly the constant
        apart = tl.where(present, tile - own[None, :], 0.0)
        # A tile beyond the last pixel counts nothing: its factors are zero.
        total = seen + count
        step = own - mean
        mean += step * (count / total)
        squares += tl.sum(apart * apart, axis=0) + step * step * (seen * (count / total))
        seen = total
    at = parts + which * 2 * channels + channel
    tl.store(at, mean, mask=inside)
    tl.store(at + channels, squares, mask=inside)


@triton.jit
def group_norm_moments_kernel(
    parts,  # as above
    weight,  # [channels]
    moments,  # [batch, 2, channels] float32: mean of the channel's group, weight / sqrt(variance + eps)
    eps,
    pixels,
    channels,
    chunks,
    run,
    width,  # channels of a group
    BLOCK_N: tl.constexpr,  # runs at a time
    BLOCK_W: tl.constexpr,  # at least width
):
    """Grid: (batch, groups)."""
    picture = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK_W)
    channel = tl.program_id(1) * width + offset
    inside = offset < width
    start = parts + picture * chunks * 2 * channels
    entries = 1.0 * pixels * width
    total = tl.zeros([BLOCK_W], tl.float32)
    for begin in range(0, chunks, BLOCK_N):
        chunk = begin + tl.arange(0, BLOCK_N)
        present = (chunk < chunks)[:, None] & inside[None, :]
        at = start + chunk.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        share = tl.minimum(run, pixels - chunk * run).to(tl.float32)
        means = tl.load(at, mask=present, other=0.0)
        total += tl.sum(tl.where(present, means * share[:, None], 0.0), axis=0)
    mean = tl.div_rn(tl.sum(total, axis=0), entries)
    total = tl.zeros([BLOCK_W], tl.float32)
    for begin in range(0, chunks, BLOCK_N):
        chunk = begin + tl.arange(0, BLOCK_N)
        present = (chunk < chunks)[:, None] & inside[None, :]
        at = start + chunk.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        share = tl.minimum(run, pixels - chunk * run).to(tl.float32)
        step = tl.load(at, mask=present, other=0.0) - mean
        squares = tl.load(at + channels, mask=present, other=0.0)
        total += tl.sum(tl.where(present, squares + step * step * share[:, None], 0.0), axis=0)
    variance = tl.sum(total, axis=0) / entries
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    at = moments + picture * 2 * channels + channel
    tl.store(at, tl.zeros([BLOCK_W], tl.float32) + mean, mask=inside)
    tl.store(at + channels, scale, mask=inside)


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
):
    """Grid: (batch * blocks, blocks of channels)."""
    which = tl.program_id(0).to(tl.int64)
    picture = which // blocks
    pixel = (which % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    at = moments + picture * 2 * channels + channel
    mean = tl.load(at, mask=inside, other=0.0)
    scale = tl.load(at + channels, mask=inside, other=0.0)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    present = (pixel < pixels)[:, None] & inside[None, :]
    offset = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
    y = tl.load(x + offset, mask=present, other=0.0).to(tl.float32)
    y = (y - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=present)


def _group_block(chunks: int, width: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_W of the moments' kernel: at most 2,048 entries."""
    block_w = triton.next_power_of_2(width)
    return min(triton.next_power_of_2(chunks), max(1, 2048 // block_w)), block_w


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    parts: torch.Tensor,
    moments: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills out from x, both (B, C, H, W) in channels-last layout; parts and moments are workspace, as above."""
    batch, channels, height, width = x.shape
    pixels, tile = height * width, tile_of(channels)
    runs, run = parts.shape[1], _run(pixels, channels)
    across = triton.cdiv(channels, tile.channels)
    group_norm_parts_kernel[(batch * runs, across)](
        x, parts, pixels, channels, runs, run, BLOCK_P=tile.pixels, BLOCK_C=tile.channels, num_warps=tile.warps
    )
    block_n, block_w = _group_block(runs, channels // groups)
    group_norm_moments_kernel[(batch, groups)](
        parts, weight, moments, eps, pixels, channels, runs, run, channels // groups,
        BLOCK_N=block_n, BLOCK_W=block_w, num_warps=4,
    )  # fmt: skip
    tile = apply_tile(channels)
    blocks = triton.cdiv(pixels, tile.pixels)
    group_norm_apply_kernel[(batch * blocks, across)](
        x, moments, bias, out, pixels, channels, blocks,
        SILU=silu, BLOCK_P=tile.pixels, BLOCK_C=tile.channels, num_warps=tile.warps,
    )  # fmt: skip


def _cases() -> list[tuple]:
    """As `COMPILE_CASES` of the other families, at the widths of VAR's (160, 640) and RQ-VAE's (512) networks.

    Groups of five channels are not read in packs, so the moments' kernel is compiled one way only.
    """
    cases: list[tuple] = []

    def add(kernel, warps: int, types: dict[str, str], packed: tuple[str, ...], **constants: int | bool) -> None:
        names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        signature = {**names, **dict.fromkeys(constants, "constexpr")}
        for divisors in (dict.fromkeys(packed, 16), {}) if packed else ({},):
            cases.append((kernel, signature, constants, {"num_warps": warps}, divisors))

    for name, channels, side in (("bf16", 160, 256), ("fp16", 640, 16), ("fp32", 512, 8)):
        tile, runs = tile_of(channels), chunks(side * side, channels)
        types = {"x": f"*{name}", "out": f"*{name}", "weight": f"*{name}", "bias": f"*{name}"}
        types |= {"parts": "*fp32", "moments": "*fp32", "eps": "fp32"}
        blocks = {"BLOCK_P": tile.pixels, "BLOCK_C": tile.channels}
        add(group_norm_parts_kernel, tile.warps, types, ("x", "parts", "channels"), **blocks)
        tile = apply_tile(channels)
        blocks = {"BLOCK_P": tile.pixels, "BLOCK_C": tile.channels}
        packed = ("x", "moments", "bias", "out", "channels")
        for silu in (True, False):
            add(group_norm_apply_kernel, tile.warps, types, packed, SILU=silu, **blocks)
        block_n, block_w = _group_block(runs, channels // 32)
        add(group_norm_moments_kernel, 4, types, (), BLOCK_N=block_n, BLOCK_W=block_w)
    return cases


COMPILE_CASES = _cases()
