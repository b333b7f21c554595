"""Fails unless the wheel's CUDA library opens beside a CPU-only torch, and info calls no GPU backend usable."""

import json
import subprocess
from pathlib import Path

import torch

import unifiedar
from unifiedar.ops import _native

assert torch.version.cuda is None, torch.__version__
assert Path(unifiedar.__file__).parent.parent.name == "site-packages", unifiedar.__file__
assert _native.LIBRARY.is_file(), _native.LIBRARY
torch.ops.load_library(_native.LIBRARY)

facts = json.loads(subprocess.run(["unifiedar", "info", "--json"], check=True, capture_output=True, text=True).stdout)
for name, backends in facts["ops"].items():
    assert backends.pop("eager") is None, name
    assert all(backends.values()), f"{name}: a GPU backend claims to be usable: {backends}"
print(f"loads beside torch {torch.__version__}")
