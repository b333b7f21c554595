"""Self-attention of next-scale models: a whole schedule at once in training, scale by scale over a cache in generation.

The one module serves VAR and Infinity, whose self-attention has the same parameters under the same names; Infinity
turns queries and keys besides, by the table that `rope_table` builds.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unifiedar.nn.linear_few import in_parts, of_few
from unifiedar.ops import (
    _checks,
    block_attention,
    block_causal_attention,
    cached_attention,
    masks,
    packed_norm_rope,
    qk_norm_rope,
)

__all__ = ["NextScaleAttention", "rope_table"]


def rope_table(
    scales: Sequence[tuple[int, int]],
    head_dim: int,
    *,
    grid: tuple[int, int] | None = None,
    base: float = 10000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angles of two-dimensional RoPE for the tokens of all scales, each scale spread over one grid.

    Token (i, j) of a scale of h x w stands at row y = round(i H / h) and column x = round(j W / w) of the grid, halves
    to even; of its D / 2 angles the first half are y base^(-4m / D), the other half x base^(-4m / D), m from 0 up. This
    is Infinity's table (rope2d_normalized_by_hw = 2): Han et al., "Infinity" (2024), section 3.2.

    Args:
        scales: height and width of each scale, in tokens.
        head_dim: D, a multiple of 4.
        grid: H and W; None is the last scale. Infinity has the last scale of its 1-megapixel schedule at that aspect
            ratio, whatever the size of the picture.
        base: of the frequencies.
        device: of the table.

    Returns:
        (2, L, D / 2) float32, cosines and sines, the scales one after another, L the number of all tokens.

    Raises:
        TypeError: for sizes that are no integers.
        ValueError: for no scales, sizes below 1, or a head_dim that is no multiple of 4.
    """
    function = "rope_table"
    _checks.check_integer(function, "head_dim", head_dim, 4)
    if head_dim % 4:
        raise ValueError(f"{function}: head_dim must be a multiple of 4, got {head_dim}")
    _checks.check_number(function, "base", base, 1)
    scales = list(scales)
    if not scales:
        raise ValueError(f"{function}: scales must be one or more, got none")
    tall, wide = scales[-1] if grid is None else grid
    for i, size in enumerate((*scales, (tall, wide))):
        for value in size:
            _checks.check_integer(function, f"scales[{i}]" if i < len(scales) else "grid", value, 1)
    quarter = torch.arange(0, head_dim // 2, 2, device=device).float()
    frequencies = 1 / base ** (quarter / (head_dim // 2))
    angles = []
    for height, width in scales:
        y = (torch.arange(height, device=device) * (tall / height)).round()
        x = (torch.arange(width, device=device) * (wide / width)).round()
        rows = (y[:, None] * frequencies)[:, None].expand(-1, width, -1)
        columns = (x[:, None] * frequencies)[None].expand(height, -1, -1)
        angles.append(torch.cat((rows, columns), -1).flatten(0, 1))
    angle = torch.cat(angles)
    return torch.stack((angle.cos(), angle.sin()))


class NextScaleAttention(nn.Module):
    """Self-attention over scales: a token sees its own scale and all earlier ones whole.

    In training `forward(x, lengths)` takes the tokens of all scales, with gradients. In generation a preallocated cache
    takes keys and values, and nothing is copied from one scale to the next:

        cache = attention.new_cache(batch, sum(lengths))
        for begin, length in ...:
            y = attention(x_of_the_scale, cache=cache, begin=begin)

    Published names and shapes, so that a state_dict of `SelfAttention` of VAR or Infinity loads with strict=True. Keys
    are kept normalized and turned, in the dtype of the projection, to which the published code rounds them in its
    product too.

    Args:
        dim: C, channels of the tokens.
        heads: H, a divisor of dim; D = C / H is a multiple of 8 from 32 to 128.
        l2_norm: whether queries and keys are normalized, and queries multiplied by a learned gain (VAR's attn_l2_norm,
            Infinity's cos_attn).
        softmax_scale: factor on the scores; None is 1 with l2_norm, else 1 / sqrt(D). (VAR without its norm: a quarter
            of that.)
        device, dtype: of the parameters.

    Parameters:
        scale_mul_1H11 (1, H, 1, 1): logarithm of the gain, cut at log 100; with l2_norm only. Starts at log 4.
        mat_qkv.weight (3C, C), q_bias (C), v_bias (C): the projections of queries, keys and values; keys have no bias.
        proj.weight (C, C), proj.bias (C): of the output.

    Buffers:
        zero_k_bias (C): the bias that keys do not have.

    Raises:
        TypeError: for sizes that are no integers, or a softmax_scale that is no number.
        ValueError: for sizes below 1, heads that do not divide dim, or a negative softmax_scale.
    """

    zero_k_bias: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        l2_norm: bool = True,
        softmax_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        _checks.check_integer(name, "dim", dim, 1)
        _checks.check_integer(name, "heads", heads, 1)
        if dim % heads:
            raise ValueError(f"{name}: heads must divide dim ({dim}), got {heads}")
        if softmax_scale is not None:
            _checks.check_number(name, "softmax_scale", softmax_scale, 0)
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 if l2_norm else self.head_dim**-0.5
        made = {"device": device, "dtype": dtype}
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4), **made))  # type: ignore[arg-type]
        else:
            self.scale_mul_1H11 = None  # type: ignore[assignment]
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False, **made)  # type: ignore[arg-type]
        self.q_bias = nn.Parameter(torch.zeros(dim, **made))  # type: ignore[arg-type]
        self.v_bias = nn.Parameter(torch.zeros(dim, **made))  # type: ignore[arg-type]
        self.register_buffer("zero_k_bias", torch.zeros(dim, **made))  # type: ignore[arg-type]
        self.proj = nn.Linear(dim, dim, **made)  # type: ignore[arg-type]

    def new_cache(
        self,
        batch: int,
        length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """An empty cache of keys and values.

        Args:
            batch: B.
            length: of all tokens that it is to hold.
            device: None is the parameters'.
            dtype: None is what the projection has: under autocast that of autocast, else the parameters'.

        Returns:
            (2, B, H, length, D): keys and values, not initialized.
        """
        where = self.q_bias.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(where.type)
            dtype = torch.get_autocast_dtype(where.type) if autocast else self.q_bias.dtype
        return torch.empty((2, batch, self.heads, length, self.head_dim), device=where, dtype=dtype)

    def qkv_bias(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parts (C) of the projection's bias, one after another: for whoever runs many scales with the same."""
        return self.q_bias, self.zero_k_bias, self.v_bias

    def forward(
        self,
        x: Tensor,
        scale_lengths: Sequence[int] | Tensor | masks.Mask | None = None,
        *,
        rope: Tensor | None = None,
        cache: Tensor | None = None,
        begin: int = 0,
        bias: Tensor | None = None,
        to_norm: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attention of tokens among themselves and, with a cache, to those before them.

        Args:
            x: (B, L, C), the tokens of one or more whole scales.
            scale_lengths: of the scales in x, as `ops.block_causal_attention` takes them; None: x is one scale. Or a
                mask of `ops.masks`, of several images packed in x for instance; with a cache, of begin + L tokens.
            rope: (2, L, D / 2), the angles of x's tokens (see `rope_table`; with a cache, rows begin to begin + L of
                the whole schedule's), or None.
            cache: (2, B, H, length, D) as `new_cache` makes it; holds the tokens before begin, and is given those of x
                at begin. Without gradients only.
            begin: tokens before x, with a cache.
            bias: (3C,) of the projection, as `qkv_bias` puts it together, if that was done before; None does it now.
            to_norm: what comes out is for `ModulatedNorm.add`, which takes the last bias apart (see `in_parts`).

        Returns:
            (B, L, C), or what that takes.

        Raises:
            TypeError: for a cache of another dtype than the projection's, or other arguments of the wrong type.
            ValueError: for shapes that do not match, a cache that is too short or where gradients are recorded, or a
                begin without a cache.
        """
        y = self._attended(x, scale_lengths, rope, cache, begin, bias)
        return in_parts(self.proj, y) if to_norm else self.proj(y)

    def before_norm(
        self, x: Tensor, cache: Tensor, begin: int, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """As `forward` of one scale over a cache, but what comes out is for `ModulatedNorm.add`: of few rows, the parts
        of the projection (P, B, L, C) and its bias."""
        return in_parts(self.proj, self._attended(x, None, None, cache, begin, bias))

    def _attended(
        self,
        x: Tensor,
        scale_lengths: Sequence[int] | Tensor | masks.Mask | None,
        rope: Tensor | None,
        cache: Tensor | None,
        begin: int,
        bias: Tensor | None,
    ) -> Tensor:
        """What `proj` reads."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"{name}: x must be (batch, length, {self.dim}), got {tuple(x.shape)}")
        _checks.check_integer(name, "begin", begin, 0)
        if begin and cache is None:
            raise ValueError(f"{name}: begin must be 0 without a cache, got {begin}")
        batch, length, _ = x.shape
        if bias is None:
            bias = torch.cat(self.qkv_bias())
        qkv = of_few(self.mat_qkv, x, bias)
        qkv = qkv.view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        norm, gain = (None, None) if self.scale_mul_1H11 is None else ("l2", self.scale_mul_1H11.flatten())
        if cache is not None:
            self._check_cache(name, cache, q, begin)
        if cache is not None and rope is None and scale_lengths is None:
            out = cached_attention(q, k, v, cache, begin, norm=norm, gain=gain, softmax_scale=self.softmax_scale)
            return out.transpose(1, 2).flatten(2)
        if cache is not None:
            place = cache[:, :, :, begin : begin + length]
            q = qk_norm_rope(q, k, v, norm=norm, gain=gain, rope=rope, out=(torch.empty_like(q), *place))[0]
            k, v = cache[:, :, :, : begin + length]
        elif norm is not None or rope is not None:
            q, k, v = packed_norm_rope(qkv, norm=norm, gain=gain, rope=rope)
        if isinstance(scale_lengths, masks.Mask):
            out = block_attention(q, k, v, scale_lengths, softmax_scale=self.softmax_scale)
        else:
            lengths = [length] if scale_lengths is None else scale_lengths
            out = block_causal_attention(q, k, v, lengths, prefix=begin, softmax_scale=self.softmax_scale)
        return out.transpose(1, 2).flatten(2)

    def _check_cache(self, name: str, cache: Tensor, q: Tensor, begin: int) -> None:
        batch, _, length, _ = q.shape
        _checks.check_tensor(name, "cache", cache, (q.dtype,))
        if cache.ndim != 5 or (*cache.shape[:3], cache.shape[4]) != (2, batch, self.heads, self.head_dim):
            raise ValueError(
                f"{name}: cache must be (2, {batch}, {self.heads}, length, {self.head_dim}), got {tuple(cache.shape)}"
            )
        if cache.shape[3] < begin + length:
            raise ValueError(
                f"{name}: cache must have room for {begin} + {length} tokens, got a length of {cache.shape[3]}"
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, l2_norm={self.scale_mul_1H11 is not None}"
