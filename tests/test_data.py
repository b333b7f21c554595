"""Emoji data: rendering, captions, held-out pairs, the tokenizer, and the pictures that ship."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unifiedar import data
from unifiedar import tokenizer as text
from unifiedar.data import emoji

RED, BLUE = [255, 0, 0], [0, 0, 255]
DISC = '<circle cx="8" cy="8" r="8" fill="red"/>'
SHEET = '<rect width="16" height="16" fill="#00f"/>'
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def package(folder: Path, prefix: str, icons: dict, licence: str = "MIT", **sheet) -> Path:
    """Write an npm package of an icon set; `icons` maps names to bodies or to whole entries."""
    entries = {name: icon if isinstance(icon, dict) else {"body": icon} for name, icon in icons.items()}
    folder.mkdir(parents=True)
    content = {"prefix": prefix, "icons": entries, "width": 16, "height": 16, **sheet}
    (folder / "icons.json").write_text(json.dumps(content))
    (folder / "info.json").write_text(json.dumps({"license": {"spdx": licence}}))
    (folder / "package.json").write_text(json.dumps({"name": f"@iconify-json/{prefix}", "version": "9.8.7"}))
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Two small sets with every kind of icon that is left out, or renamed."""
    noto = {
        "red-apple": DISC,
        "dog-face": SHEET,
        "mage": DISC,
        "mage-dark-skin-tone": DISC,
        "dark-skin-tone": DISC,
        "elf-tone3": DISC,
        "old-thing": {"body": DISC, "hidden": True},
    }
    fluent = {
        "red-apple": SHEET,
        "person-mage": SHEET,
        **{f"person-mage-{tone}": SHEET for tone in TONES},
        "police-car": SHEET,
        "police-car-light": DISC,
    }
    return [
        package(tmp_path / "fluent", "fluent-emoji-flat", fluent),
        package(tmp_path / "noto", "noto", noto, "Apache-2.0", aliases={"apple": {"parent": "red-apple"}}),
    ]


def build(sources: list[Path], out: Path, size: int = 16, **options) -> emoji.EmojiSet:
    return emoji.build(sources, out, size, **{"jobs": 1, "progress": False, **options})


# Names


@pytest.mark.parametrize(
    ("icon", "style", "concept"),
    [
        ("red-apple", "noto", "red apple"),
        ("person-mage", "fluent", "mage"),
        ("mage", "twemoji", "mage"),
        ("piata", "fluent", "pinata"),
        ("regional-indicator-q", "openmoji", "letter q"),
        ("letter-q", "noto", "letter q"),
        ("up-button", "noto", "up button"),  # a name that only Fluent uses for something else
    ],
)
def test_concepts_have_one_name(icon, style, concept):
    assert emoji.concept_of(icon, style) == concept


def test_concept_of_refuses_unknown_styles():
    with pytest.raises(ValueError, match=r"concept_of: style must be one of noto, .*, got 'crayon'"):
        emoji.concept_of("red-apple", "crayon")


def test_captions():
    assert emoji.caption("red apple", "noto") == "red apple, noto style"
    assert emoji.caption("red apple") == "red apple"


# Rendering


def test_build_takes_the_right_icons(packages, tmp_path):
    built = build(packages, tmp_path / "out")
    assert built.pairs == [
        ("dog face", "noto"),
        ("mage", "noto"),
        ("red apple", "noto"),
        ("mage", "fluent"),
        ("police car", "fluent"),
        ("police car light", "fluent"),
        ("red apple", "fluent"),
    ]
    assert built.icons[3] == "person-mage"
    assert built.captions[2] == "red apple, noto style"
    assert [source["left_out"] for source in built.sources] == [
        {"skin tones": 3, "hidden": 1, "aliases": 1},
        {"skin tones": 5, "hidden": 0, "aliases": 0},
    ]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    digest = hashlib.sha256((packages[1] / "icons.json").read_bytes()).hexdigest()
    expected = {"package": "@iconify-json/noto", "version": "9.8.7", "licence": "Apache-2.0", "sha256": digest}
    assert index["size"] == 16
    assert expected.items() <= index["sources"][0].items()
    assert index["pictures"][0] == {"concept": "dog face", "style": "noto", "icon": "dog-face"}


