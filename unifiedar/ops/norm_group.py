"""Group norm with SiLU, and what else stands between the convolutions of VQGAN's encoder and decoder.

    y = (x - mean) / sqrt(variance + eps) * weight + bias, then y * sigmoid(y)

with mean and variance (of all entries, not of one less) over a picture's pixels and the channels of a group. PyTorch
adds the bias of a channels-last convolution in a pass of its own; a norm behind it takes it as `shift` for nothing.
Where a residual sum lies between, `add_group_norm` makes sum and norm. A convolution of a map upsampled by two to
nearest needs no upsampled map: every fourth of its pixels, a phase, is a 2 x 2 convolution of the small one, of sums of
the weights (`phase_weights`), and the same functions put the phases in their places.

Wu and He, "Group Normalization" (2018), section 3.1; with SiLU as in Esser et al., "Taming Transformers" (2021).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["add_group_norm", "add_maps", "group_norm", "phase_weights"]


# ---- definitions -----------------------------------------------------------------------------------------------------


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype and strides of `_norm_fake(x)`: torch's own norm drops channels-last on a GPU."""
    out = torch.empty_like(x)
    return y if y.dtype == x.dtype and y.stride() == out.stride() else out.copy_(y)


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x + shift.to(x.dtype)[:, None, None]


