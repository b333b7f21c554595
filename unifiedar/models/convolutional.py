"""The convolutional decoder of VQGAN (Esser et al., arXiv:2012.09841) that RQ-VAE and VILA-U share, published keys."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """`ddconfig` of the published systems: level i runs at `resolution` / 2^i with ch * ch_mult[i] channels."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    resolution: int
    attn_resolutions: tuple[int, ...]
    out_ch: int = 3


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _ResnetBlock(nn.Module):
    def __init__(self, in_ch: int, out_ch: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_ch), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        if in_ch != out_ch:
            self.nin_shortcut = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _AttnBlock(nn.Module):
    """Single-head attention over the pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(y)


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = _ResnetBlock(channels, channels), _AttnBlock(channels)
        self.block_2 = _ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    def __init__(self, in_ch: int, out_ch: int, num_blocks: int, attend: bool, upsample: bool):
        super().__init__()
        self.block = nn.ModuleList(_ResnetBlock(in_ch if i == 0 else out_ch, out_ch) for i in range(num_blocks))
        self.attn = nn.ModuleList(_AttnBlock(out_ch) for _ in range(num_blocks if attend else 0))
        if upsample:
            self.upsample = _Upsample(out_ch)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to pixels (B, out_ch, h * 2^(levels-1), w * 2^(levels-1)), nominally in [-1, 1].

    `up.{i}` is level i of `ch_mult`; the deepest runs first. The last activation is linear; callers clamp.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        channels = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1])
        self.up = nn.ModuleList(
            _Level(
                channels[min(i + 1, len(channels) - 1)],
                channels[i],
                config.num_res_blocks + 1,
                attend=config.resolution >> i in config.attn_resolutions,
                upsample=i > 0,
            )
            for i in range(len(channels))
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
