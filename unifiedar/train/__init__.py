"""Training: `unifiedar train tower` and then `unifiedar train unified`, VILA-U's recipe on any captioned pictures."""

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

_USAGE = """usage: unifiedar train {tower,unified,export} [options]

  tower    vision tower: contrastive alignment, then reconstruction too (first stage)
  unified  language model and depth transformer on a frozen tower (second stage)
  export   a trained model in 8 bits, a quarter of the size

`unifiedar train STAGE --help` lists the options. Several GPUs: torchrun --nproc-per-node N -m unifiedar train STAGE ...
"""


def main(argv: Sequence[str]) -> int:
    """Run one stage; returns the exit code."""
    stage, rest = (argv[0] if argv else ""), argv[1:]
    if stage in ("-h", "--help"):
        print(_USAGE)
        return 0
    if stage in ("tower", "unified", "export"):
        return int(importlib.import_module(f"unifiedar.train.{stage}").main(rest))
    print(f"unifiedar train: stage must be 'tower', 'unified' or 'export', got '{stage}'\n\n{_USAGE}", file=sys.stderr)
    return 2
