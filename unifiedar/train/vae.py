"""VAR's tokenizer (Tian et al., arXiv:2404.02905, section 3.2): encoder, multi-scale codebook and decoder, together.

The published training code leaves this stage out. Here the pixels' and the edges' errors stand for the perceptual and
adversarial losses of the paper; the codebook learns by gradient, as published, and codes that a whole step did not use
begin anew among the step's vectors (the restart of Dhariwal et al., arXiv:2005.00341, section 3.1), without which a
gradient never reaches them.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from unifiedar.models import VQVAE
from unifiedar.train.batches import Pictures, augment
from unifiedar.train.loop import Loop, add_arguments, fail, load_pictures, sheet
from unifiedar.train.tower import edge_loss

__all__ = ["main", "pyramid", "revive"]


def pyramid(model: VQVAE, features: Tensor) -> tuple[Tensor, Tensor]:
    """What each code of each scale stands for.

    Args:
        model: whose quantizer encodes.
        features: (B, C, H, W) float32.

    Returns:
        Vectors (N, C), the mean of what the scales before left over, and codes (N,) int64, of all scales in a row.
    """
    quantizer = model.quantize
    codes = quantizer.f_to_idxBl_or_fhat(features, to_fhat=False)
    sums = quantizer.embed(codes, cumulative=True)
    left, vectors = features, []
    for total, size in zip(sums, quantizer.scales, strict=True):
        vectors.append(F.adaptive_avg_pool2d(left, size).flatten(2).transpose(1, 2).flatten(0, 1))
        left = features - total
    return torch.cat(vectors), torch.cat([one.flatten() for one in codes])


@torch.no_grad()
def revive(model: VQVAE, features: Tensor, generator: torch.Generator) -> Tensor:
    """Put the codes that no vector of these features chose, on any rank, on vectors drawn from rank 0's.

    Args:
        model: its codebook is changed in place, alike on all ranks.
        features: (B, C, H, W) float32, this rank's.
        generator: on the features' device.

    Returns:
        () share of the codes that was in use.
    """
    table = model.quantize.embedding.weight
    vectors, codes = pyramid(model, features)
    used = torch.zeros(len(table), device=table.device).index_fill_(0, codes, 1.0)
    drawn = vectors[torch.randint(len(vectors), (len(table),), generator=generator, device=table.device)]
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(used, dist.ReduceOp.MAX)
        dist.broadcast(drawn, 0)
    table.copy_(torch.where(used[:, None] > 0, table, drawn))
    return used.mean()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the stage."""
    parser = argparse.ArgumentParser(prog="unifiedar train vae", description=__doc__)
    add_arguments(parser, steps=4000, batch=512, lr=1e-3)
    parser.add_argument("--config", default="emoji", choices=sorted(VQVAE.configs), help="sizes (default: emoji)")
    parser.add_argument("--pixel", type=float, default=10.0, help="weight of the pixels' error (default: 10)")
    parser.add_argument("--edge", type=float, default=3.0, help="weight of the edge error (default: 3)")
    parser.add_argument("--codes", type=float, default=1.0, help="weight of the quantizer's loss (default: 1)")
    parser.add_argument("--augmentation", type=float, default=0.5, help="strength of the augmentation (default: 0.5)")
    parser.add_argument(
        "--revive-every", type=int, default=20, help="steps between revivals of unused codes (default: 20)"
    )
    parser.add_argument(
        "--revive", type=float, default=0.6, help="share of the steps in which unused codes are revived (default: 0.6)"
    )
    return parser.parse_args(argv)


def revives(args: argparse.Namespace, step: int) -> bool:
    """Whether unused codes begin anew in a step."""
    return bool(step % args.revive_every == 0 and step < args.revive * args.steps)


class _Losses:
    """Losses of one part of one step."""

    def __init__(self, args: argparse.Namespace, loop: Loop[VQVAE], pictures: Pictures):
        self.args, self.loop, self.pictures, self.model = args, loop, pictures, loop.model
        self.encode, self.decode = loop.compiled(self._encode), loop.compiled(self.model._paint)

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.quant_conv(self.model.encoder(images))

    def __call__(self, step: int, part: int) -> dict[str, Tensor]:
        args, loop, model = self.args, self.loop, self.model
        generator = loop.generator(step, part)
        index = torch.randint(
            len(self.pictures), (args.batch // args.accumulate,), generator=generator, device=loop.device
        )
        images = augment(self.pictures.floats(index), generator, args.augmentation, clean=0.5)
        with loop.autocast():
            features = self.encode(images)
        values: dict[str, Tensor] = {}
        if part == 0 and revives(args, step):
            revive(model, features.detach().float(), generator)
        quantized, _, values["codes"] = model.quantize(features)
        with loop.autocast():
            painted = self.decode(quantized).float()
        error = painted - images
        values["squared_error"], values["edge"] = error.square().mean(), edge_loss(painted, images)
        # The squared error alone is content with blur; see the tower's.
        pixel = 5 * values["squared_error"] + error.abs().mean()
        loss = args.pixel * pixel + args.edge * values["edge"] + args.codes * values["codes"]
        return {"loss": loss, **values}


def main(argv: Sequence[str]) -> int:
    """`unifiedar train vae`: returns the exit code."""
    args = parse(argv)
    if args.revive_every < 1:
        raise fail(f"--revive-every must be at least 1, got {args.revive_every}")
    if not 0 <= args.revive <= 1:
        raise fail(f"--revive must be from 0 to 1, got {args.revive}")
    config = VQVAE.configs[args.config]
    loop = Loop(args, lambda: VQVAE(config))
    # How often usage was counted weighs the next count, and is in no checkpoint.
    loop.model.quantize.record_hit.fill_(loop.begin * args.accumulate * len(config.scales))
    train, held_out = load_pictures(args, loop.device, config.network.resolution)
    probe, kind = (held_out, "held_out") if len(held_out) else (train, "train")
    chosen = torch.linspace(0, len(probe) - 1, min(32, len(probe)), device=loop.device).long()

    def validate(model: VQVAE) -> tuple[dict[str, Any], dict[str, float]]:
        originals = probe.images[chosen]
        pairs = [x for pair in zip(originals, model.reconstruct(originals)[0], strict=True) for x in pair]
        errors, used = [], torch.zeros(config.num_codes, dtype=torch.bool, device=loop.device)
        for part in torch.arange(len(probe), device=loop.device).split(128):
            painted, codes = model.reconstruct(probe.images[part])
            errors.append((painted.double() - probe.images[part]).square().flatten(1).mean(1))
            used[torch.cat(codes, 1).flatten()] = True
        decibels = 10 * (255**2 / torch.cat(errors).clamp_min(1e-3)).log10()
        figures = {"psnr_db": float(decibels.mean()), "codes_used": float(used.double().mean())}
        return {"reconstructions": sheet(pairs, 8)}, {f"{kind}_{k}": v for k, v in figures.items()}

    loop.phase = lambda step: None if revives(args, step) else 0
    return loop.finish(loop.train(_Losses(args, loop, train), validate))
