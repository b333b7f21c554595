"""Cases of the family `codes`: the code embedding of residual quantizers, at the shapes of published models.

`residual_lookup` in three uses: `forward` (the sum over depth), `cumulative` (the running sums that feed a depth
transformer) and `backward` (the sum with the gradient of a trained codebook). Least traffic: the codes, every
*distinct* codebook row that N x D uniform codes are expected to touch, the output; with the backward also the incoming
gradient and the dense gradient of the codebook.

`residual_quantize` (`quantize`) from float32 to codes and their sum. Its floor is the matrix product of N x K scores of
C channels, D times, at the rate of half-precision products.

`code_statistics` (`statistics`) in float32 as a training step calls it: the vectors of all depths at once.
Least traffic: vectors and codes read once, sums and counts written.

vector-quantize-pytorch's `ResidualVQ`, where it is installed, as published and after `unifiedar.accelerate`:
`residual-vq/<model>` in eval mode, `residual-vq/<model>-train` a training forward, which moves the codebook. The floor
is that of `quantize`.

Bitwise quantization is in `bench/_codes_bitwise.py`, VAR's residual pyramid (`var/encode`, `var/inputs`) in
`bench/_codes_multiscale.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from bench import _codes_bitwise, _codes_multiscale
from bench._case import OURS, Case, Check, Variant, against, tensors
from unifiedar import accelerate
from unifiedar.ops import code_statistics, registry, residual_lookup, residual_quantize

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

# What is searched: the models above whose codebook is one, and two that quantize once into narrow codes: 256 pictures
# of 16 x 16 tokens (LlamaGen's VQ) and 32 pyramids of 680 (VAR's).
SEARCHES = (
    Model("vila-u-256", 8192, 16384, 1024, 4, torch.float32),
    Model("vila-u-384", 5832, 16384, 1152, 16, torch.float32),
    Model("rqvae-imagenet", 8192, 16384, 256, 4, torch.float32),
    Model("rqvae-ffhq", 8192, 2048, 256, 4, torch.float32),
    Model("llamagen", 65536, 16384, 8, 1, torch.float32),
    Model("var", 21760, 4096, 32, 1, torch.float32),
)

MODULES = tuple(model for model in SEARCHES if model.name.startswith("rqvae"))

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
    found += [_search_case(model, small) for model in SEARCHES]
    if _residual_vq_class() is not None:
        found += [_module_case(model, training, small) for model in MODULES for training in (False, True)]
    return found + _codes_bitwise.cases(device) + _codes_multiscale.cases(device)


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


def _residual_vq_class() -> Any:
    """vector-quantize-pytorch's ResidualVQ, or None if it is not installed."""
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        return None
    return ResidualVQ


def _residual_vq_of(codebook: torch.Tensor, depth: int) -> Any:
    """A ResidualVQ in eval mode with the given codebook, (K, C) or (D, K, C)."""
    size, channels = codebook.shape[-2:]
    shared = codebook.dim() == 2
    module = _residual_vq_class()(dim=channels, num_quantizers=depth, codebook_size=size, shared_codebook=shared)
    module = module.to(codebook.device, codebook.dtype).eval()
    with torch.no_grad():
        for d, layer in enumerate(module.layers):
            layer._codebook.embed.copy_((codebook if shared else codebook[d])[None])
            layer._codebook.embed_avg.copy_(layer._codebook.embed)
    return module


def _residual_vq() -> Callable[[Inputs], Callable[[], object]] | None:
    """vector-quantize-pytorch's sum of codes, or None if it is not installed."""
    if _residual_vq_class() is None:
        return None

    def bind(inputs: Inputs) -> Callable[[], object]:
        codes, codebook, _ = inputs
        module, batch = _residual_vq_of(codebook, codes.shape[-1]), codes[None]

        def call() -> torch.Tensor:
            with torch.no_grad():
                return module.get_output_from_indices(batch)[0]

        return call

    return bind


