"""Adapters for the tokenizer's quantizer of Infinity: `MultiScaleBSQ`, and the `BSQ` in it that quantizes one scale.

Both stand in a file multiscale_bsq.py. Published: sixteen operators a scale around two interpolations, channels moved
last and back, every bit normalized and passed straight through. BSQ is called on its own, too: for the codes of drawn
bits in generation, and for the labels in training.

Codes come out exact, where the published x + (code - x) rounds them; packed indices stay the published method's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate._swap import Adapter, Swap, class_of, facts, original, overridden, rehearse
from unifiedar.nn import BitwiseQuantizer

__all__ = ["ADAPTERS"]

_CLASS, _SIGN_CLASS, _FILE = "MultiScaleBSQ", "BSQ", "multiscale_bsq"

# What the released tokenizers have. The published code takes other values for all of these; ours does not.
_SETTINGS = {
    "has_projections": False,
    "use_decay_factor": False,
    "random_flip": False,
    "random_flip_1lvl": False,
    "drop_when_test": False,
    "remove_residual_detach": False,
    "z_interplote_up": "trilinear",
    "z_interplote_down": "area",
}
_SIGN_SETTINGS = {
    "has_projections": False,
    "new_quant": True,
    "num_codebooks": 1,
    "keep_num_codebooks_dim": False,
    "channel_first": None,
    "force_quantization_f32": True,
}

_QUANTIZERS: dict[int, BitwiseQuantizer] = {}
"""Ours by the number of bits. They hold no state that a call reads, so every swapped module shares them."""


def _matches(module: nn.Module) -> bool:
    return class_of(module, _CLASS) is not None


def _sign_matches(module: nn.Module) -> bool:
    published = class_of(module, _SIGN_CLASS)
    return published is not None and published.__module__.rpartition(".")[2] == _FILE


def _unlike(module: Any, settings: dict[str, Any]) -> str | None:
    missing = [name for name in settings if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name, value in settings.items():
        found = getattr(module, name)
        if found != value:
            return f"its {name} is {found!r}, and ours knows {value!r} only"
    return None


def _why_not(module: Any) -> str | None:
    published = class_of(module, _CLASS)
    if published is None or published.__module__.rpartition(".")[2] != _FILE:
        where = "nowhere" if published is None else published.__module__
        return f"{_CLASS} comes from {where}, not from a module {_FILE} as in Infinity"
    reason = _unlike(module, _SETTINGS) or overridden(module, published, ("forward",))
    if reason is not None:
        return reason
    if getattr(module, "use_stochastic_depth", False) and getattr(module, "drop_rate", 0) > 0:
        return "it leaves scales out at random in training"
    if not isinstance(getattr(module, "layernorm", None), nn.Identity):
        return "it normalizes layers before it quantizes"
    sign = getattr(module, "lfq", None)
    if not isinstance(sign, nn.Module) or not _sign_matches(sign):
        return f"its lfq is a {type(sign).__name__}, not a {_SIGN_CLASS} of {_FILE}"
    return _sign_settings_why_not(sign) or rehearse(module, _swap, {}, lambda module: None, _play)


def _sign_settings_why_not(module: Any) -> str | None:
    published = class_of(module, _SIGN_CLASS)
    assert published is not None
    reason = _unlike(module, _SIGN_SETTINGS)
    if reason is None and not hasattr(module, "codebook_dim"):
        reason = "lacks codebook_dim"
    if reason is None and not 1 <= module.codebook_dim <= 64:
        reason = f"has {module.codebook_dim} bits, and ours takes 1 to 64"
    return reason


def _sign_why_not(module: Any) -> str | None:
    published = class_of(module, _SIGN_CLASS)
    assert published is not None
    return (
        _sign_settings_why_not(module)
        or overridden(module, published, ("forward", "indices_to_codes"))
        or rehearse(module, _sign_swap, {}, lambda module: None, _sign_play)
    )


def _dim(module: Any) -> int:
    dim = module.codebook_dim
    _QUANTIZERS.setdefault(dim, BitwiseQuantizer(dim))
    return dim


def _swap(module: Any) -> Swap:
    return Swap("forward by bitwise_quantize, all scales at once", {"forward": forward}, {"dim": _dim(module.lfq)})


def _sign_swap(module: Any) -> Swap:
    return Swap(
        "forward by bitwise_quantize, indices_to_codes of bits by bitwise_lookup",
        {"forward": sign_forward, "indices_to_codes": indices_to_codes},
        {"dim": _dim(module)},
    )


def _device(module: Any) -> torch.device:
    return next((one.device for one in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    dim, device = module.lfq.codebook_dim, _device(module)
    scales = [(1, 1, 1), (1, 2, 3), (1, 3, 3), (1, 4, 6)]
    for mode in (False, True)[: 1 + training]:
        module.train(mode)
        x = torch.randn((2, dim, 4, 6), device=device, requires_grad=mode)
        out = module(x, scales, return_residual_norm_per_scale=True)
        yield "its forward", out
        if mode:
            yield "its gradient", torch.autograd.grad(out[0].square().sum(), x)
    yield "its forward of frames", module(torch.randn((1, dim, 1, 4, 6), device=device), scales)


def _sign_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    dim, device = module.codebook_dim, _device(module)
    for mode in (False, True)[: 1 + training]:
        module.train(mode)
        for shape in ((2, 5, dim), (2, dim, 3, 4), (2, dim, 1, 3, 4)):
            x = torch.randn(shape, device=device, requires_grad=mode)
            out = module(x)
            yield "its forward", out
            if mode:
                yield "its gradient", torch.autograd.grad(out[0].square().cumsum(-1).sum(), x)
            yield "its indices_to_codes", module.indices_to_codes(out[2], label_type="bit_label")


def forward(
    self: Any,
    x: Tensor,
    scale_schedule: Any = None,
    mask: Any = None,
    return_all_codes: bool = False,
    return_residual_norm_per_scale: bool = False,
) -> Any:
    """MultiScaleBSQ.forward: a map (B, d, h, w) or (B, d, t, h, w) to its sum, bits and inputs, scale by scale."""
    dim = facts(self)["dim"]
    usual = isinstance(x, Tensor) and x.ndim in (4, 5) and x.dtype == torch.float32 and x.shape[1] == dim
    if usual and scale_schedule is not None and not return_all_codes:
        size = tuple(x.shape[2:]) if x.ndim == 5 else (1, *x.shape[2:])
        scales = [tuple(scale) for scale in scale_schedule]
        if scales and all(len(scale) == 3 for scale in scales) and scales[-1] == size:
            norms = bool(return_residual_norm_per_scale)
            return _QUANTIZERS[dim](x, scales, return_residual_norm_per_scale=norms)
    return original(self, "forward")(x, scale_schedule, mask, return_all_codes, return_residual_norm_per_scale)


def sign_forward(
    self: Any, x: Tensor, return_loss_breakdown: bool = False, mask: Any = None, entropy_weight: float = 0.1
) -> Any:
    """BSQ.forward: tokens (B, n, d), or a map with channels first, to codes and bits."""
    dim = facts(self)["dim"]
    usual = isinstance(x, Tensor) and x.ndim >= 3 and x.dtype == torch.float32
    if not usual or return_loss_breakdown or x.shape[-1 if x.ndim == 3 else 1] != dim:
        return original(self, "forward")(x, return_loss_breakdown, mask, entropy_weight)
    return _QUANTIZERS[dim].lfq(x)


def indices_to_codes(self: Any, indices: Tensor, label_type: str = "int_label", project_out: bool = True) -> Tensor:
    """BSQ.indices_to_codes: bits (B, ..., d) to codes, channels first."""
    dim = facts(self)["dim"]
    kinds = (torch.int64, torch.int32, torch.uint8, torch.bool)
    usual = isinstance(indices, Tensor) and indices.ndim >= 1 and indices.dtype in kinds
    if not usual or label_type != "bit_label" or indices.shape[-1] != dim:
        return original(self, "indices_to_codes")(indices, label_type, project_out)
    return _QUANTIZERS[dim].lfq.indices_to_codes(indices, label_type)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("bitwise multi-scale quantizer of Infinity", _matches, _why_not, _swap),
    Adapter("bitwise quantizer of Infinity", _sign_matches, _sign_why_not, _sign_swap),
)
"""The adapters of this file."""
