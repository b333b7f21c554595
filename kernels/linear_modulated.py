"""Triton kernel of the products around a transformer's norms, for few rows: everything around a product in its launch.

    out = x' W^T + bias,  x' = x or (x - mean) / sqrt(variance + eps) * (1 + scale) + shift
    then GELU, or tokens + gate * out, or nothing

With few rows a product is the way of its weights from memory, and what stands around it is launches. A tile of weights
is the left factor, so that rows may be as few as 8; the warps of a program share out the entries of K. On Hopper the
weights are asked for before the kernel before is over (`_dependent`).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent, weights_ahead
from unifiedar.kernels.norm import modulated_norm

__all__ = ["COMPILE_CASES", "Tile", "gated_linear", "modulated_linear", "tile"]

PACK = 16  # entries that K is a multiple of: 32 bytes
NORM_CHANNELS = 128  # of a row that a program adds up at a time


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time: rows of x, rows of the weights, and entries of K for each of the `ways` that its
    warps go in, whose sums are added at the end."""

    rows: int
    outputs: int
    inputs: int
    ways: int
    warps: int
    stages: int
    parts: int = 1


def tile(rows: int, outputs: int, inputs: int) -> Tile:
    """The tile for x (rows, inputs) and weights (outputs, inputs). Chosen by arithmetic; none ran on a GPU yet."""
    held = min(max(8, triton.next_power_of_2(rows)), 64)
    if rows > 128:
        return Tile(128, 64, 64, 1, 4, 4) if rows > 256 else Tile(64, 64, 64, 1, 4, 5)
    if held == 64:
        return Tile(64, 64, 64, 1, 4, 5) if outputs > 2 * inputs else Tile(64, 32, 64, 2, 4, 4)
    return Tile(held, 32 if outputs >= 5000 else 16, 64, 4, 8 if outputs >= 5000 else 4, 4)


def norm_inside(rows: int) -> bool:
    """Whether every program normalizes its rows itself; else a launch before does it once."""
    return rows <= 16


