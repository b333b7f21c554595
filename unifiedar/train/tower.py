"""First stage: the unified vision tower (VILA-U, section 3.1).

Contrastive between the *quantized* features and the text, so that the codes carry meaning; reconstruction, so that they
carry pixels; alignment first, then both. The codebook follows by moving averages.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from unifiedar import tokenizer as tokenizers
from unifiedar.models import VILAU
from unifiedar.quality import Measure
from unifiedar.train.batches import Pictures, augment, collage, pad_ids
from unifiedar.train.loop import Loop, add_arguments, fail, load_pictures, sheet

__all__ = ["main", "sigmoid_loss"]


def sigmoid_loss(
    images: Tensor, texts: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, known: Tensor | None = None
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343, algorithm 1) where a picture may have several right texts.

    Args:
        images: (B, C) unit vectors.
        texts: (T, C) unit vectors.
        positive: (B, T) bool, which pairs belong together.
        scale, bias: (1,), log of the temperature's inverse and the offset.
        known: (B, T) bool, which pairs count; all if absent.

    Returns:
        () sum over all pairs, divided by B.
    """
    logits = images @ texts.T * scale.exp() + bias
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    return (losses if known is None else losses * known).sum() / len(images)


def edge_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, at full, half and quarter resolution."""
    loss = images.new_zeros(())
    for _ in range(3):
        error = images - targets
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
    return loss


def _gather(x: Tensor) -> Tensor:
    """Rows of all ranks, this rank's with their gradient, the others' too."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    from torch.distributed.nn.functional import all_gather

    if x.requires_grad:
        return torch.cat(all_gather(x))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the stage."""
    parser = argparse.ArgumentParser(prog="unifiedar train tower", description=__doc__)
    add_arguments(parser, steps=8000, batch=512, lr=1e-3)
    parser.add_argument("--config", default="emoji", choices=sorted(VILAU.configs), help="sizes (default: emoji)")
    parser.add_argument(
        "--align", type=float, default=0.1, help="share of the steps without reconstruction (default: 0.1)"
    )
    parser.add_argument("--contrastive", type=float, default=1.0, help="weight of the contrastive loss")
    parser.add_argument("--reconstruction", type=float, default=1.0, help="weight of the reconstruction loss")
    parser.add_argument("--pixel", type=float, default=10.0, help="weight of the pixels' error in it")
    parser.add_argument("--edge", type=float, default=3.0, help="weight of the edge error in it")
    parser.add_argument("--commitment", type=float, default=0.25, help="weight of the commitment loss (default: 0.25)")
    parser.add_argument("--augmentation", type=float, default=1.0, help="strength of the augmentation (default: 1)")
    parser.add_argument(
        "--collage", type=float, default=0.25, help="share of pictures pasted from two of a style (default: 0.25)"
    )
    return parser.parse_args(argv)


class _Losses:
    """Losses of one part of one step."""

    def __init__(self, args: argparse.Namespace, loop: Loop[VILAU], pictures: Pictures):
        self.args, self.loop, self.pictures, self.tower = args, loop, pictures, loop.model.tower
        tokenizer, length = loop.model.tokenizer, loop.model.config.vision.text_positions
        assert tokenizer is not None
        self.styled = pictures.caption_ids(tokenizer, length, styled=True)
        self.plain = pictures.caption_ids(tokenizer, length, styled=False)
        styles = [tokenizer.encode(f"{style} style") for style in pictures.style_names]
        self.style_ids = pad_ids(styles, length).to(loop.device)
        siglip = self.tower.siglip_model
        self.features, self.pool = loop.compiled(siglip.features), loop.compiled(siglip.pool)
        self.embed_text, self.decode = loop.compiled(siglip.embed_text), loop.compiled(self.tower.decode)

    def __call__(self, step: int, part: int) -> dict[str, Tensor]:
        args, loop, tower, pictures = self.args, self.loop, self.tower, self.pictures
        generator = loop.generator(step, part)
        size = args.batch // args.accumulate
        index = torch.randint(len(pictures), (size,), generator=generator, device=loop.device)
        concept, style = pictures.concepts[index], pictures.styles[index]
        pasted = torch.rand(size, generator=generator, device=loop.device) < args.collage
        images = collage(augment(pictures.floats(index), generator, args.augmentation), style, pasted, generator)
        # Half of the texts leave the style out: then the same thing drawn in another style is right as well.
        styled = torch.rand(size, generator=generator, device=loop.device) < 0.5
        ids = torch.where(styled[:, None], self.styled[index], self.plain[index])
        with loop.autocast():
            quantized = tower.quantizer(self.features(images))
        values = {"commitment": quantized.commitment}
        loss = args.commitment * quantized.commitment
        if args.contrastive:
            with loop.autocast():
                pooled = self.pool(quantized.features)
                embedded = self.embed_text(torch.cat([ids, self.style_ids]))
            same = concept[:, None] == _gather(concept)
            positive = same & (~_gather(styled.to(torch.int64)).bool() | (style[:, None] == _gather(style)))
            # And the styles alone: of a thing not drawn in a style, the texts above say that it never has that style.
            positive = torch.cat([positive, F.one_hot(style, len(self.style_ids)).bool()], dim=1)
            texts = torch.cat([_gather(embedded[:size]), embedded[size:]])
            # A collage has a style and no name.
            known = torch.ones_like(positive)
            known[:, : -len(self.style_ids)] = ~pasted[:, None]
            values["contrastive"] = sigmoid_loss(pooled, texts, positive, tower.logit_scale, tower.logit_bias, known)
            loss = loss + args.contrastive * values["contrastive"]
        if args.reconstruction and step >= args.align * args.steps:
            with loop.autocast():
                painted = self.decode(quantized.features)
            error = painted.float() - images
            values["squared_error"] = error.square().mean()
            values["edge"] = edge_loss(painted.float(), images)
            # The squared error alone is content with blur, the absolute one heeds no large errors; at 29 dB they weigh
            # the same.
            pixel = 5 * values["squared_error"] + error.abs().mean()
            loss = loss + args.reconstruction * (args.pixel * pixel + args.edge * values["edge"])
        return {"loss": loss, **values}


def main(argv: Sequence[str]) -> int:
    """`unifiedar train tower`: returns the exit code."""
    args = parse(argv)
    for name in ("align", "collage"):
        if not 0 <= getattr(args, name) <= 1:
            raise fail(f"--{name} must be from 0 to 1, got {getattr(args, name)}")
    tokenizer_path = args.data / "tokenizer.json"
    device = torch.device("cpu")

    def make() -> VILAU:
        model = VILAU(config, tokenizer)
        model.requires_grad_(False)
        model.tower.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if ".quantizer." in name:
                parameter.requires_grad_(False)
        return model

    config = VILAU.configs[args.config]
    if tokenizer_path.is_file():
        tokenizer = tokenizers.load(tokenizer_path)
    else:
        everything = load_pictures(args, device, config.vision.image_size)
        names = {name for part in everything for name in part.captions + part.concept_names}
        tokenizer = tokenizers.train_tokenizer(sorted(names), config.language.vocab_size)
    # Few captions give a smaller vocabulary than asked for, and the model must not have words that cannot be written.
    size = tokenizer.vocab_size
    config = replace(
        config, vision=replace(config.vision, vocab_size=size), language=replace(config.language, vocab_size=size)
    )
    loop = Loop(args, make)
    train, held_out = load_pictures(args, loop.device, config.vision.image_size)
    probe, kind = (held_out, "held_out") if len(held_out) else (train, "train")
    chosen = torch.linspace(0, len(probe) - 1, min(32, len(probe)), device=loop.device).long()

    def validate(model: VILAU) -> tuple[dict[str, Any], dict[str, float]]:
        originals = probe.images[chosen].cpu()
        painted, _ = model.reconstruct(originals)
        pairs = [x for pair in zip(originals, painted, strict=True) for x in pair]
        m = Measure(model, train)
        figures = m.rebuilt(probe.images) | m.nearest_text(probe.images, probe.concepts)
        return {"reconstructions": sheet(pairs, 8)}, {f"{kind}_{k}": v for k, v in figures.items()}

    loop.phase = lambda step: step >= args.align * args.steps
    return loop.finish(loop.train(_Losses(args, loop, train), validate))
