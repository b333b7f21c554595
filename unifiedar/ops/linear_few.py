"""Products of few rows: whole, or with sums over K left in parts that the norm after them adds up.

    y = act(x W^T + b)
    sums[p] = sum over the entries k of part p of x_k W_nk
    x' = x + gate (sum_p sums[p] + bias);  y = (x' - mean) / sqrt(variance + eps) * (1 + scale) + shift

W may be in 8 bits, with a scale for each of its rows (see `linear`).

Few rows read all weights of a layer for a handful of tokens, and where outputs are few too, programs have to share K
for all of a GPU to be at it. A library then adds up in a launch of its own, which costs as much as a small product; the
norm that follows reads the sum anyhow. On Hopper each of these launches begins while the one before ends. This file
joins the families `linear` and `norm`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.linear import STEP, WEIGHTS, _eager, _scaled, _split, many_rows, parts_of
from unifiedar.ops.norm import _gated_eager, _tokens_unfit

__all__ = ["few_linear", "few_rows", "linear_parts", "parts_norm"]

# Rows times the smaller side of the weights, up to which an H100 is the faster with these; above, a library is. VAR-d16
# has 128 rows there, d30 68.
FEW = 2**17

# ---- definitions -----------------------------------------------------------------------------------------------------


def _bounds(inputs: int, parts: int) -> list[tuple[int, int]]:
    """Where each part of K begins and ends; the last may be shorter, or nothing."""
    share = -(-inputs // (parts * STEP)) * STEP
    return [(min(i * share, inputs), min((i + 1) * share, inputs)) for i in range(parts)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _few_eager(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activated: bool) -> Tensor:
    if scale is not None:
        y = _eager(x, weight, scale, bias)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if activated else y


def _parts_eager(x: Tensor, weight: Tensor, scale: Tensor | None, parts: int) -> Tensor:
    wide = _wide(x)
    if scale is not None:
        rest, power = _split(scale)
        weight = _scaled(weight, power * rest, wide)
    with torch.autocast(x.device.type, enabled=False):
        found = [
            F.linear(x[..., begin:end].to(wide), weight[:, begin:end].to(wide))
            for begin, end in _bounds(x.shape[-1], parts)
        ]
    return torch.stack(found)


def _parts_norm_eager(
    x: Tensor,
    sums: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    branch = sums.sum(0)
    return _gated_eager(x, branch if bias is None else branch + bias.to(branch.dtype), gate, scale, shift, eps, dtype)


# ---- shapes of the outputs -------------------------------------------------------------------------------------------


def _few_fake(x, weight, scale, bias, activated):
    return x.new_empty((*x.shape[:-1], len(weight)))


def _parts_fake(x, weight, scale, parts):
    return x.new_empty((parts, *x.shape[:-1], len(weight)), dtype=_wide(x))


def _parts_norm_fake(x, sums, gate, scale, shift, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit_triton(x: Tensor, weight: Tensor) -> str | None:
    reason = _native.triton_layer_unfit(x, weight, "linear_few")
    if reason is None and x.numel() // weight.shape[1] >= 2**22:
        return f"needs fewer than 2^22 rows, got {x.numel() // weight.shape[1]}"
    return reason


def _few_unfit_triton(x, weight, scale, bias, activated) -> str | None:
    return _unfit_triton(x, weight)


def _parts_unfit_triton(x, weight, scale, parts) -> str | None:
    return _unfit_triton(x, weight) or (None if parts < 2**16 else f"needs fewer than 2^16 parts, got {parts}")


def _rows(x: Tensor) -> Tensor:
    """(M, K), contiguous and aligned to 16 bytes."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _run_few_triton(x, weight, scale, bias, activated):
    out = _few_fake(x, weight, scale, bias, activated)
    if out.numel():
        scale, bias = (None if one is None else one.contiguous() for one in (scale, bias))
        with torch.cuda.device_of(x):
            _native.kernels("linear_few").few_linear(
                _rows(x), weight, scale, bias, activated, out.view(-1, len(weight))
            )
    return out


def _run_parts_triton(x, weight, scale, parts):
    out = _parts_fake(x, weight, scale, parts)
    if out.numel():
        scale = None if scale is None else scale.contiguous()
        with torch.cuda.device_of(x):
            _native.kernels("linear_few").linear_parts(_rows(x), weight, scale, out.view(parts, -1, len(weight)))
    return out


