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

__all__ = ["LIBRARY", "capability", "define", "kernels", "library_unfit", "triton_interpreted", "triton_unfit"]

LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
"""Where the build puts the compiled library; it may be absent."""


@functools.cache
def library_unfit() -> str | None:
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
def triton_unfit() -> str | None:
    """None if Triton and the Triton kernels can be imported, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    try:
        importlib.import_module("unifiedar.kernels")
    except ImportError as error:
        return f"needs the Triton kernels, which did not import: {error}"
    return None


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1, read once)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def kernels(family: str) -> ModuleType:
    """The module of Triton kernels of a family, imported at first use."""
    return importlib.import_module(f"unifiedar.kernels.{family}")


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of a CUDA tensor's device as one number: 90 for an H100."""
    return _capability(tensor.get_device())


def define(schema: str) -> Callable[..., Any]:
    """Declares an operator that only the compiled library implements, and returns it.

    Args:
        schema: name, arguments and returns. By convention the name ends in `_cuda`, outputs are mutated arguments that the
            caller allocated, and nothing is returned.

    Returns:
        The operator. Calling it where `library_unfit()` is not None raises NotImplementedError.
    """
    name, rest = schema.split("(", 1)
    torch.library.define(f"unifiedar::{name}", f"({rest}")
    return getattr(torch.ops.unifiedar, name).default
