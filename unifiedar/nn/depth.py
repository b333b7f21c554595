"""Depth transformer: a small causal transformer that emits the D codes of one position one after another.

RQ-Transformer (arXiv:2203.01941, section 3.2) introduced it; VILA-U (arXiv:2409.04429, section 3.2) puts it on a
language model's hidden state. The keys are VILA-U's `rqtransformer.*`. RQ-Transformer's body is a stack of the same
blocks, over the positions of a picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.ops import residual_lookup, sample_codes

__all__ = ["DepthTransformer"]


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Tensor | None, begin: int) -> Tensor:
        rows, length, dim = x.shape
        q, k, v = (
            f(x).view(rows, length, self.num_heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        if cache is not None:  # (2, rows, heads, D, head_dim): a step writes its own depth and reads all before
            cache[0, :, :, begin : begin + length] = k
            cache[1, :, :, begin : begin + length] = v
            k, v = cache[:, :, :, : begin + length]
        mask = None
        if begin and length > 1:  # is_causal would align the last query with key length - 1
            mask = torch.ones(length, begin + length, dtype=torch.bool, device=x.device).tril(begin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        return self.dropout(self.proj(y.transpose(1, 2).reshape(rows, length, dim)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Attention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        x = x + self.attn(self.ln1(x), cache, begin)
        return x + self.mlp(self.ln2(x))


class Stack(nn.Module):
    """Causal pre-norm blocks without a final norm: LayerNorm, biases, GELU (erf), four times as wide inside the MLP."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, num_heads, dropout) for _ in range(num_layers))
        self.num_heads = num_heads

    def cache(self, x: Tensor, length: int) -> Tensor:
        """Room for the keys and values of `length` tokens of rows like x (rows, ..., dim), not yet written."""
        head_dim = x.shape[-1] // self.num_heads
        return x.new_empty(len(self.blocks), 2, len(x), self.num_heads, length, head_dim)

    def forward(self, x: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        """States (rows, T, dim) of tokens begin .. begin + T - 1, those before them read from the cache, if any."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], begin)
        return x


class Classifier(nn.Module):
    """LayerNorm and a linear layer: (..., dim) to logits (..., K)."""

    def __init__(self, dim: int, num_codes: int):
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, num_codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(x))


class DepthTransformer(nn.Module):
    """Predicts code d of a position from the body's hidden state and the sum of the embeddings of codes 0..d-1.

    Args:
        hidden_dim: width of the body's hidden state (`input_embed_dim_2`), or None if the state is as wide as the stack
            and enters as it is, without a projection (RQ-Transformer).
        code_dim: C, width of a code vector (`input_embed_dim_1`).
        dim, num_layers, num_heads: of the stack; heads are dim // num_heads wide.
        depth: D, codes per position.
        num_codes: K.
        dropout: after the attention projection and the MLP, in training only.
    """

    def __init__(
        self,
        hidden_dim: int | None,
        code_dim: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        depth: int,
        num_codes: int,
        dropout: float = 0.1,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"DepthTransformer: dim must be a multiple of num_heads {num_heads}, got {dim}")
        self.pos_emb_d = nn.Parameter(torch.zeros(1, depth, dim))
        self.in_mlp_1 = nn.Linear(code_dim, dim)
        self.in_mlp_2 = nn.Identity() if hidden_dim is None else nn.Linear(hidden_dim, dim)
        self.head_transformer = Stack(dim, num_layers, num_heads, dropout)
        self.classifier_mlp = Classifier(dim, num_codes)
        self.depth, self.num_codes = depth, num_codes
        nn.init.normal_(self.pos_emb_d, std=0.02)

    def running_sums(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Sums (..., D, C) of the embeddings of codes 0..d, in the codebook's dtype, as `forward` takes them.

        Args:
            codes: (..., D) int64.
            codebook: (K, C) or (D, K, C).

        Returns:
            (..., D, C); `unifiedar.ops.residual_lookup` says what bad input raises.
        """
        return residual_lookup(codes, codebook, cumulative=True)

    def forward(self, hidden: Tensor, running_sums: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            hidden: (N, hidden_dim), the body's state at each of N positions.
            running_sums: (N, D, C), sums of the embeddings of codes 0..d (the last is not used).

        Returns:
            (N, D, K) logits of every code given the ones before it.
        """
        x = torch.cat([self.in_mlp_2(hidden).unsqueeze(1), self.in_mlp_1(running_sums[:, :-1])], dim=1) + self.pos_emb_d
        return self.classifier_mlp(self.head_transformer(x))

    def _per_depth(self, argument: str, value: float | Sequence[float]) -> list[Any]:
        values = [value] * self.depth if isinstance(value, int | float) else list(value)
        if len(values) != self.depth:
            raise ValueError(f"decode: {argument} must be one number or {self.depth}, got {len(values)}")
        return values

    @torch.no_grad()
    def decode(
        self,
        hidden: Tensor,
        codebook: Tensor,
        *,
        guidance: float | Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Emit the D codes of each position; keys and values of earlier depths are kept, so that no work is repeated.

        Args:
            hidden: (N, hidden_dim); with `guidance` (2N, hidden_dim), conditional rows first.
            codebook: (K, C) or (D, K, C), as `unifiedar.ops.residual_lookup` takes it.
            guidance, temperature, top_k, top_p, generator: as `unifiedar.ops.sample_codes`; temperature, top_k and
                top_p may be one number for each depth.
            noise: (N, D, K) float32 ~ Exp(1) that decides the draws, drawn from `generator` if None.

        Returns:
            codes (N, D) int64 and the sum of their embeddings (N, C), in the codebook's dtype.

        Raises:
            ValueError: for a list of settings that is not D long, and what `sample_codes` and `residual_lookup` refuse.
        """
        temperatures = self._per_depth("temperature", temperature)
        top_ks, top_ps = self._per_depth("top_k", top_k), self._per_depth("top_p", top_p)
        rows, paired = len(hidden), guidance is not None
        codes: list[Tensor] = []
        total = codebook.new_zeros(rows // 2 if paired else rows, codebook.shape[-1])
        x = self.in_mlp_2(hidden)
        cache = self.head_transformer.cache(x, self.depth)
        for d in range(self.depth):
            x = self.head_transformer((x + self.pos_emb_d[:, d]).unsqueeze(1), cache, d)
            logits = self.classifier_mlp(x[:, 0])
            code = sample_codes(
                logits,
                guidance=guidance,
                temperature=temperatures[d],
                top_k=top_ks[d],
                top_p=top_ps[d],
                noise=None if noise is None else noise[:, d],
                generator=generator,
            )
            codes.append(code)
            table = codebook if codebook.ndim == 2 else codebook[d]
            total = total + residual_lookup(code.unsqueeze(-1), table)
            if d + 1 < self.depth:
                x = self.in_mlp_1(total.to(hidden.dtype))
                x = torch.cat([x, x]) if paired else x
        return torch.stack(codes, dim=-1), total
