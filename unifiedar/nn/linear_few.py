"""Linear layers where rows may be few: on a GPU, without gradients, by kernels for that; elsewhere as ever."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.nn.linear import Linear8bit
from unifiedar.nn.linear_wide import wide_linear
from unifiedar.ops import bias_gelu, few_linear, linear_parts, widen_8bit
from unifiedar.ops.linear_few import few_rows

__all__ = ["gelu_of", "in_parts", "of_few"]


def of_few(layer: nn.Linear | Linear8bit, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer.

    Args:
        layer: `nn.Linear`, or one that stands in for it.
        x: (..., K).
        bias: (N,), in place of the layer's own.

    Returns:
        (..., N).
    """
    if isinstance(layer, Linear8bit):
        return layer(x, bias)  # whose product is the same kernel
    if learns(layer, x):
        return wide_linear(x, layer.weight, layer.bias if bias is None else bias)
    if bias is None:
        # Called, the layer gathers its weights where every rank holds a share of them.
        return few_linear(x, layer.weight, layer.bias) if takes_few(layer, x) else layer(x)
    return few_linear(x, layer.weight, bias) if few_rows(x, layer.weight, bias) else F.linear(x, layer.weight, bias)


def gelu_of(layer: nn.Linear | Linear8bit, x: Tensor) -> Tensor:
    """GELU (its tanh form) of a linear layer; in half precision on a GPU, without gradients, of its float32 sums.

    Args:
        layer: `nn.Linear`, or one that stands in for it.
        x: (..., K), of the dtype in which its product is to run.

    Returns:
        (..., N).
    """
    if takes_few(layer, x):
        scale = layer.scale if isinstance(layer, Linear8bit) else None
        return few_linear(x, layer.weight, layer.bias, scale=scale, activation="gelu")
    eight = isinstance(layer, Linear8bit) and layer.backend != "eager"
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and (eight or x.dtype == layer.weight.dtype)
    if (
        half
        and _plain(layer)
        and layer.bias is not None
        and layer.bias.dtype == x.dtype
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))
    ):
        # On a GPU this is GELU's tanh form on the product's float32 sums, in the same kernel.
        weight = widen_8bit(layer.weight, layer.scale, x.dtype) if isinstance(layer, Linear8bit) else layer.weight
        y = torch._addmm_activation(layer.bias, x.flatten(0, -2), weight.mT, use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    if layer.bias is not None and learns(layer, x):
        return bias_gelu(wide_linear(x, layer.weight), layer.bias)
    return F.gelu(layer(x), approximate="tanh")


def in_parts(layer: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
    """A layer's output (..., N) for `ModulatedNorm.add`.

    Args:
        layer: `nn.Linear`, or one that stands in for it.
        x: (..., K).

    Returns:
        (..., N); or, of few rows, the parts of the product (P, ..., N) and the bias; or, in training on a GPU, the
        product (..., N) and the bias, whose gradient costs no pass of its own there.
    """
    if isinstance(layer, (nn.Linear, Linear8bit)) and takes_few(layer, x):
        scale = layer.scale if isinstance(layer, Linear8bit) else None
        return linear_parts(x, layer.weight, scale=scale), layer.bias
    if isinstance(layer, nn.Linear) and layer.bias is not None and learns(layer, x):
        # A copy: who shares weights out to ranks lets go of them when the module that holds the layer is done.
        return wide_linear(x, layer.weight), layer.bias.clone()
    return layer(x)


def learns(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a plain one that is trained on a GPU. What is compiled is left to the compiler."""
    if type(layer) is not nn.Linear or not _plain(layer) or torch.compiler.is_compiling():
        return False
    return x.is_cuda and torch.is_grad_enabled() and layer.weight.requires_grad


def takes_few(layer: nn.Linear | Linear8bit, x: Tensor) -> bool:
    """Whether a layer's product with x is one of few rows."""
    if not _plain(layer) or (isinstance(layer, Linear8bit) and layer.backend not in ("auto", "triton")):
        return False
    return few_rows(x, layer.weight, layer.bias)


def _plain(layer: nn.Module) -> bool:
    """Whether a layer may be passed by: not one of a class that adds something to it, and none with hooks."""
    if type(layer) not in (nn.Linear, Linear8bit):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
