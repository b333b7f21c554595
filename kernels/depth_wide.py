"""Products of many rows in a depth transformer: 64 of them and 64 of the weights' in a program, through a ring.

`kernels/depth.py` says what they are part of, and multiplies few rows.
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

__all__ = ["COMPILE_CASES", "MANY", "Wide", "multiply", "parts", "takes", "wide"]

MANY = 16  # rows beyond which half precision is multiplied here
_LARGE = 2**23  # weights beyond which all rows that matrix units multiply are
_HELD = 64  # rows of x that a program has
_CHUNK = 64  # inputs that it takes at a time
_WARPS = 4
_AHEAD: tl.constexpr = tl.constexpr(512)  # inputs of its weights, fetched before the launch ahead is waited for
_SPREAD = 132  # programs of which none need wait for room on a large GPU
_ROOM = 98304  # bytes of a ring: two programs fit on a multiprocessor


@dataclass(frozen=True)
class Wide:
    """How a product of many rows, in half precision, is shared out.

    Args:
        outputs: rows of the weights that a program has, of each matrix if gated.
        parts: of the inputs; a program has one.
        stages: of the ring that they go through.
    """

    outputs: int
    parts: int
    stages: int


def wide(rows: int, sizes: list[int], inputs: int, gated: bool = False, shared: bool = False) -> Wide:
    """The tile for rows of x and weights (size, inputs) side by side, or two such weights, of two bytes an entry.

    Args:
        rows, inputs: of x.
        sizes: outputs of each matrix.
        gated: as `linear` takes it.
        shared: whether the inputs may be shared out.
    """
    tall = triton.cdiv(rows, 2 * _HELD)  # two that have the same weights fit on a multiprocessor

    def programs(outputs: int) -> int:
        return tall * sum(triton.cdiv(size, outputs) for size in (sizes[:1] if gated else sizes))

    def shares(outputs: int) -> int:
        return max(1, min(_SPREAD // programs(outputs), inputs // 256)) if shared else 1

    outputs = 64
    while outputs > 16 and programs(outputs) * shares(outputs) < 96:
        outputs //= 2
    stages = _ROOM // (2 * _CHUNK * (_HELD + outputs * (1 + gated)))
    return Wide(outputs, shares(outputs), max(2, stages))


def parts(rows: int, outputs: int, inputs: int, itemsize: int = 2) -> int:
    """Parts that a product with weights (outputs, inputs) is made in for the next norm to add up; 0 for few rows."""
    few = not takes(rows, outputs * inputs, itemsize)
    return 0 if few else wide(rows, [outputs], inputs, shared=True).parts


def takes(rows: int, weights: int, itemsize: int) -> bool:
    """Whether rows are multiplied here by so many weights, those of all matrices together, of so many bytes each."""
    return itemsize == 2 and rows > (FEW if weights > _LARGE else MANY)


@triton.jit
def _ask(weight, near, begin, INPUTS: tl.constexpr):
    """Brings entries of rows of weights, from `begin` on, to the second cache, a line of 64 at a time."""
    entry = tl.minimum(begin + tl.arange(0, _AHEAD // 64) * 64, INPUTS - 1)
    at = (weight + near[:, None] * INPUTS + entry[None, :]).to(tl.int64)
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [at], tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["rows", "out_part"])
def depth_wide_kernel(
    x,  # [rows, INPUTS]
    weight,  # [OUTPUTS, INPUTS]
    weight2,  # as in depth_linear_kernel, like the next six
    weight3,
    bias,
    bias2,
    bias3,
    place,
    residual,
    out,  # [rows, all outputs], strides out_row, 1; of several parts [PARTS, rows, OUTPUTS] float32; written
    rows,
    residual_row,
    out_row,
    out_part,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS2: tl.constexpr,
    OUTPUTS3: tl.constexpr,
    PARTS: tl.constexpr,  # the first adds what is added
    KIND: tl.constexpr,  # one, beside, gated
    ACTIVATION: tl.constexpr,  # none, gelu, gelu_tanh, silu
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles of rows, tiles of all outputs, PARTS). Those who have the same weights come after one another."""
    side, weight, tile, column, outputs = own_matrix(
        tl.program_id(1), weight, weight2, weight3, OUTPUTS, OUTPUTS2, OUTPUTS3, KIND, BLOCK_N
    )
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    near = output
    if OUTPUTS % BLOCK_N + OUTPUTS2 % BLOCK_N + OUTPUTS3 % BLOCK_N > 0:
        near = tl.minimum(output, outputs - 1)  # loads need no mask, and nobody stores what comes of the rest
    CHUNKS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (CHUNKS + PARTS - 1) // PARTS
    part = tl.program_id(2)
    begin = part * SHARE
    end = tl.minimum(begin + SHARE, CHUNKS)
    added = own_bias(side, bias, bias2, bias3, near, KIND)
    added2 = columns(bias2 if KIND == "gated" else None, near)
    placed = columns(place, near)
    if PDL:
        _ask(weight, near, begin * BLOCK_K, INPUTS)
        if KIND == "gated":
            _ask(weight2, near, begin * BLOCK_K, INPUTS)
        gdc_wait()

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    entry = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * INPUTS + entry[None, :]
    at = weight + near[None, :] * INPUTS + entry[:, None]
    at2 = at
    if KIND == "gated":
        at2 = weight2 + near[None, :] * INPUTS + entry[:, None]
    present = (row < rows)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total2 = total
    for chunk in range(begin, end):
        first = chunk * BLOCK_K
        if INPUTS % BLOCK_K == 0:
            y = tl.load(x_at + first, mask=present, other=0.0)
            more = tl.load(at + first)
        else:
            y = tl.load(x_at + first, mask=present & (first + entry < INPUTS)[None, :], other=0.0)
            more = tl.load(at + first, mask=(first + entry < INPUTS)[:, None], other=0.0)
        total = tl.dot(y, more, total)
        if KIND == "gated":
            if INPUTS % BLOCK_K == 0:
                more2 = tl.load(at2 + first)
            else:
                more2 = tl.load(at2 + first, mask=(first + entry < INPUTS)[:, None], other=0.0)
            total2 = tl.dot(y, more2, total2)

    if PDL:  # no sooner: what is let in early takes room on some multiprocessors, and its programs pile up there
        gdc_launch_dependents()
    inside = present & (output < outputs)[None, :]
    kept = None
    if residual is not None:
        own = residual + row.to(tl.int64)[:, None] * residual_row + output[None, :]
        kept = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    if PARTS == 1 or part == 0:
        total = finished(total, total2, added, added2, placed, kept, KIND, ACTIVATION)
    to = out + part.to(tl.int64) * out_part + row.to(tl.int64)[:, None] * out_row + (column + output)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def multiply(
    x: torch.Tensor,
    weights: list[torch.Tensor | None],
    biases: list[torch.Tensor | None],
    place: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    sizes: list[int],
    kind: str,
    activation: str,
    early: bool,
) -> None:
    """What `depth.linear` says, of rows that `takes` takes, after the norm.

    Args:
        x, place, residual, out, activation, early: as there.
        weights, biases: three each, None for those that there are not.
        sizes: outputs of each matrix.
        kind: "one", "beside" or "gated".
    """
    rows, inputs = x.shape
    one = wide(rows, sizes, inputs, kind == "gated", out.ndim == 3)
    tiles = sum(triton.cdiv(size, one.outputs) for size in (sizes if kind == "beside" else sizes[:1]))
    depth_wide_kernel[triton.cdiv(rows, _HELD), tiles, one.parts](
        x, *weights, *biases, place, residual, out, rows, 0 if residual is None else residual.stride(0), out.stride(-2),
        out.stride(0) if out.ndim == 3 else 0, **_constants(one, inputs, sizes, kind, activation, early),
        num_warps=_WARPS, num_stages=one.stages, **launch(early),
    )  # fmt: skip


