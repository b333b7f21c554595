"""Adapter for VILA-U's depth head: `RQTransformer` in a file modeling_rqtransformer.py.

Published: `generate` runs all depths so far anew for every code, embeds all codes anew, sorts the vocabulary twice and
waits for the GPU. Swapped: it is one `depth_decode` with the module's parameters, and one wait a position.

Guidance is mixed in the logits' dtype, and sums of embeddings are rounded to the codebook's after each code, as
published (on a CPU the published sum of half-precision rows is rounded once, at its end).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate import _depth
from unifiedar.accelerate._swap import Adapter, Swap, Twin, Twins, class_of, original, overridden, record, rehearse
from unifiedar.nn import DepthTransformer

__all__ = ["ADAPTERS"]

_FILE, _PARTS = "modeling_rqtransformer", "attention"
_NEEDED = ("in_mlp_1", "in_mlp_2", "pos_emb_d", "head_transformer", "classifier_mlp", "generate")

# What it draws with, whoever asks.
_TOP_K, _TOP_P = 900, 0.96


# ---- our depth transformer on the module's parameters ----------------------------------------------------------------

_Sizes = tuple[int, int, int, int, int, int, int]


def _sizes(module: Any) -> _Sizes:
    """As `DepthTransformer` takes them."""
    _, depth, dim = module.pos_emb_d.shape
    blocks = module.head_transformer.blocks
    hidden_dim, code_dim = module.in_mlp_2.weight.shape[1], module.in_mlp_1.weight.shape[1]
    num_codes = module.classifier_mlp.linear.weight.shape[0]
    return hidden_dim, code_dim, dim, len(blocks), _depth.heads_of(blocks), depth, num_codes


def _on_meta(sizes: _Sizes) -> DepthTransformer:
    with torch.device("meta"):
        return DepthTransformer(*sizes, dropout=0.0).eval()


def _twin(module: Any) -> Twin:
    sizes = _sizes(module)
    return Twin(module, lambda: _on_meta(sizes))


_TWINS = Twins(_twin)


# ---- what can be swapped ---------------------------------------------------------------------------------------------


def _matches(module: nn.Module) -> bool:
    return _depth.in_file(module, _FILE) and hasattr(module, "head_transformer")


def _why_not(module: Any) -> str | None:
    published = class_of(module, _depth.CLASS)
    assert published is not None
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    names = ("generate", "forward", "embed_with_model_aux")
    reason = overridden(module, published, names) or _depth.weights_why_not(module, _PARTS)
    if reason is not None:
        return reason
    try:
        sizes = _sizes(module)
        model = _on_meta(sizes)
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be rebuilt: {' '.join(str(error).split())}"
    if sizes[-1] < _TOP_K:
        return f"has {sizes[-1]} codes, fewer than the {_TOP_K} that the published draw keeps"
    return _depth.keys_why_not(module, model) or _tried(module)


def _swap(module: Any) -> Swap:
    depth = module.pos_emb_d.shape[1]
    text = f"generate by depth_decode on its parameters: all {depth} codes in one operator, each depth computed once"
    return Swap(text, {"generate": generate})


def _undo(module: nn.Module) -> None:
    _TWINS.pop(module, None)


# ---- the method ------------------------------------------------------------------------------------------------------


def generate(self: Any, embed_from_body: Tensor, model_aux: Any = None, cfg: float = 3.0) -> tuple[Tensor, Tensor]:
    """RQTransformer.generate of VILA-U: hidden states (2N, 1, h), conditional rows first, to the sums of the drawn
    codes' embeddings (2N, 1, e) and the codes (2N, 1, D), each half the same."""
    call = _call(self, embed_from_body, model_aux, cfg)
    if call is not None:
        model, hidden, table = call
        state = _depth.random_state(hidden.device)
        found = model.decode(hidden, table, guidance=float(cfg), top_k=_TOP_K, top_p=_TOP_P)
        if int(found.unsound.max()) < 0:
            return found.total.repeat(2, 1).unsqueeze(1), found.codes.repeat(2, 1).unsqueeze(1)
        _depth.set_random_state(hidden.device, state)  # the published code warns and goes on without what is NaN
    return original(self, "generate")(embed_from_body, model_aux, cfg)


def _call(module: Any, x: Any, tokenizer: Any, cfg: Any) -> tuple[DepthTransformer, Tensor, Tensor] | None:
    """The model that answers a call, with hidden states and code vectors; None if the published method has to."""
    like = module.pos_emb_d
    if not isinstance(x, Tensor) or x.dtype != like.dtype or x.device != like.device or x.ndim != 3:
        return None
    if type(cfg) not in (int, float) or not math.isfinite(cfg) or _depth.autocasting(like):
        return None
    twin = _depth.plain_twin(module, _TWINS)
    if twin is None:
        return None
    hidden_dim, code_dim, *_, depth, num_codes = _sizes(module)
    rows, length, width = x.shape
    if length != 1 or not rows or rows % 2 or width != hidden_dim:
        return None
    table = _depth.table_of(tokenizer, depth, num_codes, code_dim, like)
    if table is None or table.dtype != like.dtype:
        return None
    return twin.model, x[:, 0], table


# ---- rehearsal -------------------------------------------------------------------------------------------------------

_ROWS = 32  # one draw says little of the logits that it was made from, many do


def _tried(module: Any) -> str | None:
    hidden_dim, code_dim, _, layers, heads, depth, num_codes = _sizes(module)
    sizes = (min(hidden_dim, 24), min(code_dim, 12), 4 * heads, layers, heads, depth, min(num_codes, _TOP_K + 100))
    return rehearse(module, _swap, _depth.narrow(module, _on_meta(sizes)), _depth.randomize, _play)


def _play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    module.eval()
    hidden_dim, code_dim, *_, depth, num_codes = _sizes(module)
    device = module.pos_emb_d.device
    tokenizer = _depth.Tokenizer(depth, num_codes, code_dim, device)
    hidden = torch.randn(_ROWS, 1, hidden_dim, device=device, dtype=torch.float32)
    codes = torch.randint(num_codes, (_ROWS, 1, depth), device=device)
    with torch.no_grad():
        if record(module) is None:
            yield "its forward", module(hidden, codes, tokenizer)
        else:
            twin = _TWINS.of(module)
            assert twin is not None
            model = twin.model
            sums = model.running_sums(codes[:, 0], _depth.tables_of(tokenizer, num_codes))
            yield "its forward", model(hidden[:, 0], sums).unsqueeze(1)
        for cfg in (3.0, 1.0):
            yield "its generate", module.generate(hidden, tokenizer, cfg)


ADAPTERS = (Adapter("depth head of VILA-U", _matches, _why_not, _swap, _undo),)
"""The adapters of this file."""
