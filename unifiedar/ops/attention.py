"""Block-causal attention: tokens come in scales, and a token sees its own scale and all earlier ones whole.

    scale(i) = how many scales begin at or before token i;  i sees j  iff  scale(j) <= scale(i)
    lse_i = log sum_j exp(softmax_scale q_i . k_j), over the j that i sees
    out_i = sum_j exp(softmax_scale q_i . k_j - lse_i) v_j

A prefix is one more scale in front: its tokens see each other, and everybody sees them. Queries may be fewer than
keys; they are the last tokens then, as in generation over a cache. Shapes: q (B, H, Lq, D), k and v (B, G, L, D), H a
multiple of G (grouped-query attention: heads h R .. h R + R - 1 share key head h, R = H / G).

Next-scale attention in this form: Tian et al., "Visual Autoregressive Modeling" (2024).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["block_causal_attention"]

MAX_SCALES = 32


# ---- definitions -----------------------------------------------------------------------------------------------------


def _lengths_on(device: torch.device, lengths: Sequence[int], schedule: Tensor | None) -> Tensor:
    """The lengths of the scales (S,) on a device."""
    return schedule if schedule is not None else _native.integers_on(device, tuple(lengths))


def _scale_of(q: Tensor, k: Tensor, lengths: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The scale of every query (Lq,) and of every key (L,); the last scale goes on to the end."""
    begins = prefix + lengths.cumsum(0) - lengths
    position = torch.arange(k.shape[2], device=k.device)
    scale = (position[:, None] >= begins).sum(1)
    return scale[k.shape[2] - q.shape[2] :], scale


def _later(q: Tensor, k: Tensor, lengths: Tensor, prefix: int) -> Tensor:
    """(Lq, L): whether the key is of a later scale than the query, which does not see it."""
    query_scale, key_scale = _scale_of(q, k, lengths, prefix)
    return key_scale > query_scale[:, None]


