"""Adapters for vector-quantize-pytorch: VectorQuantize, ResidualVQ, and with it GroupedResidualVQ.

Published: every layer makes a matrix of distances (rows x codes), a matrix of zeros and ones of the same size, and in
training the product of that with the vectors. Ours are the search and the statistics; what a step does with the
statistics (`update_ema`, dead codes, all-reduce) stays the published codebook's own methods, random numbers included.

A GroupedResidualVQ needs no adapter: each of its groups is a ResidualVQ.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.accelerate._swap import (
    FLOATS,
    Adapter,
    Swap,
    class_of,
    facts,
    original,
    overridden,
    pack,
    rehearse,
    side_by_side,
    unpack,
)
from unifiedar.ops import code_statistics, residual_lookup, residual_quantize

__all__ = ["ADAPTERS"]

_PACKAGE = "vector_quantize_pytorch"


def _matches(name: str) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        published = class_of(module, name)
        return published is not None and _PACKAGE in published.__module__.split(".")

    return matches


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The arguments of a call of the published forward by name: those `known` unless None, others unless off."""
    given = {**dict(zip(facts(module)["arguments"], args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None and (value is not False or name in known)}


def _signature(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _initted(module: nn.Module, books: Iterable[Any]) -> bool:
    """Whether codebooks hold their codes yet: k-means fills them in their first forward.

    Reading the flags would stall the stream on every call; once they are True only `load_state_dict` and the like can
    make them False, and leave a trace.
    """
    flags = [book.initted for book in books]
    if any(flag.is_inference() for flag in flags):
        return all(bool(flag) for flag in flags)
    seen = tuple((id(flag), flag._version) for flag in flags)
    if facts(module).get("initted") != seen:
        if not all(bool(flag) for flag in flags):
            return False
        facts(module)["initted"] = seen
    return True


def _metric(book: Any) -> str:
    return "cosine" if book.use_cosine_sim else "l2"


# ---- VectorQuantize --------------------------------------------------------------------------------------------------

_VQ_NEEDED = (
    "_codebook", "project_in", "project_out", "heads", "separate_codebook_per_head", "rotation_trick", "zero",
    "commitment_weight", "has_commitment_loss", "freeze_codebook", "has_projections", "channel_last",
    "accept_image_fmap", "accept_3d_fmap", "return_zeros_for_masked_padding", "dim", "codebook_size",
)  # fmt: skip
_BOOK_NEEDED = (
    "embed", "embed_avg", "cluster_size", "initted", "decay", "ema_update", "manual_ema_update", "update_ema",
    "expire_codes_", "all_reduce_fn", "use_cosine_sim", "transform_input", "gumbel_sample",
    "learnable_codebook",
)  # fmt: skip


def _vq_why_not(module: Any) -> str | None:
    published = class_of(module, "VectorQuantize")
    assert published is not None
    reason = overridden(module, published, ("forward", "maybe_split_heads_from_input")) or _vq_settings_why_not(module)
    return reason or rehearse(module, _vq_swap, _small([module._codebook]), _vq_prepare, _vq_play)


def _vq_settings_why_not(module: Any) -> str | None:
    """Why what a VectorQuantize was built for is not covered, or None."""
    missing = [name for name in _VQ_NEEDED if not hasattr(module, name)]
    missing += [f"_codebook.{name}" for name in _BOOK_NEEDED if not hasattr(getattr(module, "_codebook", None), name)]
    if missing:
        return f"lacks {', '.join(missing)}: it is of another version than we know"
    book = module._codebook
    if getattr(book, "vq_bridge", None) is not None:
        return "its codebook goes through a network (vq_bridge)"
    if getattr(module, "has_codebook_orthogonal_loss", False):
        return "it pushes codes apart by gradient (orthogonal_reg_weight)"
    if getattr(module, "directional_reparam", False):
        return "it learns by noise in the direction of the code (directional_reparam)"
    if getattr(module, "in_place_codebook_optimizer", None) is not None:
        return "its codebook has an optimizer of its own (in_place_codebook_optimizer)"
    if book.learnable_codebook or isinstance(book.embed, nn.Parameter):
        return "its codebook is learned by gradient (learnable_codebook)"
    if getattr(book, "affine_param", False):
        return "it fits its codebook to the batch's mean and variance (affine_param)"
    if getattr(module, "has_codebook_diversity_loss", False):
        return "its diversity loss needs the distances to all codes (codebook_diversity_loss_weight)"
    if module.has_commitment_loss and getattr(module, "commitment_use_cross_entropy_loss", False):
        return "its commitment loss needs the distances to all codes (commitment_use_cross_entropy_loss)"
    choose = book.gumbel_sample
    if not isinstance(choose, functools.partial) or choose.args or set(choose.keywords) - {
        "stochastic", "straight_through"
    }:  # fmt: skip
        return "it chooses codes by a function of its own (gumbel_sample)"
    if choose.keywords.get("stochastic"):
        return "it draws its codes at random (stochastic_sample_codes)"
    if choose.keywords.get("straight_through"):
        return "it passes gradients through the distances (straight_through)"
    return _vq_embed_why_not(book)


def _vq_embed_why_not(book: Any) -> str | None:
    embed = book.embed
    if type(embed) is not Tensor or embed.ndim != 3 or embed.dtype not in FLOATS:
        return f"its codebook is a {type(embed).__name__} of shape {tuple(embed.shape)} and dtype {embed.dtype}"
    if embed.is_meta:
        return "its codebook is on the meta device: load the weights first"
    if book.use_cosine_sim and bool(book.initted):
        norms = embed.float().norm(dim=-1)
        if not bool(((norms - 1).abs() < 1e-2).logical_or(norms < 1e-6).all()):
            return "its codebook is not of unit length, as use_cosine_sim keeps it"
    return None


def _vq_swap(module: Any) -> Swap:
    cosine = ", cosine" if module._codebook.use_cosine_sim else ""
    text = f"forward by residual_quantize (one depth{cosine}), training by code_statistics"
    samples = tuple(inspect.signature(module._codebook.expire_codes_).parameters)
    return Swap(text, {"forward": vector_quantize}, {"arguments": _signature(module), "samples": samples})


_VQ_KNOWN = {
    "x", "mask", "lens", "freeze_codebook", "return_loss_breakdown", "sample_codebook_temp", "ema_update",
}  # fmt: skip


def _vq_unusual(module: Any, call: dict[str, Any]) -> bool:
    """Calls that the published forward answers itself: cross entropy to given codes, beams, codes made by a network,
    weighted or postponed updates, masks where it takes none, wrong shapes and dtypes."""
    x, book = call.get("x"), module._codebook
    if not set(call) <= _VQ_KNOWN or not isinstance(x, Tensor) or not x.numel() or x.dtype not in FLOATS:
        return True
    if x.device != book.embed.device or book.training != module.training:
        return True
    spatial = 2 if module.accept_image_fmap else 3 if module.accept_3d_fmap else 0
    if x.ndim not in ((2 + spatial,) if spatial else (2, 3)):
        return True
    masked = "mask" in call or "lens" in call
    if masked:
        mask = call.get("mask")
        if x.ndim != 3 or not module.channel_last or ("mask" in call and "lens" in call):
            return True
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            return True
    if module.training:
        # Published, the loss under a mask takes the input before projection; that fails where shapes differ.
        if masked and (module.heads > 1 or module.has_projections):
            return True
        state = (book.embed, book.cluster_size, book.embed_avg)
        if any(one.dtype != torch.float32 or one.grad is not None for one in state):
            return True
    return not _initted(module, [book])


def vector_quantize(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """VectorQuantize.forward: features to quantized features, codes and loss, with its breakdown if asked for."""
    call = _arguments(self, args, kwargs, _VQ_KNOWN)
    if _vq_unusual(self, call):
        return original(self, "forward")(*args, **kwargs)
    book, heads = self._codebook, self.heads
    source = x = call["x"]
    dtype, one_token, spatial, mask = x.dtype, x.ndim == 2, x.shape[2:], call.get("mask")
    if "lens" in call:
        mask = torch.arange(x.shape[1], device=x.device) < call["lens"][:, None]
    planes = self.accept_image_fmap or self.accept_3d_fmap
    channels_first = planes or (not self.channel_last and not one_token)

    # To (batch, n, channels), then to (tables, ..., channels) or, with one table, (batch, n, channels).
    if one_token:
        x = x.unsqueeze(1)
    elif channels_first:
        x = x.flatten(2).transpose(1, 2)
    batch = len(x)
    x = book.transform_input(self.maybe_split_heads_from_input(self.project_in(x)))

    tables = len(book.embed)
    flat = x.detach().float().reshape(tables, -1, x.shape[-1])
    embed = book.embed.detach()
    found = [residual_quantize(rows, table, 1, metric=_metric(book)) for rows, table in zip(flat, embed, strict=True)]
    codes = torch.stack([one.codes.squeeze(-1) for one in found]) if tables > 1 else found[0].codes.mT
    rows = torch.stack([one.quantized for one in found]) if tables > 1 else found[0].quantized
    quantized = rows.view(x.shape).to(dtype)
    if self.training and not call.get("freeze_codebook", self.freeze_codebook):
        # In older versions (1.27) masked vectors may take the place of dead codes too.
        kept = {"seq_mask": mask.reshape(1, -1)} if mask is not None and "seq_mask" in facts(self)["samples"] else {}
        if _vq_move(book, flat, codes, mask, call.get("ema_update", book.ema_update)):
            book.expire_codes_(flat, **kept)

    commitment = loss = self.zero
    if self.training:
        chosen = quantized.detach()
        if source.requires_grad and getattr(self, "route_gradients_to_input", True):
            quantized = _rotate(x, quantized) if self.rotation_trick else x + (quantized - x).detach()
        # As published: a loss without terms can be added to others and differentiated. The buffer stays as it is.
        loss = loss.detach().requires_grad_()
        if self.has_commitment_loss:
            commitment = _commitment(chosen, source if mask is not None else x, mask)
            loss = loss + commitment * self.commitment_weight

    codes = codes.reshape(x.shape[:-1])
    if heads > 1:
        if self.separate_codebook_per_head:  # (heads, batch, n, ...)
            codes, quantized = codes.permute(1, 2, 0), quantized.permute(1, 2, 0, 3).flatten(2)
        else:  # (1, batch * heads, n, ...)
            codes = codes.view(batch, heads, -1).transpose(1, 2)
            quantized = quantized.unflatten(1, (batch, heads)).squeeze(0).transpose(1, 2).flatten(2)
    quantized = self.project_out(quantized)
    if mask is not None:
        rest = torch.zeros_like(source) if self.return_zeros_for_masked_padding else source
        quantized = torch.where(mask.unsqueeze(-1), quantized, rest)
        codes = codes.where(mask if heads == 1 else mask.unsqueeze(-1), -1)
    if one_token:
        quantized, codes = quantized.squeeze(1), codes.squeeze(1)
    elif channels_first:
        quantized = quantized.transpose(1, 2)
        if planes:
            quantized, codes = quantized.unflatten(2, spatial), codes.unflatten(1, spatial)
    if not call.get("return_loss_breakdown"):
        return quantized, codes, loss
    breakdown = sys.modules[type(self).forward.__module__].LossBreakdown(commitment, self.zero, self.zero, self.zero)
    return quantized, codes, loss, breakdown


@torch.no_grad()
def _vq_move(book: Any, vectors: Tensor, codes: Tensor, mask: Tensor | None, ema_update: bool) -> bool:
    """One step of a codebook's averages, by vectors (tables, N, C) and codes (tables, N), where mask (b, n) is True.

    Returns:
        Whether there was one: without averages and dead codes there is none.
    """
    # In older versions (1.27) codes die only where averages move the codebook.
    if not ema_update and not getattr(book, "has_dead_code_replacement", False):
        return False
    tables, size, channels = book.embed.shape
    if mask is not None:
        codes = codes.where(mask.reshape(1, -1), -1)
    elif tables > 1:
        codes = codes + size * torch.arange(tables, device=codes.device)[:, None]
    counts, sums = code_statistics(vectors.flatten(0, 1), codes.flatten(), tables * size)
    counts, sums = counts.view(tables, size), sums.view(tables, size, channels)
    book.all_reduce_fn(counts)
    book.all_reduce_fn(sums)
    book.cluster_size.lerp_(counts, 1 - book.decay)
    book.embed_avg.lerp_(sums, 1 - book.decay)
    if ema_update and not book.manual_ema_update:
        book.update_ema()
    return True


def _rotate(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, with the gradient that the rotation and scaling from x to it passes (Fifty et al., arXiv:2410.06424,
    section 4.2): with unit vectors u of x, v of quantized and w of u + v, |v|/|u| (x - 2 (x.w) w + 2 (x.u) v)."""
    length, target = x.norm(dim=-1, keepdim=True), quantized.norm(dim=-1, keepdim=True)
    u = (x / length.clamp(min=1e-6)).detach()
    v = (quantized / target.clamp(min=1e-6)).detach()
    w = F.normalize(u + v, dim=-1, eps=1e-6)
    along_w, along_u = (x * w).sum(-1, keepdim=True), (x * u).sum(-1, keepdim=True)
    return (x - 2 * along_w * w + 2 * along_u * v) * (target / length.clamp(min=1e-6)).detach()


def _commitment(chosen: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared distance of x from its codes, where the mask is True: without asking the GPU how many those are."""
    if mask is None:
        return F.mse_loss(chosen, x)
    errors = F.mse_loss(chosen, x, reduction="none")
    kept = errors.float().where(mask.unsqueeze(-1), 0)
    return (kept.sum() / (mask.sum() * x.shape[-1])).to(errors.dtype)


# ---- ResidualVQ ------------------------------------------------------------------------------------------------------

_RVQ_NEEDED = (
    "layers", "project_in", "project_out", "num_quantizers", "shared_codebook", "uniform_codebook_size",
    "get_codes_from_indices", "get_output_from_indices", "quantize_dropout", "has_projections",
)  # fmt: skip


def _rvq_why_not(module: Any) -> str | None:
    published = class_of(module, "ResidualVQ")
    assert published is not None
    missing = [name for name in _RVQ_NEEDED if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}: it is of another version than we know"
    reason = overridden(module, published, ("forward", "get_output_from_indices", "get_codes_from_indices"))
    if reason is not None:
        return reason
    if getattr(module, "implicit_neural_codebook", False):
        return "its codebooks are made by networks (implicit_neural_codebook)"
    if getattr(module, "diveq", False):
        return "it learns by noise in the direction of the code (diveq)"
    if module.accept_image_fmap:
        return "it takes images (accept_image_fmap), which the published forward answers, layer by layer"
    if not module.uniform_codebook_size:
        return "its codebooks differ in size, so its layers are searched one by one"
    for d, layer in enumerate(module.layers):
        reason = _vq_settings_why_not(layer)
        if reason is None and (layer.heads > 1 or layer.has_projections or not layer.channel_last):
            reason = "it has heads, projections or channels first"
        if reason is not None:
            return f"layer {d}: {reason}"
    metrics = {_metric(layer._codebook) for layer in module.layers}
    if len(metrics) > 1 or len({layer._codebook.embed.dtype for layer in module.layers}) > 1:
        return "its layers differ in metric or dtype"
    return rehearse(module, _rvq_swap, _small(layer._codebook for layer in module.layers), _rvq_prepare, _rvq_play)


def _rvq_swap(module: Any) -> Swap:
    if not module.shared_codebook:
        pack(_embeds(module))
    methods: dict[str, Callable[..., Any]] = {
        "forward": residual_vq,
        "get_output_from_indices": get_output_from_indices,
    }
    text = "forward in eval by residual_quantize (all depths at once), get_output_from_indices by residual_lookup"
    return Swap(text, methods, {"arguments": _signature(module)})


def _rvq_undo(module: Any) -> None:
    if not module.shared_codebook:
        unpack(_embeds(module))


def _books(module: Any) -> list[Any]:
    return [layer._codebook for layer in list(module.layers)[: 1 if module.shared_codebook else None]]


def _embeds(module: Any) -> list[Tensor]:
    return [book.embed for book in _books(module)]


def _rvq_table(module: Any) -> Tensor:
    """The codebooks as the ops take them: (K, C) if shared, else (D, K, C)."""
    if module.shared_codebook:
        return module.layers[0]._codebook.embed.detach()[0]
    return side_by_side(_embeds(module)).squeeze(-3)


def _masks_output(module: Any) -> bool:
    """Whether masked rows are zero behind the projection too: before 1.32 the layers' zeros are projected."""
    return bool(getattr(module, "return_zeros_for_masked_padding", False))


_RVQ_KNOWN = {"x", "mask", "return_all_codes", "sample_codebook_temp", "freeze_codebook"}


def _rvq_unusual(module: Any, call: dict[str, Any]) -> bool:
    """Calls that the published forward answers itself, on layers of ours: training, cross entropy, wrong shapes."""
    x, books = call.get("x"), _books(module)
    if module.training or any(book.training for book in books) or (getattr(module, "eval_beam_size", None) or 1) > 1:
        return True
    if not set(call) <= _RVQ_KNOWN or not isinstance(x, Tensor) or not x.numel() or x.ndim not in (2, 3):
        return True
    # float64 is searched in float32 by the published code.
    if x.dtype not in FLOATS or x.dtype == torch.float64 or x.device != books[0].embed.device:
        return True
    mask = call.get("mask")
    if mask is not None:
        if x.ndim != 3 or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            return True
        if module.has_projections and not _masks_output(module):
            return True
    return not _initted(module, books)


def residual_vq(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """ResidualVQ.forward: features to quantized features, codes and losses, with the rows of all codes if asked for."""
    call = _arguments(self, args, kwargs, _RVQ_KNOWN)
    if _rvq_unusual(self, call):
        return original(self, "forward")(*args, **kwargs)
    source, mask = call["x"], call.get("mask")
    table, metric = _rvq_table(self), _metric(self.layers[0]._codebook)
    x = self.project_in(source).detach()
    codes, quantized = residual_quantize(x, table, len(self.layers) if table.ndim == 2 else None, metric=metric)
    quantized = self.project_out(quantized)
    if mask is not None:
        codes = codes.where(mask.unsqueeze(-1), -1)
        rest = torch.zeros_like(quantized) if self.layers[0].return_zeros_for_masked_padding else source
        quantized = torch.where(mask.unsqueeze(-1), quantized, rest)
    losses = torch.stack([layer.zero for layer in self.layers])
    if call.get("return_all_codes"):
        return quantized, codes, losses, self.get_codes_from_indices(codes)
    return quantized, codes, losses


def _given(module: Any, indices: Any) -> int:
    """How many depths codes have that our lookups take, or 0."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim < 2:
        return 0
    given, depth = indices.shape[-1], len(module.layers)
    # Fewer codes than depths are an error without quantize_dropout.
    return given if given == depth or (given < depth and module.quantize_dropout) else 0


def get_output_from_indices(self: Any, indices: Tensor) -> Tensor:
    """ResidualVQ.get_output_from_indices: codes (b, ..., q), -1 for none, to features (b, ..., dim)."""
    given = _given(self, indices)
    if not given:
        return original(self, "get_output_from_indices")(indices)
    table = _rvq_table(self)
    return self.project_out(residual_lookup(indices, table if table.ndim == 2 else table[:given]))


def get_codes_from_indices(self: Any, indices: Tensor) -> Tensor:
    """ResidualVQ.get_codes_from_indices: codes (b, ..., q), -1 for none, to their rows (depth, b, ..., dim)."""
    given = _given(self, indices)
    if not given:
        return original(self, "get_codes_from_indices")(indices)
    table = _rvq_table(self)
    rows = table.new_zeros((len(self.layers), *indices.shape[:-1], table.shape[-1]))
    for d in range(given):
        rows[d] = residual_lookup(indices[..., d : d + 1], table if table.ndim == 2 else table[d])
    return rows


# ---- rehearsals ------------------------------------------------------------------------------------------------------

_REHEARSED = 64
"""As many codes are enough for a rehearsal."""


def _small(books: Iterable[Any]) -> dict[Tensor, Tensor]:
    """The first rows of the tensors of codebooks that have more."""
    found: dict[Tensor, Tensor] = {}
    for book in books:
        if book.embed.shape[1] > _REHEARSED:
            for tensor in (book.embed, book.embed_avg, book.cluster_size):
                found[tensor] = tensor[:, :_REHEARSED]
    return found


@torch.no_grad()
def _vq_prepare(module: Any) -> None:
    """Gives a codebook rows apart from each other and averages that differ."""
    book = module._codebook
    book.codebook_size = module.codebook_size = book.embed.shape[1]
    book.embed.normal_()
    if book.use_cosine_sim:
        book.embed.copy_(F.normalize(book.embed, dim=-1))
    book.cluster_size.uniform_(0.5, 3)
    book.embed_avg.copy_(book.embed * book.cluster_size.unsqueeze(-1))
    book.initted.fill_(True)


def _rvq_prepare(module: Any) -> None:
    module.eval_beam_size = None  # beams are the published forward's
    for layer in module.layers:
        _vq_prepare(layer)


def _vq_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    book, dim = module._codebook, module.dim
    shape: tuple[int, ...] = (2, 6, dim)
    if module.accept_image_fmap or module.accept_3d_fmap:
        shape = (2, dim, 2, 3) if module.accept_image_fmap else (2, dim, 2, 3, 1)
    elif not module.channel_last:
        shape = (2, dim, 6)
    device = book.embed.device
    masks: list[Tensor | None] = [None]
    if len(shape) == 3 and module.channel_last:
        masks.append(torch.arange(6, device=device) < torch.tensor([[6], [3]], device=device))
    module.eval()
    for mask in masks:
        yield "its forward", module(torch.randn(shape, device=device), mask=mask)
    # Synchronized codebooks wait for other ranks even where there is no group yet.
    module.train(training and not getattr(book, "use_ddp", False))
    for mask in (masks[0], *masks) if module.training else ():
        if mask is not None and (module.heads > 1 or module.has_projections):
            continue
        x = torch.randn(shape, device=device, requires_grad=True)
        quantized, codes, loss = module(x, mask=mask)
        yield "its forward in training", (quantized, codes, loss)
        objective = quantized.float().square().sum() + loss
        yield "its gradient", torch.autograd.grad(objective, x, allow_unused=True)


def _rvq_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    dim = module.project_in.in_features if module.has_projections else module.layers[0].dim
    device = module.layers[0]._codebook.embed.device
    mask = torch.arange(6, device=device) < torch.tensor([[6], [3]], device=device)
    module.eval()
    codes = None
    for call in ({}, {"mask": mask}, {"return_all_codes": True}):
        if "mask" in call and module.has_projections and not _masks_output(module):
            continue
        out = module(torch.randn((2, 6, dim), device=device), **call)
        yield "its forward", out
        codes = out[1]
    yield "its get_output_from_indices", module.get_output_from_indices(codes)
    yield "its get_codes_from_indices", module.get_codes_from_indices(codes)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("ResidualVQ of vector-quantize-pytorch", _matches("ResidualVQ"), _rvq_why_not, _rvq_swap, _rvq_undo),
    Adapter("VectorQuantize of vector-quantize-pytorch", _matches("VectorQuantize"), _vq_why_not, _vq_swap),
)
"""The adapters of this file."""
