"""Residual quantizer with an exponential-moving-average codebook (Lee et al., RQ-VAE, arXiv:2203.01941, section 3.1).

The keys are those of RQ-VAE's `RQBottleneck`, which VILA-U keeps: `codebooks.{d}.weight`, `.cluster_size_ema` and
`.embed_ema`, a zero padding row last, and with a shared codebook the same table listed once for every depth.
"""

from typing import Literal, NamedTuple, cast

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

    def update(self, counts: Tensor, sums: Tensor, candidates: Tensor, decay: float, eps: float = 1e-5) -> None:
        """Move the table towards the means of the vectors assigned to each code; restart codes that nobody uses.

        Args:
            counts: (K,) float32, vectors per code in this step, summed over all ranks.
            sums: (K, C) float32, their sums.
            candidates: (K, C), vectors that take the place of dead codes (decayed count below 1); equal on all ranks.
            decay: weight of the past.
        """
        _move([self], counts[None], sums[None], candidates[None], decay, eps)


@torch.no_grad()
def _move(books: list[Codebook], counts: Tensor, sums: Tensor, candidates: Tensor, decay: float, eps: float) -> None:
    """`Codebook.update` of several tables, all arguments stacked: counts (B, K), sums and candidates (B, K, C)."""
    one = len(books) == 1
    sizes = books[0].cluster_size_ema[None] if one else torch.stack([book.cluster_size_ema for book in books])
    sizes.lerp_(counts, 1 - decay)
    dead = (sizes < 1).unsqueeze(-1)
    sizes.clamp_(min=1)
    total = sizes.sum(dim=1, keepdim=True)
    smoothed = ((sizes + eps) * (total / (total + sizes.shape[1] * eps))).unsqueeze(-1)
    if not one:
        torch._foreach_copy_([book.cluster_size_ema for book in books], list(sizes.unbind()))
    torch._foreach_lerp_([book.embed_ema for book in books], list(sums.unbind()), 1 - decay)
    # The outputs are written where they belong: each of these tables is the largest thing that a step touches.
    for b, book in enumerate(books):
        torch.where(dead[b], candidates[b].to(book.embed_ema), book.embed_ema, out=book.embed_ema)
        torch.div(book.embed_ema, smoothed[b], out=book.table)


class ResidualQuantizer(nn.Module):
    """Quantizes each vector as a sum of D code vectors, each the nearest to what the ones before left over.

    In training mode a forward also moves the codebook, by the vectors of all ranks of the default process group; dead
    codes are restarted from vectors of the batch.

    Args:
        num_codes: K, codes per table.
        dim: C, width of the features.
        depth: D, codes per vector.
        shared: one table for all depths, or one for each.
        decay: of the moving averages.
        update: when a shared table moves: "step", once, by the vectors of all depths; or "depth", after every depth by
            that depth's vectors, as RQ-VAE trains: the next depth searches the moved table, and the averages decay D
            times a step. Tables of one depth each move once either way.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        depth: int,
        *,
        shared: bool = True,
        decay: float = 0.99,
        update: Literal["step", "depth"] = "step",
    ):
        super().__init__()
        if update not in ("step", "depth"):
            raise ValueError(f"ResidualQuantizer: update must be 'step' or 'depth', got {update!r}")
        if min(num_codes, dim, depth) < 1:
            raise ValueError(
                f"ResidualQuantizer: num_codes, dim and depth must be positive, got {num_codes}, {dim}, {depth}"
            )
        first = Codebook(num_codes, dim)
        rest = [first if shared else Codebook(num_codes, dim) for _ in range(depth - 1)]
        self.codebooks = nn.ModuleList([first, *rest])
        self.shared, self.depth, self.num_codes, self.dim, self.decay = shared, depth, num_codes, dim, decay
        self.update = update

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
        exact = x.detach().float()
        if self.training and self.shared and self.update == "depth":
            codes, partial = self._quantize_and_move(exact)
            quantized = partial[..., -1, :]
        else:
            table = self.table.float()
            codes, quantized = residual_quantize(exact, table, self.depth if self.shared else None)
            partial = residual_lookup(codes, table, cumulative=True)
            if self.training:
                rest = exact.unsqueeze(-2)
                self._move(torch.cat([rest, rest - partial[..., :-1, :]], dim=-2), codes)
        commitment = (x.float().unsqueeze(-2) - partial).square().mean()
        return Quantized(x + (quantized.to(x.dtype) - x).detach(), codes, commitment)

    def embed(self, codes: Tensor, *, cumulative: bool = False) -> Tensor:
        """Sums (..., C) of the code vectors of codes (..., D), or all running sums (..., D, C)."""
        return residual_lookup(codes, self.table, cumulative=cumulative)

    @torch.no_grad()
    def _quantize_and_move(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., D) and partial sums (..., D, C) of x, each depth with the table that the one before has moved."""
        rest, total, codes, partial = x, torch.zeros_like(x), [], []
        for _ in range(self.depth):
            chosen, row = residual_quantize(rest, self.table.float(), 1)
            self._move(rest.unsqueeze(-2), chosen)
            rest, total = rest - row, total + row
            codes.append(chosen)
            partial.append(total)
        return torch.cat(codes, dim=-1), torch.stack(partial, dim=-2)

    @torch.no_grad()
    def _move(self, vectors: Tensor, codes: Tensor) -> None:
        """Moves the tables, all at once, by the vectors (..., D, C) that were searched for and their codes (..., D)."""
        books = self._books[:1] if self.shared else self._books
        tables, num_codes = len(books), self.num_codes
        vectors, codes = vectors.reshape(-1, vectors.shape[-1]), codes.reshape(-1)
        rows = len(codes) // tables
        if tables > 1:  # one table of all tables: row n of `vectors` belongs to table n % tables
            codes = codes + (num_codes * torch.arange(tables, device=codes.device)).repeat(rows)
        counts, sums = code_statistics(vectors, codes, tables * num_codes)
        pick = torch.randint(rows, (tables, num_codes), device=codes.device)
        if tables > 1:
            pick = pick * tables + torch.arange(tables, device=codes.device)[:, None]
        candidates = vectors[pick]
        # A code drawn for two dead entries would stay one code for ever: a little noise parts them.
        spread = candidates.std(dim=(1, 2), keepdim=True)
        candidates = torch.addcmul(candidates, torch.randn_like(candidates), spread, value=1e-3)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(candidates, 0)
        counts, sums = counts.view(tables, -1), sums.view(tables, num_codes, -1)
        _move(books, counts, sums, candidates, self.decay, 1e-5)
