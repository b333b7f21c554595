"""Cases of bitwise quantization, part of the family `codes`: Infinity's tokenizer at 1024 pixels (d = 32, 13 scales up
to 64 x 64, 10,521 tokens) and the losses of a tokenizer's training.

`encode` takes a map to its bits and their sum, `correct` also flips given bits on the way and makes the inputs of the
later scales (what a transformer's training step starts with), `decode` takes bits to their sum. `losses` is the
straight-through quantization of all scales' tokens with the entropies, forward and backward. Least traffic: inputs read
once, outputs written once; running sums count nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import OURS, Case, Check, Variant, against, tensors
from unifiedar.ops import bitwise_lookup, bitwise_quantize, registry

__all__ = ["cases"]

Scales = list[tuple[int, int, int]]
INFINITY: Scales = [(1, n, n) for n in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)]
DIM = 32
TEMPERATURE = 100.0

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""features (B, d, 1, H, W); bits (B, L, d) uint8; flips (B, L, d) bool."""
Formula = Callable[..., Any]


def cases(device: torch.device) -> list[Case]:
    """One picture and eight; on the CPU up to 16 x 16."""
    small = device.type != "cuda"
    scales = INFINITY[:7] if small else INFINITY
    found = [_pyramid_case(use, batch, scales, small) for use in ("encode", "correct", "decode") for batch in (1, 8)]
    return found + [_losses_case(batch, scales, small) for batch in ((1,) if small else (8, 64))]


def _length(scales: Scales) -> int:
    return sum(t * h * w for t, h, w in scales)


def _split(tokens: torch.Tensor, scales: Scales) -> list[torch.Tensor]:
    return list(tokens.split([t * h * w for t, h, w in scales], 1))


def _pyramid_case(use: str, batch: int, scales: Scales, small: bool) -> Case:
    length, size = _length(scales), scales[-1]
    pixels = size[1] * size[2]
    moved = batch * DIM * (length + (4 if use == "decode" else 8) * pixels)
    if use == "correct":
        moved += batch * DIM * (length + 4 * (length - 1))

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        features = torch.randn(batch, DIM, *size, device=device, generator=generator)
        bits = torch.rand(batch, length, DIM, device=device, generator=generator) < 0.5
        flips = torch.rand(batch, length, DIM, device=device, generator=generator) < 0.15
        return features, bits.to(torch.uint8), flips

    def ours(backend: str) -> Formula:
        if use == "decode":
            return lambda features, bits, flips: bitwise_lookup(bits, scales, backend=backend)
        mode = "trilinear" if use == "correct" else None

        def run(features: torch.Tensor, bits: torch.Tensor, flips: torch.Tensor) -> object:
            masks = flips if use == "correct" else None
            found = bitwise_quantize(features, scales, flips=masks, inputs=mode, backend=backend)
            return (found.bits, found.quantized) if mode is None else (found.bits, found.quantized, found.inputs)

        return run

    published: dict[str, Formula] = {
        "encode": lambda features, bits, flips: _encode(features, scales),
        "correct": lambda features, bits, flips: _correct(features, flips, scales),
        "decode": lambda features, bits, flips: _decode(bits, scales),
    }

    def check(inputs: Inputs) -> Check:
        if use == "decode":
            codes = (2.0 * inputs[1] - 1) * DIM**-0.5
            exact = _sum(codes.double(), scales)[0]
            return against([exact], [_sum(codes, scales)[0]], peer_tolerance=1e-5)
        return _check_path(inputs, scales, use == "correct")

    def backend(inputs: Inputs) -> str:
        schedule = [size for scale in scales for size in scale]
        if use == "decode":
            op, arguments = "bitwise_sum", (inputs[1], None, schedule, 0, len(scales), True, False)
            return registry[op].choose("auto", *arguments).name
        return registry["bitwise_pyramid"].choose("auto", inputs[0], None, schedule, True, "", False).name

    return Case(
        name=f"infinity-2b-b{batch}/{use}",
        shape={"B": batch, "d": DIM, "L": length, "H": size[1], "W": size[2]},
        dtype=torch.float32,
        bytes=moved,
        flops=batch * DIM * len(scales) * pixels * 9,
        make=make,
        variants=_variants(ours, published[use], small),
        check=check,
        backend=backend,
    )


def _variants(ours: Callable[[str], Formula], published: Formula, small: bool) -> list[Variant]:
    def variant(name: str, role: str, formula: Formula) -> Variant:
        return Variant(name, role, lambda inputs: lambda: formula(*inputs))

    found = [variant(OURS, "ours", ours("auto"))]
    if not small:
        found += [variant(f"{OURS} {name}", "backend", ours(name)) for name in ("triton", "eager")]
        found.append(variant("torch.compile", "peer", torch.compile(published, dynamic=False)))
    return [*found, variant("published code", "peer", published)]


def _check_path(inputs: Inputs, scales: Scales, correct: bool) -> Check:
    """Every bit is the sign of what is left in float64 along the path of the bits themselves, and sums are theirs.

    Residuals within 1e-6 of zero, of the largest feature, may take either bit. The share of bits that are another is
    returned.
    """
    features, _, flips = inputs
    wide = features.double()
    largest = wide.abs().max()

    def check(variant: Variant, output: object) -> float:
        bits, total, *follow = tensors(output)
        used = bits.bool() ^ flips if correct else bits.bool()
        exact, following, left = _sum((2.0 * used.double() - 1) * DIM**-0.5, scales, wide)
        others = bits.bool() != (left > 0)
        wrong = others & (left.abs() > 1e-6 * largest)
        if wrong.any():
            raise ValueError(f"wrong result: {int(wrong.sum())} bits are not the sign of what is left")
        for one, right in zip((total, *follow), (exact, following), strict=False):
            error = (one.double().view(right.shape) - right).abs().max().item()
            if not error <= 1e-5:
                raise ValueError(f"wrong result: {variant.name} is off by {error:.3g}, allowed 1e-5")
        return others.float().mean().item()

    return check