# ---- residual_quantize -----------------------------------------------------------------------------------------------

Pair = tuple[torch.Tensor, torch.Tensor]
"""x (N, C), codebook (K, C); or the result: codes (N, D) int64, quantized (N, C)."""
Search = Callable[[torch.Tensor, torch.Tensor, int], Pair]


def _search_case(model: Model, small: bool) -> Case:
    n, k, c, d = model.rows, model.codes, model.channels, model.depth
    if small:
        n, k = min(n, 64), min(k, 512)

    def make(seed: int, device: torch.device) -> Pair:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(n, c, device=device, generator=generator)
        return x, torch.randn(k, c, device=device, generator=generator)

    def variant(name: str, role: str, search: Search) -> Variant:
        return Variant(name, role, lambda inputs: lambda: search(inputs[0], inputs[1], d))

    def ours(backend: str) -> Search:
        return lambda x, codebook, depth: residual_quantize(x, codebook, depth, backend=backend)

    variants = [variant(OURS, "ours", ours("auto"))]
    if not small:
        variants += [variant(f"{OURS} {name}", "backend", ours(name)) for name in ("triton", "eager")]
        variants.append(variant("torch.compile", "peer", torch.compile(_published_search, dynamic=False)))
        variants.append(variant("published code, TF32", "peer", _published_search_tf32))
    variants.append(variant("published code", "peer", _published_search))
    variants.append(variant("torch.cdist", "peer", _cdist_search))
    if _residual_vq_class() is not None:
        variants.append(Variant("vector-quantize-pytorch", "peer", _residual_vq_search(d)))
    return Case(
        name=f"{model.name}/quantize",
        shape={"N": n, "K": k, "C": c, "D": d},
        dtype=model.dtype,
        bytes=4 * (2 * n * c + k * c) + 8 * n * d,
        flops=2 * n * k * c * d,
        make=make,
        variants=variants,
        check=lambda inputs: _check_search(inputs[0], inputs[1], d),
        backend=lambda inputs: registry["residual_quantize"].choose("auto", *inputs, d, "l2").name,
        on_matrix_units=True,
    )


def _check_search(x: torch.Tensor, codebook: torch.Tensor, depth: int) -> Check:
    """Ours: every code within 1e-6 of the nearest, in float64 along the path taken, and no more codes that are not the
    nearest than with float32's formula. Peers: distances of the first depth within 1 % on average. The share of codes
    that are not the nearest is returned for all."""
    allowed = _far(x, codebook, residual_quantize(x, codebook, depth, backend="eager").codes)[1]

    def check(variant: Variant, output: object) -> float:
        codes, quantized = tensors(output)
        if (codes.shape, quantized.shape) != ((x.shape[0], depth), x.shape):
            raise ValueError(f"wrong shapes: {tuple(codes.shape)} and {tuple(quantized.shape)}")
        if variant.role == "peer":
            excess = _far(x, codebook, codes[:, :1])[2]
            if not excess <= 1e-2:
                raise ValueError(f"wrong result: distances are {excess:.3g} above the least on average, allowed 0.01")
        worst, others, _ = _far(x, codebook, codes)
        if variant.role != "peer" and not (worst <= 1e-6 and others <= allowed):
            raise ValueError(
                f"wrong result: a distance is {worst:.3g} above the least, allowed 1e-6; "
                f"{others} codes are not the nearest, allowed {allowed}"
            )
        return others / codes.numel()

    return check


def _far(x: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor) -> tuple[float, int, float]:
    """Of float64 distances, along the path of the codes: the greatest and the mean excess over the least (relative),
    and how many codes are not the nearest; as (greatest, how many, mean)."""
    residual, book = x.clone(), codebook.double()
    half = book.square().sum(1) / 2
    worst, others, total = 0.0, 0, 0.0
    for d in range(codes.shape[1]):
        for part, chosen in zip(residual.split(1024), codes[:, d].split(1024), strict=True):
            wide = part.double()
            nearest = (half - wide @ book.T).argmin(1)
            least, got = ((wide - book[index]).square().sum(1) for index in (nearest, chosen))
            excess = (got - least) / least.clamp_min(1e-300)
            worst = max(worst, excess.max().item())
            others += int((nearest != chosen).sum())
            total += excess.sum().item()
        residual -= codebook[codes[:, d]]
    return worst, others, total / codes.numel()


