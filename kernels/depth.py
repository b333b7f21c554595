"""Triton kernels of the family `depth`: what a depth transformer of any form does with a few rows, in few launches.

A layer is five launches: norm and the products of queries, keys and values; norms and turns of these with attention;
projection; norm, gate and up with the activation; down. With more than four rows a norm is a launch of its own. Rows
read all weights once a depth, so that the weights' bytes and the waits between launches are the time. A product of few
rows is shared out over enough programs to keep all of a GPU busy, each with whole rows of the weights. Of many rows
what each program reads of them would be more than the weights: `depth_wide.py` gives programs more of the weights'
rows, and where they are then too few, a share of the inputs each, whose products the next norm adds up. The order of a
sum does not depend on who comes first, and runs are bit-equal.

A launch may begin before the one ahead of it has ended (PDL, sm_90): its weights are on their way to registers by the
time it is allowed to look at its rows. Every kernel here waits before it reads or writes anything but weights, so each
sees all that was launched before it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from unifiedar.kernels._depth_product import (
    FEW,
    case,
    columns,
    finished,
    launch,
    linear_types,
    own_bias,
    own_matrix,
    shared_constants,
)
from unifiedar.kernels.depth_wide import MANY, multiply, parts, takes

__all__ = ["COMPILE_CASES", "Tile", "attend", "enter", "linear", "parts", "tile"]

_PACK: tl.constexpr = tl.constexpr(8)  # entries of a row of weights that a thread multiplies on its own
_FULL = 264  # programs that keep a large GPU busy: two for each of an H100's multiprocessors


@dataclass(frozen=True)
class Tile:
    """How a product is shared out.

    Args:
        rows: of x that a program holds: 1, 2 or 4 without matrix units, 16 with them.
        outputs: rows of the weights that a program has.
        inputs: entries that it takes at a time; with matrix units they are shared out over its warps.
        warps: of a program.
        ahead: times `inputs` that are loaded before the launch ahead is waited for, at most 4.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    ahead: int

    @property
    def units(self) -> bool:
        """Whether matrix units multiply."""
        return self.rows > FEW


def tile(rows: int, outputs: int, inputs: int, gated: bool = False, itemsize: int = 2) -> Tile:
    """The tile for few rows of x and weights (outputs, inputs), or two such weights, of so many bytes an entry."""
    whole = triton.next_power_of_2(inputs)
    if rows <= FEW or itemsize == 4:
        held, chunk = min(FEW, triton.next_power_of_2(rows)), min(1024, max(whole, 8))
        chunks = triton.cdiv(inputs, chunk)
        if gated and held == 1 and chunks == 1:
            return Tile(held, 4, chunk, 4, 1)
        outputs_held = 8 if chunks == 1 or outputs >= 8 * _FULL else 4
        return Tile(held, outputs_held, chunk, 2 * itemsize, min(chunks, 2 if gated else 4))
    chunk = min(1024, max(whole, 128))
    chunks = triton.cdiv(inputs, chunk)
    return Tile(MANY, 8, chunk, 8 if inputs > 1024 else 4, min(chunks, 2 if gated else 4))


# ---- products --------------------------------------------------------------------------------------------------------


@triton.jit
def _entries(chunk, UNITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which inputs a chunk is: [PARTS, 1, BLOCK_K / PARTS], or [1, 1, BLOCK_K]."""
    if UNITS:
        part = tl.arange(0, PARTS)[:, None, None] * (BLOCK_K // PARTS)
        entry = part + tl.arange(0, BLOCK_K // PARTS)[None, None, :]
    else:
        entry = tl.arange(0, BLOCK_K)[None, None, :]
    return chunk * BLOCK_K + entry


@triton.jit
def _fetched(weight, output, chunk, INPUTS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """A chunk of the weights' rows `output`: [PARTS, rows, BLOCK_K / PARTS], or [1, rows, BLOCK_K]."""
    entry = _entries(chunk, UNITS, PARTS, BLOCK_K)
    at = weight + output[None, :, None] * INPUTS + entry
    if INPUTS % BLOCK_K == 0:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=entry < INPUTS, other=0.0)
    return found


