"""What this process can run: the compiled library, Triton, and the device's compute capability.

Nothing here raises for a missing piece; each function says in one sentence what is missing, for a backend's `unfit`
and for `unifiedar info`.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = [
    "LIBRARY",
    "capability",
    "cuda_unfit",
    "define",
    "integers_on",
    "kernels",
    "library_missing",
    "triton_layer_unfit",
    "triton_missing",
    "triton_unfit",
]

LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
"""Where the build puts the compiled library; it may be absent."""


@functools.cache
def library_missing() -> str | None:
    """Loads the compiled library once; None if it is there and loaded, else why it is not."""
    if not LIBRARY.is_file():
        return "needs the compiled library, which this installation was built without"
    if torch.version.cuda is None:
        return "needs a torch built with CUDA"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"needs the compiled library, which did not load: {error}"
    return None


@functools.cache
def triton_missing() -> str | None:
    """None if Triton and the Triton kernels can be imported, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    try:
        importlib.import_module("unifiedar.kernels")
    except ImportError as error:
        return f"needs the Triton kernels, which did not import: {error}"
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether Triton interprets its kernels. It looks when a kernel is defined, so looking once will do."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def cuda_unfit(tensor: torch.Tensor) -> str | None:
    """None if compiled kernels can run on the tensor's device, else why not."""
    if not tensor.is_cuda:
        return f"needs CUDA tensors, got {tensor.device.type}"
    return library_missing() or _too_old(tensor)


def triton_unfit(tensor: torch.Tensor) -> str | None:
    """None if Triton kernels can run on the tensor's device and dtype, else why not."""
    reason = triton_missing()
    if reason is not None:
        return reason
    if tensor.is_cuda:
        return _too_old(tensor)
    if tensor.device.type != "cpu" or not _interpreted():
        return f"needs CUDA tensors (or TRITON_INTERPRET=1 and CPU tensors), got {tensor.device.type}"
    if tensor.dtype == torch.bfloat16:
        return "needs another dtype on the CPU: Triton's interpreter computes wrongly in bfloat16"
    return None


@functools.cache
def kernels(family: str) -> ModuleType:
    """The module of Triton kernels of a family, imported at first use."""
    return importlib.import_module(f"unifiedar.kernels.{family}")


def triton_layer_unfit(x: torch.Tensor, weight: torch.Tensor, family: str) -> str | None:
    """None if Triton kernels of a family take half-precision x (..., K) and weights (N, K), else why not."""
    reason = triton_unfit(x)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
    pack = kernels(family).PACK
    if weight.shape[1] % pack or not weight.shape[1]:
        return f"needs K a multiple of {pack}, got {weight.shape[1]}"
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return f"needs contiguous weights aligned to 16 bytes, got strides {tuple(weight.stride())}"
    return None


_kept_integers: dict[tuple[torch.device, tuple[int, ...]], torch.Tensor] = {}


def integers_on(device: torch.device, values: tuple[int, ...]) -> torch.Tensor:
    """A few integers as an int32 tensor on a device, copied there once and kept."""
    found = _kept_integers.get((device, values))
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A copy from the host cannot be captured, and what is made in a graph's memory must not be kept. Who runs
            # what it captures once before finds the integers of that run.
            return torch.cat([torch.full((1,), value, dtype=torch.int32, device=device) for value in values])
        # The copy is over when this returns, so the tensor serves every stream; nothing evicts it from under a kernel.
        found = _kept_integers[device, values] = torch.tensor(values, dtype=torch.int32, device=device)
    return found


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of a CUDA tensor's device, 90 for 9.0; of CPU tensors, which are interpreted, 80."""
    return _capability(tensor.get_device()) if tensor.is_cuda else 80


def _too_old(tensor: torch.Tensor) -> str | None:
    found = _capability(tensor.get_device())
    return None if found >= 80 else f"needs compute capability 8.0, got {found / 10}"


def define(schema: str) -> Callable[..., Any]:
    """Declares an operator that only the compiled library implements, and returns it.

    Args:
        schema: name, arguments and returns. By convention the name ends in `_cuda`, outputs are mutated arguments that
            the caller allocated, and nothing is returned.

    Returns:
        The operator. Calling it where `library_missing()` is not None raises NotImplementedError.
    """
    name, rest = schema.split("(", 1)
    torch.library.define(f"unifiedar::{name}", f"({rest}")
    return getattr(torch.ops.unifiedar, name).default
