"""Cases of the family `sample`: codes from logits with guidance, top-k and top-p, as published models draw them.

`var-b<batch>/last` is the last scale of VAR-256 (256 tokens a picture), `var-b<batch>/all` what its ten scales hold
together (680 tokens): float16 logits, as under its autocast, V = 4,096. `vila-u-r<rows>` is one depth of VILA-U,
bfloat16 and 16,384 codes, for so many guided pairs. Noise is given, so that every variant draws from the same one and a
variant is right if it draws the same code. Least traffic: both logits and the noise read once, the codes written.

The published code sorts: VAR's and VILA-U's samplers, written after their formulas, with the noise in place of the
generator in torch.multinomial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench._case import OURS, Case, Check, Variant
from unifiedar.ops import registry, sample_codes

__all__ = ["cases"]

Inputs = tuple[torch.Tensor, torch.Tensor]
"""logits (2N, V), conditional rows first; noise (N, V) float32."""


@dataclass(frozen=True)
class Draw:
    """Guided rows of a published model, and how it draws."""

    name: str
    rows: int
    vocabulary: int
    dtype: torch.dtype
    guidance: float
    top_k: int
    top_p: float


DRAWS = (
    *(Draw(f"var-b{batch}/last", 256 * batch, 4096, torch.float16, 1.5, 900, 0.96) for batch in (1, 8, 64)),
    *(Draw(f"var-b{batch}/all", 680 * batch, 4096, torch.float16, 1.5, 900, 0.96) for batch in (1, 8)),
    *(Draw(f"vila-u-r{rows}", rows, 16384, torch.bfloat16, 3.0, 900, 0.96) for rows in (2, 16)),
)


def cases(device: torch.device) -> list[Case]:
    """Every model; on the CPU at most 64 rows, so that it takes seconds."""
    return [_case(draw, device.type != "cuda") for draw in DRAWS]


def _case(draw: Draw, small: bool) -> Case:
    rows, vocabulary = min(draw.rows, 64) if small else draw.rows, draw.vocabulary
    options: dict[str, Any] = {"guidance": draw.guidance, "top_k": draw.top_k, "top_p": draw.top_p}

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        logits = 3 * torch.randn(2 * rows, vocabulary, device=device, generator=generator)
        noise = torch.empty(rows, vocabulary, device=device).exponential_(generator=generator)
        return logits.to(draw.dtype), noise

    def variant(name: str, role: str, backend: str) -> Variant:
        return Variant(
            name, role, lambda inputs: lambda: sample_codes(inputs[0], noise=inputs[1], backend=backend, **options)
        )

    def published(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return _published(logits, noise, draw.guidance, draw.top_k, draw.top_p)

    variants = [variant(OURS, "ours", "auto")]
    if not small:
        variants += [variant(f"{OURS} {name}", "backend", name) for name in ("cuda", "triton", "eager")]
        compiled = torch.compile(published, dynamic=False)
        variants.append(Variant("torch.compile", "peer", lambda inputs: lambda: compiled(*inputs)))
    variants.append(Variant("published code", "peer", lambda inputs: lambda: published(*inputs)))

    def check(inputs: Inputs) -> Check:
        want = sample_codes(inputs[0], noise=inputs[1], backend="eager", **options)

        def compare(variant: Variant, output: object) -> None:
            assert isinstance(output, torch.Tensor)
            differ = int((output != want).sum())
            # Ours draws the same codes; a peer's float32 sums may put another entry at the edge of top-p.
            if differ > (rows / 1000 + 1 if variant.role == "peer" else 0):
                raise ValueError(f"wrong result: {differ} of {rows} codes differ")

        return compare

    def backend(inputs: Inputs) -> str:
        logits, noise = inputs
        arguments = (logits, draw.guidance, None, 1.0, draw.top_k, None, draw.top_p, None, noise)
        return registry["sample_codes"].choose("auto", *arguments).name

    return Case(
        name=draw.name,
        shape={"N": rows, "V": vocabulary},
        dtype=draw.dtype,
        bytes=rows * vocabulary * (2 * draw.dtype.itemsize + 4) + 8 * rows,
        flops=rows * vocabulary * 6,
        make=make,
        variants=variants,
        check=check,
        backend=backend,
    )


def _published(logits: torch.Tensor, noise: torch.Tensor, guidance: float, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k by topk, top-p by a whole sort, two softmaxes and a draw."""
    conditional, unconditional = logits.chunk(2)
    scores = (unconditional + (conditional - unconditional) * guidance).float()
    kth = scores.topk(top_k, dim=-1).values[:, -1:]
    scores = scores.masked_fill(scores < kth, -torch.inf)
    p = scores.softmax(-1)
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    beyond = (ordered.cumsum(-1) >= top_p).roll(1, -1)
    beyond[:, 0] = False
    p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
    p = p / p.sum(-1, keepdim=True)
    return (p / noise).argmax(-1)
