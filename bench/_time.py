"""The one timer of this package: GPU time by CUDA events, wall time on the CPU, one interface for both.

Every variant of a comparison comes as a list of zero-argument calls, one per input set, that all do the same work.

- Cold L2: successive calls walk through the input sets, and a buffer larger than the L2 cache is written before
  each sample (which also gives the host a head start, so that launch latency stays out of the sample).
- Under five milliseconds between two events, host included: if the fastest variant takes less, every variant of the
  comparison is captured into a CUDA graph of repeated calls, so that none of them is charged for the host. A variant
  that cannot be captured is timed as a loop between two events, and its `method` says so. The graphs of a comparison
  share their memory, which none of them leaves anything in.
- Interleaved: one sample of each variant per round, the order turning with the round, so that clocks and
  temperature drift alike for all. Where variants would not fit into memory side by side (`Case.apart`: calls of tens
  of milliseconds and more, whose models, caches and graphs take gigabytes) they are timed one after another instead,
  each with its own warm-up, and what one holds is released before the next is bound.
- Nothing is timed before it was checked: the caller's `check` sees the output of each variant first. A variant that
  raises, then or later, is kept as a row with its error; it never stops the others.
"""

from __future__ import annotations

import abc
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Call",
    "Launches",
    "Sampler",
    "Start",
    "Timing",
    "captured",
    "copy_rate",
    "extra_memory",
    "input_sets",
    "matmul_rate",
    "measure",
    "sampler",
]

Call = Callable[[], object]

GRAPH_BELOW_S = 5e-3
"""Calls faster than this are captured into a CUDA graph on a GPU: fifty operators take the host about this long where
the GPU is done in a tenth of it."""
LOOP_BELOW_S = 1e-3
"""Calls faster than this are repeated within a sample on the CPU, by a loop."""
SAMPLE_S = 1e-3
"""How long a sample of repeated calls should last, in seconds."""
MAX_REPEATS = 256
SLOW_S = 0.1
"""Of calls that take longer, one tells enough to choose how to sample, or to warm up."""
WARM_UP_S = 0.2
CPU_CACHE_BYTES = 64 << 20
"""The last-level cache that rotation has to outgrow on a CPU (a guess that is large enough for most)."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one variant.

    Attributes:
        median_ms, p10_ms, p90_ms: milliseconds per call over all samples; None if the variant failed.
        extra_memory_bytes: peak device memory during one call, less what was allocated before it and less what it
            returned; None on the CPU, where it is not measured.
        samples: number of samples behind the percentiles.
        method: how a sample was taken ("graph of 40 calls", "events", "wall, 8 calls", ...).
        error: None, or the error that kept the variant from being timed.
        differ: share of its codes, 0 to 1, that are not the ones that float64 chooses; None where nothing is chosen.
    """

    median_ms: float | None
    p10_ms: float | None
    p90_ms: float | None
    extra_memory_bytes: int | None
    samples: int
    method: str
    error: str | None = None
    differ: float | None = None


@dataclass(frozen=True)
class Start:
    """What beginning costs a variant, in milliseconds of wall time; `bench._start` says when the clock runs.

    Attributes:
        cold_ms: the first call in a fresh process; None if the variant failed.
        new_ms: the first call with another schedule; None too if the case has no other.
        prepare_ms: what is done once a schedule, warm.
        error: None, or why there is no time.
        at_once: how many processes began side by side, this one included.
    """

    cold_ms: float | None
    new_ms: float | None
    prepare_ms: float | None
    error: str | None = None
    at_once: int = 1


@dataclass(frozen=True)
class Launches:
    """What a call launches (see `bench._launches`).

    Attributes:
        launches: calls of the host that start something on the GPU; None if the variant could not be watched.
        kernels: what ran there.
        busy_ms: milliseconds during which something ran.
        error: None, or why there is no count.
    """

    launches: int | None
    kernels: int | None
    busy_ms: float | None
    error: str | None = None


