"""Convolutional encoder and decoder of VQGAN (Esser et al., arXiv:2012.09841), published keys.

VAR's tokenizer and RQ-VAE have both, VILA-U the decoder. The decoder's parts have two forms: `forward` is the paper's
figure; `branch` is the same without what PyTorch would make passes of their own for (biases, residual sums, norms,
upsampling), which the decoder then fuses between one part and the next.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.nn import GroupNorm, Summands, UpsampledConv2d

__all__ = ["Decoder", "DecoderConfig", "Encoder"]


@dataclass(frozen=True)
class DecoderConfig:
    """`ddconfig` of the published systems, of decoder and encoder.

    Attributes:
        ch, ch_mult: level i runs at `resolution` / 2^i with ch * ch_mult[i] channels.
        num_res_blocks: residual blocks of a level in the encoder; the decoder has one more.
        z_channels: of the latents.
        resolution: side of the pictures that `attn_resolutions` counts from; other sizes run too.
        attn_resolutions: sides of the levels whose blocks are followed by attention. The middle has it always.
        out_ch: of the pictures.
        fused_qkv: whether attention's three projections are one convolution `qkv`, as in VAR, or `q`, `k` and `v`.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    resolution: int
    attn_resolutions: tuple[int, ...]
    out_ch: int = 3
    fused_qkv: bool = False

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one of the latents."""
        return 2 ** (len(self.ch_mult) - 1)


def _norm(channels: int, silu: bool = True) -> GroupNorm:
    return GroupNorm(32, channels, eps=1e-6, silu=silu)


def _bare(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without its bias."""
    return F.conv2d(x, conv.weight, None, padding=conv.padding)  # type: ignore[arg-type]


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


class _ResnetBlock(nn.Module):
    def __init__(self, in_ch: int, out_ch: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(in_ch), nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_ch), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        if in_ch != out_ch:
            self.nin_shortcut = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    @property
    def norm(self) -> GroupNorm:
        """The one that comes first."""
        return self.norm1

    def branch(self, x: Tensor, normed: Tensor) -> Summands:
        """Of x and its norm."""
        h = _bare(self.conv2, self.norm2(_bare(self.conv1, normed), _bias(self.conv1)))
        if not hasattr(self, "nin_shortcut"):
            return Summands(h, _bias(self.conv2), x)
        return Summands(h, _bias(self.conv2) + _bias(self.nin_shortcut), _bare(self.nin_shortcut, x))


class _AttnBlock(nn.Module):
    """Single-head attention over the pixels."""

    def __init__(self, channels: int, fused: bool):
        super().__init__()
        self.norm = _norm(channels, silu=False)
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self._attend(self.norm(x)))

    def _attend(self, h: Tensor, in_products: bool = False) -> Tensor:
        parts = self.qkv(h).chunk(3, dim=1) if hasattr(self, "qkv") else (self.q(h), self.k(h), self.v(h))
        q, k, v = (part.flatten(2).transpose(1, 2) for part in parts)
        if in_products:
            scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[2] ** -0.5)
            y = scores.softmax(2) @ v
        else:
            y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))[:, 0]
        return y.transpose(1, 2).reshape(h.shape)

    def branch(self, x: Tensor, normed: Tensor) -> Summands:
        """Of x and its norm."""
        # One head this wide is beyond flash kernels, and the kernel that torch takes instead has a program for 32
        # pixels, so that few pictures leave a GPU idle. Matrix products do not, and small maps have room for scores.
        y = self._attend(normed, in_products=x.shape[1] > 256 and x.shape[2] * x.shape[3] <= 1024)
        return Summands(_bare(self.proj_out, y), _bias(self.proj_out), x)


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsampledConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def branch(self, x: Tensor) -> Summands:
        """Of x alone."""
        return self.conv.phases(x)


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and at the bottom alone, as published


class _Middle(nn.Module):
    def __init__(self, channels: int, fused: bool):
        super().__init__()
        self.block_1, self.attn_1 = _ResnetBlock(channels, channels), _AttnBlock(channels, fused)
        self.block_2 = _ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))

    def parts(self) -> list[_ResnetBlock | _AttnBlock]:
        """In their order."""
        return [self.block_1, self.attn_1, self.block_2]


