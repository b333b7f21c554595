"""Cases of whole models: VAR's decoder, from sums of codes to pictures, and the group norm that stands in it 39 times.

Weights are random; a decoder's time does not depend on them. Operations are those of convolutions and attention. Least
traffic of the decoder: its weights once in half precision, the sums, the pictures; of the norm: x twice (its moments
come first), the output once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench._case import OURS, Case, Variant, against
from bench._time import captured
from unifiedar.models import VQVAE, VQVAEConfig
from unifiedar.ops import group_norm, registry

__all__ = ["cases"]

PUBLISHED = VQVAE.configs["vae_ch160v4096z32"]
SMALL = replace(PUBLISHED, network=replace(PUBLISHED.network, ch=32, resolution=64, attn_resolutions=(4,)), scales=(4,))
VARIABLE = "UNIFIEDAR_BACKEND"

NormInputs = tuple[Tensor, Tensor, Tensor]
"""x (B, C, H, W), weight and bias (C,)."""


def cases(device: torch.device) -> list[Case]:
    """One picture, 8 and 64 at 256 x 256; on the CPU one, at 64 x 64 and a fifth of the channels, in float32."""
    if device.type != "cuda":
        return [_decode(SMALL, 1, torch.float32, True), _norm(1, 32, 64, torch.float32, True)]
    found = [_decode(PUBLISHED, batch, torch.float16, False) for batch in (1, 8, 64)]
    sizes = ((1, 160, 256), (64, 160, 256), (64, 640, 16))
    return found + [_norm(batch, channels, side, torch.float16, False) for batch, channels, side in sizes]


@contextmanager
def _forced(backend: str) -> Iterator[None]:
    """Every operator that has this backend uses it."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


# ---- the decoder -----------------------------------------------------------------------------------------------------


