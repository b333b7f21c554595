"""Bias and GELU after a product, in one pass, and in one back: the gradient's pass sums up the bias's, too.

    y = h s(h), h = x + b, s(h) = (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2, the form with tanh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["bias_gelu"]


# ---- definitions -----------------------------------------------------------------------------------------------------


def _widened(x: Tensor, bias: Tensor) -> Tensor:
    wide = torch.float64 if torch.float64 in (x.dtype, bias.dtype) else torch.float32
    return x.to(wide) + bias.to(wide)


def _eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(_widened(x, bias), approximate="tanh").to(x.dtype).contiguous()


def _backward_eager(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x in its dtype, and of bias not rounded."""
    h = _widened(x, bias)
    found = torch.ops.aten.gelu_backward(grad.to(h.dtype), h, approximate="tanh")
    return found.to(x.dtype).contiguous(), found.flatten(0, -2).sum(0)


def _fake(x, bias):
    return x.new_empty(x.shape)


def _backward_fake(grad, x, bias):
    wide = torch.float64 if torch.float64 in (x.dtype, bias.dtype) else torch.float32
    return x.new_empty(x.shape), x.new_empty(bias.shape, dtype=wide)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias, ctx.backend)
    return grad_x, grad_bias.to(bias.dtype)


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit(x, bias) -> str | None:
    reason = _native.triton_unfit(x) or _native.triton_unfit(bias)
    for one in (x, bias):
        if reason is None and one.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reason = f"needs float32, bfloat16 or float16, got {str(one.dtype).removeprefix('torch.')}"
    if reason is None and x.numel() >= 2**16 * 8 * max(1, x.shape[-1]):
        reason = f"needs fewer than 2^19 rows, got {x.numel() // x.shape[-1]}"
    return reason


def _backward_unfit(grad, x, bias) -> str | None:
    return _unfit(x, bias)


def _run(x, bias):
    out = _fake(x, bias)
    if out.numel():
        with torch.cuda.device_of(x):
            _native.kernels("linear_gelu").bias_gelu(
                x.contiguous().flatten(0, -2), bias.contiguous(), out.flatten(0, -2)
            )
    return out


def _run_backward(grad, x, bias):
    grad_x, grad_bias = _backward_fake(grad, x, bias)
    if not x.numel():
        return grad_x, grad_bias.zero_()
    kernels, rows = _native.kernels("linear_gelu"), x.contiguous().flatten(0, -2)
    parts = grad_bias.new_empty((kernels.row_shares(*rows.shape)[0], len(bias)))
    with torch.cuda.device_of(x):
        kernels.bias_gelu_backward(
            grad.contiguous().flatten(0, -2), rows, bias.contiguous(), grad_x.flatten(0, -2), parts
        )
    torch.sum(parts, 0, out=grad_bias)
    return grad_x, grad_bias


_bias_gelu_backward = Op(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    eager=_backward_eager,
    fake=_backward_fake,
    backends=(Backend("triton", _run_backward, _backward_unfit),),
)

_bias_gelu = Op(
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    eager=_eager,
    fake=_fake,
    backends=(Backend("triton", _run, _unfit),),
    setup_context=_setup,
    backward=_gradient,
)


# ---- public functions ------------------------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU (its tanh form) of x + bias: what comes after a product that left its bias off.

    Args:
        x: (..., N), at least two dimensions, float32, bfloat16, float16 or float64.
        bias: (N,) of these dtypes, which need not be x's.
        backend: "auto", "triton" or "eager".

    Returns:
        (..., N) in the dtype of x, contiguous.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an unknown backend or one that does not fit.

    Note:
        Computed in float32 (float64 if an argument is) and rounded once. Differentiable once in both. Never under
        autocast, no host sync, no atomics; bit-equal between runs.
    """
    function = "bias_gelu"
    _checks.check_tensor(function, "x", x)
    if x.ndim < 2 or not x.shape[-1]:
        raise ValueError(f"{function}: x must be (..., N) with at least one channel, got {tuple(x.shape)}")
    _checks.check_tensor(function, "bias", bias)
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"{function}: bias must be ({x.shape[-1]},) to match x, got {tuple(bias.shape)}")
    _checks.check_same_device(function, "bias", bias, "x", x)
    return _bias_gelu(x, bias, backend)
