"""Cases of the family `codes`: the code embedding of residual quantizers, at the shapes of published models.

`residual_lookup` in three uses: `forward` (the sum over depth), `cumulative` (the running sums that feed a depth
transformer) and `backward` (the sum with the gradient of a trained codebook). Least traffic: the codes, every
*distinct* codebook row that N x D uniform codes are expected to touch, the output; with the backward also the incoming
gradient and the dense gradient of the codebook.

`code_statistics` at the same shapes, in float32 as the quantizer's training step calls it: the vectors of all depths at
once. Least traffic: vectors and codes read once, sums and counts written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import OURS, Case, Check, Variant, against
from unifiedar.ops import code_statistics, registry, residual_lookup

__all__ = ["cases"]


@dataclass(frozen=True)
class Model:
    """Sizes of a published model: N rows of D codes each, K codes of C channels in each of `tables` codebooks."""

    name: str
    rows: int
    codes: int
    channels: int
    depth: int
    dtype: torch.dtype
    tables: int = 1


# 8192 rows: 32 pictures of 16 x 16 tokens (VILA-U 256), 128 of 8 x 8 (RQ-VAE); 5832: 8 of 27 x 27. "step" is what one
# position of one guided picture embeds while generating; "distinct" a checkpoint whose four codebooks differ.
MODELS = (
    Model("vila-u-256", 8192, 16384, 1024, 4, torch.bfloat16),
    Model("vila-u-256-large", 65536, 16384, 1024, 4, torch.bfloat16),
    Model("vila-u-256-step", 2, 16384, 1024, 4, torch.bfloat16),
    Model("vila-u-256-distinct", 8192, 16384, 1024, 4, torch.bfloat16, tables=4),
    Model("vila-u-384", 5832, 16384, 1152, 16, torch.bfloat16),
    Model("rqvae-imagenet", 8192, 16384, 256, 4, torch.float32),
    Model("rqvae-ffhq", 8192, 2048, 256, 4, torch.float32),
)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""codes (N, D) int64; codebook (K, C) or (D, K, C); gradient of the output (N, C)."""
Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cases(device: torch.device) -> list[Case]:
    """Every model in every use; on the CPU with at most 256 rows of 1024 codes, so that it takes seconds."""
    small = device.type != "cuda"
    found = []
    for model in MODELS:
        if small and model.name.endswith("-large"):
            continue
        for use in ("forward", "cumulative", "backward"):
            if use == "backward" and model.name.endswith("-step"):
                continue
            found.append(_case(model, use, small))
        if model.tables == 1 and not model.name.endswith(("-large", "-step")):
            found.append(_statistics_case(model, small))
    return found


def _case(model: Model, use: str, small: bool) -> Case:
    n, k = (min(model.rows, 256), min(model.codes, 1024)) if small else (model.rows, model.codes)
    c, d, tables = model.channels, model.depth, model.tables
    element = model.dtype.itemsize
    touched = tables * k * (1 - (1 - 1 / k) ** (n * d / tables))
    output = n * c * (d if use == "cumulative" else 1)
    moved = 8 * n * d + element * (touched * c + output)
    operations = n * c * (d - 1)
    if use == "backward":
        moved += element * (n * c + tables * k * c)
        operations += n * c * d

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        codes = torch.randint(k, (n, d), device=device, generator=generator)
        shape = (k, c) if tables == 1 else (d, k, c)
        codebook = torch.randn(shape, device=device, generator=generator).to(model.dtype)
        gradient = torch.randn(n, c, device=device, generator=generator).to(model.dtype)
        return codes, codebook.requires_grad_(use == "backward"), gradient

    def check(inputs: Inputs) -> Check:
        codes, codebook, gradient = inputs
        wide = codebook.detach().double().requires_grad_(codebook.requires_grad)
        formula = _cumulative if use == "cumulative" else _sum
        oracle = _outputs(_call(formula, (codes, wide, gradient.double()), use)())
        eager = _outputs(_call(formula, inputs, use)())
        return against(oracle, eager, peer_tolerance=1e-5 if model.dtype == torch.float32 else 2e-2)

    shape = {"N": n, "K": k, "C": c, "D": d, "tables": tables}
    return Case(
        name=f"{model.name}/{use}",
        shape=shape,
        dtype=model.dtype,
        bytes=round(moved),
        flops=operations,
        make=make,
        variants=_variants(use, small),
        check=check,
        backend=lambda inputs: registry["residual_lookup"].choose("auto", *inputs[:2], use == "cumulative").name,
    )


def _variants(use: str, small: bool) -> Sequence[Variant]:
    def variant(name: str, role: str, formula: Formula) -> Variant:
        return Variant(name, role, lambda inputs: _call(formula, inputs, use))

    def ours(backend: str) -> Formula:
        return lambda codes, codebook: residual_lookup(codes, codebook, cumulative=use == "cumulative", backend=backend)

    summed = use != "cumulative"
    formula = _sum if summed else _cumulative
    found = [variant(OURS, "ours", ours("auto"))]
    if not small:
        # Not on the CPU: there "auto" is the eager backend, and compiling takes minutes for a figure nobody waits for.
        found += [variant(f"{OURS} {name}", "backend", ours(name)) for name in ("cuda", "triton", "eager")]
        compiled = torch.compile(formula, dynamic=False)
        found.append(variant("torch.compile", "peer", compiled))
    found.append(variant("published code", "peer", _published_sum if summed else _published_cumulative))
    found.append(variant(f"F.embedding + {'sum' if summed else 'cumsum'}", "peer", formula))
    if summed:
        found.append(variant("F.embedding_bag", "peer", _bag))
    if use == "forward" and (residual_vq := _residual_vq()) is not None:
        found.append(Variant("vector-quantize-pytorch", "peer", residual_vq))
    return found


