"""Emoji pictures drawn in several styles, rendered from the SVG icon sets of the `@iconify-json` npm packages.

Four packages draw largely the same things, each in its own hand, and name them by what they show; that makes pictures
with two known attributes, a *concept* ("red apple") and a *style* ("noto"), and lets a model be tested on pairs that it
never saw together.

    unifiedar data emoji --from PACKAGE_FOLDER... --out FOLDER [--size 64]

What is left out of a package: skin-tone variants; icons marked hidden (older drawings under older names, which would
put one thing under two concepts); aliases (other names, and in a few cases mirror images, of a drawing that is there).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

PREFIXES = {"noto": "noto", "twemoji": "twemoji", "fluent-emoji-flat": "fluent", "openmoji": "openmoji"}
"""Icon-set prefix, as icons.json states it, to style name."""

STYLES = tuple(PREFIXES.values())
"""Style names, in the order in which pictures are stored."""

HELD_OUT_SHARE = 0.1
"""Share of the concepts drawn in three styles or more that have one style held out."""

NEAR_DUPLICATE = 8.0
"""Two pictures of one style whose root mean square difference is below this (of 255) count as one drawing."""

VERSION = 1  # of the rendering and of index.json; raise it when either changes, so that caches are rebuilt

_TONES = ("medium-light", "medium-dark", "light", "medium", "dark")  # those that end in another come first
_TONE = re.compile(rf"(^|-)(({'|'.join(_TONES)})-skin-tone|tone[1-5])(-|$)")
_FLUENT_TONE = re.compile(rf"-({'|'.join(_TONES)})$")

# The sets agree on a name for all but these, found by comparing the names each gives to one Unicode sequence.
_RENAMED = {
    "fluent": {
        "blackbird": "black-bird",
        "hugging-face": "smiling-face-with-open-hands",
        "keycap-hashtag": "keycap-pound",
        "knocked-out-face": "face-with-crossed-out-eyes",
        "man-blonde-hair": "man-blond-hair",
        "man-deaf": "deaf-man",
        "man-merpeople": "merman",
        "man-with-bunny-ears": "men-with-bunny-ears",
        "man-wrestling": "men-wrestling",
        "on-arrow": "on-exclamation-arrow",
        "person-blonde-hair": "person-blond-hair",
        "person-deaf": "deaf-person",
        "person-elf": "elf",
        "person-fairy": "fairy",
        "person-genie": "genie",
        "person-mage": "mage",
        "person-merpeople": "merperson",
        "person-superhero": "superhero",
        "person-supervillain": "supervillain",
        "person-vampire": "vampire",
        "person-with-bunny-ears": "people-with-bunny-ears",
        "person-wrestling": "people-wrestling",
        "person-zombie": "zombie",
        "phoenix-bird": "phoenix",
        "piata": "pinata",
        "pouting-face": "enraged-face",
        "red-triangle": "red-triangle-pointed-up",
        "up-button": "up-exclamation-button",
        "woman-blonde-hair": "woman-blond-hair",
        "woman-deaf": "deaf-woman",
        "woman-merpeople": "mermaid",
        "woman-with-bunny-ears": "women-with-bunny-ears",
        "woman-wrestling": "women-wrestling",
    },
    "openmoji": {
        "combining-enclosing-keycap": "keycap",
        **{f"regional-indicator-{letter}": f"letter-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"},
    },
}


def concept_of(icon: str, style: str) -> str:
    """What an icon shows, in words: "red-apple" -> "red apple". One thing has one name in every style.

    Raises ValueError for a style that is not in `STYLES`.
    """
    if style not in STYLES:
        raise ValueError(f"concept_of: style must be one of {', '.join(STYLES)}, got {style!r}")
    return _RENAMED.get(style, {}).get(icon, icon).replace("-", " ")


def caption(concept: str, style: str | None = None) -> str:
    """The text that goes with a picture: "red apple, noto style", or "red apple" where no style is asked for."""
    return concept if style is None else f"{concept}, {style} style"


def is_skin_tone(icon: str, style: str, icons: Container[str]) -> bool:
    """Whether an icon is a skin-tone variant, or a bare tone swatch, of the set that has `icons`.

    Fluent writes only the tone ("waving-hand-dark"), which counts where the plain icon and all five tones of it exist:
    the "police-car-light" is no tone of the "police-car".
    """
    if _TONE.search(icon):
        return True
    plain = _FLUENT_TONE.sub("", icon)
    return (
        style == "fluent"
        and plain != icon
        and all(name in icons for name in (plain, *(f"{plain}-{t}" for t in _TONES)))
    )


@dataclass(frozen=True)
class Source:
    """One icon set as read from a package folder.

    Attributes:
        style: style name.
        package, version, licence: of the npm package (licence as an SPDX id).
        digest: sha256 of icons.json.
        drawings: (concept, icon name, SVG text) by concept.
        left_out: how many icons were not taken, by reason.
    """

    style: str
    package: str
    version: str
    licence: str
    digest: str
    drawings: list[tuple[str, str, str]]
    left_out: dict[str, int]

    @property
    def record(self) -> dict[str, Any]:
        """What index.json says of the source."""
        return {
            "style": self.style,
            "package": self.package,
            "version": self.version,
            "licence": self.licence,
            "sha256": self.digest,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class EmojiSet:
    """Rendered pictures with their labels.

    Attributes:
        images: (N, size, size, 3) uint8 RGB; a read-only memory map where loaded from a file.
        concepts, styles: (N,) what each picture shows and in which style.
        icons: (N,) the name of the icon in its package.
        sources: per style its package name, version, licence, the sha256 of its icons.json, and what was left out.
    """

    images: np.ndarray
    concepts: list[str]
    styles: list[str]
    icons: list[str]
    sources: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(concept, style) of every picture."""
        return list(zip(self.concepts, self.styles, strict=True))

    @property
    def captions(self) -> list[str]:
        """The caption of every picture, style included."""
        return [caption(concept, style) for concept, style in self.pairs]


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and the sha256 of the file."""
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the unpacked folder of an @iconify-json package") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed, got {type(value).__name__}")
    return value, hashlib.sha256(raw).hexdigest()


def _svg(icon: dict[str, Any], sheet: dict[str, Any], where: str) -> str:
    """An SVG document of one icon, its view box widened to a centred square so that nothing is stretched."""
    body = icon.get("body")
    if not isinstance(body, str):
        raise ValueError(f"{where}: an icon needs a text `body`, got {type(body).__name__}")
    if any(icon.get(key) for key in ("rotate", "hFlip", "vFlip")):
        raise ValueError(f"{where}: rotated and mirrored icons are not supported")
    box = []
    for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16)):  # defaults of the Iconify format
        value = icon.get(key, sheet.get(key, default))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: `{key}` must be a finite number, got {value!r}")
        box.append(float(value))
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise ValueError(f"{where}: width and height must be positive, got {width:g} x {height:g}")
    side = max(width, height)
    view = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{side:g}" height="{side:g}" viewBox="{view}">{body}</svg>'


def _in_category(folder: Path, category: str) -> frozenset[str]:
    """Icon names of one of the package's categories (metadata.json)."""
    metadata, _ = _read_json(folder / "metadata.json")
    categories = metadata.get("categories")
    if not isinstance(categories, dict) or not isinstance(categories.get(category), list):
        names = ", ".join(sorted(categories)) if isinstance(categories, dict) else "none"
        raise ValueError(f"{folder / 'metadata.json'}: category must be one of {names}, got {category!r}")
    return frozenset(categories[category])


