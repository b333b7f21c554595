"""`python -m bench card`: the model card of the small VAR, written from measured figures and nothing else.

Given the folder that docs/recipes/var.sh filled, its figures, its sheet and the last lines of its logs are taken into
`docs` first. The page is then written from what is there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench._results import ROOT

__all__ = ["CardError", "render", "take", "write"]

FIGURES, SHEET, PAGE = "quality/var-emoji.json", "images/var-drawn.png", "model-card-var.md"
STAGES = ("vae", "var")


class CardError(ValueError):
    """Figures that are missing, or are not those of a VAR; one line."""


def take(folder: Path, docs: Path = ROOT / "docs") -> None:
    """Bring what a run of the recipe measured into `docs`; CardError if something is missing."""
    figures = _read(folder / "quality" / "quality.json")
    figures["training"] = {}
    for stage in STAGES:
        lines = _lines(folder / stage / "log.jsonl")
        trained = [line for line in lines if "learning_rate" in line]
        tested = [line for line in lines if "learning_rate" not in line]
        if not trained:
            raise CardError(f"{folder / stage / 'log.jsonl'}: holds no step of training")
        figures["training"][stage] = trained[-1] | (tested[-1] if tested else {})
    sheet = folder / "quality" / "drawn.png"
    if not sheet.is_file():
        raise CardError(f"{sheet}: no such file; `unifiedar bench quality --out` writes it")
    for name in (FIGURES, SHEET):
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
    (docs / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    shutil.copyfile(sheet, docs / SHEET)


def write(docs: Path = ROOT / "docs") -> Path:
    """Write the page into `docs`; returns its path. CardError without figures."""
    path = docs / PAGE
    path.write_text(render(_read(docs / FIGURES)))
    return path


def render(figures: dict[str, Any]) -> str:
    """The page's text."""
    try:
        return _page(figures)
    except (KeyError, TypeError, ValueError) as error:
        raise CardError(f"figures are not those of `unifiedar bench quality` for a VAR: {error!r:.80}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CardError(f"{path}: cannot be read ({type(error).__name__}); docs/recipes/var.sh makes it") from error
    if not isinstance(value, dict):
        raise CardError(f"{path}: must hold an object")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise CardError(f"{path}: cannot be read ({type(error).__name__}); docs/recipes/var.sh makes it") from error


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _table(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _page(one: dict[str, Any]) -> str:
    sizes, frechet, rebuilt, sampling = one["sizes"], one["frechet"], one["rebuilt"], one["sampling"]
    side = sizes["scales"][-1][0] * sizes["downsample"]
    scales = ", ".join(str(h) if h == w else f"{h} x {w}" for h, w in sizes["scales"])
    codes = sum(h * w for h, w in sizes["scales"])
    lines = [
        "# Model card: the small VAR",
        "",
        "Written by `python -m bench card` from " + f"[{FIGURES}]({FIGURES}); do not edit.",
        "",
        f"![Sixteen classes: a picture from training, then three drawings]({SHEET})",
        "",
        f"A VAR of {sizes['parameters'] / 1e6:.1f} million parameters over a tokenizer of "
        f"{sizes['tokenizer_parameters'] / 1e6:.1f} million that draws {sizes['num_classes']:,} {one['classes']}s, "
        f"{side} x {side} pixels. Above: classes at even distances in their list, each with a picture from training "
        "and three drawings, seed 0.",
        "",
        *_table(
            [
                ["", ""],
                ["codes", f"{codes} a picture, of maps of side {scales}; one table of {sizes['codes']:,}"],
                ["transformer", f"{sizes['depth']} blocks of width {sizes['dim']}"],
                ["weights", f"{sizes['bytes'] / 2**20:.1f} MiB"],
                ["sampling", f"cfg {sampling['cfg']:g}, top-k {sampling['top_k']}, top-p {sampling['top_p']:g}"],
            ]
        ),
        "",
        "## Data",
        "",
        f"{one['training_pictures']:,} pictures of {one['concepts']:,} things in the styles "
        f"{', '.join(one['styles'])}, as `unifiedar data emoji` renders them; {one['held_out_pictures']} more, each a "
        "known thing in a known style that training never saw together, are held out. Sets and licences are those of "
        "the [model emoji](../MODEL_CARD.md).",
        "",
        *_training(one.get("training", {})),
        "## Figures",
        "",
        "Recomputed by `unifiedar bench quality --model FOLDER --data FOLDER`"
        f" ({one['seconds']:.0f} s on {one['device']}, torch {one['torch']}).",
        "",
        f"Fréchet distance in float64 over {one['features']['of']} of the model `{one['features']['network']}`, "
        f"{one['features']['width']} channels, **not** Inception: it compares with nothing but figures of the same "
        f"network. {one['held_out_pictures']} pictures are few for it, which lifts all distances to them; real "
        "pictures of the same classes, in the styles that training has of them, show what is left at best.",
        "",
        *_table(
            [
                ["to the held-out pictures", "pictures", "distance"],
                ["drawn", f"{one['drawn']:,}", f"{frechet['drawn']:.4f}"],
                ["training pictures of the same classes", f"{frechet['seen_pictures']:,}", f"{frechet['seen']:.4f}"],
                [
                    "held-out pictures rebuilt by the tokenizer",
                    str(one["held_out_pictures"]),
                    f"{frechet['rebuilt']:.4f}",
                ],
            ]
        ),
        "",
        f"From drawings to the training pictures of the same classes it is {frechet['drawn_to_seen']:.4f}.",
        "",
        *_table(
            [
                ["tokenizer", "training pictures", "held-out pictures"],
                *[
                    [text, *[f"{rebuilt[f'{part}_{key}']:.1f} dB" for part in ("seen", "held_out")]]
                    for text, key in (
                        ("PSNR, mean over pictures", "psnr_db"),
                        ("PSNR of the mean error", "psnr_of_mean_error_db"),
                    )
                ],
                ["codes in use", _share(rebuilt["codes_used"]), ""],
            ]
        ),
        "",
    ]
    cost = one["eight_bits"]
    rows = [["weights", "largest", "mean", "same likeliest code", "divergence, nats"]]
    for form, found in cost.items():
        values = [
            f"{found['largest']:.3f}",
            f"{found['mean']:.4f}",
            _share(found["same_code"]),
            f"{found['divergence']:.5f}",
        ]
        rows.append([form, *values])
    lines += [
        "With `VAR.quantize_weights`, the change of logits, teacher-forced on the held-out pictures, whose standard "
        f"deviation in a row is {next(iter(cost.values()))['deviation']:.2f}:",
        "",
        *_table(rows),
        "",
    ]
    if "int8" in cost and cost["int8"]["largest"] == 0:
        lines += ["The weights measured are integers of 8 bits already, so that this form of them changes nothing.", ""]
    if "named" in one:
        drawn, seen = one["named"], one["seen_named"]
        rows = [["", f"drawings ({drawn['pictures']})", f"training pictures of the same things ({seen['pictures']})"]]
        for key, text in (
            ("concept", "named right, first answer"),
            ("concept_in_five", "among the first five"),
            ("nearest_text_concept", "the tower's nearest text is the thing"),
            ("nearest_text_concept_in_five", "among the nearest five"),
        ):
            rows.append([text, _share(drawn[key]), _share(seen[key])])
        lines += [f"What the model `{one['features']['network']}` calls them, of {one['concepts']:,} things:", ""]
        lines += [*_table(rows), ""]
    return "\n".join(lines)


def _training(stages: dict[str, dict[str, Any]]) -> list[str]:
    if not stages:
        return []
    names = {"vae": "tokenizer", "var": "VAR"}
    rows = [["stage", "steps", "pictures a second", "last losses"]]
    for stage in STAGES:
        last = stages[stage]
        keys = ("loss", "accuracy", "held_out_loss", "held_out_accuracy", "held_out_psnr_db")
        found = [f"{key} {last[key]:.4g}" for key in keys if key in last]
        rows.append([names[stage], f"{last['step']:,}", f"{last['pictures_per_second']:,.0f}", ", ".join(found)])
    lines = ["## Training", "", "As [the recipe](recipes/var.sh) does it:", "", *_table(rows), ""]
    scales = [key for key in stages["var"] if key.startswith("scale_") and key.endswith("_loss")]
    if scales:
        head = ["last step, by scale", *[str(i + 1) for i in range(len(scales))]]
        body = [
            [kind, *[f"{stages['var'][f'scale_{i}_{kind}']:.3g}" for i in range(len(scales))]]
            for kind in ("loss", "accuracy")
        ]
        lines += [*_table([head, *body]), ""]
    return lines
