"""VAR's residual pyramid: a feature map as a sum of upsampled maps of codebook rows, coarse scales first.

    rest_0 = features (B, C, H, W);  for every scale s of (h_s, w_s), the last of which is (H, W):
        code_s[i, j] = argmin_k |area(rest_s)[i, j] - codebook[k]|^2        (the lowest k on ties)
        part_s       = phi_s(bicubic(codebook[code_s]))                     bicubic: (h_s, w_s) -> (H, W)
        rest_{s+1}   = rest_s - part_s
    phi_s(u) = (1 - ratio) u + ratio conv3x3_s(u);   features_hat_s = part_0 + ... + part_s

`area` is the mean over windows that tile the map and overlap where h_s does not divide H (torch's adaptive average
pooling); `bicubic` has a = -0.75 and half-pixel centres, samples beyond the border being those at it. What a
transformer reads before it predicts scale s + 1 is area(features_hat_s) at that scale's size.

Scales are given as integers (square maps) or pairs (h, w). Maps of codes lie flat, row by row. Everything is computed
in float32 (float64 for float64 arguments), matrix products and convolutions included, whatever autocast and TF32
settings say.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", arXiv:2404.02905,
algorithms 1 and 2; details as in the published code of VAR's `VectorQuantizer2`.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.codes import _accumulator, _exact_matmul, _nearest, _require_codes, _residual_lookup_backward

__all__ = ["Phi", "multiscale_inputs", "multiscale_lookup", "multiscale_quantize", "next_scale_input"]

Scale = int | tuple[int, int]
Sizes = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]


class Phi(NamedTuple):
    """The convolutions that follow upsampling: phi_p(u) = (1 - ratio) u + ratio (conv(u, weight[p]) + bias[p]).

    Which of the P serves a scale follows VAR's rule, for shared and unshared ones alike. Scale s of S lies at
    s / (S - 1), convolution p at the p-th of P evenly spaced ticks from 1 / 2P to 1 - 1 / 2P (1 / 3P to 1 - 1 / 3P for
    P = 4); the nearest tick wins, the lower one on ties. VAR's four convolutions serve its ten scales as 0, 0, 1, 1, 1,
    2, 2, 3, 3, 3, where two scales are midway but for rounding. A single scale, for which the published code divides by
    zero, gets convolution 0.

    Fields:
        weight: (P, C, C, 3, 3), floating.
        bias: (P, C).
        ratio: share of the convolution, VAR's `abs(quant_resi)`.
    """

    weight: Tensor
    bias: Tensor
    ratio: float = 0.5

    def indices(self, scales: int) -> tuple[int, ...]:
        """For each of `scales` scales which of the P convolutions serves it, ascending."""
        return self.indices_of(self.weight.shape[0], scales)

    @staticmethod
    def indices_of(count: int, scales: int) -> tuple[int, ...]:
        """The same for `count` convolutions.

        Raises:
            TypeError: for an argument that is not an integer.
            ValueError: for one below 1.
        """
        _checks.check_integer("Phi.indices_of", "count", count, 1)
        _checks.check_integer("Phi.indices_of", "scales", scales, 1)
        return _phi_indices(count, scales)


@functools.lru_cache(maxsize=256)
def _phi_indices(count: int, scales: int) -> tuple[int, ...]:
    # In float64 and in this order of operations: some scales lie midway between two ticks but for rounding.
    begin = 1 / 3 / count if count == 4 else 1 / 2 / count
    end = 1 - begin
    step = (end - begin) / (count - 1) if count > 1 else 0.0
    ticks = [i * step + begin for i in range(count - 1)] + [end if count > 1 else begin]
    found = []
    for s in range(scales):
        at = s / (scales - 1) if scales > 1 else 0.0
        gaps = [abs(tick - at) for tick in ticks]
        found.append(gaps.index(min(gaps)))
    return tuple(found)


# ---- definitions -----------------------------------------------------------------------------------------------------


def _pairs(scales: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return _paired(tuple(scales))


@functools.lru_cache(maxsize=256)
def _paired(scales: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(scales[::2], scales[1::2], strict=True))


def _area(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, h w, C)."""
    pooled = maps if maps.shape[2:] == size else F.interpolate(maps, size=size, mode="area")
    return pooled.flatten(2).transpose(1, 2)


