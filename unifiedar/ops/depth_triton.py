"""Depth decoding of any form as a row of Triton kernels: what is launched, in which order, on which memory.

States between blocks are rounded to the dtype of hidden, as the definition's are; what is inside a product, a norm or
attention is float32 and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unifiedar.ops import _native
from unifiedar.ops._op import registry
from unifiedar.ops.depth_form import DepthBlock, DepthForm, DepthWeights, Pair, _flatten, depth_rope

__all__ = ["decode", "unfit"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KEYS = 8192  # entries of a head's keys, both sizes rounded up to powers of two: they are in a program's registers


def unfit(hidden: Tensor, codebook: Tensor, weights: DepthWeights) -> str | None:
    """Why these kernels cannot decode; None if they can."""
    reason = _native.triton_unfit(hidden)
    if reason is not None:
        return reason
    if hidden.dtype not in DTYPES:
        return f"needs bfloat16, float16 or float32, got {str(hidden.dtype).removeprefix('torch.')}"
    if codebook.dtype == torch.float64:
        return "needs a codebook of float32 or less, got float64"
    length = _power_of_2(weights.form.length(weights.depth))
    for block in weights.blocks:
        width = block.query[0].shape[-2] // weights.num_heads
        if length * _power_of_2(width) > _KEYS:
            return f"needs tokens times a head's width up to {_KEYS}, got {length} x {_power_of_2(width)} rounded up"
    if weights.head[0].shape[-2] > 2**18:
        return f"needs at most 2^18 codes, got {weights.head[0].shape[-2]}"
    for tensor in _flatten(weights):
        if tensor is not None and not tensor.is_contiguous():
            return f"needs contiguous weights, got some with strides {tuple(tensor.stride())}"
        if tensor is not None and tensor.ndim > 1 and tensor.shape[-2] * tensor.shape[-1] >= 2**31:
            return f"needs matrices of fewer than 2^31 weights, got {tuple(tensor.shape)}"
    return None


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


_kept_turns: dict[tuple[torch.device, torch.dtype, float, int, int], Tensor] = {}


def _turns(hidden: Tensor, block: DepthBlock, num_heads: int, form: DepthForm, length: int) -> Tensor | None:
    """The definition's cosines and sines of all places, made once; in a graph's capture anew, as its memory is its."""
    width = block.query[0].shape[-2] // num_heads
    key = (hidden.device, hidden.dtype, form.rope, width, length)
    found = _kept_turns.get(key)
    if found is None:
        found = depth_rope(hidden, block, num_heads, form, 0, length)
        if found is not None and not (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
            _kept_turns[key] = found
    return found


class _Step:
    """Launches over fixed memory for the tokens of one step: `tokens` of each row, token by token."""

    def __init__(self, weights: DepthWeights, early: bool):
        self.weights, self.form, self.early = weights, weights.form, early
        self.kernels = _native.kernels("depth")
        self.parts: Tensor | None = None  # (P, tokens * rows, dim), what the next norm adds to the states first

    def linear(
        self,
        x: Tensor,
        pairs: Sequence[Pair],
        out: Tensor,
        sets: Sequence[int],
        norm: Pair | None = None,
        residual: Tensor | None = None,
        added: Tensor | None = None,
        **options,
    ) -> None:
        """Products of x (tokens * rows, inputs) with weights side by side, each token's with its set of them."""
        if all(weight.ndim == 2 for weight, _ in pairs):
            self._linear(x, pairs, out, norm, residual, added, **options)
            return
        rows = len(x) // len(sets)
        for t, i in enumerate(sets):
            own = [(w, b) if w.ndim == 2 else (w[i], None if b is None else b[i]) for w, b in pairs]
            part = slice(t * rows, (t + 1) * rows)
            self._linear(
                x[part], own, out[..., part, :], norm, None if residual is None else residual[part],
                None if added is None else added[:, part], **options,
            )  # fmt: skip

    def _linear(
        self,
        x: Tensor,
        pairs: Sequence[Pair],
        out: Tensor,
        norm: Pair | None,
        residual: Tensor | None,
        added: Tensor | None,
        **options,
    ) -> None:
        biases, early = None, self.early
        if any(bias is not None for _, bias in pairs):  # zeros for the one that has none, where others have
            biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs]
            early = early and all(bias is not None for _, bias in pairs)  # zeros are no weights: they are waited for
        gain, shift = (None, None) if norm is None else norm
        self.kernels.linear(
            x,
            [weight for weight, _ in pairs],
            biases,
            out,
            norm="none" if norm is None else self.form.norm,
            gain=gain,
            shift=shift if self.form.norm == "layer" else None,
            eps=self.form.eps,
            residual=residual,
            added=added,
            early=early,
            **options,
        )

    def normed(
        self, x: Tensor, pairs: Sequence[Pair], out: Tensor, sets: Sequence[int], norm: Pair | None, **options
    ) -> None:
        """As `linear`, after what is still to be added to the states x was."""
        added, self.parts = self.parts, None
        self.linear(x, pairs, out, sets, norm, added=None if added is None else added[:, -len(x) :], **options)

    def add(self, y: Tensor, pair: Pair, x: Tensor, sets: Sequence[int]) -> None:
        """x += y weights^T + bias, now or, of many rows, with the next norm."""
        outputs, inputs = pair[0].shape[-2:]
        rows = len(y) if pair[0].ndim == 2 else len(y) // len(sets)
        count = self.kernels.parts(rows, outputs, inputs, y.element_size())
        if count:
            self.parts = y.new_empty(count, len(y), outputs, dtype=torch.float32)
            self.linear(y, (pair,), self.parts, sets)
        else:
            self.linear(y, (pair,), x, sets, residual=x)

    def block(self, x: Tensor, block: DepthBlock, cache: Tensor, rope: Tensor | None, begin: int, tokens: int) -> None:
        """What `depth_block` does, in place."""
        sets = self.form.sets(begin, begin + tokens)
        heads, groups = self.weights.num_heads, cache.shape[2]
        width = cache.shape[4]
        qkv = x.new_empty(len(x), (heads + 2 * groups) * width)
        self.normed(x, (block.query, block.key, block.value), qkv, sets, block.norm1)
        mixed = x.new_empty(len(x), heads * width)
        self.kernels.attend(
            qkv, block.query_norm, block.key_norm, rope, cache, mixed,
            tokens=tokens, begin=begin, heads=heads, norm=block.query_norm is not None, eps=self.form.eps,
            early=self.early,
        )  # fmt: skip
        self.add(mixed, block.proj, x, sets)
        inner = x.new_empty(len(x), block.up[0].shape[-2])
        gated = block.gate is not None
        pairs = (block.up,) if block.gate is None else (block.up, block.gate)
        self.normed(x, pairs, inner, sets, block.norm2, activation=self.form.activation, gated=gated)
        self.add(inner, block.down, x, sets)

    def entered(self, source: Tensor, pair: Pair | None, out: Tensor, place: Tensor | None, index: int) -> None:
        """out = source through a projection, or as it is, and the place's embedding."""
        if pair is not None:
            self.linear(source, (pair,), out, [index], place=place)
        elif place is None:
            out.copy_(source)
        else:
            torch.add(source, place, out=out)