def test_pictures_are_drawn_on_white(packages, tmp_path):
    built = build(packages, tmp_path / "out", size=32)
    assert built.images.dtype == np.uint8
    assert built.images.shape == (7, 32, 32, 3)
    disc = built.images[built.pairs.index(("red apple", "noto"))]
    assert disc[16, 16].tolist() == RED
    assert disc[0, 0].tolist() == [255, 255, 255]
    assert (built.images[built.pairs.index(("red apple", "fluent"))] == BLUE).all()


def test_proportions_are_kept(tmp_path):
    wide = {"body": '<rect x="4" y="2" width="32" height="16" fill="red"/>', "left": 4, "top": 2, "width": 32}
    built = build([package(tmp_path / "noto", "noto", {"wide": wide})], tmp_path / "out", size=32)
    image = built.images[0]
    assert (image[9:23] == RED).all()
    assert (image[:7] == 255).all()
    assert (image[25:] == 255).all()


def test_processes_agree(tmp_path):
    icons = {f"disc-{i}": f'<circle cx="8" cy="8" r="{i / 20}" fill="red"/>' for i in range(1, 161)}
    folder = package(tmp_path / "noto", "noto", icons)
    one, two = (build([folder], tmp_path / f"out{jobs}", jobs=jobs) for jobs in (1, 2))
    assert one.pairs == two.pairs
    np.testing.assert_array_equal(one.images, two.images)


def test_build_again_does_nothing(packages, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = build(packages, out)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    assert set(before) == {"images.npy", "index.json"}
    with monkeypatch.context() as patch:
        patch.setattr(emoji, "render", lambda *_: pytest.fail("rendered again"))
        again = build(packages[::-1], out)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()} == before
    np.testing.assert_array_equal(again.images, first.images)


def test_build_notices_changes(packages, tmp_path):
    out = tmp_path / "out"
    build(packages, out)
    assert build(packages, out, size=24).images.shape == (7, 24, 24, 3)
    assert len(build(packages[:1], out, size=24)) == 4
    sheet = json.loads((packages[0] / "icons.json").read_text())
    sheet["icons"]["red-apple"]["body"] = DISC
    (packages[0] / "icons.json").write_text(json.dumps(sheet))
    changed = build(packages[:1], out, size=24)
    assert changed.images[changed.concepts.index("red apple"), 12, 12].tolist() == RED


@pytest.mark.parametrize("damage", ["truncate images", "truncate index", "no images"])
def test_build_mends_a_damaged_cache(packages, tmp_path, damage):
    out = tmp_path / "out"
    whole = np.array(build(packages, out).images)
    match damage:
        case "truncate images":
            os.truncate(out / "images.npy", 500)
        case "truncate index":
            os.truncate(out / "index.json", 50)
        case "no images":
            (out / "images.npy").unlink()
    with pytest.raises(ValueError, match=r"index\.json|images\.npy"):
        emoji.load(out)
    np.testing.assert_array_equal(build(packages, out).images, whole)


def test_a_failed_build_leaves_the_old_one(packages, tmp_path):
    out = tmp_path / "out"
    build(packages, out)
    broken = package(tmp_path / "broken", "twemoji", {"good": DISC, "torn": "<g><path"})
    with pytest.raises(ValueError, match=r"^twemoji torn: render: not a drawing") as caught:
        build([*packages, broken], out)
    assert "\n" not in str(caught.value)
    assert len(emoji.load(out)) == 7
    assert {path.name for path in out.iterdir()} == {"images.npy", "index.json"}


