"""Adapters for the residual quantizer of RQ-VAE and VILA-U, and its codebooks.

Both code bases hold the same classes RQBottleneck and VQEmbedding in a file quantizations.py; RQ-VAE's has partial
decoding besides. Published: embed_code looks every depth up on its own, concatenates (B, h, w, D, C) and sums over D;
quantize makes a matrix of distances a depth, and in training a matrix of zeros and ones besides.

embed_code_with_depth, which returns the rows of all depths, is no sum and stays; so does forward, which calls quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
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
from unifiedar.nn.codes import Movement, search, soft_codes
from unifiedar.ops import residual_lookup

__all__ = ["ADAPTERS"]

_CLASS, _BOOK_CLASS, _FILE = "RQBottleneck", "VQEmbedding", "quantizations"
_EMBEDDINGS = ("embed_code", "embed_partial_code")
_SEARCHES = ("quantize", "get_soft_codes")
_BOOK_SEARCHES = ("forward", "find_nearest_embedding")


def _matches(module: nn.Module) -> bool:
    return class_of(module, _CLASS) is not None


def _methods(module: nn.Module) -> list[str]:
    return [name for name in _EMBEDDINGS if hasattr(type(module), name)]


def _shared(module: Any) -> bool:
    return bool(module.shared_codebook) or all(book is module.codebooks[0] for book in module.codebooks)


def _why_not(module: Any) -> str | None:
    published = class_of(module, _CLASS)
    if published is None or published.__module__.rpartition(".")[2] != _FILE:
        where = "nowhere" if published is None else published.__module__
        return f"{_CLASS} comes from {where}, not from a module {_FILE} as in RQ-VAE and VILA-U"
    needed = ("codebooks", "code_shape", "shared_codebook", "embed_code", "to_latent_shape")
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    replaced = overridden(module, published, (*_methods(module), "to_latent_shape"))
    if replaced is not None:
        return replaced
    return _codebooks_why_not(module) or _answers_differently(module)


def _codebooks_why_not(module: Any) -> str | None:
    if not isinstance(module.codebooks, nn.ModuleList):
        return f"its codebooks are a {type(module.codebooks).__name__}, not a ModuleList"
    books: list[Any] = list(module.codebooks)
    depth = module.code_shape[-1]
    if len(books) != depth:
        return f"has {len(books)} codebooks for {depth} depths"
    if _shared(module):
        books = books[:1]
    for book in books:
        if not isinstance(book, nn.Embedding):
            return f"its codebooks are {type(book).__name__}, not embeddings"
        if book.max_norm is not None or book.scale_grad_by_freq or book.sparse:
            return "its codebooks use max_norm, scale_grad_by_freq or sparse gradients"
    weights = [book.weight for book in books]
    first = weights[0]
    if type(first.data) is not Tensor:
        return f"its codebooks' weights are of the tensor class {type(first.data).__name__}"
    if first.is_meta:
        return "its codebooks are on the meta device: load the weights first"
    if first.dtype not in FLOATS:
        return f"its codebooks are {str(first.dtype).removeprefix('torch.')}"
    if len({weight.shape for weight in weights}) > 1:
        sizes = ", ".join(str(len(weight) - 1) for weight in weights)
        return f"its codebooks differ in size ({sizes} codes), residual_lookup takes one size for all depths"
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return "its codebooks differ in dtype or device"
    if len(weights) > 1:
        if any("weight" not in book._parameters for book in books):
            return "its codebooks' weights are computed, not plain parameters, so they cannot lie side by side"
        if len({id(weight) for weight in weights}) not in (1, depth):
            return "some of its codebooks are one tensor and others are not"
    return None


def _answers_differently(module: Any) -> str | None:
    """Run the module's own methods on a few codes: None if they are sums of its codebooks' rows, else the reason."""
    weights = [book.weight for book in module.codebooks]
    if _shared(module):
        weights = weights[:1] * len(weights)
    rows, depth = len(weights[0]), len(weights)
    codes = torch.randint(rows, (1, *module.code_shape), generator=torch.Generator().manual_seed(0))
    codes.view(-1)[0] = rows - 1  # the padding row counts too
    codes = codes.to(weights[0].device)
    checks: list[tuple[str, tuple[Any, ...], slice]] = [("embed_code", (), slice(None))]
    if "embed_partial_code" in _methods(module):
        checks += [
            ("embed_partial_code", (depth // 2, "add"), slice(depth // 2 + 1)),
            ("embed_partial_code", (depth - 1, "select"), slice(depth - 1, None)),
        ]
    for name, arguments, part in checks:
        try:
            with torch.no_grad():
                got = getattr(module, name)(codes, *arguments)
                chosen = torch.stack([weight[codes[..., d]].double() for d, weight in enumerate(weights)])[part]
                expected, scale = (module.to_latent_shape(one) for one in (chosen.sum(0), chosen.abs().sum(0)))
        except Exception as error:  # foreign code may fail in any way; the report says how
            return f"its {name} fails on codes {tuple(codes.shape)}: {type(error).__name__}: {error}"
        if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != weights[0].dtype:
            return f"its {name} does not return codebook rows"
        # Each addition and the last rounding are off by half an ulp of the partial sum at most.
        bound = scale * depth * torch.finfo(got.dtype).eps
        if not bool(((got.double() - expected).abs() <= bound).logical_or(~expected.isfinite()).all()):
            return f"its {name} does not return the sum of its codebooks' rows"
    return None


def _differentiable(module: Any) -> bool:
    """Whether gradients flow through the module's own embed_code (in the published code they do not)."""
    if any(parameter.is_inference() for parameter in module.codebooks.parameters()):
        return False
    frozen = [parameter for parameter in module.codebooks.parameters() if not parameter.requires_grad]
    # torch.func.functional_call would not touch the flags, but it loses the parameters of modules listed twice.
    with torch.inference_mode(False), torch.enable_grad():
        codes = torch.zeros((1, *module.code_shape), dtype=torch.int64, device=module.codebooks[0].weight.device)
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            return module.embed_code(codes).requires_grad
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def _swap(module: Any) -> Swap:
    functions: dict[str, Callable[..., Any]] = {"embed_code": embed_code, "embed_partial_code": embed_partial_code}
    methods = {name: functions[name] for name in _methods(module)}
    how = "one codebook for all depths, read in place"
    if not _shared(module):
        how = f"{len(module.codebooks)} codebooks, moved side by side in one storage and shared"
    text = f"{' and '.join(methods)} by residual_lookup ({how})"
    searches = _searches(module)
    if searches:
        reason = _search_why_not(module)
        if reason is None:
            methods |= searches
            text += f"; {' and '.join(searches)} by residual_quantize, training by code_statistics"
        else:
            text += f"; {' and '.join(searches)} left alone: {reason}"
    swap = Swap(text, methods, {"differentiable": _differentiable(module)})
    if not _shared(module):
        pack([book.weight for book in module.codebooks])
    return swap


