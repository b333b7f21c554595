"""`linear_8bit`: every backend against a float64 oracle, what 8 bits hold, gradients; the module; bad input."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_eager, guarded, kernel_rooms
from torch import Tensor

from unifiedar.nn import Linear8bit, gelu_of
from unifiedar.ops import _native, linear_8bit, registry, widen_8bit
from unifiedar.ops.linear import many_rows

ROOMS = [c for c in kernel_rooms() if c.values[0][0] != "cuda" and (c.values[0][0] == "eager" or "float16" in c.id)]
rooms = pytest.mark.parametrize("room", ROOMS, indirect=True)
TRITON = [c for c in ROOMS if c.values[0][0] == "triton"]
triton_rooms = pytest.mark.parametrize("room", TRITON, indirect=True)
formats = pytest.mark.parametrize("form", ["int8", "fp8"])


def arguments(room, rows, outputs, inputs, form, *, bias=True, seed=0) -> dict[str, Tensor]:
    """Every entry that the format has somewhere, and rows of very different scales."""
    _, device, dtype = room
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator)
    if form == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    else:
        bits = torch.randint(0, 256, (outputs, inputs), generator=generator)
        bits[(bits & 127) == 127] = 8  # NaN
        weight = bits.to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(outputs, generator=generator) * torch.tensor([1e-4, 1e-2]).repeat(outputs)[:outputs]
    given = {"x": x.to(device, dtype), "weight": weight.to(device), "scale": scale.to(device)}
    if bias:
        given["bias"] = torch.randn(outputs, generator=generator).to(device, dtype)
    return given


def oracle(x, weight, scale, bias=None):
    # float8 widens to float32 alone
    y = x.double() @ weight.float().double().T * scale.double()
    return y if bias is None else y + bias.double()


def check(room, given):
    got, eager = (linear_8bit(**given, backend=name) for name in (room[0], "eager"))
    assert_as_good_as_eager(got, eager, oracle(**given))
    return got


# ---- the product


@rooms
@formats
def test_shapes(room, form):
    """Fewer rows than a tile, several; ragged tiles of outputs; parts of K, the last one shorter."""
    for rows, outputs, inputs in ((1, 64, 128), (2, 200, 784), (17, 96, 4112), (33, 65, 512), (130, 130, 160)):
        check(room, arguments(room, rows, outputs, inputs, form))
    check(room, arguments(room, 3, 5, 16, form, bias=False))


@rooms
@formats
def test_every_entry_of_the_format(room, form):
    """Picked out one by one by a unit matrix: exactly, but for the scale and one rounding."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 127) != 127] if form == "fp8" else every[every != 128]
    weight = (
        F.pad(every, (0, 256 - len(every))).view(1, 256).view(torch.int8 if form == "int8" else torch.float8_e4m3fn)
    )
    weight = weight.to(room[1])
    unit = torch.eye(256, device=room[1], dtype=room[2])
    got = linear_8bit(unit, weight, torch.full((1,), 0.5, device=room[1]), backend=room[0])[:, 0]
    assert torch.equal(got.float(), weight[0].float() / 2)
    assert got.unique().numel() >= 253  # of 254 or 255, zero has two signs


@rooms
@formats
def test_many_rows(room, form):
    """The weights are widened first: as good as the definition."""
    given = arguments(room, 129, 32, 48, form)
    assert many_rows(129, 32, 48)
    check(room, given)
    check(room, given | {"bias": None})
    given["x"] = given["x"].view(3, 43, 48)
    assert check(room, given).shape == (3, 43, 32)
    assert not many_rows(256, 32, 64)
    check(room, arguments(room, 256, 32, 64, form))


@rooms
@formats
@pytest.mark.parametrize("shape", [(5, 784), (9, 1040), (1, 7), (4, 1024), (0, 16)])
def test_widened(room, form, shape):
    """Every backend rounds the same product once."""
    given = arguments(room, 1, *shape, form)
    weight, scale = given["weight"], given["scale"]
    got = widen_8bit(weight, scale, room[2], backend=room[0])
    assert got.dtype == room[2]
    assert torch.equal(got, (weight.float() * scale[:, None]).to(room[2]))
    if room[0] == "triton" and got.numel():
        out, check_out = guarded(shape, room[2], room[1])
        _native.kernels("linear").widen_8bit(weight, scale, out)
        check_out()