def test_drawings_open_no_file_and_no_address(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    picture = tmp_path / "secret.svg"
    picture.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16">{SHEET}</svg>')
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/x.svg"
        try:
            for url in (picture.as_uri(), str(picture), address):
                for tag in ("image", "use"):
                    body = f'<{tag} xlink:href="{url}" href="{url}" width="16" height="16"/>'
                    folder = package(tmp_path / hashlib.md5(body.encode()).hexdigest(), "noto", {"spy": body})
                    assert (build([folder], tmp_path / "out").images == 255).all(), body
            style = package(tmp_path / "style", "noto", {"spy": f'<style>@import url("{address}");</style>{DISC}'})
            build([style], tmp_path / "out")
        finally:
            server.shutdown()
            thread.join()
    assert asked == []


def test_entities_are_refused():
    bomb = '<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/hostname">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>'
    with pytest.raises(ValueError, match="render: not a drawing that cairosvg understands"):
        emoji.render(bomb, 16)


# What is refused, in one line each


def spoil(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder


BAD_SHEETS = {
    "{": "not valid JSON",
    "[]": "a JSON object is needed, got list",
    '{"prefix": "noto"}': "`icons` must be an object of objects",
    '{"prefix": "noto", "icons": {"a": 1}}': "`icons` must be an object of objects",
    '{"prefix": "crayon", "icons": {}}': "prefix must be one of noto, .*, got 'crayon'",
    '{"prefix": "noto", "icons": {"a": {}}}': "a: an icon needs a text `body`",
    '{"prefix": "noto", "icons": {"a": {"body": "", "width": "9"}}}': "`width` must be a finite number, got '9'",
    '{"prefix": "noto", "icons": {"a": {"body": "", "height": 1e999}}}': "`height` must be a finite number, got inf",
    '{"prefix": "noto", "icons": {"a": {"body": "", "height": 0}}}': "width and height must be positive",
    '{"prefix": "noto", "icons": {"a": {"body": "", "hFlip": true}}}': "mirrored icons are not supported",
    '{"prefix": "noto", "icons": {}}': "no picture is left",
}


@pytest.mark.parametrize("content", BAD_SHEETS)
def test_wrong_icon_sheets(packages, tmp_path, capsys, content):
    folder = spoil(packages[1], "icons.json", content)
    with pytest.raises(ValueError, match=BAD_SHEETS[content]):
        build([folder], tmp_path / "out")
    assert emoji.main(["--from", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("unifiedar data emoji: ")
    assert str(folder) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_arguments(packages, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        build([tmp_path / "nowhere"], out)
    with pytest.raises(ValueError, match=r"icons\.json: no such file; give the unpacked folder"):
        build([tmp_path], out)
    with pytest.raises(ValueError, match=r"info\.json: the licence of the set is not stated"):
        build([spoil(packages[0], "info.json", '{"license": "MIT"}')], out)
    with pytest.raises(ValueError, match="one set a style, got noto, noto"):
        build([packages[1], packages[1]], out)
    with pytest.raises(ValueError, match="at least one folder"):
        build([], out)
    for size in (7, 1025):
        with pytest.raises(ValueError, match=f"size must be 8 to 1024 pixels, got {size}"):
            build(packages[1:], out, size=size)
    with pytest.raises(ValueError, match="jobs must be positive, got 0"):
        build(packages[1:], out, jobs=0)
    with pytest.raises(ValueError, match="no such folder; make it with `unifiedar data emoji`"):
        emoji.load(out)


def test_load_refuses_what_does_not_belong_together(packages, tmp_path):
    out = tmp_path / "out"
    build(packages, out)
    np.save(out / "images.npy", np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must be uint8 \(7, 16, 16, 3\), got uint8 \(3, 16, 16, 3\)"):
        emoji.load(out)
    np.save(out / "images.npy", np.array([{"a": "pickle"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"images\.npy: cannot be read"):
        emoji.load(out)
    spoil(out, "index.json", '{"version": 1, "pictures": [{"concept": "a"}]}')
    with pytest.raises(ValueError, match="every picture needs a concept, a style and an icon"):
        emoji.load(out)
    spoil(out, "index.json", '{"version": 0}')
    with pytest.raises(ValueError, match="not an index of version 1"):
        emoji.load(out)


def test_rendering_says_when_cairosvg_is_missing(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(ValueError, match=r"needs cairosvg: pip install 'unifiedar-kernels\[train\]'"):
        build(packages, tmp_path / "out")


def test_main_builds_and_counts(packages, tmp_path, capsys):
    argv = ["emoji", "--from", *map(str, packages), "--out", str(tmp_path / "out"), "--size", "16", "--jobs", "1"]
    assert data.main(argv) == 0
    out = capsys.readouterr().out
    assert "noto: 3 pictures from @iconify-json/noto 9.8.7 (Apache-2.0)\n    left out: 3 skin tones, 1 hidden" in out
    assert "7 pictures of 16 x 16 pixels" in out
    assert "5 concepts, 2 in 2 or more styles" in out


@pytest.mark.parametrize(("argv", "got"), [(["fonts"], "'fonts'"), ([], "nothing")])
def test_main_names_the_data_sets(capsys, argv, got):
    assert data.main(argv) == 2
    assert f"the data set must be emoji, got {got}" in capsys.readouterr().err
    assert data.main(["--help"]) == 0
    assert "usage: unifiedar data emoji" in capsys.readouterr().out


# Held-out pairs


def random_set(concepts: int = 400) -> emoji.EmojiSet:
    """Noise pictures: each concept in all four styles, but for the first twenty, drawn in two."""
    pairs = [
        (f"thing {i}", style)
        for style in emoji.STYLES
        for i in range(concepts)
        if i >= 20 or style in ("noto", "fluent")
    ]
    images = np.random.default_rng(0).integers(0, 256, (len(pairs), 8, 8, 3), dtype=np.uint8)
    names = [concept for concept, _ in pairs]
    return emoji.EmojiSet(images, names, [style for _, style in pairs], [name.replace(" ", "-") for name in names], [])


def test_committed_held_out_pairs():
    committed = json.loads(Path(emoji.__file__).with_name("emoji_held_out.json").read_text())
    pairs = [tuple(pair) for pair in committed]
    assert pairs == sorted(emoji.held_out())
    assert len(pairs) == 168
    assert len({concept for concept, _ in pairs}) == 168  # one style each
    assert Counter(style for _, style in pairs) == {"noto": 46, "twemoji": 42, "fluent": 40, "openmoji": 40}
    assert not [concept for concept, _ in pairs if concept.startswith("flag ")]


def test_committed_pairs_follow_the_rule():
    def fraction(words: str) -> float:
        return int(hashlib.sha256(words.encode()).hexdigest()[:12], 16) / 16**12

    assert all(fraction(f"held out/{concept}") < 0.1 for concept, _ in emoji.held_out())


def test_choice_follows_the_rule():
    drawn = random_set()
    chosen = emoji.choose_held_out(drawn)
    assert chosen == sorted(chosen)
    assert 20 <= len(chosen) <= 60
    assert len(dict(chosen)) == len(chosen)
    assert all(int(concept.split()[1]) >= 20 for concept, _ in chosen)
    assert {style for _, style in chosen} == set(emoji.STYLES)
    order = np.random.default_rng(1).permutation(len(drawn))
    shuffled = emoji.EmojiSet(
        drawn.images[order], *([values[i] for i in order] for values in (drawn.concepts, drawn.styles, drawn.icons)), []
    )
    assert emoji.choose_held_out(shuffled) == chosen


def test_near_duplicates_are_not_held_out():
    drawn = random_set()
    concept, style = emoji.choose_held_out(drawn)[0]
    row = drawn.pairs.index((concept, style))
    twin = next(i for i, (other, s) in enumerate(drawn.pairs) if s == style and other != concept)
    elsewhere = next(i for i, (_, s) in enumerate(drawn.pairs) if s != style)
    drawn.images[elsewhere] = drawn.images[row]
    assert (concept, style) in emoji.choose_held_out(drawn)  # only pictures of the same style count
    drawn.images[twin] = drawn.images[row]
    assert emoji.near_duplicates(drawn, [row, twin]).tolist() == [0, 0]
    passed_over = dict(emoji.choose_held_out(drawn))
    assert passed_over[concept] != style
    drawn.images[twin] = np.clip(drawn.images[row].astype(int) + 7, 0, 255)
    assert 0 < emoji.near_duplicates(drawn, [row])[0] <= 7
    assert dict(emoji.choose_held_out(drawn)) == passed_over


def test_near_duplicates_against_the_definition():
    drawn = random_set(30)
    styles = np.array(drawn.styles)
    pixels = drawn.images.reshape(len(drawn), -1).astype(np.float64)
    rows = [3, 70, 41]
    expected = []
    for row in rows:
        others = [i for i in np.flatnonzero(styles == styles[row]) if i != row]
        expected.append(min(np.sqrt(((pixels[row] - pixels[i]) ** 2).mean()) for i in others))
    np.testing.assert_allclose(emoji.near_duplicates(drawn, rows), expected, rtol=1e-12)
    alone = emoji.EmojiSet(drawn.images[:1], ["a"], ["noto"], ["a"], [])
    assert emoji.near_duplicates(alone, [0]).tolist() == [np.inf]


def test_split():
    held = sorted(emoji.held_out())
    pairs = [(concept, style) for concept, _ in held for style in emoji.STYLES]
    images = np.zeros((len(pairs), 8, 8, 3), np.uint8)
    names = [concept for concept, _ in pairs]
    drawn = emoji.EmojiSet(images, names, [style for _, style in pairs], names, [])
    train, test = emoji.split(drawn)
    assert sorted([*train, *test]) == list(range(len(pairs)))
    assert sorted(pairs[i] for i in test) == held
    assert {pairs[i][0] for i in train} == set(names)  # every concept is left in some style
    train, test = emoji.split(drawn, ["noto", "fluent"])
    assert {pairs[i][1] for i in [*train, *test]} == {"noto", "fluent"}
    assert sorted(pairs[i] for i in test) == [pair for pair in held if pair[1] in ("noto", "fluent")]
    assert train.dtype == test.dtype == np.int64
    with pytest.raises(ValueError, match=r"split: styles must be among noto, .*, got 'crayon'"):
        emoji.split(drawn, ["noto", "crayon"])


# Tokenizer

CAPTIONS = [emoji.caption(concept, style) for concept, style in sorted(emoji.held_out())]


@pytest.fixture(scope="module")
def tokenizer() -> text.TextTokenizer:
    return text.train_tokenizer(CAPTIONS, 512)


def test_ids(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 512
    assert tokenizer.specials == {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<im_start>": 508,
        "<im_end>": 509,
        "<vi_start>": 510,
        "<vi_end>": 511,
    }
    assert (tokenizer.unknown, tokenizer.start, tokenizer.end) == (0, 1, 2)
    assert (tokenizer.image_start, tokenizer.image_end) == (508, 509)
    assert (tokenizer.video_start, tokenizer.video_end) == (510, 511)
    ids = {tokenizer.inner.id_to_token(i) for i in range(512)}
    assert len(ids) == 512
    assert None not in ids


def test_captions_are_short(tokenizer):
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])) == CAPTIONS[0]
    assert sum(len(tokenizer.encode(words)) for words in CAPTIONS) < 0.5 * sum(map(len, CAPTIONS))


@given(st.text(alphabet=st.characters(codec=None)))
def test_every_string_comes_back(tokenizer, words):
    ids = tokenizer.encode(words)
    assert tokenizer.decode(ids) == tokenizer.normalize(words)
    assert not set(ids) & set(tokenizer.specials.values())


@given(st.lists(st.sampled_from([*text.SPECIALS, " ", "a", "<", ">", "s"])).map("".join))
def test_typed_special_tokens_are_text(tokenizer, words):
    ids = tokenizer.encode(words)
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == words.strip()


def test_special_tokens_stay_text_for_other_loaders(tokenizer, tmp_path):
    import tokenizers

    tokenizer.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for token in text.SPECIALS:
        assert not set(plain.encode(f"a {token}{token} b").ids) & set(tokenizer.specials.values())


def test_normalization(tokenizer):
    assert tokenizer.encode("  Red ＡPPLE\n") == tokenizer.encode("red apple")
    assert tokenizer.normalize("ﬁre") == "fire"
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a?b"


@given(st.lists(st.integers(0, 511)))
def test_every_id_decodes(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_decode(tokenizer):
    ids = tokenizer.encode("red apple")
    assert tokenizer.decode([1, *ids, 508, 509, 2]) == "red apple"
    for wrong in (-1, 512):
        with pytest.raises(ValueError, match=f"decode: ids must be 0 to 511, got {wrong}"):
            tokenizer.decode([wrong])


def test_training_is_deterministic(tokenizer, tmp_path):
    assert text.train_tokenizer(CAPTIONS[::-1], 512).inner.to_str() == tokenizer.inner.to_str()
    code = (
        "import sys; from unifiedar import tokenizer as text; from unifiedar.data import emoji\n"
        "captions = [emoji.caption(*pair) for pair in emoji.held_out()]\n"
        "text.train_tokenizer(captions, 512).save(sys.argv[1])"
    )
    root = Path(data.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "tokenizer.json")], check=True, cwd=root)
    tokenizer.save(tmp_path / "here.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "here.json").read_bytes()


def test_training_needs_room_and_clean_captions():
    small = text.train_tokenizer(["ab"], 1024)
    assert small.vocab_size < 300
    assert small.video_end == small.vocab_size - 1
    assert small.decode(small.encode("straße")) == "straße"
    with pytest.raises(ValueError, match="vocab_size must be at least 263, got 262"):
        text.train_tokenizer(["ab"], 262)
    with pytest.raises(ValueError, match="must not hold a special token, got <im_start>"):
        text.train_tokenizer(["a <IM_start> b"])


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        assert text.load(path).inner.to_str() == tokenizer.inner.to_str()


def test_load_refuses_other_files(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        text.load(tmp_path)
    for content in ("{", "[]", "\x00"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer \("):
            text.load(path)
    added = json.loads(tokenizer.inner.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added["added_tokens"] = [{"id": 1, "content": "<s>", "special": True, **flags}]
    path.write_text(json.dumps(added))
    with pytest.raises(ValueError, match=r"not a tokenizer of this package .*no added tokens"):
        text.load(path)
    del added["added_tokens"]
    vocab = added["model"]["vocab"]
    vocab["<s>"], vocab["</s>"] = vocab["</s>"], vocab["<s>"]
    path.write_text(json.dumps(added | {"added_tokens": []}))
    with pytest.raises(ValueError, match="<s> must have id 1, got 2"):
        text.load(path)


# Pictures that ship


def test_samples():
    found = data.samples()
    assert len(found) == 36
    assert Counter(sample.style for sample in found) == {"noto": 12, "twemoji": 12, "fluent": 12}
    licences = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT"}
    for sample in found:
        assert sample.image.dtype == np.uint8
        assert sample.image.shape == (64, 64, 3)
        assert sample.image.std() > 10
        assert sample.licence == licences[sample.style]
        held_out = (sample.concept, sample.style) in emoji.held_out()
        assert sample.split == ("held out" if held_out else "train")
    assert sum(sample.split == "held out" for sample in found) == 6
    assert found[0].caption == emoji.caption(found[0].concept, found[0].style)


def test_sample_files():
    folder = Path(data.__file__).with_name("samples")
    names = {entry["name"] for entry in json.loads((folder / "samples.json").read_text())}
    assert {path.name for path in folder.iterdir()} == names | {"samples.json", "LICENSES.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    notes = (folder / "LICENSES.md").read_text()
    for words in ("Apache-2.0", "CC-BY-4.0", "MIT", "Google", "Microsoft", "Twitter"):
        assert words in notes


def test_write_samples(tmp_path):
    from unifiedar.data import _samples

    pairs = [(concept, style) for concept in _samples.CONCEPTS for style in _samples.STYLES]
    images = np.random.default_rng(0).integers(0, 256, (36, 64, 64, 3), dtype=np.uint8)
    names, styles = [concept for concept, _ in pairs], [style for _, style in pairs]
    sources = [{"style": style, "licence": style.upper()} for style in emoji.STYLES]
    drawn = emoji.EmojiSet(images, names, styles, names, sources)
    assert _samples.write_samples(drawn, tmp_path / "samples") == 36
    entries = json.loads((tmp_path / "samples" / "samples.json").read_text())
    shipped = json.loads(Path(data.__file__).with_name("samples").joinpath("samples.json").read_text())
    assert [entry | {"licence": ""} for entry in entries] == [entry | {"licence": ""} for entry in shipped]
    with pytest.raises(ValueError, match="got none of 'teapot, fluent style'"):
        _samples.write_samples(emoji.EmojiSet(images[:-1], names[:-1], styles[:-1], names, sources), tmp_path)


# Categories


def test_one_category(tmp_path, packages):
    for folder in packages:
        icons = sorted(json.loads((folder / "icons.json").read_text())["icons"])
        (folder / "metadata.json").write_text(json.dumps({"categories": {"Food & Drink": icons[:1]}}))
    everything = build(packages, tmp_path / "all")
    food = build(packages, tmp_path / "food", category="Food & Drink")
    assert 0 < len(food) <= len(packages) < len(everything)
    assert all(source["left_out"]["other categories"] > 0 for source in food.sources)
    # The category is part of what is cached.
    assert len(build(packages, tmp_path / "food")) == len(everything)
    with pytest.raises(ValueError, match="category must be one of Food & Drink, got 'Drink'"):
        build(packages, tmp_path / "none", category="Drink")


def test_category_of_a_package_without_any(tmp_path, packages, capsys):
    arguments = ["emoji", "--from", *map(str, packages), "--out", str(tmp_path / "out"), "--category", "Food & Drink"]
    assert data.main(arguments) == 1
    assert "metadata.json" in capsys.readouterr().err
