"""Training: `unifiedar train tower` and then `unifiedar train unified`, VILA-U's recipe on any captioned pictures."""

import sys
from collections.abc import Sequence

__all__ = ["main"]

_USAGE = """usage: unifiedar train {tower,unified} [options]

  tower    vision tower: contrastive alignment, then reconstruction too (first stage)
  unified  language model and depth transformer on a frozen tower (second stage)

`unifiedar train STAGE --help` lists the options. Several GPUs: torchrun --nproc-per-node N -m unifiedar train STAGE ...
"""


def main(argv: Sequence[str]) -> int:
    """Run one stage; returns the exit code."""
    stage, rest = (argv[0] if argv else ""), argv[1:]
    if stage in ("-h", "--help"):
        print(_USAGE)
        return 0
    if stage == "tower":
        from unifiedar.train import tower

        return tower.main(rest)
    if stage == "unified":
        from unifiedar.train import unified

        return unified.main(rest)
    print(f"unifiedar train: stage must be 'tower' or 'unified', got '{stage}'\n\n{_USAGE}", file=sys.stderr)
    return 2
