"""The published code of RQ-Transformer and of VILA-U's depth head beside ours, for `python -m unifiedar.accelerate`.

The classes of a checkout are built small, with random weights, and run in float32 beside `models.RQTransformer`,
`nn.DepthTransformer` and what `accelerate` makes of them, from the same states of the random generator. Packages of the
checkout are entered without their own `__init__.py`, so that torch and omegaconf, or transformers, are all it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate import accelerate, restore
from unifiedar.accelerate._check import Finding, differing, exact_products, farthest, imported
from unifiedar.checkpoints import CheckpointError
from unifiedar.models import RQTransformer, RQTransformerConfig
from unifiedar.nn import DepthTransformer

__all__ = ["check_rqtransformer", "check_vilau"]

GRID, DEPTH, WIDTH, HEADS, CODE_DIM, NUM_CODES = (4, 4), 4, 64, 4, 32, 200
CONDITIONS = {"no condition": (1, 1), "classes": (10, 1), "text": (50, 6)}
"""Number of conditions and length of one."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": [100, 50, 20, 200], "top_p": [0.9, 0.8, 0.95, 0.7]},
    {"top_k": 30, "top_p": 0.92, "start_loc": (1, 2)},
)

VILAU_DEPTHS = {"256": 4, "384": 16}
VILAU_SIZES: dict[str, Any] = {
    "hidden_dim": 96, "code_dim": 32, "dim": 64, "num_layers": 3, "num_heads": 4, "num_codes": 1024,
}  # fmt: skip
GUIDANCE = (3.0, 1.5)


def check_rqtransformer(folder: str | Path, device: torch.device | str = "cpu") -> list[Finding]:
    """Run a checkout of RQ-Transformer and ours on the same weights, inputs and seeds, in float32 without TF32.

    Args:
        folder: of the checkout, the one that holds the package rqvae.
        device: where.

    Returns:
        The comparisons: keys, logits, drawn codes, and those of the accelerated model, for a model without a condition,
        with classes and with a text.

    Raises:
        CheckpointError: if the folder is no such checkout, or lacks what it needs.
    """
    names = [
        "rqvae.models.rqtransformer.transformers",
        "rqvae.models.rqtransformer.configs",
        "rqvae.models.rqvae.rqvae",
    ]
    bare = ["rqvae", "rqvae.models", "rqvae.models.rqtransformer", "rqvae.models.rqvae", "rqvae.utils"]
    bare.append("rqvae.optimizer")
    findings: list[Finding] = []
    with exact_products(), imported(Path(folder), "RQ-Transformer", names, ["rqvae"], bare=bare) as modules:
        transformers, configs, rqvae = modules
        for name, (count, length) in CONDITIONS.items():
            torch.manual_seed(0)
            theirs, tokenizer = _rqtransformer(transformers, configs, rqvae, count, length)
            for one in (theirs, tokenizer):
                _randomize(one)
                one.to(device).eval().requires_grad_(False)
            findings += _of_rqtransformer(name, theirs, tokenizer, RQTransformerConfig(
                NUM_CODES, CODE_DIM, GRID, DEPTH, WIDTH, HEADS, 3, 2, count, length
            ))  # fmt: skip
    return findings


