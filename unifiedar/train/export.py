"""A trained model as it ships: matrices in 8 bits with one scale a row, code vectors in 16, vectors in 32."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from unifiedar import checkpoints
from unifiedar.models import VILAU

__all__ = ["export", "main"]


def export(source: str | Path, target: str | Path, *, precision: str = "int8") -> Path:
    """Write a smaller copy of a model.

    Args:
        source: as `VILAU.from_checkpoint` takes it.
        target: folder to make or replace.
        precision: "int8": weights of two dimensions or more in 8 bits with a float32 scale a row, except the code
            vectors, whose rounding would move every pixel (bfloat16); "bf16": all of them in bfloat16.

    Returns:
        The folder.

    Raises:
        CheckpointError: if the source cannot be read or the target not be written.
    """
    model = VILAU.from_checkpoint(source)
    tensors = dict(model.state_dict())
    matrices = [name for name, value in tensors.items() if value.ndim >= 2]
    codebooks = {name for name in matrices if ".codebooks." in name and name.endswith(".weight")}
    halved: dict[int, torch.Tensor] = {}  # a table that is listed once for every depth stays one tensor
    for name in codebooks if precision == "int8" else matrices:
        value = tensors[name]
        tensors[name] = halved.setdefault(value.data_ptr(), value.to(torch.bfloat16))
    int8 = [name for name in matrices if name not in codebooks] if precision == "int8" else []
    return model.write(target, tensors, int8=int8)


def main(argv: Sequence[str]) -> int:
    """`unifiedar train export`: returns the exit code."""
    parser = argparse.ArgumentParser(prog="unifiedar train export", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--out", type=Path, required=True, help="folder to make or replace")
    parser.add_argument("--precision", choices=("int8", "bf16"), default="int8", help="of matrices (default: int8)")
    args = parser.parse_args(argv)
    try:
        folder = export(args.model, args.out, precision=args.precision)
    except checkpoints.CheckpointError as error:
        print(f"unifiedar train export: {error}", file=sys.stderr)
        return 1
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {total / 2**20:.1f} MiB")
    return 0
