"""Cases of VAR as a whole: drawing pictures of classes, and a step of training (`bench/_var_training.py`); and two
things in it, the layer norm with its gate, 2 depth times a scale, and a product with weights of 8 bits.

Weights are random, as a training begins with them, so that codes are drawn almost evenly; times do not depend on it. A
drawing returns codes and pictures, in float16 as VAR's demonstration has it. Checked are the codes, every scale given
the earlier ones that came out: the float32 model, told those, must draw 95 % of them with the same noise. Least
traffic: the weights of the blocks once a scale, those that see the condition alone and the decoder's once, the cache
written once and read at every later scale, logits written and read. `published` launches what the published code does
under autocast (`bench/published`); it also runs with its blocks under torch.compile, and with ours swapped in
(`unifiedar.accelerate`), where the decoder stays the published one.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import _var_training
from bench._case import OURS, Case, Check, Variant, against
from bench.published import VAR as Published
from bench.published import published
from unifiedar.checkpoints import quantize_rows
from unifiedar.models import VAR, VQVAE, VARConfig, VQVAEConfig
from unifiedar.ops import linear_8bit, modulated_norm, registry, sample_codes

__all__ = ["cases"]

TOKENIZER = VQVAE.configs["vae_ch160v4096z32"]
SMALL_TOKENIZER = replace(
    TOKENIZER, network=replace(TOKENIZER.network, ch=32, resolution=48, attn_resolutions=(3,)), scales=(1, 2, 3)
)
SMALL = VARConfig(2, 64, 2, (1, 2, 3))
CFG, TOP_K, TOP_P = 1.5, 900, 0.96


def cases(device: torch.device) -> list[Case]:
    """d16, d30 and d36 at a few batches; on the CPU two blocks, three scales and one picture, in float32."""
    if device.type != "cuda":
        found = [_generate("small", SMALL, SMALL_TOKENIZER, 1, True), _norm("small", 2, 9, 64, True)]
        found.append(_var_training.step("small", SMALL, SMALL_TOKENIZER, 2, True))
        return [*found, _linear("small", "fc1", 18, 256, 64, "fp8", True)]
    found = []
    for name, batches in (("d16", (1, 8, 64)), ("d30", (1, 8, 32)), ("d36", (1, 8))):
        config = VAR.configs[name]
        tokenizer = replace(TOKENIZER, scales=config.scales)
        found += [_generate(name, config, tokenizer, batch, False) for batch in batches]
    for name, batch in (("d16", 64), ("d30", 16), ("d36", 4)):
        config = VAR.configs[name]
        tokenizer = replace(SMALL_TOKENIZER, scales=config.scales)
        found.append(_var_training.step(name, config, tokenizer, batch, False))
    for rows in (2, 32, 128, 512):  # the first scale, 4 x 4, 8 x 8 and 16 x 16 of one picture, guided
        for layer, outputs, inputs in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
            if layer in ("qkv", "fc2") or rows == 2:
                found.append(_linear("d30", layer, rows, outputs * 1920, inputs * 1920, "fp8", False))
        found.append(_linear("d30", "qkv", rows, 3 * 1920, 1920, "int8", False))
    found += [_norm("d16", 2, 256, 1024, False), _norm("d16", 128, 256, 1024, False)]
    return [*found, _norm("d30", 64, 256, 1920, False), _norm("d36", 16, 1024, 2304, False)]


# ---- drawing ---------------------------------------------------------------------------------------------------------


_made: weakref.WeakSet[VAR] = weakref.WeakSet()


@functools.lru_cache(maxsize=1)
def _models(config: VARConfig, tokenizer: VQVAEConfig, device: torch.device, dtype: torch.dtype) -> tuple[VAR, VAR]:
    """In float32 as published, and the same with products and decoder in `dtype`."""
    torch.manual_seed(0)
    with torch.device(device):
        made = [VAR(config, VQVAE(tokenizer)) for _ in range(2)]
    plain, fast = (one.eval().requires_grad_(False) for one in made)
    assert plain.vae is not None
    assert fast.vae is not None
    fast.load_state_dict(plain.state_dict())
    fast.vae.load_state_dict(plain.vae.state_dict())
    for one in (plain.vae, fast.vae):
        one.eval().requires_grad_(False)
    if dtype != torch.float32:
        fast.vae.fast_decoder(dtype)
    _made.update((plain, fast))
    return plain, fast.cast_products(dtype)


@functools.lru_cache(maxsize=2)
def _eight_bits(config: VARConfig, tokenizer: VQVAEConfig, device: torch.device, dtype: torch.dtype, form: str) -> VAR:
    """The float32 model with its weights in 8 bits, and products in `dtype`."""
    plain, fast = _models(config, tokenizer, device, dtype)
    with torch.device(device):
        model = VAR(config, fast.vae).eval().requires_grad_(False)
    model.load_state_dict(plain.state_dict())
    return model.quantize_weights(form).cast_products(dtype)


@functools.lru_cache(maxsize=3)  # one a way
def _reference(
    config: VARConfig, tokenizer: VQVAEConfig, device: torch.device, dtype: torch.dtype, way: str
) -> Published:
    """The published model on the float32 one's weights: as it is, with compiled blocks, or with ours swapped in."""
    return published(_models(config, tokenizer, device, dtype)[0], way)