@triton.jit
def _moments(x, row, rows, eps, INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean of rows, and one over their deviation."""
    channel = tl.arange(0, CHANNELS)
    at_x = x + row.to(tl.int64)[:, None] * INPUTS + channel[None, :]
    total = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    for at in tl.static_range(0, INPUTS, CHANNELS):
        inside = (row < rows)[:, None] & (at + channel < INPUTS)[None, :]
        total += tl.load(at_x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 1), INPUTS * 1.0)
    total = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    for at in tl.static_range(0, INPUTS, CHANNELS):
        inside = (row < rows)[:, None] & (at + channel < INPUTS)[None, :]
        found = tl.load(at_x + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, found - mean[:, None], 0.0)
        total += centred * centred
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(total, 1), INPUTS * 1.0) + eps))


@triton.jit(do_not_specialize=["rows", "length", "eps"])
def linear_modulated_kernel(
    x,  # [rows, INPUTS]
    scale,  # [batch, INPUTS], strides scale_row, 1, or None
    shift,  # [batch, INPUTS], strides shift_row, 1, or None
    weight,  # [outputs, INPUTS]
    bias,  # [outputs], or None
    tokens,  # [rows, outputs], or None
    gate,  # [batch, outputs], strides gate_row, 1, or None
    out,  # [rows, outputs]; written
    rows,
    length,  # rows of one batch
    outputs,
    scale_row,
    shift_row,
    gate_row,
    eps,
    INPUTS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of outputs, tiles of rows, parts of K)."""
    first = tl.program_id(0) * BLOCK_N
    # Entries of a part, whole steps.
    SHARE: tl.constexpr = (INPUTS + PARTS * WAYS * BLOCK_K - 1) // (PARTS * WAYS * BLOCK_K) * WAYS * BLOCK_K
    begin = tl.program_id(2) * SHARE
    end = tl.minimum(begin + SHARE, INPUTS)
    if PDL:
        cuda.gdc_launch_dependents()
        if tl.program_id(1) == 0:
            place = weight + first.to(tl.int64) * INPUTS + begin
            held = tl.minimum(outputs - first, BLOCK_N)
            weights_ahead(place.to(tl.int64), held, INPUTS * 2, (end - begin) * 2, SHARE * 2 // 128, LANES)
        cuda.gdc_wait()
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = first + tl.arange(0, BLOCK_N)
    batch = tl.minimum(row, rows - 1) // length
    entry = tl.arange(0, BLOCK_K)
    if scale is not None:
        mean, inverse = _moments(x, row, rows, eps, INPUTS, BLOCK_M, CHANNELS)
    # Weights [ways, outputs, entries], rows of x [ways, entries, rows]; without ways two dimensions, for the larger
    # matrix units.
    held = tl.minimum(output, outputs - 1)
    if WAYS == 1:
        from_output, weight_entry = held[:, None], entry[None, :]
        x_entry, from_row, of_batch = entry[:, None], row[None, :], batch[None, :]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        way = tl.arange(0, WAYS)[:, None, None] * BLOCK_K
        from_output, weight_entry = held[None, :, None], way + entry[None, None, :]
        x_entry, from_row, of_batch = way + entry[None, :, None], row[None, None, :], batch[None, None, :]
        total = tl.zeros([WAYS, BLOCK_N, BLOCK_M], tl.float32)
    if scale is not None:
        if WAYS == 1:
            mean, inverse = mean[None, :], inverse[None, :]
        else:
            mean, inverse = mean[None, None, :], inverse[None, None, :]
        scale += of_batch.to(tl.int64) * scale_row + x_entry
        shift += of_batch.to(tl.int64) * shift_row + x_entry
    weight += from_output.to(tl.int64) * INPUTS + weight_entry
    x += from_row.to(tl.int64) * INPUTS + x_entry
    known = from_row < rows
    for at in range(begin, end, WAYS * BLOCK_K):
        inside = (at + x_entry < INPUTS) & known
        left = tl.load(weight + at, mask=at + weight_entry < INPUTS, other=0.0)
        right = tl.load(x + at, mask=inside, other=0.0)
        if scale is not None:
            stretch = 1.0 + tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
            moved = tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
            right = (right.to(tl.float32) - mean) * inverse * stretch + moved
        total = tl.dot(left, right.to(left.dtype), total)
    if WAYS == 1:
        result = tl.trans(total)
    else:
        result = tl.trans(tl.sum(total, 0))
    if bias is not None:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if ACTIVATED:
        # (1 + tanh z) / 2 = 1 / (1 + e^(-2z)); the factor is 2 sqrt(2 / pi).
        result = result / (1.0 + tl.exp(-1.5957691216057308 * (result + 0.044715 * result * result * result)))
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    if gate is not None:
        factor = tl.load(gate + batch.to(tl.int64)[:, None] * gate_row + output[None, :], mask=inside, other=0.0)
        result = tl.load(tokens + place, mask=inside, other=0.0).to(tl.float32) + result * factor.to(tl.float32)
    if PARTS > 1:
        out += tl.program_id(2).to(tl.int64) * rows * outputs
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def _launch(x, modulation, eps, weight, bias, length, activated, tokens, gate, out, use) -> None:
    rows, inputs = x.shape
    outputs = len(weight)
    one = tile(rows, outputs, inputs) if use is None else use
    scale, shift = (None, None) if modulation is None else modulation
    linear_modulated_kernel[triton.cdiv(outputs, one.outputs), triton.cdiv(rows, one.rows), one.parts](
        x, scale, shift, weight, bias, tokens, gate, out, rows, length, outputs,
        *(0 if one is None else one.stride(0) for one in (scale, shift, gate)), eps,
        INPUTS=inputs, ACTIVATED=activated, WAYS=one.ways, BLOCK_M=one.rows, BLOCK_N=one.outputs, BLOCK_K=one.inputs,
        CHANNELS=NORM_CHANNELS, PARTS=one.parts, LANES=32 * one.warps, num_warps=one.warps, num_stages=one.stages,
        **dependent(x),
    )  # fmt: skip


def modulated_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activated: bool,
    out: torch.Tensor,
    use: Tile | None = None,
    inside: bool | None = None,
) -> None:
    """Fills out, the product of normalized tokens.

    Args:
        x: (B, L, K), contiguous, aligned to 16 bytes, as are weight and out.
        scale, shift: (B, K), last dimension contiguous.
        eps: of the norm.
        weight: (N, K) contiguous, of half precision, K a multiple of `PACK`.
        bias: (N,) contiguous, or None.
        activated: whether GELU (tanh) follows.
        out: (B, L, N) contiguous.
        use: in place of `tile`'s.
        inside: in place of what `norm_inside` says.
    """
    batch, length, inputs = x.shape
    rows = batch * length
    modulation: tuple[torch.Tensor, torch.Tensor] | None = (scale, shift)
    if not (norm_inside(rows) if inside is None else inside):
        normed = x.new_empty(x.shape, dtype=weight.dtype)
        modulated_norm(x, None, None, scale, shift, eps, normed, None)
        x, modulation = normed, None
    _launch(x.view(rows, inputs), modulation, eps, weight, bias, length, activated, None, None, out, use)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    gate: torch.Tensor,
    out: torch.Tensor,
    use: Tile | None = None,
) -> None:
    """Fills out with tokens + gate (x W^T + bias).

    Args:
        x: (B, L, K) contiguous, aligned to 16 bytes, as are weight, tokens and out; of half precision.
        weight: (N, K) contiguous, dtype of x, K a multiple of `PACK`.
        bias: (N,) contiguous, or None.
        tokens, out: (B, L, N) contiguous.
        gate: (B, N), last dimension contiguous.
        use: in place of `tile`'s.
    """
    batch, length, inputs = x.shape
    _launch(x.view(batch * length, inputs), None, 0.0, weight, bias, length, False, tokens, gate, out, use)


