"""The cases as pytest-benchmark tests, timed by `bench._time`.

pytest-benchmark subtracts two readings of a clock around the function it runs. Here the function takes one sample (GPU
time by events or a graph, wall time on the CPU) and moves `CLOCK` by what it took per call, so that the table holds
the same figures as `python -m bench`: GPU time on a GPU, never the time of launching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench._case import family_cases, prepare, release
from bench._time import extra_memory, sampler

__all__ = ["CLOCK", "family", "run"]

ROUNDS = 20


class Clock:
    """A clock that stands still until it is told how much time passed; calling it reads it, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def family(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates `test_<family>(case, variant, benchmark)`: one test per case and variant, on a GPU if there is one."""
    parameters = [
        pytest.param(case, variant.name, id=f"{case.name}-{variant.name}")
        for case in family_cases(name, _device())
        for variant in case.variants
    ]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return pytest.mark.benchmark(timer=CLOCK)(pytest.mark.parametrize(("case", "variant"), parameters)(test))

    return decorate


def run(case: Any, variant: str, benchmark: Any) -> None:
    """Check one variant of a case, then time it under pytest-benchmark.

    A peer that fails is skipped with its error; ours failing fails the test.
    """
    release(case, _device())  # what the variant before has kept
    prepared = prepare(case, _device(), only=variant)
    role = next(one.role for one in case.variants if one.name == variant)
    calls = prepared.calls[variant]
    try:
        differ = prepared.check(variant, calls[0]())
        for call in calls:
            call()
    except Exception as error:
        if role == "ours":
            raise
        pytest.skip(f"{variant}: {type(error).__name__}: {error}")
    memory, samples = extra_memory(calls[0], _device()), sampler(calls, _device())

    def one_sample() -> None:
        CLOCK.now += samples.sample()

    benchmark.group = case.name
    benchmark.extra_info.update(shape=case.shape, dtype=str(case.dtype), method=samples.method, bytes=case.bytes)
    benchmark.extra_info.update(extra_memory_bytes=memory, differ=differ)
    benchmark.pedantic(one_sample, rounds=ROUNDS, warmup_rounds=2, iterations=1)
