"""Masks in a few integers: which blocks of tokens see which, for `ops.block_attention`.

A sequence is blocks one after another, scales for instance. A mask says how many tokens each block has and which blocks
it sees, whole: nothing of it is a number a token, and nothing L x L. Lengths may lie in a tensor that only the device
reads, so that other lengths need no new mask to be worked out on the host. Several images of different lengths go one
after another in one sequence (packed): each sees itself alone.

Make a mask once a batch, not once a layer; all layers read it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unifiedar.ops import _checks

__all__ = ["MAX_BLOCKS", "MAX_RANGES", "Mask", "blocks", "causal", "packed", "skip_causal", "sliding", "spacetime"]

MAX_BLOCKS = 128
MAX_RANGES = 4
SELF = -1  # in a table: the token that looks (end), or that is looked at (begin)

Lengths = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """Blocks of tokens and who sees whom; made by the functions of this module, all tensors int32 on one device.

    Args:
        lengths: (N, S) tokens of every block of every image.
        offsets: (N,) the first token of every image; None: one image, which may have more keys than queries.
        sees: (S, R, 2) the blocks that each block sees, as disjoint ranges [begin, end) of at most `MAX_RANGES`, an
            empty one (0, 0); an end of -1 is the token that looks. None: those up to itself.
        seen_by: (S, P, 2) the blocks that see each block, likewise; a begin of -1 is the token that is looked at.
        tokens: of all images; None where only the device knows.
    """

    lengths: Tensor
    offsets: Tensor | None
    sees: Tensor | None
    seen_by: Tensor | None
    tokens: int | None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.lengths.device

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on a device."""
        names = ("lengths", "offsets", "sees", "seen_by")
        moved = {name: x if x is None else x.to(device) for name in names for x in (getattr(self, name),)}
        return replace(self, **moved)


def blocks(
    lengths: Lengths,
    sees: Sequence[Iterable[int]],
    *,
    causal: Iterable[int] = (),
    device: torch.device | str | None = None,
) -> Mask:
    """The mask in which a block sees the blocks that it names.

    Args:
        lengths: tokens of each of S blocks, 1 to 128 of them, zeros allowed: S integers, or for a packed batch N
            sequences of as many; or an int32 or int64 tensor (S,) or (N, S) of them. All images have the same S.
        sees: for each block the numbers of those that it sees, itself among them; at most 4 runs of neighbours.
        causal: blocks in which a token sees only those up to itself, of its own block.
        device: of the mask; None is the one of a tensor, else the CPU.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0, a number of blocks that does not match or is out of range, a block that is not
            there or does not see itself, or one that sees, or is seen by, more than 4 runs.

    Note:
        The lengths of a tensor on a GPU are not looked at: what is below 0 counts as 0, and the last block of the last
        image goes on to the last token. Two or more images need as many queries as keys.
    """
    function = "blocks"
    sizes, tokens = _lengths(function, lengths, device)
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
    for name, what, some in (("sees", "see", ahead), ("sees", "be seen by", back)):
        for i, runs in enumerate(some):
            if len(runs) > MAX_RANGES:
                raise ValueError(
                    f"{function}: {name} must let a block {what} at most {MAX_RANGES} runs of blocks, "
                    f"got {len(runs)} for block {i}"
                )
    return _made(sizes, tokens, _table(ahead), _table(back))


def packed(scale_lengths: Lengths, *, device: torch.device | str | None = None) -> Mask:
    """The mask of several images one after another, each as `ops.block_causal_attention` has it.

    A token sees the tokens of its own image in its own scale and all earlier ones. Each image comes out bit for bit as
    it would alone, forward and backward (Triton; the eager definition within rounding). A prefix is one more scale in
    front.

    Args:
        scale_lengths: tokens of each scale of each of N images: sequences of integers, one an image, not all of the
            same length, or an int32 or int64 tensor (N, S), 0 where there is no scale; up to 128 scales, one or more
            images. One sequence, or (S,), is one image.
        device: as `blocks` has it.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0 or a number of scales out of range.
    """
    return _made(*_lengths("packed", scale_lengths, device), None, None)


