"""Triton kernels of the family `norm`: norm, gain and rotation of queries and keys, with a copy of values, gradients of
these, and the modulated layer norm of tokens.

A program takes consecutive tokens of one head, or one token for the layer norm. Arithmetic is float32 with IEEE
divisions and roots, rounded once. Strides of heads come in units of 8 elements, so that every load is one of 16 bytes.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent

__all__ = ["COMPILE_CASES", "aligned", "modulated_norm", "qk_norm_rope", "qk_norm_rope_backward", "tiles"]

UNIT = 8  # elements
_UNIT: tl.constexpr = tl.constexpr(UNIT)
_LOG_LIMIT: tl.constexpr = tl.constexpr(4.605170185988092)  # log 100
ELEMENTS = 4096  # of a tile in half precision, 32 a thread; half as many in float32
WARPS = 4

_SCALARS = [
    "length", "heads", "groups", "programs", "eps",
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "out_q_batch", "out_q_head", "out_q_row", "out_k_batch", "out_k_head", "out_k_row",
    "out_v_batch", "out_v_head", "out_v_row", "grad_q_batch", "grad_q_head", "grad_q_row",
    "grad_k_batch", "grad_k_head", "grad_k_row", "new_q_batch", "new_q_head", "new_q_row",
    "new_k_batch", "new_k_head", "new_k_row",
]  # fmt: skip


@triton.jit
def _exponential(x):
    """e^x of one float32, to an ulp: the hardware's alone is off by some 1e-5 at a gain of 100."""
    x = tl.maximum(x, -87.0, propagate_nan=tl.PropagateNan.ALL)
    steps = tl.floor(x * 1.4426950408889634 + 0.5)
    # log 2 in two parts, of which the first has few enough bits for an exact product.
    x = (x - steps * 0.693359375) + steps * 2.12194440e-4
    total = 1.0 / 5040.0
    total = total * x + 1.0 / 720.0
    total = total * x + 1.0 / 120.0
    total = total * x + 1.0 / 24.0
    total = total * x + 1.0 / 6.0
    total = total * x + 0.5
    total = total * x + 1.0
    total = total * x + 1.0
    return total * ((steps.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _cut(gain):
    """Log gain, at most the limit as rounded to its dtype."""
    limit = tl.full([], _LOG_LIMIT, tl.float32).to(gain.dtype).to(tl.float32)
    return tl.minimum(gain.to(tl.float32), limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inverse(x, eps, NORM: tl.constexpr, WIDTH: tl.constexpr):
    """What a norm multiplies rows by, [rows]."""
    square = tl.sum(x * x, 1)
    if NORM == "l2":
        return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), eps))
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, WIDTH * 1.0) + eps))


