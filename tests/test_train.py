"""Training: both stages end to end on a tiny model, resuming, the losses, the codebook's updates, what is refused."""

import contextlib
import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import two_ranks
from small import CONCEPTS, small_config, small_model, small_tokenizer, write_pictures
from torch.utils._python_dispatch import TorchDispatchMode

from unifiedar import train
from unifiedar.models import VILAU
from unifiedar.nn import ResidualQuantizer
from unifiedar.train import tower, unified
from unifiedar.train.batches import Pictures, augment, collage, pad_ids, step_generator
from unifiedar.train.captured import Recorder
from unifiedar.train.loop import Loop
from unifiedar.train.unified import IGNORED, Sequences

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(VILAU.configs, "tiny", small_config())
    folder = write_pictures(tmp_path / "data")
    small_tokenizer().save(folder / "tokenizer.json")
    return folder


def run(stage: str, data, out, *options: object) -> int:
    common = ["--data", data, "--out", out, "--batch", 8, "--precision", "fp32", "--device", "cpu", "--warmup", 2]
    own = ["--config", "tiny"] if stage == "tower" else []
    return train.main([stage, *map(str, [*common, *own, *options])])


def weights(folder) -> dict[str, torch.Tensor]:
    return VILAU.from_checkpoint(folder / "model").state_dict()


# ---- both stages


def test_tower_then_unified(data, tmp_path):
    assert run("tower", data, tmp_path / "t", "--steps", 4, "--align", 0.5, "--sheet-every", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "t" / "log.jsonl").read_text().splitlines()]
    assert {"contrastive", "squared_error", "edge", "commitment"} <= set(lines[-2])
    assert {"held_out_psnr_db", "held_out_nearest_text_concept"} <= set(lines[-1])
    assert (tmp_path / "t" / "reconstructions.png").is_file()
    assert list((tmp_path / "t" / "tensorboard").iterdir())

    assert run("unified", data, tmp_path / "u", "--tower", tmp_path / "t" / "model", "--steps", 3) == 0
    before, after = weights(tmp_path / "t"), weights(tmp_path / "u")
    frozen = {name for name in before if ".rqvaesiglip." in name}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in set(before) - frozen)
    assert (tmp_path / "u" / "drawn.png").is_file()


def test_vocabulary_of_few_captions(data, tmp_path, monkeypatch):
    (data / "tokenizer.json").unlink()
    config = small_config()
    wide = replace(config, language=replace(config.language, vocab_size=1024))
    monkeypatch.setitem(VILAU.configs, "tiny", wide)
    assert run("tower", data, tmp_path / "t", "--steps", 1) == 0
    model = VILAU.from_checkpoint(tmp_path / "t" / "model")
    assert model.config.language.vocab_size == model.config.vision.vocab_size == model.tokenizer.vocab_size < 1024
    assert model.tokenizer.decode(model.token_ids("axe, noto style")) == "axe, noto style"
    # Whatever it answers can be written.
    assert model.describe(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), answers=5)


def test_alignment_comes_before_reconstruction(data, tmp_path):
    assert run("tower", data, tmp_path / "t", "--steps", 2, "--align", 1.0) == 0
    first = json.loads((tmp_path / "t" / "log.jsonl").read_text().splitlines()[0])
    assert "contrastive" in first
    assert "squared_error" not in first


