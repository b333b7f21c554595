"""A linear layer with weights of 8 bits: y = scale (x W^T) + bias, one scale a row of W.

x is (..., K), W (N, K) int8 or float8_e4m3fn, whose entries all dtypes of x hold exactly; sums are float32, so that 8
bits cost what rounding the weights costs and nothing more. For models whose weights' bytes are the time: they are half
of those in half precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["MANY", "linear_8bit", "parts_of"]

WEIGHTS = (torch.int8, torch.float8_e4m3fn)
STEP = 64  # entries of K that parts of a product are multiples of, but for the last
# Rows, above which it is faster to widen all of a layer's weights of 8 bits first; by arithmetic, not measured.
MANY = 4096


def parts_of(rows: int, outputs: int, inputs: int, bits: int = 16) -> int:
    """Parts of K for which there is about one program for each of an H100's multiprocessors, of 64 outputs and up to 64
    rows, with four steps of K at least. Of weights in 8 bits programs are larger above 64 rows, and parts are of 128
    entries.
    """
    many = bits == 8 and rows > 64
    programs = -(-outputs // (128 if many and rows > 128 else 64)) * -(-rows // (128 if many else 64))
    parts = max(1, min(inputs // (4 * STEP), round((200 if many else 132) / max(programs, 1))))
    if bits == 16 or parts == 1:
        return parts
    share = -(-inputs // (2 * STEP * parts)) * 2 * STEP
    return -(-inputs // share)


# ---- the definition --------------------------------------------------------------------------------------------------


def _eager(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rest, power = _split(scale)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x, _scaled(weight, power, x.dtype)).to(wide) * rest.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _split(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a scale: a number from 1/2 to 1, and a power of two."""
    rest, _ = torch.frexp(scale)
    return rest, torch.where(rest == 0, 1.0, scale / rest)


def _scaled(weight: Tensor, power: Tensor, dtype: torch.dtype) -> Tensor:
    """W times powers of two, which half precision holds as exactly as W, and whose products it does not overflow on."""
    return (weight.to(torch.float32) * power[:, None]).to(dtype)


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _fake(x, weight, scale, bias):
    return x.new_empty((*x.shape[:-1], len(weight)))


def _setup(ctx, inputs, output):
    _, weight, scale, bias = inputs
    ctx.save_for_backward(weight, scale, bias)


def _gradient(ctx, grad):
    weight, scale, bias = ctx.saved_tensors
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rest, power = _split(scale)
    with torch.autocast(grad.device.type, enabled=False):
        scaled = (grad.to(wide) * rest.to(wide)).to(grad.dtype)
        found = scaled @ _scaled(weight, power, grad.dtype)
    return found, None, None, None if bias is None else grad.to(wide).flatten(0, -2).sum(0).to(bias.dtype)


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit_triton(x, weight, scale, bias) -> str | None:
    reason = _native.triton_layer_unfit(x, weight, "linear")
    if reason is None and weight.numel() >= 2**31:
        return f"needs fewer than 2^31 weights, got {tuple(weight.shape)}"
    return reason


def _run_triton(x, weight, scale, bias):
    out = _fake(x, weight, scale, bias)
    if out.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.data_ptr() % 16:
            rows = rows.clone()
        bias = None if bias is None else bias.contiguous()
        with torch.cuda.device_of(x):
            _native.kernels("linear").linear_8bit(
                rows, weight, scale.contiguous(), bias, out.view(-1, len(weight)), parts_of(len(rows), *weight.shape, 8)
            )
    return out


_linear_8bit = Op(
    "linear_8bit(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    eager=_eager,
    fake=_fake,
    backends=(Backend("triton", _run_triton, _unfit_triton),),
    setup_context=_setup,
    backward=_gradient,
)


# ---- the public function ---------------------------------------------------------------------------------------------


def linear_8bit(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """A linear layer with weights of 8 bits: scale (x W^T) + bias.

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        weight: (N, K) int8 or float8_e4m3fn, without NaN.
        scale: (N,) float32, of the rows of the weights.
        bias: (N,) floats, or None.
        backend: "auto", "triton" (half precision, K a multiple of 16) or "eager", which widens all weights to x's dtype
            at every call: right everywhere, and on a GPU faster for many thousands of rows.

    Returns:
        (..., N) in the dtype of x, summed in float32 (in x's dtype by "eager", as `F.linear` does).

    Raises:
        TypeError: for other dtypes.
        ValueError: for shapes that do not match, tensors on several devices, weights or scale that ask for a gradient,
            or a backend that does not fit.

    Note:
        Gradients reach x and bias alone. Autocast is ignored: the product runs in x's dtype. Bit-equal between runs.
    """
    function = "linear_8bit"
    _checks.check_tensor(function, "x", x)
    _checks.check_tensor(function, "weight", weight, WEIGHTS)
    _checks.check_tensor(function, "scale", scale, (torch.float32,))
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must be (N, K), got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{function}: x must be (..., {inputs}) to match weight, got {tuple(x.shape)}")
    given = {"weight": weight, "scale": scale}
    if bias is not None:
        _checks.check_tensor(function, "bias", bias)
        given["bias"] = bias
    for name, one in given.items():
        _checks.check_same_device(function, name, one, "x", x)
        if name != "weight" and tuple(one.shape) != (outputs,):
            raise ValueError(f"{function}: {name} must be ({outputs},) to match weight, got {tuple(one.shape)}")
    if scale.requires_grad or weight.requires_grad:
        raise ValueError(f"{function}: weight and scale must not ask for a gradient, which they cannot have; got one")
    return _linear_8bit(x, weight, scale, bias, backend)
