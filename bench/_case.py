"""What a family hands to the bench, and the one way from there to a row of results.

A family's file (`bench/cases_<family>.py`) defines `cases(device) -> list[Case]`; everything else is here.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench._results import CaseResult, Run, Yardstick, environment
from bench._time import (
    Call,
    Launches,
    Start,
    Timing,
    copy_rate,
    describe_error,
    input_sets,
    matmul_rate,
    measure,
)

__all__ = ["Case", "Check", "Variant", "against", "families", "family_cases", "prepare", "release", "run_family"]

OURS = "unifiedar"

Check = Callable[["Variant", object], float | None]
"""Called with a variant and the output of its first call, on input set 0; raises ValueError if that is wrong.

Returns the share of the output's codes that are not the ones that float64 chooses, None where nothing is chosen.
"""


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case.

    Args:
        name: as it stands in the tables.
        role: "ours" (the public function, backend="auto"; one per case), "backend" (one of our backends, forced),
            "peer", or "yardstick" (which computes something else).
        bind: takes an input set, returns the call to time. What a user would do once (compiling, building a module)
            happens in `bind` or before; what they would do on every call happens in the call.
        flops: operations of a yardstick, where they are not the case's.
    """

    name: str
    role: str
    bind: Callable[[Any], Call]
    flops: int | None = None


@dataclass(frozen=True)
class Case:
    """Work of one shape, with everything that is needed to time it.

    Args:
        name: unique in the family, "<model>/<what>".
        shape: the sizes by their letters.
        dtype: of the floating-point inputs.
        bytes: least memory traffic: each input that is needed read once, each output written once.
        flops: least floating-point operations.
        make: make(seed, device) -> a fresh input set (tensors in tuples, lists or dicts) of random, never zero, values.
        variants: all ways, ours first.
        check: check(input set 0) -> Check; usually `against(oracle, eager, ...)`.
        backend: backend(input set) -> the name of the backend that "auto" chooses.
        on_matrix_units: whether the flops can run at the rate of a matrix product, which then bounds the floor too.
        other: makes a case of the same work and variants with another schedule, for which some have to prepare anew;
            None if there is nothing of the kind.
        rate: what a time in milliseconds means, for the report's lines; None where the time says it all.
        rounds: least and most samples of a variant; few where one takes seconds.
        apart: whether variants, which side by side would not fit into memory, are timed one after another.
        release: lets go of what variants keep beside their calls (models, caches, graphs); called when the case is done
            and, where variants are timed apart, after each of them.
    """

    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[int, torch.device], Any]
    variants: Sequence[Variant]
    check: Callable[[Any], Check]
    backend: Callable[[Any], str]
    on_matrix_units: bool = False
    other: Callable[[], Case] | None = None
    rate: Callable[[float], str] | None = None
    rounds: tuple[int, int] = (20, 200)
    apart: bool = False
    release: Callable[[], object] | None = None


def tensors(inputs: object) -> Iterable[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(inputs, torch.Tensor):
        yield inputs
    elif isinstance(inputs, dict):
        yield from tensors(list(inputs.values()))
    elif isinstance(inputs, tuple | list):
        for one in inputs:
            yield from tensors(one)


def against(oracle: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], *, peer_tolerance: float) -> Check:
    """The check of floating-point outputs.

    Ours must be within twice the error of the eager formula in the same dtype (plus 1e-5), by the largest element; a
    peer must compute the same function: |out - oracle| / |oracle| <= peer_tolerance by norm.

    Args:
        oracle: the outputs in float64.
        eager: the outputs of the eager formula.
        peer_tolerance: relative; 2e-2 suits half precision, 1e-5 float32.
    """
    allowed = [2 * (e.double() - o).abs().max().item() + 1e-5 for e, o in zip(eager, oracle, strict=True)]

    def check(variant: Variant, output: object) -> None:
        outputs = list(tensors(output))
        if [one.shape for one in outputs] != [one.shape for one in oracle]:
            got = [tuple(one.shape) for one in outputs]
            raise ValueError(f"wrong shapes: {got} instead of {[tuple(one.shape) for one in oracle]}")
        for i, (one, right) in enumerate(zip(outputs, oracle, strict=True)):
            difference = one.double() - right
            if variant.role == "peer":
                error, limit = (difference.norm() / right.norm()).item(), peer_tolerance
            else:
                error, limit = difference.abs().max().item(), allowed[i]
            if not error <= limit:  # NaN fails too
                raise ValueError(f"wrong result: output {i} is off by {error:.3g}, allowed {limit:.3g}")

    return check


