"""Captioned pictures on the training device, and the augmentations, all in batched tensor arithmetic.

A few thousand small pictures fit any GPU, so there is no loader process: a batch is an index. Every draw comes from a
generator seeded by (seed, step, rank), so that a resumed run sees what the uninterrupted one would have seen.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unifiedar.data import emoji
from unifiedar.tokenizer import TextTokenizer

__all__ = ["Pictures", "augment", "collage", "pad_ids", "step_generator", "step_seed"]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one step of one rank, for runs of up to a million steps on up to a thousand ranks its own."""
    return (seed * 1_000_003 + step) * 1_009 + rank


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """Generator for one step of one rank: no state has to be saved to repeat it."""
    return torch.Generator(device).manual_seed(step_seed(seed, step, rank))


def pad_ids(rows: list[list[int]], length: int) -> Tensor:
    """Token ids (N, length) int64, cut or padded with 0 at the right."""
    out = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row[:length])
    return out


@dataclass
class Pictures:
    """Pictures with what is on them.

    Attributes:
        images: (N, 3, S, S) uint8.
        concepts, styles: (N,) int64, indices into `concept_names` and `style_names`.
        captions: N texts, "red apple, noto style".
    """

    images: Tensor
    concepts: Tensor
    styles: Tensor
    captions: list[str]
    concept_names: list[str]
    style_names: list[str]

    @classmethod
    def load(
        cls, path: Path, styles: list[str] | None, device: torch.device, size: int
    ) -> tuple["Pictures", "Pictures"]:
        """Training and held-out pictures of a folder made by `unifiedar data emoji`, in all styles or the given.

        Raises:
            ValueError: one line, for a folder without such pictures, or with pictures that are not `size` pixels wide.
        """
        data = emoji.load(path)
        if data.images.shape[1] != size:
            raise ValueError(f"{path}: pictures must be {size} pixels wide for this model, got {data.images.shape[1]}")
        train, held_out = (part.tolist() for part in emoji.split(data, styles))
        if not train:
            raise ValueError(
                f"{path}: no pictures to train on in the styles asked for ({', '.join(styles or ['all'])})"
            )
        concept_names = sorted({data.concepts[i] for i in train + held_out})
        style_names = sorted({data.styles[i] for i in train + held_out})
        concept_ids = {name: i for i, name in enumerate(concept_names)}
        style_ids = {name: i for i, name in enumerate(style_names)}

        def part(index: list[int]) -> "Pictures":
            images = torch.from_numpy(data.images[index]).permute(0, 3, 1, 2).contiguous().to(device)
            concepts = torch.tensor([concept_ids[data.concepts[i]] for i in index], device=device)
            kinds = torch.tensor([style_ids[data.styles[i]] for i in index], device=device)
            captions = [emoji.caption(data.concepts[i], data.styles[i]) for i in index]
            return cls(images, concepts, kinds, captions, concept_names, style_names)

        return part(train), part(held_out)

    def __len__(self) -> int:
        return len(self.images)

    def floats(self, index: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) float32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1

    def caption_ids(self, tokenizer: TextTokenizer, length: int, *, styled: bool) -> Tensor:
        """Token ids (N, length) of the captions, with or without the style, on the pictures' device."""
        names = self.captions if styled else [self.concept_names[i] for i in self.concepts.tolist()]
        return pad_ids([tokenizer.encode(name) for name in names], length).to(self.images.device)


@functools.cache
def _chroma(device: torch.device) -> tuple[Tensor, Tensor]:
    """RGB to luma and chroma (YIQ) and back, made once: inverting on a GPU would wait for it at every step."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=torch.float64)
    return to_yiq.float().to(device), torch.linalg.inv(to_yiq).float().to(device)


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0, clean: float = 0.25) -> Tensor:
    """Move, turn, stretch, recolour, mirror and blot pictures, each in its own way; outside of a picture is white.

    Styles differ in just these ways: the same dog looks to the other side, stands elsewhere, is another brown.

    Args:
        images: (B, 3, S, S) float32 in [-1, 1].
        generator: on the images' device.
        strength: factor on every range; at 1 up to 20 degrees, 20 % scale, 12 % shift, 10 % shear. Mirrored is one
            picture in eight (more would take left from right), blotted one in four.
        clean: share of the pictures left as they are.

    Returns:
        (B, 3, S, S) float32 in [-1, 1].
    """
    batch, device = len(images), images.device

    def draw(limit: float, *shape: int) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator, device=device) * 2 - 1) * limit * strength

    angle, log_scale, aspect, shear = draw(math.radians(20)), draw(0.2), draw(0.1), draw(0.1)
    cos, sin = angle.cos(), angle.sin()
    width, height = (log_scale + aspect).exp(), (log_scale - aspect).exp()
    rows = torch.stack([cos * width, (shear - sin) * height, sin * width, cos * height], dim=-1).view(batch, 2, 2)
    mirror = torch.where(torch.rand(batch, generator=generator, device=device) < 0.125, -1.0, 1.0)
    rows = rows * torch.stack([mirror, torch.ones_like(mirror)], dim=-1)[:, None]
    theta = torch.cat([rows, draw(0.24, 2, 1)], dim=-1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1

    # Colour: rotate the chroma plane, scale it, then contrast and brightness.
    to_yiq, from_yiq = _chroma(device)
    hue, saturation = draw(0.6), (draw(0.4)).exp()
    turn = torch.zeros(batch, 3, 3, device=device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = hue.cos() * saturation
    turn[:, 1, 2], turn[:, 2, 1] = -hue.sin() * saturation, hue.sin() * saturation
    mix = from_yiq @ turn @ to_yiq
    contrast, brightness = draw(0.25, 1, 1, 1).exp(), draw(0.15, 1, 1, 1)
    coloured = (torch.einsum("bij,bjhw->bihw", mix, moved) * contrast + brightness).clamp(-1, 1)

    # A rectangle of one colour over up to a third of each side.
    corner, extent = draw(1.0, 2), torch.rand(batch, 2, generator=generator, device=device) / 3
    extent = torch.where(torch.rand(batch, 1, generator=generator, device=device) < 0.25, extent, -1)
    axis = torch.linspace(-1, 1, images.shape[-1], device=device)
    inside = (axis - corner[..., None]).abs() < extent[..., None]
    blot = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    colour = torch.rand(batch, 3, 1, 1, generator=generator, device=device) * 2 - 1

    # A third of the pictures keep their colours, so that colour words can be learned.
    kind = torch.rand(batch, 1, 1, 1, generator=generator, device=device)
    out = torch.where(kind < clean + (1 - clean) / 3, moved, coloured)
    return torch.where(kind < clean, images, torch.where(blot, colour, out))


def collage(images: Tensor, styles: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures pasted together from two of the same style, about half of the cells of a 4 x 4 grid from either.

    What is on them says nothing, so that their style has to be read off how they are drawn (CutMix, arXiv:1905.04899,
    within a class).

    Args:
        images: (B, 3, S, S).
        styles: (B,) int64.
        chosen: (B,) bool; the others stay as they are, and so does the only picture of its style.
        generator: on the images' device.

    Returns:
        (B, 3, S, S).
    """
    batch, device = len(images), images.device
    score = torch.rand(batch, batch, generator=generator, device=device)
    score.masked_fill_(styles[:, None] != styles, -2).fill_diagonal_(-1)
    cells = torch.rand(batch, 1, 4, 4, generator=generator, device=device) < 0.5
    other = F.interpolate((cells & chosen[:, None, None, None]).float(), images.shape[-2:]).bool()
    return torch.where(other, images[score.argmax(dim=1)], images)
