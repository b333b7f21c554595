"""Second stage: language model, projector and depth transformer on a frozen tower (VILA-U, section 3.2).

Two forms, [text, picture] and [picture, text], loss on the second modality alone: cross-entropy of the text tokens plus
cross-entropy of the codes, both with weight 1. A tenth of the texts in front of pictures are empty, for guidance.

Half of the texts after pictures are asked for what the thing is, the others for its style: these name another thing,
and half of their pictures are collages of two. Otherwise a model that knows its set by heart reads the style off the
name, and gets just those pairs wrong that it never saw. (A remedy in the line of word dropout, Bowman et al.,
arXiv:1511.06349, section 3.1, which hides the words where this contradicts them.)
"""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.checkpoints import CheckpointError
from unifiedar.data.emoji import caption
from unifiedar.models import VILAU
from unifiedar.models.vilau import BOS, EOS, IM_END, IM_START
from unifiedar.quality import Measure
from unifiedar.train.batches import Pictures, augment, collage
from unifiedar.train.loop import Loop, add_arguments, fail, load_pictures, sheet

__all__ = ["Sequences", "main"]

IGNORED = -100
# Share of the texts in front of pictures that leave the style out.
UNSTYLED = 0.1


class Sequences:
    """Token rows of both forms, built once; a batch is an index into them.

    Every row is `length` tokens long, the picture's places hold 0, and `targets[i]` is what state i must predict
    (IGNORED where nothing is asked).

    Args:
        model: with its tokenizer.
        captions: texts of the rows `draw_*`.
        concepts, styles: row c * len(styles) + s of `name_*` and `style_*` is concept c in style s.
        apart: ask for the concept in `name_*` and for the style in `style_*`: the style is what follows the tokens that
            all styles of a concept share. Otherwise `name_*` asks for all of the caption.
        device: of the rows.
    """

    def __init__(
        self,
        model: VILAU,
        captions: Sequence[str],
        concepts: Sequence[str],
        styles: Sequence[str],
        apart: bool,
        device: torch.device,
    ):
        texts = [model.token_ids(text) for text in captions]
        things = [[model.token_ids(caption(concept, style)) for style in styles] for concept in concepts]
        start, end = model.special(IM_START), model.special(IM_END)
        picture = [0] * model.image_tokens
        self.length = max(len(t) for group in (texts, *things) for t in group) + model.image_tokens + 4

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
        seen = [BOS, start, *picture, end]
        shared = [len([*takewhile(lambda at: len(set(at)) == 1, zip(*group, strict=False))]) for group in things]
        cut = [(t, n) for group, n in zip(things, shared, strict=True) for t in group]
        self.name_ids, self.name_targets = rows([(seen, t[:n] if apart else [*t, EOS]) for t, n in cut])
        self.style_ids, self.style_targets = rows([([*seen, *t[:n]], [*t[n:], EOS]) for t, n in cut])
        self.name_begin = 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the stage."""
    parser = argparse.ArgumentParser(prog="unifiedar train unified", description=__doc__)
    add_arguments(parser, steps=8000, batch=512, lr=1.5e-3)
    parser.add_argument("--tower", type=Path, required=True, help="model folder of the first stage")
    parser.add_argument("--drop", type=float, default=0.1, help="share of empty texts before pictures (default: 0.1)")
    parser.add_argument(
        "--swap", type=float, default=0.5, help="share of texts after pictures that name another thing and are asked "
        "for the style, the others then only for the thing; 0: all name theirs and are asked for both (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--collage", type=float, default=0.5, help="share of pasted pictures among those of `--swap` (default: 0.5)"
    )
    parser.add_argument("--augmentation", type=float, default=1.0, help="strength, for pictures to name (default: 1)")
    return parser.parse_args(argv)


class _Losses:
    """Losses of one part of one step: the first half of the rows draw, the second half name."""

    def __init__(self, args: argparse.Namespace, loop: Loop[VILAU], pictures: Pictures):
        self.args, self.loop, self.pictures, self.model = args, loop, pictures, loop.model
        plain = [pictures.concept_names[i] for i in pictures.concepts.tolist()]
        # Row i: caption of picture i; row N + i: without the style; the last row: no text.
        things, styles = pictures.concept_names, pictures.style_names
        captions = [*pictures.captions, *plain, ""]
        self.sequences = Sequences(self.model, captions, things, styles, args.swap > 0, loop.device)
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
        generator = loop.generator(step, part)
        half, count = args.batch // args.accumulate // 2, len(self.pictures)
        draw, name = torch.randint(count, (2, half), generator=generator, device=loop.device)
        u = torch.rand(half, generator=generator, device=loop.device)
        text = torch.where(u < args.drop, 2 * count, torch.where(u < args.drop + UNSTYLED, draw + count, draw))
        codes = self.clean[draw]
        swap = torch.rand(half, generator=generator, device=loop.device) < args.swap
        pasted = swap & (torch.rand(half, generator=generator, device=loop.device) < args.collage)
        concept, style = self.pictures.concepts[name], self.pictures.styles[name]
        with torch.no_grad():
            seen = augment(self.pictures.floats(name), generator, args.augmentation)
            with loop.autocast():
                named = self.encode(collage(seen, style, pasted, generator))
            named = model.tower.quantizer(named.float()).features
        features = torch.cat([model.tower.quantizer.embed(codes), named])
        other = torch.randint(len(self.pictures.concept_names), (half,), generator=generator, device=loop.device)
        row = torch.where(swap, other, concept) * len(self.pictures.style_names) + style
        ids = torch.cat([seq.draw_ids[text], torch.where(swap[:, None], seq.style_ids[row], seq.name_ids[row])])
        asked = torch.where(swap[:, None], seq.style_targets[row], seq.name_targets[row])
        targets = torch.cat([seq.draw_targets[text], asked])
        begin = F.pad(seq.draw_begin[text], (0, half), value=seq.name_begin)
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
    for name in ("drop", "swap", "collage"):
        if not 0 <= getattr(args, name) <= 1:
            raise fail(f"--{name} must be from 0 to 1, got {getattr(args, name)}")
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
