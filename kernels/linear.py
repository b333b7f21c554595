"""Triton kernels of the family `linear`: a product with weights of 8 bits.

The product itself is that of `linear_few`. Where that leaves sums over K in parts, a second kernel adds them up, in one
order: runs are bit-equal.
"""

import torch
import triton
import triton.language as tl
from unifiedar.kernels.linear_few import PACK, few_linear, linear_parts

__all__ = ["COMPILE_CASES", "PACK", "linear_8bit"]


@triton.jit(do_not_specialize=["rows", "parts"])
def linear_8bit_sum_kernel(
    partial,  # [parts, rows, outputs] float32
    bias,  # [outputs], or None
    out,  # [rows, outputs]; written
    rows,
    outputs,
    parts,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of outputs, rows)."""
    row = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = output < outputs
    at = row * outputs + output
    total = tl.zeros((BLOCK_N,), tl.float32)
    part = at
    for _ in range(parts):
        total += tl.load(partial + part, mask=inside, other=0.0)
        part += rows.to(tl.int64) * outputs
    if bias is not None:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def linear_8bit(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    parts: int = 1,
) -> None:
    """Fills out (M, N), like x (M, K), from weights (N, K) int8 or float8_e4m3fn, scale (N,) float32 and bias (N,).

    All contiguous, x and weights aligned to 16 bytes, K a multiple of `PACK`; neither M nor N is 0. `parts` of K are
    summed up apart, see `linear_parts`.
    """
    if parts == 1:
        few_linear(x, weight, scale, bias, False, out)
        return
    rows, outputs = out.shape
    sums = x.new_empty((parts, rows, outputs), dtype=torch.float32)
    linear_parts(x, weight, scale, sums)
    block = min(256, triton.next_power_of_2(outputs))
    linear_8bit_sum_kernel[triton.cdiv(outputs, block), rows](
        sums, bias, out, rows, outputs, parts, BLOCK_N=block, num_warps=2
    )


def _cases() -> list[tuple]:
    cases: list[tuple] = []
    for dtype in ("fp16", "bf16"):
        signature = {"partial": "*fp32", "bias": f"*{dtype}", "out": f"*{dtype}"}
        signature |= dict.fromkeys(("rows", "outputs", "parts"), "i32") | {"BLOCK_N": "constexpr"}
        cases.append((linear_8bit_sum_kernel, signature, {"BLOCK_N": 256}, {"num_warps": 2}))
    return cases


COMPILE_CASES = _cases()
