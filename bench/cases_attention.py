"""Cases of the family `attention`: block-causal attention at the training shapes of published models, and packed.

`forward` is the output alone, `backward` the forward with the gradients of q, k and v. Operations count visible scores
only: with V = sum over scales of length times end (in each picture), 4 B H D V forward (two products) and 10 B H D V
more backward (five). Least traffic: q, k, v and the output once; with the backward the same again, the incoming
gradient and three outgoing ones; lse written, and read again. A packed sequence holds pictures of different shapes; its
mask is made once, as a training step would.

"SDPA + mask" is what PyTorch chooses, and then each of its backends that take a mask. FlexAttention on FLASH, xformers
and FlashAttention are there where they can be imported. What has no mask is no peer, for it computes something else:
what dense attention takes for all L x L scores.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench._case import OURS, Case, Check, Variant, against, tensors
from unifiedar.ops import block_attention, block_causal_attention, masks, registry

__all__ = ["cases"]


Scales = tuple[int, ...]
"""Tokens of each."""


@dataclass(frozen=True)
class Model:
    """Sizes of a published model in training; several pictures are packed in one sequence."""

    name: str
    batch: int
    heads: int
    width: int
    pictures: tuple[Scales, ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return sum(map(sum, self.pictures))


def _squares(*sides: int) -> Scales:
    return tuple(side * side for side in sides)


_VAR_256 = _squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_VAR_512 = _squares(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_VAR_1024 = _squares(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
_INFINITY = _squares(1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
_SIDES_4_3 = (
    (1, 1),
    (2, 2),
    (4, 3),
    (8, 6),
    (12, 9),
    (16, 12),
    (20, 15),
    (24, 18),
    (28, 21),
    (36, 27),
    (48, 36),
    (60, 45),
    (72, 54),
)
_SIDES_2_1 = (
    (1, 1),
    (2, 2),
    (4, 2),
    (6, 3),
    (10, 5),
    (16, 8),
    (22, 11),
    (30, 15),
    (38, 19),
    (46, 23),
    (60, 30),
    (74, 37),
    (90, 45),
)
_INFINITY_4_3 = tuple(height * width for height, width in _SIDES_4_3)
_INFINITY_2_1 = tuple(height * width for height, width in _SIDES_2_1)
_SMALL = 7  # scales of Infinity's 0.06 megapixels; 10 are .25 and 12 are .6
MODELS = (
    Model("var-256-d16", 32, 16, 64, (_VAR_256,)),
    Model("var-256-d30", 32, 30, 64, (_VAR_256,)),
    Model("var-512-d36", 8, 36, 64, (_VAR_512,)),
    Model("infinity-2b", 1, 16, 128, (_INFINITY,)),
    Model("var-256-d16-b1", 1, 16, 64, (_VAR_256,)),
    Model("var-256-d16-b8", 8, 16, 64, (_VAR_256,)),
    Model("var-256-d16-b64", 64, 16, 64, (_VAR_256,)),
    Model("var-1024-d30", 2, 30, 64, (_VAR_1024,)),
    Model("infinity-2b-0.06m", 16, 16, 128, (_INFINITY[:_SMALL],)),
    Model("infinity-2b-0.25m", 4, 16, 128, (_INFINITY[:10],)),
    Model("infinity-2b-0.60m", 2, 16, 128, (_INFINITY[:12],)),
    Model("infinity-2b-4:3", 1, 16, 128, (_INFINITY_4_3,)),
    Model("infinity-2b-2:1", 1, 16, 128, (_INFINITY_2_1,)),
    Model("infinity-125m-0.06m", 16, 8, 96, (_INFINITY[:_SMALL],)),
    Model("infinity-2b-packed", 1, 16, 128, (_INFINITY[:10], _INFINITY_4_3[:10], _INFINITY_2_1[:10])),
)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k, v and the gradient of the output, all (B, H, L, D)."""
Formula = Callable[..., Any]
"""Of q, k and v."""


def cases(device: torch.device) -> list[Case]:
    """Every model, forward and backward; on the CPU two heads of one picture's first scales."""
    return [_case(model, use, device.type != "cuda") for model in MODELS for use in ("forward", "backward")]


