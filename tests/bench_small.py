"""What the tests of the bench share: figures, results and a case that are quick to make."""

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# At the end: an installed unifiedar goes before the checkout's.
sys.path.append(str(ROOT))

from bench._case import Case, Variant, against  # noqa: E402
from bench._results import CaseResult, Environment  # noqa: E402
from bench._time import Timing  # noqa: E402


def timing(median, *, error=None, memory=None):
    if error:
        return Timing(None, None, None, None, 0, "not timed", error)
    return Timing(median, 0.9 * median, 1.1 * median, memory, 20, "events")


def environment(**changes):
    values = {
        "device": "Test GPU 9000",
        "kind": "cuda",
        "driver": "1.2",
        "python": "3.11.0",
        "torch": "2.14",
        "triton": None,
        "cuda": "13.0",
        "unifiedar": "0.1.0",
        "commit": "abc123",
        "date": "2026-01-02T03:04:05+00:00",
        "copy_bytes_per_s": 3e12,
        "matmul_flops_per_s": None,
    }
    return Environment(**{**values, **changes})


def row(name="model/forward", ours=1.0, peers=(("peer", 2.0),), **changes):
    values = {
        "name": name,
        "shape": {"N": 8, "C": 4},
        "dtype": "bfloat16",
        "bytes": 1000,
        "flops": 10,
        "floor_ms": 0.25,
        "floor": "1000 bytes at the copy rate",
        "sets": 2,
        "backend": "triton",
        "ours": timing(ours) if isinstance(ours, float) else ours,
        "backends": {"unifiedar eager": timing(3.0)},
        "peers": {name: timing(one) if isinstance(one, float) else one for name, one in peers},
    }
    return CaseResult(**{**values, **changes})


def toy_case(**changes):
    def make(seed, device):
        return (torch.full((4,), float(seed + 1), device=device),)

    def slow(inputs):
        return lambda: (time.sleep(0.002), inputs[0] + 1)[1]

    values = {
        "name": "toy/add",
        "shape": {"N": 4},
        "dtype": torch.float32,
        "bytes": 32,
        "flops": 4,
        "make": make,
        "variants": (
            Variant("unifiedar", "ours", lambda inputs: lambda: inputs[0] + 1),
            Variant("unifiedar eager", "backend", lambda inputs: lambda: inputs[0] + 1),
            Variant("slow", "peer", slow),
            Variant("wrong", "peer", lambda inputs: lambda: inputs[0] + 2),
            Variant("absent", "peer", lambda inputs: 1 / 0),
        ),
        "check": lambda inputs: against([inputs[0].double() + 1], [inputs[0] + 1], peer_tolerance=1e-6),
        "backend": lambda inputs: "eager",
    }
    return Case(**{**values, **changes})
