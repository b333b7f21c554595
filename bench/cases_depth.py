"""Cases of the family `depth`: all codes of a position by published depth transformers, on random weights.

`<model>/r<rows>`: so many rows, half of them unconditional (guidance 3, top-k 900, top-p 0.96, as VILA-U draws; one row
is without guidance), in bfloat16, with noise given. `width-1024` is a head of 98 M weights; `rq-1.4b` and `rq-3.8b` are
the heads of RQ-Transformer's ImageNet models. Least traffic: every weight that a depth needs, once a depth. The weights
are the same in all input sets: they are larger than the cache.

`qwen3-tts-0.6b/r<rows>` is the code predictor of that speech model's size: 5 layers, 15 codes of a frame, no guidance,
temperature .9, top-k 50.

Peers: the published way (no cache, the whole prefix at each depth), our definition (a cache; it is also the backend
"eager"), that in a CUDA graph, and that under torch.compile, which takes minutes for 15 or 16 codes: cases of so many
have it at one and two rows only. The backend "triton" is a few launches a layer, which the module captures itself; "no
graph" is the same without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._case import OURS, Case, Check, Variant
from bench._time import captured
from unifiedar.nn import DepthStyle, DepthTransformer
from unifiedar.ops import residual_lookup, sample_codes
from unifiedar.ops.depth import served_by

__all__ = ["cases"]

SETTINGS: dict[str, Any] = {"top_k": 900, "top_p": 0.96}
GUIDANCE = 3.0
ROWS = (1, 2, 8, 16, 64)

Inputs = dict[str, Any]
"""module; hidden (rows, hidden_dim); codebook (K, C); noise (positions, D, K), half as many positions as rows with
guidance; guidance or None; weights, the module's tensors."""


@dataclass(frozen=True)
class Model:
    """A depth transformer's sizes; hidden_dim None is a state that enters as it is."""

    name: str
    hidden_dim: int | None
    code_dim: int
    dim: int
    num_layers: int
    num_heads: int
    depth: int
    num_codes: int

    def streamed(self) -> int:
        """Numbers that decoding a position reads."""
        block = 12 * self.dim**2 + 13 * self.dim
        each = self.num_layers * block + (self.num_codes + 2) * self.dim + self.num_codes + self.dim
        first = 0 if self.hidden_dim is None else (self.hidden_dim + 1) * self.dim
        return self.depth * each + (self.depth - 1) * (self.code_dim + 1) * self.dim + first


MODELS = (
    Model("width-1024", 4096, 1024, 1024, 6, 16, 4, 16384),
    Model("vila-u-256", 4096, 1024, 2560, 6, 40, 4, 16384),
    Model("vila-u-384", 4096, 1152, 2560, 6, 40, 16, 16384),
    Model("rq-1.4b", None, 256, 1536, 6, 24, 4, 16384),
    Model("rq-3.8b", None, 256, 2560, 6, 40, 4, 16384),
)


@dataclass(frozen=True)
class Speech:
    """Sizes of a code predictor like Qwen3-TTS's; its talker is as wide as it is."""

    name: str
    dim: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    depth: int
    num_codes: int

    def streamed(self) -> int:
        """Numbers that decoding a frame reads: the blocks once for each code, each head once."""
        attention = (2 * self.num_heads + 2 * self.kv_heads) * self.head_dim * self.dim
        block = attention + 3 * self.mlp_dim * self.dim + 2 * self.dim + 2 * self.head_dim
        return self.depth * (self.num_layers * block + (self.num_codes + 1) * self.dim)


QWEN3_TTS = Speech("qwen3-tts-0.6b", 1024, 5, 16, 8, 128, 3072, 15, 2048)
FRAME: dict[str, Any] = {"temperature": 0.9, "top_k": 50}


