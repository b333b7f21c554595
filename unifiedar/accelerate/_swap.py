"""What an adapter is, what it puts on a module, and the helpers that adapters share.

A swap lives on the instance: methods in its `__dict__` that hide those of its class, and one record of them. Copies
made with `copy.deepcopy` stay swapped; a module that went through pickle has to be accelerated again.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unifiedar.ops.codes import _exact_matmul

__all__ = [
    "FLOATS",
    "Adapter",
    "Swap",
    "Twin",
    "Twins",
    "class_of",
    "facts",
    "hooked",
    "is_ours",
    "original",
    "overridden",
    "pack",
    "packed",
    "put",
    "record",
    "rehearse",
    "side_by_side",
    "take_off",
    "unpack",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What our ops take."""

_RECORD = "_unifiedar_swap"


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
        facts: what the methods need to know of the module, found out once (see `facts`).
    """

    text: str
    methods: Mapping[str, Callable[..., Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)


# ---- on the module ---------------------------------------------------------------------------------------------------


def put(module: nn.Module, adapter: str, swap: Swap) -> None:
    """Put a swap on a module that has none."""
    for name, function in swap.methods.items():
        function.__name__ = name  # by which pickle asks the module for its method
        module.__dict__[name] = types.MethodType(function, module)
    # Plain data: deepcopy and pickle can carry it, and a pickle can be read where this package is not installed.
    module.__dict__[_RECORD] = {
        "adapter": adapter,
        "text": swap.text,
        "methods": tuple(swap.methods),
        "facts": dict(swap.facts),
    }


def record(module: nn.Module) -> dict[str, Any] | None:
    """The record of the swap on a module, or None; it is still in force if `record(module)["methods"]` all are ours."""
    return module.__dict__.get(_RECORD)


def is_ours(module: nn.Module, name: str) -> bool:
    """Whether a method of a module is one that `put` put there."""
    method = module.__dict__.get(name)
    return isinstance(method, types.MethodType) and method.__func__.__module__.partition(".")[0] == "unifiedar"


def take_off(module: nn.Module) -> str:
    """Take the swap off a module; returns the name of the adapter that made it."""
    taken = module.__dict__.pop(_RECORD)
    for name in taken["methods"]:
        # Pickle leaves the class's own method in our place; any other patch on top of ours is its author's to undo.
        method = module.__dict__.get(name)
        if is_ours(module, name) or getattr(method, "__func__", None) is getattr(type(module), name):
            del module.__dict__[name]
    return taken["adapter"]


def facts(module: nn.Module) -> dict[str, Any]:
    """What the swap on a module found out about it."""
    return module.__dict__[_RECORD]["facts"]


def original(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method of the module's class that ours hides."""
    return types.MethodType(getattr(type(module), name), module)


# ---- tables side by side ---------------------------------------------------------------------------------------------


