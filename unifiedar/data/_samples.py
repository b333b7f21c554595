"""The pictures that ship: enough to try the models on, and to test them, without building the whole set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from unifiedar.data.emoji import EmojiSet, caption, held_out

CONCEPTS = (
    # one style of each of these is held out
    "aerial tramway",
    "axe",
    "cheese wedge",
    "cocktail glass",
    "cooked rice",
    "books",
    # every style of these is trained on
    "red apple",
    "dog face",
    "rocket",
    "sunflower",
    "octopus",
    "teapot",
)
STYLES = ("noto", "twemoji", "fluent")  # their licences allow shipping under ours; OpenMoji's is share-alike


@dataclass(frozen=True)
class Sample:
    """One shipped picture.

    Attributes:
        name: file name.
        image: (64, 64, 3) uint8 RGB.
        concept, style: what it shows, and in whose hand.
        split: "train" or "held out".
        licence: SPDX id of the drawing's licence; samples/LICENSES.md names its authors.
    """

    name: str
    image: np.ndarray
    concept: str
    style: str
    split: str
    licence: str

    @property
    def caption(self) -> str:
        """The caption, style included."""
        return caption(self.concept, self.style)


def samples() -> list[Sample]:
    """The pictures that ship with the package, in a fixed order."""
    folder = resources.files("unifiedar.data").joinpath("samples")
    found = []
    for entry in json.loads(folder.joinpath("samples.json").read_text(encoding="utf-8")):
        with folder.joinpath(entry["name"]).open("rb") as file, Image.open(file) as picture:
            found.append(Sample(image=np.asarray(picture.convert("RGB")), **entry))
    return found


def write_samples(emoji: EmojiSet, folder: str | Path) -> int:
    """Write the pictures of `CONCEPTS` in `STYLES` and samples.json into a folder: how the shipped ones were made.

    Returns the number of pictures. Raises ValueError where the set lacks one of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    row = {pair: i for i, pair in enumerate(emoji.pairs)}
    licence = {source["style"]: source["licence"] for source in emoji.sources}
    entries = []
    for concept in CONCEPTS:
        for style in STYLES:
            if (concept, style) not in row:
                raise ValueError(
                    f"write_samples: the set must hold every sample, got none of {caption(concept, style)!r}"
                )
            name = f"{concept.replace(' ', '-')}.{style}.png"
            Image.fromarray(emoji.images[row[concept, style]]).save(folder / name, optimize=True)
            split = "held out" if (concept, style) in held_out() else "train"
            entries.append(
                {"name": name, "concept": concept, "style": style, "split": split, "licence": licence[style]}
            )
    (folder / "samples.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return len(entries)
