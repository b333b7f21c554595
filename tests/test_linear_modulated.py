"""`modulated_linear`, `gated_linear`: backends by a float64 oracle, odd sizes, views, who takes which, bad input."""

import dataclasses

import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, kernel_rooms
from torch import Tensor

from unifiedar.ops import _native, gated_linear, linear_modulated, modulated_linear, modulated_norm, registry

HALF = ("float16", "bfloat16")
ROOMS = [
    c
    for c in kernel_rooms()
    if c.values[0][0] == "eager" or (c.values[0][0] == "triton" and c.id.endswith(tuple(f"-{one}" for one in HALF)))
]
rooms = pytest.mark.parametrize("room", ROOMS, indirect=True)
triton_rooms = pytest.mark.parametrize("room", [c for c in ROOMS if c.values[0][0] == "triton"], indirect=True)

# Pictures, tokens of each, K, N: one row a picture, a picture's rows in two tiles, ragged tiles everywhere, more than
# one tile of rows, K below a step and not a multiple of it.
SHAPES = [(2, 1, 64, 48), (2, 4, 144, 40), (3, 7, 48, 100), (2, 9, 320, 72), (2, 37, 64, 33), (1, 300, 16, 5)]


def tokens_of(room, batch, length, inputs, outputs, seed=0) -> dict[str, Tensor]:
    """Tokens in float32, of another mean and deviation a row; scale and shift are two of six vectors a picture."""
    _, device, dtype = room
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, inputs, generator=g) * torch.rand(batch, length, 1, generator=g) * 5
    six = torch.randn(batch, 6, inputs, generator=g).to(device, dtype)
    weight = torch.randn(outputs, inputs, generator=g) / inputs**0.5
    return {
        "x": (x + torch.randn(batch, length, 1, generator=g)).to(device),
        "scale": six[:, 2],
        "shift": six[:, 4],
        "weight": weight.to(device, dtype),
        "bias": torch.randn(outputs, generator=g).to(device, dtype),
    }


def branch_of(room, batch, length, inputs, outputs, seed=0) -> dict[str, Tensor]:
    _, device, dtype = room
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, length, inputs, generator=g).to(device, dtype),
        "weight": (torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(device, dtype),
        "bias": torch.randn(outputs, generator=g).to(device, dtype),
        "tokens": torch.randn(batch, length, outputs, generator=g).to(device),
        "gate": torch.randn(batch, 6, outputs, generator=g).to(device, dtype)[:, 1],
    }


def doubled(given: dict) -> dict:
    return {name: one.double() if isinstance(one, Tensor) else one for name, one in given.items()}


def check(function, room, given, **options):
    """Against float64, which for "triton" says too whether the definition is as good as it ought to be."""
    got, eager = (function(**given, **options, backend=name) for name in (room[0], "eager"))
    exact = function(**doubled(given), **options, backend="eager")
    assert_as_good_as_eager(got, eager, exact)
    return got


# ---- definitions


@rooms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulated_linear(room, shape):
    given = tokens_of(room, *shape)
    for activation in (None, "gelu"):
        got = check(modulated_linear, room, given, activation=activation, eps=1e-6)
        assert got.dtype == room[2]
        assert got.is_contiguous()
    check(modulated_linear, room, {**given, "bias": None}, eps=1e-2)


@rooms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_linear(room, shape):
    given = branch_of(room, *shape)
    assert check(gated_linear, room, given).dtype == torch.float32
    check(gated_linear, room, {**given, "bias": None})
    half = {**given, "tokens": given["tokens"].to(room[2])}
    assert check(gated_linear, room, half).dtype == room[2]


def test_definitions_by_hand():
    """The two are what their formulas say, in float64, written another way."""
    given = doubled(tokens_of(("eager", "cpu", torch.float64), 2, 3, 8, 5))
    x = given["x"]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = (normed * (1 + given["scale"][:, None]) + given["shift"][:, None]) @ given["weight"].T + given["bias"]
    torch.testing.assert_close(modulated_linear(**given), y)
    gelu = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(modulated_linear(**given, activation="gelu"), gelu)
    given = doubled(branch_of(("eager", "cpu", torch.float64), 2, 3, 8, 5))
    y = torch.einsum("blk,nk->bln", given["x"], given["weight"]) + given["bias"]
    torch.testing.assert_close(gated_linear(**given), given["tokens"] + torch.einsum("bln,bn->bln", y, given["gate"]))


@rooms
def test_a_row_of_one_value_is_its_shift(room):
    """Variance 0: what is left is eps."""
    given = tokens_of(room, 2, 3, 64, 64)
    given["x"] = torch.full_like(given["x"], 3.5)
    unit = torch.eye(64, device=room[1], dtype=room[2])
    got = modulated_linear(**{**given, "weight": unit, "bias": None}, backend=room[0])
    assert torch.equal(got, given["shift"][:, None].expand_as(got))


