"""Triton kernels of bias and GELU after a product, and of their gradients.

A program takes a tile of columns, and of rows one tile, or in the gradient every tile of its share, for which it keeps
the bias's sums. Arithmetic is float32, rounded once.
"""

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "bias_gelu", "bias_gelu_backward", "row_shares"]

ELEMENTS = 4096  # of a tile, 32 a thread
COLUMNS = 512
WARPS = 4
PROGRAMS = 2112  # of the gradient: sixteen for every multiprocessor of a large GPU


@triton.jit
def _halves(x):
    """What GELU multiplies x by, s = (1 + tanh u) / 2, and 1 - s, each without cancellation; and du/dx."""
    square = x * x
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * square)
    small = tl.exp(-2.0 * tl.abs(u))
    large = 1.0 / (1.0 + small)
    small *= large
    slope = 0.7978845608028654 * (1.0 + 0.134145 * square)
    return tl.where(u < 0, small, large), tl.where(u < 0, large, small), slope


@triton.jit
def bias_gelu_kernel(
    x,  # [rows, width]
    bias,  # [width]
    out,  # like x; written
    rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of columns, tiles of rows)."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    added = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added[None, :]
    share, _, _ = _halves(y)
    tl.store(out + at, (y * share).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["share"])
def bias_gelu_backward_kernel(
    grad,  # [rows, width]
    x,  # [rows, width]
    bias,  # [width]
    grad_x,  # like x; written
    parts,  # [grid 1, width] float32; written: sums over a program's rows
    rows,
    width,
    share,  # rows of a program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of columns, programs that share the rows)."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < width
    added = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, rows)
    for begin in range(first, end, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        given = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added
        one, other, slope = _halves(y)
        given *= one * (1.0 + 2.0 * y * other * slope)
        total += given
        tl.store(grad_x + at, given.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(1).to(tl.int64) * width + column, tl.sum(total, 0), mask=there)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    return ELEMENTS // columns, columns


def row_shares(rows: int, width: int) -> tuple[int, int]:
    """Programs that share the rows in the gradient, and rows of each."""
    tall, wide = _tile(width)
    programs = max(1, min(triton.cdiv(rows, tall), PROGRAMS // triton.cdiv(width, wide)))
    share = triton.cdiv(triton.cdiv(rows, programs), tall) * tall
    return triton.cdiv(rows, share), share


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out with GELU (its tanh form) of x + bias.

    Args:
        x, out: (M, N) contiguous.
        bias: (N,) contiguous.
    """
    rows, width = x.shape
    tall, wide = _tile(width)
    grid = (triton.cdiv(width, wide), triton.cdiv(rows, tall))
    bias_gelu_kernel[grid](x, bias, out, rows, width, BLOCK_M=tall, BLOCK_N=wide, num_warps=WARPS)


def bias_gelu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, grad_x: torch.Tensor, parts: torch.Tensor
) -> None:
    """Fills the gradient of x, and parts of that of the bias.

    Args:
        grad, x, grad_x: (M, N) contiguous.
        bias: (N,) contiguous.
        parts: (`row_shares`(M, N)[0], N) float32 contiguous, whose sum over dimension 0 is the bias's gradient.
    """
    rows, width = x.shape
    tall, wide = _tile(width)
    programs, share = row_shares(rows, width)
    bias_gelu_backward_kernel[(triton.cdiv(width, wide), programs)](
        grad, x, bias, grad_x, parts, rows, width, share, BLOCK_M=tall, BLOCK_N=wide, num_warps=WARPS
    )


def _cases() -> list[tuple]:
    """What to compile: VAR's widths under autocast, and float32."""
    cases: list[tuple] = []
    for width, feature, of_bias in ((4096, "bf16", "fp32"), (7680, "fp16", "fp16"), (768, "fp32", "fp32")):
        tall, wide = _tile(width)
        for kernel in (bias_gelu_kernel, bias_gelu_backward_kernel):
            types = dict.fromkeys(("x", "out", "grad", "grad_x"), f"*{feature}")
            types |= {"bias": f"*{of_bias}", "parts": "*fp32"}
            constants = {"BLOCK_M": tall, "BLOCK_N": wide}
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
            signature = {**names, **dict.fromkeys(constants, "constexpr")}
            divisors = {name: 16 for name in names if name not in ("rows", "share")}
            cases.append((kernel, signature, constants, {"num_warps": WARPS}, divisors))
    return cases


COMPILE_CASES = _cases()
