"""VAR's transformer as published: training forward and generation, on a tokenizer of ours in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.published.basic_var import AdaLNBeforeHead, AdaLNSelfAttn
from unifiedar import accelerate
from unifiedar.models import VAR as Ours
from unifiedar.models import VQVAE
from unifiedar.nn.codes_multiscale import phi_of

__all__ = ["VAR", "published"]


class Quantizer(nn.Module):
    """The step of a generation, on a tokenizer's codebook and convolutions."""

    def __init__(self, vae: VQVAE, scales: list[int]):
        super().__init__()
        own = vae.quantize
        self.embedding, self.quant_resi, self.ratio = own.embedding, own.quant_resi, own.ratio
        self.v_patch_nums = scales
        for one in self.quant_resi.modules():
            if isinstance(one, nn.Conv2d):
                one.resi_ratio = self.ratio  # type: ignore[assignment]

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        h = h_BChw
        if si < SN - 1:
            h = F.interpolate(h, size=f_hat.shape[2:], mode="bicubic")
        phi = phi_of(self.quant_resi, self.ratio, si, SN)
        assert phi is not None
        f_hat.add_(h.mul(1 - phi.ratio) + F.conv2d(h, phi.weight[0], phi.bias[0], padding=1).mul_(phi.ratio))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=(self.v_patch_nums[si + 1],) * 2, mode="area")


class SharedAdaLin(nn.Sequential):
    def forward(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, cond_BD.shape[1])


class VAR(nn.Module):
    """Of sizes as `VARConfig` has them, with square scales, the first of one code; training drops nothing.

    Args:
        config: the sizes.
        vae: the tokenizer, which is no part of the state_dict.
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: Any, vae: VQVAE):
        super().__init__()
        self.C, self.Cvae, self.V = config.dim, config.code_dim, config.num_codes
        self.num_heads, self.num_classes = config.num_heads, config.num_classes
        self.patch_nums = [height for height, _ in config.sizes]
        self.cond_drop_rate, self.prog_si, self.drop_path_rate = 0.0, -1, 0.0
        self.vae_proxy, self.vae_quant_proxy = (vae,), (Quantizer(vae, self.patch_nums),)  # in tuples: no submodules
        self.rng = torch.Generator(vae.device)
        self.uniform_prob = torch.full((1, self.num_classes), 1 / self.num_classes, device=vae.device)
        length = sum(config.lengths)
        self.word_embed, self.class_emb = nn.Linear(self.Cvae, self.C), nn.Embedding(self.num_classes + 1, self.C)
        self.pos_start = nn.Parameter(torch.zeros(1, config.lengths[0], self.C))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, self.C))
        self.lvl_embed = nn.Embedding(len(self.patch_nums), self.C)
        self.register_buffer("lvl_1L", torch.zeros(1, length, dtype=torch.int64))
        self.register_buffer("attn_bias_for_masking", torch.zeros(1, 1, length, length))
        shared = SharedAdaLin(nn.SiLU(), nn.Linear(self.C, 6 * self.C))
        self.shared_ada_lin = shared if config.shared_adaln else nn.Identity()
        self.blocks = nn.ModuleList([AdaLNSelfAttn(config) for _ in range(config.depth)])
        self.head_nm, self.head = AdaLNBeforeHead(config), nn.Linear(self.C, self.V)

    def get_logits(self, h: Tensor, cond_BD: Tensor) -> Tensor:
        return self.head(self.head_nm(h.float(), cond_BD).float()).float()

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        kind = label_B.device.type
        with torch.autocast(kind, enabled=False):
            gone = torch.rand(len(label_B), device=label_B.device) < self.cond_drop_rate
            cond = self.class_emb(torch.where(gone, self.num_classes, label_B))
            x = torch.cat((cond[:, None] + self.pos_start, self.word_embed(x_BLCv_wo_first_l.float())), 1)
            x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        made, mask = self.shared_ada_lin(cond), self.attn_bias_for_masking
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, made, mask = x.to(dtype), made.to(dtype), mask.to(dtype)
        for block in self.blocks:
            x = block(x, made, mask)
        return self.get_logits(x, cond)

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]; what it drew is in `drawn`."""
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).view(B)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B, device=self.lvl_1L.device)
        cond = self.class_emb(torch.cat((label_B, torch.full_like(label_B, self.num_classes))))
        places = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x = cond[:, None] + self.pos_start + places[:, :1]
        quantizer: Any = self.vae_quant_proxy[0]
        total = cond.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        begin, count = 0, len(self.patch_nums)
        self.drawn: list[Tensor] = []
        blocks: list[Any] = list(self.blocks)
        for block in blocks:
            block.attn.kv_caching(True)
        for si, side in enumerate(self.patch_nums):
            ratio = si / (count - 1)
            begin += side * side
            made = self.shared_ada_lin(cond)
            for block in blocks:
                x = block(x, made, None)
            logits = self.get_logits(x, cond)
            logits = (1 + cfg * ratio) * logits[:B] - cfg * ratio * logits[B:]
            codes = _drawn(logits, top_k, top_p, rng)
            self.drawn.append(codes)
            h = quantizer.embedding(codes)
            if more_smooth:
                gumbel = torch.empty_like(logits).exponential_(generator=rng).log().neg()
                soft = ((logits * (1 + ratio) + gumbel) / max(0.27 * (1 - ratio * 0.95), 0.005)).softmax(-1)
                h = soft @ quantizer.embedding.weight
            h = h.transpose(1, 2).reshape(B, self.Cvae, side, side)
            total, following = quantizer.get_next_autoregressive_input(si, count, total, h)
            if si < count - 1:
                x = self.word_embed(following.view(B, self.Cvae, -1).transpose(1, 2))
                x = (x + places[:, begin : begin + self.patch_nums[si + 1] ** 2]).repeat(2, 1, 1)
        for block in blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(total).add_(1).mul_(0.5)


def _drawn(logits: Tensor, top_k: int, top_p: float, rng: torch.Generator | None) -> Tensor:
    if top_k:
        out = logits < logits.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
        logits.masked_fill_(out, -torch.inf)
    if top_p:
        ordered, index = logits.sort(dim=-1, descending=False)
        out = ordered.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        out[..., -1:] = False
        logits.masked_fill_(out.scatter(-1, index, out), -torch.inf)
    p = logits.softmax(dim=-1).view(-1, logits.shape[-1])
    return torch.multinomial(p, 1, replacement=True, generator=rng).view(logits.shape[:-1])


def published(model: Ours, way: str = "as it is") -> VAR:
    """With the weights of one of ours, which it shares, and its tokenizer.

    Args:
        model: ours.
        way: "as it is", its blocks "compiled", or with ours "swapped" in.
    """
    assert model.vae is not None
    with torch.device("meta"):
        made = VAR(model.config, model.vae)
    made.load_state_dict(model.state_dict(), assign=True)
    made.eval().requires_grad_(model.head.weight.requires_grad)
    if way == "compiled":
        for block in made.blocks:
            block.compile()
    if way == "swapped":
        report = accelerate(made, verbose=False)
        if report.refused:
            raise RuntimeError(f"not swapped: {report.refused[0]}")
    return made
