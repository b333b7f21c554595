"""Bitwise quantization: every channel becomes a sign, so that d channels name one of 2^d codes and no codebook exists.

    bit_c = x_c > 0 (zero and NaN are bit 0);  code_c = m if bit_c else -m
    BSQ (spherical): u = x / |x|, m = 1 / sqrt(d);    LFQ: u = x, m = 1

The residual pyramid quantizes a map scale by scale, coarse to fine, and adds up what the scales say:

    r_s = area(x - f, scale s);  bits_s = r_s > 0;  f += trilinear(code(bits_s), size of x);  input_{s+1} = trilinear(f)

Bits are labels, one uint8 of 0 or 1 a channel, or packed, one int64 a token with channel 0 as its most significant bit
(bit d - 1), which is the integer that the reference implementations call the index. Tokens of a pyramid stand one scale
after another, row by row within a scale: (B, L, d), L the sum of t h w. Everything is float32 (float64 for float64).

BSQ: Zhao et al., arXiv:2406.07548; LFQ: Yu et al., arXiv:2310.05737; the pyramid, and the flipped bits that training
sees (bitwise self-correction): Han et al., Infinity, arXiv:2412.04431.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.codes import _accumulator
from unifiedar.ops.codes_bits import (
    LABELS,
    BitwiseLosses,
    _bitwise_lookup,
    _bitwise_pack,
    _bitwise_quantize,
    _bitwise_unpack,
    _check_bits,
    _check_dim,
    _losses,
    _magnitude,
    _signed,
    _unfit_rows,
)

__all__ = ["BitwiseCodes", "bitwise_inputs", "bitwise_lookup", "bitwise_quantize", "next_bitwise_input"]


class BitwiseCodes(NamedTuple):
    """Result of `bitwise_quantize`; what was not asked for is None.

    Fields:
        bits: (..., d) uint8 of 0 and 1, or (...) int64 if packed; with scales (B, L, d) or (B, L), never flipped.
        quantized: (..., d), the codes, in the dtype of features; with scales the sum of all scales, in their shape,
            float32 (float64 for float64).
        inputs: (B, L - n_0, d), n_0 the tokens of the first scale: what each later scale reads; quantized's dtype.
        residuals: (B, L, d), what the bits are the signs of, likewise.
        losses: `BitwiseLosses`.
    """

    bits: Tensor
    quantized: Tensor
    inputs: Tensor | None = None
    residuals: Tensor | None = None
    losses: BitwiseLosses | None = None


# ---- definitions -----------------------------------------------------------------------------------------------------

Triple = tuple[int, int, int]


def _triples(schedule: Sequence[int]) -> list[Triple]:
    return list(zip(schedule[::3], schedule[1::3], schedule[2::3], strict=True))


def _count(scales: Sequence[Triple]) -> int:
    return sum(t * h * w for t, h, w in scales)


def _as_map(tokens: Tensor, scale: Triple) -> Tensor:
    """(B, n, d) -> (B, d, t, h, w), channels last in memory whoever calls: torch resizes other layouts another way."""
    return tokens.contiguous().mT.unflatten(2, scale)


def _as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


def _resize(maps: Tensor, size: Triple, mode: str) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode=mode)


def _pyramid_eager(
    features: Tensor, flips: Tensor | None, schedule: Sequence[int], spherical: bool, inputs: str, residuals: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _pyramid_fake(features, flips, schedule, spherical, inputs, residuals)
    total, bits, following, left = out
    scales, dtype = _triples(schedule), total.dtype
    if not bits.numel():
        return out
    magnitude = _magnitude(features.shape[1], spherical, dtype)
    total.zero_()
    x, end = features.to(dtype), 0
    with torch.autocast(x.device.type, enabled=False):
        for s, scale in enumerate(scales):
            begin, end = end, end + _count([scale])
            rest = _as_tokens(_resize(x - total, scale, "area"))
            label = rest > 0
            bits[:, begin:end] = label
            if residuals:
                left[:, begin:end] = rest
            if flips is not None:
                label = label ^ flips[:, begin:end]
            total += _resize(_as_map(_signed(label, magnitude, dtype), scale), scales[-1], "trilinear")
            if inputs and s + 1 < len(scales):
                first = _count(scales[:1])
                follow = _as_tokens(_resize(total, scales[s + 1], inputs))
                following[:, end - first : end - first + follow.shape[1]] = follow
    return out


def _sum_eager(
    tokens: Tensor, start: Tensor | None, schedule: Sequence[int], begin: int, end: int, spherical: bool, inputs: bool
) -> tuple[Tensor, Tensor]:
    out = _sum_fake(tokens, start, schedule, begin, end, spherical, inputs)
    total, following = out
    scales = _triples(schedule)
    total.zero_()
    if start is not None:
        total += start
    if not total.numel():
        return out
    with torch.autocast(total.device.type, enabled=False):
        at = filled = 0
        for s in range(begin, end):
            part = tokens[:, at : at + _count([scales[s]])]
            at += part.shape[1]
            if part.dtype == torch.uint8:
                part = _signed(part, _magnitude(part.shape[2], spherical, total.dtype), total.dtype)
            total += _resize(_as_map(part.to(total.dtype), scales[s]), scales[-1], "trilinear")
            if inputs and s + 1 < len(scales):
                follow = _as_tokens(_resize(total, scales[s + 1], "trilinear"))
                following[:, filled : filled + follow.shape[1]] = follow
                filled += follow.shape[1]
    return out


def _pyramid_backward_eager(grad: Tensor, schedule: Sequence[int]) -> Tensor:
    """The residuals are linear in the features: what is subtracted is a constant, as in the reference."""
    out, end = _pyramid_backward_fake(grad, schedule).zero_(), 0
    for scale in _triples(schedule):
        begin, end = end, end + _count([scale])
        part = _as_map(grad[:, begin:end], scale)
        if scale != tuple(out.shape[2:]) and out.numel():
            part = torch.ops.aten._adaptive_avg_pool3d_backward(part, out)
        out += part
    return out


def _sum_backward_eager(
    grad: Tensor, grad_inputs: Tensor, schedule: Sequence[int], begin: int, end: int, inputs: bool, tokens: bool
) -> tuple[Tensor, Tensor]:
    """The transpose of the sum, scale by scale from the last: a scale's codes reach all later sums and inputs."""
    out, total = _sum_backward_fake(grad, grad_inputs, schedule, begin, end, inputs, tokens)
    scales = _triples(schedule)
    at, row = out.shape[1], grad_inputs.shape[1]
    total.copy_(grad)
    for s in reversed(range(begin, end)):
        if inputs and s + 1 < len(scales):
            rows = _count([scales[s + 1]])
            total += _resize_backward(_as_map(grad_inputs[:, row - rows : row], scales[s + 1]), scales[-1])
            row -= rows
        if tokens:
            rows = _count([scales[s]])
            out[:, at - rows : at] = _as_tokens(_resize_backward(total, scales[s]))
            at -= rows
    return out, total


