"""Residual quantizer with an exponential-moving-average codebook (Lee et al., RQ-VAE, arXiv:2203.01941, section 3.1).

The keys are those of RQ-VAE's `RQBottleneck`, which VILA-U keeps: `codebooks.{d}.weight`, `.cluster_size_ema` and
`.embed_ema`, a zero padding row last, and with a shared codebook the same table listed once for every depth. So are the
methods beside `forward`: `quantize`, `embed_code` and its kin, `get_soft_codes`, `compute_commitment_loss`.

What they compute stands in functions of tensors and tables, which serve the published modules as well.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unifiedar.ops import _checks, code_statistics, residual_lookup, residual_quantize

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


# ---- the arithmetic, of any tables that have a weight (K + 1, C) and the buffers of Codebook ------------------------


class Movement(NamedTuple):
    """How a training step moves tables.

    Fields:
        decay: weight of the past in the moving averages.
        eps: added to every code's count, so that no mean is divided by zero.
        restart: takes vectors (R, B, C) of B tables and K, returns (B, K, C) that take the place of dead codes (decayed
            count below 1); None if dead codes stay.
    """

    decay: float
    eps: float
    restart: Callable[[Tensor, int], Tensor] | None


def search(
    x: Tensor,
    table: Tensor,
    depth: int,
    books: Sequence[Any] = (),
    movement: Movement | None = None,
    *,
    each_depth: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes (..., D) of x (..., C), and the running sums (..., D, C) of their rows, in the dtype of the table.

    Args:
        x: float32 or float64 if the tables move.
        table: (K, C) for all depths, or (D, K, C).
        depth: D.
        books: the modules that hold the tables, one if it is shared; needed to move them.
        movement: how the tables move by what x chose, or None if they stay.
        each_depth: whether a shared table moves after every depth and the next one searches the moved table.
    """
    shared = table.ndim == 2
    if movement is not None and shared and each_depth:
        return _search_and_move_each(x, books[0], depth, movement)
    codes = residual_quantize(x, table, depth if shared else None).codes
    sums = residual_lookup(codes, table, cumulative=True)
    if movement is not None:
        rest = x.unsqueeze(-2)
        move(books, torch.cat([rest, rest - sums[..., :-1, :]], dim=-2), codes, movement)
    return codes, sums


@torch.no_grad()
def _search_and_move_each(x: Tensor, book: Any, depth: int, movement: Movement) -> tuple[Tensor, Tensor]:
    rest, total, codes, sums = x, torch.zeros_like(x), [], []
    for _ in range(depth):
        chosen, row = residual_quantize(rest, book.weight[:-1].to(x.dtype), 1)
        move([book], rest.unsqueeze(-2), chosen, movement)
        rest, total = rest - row, total + row
        codes.append(chosen)
        sums.append(total)
    return torch.cat(codes, dim=-1), torch.stack(sums, dim=-2)


@torch.no_grad()
def move(books: Sequence[Any], vectors: Tensor, codes: Tensor, movement: Movement) -> None:
    """Move tables, all at once, by the vectors of all ranks of the default process group.

    Args:
        books: the modules that hold B tables.
        vectors: (..., D, C), what was searched for; D is B, or anything if there is one table.
        codes: (..., D), what was chosen.
        movement: how.
    """
    tables, (num_codes, channels) = len(books), books[0].embed_ema.shape
    vectors, codes = vectors.reshape(-1, channels), codes.reshape(-1)
    rows = len(codes) // tables
    if tables > 1:  # one table of all tables: row n of `vectors` belongs to table n % tables
        codes = codes + (num_codes * torch.arange(tables, device=codes.device)).repeat(rows)
    counts, sums = code_statistics(vectors, codes, tables * num_codes)
    candidates = None
    if movement.restart is not None:
        candidates = movement.restart(vectors.view(rows, tables, channels), num_codes)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
        if candidates is not None:
            dist.broadcast(candidates, 0)
    counts, sums = counts.view(tables, -1), sums.view(tables, num_codes, -1)
    _move(books, counts, sums, candidates, movement.decay, movement.eps)