@rooms
def test_large_values_do_not_overflow(room):
    """Entries of 448 times activations of 30, 512 of them, are far beyond float16 before the scale is applied."""
    x = torch.full((2, 512), 30.0, device=room[1], dtype=room[2])
    for weight in (torch.full((64, 512), 448.0).to(torch.float8_e4m3fn), torch.full((64, 512), 127, dtype=torch.int8)):
        scale = 0.25 / weight.float()[:, 0].abs()
        got = linear_8bit(x, weight.to(room[1]), scale.to(room[1]), backend=room[0])
        assert torch.allclose(got.float(), torch.tensor(30.0 * 512 / 4, device=room[1]), rtol=1e-2)


@rooms
@formats
def test_views(room, form):
    # A library chooses another product for another shape, so the definition's are equal but for rounding (which `check`
    # holds); the kernel's to the bit.
    same = torch.equal if room[0] != "eager" else functools.partial(torch.allclose, rtol=1e-2, atol=1e-2)
    given = arguments(room, 12, 48, 64, form)
    plain = check(room, given)
    given["x"] = given["x"].view(3, 4, 64)
    assert same(check(room, given), plain.view(3, 4, 48))
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert same(check(room, given), plain.view(3, 4, 48))
    odd = torch.empty(12 * 64 + 1, dtype=room[2], device=room[1])[1:].view(3, 4, 64)
    given["x"] = odd.copy_(given["x"])
    assert same(check(room, given), plain.view(3, 4, 48))
    given["x"] = given["x"][:0]
    assert linear_8bit(**given, backend=room[0]).shape == (0, 4, 48)


@triton_rooms
@formats
@pytest.mark.parametrize("shape", [(2, 72, 1024, 4), (40, 130, 64, 1)])
def test_writes_what_it_should_and_nothing_else(room, form, shape):
    given = arguments(room, *shape[:3], form)
    out, check_out = guarded(shape[:2], room[2], room[1])
    _native.kernels("linear").linear_8bit(*given.values(), out, shape[3])
    check_out()


@triton_rooms
@formats
def test_the_same_every_time(room, form):
    given = arguments(room, 5, 256, 2048, form)
    first = linear_8bit(**given, backend="triton")
    for _ in range(2000 if room[1] == "cuda" else 2):
        assert torch.equal(linear_8bit(**given, backend="triton"), first)


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("rows", [2, 18, 50, 128, 512])
@pytest.mark.parametrize(("outputs", "inputs"), [(5760, 1920), (1920, 7680), (1920, 1920)])
def test_layers_of_a_large_model(rows, outputs, inputs, form):
    for dtype in (torch.bfloat16, torch.float16):
        check(("triton", "cuda", dtype), arguments(("triton", "cuda", dtype), rows, outputs, inputs, form))


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("rows", [128, 300])
def test_gelu_of_few_rows_and_of_many(rows, form):
    given = arguments(("triton", "cuda", torch.float16), rows, 256, 192, form)
    layer = Linear8bit(given["weight"], given["scale"] * 0.1, given["bias"], torch.float16)
    with torch.no_grad():
        eager = F.gelu(
            linear_8bit(given["x"], layer.weight, layer.scale, layer.bias, backend="eager"), approximate="tanh"
        )
        exact = F.gelu(oracle(given["x"], layer.weight, layer.scale, layer.bias), approximate="tanh")
        assert_as_good_as_eager(gelu_of(layer, given["x"]), eager, exact)


