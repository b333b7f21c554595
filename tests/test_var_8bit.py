"""A VAR with weights of 8 bits: the model whose weights were rounded to them, in less memory."""

import copy

import pytest
import torch
from var_small import CONFIGS, given_codes, var

from unifiedar import checkpoints
from unifiedar.models import VAR
from unifiedar.nn import Linear8bit
from unifiedar.train.export import export

FORMS = ("int8", "fp8")


def rounded(model, form):
    """The same model in floating point, with weights that 8 bits hold."""
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(("blocks.", "shared_ada_lin.")):
            entries, scale = checkpoints.quantize_rows(layer.weight, form)
            wide = layer.weight.dtype
            layer.weight.data = entries.float().to(wide) * scale[:, None].to(wide)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_rounded_to_the_nearest(form):
    torch.manual_seed(0)
    rows = torch.randn(40, 3, 11) * torch.logspace(-6, 3, 40)[:, None, None]
    rows[5] = 0
    entries, scale = checkpoints.quantize_rows(rows, form)
    assert entries.shape == rows.shape
    every = torch.arange(256, dtype=torch.uint8).view(entries.dtype).float()
    every = every[every.isfinite()]
    wide = scale.double()[:, None, None] * entries.double()
    error = (wide - rows).abs()
    best = (rows.double()[..., None] - scale.double()[:, None, None, None] * every.double()).abs().amin(-1)
    assert (error <= best * (1 + 1e-4) + 1e-12).all()
    largest = entries.float().abs().flatten(1).amax(1)
    assert (largest[rows.flatten(1).any(1)] == every[every < 1e9].max().clamp_max(448 if form == "fp8" else 127)).all()
    assert scale[5] == 1
    with pytest.raises(ValueError, match="form must be 'int8' or 'fp8', got 'fp4'"):
        checkpoints.quantize_rows(rows, "fp4")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_model_with_rounded_weights(name, form):
    """In float64, to rounding; and in float32 it draws the same codes."""
    plain = var(CONFIGS[name])
    want, model = rounded(plain, form), copy.deepcopy(plain).quantize_weights(form)
    codes = given_codes()
    assert torch.equal(want.generate_codes([1, 2], seed=3)[-1], model.generate_codes([1, 2], seed=3)[-1])
    logits = model.teacher_forced([4, 10], codes)
    assert not torch.equal(logits, plain.teacher_forced([4, 10], codes))
    plain.double().vae.double()
    model.double().vae.double()
    exact, got = (one.teacher_forced([4, 10], codes) for one in (rounded(plain, form), model))
    assert got.dtype == torch.float64
    assert (got - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert (logits - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_takes_a_quarter_of_the_memory(form):
    model = var()
    before = {name: layer.weight.nbytes for name, layer in model.blocks.named_modules() if hasattr(layer, "weight")}
    model.quantize_weights(form).cast_products(torch.bfloat16)
    after = dict(model.blocks.named_modules())
    assert len(before) == 5 * len(model.blocks)
    for name, count in before.items():
        assert isinstance(after[name], Linear8bit)
        assert after[name].weight.nbytes * 4 == count
        assert after[name].scale.dtype == torch.float32
        assert after[name].dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    assert model.generate([1], seed=0).shape == (1, 3, 48, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.teacher_forced([1, 2], given_codes()).isfinite().all()


def test_weights_of_a_small_folder_are_the_stored_ones(tmp_path):
    """Read from int8 and put back into int8: not a bit is lost a second time."""
    model = var()
    small = export(model.save_whole(tmp_path / "whole"), tmp_path / "small")
    plain = VAR.from_checkpoint(small)
    again = VAR.from_checkpoint(small, weights="int8", dtype=torch.bfloat16)
    layer = again.blocks[1].ffn.fc2
    assert layer.weight.dtype == torch.int8
    assert layer.bias.dtype == torch.bfloat16
    wide = layer.weight.float() * layer.scale[:, None]
    assert torch.allclose(wide, plain.blocks[1].ffn.fc2.weight, rtol=1e-6, atol=0)


def test_refuses(tmp_path):
    model = var().quantize_weights("fp8")
    for call, name in (
        (lambda: model.quantize_weights("int8"), "quantize_weights"),
        (lambda: model.save(tmp_path / "x"), "save"),
        (lambda: model.save_whole(tmp_path / "x"), "whole"),
        (lambda: model.export(tmp_path / "x.pth"), "export"),
        (lambda: model.initialize(), "initialize"),
    ):
        with pytest.raises(ValueError, match=f"{name}: weights must not be in 8 bits"):
            call()
    with pytest.raises(ValueError, match="backend must be one that this operator has"):
        var().quantize_weights("int8", backend="cuda").generate([0])
    with pytest.raises(ValueError, match="form must be 'int8' or 'fp8'"):
        var().quantize_weights("int4")
    broken = var()
    broken.blocks[0].ffn.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite"):
        broken.quantize_weights("fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu_with_graphs(form):
    """Triton's products, captured: the codes that the rounded model draws, but for logits that are nearly equal."""
    want = rounded(var(), form).to("cuda").cast_products(torch.bfloat16)
    model = var().quantize_weights(form).to("cuda").cast_products(torch.bfloat16)
    for one in (want, model):
        one.attach(var().vae.to("cuda"))
    labels = list(range(8))
    found = [torch.cat(one.generate_codes(labels, seed=1, graphs=True), 1) for one in (want, model)]
    assert (found[0] == found[1]).double().mean() > 0.8
    assert torch.equal(found[1], torch.cat(model.generate_codes(labels, seed=1, graphs=False), 1)), "as without graphs"
