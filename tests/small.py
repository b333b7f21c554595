"""A VILA-U of a few thousand parameters, and a few drawn pictures to train it on."""

import json
from pathlib import Path

import numpy as np
import torch

from unifiedar.models import VILAU, VILAUConfig
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.models.llama import LlamaConfig
from unifiedar.models.siglip import SiglipConfig
from unifiedar.tokenizer import TextTokenizer, train_tokenizer

# The committed list holds out the axe in noto's style and the tramway in twemoji's.
CONCEPTS = ("axe", "aerial tramway", "red disc", "green disc", "blue disc", "red square")
STYLES = ("noto", "twemoji")


def small_config(*, shared_codebook: bool = True) -> VILAUConfig:
    """16-pixel pictures, a 4 x 4 grid of 3 codes."""
    return VILAUConfig(
        vision=SiglipConfig(16, 4, 32, 64, 3, 2, 1, 2, 64, 300, 16),
        decoder=DecoderConfig(32, (1, 1, 2), 1, 32, 16, (4,)),
        language=LlamaConfig(300, 48, 96, 2, 3, 64),
        num_codes=24,
        depth=3,
        shared_codebook=shared_codebook,
        depth_dim=32,
        depth_layers=2,
        depth_heads=2,
    )


def small_tokenizer() -> TextTokenizer:
    """300 ids, learned from the captions of `write_pictures`."""
    # A vocabulary of exactly 300 needs enough different pairs to merge.
    words = [f"{c}, {s} style" for c in CONCEPTS for s in STYLES] + ["quick brown foxes jump over lazy dogs"]
    tokenizer = train_tokenizer(words, 300)
    assert tokenizer.vocab_size == 300
    return tokenizer


def small_model(seed: int = 0, **kwargs: bool) -> VILAU:
    """In eval mode, weights from a seed."""
    torch.manual_seed(seed)
    return VILAU(small_config(**kwargs), small_tokenizer()).eval()


def write_pictures(folder: Path) -> Path:
    """A folder as `unifiedar data emoji` makes it: a disc or a square of one colour for each concept and style."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:16, :16] - 7.5
    images, pictures = [], []
    colours = np.random.default_rng(0).integers(0, 200, (len(CONCEPTS), 3))
    for concept, colour in zip(CONCEPTS, colours, strict=True):
        for style in STYLES:
            radius = 6 if style == "noto" else 4
            inside = x**2 + y**2 < radius**2 if "disc" in concept else np.maximum(abs(x), abs(y)) < radius
            image = np.full((16, 16, 3), 255, np.uint8)
            image[inside] = colour
            images.append(image)
            pictures.append({"concept": concept, "style": style, "icon": concept.replace(" ", "-")})
    np.save(folder / "images.npy", np.stack(images))
    index = {"version": 1, "size": 16, "sources": [], "left_out": [], "pictures": pictures}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
