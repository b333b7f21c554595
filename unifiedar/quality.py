"""The figures of a model card, recomputed: `unifiedar bench quality --data FOLDER`.

Held-out pictures are drawings of a known thing in a known style that training never saw together
(`unifiedar.data.emoji.held_out`). Every figure is a share of pictures unless its name says otherwise. Of a VAR see
`unifiedar.quality_drawn`.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unifiedar.checkpoints import CheckpointError, read_config, resolve
from unifiedar.devices import add_device_argument, usable_device
from unifiedar.models import VAR, VILAU
from unifiedar.train.batches import Pictures, pad_ids

__all__ = ["Measure", "decibels", "main", "measure", "parse_answer"]

_ANSWER = re.compile(r"(?P<concept>.*), (?P<style>\S+) style")


def parse_answer(answer: str) -> tuple[str, str]:
    """Concept and style of a caption; a text of another form is a concept without a style."""
    match = _ANSWER.fullmatch(answer)
    return (match["concept"], match["style"]) if match else (answer, "")


def decibels(images: Tensor, rebuilt: Tensor) -> dict[str, float]:
    """Peak signal-to-noise ratio of pictures (N, 3, S, S) uint8, dB: mean over them, and that of the mean error."""
    pairs = zip(images.split(64), rebuilt.split(64), strict=True)
    error = torch.cat([(other.double() - one.double()).square().mean(dim=(1, 2, 3)) for one, other in pairs])
    each = 10 * torch.log10(255.0**2 / error.clamp(min=1e-3))
    return {
        "psnr_db": float(each.mean()),
        "psnr_of_mean_error_db": float(10 * torch.log10(255.0**2 / error.mean())),
    }


class Measure:
    """Figures of one model over batches of pictures.

    Args:
        model: with its tokenizer, in eval mode.
        names: pictures whose concepts are all the names there are.
        batch: pictures at a time.
        progress: called with the number of pictures finished since the last call.
    """

    def __init__(self, model: VILAU, names: Pictures, *, batch: int = 64, progress: Callable[[int], object] = int):
        self.model, self.batch, self.progress = model, batch, progress
        self.concept_names, self.style_names = names.concept_names, names.style_names
        length = model.config.vision.text_positions
        ids = pad_ids([model.token_ids(name) for name in self.concept_names], length).to(model.device)
        with torch.no_grad():
            self.texts = torch.cat([model.tower.siglip_model.embed_text(part) for part in ids.split(1024)])

    def _parts(self, count: int) -> Iterator[Tensor]:
        for part in torch.arange(count).split(self.batch):
            yield part
            self.progress(len(part))

    def rebuilt(self, images: Tensor) -> dict[str, float]:
        """`decibels` after `reconstruct`."""
        rebuilt = []
        for part in self._parts(len(images)):
            rebuilt.append(self.model.reconstruct(images[part.to(images.device)].cpu())[0])
        return decibels(images.cpu(), torch.cat(rebuilt))

    def codes_used(self, images: Tensor) -> float:
        """Share of the codebook's entries that the pictures use, at any depth."""
        used = torch.zeros(self.model.config.num_codes, dtype=torch.bool)
        for part in self._parts(len(images)):
            used[self.model.encode(images[part.to(images.device)].cpu()).flatten()] = True
        return float(used.float().mean())

    @torch.no_grad()
    def nearest_text(self, images: Tensor, concepts: Tensor) -> dict[str, float]:
        """How often the tower's nearest concept name, or one of its nearest five, is the right one."""
        ranks = []
        for part in self._parts(len(images)):
            pooled = self.model.pool(images[part.to(images.device)])
            ranks.append((pooled @ self.texts.T).topk(min(5, len(self.texts))).indices.cpu())
        right = torch.cat(ranks) == concepts.cpu()[:, None]
        return {
            "nearest_text_concept": float(right[:, 0].double().mean()),
            "nearest_text_concept_in_five": float(right.any(dim=1).double().mean()),
        }

    def named(self, images: Tensor, concepts: Tensor, styles: Tensor, *, beams: int = 10) -> dict[str, float]:
        """What `describe` says of pictures whose content is known: the best answer, and the first five concepts."""
        first = five = style = 0
        for part in self._parts(len(images)):
            answers = self.model.describe(images[part.to(images.device)].cpu(), answers=beams, beams=beams)
            for i, found in zip(part.tolist(), answers, strict=True):
                parsed = [parse_answer(text) for text, _ in found]
                distinct = list(dict.fromkeys(concept for concept, _ in parsed))
                truth = self.concept_names[int(concepts[i])]
                first += distinct[0] == truth
                five += truth in distinct[:5]
                style += parsed[0][1] == self.style_names[int(styles[i])]
        n = len(images)
        return {"pictures": n, "concept": first / n, "concept_in_five": five / n, "style": style / n}

    def drawn(self, pictures: Pictures, index: Sequence[int], guidance: float) -> tuple[dict[str, float], Tensor]:
        """Draw the captions of the chosen pictures, each with its index as seed, and name the drawings."""
        images = []
        for part in self._parts(len(index)):
            chosen = [index[i] for i in part.tolist()]
            images.append(self.model.generate([pictures.captions[i] for i in chosen], guidance=guidance, seed=chosen))
        together, place = torch.cat(images), torch.tensor(list(index))
        concepts, styles = pictures.concepts.cpu()[place], pictures.styles.cpu()[place]
        return self.named(together, concepts, styles) | self.nearest_text(together, concepts), together


