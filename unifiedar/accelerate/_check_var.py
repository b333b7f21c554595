"""The published code of VAR and ours side by side, for `python -m unifiedar.accelerate --check var`.

The modules of a checkout are built with random weights, or with published files, and run in float32 beside
`models.VAR`, `models.VQVAE` and what `accelerate` makes of them. Nothing of the checkout is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unifiedar.accelerate import accelerate, restore
from unifiedar.accelerate._check import Finding, exact_products, imported
from unifiedar.checkpoints import CheckpointError
from unifiedar.models import VAR, VQVAE
from unifiedar.models.var import config_of

__all__ = ["check_var"]

SETTINGS: tuple[dict[str, Any], ...] = (
    {"cfg": 1.5, "top_k": 0, "top_p": 0.0, "g_seed": 1},
    {"cfg": 4.0, "top_k": 900, "top_p": 0.95, "g_seed": 0},
)


@contextlib.contextmanager
def _checkout(folder: Path) -> Iterator[Any]:
    """The module `models` of a checkout."""
    patched = [(kind, kind.reset_parameters) for kind in _layers()]
    try:
        with imported(folder, "VAR", ["models"], ["models", "dist", "utils"]) as (module,):
            if not hasattr(module, "build_vae_var"):
                raise CheckpointError(f"{folder}: not a checkout of VAR that runs here: it has no build_vae_var")
            yield module
    finally:
        for kind, method in patched:  # build_vae_var switches them off for the whole process
            kind.reset_parameters = method


def _layers() -> list[Any]:
    return [
        nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d,
        nn.ConvTranspose2d,
    ]  # fmt: skip


@torch.no_grad()
def _randomize(*models: nn.Module) -> None:
    for model in models:
        for name, one in model.named_parameters():
            if "scale_mul" in name:
                one.uniform_(0, 2)
            elif one.ndim == 1:
                one.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
            else:
                one.normal_(std=1.0 if "quantize.embedding" in name else one[0].numel() ** -0.5)


def check_var(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    depth: int = 2,
    checkpoint: str | Path | None = None,
    vae: str | Path | None = None,
) -> list[Finding]:
    """Run a checkout of VAR and ours on the same weights, inputs and seeds, in float32 without TF32.

    Args:
        folder: of the checkout.
        device: where.
        depth: of the model with random weights.
        checkpoint, vae: published files in place of random weights, both or none.

    Returns:
        The comparisons: keys, logits, codes of pictures, drawn codes and pictures, and those of the accelerated model.

    Raises:
        CheckpointError: if the folder is no such checkout, or a file does not load.
        ValueError: if only one file is given.
    """
    if (checkpoint is None) != (vae is None):
        raise ValueError("check_var: checkpoint and vae must be given together, got one of them")
    with exact_products(), _checkout(Path(folder)) as module:
        return _compare(module, torch.device(device), depth, checkpoint, vae)


def _compare(module: Any, device: torch.device, depth: int, checkpoint: Any, vae: Any) -> list[Finding]:
    tokenizer = next(iter(VQVAE.configs.values()))  # the published one; others ship
    if checkpoint is None:
        their_vae, theirs = module.build_vae_var(device=device, depth=depth)
        torch.manual_seed(0)
        _randomize(their_vae, theirs)
        ours = VAR(config_of(theirs.state_dict(), "the model of the checkout"))
        our_vae = VQVAE(replace(tokenizer, scales=ours.config.scales))
    else:
        ours = VAR.from_checkpoint(checkpoint)
        config = ours.config
        our_vae = VQVAE.from_checkpoint(vae, config=replace(tokenizer, scales=config.scales))
        their_vae, theirs = module.build_vae_var(
            device=device, patch_nums=config.scales, depth=config.depth, shared_aln=config.shared_adaln,
            attn_l2_norm=config.l2_norm,
        )  # fmt: skip
        theirs.load_state_dict(ours.state_dict())
        their_vae.load_state_dict(our_vae.state_dict())
    theirs.cond_drop_rate = 0.0
    keys = 0
    for mine, reference in ((ours, theirs), (our_vae, their_vae)):
        try:
            found = mine.load_state_dict(reference.state_dict(), strict=False)
        except RuntimeError as error:
            raise CheckpointError(f"the checkout has other shapes: {' '.join(str(error).split())[:300]}") from error
        keys += len(found.missing_keys) + len(found.unexpected_keys)
    for one in (ours, our_vae, theirs, their_vae):
        one.to(device).eval().requires_grad_(False)
    ours.attach(our_vae)
    return [Finding("keys that one side lacks", keys, 0), *_results(ours, theirs, their_vae, device)]


@torch.no_grad()
def _results(ours: VAR, theirs: Any, their_vae: Any, device: torch.device) -> Iterator[Finding]:
    assert ours.vae is not None
    generator = torch.Generator().manual_seed(0)
    side = ours.config.sizes[-1][0] * ours.vae.downsample
    images = torch.rand(2, 3, side, side, generator=generator).to(device) * 2 - 1
    codes = their_vae.img_to_idxBl(images)
    differ = sum(int((a != b).sum()) for a, b in zip(codes, ours.encode(images), strict=True))
    yield Finding("codes of pictures that differ", differ, 0)
    labels = torch.tensor([207, 88], device=device) % ours.config.num_classes
    logits = theirs(labels, their_vae.quantize.idxBl_to_var_input(codes))
    worst = (logits - ours.teacher_forced(labels, codes)).abs().max() / logits.abs().max()
    yield Finding("teacher-forced logits, largest difference over the largest logit", float(worst), 1e-4)
    drawn = []
    for settings in SETTINGS:
        cut = {**settings, "top_k": min(settings["top_k"], ours.config.num_codes)}
        seen: list[Tensor] = []
        hook = their_vae.quantize.embedding.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        pictures = theirs.autoregressive_infer_cfg(2, labels, **cut)
        hook.remove()
        drawn.append((cut, pictures))
        mine = {**{k: v for k, v in cut.items() if k != "g_seed"}, "seed": cut["g_seed"]}
        differ = sum(int((a != b).sum()) for a, b in zip(seen, ours.generate_codes(labels, **mine), strict=True))
        yield Finding(f"drawn codes that differ, {cut}", differ, 0)
        worst = (ours.generate(labels, **mine) - pictures * 255).abs().max()
        yield Finding(f"pictures, grey levels, {cut}", float(worst), 1.0)
    entry = accelerate(theirs, verbose=False).entries[0]
    yield Finding(f"accelerate refuses ({entry.text})" if entry.status == "refused" else "accelerate refuses",
                  float(entry.status == "refused"), 0)  # fmt: skip
    for cut, pictures in drawn:
        worst = (theirs.autoregressive_infer_cfg(2, labels, **cut) - pictures).abs().max() * 255
        yield Finding(f"pictures of the accelerated model, grey levels, {cut}", float(worst), 1.0)
    worst = (theirs(labels, their_vae.quantize.idxBl_to_var_input(codes)) - logits).abs().max() / logits.abs().max()
    yield Finding("logits of the accelerated model, largest difference over the largest logit", float(worst), 1e-4)
    restore(theirs)
