"""Run under torchrun by test_train_var.py: `unifiedar train var`, one command after another, with tiny sizes.

Arguments: the tiny VAR's config as Python, then commands parted by ";". Each must end with the exit code that stands
before it.
"""

import sys

import torch.distributed as dist

from unifiedar import train
from unifiedar.models import VAR, VARConfig
from unifiedar.train.loop import DTensor, Loop


def check(self: Loop, *args: object) -> int:
    """Before a run ends: with --shard every parameter, moment and average is shared out, else none."""
    moments = [one["exp_avg"] for one in self.optimizer.state.values()]
    for group in (self.parameters, moments, [a for a, _ in self.moving]):
        assert group
        assert all(isinstance(one, DTensor) == self.sharded for one in group)
    if self.sharded:
        local = sum(one.to_local().numel() for one in self.parameters)
        assert local < 0.6 * sum(one.numel() for one in self.parameters)
    return finish(self, *args)


if __name__ == "__main__":
    VAR.configs["tiny"] = eval(sys.argv[1], {"VARConfig": VARConfig})
    finish, Loop.finish = Loop.finish, check  # type: ignore[method-assign]
    # Processes that met once cannot meet again under the same address.
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    for command in " ".join(sys.argv[2:]).split(";"):
        code, *argv = command.split()
        assert train.main(argv) == int(code), command
    destroy()