def _rqtransformer(transformers: Any, configs: Any, rqvae: Any, count: int, length: int) -> tuple[Any, Any]:
    """The published model and its tokenizer, small."""
    stacks = {
        name: {"n_layer": layers, "block": {"n_head": HEADS}} for name, layers in (("body", 3), ("head", 2))
    }  # fmt: skip
    switches = ("input_emb_vqvae", "head_emb_vqvae", "cumsum_depth_ctx", "shared_tok_emb", "shared_cls_emb")
    given = {
        "embed_dim": WIDTH,
        "input_embed_dim": CODE_DIM,
        "vocab_size": NUM_CODES,
        "block_size": [*GRID, DEPTH],
        "vocab_size_cond": count,
        "block_size_cond": length,
        **dict.fromkeys(switches, True),
        **stacks,
    }
    network = {
        "double_z": False, "z_channels": 32, "resolution": 4 * GRID[0], "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    try:
        model = transformers.RQTransformer(configs.RQTransformerConfig.create(configs.OmegaConf.create(given)))
        tokenizer = rqvae.RQVAE(
            embed_dim=CODE_DIM, n_embed=NUM_CODES, ddconfig=network, latent_shape=[*GRID, CODE_DIM],
            code_shape=[*GRID, DEPTH], shared_codebook=True, restart_unused_codes=True,
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkout's classes cannot be built: {' '.join(str(error).split())}") from error
    return model, tokenizer


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    """Weights that make logits as spread out as trained ones do."""
    for name, one in module.named_parameters():
        if one.ndim == 1:
            one.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        else:
            one.normal_(std=1.0 if "emb" in name or "codebooks" in name else 2.0 * one[0].numel() ** -0.5)


def _loaded(ours: nn.Module, theirs: nn.Module, device: torch.device) -> float:
    """Load theirs into ours; how many keys one side lacks."""
    try:
        found = ours.load_state_dict(theirs.state_dict(), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkout has other shapes: {' '.join(str(error).split())[:300]}") from error
    ours.to(device).eval().requires_grad_(False)
    return len(found.missing_keys) + len(found.unexpected_keys)


@torch.no_grad()
def _of_rqtransformer(name: str, theirs: Any, tokenizer: Any, config: RQTransformerConfig) -> Iterator[Finding]:
    device, ours = theirs.pos_emb_d.device, RQTransformer(config)
    yield Finding(f"{name}: keys that one side lacks", _loaded(ours, theirs, device), 0)
    table = tokenizer.quantizer.codebooks[0].weight[:NUM_CODES]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(NUM_CODES, (2, *GRID, DEPTH), generator=generator).to(device)
    cond = torch.randint(config.num_conditions, (2, config.condition_length), generator=generator).to(device)
    given = theirs(codes, tokenizer, cond)
    logits, text = given if isinstance(given, tuple) else (given, None)
    found = ours(codes, table, cond)
    yield Finding(f"{name}: logits of codes, {FARTHEST}", farthest(found.codes, logits), 1e-4)
    if text is not None and found.text is not None:
        yield Finding(f"{name}: logits of the text, {FARTHEST}", farthest(found.text, text), 1e-4)

    def published(settings: Mapping[str, Any]) -> Tensor:
        torch.manual_seed(3)
        return theirs.sample(codes, tokenizer, cond, **settings)

    drawn = [(settings, published(settings)) for settings in SETTINGS]
    for settings, want in drawn:
        torch.manual_seed(3)
        options = {"start" if key == "start_loc" else key: value for key, value in settings.items()}
        got = ours.sample(codes, table, cond=cond, **options)
        yield Finding(f"{name}: drawn codes that differ, {settings}", differing(got, want), 0)
    yield from _accelerated(name, theirs)
    with _counted(theirs, "cached_forward") as calls:
        for settings, want in drawn:
            got = published(settings)
            yield Finding(f"{name}: codes of the accelerated model that differ, {settings}", differing(got, want), 0)
    yield Finding(f"{name}: steps of it that the published code made", len(calls), 0)
    restore(theirs)


FARTHEST = "largest difference over the largest"


@contextlib.contextmanager
def _counted(module: Any, name: str) -> Iterator[list[None]]:
    """A list that grows with every call of a method of the module."""
    calls: list[None] = []
    method = getattr(module, name)

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return method(*arguments, **options)

    module.__dict__[name] = count
    try:
        yield calls
    finally:
        del module.__dict__[name]


def _accelerated(name: str, theirs: Any) -> Iterator[Finding]:
    entry = accelerate(theirs, verbose=False).entries[0]
    refused = entry.status == "refused"
    yield Finding(f"{name}: accelerate refuses ({entry.text})" if refused else f"{name}: accelerate refuses",
                  float(refused), 0)  # fmt: skip


# ---- VILA-U ----------------------------------------------------------------------------------------------------------

_TOWER = "vila_u.model.multimodal_encoder.rqvaesigliptransformer"


class _Tokenizer(nn.Module):
    """What the depth head asks of VILA-U's tokenizer: the published quantizer alone, without the encoder."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer

    def get_code_emb_with_depth(self, code: Tensor) -> Any:
        quantizer: Any = self.quantizer
        return quantizer.embed_code_with_depth(code)


def check_vilau(folder: str | Path, device: torch.device | str = "cpu") -> list[Finding]:
    """Run the depth head of a checkout of VILA-U and ours on the same weights, inputs and seeds, in float32, no TF32.

    Args:
        folder: of the checkout, the one that holds the package vila_u.
        device: where.

    Returns:
        The comparisons for D 4 (256 pixels) and 16 (384): keys, logits, drawn codes and their sums, those of the
        accelerated head, and its sums in bfloat16.

    Raises:
        CheckpointError: if the folder is no such checkout, or lacks what it needs.
    """
    head = f"{_TOWER}.rqtransformer"
    names = [f"{head}.modeling_rqtransformer", f"{head}.configuration_rqtransformer"]
    names.append(f"{_TOWER}.rqvaesiglip.quantizations")
    parts = _TOWER.split(".")
    bare = [".".join(parts[: i + 1]) for i in range(len(parts))] + [head, f"{_TOWER}.rqvaesiglip"]
    findings: list[Finding] = []
    with exact_products(), imported(Path(folder), "VILA-U", names, ["vila_u"], bare=bare) as modules:
        modeling, configuration, quantizations = modules
        for pixels, depth in VILAU_DEPTHS.items():
            torch.manual_seed(0)
            theirs, tokenizer = _vilau(modeling, configuration, quantizations, depth)
            for one in (theirs, tokenizer):
                _randomize(one)
                one.to(device).eval().requires_grad_(False)
            findings += _of_vilau(pixels, theirs, tokenizer, depth)
    return findings


def _vilau(modeling: Any, configuration: Any, quantizations: Any, depth: int) -> tuple[Any, _Tokenizer]:
    sizes = VILAU_SIZES
    try:
        config = configuration.RQTransformerConfig(
            block_size=[*GRID, depth], input_embed_dim_1=sizes["code_dim"], input_embed_dim_2=sizes["hidden_dim"],
            embed_dim=sizes["dim"], vocab_size=sizes["num_codes"],
            head={"block": {"n_head": sizes["num_heads"]}, "n_layer": sizes["num_layers"]},
        )  # fmt: skip
        quantizer = quantizations.RQBottleneck(
            latent_shape=[*GRID, sizes["code_dim"]], code_shape=[*GRID, depth], n_embed=sizes["num_codes"],
            shared_codebook=True,
        )  # fmt: skip
        return modeling.RQTransformer(config), _Tokenizer(quantizer)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkout's classes cannot be built: {' '.join(str(error).split())}") from error


@torch.no_grad()
def _of_vilau(name: str, theirs: Any, tokenizer: Any, depth: int) -> Iterator[Finding]:
    device, ours = theirs.pos_emb_d.device, DepthTransformer(depth=depth, **VILAU_SIZES)
    yield Finding(f"{name}: keys that one side lacks", _loaded(ours, theirs, device), 0)
    num_codes = VILAU_SIZES["num_codes"]
    table = tokenizer.quantizer.codebooks[0].weight[:num_codes]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(num_codes, (4, 1, depth), generator=generator).to(device)
    hidden = torch.randn(4, 1, VILAU_SIZES["hidden_dim"], generator=generator).to(device)
    logits = theirs(hidden, codes, tokenizer)[:, 0]
    got = ours(hidden[:, 0], ours.running_sums(codes[:, 0], table))
    yield Finding(f"{name}: logits, {FARTHEST}", farthest(got, logits), 1e-4)

    def published(guidance: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return theirs.generate(hidden, tokenizer, guidance)

    drawn = [(guidance, *published(guidance)) for guidance in GUIDANCE]
    for guidance, sums, want in drawn:
        torch.manual_seed(3)
        found = ours.decode(hidden[:, 0], table, guidance=guidance, top_k=900, top_p=0.96)
        yield Finding(f"{name}: drawn codes that differ, cfg {guidance}", differing(found.codes, want[:2, 0]), 0)
        yield Finding(f"{name}: their sums, cfg {guidance}, {FARTHEST}", farthest(found.total, sums[:2, 0]), 1e-6)
    yield from _accelerated(name, theirs)
    with _counted(theirs.head_transformer, "forward") as calls:
        for guidance, sums, want in drawn:
            mine, codes = published(guidance)
            what = f"{name}: codes of the accelerated head that differ, cfg {guidance}"
            yield Finding(what, differing(codes, want), 0)
            yield Finding(f"{name}: their sums, cfg {guidance}, {FARTHEST}", farthest(mine, sums), 1e-6)
        theirs.bfloat16()
        tokenizer.bfloat16()
        hidden = hidden.bfloat16()
        mine, codes = published(GUIDANCE[0])
        sums = tokenizer.get_code_emb_with_depth(codes)[0].cumsum(-2)[:, :, -1]
        # On a CPU the published sums are rounded once, on a GPU, as ours everywhere, after each code.
        allowed = 0.0 if device.type == "cuda" else depth * 2.0**-8
        yield Finding(f"{name}: sums of the accelerated head in bfloat16, {FARTHEST}", farthest(mine, sums), allowed)
    yield Finding(f"{name}: steps of it that the published code made", len(calls), 0)
    restore(theirs)