def _resize_backward(grad: Tensor, size: Triple) -> Tensor:
    """The gradient of a trilinear resize of maps of `size`, given that of its result."""
    if tuple(grad.shape[2:]) == size or not grad.numel():
        return grad.reshape(*grad.shape[:2], *size)
    shape = [*grad.shape[:2], *size]
    return torch.ops.aten.upsample_trilinear3d_backward(grad, list(grad.shape[2:]), shape, False)


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _pyramid_fake(features, flips, schedule, spherical, inputs, residuals):
    scales, (batch, dim) = _triples(schedule), features.shape[:2]
    length, dtype = _count(scales), _accumulator(features.dtype)
    return (
        features.new_empty((batch, dim, *scales[-1]), dtype=dtype),
        features.new_empty((batch, length, dim), dtype=torch.uint8),
        features.new_empty((batch, length - _count(scales[:1]) if inputs else 0, dim), dtype=dtype),
        features.new_empty((batch, length if residuals else 0, dim), dtype=dtype),
    )


def _sum_fake(tokens, start, schedule, begin, end, spherical, inputs):
    scales, (batch, _, dim) = _triples(schedule), tokens.shape
    dtype = tokens.dtype if tokens.is_floating_point() else torch.float32
    if start is not None:
        dtype = start.dtype
    rows = _count(scales[begin + 1 : end + 1]) if inputs else 0
    return (
        tokens.new_empty((batch, dim, *scales[-1]), dtype=dtype),
        tokens.new_empty((batch, rows, dim), dtype=dtype),
    )


