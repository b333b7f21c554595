"""Adapter for the whole transformer of VAR: `VAR` in a file var.py.

Published: some 30 launches a block and scale, every weight cast anew at each of them under autocast, what the condition
decides computed anew at every scale, keys and values copied to longer tensors. Swapped: `autoregressive_infer_cfg` and
`forward` run on a `models.VAR` that has the module's parameters.

The tokenizer stays the module's own. Under autocast the generation works on a copy of the matrix products' weights,
cast once and again when they change: half the memory of float32 weights more, while there are such calls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate._swap import Adapter, Swap, Twin, Twins, class_of, hooked, original, overridden, rehearse
from unifiedar.models import VAR, VARConfig
from unifiedar.nn import ScaleBook

__all__ = ["ADAPTERS"]

_CLASS, _FILE, _PARTS = "VAR", "var", "basic_var"
_METHODS = ("autoregressive_infer_cfg", "forward")
_NEEDED = (
    "C", "Cvae", "V", "num_heads", "num_classes", "patch_nums", "cond_drop_rate", "prog_si", "rng", "uniform_prob",
    "vae_proxy", "vae_quant_proxy", "shared_ada_lin", "blocks", "drop_path_rate", "head_nm", "get_logits", *_METHODS,
)  # fmt: skip


# ---- our model on the module's parameters ----------------------------------------------------------------------------


def _twin(module: Any) -> Twin:
    config = _config(module)
    return Twin(module, lambda: _on_meta(config))


_TWINS = Twins(_twin)


def _config(module: Any) -> VARConfig:
    block = module.blocks[0]
    return VARConfig(
        depth=len(module.blocks),
        dim=module.C,
        num_heads=module.num_heads,
        scales=tuple(module.patch_nums),
        num_classes=module.num_classes,
        num_codes=module.V,
        code_dim=module.Cvae,
        shared_adaln=isinstance(module.shared_ada_lin, nn.Sequential),
        l2_norm=bool(block.attn.attn_l2_norm),
        mlp_ratio=block.ffn.fc1.out_features / module.C,
        norm_eps=block.ln_wo_grad.eps,
        drop_path=float(module.drop_path_rate),
        cond_drop=0.0,  # drawn before ours is called, as published in eval mode too
    )


def _on_meta(config: VARConfig) -> VAR:
    with torch.device("meta"):
        return VAR(config)


# ---- what can be swapped ---------------------------------------------------------------------------------------------


def _matches(module: nn.Module) -> bool:
    published = class_of(module, _CLASS)
    return published is not None and published.__module__.rpartition(".")[2] == _FILE and hasattr(module, "patch_nums")


def _why_not(module: Any) -> str | None:
    published = class_of(module, _CLASS)
    assert published is not None
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    reason = overridden(module, published, (*_METHODS, "get_logits")) or _parts_why_not(module)
    if reason is None:
        vae, quantizer = module.vae_proxy[0], module.vae_quant_proxy[0]
        reason = rehearse(_short(module), _swap, {}, _prepare, _play, shared=(vae, quantizer))
    return reason


def _parts_why_not(module: Any) -> str | None:
    if not len(module.blocks):
        return "has no blocks"
    for i, block in enumerate(module.blocks):
        where = type(block).__module__.rpartition(".")[2]
        if type(block).__name__ != "AdaLNSelfAttn" or where != _PARTS:
            return f"its block {i} is a {type(block).__name__} of {where}, not an AdaLNSelfAttn of {_PARTS}"
        drops = (block.attn.attn_drop, *(getattr(one, "p", 0) for one in (block.attn.proj_drop, block.ffn.drop)))
        if any(drops):
            return f"its block {i} has dropout, and ours has none"
        last = max(len(module.blocks) - 1, 1)
        if abs(_drop(block) - module.drop_path_rate * i / last) > 1e-6:
            return f"its block {i} is left out at another rate than one in proportion to its place"
    if not all(isinstance(side, int) for side in module.patch_nums):
        return f"its patch_nums are {module.patch_nums}, not integers"
    tensors = [*module.parameters(), *module.buffers()]
    if any(type(one.data) is not Tensor for one in tensors):
        return "its weights are not plain tensors"
    if any(one.is_meta for one in tensors):
        return "its weights are on the meta device: load them first"
    if any(one.dtype != torch.float32 for one in module.parameters()):
        return "its weights are not float32, which the published code wants"
    try:
        model = _on_meta(_config(module))
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be rebuilt: {' '.join(str(error).split())}"
    ours = {name: value.shape for name, value in model.state_dict().items()}
    if ours != {name: value.shape for name, value in module.state_dict().items()}:
        return "its state_dict has not the published keys and shapes"
    return None


def _drop(block: Any) -> float:
    return float(getattr(block.drop_path, "drop_prob", 0.0))


def _swap(module: Any) -> Swap:
    text = (
        "autoregressive_infer_cfg and forward by models.VAR on its parameters: norms with their gates, attention by "
        "scales, a cache allocated once; under autocast weights are cast once, into a copy"
    )
    return Swap(text, {"autoregressive_infer_cfg": autoregressive_infer_cfg, "forward": forward})


def _undo(module: nn.Module) -> None:
    _TWINS.pop(module, None)


# ---- methods ---------------------------------------------------------------------------------------------------------


def _usual(module: Any) -> Twin | None:
    """Ours; None for what only the published method can do: other dtypes, partial training, hooks, parts replaced."""
    if module.prog_si >= 0 or any(one.dtype != torch.float32 for one in module.parameters()) or hooked(module):
        return None
    return _TWINS.of(module)


def forward(self: Any, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
    """VAR.forward: labels (B,) and inputs (B, L - l_0, Cvae) to logits (B, L, V)."""
    x = x_BLCv_wo_first_l
    twin = _usual(self)
    if twin is None or not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return original(self, "forward")(label_B, x)
    taken = torch.rand(x.shape[0], device=label_B.device) < self.cond_drop_rate
    model = twin.model.train(self.training)
    return model(torch.where(taken, self.num_classes, label_B), x)


@torch.no_grad()
def autoregressive_infer_cfg(
    self: Any,
    B: int,
    label_B: int | Tensor | None,
    g_seed: int | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
) -> Tensor:
    """VAR.autoregressive_infer_cfg: pictures (B, 3, H, W) in [0, 1] of classes."""
    numbers = all(type(one) in (int, float) for one in (cfg, top_p)) and type(top_k) is int and type(B) is int
    usual = numbers and 0 <= cfg < math.inf and 0 <= top_k <= self.V and 0 <= top_p <= 1 and B >= 1
    if isinstance(label_B, Tensor):
        usual = usual and label_B.shape == (B,) and label_B.dtype == torch.int64
    twin = _usual(self) if usual else None
    if twin is None:
        return original(self, "autoregressive_infer_cfg")(
            B, label_B, g_seed=g_seed, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth
        )
    device = self.lvl_1L.device
    generator = None if g_seed is None else self.rng.manual_seed(g_seed)
    if label_B is None:
        label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=generator).reshape(B)
    elif isinstance(label_B, int):
        label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B, device=device)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    quantizer = self.vae_quant_proxy[0]
    convolutions = [one for one in quantizer.quant_resi.modules() if isinstance(one, nn.Conv2d)]
    ratio: Any = convolutions[0].resi_ratio if convolutions else 0.0
    book = ScaleBook(quantizer.embedding.weight.detach(), quantizer.quant_resi, ratio, tuple(self.patch_nums))
    total = twin.in_dtype(dtype).eval().draw_features(
        label_B, book, cfg=cfg, top_k=top_k, top_p=top_p, seed=generator, more_smooth=more_smooth
    )  # fmt: skip
    return self.vae_proxy[0].fhat_to_img(total).add_(1).mul_(0.5)


# ---- rehearsal -------------------------------------------------------------------------------------------------------


def _short(module: Any) -> Any:
    """The module with its first two blocks alone, which say what the others do; it shares everything."""
    short = copy.copy(module)
    blocks = list(module.blocks)[:2]
    short.__dict__["_modules"] = {**module._modules, "blocks": nn.ModuleList(blocks)}
    short.drop_path_rate = _drop(blocks[-1])
    return short


@torch.no_grad()
def _prepare(module: Any) -> None:
    """Weights of a size that matters: gates are almost closed in a new model."""
    for name, one in module.named_parameters():
        if "scale_mul" in name:
            one.uniform_(0, 2)
        elif one.ndim == 2:
            one.normal_(std=one.shape[1] ** -0.5)
        else:
            one.normal_(std=0.3)


def _play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    device = module.lvl_1L.device
    length = sum(side * side for side in module.patch_nums)
    inputs = torch.randn((2, length - module.patch_nums[0] ** 2, module.Cvae), device=device)
    labels = torch.randint(module.num_classes, (2,), device=device)
    module.eval()
    yield "its forward", module(labels, inputs)
    if training:
        module.train()
        leaf = inputs.clone().requires_grad_()
        out = module(labels, leaf)
        yield "its forward in training", out
        given = [one for one in module.parameters() if one.requires_grad]
        yield "its gradient", torch.autograd.grad(out.sin().mean(), [leaf, *given])
        module.eval()
    with torch.no_grad():
        cuts = {"top_k": max(module.V // 5, 1), "top_p": 0.9}
        yield "its autoregressive_infer_cfg", module.autoregressive_infer_cfg(1, None, g_seed=1, cfg=3.0, **cuts)


ADAPTERS = (Adapter("transformer of VAR", _matches, _why_not, _swap, _undo),)
"""The adapters of this file."""
