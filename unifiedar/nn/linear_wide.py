"""A product in half precision whose weights, and their gradients, are float32: mixed precision without a detour.

    y = x W^T + b,  dx = dy W,  dW = dy^T x,  db = sum dy,  W rounded to the dtype of x, dW and db not rounded

What autocast does rounds dW to half precision and widens it again, a pass over all weights' gradients that reads two
bytes and writes four; here sums leave the product in float32. Source: Micikevicius et al., "Mixed Precision Training"
(2018), section 3.1, which keeps the weights wide for the sake of small gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unifiedar.ops import _checks

__all__ = ["wide_linear"]


def _sums(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T x (N, K) of (M, N) and (M, K)."""
    if grad.is_cuda and dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.mT, x, out_dtype=dtype)
    return (grad.mT @ x).to(dtype)


class _WideLinear(torch.autograd.Function):
    """With what was rounded kept for the way back. x is in autocast's dtype if that is on, which then casts nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, narrow, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow = ctx.saved_tensors
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _gradients(ctx, grad, x, narrow)
        return _gradients(ctx, grad, x, narrow)


def _gradients(ctx: Any, grad: Tensor, x: Tensor, narrow: Tensor) -> tuple[Tensor | None, ...]:
    dtype, of_bias = ctx.dtypes
    rows = grad.reshape(-1, grad.shape[-1])
    of_x, of_weight, of_sum = ctx.needs_input_grad
    return (
        (rows @ narrow).view(x.shape) if of_x else None,
        _sums(rows, x.reshape(-1, x.shape[-1]), dtype) if of_weight else None,
        rows.sum(0, dtype=of_bias) if of_sum else None,
    )


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in training, in the dtype of its input or of autocast, whose weights may be wider.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: (N, K) of these dtypes, which need not be x's.
        bias: (N,) of these dtypes, or None.

    Returns:
        (..., N) in the dtype of x, under autocast in that of autocast.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match.

    Note:
        Differentiable once in all. Gradients of weight and bias come in their dtypes; on a GPU, of half precision, they
        are rounded to float32 alone.
    """
    function = "wide_linear"
    _checks.check_tensor(function, "x", x)
    _checks.check_tensor(function, "weight", weight)
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: weight must be (N, K) with K that of x, {tuple(x.shape)[-1:]}, got {tuple(weight.shape)}"
        )
    _checks.check_same_device(function, "weight", weight, "x", x)
    if bias is not None:
        _checks.check_tensor(function, "bias", bias)
        if tuple(bias.shape) != (len(weight),):
            raise ValueError(f"{function}: bias must be ({len(weight)},) to match weight, got {tuple(bias.shape)}")
        _checks.check_same_device(function, "bias", bias, "x", x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _WideLinear.apply(x, weight, bias)
