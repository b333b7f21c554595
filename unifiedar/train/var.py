"""VAR on a frozen tokenizer (Tian et al., arXiv:2404.02905): which codes each scale has, given the class and all scales
before.

The published recipe: cross-entropy of the codes of all scales at once, all with the same weight; AdamW with betas .9
and .95 and a decay of .05 (which ends at .08 for the two largest models), a learning rate in proportion to the pictures
a step, warm-up over a fiftieth of the steps, then nearly flat and linearly down; gradients clipped at 2; gates that
begin near zero; classes taken away from a tenth of the pictures, for guidance. Pictures are taken as they are, without
the published random crops: a drawing that fills its picture would lose an edge. Their codes are computed once.

Progressive training, which the published code has and its recipes leave off, begins with the first few scales and adds
the others one by one: see `growth`.
"""

import argparse
import math
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
from unifiedar.train.batches import Pictures
from unifiedar.train.loop import Loop, add_arguments, fail, lin0, load_pictures, sheet

__all__ = ["main", "scale_means"]

# Positions, scales, gains and the blocks' own vectors are matrices by their shape alone.
UNDECAYED = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


def scale_means(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(S, L) float32: times values (L,) of all codes it is their mean of every scale."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = F.one_hot(owner, len(lengths)).T.float()
    return (rows / rows.sum(1, keepdim=True)).to(device)


def growth(
    steps: int, warmup: int, scales: int, *, until: float, first: int, scale_warmup: float
) -> list[tuple[int, float]]:
    """Of progressive training, for every step: how many scales are learned, and the factor on the newest one's loss.

    The published schedule (its `pg`, `pg0` and `pgwp`): `first` scales during warm-up, then one more at a time, at even
    distances, and all of them from the share `until` of the steps on. The factor grows from 0.01 to 1 while a scale is
    new; it is 1 in the first stage, which begins with a warm-up of its own, and in the last.

    Args:
        steps, warmup: of the run.
        scales: of the model.
        until: from 0 to 1; at 0 all scales are learned after warm-up.
        first: from 1 to `scales`.
        scale_warmup: steps that a scale is new for.
    """
    found: list[tuple[int, float]] = []
    since = 0
    for step in range(steps):
        if step <= warmup:
            count = first
        elif step >= steps * until:
            count = scales
        else:
            count = first + round((step - warmup) / (steps * until - warmup) * (scales - first))
        since = since + 1 if found and found[-1][0] == count else 1
        new = first < count < scales and since < scale_warmup
        found.append((count, max(since / scale_warmup, 0.01) if new else 1.0))
    return found


def decay(step: int, steps: int, begin: float, end: float) -> float:
    """The published weight decay: from `begin` at the first step to `end` at the last, along half a cosine."""
    return end + (begin - end) * (0.5 + 0.5 * math.cos(math.pi * step / max(1, steps - 1)))


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
    parser.add_argument(
        "--progressive", type=float, help="begin with the first scales, have all from this share of the steps on"
    )
    parser.add_argument("--first-scales", type=int, help="scales that `--progressive` begins with (default: 5)")
    parser.add_argument(
        "--scale-warmup", type=float, help="steps in which the loss of a scale that it adds grows (a 300th of all)"
    )
    parser.add_argument("--shard", action="store_true", help="share weights and moments out to the ranks (FSDP2)")
    parser.add_argument("--end-decay", type=float, help="weight decay that the last step has (default: the first's)")
    parser.add_argument("--end-rate", type=float, default=0.1, help="share of the rate at the end (default: 0.1)")
    return parser.parse_args(argv)


class _Losses:
    """Losses of one part of one step."""

    def __init__(self, args: argparse.Namespace, loop: Loop[VAR], learned: _Learned):
        self.args, self.loop, self.learned = args, loop, learned
        self.forward = loop.compiled(loop.model)
        self.lengths = loop.model.config.lengths
        self.means = scale_means(self.lengths, loop.device)
        self.growth: list[tuple[int, float]] | None = None
        if args.progressive is not None:
            settings = {"until": args.progressive, "first": args.first_scales, "scale_warmup": args.scale_warmup}
            self.growth = growth(args.steps, args.warmup, len(self.lengths), **settings)

    def phase(self, step: int) -> int | None:
        """How many scales are learned; None while the newest one's loss grows, which no two steps have alike."""
        if self.growth is None:
            return len(self.lengths)
        count, newest = self.growth[step]
        return count if newest == 1 else None

    def of(self, logits: Tensor, codes: Tensor, newest: float = 1.0) -> dict[str, Tensor]:
        """Losses and accuracies of logits (B, L, K) for codes (B, L): of all, and of each scale.

        L may be that of the first few scales. Each code has its share of all codes in the loss, as if the others had no
        loss; `newest` is a factor on the last of the scales that are there.
        """
        smoothing = self.args.label_smoothing
        each = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none", label_smoothing=smoothing)
        losses = each.view_as(codes).mean(0)
        right = (logits.detach().argmax(2) == codes).float().mean(0)
        means = self.means[:, : len(losses)]
        curves = {"loss": means @ losses.detach(), "accuracy": means @ right}
        count = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))].index(len(losses)) + 1
        single = {f"scale_{i}_{name}": curve[i] for name, curve in curves.items() for i in range(count)}
        before = len(losses) - self.lengths[count - 1]
        total = losses[:before].sum() + newest * losses[before:].sum()
        return {"loss": total / sum(self.lengths), "accuracy": right.mean(), **single}

    def __call__(self, step: int, part: int) -> dict[str, Tensor]:
        args, loop, learned = self.args, self.loop, self.learned
        generator = loop.generator(step, part)
        size = args.batch // args.accumulate
        index = torch.randint(len(learned), (size,), generator=generator, device=loop.device)
        count, newest = (len(self.lengths), 1.0) if self.growth is None else self.growth[step]
        codes = sum(self.lengths[:count])
        with loop.autocast():
            logits = self.forward(learned.labels[index], learned.inputs[index, : codes - self.lengths[0]])
        return self.of(logits, learned.codes[index, :codes], newest)