@rooms
def test_large_arguments_of_gelu(room):
    """Far out it is the identity or 0, never inf or nan."""
    given = tokens_of(room, 1, 1, 16, 4)
    given["bias"] = torch.tensor([300.0, -300.0, 30.0, -30.0], device=room[1]).to(room[2])
    got = modulated_linear(**{**given, "weight": torch.zeros_like(given["weight"])}, activation="gelu", backend=room[0])
    assert torch.equal(got.flatten().float().cpu(), torch.tensor([300.0, 0.0, 30.0, 0.0]))


# ---- the kernel


@triton_rooms
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 33, 64, 65, 129, 257])
def test_every_tile(room, rows):
    """The tiles of few rows and of many, the norm in the product and before it."""
    check(modulated_linear, room, tokens_of(room, 1, rows, 80, 70), activation="gelu")
    check(gated_linear, room, branch_of(room, 1, rows, 80, 70))
    if rows <= 17:
        check(modulated_linear, room, tokens_of(room, 1, rows, 32, 5200))


@triton_rooms
def test_norm_in_the_product_and_before_it_agree(room):
    kernels = _native.kernels("linear_modulated")
    given = tokens_of(room, 2, 5, 160, 48)
    outs = [torch.empty(2, 5, 48, dtype=room[2], device=room[1]) for _ in range(2)]
    for inside, out in zip((False, True), outs, strict=True):
        kernels.modulated_linear(
            given["x"], given["scale"], given["shift"], 1e-6, given["weight"], given["bias"], False, out, inside=inside
        )
    exact = modulated_linear(**doubled(given))
    eager = modulated_linear(**given, backend="eager")
    for out in outs:
        assert_as_good_as_eager(out, eager, exact)


@triton_rooms
def test_views(room):
    """Tokens of any strides, misaligned ones, vectors whose channels are apart: the same to the bit."""
    given = tokens_of(room, 2, 3, 48, 40)
    plain = check(modulated_linear, room, given)
    odd = torch.empty(given["x"].numel() + 1, device=room[1])[1:].view(given["x"].shape).copy_(given["x"])
    wide = torch.stack((given["scale"], given["scale"]), -1)[..., 0]
    turned = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for change in ({"x": odd}, {"x": turned}, {"scale": wide}):
        assert torch.equal(check(modulated_linear, room, {**given, **change}), plain)
    assert modulated_linear(**{**given, "x": given["x"][:, :0]}, backend="triton").shape == (2, 0, 40)
    given = branch_of(room, 2, 3, 48, 40)
    plain = check(gated_linear, room, given)
    for name in ("x", "tokens"):
        apart = given[name].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(check(gated_linear, room, {**given, name: apart}), plain)


@triton_rooms
def test_writes_what_it_should_and_nothing_else(room):
    kernels = _native.kernels("linear_modulated")
    for shape in ((2, 3, 64, 44), (1, 37, 32, 100)):
        given = tokens_of(room, *shape)
        out, check_out = guarded((*shape[:2], shape[3]), room[2], room[1])
        kernels.modulated_linear(
            given["x"], given["scale"], given["shift"], 1e-6, given["weight"], given["bias"], True, out
        )
        check_out()
        out, check_out = guarded((*shape[:2], shape[3]), torch.float32, room[1])
        kernels.gated_linear(*branch_of(room, *shape).values(), out)
        check_out()


@triton_rooms
def test_the_same_every_time(room):
    """Each launch may begin while the one before still runs, so they are tried in a row."""
    first, second = tokens_of(room, 2, 4, 256, 512), branch_of(room, 2, 4, 512, 256)

    def both() -> Tensor:
        y = modulated_linear(**first, activation="gelu", backend="triton")
        return gated_linear(**{**second, "x": y, "tokens": first["x"]}, backend="triton")

    want = both()
    found = [both() for _ in range(2000 if room[1] == "cuda" else 2)]
    assert all(torch.equal(one, want) for one in found)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 4, 9, 36, 64, 256])
@pytest.mark.parametrize("width", [1024, 1280, 1536, 1920, 2304])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_the_models(width, length, dtype):
    room = ("triton", "cuda", dtype)
    check(modulated_linear, room, tokens_of(room, 2, length, width, 3 * width))
    check(modulated_linear, room, tokens_of(room, 2, length, width, 4 * width), activation="gelu")
    check(gated_linear, room, branch_of(room, 2, length, 4 * width, width))


@pytest.mark.gpu
def test_a_chain_in_a_graph():
    """Dependent launches stay so in a graph: what a layer wrote is there when the next reads it."""
    room = ("triton", "cuda", torch.float16)
    layers = [(tokens_of(room, 2, 4, 1024, 4096, i), branch_of(room, 2, 4, 4096, 1024, i)) for i in range(8)]

    def run(wait: bool) -> Tensor:
        tokens = layers[0][0]["x"]
        for first, second in layers:
            y = modulated_linear(**{**first, "x": tokens}, activation="gelu", backend="triton")
            if wait:
                torch.cuda.synchronize()
            tokens = gated_linear(**{**second, "x": y, "tokens": tokens}, backend="triton")
            if wait:
                torch.cuda.synchronize()
        return tokens

    want = run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(False)
    for _ in range(500):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 8, 9, 64, 65, 200, 5000])
