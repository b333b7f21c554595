"""VILA-U against outputs of its published implementation on the same small weights; goldens/README.md says how made."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from vilau_small import SEPARATE, SHARED, exponential, fingerprint, integers, uniform, weight, weights

from unifiedar.models import VILAU
from unifiedar.models.vilau import BOS, EOS, IM_END, IM_START
from unifiedar.nn import ResidualQuantizer

GOLDENS = Path(__file__).parent / "goldens" / "vilau-small.safetensors"
CONFIGS = {"shared": SHARED, "separate": SEPARATE}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDENS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


@pytest.fixture(scope="module")
def metadata() -> dict[str, dict]:
    with safe_open(GOLDENS, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


@pytest.fixture(scope="module")
def models() -> dict[str, VILAU]:
    made = {}
    for name, config in CONFIGS.items():
        made[name] = VILAU(config).eval()
        made[name].load_state_dict(weights(made[name].state_dict(), config.shared_codebook), strict=True)
    return made


@pytest.fixture
def check(golden, metadata):
    """A float32 result must err at most twice as much as the published code in float32, plus 1e-5."""

    def compare(name: str, got: Tensor) -> None:
        exact = golden[name].double()
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        error, allowed = (got.detach().double() - exact).abs().max().item(), 2 * metadata["errors"][name] + 1e-5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return compare


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(models, name) -> VILAU:
    return models[name]


def images(name: str) -> Tensor:
    size = CONFIGS[name].vision.image_size
    return uniform(f"{name}.images", 2, 3, size, size)


def test_same_keys_and_weights(model, name, metadata):
    assert fingerprint(model.state_dict()) == metadata["fingerprints"][name]


@torch.no_grad()
def test_siglip(model, name, check):
    siglip, config = model.tower.siglip_model, model.config.vision
    features = siglip.features(images(name))
    check(f"{name}.features", features)
    check(f"{name}.pooled", siglip.pool(features))
    text = integers(f"{name}.text", config.vocab_size, 3, config.text_positions)
    check(f"{name}.text", siglip.embed_text(text))


@torch.no_grad()
def test_encode(model, name, check, golden):
    features, codes, commitment = model.tower.encode(images(name))
    assert torch.equal(codes, golden[f"{name}.codes"].long())
    check(f"{name}.quantized", features)
    check(f"{name}.commitment", commitment[None])


def forced(name: str) -> Tensor:
    config = CONFIGS[name]
    return integers(f"{name}.forced", config.num_codes, 2, config.vision.grid**2, config.depth)


@torch.no_grad()
def test_embed_and_decode(model, name, check):
    quantizer, codes = model.tower.quantizer, forced(name)
    check(f"{name}.sums", quantizer.embed(codes, cumulative=True)[:, :6])
    check(f"{name}.picture", model.tower.decode(quantizer.embed(codes)))


@torch.no_grad()
def test_projector(model, name, check):
    check(f"{name}.projected", model.mm_projector(uniform(f"{name}.projector", 5, model.config.vision.hidden_size)))


@torch.no_grad()
def test_teacher_forced_depth_logits(model, name, check):
    codes = forced(name)
    body = uniform(f"{name}.body", *codes.shape[:2], model.config.language.hidden_size) * 2
    sums = model.tower.quantizer.embed(codes, cumulative=True)
    logits = model.depth_transformer(body.flatten(0, 1), sums.flatten(0, 1)).unflatten(0, codes.shape[:2])
    check(f"{name}.depth_logits", logits[:, :3])


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_depth_decoding(model, name, kind, check, golden):
    """Guidance 3, top-k 900, top-p 0.96, which the published code fixes, with noise of ours in its multinomial."""
    config = model.config
    hidden = uniform(f"{name}.{kind}.hidden", 6, 1, config.language.hidden_size)[:, 0] * 2
    codes, total, *_ = model.depth_transformer.decode(
        hidden,
        model.tower.quantizer.table,
        guidance=3.0,
        temperature=float(kind == "sampled"),
        top_k=900,
        top_p=0.96,
        noise=exponential(f"{name}.noise", 3, config.depth, config.num_codes),
    )
    assert torch.equal(codes, golden[f"{name}.{kind}"].long())
    check(f"{name}.{kind}.total", total)


@torch.no_grad()
def test_language_model(models, check):
    """Three rows, two of them padded at the left, with positions divided by two."""
    llm = models["shared"].llm
    hidden = llm(uniform("llama.inputs", 3, 20, 48), pad=torch.tensor([0, 4, 1]))[:, 4:]
    check("llama.hidden", hidden)
    check("llama.logits", llm.lm_head(hidden))


def words(name: str, count: int) -> list[int]:
    return (3 + integers(f"words.{name}", SHARED.language.vocab_size - 8, count)).tolist()


@torch.no_grad()
def test_hidden_states_and_losses(models, check):
    """A text before a picture and a picture before a text: which state predicts what, and the sum of both losses."""
    model = models["shared"]
    start, end, length = model.special(IM_START), model.special(IM_END), model.image_tokens
    rows = [
        [BOS, *words("draw", 5), start, *[0] * length, end, EOS],
        [BOS, start, *[0] * length, end, *words("tell", 4), EOS],
    ]
    ids = torch.zeros(2, len(rows[0]), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    begin = torch.tensor([7, 2])
    features, codes, _ = model.tower.encode(images("shared"))
    hidden = model(ids, features, begin)
    valid = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    check("losses.hidden", hidden * valid[..., None])

    logits = model.llm.lm_head(hidden)
    # The start token and all that follows it in the first row, the text and its end in the second.
    asked = [(0, 6), (0, 7 + length), (0, 8 + length), *((1, 3 + length + i) for i in range(5))]
    at, targets = torch.tensor(asked).T, torch.stack([ids[i, j] for i, j in asked])
    text_loss = F.cross_entropy(logits[at[0], at[1] - 1], targets)
    image_loss = F.cross_entropy(model.depth_logits(hidden[:1], begin[:1], codes[:1]).flatten(0, 2), codes[0].flatten())
    check("losses.total", (text_loss + image_loss)[None])


@torch.no_grad()
def test_drawing(models, golden, check, monkeypatch):
    """The whole loop, greedy: prompts of different lengths, guidance against the empty prompt, codes to a picture."""
    model = models["shared"]
    prompts = {"a": words("a", 4), "b": words("b", 7)}
    monkeypatch.setattr(model, "prompt_ids", prompts.__getitem__)
    codes = model.generate_codes(["a", "b"], guidance=3.0, temperature=0)
    assert torch.equal(codes, golden["drawn.codes"].long())
    picture = model.tower.decode(model.tower.quantizer.embed(codes))
    check("drawn.picture", picture.clamp(-1, 1))
    assert (model.decode_codes(codes) / 127.5 - 1 - golden["drawn.picture"]).abs().max() <= 0.501 / 127.5


def test_training_step_of_the_quantizer(check, golden):
    """The moving averages after one step, one table a depth, no dead codes."""
    quantizer = ResidualQuantizer(16, 8, 3, shared=False)
    state = {key: weight(f"ema.{key}", tuple(value.shape), False) for key, value in quantizer.state_dict().items()}
    quantizer.load_state_dict(state)
    features, codes, commitment = quantizer.train()(uniform("ema.inputs", 2, 4, 4, 8) * 3)
    assert torch.equal(codes.flatten(1, 2), golden["ema.codes"].long())
    check("ema.quantized", features.flatten(1, 2))
    check("ema.commitment", commitment[None])
    for key, value in quantizer.state_dict().items():
        check(f"ema.state.{key}", value)
        assert not torch.equal(value, state[key])
