"""A trained model as it ships: matrices in 8 bits with one scale a row, code vectors in 16, vectors in 32."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from unifiedar import checkpoints
from unifiedar.models import VAR, VILAU

__all__ = ["export", "main"]

# Of a VAR: few bytes, that no matrix product reads or that have no rows to scale by. They stay as they are.
_WIDE = ("word_embed", "pos_start", "lvl_embed", "ada_gss", "scale_mul")
# Of a VAR and its tokenizer: what 8 bits would be too coarse for, with one scale for all positions, say.
_HALVED = ("vae.quantize.", "pos_1LC", "attn_bias_for_masking")


def export(source: str | Path, target: str | Path, *, precision: str = "int8") -> Path:
    """Write a smaller copy of a model.

    Args:
        source: a VILA-U, as `VILAU.from_checkpoint` takes it, or a folder of a VAR with its tokenizer.
        target: folder to make or replace.
        precision: "int8": weights of two dimensions or more in 8 bits with a float32 scale a row, except the code
            vectors, whose rounding would move every pixel, and a VAR's positions (bfloat16), and what little else a VAR
            has beside matrices of products (as it is); "bf16": all but the last in bfloat16.

    Returns:
        The folder.

    Raises:
        CheckpointError: if the source cannot be read or the target not be written.
    """
    found = checkpoints.resolve(source)
    if found.is_dir() and checkpoints.read_config(found).get("model") == "var":
        return _export_var(found, target, precision)
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


def _export_var(source: Path, target: str | Path, precision: str) -> Path:
    model = VAR.from_checkpoint(source)
    if model.vae is None:
        raise checkpoints.CheckpointError(f"{source}: has no tokenizer in it; `save_whole` writes both")
    tensors = model.whole()
    matrices = {
        name
        for name, value in tensors.items()
        if value.ndim >= 2 and value.is_floating_point() and not any(part in name for part in _WIDE)
    }
    halved = {name for name in matrices if name.startswith(_HALVED)} if precision == "int8" else matrices
    for name in halved:
        tensors[name] = tensors[name].to(torch.bfloat16)
    return model.save_whole(target, tensors, int8=matrices - halved)


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
