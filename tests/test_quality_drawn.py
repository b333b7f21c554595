"""What a VAR's drawings are measured by: the Frechet distance against closed forms, the command, the card."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import CONCEPTS, STYLES, small_model, write_pictures

from unifiedar import checkpoints, quality
from unifiedar.models import VAR, VQVAE, VARConfig, VQVAEConfig
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.quality_drawn import frechet_distance, logit_cost, measure_drawn
from unifiedar.train.batches import Pictures

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import card
from bench.__main__ import main as bench

CPU = torch.device("cpu")
TOKENIZER = VQVAEConfig(DecoderConfig(32, (1, 1, 2), 1, 8, 16, (), fused_qkv=True), 24, scales=(1, 2, 3, 4))


def small_var(names):
    torch.manual_seed(0)
    config = VARConfig(2, 64, 2, TOKENIZER.scales, len(names), 24, 8, shared_adaln=True)
    model = VAR(config, VQVAE(TOKENIZER).eval().requires_grad_(False)).eval().requires_grad_(False)
    model.class_names = tuple(names)
    return model


# ---- the distance


def rows_with(mean, covariance, count=500, seed=0):
    """Rows whose mean and (unbiased) covariance are just these, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_a_shift_is_its_square():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = torch.arange(7.0, dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-12)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


def test_scaling_is_the_difference_of_standard_deviations():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x - x.mean(0)
    trace = float(x.square().sum() / 49)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * trace, rel=1e-12)


def test_covariances_that_commute():
    """Diagonal ones: the squared differences of standard deviations, of numbers of rows that differ."""
    first, second = torch.tensor([1.0, 4, 9]).double(), torch.tensor([16.0, 1, 9]).double()
    x = rows_with(torch.zeros(3).double(), first.diag())
    y = rows_with(torch.tensor([0.0, 1, 2]).double(), second.diag(), 41, seed=5)
    want = 5 + float((first.sqrt() - second.sqrt()).square().sum())
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-10)


def test_covariances_that_do_not_commute():
    """Two by two: the trace of the root of M is sqrt(tr M + 2 sqrt(det M))."""
    first = torch.tensor([[2.0, 0.9], [0.9, 0.5]]).double()
    second = torch.tensor([[1.0, -0.6], [-0.6, 3.0]]).double()
    product = first @ second
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(product.det())))
    want = float(first.trace() + second.trace()) - 2 * root
    zero = torch.zeros(2).double()
    assert frechet_distance(rows_with(zero, first), rows_with(zero, second, 30, 3)) == pytest.approx(want, rel=1e-10)


