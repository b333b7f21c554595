"""Drawing codes from logits: guidance, temperature, top-k, top-p and the draw, as one operator.

    mixed = u + g (c - u);  z = mixed / temperature;  z = -inf below the k-th largest;  p = softmax(z)
    p = 0 outside the smallest set of largest entries that reaches top_p;  code = argmax(p / noise), noise ~ Exp(1)

The last step is an exact draw from p (the exponential race), and the one that torch.multinomial makes.
Classifier-free guidance: Ho and Salimans (2022). Top-p: Holtzman et al. (2020).

Every backend draws the same code, bit for bit, because nothing that decides depends on an order of summation or on a
device's exponential. The race and top-p use weights w = exp(z - max z), taken in float64 and rounded once, instead of
p, whose common divisor decides nothing; and top-p adds them up as integers. Two float64 exponentials that differ in
their last bit round to different weights once in 10^8 entries, and that entry would have to be at the cut, or ahead in
the race.
"""

import torch
from torch import Tensor

from unifiedar.ops import _checks, _native
from unifiedar.ops._op import Backend, Op

__all__ = ["cut_logits", "sample_codes"]

LOWEST = -87.0  # a score so far below the largest has probability 0: what float32 has of e^-88 is no longer precise


# ---- definition ------------------------------------------------------------------------------------------------------


def _mixed(logits: Tensor, guidance: float | None, guidance_rows: Tensor | None) -> Tensor:
    """Logits after guidance, in their own dtype."""
    if guidance_rows is not None:
        conditional, unconditional = logits.chunk(2)
        strength = _spread(guidance_rows.to(_real(logits.dtype)), logits)
        return unconditional + ((conditional - unconditional) * strength).to(logits.dtype)
    if guidance is not None:
        conditional, unconditional = logits.chunk(2)
        return unconditional + (conditional - unconditional) * guidance
    return logits


