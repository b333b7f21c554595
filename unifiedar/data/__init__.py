"""Data that can be had without the open web: emoji pictures with captions, and the tokenizer of the captions.

- `emoji`: renders the icon sets of npm packages into pictures with a concept and a style each; says which are held out.
- `text`: the byte-level BPE tokenizer.
- `samples()`: a few dozen pictures that ship with the package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unifiedar.data._samples import Sample, samples

__all__ = ["Sample", "main", "samples"]

_USAGE = """usage: unifiedar data emoji --from DIR... --out DIR [--size 64] [--jobs N]

  emoji    render the icon sets of @iconify-json npm packages into pictures with captions"""


def main(argv: Sequence[str] | None = None) -> int:
    """`unifiedar data`: hand the rest of the command line to the builder it names. Returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["emoji"]:
        from unifiedar.data import emoji

        return emoji.main(args[1:])
    if args and args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    print(_USAGE, file=sys.stderr)
    got = repr(args[0]) if args else "nothing"
    print(f"unifiedar data: the data set must be emoji, got {got}", file=sys.stderr)
    return 2
