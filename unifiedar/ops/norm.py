"""The norms of transformer blocks: of queries and keys before attention, and of tokens before a layer.

Queries and keys get a norm, a gain, a rotation by position, and one rounding:

    L2:   y = x / max(|x|, eps);  of queries times exp(min(gain, log 100)), the gain one a head
    RMS:  y = x / sqrt(mean x^2 + eps) * weight
    RoPE: (y_2i, y_2i+1) turned by the angle whose cosine and sine the table holds for the token and pair i

Everything is float32 (float64 for float64) and rounded once, at the end, where models under autocast round too: just
before the product of queries and keys. Shapes: q (B, H, L, D), k (B, G, L, D).

Tokens get a layer norm that a condition modulates, after what the layer before put out was added through a gate:

    x' = x + branch * gate;  y = (x' - mean) / sqrt(variance + eps) * (1 + scale) + shift

Sources: the gain of cosine attention, Liu et al., "Swin Transformer V2" (2022), section 3.3, as VAR (2024) and Infinity
(2024) have it; Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4; Su et al., "RoFormer"
(2021), section 3.2.2; layer norm modulated and gated by a condition, Peebles and Xie, "Scalable Diffusion Models with
Transformers" (2023), section 3.2, as VAR has it (2024, section 3.2).
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["modulated_norm", "packed_norm_rope", "qk_norm_rope"]

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


def _packed_eager(grad_q, grad_k, grad_v, qkv, norm, eps, gain, q_weight, k_weight, rope):
    found = _packed_fake(grad_q, grad_k, grad_v, qkv, norm, eps, gain, q_weight, k_weight, rope)
    new_q, new_k, new_v = unpacked(found[0])
    q, k, _ = unpacked(qkv)
    _one_backward_eager(grad_q, q, norm, eps, gain, q_weight, rope, new_q, found[1], found[2])
    _one_backward_eager(grad_k, k, norm, eps, None, k_weight, rope, new_k, None, found[3])
    _put(grad_v, new_v)
    return found


def _put(grad: Tensor | None, place: Tensor) -> None:
    if grad is None:
        place.zero_()
    else:
        place.copy_(grad)


def _out_eager(q, k, v, norm, eps, gain, q_weight, k_weight, rope, out_q, out_k, out_v) -> None:
    # Both are computed before either is written: the outputs may be the inputs.
    new_q = _one_eager(q, norm, eps, gain, q_weight, rope)
    new_k = _one_eager(k, norm, eps, None, k_weight, rope)
    out_q.copy_(new_q)
    out_k.copy_(new_k)
    if v is not None:
        out_v.copy_(v)


def _widest(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32


def _modulated_eager(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = _widest(x, scale, shift)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (y * (1 + scale.to(wide))[:, None] + shift.to(wide)[:, None]).to(dtype).contiguous()


def _gated_eager(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = _widest(x, branch, gate) if bias is None else _widest(x, branch, gate, bias)
    joined = branch.to(wide) if bias is None else branch.to(wide) + bias.to(wide)
    new = (x.to(wide) + joined * gate.to(wide)[:, None]).to(x.dtype).contiguous()
    return _modulated_eager(new, scale, shift, eps, dtype), new


def _modulated_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and, (2, B, C), of scale and shift, not rounded yet."""
    wide = _widest(grad, x, scale)
    tokens, grad, size = x.to(wide), grad.to(wide), x.shape[-1:]
    with torch.autocast(x.device.type, enabled=False):
        y, mean, rstd = torch.native_layer_norm(tokens, size, None, None, eps)
        inner = grad * (1 + scale.to(wide))[:, None]
        found = torch.ops.aten.native_layer_norm_backward(
            inner.contiguous(), tokens, size, mean, rstd, None, None, [True, False, False]
        )[0]
    return found, torch.stack(((grad * y).sum(1), grad.sum(1)))


