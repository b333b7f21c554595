"""A stand-in for VAR's transformer and tokenizer: their names, settings and arithmetic, written anew."""

import sys
import types

import torch
import torch.nn.functional as F
from published_attention import Var as SelfAttention
from test_accelerate_var import SIDES, VectorQuantizer2
from torch import nn

__all__ = ["VAR", "AdaLNSelfAttn", "build", "publish"]

LENGTHS = [side * side for side in SIDES]
LEVELS = torch.repeat_interleave(torch.arange(len(SIDES)), torch.tensor(LENGTHS))


class FFN(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Identity()

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * kept / (1 - self.drop_prob)


def modulation(dim, count):
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, count * dim))


class AdaLNSelfAttn(nn.Module):
    def __init__(self, dim, heads, shared, normed, drop):
        super().__init__()
        self.C, self.shared_aln = dim, shared
        self.attn, self.ffn = SelfAttention(dim, heads, normed), FFN(dim, 4 * dim)
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.ln_wo_grad = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / 8)
        else:
            self.ada_lin = modulation(dim, 6)

    def forward(self, x, cond_BD, attn_bias):
        made = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).unflatten(1, (1, 6, self.C))
        gate1, gate2, scale1, scale2, shift1, shift2 = made.unbind(2)
        x = x + self.drop_path(gate1 * self.attn(self.ln_wo_grad(x) * (1 + scale1) + shift1, attn_bias))
        return x + self.drop_path(gate2 * self.ffn(self.ln_wo_grad(x) * (1 + scale2) + shift2))


class Head(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.C, self.ada_lin = dim, modulation(dim, 2)

    def forward(self, x, cond):
        scale, shift = self.ada_lin(cond).unflatten(1, (1, 2, self.C)).unbind(2)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Shared(nn.Sequential):
    def forward(self, cond):
        return super().forward(cond).unflatten(1, (1, 6, -1))


class Tokenizer(nn.Module):
    """Of the published one what generation calls."""

    def __init__(self):
        super().__init__()
        self.quantize, self.decoder = VectorQuantizer2(), nn.Conv2d(6, 3, 3, padding=1)

    def fhat_to_img(self, f_hat):
        return self.decoder(f_hat).clamp(-1, 1)


class VAR(nn.Module):
    def __init__(self, vae, depth=3, dim=64, heads=2, shared=False, normed=True, drop=0.2):
        super().__init__()
        self.C, self.Cvae, self.V, self.num_heads, self.num_classes = dim, 6, 40, heads, 7
        self.patch_nums, self.cond_drop_rate, self.prog_si, self.drop_path_rate = SIDES, 0.4, -1, drop
        self.rng, self.uniform_prob = torch.Generator(), torch.full((1, 7), 1 / 7)
        self.vae_proxy, self.vae_quant_proxy = (vae,), (vae.quantize,)
        self.word_embed, self.class_emb = nn.Linear(6, dim), nn.Embedding(8, dim)
        self.pos_start = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_1LC = nn.Parameter(torch.randn(1, len(LEVELS), dim))
        self.lvl_embed = nn.Embedding(len(SIDES), dim)
        self.register_buffer("lvl_1L", LEVELS[None])
        mask = torch.where(LEVELS[:, None] >= LEVELS, 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self.shared_ada_lin = Shared(nn.SiLU(), nn.Linear(dim, 6 * dim)) if shared else nn.Identity()
        rates = torch.linspace(0, drop, depth).tolist()
        self.blocks = nn.ModuleList([AdaLNSelfAttn(dim, heads, shared, normed, rate) for rate in rates])
        self.head_nm, self.head = Head(dim), nn.Linear(dim, self.V)

    def get_logits(self, x, cond):
        return self.head(self.head_nm(x.float(), cond).float()).float()

    def forward(self, label_B, x_BLCv_wo_first_l):
        taken = torch.rand(len(label_B)) < self.cond_drop_rate
        cond = self.class_emb(torch.where(taken, self.num_classes, label_B))
        x = torch.cat((cond[:, None] + self.pos_start, self.word_embed(x_BLCv_wo_first_l)), 1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        for block in self.blocks:
            x = block(x, self.shared_ada_lin(cond), self.attn_bias_for_masking)
        return self.get_logits(x, cond)

    def _draw(self, logits, top_k, top_p, rng):
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1:], -torch.inf)
        if top_p:
            ordered, index = logits.sort(-1)
            out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            out[..., -1] = False
            logits = logits.masked_fill(out.scatter(-1, index, out), -torch.inf)
        return logits, torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=rng).view(logits.shape[:2])

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).view(B)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B)
        cond = self.class_emb(torch.cat((label_B, torch.full_like(label_B, self.num_classes))))
        places = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x, total, begin = cond[:, None] + self.pos_start + places[:, :1], torch.zeros(B, 6, SIDES[-1], SIDES[-1]), 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for step, side in enumerate(SIDES):
            ratio = step / (len(SIDES) - 1)
            for block in self.blocks:
                x = block(x, self.shared_ada_lin(cond), None)
            logits = self.get_logits(x, cond)
            logits, codes = self._draw((1 + cfg * ratio) * logits[:B] - cfg * ratio * logits[B:], top_k, top_p, rng)
            table = self.vae_quant_proxy[0].embedding
            maps = table(codes)
            if more_smooth:
                gumbel = -torch.empty_like(logits).exponential_(generator=rng).log()
                maps = ((logits * (1 + ratio) + gumbel) / max(0.27 * (1 - ratio * 0.95), 0.005)).softmax(-1)
                maps = maps @ table.weight
            maps = maps.transpose(1, 2).reshape(B, 6, side, side)
            total, x = self.vae_quant_proxy[0].get_next_autoregressive_input(step, len(SIDES), total, maps)
            begin += side * side
            if step + 1 < len(SIDES):
                x = self.word_embed(x.flatten(2).transpose(1, 2)) + places[:, begin : begin + LENGTHS[step + 1]]
                x = x.repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(total).add(1).mul(0.5)


def publish(cls, name, module):
    """Gives a class the name and module of a published one."""
    cls.__module__, cls.__name__, cls.__qualname__ = module, name, name
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, cls)


publish(AdaLNSelfAttn, "AdaLNSelfAttn", "var_stand_in.basic_var")
publish(VAR, "VAR", "var_stand_in.var")


def build(cls=VAR, seed=0, **options):
    """With weights of a size that matters, in eval mode."""
    torch.manual_seed(seed)
    vae = Tokenizer().requires_grad_(False).eval()
    module = cls(vae, **options)
    with torch.no_grad():
        for name, one in module.named_parameters():
            one.normal_(std=one.shape[1] ** -0.5 if one.ndim == 2 else 0.4)
            if "scale_mul" in name:
                one.uniform_(0, 2)
    return module.eval()
