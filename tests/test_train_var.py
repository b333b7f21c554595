"""Training VAR and its tokenizer: end to end on tiny models, resuming, what is drawn afterwards, what is refused."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import CONCEPTS, STYLES, write_pictures

from unifiedar import checkpoints, cli, train
from unifiedar.models import VAR, VQVAE, VARConfig, VQVAEConfig
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.train.batches import step_generator
from unifiedar.train.loop import Loop, cosine, lin0
from unifiedar.train.vae import pyramid, revive
from unifiedar.train.var import UNDECAYED, decay, growth, scale_means

CPU = torch.device("cpu")
TOKENIZER = VQVAEConfig(DecoderConfig(32, (1, 1, 2), 1, 8, 16, (), fused_qkv=True), 24, scales=(1, 2, 3, 4))
SIZES = VARConfig(2, 64, 2, (1,), shared_adaln=True, drop_path=0.1)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(VQVAE.configs, "tiny", TOKENIZER)
    monkeypatch.setitem(VAR.configs, "tiny", SIZES)
    return write_pictures(tmp_path / "data")


def run(stage, data, out, *options):
    common = ["--data", data, "--out", out, "--batch", 8, "--precision", "fp32", "--device", "cpu", "--config", "tiny"]
    return train.main([stage, *map(str, [*common, *options])])


def new_tokenizer(folder):
    """A folder with an untrained tokenizer, its codebook among what its encoder makes of pictures."""
    torch.manual_seed(0)
    vae = VQVAE(TOKENIZER).eval()
    revive(vae, vae._latents(torch.rand(8, 3, 16, 16) * 2 - 1, "test").detach(), step_generator(0, 0, 0, CPU))
    return vae.save(folder)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- both stages


def test_both_stages_learn_and_the_result_draws(data, tmp_path, capsys):
    assert run("vae", data, tmp_path / "vae", "--steps", 100, "--lr", 3e-3, "--warmup", 5, "--augmentation", 0) == 0
    lines = log(tmp_path / "vae")
    errors = [line["squared_error"] for line in lines if "squared_error" in line]
    assert errors[1] < errors[0] < 1
    assert {"held_out_psnr_db", "held_out_codes_used"} <= set(lines[-1])
    assert lines[-1]["held_out_psnr_db"] > 10
    assert (tmp_path / "vae" / "reconstructions.png").is_file()

    folder, vae = tmp_path / "var", tmp_path / "vae" / "model"
    assert run("var", data, folder, "--vae", vae, "--steps", 100, "--lr", 0.1, "--batch", 12, "--ema", 0.9) == 0
    first, last = (line for line in log(folder) if "accuracy" in line)
    assert last["loss"] < first["loss"] < math.log(24)
    assert last["accuracy"] > 0.6
    lengths = [1, 4, 9, 16]
    for name in ("loss", "accuracy"):
        scales = [last[f"scale_{i}_{name}"] for i in range(4)]
        mean = sum(n * value for n, value in zip(lengths, scales, strict=True)) / sum(lengths)
        assert mean == pytest.approx(last[name], rel=1e-4)
    assert {"held_out_loss", "held_out_accuracy"} <= set(log(folder)[-1])
    assert (folder / "drawn.png").is_file()

    model = VAR.from_checkpoint(folder / "model")
    assert model.class_names == tuple(sorted(CONCEPTS))
    assert equal(model.vae.state_dict(), VQVAE.from_checkpoint(vae).state_dict()), "the tokenizer is frozen"

    small = tmp_path / "small"
    assert train.main(["export", "--model", str(folder / "model"), "--out", str(small)]) == 0
    sizes = [sum(path.stat().st_size for path in one.glob("*.safetensors")) for one in (folder / "model", small)]
    assert sizes[1] < 0.4 * sizes[0]
    capsys.readouterr()
    options = ["--model", str(small), "--device", "cpu", "-o", str(tmp_path / "x.png")]
    assert cli.main(["generate", " red disc ", "--seed", "4", "--guidance", "2", "--top-p", "0.5", *options]) == 0
    with Image.open(tmp_path / "x.png") as image:
        drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    again = VAR.from_checkpoint(small)
    label = again.class_names.index("red disc")
    assert torch.equal(again.generate(label, seed=4, cfg=1.0, top_k=24, top_p=0.5)[0], drawn)
    for argv, words in (
        (["generate", "red disk"], "'red disk' is no class of the model; near: red disc"),
        (["generate", "axe", "--guidance", "0.5"], "--guidance: must be at least 1"),
        (["generate", "axe", "--temperature", "1"], "--temperature: a VAR has none"),
        (["generate", "axe", "--top-k", "25"], "top_k must be from 0 to 24"),
    ):
        assert cli.main([*argv, *options]) == 1
        assert words in capsys.readouterr().err
    picture = [str(tmp_path / "x.png"), "--model", str(small), "--device", "cpu"]
    assert cli.main(["describe", *picture]) == 1
    assert "a VAR, which can generate but not describe" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_export_is_close(tmp_path, capsys, precision):
    torch.manual_seed(0)
    config = replace(SIZES, scales=TOKENIZER.scales, num_classes=2, num_codes=24, code_dim=8)
    model = VAR(config, VQVAE(TOKENIZER).eval()).eval()
    model.class_names = ("dog", "cat")
    argv = ["export", "--model", str(model.save_whole(tmp_path / "whole")), "--out", str(tmp_path / "small")]
    assert train.main([*argv, "--precision", precision]) == 0
    again = VAR.from_checkpoint(tmp_path / "small")
    for name, value in model.whole().items():
        error = (again.whole()[name].float() - value).abs().nan_to_num()
        exact = precision == "int8" and value.ndim < 2
        bound = value.float().nan_to_num(neginf=0).abs().max() * (0 if exact else 1 / 250)
        assert (error <= bound).all(), name
    assert again.generate([0, 1, 2], seed=0).shape == (3, 3, 16, 16)
    argv[2] = str(model.save(tmp_path / "alone"))
    assert cli.main(["generate", "dog", "--model", argv[2], "-o", str(tmp_path / "x.png")]) == 1
    assert "has no tokenizer" in capsys.readouterr().err
    assert train.main(argv) == 1
    assert "has no tokenizer in it" in capsys.readouterr().err


def test_graph_without_a_gpu_is_one_line(data, tmp_path, capsys):
    vae = new_tokenizer(tmp_path / "vae")
    for name, options in (("steps", []), ("graph", ["--graph"])):
        assert run("var", data, tmp_path / name, "--vae", vae, "--steps", 2, *options) == 0
    assert "--graph: a step is no CUDA graph on the CPU; going on without" in capsys.readouterr().err
    assert equal(*(checkpoints.load_tensors(tmp_path / name / "model") for name in ("steps", "graph")))


def test_labels_may_be_styles(data, tmp_path):
    vae = new_tokenizer(tmp_path / "vae")
    assert run("var", data, tmp_path / "out", "--vae", vae, "--steps", 1, "--labels", "style") == 0
    assert VAR.from_checkpoint(tmp_path / "out" / "model").class_names == STYLES


@pytest.mark.parametrize("stage", ["vae", "var"])
def test_resumed_run_is_the_run_that_was_not_killed(data, tmp_path, stage):
    options = ["--steps", 5, "--save-every", 2]
    if stage == "vae":
        options += ["--revive-every", 1, "--revive", 1]
    else:
        options += ["--vae", new_tokenizer(tmp_path / "vae"), "--drop-path", 0.5, "--cond-drop", 0.5]
    assert run(stage, data, tmp_path / "whole", *options) == 0
    assert run(stage, data, tmp_path / "parts", *options, "--minutes", 0) == 3
    assert 0 < torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] < 5
    assert run(stage, data, tmp_path / "parts", *options, "--resume") == 0
    whole, parts = (checkpoints.load_tensors(tmp_path / name / "model") for name in ("whole", "parts"))
    assert equal(whole, parts)
    assert run(stage, data, tmp_path / "other", *options, "--seed", 1) == 0
    assert not equal(whole, checkpoints.load_tensors(tmp_path / "other" / "model"))


def test_two_ranks(data, tmp_path):
    """Both revive the same codes, or the codebooks and with them the gradients would part."""
    script = f"""