@functools.cache
def _models(config: VQVAEConfig, dtype: torch.dtype, device: torch.device) -> tuple[VQVAE, VQVAE]:
    """In float32 as published, and the same with the fast decoder."""
    torch.manual_seed(0)
    with torch.device(device):
        plain, fast = (VQVAE(config).eval().requires_grad_(False) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    return plain, fast.fast_decoder(dtype)


def _decode(config: VQVAEConfig, batch: int, dtype: torch.dtype, small: bool) -> Case:
    channels, side = config.dim, config.network.resolution // config.network.downsampling
    size = config.network.resolution
    with torch.device("meta"):
        model = VQVAE(config).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model.fhat_to_img(torch.empty(batch, channels, side, side))
    weights = sum(p.numel() for part in (model.decoder, model.post_quant_conv) for p in part.parameters())
    moved = dtype.itemsize * (weights + batch * 3 * size**2) + 4 * batch * channels * side**2

    def make(seed: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(batch, channels, side, side, device=device, generator=generator)

    def ours(features: Tensor) -> Callable[[], object]:
        fast = _models(config, dtype, features.device)[1]
        return lambda: fast.fhat_to_img(features)

    def forced(backend: str) -> Callable[[Tensor], Callable[[], object]]:
        def bind(features: Tensor) -> Callable[[], object]:
            call = ours(features)

            def run() -> object:
                with _forced(backend):
                    return call()

            return run

        return bind

    def graph(features: Tensor) -> Callable[[], object]:
        return captured(forced("triton")(features))

    def published(compiled: bool) -> Callable[[Tensor], Callable[[], object]]:
        def bind(features: Tensor) -> Callable[[], object]:
            plain = _models(config, dtype, features.device)[0]
            state = {name: value.detach() for name, value in plain.state_dict().items()}
            formula = torch.compile(_published, dynamic=False) if compiled else _published

            def call() -> object:
                with torch.autocast(features.device.type, torch.float16, enabled=not small):
                    return formula(features, state, config)

            return call

        return bind

    def check(features: Tensor) -> Any:
        plain = _models(config, dtype, features.device)[0]
        state = {name: value.double() for name, value in plain.state_dict().items() if value.is_floating_point()}
        # A few pictures at a time: in float64 a map of 160 channels takes 84 MB a picture.
        oracle = torch.cat([_published(part.double(), state, config) for part in features.split(8)])
        with _forced("eager"):
            eager = ours(features)()
        assert isinstance(eager, Tensor)
        return against([oracle], [eager], peer_tolerance=2e-2)

    def backend(features: Tensor) -> str:
        fast = _models(config, dtype, features.device)[1]
        norm = fast.decoder.norm_out
        like = features.new_empty((batch, norm.num_channels, 1, 1), dtype=dtype)
        return (
            registry["group_norm"]
            .choose("auto", like, norm.weight, norm.bias, None, norm.num_groups, norm.eps, True)
            .name
        )

    variants = [Variant(OURS, "ours", ours)]
    if not small:
        variants += [Variant(f"{OURS} {name}", "backend", forced(name)) for name in ("triton", "eager")]
        variants.append(Variant(f"{OURS} triton, in a CUDA graph", "backend", graph))
        variants.append(Variant("published code, torch.compile", "peer", published(True)))
    variants.append(Variant("published code", "peer", published(False)))
    return Case(
        name=f"var-vae/decode-b{batch}",
        shape={"B": batch, "C": channels, "H": side, "W": side},
        dtype=dtype,
        bytes=moved,
        flops=counter.get_total_flops(),
        make=make,
        variants=variants,
        check=check,
        backend=backend,
        on_matrix_units=True,
    )


def _published(features: Tensor, state: dict[str, Tensor], config: VQVAEConfig) -> Tensor:
    """What VAR's published decoder launches, in its order: (B, C, h, w) to pictures in [-1, 1]."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def block(x: Tensor, name: str) -> Tensor:
        h = conv(F.silu(norm(x, f"{name}.norm1"), inplace=True), f"{name}.conv1")
        h = conv(F.silu(norm(h, f"{name}.norm2"), inplace=True), f"{name}.conv2")
        return (conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in state else x) + h

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = conv(norm(x, f"{name}.norm"), f"{name}.qkv").flatten(2).chunk(3, dim=1)
        weights = torch.bmm(q.mT.contiguous(), k.contiguous()).mul_(x.shape[1] ** -0.5).softmax(2)
        attended = torch.bmm(v.contiguous(), weights.mT.contiguous())
        return x + conv(attended.view_as(x), f"{name}.proj_out")

    x = conv(conv(features, "post_quant_conv"), "decoder.conv_in")
    x = attention(block(x, "decoder.mid.block_1"), "decoder.mid.attn_1")
    x = block(x, "decoder.mid.block_2")
    for level in reversed(range(len(config.network.ch_mult))):
        for i in range(config.network.num_res_blocks + 1):
            x = block(x, f"decoder.up.{level}.block.{i}")
            if f"decoder.up.{level}.attn.{i}.qkv.weight" in state:
                x = attention(x, f"decoder.up.{level}.attn.{i}")
        if level:
            x = conv(F.interpolate(x, scale_factor=2, mode="nearest"), f"decoder.up.{level}.upsample.conv")
    return conv(F.silu(norm(x, "decoder.norm_out"), inplace=True), "decoder.conv_out").clamp_(-1, 1)


# ---- the norm --------------------------------------------------------------------------------------------------------


def _norm(batch: int, channels: int, side: int, dtype: torch.dtype, small: bool) -> Case:
    elements = batch * channels * side**2

    def make(seed: int, device: torch.device) -> NormInputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(batch, side, side, channels, device=device, generator=generator).to(dtype)
        weight, bias = (torch.randn(channels, device=device, generator=generator).to(dtype) for _ in range(2))
        return x.permute(0, 3, 1, 2), weight, bias

    def ours(backend: str) -> Callable[[NormInputs], Callable[[], object]]:
        return lambda one: lambda: group_norm(*one, 32, silu=True, backend=backend)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    def peer(formula: Callable[..., Tensor], nchw: bool) -> Callable[[NormInputs], Callable[[], object]]:
        def bind(one: NormInputs) -> Callable[[], object]:
            x = one[0].contiguous() if nchw else one[0]
            return lambda: formula(x, *one[1:])

        return bind

    def check(one: NormInputs) -> Any:
        # By pictures: in float64 the largest map takes 5.4 GB.
        oracle = torch.cat([torchs(x.double(), *(p.double() for p in one[1:])).float() for x in one[0].split(1)])
        return against([oracle], [group_norm(*one, 32, silu=True, backend="eager")], peer_tolerance=2e-2)

    variants = [Variant(OURS, "ours", ours("auto"))]
    if not small:
        variants += [Variant(f"{OURS} {name}", "backend", ours(name)) for name in ("triton", "eager")]
        variants.append(Variant("torch.compile", "peer", peer(torch.compile(torchs, dynamic=False), False)))
        variants.append(Variant("F.group_norm, F.silu, not channels-last", "peer", peer(torchs, True)))
    variants.append(Variant("F.group_norm, F.silu", "peer", peer(torchs, False)))
    return Case(
        name=f"group-norm/b{batch}-c{channels}-{side}",
        shape={"B": batch, "C": channels, "H": side, "W": side},
        dtype=dtype,
        bytes=dtype.itemsize * (3 * elements + 2 * channels),
        flops=10 * elements,
        make=make,
        variants=variants,
        check=check,
        backend=lambda one: registry["group_norm"].choose("auto", *one, None, 32, 1e-6, True).name,
    )
