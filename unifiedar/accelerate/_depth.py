"""Adapters for what draws residual codes: RQ-Transformer's `sample`, and `generate` of VILA-U's depth head.

Both are classes RQTransformer: RQ-Transformer's in a file transformers.py, VILA-U's in modeling_rqtransformer.py.
Published: `sample` computes the embeddings of all codes so far anew for every code, copies keys and values to longer
tensors, casts all weights at every use under autocast, sorts the vocabulary twice and waits for the GPU at each code;
`generate` besides runs all depths so far anew. Swapped: both run on ours with the module's own parameters.

Codes are those that the published code draws from the same state of the random generator, but where two of them are as
likely to float32's rounding, and for a published top_p of 1, which cuts what lies behind a float32 sum that reaches 1.
Sums of embeddings are rounded to the codebook's dtype at each depth, and guidance to that of the logits, as published.

The code vectors are read in the tokenizer that a call is given, found by its names and asked once whether they are what
it answers. With `amp` on a GPU the weights of products are cast once, into a copy, and again when they change: half the
memory of float32 weights more, while there are such calls.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate._swap import (
    Adapter,
    Swap,
    Twin,
    Twins,
    class_of,
    hooked,
    original,
    overridden,
    packed,
    record,
    rehearse,
)
from unifiedar.models import RQTransformer, RQTransformerConfig
from unifiedar.nn import DepthTransformer

__all__ = ["ADAPTERS"]

_CLASS, _FILE, _HEAD_FILE = "RQTransformer", "transformers", "modeling_rqtransformer"
_PARTS = {_FILE: "attentions", _HEAD_FILE: "attention"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the published draws are in float32 whatever the logits are

# What VILA-U draws with, whoever asks.
_TOP_K, _TOP_P = 900, 0.96


# ---- ours on the module's parameters ---------------------------------------------------------------------------------


def _config(module: Any) -> RQTransformerConfig:
    body, head = module.body_transformer.blocks, module.head_transformer.blocks
    depth = module.pos_emb_d.shape[1]
    heads = {block.attn.n_head for block in (*body, *head)}
    if len(heads) != 1:
        raise ValueError(f"its blocks have {sorted(heads)} heads, not all the same")
    return RQTransformerConfig(
        num_codes=module.classifier.linear.weight.shape[0],
        code_dim=module.input_mlp.weight.shape[1],
        grid=(module.block_size[0], module.block_size[1]),
        depth=depth,
        dim=module.pos_emb_d.shape[2],
        num_heads=heads.pop(),
        body_layers=len(body),
        head_layers=len(head),
        num_conditions=module.cond_emb.weight.shape[0],
        condition_length=module.pos_emb_cond.shape[1],
        dropout=0.0,  # training is the published code's
    )


def _on_meta(config: RQTransformerConfig) -> RQTransformer:
    with torch.device("meta"):
        return RQTransformer(config).eval()


_Sizes = tuple[int, int, int, int, int, int, int]


def _head_sizes(module: Any) -> _Sizes:
    """As `DepthTransformer` takes them."""
    _, depth, dim = module.pos_emb_d.shape
    blocks = module.head_transformer.blocks
    heads = {block.attn.n_head for block in blocks}
    if len(heads) != 1:
        raise ValueError(f"its blocks have {sorted(heads)} heads, not all the same")
    hidden_dim, code_dim = module.in_mlp_2.weight.shape[1], module.in_mlp_1.weight.shape[1]
    num_codes = module.classifier_mlp.linear.weight.shape[0]
    return hidden_dim, code_dim, dim, len(blocks), heads.pop(), depth, num_codes


def _head_on_meta(sizes: _Sizes) -> DepthTransformer:
    with torch.device("meta"):
        return DepthTransformer(*sizes, dropout=0.0).eval()


def _twin(module: Any) -> Twin:
    config = _config(module)
    return Twin(module, lambda: _on_meta(config))


def _head_twin(module: Any) -> Twin:
    sizes = _head_sizes(module)
    return Twin(module, lambda: _head_on_meta(sizes))


_TWINS, _HEAD_TWINS = Twins(_twin), Twins(_head_twin)


# ---- the code vectors ------------------------------------------------------------------------------------------------


_ASKED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()
"""Tokenizers whose code vectors were looked for, with what was found out for which tensors."""


def _table(tokenizer: Any, depth: int, num_codes: int, code_dim: int, like: Tensor) -> Tensor | None:
    """The code vectors (K, C) or (D, K, C) of a tokenizer, on the device of `like`; None if it has none that are known.

    Without a copy where all depths have one table, or where they lie side by side.
    """
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(tokenizer, nn.Module) or not isinstance(quantizer, nn.Module):
        return None
    books = getattr(quantizer, "codebooks", None)
    found = [getattr(book, "weight", None) for book in books] if isinstance(books, nn.ModuleList) else []
    weights = [one for one in found if isinstance(one, Tensor) and one.ndim == 2]
    if len(weights) != depth or len(found) != depth:
        return None
    first = weights[0]
    if any(one.shape != first.shape or one.dtype != first.dtype for one in weights):
        return None
    if first.device != like.device or first.shape[1] != code_dim or len(first) < num_codes:
        return None
    places = tuple((one.data_ptr(), one.dtype) for one in weights)
    if len(set(places)) == 1:
        table = first.detach()
    elif packed(weights):
        table = first.detach().as_strided((depth, *first.shape), (first.numel(), *first.stride()))
    else:
        table = torch.stack([one.detach() for one in weights])
    table = table[..., :num_codes, :]
    known = _ASKED.get(tokenizer)
    if known is None or known[0] != places:
        known = _ASKED[tokenizer] = (places, _answers_with(tokenizer, table, depth))
    return table if known[1] else None


def _answers_with(tokenizer: Any, table: Tensor, depth: int) -> bool:
    """Whether the tokenizer embeds codes as rows of the table."""
    num_codes = table.shape[-2]
    codes = torch.randint(num_codes, (1, 2, 3, depth), generator=torch.Generator().manual_seed(0))
    codes.view(-1)[:2] = torch.tensor([0, num_codes - 1])
    codes = codes.to(table.device)
    try:
        got = tokenizer.get_code_emb_with_depth(codes)[0]
    except Exception:  # foreign code may fail in any way; its own caller will see it
        return False
    tables = [table] * depth if table.ndim == 2 else list(table)
    want = torch.stack([one[codes[..., d]] for d, one in enumerate(tables)], dim=-2)
    return isinstance(got, Tensor) and got.dtype == want.dtype and torch.equal(got, want)


# ---- what can be swapped ---------------------------------------------------------------------------------------------


def _in_file(module: nn.Module, file: str) -> bool:
    published = class_of(module, _CLASS)
    return published is not None and published.__module__.rpartition(".")[2] == file


def _matches(module: nn.Module) -> bool:
    return _in_file(module, _FILE) and hasattr(module, "body_transformer")


def _head_matches(module: nn.Module) -> bool:
    return _in_file(module, _HEAD_FILE) and hasattr(module, "head_transformer")


_NEEDED = (
    "config", "block_size", "vocab_size", "cond_emb", "pos_emb_cond", "pos_emb_hw", "pos_emb_d", "embed_drop",
    "classifier", "body_transformer", "head_transformer", "init_cache", "cached_forward", "sample",
)  # fmt: skip
_HEAD_NEEDED = ("in_mlp_1", "in_mlp_2", "pos_emb_d", "head_transformer", "classifier_mlp", "generate")


def _why_not(module: Any) -> str | None:
    published = class_of(module, _CLASS)
    assert published is not None
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name in ("input_emb_vqvae", "head_emb_vqvae", "cumsum_depth_ctx", "shared_cls_emb"):
        if not getattr(module.config, name, False):
            return f"its {name} is off, and ours knows it on only, as in the released models"
    names = ("sample", "cached_forward", "forward", "embed_with_model_aux")
    reason = overridden(module, published, names) or _weights_why_not(module, _FILE)
    if reason is not None:
        return reason
    try:
        model = _on_meta(_config(module))
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be rebuilt: {' '.join(str(error).split())}"
    return _keys_why_not(module, model) or _tried(module)


def _head_why_not(module: Any) -> str | None:
    published = class_of(module, _CLASS)
    assert published is not None
    missing = [name for name in _HEAD_NEEDED if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    names = ("generate", "forward", "embed_with_model_aux")
    reason = overridden(module, published, names) or _weights_why_not(module, _HEAD_FILE)
    if reason is not None:
        return reason
    try:
        sizes = _head_sizes(module)
        model = _head_on_meta(sizes)
    except (AttributeError, TypeError, ValueError) as error:
        return f"it cannot be rebuilt: {' '.join(str(error).split())}"
    if sizes[-1] < _TOP_K:
        return f"has {sizes[-1]} codes, fewer than the {_TOP_K} that the published draw keeps"
    return _keys_why_not(module, model) or _head_tried(module)


def _weights_why_not(module: Any, file: str) -> str | None:
    for name in ("body_transformer", "head_transformer"):
        for i, block in enumerate(getattr(getattr(module, name, None), "blocks", ())):
            where = type(block).__module__.rpartition(".")[2]
            if type(block).__name__ != "AttentionBlock" or where != _PARTS[file]:
                kind = type(block).__name__
                return f"block {i} of its {name} is a {kind} of {where}, not an AttentionBlock of {_PARTS[file]}"
    tensors = [*module.parameters(), *module.buffers()]
    if any(type(one.data) is not Tensor for one in tensors):
        return "its weights are not plain tensors"
    if any(one.is_meta for one in tensors):
        return "its weights are on the meta device: load them first"
    if len({(one.dtype, one.device) for one in tensors}) != 1:
        return "its weights are of several dtypes or on several devices"
    if tensors[0].dtype not in _FLOATS:
        return f"its weights are {str(tensors[0].dtype).removeprefix('torch.')}"
    return None


def _keys_why_not(module: nn.Module, model: nn.Module) -> str | None:
    ours = {name: value.shape for name, value in model.state_dict().items()}
    if ours != {name: value.shape for name, value in module.state_dict().items()}:
        return "its state_dict has not the published keys and shapes"
    return None


def _swap(module: Any) -> Swap:
    text = (
        "sample by models.RQTransformer on its parameters: a cache allocated once, all codes of a position in one "
        "operator; with amp on a GPU weights are cast once, into a copy"
    )
    return Swap(text, {"sample": sample})


def _head_swap(module: Any) -> Swap:
    depth = module.pos_emb_d.shape[1]
    text = f"generate by depth_decode on its parameters: all {depth} codes in one operator, each depth computed once"
    return Swap(text, {"generate": generate})


def _undo(module: nn.Module) -> None:
    _TWINS.pop(module, None)


def _head_undo(module: nn.Module) -> None:
    _HEAD_TWINS.pop(module, None)


# ---- methods ---------------------------------------------------------------------------------------------------------


def _plain(module: Any, twins: Twins) -> Twin | None:
    """The twin of a module, if that is as it was when it was swapped: eval mode, no hooks, weights of one dtype."""
    if module.training or hooked(module):
        return None
    twin, dtype = twins.of(module), module.pos_emb_d.dtype
    if twin is None or dtype not in _FLOATS or any(one.dtype != dtype for one in twin.sources):
        return None
    return twin


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


def _settings(module: Any, temperature: Any, top_k: Any, top_p: Any) -> dict[str, Any] | None:
    """As `models.RQTransformer.sample` takes them, or None if the published code has to make of them what it can."""
    depth, num_codes = module.pos_emb_d.shape[1], module.classifier.linear.weight.shape[0]
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
    state = _random_state(codes.device)
    try:
        # The published code, too, switches off what autocast there may be around it.
        with torch.autocast(codes.device.type, enabled=False):
            drawn = model.sample(codes, **options)
    except FloatingPointError:  # the published code warns and goes on without what is NaN
        _set_random_state(codes.device, state)
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
    settings = _settings(module, temperature, top_k, top_p)
    like = module.pos_emb_d
    if settings is None or not cached or (like.device.type != "cuda" and _autocast(like)):
        return None
    height, width, depth = module.block_size
    if not isinstance(start, (tuple, list)) or len(start) != 2 or not all(type(one) is int for one in start):
        return None
    if not (0 <= start[0] < height and 0 <= start[1] < width):
        return None
    twin = _plain(module, _TWINS)
    if twin is None:
        return None
    config = twin.model.config
    table = _table(tokenizer, depth, config.num_codes, config.code_dim, like)
    # What the published code calls autocast is that of CUDA, in float16.
    cast = bool(amp) and like.is_cuda
    if table is None or table.dtype != like.dtype or (cast and like.dtype != torch.float32):
        return None
    codes = _codes_of(module, partial, start[0] * width + start[1], table)
    if codes is None:
        return None
    condition = _condition(module, cond, len(codes))
    if condition is None:
        return None
    model = twin.in_dtype(torch.float16 if cast else like.dtype)
    return model, codes, {"codebook": table, "cond": condition, "start": tuple(start), **settings}


def generate(self: Any, embed_from_body: Tensor, model_aux: Any = None, cfg: float = 3.0) -> tuple[Tensor, Tensor]:
    """RQTransformer.generate of VILA-U: hidden states (2N, 1, h), conditional rows first, to the sums of the drawn
    codes' embeddings (2N, 1, e) and the codes (2N, 1, D), each half the same."""
    call = _head_call(self, embed_from_body, model_aux, cfg)
    if call is not None:
        model, hidden, table = call
        state = _random_state(hidden.device)
        found = model.decode(hidden, table, guidance=float(cfg), top_k=_TOP_K, top_p=_TOP_P)
        if int(found.unsound.max()) < 0:
            return found.total.repeat(2, 1).unsqueeze(1), found.codes.repeat(2, 1).unsqueeze(1)
        _set_random_state(hidden.device, state)  # the published code warns and goes on without what is NaN
    return original(self, "generate")(embed_from_body, model_aux, cfg)


