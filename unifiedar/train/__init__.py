"""Training on captioned pictures: `unifiedar train tower`, then `unified`, for VILA-U; `vae`, then `var`, for VAR."""

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

_STAGES = ("tower", "unified", "vae", "var", "export")
_USAGE = """usage: unifiedar train {tower,unified,vae,var,export} [options]

  tower    vision tower: contrastive alignment, then reconstruction too (first stage)
  unified  language model and depth transformer on a frozen tower (second stage)
  vae      VAR's tokenizer: pictures as codes of growing maps (first stage)
  var      VAR itself, on a frozen tokenizer: pictures of classes (second stage)
  export   a trained model in 8 bits, a quarter of the size

`unifiedar train STAGE --help` lists the options. Several GPUs: torchrun --nproc-per-node N -m unifiedar train STAGE ...
"""


def main(argv: Sequence[str]) -> int:
    """Run one stage; returns the exit code."""
    stage, rest = (argv[0] if argv else ""), argv[1:]
    if stage in ("-h", "--help"):
        print(_USAGE)
        return 0
    if stage in _STAGES:
        return int(importlib.import_module(f"unifiedar.train.{stage}").main(rest))
    names = ", ".join(map(repr, _STAGES[:-1]))
    print(f"unifiedar train: stage must be {names} or {_STAGES[-1]!r}, got '{stage}'\n\n{_USAGE}", file=sys.stderr)
    return 2
