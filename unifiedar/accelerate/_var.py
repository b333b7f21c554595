"""Adapter for the tokenizer's quantizer of VAR: `VectorQuantizer2` in a file quant.py.

Swapped is what VAR itself calls: encoding to codes or sums, teacher-forcing inputs, and the step of a generation. Its
forward, which trains the tokenizer, and embed_to_fhat stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate._swap import Adapter, Swap, class_of, original, overridden
from unifiedar.nn.codes_multiscale import phi_of
from unifiedar.ops import Phi, multiscale_inputs, multiscale_lookup, multiscale_quantize, next_scale_input

__all__ = ["ADAPTERS"]

_CLASS, _FILE = "VectorQuantizer2", "quant"
_METHODS = ("f_to_idxBl_or_fhat", "idxBl_to_var_input", "get_next_autoregressive_input")


def _matches(module: nn.Module) -> bool:
    return class_of(module, _CLASS) is not None


def _convolutions(module: Any) -> list[nn.Conv2d]:
    return [one for one in module.quant_resi.modules() if isinstance(one, nn.Conv2d)]


def _phi(module: Any, scale: int | None = None) -> Phi | None:
    """Its convolutions, or the one of a scale, uncopied."""
    convs: list[Any] = _convolutions(module)
    ratio = convs[0].resi_ratio if convs else 0.0
    return phi_of(module.quant_resi, ratio, scale, len(module.v_patch_nums))


def _why_not(module: Any) -> str | None:
    published = class_of(module, _CLASS)
    if published is None or published.__module__.rpartition(".")[2] != _FILE:
        where = "nowhere" if published is None else published.__module__
        return f"{_CLASS} comes from {where}, not from a module {_FILE} as in VAR"
    needed = ("embedding", "quant_resi", "v_patch_nums", "using_znorm", "prog_si", *_METHODS)
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    return overridden(module, published, _METHODS) or _weights_why_not(module) or _answers_differently(module)


def _weights_why_not(module: Any) -> str | None:
    book, convs = module.embedding, _convolutions(module)
    if not isinstance(book, nn.Embedding) or book.max_norm is not None or book.sparse:
        return "its embedding is not a plain nn.Embedding"
    if len(module.v_patch_nums) < 2 or not all(isinstance(side, int) for side in module.v_patch_nums):
        return f"its v_patch_nums are {module.v_patch_nums}, not two integers or more"
    weights: list[Any] = [book.weight, *(tensor for conv in convs for tensor in (conv.weight, conv.bias))]
    if any(not isinstance(weight, Tensor) or type(weight.data) is not Tensor for weight in weights):
        return "its weights are not plain tensors"
    if any(weight.is_meta for weight in weights):
        return "its weights are on the meta device: load them first"
    if any(weight.dtype != torch.float32 for weight in weights):
        return "its weights are not float32, in which the published code quantizes"
    if len({getattr(conv, "resi_ratio", None) for conv in convs}) > 1:
        return "its convolutions differ in resi_ratio"
    return None


def _answers_differently(module: Any) -> str | None:
    """Run the module's own methods once: None if they are the residual pyramid of its weights, else the reason."""
    table, sides = module.embedding.weight.detach(), tuple(module.v_patch_nums)
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(len(table), (1, side * side), generator=generator).to(table.device) for side in sides]
    shape = (1, table.shape[1], sides[-1], sides[-1])
    features = torch.randn(shape, generator=generator).to(table.device) * table.std()
    # Sums of both in float32, the published code's perhaps with TF32: half of its precision is plenty to tell formulas.
    try:
        with torch.no_grad():
            phi = _phi(module)
            got = module.idxBl_to_var_input(codes)
            expected = multiscale_inputs(codes, table, phi, sides, backend="eager")
            if got.shape != expected.shape or not _near(got, expected):
                return "its idxBl_to_var_input does not return the residual pyramid's inputs"
            rows = table[codes[0]].transpose(1, 2).reshape(1, -1, sides[0], sides[0])
            total, following = module.get_next_autoregressive_input(0, len(sides), features.clone(), rows)
            want, pooled = next_scale_input(features, codes[0], table, _phi(module, 0), sides, 0, backend="eager")
            if pooled is None or not _near(total, want) or not _near(following.flatten(2).transpose(1, 2), pooled):
                return "its get_next_autoregressive_input does not add a scale of the residual pyramid"
            first = module.f_to_idxBl_or_fhat(features, False)[0]
            metric = "cosine" if module.using_znorm else "l2"
            nearest = multiscale_quantize(features, table, phi, sides, metric=metric, backend="eager")[0]
            if first.shape != nearest.shape or not torch.equal(first, nearest):
                return "its f_to_idxBl_or_fhat does not choose the nearest codes"
            sums = module.f_to_idxBl_or_fhat(features, True)
            chosen = module.f_to_idxBl_or_fhat(features, False)
            if not _near(sums[-1], multiscale_lookup(chosen, table, phi, sides, backend="eager")):
                return "its f_to_idxBl_or_fhat does not sum what its codes stand for"
    except Exception as error:  # foreign code may fail in any way; the report says how
        return f"its methods fail on random features {shape}: {type(error).__name__}: {error}"
    return None


