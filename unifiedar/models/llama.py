"""LLaMA (Touvron et al., arXiv:2302.13971) in the layout of the published checkpoints (`model.*`, `lm_head.*`)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KeyValueCache", "Llama", "LlamaConfig"]


Rope = tuple[Tensor, Tensor]  # cosines and sines, broadcast to (B, heads, T, head_dim / 2)


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes; `rope_scaling` divides the positions (LLaMA-2 stretched from 4,096 to 8,192 tokens has 2)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0
    dropout: float = 0.0


class KeyValueCache:
    """Keys and values of all layers in one preallocated tensor: no step copies what earlier steps wrote.

    Args:
        config: of the model.
        rows: sequences.
        length: most tokens a sequence will hold.
    """

    def __init__(self, config: LlamaConfig, rows: int, length: int, *, device: torch.device, dtype: torch.dtype):
        head_dim = config.hidden_size // config.num_heads
        shape = (config.num_layers, 2, rows, config.num_heads, length, head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)
        self.end = 0

    def select(self, rows: Tensor) -> "KeyValueCache":
        """A copy whose row i is this one's row rows[i] (for beam search)."""
        chosen = object.__new__(KeyValueCache)
        chosen.data, chosen.end = self.data[:, :, rows], self.end
        return chosen


class _RMSNorm(nn.Module):
    """Root mean square in float32, cast back, then the weight, as the published model rounds."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: channel i turns with channel i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        dim = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.num_heads = config.num_heads

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor | None, begin: int, mask: Tensor | None
    ) -> Tensor:
        rows, length, dim = x.shape
        q, k, v = (
            f(x).view(rows, length, self.num_heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, *rope), _rotate(k, *rope)
        if cache is not None:
            cache[0, :, :, begin : begin + length] = k
            cache[1, :, :, begin : begin + length] = v
            k, v = cache[:, :, :, : begin + length]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, dim))


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn, self.mlp = _Attention(config), _MLP(config)
        self.input_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor | None, begin: int, mask: Tensor | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache, begin, mask))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class _Body(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = _RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Decoder-only transformer over embeddings: `embed` makes them from token ids, `lm_head` reads tokens off."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) int64 to embeddings (..., hidden_size)."""
        return self.model.embed_tokens(ids)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, pad: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            x: (B, T, hidden_size) embeddings of the next T tokens of every row.
            cache: earlier tokens' keys and values; the new ones are appended.
            pad: (B,) int64, how many padding tokens stand at the left of each row (none if absent). They are never
                attended to, and positions count from the first real token.

        Returns:
            (B, T, hidden_size).
        """
        config, length = self.config, x.shape[1]
        begin = cache.end if cache is not None else 0
        if cache is not None and begin + length > cache.data.shape[4]:
            raise ValueError(f"Llama: cache holds {cache.data.shape[4]} tokens, asked to hold {begin + length}")
        slots = torch.arange(begin, begin + length, device=x.device)
        positions = slots if pad is None else (slots - pad[:, None]).clamp(min=0)
        mask = None
        if pad is not None or (begin and length > 1):
            keys = torch.arange(begin + length, device=x.device)
            mask = keys <= slots[:, None]
            if pad is not None:  # a padding query sees itself, so that no row of the softmax is empty
                mask = mask & (keys >= pad[:, None, None]) | (keys == slots[:, None])
            mask = mask.view(-1, 1, length, begin + length)
        head_dim = config.hidden_size // config.num_heads
        # In the published order of operations: far positions magnify a rounding of the frequencies.
        powers = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
        inverse = 1 / config.rope_theta**powers
        angles = (positions / config.rope_scaling)[..., None] * inverse
        angles = angles.view(-1, 1, length, head_dim // 2)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, None if cache is None else cache.data[i], begin, mask)
        if cache is not None:
            cache.end = begin + length
        return self.model.norm(x)
