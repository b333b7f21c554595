"""`python -m unifiedar.accelerate --check var` on a folder that looks like a checkout: stand-ins for its models."""

import sys
from dataclasses import replace

import pytest
import torch
from autoencoder_small import VQ
from torch import nn

from unifiedar.accelerate.__main__ import main
from unifiedar.accelerate._check import Finding
from unifiedar.models import VQVAE

MODELS = """
import torch
from published_var import VAR as Published
from unifiedar.models import VQVAE


class VAR(Published):
    {change}


VAR.__module__ = "models.var"


def build_vae_var(device, depth=3, **options):
    torch.nn.Conv1d.reset_parameters = lambda self: None  # as the published one does
    print("chatter")
    (config,) = VQVAE.configs.values()
    vae = VQVAE(config)
    for convolution in vae.quantize.quant_resi.modules():
        convolution.resi_ratio = 0.5
    return vae.to(device), VAR(vae, depth=depth).to(device)
"""
FORKS = {
    "published": ("pass", 0),
    "other logits": ("def get_logits(self, x, cond): return 2 * super().get_logits(x, cond)", 1),
    "other draws": (
        "def _draw(self, logits, k, p, rng): return super()._draw(logits + 1e-1 * logits**2, k, p, rng)",
        1,
    ),
}


@pytest.fixture(autouse=True)
def small_tokenizer(monkeypatch):
    network = replace(VQ.network, z_channels=6, resolution=80, attn_resolutions=(5,))
    monkeypatch.setattr(VQVAE, "configs", {"small": replace(VQ, network=network, num_codes=40, scales=(1, 2, 3, 5))})


@pytest.mark.parametrize(("change", "code"), FORKS.values(), ids=FORKS)
def test_side_by_side(tmp_path, capsys, change, code):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(MODELS.format(change=change))
    method, path, tf32 = nn.Conv1d.reset_parameters, list(sys.path), torch.backends.cudnn.allow_tf32
    assert main(["--check", "var", "--reference", str(tmp_path), "--device", "cpu"]) == code
    out = capsys.readouterr().out
    assert "chatter" not in out
    lines = out.splitlines()
    assert len(lines) == 11
    assert any(line.startswith("WRONG") for line in lines) == bool(code)
    assert (nn.Conv1d.reset_parameters, sys.path, torch.backends.cudnn.allow_tf32) == (method, path, tf32)
    assert "models" not in sys.modules


def test_what_cannot_be_run(tmp_path, capsys):
    for content, text in ((None, "no folder models"), ("import not_there", "that runs here"), ("", "build_vae_var")):
        if content is not None:
            (tmp_path / "models").mkdir(exist_ok=True)
            (tmp_path / "models" / "__init__.py").write_text(content)
        assert main(["--check", "var", "--reference", str(tmp_path), "--device", "cpu"]) == 2
        assert text in capsys.readouterr().err
    assert main(["--check", "var", "--reference", str(tmp_path), "--checkpoint", "x.pth", "--device", "cpu"]) == 2
    assert "must be given together" in capsys.readouterr().err


def test_what_is_not_a_number_is_wrong():
    assert not Finding("logits", float("nan"), 1.0).good
    assert str(Finding("codes", 0, 0)).startswith("ok")
