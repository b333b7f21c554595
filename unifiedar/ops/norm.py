"""What happens to queries and keys before attention: a norm, a gain, a rotation by position, one rounding.

    L2:   y = x / max(|x|, eps);  of queries times exp(min(gain, log 100)), the gain one a head
    RMS:  y = x / sqrt(mean x^2 + eps) * weight
    RoPE: (y_2i, y_2i+1) turned by the angle whose cosine and sine the table holds for the token and pair i

Everything is float32 (float64 for float64) and rounded once, at the end, where models under autocast round too: just
before the product of queries and keys. Shapes: q (B, H, L, D), k (B, G, L, D).

Sources: the gain of cosine attention, Liu et al., "Swin Transformer V2" (2022), section 3.3, as VAR (2024) and Infinity
(2024) have it; Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4; Su et al., "RoFormer"
(2021), section 3.2.2.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["qk_norm_rope"]

LOG_GAIN_LIMIT = math.log(100)
NORMS = ("l2", "rms", "none")
_EPS = {"l2": 1e-12, "rms": 1e-6, "none": 0.0}


# ---- definitions -----------------------------------------------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _factor(gain: Tensor, wide: torch.dtype) -> Tensor:
    """(H, 1, 1); a gain in half precision is cut at the limit as rounded to it."""
    return gain.clamp_max(LOG_GAIN_LIMIT).to(wide).exp()[:, None, None]


def _length(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


def _root(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _turn(x: Tensor, rope: Tensor, back: bool = False) -> Tensor:
    """Turns neighbouring channels by the table's angles (2, L, D / 2), or back."""
    cosine, sine = rope.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    if back:
        sine = -sine
    return torch.stack((cosine * even - sine * odd, sine * even + cosine * odd), -1).flatten(-2)


def _one_eager(x: Tensor, norm: str, eps: float, gain: Tensor | None, weight: Tensor | None, rope: Tensor | None):
    """Queries or keys, not rounded yet."""
    wide = _accumulator(x.dtype)
    y = x.to(wide)
    if norm == "l2":
        y = y / _length(y, eps)
    elif norm == "rms":
        y = y * _root(y, eps)
    if gain is not None:
        y = y * _factor(gain, wide)
    if weight is not None:
        y = y * weight.to(wide)
    return y if rope is None else _turn(y, rope)


