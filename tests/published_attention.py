"""Stand-ins for the self-attention of VAR and Infinity: their names, settings and arithmetic, written anew."""

import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Infinity", "Var", "grid_of", "mask_of", "randomize"]


class _Published(nn.Module):
    """What both have: projections, the norm with its gain, a cache of copies."""

    def __init__(self, dim, heads, normed, scale):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, scale
        if normed:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
            self.max_scale_mul, self.scale = math.log(100), 1
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Identity()
        self.caching, self.cached_k, self.cached_v = False, None, None
        self.normed, self.calls = normed, 0
        self.by_products = False  # attention by two products, whose results are rounded to the dtype of the values

    def _qkv(self, x):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.normed:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        return q, k, v

    def _attend(self, q, k, v, mask, dropout):
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), 2), torch.cat((self.cached_v, v), 2)
            self.cached_k, self.cached_v = k, v
        self.calls += 1
        if self.by_products:
            scores = (q.to(v.dtype) * self.scale) @ k.to(v.dtype).mT
            out = (scores if mask is None else scores + mask).softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Var(_Published):
    """VAR's."""

    def __init__(self, dim=64, heads=2, normed=True, attn_drop=0.0):
        super().__init__(dim, heads, normed, 0.25 / math.sqrt(dim // heads))
        self.attn_l2_norm, self.attn_drop = normed, attn_drop

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x, attn_bias):
        return self._attend(*self._qkv(x), attn_bias, self.attn_drop if self.training else 0.0)


class Infinity(_Published):
    """Infinity's, which turns queries and keys too."""

    def __init__(self, dim=64, heads=2, normed=True):
        super().__init__(dim, heads, normed, 1 / math.sqrt(dim // heads))
        self.cos_attn, self.using_flash, self.use_flex_attn = normed, False, False

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0
    ):
        q, k, v = self._qkv(x)
        if rope2d_freqs_grid is not None:
            begin = sum(math.prod(scale) for scale in scale_schedule[:scale_ind])
            table = rope2d_freqs_grid[str(tuple(scale_schedule))][:, 0, 0, 0, begin : begin + x.shape[1]]
            q, k = (self._turn(one, *table) for one in (q, k))
        if self.use_flex_attn and attn_fn is not None:
            self.calls += 1
            return self.proj_drop(self.proj(attn_fn(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)))
        return self._attend(q.to(v.dtype), k.to(v.dtype), v, attn_bias_or_two_vector, 0.0)

    @staticmethod
    def _turn(x, cosine, sine):
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((cosine * even - sine * odd, sine * even + cosine * odd), -1).flatten(-2)


def _published(cls, name, module):
    cls.__module__, cls.__name__, cls.__qualname__ = module, name, name
    for path in (module.partition(".")[0], module):
        sys.modules.setdefault(path, types.ModuleType(path))
    setattr(sys.modules[module], name, cls)


_published(Var, "SelfAttention", "var_stand_in.basic_var")
_published(Infinity, "SelfAttention", "infinity_attention_stand_in.basic")


def randomize(module, seed=0):
    """Weights of a size that matters, one gain beyond its limit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in module.named_parameters():
            one.copy_(torch.randn(one.shape, generator=generator) * (0.5 if "bias" in name else one.shape[-1] ** -0.5))
            if "scale_mul" in name:
                one.copy_(torch.rand(one.shape, generator=generator) * 3)
                one.view(-1)[0] = 5.0
    return module


def mask_of(lengths, dtype=torch.float32, device="cpu", padding=0):
    """The additive mask of scales, with rows and columns of padding that see the first key alone."""
    level = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    mask = torch.where(level[:, None] >= level, 0.0, -math.inf)[None, None]
    mask = F.pad(mask, (0, padding, 0, padding), value=-math.inf)
    mask[:, :, len(level) :, 0] = 0
    return mask.to(device, dtype)


def grid_of(schedule, width, extra=3):
    """Angles without a pattern, as Infinity keeps them, by schedule, with rows of padding."""
    tokens = sum(math.prod(scale) for scale in schedule)
    angle = torch.randn(tokens + extra, width // 2, generator=torch.Generator().manual_seed(5)) * 2
    return {str(tuple(schedule)): torch.stack((angle.cos(), angle.sin()))[:, None, None, None]}
