"""The products around a transformer's modulated norms, each with what stands before and after it.

    modulated_linear:  y = act(((x - mean) / sqrt(variance + eps) * (1 + scale) + shift) W^T + b)
    gated_linear:      tokens + gate * (x W^T + b)

One scale of few tokens reads all weights of a block for a handful of rows: the weights' bytes are the time, and every
further launch, of a norm or of a sum, costs as much as a small product. So a block is five launches: queries, keys and
values; attention; its projection; the two layers of the MLP. This file joins the families `norm` and `linear`.

Layer norm modulated and gated by a condition: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023),
section 3.2, as VAR has it (2024, section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.norm import MAX_WIDTH, _modulated_eager, _widest

__all__ = ["few_rows", "gated_linear", "modulated_linear"]

FEW_ROWS = 128  # above, a library's products and a norm with the gate in it are faster

# ---- definitions -----------------------------------------------------------------------------------------------------


def _modulated_linear_eager(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float, activated: bool
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(_modulated_eager(x, scale, shift, eps, weight.dtype), weight, bias)
    return F.gelu(y, approximate="tanh") if activated else y


def _gated_linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, gate: Tensor) -> Tensor:
    wide = _widest(x, tokens, gate)
    with torch.autocast(x.device.type, enabled=False):
        branch = F.linear(x, weight, bias)
    return (tokens.to(wide) + branch.to(wide) * gate.to(wide)[:, None]).to(tokens.dtype).contiguous()


# ---- shapes of the outputs -------------------------------------------------------------------------------------------


def _modulated_linear_fake(x, scale, shift, weight, bias, eps, activated):
    return x.new_empty((*x.shape[:2], len(weight)), dtype=weight.dtype)


def _gated_linear_fake(x, weight, bias, tokens, gate):
    return tokens.new_empty(tokens.shape)


# ---- backends --------------------------------------------------------------------------------------------------------


def _modulated_unfit_triton(x, scale, shift, weight, bias, eps, activated) -> str | None:
    return _unfit_triton(weight, x, scale, shift, bias)


def _gated_unfit_triton(x, weight, bias, tokens, gate) -> str | None:
    return _unfit_triton(weight, x, tokens, gate, bias)


def _unfit_triton(weight: Tensor, *others: Tensor | None) -> str | None:
    reason = None
    for one in (weight, *others):
        reason = reason or (None if one is None else _native.triton_unfit(one))
    if reason is None and weight.dtype not in (torch.bfloat16, torch.float16):
        return f"needs weights in bfloat16 or float16, got {str(weight.dtype).removeprefix('torch.')}"
    if reason is None and any(one is not None and one.dtype == torch.float64 for one in others):
        return "needs no float64"
    inputs = weight.shape[1]
    pack = 0 if reason else _native.kernels("linear_modulated").PACK
    if reason is None and (inputs % pack or not inputs):
        return f"needs K a multiple of {pack}, got {inputs}"
    if reason is None and inputs > 4 * MAX_WIDTH:
        return f"needs at most {4 * MAX_WIDTH} entries, got {inputs}"
    if reason is None and (not weight.is_contiguous() or weight.data_ptr() % 16):
        return f"needs contiguous weights aligned to 16 bytes, got strides {tuple(weight.stride())}"
    return reason


def _flat(x: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _run_modulated_triton(x, scale, shift, weight, bias, eps, activated):
    out = _modulated_linear_fake(x, scale, shift, weight, bias, eps, activated)
    if out.numel():
        with torch.cuda.device_of(x):
            _native.kernels("linear_modulated").modulated_linear(
                _flat(x), _rows(scale), _rows(shift), eps, weight, None if bias is None else bias.contiguous(),
                activated, out,
            )  # fmt: skip
    return out


def _run_gated_triton(x, weight, bias, tokens, gate):
    out = _gated_linear_fake(x, weight, bias, tokens, gate)
    if out.numel():
        with torch.cuda.device_of(x):
            _native.kernels("linear_modulated").gated_linear(
                _flat(x), weight, None if bias is None else bias.contiguous(), _flat(tokens), _rows(gate), out
            )
    return out


_UNTRIED = "not run on a GPU yet"

_modulated_linear = Op(
    "modulated_linear(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, float eps, bool activated) "
    "-> Tensor",
    eager=_modulated_linear_eager,
    fake=_modulated_linear_fake,
    backends=(Backend("triton", _run_modulated_triton, _modulated_unfit_triton, on_request=_UNTRIED),),
)

_gated_linear = Op(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor tokens, Tensor gate) -> Tensor",
    eager=_gated_linear_eager,
    fake=_gated_linear_fake,
    backends=(Backend("triton", _run_gated_triton, _gated_unfit_triton, on_request=_UNTRIED),),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def few_rows(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> bool:
    """Whether these operators are the faster way for tokens x (B, L, C): few enough of them, and a kernel for it.

    While compiling, which sees no addresses, never.
    """
    if torch.compiler.is_compiling() or x.shape[0] * x.shape[1] > FEW_ROWS:
        return False
    call = (x, scale, shift, weight, None, 0.0, False)
    if _modulated_linear.backends[0].unfit(*call) is not None:
        return False
    return _modulated_linear.choose("auto", *call).name != "eager"


def modulated_linear(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """A linear layer of normalized and modulated tokens, perhaps with GELU after it.

    Args:
        x: (B, L, K), the tokens: float32, bfloat16, float16 or float64.
        scale: (B, K) floats, of any strides, such as a row of what a condition's layer puts out; 1 is added to it.
        shift: (B, K), likewise.
        weight: (N, K) floats; the product runs in its dtype.
        bias: (N,) like weight, or None.
        activation: None or "gelu", in its form with tanh.
        eps: added to the variance, at least 0.
        backend: "auto", "triton" (weights in half precision, K a multiple of 16) or "eager".

    Returns:
        (B, L, N), contiguous, in the dtype of weight.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an unknown activation, a negative eps, where gradients are recorded,
            and for an unknown backend or one that does not fit.

    Note:
        What is multiplied is `modulated_norm`'s result, rounded once to the dtype of weight. The kernel rounds what
        comes after once, at the end; "eager" rounds before GELU too. No gradient, never under autocast, no host sync;
        may be captured in a CUDA graph. Equal between runs.
    """
    function = "modulated_linear"
    _checks.check_tensor(function, "x", x)
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"{function}: x must be (B, L, K) with at least one channel, got {tuple(x.shape)}")
    _check_product(function, x, weight, bias)
    given = {"scale": scale, "shift": shift}
    for name, one in given.items():
        _check_like(function, name, one, (x.shape[0], x.shape[2]), x)
    if activation not in (None, "gelu"):
        raise ValueError(f"{function}: activation must be None or 'gelu', got {activation!r}")
    _checks.check_number(function, "eps", eps, 0)
    _check_no_gradient(function, x, scale, shift, weight, bias)
    return _modulated_linear(x, scale, shift, weight, bias, float(eps), activation is not None, backend)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, gate: Tensor, *, backend: str = "auto"
) -> Tensor:
    """A linear layer, multiplied by a gate and added to the tokens.

    Args:
        x: (B, L, K), dtype of weight.
        weight: (N, K) float32, bfloat16, float16 or float64.
        bias: (N,) like weight, or None.
        tokens: (B, L, N) floats.
        gate: (B, N) floats, of any strides.
        backend: "auto", "triton" (weights in half precision, K a multiple of 16) or "eager".

    Returns:
        (B, L, N), contiguous, in the dtype of tokens.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, where gradients are recorded, and for an unknown backend or one that
            does not fit.

    Note:
        The kernel rounds once, at the end; "eager" rounds the product to its dtype before. No gradient, never under
        autocast, no host sync; may be captured in a CUDA graph. Equal between runs.
    """
    function = "gated_linear"
    _checks.check_tensor(function, "weight", weight)
    _checks.check_tensor(function, "x", x, (weight.dtype,))
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"{function}: x must be (B, L, K) with at least one channel, got {tuple(x.shape)}")
    _check_product(function, x, weight, bias)
    _check_like(function, "tokens", tokens, (*x.shape[:2], len(weight)), x)
    _check_like(function, "gate", gate, (x.shape[0], len(weight)), x)
    _check_no_gradient(function, x, weight, bias, tokens, gate)
    return _gated_linear(x, weight, bias, tokens, gate, backend)


def _check_product(function: str, x: Tensor, weight: Any, bias: Any) -> None:
    _checks.check_tensor(function, "weight", weight)
    if weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"{function}: weight must be (N, {x.shape[2]}) to match x, got {tuple(weight.shape)}")
    _checks.check_same_device(function, "weight", weight, "x", x)
    if bias is not None:
        _checks.check_tensor(function, "bias", bias, (weight.dtype,))
        if tuple(bias.shape) != (len(weight),):
            raise ValueError(f"{function}: bias must be ({len(weight)},) to match weight, got {tuple(bias.shape)}")
        _checks.check_same_device(function, "bias", bias, "x", x)


def _check_like(function: str, argument: str, value: Any, shape: tuple[int, ...], x: Tensor) -> None:
    _checks.check_tensor(function, argument, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{function}: {argument} must be {shape} to match x, got {tuple(value.shape)}")
    _checks.check_same_device(function, argument, value, "x", x)


def _check_no_gradient(function: str, *given: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given):
        raise ValueError(f"{function}: tensors must not need a gradient, which they would not get: use torch.no_grad()")