def test_tiles_are_what_a_launch_takes(rows):
    kernels = pytest.importorskip("unifiedar.kernels.linear_modulated")
    for outputs, inputs in ((3072, 1024), (1024, 4096), (7680, 1920), (1920, 7680), (40, 16)):
        one = kernels.tile(rows, outputs, inputs)
        for size in dataclasses.astuple(one)[:5]:
            assert size & (size - 1) == 0
        assert one.rows >= min(rows, 64)
        # Warps share out the tiles of 16 outputs and the ways; none does another's work.
        assert one.outputs // 16 * one.ways == one.warps


# ---- who takes which


def test_few_rows(monkeypatch):
    monkeypatch.setattr(linear_modulated, "FEW_ROWS", 6)
    given = tokens_of(("eager", "cpu", torch.float16), 2, 3, 32, 16)

    def few(**change) -> bool:
        x, scale, shift, weight, _ = {**given, **change}.values()
        return linear_modulated.few_rows(x, scale, shift, weight)

    assert not few()  # on the CPU "auto" is the definition
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("UNIFIEDAR_BACKEND", "triton")
        assert few()
        assert not few(x=torch.cat((given["x"], given["x"]), 1))
        assert not few(weight=given["weight"].float())
        monkeypatch.setenv("UNIFIEDAR_BACKEND", "eager")
        assert not few()


def test_says_why_a_backend_does_not_fit():
    explain = registry["modulated_linear"].explain
    given = tokens_of(("eager", "cpu", torch.float16), 1, 1, 24, 16)
    call = [*given.values(), 0.0, False]
    assert "needs" in explain(*call)["triton"]  # K
    call[3] = call[3].float()
    assert "needs" in explain(*call)["triton"]
    assert explain(*call)["eager"] == "fits"
    given = branch_of(("eager", "cpu", torch.float16), 1, 1, 24, 16)
    assert "needs" in registry["gated_linear"].explain(*given.values())["triton"]


def test_compile_and_check():
    given = tokens_of(("eager", "cpu", torch.float32), 2, 3, 8, 5)
    torch.library.opcheck(registry["modulated_linear"].overload, (*given.values(), 1e-6, True, "auto"))
    compiled = torch.compile(modulated_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), modulated_linear(**given))
    given = branch_of(("eager", "cpu", torch.float32), 2, 3, 8, 5)
    torch.library.opcheck(registry["gated_linear"].overload, (*given.values(), "auto"))


def test_autocast_changes_nothing():
    given = tokens_of(("eager", "cpu", torch.float32), 2, 3, 8, 5)
    other = branch_of(("eager", "cpu", torch.float32), 2, 3, 8, 5)
    want = modulated_linear(**given), gated_linear(**other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(modulated_linear(**given), want[0])
        assert torch.equal(gated_linear(**other), want[1])


def test_it_is_the_norm_and_then_the_layer():
    given = tokens_of(("eager", "cpu", torch.bfloat16), 2, 3, 32, 16)
    y = modulated_norm(given["x"], given["scale"], given["shift"], dtype=torch.bfloat16)
    want = torch.nn.functional.linear(y, given["weight"], given["bias"])
    assert torch.equal(modulated_linear(**given), want)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, L, K\)"),
        ({"weight": torch.zeros(3, 4).int()}, TypeError, "weight must be float32"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight must be \(N, 4\) to match x"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias must be float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(3,\) to match weight"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"scale": torch.zeros(2, 3)}, ValueError, r"scale must be \(2, 4\) to match x"),
        ({"shift": torch.zeros(1, 4)}, ValueError, r"shift must be \(2, 4\) to match x"),
        ({"activation": "relu"}, ValueError, "activation must be None or 'gelu', got 'relu'"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"weight": torch.zeros(3, 4, requires_grad=True)}, ValueError, "must not need a gradient"),
        ({"backend": "cuda"}, ValueError, "backend must be one that this operator has"),
    ],
)
def test_bad_input_of_modulated_linear(change, error, text):
    given = {"x": torch.zeros(2, 1, 4), "scale": torch.zeros(2, 4), "shift": torch.zeros(2, 4)}
    given |= {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), **change}
    with pytest.raises(error, match=f"modulated_linear: .*{text}"):
        modulated_linear(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 1, 4).half()}, TypeError, "x must be float32"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, L, K\)"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight must be \(N, 4\) to match x"),
        ({"tokens": torch.zeros(2, 1, 4)}, ValueError, r"tokens must be \(2, 1, 3\) to match x"),
        ({"gate": torch.zeros(2, 1, 3)}, ValueError, r"gate must be \(2, 3\) to match x"),
        ({"gate": torch.zeros(2, 3, requires_grad=True)}, ValueError, "must not need a gradient"),
    ],
)
def test_bad_input_of_gated_linear(change, error, text):
    given = {"x": torch.zeros(2, 1, 4), "weight": torch.zeros(3, 4), "bias": None}
    given |= {"tokens": torch.zeros(2, 1, 3), "gate": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=f"gated_linear: .*{text}"):
        gated_linear(**given)