def _undo(module: Any) -> None:
    if not _shared(module):
        unpack([book.weight for book in module.codebooks])


def _table(module: Any, depth: slice, with_gradient: bool) -> Tensor:
    """The codebook as residual_lookup takes it: (K + 1, C), the last row the padding, or (D, K + 1, C) for `depth`."""
    if _shared(module):
        return module.codebooks[0].weight
    weights = [book.weight for book in module.codebooks]
    if with_gradient:
        return torch.stack(weights[depth])
    table = side_by_side(weights)
    return table if table.ndim == 2 else table[depth]


def _sum(module: Any, codes: Tensor, depth: slice) -> Tensor:
    """Sum of the rows that the codes (B, h, w, D) name at the depths of `depth`, in the latent's shape."""
    weight = module.codebooks[0].weight
    differentiable = torch.is_grad_enabled() and facts(module)["differentiable"]
    with torch.set_grad_enabled(differentiable):
        codes = codes[..., depth].long()
        if differentiable:
            # nn.Embedding gives its padding row, which is zero, no gradient.
            codes = codes.masked_fill(codes == len(weight) - 1, -1)
        return module.to_latent_shape(residual_lookup(codes, _table(module, depth, differentiable)))


def _unusual(module: Any, codes: Any) -> bool:
    """Calls that the published method answers itself: wrong shapes, and autocast, which widens its sum."""
    if not isinstance(codes, Tensor) or tuple(codes.shape[1:]) != tuple(module.code_shape):
        return True
    weight = module.codebooks[0].weight
    return weight.dtype != torch.float32 and torch.is_autocast_enabled(weight.device.type)


def embed_code(self: Any, code: Tensor) -> Tensor:
    """RQBottleneck.embed_code: codes (B, h, w, D) to the sum of their rows, (B, H, W, C')."""
    if _unusual(self, code):
        return original(self, "embed_code")(code)
    return _sum(self, code, slice(None))


