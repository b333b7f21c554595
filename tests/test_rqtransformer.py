"""RQ-Transformer: published keys and outputs, sampling against a loop without caches, training, bad input."""

import copy
import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from vilau_small import exponential, fingerprint, integers, uniform, weights

import unifiedar.nn.depth
from unifiedar import engine
from unifiedar.checkpoints import CheckpointError
from unifiedar.models import RQLogits, RQTransformer, RQTransformerConfig
from unifiedar.nn import ResidualQuantizer
from unifiedar.nn.depth import Stack
from unifiedar.ops import depth_decode, sample_codes

FOLDER = Path(__file__).parent
GOLDENS = FOLDER / "goldens" / "rqtransformer-small.safetensors"
PLAIN = RQTransformerConfig(
    num_codes=24, code_dim=8, grid=(2, 3), depth=3, dim=32, num_heads=2, body_layers=2, head_layers=2
)
CLASSES = replace(PLAIN, num_conditions=5)
TEXT = replace(PLAIN, num_conditions=9, condition_length=4)
CONFIGS = {"plain": PLAIN, "classes": CLASSES, "text": TEXT}


def built(config: RQTransformerConfig) -> RQTransformer:
    model = RQTransformer(config).eval()
    model.load_state_dict(weights(model.state_dict(), True), strict=True)
    return model


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


