"""What beginning costs: the first call in a fresh process, the first with another schedule, and preparing anew.

Each variant of a case begins in a process of its own, with caches of compiled kernels that are empty. The clock is the
wall's, and it starts when torch and the case are imported, the device is awake and the inputs are there.

    cold_ms     binding and the first call: what is loaded, compiled and tuned for it
    new_ms      the same afterwards for `Case.other`, the same work with another schedule; None if the case has none
    prepare_ms  binding once more, everything warm: masks are made there, for those that need them
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from bench._case import Case, family_cases
from bench._results import ROOT
from bench._time import Start, describe_error

__all__ = ["begin", "fresh"]

TIMEOUT_S = 300.0
REPEATS = 5
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


def fresh(family: str, case: str, variant: str, device: torch.device | str, *, timeout_s: float = TIMEOUT_S) -> Start:
    """Measure in a new process, by the names of a family, a case and a variant; what goes wrong there is in `error`."""
    with tempfile.TemporaryDirectory(prefix="unifiedar-bench-") as folder:
        caches = {name: os.path.join(folder, name.lower()) for name in _CACHES}
        try:
            found = subprocess.run(
                [sys.executable, "-m", "bench._start", family, case, variant, str(device)],
                cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Start(None, None, None, f"took more than {timeout_s:g} s")
    lines = found.stdout.strip().splitlines()
    if found.returncode or not lines:
        said = found.stderr.strip().splitlines()
        return Start(None, None, None, f"ended with {found.returncode}: {said[-1][:300] if said else 'no word'}")
    return Start(**json.loads(lines[-1]))


def begin(case: Case, variant: str, device: torch.device | str) -> Start:
    """Measure in this process, which is fresh if it has done nothing else."""
    device = torch.device(device)

    def seconds(work: Callable[[], object]) -> float:
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - begun

    def first_call(of: Case, inputs: object) -> float:
        bind = _named(of, variant)
        return 1e3 * seconds(lambda: bind(inputs)())

    try:
        bind, inputs = _named(case, variant), case.make(0, device)
        cold = first_call(case, inputs)
        new = None
        if case.other is not None:
            other = case.other()
            new = first_call(other, other.make(1, device))
        prepare = 1e3 * sorted(seconds(lambda: bind(inputs)) for _ in range(REPEATS))[REPEATS // 2]
    except Exception as error:  # a peer may fail in any way, and its row says how
        return Start(None, None, None, describe_error(error))
    return Start(cold, new, prepare)


def _named(case: Case, variant: str) -> Callable[[object], Callable[[], object]]:
    for one in case.variants:
        if one.name == variant:
            return one.bind
    raise ValueError(f"begin: variant must be one of {[one.name for one in case.variants]}, got {variant!r}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _main(arguments: Sequence[str]) -> int:
    family, name, variant, device = arguments
    case = next(one for one in family_cases(family, device) if one.name == name)
    print(json.dumps(asdict(begin(case, variant, device))))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
