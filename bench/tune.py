"""`python -m bench tune FAMILY`: tries tiles in place of those that the kernels' tables give, and prints the times.

They stay pure functions of shape and capability: nothing is tuned while a program runs. Who changes one (another GPU,
another Triton) sees here what it would gain: the tile in use stands first in every comparison.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench._case import OURS, Case, prepare
from bench._time import Call, measure

__all__ = ["KNOBS", "Knob", "tune"]


@dataclass(frozen=True)
class Knob:
    """A function that chooses a tile, and tiles to try in its place.

    Args:
        module: that has the function.
        function: its name there; whatever its arguments, it returns a tile.
        cases: end of the names of the cases that it decides.
        tiles: fields of the tiles to try, in the order of the tile's class.
        cached: names in the module whose caches hold what depends on the tile.
        backend: whose tiles they are.
    """

    module: str
    function: str
    cases: str
    tiles: tuple[tuple[int, ...], ...]
    cached: tuple[str, ...] = ()
    backend: str = "triton"


_ATTENTION = "unifiedar.kernels.attention"
_LINEAR = "unifiedar.kernels.linear_few"
KNOBS: dict[str, tuple[Knob, ...]] = {
    "codes": (
        Knob(
            "unifiedar.kernels.codes_quantize",
            "search_tile",
            "/quantize",
            # rows, codes, channels, warps, stages, group
            (
                (128, 128, 64, 4, 3, 8),
                (128, 128, 64, 4, 4, 8),
                (128, 128, 64, 8, 3, 8),
                (128, 256, 64, 8, 3, 8),
                (128, 256, 64, 8, 4, 8),
                (128, 256, 64, 8, 4, 16),
                (256, 128, 64, 8, 3, 8),
                (256, 128, 64, 8, 4, 4),
                (128, 128, 32, 4, 4, 8),
                (128, 256, 32, 8, 4, 8),
            ),
            ("plan",),
        ),
        Knob(
            "unifiedar.kernels.codes_quantize",
            "finish_tile",
            "/quantize",
            # codes, channels, registers
            (
                (4, 64, 64),
                (4, 64, 72),
                (4, 64, 80),
                (4, 64, 128),
                (8, 64, 128),
                (8, 32, 96),
                (16, 32, 128),
                (8, 128, 168),
                (16, 64, 168),
                (32, 32, 168),
            ),
            ("plan",),
        ),
    ),
    # rows, outputs, inputs, stages, warps; for few rows, and for many
    "var": (
        Knob(_LINEAR, "tile", "-m2", ((16, 64, 128, 6, 4), (16, 64, 256, 3, 4), (16, 128, 128, 4, 8))),
        Knob(_LINEAR, "tile", "-m32", ((32, 64, 128, 6, 4), (32, 64, 256, 3, 4), (32, 128, 128, 4, 8))),
        Knob(_LINEAR, "tile", "-m128", ((128, 64, 128, 3, 4), (64, 128, 128, 3, 8), (128, 64, 64, 4, 4))),
        Knob(_LINEAR, "tile", "-m512", ((256, 64, 64, 3, 4), (256, 128, 64, 3, 8), (128, 128, 64, 4, 8))),
    ),
    "attention": (
        Knob(
            "unifiedar.ops.attention",
            "_forward_plan",
            "/forward",
            # tile (-1: the one chosen; of heads up to 64, 1: 128 x 144, 3: 64 x 112), heads interleaved, with a counter
            (
                *((-1, group, 1) for group in (4, 8, 16, 32, 64, 128)),
                (-1, 16, 0),
                (-1, 96, 0),
                (1, 16, 1),
                (1, 48, 1),
                (3, 48, 1),
            ),
            backend="cuda",
        ),
        # held, passed, warps, stages
        Knob(
            _ATTENTION,
            "forward_tile",
            "/forward",
            ((128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)),
        ),
        Knob(
            _ATTENTION,
            "query_tile",
            "/backward",
            ((64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        ),
        Knob(
            _ATTENTION,
            "key_tile",
            "/backward",
            ((64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 3)),
        ),
    ),
}


def tune(
    knobs: Sequence[Knob],
    cases: Sequence[Case],
    device: torch.device,
    *,
    budget_s: float = 0.5,
    report: Callable[[str], None] = print,
) -> None:
    """Time a backend with every tile, right results only.

    Args:
        knobs: what to turn, one at a time.
        cases: of the same family; those that a knob does not decide are passed over.
        device: a CUDA device.
        budget_s: seconds of samples a case and knob.
        report: called with a line of text for each tile, the fastest marked.
    """
    for knob in knobs:
        for case in cases:
            served = any(variant.name == f"{OURS} {knob.backend}" for variant in case.variants)
            if served and case.name.endswith(knob.cases):
                _compare(knob, case, device, budget_s, report)


def _compare(knob: Knob, case: Case, device: torch.device, budget_s: float, report: Callable[[str], None]) -> None:
    module = importlib.import_module(knob.module)
    name = f"{OURS} {knob.backend}"
    prepared = prepare(case, device, only=name)
    used = getattr(module, knob.function)
    tiles = {"as it is": used} | {str(tile): _always(used, tile) for tile in knob.tiles}
    variants = {
        label: [_turned(module, knob, tile, call) for call in prepared.calls[name]] for label, tile in tiles.items()
    }
    try:
        timings = measure(variants, device, check=lambda _, output: prepared.check(name, output), budget_s=budget_s)
    finally:
        _turn(module, knob, used)
    times = {label: timing.median_ms for label, timing in timings.items() if timing.median_ms is not None}
    best = min(times.values(), default=None)
    for label, timing in timings.items():
        figure = f"{times[label]:.4f} ms" if label in times else str(timing.error)
        mark = " *" if label in times and times[label] == best else ""
        report(f"{case.name:28} {knob.function:14} {label:32} {figure}{mark}")


def _always(used: Callable[..., Any], fields: tuple[int, ...]) -> Callable[..., Any]:
    """A stand-in for a knob's function that answers one tile, of the class that the function's annotation names."""
    tile = used.__annotations__["return"](*fields)
    return lambda *_: tile


def _turn(module: Any, knob: Knob, function: Callable[..., Any]) -> None:
    setattr(module, knob.function, function)
    for name in knob.cached:
        getattr(module, name).cache_clear()


def _turned(module: Any, knob: Knob, function: Callable[..., Any], call: Call) -> Call:
    def turned() -> object:
        _turn(module, knob, function)
        return call()

    return turned