@torch.no_grad()
def _move(
    books: Sequence[Any], counts: Tensor, sums: Tensor, candidates: Tensor | None, decay: float, eps: float
) -> None:
    """`Codebook.update` of several tables, all arguments stacked: counts (B, K), sums and candidates (B, K, C)."""
    one = len(books) == 1
    sums = sums.to(books[0].embed_ema.dtype)  # a whole model may have been cast
    sizes = books[0].cluster_size_ema[None] if one else torch.stack([book.cluster_size_ema for book in books])
    # Not lerp_: a code of one vector a step stays at 1, the limit of the dead, only as the published code rounds.
    sizes.mul_(decay).add_(counts, alpha=1 - decay)
    dead = None
    if candidates is not None:
        dead = (sizes < 1).unsqueeze(-1)
        sizes.clamp_(min=1)
    total = sizes.sum(dim=1, keepdim=True)
    smoothed = ((sizes + eps) * (total / (total + sizes.shape[1] * eps))).unsqueeze(-1)
    if not one:
        torch._foreach_copy_([book.cluster_size_ema for book in books], list(sizes.unbind()))
    torch._foreach_lerp_([book.embed_ema for book in books], list(sums.unbind()), 1 - decay)
    # The outputs are written where they belong: each of these tables is the largest thing that a step touches.
    for b, book in enumerate(books):
        if candidates is not None and dead is not None:
            torch.where(dead[b], candidates[b].to(book.embed_ema), book.embed_ema, out=book.embed_ema)
        torch.div(book.embed_ema, smoothed[b], out=book.weight[:-1])


def _draw(vectors: Tensor, num_codes: int) -> Tensor:
    """Vectors (B, K, C) that take the place of dead codes, drawn from those (R, B, C) of each table."""
    rows, tables, channels = vectors.shape
    pick = torch.randint(rows, (tables, num_codes), device=vectors.device)
    if tables > 1:
        pick = pick * tables + torch.arange(tables, device=vectors.device)[:, None]
    candidates = vectors.view(-1, channels)[pick]
    # A code drawn for two dead entries would stay one code for ever: a little noise parts them.
    spread = candidates.std(dim=(1, 2), keepdim=True)
    return torch.addcmul(candidates, torch.randn_like(candidates), spread, value=1e-3)


@torch.no_grad()
def soft_codes(x: Tensor, table: Tensor, depth: int, temperature: float, stochastic: bool) -> tuple[Tensor, Tensor]:
    """How near every code is at every depth, softmax(-|rest - code|^2 / temperature) (..., D, K), and codes (..., D).

    Args:
        x: (..., C), of the table's dtype.
        table: (K, C) for all depths, or (D, K, C); float32 or float64.
        depth: D.
        temperature: above 0.
        stochastic: whether each depth's code is drawn from its soft code (one `torch.multinomial` a depth) instead of
            being the nearest; the next depth goes on with what that leaves.
    """
    shared = table.ndim == 2
    rest = x.reshape(-1, x.shape[-1])
    codes = torch.empty((len(rest), depth), dtype=torch.int64, device=x.device)
    if not stochastic:
        codes = residual_quantize(rest, table, depth if shared else None).codes
    soft = rest.new_empty((len(rest), depth, table.shape[-2]))
    with torch.autocast(x.device.type, enabled=False):
        for d in range(depth):
            own = table if shared else table[d]
            # Without |rest|^2, which is the same for every code.
            scores = torch.addmm(own.square().sum(1), rest, own.T, alpha=-2)
            soft[:, d] = torch.softmax(scores.div_(-temperature), dim=-1)
            if stochastic:
                codes[:, d] = torch.multinomial(soft[:, d], 1).squeeze(1)
            rest = rest - own[codes[:, d]]
    return soft.view(*x.shape[:-1], *soft.shape[1:]), codes.view(*x.shape[:-1], depth)