def _head_call(module: Any, x: Any, tokenizer: Any, cfg: Any) -> tuple[DepthTransformer, Tensor, Tensor] | None:
    """The model that answers a call, with hidden states and code vectors; None if the published method has to."""
    like = module.pos_emb_d
    if not isinstance(x, Tensor) or x.dtype != like.dtype or x.device != like.device or x.ndim != 3:
        return None
    hidden_dim, code_dim, *_, depth, num_codes = _head_sizes(module)
    rows, length, width = x.shape
    if length != 1 or not rows or rows % 2 or width != hidden_dim:
        return None
    if type(cfg) not in (int, float) or not math.isfinite(cfg) or _autocast(like):
        return None
    twin = _plain(module, _HEAD_TWINS)
    table = _table(tokenizer, depth, num_codes, code_dim, like)
    if twin is None or table is None or table.dtype != like.dtype:
        return None
    return twin.model, x[:, 0], table


def _autocast(like: Tensor) -> bool:
    return torch.is_autocast_enabled(like.device.type)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


# ---- rehearsal -------------------------------------------------------------------------------------------------------


_ROWS = 32
"""A draw says little of the logits that it was made from, many do."""


class _Tokenizer(nn.Module):
    """As much of a tokenizer as a draw asks: codebooks of its own for each depth, and a padding row in each."""

    def __init__(self, depth: int, num_codes: int, code_dim: int, device: torch.device):
        super().__init__()
        books = [nn.Embedding(num_codes + 1, code_dim, padding_idx=num_codes, device=device) for _ in range(depth)]
        self.quantizer = nn.Module()
        self.quantizer.codebooks = nn.ModuleList(books)

    def get_code_emb_with_depth(self, codes: Tensor) -> tuple[Tensor, None]:
        books = self.quantizer.codebooks
        assert isinstance(books, nn.ModuleList)
        return torch.stack([book(codes[..., d]) for d, book in enumerate(books)], dim=-2), None


