"""How near a VAR's drawings are to held-out pictures: what `unifiedar bench quality` measures of a folder with a VAR.

The Frechet distance (Heusel et al., arXiv:1706.08500, section 3) between features of drawings and of pictures that
training never saw, as normal distributions. The published FID has features of an Inception network trained on
ImageNet's photographs; these are those of a vision tower that ships here and knows drawings, so that figures compare
with each other, not with published ones. Few pictures are held out, which lifts every distance to them: what real
pictures of the same classes come to is given beside it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unifiedar.models import VAR, VILAU
from unifiedar.quality import Measure, decibels
from unifiedar.train.batches import Pictures

__all__ = ["frechet_distance", "logit_cost", "measure_drawn", "sampling", "sizes"]


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of the means m and covariances S of two sets, in float64.

    Args:
        x: (N, C), any float dtype, two rows or more.
        y: (M, C), likewise.

    Returns:
        The (squared) distance, at least 0. Covariances are unbiased (divided by N - 1), as in the published code.

    Raises:
        ValueError: for other shapes, or values that are not finite.

    Note:
        The trace of the root is the sum of the singular values of A_x A_y^T, of centred rows A with S = A^T A: no root
        of a covariance is taken, so that one without full rank costs no precision.
    """
    for name, one in (("x", x), ("y", y)):
        if one.ndim != 2 or len(one) < 2 or one.shape[1] != x.shape[1]:
            raise ValueError(
                f"frechet_distance: {name} must be (at least 2, C), of one C for both, got {tuple(one.shape)}"
            )
        if not one.isfinite().all():
            raise ValueError(f"frechet_distance: {name} must be finite, got inf or nan")
    means, roots, spread = [], [], 0.0
    for one in (x.double(), y.double()):
        means.append(one.mean(0))
        rows = (one - means[-1]) / math.sqrt(len(one) - 1)
        spread += float(rows.square().sum())
        roots.append(torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, float((means[0] - means[1]).square().sum()) + spread - 2 * float(shared))


def logit_cost(exact: Tensor, other: Tensor) -> dict[str, float]:
    """What coarser weights change in logits (..., K) of the same codes.

    Returns:
        "largest" and "mean" absolute difference, beside the "deviation" of the exact logits from their mean in a row;
        "same_code", the share of rows with the same largest logit; "divergence", the mean of KL(exact, other) in nats.
    """
    exact, other = exact.double().flatten(0, -2), other.double().flatten(0, -2)
    difference = (other - exact).abs()
    log_p, log_q = exact.log_softmax(1), other.log_softmax(1)
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "deviation": float(exact.var(1, correction=0).mean().sqrt()),
        "same_code": float((exact.argmax(1) == other.argmax(1)).double().mean()),
        "divergence": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
    }


def _eight_bits(model: VAR, pictures: Pictures, labels: Tensor, batch: int) -> dict[str, dict[str, float]]:
    """`logit_cost` of each form of 8 bits, teacher-forced on pictures (at most 256) of labels (N,)."""
    count = min(256, len(labels))
    parts = torch.arange(count).split(batch)
    coded = [model.encode(pictures.images[part.to(pictures.images.device)]) for part in parts]

    @torch.no_grad()
    def logits(one: VAR) -> Tensor:
        pairs = zip(parts, coded, strict=True)
        return torch.cat([one.teacher_forced(labels[part], codes).cpu() for part, codes in pairs])

    exact = logits(model)
    forms = ("int8", "fp8")
    return {form: logit_cost(exact, logits(copy.deepcopy(model).quantize_weights(form))) for form in forms}


def sampling(model: VAR, *, cfg: float = 1.5, top_k: int | None = None, top_p: float = 0.96) -> dict[str, Any]:
    """Settings of `VAR.generate`, by default those of the published FID, with no more codes than there are."""
    return {"cfg": cfg, "top_k": min(900, model.config.num_codes) if top_k is None else top_k, "top_p": top_p}


class _Classes:
    """Which class of the model each picture of a set is of: its concept's or its style's."""

    def __init__(self, model: VAR, pictures: Sequence[Pictures]):
        labels = {name: i for i, name in enumerate(model.class_names)}
        for kind in ("concept", "style"):
            found = [[labels.get(name, -1) for name in _names(one, kind)] for one in pictures]
            if all(label >= 0 for part in found for label in part):
                self.kind, self.of = kind, [torch.tensor(part, dtype=torch.int64) for part in found]
                return
        raise ValueError("the model's classes must be the concepts or the styles of the pictures")


def _names(pictures: Pictures, kind: str) -> list[str]:
    if kind == "concept":
        return [pictures.concept_names[i] for i in pictures.concepts.tolist()]
    return [pictures.style_names[i] for i in pictures.styles.tolist()]