def _sum(
    codes: torch.Tensor, scales: Scales, features: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of all scales' codes, inputs of the later scales, and (with features) what was left at each."""
    total = codes.new_zeros(codes.shape[0], codes.shape[2], *scales[-1])
    follow, left = [], []
    for s, (part, scale) in enumerate(zip(_split(codes, scales), scales, strict=True)):
        if features is not None:
            left.append(F.interpolate(features - total, scale, mode="area").flatten(2).mT)
        total = total + F.interpolate(part.mT.unflatten(2, scale).contiguous(), scales[-1], mode="trilinear")
        if s + 1 < len(scales):
            follow.append(F.interpolate(total, scales[s + 1], mode="trilinear").flatten(2).mT)
    return total, torch.cat(follow, 1), torch.cat(left, 1) if left else codes


def _signs(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the published quantizer does it: channels last, normalized, straight through; codes and bits."""
    tokens = F.normalize(rest.movedim(1, -1), dim=-1)
    one = torch.ones((), device=rest.device)
    signs = torch.where(tokens > 0, one, -one) * DIM**-0.5
    codes = tokens + (signs - tokens).detach()
    return codes.movedim(-1, 1), (codes > 0).int()


def _codes(bits: torch.Tensor) -> torch.Tensor:
    scale = DIM**-0.5
    return F.normalize(bits * scale * 2 - scale, dim=-1).movedim(-1, 1)


def _encode(features: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
    rest, total, found = features, torch.zeros_like(features), []
    for scale in scales:
        last = scale == scales[-1]
        codes, bits = _signs(rest if last else F.interpolate(rest, scale, mode="area"))
        found.append(bits.flatten(1, 3))
        codes = codes if last else F.interpolate(codes, scales[-1], mode="trilinear")
        rest, total = rest - codes, total + codes
    return torch.cat(found, 1), total


def _correct(
    features: torch.Tensor, flips: torch.Tensor, scales: Scales
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total, found, follow = torch.zeros_like(features), [], []
    for s, (scale, mask) in enumerate(zip(scales, _split(flips, scales), strict=True)):
        rest = features - total
        _, bits = _signs(rest if scale == scales[-1] else F.interpolate(rest, scale, mode="area"))
        found.append(bits.flatten(1, 3))
        used = torch.where(mask.unflatten(1, scale), 1 - bits, bits)
        total = total + F.interpolate(_codes(used), scales[-1], mode="trilinear")
        if s + 1 < len(scales):
            follow.append(F.interpolate(total, scales[s + 1], mode="trilinear").flatten(2).mT)
    return torch.cat(found, 1), total, torch.cat(follow, 1)


def _decode(bits: torch.Tensor, scales: Scales) -> torch.Tensor:
    total = bits.new_zeros((), dtype=torch.float32)
    for part, scale in zip(_split(bits, scales), scales, strict=True):
        total = total + F.interpolate(_codes(part.int().unflatten(1, scale)), scales[-1], mode="trilinear")
    return total


# ---- losses ----------------------------------------------------------------------------------------------------------


def _losses_case(batch: int, scales: Scales, small: bool) -> Case:
    rows = batch * _length(scales)

    def make(seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, DIM, device=device, generator=generator)
        return x.requires_grad_(), torch.randn(rows, DIM, device=device, generator=generator)

    def differentiated(formula: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> Formula:
        def run(x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
            code, sample, codebook, commitment = formula(x)
            loss = (sample - codebook) / TEMPERATURE + commitment
            (slope,) = torch.autograd.grad((code, loss), x, (grad, torch.ones_like(loss)))
            return [code.detach(), loss.detach(), slope]

        return run

    def ours(backend: str) -> Formula:
        def formula(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = bitwise_quantize(x, inv_temperature=TEMPERATURE, backend=backend)
            assert found.losses is not None
            return found.quantized, *found.losses[:3]

        return differentiated(formula)

    def check(inputs: tuple[torch.Tensor, torch.Tensor]) -> Check:
        x, grad = inputs
        exact = differentiated(_losses)(x.detach().double().requires_grad_(), grad.double())
        return against(exact, differentiated(_losses)(x, grad), peer_tolerance=1e-3)

    return Case(
        name=f"infinity-2b-b{batch}/losses",
        shape={"N": rows, "d": DIM},
        dtype=torch.float32,
        bytes=21 * rows * DIM,
        flops=60 * rows * DIM,
        make=make,
        variants=_variants(ours, differentiated(_losses), small),
        check=check,
        backend=lambda inputs: registry["bitwise_quantize"].choose("auto", inputs[0], True, False, TEMPERATURE).name,
    )


def _losses(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As BSQ's published code has them: probabilities of both values, 1e-8 inside the logarithms."""
    unit = F.normalize(x, dim=-1)
    scale = DIM**-0.5
    code = unit + (torch.where(unit > 0, scale, -scale) - unit).detach()
    p = torch.sigmoid(-4 * unit * scale * TEMPERATURE)
    both = torch.stack([p, 1 - p], -1)
    mean = both.mean(0)
    sample = -(both * torch.log(both + 1e-8)).sum((1, 2)).mean()
    codebook = -(mean * torch.log(mean + 1e-8)).sum()
    return code, sample, codebook, (code.detach() - unit).square().sum(-1).mean()
