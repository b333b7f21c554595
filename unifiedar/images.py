"""Pictures in and out of files: anything a person has becomes the square RGB that a model reads, and back to PNG.

Tensors are uint8 (3, height, width) RGB on the CPU throughout. Colour profiles are not applied: values count as sRGB.
"""

import os
import secrets
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

__all__ = ["SUFFIXES", "ImageError", "Picture", "contact_sheet", "read_image", "write_png"]

# Formats that Pillow decodes by itself; others it knows start programs (EPS runs Ghostscript) or hold no pixels.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})

MIN_SIDE = 8
# As RGB this takes 0.3 GB, and the conversions a few times that; a few kilobytes of file can ask for much more.
MAX_PIXELS = 100_000_000


class ImageError(ValueError):
    """A picture that cannot be read or written: one line with the file and the cause."""


class Picture(NamedTuple):
    """A picture ready for a model.

    Attributes:
        pixels: (3, size, size) uint8 RGB.
        notes: what was changed on the way, a phrase each; empty if nothing was.
    """

    pixels: Tensor
    notes: tuple[str, ...]


def read_image(path: str | os.PathLike[str], size: int) -> Picture:
    """The picture in a file, as the model wants it.

    In this order: the first frame is taken, turned as its EXIF orientation says, converted to RGB (transparency onto
    white, 16 bits to 8), cropped to its centre square and resized with antialiasing (Lanczos).

    Args:
        path: a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file.
        size: side of the result, pixels.

    Returns:
        `Picture`.

    Raises:
        ImageError: the file is missing, no picture, truncated, of more than 100 million pixels, of less than 8 pixels
            a side, or of floating-point values.
    """
    path = Path(path)
    _require_file(path)
    try:
        # Sizes are checked below; Pillow's warnings about them and about odd metadata are not for the user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as opened:
                return _prepare(opened, path, size)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture in a format that is read ({', '.join(_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: has more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise ImageError(f"{path}: does not fit into memory") from error
    except Exception as error:  # decoders fed garbage raise whatever they stumble on, SyntaxError and struct.error too
        cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ImageError(f"{path}: truncated or damaged ({cause})") from error


def write_png(picture: Tensor | Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a PNG file, whole or not at all; an existing file is replaced in one step.

    Args:
        picture: (3, H, W) uint8, or a Pillow image.
        path: the file; its folder must exist.

    Raises:
        ImageError: the file cannot be written.
        ValueError: `picture` has another shape or dtype.
    """
    image = _to_image(picture, "write_png") if isinstance(picture, Tensor) else picture
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(partial, "xb") as file:
            image.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def contact_sheet(
    pictures: Tensor | Sequence[Tensor], columns: int | None = None, labels: Sequence[str] | None = None
) -> Image.Image:
    """One image of many, row by row on white.

    Args:
        pictures: N tensors (3, H, W) uint8 of one size, or (N, 3, H, W); at least one.
        columns: pictures a row; by default as many as make the sheet about square.
        labels: a text under each picture, wrapped to its width and cut after three lines.

    Returns:
        Pillow image, RGB.

    Raises:
        ValueError: there is no picture, sizes differ, or there are not as many labels as pictures.
    """
    images = [_to_image(picture, "contact_sheet") for picture in pictures]
    if not images:
        raise ValueError("contact_sheet: pictures must be at least one, got none")
    if any(image.size != images[0].size for image in images):
        raise ValueError("contact_sheet: pictures must be of one size")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"contact_sheet: labels must be one for each of {len(images)} pictures, got {len(labels)}")
    if columns is not None and columns < 1:
        raise ValueError(f"contact_sheet: columns must be at least 1, got {columns}")
    columns = min(columns or round(len(images) ** 0.5 + 0.49), len(images))
    rows = -(-len(images) // columns)

    width, height = images[0].size
    gap = max(2, width // 16)
    line_height, lines = 12, 3
    cell_width = max(width, 96) if labels else width
    cell_height = height + (lines * line_height + 2 if labels else 0)
    sheet = Image.new("RGB", (columns * (cell_width + gap) + gap, rows * (cell_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for i, image in enumerate(images):
        left = gap + i % columns * (cell_width + gap)
        top = gap + i // columns * (cell_height + gap)
        sheet.paste(image, (left + (cell_width - width) // 2, top))
        if labels:
            # The font that comes with Pillow has Latin letters only, about 5.4 pixels wide at this size.
            text = labels[i].encode("latin-1", "replace").decode("latin-1")
            wrapped = textwrap.wrap(text, max(1, int(cell_width / 5.4)), max_lines=lines, placeholder="..")
            for j, line in enumerate(wrapped):
                draw.text((left + cell_width / 2, top + height + 2 + j * line_height), line, "black", font, anchor="ma")
    return sheet


def _prepare(opened: Image.Image, path: Path, size: int) -> Picture:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{path}: {width} x {height} is more than {MAX_PIXELS} pixels")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{path}: {width} x {height} pixels; at least {MIN_SIDE} a side are needed")
    notes = []
    frames = getattr(opened, "n_frames", 1)
    if frames > 1:
        opened.seek(0)
        notes.append(f"first of {frames} frames taken")
    opened.load()
    image = ImageOps.exif_transpose(opened)
    if opened.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        notes.append("turned as its EXIF orientation says")
    if image.mode != "RGB" or image.has_transparency_data:
        notes.append(f"{image.mode} converted to RGB" + (" on white" if image.has_transparency_data else ""))
        image = _to_rgb(image, path)
    width, height = image.size
    side = min(width, height)
    if width != height:
        notes.append(f"{width} x {height} cropped to the centre square")
    if side != size:
        notes.append(f"resized from {side} to {size} pixels")
    if (width, height) != (size, size):
        left, top = (width - side) // 2, (height - side) // 2
        # Cropped first: with a box, resize would let the filter reach over the box's edge.
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return Picture(pixels, tuple(notes))


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path}: 32-bit values beyond 65535 have no known range; save it with 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{path}: floating-point values have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_image(pixels: Tensor, function: str) -> Image.Image:
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3:
        raise ValueError(f"{function}: a picture must be uint8 (3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def _require_file(path: Path) -> None:
    """Only regular files are opened: a pipe would wait for ever."""
    try:
        if path.is_file():
            return
        cause = "a folder, not a picture" if path.is_dir() else "not a file" if path.exists() else "no such file"
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        cause = getattr(error, "strerror", None) or "no such file"
    raise ImageError(f"{path}: {cause}")
