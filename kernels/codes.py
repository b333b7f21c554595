"""Triton kernels of the family `codes`: sums of codebook rows over depth, and their gradient in the codebook.

Everything is added up in float32 and rounded once. Rows and offsets are 64-bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COMPILE_CASES", "residual_lookup", "residual_lookup_backward"]


@dataclass(frozen=True)
class Tile:
    """A program's share: `rows` of the output, or entries summed at a time, by `channels`."""

    rows: int
    channels: int
    warps: int


def _tile(channels: int, itemsize: int, height: int) -> Tile:
    """`height` 16-byte loads a thread at 128 threads; as wide as a row, or as an eighth of padding at most allows."""
    elements = 128 * height * 16 // itemsize
    width = min(triton.next_power_of_2(channels), elements // height)
    while width > 64 and triton.cdiv(channels, width) * width * 8 > channels * 9:
        width //= 2
    return Tile(rows=min(elements // width, 64), channels=width, warps=4)


def lookup_tile(channels: int, itemsize: int) -> Tile:
    """Tile of the lookup: two packs a thread and level."""
    return _tile(channels, itemsize, 2)


def backward_tile(channels: int, itemsize: int) -> Tile:
    """Tile of the backward's sums: four packs a thread in flight."""
    return _tile(channels, itemsize, 4)


@triton.jit
def residual_lookup_kernel(
    codes,  # [rows, depth] int64, contiguous
    codebook,  # [depth, num_codes, channels], strides book_level (0: shared), book_entry, 1
    out,  # [rows, channels], or [rows, depth, channels] if CUMULATIVE
    rows,
    num_codes,
    depth,
    channels,
    book_level,
    book_entry,
    CUMULATIVE: tl.constexpr,
    LEVELS: tl.constexpr,  # gathered rows of one output row in flight
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of rows, blocks of channels). A code outside [0, num_codes) adds nothing."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    table = codebook
    for begin in range(0, depth, LEVELS):
        for offset in tl.static_range(LEVELS):
            level = begin + offset
            present = (row < rows) & (level < depth)
            code = tl.load(codes + row * depth + level, mask=present, other=-1)
            known = (code >= 0) & (code < num_codes)
            at = table + code[:, None] * book_entry + channel[None, :]
            total += tl.load(at, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
            table += book_level
            if CUMULATIVE:
                at = out + (row * depth + level)[:, None] * channels + channel[None, :]
                tl.store(at, total.to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])
    if not CUMULATIVE:
        at = out + row[:, None] * channels + channel[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def _sum_entries(
    grad,
    order,
    begin,
    end,
    channel,
    depth,
    channels,
    CUMULATIVE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum of the gradients of the sorted entries [begin, end), in an order that their number fixes."""
    total = tl.zeros([BLOCK_C], tl.float32)
    inside = channel < channels
    i = begin
    while i < end:
        entry = i + tl.arange(0, BLOCK_E)
        present = entry < end
        index = tl.load(order + entry, mask=present, other=0)
        row = index // depth
        if CUMULATIVE:
            # A row chosen at a level is part of that running sum and of all later ones.
            level = index % depth
            part = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
            for back in range(depth):
                last = depth - 1 - back
                at = grad + (row * depth + last)[:, None] * channels + channel[None, :]
                known = present & (level <= last)
                part += tl.load(at, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        else:
            at = grad + row[:, None] * channels + channel[None, :]
            part = tl.load(at, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(part, axis=0)
        i += BLOCK_E
    return total


@triton.jit
def residual_lookup_partial_kernel(
    grad,  # [rows, channels], or [rows, depth, channels] if CUMULATIVE
    order,  # [entries] int64: row * depth + level of each entry, sorted by key
    keys,  # [entries] int32, ascending: the codebook row of each entry; `tables` marks one to be left out
    begins,  # [tables + 1] int64: where each codebook row's entries begin
    partial,  # [chunks, 2, channels] float32
    entries,
    tables,
    depth,
    channels,
    CHUNK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (chunks, blocks of channels). partial[chunk, 0] is the chunk's share of a segment that began before it,
    partial[chunk, 1] its share of one that begins in it and goes on after it. Other parts are not written."""
    chunk = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    low = chunk * CHUNK
    high = tl.minimum(low + CHUNK, entries)
    first = tl.load(keys + low)
    last = tl.load(keys + high - 1)
    at = partial + chunk * 2 * channels + channel
    if first < tables:  # noqa: SIM102 - `begins` must not be read beyond its end
        if tl.load(begins + first) < low:
            end = tl.minimum(high, tl.load(begins + first + 1))
            head = _sum_entries(grad, order, low, end, channel, depth, channels, CUMULATIVE, BLOCK_E, BLOCK_C)
            tl.store(at, head, mask=inside)
    if last < tables:
        begin = tl.load(begins + last)
        if (begin >= low) & (tl.load(begins + last + 1) > high):
            tail = _sum_entries(grad, order, begin, high, channel, depth, channels, CUMULATIVE, BLOCK_E, BLOCK_C)
            tl.store(at + channels, tail, mask=inside)


@triton.jit
def residual_lookup_backward_kernel(
    grad,
    order,
    begins,
    partial,  # as above
    out,  # [tables, channels]
    depth,
    channels,
    CHUNK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tables, blocks of channels). Sums a codebook row's entries or, where chunks cut them, its parts."""
    table = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    begin = tl.load(begins + table)
    end = tl.load(begins + table + 1)
    first = begin // CHUNK
    last = (tl.maximum(end, begin + 1) - 1) // CHUNK
    if first == last:
        total = _sum_entries(grad, order, begin, end, channel, depth, channels, CUMULATIVE, BLOCK_E, BLOCK_C)
    else:
        total = tl.load(partial + (first * 2 + 1) * channels + channel, mask=inside, other=0.0)
        i = first + 1
        while i <= last:
            chunk = i + tl.arange(0, BLOCK_E)
            at = partial + chunk[:, None] * 2 * channels + channel[None, :]
            total += tl.sum(tl.load(at, mask=(chunk <= last)[:, None] & inside[None, :], other=0.0), axis=0)
            i += BLOCK_E
    tl.store(out + table * channels + channel, total.to(out.dtype.element_ty), mask=inside)


def residual_lookup(codes: torch.Tensor, codebook: torch.Tensor, out: torch.Tensor, cumulative: bool) -> None:
    """Fills out (N, C), or (N, D, C) if cumulative, from contiguous codes (N, D) and codebook (K, C) or (D, K, C)."""
    rows, depth = codes.shape
    num_codes, channels = codebook.shape[-2:]
    tile = lookup_tile(channels, codebook.element_size())
    residual_lookup_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(channels, tile.channels))](
        codes,
        codebook,
        out,
        rows,
        num_codes,
        depth,
        channels,
        0 if codebook.ndim == 2 else codebook.stride(0),
        codebook.stride(-2),
        CUMULATIVE=cumulative,
        LEVELS=min(triton.next_power_of_2(depth), 4),
        BLOCK_N=tile.rows,
        BLOCK_C=tile.channels,
        num_warps=tile.warps,
    )


def residual_lookup_backward(
    grad: torch.Tensor,
    order: torch.Tensor,
    keys: torch.Tensor,
    begins: torch.Tensor,
    depth: int,
    cumulative: bool,
    chunk_log2: int,
    partial: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills out (tables, C) from contiguous grad and its sorted entries; the arguments are the kernels' above."""
    tables, channels = out.shape
    tile = backward_tile(channels, grad.element_size())
    entries = order.numel()
    chunks = triton.cdiv(entries, 1 << chunk_log2)
    blocks = triton.cdiv(channels, tile.channels)
    shape = {
        "CHUNK": 1 << chunk_log2,
        "CUMULATIVE": cumulative,
        "BLOCK_E": tile.rows,
        "BLOCK_C": tile.channels,
        "num_warps": tile.warps,
    }
    if chunks > 1:
        residual_lookup_partial_kernel[(chunks, blocks)](
            grad, order, keys, begins, partial, entries, tables, depth, channels, **shape
        )
    residual_lookup_backward_kernel[(tables, blocks)](grad, order, begins, partial, out, depth, channels, **shape)


def _cases() -> list[tuple]:
    """(kernel, signature, constexprs, options, divisors) to compile, at the widths of VILA-U and RQ-VAE.

    Divisors, by argument, are what a launch would find out: with them memory is moved in packs, without element by
    element. Every kernel is compiled both ways.
    """
    cases: list[tuple] = []

    def add(kernel, warps: int, types: dict[str, str], **constants: int | bool) -> None:
        names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        packed = [
            name for name, kind in names.items() if kind[0] == "*" or name in ("channels", "book_entry", "book_level")
        ]
        signature = {**names, **dict.fromkeys(constants, "constexpr")}
        for divisors in (dict.fromkeys(packed, 16), {}):
            cases.append((kernel, signature, constants, {"num_warps": warps}, divisors))

    for name, channels, itemsize in (("bf16", 1024, 2), ("fp16", 256, 2), ("fp32", 256, 4)):
        features = dict.fromkeys(("codebook", "grad", "out"), f"*{name}")
        types = {**features, "codes": "*i64", "order": "*i64", "keys": "*i32", "begins": "*i64", "partial": "*fp32"}
        for cumulative in (False, True):
            tile = lookup_tile(channels, itemsize)
            blocks = {"CUMULATIVE": cumulative, "BLOCK_C": tile.channels}
            add(residual_lookup_kernel, tile.warps, types, LEVELS=4, BLOCK_N=tile.rows, **blocks)
            tile = backward_tile(channels, itemsize)
            blocks = {"CUMULATIVE": cumulative, "BLOCK_C": tile.channels, "BLOCK_E": tile.rows, "CHUNK": 256}
            add(residual_lookup_partial_kernel, tile.warps, types, **blocks)
            add(residual_lookup_backward_kernel, tile.warps, types, **blocks)
    return cases


COMPILE_CASES = _cases()
