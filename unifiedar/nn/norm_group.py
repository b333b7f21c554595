"""Group norm with SiLU, as VQGAN's encoder and decoder have before every convolution, and what lies in between."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.ops import add_group_norm, add_maps, group_norm, phase_weights

__all__ = ["GroupNorm", "Summands", "UpsampledConv2d"]


class Summands(NamedTuple):
    """What adds up to a feature map (B, C, H, W): as `unifiedar.ops.add_maps` takes it.

    Attributes:
        x: (B, C, H, W), or its phases: usually a convolution without its bias.
        shift: (C,), the bias.
        residual: (B, C, H, W), or None.
        phases: whether x holds phases.
    """

    x: Tensor
    shift: Tensor
    residual: Tensor | None = None
    phases: bool = False

    def total(self) -> Tensor:
        """The sum; not differentiable."""
        return add_maps(self.x, self.shift, self.residual, phases=self.phases)


class UpsampledConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with a 3 x 3 kernel and a padding of 1 behind nearest upsampling by two; keys unchanged.

    Args:
        in_channels: I.
        out_channels: O.
    """

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, O, 2 H, 2 W) of x (B, I, H, W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def phases(self, x: Tensor) -> Summands:
        """The same as summands, with 16 products for every 36; the upsampled map is never made. Not differentiable."""
        return Summands(F.conv2d(x, phase_weights(self.weight), padding=1), self.bias, phases=True)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of feature maps (B, C, H, W), keys unchanged, and SiLU after it if asked for.

    Args:
        num_groups: groups of neighbouring channels.
        num_channels: C.
        eps: added to the variance.
        silu: whether SiLU follows.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-6, *, silu: bool = False):
        super().__init__(num_groups, num_channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Of x (B, C, H, W), plus shift (C,): in its dtype without gradients; with them and autocast, in torch's."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            # torch.compile fuses these with what is around them, which it cannot do with an operator.
            y = super().forward(x if shift is None else x + shift[:, None, None])
            return F.silu(y) if self.silu else y
        return group_norm(x, self.weight, self.bias, self.num_groups, shift=shift, eps=self.eps, silu=self.silu)

    def of_sum(self, one: Summands) -> tuple[Tensor, Tensor]:
        """The sum of what adds up to a map, and its norm; not differentiable."""
        return add_group_norm(
            one.x, one.shift, self.weight, self.bias, self.num_groups,
            residual=one.residual, phases=one.phases, eps=self.eps, silu=self.silu,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"