def _cases() -> list[tuple]:
    """Both dtypes, VAR's widths, few rows and many, each of the forms: norm and GELU, norm outside, gate."""
    cases: list[tuple] = []
    kernel = linear_modulated_kernel
    for feature, width in (("fp16", 1024), ("bf16", 1920)):
        for form, rows, outputs, inputs in (
            ("norm", 2, 3 * width, width),
            ("norm", 16, 4 * width, width),
            ("plain", 32, 3 * width, width),
            ("plain", 72, 4 * width, width),
            ("gate", 2, width, width),
            ("gate", 32, width, 4 * width),
            ("gate", 128, width, 4 * width),
            ("gate", 512, width, 4 * width),
        ):
            one = tile(rows, outputs, inputs)
            constants = {
                "INPUTS": inputs,
                "ACTIVATED": outputs == 4 * width,
                "WAYS": one.ways,
                "BLOCK_M": one.rows,
                "BLOCK_N": one.outputs,
                "BLOCK_K": one.inputs,
                "CHANNELS": NORM_CHANNELS,
                "PARTS": one.parts,
                "LANES": 32 * one.warps,
                **({} if form == "norm" else dict.fromkeys(("scale", "shift"))),
                **({} if form == "gate" else dict.fromkeys(("tokens", "gate"))),
            }
            types = dict.fromkeys(("x", "scale", "shift", "weight", "bias", "gate", "out"), f"*{feature}")
            types |= {"x": "*fp32" if form == "norm" else types["x"], "tokens": "*fp32", "eps": "fp32"}
            types |= {"out": "*fp32"} if form == "gate" else {}
            options = {"num_warps": one.warps, "num_stages": one.stages}
            for arch in (80, 90):
                wanted = constants | {"PDL": arch == 90}
                names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in wanted}
                signature = {**names, **dict.fromkeys(wanted, "constexpr")}
                divisors = {name: 16 for name in names if name not in ("rows", "length", "eps")}
                launch = options | ({"launch_pdl": True} if arch == 90 else {})
                cases.append((kernel, signature, wanted, launch, divisors, (arch,)))
    return cases


COMPILE_CASES = _cases()
