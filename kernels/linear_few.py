"""Triton kernel of products of few rows: whole, with bias and GELU, or with sums over K left in parts; of weights in
half precision, or in 8 bits that are widened in registers.

With few rows a product is the way of its weights from memory, for which all multiprocessors are wanted; where outputs
are too few to go round, programs share K too, and whoever reads the output next adds up. A tile of weights is the left
factor, of which Hopper's matrix units want 64 rows; of x they take as few as 16. It may come out of registers: what is
widened never goes back to shared memory.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent

__all__ = ["COMPILE_CASES", "PACK", "STEP", "Tile", "few_linear", "linear_parts", "tile"]

PACK = 16  # entries that K is a multiple of: 32 bytes, or 16 of weights in 8 bits
STEP = 64  # entries of K that a part is a multiple of
_STEP: tl.constexpr = tl.constexpr(STEP)
# The interpreter knows no assembly.
_PLAIN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"))


@dataclass(frozen=True)
class Tile:
    """Rows of x, outputs and entries of K that a program takes at a time, and steps that are on their way to it."""

    rows: int
    outputs: int
    inputs: int
    stages: int
    warps: int = 4


def tile(rows: int, outputs: int, parts: int, bits: int, hopper: bool) -> Tile:
    """The tile for rows of x, outputs in parts of K, weights of 8 or 16 bits: the best of those tried on an H100."""
    if bits == 8:
        # A thread fetches weights for wgmma two at a time, which in bytes takes it as long as all else; for mma.sync,
        # which programs of 32 outputs use, four at a time.
        if rows <= 16:
            return Tile(16, 32, 128, 6, 2) if triton.cdiv(outputs, 32) * parts > 132 else Tile(16, 32, 128, 5)
        if rows <= 64:
            return Tile(32, 32, 128, 5) if rows <= 32 else Tile(64, 64, 128, 4)
        if rows <= 128 and hopper:
            return Tile(128, 64, 128, 3)
        many = triton.cdiv(outputs, 128) * triton.cdiv(rows, 256) * parts >= 80
        return Tile(256, 128, 64, 4, 8) if hopper and many else Tile(128, 128, 64, 4, 8)
    return Tile(16, 64, 64, 6) if rows <= 16 else Tile(32, 64, 64, 6) if rows <= 32 else Tile(64, 64, 64, 5)


# Four bytes to four numbers of half precision, in two registers. e4m3 has a sign, four bits of exponent and three of
# mantissa: they are put where float16 (bfloat16) has them, and mean less by what the exponents' biases differ, 2^8
# (2^120, of which all but 2^8 is multiplied back, lest products underflow); subnormal numbers come out right too.
_FP8_HALF: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, s, t;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 s, a, 1;
shr.b32 t, b, 1;
and.b32 s, s, 0x3F803F80;
and.b32 t, t, 0x3F803F80;
lop3.b32 $0, a, 0x80008000, s, 0xEA;
lop3.b32 $1, b, 0x80008000, t, 0xEA;
}""")
_FP8_BF16: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, s, t, m, z;
mov.b32 m, 0x77807780;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 s, a, 4;
shr.b32 t, b, 4;
and.b32 s, s, 0x07F007F0;
and.b32 t, t, 0x07F007F0;
lop3.b32 s, a, z, s, 0xEA;
lop3.b32 t, b, z, t, 0xEA;
fma.rn.bf16x2 $0, s, m, z;
fma.rn.bf16x2 $1, t, m, z;
}""")
# An integer plus 128 is put behind the exponent of 1024 in float16, and 1152 taken off; behind bfloat16's of 128 its
# lower seven bits, and 128 or, by the sign, 256 taken off.
_INT8_HALF: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, q, e, o;
mov.b32 e, 0x64646464;
mov.b32 o, 0x64806480;
xor.b32 q, $2, 0x80808080;
prmt.b32 a, q, e, 0x4140;
prmt.b32 b, q, e, 0x4342;
sub.f16x2 $0, a, o;
sub.f16x2 $1, b, o;
}""")
_INT8_BF16: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, s, t, e, m;
mov.b32 e, 0x43434343;
mov.b32 m, 0xBF80BF80;
prmt.b32 a, $2, e, 0x4140;
prmt.b32 b, $2, e, 0x4342;
and.b32 s, a, 0xFF80FF80;
and.b32 t, b, 0xFF80FF80;
and.b32 a, a, 0xFF7FFF7F;
and.b32 b, b, 0xFF7FFF7F;
fma.rn.bf16x2 $0, s, m, a;
fma.rn.bf16x2 $1, t, m, b;
}""")


@triton.jit
def _widened(entries, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """Of bytes, exactly: integers or e4m3 numbers over 256."""
    if _PLAIN:
        if FORM == "int8":
            wide = entries.to(tl.int8, bitcast=True).to(DTYPE)
        else:
            bits = entries.to(tl.uint16)
            wide = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(DTYPE)
    elif DTYPE == tl.float16:  # noqa: SIM300
        if FORM == "int8":
            wide = tl.inline_asm_elementwise(_INT8_HALF, "=r,=r,r", [entries], tl.float16, is_pure=True, pack=4)
        else:
            wide = tl.inline_asm_elementwise(_FP8_HALF, "=r,=r,r", [entries], tl.float16, is_pure=True, pack=4)
    else:
        if FORM == "int8":
            wide = tl.inline_asm_elementwise(_INT8_BF16, "=r,=r,r", [entries], tl.bfloat16, is_pure=True, pack=4)
        else:
            wide = tl.inline_asm_elementwise(_FP8_BF16, "=r,=r,r", [entries], tl.bfloat16, is_pure=True, pack=4)
    return wide


@triton.jit(do_not_specialize=["rows", "steps"])
def few_linear_kernel(
    x,  # [rows, INPUTS]
    weight,  # [outputs, INPUTS], like x, or with a FORM bytes
    scale,  # [outputs] float32 of weights with a FORM, or None
    bias,  # [outputs], or None
    out,  # [parts, rows, outputs]; written
    rows,
    outputs,
    steps,  # of STEP entries of K to a part
    INPUTS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether every part is of whole BLOCK_K
    FORM: tl.constexpr,  # of weights in 8 bits: "int8" or "fp8", or None
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
    begin = tl.program_id(2) * steps * _STEP
    end = tl.minimum(begin + steps * _STEP, INPUTS)
    # Outputs beyond the last are that of the last: nobody stores what comes of them.
    from_weight = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * INPUTS + entry[None, :]
    from_x = x + row.to(tl.int64)[None, :] * INPUTS + entry[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(begin, end, BLOCK_K):
        if WHOLE:
            left = tl.load(from_weight + at)
            right = tl.load(from_x + at, mask=(row < rows)[None, :], other=0.0)
        else:
            inside = at + entry < end
            left = tl.load(from_weight + at, mask=inside[None, :], other=0)
            right = tl.load(from_x + at, mask=inside[:, None] & (row < rows)[None, :], other=0.0)
        if FORM is not None:
            left = _widened(left, FORM, x.dtype.element_ty)
        total = tl.dot(left, right, total)
    if PDL:
        cuda.gdc_launch_dependents()
    result = tl.trans(total)
    if FORM is not None:
        factor = tl.load(scale + output, mask=output < outputs, other=0.0)
        if FORM == "fp8":
            factor *= 256.0
        result *= factor[None, :]
    if bias is not None:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if ACTIVATED:
        # (1 + tanh z) / 2 = 1 / (1 + e^(-2z)); the factor is 2 sqrt(2 / pi).
        result = result / (1.0 + tl.exp(-1.5957691216057308 * (result + 0.044715 * result * result * result)))
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    to_out = out + tl.program_id(2).to(tl.int64) * rows * outputs
    to_out += row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(to_out, result.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activated: bool,
    out: torch.Tensor,
    parts: int,
) -> None:
    rows, inputs = x.shape
    outputs = len(weight)
    form = None
    if scale is not None:
        form, weight = ("int8" if weight.dtype == torch.int8 else "fp8"), weight.view(torch.uint8)
    launch = dependent(x)
    one = tile(rows, outputs, parts, 8 * weight.element_size(), launch["PDL"])
    steps = triton.cdiv(inputs, parts * STEP)
    few_linear_kernel[triton.cdiv(outputs, one.outputs), triton.cdiv(rows, one.rows), parts](
        x, weight, scale, bias, out, rows, outputs, steps,
        INPUTS=inputs, WHOLE=inputs % one.inputs == 0 and (parts == 1 or steps * STEP % one.inputs == 0), FORM=form,
        ACTIVATED=activated, BLOCK_M=one.rows, BLOCK_N=one.outputs, BLOCK_K=one.inputs, num_warps=one.warps,
        num_stages=one.stages, **launch,
    )  # fmt: skip


def few_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activated: bool,
    out: torch.Tensor,
) -> None:
    """Fills out (M, N), like x (M, K), from weight (N, K) and bias (N,), of half precision; `activated`: GELU (tanh).

    With a scale (N,) float32 the weights are int8 or float8_e4m3fn. All contiguous, x and weight aligned to 16 bytes, K
    a multiple of `PACK`. Neither M nor N is 0.
    """
    _launch(x, weight, scale, bias, activated, out, 1)


def linear_parts(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fills out (P, M, N) float32, whose sum over P is the product of x (M, K) and weight (N, K), as `few_linear` takes
    them; a part is of whole steps of `STEP` entries."""
    _launch(x, weight, scale, None, False, out, len(out))


