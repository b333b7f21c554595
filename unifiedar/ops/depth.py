"""Depth-transformer decoding: the D codes of a position, one after another, as one operator.

    x_0 = hidden (projected, or as it is);  x_d = code(e_0 + ... + e_{d-1}), e_i the codebook's row of code i
    y_d = blocks(x_d + position_d), causal over the depths;  logits_d = head(norm(y_d));  code_d = draw(logits_d)

A block: x += proj(attention(norm1 x));  x += down(gelu(up(norm2 x))), LayerNorm, biases, exact GELU.
Lee et al., "Autoregressive Image Generation using Residual Quantization" (2022), section 3.2; VILA-U (arXiv:2409.04429),
section 3.2. Keys and values of earlier depths are kept, so that no work is repeated.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import VARIABLE, Backend, Op, registry

__all__ = ["DepthBlock", "DepthCodes", "DepthWeights", "depth_block", "depth_decode", "depth_pack", "wants_packed"]

Pair = tuple[Tensor, Tensor]


class DepthBlock(NamedTuple):
    """Parameters of a block, each a pair of weight (out, in) and bias (out,), or of a norm's gain and bias (dim,).

    Fields:
        norm1, query, key, value, proj: of the attention.
        norm2, up, down: of the MLP.
    """

    norm1: Pair
    query: Pair
    key: Pair
    value: Pair
    proj: Pair
    norm2: Pair
    up: Pair
    down: Pair


class DepthWeights(NamedTuple):
    """Parameters of a depth transformer, in one dtype on one device.

    Fields:
        position: (1, D, dim), added to what enters at each depth.
        code: weight (dim, C) and bias of the projection of summed embeddings.
        hidden: weight (dim, hidden_dim) and bias of the projection of the hidden state, or None if it enters as it is.
        blocks: one `DepthBlock` a layer.
        norm: gain and bias (dim,) before the head.
        head: weight (K, dim) and bias.
        num_heads: of the attention.
    """

    position: Tensor
    code: Pair
    hidden: Pair | None
    blocks: tuple[DepthBlock, ...]
    norm: Pair
    head: Pair
    num_heads: int


class DepthCodes(NamedTuple):
    """Result of `depth_decode`.

    Fields:
        codes: (N, D) int64.
        total: (N, C), the sum of the codes' embeddings, in the codebook's dtype.
        logits: (rows, D, K) before guidance, in the dtype of hidden, if they were asked for; else None.
    """

    codes: Tensor
    total: Tensor
    logits: Tensor | None


# ---- definition ------------------------------------------------------------------------------------------------------


def depth_block(
    x: Tensor, block: DepthBlock, num_heads: int, cache: Tensor | None, begin: int, dropout: float = 0.0
) -> Tensor:
    """One block over tokens begin .. begin + T - 1 of each row: what `depth_decode` does in every layer.

    Args:
        x: (rows, T, dim).
        block: the layer's parameters.
        num_heads: heads are dim // num_heads wide.
        cache: (2, rows, num_heads, length, head_dim), keys and values: this call writes its own tokens' and reads those
            before; None if there are none before.
        begin: the first token's place.
        dropout: share dropped after the attention's projection and after the MLP.

    Returns:
        (rows, T, dim).
    """
    rows, length, dim = x.shape
    y = F.layer_norm(x, (dim,), *block.norm1)
    q, k, v = (
        F.linear(y, *pair).view(rows, length, num_heads, -1).transpose(1, 2)
        for pair in (block.query, block.key, block.value)
    )
    if cache is not None:
        cache[0, :, :, begin : begin + length] = k
        cache[1, :, :, begin : begin + length] = v
        k, v = cache[:, :, :, : begin + length]
    mask = None
    if begin and length > 1:  # is_causal would align the last query with key length - 1
        mask = torch.ones(length, begin + length, dtype=torch.bool, device=x.device).tril(begin)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
    x = x + F.dropout(F.linear(y.transpose(1, 2).reshape(rows, length, dim), *block.proj), dropout)
    y = F.linear(F.gelu(F.linear(F.layer_norm(x, (dim,), *block.norm2), *block.up)), *block.down)
    return x + F.dropout(y, dropout)


_BLOCK = 2 * len(DepthBlock._fields)


def _flatten(weights: DepthWeights) -> list[Tensor]:
    pairs = [weights.code, *(() if weights.hidden is None else (weights.hidden,))]
    for block in weights.blocks:
        pairs += block
    return [weights.position, *(tensor for pair in (*pairs, weights.norm, weights.head) for tensor in pair)]


def _unflatten(tensors: Sequence[Tensor], num_heads: int) -> DepthWeights:
    """The inverse of `_flatten`: position, code, hidden if there is one, blocks, norm, head."""
    projected = (len(tensors) - 7) % _BLOCK == 2
    pairs = list(zip(tensors[1::2], tensors[2::2], strict=True))
    first, size = 1 + projected, len(DepthBlock._fields)
    blocks = tuple(DepthBlock(*pairs[i : i + size]) for i in range(first, len(pairs) - 2, size))
    return DepthWeights(tensors[0], pairs[0], pairs[1] if projected else None, blocks, *pairs[-2:], num_heads)


def _decode_eager(
    hidden: Tensor,
    codebook: Tensor,
    tensors: Sequence[Tensor],
    packed: Tensor | None,
    num_heads: int,
    guidance: float | None,
    guidance_rows: Tensor | None,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    noise: Tensor | None,
    forced: Tensor | None,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        weights = _unflatten(tensors, num_heads)
        guided = guidance is not None or guidance_rows is not None
        depth, dim, rows = len(temperature), weights.position.shape[-1], len(hidden)
        sample, lookup = registry["sample_codes"], registry["residual_lookup"]
        codes, total, all_logits = _decode_fake(
            hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise,
            forced, return_logits,
        )  # fmt: skip
        total.zero_()
        x = hidden if weights.hidden is None else F.linear(hidden, *weights.hidden)
        cache = x.new_empty(len(weights.blocks), 2, rows, num_heads, depth, dim // num_heads)
        for d in range(depth):
            x = (x + weights.position[:, d]).unsqueeze(1)
            for block, kept in zip(weights.blocks, cache, strict=True):
                x = depth_block(x, block, num_heads, kept, d)
            logits = F.linear(F.layer_norm(x[:, 0], (dim,), *weights.norm), *weights.head)
            if return_logits:
                all_logits[:, d] = logits
            if forced is not None:
                codes[:, d] = forced[:, d]
            else:
                drawn = None if noise is None or temperature[d] == 0 else noise[:, d]
                codes[:, d] = sample(
                    logits, guidance, guidance_rows, temperature[d], top_k[d], None, top_p[d], None, drawn, "auto"
                )
            table = codebook if codebook.ndim == 2 else codebook[d]
            total += lookup(codes[:, d : d + 1], table, False, "auto")
            if d + 1 < depth:
                x = F.linear(total.to(hidden.dtype), *weights.code)
                x = torch.cat([x, x]) if guided else x
        return codes, total, all_logits


# ---- shape of the outputs --------------------------------------------------------------------------------------------


def _decode_fake(
    hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
    return_logits,
):  # fmt: skip
    guided = guidance is not None or guidance_rows is not None
    rows, depth = hidden.shape[0], len(temperature)
    count = rows // 2 if guided else rows
    return (
        hidden.new_empty((count, depth), dtype=torch.int64),
        codebook.new_empty((count, codebook.shape[-1])),
        hidden.new_empty((rows, depth, tensors[-1].shape[0]) if return_logits else (0,)),
    )