@dataclass(frozen=True)
class Prepared:
    """A case on a device: input sets, the calls of every variant (one per set), and the check."""

    case: Case
    sets: list[Any]
    calls: dict[str, list[Call]]
    check: Callable[[str, object], float | None]


def prepare(case: Case, device: torch.device | str, only: str | None = None) -> Prepared:
    """Make the input sets of a case and bind its variants (or the one named) to them."""
    device = torch.device(device)
    # Without this, torch.compile falls back to the slow path after eight shapes.
    torch.compiler.reset()
    sets = [case.make(0, device)]
    size = sum(one.nbytes for one in tensors(sets[0]))
    sets += [case.make(seed, device) for seed in range(1, input_sets(size, device))]
    by_name = {one.name: one for one in case.variants if only in (None, one.name)}
    check = case.check(sets[0])
    calls = {name: [_late(one, inputs) for inputs in sets] for name, one in by_name.items()}
    return Prepared(case, sets, calls, lambda name, output: check(by_name[name], output))


def _late(variant: Variant, inputs: Any) -> Call:
    """The variant's call, bound at first use: a peer that cannot be bound then fails as a row, not as a run."""
    bound: list[Call] = []

    def call() -> object:
        if not bound:
            bound.append(variant.bind(inputs))
        return bound[0]()

    return call


def _timed(
    prepared: Prepared, device: torch.device, budget_s: float, count: Callable[[Call], Launches] | None
) -> tuple[dict[str, Timing], dict[str, Launches]]:
    """What was measured of a case's variants, and what those that could be timed launch; their calls are used up."""
    case, timings, watched = prepared.case, {}, {}
    groups = [[name] for name in prepared.calls] if case.apart else [list(prepared.calls)]
    for names in groups:
        calls = {name: prepared.calls.pop(name) for name in names}
        share = budget_s / len(groups)
        found = measure(calls, device, check=prepared.check, budget_s=share, rounds=case.rounds)
        timings.update(found)
        if count is not None:
            watched.update({name: count(calls[name][0]) for name, timing in found.items() if not timing.error})
        calls.clear()
        release(case, device)
    return timings, watched


def release(case: Case, device: torch.device) -> None:
    """Let go of what a case's variants keep, so that what comes next has the memory."""
    if case.release is not None:
        case.release()
    if device.type == "cuda":
        gc.collect()  # graphs and what compiled code keeps lie in circles
        torch.cuda.empty_cache()  # what comes next finds whole blocks


def _said(cost: Start) -> str:
    if cost.cold_ms is None:
        return f"beginning: {cost.error}"
    new = "" if cost.new_ms is None else f"another schedule {cost.new_ms:.1f} ms, "
    return f"beginning: cold {cost.cold_ms:.0f} ms, {new}preparing {cost.prepare_ms:.2f} ms"


def _begin(start: Callable[[str, str], Start], case: Case, at_once: int) -> dict[str, Start]:
    names = [one.name for one in case.variants if one.role != "yardstick"]
    at_once = min(at_once, len(names))
    if at_once == 1:
        return {name: start(case.name, name) for name in names}
    with ThreadPoolExecutor(at_once) as pool:
        found = pool.map(lambda name: replace(start(case.name, name), at_once=at_once), names)
        return dict(zip(names, found, strict=True))


def _told(count: Launches) -> str:
    if count.kernels is None:
        return f"on the GPU: {count.error}"
    return f"on the GPU: {count.launches} launches, {count.kernels} kernels, busy for {count.busy_ms:.3f} ms"


def _floor(case: Case, copy: float, matmul: float | None) -> tuple[float, str]:
    by_bytes = case.bytes / copy * 1e3
    how = f"{case.bytes} bytes at the copy rate of this run, {copy / 1e9:.0f} GB/s"
    if not case.on_matrix_units or matmul is None:
        return by_bytes, how
    by_flops = case.flops / matmul * 1e3
    if by_flops <= by_bytes:
        return by_bytes, how
    return by_flops, f"{case.flops} FLOP at the matrix product rate of this run, {matmul / 1e12:.1f} TFLOP/s"


