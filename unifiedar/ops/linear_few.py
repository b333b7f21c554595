"""Products of few rows whose sums over K are left in parts, and the norm that adds them up.

    sums[p] = sum over the entries k of part p of x_k W_nk
    x' = x + gate (sum_p sums[p] + bias);  y = (x' - mean) / sqrt(variance + eps) * (1 + scale) + shift

Few rows read all weights of a layer for a handful of tokens, and where outputs are few too, programs have to share K
for all of a GPU to be at it. A library then adds up in a launch of its own, which costs as much as a small product; the
norm that follows reads the sum anyhow. This file joins the families `linear` and `norm`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.norm import _gated_eager, _tokens_unfit

__all__ = ["few_rows", "linear_parts", "parts_norm"]

STEP = 64  # entries of K that parts are multiples of, but for the last
FEW_ROWS = 200  # above, a library is the faster way: there are programs enough without parts

# ---- definitions -----------------------------------------------------------------------------------------------------


def _bounds(inputs: int, parts: int) -> list[tuple[int, int]]:
    """Where each part of K begins and ends; the last may be shorter, or nothing."""
    share = -(-inputs // (parts * STEP)) * STEP
    return [(min(i * share, inputs), min((i + 1) * share, inputs)) for i in range(parts)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _parts_eager(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    wide = _wide(x)
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


def _parts_fake(x, weight, parts):
    return x.new_empty((parts, *x.shape[:-1], len(weight)), dtype=_wide(x))


def _parts_norm_fake(x, sums, gate, scale, shift, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)


# ---- backends --------------------------------------------------------------------------------------------------------


def _parts_unfit_triton(x, weight, parts) -> str | None:
    reason = _native.triton_unfit(x)
    if reason is None and x.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
    pack = 0 if reason else _native.kernels("linear_few").PACK
    if reason is None and (weight.shape[1] % pack or not weight.shape[1]):
        return f"needs K a multiple of {pack}, got {weight.shape[1]}"
    if reason is None and (not weight.is_contiguous() or weight.data_ptr() % 16):
        return f"needs contiguous weights aligned to 16 bytes, got strides {tuple(weight.stride())}"
    return reason


def _run_parts_triton(x, weight, parts):
    out = _parts_fake(x, weight, parts)
    if out.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if rows.data_ptr() % 16:
            rows = rows.clone()
        with torch.cuda.device_of(x):
            _native.kernels("linear_few").linear_parts(rows, weight, out.view(parts, len(rows), len(weight)))
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


_UNTRIED = "not run on a GPU yet"

_linear_parts = Op(
    "linear_parts(Tensor x, Tensor weight, int parts) -> Tensor",
    eager=_parts_eager,
    fake=_parts_fake,
    backends=(Backend("triton", _run_parts_triton, _parts_unfit_triton, on_request=_UNTRIED),),
)

_parts_norm = Op(
    "parts_norm(Tensor x, Tensor sums, Tensor gate, Tensor scale, Tensor shift, Tensor? bias, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    eager=_parts_norm_eager,
    fake=_parts_norm_fake,
    backends=(Backend("triton", _run_parts_norm_triton, _parts_norm_unfit_triton, on_request=_UNTRIED),),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_parts` and `parts_norm` are the faster way for x (..., K): few enough rows, and a kernel for it.

    While compiling, which sees no addresses, never; nor for rows that need a gradient.
    """
    if torch.compiler.is_compiling() or x.dtype != weight.dtype or x.numel() > FEW_ROWS * x.shape[-1]:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if _linear_parts.backends[0].unfit(x, weight, 1) is not None:
        return False
    return _linear_parts.choose("auto", x, weight, 1).name != "eager"


def linear_parts(x: Tensor, weight: Tensor, parts: int | None = None, *, backend: str = "auto") -> Tensor:
    """A product x W^T in parts of K, whose sum it is.

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        weight: (N, K), dtype of x.
        parts: P, how many: each of K / P entries, rounded up to a multiple of 64, so that the last may have less or
            none. None is what keeps a large GPU busy.
        backend: "auto", "triton" (half precision, K a multiple of 16) or "eager".

    Returns:
        (P, ..., N) float32, float64 for float64.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, parts below 1, where gradients are recorded, and for an unknown
            backend or one that does not fit.

    Note:
        No gradient, never under autocast, no host sync; may be captured in a CUDA graph. Bit-equal between runs.
    """
    function = "linear_parts"
    _checks.check_tensor(function, "x", x)
    _checks.check_tensor(function, "weight", weight, (x.dtype,))
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must be (N, K), got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs or not inputs:
        raise ValueError(f"{function}: x must be (..., {inputs}) to match weight, got {tuple(x.shape)}")
    _checks.check_same_device(function, "weight", weight, "x", x)
    if parts is None:
        parts = parts_of(x.numel() // inputs, outputs, inputs)
    _checks.check_integer(function, "parts", parts, 1)
    _check_no_gradient(function, x, weight)
    return _linear_parts(x, weight, parts, backend)


def parts_of(rows: int, outputs: int, inputs: int) -> int:
    """Parts of K for which programs of 64 outputs and up to 64 rows are two for each of an H100's multiprocessors, or
    nearly, with four steps of K at least to each."""
    programs = -(-outputs // 64) * -(-rows // 64)
    return max(1, min(inputs // (4 * STEP), round(264 / programs)))


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
