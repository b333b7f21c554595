"""Blocks of VAR as published: a modulated norm before attention with a growing cache, and before an MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.models import VARConfig

__all__ = ["AdaLNBeforeHead", "AdaLNSelfAttn"]


def _modulation(dim: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, count * dim))


class SelfAttention(nn.Module):
    """Attention by a cosine with a gain for each head; keys and values so far are copied to longer tensors."""

    zero_k_bias: Tensor

    def __init__(self, config: VARConfig):
        super().__init__()
        dim, self.num_heads, self.head_dim = config.dim, config.num_heads, config.dim // config.num_heads
        self.attn_l2_norm, self.attn_drop, self.caching = config.l2_norm, 0.0, False
        self.scale = 1.0 if config.l2_norm else 0.25 / math.sqrt(self.head_dim)
        if config.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.num_heads, 1, 1), math.log(4)))
            self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Identity()
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k, v = torch.cat((self.cached_k, k), 2), torch.cat((self.cached_v, v), 2)
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class AdaLNSelfAttn(nn.Module):
    """A block. What the condition decides is computed at every call."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.C, self.shared_aln, self.drop_path = config.dim, config.shared_adaln, nn.Identity()
        self.attn, self.ffn = SelfAttention(config), FFN(config.dim, round(config.dim * config.mlp_ratio))
        self.ln_wo_grad = nn.LayerNorm(config.dim, eps=config.norm_eps, elementwise_affine=False)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.dim))
        else:
            self.ada_lin = _modulation(config.dim, 6)

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        made = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gate1, gate2, scale1, scale2, shift1, shift2 = made.unbind(2)
        x = x + self.drop_path(self.attn(self.ln_wo_grad(x).mul(scale1 + 1).add_(shift1), attn_bias).mul_(gate1))
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x).mul(scale2 + 1).add_(shift2)).mul(gate2))


class AdaLNBeforeHead(nn.Module):
    """The norm before the classifier."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.C, self.ada_lin = config.dim, _modulation(config.dim, 2)
        self.ln_wo_grad = nn.LayerNorm(config.dim, eps=config.norm_eps, elementwise_affine=False)

    def forward(self, x: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x).mul(scale + 1).add_(shift)
