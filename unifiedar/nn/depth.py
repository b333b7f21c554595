"""Depth transformer: a small causal transformer that emits the D codes of one position one after another.

RQ-Transformer (arXiv:2203.01941, section 3.2) introduced it; VILA-U (arXiv:2409.04429, section 3.2) puts it on a
language model's hidden state. The keys are VILA-U's `rqtransformer.*`.
"""

from collections.abc import Sequence

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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
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


class _Stack(nn.Module):
    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, num_heads, dropout) for _ in range(num_layers))


class _Classifier(nn.Module):
    def __init__(self, dim: int, num_codes: int):
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, num_codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(x))


class DepthTransformer(nn.Module):
    """Predicts code d of a position from the body's hidden state and the sum of the embeddings of codes 0..d-1.

    Args:
        hidden_dim: width of the body's hidden state (`input_embed_dim_2`).
        code_dim: C, width of a code vector (`input_embed_dim_1`).
        dim, num_layers, num_heads: of the stack; heads are dim // num_heads wide.
        depth: D, codes per position.
        num_codes: K.
        dropout: after the attention projection and the MLP, in training only.
    """

    def __init__(
        self,
        hidden_dim: int,
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
        self.in_mlp_2 = nn.Linear(hidden_dim, dim)
        self.head_transformer = _Stack(dim, num_layers, num_heads, dropout)
        self.classifier_mlp = _Classifier(dim, num_codes)
        self.depth, self.num_heads, self.num_codes = depth, num_heads, num_codes
        nn.init.normal_(self.pos_emb_d, std=0.02)

    def forward(self, hidden: Tensor, running_sums: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            hidden: (N, hidden_dim), the body's state at each of N positions.
            running_sums: (N, D, C), sums of the embeddings of codes 0..d (the last is not used).

        Returns:
            (N, D, K) logits of every code given the ones before it.
        """
        x = torch.cat([self.in_mlp_2(hidden).unsqueeze(1), self.in_mlp_1(running_sums[:, :-1])], dim=1) + self.pos_emb_d
        for block in self.head_transformer.blocks:
            x = block(x)
        return self.classifier_mlp(x)

    @torch.no_grad()
    def decode(
        self,
        hidden: Tensor,
        codebook: Tensor,
        *,
        guidance: float | Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Emit the D codes of each position; keys and values of earlier depths are kept, so that no work is repeated.

        Args:
            hidden: (N, hidden_dim); with `guidance` (2N, hidden_dim), conditional rows first.
            codebook: (K, C) or (D, K, C), as `unifiedar.ops.residual_lookup` takes it.
            guidance, temperature, top_k, top_p, generator: as `unifiedar.ops.sample_codes`; temperature may be one
                number for each depth.
            noise: (N, D, K) float32 ~ Exp(1) that decides the draws, drawn from `generator` if None.

        Returns:
            codes (N, D) int64 and the sum of their embeddings (N, C), in the codebook's dtype.
        """
        temperatures = [temperature] * self.depth if isinstance(temperature, int | float) else list(temperature)
        if len(temperatures) != self.depth:
            raise ValueError(f"decode: temperature must be one number or {self.depth}, got {len(temperatures)}")
        rows, paired = len(hidden), guidance is not None
        blocks = self.head_transformer.blocks
        head_dim = self.pos_emb_d.shape[-1] // self.num_heads
        caches = hidden.new_empty(len(blocks), 2, rows, self.num_heads, self.depth, head_dim)
        codes: list[Tensor] = []
        total = codebook.new_zeros(rows // 2 if paired else rows, codebook.shape[-1])
        x = self.in_mlp_2(hidden)
        for d in range(self.depth):
            x = (x + self.pos_emb_d[:, d]).unsqueeze(1)
            for block, cache in zip(blocks, caches, strict=True):
                x = block(x, cache, d)
            logits = self.classifier_mlp(x[:, 0])
            code = sample_codes(
                logits,
                guidance=guidance,
                temperature=temperatures[d],
                top_k=top_k,
                top_p=top_p,
                noise=None if noise is None else noise[:, d],
                generator=generator,
            )
            codes.append(code)
            table = codebook if codebook.ndim == 2 else codebook[d]
            total = total + residual_lookup(code.unsqueeze(-1), table)
            x = self.in_mlp_1(total.to(hidden.dtype))
            if paired:
                x = torch.cat([x, x])
        return torch.stack(codes, dim=-1), total