def read_source(folder: str | Path, category: str | None = None) -> Source:
    """Read the icon set in an unpacked `@iconify-json` package (icons.json, info.json, package.json).

    Args:
        folder: of the package.
        category: take only the icons of this category (as metadata.json names it), all if None.

    Raises ValueError, one line, for a folder that is missing, is not such a package, or holds a set of unknown style,
    and for a category that the set does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sheet, digest = _read_json(folder / "icons.json")
    icons = sheet.get("icons")
    if not isinstance(icons, dict) or not all(isinstance(icon, dict) for icon in icons.values()):
        raise ValueError(f"{folder / 'icons.json'}: not an Iconify icon set, `icons` must be an object of objects")
    prefix = sheet.get("prefix")
    if prefix not in PREFIXES:
        raise ValueError(f"{folder / 'icons.json'}: prefix must be one of {', '.join(PREFIXES)}, got {prefix!r}")
    style = PREFIXES[prefix]
    info, _ = _read_json(folder / "info.json")
    package, _ = _read_json(folder / "package.json")
    licence = info.get("license")
    spdx = licence.get("spdx") if isinstance(licence, dict) else None
    if not isinstance(spdx, str):
        raise ValueError(f"{folder / 'info.json'}: the licence of the set is not stated, `license.spdx` is missing")

    aliases = sheet.get("aliases")
    left_out = {"skin tones": 0, "hidden": 0, "aliases": len(aliases) if isinstance(aliases, dict) else 0}
    chosen: dict[str, tuple[str, str, str]] = {}
    wanted = icons if category is None else _in_category(folder, category)
    if category is not None:
        left_out["other categories"] = sum(name not in wanted for name in icons)
    for name in sorted(icons):
        if name not in wanted:
            continue
        if is_skin_tone(name, style, icons):
            left_out["skin tones"] += 1
        elif icons[name].get("hidden"):
            left_out["hidden"] += 1
        else:
            concept = concept_of(name, style)
            # Where a set carries both its own and the common name, the common one is the drawing of the day.
            if concept not in chosen or concept == name.replace("-", " "):
                chosen[concept] = (concept, name, _svg(icons[name], sheet, f"{folder / 'icons.json'}: {name}"))
    return Source(
        style=style,
        package=str(package.get("name", f"@iconify-json/{prefix}")),
        version=str(package.get("version", "unknown")),
        licence=spdx,
        digest=digest,
        drawings=[chosen[concept] for concept in sorted(chosen)],
        left_out=left_out,
    )


def _need_cairosvg() -> Any:
    try:
        import cairosvg  # optional, and heavy: only rendering needs it
    except ImportError:
        raise ValueError("rendering needs cairosvg: pip install 'unifiedar-kernels[train]'") from None
    except OSError as error:  # cairosvg is there, the cairo library that it loads is not
        raise ValueError(f"rendering needs the cairo library (libcairo2), which cannot be loaded: {error}") from None
    return cairosvg


def _no_fetch(url: str, kind: str | None = None) -> bytes:
    """Stands in for every file or address that a drawing names: an empty picture."""
    return b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'


def render(svg: str, size: int) -> np.ndarray:
    """Draw an SVG document on white: (size, size, 3) uint8 RGB.

    The text is not trusted: XML entities are refused and nothing it refers to, file or address, is opened.
    Raises ValueError for text that cannot be drawn or where cairosvg is missing.
    """
    cairosvg = _need_cairosvg()
    from PIL import Image

    try:
        png = cairosvg.surface.PNGSurface.convert(
            bytestring=svg.encode(),
            output_width=size,
            output_height=size,
            background_color="white",
            unsafe=False,
            url_fetcher=_no_fetch,
        )
    except Exception as error:  # cairosvg lets whatever its parsers raise through, any of it means a bad drawing
        raise ValueError(f"render: not a drawing that cairosvg understands ({type(error).__name__}: {error})") from None
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


def _render_one(job: tuple[str, str, int]) -> np.ndarray | str:
    """A picture, or one line on why there is none (an exception would cross processes with its whole history)."""
    name, svg, size = job
    try:
        return render(svg, size)
    except ValueError as error:
        return f"{name}: {error}"


def _render_all(jobs: Sequence[tuple[str, str, int]], processes: int) -> Iterator[np.ndarray | str]:
    if processes == 1:
        yield from map(_render_one, jobs)
    else:
        with ProcessPoolExecutor(processes) as pool:  # unlike multiprocessing.Pool, it notices a process that dies
            yield from pool.map(_render_one, jobs, chunksize=32)


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    size: int = 64,
    *,
    category: str | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> EmojiSet:
    """Render icon sets into `out`/images.npy (N, size, size, 3 uint8 RGB) and `out`/index.json, and load them.

    Nothing is done where `out` already holds the pictures of the same sources at the same size. Files appear whole or
    not at all.

    Args:
        sources: unpacked folders of the npm packages, at most one a style.
        out: folder to write, created if need be.
        size: pixels of a side, 8 to 1024.
        category: render only this one, "Food & Drink" say; all if None.
        jobs: processes to render with; all CPUs if None.
        progress: show a bar, on a terminal.

    Raises ValueError, one line, for a bad argument, a folder that is not such a package, or a drawing that fails.
    """
    out = Path(out)
    if not sources:
        raise ValueError("build: sources must name at least one folder, got none")
    if not 8 <= size <= 1024:
        raise ValueError(f"build: size must be 8 to 1024 pixels, got {size}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"build: jobs must be positive, got {jobs}")
    found = (read_source(folder, category) for folder in sources)
    sets = sorted(found, key=lambda source: STYLES.index(source.style))
    styles = [source.style for source in sets]
    if len(set(styles)) != len(styles):
        raise ValueError(f"build: sources must hold one set a style, got {', '.join(styles)}")

    records = [source.record for source in sets]
    try:
        index, _ = _read_json(out / "index.json")
        if (index.get("version"), index.get("size"), index.get("sources")) == (VERSION, size, records):
            return load(out)
    except ValueError:
        pass  # nothing there, or nothing of use: render anew

    drawings = [(source.style, *drawing) for source in sets for drawing in source.drawings]
    if not drawings:
        raise ValueError(f"build: no picture is left in {', '.join(map(str, sources))}")
    _need_cairosvg()
    out.mkdir(parents=True, exist_ok=True)
    index = {
        "version": VERSION,
        "size": size,
        "sources": records,
        "pictures": [{"concept": concept, "style": style, "icon": icon} for style, concept, icon, _ in drawings],
    }
    work = [(f"{style} {icon}", svg, size) for style, _, icon, svg in drawings]
    processes = min(jobs or os.cpu_count() or 1, 1 + len(work) // 64)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        pictures = Path(partial, "images.npy")
        images = np.lib.format.open_memmap(pictures, mode="w+", dtype=np.uint8, shape=(len(work), size, size, 3))
        bar = tqdm(
            _render_all(work, processes),
            total=len(work),
            desc=f"rendering at {size} px",
            unit="picture",
            disable=None if progress else True,
        )
        for row, picture in enumerate(bar):
            if isinstance(picture, str):
                raise ValueError(picture)
            images[row] = picture
        images.flush()
        del images
        Path(partial, "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        # An index vouches for the pictures beside it: the old one goes before they do, the new one comes after.
        Path(out, "index.json").unlink(missing_ok=True)
        os.replace(pictures, out / "images.npy")
        os.replace(Path(partial, "index.json"), out / "index.json")
    return load(out)


def load(path: str | Path) -> EmojiSet:
    """Open what `build` wrote; the pictures stay on disk until read.

    Raises ValueError, one line, for a folder without such a set or with files that do not belong together.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; make it with `unifiedar data emoji`")
    index, _ = _read_json(path / "index.json")
    pictures = index.get("pictures")
    keys = ("concept", "style", "icon")
    if index.get("version") != VERSION or not isinstance(pictures, list):
        raise ValueError(f"{path / 'index.json'}: not an index of version {VERSION}; make it anew")
    if not all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys) for entry in pictures):
        raise ValueError(f"{path / 'index.json'}: every picture needs a concept, a style and an icon; make it anew")
    try:
        images = np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path / 'images.npy'}: cannot be read ({error}); make it anew") from None
    expected = (len(pictures), index.get("size"), index.get("size"), 3)
    if images.dtype != np.uint8 or images.shape != expected:
        raise ValueError(f"{path / 'images.npy'}: must be uint8 {expected}, got {images.dtype} {images.shape}")
    return EmojiSet(
        images=images,
        concepts=[entry["concept"] for entry in pictures],
        styles=[entry["style"] for entry in pictures],
        icons=[entry["icon"] for entry in pictures],
        sources=index.get("sources", []),
    )


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def near_duplicates(emoji: EmojiSet, rows: Sequence[int]) -> np.ndarray:
    """Distance of pictures to the closest other picture of their own style: (len(rows),) float64.

    The distance is the root mean square difference of the pixel values, 0 to 255; infinite where there is no other.
    """
    styles = np.array(emoji.styles)
    asked = np.asarray(rows, dtype=np.int64)
    nearest = np.full(len(asked), np.inf)
    for style in sorted(set(styles[asked].tolist())):
        mine = np.flatnonzero(styles[asked] == style)
        ours = asked[mine]
        # Integers in float64: the squares are exact, so equal pictures come out at exactly 0.
        left = emoji.images[ours].reshape(len(ours), -1).astype(np.float64)
        peers = np.flatnonzero(styles == style)
        for others in np.array_split(peers, 1 + len(peers) // 512):
            right = emoji.images[others].reshape(len(others), -1).astype(np.float64)
            squares = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * (left @ right.T)
            squares[ours[:, None] == others] = np.inf
            nearest[mine] = np.minimum(nearest[mine], np.sqrt(squares.min(1) / left.shape[1]))
    return nearest


def choose_held_out(emoji: EmojiSet) -> list[tuple[str, str]]:
    """The rule behind emoji_held_out.json: which (concept, style) pairs no model may be trained on, sorted.

    Of the concepts drawn in three styles or more, the tenth whose hash is below `HELD_OUT_SHARE`; of each the one style
    with the smallest hash, so that two or more stay. A pair is passed over where its picture is a near duplicate
    of another of its style ("family" and "family man boy" are one drawing): a model would have seen it under the other
    name. Flags of places, many of which differ by a few pixels, are in two sets only and so never held out.
    The hash is SHA-256 of "held out/CONCEPT" and "held out/CONCEPT/STYLE", its first 48 bits as a fraction.
    The committed list was drawn from all four sets at 64 pixels.
    """
    row = {pair: i for i, pair in enumerate(emoji.pairs)}
    styles: dict[str, list[str]] = {}
    for concept, style in row:
        styles.setdefault(concept, []).append(style)
    concepts = [
        concept
        for concept, drawn in styles.items()
        if len(drawn) >= 3 and _hash(f"held out/{concept}") < HELD_OUT_SHARE
    ]
    pairs = [(concept, style) for concept in concepts for style in styles[concept]]
    distance = near_duplicates(emoji, [row[pair] for pair in pairs])
    fit: dict[str, list[str]] = {}
    for (concept, style), nearest in zip(pairs, distance, strict=True):
        if nearest >= NEAR_DUPLICATE:
            fit.setdefault(concept, []).append(style)
    return sorted(
        (concept, min(drawn, key=lambda s: _hash(f"held out/{concept}/{s}"))) for concept, drawn in fit.items()
    )


@cache
def held_out() -> frozenset[tuple[str, str]]:
    """The committed (concept, style) pairs that are for testing only, as `choose_held_out` drew them once."""
    text = resources.files(__package__).joinpath("emoji_held_out.json").read_text(encoding="utf-8")
    return frozenset((concept, style) for concept, style in json.loads(text))


def split(emoji: EmojiSet, styles: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the pictures to train on and of those held out: two sorted int64 arrays that share no row.

    Args:
        styles: the styles to take, all if None; pictures of other styles are in neither array.

    Raises ValueError for a name that is not in `STYLES`.
    """
    wanted = STYLES if styles is None else tuple(styles)
    if unknown := [style for style in wanted if style not in STYLES]:
        raise ValueError(f"split: styles must be among {', '.join(STYLES)}, got {', '.join(map(repr, unknown))}")
    hidden = held_out()
    rows: tuple[list[int], list[int]] = ([], [])
    for i, pair in enumerate(emoji.pairs):
        if pair[1] in wanted:
            rows[pair in hidden].append(i)
    return np.array(rows[0], dtype=np.int64), np.array(rows[1], dtype=np.int64)


def main(argv: Sequence[str] | None = None) -> int:
    """`unifiedar data emoji`: build the set and print what it holds; 0, or 1 with one line on what went wrong."""
    parser = argparse.ArgumentParser(
        prog="unifiedar data emoji",
        description="Render the SVG icon sets of @iconify-json packages (noto, twemoji, fluent-emoji-flat, openmoji).",
    )
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="unpacked folders of the packages",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for images.npy and index.json")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    parser.add_argument("--category", help='render only this one, "Food & Drink" say (default: all)')
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: one a CPU)")
    args = parser.parse_args(argv)
    try:
        emoji = build(args.sources, args.out, args.size, category=args.category, jobs=args.jobs)
    except (ValueError, OSError) as error:
        print(f"unifiedar data emoji: {error}", file=sys.stderr)
        return 1
    for source in emoji.sources:
        style, package, version = source["style"], source["package"], source["version"]
        left_out = ", ".join(f"{count} {reason}" for reason, count in source["left_out"].items())
        print(f"{style}: {emoji.styles.count(style)} pictures from {package} {version} ({source['licence']})")
        print(f"    left out: {left_out}")
    drawn: dict[str, int] = {}
    for concept in emoji.concepts:
        drawn[concept] = drawn.get(concept, 0) + 1
    train, test = split(emoji)
    print(
        f"{len(emoji)} pictures of {args.size} x {args.size} pixels in {args.out}: "
        f"{len(train)} to train on, {len(test)} held out"
    )
    spread = ", ".join(
        f"{sum(n >= k for n in drawn.values())} in {k} or more" for k in range(2, len(emoji.sources) + 1)
    )
    print(f"{len(drawn)} concepts" + (f", {spread} styles" if spread else ""))
    return 0
