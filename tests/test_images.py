"""Pictures in and out of files: every mode becomes RGB, every bad file one line, every PNG is whole."""

import os
import re
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from unifiedar import images

SIZE = 16


def read(path, size=SIZE):
    picture = images.read_image(path, size)
    assert picture.pixels.dtype == torch.uint8
    assert picture.pixels.shape == (3, size, size)
    assert picture.pixels.is_contiguous()
    return picture


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".gif", ".tiff", ".ppm", ".jpg"])
def test_formats(tmp_path, suffix):
    Image.new("RGB", (SIZE, SIZE), (250, 0, 0)).save(
        tmp_path / f"a{suffix}", **({"lossless": True} if "w" in suffix else {})
    )
    mean = read(tmp_path / f"a{suffix}").pixels.float().mean((1, 2))
    assert torch.allclose(mean, torch.tensor([250.0, 0.0, 0.0]), atol=2)
    assert suffix in images.SUFFIXES


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 99, (99, 99, 99)),
        ("LA", (99, 255), (99, 99, 99)),
        ("LA", (99, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I", 257 * 77, (77, 77, 77)),
    ],
)
def test_modes(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I") else "a.png")
    Image.new(mode, (SIZE, SIZE), colour).save(path)
    picture = read(path)
    assert tuple(picture.pixels[:, 3, 3].tolist()) == expected
    assert picture.notes == (f"{mode} converted to RGB" + (" on white" if "A" in mode else ""),)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    picture = read(tmp_path / "a.png")
    assert picture.pixels[:, 0, 0].tolist() == [0, 100, 0]
    assert picture.pixels[:, 1, 1].tolist() == [255, 255, 255]
    assert picture.notes == ("P converted to RGB on white",)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70_000), ("I", -1)])
def test_values_without_a_range_are_refused(tmp_path, mode, value):
    Image.new(mode, (SIZE, SIZE), value).save(tmp_path / "a.tiff")
    with pytest.raises(images.ImageError, match="no known range"):
        images.read_image(tmp_path / "a.tiff", SIZE)


def test_centre_is_kept_and_small_things_do_not_alias(tmp_path):
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert picture.notes == ("300 x 100 cropped to the centre square", f"resized from 100 to {SIZE} pixels")
    assert (picture.pixels == torch.tensor([255, 0, 0])[:, None, None]).all()
    stripes = np.zeros((160, 160, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: grey, not stripes
    Image.fromarray(stripes).save(tmp_path / "b.png")
    assert ((read(tmp_path / "b.png").pixels.int() - 127).abs() < 6)[:, :, 1:-1].all()


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0)), (2, (0, -1))]
)
def test_exif_orientation(tmp_path, orientation, corner):
    image = Image.new("RGB", (SIZE, SIZE), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    picture = read(tmp_path / "a.png")
    assert picture.pixels[0][corner] == 255
    assert picture.notes == (() if orientation == 1 else ("turned as its EXIF orientation says",))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture = read(tmp_path / "a.gif")
    assert picture.pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert picture.notes[0] == "first of 3 frames taken"


def test_decompression_bomb(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    for limit in (images.MAX_PIXELS, 300_000_000):  # by our own limit, and by Pillow's
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "MAX_PIXELS", limit)
            with pytest.raises(images.ImageError, match=r"bomb\.png: .* pixels"):
                images.read_image(tmp_path / "bomb.png", SIZE)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".ppm"])
def test_truncated_and_changed_pictures(tmp_path, suffix):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    path = tmp_path / f"b{suffix}"
    for end in range(0, len(whole) // 2, max(1, len(whole) // 40)):
        path.write_bytes(whole[:end])
        with pytest.raises(images.ImageError, match=re.escape(str(path))) as error:
            images.read_image(path, SIZE)
        assert "\n" not in str(error.value)
    for _ in range(60):
        changed = bytearray(whole)
        for position in generator.integers(0, min(len(whole), 200), 3):
            changed[position] = generator.integers(256)
        path.write_bytes(changed)
        with suppress(images.ImageError):  # and nothing else
            read(path)


def test_program_running_formats_are_not_opened(tmp_path):
    """Pillow hands EPS to Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n")
    with pytest.raises(images.ImageError, match="not a picture in a format"):
        images.read_image(tmp_path / "a.png", SIZE)


def test_write_png(tmp_path):
    picture = torch.randint(0, 256, (3, 9, 12), dtype=torch.uint8)
    images.write_png(picture.flip(2), tmp_path / "a.png")  # no strides are assumed
    images.write_png(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(images.ImageError, match=r"none.*cannot be written"):
        images.write_png(picture, tmp_path / "none" / "a.png")
    for wrong in (picture.float(), picture[0], picture[:2]):
        with pytest.raises(ValueError, match=r"write_png: a picture must be uint8 \(3, H, W\)"):
            images.write_png(wrong, tmp_path / "a.png")


def test_write_png_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    images.write_png(torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(images.ImageError, match="No space left"):
        images.write_png(torch.ones(3, 4, 4, dtype=torch.uint8), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_contact_sheet():
    pictures = torch.stack([torch.full((3, 32, 32), 30 * i, dtype=torch.uint8) for i in range(5)])
    sheet = np.array(images.contact_sheet(pictures, columns=2))
    assert sheet.shape == (3 * 34 + 2, 2 * 34 + 2, 3)
    for i in range(5):
        row, column = divmod(i, 2)
        top, left = 2 + 34 * row, 2 + 34 * column
        assert (sheet[top : top + 32, left : left + 32] == 30 * i).all()
    assert images.contact_sheet(pictures[:1]).size == (36, 36)
    labelled = np.array(images.contact_sheet(list(pictures), 5, ["a", "a long label that is cut", "", "ü", "🍎"]))
    assert (labelled[34:, :100] < 128).any()  # something is written below the first picture
    for arguments, word in (
        (([],), "none"),
        ((pictures, 0), "columns"),
        ((pictures, 2, ["a"]), "labels"),
        (([pictures[0], pictures[0, :, :5]],), "one size"),
    ):
        with pytest.raises(ValueError, match=rf"contact_sheet: .*{word}"):
            images.contact_sheet(*arguments)