def measure_drawn(
    model: VAR,
    judge: VILAU,
    train: Pictures,
    held_out: Pictures,
    *,
    rounds: int,
    batch: int,
    settings: dict[str, Any],
    exact: VAR | None = None,
    progress: Callable[[int], object] = int,
) -> tuple[dict[str, Any], tuple[Tensor, list[str]]]:
    """Figures of a VAR, and pictures to look at.

    Args:
        model: with its tokenizer and names of classes, those of the pictures.
        judge: whose vision tower makes the features, and which names the drawings; its pictures have the same size.
        train: what the model was trained on, of the styles that it knows.
        held_out: two pictures or more that it was not.
        rounds: drawings of the class of each held-out picture; round r has the seed r.
        batch: pictures at a time; it changes what a seed draws (see `VAR.generate`).
        settings: cfg, top_k and top_p of `VAR.generate`.
        exact: the model before its weights were rounded, with its tokenizer, if it is one whose were.
        progress: called with the number of pictures finished since the last call.

    Returns:
        Figures, as plain values:
            "classes": "concept" or "style"; "drawn": how many drawings there are
            "frechet": distances to the held-out pictures: of the drawings ("drawn"), of the training pictures of the
                same classes ("seen"), of the held-out pictures themselves after tokenizer and back ("rebuilt"); and of
                the drawings to the training pictures of the same classes ("drawn_to_seen")
            "rebuilt": peak signal-to-noise ratios of the tokenizer, in dB, and the share of its codes that the training
                pictures use
            "eight_bits": what weights of 8 bits change in the logits of the held-out pictures' codes (`logit_cost`), of
                `exact` if there is one
            "named", "seen_named": shares of drawings (of the first round), and of training pictures of the same
                classes, that the judge names right, if classes are concepts
        And a sheet's pictures (N, 3, S, S) uint8 with their texts: of sixteen classes or fewer a training picture and
        three drawings each.

    Raises:
        ValueError: for classes that are neither concepts nor styles of the pictures, or pictures of other sizes.
    """
    vae = model._tokenizer("measure_drawn")
    size = vae.downsample * model.config.sizes[-1][0]
    if size != judge.image_size:
        raise ValueError(f"the judge must take pictures of {size} pixels, as the model draws, got {judge.image_size}")
    classes = _Classes(model, (train, held_out))
    seen_labels, labels = classes.of
    same = torch.isin(seen_labels, labels).nonzero()[:, 0]
    if len(labels) < 2 or len(same) < 2:
        raise ValueError(f"two pictures or more must be held out, and two trained on, got {len(labels)}, {len(same)}")
    judged = Measure(judge, train, batch=batch, progress=progress)

    def features(images: Tensor) -> Tensor:
        parts = judged._parts(len(images))
        return torch.cat([judge.pool(images[part.to(images.device)]).double().cpu() for part in parts])

    drawn = []
    for seed in range(rounds):
        drawn.append(model.generate(labels, seed=seed, images_per_call=batch, **settings).cpu())
        progress(len(labels))
    pictures = torch.cat(drawn)

    rebuilt, used = [], torch.zeros(model.config.num_codes, dtype=torch.bool)
    ratios: dict[str, float] = {}
    for name, one in (("held_out", held_out), ("seen", train)):
        again = []
        for part in judged._parts(len(one)):
            painted, codes = vae.reconstruct(one.images[part.to(one.images.device)])
            again.append(painted.cpu())
            if name == "seen":
                used[torch.cat(codes, 1).flatten().cpu()] = True
        rebuilt.append(torch.cat(again))
        ratios |= {f"{name}_{key}": value for key, value in decibels(one.images.cpu(), rebuilt[-1]).items()}

    real = train.images[same.to(train.images.device)]
    seen, other = features(real), features(held_out.images)
    mine = features(pictures)
    figures: dict[str, Any] = {
        "classes": classes.kind,
        "drawn": len(pictures),
        "frechet": {
            "drawn": frechet_distance(mine, other),
            "seen": frechet_distance(seen, other),
            "rebuilt": frechet_distance(features(rebuilt[0]), other),
            "drawn_to_seen": frechet_distance(mine, seen),
            "seen_pictures": len(real),
        },
        "rebuilt": {**ratios, "codes_used": float(used.double().mean())},
        "eight_bits": _eight_bits(exact or model, held_out, labels, batch),
    }
    if classes.kind == "concept":
        first, concepts = pictures[: len(labels)], held_out.concepts.cpu()
        # A drawing of a thing has whatever style; the judge is not asked for it.
        found = judged.named(first, concepts, held_out.styles.cpu()) | judged.nearest_text(first, concepts)
        there = train.concepts.cpu()[same]
        given = judged.named(real, there, train.styles.cpu()[same]) | judged.nearest_text(real, there)
        for name, shares in (("named", found), ("seen_named", given)):
            figures[name] = {key: value for key, value in shares.items() if key != "style"}
    return figures, _sheet(model, train, seen_labels, settings)


def _sheet(model: VAR, train: Pictures, labels: Tensor, settings: dict[str, Any]) -> tuple[Tensor, list[str]]:
    found = labels.unique()
    chosen = found[torch.linspace(0, len(found) - 1, min(16, len(found))).long()]
    pictures, texts = [], []
    for label in chosen.tolist():
        of_class = (labels == label).nonzero()[0]
        drawn = model.generate([label] * 3, seed=0, **settings).cpu()
        pictures += [train.images[of_class.to(train.images.device)].cpu(), drawn]
        texts += [model.class_names[label], *[f"seed 0, {i + 1}" for i in range(3)]]
    return torch.cat(pictures), texts


def sizes(model: VAR, folder: Path) -> dict[str, Any]:
    """What a card says of a model's size: parameters of both parts, bytes of the folder, scales, codes."""
    vae = model._tokenizer("sizes")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer_parameters": sum(p.numel() for p in vae.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "scales": [list(size) for size in model.config.sizes],
        "codes": model.config.num_codes,
        "code_dim": model.config.code_dim,
        "depth": model.config.depth,
        "dim": model.config.dim,
        "num_classes": model.config.num_classes,
        "downsample": vae.downsample,
    }
