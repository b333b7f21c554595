"""Drop-in acceleration of reference models: `accelerate(module)` swaps slow parts in place, `restore` undoes it.

What can be swapped is one table, `ADAPTERS`. An adapter knows one class of a published code base by its name, the
module it is defined in and the attributes it needs; the code base itself is never imported. Weights are shared, never
copied; state_dict, parameters and their names stay as they are. Before a module is swapped its own methods are run on
its own weights and compared with the formula: what answers differently is left alone, with the reason in the report.

A swap lives on the instance: methods in its `__dict__` that hide those of its class, and one record of them. Copies
made with `copy.deepcopy` stay swapped; a module that went through pickle has to be accelerated again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.ops import (
    Phi,
    multiscale_inputs,
    multiscale_lookup,
    multiscale_quantize,
    next_scale_input,
    residual_lookup,
)

__all__ = ["ADAPTERS", "Adapter", "Entry", "Report", "accelerate", "restore"]

_RECORD = "_unifiedar_swap"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Adapter:
    """How one class of a published code base is accelerated.

    Args:
        name: what is swapped, in a few words; unique in `ADAPTERS`.
        matches: whether a module is of the class meant, by names alone; cheap, called on every submodule.
        why_not: why a module that matches must be left alone, in one sentence, or None if it can be swapped.
        swap: prepares a module that `why_not` let through; returns the Swap to put on it.
        undo: takes back what `swap` did to the module beyond its methods.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    swap: Callable[[nn.Module], Swap]
    undo: Callable[[nn.Module], None] = lambda module: None


