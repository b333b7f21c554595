"""Cases of RQ-Transformer as a whole: all codes of pictures of a class by the 1.4 B ImageNet model.

`rq-1.4b/image-b<pictures>`: 64 positions of 4 codes of 16,384, top-p .92 as its configuration has it, random weights; a
line of the report also says codes a second and seconds a picture, beside the published .039 s at batch 100 on an A100,
in float32. Ours is in float16, as the published scripts draw. Checked are the codes, each given those before it that
came out: the float32 model, told those, must draw 95 % of them with the same noise. Least traffic: the body's weights
once a position, the head's once a code, keys and values of earlier positions, the noise once.

Ours replays CUDA graphs of a row of positions; `cuda` is that with the one-launch kernel for the codes of a position.
Peers: the published way, which computes embeddings of all codes so far at each code, copies keys and values to longer
tensors, sorts, and waits for the GPU (float32 with TF32, torch's default of its time); the same work in torch's
kernels, keys and values kept in place, as one CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._case import OURS, Case, Check, Variant
from bench._time import captured
from bench.cases_models import _forced
from unifiedar.models import RQTransformer, RQTransformerConfig
from unifiedar.ops import sample_codes
from unifiedar.ops.depth import served_by

__all__ = ["cases"]

LARGE = RQTransformer.configs["imagenet-1.4b"]
SMALL = replace(
    LARGE, num_codes=128, code_dim=16, grid=(2, 2), dim=64, num_heads=2, body_layers=2, head_layers=2, num_conditions=9
)
PUBLISHED_S = 0.039
"""Seconds a picture of the large model at batch 100 on an A100, by the figure that its authors show."""

Inputs = dict[str, Any]
"""labels (B,); seed of the noise; weights, the model's tensors, which make input sets too large for the cache."""


def cases(device: torch.device) -> list[Case]:
    """One picture, 16 and 100; on the CPU two small ones in float32."""
    if device.type != "cuda":
        return [_image("small", SMALL, 2, True)]
    return [_image("rq-1.4b", LARGE, batch, False) for batch in (1, 16, 100)]


@functools.lru_cache(maxsize=1)
def _models(
    config: RQTransformerConfig, device: torch.device, dtype: torch.dtype
) -> tuple[RQTransformer, RQTransformer, Tensor, Tensor]:
    """In float32, and in `dtype`, each with its code vectors."""
    torch.manual_seed(0)
    with torch.device(device):
        plain, fast = (RQTransformer(config).eval().requires_grad_(False) for _ in range(2))
        table = torch.randn(config.num_codes, config.code_dim)
    plain.head.classifier_mlp.linear.weight.mul_(5)  # logits as spread out as a trained model's
    fast.load_state_dict(plain.state_dict())
    return plain, fast.to(dtype), table, table.to(dtype)


