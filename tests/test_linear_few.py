"""`few_linear`, `linear_parts`, `parts_norm`: backends by a float64 oracle, odd sizes, views; who takes them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms
from torch import Tensor, nn

from unifiedar.checkpoints import quantize_rows
from unifiedar.nn import Linear8bit, ModulatedNorm, gelu_of, in_parts, of_few
from unifiedar.ops import (
    _native,
    few_linear,
    linear_8bit,
    linear_few,
    linear_parts,
    modulated_norm,
    parts_norm,
    registry,
)
from unifiedar.ops.linear import parts_of
from unifiedar.ops.linear_few import few_rows

ROOMS = [c for c in kernel_rooms() if c.values[0][0] != "cuda"]
rooms = pytest.mark.parametrize("room", ROOMS, indirect=True)
HALF = [c for c in ROOMS if c.values[0][0] == "eager" or "16" in c.id]
half_rooms = pytest.mark.parametrize("room", HALF, indirect=True)
triton_rooms = pytest.mark.parametrize("room", [c for c in HALF if c.values[0][0] == "triton"], indirect=True)


def product_of(room, rows, outputs, inputs, seed=0) -> dict[str, Tensor]:
    _, device, dtype = room
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=g) / inputs**0.5
    return {"x": torch.randn(rows, inputs, generator=g).to(device, dtype), "weight": weight.to(device, dtype)}


def in_8bit(given: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The same with its weights in 8 bits."""
    weight, scale = quantize_rows(given["weight"].float(), form)
    return {"x": given["x"], "weight": weight, "scale": scale}


def widened(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, where weights of 8 bits are what they stand for."""
    if "scale" not in given:
        return doubled(given)
    weight = given["weight"].float().double() * given["scale"].double()[:, None]  # a GPU widens to float32 alone
    return {"x": given["x"].double(), "weight": weight}


def norm_of(room, parts, batch, length, width, seed=0) -> dict[str, Tensor]:
    """Tokens of another mean and deviation a row, in float32; the six vectors of a picture lie together."""
    _, device, dtype = room
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=g) * torch.rand(batch, length, 1, generator=g) * 5
    six = torch.randn(batch, 6, width, generator=g).to(device, dtype)
    return {
        "x": (x + torch.randn(batch, length, 1, generator=g)).to(device),
        "sums": torch.randn(parts, batch, length, width, generator=g).to(device),
        "gate": six[:, 0],
        "scale": six[:, 2],
        "shift": six[:, 4],
        "bias": torch.randn(width, generator=g).to(device, dtype),
    }


def doubled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.double() for name, one in given.items()}


# ---- the product

# Rows, N, K: fewer rows than a tile and several of every size; ragged tiles of outputs; K no multiple of a step.
SHAPES = [(1, 64, 64), (2, 70, 336), (9, 33, 640), (17, 5, 48), (33, 130, 128), (70, 65, 400), (130, 3, 16)]


def check_product(room, given, bias=None, activation=None):
    got, eager = (few_linear(**given, bias=bias, activation=activation, backend=name) for name in (room[0], "eager"))
    exact = few_linear(**widened(given), bias=None if bias is None else bias.double(), activation=activation)
    assert_as_good_as_eager(got, eager, exact)
    return got


@half_rooms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_linear(room, shape):
    given = product_of(room, *shape)
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).to(room[1], room[2])
    for activation in (None, "gelu"):
        check_product(room, given, bias, activation)
    check_product(room, given)


def test_few_linear_by_hand():
    given = doubled(product_of(("eager", "cpu", torch.float32), 3, 5, 8))
    y = torch.einsum("mk,nk->mn", given["x"], given["weight"])
    torch.testing.assert_close(few_linear(**given), y)
    gelu = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(few_linear(**given, activation="gelu"), gelu)


@half_rooms
def test_large_arguments_of_gelu(room):
    """Far out it is the identity or 0, never inf or nan."""
    given = product_of(room, 1, 4, 16)
    given["x"].zero_()
    bias = torch.tensor([300.0, -300.0, 30.0, -30.0], device=room[1]).to(room[2])
    got = few_linear(**given, bias=bias, activation="gelu", backend=room[0])
    assert torch.equal(got.flatten().float().cpu(), torch.tensor([300.0, 0.0, 30.0, 0.0]))


def check_parts(room, given, parts=None):
    """Parts add up to the product, as near as the same product in the same dtype: their sums are float32, but as matrix
    units add up, which is not as near as a float32 product."""
    got = linear_parts(**given, parts=parts, backend=room[0])
    assert got.dtype == torch.float32
    exact = widened(given)["x"] @ widened(given)["weight"].T
    torch.testing.assert_close(linear_parts(**widened(given), parts=len(got)).sum(0), exact)
    eager = linear_8bit(**given, backend="eager") if "scale" in given else F.linear(given["x"], given["weight"])
    assert_as_good_as_eager(got.sum(0).to(room[2]), eager, exact)
    return got


@half_rooms
def test_linear_parts(room):
    """One part and several, the last one shorter or nothing."""
    for (rows, outputs, inputs), parts in zip(SHAPES, (1, 2, 3, 1, 4, 5, 1), strict=True):
        assert len(check_parts(room, product_of(room, rows, outputs, inputs), parts)) == parts


@half_rooms
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_weights_of_8_bits(room, form):
    """Whole and in parts; parts of K that are no multiple of a program's step."""
    for (rows, outputs, inputs), parts in zip(SHAPES, (1, 2, 3, 1, 2, 5, 1), strict=True):
        given = in_8bit(product_of(room, rows, outputs, inputs), form)
        bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).to(room[1], room[2])
        check_product(room, given, bias)
        check_product(room, given, activation="gelu")
        assert len(check_parts(room, given, parts)) == parts
    whole = linear_parts(**widened(given), parts=1)
    torch.testing.assert_close(linear_parts(given["x"].double(), given["weight"], 1, scale=given["scale"]), whole)


