"""What a call launches, and for how long a GPU then has something to do, as torch's profiler sees it.

    launches    calls of the host that start something: a kernel, a copy, a fill, or a CUDA graph, which counts once
    kernels     what then ran on the GPU, those of graphs one by one
    busy_ms     time during which at least one of them ran; over the time of a call it is the GPU's busy share

One call is profiled, after all were timed: watching slows the host down, but hardly what runs on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from bench._time import Launches, describe_error

__all__ = ["Seen", "counted", "tally"]

_STARTS = tuple(f"{api}{what}" for api in ("cuda", "cu") for what in ("Launch", "GraphLaunch", "Memcpy", "Memset"))


class Seen(NamedTuple):
    """One event of a profile: where, what, and from when to when in nanoseconds."""

    on_gpu: bool
    name: str
    begin_ns: int
    end_ns: int


def tally(events: Iterable[Seen]) -> Launches:
    """What the events of one call come to."""
    events = list(events)
    launches = sum(not one.on_gpu and one.name.startswith(_STARTS) for one in events)
    ran = sorted((one.begin_ns, one.end_ns) for one in events if one.on_gpu)
    busy = until = 0
    for begin, end in ran:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return Launches(launches, len(ran), busy / 1e6)


def counted(call: Callable[[], object], device: torch.device | str) -> Launches:
    """Profile one call, which is warm; what goes wrong is in `error`."""
    device = torch.device(device)
    if device.type != "cuda":
        return Launches(None, None, None, "needs a GPU")
    try:
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            output = call()
            torch.cuda.synchronize(device)
        del output
        found = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        on_gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        result = tally(
            Seen(one.device_type() == on_gpu, one.name(), one.start_ns(), one.start_ns() + one.duration_ns())
            for one in found
        )
    except Exception as error:  # a peer may fail in any way, and its row says how
        return Launches(None, None, None, describe_error(error))
    return result if result.kernels else Launches(None, None, None, "the profiler saw nothing run on the GPU")