def _parts_norm_unfit_triton(x, sums, gate, scale, shift, bias, eps, dtype) -> str | None:
    return _tokens_unfit(dtype, x, sums, gate, scale, shift, *(() if bias is None else (bias,)))


def _run_parts_norm_triton(x, sums, gate, scale, shift, bias, eps, dtype):
    out, new = _parts_norm_fake(x, sums, gate, scale, shift, bias, eps, dtype)
    if out.numel():
        # Rows of the condition are read in place, wherever they begin; the kernel wants their channels side by side.
        gate, scale, shift = (one if one.stride(1) == 1 else one.contiguous() for one in (gate, scale, shift))
        bias = None if bias is None else bias.contiguous()
        with torch.cuda.device_of(x):
            _native.kernels("norm").modulated_norm(
                x.contiguous(), sums.contiguous(), gate, scale, shift, eps, out, new, bias
            )
    return out, new


_few_linear = Op(
    "few_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool activated) -> Tensor",
    eager=_few_eager,
    fake=_few_fake,
    backends=(Backend("triton", _run_few_triton, _few_unfit_triton),),
)

_linear_parts = Op(
    "linear_parts(Tensor x, Tensor weight, Tensor? scale, int parts) -> Tensor",
    eager=_parts_eager,
    fake=_parts_fake,
    backends=(Backend("triton", _run_parts_triton, _parts_unfit_triton),),
)