import sys
from unifiedar import train
from unifiedar.models import VQVAE, VQVAEConfig
from unifiedar.models.convolutional import DecoderConfig
from unifiedar.train.loop import Loop
import torch.distributed as dist
VQVAE.configs["tiny"] = {TOKENIZER!r}
finish = Loop.finish
def check(self, *args):
    weights = [p.detach().clone() for p in self.model.parameters()]
    for mine in weights:
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert (mine == theirs).all()
    return finish(self, *args)
Loop.finish = check
sys.exit(train.main(sys.argv[1:]))
"""
    (tmp_path / "ranks.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]
    command += [tmp_path / "ranks.py", "vae", "--data", data, "--out", tmp_path / "out", "--config", "tiny"]
    command += ["--steps", 3, "--batch", 4, "--device", "cpu", "--revive-every", 1, "--revive", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shared", [True, False])
def test_shares_of_a_model_train_like_whole_ones(data, tmp_path, shared):
    """Two ranks, with a share each and with the whole each: the same weights, average and moments. Stopped and resumed,
    in the same way or the other, it is the same run."""
    vae = new_tokenizer(tmp_path / "vae")
    out = [tmp_path / name for name in ("whole", "shares", *(() if shared else ("resumed", "crossed", "back")))]
    common = f"var --data {data} --vae {vae} --device cpu --precision fp32 --config tiny --batch 4 --steps 12 "
    common += "--accumulate 2 --drop-path 0.3 --lr 0.05 --ema 0.9 --save-every 100 --sheet-every 100 --out "
    commands = [f"0 {common}{out[0]}", f"0 {common}{out[1]} --shard"]
    ways = (("--shard", "--shard"), ("--shard", ""), ("", "--shard"))
    for folder, (first, second) in zip(out[2:], ways, strict=False):
        commands += [f"3 {common}{folder} {first} --minutes 0", f"0 {common}{folder} {second} --resume"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = Path(__file__).with_name("sharded_ranks.py")
    config = repr(replace(SIZES, shared_adaln=shared))
    done = subprocess.run(
        [*launch, str(script), config, " ; ".join(commands)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    states = [torch.load(one / "last.pt", weights_only=True) for one in out]
    models = [checkpoints.load_tensors(one / "model") for one in out]
    if not shared:
        assert equal(models[1], models[2]), "resumed with shares, bit for bit"
    assert models[0]["blocks.0.ffn.fc1.bias"].abs().max() > 1e-3, "which began at zero"
    for state, model in zip(states[1:], models[1:], strict=True):
        assert state["step"] == 12
        for part in ("model", "averaged"):
            for name, value in states[0][part].items():
                assert torch.allclose(state[part][name].nan_to_num(), value.nan_to_num(), rtol=1e-4, atol=1e-5), name
        for i, moments in states[0]["optimizer"]["state"].items():
            for name, value in moments.items():
                assert torch.allclose(state["optimizer"]["state"][i][name], value, rtol=1e-3, atol=1e-6), (i, name)
        assert model.keys() == models[0].keys()
        assert VAR.from_checkpoint(out[1] / "model").generate([0], seed=0).shape == (1, 3, 16, 16)


# ---- pieces


def test_schedules():
    rates = [lin0(step, 10, 111, end=0.2) for step in range(111)]
    assert rates[0] == 0.005
    assert rates[5] == pytest.approx(0.5025)
    assert rates[10:15] == [1] * 5, "flat for a twentieth of what follows warm-up"
    assert rates[-1] == pytest.approx(0.2)
    steps = [a - b for a, b in itertools.pairwise(rates[15:])]
    assert min(steps) == pytest.approx(max(steps)), "then linear"
    assert steps[0] == pytest.approx(0.8 / 95)
    assert cosine(0, 4, 100) == 0.25
    assert cosine(4, 4, 100) == 1
    assert cosine(100, 4, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("steps", "warmup", "scales", "until", "first", "new"),
    [(300, 6, 10, 0.8, 5, 1.0), (500, 10, 7, 0.5, 1, 20.0), (90, 30, 10, 0.2, 5, 7.0), (40, 4, 4, 1.0, 4, 3.0),
     (50, 0, 6, 0.0, 3, 0.0), (700, 7, 10, 1.0, 5, 1000.0)],
)  # fmt: skip
def test_growth_is_the_published_schedule(steps, warmup, scales, until, first, new):
    """Against its state machine: a stage is told by the index of its last scale, and -1 stands for all."""
    last_stage, stage_steps, is_first, want = -1, 0, True, []
    for step in range(steps):
        if step <= warmup:
            stage = first - 1
        elif step >= steps * until:
            stage = scales - 1
        else:
            progress = min(max((step - warmup) / (steps * until - warmup), 0), 1)
            stage = first - 1 + round(progress * (scales - first))
        if stage != last_stage:
            is_first = is_first and last_stage == -1
            last_stage, stage_steps = stage, 0
        stage_steps += 1
        factor = 1.0 if is_first or not new else max(min(stage_steps / new, 1), 0.01)
        want.append((stage + 1, 1.0 if stage == scales - 1 else factor))
    found = growth(steps, warmup, scales, until=until, first=first, scale_warmup=new)
    assert found == want
    assert [count for count, _ in found] == sorted(count for count, _ in found)


def test_first_scales_alone():
    """Their logits are those of the same tokens among all; other numbers of codes are refused."""
    torch.manual_seed(0)
    model = VAR(replace(SIZES, scales=(1, 2, 3), num_classes=3, num_codes=24, code_dim=8)).eval()
    inputs = torch.randn(2, 13, 8)
    whole = model(torch.tensor([0, 3]), inputs)
    for codes in (0, 4):
        part = model(torch.tensor([0, 3]), inputs[:, :codes])
        assert torch.allclose(part, whole[:, : 1 + codes], atol=1e-6)
    with pytest.raises(ValueError, match=r"must be \(B, 13, 8\), or .* one of \[0, 4\], got \(2, 5, 8\)"):
        model(torch.tensor([0, 3]), inputs[:, :5])


def test_progressive_training(data, tmp_path, monkeypatch):
    vae, out = new_tokenizer(tmp_path / "vae"), tmp_path / "out"
    options = ["--vae", vae, "--progressive", 1, "--first-scales", 2, "--steps", 100, "--scale-warmup", 10]
    assert run("var", data, out, *options) == 0
    first, last = (line for line in log(out) if "accuracy" in line)
    assert {"scale_2_loss", "scale_3_loss"} & set(first) == {"scale_2_loss"}
    assert {"scale_3_loss", "scale_3_accuracy"} <= set(last)
    assert VAR.from_checkpoint(out / "model").generate([0], seed=0).shape == (1, 3, 16, 16)

    seen = []
    monkeypatch.setattr(Loop, "train", lambda self, losses, validate: seen.append(losses) or True)
    assert run("var", data, tmp_path / "other", *options) == 0
    losses = seen[0]
    assert {losses.phase(step) for step in range(100)} == {None, 2, 3, 4}
    assert all((losses.phase(step) is None) == (new < 1) for step, (_, new) in enumerate(losses.growth))
    logits, codes = torch.randn(3, 14, 24), torch.randint(24, (3, 14))
    each = -logits.double().log_softmax(2).gather(2, codes[..., None])[..., 0].mean(0)
    found = losses.of(logits, codes, 0.25)
    assert float(found["loss"]) == pytest.approx(float(each[:5].sum() + each[5:].sum() / 4) / 30, rel=1e-5)
    assert float(found["scale_2_loss"]) == pytest.approx(float(each[5:].mean()), rel=1e-5)
    assert "scale_3_loss" not in found
    assert losses.growth[55:58] == [(3, 1.0)] * 3
    new = [factor for count, factor in losses.growth if count == 3]
    assert new[:11] == pytest.approx([*[i / 10 for i in range(1, 11)], 1])


def test_recipe(data, tmp_path, monkeypatch):
    """Rate in proportion to the pictures a step, clipping at 2, what does not decay, the loss with its smoothing."""
    seen = {}

    def stop(self, losses, validate):
        seen.update(loop=self, losses=losses)
        return True

    monkeypatch.setattr(Loop, "train", stop)
    vae = new_tokenizer(tmp_path / "vae")
    options = ["--vae", vae, "--lr", 1e-3, "--batch", 64, "--steps", 100, "--label-smoothing", 0.3]
    assert run("var", data, tmp_path / "out", *options) == 0
    loop, losses = seen["loop"], seen["losses"]
    assert loop.args.lr == pytest.approx(1e-3 * 64 / 256)
    assert (loop.clip, loop.args.warmup) == (2.0, 2)
    decayed, others = ({id(p) for p in group["params"]} for group in loop.optimizer.param_groups)
    for name, parameter in loop.model.named_parameters():
        assert id(parameter) in (others if parameter.ndim < 2 or any(u in name for u in UNDECAYED) else decayed), name

    logits, codes = torch.randn(3, 30, 24), torch.randint(24, (3, 30))
    found = losses.of(logits, codes)
    log_p = logits.double().log_softmax(2)
    loss = -(0.7 * log_p.gather(2, codes[..., None])[..., 0] + 0.3 * log_p.mean(2))
    assert float(found["loss"]) == pytest.approx(float(loss.mean()), rel=1e-5)
    assert float(found["scale_3_loss"]) == pytest.approx(float(loss[:, 14:].mean()), rel=1e-5)
    right = (logits.argmax(2) == codes).double()
    assert float(found["scale_1_accuracy"]) == pytest.approx(float(right[:, 1:5].mean()), abs=1e-6)


def test_weight_decay_may_end_elsewhere(data, tmp_path):
    """Along half a cosine, for matrices alone."""
    found = [decay(step, 101, 0.05, 0.08) for step in range(101)]
    assert (found[0], found[50], found[-1]) == pytest.approx((0.05, 0.065, 0.08))
    assert found[25] == pytest.approx(0.065 - 0.015 * math.sqrt(0.5))
    assert decay(0, 1, 0.05, 0.08) == 0.05
    vae = new_tokenizer(tmp_path / "vae")
    for options, last in (([], 0.05), (["--end-decay", 0.4], 0.4)):
        out = tmp_path / f"out{last}"
        assert run("var", data, out, "--vae", vae, "--steps", 3, *options) == 0
        state = torch.load(out / "last.pt", weights_only=True)
        assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == pytest.approx([last, 0])
    both = [torch.load(tmp_path / f"out{last}" / "last.pt", weights_only=True)["model"] for last in (0.05, 0.4)]
    assert not torch.equal(both[0]["head.weight"], both[1]["head.weight"])
    assert torch.equal(both[0]["lvl_1L"], both[1]["lvl_1L"])


def test_first_gates_are_nearly_shut():
    """So that training begins with what the embeddings alone say (published `alng`)."""
    model = VAR(replace(SIZES, scales=(1, 2), num_classes=3, num_codes=24, code_dim=8, shared_adaln=False))
    model.initialize(gate=1e-3)
    six = model.blocks[0].ada_lin[1].weight.unflatten(0, (6, 64))
    assert six[:2].abs().max() < 1e-2 * six[2:].abs().max()


def test_means_of_scales():
    values = torch.tensor([5.0, 1.0, 2.0, 3.0, 6.0])
    assert (scale_means([1, 4], CPU) @ values).tolist() == [5, 3]


def test_pyramid_is_what_codes_stand_for():
    """The nearest code vector of every entry is its code, and what all scales leave over is features less their sum."""
    torch.manual_seed(1)
    model = VQVAE(TOKENIZER).eval()
    features = torch.randn(2, 8, 4, 4)
    vectors, codes = pyramid(model, features)
    assert len(vectors) == len(codes) == 2 * 30
    assert torch.equal(torch.cdist(vectors, model.quantize.embedding.weight).argmin(1), codes)
    assert torch.allclose(vectors[:2], features.mean((2, 3)), atol=1e-6)
    sums = model.quantize.f_to_idxBl_or_fhat(features, to_fhat=True)
    last = (features - sums[-2]).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(vectors[-32:], last, atol=1e-5)


def test_unused_codes_begin_anew():
    torch.manual_seed(0)
    model = VQVAE(TOKENIZER).eval()
    table = model.quantize.embedding.weight
    with torch.no_grad():
        table[5:] += 1e3  # too far from everything
    before = table.detach().clone()
    features = torch.randn(8, 8, 4, 4)
    vectors, codes = pyramid(model, features)
    kept = codes.unique()
    share = revive(model, features, step_generator(0, 0, 0, CPU))
    assert float(share) == pytest.approx(len(kept) / 24)
    assert torch.equal(table[kept], before[kept])
    new = [k for k in range(24) if k not in kept.tolist()]
    assert len(new) >= 19
    assert all((vectors == table[k]).all(1).any() for k in new)
    assert len(pyramid(model, features)[1].unique()) > len(kept)


def test_classes_without_names_are_drawn_by_number(tmp_path, capsys):
    """As a published model's are."""
    torch.manual_seed(0)
    config = replace(SIZES, scales=TOKENIZER.scales, num_classes=12, num_codes=24, code_dim=8)
    folder = VAR(config, VQVAE(TOKENIZER).eval()).eval().save_whole(tmp_path / "whole")
    options = ["--model", str(folder), "--device", "cpu", "--seed", "3", "-o", str(tmp_path / "x.png")]
    assert cli.main(["generate", "11", *options]) == 0
    with Image.open(tmp_path / "x.png") as image:
        drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wanted = VAR.from_checkpoint(folder).generate([11], seed=3, cfg=1.5, top_k=24, top_p=0.96)
    assert torch.equal(wanted[0], drawn)
    capsys.readouterr()
    for wrong in ("12", "cat"):
        assert cli.main(["generate", wrong, *options]) == 1
        assert f"'{wrong}' is no class of the model" in capsys.readouterr().err