def _forget() -> None:
    """Let go of caches, graphs and further copies of weights; the two models stay, which all ways of a case share."""
    _eight_bits.cache_clear()
    _reference.cache_clear()
    for model in _made:
        model.forget_captures()


def _generate(name: str, config: VARConfig, tokenizer: VQVAEConfig, batch: int, small: bool) -> Case:
    dtype = torch.float32 if small else torch.float16
    lengths, rows = config.lengths, 2 * batch
    total, dim = sum(lengths), config.dim
    products = config.depth * dim * dim * (4 + 2 * round(config.mlp_ratio)) + dim * config.num_codes
    conditions = dim * dim * (6 if config.shared_adaln else 6 * config.depth) + 2 * dim * dim
    with torch.device("meta"):
        decoder = sum(p.numel() for p in VQVAE(tokenizer).decoder.parameters())
    seen = sum(sum(lengths[: i + 1]) for i in range(len(lengths)))
    cached = 2 * config.depth * rows * dim * (sum(lengths[:-1]) + seen)
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    flops = 2 * rows * total * products + 4 * config.depth * rows * dim * pairs

    def make(seed: int, device: torch.device) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)
        labels = torch.randint(config.num_classes, (batch,), device=device, generator=generator)
        return {"labels": labels, "seed": seed}

    def ours(graphs: bool, form: str = "") -> Callable[[dict[str, Any]], Callable[[], object]]:
        def bind(one: dict[str, Any]) -> Callable[[], object]:
            where = (config, tokenizer, one["labels"].device, dtype)
            model = _eight_bits(*where, form) if form else _models(*where)[1]

            def call() -> object:
                codes, pictures = model._draw(
                    "generate", one["labels"], CFG, TOP_K, TOP_P, one["seed"], False, None, graphs, paints=True
                )
                return *codes, pictures

            return call

        return bind

    def reference(way: str) -> Callable[[dict[str, Any]], Callable[[], object]]:
        def bind(one: dict[str, Any]) -> Callable[[], object]:
            labels = one["labels"]
            model = _reference(config, tokenizer, labels.device, dtype, way)

            def call() -> object:
                model.drawn = []
                with torch.autocast(labels.device.type, torch.float16, enabled=not small):
                    pictures = model.autoregressive_infer_cfg(batch, labels, one["seed"], CFG, TOP_K, TOP_P)
                return *model.drawn, 2 * pictures - 1

            return call

        return bind

    def check(one: dict[str, Any]) -> Check:
        model = _models(config, tokenizer, one["labels"].device, dtype)[0]
        ours_alone = ours(False)(one)

        def agree(variant: Variant, output: object) -> None:
            assert isinstance(output, tuple)
            *codes, pictures = output
            side = config.sizes[-1][0] * 16
            if pictures.shape != (batch, 3, side, side) or not pictures.isfinite().all():
                raise ValueError(f"wrong pictures: {tuple(pictures.shape)}")
            if not codes:  # ours swapped in gives pictures alone: those that ours draws, but for the decoder
                wanted = ours_alone()[-1].float() / 127.5 - 1  # type: ignore[index]
                error = (pictures - wanted).abs().mean().item()
                if not error < 0.02:
                    raise ValueError(f"wrong pictures: {error:.3g} from ours on average")
                return
            share = _agreement(model, one["labels"], one["seed"], codes)
            if share < 0.95:
                raise ValueError(f"wrong codes: {share:.1%} are those of the float32 model")

        return agree

    variants = [Variant(OURS, "ours", ours(True))]
    if not small:
        variants.append(Variant(f"{OURS} without graphs", "backend", ours(False)))
        variants += [Variant(f"{OURS}, {form} weights", "backend", ours(True, form)) for form in ("int8", "fp8")]
        variants.append(Variant("published, blocks under torch.compile", "peer", reference("compiled")))
    variants.append(Variant("published, accelerated", "backend", reference("swapped")))
    variants.append(Variant("published", "peer", reference("as it is")))
    return Case(
        name=f"var-{name}/generate-b{batch}",
        shape={"B": batch, "C": dim, "L": total, "depth": config.depth},
        dtype=dtype,
        bytes=dtype.itemsize * (len(lengths) * products + conditions + decoder + cached)
        + 8 * rows * total * config.num_codes,
        flops=flops,
        make=make,
        variants=variants,
        check=check,
        backend=lambda one: "eager" if small else "triton",  # of attention, the one operator with a single choice
        on_matrix_units=True,
        rounds=(10 if batch == 1 else 5, 200),  # published, many pictures take a second
        apart=batch > 1,  # every way has a cache, .1 GB a row at d30 and .4 at d36, beside what its decoder needs
        release=_forget,
    )