def decode(
    hidden: Tensor,
    codebook: Tensor,
    weights: DepthWeights,
    guidance: float | None,
    guidance_rows: Tensor | None,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    noise: Tensor | None,
    forced: Tensor | None,
    return_logits: bool,
    start: Tensor | None,
    codes: Tensor,
    total: Tensor,
    unsound: Tensor,
    all_logits: Tensor,
) -> None:
    """Fills codes, total, unsound and logits, as `depth_decode` says."""
    form, depth, rows = weights.form, len(temperature), len(hidden)
    length = form.length(depth)
    rope = None
    if form.rope and weights.blocks:
        # Made before other launches: kernels here take it for a weight, which they read before they wait.
        rope = _turns(hidden, weights.blocks[0], weights.num_heads, form, length)
    total.zero_()
    unsound.fill_(-1)
    if not rows:
        return
    guided, heads = guidance is not None or guidance_rows is not None, weights.num_heads
    num_codes, dim = weights.head[0].shape[-2:]
    # A launch that begins early needs the machine's support; and only what runs in a stream has one ahead of it.
    step = _Step(weights, early=hidden.is_cuda and _native.capability(hidden) >= 90)
    kernels, sample = step.kernels, registry["sample_codes"]
    hidden = hidden.contiguous()
    start = None if start is None else start.contiguous()
    if codebook.stride(-1) != 1:
        codebook = codebook.contiguous()
    caches = []
    for block in weights.blocks:
        width = block.query[0].shape[-2] // heads
        caches.append(hidden.new_empty(2, rows, form.kv_heads or heads, length, width))
    entered = None if weights.code is None else hidden.new_empty(rows, codebook.shape[-1])
    first = form.state == "first"
    own = form.state == "every"
    places = None if weights.position is None else weights.position[0]
    logits = hidden.new_empty(rows, num_codes)

    def place(token: int) -> Tensor | None:
        return None if places is None else places[token]

    def add_state(x: Tensor, token: int) -> None:
        if weights.hidden is None:
            x += hidden
        else:
            step.linear(hidden, (weights.hidden,), x, form.sets(token, token + 1), residual=x)

    for d in range(depth):
        begin = form.length(d) if d else 0
        tokens = 2 if d == 0 and form.state == "before" else 1
        if d == 0:
            x = hidden.new_empty(tokens * rows, dim)
            if not own:
                step.entered(hidden, weights.hidden, x[:rows], place(0), 0)
            if not first:
                assert start is not None  # as depth_decode sees to
                at = x[-rows:]
                step.entered(start, weights.code, at, place(tokens - 1), 0)
                if own:
                    add_state(at, 0)
        else:
            x = x[-rows:]
            if weights.code is not None:
                assert entered is not None
                step.linear(entered, (weights.code,), x, [d - first], place=place(begin))
            if own and weights.hidden is not None:
                add_state(x, begin)
        for block, cache in zip(weights.blocks, caches, strict=True):
            step.block(x, block, cache, rope, begin, tokens)
        last = x[-rows:]
        if return_logits:
            logits = all_logits[:, d]
        norm = weights.norm
        if norm is not None and norm[0].ndim == 2:
            norm = norm[0][d], None if norm[1] is None else norm[1][d]
        step.normed(last, (weights.head,), logits, [d], norm)
        if forced is not None:
            drawn = forced[:, d]
        else:
            own_noise = None if noise is None or temperature[d] == 0 else noise[:, d]
            drawn = sample(
                logits, guidance, guidance_rows, temperature[d], top_k[d], None, top_p[d], None, own_noise, "auto"
            )
        direct = weights.code is None
        kernels.enter(
            drawn, None if forced is not None else logits, codebook if codebook.ndim == 2 else codebook[d], d, codes,
            total, unsound, None if d + 1 == depth else last if direct else entered,
            guided=guided, last=form.last, start=None if form.last else start,
            state=hidden if own and weights.hidden is None else None,
            place=place(form.length(d + 1)) if direct and d + 1 < depth else None,
            early=step.early,
        )  # fmt: skip