@pytest.mark.parametrize("stage", ["tower", "unified"])
def test_resumed_run_is_the_run_that_was_not_killed(data, tmp_path, stage):
    options = []
    if stage == "unified":
        small_model().save(tmp_path / "start")
        options = ["--tower", tmp_path / "start"]
    run(stage, data, tmp_path / "whole", "--steps", 5, "--save-every", 2, *options)
    # Ended by the clock after its first step, the run leaves what a killed one would: its last checkpoint.
    assert run(stage, data, tmp_path / "parts", "--steps", 5, "--save-every", 2, "--minutes", 0, *options) == 3
    state = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert 0 < state["step"] < 5
    assert run(stage, data, tmp_path / "parts", "--steps", 5, "--save-every", 2, "--resume", *options) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_seed_decides(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("tower", data, tmp_path / name, "--steps", 2, "--seed", seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_it_learns(data, tmp_path):
    """Twelve pictures are soon known: the loss of naming and drawing falls far below that of guessing."""
    run("tower", data, tmp_path / "t", "--steps", 30, "--lr", 3e-3, "--align", 0)
    run(
        "unified", data, tmp_path / "u", "--tower", tmp_path / "t" / "model", "--steps", 60, "--lr", 5e-3, "--batch", 24
    )
    lines = [json.loads(line) for line in (tmp_path / "u" / "log.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "text" in line)
    assert last["text"] < 0.5 * torch.tensor(300.0).log()
    assert last["image"] < 0.8 * torch.tensor(24.0).log()


def test_export_is_small_and_close(tmp_path, capsys):
    model = small_model()
    model.save(tmp_path / "whole")
    total = {}
    for precision in ("int8", "bf16"):
        argv = ["export", "--model", tmp_path / "whole", "--out", tmp_path / precision, "--precision", precision]
        assert train.main(list(map(str, argv))) == 0
        again = VILAU.from_checkpoint(tmp_path / precision)
        assert again.tokenizer is not None
        for name, value in model.state_dict().items():
            error = (again.state_dict()[name].float() - value).abs().max()
            assert error <= value.abs().max() * (1 / 127 if precision == "int8" else 2**-8)
        stored = (tmp_path / precision).glob("*.safetensors")
        total[precision] = sum(path.stat().st_size for path in stored)
    whole = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    assert total["int8"] < 0.5 * whole
    assert total["bf16"] < 0.65 * whole
    assert train.main(["export", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert "no such model" in capsys.readouterr().err


def losses_of(stage, data, tmp_path, monkeypatch, *options):
    """What a run of the stage would call at every step; nothing is trained."""
    small_model().save(tmp_path / "start")
    first = ["--tower", tmp_path / "start"] if stage == "unified" else ["--align", 0]
    steps = []
    monkeypatch.setattr(Loop, "train", lambda self, losses, validate: steps.append(losses) or True)
    assert run(stage, data, tmp_path / "out", *first, *options) == 0
    return steps[0]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["tower", "unified"])
def test_a_step_does_not_wait_for_the_gpu(data, tmp_path, monkeypatch, stage):
    """A single wait in a step keeps the next one's launches from overlapping with this one's arithmetic."""
    losses = losses_of(stage, data, tmp_path, monkeypatch, "--device", "cuda")
    losses(0, 0)["loss"].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses(1, 0)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recorder_captures_what_repeats(monkeypatch):
    """By a graph that only counts: which calls are made, which replayed, and whose gradients stand afterwards."""
    made, replayed, registered = [], [], []

    class Graph:
        def register_generator_state(self, generator):
            registered.append(generator)

        def replay(self):
            replayed.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    parameter, generator = torch.nn.Parameter(torch.zeros(())), torch.Generator()
    recorder = Recorder([parameter], [generator])

    def gradients():
        made.append(True)
        parameter.grad = torch.tensor(float(len(made)))
        return {"loss": parameter.grad}

    # Key, calls made by then, replays by then, and the gradient, which is that of the last call or of the capture.
    for key, calls, replays, gradient in (
        *((0, 1, 0, 1), (0, 2, 0, 2), (0, 3, 1, 3), (0, 3, 2, 3)),
        *((None, 4, 2, 4), (0, 4, 3, 3)),
        *((1, 5, 3, 5), (1, 6, 3, 6), (1, 7, 4, 7), (1, 7, 5, 7)),
        (0, 8, 5, 8),
    ):
        assert recorder.run(key, gradients)["loss"] == gradient
        assert (len(made), len(replayed), float(parameter.grad)) == (calls, replays, gradient)
    assert registered == [generator, generator]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["tower", "unified"])
def test_a_graph_trains_as_steps_do(data, tmp_path, stage):
    options = ["--steps", 12, "--device", "cuda", "--deterministic"]
    if stage == "unified":
        small_model().save(tmp_path / "start")
        options += ["--tower", tmp_path / "start"]
    else:
        options += ["--align", 0.5]
    assert run(stage, data, tmp_path / "steps", *options) == 0
    assert run(stage, data, tmp_path / "graph", *options, "--graph") == 0
    steps, graph = weights(tmp_path / "steps"), weights(tmp_path / "graph")
    assert all(torch.equal(steps[name], graph[name]) for name in steps)


def test_ranks_average_their_gradients(tmp_path):
    """Two ranks end with the same weights, and with those of one process that minimises the mean of their losses."""
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script, tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = two_ranks.Toy()
    optimizer = torch.optim.AdamW(
        [{"params": [expected.matrix], "weight_decay": 0.05}, {"params": [expected.vector], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for step, rate in enumerate((0.1, 0.1, 0.1 * (0.01 + 0.99 * 0.5))):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        ((expected.matrix * 2.0).sum() * (step + 1) + expected.vector.square().sum() / 2).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    for name, value in expected.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", 0], "--steps must be at least 1"),
        (["--batch", 6, "--accumulate", 4], "--accumulate must divide --batch 6"),
        (["--resume"], "no checkpoint"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--align", 2], "--align must be from 0 to 1"),
        pytest.param(
            ["--device", "cuda"],
            r"--device cuda: .* use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_options(data, tmp_path, options, words):
    with pytest.raises(SystemExit, match=words):
        run("tower", data, tmp_path / "out", *options)


def test_bad_stage_and_tower(data, tmp_path, capsys):
    assert train.main(["body"]) == 2
    assert "'tower', 'unified', 'vae', 'var' or 'export', got 'body'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--tower: .*no such model"):
        run("unified", data, tmp_path / "out", "--tower", tmp_path / "nowhere")


def test_pictures_of_another_size(data, tmp_path, monkeypatch):
    config = small_config()
    monkeypatch.setitem(VILAU.configs, "tiny", replace(config, vision=replace(config.vision, image_size=32)))
    with pytest.raises(SystemExit, match="pictures must be 32 pixels wide for this model, got 16"):
        run("tower", data, tmp_path / "out")


def test_tower_without_a_tokenizer(data, tmp_path):
    VILAU(small_config()).save(tmp_path / "start")
    with pytest.raises(SystemExit, match=r"there is no tokenizer\.json in it"):
        run("unified", data, tmp_path / "out", "--tower", tmp_path / "start")


def test_missing_data_is_one_line(data, tmp_path):
    with pytest.raises(SystemExit, match=r"no such folder"):
        run("tower", tmp_path / "nowhere", tmp_path / "out")


def test_collages_mix_pictures_of_one_style():
    images = torch.arange(1.0, 7)[:, None, None, None].expand(6, 3, 16, 16)
    styles = torch.tensor([0, 1, 0, 1, 0, 2])
    chosen = torch.tensor([True, True, True, False, True, True])
    first, again = (collage(images, styles, chosen, step_generator(0, 1, 0, CPU)) for _ in range(2))
    assert torch.equal(first, again)
    for i, picture in enumerate(first):
        values = set(picture.unique().tolist()) - {i + 1.0}
        assert len(values) == (i not in (3, 5)), "one other picture, if one is asked for and there is one"
        assert all(styles[int(v) - 1] == styles[i] for v in values)
        cells = picture.unfold(1, 4, 4).unfold(2, 4, 4)
        assert torch.equal(cells.amin(dim=(0, 3, 4)), cells.amax(dim=(0, 3, 4))), "cells of 4 x 4"
        assert 0.1 < (picture == i + 1).double().mean() < 0.9 or not values


# ---- pieces


def test_sigmoid_loss_against_the_double_sum():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (5, 7))
    positive = torch.rand(5, 7) < 0.3
    scale, bias = torch.tensor([1.3], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        for j in range(7):
            z = float(images[i] @ texts[j]) * math.exp(1.3) - 2.0
            expected += math.log1p(math.exp(-z if positive[i, j] else z)) / 5
    assert float(tower.sigmoid_loss(images, texts, positive, scale, bias)) == pytest.approx(expected, rel=1e-5)
    known = torch.ones(5, 7, dtype=torch.bool)
    known[:, 4:] = False
    part = tower.sigmoid_loss(images, texts[:4], positive[:, :4], scale, bias)
    assert float(tower.sigmoid_loss(images, texts, positive, scale, bias, known)) == pytest.approx(
        float(part), rel=1e-6
    )


def test_edge_loss_ignores_a_constant():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    assert float(tower.edge_loss(x + 0.5, x)) == pytest.approx(0, abs=1e-6)
    assert float(tower.edge_loss(x, torch.zeros_like(x))) > 1


def test_quantizer_update_is_the_moving_average():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, 6, 2, decay=0.9).train()
    book = quantizer.codebooks[0]
    book.cluster_size_ema.fill_(50)
    book.embed_ema.copy_(book.table * 50)
    size, embed, table = book.cluster_size_ema.clone(), book.embed_ema.clone(), book.table.clone()
    x = torch.randn(30, 6, requires_grad=True)
    features, codes, commitment = quantizer(x)

    residual, sums, counts = x.detach().clone(), torch.zeros(4, 6), torch.zeros(4)
    partial, errors = torch.zeros_like(residual), []
    for d in range(2):
        nearest = torch.cdist(residual, table).argmin(1)
        assert torch.equal(nearest, codes[:, d])
        sums.index_add_(0, nearest, residual)
        counts += torch.bincount(nearest, minlength=4)
        residual, partial = residual - table[nearest], partial + table[nearest]
        errors.append((x.detach() - partial).square().mean())
    size, embed = 0.9 * size + 0.1 * counts, 0.9 * embed + 0.1 * sums
    smoothed = (size + 1e-5) / (size.sum() + 4e-5) * size.sum()
    torch.testing.assert_close(book.cluster_size_ema, size)
    torch.testing.assert_close(book.table, embed / smoothed[:, None])
    torch.testing.assert_close(commitment, torch.stack(errors).mean())
    torch.testing.assert_close(features, partial)
    assert torch.equal(book.weight[-1], torch.zeros(6))

    gradient = torch.randn(30, 6)
    features.backward(gradient)
    torch.testing.assert_close(x.grad, gradient)


def test_dead_codes_come_back_from_the_batch():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 4, 1, decay=0.5).train()
    book = quantizer.codebooks[0]
    book.weight[:-1] = 1e3  # far from everything: one code takes all, the others die
    book.embed_ema.fill_(1e3)
    x = torch.randn(64, 4)
    for _ in range(3):
        quantizer(x)
    # One code went on being the nearest to everything; the seven others sit among the vectors now.
    assert (torch.cdist(book.table, x).amin(1) < 1.5).sum() >= 7
    assert len(quantizer(x).codes.unique()) > 4


@pytest.mark.parametrize(("shared", "update"), [(True, "depth"), (False, "depth"), (False, "step")])
def test_quantizer_updates_after_every_depth(shared, update):
    """RQ-VAE's order: search, move the averages, look up in the old table, move the table, go to the next depth."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 5, 3, shared=shared, decay=0.9, update=update).train()
    for book in quantizer.codebooks:
        book.cluster_size_ema.fill_(50)
        book.embed_ema.copy_(book.table * 50)
    tables = [book.table.clone() for book in quantizer.codebooks]
    sizes = [book.cluster_size_ema.clone() for book in quantizer.codebooks]
    embeds = [book.embed_ema.clone() for book in quantizer.codebooks]
    x = torch.randn(40, 5)
    features, codes, commitment = quantizer(x)

    residual, partial, errors = x.clone(), torch.zeros_like(x), []
    for d in range(3):
        b = 0 if shared else d
        nearest = torch.cdist(residual, tables[b]).argmin(1)
        assert torch.equal(nearest, codes[:, d])
        sizes[b] = 0.9 * sizes[b] + 0.1 * torch.bincount(nearest, minlength=6)
        embeds[b] = 0.9 * embeds[b] + 0.1 * torch.zeros(6, 5).index_add_(0, nearest, residual)
        row = tables[b][nearest]
        residual, partial = residual - row, partial + row
        errors.append((x - partial).square().mean())
        tables[b] = embeds[b] / ((sizes[b] + 1e-5) / (sizes[b].sum() + 6e-5) * sizes[b].sum())[:, None]
    for b, book in enumerate(quantizer.codebooks):
        b = 0 if shared else b
        torch.testing.assert_close(book.cluster_size_ema, sizes[b])
        torch.testing.assert_close(book.embed_ema, embeds[b])
        torch.testing.assert_close(book.table, tables[b])
        assert torch.equal(book.weight[-1], torch.zeros(5))
    torch.testing.assert_close(features, partial)
    torch.testing.assert_close(commitment, torch.stack(errors).mean())


def test_dead_codes_of_every_table_come_back_from_its_own_vectors():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(16, 4, 2, shared=False, decay=0.5).train()
    vectors = torch.randn(64, 2, 4) + torch.tensor([100.0, -100.0])[:, None]
    quantizer._move(vectors, torch.zeros(64, 2, dtype=torch.int64))  # no code but the first has a past
    for book, own in zip(quantizer.codebooks, vectors.unbind(1), strict=True):
        assert (torch.cdist(book.table[1:], own).amin(1) < 1).all()
        assert (book.cluster_size_ema[1:] == 1).all()
        assert book.cluster_size_ema[0] == 32


@pytest.mark.parametrize("update", ["step", "depth"])
@pytest.mark.parametrize("shared", [True, False])
def test_quantizer_trains_compiled_whole_under_autocast(shared, update, fresh_compiler):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(16, 8, 3, shared=shared, update=update).train()
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = torch.randn(30, 8)
        results = []
        for module in (quantizer, compiled):
            torch.manual_seed(step)  # restarts are drawn
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results.append(module(x))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    for key, value in quantizer.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(twin.state_dict()[key], value)


@pytest.mark.parametrize(("shared", "most"), [(True, 20), (False, 36)], ids=["shared", "per depth"])
def test_quantizer_moves_its_tables_in_few_launches(shared, most):
    """Operators that launch something; what a GPU waits for in a step is their number more than their work."""
    views = {"view", "_unsafe_view", "slice", "select", "unsqueeze", "unbind", "detach", "alias", "expand"}

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.__name__.split(".")[0] not in views
            return function(*args, **(kwargs or {}))

    quantizer = ResidualQuantizer(64, 16, 4, shared=shared).train()
    vectors, codes = torch.randn(100, 4, 16), torch.randint(64, (100, 4))
    with Launches() as launches:
        quantizer._move(vectors, codes)
    assert launches.count <= most


def test_quantizer_in_eval_mode_stays():
    quantizer = ResidualQuantizer(8, 4, 3).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(torch.randn(10, 4))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    assert len(before) == 9
    with pytest.raises(ValueError, match="num_codes must be at least 1, got 0"):
        ResidualQuantizer(0, 4, 1)
    with pytest.raises(ValueError, match="update must be 'step' or 'depth', got 'never'"):
        ResidualQuantizer(8, 4, 1, update="never")


def test_sequences_ask_for_the_second_modality_alone():
    model = small_model()
    rows = Sequences(model, ["axe, noto style", ""], ["axe"], ["noto"], False, CPU)
    text, places = model.token_ids("axe, noto style"), model.image_tokens
    start, end = model.special(-4), model.special(-3)
    drawn = [1, *text, start, *[0] * places, end, 2]
    named = [1, start, *[0] * places, end, *text, 2]
    assert rows.draw_ids[0, : len(drawn)].tolist() == drawn
    assert rows.name_ids[0, : len(named)].tolist() == named
    assert rows.draw_begin.tolist() == [len(text) + 2, 2]
    assert rows.draw_targets[0][rows.draw_targets[0] != IGNORED].tolist() == [end, 2]
    # Without a text the row reads like the start of a picture to name, which must not end there.
    assert rows.draw_targets[1][rows.draw_targets[1] != IGNORED].tolist() == [end]
    asked = rows.name_targets[0] != IGNORED
    assert rows.name_targets[0][asked].tolist() == [*text, 2]
    # A target stands where the token before it is read.
    assert asked.nonzero()[0].item() == 2 + places


def test_things_and_styles_are_asked_for_apart():
    model, styles = small_model(), ["noto", "twemoji"]
    rows = Sequences(model, ["axe, noto style"], ["axe", "aerial tramway"], styles, True, CPU)
    seen = [1, model.special(-4), *[0] * model.image_tokens, model.special(-3)]

    def wanted(targets):
        at = (targets != IGNORED).nonzero().flatten().tolist()
        assert at == list(range(at[0], at[0] + len(at)))
        return at[0], targets[at].tolist()

    for i, concept in enumerate(("axe", "aerial tramway")):
        plain, both = model.token_ids(concept), [model.token_ids(f"{concept}, {style} style") for style in styles]
        for j, text in enumerate(both):
            ids = rows.style_ids[2 * i + j]
            assert ids[: len(seen) + len(text) + 1].tolist() == [*seen, *text, 2]
            named_at, name = wanted(rows.name_targets[2 * i + j])
            styled_at, style = wanted(rows.style_targets[2 * i + j])
            # The two make up the caption, and what the style begins with tells the styles apart.
            assert [*name, *style] == [*text, 2]
            assert name[: len(plain)] == plain
            assert style[0] != both[1 - j][len(name)]
            assert named_at == len(seen) - 1
            assert styled_at == named_at + len(name)
            assert rows.name_ids[2 * i + j, : len(seen) + len(name)].tolist() == [*seen, *name]


@pytest.mark.parametrize(("swap", "pasted"), [(0.0, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_swapped_words_and_collages(data, tmp_path, monkeypatch, swap, pasted):
    """All the texts after pictures name another thing and ask for the picture's own style, or none of them."""
    losses = losses_of("unified", data, tmp_path, monkeypatch, "--swap", swap, "--collage", pasted)
    seen, hidden, chosen = [], losses.hidden, []
    monkeypatch.setattr(losses, "hidden", lambda ids, *rest: seen.append(ids) or hidden(ids, *rest))
    monkeypatch.setattr(
        unified, "collage", lambda x, styles, which, g: chosen.append(which) or collage(x, styles, which, g)
    )
    losses(0, 0)
    rows = losses.sequences
    named = seen[0][len(seen[0]) // 2 :]
    if swap:
        assert all(tuple(row) in {tuple(row) for row in rows.style_ids.tolist()} for row in named.tolist())
        assert chosen[0].all() if pasted else not chosen[0].any()
    else:
        whole = [losses.model.token_ids(text) for text in losses.pictures.captions]
        start = 3 + losses.model.image_tokens
        assert all(any(row[start : start + len(t) + 1] == [*t, 2] for t in whole) for row in named.tolist())
        assert not chosen[0].any(), "only pictures whose thing is not asked for are pasted"


def test_pictures_and_captions(data):
    pictures, held_out = Pictures.load(data, ["noto", "twemoji"], CPU, 16)
    assert sorted(held_out.captions) == ["aerial tramway, twemoji style", "axe, noto style"]
    assert len(pictures) == 2 * len(CONCEPTS) - 2
    tokenizer = small_tokenizer()
    ids = pictures.caption_ids(tokenizer, 16, styled=True)
    assert tokenizer.decode([i for i in ids[0].tolist() if i]) == pictures.captions[0]
    assert pad_ids([[3, 4, 5]], 2).tolist() == [[3, 4]]


def test_augmentation_keeps_range_and_repeats():
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    first, again, other = (augment(images, step_generator(0, s, 0, CPU)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 1
    assert torch.equal(augment(images, step_generator(0, 1, 0, CPU), clean=1.0), images)
    white = augment(torch.ones(4, 3, 16, 16), step_generator(0, 1, 0, CPU), 0.0, clean=0.0)
    assert (white == 1).float().mean() > 0.8


def test_unified_parses_like_the_readme():
    args = unified.parse(["--data", "d", "--out", "o", "--tower", "t"])
    assert (args.drop, args.precision) == (0.1, "bf16")
