"""Cases of VAR's training step: forward, loss, and the gradients of all weights, under autocast to bfloat16.

Nothing is dropped, so that all ways compute the same; gates are open, so that every weight has a gradient. Weights are
float32, as the published trainer keeps them. Operations are those of products, three times, and of attention over
visible pairs, three and a half times; least traffic: weights read for the forward and the backward, gradients written.
The table's extra memory is what a step needs beside weights and gradients; a graph's was taken when it was captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench._case import OURS, Case, Check, Variant
from bench.published import published
from unifiedar import engine
from unifiedar.models import VAR, VQVAE, VARConfig, VQVAEConfig
from unifiedar.ops import registry

__all__ = ["step"]

LOOKED_AT = ("word_embed.weight", "blocks.0.attn.mat_qkv.weight", "blocks.1.ffn.fc2.weight", "head.weight")

Inputs = dict[str, Any]
"""labels (B,), what is read before each scale but the first (B, L - 1, C), targets (B, L)."""


@functools.lru_cache(maxsize=1)
def _ours(config: VARConfig, tokenizer: VQVAEConfig, device: torch.device) -> VAR:
    torch.manual_seed(0)
    with torch.device(device):
        model = VAR(replace(config, drop_path=0.0, cond_drop=0.0), VQVAE(tokenizer).eval().requires_grad_(False))
        model.initialize(gate=0.5, head=1.0)
    return model.train()


@functools.lru_cache(maxsize=3)  # one a way
def _model(config: VARConfig, tokenizer: VQVAEConfig, device: torch.device, way: str) -> nn.Module:
    """Ours, or the published one on the same weights: as it is, with compiled blocks, or with ours swapped in."""
    ours = _ours(config, tokenizer, device)
    if way == "ours":
        return ours
    return published(ours, way).train()


def step(name: str, config: VARConfig, tokenizer: VQVAEConfig, batch: int, small: bool) -> Case:
    """The case of so many pictures a step.

    Args:
        name: of the model.
        config: its sizes.
        tokenizer: of any network, with the model's codebook and scales.
        batch: pictures.
        small: float32, without autocast and without what only a GPU is asked for.
    """
    lengths, dim = config.lengths, config.dim
    total = sum(lengths)
    products = config.depth * dim * dim * (4 + 2 * round(config.mlp_ratio)) + dim * config.num_codes
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    with torch.device("meta"):
        weights = sum(p.numel() for p in VAR(config).parameters())

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        options: dict[str, Any] = {"device": device, "generator": generator}
        return {
            "labels": torch.randint(config.num_classes, (batch,), **options),
            "inputs": torch.randn(batch, total - lengths[0], config.code_dim, **options),
            "targets": torch.randint(config.num_codes, (batch, total), **options),
            "weights": list(_ours(config, tokenizer, device).parameters()),  # of every set: no cache holds them
        }

    def variant(name: str, role: str, way: str) -> Variant:
        def bind(one: Inputs) -> Callable[[], object]:
            model = _model(config, tokenizer, one["labels"].device, way)
            names, parameters = zip(*model.named_parameters(), strict=True)

            def call() -> object:
                with torch.autocast(one["labels"].device.type, torch.bfloat16, enabled=not small):
                    logits = model(one["labels"], one["inputs"])
                loss = F.cross_entropy(logits.flatten(0, 1), one["targets"].flatten())
                gradients = torch.autograd.grad(loss, parameters)
                return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}

            return call

        return Variant(name, role, bind)

    eager = variant(OURS, "ours", "ours")

    recorded: list[tuple[Inputs, dict[str, Any], engine.Steps]] = []  # one: it keeps all that a step takes

    def in_a_graph(one: Inputs) -> Callable[[], object]:
        if not recorded:
            fixed = {**one, **{name: one[name].clone() for name in ("labels", "inputs", "targets")}}
            call, kept = eager.bind(fixed), dict[str, Any]()
            recorded.append((fixed, kept, engine.Steps([lambda: kept.update(call())], graphs=True)))  # type: ignore[call-overload]
        fixed, kept, steps = recorded[0]

        def replay() -> object:
            for name in ("labels", "inputs", "targets"):
                fixed[name].copy_(one[name])
            steps.run(0)
            return kept

        return replay

    as_published = variant("published", "peer", "as it is")

    def check(one: Inputs) -> Check:
        """By the norm of a difference: two ways of rounding are compared, through all blocks and back."""
        output = as_published.bind(one)()
        assert isinstance(output, dict)
        wanted = {key: output[key] for key in ("loss", *LOOKED_AT)}
        del output

        def agree(variant: Variant, output: object) -> None:
            assert isinstance(output, dict)
            for key, right in wanted.items():
                error = ((output[key] - right).norm() / right.norm()).item()
                limit = 1e-4 if small else 1e-2 if key == "loss" else 0.05
                if not error <= limit:
                    raise ValueError(f"wrong result: {key} is off by {error:.3g}, allowed {limit:.3g}")

        return agree

    def backend(one: Inputs) -> str:  # of attention
        shape = (batch, config.num_heads, total, dim // config.num_heads)
        q = torch.empty(shape, dtype=torch.float32 if small else torch.bfloat16, device=one["labels"].device)
        return registry["block_causal_attention"].choose("auto", q, q, q, lengths, None, 0, 1.0).name

    variants = [eager]
    if not small:
        variants.append(Variant("unifiedar, in a graph", "backend", in_a_graph))
        variants.append(variant("published, blocks under torch.compile", "peer", "compiled"))
    variants += [variant("published, accelerated", "backend", "swapped"), as_published]
    return Case(
        name=f"var-{name}/train-b{batch}",
        shape={"B": batch, "C": dim, "L": total, "depth": config.depth},
        dtype=torch.float32 if small else torch.bfloat16,
        bytes=3 * 4 * weights,
        flops=6 * batch * total * products + 14 * config.depth * batch * dim * pairs,
        make=make,
        variants=variants,
        check=check,
        backend=backend,
        on_matrix_units=True,
        rounds=(5, 50),
        apart=not small,
        release=recorded.clear,
    )
