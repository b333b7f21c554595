"""Every case once and untimed, in several processes: what has to be compiled for it is on disk afterwards.

Most of a first run is compiling, by torch.compile and Triton, one case after another while the GPU waits. Processes
that share the caches on disk (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR and CUDA_CACHE_PATH say where they are) do that
side by side; a run that follows finds it done. What inductor chose by timing is forgotten again: it was timed beside
other processes, and the run that follows times it anew.

A process takes one case after another. One that dies is replaced, and the case that it had is tried once more, alone,
when the others are through; so are the variants of a case that were short of memory, or ours if it failed. No case is
left out without a word.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from bench._case import family_cases, release
from bench._time import describe_error

__all__ = ["Outcome", "Task", "run_once", "share_caches", "warm"]

LIMIT_S = 900.0
"""Of one case."""
_OURS = "ours failed: "
_SHORT = ("out of memory", "alloc_failed")
"""What an error says where there was no memory, torch's and those of the libraries under it."""


@dataclass(frozen=True)
class Task:
    """A case by its names, where it runs, and seconds of further calls after each variant's first, all together; of
    which variants, if not of all."""

    family: str
    case: str
    device: str
    further_s: float = 0.0
    only: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.family} {self.case}"


@dataclass(frozen=True)
class Outcome:
    """How a case went.

    Attributes:
        ran: variants that did.
        errors: those that raised, by name.
        failed: what the public function raised, or how the process ended that had the case. None if all is well.
        seconds: of wall time.
    """

    ran: int
    errors: dict[str, str] = field(default_factory=dict)
    failed: str | None = None
    seconds: float = 0.0


def share_caches() -> None:
    """Keep Triton's cache where Triton has it: inductor would move it with its first kernel, and ours with it."""
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(home, ".triton", "cache"))


def run_once(task: Task) -> Outcome:
    """Bind and call every variant of a case in this process, on one set of inputs."""
    begun = time.perf_counter()
    device = torch.device(task.device)
    case = next(one for one in family_cases(task.family, device) if one.name == task.case)
    torch.compiler.reset()  # as before a timed case
    inputs = case.make(0, device)
    errors: dict[str, str] = {}
    chosen = [one for one in case.variants if not task.only or one.name in task.only]
    for variant in chosen:
        try:
            _call(variant.bind(inputs), device, task.further_s / len(case.variants))
        except Exception as error:  # a peer may fail in any way, and the report says how
            errors[variant.name] = describe_error(error)
        if case.apart:
            release(case, device)
    ours = next(one.name for one in case.variants if one.role == "ours")
    failed = _OURS + errors[ours] if ours in errors else None
    return Outcome(len(chosen) - len(errors), errors, failed, time.perf_counter() - begun)


def _call(call: Callable[[], object], device: torch.device, further_s: float) -> None:
    end = None
    while end is None or time.perf_counter() < end:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = end or time.perf_counter() + further_s


def warm(
    tasks: Sequence[Task],
    processes: int,
    *,
    work: Callable[[Task], Outcome] = run_once,
    report: Callable[[str], None] = lambda line: None,
    limit_s: float = LIMIT_S,
) -> list[Outcome]:
    """Run cases once each.

    Args:
        tasks: what to run.
        processes: how many do so at a time.
        work: what a process does with one (a function of a module, for it is found by its name there).
        report: called with lines of text as cases end.
        limit_s: a case that takes longer is given up, and its process with it.

    Returns:
        What became of each task, in their order.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    outcomes: dict[int, Outcome] = {}
    idle: list[_Process] = []
    busy: dict[Connection, tuple[_Process, int, float]] = {}
    again: dict[int, Outcome] = {}  # and what came of the first time
    begun = time.time()

    def run(waiting: deque[int], at_once: int, last: bool) -> None:
        while waiting or busy:
            while waiting and len(busy) < at_once:
                process = idle.pop() if idle else _Process(context, work, threads)
                i = waiting.popleft()
                busy[process.pipe] = process, i, time.monotonic() + limit_s
                process.send(replace(tasks[i], only=_unlucky(again[i])) if last else tasks[i])
            said = wait(list(busy), max(0.0, min(end for *_, end in busy.values()) - time.monotonic()))
            late = [pipe for pipe, (*_, end) in busy.items() if pipe not in said and end <= time.monotonic()]
            for pipe in [one for one in busy if one in said or one in late]:
                process, i, _ = busy.pop(pipe)
                outcome = None if pipe in late else process.answer()
                reason = None
                if pipe in late:
                    process.kill()
                    outcome = Outcome(0, {}, f"took more than {limit_s:g} s")
                elif outcome is None:
                    outcome = Outcome(0, {}, f"its process ended with {process.stop()}")
                    reason = outcome.failed
                else:
                    idle.append(process)
                    if _unlucky(outcome):
                        reason = outcome.failed or "short of memory"
                if reason and not last:
                    again[i] = outcome
                    report(f"{tasks[i]!s:48} {reason}; once more, alone, at the end")
                    continue
                if last:
                    outcome = _both(again[i], outcome)
                outcomes[i] = outcome
                how = f"{outcome.ran} ran, {outcome.seconds:.1f} s" if outcome.ran else outcome.failed
                report(f"{tasks[i]!s:48} {how}")
                for name, error in outcome.errors.items():
                    report(f"{tasks[i]!s:48} {name}: {error}")

    try:
        run(deque(range(len(tasks))), processes, False)
        if again:
            for process in idle:  # they hold memory of the GPU
                process.kill()
            idle.clear()
            run(deque(again), 1, True)
    finally:
        for process in [*idle, *(process for process, *_ in busy.values())]:
            process.kill()
        _forget_choices(begun)
    return [outcomes[i] for i in range(len(tasks))]


def _unlucky(outcome: Outcome) -> tuple[str, ...]:
    """The variants that may do better alone; none if that is all of them."""
    return tuple(
        name
        for name, error in outcome.errors.items()
        if outcome.failed == _OURS + error or any(words in error.lower() for words in _SHORT)
    )


def _both(first: Outcome, second: Outcome) -> Outcome:
    """What came of a case at the first time, and of the variants that were tried again."""
    kept = {name: error for name, error in first.errors.items() if name not in _unlucky(first)}
    return Outcome(first.ran + second.ran, {**kept, **second.errors}, second.failed, first.seconds + second.seconds)


class _Process:
    """One that works tasks off, and the pipe to it."""

    def __init__(self, context: multiprocessing.context.SpawnContext, work: Callable[[Task], Outcome], threads: int):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads))
        self.process.start()
        theirs.close()

    def send(self, task: Task) -> None:
        with contextlib.suppress(OSError):  # it died before; the pipe says so when it is read
            self.pipe.send(task)

    def answer(self) -> Outcome | None:
        """What it says of its task; None if it died."""
        try:
            return self.pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return None

    def stop(self) -> int | None:
        """Let it end, if it has not; returns its exit status, negative for a signal."""
        self.pipe.close()  # which ends it
        self.process.join(5)
        self.kill()
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, work: Callable[[Task], Outcome], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            outcome = work(task)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a GPU's error that stays: this process is of no more use
                torch.cuda.empty_cache()
            pipe.send(outcome)


def _forget_choices(since: float) -> None:
    """Delete what inductor's autotuning wrote down since a time of the wall clock."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for path in Path(cache_dir()).rglob("*.best_config"):
        with contextlib.suppress(OSError):  # another process may be faster
            if path.stat().st_mtime >= since:
                path.unlink()