def _tried(module: Any) -> str | None:
    config = _config(module)
    small = replace(
        config,
        num_codes=min(config.num_codes, 48),
        code_dim=min(config.code_dim, 12),
        dim=4 * config.num_heads,
        num_conditions=min(config.num_conditions, 8),
    )
    return rehearse(module, _swap, _small(module, _on_meta(small)), _prepare, _play)


def _head_tried(module: Any) -> str | None:
    hidden_dim, code_dim, _, layers, heads, depth, num_codes = _head_sizes(module)
    sizes = (min(hidden_dim, 24), min(code_dim, 12), 4 * heads, layers, heads, depth, min(num_codes, _TOP_K + 100))
    return rehearse(module, _head_swap, _small(module, _head_on_meta(sizes)), _prepare, _head_play)


def _small(module: nn.Module, model: nn.Module) -> dict[Tensor, Tensor]:
    """Narrow tensors in place of the module's own, of the shapes of a model of ours."""
    shapes = {key: one.shape for key, one in model.state_dict().items()}
    theirs = module.state_dict(keep_vars=True)
    return {one: torch.zeros(shapes[key], device=one.device) for key, one in theirs.items()}


@torch.no_grad()
def _prepare(module: Any) -> None:
    """Weights of a size that matters, and settings that go with their shapes."""
    for one in module.parameters():
        one.normal_(std=one.shape[-1] ** -0.5 if one.ndim == 2 else 0.3)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.normalized_shape = tuple(part.weight.shape)
    if hasattr(module, "vocab_size"):
        module.vocab_size = [len(module.classifier.linear.weight)] * module.block_size[2]


