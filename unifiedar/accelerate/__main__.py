"""`python -m unifiedar.accelerate --check MODEL --reference FOLDER`: the published code and ours side by side.

For whoever has a checkout of VAR, RQ-Transformer or VILA-U: its own modules are built with random weights (VAR's with
published files, too) and run in float32 beside ours and beside what `accelerate` makes of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from unifiedar.accelerate._check import Finding
from unifiedar.accelerate._check_depth import check_rqtransformer, check_vilau
from unifiedar.accelerate._check_var import check_var
from unifiedar.checkpoints import CheckpointError
from unifiedar.devices import DeviceError, add_device_argument, usable_device

__all__ = ["main"]

CHECKS: dict[str, Callable[..., list[Finding]]] = {
    "var": check_var,
    "rqtransformer": check_rqtransformer,
    "vilau": check_vilau,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0 if everything agrees, 1 if not, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m unifiedar.accelerate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", choices=list(CHECKS), required=True, help="what to check")
    parser.add_argument("--reference", type=Path, required=True, help="folder of a checkout of that code")
    parser.add_argument("--depth", type=int, help="var: of a model with random weights (2)")
    parser.add_argument("--checkpoint", type=Path, help="var: a published var_d*.pth in place of random weights")
    parser.add_argument("--vae", type=Path, help="var: the published tokenizer that goes with it")
    add_device_argument(parser)
    options = parser.parse_args(arguments)
    given = {name: value for name in ("depth", "checkpoint", "vae") if (value := getattr(options, name)) is not None}
    if given and options.check != "var":
        parser.error(f"--{next(iter(given))} goes with --check var only")
    try:
        findings = CHECKS[options.check](options.reference, usable_device(options.device), **given)
    except (CheckpointError, DeviceError, ValueError) as error:
        print(f"unifiedar.accelerate: {error}", file=sys.stderr)
        return 2
    for one in findings:
        print(one)
    return 0 if all(one.good for one in findings) else 1


if __name__ == "__main__":
    raise SystemExit(main())
