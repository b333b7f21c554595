"""Triton kernel of products of few rows whose sums over K are left in parts, for whoever adds them up.

With few rows a product is the way of its weights from memory, for which all multiprocessors are wanted; where outputs
are too few to go round, programs share K too. A tile of weights is the left factor, of which Hopper's matrix units want
64 rows; of x they take as few as 16.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "PACK", "STEP", "Tile", "linear_parts", "tile"]

PACK = 16  # entries that K is a multiple of: 32 bytes
STEP = 64  # entries of K that a program takes at a time
OUTPUTS = 64


@dataclass(frozen=True)
class Tile:
    """Rows of x that a program takes, and how many steps are on their way to it at a time."""

    rows: int
    stages: int


def tile(rows: int) -> Tile:
    """The tile for so many rows of x."""
    return Tile(16, 6) if rows <= 16 else Tile(32, 6) if rows <= 32 else Tile(64, 5)


@triton.jit(do_not_specialize=["rows", "steps"])
def linear_parts_kernel(
    x,  # [rows, INPUTS]
    weight,  # [outputs, INPUTS]
    out,  # [parts, rows, outputs] float32; written
    rows,
    outputs,
    steps,  # of BLOCK_K entries of K to a part
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles of outputs, tiles of rows, parts of K)."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, INPUTS)
    # Outputs beyond the last are that of the last: nobody stores what comes of them.
    from_weight = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * INPUTS + entry[None, :]
    from_x = x + row.to(tl.int64)[None, :] * INPUTS + entry[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(begin, end, BLOCK_K):
        if INPUTS % BLOCK_K == 0:
            left = tl.load(from_weight + at)
            right = tl.load(from_x + at, mask=(row < rows)[None, :], other=0.0)
        else:
            inside = at + entry < INPUTS
            left = tl.load(from_weight + at, mask=inside[None, :], other=0.0)
            right = tl.load(from_x + at, mask=inside[:, None] & (row < rows)[None, :], other=0.0)
        total = tl.dot(left, right, total)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    to_out = out + (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * outputs + output[None, :]
    tl.store(to_out, tl.trans(total), mask=inside)


def linear_parts(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, use: Tile | None = None) -> None:
    """Fills out (P, M, N) float32, whose sum over P is the product of x (M, K) and weight (N, K), of half precision.

    All contiguous, x and weight aligned to 16 bytes, K a multiple of `PACK`; a part is of whole steps of `STEP`
    entries. Neither M nor N is 0.
    """
    rows, inputs = x.shape
    outputs, parts = len(weight), len(out)
    one = tile(rows) if use is None else use
    steps = triton.cdiv(inputs, parts * STEP)
    linear_parts_kernel[triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, one.rows), parts](
        x, weight, out, rows, outputs, steps,
        INPUTS=inputs, BLOCK_M=one.rows, BLOCK_N=OUTPUTS, BLOCK_K=STEP, num_warps=4, num_stages=one.stages,
    )  # fmt: skip


def _cases() -> list[tuple]:
    """Both dtypes, layers of d16 and d30 and one whose K is no multiple of a step, at every tile."""
    cases: list[tuple] = []
    kernel = linear_parts_kernel
    for feature, inputs in (("fp16", 4096), ("bf16", 7680), ("bf16", 1040)):
        for rows in (2, 32, 72):
            one = tile(rows)
            constants = {"INPUTS": inputs, "BLOCK_M": one.rows, "BLOCK_N": OUTPUTS, "BLOCK_K": STEP}
            types = {"x": f"*{feature}", "weight": f"*{feature}", "out": "*fp32"}
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
            signature = {**names, **dict.fromkeys(constants, "constexpr")}
            divisors = dict.fromkeys(("x", "weight", "out", "outputs"), 16)
            cases.append((kernel, signature, constants, {"num_warps": 4, "num_stages": one.stages}, divisors))
    return cases


COMPILE_CASES = _cases()
