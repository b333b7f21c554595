"""VAR: published keys, what the published code computes on the same small weights, drawing, editing, loading."""

import copy
import gzip
import importlib
import itertools
import json
import math
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from autoencoder_small import VQ, pictures, vqvae
from helpers import assert_as_good_as_eager, interpreter_skip
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from var_small import BOX, CONFIGS, DRAWS, EDITS, given_codes, var, var_weights
from vilau_small import fingerprint

from unifiedar import engine
from unifiedar.checkpoints import CheckpointError
from unifiedar.engine import Pool, Steps
from unifiedar.models import VAR, VQVAE, VARConfig, _var_drawing
from unifiedar.models._autoencoder import to_bytes
from unifiedar.models._var_drawing import Edit
from unifiedar.models.var import _MLP
from unifiedar.ops import linear_few

HERE = Path(__file__).parent
COUNTS = {
    "d16": (310_283_520, 220),
    "d20": (600_917_136, 272),
    "d24": (1_033_399_360, 324),
    "d30": (2_010_020_356, 402),
    "d36": (2_353_893_904, 446),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_keys_and_shapes(name):
    published = json.loads(gzip.decompress((HERE / "manifests" / "var.json.gz").read_bytes()))[name]
    with torch.device("meta"):
        model = VAR(VAR.configs[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert (sum(p.numel() for p in model.parameters()), len(published)) == COUNTS[name]


# ---- what the published code computes (goldens/README.md)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(HERE / "goldens" / "var-small.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


@pytest.fixture(scope="module")
def metadata() -> dict[str, dict]:
    with safe_open(HERE / "goldens" / "var-small.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


@pytest.fixture(scope="module")
def same_stream(golden):
    """The goldens were drawn with a generator whose numbers another version of torch may change."""
    found = torch.empty(2, 3, 96).exponential_(generator=torch.Generator().manual_seed(3))
    if not torch.allclose(found, golden["stream"], rtol=1e-5):
        pytest.skip("this version of torch draws other random numbers than the one the goldens were made with")


@pytest.fixture(scope="module", params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name) -> VAR:
    return var(CONFIGS[name])


def test_same_weights(name, model, metadata):
    assert fingerprint(model.state_dict()) == metadata["fingerprints"][name]


def test_teacher_forced_logits(name, model, golden, metadata):
    exact = golden[f"{name}.logits"]
    allowed = 2 * metadata["errors"][f"{name}.logits"] + 1e-5
    got = model.teacher_forced([3, 10], given_codes())
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= allowed
    inputs = model.vae.quantize.idxBl_to_var_input(given_codes())
    assert (model(torch.tensor([3, 10]), inputs) - exact).abs().max() <= allowed
    double = copy.deepcopy(model).double()
    assert (double(torch.tensor([3, 10]), inputs.double()) - exact).abs().max() <= 1e-5


def same_pictures(one: Tensor, other: Tensor) -> bool:
    """To one grey level: sums in another order may round to the next."""
    return one.dtype == other.dtype == torch.uint8 and bool((one.int() - other.int()).abs().max() <= 1)


@pytest.mark.usefixtures("same_stream")
@pytest.mark.parametrize("draw", DRAWS)
def test_same_draws_for_the_same_seed(name, model, golden, draw):
    cfg, top_k, top_p, seed, smooth, labels = DRAWS[draw]
    settings = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "seed": seed}
    book = model.vae.quantize.book(model.config.scales)
    codes, total = model._draw("generate", labels, cfg, top_k, top_p, seed, smooth, None, True, paints=False)
    assert torch.equal(torch.cat(codes, 1), golden[f"{name}.{draw}.codes"].long())
    assert torch.equal(total, model.draw_features(labels, book, **settings, more_smooth=smooth))
    raw = model.vae.fhat_to_img(total)
    expected = golden[f"{name}.{draw}.pictures"] * 255
    assert ((raw[..., ::5, ::5] + 1) * 127.5 - expected).abs().max() <= 0.05
    drawn = model.generate(labels, **settings, more_smooth=smooth)
    assert drawn.dtype == torch.uint8
    assert (drawn[..., ::5, ::5] - expected).abs().max() <= 0.6
    if not smooth:
        again = model.generate_codes(torch.tensor(labels), **settings)
        assert all(torch.equal(one, other) for one, other in zip(again, codes, strict=True))
        assert same_pictures(model.vae.decode_codes(again), drawn)


@pytest.mark.usefixtures("same_stream")
@pytest.mark.parametrize("edit", EDITS)
def test_same_edits(name, model, golden, edit):
    cfg, top_k, top_p, seed, smooth, labels = EDITS[edit]
    mask = model.box_mask(*BOX, inpaint=edit == "inside")
    settings = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "seed": seed, "more_smooth": smooth}
    drawn = model.edit(given_codes(), mask, labels, **settings)
    assert (drawn[..., ::5, ::5] - golden[f"{name}.{edit}.pictures"] * 255).abs().max() <= 0.6
    same = model.edit(given_codes(), mask.bool().expand(2, 3, 3), torch.tensor(labels), **settings)
    assert torch.equal(same, drawn)


# ---- by hand


@torch.no_grad()
def test_logits_by_hand(name, model):
    """The published formulas (var_rq: section 3.2 of the paper), key by key, in float64."""
    config, p = CONFIGS[name], {key: value.double() for key, value in model.state_dict().items()}
    model = copy.deepcopy(model).double()
    inputs = torch.randn(2, 13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ p[f"{key}.weight"].mT + p[f"{key}.bias"]

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    labels = torch.tensor([4, 10])
    c = p["class_emb.weight"][labels]
    unit = c * torch.sigmoid(c)
    x = torch.cat((c[:, None] + p["pos_start"], linear(inputs, "word_embed")), 1)
    level = torch.tensor([0] + [1] * 4 + [2] * 9)
    x = x + p["lvl_embed.weight"][level] + p["pos_1LC"]
    for i in range(config.depth):
        b = f"blocks.{i}"
        if config.shared_adaln:
            six = p[f"{b}.ada_gss"] + linear(unit, "shared_ada_lin.1").view(2, 1, 6, -1)
        else:
            six = linear(unit, f"{b}.ada_lin.1").view(2, 1, 6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = (h @ p[f"{b}.attn.mat_qkv.weight"].mT).chunk(3, -1)
        q, v = q + p[f"{b}.attn.q_bias"], v + p[f"{b}.attn.v_bias"]
        q, k, v = (one.unflatten(2, (config.num_heads, -1)).transpose(1, 2) for one in (q, k, v))
        if config.l2_norm:
            gain = p[f"{b}.attn.scale_mul_1H11"].clamp_max(math.log(100)).exp()
            q, k = gain * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        else:
            q = q * 0.25 / math.sqrt(q.shape[-1])
        scores = (q @ k.mT).masked_fill(level[:, None] < level, -torch.inf)
        x = x + gate1 * linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{b}.attn.proj")
        h = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(F.gelu(linear(h, f"{b}.ffn.fc1"), approximate="tanh"), f"{b}.ffn.fc2")
    scale, shift = linear(unit, "head_nm.ada_lin.1").view(2, 1, 2, -1).unbind(2)
    expected = linear(norm(x) * (1 + scale) + shift, "head")
    torch.testing.assert_close(model(labels, inputs), expected, rtol=1e-9, atol=1e-9)


def test_drawing_agrees_with_teacher_forcing(model):
    """Scale by scale over the cache, the last scale's in a shared place, or all at once: greedy codes agree."""
    codes = model.generate_codes([1, 2, 3], cfg=0.0, top_k=1, seed=0)
    logits = model.teacher_forced([1, 2, 3], codes)
    assert torch.equal(torch.cat(codes, 1), logits.argmax(-1))


def test_scales_that_are_not_square():
    config = replace(CONFIGS["blocks"], scales=((1, 1), (1, 2), (2, 3), 3))
    model = var(config)
    codes = model.generate_codes([1, 2], cfg=0.0, top_k=1, seed=0)
    assert [one.shape[1] for one in codes] == [1, 2, 6, 9]
    assert torch.equal(torch.cat(codes, 1), model.teacher_forced([1, 2], codes).argmax(-1))
    alone = var(replace(config, scales=(3,)))
    assert alone.generate([1], seed=0).shape == (1, 3, 48, 48)


def test_parts_of_a_batch(model):
    """One generator for all parts, so that each is what it would be in a call of its own with that generator."""
    settings = {"cfg": 2.0, "top_k": 20, "top_p": 0.9}
    parts = model.generate_codes([1, 2, 3], **settings, seed=4, images_per_call=2)
    generator = torch.Generator().manual_seed(4)
    first = model._draw("test", [1, 2], 2.0, 20, 0.9, generator, False, None, True, paints=False)[0]
    second = model._draw("test", [3], 2.0, 20, 0.9, generator, False, None, True, paints=False)[0]
    for whole, *both in zip(parts, first, second, strict=True):
        assert torch.equal(whole, torch.cat(both))
    torch.manual_seed(4)
    assert torch.equal(model.generate([1, 2]), model.generate([1, 2], seed=4))


def test_autocast_and_inference_mode_change_nothing(model):
    expected = model.generate([1, 2], seed=1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.generate([1, 2], seed=1), expected)


def test_drawing_in_training_mode_changes_nothing():
    model = var(replace(CONFIGS["blocks"], cond_drop=1.0, drop_path=0.9))
    expected = model.generate([1, 2], seed=1)
    assert torch.equal(model.train().generate([1, 2], seed=1), expected)
    assert model.training


def test_the_last_scale_is_cached_once(model):
    """Of the other scales every block has its own place; the last one lies where blocks that are done have theirs."""
    config, width = model.config, model.config.dim
    session = model._session(2, True, False, False, False, model.vae.quantize.book(), None, 2)
    assert session.cache.dtype == model.dtype
    assert session.cache.numel() == 2 * 4 * (config.depth * (1 + 4) + 9) * width
    session.cache.zero_()
    for i, cache in enumerate(session.caches):
        assert cache.shape[3] == 1 + 4 + 9
        cache[:, :, :, :5] = i + 1
    for i, cache in enumerate(session.caches):
        assert (cache[:, :, :, :5] == i + 1).all()  # of what the blocks before did in their own place, nothing is lost
        cache[:, :, :, 5:] = -1


def test_editing_keeps_what_is_masked(model):
    images = ((pictures("edited", 2, 48, 48) + 1) * 127.5).round().to(torch.uint8)
    everything = torch.ones(3, 3)
    kept = model.edit(images, everything, seed=0)
    assert same_pictures(kept, model.vae.decode_codes(model.encode(images)))
    assert torch.equal(kept, model.edit(model.encode(images), everything, 5, seed=3, more_smooth=True))
    assert not torch.equal(model.edit(images, torch.zeros(3, 3), seed=0), kept)
    boxed = model.box_mask(0, 0, 1, 0.5)
    assert torch.equal(boxed, torch.tensor([[0.0, 0.0, 1.0]] * 3))
    assert torch.equal(model.box_mask(0, 0, 1, 0.5, inpaint=False), 1 - boxed)


# ---- training


def test_every_parameter_learns(name):
    model = var(CONFIGS[name]).train().requires_grad_(True)
    inputs = model.vae.quantize.idxBl_to_var_input(given_codes())
    logits = model(torch.tensor([1, 2]), inputs)
    F.cross_entropy(logits.flatten(0, 1), torch.cat(given_codes(), 1).flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_gradients_are_those_of_the_formula():
    """In float64, of the smallest model with everything in it."""
    model = var(replace(CONFIGS["blocks"], depth=2)).double().requires_grad_(True)
    inputs = model.vae.quantize.idxBl_to_var_input(given_codes()).double()[:1].requires_grad_()
    direction = torch.randn(inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model(torch.tensor([1]), inputs)
    (slope,) = torch.autograd.grad(logits.sin().sum(), inputs)
    step = 1e-6
    with torch.no_grad():
        ends = [model(torch.tensor([1]), inputs + sign * step * direction).sin().sum() for sign in (1, -1)]
    torch.testing.assert_close((slope * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_training_step_compiles_whole(name):
    model = var(CONFIGS[name]).train().requires_grad_(True)
    model.config = replace(model.config, cond_drop=0.0)
    inputs, labels = model.vae.quantize.idxBl_to_var_input(given_codes()).detach(), torch.tensor([1, 2])
    results = []
    for one in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = one(labels, inputs)
        logits.sin().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_training_leaves_out():
    """Classes are taken away and branches dropped in training alone."""
    config = replace(CONFIGS["blocks"], cond_drop=1.0, drop_path=1 - 1e-9)
    model = var(config)
    inputs = model.vae.quantize.idxBl_to_var_input(given_codes())
    labels, none = torch.tensor([1, 2]), torch.tensor([10, 10])
    exact, without = model(labels, inputs), model(none, inputs)
    assert not torch.equal(exact, without)
    assert torch.equal(var(replace(config, drop_path=0.0)).train()(labels, inputs), without)

    def trained():
        torch.manual_seed(0)
        return model.train()(labels, inputs)

    dropped = trained()
    assert not torch.equal(dropped, without)
    model.blocks[2].ffn.fc2.weight.data.normal_()  # the last block is always left out, the first never
    assert torch.equal(trained(), dropped)
    model.blocks[0].ffn.fc2.weight.data.normal_()
    assert not torch.equal(trained(), dropped)


def test_initial_weights():
    torch.manual_seed(0)
    model = VAR(replace(CONFIGS["blocks"], depth=8, dim=128))
    unit = math.sqrt(1 / 128 / 3)
    six = model.blocks[3].ada_lin[1].weight.unflatten(0, (6, 128))
    for tensor, std in (
        (model.pos_1LC, unit),
        (model.class_emb.weight, unit),
        (model.head.weight, 0.02 * unit),
        (model.blocks[0].attn.mat_qkv.weight, unit),
        (model.blocks[0].attn.proj.weight, unit / 4),
        (model.blocks[0].ffn.fc2.weight, unit / 4),
        (six[:2], 1e-5 * unit),
        (six[2:], 0.5 * unit),
    ):
        assert abs(tensor.std().item() / std - 1) < 0.1
    assert not model.blocks[0].ffn.fc1.bias.any()


# ---- dtypes


def test_products_in_half_precision(name, model):
    expected = model.teacher_forced([3, 10], given_codes())
    scale = expected.std()
    for dtype, share in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        half = copy.deepcopy(model)
        half.attach(model.vae)
        assert half.cast_products(dtype) is half
        assert half.dtype == half.blocks[0].attn.mat_qkv.weight.dtype == half.blocks[0].attn.q_bias.dtype == dtype
        kept = [half.class_emb.weight, half.pos_1LC, half.word_embed.weight]
        kept += [one for key, one in half.named_parameters() if "scale_mul" in key or "ada_gss" in key]
        assert {one.dtype for one in kept} == {torch.float32}
        got = half.teacher_forced([3, 10], given_codes())
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= share * expected.norm()
        codes = half.generate_codes([1, 2], cfg=0.0, top_k=1, seed=0)
        logits = half.teacher_forced([1, 2], codes)
        chosen = logits.gather(-1, torch.cat(codes, 1)[..., None])[..., 0]
        assert (logits.amax(-1) - chosen).max() <= 4 * share * scale
        with torch.autocast("cpu", dtype=dtype):
            auto = model.teacher_forced([3, 10], given_codes())
        assert (auto - expected).norm() <= share * expected.norm()


@pytest.mark.parametrize("smooth", [False, True])
def test_drawing_with_triton_kernels(monkeypatch, smooth):
    """Interpreted: norms, attention, the draw, the sums, and the decoder's norm, which wants its maps channels-last."""
    if reason := interpreter_skip():
        pytest.skip(reason)
    model = var()
    model.vae.fast_decoder(torch.float32)
    settings = {"cfg": 2.0, "top_k": 30, "top_p": 0.9, "seed": 0, "more_smooth": smooth}
    expected = model.generate([3], **settings)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    assert same_pictures(model.generate([3], **settings), expected)


def test_few_rows_in_parts(monkeypatch, name, model):
    """Products of few tokens by kernels of their own, to the same logits but for rounding; interpreted."""
    if reason := interpreter_skip():
        pytest.skip(reason)
    half = copy.deepcopy(model).cast_products(torch.float16)
    half.attach(model.vae)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    monkeypatch.setattr(linear_few, "FEW", 8 * model.config.dim)
    taken, in_parts = [], half.blocks[0].ffn.forward

    def seen(x):
        taken.append((x.shape[1], isinstance(branch := in_parts(x), tuple)))
        return branch

    monkeypatch.setattr(half.blocks[0].ffn, "forward", seen)
    codes = half.generate_codes([1, 2], cfg=0.0, top_k=1, seed=0)
    assert taken == [(1, True), (4, True), (9, False)]
    monkeypatch.delenv("UNIFIEDAR_BACKEND")
    logits, exact = (one.teacher_forced([1, 2], codes) for one in (half, model))
    assert (logits - exact).norm() <= 0.01 * exact.norm()
    chosen = exact.gather(-1, torch.cat(codes, 1)[..., None])[..., 0]
    assert (exact.amax(-1) - chosen).max() <= 0.04 * exact.std()


# ---- loading


def test_published_file(tmp_path, name, model):
    """A bare .pth, sizes read off its tensors."""
    path = tmp_path / "var_d3.pth"
    torch.save(model.state_dict(), path)
    config = replace(CONFIGS[name], drop_path=0.1 * CONFIGS[name].depth / 24)
    if not config.l2_norm:  # there is nothing to count heads by
        assert VAR.from_checkpoint(path).config.num_heads == 1
        again = VAR.from_checkpoint(path, vae=model.vae, config=config)
    else:
        again = VAR.from_checkpoint(path, vae=model.vae)
    assert again.config == config
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.generate([1, 2], seed=3), model.generate([1, 2], seed=3))


def test_trainer_checkpoint(tmp_path, monkeypatch):
    """One file with the model, its tokenizer and much else."""
    model = var()
    path = tmp_path / "ar-ckpt-last.pth"
    trainer = {"config": {"depth": 3}, "var_wo_ddp": model.state_dict(), "vae_local": model.vae.state_dict()}
    torch.save({"epoch": 1, "iter": 0, "trainer": trainer, "args": {"pn": "1_2_3"}}, path)
    monkeypatch.setattr(VQVAE, "configs", {"small": VQ})
    again = VAR.from_checkpoint(path, vae=path)
    assert torch.equal(again.generate([1, 2], seed=3), model.generate([1, 2], seed=3))


def test_save_export_and_load(tmp_path, name, model):
    folder = model.save(tmp_path / "small")
    again = VAR.from_checkpoint(folder, vae=model.vae)
    assert again.config == CONFIGS[name]
    assert fingerprint(again.state_dict()) == fingerprint(model.state_dict())
    tokenizer = model.vae.save(tmp_path / "vae")
    half = VAR.from_checkpoint(folder, "cpu", torch.bfloat16, vae=tokenizer, decoder_dtype=torch.float16)
    assert half.dtype == torch.bfloat16
    assert half.vae.decoder.conv_in.weight.dtype == torch.float16
    assert half.generate([1], seed=0).shape == (1, 3, 48, 48)
    again.export(tmp_path / "published.pth")
    state = torch.load(tmp_path / "published.pth", weights_only=True)
    assert fingerprint(state) == fingerprint(model.state_dict())
    assert {one.name for one in tmp_path.iterdir()} == {"small", "vae", "published.pth"}
    wide = replace(CONFIGS[name], scales=((1, 1), (2, 3), (3, 3)))
    assert VARConfig.from_dict(json.loads(json.dumps(wide.to_dict()))) == wide


def test_what_does_not_load(tmp_path):
    model = var()
    state = model.state_dict()
    path = tmp_path / "var.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="do not fit"):
        VAR.from_checkpoint(path, config=replace(model.config, depth=2))
    for scales in ((1, (1, 3), (2, 5)), (1, 2, 4)):  # as many codes in all, and more
        with pytest.raises(CheckpointError, match=r"not trained with the scales .* but with scales of \[1, 4, 9\]"):
            VAR.from_checkpoint(path, config=replace(model.config, scales=scales))
    torch.save({key: value for key, value in state.items() if key != "head.weight"}, path)
    with pytest.raises(CheckpointError, match="has not the keys of a VAR"):
        VAR.from_checkpoint(path)
    folder = model.save(tmp_path / "small")
    (folder / "config.json").write_text('{"model": "vqvae"}')
    with pytest.raises(CheckpointError, match="does not describe a VAR"):
        VAR.from_checkpoint(folder)
    (folder / "config.json").write_text('{"model": "var", "depth": 3}')
    with pytest.raises(CheckpointError, match="does not describe a VAR"):
        VAR.from_checkpoint(folder)
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.export(tmp_path / "no such folder" / "var.pth")


def test_the_tokenizer_is_no_part_of_the_model(tmp_path):
    model = var()
    assert not any(key.startswith("vae") for key in model.state_dict())
    assert model.vae not in list(model.modules())
    with torch.device("meta"):
        empty = VAR(model.config)
    empty.load_state_dict(var_weights(model), strict=True, assign=True)
    assert empty.vae is None


# ---- bad input

BAD = [
    (lambda m: m.generate([11]), ValueError, r"labels must be classes from 0 to 9, or 10 for none, got 11 to 11"),
    (lambda m: m.generate(-1), ValueError, "labels must be classes"),
    (lambda m: m.generate([]), ValueError, "labels must name one picture or more"),
    (lambda m: m.generate([[1]]), TypeError, "labels must be integers"),
    (lambda m: m.generate(torch.tensor([1.0])), TypeError, "labels must be integers"),
    (lambda m: m.generate(torch.tensor([[1]])), ValueError, r"labels must name.*got \(1, 1\)"),
    (lambda m: m.generate(1, cfg=-0.5), ValueError, "cfg must be at least 0"),
    (lambda m: m.generate(1, cfg=math.nan), ValueError, "cfg must be at least 0"),
    (lambda m: m.generate(1, cfg="4"), TypeError, "cfg must be a number"),
    (lambda m: m.generate(1, top_k=97), ValueError, "top_k must be from 0 to 96"),
    (lambda m: m.generate(1, top_k=-1), ValueError, "top_k must be from 0"),
    (lambda m: m.generate(1, top_k=1.5), TypeError, "top_k must be an integer"),
    (lambda m: m.generate(1, top_p=1.1), ValueError, "top_p must be from 0 to 1"),
    (lambda m: m.generate(1, top_p=-0.1), ValueError, "top_p must be from 0 to 1"),
    (lambda m: m.generate(1, seed="1"), TypeError, "seed must be an integer or None, got str"),
    (lambda m: m.generate(1, images_per_call=0), ValueError, "images_per_call must be at least 1"),
    (lambda m: m.generate_codes([10, 12]), ValueError, "generate_codes: labels"),
    (lambda m: VAR(m.config).generate(1), ValueError, "vae must be there"),
    (lambda m: m.attach(m), TypeError, "vae must be a VQVAE"),
    (lambda m: m.attach(vqvae(replace(VQ, num_codes=95))), ValueError, r"codebook \(96, 8\), got one of \(95, 8\)"),
    (lambda m: m.encode(torch.zeros(1, 3, 64, 64)), ValueError, r"\(N, 3, 48, 48\).*scales that the model was trained"),
    (lambda m: m.encode(torch.zeros(1, 3, 48, 48).long()), TypeError, "images must be uint8"),
    (lambda m: m(torch.tensor([1]), torch.zeros(1, 12, 8)), ValueError, r"must be \(B, 13, 8\)"),
    (lambda m: m(torch.tensor([1]), torch.zeros(2, 13, 8)), ValueError, r"label_B must be \(2,\)"),
    (lambda m: m(torch.tensor([11]), torch.zeros(1, 13, 8)), ValueError, "label_B must be classes"),
    (lambda m: m(torch.tensor([1]), torch.zeros(1, 13, 8).long()), TypeError, "floating-point"),
    (lambda m: m.teacher_forced([1], given_codes()), ValueError, r"label_B must be \(2,\)"),
    (lambda m: m.edit(given_codes()[:2], torch.ones(3, 3)), ValueError, "codes of 3 scales, got 2"),
    (lambda m: m.edit(given_codes()[::-1], torch.ones(3, 3)), ValueError, r"codes \(2, 1\) at scale 0"),
    (lambda m: m.edit([torch.zeros(1, 1)], torch.ones(3, 3)), TypeError, "int64 codes of every scale"),
    (lambda m: m.edit(given_codes(), torch.ones(4, 4)), ValueError, r"mask must be \(3, 3\) or \(2, 3, 3\)"),
    (lambda m: m.edit(given_codes(), [[1]]), TypeError, "mask must be a tensor"),
    (lambda m: m.edit(given_codes(), torch.ones(3, 3), [1]), ValueError, r"labels must be \(2,\), one a picture"),
    (lambda m: m.cast_products(torch.int8), TypeError, "dtype must be float32"),
    (lambda m: VAR(replace(m.config, depth=0)), ValueError, "sizes must be at least 1"),
    (lambda m: VAR(replace(m.config, scales=())), ValueError, "sizes must be at least 1"),
    (lambda m: VAR(replace(m.config, scales=(3, 2))), ValueError, "not be larger than the last"),
    (lambda m: VAR(replace(m.config, drop_path=1.0)), ValueError, "drop_path and cond_drop"),
    (lambda m: VAR(replace(m.config, num_heads=5)), ValueError, "heads must divide"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(var())


def test_a_tokenizer_on_another_device():
    with torch.device("meta"):
        elsewhere = VQVAE(VQ)
    model = VAR(CONFIGS["blocks"], elsewhere)
    with pytest.raises(ValueError, match="vae must be on the model's device cpu, got meta"):
        model.generate(1)


def test_out_of_memory_names_the_way_out(monkeypatch):
    model = var()

    def full(*args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(model, "_session", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"3 pictures at once do not fit.*images_per_call below 3"):
        model.generate([1, 2, 3])


# ---- the engine


def test_steps_without_graphs():
    seen = []
    steps = Steps([lambda: seen.append(0), lambda: seen.append(1)], graphs=False)
    assert len(steps) == 2
    assert steps.seconds == 0
    assert not seen
    steps.run(0)
    steps.run(1)
    assert seen == [0, 1]


def test_pool():
    pool, made = Pool(2), []

    def get(key):
        return pool.get(key, lambda: made.append(key) or [key])

    first = get("a")
    get("b")
    assert get("a") is first
    get("c")  # b was used least recently
    assert pool.values() == [["a"], ["c"]]
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert len(copy.deepcopy(pool)) == 0
    assert copy.deepcopy(pool).limit == 2
    pool.clear()
    assert len(pool) == 0


class Capturing(TorchFunctionMode):
    """Refuses what no graph captures: a tensor of numbers that the host has, and a number that the host reads."""

    REFUSED = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.item, Tensor.tolist)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in self.REFUSED, f"{function.__name__} while capturing"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def replayed(monkeypatch):
    """Draws as a GPU would, with sessions that last and are rounded up; a replay is a call."""

    def capture(steps):
        for step in steps:
            step()
        with Capturing():
            for step in steps:
                step()
        return [SimpleNamespace(replay=step) for step in steps]

    monkeypatch.setattr(engine, "_capture", capture)

    def draw(model, labels, *, cfg=1.5, top_k=0, top_p=0.0, seed=0, smooth=False, edit=None):
        generator = torch.Generator().manual_seed(seed)
        book, paint = model.vae.quantize.book(), model.vae.fhat_to_img
        with torch.no_grad():
            session = model._session(len(labels), cfg > 0, smooth, edit is not None, True, book, paint, len(labels))
            return session.draw(torch.tensor(labels, dtype=torch.int32), cfg, top_k, top_p, generator, edit)

    return draw


@pytest.fixture(params=[True, False], ids=["noise ahead", "noise by scale"])
def noise_places(request, monkeypatch):
    """Noise of all scales has places of its own, or one place is used again and again."""
    if not request.param:
        monkeypatch.setattr(_var_drawing, "AHEAD", 0)


@pytest.mark.usefixtures("noise_places")
@pytest.mark.parametrize("smooth", [False, True])
def test_sessions_last_and_are_rounded_up(replayed, smooth):
    model = var()
    for labels, batch in (([1, 2], 2), ([*range(10), 10], 16), ([4] * 9, 16)):
        for settings in ({}, {"cfg": 4.0, "top_k": 20, "top_p": 0.9, "seed": 3}):
            codes, raw = replayed(model, labels, **settings, smooth=smooth)
            wanted = model._draw(
                "test", labels, *({"cfg": 1.5, "top_k": 0, "top_p": 0.0, "seed": 0} | settings).values(), smooth, None,
                False, paints=True,
            )  # fmt: skip
            assert codes.shape == (len(labels), sum(model.config.lengths))
            assert torch.equal(codes, torch.cat(wanted[0], 1))
            assert same_pictures(to_bytes(raw), wanted[1])
            assert model.captures[-1][:4] == (batch, True, smooth, False)
    assert len(model.captures) == 2
    replayed(model, [1, 2], cfg=0.0)
    assert model.captures[-1][:3] == (2, False, False)
    model.forget_captures()
    assert not model.captures


def test_what_is_captured_copies_nothing_from_the_host(replayed):
    """With the decoder that a GPU has, too; its norms and sums by their definitions."""
    model = var()
    model.attach(vqvae().fast_decoder(torch.float32))
    for smooth in (False, True):
        _, raw = replayed(model, [1, 2], smooth=smooth)
        assert raw.isfinite().all()
    with Capturing(), pytest.raises(AssertionError, match="tensor while capturing"):
        torch.tensor([1.0], device=raw.device)


def test_sessions_of_edits_and_of_other_weights(replayed):
    model = var()
    mask = model.box_mask(*BOX).expand(2, 3, 3)
    for seed, given in ((1, given_codes()), (2, [one.flip(0) for one in given_codes()])):
        codes, _ = replayed(model, [1, 2], seed=seed, edit=Edit(given, mask))
        expected = model._draw(
            "test", [1, 2], 1.5, 0, 0.0, seed, False, None, False, paints=True, edit=Edit(given, mask)
        )[0]
        assert torch.equal(codes, torch.cat(expected, 1))
    assert [one.edits for one in model.captures] == [True]
    replayed(model, [1, 2])
    before, held = len(model.captures), [model.pos_start.data]  # held, so that no copy comes to lie where one was
    model.pos_start.data = model.pos_start.data.clone()  # a graph would read the old place
    replayed(model, [1, 2])
    assert len(model.captures) == before + 1
    for _ in range(5):
        held.append(model.pos_start.data)
        model.pos_start.data = held[-1].clone()
        replayed(model, [1, 2])
    assert len(model.captures) == 4


@pytest.mark.usefixtures("replayed", "noise_places")
@pytest.mark.parametrize("smooth", [False, True])
def test_a_session_begins_before_the_weights_were_looked_at(smooth):
    """With other weights it is given up for another, which draws on with the same noise."""
    model = var()
    book = model.vae.quantize.book()
    settings = 1.5, 20, 0.9

    def drawn() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        how = (2, True, smooth, False, True)
        with torch.no_grad():
            codes, _ = model._part(how, book, model.vae.fhat_to_img, torch.tensor([1, 2]), *settings, generator, None)
        wanted = model._draw("test", [1, 2], *settings, 3, smooth, None, False, paints=False)[0]
        assert torch.equal(codes, torch.cat(wanted, 1))
        return codes

    def held() -> list[bool]:
        return [one.held is not None for one in model._sessions.values()]

    first = drawn()
    assert torch.equal(drawn(), first)
    assert held() == [True]
    before = model.class_emb.weight.data
    model.class_emb.weight.data = -before
    assert not torch.equal(drawn(), first)
    assert held() == [False, True]
    model.class_emb.weight.data = before
    assert torch.equal(drawn(), first)
    assert held() == [False, True]
    assert len(model.captures) == 2  # none of them anew
    model.cast_products(torch.float32)
    assert held() == [False, False]
    assert torch.equal(drawn(), first)


# ---- on a GPU


@pytest.fixture
def on_gpu(gpu_model, monkeypatch) -> VAR:
    """Without TF32, in which a batch of another size rounds otherwise and other codes are drawn."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return gpu_model


@pytest.fixture(scope="module")
def gpu_model() -> VAR:
    model = var(CONFIGS["blocks"])
    moved = VAR(model.config, vqvae().to("cuda").fast_decoder(torch.float32)).eval().requires_grad_(False)
    moved.load_state_dict(model.state_dict())
    return moved.to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("labels", [[1], [1, 2, 3], [*range(10), 10]], ids=len)
@pytest.mark.parametrize("smooth", [False, True])
def test_graphs_draw_what_steps_draw(on_gpu, labels, smooth):
    """Batches of 11 are rounded up to 16: pictures and noise are those of a batch of 11."""
    for settings in ({"seed": 0}, {"seed": 1, "cfg": 3.0, "top_k": 20, "top_p": 0.9}):
        expected = on_gpu.generate(labels, **settings, more_smooth=smooth, graphs=False)
        for _ in range(2):
            got = on_gpu.generate(labels, **settings, more_smooth=smooth, graphs=True)
            assert same_pictures(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (2, 9), (6, 100)], ids=str)
def test_gelu_in_the_product(dtype, rows):
    """On a GPU without gradients it is one kernel, for one row as for many; as exact as two."""
    torch.manual_seed(0)
    mlp = _MLP(96, 384).to("cuda", dtype).requires_grad_(False)
    x = 2 * torch.randn(*rows, 96, device="cuda", dtype=dtype)
    exact = F.gelu(F.linear(x.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double()), approximate="tanh")
    with torch.no_grad():
        got = mlp._hidden(x)
    with torch.enable_grad():
        eager = mlp._hidden(x)
    assert_as_good_as_eager(got, eager, exact)


@pytest.mark.gpu
def test_settings_never_capture_anew(on_gpu):
    on_gpu.forget_captures()
    on_gpu.generate([1, 2], seed=0, graphs=True)
    (before,) = on_gpu.captures
    assert before.seconds > 0
    assert (before.batch, before.guided) == (2, True)
    settings = ((1.5, 0, 0.0, 0), (4.0, 0, 0.0, 0), (4.0, 3, 0.0, 0), (4.0, 3, 0.5, 0), (4.0, 3, 0.5, 1))
    drawn = [on_gpu.generate([3, 4], cfg=cfg, top_k=k, top_p=p, seed=seed, graphs=True) for cfg, k, p, seed in settings]
    assert on_gpu.captures == [before]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(drawn))
    on_gpu.generate([1, 2, 3], seed=0, graphs=True)
    assert len(on_gpu.captures) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_labels_on_a_gpu_are_looked_at_while_it_draws(on_gpu, dtype):
    labels = torch.tensor([10, 3, 1, 2], device="cuda", dtype=dtype)[1:]
    expected = on_gpu.generate([3, 1, 2], seed=0)
    for wrong in (-1, 2**31 - 1):
        bad = labels.clone()
        bad[1] = wrong
        for some in ({}, {"images_per_call": 1}):
            with pytest.raises(ValueError, match="labels must be classes from 0 to 9, or 10 for none, got"):
                on_gpu.generate(bad, seed=0, **some)
        assert torch.equal(on_gpu.generate(labels, seed=0), expected)


@pytest.mark.gpu
def test_edits_on_a_gpu(on_gpu):
    codes, mask = [one.cuda() for one in given_codes()], on_gpu.box_mask(*BOX)
    for smooth in (False, True):
        settings = {"seed": 1, "cfg": 3.0, "more_smooth": smooth}
        expected = on_gpu.edit(codes, mask, [1, 2], **settings, graphs=False)
        got = on_gpu.edit(codes, mask, [1, 2], **settings, graphs=True)
        assert same_pictures(got, expected)
        assert same_pictures(on_gpu.edit(codes, torch.ones(3, 3), **settings), on_gpu.vae.decode_codes(codes))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(on_gpu, dtype, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("UNIFIEDAR_BACKEND", backend)
    expected = on_gpu.teacher_forced([3, 10], given_codes())
    half = copy.deepcopy(on_gpu).cast_products(dtype)
    half.attach(on_gpu.vae)
    got = half.teacher_forced([3, 10], given_codes())
    assert (got - expected).norm() <= (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()
    a = half.generate([1, 2, 3], seed=0, cfg=2.0, top_k=30, top_p=0.95, graphs=True)
    b = half.generate([1, 2, 3], seed=0, cfg=2.0, top_k=30, top_p=0.95, graphs=False)
    assert (a.int() - b.int()).abs().max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dependent_launches_draw_the_same(dtype, backend, monkeypatch):
    """Kernels that begin before the one before is over, many blocks of them, and one after another: the same codes."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    if backend:
        monkeypatch.setenv("UNIFIEDAR_BACKEND", backend)
    dependent = importlib.import_module("unifiedar.kernels._dependent")
    model = var(VARConfig(12, 512, 8, (1, 2, 3), num_codes=VQ.num_codes, code_dim=VQ.dim))
    model.attach(vqvae().to("cuda").fast_decoder(torch.float32))
    model.to("cuda").cast_products(dtype)

    def drawn() -> list[Tensor]:
        return [torch.cat(model.generate_codes([3, 5], cfg=2.0, top_k=20, seed=seed), 1) for seed in range(8)]

    with monkeypatch.context() as patch:
        patch.setattr(dependent, "_has", lambda index: False)
        expected = drawn()
    model.forget_captures()
    assert len({tuple(one.flatten().tolist()) for one in expected}) > 1
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(drawn(), expected, strict=True))
    assert len(model.captures) == 1


@pytest.mark.parametrize("setting", ["matmul.allow_tf32 = True", "matmul.fp32_precision = 'tf32'"])
def test_circumstances_are_read_whatever_names_set_them(setting):
    """torch's old names for the precision of float32 products raise once the new ones were used, so: a process each."""
    code = f"""
        import torch
        from unifiedar.engine import circumstances
        before = circumstances()
        torch.backends.cuda.{setting}
        assert circumstances() != before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.gpu
def test_weights_that_moved_are_captured_anew(on_gpu):
    model = copy.deepcopy(on_gpu)
    model.attach(on_gpu.vae)
    before = model.generate([1, 2], seed=0, graphs=True)
    with torch.no_grad():
        model.class_emb.weight.mul_(-1)  # in place: the graph sees it
    assert not torch.equal(model.generate([1, 2], seed=0, graphs=True), before)
    model.class_emb.weight.data = -model.class_emb.weight.data.clone()  # elsewhere
    assert torch.equal(model.generate([1, 2], seed=0, graphs=True), before)
