"""What a linear layer puts out where a norm comes next that adds up its parts."""

import torch
from torch import Tensor, nn

from unifiedar.ops import linear_parts
from unifiedar.ops.linear_few import few_rows

__all__ = ["in_parts"]


def in_parts(layer: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
    """A layer's output (..., N) for `ModulatedNorm.add`.

    Args:
        layer: `nn.Linear`, or one that stands in for it.
        x: (..., K).

    Returns:
        (..., N); or, for few rows on a GPU and without gradients, the parts of the product (P, ..., N) and the bias.
    """
    dense = isinstance(layer, nn.Linear) and not torch.is_autocast_enabled(x.device.type)
    if dense and few_rows(x, layer.weight):  # type: ignore[arg-type]
        return linear_parts(x, layer.weight), layer.bias  # type: ignore[arg-type, return-value]
    return layer(x)