def _noise(config: RQTransformerConfig, batch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """The noise (B, K) of every code in turn, as the published code's generator gives it."""
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(config.grid[0] * config.grid[1] * config.depth):
        yield torch.empty(batch, config.num_codes, device=device).exponential_(generator=generator)


def _rate(config: RQTransformerConfig, batch: int) -> Callable[[float], str]:
    codes = batch * config.grid[0] * config.grid[1] * config.depth

    def text(ms: float) -> str:
        beside = f" (published {PUBLISHED_S})" if config == LARGE else ""
        return f"{codes / ms * 1e3:,.0f} codes/s, {ms / batch / 1e3:.4f} s a picture{beside}"

    return text


def _image(name: str, config: RQTransformerConfig, batch: int, small: bool) -> Case:
    dtype = torch.float32 if small else torch.float16
    length, dim, depth, num_codes = config.grid[0] * config.grid[1], config.dim, config.depth, config.num_codes
    block = 12 * dim**2 + 13 * dim
    body = config.body_layers * block
    head = depth * (config.head_layers * block + (dim + 1) * num_codes) + (depth - 1) * dim * config.code_dim
    cached = 2 * config.body_layers * batch * dim * (length * (length + 1) // 2)
    pairs = 4 * batch * dim * (config.body_layers * length * (length + 1) + config.head_layers * length * depth**2) // 2

    def make(seed: int, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        labels = torch.randint(config.num_conditions, (batch,), device=device, generator=generator)
        return {"labels": labels, "seed": seed, "weights": list(_models(config, device, dtype)[1].parameters())}

    def ours(graphs: bool, backend: str | None = None) -> Callable[[Inputs], Callable[[], object]]:
        def bind(one: Inputs) -> Callable[[], object]:
            device = one["labels"].device
            _, model, _, table = _models(config, device, dtype)
            partial = torch.zeros(batch, *config.grid, depth, dtype=torch.int64, device=device)

            def call() -> object:
                with _forced(backend) if backend else torch.no_grad():
                    generator = torch.Generator(device).manual_seed(one["seed"])
                    return model.sample(
                        partial, table, cond=one["labels"], top_p=config.top_p, generator=generator, graphs=graphs
                    )

            return call

        return bind

    def kernels(one: Inputs) -> Callable[[], object]:
        return _captured(config, one["labels"].device, dtype, batch, not small)(one)

    def published(one: Inputs) -> Callable[[], object]:
        model, _, table, _ = _models(config, one["labels"].device, dtype)

        def call() -> object:
            with torch.no_grad(), _tf32():
                return _published(model, table, one["labels"], one["seed"])

        return call

    def check(one: Inputs) -> Check:
        plain, _, table, _ = _models(config, one["labels"].device, dtype)

        def agree(variant: Variant, output: object) -> None:
            assert isinstance(output, Tensor)
            shape = (batch, *config.grid, depth)
            if output.shape != shape or int(output.min()) < 0 or int(output.max()) >= num_codes:
                raise ValueError(f"wrong codes: {tuple(output.shape)}, {int(output.min())} to {int(output.max())}")
            with torch.no_grad():
                logits = plain(output, table, one["labels"]).codes.flatten(1, 3)
                noise = _noise(config, batch, one["seed"], output.device)
                drawn = [
                    sample_codes(logits[:, i], top_p=config.top_p, noise=given, backend="eager")
                    for i, given in enumerate(noise)
                ]
            share = (torch.stack(drawn, 1) == output.flatten(1)).float().mean().item()
            if share < 0.95:
                raise ValueError(f"wrong codes: {share:.1%} are those of the float32 model")

        return agree

    def backend(one: Inputs) -> str:  # of the head
        _, model, _, table = _models(config, one["labels"].device, dtype)
        return served_by(table.new_empty(batch, dim), table, model.head.weights())

    variants = [Variant(OURS, "ours", ours(True))]
    if not small:
        variants.append(Variant(f"{OURS} cuda", "backend", ours(True, "cuda")))
        if batch == 1:
            variants.append(Variant(f"{OURS} without graphs", "backend", ours(False)))
    variants.append(Variant("torch's kernels" + ("" if small else ", CUDA graph"), "peer", kernels))
    variants.append(Variant("published code", "peer", published))
    return Case(
        name=f"{name}/image-b{batch}",
        shape={"B": batch, "L": length, "D": depth, "W": dim, "K": num_codes},
        dtype=dtype,
        bytes=dtype.itemsize * (length * (body + head) + cached) + 4 * batch * length * depth * num_codes,
        flops=2 * batch * length * (body + head) + pairs,
        make=make,
        variants=variants,
        check=check,
        backend=backend,
        on_matrix_units=True,
        rate=_rate(config, batch),
        rounds=(2, 200),
    )


# ---- torch's kernels in one graph ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _captured(
    config: RQTransformerConfig, device: torch.device, dtype: torch.dtype, batch: int, captures: bool
) -> Callable[[Inputs], Callable[[], object]]:
    """All of a picture in torch's kernels, over fixed memory for what a call brings."""
    _, model, _, table = _models(config, device, dtype)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    steps = config.grid[0] * config.grid[1] * config.depth
    noise = torch.ones(steps, batch, config.num_codes, device=device)
    run: Callable[[], object] = functools.partial(_kernels, model, table, labels, noise)
    if captures:
        replay = captured(run)

        def run() -> object:
            output = replay()
            assert isinstance(output, Tensor)
            return output.clone()

    def bind(one: Inputs) -> Callable[[], object]:
        def call() -> object:
            labels.copy_(one["labels"])
            generator = torch.Generator(device).manual_seed(one["seed"])
            for place in noise:
                place.exponential_(generator=generator)
            return run()

        return call

    return bind


@torch.no_grad()
def _kernels(model: RQTransformer, table: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """A code at a time with the keys and values of body and head kept in place, and a draw by a sort and a race."""
    config, head = model.config, model.head
    x = (model.cond_emb(labels) + model.pos_emb_cond[:, 0]).unsqueeze(1)
    cache = model.body_transformer.cache(x, config.grid[0] * config.grid[1])
    kept = head.head_transformer.cache(x, config.depth)
    codes: list[Tensor] = []
    for position in range(config.grid[0] * config.grid[1]):
        y = model.body_transformer(x, cache, position)[:, 0]
        total = table.new_zeros(len(labels), config.code_dim)
        for d in range(config.depth):
            assert head.pos_emb_d is not None
            y = head.head_transformer((y + head.pos_emb_d[:, d]).unsqueeze(1), kept, d)[:, 0]
            p = _cut(head.classifier_mlp(y).float().softmax(-1), config.top_p)
            codes.append((p / noise[len(codes)]).argmax(-1))
            total = total + table[codes[-1]]
            y = head.in_mlp_1(total)
        places = model.pos_emb_hw[:, position]
        x = (F.linear(total, model.input_mlp.weight, model.input_mlp.bias * config.depth) + places).unsqueeze(1)
    return torch.stack(codes, 1).view(len(labels), *config.grid, config.depth)


def _cut(p: Tensor, top_p: float) -> Tensor:
    ordered, index = p.sort(dim=-1, descending=True)
    beyond = (ordered.cumsum(-1) >= top_p).roll(1, -1)
    beyond[:, 0] = False
    p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
    return p / p.sum(-1, keepdim=True)


# ---- what the published code launches, in its order ------------------------------------------------------------------


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _published(model: RQTransformer, table: Tensor, labels: Tensor, seed: int) -> Tensor:
    config, head = model.config, model.head
    (height, width), depth = config.grid, config.depth
    generator = torch.Generator(labels.device).manual_seed(seed)
    xs = torch.zeros(len(labels), height * width, depth, dtype=torch.int64, device=labels.device)
    body: list[Tensor | None] = [None] * config.body_layers
    top: list[Tensor | None] = []
    state = table
    for at in range(height * width):
        for d in range(depth):
            so_far = xs[:, : (at // width + 1) * width].clone()[:, : at + 1]
            if d == 0:
                e = _embedded(table, so_far)
                x = model.input_mlp(e).sum(-2) + model.pos_emb_hw[:, : at + 1]
                x = torch.cat([(model.cond_emb(labels) + model.pos_emb_cond[:, 0]).unsqueeze(1), x[:, :-1]], 1)
                state = _stack(model.body_transformer, x[:, -1:], body)
                top = [None] * config.head_layers
            sums = head.in_mlp_1(_embedded(table, so_far).cumsum(-2))[:, at]
            assert head.pos_emb_d is not None
            x = torch.cat([state, sums[:, :-1]], 1) + head.pos_emb_d
            logits = head.classifier_mlp(_stack(head.head_transformer, x[:, d : d + 1], top)).flatten(1)
            xs[:, at, d] = _drawn(logits, config.top_p, generator)
    return xs.view(len(labels), height, width, depth)


def _embedded(table: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([F.embedding(one, table) for one in codes.chunk(codes.shape[-1], -1)], -2)


def _stack(stack: Any, x: Tensor, caches: list[Tensor | None]) -> Tensor:
    for i, block in enumerate(stack.blocks):
        x = x + _attention(block.attn, block.ln1(x), stack.num_heads, caches, i)
        x = x + block.mlp(block.ln2(x))
    return x


def _attention(attention: Any, x: Tensor, heads: int, caches: list[Tensor | None], i: int) -> Tensor:
    (batch, length, dim), kept = x.shape, caches[i]
    x = x.transpose(0, 1).contiguous()
    q, k, v = (
        layer(x).view(length, batch * heads, dim // heads).transpose(0, 1)
        for layer in (attention.query, attention.key, attention.value)
    )
    if kept is not None:
        k, v = torch.cat([kept[0], k], 1), torch.cat([kept[1], v], 1)
    caches[i] = torch.stack([k, v])
    scores = torch.bmm(q, k.mT * (dim // heads) ** -0.5)
    seen = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=x.device).tril()
    weights = scores.masked_fill(~seen[None, -length:], -torch.inf).softmax(-1)
    y = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length, batch, dim)
    return attention.proj(y).transpose(0, 1).contiguous()


def _drawn(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    scores = logits.float() / 1.0
    cut = scores.clone()
    cut[cut < scores.topk(scores.shape[-1], dim=-1).values[:, [-1]]] = -torch.inf
    if torch.sum(torch.isnan(cut)):  # waits for the GPU, as it does
        cut[torch.isnan(cut)] = -torch.inf
    return torch.multinomial(_cut(cut.softmax(-1), top_p), 1, generator=generator).view(-1)
