"""Residual quantization: vectors as sums of codebook rows, one code a depth.

    r_0 = x;  code_d = argmin_k |r_d - codebook_d[k]|^2 (the lowest k on ties);  r_{d+1} = r_d - codebook_d[code_d]
    quantized = sum_d codebook_d[code_d]

A codebook is (K, C), shared by all depths, or (D, K, C), one a depth. Sums over depth run in float32 (float64 for
float64 codebooks), in the order of the depths, and are rounded once. Code -1 stands for "no code" and adds nothing.

Residual quantization in this form: Lee et al., "Autoregressive Image Generation using Residual Quantization" (2022).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["ResidualCodes", "code_statistics", "residual_lookup", "residual_quantize"]

# Bytes of scores (rows x K) that the eager search holds at a time.
_SEARCH_BYTES = 64 << 20


class ResidualCodes(NamedTuple):
    """Result of `residual_quantize`.

    Fields:
        codes: (..., D) int64.
        quantized: (..., C), the sum of the chosen codebook rows, in the dtype of x.
    """

    codes: Tensor
    quantized: Tensor


# ---- definitions -----------------------------------------------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _level(codebook: Tensor, d: int) -> Tensor:
    """The (K, C) table of one depth."""
    return codebook if codebook.ndim == 2 else codebook[d]


def _require_codes(function: str, codes: Tensor, num_codes: int) -> bool:
    """Raises ValueError for a code outside [-1, num_codes), on the CPU; reading GPU values would stall the stream.

    Returns:
        Whether a code may be outside [0, num_codes): on a GPU always.
    """
    if codes.device.type != "cpu" or not codes.numel():
        return True
    low, high = (int(value) for value in codes.aminmax())
    if low < -1 or high >= num_codes:
        bad = low if low < -1 else high
        raise ValueError(f"{function}: codes must be -1 or in [0, {num_codes}), got {bad}")
    return low < 0


def _lookup_eager(codes: Tensor, codebook: Tensor, cumulative: bool) -> Tensor:
    num_codes, channels = codebook.shape[-2:]
    rows, unknown = codes, None
    if _require_codes("residual_lookup", codes, num_codes):
        unknown = (codes < 0) | (codes >= num_codes)
        rows = codes.masked_fill(unknown, 0)
        unknown = unknown.unsqueeze(-1)
    out = _lookup_fake(codes, codebook, cumulative)
    total = out.new_zeros((*codes.shape[:-1], channels), dtype=_accumulator(codebook.dtype))
    for d in range(codes.shape[-1]):
        chosen = torch.embedding(_level(codebook, d), rows[..., d])
        total += chosen if unknown is None else chosen.masked_fill_(unknown[..., d, :], 0)
        if cumulative:
            out[..., d, :] = total
    return out if cumulative else out.copy_(total)


def _lookup_backward_eager(grad: Tensor, codes: Tensor, num_codes: int, shared: bool, cumulative: bool) -> Tensor:
    depth, channels = codes.shape[-1], grad.shape[-1]
    _require_codes("residual_lookup_backward", codes, num_codes)
    # Row `num_codes` of each table takes what unknown codes would have got.
    rows = codes.where((codes >= 0) & (codes < num_codes), num_codes).reshape(-1, depth)
    tables = 1 if shared else depth
    sums = grad.new_zeros((tables, num_codes + 1, channels), dtype=_accumulator(grad.dtype))
    if cumulative:
        grad = grad.reshape(-1, depth, channels)
        tail = torch.zeros_like(grad[:, 0], dtype=sums.dtype)
        for d in reversed(range(depth)):
            tail += grad[:, d]
            sums[0 if shared else d].index_add_(0, rows[:, d], tail)
    else:
        flat = grad.reshape(-1, channels).to(sums.dtype)
        for d in range(depth):
            sums[0 if shared else d].index_add_(0, rows[:, d], flat)
    out = _lookup_backward_fake(grad, codes, num_codes, shared, cumulative)
    return out.copy_(sums[0, :num_codes] if shared else sums[:, :num_codes])


class _ExactMatmul:
    """Makes float32 matmuls and convolutions use float32 products while any thread is inside; restores settings after.

    The settings are the process's, so overlapping threads share one change: the first one in makes it, the last one out
    undoes it. Products elsewhere are at worst more exact for that time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._changed: list[tuple[Any, str]] = []

    @contextlib.contextmanager
    def __call__(self, device_type: str) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                mkldnn, conv = torch.backends.mkldnn, getattr(torch.backends.cudnn, "conv", None)
                settings = (getattr(mkldnn, "matmul", None), getattr(mkldnn, "conv", None), conv)
                for setting in (torch.backends.cuda.matmul, *settings):
                    if setting is not None and setting.fp32_precision not in ("none", "ieee"):
                        self._changed.append((setting, setting.fp32_precision))
                        setting.fp32_precision = "ieee"
            self._inside += 1
        try:
            with torch.autocast(device_type, enabled=False):
                yield
        finally:
            with self._lock:
                self._inside -= 1
                while self._inside == 0 and self._changed:
                    setting, precision = self._changed.pop()
                    setting.fp32_precision = precision


