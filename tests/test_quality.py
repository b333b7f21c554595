"""The figures of the model card: each of them against a case whose answer is known."""

import json

import pytest
import torch
from small import small_model, write_pictures

from unifiedar import quality
from unifiedar.data import emoji
from unifiedar.train.batches import Pictures

CPU = torch.device("cpu")


@pytest.fixture
def parts(tmp_path):
    return Pictures.load(write_pictures(tmp_path / "data"), ["noto", "twemoji"], CPU, 16)


def test_answers_are_taken_apart():
    assert quality.parse_answer("red apple, noto style") == ("red apple", "noto")
    assert quality.parse_answer("first, second, noto style") == ("first, second", "noto")
    assert quality.parse_answer("red apple") == ("red apple", "")


def test_named_counts_what_describe_says(parts, monkeypatch):
    train, _ = parts
    m = quality.Measure(small_model(), train)
    truth = [train.concept_names[i] for i in train.concepts.tolist()]

    def describe(images, *, answers, beams):
        found = []
        for concept in truth:
            wrong = [(f"thing {i}, noto style", -float(i)) for i in range(3)]
            found.append([*wrong, (f"{concept}, noto style", -9.0)])
        return found

    monkeypatch.setattr(m.model, "describe", describe)
    figures = m.named(train.images, train.concepts, train.styles)
    noto = (train.styles == train.style_names.index("noto")).double().mean()
    assert (figures["concept"], figures["concept_in_five"], figures["style"]) == (0, 1, pytest.approx(float(noto)))


def test_psnr(parts, monkeypatch):
    train, _ = parts
    m = quality.Measure(small_model(), train)
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    off = images.clone()
    off[0] += 10
    off[1] += 20
    monkeypatch.setattr(m.model, "reconstruct", lambda x: (off, None))
    figures = m.rebuilt(images)
    each = [20 * torch.log10(torch.tensor(255.0 / d)) for d in (10, 20)]
    assert figures["psnr_db"] == pytest.approx(float(sum(each) / 2), abs=1e-4)
    assert figures["psnr_of_mean_error_db"] == pytest.approx(
        10 * float(torch.log10(torch.tensor(255.0**2 / 250))), abs=1e-4
    )


def test_nearest_text_is_right_for_the_texts_themselves(parts, monkeypatch):
    train, _ = parts
    m = quality.Measure(small_model(), train)
    m.texts = torch.eye(len(train.concept_names), 32)
    monkeypatch.setattr(m.model, "pool", lambda images: m.texts[train.concepts])
    assert m.nearest_text(train.images, train.concepts)["nearest_text_concept"] == 1
    wrong = (train.concepts + 1) % len(train.concept_names)
    assert m.nearest_text(train.images, wrong)["nearest_text_concept"] == 0


def test_command(tmp_path, capsys):
    data = write_pictures(tmp_path / "data")
    small_model().save(tmp_path / "m")
    argv = ["--data", data, "--model", tmp_path / "m", "--styles", "noto", "twemoji", "--out", tmp_path / "q"]
    assert quality.main([*map(str, argv), "--sample", "2", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "q" / "quality.json").read_text())
    assert figures["held_out"]["pictures"] == 2
    assert 0 < figures["codes_used"] <= 1
    assert (tmp_path / "q" / "drawn-guidance-3.png").is_file()


def test_command_refuses(tmp_path, capsys, monkeypatch):
    data = write_pictures(tmp_path / "data")
    assert quality.main(["--data", str(data), "--model", str(tmp_path / "none")]) == 1
    assert "no such model" in capsys.readouterr().err
    small_model().save(tmp_path / "m")
    assert quality.main(["--data", str(tmp_path / "none"), "--model", str(tmp_path / "m")]) == 1
    assert "no such folder" in capsys.readouterr().err
    monkeypatch.setattr(emoji, "held_out", frozenset)
    assert quality.main(["--data", str(data), "--model", str(tmp_path / "m"), "--styles", "noto", "twemoji"]) == 1
    assert "none of its pictures is held out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main(["--data", str(data), "--batch", "0"])
