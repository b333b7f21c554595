"""The option `--device` of every command."""

import argparse
import re

__all__ = ["DeviceError", "add_device_argument", "usable_device"]


class DeviceError(ValueError):
    """A device that was asked for and is not there; its text is one line."""


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device auto | cpu | cuda | cuda:N`, refused with one line if spelt otherwise."""
    parser.add_argument("--device", type=_spelt, default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def _spelt(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def usable_device(name: str, index: int = 0) -> str:
    """cpu or cuda:N for what `--device` says, after a look at what is there.

    Args:
        name: auto (a GPU if there is one), cpu, cuda or cuda:N.
        index: of the GPU where `name` does not say.

    Raises:
        DeviceError: if there is no such GPU.
    """
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise DeviceError(f"--device {name}: PyTorch {torch.__version__} {why} here; use --device cpu")
    index, count = int(name.partition(":")[2] or index), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"--device {name}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return f"cuda:{index}"
