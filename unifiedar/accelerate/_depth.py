"""What the adapters for RQ-Transformer and for VILA-U's depth head share: code vectors, checks, rehearsals.

Both code bases have a class RQTransformer over blocks of the same arithmetic, and draw from what a tokenizer with
codebooks tells them. The code vectors are read in that tokenizer, found by its names and asked once whether they are
what it answers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate._swap import Twin, Twins, class_of, hooked, packed

__all__ = [
    "Tokenizer",
    "autocasting",
    "heads_of",
    "in_file",
    "keys_why_not",
    "narrow",
    "plain_twin",
    "random_state",
    "randomize",
    "set_random_state",
    "table_of",
    "tables_of",
    "weights_why_not",
]

CLASS = "RQTransformer"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights. The published draws are in float32 whatever the logits are; ours of float64 ones are not."""


# ---- the code vectors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What was found out about a tokenizer's code vectors.

    Attributes:
        state: the vectors' places and versions.
        held: the vectors, so that their places stay theirs.
        table: as `table_of` returns it, or None if the tokenizer answers something else.
    """

    state: Any
    held: list[Tensor]
    table: Tensor | None


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def table_of(tokenizer: Any, depth: int, num_codes: int, code_dim: int, like: Tensor) -> Tensor | None:
    """The code vectors (K, C) or (D, K, C) of a tokenizer, on the device of `like`; None if it has none that are known.

    Without a copy where all depths have one table, or where they lie side by side; a copy is kept, and made anew when
    they change.
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
    places = [one.data_ptr() for one in weights]
    copied = len(set(places)) > 1 and not packed(weights)
    versions = [_version(one) for one in weights] if copied else None
    state = (places, versions, first.dtype, num_codes)
    known = _KNOWN.get(tokenizer)
    if known is None or known.state != state:
        held = [one.detach() for one in weights]
        if copied:
            table = torch.stack(held)
        elif len(set(places)) == 1:
            table = held[0]
        else:
            table = held[0].as_strided((depth, *first.shape), (first.numel(), *first.stride()))
        table = table[..., :num_codes, :]
        answers = _answers_with(tokenizer, table, depth)
        known = _KNOWN[tokenizer] = _Known(state, held, table if answers else None)
    return known.table


def _version(tensor: Tensor) -> object:
    """What changes when a tensor is written to; unlike anything for an inference tensor, which does not tell."""
    return object() if tensor.is_inference() else tensor._version


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


# ---- the module ------------------------------------------------------------------------------------------------------


def in_file(module: nn.Module, file: str) -> bool:
    published = class_of(module, CLASS)
    return published is not None and published.__module__.rpartition(".")[2] == file


def heads_of(blocks: Any) -> int:
    """Heads of every block; ValueError if they differ."""
    heads = {block.attn.n_head for block in blocks}
    if len(heads) != 1:
        raise ValueError(f"its blocks have {sorted(heads)} heads, not all the same")
    return heads.pop()


def weights_why_not(module: Any, file: str) -> str | None:
    for name in ("body_transformer", "head_transformer"):
        for i, block in enumerate(getattr(getattr(module, name, None), "blocks", ())):
            where = type(block).__module__.rpartition(".")[2]
            if type(block).__name__ != "AttentionBlock" or where != file:
                kind = type(block).__name__
                return f"block {i} of its {name} is a {kind} of {where}, not an AttentionBlock of {file}"
    tensors = [*module.parameters(), *module.buffers()]
    if any(type(one.data) is not Tensor for one in tensors):
        return "its weights are not plain tensors"
    if any(one.is_meta for one in tensors):
        return "its weights are on the meta device: load them first"
    if len({(one.dtype, one.device) for one in tensors}) != 1:
        return "its weights are of several dtypes or on several devices"
    if tensors[0].dtype not in FLOATS:
        return f"its weights are {str(tensors[0].dtype).removeprefix('torch.')}"
    return None


def keys_why_not(module: nn.Module, model: nn.Module) -> str | None:
    ours = {name: value.shape for name, value in model.state_dict().items()}
    if ours != {name: value.shape for name, value in module.state_dict().items()}:
        return "its state_dict has not the published keys and shapes"
    return None


def plain_twin(module: Any, twins: Twins) -> Twin | None:
    """The twin of a module, if that is as it was when it was swapped: eval mode, no hooks, weights of one dtype."""
    if module.training or hooked(module):
        return None
    twin, dtype = twins.of(module), module.pos_emb_d.dtype
    if twin is None or dtype not in FLOATS or any(one.dtype != dtype for one in twin.sources):
        return None
    return twin


# ---- the process -----------------------------------------------------------------------------------------------------


def autocasting(like: Tensor) -> bool:
    return torch.is_autocast_enabled(like.device.type)


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


# ---- rehearsals ------------------------------------------------------------------------------------------------------


class Tokenizer(nn.Module):
    """As much of a tokenizer as a draw asks: codebooks of its own for each depth, and a padding row in each."""

    def __init__(self, depth: int, num_codes: int, code_dim: int, device: torch.device):
        super().__init__()
        like: Any = {"padding_idx": num_codes, "device": device, "dtype": torch.float32}
        self.quantizer = nn.Module()
        self.quantizer.codebooks = nn.ModuleList(nn.Embedding(num_codes + 1, code_dim, **like) for _ in range(depth))

    def get_code_emb_with_depth(self, codes: Tensor) -> tuple[Tensor, None]:
        books = self.quantizer.codebooks
        assert isinstance(books, nn.ModuleList)
        return torch.stack([book(codes[..., d]) for d, book in enumerate(books)], dim=-2), None


def narrow(module: nn.Module, model: nn.Module) -> dict[Tensor, Tensor]:
    """Narrow tensors in place of the module's own, of the shapes of a model of ours."""
    shapes = {key: one.shape for key, one in model.state_dict().items()}
    theirs = module.state_dict(keep_vars=True)
    return {one: one.new_zeros(shapes[key]) for key, one in theirs.items()}


@torch.no_grad()
def randomize(module: Any) -> None:
    """Weights of a size that matters, and settings that go with their shapes."""
    for one in module.parameters():
        one.normal_(std=one.shape[-1] ** -0.5 if one.ndim == 2 else 0.3)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.normalized_shape = tuple(part.weight.shape)
    if hasattr(module, "vocab_size"):
        module.vocab_size = [len(module.classifier.linear.weight)] * module.block_size[2]


def tables_of(tokenizer: Tokenizer, num_codes: int) -> Tensor:
    books: Any = tokenizer.quantizer.codebooks
    return torch.stack([book.weight.detach()[:num_codes] for book in books])
