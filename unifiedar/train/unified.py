"""Second stage: language model, projector and depth transformer on a frozen tower (VILA-U, section 3.2).

Two forms, [text, picture] and [picture, text], loss on the second modality alone: cross-entropy of the text tokens plus
cross-entropy of the codes, both with weight 1. A tenth of the texts in front of pictures are empty, for guidance.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.checkpoints import CheckpointError
from unifiedar.models import VILAU
from unifiedar.models.vilau import BOS, EOS, IM_END, IM_START
from unifiedar.quality import Measure
from unifiedar.train.batches import Pictures, augment, step_generator
from unifiedar.train.loop import Loop, add_arguments, fail, load_pictures, sheet

__all__ = ["Sequences", "main"]

IGNORED = -100
# Share of the texts in front of pictures that leave the style out.
UNSTYLED = 0.1


class Sequences:
    """Token rows of both forms for every caption, built once; a batch is an index into them.

    Every row is `length` tokens long, the picture's places hold 0, and `targets[i]` is what state i must predict
    (IGNORED where nothing is asked).
    """

    def __init__(self, model: VILAU, captions: list[str], device: torch.device):
        texts = [model.token_ids(caption) for caption in captions]
        start, end = model.special(IM_START), model.special(IM_END)
        picture = [0] * model.image_tokens
        self.length = max(map(len, texts)) + model.image_tokens + 4

        def rows(parts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
            ids = torch.zeros(len(parts), self.length, dtype=torch.int64)
            targets = torch.full_like(ids, IGNORED)
            for i, (given, asked) in enumerate(parts):
                row = torch.tensor(given + asked)
                ids[i, : len(row)] = row
                targets[i, len(given) - 1 : len(row) - 1] = row[len(given) :]
            return ids.to(device), targets.to(device)

        # A picture drawn from no text looks like one that is to be named: that nothing follows it is not to be learned.
        drawn = [([BOS, *t, start, *picture], [end, EOS] if t else [end]) for t in texts]
        self.draw_ids, self.draw_targets = rows(drawn)
        self.draw_begin = torch.tensor([len(t) + 2 for t in texts], device=device)
        self.name_ids, self.name_targets = rows([([BOS, start, *picture, end], [*t, EOS]) for t in texts])
        self.name_begin = torch.full_like(self.draw_begin, 2)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the stage."""
    parser = argparse.ArgumentParser(prog="unifiedar train unified", description=__doc__)
    add_arguments(parser, steps=8000, batch=512, lr=1.5e-3)
    parser.add_argument("--tower", type=Path, required=True, help="model folder of the first stage")
    parser.add_argument("--drop", type=float, default=0.1, help="share of empty texts before pictures (default: 0.1)")
    parser.add_argument("--augmentation", type=float, default=1.0, help="strength, for pictures to name (default: 1)")
    return parser.parse_args(argv)


class _Losses:
    """Losses of one part of one step: the first half of the rows draw, the second half name."""

    def __init__(self, args: argparse.Namespace, loop: Loop[VILAU], pictures: Pictures):
        self.args, self.loop, self.pictures, self.model = args, loop, pictures, loop.model
        plain = [pictures.concept_names[i] for i in pictures.concepts.tolist()]
        # Row i: caption of picture i; row N + i: without the style; the last row: no text.
        self.sequences = Sequences(self.model, [*pictures.captions, *plain, ""], loop.device)
        self.encode = loop.compiled(self.model.tower.siglip_model.features)
        self.hidden, self.depth_logits = loop.compiled(self.model.forward), loop.compiled(self.model.depth_logits)
        self.text_logits = loop.compiled(self.model.llm.lm_head)
        self.clean = self._codes()

    @torch.no_grad()
    def _codes(self) -> Tensor:
        """Codes of all pictures as they are: what drawing learns, computed once because the tower is frozen."""
        tower = self.model.tower.eval()
        parts = torch.arange(len(self.pictures), device=self.loop.device).split(512)
        return torch.cat([tower.encode(self.pictures.floats(part)).codes for part in parts])

    def __call__(self, step: int, part: int) -> dict[str, Tensor]:
        args, loop, model, seq = self.args, self.loop, self.model, self.sequences
        model.tower.eval()
        generator = step_generator(args.seed, step * args.accumulate + part, loop.rank, loop.device)
        half, count = args.batch // args.accumulate // 2, len(self.pictures)
        draw, name = torch.randint(count, (2, half), generator=generator, device=loop.device)
        u = torch.rand(half, generator=generator, device=loop.device)
        text = torch.where(u < args.drop, 2 * count, torch.where(u < args.drop + UNSTYLED, draw + count, draw))
        codes = self.clean[draw]
        with torch.no_grad():
            seen = augment(self.pictures.floats(name), generator, args.augmentation)
            with loop.autocast():
                named = self.encode(seen)
            named = model.tower.quantizer(named.float()).features
        features = torch.cat([model.tower.quantizer.embed(codes), named])
        ids = torch.cat([seq.draw_ids[text], seq.name_ids[name]])
        targets = torch.cat([seq.draw_targets[text], seq.name_targets[name]])
        begin = torch.cat([seq.draw_begin[text], seq.name_begin[name]])
        with loop.autocast():
            hidden = self.hidden(ids, features, begin)
            words = self.text_logits(hidden)
            logits = self.depth_logits(hidden[:half], begin[:half], codes)
        text_loss = F.cross_entropy(words.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        image_loss = F.cross_entropy(logits.flatten(0, 2).float(), codes.flatten())
        return {"loss": text_loss + image_loss, "text": text_loss, "image": image_loss}


def main(argv: Sequence[str]) -> int:
    """`unifiedar train unified`: returns the exit code."""
    args = parse(argv)
    if not 0 <= args.drop <= 1:
        raise fail(f"--drop must be from 0 to 1, got {args.drop}")
    if args.batch // max(1, args.accumulate) < 2:
        raise fail(f"--batch must hold at least two pictures a part, got {args.batch} in {args.accumulate}")
    try:
        first = VILAU.from_checkpoint(args.tower, dtype=torch.float32)
    except CheckpointError as error:
        raise fail(f"--tower: {error}") from error
    if first.tokenizer is None:
        raise fail(f"--tower: {args.tower}: there is no tokenizer.json in it; give the model folder of the first stage")

    def make() -> VILAU:
        model = VILAU(first.config, first.tokenizer)
        model.load_state_dict(first.state_dict())
        model.requires_grad_(True)
        model.tower.requires_grad_(False)
        return model

    loop = Loop(args, make)
    train, held_out = load_pictures(args, loop.device, first.image_size)
    probe, kind = (held_out, "held_out") if len(held_out) else (train, "train")
    prompts = [p.captions[i] for p in (train, probe) for i in torch.linspace(0, len(p) - 1, 16).long().tolist()]

    def validate(model: VILAU) -> tuple[dict[str, Any], dict[str, float]]:
        figures = Measure(model, train).named(probe.images, probe.concepts, probe.styles, beams=1)
        kept = {f"{kind}_{k}": figures[k] for k in ("concept", "style")}
        return {"drawn": sheet(model.generate(prompts), 8)}, kept

    return loop.finish(loop.train(_Losses(args, loop, train), validate))