def _pyramid_backward_fake(grad, schedule):
    return grad.new_empty((grad.shape[0], grad.shape[2], *_triples(schedule)[-1]))


def _sum_backward_fake(grad, grad_inputs, schedule, begin, end, inputs, tokens):
    rows = _count(_triples(schedule)[begin:end]) if tokens else 0
    return grad.new_empty((grad.shape[0], rows, grad.shape[1])), grad.new_empty(grad.shape)


def _pyramid_setup(ctx, inputs, output):
    features, _, ctx.schedule, _, _, _ = inputs
    ctx.dtype = features.dtype
    ctx.mark_non_differentiable(*output[:3])
    ctx.set_materialize_grads(False)


def _pyramid_gradient(ctx, grad_quantized, grad_bits, grad_inputs, grad):
    if grad is None or not grad.shape[1]:
        return (None,) * 6
    return _bitwise_pyramid_backward(grad, ctx.schedule, "auto").to(ctx.dtype), None, None, None, None, None


def _sum_setup(ctx, inputs, output):
    tokens, start, ctx.schedule, ctx.begin, ctx.end, _, ctx.inputs = inputs
    ctx.differentiable, ctx.dtype = tokens.is_floating_point(), tokens.dtype
    ctx.start = start is not None
    ctx.set_materialize_grads(True)


def _sum_gradient(ctx, grad_total, grad_inputs):
    tokens, start = _bitwise_sum_backward(
        grad_total, grad_inputs, ctx.schedule, ctx.begin, ctx.end, ctx.inputs, ctx.differentiable, "auto"
    )
    tokens = tokens.to(ctx.dtype) if ctx.differentiable else None
    return tokens, start if ctx.start else None, None, None, None, None, None


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit_planes(schedule: Sequence[int]) -> str | None:
    frames = max(schedule[::3])
    if frames > 1:
        return f"needs scales of one frame, got {frames}"
    pixels = max(h * w for _, h, w in _triples(schedule))
    return f"needs fewer than 2^30 pixels, got {pixels}" if pixels >= 2**30 else None


def _pyramid_unfit_triton(features, flips, schedule, spherical, inputs, residuals) -> str | None:
    return _unfit_rows(features, features.dtype) or _unfit_planes(schedule)


def _sum_unfit_triton(tokens, start, schedule, begin, end, spherical, inputs) -> str | None:
    dtype = tokens.dtype if tokens.is_floating_point() else torch.float32
    wide = dtype if start is None else torch.promote_types(dtype, start.dtype)
    return _unfit_rows(tokens, wide) or _unfit_planes(schedule)


def _sizes_on(device: torch.device, scales: Sequence[Triple]) -> Tensor:
    """Heights and widths (S, 2) of scales of one frame."""
    return _native.integers_on(device, tuple(size for _, h, w in scales for size in (h, w))).view(-1, 2)


def _workspace(total: Tensor, scales: Sequence[Triple]) -> Tensor:
    """Room for a plane's pooled rows and its codes, at any scale: a scale may be larger than the map."""
    width = total.shape[-1]
    room = max(h * max(w, width) for _, h, w in scales)
    return torch.empty((2, total.shape[0] * total.shape[1], room), dtype=torch.float32, device=total.device)


