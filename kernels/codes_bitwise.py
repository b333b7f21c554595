"""Triton kernels of bitwise quantization: signs, codes and losses of rows; a whole residual pyramid in one launch.

The sign of a channel needs no other channel, and neither do pooling and resizing: every (picture, channel) plane of a
pyramid is a problem of its own, small enough for one program and its multiprocessor's L1 cache. So a program walks
through all scales of its plane, with barriers where the grid would need launches. What the threads of a program tell
each other goes through global memory of its own. A sum of given bits needs no barrier: there a program has pixels.

Everything is float32. Rows and offsets of planes are 64-bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    "COMPILE_CASES",
    "bitwise_lookup",
    "bitwise_pack",
    "bitwise_pyramid",
    "bitwise_quantize",
    "bitwise_sum",
    "losses_parts",
]

_WARPS = 4
_PLANE_WARPS = 16
_PLANE_REGISTERS = 64  # two programs a multiprocessor; left alone, ptxas of Triton 3.6 goes for three and spills


def _rows(dim: int) -> int:
    """Tokens of a program: 16 elements a thread."""
    return 32 * _WARPS * 16 // triton.next_power_of_2(dim)


def _block(width: int) -> dict[str, Any]:
    """The tile of a plane that is worked on at a time: a pixel a thread, as the small scales have no more."""
    across = min(max(triton.next_power_of_2(width), 16), 128)
    return {"BLOCK_H": 32 * _PLANE_WARPS // across, "BLOCK_W": across}


def _sum_block(dim: int) -> dict[str, Any]:
    """Pixels and channels of a program: 8 sums a thread, so that one picture's 4,096 pixels are 128 programs."""
    channels = triton.next_power_of_2(dim)
    return {"BLOCK_N": max(1, 32 * _WARPS * 8 // channels), "BLOCK_D": channels}


# ---- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def _block_of_rows(rows, dim, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's rows and channels, where they are in memory and which exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    return row, channel, row[:, None] * dim + channel[None, :], (row < rows)[:, None] & (channel < dim)[None, :]


@triton.jit
def _pack(bit, channel, dim):
    """The words of a tile of bits; channels from `dim` on must not be set."""
    place = tl.maximum(dim - 1 - channel, 0).to(tl.int64)
    one = tl.full(place.shape, 1, tl.int64) << place
    return tl.sum(tl.where(bit, one[None, :], 0), axis=1)


@triton.jit
def _unit(value, SPHERICAL: tl.constexpr):
    """The rows that the codes are near to, and their norms."""
    norm = tl.sqrt_rn(tl.sum(value * value, axis=1))
    if SPHERICAL:
        value = tl.div_rn(value, tl.maximum(norm, 1e-12)[:, None] + tl.zeros_like(value))
    return value, norm


@triton.jit
def bitwise_quantize_kernel(
    x,  # [rows, dim]
    out_bits,  # [rows, dim] uint8, or [rows] int64 if PACKED
    out_quantized,  # [rows, dim]
    out_parts,  # [programs, dim + 2] float32, if LOSSES: probabilities, entropy, squared distance
    rows,
    dim,
    magnitude,
    sharpness,
    share,  # 1 / rows
    PACKED: tl.constexpr,
    LOSSES: tl.constexpr,
    SPHERICAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows. out_parts are sums over the block's rows, times `share`."""
    row, channel, at, inside = _block_of_rows(rows, dim, BLOCK_N, BLOCK_D)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    bit = value > 0
    code = tl.where(bit, magnitude, -magnitude)
    tl.store(out_quantized + at, code.to(out_quantized.dtype.element_ty), mask=inside)
    if PACKED:
        tl.store(out_bits + row, _pack(bit, channel, dim), mask=row < rows)
    else:
        tl.store(out_bits + at, bit.to(tl.uint8), mask=inside)
    if LOSSES:
        unit, _ = _unit(value, SPHERICAL)
        logit = unit * sharpness
        size = tl.abs(logit)
        small = tl.exp(-size)
        low = small / (1 + small)  # the probability of the less likely value
        probability = tl.where(logit > 0, 1 / (1 + small), low)
        entropy = tl.log(1 + small) + size * low
        far = unit - code
        part = out_parts + tl.program_id(0).to(tl.int64) * (dim + 2)
        counts = tl.sum(tl.where(inside, probability, 0.0), axis=0)
        tl.store(part + channel, counts * share, mask=channel < dim)
        tl.store(part + dim, tl.sum(tl.sum(tl.where(inside, entropy, 0.0), axis=1), axis=0) * share)
        tl.store(part + dim + 1, tl.sum(tl.sum(tl.where(inside, far * far, 0.0), axis=1), axis=0) * share)


@triton.jit
def bitwise_quantize_backward_kernel(
    x,  # [rows, dim]
    grad,  # [rows, dim], if CODES: of the codes
    grad_sums,  # [dim + 2] float32, if LOSSES: of probabilities, entropy, squared distance
    out,  # [rows, dim]
    rows,
    dim,
    magnitude,
    sharpness,
    share,  # 1 / rows
    CODES: tl.constexpr,
    LOSSES: tl.constexpr,
    SPHERICAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows."""
    _row, channel, at, inside = _block_of_rows(rows, dim, BLOCK_N, BLOCK_D)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    unit, norm = _unit(value, SPHERICAL)
    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if CODES:
        g += tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if LOSSES:
        logit = unit * sharpness
        small = tl.exp(-tl.abs(logit))
        variance = small / ((1 + small) * (1 + small))  # p (1 - p)
        of_probability = tl.load(grad_sums + channel, mask=channel < dim, other=0.0)
        of_entropy = tl.load(grad_sums + dim)
        of_distance = tl.load(grad_sums + dim + 1)
        code = tl.where(value > 0, magnitude, -magnitude)
        slope = (of_probability[None, :] - of_entropy * logit) * variance * sharpness
        g += (slope + 2 * of_distance * (unit - code)) * share
        g = tl.where(inside, g, 0.0)
    if SPHERICAL:
        along = tl.sum(g * unit, axis=1)
        tall = (norm > 1e-12)[:, None]
        g = tl.where(tall, g - unit * along[:, None], g) / tl.where(tall, norm[:, None], 1e-12)
    tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bitwise_pack_kernel(
    bits,  # [rows, dim], any integers: what is not 0 is 1
    out,  # [rows] int64
    rows,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows."""
    row, channel, at, inside = _block_of_rows(rows, dim, BLOCK_N, BLOCK_D)
    bit = tl.load(bits + at, mask=inside, other=0) != 0
    tl.store(out + row, _pack(bit, channel, dim), mask=row < rows)


@triton.jit
def bitwise_lookup_kernel(
    bits,  # [rows, dim], any integers, or [rows] int64 if PACKED
    out,  # [rows, dim], labels if it is uint8, else codes
    rows,
    dim,
    magnitude,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows."""
    row, channel, at, inside = _block_of_rows(rows, dim, BLOCK_N, BLOCK_D)
    if PACKED:
        word = tl.load(bits + row, mask=row < rows, other=0)
        place = tl.maximum(dim - 1 - channel, 0).to(tl.int64)
        bit = ((word[:, None] >> place[None, :]) & 1) != 0
    else:
        bit = tl.load(bits + at, mask=inside, other=0) != 0
    if out.dtype.element_ty == tl.uint8:
        tl.store(out + at, bit.to(tl.uint8), mask=inside)
    else:
        tl.store(out + at, tl.where(bit, magnitude, -magnitude).to(out.dtype.element_ty), mask=inside)


# ---- pyramids --------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(top, left, rows, columns, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Row numbers (BLOCK_H, 1), column numbers (1, BLOCK_W) and which are inside a grid [rows, columns]."""
    y = top + tl.arange(0, BLOCK_H)[:, None]
    x = left + tl.arange(0, BLOCK_W)[None, :]
    return y, x, (y < rows) & (x < columns)


@triton.jit
def _window(place, extent, size):
    """Where windows on a side of `size` begin and end on a side of `extent`: the floor and the ceiling."""
    return place * extent // size, ((place + 1) * extent + size - 1) // size


@triton.jit
def _pool_rows(
    features,
    total,
    pooled,
    present,
    h,
    height,
    width,
    RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Fills pooled [h, width] with sums over windows of rows of a plane: of features less total (where `present`), or
    of total."""
    reach = (height + h - 1) // h + 1
    for top in range(0, h, BLOCK_H):
        for left in range(0, width, BLOCK_W):
            i, x, inside = _tile(top, left, h, width, BLOCK_H, BLOCK_W)
            low, high = _window(i, height, h)
            value = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
            for first in range(0, reach, 4):
                for offset in tl.static_range(4):
                    y = low + first + offset
                    here = inside & (y < high)
                    at = y * width + x
                    if RESIDUAL:
                        one = tl.load(features + at, mask=here, other=0.0).to(tl.float32)
                        value += one - tl.load(total + at, mask=here & present, other=0.0)
                    else:
                        value += tl.load(total + at, mask=here, other=0.0)
            tl.store(pooled + i * width + x, value, mask=inside)


@triton.jit
def _pool_columns(pooled, i, j, inside, h, w, height, width):
    """Means over windows (i, j) of h x w, from sums over windows of rows."""
    reach = (width + w - 1) // w + 1
    low, high = _window(j, width, w)
    above, below = _window(i, height, h)
    value = tl.zeros(inside.shape, tl.float32)
    for first in range(0, reach, 4):
        for offset in tl.static_range(4):
            x = low + first + offset
            value += tl.load(pooled + i * width + x, mask=inside & (x < high), other=0.0)
    return value / ((high - low) * (below - above)).to(tl.float32)


@triton.jit
def _corner(place, extent, size):
    """Of each place on a side of `size`: the two neighbours on a side of `extent`, and the second one's weight."""
    scale = tl.div_rn(extent * 1.0, size * 1.0)  # a size of one is a constant, which has no .to
    source = tl.maximum((place.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), extent - 1)
    return low, tl.minimum(low + 1, extent - 1), source - low.to(tl.float32)


@triton.jit
def _blend(a, b, c, d, down, along):
    """Linear between two rows of two neighbours."""
    return (1 - down) * ((1 - along) * a + along * b) + down * ((1 - along) * c + along * d)


@triton.jit
def _code(tokens, at, inside, magnitude):
    """Codes, or those that labels stand for."""
    code = tl.load(tokens + at, mask=inside, other=0)
    if tokens.dtype.element_ty == tl.uint8:
        code = tl.where(code != 0, magnitude, -magnitude)
    return code


@triton.jit
def _resize(plane, i, j, inside, h, w, height, width):
    """Values at (i, j) of a [height, width] grid, linear between those of a plane [h, w]; corners are not aligned."""
    top, bottom, down = _corner(i, h, height)
    left, right, along = _corner(j, w, width)
    a = tl.load(plane + top * w + left, mask=inside, other=0.0)
    b = tl.load(plane + top * w + right, mask=inside, other=0.0)
    c = tl.load(plane + bottom * w + left, mask=inside, other=0.0)
    d = tl.load(plane + bottom * w + right, mask=inside, other=0.0)
    return _blend(a, b, c, d, down, along)


@triton.jit
def bitwise_pyramid_kernel(
    features,  # [batch, dim, height, width], if QUANTIZE
    tokens,  # [batch, length, dim]: labels (uint8) or codes (float32), unless QUANTIZE
    start,  # [batch, dim, height, width] float32, if RESUME: what the first scale's codes are added to
    flips,  # [batch, length, dim] bool, if FLIP
    schedule,  # [scales or one more, 2] int32: height and width of each scale, and of the one that follows
    workspace,  # [2, batch * dim, room] float32
    out_bits,  # [batch, length, dim] uint8, if QUANTIZE
    out_total,  # [batch, dim, height, width] float32
    out_inputs,  # [batch, inputs, dim] float32: of every scale in the schedule but the first, if TRILINEAR or AREA
    out_residuals,  # [batch, length, dim] float32, if RESIDUALS
    planes,  # batch * dim
    dim,
    length,
    inputs,
    scales,
    known,  # scales in the schedule
    room,  # at least h * w and h * width of every scale
    height,
    width,
    magnitude,
    QUANTIZE: tl.constexpr,
    RESUME: tl.constexpr,
    FLIP: tl.constexpr,
    TRILINEAR: tl.constexpr,
    AREA: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid: planes. Barriers part what the threads write into the plane's memory from where others read it."""
    plane = tl.program_id(0).to(tl.int64)
    batch = plane // dim
    channel = plane % dim
    pixels = height * width
    features += plane * pixels
    start += plane * pixels
    total = out_total + plane * pixels
    pooled = workspace + plane * room
    codes = workspace + (planes + plane) * room
    token = batch * length * dim + channel
    follow = out_inputs + batch * inputs * dim + channel
    for s in range(scales):
        h = tl.load(schedule + 2 * s)
        w = tl.load(schedule + 2 * s + 1)
        # The scale's bits, and their codes where the whole program can see them.
        if QUANTIZE:
            _pool_rows(features, total, pooled, s > 0, h, height, width, True, BLOCK_H, BLOCK_W)
            tl.debug_barrier()
        for top in range(0, h, BLOCK_H):
            for left in range(0, w, BLOCK_W):
                i, j, inside = _tile(top, left, h, w, BLOCK_H, BLOCK_W)
                at = token + (i * w + j).to(tl.int64) * dim
                if QUANTIZE:
                    rest = _pool_columns(pooled, i, j, inside, h, w, height, width)
                    bit = rest > 0
                    tl.store(out_bits + at, bit.to(tl.uint8), mask=inside)
                    if RESIDUALS:
                        tl.store(out_residuals + at, rest, mask=inside)
                    if FLIP:
                        bit = bit ^ (tl.load(flips + at, mask=inside, other=0) != 0)
                    code = tl.where(bit, magnitude, -magnitude)
                else:
                    code = _code(tokens, at, inside, magnitude)
                tl.store(codes + i * w + j, code, mask=inside)
        token += (h * w).to(tl.int64) * dim
        tl.debug_barrier()
        # The codes, resized to the plane, added to the running sum.
        for top in range(0, height, BLOCK_H):
            for left in range(0, width, BLOCK_W):
                y, x, inside = _tile(top, left, height, width, BLOCK_H, BLOCK_W)
                index = y * width + x
                value = _resize(codes, y, x, inside, h, w, height, width)
                if RESUME:
                    value += tl.load(start + index, mask=inside & (s == 0), other=0.0)
                value += tl.load(total + index, mask=inside & (s > 0), other=0.0)
                tl.store(total + index, value, mask=inside)
        tl.debug_barrier()
        # The next scale's input: the sum, resized to it.
        if TRILINEAR or AREA:  # noqa: SIM102 - the first is known when this is compiled
            if s + 1 < known:
                to_h = tl.load(schedule + 2 * s + 2)
                to_w = tl.load(schedule + 2 * s + 3)
                if AREA:
                    _pool_rows(features, total, pooled, True, to_h, height, width, False, BLOCK_H, BLOCK_W)
                    tl.debug_barrier()
                for top in range(0, to_h, BLOCK_H):
                    for left in range(0, to_w, BLOCK_W):
                        i, j, inside = _tile(top, left, to_h, to_w, BLOCK_H, BLOCK_W)
                        if AREA:
                            value = _pool_columns(pooled, i, j, inside, to_h, to_w, height, width)
                        else:
                            value = _resize(total, i, j, inside, height, width, to_h, to_w)
                        tl.store(follow + (i * to_w + j).to(tl.int64) * dim, value, mask=inside)
                follow += (to_h * to_w).to(tl.int64) * dim
                if AREA:
                    tl.debug_barrier()


@triton.jit
def bitwise_sum_kernel(
    tokens,  # [batch, length, dim]: labels (uint8) or codes (float32)
    start,  # [batch, dim, height, width] float32, if RESUME: what the first scale's codes are added to
    schedule,  # [scales, 2] int32: height and width of each scale
    out_total,  # [batch, dim, height, width] float32
    dim,
    length,
    scales,
    height,
    width,
    magnitude,
    RESUME: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of BLOCK_N pixels, picture after picture. With the bits given no pixel needs another: each reads its
    neighbours' codes at every scale, all channels of a token side by side, and the sum stays in registers."""
    blocks = tl.cdiv(height * width, BLOCK_N)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (pixel < height * width) & (channel < dim)
    tokens += batch * length * dim
    at = (batch * dim + channel) * height * width + pixel
    value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if RESUME:
        value = tl.load(start + at, mask=inside, other=0.0)
    for s in range(scales):
        h = tl.load(schedule + 2 * s)
        w = tl.load(schedule + 2 * s + 1)
        top, bottom, down = _corner(pixel // width, h, height)
        left, right, along = _corner(pixel % width, w, width)
        a = _code(tokens, (top * w + left) * dim + channel, inside, magnitude)
        b = _code(tokens, (top * w + right) * dim + channel, inside, magnitude)
        c = _code(tokens, (bottom * w + left) * dim + channel, inside, magnitude)
        d = _code(tokens, (bottom * w + right) * dim + channel, inside, magnitude)
        value += _blend(a, b, c, d, down, along)
        tokens += (h * w).to(tl.int64) * dim
    tl.store(out_total + at, value, mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def losses_parts(rows: int, dim: int) -> int:
    """How many parts of the losses' sums `bitwise_quantize` makes."""
    return triton.cdiv(rows, _rows(dim))


def _blocks(dim: int) -> dict[str, int]:
    return {"BLOCK_N": _rows(dim), "BLOCK_D": triton.next_power_of_2(dim), "num_warps": _WARPS}


def bitwise_quantize(
    x: torch.Tensor,
    magnitude: float,
    sharpness: float,
    spherical: bool,
    out_bits: torch.Tensor,
    out_quantized: torch.Tensor,
    out_parts: torch.Tensor | None,
) -> None:
    """Fills bits, labels (N, d) or words (N,), and codes (N, d) of contiguous x (N, d), and parts of the losses."""
    rows, dim = x.shape
    bitwise_quantize_kernel[(losses_parts(rows, dim),)](
        x,
        out_bits,
        out_quantized,
        x if out_parts is None else out_parts,
        rows,
        dim,
        magnitude,
        sharpness,
        1 / rows,
        PACKED=out_bits.ndim == 1,
        LOSSES=out_parts is not None,
        SPHERICAL=spherical,
        **_blocks(dim),
    )


def bitwise_quantize_backward(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    grad_sums: torch.Tensor | None,
    magnitude: float,
    sharpness: float,
    spherical: bool,
    out: torch.Tensor,
) -> None:
    """Fills the gradient of contiguous x (N, d), given those of its codes and of the losses' sums."""
    rows, dim = x.shape
    bitwise_quantize_backward_kernel[(losses_parts(rows, dim),)](
        x,
        x if grad is None else grad,
        x if grad_sums is None else grad_sums,
        out,
        rows,
        dim,
        magnitude,
        sharpness,
        1 / rows,
        CODES=grad is not None,
        LOSSES=grad_sums is not None,
        SPHERICAL=spherical,
        **_blocks(dim),
    )


def bitwise_pack(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Fills words (N,) from contiguous labels (N, d)."""
    rows, dim = bits.shape
    bitwise_pack_kernel[(losses_parts(rows, dim),)](bits, out, rows, dim, **_blocks(dim))


def bitwise_lookup(bits: torch.Tensor, magnitude: float, out: torch.Tensor) -> None:
    """Fills labels or codes (N, d) from contiguous labels (N, d) or words (N,)."""
    rows, dim = out.shape
    bitwise_lookup_kernel[(losses_parts(rows, dim),)](
        bits, out, rows, dim, magnitude, PACKED=bits.ndim == 1, **_blocks(dim)
    )


def bitwise_pyramid(
    features: torch.Tensor | None,
    tokens: torch.Tensor | None,
    start: torch.Tensor | None,
    flips: torch.Tensor | None,
    schedule: torch.Tensor,
    scales: int,
    magnitude: float,
    inputs: str,
    workspace: torch.Tensor,
    out_bits: torch.Tensor | None,
    out_total: torch.Tensor,
    out_inputs: torch.Tensor,
    out_residuals: torch.Tensor | None,
) -> None:
    """Quantizes features (B, d, H, W), or adds up tokens (B, L, d) with what each next scale reads.

    The arguments are the kernel's above. All are contiguous; `inputs` is "trilinear", "area" or "".
    """
    batch, dim, height, width = out_total.shape
    bits = tokens if out_bits is None else out_bits
    assert bits is not None
    bitwise_pyramid_kernel[(batch * dim,)](
        out_total if features is None else features,
        bits if tokens is None else tokens,
        out_total if start is None else start,
        bits if flips is None else flips,
        schedule,
        workspace,
        bits,
        out_total,
        out_inputs,
        out_total if out_residuals is None else out_residuals,
        batch * dim,
        dim,
        bits.shape[1],
        out_inputs.shape[1],
        scales,
        schedule.shape[0],
        workspace.shape[2],
        height,
        width,
        magnitude,
        QUANTIZE=features is not None,
        RESUME=start is not None,
        FLIP=flips is not None,
        TRILINEAR=inputs == "trilinear",
        AREA=inputs == "area",
        RESIDUALS=out_residuals is not None,
        **_block(width),
        num_warps=_PLANE_WARPS,
        maxnreg=_PLANE_REGISTERS,
        num_stages=1,  # what a scale writes the next one reads: nothing may be loaded ahead
    )


def bitwise_sum(
    tokens: torch.Tensor,
    start: torch.Tensor | None,
    schedule: torch.Tensor,
    magnitude: float,
    out_total: torch.Tensor,
) -> None:
    """Adds up tokens (B, L, d), each scale resized to out_total (B, d, H, W); all are contiguous."""
    batch, dim, height, width = out_total.shape
    block = _sum_block(dim)
    bitwise_sum_kernel[(triton.cdiv(height * width, block["BLOCK_N"]) * batch,)](
        tokens,
        out_total if start is None else start,
        schedule,
        out_total,
        dim,
        tokens.shape[1],
        schedule.shape[0],
        height,
        width,
        magnitude,
        RESUME=start is not None,
        num_warps=_WARPS,
        **block,
    )


def _cases() -> list[tuple]:
    """(kernel, signature, constexprs, options, divisors) to compile, at the widths of Infinity and odd ones.

    Divisors, by argument, are what a launch would find out: with them memory is moved in packs, without element by
    element.
    """
    cases: list[tuple] = []
    warps = {"num_warps": _WARPS}

    def add(kernel, types: dict[str, str], options: dict[str, int], packed: bool = True, **constants: Any) -> None:
        names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        wide = [name for name, kind in names.items() if kind[0] == "*" or name in ("dim", "room", "height", "width")]
        signature = {**names, **dict.fromkeys(constants, "constexpr")}
        for divisors in (dict.fromkeys(wide, 16), {}) if packed else ({},):
            cases.append((kernel, signature, constants, options, divisors))

    floats = dict.fromkeys(("magnitude", "sharpness", "share"), "fp32")
    sums = dict.fromkeys(("out_parts", "grad_sums", "out_residuals", "out_inputs", "out_total", "start"), "*fp32")
    for name, dim in (("fp32", 32), ("bf16", 64), ("fp16", 18)):
        types = {**floats, **sums, **dict.fromkeys(("x", "grad", "out", "out_quantized", "features"), f"*{name}")}
        blocks = {"BLOCK_N": _rows(dim), "BLOCK_D": triton.next_power_of_2(dim)}
        for flag in (False, True):
            bits = {**types, "out_bits": "*i64" if flag else "*u8"}
            shape = {"LOSSES": True, "SPHERICAL": flag, **blocks}
            add(bitwise_quantize_kernel, bits, warps, PACKED=flag, **shape)
            add(bitwise_quantize_backward_kernel, types, warps, CODES=flag, **shape)
        types |= {"flips": "*i1", "schedule": "*i32", "workspace": "*fp32", "out_bits": "*u8"}
        for quantize, resume, tokens, mode in (
            (True, False, "*u8", "trilinear"),
            (True, False, "*u8", "area"),
            (False, True, "*u8", "trilinear"),
            (False, False, "*fp32", "trilinear"),
        )[: 4 if name == "fp32" else 1]:  # only the first two read features
            add(
                bitwise_pyramid_kernel,
                {**types, "tokens": tokens},
                {"num_warps": _PLANE_WARPS, "maxnreg": _PLANE_REGISTERS, "num_stages": 1},
                packed=False,  # a pixel a thread
                QUANTIZE=quantize,
                RESUME=resume,
                FLIP=quantize,
                TRILINEAR=mode == "trilinear",
                AREA=mode == "area",
                RESIDUALS=quantize,
                **_block(64),
            )
    blocks = {"BLOCK_N": _rows(32), "BLOCK_D": 32}
    for resume, tokens in ((False, "*u8"), (True, "*fp32")):
        given = {**floats, **sums, "tokens": tokens, "schedule": "*i32"}
        # Neighbours at a scale are wherever they are.
        add(bitwise_sum_kernel, given, warps, packed=False, RESUME=resume, **_sum_block(32))
    add(bitwise_pack_kernel, {"bits": "*u8", "out": "*i64"}, warps, **blocks)
    for flag, labels, out in ((True, "*i64", "*u8"), (False, "*u8", "*fp32"), (True, "*i64", "*bf16")):
        # Words are loaded one a row, so no pack is.
        words = {**floats, "bits": labels, "out": out}
        add(bitwise_lookup_kernel, words, warps, packed=not flag, PACKED=flag, **blocks)
    return cases


COMPILE_CASES = _cases()