@torch.no_grad()
def _agreement(model: VAR, labels: Tensor, seed: int, codes: list[Tensor]) -> float:
    """The share of codes that the model draws itself, each scale after the earlier ones of `codes`."""
    config, generator = model.config, torch.Generator(labels.device).manual_seed(seed)
    same, counted = 0, 0
    for begin in range(0, len(labels), 8):  # noise is drawn for all rows at once, logits for a few
        part = slice(begin, begin + 8)
        generator.manual_seed(seed)
        given = [one[part] for one in codes]
        none = [config.num_classes] * len(given[0])
        wanted, empty = (model.teacher_forced(one, given) for one in (labels[part], none))
        at = 0
        for step, length in enumerate(config.lengths):
            shape = (len(labels), length, config.num_codes)
            noise = torch.empty(shape, device=labels.device).exponential_(generator=generator)[part]
            both = torch.cat((wanted[:, at : at + length], empty[:, at : at + length]))
            guidance = 1 + CFG * step / (len(config.lengths) - 1)
            found = sample_codes(both, guidance=guidance, top_k=TOP_K, top_p=TOP_P, noise=noise, backend="eager")
            same, counted, at = same + int((found == given[step]).sum()), counted + found.numel(), at + length
    return same / counted


# ---- a product with weights of 8 bits --------------------------------------------------------------------------------


