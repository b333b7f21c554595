"""Linear layers where rows may be few: on a GPU, without gradients, by kernels for that; elsewhere as ever."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.ops import few_linear, linear_parts
from unifiedar.ops.linear_few import few_rows

__all__ = ["gelu_of", "in_parts", "of_few"]


def of_few(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, as `F.linear`.

    Args:
        x: (..., K).
        weight, bias: (N, K) and (N,), or no bias.

    Returns:
        (..., N).
    """
    return few_linear(x, weight, bias) if few_rows(x, weight, bias) else F.linear(x, weight, bias)


def gelu_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (its tanh form) of a linear layer's float32 sums, in half precision on a GPU, without gradients.

    Args:
        x: (..., K).
        weight, bias: (N, K) and (N,).

    Returns:
        (..., N).
    """
    if few_rows(x, weight, bias):
        return few_linear(x, weight, bias, activation="gelu")
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.mT, use_gelu=True).unflatten(0, x.shape[:-1])


def in_parts(layer: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
    """A layer's output (..., N) for `ModulatedNorm.add`.

    Args:
        layer: `nn.Linear`, or one that stands in for it.
        x: (..., K).

    Returns:
        (..., N); or, of few rows, the parts of the product (P, ..., N) and the bias.
    """
    if isinstance(layer, nn.Linear) and few_rows(x, layer.weight, layer.bias):
        return linear_parts(x, layer.weight), layer.bias
    return layer(x)