def measure(
    model: VILAU, train: Pictures, held_out: Pictures, *, sample: int, batch: int, progress: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All figures, and the drawn pictures behind them.

    Args:
        model: with its tokenizer.
        train, held_out: the two parts of the set, neither empty, in the styles that the model was trained on.
        sample: how many of the training pictures to name and rebuild (all have their codes counted; as many are drawn
            as are held out).
        batch: pictures at a time.
        progress: show a bar.

    Returns:
        Figures by name, and drawn pictures (N, 3, S, S) uint8 by "seen" or "held_out" and guidance.
    """
    seen = torch.linspace(0, len(train) - 1, min(sample, len(train))).long().unique().tolist()
    missing = list(range(len(held_out)))
    draw_seen = seen[:: max(1, len(seen) // max(1, len(missing)))][: max(1, len(missing))]
    total = len(train) + 3 * (len(seen) + len(missing)) + 6 * (len(draw_seen) + len(missing))
    with tqdm(total=total, unit="picture", disable=not progress, file=sys.stderr) as bar:
        m = Measure(model, train, batch=batch, progress=bar.update)

        def known(part: Pictures, index: list[int]) -> dict[str, float]:
            place = torch.tensor(index)
            images, concepts = part.images[place.to(part.images.device)], part.concepts.cpu()[place]
            named = m.named(images, concepts, part.styles.cpu()[place])
            return m.rebuilt(images) | named | m.nearest_text(images, concepts)

        figures: dict[str, Any] = {
            "codes_used": m.codes_used(train.images),
            "seen": known(train, seen),
            "held_out": known(held_out, missing),
        }
        pictures: dict[str, Tensor] = {}
        for guidance in (1.0, 3.0):
            for name, part, index in (("seen", train, draw_seen), ("held_out", held_out, missing)):
                key = f"drawn_{name}_guidance_{guidance:g}"
                figures[key], pictures[key] = m.drawn(part, index, guidance)
    return figures, pictures


def main(argv: Sequence[str]) -> int:
    """`unifiedar bench quality`: prints the figures as JSON, returns the exit code."""
    parser = argparse.ArgumentParser(prog="unifiedar bench quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `unifiedar data emoji`")
    parser.add_argument("--model", default="emoji", help="a name that ships, a folder or a file (default: emoji)")
    parser.add_argument("--styles", nargs="+", default=["noto", "twemoji", "fluent"], help="styles it was trained on")
    parser.add_argument("--sample", type=int, default=512, help="training pictures to look at (default: 512)")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (default: 64)")
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, help="folder for quality.json and the sheets of drawn pictures")
    only = parser.add_argument_group("a VAR (a folder with its tokenizer)")
    only.add_argument("--judge", help="the model whose tower makes features, and which names drawings (default: emoji)")
    only.add_argument("--exact", help="the folder it was made from: what 8 bits cost is told of that (default: itself)")
    only.add_argument("--rounds", type=int, help="drawings of the class of each held-out picture (default: 8)")
    only.add_argument("--guidance", type=float, help="strength, 1 being none (default: 2.5, published as cfg 1.5)")
    only.add_argument("--top-k", type=int, help="codes to draw from (default: 900)")
    only.add_argument("--top-p", type=float, help="share of probability to draw from (default: 0.96)")
    args = parser.parse_args(argv)
    if min(args.sample, args.batch, 1 if args.rounds is None else args.rounds) < 1:
        parser.error("--sample, --batch and --rounds must be at least 1")
    started = time.monotonic()
    try:
        device = torch.device(usable_device(args.device))
        found = resolve(args.model)
        draws = found.is_dir() and read_config(found).get("model") == "var"
        figures, sheets = (_of_var if draws else _of_vilau)(args, found, device)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"unifiedar bench quality: {error}", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {
        "model": str(args.model),
        "styles": args.styles,
        **figures.pop("data"),
        "device": name,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started, 1),
        **figures,
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        from unifiedar.images import contact_sheet

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
        for sheet, (pictures, texts) in sheets.items():
            contact_sheet(pictures, 8, texts).save(args.out / f"{sheet}.png")
    return 0


# What a kind of model is measured by: its figures, those of the data among them, and sheets: pictures and their texts.
_Result = tuple[dict[str, Any], dict[str, tuple[Tensor, list[str] | None]]]


def _load(args: argparse.Namespace, device: torch.device, size: int) -> tuple[Pictures, Pictures, dict[str, int]]:
    train, held_out = Pictures.load(args.data, args.styles, device, size)
    if not len(held_out):
        raise ValueError(f"{args.data}: none of its pictures is held out, so there is nothing to test on")
    return train, held_out, {"training_pictures": len(train), "concepts": len(train.concept_names)}


def _of_vilau(args: argparse.Namespace, found: Path, device: torch.device) -> _Result:
    for name in ("judge", "exact", "rounds", "guidance", "top_k", "top_p"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: only a VAR is measured with it, and {found} is none")
    model = VILAU.from_checkpoint(found, device=device)
    train, held_out, data = _load(args, device, model.image_size)
    figures, pictures = measure(
        model, train, held_out, sample=args.sample, batch=args.batch, progress=sys.stderr.isatty()
    )
    sheets: dict[str, tuple[Tensor, list[str] | None]] = {}
    for guidance in ("1", "3"):
        halves = [pictures[f"drawn_{part}_guidance_{guidance}"] for part in ("seen", "held_out")]
        rows = [x[torch.linspace(0, len(x) - 1, min(32, len(x))).long()] for x in halves]
        sheets[f"drawn-guidance-{guidance}"] = (torch.cat(rows), None)
    return {"data": data, **figures}, sheets


def _of_var(args: argparse.Namespace, found: Path, device: torch.device) -> _Result:
    from unifiedar import quality_drawn

    if args.guidance is not None and not args.guidance >= 1:
        raise ValueError(f"--guidance: must be at least 1, which is none, got {args.guidance:g}")
    model = VAR.from_checkpoint(found, device=device)
    if model.vae is None:
        raise ValueError(f"{found}: has no tokenizer in it, without which it draws nothing; `save_whole` writes both")
    name = args.judge or "emoji"
    judge = VILAU.from_checkpoint(name, device=device)
    train, held_out, data = _load(args, device, judge.image_size)
    settings = quality_drawn.sampling(
        model,
        cfg=1.5 if args.guidance is None else args.guidance - 1,
        top_k=args.top_k,
        top_p=0.96 if args.top_p is None else args.top_p,
    )
    with tqdm(unit="picture", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        figures, sheet = quality_drawn.measure_drawn(
            model,
            judge,
            train,
            held_out,
            exact=None if args.exact is None else VAR.from_checkpoint(args.exact, device=device),
            rounds=args.rounds or 8,
            batch=args.batch,
            settings=settings,
            progress=bar.update,
        )
    vision = judge.config.vision
    about = {
        "kind": "var",
        "sizes": quality_drawn.sizes(model, found),
        "features": {"network": name, "of": "unit vectors of the vision tower", "width": vision.hidden_size},
        "sampling": settings,
    }
    return {"data": data | {"held_out_pictures": len(held_out)}, **about, **figures}, {"drawn": sheet}
