"""Norms between the layers of a transformer."""

from typing import cast

import torch
from torch import Tensor, nn

from unifiedar.ops import gated_linear, modulated_linear, modulated_norm
from unifiedar.ops.linear_modulated import few_rows

__all__ = ["ModulatedNorm"]


class ModulatedNorm(nn.Module):
    """The layer norm of an AdaLN transformer, modulated by a condition; it has no weights of its own.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """What the next layer reads, (B, L, C) in `dtype`, of tokens x (B, L, C), scale and shift (B, C)."""
        return modulated_norm(x, scale, shift, eps=self.eps, dtype=dtype)

    def add(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the next layer reads, and the tokens, after the branch of the layer before joined them.

        Args:
            x: (B, L, C), the tokens.
            branch: (B, L, C), what that layer put out.
            gate: (B, C), a factor on it.
            scale, shift: (B, C).
            dtype: of the first result; None is that of x.

        Returns:
            (B, L, C) twice: normalized, and x + branch gate.
        """
        found = modulated_norm(x, scale, shift, branch=branch, gate=gate, eps=self.eps, dtype=dtype)
        return cast(tuple[Tensor, Tensor], found)

    def goes_with(self, x: Tensor, scale: Tensor, shift: Tensor, layer: nn.Linear) -> bool:
        """Whether tokens x (B, L, C) are so few that `linear` and `add_linear` are the faster way into a layer."""
        return few_rows(x, scale, shift, layer.weight)

    def linear(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
    ) -> Tensor:
        """A linear layer of what `forward` gives, (B, L, N) in the dtype of its weight, without gradients.

        Args:
            x: (B, L, C), the tokens.
            scale, shift: (B, C).
            weight, bias: (N, C) and (N,), of the layer.
            activation: None or "gelu", after it.
        """
        return modulated_linear(x, scale, shift, weight, bias, activation=activation, eps=self.eps)

    @staticmethod
    def add_linear(x: Tensor, layer: nn.Linear, tokens: Tensor, gate: Tensor) -> Tensor:
        """Tokens (B, L, C) after a layer's output joined them through a gate (B, C), without gradients."""
        return gated_linear(x, layer.weight, layer.bias, tokens, gate)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
