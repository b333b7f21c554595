"""Bits of bitwise quantization, vector by vector: every channel becomes a sign, and no codebook exists.

    bit_c = x_c > 0 (zero and NaN are bit 0);  code_c = m if bit_c else -m
    BSQ (spherical): u = x / |x|, m = 1 / sqrt(d);    LFQ: u = x, m = 1

Bits are labels, one uint8 of 0 or 1 a channel, or packed, one int64 a token with channel 0 as its most significant bit
(bit d - 1), which is the integer that the reference implementations call the index. Everything is float32 (float64 for
float64). The public functions on features, and the pyramid, are in `codes_bitwise`.

BSQ: Zhao et al., arXiv:2406.07548; LFQ: Yu et al., arXiv:2310.05737.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op
from unifiedar.ops.codes import _accumulator

__all__ = ["BitwiseLosses", "bitwise_pack", "bitwise_unpack"]

MAX_DIM = 64
LABELS = (torch.uint8, torch.bool, torch.int64, torch.int32)
_EPS = 1e-12  # of F.normalize


class BitwiseLosses(NamedTuple):
    """What training adds to its loss, means over tokens, float32 (float64 for float64), all differentiable.

    Fields:
        sample_entropy: (), mean over tokens of the entropy of softmax(2 inv_temperature u . code) over all 2^d codes.
        codebook_entropy: (), the sum over bits of the entropy of `probability`: that of the mean distribution if its
            bits are independent, else above it.
        commitment: (), mean over tokens of |u - code|^2.
        probability: (d,), mean over tokens of the probability that a bit is 1 (what ranks average before the entropy).
    """

    sample_entropy: Tensor
    codebook_entropy: Tensor
    commitment: Tensor
    probability: Tensor


# ---- definitions -----------------------------------------------------------------------------------------------------


@functools.cache
def _magnitude(dim: int, spherical: bool, dtype: torch.dtype) -> float:
    """What a code's channels are, up to the sign: 1, or 1 / sqrt(d) as normalizing a vector of it leaves it.

    The published label-to-code path normalizes once more, which at some d (7, 14, 32) moves the last bit.
    """
    if not spherical:
        return 1.0
    ones = torch.full((1, dim), dim**-0.5, dtype=dtype, device="cpu")
    return F.normalize(ones, dim=-1)[0, 0].item()


def _sharpness(dim: int, spherical: bool, inv_temperature: float, dtype: torch.dtype) -> float:
    """p(bit = 1) = sigmoid(sharpness u): the softmax over all codes is a product over bits."""
    return 4 * inv_temperature * _magnitude(dim, spherical, dtype)


def _signed(bits: Tensor, magnitude: float, dtype: torch.dtype) -> Tensor:
    """The codes of labels."""
    high = torch.full((), magnitude, dtype=dtype, device=bits.device)
    return torch.where(bits != 0, high, -high)


def _places(dim: int, device: torch.device) -> Tensor:
    """By how much each channel's bit is shifted in a packed word."""
    return torch.arange(dim - 1, -1, -1, device=device)


def _pack_eager(bits: Tensor) -> Tensor:
    return ((bits.contiguous() != 0).long() << _places(bits.shape[-1], bits.device)).sum(-1)


def _unpack_eager(packed: Tensor, dim: int) -> Tensor:
    return (packed.contiguous().unsqueeze(-1) >> _places(dim, packed.device) & 1).to(torch.uint8)


def _lookup_eager(bits: Tensor, dim: int, spherical: bool, dtype: torch.dtype) -> Tensor:
    labels = _unpack_eager(bits, dim) if dim else bits.contiguous()
    return _signed(labels, _magnitude(labels.shape[-1], spherical, _accumulator(dtype)), dtype)


def _unit(x: Tensor, spherical: bool) -> Tensor:
    return F.normalize(x, dim=-1, eps=_EPS) if spherical else x


