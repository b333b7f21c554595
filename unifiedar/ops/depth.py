"""Depth-transformer decoding: the D codes of a position, one after another, as one operator.

    x_0 = hidden (projected, or as it is);  x_d = code(e_0 + ... + e_{d-1}), e_i the codebook's row of code i
    y_d = blocks(x_d + position_d), causal over the depths;  logits_d = head(norm(y_d));  code_d = draw(logits_d)

A block: x += proj(attention(norm1 x));  x += down(gelu(up(norm2 x))), LayerNorm, biases, exact GELU.
Lee et al., "Autoregressive Image Generation using Residual Quantization" (2022), section 3.2; VILA-U
(arXiv:2409.04429), section 3.2. Keys and values of earlier depths are kept, so that no work is repeated.

`DepthForm`, and which weights there are, say what other models do instead, the code predictors of speech models among
them: Moshi's depformer (Defossez et al., arXiv:2410.00037, section 3.4.1) and Qwen3-TTS's.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native, depth_triton
from unifiedar.ops._op import VARIABLE, Backend, Op, registry
from unifiedar.ops.depth_form import (
    ACTIVATIONS,
    NORMS,
    STATES,
    DepthBlock,
    DepthForm,
    DepthWeights,
    Pair,
    _flatten,
    _unflatten,
    depth_block,
    depth_logits,
    depth_rope,
    depth_tokens,
)

__all__ = [
    "DepthBlock",
    "DepthCodes",
    "DepthForm",
    "DepthWeights",
    "depth_block",
    "depth_decode",
    "depth_logits",
    "depth_pack",
    "depth_rope",
    "depth_tokens",
    "served_by",
    "wants_packed",
]


class DepthCodes(NamedTuple):
    """Result of `depth_decode`.

    Fields:
        codes: (N, D) int64.
        total: (N, C), the sum of the codes' embeddings, in the codebook's dtype.
        unsound: (N,) int32, the first depth at which the scores to be drawn from had NaN; -1 if none had.
        logits: (rows, D, K) before guidance, in the dtype of hidden, if they were asked for; else None.
    """

    codes: Tensor
    total: Tensor
    unsound: Tensor
    logits: Tensor | None

    def check(self) -> None:
        """Raises FloatingPointError, naming row and depth, if there was NaN; waits for the GPU to look."""
        for row, depth in enumerate(self.unsound.tolist()):
            if depth >= 0:
                raise FloatingPointError(
                    f"depth_decode: logits must not be NaN, got some in row {row} at depth {depth}"
                )


# ---- definition ------------------------------------------------------------------------------------------------------


def _decode_eager(
    hidden: Tensor,
    codebook: Tensor,
    tensors: Sequence[Tensor | None],
    packed: Tensor | None,
    num_heads: int,
    guidance: float | None,
    guidance_rows: Tensor | None,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    noise: Tensor | None,
    forced: Tensor | None,
    return_logits: bool,
    start: Tensor | None,
    *form: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        weights = _unflatten(tensors, num_heads, DepthForm(*form))
        guided = guidance is not None or guidance_rows is not None
        depth, rows, kind = len(temperature), len(hidden), weights.form
        sample, lookup = registry["sample_codes"], registry["residual_lookup"]
        codes, total, unsound, all_logits = _decode_fake(
            hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise,
            forced, return_logits, start, *form,
        )  # fmt: skip
        total.zero_()
        unsound.fill_(-1)
        if rows == 0:  # attention without rows is None on some devices
            return codes, total, unsound, all_logits
        cache = []
        for block in weights.blocks:
            width = block.query[0].shape[-2] // num_heads
            cache.append(hidden.new_empty(2, rows, kind.kv_heads or num_heads, kind.length(depth), width))
        entered = hidden.new_empty(rows, 0, codebook.shape[-1]) if start is None else start.unsqueeze(1)
        rope = None
        if weights.blocks:
            rope = depth_rope(hidden, weights.blocks[0], num_heads, kind, 0, kind.length(depth))
        for d in range(depth):
            x = depth_tokens(hidden, entered, weights, d)
            begin = kind.length(d) if d else 0
            turns = None if rope is None else rope[:, begin : begin + x.shape[1]]
            for block, kept in zip(weights.blocks, cache, strict=True):
                x = depth_block(x, block, num_heads, kept, begin, 0.0, kind, turns)
            logits = depth_logits(x[:, -1:], weights, d)[:, 0]
            if return_logits:
                all_logits[:, d] = logits
            if forced is not None:
                codes[:, d] = forced[:, d]
            else:
                scores = logits
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    scores = unconditional + (conditional - unconditional)
                unsound.masked_fill_(scores.isnan().any(-1) & (unsound < 0), d)
                drawn = None if noise is None or temperature[d] == 0 else noise[:, d]
                codes[:, d] = sample(
                    logits, guidance, guidance_rows, temperature[d], top_k[d], None, top_p[d], None, drawn, "auto"
                )
            table = codebook if codebook.ndim == 2 else codebook[d]
            last = lookup(codes[:, d : d + 1], table, False, "auto")
            total += last
            one = (last if kind.last else total).to(hidden.dtype)
            entered = torch.cat([one, one] if guided else [one]).unsqueeze(1)
            if start is not None and not kind.last:
                entered = entered + start.unsqueeze(1)
        return codes, total, unsound, all_logits


# ---- shape of the outputs --------------------------------------------------------------------------------------------


def _decode_fake(
    hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
    return_logits, start, *form,
):  # fmt: skip
    guided = guidance is not None or guidance_rows is not None
    rows, depth = hidden.shape[0], len(temperature)
    count = rows // 2 if guided else rows
    return (
        hidden.new_empty((count, depth), dtype=torch.int64),
        codebook.new_empty((count, codebook.shape[-1])),
        hidden.new_empty((count,), dtype=torch.int32),
        hidden.new_empty((rows, depth, tensors[7].shape[-2]) if return_logits else (0,)),
    )


# ---- packed weights --------------------------------------------------------------------------------------------------

_TILE, _CHUNK = 16, 64  # outputs and inputs that one warp multiplies at a time (csrc/depth.cu)


def _pack_matrix(weight: Tensor) -> Tensor:
    """(outputs, inputs), padded with zeros, as [tiles][chunks][4 pieces of 16 x 16][32 lanes][8], flat.

    A lane's eight are what the matrix units want of it, so that it loads them at once: of a piece the rows lane / 4 and
    8 more, at inputs that csrc/depth.cu names.
    """
    outputs, inputs = weight.shape
    tiles, chunks = -(-outputs // _TILE), -(-inputs // _CHUNK)
    whole = F.pad(weight, (0, chunks * _CHUNK - inputs, 0, tiles * _TILE - outputs))
    parts = whole.view(
        tiles, 2, 8, chunks, 2, 4, 2, 2, 2
    )  # tile, row / 8, row; chunk, half, lane, piece, slot / 8, pair
    return parts.permute(0, 3, 4, 6, 2, 5, 7, 1, 8).reshape(-1)


def depth_pack(weights: DepthWeights) -> Tensor:
    """The weights in the order in which the CUDA kernel reads them, once at each depth: made once, given to each call.

    Args:
        weights: float16 or bfloat16.

    Returns:
        One flat tensor, a little larger than all weights together; a copy that later changes do not reach.

    Raises:
        TypeError: for weights of another dtype.
        ValueError: for weights of a form that the CUDA kernel does not take, with the reason.
    """
    _checks.check_tensor("depth_pack", "weights", weights.head[0], (torch.bfloat16, torch.float16))
    reason = _unfit_form(weights)
    if reason is not None:
        raise ValueError(f"depth_pack: weights must be of a form that the CUDA kernel takes, which {reason}")
    with torch.no_grad():
        projected = () if weights.hidden is None else (weights.hidden,)
        assert weights.position is not None  # of this form, like the two below
        assert weights.code is not None
        assert weights.norm is not None
        matrices = [pair[0] for pair in (weights.code, *projected)]
        vectors: list[Any] = [weights.position, *(pair[1] for pair in (weights.code, *projected))]
        for block in weights.blocks:
            qkv = (block.query, block.key, block.value)
            matrices += [torch.cat([w for w, _ in qkv]), block.proj[0], block.up[0], block.down[0]]
            vectors += [*block.norm1, *(b for _, b in qkv), block.proj[1], *block.norm2, block.up[1], block.down[1]]
        matrices.append(weights.head[0])
        vectors += [*weights.norm, weights.head[1]]
        sizes = [-(-m.shape[0] // _TILE) * _TILE * -(-m.shape[1] // _CHUNK) * _CHUNK for m in matrices]
        sizes += [vector.numel() for vector in vectors]
        packed = weights.position.new_empty(sum(sizes))
        places = packed.split(sizes)
        for place, matrix in zip(places, matrices, strict=False):  # one at a time: a second copy of all is never held
            place.copy_(_pack_matrix(matrix))
        for place, vector in zip(places[len(matrices) :], vectors, strict=True):
            place.copy_(vector.reshape(-1))
        return packed


def wants_packed(hidden: Tensor, codebook: Tensor, weights: DepthWeights, backend: str = "auto") -> bool:
    """Whether a call with these arguments would use packed weights if it had them.

    Args:
        hidden, codebook, weights, backend: as `depth_decode` takes them.

    Returns:
        True if the CUDA backend is asked for, or would be chosen.
    """
    return served_by(hidden, codebook, weights, backend) == "cuda" and _unfit_here(hidden, codebook, weights) is None


def served_by(hidden: Tensor, codebook: Tensor, weights: DepthWeights, backend: str = "auto") -> str:
    """The name of the backend that serves a call with these arguments and packed weights if it wants them.

    Args:
        hidden, codebook, weights, backend: as `depth_decode` takes them.

    Returns:
        The one asked for, whether it fits or not, or what "auto" chooses.
    """
    name = os.environ.get(VARIABLE) or "auto" if backend == "auto" else backend
    if name != "auto" or not hidden.is_cuda:
        return "eager" if name == "auto" else name
    unfit = {"cuda": _unfit_here, "triton": depth_triton.unfit}
    fit = [
        one.name
        for one in _depth_decode.backends
        if one.on_request is None and (one.name not in unfit or unfit[one.name](hidden, codebook, weights) is None)
    ]
    if len(hidden) > _ROWS and fit[:2] == ["cuda", "triton"]:
        return "triton"
    return fit[0]


# ---- backends --------------------------------------------------------------------------------------------------------

_decode_cuda = _native.define(
    "depth_decode_cuda(Tensor hidden, Tensor packed, Tensor codebook, Tensor? noise, Tensor? guidance_rows, "
    "Tensor? forced, Tensor settings, int dim, int layers, int num_codes, bool projected, bool guided, float guidance, "
    "Tensor(a!) workspace, Tensor(b!) codes, Tensor(c!) total, Tensor(d!) unsound, Tensor(e!)? logits, int stop) -> ()"
)
_decode_plan = _native.define(
    "depth_decode_plan_cuda(Tensor hidden, int rows, int dim, int layers, int depth, int num_codes, int code_dim, "
    "bool projected, bool guided, Tensor(a!) plan) -> ()"
)

_PLAN = ("limit", "barrier", "parts", "x", "q", "y", "h", "cache", "sums", "keys", "bytes")
_MOST = 64  # codes of a position
_ROWS = 24  # beyond which Triton's are faster, though a launch of the kernel takes 32


@functools.cache
def _kept_plan(device: torch.device, dtype: torch.dtype, hidden_dim: int, *sizes: int) -> dict[str, int]:
    # Asked of a tensor that is not kept; the answer depends on sizes, dtype and device only.
    plan = torch.zeros(len(_PLAN), dtype=torch.int64)
    _decode_plan(torch.empty((0, hidden_dim), dtype=dtype, device=device), *sizes, plan)
    return dict(zip(_PLAN, plan.tolist(), strict=True))


@functools.cache
def _kept_settings(temperature: tuple[float, ...], top_k: tuple[int, ...], top_p: tuple[float, ...]) -> Tensor:
    """(3, D) float64 on the CPU: what scores are multiplied with (0: greedy), top-k and top-p."""
    inverse = [1 / t if t else 0.0 for t in temperature]
    return torch.tensor([inverse, [float(min(k, 2**31 - 1)) for k in top_k], top_p], dtype=torch.float64)


def _sizes(weights: DepthWeights) -> tuple[int, int, int, int, bool]:
    """dim, layers, depth, num_codes, and whether the hidden state is projected."""
    num_codes, dim = weights.head[0].shape[-2:]
    return dim, len(weights.blocks), weights.depth, num_codes, weights.hidden is not None


def _plan(hidden: Tensor, codebook: Tensor, weights: DepthWeights, rows: int, guided: bool) -> dict[str, int]:
    dim, layers, depth, num_codes, projected = _sizes(weights)
    sizes = (rows, dim, layers, depth, num_codes, codebook.shape[-1], projected, guided)
    return _kept_plan(hidden.device, hidden.dtype, hidden.shape[1], *sizes)


def _unfit_form(weights: DepthWeights) -> str | None:
    """What of the weights' form the kernel does not take: None if it takes it all."""
    form, blocks = weights.form, weights.blocks
    dim = weights.head[0].shape[-1]
    if form.norm != "layer":
        return f"needs LayerNorm, got {form.norm!r}"
    if form.eps != 1e-5:
        return f"needs an eps of 1e-5, got {form.eps:g}"
    if form.activation != "gelu" or any(block.gate is not None for block in blocks):
        return f"needs an MLP of exact GELU without a gate, got {form.activation!r}"
    if form.state != "first":
        return f"needs the hidden state at the first depth alone, got {form.state!r}"
    if form.last:
        return "needs the running sum of embeddings, got the last code's"
    if form.rope or weights.position is None:
        return "needs learned positions and no others, got rotary ones or none"
    if form.kv_heads not in (0, weights.num_heads):
        return f"needs keys and values for each of {weights.num_heads} heads, got {form.kv_heads}"
    if any(block.query_norm is not None for block in blocks):
        return "needs queries and keys as they are, got norms of them"
    if weights.code is None or weights.norm is None:
        return "needs a projection of embeddings and a norm before the head, got weights without"
    pairs = [weights.code, weights.norm, weights.head, *(pair for block in blocks for pair in block[:8])]
    if any(bias is None for _, bias in (*pairs, *(() if weights.hidden is None else (weights.hidden,)))):
        return "needs biases, got weights without"
    if weights.norm[0].ndim == 2 or any(weight.ndim == 3 for weight, _ in pairs):
        return "needs the same weights at all depths, got some for each"
    if any(block.query[0].shape[0] != dim or block.up[0].shape[0] != 4 * dim for block in blocks):
        return f"needs heads that are {dim} wide together and an MLP 4 times as wide, got others"
    return None