def packed(tables: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie one behind the other in one storage."""
    first = tables[0]
    step = first.numel() * first.element_size()
    end = first.data_ptr() + len(tables) * step
    storage = first.untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes() and all(
        table.data_ptr() == first.data_ptr() + d * step and table.is_contiguous() for d, table in enumerate(tables)
    )


def pack(tables: Sequence[Tensor]) -> None:
    """Move parameters or buffers of one shape into one storage, one behind the other, with the same values.

    They stay the same tensors. Takes their memory once more while it runs and nothing afterwards.
    """
    first = tables[0]
    if all(table.data_ptr() == first.data_ptr() for table in tables):
        return  # one memory already, and so it must stay
    # A tensor made in inference mode cannot take one made outside, nor the other way round.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        storage = torch.empty((len(tables), *first.shape), dtype=first.dtype, device=first.device)
        for place, table in zip(storage, tables, strict=True):
            place.copy_(table)
            table.data = place


def unpack(tables: Sequence[Tensor]) -> None:
    """Give tensors that `pack` moved memory of their own again."""
    if packed(tables):
        with torch.inference_mode(tables[0].is_inference()):
            for table in tables:
                table.data = table.data.clone()


def side_by_side(tables: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, (D, ...), without a copy: packed first if need be; one (...) if they are one memory.

    `.to()`, `.half()` and the like give each tensor memory of its own, so this is asked for on every call. Under
    torch.compile, which knows no addresses, it is a copy.
    """
    if torch.compiler.is_compiling():
        return torch.stack([table.detach() for table in tables])
    first = tables[0]
    if all(table.data_ptr() == first.data_ptr() for table in tables):
        return first.detach()
    if not packed(tables):
        pack(tables)
    return first.detach().as_strided((len(tables), *first.shape), (first.numel(), *first.stride()))


# ---- models of ours with a module's weights --------------------------------------------------------------------------


def _share(model: nn.Module, module: nn.Module) -> None:
    """Give a model of ours, made on the meta device, the parameters and buffers that a module has under its keys."""
    theirs = module.state_dict(keep_vars=True)
    if len(theirs) != len(model.state_dict()):
        raise LookupError("the module has other keys")
    wanted = {id(one): theirs[key] for key, one in model.state_dict(keep_vars=True).items()}
    for part in model.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: wanted[id(one)] for name, one in held.items() if one is not None})


class Twin:
    """A model of ours with the tensors of a module and, when asked for, a copy with those of the products cast.

    Args:
        module: whose tensors they are; it is not kept.
        blank: makes the model on the meta device, with the module's keys.
    """

    def __init__(self, module: nn.Module, blank: Callable[[], Any]):
        self.sources = _tensors(module)
        self.model = blank()
        _share(self.model, module)
        self.cast: Any = None
        self._blank = blank
        self._cast_of: Any = None

    def fits(self, module: nn.Module) -> bool:
        """Whether it still has the module's own tensors; `.to` keeps parameters, but not buffers."""
        now = _tensors(module)
        return len(now) == len(self.sources) and all(a is b for a, b in zip(now, self.sources, strict=True))

    def in_dtype(self, dtype: torch.dtype) -> Any:
        """The model whose products are of a dtype: itself, or the copy, which `cast_products` of the model makes."""
        if dtype == self.model.dtype:
            return self.model
        now = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in self.sources]
        if self.cast is None or (dtype, now) != self._cast_of:
            self.cast = None  # one copy at a time
            made = self._blank()
            for mine, theirs in zip(made.modules(), self.model.modules(), strict=True):
                for name, one in theirs._parameters.items():
                    # A parameter of its own, for a cast changes parameters in place.
                    mine._parameters[name] = None if one is None else nn.Parameter(one.detach(), False)
                mine._buffers.update(theirs._buffers)
            self.cast, self._cast_of = made.cast_products(dtype).eval(), (dtype, now)
        return self.cast


class Twins(weakref.WeakKeyDictionary):
    """The twins of modules, each as long as its module lives; `make` is told the module."""

    def __init__(self, make: Callable[[Any], Twin]):
        super().__init__()
        self._make = make

    def of(self, module: nn.Module) -> Twin | None:
        """The twin of a module, made anew where tensors of the module were replaced; None if ours has no such parts."""
        found = self.get(module)
        if found is None or not found.fits(module):
            self.pop(module, None)
            try:
                found = self[module] = self._make(module)
            except (AttributeError, LookupError, TypeError, ValueError):  # of what it was when it was swapped, no more
                return None
        return found


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module and all in it. `modules()` takes four times as long, and this is asked at every call."""
    parts = [module]
    for part in parts:
        parts += [one for one in part._modules.values() if one is not None]
    return parts


def _tensors(module: nn.Module) -> list[Tensor]:
    held = [one for part in _parts(module) for kind in (part._parameters, part._buffers) for one in kind.values()]
    return [one for one in held if one is not None]


def hooked(module: nn.Module) -> bool:
    """Whether parts of a module have hooks, which ours would not call."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in _parts(module)[1:]
    )


