"""Adapters for the self-attention of VAR (`SelfAttention` in a file basic_var.py) and Infinity (in basic.py).

Published: queries and keys normalized, scaled and turned in a dozen launches or two; a mask of L x L in training; and
keys (in float32) and values copied whole to longer tensors at every scale of a generation. Swapped: one operator for
the former, attention that knows the scales by their lengths, and a cache that is filled in place.

Which scales a mask means is read off it once a module and schedule, which waits for the GPU; another one of its size,
device and dtype must be the same mask there, which the GPU itself asserts. A mask that is none of scales is the
published method's business.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.accelerate._swap import FLOATS, Adapter, Swap, class_of, facts, original, overridden, rehearse
from unifiedar.ops import block_causal_attention, qk_norm_rope
from unifiedar.ops.attention import MAX_SCALES

__all__ = ["ADAPTERS"]

_CLASS = "SelfAttention"
_HELD = "_unifiedar_cache"  # what holds cached_k and cached_v: (keys and values (2, B, H, room, D), tokens in it)
_METHODS = ("forward", "kv_caching")
_NEEDED = (
    "num_heads", "head_dim", "scale", "mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "proj_drop",
    "caching", "cached_k", "cached_v", *_METHODS,
)  # fmt: skip


# ---- what can be swapped ---------------------------------------------------------------------------------------------


def _is(module: nn.Module, file: str, normed: str) -> bool:
    published = class_of(module, _CLASS)
    return (
        published is not None
        and published.__module__.rpartition(".")[2] == file
        and hasattr(module, normed)
        and hasattr(module, "mat_qkv")
    )


def _var_matches(module: nn.Module) -> bool:
    return _is(module, "basic_var", "attn_l2_norm")


def _infinity_matches(module: nn.Module) -> bool:
    return _is(module, "basic", "cos_attn")


def _why_not(module: Any, normed: str) -> str | None:
    published = class_of(module, _CLASS)
    assert published is not None
    needed = (*_NEEDED, "scale_mul_1H11") if getattr(module, normed) else _NEEDED
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    reason = overridden(module, published, _METHODS)
    if reason is not None:
        return reason
    if not isinstance(module.mat_qkv, nn.Linear) or module.mat_qkv.bias is not None:
        return "its mat_qkv is not an nn.Linear without a bias"
    if module.head_dim % 8 or not 32 <= module.head_dim <= 128:
        return f"its head size is {module.head_dim}, and ours is a multiple of 8 from 32 to 128"
    if module.caching or module.cached_k is not None:
        return "it is in the middle of a generation"
    weights = [*module.parameters(), *module.buffers()]
    if any(type(weight.data) is not Tensor for weight in weights):
        return "its weights are not plain tensors"
    if any(weight.is_meta for weight in weights):
        return "its weights are on the meta device: load them first"
    if any(weight.dtype not in FLOATS for weight in weights):
        return "its weights are not floating-point numbers"
    return None


def _var_why_not(module: Any) -> str | None:
    return _why_not(module, "attn_l2_norm") or rehearse(module, _var_swap, {}, _prepare, _var_play)


def _infinity_why_not(module: Any) -> str | None:
    if getattr(module, "using_flash", False):
        return "it calls a FlashAttention of its own (customized_flash_attn)"
    return _why_not(module, "cos_attn") or rehearse(module, _infinity_swap, {}, _prepare, _infinity_play)


_TEXT = "forward by qk_norm_rope and block_causal_attention, its cache filled in place"


def _swap(module: Any, normed: str, forward: Any) -> Swap:
    known: dict[str, Any] = {"norm": "l2" if getattr(module, normed) else None, "room": 0, "masks": {}}
    return Swap(_TEXT, {"forward": forward, "kv_caching": kv_caching}, known)


def _var_swap(module: Any) -> Swap:
    return _swap(module, "attn_l2_norm", var_forward)


def _infinity_swap(module: Any) -> Swap:
    return _swap(module, "cos_attn", infinity_forward)


def _undo(module: Any) -> None:
    module.__dict__.pop(_HELD, None)


# ---- masks -----------------------------------------------------------------------------------------------------------

# The mask seen last, for all layers of a step are given the same tensor.
_last: tuple[weakref.ref[Tensor], int, tuple[list[int], int] | None] | None = None


def _scales_of(bias: Tensor, length: int, known: dict[Any, Any], schedule: str = "") -> tuple[list[int], int] | None:
    """The lengths of the scales that an additive mask stands for, and how many tokens of padding follow, which see the
    first key alone; None if it is another mask.

    `known` is the module's: by length, device, dtype and what the call says of the schedule, how many keys each query
    sees (L,), on the device, and what that means.
    """
    global _last
    if torch.compiler.is_compiling() or bias.shape != (1, 1, length, length) or bias.requires_grad or not length:
        return None
    lasting = not bias.is_inference()  # such tensors do not say whether they changed
    if lasting and _last is not None and _last[0]() is bias and _last[1] == bias._version:
        return _last[2]
    key = (length, bias.device, bias.dtype, schedule)
    found: tuple[list[int], int] | None
    if _waits(bias) and key in known:
        sees, found = known[key]
        _assert_same(bias, sees)
    elif bias.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    else:
        sees, found = _read(bias)
        if found is not None:
            known[key] = sees, found
    if lasting:
        _last = weakref.ref(bias), bias._version, found
    return found


def _waits(bias: Tensor) -> bool:
    """Whether reading a mask stalls the stream."""
    return bias.is_cuda


def _matches_counts(bias: Tensor, sees: Tensor) -> Tensor:
    """Whether query i sees the first sees[i] keys and nothing else, as a tensor."""
    visible = torch.arange(bias.shape[3], device=bias.device) < sees[:, None]
    return torch.where(visible, bias[0, 0] == 0, bias[0, 0] == -math.inf).all()


def _assert_same(bias: Tensor, sees: Tensor) -> None:
    """Does not wait for the GPU: there the kernel fails."""
    torch._assert_async(
        _matches_counts(bias, sees),
        "unifiedar.accelerate: an attention mask of the size of an earlier one must be the same mask",
    )


def _read(bias: Tensor) -> tuple[Tensor, tuple[list[int], int] | None]:
    sees = (bias[0, 0] == 0).sum(1)
    *counts, proper = torch.cat((sees, _matches_counts(bias, sees)[None].to(sees.dtype))).tolist()
    lengths: list[int] = []
    begin = 0
    while proper and begin < len(counts) and counts[begin] > begin:
        end = counts[begin]
        if any(count != end for count in counts[begin:end]):
            break
        lengths.append(end - begin)
        begin = end
    rest = counts[begin:]
    if not proper or not 1 <= len(lengths) <= MAX_SCALES or any(count != 1 for count in rest):
        return sees, None
    return sees, (lengths, len(rest))


# ---- methods ---------------------------------------------------------------------------------------------------------


def kv_caching(self: Any, enable: bool) -> None:
    """SelfAttention.kv_caching: starts a generation, or ends it and lets go of its keys and values."""
    held = self.__dict__.pop(_HELD, None)
    if held is not None:
        facts(self)["room"] = held[1]  # the next picture is probably as large
    self.caching, self.cached_k, self.cached_v = enable, None, None


def var_forward(self: Any, x: Tensor, attn_bias: Tensor | None) -> Tensor:
    """SelfAttention.forward of VAR: tokens (B, L, C), and a mask of scales or none, to (B, L, C)."""
    dropped = self.training and self.attn_drop > 0
    scales = _scales(self, x, attn_bias)
    if dropped or scales is None:
        return original(self, "forward")(x, attn_bias)
    return _attend(self, x, scales, None)


def infinity_forward(
    self: Any,
    x: Tensor,
    attn_bias_or_two_vector: Any,
    attn_fn: Any = None,
    scale_schedule: Any = None,
    rope2d_freqs_grid: Any = None,
    scale_ind: int = 0,
) -> Tensor:
    """SelfAttention.forward of Infinity: as VAR's, with tables of angles by schedule."""
    flex = self.use_flex_attn and attn_fn is not None
    scales = None if flex else _scales(self, x, attn_bias_or_two_vector, scale_schedule)
    if scales is None:
        return original(self, "forward")(
            x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind
        )
    rope = None
    if rope2d_freqs_grid is not None:
        key = str(tuple(scale_schedule))
        table = rope2d_freqs_grid[key] = rope2d_freqs_grid[key].to(x.device)
        begin = sum(math.prod(scale) for scale in scale_schedule[:scale_ind])
        rope = table[:, 0, 0, 0, begin : begin + x.shape[1]]
    return _attend(self, x, scales, rope)


