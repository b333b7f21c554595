"""Masks in a few integers a token: which blocks of tokens see which, for `ops.block_attention`.

A sequence is blocks one after another, scales for instance, and a mask says how many tokens each block has and which
blocks it sees, whole. What is kept of it is at most four ranges a token; nothing is L x L. Several images of different
lengths go one after another in one sequence (packed): each sees itself alone.

Make a mask once a batch, not once a layer; all layers read it. Lengths may lie in a tensor that only the device reads:
then a few torch operators on that device make the mask, without waiting for it, and a CUDA graph may hold them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native

__all__ = ["MAX_RANGES", "Mask", "blocks", "causal", "packed", "skip_causal", "sliding", "spacetime"]

MAX_RANGES = 4
_SELF = -1  # in a table of blocks: the token that looks (as an end), or that is looked at (as a begin)

Lengths = Sequence[int] | Sequence[Sequence[int]] | Tensor
Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom among L tokens; made by the functions of this module. All tensors are int32 on one device.

    Args:
        sees: (R, 2, L) the tokens that each token sees, as R disjoint ranges [begin, end), some perhaps empty.
        seen_by: (P, 2, L) the tokens that see each token, likewise.
        offsets: (N,) the first token of every image; None: one image, which may have more keys than queries.
    """

    sees: Tensor
    seen_by: Tensor
    offsets: Tensor | None

    @property
    def tokens(self) -> int:
        """L."""
        return self.sees.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.sees.device

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on a device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Mask(self.sees.to(device), self.seen_by.to(device), offsets)