class _Level(nn.Module):
    """Residual blocks, each with its attention if the level `i` has any, then `upsample` or `downsample` if given."""

    def __init__(self, config: DecoderConfig, i: int, in_ch: int, num_blocks: int, **resample: nn.Module):
        super().__init__()
        out_ch = config.ch * config.ch_mult[i]
        attend = config.resolution >> i in config.attn_resolutions
        self.block = nn.ModuleList(_ResnetBlock(out_ch if b else in_ch, out_ch) for b in range(num_blocks))
        self.attn = nn.ModuleList(_AttnBlock(out_ch, config.fused_qkv) for _ in range(num_blocks if attend else 0))
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("upsample", "downsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x

    def parts(self) -> list[_ResnetBlock | _AttnBlock]:
        """In their order, without `upsample`."""
        pairs = zip(self.block, self.attn, strict=True) if len(self.attn) else ((one,) for one in self.block)
        return [part for pair in pairs for part in pair]  # type: ignore[misc]


class Encoder(nn.Module):
    """Pixels (B, out_ch, H, W), nominally in [-1, 1], to latents (B, z_channels, H / 2^(levels-1), W / 2^(levels-1)).

    `down.{i}` is level i of `ch_mult`; the first runs first. Sides are halved rounding down.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        channels = [config.ch * m for m in config.ch_mult]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.out_ch, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            _Level(
                config,
                i,
                channels[i - 1] if i else config.ch,
                config.num_res_blocks,
                **({"downsample": _Downsample(channels[i])} if i < last else {}),
            )
            for i in range(len(channels))
        )
        self.mid = _Middle(channels[-1], config.fused_qkv)
        self.norm_out = _norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to pixels (B, out_ch, h * 2^(levels-1), w * 2^(levels-1)), nominally in [-1, 1].

    `up.{i}` is level i of `ch_mult`; the deepest runs first. The last activation is linear; callers clamp.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        channels = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1], config.fused_qkv)
        self.up = nn.ModuleList(
            _Level(
                config,
                i,
                channels[min(i + 1, len(channels) - 1)],
                config.num_res_blocks + 1,
                **({"upsample": _Upsample(channels[i])} if i else {}),
            )
            for i in range(len(channels))
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        if self._fuses(z):
            return self._fused(z)
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))

    def _fuses(self, z: Tensor) -> bool:
        """Whether the weights are laid out for tensor cores, and neither gradients nor autocast are wanted."""
        weight = self.conv_out.weight
        if torch.is_grad_enabled() and (z.requires_grad or weight.requires_grad):
            return False
        laid_out = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return laid_out and z.dtype == weight.dtype and not torch.is_autocast_enabled(z.device.type)

    def _fused(self, z: Tensor) -> Tensor:
        x = self.conv_in(z).contiguous(memory_format=torch.channels_last)
        normed = self.mid.block_1.norm(x)
        parts: list[_ResnetBlock | _AttnBlock | _Upsample] = [*self.mid.parts()]
        for level in reversed(self.up):
            parts += level.parts()  # type: ignore[operator]
            parts += [level.upsample] if hasattr(level, "upsample") else []  # type: ignore[list-item]
        for i, part in enumerate(parts):
            one = part.branch(x) if isinstance(part, _Upsample) else part.branch(x, normed)
            after = parts[i + 1] if i + 1 < len(parts) else None
            if isinstance(after, _Upsample):  # reads the sum alone
                x = one.total()
            else:
                norm = self.norm_out if after is None else after.norm
                x, normed = norm.of_sum(one)
        return self._pixels(normed)

    def _pixels(self, normed: Tensor) -> Tensor:
        """`conv_out` with as many output channels as tensor cores want: cuDNN takes 3 to a kernel 16 times slower."""
        weight = self.conv_out.weight
        missing = -len(weight) % 32  # on an H100 8 and 16 take 3 to 4 times as long as 32
        wide = F.conv2d(normed, F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)), padding=1)
        return wide[:, : len(weight)] + _bias(self.conv_out)[:, None, None]
