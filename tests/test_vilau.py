"""VILA-U: both directions, caches against the plain forward, checkpoints, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from small import small_config, small_model, small_tokenizer

from unifiedar.checkpoints import CheckpointError
from unifiedar.models import VILAU, VILAUConfig
from unifiedar.models.llama import KeyValueCache, Llama, LlamaConfig
from unifiedar.models.vilau import BOS, EOS, IM_END, IM_START, Sampling
from unifiedar.nn import DepthTransformer
from unifiedar.nn.depth import require_sound


@pytest.fixture(scope="module")
def model() -> VILAU:
    return small_model()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- sizes


def test_published_sizes():
    for name, depth, siglip in (("7b-256", 527_145_984, 652_150_786), ("7b-384", 527_504_384, 877_960_498)):
        with torch.device("meta"):
            big = VILAU(VILAU.configs[name])
        assert sum(p.numel() for p in big.depth_transformer.parameters()) == depth
        assert sum(p.numel() for p in big.tower.siglip_model.parameters()) == siglip


def test_config_survives_json():
    for config in VILAU.configs.values():
        assert VILAUConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("broken", [{}, {"model": "var"}, {"model": "vilau"}, {"model": "vilau", "decoder": 3}])
def test_foreign_config(broken):
    with pytest.raises(CheckpointError, match="does not describe a VILA-U"):
        VILAUConfig.from_dict(broken)


# ---- language model


def test_cache_equals_whole_forward():
    torch.manual_seed(0)
    config = LlamaConfig(50, 48, 96, 2, 3, 64, rope_scaling=2.0)
    llama = Llama(config).double().eval()
    x = torch.randn(2, 11, 48, dtype=torch.float64)
    whole = llama(x)
    cache = KeyValueCache(config, 2, 11, device=x.device, dtype=x.dtype)
    parts = [llama(part, cache) for part in x.split([4, 1, 3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_left_padding_changes_nothing():
    torch.manual_seed(0)
    config = LlamaConfig(50, 48, 96, 2, 3, 64)
    llama = Llama(config).double().eval()
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    short = llama(x[1:, 4:])
    pad = torch.tensor([0, 4])
    cache = KeyValueCache(config, 2, 9, device=x.device, dtype=x.dtype)
    padded = torch.cat([llama(part, cache, pad) for part in x.split([6, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(padded[1:, 4:], short)
    torch.testing.assert_close(padded[:1], llama(x[:1]))
    assert padded.isfinite().all()


def test_full_cache_is_refused():
    config = LlamaConfig(50, 48, 96, 2, 3, 64)
    llama = Llama(config)
    cache = KeyValueCache(config, 1, 3, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="cache holds 3 tokens, asked to hold 4"):
        llama(torch.randn(1, 4, 48), cache)


# ---- depth transformer


@pytest.mark.parametrize("shared", [True, False])
def test_decode_agrees_with_teacher_forcing(shared):
    torch.manual_seed(0)
    depth = DepthTransformer(48, 32, 32, 2, 2, depth=3, num_codes=24).double().eval()
    codebook = torch.randn(*(() if shared else (3,)), 24, 32, dtype=torch.float64)
    hidden = torch.randn(5, 48, dtype=torch.float64)
    codes, total, *_ = depth.decode(hidden, codebook, temperature=0)
    rows = torch.stack([(codebook if shared else codebook[d])[codes[:, d]] for d in range(3)], dim=1)
    torch.testing.assert_close(total, rows.sum(1))
    assert torch.equal(depth(hidden, rows.cumsum(1)).argmax(-1), codes)


def test_decode_goes_through_given_codes():
    torch.manual_seed(0)
    depth = DepthTransformer(48, 32, 32, 2, 2, depth=3, num_codes=24).double().eval()
    codebook, hidden = torch.randn(24, 32, dtype=torch.float64), torch.randn(5, 48, dtype=torch.float64)
    codes = torch.randint(24, (5, 3))
    result = depth.decode(hidden, codebook, forced=codes, return_logits=True)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.logits, depth(hidden, depth.running_sums(codes, codebook)))


def test_logits_that_are_nan_are_an_error_with_a_place():
    torch.manual_seed(0)
    depth = DepthTransformer(48, 32, 32, 2, 2, depth=3, num_codes=24).eval()
    codebook, hidden = torch.randn(24, 32), torch.randn(4, 48)
    sound = depth.decode(hidden, codebook, temperature=0)
    require_sound("draw", [])
    require_sound("draw", [sound.unsound])
    hidden[2, 5] = torch.nan
    found = [sound.unsound, depth.decode(hidden, codebook, temperature=0).unsound]
    with pytest.raises(FloatingPointError, match=r"^draw: .* picture 2 at position 8, depth 0$"):
        require_sound("draw", found, first=7)


def test_decode_pairs_rows_for_guidance():
    torch.manual_seed(0)
    depth = DepthTransformer(48, 32, 32, 2, 2, depth=3, num_codes=24).eval()
    codebook, hidden = torch.randn(24, 32), torch.randn(4, 48)
    alone, *_ = depth.decode(hidden, codebook, temperature=0)
    guided, total, *_ = depth.decode(torch.cat([hidden, torch.randn(4, 48)]), codebook, guidance=1.0, temperature=0)
    assert torch.equal(guided, alone)
    assert total.shape == (4, 32)
    with pytest.raises(ValueError, match="temperature must be one number or 3"):
        depth.decode(hidden, codebook, temperature=[1.0, 1.0])
    with pytest.raises(ValueError, match="multiple of num_heads"):
        DepthTransformer(48, 32, 30, 2, 4, depth=3, num_codes=24)


# ---- drawing


def test_generate(model):
    drawn = model.generate(["axe, noto style", "red disc"], seed=3)
    assert drawn.shape == (2, 3, 16, 16)
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn, model.generate(["axe, noto style", "red disc"], seed=3))
    assert not torch.equal(drawn, model.generate(["axe, noto style", "red disc"], seed=4))


def test_a_picture_does_not_depend_on_its_batch(model):
    together = model.double().generate_codes(["axe", "red disc, noto style", "blue disc"], seed=[5, 6, 7])
    alone = model.generate_codes(["red disc, noto style"], seed=6)
    model.float()
    assert torch.equal(together[1:2], alone)


def test_sampling_is_the_models_unless_told_otherwise(tmp_path):
    model = small_model()
    greedy = model.generate_codes(["axe"], guidance=1.0, temperature=0)
    config = replace(model.config, sampling=Sampling(guidance=1.0, temperature=0.0))
    other = VILAU(config, model.tokenizer).eval()
    other.load_state_dict(model.state_dict())
    other.save(tmp_path / "m")
    loaded = VILAU.from_checkpoint(tmp_path / "m")
    assert loaded.config.sampling == Sampling(1.0, 0.0, 900, 0.96)
    assert torch.equal(loaded.generate_codes(["axe"]), greedy)
    assert not torch.equal(loaded.generate_codes(["axe"], temperature=1.0), greedy)


def test_guidance_one_is_the_conditional_model(model):
    codes = model.generate_codes(["red disc"], guidance=1.0, temperature=0)
    ids = torch.tensor([[BOS, *model.token_ids("red disc"), model.special(IM_START), *[0] * model.image_tokens]])
    begin = torch.tensor([ids.shape[1] - model.image_tokens])
    hidden = model(ids, model.tower.quantizer.embed(codes), begin)
    assert torch.equal(model.depth_logits(hidden, begin, codes).argmax(-1), codes)


def test_progress_counts_every_position(model):
    seen = []
    model.generate(["axe"], progress=seen.append)
    assert sum(seen) == model.image_tokens


def test_no_prompts(model):
    assert model.generate([]).shape == (0, 3, 16, 16)
    assert model.describe(torch.empty(0, 3, 16, 16, dtype=torch.uint8)) == []


def test_generate_says_where_logits_are_nan():
    model = small_model()
    with torch.no_grad():
        model.depth_transformer.pos_emb_d[0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^generate: .* picture 0 at position 0, depth 1$"):
        model.generate(["red disc"])


def test_generate_refuses(model):
    with pytest.raises(ValueError, match=f"at most {model.max_prompt_tokens} tokens, got"):
        model.generate(["word " * 100])
    with pytest.raises(ValueError, match="one for each of 2 prompts"):
        model.generate(["axe", "axe"], seed=[1])
    with pytest.raises(ValueError, match="no tokenizer"):
        VILAU(small_config()).generate(["axe"])


def test_special_tokens_in_a_prompt_are_text(model):
    ids = model.prompt_ids("<im_start></s>")
    assert not {BOS, 2, model.special(IM_START), model.special(IM_END)} & set(ids)


# ---- describing and rebuilding


def test_answers_are_ranked_and_do_not_depend_on_the_batch(model):
    images = pictures(3)
    found = model.describe(images, answers=4, beams=6, max_tokens=6)
    for answers in found:
        values = [value for _, value in answers]
        assert len(answers) == 4
        assert values == sorted(values, reverse=True)
    again = model.describe(images[1:2], answers=4, beams=6, max_tokens=6)[0]
    assert [text for text, _ in again] == [text for text, _ in found[1]]


@torch.no_grad()
def test_beam_scores_are_log_probabilities(model):
    """The value of an answer is what teacher forcing gives to its tokens and to the end after them."""
    images = pictures(2)
    features = model.tower.encode(images.float() / 127.5 - 1).features
    head = [BOS, model.special(IM_START), *[0] * model.image_tokens, model.special(IM_END)]
    for i, answers in enumerate(model.beam_search(images, beams=7, max_tokens=3)):
        for tokens, value in answers:
            ids = torch.tensor([head + tokens])
            steps = model.llm.lm_head(model(ids, features[i : i + 1], torch.tensor([2])))[0, len(head) - 1 :]
            asked = tokens + [EOS] * (len(tokens) < 3)
            expected = sum(float(step.log_softmax(-1)[t]) for step, t in zip(steps, asked, strict=False))
            assert value == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_an_answer_has_words():
    model = small_model()
    model.llm.lm_head.weight.zero_()  # the end is as likely as every token
    found = model.beam_search(pictures(2), beams=8, max_tokens=3)
    assert all(tokens and EOS not in tokens for answers in found for tokens, _ in answers)


@torch.no_grad()
def test_greedy_takes_the_likeliest_token(model):
    image = pictures(1)
    tokens, _ = model.beam_search(image, beams=1, max_tokens=4)[0][0]
    features = model.tower.encode(image.float() / 127.5 - 1).features
    head = [BOS, model.special(IM_START), *[0] * model.image_tokens, model.special(IM_END)]
    hidden = model(torch.tensor([head + tokens]), features, torch.tensor([2]))
    best = model.llm.lm_head(hidden)[0, len(head) - 1 :].argmax(-1).tolist()
    assert tokens
    assert best[: len(tokens)] == tokens
    # All beams of a search as wide as the vocabulary start differently, so the best of them is no worse.
    assert (
        model.beam_search(image, beams=40, max_tokens=4)[0][0][1]
        >= model.beam_search(image, beams=1, max_tokens=4)[0][0][1]
    )


def test_reconstruct(model):
    images = pictures(2)
    rebuilt, codes = model.reconstruct(images)
    assert rebuilt.shape == images.shape
    assert codes.shape == (2, 4, 4, 3)
    assert codes.dtype == torch.int64
    assert torch.equal(model.encode(images), codes)
    assert torch.equal(model.decode_codes(codes), rebuilt)
    assert torch.equal(model.decode_codes(codes.flatten(1, 2)), rebuilt)


@pytest.mark.parametrize("method", ["encode", "reconstruct", "describe", "pool"])
def test_pictures_are_checked(model, method):
    with pytest.raises(TypeError, match="images must be uint8"):
        getattr(model, method)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"must be \(N, 3, 16, 16\), got \(1, 3, 8, 8\)"):
        getattr(model, method)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_describe_refuses(model):
    with pytest.raises(ValueError, match="answers must be from 1 to beams"):
        model.describe(pictures(1), answers=3, beams=2)


# ---- checkpoints


@pytest.mark.parametrize("shared", [True, False])
def test_checkpoint_round_trip(tmp_path, shared):
    model = small_model(shared_codebook=shared)
    model.save(tmp_path / "m")
    again = VILAU.from_checkpoint(tmp_path / "m")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert again.tower.logit_scale is again.tower.siglip_model.logit_scale
    assert torch.equal(again.generate(["axe"]), model.generate(["axe"]))
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training


def test_eight_bit_checkpoint_is_close_and_one_dtype(tmp_path):
    model = small_model()
    names = [name for name, value in model.state_dict().items() if value.ndim >= 2]
    model.save(tmp_path / "m", int8=names)
    again = VILAU.from_checkpoint(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        limit = value.flatten(1).abs().amax(1).max() / 127 if value.ndim >= 2 else 0
        assert (again.state_dict()[name] - value).abs().max() <= limit
    assert {p.dtype for p in VILAU.from_checkpoint(tmp_path / "m", dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_checkpoint_that_does_not_fit(tmp_path):
    model = small_model()
    model.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["depth_layers"] = 3
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit the configuration"):
        VILAU.from_checkpoint(tmp_path / "m")


def test_different_tables_are_not_shared(tmp_path):
    model = small_model(shared_codebook=False)
    model.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["shared_codebook"] = True
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tables differ"):
        VILAU.from_checkpoint(tmp_path / "m")


def test_tokenizer_is_the_vocabulary_of_the_model():
    assert small_tokenizer().vocab_size == small_config().language.vocab_size
