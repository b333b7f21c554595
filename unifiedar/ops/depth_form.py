"""What a depth transformer is: its parameters, its form, and what one of its steps does with them, in plain PyTorch.

`ops/depth.py` decodes with it; here is nothing that draws.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops._op import registry

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "STATES",
    "DepthBlock",
    "DepthForm",
    "DepthWeights",
    "Pair",
    "depth_block",
    "depth_logits",
    "depth_rope",
    "depth_tokens",
]

Pair = tuple[Tensor, Tensor | None]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
NORMS = ("layer", "rms")
STATES = ("first", "every", "before")


class DepthForm(NamedTuple):
    """What a depth transformer does with its weights; as it stands, what RQ-Transformer and VILA-U do.

    Fields:
        norm: "layer" (LayerNorm) or "rms" (RMSNorm), in the blocks and before the head.
        eps: added to the variance or mean square, also by the norms of queries and keys.
        activation: "gelu" (exact), "gelu_tanh" or "silu": of the MLP, or of its gate if it has one.
        state: where the body's hidden state enters. "first": it is the token of depth 0, and codes are those of depths
            1 on. "every": it is added to the token of every depth, each with weights of its own if there are several
            (Moshi). "before": it is a token of its own before that of depth 0 (Qwen3-TTS). In the last two the token
            of depth 0 is made of what `depth_decode` is given as `start`.
        last: True enters the last code's embedding, False the running sum of all before.
        kv_heads: heads of keys and values, each shared by as many queries; 0 is one for each query head.
        rope: base of the rotary embedding over the tokens, which turns neighbouring channels (Su et al.,
            arXiv:2104.09864); 0 is none.
        order: for each token in turn, which of several sets of weights of blocks and hidden's projection is its own;
            () is its own number.
        depth: D, codes of a position; 0 is as many as there are learned positions for.
    """

    norm: str = "layer"
    eps: float = 1e-5
    activation: str = "gelu"
    state: str = "first"
    last: bool = False
    kv_heads: int = 0
    rope: float = 0.0
    order: Sequence[int] = ()
    depth: int = 0

    def length(self, depth: int) -> int:
        """Tokens of a position of `depth` codes."""
        return depth + (self.state == "before")

    def sets(self, begin: int, end: int) -> Sequence[int]:
        """Which set of weights is that of tokens begin .. end - 1."""
        return list(self.order[begin:end]) if self.order else range(begin, end)


PLAIN = DepthForm()


class DepthBlock(NamedTuple):
    """Parameters of a block, each a pair of weight (out, in) and bias (out,), or of a norm's gain and bias (dim,).

    A bias may be None. A weight of the attention or the MLP may be (S, out, in), its bias (S, out): S sets, of which
    `DepthForm.order` names each token's.

    Fields:
        norm1, query, key, value, proj: of the attention; heads are as wide as query's outputs divided by their number.
        norm2, up, down: of the MLP.
        gate: down(activation(gate x) * up x) in place of down(activation(up x)), or None.
        query_norm, key_norm: gains (head_dim,) of RMSNorms of queries and keys, before they are turned, or None.
    """

    norm1: Pair
    query: Pair
    key: Pair
    value: Pair
    proj: Pair
    norm2: Pair
    up: Pair
    down: Pair
    gate: Pair | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class DepthWeights(NamedTuple):
    """Parameters of a depth transformer, in one dtype on one device; biases may be None.

    Fields:
        position: (1, T, dim), added to each of the T tokens (D, or D + 1 with the state before them), or None.
        code: weight (dim, C) and bias of the projection of embeddings, or (n, dim, C) and (n, dim) with a set for each
            embedding that enters (D, or D - 1 with the state first), or None if they enter as they are.
        hidden: weight (dim, hidden_dim) and bias of the projection of the hidden state, or None if it enters as it is;
            (S, dim, hidden_dim) and (S, dim) if the state enters at every depth.
        blocks: one `DepthBlock` a layer.
        norm: gain and bias (dim,) before the head, or (D, dim), a set for each depth; None if there is no norm.
        head: weight (K, dim) and bias, or (D, K, dim) and (D, K).
        num_heads: of the attention.
        form: what is done with them.
    """

    position: Tensor | None
    code: Pair | None
    hidden: Pair | None
    blocks: tuple[DepthBlock, ...]
    norm: Pair | None
    head: Pair
    num_heads: int
    form: DepthForm = PLAIN

    @property
    def depth(self) -> int:
        """D, codes of a position; 0 if nothing tells."""
        extra = self.form.length(0)
        return self.form.depth or (0 if self.position is None else self.position.shape[1] - extra)


def _linear(x: Tensor, pair: Pair, sets: Sequence[int]) -> Tensor:
    """x (rows, T, in) through a weight for all tokens, or each token through that of its set."""
    weight, bias = pair
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    each = [F.linear(x[:, t], weight[i], None if bias is None else bias[i]) for t, i in enumerate(sets)]
    return torch.stack(each, 1) if each else x.new_empty(len(x), 0, weight.shape[1])


def _norm(x: Tensor, pair: Pair, form: DepthForm) -> Tensor:
    if form.norm == "rms":
        return F.rms_norm(x, x.shape[-1:], pair[0], form.eps)
    return F.layer_norm(x, x.shape[-1:], *pair, eps=form.eps)


def depth_rope(x: Tensor, block: DepthBlock, num_heads: int, form: DepthForm, begin: int, length: int) -> Tensor | None:
    """Cosines and sines of the angles of tokens begin .. begin + length - 1, as `depth_block` takes them.

    Args:
        x: the tokens, for device and dtype.
        block, num_heads, form: as `depth_block` takes them.
        begin, length: which tokens.

    Returns:
        (2, length, head_dim / 2) float32 (float64 for float64 tokens), or None if the form turns nothing.
    """
    if not form.rope:
        return None
    head_dim = block.query[0].shape[-2] // num_heads
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    place = torch.arange(begin, begin + length, dtype=torch.float64, device=x.device)
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64, device=x.device)
    angle = place[:, None] * form.rope ** (-channel / head_dim)
    return torch.stack([angle.cos(), angle.sin()]).to(wide)


def depth_block(
    x: Tensor,
    block: DepthBlock,
    num_heads: int,
    cache: Tensor | None,
    begin: int,
    dropout: float = 0.0,
    form: DepthForm = PLAIN,
    rope: Tensor | None = None,
) -> Tensor:
    """One block over tokens begin .. begin + T - 1 of each row: what `depth_decode` does in every layer.

    Args:
        x: (rows, T, dim).
        block: the layer's parameters.
        num_heads: heads of the queries.
        cache: (2, rows, kv_heads, length, head_dim), keys and values: this call writes its own tokens' and reads those
            before; None if there are none before.
        begin: the first token's place.
        dropout: share dropped after the attention's projection and after the MLP.
        form: what is done with the parameters.
        rope: what `depth_rope` makes for these tokens.

    Returns:
        (rows, T, dim).
    """
    length = x.shape[1]
    sets, kv_heads = form.sets(begin, begin + length), form.kv_heads or num_heads
    y = _norm(x, block.norm1, form)
    q, k, v = (
        _linear(y, pair, sets).unflatten(-1, (heads, -1)).transpose(1, 2)
        for pair, heads in ((block.query, num_heads), (block.key, kv_heads), (block.value, kv_heads))
    )
    if block.query_norm is not None or rope is not None:
        kind = "none" if block.query_norm is None else "rms"
        q, k = registry["qk_norm_rope"](q, k, kind, form.eps, None, block.query_norm, block.key_norm, rope, "auto")
    if cache is not None:
        cache[0, :, :, begin : begin + length] = k
        cache[1, :, :, begin : begin + length] = v
        k, v = cache[:, :, :, : begin + length]
    mask = None
    if begin and length > 1:  # is_causal would align the last query with key length - 1
        mask = torch.ones(length, begin + length, dtype=torch.bool, device=x.device).tril(begin)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=kv_heads != num_heads
    )
    x = x + F.dropout(_linear(y.transpose(1, 2).flatten(2), block.proj, sets), dropout)
    y = _norm(x, block.norm2, form)
    inner, activation = _linear(y, block.up, sets), ACTIVATIONS[form.activation]
    inner = activation(inner) if block.gate is None else activation(_linear(y, block.gate, sets)) * inner
    return x + F.dropout(_linear(inner, block.down, sets), dropout)


def depth_tokens(hidden: Tensor, entered: Tensor, weights: DepthWeights, depth: int = 0) -> Tensor:
    """The tokens of depths depth, depth + 1, ..., and before that of depth 0 the hidden state's, if it has its own.

    Args:
        hidden: (rows, hidden_dim).
        entered: (rows, n, C), embeddings or sums of them, one for each token that is made of any: all but the hidden
            state's own.
        weights: the depth transformer's parameters.
        depth: the first one's.

    Returns:
        (rows, T, dim), T = n, or n + 1 at depth 0 of a form whose state has a token of its own.
    """
    form, count = weights.form, entered.shape[1]
    own = form.state != "every" and depth == 0
    begin = 0 if depth == 0 else form.length(depth)
    first = max(depth - (form.state == "first"), 0)
    x = entered if weights.code is None else _linear(entered, weights.code, range(first, first + count))
    if form.state == "every":
        states = hidden.unsqueeze(1).expand(-1, count, -1)
        x = x + (states if weights.hidden is None else _linear(states, weights.hidden, form.sets(begin, begin + count)))
    elif own:
        state = hidden if weights.hidden is None else F.linear(hidden, *weights.hidden)
        x = torch.cat([state.unsqueeze(1), x], 1)
    return x if weights.position is None else x + weights.position[:, begin : begin + x.shape[1]]


def depth_logits(x: Tensor, weights: DepthWeights, depth: int = 0) -> Tensor:
    """What is drawn from: logits of depths depth, depth + 1, ... of the states after the last block.

    Args:
        x: (rows, n, dim), of the n tokens that have a code to draw.
        weights: the depth transformer's parameters.
        depth: the first one's.

    Returns:
        (rows, n, K).
    """
    if weights.norm is not None:
        gain, bias = weights.norm
        if gain.ndim == 1:
            x = _norm(x, weights.norm, weights.form)
        else:
            pairs = [(gain[d], None if bias is None else bias[d]) for d in range(depth, depth + x.shape[1])]
            x = torch.stack([_norm(one, pair, weights.form) for one, pair in zip(x.unbind(1), pairs, strict=True)], 1)
    return _linear(x, weights.head, range(depth, depth + x.shape[1]))


_FEW, _BLOCK = 9, 20  # tensors of a depth transformer without its blocks, and of a block


def _flatten(weights: DepthWeights) -> list[Tensor | None]:
    """Position, code, hidden, norm, head, and the blocks; None for what there is not."""
    tensors = [weights.position]
    for pair in (weights.code, weights.hidden, weights.norm, weights.head):
        tensors += (None, None) if pair is None else pair
    for block in weights.blocks:
        for pair in block[:8]:
            tensors += pair
        tensors += (*((None, None) if block.gate is None else block.gate), block.query_norm, block.key_norm)
    return tensors


def _unflatten(tensors: Sequence[Tensor | None], num_heads: int, form: DepthForm) -> DepthWeights:
    """The inverse of `_flatten`."""

    def pairs(some: Sequence[Any]) -> list[Any]:
        return [None if weight is None else (weight, bias) for weight, bias in zip(some[::2], some[1::2], strict=True)]

    code, hidden, norm, head = pairs(tensors[1:_FEW])
    blocks = tuple(
        DepthBlock(*pairs(tensors[i : i + 18]), *tensors[i + 18 : i + _BLOCK])
        for i in range(_FEW, len(tensors), _BLOCK)
    )
    return DepthWeights(tensors[0], code, hidden, blocks, norm, head, num_heads, form)