def visible(pictures: Sequence[Sequence[int]]) -> int:
    """Scores of one head that are not masked."""
    return sum(length * end for one in pictures for length, end in zip(one, accumulate(one), strict=True))


def _case(model: Model, use: str, small: bool) -> Case:
    if small:
        model = replace(model, batch=1, heads=2, pictures=tuple(scales[:6] for scales in model.pictures[:3]))
    batch, heads, length, width, dtype = model.batch, model.heads, model.length, model.width, torch.bfloat16
    shape = (batch, heads, length, width)
    elements, rows = batch * heads * length * width, batch * heads * length
    moved, operations = 4 * elements * dtype.itemsize + 4 * rows, 4 * batch * heads * width * visible(model.pictures)
    if use == "backward":
        moved += 8 * elements * dtype.itemsize + 4 * rows
        operations += 10 * batch * heads * width * visible(model.pictures)

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v, grad = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(4))
        if use == "backward":
            for x in (q, k, v):
                x.requires_grad_()
        return q, k, v, grad

    def check(inputs: Inputs) -> Check:
        wide = tuple(x.detach().double() for x in inputs)
        same = against(_by_heads(wide, model, use), _by_heads(inputs, model, use), peer_tolerance=2e-2)

        def compare(variant: Variant, output: object) -> None:
            if variant.role != "yardstick":
                same(variant, output)

        return compare

    def backend(inputs: Inputs) -> str:
        if len(model.pictures) == 1:
            arguments = (*inputs[:3], list(model.pictures[0]), None, 0, width**-0.5)
            return registry["block_causal_attention"].choose("auto", *arguments).name
        mask = masks.packed(model.pictures, device=inputs[0].device)
        who = (mask.sees, mask.seen_by, mask.offsets, width**-0.5)
        return registry["block_attention"].choose("auto", *inputs[:3], *who).name

    return Case(
        name=f"{model.name}/{use}",
        shape={"B": batch, "H": heads, "L": length, "D": width, "scales": sum(map(len, model.pictures))},
        dtype=dtype,
        bytes=moved,
        flops=operations,
        make=make,
        variants=_variants(model, use, small),
        check=check,
        backend=backend,
        on_matrix_units=True,
        other=lambda: _case(replace(model, pictures=tuple(scales[:-1] for scales in model.pictures)), use, small),
    )


def _variants(model: Model, use: str, small: bool) -> Sequence[Variant]:
    every_score = 4 * model.batch * model.heads * model.width * model.length**2

    def variant(name: str, role: str, prepare: Callable[[torch.Tensor], Formula]) -> Variant:
        """`prepare` takes q and returns the formula: what is done once a schedule is done there."""
        flops = None if role != "yardstick" else every_score if use == "forward" else every_score * 7 // 2
        return Variant(name, role, lambda inputs: _call(prepare(inputs[0]), inputs, use), flops)

    def ours(backend: str) -> Callable[[torch.Tensor], Formula]:
        return lambda like: _ours(model, like, backend)

    found = [variant(OURS, "ours", ours("auto"))]
    if not small:
        found += [variant(f"{OURS} {name}", "backend", ours(name)) for name in _backends(model)]
        found.append(variant("FlexAttention, Triton", "peer", lambda like: _flex(model, like)))
    found.append(variant("SDPA + mask", "peer", lambda like: _masked(model, like)))
    found.append(variant("SDPA, no mask", "yardstick", lambda like: F.scaled_dot_product_attention))
    if small:
        return found
    for name, backend in _SDPA.items():
        found.append(variant(f"SDPA + mask, {name}", "peer", functools.partial(_masked, model, backend=backend)))
    if _found("flash_attn.cute"):
        found.append(variant("FlexAttention, FLASH", "peer", lambda like: _flex(model, like, "FLASH")))
    if _found("xformers.ops"):
        found.append(variant("xformers + mask", "peer", lambda like: _xformers(model, like)))
    dense = _on(SDPBackend.CUDNN_ATTENTION, F.scaled_dot_product_attention)
    found.append(variant("cuDNN, no mask", "yardstick", lambda like: dense))
    for module in filter(_found, _FLASH):
        found.append(variant(f"{module}, no mask", "yardstick", functools.partial(_flash, module)))
    return found