def _scales(module: Any, x: Any, bias: Any, schedule: Any = None) -> tuple[list[int], int] | None:
    """The scales that a call is about, and tokens of padding; None for a call that the published method answers."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.dtype not in FLOATS:
        return None
    if bias is None:
        return [x.shape[1]], 0
    if module.caching or not isinstance(bias, Tensor):
        return None
    return _scales_of(bias, x.shape[1], facts(module)["masks"], str(schedule))


def _attend(module: Any, x: Tensor, scales: tuple[list[int], int], rope: Tensor | None) -> Tensor:
    batch, length, _ = x.shape
    lengths, padding = scales
    bias = torch.cat((module.q_bias, module.zero_k_bias, module.v_bias))
    qkv = F.linear(x, module.mat_qkv.weight, bias).view(batch, length, 3, module.num_heads, module.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    norm = facts(module)["norm"]
    settings = {"norm": norm, "gain": None if norm is None else module.scale_mul_1H11.flatten(), "rope": rope}
    begin = 0
    if module.caching:
        begin = 0 if module.cached_k is None else module.cached_k.shape[2]
        q, k, v = _cached(module, q, k, v, settings, begin)
    elif norm is not None or rope is not None:
        q, k = qk_norm_rope(q, k, **settings)
    real = length - padding
    out = block_causal_attention(
        q[:, :, :real], k[:, :, : begin + real], v[:, :, : begin + real], lengths, prefix=begin,
        softmax_scale=module.scale,
    )  # fmt: skip
    if padding:  # it sees the first key, and that alone
        out = torch.cat((out, v[:, :, :1].expand(-1, -1, padding, -1)), 2)
    return module.proj_drop(module.proj(out.transpose(1, 2).flatten(2)))


def _cached(
    module: Any, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any], begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    """New queries, and all keys and values up to them."""
    end = begin + k.shape[2]
    old = (module.cached_k, module.cached_v)
    if torch.is_grad_enabled() and (q.requires_grad or any(one is not None and one.requires_grad for one in old)):
        # Whoever wants gradients through a generation gets the published copies.
        q, k = qk_norm_rope(q, k, **settings)
        if begin:
            k, v = torch.cat((old[0], k), 2), torch.cat((old[1], v), 2)
        module.cached_k, module.cached_v = k, v
        return q, k, v
    cache = _room(module, k, begin, end)
    q = qk_norm_rope(q, k, v, **settings, out=(torch.empty_like(q), *cache[:, :, :, begin:end]))[0]
    module.__dict__[_HELD] = cache, end
    k, v = cache[:, :, :, :end]
    module.cached_k, module.cached_v = k, v
    return q, k, v


def _room(module: Any, k: Tensor, begin: int, end: int) -> Tensor:
    """A cache with the first `begin` tokens in it and room for more: the one in use, if what it holds is what the
    module has cached, and nobody went on from there before."""
    cache, filled = module.__dict__.get(_HELD, (None, 0))
    old = (module.cached_k, module.cached_v)
    if cache is not None and begin and filled == begin and end <= cache.shape[3] and cache.dtype == k.dtype:
        ours = cache[:, :, :, :begin]
        if all(_same_memory(*pair) for pair in zip(ours, old, strict=True)):
            return cache
    batch, heads, _, width = k.shape
    cache = k.new_empty((2, batch, heads, max(end, facts(module)["room"]), width))
    for place, one in zip(cache, old, strict=True):
        if begin:
            if one.shape != (batch, heads, begin, width):
                raise ValueError(
                    f"SelfAttention.forward: cached keys and values must be {(batch, heads, begin, width)} to match x, "
                    f"got {tuple(one.shape)}"
                )
            place[:, :, :begin] = one
    return cache


def _same_memory(one: Tensor, other: Any) -> bool:
    return (
        isinstance(other, Tensor)
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


# ---- rehearsals ------------------------------------------------------------------------------------------------------

_SIDES = (1, 2, 3)


@torch.no_grad()
def _prepare(module: Any) -> None:
    """Biases that are not zero, and gains on both sides of the limit."""
    for one in (module.q_bias, module.v_bias):
        one.normal_()
    if hasattr(module, "scale_mul_1H11"):
        module.scale_mul_1H11.uniform_(0, 2)
        module.scale_mul_1H11.flatten()[0] = 6.0


def _play(module: Any, training: bool, further: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """`further`: keyword arguments of forward for the whole schedule, then for each scale."""
    like = module.proj.weight
    lengths = [side * side for side in _SIDES]
    total = sum(lengths)
    level = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(like.device)
    mask = torch.zeros((total, total), device=like.device).masked_fill(level > level[:, None], -math.inf)[None, None]
    x = torch.randn((2, total, like.shape[1]), device=like.device)
    module.eval()
    yield "its forward with a mask", module(x, mask, **further[0])
    if training:
        module.train()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        out = module(leaf, mask, **further[0])
        yield "its forward in training", out
        given = [one for one in module.parameters() if one.requires_grad]
        yield "its gradient", torch.autograd.grad(out.sin().sum(), [leaf, *given], allow_unused=True)
        module.eval()
    with torch.no_grad():
        module.kv_caching(True)
        for part, settings in zip(x.split(lengths, 1), further[1:], strict=True):
            yield "its forward over a cache", module(part, None, **settings)
        module.kv_caching(False)
        yield "its forward without a mask", module(x, None, **further[0])


def _var_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    module.attn_drop = 0.0  # calls with dropout are the published method's
    return _play(module, training, [{}] * (1 + len(_SIDES)))


def _infinity_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    schedule = [(1, side, side) for side in _SIDES]
    angle = torch.randn(
        (sum(side * side for side in _SIDES) + 2, module.head_dim // 2), device=module.proj.weight.device
    )
    grid = {str(tuple(schedule)): torch.stack((angle.cos(), angle.sin()))[:, None, None, None]}
    plain: dict[str, Any] = {}
    for given in (plain, {"scale_schedule": schedule, "rope2d_freqs_grid": grid}):
        further = [given, *({**given, "scale_ind": s} for s in range(len(_SIDES)))]
        yield from _play(module, training, further)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("self-attention of VAR", _var_matches, _var_why_not, _var_swap, _undo),
    Adapter("self-attention of Infinity", _infinity_matches, _infinity_why_not, _infinity_swap, _undo),
)
"""The adapters of this file."""