def _norm_eager(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    if not x.numel():
        return torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.group_norm(_shifted(x, shift).to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
        return _laid_out_like(F.silu(y) if silu else y, x)


def _norm_backward_eager(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), _like_shift(x, shift)
    if not x.numel():
        return outs[0], outs[1].zero_(), outs[2].zero_(), outs[3].zero_()
    dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype, bias.dtype) else torch.float32
    batch, channels, height, width = x.shape
    wide, scale = _shifted(x, shift).to(dtype).contiguous(), weight.to(dtype)
    sizes = (batch, channels, height * width, groups)
    with torch.autocast(x.device.type, enabled=False):
        y, mean, rstd = torch.native_group_norm(wide, scale, bias.to(dtype), *sizes, eps)
        grad = grad.to(dtype).contiguous()
        if silu:
            grad = torch.ops.aten.silu_backward(grad, y)
        found = torch.ops.aten.native_group_norm_backward(grad, wide, mean, rstd, scale, *sizes, [True, True, True])
        found = (*found, found[0].sum((0, 2, 3)) if shift is not None else outs[3])
    for out, one in zip(outs, found, strict=True):
        out.copy_(one)
    return outs


def _joined(phases: Tensor) -> Tensor:
    """A map (B, C, 2 h, 2 w), channels-last, of its phases (B, 4 C, h + 1, w + 1)."""
    batch, channels, height, width = phases.shape
    out = phases.new_empty(batch, 2 * (height - 1), 2 * (width - 1), channels // 4).permute(0, 3, 1, 2)
    for phase, part in enumerate(phases.chunk(4, 1)):
        row, column = divmod(phase, 2)
        out[:, :, row::2, column::2] = part[:, :, row : row + height - 1, column : column + width - 1]
    return out


def _add_eager(x: Tensor, shift: Tensor, residual: Tensor | None, phases: bool) -> Tensor:
    total = _shifted(_joined(x) if phases else x, shift)
    return _laid_out_like(total if residual is None else total + residual, _add_fake(x, shift, residual, phases))


def _add_norm_eager(
    x: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    phases: bool,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    total = _add_eager(x, shift, residual, phases)
    return total, _norm_eager(total, weight, bias, None, groups, eps, silu)


def _phase_weights_eager(weight: Tensor) -> Tensor:
    outs, ins = weight.shape[:2]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # Of a side's three taps phase 0 sees the first alone, then the other two on one pixel; phase 1 the first two so.
    # Only sums: a table of which taps to add would be copied from the host, which no graph captures.
    first, middle, last = weight.to(dtype).unbind(2)
    rows = torch.stack((first, middle + last, first + middle, last))
    first, middle, last = rows.unbind(-1)
    sums = torch.stack((first, middle + last, first + middle, last))  # [column and its place, row and its, O, I]
    sums = sums.view(2, 2, 2, 2, outs, ins).permute(2, 0, 4, 5, 3, 1).reshape(4 * outs, ins, 2, 2)
    return torch.empty_like(_phase_weights_fake(weight)).copy_(sums)


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _like_shift(x: Tensor, shift: Tensor | None) -> Tensor:
    return x.new_empty(0) if shift is None else torch.empty_like(shift)


def _norm_fake(x, weight, bias, shift, groups, eps, silu) -> Tensor:
    return torch.empty_like(x)


def _norm_backward_fake(grad, x, weight, bias, shift, groups, eps, silu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), _like_shift(x, shift)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, shift, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, bias, shift)


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    shifted = ctx.saved_tensors[3] is not None
    *found, of_shift = _group_norm_backward(grad, *ctx.saved_tensors, *ctx.rest, "auto")
    return *found, of_shift if shifted else None, None, None, None


def _add_fake(x: Tensor, shift: Tensor, residual: Tensor | None, phases: bool) -> Tensor:
    if not phases:
        return torch.empty_like(x)
    batch, channels, height, width = x.shape
    return x.new_empty(batch, 2 * (height - 1), 2 * (width - 1), channels // 4).permute(0, 3, 1, 2)


def _add_norm_fake(x, shift, residual, phases, weight, bias, groups, eps, silu) -> tuple[Tensor, Tensor]:
    out = _add_fake(x, shift, residual, phases)
    return out, torch.empty_like(out)


def _phase_weights_fake(weight: Tensor) -> Tensor:
    outs, ins = weight.shape[:2]
    return weight.new_empty(4 * outs, 2, 2, ins).permute(0, 3, 1, 2)


# ---- backends --------------------------------------------------------------------------------------------------------

MAX_WIDTH = 1024
TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _maps_unfit_triton(maps: Mapping[str, Tensor | None], *vectors: Tensor | None) -> str | None:
    """Why Triton does not take these maps (B, C, H, W), by their names, and vectors; the first map is there."""
    first = next(iter(maps.values()))
    assert first is not None
    reason = _native.triton_unfit(first)
    for tensor in (*maps.values(), *vectors):
        if reason is None and tensor is not None and tensor.dtype not in TRITON_FLOATS:
            reason = f"needs float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
    for name, tensor in maps.items():
        if reason is None and tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            reason = f"needs {name} dense in channels-last layout, got strides {tuple(tensor.stride())}"
    return reason


def _norm_unfit_triton(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> str | None:
    return _maps_unfit_triton({"x": x}, weight, bias, shift) or _groups_unfit_triton(x.shape[1], groups)


def _groups_unfit_triton(channels: int, groups: int) -> str | None:
    width = channels // groups
    return None if width <= MAX_WIDTH else f"needs groups of at most {MAX_WIDTH} channels, got {width}"


def _run_norm_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    parts: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x)
    if out.numel():
        kernels = _native.kernels("norm_group")
        given = (x, weight.contiguous(), bias.contiguous(), None if shift is None else shift.contiguous())
        one = kernels.whole(x.shape[2] * x.shape[3], x.shape[1], groups) if parts is None else None
        with torch.cuda.device_of(x):
            if one is not None:
                kernels.group_norm_whole(*given, groups, eps, silu, out, one)
                return out
            moments = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)
            known = parts is not None
            kernels.group_norm(*given, groups, eps, silu, parts if known else _parts(x), moments, out, parted=known)
    return out


def _parts(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    runs = _native.kernels("norm_group").chunks(height * width, channels)
    return x.new_empty((batch, runs, 2, channels), dtype=torch.float32)


def _run_add_triton(
    x: Tensor, shift: Tensor, residual: Tensor | None, phases: bool, parts: Tensor | None = None
) -> Tensor:
    out = _add_fake(x, shift, residual, phases)
    if out.numel():
        with torch.cuda.device_of(x):
            _native.kernels("norm_group").add_maps(x, shift.contiguous(), residual, phases, out, parts)
    return out


def _add_unfit_triton(x: Tensor, shift: Tensor, residual: Tensor | None, phases: bool) -> str | None:
    return _maps_unfit_triton({"x": x, "residual": residual}, shift)


def _run_add_norm_triton(
    x: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    phases: bool,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    parts = _parts(_add_fake(x, shift, residual, phases))
    total = _run_add_triton(x, shift, residual, phases, parts)
    return total, _run_norm_triton(total, weight, bias, None, groups, eps, silu, parts)


def _add_norm_unfit_triton(
    x: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    phases: bool,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> str | None:
    reason = _maps_unfit_triton({"x": x, "residual": residual}, shift, weight, bias)
    return reason or _groups_unfit_triton(weight.shape[0], groups)


def _run_phase_weights_triton(weight: Tensor) -> Tensor:
    out = _phase_weights_fake(weight)
    if out.numel():
        with torch.cuda.device_of(weight):
            _native.kernels("norm_group").phase_weights(weight, out)
    return out


def _phase_weights_unfit_triton(weight: Tensor) -> str | None:
    return _maps_unfit_triton({"weight": weight})


# ---- operators -------------------------------------------------------------------------------------------------------

_group_norm = Op(
    "group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps, bool silu) -> Tensor",
    eager=_norm_eager,
    fake=_norm_fake,
    backends=(Backend("triton", _run_norm_triton, _norm_unfit_triton),),
    setup_context=_norm_setup,
    backward=_norm_gradient,
)

_group_norm_backward = Op(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps, "
    "bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    eager=_norm_backward_eager,
    fake=_norm_backward_fake,
)

_add_maps = Op(
    "add_maps(Tensor x, Tensor shift, Tensor? residual, bool phases) -> Tensor",
    eager=_add_eager,
    fake=_add_fake,
    backends=(Backend("triton", _run_add_triton, _add_unfit_triton),),
)

_add_group_norm = Op(
    "add_group_norm(Tensor x, Tensor shift, Tensor? residual, bool phases, Tensor weight, Tensor bias, int groups, "
    "float eps, bool silu) -> (Tensor, Tensor)",
    eager=_add_norm_eager,
    fake=_add_norm_fake,
    backends=(Backend("triton", _run_add_norm_triton, _add_norm_unfit_triton),),
)

_phase_weights = Op(
    "phase_weights(Tensor weight) -> Tensor",
    eager=_phase_weights_eager,
    fake=_phase_weights_fake,
    backends=(Backend("triton", _run_phase_weights_triton, _phase_weights_unfit_triton),),
)


# ---- public functions ------------------------------------------------------------------------------------------------


def _check_map(function: str, x: Any) -> None:
    _checks.check_tensor(function, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{function}: x must be (B, C, H, W), got {tuple(x.shape)}")


def _check_vectors(function: str, x: Tensor, channels: int, **vectors: Any) -> None:
    """Raises unless each is (channels,), of a dtype that x may have and on its device."""
    for argument, value in vectors.items():
        _checks.check_tensor(function, argument, value)
        if value.shape != (channels,):
            raise ValueError(f"{function}: {argument} must be ({channels},) to match x, got {tuple(value.shape)}")
        _checks.check_same_device(function, argument, value, "x", x)


def _check_groups(function: str, channels: int, groups: Any, eps: Any) -> None:
    _checks.check_integer(function, "groups", groups, 1)
    if channels % groups or not channels:
        raise ValueError(f"{function}: groups must divide the {channels} channels of x, got {groups}")
    _checks.check_number(function, "eps", eps, 0)


def _check_sum(function: str, x: Any, shift: Any, residual: Any, phases: bool) -> int:
    """Raises unless these can be added; the channels of the sum."""
    _check_map(function, x)
    batch, channels, height, width = x.shape
    if phases:
        if channels % 4 or not height or not width:
            raise ValueError(f"{function}: x must be four phases (B, 4 C, h + 1, w + 1), got {tuple(x.shape)}")
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    _check_vectors(function, x, channels, shift=shift)
    if residual is not None:
        _checks.check_tensor(function, "residual", residual)
        if residual.shape != (batch, channels, height, width):
            raise ValueError(
                f"{function}: residual must be {(batch, channels, height, width)} to match x, "
                f"got {tuple(residual.shape)}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"{function}: residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
        _checks.check_same_device(function, "residual", residual, "x", x)
    return channels


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Group norm of feature maps, and SiLU after it.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64, any strides. Triton takes it in channels-last layout
            alone, the one in which tensor cores read the next convolution's input.
        weight: (C,) of these dtypes, which need not be x's, on the device of x.
        bias: (C,), likewise.
        groups: how many groups of neighbouring channels there are; divides C.
        shift: (C,), likewise: what is added to x before the norm, as the bias of the convolution that made x; None for
            nothing.
        eps: added to the variance, at least 0.
        silu: whether y * sigmoid(y) follows.
        backend: "auto", "triton" or "eager".

    Returns:
        (B, C, H, W) in the dtype of x and, if x is dense, its strides.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, groups that do not divide C, an unknown backend or one that does not
            fit.

    Note:
        Moments are float32's (float64 for float64). Triton makes them of means and squared distances to them, so that
        a mean far from zero costs no digits; it rounds once, the eager backend after the shift, the norm
        and SiLU. Never under autocast. Equal for a picture alone or among others, and between runs, on Triton.
        Differentiable once; the gradient is the eager backend's. No host sync; may be captured in a CUDA graph.
    """
    function = "group_norm"
    _check_map(function, x)
    channels = x.shape[1]
    _check_groups(function, channels, groups, eps)
    _check_vectors(function, x, channels, weight=weight, bias=bias, **({} if shift is None else {"shift": shift}))
    return _group_norm(x, weight, bias, shift, groups, float(eps), bool(silu), backend)


def add_maps(
    x: Tensor, shift: Tensor, residual: Tensor | None = None, *, phases: bool = False, backend: str = "auto"
) -> Tensor:
    """Feature maps plus a number per channel plus a residual: what follows a convolution without its bias.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64. With `phases` (B, 4 C, H / 2 + 1, W / 2 + 1): what a
            2 x 2 convolution with a padding of 1 makes with `phase_weights`. Triton takes channels-last layout alone.
        shift: (C,) of these dtypes, which need not be x's, on the device of x.
        residual: (B, C, H, W) of the dtype and layout of x; None for nothing.
        phases: whether x holds four phases of a map of twice its sides: pixel (2 i + a, 2 j + b) is at (i + a, j + b)
            in the channels from (2 a + b) C on.
        backend: "auto", "triton" or "eager".

    Returns:
        (B, C, H, W) in the dtype of x, with its strides if it is dense, with `phases` channels-last.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, an unknown backend or one that does not fit.

    Note:
        Triton adds in float32 and rounds once; the eager backend rounds after every sum. Not differentiable. No host
        sync; may be captured in a CUDA graph.
    """
    _check_sum("add_maps", x, shift, residual, phases)
    return _add_maps(x, shift, residual, bool(phases), backend)


def add_group_norm(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    residual: Tensor | None = None,
    phases: bool = False,
    eps: float = 1e-6,
    silu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum that `add_maps` makes and the norm that `group_norm` makes of it; Triton reads the summands once.

    Args:
        x, shift, residual, phases: as `add_maps` takes them.
        weight, bias, groups, eps, silu: as `group_norm` takes them.
        backend: "auto", "triton" or "eager".

    Returns:
        The sum (B, C, H, W), and its norm likewise, as the two functions return them.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for shapes that do not match, groups that do not divide C, an unknown backend or one that does not
            fit.

    Note:
        As for the two functions; the norm is of the sum as rounded. Not differentiable.
    """
    function = "add_group_norm"
    channels = _check_sum(function, x, shift, residual, phases)
    _check_groups(function, channels, groups, eps)
    _check_vectors(function, x, channels, weight=weight, bias=bias)
    return _add_group_norm(x, shift, residual, bool(phases), weight, bias, groups, float(eps), bool(silu), backend)


def phase_weights(weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Weights of a 3 x 3 convolution behind nearest upsampling by two, for a 2 x 2 convolution of the small map.

    Of nine pixels that the convolution sees upsampled, several are the same one, so its weights are summed: 16 products
    for four pixels instead of 36. `conv2d(x, phase_weights(w), padding=1)` are the phases that `add_maps` and
    `add_group_norm` put in their places: `conv2d(interpolate(x, scale_factor=2), w, padding=1)`.

    Args:
        weight: (O, I, 3, 3), float32, bfloat16, float16 or float64. Triton takes channels-last layout alone.
        backend: "auto", "triton" or "eager".

    Returns:
        (4 O, I, 2, 2) in the dtype of weight, channels-last: of the phases (row, column) = (0, 0), (0, 1), (1, 0) and
        (1, 1) in turn.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for another shape, an unknown backend or one that does not fit.

    Note:
        Sums are float32's (float64 for float64), rounded once. Not differentiable.
    """
    function = "phase_weights"
    _checks.check_tensor(function, "weight", weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"{function}: weight must be (O, I, 3, 3), got {tuple(weight.shape)}")
    return _phase_weights(weight, backend)
