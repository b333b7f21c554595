"""Cases of the family `codes` that are VAR's residual pyramid, at the sizes of its published tokenizer for 256 pixels.

`encode` is a map of features to the codes of all ten scales (what training a transformer does with every batch);
`inputs` is codes to what the transformer reads under teacher forcing, `steps` the same in a generation, one scale after
the other, and the last sum. Least traffic of `encode`: features, codebook and convolutions read once, codes written; of
`inputs`: the codes of nine scales, the codebook rows they are expected to touch, convolutions, the result; of `steps`
the sum so far is read and written at every scale. The work that counts is the search (2 L K C) and the convolutions of
nine scales; the search could run on matrix units, so its floor is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench._case import OURS, Case, Check, Variant, against, tensors
from unifiedar.ops import (
    Phi,
    multiscale_inputs,
    multiscale_lookup,
    multiscale_quantize,
    next_scale_input,
    registry,
)

__all__ = ["cases"]

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LENGTHS = [side * side for side in SIDES]
CHANNELS, CODES, CONVOLUTIONS = 32, 4096, 4


class Inputs(NamedTuple):
    """Of a call: features (B, C, H, W), codebook (K, C), weight (P, C, C, 3, 3), bias (P, C), codes (B, L)."""

    features: torch.Tensor
    codebook: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    codes: torch.Tensor


def cases(device: torch.device) -> list[Case]:
    """One picture and 32; on the CPU one, with 512 codes."""
    small = device.type != "cuda"
    batches = (1,) if small else (1, 32)
    return [make(batch, 512 if small else CODES, small) for make in (_encode, _inputs, _steps) for batch in batches]


def _make(batch: int, num_codes: int) -> Callable[[int, torch.device], Inputs]:
    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator)

        return Inputs(
            normal(batch, CHANNELS, SIDES[-1], SIDES[-1]),
            0.5 * normal(num_codes, CHANNELS),
            0.05 * normal(CONVOLUTIONS, CHANNELS, CHANNELS, 3, 3),
            0.05 * normal(CONVOLUTIONS, CHANNELS),
            torch.randint(num_codes, (batch, sum(LENGTHS)), device=device, generator=generator),
        )

    return make


def _convolution_flops(batch: int) -> int:
    return (len(SIDES) - 1) * batch * LENGTHS[-1] * 2 * 9 * CHANNELS**2


def _operator_arguments(one: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, list[int]]:
    return one.codebook, one.weight, one.bias, 0.5, [side for side in SIDES for _ in range(2)]


Work = Callable[[Inputs], object]


def _case(
    name: str,
    batch: int,
    num_codes: int,
    small: bool,
    ours: Callable[[str], Work],
    peer: Work,
    kernels: tuple[str, ...] = ("triton",),
    **rest,
) -> Case:
    def variant(title: str, role: str, work: Work) -> Variant:
        return Variant(title, role, lambda inputs: lambda: work(inputs))

    variants = [variant(OURS, "ours", ours("auto"))]
    if not small:
        variants += [variant(f"{OURS} {one}", "backend", ours(one)) for one in (*kernels, "eager")]
        variants.append(variant("torch.compile", "peer", torch.compile(peer, dynamic=False)))
    variants.append(variant("published code", "peer", peer))
    return Case(
        name=f"var/{name}-b{batch}",
        shape={"B": batch, "L": sum(LENGTHS), "K": num_codes, "C": CHANNELS},
        dtype=torch.float32,
        make=_make(batch, num_codes),
        variants=variants,
        **rest,
    )


def _phi_bytes() -> int:
    return 4 * CONVOLUTIONS * (9 * CHANNELS**2 + CHANNELS)


# ---- features to codes -----------------------------------------------------------------------------------------------


def _encode(batch: int, num_codes: int, small: bool) -> Case:
    def ours(backend: str) -> Work:
        return lambda one: multiscale_quantize(
            one.features, one.codebook, Phi(one.weight, one.bias), SIDES, backend=backend
        )

    return _case(
        "encode",
        batch,
        num_codes,
        small,
        ours,
        _published_encode,
        ("cuda", "triton"),
        bytes=4 * CHANNELS * (batch * LENGTHS[-1] + num_codes) + _phi_bytes() + 8 * batch * sum(LENGTHS),
        flops=2 * batch * sum(LENGTHS) * num_codes * CHANNELS + _convolution_flops(batch),
        check=_check_encode,
        backend=lambda one: (
            registry["multiscale_quantize"].choose("auto", one.features, *_operator_arguments(one), "l2").name
        ),
        on_matrix_units=True,
    )


def _check_encode(one: Inputs) -> Check:
    """Ours: every code within 1e-5 of the nearest, in float64 along the path taken (which has no rounding of the parts
    before), and no more codes that are not the nearest than eager float32's, give or take two. Peers: distances within
    1 % on average. The share of codes that are not the nearest is returned for all."""
    phi = Phi(one.weight, one.bias)
    allowed = _far(one, multiscale_quantize(one.features, one.codebook, phi, SIDES, backend="eager"))[1] + 2

    def check(variant: Variant, output: object) -> float:
        codes = list(tensors(output))
        wanted = [(one.features.shape[0], length) for length in LENGTHS]
        if [tuple(found.shape) for found in codes] != wanted:
            raise ValueError(f"wrong shapes: {[tuple(found.shape) for found in codes]} instead of {wanted}")
        worst, others, mean = _far(one, codes)
        if variant.role == "peer":
            if not mean <= 1e-2:
                raise ValueError(f"wrong result: distances are {mean:.3g} above the least on average, allowed 0.01")
        elif not (worst <= 1e-5 and others <= allowed):
            raise ValueError(
                f"wrong result: a distance is {worst:.3g} above the least, allowed 1e-5; "
                f"{others} codes are not the nearest, allowed {allowed}"
            )
        return others / sum(found.numel() for found in codes)

    return check


def _far(one: Inputs, codes: list[torch.Tensor]) -> tuple[float, int, float]:
    """Of float64 distances: the greatest excess over the least (relative), how many codes are not the nearest, and the
    mean excess."""
    table = one.codebook.double()
    phi = Phi(one.weight.double(), one.bias.double())
    sums = multiscale_lookup(codes, table, phi, SIDES, cumulative=True, backend="eager")
    half = table.square().sum(1) / 2
    worst, others, total = 0.0, 0, 0.0
    for s, (side, chosen) in enumerate(zip(SIDES, codes, strict=True)):
        rest = one.features.double() - (sums[s - 1] if s else 0)
        rows = F.interpolate(rest, size=(side, side), mode="area").flatten(2).transpose(1, 2).flatten(0, 1)
        nearest = (half - rows @ table.T).argmin(1)
        least, got = ((rows - table[index]).square().sum(1) for index in (nearest, chosen.flatten()))
        excess = (got - least) / least.clamp_min(1e-300)
        worst = max(worst, excess.max().item())
        others += int((nearest != chosen.flatten()).sum())
        total += excess.sum().item()
    return worst, others, total / sum(found.numel() for found in codes)


def _part(rows: torch.Tensor, side: int, one: Inputs, p: int) -> torch.Tensor:
    """(B, h w, C) vectors to what they add to the map, (B, C, H, W)."""
    maps = rows.transpose(1, 2).reshape(rows.shape[0], -1, side, side)
    if side != SIDES[-1]:
        maps = F.interpolate(maps, size=(SIDES[-1], SIDES[-1]), mode="bicubic")
    return 0.5 * maps + 0.5 * F.conv2d(maps, one.weight[p], one.bias[p], padding=1)


def _published_encode(one: Inputs) -> list[torch.Tensor]:
    """As VAR encodes: a matrix of distances a scale, both norms in it, made anew each time."""
    rest, total, codes = one.features.clone(), torch.zeros_like(one.features), []
    for side, p in zip(SIDES, Phi.indices_of(CONVOLUTIONS, len(SIDES)), strict=True):
        pooled = F.interpolate(rest, size=(side, side), mode="area") if side != SIDES[-1] else rest
        rows = pooled.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
        distances = rows.square().sum(1, keepdim=True) + one.codebook.square().sum(1)
        distances.addmm_(rows, one.codebook.T, alpha=-2)
        codes.append(distances.argmin(1).view(rest.shape[0], -1))
        part = _part(F.embedding(codes[-1], one.codebook), side, one, p)
        total += part
        rest -= part
    return codes


# ---- codes to inputs -------------------------------------------------------------------------------------------------


def _inputs(batch: int, num_codes: int, small: bool) -> Case:
    read = sum(LENGTHS[:-1])
    touched = num_codes * (1 - (1 - 1 / num_codes) ** (batch * read))

    def ours(backend: str) -> Work:
        def work(one: Inputs) -> torch.Tensor:
            codes = one.codes.split(LENGTHS, dim=1)
            return multiscale_inputs(codes, one.codebook, Phi(one.weight, one.bias), SIDES, backend=backend)

        return work

    def check(one: Inputs) -> Check:
        features, codebook, weight, bias = (part.double() for part in one[:4])
        wide = Inputs(features, codebook, weight, bias, one.codes)
        return against([_published_inputs(wide)], [_published_inputs(one)], peer_tolerance=2e-3)

    return _case(
        "inputs",
        batch,
        num_codes,
        small,
        ours,
        _published_inputs,
        bytes=round(8 * batch * read + 4 * CHANNELS * (touched + batch * (sum(LENGTHS) - 1)) + _phi_bytes()),
        flops=_convolution_flops(batch),
        check=check,
        backend=lambda one: (
            registry["multiscale_lookup"].choose("auto", one.codes[:, :read], *_operator_arguments(one), "inputs").name
        ),
    )


def _published_inputs(one: Inputs) -> torch.Tensor:
    return torch.cat(_published_steps(one)[1:], 1)


# ---- a generation ----------------------------------------------------------------------------------------------------


def _steps(batch: int, num_codes: int, small: bool) -> Case:
    def ours(backend: str) -> Work:
        def work(one: Inputs) -> list[torch.Tensor]:
            total, phi = torch.zeros_like(one.features), Phi(one.weight, one.bias)
            found: list[torch.Tensor] = []
            for s, codes in enumerate(one.codes.split(LENGTHS, dim=1)):
                total, following = next_scale_input(total, codes, one.codebook, phi, SIDES, s, backend=backend)
                found += [] if following is None else [following]
            return [total, *found]

        return work

    def check(one: Inputs) -> Check:
        features, codebook, weight, bias = (part.double() for part in one[:4])
        wide = Inputs(features, codebook, weight, bias, one.codes)
        return against(_published_steps(wide), _published_steps(one), peer_tolerance=2e-3)

    touched = num_codes * (1 - (1 - 1 / num_codes) ** (batch * sum(LENGTHS)))
    maps = 2 * len(SIDES) * batch * LENGTHS[-1]
    return _case(
        "steps",
        batch,
        num_codes,
        small,
        ours,
        _published_steps,
        ("cuda", "triton"),
        bytes=round(8 * batch * sum(LENGTHS) + 4 * CHANNELS * (touched + maps + batch * sum(LENGTHS)) + _phi_bytes()),
        flops=_convolution_flops(batch) * len(SIDES) // (len(SIDES) - 1),
        check=check,
        backend=lambda one: (
            registry["next_scale_input"]
            .choose("auto", one.features, one.codes[:, :1], *_operator_arguments(one), 0)
            .name
        ),
    )


def _published_steps(one: Inputs) -> list[torch.Tensor]:
    """As VAR computes them, a sum in place, scale after scale: the last sum, and what is read before each scale."""
    total, found = torch.zeros_like(one.features), []
    codes = one.codes.split(LENGTHS, dim=1)
    indices = Phi.indices_of(CONVOLUTIONS, len(SIDES))
    for s, side in enumerate(SIDES):
        total += _part(F.embedding(codes[s], one.codebook), side, one, indices[s])
        if s + 1 < len(SIDES):
            pooled = F.interpolate(total, size=(SIDES[s + 1], SIDES[s + 1]), mode="area")
            found.append(pooled.flatten(2).transpose(1, 2))
    return [total, *found]