def _scores(q: Tensor, k: Tensor, unseen: Tensor, softmax_scale: float) -> Tensor:
    """(B, G, R Lq, L): rounded to the dtype of q as its product with k is, then float32 (or float64); -inf unseen."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    scores = (q * softmax_scale).reshape(batch, groups, -1, q.shape[3]) @ k.mT
    scores = scores.to(_accumulator(q.dtype)).view(batch, groups, heads // groups, queries, keys)
    return scores.masked_fill(unseen, -math.inf).view(batch, groups, -1, keys)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attention_eager(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], schedule: Tensor | None, prefix: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    return _attend(q, k, v, _later(q, k, _lengths_on(q.device, lengths, schedule), prefix), softmax_scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """out and lse, with unseen (Lq, L)."""
    out, lse = _outputs(q)
    if not lse.numel():
        return out, lse
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, k, unseen, softmax_scale)
        total = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - total[..., None]).to(q.dtype)
        out.copy_((weights @ v).view(q.shape))
    return out, lse.copy_(total.view(lse.shape))


def _all_zero(gradients: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    for gradient in gradients:
        gradient.zero_()
    return gradients


def _attention_backward_eager(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    schedule: Tensor | None,
    prefix: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    unseen = _later(q, k, _lengths_on(q.device, lengths, schedule), prefix)
    return _attend_backward(grad, grad_lse, q, k, v, out, lse, unseen, softmax_scale)


def _attend_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    unseen: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, with unseen (Lq, L)."""
    gradients = _gradients(q, k, v)
    if not lse.numel():
        return _all_zero(gradients)
    batch, groups = k.shape[:2]
    wide = _accumulator(q.dtype)

    def rows(x: Tensor) -> Tensor:
        """(B, H, Lq, ...) with the heads that share keys one after another: (B, G, R Lq, ...)."""
        return x.reshape(batch, groups, -1, *x.shape[3:])

    with torch.autocast(q.device.type, enabled=False):
        delta = (grad.to(wide) * out.to(wide)).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        scores = _scores(q, k, unseen, softmax_scale)
        weights = torch.exp(scores - rows(lse)[..., None])
        grad_weights = (rows(grad) @ v.mT).to(wide)
        grad_scores = (weights * (grad_weights - rows(delta)[..., None])).to(q.dtype)
        gradients[0].copy_((grad_scores @ k * softmax_scale).view(q.shape))
        gradients[1].copy_(grad_scores.mT @ rows(q) * softmax_scale)
        gradients[2].copy_(weights.to(q.dtype).mT @ rows(grad))
    return gradients


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    """Like x and in its memory order, as far as that has channels innermost: where q comes transposed out of a
    projection, the output goes transposed into the next."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse, not filled."""
    return _like(q), q.new_empty(q.shape[:-1], dtype=_accumulator(q.dtype))


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, not filled."""
    return _like(q), _like(k), _like(v)


def _attention_fake(q, k, v, lengths, schedule, prefix, softmax_scale):
    return _outputs(q)


def _attention_backward_fake(grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale):
    return _gradients(q, k, v)


def _attention_setup(ctx, inputs, output):
    q, k, v, ctx.lengths, schedule, ctx.prefix, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, schedule, *output)
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx, grad, grad_lse):
    q, k, v, schedule, out, lse = ctx.saved_tensors
    nothing = (None,) * 4
    if grad is None and grad_lse is None:
        return None, None, None, *nothing
    if grad is None:
        grad = torch.zeros_like(out)
    gradients = _block_causal_attention_backward(
        grad, grad_lse, q, k, v, out, lse, ctx.lengths, schedule, ctx.prefix, ctx.softmax_scale, ctx.backend
    )
    return *gradients, *nothing


# ---- backends --------------------------------------------------------------------------------------------------------

_attention_cuda = _native.define(
    "block_causal_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor(a!) out, Tensor(b!) lse, "
    "Tensor(c!)? taken, int prefix, float softmax_scale, int group, int tile) -> ()"
)
_attention_backward_cuda = _native.define(
    "block_causal_attention_backward_cuda(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor lengths, Tensor(a!) workspace, Tensor(b!) grad_q, Tensor(c!) grad_k, Tensor(d!) grad_v, "
    "int prefix, float softmax_scale, int query_group, int key_group, int tile) -> ()"
)
L2_BYTES = 50 << 20  # of an H100
NEAR_BYTES = 16 << 20  # of keys and values (or queries and gradients) in use at a time, a third of an H100's L2
CHOSEN = -1  # the tile of csrc/attention_sm90.h that is taken by the sizes, forward or backward


def _attention_unfit_cuda(q, k, v, *_mask) -> str | None:
    reason = _native.cuda_unfit(q)
    if reason is None and (found := _native.capability(q)) != 90:
        return f"needs compute capability 9.0, got {found / 10}"
    if reason is None and q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    return reason or _sizes_unfit(q, k)


def _sizes_unfit(q: Tensor, k: Tensor) -> str | None:
    if q.shape[3] not in range(32, 129, 8):
        return f"needs a head size that is a multiple of 8 from 32 to 128, got {q.shape[3]}"
    if max(q.shape[2], k.shape[2]) >= 2**30:
        return f"needs fewer than 2^30 tokens, got {max(q.shape[2], k.shape[2])}"
    return None


def _attention_unfit_triton(q, k, v, *_mask) -> str | None:
    reason = _native.triton_unfit(q)
    if reason is None and q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    return reason or _sizes_unfit(q, k)


def _attention_backward_unfit_cuda(
    grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale
) -> str | None:
    return _attention_unfit_cuda(q, k, v)


def _attention_backward_unfit_triton(
    grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale
) -> str | None:
    return _attention_unfit_triton(q, k, v, lengths, schedule, prefix, softmax_scale)


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The kernels take any strides of whole units of 8 elements, with a contiguous last dimension."""
    aligned = _native.kernels("attention").aligned
    return [x if aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _in_boxes(x: Tensor) -> Tensor:
    """As the copy engine reads a tensor (B, H, L, D): as `_readable`, and no stride of 0."""
    whole = all(size == 1 or (step > 0 and step % 8 == 0) for step, size in zip(x.stride()[:3], x.shape, strict=False))
    if whole and x.stride(3) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _group(rows: int, length: int, width: int) -> int:
    """Heads whose tiles the backward interleaves: all, or as many as L2 holds two tensors (length, width) of."""
    return min(rows, max(16, NEAR_BYTES // (2 * length * width * 2)))


def _key_group(rows: int, length: int, width: int) -> int:
    """The same of the schedule's kernel of the keys, but four of long ones, of which L2 does not hold sixteen."""
    return min(rows, 4) if 16 * 2 * length * width * 2 > L2_BYTES else _group(rows, length, width)


class ForwardPlan(NamedTuple):
    """How the CUDA forward goes about its tiles: which one, of how many heads interleaved, whether taken by a counter.

    (Without it blocks take tiles in turns.)
    """

    tile: int
    group: int
    counted: bool


def _forward_plan(rows: int, length: int, width: int) -> ForwardPlan:
    """For that many heads with keys (length, width): `group` is what L2 holds q, k, v and out of, at least 16.

    More heads keep more tiles of one length together, but blocks that take tiles as they become free end together with
    few. A counter costs a launch that sets it to 0, which is dropped where every block has one tile at most.
    """
    return ForwardPlan(CHOSEN, min(rows, max(16, NEAR_BYTES // (4 * length * width * 2))), True)


def _run_attention_cuda(q, k, v, lengths, schedule, prefix, softmax_scale):
    out, lse = _attention_fake(q, k, v, lengths, schedule, prefix, softmax_scale)
    if lse.numel():
        plan = _forward_plan(q.shape[0] * q.shape[1], *k.shape[2:])
        _attention_cuda(
            _in_boxes(q), _in_boxes(k), _in_boxes(v), _lengths_on(q.device, lengths, schedule), out, lse,
            q.new_empty(1, dtype=torch.int32) if plan.counted else None, prefix, softmax_scale, plan.group, plan.tile,
        )  # fmt: skip
    return out, lse


def _run_attention_triton(q, k, v, lengths, schedule, prefix, softmax_scale):
    out, lse = _attention_fake(q, k, v, lengths, schedule, prefix, softmax_scale)
    if not lse.numel():
        return out, lse
    with torch.cuda.device_of(q):
        _native.kernels("attention").attention_forward(
            *_readable(q, k, v), _lengths_on(q.device, lengths, schedule), prefix, softmax_scale,
            _native.capability(q), out, lse,
        )  # fmt: skip
    return out, lse


def _run_attention_backward_cuda(
    grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale
):  # fmt: skip
    gradients = _attention_backward_fake(grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale)
    if not lse.numel():
        return _all_zero(gradients)
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    workspace = lse.new_empty(batch * heads * 2 * (queries + 127))
    _attention_backward_cuda(
        _in_boxes(grad), None if grad_lse is None else grad_lse.contiguous(),
        _in_boxes(q), _in_boxes(k), _in_boxes(v), _in_boxes(out), lse.contiguous(),
        _lengths_on(q.device, lengths, schedule), workspace, *gradients, prefix, softmax_scale,
        _group(batch * heads, keys, width), _key_group(batch * groups, heads // groups * queries, width),
        CHOSEN,
    )  # fmt: skip
    return gradients


def _run_attention_backward_triton(
    grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale
):  # fmt: skip
    gradients = _attention_backward_fake(grad, grad_lse, q, k, v, out, lse, lengths, schedule, prefix, softmax_scale)
    if not lse.numel():
        return _all_zero(gradients)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        _native.kernels("attention").attention_backward(
            *_readable(grad, q, k, v, out), None if grad_lse is None else grad_lse.contiguous(), lse.contiguous(),
            _lengths_on(q.device, lengths, schedule), prefix, softmax_scale,
            _native.capability(q), delta, *gradients,
        )  # fmt: skip
    return gradients


# ---- operators -------------------------------------------------------------------------------------------------------

_block_causal_attention = Op(
    "block_causal_attention(Tensor q, Tensor k, Tensor v, SymInt[] lengths, Tensor? schedule, SymInt prefix, "
    "float softmax_scale) -> (Tensor, Tensor)",
    eager=_attention_eager,
    fake=_attention_fake,
    backends=(
        Backend("cuda", _run_attention_cuda, _attention_unfit_cuda),
        Backend("triton", _run_attention_triton, _attention_unfit_triton),
    ),
    setup_context=_attention_setup,
    backward=_attention_gradient,
)

_block_causal_attention_backward = Op(
    "block_causal_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, SymInt[] lengths, Tensor? schedule, SymInt prefix, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    eager=_attention_backward_eager,
    fake=_attention_backward_fake,
    backends=(
        Backend("cuda", _run_attention_backward_cuda, _attention_backward_unfit_cuda),
        Backend("triton", _run_attention_backward_triton, _attention_backward_unfit_triton),
    ),
)


# ---- public functions ------------------------------------------------------------------------------------------------


@overload
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_lengths: Sequence[int] | Tensor,
    *,
    prefix: int = 0,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_lengths: Sequence[int] | Tensor,
    *,
    prefix: int = 0,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_lengths: Sequence[int] | Tensor,
    *,
    prefix: int = 0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a token of scale s sees the prefix and the scales 0..s whole, and a prefix token the prefix.

    Args:
        q: (B, H, Lq, D), float32, bfloat16, float16 or float64, D a multiple of 8 from 32 to 128, Lq at most L. With
            Lq < L the queries are the last Lq tokens (generation over a cache of keys and values).
        k: (B, G, L, D) with H a multiple of G, dtype and device of q.
        v: like k. The kernels read all three in place if the last dimension is contiguous and the others have strides
            that are multiples of 8 (slices of a fused projection, parts of a preallocated cache), and copy one that is
            laid out otherwise, or not aligned to 16 bytes.
        scale_lengths: how many tokens each scale has, 1 to 32 scales, zeros allowed: integers whose sum is L - prefix,
            or an int32 or int64 tensor (S,) of them on the device of q, which is read by the device alone.
        prefix: tokens in front that everybody sees.
        softmax_scale: factor on the scores, at least 0; None is 1 / sqrt(D).
        return_lse: whether to return the logarithm of the sum of exponentials too.
        backend: "auto", "cuda" (compute capability 9.0, bfloat16 or float16), "triton" or "eager".

    Returns:
        (B, H, Lq, D) in q's dtype and, if D is innermost there, memory order; with `return_lse` also lse (B, H, Lq),
        float32 (float64 for float64), natural logarithm.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, lengths that are negative or do not add up, an unknown backend or one
            that does not fit. The sum of a tensor is checked on the CPU only: on a GPU the last scale is taken to end
            at L, whatever its length says, and scales beyond L have no tokens.

    Note:
        Differentiable once in q, k and v, through lse too. Softmax and sums are float32; the eager backend rounds
        scores and weights to the dtype of q, as products in that dtype do, and holds them all (B H Lq L). The kernels
        (CUDA's are for Hopper) hold none and are bit-equal between runs, forward and backward, and whatever the batch
        is; Triton's float32 products are three TF32 products each. Never under autocast. No host sync
        with a tensor; integers are copied to the device at the first call with that schedule (in a CUDA graph, if that
        is captured). A new schedule compiles nothing.
    """
    function = "block_causal_attention"
    softmax_scale = _check_inputs(function, q, k, v, softmax_scale)
    length = k.shape[2]
    _checks.check_integer(function, "prefix", prefix, 0)
    if isinstance(scale_lengths, Tensor):
        _check_schedule(function, scale_lengths, prefix, q, length)
        lengths, schedule = [], scale_lengths.detach().contiguous()
    else:
        lengths, schedule = _check_lengths(function, scale_lengths, prefix, length), None
    out, lse = _block_causal_attention(q, k, v, lengths, schedule, prefix, softmax_scale, backend)
    return (out, lse) if return_lse else out


def _check_inputs(function: str, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> float:
    """Raises for what does not belong together; returns the factor on the scores."""
    _checks.check_heads(function, q=q, k=k, v=v)
    batch, heads, queries, width = q.shape
    groups, length = k.shape[1:3]
    if width % 8 or not 32 <= width <= 128:
        raise ValueError(f"{function}: q must have a head size D, a multiple of 8 from 32 to 128, got {width}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"{function}: k must be ({batch}, heads, length, {width}) to match q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{function}: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if groups < 1 or heads % groups:
        raise ValueError(f"{function}: q must have a multiple of k's {groups} heads, got {heads}")
    if queries > length:
        raise ValueError(f"{function}: q must have at most the {length} tokens of k, got {queries}")
    if softmax_scale is None:
        return width**-0.5
    _checks.check_number(function, "softmax_scale", softmax_scale, 0)
    return float(softmax_scale)


def _check_lengths(function: str, scale_lengths: Sequence[int], prefix: int, length: int) -> list[int]:
    if isinstance(scale_lengths, (str, bytes)) or not isinstance(scale_lengths, Sequence):
        raise TypeError(
            f"{function}: scale_lengths must be a sequence of integers or a tensor, got {type(scale_lengths).__name__}"
        )
    lengths = list(scale_lengths)
    _check_count(function, len(lengths))
    for i, value in enumerate(lengths):
        _checks.check_integer(function, f"scale_lengths[{i}]", value, 0)
    _check_sum(function, sum(lengths), prefix, length)
    return lengths


def _check_schedule(function: str, schedule: Tensor, prefix: int, q: Tensor, length: int) -> None:
    _checks.check_tensor(function, "scale_lengths", schedule, (torch.int32, torch.int64))
    if schedule.ndim != 1:
        raise ValueError(f"{function}: scale_lengths must be (S,), got {tuple(schedule.shape)}")
    _check_count(function, schedule.shape[0])
    _checks.check_same_device(function, "scale_lengths", schedule, "q", q)
    if prefix > length:
        raise ValueError(f"{function}: prefix must be at most the {length} tokens of k, got {prefix}")
    if schedule.device.type == "cpu" and not torch.compiler.is_compiling():
        values = schedule.tolist()
        if min(values) < 0:
            raise ValueError(f"{function}: scale_lengths must be at least 0, got {min(values)}")
        _check_sum(function, sum(values), prefix, length)


def _check_count(function: str, count: int) -> None:
    if not 1 <= count <= MAX_SCALES:
        raise ValueError(f"{function}: scale_lengths must name 1 to {MAX_SCALES} scales, got {count}")


def _check_sum(function: str, total: int, prefix: int, length: int) -> None:
    if total + prefix != length:
        raise ValueError(
            f"{function}: scale_lengths and prefix must add up to the {length} tokens of k, got {total} + {prefix}"
        )