def _cases() -> list[tuple]:
    """Both dtypes, layers of d16 and d30 and one whose K is no multiple of a step, whole and in parts, every tile; and
    of weights in 8 bits both forms."""
    cases: list[tuple] = []
    kernel = few_linear_kernel
    eight = ((2, 1), (2, 4), (32, 1), (64, 1), (128, 1), (512, 1), (512, 4))
    for feature, inputs, whole, form in (
        ("fp16", 4096, False, None), ("bf16", 1920, True, None), ("bf16", 1040, False, None),
        ("fp16", 1920, True, "fp8"), ("bf16", 1024, True, "fp8"), ("fp16", 4096, False, "int8"),
        ("bf16", 1920, False, "int8"),
    ):  # fmt: skip
        for rows, parts in ((2, 1), (32, 1), (72, 1)) if form is None else eight:
            for arch, launch in ((80, {}), (90, {"launch_pdl": True})):
                one = tile(rows, 1920, parts, 16 if form is None else 8, arch == 90)
                constants: dict[str, object] = {} if whole else {"bias": None}
                constants |= {} if form else {"scale": None}
                constants |= {"INPUTS": inputs, "WHOLE": inputs % one.inputs == 0, "FORM": form, "ACTIVATED": whole}
                constants |= {"BLOCK_M": one.rows, "BLOCK_N": one.outputs, "BLOCK_K": one.inputs, "PDL": bool(launch)}
                types = dict.fromkeys(("x", "weight", "bias"), f"*{feature}")
                types |= {"out": f"*{feature}" if whole else "*fp32"}
                types |= {"weight": "*u8", "scale": "*fp32"} if form else {}
                names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
                signature = {**names, **dict.fromkeys(constants, "constexpr")}
                divisors = {name: 16 for name in names if name not in ("rows", "steps")}
                options = {"num_warps": one.warps, "num_stages": one.stages, **launch}
                cases.append((kernel, signature, constants, options, divisors, (arch,)))
    return cases


COMPILE_CASES = _cases()
