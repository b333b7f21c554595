"""VAR on a frozen tokenizer (Tian et al., arXiv:2404.02905): which codes each scale has, given the class and all scales
before.

The published recipe: cross-entropy of the codes of all scales at once, all with the same weight; AdamW with betas .9
and .95 and a decay of .05, a learning rate in proportion to the pictures a step, warm-up over a fiftieth of the steps,
then nearly flat and linearly down; gradients clipped at 2; gates that begin near zero; classes taken away from a tenth
of the pictures, for guidance. Pictures are taken as they are, without the published random crops: a drawing that fills
its picture would lose an edge. Their codes are computed once.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifiedar.checkpoints import CheckpointError
from unifiedar.models import VAR, VQVAE
from unifiedar.train.batches import Pictures, step_generator
from unifiedar.train.loop import Loop, add_arguments, fail, lin0, load_pictures, sheet

__all__ = ["main", "scale_means"]

# Positions, scales, gains and the blocks' own vectors are matrices by their shape alone.
UNDECAYED = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


def scale_means(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(S, L) float32: times values (L,) of all codes it is their mean of every scale."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = F.one_hot(owner, len(lengths)).T.float()
    return (rows / rows.sum(1, keepdim=True)).to(device)


def groups(model: VAR) -> Iterator[nn.Module | list[nn.Module]]:
    """What `--shard` gathers together: the projections of the condition, one by one, then every block's two branches.

    A block itself is never called; the vectors that it adds to a shared projection stay with the model.
    """
    for block in model._each():
        if not model.config.shared_adaln:
            yield block.ada_lin.get_submodule("1")
        yield [block.attn, block.ffn]


class _Learned:
    """What is learned of pictures: classes, codes (N, L), and what is read before each scale but the first."""

    def __init__(self, pictures: Pictures, vae: VQVAE, labels: str):
        self.labels = pictures.concepts if labels == "concept" else pictures.styles
        codes, inputs = [], []
        for part in torch.arange(len(pictures), device=pictures.images.device).split(256):
            found = vae.encode_images(pictures.images[part])
            codes.append(torch.cat(found, 1))
            with torch.no_grad():
                inputs.append(vae.quantize.idxBl_to_var_input(found))
        self.codes, self.inputs = torch.cat(codes), torch.cat(inputs)

    def __len__(self) -> int:
        return len(self.codes)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the stage."""
    parser = argparse.ArgumentParser(prog="unifiedar train var", description=__doc__)
    add_arguments(parser, steps=6000, batch=512, lr=4e-4, warmup=None, rate=" of 256 pictures a step, more of more")
    parser.add_argument("--vae", type=Path, required=True, help="model folder of `unifiedar train vae`")
    parser.add_argument("--config", default="emoji", choices=sorted(VAR.configs), help="sizes (default: emoji)")
    parser.add_argument(
        "--labels", choices=("concept", "style"), default="concept", help="what the classes are (default: concept)"
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="of the codes asked for (default: 0)")
    parser.add_argument("--cond-drop", type=float, default=0.1, help="share of pictures without class (default: 0.1)")
    parser.add_argument("--drop-path", type=float, help="chance that the last block is left out (default: the sizes')")
    parser.add_argument("--adaln", type=float, default=0.5, help="factor on first weights of scales and shifts (0.5)")
    parser.add_argument("--gate", type=float, default=1e-3, help="factor on first weights of gates (default: 1e-3)")
    parser.add_argument("--shard", action="store_true", help="share weights and moments out to the ranks (FSDP2)")
    parser.add_argument("--end-rate", type=float, default=0.1, help="share of the rate at the end (default: 0.1)")
    return parser.parse_args(argv)