class Sampler(abc.ABC):
    """Takes one sample after another of one variant.

    `launch` starts a sample and `collect` returns the seconds per call of all samples started since the last
    `collect`; `sample` does both.
    """

    method = ""

    def __init__(self, calls: Sequence[Call], repeats: int) -> None:
        self.calls = list(calls)
        self.repeats = repeats
        self._next = 0

    def _turn(self) -> Call:
        call = self.calls[self._next % len(self.calls)]
        self._next += 1
        return call

    @abc.abstractmethod
    def launch(self) -> None: ...

    @abc.abstractmethod
    def collect(self) -> list[float]: ...

    def sample(self) -> float:
        """Seconds per call of one fresh sample."""
        self.launch()
        return self.collect()[-1]


class _Wall(Sampler):
    def __init__(self, calls: Sequence[Call], repeats: int) -> None:
        super().__init__(calls, repeats)
        self.method = "wall" if repeats == 1 else f"wall, {repeats} calls"
        self._seconds: list[float] = []

    def launch(self) -> None:
        turns = [self._turn() for _ in range(self.repeats)]
        begin = time.perf_counter()
        for call in turns:
            call()
        self._seconds.append((time.perf_counter() - begin) / self.repeats)

    def collect(self) -> list[float]:
        seconds, self._seconds = self._seconds, []
        return seconds