_parts_norm = Op(
    "parts_norm(Tensor x, Tensor sums, Tensor gate, Tensor scale, Tensor shift, Tensor? bias, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    eager=_parts_norm_eager,
    fake=_parts_norm_fake,
    backends=(Backend("triton", _run_parts_norm_triton, _parts_norm_unfit_triton),),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether these operators are the faster way for x (..., K): few enough rows, and a kernel for it.

    Never while compiling, which sees no addresses, under autocast, or for what needs a gradient.
    """
    eight = weight.dtype in WEIGHTS
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if not eight and x.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, weight, bias)):
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    if many_rows(rows, *weight.shape) if eight else rows * min(weight.shape) > FEW:
        return False
    if _unfit_triton(x, weight) is not None:
        return False
    return _linear_parts.choose("auto", x, weight, None, 1).name != "eager"


def few_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer, perhaps with GELU after it, for few rows.

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        weight: (N, K), dtype of x; or with a scale int8 or float8_e4m3fn, without NaN.
        bias: (N,), dtype of x, or None.
        scale: (N,) float32, of the rows of weights in 8 bits.
        activation: None or "gelu", in its form with tanh.
        backend: "auto", "triton" (half precision, K a multiple of 16) or "eager".

    Returns:
        (..., N) in the dtype of x.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an unknown activation, where gradients are recorded, and for an
            unknown backend or one that does not fit.

    Note:
        The kernel sums in float32 and rounds once, at the end; "eager" rounds before GELU too. No gradient, never under
        autocast, no host sync; may be captured in a CUDA graph. Bit-equal between runs.
    """
    function = "few_linear"
    _check_product(function, x, weight, scale)
    given = [x, weight] if scale is None else [x, weight, scale]
    if bias is not None:
        _checks.check_tensor(function, "bias", bias, (x.dtype,))
        if tuple(bias.shape) != (len(weight),):
            raise ValueError(f"{function}: bias must be ({len(weight)},) to match weight, got {tuple(bias.shape)}")
        _checks.check_same_device(function, "bias", bias, "x", x)
        given.append(bias)
    if activation not in (None, "gelu"):
        raise ValueError(f"{function}: activation must be None or 'gelu', got {activation!r}")
    _check_no_gradient(function, *given)
    return _few_linear(x, weight, scale, bias, activation is not None, backend)


def linear_parts(
    x: Tensor, weight: Tensor, parts: int | None = None, *, scale: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """A product x W^T in parts of K, whose sum it is.

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        weight: (N, K), dtype of x; or with a scale int8 or float8_e4m3fn, without NaN.
        parts: P, how many: each of K / P entries, rounded up to a multiple of 64, so that the last may have less or
            none. None is what keeps a large GPU busy.
        scale: (N,) float32, of the rows of weights in 8 bits.
        backend: "auto", "triton" (half precision, K a multiple of 16) or "eager".

    Returns:
        (P, ..., N) float32, as matrix units sum up; float64 for float64.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, parts below 1, where gradients are recorded, and for an unknown
            backend or one that does not fit.

    Note:
        No gradient, never under autocast, no host sync; may be captured in a CUDA graph. Bit-equal between runs.
    """
    function = "linear_parts"
    _check_product(function, x, weight, scale)
    outputs, inputs = weight.shape
    if parts is None:
        parts = parts_of(x.numel() // inputs, outputs, inputs, 16 if scale is None else 8)
    _checks.check_integer(function, "parts", parts, 1)
    _check_no_gradient(function, *((x, weight) if scale is None else (x, weight, scale)))
    return _linear_parts(x, weight, scale, parts, backend)


def parts_norm(
    x: Tensor,
    sums: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`modulated_norm` after a branch that `linear_parts` left in parts.

    Args:
        x: (B, L, C), the tokens: float32, bfloat16, float16 or float64.
        sums: (P, B, L, C) floats, the branch's parts.
        gate: (B, C) floats of any strides, a factor on the branch.
        scale, shift: (B, C), likewise; 1 is added to the scale.
        bias: (C,) floats, added to the branch, or None.
        eps: added to the variance, at least 0.
        dtype: of y; None is that of x.
        backend: "auto", "triton" or "eager".

    Returns:
        y (B, L, C) in `dtype`, and the tokens x + gate (sum of parts + bias) in the dtype of x. Contiguous.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, no parts, a negative eps, where gradients are recorded, and for an
            unknown backend or one that does not fit.

    Note:
        As `modulated_norm`, but without a gradient: float32 inside, what is normalized is the sum that is returned. The
        branch is not rounded before.
    """
    function = "parts_norm"
    _checks.check_tensor(function, "x", x)
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"{function}: x must be (B, L, C) with at least one channel, got {tuple(x.shape)}")
    _checks.check_tensor(function, "sums", sums)
    if sums.ndim != 4 or not len(sums) or sums.shape[1:] != x.shape:
        raise ValueError(f"{function}: sums must be (parts, *{tuple(x.shape)}) to match x, got {tuple(sums.shape)}")
    given = {"gate": gate, "scale": scale, "shift": shift} | ({} if bias is None else {"bias": bias})
    for name, one in given.items():
        _checks.check_tensor(function, name, one)
        shape = (x.shape[2],) if name == "bias" else (x.shape[0], x.shape[2])
        if tuple(one.shape) != shape:
            raise ValueError(f"{function}: {name} must be {shape} to match x, got {tuple(one.shape)}")
    for name, one in {"sums": sums, **given}.items():
        _checks.check_same_device(function, name, one, "x", x)
    _checks.check_number(function, "eps", eps, 0)
    if dtype is None:
        dtype = x.dtype
    elif dtype not in _checks.FLOATS:
        raise TypeError(f"{function}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    _check_no_gradient(function, x, sums, *given.values())
    return _parts_norm(x, sums, gate, scale, shift, bias, float(eps), dtype, backend)


def _check_no_gradient(function: str, *given: Tensor) -> None:
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        raise ValueError(f"{function}: tensors must not need a gradient, which they would not get: use torch.no_grad()")


def _check_product(function: str, x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    _checks.check_tensor(function, "x", x)
    _checks.check_tensor(function, "weight", weight, (x.dtype,) if scale is None else WEIGHTS)
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must be (N, K), got {tuple(weight.shape)}")
    inputs = weight.shape[1]
    if x.ndim < 1 or x.shape[-1] != inputs or not inputs:
        raise ValueError(f"{function}: x must be (..., {inputs}) to match weight, got {tuple(x.shape)}")
    _checks.check_same_device(function, "weight", weight, "x", x)
    if scale is not None:
        _checks.check_tensor(function, "scale", scale, (torch.float32,))
        if tuple(scale.shape) != (len(weight),):
            raise ValueError(f"{function}: scale must be ({len(weight)},) to match weight, got {tuple(scale.shape)}")
        _checks.check_same_device(function, "scale", scale, "x", x)
