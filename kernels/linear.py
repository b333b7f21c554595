"""Triton kernels of the family `linear`: a product with weights of 8 bits, which are widened in registers.

Few tokens read all weights of a layer once, so that the weights' bytes are the time; there the work of a tile is parted
along K too, with float32 sums that a second kernel adds up in one order. A tile of weights is the left factor of the
matrix units, which may come out of registers: what is widened never goes back to shared memory. Runs are bit-equal.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "Tile", "linear_8bit", "tile"]

PACK = 16  # entries that K is a multiple of: weights are loaded 16 bytes at a time
FULL = 264  # programs that keep a large GPU busy: two for each of an H100's multiprocessors


@dataclass(frozen=True)
class Tile:
    """Rows of x, rows of the weights and entries of K that a program takes at a time, and into how many parts of K the
    work is divided. Chosen by arithmetic; none was tried on a GPU yet."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    parts: int = 1


def tile(rows: int, outputs: int, inputs: int) -> Tile:
    """The tile for x (rows, inputs) and weights (outputs, inputs)."""
    if rows > 128:
        return Tile(128, 128, 64, 8, 3)
    held = max(16, triton.next_power_of_2(rows)) if rows <= 64 else 64
    programs = triton.cdiv(rows, held) * triton.cdiv(outputs, 64)
    # Sums of parts are written and read again in 4 bytes an output: no more of them than half of the weights' bytes,
    # and no part shorter than two steps.
    most = max(1, min(inputs // 256, inputs // (8 * rows)))
    return Tile(held, 64, 128, 4, 4, min(most, triton.cdiv(FULL, programs)))


@triton.jit
def _widened(entries, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Of bytes, exactly: integers or, with FP8, e4m3 numbers over 256."""
    if FP8:
        # Sign, four bits of exponent and three of mantissa stand in float16 as they are, but for the exponent's bias of
        # 15 for 7: a factor of 2^-8, of which subnormal numbers know too. NaN is never among weights.
        bits = entries.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(DTYPE)
    return entries.to(tl.int8, bitcast=True).to(DTYPE)


@triton.jit(do_not_specialize=["rows", "steps"])
def linear_8bit_kernel(
    x,  # [rows, inputs]
    weight,  # [outputs, inputs] bytes
    scale,  # [outputs] float32
    bias,  # [outputs], or None
    out,  # [rows, outputs]; or with PARTS [parts, rows, outputs] float32; written
    rows,
    outputs,
    inputs,
    steps,  # of BLOCK_K entries to a part
    FP8: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles of rows, tiles of outputs, parts of K): programs of the same weights run side by side."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, tl.cdiv(inputs, BLOCK_K))
    # Rows beyond the last are those of the last: loads need no mask, and nobody stores what comes of them.
    from_x = x + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * inputs + entry[:, None]
    from_weight = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * inputs + entry[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(begin, end):
        inside = step * BLOCK_K + entry < inputs
        left = tl.load(from_weight + step * BLOCK_K, mask=inside[None, :], other=0)
        right = tl.load(from_x + step * BLOCK_K, mask=inside[:, None], other=0.0)
        total = tl.dot(_widened(left, FP8, x.dtype.element_ty), right, total)
    result = tl.trans(total)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    to_out = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    if PARTS:
        tl.store(to_out + tl.program_id(2).to(tl.int64) * rows * outputs, result, mask=inside)
    else:
        _finish(result, scale, bias, to_out, output, outputs, inside, FP8)


@triton.jit
def _finish(total, scale, bias, to_out, output, outputs, inside, FP8: tl.constexpr):
    factor = tl.load(scale + output, mask=output < outputs, other=0.0)
    if FP8:
        factor *= 256.0
    total *= factor[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(to_out, total.to(to_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def linear_8bit_sum_kernel(
    partial,  # [parts, rows, outputs] float32
    scale,  # [outputs] float32
    bias,  # [outputs], or None
    out,  # [rows, outputs]; written
    rows,
    outputs,
    parts,
    FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of outputs, rows)."""
    row = tl.program_id(1) + tl.arange(0, 1)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    total = tl.zeros((1, BLOCK_N), tl.float32)
    for one in range(parts):
        total += tl.load(partial + one * rows * outputs + at, mask=inside, other=0.0)
    _finish(total, scale, bias, out + at, output, outputs, inside, FP8)


def linear_8bit(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    use: Tile | None = None,
) -> None:
    """Fills out (M, N), like x (M, K), from weights (N, K) int8 or float8_e4m3fn, scale (N,) float32 and bias (N,).

    All contiguous, x and weights aligned to 16 bytes, K a multiple of `PACK`; neither M nor N is 0.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    one = tile(rows, outputs, inputs) if use is None else use
    steps = triton.cdiv(triton.cdiv(inputs, one.parts), one.inputs)
    parts = triton.cdiv(inputs, steps * one.inputs)
    fp8 = weight.dtype == torch.float8_e4m3fn
    target = out if parts == 1 else x.new_empty((parts, rows, outputs), dtype=torch.float32)
    linear_8bit_kernel[triton.cdiv(rows, one.rows), triton.cdiv(outputs, one.outputs), parts](
        x, weight.view(torch.uint8), scale, bias, target, rows, outputs, inputs, steps,
        FP8=fp8, PARTS=parts > 1, BLOCK_M=one.rows, BLOCK_N=one.outputs, BLOCK_K=one.inputs,
        num_warps=one.warps, num_stages=one.stages,
    )  # fmt: skip
    if parts > 1:
        block = min(256, triton.next_power_of_2(outputs))
        linear_8bit_sum_kernel[triton.cdiv(outputs, block), rows](
            target, scale, bias, out, rows, outputs, parts, FP8=fp8, BLOCK_N=block, num_warps=4
        )


def _cases() -> list[tuple]:
    """Both formats and dtypes at the tiles of few rows, parted, and of many."""
    cases: list[tuple] = []
    pointers = {"scale": "*fp32", "outputs": "i32", "inputs": "i32", "rows": "i32"}
    for dtype in ("fp16", "bf16"):
        for fp8 in (True, False):
            for rows in (2, 32, 64, 512):
                one = tile(rows, 1920, 1920)
                parted = one.parts > 1
                signature = pointers | {
                    "x": f"*{dtype}",
                    "weight": "*u8",
                    "bias": f"*{dtype}",
                    "out": "*fp32" if parted else f"*{dtype}",
                    "steps": "i32",
                }
                constexprs = {
                    "FP8": fp8,
                    "PARTS": parted,
                    "BLOCK_M": one.rows,
                    "BLOCK_N": one.outputs,
                    "BLOCK_K": one.inputs,
                }
                signature |= dict.fromkeys(constexprs, "constexpr")
                options = {"num_warps": one.warps, "num_stages": one.stages}
                divisors = dict.fromkeys(("x", "weight", "scale", "bias", "out", "outputs", "inputs"), 16)
                cases.append((linear_8bit_kernel, signature, constexprs, options, divisors))
        signature = {"partial": "*fp32", "scale": "*fp32", "bias": f"*{dtype}", "out": f"*{dtype}"}
        signature |= dict.fromkeys(("rows", "outputs", "parts"), "i32")
        constexprs = {"FP8": True, "BLOCK_N": 256}
        signature |= dict.fromkeys(constexprs, "constexpr")
        cases.append((linear_8bit_sum_kernel, signature, constexprs, {"num_warps": 4}))
    return cases


COMPILE_CASES = _cases()