# ---- what an adapter asks of a module --------------------------------------------------------------------------------


def class_of(module: nn.Module, name: str) -> type | None:
    """The class of this name that a module is an instance of."""
    return next((base for base in type(module).__mro__ if base.__name__ == name), None)


def overridden(module: nn.Module, published: type, names: Sequence[str]) -> str | None:
    """Why methods of a module are not those of the published class, or None if they are."""
    for name in names:
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
        for base in type(module).__mro__[: type(module).__mro__.index(published)]:
            if name in vars(base):
                return f"{base.__name__} overrides {name}"
    return None


def rehearse(
    module: nn.Module,
    swap: Callable[[Any], Swap],
    substitutes: Mapping[Tensor, Tensor],
    prepare: Callable[[Any], None],
    play: Callable[[Any, bool], Iterator[tuple[str, Any]]],
    *,
    shared: Sequence[Any] = (),
) -> str | None:
    """Run the published methods on one copy of a module and ours on another: None if they agree, else where not.

    Copies are float32; results must agree to its rounding. Where a near tie of two codes falls the other way, all
    that follows differs, so that three draws are tried.

    Args:
        module: it is left as it is, and so are the random generators.
        swap: as an adapter's.
        substitutes: small tensors that the copies have instead of large ones.
        prepare: gives a copy state worth testing; runs with the same random numbers on both copies.
        play: yields what each step is and what came out of it: tensors, in tuples and lists if there are several. Is
            told whether training steps may be played: not where a process group would wait for the other ranks.
        shared: what the module refers to and the copies have too, uncopied.
    """
    # Inference tensors can be neither trained nor copied into trained ones.
    with torch.inference_mode(False), torch.enable_grad():
        tensors = [*module.parameters(), *module.buffers()]
        devices = sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        reason = None
        memo = {id(one): one for one in shared}
        for attempt in range(3):
            results: list[list[tuple[str, list[Tensor]]]] = []
            # The copies are told apart by what they compute, not by how the process rounds float32 products.
            exact = _exact_matmul("cuda" if devices else "cpu")
            with torch.random.fork_rng(devices), exact:
                for swapped in (False, True):
                    try:
                        twin = copy.deepcopy(
                            module, memo | {id(one): _as(one, small) for one, small in substitutes.items()}
                        )
                        twin.float()
                        torch.manual_seed(attempt)
                        prepare(twin)
                        if swapped:
                            put(twin, "rehearsal", swap(twin))
                        results.append([(name, list(_flat(value))) for name, value in play(twin, alone)])
                    except Exception as error:  # foreign code may fail in any way; the report says how
                        return f"it fails when tried on a copy: {type(error).__name__}: {' '.join(str(error).split())}"
                    results[-1] += [(f"its {name} afterwards", [value]) for name, value in _state(twin)]
                    where = devices[0] if devices else "cpu"
                    results[-1].append(("its use of random numbers", [torch.rand((), device=where)]))
            reason = _difference(*results)
            if reason is None:
                return None
        return reason


def _as(tensor: Tensor, small: Tensor) -> Tensor:
    """A copy of `small`, a parameter if `tensor` is one."""
    small = small.detach().clone()
    return nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value.detach().clone()) for name, value in module.state_dict().items()]


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach().clone()
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _flat(one)


def _difference(published: list[tuple[str, list[Tensor]]], ours: list[tuple[str, list[Tensor]]]) -> str | None:
    """The first step at which two plays differ, in one sentence."""
    for (name, wanted), (_, got) in zip(published, ours, strict=True):
        same = len(wanted) == len(got) and all(map(_close, wanted, got))
        if not same:
            return f"{name} differs from what we compute"
    return None


def _close(wanted: Tensor, got: Tensor) -> bool:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    scale = float(wanted.abs().amax()) if wanted.numel() else 0.0
    return torch.allclose(wanted, got, rtol=0, atol=1e-4 * scale + 1e-6)
