"""What the comparisons with published code share: their findings, exact products, and a checkout to import from."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unifiedar.checkpoints import CheckpointError
from unifiedar.ops.codes import _exact_matmul

__all__ = ["Finding", "differing", "exact_products", "farthest", "imported"]


@dataclass(frozen=True)
class Finding:
    """One comparison: what was compared, what came out, how much is allowed."""

    what: str
    found: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether it is within what is allowed; NaN is not."""
        return self.found <= self.allowed

    def __str__(self) -> str:
        return f"{'ok' if self.good else 'WRONG':5}  {self.what}: {self.found:.3g} (allowed {self.allowed:.3g})"


def differing(ours: Tensor, theirs: Tensor) -> int:
    """How many entries differ."""
    return int((ours != theirs).sum())


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products are float32 throughout, on a GPU too."""
    with _exact_matmul("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@contextlib.contextmanager
def imported(
    folder: Path, what: str, names: Sequence[str], tops: Sequence[str], *, bare: Sequence[str] = ()
) -> Iterator[list[Any]]:
    """Modules of a checkout, which go again afterwards; what they print while they are there is dropped.

    Args:
        folder: of the checkout.
        what: the code base, for errors.
        names: the modules wanted.
        tops: first names of all modules that importing them brings along.
        bare: packages that are entered without running their own file, and what it imports.

    Raises:
        CheckpointError: if there is no such module in the folder, or it does not import here.
    """
    path = folder.joinpath(*names[0].split("."))
    if not path.is_dir() and not path.with_suffix(".py").is_file():
        wanted = f"file {path.relative_to(folder)}.py" if "." in names[0] else f"folder {names[0]}"
        raise CheckpointError(f"{folder}: not a checkout of {what}; there is no {wanted} in it")
    ours = {name: one for name, one in sys.modules.items() if name.partition(".")[0] in tops}
    for name in ours:
        del sys.modules[name]
    for name in bare:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                with _lenient_dataclasses():
                    found = [importlib.import_module(name) for name in names]
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{folder}: not a checkout of {what} that runs here: {error}") from error
            yield found
    finally:
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if name.partition(".")[0] in tops:
                del sys.modules[name]
        sys.modules.update(ours)


@contextlib.contextmanager
def _lenient_dataclasses() -> Iterator[None]:
    """Lets a dataclass have another one as a default, which published configurations do and Python 3.11 refuses."""
    strict = dataclasses.dataclass

    def lenient(cls: Any = None, /, **options: Any) -> Any:
        if cls is None:
            return functools.partial(lenient, **options)
        for name in vars(cls).get("__annotations__", {}):
            value = vars(cls).get(name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                setattr(cls, name, dataclasses.field(default_factory=functools.partial(copy.deepcopy, value)))
        return strict(cls, **options)

    dataclasses.dataclass = lenient  # type: ignore[assignment]
    try:
        yield
    finally:
        dataclasses.dataclass = strict
