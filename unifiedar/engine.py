"""Steps over fixed tensors, captured once each as a CUDA graph and replayed from then on.

A model that draws a picture launches thousands of small kernels, and a host is slower at that than a GPU is at running
them. A step is a function without arguments that reads and writes tensors which stay where they are; captured, all that
it launches is one call. Where there is no GPU, a step is simply called.

This module imports nothing of unifiedar, so that models may import it.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

__all__ = ["Pool", "Steps", "addresses", "circumstances", "tensors"]

Step = Callable[[], object]


class Steps:
    """Steps that are run in their order, any number of times.

    Each reads what the ones before it wrote in the same round, and inputs that the caller fills in place. Whatever a
    step keeps (as an attribute of something) was made in the capture, and is what every replay writes to.

    Args:
        steps: functions without arguments. They must not depend on values on the device, wait for it, or draw random
            numbers; and a round must not depend on the round before.
        graphs: whether to capture them, on the current CUDA device. Capturing runs every step once, as it is, and then
            records it.

    Attributes:
        seconds: what capturing took; 0 without graphs.
    """

    def __init__(self, steps: Sequence[Step], *, graphs: bool):
        self._runs = list(steps)
        self.seconds = 0.0
        if graphs:
            begin = time.perf_counter()
            self._graphs = _capture(self._runs)
            self._runs = [graph.replay for graph in self._graphs]
            self.seconds = time.perf_counter() - begin

    def __len__(self) -> int:
        return len(self._runs)

    def run(self, i: int) -> None:
        """Runs step i; those before it must have run in this round."""
        self._runs[i]()


def _capture(steps: Sequence[Step]) -> list[torch.cuda.CUDAGraph]:
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for step in steps:  # what is compiled, allocated or chosen at a first call is, here
            step()
    current.wait_stream(stream)
    # One memory for all: what a step does not keep is free for the next, which never runs at the same time.
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            step()
        graphs.append(graph)
    return graphs


class Pool:
    """The last few things that were made, by key; what was used least recently goes first.

    Copies of a pool, and what is read from a pickle of one, are empty: graphs cannot be copied.

    Args:
        limit: how many it keeps.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made for a key; made now if it is not there, after room was made for it."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while len(self._kept) >= self.limit:
            self._kept.popitem(last=False)
        self._kept[key] = made = make()
        return made

    def newest(self, fits: Callable[[Any], bool]) -> Any:
        """What was used last of all things whose key fits, or None."""
        return next((self._kept[key] for key in reversed(self._kept) if fits(key)), None)

    def clear(self) -> None:
        """Drops everything, and with it the memory."""
        self._kept.clear()

    def values(self) -> list[Any]:
        """What it keeps, the least recently used first."""
        return list(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict) -> "Pool":
        return Pool(self.limit)

    def __reduce__(self) -> tuple:
        return Pool, (self.limit,)


def addresses(*modules: torch.nn.Module) -> list[int]:
    """Where the parameters and buffers of modules are, in a fixed order: what a graph knows them by."""
    return [tensor.data_ptr() for tensor in tensors(*modules)]


def tensors(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of modules, in a fixed order.

    A walk of its own, as it is done at every call: `Module.parameters` takes two milliseconds for the seven hundred of
    a VAR and its tokenizer, this a twentieth of that.
    """
    found: list[torch.Tensor | None] = []
    left: list[torch.nn.Module | None] = list(modules)
    for module in left:  # which grows
        if module is not None:
            own = module.__dict__
            if own["_parameters"]:
                found += own["_parameters"].values()
            if own["_buffers"]:
                found += own["_buffers"].values()
            if own["_modules"]:
                left += own["_modules"].values()
    return [tensor for tensor in found if tensor is not None]


def circumstances() -> Hashable:
    """What decides beside the arguments which kernels a step launches: settings of the process that a graph freezes."""
    return (
        os.environ.get("UNIFIEDAR_BACKEND"),
        # Whoever sets these by the new names makes the old ones raise, not the other way round.
        torch.backends.cuda.matmul.fp32_precision,
        getattr(torch.backends.cudnn, "conv").fp32_precision,  # noqa: B009 - unknown to torch's types
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
