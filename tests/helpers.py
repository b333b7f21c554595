"""What the tests of several families share: which backends to test where, the tolerance rule, guarded buffers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

__all__ = ["assert_as_good_as_eager", "guarded", "interpreter_skip", "kernel_rooms"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def interpreter_skip() -> str | None:
    """Why Triton's interpreter cannot be used in this process; None if it can."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "Triton kernels are compiled where there is a GPU, not interpreted"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "Triton 3.6's interpreter fails with NumPy 2.4 and later"
    return None


def kernel_rooms() -> list:
    """pytest parameters (backend, device, dtype) for an operator that has all backends.

    The interpreter takes no bfloat16: it computes wrongly there.
    """
    rooms = [("eager", "cpu", dtype) for dtype in FLOATS]
    rooms += [("triton", "cpu", dtype) for dtype in (torch.float32, torch.float16)]
    gpu = [(backend, "cuda", dtype) for backend in ("eager", "triton", "cuda") for dtype in FLOATS]

    def name(backend, device, dtype):
        return f"{backend}-{device}-{str(dtype).removeprefix('torch.')}"

    return [pytest.param(room, id=name(*room)) for room in rooms] + [
        pytest.param(room, id=name(*room), marks=pytest.mark.gpu) for room in gpu
    ]


def assert_as_good_as_eager(
    got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, *, drawn: bool = False
) -> None:
    """The tolerance rule: the largest error is at most twice the eager formula's in the same dtype, plus 1e-5.

    Args:
        got: the result under test.
        eager: the eager formula's, in the same dtype.
        exact: the float64 result.
        drawn: of a problem that hypothesis drew. Among thousands of small ones it meets those where the largest of
            few roundings part by chance; the rule is then for the root mean square, and the largest may be four times.
    """
    assert got.dtype == eager.dtype
    assert got.shape == exact.shape
    if exact.numel():
        errors = [(x.double() - exact).abs() for x in (got, eager)]
        error, allowed = (x.max().item() for x in errors)
        assert error <= (4 if drawn else 2) * allowed + 1e-5, f"error {error:.3g}, eager's {allowed:.3g}"
        if drawn:
            error, allowed = (x.square().mean().sqrt().item() for x in errors)
            assert error <= 2 * allowed + 1e-5, f"root mean square of errors {error:.3g}, eager's {allowed:.3g}"


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: int = 64) -> tuple[torch.Tensor, Callable]:
    """A contiguous buffer inside a larger one, all of it poisoned, and a check to be called once it is filled.

    Args:
        shape, dtype, device: of the buffer.
        offset: elements before it; 64 keeps 16-byte alignment, an odd number breaks it.

    Returns:
        The buffer, and a function that asserts that all of it was written and nothing around it.
    """
    count = int(np.prod(shape))
    poison = -12345.0
    whole = torch.full((offset + count + 64,), poison, dtype=dtype, device=device)
    poison = whole[0].item()  # as rounded

    def check() -> None:
        assert (whole[:offset] == poison).all(), "wrote before the buffer"
        assert (whole[offset + count :] == poison).all(), "wrote after the buffer"
        assert (whole[offset : offset + count] != poison).all(), "left a part unwritten"

    return whole[offset : offset + count].view(shape), check