@dataclass(frozen=True)
class Swap:
    """What an adapter puts on a module.

    Args:
        text: what was done, for the report.
        methods: by the name of the method that each hides; a function of the module and the method's arguments.
        facts: what the methods need to know of the module, found out once (see `_facts`).
    """

    text: str
    methods: Mapping[str, Callable[..., Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What became of one module.

    Attributes:
        path: its name in the module given to `accelerate`; "" is that module itself.
        kind: its class.
        adapter: the adapter that matched it.
        status: "swapped", "already" (swapped by an earlier call) or "refused".
        text: what was done, or why nothing was.
    """

    path: str
    kind: str
    adapter: str
    status: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:8} {self.path or '(the module itself)'} ({self.kind}), {self.adapter}: {self.text}"


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: one entry per module that an adapter knows, in the order of `named_modules`."""

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> list[Entry]:
        """Modules that run on our ops now, whether this call or an earlier one swapped them."""
        return [entry for entry in self.entries if entry.status != "refused"]

    @property
    def refused(self) -> list[Entry]:
        """Modules that an adapter knows but left alone."""
        return [entry for entry in self.entries if entry.status == "refused"]

    def __str__(self) -> str:
        if not self.entries:
            known = "; ".join(adapter.name for adapter in ADAPTERS)
            return f"unifiedar.accelerate: nothing to swap, no module is one of: {known}"
        head = f"unifiedar.accelerate: {len(self.swapped)} swapped, {len(self.refused)} refused"
        return "\n".join([head, *(f"  {entry}" for entry in self.entries)])


def accelerate(module: nn.Module, *, verbose: bool = True) -> Report:
    """Swap the parts of a reference model that we do faster, in place, and report what was swapped and what was not.

    Every submodule is looked at once. Weights are shared and keep their names; outputs equal the reference's within
    twice its own rounding error. Calling it again swaps only what is new.

    Args:
        module: a model with its weights loaded, or any part of one.
        verbose: whether to print the report.

    Returns:
        Report; its `swapped` and `refused` list the modules with what was done or the reason why not.

    Raises:
        TypeError: if `module` is not an nn.Module.
    """
    _require_module("accelerate", module)
    entries = []
    for path, part in module.named_modules():
        for adapter in ADAPTERS:
            if not adapter.matches(part):
                continue
            status, text = _apply(adapter, part)
            entries.append(Entry(path, type(part).__name__, adapter.name, status, text))
            break
    report = Report(tuple(entries))
    if verbose:
        print(report)
    return report


def restore(module: nn.Module) -> list[str]:
    """Undo `accelerate`: every module gets its own methods back and nothing of ours stays on it.

    Args:
        module: what was accelerated, or any part of it. Parts that were not are left alone.

    Returns:
        The names of the submodules that were restored ("" is the module itself).

    Raises:
        TypeError: if `module` is not an nn.Module.
    """
    _require_module("restore", module)
    restored = []
    for path, part in module.named_modules():
        if _RECORD in part.__dict__:
            _clear(part)
            restored.append(path)
    return restored


def _require_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module must be a torch.nn.Module, got {type(module).__name__}")


def _apply(adapter: Adapter, module: nn.Module) -> tuple[str, str]:
    """Swap one module; returns the status and the text of its report entry."""
    record = module.__dict__.get(_RECORD)
    if record is not None:
        if all(_is_ours(module, name) for name in record["methods"]):
            return "already", record["text"]
        _clear(module)
    reason = adapter.why_not(module)
    if reason is not None:
        return "refused", reason
    swap = adapter.swap(module)
    for name, function in swap.methods.items():
        module.__dict__[name] = types.MethodType(function, module)
    # Plain data: deepcopy and pickle can carry it, and a pickle can be read where this package is not installed.
    module.__dict__[_RECORD] = {
        "adapter": adapter.name,
        "text": swap.text,
        "methods": tuple(swap.methods),
        "facts": dict(swap.facts),
    }
    return "swapped", swap.text


def _is_ours(module: nn.Module, name: str) -> bool:
    method = module.__dict__.get(name)
    return isinstance(method, types.MethodType) and method.__func__.__module__.partition(".")[0] == "unifiedar"


def _clear(module: nn.Module) -> None:
    """Take a swap off a module."""
    record = module.__dict__.pop(_RECORD)
    for adapter in ADAPTERS:
        if adapter.name == record["adapter"]:
            adapter.undo(module)
    for name in record["methods"]:
        # Pickle leaves the class's own method in our place; any other patch on top of ours is its author's to undo.
        method = module.__dict__.get(name)
        if _is_ours(module, name) or getattr(method, "__func__", None) is getattr(type(module), name):
            del module.__dict__[name]


def _facts(module: nn.Module) -> Mapping[str, Any]:
    return module.__dict__[_RECORD]["facts"]


def _original(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method of the module's class that ours hides."""
    return types.MethodType(getattr(type(module), name), module)


# ---- The code embedding of RQ-VAE's and VILA-U's residual quantizer --------------------------------------------------
#
# Both code bases hold the same class RQBottleneck in a file quantizations.py; RQ-VAE's has partial decoding besides.
# embed_code looks every depth up on its own, concatenates (B, h, w, D, C) and sums over D. embed_code_with_depth, which
# returns that stack itself, is no sum and stays.

_RQ_CLASS, _RQ_FILE = "RQBottleneck", "quantizations"
_RQ_METHODS = ("embed_code", "embed_partial_code")


def _rq_matches(module: nn.Module) -> bool:
    return _rq_class(module) is not None


def _rq_class(module: nn.Module) -> type | None:
    """The published class (by its name) that a module is an instance of."""
    return next((base for base in type(module).__mro__ if base.__name__ == _RQ_CLASS), None)


def _rq_methods(module: nn.Module) -> list[str]:
    return [name for name in _RQ_METHODS if hasattr(type(module), name)]


def _rq_shared(module: Any) -> bool:
    return bool(module.shared_codebook) or all(book is module.codebooks[0] for book in module.codebooks)


def _rq_why_not(module: Any) -> str | None:
    published = _rq_class(module)
    if published is None or published.__module__.rpartition(".")[2] != _RQ_FILE:
        where = "nowhere" if published is None else published.__module__
        return f"{_RQ_CLASS} comes from {where}, not from a module {_RQ_FILE} as in RQ-VAE and VILA-U"
    needed = ("codebooks", "code_shape", "shared_codebook", "embed_code", "to_latent_shape")
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name in (*_rq_methods(module), "to_latent_shape"):
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
        for base in type(module).__mro__[: type(module).__mro__.index(published)]:
            if name in vars(base):
                return f"{base.__name__} overrides {name}"
    return _rq_codebooks_why_not(module) or _rq_answers_differently(module)


def _rq_codebooks_why_not(module: Any) -> str | None:
    if not isinstance(module.codebooks, nn.ModuleList):
        return f"its codebooks are a {type(module.codebooks).__name__}, not a ModuleList"
    books: list[Any] = list(module.codebooks)
    depth = module.code_shape[-1]
    if len(books) != depth:
        return f"has {len(books)} codebooks for {depth} depths"
    if _rq_shared(module):
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
    if first.dtype not in _FLOATS:
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


def _rq_answers_differently(module: Any) -> str | None:
    """Run the module's own methods on a few codes: None if they are sums of its codebooks' rows, else the reason."""
    weights = [book.weight for book in module.codebooks]
    if _rq_shared(module):
        weights = weights[:1] * len(weights)
    rows, depth = len(weights[0]), len(weights)
    codes = torch.randint(rows, (1, *module.code_shape), generator=torch.Generator().manual_seed(0))
    codes.view(-1)[0] = rows - 1  # the padding row counts too
    codes = codes.to(weights[0].device)
    checks: list[tuple[str, tuple[Any, ...], slice]] = [("embed_code", (), slice(None))]
    if "embed_partial_code" in _rq_methods(module):
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


def _rq_differentiable(module: Any) -> bool:
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


def _rq_swap(module: Any) -> Swap:
    functions: dict[str, Callable[..., Any]] = {"embed_code": embed_code, "embed_partial_code": embed_partial_code}
    methods = {name: functions[name] for name in _rq_methods(module)}
    facts = {"differentiable": _rq_differentiable(module)}
    if _rq_shared(module):
        how = "one codebook for all depths, read in place"
    else:
        _pack([book.weight for book in module.codebooks])
        how = f"{len(module.codebooks)} codebooks, moved side by side in one storage and shared"
    return Swap(f"{' and '.join(methods)} by residual_lookup ({how})", methods, facts)


def _rq_undo(module: Any) -> None:
    weights = [book.weight for book in module.codebooks]
    if not _rq_shared(module) and _packed(weights):
        for weight in weights:
            weight.data = weight.data.clone()


def _packed(weights: list[Tensor]) -> bool:
    """Whether weights lie one behind the other in one storage."""
    first = weights[0]
    step = first.numel() * first.element_size()
    end = first.data_ptr() + len(weights) * step
    storage = first.untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes() and all(
        weight.data_ptr() == first.data_ptr() + d * step and weight.is_contiguous() for d, weight in enumerate(weights)
    )


def _pack(weights: list[Tensor]) -> None:
    """Move parameters into one storage, one behind the other; they stay the same parameters with the same values.

    Takes their memory once more while it runs and nothing afterwards.
    """
    first = weights[0]
    if all(weight.data_ptr() == first.data_ptr() for weight in weights):
        return  # one memory already, and so it must stay
    # A parameter outside inference mode cannot take a tensor made inside.
    with torch.inference_mode(False), torch.no_grad():
        storage = torch.empty((len(weights), *first.shape), dtype=first.dtype, device=first.device)
        for place, weight in zip(storage, weights, strict=True):
            place.copy_(weight)
            weight.data = place


def _rq_table(module: Any, depth: slice, with_gradient: bool) -> Tensor:
    """The codebook as residual_lookup takes it: (K + 1, C), the last row the padding, or (D, K + 1, C) for `depth`."""
    if _rq_shared(module):
        return module.codebooks[0].weight
    weights = [book.weight for book in module.codebooks]
    if with_gradient:
        return torch.stack(weights[depth])
    first = weights[0]
    if all(weight.data_ptr() == first.data_ptr() for weight in weights):
        return first
    if not _packed(weights):  # .to(), .half() and the like gave each weight memory of its own
        _pack(weights)
    rows, channels = first.shape
    return first.detach().as_strided((len(weights), rows, channels), (rows * channels, channels, 1))[depth]


def _rq_sum(module: Any, codes: Tensor, depth: slice) -> Tensor:
    """Sum of the rows that the codes (B, h, w, D) name at the depths of `depth`, in the latent's shape."""
    weight = module.codebooks[0].weight
    differentiable = torch.is_grad_enabled() and _facts(module)["differentiable"]
    with torch.set_grad_enabled(differentiable):
        codes = codes[..., depth].long()
        if differentiable:
            # nn.Embedding gives its padding row, which is zero, no gradient.
            codes = codes.masked_fill(codes == len(weight) - 1, -1)
        return module.to_latent_shape(residual_lookup(codes, _rq_table(module, depth, differentiable)))


def _rq_unusual(module: Any, codes: Any) -> bool:
    """Calls that the published method answers itself: wrong shapes, and autocast, which widens its sum."""
    if not isinstance(codes, Tensor) or tuple(codes.shape[1:]) != tuple(module.code_shape):
        return True
    weight = module.codebooks[0].weight
    return weight.dtype != torch.float32 and torch.is_autocast_enabled(weight.device.type)


def embed_code(self: Any, code: Tensor) -> Tensor:
    """RQBottleneck.embed_code: codes (B, h, w, D) to the sum of their rows, (B, H, W, C')."""
    if _rq_unusual(self, code):
        return _original(self, "embed_code")(code)
    return _rq_sum(self, code, slice(None))


def embed_partial_code(self: Any, code: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
    """RQBottleneck.embed_partial_code: the rows of depth `code_idx` ("select") or the sum of those up to it ("add")."""
    known = decode_type in ("select", "add") and isinstance(code_idx, int) and 0 <= code_idx < self.code_shape[-1]
    if not known or _rq_unusual(self, code):
        return _original(self, "embed_partial_code")(code, code_idx, decode_type)
    return _rq_sum(self, code, slice(code_idx if decode_type == "select" else 0, code_idx + 1))


# ---- VAR's multi-scale quantizer -------------------------------------------------------------------------------------
#
# VectorQuantizer2 in a file quant.py. Swapped is what VAR itself calls: encoding to codes or sums, teacher-forcing
# inputs, and the step of a generation. Its forward, which trains the tokenizer, and embed_to_fhat stay.

_VAR_CLASS, _VAR_FILE = "VectorQuantizer2", "quant"
_VAR_METHODS = ("f_to_idxBl_or_fhat", "idxBl_to_var_input", "get_next_autoregressive_input")


def _var_class(module: nn.Module) -> type | None:
    """The published class (by its name) that a module is an instance of."""
    return next((base for base in type(module).__mro__ if base.__name__ == _VAR_CLASS), None)


def _var_matches(module: nn.Module) -> bool:
    return _var_class(module) is not None


def _var_convolutions(module: Any) -> list[nn.Conv2d]:
    return [one for one in module.quant_resi.modules() if isinstance(one, nn.Conv2d)]


def _var_phi(module: Any, scale: int | None = None) -> Phi | None:
    """Its convolutions, or the one of a scale, uncopied."""
    convs: list[Any] = _var_convolutions(module)
    if not convs:
        return None
    if scale is not None:
        convs = [convs[Phi.indices_of(len(convs), len(module.v_patch_nums))[scale]]]
    if len(convs) == 1:
        return Phi(convs[0].weight[None], convs[0].bias[None], convs[0].resi_ratio)
    weight, bias = (torch.stack([getattr(one, name) for one in convs]) for name in ("weight", "bias"))
    return Phi(weight, bias, convs[0].resi_ratio)


def _var_why_not(module: Any) -> str | None:
    published = _var_class(module)
    if published is None or published.__module__.rpartition(".")[2] != _VAR_FILE:
        where = "nowhere" if published is None else published.__module__
        return f"{_VAR_CLASS} comes from {where}, not from a module {_VAR_FILE} as in VAR"
    needed = ("embedding", "quant_resi", "v_patch_nums", "using_znorm", "prog_si", *_VAR_METHODS)
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name in _VAR_METHODS:
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
        for base in type(module).__mro__[: type(module).__mro__.index(published)]:
            if name in vars(base):
                return f"{base.__name__} overrides {name}"
    return _var_weights_why_not(module) or _var_answers_differently(module)


def _var_weights_why_not(module: Any) -> str | None:
    book, convs = module.embedding, _var_convolutions(module)
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


def _var_answers_differently(module: Any) -> str | None:
    """Run the module's own methods once: None if they are the residual pyramid of its weights, else the reason."""
    table, sides = module.embedding.weight.detach(), tuple(module.v_patch_nums)
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(len(table), (1, side * side), generator=generator).to(table.device) for side in sides]
    shape = (1, table.shape[1], sides[-1], sides[-1])
    features = torch.randn(shape, generator=generator).to(table.device) * table.std()
    # Sums of both in float32, the published code's perhaps with TF32: half of its precision is plenty to tell formulas.
    try:
        with torch.no_grad():
            phi = _var_phi(module)
            got = module.idxBl_to_var_input(codes)
            expected = multiscale_inputs(codes, table, phi, sides, backend="eager")
            if got.shape != expected.shape or not _var_near(got, expected):
                return "its idxBl_to_var_input does not return the residual pyramid's inputs"
            rows = table[codes[0]].transpose(1, 2).reshape(1, -1, sides[0], sides[0])
            total, following = module.get_next_autoregressive_input(0, len(sides), features.clone(), rows)
            want, pooled = next_scale_input(features, codes[0], table, _var_phi(module, 0), sides, 0, backend="eager")
            if (
                pooled is None
                or not _var_near(total, want)
                or not _var_near(following.flatten(2).transpose(1, 2), pooled)
            ):
                return "its get_next_autoregressive_input does not add a scale of the residual pyramid"
            first = module.f_to_idxBl_or_fhat(features, False)[0]
            metric = "cosine" if module.using_znorm else "l2"
            nearest = multiscale_quantize(features, table, phi, sides, metric=metric, backend="eager")[0]
            if first.shape != nearest.shape or not torch.equal(first, nearest):
                return "its f_to_idxBl_or_fhat does not choose the nearest codes"
            sums = module.f_to_idxBl_or_fhat(features, True)
            chosen = module.f_to_idxBl_or_fhat(features, False)
            if not _var_near(sums[-1], multiscale_lookup(chosen, table, phi, sides, backend="eager")):
                return "its f_to_idxBl_or_fhat does not sum what its codes stand for"
    except Exception as error:  # foreign code may fail in any way; the report says how
        return f"its methods fail on random features {shape}: {type(error).__name__}: {error}"
    return None


def _var_near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= 5e-3 * expected.norm())


def _var_swap(module: Any) -> Swap:
    functions: tuple[Callable[..., Any], ...] = (f_to_idxBl_or_fhat, idxBl_to_var_input, get_next_autoregressive_input)
    methods = dict(zip(_VAR_METHODS, functions, strict=True))
    text = "encoding by multiscale_quantize, inputs by multiscale_inputs and next_scale_input; forward is its own"
    return Swap(text, methods)


def _var_unusual(module: Any, *maps: Any) -> bool:
    """Calls that the published method answers itself: with gradients, partial training, or other dtypes."""
    if module.prog_si >= 0 or any(not isinstance(one, Tensor) or one.dtype != torch.float32 for one in maps):
        return True
    weights = [module.embedding.weight, *module.quant_resi.parameters()]
    if any(weight.dtype != torch.float32 for weight in weights):
        return True
    return torch.is_grad_enabled() and any(one.requires_grad for one in (*weights, *maps))


def f_to_idxBl_or_fhat(self: Any, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Any = None) -> list[Tensor]:
    """VectorQuantizer2.f_to_idxBl_or_fhat: features (B, C, H, W) to every scale's codes, or the sums after each."""
    if _var_unusual(self, f_BChw):
        return _original(self, "f_to_idxBl_or_fhat")(f_BChw, to_fhat, v_patch_nums)
    scales, table, phi = tuple(v_patch_nums or self.v_patch_nums), self.embedding.weight, _var_phi(self)
    metric = "cosine" if self.using_znorm else "l2"
    codes = multiscale_quantize(f_BChw, table, phi, scales, metric=metric)
    return list(multiscale_lookup(codes, table, phi, scales, cumulative=True)) if to_fhat else codes


def idxBl_to_var_input(self: Any, gt_ms_idx_Bl: list[Tensor]) -> Tensor:
    """VectorQuantizer2.idxBl_to_var_input: codes (B, h w) of every scale to what VAR reads, (B, L - h_0 w_0, C)."""
    if _var_unusual(self):
        return _original(self, "idxBl_to_var_input")(gt_ms_idx_Bl)
    return multiscale_inputs(gt_ms_idx_Bl, self.embedding.weight, _var_phi(self), tuple(self.v_patch_nums))


def get_next_autoregressive_input(self: Any, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """VectorQuantizer2.get_next_autoregressive_input: adds scale si to f_hat in place, and averages it down."""
    scales = tuple(self.v_patch_nums)
    if len(scales) != SN or _var_unusual(self, f_hat, h_BChw):
        return _original(self, "get_next_autoregressive_input")(si, SN, f_hat, h_BChw)
    rows = h_BChw.flatten(2).transpose(1, 2)
    total, following = next_scale_input(f_hat, rows, self.embedding.weight, _var_phi(self, si), scales, si)
    f_hat.copy_(total)
    if following is None:
        return f_hat, f_hat
    return f_hat, following.transpose(1, 2).reshape(*f_hat.shape[:2], scales[si + 1], scales[si + 1])


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("code embedding of RQ-VAE and VILA-U", _rq_matches, _rq_why_not, _rq_swap, _rq_undo),
    Adapter("multi-scale quantizer of VAR", _var_matches, _var_why_not, _var_swap),
)
"""Every adapter; the first that matches a module decides."""
