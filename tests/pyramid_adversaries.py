"""Codebooks and features for which float32 does not tell the nearest code of a pyramid's scale."""

import pytest
import torch

__all__ = ["adversaries", "adverse", "check_adverse"]


def near_ties(num_codes, channels, generator):
    """Codes around one point, at distances from the pixels that differ by float32's rounding and less."""
    centre = torch.randn(channels, generator=generator)
    spread = 2.0 ** -torch.randint(14, 30, (num_codes, 1), generator=generator).float()
    return centre + torch.randn(num_codes, channels, generator=generator) * spread


def nearer_ties(num_codes, channels, generator):
    """All at distances whose differences are rounding's."""
    return torch.randn(channels, generator=generator) + torch.randn(num_codes, channels, generator=generator) * 2.0**-21


def far_apart(num_codes, channels, generator):
    return torch.randn(num_codes, channels, generator=generator) * 10.0 ** (
        12 * torch.rand(num_codes, 1, generator=generator) - 6
    )


def huge(num_codes, channels, generator):
    """Squares overflow float32: float64 decides all rows."""
    return torch.randn(num_codes, channels, generator=generator) * 3e25


def tiny(num_codes, channels, generator):
    """Squares are below float32's least: float64 decides all rows."""
    return torch.randn(num_codes, channels, generator=generator) * 1e-30


def small(num_codes, channels, generator):
    """Squares are among float32's last: they keep a few bits, and a bound relative to them keeps none."""
    spread = torch.randn(num_codes, channels, generator=generator) * 2.0**-6
    return (torch.randn(channels, generator=generator) + spread) * 1e-21


def some_huge(num_codes, channels, generator):
    """One in five has squares that overflow, and among them is the nearest of what is as large."""
    codes = torch.randn(num_codes, channels, generator=generator)
    return codes * torch.where(torch.rand(num_codes, 1, generator=generator) < 0.2, 3e25, 1e24)


adversaries = pytest.mark.parametrize("make", [near_ties, nearer_ties, far_apart, huge, tiny, small, some_huge])


def adverse(make, channels):
    """features (4, C, 4, 8) about as large as the codebook (200, C), and that."""
    generator = torch.Generator().manual_seed(3)
    codebook = make(200, channels, generator)
    size = codebook.abs().median().item()
    return torch.randn(4, channels, 4, 8, generator=generator) * size, codebook


def check_adverse(features, codebook, got):
    """Every code is float64's choice; equal but for less than the bits of a word that codes take, the lowest's."""
    rows = features.double().flatten(2).transpose(1, 2)
    loss = (rows.unsqueeze(2) - codebook.double()).square().sum(3)
    chosen, best = loss.gather(2, got.unsqueeze(2))[..., 0], loss.amin(2)
    assert (chosen <= best * (1 + 2.0**-40)).all()
    clear = (loss <= best.unsqueeze(2) * (1 + 2.0**-39)).sum(2) == 1
    assert torch.equal(got[clear], loss.argmin(2)[clear])
