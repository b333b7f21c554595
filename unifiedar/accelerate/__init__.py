"""Drop-in acceleration of reference models: `accelerate(module)` swaps slow parts in place, `restore` undoes it.

What can be swapped is one table, `ADAPTERS`. An adapter knows one class of a published code base by its name, the
module it is defined in and the attributes it needs; the code base itself is never imported. Weights are shared, never
copied (but VAR's and RQ-Transformer's under autocast, once); state_dict, parameters and their names stay as they are.
Before a module is swapped its own methods are run and compared with ours, on its own weights or on a copy: what answers
differently is left alone, with the reason in the report.

One file a code base: `_rqvae` (RQ-VAE, VILA-U), `_rqtransformer`, `_vilau` (VILA-U's depth head), `_infinity`,
`_vector_quantize_pytorch`, `_var` and `_var_model` (VAR's tokenizer and its transformer). `_depth` is for what the two
depth transformers have in common, `_attention` for the self-attention of Infinity and VAR, `_swap` for what all share.
`flash_attn_func` is no adapter but a function that Infinity looks for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unifiedar.accelerate import (
    _attention,
    _infinity,
    _rqtransformer,
    _rqvae,
    _swap,
    _var,
    _var_model,
    _vector_quantize_pytorch,
    _vilau,
)
from unifiedar.accelerate._flash_attention import flash_attn_func
from unifiedar.accelerate._swap import Adapter, Swap

__all__ = ["ADAPTERS", "Adapter", "Entry", "Report", "Swap", "accelerate", "flash_attn_func", "restore"]

ADAPTERS: tuple[Adapter, ...] = (
    *_rqvae.ADAPTERS,
    *_rqtransformer.ADAPTERS,
    *_vilau.ADAPTERS,
    *_vector_quantize_pytorch.ADAPTERS,
    *_infinity.ADAPTERS,
    *_var.ADAPTERS,
    *_var_model.ADAPTERS,
    *_attention.ADAPTERS,
)
"""Every adapter; the first that matches a module decides."""


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
    twice its own rounding error. Codes are the nearest to float32's residual; a reference that searches or subtracts in
    half precision, as under autocast, may round to others. What is drawn is what the reference draws from the same
    state of the random generator, but for near ties. Calling it again swaps only what is new.

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
        if _swap.record(part) is not None:
            _clear(part)
            restored.append(path)
    return restored


def _require_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module must be a torch.nn.Module, got {type(module).__name__}")


def _apply(adapter: Adapter, module: nn.Module) -> tuple[str, str]:
    """Swap one module; returns the status and the text of its report entry."""
    record = _swap.record(module)
    if record is not None:
        if all(_swap.is_ours(module, name) for name in record["methods"]):
            return "already", record["text"]
        _clear(module)
    reason = adapter.why_not(module)
    if reason is not None:
        return "refused", reason
    swap = adapter.swap(module)
    _swap.put(module, adapter.name, swap)
    return "swapped", swap.text


def _clear(module: nn.Module) -> None:
    """Take a swap off a module."""
    name = _swap.take_off(module)
    for adapter in ADAPTERS:
        if adapter.name == name:
            adapter.undo(module)