class _Events(Sampler):
    def __init__(self, calls: Sequence[Call], repeats: int, device: torch.device) -> None:
        super().__init__(calls, repeats)
        self.method = "events" if repeats == 1 else f"events around {repeats} calls"
        self._device = device
        self._evict = _evict_buffer(device)
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _work(self) -> None:
        for _ in range(self.repeats):
            self._turn()()

    def launch(self) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._evict.zero_()
        begin.record()
        self._work()
        end.record()
        self._pairs.append((begin, end))

    def collect(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        pairs, self._pairs = self._pairs, []
        return [begin.elapsed_time(end) * 1e-3 / self.repeats for begin, end in pairs]


class _Pool:
    """Memory that several graphs share, which run one after another and leave nothing behind that is read later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.renew()

    def renew(self) -> None:
        """Other memory for the graphs to come: what a capture that failed wrote into takes no further one."""
        self.handle = torch.cuda.graph_pool_handle()
        # A pool lives as long as a graph of it does; this one cannot fail.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self.handle):
            torch.zeros(1, device=self._device)


class _Graph(_Events):
    def __init__(self, calls: Sequence[Call], repeats: int, device: torch.device, pool: _Pool | None) -> None:
        super().__init__(calls, repeats, device)
        self.method = f"graph of {repeats} calls"
        # Handles, autograd's threads and cuBLAS workspaces are made at first use, which must not be the capture.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for call in self.calls:
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool.handle if pool else None):
            for _ in range(repeats):
                self._turn()()

    def _work(self) -> None:
        self._graph.replay()


def captured(call: Call) -> Call:
    """A call that replays this one as a CUDA graph, on the current device; its output is where the capture left it."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):  # what is made or compiled at first use must not be in the capture
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


@functools.cache
def _evict_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(max(256 << 20, 4 * _cache_bytes(device)), dtype=torch.uint8, device=device)


def input_sets(set_bytes: int, device: torch.device | str, *, most: int = 32) -> int:
    """Number of input sets of `set_bytes` bytes that outgrow the device's cache three times over: 2 to `most`, and 2
    where even so many would stay in the cache."""
    if set_bytes <= 0:
        raise ValueError(f"input_sets: set_bytes must be positive, got {set_bytes}")
    device = torch.device(device)
    most, cache = (most if device.type == "cuda" else 4), _cache_bytes(device)
    return 2 if most * set_bytes <= cache else max(2, min(most, math.ceil(3 * cache / set_bytes)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _estimate(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds per call, roughly: the best of three short runs of back-to-back calls."""
    best = math.inf
    for _ in range(3):
        _synchronize(device)
        begin = time.perf_counter()
        for call in list(calls)[:4]:
            call()
        _synchronize(device)
        best = min(best, (time.perf_counter() - begin) / min(4, len(calls)))
    return max(best, 1e-7)


def _estimate_gpu(calls: Sequence[Call], device: torch.device) -> float:
    """GPU seconds per call, roughly; a host slower than the GPU can only make it too long."""
    once = _Events(calls, 1, device).sample()
    if once > SLOW_S:
        return once
    events = _Events(calls, min(4, len(calls)), device)
    for _ in range(4):
        events.launch()
    return max(min(events.collect()), 1e-7)


def _below(device: torch.device) -> float:
    return GRAPH_BELOW_S if device.type == "cuda" else LOOP_BELOW_S


def _repeats(seconds: float, sets: int) -> int:
    """Calls per sample: about SAMPLE_S long, and a whole number of turns through the input sets where that fits."""
    wanted = max(1, min(MAX_REPEATS, math.ceil(SAMPLE_S / seconds)))
    return min(MAX_REPEATS, math.ceil(wanted / sets) * sets)


def sampler(
    calls: Sequence[Call],
    device: torch.device | str,
    *,
    repeated: bool | None = None,
    pool: _Pool | None = None,
    seconds: float | None = None,
) -> Sampler:
    """The sampler that fits one variant.

    Args:
        calls: one call per input set, all warm (compiled, autotuned) already.
        device: where they run.
        repeated: take many calls per sample; None decides by the rule above.
        pool: where a graph has its memory; None gives it its own.
        seconds: a call, roughly; None finds out.

    Returns:
        A Sampler; on a GPU with `repeated`, a CUDA graph if the calls can be captured.
    """
    device = torch.device(device)
    if seconds is None:
        seconds = _estimate_gpu(calls, device) if device.type == "cuda" else _estimate(calls, device)
    if repeated is None:
        repeated = seconds < _below(device)
    repeats = _repeats(seconds, len(calls)) if repeated else 1
    if device.type != "cuda":
        return _Wall(calls, repeats)
    if repeated:
        try:
            return _Graph(calls, repeats, device, pool)
        except RuntimeError:  # something in it synchronizes or is otherwise not capturable
            torch.cuda.synchronize(device)
            if pool:
                pool.renew()
    return _Events(calls, repeats, device)


def extra_memory(call: Call, device: torch.device) -> int | None:
    """Peak bytes of device memory during a call beyond inputs and outputs; None on the CPU: not measured there."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = call()
    torch.cuda.synchronize(device)
    peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    del kept
    return peak - max(before, after)


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """Linearly interpolated percentile of ascending values; `share` from 0 to 1."""
    at = share * (len(sorted_values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(sorted_values) - 1)
    return sorted_values[low] + (at - low) * (sorted_values[high] - sorted_values[low])


def describe_error(error: BaseException) -> str:
    """One line naming an error: its type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def measure(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device | str,
    *,
    check: Callable[[str, object], float | None] | None = None,
    budget_s: float = 2.0,
    rounds: tuple[int, int] = (20, 200),
) -> dict[str, Timing]:
    """Time variants of the same work against each other.

    Args:
        variants: name to calls, one call per input set; set 0 of every variant is the same input.
        device: a CUDA device (GPU time) or the CPU (wall time).
        check: called as check(name, output) with the output of each variant's first call; it raises if that is wrong,
            and may return what becomes `Timing.differ`.
        budget_s: seconds to spend on samples, all variants together, within the bounds of `rounds`.
        rounds: least and most samples per variant.

    Returns:
        name to Timing, in the order given. A variant whose call or check raised has `error` set and no times.

    Raises:
        ValueError: if there is no variant, a variant has no calls, or `rounds` is not 1 <= least <= most.
    """
    device = torch.device(device)
    if not variants:
        raise ValueError("measure: variants must hold at least one variant, got none")
    for name, calls in variants.items():
        if not calls:
            raise ValueError(f"measure: variants must give each variant at least one call, got none for {name!r}")
    if not 1 <= rounds[0] <= rounds[1]:
        raise ValueError(f"measure: rounds must be (least, most) with 1 <= least <= most, got {rounds}")

    errors: dict[str, str] = {}
    memory: dict[str, int | None] = {}
    differ: dict[str, float | None] = {}
    for name, calls in variants.items():
        try:
            output = calls[0]()
            _synchronize(device)
            differ[name] = None if check is None else check(name, output)
            del output
            memory[name] = extra_memory(calls[0], device)
            for call in calls[1:]:
                call()
        except Exception as error:  # a peer may fail in any way, and its row says how
            errors[name] = describe_error(error)
    alive = {name: calls for name, calls in variants.items() if name not in errors}

    samplers: dict[str, Sampler] = {}
    seconds: dict[str, list[float]] = {name: [] for name in alive}

    def tried(name: str, work: Callable[[], Any]) -> Any:
        """What work returns, or None: then the variant is out of the comparison, for lack of memory for example."""
        try:
            return work() if name in alive else None
        except Exception as error:
            errors[name] = describe_error(error)
            alive.pop(name)
            return None

    estimate = _estimate_gpu if device.type == "cuda" else _estimate
    estimates = {name: tried(name, functools.partial(estimate, calls, device)) for name, calls in list(alive.items())}
    if alive:
        estimates = {name: estimates[name] for name in alive}
        repeated = min(estimates.values()) < _below(device)
        pool = _Pool(device) if repeated and device.type == "cuda" else None
        for name, calls in list(alive.items()):
            make = functools.partial(sampler, calls, device, repeated=repeated, pool=pool, seconds=estimates[name])
            found = tried(name, make)
            if found is not None:
                samplers[name] = found
    if samplers:
        names = list(samplers)
        one_round = sum(estimates.values())
        if repeated or one_round < len(estimates) * SLOW_S:  # else the estimates were warm-up enough
            one_round = _warm_up(functools.partial(tried, name, one.sample) for name, one in samplers.items())
        count = max(rounds[0], min(rounds[1], int(budget_s / max(one_round, 1e-6))))
        for turn in range(count):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                tried(name, samplers[name].launch)
            for name in names:
                seconds[name] += tried(name, samplers[name].collect) or []

    result = {}
    for name in variants:
        if name in errors:
            result[name] = Timing(None, None, None, None, 0, "not timed", errors[name])
            continue
        ordered = sorted(1e3 * s for s in seconds[name])
        median, p10, p90 = (percentile(ordered, share) for share in (0.5, 0.1, 0.9))
        method = samplers[name].method
        result[name] = Timing(median, p10, p90, memory[name], len(ordered), method, differ=differ[name])
    return result


def _warm_up(samples: Iterable[Callable[[], object]]) -> float:
    """Run rounds for WARM_UP_S seconds, at least two unless one is slow; returns the wall seconds of the last one."""
    samples = list(samples)
    begin = time.perf_counter()
    turns = 0
    while True:
        started = time.perf_counter()
        for sample in samples:
            sample()
        turns += 1
        now = time.perf_counter()
        enough = turns >= 2 or now - started > len(samples) * SLOW_S
        if enough and now - begin > WARM_UP_S:
            return now - started


def copy_rate(device: torch.device | str) -> float:
    """Bytes per second, read plus written, of a large copy on this device: the roof for memory-bound work."""
    device = torch.device(device)
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": [lambda: target.copy_(source)]}, device, budget_s=0.3, rounds=(5, 20))["copy"]
    return 2 * size / _seconds(timing)


def matmul_rate(device: torch.device | str) -> float:
    """FLOP/s of a large bfloat16 matrix product on this device (float32 on the CPU): the roof for matrix work."""
    device = torch.device(device)
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = measure({"matmul": [lambda: a @ b]}, device, budget_s=0.3, rounds=(5, 20))["matmul"]
    return 2 * size**3 / _seconds(timing)


def _seconds(timing: Timing) -> float:
    if timing.median_ms is None:
        raise RuntimeError(f"a ceiling could not be measured: {timing.error}")
    return timing.median_ms * 1e-3
