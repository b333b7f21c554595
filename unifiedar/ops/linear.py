"""A linear layer with weights of 8 bits: y = scale (x W^T) + bias, one scale a row of W.

x is (..., K), W (N, K) int8 or float8_e4m3fn, whose entries all dtypes of x hold exactly; sums are float32, so that 8
bits cost what rounding the weights costs and nothing more. For models whose weights' bytes are the time: they are half
of those in half precision. Where rows are many the product itself is the time, and a library's is the faster even with
the weights written out in half precision just before (`widen_8bit`), at a rounding of each weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["linear_8bit", "many_rows", "parts_of", "widen_8bit"]

WEIGHTS = (torch.int8, torch.float8_e4m3fn)
STEP = 64  # entries of K that parts of a product are multiples of, but for the last


def many_rows(rows: int, outputs: int, inputs: int) -> bool:
    """Whether it is faster to widen all weights of 8 bits first and leave the product to a library, on an H100.

    Later for a layer of few outputs: over a long K programs share its entries.
    """
    return rows > (256 if inputs >= 2 * outputs else 128)


def parts_of(rows: int, outputs: int, inputs: int, bits: int = 16) -> int:
    """Parts of K for which there is about one program for each of an H100's multiprocessors, of 64 outputs and up to 64
    rows, with four steps of K at least. Of weights in 8 bits programs are larger above 64 rows, there are more of them
    above 32, and parts are of 128 entries.
    """
    many = bits == 8 and rows > 64
    programs = -(-outputs // (128 if many and rows > 128 else 64)) * -(-rows // (128 if many else 64))
    parts = max(1, min(inputs // (4 * STEP), round((200 if bits == 8 and rows > 32 else 132) / max(programs, 1))))
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


def _widen_eager(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(torch.float32).to(wide) * scale.to(wide)[:, None]).to(dtype)


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


def _widen_fake(weight, scale, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


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
    outputs, inputs = weight.shape
    if many_rows(x.numel() // inputs, outputs, inputs):
        wide = _run_widen_triton(weight, scale, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, wide, None if bias is None else bias.to(x.dtype))
    out = _fake(x, weight, scale, bias)
    if out.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.data_ptr() % 16:
            rows = rows.clone()
        bias = None if bias is None else bias.contiguous()
        # To add parts up takes a launch, which is worth it where programs are few.
        parts = parts_of(len(rows), outputs, inputs, 8) if outputs < 3072 else 1
        with torch.cuda.device_of(x):
            _native.kernels("linear").linear_8bit(rows, weight, scale.contiguous(), bias, out.view(-1, outputs), parts)
    return out


def _widen_unfit_triton(weight, scale, dtype) -> str | None:
    reason = _native.triton_unfit(weight)
    if reason is None and dtype not in (torch.bfloat16, torch.float16):
        reason = f"needs bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if reason is None and not weight.is_contiguous():
        reason = f"needs contiguous weights, got strides {tuple(weight.stride())}"
    return reason


def _run_widen_triton(weight, scale, dtype):
    out = _widen_fake(weight, scale, dtype)
    if out.numel():
        with torch.cuda.device_of(weight):
            _native.kernels("linear").widen_8bit(weight, scale.contiguous(), out)
    return out


_linear_8bit = Op(
    "linear_8bit(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    eager=_eager,
    fake=_fake,
    backends=(Backend("triton", _run_triton, _unfit_triton),),
    setup_context=_setup,
    backward=_gradient,
)

_widen_8bit = Op(
    "widen_8bit(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
    eager=_widen_eager,
    fake=_widen_fake,
    backends=(Backend("triton", _run_widen_triton, _widen_unfit_triton),),
)


# ---- public functions ---------------------------------------------------------------------------------------------


def linear_8bit(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """A linear layer with weights of 8 bits: scale (x W^T) + bias.

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        weight: (N, K) int8 or float8_e4m3fn, without NaN.
        scale: (N,) float32, of the rows of the weights.
        bias: (N,) floats, or None.
        backend: "auto", "triton" (half precision, K a multiple of 16) or "eager", right everywhere.

    Returns:
        (..., N) in the dtype of x, summed in float32 (in x's dtype by "eager", as `F.linear` does).

    Raises:
        TypeError: for other dtypes.
        ValueError: for shapes that do not match, tensors on several devices, weights or scale that ask for a gradient,
            or a backend that does not fit.

    Note:
        Gradients reach x and bias alone. Autocast is ignored: the product runs in x's dtype. Bit-equal between runs.
        Triton rounds once, at the end, or, of many rows, the weights times their scales too, which costs no
        more than the two roundings of "eager"; there it takes memory for the weights in half precision while it runs.
    """
    function = "linear_8bit"
    _checks.check_tensor(function, "x", x)
    outputs, inputs = _check_weights(function, weight, scale)
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{function}: x must be (..., {inputs}) to match weight, got {tuple(x.shape)}")
    _checks.check_same_device(function, "weight", weight, "x", x)
    if bias is not None:
        _checks.check_tensor(function, "bias", bias)
        if tuple(bias.shape) != (outputs,):
            raise ValueError(f"{function}: bias must be ({outputs},) to match weight, got {tuple(bias.shape)}")
        _checks.check_same_device(function, "bias", bias, "x", x)
    return _linear_8bit(x, weight, scale, bias, backend)


def widen_8bit(weight: Tensor, scale: Tensor, dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """Weights of 8 bits times their scales, for a product that takes no 8 bits.

    Args:
        weight: (N, K) int8 or float8_e4m3fn, without NaN.
        scale: (N,) float32, of the rows of the weights.
        dtype: float32, bfloat16, float16 or float64.
        backend: "auto", "triton" (half precision) or "eager".

    Returns:
        (N, K) in `dtype`: multiplied in float32 (float64 for float64), rounded once; the same by every backend.

    Raises:
        TypeError: for other dtypes.
        ValueError: for shapes that do not match, tensors on several devices, weights or scale that ask for a gradient,
            or a backend that does not fit.

    Note:
        No gradient, no host sync; may be captured in a CUDA graph.
    """
    function = "widen_8bit"
    _check_weights(function, weight, scale)
    if dtype not in _checks.FLOATS:
        raise TypeError(f"{function}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    return _widen_8bit(weight, scale, dtype, backend)


def _check_weights(function: str, weight: Tensor, scale: Tensor) -> tuple[int, int]:
    """Raises unless these are weights of 8 bits and their scales; N and K."""
    _checks.check_tensor(function, "weight", weight, WEIGHTS)
    _checks.check_tensor(function, "scale", scale, (torch.float32,))
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must be (N, K), got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if tuple(scale.shape) != (outputs,):
        raise ValueError(f"{function}: scale must be ({outputs},) to match weight, got {tuple(scale.shape)}")
    _checks.check_same_device(function, "scale", scale, "weight", weight)
    if scale.requires_grad or weight.requires_grad:
        raise ValueError(f"{function}: weight and scale must not ask for a gradient, which they cannot have; got one")
    return outputs, inputs