def _unfit_here(hidden: Tensor, codebook: Tensor, weights: DepthWeights) -> str | None:
    reason = _native.cuda_unfit(hidden) or _unfit_form(weights)
    if reason is not None:
        return reason
    dim, _, depth, num_codes, projected = _sizes(weights)
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {str(hidden.dtype).removeprefix('torch.')}"
    if codebook.dtype == torch.float64:
        return "needs a codebook of float32 or less, got float64"
    if codebook.shape[-2] != num_codes:
        return f"needs a codebook of {num_codes} rows, got {codebook.shape[-2]}"
    if dim != 64 * weights.num_heads:
        return f"needs heads 64 wide, got {dim / weights.num_heads:g}"
    if projected and hidden.shape[1] % _CHUNK:
        return f"needs a hidden state of a width that is a multiple of {_CHUNK}, got {hidden.shape[1]}"
    if depth > _MOST:
        return f"needs at most {_MOST} codes, got {depth}"
    if _plan(hidden, codebook, weights, 2, True)["limit"] < 2:
        return "needs a device that holds all blocks of a grid at once, with shared memory for two rows of this width"
    return None


def _unfit_cuda(
    hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
    return_logits, start, *form,
) -> str | None:  # fmt: skip
    reason = _unfit_here(hidden, codebook, _unflatten(tensors, num_heads, DepthForm(*form)))
    return "needs packed weights (depth_pack), got none" if reason is None and packed is None else reason


