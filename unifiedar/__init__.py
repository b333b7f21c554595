"""Kernels for visual autoregression and the models built on them.

`unifiedar.ops` holds the operators, `unifiedar.nn` the modules, `unifiedar.models` the published systems;
`unifiedar.accelerate` swaps the slow parts of a reference model for ours and `unifiedar.restore` undoes it.
Importing this package is cheap: everything below is imported at first use, torch included.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unifiedar import models, nn, ops
    from unifiedar.accelerate import accelerate, restore

__all__ = ["__version__", "accelerate", "models", "nn", "ops", "restore"]
__version__ = "0.1.0"

_SUBMODULES = ("models", "nn", "ops")
_FOLDER = Path(__file__).resolve().parent

# The Triton kernels live beside this package in a checkout and inside it once installed (as `unifiedar.kernels`).
# This makes that one name work in a checkout that nobody installed.
if not (_FOLDER / "kernels").is_dir() and (_FOLDER.parent / "CMakeLists.txt").is_file():
    __path__.append(str(_FOLDER.parent))


class _Package(types.ModuleType):
    """This package's module type: `accelerate` is the function although a submodule has the same name.

    Importing `unifiedar.accelerate` makes Python bind the submodule to that name here; the empty setter keeps the
    function.
    """

    @property
    def accelerate(self):
        return importlib.import_module("unifiedar.accelerate").accelerate

    @accelerate.setter
    def accelerate(self, _module):
        pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "restore":
        return importlib.import_module(f"{__name__}.accelerate").restore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