@triton.jit
def _vector(given, chunk, INPUTS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A chunk of a norm's gains or biases, like `_entries`; None if there are none."""
    if given is not None:
        entry = _entries(chunk, UNITS, PARTS, BLOCK_K)
        found = tl.load(given + entry, mask=entry < INPUTS, other=0.0).to(tl.float32)
    else:
        found = None
    return found


@triton.jit
def _inverse(squares, eps, INPUTS: tl.constexpr):
    """Of the roots of mean squares, whose sums are `squares`."""
    return 1.0 / tl.sqrt_rn(squares * (1.0 / INPUTS) + eps)


@triton.jit
def _statistics(
    x, row, rows, eps, INPUTS: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Mean (0 for RMSNorm) and inverse deviation of rows, [BLOCK_M] each."""
    entry = tl.arange(0, BLOCK_S)[None, :]
    at = x + row[:, None] * INPUTS + entry
    inside = (row < rows)[:, None]
    mean = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "layer":
        total = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        for begin in tl.static_range(0, INPUTS, BLOCK_S):
            total += tl.load(at + begin, mask=inside & (begin + entry < INPUTS), other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) * (1.0 / INPUTS)
    total = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    for begin in tl.static_range(0, INPUTS, BLOCK_S):
        within = inside & (begin + entry < INPUTS)
        value = tl.load(at + begin, mask=within, other=0.0).to(tl.float32)
        if NORM == "layer":
            value = tl.where(within, value - mean[:, None], 0.0)
        total += value * value
    return mean, _inverse(tl.sum(total, 1), eps, INPUTS)


@triton.jit(do_not_specialize=["rows", "parts_part", "parts_row"])
def depth_norm_kernel(
    x,  # [rows, INPUTS]; written if there are parts
    parts,  # [PARTS, rows, INPUTS], strides parts_part, parts_row, 1, added to x first; or None
    gain,  # [INPUTS], or None
    shift,  # [INPUTS], or None
    out,  # like x; written; None if NORM is none
    rows,
    parts_part,
    parts_row,
    eps,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,  # none, rms, layer
    PDL: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (rows,). For products of many rows, whose every program would normalise them all."""
    if PDL:
        gdc_launch_dependents()
    entry = tl.arange(0, BLOCK_S)
    inside = entry < INPUTS
    if gain is not None:
        gains = tl.load(gain + entry, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        shifts = tl.load(shift + entry, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(x + row * INPUTS + entry, mask=inside, other=0.0).to(tl.float32)
    if parts is not None:
        at = parts + row * parts_row + entry
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            added += tl.load(at + part * parts_part.to(tl.int64), mask=inside, other=0.0).to(tl.float32)
        kept = (y + added).to(x.dtype.element_ty)
        tl.store(x + row * INPUTS + entry, kept, mask=inside)
        y = kept.to(tl.float32)
    if NORM != "none":
        if NORM == "layer":
            y = tl.where(inside, y - tl.sum(y, 0) * (1.0 / INPUTS), 0.0)
        y *= _inverse(tl.sum(y * y, 0), eps, INPUTS)
        if gain is not None:
            y *= gains
        if shift is not None:
            y += shifts
        tl.store(out + row * INPUTS + entry, y.to(out.dtype.element_ty), mask=inside)


def _normed_rows(
    x: torch.Tensor,
    added: torch.Tensor | None,
    norm: str,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    early: bool,
) -> torch.Tensor:
    """x with what is added to it, in place; returns its norm, or itself."""
    rows, inputs = x.shape
    out = None if norm == "none" else torch.empty_like(x)
    part, row = (0, 0) if added is None else added.stride()[:2]
    depth_norm_kernel[(rows,)](
        x, added, gain, shift, out, rows, part, row, eps,
        INPUTS=inputs, PARTS=0 if added is None else len(added), NORM=norm, PDL=early, **_norm_sizes(inputs),
        **launch(early),
    )  # fmt: skip
    return x if out is None else out


def _norm_sizes(inputs: int) -> dict[str, int]:
    block = triton.next_power_of_2(inputs)
    return {"BLOCK_S": block, "num_warps": min(16, max(1, block // 256))}


@triton.jit
def _chunk(x, row, rows, chunk, INPUTS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A chunk of rows: [PARTS, BLOCK_M, BLOCK_K / PARTS] as they are, or float32 [BLOCK_M, 1, BLOCK_K]."""
    entry = _entries(chunk, UNITS, PARTS, BLOCK_K)
    if UNITS:
        own = row[None, :, None]
    else:
        own = row[:, None, None]
    y = tl.load(x + own * INPUTS + entry, mask=(own < rows) & (entry < INPUTS), other=0.0)
    if not UNITS:
        y = y.to(tl.float32)
    return y


@triton.jit
def _normed(y, gain, shift, mean, inverse, NORM: tl.constexpr):
    """Rows out of `_chunk` in float32, normalised; of an RMSNorm all but the factor `inverse`, which can wait."""
    if NORM == "layer":
        y = (y - mean[:, None, None]) * inverse[:, None, None]
    if gain is not None:
        y *= gain
    if shift is not None:
        y += shift
    return y


@triton.jit
def _squared(y, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of a few squares of rows out of `_chunk`, [BLOCK_M, 1, BLOCK_K / pack], laid out as the products are."""
    return tl.sum(tl.reshape(y * y, (BLOCK_M, 1, BLOCK_K // _PACK, _PACK)), 3)


@triton.jit
def _pinned(entries):
    """The same, of half precision, no sooner than here: what turns them to the matrix units' order would else be moved
    up to their load and hold up the loads that follow."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [entries], entries.dtype, is_pure=False, pack=2)


@triton.jit
def _product(
    total, y, weights, UNITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """total and y weights^T: [PARTS, BLOCK_M, BLOCK_N], or [BLOCK_M, BLOCK_N, BLOCK_K / pack]; the first or last
    dimension is still to be summed."""
    if UNITS:
        total = tl.dot(y, tl.permute(weights, (0, 2, 1)), total)
    else:
        product = y * weights.to(tl.float32)
        total += tl.sum(tl.reshape(product, (BLOCK_M, BLOCK_N, BLOCK_K // _PACK, _PACK)), 3)
    return total


@triton.jit
def _taken(
    total, total2, squares, y, part, gate, gain, shift, mean, inverse, KIND: tl.constexpr, NORM: tl.constexpr,
    UNITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of products and of squares with one more chunk of rows and weights."""
    if NORM != "none":
        if NORM == "rms":
            squares += _squared(y, BLOCK_M, BLOCK_K)
        y = _normed(y, gain, shift, mean, inverse, NORM)
    total = _product(total, y, part, UNITS, BLOCK_M, BLOCK_N, BLOCK_K)
    if KIND == "gated":
        total2 = _product(total2, y, gate, UNITS, BLOCK_M, BLOCK_N, BLOCK_K)
    return total, total2, squares


@triton.jit(do_not_specialize=["rows"])
def depth_linear_kernel(
    x,  # [rows, INPUTS]
    gain,  # [INPUTS], of the norm, or None
    shift,  # [INPUTS], its bias, or None
    weight,  # [OUTPUTS, INPUTS]
    weight2,  # KIND beside: [OUTPUTS2, INPUTS], gated: the gate's; else None
    weight3,  # KIND beside: [OUTPUTS3, INPUTS], else None
    bias,  # [OUTPUTS], or None
    bias2,  # like weight2, None if bias is
    bias3,
    place,  # [OUTPUTS], added at the end, or None
    residual,  # [rows, OUTPUTS], strides residual_row, 1, added at the end, or None; may be out
    out,  # [rows, all outputs], strides out_row, 1; written
    rows,
    residual_row,
    out_row,
    eps,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS2: tl.constexpr,
    OUTPUTS3: tl.constexpr,
    KIND: tl.constexpr,  # one, beside, gated
    NORM: tl.constexpr,  # none, rms, layer; none with UNITS
    ACTIVATION: tl.constexpr,  # none, gelu, gelu_tanh, silu
    AHEAD: tl.constexpr,
    PIN: tl.constexpr,
    PDL: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (tiles of all outputs, tiles of rows)."""
    if PDL:
        gdc_launch_dependents()
    side, weight, tile, column, outputs = own_matrix(
        tl.program_id(0), weight, weight2, weight3, OUTPUTS, OUTPUTS2, OUTPUTS3, KIND, BLOCK_N
    )
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    near = output
    if OUTPUTS % BLOCK_N + OUTPUTS2 % BLOCK_N + OUTPUTS3 % BLOCK_N > 0:
        near = tl.minimum(output, outputs - 1)  # loads need no mask, and nobody stores what comes of the rest

    # What no launch writes is on its way before the one ahead is waited for.
    CHUNKS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    part0 = _fetched(weight, near, 0, INPUTS, UNITS, PARTS, BLOCK_K)
    gate0 = part0
    if KIND == "gated":
        gate0 = _fetched(weight2, near, 0, INPUTS, UNITS, PARTS, BLOCK_K)
    gain0 = _vector(gain, 0, INPUTS, UNITS, PARTS, BLOCK_K)
    shift0 = _vector(shift, 0, INPUTS, UNITS, PARTS, BLOCK_K)
    if AHEAD > 1:
        part1 = _fetched(weight, near, 1, INPUTS, UNITS, PARTS, BLOCK_K)
        gate1 = part1
        if KIND == "gated":
            gate1 = _fetched(weight2, near, 1, INPUTS, UNITS, PARTS, BLOCK_K)
        gain1 = _vector(gain, 1, INPUTS, UNITS, PARTS, BLOCK_K)
        shift1 = _vector(shift, 1, INPUTS, UNITS, PARTS, BLOCK_K)
    if AHEAD > 2:
        part2 = _fetched(weight, near, 2, INPUTS, UNITS, PARTS, BLOCK_K)
        gate2 = part2
        if KIND == "gated":
            gate2 = _fetched(weight2, near, 2, INPUTS, UNITS, PARTS, BLOCK_K)
        gain2 = _vector(gain, 2, INPUTS, UNITS, PARTS, BLOCK_K)
        shift2 = _vector(shift, 2, INPUTS, UNITS, PARTS, BLOCK_K)
    if AHEAD > 3:
        part3 = _fetched(weight, near, 3, INPUTS, UNITS, PARTS, BLOCK_K)
        gate3 = part3
        if KIND == "gated":
            gate3 = _fetched(weight2, near, 3, INPUTS, UNITS, PARTS, BLOCK_K)
        gain3 = _vector(gain, 3, INPUTS, UNITS, PARTS, BLOCK_K)
        shift3 = _vector(shift, 3, INPUTS, UNITS, PARTS, BLOCK_K)
    added = own_bias(side, bias, bias2, bias3, near, KIND)
    added2 = columns(bias2 if KIND == "gated" else None, near)
    placed = columns(place, near)
    if PDL:
        gdc_wait()

    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    kept = None
    if residual is not None:
        at = residual + row[:, None] * residual_row + output[None, :]
        kept = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    inverse = mean
    if NORM == "layer":
        mean, inverse = _statistics(x, row, rows, eps, INPUTS, NORM, BLOCK_M, BLOCK_S)
    squares = tl.zeros([BLOCK_M, 1, BLOCK_K // _PACK], tl.float32)
    if UNITS:
        total = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K // _PACK], tl.float32)
    total2 = total
    # All rows are on their way before the first is looked at.
    y0 = _chunk(x, row, rows, 0, INPUTS, UNITS, PARTS, BLOCK_K)
    if AHEAD > 1:
        y1 = _chunk(x, row, rows, 1, INPUTS, UNITS, PARTS, BLOCK_K)
    if AHEAD > 2:
        y2 = _chunk(x, row, rows, 2, INPUTS, UNITS, PARTS, BLOCK_K)
    if AHEAD > 3:
        y3 = _chunk(x, row, rows, 3, INPUTS, UNITS, PARTS, BLOCK_K)
    if PIN:
        part0 = _pinned(part0)
        if KIND == "gated":
            gate0 = _pinned(gate0)
        y0 = _pinned(y0)
        if AHEAD > 1:
            part1 = _pinned(part1)
            if KIND == "gated":
                gate1 = _pinned(gate1)
            y1 = _pinned(y1)
        if AHEAD > 2:
            part2 = _pinned(part2)
            if KIND == "gated":
                gate2 = _pinned(gate2)
            y2 = _pinned(y2)
        if AHEAD > 3:
            part3 = _pinned(part3)
            if KIND == "gated":
                gate3 = _pinned(gate3)
            y3 = _pinned(y3)
    total, total2, squares = _taken(
        total, total2, squares, y0, part0, gate0, gain0, shift0, mean, inverse,
        KIND, NORM, UNITS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if AHEAD > 1:
        total, total2, squares = _taken(
            total, total2, squares, y1, part1, gate1, gain1, shift1, mean, inverse,
            KIND, NORM, UNITS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if AHEAD > 2:
        total, total2, squares = _taken(
            total, total2, squares, y2, part2, gate2, gain2, shift2, mean, inverse,
            KIND, NORM, UNITS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if AHEAD > 3:
        total, total2, squares = _taken(
            total, total2, squares, y3, part3, gate3, gain3, shift3, mean, inverse,
            KIND, NORM, UNITS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    for chunk in range(AHEAD, CHUNKS):
        y = _chunk(x, row, rows, chunk, INPUTS, UNITS, PARTS, BLOCK_K)
        if NORM != "none":
            if NORM == "rms":
                squares += _squared(y, BLOCK_M, BLOCK_K)
            gains = _vector(gain, chunk, INPUTS, UNITS, PARTS, BLOCK_K)
            shifts = _vector(shift, chunk, INPUTS, UNITS, PARTS, BLOCK_K)
            y = _normed(y, gains, shifts, mean, inverse, NORM)
        more = _fetched(weight, near, chunk, INPUTS, UNITS, PARTS, BLOCK_K)
        total = _product(total, y, more, UNITS, BLOCK_M, BLOCK_N, BLOCK_K)
        if KIND == "gated":
            more = _fetched(weight2, near, chunk, INPUTS, UNITS, PARTS, BLOCK_K)
            total2 = _product(total2, y, more, UNITS, BLOCK_M, BLOCK_N, BLOCK_K)

    AXIS: tl.constexpr = 0 if UNITS else 2
    result = tl.sum(total, AXIS)
    gate = result
    if KIND == "gated":
        gate = tl.sum(total2, AXIS)
    if NORM == "rms":
        inverse = _inverse(tl.sum(squares, 2), eps, INPUTS)
        result *= inverse
        gate *= inverse
    result = finished(result, gate, added, added2, placed, kept, KIND, ACTIVATION)
    to = out + row.to(tl.int64)[:, None] * out_row + (column + output)[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


def linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor] | None,
    out: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
    norm: str = "none",
    gain: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    gated: bool = False,
    place: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """Fills out (rows, all outputs) = activation(norm(x + added) weights^T + biases) + place + residual.

    Args:
        x: (rows, inputs), contiguous; of out and residual the entries are.
        weights: one or three (outputs, inputs), whose products go side by side; with `gated` two, and the product is
            that of the first times the activation of the second's. Contiguous, in the dtype of x.
        biases: as many (outputs,), or None.
        out: written; may be the residual, and must not be x. (P, rows, outputs) float32 with P = `parts(...)` is a
            product in parts, which add up to it.
        added: (P, rows, inputs), entries contiguous, added to x in place; or None.
        norm: "none", "rms" or "layer", of x, with gain and shift (inputs,) or None, and eps.
        activation: "none", "gelu", "gelu_tanh" or "silu"; "none" if in parts.
        place: (outputs,), or None.
        residual: (rows, outputs), or None.
        early: whether to begin before the launch ahead has ended, which must be a kernel of this file or none that
            anything is read of (sm_90).
    """
    rows, inputs = x.shape
    sizes = [len(one) for one in weights]
    many = takes(rows, sum(sizes) * inputs, x.element_size())
    few = tile(rows, sizes[0], inputs, gated, x.element_size())
    if added is not None or (norm != "none" and few.units):
        x, norm, gain, shift = _normed_rows(x, added, norm, gain, shift, eps, early), "none", None, None
    kind = "gated" if gated else "beside" if len(weights) > 1 else "one"
    own = [*weights, None, None][:3], [*(biases or ()), None, None, None][:3]
    residual_row = 0 if residual is None else residual.stride(0)
    if many:
        multiply(x, own[0], own[1], place, residual, out, sizes=sizes, kind=kind, activation=activation, early=early)
        return
    tiles = sum(triton.cdiv(size, few.outputs) for size in (sizes if kind == "beside" else sizes[:1]))
    depth_linear_kernel[tiles, triton.cdiv(rows, few.rows)](
        x, gain, shift, *own[0], *own[1], place, residual, out, rows, residual_row, out.stride(0), eps,
        **_constants(few, inputs, sizes, kind, norm, activation, x.is_cuda and x.element_size() == 2, early),
        num_warps=few.warps, num_stages=2, **launch(early),
    )  # fmt: skip


def _constants(
    one: Tile, inputs: int, sizes: list[int], kind: str, norm: str, activation: str, half: bool, early: bool
) -> dict:
    return {
        **shared_constants(inputs, sizes, kind, activation, early),
        "NORM": norm,
        "AHEAD": one.ahead,
        "PIN": one.units and half,
        "UNITS": one.units,
        "PARTS": one.warps,
        "BLOCK_M": one.rows,
        "BLOCK_N": one.outputs,
        "BLOCK_K": one.inputs,
        "BLOCK_S": min(one.inputs, 4096 // one.rows),
    }


# ---- attention -------------------------------------------------------------------------------------------------------


@triton.jit
def _prepared(x, gain, cosine, sine, eps, NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """A query or a key of one head, [BLOCK_D]: normalised, then neighbouring channels turned."""
    y = x.to(tl.float32)
    if NORM:
        y *= 1.0 / tl.sqrt_rn(tl.sum(y * y, 0) * (1.0 / WIDTH) + eps)
        if gain is not None:
            y *= gain
    if cosine is not None:
        even, odd = tl.split(tl.reshape(y, (BLOCK_D // 2, 2)))
        y = tl.reshape(tl.join(cosine * even - sine * odd, sine * even + cosine * odd), (BLOCK_D,))
    return y.to(x.dtype)


@triton.jit
def _channels(given, channel, WIDTH: tl.constexpr):
    """Of a vector of gains, or None."""
    if given is not None:
        found = tl.load(given + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    else:
        found = None
    return found


@triton.jit(do_not_specialize=["rows", "begin", "length", "qkv_row"])
def depth_attend_kernel(
    qkv,  # [TOKENS * rows, (HEADS + 2 GROUPS) * WIDTH], strides qkv_row, 1; token by token
    q_gain,  # [WIDTH], or None
    k_gain,  # [WIDTH], or None
    rope,  # [2, length, WIDTH / 2] float32, or None
    cache,  # [2, rows, GROUPS, length, WIDTH]; places before `begin` are read, those of the tokens written
    out,  # [TOKENS * rows, HEADS * WIDTH]; written
    rows,
    begin,
    length,
    qkv_row,
    eps,
    scale,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (rows * HEADS,). Of the heads that share keys each makes the new ones itself, and the first keeps them."""
    if PDL:
        gdc_launch_dependents()
    channel = tl.arange(0, BLOCK_D)
    q_gains = _channels(q_gain, channel, WIDTH)
    k_gains = _channels(k_gain, channel, WIDTH)
    if rope is not None:
        half = tl.arange(0, BLOCK_D // 2)
        turn = rope + begin * (WIDTH // 2) + half
        cosine = tl.load(turn, mask=half < WIDTH // 2, other=0.0)
        sine = tl.load(turn + length * (WIDTH // 2), mask=half < WIDTH // 2, other=0.0)
    else:
        cosine = None
        sine = None
    if PDL:
        gdc_wait()
    row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    SHARE: tl.constexpr = HEADS // GROUPS
    group = head // SHARE
    place = tl.arange(0, BLOCK_T)
    own = (row * GROUPS + group) * length * WIDTH
    keys_at = cache + own
    values_at = keys_at + rows * GROUPS * length * WIDTH
    inside = (place < begin)[:, None] & (channel < WIDTH)[None, :]
    at = place[:, None] * WIDTH + channel[None, :]
    line = qkv + row * qkv_row + channel
    step = rows.to(tl.int64) * qkv_row
    query = tl.load(line + head * WIDTH, mask=channel < WIDTH, other=0.0)
    key = tl.load(line + (HEADS + group) * WIDTH, mask=channel < WIDTH, other=0.0)
    value = tl.load(line + (HEADS + GROUPS + group) * WIDTH, mask=channel < WIDTH, other=0.0)
    keys = tl.load(keys_at + at, mask=inside, other=0.0)
    values = tl.load(values_at + at, mask=inside, other=0.0)
    for token in tl.static_range(TOKENS):
        now = begin + token
        if token > 0:
            line += step
            query = tl.load(line + head * WIDTH, mask=channel < WIDTH, other=0.0)
            key = tl.load(line + (HEADS + group) * WIDTH, mask=channel < WIDTH, other=0.0)
            value = tl.load(line + (HEADS + GROUPS + group) * WIDTH, mask=channel < WIDTH, other=0.0)
            if rope is not None:
                cosine = tl.load(turn + token * (WIDTH // 2), mask=half < WIDTH // 2, other=0.0)
                sine = tl.load(turn + (length + token) * (WIDTH // 2), mask=half < WIDTH // 2, other=0.0)
        query = _prepared(query, q_gains, cosine, sine, eps, NORM, WIDTH, BLOCK_D)
        key = _prepared(key, k_gains, cosine, sine, eps, NORM, WIDTH, BLOCK_D)
        if head % SHARE == 0:
            tl.store(keys_at + now * WIDTH + channel, key, mask=channel < WIDTH)
            tl.store(values_at + now * WIDTH + channel, value, mask=channel < WIDTH)
        keys = tl.where((place == now)[:, None], key[None, :], keys)
        values = tl.where((place == now)[:, None], value[None, :], values)
        scores = tl.sum(keys.to(tl.float32) * query.to(tl.float32)[None, :], 1) * scale
        scores = tl.where(place <= now, scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 0))
        weights = weights / tl.sum(weights, 0)
        mixed = tl.sum(weights[:, None] * values.to(tl.float32), 0)
        to = out + (token * rows + row) * (HEADS * WIDTH) + head * WIDTH + channel
        tl.store(to, mixed.to(out.dtype.element_ty), mask=channel < WIDTH)


def _attend_warps(tokens: int, width: int) -> int:
    """As few as hold the keys: what one warp adds up needs no barrier."""
    return max(1, tokens * width // 2048)


def attend(
    qkv: torch.Tensor,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    rope: torch.Tensor | None,
    cache: torch.Tensor,
    out: torch.Tensor,
    *,
    tokens: int,
    begin: int,
    heads: int,
    norm: bool,
    eps: float,
    early: bool = False,
) -> None:
    """Attention of new tokens of each row to themselves and those before, whose keys and values are in the cache.

    Args:
        qkv: (tokens * rows, (heads + 2 groups) * width), queries, keys and values side by side, token by token; entries
            contiguous.
        q_gain, k_gain: (width,) of the norms of queries and keys, or None.
        rope: (2, length, width / 2) float32, cosines and sines of all places, or None.
        cache: (2, rows, groups, length, width), contiguous; the new keys, normalised and turned, and values are written
            from `begin` on.
        out: (tokens * rows, heads * width), contiguous; written.
        tokens: of each row, 1 or 2.
        begin: the first one's place.
        heads: of queries.
        norm: whether queries and keys go through an RMSNorm with eps.
        early: as `linear` takes it.
    """
    rows, groups, length, width = cache.shape[1:]
    tokens_up, width_up = triton.next_power_of_2(length), triton.next_power_of_2(width)
    depth_attend_kernel[(rows * heads,)](
        qkv, q_gain, k_gain, rope, cache, out, rows, begin, length, qkv.stride(0), eps, width**-0.5,
        NORM=norm, TOKENS=tokens, HEADS=heads, GROUPS=groups, WIDTH=width, PDL=early,
        BLOCK_T=tokens_up, BLOCK_D=width_up,
        num_warps=_attend_warps(tokens_up, width_up), **launch(early),
    )  # fmt: skip


# ---- the next token --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "depth", "entries"])
def depth_enter_kernel(
    drawn,  # [count] int64, stride drawn_row
    logits,  # [rows, NUM_CODES], strides logits_row, 1: what was drawn from; None if nothing was
    codebook,  # [entries, WIDTH], strides book_row, 1
    start,  # [rows, WIDTH], added to what enters, or None
    place,  # [WIDTH], added to it, or None
    state,  # [rows, WIDTH], strides state_row, 1, added to it, or None
    codes,  # [count, all depths] int64; [:, depth] is written
    total,  # [count, WIDTH]; the code's row of the codebook is added
    unsound,  # [count] int32; depth is written where the first NaN is
    entered,  # [rows, WIDTH]; written; None at the last depth
    count,  # of positions: rows, or half of them if GUIDED
    depth,
    entries,
    drawn_row,
    logits_row,
    book_row,
    state_row,
    codes_row,
    NUM_CODES: tl.constexpr,
    WIDTH: tl.constexpr,
    GUIDED: tl.constexpr,
    LAST: tl.constexpr,  # whether the code's row enters, not the sum
    PDL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (count, tiles of channels)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    code = tl.load(drawn + row * drawn_row)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < WIDTH
    known = (code >= 0) & (code < entries)
    found = tl.load(codebook + tl.where(known, code, 0) * book_row + channel, mask=inside & known, other=0.0)
    at = total + row * WIDTH + channel
    summed = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + found.to(tl.float32)).to(found.dtype)
    tl.store(at, summed, mask=inside)
    if entered is not None:
        kind = entered.dtype.element_ty
        for half in tl.static_range(1 + GUIDED):
            own = row + half * count
            one = (found if LAST else summed).to(kind)
            if start is not None:
                one = (one.to(tl.float32) + tl.load(start + own * WIDTH + channel, mask=inside).to(tl.float32)).to(kind)
            if state is not None:
                more = tl.load(state + own * state_row + channel, mask=inside).to(tl.float32)
                one = (one.to(tl.float32) + more).to(kind)
            if place is not None:
                one = (one.to(tl.float32) + tl.load(place + channel, mask=inside).to(tl.float32)).to(kind)
            tl.store(entered + own * WIDTH + channel, one, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(codes + row * codes_row + depth, code)
        if logits is not None:
            entry = tl.arange(0, BLOCK_V)
            bad = tl.zeros([BLOCK_V], tl.int32)
            for begin in range(0, NUM_CODES, BLOCK_V):
                within = begin + entry < NUM_CODES
                score = tl.load(logits + row * logits_row + begin + entry, mask=within, other=0.0).to(tl.float32)
                if GUIDED:
                    base = tl.load(logits + (row + count) * logits_row + begin + entry, mask=within, other=0.0)
                    score = (score - base.to(tl.float32)).to(logits.dtype.element_ty).to(tl.float32)
                    score += base.to(tl.float32)
                bad |= (score != score).to(tl.int32)
            if tl.max(bad, 0) > 0:
                first = tl.load(unsound + row)
                tl.store(unsound + row, tl.where(first < 0, depth, first))


def enter(
    drawn: torch.Tensor,
    logits: torch.Tensor | None,
    codebook: torch.Tensor,
    depth: int,
    codes: torch.Tensor,
    total: torch.Tensor,
    unsound: torch.Tensor,
    entered: torch.Tensor | None,
    *,
    guided: bool,
    last: bool,
    start: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    place: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """What follows a draw: keeps the codes, looks for NaN in what they were drawn from, and makes what enters next.

    Args:
        drawn: (N,) int64, of any stride.
        logits: (rows, K), entries contiguous, rows N or 2N if `guided`; None if nothing was drawn.
        codebook: (entries, C), entries contiguous; a code without a row adds nothing.
        depth: of the codes.
        codes: (N, D) int64, contiguous; their column is written.
        total: (N, C), contiguous; the codes' rows are added, rounded to its dtype, which is the codebook's.
        unsound: (N,) int32; depth is written where scores have NaN for the first time.
        entered: (rows, C), contiguous; written: total, or with `last` the code's row, then start, state and place
            added in this order, each rounded; None for nothing.
        start, state: (rows, C), state of any row stride; or None.
        place: (C,), or None.
        early: as `linear` takes it.
    """
    count, width = total.shape
    block = min(1024, triton.next_power_of_2(width))
    num_codes = 0 if logits is None else logits.shape[1]
    depth_enter_kernel[count, triton.cdiv(width, block)](
        drawn, logits, codebook, start, place, state, codes, total, unsound, entered, count, depth, len(codebook),
        drawn.stride(0), 0 if logits is None else logits.stride(0), codebook.stride(0),
        0 if state is None else state.stride(0), codes.stride(0),
        NUM_CODES=num_codes, WIDTH=width, GUIDED=guided, LAST=last, PDL=early,
        BLOCK_V=min(4096, triton.next_power_of_2(max(num_codes, 16))), BLOCK_C=block,
        num_warps=4, **launch(early),
    )  # fmt: skip


def _linear_case(dtype: str, rows: int, inputs: int, sizes: tuple[int, ...], early: bool, **how) -> tuple:
    kind = "gated" if how.get("gated") else "beside" if len(sizes) > 1 else "one"
    norm, activation = how.get("norm", "none"), how.get("activation", "none")
    pointer, itemsize = f"*{dtype}", 4 if dtype == "fp32" else 2
    types = {
        **linear_types(dtype, len(sizes), **how),
        "gain": None if norm == "none" else pointer,
        "shift": pointer if norm == "layer" else None,
        "eps": "fp32",
    }
    one = tile(rows, sizes[0], inputs, kind == "gated", itemsize)
    constants = _constants(one, inputs, list(sizes), kind, norm, activation, dtype != "fp32", early)
    options = {"num_warps": one.warps, "num_stages": 2, **launch(early)}
    aligned = [name for name, given in types.items() if given == pointer]
    return case(depth_linear_kernel, types, constants, options, (*aligned, "residual_row", "out_row"))


def _cases() -> list[tuple]:
    """Products of Qwen3-TTS's, Moshi's and VILA-U's depth transformers, their attention and what follows a draw."""
    cases = []
    for dtype, rows, early in (
        ("bf16", 1, True),
        ("bf16", 8, True),
        ("fp16", 16, False),
        ("fp32", 2, False),
        ("fp32", 32, False),
        ("fp16", 4, True),
    ):
        norm = "rms" if rows <= FEW or dtype == "fp32" else "none"
        cases += [
            _linear_case(dtype, rows, 1024, (2048, 1024, 1024), early, norm=norm),
            _linear_case(dtype, rows, 2048, (1024,), early, residual=True),
            _linear_case(
                dtype,
                rows,
                1024,
                (3072, 3072),
                early,
                norm=norm,
                activation="silu",
                gated=True,
            ),
            _linear_case(dtype, rows, 2816, (1024,), early, residual=True),
        ]
    for rows, early in ((2, True), (16, False), (16, True)):
        cases += [
            _linear_case(
                "bf16",
                rows,
                2560,
                (10240,),
                early,
                norm="none" if rows > FEW else "layer",
                activation="gelu",
                bias=True,
            ),
            _linear_case("bf16", rows, 10240, (2560,), early, bias=True, residual=True),
            _linear_case("bf16", rows, 1152, (2560,), early, bias=True, place=True),
        ]
    for dtype, norm, inputs, in_parts, early in (
        ("bf16", "rms", 1024, 0, True),
        ("fp16", "layer", 2560, 3, False),
        ("bf16", "none", 1536, 5, True),
    ):
        pointer = f"*{dtype}"
        types = {
            "x": pointer, "parts": "*fp32" if in_parts else None, "gain": None if norm == "none" else pointer,
            "shift": pointer if norm == "layer" else None, "out": None if norm == "none" else pointer,
            **dict.fromkeys(("rows", "parts_part", "parts_row"), "i32"), "eps": "fp32",
        }  # fmt: skip
        sizes = _norm_sizes(inputs)
        options = {"num_warps": sizes.pop("num_warps"), **launch(early)}
        constants = {"INPUTS": inputs, "PARTS": in_parts, "NORM": norm, "PDL": early, **sizes}
        aligned = [name for name, given in types.items() if given and given.startswith("*")]
        cases.append(case(depth_norm_kernel, types, constants, options, tuple(aligned)))
    integers = ("rows", "begin", "length", "qkv_row")
    for dtype, heads, groups, width, length, tokens, turned in (
        ("bf16", 16, 8, 128, 16, 1, True),
        ("fp16", 16, 8, 128, 16, 2, True),
        ("bf16", 40, 40, 64, 16, 1, False),
        ("fp32", 4, 1, 96, 33, 1, False),
    ):
        pointer, gain = f"*{dtype}", f"*{dtype}" if turned else None
        types = {
            "qkv": pointer, "q_gain": gain, "k_gain": gain, "rope": "*fp32" if turned else None, "cache": pointer,
            "out": pointer, **dict.fromkeys(integers, "i32"), "eps": "fp32", "scale": "fp32",
        }  # fmt: skip
        block_t, block_d = triton.next_power_of_2(length), triton.next_power_of_2(width)
        constants = {
            "NORM": turned, "TOKENS": tokens, "HEADS": heads, "GROUPS": groups, "WIDTH": width, "PDL": turned,
            "BLOCK_T": block_t, "BLOCK_D": block_d,
        }  # fmt: skip
        options = {"num_warps": _attend_warps(block_t, block_d), **launch(turned)}
        cases.append(case(depth_attend_kernel, types, constants, options, ("qkv", "cache", "out")))
    strides = ("count", "depth", "entries", "drawn_row", "logits_row", "book_row", "state_row", "codes_row")
    for guided, last, early in ((False, True, True), (True, False, False)):
        more = "*bf16" if guided else None
        types = {
            "drawn": "*i64", "logits": "*bf16", "codebook": "*bf16", "start": more, "place": more, "state": more,
            "codes": "*i64", "total": "*bf16", "unsound": "*i32", "entered": "*bf16", **dict.fromkeys(strides, "i32"),
        }  # fmt: skip
        constants = {
            "NUM_CODES": 2048, "WIDTH": 1024, "GUIDED": guided, "LAST": last, "PDL": early, "BLOCK_V": 2048,
            "BLOCK_C": 1024,
        }  # fmt: skip
        wide = ("logits", "codebook", "total", "entered", "logits_row", "book_row")
        cases.append(case(depth_enter_kernel, types, constants, {"num_warps": 4, **launch(early)}, wide))
    return cases


COMPILE_CASES = _cases()
