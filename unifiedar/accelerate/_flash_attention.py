"""The signature of the FlashAttention that Infinity was trained with and that was never published.

Infinity's `customized_flash_attn` looks for a `flash_attn_func` that has a variable with "Infinity" in its name, and in
training hands it two vectors of integers instead of a mask: how many keys each query sees, and how many queries do not
see each key.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from unifiedar.ops import _checks, block_causal_attention
from unifiedar.ops.attention import MAX_SCALES

__all__ = ["flash_attn_func"]

# The vector seen last, for all layers of a step are given the same one, or a view of it made once.
_last: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    VAR_visible_kvlen: Tensor | None = None,
    VAR_invisible_qlen: Tensor | None = None,
    *,
    Infinity_visible_kvlen: Tensor | None = None,
    Infinity_invisible_qlen: Tensor | None = None,
) -> Tensor:
    """Attention with the signature that Infinity's customized_flash_attn asks for, by `ops.block_causal_attention`.

        import flash_attn
        from unifiedar.accelerate import flash_attn_func
        flash_attn.flash_attn_func = flash_attn_func  # before anything of Infinity is imported

    The public Infinity registers no buffers Infinity_visible_kvlen and Infinity_invisible_qlen, which its training
    reads: set them on the model for the schedule at hand. Of scales with these numbers of tokens, a tensor,

        ends = lengths.cumsum(0)
        model.Infinity_visible_kvlen = ends.repeat_interleave(lengths)
        model.Infinity_invisible_qlen = (ends - lengths).repeat_interleave(lengths)

    Args:
        q: (B, Lq, H, D), as `ops.block_causal_attention` takes it with heads and tokens exchanged.
        k, v: (B, L, G, D).
        dropout_p: 0: there is no dropout.
        softmax_scale: factor on the scores; None is 1 / sqrt(D).
        VAR_visible_kvlen: (L,) int32 or int64 on the device of q, how many keys each query sees, counted from the
            first: for a query of a scale, the end of that scale. At most 32 scales. None: every query sees every key.
        VAR_invisible_qlen: how many queries, counted from the first, do not see each key. Not read: the other vector
            says it.
        Infinity_visible_kvlen, Infinity_invisible_qlen: other names of the two.

    Returns:
        (B, Lq, H, D).

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for dropout, a vector under both names, one of another size or that stands for no scales (on a GPU,
            which is not waited for, the kernel that checks it fails), and what `ops.block_causal_attention` refuses.
    """
    function = "flash_attn_func"
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(function, name, value)
        if value.ndim != 4:
            raise ValueError(f"{function}: {name} must be (batch, length, heads, D), got {tuple(value.shape)}")
    _checks.check_number(function, "dropout_p", dropout_p)
    if dropout_p != 0:
        raise ValueError(f"{function}: dropout_p must be 0, got {dropout_p}")
    if VAR_visible_kvlen is not None and Infinity_visible_kvlen is not None:
        raise ValueError(f"{function}: VAR_visible_kvlen must be None if Infinity_visible_kvlen is given, got both")
    visible = Infinity_visible_kvlen if VAR_visible_kvlen is None else VAR_visible_kvlen
    lengths: Any = [k.shape[1]]
    if visible is not None:
        _checks.check_tensor(function, "VAR_visible_kvlen", visible, (torch.int32, torch.int64))
        _checks.check_same_device(function, "VAR_visible_kvlen", visible, "q", q)
        if visible.shape != (k.shape[1],) or q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{function}: VAR_visible_kvlen must be ({k.shape[1]},), one for each of as many queries as keys, got "
                f"{tuple(visible.shape)} and {q.shape[1]} queries"
            )
        if visible.numel():
            lengths = _lengths(function, visible)
    out = block_causal_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lengths, softmax_scale=softmax_scale
    )
    return out.transpose(1, 2)


def _lengths(function: str, visible: Tensor) -> Tensor:
    """The lengths of the scales (32,), zeros behind the last, found by the device alone."""
    global _last
    # Inference tensors do not say whether they changed, and a compiler's have no identity.
    lasting = not torch.compiler.is_compiling() and not visible.is_inference()
    if lasting and _last is not None and _last[0]() is visible and _last[1] == visible._version:
        return _last[2]
    rank = torch.cat((visible.new_zeros(1), (visible[1:] != visible[:-1]).to(visible.dtype))).cumsum(0)
    bounded = rank.clamp(max=MAX_SCALES - 1)
    lengths = torch.zeros(MAX_SCALES, dtype=torch.int64, device=visible.device)
    lengths.scatter_add_(0, bounded, torch.ones_like(bounded))
    proper = (lengths.cumsum(0)[bounded] == visible).all() & (rank[-1] < MAX_SCALES)
    words = f"{function}: VAR_visible_kvlen must rise from scale to scale to the end of each, at most {MAX_SCALES}"
    if visible.device.type == "cpu" and not torch.compiler.is_compiling():
        if not proper:
            raise ValueError(f"{words}, got {visible.tolist()[:40]}")
    else:
        torch._assert_async(proper, words)
    if lasting:
        _last = weakref.ref(visible), visible._version, lengths
    return lengths
