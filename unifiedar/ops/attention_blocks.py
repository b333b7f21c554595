"""Attention over blocks of tokens, by a mask of a few integers: block-causal attention's kin, and packed batches.

    lse_i = log sum_j exp(softmax_scale q_i . k_j), over the j that i sees
    out_i = sum_j exp(softmax_scale q_i . k_j - lse_i) v_j

Who sees whom is a `masks.Mask`: a few ranges of tokens for every token, of one image or of several one after another.
Shapes, grouped queries and queries fewer than keys are those of `ops.block_causal_attention`, whose kernels do the
work.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.attention import (
    _all_zero,
    _attend,
    _attend_backward,
    _attention_unfit_cuda,
    _attention_unfit_triton,
    _check_inputs,
    _forward_plan,
    _gradients,
    _group,
    _in_boxes,
    _outputs,
    _readable,
)
from unifiedar.ops.masks import Mask

__all__ = ["block_attention"]


# ---- definitions -----------------------------------------------------------------------------------------------------


def _unseen(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    """(Lq, L): whether the query does not see the key."""
    queries, keys = q.shape[2], k.shape[2]
    token = torch.arange(keys, device=k.device)
    begin, end = sees[:, :, keys - queries :, None].unbind(1)  # (R, Lq, 1)
    return ~((begin <= token) & (token < end)).any(0)


def _blocks_eager(q, k, v, sees, seen_by, offsets, softmax_scale):
    return _attend(q, k, v, _unseen(q, k, sees), softmax_scale)


def _blocks_backward_eager(grad, grad_lse, q, k, v, out, lse, sees, seen_by, offsets, softmax_scale):
    return _attend_backward(grad, grad_lse, q, k, v, out, lse, _unseen(q, k, sees), softmax_scale)


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _blocks_fake(q, k, v, sees, seen_by, offsets, softmax_scale):
    return _outputs(q)


def _blocks_backward_fake(grad, grad_lse, q, k, v, out, lse, sees, seen_by, offsets, softmax_scale):
    return _gradients(q, k, v)


def _blocks_setup(ctx, inputs, output):
    *tensors, ctx.softmax_scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _blocks_gradient(ctx, grad, grad_lse):
    q, k, v, sees, seen_by, offsets, out, lse = ctx.saved_tensors
    nothing = (None,) * 4
    if grad is None and grad_lse is None:
        return None, None, None, *nothing
    if grad is None:
        grad = torch.zeros_like(out)
    gradients = _block_attention_backward(
        grad, grad_lse, q, k, v, out, lse, sees, seen_by, offsets, ctx.softmax_scale, ctx.backend
    )
    return *gradients, *nothing


# ---- backends --------------------------------------------------------------------------------------------------------


_blocks_cuda = _native.define(
    "block_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor sees, Tensor? offsets, Tensor(a!) out, Tensor(b!) lse, "
    "Tensor(c!)? taken, float softmax_scale, int group, int tile) -> ()"
)
_blocks_backward_cuda = _native.define(
    "block_attention_backward_cuda(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor sees, Tensor seen_by, Tensor? offsets, Tensor(a!) workspace, Tensor(b!) plan, "
    "Tensor(c!) grad_q, Tensor(d!) grad_k, Tensor(e!) grad_v, float softmax_scale, int query_group, int key_group) "
    "-> ()"
)


def _run_blocks_cuda(q, k, v, sees, seen_by, offsets, softmax_scale):
    out, lse = _outputs(q)
    if lse.numel():
        plan = _forward_plan(q.shape[0] * q.shape[1], *k.shape[2:])
        _blocks_cuda(
            _in_boxes(q), _in_boxes(k), _in_boxes(v), sees, offsets, out, lse,
            q.new_empty(1, dtype=torch.int32) if plan.counted else None, softmax_scale, plan.group, plan.tile,
        )  # fmt: skip
    return out, lse


def _blocks_backward_unfit_cuda(grad, grad_lse, q, k, v, *_mask) -> str | None:
    return _attention_unfit_cuda(q, k, v)


def _plan_size(q: Tensor, k: Tensor, sees: Tensor, seen_by: Tensor, offsets: Tensor | None) -> int:
    """Integers of the plan of the CUDA gradients: at most 20 a tile and range, in tiles of at least 128 rows."""
    images = 1 if offsets is None else offsets.shape[0]
    return 20 * sum((x.shape[2] // 128 + images) * table.shape[0] for x, table in ((q, sees), (k, seen_by)))


def _run_blocks_backward_cuda(grad, grad_lse, q, k, v, out, lse, sees, seen_by, offsets, softmax_scale):
    gradients = _gradients(q, k, v)
    if not lse.numel():
        return _all_zero(gradients)
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    images = 1 if offsets is None else offsets.shape[0]
    _blocks_backward_cuda(
        _in_boxes(grad), None if grad_lse is None else grad_lse.contiguous(),
        _in_boxes(q), _in_boxes(k), _in_boxes(v), _in_boxes(out), lse.contiguous(), sees, seen_by, offsets,
        lse.new_empty(batch * heads * 2 * (queries + 127 * images)),
        sees.new_empty(_plan_size(q, k, sees, seen_by, offsets)), *gradients, softmax_scale,
        _group(batch * heads, keys, width), _group(batch * groups, heads // groups * queries, width),
    )  # fmt: skip
    return gradients


def _blocks_backward_unfit_triton(grad, grad_lse, q, k, v, *_mask) -> str | None:
    return _attention_unfit_triton(q, k, v)


def _run_blocks_triton(q, k, v, sees, seen_by, offsets, softmax_scale):
    out, lse = _outputs(q)
    if not lse.numel():
        return out, lse
    with torch.cuda.device_of(q):
        _native.kernels("attention").attention_forward(
            *_readable(q, k, v), None, 0, softmax_scale, _native.capability(q), out, lse, sees=sees, offsets=offsets,
        )  # fmt: skip
    return out, lse


def _run_blocks_backward_triton(grad, grad_lse, q, k, v, out, lse, sees, seen_by, offsets, softmax_scale):
    gradients = _gradients(q, k, v)
    if not lse.numel():
        return _all_zero(gradients)
    with torch.cuda.device_of(q):
        _native.kernels("attention").attention_backward(
            *_readable(grad, q, k, v, out), None if grad_lse is None else grad_lse.contiguous(), lse.contiguous(),
            None, 0, softmax_scale, _native.capability(q), torch.empty_like(lse), *gradients,
            sees=sees, seen_by=seen_by, offsets=offsets,
        )  # fmt: skip
    return gradients


# ---- operators -------------------------------------------------------------------------------------------------------

_MASK = "Tensor sees, Tensor seen_by, Tensor? offsets"

_block_attention = Op(
    f"block_attention(Tensor q, Tensor k, Tensor v, {_MASK}, float softmax_scale) -> (Tensor, Tensor)",
    eager=_blocks_eager,
    fake=_blocks_fake,
    backends=(
        Backend("cuda", _run_blocks_cuda, _attention_unfit_cuda),
        Backend("triton", _run_blocks_triton, _attention_unfit_triton),
    ),
    setup_context=_blocks_setup,
    backward=_blocks_gradient,
)

_block_attention_backward = Op(
    "block_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK}, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    eager=_blocks_backward_eager,
    fake=_blocks_backward_fake,
    backends=(
        Backend("cuda", _run_blocks_backward_cuda, _blocks_backward_unfit_cuda),
        Backend("triton", _run_blocks_backward_triton, _blocks_backward_unfit_triton),
    ),
)


# ---- public functions ------------------------------------------------------------------------------------------------


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a block of tokens sees the blocks that a mask names: packed images, sliding scales and others.

    Args:
        q: (B, H, Lq, D), as `block_causal_attention` takes it. With Lq < L, and one image in the mask, the queries are
            the last Lq tokens.
        k: (B, G, L, D) with H a multiple of G, dtype and device of q; L tokens of all images of the mask.
        v: like k.
        mask: of `ops.masks`, on the device of q.
        softmax_scale: factor on the scores, at least 0; None is 1 / sqrt(D).
        return_lse: whether to return the logarithm of the sum of exponentials too.
        backend: "auto", "cuda" (compute capability 9.0, bfloat16 or float16), "triton" or "eager".

    Returns:
        (B, H, Lq, D) in q's dtype and, if D is innermost there, memory order; with `return_lse` also lse (B, H, Lq),
        float32 (float64 for float64), natural logarithm.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match each other or the mask, an unknown backend or one that does not fit.

    Note:
        Exactness, gradients, autocast and strides as in `block_causal_attention`. The kernels run through a tile's
        ranges one after another, whole tiles without a mask; each image is served as if it were alone, but for values
        that are not finite: weights of 0 times those of the next image are no numbers in CUDA, as in the eager
        definition. Bit-equal between runs. No host sync. Masks with other lengths compile nothing.
    """
    function = "block_attention"
    softmax_scale = _check_inputs(function, q, k, v, softmax_scale)
    if not isinstance(mask, Mask):
        raise TypeError(f"{function}: mask must be a mask of ops.masks, got {type(mask).__name__}")
    _checks.check_same_device(function, "mask", mask.sees, "q", q)
    queries, length = q.shape[2], k.shape[2]
    if mask.tokens != length:
        raise ValueError(f"{function}: mask must be of the {length} tokens of k, got one of {mask.tokens}")
    if mask.offsets is not None and queries != length:
        raise ValueError(f"{function}: q must have the {length} tokens of k where images are packed, got {queries}")
    out, lse = _block_attention(q, k, v, mask.sees, mask.seen_by, mask.offsets, softmax_scale, backend)
    return (out, lse) if return_lse else out