def _logits(module: Any, codes: Tensor, tokenizer: _Tokenizer, cond: Tensor) -> list[Tensor]:
    """Teacher-forced logits of codes, and of text if there are any: the published ones, or ours if it is swapped."""
    if record(module) is None:
        found = module(codes, tokenizer, cond)
        return list(found) if isinstance(found, tuple) else [found]
    twin = _TWINS.of(module)
    assert twin is not None  # of a copy, which nobody changed
    model = twin.model
    ours = model(codes, _tables_of(tokenizer, codes, model.config.num_codes), cond)
    return [ours.codes] if ours.text is None else [ours.codes, ours.text]


def _tables_of(tokenizer: _Tokenizer, codes: Tensor, num_codes: int) -> Tensor:
    books: Any = tokenizer.quantizer.codebooks
    return torch.stack([book.weight.detach()[:num_codes] for book in books])


def _play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    module.eval()
    model = _on_meta(_config(module)).config
    height, width = model.grid
    device = module.pos_emb_d.device
    tokenizer = _Tokenizer(model.depth, model.num_codes, model.code_dim, device)
    shape = (_ROWS, height, width, model.depth)
    codes = torch.randint(model.num_codes, shape, device=device)
    cond = torch.randint(model.num_conditions, (_ROWS, model.condition_length), device=device)
    with torch.no_grad():
        yield "its forward", _logits(module, codes, tokenizer, cond)
        last = (height - 1, max(width - 2, 0))
        cuts = {"temperature": 0.9, "top_k": max(model.num_codes // 2, 1), "top_p": 0.9}
        yield "its sample", module.sample(codes, tokenizer, cond, start_loc=last, **cuts)
        yield "its sample", module.sample(codes, tokenizer, start_loc=(height - 1, width - 1))


def _head_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    module.eval()
    hidden_dim, code_dim, *_, depth, num_codes = _head_sizes(module)
    device = module.pos_emb_d.device
    tokenizer = _Tokenizer(depth, num_codes, code_dim, device)
    hidden = torch.randn(_ROWS, 1, hidden_dim, device=device)
    codes = torch.randint(num_codes, (_ROWS, 1, depth), device=device)
    with torch.no_grad():
        if record(module) is None:
            yield "its forward", module(hidden, codes, tokenizer)
        else:
            twin = _HEAD_TWINS.of(module)
            assert twin is not None
            model = twin.model
            sums = model.running_sums(codes[:, 0], _tables_of(tokenizer, codes, num_codes))
            yield "its forward", model(hidden[:, 0], sums).unsqueeze(1)
        for cfg in (3.0, 1.0):
            yield "its generate", module.generate(hidden, tokenizer, cfg)


ADAPTERS = (
    Adapter("RQ-Transformer", _matches, _why_not, _swap, _undo),
    Adapter("depth head of VILA-U", _head_matches, _head_why_not, _head_swap, _head_undo),
)
"""The adapters of this file."""
