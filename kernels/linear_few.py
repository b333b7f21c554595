"""Triton kernel of products of few rows: whole, with bias and GELU, or with sums over K left in parts.

With few rows a product is the way of its weights from memory, for which all multiprocessors are wanted; where outputs
are too few to go round, programs share K too, and whoever reads the output next adds up. A tile of weights is the left
factor, of which Hopper's matrix units want 64 rows; of x they take as few as 16.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent

__all__ = ["COMPILE_CASES", "OUTPUTS", "PACK", "STEP", "Tile", "few_linear", "linear_parts", "tile"]

PACK = 16  # entries that K is a multiple of: 32 bytes
STEP = 64  # entries of K that a program takes at a time
OUTPUTS = 64  # that a program makes


@dataclass(frozen=True)
class Tile:
    """Rows of x that a program takes, and how many steps are on their way to it at a time."""

    rows: int
    stages: int


def tile(rows: int) -> Tile:
    """The tile for so many rows of x. Tried on an H100: 64 rows as the left factor, and K in steps of 128, too."""
    return Tile(16, 6) if rows <= 16 else Tile(32, 6) if rows <= 32 else Tile(64, 5)


@triton.jit(do_not_specialize=["rows", "steps"])
def few_linear_kernel(
    x,  # [rows, INPUTS]
    weight,  # [outputs, INPUTS]
    bias,  # [outputs], or None
    out,  # [parts, rows, outputs]; written
    rows,
    outputs,
    steps,  # of BLOCK_K entries of K to a part
    INPUTS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of outputs, tiles of rows, parts of K). With a bias or GELU there is one part."""
    if PDL:
        cuda.gdc_wait()
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
    if PDL:
        cuda.gdc_launch_dependents()
    result = tl.trans(total)
    if bias is not None:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if ACTIVATED:
        # (1 + tanh z) / 2 = 1 / (1 + e^(-2z)); the factor is 2 sqrt(2 / pi).
        result = result / (1.0 + tl.exp(-1.5957691216057308 * (result + 0.044715 * result * result * result)))
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    to_out = out + (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * outputs + output[None, :]
    tl.store(to_out, result.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activated: bool, out: torch.Tensor, parts: int
) -> None:
    rows, inputs = x.shape
    outputs = len(weight)
    one = tile(rows)
    few_linear_kernel[triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, one.rows), parts](
        x, weight, bias, out, rows, outputs, triton.cdiv(inputs, parts * STEP),
        INPUTS=inputs, ACTIVATED=activated, BLOCK_M=one.rows, BLOCK_N=OUTPUTS, BLOCK_K=STEP, num_warps=4,
        num_stages=one.stages, **dependent(x),
    )  # fmt: skip


def few_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activated: bool, out: torch.Tensor
) -> None:
    """Fills out (M, N), like x (M, K), from weight (N, K) and bias (N,), of half precision; `activated`: GELU (tanh).

    All contiguous, x and weight aligned to 16 bytes, K a multiple of `PACK`. Neither M nor N is 0.
    """
    _launch(x, weight, bias, activated, out, 1)


def linear_parts(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (P, M, N) float32, whose sum over P is the product of x (M, K) and weight (N, K), as `few_linear` takes
    them; a part is of whole steps of `STEP` entries."""
    _launch(x, weight, None, False, out, len(out))


def _cases() -> list[tuple]:
    """Both dtypes, layers of d16 and d30 and one whose K is no multiple of a step, whole and in parts, every tile."""
    cases: list[tuple] = []
    kernel = few_linear_kernel
    for feature, inputs, whole in (("fp16", 4096, False), ("bf16", 1920, True), ("bf16", 1040, False)):
        for rows in (2, 32, 72):
            one = tile(rows)
            constants: dict[str, int | None] = {} if whole else {"bias": None}
            constants |= {"INPUTS": inputs, "ACTIVATED": whole, "BLOCK_M": one.rows}
            constants |= {"BLOCK_N": OUTPUTS, "BLOCK_K": STEP}
            types = dict.fromkeys(("x", "weight", "bias"), f"*{feature}") | {"out": f"*{feature}" if whole else "*fp32"}
            for arch, launch in ((80, {}), (90, {"launch_pdl": True})):
                wanted = constants | {"PDL": bool(launch)}
                names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in wanted}
                signature = {**names, **dict.fromkeys(wanted, "constexpr")}
                divisors = {name: 16 for name in names if name not in ("rows", "steps")}
                options = {"num_warps": 4, "num_stages": one.stages, **launch}
                cases.append((kernel, signature, wanted, options, divisors, (arch,)))
    return cases


COMPILE_CASES = _cases()
