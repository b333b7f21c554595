"""Launches that begin while the kernel before them still runs: Hopper's programmatic dependent launch.

A kernel that takes part lets the next one in as soon as all of its own programs have begun, and waits for the one
before at its own begin, before it reads what that wrote, and before it writes anything: so that all earlier kernels are
over too. What it may do sooner is bring what nobody writes, weights, into the second cache.
"""

import functools

import torch
import triton
import triton.language as tl

__all__ = ["dependent", "weights_ahead"]


@functools.cache
def _has(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


def dependent(tensor: torch.Tensor) -> dict[str, bool]:
    """What a launch for a tensor's device is given besides its arguments: a kernel's PDL, and the launch's own flag."""
    if not tensor.is_cuda or not _has(tensor.get_device()):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def weights_ahead(begin, rows, pitch, bytes, lines, LANES: tl.constexpr):
    """Asks for the first `bytes` of rows that are `pitch` bytes apart, in lines lines of 128 each, LANES at a time."""
    lane = tl.arange(0, LANES)
    for first in range(0, rows * lines, LANES):
        line = tl.minimum(first + lane, rows * lines - 1)
        at = begin + (line // lines).to(tl.int64) * pitch + tl.minimum(line % lines * 128, bytes - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )
