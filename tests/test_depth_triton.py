"""Depth decoding by Triton kernels: every form against the definition, the kernels one by one, and graphs of them."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from depth_small import drawn_from, small_case
from helpers import assert_as_good_as_eager, guarded, interpreter_skip
from test_depth_forms import CODES, DEPTH, FULLEST, STYLES, built, inputs

from unifiedar import engine
from unifiedar.nn import DepthStyle
from unifiedar.nn.depth import _Session
from unifiedar.ops import _native, depth_decode, depth_triton, sample_codes
from unifiedar.ops.depth import served_by


def _place(name: str) -> tuple[str, torch.dtype]:
    device, dtype = name.split("-")
    if device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    return device, getattr(torch, dtype)


def _gpu(dtype: str):
    return pytest.param(f"cuda-{dtype}", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu-float32", "cpu-float16", *map(_gpu, ("bfloat16", "float16", "float32"))])
def place(request):
    """Where the kernels run, interpreted or compiled, and the dtype."""
    return _place(request.param)


@pytest.fixture(params=["cpu-float32", _gpu("bfloat16")])
def usual_place(request):
    """As `place`, with one dtype each: for what does not depend on it."""
    return _place(request.param)


@pytest.fixture(params=["cpu-float16", _gpu("bfloat16")])
def half_place(request):
    """As `place`, in half precision."""
    return _place(request.param)


def check(module, hidden, codebook, start, **settings):
    """Logits as near to float64 as the definition's, codes that are drawn from them, embeddings summed the same."""
    guidance = settings.get("guidance")
    rows = len(hidden) if guidance is None else len(hidden) // 2
    noise = torch.empty(rows, module.depth, module.num_codes, device=hidden.device).exponential_()

    def run(backend, dtype=hidden.dtype, **more):
        weights = copy.deepcopy(module).to(dtype).weights()
        first, book = hidden.to(dtype), codebook.to(dtype) if dtype == torch.float64 else codebook
        own = None if start is None else start.to(dtype)
        with torch.no_grad():
            return depth_decode(first, book, weights, start=own, backend=backend, return_logits=True, **more)

    found = run("triton", noise=noise, **settings)
    forced = {"forced": found.codes, "guidance": guidance}
    eager = run("eager", **forced)
    assert_as_good_as_eager(found.logits, eager.logits, run("eager", torch.float64, **forced).logits)
    want = [
        sample_codes(found.logits[:, d], noise=noise[:, d], backend="eager", **settings) for d in range(module.depth)
    ]
    assert torch.equal(found.codes, torch.stack(want, 1))
    assert torch.equal(found.total, eager.total)
    assert (found.unsound == -1).all()
    if hidden.is_cuda:
        again = run("triton", **forced)
        assert torch.equal(again.logits, found.logits)
        assert torch.equal(again.codes, found.codes)
    return found


def moved(module, tensors, device, dtype):
    return module.to(device, dtype), *(None if one is None else one.to(device, dtype) for one in tensors)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_form(style, place):
    device, dtype = place
    if dtype != {"cpu": torch.float32, "cuda": torch.bfloat16}[device] and style is not STYLES["gate with biases"]:
        pytest.skip("one dtype for most forms")
    quick = device == "cpu"  # interpreted
    module = built(style, depth=2 if quick and not style.order else DEPTH, layers=1 if quick else 2)
    check(*moved(module, inputs(module, 3), device, dtype), top_k=20)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_form_with_many_rows(style, half_place):
    """Half precision: the products of many rows are another kernel's, and leave sums to the next norm."""
    device, dtype = half_place
    quick = device == "cpu"
    module = built(style, depth=2 if quick and not style.order else DEPTH, layers=1 if quick else 2)
    check(*moved(module, inputs(module, 34), device, dtype), top_k=20)