def cases(device: torch.device) -> list[Case]:
    """Every model and number of rows; on the CPU narrow ones of two layers, so that it takes seconds."""
    if device.type == "cuda":
        # 32 rows are the most that one launch of the CUDA kernel takes.
        counts = {"width-1024": (*ROWS, 32), "vila-u-256": (*ROWS, 32)}
        found = [_case(model, rows, device) for model in MODELS for rows in sorted(counts.get(model.name, ROWS))]
        return found + [_speech_case(QWEN3_TTS, rows, device) for rows in sorted((*ROWS, 32))]
    narrow = Model("narrow", 128, 32, 128, 2, 2, 4, 1024)
    speech = Speech("narrow-speech", 64, 2, 2, 1, 32, 96, 3, 256)
    return [_case(narrow, 1, device), _case(narrow, 2, device), _speech_case(speech, 2, device)]


def _peers(
    formula: Callable[[Inputs], tuple[Tensor, Tensor]], model: Model | Speech, rows: int, device: torch.device
) -> list[Variant]:
    """The published formula with a cache of keys and values: as it is, on a GPU also in a graph and, unless that takes
    minutes, compiled."""
    plain = Variant("depth cache", "peer", lambda inputs: lambda: formula(inputs))
    if device.type != "cuda":
        return [plain]
    peers = [Variant("depth cache, CUDA graph", "peer", lambda inputs: captured(lambda: formula(inputs)))]
    if rows <= 2 or model.depth <= 8:
        compiled = torch.compile(formula, dynamic=False)
        peers.append(Variant("depth cache, torch.compile", "peer", lambda inputs: lambda: compiled(inputs)))
    return [*peers, plain]


def _backend(inputs: Inputs) -> str:
    """What "auto" takes: a module packs its weights itself."""
    return served_by(inputs["hidden"], inputs["codebook"], inputs["module"].weights())


@functools.lru_cache(maxsize=1)  # of one model at a time: the largest are 1 GB
def _module(model: Model, device: torch.device) -> tuple[DepthTransformer, Tensor]:
    torch.manual_seed(0)
    with torch.device(device):
        module = DepthTransformer(
            model.hidden_dim, model.code_dim, model.dim, model.num_layers, model.num_heads, model.depth, model.num_codes
        )
        codebook = torch.randn(model.num_codes, model.code_dim).bfloat16()
    with torch.no_grad():
        module.classifier_mlp.linear.weight.mul_(5)  # logits as spread out as a trained head's
    return module.bfloat16().eval().requires_grad_(False), codebook


