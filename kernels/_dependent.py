"""Launches that begin while the kernel before them still runs: Hopper's programmatic dependent launch.

A kernel that takes part waits at its begin for the one before (`gdc_wait`), before it reads or writes anything, so that
all earlier kernels are over too; and it lets the next one in (`gdc_launch_dependents`) when its own work is nearly
done, so that the next is at its place when this one ends. Let in at the begin, programs of several kernels pile up on a
few multiprocessors, which costs more than it gains.
"""

import functools

import torch

__all__ = ["dependent"]


@functools.cache
def _has(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


def dependent(tensor: torch.Tensor) -> dict[str, bool]:
    """What a launch for a tensor's device is given besides its arguments: a kernel's PDL, and the launch's own flag."""
    if not tensor.is_cuda or not _has(tensor.get_device()):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
