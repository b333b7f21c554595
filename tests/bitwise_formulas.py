"""Bitwise quantization by formulas of another form, in float64, and inputs for it."""

import torch

__all__ = ["coin", "formula", "normal"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coin(logit):
    """Entropy of a coin, in float64, by the two outcomes."""
    p = torch.sigmoid(logit)
    q = torch.sigmoid(-logit)
    return -(torch.where(p > 0, p * p.log(), 0) + torch.where(q > 0, q * q.log(), 0))


def formula(x, spherical, inv_temperature):
    """codes with a straight-through gradient, sample entropy, commitment, probability; as the papers have them."""
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) if spherical else x
    size = x.shape[-1] ** -0.5 if spherical else 1.0
    code = torch.where(x > 0, size, -size)
    logit = 4 * inv_temperature * size * unit
    rows = max(1, x.shape[0])
    return (
        unit + (code - unit).detach(),
        coin(logit).sum() / rows,
        (unit - code.detach()).square().sum() / rows,
        torch.sigmoid(logit).sum(0) / rows,
    )