def _call(formula: Formula, inputs: Inputs, use: str) -> Callable[[], object]:
    codes, codebook, gradient = inputs
    if use != "backward":
        return lambda: formula(codes, codebook)

    def forward_and_backward() -> tuple[torch.Tensor, torch.Tensor]:
        output = formula(codes, codebook)
        return output.detach(), torch.autograd.grad(output, codebook, gradient)[0]

    return forward_and_backward


def _outputs(output: object) -> list[torch.Tensor]:
    return list(output) if isinstance(output, tuple) else [output]  # type: ignore[list-item]


def _flat(codes: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes into one (rows, C) table: distinct codebooks stand below each other."""
    if codebook.dim() == 2:
        return codes, codebook
    depth, size, channels = codebook.shape
    return codes + size * torch.arange(depth, device=codes.device), codebook.view(depth * size, channels)


def _sum(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return F.embedding(*_flat(codes, codebook)).sum(-2)


def _cumulative(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return F.embedding(*_flat(codes, codebook)).cumsum(-2)


def _bag(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(*_flat(codes, codebook), mode="sum")


def _published_rows(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(N, D, C), as RQ-VAE and VILA-U compute it: one embedding per depth, then concatenated."""
    tables = codebook if codebook.dim() == 3 else [codebook] * codes.shape[-1]
    return torch.cat([F.embedding(codes[:, d : d + 1], table) for d, table in enumerate(tables)], dim=-2)


def _published_sum(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return _published_rows(codes, codebook).sum(-2)


def _published_cumulative(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return _published_rows(codes, codebook).cumsum(-2)


def _residual_vq() -> Callable[[Inputs], Callable[[], object]] | None:
    """vector-quantize-pytorch's sum of codes, or None if it is not installed."""
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        return None

    def bind(inputs: Inputs) -> Callable[[], object]:
        codes, codebook, _ = inputs
        (size, channels), depth = codebook.shape[-2:], codes.shape[-1]
        shared = codebook.dim() == 2
        module: Any = ResidualVQ(dim=channels, num_quantizers=depth, codebook_size=size, shared_codebook=shared)
        module = module.to(codes.device, codebook.dtype).eval()
        with torch.no_grad():
            for d, layer in enumerate(module.layers):
                layer._codebook.embed.copy_((codebook if shared else codebook[d])[None])
        batch = codes[None]

        def call() -> torch.Tensor:
            with torch.no_grad():
                return module.get_output_from_indices(batch)[0]

        return call

    return bind


# ---- code_statistics -------------------------------------------------------------------------------------------------

Statistics = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Vectors (N, D, C), codes (N, D), K -> counts (K,), sums (K, C)."""


def _statistics_case(model: Model, small: bool) -> Case:
    n, k = (min(model.rows, 256), min(model.codes, 1024)) if small else (model.rows, model.codes)
    c, d = model.channels, model.depth

    def make(seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        codes = torch.randint(k, (n, d), device=device, generator=generator)
        return torch.randn(n, d, c, device=device, generator=generator), codes

    def check(inputs: tuple[torch.Tensor, torch.Tensor]) -> Check:
        vectors, codes = inputs
        exact = _index_add(vectors.double(), codes, k)
        return against(exact, _index_add(vectors, codes, k), peer_tolerance=1e-5)

    def variant(name: str, role: str, formula: Statistics) -> Variant:
        return Variant(name, role, lambda inputs: lambda: formula(inputs[0], inputs[1], k))

    def ours(backend: str) -> Statistics:
        return lambda vectors, codes, num_codes: code_statistics(vectors, codes, num_codes, backend=backend)

    variants = [variant(OURS, "ours", ours("auto"))]
    if not small:
        variants += [variant(f"{OURS} {name}", "backend", ours(name)) for name in ("cuda", "triton", "eager")]
        variants.append(variant("torch.compile", "peer", torch.compile(_index_add, dynamic=False)))
    variants.append(variant("published code", "peer", _published_statistics))
    variants.append(variant("index_add", "peer", _index_add))
    variants.append(variant("scatter_add", "peer", _scatter_add))
    return Case(
        name=f"{model.name}/statistics",
        shape={"N": n, "K": k, "C": c, "D": d},
        dtype=torch.float32,
        bytes=4 * n * d * c + 8 * n * d + 4 * k * (c + 1),
        flops=n * d * c,
        make=make,
        variants=variants,
        check=check,
        backend=lambda inputs: registry["code_statistics"].choose("auto", *inputs, k).name,
    )


def _index_add(vectors: torch.Tensor, codes: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, vectors = codes.flatten(), vectors.flatten(0, 1)
    counts = vectors.new_zeros(num_codes).index_add_(0, codes, vectors.new_ones(len(codes)))
    return counts, vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)


def _scatter_add(vectors: torch.Tensor, codes: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, vectors = codes.flatten(), vectors.flatten(0, 1)
    counts = vectors.new_zeros(num_codes).scatter_add_(0, codes, vectors.new_ones(len(codes)))
    where = codes[:, None].expand_as(vectors)
    return counts, vectors.new_zeros(num_codes, vectors.shape[1]).scatter_add_(0, where, vectors)


def _published_statistics(
    vectors: torch.Tensor, codes: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As RQ-VAE and VILA-U compute it, a depth at a time: a (K, N) matrix of zeros and ones, times the vectors."""
    counts, sums = vectors.new_zeros(num_codes), vectors.new_zeros(num_codes, vectors.shape[2])
    for d in range(codes.shape[1]):
        chosen = vectors.new_zeros(num_codes, len(codes)).scatter_(0, codes[:, d][None], 1)
        counts += chosen.sum(dim=1)
        sums += chosen @ vectors[:, d]
    return counts, sums
