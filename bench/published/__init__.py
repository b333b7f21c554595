"""VAR as published: the names, settings, order and launches of its code, written anew (arXiv:2404.02905).

What a checkout of it would do, for the bench to compare with, to compile, and to swap ours into: `accelerate` takes it
for the published model. Files and classes are called as there.
"""

from bench.published.var import VAR, published

__all__ = ["VAR", "published"]