def _case(model: Model, rows: int, device: torch.device) -> Case:
    small = device.type != "cuda"
    count, guidance = (rows, None) if rows % 2 else (rows // 2, GUIDANCE)

    def make(seed: int, device: torch.device) -> Inputs:
        module, codebook = _module(model, device)
        generator = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(rows, model.hidden_dim or model.dim, device=device, generator=generator)
        noise = torch.empty(count, model.depth, model.num_codes, device=device).exponential_(generator=generator)
        given = {"hidden": hidden.bfloat16(), "codebook": codebook, "noise": noise, "guidance": guidance}
        return {"module": module, "weights": list(module.parameters()), **given}

    def decode(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
        rest = {key: inputs[key] for key in ("codebook", "noise", "guidance")}
        found = inputs["module"].decode(inputs["hidden"], **rest, **SETTINGS, backend=backend)
        return found.codes, found.total

    def variant(name: str, role: str, backend: str) -> Variant:
        return Variant(name, role, lambda inputs: lambda: decode(inputs, backend))

    variants = [variant(OURS, "ours", "auto")]
    if not small:
        variants += [variant(f"{OURS} {name}", "backend", name) for name in ("cuda", "triton", "eager")]
    variants += _peers(_cached, model, rows, device)
    variants.append(Variant("published code", "peer", lambda inputs: lambda: _published(inputs)))

    return Case(
        name=f"{model.name}/r{rows}",
        shape={"R": rows, "W": model.dim, "D": model.depth, "K": model.num_codes, "C": model.code_dim},
        dtype=torch.bfloat16,
        bytes=2 * model.streamed() + 4 * count * model.depth * model.num_codes,
        flops=2 * rows * model.streamed(),
        make=make,
        variants=variants,
        check=_check,
        backend=_backend,
    )


@functools.lru_cache(maxsize=1)
def _speech_module(model: Speech, device: torch.device) -> tuple[DepthTransformer, Tensor]:
    style = DepthStyle(
        norm="rms", eps=1e-6, bias=False, activation="silu", gated=True, mlp_dim=model.mlp_dim, head_dim=model.head_dim,
        kv_heads=model.kv_heads, qk_norm=True, learned_positions=False, rope=1e6, state="before", last_code=True,
        heads_per_depth=True,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = (None, None, model.dim, model.num_layers, model.num_heads, model.depth, model.num_codes)
    with torch.device(device):
        module = DepthTransformer(*sizes, style=style)
        codebook = torch.randn(model.depth, model.num_codes, model.dim).bfloat16()
    with torch.no_grad():
        module.classifier_mlp.linear.weight.mul_(5)
    return module.bfloat16().eval().requires_grad_(False), codebook


def _speech_case(model: Speech, rows: int, device: torch.device) -> Case:
    def make(seed: int, device: torch.device) -> Inputs:
        module, codebook = _speech_module(model, device)
        generator = torch.Generator(device).manual_seed(seed)
        hidden, start = torch.randn(2, rows, model.dim, device=device, generator=generator).bfloat16()
        noise = torch.empty(rows, model.depth, model.num_codes, device=device).exponential_(generator=generator)
        return {"module": module, "hidden": hidden, "start": start, "codebook": codebook, "noise": noise}

    def decode(inputs: Inputs, backend: str, graphs: bool = True) -> tuple[Tensor, Tensor]:
        rest = {key: inputs[key] for key in ("codebook", "start", "noise")}
        found = inputs["module"].decode(inputs["hidden"], **rest, **FRAME, backend=backend, graphs=graphs)
        return found.codes, found.total

    variants = [Variant(OURS, "ours", lambda inputs: lambda: decode(inputs, "auto"))]
    if device.type == "cuda":
        eager = Variant(f"{OURS} eager, CUDA graph", "backend", lambda i: captured(lambda: decode(i, "eager")))
        graph = Variant(f"{OURS} triton", "backend", lambda inputs: lambda: decode(inputs, "triton"))
        plain = Variant(f"{OURS} triton, no graph", "backend", lambda i: lambda: decode(i, "triton", False))
        variants += [eager, graph, plain]
    variants += _peers(_framed, model, rows, device)

    return Case(
        name=f"{model.name}/r{rows}",
        shape={"R": rows, "W": model.dim, "D": model.depth, "K": model.num_codes, "C": model.dim},
        dtype=torch.bfloat16,
        bytes=2 * model.streamed() + 4 * rows * model.depth * model.num_codes,
        flops=2 * rows * model.streamed(),
        make=make,
        variants=variants,
        check=_check_frame,
        backend=_backend,
    )


def _check_frame(inputs: Inputs) -> Check:
    """As `_check`, for a frame of a speech model."""
    module, codebook, noise = inputs["module"], inputs["codebook"], inputs["noise"]

    def check(variant: Variant, output: object) -> None:
        assert isinstance(output, tuple)
        codes, total = output
        with torch.no_grad():
            logits = module(inputs["hidden"], module.running_sums(codes, codebook), inputs["start"])
        want = torch.stack([sample_codes(logits[:, d], noise=noise[:, d], **FRAME) for d in range(module.depth)], 1)
        differ = int((codes != want).sum())
        if differ > codes.numel() / 5 + 1:
            raise ValueError(f"wrong result: {differ} of {codes.numel()} codes differ")
        _check_total(total, residual_lookup(codes, codebook), module.depth)

    return check


@torch.no_grad()
def _framed(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A step at a time with keys and values kept, as plain modules, and a draw by topk and a race."""
    module, codebook, noise = inputs["module"], inputs["codebook"], inputs["noise"]
    x, codes = torch.stack([inputs["hidden"], inputs["start"]], 1), []
    stack, head, begin = module.head_transformer, module.classifier_mlp, 0
    cache, total = stack.cache(x, module.depth + 1), torch.zeros_like(inputs["start"])
    for d in range(module.depth):
        y = stack(x, cache, begin)[:, -1]
        scores = F.linear(head.layer_norm(y), head.linear.weight[d]).float() / FRAME["temperature"]
        kth = scores.topk(FRAME["top_k"], dim=-1).values[:, -1:]
        codes.append((scores.masked_fill(scores < kth, -torch.inf).softmax(-1) / noise[:, d]).argmax(-1))
        chosen = codebook[d][codes[-1]]
        total = total + chosen
        begin, x = begin + x.shape[1], chosen.unsqueeze(1)
    return torch.stack(codes, 1), total


def _check(inputs: Inputs) -> Check:
    """Each code is what the definition draws after those before it, but for one in five: so many draws at guidance 3
    turn on the half-precision roundings of the definition's own states, of which the kernel has none."""
    module, codebook, hidden, noise = (inputs[key] for key in ("module", "codebook", "hidden", "noise"))
    cuts = {**SETTINGS, "guidance": inputs["guidance"]}

    def check(variant: Variant, output: object) -> None:
        assert isinstance(output, tuple)
        codes, total = output
        sums = residual_lookup(codes, codebook, cumulative=True)
        with torch.no_grad():
            logits = module(hidden, _each_row(inputs, sums))
        want = torch.stack([sample_codes(logits[:, d], noise=noise[:, d], **cuts) for d in range(codes.shape[1])], 1)
        differ = int((codes != want).sum())
        if differ > codes.numel() / 5 + 1:
            raise ValueError(f"wrong result: {differ} of {codes.numel()} codes differ")
        _check_total(total, sums[:, -1], codes.shape[1])

    return check


def _check_total(total: Tensor, want: Tensor, depth: int) -> None:
    """Sums of `depth` normal numbers in bfloat16, in another order: each rounds what is below 16 by up to .03."""
    if (total.float() - want.float()).abs().max() > 0.031 * depth:
        raise ValueError("wrong result: total is not the sum of the codes' embeddings")


def _each_row(inputs: Inputs, positions: Tensor) -> Tensor:
    """What belongs to positions, for their rows: with guidance those without condition come after all others."""
    return positions if inputs["guidance"] is None else torch.cat([positions, positions])


@torch.no_grad()
def _cached(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A step at a time with keys and values kept, as plain modules."""
    module, codebook, noise = inputs["module"], inputs["codebook"], inputs["noise"]
    x, codes = module.in_mlp_2(inputs["hidden"]), []
    total = codebook.new_zeros(len(noise), codebook.shape[1])
    cache = module.head_transformer.cache(x, module.depth)
    for d in range(module.depth):
        x = module.head_transformer((x + module.pos_emb_d[:, d]).unsqueeze(1), cache, d)
        codes.append(_draw(module.classifier_mlp(x[:, 0]), noise[:, d], inputs["guidance"]))
        total = total + codebook[codes[-1]]
        x = module.in_mlp_1(_each_row(inputs, total))
    return torch.stack(codes, 1), total


@torch.no_grad()
def _published(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """As VILA-U does it: at each depth everything before it once more."""
    module, codebook, noise = inputs["module"], inputs["codebook"], inputs["noise"]
    head = module.in_mlp_2(inputs["hidden"]).unsqueeze(1)
    sums: list[Tensor] = []
    codes: list[Tensor] = []
    for d in range(module.depth):
        x = torch.cat([head, module.in_mlp_1(_each_row(inputs, torch.stack(sums, 1)))], 1) if sums else head
        x = module.head_transformer(x + module.pos_emb_d[:, : d + 1])
        codes.append(_draw(module.classifier_mlp(x[:, -1]), noise[:, d], inputs["guidance"]))
        chosen = codebook[codes[-1]]
        sums.append(sums[-1] + chosen if sums else chosen)
    return torch.stack(codes, 1), sums[-1]


def _draw(logits: Tensor, noise: Tensor, guidance: float | None) -> Tensor:
    """Guidance, top-k by topk, top-p by a whole sort, and a race: no wait for the host."""
    if guidance is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (conditional - unconditional) * guidance
    scores = logits.float()
    kth = scores.topk(SETTINGS["top_k"], dim=-1).values[:, -1:]
    p = scores.masked_fill(scores < kth, -torch.inf).softmax(-1)
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    beyond = (ordered.cumsum(-1) >= SETTINGS["top_p"]).roll(1, -1)
    beyond[:, 0] = False
    p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0)
    return (p / noise).argmax(-1)
