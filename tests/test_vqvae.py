"""VAR's tokenizer: published keys, outputs of the published code on the same small weights, pictures, loading."""

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from autoencoder_small import RQ, VQ, goldens, pictures, vqvae
from helpers import interpreter_skip
from torch import Tensor
from vilau_small import fingerprint

from unifiedar.checkpoints import CheckpointError
from unifiedar.models import RQVAE, VQVAE, RQVAEConfig, VQVAEConfig
from unifiedar.models.convolutional import Decoder, DecoderConfig
from unifiedar.nn import GroupNorm

HERE = Path(__file__).parent
PUBLISHED = VQVAE.configs["vae_ch160v4096z32"]


def test_published_keys_and_shapes():
    published = json.loads(gzip.decompress((HERE / "manifests" / "var-vae-ch160v4096z32.json.gz").read_bytes()))
    with torch.device("meta"):
        model = VQVAE(PUBLISHED)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert len(published) == 324
    assert sum(p.numel() for p in model.parameters()) == 108_948_355
    assert (model.V, model.vocab_size, model.Cvae, model.downsample) == (4096, 4096, 32, 16)


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
        exact = golden[f"vqvae.{name}"]
        assert got.shape == exact.shape
        if exact.dtype == torch.uint8:
            assert torch.equal(got, exact.long())
            return
        assert got.dtype == torch.float32
        error, allowed = (got.detach() - exact).abs().max().item(), 2 * metadata["errors"][f"vqvae.{name}"] + 1e-5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return compare


@pytest.fixture(scope="module")
def model() -> VQVAE:
    return vqvae()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return pictures("vqvae", 2, 48, 48)


@pytest.fixture(scope="module")
def codes(golden) -> list[Tensor]:
    return list(golden["vqvae.codes"].long().split([1, 4, 9], 1))


def test_same_weights(model, metadata):
    assert fingerprint(model.state_dict()) == metadata["fingerprints"]["vqvae"]


@torch.no_grad()
def test_pictures_to_codes(model, x, check):
    check("features", model.quant_conv(model.encoder(x)))
    check("codes", torch.cat(model.img_to_idxBl(x), 1))
    check("codes", torch.cat(model.encode_images(x), 1))
    check("other_codes", torch.cat(model.img_to_idxBl(x, (1, 3)), 1))
    check("inputs", model.quantize.idxBl_to_var_input(model.img_to_idxBl(x)))


@torch.no_grad()
def test_codes_to_pictures(model, x, codes, check):
    every = torch.stack(model.img_to_reconstructed_img(x))
    check("pictures", every[..., ::7, ::7])
    check("last", model.img_to_reconstructed_img(x, last_one=True)[:1, :, ::3, ::3])
    check("pictures", torch.stack(model.idxBl_to_img(codes, True))[..., ::7, ::7])
    check("last", model.idxBl_to_img(codes, True, last_one=True)[:1, :, ::3, ::3])
    maps = [model.quantize.embedding(one).mT.unflatten(2, (n, n)) for one, n in zip(codes, VQ.scales, strict=True)]
    check("pictures", torch.stack(model.embed_to_img(maps, True))[..., ::7, ::7])
    check("last", model.embed_to_img(maps, True, last_one=True)[:1, :, ::3, ::3])


@torch.no_grad()
def test_codes_to_pictures_of_their_own_size(model, codes, check):
    own = model.idxBl_to_img(codes, False)
    assert [one.shape[-1] for one in own] == [16, 32, 48]
    check("own0", own[0][..., ::5, ::5])
    check("own1", own[1][..., ::5, ::5])
    assert torch.equal(model.idxBl_to_img(codes, same_shape=False, last_one=True), own[2])


def test_training(x, check):
    model = vqvae().train()
    rec, usages, loss = model(x)
    assert usages is None
    check("forward", rec[:1, :, ::6, ::6])
    check("loss", loss.reshape(1))
    (rec.square().mean() + loss).backward()
    check("grad_embedding", model.quantize.embedding.weight.grad[::4])
    check("grad_conv_in", model.encoder.conv_in.weight.grad[::4])
    check("grad_qkv", model.decoder.mid.attn_1.qkv.weight.grad[::16, ::16, 0, 0])
    assert len(model(x, ret_usages=True)[1]) == len(VQ.scales)


# ---- pictures