def blocks(
    lengths: Lengths,
    sees: Sequence[Iterable[int]],
    *,
    causal: Iterable[int] = (),
    tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """The mask in which a block sees the blocks that it names.

    Args:
        lengths: tokens of each of S blocks, zeros allowed: S integers, or for a packed batch N sequences of as many; or
            an int32 or int64 tensor (S,) or (N, S) of them. All images have the same S.
        sees: for each block the numbers of those that it sees, itself among them: at most 4 runs of neighbours.
        causal: blocks in which a token sees, of its own block, only those up to itself.
        tokens: L, the sum of all lengths. Needed for a tensor on a GPU alone, which is not looked at here: lengths
            below 0 count as 0 there, what is beyond L is cut off, and the last block goes on to L.
        device: of the mask; None is the one of a tensor, else the CPU.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0 or that do not add up to tokens, no blocks, a number of blocks that does not
            match, a block that is not there or does not see itself, or one that sees, or is seen by, more than 4 runs.
    """
    return _blocks("blocks", lengths, sees, causal, tokens, device)


def packed(scale_lengths: Lengths, *, tokens: int | None = None, device: torch.device | str | None = None) -> Mask:
    """The mask of several images one after another, each as `ops.block_causal_attention` has it.

    A token sees the tokens of its own image in its own scale and all earlier ones. Each image comes out bit for bit as
    it would alone, forward and backward (Triton; CUDA but for images of at most 256 tokens with heads of at most 64,
    whose tiles are others when they are alone; the eager definition within rounding). A prefix is one more scale in
    front.

    Args:
        scale_lengths: tokens of each scale of each of N images: sequences of integers, one an image, not all of the
            same length, or an int32 or int64 tensor (N, S), 0 where there is no scale. One sequence, or (S,), is one
            image.
        tokens, device: as `blocks` has them.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0 or that do not add up to tokens, or no scales.
    """
    sizes, total = _lengths("packed", scale_lengths, tokens, device, ragged=True)
    count = sizes.shape[1]
    return _made(sizes, total, [[(0, i + 1)] for i in range(count)], [[(i, count)] for i in range(count)])


def causal(
    lengths: int | Sequence[int] | Tensor, *, tokens: int | None = None, device: torch.device | str | None = None
) -> Mask:
    """The mask in which a token sees those up to itself.

    Args:
        lengths: of the sequence, or of several that are packed: integers, or an int32 or int64 tensor (N,).
        tokens, device: as `blocks` has them.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0 or that do not add up to tokens, or none.
    """
    rows: Any
    if isinstance(lengths, Tensor):
        rows = lengths[:, None] if lengths.ndim == 1 else lengths
    elif isinstance(lengths, Sequence) and not isinstance(lengths, (str, bytes)):
        rows = [[length] for length in lengths]
    else:
        rows = [[lengths]]
    return _blocks("causal", rows, [[0]], [0], tokens, device)


def sliding(
    scale_lengths: Lengths,
    window: int,
    *,
    sinks: int = 0,
    tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """The mask in which a scale sees itself, the `window` scales before it, and the first `sinks` scales.

    Args:
        scale_lengths: as `blocks` has lengths.
        window: scales before its own that a token sees, at least 0.
        sinks: the first scales that everybody behind them sees, at least 0: 1 if the first is a text.
        tokens, device: as `blocks` has them.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths, window or sinks below 0, lengths that do not add up to tokens, or no scales.
    """
    _checks.check_integer("sliding", "window", window, 0)
    _checks.check_integer("sliding", "sinks", sinks, 0)
    count = _count(scale_lengths)
    seen = [{*range(max(0, i - window), i + 1), *range(min(sinks, i))} for i in range(count)]
    return _blocks("sliding", scale_lengths, seen, (), tokens, device)


def skip_causal(block_lengths: Lengths, *, tokens: int | None = None, device: torch.device | str | None = None) -> Mask:
    """The mask of blocks that are denoised one by one: first all clean ones, then all noised ones, as many.

    A clean block sees the clean ones up to itself; a noised one the clean ones before its own, and itself (the
    skip-causal mask of Hu et al., "ACDiT" (2024), section 3).

    Args:
        block_lengths: of the B clean blocks, as `blocks` has lengths; the noised ones have the same.
        tokens, device: as `blocks` has them.

    Returns:
        The mask, of 2 B blocks.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0 or that do not add up to tokens (twice their sum), or no blocks.
    """
    count = _count(block_lengths)
    if isinstance(block_lengths, Tensor):
        twice: Lengths = torch.cat((block_lengths, block_lengths), -1)
    elif _nested(block_lengths):
        twice = [[*row, *row] for row in block_lengths]  # type: ignore[misc]
    else:
        twice = [*block_lengths, *block_lengths]  # type: ignore[list-item]
    clean = [range(i + 1) for i in range(count)]
    noised = [[*range(i), count + i] for i in range(count)]
    return _blocks("skip_causal", twice, [*clean, *noised], (), tokens, device)


def spacetime(text: int, clips: Sequence[Sequence[int]], *, device: torch.device | str | None = None) -> Mask:
    """The mask of a text and the spacetime pyramids of clips: a scale sees the text, itself and the last clip's end.

    The text sees itself; a scale of a clip sees the text, itself, and of the clip before only the last scale, which is
    the largest (InfinityStar: Liu et al. (2025); a first frame is a clip of its own).

    Args:
        text: tokens of the text, at least 0.
        clips: for each clip the tokens of its scales, all frames of a scale together.
        device: of the mask; None is the CPU.

    Returns:
        The mask: the text is block 0, the scales follow clip by clip.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for lengths below 0, or a clip without scales.
    """
    function = "spacetime"
    _checks.check_integer(function, "text", text, 0)
    lengths, seen, largest = [text], [{0}], 0
    for i, clip in enumerate(clips):
        if not len(clip):
            raise ValueError(f"{function}: clips[{i}] must have one or more scales, got none")
        seen += [{0, largest, len(lengths) + j} for j in range(len(clip))]
        lengths += clip
        largest = len(lengths) - 1
    return _blocks(function, lengths, seen, (), None, device)


# ---- from lengths and sets to tensors --------------------------------------------------------------------------------


def _blocks(
    function: str,
    lengths: Lengths,
    sees: Sequence[Iterable[int]],
    causal: Iterable[int],
    tokens: int | None,
    device: torch.device | str | None,
) -> Mask:
    sizes, total = _lengths(function, lengths, tokens, device)
    count = sizes.shape[1]
    seen = [set(some) for some in sees]
    if len(seen) != count:
        raise ValueError(f"{function}: sees must name what each of {count} blocks sees, got {len(seen)} blocks")
    for i, some in enumerate(seen):
        for one in some:
            _checks.check_integer(function, f"sees[{i}]", one, 0)
            if one >= count:
                raise ValueError(f"{function}: sees[{i}] must name blocks below {count}, got {one}")
        if i not in some:
            raise ValueError(f"{function}: sees[{i}] must hold {i}, for a token sees its own block, got {sorted(some)}")
    stepped = set(causal)
    for one in stepped:
        _checks.check_integer(function, "causal", one, 0)
        if one >= count:
            raise ValueError(f"{function}: causal must name blocks below {count}, got {one}")
    lookers: list[set[int]] = [{i for i in range(count) if j in seen[i]} for j in range(count)]
    ahead = [_ranges(some, i in stepped, i, False) for i, some in enumerate(seen)]
    back = [_ranges(some, j in stepped, j, True) for j, some in enumerate(lookers)]
    for what, table in (("see", ahead), ("be seen by", back)):
        for i, runs in enumerate(table):
            if len(runs) > MAX_RANGES:
                raise ValueError(
                    f"{function}: sees must let a block {what} at most {MAX_RANGES} runs of blocks, "
                    f"got {len(runs)} for block {i}"
                )
    return _made(sizes, total, ahead, back)


def _nested(lengths: Lengths) -> bool:
    return not isinstance(lengths, Tensor) and len(lengths) > 0 and isinstance(lengths[0], Sequence)


def _count(lengths: Lengths) -> int:
    """Blocks of an image; what is wrong with the lengths is said later."""
    if isinstance(lengths, Tensor):
        return lengths.shape[-1] if lengths.ndim else 0
    if not isinstance(lengths, Sequence):
        return 0
    return len(lengths[0]) if _nested(lengths) else len(lengths)  # type: ignore[arg-type]


def _lengths(
    function: str,
    lengths: Lengths,
    tokens: int | None,
    device: torch.device | str | None,
    *,
    ragged: bool = False,
) -> tuple[Tensor, int]:
    """(N, S) int64 on the mask's device, and the sum of all."""
    if tokens is not None:
        _checks.check_integer(function, "tokens", tokens, 0)
    if isinstance(lengths, Tensor):
        _checks.check_tensor(function, "lengths", lengths, (torch.int32, torch.int64))
        if lengths.ndim not in (1, 2):
            raise ValueError(f"{function}: lengths must be (S,) or (N, S), got {tuple(lengths.shape)}")
        sizes = (lengths[None] if lengths.ndim == 1 else lengths).detach().long()
        _check_sizes(function, *sizes.shape)
        if sizes.device.type != "cpu":
            if tokens is None:
                raise ValueError(f"{function}: tokens must be given for lengths on a device, which are not looked at")
            return sizes if device is None else sizes.to(device), tokens
        least = int(sizes.min())
        if least < 0:
            raise ValueError(f"{function}: lengths must be at least 0, got {least}")
    else:
        if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Sequence):
            raise TypeError(f"{function}: lengths must be integers or a tensor, got {type(lengths).__name__}")
        rows = [list(row) for row in lengths] if _nested(lengths) else [list(lengths)]  # type: ignore[arg-type]
        counts = sorted(map(len, rows))
        _check_sizes(function, len(rows), counts[-1])
        for row in rows:
            for value in row:
                _checks.check_integer(function, "lengths", value, 0)
        if not ragged and counts[0] != counts[-1]:
            raise ValueError(f"{function}: lengths must be of as many blocks for each image, got {counts}")
        sizes = torch.tensor([row + [0] * (counts[-1] - len(row)) for row in rows])
    total = int(sizes.sum())
    if tokens is not None and tokens != total:
        raise ValueError(f"{function}: tokens must be the sum of lengths, {total}, got {tokens}")
    return sizes if device is None else sizes.to(device), total


def _check_sizes(function: str, images: int, count: int) -> None:
    if images < 1:
        raise ValueError(f"{function}: lengths must be of one or more images, got {images}")
    if count < 1:
        raise ValueError(f"{function}: lengths must be of one or more blocks, got {count}")


def _ranges(some: set[int], stepped: bool, own: int, back: bool) -> list[Range]:
    """Runs of neighbours as [begin, end), cut at the token itself in a block where tokens see only those before."""
    runs: list[Range] = []
    for one in sorted(some):
        cut = stepped and one == own
        if runs and runs[-1][1] == one and not (cut and back):
            runs[-1] = (runs[-1][0], one + 1)
        else:
            runs.append((_SELF if cut and back else one, one + 1))
        if cut and not back:
            runs[-1] = (runs[-1][0], _SELF)
    return runs


def _made(sizes: Tensor, tokens: int, sees: list[list[Range]], seen_by: list[list[Range]]) -> Mask:
    """From lengths (N, S), and ranges of blocks for each of the S blocks."""
    flat = sizes.flatten().clamp(0, tokens)  # so that no sum of what nobody looked at overflows
    begins = (flat.cumsum(0) - flat).clamp(max=tokens)
    token = torch.arange(tokens, device=sizes.device)
    place = torch.searchsorted(begins, token, right=True) - 1  # of the blocks that begin there, the last
    begins = torch.cat((begins, begins.new_full((1,), tokens)))
    count = sizes.shape[1]
    offsets = begins[:-1:count].to(torch.int32) if sizes.shape[0] > 1 else None
    by_row, by_column = (_by_token(ranges, begins, token, place, count) for ranges in (sees, seen_by))
    return Mask(by_row, by_column, offsets)


def _by_token(ranges: list[list[Range]], begins: Tensor, token: Tensor, place: Tensor, count: int) -> Tensor:
    """(R, 2, L), of the ranges of blocks of each token's block; `place` of it among the blocks of all images."""
    widest = max(map(len, ranges))
    filled = [end for row in ranges for pair in row + [(0, 0)] * (widest - len(row)) for end in pair]
    table = _native.integers_on(token.device, tuple(filled)).long().view(count, widest, 2)
    found = table.permute(1, 2, 0)[:, :, place % count]  # (R, 2, L)
    first = begins[place - place % count + found.clamp(min=0)]
    itself = torch.stack((token, token + 1))
    return torch.where(found == _SELF, itself, first).to(torch.int32).contiguous()