@triton.jit
def _turned(x, rope, token, length, rope_part, rope_row, BACK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """x [BLOCK_L, BLOCK_D] with neighbouring channels turned by the table's angles, or back."""
    half = tl.arange(0, BLOCK_D // 2)[None, :]
    at = rope + token.to(tl.int64)[:, None] * rope_row + half
    inside = (token < length)[:, None] & (half < WIDTH // 2)
    cosine = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(at + rope_part, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sine = -sine
    even, odd = tl.split(tl.reshape(x, (BLOCK_L, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(cosine * even - sine * odd, sine * even + cosine * odd), (BLOCK_L, BLOCK_D))


@triton.jit
def _one(
    x, out, gain, weight, rope, token, channel, length, eps, rope_part, rope_row,
    NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of one head of queries or keys; x and out are [BLOCK_L, BLOCK_D] addresses, gain one."""
    inside = (token < length)[:, None] & (channel < WIDTH)[None, :]
    y = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    if NORM != "none":
        y *= _inverse(y, eps, NORM, WIDTH)[:, None]
    if gain is not None:
        y *= _exponential(_cut(tl.load(gain)))
    if weight is not None:
        y *= tl.load(weight + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)[None, :]
    if rope is not None:
        y = _turned(y, rope, token, length, rope_part, rope_row, False, WIDTH, BLOCK_L, BLOCK_D)
    tl.store(out, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def qk_norm_rope_kernel(
    q,  # [batch, heads, length, width], strides q_batch, q_head, q_row in units, 1
    k,  # [batch, groups, length, width]
    v,  # like k, or None
    gain,  # [heads], or None
    q_weight,  # [width], or None
    k_weight,  # [width], or None
    rope,  # [2, length, width / 2], strides rope_part, rope_row, 1, or None
    out_q,  # like q; written
    out_k,  # like k; written
    out_v,  # like v; written
    length,
    heads,
    groups,
    programs,  # heads of all kinds in a picture: heads + groups, or heads + 2 groups
    eps,
    rope_part,
    rope_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_q_batch,
    out_q_head,
    out_q_row,
    out_k_batch,
    out_k_head,
    out_k_row,
    out_v_batch,
    out_v_head,
    out_v_row,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (tiles of tokens * heads of queries, keys and values * batch,)."""
    tiles = tl.cdiv(length, BLOCK_L)
    if rope is None and v is None:  # the heads of a token, which lie together, at the same time
        head = tl.program_id(0) % programs
        row = tl.program_id(0) // programs
        batch, tile = (row // tiles).to(tl.int64), row % tiles
    else:
        tile = tl.program_id(0) % tiles
        row = tl.program_id(0) // tiles
        batch, head = (row // programs).to(tl.int64), row % programs
    token = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.arange(0, BLOCK_D)
    wide = token.to(tl.int64)[:, None] * _UNIT
    line = channel[None, :]
    if head < heads:
        own = head.to(tl.int64)
        _one(
            q + (batch * q_batch + own * q_head) * _UNIT + wide * q_row + line,
            out_q + (batch * out_q_batch + own * out_q_head) * _UNIT + wide * out_q_row + line,
            None if gain is None else gain + head, q_weight, rope, token, channel, length, eps, rope_part, rope_row,
            NORM, WIDTH, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    elif head < heads + groups:
        own = (head - heads).to(tl.int64)
        _one(
            k + (batch * k_batch + own * k_head) * _UNIT + wide * k_row + line,
            out_k + (batch * out_k_batch + own * out_k_head) * _UNIT + wide * out_k_row + line,
            None, k_weight, rope, token, channel, length, eps, rope_part, rope_row, NORM, WIDTH, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    elif v is not None:
        own = (head - heads - groups).to(tl.int64)
        inside = (token < length)[:, None] & (line < WIDTH)
        copied = tl.load(v + (batch * v_batch + own * v_head) * _UNIT + wide * v_row + line, mask=inside)
        tl.store(
            out_v + (batch * out_v_batch + own * out_v_head) * _UNIT + wide * out_v_row + line, copied, mask=inside
        )


@triton.jit
def _one_backward(
    grad, x, out, gain, weight, rope, parts_gain, parts_weight, token, channel, length, eps, rope_part, rope_row,
    NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of rows of one head; parts_gain and parts_weight are where this program's sums go."""
    inside = (token < length)[:, None] & (channel < WIDTH)[None, :]
    y = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    if rope is not None:
        g = _turned(g, rope, token, length, rope_part, rope_row, True, WIDTH, BLOCK_L, BLOCK_D)
    if NORM != "none":
        inverse = _inverse(y, eps, NORM, WIDTH)[:, None]
        y *= inverse
    if gain is not None:
        log_gain = tl.load(gain)
        factor = _exponential(_cut(log_gain))
        # Beyond the limit it was cut off, so that it moves nothing.
        total = tl.sum(tl.sum(g * y, 1), 0)
        part = tl.where(log_gain.to(tl.float32) > _cut(log_gain), 0.0, total * factor)
        tl.store(parts_gain, part)
        g *= factor
    if weight is not None:
        tl.store(parts_weight + channel, tl.sum(g * y, 0), mask=channel < WIDTH)
        g *= tl.load(weight + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)[None, :]
    if NORM == "l2":
        along = tl.sum(g * y, 1)[:, None]
        # A row shorter than eps is divided by eps, whatever its length.
        g = (g - tl.where(inverse < tl.div_rn(1.0, eps), y * along, 0.0)) * inverse
    elif NORM == "rms":
        g = (g - y * tl.div_rn(tl.sum(g * y, 1), WIDTH * 1.0)[:, None]) * inverse
    tl.store(out, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def qk_norm_rope_backward_kernel(
    grad_q,  # like q
    grad_k,  # like k
    q,  # [batch, heads, length, width], strides q_batch, q_head, q_row in units, 1
    k,  # [batch, groups, length, width]
    gain,  # [heads], or None
    q_weight,  # [width], or None
    k_weight,  # [width], or None
    rope,  # [2, length, width / 2], strides rope_part, rope_row, 1, or None
    new_q,  # gradient of q; written
    new_k,  # gradient of k; written
    parts_gain,  # [batch, heads, tiles] float32; written; None without a gain
    parts_q,  # [batch * heads * tiles, width] float32; written; None without weights
    parts_k,  # [batch * groups * tiles, width] float32; written; None without weights
    length,
    heads,
    groups,
    programs,  # heads + groups
    eps,
    rope_part,
    rope_row,
    grad_q_batch,
    grad_q_head,
    grad_q_row,
    grad_k_batch,
    grad_k_head,
    grad_k_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    new_q_batch,
    new_q_head,
    new_q_row,
    new_k_batch,
    new_k_head,
    new_k_row,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (tiles of tokens * heads of queries and keys * batch,)."""
    tiles = tl.cdiv(length, BLOCK_L)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    batch, head = (row // programs).to(tl.int64), row % programs
    token = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.arange(0, BLOCK_D)
    wide = token.to(tl.int64)[:, None] * _UNIT
    line = channel[None, :]
    if head < heads:
        own = head.to(tl.int64)
        part = (batch * heads + own) * tiles + tile
        _one_backward(
            grad_q + (batch * grad_q_batch + own * grad_q_head) * _UNIT + wide * grad_q_row + line,
            q + (batch * q_batch + own * q_head) * _UNIT + wide * q_row + line,
            new_q + (batch * new_q_batch + own * new_q_head) * _UNIT + wide * new_q_row + line,
            None if gain is None else gain + head, q_weight, rope,
            None if parts_gain is None else parts_gain + part, None if parts_q is None else parts_q + part * WIDTH,
            token, channel, length, eps, rope_part, rope_row, NORM, WIDTH, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    else:
        own = (head - heads).to(tl.int64)
        part = (batch * groups + own) * tiles + tile
        _one_backward(
            grad_k + (batch * grad_k_batch + own * grad_k_head) * _UNIT + wide * grad_k_row + line,
            k + (batch * k_batch + own * k_head) * _UNIT + wide * k_row + line,
            new_k + (batch * new_k_batch + own * new_k_head) * _UNIT + wide * new_k_row + line,
            None, k_weight, rope, None, None if parts_k is None else parts_k + part * WIDTH,
            token, channel, length, eps, rope_part, rope_row, NORM, WIDTH, BLOCK_L, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "eps"])
def modulated_norm_kernel(
    x,  # [rows, width]
    branch,  # like x, or [PARTS, rows, width], whose sum it is, or None
    bias,  # [width], added to the branch, or None
    gate,  # [batch, width], strides gate_row, 1, or None
    scale,  # [batch, width], strides scale_row, 1
    shift,  # [batch, width], strides shift_row, 1
    out,  # like x; written
    new,  # like x; written: x + branch * gate; None without a branch
    length,  # rows of one batch
    apart,  # from one part to the next
    gate_row,
    scale_row,
    shift_row,
    eps,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (rows,)."""
    if PDL:
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    batch = row // length
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = row * WIDTH + channel
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # Before the sums, whose barriers no load passes: a token waits for memory once.
    stretch = 1.0 + tl.load(scale + batch * scale_row + channel, mask=inside, other=0.0).to(tl.float32)
    moved = tl.load(shift + batch * shift_row + channel, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        factor = tl.load(gate + batch * gate_row + channel, mask=inside, other=0.0).to(tl.float32)
        place = branch + at
        joined = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        for _ in tl.static_range(1, PARTS):
            place += apart
            joined += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            joined += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        y += joined * factor
        rounded = y.to(new.dtype.element_ty)
        tl.store(new + at, rounded, mask=inside)
        y = rounded.to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
    centred = tl.where(inside, y - tl.div_rn(tl.sum(y, 0), WIDTH * 1.0), 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 0), WIDTH * 1.0)
    y = centred * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) * stretch + moved
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sums(a, b, c):
    """Of three vectors, with one wait."""
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, c)), 0))
    a, b = tl.split(first)
    c, _ = tl.split(second)
    return a, b, c


@triton.jit(do_not_specialize=["length", "share", "parts_row", "eps"])
def modulated_norm_backward_kernel(
    grad,  # [batch, length, width]: of what came out
    grad_new,  # like it: of the tokens; None without a branch
    x,  # like it: the tokens that were normalized
    branch,  # like it, or None
    gate,  # [batch, width], strides gate_row, 1, or None
    scale,  # [batch, width], strides scale_row, 1
    grad_x,  # like x; written
    grad_branch,  # like branch; written, with one
    bias,  # [width], added to the branch, or None
    parts,  # float32 [2 to 4, batch, grid 0, width], parts_row from one to the next: of scale, shift, gate and bias
    length,
    share,  # tokens of a program
    parts_row,
    gate_row,
    scale_row,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Grid: (programs that share a batch's tokens, batch). With AHEAD the next token is on its way while sums of this
    one wait for each other."""
    first = tl.program_id(0) * share
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    of_scale = tl.zeros((BLOCK,), tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    if branch is not None:
        of_gate = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        of_bias = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum(first + share, length)
    at = (batch * length + first) * WIDTH + channel
    if AHEAD:
        there = inside & (first < end)
        next_y = tl.load(x + at, mask=there, other=0.0)
        next_given = tl.load(grad + at, mask=there, other=0.0)
        if branch is not None:
            next_through = tl.load(grad_new + at, mask=there, other=0.0)
            next_joined = tl.load(branch + at, mask=there, other=0.0)
    for token in range(first, end):
        if AHEAD:
            y, given = next_y, next_given
            there = inside & (token + 1 < end)
            next_y = tl.load(x + at + WIDTH, mask=there, other=0.0)
            next_given = tl.load(grad + at + WIDTH, mask=there, other=0.0)
            if branch is not None:
                through, joined = next_through, next_joined
                next_through = tl.load(grad_new + at + WIDTH, mask=there, other=0.0)
                next_joined = tl.load(branch + at + WIDTH, mask=there, other=0.0)
        else:
            y = tl.load(x + at, mask=inside, other=0.0)
            given = tl.load(grad + at, mask=inside, other=0.0)
            if branch is not None:
                through = tl.load(grad_new + at, mask=inside, other=0.0)
                joined = tl.load(branch + at, mask=inside, other=0.0)
        y, given = y.to(tl.float32), given.to(tl.float32)
        if branch is not None:
            through, joined = through.to(tl.float32), joined.to(tl.float32)
        of_shift += given
        # Vectors are read again for every token, which costs less than the registers to keep them in.
        stretch = 1.0 + tl.load(scale + batch * scale_row + channel, mask=inside, other=0.0).to(tl.float32)
        stretched = given * stretch
        centred = tl.where(inside, y - tl.div_rn(tl.sum(y, 0), WIDTH * 1.0), 0.0)
        square, along, mean = _sums(centred * centred, stretched * centred, stretched)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, WIDTH * 1.0) + eps))
        y = centred * inverse
        of_scale += given * y
        found = (stretched - tl.div_rn(mean, WIDTH * 1.0) - y * (tl.div_rn(along, WIDTH * 1.0) * inverse)) * inverse
        if branch is not None:
            found += through
            if bias is not None:
                joined += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
                of_bias += found
            of_gate += found * joined
            factor = tl.load(gate + batch * gate_row + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_branch + at, (found * factor).to(grad_branch.dtype.element_ty), mask=inside)
        tl.store(grad_x + at, found.to(grad_x.dtype.element_ty), mask=inside)
        at += WIDTH
    place = parts + (batch * tl.num_programs(0) + tl.program_id(0)) * WIDTH + channel
    tl.store(place, of_scale, mask=inside)
    tl.store(place + parts_row, of_shift, mask=inside)
    if branch is not None:
        tl.store(place + 2 * parts_row, of_gate, mask=inside)
    if bias is not None:
        tl.store(place + 3 * parts_row, of_bias, mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _block(width: int) -> int:
    """Channels of a tile."""
    return max(16, triton.next_power_of_2(width))


def _rows(width: int, itemsize: int) -> int:
    """Tokens of a tile."""
    return ELEMENTS * 2 // max(itemsize, 2) // _block(width)


def tiles(q: torch.Tensor) -> int:
    """How many programs share the tokens of a head of q (B, H, L, D)."""
    return triton.cdiv(q.shape[2], _rows(q.shape[3], q.element_size()))


def aligned(x: torch.Tensor) -> bool:
    """Whether the kernels can read and write a tensor (B, H, L, D) in place."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(step % UNIT == 0 or size == 1 for step, size in zip(x.stride()[:3], x.shape[:3], strict=True))
    )


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    """Of batch, heads and rows, in units; of a dimension of one, where any would do, perhaps rounded."""
    return [step // UNIT for x in tensors for step in ((0, 0, 0) if x is None else x.stride()[:3])]


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    norm: str,
    eps: float,
    gain: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor | None,
) -> None:
    """Fills out_q, out_k and, if there is a v, out_v.

    Args:
        q: (B, H, L, D); k, v: (B, G, L, D); `aligned`, as are the outputs, which are like them.
        norm: "l2", "rms" or "none".
        eps: of the norm.
        gain: (H,); q_weight, k_weight: (D,); contiguous, or None.
        rope: (2, L, D / 2), last dimension contiguous, or None.
        out_q, out_k, out_v: to be filled.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    programs = heads + groups * (1 if v is None else 2)
    part, row = (0, 0) if rope is None else rope.stride()[:2]
    qk_norm_rope_kernel[(tiles(q) * programs * batch,)](
        q, k, v, gain, q_weight, k_weight, rope, out_q, out_k, out_v, length, heads, groups, programs, eps, part, row,
        *_strides(q, k, v, out_q, out_k, out_v),
        NORM=norm, WIDTH=width, BLOCK_L=_rows(width, q.element_size()), BLOCK_D=_block(width), num_warps=WARPS,
    )  # fmt: skip


def qk_norm_rope_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    norm: str,
    eps: float,
    gain: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    new_q: torch.Tensor,
    new_k: torch.Tensor,
    parts_gain: torch.Tensor | None,
    parts_q: torch.Tensor | None,
    parts_k: torch.Tensor | None,
) -> None:
    """Fills the gradients of q and k, and each program's part of those of gain and weights.

    Args:
        grad_q, grad_k: gradients of the outputs, like q and k, `aligned`.
        q, k, norm, eps, gain, q_weight, k_weight, rope: as `qk_norm_rope` had them.
        new_q, new_k: like q and k, `aligned`.
        parts_gain: (B, H, tiles(q)) float32, with a gain.
        parts_q, parts_k: (B H tiles(q), D) and (B G tiles(q), D) float32, with weights.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    part, row = (0, 0) if rope is None else rope.stride()[:2]
    qk_norm_rope_backward_kernel[(tiles(q) * (heads + groups) * batch,)](
        grad_q, grad_k, q, k, gain, q_weight, k_weight, rope, new_q, new_k, parts_gain, parts_q, parts_k,
        length, heads, groups, heads + groups, eps, part, row, *_strides(grad_q, grad_k, q, k, new_q, new_k),
        NORM=norm, WIDTH=width, BLOCK_L=_rows(width, q.element_size()), BLOCK_D=_block(width), num_warps=WARPS,
    )  # fmt: skip


def _token_tile(width: int) -> tuple[int, int]:
    """Channels and warps of a program that takes one token: eight channels a thread, sixteen above 4096."""
    block = max(256, triton.next_power_of_2(width))
    return block, min(16, block // 256)


def modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    new: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> None:
    """Fills out and, with a branch, new.

    Args:
        x, branch, out, new: (B, L, C) contiguous; branch and new may be None together. The branch may be the sum of
            parts (P, B, L, C).
        gate, scale, shift: (B, C), last dimension contiguous; gate may be None with branch.
        eps: of the norm.
        bias: (C,) contiguous, added to the branch, or None.
    """
    batch, length, width = x.shape
    block, warps = _token_tile(width)
    parts = len(branch) if branch is not None and branch.ndim == 4 else 1
    modulated_norm_kernel[(batch * length,)](
        x, branch, bias, gate, scale, shift, out, new, length, x.numel(), 0 if gate is None else gate.stride(0),
        scale.stride(0), shift.stride(0), eps, PARTS=parts, WIDTH=width, BLOCK=block, num_warps=warps, **dependent(x),
    )  # fmt: skip


def _gradient_tile(width: int) -> tuple[int, int, bool]:
    """Channels and warps of a program of the gradient, four channels a thread up to 2048, and whether it has registers
    for the next token."""
    block = _token_tile(width)[0]
    return block, min(16, block // 128), block <= 2048


def token_shares(batch: int, length: int, width: int) -> tuple[int, int]:
    """Programs that share a batch's tokens in the gradient, and tokens of each: as many programs as a large GPU, of 132
    multiprocessors, runs at a time."""
    programs = max(1, min(length, 132 * max(1, 24 // _gradient_tile(width)[1]) // batch))
    share = triton.cdiv(length, programs)
    return triton.cdiv(length, share), share


def modulated_norm_backward(
    grad: torch.Tensor,
    grad_new: torch.Tensor | None,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    grad_x: torch.Tensor,
    grad_branch: torch.Tensor | None,
    parts: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Fills the gradients of tokens and, with a branch, of that, and parts of those of the vectors.

    Args:
        grad: (B, L, C) contiguous, gradient of what `modulated_norm` wrote to out.
        grad_new: like it, of what it wrote to new; None without a branch.
        x, branch: (B, L, C) contiguous; with a branch x is what was written to new.
        gate, scale: (B, C), last dimension contiguous; gate is None without a branch.
        eps: of the norm.
        grad_x, grad_branch: like x and branch.
        parts: (2, with a branch 3, with a bias 4, B, `token_shares`(B, L, C)[0], C) float32 contiguous, to be filled:
            what the sum over dimension 2 makes the gradients of scale, shift, gate and, times the gate, bias.
        bias: (C,) contiguous, added to the branch, or None.
    """
    batch, length, width = x.shape
    programs, share = token_shares(batch, length, width)
    block, warps, ahead = _gradient_tile(width)
    modulated_norm_backward_kernel[(programs, batch)](
        grad, grad_new, x, branch, gate, scale, grad_x, grad_branch, bias, parts, length, share, parts.stride(0),
        0 if gate is None else gate.stride(0), scale.stride(0), eps, WIDTH=width, BLOCK=block, AHEAD=ahead,
        num_warps=warps,
    )  # fmt: skip


def _gradient_cases() -> list[tuple]:
    """What to compile of the layer norm's gradient: VAR's widths under autocast, with a branch or not, and float32."""
    cases: list[tuple] = []
    for width, feature, gated, biased in ((1024, "bf16", True, True), (1024, "bf16", False, False),
                                          (1920, "fp16", True, True), (2304, "bf16", True, False),
                                          (1280, "fp32", True, True)):  # fmt: skip
        block, warps, ahead = _gradient_tile(width)
        types = {**dict.fromkeys(("grad", "branch", "gate", "scale", "grad_branch"), f"*{feature}"), "eps": "fp32"}
        types |= dict.fromkeys(("x", "grad_new", "grad_x", "parts", "bias"), "*fp32")
        constants: dict = {"WIDTH": width, "BLOCK": block, "AHEAD": ahead}
        constants |= {} if gated else dict.fromkeys(("grad_new", "branch", "gate", "grad_branch"))
        constants |= {} if biased else {"bias": None}
        kernel = modulated_norm_backward_kernel
        names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        signature = {**names, **dict.fromkeys(constants, "constexpr")}
        divisors = {name: 16 for name in names if name not in ("length", "share", "parts_row", "eps")}
        cases.append((kernel, signature, constants, {"num_warps": warps}, divisors))
    return cases


def _token_cases() -> list[tuple]:
    """What to compile of the layer norm: VAR's widths, its products in half precision or not, with a gate or not, and
    with a branch in parts."""
    cases: list[tuple] = []
    for width, feature, gated, parts in (
        (1024, "bf16", True, 1), (1024, "bf16", False, 1), (1920, "fp16", True, 1), (2304, "bf16", True, 1),
        (1280, "fp32", True, 1), (1024, "fp16", True, 8), (1920, "bf16", True, 4),
    ):  # fmt: skip
        block, warps = _token_tile(width)
        types = dict.fromkeys(("branch", "gate", "scale", "shift", "out"), f"*{feature}")
        types |= {"x": "*fp32", "new": "*fp32", "eps": "fp32"}
        types |= {"branch": "*fp32", "bias": f"*{feature}"} if parts > 1 else {}
        absent = {} if gated else dict.fromkeys(("branch", "gate", "new"))
        kernel = modulated_norm_kernel
        for arch, options in ((80, {}), (90, {"launch_pdl": True})):
            constants = {"PARTS": parts, "WIDTH": width, "BLOCK": block, "PDL": bool(options), **absent}
            constants |= {"bias": None} if parts == 1 else {}
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
            signature = {**names, **dict.fromkeys(constants, "constexpr")}
            divisors = {name: 16 for name in names if name not in ("length", "eps")}
            cases.append((kernel, signature, constants, {"num_warps": warps, **options}, divisors, (arch,)))
    return cases


def _cases() -> list[tuple]:
    """What to compile, as in `unifiedar.kernels.codes`: VAR's norm, Infinity's with its table, an RMS norm, none; the
    models' head sizes, one that is padded. Divisors are what `aligned` guarantees."""
    cases: list[tuple] = []
    tensors = ("q", "k", "v", "out_q", "out_k", "out_v", "grad_q", "grad_k", "new_q", "new_k")
    for width, feature, norm, turned, values in (
        (64, "bf16", "l2", False, False),
        (64, "fp16", "l2", False, True),
        (128, "bf16", "l2", True, True),
        (96, "bf16", "l2", True, False),
        (40, "fp16", "rms", True, True),
        (128, "bf16", "rms", True, False),
        (64, "bf16", "none", True, False),
        (64, "fp32", "l2", True, True),
        (128, "fp32", "rms", True, False),
    ):
        absent = [] if values else ["v", "out_v"]
        absent += [] if norm == "l2" else ["gain", "parts_gain"]
        absent += [] if norm == "rms" else ["q_weight", "k_weight", "parts_q", "parts_k"]
        absent += [] if turned else ["rope"]
        types = {
            **dict.fromkeys(tensors, f"*{feature}"),
            **dict.fromkeys(("gain", "q_weight", "k_weight"), f"*{feature}"),
            **dict.fromkeys(("rope", "parts_gain", "parts_q", "parts_k"), "*fp32"),
            "eps": "fp32",
        }
        for kernel in (qk_norm_rope_kernel, qk_norm_rope_backward_kernel):
            constants = {
                "NORM": norm,
                "WIDTH": width,
                "BLOCK_L": _rows(width, 4 if feature == "fp32" else 2),
                "BLOCK_D": _block(width),
                **dict.fromkeys([name for name in absent if name in kernel.arg_names]),
            }
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
            signature = {**names, **dict.fromkeys(constants, "constexpr")}
            divisors = {name: 16 for name in names if name in (*tensors, "rope", "rope_part", "rope_row")}
            cases.append((kernel, signature, constants, {"num_warps": WARPS}, divisors))
    return cases


COMPILE_CASES = [*_cases(), *_token_cases(), *_gradient_cases()]
