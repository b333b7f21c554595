"""Gradients of a training step captured as a CUDA graph, for `--graph`.

A small model's step launches more than a host can while its kernels run, and a large one's about as much. What is left
to the host each step are the optimizer and the averaged weights: some thirty launches that take the rates of the step.
So checkpoints, and all that is computed, are those of a run without a graph.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Recorder"]

# Steps taken as they are before a capture: what is compiled, allocated or chosen at a first call is by then.
WARM = 2


class Recorder:
    """Runs a function that sets gradients, and after a few calls replays what it launched.

    What is captured last is kept, with its memory, which nothing else can use: about as much as the function takes.

    Args:
        parameters: whose `grad` it sets.
        generators: what it draws from, beside the default one; seeded before every call.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], generators: Sequence[torch.Generator]):
        self.parameters, self.generators = parameters, generators
        self._forget(None)

    def _forget(self, key: Hashable) -> None:
        self.key, self.calls = key, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.values: dict[str, Tensor] = {}
        self.gradients: list[Tensor | None] = []

    def run(self, key: Hashable, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The function's values, of this call.

        Args:
            key: functions of one key differ in what is drawn alone; another key than before drops the graph. None is
                like no other: such a call is made as it is, and the graph kept.
            function: does not wait for the device, and reads what it does not draw from where it always is.
        """
        if key is None:
            return function()
        if key != self.key:
            self._forget(key)
        self.calls += 1
        if self.calls <= WARM:
            return function()
        if self.graph is None:
            for parameter in self.parameters:
                parameter.grad = None
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.values = function()
            self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.graph.replay()
        return self.values