@half_rooms
def test_a_part_is_what_it_says(room):
    """Entries of its own part alone reach it."""
    given = product_of(room, 3, 16, 320)
    for part, (begin, end) in enumerate([(0, 128), (128, 256), (256, 320)]):
        x = torch.zeros_like(given["x"])
        x[:, begin:end] = given["x"][:, begin:end]
        got = linear_parts(x, given["weight"], 3, backend=room[0])
        assert [bool(one.any()) for one in got] == [i == part for i in range(3)]


@triton_rooms
def test_views(room):
    given = product_of(room, 12, 48, 64)
    plain = linear_parts(**given, parts=1, backend="triton")
    x = given["x"].view(3, 4, 64)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    odd = torch.empty(x.numel() + 1, dtype=room[2], device=room[1])[1:].view(3, 4, 64).copy_(x)
    for one in (x, apart, odd):
        assert torch.equal(linear_parts(one, given["weight"], 1, backend="triton"), plain.view(1, 3, 4, 48))
    assert linear_parts(x[:0], given["weight"], 2, backend="triton").shape == (2, 0, 4, 48)


@triton_rooms
def test_writes_what_it_should_and_nothing_else(room):
    for rows, outputs, inputs, parts in ((2, 70, 256, 2), (37, 33, 64, 1)):
        out, check_out = guarded((parts, rows, outputs), torch.float32, room[1])
        _native.kernels("linear_few").linear_parts(*product_of(room, rows, outputs, inputs).values(), None, out)
        check_out()


@triton_rooms
def test_the_same_every_time(room):
    given = product_of(room, 5, 256, 1024)
    first = linear_parts(**given, parts=4, backend="triton")
    for _ in range(2000 if room[1] == "cuda" else 2):
        assert torch.equal(linear_parts(**given, parts=4, backend="triton"), first)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 18, 72, 512])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 1024), (torch.bfloat16, 1920), (torch.float16, 2304)])
def test_layers_of_the_models(rows, width, dtype):
    room = ("triton", "cuda", dtype)
    for outputs, inputs in ((width, 4 * width), (width, width)):
        check_parts(room, product_of(room, rows, outputs, inputs))
    given = product_of(room, rows, 4 * width, width)
    check_product(room, given, given["weight"][:, 0].contiguous(), "gelu")
    bias = given["weight"][:, 0].contiguous()
    for form in ("int8", "fp8"):
        check_product(room, in_8bit(given, form), bias, "gelu")
        check_parts(room, in_8bit(product_of(room, rows, width, 4 * width), form))


@pytest.mark.gpu
def test_a_chain_of_dependent_launches():
    """Each begins before the one before is over; what that wrote is there all the same, a thousand times in a graph."""
    room = ("triton", "cuda", torch.float16)
    layers = [(product_of(room, 2, 4096, 1024, i), product_of(room, 2, 1024, 4096, i)) for i in range(8)]
    six = norm_of(room, 1, 2, 4, 1024)

    def run(wait: bool) -> Tensor:
        tokens, y = six["x"], six["x"].half()
        for up, down in layers:
            hidden = few_linear(y, up["weight"], activation="gelu", backend="triton")
            if wait:
                torch.cuda.synchronize()
            sums = linear_parts(hidden, down["weight"], backend="triton")
            if wait:
                torch.cuda.synchronize()
            y, tokens = parts_norm(**{**six, "x": tokens, "sums": sums}, dtype=torch.float16, backend="triton")
            if wait:
                torch.cuda.synchronize()
        return tokens

    want = run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(False)
    for _ in range(1000):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 18, 64, 65, 200, 5000])
