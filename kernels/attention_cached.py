"""Triton kernel of attention over a cache with the norms of queries and keys in it.

A program has a tile of one head's queries. It normalizes them, passes by the cache's keys, then by the new ones, which
it normalizes itself from the projection: nothing has to be written before it is read, so one launch does it all. The
programs of a head share out the tiles of new keys that are to be kept; each is written by one of them, where nobody
reads.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from unifiedar.kernels._dependent import dependent
from unifiedar.kernels.attention import (
    _UNIT,
    Tile,
    _block,
    _exponential,
    _in_base,
    _pass_keys,
    _precision,
    _strides,
    _take,
)
from unifiedar.kernels.norm import _cut, _inverse
from unifiedar.kernels.norm import _exponential as _accurate_exponential

__all__ = ["COMPILE_CASES", "cached_attention", "cached_tile"]

_SCALARS = [
    *("length", "begin", "heads", "share", "cache_part"),
    *(f"{name}_{step}" for name in ("q", "k", "v", "cache", "out") for step in ("batch", "head", "row")),
]


def cached_tile(width: int, itemsize: int) -> Tile:
    """Tile of the kernel: queries held, keys passed."""
    if itemsize == 4:
        return Tile(32, 32, 8, 2)
    return Tile(64, 64, 4, 3) if width <= 64 else Tile(64, 64, 8, 2)


@triton.jit
def _normed(x, gain, eps, NORM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [rows, channels] as the norm's own kernel rounds them; gain is one address, or None."""
    y = x.to(tl.float32)
    if NORM != "none":
        y *= _inverse(y, eps, NORM, WIDTH)[:, None]
    if gain is not None:
        y *= _accurate_exponential(_cut(tl.load(gain)))
    return y.to(x.dtype)


