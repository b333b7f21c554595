"""`python -m unifiedar.accelerate --check` on folders that look like checkouts: stand-ins for their models."""

import dataclasses
import sys
import types
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


# ---- RQ-Transformer and VILA-U: packages whose own files cannot be run, and configurations that Python 3.11 refuses

CONFIGS = """
from dataclasses import dataclass
from types import SimpleNamespace


@dataclass
class Block:
    n_head: int = 1


@dataclass
class Stack:
    block: Block = Block()


class OmegaConf:
    create = dict


class RQTransformerConfig(SimpleNamespace):
    @classmethod
    def create(cls, given):
        return cls(**given, default=Stack().block.n_head)
"""
SAMPLER = """
from published_depth import Sampler


class RQTransformer(Sampler):
    def __init__(self, config):
        print("chatter")
        *grid, depth = config.block_size
        assert config.default == 1
        super().__init__(
            tuple(grid), depth, config.vocab_size, config.vocab_size_cond, config.block_size_cond, config.embed_dim,
            config.head["block"]["n_head"], config.body["n_layer"], config.input_embed_dim,
        )

    {change}
"""
RQVAE = """
from published_depth import Tokenizer


class RQVAE(Tokenizer):
    def __init__(self, embed_dim, n_embed, code_shape, **rest):
        super().__init__(code_shape[2], n_embed, embed_dim)
"""
HEAD = """
from published_depth import Head
from .configuration_rqtransformer import RQTransformerConfig


class RQTransformer(Head):
    def __init__(self, config):
        super().__init__(
            config.block_size[2], config.vocab_size, config.input_embed_dim_2, config.input_embed_dim_1,
            config.embed_dim, config.head["block"]["n_head"], config.head["n_layer"],
        )

    {change}
"""
BOTTLENECK = """
from published_depth import Tokenizer


class RQBottleneck(Tokenizer):
    def __init__(self, latent_shape, code_shape, n_embed, shared_codebook):
        super().__init__(code_shape[2], n_embed, latent_shape[2], shared_codebook)
        self.codebooks = self.quantizer.codebooks

    def embed_code_with_depth(self, code):
        return self.get_code_emb_with_depth(code)
"""
TOWER = "vila_u/model/multimodal_encoder/rqvaesigliptransformer"
CHECKOUTS = {
    "rqtransformer": (
        {
            "rqvae/models/rqtransformer/configs.py": CONFIGS,
            "rqvae/models/rqtransformer/transformers.py": SAMPLER,
            "rqvae/models/rqvae/rqvae.py": RQVAE,
        },
        31,
    ),
    "vilau": (
        {
            f"{TOWER}/rqtransformer/configuration_rqtransformer.py": CONFIGS,
            f"{TOWER}/rqtransformer/modeling_rqtransformer.py": HEAD,
            f"{TOWER}/rqvaesiglip/quantizations.py": BOTTLENECK,
        },
        26,
    ),
}
DEPTH_FORKS = {
    "published": ("pass", 0),
    "other logits": (
        "def forward(self, *args):\n"
        "        found = super().forward(*args)\n"
        "        return (2 * found[0], found[1]) if isinstance(found, tuple) else 2 * found",
        1,
    ),
    "other draws": (
        "def embed_with_model_aux(self, *args): return super().embed_with_model_aux(*args) * 1.1",
        1,
    ),
    "broken": ("def sample(self): pass\n    def embed_with_model_aux(self): pass", None),
}


def checkout(folder, files, change="pass"):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{change}", change))
        for package in path.relative_to(folder).parents[:-1]:
            (folder / package / "__init__.py").write_text("import something_that_nobody_has")
    return str(folder)


@pytest.mark.parametrize("model", CHECKOUTS)
@pytest.mark.parametrize(("change", "code"), DEPTH_FORKS.values(), ids=DEPTH_FORKS)
def test_depth_side_by_side(tmp_path, capsys, model, change, code):
    files, count = CHECKOUTS[model]
    arguments = ["--check", model, "--reference", checkout(tmp_path, files, change), "--device", "cpu"]
    before, path, make = set(sys.modules), list(sys.path), dataclasses.dataclass
    if code is None:  # what the checkout raises is its own
        with pytest.raises(TypeError):
            main(arguments)
    else:
        assert main(arguments) == code
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count
        assert any(line.startswith("WRONG") for line in lines) == bool(code)
        assert not any("chatter" in line for line in lines)
        refusals = [line for line in lines if "accelerate refuses" in line]
        assert all(line.startswith("WRONG") == bool(code) for line in refusals)
    assert (sys.path, dataclasses.dataclass) == (path, make)
    assert not {name for name in set(sys.modules) - before if name.startswith(("rqvae", "vila_u"))}


def test_a_package_of_that_name_comes_back(tmp_path, capsys):
    """Somebody else's, already imported."""
    mine = sys.modules["rqvae"] = types.ModuleType("rqvae")
    try:
        files, _ = CHECKOUTS["rqtransformer"]
        assert main(["--check", "rqtransformer", "--reference", checkout(tmp_path, files), "--device", "cpu"]) == 0
        assert sys.modules["rqvae"] is mine
    finally:
        del sys.modules["rqvae"]


@pytest.mark.parametrize("model", CHECKOUTS)
def test_depth_cannot_be_run(tmp_path, capsys, model):
    files, _ = CHECKOUTS[model]

    def answers(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        given = checkout(folder, {name: change(name, text) for name, text in files.items()})
        assert main(["--check", model, "--reference", given, "--device", "cpu"]) == 2
        return capsys.readouterr().err

    assert main(["--check", model, "--reference", str(tmp_path), "--device", "cpu"]) == 2
    first = "transformers.py" if model == "rqtransformer" else "modeling_rqtransformer.py"
    assert f"{first} in it" in capsys.readouterr().err
    assert "that runs here: No module named 'not_there'" in answers(lambda name, text: "import not_there\n" + text)
    assert "cannot be built" in answers(lambda name, text: text.replace("class RQTransformer(", "class Other("))
    narrower = ("config.embed_dim", "config.embed_dim // 2")
    assert "has other shapes" in answers(lambda name, text: text.replace(*narrower))
    with pytest.raises(SystemExit):
        main(["--check", model, "--reference", str(tmp_path), "--vae", "x.pth"])
    assert "--vae goes with --check var only" in capsys.readouterr().err


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