def commitment_loss(x: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """Mean over depths of mean((x - stop_gradient(running sum))^2), a scalar."""
    return torch.stack([(x - partial.detach()).square().mean() for partial in sums]).mean()


def _require_equal_copies(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
    errors: list[str],
) -> None:  # fmt: skip
    """A state that lists other tables at other depths must not end up in a shared one, the last of them in all."""
    quantizer = cast(ResidualQuantizer, module)
    keys = [f"{prefix}codebooks.{d}.weight" for d in range(quantizer.depth)]
    tables = [state[key] for key in keys if key in state]
    for table in tables[1:] if quantizer.shared else ():
        if table.data_ptr() != tables[0].data_ptr() and not torch.equal(table, tables[0]):
            errors.append(
                f"{prefix}codebooks: the depths' tables differ, but one is shared by all (shared must be False)"
            )
            return


class ResidualQuantizer(nn.Module):
    """Quantizes each vector as a sum of D code vectors, each the nearest to what the ones before left over.

    In training mode a forward also moves the codebook, by the vectors of all ranks of the default process group; dead
    codes are restarted from vectors of the batch. Loading a state whose depths have different tables into a shared
    one is an error.

    Args:
        num_codes: K, codes per table.
        dim: C, width of the features.
        depth: D, codes per vector.
        shared: one table for all depths, or one for each.
        decay: of the moving averages.
        update: when a shared table moves: "step", once, by the vectors of all depths; or "depth", after every depth by
            that depth's vectors, as RQ-VAE trains: the next depth searches the moved table, and the averages decay D
            times a step. Tables of one depth each move once either way.
        restart: whether codes that nobody uses are restarted (RQ-VAE's `restart_unused_codes`).
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
        restart: bool = True,
    ):
        super().__init__()
        if update not in ("step", "depth"):
            raise ValueError(f"ResidualQuantizer: update must be 'step' or 'depth', got {update!r}")
        for name, value in (("num_codes", num_codes), ("dim", dim), ("depth", depth)):
            _checks.check_integer("ResidualQuantizer", name, value, 1)
        _checks.check_number("ResidualQuantizer", "decay", decay, 0)
        if decay > 1:
            raise ValueError(f"ResidualQuantizer: decay must be at most 1, got {decay}")
        first = Codebook(num_codes, dim)
        rest = [first if shared else Codebook(num_codes, dim) for _ in range(depth - 1)]
        self.codebooks = nn.ModuleList([first, *rest])
        self.shared, self.depth, self.num_codes, self.dim, self.decay = shared, depth, num_codes, dim, decay
        self.update, self.restart = update, restart
        self.register_load_state_dict_pre_hook(_require_equal_copies)

    @property
    def _books(self) -> list[Codebook]:
        """The tables that there are: one if shared."""
        books = cast(list[Codebook], list(self.codebooks))
        return books[:1] if self.shared else books

    @property
    def table(self) -> Tensor:
        """Codebook as the ops take it: (K, C) if shared, else (D, K, C)."""
        if self.shared:
            return self._books[0].table
        return torch.stack([book.table for book in self._books])

    @property
    def _padded(self) -> Tensor:
        """`table` with the padding rows: code K is the zero vector, as in the published modules."""
        if self.shared:
            return self._books[0].weight
        return torch.stack([book.weight for book in self._books])

    @property
    def _movement(self) -> Movement:
        return Movement(self.decay, 1e-5, _draw if self.restart else None)

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}, depth={self.depth}, shared={self.shared}"

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x (..., C) float; the search runs in float32 whatever the dtype of x.

        Returns:
            Quantized(features (..., C) as x, equal to the sum of the D code vectors, gradient passed straight to x;
            codes (..., D) int64; commitment (): mean over depths of mean((x - stop_gradient(partial sum))^2)).

        Raises:
            TypeError: if x is no tensor of floats.
            ValueError: if x has other channels than the module, or in training mode no vector at all.
        """
        codes, partial = self._search(x)
        commitment = (x.float().unsqueeze(-2) - partial).square().mean()
        quantized = partial[..., -1, :].to(x.dtype)
        return Quantized(x + (quantized - x).detach(), codes, commitment)

    def quantize(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The running sums of x (..., C) over depth, D tensors (..., C) in its dtype, and its codes (..., D) int64.

        In training mode it moves the codebook, as `forward` does.
        """
        codes, partial = self._search(x)
        return list(partial.to(x.dtype).unbind(-2)), codes

    def compute_commitment_loss(self, x: Tensor, quant_list: Sequence[Tensor]) -> Tensor:
        """Mean over depths of mean((x - stop_gradient(running sum))^2), () in the dtype of x.

        Args:
            x: (..., C).
            quant_list: the running sums, D tensors (..., C), as `quantize` returns them.
        """
        return commitment_loss(x, quant_list)

    def embed(self, codes: Tensor, *, cumulative: bool = False) -> Tensor:
        """Sums (..., C) of the code vectors of codes (..., D), or all running sums (..., D, C)."""
        return residual_lookup(codes, self.table, cumulative=cumulative)

    @torch.no_grad()
    def embed_code(self, code: Tensor) -> Tensor:
        """Sums (..., C) of the rows of codes (..., D); code K, the padding, is the zero vector. No gradient."""
        return residual_lookup(code, self._padded)

    @torch.no_grad()
    def embed_code_with_depth(self, code: Tensor) -> tuple[Tensor, None]:
        """The rows (..., D, C) of codes (..., D), not summed, and None. No gradient."""
        rows = [
            residual_lookup(code[..., d : d + 1], self._books[0 if self.shared else d].weight)
            for d in range(self.depth)
        ]
        return torch.stack(rows, dim=-2), None

    @torch.no_grad()
    def embed_partial_code(self, code: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
        """One depth's rows (..., C) of codes (..., D), or the sum of the depths up to it. No gradient.

        Args:
            code: (..., D) int64.
            code_idx: the depth, in [0, D).
            decode_type: "select", that depth alone, or "add", depths 0 to `code_idx`.

        Raises:
            ValueError: for a depth or a type that there is not.
        """
        if decode_type not in ("select", "add"):
            raise ValueError(f"embed_partial_code: decode_type must be 'select' or 'add', got {decode_type!r}")
        if not 0 <= code_idx < self.depth:
            raise ValueError(f"embed_partial_code: code_idx must be in [0, {self.depth}), got {code_idx}")
        depths = slice(code_idx if decode_type == "select" else 0, code_idx + 1)
        table = self._padded
        return residual_lookup(code[..., depths], table if self.shared else table[depths])

    def get_soft_codes(self, x: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[Tensor, Tensor]:
        """Soft codes (..., D, K) float32, softmax(-|rest - code|^2 / temp) at every depth, and codes (..., D) int64.

        Args:
            x: (..., C) float.
            temp: temperature, above 0.
            stochastic: whether each code is drawn from its soft code, by `torch.multinomial` in the order of depths,
                instead of being the nearest; the next depth quantizes what that leaves.

        Raises:
            ValueError: for a temperature that is not above 0.
        """
        if not temp > 0:
            raise ValueError(f"get_soft_codes: temp must be above 0, got {temp}")
        _checks.check_tensor("get_soft_codes", "x", x)
        return soft_codes(x.detach().float(), self.table.float(), self.depth, temp, stochastic)

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., D) and running sums (..., D, C) float32 of x; moves the tables in training mode."""
        _checks.check_tensor("ResidualQuantizer", "x", x)
        if self.training and not x.numel():
            raise ValueError(
                f"ResidualQuantizer: x must hold at least one vector in training mode, got {tuple(x.shape)}"
            )
        movement = self._movement if self.training else None
        each_depth = self.update == "depth"
        return search(x.detach().float(), self.table.float(), self.depth, self._books, movement, each_depth=each_depth)

    def _move(self, vectors: Tensor, codes: Tensor) -> None:
        """Moves the tables, all at once, by the vectors (..., D, C) that were searched for and their codes (..., D)."""
        move(self._books, vectors, codes, self._movement)
