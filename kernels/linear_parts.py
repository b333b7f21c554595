"""Triton kernel of products of few rows whose sums over K are left in parts, for whoever adds them up.

With few rows a product is the way of its weights from memory, for which all multiprocessors are wanted; where outputs
are too few to go round, programs share K too. Adding up their parts is a launch that a library makes on its own and
that the next norm can do on its way.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent, weights_ahead

__all__ = ["COMPILE_CASES", "Tile", "linear_parts", "tile"]

PACK = 16  # entries that K is a multiple of: 32 bytes


@dataclass(frozen=True)
class Tile:
    """Rows of x, rows of the weights and entries of K that a program takes at a time; which of the two is the left
    factor of the matrix units, which wants 64 rows."""

    rows: int
    outputs: int
    inputs: int
    x_left: bool
    warps: int
    stages: int


@triton.jit(do_not_specialize=["rows", "steps"])
def linear_parts_kernel(
    x,  # [rows, INPUTS]
    weight,  # [outputs, INPUTS]
    bias,  # [outputs], or None
    out,  # [parts, rows, outputs]; written
    rows,
    outputs,
    steps,  # of BLOCK_K entries of K to a part
    INPUTS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    X_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of outputs, tiles of rows, parts of K)."""
    first = tl.program_id(0) * BLOCK_N
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = first + tl.arange(0, BLOCK_N)
    entry = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, INPUTS)
    if PDL:
        if AHEAD:
            if tl.program_id(1) == 0:
                place = weight + first.to(tl.int64) * INPUTS + begin
                held = tl.minimum(outputs - first, BLOCK_N)
                weights_ahead(place.to(tl.int64), held, INPUTS * 2, (end - begin) * 2, steps * (BLOCK_K * 2 // 128), LANES)
        cuda.gdc_wait()
    held = tl.minimum(output, outputs - 1).to(tl.int64) * INPUTS
    if X_LEFT:
        from_x = x + row.to(tl.int64)[:, None] * INPUTS + entry[None, :]
        from_weight = weight + held[None, :] + entry[:, None]
        known, x_entry, weight_entry = (row < rows)[:, None], entry[None, :], entry[:, None]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        from_x = x + row.to(tl.int64)[None, :] * INPUTS + entry[:, None]
        from_weight = weight + held[:, None] + entry[None, :]
        known, x_entry, weight_entry = (row < rows)[None, :], entry[:, None], entry[None, :]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(begin, end, BLOCK_K):
        if INPUTS % BLOCK_K == 0:
            one = tl.load(from_x + at, mask=known, other=0.0)
            other = tl.load(from_weight + at)
        else:
            one = tl.load(from_x + at, mask=known & (at + x_entry < INPUTS), other=0.0)
            other = tl.load(from_weight + at, mask=at + weight_entry < INPUTS, other=0.0)
        if X_LEFT:
            total = tl.dot(one, other, total)
        else:
            total = tl.dot(other, one, total)
    if PDL:
        cuda.gdc_launch_dependents()
    if X_LEFT:
        result = total
    else:
        result = tl.trans(total)
    if bias is not None:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if ACTIVATED:
        # (1 + tanh z) / 2 = 1 / (1 + e^(-2z)); the factor is 2 sqrt(2 / pi).
        result = result / (1.0 + tl.exp(-1.5957691216057308 * (result + 0.044715 * result * result * result)))
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    to_out = out + (tl.program_id(2) * rows + row).to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(to_out, result.to(out.dtype.element_ty), mask=inside)


AHEAD = False


def linear_parts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activated: bool,
    out: torch.Tensor,
    one: Tile,
) -> None:
    """Fills out (P, M, N), whose sum over P is the product."""
    rows, inputs = x.shape
    outputs = len(weight)
    steps = triton.cdiv(triton.cdiv(inputs, len(out)), one.inputs)
    linear_parts_kernel[triton.cdiv(outputs, one.outputs), triton.cdiv(rows, one.rows), len(out)](
        x, weight, bias, out, rows, outputs, steps,
        INPUTS=inputs, ACTIVATED=activated, X_LEFT=one.x_left, BLOCK_M=one.rows, BLOCK_N=one.outputs,
        BLOCK_K=one.inputs, AHEAD=AHEAD, LANES=32 * one.warps, num_warps=one.warps, num_stages=one.stages,
        **dependent(x),
    )  # fmt: skip