def test_published_files_are_drawn_from(tmp_path, capsys):
    """A transformer's file and a tokenizer, of which neither says what it is."""
    torch.manual_seed(0)
    vae = VQVAE(VQVAE.configs["emoji"]).eval()
    sizes = {"scales": vae.config.scales, "num_codes": vae.config.num_codes, "code_dim": vae.config.dim}
    model = VAR(replace(SIZES, num_classes=12, drop_path=0.1 * 2 / 24, **sizes), vae).eval()
    model.export(tmp_path / "var.pth")
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    files = ["--model", str(tmp_path / "var.pth"), "--vae", str(tmp_path / "vae.pth")]
    options = ["--device", "cpu", "--seed", "3", "-o", str(tmp_path / "x.png")]
    assert cli.main(["generate", "7", *files, *options]) == 0
    with Image.open(tmp_path / "x.png") as image:
        drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(model.generate([7], seed=3, cfg=1.5, top_k=900, top_p=0.96)[0], drawn)
    capsys.readouterr()
    for wrong, words in (
        (["--model", files[3], "--vae", files[3]], "has not the keys of a VAR"),
        (["--model", files[1], "--vae", files[1]], "has not the keys and shapes of a published VQVAE"),
        (["--model", files[1], "--vae", str(tmp_path / "none.pth")], "no such model"),
        (["--model", files[1], "--vae", str(new_tokenizer(tmp_path / "other"))], "another tokenizer"),
    ):
        assert cli.main(["generate", "7", *wrong, *options]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.skipif("var-emoji" not in checkpoints.shipped(), reason="no weights in this checkout")
def test_the_model_that_ships_draws(tmp_path):
    """Its own class, not another one, and the same picture again; a red apple is red."""
    model = VAR.from_checkpoint("var-emoji")
    apple, other = (model.class_names.index(name) for name in ("red apple", "green apple"))
    first, again, green = (
        model.generate([label] * 4, cfg=3.0, top_k=900, top_p=0.96, seed=1).float() for label in (apple, apple, other)
    )
    assert first.shape == (4, 3, 64, 64)
    assert torch.equal(first, again)
    redness = [(one[:, 0] - one[:, 1]).mean() for one in (first, green)]
    assert redness[0] > 20 > 0 > redness[1]
    options = ["--model", "var-emoji", "--device", "cpu", "-o", str(tmp_path / "x.png")]
    assert cli.main(["generate", "red apple", *options]) == 0


def test_folder_with_tokenizer(tmp_path, capsys):
    torch.manual_seed(0)
    config = replace(SIZES, scales=TOKENIZER.scales, num_classes=2, num_codes=24, code_dim=8)
    model = VAR(config, VQVAE(TOKENIZER).eval()).eval()
    model.class_names = ("dog", "cat")
    again = VAR.from_checkpoint(model.save_whole(tmp_path / "whole"))
    assert again.class_names == ("dog", "cat")
    assert equal(again.whole(), model.whole())
    assert torch.equal(again.generate([1], seed=3), model.generate([1], seed=3))
    path = str(model.save(tmp_path / "alone"))
    alone = VAR.from_checkpoint(path)
    assert alone.vae is None
    capsys.readouterr()
    assert cli.main(["generate", "cat", "--model", path, "-o", str(tmp_path / "x.png"), "--device", "cpu"]) == 1
    assert "has no tokenizer, which drawing needs; name one with --vae" in capsys.readouterr().err
    assert alone.class_names == ("dog", "cat")
    with pytest.raises(ValueError, match="vae must be there"):
        alone.save_whole(tmp_path / "x")
    path = tmp_path / "whole" / "config.json"
    config_text = json.loads(path.read_text())
    for wrong, words in (
        ({"class_names": ["dog"]}, "must name all 2 classes, got 1"),
        ({"class_names": "dog"}, "list of names"),
        ({"class_names": [1, 2]}, "list of names"),
        ({"vae": ["dog"]}, "vae in config.json must be an object"),
        ({"vae": {"model": "rqvae"}}, "must describe a 'vqvae'"),
        ({"vae": None}, "do not fit the configuration"),
    ):
        path.write_text(json.dumps(config_text | wrong))
        with pytest.raises(checkpoints.CheckpointError, match=words):
            VAR.from_checkpoint(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["vae", "var"])
def test_a_step_does_not_wait_for_the_gpu(data, tmp_path, monkeypatch, stage):
    steps = []
    monkeypatch.setattr(Loop, "train", lambda self, losses, validate: steps.append((self, losses)) or True)
    options = ["--vae", new_tokenizer(tmp_path / "vae")] if stage == "var" else []
    assert run(stage, data, tmp_path / "out", *options, "--device", "cuda") == 0
    loop, losses = steps[0]
    loop.model.train()
    losses(0, 0)["loss"].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses(1, 0)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--accumulate", 2, "--end-decay", 0.08], ["--progressive", 0.9]])
@pytest.mark.parametrize("stage", ["vae", "var"])
def test_a_graph_trains_as_steps_do(data, tmp_path, stage, options):
    """Bit for bit, whatever is dropped; a run resumed as steps goes on from a graph's checkpoint."""
    options = ["--steps", 40, "--save-every", 10, "--device", "cuda", "--deterministic", *options]
    if stage == "vae":
        if "--progressive" in options or "--end-decay" in options:
            pytest.skip("of VAR alone")
        options += ["--revive-every", 7]
    else:
        options += ["--vae", new_tokenizer(tmp_path / "vae"), "--drop-path", 0.5, "--cond-drop", 0.5]
        if "--progressive" in options:
            options += ["--first-scales", 2, "--scale-warmup", 3]
    assert run(stage, data, tmp_path / "steps", *options) == 0
    assert run(stage, data, tmp_path / "graph", *options, "--graph") == 0
    assert run(stage, data, tmp_path / "parts", *options, "--graph", "--minutes", 0) == 3
    assert run(stage, data, tmp_path / "parts", *options, "--graph", "--resume") == 0
    steps, graph, parts = (checkpoints.load_tensors(tmp_path / n / "model") for n in ("steps", "graph", "parts"))
    assert equal(steps, graph)
    assert equal(steps, parts)
    for one, other in zip(log(tmp_path / "steps"), log(tmp_path / "graph"), strict=True):
        assert {**one, "pictures_per_second": 0} == {**other, "pictures_per_second": 0}


# ---- what is refused


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        ("vae", ["--revive-every", 0], "--revive-every must be at least 1, got 0"),
        ("vae", ["--revive", 1.5], "--revive must be from 0 to 1, got 1.5"),
        ("vae", ["--steps", 0], "--steps must be at least 1"),
        ("var", ["--label-smoothing", 2], "--label-smoothing must be from 0 to 1, got 2"),
        ("var", ["--cond-drop", -1], "--cond-drop must be from 0 to 1"),
        ("var", ["--drop-path", 1], "--drop-path must be below 1"),
        ("var", ["--end-decay", -0.1], "--end-decay must be at least 0, got -0.1"),
        ("var", ["--end-rate", "nan"], "--end-rate must be from 0 to 1, got nan"),
        ("var", ["--vae", "/nowhere"], r"--vae: .*no such model"),
        ("var", ["--resume"], "no checkpoint"),
        ("var", ["--shard"], "--shard needs several ranks"),
        ("var", ["--progressive", 1.5], "--progressive must be from 0 to 1, got 1.5"),
        ("var", ["--progressive", 0.5, "--first-scales", 9], "--first-scales must be from 1 to 4, got 9"),
        ("var", ["--progressive", 0.5, "--scale-warmup", -1], "--scale-warmup must be at least 0"),
        ("var", ["--first-scales", 2], "--first-scales goes with --progressive alone"),
    ],
)
def test_bad_options(data, tmp_path, stage, options, words):
    vae = ["--vae", new_tokenizer(tmp_path / "vae")] if stage == "var" else []
    with pytest.raises(SystemExit, match=words):
        run(stage, data, tmp_path / "out", *vae, *options)


def test_pictures_of_another_size(data, tmp_path, monkeypatch):
    network = replace(TOKENIZER.network, resolution=32)
    monkeypatch.setitem(VQVAE.configs, "tiny", replace(TOKENIZER, network=network))
    with pytest.raises(SystemExit, match="pictures must be 32 pixels wide for this model, got 16"):
        run("vae", data, tmp_path / "out")


def test_the_models_that_ship_are_small():
    """Eight bits an entry: together below 7 MiB."""
    with torch.device("meta"):
        vae = VQVAE(VQVAE.configs["emoji"])
        var = VAR(VAR.configs["emoji"], vae)
    assert sum(p.numel() for part in (vae, var) for p in part.parameters()) < 6.9e6
    assert vae.config.scales == var.config.scales