def _run_pyramid_triton(features, flips, schedule, spherical, inputs, residuals):
    out = total, bits, following, left = _pyramid_fake(features, flips, schedule, spherical, inputs, residuals)
    if not bits.numel():
        return out
    scales = _triples(schedule)
    with torch.cuda.device_of(features):
        _native.kernels("codes_bitwise").bitwise_pyramid(
            features.squeeze(2).contiguous(), None, None, None if flips is None else flips.contiguous(),
            _sizes_on(features.device, scales), len(scales), _magnitude(features.shape[1], spherical, torch.float32),
            inputs, _workspace(total, scales), bits, total.squeeze(2), following, left if residuals else None,
        )  # fmt: skip
    return out


def _run_sum_triton(tokens, start, schedule, begin, end, spherical, inputs):
    out = total, following = _sum_fake(tokens, start, schedule, begin, end, spherical, inputs)
    if not total.numel():
        return out
    # The kernels take the size of the sum from their output, and only the scales that they are to add.
    scales = _triples(schedule)[begin : end + 1 if inputs else end]
    tokens, start = tokens.contiguous(), None if start is None else start.squeeze(2).contiguous()
    magnitude = _magnitude(tokens.shape[2], spherical, torch.float32)
    with torch.cuda.device_of(tokens):
        sizes, kernels = _sizes_on(tokens.device, scales), _native.kernels("codes_bitwise")
        if inputs:
            kernels.bitwise_pyramid(
                None, tokens, start, None, sizes, end - begin, magnitude, "trilinear", _workspace(total, scales),
                None, total.squeeze(2), following, None,
            )  # fmt: skip
        else:
            kernels.bitwise_sum(tokens, start, sizes, magnitude, total.squeeze(2))
    return out


# ---- operators -------------------------------------------------------------------------------------------------------

_bitwise_pyramid = Op(
    "bitwise_pyramid(Tensor features, Tensor? flips, SymInt[] schedule, bool spherical, str inputs, bool residuals) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    eager=_pyramid_eager,
    fake=_pyramid_fake,
    backends=(Backend("triton", _run_pyramid_triton, _pyramid_unfit_triton),),
    setup_context=_pyramid_setup,
    backward=_pyramid_gradient,
)
_bitwise_sum = Op(
    "bitwise_sum(Tensor tokens, Tensor? start, SymInt[] schedule, SymInt begin, SymInt end, bool spherical, "
    "bool inputs) -> (Tensor, Tensor)",
    eager=_sum_eager,
    fake=_sum_fake,
    backends=(Backend("triton", _run_sum_triton, _sum_unfit_triton),),
    setup_context=_sum_setup,
    backward=_sum_gradient,
)
_bitwise_pyramid_backward = Op(
    "bitwise_pyramid_backward(Tensor grad, SymInt[] schedule) -> Tensor",
    eager=_pyramid_backward_eager,
    fake=_pyramid_backward_fake,
)
_bitwise_sum_backward = Op(
    "bitwise_sum_backward(Tensor grad, Tensor grad_inputs, SymInt[] schedule, SymInt begin, SymInt end, bool inputs, "
    "bool tokens) -> (Tensor, Tensor)",
    eager=_sum_backward_eager,
    fake=_sum_backward_fake,
)

# ---- public functions ------------------------------------------------------------------------------------------------

Scales = Sequence[Sequence[int]]
"""(h, w) or (t, h, w) of every scale, coarse to fine; the last one is the size of the features."""


