"""A linear layer whose weights have 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.ops import linear_8bit

__all__ = ["Linear8bit"]


class Linear8bit(nn.Module):
    """Stands in for a `nn.Linear` whose weights were rounded to 8 bits: for use, not for training.

    Args:
        weight: (N, K) int8 or float8_e4m3fn.
        scale: (N,) float32: the layer's weights are scale[:, None] weight.
        bias: (N,) floats, or None.
        dtype: what products run in where the caller does not say; `.to(dtype)` changes it and leaves the 8 bits alone.
        backend: of `linear_8bit`.

    Buffers:
        weight, scale: as given.

    Parameters:
        bias (N,): in `dtype`, if there is one.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self.dtype, self.backend = dtype, backend

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) to (..., N) in the dtype of x, under autocast in that of autocast; `bias` in place of its own."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias if bias is None else bias
        return linear_8bit(x, self.weight, self.scale, bias, backend=self.backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.to(dtype)` would widen weights of fp8, which count as floating point, and round the scales.
        kept = {"weight": self.weight, "scale": self.scale}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, {str(self.weight.dtype).removeprefix('torch.')}, bias={self.bias is not None}"
