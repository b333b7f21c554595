"""Group norm with SiLU: what stands before every convolution of VQGAN's encoder and decoder.

    y = (x - mean) / sqrt(variance + eps) * weight + bias, then y * sigmoid(y)

with mean and variance (of all entries, not of one less) over a picture's pixels and the channels of a group.

Wu and He, "Group Normalization" (2018), section 3.1; with SiLU as in Esser et al., "Taming Transformers" (2021).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["group_norm"]


# ---- definitions -----------------------------------------------------------------------------------------------------


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype and strides of `_norm_fake(x)`: torch's own norm drops channels-last on a GPU."""
    out = torch.empty_like(x)
    return y if y.dtype == x.dtype and y.stride() == out.stride() else out.copy_(y)


def _norm_eager(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    if not x.numel():
        return torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
        return _laid_out_like(F.silu(y) if silu else y, x)


def _norm_backward_eager(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outs = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    if not x.numel():
        return outs[0], outs[1].zero_(), outs[2].zero_()
    dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype, bias.dtype) else torch.float32
    batch, channels, height, width = x.shape
    wide, scale = x.to(dtype).contiguous(), weight.to(dtype)
    sizes = (batch, channels, height * width, groups)
    with torch.autocast(x.device.type, enabled=False):
        y, mean, rstd = torch.native_group_norm(wide, scale, bias.to(dtype), *sizes, eps)
        grad = grad.to(dtype).contiguous()
        if silu:
            grad = torch.ops.aten.silu_backward(grad, y)
        found = torch.ops.aten.native_group_norm_backward(grad, wide, mean, rstd, scale, *sizes, [True, True, True])
    for out, one in zip(outs, found, strict=True):
        out.copy_(one)
    return outs


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _norm_fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x)


def _norm_backward_fake(grad, x, weight, bias, groups, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_group_norm_backward(grad, *ctx.saved_tensors, *ctx.rest, "auto"), None, None, None


# ---- backends --------------------------------------------------------------------------------------------------------

MAX_WIDTH = 1024


def _norm_unfit_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> str | None:
    reason = _native.triton_unfit(x)
    for tensor in (x, weight, bias):
        if reason is None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reason = f"needs float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
    if reason is None and not x.is_contiguous(memory_format=torch.channels_last):
        reason = f"needs x dense in channels-last layout, got strides {tuple(x.stride())}"
    if reason is None and x.shape[1] // groups > MAX_WIDTH:
        reason = f"needs groups of at most {MAX_WIDTH} channels, got {x.shape[1] // groups}"
    return reason


def _run_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    out = torch.empty_like(x)
    if out.numel():
        batch, channels, height, width = x.shape
        kernels = _native.kernels("norm_group")
        parts = x.new_empty((batch, kernels.chunks(height * width, channels), 2, channels), dtype=torch.float32)
        moments = x.new_empty((batch, 2, channels), dtype=torch.float32)
        with torch.cuda.device_of(x):
            kernels.group_norm(x, weight.contiguous(), bias.contiguous(), groups, eps, silu, parts, moments, out)
    return out


# ---- operators -------------------------------------------------------------------------------------------------------

_group_norm = Op(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor",
    eager=_norm_eager,
    fake=_norm_fake,
    backends=(Backend("triton", _run_norm_triton, _norm_unfit_triton),),
    setup_context=_norm_setup,
    backward=_norm_gradient,
)

_group_norm_backward = Op(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> "
    "(Tensor, Tensor, Tensor)",
    eager=_norm_backward_eager,
    fake=_norm_backward_fake,
)


# ---- public function -------------------------------------------------------------------------------------------------


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-6,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Group norm of feature maps, and SiLU after it.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64, any strides. Triton takes it in channels-last layout
            alone, the one in which tensor cores read the next convolution's input.
        weight: (C,) of these dtypes, which need not be x's, on the device of x.
        bias: (C,), likewise.
        groups: how many groups of neighbouring channels there are; divides C.
        eps: added to the variance, at least 0.
        silu: whether y * sigmoid(y) follows.
        backend: "auto", "triton" or "eager".

    Returns:
        (B, C, H, W) in the dtype of x and, if x is dense, its strides.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, groups that do not divide C, an unknown backend or one that does not
            fit.

    Note:
        Moments are float32's (float64 for float64). Triton makes them in two steps, of means and squared distances to
        them, so that a mean far from zero costs no digits; it rounds once, the eager backend after the norm and after
        SiLU. Never under autocast. Equal for a picture alone or among others, and between runs, on Triton.
        Differentiable once; the gradient is the eager backend's. No host sync; may be captured in a CUDA graph.
    """
    function = "group_norm"
    _checks.check_tensor(function, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{function}: x must be (B, C, H, W), got {tuple(x.shape)}")
    channels = x.shape[1]
    _checks.check_integer(function, "groups", groups, 1)
    if channels % groups or not channels:
        raise ValueError(f"{function}: groups must divide the {channels} channels of x, got {groups}")
    for argument, value in (("weight", weight), ("bias", bias)):
        _checks.check_tensor(function, argument, value)
        if value.shape != (channels,):
            raise ValueError(f"{function}: {argument} must be ({channels},) to match x, got {tuple(value.shape)}")
        _checks.check_same_device(function, argument, value, "x", x)
    _checks.check_number(function, "eps", eps, 0)
    return _group_norm(x, weight, bias, groups, float(eps), bool(silu), backend)
