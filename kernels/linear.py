"""Triton kernels of the family `linear`: a product with weights of 8 bits.

The product itself is that of `linear_few`. Where that leaves sums over K in parts, a second kernel adds them up, in one
order: runs are bit-equal. For many rows a third one writes the weights out in half precision, for a library's product.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent
from unifiedar.kernels.linear_few import PACK, _widened, few_linear, linear_parts

__all__ = ["COMPILE_CASES", "PACK", "linear_8bit", "widen_8bit"]

WIDEN_ROWS, WIDEN_INPUTS, WIDEN_WARPS = 4, 512, 2  # what a program widens, the fastest of eight ways on an H100


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


@triton.jit
def widen_8bit_kernel(
    weight,  # [outputs, inputs], bytes
    scale,  # [outputs] float32
    out,  # [outputs, inputs]; written
    outputs,
    inputs,
    FORM: tl.constexpr,  # "int8" or "fp8"
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (blocks of inputs, blocks of outputs)."""
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (output < outputs)[:, None] & (entry < inputs)[None, :]
    at = output.to(tl.int64)[:, None] * inputs + entry[None, :]
    # Nothing that runs before writes weights, so they are fetched before the wait; and they are not read again, as what
    # is written here is.
    entries = tl.load(weight + at, mask=inside, other=0, eviction_policy="evict_first")
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    factor = tl.load(scale + output, mask=output < outputs, other=0.0)  # which may be a copy that was just made
    if FORM == "fp8":
        factor *= 256.0
    wide = _widened(entries, FORM, out.dtype.element_ty).to(tl.float32) * factor[:, None]
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


def widen_8bit(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (N, K), half precision, with scale[:, None] weight, rounded once; contiguous, not empty."""
    outputs, inputs = weight.shape
    form = "int8" if weight.dtype == torch.int8 else "fp8"
    widen_8bit_kernel[triton.cdiv(inputs, WIDEN_INPUTS), triton.cdiv(outputs, WIDEN_ROWS)](
        weight.view(torch.uint8), scale, out, outputs, inputs,
        FORM=form, BLOCK_N=WIDEN_ROWS, BLOCK_K=WIDEN_INPUTS, num_warps=WIDEN_WARPS, **dependent(weight),
    )  # fmt: skip


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
        for form in ("int8", "fp8"):
            types = {"weight": "*u8", "scale": "*fp32", "out": f"*{dtype}", "outputs": "i32", "inputs": "i32"}
            for arch, launch in ((80, {}), (90, {"launch_pdl": True})):
                constants = {"FORM": form, "BLOCK_N": WIDEN_ROWS, "BLOCK_K": WIDEN_INPUTS, "PDL": bool(launch)}
                signature = types | dict.fromkeys(constants, "constexpr")
                cases.append(
                    (
                        widen_8bit_kernel,
                        signature,
                        constants,
                        {"num_warps": WIDEN_WARPS, **launch},
                        dict.fromkeys(types, 16),
                        (arch,),
                    )
                )
    return cases


COMPILE_CASES = _cases()
