"""Attention of one more scale over a cache: queries and keys normalized, keys and values kept, all seen, in one pass.

    q' = gain q / |q|,  k' = k / |k|  (or as they are);  cache[begin : begin + L] = k', v
    out_i = sum_j softmax_j(softmax_scale q'_i . cache_k[j]) cache_v[j],  over all j < begin + L

It is `qk_norm_rope` into a cache and then `block_causal_attention` over it, and computes what they compute: queries and
keys are rounded where those two round them. These are two launches of a few microseconds each for every layer and
scale, most of which is waiting; where a scale has many tiles of queries they are the faster way, and what "auto" takes.
This file joins the two families; nothing else does.

VAR: Tian et al., "Visual Autoregressive Modeling" (2024), section 3.2; the gain as in `ops.norm`.
"""

import os

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import VARIABLE, Backend, Op
from unifiedar.ops.attention import _attend, _attention_unfit_triton, _like, _readable, block_causal_attention
from unifiedar.ops.norm import _EPS, _check_heads, _check_vector, _out_eager, qk_norm_rope

__all__ = ["cached_attention"]

# Queries of a tile, and tiles that an H100 runs at once. A scale of one tile wins in one kernel however many rows draw,
# by a quarter to a half; of more, where all run at once, as each reads and norms the keys that the others do.
TILE = 64
FEW_PROGRAMS = 120


def _cached_eager(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, begin: int, norm: str, gain: Tensor | None, softmax_scale: float
) -> Tensor:
    end = begin + q.shape[2]
    new_q = torch.empty_like(q)
    _out_eager(q, k, v, norm, _EPS[norm], gain, None, None, None, new_q, *cache[:, :, :, begin:end])
    unseen = torch.zeros((q.shape[2], end), dtype=torch.bool, device=q.device)
    keys, values = cache[:, :, :, :end]
    return _attend(new_q, keys, values, unseen, softmax_scale)[0]


def _cached_fake(q, k, v, cache, begin, norm, gain, softmax_scale):
    return _like(q)


def _cached_unfit_triton(q, k, v, cache, begin, norm, gain, softmax_scale) -> str | None:
    reason = _attention_unfit_triton(q, k, v)
    if reason is None and not _native.kernels("attention").aligned(cache[0]):
        return (
            "needs a cache aligned to 16 bytes, the last dimension contiguous, other strides multiples of 8, got "
            f"strides {tuple(cache.stride())}"
        )
    return reason


def _run_cached_triton(q, k, v, cache, begin, norm, gain, softmax_scale):
    out = _cached_fake(q, k, v, cache, begin, norm, gain, softmax_scale)
    if out.numel():
        with torch.cuda.device_of(q):
            _native.kernels("attention_cached").cached_attention(
                *_readable(q, k, v), cache, begin, norm, _EPS[norm], None if gain is None else gain.contiguous(),
                softmax_scale, out,
            )  # fmt: skip
    return out


_cached_attention = Op(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, SymInt begin, str norm, Tensor? gain, "
    "float softmax_scale) -> Tensor",
    eager=_cached_eager,
    fake=_cached_fake,
    backends=(Backend("triton", _run_cached_triton, _cached_unfit_triton),),
)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    begin: int,
    *,
    norm: str | None = "l2",
    gain: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one scale's tokens among themselves and to all in a cache, which takes their keys and values.

    Args:
        q: (B, H, L, D), float32, bfloat16, float16 or float64; any strides, as out of a fused projection. D is a
            multiple of 8 from 32 to 128, L at least 1.
        k: (B, G, L, D), like q, G a divisor of H.
        v: like k.
        cache: (2, B, G, N, D), dtype of q: keys and values of the tokens before `begin`; those of the new ones are
            written to begin ... begin + L, keys normalized. Any strides (for "triton", last dimension contiguous, the
            others multiples of 8). It must not overlap with q, k and v.
        begin: tokens in the cache, at most N - L.
        norm: "l2", of queries and keys, or None.
        gain: (H,) floats, with "l2": the logarithm of what queries are multiplied by, cut at log 100; None is 1.
        softmax_scale: factor on the scores; None is 1 with "l2", else 1 / sqrt(D).
        backend: "auto", "triton" or "eager".

    Returns:
        (B, H, L, D), in the memory order of q if D is innermost there.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, a cache that is too short, a gain without the norm, an unknown norm or
            backend or one that does not fit, and where gradients are recorded.

    Note:
        No gradient, never under autocast, no host sync; may be captured in a CUDA graph. "auto" takes one kernel
        for up to 64 tokens or few rows, elsewhere `qk_norm_rope` and `block_causal_attention`, which round queries and
        keys the same.
        With one kernel the result for a picture does not depend on the others.
    """
    function = "cached_attention"
    name = "none" if norm is None else norm
    if name not in ("l2", "none") or norm == "none":
        raise ValueError(f"{function}: norm must be 'l2' or None, got {norm!r}")
    _check_heads(function, q, k, v)
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    if width not in range(32, 129, 8):
        raise ValueError(f"{function}: q must have a head size that is a multiple of 8 from 32 to 128, got {width}")
    if not groups or heads % groups:
        raise ValueError(f"{function}: q must have a multiple of the {groups} heads of k, got {heads}")
    if length < 1:
        raise ValueError(f"{function}: q must have at least one token, got {tuple(q.shape)}")
    _checks.check_integer(function, "begin", begin, 0)
    _checks.check_tensor(function, "cache", cache, (q.dtype,))
    _checks.check_same_device(function, "cache", cache, "q", q)
    if cache.ndim != 5 or (*cache.shape[:3], cache.shape[4]) != (2, batch, groups, width):
        raise ValueError(f"{function}: cache must be (2, {batch}, {groups}, tokens, {width}), got {tuple(cache.shape)}")
    if cache.shape[3] < begin + length:
        raise ValueError(
            f"{function}: cache must have room for {begin} + {length} tokens, got a length of {cache.shape[3]}"
        )
    if gain is not None:
        _check_vector(function, "gain", gain, q, heads, "one a head of q")
        if norm is None:
            raise ValueError(f"{function}: gain must be None unless norm is 'l2', got it with None")
    if softmax_scale is None:
        softmax_scale = 1.0 if norm else width**-0.5
    _checks.check_number(function, "softmax_scale", softmax_scale, 0)
    given = [one for one in (q, k, v, cache, gain) if one is not None]
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        raise ValueError(f"{function}: q, k, v, cache and gain must not need a gradient: use torch.no_grad()")
    if backend == "auto" and _in_two(q, k, v, cache, begin, name, gain, softmax_scale):
        place = cache[:, :, :, begin : begin + length]
        q = qk_norm_rope(q, k, v, norm=norm, gain=gain, out=(torch.empty_like(q), *place))[0]
        k, v = cache[:, :, :, : begin + length]
        return block_causal_attention(q, k, v, [length], prefix=begin, softmax_scale=softmax_scale)
    return _cached_attention(q, k, v, cache, begin, name, gain, float(softmax_scale), backend)


def _in_two(q: Tensor, *others) -> bool:
    """Whether "auto" means two operators: for many queries, where there is no kernel, and while compiling, which sees
    no addresses."""
    if torch.compiler.is_compiling():
        return True
    name = _cached_attention.choose("auto", q, *others).name
    tiles = -(-q.shape[2] // TILE)
    many = tiles > 1 and q.shape[0] * q.shape[1] * tiles > FEW_PROGRAMS
    return name == "eager" or (many and os.environ.get(VARIABLE) != name)