@triton.jit(do_not_specialize=_SCALARS)
def cached_attention_kernel(
    q,  # [batch, heads, length, width], strides q_batch, q_head, q_row in units, 1
    k,  # [batch, heads / share, length, width]
    v,  # like k
    cache,  # [2, batch, heads / share, at least begin + length, width]; written from `begin` on, read before
    gain,  # [heads], or None
    out,  # like q; written
    length,
    begin,
    heads,
    share,  # query heads a key head
    softmax_scale,
    eps,
    cache_part,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    cache_batch,
    cache_head,
    cache_row,
    out_batch,
    out_head,
    out_row,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of queries * batch * heads,), those of a head one after another."""
    if PDL:
        cuda.gdc_wait()
    tiles = tl.cdiv(length, BLOCK_M)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    batch, head = (row // heads).to(tl.int64), row % heads
    group = (head // share).to(tl.int64)
    own = head.to(tl.int64)
    k += (batch * k_batch + group * k_head) * _UNIT
    v += (batch * v_batch + group * v_head) * _UNIT
    cache += (batch * cache_batch + group * cache_head) * _UNIT
    values = cache + cache_part.to(tl.int64) * _UNIT

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    line, column = channel[None, :], channel[:, None]
    wide = query.to(tl.int64)[:, None] * _UNIT
    q_at = q + (batch * q_batch + own * q_head) * _UNIT + wide * q_row + line
    held = _take(q_at, query[:, None], length, line, True, WIDTH)
    held = _normed(held, None if gain is None else gain + head, eps, NORM, WIDTH)

    factor = _in_base(softmax_scale, PRECISION)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = key.to(tl.int64) * _UNIT * cache_row
    k_at = cache + place[None, :] + column
    v_at = values + place[:, None] + line
    end = tl.zeros([BLOCK_M], tl.int32) + begin
    # With a mask in every step: a second loop without one makes the kernel longer by more than it saves.
    for first in range(0, begin, BLOCK_N):
        total, top, weight = _pass_keys(
            total, top, weight, held, k_at, v_at, first + key, begin, None, end, channel, factor, True, WIDTH, PRECISION
        )
        k_at += BLOCK_N * _UNIT * cache_row
        v_at += BLOCK_N * _UNIT * cache_row

    for first in tl.range(0, length, BLOCK_N, num_stages=1):
        new = first + key
        far = new.to(tl.int64)[:, None] * _UNIT
        found = _take(k + far * k_row + line, new[:, None], length, line, True, WIDTH)
        found = _normed(found, None, eps, NORM, WIDTH)
        value = _take(v + far * v_row + line, new[:, None], length, line, True, WIDTH)
        if ((first // BLOCK_N) % tiles == tile) & (head % share == 0):
            inside = (new < length)[:, None] & (line < WIDTH)
            kept = (new + begin).to(tl.int64)[:, None] * _UNIT * cache_row + line
            tl.store(cache + kept, found, mask=inside)
            tl.store(values + kept, value, mask=inside)
        scores = tl.dot(held, tl.trans(found), input_precision=PRECISION)
        scores = tl.where((new < length)[None, :], scores * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = _exponential(scores, 1.0, new_top[:, None], PRECISION)
        fade = _exponential(top, 1.0, new_top, PRECISION)
        weight = weight * fade + tl.sum(weights, 1)
        total = tl.dot(weights.to(value.dtype), value, total * fade[:, None], input_precision=PRECISION)
        top = new_top

    if PDL:
        cuda.gdc_launch_dependents()
    out_at = out + (batch * out_batch + own * out_head) * _UNIT + wide * out_row + line
    total = total / weight[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(query < length)[:, None] & (line < WIDTH))


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    begin: int,
    norm: str,
    eps: float,
    gain: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
) -> None:
    """Fills out, and the cache from begin on.

    Args:
        q: (B, H, L, D); k, v: (B, G, L, D), as `attention_forward` takes them.
        cache: (2, B, G, N, D), each half `aligned`, N at least begin + L.
        begin: tokens that are there.
        norm: "l2" or "none".
        eps: of the norm.
        gain: (H,), contiguous, or None.
        softmax_scale: factor on the scores, not negative.
        out: like q.
    """
    batch, heads, length, width = q.shape
    tile = cached_tile(width, q.element_size())
    cached_attention_kernel[(triton.cdiv(length, tile.held) * batch * heads,)](
        q, k, v, cache, gain, out, length, begin, heads, heads // k.shape[1], softmax_scale, eps,
        cache.stride(0) // 8, *_strides(q), *_strides(k), *_strides(v), *_strides(cache[0]), *_strides(out),
        NORM=norm, WIDTH=width, PRECISION=_precision(q.dtype), BLOCK_M=tile.held, BLOCK_N=tile.passed,
        BLOCK_D=_block(width), num_warps=tile.warps, num_stages=tile.stages, **dependent(q),
    )  # fmt: skip


def _cases() -> list[tuple]:
    """What to compile, as in `unifiedar.kernels.attention`: VAR's form and that of scores without a norm."""
    cases: list[tuple] = []
    tensors = ("q", "k", "v", "cache", "out")
    for width, feature, norm in (
        (64, "fp16", "l2"), (64, "bf16", "l2"), (64, "bf16", "none"), (128, "bf16", "l2"), (40, "fp16", "l2"),
        (64, "fp32", "l2"), (128, "fp32", "none"),
    ):  # fmt: skip
        size = 4 if feature == "fp32" else 2
        tile = cached_tile(width, size)
        constants = {
            "NORM": norm,
            "WIDTH": width,
            "PRECISION": "tf32x3" if size == 4 else "tf32",
            "BLOCK_M": tile.held,
            "BLOCK_N": tile.passed,
            "BLOCK_D": _block(width),
            **({} if norm == "l2" else {"gain": None}),
        }
        types = {**dict.fromkeys(tensors, f"*{feature}"), "gain": "*fp32", "softmax_scale": "fp32", "eps": "fp32"}
        kernel = cached_attention_kernel
        for arch, launch in ((80, {}), (90, {"launch_pdl": True})):
            wanted = constants | {"PDL": bool(launch)}
            names = {name: types.get(name, "i32") for name in kernel.arg_names if name not in wanted}
            signature = {**names, **dict.fromkeys(wanted, "constexpr")}
            divisors = {name: 16 for name in names if name in tensors}
            options = {"num_warps": tile.warps, "num_stages": tile.stages, **launch}
            cases.append((kernel, signature, wanted, options, divisors, (arch,)))
    return cases


COMPILE_CASES = _cases()
