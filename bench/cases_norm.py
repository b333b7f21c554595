"""Cases of the family `norm`: queries and keys before attention, at the shapes of published models.

`forward` and `backward` (the forward with the gradients of q, k and the gain) are training steps; `cache` is one scale
of a generation, values copied too, all into preallocated tensors. q, k and v are views of one fused projection. Least
traffic: every input and output once, the table of angles too. `published` is what the models write out, under autocast:
float32 from bfloat16, rounded at the end; for the cache their `torch.cat` is counted as a copy into place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench._case import OURS, Case, Check, Variant, against, tensors
from unifiedar.ops import qk_norm_rope, registry

__all__ = ["cases"]


@dataclass(frozen=True)
class Model:
    """Sizes of a published model: B, H, D, tokens of its schedule and of its last scale, and whether it has RoPE."""

    name: str
    batch: int
    heads: int
    width: int
    length: int
    last: int
    turned: bool


# The batch of "cache" is 2: one picture and its guidance.
MODELS = (
    Model("var-256-d16", 32, 16, 64, 680, 256, False),
    Model("var-512-d36", 8, 36, 64, 2240, 1024, False),
    Model("infinity-2b", 1, 16, 128, 10521, 4096, True),
)

Inputs = dict[str, Any]
"""q, k, v, grad_q, grad_k (B, H, L, D), gain (H,), rope (2, L, D / 2) or None, new (q, k, v)."""
Formula = Callable[..., tuple[torch.Tensor, ...]]
"""Of q, k, gain and rope."""


def cases(device: torch.device) -> list[Case]:
    """Every model in every use; on the CPU one picture of two heads and at most 64 tokens."""
    return [_case(model, use, device.type != "cuda") for model in MODELS for use in ("forward", "backward", "cache")]


def _case(model: Model, use: str, small: bool) -> Case:
    batch, heads = (1, 2) if small else (2 if use == "cache" else model.batch, model.heads)
    length = model.last if use == "cache" else model.length
    length, width, dtype = min(length, 64) if small else length, model.width, torch.bfloat16
    elements = batch * heads * length * width
    passes = {"forward": 4, "backward": 10, "cache": 6}[use]  # tensors read or written
    angles = length * width * 4 if model.turned else 0

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator)

        fused = normal(batch, length, 3, heads, width).to(dtype)
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind()
        gain, angle = normal(heads) * 0.3 + 1.4, normal(length, width // 2)
        if use == "backward":
            q, k, gain = (x.detach().requires_grad_() for x in (q, k, gain))
        return {
            "q": q,
            "k": k,
            "v": v,
            "grad_q": normal(batch, heads, length, width).to(dtype),
            "grad_k": normal(batch, heads, length, width).to(dtype),
            "gain": gain,
            "rope": torch.stack((angle.cos(), angle.sin())) if model.turned else None,
            "new": (torch.empty_like(q), *torch.empty(2, batch, heads, length, width, dtype=dtype, device=device)),
        }

    def check(inputs: Inputs) -> Check:
        wide = {name: _double(value) for name, value in inputs.items()}
        eager = _ours("eager")
        oracle = [x.detach().clone() for x in tensors(_call(eager, wide, use)())]
        return against(oracle, [x.detach().clone() for x in tensors(_call(eager, inputs, use)())], peer_tolerance=2e-2)

    def backend(inputs: Inputs) -> str:
        settings = ("l2", 1e-12, inputs["gain"], None, None, inputs["rope"])
        if use == "cache":
            arguments = (inputs["q"], inputs["k"], inputs["v"], *settings, *inputs["new"])
            return registry["qk_norm_rope_out"].choose("auto", *arguments).name
        return registry["qk_norm_rope"].choose("auto", inputs["q"], inputs["k"], *settings).name

    return Case(
        name=f"{model.name}/{use}",
        shape={"B": batch, "H": heads, "L": length, "D": width},
        dtype=dtype,
        bytes=passes * elements * dtype.itemsize + angles * (2 if use == "backward" else 1),
        flops=elements * (24 if use == "backward" else 8),
        make=make,
        variants=_variants(use, small),
        check=check,
        backend=backend,
    )


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return None if value is None else value.detach().double().requires_grad_(value.requires_grad)


def _variants(use: str, small: bool) -> Sequence[Variant]:
    def variant(name: str, role: str, formula: Formula) -> Variant:
        return Variant(name, role, lambda inputs: _call(formula, inputs, use))

    found = [variant(OURS, "ours", _ours("auto"))]
    if not small:
        found += [variant(f"{OURS} {name}", "backend", _ours(name)) for name in ("triton", "eager")]
        found.append(variant("torch.compile", "peer", torch.compile(_published, dynamic=False)))
    found.append(variant("published", "peer", _published))
    return found


def _ours(backend: str) -> Formula:
    def formula(q, k, gain, rope, v=None, new=None):
        return qk_norm_rope(q, k, v, gain=gain, rope=rope, out=new, backend=backend)

    return formula


def _published(q, k, gain, rope, v=None, new=None):
    found = []
    for x, factor in ((q, gain.clamp_max(4.605170249938965).exp()[:, None, None]), (k, None)):
        y = F.normalize(x.float(), dim=-1)
        y = y if factor is None else y * factor
        if rope is not None:
            even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
            y = torch.stack((rope[0] * even - rope[1] * odd, rope[1] * even + rope[0] * odd), -1).flatten(-2)
        found.append(y.to(x.dtype))
    if new is None:
        return tuple(found)
    for place, one in zip(new, (*found, v), strict=True):
        place.copy_(one)
    return new


def _call(formula: Formula, inputs: Inputs, use: str) -> Callable[[], object]:
    q, k, gain, rope = (inputs[name] for name in ("q", "k", "gain", "rope"))
    if use == "forward":
        return lambda: formula(q, k, gain, rope)
    if use == "cache":

        def into() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return formula(q, k, gain, rope, inputs["v"], inputs["new"])

        return into

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        outputs = formula(q, k, gain, rope)
        gradients = torch.autograd.grad(outputs, (q, k, gain), (inputs["grad_q"], inputs["grad_k"]))
        return *(one.detach() for one in outputs), *gradients

    return forward_and_backward