def test_uint8_pictures(model, x):
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    codes = model.encode_images(images)
    assert [one.shape for one in codes] == [(2, 1), (2, 4), (2, 9)]
    expected = model.img_to_idxBl(images.float() / 127.5 - 1)
    assert all(torch.equal(one, other) for one, other in zip(codes, expected, strict=True))
    again, same = model.reconstruct(images)
    assert torch.equal(again, model.decode_codes(codes))
    assert all(torch.equal(one, other) for one, other in zip(codes, same, strict=True))
    assert again.dtype == torch.uint8
    exact = (model.fhat_to_img(model.quantize.embed(codes)) + 1) * 127.5
    assert (again.float() - exact).abs().max() <= 0.5 + 1e-4
    first = model.decode_codes(codes[:1])  # a prefix of the scales paints too
    assert first.shape == again.shape
    assert not torch.equal(first, again)


@torch.no_grad()
def test_pictures_that_are_not_square():
    model = vqvae(replace(VQ, scales=((1, 1), (2, 3), (3, 5))))
    x = pictures("wide", 1, 48, 80)
    codes = model.encode_images(x)
    assert [one.shape[1] for one in codes] == [1, 6, 15]
    last = model.img_to_reconstructed_img(x, last_one=True)
    assert last.shape == x.shape
    torch.testing.assert_close(model.idxBl_to_img(codes, True, last_one=True), last)
    assert [tuple(one.shape[2:]) for one in model.idxBl_to_img(codes, False)] == [(16, 16), (32, 48), (48, 80)]
    # Sides that are no multiples of 16 are halved rounding down.
    assert model.quant_conv(model.encoder(torch.cat([x, x], 2)[..., :79])).shape[2:] == (6, 4)


def test_no_picture(model):
    codes = model.encode_images(torch.zeros(0, 3, 48, 48, dtype=torch.uint8))
    assert [tuple(one.shape) for one in codes] == [(0, 1), (0, 4), (0, 9)]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m.encode_images(torch.zeros(1, 3, 48, 48, dtype=torch.int64)), TypeError, "images must be uint8"),
        (lambda m: m.encode_images([1]), TypeError, "got list"),
        (lambda m: m.encode_images(torch.zeros(3, 48, 48)), ValueError, r"images must be \(N, 3, H, W\)"),
        (lambda m: m.encode_images(torch.zeros(1, 1, 48, 48)), ValueError, r"images must be \(N, 3, H, W\)"),
        (lambda m: m.encode_images(torch.zeros(1, 3, 48, 50)), ValueError, "multiples of 16"),
        (lambda m: m.reconstruct(torch.zeros(1, 3, 64, 64)), ValueError, r"reconstruct.*\(N, 3, 48, 48\)"),
        (lambda m: m.img_to_idxBl(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)), TypeError, "floating point"),
        (lambda m: m.img_to_idxBl(torch.zeros(1, 3, 8, 48)), ValueError, "sides of at least 16"),
        (lambda m: m.img_to_idxBl(torch.zeros(1, 3, 64, 64)), ValueError, "multiscale_quantize: "),
        (lambda m: m.decode_codes([torch.zeros(1, 2, dtype=torch.int64)]), ValueError, r"codes\[0\]"),
        (lambda m: m.idxBl_to_img([torch.zeros(1, 2, dtype=torch.int64)], False), ValueError, r"ms_idx_Bl\[0\]"),
        (lambda m: m.idxBl_to_img([], False), ValueError, "1 to 3 tensors"),
        (lambda m: m.fast_decoder(torch.int8), TypeError, "floating point"),
    ],
)
def test_bad_input(model, call, error, text):
    with pytest.raises(error, match=text):
        call(model)


# ---- precision of the decoder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fast_decoder(x, codes, dtype):
    model = vqvae()
    exact = model.idxBl_to_img(codes, True, last_one=True)
    before = model.encode_images(x)
    assert model.fast_decoder(dtype) is model
    assert model.decoder.conv_out.weight.dtype == dtype
    assert model.decoder.mid.block_1.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    got = model.idxBl_to_img(codes, True, last_one=True)
    assert got.dtype == dtype
    error = (got.float() - exact).abs()
    assert error.mean() <= 4 * torch.finfo(dtype).eps, f"mean error {error.mean():.3g}"
    assert all(torch.equal(one, other) for one, other in zip(before, model.encode_images(x), strict=True))
    assert (model.reconstruct(x)[0].float() - (exact + 1) * 127.5).abs().mean() <= 0.25 + 510 * torch.finfo(dtype).eps


