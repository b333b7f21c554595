"""Drawing codes from logits: guidance, temperature, top-k, top-p and the draw, as one operator.

    mixed = u + g (c - u);  z = mixed / temperature;  z = -inf below the k-th largest;  p = softmax(z)
    p = 0 outside the smallest set of largest entries that reaches top_p;  code = argmax(p / noise), noise ~ Exp(1)

The last step is an exact draw from p (the exponential race), and the one that torch.multinomial makes.
Classifier-free guidance: Ho and Salimans (2022). Top-p: Holtzman et al. (2020).
"""

import torch
from torch import Tensor

from unifiedar.ops import _checks
from unifiedar.ops._op import Op

__all__ = ["sample_codes"]


# ---- definition ------------------------------------------------------------------------------------------------------


def _sample_eager(
    logits: Tensor,
    guidance: float | None,
    guidance_rows: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    noise: Tensor | None,
) -> Tensor:
    if guidance_rows is not None:
        conditional, unconditional = logits.chunk(2)
        rows = guidance_rows.to(_real(logits.dtype)).reshape(-1, *(1,) * (logits.ndim - 1))
        logits = unconditional + ((conditional - unconditional) * rows).to(logits.dtype)
    elif guidance is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (conditional - unconditional) * guidance
    scores = logits.to(_real(logits.dtype))
    if temperature == 0:
        return scores.argmax(dim=-1)
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    p = scores.softmax(dim=-1)
    if 0 < top_p < 1:
        # Among equal entries at the crossing the lower index is kept, hence the stable sort.
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        crossed = ordered.cumsum(dim=-1) >= top_p
        dropped = torch.zeros_like(crossed)
        dropped[..., 1:] = crossed[..., :-1]
        p = p.masked_fill(dropped.scatter(-1, index, dropped), 0)
    assert noise is not None
    # An entry of probability 0 never wins, not even against a noise of 0.
    return torch.where(p > 0, p / noise, 0).argmax(dim=-1)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- shape of the output ---------------------------------------------------------------------------------------------


def _sample_fake(logits, guidance, guidance_rows, temperature, top_k, top_p, noise):
    guided = guidance is not None or guidance_rows is not None
    shape = logits.shape[:-1]
    return logits.new_empty((shape[0] // 2, *shape[1:]) if guided else shape, dtype=torch.int64)


# ---- operator --------------------------------------------------------------------------------------------------------

_sample_codes = Op(
    "sample_codes(Tensor logits, float? guidance, Tensor? guidance_rows, float temperature, SymInt top_k, float top_p, "
    "Tensor? noise) -> Tensor",
    eager=_sample_eager,
    fake=_sample_fake,
)


# ---- public function -------------------------------------------------------------------------------------------------


def sample_codes(
    logits: Tensor,
    *,
    guidance: float | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
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
        top_k: keeps the k largest logits and every tie with the k-th; 0, or V and more, is off.
        top_p: keeps the smallest set of largest probabilities that reaches it, the crossing entry included; 0, or 1 and
            more, is off. Among equal probabilities at the crossing the lower indices are kept.
        noise: samples of Exp(1), all positive, of the probabilities' shape ((N, ..., V) with guidance, else that of
            logits) and any float dtype. None draws float32 samples (float64 for float64 logits) with `generator`.
        generator: the random generator for `noise`, None for torch's default one. Under torch.compile or in a CUDA
            graph pass noise instead of a generator.
        backend: "auto", "cuda", "triton" or "eager".

    Returns:
        (...) int64 codes, (N, ...) with guidance.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for an empty vocabulary, an odd number of guided rows, guidance or noise of another shape or device,
            a number that is negative or not finite, noise together with a generator, an unknown backend or one that
            does not fit.

    Note:
        Guidance is computed in the logits' dtype, each of its three operations rounded, as the published models do;
        what follows is in float32 (float64 for float64). With the same noise the draw is that of
        `torch.multinomial(p, 1)`, which takes its noise in the same way: the same generator state gives the same code.
        A row of which no logit is finite gives 0. No gradient, no host sync; may be captured in a CUDA graph.
    """
    function = "sample_codes"
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
        if isinstance(guidance, Tensor):
            _checks.check_tensor(function, "guidance", guidance)
            if guidance.shape != shape[:1]:
                raise ValueError(
                    f"{function}: guidance must be a number or ({shape[0]},), one a row, got {tuple(guidance.shape)}"
                )
            _checks.check_same_device(function, "guidance", guidance, "logits", logits)
            rows = guidance
        else:
            _checks.check_number(function, "guidance", guidance)
            number = float(guidance)
    _checks.check_number(function, "temperature", temperature, 0)
    _checks.check_number(function, "top_p", top_p, 0)
    _checks.check_integer(function, "top_k", top_k, 0)
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
    return _sample_codes(logits, number, rows, float(temperature), top_k, float(top_p), noise, backend)