def _tokens_backward_eager(
    grad: Tensor,
    grad_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    eps: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and branch in their dtypes; not rounded of scale, shift and, with a branch, gate, (2 or 3, B, C),
    and of bias; empty for what is None."""
    found, vectors = _modulated_backward(grad, x, scale, eps)
    none = found.new_empty(0)
    if branch is None or gate is None or grad_new is None:
        return found.to(x.dtype), x.new_empty(0), vectors, none
    found = found + grad_new.to(found.dtype)
    grad_branch = found * gate.to(found.dtype)[:, None]
    joined = branch.to(found.dtype) if bias is None else branch.to(found.dtype) + bias.to(found.dtype)
    vectors = torch.cat((vectors, (found * joined).sum(1)[None]))
    grad_bias = none if bias is None else grad_branch.sum((0, 1))
    return found.to(x.dtype), grad_branch.to(branch.dtype), vectors, grad_bias


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


def _packed_fake(grad_q, grad_k, grad_v, qkv, norm, eps, gain, q_weight, k_weight, rope):
    vectors = [_none_like(one, qkv) for one in (gain, q_weight, k_weight)]
    return qkv.new_empty(qkv.shape), *vectors


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


def unpacked(qkv: Tensor) -> tuple[Tensor, ...]:
    """Views (B, H, L, D) of a packed projection's (B, L, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


class _Packed(torch.autograd.Function):
    """`qk_norm_rope` of a packed projection, whose gradient is put together by what computes its parts. Values are a
    view, which no torch operator may return."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *settings: Any) -> tuple[Tensor, ...]:
        norm, eps, gain, q_weight, k_weight, rope, backend = settings
        q, k, v = unpacked(qkv)
        ctx.save_for_backward(qkv, gain, q_weight, k_weight, rope)
        ctx.settings = norm, eps, backend
        ctx.set_materialize_grads(False)
        return *_qk_norm_rope(q, k, *settings), v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, gain, q_weight, k_weight, rope = ctx.saved_tensors
        norm, eps, backend = ctx.settings
        if all(one is None for one in grads):
            return (None,) * 8
        new, *rest = _packed_backward(*grads, qkv, norm, eps, gain, q_weight, k_weight, rope, backend)
        given = [one if old is not None else None for old, one in zip((gain, q_weight, k_weight), rest, strict=True)]
        return new, None, None, *given, None, None


def _modulated_fake(x, scale, shift, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _gated_fake(x, branch, gate, scale, shift, eps, dtype, bias):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape)


def _modulated_setup(ctx, inputs, output):
    x, scale, shift, ctx.eps, _ = inputs
    ctx.save_for_backward(x, scale, shift)


def _modulated_gradient(ctx, grad):
    x, scale, shift = ctx.saved_tensors
    grad_x, _, vectors, _ = _tokens_backward(grad, None, x, None, None, scale, ctx.eps, None, "auto")
    return grad_x, *_rounded(vectors, scale, shift), None, None


def _rounded(vectors: Tensor, *like: Tensor) -> list[Tensor]:
    """Each in the dtype of its like, in one launch where that is the same for all."""
    if len({one.dtype for one in like}) == 1:
        vectors = vectors.to(like[0].dtype)
    return [one.to(other.dtype) for one, other in zip(vectors, like, strict=True)]


def _gated_setup(ctx, inputs, output):
    _, branch, gate, scale, shift, ctx.eps, _, bias = inputs
    ctx.save_for_backward(output[1], branch, gate, scale, shift, bias)


def _gated_gradient(ctx, grad, grad_new):
    new, branch, gate, scale, shift, bias = ctx.saved_tensors
    grad_x, grad_branch, vectors, grad_bias = _tokens_backward(
        grad, grad_new, new, branch, gate, scale, ctx.eps, bias, "auto"
    )
    grad_scale, grad_shift, grad_gate = _rounded(vectors, scale, shift, gate)
    of_bias = None if bias is None else grad_bias.to(bias.dtype)
    return grad_x, grad_branch, grad_gate, grad_scale, grad_shift, None, None, of_bias


def _tokens_backward_fake(grad, grad_new, x, branch, gate, scale, eps, bias):
    wide = _widest(grad, x, scale)
    vectors = x.new_empty((2 if branch is None else 3, *scale.shape), dtype=wide)
    return (
        x.new_empty(x.shape),
        _none_like(branch, x),
        vectors,
        x.new_empty(0 if bias is None else bias.shape, dtype=wide),
    )


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


def _packed_unfit_triton(grad_q, grad_k, grad_v, qkv, norm, eps, gain, q_weight, k_weight, rope) -> str | None:
    q, k, _ = unpacked(qkv)
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
    _fill_backward_triton(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope, *outs)
    return outs


def _run_packed_triton(grad_q, grad_k, grad_v, qkv, norm, eps, gain, q_weight, k_weight, rope):
    found = _packed_fake(grad_q, grad_k, grad_v, qkv, norm, eps, gain, q_weight, k_weight, rope)
    q, k, _ = unpacked(qkv)
    new_q, new_k, new_v = unpacked(found[0])
    _fill_backward_triton(grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope, new_q, new_k, *found[1:])
    _put(grad_v, new_v)
    return found


def _fill_backward_triton(
    grad_q, grad_k, q, k, norm, eps, gain, q_weight, k_weight, rope, new_q, new_k, of_gain, of_q, of_k
) -> None:
    if not q.shape[0] * q.shape[2] * q.shape[3]:
        for one in (new_q, new_k, of_gain, of_q, of_k):
            one.zero_()
        return
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
            _flat(gain), _flat(q_weight), _flat(k_weight), _table(rope), new_q, new_k, parts_gain, parts_q, parts_k,
        )  # fmt: skip
    for out, parts, over in ((of_gain, parts_gain, (0, 2)), (of_q, parts_q, (0,)), (of_k, parts_k, (0,))):
        if parts is not None:
            out.copy_(parts.sum(over))


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


MAX_WIDTH = 8192


def _modulated_unfit_triton(x, scale, shift, eps, dtype) -> str | None:
    return _tokens_unfit(dtype, x, scale, shift)


def _gated_unfit_triton(x, branch, gate, scale, shift, eps, dtype, bias) -> str | None:
    return _tokens_unfit(dtype, x, branch, gate, scale, shift, *(() if bias is None else (bias,)))


def _tokens_unfit(dtype: torch.dtype, x: Tensor, *others: Tensor) -> str | None:
    reason = None
    for one in (x, *others):
        reason = reason or _native.triton_unfit(one)
    for found in (x.dtype, dtype, *(one.dtype for one in others)):
        if reason is None and found not in (torch.float32, torch.bfloat16, torch.float16):
            reason = f"needs float32, bfloat16 or float16, got {str(found).removeprefix('torch.')}"
    if reason is None and x.shape[2] > MAX_WIDTH:
        reason = f"needs at most {MAX_WIDTH} channels, got {x.shape[2]}"
    if reason is None and x.shape[0] * x.shape[1] >= 2**31:
        reason = f"needs fewer than 2^31 tokens, got {tuple(x.shape[:2])}"
    return reason


def _run_modulated_triton(x, scale, shift, eps, dtype):
    out = _modulated_fake(x, scale, shift, eps, dtype)
    _modulate_triton(x, None, None, scale, shift, eps, out, None)
    return out


def _run_gated_triton(x, branch, gate, scale, shift, eps, dtype, bias):
    out, new = _gated_fake(x, branch, gate, scale, shift, eps, dtype, bias)
    _modulate_triton(x, branch, gate, scale, shift, eps, out, new, bias)
    return out, new


def _modulate_triton(x, branch, gate, scale, shift, eps, out, new, bias=None) -> None:
    if out.numel():
        # Rows of the condition are read in place, wherever they begin; the kernel wants their channels side by side.
        gate, scale, shift = (
            one if one is None or one.stride(1) == 1 else one.contiguous() for one in (gate, scale, shift)
        )
        with torch.cuda.device_of(x):
            _native.kernels("norm").modulated_norm(
                x.contiguous(), _flat(branch), gate, scale, shift, eps, out, new, _flat(bias)
            )


def _tokens_backward_unfit_triton(grad, grad_new, x, branch, gate, scale, eps, bias) -> str | None:
    others = [one for one in (grad_new, branch, gate, scale, bias) if one is not None]
    return _tokens_unfit(grad.dtype, x, grad, *others)


def _run_tokens_backward_triton(grad, grad_new, x, branch, gate, scale, eps, bias):
    grad_x, grad_branch, vectors, grad_bias = _tokens_backward_fake(grad, grad_new, x, branch, gate, scale, eps, bias)
    if not x.numel():
        return grad_x, grad_branch, vectors.zero_(), grad_bias.zero_()
    kernels = _native.kernels("norm")
    programs = kernels.token_shares(*x.shape)[0]
    parts = vectors.new_empty((len(vectors) + (bias is not None), len(x), programs, x.shape[2]))
    gate, scale = (one if one is None or one.stride(1) == 1 else one.contiguous() for one in (gate, scale))
    with torch.cuda.device_of(x):
        kernels.modulated_norm_backward(
            grad.contiguous(), _flat(grad_new), x.contiguous(), _flat(branch), gate, scale, eps,
            grad_x, None if branch is None else grad_branch, parts, _flat(bias),
        )  # fmt: skip
    torch.sum(parts[: len(vectors)], 2, out=vectors)
    if bias is not None:  # what was summed up for it has not met the gate yet
        torch.sum(parts[-1].sum(1).mul_(gate), 0, out=grad_bias)
    return grad_x, grad_branch, vectors, grad_bias


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

_packed_backward = Op(
    f"packed_norm_rope_backward(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, Tensor qkv, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    eager=_packed_eager,
    fake=_packed_fake,
    backends=(Backend("triton", _run_packed_triton, _packed_unfit_triton),),
)

_qk_norm_rope_out = Op(
    f"qk_norm_rope_out(Tensor q, Tensor k, Tensor? v, {_SETTINGS}, Tensor(a!) out_q, Tensor(b!) out_k, "
    "Tensor(c!)? out_v) -> ()",
    eager=_out_eager,
    fake=_out_fake,
    backends=(Backend("triton", _fill_triton, _out_unfit_triton),),
)


_MODULATION = "Tensor scale, Tensor shift, float eps, ScalarType dtype"

_tokens_backward = Op(
    "modulated_norm_backward(Tensor grad, Tensor? grad_new, Tensor x, Tensor? branch, Tensor? gate, Tensor scale, "
    "float eps, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor)",
    eager=_tokens_backward_eager,
    fake=_tokens_backward_fake,
    backends=(Backend("triton", _run_tokens_backward_triton, _tokens_backward_unfit_triton),),
)

_modulated_norm = Op(
    f"modulated_norm(Tensor x, {_MODULATION}) -> Tensor",
    eager=_modulated_eager,
    fake=_modulated_fake,
    backends=(Backend("triton", _run_modulated_triton, _modulated_unfit_triton),),
    setup_context=_modulated_setup,
    backward=_modulated_gradient,
)

_gated_modulated_norm = Op(
    f"gated_modulated_norm(Tensor x, Tensor branch, Tensor gate, {_MODULATION}, Tensor? bias) -> (Tensor, Tensor)",
    eager=_gated_eager,
    fake=_gated_fake,
    backends=(Backend("triton", _run_gated_triton, _gated_unfit_triton),),
    setup_context=_gated_setup,
    backward=_gated_gradient,
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
    _check_heads(function, q, k, v)
    settings = _settings(function, q, norm, gain, weights, rope, eps)
    if out is None:
        if v is not None:
            raise ValueError(f"{function}: v must be None without out, which it is copied to, got {tuple(v.shape)}")
        return _qk_norm_rope(q, k, *settings, backend)
    outs = _check_out(function, out, q, k, v, settings[2:5])
    _qk_norm_rope_out(q, k, v, *settings, *outs, *(() if v is not None else (None,)), backend)
    return outs


def packed_norm_rope(
    qkv: Tensor,
    *,
    norm: str | None = "l2",
    gain: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    rope: Tensor | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` of queries, keys and values in one tensor, as one projection puts them out.

    Its gradient is that of the projection's output in one piece, which autograd would put together of slices in two
    copies of the whole.

    Args:
        qkv: (B, L, 3, H, D).
        norm, gain, weights, rope, eps, backend: as `qk_norm_rope` takes them.

    Returns:
        Queries, keys and values (B, H, L, D), the last a view of `qkv`.

    Raises:
        TypeError, ValueError: for a tensor of another shape, else as `qk_norm_rope` does.
    """
    function = "packed_norm_rope"
    _checks.check_tensor(function, "qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.shape[4]:
        raise ValueError(f"{function}: qkv must be (B, L, 3, H, D) with at least one channel, got {tuple(qkv.shape)}")
    q, k, v = unpacked(qkv)
    settings = _settings(function, q, norm, gain, weights, rope, eps)
    # A compiler fuses the copies, and wants to see the views.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return *_qk_norm_rope(q, k, *settings, backend), v
    return _Packed.apply(qkv, *settings, backend)


def _settings(function: str, q: Tensor, norm: Any, gain: Any, weights: Any, rope: Any, eps: Any) -> tuple[Any, ...]:
    """What the operators take besides heads."""
    name = "none" if norm is None else norm
    if name not in NORMS or norm == "none":
        raise ValueError(f"{function}: norm must be 'l2', 'rms' or None, got {norm!r}")
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
    return name, float(eps), gain, q_weight, k_weight, rope


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


@overload
def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    branch: None = None,
    gate: None = None,
    bias: None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor: ...
@overload
def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    branch: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of tokens, scaled and shifted by a condition: what an AdaLN block feeds to attention or MLP.

    y = norm(x) (1 + scale) + shift, without parameters of its own. With `branch` and `gate`, x + branch gate comes
    first: what the layer before put out joins the tokens and they are normalized for the next, in one pass. Its bias
    may be left to this: the bias's gradient then costs no pass of its own.

    Args:
        x: (B, L, C), float32, bfloat16, float16 or float64: the tokens, usually in float32.
        scale: (B, C) of these dtypes, which need not be x's, on the device of x; any strides, as out of a projection.
        shift: (B, C), likewise.
        branch: (B, L, C), likewise, given with `gate`.
        gate: (B, C), likewise, given with `branch`.
        bias: (C,), likewise, added to `branch`, as of a product that left it off; or None.
        eps: added to the variance, at least 0.
        dtype: of y; None is that of x.
        backend: "auto", "triton" or "eager".

    Returns:
        y (B, L, C) in `dtype`; with `branch` also the tokens x + branch gate (B, L, C) in the dtype of x. Contiguous.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, a branch without a gate or a gate without a branch, a negative eps, an
            unknown backend or one that does not fit.

    Note:
        Computed in float32 (float64 if an argument is) and rounded once to `dtype`; of the sum, what is normalized is
        the value that is returned. Never under autocast. Differentiable once in all tensors, by torch's operators. No
        host sync; may be captured in a CUDA graph. Equal for a token alone or among others, and between runs, on
        Triton.
    """
    function = "modulated_norm"
    _checks.check_tensor(function, "x", x)
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"{function}: x must be (B, L, C) with at least one channel, got {tuple(x.shape)}")
    rows = (x.shape[0], x.shape[2])
    given: dict[str, Tensor] = {"scale": scale, "shift": shift}
    given |= {name: one for name, one in (("branch", branch), ("gate", gate), ("bias", bias)) if one is not None}
    for argument, value in given.items():
        _checks.check_tensor(function, argument, value)
        shape = {"branch": tuple(x.shape), "bias": rows[1:]}.get(argument, rows)
        if value.shape != shape:
            raise ValueError(f"{function}: {argument} must be {shape} to match x, got {tuple(value.shape)}")
        _checks.check_same_device(function, argument, value, "x", x)
    _checks.check_number(function, "eps", eps, 0)
    if dtype is None:
        dtype = x.dtype
    elif dtype not in _checks.FLOATS:
        raise TypeError(f"{function}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if branch is None and bias is not None:
        raise ValueError(f"{function}: branch must be given with bias, got None")
    if branch is None and gate is None:
        return _modulated_norm(x, scale, shift, float(eps), dtype, backend)
    if branch is None or gate is None:
        one, other = ("gate", "branch") if branch is None else ("branch", "gate")
        raise ValueError(f"{function}: {other} must be given with {one}, got None")
    return _gated_modulated_norm(x, branch, gate, scale, shift, float(eps), dtype, bias, backend)