_exact_matmul = _ExactMatmul()


def _nearest(rows: Tensor, table: Tensor, norms: Tensor, out: Tensor) -> None:
    """Fills out (N,) with argmin_k (norms[k] - 2 rows . table[k]).

    That is the squared distance less |row|^2, which is the same for every k: the same order with one rounding fewer.
    """
    step = max(1, _SEARCH_BYTES // max(1, table.shape[0] * table.element_size()))
    scores = rows.new_empty((min(step, rows.shape[0]), table.shape[0]))
    for begin in range(0, rows.shape[0], step):
        part = rows[begin : begin + step]
        score = torch.addmm(norms, part, table.T, alpha=-2, out=scores[: part.shape[0]])
        torch.argmin(score, dim=1, out=out[begin : begin + step])


def _quantize_eager(x: Tensor, codebook: Tensor, depth: int, metric: str) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(torch.promote_types(x.dtype, codebook.dtype))
    residual = x.reshape(-1, x.shape[-1]).to(dtype, copy=True)
    total = residual.new_zeros(residual.shape)
    codes = torch.empty((residual.shape[0], depth), dtype=torch.int64, device=x.device)
    nearest = codes.new_empty(residual.shape[0])
    table = norms = searched = residual
    with _exact_matmul(x.device.type):
        for d in range(depth):
            if d == 0 or codebook.ndim == 3:
                table = _level(codebook, d).to(dtype)
                if metric == "cosine":
                    searched = torch.nn.functional.normalize(table, dim=1)
                    norms = searched.new_zeros(table.shape[0])
                else:
                    searched = table
                    norms = table.square().sum(dim=1)
            _nearest(residual, searched, norms, nearest)
            codes[:, d] = nearest
            chosen = table[nearest]
            residual -= chosen
            total += chosen
    return codes.reshape(*x.shape[:-1], depth), total.to(x.dtype).reshape(x.shape)


def _statistics_eager(residuals: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    _require_codes("code_statistics", codes, num_codes)
    dtype = _accumulator(residuals.dtype)
    rows = codes.where((codes >= 0) & (codes < num_codes), num_codes).reshape(-1)
    flat = residuals.reshape(rows.shape[0], residuals.shape[-1]).to(dtype)
    counts = flat.new_zeros(num_codes + 1).index_add_(0, rows, flat.new_ones(()).expand(rows.shape))
    sums = flat.new_zeros((num_codes + 1, flat.shape[1])).index_add_(0, rows, flat)
    return counts[:num_codes].clone(), sums[:num_codes].clone()


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _lookup_fake(codes: Tensor, codebook: Tensor, cumulative: bool) -> Tensor:
    shape = codes.shape if cumulative else codes.shape[:-1]
    return codebook.new_empty((*shape, codebook.shape[-1]))


def _lookup_backward_fake(grad: Tensor, codes: Tensor, num_codes: int, shared: bool, cumulative: bool) -> Tensor:
    shape = (num_codes, grad.shape[-1])
    return grad.new_empty(shape if shared else (codes.shape[-1], *shape))


def _quantize_fake(x: Tensor, codebook: Tensor, depth: int, metric: str) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], depth), dtype=torch.int64), x.new_empty(x.shape)


