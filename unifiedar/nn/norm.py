"""Norms between the layers of a transformer."""

from typing import cast

import torch
from torch import Tensor, nn

from unifiedar.ops import modulated_norm, parts_norm

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
        branch: Tensor | tuple[Tensor, Tensor | None],
        gate: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the next layer reads, and the tokens, after the branch of the layer before joined them.

        Args:
            x: (B, L, C), the tokens.
            branch: (B, L, C), what that layer put out; or its parts (P, B, L, C) and bias, or its product (B, L, C) and
                bias, as `in_parts` gives them.
            gate: (B, C), a factor on it.
            scale, shift: (B, C).
            dtype: of the first result; None is that of x.

        Returns:
            (B, L, C) twice: normalized, and x + branch gate.
        """
        bias = None
        if isinstance(branch, tuple):
            branch, bias = branch
            if branch.ndim == 4:
                return parts_norm(x, branch, gate, scale, shift, bias, eps=self.eps, dtype=dtype)
        found = modulated_norm(x, scale, shift, branch=branch, gate=gate, bias=bias, eps=self.eps, dtype=dtype)
        return cast(tuple[Tensor, Tensor], found)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