def inputs(name: str, count: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, codebook, condition."""
    config = CONFIGS[name]
    codes = integers(f"rq.{name}.codes", config.num_codes, count, *config.grid, config.depth)
    cond = integers(f"rq.{name}.cond", config.num_conditions, count, config.condition_length)
    table = uniform(f"rq.{name}.codebook", config.num_codes, config.code_dim)
    return codes, table, None if name == "plain" else cond


# ---- published keys, shapes and outputs


@pytest.mark.parametrize(
    ("name", "keys", "parameters"),
    [
        ("ffhq", 460, 355_393_536),
        ("lsun-church", 460, 370_087_936),
        ("lsun-cat", 492, 612_061_184),
        ("imagenet-480m", 268, 480_921_088),
        ("imagenet-821m", 460, 820_899_328),
        ("imagenet-1.4b", 780, 1_387_529_728),
        ("imagenet-3.8b", 780, 3_822_488_064),
        ("cc3m-654m", 496, 654_061_568),
    ],
)
def test_published_keys_and_shapes(name, keys, parameters):
    published = json.loads(gzip.decompress((FOLDER / "manifests" / "rqtransformer.json.gz").read_bytes()))
    assert set(published) == set(RQTransformer.configs)
    with torch.device("meta"):
        model = RQTransformer(RQTransformer.configs[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published[name]
    assert len(published[name]) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.dim == 64 * model.config.num_heads


@pytest.mark.parametrize("name", ["classes", "text"])
def test_published_outputs(name):
    """Within twice the published code's own float32 error; its codes exactly."""
    with safe_open(GOLDENS, "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        errors, fingerprints = (json.loads(file.metadata()[key]) for key in ("errors", "fingerprints"))

    def check(key: str, got: Tensor) -> None:
        exact = golden[f"{name}.{key}"].double()
        assert got.shape == exact.shape
        assert (got.detach().double() - exact).abs().max().item() <= 2 * errors[f"{name}.{key}"] + 1e-5

    config, model = CONFIGS[name], built(CONFIGS[name])
    assert fingerprint(model.state_dict()) == fingerprints[name]
    codes, table, cond = inputs(name)
    logits = model(codes, table, cond)
    check("logits", logits.codes[:1])
    soft = exponential(f"rq.{name}.soft", *logits.codes.shape)
    soft = soft / soft.sum(-1, keepdim=True)
    if name == "text":
        check("text", logits.text)
    else:
        assert logits.text is None
    check("losses", torch.stack([model.loss(logits, codes, cond), model.loss(logits, soft, cond)]))
    greedy = model.sample(codes, table, cond=cond, temperature=0)
    assert torch.equal(greedy, golden[f"{name}.greedy"].long())
    sampled = model.sample(
        codes,
        table,
        cond=cond,
        start=(0, 2),
        temperature=0.8,
        top_k=[6, 12, 24],
        top_p=[0.99, 0.9, 0.8],
        noise=exponential(f"rq.{name}.noise", *codes.shape, config.num_codes),
    )
    assert torch.equal(sampled, golden[f"{name}.sampled"].long())


# ---- sampling


def loop(
    model: RQTransformer,
    partial: Tensor,
    table: Tensor,
    conds: list[Tensor | None],
    noise: Tensor,
    begin: int,
    guidance: float | None,
    top_k: list[int],
    top_p: list[float],
) -> Tensor:
    """Every code from a whole forward pass; `conds` are the condition and what guidance leads away from."""
    codes = torch.where(torch.arange(partial[0, :, :, 0].numel()).view(1, *partial.shape[1:3], 1) < begin, partial, 0)
    _, height, width, depth = codes.shape
    for at in range(begin, height * width):
        h, w = divmod(at, width)
        for d in range(depth):
            logits = torch.cat([model(codes, table, cond).codes[:, h, w, d] for cond in conds])
            codes[:, h, w, d] = sample_codes(
                logits, guidance=guidance, temperature=0.9, top_k=top_k[d], top_p=top_p[d], noise=noise[:, h, w, d]
            )
    return codes


@torch.no_grad()
@pytest.mark.parametrize("start", [(0, 0), (0, 1), (1, 2)])
@pytest.mark.parametrize(
    ("name", "guidance"), [("plain", None), ("classes", None), ("classes", 2.5), ("text", None), ("text", 2.5)]
)
def test_sampling_equals_a_loop_without_caches(name, start, guidance):
    model = built(CONFIGS[name]).double()
    partial, table, cond = inputs(name, 3)
    table = table.double()
    other = None if cond is None or guidance is None else (cond + 1) % model.config.num_conditions
    noise = exponential(f"rq.{name}.loop", *partial.shape, model.config.num_codes)
    top_k, top_p = [0, 12, 20], [0.9, 0.0, 0.95]
    conds = [cond] if guidance is None else [cond, other]
    expected = loop(model, partial, table, conds, noise, start[0] * 3 + start[1], guidance, top_k, top_p)
    options = {"cond": cond, "start": start, "guidance": guidance, "unconditional": other, "noise": noise}
    before = partial.clone()
    got = model.sample(partial, table, temperature=0.9, top_k=top_k, top_p=top_p, **options)
    assert torch.equal(got, expected)
    assert torch.equal(partial, before)


@torch.no_grad()
def test_cached_logits_equal_teacher_forced_ones(name, monkeypatch, device):
    """Step by step, from a partial picture."""
    model = built(CONFIGS[name]).double().to(device)
    partial, table, cond = inputs(name, 3)
    partial, table, cond = partial.to(device), table.double().to(device), None if cond is None else cond.to(device)
    seen = []

    def record(*args, **options):
        result = depth_decode(*args, **(options | {"return_logits": True}))
        seen.extend(result.logits.unbind(1))
        return result

    monkeypatch.setattr(unifiedar.nn.depth, "depth_decode", record)
    codes = model.sample(partial, table, cond=cond, start=(0, 2), generator=torch.Generator(device).manual_seed(1))
    forced = model(codes, table, cond).codes.flatten(1, 2)[:, 2:].flatten(1, 2)
    torch.testing.assert_close(torch.stack(seen, dim=1), forced, rtol=0, atol=1e-12)


@torch.no_grad()
def test_no_position_is_computed_twice(monkeypatch):
    """The body sees each token once, the head each depth once, the picture's last position never enters the body."""
    model = built(TEXT)
    partial, table, cond = inputs("text")
    lengths: dict[str, list[int]] = {"body": [], "head": []}
    model.body_transformer.blocks[0].register_forward_pre_hook(lambda _, x: lengths["body"].append(x[0].shape[1]))
    inner = unifiedar.ops.depth.depth_block

    def record(x, *args):
        lengths["head"].append(x.shape[1])
        return inner(x, *args)

    monkeypatch.setattr(unifiedar.ops.depth, "depth_block", record)
    model.sample(partial, table, cond=cond, start=(0, 2))
    assert lengths == {"body": [4 + 2, 1, 1, 1], "head": [1] * 4 * 3 * len(model.head.head_transformer.blocks)}


def test_greedy_is_the_largest_logit(name):
    model = built(CONFIGS[name])
    partial, table, cond = inputs(name)
    codes = model.sample(partial, table, cond=cond, temperature=0)
    assert torch.equal(model(codes, table, cond).codes.argmax(-1), codes)


def test_a_partial_picture_is_kept():
    model = built(PLAIN)
    partial, table, _ = inputs("plain")
    noise = exponential("rq.keep", *partial.shape, 24)
    codes = model.sample(partial, table, start=(1, 1), noise=noise)
    assert torch.equal(codes.flatten(1, 2)[:, :4], partial.flatten(1, 2)[:, :4])
    assert not torch.equal(codes, partial)
    ignored = partial.clone()
    ignored[:, 1, 1:] = -7  # not even looked at
    assert torch.equal(model.sample(ignored, table, start=(1, 1), noise=noise), codes)
    changed = partial.clone()
    changed[:, 0, 0] = (partial[:, 0, 0] + 1) % 24
    drawn = model.sample(changed, table, start=(1, 1), noise=noise)
    assert not torch.equal(drawn.flatten(1, 2)[:, 4:], codes.flatten(1, 2)[:, 4:])


def test_guidance_and_conditions():
    model = built(CLASSES)
    partial, table, _ = inputs("classes")
    cond, other = torch.tensor([1, 2]), torch.tensor([4, 4])
    options = {"noise": exponential("rq.guided", *partial.shape, 24)}
    alone = model.sample(partial, table, cond=cond, **options)
    assert torch.equal(alone, model.sample(partial, table, cond=cond[:, None], **options))
    assert torch.equal(alone, model.sample(partial, table, cond=cond, guidance=1.0, unconditional=other, **options))
    assert not torch.equal(alone, model.sample(partial, table, cond=other, **options))
    opposite = model.sample(partial, table, cond=cond, guidance=0.0, unconditional=other, **options)
    assert torch.equal(opposite, model.sample(partial, table, cond=other, **options))
    rows = model.sample(partial, table, cond=cond, guidance=torch.tensor([0.0, 1.0]), unconditional=other, **options)
    assert torch.equal(rows, torch.stack([opposite[0], alone[1]]))


def test_a_generator_draws_depth_by_depth():
    model = built(PLAIN)
    partial, table, _ = inputs("plain")
    codes = model.sample(partial, table, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.empty(2, 24).exponential_(generator=generator) for _ in range(18)], dim=1)
    assert torch.equal(codes, model.sample(partial, table, noise=noise.view(2, 2, 3, 3, 24)))


def test_codebooks():
    """A quantizer stands for its table; tables may differ between depths."""
    model = built(PLAIN)
    partial, table, _ = inputs("plain")
    noise = exponential("rq.codebooks", *partial.shape, 24)
    for shared in (True, False):
        quantizer = ResidualQuantizer(24, 8, 3, shared=shared)
        assert torch.equal(model(partial, quantizer).codes, model(partial, quantizer.table).codes)
        drawn = model.sample(partial, quantizer, noise=noise)
        assert torch.equal(drawn, model.sample(partial, quantizer.table, noise=noise))
    assert torch.equal(model(partial, table).codes, model(partial, torch.stack([table] * 3)).codes)


@pytest.fixture
def replayed(monkeypatch):
    """A model draws as on a GPU, with sessions that last and steps of a row; a replay is a call. Counts captures."""
    captured = []

    def capture(steps):
        captured.append(len(steps))
        for step in steps:
            step()
        return [SimpleNamespace(replay=step) for step in steps]

    session = RQTransformer._session
    monkeypatch.setattr(engine, "_capture", capture)
    monkeypatch.setattr(RQTransformer, "_session", lambda self, *args: session(self, *args[:-1], True))
    return captured


@pytest.mark.parametrize("start", [(0, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("guided", [None, "number", "rows"])
def test_steps_of_a_row_that_last(name, guided, start, request):
    """Of a batch that comes again with other pictures, conditions and noise; settings capture anew."""
    if name == "plain" and guided:
        pytest.skip("guidance needs conditions")
    model = built(CONFIGS[name])
    partial, table, cond = inputs(name, 3)
    options = {"start": start, "top_k": [0, 12, 20], "temperature": [0.9, 0.0, 1.1]}

    def draw(seed):
        given = {} if cond is None else {"cond": cond.roll(seed, 0)}
        if guided:
            strength = 2.0 if guided == "number" else torch.tensor([2.0, 0.5, 1.0]).roll(seed)
            given |= {"guidance": strength, "unconditional": cond.roll(1 + seed, 0)}
        torch.manual_seed(seed)
        return model.sample(partial.roll(seed, 0), table, **options, **given)

    with torch.no_grad():
        want = [draw(seed) for seed in range(3)]
        captured = request.getfixturevalue("replayed")
        with torch.inference_mode():
            assert torch.equal(draw(0), want[0])
        assert all(torch.equal(draw(seed), one) for seed, one in enumerate(want))
        assert captured == [-(-(6 - start[0] * 3 - start[1]) // 3)]
        options["top_k"] = 5
        draw(0)
        assert len(captured) == 2
        model.pos_emb_hw.mul_(2)  # read in place
        draw(0)
        assert len(captured) == 2
        model.head.classifier_mlp.linear.bias.neg_()  # a graph may have a copy of the head
        draw(0)
        assert len(captured) == 3
        assert len(copy.deepcopy(model)._sessions) == 0
        model.forget_captures()
        draw(0)
        assert len(captured) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs(dtype):
    """Replayed draws are those that are launched one by one."""
    config = replace(CLASSES, dim=128, num_heads=2, code_dim=64, num_codes=256, grid=(4, 4))
    model = RQTransformer(config).eval().to("cuda", dtype)
    table = torch.randn(256, 64, device="cuda").to(dtype)
    for seed in range(3):
        cond = torch.randint(5, (4,), device="cuda")
        options = {"cond": cond, "seed": seed, "top_k": 100, "guidance": 2.0, "unconditional": cond.flip(0)}
        assert torch.equal(model.generate(table, **options, graphs=True), model.generate(table, **options))


@torch.no_grad()
def test_products_in_half_precision():
    """States and norms of the body stay float32, as under autocast; what is cached is half as large."""
    model, plain = built(CLASSES), built(CLASSES)
    partial, table, cond = inputs("classes")
    options = {"cond": cond, "noise": exponential("rq.cast", *partial.shape, 24)}
    assert model.cast_products(torch.bfloat16) is model
    assert (model.dtype, model.products) == (torch.float32, torch.bfloat16)
    caches, make = [], Stack.cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "cache", lambda *args: caches.append(make(*args)) or caches[-1])
        drawn = model.sample(partial, table, **options)
    assert [one.dtype for one in caches] == [torch.bfloat16]
    want = plain.sample(partial, table, **options)
    assert (drawn[:, 0, 0] == want[:, 0, 0]).float().mean() > 0.6
    prefix = plain._prefix(cond.view(2, 1))
    exact = plain.double().body_transformer(prefix.double())
    with torch.autocast("cpu", torch.bfloat16):
        error = (model.body_transformer(prefix) - exact).abs().max()
        allowed = (built(CLASSES).body_transformer(prefix) - exact).abs().max()
    assert error <= 1.01 * allowed
    with pytest.raises(TypeError, match=r"cast_products: dtype must be .* got torch.int8"):
        model.cast_products(torch.int8)


def test_logits_that_are_nan_are_an_error_with_a_place():
    model = built(CLASSES)
    _, table, _ = inputs("classes")
    with torch.no_grad():
        model.head.pos_emb_d[0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"picture 0 at position 0, depth 1$"):
        model.generate(table, cond=torch.tensor([1, 2]))


def test_generate():
    model = built(replace(CLASSES, top_k=6, top_p=0.8))
    _, table, _ = inputs("classes")
    cond, done = torch.tensor([1, 2, 3]), []
    codes = model.generate(table, cond=cond, seed=[5, 6, 7], progress=done.append)
    assert codes.shape == (3, 2, 3, 3)
    assert sum(done) == 6
    # Alone as in its batch, and with the configuration's top_k and top_p.
    assert torch.equal(codes[1:2], model.generate(table, cond=cond[1:2], seed=6))
    assert torch.equal(codes[1:2], model.generate(table, cond=cond[1:2], seed=6, top_k=6, top_p=0.8))
    assert not torch.equal(codes[1:2], model.generate(table, cond=cond[1:2], seed=6, top_k=0, top_p=0.0))
    assert not torch.equal(codes[1:2], model.generate(table, cond=cond[1:2], seed=7))
    guided = model.generate(table, cond=cond, seed=5, guidance=1.0, unconditional=torch.zeros_like(cond))
    assert torch.equal(guided, codes)
    plain = built(PLAIN)
    assert plain.generate(table).shape == (1, 2, 3, 3)
    assert torch.equal(plain.generate(table, count=2)[1:], plain.generate(table, seed=1))
    assert plain.generate(table, count=0).shape == (0, 2, 3, 3)


def test_half_precision(device):
    """Sampling in bfloat16 runs, and its logits stay near the float32 ones."""
    model = built(TEXT).to(device)
    codes, table, cond = (x.to(device) for x in inputs("text"))
    exact = model(codes, table, cond).codes
    model.bfloat16()
    logits = model(codes, table, cond).codes
    assert logits.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(logits.float(), exact, dim=-1)
    assert cosine.min() > 0.999
    drawn = model.sample(codes, table, cond=cond, top_k=12)
    assert 0 <= drawn.min() <= drawn.max() < 24


def test_stack_in_parts_equals_the_whole():
    torch.manual_seed(0)
    stack, x = Stack(32, 2, 2, 0.1).double().eval(), torch.randn(2, 11, 32, dtype=torch.float64)
    cache, begin, parts = stack.cache(x, 11), 0, []
    for part in x.split([4, 1, 3, 1, 2], dim=1):
        parts.append(stack(part, cache, begin))
        begin += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), stack(x))


def test_forward_is_one_graph(name, fresh_compiler):
    model = built(CONFIGS[name])
    codes, table, cond = inputs(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(codes, table, cond).codes, model(codes, table, cond).codes)


# ---- training


@pytest.mark.parametrize("soft", [False, True])
def test_a_gradient_step_lowers_the_loss(name, soft):
    model = RQTransformer(replace(CONFIGS[name], dropout=0.0)).train()
    codes, table, cond = inputs(name)
    targets = codes
    if soft:
        targets = exponential("rq.soft", *codes.shape, 24)
        targets = targets / targets.sum(-1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = model.loss(model(codes, table, cond), targets, cond)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_logits_do_not_see_the_future(name):
    model = built(CONFIGS[name])
    codes, table, cond = inputs(name)
    changed = codes.clone()
    changed[:, 1, 1, 1] = (codes[:, 1, 1, 1] + 1) % 24
    one, two = (model(c, table, cond).codes.flatten(1, 3) for c in (codes, changed))
    position = 4 * 3 + 1
    torch.testing.assert_close(one[:, : position + 1], two[:, : position + 1])
    assert ((one - two).abs().amax(-1)[:, position + 1 :] > 1e-4).all()


# ---- files


def test_checkpoints(tmp_path):
    model = built(TEXT)
    model.save(tmp_path / "saved")
    again = RQTransformer.from_checkpoint(tmp_path / "saved")
    assert again.config == TEXT
    assert not again.training
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"no config.json of an RQ-Transformer.*pass config="):
        RQTransformer.from_checkpoint(tmp_path / "model.pt")
    published = RQTransformer.from_checkpoint(tmp_path / "model.pt", config=TEXT, dtype=torch.bfloat16)
    assert published.dtype == torch.bfloat16
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert torch.equal(published.state_dict()[key], value.bfloat16())
    assert again.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="weights do not fit the configuration"):
        RQTransformer.from_checkpoint(tmp_path / "model.pt", config=CLASSES)
    (tmp_path / "config.json").write_text(json.dumps(TEXT.to_dict()))
    assert RQTransformer.from_checkpoint(tmp_path / "model.pt").config == TEXT
    (tmp_path / "saved" / "config.json").write_text(json.dumps(TEXT.to_dict() | {"model": "vilau"}))
    with pytest.raises(CheckpointError, match="does not describe an RQ-Transformer"):
        RQTransformer.from_checkpoint(tmp_path / "saved")
    (tmp_path / "config.json").write_text(json.dumps(TEXT.to_dict() | {"grid": 3}))
    with pytest.raises(CheckpointError, match="does not describe an RQ-Transformer"):
        RQTransformer.from_checkpoint(tmp_path / "model.pt")


def test_published_sizes_are_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(RQTransformer, "configs", CONFIGS)
    torch.save({"state_dict": built(CLASSES).state_dict()}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"model": "rqvae"}')  # of the tokenizer, which may lie in the same folder
    assert RQTransformer.from_checkpoint(tmp_path / "model.pt").config == CLASSES


def test_copies_and_parts_keep_the_published_keys():
    model = built(TEXT)
    keys = list(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(twin.state_dict()) == keys
    whole = torch.nn.ModuleDict({"head": model})
    assert list(whole.state_dict()) == [f"head.{key}" for key in keys]
    whole.load_state_dict(whole.state_dict())


def test_a_missing_key_has_its_published_name():
    state = built(PLAIN).state_dict()
    del state["head_mlp.weight"], state["classifier.linear.bias"]
    with pytest.raises(RuntimeError, match=r'"classifier\.linear\.bias"') as caught:
        RQTransformer(PLAIN).load_state_dict(state)
    assert '"head_mlp.weight"' in str(caught.value)
    assert "in_mlp_1" not in str(caught.value)
    state = built(PLAIN).state_dict()
    before = list(state)
    RQTransformer(PLAIN).load_state_dict(state)
    assert list(state) == before  # the caller's dictionary is left alone
    with pytest.raises(RuntimeError, match="surplus"):
        RQTransformer(PLAIN).load_state_dict(state | {"head_transformer.surplus": torch.zeros(1)})


# ---- bad input

CODES = torch.zeros(2, 2, 3, 3, dtype=torch.int64)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "changes", "error", "text"),
    [
        ("plain", {"partial": CODES[0]}, ValueError, r"codes must be \(B, 2, 3, 3\), got \(2, 3, 3\)"),
        ("plain", {"partial": CODES.float()}, TypeError, "codes must be an int64 tensor, got torch.float32"),
        ("plain", {"partial": [[0]]}, TypeError, "codes must be an int64 tensor, got list"),
        (
            "plain",
            {"codebook": torch.zeros(25, 8)},
            ValueError,
            r"codebook must be \(24, 8\) or \(3, 24, 8\), got \(25",
        ),
        (
            "plain",
            {"codebook": torch.zeros(24, 8, device="meta")},
            ValueError,
            "codebook must be on the model's device",
        ),
        ("plain", {"codebook": "table"}, TypeError, "codebook must be a tensor or a ResidualQuantizer, got str"),
        ("plain", {"cond": LABELS}, ValueError, "cond must be from 0 to 0, got 0 to 1"),
        ("plain", {"start": (2, 0)}, ValueError, r"start must be inside the 2 x 3 grid, got \(2, 0\)"),
        ("plain", {"start": (0, -1)}, ValueError, "start must be inside"),
        ("plain", {"start": (0.5, 0)}, TypeError, "start must be two integers"),
        ("plain", {"start": (0, 2), "partial": CODES + 24}, ValueError, "24"),
        ("plain", {"noise": torch.ones(2, 2, 3, 3)}, ValueError, r"noise must be \(2, 2, 3, 3, 24\)"),
        (
            "plain",
            {"noise": torch.ones(2, 2, 3, 3, 24), "generator": torch.Generator()},
            ValueError,
            "generator must be None when noise is given",
        ),
        ("plain", {"top_k": [1, 2]}, ValueError, "top_k must be one number or 3, got 2"),
        ("plain", {"top_p": [0.5] * 4}, ValueError, "top_p must be one number or 3, got 4"),
        ("plain", {"temperature": -1.0}, ValueError, "temperature must be at least 0"),
        ("plain", {"guidance": 2.0}, ValueError, "unconditional must be given with guidance"),
        ("plain", {"unconditional": LABELS}, ValueError, "guidance must be given with unconditional"),
        (
            "plain",
            {"guidance": 2.0, "unconditional": LABELS * 0},
            ValueError,
            "guidance must be None for an unconditional model",
        ),
        ("classes", {}, ValueError, "cond must be given, the model has 5 conditions, got None"),
        ("classes", {"cond": LABELS[:1]}, ValueError, r"cond must be \(2,\), got \(1,\)"),
        ("classes", {"cond": LABELS.float()}, TypeError, "cond must be an int64 tensor, got torch.float32"),
        ("classes", {"cond": LABELS + 4}, ValueError, "cond must be from 0 to 4, got 4 to 5"),
        ("classes", {"cond": LABELS - 1}, ValueError, "cond must be from 0 to 4, got -1 to 0"),
        (
            "classes",
            {"cond": LABELS, "guidance": 2.0, "unconditional": LABELS + 9},
            ValueError,
            "unconditional must be from 0 to 4",
        ),
        ("text", {"cond": LABELS}, ValueError, r"cond must be \(2, 4\), got \(2,\)"),
    ],
)
def test_bad_input_to_sample(name, changes, error, text):
    arguments = {"partial": CODES, "codebook": torch.zeros(24, 8)} | changes
    with pytest.raises(error, match=text):
        built(CONFIGS[name]).sample(**arguments)


def test_bad_input_elsewhere():
    model, table = built(CLASSES), torch.zeros(24, 8)
    with pytest.raises(ValueError, match="forward: codes must be"):
        model(CODES[:, :1], table, LABELS)
    with pytest.raises(ValueError, match="forward: cond must be from 0 to 4"):
        model(CODES, table, LABELS + 4)
    with pytest.raises(ValueError, match="generate: count must be 2, the rows of cond, got 3"):
        model.generate(table, cond=LABELS, count=3)
    with pytest.raises(ValueError, match="generate: count must be at least 0, got -1"):
        model.generate(table, count=-1)
    with pytest.raises(ValueError, match="generate: seed must be a number or one for each of 2 pictures, got 1"):
        model.generate(table, cond=LABELS, seed=[1])
    with pytest.raises(ValueError, match=r"generate: cond must be \(1,\), got \(\)"):
        model.generate(table, cond=torch.tensor(3))
    logits = model(CODES, table, LABELS)
    with pytest.raises(ValueError, match=r"loss: targets must be \(2, 2, 3, 3\) codes"):
        model.loss(logits, CODES[:1])
    with pytest.raises(ValueError, match=r"loss: cond must be \(2, 4\) to match the logits of the text, got None"):
        model.loss(RQLogits(logits.codes, torch.zeros(2, 3, 9)), CODES)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 33}, "dim must be a multiple of num_heads 2, got 33"),
        ({"depth": 0}, "sizes must be at least 1"),
        ({"num_conditions": 0}, "sizes must be at least 1"),
        ({"condition_length": 4}, "num_conditions must be at least 2"),
    ],
)
def test_bad_configurations(changes, text):
    with pytest.raises(ValueError, match=text):
        RQTransformer(replace(PLAIN, **changes))


def test_a_single_depth_without_a_head():
    """As the paper's comparison with one code a position: 48 body layers and none above them."""
    model = RQTransformer(replace(PLAIN, depth=1, head_layers=0)).eval()
    codes = model.sample(CODES[..., :1], torch.randn(24, 8), temperature=0)
    assert codes.shape == (2, 2, 3, 1)