def _upsampled(rows: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(B, h w, C) -> (B, C, H, W)."""
    maps = rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], *size)
    return maps if size == to else F.interpolate(maps, size=to, mode="bicubic")


def _blended(maps: Tensor, weight: Tensor, bias: Tensor, ratio: float, p: int) -> Tensor:
    if not weight.shape[0]:
        return maps
    convolved = F.conv2d(maps, weight[p].to(maps.dtype), bias[p].to(maps.dtype), padding=1)
    return (1 - ratio) * maps + ratio * convolved


def _rows(codes: Tensor, table: Tensor, function: str) -> Tensor:
    """(B, n) -> (B, n, C); zero for a code outside [0, K)."""
    if not _require_codes(function, codes, table.shape[0]):
        return table[codes]
    unknown = (codes < 0) | (codes >= table.shape[0])
    return table[codes.masked_fill(unknown, 0)].masked_fill(unknown.unsqueeze(-1), 0)


def _quantize_eager(
    features: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor, ratio: float, scales: Sequence[int], metric: str
) -> Tensor:
    dtype = _accumulator(torch.promote_types(features.dtype, codebook.dtype))
    rest, table = features.to(dtype, copy=True), codebook.to(dtype)
    sizes = _pairs(scales)
    indices = _phi_indices(weight.shape[0] or 1, len(sizes))
    codes = []
    with _exact_matmul(features.device.type):
        if metric == "cosine":
            searched = F.normalize(table, dim=1)
            norms = searched.new_zeros(table.shape[0])
        else:
            searched, norms = table, table.square().sum(dim=1)
        for p, size in zip(indices, sizes, strict=True):
            rows = _area(rest, size)
            nearest = torch.empty(rows.shape[:2].numel(), dtype=torch.int64, device=rows.device)
            _nearest(rows.reshape(-1, rows.shape[2]), searched, norms, nearest)
            codes.append(nearest.view(rows.shape[:2]))
            if len(codes) < len(sizes):
                rest -= _blended(_upsampled(table[codes[-1]], size, sizes[-1]), weight, bias, ratio, p)
    return torch.cat(codes, dim=1)


def _lookup_eager(
    codes: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor, ratio: float, scales: Sequence[int], what: str
) -> Tensor:
    out = _lookup_fake(codes, codebook, weight, bias, ratio, scales, what)
    dtype = _accumulator(codebook.dtype)
    sizes = _pairs(scales)
    indices = _phi_indices(weight.shape[0] or 1, len(sizes))
    total = torch.zeros((codes.shape[0], codebook.shape[1], *sizes[-1]), dtype=dtype, device=codes.device)
    rows = _rows(codes, codebook.to(dtype), "multiscale_lookup")
    begin = written = 0
    with _exact_matmul(codes.device.type):
        for s, size in enumerate(_held(codes, sizes)):
            end = begin + size[0] * size[1]
            total += _blended(_upsampled(rows[:, begin:end], size, sizes[-1]), weight, bias, ratio, indices[s])
            begin = end
            if what == "cumulative":
                out[s] = total
            elif what == "inputs":
                pooled = _area(total, sizes[s + 1])
                out[:, written : written + pooled.shape[1]] = pooled
                written += pooled.shape[1]
    return out.copy_(total) if what == "sum" else out


def _held(codes: Tensor, sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The first scales, those whose codes are there."""
    count = total = 0
    while total < codes.shape[1]:
        total += sizes[count][0] * sizes[count][1]
        count += 1
    return sizes[:count]


def _lookup_backward_eager(
    grad: Tensor,
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    ratio: float,
    scales: Sequence[int],
    what: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator(codebook.dtype)
    sizes = _pairs(scales)
    indices = _phi_indices(weight.shape[0] or 1, len(sizes))
    held = _held(codes, sizes)
    rows = _rows(codes, codebook.to(dtype), "multiscale_lookup_backward")
    out = torch.empty_like(rows)
    out_weight, out_bias = (torch.zeros_like(one, dtype=dtype) for one in (weight, bias))
    channels = codebook.shape[1]
    batch, (height, width) = codes.shape[0], sizes[-1]
    # The gradient of a scale's part is the sum of those of all running sums that hold it: from the last to the first.
    total = rows.new_zeros((batch, channels, height, width))
    if what == "sum":
        total += grad
    end = codes.shape[1]
    pooled_end = grad.shape[1]
    with _exact_matmul(codes.device.type):
        for s in reversed(range(len(held))):
            size = h, w = held[s]
            if what == "cumulative":
                total += grad[s]
            elif what == "inputs":
                pooled_h, pooled_w = sizes[s + 1]
                pooled_begin = pooled_end - pooled_h * pooled_w
                pooled = grad[:, pooled_begin:pooled_end].to(dtype).transpose(1, 2)
                pooled = pooled.reshape(batch, channels, pooled_h, pooled_w)
                down, across = (_matrix(n, m, "area", total) for n, m in ((height, pooled_h), (width, pooled_w)))
                total += down @ pooled @ across.T
                pooled_end = pooled_begin
            begin = end - h * w
            inner = total
            if weight.shape[0]:
                maps = _upsampled(rows[:, begin:end], size, sizes[-1])
                part, part_weight, part_bias = torch.ops.aten.convolution_backward(
                    ratio * total, maps, weight[indices[s]].to(dtype), [channels], [1, 1], [1, 1], [1, 1], False,
                    [0, 0], 1, [True, True, True],
                )  # fmt: skip
                inner = part + (1 - ratio) * total
                out_weight[indices[s]] += part_weight
                out_bias[indices[s]] += part_bias
            if size != sizes[-1]:
                down, across = (_matrix(n, m, "bicubic", total) for n, m in ((h, height), (w, width)))
                inner = down @ inner @ across.T
            out[:, begin:end] = inner.flatten(2).transpose(1, 2)
            end = begin
    return out, out_weight.to(weight.dtype), out_bias.to(bias.dtype)


def _matrix(size: int, to: int, mode: str, like: Tensor) -> Tensor:
    """The transpose (size, to) of the matrix by which a resampling works on one axis.

    In the gradient, products with it stand for the resamplings' own backwards, which add up with atomics on a GPU.
    """
    one = torch.eye(size, dtype=like.dtype, device=like.device).view(1, size, size, 1)
    return F.interpolate(one, size=(to, 1), mode=mode)[0, :, :, 0]


def _next_eager(
    features_hat: Tensor,
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor,
    ratio: float,
    scales: Sequence[int],
    step: int,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(features_hat.dtype)
    sizes = _pairs(scales)
    p = _phi_indices(weight.shape[0] or 1, len(sizes))[step]
    rows = codes.to(dtype) if codes.ndim == 3 else _rows(codes, codebook.to(dtype), "next_scale_input")
    with _exact_matmul(features_hat.device.type):
        part = _blended(_upsampled(rows, sizes[step], sizes[-1]), weight, bias, ratio, p)
    total = features_hat.to(dtype) + part
    _, following = _next_fake(features_hat, codes, codebook, weight, bias, ratio, scales, step)
    if step + 1 < len(sizes):
        following.copy_(_area(total, sizes[step + 1]))
    return total.to(features_hat.dtype).contiguous(), following


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _quantize_fake(features, codebook, weight, bias, ratio, scales, metric) -> Tensor:
    length = sum(h * w for h, w in _pairs(scales))
    return features.new_empty((features.shape[0], length), dtype=torch.int64)


def _lookup_fake(codes, codebook, weight, bias, ratio, scales, what) -> Tensor:
    sizes = _pairs(scales)
    batch, channels, held = codes.shape[0], codebook.shape[1], len(_held(codes, sizes))
    if what == "inputs":
        return codebook.new_empty((batch, sum(h * w for h, w in sizes[1 : held + 1]), channels))
    shape = (batch, channels, *sizes[-1])
    return codebook.new_empty((held, *shape) if what == "cumulative" else shape)


def _lookup_backward_fake(grad, codes, codebook, weight, bias, ratio, scales, what) -> tuple[Tensor, Tensor, Tensor]:
    rows = codebook.new_empty((*codes.shape, codebook.shape[1]), dtype=_accumulator(codebook.dtype))
    return rows, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _next_fake(features_hat, codes, codebook, weight, bias, ratio, scales, step) -> tuple[Tensor, Tensor]:
    sizes = _pairs(scales)
    length = sizes[step + 1][0] * sizes[step + 1][1] if step + 1 < len(sizes) else 0
    batch, channels = features_hat.shape[:2]
    return features_hat.new_empty(features_hat.shape), features_hat.new_empty((batch, length, channels))


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebook, weight, bias, ctx.ratio, ctx.scales, ctx.what = inputs
    ctx.save_for_backward(codes, codebook, weight, bias)


def _lookup_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    codes, codebook, weight, bias = ctx.saved_tensors
    rows, grad_weight, grad_bias = _multiscale_lookup_backward(
        grad, codes, codebook, weight, bias, ctx.ratio, ctx.scales, ctx.what, "eager"
    )
    table = _residual_lookup_backward(
        rows.reshape(-1, rows.shape[2]), codes.reshape(-1, 1), codebook.shape[0], True, False, ctx.backend
    )
    return None, table.to(codebook.dtype), grad_weight, grad_bias, None, None, None


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit_triton(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; the last two are the codebook and the convolutions' weight."""
    for tensor in tensors:
        reason = _native.triton_unfit(tensor)
        if reason is None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            reason = f"needs float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
        if reason is not None:
            return reason
    num_codes, channels = tensors[-2].shape
    if channels > 32:
        return f"needs at most 32 channels, got {channels}"
    if num_codes > 2**18:
        return f"needs at most 2^18 codes, got {num_codes}"
    return None


def _quantize_unfit_triton(features, codebook, weight, bias, ratio, scales, metric) -> str | None:
    if metric != "l2":
        return f"needs the metric 'l2', got {metric!r}"
    return _unfit_triton(features, bias, codebook, weight)


def _lookup_unfit_triton(codes, codebook, weight, bias, ratio, scales, what) -> str | None:
    return _unfit_triton(codes, bias, codebook, weight)


def _next_unfit_triton(features_hat, codes, codebook, weight, bias, ratio, scales, step) -> str | None:
    return _unfit_triton(features_hat, codes, bias, codebook, weight)


def _plan(weight: Tensor, scales: Sequence[int]) -> tuple[int, ...]:
    """Scales as the kernels take them: h, w and convolution of each."""
    return _planned(weight.shape[0] or 1, tuple(scales))


@functools.lru_cache(maxsize=256)
def _planned(count: int, scales: tuple[int, ...]) -> tuple[int, ...]:
    sizes = _pairs(scales)
    indices = _phi_indices(count, len(sizes))
    return tuple(value for (h, w), p in zip(sizes, indices, strict=True) for value in (h, w, p))


def _taps(weight: Tensor, copy: bool) -> Tensor:
    """(P, 9, C in, C out); copied so that neighbours in memory are output channels if many launches will read it."""
    taps = weight.flatten(3).permute(0, 3, 2, 1)
    return taps.contiguous() if copy else taps


def _near(maps: Tensor) -> Tensor:
    """Maps or vectors (B, ...) as they are, or copied if elements of one picture lie further apart than 32 bits say."""
    reach = sum(stride * (size - 1) for stride, size in zip(maps.stride()[1:], maps.shape[1:], strict=True))
    return maps if reach < 2**31 else maps.contiguous()


def _rows_together(table: Tensor) -> Tensor:
    """A matrix with neighbours in memory along its rows, none of which begins beyond what 32 bits say."""
    return table if table.stride(-1) == 1 and table.stride(0) * table.shape[0] < 2**31 else table.contiguous()


def _run_quantize_triton(features, codebook, weight, bias, ratio, scales, metric) -> Tensor:
    words = _quantize_fake(features, codebook, weight, bias, ratio, scales, metric)
    if not words.numel():
        return words
    batch, channels, height, width = features.shape
    rest = features.new_empty((batch, height * width, channels), dtype=torch.float32)
    norms = rest.new_empty((2, codebook.shape[0]))
    with torch.cuda.device_of(features):
        mask = _native.kernels("codes_multiscale").multiscale_quantize(
            features, _rows_together(codebook), _taps(weight, copy=True), bias.contiguous(), ratio,
            _plan(weight, scales), rest, norms, words,
        )  # fmt: skip
    return words.bitwise_and_(mask)


def _run_lookup_triton(codes, codebook, weight, bias, ratio, scales, what) -> Tensor:
    _require_codes("multiscale_lookup", codes, codebook.shape[0])
    out = _lookup_fake(codes, codebook, weight, bias, ratio, scales, what)
    if not out.numel():
        return out
    plan = _plan(weight, scales)
    steps, (height, width) = len(_held(codes, _pairs(scales))), plan[-3:-1]
    maps = codebook.new_empty((steps, codes.shape[0], height * width, codebook.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(codes):
        _native.kernels("codes_multiscale").multiscale_lookup(
            _rows_together(codes), _rows_together(codebook), _taps(weight, copy=True), bias.contiguous(), ratio,
            plan, maps, out, what,
        )  # fmt: skip
    return out


_quantize_cuda = _native.define(
    "multiscale_quantize_cuda(Tensor features, Tensor codebook, Tensor? weight, Tensor? bias, float ratio, "
    "Tensor scales, Tensor(a!) codes) -> ()"
)
_quantize_blocks_cuda = _native.define(
    "multiscale_quantize_blocks_cuda(Tensor features, int num_codes, bool convolved, Tensor scales) -> int"
)


@functools.lru_cache(maxsize=256)
def _plan_tensor(plan: tuple[int, ...]) -> Tensor:
    """A plan (S, 3) as the library takes it; made once, on the CPU."""
    return torch.tensor(plan, dtype=torch.int64).view(-1, 3)


@functools.lru_cache(maxsize=256)
def _room(device: torch.device, height: int, width: int, num_codes: int, convolved: bool, plan: tuple[int, ...]) -> int:
    """Of how many blocks a cluster is that encodes a picture; 0 if none has room for it."""
    features = torch.empty((1, 32, height, width), device=device)
    return _quantize_blocks_cuda(features, num_codes, convolved, _plan_tensor(plan))


def _quantize_unfit_cuda(features, codebook, weight, bias, ratio, scales, metric) -> str | None:
    reason = _native.cuda_unfit(features)
    if reason is not None:
        return reason
    if metric != "l2":
        return f"needs the metric 'l2', got {metric!r}"
    for tensor in (features, codebook, weight, bias):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"needs float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
    found = _native.capability(features)
    if found < 90:
        return f"needs compute capability 9.0, got {found / 10}"
    if codebook.shape[1] != 32:
        return f"needs 32 channels, got {codebook.shape[1]}"
    height, width = features.shape[2:]
    if height * width > 256 or len(scales) > 64:
        return f"needs maps of at most 256 pixels and 32 scales, got {height * width} and {len(scales) // 2}"
    if not _room(features.device, height, width, codebook.shape[0], weight.shape[0] > 0, _plan(weight, scales)):
        return f"needs a codebook that a cluster of blocks has room for, got {codebook.shape[0]} codes"
    return None


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and aligned as the compiled library reads it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _run_quantize_cuda(features, codebook, weight, bias, ratio, scales, metric) -> Tensor:
    codes = _quantize_fake(features, codebook, weight, bias, ratio, scales, metric)
    if not codes.numel():
        return codes
    tensors = [_near(features), codebook, *((weight, bias) if weight.shape[0] else ())]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]  # exact
    maps, table, *phi = tensors
    _quantize_cuda(
        maps, _aligned(table), *(map(_aligned, phi) if phi else (None, None)), ratio,
        _plan_tensor(_plan(weight, scales)), codes,
    )  # fmt: skip
    return codes


_next_cuda = _native.define(
    "next_scale_input_cuda(Tensor base, Tensor codes, Tensor codebook, Tensor? weight, Tensor? bias, float ratio, "
    "int height, int width, int h, int w, int next_h, int next_w, Tensor(a!) total, Tensor(b!) out, "
    "Tensor(c!) following) -> ()"
)


def _next_unfit_cuda(features_hat, codes, codebook, weight, bias, ratio, scales, step) -> str | None:
    reason = _native.cuda_unfit(features_hat)
    if reason is not None:
        return reason
    if codebook.shape[1] != 32:
        return f"needs 32 channels, got {codebook.shape[1]}"
    read = [features_hat, codes if codes.ndim == 3 else codebook, *((weight, bias) if weight.shape[0] else ())]
    dtypes = {tensor.dtype for tensor in read}
    if len(dtypes) > 1 or torch.float64 in dtypes:
        return "needs features, codebook or vectors, and phi in one dtype: float32, bfloat16 or float16"
    return None


def _run_next_cuda(features_hat, codes, codebook, weight, bias, ratio, scales, step) -> tuple[Tensor, Tensor]:
    out, following = _next_fake(features_hat, codes, codebook, weight, bias, ratio, scales, step)
    if not out.numel():
        return out, following
    plan, convolved = _plan(weight, scales), weight.shape[0] > 0
    batch, channels, height, width = features_hat.shape
    h, w, p = plan[3 * step : 3 * step + 3]
    _next_cuda(
        _near(features_hat),
        _rows_together(codes) if codes.ndim == 2 else _near(codes),
        _rows_together(codebook),
        weight[p].contiguous() if convolved else None,
        bias[p].contiguous() if convolved else None,
        ratio,
        height,
        width,
        h,
        w,
        *(plan[3 * step + 3 : 3 * step + 5] or (0, 0)),
        features_hat.new_empty((batch, height * width, channels), dtype=torch.float32),
        out,
        following,
    )
    return out, following


def _run_next_triton(features_hat, codes, codebook, weight, bias, ratio, scales, step) -> tuple[Tensor, Tensor]:
    if codes.ndim == 2:
        _require_codes("next_scale_input", codes, codebook.shape[0])
        codes = _rows_together(codes)
    else:
        codes = _near(codes)
    out, following = _next_fake(features_hat, codes, codebook, weight, bias, ratio, scales, step)
    if not out.numel():
        return out, following
    batch, channels, height, width = features_hat.shape
    total = features_hat.new_empty((1, batch, height * width, channels), dtype=torch.float32)
    with torch.cuda.device_of(features_hat):
        _native.kernels("codes_multiscale").next_scale_input(
            _near(features_hat), codes, _rows_together(codebook), _taps(weight, copy=False), bias.contiguous(), ratio,
            _plan(weight, scales), step, total, out, following,
        )  # fmt: skip
    return out, following


# ---- operators -------------------------------------------------------------------------------------------------------

_multiscale_quantize = Op(
    "multiscale_quantize(Tensor features, Tensor codebook, Tensor weight, Tensor bias, float ratio, int[] scales, "
    "str metric) -> Tensor",
    eager=_quantize_eager,
    fake=_quantize_fake,
    backends=(
        Backend("cuda", _run_quantize_cuda, _quantize_unfit_cuda),
        Backend("triton", _run_quantize_triton, _quantize_unfit_triton),
    ),
)

_multiscale_lookup = Op(
    "multiscale_lookup(Tensor codes, Tensor codebook, Tensor weight, Tensor bias, float ratio, int[] scales, "
    "str what) -> Tensor",
    eager=_lookup_eager,
    fake=_lookup_fake,
    backends=(Backend("triton", _run_lookup_triton, _lookup_unfit_triton),),
    setup_context=_lookup_setup,
    backward=_lookup_gradient,
)

_multiscale_lookup_backward = Op(
    "multiscale_lookup_backward(Tensor grad, Tensor codes, Tensor codebook, Tensor weight, Tensor bias, float ratio, "
    "int[] scales, str what) -> (Tensor, Tensor, Tensor)",
    eager=_lookup_backward_eager,
    fake=_lookup_backward_fake,
)

_next_scale_input = Op(
    "next_scale_input(Tensor features_hat, Tensor codes, Tensor codebook, Tensor weight, Tensor bias, float ratio, "
    "int[] scales, int step) -> (Tensor, Tensor)",
    eager=_next_eager,
    fake=_next_fake,
    backends=(
        Backend("cuda", _run_next_cuda, _next_unfit_cuda),
        Backend("triton", _run_next_triton, _next_unfit_triton),
    ),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def multiscale_quantize(
    features: Tensor,
    codebook: Tensor,
    phi: Phi | None,
    scales: Sequence[Scale],
    *,
    metric: str = "l2",
    backend: str = "auto",
) -> list[Tensor]:
    """Codes of a feature map at every scale, each scale's nearest to what the ones before left over.

    Args:
        features: (B, C, H, W) float32, bfloat16, float16 or float64, any strides.
        codebook: (K, C), of these dtypes, on the device of features.
        phi: what follows upsampling, or None for nothing.
        scales: S of them, ascending or not, none larger than the last, which is (H, W); an integer n is (n, n).
        metric: "l2", or "cosine" (VAR's `using_znorm`): the search compares directions, the codebook's own rows are
            summed.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        For every scale (B, h w) int64, views of one (B, L) tensor.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an empty codebook, scales that do not end in (H, W), an unknown metric
            or backend or one that does not fit.

    Note:
        Searched in float32 (float64 if an argument is): the squared distance of a chosen row exceeds the least by
        float32's rounding at most, and equal ones go to the lowest code. An error of one rounding in features or phi
        can flip a near tie, and a flipped code changes what all later scales search. NaN and infinities give codes
        that are in range and otherwise unspecified, to their own picture only. No gradient. No host sync on a GPU; may
        be captured in a CUDA graph.
    """
    function = "multiscale_quantize"
    _checks.check_tensor(function, "features", features)
    _check_codebook(function, codebook)
    if features.ndim != 4 or features.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"{function}: features must be (B, {codebook.shape[1]}, H, W) to match codebook, "
            f"got {tuple(features.shape)}"
        )
    _checks.check_same_device(function, "codebook", codebook, "features", features)
    sizes, flat = _check_scales(function, scales)
    if sizes[-1] != tuple(features.shape[2:]):
        raise ValueError(
            f"{function}: scales must end in the size of features, {tuple(features.shape[2:])}, got {sizes[-1]}"
        )
    if metric not in ("l2", "cosine"):
        raise ValueError(f"{function}: metric must be 'l2' or 'cosine', got {metric!r}")
    weight, bias, ratio = _check_phi(function, phi, codebook)
    codes = _multiscale_quantize(features, codebook, weight, bias, ratio, flat, metric, backend)
    return list(codes.split([h * w for h, w in sizes], dim=1))


def multiscale_lookup(
    codes: Sequence[Tensor],
    codebook: Tensor,
    phi: Phi | None,
    scales: Sequence[Scale],
    *,
    cumulative: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The feature map that the codes of the first scales stand for, or the running sums over these scales.

    Args:
        codes: for each of the first n scales (B, h w) int64, n from 1 to S; code -1 stands for a zero vector.
        codebook: (K, C) float32, bfloat16, float16 or float64, on the device of codes.
        phi: what follows upsampling, or None for nothing.
        scales: all S of them, none larger than the last, (H, W); an integer n is (n, n).
        cumulative: whether to return the running sums.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        (B, C, H, W), or (n, B, C, H, W) if `cumulative`, in the codebook's dtype, contiguous.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an empty codebook, an unknown backend or one that does not fit; on the
            CPU also for a code outside [-1, K). On a GPU, where looking at a code would stall the stream, such a code
            stands for a zero vector.

    Note:
        Sums run in float32 (float64 for a float64 codebook) from the first scale up and are rounded once.
        Differentiable once, in codebook and phi, bit-equal between runs where convolutions are. No host sync on a GPU;
        may be captured in a CUDA graph.
    """
    function = "multiscale_lookup"
    _, flat = _check_lookup(function, codes, codebook, scales)
    weight, bias, ratio = _check_phi(function, phi, codebook)
    together, what = torch.cat(list(codes), dim=1), "cumulative" if cumulative else "sum"
    return _multiscale_lookup(together, codebook, weight, bias, ratio, flat, what, backend)


def multiscale_inputs(
    codes: Sequence[Tensor],
    codebook: Tensor,
    phi: Phi | None,
    scales: Sequence[Scale],
    *,
    backend: str = "auto",
) -> Tensor:
    """What a transformer reads under teacher forcing: before each scale but the first, the sum so far, in its size.

    For s = 0 .. S - 2 the running sum features_hat_s, averaged down to scale s + 1; one behind the other.

    Args:
        codes: for every scale (B, h w) int64; those of the last are not needed and may be left out. Code -1 stands for
            a zero vector.
        codebook: (K, C) float32, bfloat16, float16 or float64, on the device of codes.
        phi: what follows upsampling, or None for nothing.
        scales: S of them, none larger than the last, (H, W); an integer n is (n, n).
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        (B, L - h_0 w_0, C) in the codebook's dtype, contiguous; L is the number of codes of all scales.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an empty codebook, an unknown backend or one that does not fit; on the
            CPU also for a code outside [-1, K). On a GPU such a code stands for a zero vector.

    Note:
        Computed in float32 (float64 for a float64 codebook) and rounded once. Differentiable once, in codebook and phi.
        No host sync on a GPU; may be captured in a CUDA graph.
    """
    function = "multiscale_inputs"
    sizes, flat = _check_lookup(function, codes, codebook, scales)
    if len(codes) < len(sizes) - 1:
        raise ValueError(
            f"{function}: codes must hold a tensor for each of {len(sizes)} scales (the last may be left out), "
            f"got {len(codes)}"
        )
    weight, bias, ratio = _check_phi(function, phi, codebook)
    if len(sizes) == 1:
        return codebook.new_empty((codes[0].shape[0], 0, codebook.shape[1]))
    together = torch.cat(list(codes[: len(sizes) - 1]), dim=1)
    return _multiscale_lookup(together, codebook, weight, bias, ratio, flat, "inputs", backend)


def next_scale_input(
    features_hat: Tensor,
    codes: Tensor,
    codebook: Tensor,
    phi: Phi | None,
    scales: Sequence[Scale],
    step: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Adds one scale to the sum so far, and averages the sum down to what a transformer reads before the next scale.

    Args:
        features_hat: (B, C, H, W) float32, bfloat16, float16 or float64: the sum of the scales before `step`.
        codes: (B, h w) int64, the codes of scale `step` (-1 stands for a zero vector), or (B, h w, C) floating, any
            vectors in place of codebook rows, such as expectations over codes.
        codebook: (K, C) floating, on the device of features_hat; not read with vectors.
        phi: what follows upsampling, or None for nothing.
        scales: S of them, none larger than the last, (H, W); an integer n is (n, n).
        step: which scale the codes are of, from 0 to S - 1.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        The sum with this scale, (B, C, H, W), new and contiguous, and (B, h' w', C), h' and w' being the next scale's,
        or None at the last step; both in the dtype of features_hat.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an empty codebook, a step outside [0, S), an unknown backend or one
            that does not fit; on the CPU also for a code outside [-1, K). On a GPU such a code stands for a zero
            vector.

    Note:
        Computed in float32 (float64 for float64 features_hat); the mean is of the sum before it is rounded. No
        gradient. No host sync on a GPU; may be captured in a CUDA graph.
    """
    function = "next_scale_input"
    _checks.check_tensor(function, "features_hat", features_hat)
    _check_codebook(function, codebook)
    sizes, flat = _check_scales(function, scales)
    _checks.check_integer(function, "step", step, 0)
    if step >= len(sizes):
        raise ValueError(f"{function}: step must be below {len(sizes)}, the number of scales, got {step}")
    channels = codebook.shape[1]
    if features_hat.ndim != 4 or tuple(features_hat.shape[1:]) != (channels, *sizes[-1]):
        raise ValueError(
            f"{function}: features_hat must be (B, {channels}, {sizes[-1][0]}, {sizes[-1][1]}) to match codebook and "
            f"scales, got {tuple(features_hat.shape)}"
        )
    _checks.check_tensor(function, "codes", codes, (torch.int64, *_checks.FLOATS))
    vectors = codes.dtype.is_floating_point
    shape = (features_hat.shape[0], sizes[step][0] * sizes[step][1], *((channels,) if vectors else ()))
    if tuple(codes.shape) != shape:
        raise ValueError(f"{function}: codes must be {shape} at step {step}, got {tuple(codes.shape)}")
    _checks.check_same_device(function, "codes", codes, "features_hat", features_hat)
    _checks.check_same_device(function, "codebook", codebook, "features_hat", features_hat)
    weight, bias, ratio = _check_phi(function, phi, codebook)
    total, following = _next_scale_input(features_hat, codes, codebook, weight, bias, ratio, flat, step, backend)
    return total, following if step + 1 < len(sizes) else None


def _check_codebook(function: str, codebook: Tensor) -> None:
    _checks.check_tensor(function, "codebook", codebook)
    if codebook.ndim != 2 or 0 in codebook.shape:
        raise ValueError(f"{function}: codebook must be (K, C) with no empty dimension, got {tuple(codebook.shape)}")


def _check_scales(function: str, scales: Sequence[Scale]) -> Sizes:
    """Sizes of the scales, and the same flat, as the operators take them."""
    if type(scales) is tuple and not torch.compiler.is_compiling():
        with contextlib.suppress(TypeError, ValueError):  # not hashable, or not right, which is said below
            return _checked_once(scales)
    return _checked(function, scales)


@functools.lru_cache(maxsize=256)
def _checked_once(scales: tuple[Scale, ...]) -> Sizes:
    """The ten scales of every step of a generation are the same, and looking at each takes a while."""
    return _checked("", scales)


def _checked(function: str, scales: Sequence[Scale]) -> Sizes:
    if not isinstance(scales, (list, tuple)) or not scales:
        raise ValueError(f"{function}: scales must be a list of at least one integer or (h, w), got {scales!r}")
    sizes = []
    for scale in scales:
        pair = (scale, scale) if isinstance(scale, int) else scale
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{function}: scales must be integers or pairs (h, w), got {scale!r}")
        for side in pair:
            _checks.check_integer(function, "each of scales", side, 1)
        sizes.append((pair[0], pair[1]))
    height, width = sizes[-1]
    for h, w in sizes:
        if h > height or w > width:
            raise ValueError(f"{function}: scales must not be larger than the last, {sizes[-1]}, got {(h, w)}")
    return tuple(sizes), tuple(side for size in sizes for side in size)


def _check_phi(function: str, phi: Phi | None, codebook: Tensor) -> tuple[Tensor, Tensor, float]:
    """The operators' way to say it: no convolutions, P = 0, for None."""
    channels = codebook.shape[1]
    if phi is None:
        return codebook.new_empty((0, channels, channels, 3, 3)), codebook.new_empty((0, channels)), 0.0
    if not isinstance(phi, Phi):
        raise TypeError(f"{function}: phi must be a Phi or None, got {type(phi).__name__}")
    for argument, tensor in (("phi.weight", phi.weight), ("phi.bias", phi.bias)):
        _checks.check_tensor(function, argument, tensor)
        _checks.check_same_device(function, argument, tensor, "codebook", codebook)
    count = phi.weight.shape[0] if phi.weight.ndim else 0
    if count < 1 or tuple(phi.weight.shape) != (count, channels, channels, 3, 3):
        raise ValueError(
            f"{function}: phi.weight must be (P, {channels}, {channels}, 3, 3) to match codebook, with P at least 1, "
            f"got {tuple(phi.weight.shape)}"
        )
    if tuple(phi.bias.shape) != (count, channels):
        raise ValueError(
            f"{function}: phi.bias must be ({count}, {channels}) to match phi.weight, got {tuple(phi.bias.shape)}"
        )
    _checks.check_number(function, "phi.ratio", phi.ratio)
    return phi.weight, phi.bias, float(phi.ratio)


def _check_lookup(function: str, codes: Sequence[Tensor], codebook: Tensor, scales: Sequence[Scale]) -> Sizes:
    """As `_check_scales`; the codes are those of the first scales."""
    _check_codebook(function, codebook)
    sizes, flat = _check_scales(function, scales)
    if not isinstance(codes, (list, tuple)):
        raise TypeError(f"{function}: codes must be a list with a tensor a scale, got {type(codes).__name__}")
    if not 1 <= len(codes) <= len(sizes):
        raise ValueError(f"{function}: codes must hold 1 to {len(sizes)} tensors, one a scale, got {len(codes)}")
    for s, (one, (h, w)) in enumerate(zip(codes, sizes, strict=False)):
        _checks.check_codes(function, one)
        if one.ndim != 2 or one.shape[1] != h * w or one.shape[0] != codes[0].shape[0]:
            raise ValueError(f"{function}: codes[{s}] must be (B, {h * w}), one B for all, got {tuple(one.shape)}")
        _checks.check_same_device(function, "codebook", codebook, f"codes[{s}]", one)
    return sizes, flat
