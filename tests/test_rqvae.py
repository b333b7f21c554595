"""RQ-VAE: published keys, outputs of the published code on the same small weights, training, pictures, loading."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoencoder_small import RQ, goldens, pictures, rqvae
from torch import Tensor
from vilau_small import fingerprint

from unifiedar.checkpoints import CheckpointError
from unifiedar.models import RQVAE, RQVAEConfig

HERE = Path(__file__).parent
CONFIGS = {"rqvae": RQ, "rqvae-separate": replace(RQ, shared_codebook=False)}


@pytest.mark.parametrize(
    ("name", "manifest", "parameters"),
    [("imagenet", "imagenet", 104_402_051), ("lsun", "imagenet", 104_402_051), ("ffhq", "ffhq", 100_732_035)],
)
def test_published_keys_and_shapes(name, manifest, parameters):
    published = json.loads(gzip.decompress((HERE / "manifests" / f"rqvae-{manifest}.json.gz").read_bytes()))
    with torch.device("meta"):
        model = RQVAE(RQVAE.configs[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert len(published) == 398
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- what the published code computes (goldens/README.md)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return goldens()[0]


@pytest.fixture(scope="module")
def metadata() -> dict[str, dict]:
    return goldens()[1]


@pytest.fixture
def check(golden, metadata):
    """A float32 result must err at most twice as much as the published code in float32, plus 1e-5."""

    def compare(name: str, got: Tensor) -> None:
        exact = golden[name]
        assert got.shape == exact.shape
        if exact.dtype == torch.uint8:
            assert torch.equal(got, exact.long())
            return
        assert got.dtype == torch.float32
        error, allowed = (got.detach() - exact).abs().max().item(), 2 * metadata["errors"][name] + 1e-5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return compare


@pytest.fixture(scope="module")
def model() -> RQVAE:
    return rqvae()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return pictures("rqvae", 2, 16, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_weights(name, metadata):
    assert fingerprint(rqvae(CONFIGS[name]).state_dict()) == metadata["fingerprints"][name]


@torch.no_grad()
def test_forward(model, x, check):
    check("rqvae.features", model.encode(x)[..., ::6])
    rec, loss, codes = model(x)
    check("rqvae.codes", codes)
    check("rqvae.pictures", rec[:, :, ::2, ::2])
    check("rqvae.loss", loss.reshape(1))
    losses = model.compute_loss(rec, loss, codes, xs=x)
    check("rqvae.total", losses["loss_total"].reshape(1))
    assert losses["codes"] == [codes]
    check("rqvae.valid", model.compute_loss(rec, loss, codes, xs=x, valid=True)["loss_total"].reshape(1))
    real, recon = model.get_recon_imgs(x, 3 * rec)
    assert torch.equal(real, (x + 1) / 2)
    assert (recon.min(), recon.max()) == (0, 1)


def test_codes(model, x, check):
    codes = model.get_codes(x)
    check("rqvae.codes", codes)
    assert torch.equal(model.encode_images(x), codes)
    soft, again = model.get_soft_codes(x, temp=0.7)
    check("rqvae.soft", soft[:, ::4, ::4, :, ::5])
    assert torch.equal(again, codes)
    assert model.get_soft_codes(x, stochastic=True)[1].shape == codes.shape
    check("rqvae.decoded", model.decode_code(codes)[:1, :, ::2, ::2])
    check("rqvae.add", model.decode_partial_code(codes, 1, "add")[:1, :, ::3, ::3])
    check("rqvae.select", model.forward_partial_code(x, 2, "select")[:1, :, ::3, ::3])
    rows, nothing = model.get_code_emb_with_depth(codes)
    assert nothing is None
    torch.testing.assert_close(model.decode(rows.sum(-2)), model.decode_code(codes))


@torch.no_grad()
def test_one_codebook_a_depth(x, check):
    model = rqvae(CONFIGS["rqvae-separate"])
    _, loss, codes = model(x)
    check("rqvae-separate.codes", codes)
    check("rqvae-separate.loss", loss.reshape(1))
    check("rqvae-separate.add", model.decode_partial_code(codes, 1, "add")[:1, :, ::3, ::3])
    model.train()(x)
    check("rqvae-separate.table", model.quantizer.codebooks[1].weight[::6])


def test_training(x, check):
    """The shared table moves after every depth, as published: the codes of later depths are of the moved one."""
    model = rqvae().train()
    rec, loss, codes = model(x)
    check("rqvae.train_codes", codes)
    check("rqvae.train_loss", loss.reshape(1))
    check("rqvae.train_pictures", rec[:1, :, ::3, ::3])
    model.compute_loss(rec, loss, codes, xs=x)["loss_total"].backward()
    check("rqvae.grad_conv_in", model.encoder.conv_in.weight.grad[::4])
    check("rqvae.table", model.quantizer.codebooks[1].weight[::6])
    assert model.get_last_layer() is model.decoder.conv_out.weight
    before = model.quantizer.table.clone()
    model.encode_images(x)  # looks, and moves nothing
    assert torch.equal(model.quantizer.table, before)
    model.get_codes(x)
    assert not torch.equal(model.quantizer.table, before)


def test_loss_of_absolute_values(x):
    model = rqvae(replace(RQ, loss="l1"))
    losses = model.compute_loss(x + 0.5, torch.tensor(2.0), torch.zeros(1), xs=x)
    assert losses["loss_recon"].item() == pytest.approx(0.5)
    assert losses["loss_total"].item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="loss must be"):
        replace(RQ, loss="l2")


# ---- pictures


def test_uint8_pictures(model, x):
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    again, codes = model.reconstruct(images)
    assert codes.shape == (2, 8, 8, 3)
    assert torch.equal(codes, model.get_codes(images.float() / 127.5 - 1))
    assert torch.equal(again, model.decode_codes(codes))
    exact = ((model.decode_code(codes) + 1) * 127.5).clamp(0, 255)
    assert again.dtype == torch.uint8
    assert (again.float() - exact).abs().max() <= 0.5 + 1e-4


def test_other_sizes(model):
    x = pictures("rqvae.wide", 1, 12, 20)
    again, codes = model.reconstruct(x)
    assert codes.shape == (1, 6, 10, 3)
    assert again.shape == x.shape
    assert model.encode_images(x[:0]).shape == (0, 6, 10, 3)
    assert model.encode(x[..., :19]).shape == (1, 6, 9, 24)  # halved rounding down


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m.encode_images(torch.zeros(1, 3, 16, 16, dtype=torch.bool)), TypeError, "images must be uint8"),
        (lambda m: m.encode_images(torch.zeros(1, 3, 16, 15)), ValueError, "multiples of 2"),
        (lambda m: m.get_codes(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), TypeError, "floating point"),
        (lambda m: m.encode(torch.zeros(1, 4, 16, 16)), ValueError, r"\(B, 3, H, W\)"),
        (lambda m: m.decode(torch.zeros(1, 24, 8, 8)), ValueError, r"z_q must be \(B, h, w, 24\)"),
        (lambda m: m.decode_code(torch.zeros(1, 8, 8, 2, dtype=torch.int64)), ValueError, r"\(B, h, w, 3\)"),
        (lambda m: m.decode_codes(torch.zeros(1, 64, 3, dtype=torch.int64)), ValueError, r"\(B, h, w, 3\)"),
        (lambda m: m.decode_partial_code(torch.zeros(1, 8, 8, 3, dtype=torch.int64), 3), ValueError, "code_idx"),
        (lambda m: m.decode_codes(torch.full((1, 8, 8, 3), 51)), ValueError, "51"),
    ],
)
def test_bad_input(model, call, error, text):
    with pytest.raises(error, match=text):
        call(model)


@torch.no_grad()
def test_fast_decoder(model, x):
    fast = rqvae().fast_decoder(torch.bfloat16)
    codes = model.get_codes(x)
    assert torch.equal(fast.get_codes(x), codes)
    got = fast.decode_code(codes)
    assert got.dtype == torch.bfloat16
    assert (got.float() - model.decode_code(codes)).abs().mean() <= 4 * torch.finfo(torch.bfloat16).eps


# ---- loading


def test_published_file(tmp_path, monkeypatch, model, x):
    """The published layout: the state under "state_dict", the codebook written once for every depth."""
    monkeypatch.setattr(RQVAE, "configs", {"more codes": replace(RQ, num_codes=51), "small": RQ})
    path = tmp_path / "model.pt"
    copies = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"epoch": 10, "state_dict": copies}, path)
    again = RQVAE.from_checkpoint(path)
    assert again.config == RQ
    assert not again.training
    assert again.quantizer.codebooks[0] is again.quantizer.codebooks[2]
    assert torch.equal(again.encode_images(x), model.encode_images(x))
    copies["quantizer.codebooks.2.weight"][3] += 1
    torch.save({"state_dict": copies}, path)
    with pytest.raises(CheckpointError, match="tables differ"):
        RQVAE.from_checkpoint(path)


def test_attention_tells_configurations_apart(tmp_path, monkeypatch, model):
    """The small one's attention is at the deepest level; one with it elsewhere has other keys."""
    other = replace(RQ, network=replace(RQ.network, attn_resolutions=(16,)))
    monkeypatch.setattr(RQVAE, "configs", {"other": other})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"published RQVAE \(other\)"):
        RQVAE.from_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_save_and_load(tmp_path, config):
    model = rqvae(config)
    again = RQVAE.from_checkpoint(model.save(tmp_path / "small"))
    assert again.config == config
    assert fingerprint(again.state_dict()) == fingerprint(model.state_dict())
    assert RQVAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