def embed_partial_code(self: Any, code: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
    """RQBottleneck.embed_partial_code: the rows of depth `code_idx` ("select") or the sum of those up to it ("add")."""
    known = decode_type in ("select", "add") and isinstance(code_idx, int) and 0 <= code_idx < self.code_shape[-1]
    if not known or _unusual(self, code):
        return original(self, "embed_partial_code")(code, code_idx, decode_type)
    return _sum(self, code, slice(code_idx if decode_type == "select" else 0, code_idx + 1))


# ---- the search ------------------------------------------------------------------------------------------------------


def _search_why_not(module: Any) -> str | None:
    """Why quantize and get_soft_codes must stay the published ones, or None."""
    published = class_of(module, _CLASS)
    needed = ("to_code_shape", "latent_shape", "quantize")
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"it lacks {', '.join(missing)}"
    assert published is not None
    return (
        overridden(module, published, (*_SEARCHES, "to_code_shape"))
        or next((reason for book in module.codebooks if (reason := _book_why_not(book))), None)
        or rehearse(module, _searching_swap, _small(module.codebooks), _prepare, _play)
    )


def _searching_swap(module: Any) -> Swap:
    """What a rehearsal puts on a copy: the searches alone."""
    if not _shared(module):
        pack([book.weight for book in module.codebooks])
    return Swap("", _searches(module), {"differentiable": False})


def _searches(module: Any) -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {"quantize": quantize, "get_soft_codes": get_soft_codes}
    return {name: functions[name] for name in _SEARCHES if hasattr(type(module), name)}


def _book_why_not(book: Any) -> str | None:
    """Why a codebook cannot be searched or moved by ours, or None."""
    needed = ("ema", "decay", "eps", "restart_unused_codes", "n_embed", "cluster_size_ema", "embed_ema")
    missing = [name for name in needed if not hasattr(book, name)]
    if missing:
        return f"its codebook lacks {', '.join(missing)}"
    if not book.ema:
        return "its codebook is trained by gradient, not by moving averages"
    return None


_REHEARSED = 64
"""As many codes are enough for a rehearsal."""


def _small(books: Iterable[Any]) -> dict[Tensor, Tensor]:
    """The first rows of the tensors of codebooks that have more, and the padding."""
    found: dict[Tensor, Tensor] = {}
    for book in books:
        if book.n_embed > _REHEARSED:
            found[book.weight] = torch.cat([book.weight.detach()[:_REHEARSED], book.weight.detach()[-1:]])
            found[book.cluster_size_ema] = book.cluster_size_ema[:_REHEARSED]
            found[book.embed_ema] = book.embed_ema[:_REHEARSED]
    return found


@torch.no_grad()
def _prepare(module: Any) -> None:
    """Gives codebooks rows apart from each other and averages, some of them about to die."""
    for book in dict.fromkeys(module.codebooks) if hasattr(module, "codebooks") else [module]:
        book.n_embed = book.padding_idx = len(book.cluster_size_ema)
        book.num_embeddings = book.n_embed + 1
        book.weight[:-1].normal_()
        book.cluster_size_ema.uniform_(0.5, 3)
        book.embed_ema.copy_(book.weight[:-1] * book.cluster_size_ema[:, None])


def _play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    (height, width, channels), (h, w, _) = module.latent_shape, module.code_shape
    shape = (2, 2 * (height // h), 3 * (width // w), channels)
    module.eval()
    x = torch.randn(shape, device=module.codebooks[0].weight.device)
    yield "its quantize", module.quantize(module.to_code_shape(x))
    yield "its forward", module(x)
    if hasattr(module, "get_soft_codes"):
        for stochastic in (False, True):
            yield "its get_soft_codes", module.get_soft_codes(x, 0.7, stochastic)
    module.train(training)
    for _ in range(2 if training else 0):
        x = torch.randn(shape, device=x.device, requires_grad=True)
        outputs = module(x)
        yield "its forward in training", outputs
        losses = [one.square().sum() for one in outputs if one.requires_grad]
        yield "its gradient", torch.autograd.grad(sum(losses), x) if losses else None


def _movement(book: Any) -> Movement:
    return Movement(book.decay, book.eps, _restart if book.restart_unused_codes else None)


def _restart(vectors: Tensor, num_codes: int) -> Tensor:
    """Vectors (B, K, C) of those (R, B, C) of each table, with the random numbers that the published code draws."""
    rows, _, channels = vectors.shape
    drawn = []
    for own in vectors.unbind(1):
        if rows < num_codes:  # as often as it takes, parted by a little noise
            own = own.repeat(-(-num_codes // rows), 1)
            own = own + torch.rand_like(own) * (0.01 / channels**0.5)
        drawn.append(own[torch.randperm(len(own), device=own.device)[:num_codes]])
    return torch.stack(drawn)


def _moves(books: list[Any]) -> bool:
    """Whether a quantize of these codebooks moves them."""
    return any(book.training for book in books)


def _search_unusual(books: list[Any], x: Any) -> bool:
    """Calls that the published method answers itself: wrong shapes, dtypes that it refuses, codebooks with a gradient,
    and training of codebooks that are not alike."""
    weight = books[0].weight
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != weight.shape[-1] or x.device != weight.device:
        return True
    if not x.numel() or x.dtype not in FLOATS:
        return True
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return True
    if torch.is_grad_enabled() and any(book.weight.requires_grad for book in books):
        return True
    if not _moves(books):
        return False
    alike = {(book.training, book.decay, book.eps, bool(book.restart_unused_codes)) for book in books}
    tensors = [one for book in books for one in (book.weight, book.cluster_size_ema, book.embed_ema)]
    return (
        len(alike) > 1
        or any(one.dtype not in (torch.float32, torch.float64) or one.dtype != weight.dtype for one in tensors)
        or (not torch.compiler.is_compiling() and len({one.data_ptr() for one in tensors}) < len(tensors))
    )


def _search(books: list[Any], table: Tensor, depth: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., D) and running sums (..., D, C) of x (..., C); moves the codebooks if they are in training."""
    x = x.detach()
    if not _moves(books):
        return search(x, table, depth)
    return search(x.to(table.dtype), table, depth, books, _movement(books[0]), each_depth=True)


def _own_books(module: Any) -> list[Any]:
    """The codebooks of a quantizer, one if it is shared."""
    return list(module.codebooks)[:1] if _shared(module) else list(module.codebooks)


def quantize(self: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """RQBottleneck.quantize: features (B, h, w, E) to D running sums (B, h, w, E) and codes (B, h, w, D)."""
    books = _own_books(self)
    if _search_unusual(books, x) or x.ndim != 4:
        return original(self, "quantize")(x)
    table = _table(self, slice(None), False).detach()[..., :-1, :]
    codes, sums = _search(books, table, self.code_shape[-1], x)
    return list(sums.to(x.dtype).unbind(-2)), codes


def get_soft_codes(self: Any, x: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """RQBottleneck.get_soft_codes: features (B, H, W, C) to soft codes (B, h, w, D, K) and codes (B, h, w, D)."""
    books = _own_books(self)
    weight = books[0].weight
    with torch.no_grad():
        usual = isinstance(x, Tensor) and x.ndim == 4 and not _search_unusual([books[0]], self.to_code_shape(x))
        if not usual or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type) or not temp > 0:
            return original(self, "get_soft_codes")(x, temp, stochastic)
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        table = _table(self, slice(None), False).detach()[..., :-1, :].to(wide)
        soft, codes = soft_codes(self.to_code_shape(x).to(wide), table, self.code_shape[-1], temp, stochastic)
        return soft.to(x.dtype), codes


# ---- a codebook on its own -------------------------------------------------------------------------------------------


def _book_matches(module: nn.Module) -> bool:
    published = class_of(module, _BOOK_CLASS)
    return published is not None and published.__module__.rpartition(".")[2] == _FILE


def _own_book_why_not(module: Any) -> str | None:
    if not isinstance(module, nn.Embedding) or any(not hasattr(module, name) for name in _BOOK_SEARCHES):
        return "it is not an embedding with a search"
    published = class_of(module, _BOOK_CLASS)
    assert published is not None
    reason = _book_why_not(module) or overridden(module, published, _BOOK_SEARCHES)
    if reason is not None:
        return reason
    if module.weight.is_meta:
        return "its weight is on the meta device: load the weights first"
    if module.weight.dtype not in FLOATS or type(module.weight.data) is not Tensor:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')} of {type(module.weight.data).__name__}"
    return rehearse(module, _book_swap, _small([module]), _prepare, _book_play)


def _book_swap(module: Any) -> Swap:
    methods: dict[str, Callable[..., Any]] = {"forward": book_forward, "find_nearest_embedding": find_nearest_embedding}
    return Swap("forward and find_nearest_embedding by residual_quantize, training by code_statistics", methods)


def _book_play(module: Any, training: bool) -> Iterator[tuple[str, Any]]:
    weight = module.weight
    module.eval()
    x = torch.randn((2, 3, weight.shape[1]), device=weight.device)
    yield "its find_nearest_embedding", module.find_nearest_embedding(x)
    yield "its forward", module(x)
    module.train(training)
    for _ in range(2 if training else 0):
        yield "its forward in training", module(torch.randn_like(x))


def book_forward(self: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """VQEmbedding.forward: vectors (..., E) to their rows (..., E) and codes (...); moves the codebook in training."""
    if _search_unusual([self], inputs):
        return original(self, "forward")(inputs)
    codes, sums = _search([self], self.weight.detach()[:-1], 1, inputs)
    return sums.squeeze(-2).to(self.weight.dtype), codes.squeeze(-1)


def find_nearest_embedding(self: Any, inputs: Tensor) -> Tensor:
    """VQEmbedding.find_nearest_embedding: the codes (...) of vectors (..., E)."""
    if _search_unusual([self], inputs):
        return original(self, "find_nearest_embedding")(inputs)
    return search(inputs.detach(), self.weight.detach()[:-1], 1)[0].squeeze(-1)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("residual quantizer of RQ-VAE and VILA-U", _matches, _why_not, _swap, _undo),
    Adapter("codebook of RQ-VAE and VILA-U", _book_matches, _own_book_why_not, _book_swap),
)
"""The adapters of this file."""
