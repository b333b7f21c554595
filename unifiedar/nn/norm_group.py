"""Group norm with SiLU, as VQGAN's encoder and decoder have before every convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.ops import add_group_norm, group_norm

__all__ = ["GroupNorm"]


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

    def of_sum(
        self, x: Tensor, shift: Tensor, residual: Tensor | None = None, *, phases: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sum that `unifiedar.ops.add_maps` makes, and its norm; not differentiable."""
        return add_group_norm(
            x, shift, self.weight, self.bias, self.num_groups,
            residual=residual, phases=phases, eps=self.eps, silu=self.silu,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"