def test_fewer_rows_than_channels():
    """Rank-deficient covariances, against the root taken by eigenvalues, which is less exact."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (6, 30))
    first, second = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(first)
    half = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
    root = torch.linalg.eigvalsh(half @ second @ half).clamp_min(0).sqrt().sum()
    want = float((x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-12)
    assert frechet_distance(x.float(), y.half()) == pytest.approx(want, rel=1e-2)


def test_one_line_of_points():
    """In one dimension: means and standard deviations apart."""
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0], [8.0]])
    assert frechet_distance(x, y) == pytest.approx((2 - 4) ** 2 + (math.sqrt(2) - 4) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "x must be"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "y must be"),
        (torch.zeros(4), torch.zeros(4, 2), "x must be"),
        (torch.zeros(4, 3), torch.full((4, 3), math.nan), "y must be finite"),
    ],
)
def test_distance_refuses(x, y, words):
    with pytest.raises(ValueError, match=f"frechet_distance: {words}"):
        frechet_distance(x, y)


# ---- the cost of 8 bits


def test_logit_cost():
    exact = torch.tensor([[0.0, 1, 2], [3, 0, 3]])
    same = logit_cost(exact, exact)
    assert (same["largest"], same["mean"], same["same_code"], same["divergence"]) == (0, 0, 1, 0)
    assert same["deviation"] == pytest.approx(math.sqrt((2 / 3 + 2) / 2))
    other = exact + torch.tensor([[0.0, 1.5, 0], [0, 0, 0]])
    found = logit_cost(exact[None], other[None])
    assert found["largest"] == 1.5
    assert found["mean"] == pytest.approx(0.25)
    assert found["same_code"] == 0.5
    p, q = exact[0].double().softmax(0), other[0].double().softmax(0)
    assert found["divergence"] == pytest.approx(float((p * (p / q).log()).sum()) / 2)


# ---- the figures


@pytest.fixture
def parts(tmp_path):
    return Pictures.load(write_pictures(tmp_path / "data"), list(STYLES), CPU, 16)


def test_figures_are_those_of_what_is_drawn(parts, monkeypatch):
    """A model that draws the very pictures held out is at distance 0; one that draws training pictures is not."""
    train, held_out = parts
    model, judge = small_var(sorted(CONCEPTS)), small_model()
    order = {train.concept_names.index(name): i for i, name in enumerate(train.concept_names)}
    calls = []

    def perfect(labels, **settings):
        calls.append(settings)
        if isinstance(labels, list):
            return torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8)
        place = [held_out.concepts.tolist().index(order[int(label)]) for label in labels]
        return held_out.images[place]

    monkeypatch.setattr(model, "generate", perfect)
    settings = {"cfg": 1.5, "top_k": 24, "top_p": 0.5}
    figures, (sheet, texts) = measure_drawn(model, judge, train, held_out, rounds=3, batch=5, settings=settings)
    assert figures["classes"] == "concept"
    assert figures["drawn"] == 3 * len(held_out)
    assert calls[:3] == [{**settings, "seed": i, "images_per_call": 5} for i in range(3)]
    # Thrice the same pictures: means agree, covariances by (3 n - 1) / (3 (n - 1)).
    assert figures["frechet"]["drawn"] < 0.2 * figures["frechet"]["seen"]
    same = [i for i, c in enumerate(train.concepts.tolist()) if c in held_out.concepts.tolist()]
    assert figures["frechet"]["seen_pictures"] == len(same)
    want = frechet_distance(judge.pool(train.images[same]), judge.pool(held_out.images))
    assert figures["frechet"]["seen"] == pytest.approx(want, rel=1e-9)
    again = model.vae.reconstruct(held_out.images)[0]
    want = frechet_distance(judge.pool(again), judge.pool(held_out.images))
    assert figures["frechet"]["rebuilt"] == pytest.approx(want, rel=1e-6)
    assert figures["rebuilt"]["held_out_psnr_db"] == pytest.approx(quality.decibels(held_out.images, again)["psnr_db"])
    assert figures["named"]["pictures"] == len(held_out)
    assert len(sheet) == len(texts) == 4 * len(CONCEPTS)
    assert texts[::4] == sorted(CONCEPTS)
    assert torch.equal(sheet[0], train.images[train.concepts == 0][0])


def test_cost_of_8_bits_is_told_of_the_exact_model(parts):
    """An int8 model loses nothing by int8 a second time; the one that it was made from does."""
    train, held_out = parts
    exact = small_var(STYLES)
    model = copy.deepcopy(exact)
    for layer in (*model.blocks.modules(), *model.shared_ada_lin.modules()):
        if isinstance(layer, torch.nn.Linear):
            entries, scale = checkpoints.quantize_rows(layer.weight)
            layer.weight.copy_(entries.float() * scale[:, None])
    options = {"rounds": 1, "batch": 64, "settings": {"cfg": 0.0, "top_k": 0, "top_p": 0.0}}
    costs = [
        measure_drawn(model, small_model(), train, held_out, **options, exact=one)[0]["eight_bits"]["int8"]["mean"]
        for one in (None, exact)
    ]
    assert costs[0] < 0.01 * costs[1]


def test_classes_may_be_styles(tmp_path, device):
    where = torch.device(device)
    train, held_out = Pictures.load(write_pictures(tmp_path / "data"), list(STYLES), where, 16)
    options = {"rounds": 1, "batch": 64, "settings": {"cfg": 0.0, "top_k": 0, "top_p": 0.0}}
    model = small_var(STYLES).to(where)
    model.vae.to(where)
    figures, _ = measure_drawn(model, small_model().to(where), train, held_out, **options)
    assert figures["classes"] == "style"
    assert figures["frechet"]["seen_pictures"] == len(train)
    assert "named" not in figures
    with pytest.raises(ValueError, match="concepts or the styles"):
        measure_drawn(small_var(("dog", "cat")), small_model(), train, held_out, **options)


# ---- the command and the card


@pytest.fixture
def measured(tmp_path, capsys):
    """What the recipe leaves: the folder with quality and logs, made by the command."""
    data = write_pictures(tmp_path / "data")
    model = small_var(sorted(CONCEPTS)).save_whole(tmp_path / "run" / "model")
    small_model().save(tmp_path / "judge")
    argv = ["--data", data, "--model", model, "--judge", tmp_path / "judge", "--styles", *STYLES, "--rounds", 2]
    argv += ["--device", "cpu", "--guidance", 3, "--out", tmp_path / "run" / "quality"]
    assert quality.main(list(map(str, argv))) == 0
    for stage, last in (("vae", {"held_out_psnr_db": 27.25}), ("var", {"held_out_loss": 3.5})):
        (tmp_path / "run" / stage).mkdir()
        step = {"step": 70, "loss": 1.25, "learning_rate": 1e-3, "pictures_per_second": 9000.0}
        if stage == "var":
            step |= {f"scale_{i}_{kind}": 0.5 + i for i in range(4) for kind in ("loss", "accuracy")}
        lines = [json.dumps(one) for one in (step | {"step": 50}, step, {"step": 70, **last})]
        (tmp_path / "run" / stage / "log.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "run"


def test_command_and_card(measured, tmp_path, capsys):
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((measured / "quality" / "quality.json").read_text())
    assert figures["sampling"] == {"cfg": 2.0, "top_k": 24, "top_p": 0.96}
    assert figures["drawn"] == 4
    assert figures["features"]["width"] == 32
    assert figures["sizes"]["num_classes"] == len(CONCEPTS)
    assert all(0 <= figures["frechet"][key] < 4 for key in ("drawn", "seen", "rebuilt", "drawn_to_seen"))
    docs = tmp_path / "docs"
    assert bench(["card", str(measured), "--docs", str(docs)]) == 0
    text = (docs / card.PAGE).read_text()
    for part in (
        f"| drawn | 4 | {figures['frechet']['drawn']:.4f} |",
        "cfg 2, top-k 24",
        "| VAR | 70 | 9,000 | loss 1.25, held_out_loss 3.5 |",
        "held_out_psnr_db 27.25",
        "| loss | 0.5 | 1.5 | 2.5 | 3.5 |",
        "**not** Inception",
        f"| fp8 | {figures['eight_bits']['fp8']['largest']:.3f} |",
    ):
        assert part in text, part
    assert (docs / card.SHEET).is_file()
    (docs / card.PAGE).unlink()
    assert bench(["card", "--docs", str(docs)]) == 0
    assert (docs / card.PAGE).read_text() == text, "the figures alone make the page"


def test_card_refuses(measured, tmp_path, capsys):
    assert bench(["card", "--docs", str(tmp_path / "none")]) == 2
    assert "var-emoji.json: cannot be read" in capsys.readouterr().err
    assert bench(["card", str(tmp_path / "none"), "--docs", str(tmp_path / "docs")]) == 2
    (measured / "quality" / "drawn.png").unlink()
    assert bench(["card", str(measured), "--docs", str(tmp_path / "docs")]) == 2
    assert "drawn.png: no such file" in capsys.readouterr().err
    with pytest.raises(card.CardError, match="not those of"):
        card.render({"model": "emoji"})


def test_the_card_is_that_of_its_figures():
    docs = Path(__file__).resolve().parent.parent / "docs"
    there = [(docs / name).exists() for name in (card.FIGURES, card.SHEET, card.PAGE)]
    assert len(set(there)) == 1, "figures, sheet and page come together: python -m bench card"
    if there[0]:
        assert (docs / card.PAGE).read_text() == card.render(json.loads((docs / card.FIGURES).read_text()))


def test_command_refuses(measured, tmp_path, capsys):
    data, judge = str(tmp_path / "data"), str(tmp_path / "judge")
    for argv, words in (
        (["--model", judge, "--rounds", "2"], "--rounds: only a VAR"),
        (["--model", str(measured / "model"), "--guidance", "0.5"], "--guidance: must be at least 1"),
        (["--model", str(measured / "model"), "--judge", str(tmp_path / "no")], "no such model"),
        (["--model", str(measured / "model"), "--judge", judge, "--exact", str(tmp_path / "no")], "no such model"),
        (["--model", str(measured / "model"), "--judge", judge, "--top-k", "25"], "top_k must be from 0 to 24"),
    ):
        assert quality.main(["--data", data, "--styles", *STYLES, "--device", "cpu", *argv]) == 1
        assert words in capsys.readouterr().err
    small_var(sorted(CONCEPTS)).save(tmp_path / "alone")
    assert quality.main(["--data", data, "--model", str(tmp_path / "alone"), "--device", "cpu"]) == 1
    assert "has no tokenizer in it" in capsys.readouterr().err
    network = replace(TOKENIZER.network, ch_mult=(1, 2))
    other = VAR(VARConfig(1, 32, 1, (1,), 2, 24, 8), VQVAE(replace(TOKENIZER, network=network, scales=(1,))).eval())
    with pytest.raises(ValueError, match="the judge must take pictures of 2 pixels"):
        measure_drawn(other, small_model(), None, None, rounds=1, batch=1, settings={})