def _qk_eager(
    q: Tensor,
    k: Tensor,
    norm: str,
    eps: float,
    gain: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out_q, out_k = _qk_fake(q, k, norm, eps, gain, q_weight, k_weight, rope)
    out_q.copy_(_one_eager(q, norm, eps, gain, q_weight, rope))
    return out_q, out_k.copy_(_one_eager(k, norm, eps, None, k_weight, rope))


def _one_backward_eager(
    grad: Tensor | None,
    x: Tensor,
    norm: str,
    eps: float,
    gain: Tensor | None,
    weight: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
    out_gain: Tensor | None,
    out_weight: Tensor,
) -> None:
    """Fills the gradients of x, gain and weight."""
    if grad is None:
        for one in (out, out_gain, out_weight):
            if one is not None:
                one.zero_()
        return
    wide = _accumulator(x.dtype)
    y, grad = x.to(wide), grad.to(wide)
    if rope is not None:
        grad = _turn(grad, rope, back=True)
    inverse = y.new_ones(()) if norm == "none" else 1 / _length(y, eps) if norm == "l2" else _root(y, eps)
    moves = inverse < 1 / eps if norm == "l2" and eps else torch.ones_like(inverse, dtype=torch.bool)
    y = y * inverse  # of length 1, or of mean square 1
    if gain is not None and out_gain is not None:
        factor = _factor(gain, wide)
        within = gain <= gain.clamp_max(LOG_GAIN_LIMIT)
        out_gain.copy_(((grad * y).sum((0, 2, 3)) * factor.flatten()).where(within, 0))
        grad = grad * factor
    if weight is not None:
        out_weight.copy_((grad * y).sum((0, 1, 2)))
        grad = grad * weight.to(wide)
    if norm == "l2":
        grad = (grad - (y * (grad * y).sum(-1, keepdim=True)).where(moves, 0)) * inverse
    elif norm == "rms":
        grad = (grad - y * (grad * y).mean(-1, keepdim=True)) * inverse
    out.copy_(grad)


def _qk_backward_eager(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope):
    outs = _qk_backward_fake(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope)
    _one_backward_eager(grad_q, q, norm, eps, gain, q_weight, rope, outs[0], outs[2], outs[3])
    _one_backward_eager(grad_k, k, norm, eps, None, k_weight, rope, outs[1], None, outs[4])
    return outs


def _out_eager(q, k, v, norm, eps, gain, q_weight, k_weight, rope, out_q, out_k, out_v) -> None:
    # Both are computed before either is written: the outputs may be the inputs.
    new_q = _one_eager(q, norm, eps, gain, q_weight, rope)
    new_k = _one_eager(k, norm, eps, None, k_weight, rope)
    out_q.copy_(new_q)
    out_k.copy_(new_k)
    if v is not None:
        out_v.copy_(v)


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    """Like x and in its memory order, as far as that has channels innermost."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def _none_like(x: Tensor | None, other: Tensor) -> Tensor:
    """Like x; without one, empty: an operator returns a tensor in any case."""
    return other.new_empty(0) if x is None else x.new_empty(x.shape)


def _qk_fake(q, k, norm, eps, gain, q_weight, k_weight, rope):
    return _like(q), _like(k)


def _qk_backward_fake(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope):
    return _like(q), _like(k), _none_like(gain, q), _none_like(q_weight, q), _none_like(k_weight, q)


def _out_fake(q, k, v, norm, eps, gain, q_weight, k_weight, rope, out_q, out_k, out_v) -> None:
    return None


def _qk_setup(ctx, inputs, output):
    q, k, ctx.norm, ctx.eps, gain, q_weight, k_weight, rope = inputs
    ctx.save_for_backward(q, k, gain, q_weight, k_weight, rope)
    ctx.set_materialize_grads(False)


def _qk_gradient(ctx, grad_q, grad_k):
    if grad_q is None and grad_k is None:
        return (None,) * 8
    q, k, gain, q_weight, k_weight, rope = ctx.saved_tensors
    new_q, new_k, *rest = _qk_norm_rope_backward(
        grad_q, grad_k, q, k, ctx.norm, ctx.eps, gain, q_weight, k_weight, rope, ctx.backend
    )
    given = [new if one is not None else None for one, new in zip((gain, q_weight, k_weight), rest, strict=True)]
    return new_q, new_k, None, None, *given, None


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit_triton(q, k, norm, eps, gain, q_weight, k_weight, rope) -> str | None:
    reason = _native.triton_unfit(q)
    if reason is None and q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    if reason is None and (q.shape[3] % 8 or not 8 <= q.shape[3] <= 256):
        return f"needs a head size that is a multiple of 8 from 8 to 256, got {q.shape[3]}"
    if reason is None and q.shape[0] * (q.shape[1] + 2 * k.shape[1]) * (q.shape[2] + 1) >= 2**31:
        return f"needs fewer than 2^31 rows, got {tuple(q.shape[:3])}"
    return reason


def _backward_unfit_triton(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope) -> str | None:
    return _unfit_triton(q, k, norm, eps, gain, q_weight, k_weight, rope)


def _out_unfit_triton(q, k, v, norm, eps, gain, q_weight, k_weight, rope, out_q, out_k, out_v) -> str | None:
    reason = _unfit_triton(q, k, norm, eps, gain, q_weight, k_weight, rope)
    if reason is None:
        aligned = _native.kernels("norm").aligned
        for one in (out_q, out_k, out_v):
            if one is not None and not aligned(one):
                return (
                    "needs outputs aligned to 16 bytes, the last dimension contiguous and the other strides multiples "
                    f"of 8, got strides {tuple(one.stride())}"
                )
    return reason


def _readable(x: Tensor | None) -> Tensor | None:
    """The kernels take any strides of whole units of 8 elements, with a contiguous last dimension."""
    if x is None or _native.kernels("norm").aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _table(rope: Tensor | None) -> Tensor | None:
    return rope if rope is None or rope.stride(2) == 1 else rope.contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fill_triton(q, k, v, norm, eps, gain, q_weight, k_weight, rope, out_q, out_k, out_v) -> None:
    if q.numel() or k.numel():
        with torch.cuda.device_of(q):
            _native.kernels("norm").qk_norm_rope(
                _readable(q), _readable(k), _readable(v), norm, eps, _flat(gain), _flat(q_weight), _flat(k_weight),
                _table(rope), out_q, out_k, out_v,
            )  # fmt: skip


def _run_qk_triton(q, k, norm, eps, gain, q_weight, k_weight, rope):
    outs = _qk_fake(q, k, norm, eps, gain, q_weight, k_weight, rope)
    _fill_triton(q, k, None, norm, eps, gain, q_weight, k_weight, rope, *outs, None)
    return outs


def _run_backward_triton(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope):
    outs = _qk_backward_fake(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope)
    if not q.shape[0] * q.shape[2] * q.shape[3]:
        for one in outs:
            one.zero_()
        return outs
    kernels, (heads, groups, width) = _native.kernels("norm"), (q.shape[1], k.shape[1], q.shape[3])
    tiles = kernels.tiles(q)
    # A program sums what it sees of a gain or weight; those parts are added up here, in one order.
    parts_gain = None if gain is None else q.new_empty((q.shape[0], heads, tiles), dtype=torch.float32)
    parts_q, parts_k = (
        None if weight is None else q.new_empty((q.shape[0] * count * tiles, width), dtype=torch.float32)
        for weight, count in ((q_weight, heads), (k_weight, groups))
    )
    with torch.cuda.device_of(q):
        kernels.qk_norm_rope_backward(
            _readable(_given(grad_q, q)), _readable(_given(grad_k, k)), _readable(q), _readable(k), norm, eps,
            _flat(gain), _flat(q_weight), _flat(k_weight), _table(rope), outs[0], outs[1], parts_gain, parts_q, parts_k,
        )  # fmt: skip
    for out, parts, over in ((outs[2], parts_gain, (0, 2)), (outs[3], parts_q, (0,)), (outs[4], parts_k, (0,))):
        if parts is not None:
            out.copy_(parts.sum(over))
    return outs


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


# ---- operators -------------------------------------------------------------------------------------------------------

_SETTINGS = "str norm, float eps, Tensor? gain, Tensor? q_weight, Tensor? k_weight, Tensor? rope"

_qk_norm_rope = Op(
    f"qk_norm_rope(Tensor q, Tensor k, {_SETTINGS}) -> (Tensor, Tensor)",
    eager=_qk_eager,
    fake=_qk_fake,
    backends=(Backend("triton", _run_qk_triton, _unfit_triton),),
    setup_context=_qk_setup,
    backward=_qk_gradient,
)

_qk_norm_rope_backward = Op(
    f"qk_norm_rope_backward(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    eager=_qk_backward_eager,
    fake=_qk_backward_fake,
    backends=(Backend("triton", _run_backward_triton, _backward_unfit_triton),),
)

_qk_norm_rope_out = Op(
    f"qk_norm_rope_out(Tensor q, Tensor k, Tensor? v, {_SETTINGS}, Tensor(a!) out_q, Tensor(b!) out_k, "
    "Tensor(c!)? out_v) -> ()",
    eager=_out_eager,
    fake=_out_fake,
    backends=(Backend("triton", _fill_triton, _out_unfit_triton),),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    norm: str | None = "l2",
    gain: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    rope: Tensor | None = None,
    eps: float | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Queries and keys, normalized and turned by their positions, in one pass and with one rounding.

    Args:
        q: (B, H, L, D), float32, bfloat16, float16 or float64; any strides, as out of a fused projection. (The kernels
            copy one whose last dimension is not contiguous, or whose other strides are not multiples of 8.)
        k: (B, G, L, D), dtype and device of q.
        v: (B, G, L, D), like k, with `out` alone: values that are copied into out[2].
        norm: "l2" (cosine attention; softmax_scale is 1 then), "rms" or None.
        gain: (H,) floats, the logarithm of what queries are multiplied by after the L2 norm, cut at log 100; None is 1.
        weights: two tensors (D,), of queries and keys, with norm "rms"; None is 1.
        rope: (2, L, D / 2), cosines and sines of the angle of every token and pair of neighbouring channels, float32
            or float64: rows of a larger table are a slice of it. Not differentiable. None turns nothing.
        eps: least length with "l2" (default 1e-12), added to the mean square with "rms" (default 1e-6), at least 0.
        out: (out_q, out_k), or (out_q, out_k, out_v) with v: tensors like q, k and v to be filled, of any strides (for
            "triton", as described at q), such as the place of new tokens in a preallocated cache. They may be the
            inputs, but must not overlap with them otherwise, nor with each other. None allocates new ones.
        backend: "auto", "triton" or "eager".

    Returns:
        The new q and k, in the memory order of the old ones if D is innermost there, or `out` as a tuple.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, a gain, weights, values or eps that do not belong to the norm or to
            `out`, an unknown norm or backend or one that does not fit, and for `out` where gradients are recorded.

    Note:
        Differentiable once in q, k, gain and weights, without `out`. A gain at the limit still gets its gradient, one
        beyond gets 0. Never under autocast. No host sync; the gradients of gain and weights are added up in a fixed
        order.
    """
    function = "qk_norm_rope"
    name = "none" if norm is None else norm
    if name not in NORMS or norm == "none":
        raise ValueError(f"{function}: norm must be 'l2', 'rms' or None, got {norm!r}")
    _check_heads(function, q, k, v)
    if gain is not None:
        _check_vector(function, "gain", gain, q, q.shape[1], "one a head of q")
        if name != "l2":
            raise ValueError(f"{function}: gain must be None unless norm is 'l2', got it with {norm!r}")
    if weights is None:
        q_weight = k_weight = None
    else:
        if name != "rms":
            raise ValueError(f"{function}: weights must be None unless norm is 'rms', got them with {norm!r}")
        if not isinstance(weights, (tuple, list)):
            raise TypeError(f"{function}: weights must be a pair of tensors, got {type(weights).__name__}")
        if len(weights) != 2:
            raise ValueError(f"{function}: weights must be a pair of tensors, got {len(weights)}")
        q_weight, k_weight = weights
        for i, weight in enumerate(weights):
            _check_vector(function, f"weights[{i}]", weight, q, q.shape[3], "one a channel")
    if rope is not None:
        _check_rope(function, rope, q)
    if eps is None:
        eps = _EPS[name]
    elif norm is None:
        raise ValueError(f"{function}: eps must be None without a norm, got {eps}")
    else:
        _checks.check_number(function, "eps", eps, 0)
    settings = (name, float(eps), gain, q_weight, k_weight, rope)
    if out is None:
        if v is not None:
            raise ValueError(f"{function}: v must be None without out, which it is copied to, got {tuple(v.shape)}")
        return _qk_norm_rope(q, k, *settings, backend)
    outs = _check_out(function, out, q, k, v, (gain, q_weight, k_weight))
    _qk_norm_rope_out(q, k, v, *settings, *outs, *(() if v is not None else (None,)), backend)
    return outs


def _check_heads(function: str, q: Any, k: Any, v: Any) -> None:
    _checks.check_heads(function, q=q, k=k, **({} if v is None else {"v": v}))
    batch, _, length, width = q.shape
    if width < 1:
        raise ValueError(f"{function}: q must have at least one channel, got {tuple(q.shape)}")
    if (k.shape[0], *k.shape[2:]) != (batch, length, width):
        raise ValueError(f"{function}: k must be ({batch}, heads, {length}, {width}) to match q, got {tuple(k.shape)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"{function}: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")


def _check_vector(function: str, argument: str, value: Any, q: Tensor, size: int, what: str) -> None:
    _checks.check_tensor(function, argument, value)
    _checks.check_same_device(function, argument, value, "q", q)
    if value.shape != (size,):
        raise ValueError(f"{function}: {argument} must be ({size},), {what}, got {tuple(value.shape)}")


def _check_rope(function: str, rope: Any, q: Tensor) -> None:
    _checks.check_tensor(function, "rope", rope, (torch.float32, torch.float64))
    _checks.check_same_device(function, "rope", rope, "q", q)
    if q.shape[3] % 2:
        raise ValueError(f"{function}: q must have an even number of channels to be turned, got {q.shape[3]}")
    if rope.shape != (2, q.shape[2], q.shape[3] // 2):
        raise ValueError(
            f"{function}: rope must be (2, {q.shape[2]}, {q.shape[3] // 2}) to match q, got {tuple(rope.shape)}"
        )
    if rope.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{function}: rope must not require a gradient, which it would not get")


def _check_out(
    function: str, out: Any, q: Tensor, k: Tensor, v: Tensor | None, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    inputs = (q, k) if v is None else (q, k, v)
    if not isinstance(out, (tuple, list)):
        raise TypeError(f"{function}: out must be a tuple of tensors, got {type(out).__name__}")
    if len(out) != len(inputs):
        raise ValueError(f"{function}: out must be {len(inputs)} tensors, one for each of q, k and v, got {len(out)}")
    for i, (one, like) in enumerate(zip(out, inputs, strict=True)):
        _checks.check_tensor(function, f"out[{i}]", one, (q.dtype,))
        _checks.check_same_device(function, f"out[{i}]", one, "q", q)
        if one.shape != like.shape:
            raise ValueError(f"{function}: out[{i}] must be {tuple(like.shape)}, got {tuple(one.shape)}")
    if torch.is_grad_enabled():
        for one in (*inputs, *parameters, *out):
            if one is not None and one.requires_grad:
                raise ValueError(
                    f"{function}: out must be None where a gradient is to be recorded, got {len(out)} tensors: use "
                    "torch.no_grad()"
                )
    return tuple(out)