def causal(lengths: int | Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Mask:
    """The mask in which a token sees those up to itself.

    Args:
        lengths: of the sequence, or of several that are packed: integers, or an int32 or int64 tensor (N,).
        device: as `blocks` has it.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0, or none.
    """
    if isinstance(lengths, Tensor):
        rows: Lengths = lengths[:, None] if lengths.ndim == 1 else lengths
    elif isinstance(lengths, Sequence) and not isinstance(lengths, (str, bytes)):
        rows = [[length] for length in lengths]
    else:
        rows = [[lengths]]
    return blocks(rows, [[0]], causal=[0], device=device)


def sliding(scale_lengths: Lengths, window: int, *, sinks: int = 0, device: torch.device | str | None = None) -> Mask:
    """The mask in which a scale sees itself, the `window` scales before it, and the first `sinks` scales.

    Args:
        scale_lengths: as `blocks` has lengths.
        window: scales before its own that a token sees, at least 0.
        sinks: the first scales that everybody behind them sees, at least 0: 1 if the first is a text.
        device: as `blocks` has it.

    Returns:
        The mask.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths, window or sinks below 0, or a number of scales out of range.
    """
    _checks.check_integer("sliding", "window", window, 0)
    _checks.check_integer("sliding", "sinks", sinks, 0)
    count = _count(scale_lengths)
    seen = [{*range(max(0, i - window), i + 1), *range(min(sinks, i))} for i in range(count)]
    return blocks(scale_lengths, seen, device=device)


def skip_causal(block_lengths: Lengths, *, device: torch.device | str | None = None) -> Mask:
    """The mask of blocks that are denoised one by one: first all clean ones, then all noised ones, as many.

    A clean block sees the clean ones up to itself; a noised one the clean ones before its own, and itself (the
    skip-causal mask of Hu et al., "ACDiT" (2024), section 3).

    Args:
        block_lengths: of the B clean blocks, as `blocks` has lengths, B at most 64; the noised ones have the same.
        device: as `blocks` has it.

    Returns:
        The mask, of 2 B blocks.

    Raises:
        TypeError: for arguments of another type or dtype.
        ValueError: for lengths below 0 or a number of blocks out of range.
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
    return blocks(twice, [*clean, *noised], device=device)


def spacetime(text: int, clips: Sequence[Sequence[int]], *, device: torch.device | str | None = None) -> Mask:
    """The mask of a text and the spacetime pyramids of clips: a scale sees the text, itself and the last clip's end.

    The text sees itself; a scale of a clip sees the text, itself, and of the clip before only the last scale, which is
    the largest (InfinityStar: Liu et al. (2025); a first frame is a clip of its own).

    Args:
        text: tokens of the text, at least 0.
        clips: for each clip the tokens of its scales, all frames of a scale together; with the text at most 128
            blocks.
        device: of the mask; None is the CPU.

    Returns:
        The mask: the text is block 0, the scales follow clip by clip.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for lengths below 0, a clip without scales, or too many blocks.
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
    return blocks(lengths, seen, device=device)


# ---- from lengths and sets to tensors --------------------------------------------------------------------------------


def _nested(lengths: Lengths) -> bool:
    return not isinstance(lengths, Tensor) and len(lengths) > 0 and isinstance(lengths[0], Sequence)


def _count(lengths: Lengths) -> int:
    """Blocks of an image; what is wrong with the lengths is said later."""
    if isinstance(lengths, Tensor):
        return lengths.shape[-1] if lengths.ndim else 0
    if not isinstance(lengths, Sequence):
        return 0
    return len(lengths[0]) if _nested(lengths) else len(lengths)  # type: ignore[arg-type]


def _lengths(function: str, lengths: Lengths, device: torch.device | str | None) -> tuple[Tensor, int | None]:
    """(N, S) int32, and the sum of all if the host knows it."""
    if isinstance(lengths, Tensor):
        _checks.check_tensor(function, "lengths", lengths, (torch.int32, torch.int64))
        if lengths.ndim not in (1, 2):
            raise ValueError(f"{function}: lengths must be (S,) or (N, S), got {tuple(lengths.shape)}")
        sizes = lengths.detach()
        sizes = sizes[None] if sizes.ndim == 1 else sizes
        _check_sizes(function, *sizes.shape)
        tokens = None
        if sizes.device.type == "cpu":
            least, tokens = int(sizes.min()), int(sizes.sum())
            if least < 0:
                raise ValueError(f"{function}: lengths must be at least 0, got {least}")
        return sizes.to(sizes.device if device is None else device, torch.int32).clamp(min=0).contiguous(), tokens
    if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Sequence):
        raise TypeError(f"{function}: lengths must be integers or a tensor, got {type(lengths).__name__}")
    rows = [list(row) for row in lengths] if _nested(lengths) else [list(lengths)]  # type: ignore[arg-type]
    widest = max(map(len, rows))
    _check_sizes(function, len(rows), widest)
    for row in rows:
        for value in row:
            _checks.check_integer(function, "lengths", value, 0)
    if function != "packed" and min(map(len, rows)) != widest:
        raise ValueError(f"{function}: lengths must have as many blocks for each image, got {sorted(map(len, rows))}")
    filled = [row + [0] * (widest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int32).to(device or "cpu"), sum(map(sum, rows))


def _check_sizes(function: str, images: int, count: int) -> None:
    if images < 1:
        raise ValueError(f"{function}: lengths must be of one or more images, got {images}")
    if not 1 <= count <= MAX_BLOCKS:
        raise ValueError(f"{function}: lengths must be of 1 to {MAX_BLOCKS} blocks, got {count}")


def _ranges(some: set[int], stepped: bool, own: int, back: bool) -> list[tuple[int, int]]:
    """Runs of neighbours as [begin, end), cut at the token itself in a block where tokens see only those before."""
    runs: list[tuple[int, int]] = []
    for one in sorted(some):
        if runs and runs[-1][1] == one and not (stepped and one == own and back):
            runs[-1] = (runs[-1][0], one + 1)
        else:
            runs.append((SELF if stepped and one == own and back else one, one + 1))
        if stepped and one == own and not back:
            runs[-1] = (runs[-1][0], SELF)
    return runs


def _table(rows: list[list[tuple[int, int]]]) -> Tensor:
    """(S, R, 2), with empty ranges behind those that there are."""
    widest = max(map(len, rows))
    return torch.tensor([row + [(0, 0)] * (widest - len(row)) for row in rows], dtype=torch.int32)


def _made(sizes: Tensor, tokens: int | None, sees: Tensor | None, seen_by: Tensor | None) -> Mask:
    offsets = None
    if sizes.shape[0] > 1:
        sums = sizes.sum(1)
        offsets = (sums.cumsum(0) - sums).to(torch.int32)
    tables = (table if table is None else table.to(sizes.device) for table in (sees, seen_by))
    return Mask(sizes, offsets, *tables, tokens)
