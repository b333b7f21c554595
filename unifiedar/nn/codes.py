"""Residual quantizer with an exponential-moving-average codebook (Lee et al., RQ-VAE, arXiv:2203.01941, section 3.1).

The keys are those of RQ-VAE's `RQBottleneck`, which VILA-U keeps: `codebooks.{d}.weight`, `.cluster_size_ema` and
`.embed_ema`, a zero padding row last, and with a shared codebook the same table listed once for every depth.
"""

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unifiedar.ops import code_statistics, residual_lookup, residual_quantize

__all__ = ["Codebook", "Quantized", "ResidualQuantizer"]


class Quantized(NamedTuple):
    """Result of `ResidualQuantizer.forward`: features with a straight-through gradient, codes, commitment loss."""

    features: Tensor  # (..., C), the dtype of x
    codes: Tensor  # (..., D) int64
    commitment: Tensor  # () float32


class Codebook(nn.Module):
    """One table of K code vectors and a zero padding row, with the running statistics that move it.

    Args:
        num_codes: K.
        dim: C, width of a code vector.

    Buffers:
        cluster_size_ema (K,) float32: decayed number of vectors per code.
        embed_ema (K, C) float32: decayed sum of those vectors.
    """

    cluster_size_ema: Tensor
    embed_ema: Tensor

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        weight = torch.randn(num_codes + 1, dim) * dim**-0.5
        weight[-1] = 0
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("cluster_size_ema", torch.zeros(num_codes))
        self.register_buffer("embed_ema", weight[:-1].clone())

    @property
    def table(self) -> Tensor:
        """The searchable rows, (K, C): the padding row is never a candidate."""
        return self.weight[:-1]

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, candidates: Tensor, decay: float, eps: float = 1e-5) -> None:
        """Move the table towards the means of the vectors assigned to each code; restart codes that nobody uses.

        Args:
            counts: (K,) float32, vectors per code in this step, summed over all ranks.
            sums: (K, C) float32, their sums.
            candidates: (K, C), vectors that take the place of dead codes (decayed count below 1); equal on all ranks.
            decay: weight of the past.
        """
        self.cluster_size_ema.lerp_(counts, 1 - decay)
        self.embed_ema.lerp_(sums, 1 - decay)
        dead = self.cluster_size_ema < 1
        self.embed_ema.copy_(torch.where(dead[:, None], candidates.to(self.embed_ema), self.embed_ema))
        self.cluster_size_ema.masked_fill_(dead, 1)
        total = self.cluster_size_ema.sum()
        smoothed = (self.cluster_size_ema + eps) / (total + len(counts) * eps) * total
        self.weight[:-1] = (self.embed_ema / smoothed[:, None]).to(self.weight.dtype)


class ResidualQuantizer(nn.Module):
    """Quantizes each vector as a sum of D code vectors, each the nearest to what the ones before left over.

    In training mode a forward also moves the codebook: one update a step from the vectors of all depths, averaged
    over all ranks of the default process group, dead codes restarted from vectors of the batch.

    Args:
        num_codes: K, codes per table.
        dim: C, width of the features.
        depth: D, codes per vector.
        shared: one table for all depths, or one for each.
        decay: of the moving averages.
    """

    def __init__(self, num_codes: int, dim: int, depth: int, *, shared: bool = True, decay: float = 0.99):
        super().__init__()
        if min(num_codes, dim, depth) < 1:
            raise ValueError(
                f"ResidualQuantizer: num_codes, dim and depth must be positive, got {num_codes}, {dim}, {depth}"
            )
        first = Codebook(num_codes, dim)
        rest = [first if shared else Codebook(num_codes, dim) for _ in range(depth - 1)]
        self.codebooks = nn.ModuleList([first, *rest])
        self.shared, self.depth, self.num_codes, self.dim, self.decay = shared, depth, num_codes, dim, decay

    @property
    def _books(self) -> list[Codebook]:
        return cast(list[Codebook], list(self.codebooks))

    @property
    def table(self) -> Tensor:
        """Codebook as the ops take it: (K, C) if shared, else (D, K, C)."""
        if self.shared:
            return self._books[0].table
        return torch.stack([book.table for book in self._books])

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}, depth={self.depth}, shared={self.shared}"

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x (..., C) float; the search runs in float32 whatever the dtype of x.

        Returns:
            Quantized(features (..., C) as x, equal to the sum of the D code vectors, gradient passed straight to x;
            codes (..., D) int64; commitment (): mean over depths of mean((x - stop_gradient(partial sum))^2)).
        """
        table = self.table.float()
        exact = x.detach().float()
        codes, quantized = residual_quantize(exact, table, self.depth if self.shared else None)
        partial = residual_lookup(codes, table, cumulative=True)
        commitment = (x.float().unsqueeze(-2) - partial).square().mean()
        if self.training:
            self._update(exact, partial, codes)
        return Quantized(x + (quantized.to(x.dtype) - x).detach(), codes, commitment)

    def embed(self, codes: Tensor, *, cumulative: bool = False) -> Tensor:
        """Sums (..., C) of the code vectors of codes (..., D), or all running sums (..., D, C)."""
        return residual_lookup(codes, self.table, cumulative=cumulative)

    @torch.no_grad()
    def _update(self, x: Tensor, partial: Tensor, codes: Tensor) -> None:
        residuals = torch.cat([x.unsqueeze(-2), x.unsqueeze(-2) - partial[..., :-1, :]], dim=-2)
        residuals, codes = residuals.flatten(0, -3), codes.flatten(0, -2)
        groups = [(self._books[0], residuals.flatten(0, 1), codes.flatten())]
        if not self.shared:
            groups = [(book, residuals[:, d], codes[:, d]) for d, book in enumerate(self._books)]
        for book, vectors, chosen in groups:
            counts, sums = code_statistics(vectors, chosen, self.num_codes)
            pick = torch.randint(len(vectors), (self.num_codes,), device=vectors.device)
            candidates = vectors[pick]
            # A code drawn for two dead entries would stay one code for ever: a little noise parts them.
            candidates = candidates + torch.randn_like(candidates) * (1e-3 * candidates.std())
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
                dist.all_reduce(sums)
                dist.broadcast(candidates, 0)
            book.update(counts, sums, candidates, self.decay)