@pytest.mark.gpu
def test_in_a_graph():
    given = arguments(("triton", "cuda", torch.bfloat16), 4, 1024, 1024, "fp8")
    want = linear_8bit(**given, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = linear_8bit(**given, backend="triton")
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


# ---- gradients, compilation


@formats
def test_gradients(form):
    given = arguments(("eager", "cpu", torch.float64), 3, 5, 6, form)
    weight, scale = given["weight"], given["scale"] * 0.1
    leaves = [given["x"].requires_grad_(), given["bias"].double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, bias: linear_8bit(x, weight, scale, bias), leaves)
    y = linear_8bit(given["x"].detach().bfloat16().requires_grad_(), weight, scale)
    (grad,) = torch.autograd.grad(y, y.grad_fn.next_functions[0][0].variable, torch.ones_like(y))
    want = (torch.ones(3, 5).double() * scale.double()) @ weight.float().double()
    assert (grad.double() - want).norm() < 0.01 * want.norm()


def test_compiles_and_checks():
    """Of int8 alone: the checker itself cannot handle float8."""
    given = arguments(("eager", "cpu", torch.float32), 3, 5, 16, "int8")
    given["x"].requires_grad_()
    torch.library.opcheck(registry["linear_8bit"].overload, (*given.values(), "auto"))
    torch.library.opcheck(registry["widen_8bit"].overload, (given["weight"], given["scale"], torch.bfloat16, "auto"))


@pytest.mark.usefixtures("fresh_compiler")
def test_one_node_for_the_compiler():
    given = arguments(("eager", "cpu", torch.float32), 3, 5, 16, "int8")
    compiled = torch.compile(linear_8bit, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), linear_8bit(**given))


# ---- the module


@formats
def test_module_moves_and_casts_but_keeps_its_bits(form):
    given = arguments(("eager", "cpu", torch.float32), 3, 5, 16, form)
    layer = Linear8bit(given["weight"], given["scale"], given["bias"])
    want = linear_8bit(given["x"].bfloat16(), given["weight"], given["scale"], given["bias"].bfloat16())
    for one in (layer.to(torch.bfloat16), copy.deepcopy(layer)):
        assert one.dtype == one.bias.dtype == torch.bfloat16
        assert one.weight.dtype == given["weight"].dtype
        assert torch.equal(one.scale, given["scale"])
        assert torch.equal(one(given["x"].bfloat16()), want)
    other = torch.randn(5)
    assert torch.equal(layer(given["x"], other), linear_8bit(given["x"], given["weight"], given["scale"], other))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(given["x"]), want)
    there = Linear8bit(given["weight"], given["scale"], None).to("meta", torch.float16)
    assert (there.weight.device.type, there.scale.dtype, there.dtype) == ("meta", torch.float32, torch.float16)
    assert set(layer.state_dict()) == {"weight", "scale", "bias"}


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1]}, TypeError, "x must be a tensor"),
        ({"weight": torch.zeros(3, 4)}, TypeError, "weight must be int8, float8_e4m3fn"),
        ({"scale": torch.zeros(3).half()}, TypeError, "scale must be float32"),
        ({"weight": torch.zeros(4, dtype=torch.int8)}, ValueError, r"weight must be \(N, K\)"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \(..., 4\) to match weight"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must be \(3,\)"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be \(3,\)"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias must be on the device of x"),
        ({"scale": torch.zeros(3, requires_grad=True)}, ValueError, "must not ask for a gradient"),
        ({"backend": "cuda"}, ValueError, "backend must be one that this operator has"),
    ],
)
def test_bad_input(change, error, text):
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4, dtype=torch.int8), "scale": torch.zeros(3), **change}
    with pytest.raises(error, match=f"linear_8bit: .*{text}"):
        linear_8bit(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(3, 4)}, TypeError, "weight must be int8, float8_e4m3fn"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must be \(3,\)"),
        ({"scale": torch.zeros(3, device="meta")}, ValueError, "scale must be on the device of weight"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"backend": "triton"}, ValueError, "which needs"),
    ],
)
def test_bad_input_of_widening(change, error, text):
    given = {"weight": torch.zeros(3, 4, dtype=torch.int8), "scale": torch.zeros(3), "dtype": torch.float32, **change}
    with pytest.raises(error, match=f"widen_8bit: .*{text}"):
        widen_8bit(**given)


def test_says_why_a_backend_does_not_fit():
    x, weight, scale = torch.zeros(1, 8).half(), torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)
    explain = registry["linear_8bit"].explain
    assert "needs" in explain(x.float(), weight, scale, None)["triton"]
    assert "needs" in explain(x, weight, scale, None)["triton"]
    assert explain(x, weight, scale, None)["eager"] == "fits"