def main(argv: Sequence[str]) -> int:
    """`unifiedar train var`: returns the exit code."""
    args = parse(argv)
    for name in ("label_smoothing", "cond_drop", "drop_path", "end_rate", "progressive"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise fail(f"--{name.replace('_', '-')} must be from 0 to 1, got {value}")
    if args.drop_path == 1:
        raise fail("--drop-path must be below 1, got 1")
    if args.end_decay is not None and not 0 <= args.end_decay < math.inf:
        raise fail(f"--end-decay must be at least 0, got {args.end_decay}")
    if args.warmup is None:
        args.warmup = args.steps // 50
    for name, value in (("first_scales", 5), ("scale_warmup", args.steps / 300)):
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif args.progressive is None:
            raise fail(f"--{name.replace('_', '-')} goes with --progressive alone")
    if not args.scale_warmup >= 0:
        raise fail(f"--scale-warmup must be at least 0, got {args.scale_warmup}")
    args.lr *= args.batch * int(os.environ.get("WORLD_SIZE", 1)) / 256
    try:
        first = VQVAE.from_checkpoint(args.vae, dtype=torch.float32)
    except CheckpointError as error:
        raise fail(f"--vae: {error}") from error
    if args.progressive is not None and not 1 <= args.first_scales <= len(first.config.scales):
        raise fail(f"--first-scales must be from 1 to {len(first.config.scales)}, got {args.first_scales}")
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
    ends = None
    if args.end_decay is not None:
        ends = partial(decay, steps=args.steps, begin=args.weight_decay, end=args.end_decay)
    loop = Loop(args, make, schedule=schedule, clip=2.0, undecayed=UNDECAYED, groups=groups, decay=ends)
    vae = first.to(loop.device)
    loop.averaged.attach(vae)
    loop.averaged.class_names = tuple(names)
    train, held_out = load_pictures(args, loop.device, size)
    learned = _Learned(train, vae, args.labels)
    losses = _Losses(args, loop, learned)
    loop.phase = losses.phase
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