@torch.no_grad()
def test_fast_decoder_stays_channels_last(codes, monkeypatch):
    """Every norm can be Triton's, which takes nothing else."""
    if reason := interpreter_skip():
        pytest.skip(reason)
    model = vqvae(replace(VQ, network=DecoderConfig(32, (1, 2), 1, 8, 6, (3,), fused_qkv=True)))
    features = model.quantize.embed([one[:1] for one in codes])
    exact = model.fhat_to_img(features)
    model.fast_decoder(torch.float32)
    norms = [one for one in model.decoder.modules() if isinstance(one, GroupNorm)]
    seen = []
    for one in norms:
        one.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    of_sum = GroupNorm.of_sum

    def watched(norm, summands):
        outputs = of_sum(norm, summands)
        seen.append((summands.x, *outputs))
        return outputs

    monkeypatch.setattr(GroupNorm, "of_sum", watched)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    got = model.fhat_to_img(features)
    assert len(seen) == len(norms) == 2 * 6 + 3 + 1
    assert all(x.is_contiguous(memory_format=torch.channels_last) for maps in seen for x in maps)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


WIDE = DecoderConfig(32, (1, 9), 1, 6, 8, (4,), fused_qkv=True)  # attention of more channels than flash kernels take


@pytest.mark.parametrize("network", [VQ.network, RQ.network, WIDE], ids=["VAR", "RQ-VAE", "wide attention"])
def test_fused_decoder_is_the_plain_one(network):
    """In float64, where nothing but a mistake tells them apart; with random biases, a batch, and sides that differ."""
    torch.manual_seed(0)
    plain = Decoder(network).double().eval()
    for one in plain.parameters():
        one.data.uniform_(-0.1, 0.1)
    fused = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    z = torch.randn(2, network.z_channels, 3, 4, dtype=torch.float64)
    expected = plain(z)
    with_gradients = fused(z)
    assert with_gradients.requires_grad
    torch.testing.assert_close(with_gradients, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = fused(z)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-9, atol=1e-9)
    counts = {event.key: event.count for event in profile.key_averages()}
    upsamplings = len(network.ch_mult) - 1
    assert counts["unifiedar::phase_weights"] == counts["unifiedar::add_maps"] == upsamplings
    assert "aten::upsample_nearest2d" not in counts
    assert ("aten::baddbmm" in counts) == (network is WIDE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused.float()(z.float()).dtype == torch.bfloat16  # autocast's own rules


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("backend", ["triton", "eager", "auto"])
def test_fast_decoder_on_a_gpu(x, codes, backend, monkeypatch):
    exact = vqvae().double()
    exact = exact.fhat_to_img(exact.quantize.embed(codes))
    model = vqvae().to("cuda").fast_decoder()
    features = model.quantize.embed([one.cuda() for one in codes])
    monkeypatch.setenv("UNIFIEDAR_BACKEND", backend)
    got = model.fhat_to_img(features).cpu().double()
    assert (got - exact).abs().mean() <= 4 * torch.finfo(torch.float16).eps
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = vqvae().to("cuda").fast_decoder(torch.float32)
    got = model.fhat_to_img(features).cpu().double()
    assert (got - exact).abs().max() <= 1 / 127.5  # a grey level


@pytest.mark.gpu
@torch.no_grad()
def test_published_decoder_on_a_gpu(monkeypatch):
    """At full size: no further from float32 than the published order of operations in float16, twice at most."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = VQVAE(PUBLISHED).eval()
        features = torch.randn(2, 32, 16, 16)
    exact = model.decoder(model.post_quant_conv(features))
    half = copy.deepcopy(model).half()
    plain = half.decoder(half.post_quant_conv(features.half()))
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    fast = model.fast_decoder()._paint(features)
    error, allowed = ((one.float() - exact).abs() for one in (fast, plain))
    assert error.max() <= 2 * allowed.max() + 1e-5
    assert error.mean() <= 1.25 * allowed.mean() + 1e-5


# ---- loading


def test_published_file(tmp_path, monkeypatch, model, x):
    """A bare .pth, recognised by its keys and shapes."""
    monkeypatch.setattr(VQVAE, "configs", {"other": replace(VQ, num_codes=95), "small": VQ})
    path = tmp_path / "vae.pth"
    torch.save(model.state_dict(), path)
    again = VQVAE.from_checkpoint(path)
    assert again.config == VQ
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert all(
        torch.equal(one, other) for one, other in zip(again.encode_images(x), model.encode_images(x), strict=True)
    )
    (tmp_path / "config.json").write_text('{"model": "vilau"}')  # somebody else's beside it
    assert VQVAE.from_checkpoint(path).config == VQ


def test_published_file_with_other_scales(tmp_path, model):
    """Counts of ten scales give way, here to those of two; counters start at zero."""
    path = tmp_path / "vae.pth"
    torch.save(model.state_dict(), path)
    again = VQVAE.from_checkpoint(path, config=replace(VQ, scales=(2, 4)))
    assert again.quantize.ema_vocab_hit_SV.shape == (2, 96)
    assert not again.quantize.ema_vocab_hit_SV.any()
    assert [one.shape[1] for one in again.encode_images(torch.zeros(1, 3, 64, 64))] == [4, 16]


def test_save_and_load(tmp_path):
    config = replace(VQ, scales=((1, 1), (2, 3)), convolutions=2, metric="cosine")
    model = vqvae(config)
    folder = model.save(tmp_path / "small")
    again = VQVAE.from_checkpoint(folder)
    assert again.config == config
    assert fingerprint(again.state_dict()) == fingerprint(model.state_dict())
    assert VQVAEConfig.from_dict(json.loads(json.dumps(PUBLISHED.to_dict()))) == PUBLISHED


def test_dtypes_at_loading(tmp_path, model):
    folder = model.save(tmp_path / "small")
    half = VQVAE.from_checkpoint(folder, "cpu", torch.bfloat16)
    assert half.dtype == half.decoder.conv_in.weight.dtype == torch.bfloat16
    assert half.quantize.embedding.weight.dtype == torch.float32
    mixed = VQVAE.from_checkpoint(folder, decoder_dtype=torch.float16)
    assert mixed.dtype == torch.float32
    assert mixed.post_quant_conv.weight.dtype == mixed.decoder.conv_in.weight.dtype == torch.float16
    assert mixed.reconstruct(torch.zeros(1, 3, 48, 48))[0].shape == (1, 3, 48, 48)


def test_what_does_not_load(tmp_path, model):
    state = dict(model.state_dict())
    path = tmp_path / "vae.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"keys and shapes of a published VQVAE \(vae_ch160v4096z32, emoji\)"):
        VQVAE.from_checkpoint(path)
    with pytest.raises(CheckpointError, match="do not fit"):
        VQVAE.from_checkpoint(path, config=replace(VQ, num_codes=95))
    folder = model.save(tmp_path / "small")
    with pytest.raises(CheckpointError, match="must describe a 'rqvae'"):
        RQVAE.from_checkpoint(folder)
    (folder / "config.json").write_text('{"model": "vqvae", "network": {}, "num_codes": 3}')
    with pytest.raises(CheckpointError, match="does not describe a 'vqvae'"):
        VQVAE.from_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"does not describe a 'rqvae'.*loss must be"):
        RQVAEConfig.from_dict({**RQVAE.configs["ffhq"].to_dict(), "loss": "l2"})
    del state["quantize.embedding.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"do not fit.*embedding"):
        VQVAE.from_checkpoint(path, config=VQ)


def test_built_on_meta_and_strict():
    with torch.device("meta"):
        model = VQVAE(VQ)
    state = vqvae().state_dict()
    model.load_state_dict(state, strict=True, assign=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "more": torch.zeros(1)}, strict=True)


# ---- the decoder against its formula written out


@torch.no_grad()
def test_decoder_by_hand():
    """One level without attention outside the middle, from the paper's description, key by key."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(32, (1,), 1, 4, 8, (), fused_qkv=True)).double()
    p = dict(decoder.named_parameters())

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=padding)

    def norm(x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        spread = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        unit = ((groups - mean) / (spread + 1e-6).sqrt()).flatten(1, 2)
        return unit * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def block(x: Tensor, name: str) -> Tensor:
        h = norm(x, f"{name}.norm1")
        h = conv(h * torch.sigmoid(h), f"{name}.conv1")
        h = norm(h, f"{name}.norm2")
        return x + conv(h * torch.sigmoid(h), f"{name}.conv2")

    z = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    x = block(conv(z, "conv_in"), "mid.block_1")
    q, k, v = conv(norm(x, "mid.attn_1.norm"), "mid.attn_1.qkv", 0).flatten(2).split(32, 1)
    attended = v @ ((q.mT @ k) / 32**0.5).softmax(-1).mT
    x = x + conv(attended.unflatten(2, (5, 3)), "mid.attn_1.proj_out", 0)
    x = block(block(block(x, "mid.block_2"), "up.0.block.0"), "up.0.block.1")
    x = norm(x, "norm_out")
    torch.testing.assert_close(decoder(z), conv(x * torch.sigmoid(x), "conv_out"))