class _Losses:
    """Losses of one part of one step."""

    def __init__(self, args: argparse.Namespace, loop: Loop[VAR], learned: _Learned):
        self.args, self.loop, self.learned = args, loop, learned
        self.forward = loop.compiled(loop.model)
        self.means = scale_means(loop.model.config.lengths, loop.device)

    def of(self, logits: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Losses and accuracies of logits (B, L, K) for codes (B, L): of all, and of each scale."""
        smoothing = self.args.label_smoothing
        each = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none", label_smoothing=smoothing)
        losses = each.view_as(codes).mean(0)
        right = (logits.detach().argmax(2) == codes).float().mean(0)
        curves = {"loss": self.means @ losses.detach(), "accuracy": self.means @ right}
        single = {f"scale_{i}_{name}": one for name, curve in curves.items() for i, one in enumerate(curve)}
        return {"loss": losses.mean(), "accuracy": right.mean(), **single}

    def __call__(self, step: int, part: int) -> dict[str, Tensor]:
        args, loop, learned = self.args, self.loop, self.learned
        generator = step_generator(args.seed, step * args.accumulate + part, loop.rank, loop.device)
        size = args.batch // args.accumulate
        index = torch.randint(len(learned), (size,), generator=generator, device=loop.device)
        with loop.autocast():
            logits = self.forward(learned.labels[index], learned.inputs[index])
        return self.of(logits, learned.codes[index])


def main(argv: Sequence[str]) -> int:
    """`unifiedar train var`: returns the exit code."""
    args = parse(argv)
    for name in ("label_smoothing", "cond_drop", "drop_path", "end_rate"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise fail(f"--{name.replace('_', '-')} must be from 0 to 1, got {value}")
    if args.drop_path == 1:
        raise fail("--drop-path must be below 1, got 1")
    if args.warmup is None:
        args.warmup = args.steps // 50
    args.lr *= args.batch * int(os.environ.get("WORLD_SIZE", 1)) / 256
    try:
        first = VQVAE.from_checkpoint(args.vae, dtype=torch.float32)
    except CheckpointError as error:
        raise fail(f"--vae: {error}") from error
    size = first.config.network.downsampling * first._size(-1)[0]
    parts = load_pictures(args, torch.device("cpu"), size)
    names = parts[0].concept_names if args.labels == "concept" else parts[0].style_names
    config = VAR.configs[args.config]
    config = replace(
        config,
        scales=first.config.scales,
        num_classes=len(names),
        num_codes=first.config.num_codes,
        code_dim=first.config.dim,
        cond_drop=args.cond_drop,
        drop_path=config.drop_path if args.drop_path is None else args.drop_path,
    )

    def make() -> VAR:
        model = VAR(config)
        model.initialize(adaln=args.adaln, gate=args.gate)
        return model

    schedule = partial(lin0, end=args.end_rate)
    loop = Loop(args, make, schedule=schedule, clip=2.0, undecayed=UNDECAYED, groups=groups)
    vae = first.to(loop.device)
    loop.averaged.attach(vae)
    loop.averaged.class_names = tuple(names)
    train, held_out = load_pictures(args, loop.device, size)
    learned = _Learned(train, vae, args.labels)
    losses = _Losses(args, loop, learned)
    probe, kind = (held_out, "held_out") if len(held_out) else (train, "train")
    probed = _Learned(probe, vae, args.labels)
    shown = torch.linspace(0, len(train) - 1, min(16, len(train)), device=loop.device).long()

    @torch.no_grad()
    def validate(model: VAR) -> tuple[dict[str, Any], dict[str, float]]:
        totals: dict[str, float] = {}
        for part in torch.arange(len(probed), device=loop.device).split(128):
            with loop.autocast():
                logits = model(probed.labels[part], probed.inputs[part])
            for name, value in losses.of(logits, probed.codes[part]).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part) / len(probed)
        drawn = model.generate(learned.labels[shown], seed=0, graphs=False)
        figures = {f"{kind}_{name}": value for name, value in totals.items() if not name.startswith("scale_")}
        return {"drawn": sheet([*train.images[shown], *drawn], 8)}, figures

    return loop.finish(loop.train(losses, validate), loop.averaged.save_whole)