def bitwise_quantize(
    features: Tensor,
    scales: Scales | None = None,
    *,
    spherical: bool = True,
    packed: bool = False,
    inv_temperature: float | None = None,
    flips: Tensor | None = None,
    inputs: str | None = None,
    residuals: bool = False,
    backend: str = "auto",
) -> BitwiseCodes:
    """Signs of the channels as bits, and the codes that they stand for; with scales, those of a residual pyramid.

    Without scales each vector of d channels becomes d bits and the code m (2 bit - 1), m = 1 / sqrt(d) or 1. With
    scales what is left of the map is pooled to each scale in turn (area), its signs are that scale's bits, and their
    codes, resized to the map (trilinear), are subtracted from it.

    Args:
        features: (..., d), d from 1 to 64; with scales (B, d, H, W) or (B, d, T, H, W). float32, bfloat16, float16 or
            float64, any strides (kernels copy what is not contiguous).
        scales: None, or (h, w) or (t, h, w) of each scale, coarse to fine, the last one the size of features.
        spherical: whether codes lie on the unit sphere (BSQ, Infinity), or have channels of -1 and 1 (LFQ).
        packed: whether bits come as one int64 a token, channel 0 in bit d - 1, instead of d labels.
        inv_temperature: without scales: asks for the losses, at this inverse temperature (100 in LFQ and Infinity, 1 in
            BSQ), positive.
        flips: with scales: (B, L, d) bool, bits to be flipped before their codes are added up, as Infinity's training
            does (bitwise self-correction): later bits and inputs then answer to the errors. The bits returned are not
            flipped: they are the labels.
        inputs: with scales: asks for the inputs of the later scales, the running sum resized to each by "trilinear"
            (as Infinity trains and generates) or by "area" (as its quantizer returns them).
        residuals: with scales: asks for what the bits are the signs of.
        backend: "auto", "triton" or "eager".

    Returns:
        `BitwiseCodes`.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, more than 64 channels, scales that do not end at the size of features,
            an option of the other form, an unknown backend or one that does not fit.

    Note:
        Zero and NaN are bit 0. A bit is the sign of the channel itself: normalizing first, as the reference does, can
        only turn a channel into zero that underflows there. m is what normalizing a vector of 1 / sqrt(d) gives, as
        in the reference's path from labels to codes; its encoder's is off by the rounding of x + (code - x).

        Without scales, quantized has the straight-through gradient of u (u = x / |x|, or x), and the losses have
        theirs, in one pass backward. The sample entropy is exact, a sum of d binary entropies: no probability is
        clamped, no table of 2^d codes exists. Losses of no tokens are 0.

        With scales everything is float32 (float64 for float64), never under autocast. Only residuals carry a gradient:
        they are linear in the features, what is subtracted being a constant. Residuals within rounding of zero may
        take another bit on another backend, and what follows answers to it.

        Differentiable once. No host sync; may be captured in a CUDA graph.
    """
    function = "bitwise_quantize"
    _checks.check_tensor(function, "features", features)
    if scales is None:
        _check_dim(function, features, -1)
        for argument, value in (("flips", flips), ("inputs", inputs), ("residuals", residuals or None)):
            if value is not None:
                raise ValueError(f"{function}: {argument} must be left out without scales, got {_short(value)}")
        if inv_temperature is not None:
            _checks.check_number(function, "inv_temperature", inv_temperature)
            if inv_temperature <= 0:
                raise ValueError(f"{function}: inv_temperature must be positive, got {inv_temperature}")
            inv_temperature = float(inv_temperature)
        quantized, bits, sums = _bitwise_quantize(features, bool(spherical), bool(packed), inv_temperature, backend)
        losses = None if inv_temperature is None else _losses(sums)
        return BitwiseCodes(bits, quantized, losses=losses)

    if inv_temperature is not None:
        raise ValueError(
            f"{function}: inv_temperature must be left out with scales, got {inv_temperature} (ask for residuals and "
            "quantize those)"
        )
    if features.ndim not in (4, 5):
        raise ValueError(f"{function}: features must be (B, d, H, W) or (B, d, T, H, W), got {tuple(features.shape)}")
    _check_dim(function, features, 1)
    schedule = _check_scales(function, scales)
    maps = features if features.ndim == 5 else features.unsqueeze(2)
    if tuple(schedule[-3:]) != tuple(maps.shape[2:]):
        raise ValueError(
            f"{function}: scales must end at the size of features, {tuple(maps.shape[2:])}, got {tuple(schedule[-3:])}"
        )
    if inputs not in (None, "trilinear", "area"):
        raise ValueError(f"{function}: inputs must be None, 'trilinear' or 'area', got {inputs!r}")
    batch, dim = features.shape[:2]
    if flips is not None:
        _checks.check_tensor(function, "flips", flips, (torch.bool,))
        shape = (batch, _count(_triples(schedule)), dim)
        if tuple(flips.shape) != shape:
            raise ValueError(f"{function}: flips must be {shape}, (B, L, d), got {tuple(flips.shape)}")
        _checks.check_same_device(function, "flips", flips, "features", features)
    quantized, bits, following, rest = _bitwise_pyramid(
        maps, flips, schedule, bool(spherical), inputs or "", bool(residuals), backend
    )
    return BitwiseCodes(
        _bitwise_pack(bits, backend) if packed else bits,
        quantized if features.ndim == 5 else quantized.squeeze(2),
        following if inputs else None,
        rest if residuals else None,
    )


