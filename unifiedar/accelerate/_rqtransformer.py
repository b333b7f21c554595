"""Adapter for RQ-Transformer: `RQTransformer` in a file transformers.py.

Published: `sample` computes the embeddings of all codes so far anew for every code, copies keys and values to longer
tensors, casts all weights at every use under autocast, sorts the vocabulary twice and waits for the GPU at each code.
Swapped: it runs on a `models.RQTransformer` that has the module's parameters.

Codes are those that the published code draws from the same state of the random generator, but where two of them are as
likely to float32's rounding, and for a published top_p of 1, which cuts what lies behind a float32 sum that reaches 1.

With `amp` on a GPU the weights of products are cast once, into a copy, and again when they change: half the memory of
float32 weights more, while there are such calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate import _depth
from unifiedar.accelerate._swap import Adapter, Swap, Twin, Twins, class_of, original, overridden, record, rehearse
from unifiedar.models import RQTransformer, RQTransformerConfig

__all__ = ["ADAPTERS"]

_FILE, _PARTS = "transformers", "attentions"
_NEEDED = (
    "config", "block_size", "vocab_size", "cond_emb", "pos_emb_cond", "pos_emb_hw", "pos_emb_d", "embed_drop",
    "classifier", "body_transformer", "head_transformer", "init_cache", "cached_forward", "sample",
)  # fmt: skip


# ---- our model on the module's parameters ----------------------------------------------------------------------------


def _config(module: Any) -> RQTransformerConfig:
    body, head = module.body_transformer.blocks, module.head_transformer.blocks
    depth = module.pos_emb_d.shape[1]
    return RQTransformerConfig(
        num_codes=module.classifier.linear.weight.shape[0],
        code_dim=module.input_mlp.weight.shape[1],
        grid=(module.block_size[0], module.block_size[1]),
        depth=depth,
        dim=module.pos_emb_d.shape[2],
        num_heads=_depth.heads_of((*body, *head)),
        body_layers=len(body),
        head_layers=len(head),
        num_conditions=module.cond_emb.weight.shape[0],
        condition_length=module.pos_emb_cond.shape[1],
        dropout=0.0,  # training is the published code's
    )


def _on_meta(config: RQTransformerConfig) -> RQTransformer:
    with torch.device("meta"):
        return RQTransformer(config).eval()


def _twin(module: Any) -> Twin:
    config = _config(module)
    return Twin(module, lambda: _on_meta(config))


_TWINS = Twins(_twin)


# ---- what can be swapped ---------------------------------------------------------------------------------------------


def _matches(module: nn.Module) -> bool:
    return _depth.in_file(module, _FILE) and hasattr(module, "body_transformer")


def _why_not(module: Any) -> str | None:
    published = class_of(module, _depth.CLASS)
    assert published is not None
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name in ("input_emb_vqvae", "head_emb_vqvae", "cumsum_depth_ctx", "shared_cls_emb"):
        if not getattr(module.config, name, False):
            return f"its {name} is off, and ours knows it on only, as in the released models"
    names = ("sample", "cached_forward", "forward", "embed_with_model_aux")
    reason = overridden(module, published, names) or _depth.weights_why_not(module, _PARTS)
    if reason is not None:
        return reason
    try:
        model = _on_meta(_config(module))
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be rebuilt: {' '.join(str(error).split())}"
    return _depth.keys_why_not(module, model) or _tried(module)


def _swap(module: Any) -> Swap:
    text = (
        "sample by models.RQTransformer on its parameters: a cache allocated once, all codes of a position in one "
        "operator; with amp on a GPU weights are cast once, into a copy"
    )
    return Swap(text, {"sample": sample})


def _undo(module: nn.Module) -> None:
    _TWINS.pop(module, None)


# ---- methods ---------------------------------------------------------------------------------------------------------


def _numbers(value: Any, count: int, kinds: tuple[type, ...]) -> list[Any] | None:
    """A setting as one number for each depth, as the published code reads it; None if it is nothing of the kind."""
    if type(value) is kinds[0]:
        return [value] * count
    try:
        values = list(value)
    except TypeError:
        return None
    values = values * count if len(values) == 1 else values[:count]
    return values if len(values) == count and all(type(one) in kinds for one in values) else None


def _settings(config: RQTransformerConfig, temperature: Any, top_k: Any, top_p: Any) -> dict[str, Any] | None:
    """As `models.RQTransformer.sample` takes them, or None if the published code has to make of them what it can."""
    depth, num_codes = config.depth, config.num_codes
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        return None
    ks = [num_codes] * depth if top_k is None else _numbers(top_k, depth, (int,))
    ps = [1.0] * depth if top_p is None else _numbers(top_p, depth, (float, int))
    if ks is None or ps is None or min(ks) < 1 or not all(p > 0 for p in ps):
        return None
    return {
        "temperature": float(temperature),
        "top_k": [min(k, num_codes) for k in ks],
        "top_p": [min(float(p), 1.0) for p in ps],
    }


def _codes_of(module: Any, partial: Any, begin: int, table: Tensor) -> Tensor | None:
    """The codes as ours takes them, the published padding (K) being none (-1); None if they are no codes."""
    like, num_codes = module.pos_emb_d, table.shape[-2]
    if not isinstance(partial, Tensor) or partial.dtype != torch.int64 or partial.device != like.device:
        return None
    if partial.ndim != 4 or partial.shape[1:] != module.block_size or not len(partial):
        return None
    given = partial.flatten(1, 2)[:, :begin]
    if given.numel():
        low, high = given.aminmax()
        if int(low) < 0 or int(high) > num_codes:
            return None
    return partial.masked_fill(partial == num_codes, -1)


def _condition(module: Any, cond: Any, batch: int) -> Tensor | None:
    """The condition (B, Tc), zeros where none is given, as published; None if there is no such condition."""
    like, (count, length) = module.pos_emb_d, (len(module.cond_emb.weight), module.pos_emb_cond.shape[1])
    if cond is None:
        return torch.zeros(batch, length, dtype=torch.int64, device=like.device)
    if not isinstance(cond, Tensor) or cond.dtype not in (torch.int64, torch.int32) or cond.device != like.device:
        return None
    if cond.numel() != batch * length or not cond.numel():
        return None
    low, high = cond.aminmax()
    return cond.reshape(batch, length).long() if int(low) >= 0 and int(high) < count else None


@torch.no_grad()
def sample(
    self: Any,
    partial_sample: Tensor,
    model_aux: Any = None,
    cond: Tensor | None = None,
    start_loc: tuple[int, int] = (0, 0),
    temperature: float = 1.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    amp: bool = False,
    cached: bool = True,
    is_tqdm: bool = False,
    desc: str = "Sampling",
    fast: bool = True,
) -> Tensor:
    """RQTransformer.sample: codes (B, H, W, D), those before start_loc kept, drawn from there on."""

    def published() -> Tensor:
        return original(self, "sample")(
            partial_sample, model_aux, cond, start_loc, temperature, top_k, top_p, amp, cached, is_tqdm, desc, fast
        )

    call = _call(self, partial_sample, model_aux, cond, start_loc, temperature, top_k, top_p, amp, cached)
    if call is None:
        return published()
    model, codes, options = call
    height, width, depth = self.block_size
    if is_tqdm:
        from tqdm import tqdm

        row, column = options["start"]
        total = height * width * depth
        bar = tqdm(total=total, initial=(row * width + column) * depth, desc=desc)
        options["progress"] = lambda positions: bar.update(positions * depth)
    state = _depth.random_state(codes.device)
    try:
        # The published code, too, switches off what autocast there may be around it.
        with torch.autocast(codes.device.type, enabled=False):
            drawn = model.sample(codes, **options)
    except FloatingPointError:  # the published code warns and goes on without what is NaN
        _depth.set_random_state(codes.device, state)
        return published()
    finally:
        if is_tqdm:
            bar.close()
    self.init_cache()
    begin = options["start"][0] * width + options["start"][1]
    kept = torch.arange(height * width, device=codes.device) < begin
    return torch.where(kept.view(1, height, width, 1), partial_sample, drawn)


def _call(
    module: Any, partial: Any, tokenizer: Any, cond: Any, start: Any, temperature: Any, top_k: Any, top_p: Any,
    amp: Any, cached: Any,
) -> tuple[RQTransformer, Tensor, dict[str, Any]] | None:  # fmt: skip
    """The model that answers a call, with its codes and options; None if the published method has to."""
    like = module.pos_emb_d
    if not cached or (like.device.type != "cuda" and _depth.autocasting(like)):
        return None
    height, width, depth = module.block_size
    if not isinstance(start, (tuple, list)) or len(start) != 2 or not all(type(one) is int for one in start):
        return None
    if not (0 <= start[0] < height and 0 <= start[1] < width):
        return None
    twin = _depth.plain_twin(module, _TWINS)
    if twin is None:
        return None
    config = twin.model.config
    settings = _settings(config, temperature, top_k, top_p)
    table = _depth.table_of(tokenizer, depth, config.num_codes, config.code_dim, like)
    # What the published code calls autocast is that of CUDA, in float16.
    cast = bool(amp) and like.is_cuda
    if settings is None or table is None or table.dtype != like.dtype or (cast and like.dtype != torch.float32):
        return None
    codes = _codes_of(module, partial, start[0] * width + start[1], table)
    if codes is None:
        return None
    condition = _condition(module, cond, len(codes))
    if condition is None:
        return None
    model = twin.in_dtype(torch.float16 if cast else like.dtype)
    return model, codes, {"codebook": table, "cond": condition, "start": tuple(start), **settings}


# ---- rehearsal -------------------------------------------------------------------------------------------------------

_ROWS = 8  # one draw says little of the logits that it was made from, many do


def _tried(module: Any) -> str | None:
    config = _config(module)
    small = replace(
        config,
        num_codes=min(config.num_codes, 48),
        code_dim=min(config.code_dim, 12),
        dim=4 * config.num_heads,
        num_conditions=min(config.num_conditions, 8),
    )
    return rehearse(module, _swap, _depth.narrow(module, _on_meta(small)), _depth.randomize, _play)


def _logits(module: Any, codes: Tensor, tokenizer: _depth.Tokenizer, cond: Tensor) -> list[Tensor]:
    """Teacher-forced logits of codes, and of text if there are any: the published ones, or ours if it is swapped."""
    if record(module) is None:
        found = module(codes, tokenizer, cond)
        return list(found) if isinstance(found, tuple) else [found]
    twin = _TWINS.of(module)
    assert twin is not None  # of a copy, which nobody changed
    model = twin.model
    ours = model(codes, _depth.tables_of(tokenizer, model.config.num_codes), cond)
    return [ours.codes] if ours.text is None else [ours.codes, ours.text]


def _play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    module.eval()
    model = _on_meta(_config(module)).config
    height, width = model.grid
    device = module.pos_emb_d.device
    tokenizer = _depth.Tokenizer(model.depth, model.num_codes, model.code_dim, device)
    shape = (_ROWS, height, width, model.depth)
    codes = torch.randint(model.num_codes, shape, device=device)
    cond = torch.randint(model.num_conditions, (_ROWS, model.condition_length), device=device)
    with torch.no_grad():
        yield "its forward", _logits(module, codes, tokenizer, cond)
        last = (height - 1, max(width - 2, 0))
        cuts = {"temperature": 0.9, "top_k": max(model.num_codes // 2, 1), "top_p": 0.9}
        yield "its sample", module.sample(codes, tokenizer, cond, start_loc=last, **cuts)
        yield "its sample", module.sample(codes, tokenizer, start_loc=(height - 1, width - 1))


ADAPTERS = (Adapter("RQ-Transformer", _matches, _why_not, _swap, _undo),)
"""The adapters of this file."""
