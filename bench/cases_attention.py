"""Cases of the family `attention`: block-causal attention at the training shapes of published models.

`forward` is the output alone, `backward` the forward with the gradients of q, k and v. Operations count visible scores
only: with V = sum over scales of length times end, 4 B H D V forward (two products) and 10 B H D V more backward
(five). Least traffic: q, k, v and the output once; with the backward the same again, the incoming gradient and three
outgoing ones; lse written, and read again.

"SDPA, no mask" is no peer, for it computes something else: what dense attention takes for all L x L scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import OURS, Case, Check, Variant, against, tensors
from unifiedar.ops import block_causal_attention, registry

__all__ = ["cases"]


@dataclass(frozen=True)
class Model:
    """Sizes of a published model in training: scales are squares of these sides."""

    name: str
    batch: int
    heads: int
    width: int
    sides: tuple[int, ...]


_VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_INFINITY = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
MODELS = (
    Model("var-256-d16", 32, 16, 64, _VAR_256),
    Model("var-256-d30", 32, 30, 64, _VAR_256),
    Model("var-512-d36", 8, 36, 64, _VAR_512),
    Model("infinity-2b", 1, 16, 128, _INFINITY),
)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k, v and the gradient of the output, all (B, H, L, D)."""
Formula = Callable[..., Any]
"""Of q, k and v."""


def cases(device: torch.device) -> list[Case]:
    """Every model, forward and backward; on the CPU two heads of one picture's first scales."""
    return [_case(model, use, device.type != "cuda") for model in MODELS for use in ("forward", "backward")]


def visible(lengths: Sequence[int]) -> int:
    """Scores of one head that are not masked."""
    return sum(length * end for length, end in zip(lengths, accumulate(lengths), strict=True))


def _case(model: Model, use: str, small: bool) -> Case:
    lengths = [side * side for side in (model.sides[:6] if small else model.sides)]
    batch, heads = (1, 2) if small else (model.batch, model.heads)
    length, width, dtype = sum(lengths), model.width, torch.bfloat16
    shape = (batch, heads, length, width)
    elements, rows = batch * heads * length * width, batch * heads * length
    moved, operations = 4 * elements * dtype.itemsize + 4 * rows, 4 * batch * heads * width * visible(lengths)
    if use == "backward":
        moved += 8 * elements * dtype.itemsize + 4 * rows
        operations += 10 * batch * heads * width * visible(lengths)

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v, grad = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(4))
        if use == "backward":
            for x in (q, k, v):
                x.requires_grad_()
        return q, k, v, grad

    def check(inputs: Inputs) -> Check:
        wide = tuple(x.detach().double() for x in inputs)
        same = against(_by_heads(wide, lengths, use), _by_heads(inputs, lengths, use), peer_tolerance=2e-2)

        def compare(variant: Variant, output: object) -> None:
            if variant.role != "yardstick":
                same(variant, output)

        return compare

    def backend(inputs: Inputs) -> str:
        arguments = (*inputs[:3], lengths, None, 0, width**-0.5)
        return registry["block_causal_attention"].choose("auto", *arguments).name

    return Case(
        name=f"{model.name}/{use}",
        shape={"B": batch, "H": heads, "L": length, "D": width, "scales": len(lengths)},
        dtype=dtype,
        bytes=moved,
        flops=operations,
        make=make,
        variants=_variants(lengths, use, small),
        check=check,
        backend=backend,
        on_matrix_units=True,
    )


def _variants(lengths: list[int], use: str, small: bool) -> Sequence[Variant]:
    def variant(name: str, role: str, prepare: Callable[[torch.Tensor], Formula]) -> Variant:
        """`prepare` takes q and returns the formula: what is done once a schedule is done there."""
        return Variant(name, role, lambda inputs: _call(prepare(inputs[0]), inputs, use))

    def ours(backend: str) -> Callable[[torch.Tensor], Formula]:
        return lambda like: lambda q, k, v: block_causal_attention(q, k, v, lengths, backend=backend)

    found = [variant(OURS, "ours", ours("auto"))]
    if not small:
        found += [variant(f"{OURS} {name}", "backend", ours(name)) for name in ("cuda", "triton", "eager")]
        found.append(variant("FlexAttention, Triton", "peer", lambda like: _flex(lengths, like)))
    found.append(variant("SDPA + mask", "peer", lambda like: _masked(lengths, like)))
    found.append(variant("SDPA, no mask", "yardstick", lambda like: F.scaled_dot_product_attention))
    return found


def _call(formula: Formula, inputs: Inputs, use: str) -> Callable[[], object]:
    q, k, v, grad = inputs
    if use == "forward":
        return lambda: formula(q, k, v)

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        output = formula(q, k, v)
        return output.detach(), *torch.autograd.grad(output, (q, k, v), grad)

    return forward_and_backward


def _by_heads(inputs: tuple[torch.Tensor, ...], lengths: list[int], use: str) -> list[torch.Tensor]:
    """The definition, a few heads at a time: it holds L x L scores of each."""

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_causal_attention(q, k, v, lengths, backend="eager")

    length = inputs[0].shape[2]
    step = max(1, 2**27 // length**2)
    parts = []
    for rows in zip(*(x.detach().flatten(0, 1).split(step) for x in inputs), strict=True):
        q, k, v, grad = (x[None] for x in rows)
        if use == "backward":
            q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        parts.append([x.detach()[0] for x in tensors(_call(eager, (q, k, v, grad), use)())])
    return [torch.cat(part).view(inputs[0].shape) for part in zip(*parts, strict=True)]


def _levels(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))


def _masked(lengths: list[int], like: torch.Tensor) -> Formula:
    """As VAR trains: an additive mask of 0 and -inf."""
    level = _levels(lengths, like.device)
    bias = torch.zeros(len(level), len(level), dtype=like.dtype, device=like.device)
    bias.masked_fill_(level[None, :] > level[:, None], float("-inf"))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None, None])


def _flex(lengths: list[int], like: torch.Tensor) -> Formula:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    level = _levels(lengths, like.device)
    # The mask is looked up at padded positions too.
    level = F.pad(level, (0, -len(level) % 128), value=len(lengths))

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return level[key] <= level[query]

    length = sum(lengths)
    block_mask = create_block_mask(sees, None, None, length, length, device=str(like.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)