@pytest.mark.parametrize("bits", [16, 8])
def test_parts_are_not_too_many(rows, bits):
    for outputs, inputs in ((1024, 4096), (1024, 1024), (1920, 7680), (64, 64), (5, 48)):
        parts = parts_of(rows, outputs, inputs, bits)
        assert parts == 1 or inputs // parts >= 256
        assert 1 <= parts <= 200
        share = -(-inputs // (parts * 64)) * 64
        assert share * (parts - 1) < inputs  # the last has work
        if bits == 8 and inputs % 128 == 0:
            assert share % 128 == 0  # whole steps of a program


# ---- the norm


@rooms
def test_parts_norm(room):
    for parts, batch, length, width in ((1, 2, 1, 64), (3, 2, 5, 100), (8, 1, 7, 1030)):
        given = norm_of(room, parts, batch, length, width)
        for change in ({}, {"bias": None}):
            one = {**given, **change}
            wide = {name: None if value is None else value.double() for name, value in one.items()}
            options = {"eps": 1e-6, "dtype": room[2]}
            got, eager = (parts_norm(**one, **options, backend=name) for name in (room[0], "eager"))
            exact = parts_norm(**wide, eps=1e-6)
            for mine, definition, right in zip(got, eager, exact, strict=True):
                assert_as_good_as_eager(mine, definition, right)


def test_it_is_the_norm_of_the_sum():
    given = doubled(norm_of(("eager", "cpu", torch.float32), 3, 2, 5, 16))
    sums, bias = given.pop("sums"), given.pop("bias")
    want = modulated_norm(**given, branch=sums.sum(0) + bias)
    for got, right in zip(parts_norm(**given, sums=sums, bias=bias), want, strict=True):
        torch.testing.assert_close(got, right)


@triton_rooms
def test_vectors_of_any_strides(room):
    given = norm_of(room, 2, 2, 3, 48)
    want = parts_norm(**given, backend="triton")
    apart = {name: torch.stack((given[name],) * 2, -1)[..., 0] for name in ("gate", "scale", "shift", "bias")}
    turned = {"x": given["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    for change in (apart, turned):
        got = parts_norm(**{**given, **change}, backend="triton")
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


# ---- who takes them


def test_few_rows(monkeypatch):
    given = product_of(("eager", "cpu", torch.float16), 6, 16, 32)
    assert not few_rows(**given)  # on the CPU "auto" is the definition
    if reason := interpreter_skip():
        pytest.skip(reason)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    assert few_rows(**given)
    monkeypatch.setattr(linear_few, "FEW", 5 * 16)
    assert not few_rows(**given)
    monkeypatch.undo()
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    assert not few_rows(given["x"].float(), given["weight"])
    assert not few_rows(given["x"].float(), given["weight"].float())
    assert not few_rows(given["x"], given["weight"].clone().requires_grad_())
    assert not few_rows(**given, bias=torch.zeros(16).half().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not few_rows(**given)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "eager")
    assert not few_rows(**given)


def test_in_parts(monkeypatch):
    """A layer in parts and the norm that adds them up are the layer and the norm."""
    layer, norm = nn.Linear(64, 32).half().requires_grad_(False), ModulatedNorm()
    given = norm_of(("eager", "cpu", torch.float16), 1, 2, 3, 32)
    x = torch.randn(2, 3, 64).half()
    gate, scale, shift = given["gate"], given["scale"], given["shift"]
    want = norm.add(given["x"], in_parts(layer, x), gate, scale, shift)
    assert isinstance(in_parts(layer, x), Tensor)
    if reason := interpreter_skip():
        pytest.skip(reason)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    branch = in_parts(layer, x)
    assert isinstance(branch, tuple)
    for got, right in zip(norm.add(given["x"], branch, gate, scale, shift), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(in_parts(layer, x), Tensor)


def test_what_is_added_to_a_layer_is_not_passed_by(monkeypatch):
    if reason := interpreter_skip():
        pytest.skip(reason)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(1, 3, 64).half()
    plain, adapted = (kind(64, 32).half().requires_grad_(False) for kind in (nn.Linear, Adapted))
    adapted.load_state_dict(plain.state_dict())
    assert isinstance(in_parts(plain, x), tuple)
    assert torch.equal(in_parts(adapted, x), plain(x) + 1)
    assert torch.equal(of_few(adapted, x), plain(x) + 1)
    assert torch.equal(gelu_of(adapted, x), F.gelu(plain(x) + 1, approximate="tanh"))
    seen: list[object] = []
    plain.register_forward_hook(lambda *what: seen.append(what))
    for call in (of_few, gelu_of, in_parts):
        call(plain, x)
    assert len(seen) == 3


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_layers_of_8_bits(monkeypatch, form):
    """Which stand in for `nn.Linear` wherever few rows are looked for; where "eager" was asked for it is kept."""
    dense = nn.Linear(64, 32).half().requires_grad_(False)
    weight, scale = quantize_rows(dense.weight, form)
    layer, plain = (Linear8bit(weight, scale, dense.bias, torch.float16, backend=b) for b in ("auto", "eager"))
    x, bias = torch.randn(2, 3, 64).half(), torch.randn(32).half()
    want = of_few(plain, x, bias), gelu_of(plain, x), plain(x)
    torch.testing.assert_close(want[1], F.gelu(plain(x), approximate="tanh"))
    if reason := interpreter_skip():
        pytest.skip(reason)
    monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
    branch = in_parts(layer, x)
    assert isinstance(branch, tuple)
    assert isinstance(in_parts(plain, x), Tensor)
    got = of_few(layer, x, bias), gelu_of(layer, x), (branch[0].sum(0) + branch[1]).half()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_compile_and_check():
    given = product_of(("eager", "cpu", torch.float32), 3, 5, 128)
    torch.library.opcheck(registry["linear_parts"].overload, (*given.values(), None, 2, "auto"))
    compiled = torch.compile(linear_parts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given, parts=2), linear_parts(**given, parts=2))
    torch.library.opcheck(registry["few_linear"].overload, (*given.values(), None, None, True, "auto"))
    norm = norm_of(("eager", "cpu", torch.float32), 2, 2, 3, 8)
    torch.library.opcheck(registry["parts_norm"].overload, (*norm.values(), 1e-6, torch.float32, "auto"))


def test_says_why_a_backend_does_not_fit():
    x, weight = torch.zeros(1, 24).half(), torch.zeros(3, 24).half()
    explain = registry["linear_parts"].explain
    assert "needs" in explain(x, weight, None, 1)["triton"]  # K
    assert "needs" in explain(x.float(), weight.float(), None, 1)["triton"]
    assert explain(x, weight, None, 1)["eager"] == "fits"


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1]}, TypeError, "x must be a tensor"),
        ({"weight": torch.zeros(3, 4).half()}, TypeError, "weight must be float32"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \(N, K\)"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \(..., 4\) to match weight"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"parts": 0}, ValueError, "parts must be at least 1"),
        ({"scale": torch.ones(3)}, TypeError, "weight must be int8, float8_e4m3fn"),
        ({"weight": torch.zeros(3, 4).to(torch.int8)}, TypeError, "weight must be float32"),
        ({"weight": torch.zeros(3, 4).to(torch.int8), "scale": torch.ones(4)}, ValueError, r"scale must be \(3,\)"),
        ({"weight": torch.zeros(3, 4, requires_grad=True)}, ValueError, "must not need a gradient"),
        ({"backend": "cuda"}, ValueError, "backend must be one that this operator has"),
    ],
)
def test_bad_input_of_linear_parts(change, error, text):
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "parts": 1, **change}
    with pytest.raises(error, match=f"linear_parts: .*{text}"):
        linear_parts(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4).half()}, TypeError, "weight must be float16"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(3,\) to match weight"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias must be float32"),
        ({"activation": "relu"}, ValueError, "activation must be None or 'gelu', got 'relu'"),
        ({"bias": torch.zeros(3, requires_grad=True)}, ValueError, "must not need a gradient"),
    ],
)
def test_bad_input_of_few_linear(change, error, text):
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **change}
    with pytest.raises(error, match=f"few_linear: .*{text}"):
        few_linear(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, L, C\)"),
        ({"sums": torch.zeros(2, 1, 4)}, ValueError, r"sums must be \(parts, "),
        ({"sums": torch.zeros(0, 2, 1, 4)}, ValueError, r"sums must be \(parts, "),
        ({"gate": torch.zeros(2, 1, 4)}, ValueError, r"gate must be \(2, 4\) to match x"),
        ({"bias": torch.zeros(2, 4)}, ValueError, r"bias must be \(4,\) to match x"),
        ({"shift": torch.zeros(2, 4).int()}, TypeError, "shift must be float32"),
        ({"scale": torch.zeros(2, 4, device="meta")}, ValueError, "scale must be on the device of x"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32"),
        ({"gate": torch.zeros(2, 4, requires_grad=True)}, ValueError, "must not need a gradient"),
    ],
)
def test_bad_input_of_parts_norm(change, error, text):
    given = {"x": torch.zeros(2, 1, 4), "sums": torch.zeros(3, 2, 1, 4)}
    given |= {**dict.fromkeys(("gate", "scale", "shift"), torch.zeros(2, 4)), "bias": torch.zeros(4), **change}
    with pytest.raises(error, match=f"parts_norm: .*{text}"):
        parts_norm(**given)