def _run_cuda(
    hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
    return_logits, start, *form, stop=-1,
):  # fmt: skip
    codes, total, unsound, logits = _decode_fake(
        hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
        return_logits, start, *form,
    )  # fmt: skip
    guided = guidance is not None or guidance_rows is not None
    weights = _unflatten(tensors, num_heads, DepthForm(*form))
    count, (dim, layers, _, num_codes, projected) = len(codes), _sizes(weights)
    limit = _plan(hidden, codebook, weights, 2, guided)["limit"] // (2 if guided else 1)
    limit = max(1, -(-count // -(-count // limit))) if count else limit  # parts of one size: each reads all weights
    settings = _kept_settings(tuple(temperature), tuple(top_k), tuple(top_p))
    hidden = hidden.contiguous()
    codebook = codebook if codebook.stride(-1) == 1 else codebook.contiguous()
    if noise is not None:
        noise = noise.float()
        noise = noise if noise.stride(-1) == 1 else noise.contiguous()
    rows_guidance = None if guidance_rows is None else guidance_rows.float().contiguous()
    forced = None if forced is None else forced.contiguous()
    workspace = None
    for begin in range(0, count, limit):
        end, whole = min(begin + limit, count), limit >= count
        part = slice(begin, end)
        x = hidden if whole else torch.cat([half[part] for half in hidden.chunk(1 + guided)])
        part_logits = logits if whole else logits.new_empty((len(x), *logits.shape[1:]))
        plan = _plan(hidden, codebook, weights, len(x), guided)
        workspace = hidden.new_empty(plan["bytes"], dtype=torch.uint8)
        _decode_cuda(
            x,
            packed,
            codebook,
            None if noise is None else noise[part],
            None if rows_guidance is None else rows_guidance[part],
            None if forced is None else forced[part],
            settings,
            dim,
            layers,
            num_codes,
            projected,
            guided,
            0.0 if guidance is None else guidance,
            workspace,
            codes[part],
            total[part],
            unsound[part],
            part_logits if return_logits else None,
            stop,
        )
        if return_logits and not whole:
            for to, made in zip(logits.chunk(1 + guided), part_logits.chunk(1 + guided), strict=True):
                to[part] = made
    return (codes, total, unsound, logits) if stop < 0 else workspace


def _unfit_triton(
    hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
    return_logits, start, *form,
) -> str | None:  # fmt: skip
    return depth_triton.unfit(hidden, codebook, _unflatten(tensors, num_heads, DepthForm(*form)))


def _run_triton(
    hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
    return_logits, start, *form,
):  # fmt: skip
    outputs = _decode_fake(
        hidden, codebook, tensors, packed, num_heads, guidance, guidance_rows, temperature, top_k, top_p, noise, forced,
        return_logits, start, *form,
    )  # fmt: skip
    weights = _unflatten(tensors, num_heads, DepthForm(*form))
    with torch.no_grad(), torch.cuda.device_of(hidden):
        depth_triton.decode(
            hidden, codebook, weights, guidance, guidance_rows, temperature, top_k, top_p, noise, forced, return_logits,
            start, *outputs,
        )  # fmt: skip
    return outputs


# ---- operator --------------------------------------------------------------------------------------------------------

_depth_decode = Op(
    "depth_decode(Tensor hidden, Tensor codebook, Tensor?[] weights, Tensor? packed, SymInt num_heads, "
    "float? guidance, Tensor? guidance_rows, float[] temperature, SymInt[] top_k, float[] top_p, Tensor? noise, "
    "Tensor? forced, bool return_logits, Tensor? start, str norm, float eps, str activation, str state, bool last, "
    "SymInt kv_heads, float rope, SymInt[] order, SymInt depth) -> (Tensor, Tensor, Tensor, Tensor)",
    eager=_decode_eager,
    fake=_decode_fake,
    backends=(
        Backend("cuda", _run_cuda, _unfit_cuda),
        Backend("triton", _run_triton, _unfit_triton),
    ),
)


# ---- public function -------------------------------------------------------------------------------------------------


def depth_decode(
    hidden: Tensor,
    codebook: Tensor,
    weights: DepthWeights,
    *,
    guidance: float | Tensor | None = None,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 0.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    forced: Tensor | None = None,
    return_logits: bool = False,
    start: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str = "auto",
) -> DepthCodes:
    """The D codes of each position, each drawn given the ones before it.

    Args:
        hidden: (N, hidden_dim), the body's state at each position, in the weights' dtype; with `guidance` (2N,
            hidden_dim), conditional rows first, which share the codes drawn.
        codebook: (K, C), shared by all depths, or (D, K, C). It may have more rows, which can be forced, never drawn.
        weights: the depth transformer's parameters.
        guidance, temperature, top_k, top_p: as `unifiedar.ops.sample_codes`; the last three are one number, or one for
            each depth.
        noise: (N, D, K) samples of Exp(1) that decide the draws. None draws float32 samples with `generator`, a
            depth at a time (float64 for float64 logits).
        generator: the random generator for `noise`, None for torch's default one.
        forced: (N, D) int64 codes to go through instead of drawing any (-1 adds nothing), for a look at the logits.
        return_logits: whether logits are wanted.
        start: (rows, C), in the weights' dtype, for forms whose state does not enter first: the embedding of what comes
            before the first code (Moshi's text token, Qwen3-TTS's first code). Running sums begin with it.
        packed: what `depth_pack` made of the same weights, which the CUDA backend needs.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        `DepthCodes`: codes (N, D) int64, total (N, C) in the codebook's dtype, unsound (N,) int32, logits (N or 2N, D,
        K) or None.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for widths or depths that do not match, a form that there is not, a start too much or missing, an
            odd number of guided rows, settings that are not one number or D, noise, forced codes or guidance of another
            shape or device, noise together with a generator, an unknown backend or one that does not fit.

    Note:
        The sum of embeddings is rounded to the codebook's dtype at every depth, as the published models do. Backends
        draw the same code for the same noise wherever their logits, rounded to the dtype of hidden, are equal; the CUDA
        kernel keeps the states between blocks in float32. It takes up to 32 rows at a time (16 guided positions), more
        in several launches that read all weights each, and no forms but the default one. "triton" takes all forms, in
        five to seven launches a layer and depth, and reads the weights once however many rows: capture it in a CUDA
        graph, as the module's `decode` does, which takes it for more than 24 rows. A row with NaN draws 0 (see
        `sample_codes`), and `check` of the result tells. No gradient, no host sync; may be captured in a CUDA graph
        with noise given.
    """
    function = "depth_decode"
    depth = _check_sizes(function, hidden, codebook, weights, start)
    rows = len(hidden)
    number = per_row = None
    if guidance is not None:
        if rows % 2:
            raise ValueError(
                f"{function}: hidden must be (2N, hidden_dim), conditional rows first, got {tuple(hidden.shape)}"
            )
        rows //= 2
        if isinstance(guidance, Tensor):
            _checks.check_tensor(function, "guidance", guidance)
            if guidance.shape != (rows,):
                raise ValueError(f"{function}: guidance must be a number or ({rows},), got {tuple(guidance.shape)}")
            _checks.check_same_device(function, "guidance", guidance, "hidden", hidden)
            per_row = guidance
        else:
            _checks.check_number(function, "guidance", guidance)
            number = float(guidance)
    temperatures = [float(t) for t in _per_depth(function, "temperature", temperature, depth)]
    top_ks = [int(k) for k in _per_depth(function, "top_k", top_k, depth, whole=True)]
    top_ps = [float(p) for p in _per_depth(function, "top_p", top_p, depth)]
    num_codes = weights.head[0].shape[-2]
    if forced is not None:
        _checks.check_tensor(function, "forced", forced, (torch.int64,))
        if forced.shape != (rows, depth):
            raise ValueError(f"{function}: forced must be {(rows, depth)}, got {tuple(forced.shape)}")
        _checks.check_same_device(function, "forced", forced, "hidden", hidden)
    if noise is not None:
        _checks.check_tensor(function, "noise", noise)
        if noise.shape != (rows, depth, num_codes):
            raise ValueError(f"{function}: noise must be {(rows, depth, num_codes)}, got {tuple(noise.shape)}")
        _checks.check_same_device(function, "noise", noise, "hidden", hidden)
        if generator is not None:
            raise ValueError(f"{function}: generator must be None when noise is given, got {generator}")
    elif forced is None and any(temperatures):
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        drawn = torch.empty((depth, rows, num_codes), dtype=dtype, device=hidden.device)
        for one, t in zip(drawn, temperatures, strict=True):
            if t:
                one.exponential_(generator=generator)
        noise = drawn.transpose(0, 1)
    if packed is not None:
        _checks.check_tensor(function, "packed", packed, (hidden.dtype,))
        _checks.check_same_device(function, "packed", packed, "hidden", hidden)
    codes, total, unsound, logits = _depth_decode(
        hidden, codebook, _flatten(weights), packed, weights.num_heads, number, per_row, temperatures, top_ks, top_ps,
        noise, forced, return_logits, start, *weights.form[:-2], list(weights.form.order), depth, backend,
    )  # fmt: skip
    return DepthCodes(codes, total, unsound, logits if return_logits else None)


def _check_sizes(function: str, hidden: Tensor, codebook: Tensor, weights: DepthWeights, start: Tensor | None) -> int:
    """Raises unless hidden, codebook, start and weights go together; returns D."""
    _checks.check_tensor(function, "hidden", hidden)
    _checks.check_tensor(function, "codebook", codebook)
    head, form, depth = weights.head[0], weights.form, weights.depth
    num_codes, dim = head.shape[-2:]
    if hidden.dtype != head.dtype:
        raise TypeError(f"{function}: hidden must have the dtype of the weights, {head.dtype}, got {hidden.dtype}")
    _checks.check_same_device(function, "hidden", hidden, "the weights", head)
    _checks.check_same_device(function, "codebook", codebook, "hidden", hidden)
    width = dim if weights.hidden is None else weights.hidden[0].shape[-1]
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(f"{function}: hidden must be (rows, {width}), got {tuple(hidden.shape)}")
    _check_form(function, weights)
    code_dim = dim if weights.code is None else weights.code[0].shape[-1]
    shape, got = (num_codes, code_dim), tuple(codebook.shape)
    rows = got[-2] if codebook.ndim in (2, 3) else 0
    if rows < num_codes or got not in ((rows, code_dim), (depth, rows, code_dim)):
        raise ValueError(f"{function}: codebook must be {shape} or {(depth, *shape)}, got {got}")
    if form.state == "first":
        if start is not None:
            raise ValueError(f"{function}: start must be None where the hidden state enters first, got a tensor")
    elif start is None:
        raise ValueError(f"{function}: start must be given where the hidden state enters {form.state!r}, got None")
    else:
        _checks.check_tensor(function, "start", start, (hidden.dtype,))
        _checks.check_same_device(function, "start", start, "hidden", hidden)
        if start.shape != (len(hidden), code_dim):
            raise ValueError(f"{function}: start must be {(len(hidden), code_dim)}, got {tuple(start.shape)}")
    return depth


def _check_form(function: str, weights: DepthWeights) -> None:
    """Raises unless the weights are of a form that there is, with as many sets as their depths want."""
    form, depth, heads = weights.form, weights.depth, weights.num_heads
    for name, value, known in (
        ("norm", form.norm, NORMS),
        ("activation", form.activation, tuple(ACTIVATIONS)),
        ("state", form.state, STATES),
    ):
        if value not in known:
            raise ValueError(f"{function}: weights.form.{name} must be one of {', '.join(known)}, got {value!r}")
    length = form.length(depth)
    if depth < 1 or (weights.position is not None and weights.position.shape[1] != length):
        got = "none" if weights.position is None else weights.position.shape[1]
        raise ValueError(f"{function}: weights must have a depth, and a position for each token, got {depth}, {got}")
    if form.order and len(form.order) != length:
        raise ValueError(f"{function}: weights.form.order must have {length} entries, got {len(form.order)}")
    sets = 1 + max(form.order) if form.order else length
    embeddings = depth - (form.state == "first")
    wanted: list[tuple[str, Pair | None, int]] = [
        ("head", weights.head, depth),
        ("code", weights.code, embeddings),
        ("hidden", weights.hidden, sets if form.state == "every" else 0),
    ]
    for block in weights.blocks:
        wanted += [(name, getattr(block, name), sets) for name in _PER_TOKEN]
        kv_heads, width = form.kv_heads or heads, block.query[0].shape[-2]
        if width % heads or heads % kv_heads or width // heads * kv_heads != block.key[0].shape[-2]:
            raise ValueError(
                f"{function}: weights must have heads that divide the width {width} and the {heads} heads of queries, "
                f"got {heads} and {kv_heads}"
            )
    for name, pair, count in wanted:
        if pair is not None and pair[0].ndim == 3 and len(pair[0]) != count:
            raise ValueError(f"{function}: weights.{name} must have {count} sets, got {len(pair[0])}")


_PER_TOKEN = ("query", "key", "value", "proj", "up", "down", "gate")


def _per_depth(function: str, argument: str, value: Any, depth: int, whole: bool = False) -> Sequence[Any]:
    values = list(value) if isinstance(value, Sequence) else [value] * depth
    if len(values) != depth:
        raise ValueError(f"{function}: {argument} must be one number or {depth}, got {len(values)}")
    for one in values:
        if whole:
            _checks.check_integer(function, argument, one, 0)
        else:
            _checks.check_number(function, argument, one, 0)
    return values