_SDPA = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Modules of FlashAttention 4, 3 and 2."""


@functools.cache
def _found(module: str) -> bool:
    """Whether it is installed; it is imported by who uses it, as a part of what the first call costs."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a package built for another torch may fail in any way
        return False


def _backends(model: Model) -> list[str]:
    name = "block_causal_attention" if len(model.pictures) == 1 else "block_attention"
    return [backend.name for backend in registry[name].backends]


def _ours(model: Model, like: torch.Tensor, backend: str) -> Formula:
    if len(model.pictures) == 1:
        return lambda q, k, v: block_causal_attention(q, k, v, model.pictures[0], backend=backend)
    mask = masks.packed(model.pictures, device=like.device)
    return lambda q, k, v: block_attention(q, k, v, mask, backend=backend)


def _call(formula: Formula, inputs: Inputs, use: str) -> Callable[[], object]:
    q, k, v, grad = inputs
    if use == "forward":
        return lambda: formula(q, k, v)

    def forward_and_backward() -> tuple[torch.Tensor, ...]:
        output = formula(q, k, v)
        return output.detach(), *torch.autograd.grad(output, (q, k, v), grad)

    return forward_and_backward


def _by_heads(inputs: tuple[torch.Tensor, ...], model: Model, use: str) -> list[torch.Tensor]:
    """The definition, a few heads at a time: it holds L x L scores of each."""

    eager = _ours(model, inputs[0], "eager")
    length = inputs[0].shape[2]
    step = max(1, 2**27 // length**2)
    parts = []
    for rows in zip(*(x.detach().flatten(0, 1).split(step) for x in inputs), strict=True):
        q, k, v, grad = (x[None] for x in rows)
        if use == "backward":
            q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        parts.append([x.detach()[0] for x in tensors(_call(eager, (q, k, v, grad), use)())])
    return [torch.cat(part).view(inputs[0].shape) for part in zip(*parts, strict=True)]


def _levels(model: Model, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture of every token, and its scale counted over all pictures."""
    flat = [scale for scales in model.pictures for scale in scales]
    level = torch.arange(len(flat), device=device).repeat_interleave(torch.tensor(flat, device=device))
    counts = torch.tensor([sum(scales) for scales in model.pictures], device=device)
    return torch.arange(len(counts), device=device).repeat_interleave(counts), level


def _bias(model: Model, like: torch.Tensor) -> torch.Tensor:
    """(L, L) of 0 and -inf, rows of it at multiples of 8 elements."""
    picture, level = _levels(model, like.device)
    length = len(level)
    bias = torch.zeros(length, length + -length % 8, dtype=like.dtype, device=like.device)[:, :length]
    return bias.masked_fill_((level > level[:, None]) | (picture != picture[:, None]), float("-inf"))


def _masked(model: Model, like: torch.Tensor, backend: SDPBackend | None = None) -> Formula:
    """As VAR trains: an additive mask."""
    bias = _bias(model, like)[None, None]

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return formula if backend is None else _on(backend, formula)


def _on(backend: SDPBackend, formula: Formula) -> Formula:
    """Of SDPA, by one of its backends."""

    def served(*args: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return formula(*args)

    return served


def _xformers(model: Model, like: torch.Tensor) -> Formula:
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    bias = _bias(model, like).expand(*like.shape[:2], -1, -1)

    def formula(*args: torch.Tensor) -> torch.Tensor:
        return attend(*(x.transpose(1, 2) for x in args), attn_bias=bias).transpose(1, 2)

    return formula


def _flash(module: str, like: torch.Tensor) -> Formula:
    attend = importlib.import_module(module).flash_attn_func

    def formula(*args: torch.Tensor) -> torch.Tensor:
        found = attend(*(x.transpose(1, 2) for x in args))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return formula


def _flex(model: Model, like: torch.Tensor, backend: Any = "TRITON") -> Formula:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = model.length
    # The mask is looked up at padded positions too: a picture and a scale of their own.
    picture, level = (F.pad(x, (0, -length % 128), value=length) for x in _levels(model, like.device))

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        earlier = level[key] <= level[query]
        return earlier if len(model.pictures) == 1 else earlier & (picture[key] == picture[query])

    block_mask = create_block_mask(sees, None, None, length, length, device=str(like.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    options: Any = None if backend == "TRITON" else {"BACKEND": backend}
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, kernel_options=options)