@pytest.mark.parametrize("guidance", [2.5, "rows"])
def test_guided_rows_of_the_fullest_form(guidance, usual_place):
    device, dtype = usual_place
    module = built(FULLEST, layers=1)
    strength = torch.tensor([1.5, 3.0, 2.0], device=device) if guidance == "rows" else guidance
    found = check(*moved(module, inputs(module, 6), device, dtype), guidance=strength, top_p=0.9)
    assert len(set(found.codes.flatten().tolist())) > 3


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17, 33, 64, 130])
def test_any_number_of_rows(rows, place):
    device, dtype = place
    if dtype != {"cpu": torch.float32, "cuda": torch.bfloat16}[device] and rows not in (2, 17, 33):
        pytest.skip("one dtype for most numbers")
    case = small_case(rows=rows, dim=64, layers=1, depth=2, hidden_dim=40, dtype=dtype).to(device)
    found = case.run("triton", return_logits=True)
    exact = case.to(torch.float64).run("eager", forced=found.codes, return_logits=True).logits
    assert_as_good_as_eager(found.logits, case.run("eager", forced=found.codes, return_logits=True).logits, exact)
    assert torch.equal(found.codes, drawn_from(found.logits, case))


def test_no_rows_and_no_layers(usual_place):
    device, dtype = usual_place
    found = small_case(rows=0, dtype=dtype).to(device).run("triton", return_logits=True)
    assert (found.codes.shape, found.total.shape, found.logits.shape) == ((0, 3), (0, 40), (0, 3, 101))
    case = small_case(rows=2, layers=0, shared=False, projected=False, dtype=dtype).to(device)
    found = case.run("triton", return_logits=True)
    assert torch.equal(found.codes, drawn_from(found.logits, case))


def test_forced_codes_without_a_row_add_nothing(usual_place):
    device, dtype = usual_place
    case = small_case(rows=2, dim=64, layers=1, dtype=dtype).to(device)
    codes = torch.tensor([[-1, 5, -1], [3, 101, 100]], device=device)
    found = case.run("triton", forced=codes, return_logits=True)
    known = codes.where(codes < 101, -1)
    want = case.run("eager", forced=known, return_logits=True)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.total, want.total)
    assert torch.equal(found.unsound, want.unsound)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_nan_is_told_by_row_and_depth(guidance, usual_place):
    device, dtype = usual_place
    case = small_case(rows=4, guidance=guidance, dim=64, layers=1, depth=4, dtype=dtype).to(device)
    want = case.run("triton").codes
    case.hidden[1, 5] = torch.nan
    found = case.run("triton")
    assert found.unsound.tolist() == ([-1, 0, -1, -1] if guidance is None else [-1, 0])
    assert not found.codes[1].any()
    assert torch.equal(found.codes[0], want[0])
    case.hidden[1, 5] = 1.0
    codes = case.run("triton").codes
    case.codebook[codes[0, 1]] = torch.nan
    first = 1 + int((codes[0] == codes[0, 1]).nonzero()[0])
    assert case.run("triton").unsound[0] == first


def test_a_float32_codebook_and_strides(usual_place):
    device, dtype = usual_place
    case = small_case(rows=3, dim=64, layers=1, shared=False, dtype=dtype, book_dtype=torch.float32).to(device)
    want = case.run("triton", return_logits=True)
    wide = replace(
        case,
        codebook=torch.cat([case.codebook, case.codebook], dim=-1)[..., :40],
        noise=case.noise.transpose(0, 1).contiguous().transpose(0, 1),
        hidden=torch.cat([case.hidden, case.hidden], dim=-1)[:, :128],
    )
    for one, other in zip(wide.run("triton", return_logits=True), want, strict=True):
        assert torch.equal(one, other)
    assert want.total.dtype == torch.float32


# ---- the kernels by themselves