def _search(x: torch.Tensor, codebook: torch.Tensor, depth: int, nearest: Callable[..., torch.Tensor]) -> Pair:
    residual, total, codes = x, torch.zeros_like(x), []
    for _ in range(depth):
        codes.append(nearest(residual, codebook))
        chosen = F.embedding(codes[-1], codebook)
        residual = residual - chosen
        total = total + chosen
    return torch.stack(codes, -1), total


def _published_nearest(residual: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """As RQ-VAE and VILA-U search: a matrix of distances a depth, both norms in it, made anew each time."""
    norms = residual.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return torch.addmm(norms, residual, codebook.T, alpha=-2.0).argmin(1)


def _published_search(x: torch.Tensor, codebook: torch.Tensor, depth: int) -> Pair:
    return _search(x, codebook, depth, _published_nearest)


def _cdist_search(x: torch.Tensor, codebook: torch.Tensor, depth: int) -> Pair:
    return _search(x, codebook, depth, lambda residual, codebook: torch.cdist(residual, codebook).argmin(1))


def _residual_vq_search(depth: int) -> Callable[[Pair], Callable[[], Pair]]:
    """vector-quantize-pytorch's forward in eval mode: distances and one-hot rows as matrices, a layer at a time."""

    def bind(inputs: Pair) -> Callable[[], Pair]:
        x, codebook = inputs
        module, batch = _residual_vq_of(codebook, depth), x[None]

        def call() -> Pair:
            with torch.no_grad():
                quantized, codes, _ = module(batch)
            return codes[0], quantized[0]

        return call

    return bind


def _published_search_tf32(x: torch.Tensor, codebook: torch.Tensor, depth: int) -> Pair:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return _published_search(x, codebook, depth)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- vector-quantize-pytorch's module, as published and swapped ------------------------------------------------------


def _module_case(model: Model, training: bool, small: bool) -> Case:
    search = _search_case(model, small)
    depth = model.depth

    def variant(name: str, role: str, swap: bool) -> Variant:
        def bind(inputs: Pair) -> Callable[[], Pair]:
            x, codebook = inputs
            module, batch = _residual_vq_of(codebook, depth).train(training), x[None].requires_grad_(training)
            if swap:
                refused = accelerate(module, verbose=False).refused
                if refused:
                    raise RuntimeError(f"not swapped: {refused}")

            def call() -> Pair:
                quantized, codes, _ = module(batch)
                return codes[0], quantized[0].detach()

            return call

        return Variant(name, role, bind)

    # In training the next layer searches what a float32 rotation left, so no code is the exact nearest to the residual.
    return replace(
        search,
        name=f"residual-vq/{model.name}{'-train' if training else ''}",
        variants=[variant(OURS, "ours", True), variant("vector-quantize-pytorch", "peer", False)],
        check=(lambda inputs: _check_path(inputs[0], inputs[1], depth)) if training else search.check,
    )


def _check_path(x: torch.Tensor, codebook: torch.Tensor, depth: int) -> Check:
    """Distances along the path of the codes at most 1e-4 above the least on average, and the output their sum."""

    def check(variant: Variant, output: object) -> None:
        codes, quantized = tensors(output)
        excess = _far(x, codebook, codes)[2]
        off = (quantized - residual_lookup(codes, codebook, backend="eager")).abs().max().item()
        if not (codes.shape[1] == depth and excess <= 1e-4 and off <= 1e-3):
            raise ValueError(f"wrong result: distances are {excess:.3g} above the least, the sum is off by {off:.3g}")

    return check


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