def _constants(one: Wide, inputs: int, sizes: list[int], kind: str, activation: str, early: bool) -> dict:
    return {
        **shared_constants(inputs, sizes, kind, activation, early),
        "PARTS": one.parts,
        "BLOCK_M": _HELD,
        "BLOCK_N": one.outputs,
        "BLOCK_K": _CHUNK,
    }


def _case(dtype: str, rows: int, inputs: int, outputs: tuple[int, ...], early: bool, **how) -> tuple:
    kind = "gated" if how.get("gated") else "beside" if len(outputs) > 1 else "one"
    one = wide(rows, list(outputs), inputs, kind == "gated", how.get("in_parts", False))
    types = {**linear_types(dtype, len(outputs), **how), "out_part": "i32"}
    constants = _constants(one, inputs, list(outputs), kind, how.get("activation", "none"), early)
    options = {"num_warps": _WARPS, "num_stages": one.stages, **launch(early)}
    aligned = [name for name, given in types.items() if given == f"*{dtype}"]
    return case(depth_wide_kernel, types, constants, options, (*aligned, "residual_row", "out_row"))


COMPILE_CASES = [
    one
    for dtype, rows, early in (("bf16", 64, True), ("fp16", 100, False))
    for one in (
        _case(dtype, rows, 2560, (2560, 2560, 2560), early, bias=True),
        _case(dtype, rows, 2560, (10240,), early, bias=True, activation="gelu"),
        _case(dtype, rows, 10240, (2560,), early, bias=True, in_parts=True),
        _case(dtype, rows, 1024, (3072, 3072), early, activation="silu", gated=True),
        _case(dtype, rows, 1152, (2560,), early, bias=True, place=True, residual=True),
    )
]