def reference(x, weights, biases, norm, gain, shift, eps, activation, gated, place, residual):
    x = x.double()
    if norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], None, eps) * gain.double()
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], gain.double(), shift.double(), eps)
    parts = [F.linear(x, w.double(), None if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    act = {"none": lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
    y = act[activation](parts[1]) * parts[0] if gated else act[activation](torch.cat(parts, 1))
    y = y if place is None else y + place.double()
    return y if residual is None else y + residual.double()


LINEAR = {
    "three side by side": {"sizes": (40, 24, 9), "inputs": 48, "norm": "rms"},
    "a gate": {"sizes": (33, 33), "inputs": 64, "norm": "layer", "activation": "silu", "gated": True, "biased": True},
    "a gate, tanh-GELU": {"sizes": (33, 33), "inputs": 40, "activation": "gelu_tanh", "gated": True},
    "a place and a residual": {"sizes": (21,), "inputs": 72, "biased": True, "placed": True, "residual": True},
    "GELU": {"sizes": (16,), "inputs": 8, "norm": "layer", "activation": "gelu"},
    "more inputs than are fetched ahead": {"sizes": (9,), "inputs": 5200, "residual": True},
    "a norm of many": {"sizes": (9,), "inputs": 3336, "norm": "layer", "biased": True},
    "inputs that end anywhere": {"sizes": (9,), "inputs": 37, "norm": "rms"},
}


@pytest.mark.parametrize("rows", [1, 3, 5, 18, 70])
@pytest.mark.parametrize("how", LINEAR.values(), ids=LINEAR)
def test_products(how, rows, place):
    device, dtype = place
    if device == "cpu" and ((how["inputs"] > 3000 and rows in (3, 5)) or (rows == 70 and dtype == torch.float32)):
        pytest.skip("slow where kernels are interpreted")
    if device == "cuda" and dtype != torch.bfloat16 and rows != {torch.float16: 5, torch.float32: 3}[dtype]:
        pytest.skip("one of both ways to multiply is enough")
    torch.manual_seed(0)
    sizes, inputs, gated = how["sizes"], how["inputs"], how.get("gated", False)

    def drawn(*shape):
        return torch.randn(*shape).to(device, dtype)

    x = drawn(rows, inputs)
    weights = [(torch.randn(size, inputs) / inputs**0.5).to(device, dtype) for size in sizes]
    biases = [drawn(size) if how.get("biased") else None for size in sizes]
    total = sizes[0] if gated else sum(sizes)
    norm, activation = how.get("norm", "none"), how.get("activation", "none")
    gain, shift = drawn(inputs), drawn(inputs)
    place_ = drawn(total) if how.get("placed") else None
    residual = drawn(rows, total) if how.get("residual") else None
    rest = (norm, gain, shift, 1e-5, activation, gated, place_, residual)
    want = reference(x, weights, biases, *rest)
    out, whole = guarded((rows, total), dtype, device)
    _native.kernels("depth").linear(
        x, weights, None if biases[0] is None else biases, out, norm=norm,
        gain=None if norm == "none" else gain, shift=shift if norm == "layer" else None, eps=1e-5,
        activation=activation, gated=gated, place=place_, residual=residual, early=device == "cuda",
    )  # fmt: skip
    whole()
    scale = want.abs().max().item()
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert (out.double() - want).abs().max() <= tolerance * scale
    if residual is not None:  # in place
        _native.kernels("depth").linear(
            x, weights, None if biases[0] is None else biases, residual, place=place_, residual=residual
        )
        assert torch.equal(residual, out)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(33, 520, 24), (65, 1024, 200), (40, 2312, 40), (129, 300, 72)]
)
def test_products_in_parts_that_the_next_norm_adds(rows, inputs, outputs, norm, half_place):
    """x + y weights^T + bias, its norm, and a product of that: the same numbers as one after another."""
    device, dtype = half_place
    if device == "cpu" and rows * inputs > 40000 and norm != "layer":
        pytest.skip("slow where kernels are interpreted")
    torch.manual_seed(0)
    kernels, early = _native.kernels("depth"), device == "cuda"

    def drawn(*shape):
        return torch.randn(*shape).to(device, dtype)

    y, x, bias = drawn(rows, inputs), drawn(rows, outputs), drawn(outputs)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(device, dtype)
    count = kernels.parts(rows, outputs, inputs)
    assert count == min(inputs // 256 or 1, 132)
    parts, whole = guarded((count, rows, outputs), torch.float32, device)
    kernels.linear(y, [weight], [bias], parts, early=early)
    whole()
    product = F.linear(y.double(), weight.double(), bias.double())
    assert (parts.double().sum(0) - product).abs().max() <= 1e-5
    gain, shift, head = drawn(outputs), drawn(outputs), (torch.randn(48, outputs) / outputs**0.5).to(device, dtype)
    before, out = x.double(), x.new_empty(rows, 48)
    kernels.linear(
        x, [head], None, out, added=parts, norm=norm, gain=None if norm == "none" else gain,
        shift=shift if norm == "layer" else None, eps=1e-5, early=early,
    )  # fmt: skip
    eps = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert ((x.double() - before - product).abs() <= eps * (before + product).abs() + 2e-5).all()
    want = reference(x, [head], [None], norm, gain, shift, 1e-5, "none", False, None, None)
    assert (out.double() - want).abs().max() <= 4 * eps * want.abs().max()


@pytest.mark.parametrize(
    ("heads", "groups", "width", "length", "begin", "tokens", "turned"),
    [(4, 2, 20, 5, 3, 2, True), (3, 3, 64, 9, 0, 2, False), (4, 1, 32, 4, 3, 1, True), (2, 2, 8, 1, 0, 1, False)],
)
def test_attention(heads, groups, width, length, begin, tokens, turned, place):
    device, dtype = place
    torch.manual_seed(0)
    rows = 3
    qkv = torch.randn(tokens * rows, (heads + 2 * groups) * width).to(device, dtype)
    cache = torch.randn(2, rows, groups, length, width).to(device, dtype)
    before = cache.clone()
    gains = [(1 + 0.2 * torch.randn(width)).to(device, dtype) if turned else None for _ in range(2)]
    angle = torch.rand(length, width // 2).double() * 6
    rope = torch.stack([angle.cos(), angle.sin()]).to(device) if turned else None
    out, whole = guarded((tokens * rows, heads * width), dtype, device)
    _native.kernels("depth").attend(
        qkv, *gains, None if rope is None else rope.float(), cache, out, tokens=tokens, begin=begin, heads=heads,
        norm=turned, eps=1e-6, early=device == "cuda",
    )  # fmt: skip
    whole()

    def prepared(x, gain):  # (tokens, rows, heads, width)
        x = x.double()
        if turned:
            x = F.rms_norm(x, (width,), gain.double(), 1e-6)
            cosine, sine = (part[begin : begin + tokens, None, None] for part in rope)
            even, odd = x[..., ::2], x[..., 1::2]
            x = torch.stack([cosine * even - sine * odd, sine * even + cosine * odd], -1).flatten(-2)
        return x.to(dtype).double()

    split = qkv.view(tokens, rows, heads + 2 * groups, width)
    q, k, v = split.split([heads, groups, groups], 2)
    q, k = prepared(q, gains[0]), prepared(k, gains[1])
    allowed = 2 ** {torch.float32: -18, torch.float16: -9, torch.bfloat16: -6}[dtype]
    new = cache[:, :, :, begin : begin + tokens].permute(0, 3, 1, 2, 4).double()
    assert (new[0] - k).abs().max() <= allowed
    assert torch.equal(new[1], v.double())
    cache[:, :, :, begin : begin + tokens] = before[:, :, :, begin : begin + tokens]
    assert torch.equal(cache, before), "wrote another place"
    for t in range(tokens):
        seen = before.double()
        seen[0, :, :, begin : begin + tokens], seen[1, :, :, begin : begin + tokens] = (
            one.double().permute(1, 2, 0, 3) for one in (k, v)
        )
        keys, values = (one[:, :, : begin + t + 1].repeat_interleave(heads // groups, 1) for one in seen)
        want = F.scaled_dot_product_attention(q[t].unsqueeze(2), keys, values).squeeze(2).flatten(1)
        assert (out[t * rows : (t + 1) * rows].double() - want).abs().max() <= 4 * allowed


# ---- what it does not take, and what is chosen


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "needs bfloat16, float16 or float32, got float64"),
        ({"book_dtype": torch.float64}, "needs a codebook of float32 or less"),
        ({"depth": 129, "layers": 1}, "needs tokens times a head's width up to 8192, got 256 x 64"),
    ],
)
def test_what_the_kernels_cannot_do(change, reason):
    if missing := interpreter_skip():
        pytest.skip(missing)
    case = small_case(**({"dtype": torch.float32, "layers": 0, "depth": 2} | change))
    with pytest.raises(ValueError, match=reason):
        case.run("triton")


def test_weights_with_gaps_are_refused():
    if missing := interpreter_skip():
        pytest.skip(missing)
    case = small_case(dtype=torch.float32, layers=0)
    head, bias = case.weights.head
    gaps = torch.cat([head, head], 1)[:, : head.shape[1]]
    with pytest.raises(ValueError, match="needs contiguous weights"), torch.no_grad():
        depth_decode(case.hidden, case.codebook, case.weights._replace(head=(gaps, bias)), backend="triton")


def test_who_serves(monkeypatch):
    case = small_case()
    arguments = (case.hidden, case.codebook, case.weights)
    assert served_by(*arguments) == "eager"
    assert served_by(*arguments, "triton") == "triton"
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "cuda")
    assert served_by(*arguments) == "cuda"
    assert served_by(*arguments, "eager") == "eager"


# ---- captured


def test_a_session_decodes_what_it_is_given(monkeypatch):
    """Its steps called instead of captured: inputs are copied in, noise is drawn as the operator draws it."""
    if reason := interpreter_skip():
        pytest.skip(reason)
    steps = engine.Steps
    monkeypatch.setattr(engine, "Steps", lambda runs, graphs: steps(runs, graphs=False))
    module = built(DepthStyle(state="before", norm="rms"), layers=1).float()
    hidden, codebook, start = (x.float() for x in inputs(module, 4))
    strength = torch.tensor([1.5, 3.0])
    settings = {"guidance": strength, "temperature": [1.0, 0.0, 0.7, 1.0], "top_k": 9, "top_p": 0.0}
    given = {"noise": None, "forced": None, "start": start}
    session = _Session(module.weights(), hidden, codebook, settings, given, True)
    with torch.no_grad():
        for _ in range(2):
            hidden, start = torch.randn_like(hidden), torch.randn_like(start)
            strength = strength + 1
            got = session.run(hidden, strength, given | {"start": start}, torch.Generator().manual_seed(3))
            want = depth_decode(
                hidden, codebook, module.weights(), start=start, return_logits=True, backend="triton",
                generator=torch.Generator().manual_seed(3), **(settings | {"guidance": strength}),
            )  # fmt: skip
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [True, False])
def test_the_module_replays_a_graph(noise):
    module = built(FULLEST).to("cuda", torch.bfloat16)
    hidden, codebook, start = (x.to("cuda", torch.bfloat16) for x in inputs(built(FULLEST), 4))
    for seed in range(3):
        hidden = hidden + seed
        drawn = torch.empty(4, DEPTH, CODES, device="cuda").exponential_() if noise else None

        def decode(graphs, hidden=hidden, drawn=drawn, seed=seed):
            generator = None if noise else torch.Generator("cuda").manual_seed(seed)
            return module.decode(
                hidden, codebook, start=start, noise=drawn, generator=generator, top_k=9, return_logits=True,
                backend="triton", graphs=graphs,
            )  # fmt: skip

        got, want = decode(True), decode(False)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
    assert len(module._kept._sessions) == 1
    with torch.no_grad():
        module.classifier_mlp.linear.weight.mul_(2)  # the graph reads what is there
    got, want = decode(True), decode(False)
    assert torch.equal(got.logits, want.logits)
    with pytest.raises(ValueError, match="start must be"):
        module.decode(hidden, codebook, start=start[:2], backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_launches_that_begin_early_change_nothing(rows, monkeypatch):
    """The same bits whether a launch waits for the whole one ahead or only where it must, a thousand times."""
    module = built(FULLEST, layers=3).to("cuda", torch.bfloat16)
    hidden, codebook, start = (x.to("cuda", torch.bfloat16) for x in inputs(built(FULLEST), rows))
    noise = torch.empty(rows, DEPTH, CODES, device="cuda").exponential_()
    options = {"start": start, "noise": noise, "backend": "triton", "return_logits": True}
    session = module.decode(hidden, codebook, **options)
    step = depth_triton._Step
    monkeypatch.setattr(depth_triton, "_Step", lambda weights, early: step(weights, False))
    want = module.decode(hidden, codebook, graphs=False, **options)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        session = module.decode(hidden, codebook, **options)
        for one, other in zip(session, want, strict=True):
            wrong += (one != other).sum()
    assert wrong.item() == 0
