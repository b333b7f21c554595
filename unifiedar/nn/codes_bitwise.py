"""Bitwise multi-scale residual quantizer: the tokenizer's quantizer of Infinity (Han et al., arXiv:2412.04431).

It has no parameters; its one key is that of the reference's `MultiScaleBSQ`, the buffer `lfq.mask`, and its methods and
results are the reference's too, so that it can stand in a tokenizer as `vae.quantizer`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.ops import _checks, bitwise_lookup, bitwise_quantize

__all__ = ["BitwiseOutput", "BitwiseQuantizer", "SignOutput", "SignQuantizer"]

Schedule = Sequence[Sequence[int]]


class SignOutput(NamedTuple):
    """Result of `SignQuantizer.forward`, named as the reference names it."""

    quantized: Tensor  # like x: the codes, with the straight-through gradient
    indices: None
    bit_indices: Tensor  # (..., d) int32 of 0 and 1
    entropy_aux_loss: Tensor  # () float32


class BitwiseOutput(NamedTuple):
    """Result of `BitwiseQuantizer.forward`, in the order of the reference."""

    features: Tensor  # (B, d, H, W), or (B, d, T, H, W) if T > 1: the sum of all scales
    indices: list[None]
    bits: list[Tensor]  # (B, t, h, w, d) int32 of 0 and 1, one a scale
    residual_norms: list[Tensor]  # () float32 one a scale, if asked for: share of residuals near zero
    losses: Tensor  # (S,) float32
    inputs: list[Tensor]  # (B, d, t, h, w), one a scale but the first: running sums, pooled (area)


class SignQuantizer(nn.Module):
    """Each channel to its sign, on the unit sphere or not (the reference's `BSQ`; LFQ).

    Args:
        dim: d, channels and bits of a token, from 1 to 64.
        spherical: whether tokens are normalized and codes have length 1 (BSQ), or channels of -1 and 1 (LFQ).
        entropy_weight: of (sample entropy - `diversity` codebook entropy) / `inv_temperature` in the loss.
        commitment_weight: of the mean squared distance of tokens from their codes in the loss.
        diversity: how much the codebook entropy counts.
        inv_temperature: of the entropies' softmax.

    With both weights 0, as in the released tokenizers' code, the loss is 0 and costs nothing.

    Buffers:
        mask (d,) int64: 2^(d - 1), ..., 2, 1, what each bit counts in a packed word.
    """

    mask: Tensor

    def __init__(
        self,
        dim: int,
        *,
        spherical: bool = True,
        entropy_weight: float = 0.0,
        commitment_weight: float = 0.0,
        diversity: float = 1.0,
        inv_temperature: float = 100.0,
    ):
        super().__init__()
        _checks.check_integer("SignQuantizer", "dim", dim, 1)
        if dim > 64:
            raise ValueError(f"SignQuantizer: dim must be from 1 to 64, got {dim}")
        weights = (
            ("entropy_weight", entropy_weight),
            ("commitment_weight", commitment_weight),
            ("diversity", diversity),
        )
        for name, value in (*weights, ("inv_temperature", inv_temperature)):
            _checks.check_number("SignQuantizer", name, value)
        if inv_temperature <= 0:
            raise ValueError(f"SignQuantizer: inv_temperature must be above 0, got {inv_temperature}")
        self.dim = self.codebook_dim = dim
        self.spherical, self.diversity, self.inv_temperature = spherical, diversity, inv_temperature
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.codebook_scale = dim**-0.5 if spherical else 1.0
        self.register_buffer("mask", 2 ** torch.arange(dim - 1, -1, -1))

    @property
    def weighted(self) -> bool:
        """Whether there is a loss to compute."""
        return self.entropy_weight != 0 or self.commitment_weight != 0

    def extra_repr(self) -> str:
        return f"dim={self.dim}, spherical={self.spherical}"

    def forward(self, x: Tensor) -> SignOutput:
        """Quantize x, (B, n, d), or channels first with 4 or more dimensions; in float32 whatever the dtype of x."""
        _checks.check_tensor("SignQuantizer", "x", x)
        tokens = x.movedim(1, -1) if x.ndim >= 4 else x
        codes, bits, loss = self.quantize(tokens.float())
        return SignOutput(codes.movedim(-1, 1) if x.ndim >= 4 else codes, None, bits.int(), loss)

    def quantize(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (..., d) with the straight-through gradient, bits (..., d) uint8 and loss () of tokens (..., d)."""
        found = bitwise_quantize(
            tokens, spherical=self.spherical, inv_temperature=self.inv_temperature if self.weighted else None
        )
        if found.losses is None:
            return found.quantized, found.bits, torch.zeros((), device=tokens.device)
        entropy = found.losses.sample_entropy - self.diversity * found.losses.codebook_entropy
        loss = self.entropy_weight / self.inv_temperature * entropy + self.commitment_weight * found.losses.commitment
        return found.quantized, found.bits, loss

    def indices_to_codes(self, indices: Tensor, label_type: str = "int_label") -> Tensor:
        """Codes of packed words ("int_label", (B, ...) int64) or bits ("bit_label", (B, ..., d)).

        Returns:
            float32, channels last if `indices` has two dimensions, else channels first: like the reference it looks at
            the dimensions of what it is given, so bits (B, n, d) come out as (B, d, n).
        """
        if label_type not in ("int_label", "bit_label"):
            raise ValueError(
                f"SignQuantizer.indices_to_codes: label_type must be 'int_label' or 'bit_label', got {label_type!r}"
            )
        dim = self.dim if label_type == "int_label" else None
        codes = bitwise_lookup(indices, dim=dim, spherical=self.spherical)
        return codes.movedim(-1, 1) if indices.ndim >= 3 else codes


class BitwiseQuantizer(nn.Module):
    """Quantizes a map scale by scale, coarse to fine: the signs of what is left, pooled to the scale.

    Args:
        dim: d, channels of the map and bits of a token, from 1 to 64.
        scales: (h, w) or (t, h, w) of each scale, the last one the size of the map; None if every call names its own.
        spherical, entropy_weight, commitment_weight, diversity, inv_temperature: of `SignQuantizer`.

    Buffers:
        lfq.mask (d,) int64: as in `SignQuantizer`.
    """

    z_interplote_up, z_interplote_down = "trilinear", "area"  # as the reference spells them for those who ask

    def __init__(
        self,
        dim: int,
        scales: Schedule | None = None,
        *,
        spherical: bool = True,
        entropy_weight: float = 0.0,
        commitment_weight: float = 0.0,
        diversity: float = 1.0,
        inv_temperature: float = 100.0,
    ):
        super().__init__()
        self.lfq = SignQuantizer(
            dim,
            spherical=spherical,
            entropy_weight=entropy_weight,
            commitment_weight=commitment_weight,
            diversity=diversity,
            inv_temperature=inv_temperature,
        )
        self.dim, self.spherical, self.scales = dim, spherical, scales

    def forward(
        self,
        x: Tensor,
        scale_schedule: Schedule | None = None,
        *,
        return_residual_norm_per_scale: bool = False,
    ) -> BitwiseOutput:
        """Quantize x (B, d, H, W) or (B, d, T, H, W), in float32 whatever its dtype and under autocast.

        features pass their gradient straight through every scale's signs, as the reference's do; values are the exact
        sums of codes, which the reference's miss by the rounding of u + (code - u).
        """
        _checks.check_tensor("BitwiseQuantizer", "x", x)
        maps = (x if x.ndim == 5 else x.unsqueeze(2)).float()
        scales = self._schedule(scale_schedule)
        train = torch.is_grad_enabled() and maps.requires_grad
        found = bitwise_quantize(
            maps,
            scales,
            spherical=self.spherical,
            inputs="area",
            residuals=train or self.lfq.weighted or return_residual_norm_per_scale,
        )
        assert found.inputs is not None
        features, losses = found.quantized, torch.zeros(len(scales), device=x.device)
        if train or self.lfq.weighted:
            assert found.residuals is not None
            # Losses are means over a scale's tokens; without them all tokens are one.
            tokens = self.split(found.residuals, scales) if self.lfq.weighted else [found.residuals]
            codes, _, each = zip(*(self.lfq.quantize(part) for part in tokens), strict=True)
            if self.lfq.weighted:
                losses = torch.stack(each)
            if train:
                features = bitwise_lookup(torch.cat(codes, 1), scales)
        norms: list[Tensor] = []
        if return_residual_norm_per_scale:
            assert found.residuals is not None
            near = 0.05 * self.lfq.codebook_scale
            norms = [(part.abs() < near).float().mean() for part in self.split(found.residuals.detach(), scales)]
        return BitwiseOutput(
            features.squeeze(2) if maps.shape[2] == 1 else features,
            [None] * len(scales),
            [
                part.int().unflatten(1, tuple(scale))
                for part, scale in zip(self.split(found.bits, scales), scales, strict=True)
            ],
            norms,
            losses,
            [
                part.mT.unflatten(2, tuple(scale))
                for part, scale in zip(self.split(found.inputs, scales[1:]), scales[1:], strict=True)
            ],
        )

    def get_codes_from_indices(self, indices_list: Sequence[Tensor], label_type: str = "int_label") -> Tensor:
        """Sum (B, d, T, H, W) of the codes of every scale: words (B, t, h, w) int64, or bits (B, t, h, w, d)."""
        scales = [tuple(indices.shape[1:4]) for indices in indices_list]
        dim = self.dim if label_type == "int_label" else None
        tokens = torch.cat([indices.flatten(1, 3) for indices in indices_list], 1)
        return bitwise_lookup(tokens, scales, dim=dim, spherical=self.spherical)

    @torch.no_grad()
    def self_correct(
        self,
        features: Tensor,
        scale_schedule: Schedule | None = None,
        *,
        strength: float = 0.3,
        noisy_scales: int | None = None,
        flips: Tensor | None = None,
        patchify: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What the transformer trains on: inputs that carry the errors of flipped bits, and the bits that answer them.

        Args:
            features: (B, d, H, W) or (B, d, T, H, W), the encoder's.
            scale_schedule: (h, w) or (t, h, w) of each scale; None is the module's.
            strength: the largest share of bits that are flipped; see `draw_flips`.
            noisy_scales: how many scales, from the coarsest, have flipped bits; None is all.
            flips: (B, L, d) bool, in place of drawing them.
            patchify: whether 2 x 2 positions of 4 d channels make one token, as in Infinity-8B.
            generator: of the drawing.

        Returns:
            Inputs (B, L - n_0, d) float32 of all scales but the first, and each scale's bits (B, n, d) uint8; with
            `patchify` a quarter of the tokens and four times the channels, channel 4 c + 2 dy + dx.
        """
        scales = self._schedule(scale_schedule)
        if flips is None:
            flips = self.draw_flips(
                len(features), scales, strength=strength, noisy_scales=noisy_scales, generator=generator,
                device=features.device,
            )  # fmt: skip
        maps = (features if features.ndim == 5 else features.unsqueeze(2)).float()
        found = bitwise_quantize(maps, scales, spherical=self.spherical, flips=flips, inputs="trilinear")
        assert found.inputs is not None
        if not patchify:
            return found.inputs, self.split(found.bits, scales)
        inputs = [
            _patches(part, scale) for part, scale in zip(self.split(found.inputs, scales[1:]), scales[1:], strict=True)
        ]
        bits = [_patches(part, scale) for part, scale in zip(self.split(found.bits, scales), scales, strict=True)]
        return torch.cat(inputs, 1), bits

    def draw_flips(
        self,
        batch: int,
        scale_schedule: Schedule | None = None,
        *,
        strength: float = 0.3,
        noisy_scales: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Which bits to flip, (B, L, d) bool: each with a probability that every scale draws for its whole batch.

        Args:
            batch: B.
            scale_schedule: (h, w) or (t, h, w) of each scale; None is the module's.
            strength: p; probabilities are drawn from 0, .01, ..., p, all alike.
            noisy_scales: how many scales, from the coarsest, have flipped bits; None is all.
            generator, device: of the drawing.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"BitwiseQuantizer.draw_flips: strength must be from 0 to 1, got {strength}")
        scales = self._schedule(scale_schedule)
        lengths = [t * h * w for t, h, w in scales]
        noisy = len(scales) if noisy_scales is None else noisy_scales
        hundredths = torch.randint(round(100 * strength) + 1, (len(scales),), generator=generator, device=device)
        each = hundredths * 0.01
        each = torch.cat([each[s].expand(n) if s < noisy else each.new_zeros(n) for s, n in enumerate(lengths)])
        return torch.rand((batch, sum(lengths), self.dim), generator=generator, device=device) < each[:, None]

    def _schedule(self, scales: Schedule | None) -> list[tuple[int, int, int]]:
        scales = self.scales if scales is None else scales
        if scales is None:
            raise ValueError("BitwiseQuantizer: scale_schedule must be given where the module has none, got None")
        triples = [tuple(scale) if len(scale) == 3 else (1, *scale) for scale in scales]
        return [(t, h, w) for t, h, w in triples]

    @staticmethod
    def split(tokens: Tensor, scales: Schedule) -> list[Tensor]:
        """Tokens (B, L, ...) of all scales as a list of views, one a scale."""
        return list(tokens.split([t * h * w for t, h, w in scales], dim=1))


def _patches(tokens: Tensor, scale: Sequence[int]) -> Tensor:
    """Tokens (B, h w, d) of a scale of one frame as patches (B, h w / 4, 4 d)."""
    _, h, w = scale
    return F.pixel_unshuffle(tokens.mT.unflatten(2, (h, w)), 2).flatten(2).mT