def _linear(name: str, layer: str, rows: int, outputs: int, inputs: int, form: str, small: bool) -> Case:
    """Weights of 8 bits against the same product with weights of 16: twice the bytes, and rounded no further."""
    dtype = torch.float32 if small else torch.bfloat16

    def make(seed: int, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, weight, bias = (
            torch.randn(size, device=device, generator=generator)
            for size in ((rows, inputs), (outputs, inputs), outputs)
        )
        entries, scale = quantize_rows(weight / math.sqrt(inputs), form)
        wide = (entries.float() * scale[:, None]).to(dtype)
        return {"x": x.to(dtype), "weight": entries, "scale": scale, "bias": bias.to(dtype), "wide": wide}

    def ours(backend: str) -> Callable[[dict[str, Tensor]], Callable[[], object]]:
        keys = ("x", "weight", "scale", "bias")
        return lambda one: lambda: linear_8bit(*(one[key] for key in keys), backend=backend)

    def dense(one: dict[str, Tensor]) -> Callable[[], object]:
        return lambda: F.linear(one["x"], one["wide"], one["bias"])

    def check(one: dict[str, Tensor]) -> Check:
        x, scale, bias = (one[key].double() for key in ("x", "scale", "bias"))
        oracle = x @ (one["weight"].float().double() * scale[:, None]).T + bias
        eager = linear_8bit(one["x"], one["weight"], one["scale"], one["bias"], backend="eager")
        return against([oracle], [eager], peer_tolerance=2e-2)

    def backend(one: dict[str, Tensor]) -> str:
        return registry["linear_8bit"].choose("auto", one["x"], one["weight"], one["scale"], one["bias"]).name

    variants = [Variant(OURS, "ours", ours("auto"))]
    if not small:
        variants += [Variant(f"{OURS} {name}", "backend", ours(name)) for name in ("triton", "eager")]
    variants.append(Variant("F.linear, 16 bits", "peer", dense))
    return Case(
        name=f"var-{name}/{layer}-{form}-m{rows}",
        shape={"M": rows, "N": outputs, "K": inputs},
        dtype=dtype,
        bytes=outputs * inputs + 4 * outputs + dtype.itemsize * (rows * (inputs + outputs) + outputs),
        flops=2 * rows * outputs * inputs,
        make=make,
        variants=variants,
        check=check,
        backend=backend,
        on_matrix_units=True,
    )


# ---- the norm --------------------------------------------------------------------------------------------------------


def _norm(name: str, batch: int, length: int, width: int, small: bool) -> Case:
    """A gate, a residual and the next norm: tokens in float32, what is added and what comes out in half precision."""
    dtype = torch.float32 if small else torch.float16
    elements = batch * length * width

    def make(seed: int, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, branch = torch.randn(2, batch, length, width, device=device, generator=generator)
        six = torch.randn(batch, 6, width, device=device, generator=generator).to(dtype)
        given = {"x": x, "branch": branch.to(dtype)}
        return {**given, "scale": six[:, 2], "shift": six[:, 4], "gate": six[:, 0]}

    def ours(backend: str) -> Callable[[dict[str, Tensor]], Callable[[], object]]:
        return lambda one: lambda: modulated_norm(**one, dtype=dtype, backend=backend)  # type: ignore[call-overload]

    def formula(x: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        x = x + branch * gate[:, None]
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return (normed * (1 + scale[:, None]) + shift[:, None]).to(branch.dtype), x

    def peer(function: Callable[..., object]) -> Callable[[dict[str, Tensor]], Callable[[], object]]:
        return lambda one: lambda: function(**one)

    def check(one: dict[str, Tensor]) -> Check:
        oracle = formula(**{key: value.double() for key, value in one.items()})
        eager = modulated_norm(**one, dtype=dtype, backend="eager")  # type: ignore[call-overload]
        return against(list(oracle), list(eager), peer_tolerance=2e-2)

    def backend(one: dict[str, Tensor]) -> str:
        tensors = [one[key] for key in ("x", "branch", "gate", "scale", "shift")]
        return registry["gated_modulated_norm"].choose("auto", *tensors, 1e-6, dtype, None).name

    variants = [Variant(OURS, "ours", ours("auto"))]
    if not small:
        variants += [Variant(f"{OURS} {name}", "backend", ours(name)) for name in ("triton", "eager")]
        variants.append(Variant("torch.compile", "peer", peer(torch.compile(formula, dynamic=False))))
    variants.append(Variant("published", "peer", peer(formula)))
    return Case(
        name=f"var-{name}/norm-b{batch}",
        shape={"B": batch, "L": length, "C": width},
        dtype=dtype,
        bytes=elements * (4 + 4 + 2 * dtype.itemsize) + 3 * batch * width * dtype.itemsize,
        flops=12 * elements,
        make=make,
        variants=variants,
        check=check,
        backend=backend,
    )