def _near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= 5e-3 * expected.norm())


def _swap(module: Any) -> Swap:
    functions: tuple[Callable[..., Any], ...] = (f_to_idxBl_or_fhat, idxBl_to_var_input, get_next_autoregressive_input)
    methods = dict(zip(_METHODS, functions, strict=True))
    text = "encoding by multiscale_quantize, inputs by multiscale_inputs and next_scale_input; forward is its own"
    return Swap(text, methods)


def _unusual(module: Any, *maps: Any) -> bool:
    """Calls that the published method answers itself: with gradients, partial training, or other dtypes."""
    if module.prog_si >= 0 or any(not isinstance(one, Tensor) or one.dtype != torch.float32 for one in maps):
        return True
    weights = [module.embedding.weight, *module.quant_resi.parameters()]
    if any(weight.dtype != torch.float32 for weight in weights):
        return True
    return torch.is_grad_enabled() and any(one.requires_grad for one in (*weights, *maps))


def f_to_idxBl_or_fhat(self: Any, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Any = None) -> list[Tensor]:
    """VectorQuantizer2.f_to_idxBl_or_fhat: features (B, C, H, W) to every scale's codes, or the sums after each."""
    if _unusual(self, f_BChw):
        return original(self, "f_to_idxBl_or_fhat")(f_BChw, to_fhat, v_patch_nums)
    scales, table, phi = tuple(v_patch_nums or self.v_patch_nums), self.embedding.weight, _phi(self)
    metric = "cosine" if self.using_znorm else "l2"
    codes = multiscale_quantize(f_BChw, table, phi, scales, metric=metric)
    return list(multiscale_lookup(codes, table, phi, scales, cumulative=True)) if to_fhat else codes


def idxBl_to_var_input(self: Any, gt_ms_idx_Bl: list[Tensor]) -> Tensor:
    """VectorQuantizer2.idxBl_to_var_input: codes (B, h w) of every scale to what VAR reads, (B, L - h_0 w_0, C)."""
    if _unusual(self):
        return original(self, "idxBl_to_var_input")(gt_ms_idx_Bl)
    return multiscale_inputs(gt_ms_idx_Bl, self.embedding.weight, _phi(self), tuple(self.v_patch_nums))


def get_next_autoregressive_input(self: Any, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """VectorQuantizer2.get_next_autoregressive_input: adds scale si to f_hat in place, and averages it down."""
    scales = tuple(self.v_patch_nums)
    if len(scales) != SN or _unusual(self, f_hat, h_BChw):
        return original(self, "get_next_autoregressive_input")(si, SN, f_hat, h_BChw)
    rows = h_BChw.flatten(2).transpose(1, 2)
    total, following = next_scale_input(f_hat, rows, self.embedding.weight, _phi(self, si), scales, si)
    f_hat.copy_(total)
    if following is None:
        return f_hat, f_hat
    return f_hat, following.transpose(1, 2).reshape(*f_hat.shape[:2], scales[si + 1], scales[si + 1])


ADAPTERS = (Adapter("multi-scale quantizer of VAR", _matches, _why_not, _swap),)