def run_family(
    family: str,
    cases: Sequence[Case],
    device: torch.device | str,
    *,
    commit: str | None = None,
    budget_s: float = 1.0,
    start: Callable[[str, str], Start] | None = None,
    starts_at_once: int = 1,
    count: Callable[[Call], Launches] | None = None,
    report: Callable[[str], None] = lambda line: None,
    keep: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Measure cases of one family.

    Args:
        family: its word.
        cases: what to measure.
        device: where.
        commit: of the sources (see `bench._results.environment`).
        budget_s: seconds of samples per case.
        start: takes the names of a case and a variant and measures what beginning costs; None leaves that out.
        starts_at_once: how many of a case's variants do so side by side.
        count: takes a call of every variant that was timed and counts what it launches; None leaves that out.
        report: called with a line of text per variant as results come in.
        keep: called after each case with all that was measured so far, so that a run that is killed leaves it.

    An interrupt (Ctrl-C) ends the run at the case before. A case that cannot be prepared is a row with its error.
    """
    device = torch.device(device)
    on_matrix_units = any(case.on_matrix_units for case in cases)

    def ceilings() -> tuple[float, float]:
        return copy_rate(device), matmul_rate(device) if on_matrix_units else 0.0

    def so_far(copy: float, best_matmul: float) -> Run:
        matmul = best_matmul or None
        floors = (_floor(case, copy, matmul) for case in cases)
        done = [replace(row, floor_ms=ms, floor=how) for row, (ms, how) in zip(rows, floors, strict=False)]
        where = environment(device, copy_bytes_per_s=copy, matmul_flops_per_s=matmul, commit=commit)
        return Run(family, where, done)

    before = ceilings()
    rows: list[CaseResult] = []
    for case in cases:
        try:
            prepared = prepare(case, device)
            timings, watched = _timed(prepared, device, budget_s, count)
        except KeyboardInterrupt:
            if not rows:
                raise
            report(f"interrupted at {case.name}; what was measured before is kept")
            break
        except Exception as error:  # of the inputs or the check; the cases behind it are measured all the same
            prepared = Prepared(case, [], {}, lambda name, output: None)
            ours = next(one.name for one in case.variants if one.role == "ours")
            timings = {ours: Timing(None, None, None, None, 0, "not timed", describe_error(error))}
            watched = {}
            release(case, device)
        roles = {one.name: one.role for one in case.variants}
        for name, timing in timings.items():
            figure = f"{timing.median_ms:.4f} ms" if timing.median_ms is not None else timing.error
            if case.rate is not None and timing.median_ms is not None:
                figure = f"{figure}, {case.rate(timing.median_ms)}"
            report(f"{case.name:32} {name:28} {figure}  ({timing.method})")
        row = CaseResult(
            name=case.name,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            bytes=case.bytes,
            flops=case.flops,
            floor_ms=0.0,  # known at the end
            floor="",
            sets=len(prepared.sets),
            backend=case.backend(prepared.sets[0]) if prepared.sets else None,
            ours=next(timing for name, timing in timings.items() if roles[name] == "ours"),
            backends={name: timing for name, timing in timings.items() if roles[name] == "backend"},
            peers={name: timing for name, timing in timings.items() if roles[name] == "peer"},
            yardsticks={
                one.name: Yardstick(timings[one.name], case.flops if one.flops is None else one.flops)
                for one in case.variants
                if one.role == "yardstick" and one.name in timings
            },
        )
        if count is not None:
            row = replace(row, launches=watched)
            for name, one in watched.items():
                report(f"{case.name:32} {name:28} {_told(one)}")
        del prepared
        if start is not None:
            begun = _begin(start, case, starts_at_once)
            row = replace(row, starts=begun)
            for name, cost in begun.items():
                report(f"{case.name:32} {name:28} {_said(cost)}")
        rows.append(row)
        keep(so_far(*before))
    # A roof is the best seen: one measured once is low when something else is going on, and no work can be above it.
    return so_far(*map(max, before, ceilings()))


def families() -> list[str]:
    """The families that have a `bench/cases_<family>.py`, by name."""
    folder = str(Path(__file__).resolve().parent)
    found = (module.name for module in pkgutil.iter_modules([folder]))
    return sorted(name.removeprefix("cases_") for name in found if name.startswith("cases_"))


def family_cases(family: str, device: torch.device | str) -> list[Case]:
    """The cases of a family at the sizes meant for a device (small ones on the CPU)."""
    return importlib.import_module(f"bench.cases_{family}").cases(torch.device(device))