def _statistics_fake(residuals: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(residuals.dtype)
    return (
        residuals.new_empty((num_codes,), dtype=dtype),
        residuals.new_empty((num_codes, residuals.shape[-1]), dtype=dtype),
    )


def _lookup_setup(ctx, inputs, output):
    codes, codebook, ctx.cumulative = inputs
    ctx.num_codes, ctx.shared = codebook.shape[-2], codebook.ndim == 2
    ctx.save_for_backward(codes)


def _lookup_gradient(ctx, grad):
    (codes,) = ctx.saved_tensors
    return None, _residual_lookup_backward(grad, codes, ctx.num_codes, ctx.shared, ctx.cumulative, ctx.backend), None


def _lookup_backward_setup(ctx, inputs, output):
    _, codes, _, _, ctx.cumulative = inputs
    ctx.save_for_backward(codes)


def _lookup_backward_gradient(ctx, grad):
    # The backward is linear in its gradient, and its transpose is the lookup.
    (codes,) = ctx.saved_tensors
    return _residual_lookup(codes, grad, ctx.cumulative, ctx.backend), None, None, None, None


# ---- backends --------------------------------------------------------------------------------------------------------

_lookup_cuda = _native.define(
    "residual_lookup_cuda(Tensor codes, Tensor codebook, Tensor(a!) out, bool cumulative) -> ()"
)
_lookup_backward_cuda = _native.define(
    "residual_lookup_backward_cuda(Tensor grad, Tensor codes, int num_codes, bool shared, bool cumulative, "
    "Tensor(a!) workspace, Tensor(b!) out) -> ()"
)
_lookup_backward_workspace = _native.define(
    "residual_lookup_backward_workspace_cuda(Tensor codes, int num_codes, bool shared, int channels) -> int"
)
_statistics_cuda = _native.define(
    "code_statistics_cuda(Tensor residuals, Tensor codes, Tensor(a!) workspace, Tensor(b!) counts, Tensor(c!) sums) "
    "-> ()"
)


def _unfit_here(missing: str | None, features: Tensor, tables: int) -> str | None:
    """Why no kernel that reads or sums codebook rows can run, given what the backend misses on this device."""
    if missing is None and features.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {str(features.dtype).removeprefix('torch.')}"
    if missing is None and tables >= 2**31:
        return f"needs fewer than 2^31 codebook rows, got {tables}"
    return missing


def _lookup_unfit_cuda(codes: Tensor, codebook: Tensor, cumulative: bool) -> str | None:
    return _unfit_here(_native.cuda_unfit(codebook), codebook, _rows(codebook))


def _lookup_unfit_triton(codes: Tensor, codebook: Tensor, cumulative: bool) -> str | None:
    return _unfit_here(_native.triton_unfit(codebook), codebook, _rows(codebook))


def _lookup_backward_unfit_cuda(grad, codes, num_codes, shared, cumulative) -> str | None:
    tables = num_codes * (1 if shared else codes.shape[-1])
    return _unfit_here(_native.cuda_unfit(grad), grad, tables) or _too_many(codes)


def _lookup_backward_unfit_triton(grad, codes, num_codes, shared, cumulative) -> str | None:
    return _unfit_here(_native.triton_unfit(grad), grad, num_codes * (1 if shared else codes.shape[-1]))


def _statistics_unfit_cuda(residuals: Tensor, codes: Tensor, num_codes: int) -> str | None:
    return _statistics_unfit(_native.cuda_unfit(residuals), residuals, num_codes) or _too_many(codes)


def _statistics_unfit_triton(residuals: Tensor, codes: Tensor, num_codes: int) -> str | None:
    return _statistics_unfit(_native.triton_unfit(residuals), residuals, num_codes)


def _statistics_unfit(missing: str | None, residuals: Tensor, num_codes: int) -> str | None:
    reason = _unfit_here(missing, residuals, num_codes)
    return "needs at least one channel, got 0" if reason is None and not residuals.shape[-1] else reason


def _too_many(codes: Tensor) -> str | None:
    return f"needs fewer than 2^31 codes, got {codes.numel()}" if codes.numel() >= 2**31 else None


def _rows(codebook: Tensor) -> int:
    return codebook.shape[0] if codebook.ndim == 2 else codebook.shape[0] * codebook.shape[1]


def _run_lookup(fill, codes: Tensor, codebook: Tensor, cumulative: bool) -> Tensor:
    out = _lookup_fake(codes, codebook, cumulative)
    if out.numel():
        if codebook.stride(-1) != 1:
            codebook = codebook.contiguous()
        fill(codes.reshape(-1, codes.shape[-1]).contiguous(), codebook, out, cumulative)
    return out


def _run_lookup_cuda(codes: Tensor, codebook: Tensor, cumulative: bool) -> Tensor:
    return _run_lookup(_lookup_cuda, codes, codebook, cumulative)


def _run_lookup_triton(codes: Tensor, codebook: Tensor, cumulative: bool) -> Tensor:
    _require_codes("residual_lookup", codes, codebook.shape[-2])
    with torch.cuda.device_of(codes):
        return _run_lookup(_native.kernels("codes").residual_lookup, codes, codebook, cumulative)


def _run_lookup_backward_cuda(grad: Tensor, codes: Tensor, num_codes: int, shared: bool, cumulative: bool) -> Tensor:
    out = _lookup_backward_fake(grad, codes, num_codes, shared, cumulative)
    if not codes.numel():
        return out.zero_()
    codes = codes.reshape(-1, codes.shape[-1]).contiguous()
    size = _lookup_backward_workspace(codes, num_codes, shared, grad.shape[-1])
    workspace = grad.new_empty(size, dtype=torch.uint8)
    _lookup_backward_cuda(grad.contiguous(), codes, num_codes, shared, cumulative, workspace, out)
    return out


def _run_lookup_backward_triton(grad: Tensor, codes: Tensor, num_codes: int, shared: bool, cumulative: bool) -> Tensor:
    _require_codes("residual_lookup_backward", codes, num_codes)
    out = _lookup_backward_fake(grad, codes, num_codes, shared, cumulative)
    if not codes.numel():
        return out.zero_()
    _sum_entries_triton(grad, codes, num_codes, shared, cumulative, out)
    return out


def _sum_entries_triton(grad: Tensor, codes: Tensor, num_codes: int, shared: bool, cumulative: bool, out: Tensor):
    """Sorts the entries by the codebook row that they chose, then sums each row's: no atomics, one order.

    Chunks of about sqrt(entries) entries bound both what one chunk sums and how many parts one row can have, so that
    all entries choosing one row costs no more than a few times what even choices do.

    Returns:
        Where each codebook row's entries begin, (tables + 1,) int64.
    """
    depth = codes.shape[-1]
    tables = num_codes if shared else num_codes * depth
    with torch.cuda.device_of(codes):
        keys = codes if shared else codes + torch.arange(depth, device=codes.device) * num_codes
        keys = keys.where((codes >= 0) & (codes < num_codes), tables).to(torch.int32)
        keys, order = keys.reshape(-1).sort(stable=True)
        begins = torch.searchsorted(keys, torch.arange(tables + 1, dtype=torch.int32, device=keys.device))
        chunk_log2 = max(5, (order.numel() - 1).bit_length() + 1 >> 1)
        chunks = (order.numel() - 1 >> chunk_log2) + 1
        partial = grad.new_empty((chunks, 2, grad.shape[-1]), dtype=torch.float32)
        _native.kernels("codes").residual_lookup_backward(
            grad.contiguous(), order, keys, begins, depth, cumulative, chunk_log2, partial, out.view(tables, -1)
        )
    return begins


def _run_statistics_cuda(residuals: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts, sums = _statistics_fake(residuals, codes, num_codes)
    if not codes.numel():
        return counts.zero_(), sums.zero_()
    codes = codes.reshape(-1, 1).contiguous()
    size = _lookup_backward_workspace(codes, num_codes, True, residuals.shape[-1])
    workspace = residuals.new_empty(size, dtype=torch.uint8)
    _statistics_cuda(residuals.contiguous(), codes, workspace, counts, sums)
    return counts, sums


def _run_statistics_triton(residuals: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    _require_codes("code_statistics", codes, num_codes)
    counts, sums = _statistics_fake(residuals, codes, num_codes)
    if not codes.numel():
        return counts.zero_(), sums.zero_()
    begins = _sum_entries_triton(residuals, codes.reshape(-1, 1), num_codes, True, False, sums)
    return counts.copy_(begins.diff()), sums


def _quantize_unfit_triton(x: Tensor, codebook: Tensor, depth: int, metric: str) -> str | None:
    reason = _native.triton_unfit(x) or _native.triton_unfit(codebook)
    for tensor in (x, codebook):
        reason = reason or _unfit_here(None, tensor, 0)
    if reason is None and codebook.shape[-1] > 2048:
        reason = f"needs at most 2048 channels, got {codebook.shape[-1]}"
    if reason is None and codebook.shape[-2] > 2**18:
        reason = f"needs at most 2^18 codes, got {codebook.shape[-2]}"
    return reason


def _run_quantize_triton(x: Tensor, codebook: Tensor, depth: int, metric: str) -> tuple[Tensor, Tensor]:
    codes, quantized = _quantize_fake(x, codebook, depth, metric)
    if not codes.numel():
        return codes, quantized
    if codebook.stride(-1) != 1:
        codebook = codebook.contiguous()
    rows, (num_codes, channels) = codes.numel() // depth, codebook.shape[-2:]
    flat, out = codes.view(rows, depth), quantized.view(rows, channels)
    in_place, cosine = out.dtype == torch.float32, metric == "cosine"
    kernels = _native.kernels("codes_quantize")
    plan = kernels.plan(rows, num_codes, channels, cosine, in_place, _native.capability(x))
    workspace = x.new_empty(plan.size, dtype=torch.uint8)
    with torch.cuda.device_of(x):
        with torch.autocast(x.device.type, enabled=False):
            peaks = torch.linalg.vector_norm(codebook, torch.inf, dim=(-2, -1)).view(-1)
        kernels.residual_quantize(
            x.reshape(rows, channels), codebook, peaks, cosine, plan, workspace,
            out if in_place else None, flat,
        )  # fmt: skip
        _native.kernels("codes").residual_lookup(flat, codebook, out, False)
    return codes, quantized


# ---- operators -------------------------------------------------------------------------------------------------------

_residual_lookup = Op(
    "residual_lookup(Tensor codes, Tensor codebook, bool cumulative) -> Tensor",
    eager=_lookup_eager,
    fake=_lookup_fake,
    backends=(
        Backend("cuda", _run_lookup_cuda, _lookup_unfit_cuda),
        Backend("triton", _run_lookup_triton, _lookup_unfit_triton),
    ),
    setup_context=_lookup_setup,
    backward=_lookup_gradient,
)

_residual_lookup_backward = Op(
    "residual_lookup_backward(Tensor grad, Tensor codes, SymInt num_codes, bool shared, bool cumulative) -> Tensor",
    eager=_lookup_backward_eager,
    fake=_lookup_backward_fake,
    backends=(
        Backend("cuda", _run_lookup_backward_cuda, _lookup_backward_unfit_cuda),
        Backend("triton", _run_lookup_backward_triton, _lookup_backward_unfit_triton),
    ),
    setup_context=_lookup_backward_setup,
    backward=_lookup_backward_gradient,
)

_residual_quantize = Op(
    "residual_quantize(Tensor x, Tensor codebook, int depth, str metric) -> (Tensor, Tensor)",
    eager=_quantize_eager,
    fake=_quantize_fake,
    backends=(Backend("triton", _run_quantize_triton, _quantize_unfit_triton),),
)

_code_statistics = Op(
    "code_statistics(Tensor residuals, Tensor codes, SymInt num_codes) -> (Tensor, Tensor)",
    eager=_statistics_eager,
    fake=_statistics_fake,
    backends=(
        Backend("cuda", _run_statistics_cuda, _statistics_unfit_cuda),
        Backend("triton", _run_statistics_triton, _statistics_unfit_triton),
    ),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def residual_quantize(
    x: Tensor,
    codebook: Tensor,
    depth: int | None = None,
    *,
    metric: str = "l2",
    backend: str = "auto",
) -> ResidualCodes:
    """Codes of the codebook rows that approximate x as a sum, chosen greedily depth by depth, and that sum.

    At each depth the entry nearest to what is left of x is chosen, its row is subtracted and the search goes on with
    the rest.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64, any strides.
        codebook: (K, C), shared by all depths, or (D, K, C); of x's device, any of the same dtypes, any strides.
        depth: the number of depths D, required with a shared codebook; otherwise None or the codebook's D.
        metric: "l2", the smallest Euclidean distance, or "cosine", the largest cosine similarity (as VAR's
            `using_znorm` searches; the row itself is subtracted either way).
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        `ResidualCodes`: codes (..., D) int64 in [0, K) and quantized (..., C) in x's dtype.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an empty codebook, an unknown metric or backend, or one that does not
            fit.

    Note:
        Residuals are float32 (float64 if x or the codebook is), never under autocast; quantized is rounded once. Equal
        scores go to the lowest index. Neither output carries a gradient: the straight-through estimator is
        `unifiedar.nn.ResidualQuantizer`'s business. No host sync; may be captured in a CUDA graph.

        The eager backend searches in float32, never in TF32. Triton's searches in float16 on tensor cores, scaled
        by powers of two, with a proven bound: the score r . e - |e|^2 / 2 of a residual r and a code e is off by at
        most

            (2^-10 + C 2^-22 + 2^-15) |r| |e| + 2^-15 |e|^2 / 2,

        where norms have C^(1/2) 2^-28 of the largest element (of r, or of the codebook) added. Every code that this
        leaves in question is compared in float64, so the one chosen is the nearest to float32's r, and runs are
        bit-equal. It is slow where thousands of codes stay in question: all equal, or one larger by ten digits than
        the rest. It takes at most 2048 channels and 2^18 codes. Its extra memory, the codebook in float16 and at most
        30 MB, does not grow with N K; tensors whose rows no strides describe are copied.

        A row of x with NaN takes code 0; one with infinity takes code 0 on Triton and any code on eager; a codebook
        that is not finite gives any codes in [0, K).
    """
    function = "residual_quantize"
    _checks.check_tensor(function, "x", x)
    _checks.check_tensor(function, "codebook", codebook)
    _check_codebook(function, codebook)
    if x.ndim < 1 or x.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"{function}: x must be (..., {codebook.shape[-1]}) to match codebook, got {tuple(x.shape)}")
    _checks.check_same_device(function, "codebook", codebook, "x", x)
    if metric not in ("l2", "cosine"):
        raise ValueError(f"{function}: metric must be 'l2' or 'cosine', got {metric!r}")
    if codebook.ndim == 3:
        if depth is not None and depth != codebook.shape[0]:
            raise ValueError(f"{function}: depth must be None or {codebook.shape[0]}, as codebook has it, got {depth}")
        depth = codebook.shape[0]
    elif depth is None:
        raise ValueError(f"{function}: depth must be given with a shared codebook (K, C), got None")
    _checks.check_integer(function, "depth", depth, 1)
    return ResidualCodes(*_residual_quantize(x, codebook, depth, metric, backend))


def residual_lookup(
    codes: Tensor,
    codebook: Tensor,
    *,
    cumulative: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sum over depth of the codebook rows that the codes name, or its running sums.

    out[...] = sum_d codebook_d[codes[..., d]], or with `cumulative`
    out[..., d, :] = sum_{e <= d} codebook_e[codes[..., e]].

    Args:
        codes: (..., D) int64, any strides; -1 adds nothing.
        codebook: (K, C), shared by all depths, or (D, K, C); float32, bfloat16, float16 or float64, on the device of
            codes. The kernels copy it if its last dimension is not contiguous, and codes if they are not contiguous.
        cumulative: whether to return the running sums.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        (..., C), or (..., D, C) if `cumulative`, in the codebook's dtype, contiguous.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an empty codebook, an unknown backend or one that does not fit; on the
            CPU also for a code outside [-1, K). On a GPU, where looking at a code would stall the stream, such a code
            adds nothing, as -1 does.

    Note:
        Each sum is accumulated in float32 (float64 for a float64 codebook) from depth 0 up and rounded once, on every
        backend: equal results. Differentiable in the codebook, twice if need be. The kernels' gradient sums each
        entry's rows in an order that shapes and codes fix, so it is bit-equal between runs; the eager one uses
        `index_add_`, which has that property on the CPU only. No host sync on a GPU; may be captured in a CUDA graph.
    """
    function = "residual_lookup"
    _checks.check_codes(function, codes)
    _checks.check_tensor(function, "codebook", codebook)
    _check_codebook(function, codebook)
    if codes.ndim < 1 or codes.shape[-1] < 1:
        raise ValueError(f"{function}: codes must be (..., D) with D at least 1, got {tuple(codes.shape)}")
    if codebook.ndim == 3 and codes.shape[-1] != codebook.shape[0]:
        raise ValueError(
            f"{function}: codes must be (..., {codebook.shape[0]}) to match codebook, got {tuple(codes.shape)}"
        )
    _checks.check_same_device(function, "codebook", codebook, "codes", codes)
    return _residual_lookup(codes, codebook, bool(cumulative), backend)


def code_statistics(
    residuals: Tensor, codes: Tensor, num_codes: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """How often each code was chosen, and the sum of the vectors that chose it: what an EMA codebook update needs.

    counts[k] = number of codes equal to k; sums[k] = sum of residuals[i] over codes[i] = k.

    Args:
        residuals: (..., C), the vectors that were searched for, float32, bfloat16, float16 or float64.
        codes: (...) int64, their codes; -1 counts nowhere.
        num_codes: the number of codes K.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        counts (K,) and sums (K, C), float32 (float64 for float64 residuals).

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, num_codes below 1, an unknown backend or one that does not fit; on the
            CPU also for a code outside [-1, K). On a GPU such a code counts nowhere.

    Note:
        Accumulated in float32 (float64 for float64). No gradient. The kernels sum each code's vectors in an order that
        sizes and codes fix, so they are bit-equal between runs; the eager backend uses `index_add_`, which has that
        property on the CPU only. No host sync on a GPU; may be captured in a CUDA graph.
    """
    function = "code_statistics"
    _checks.check_tensor(function, "residuals", residuals)
    _checks.check_codes(function, codes)
    _checks.check_integer(function, "num_codes", num_codes, 1)
    if residuals.ndim < 1 or residuals.shape[:-1] != codes.shape:
        raise ValueError(
            f"{function}: codes must have the shape of residuals without its channels, "
            f"{tuple(residuals.shape[:-1])}, got {tuple(codes.shape)}"
        )
    _checks.check_same_device(function, "codes", codes, "residuals", residuals)
    return _code_statistics(residuals, codes, num_codes, backend)


def _check_codebook(function: str, codebook: Tensor) -> None:
    if codebook.ndim not in (2, 3) or 0 in codebook.shape:
        raise ValueError(
            f"{function}: codebook must be (K, C) or (D, K, C) with no empty dimension, got {tuple(codebook.shape)}"
        )