def _quantize_eager(
    x: Tensor, spherical: bool, packed: bool, inv_temperature: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dim, dtype, x = x.shape[-1], _accumulator(x.dtype), x.contiguous()
    _, _, sums = _quantize_fake(x, spherical, packed, inv_temperature)
    labels = (x > 0).to(torch.uint8)
    codes = _signed(labels, _magnitude(dim, spherical, dtype), dtype)
    if inv_temperature is not None:
        unit = _unit(x.reshape(-1, dim).to(dtype), spherical)
        logit = _sharpness(dim, spherical, inv_temperature, dtype) * unit
        size = logit.abs()
        # The entropy of a coin in terms of its logit, without the logarithm of a probability that may be 0.
        entropy = F.softplus(-size) + size * torch.sigmoid(-size)
        far = (unit - codes.reshape(-1, dim)).square()
        tokens = max(1, unit.shape[0])
        sums[:dim] = torch.sigmoid(logit).sum(0) / tokens
        sums[dim] = entropy.sum() / tokens
        sums[dim + 1] = far.sum() / tokens
    return codes.to(x.dtype), _pack_eager(labels) if packed else labels, sums


def _quantize_backward_eager(
    x: Tensor, grad: Tensor | None, grad_sums: Tensor | None, spherical: bool, inv_temperature: float | None
) -> Tensor:
    dim, dtype = x.shape[-1], _accumulator(x.dtype)
    rows = x.contiguous().view(-1, dim).to(dtype)
    unit = _unit(rows, spherical)
    g = torch.zeros_like(rows) if grad is None else grad.reshape(-1, dim).to(dtype)
    if grad_sums is not None and inv_temperature is not None:
        sharpness = _sharpness(dim, spherical, inv_temperature, dtype)
        logit = sharpness * unit
        p = torch.sigmoid(logit)
        code = _signed(rows > 0, _magnitude(dim, spherical, dtype), dtype)
        slope = (grad_sums[:dim] - grad_sums[dim] * logit) * (p * torch.sigmoid(-logit)) * sharpness
        g = g + (slope + grad_sums[dim + 1] * 2 * (unit - code)) / max(1, rows.shape[0])
    if spherical:
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        along = (g * unit).sum(-1, keepdim=True)
        g = torch.where(norm > _EPS, (g - unit * along) / norm, g / _EPS)
    return g.to(x.dtype).reshape(x.shape)


# ---- shapes of the outputs, gradients --------------------------------------------------------------------------------


def _pack_fake(bits: Tensor) -> Tensor:
    return bits.new_empty(bits.shape[:-1], dtype=torch.int64)


def _unpack_fake(packed: Tensor, dim: int) -> Tensor:
    return packed.new_empty((*packed.shape, dim), dtype=torch.uint8)


def _lookup_fake(bits: Tensor, dim: int, spherical: bool, dtype: torch.dtype) -> Tensor:
    return bits.new_empty((*bits.shape, dim) if dim else bits.shape, dtype=dtype)


def _quantize_fake(x, spherical, packed, inv_temperature):
    bits = x.new_empty(x.shape[:-1], dtype=torch.int64) if packed else x.new_empty(x.shape, dtype=torch.uint8)
    sums = 0 if inv_temperature is None else x.shape[-1] + 2
    return x.new_empty(x.shape), bits, x.new_empty((sums,), dtype=_accumulator(x.dtype))


def _quantize_backward_fake(x, grad, grad_sums, spherical, inv_temperature):
    return x.new_empty(x.shape)


def _quantize_setup(ctx, inputs, output):
    x, ctx.spherical, _, ctx.inv_temperature = inputs
    ctx.save_for_backward(x)
    ctx.set_materialize_grads(False)


def _quantize_gradient(ctx, grad, grad_bits, grad_sums):
    (x,) = ctx.saved_tensors
    if ctx.inv_temperature is None:
        grad_sums = None
    found = None
    if grad is not None or grad_sums is not None:
        found = _bitwise_quantize_backward(x, grad, grad_sums, ctx.spherical, ctx.inv_temperature, ctx.backend)
    return found, None, None, None


# ---- backends --------------------------------------------------------------------------------------------------------


def _unfit_rows(tensor: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no kernel can run on rows of a tensor, with features of a dtype."""
    reason = _native.triton_unfit(tensor)
    if reason is None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if reason is None and dtype == torch.bfloat16 and not tensor.is_cuda:
        return "needs another dtype on the CPU: Triton's interpreter computes wrongly in bfloat16"
    return reason


def _pack_unfit_triton(bits: Tensor) -> str | None:
    return _unfit_rows(bits)


def _unpack_unfit_triton(packed: Tensor, dim: int) -> str | None:
    return _unfit_rows(packed)


def _lookup_unfit_triton(bits: Tensor, dim: int, spherical: bool, dtype: torch.dtype) -> str | None:
    return _unfit_rows(bits, dtype)


def _quantize_unfit_triton(x, spherical, packed, inv_temperature) -> str | None:
    return _unfit_rows(x, x.dtype)


def _quantize_backward_unfit_triton(x, grad, grad_sums, spherical, inv_temperature) -> str | None:
    return _unfit_rows(x, x.dtype)


def _run_pack_triton(bits: Tensor) -> Tensor:
    out = _pack_fake(bits)
    if out.numel():
        with torch.cuda.device_of(bits):
            _native.kernels("codes_bitwise").bitwise_pack(bits.reshape(-1, bits.shape[-1]).contiguous(), out.view(-1))
    return out


def _spread(bits: Tensor, dim: int, magnitude: float, out: Tensor) -> Tensor:
    """Fills labels or codes from words (dim > 0) or labels."""
    if out.numel():
        flat = bits.reshape(-1) if dim else bits.reshape(-1, bits.shape[-1])
        with torch.cuda.device_of(bits):
            _native.kernels("codes_bitwise").bitwise_lookup(flat.contiguous(), magnitude, out.view(-1, out.shape[-1]))
    return out


def _run_unpack_triton(packed: Tensor, dim: int) -> Tensor:
    return _spread(packed, dim, 1.0, _unpack_fake(packed, dim))


def _run_lookup_triton(bits: Tensor, dim: int, spherical: bool, dtype: torch.dtype) -> Tensor:
    out = _lookup_fake(bits, dim, spherical, dtype)
    return _spread(bits, dim, _magnitude(out.shape[-1], spherical, torch.float32), out)


def _run_quantize_triton(x, spherical, packed, inv_temperature):
    out = quantized, bits, sums = _quantize_fake(x, spherical, packed, inv_temperature)
    if not x.numel():
        sums.zero_()
        return out
    dim, kernels = x.shape[-1], _native.kernels("codes_bitwise")
    rows = x.reshape(-1, dim).contiguous()
    parts, sharpness = None, 0.0
    if inv_temperature is not None:
        parts = sums.new_empty((kernels.losses_parts(rows.shape[0], dim), dim + 2))
        sharpness = _sharpness(dim, spherical, inv_temperature, torch.float32)
    with torch.cuda.device_of(x):
        kernels.bitwise_quantize(
            rows, _magnitude(dim, spherical, torch.float32), sharpness, spherical,
            bits.view(-1) if packed else bits.view(-1, dim), quantized.view(-1, dim), parts,
        )  # fmt: skip
        if parts is not None:
            torch.sum(parts, 0, out=sums)
    return out


def _run_quantize_backward_triton(x, grad, grad_sums, spherical, inv_temperature):
    out = _quantize_backward_fake(x, grad, grad_sums, spherical, inv_temperature)
    if not x.numel():
        return out
    dim, sharpness = x.shape[-1], 0.0
    if inv_temperature is not None:
        sharpness = _sharpness(dim, spherical, inv_temperature, torch.float32)
    with torch.cuda.device_of(x):
        _native.kernels("codes_bitwise").bitwise_quantize_backward(
            x.reshape(-1, dim).contiguous(), None if grad is None else grad.reshape(-1, dim).contiguous(),
            None if grad_sums is None else grad_sums.contiguous(), _magnitude(dim, spherical, torch.float32),
            sharpness, spherical, out.view(-1, dim),
        )  # fmt: skip
    return out


# ---- operators -------------------------------------------------------------------------------------------------------

_bitwise_pack = Op(
    "bitwise_pack(Tensor bits) -> Tensor",
    eager=_pack_eager,
    fake=_pack_fake,
    backends=(Backend("triton", _run_pack_triton, _pack_unfit_triton),),
)
_bitwise_unpack = Op(
    "bitwise_unpack(Tensor packed, SymInt dim) -> Tensor",
    eager=_unpack_eager,
    fake=_unpack_fake,
    backends=(Backend("triton", _run_unpack_triton, _unpack_unfit_triton),),
)
_bitwise_lookup = Op(
    "bitwise_lookup(Tensor bits, SymInt dim, bool spherical, ScalarType dtype) -> Tensor",
    eager=_lookup_eager,
    fake=_lookup_fake,
    backends=(Backend("triton", _run_lookup_triton, _lookup_unfit_triton),),
)
_bitwise_quantize = Op(
    "bitwise_quantize(Tensor x, bool spherical, bool packed, float? inv_temperature) -> (Tensor, Tensor, Tensor)",
    eager=_quantize_eager,
    fake=_quantize_fake,
    backends=(Backend("triton", _run_quantize_triton, _quantize_unfit_triton),),
    setup_context=_quantize_setup,
    backward=_quantize_gradient,
)
_bitwise_quantize_backward = Op(
    "bitwise_quantize_backward(Tensor x, Tensor? grad, Tensor? grad_sums, bool spherical, float? inv_temperature) "
    "-> Tensor",
    eager=_quantize_backward_eager,
    fake=_quantize_backward_fake,
    backends=(Backend("triton", _run_quantize_backward_triton, _quantize_backward_unfit_triton),),
)

# ---- public functions ------------------------------------------------------------------------------------------------


def bitwise_pack(bits: Tensor, *, backend: str = "auto") -> Tensor:
    """Labels as words: the integer whose binary digits they are, channel 0 first.

    Args:
        bits: (..., d) of 0 and 1, d from 1 to 64, uint8, bool, int32 or int64 (anything but 0 counts as 1).
        backend: "auto", "triton" or "eager".

    Returns:
        (...) int64: sum over c of bit_c 2^(d - 1 - c), negative where d is 64 and bit 0 is set.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for another shape, an unknown backend or one that does not fit.
    """
    function = "bitwise_pack"
    _check_bits(function, bits, None, LABELS)
    return _bitwise_pack(bits, backend)


def bitwise_unpack(packed: Tensor, dim: int, *, backend: str = "auto") -> Tensor:
    """Words as labels, the inverse of `bitwise_pack`.

    Args:
        packed: (...) int64, whose lowest `dim` bits count.
        dim: the number d of bits in a word, from 1 to 64.
        backend: "auto", "triton" or "eager".

    Returns:
        (..., d) uint8 of 0 and 1.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for a `dim` outside 1 to 64, an unknown backend or one that does not fit.
    """
    _check_bits("bitwise_unpack", packed, dim, LABELS, "packed")
    return _bitwise_unpack(packed, dim, backend)


def _losses(sums: Tensor) -> BitwiseLosses:
    probability = sums[:-2]
    # Beyond these the entropy is 0 to float32, and its slope's factor in the probability's own gradient too.
    p = probability.clamp(2.0**-24, 1 - 2.0**-24)
    codebook = -(p * p.log() + (1 - p) * torch.log1p(-p)).sum()
    return BitwiseLosses(sums[-2], codebook, sums[-1], probability)


def _check_dim(function: str, features: Tensor, axis: int) -> None:
    if features.ndim < 1 or not 1 <= features.shape[axis] <= MAX_DIM:
        raise ValueError(f"{function}: features must have d from 1 to {MAX_DIM} channels, got {tuple(features.shape)}")


def _check_bits(
    function: str, bits: Tensor, dim: int | None, labels: tuple[torch.dtype, ...], argument: str = "bits"
) -> int:
    """Returns dim, or 0 for labels."""
    if dim is None:
        _checks.check_tensor(function, argument, bits, labels)
        if bits.ndim < 1 or not 1 <= bits.shape[-1] <= MAX_DIM:
            raise ValueError(
                f"{function}: {argument} must be (..., d) with d from 1 to {MAX_DIM}, got {tuple(bits.shape)}"
            )
        return 0
    _checks.check_tensor(function, argument, bits, (torch.int64,))
    _checks.check_integer(function, "dim", dim, 1)
    if dim > MAX_DIM:
        raise ValueError(f"{function}: dim must be at most {MAX_DIM}, got {dim}")
    return dim
