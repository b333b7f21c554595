"""Argument checks shared by the public functions. Every text reads "function: argument rule, got value"."""

import math
from numbers import Real
from typing import Any

import torch

__all__ = ["FLOATS", "check_codes", "check_integer", "check_number", "check_same_device", "check_tensor"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(function: str, argument: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises TypeError unless `value` is a tensor of one of `dtypes`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{function}: {argument} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def check_codes(function: str, codes: Any) -> None:
    """Raises TypeError unless `codes` is an int64 tensor."""
    check_tensor(function, "codes", codes, (torch.int64,))


def check_same_device(function: str, argument: str, value: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """Raises ValueError unless two tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{function}: {argument} must be on the device of {other} ({like.device}), got {value.device}")


def check_heads(function: str, **tensors: Any) -> None:
    """Raises unless all are tensors (batch, heads, length, D) of one dtype, on one device: the first one's."""
    first, like = next(iter(tensors.items()))
    for argument, value in tensors.items():
        check_tensor(function, argument, value)
        if value.ndim != 4:
            raise ValueError(f"{function}: {argument} must be (batch, heads, length, D), got {tuple(value.shape)}")
        if value.dtype != like.dtype:
            raise TypeError(f"{function}: {argument} must have the dtype of {first}, {like.dtype}, got {value.dtype}")
        check_same_device(function, argument, value, first, like)


def check_integer(function: str, argument: str, value: Any, low: int) -> None:
    """Raises TypeError unless `value` is an integer, ValueError if it is below `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{function}: {argument} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{function}: {argument} must be at least {low}, got {value}")


def check_number(function: str, argument: str, value: Any, low: float | None = None) -> None:
    """Raises TypeError unless `value` is a real number, ValueError if it is not finite or below `low`."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    # Unlike math.isfinite this can be traced with symbolic numbers.
    if not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{function}: {argument} must be finite, got {value}")
    if low is not None and value < low:
        raise ValueError(f"{function}: {argument} must be at least {low:g}, got {value}")