def _weighed(
    scores: Tensor, top_k: int, top_k_rows: Tensor | None, top_p: float, top_p_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores with those below the k-th at -inf, and the weights they are drawn with: 0 is what top-k or top-p cut."""
    vocabulary = scores.shape[-1]
    if top_k_rows is not None:
        k = _spread(top_k_rows, scores)
        on = (k > 0) & (k < vocabulary)
        place = (k.clamp(1, vocabulary) - 1).expand(*scores.shape[:-1], 1)
        kth = scores.sort(dim=-1, descending=True).values.gather(-1, place)
        scores = scores.masked_fill(on & (scores < kth), -torch.inf)
    elif 0 < top_k < vocabulary:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    distance = scores.double() - scores.amax(dim=-1, keepdim=True).double()
    weights = torch.where(distance >= LOWEST, distance.exp(), 0).to(scores.dtype)
    if top_p_rows is not None or 0 < top_p < 1:
        # Among equal entries at the crossing the lower index is kept, hence the stable sort.
        ordered, index = weights.sort(dim=-1, descending=True, stable=True)
        reached = (ordered.double() * _units(vocabulary)).long().cumsum(dim=-1)
        share = top_p if top_p_rows is None else _spread(top_p_rows.double(), scores)
        crossed = reached >= (reached[..., -1:].double() * share).ceil().long()
        if isinstance(share, Tensor):
            crossed &= (share > 0) & (share < 1)
        dropped = torch.zeros_like(crossed)
        dropped[..., 1:] = crossed[..., :-1]
        weights = weights.masked_fill(dropped.scatter(-1, index, dropped), 0)
    return scores, weights


def _sample_eager(
    logits: Tensor,
    guidance: float | None,
    guidance_rows: Tensor | None,
    temperature: float,
    top_k: int,
    top_k_rows: Tensor | None,
    top_p: float,
    top_p_rows: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    scores = _mixed(logits, guidance, guidance_rows).to(_real(logits.dtype))
    if temperature == 0:
        return scores.argmax(dim=-1)
    # Not a division: that is one on a CPU, and a product with the inverse on a GPU.
    _, weights = _weighed(scores * (1 / temperature), top_k, top_k_rows, top_p, top_p_rows)
    assert noise is not None
    # An entry of probability 0 never wins, not even against a noise of 0.
    return torch.where(weights > 0, weights / noise, 0).argmax(dim=-1)


def _cut_eager(
    logits: Tensor,
    guidance: float | None,
    guidance_rows: Tensor | None,
    top_k: int,
    top_k_rows: Tensor | None,
    top_p: float,
    top_p_rows: Tensor | None,
) -> Tensor:
    scores = _mixed(logits, guidance, guidance_rows).to(_real(logits.dtype))
    scores, weights = _weighed(scores, top_k, top_k_rows, top_p, top_p_rows)
    return scores.masked_fill(weights == 0, -torch.inf)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) as (N, 1, ..., 1), to go with (N, ..., V)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _units(vocabulary: int) -> float:
    """What a weight of 1 counts where weights are added up as integers: the sum stays below 2^63."""
    return 2.0 ** (62 - (vocabulary - 1).bit_length())


# ---- shape of the output ---------------------------------------------------------------------------------------------


def _sample_fake(logits, guidance, guidance_rows, *_):
    guided = guidance is not None or guidance_rows is not None
    shape = logits.shape[:-1]
    return logits.new_empty((shape[0] // 2, *shape[1:]) if guided else shape, dtype=torch.int64)


def _cut_fake(logits, guidance, guidance_rows, *_):
    guided = guidance is not None or guidance_rows is not None
    rows = logits.shape[0] // 2 if guided else logits.shape[0]
    return logits.new_empty((rows, *logits.shape[1:]), dtype=_real(logits.dtype))


# ---- backends --------------------------------------------------------------------------------------------------------


_sample_cuda = _native.define(
    "sample_codes_cuda(Tensor logits, Tensor noise, Tensor? guidance_rows, Tensor? top_k_rows, Tensor? top_p_rows, "
    "bool guided, float guidance, float temperature, int top_k, float top_p, int inner, "
    "Tensor(a!) out) -> ()"
)


def _unfit_cuda(
    logits, guidance, guidance_rows, temperature, top_k, top_k_rows, top_p, top_p_rows, noise
) -> str | None:
    reason = _native.cuda_unfit(logits)
    if reason is not None:
        return reason
    if logits.dtype == torch.float64:
        return "needs logits of float32 or less, got float64"
    if noise is None:
        return "needs a temperature above 0: it draws, and does not take the largest entry"
    if noise.dtype != torch.float32:
        return f"needs noise of float32, got {str(noise.dtype).removeprefix('torch.')}"
    return _too_long(logits)


def _run_cuda(logits, guidance, guidance_rows, temperature, top_k, top_k_rows, top_p, top_p_rows, noise) -> Tensor:
    out = _sample_fake(logits, guidance, guidance_rows)
    if not out.numel():
        return out
    _sample_cuda(
        _rows(logits),
        _rows(noise),
        None if guidance_rows is None else guidance_rows.float().contiguous(),
        None if top_k_rows is None else top_k_rows.contiguous(),
        None if top_p_rows is None else _wide(top_p_rows).contiguous(),
        guidance is not None or guidance_rows is not None,
        0.0 if guidance is None else guidance,
        temperature,
        top_k,
        top_p,
        _inner(out),
        out.view(-1),
    )
    return out


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _inner(out: Tensor) -> int:
    """Rows that share an option given one a row."""
    return out.numel() // out.shape[0] if out.ndim else 1


def _too_long(logits: Tensor) -> str | None:
    size = logits.shape[-1]
    return None if size <= 2**18 else f"needs at most 2^18 entries a row, got {size}"


def _unfit_triton(
    logits, guidance, guidance_rows, temperature, top_k, top_k_rows, top_p, top_p_rows, noise
) -> str | None:
    for tensor in (logits, noise, guidance_rows, top_p_rows):
        reason = None if tensor is None else _native.triton_unfit(tensor)
        if reason is not None:
            return reason
    for name, tensor in (("logits", logits), ("noise", noise)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"needs {name} of float32 or less, got float64"
    return _too_long(logits)


def _run_triton(logits, guidance, guidance_rows, temperature, top_k, top_k_rows, top_p, top_p_rows, noise) -> Tensor:
    out = _sample_fake(logits, guidance, guidance_rows)
    rows, vocabulary = out.numel(), logits.shape[-1]
    if not rows:
        return out
    kernels = _native.kernels("sample")
    workspace = out.new_empty(kernels.workspace_words(rows, vocabulary), dtype=torch.int32)
    with torch.cuda.device_of(logits):
        kernels.sample_codes(
            _rows(logits),
            None if noise is None else _rows(noise),
            guidance if guidance_rows is None else guidance_rows.contiguous(),
            temperature,
            top_k if top_k_rows is None else top_k_rows.contiguous(),
            top_p if top_p_rows is None else top_p_rows.contiguous(),
            _inner(out),
            _units(vocabulary),
            workspace,
            out.view(-1),
        )
    return out


def _rows(tensor: Tensor) -> Tensor:
    """(..., V) as (rows, V) with contiguous entries; copied only where no strides do that."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


# ---- operator --------------------------------------------------------------------------------------------------------

_sample_codes = Op(
    "sample_codes(Tensor logits, float? guidance, Tensor? guidance_rows, float temperature, SymInt top_k, "
    "Tensor? top_k_rows, float top_p, Tensor? top_p_rows, Tensor? noise) -> Tensor",
    eager=_sample_eager,
    fake=_sample_fake,
    backends=(
        Backend("cuda", _run_cuda, _unfit_cuda),
        Backend("triton", _run_triton, _unfit_triton),
    ),
)

_cut_logits = Op(
    "cut_logits(Tensor logits, float? guidance, Tensor? guidance_rows, SymInt top_k, Tensor? top_k_rows, float top_p, "
    "Tensor? top_p_rows) -> Tensor",
    eager=_cut_eager,
    fake=_cut_fake,
)


# ---- public functions ------------------------------------------------------------------------------------------------


def sample_codes(
    logits: Tensor,
    *,
    guidance: float | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """One code drawn from each row of logits, after guidance, temperature, top-k and top-p, in that order.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. With `guidance` they are (2N, ..., V), the N
            conditional rows first, then their N unconditional ones.
        guidance: None, or the strength g of u + g (c - u), where c are the conditional and u the unconditional logits:
            a number, or a float tensor (N,), one a row. 1 is the conditional model; VAR's `t` is g - 1.
        temperature: divides the logits; 0 takes the largest one (the lowest index on ties) and uses no noise.
        top_k: keeps the k largest logits and every tie with the k-th; 0, or V and more, is off. A number, or an int64
            tensor (N,), one a row, N being the first size of the result.
        top_p: keeps the smallest set of largest probabilities that reaches it, the crossing entry included; 0, or 1 and
            more, is off. Among equal probabilities at the crossing the lower indices are kept. A number, or a float
            tensor (N,).
        noise: samples of Exp(1), all positive, of the probabilities' shape ((N, ..., V) with guidance, else that of
            logits) and any float dtype. None draws float32 samples (float64 for float64 logits) with `generator`.
        generator: the random generator for `noise`, None for torch's default one. Under torch.compile or in a CUDA
            graph pass noise instead of a generator.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        (...) int64 codes, (N, ...) with guidance.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for an empty vocabulary, an odd number of guided rows, guidance, top_k, top_p or noise of another
            shape or device, a number that is negative or not finite, noise together with a generator, an unknown
            backend or one that does not fit. Numbers in a tensor, which would have to be waited for, are not checked:
            below 0 and NaN are off.

    Note:
        Guidance is computed in the logits' dtype, each of its three operations rounded, as the published models do;
        what follows is in float32 (float64 for float64), top-p's sums in integers. With the same noise the draw is that
        of `torch.multinomial(p, 1)`, which takes its noise in the same way, so the same generator state gives the same
        code; two entries may trade places where p / noise agrees to float32's rounding, which is multinomial's own.
        A probability below e^-87 of the largest is 0. A row with NaN or +inf, or of which no logit is finite, gives 0;
        with temperature 0 NaN is the largest. No gradient, no host sync; may be captured in a CUDA graph.

        Backends give equal codes for equal noise: the race, the cut of top-k and that of top-p are decided by the same
        numbers, exactly. The one thing left to a device is its float64 exponential, whose last bit shows in the float32
        weight of one entry in 10^8. The kernels take up to 2^18 entries a row. The compiled one draws with float32
        noise, and leaves the largest entry (temperature 0) to the others; up to 16,384 entries are in registers, of
        more a row is read several times. Triton's has those in 17 to 280 MB of memory beside. Logits or noise whose
        rows no strides describe are copied.
    """
    function = "sample_codes"
    shape, mix, cuts = _settings(function, logits, guidance, top_k, top_p)
    _checks.check_number(function, "temperature", temperature, 0)
    if noise is not None:
        _checks.check_tensor(function, "noise", noise)
        if noise.shape != shape:
            raise ValueError(f"{function}: noise must be {shape}, got {tuple(noise.shape)}")
        _checks.check_same_device(function, "noise", noise, "logits", logits)
        if generator is not None:
            raise ValueError(f"{function}: generator must be None when noise is given, got {generator}")
        if temperature == 0:
            noise = None
    elif temperature > 0:
        noise = torch.empty(shape, dtype=_real(logits.dtype), device=logits.device).exponential_(generator=generator)
    return _sample_codes(logits, *mix, float(temperature), *cuts, noise, backend)


def cut_logits(
    logits: Tensor,
    *,
    guidance: float | Tensor | None = None,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    backend: str = "auto",
) -> Tensor:
    """What `sample_codes` draws from: logits after guidance, with all that top-k and top-p cut off at -inf.

    For whoever draws in another way, as VAR does with a Gumbel softmax over them ("more smooth").

    Args:
        logits: (..., V), as `sample_codes` takes them.
        guidance: as `sample_codes`.
        top_k: as `sample_codes`.
        top_p: as `sample_codes`.
        backend: "auto" or "eager".

    Returns:
        (..., V) float32 (float64 for float64 logits), (N, ..., V) with guidance. A probability below e^-87 of the
        largest counts as cut off.

    Raises:
        TypeError: as `sample_codes`.
        ValueError: as `sample_codes`.

    Note:
        No gradient, no host sync; may be captured in a CUDA graph.
    """
    _, mix, cuts = _settings("cut_logits", logits, guidance, top_k, top_p)
    return _cut_logits(logits, *mix, *cuts, backend)


def _settings(
    function: str, logits: Tensor, guidance: object, top_k: object, top_p: object
) -> tuple[tuple[int, ...], tuple, tuple]:
    """Checked: the shape of the probabilities, then as the operators take them, the guidance, and top-k and top-p."""
    _checks.check_tensor(function, "logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{function}: logits must be (..., V) with V at least 1, got {tuple(logits.shape)}")
    shape = tuple(logits.shape)
    number = rows = None
    if guidance is not None:
        if logits.ndim < 2 or logits.shape[0] % 2:
            raise ValueError(
                f"{function}: logits must be (2N, ..., V), conditional rows first, with guidance, "
                f"got {tuple(logits.shape)}"
            )
        shape = (logits.shape[0] // 2, *logits.shape[1:])
        rows = _one_a_row(function, "guidance", guidance, _checks.FLOATS, shape, logits)
        if rows is None:
            _checks.check_number(function, "guidance", guidance)
            number = float(guidance)  # type: ignore[arg-type]
    k_rows = _one_a_row(function, "top_k", top_k, (torch.int64,), shape, logits)
    if k_rows is None:
        _checks.check_integer(function, "top_k", top_k, 0)
    p_rows = _one_a_row(function, "top_p", top_p, _checks.FLOATS, shape, logits)
    if p_rows is None:
        _checks.check_number(function, "top_p", top_p, 0)
    k = 0 if k_rows is not None else top_k
    p = 0.0 if p_rows is not None else float(top_p)  # type: ignore[arg-type]
    return shape, (number, rows), (k, k_rows, p, p_rows)


def _one_a_row(
    function: str, argument: str, value: object, dtypes: tuple[torch.dtype, ...], shape: tuple, logits: Tensor
) -> Tensor | None:
    """An option given as a tensor, checked to be (N,), N = shape[0]; None if it is no tensor."""
    if not isinstance(value, Tensor):
        return None
    _checks.check_tensor(function, argument, value, dtypes)
    if len(shape) < 2 or value.shape != shape[:1]:
        rule = f"a number or ({shape[0]},), one a row" if len(shape) > 1 else "a number for a single row"
        raise ValueError(f"{function}: {argument} must be {rule}, got {tuple(value.shape)}")
    _checks.check_same_device(function, argument, value, "logits", logits)
    return value