def bitwise_lookup(
    bits: Tensor,
    scales: Scales | None = None,
    *,
    dim: int | None = None,
    spherical: bool = True,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The codes that bits stand for, or with scales the sum of a pyramid's codes, each resized to the last scale.

    Args:
        bits: labels (..., d) of 0 and 1, uint8, bool, int32 or int64 (anything but 0 counts as 1); or packed (...)
            int64, if `dim` is given. With scales (B, L, d) or (B, L), and labels may be codes themselves then: floating
            point (B, L, d), added up as they are, with a gradient.
        scales: None, or (h, w) or (t, h, w) of each scale, coarse to fine.
        dim: None for labels, else the number d of bits that are packed in a word.
        spherical: whether codes are m = 1 / sqrt(d) in size (BSQ, Infinity) or 1 (LFQ).
        dtype: of the codes, a floating-point type; sums of a pyramid are float32 (float64 if codes are).
        backend: "auto", "triton" or "eager".

    Returns:
        (..., d) in `dtype`; with scales (B, d, H, W), or (B, d, T, H, W) for scales (t, h, w).

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, more than 64 bits, an unknown backend or one that does not fit.

    Note:
        No host sync; may be captured in a CUDA graph.
    """
    function = "bitwise_lookup"
    if dtype not in _checks.FLOATS:
        raise TypeError(f"{function}: dtype must be a floating-point type, got {dtype}")
    if scales is None:
        dim = _check_bits(function, bits, dim, LABELS)
        return _bitwise_lookup(bits, dim, bool(spherical), dtype, backend)
    if dtype != torch.float32:
        raise ValueError(f"{function}: dtype must be left out with scales, got {dtype}")
    schedule = _check_scales(function, scales)
    tokens = _pyramid_tokens(function, bits, dim, schedule, backend)
    total, _ = _bitwise_sum(tokens, None, schedule, 0, len(scales), bool(spherical), False, backend)
    return total if len(scales[0]) == 3 else total.squeeze(2)


def bitwise_inputs(
    bits: Tensor, scales: Scales, *, dim: int | None = None, spherical: bool = True, backend: str = "auto"
) -> Tensor:
    """What each scale after the first reads: the sum of the scales before it, resized to it (trilinear).

    Args:
        bits: labels (B, L, d), packed (B, L) int64, or codes (B, L, d), as in `bitwise_lookup`.
        scales: (h, w) or (t, h, w) of each scale, coarse to fine.
        dim: None for labels and codes, else the number d of bits that are packed in a word.
        spherical: whether codes are m = 1 / sqrt(d) in size (BSQ, Infinity) or 1 (LFQ).
        backend: "auto", "triton" or "eager".

    Returns:
        (B, L - n_0, d) float32 (float64 if codes are), n_0 the tokens of the first scale.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an unknown backend or one that does not fit.

    Note:
        The sums are those of the whole map, at the size of the last scale, as in generation. No host sync; may be
        captured in a CUDA graph.
    """
    function = "bitwise_inputs"
    schedule = _check_scales(function, scales)
    tokens = _pyramid_tokens(function, bits, dim, schedule, backend)
    return _bitwise_sum(tokens, None, schedule, 0, len(scales), bool(spherical), True, backend)[1]


def next_bitwise_input(
    features_hat: Tensor | None,
    bits: Tensor,
    scales: Scales,
    step: int,
    *,
    dim: int | None = None,
    spherical: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """One step of generation: the running sum with a scale's codes added, and what the next scale reads.

    Args:
        features_hat: (B, d, H, W) or (B, d, T, H, W), the sum of the scales before, float32 or float64; None is zero.
        bits: of this scale alone: labels (B, n, d), packed (B, n) int64, or codes (B, n, d), as in `bitwise_lookup`.
        scales: (h, w) or (t, h, w) of each scale, coarse to fine, all of them.
        step: which scale this is, from 0.
        dim: None for labels and codes, else the number d of bits that are packed in a word.
        spherical: whether codes are m = 1 / sqrt(d) in size (BSQ, Infinity) or 1 (LFQ).
        backend: "auto", "triton" or "eager".

    Returns:
        The sum, a new tensor like features_hat, and the next scale's input (B, n', d); None after the last scale.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, a step that is none of the scales, an unknown backend or one that does
            not fit.

    Note:
        No host sync; may be captured in a CUDA graph.
    """
    function = "next_bitwise_input"
    schedule = _check_scales(function, scales)
    _checks.check_integer(function, "step", step, 0)
    if step >= len(scales):
        raise ValueError(f"{function}: step must be below the number of scales, {len(scales)}, got {step}")
    tokens = _pyramid_tokens(function, bits, dim, schedule[3 * step : 3 * step + 3], backend)
    start, frames = None, len(scales[0]) == 3
    if features_hat is not None:
        _checks.check_tensor(function, "features_hat", features_hat, (torch.float32, torch.float64))
        shape = (tokens.shape[0], tokens.shape[2], *(schedule[-3:] if frames else schedule[-2:]))
        if tuple(features_hat.shape) != shape:
            raise ValueError(f"{function}: features_hat must be {shape}, got {tuple(features_hat.shape)}")
        _checks.check_same_device(function, "features_hat", features_hat, "bits", tokens)
        start = features_hat if frames else features_hat.unsqueeze(2)
    last = step + 1 == len(scales)
    total, following = _bitwise_sum(tokens, start, schedule, step, step + 1, bool(spherical), not last, backend)
    return total if frames else total.squeeze(2), None if last else following


def _short(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def _check_scales(function: str, scales: Scales) -> list[int]:
    """Returns t, h, w of every scale, one after another."""
    if isinstance(scales, (str, bytes)) or not isinstance(scales, Sequence) or not len(scales):
        raise ValueError(f"{function}: scales must be a sequence of at least one (h, w) or (t, h, w), got {scales!r}")
    schedule: list[int] = []
    for i, scale in enumerate(scales):
        if not isinstance(scale, Sequence) or len(scale) not in (2, 3) or len(scale) != len(scales[0]):
            raise ValueError(f"{function}: scales must all be (h, w) or all (t, h, w), got {scale!r} at {i}")
        for value in scale:
            _checks.check_integer(function, f"scales[{i}]", value, 1)
        schedule += scale if len(scale) == 3 else [1, *scale]
    return schedule


def _pyramid_tokens(function: str, bits: Tensor, dim: int | None, schedule: Sequence[int], backend: str) -> Tensor:
    """Labels (B, L, d) uint8 of whatever form bits came in, or the codes themselves."""
    dim = _check_bits(function, bits, dim, LABELS + _checks.FLOATS)
    length = _count(_triples(schedule))
    if bits.ndim != (2 if dim else 3) or bits.shape[1] != length:
        shape = f"(B, {length})" if dim else f"(B, {length}, d)"
        raise ValueError(f"{function}: bits must be {shape} to match scales, got {tuple(bits.shape)}")
    if dim:
        return _bitwise_unpack(bits, dim, backend)
    if bits.is_floating_point():
        return bits if bits.dtype == torch.float64 else bits.float()
    return bits if bits.dtype == torch.uint8 else (bits != 0).to(torch.uint8)
