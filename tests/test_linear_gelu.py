"""`bias_gelu`: every backend against a float64 oracle, gradients too; bad input; where layers use it."""

import math

import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, kernel_rooms
from torch import nn

from unifiedar.nn import ModulatedNorm, gelu_of, in_parts, linear_few
from unifiedar.ops import _native, bias_gelu, registry

ROOMS = [case for case in kernel_rooms() if case.values[0][0] != "cuda"]
rooms = pytest.mark.parametrize("room", ROOMS, indirect=True)
triton_rooms = pytest.mark.parametrize("room", [c for c in ROOMS if c.values[0][0] == "triton"], indirect=True)


def arguments(room, *shape, seed=0, dtype=torch.float32):
    """x, a bias in another dtype, and a gradient; some x so large that GELU is x or nothing."""
    _, device, kind = room
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, *shape, generator=generator)
    x = x * torch.tensor([1.0, 30.0])[torch.randint(2, shape, generator=generator)]
    bias = torch.randn(shape[-1], generator=generator)
    return x.to(device, kind), bias.to(device, dtype), grad.to(device, kind)


def oracle(x, bias):
    h = x.double() + bias.double()
    return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def check(room, *shape, **options):
    x, bias, grad = arguments(room, *shape, **options)
    leaves = [one.double().requires_grad_() for one in (x, bias)]
    exact = oracle(*leaves)
    gradients = torch.autograd.grad(exact, leaves, grad.double())
    got, eager = bias_gelu(x, bias, backend=room[0]), bias_gelu(x, bias, backend="eager")
    assert got.is_contiguous()
    assert_as_good_as_eager(got, eager, exact.detach())
    op = registry["bias_gelu_backward"]
    for triple in zip(op(grad, x, bias, room[0]), op(grad, x, bias, "eager"), gradients, strict=True):
        assert_as_good_as_eager(*triple)


@rooms
@pytest.mark.parametrize("width", [1, 8, 40, 257, 512, 1032])
def test_every_width(room, width):
    check(room, 2, 5, width)


@rooms
def test_shapes(room):
    for shape in ((1, 16), (3, 2, 2, 24), (300, 48), (9, 1, 4096)):
        check(room, *shape)
    check(room, 7, 24, dtype=room[2])


@pytest.mark.gpu
def test_rows_of_a_step():
    """As many as VAR's: every program has several tiles."""
    x, bias, grad = arguments(("triton", "cuda", torch.bfloat16), 9001, 4096)
    op = registry["bias_gelu_backward"]
    for one, other in zip(op(grad, x, bias, "triton"), op(grad, x, bias, "eager"), strict=True):
        assert (one.float() - other.float()).norm() <= 1e-3 * other.float().norm()


@rooms
def test_strides_and_nothing(room):
    x, bias, grad = arguments(room, 6, 4, 24)
    op = registry["bias_gelu_backward"]
    turned = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in (grad, x)]
    spread = torch.stack((bias, bias), -1)[:, 0]
    assert torch.equal(bias_gelu(turned[1], spread, backend=room[0]), bias_gelu(x, bias, backend=room[0]))
    for one, other in zip(op(*turned, spread, room[0]), op(grad, x, bias, room[0]), strict=True):
        assert torch.equal(one, other)
    assert bias_gelu(x[:0], bias, backend=room[0]).shape == (0, 4, 24)
    found = op(grad[:0], x[:0], bias, room[0])
    assert found[0].shape == (0, 4, 24)
    assert not found[1].any()


@triton_rooms
@pytest.mark.parametrize("shape", [(5, 40), (70, 1032)])
def test_writes_what_it_should_and_nothing_else(room, shape):
    kernels, (x, bias, grad) = _native.kernels("linear_gelu"), arguments(room, *shape)
    out, check_out = guarded(shape, room[2], room[1])
    kernels.bias_gelu(x, bias, out)
    check_out()
    out, check_out = guarded(shape, room[2], room[1])
    parts, check_parts = guarded((kernels.row_shares(*shape)[0], shape[1]), torch.float32, room[1])
    kernels.bias_gelu_backward(grad, x, bias, out, parts)
    check_out()
    check_parts()


@triton_rooms
def test_the_same_every_time(room):
    x, bias, grad = arguments(room, 300, 520)
    op = registry["bias_gelu_backward"]
    first = bias_gelu(x, bias, backend=room[0]), *op(grad, x, bias, room[0])
    for _ in range(2000 if room[1] == "cuda" else 2):
        again = bias_gelu(x, bias, backend=room[0]), *op(grad, x, bias, room[0])
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_rows_are_shared_out_whole():
    shares = pytest.importorskip("triton") and _native.kernels("linear_gelu").row_shares
    for rows, width in ((1, 1), (43520, 4096), (10880, 7680), (9, 10**6), (10**6, 8)):
        programs, share = shares(rows, width)
        assert programs * share >= rows > (programs - 1) * share


def test_gradients():
    x, bias, _ = arguments(("eager", "cpu", torch.float64), 2, 3, 4, dtype=torch.float64)
    leaves = [(one / 10).requires_grad_() for one in (x, bias)]
    assert torch.autograd.gradcheck(bias_gelu, leaves)


def test_compiles_and_checks():
    x, bias, grad = arguments(("eager", "cpu", torch.float32), 2, 3, 16)
    torch.library.opcheck(registry["bias_gelu_backward"].overload, (grad, x, bias, "auto"))
    torch.library.opcheck(registry["bias_gelu"].overload, (x.requires_grad_(), bias.requires_grad_(), "auto"))


@pytest.mark.usefixtures("fresh_compiler")
def test_one_node_for_the_compiler():
    x, bias, _ = arguments(("eager", "cpu", torch.float32), 2, 3, 16)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), bias_gelu(x, bias))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.ones(4)}, ValueError, r"x must be \(\.\.\., N\)"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \(4,\) to match x"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias must be"),
        ({"backend": "cuda"}, ValueError, "backend must be one that this operator has"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=f"bias_gelu: {text}"):
        bias_gelu(**{"x": torch.ones(2, 4), "bias": torch.ones(4)} | change)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_trained_layer(device, monkeypatch):
    """The same values and gradients with biases apart as without."""
    torch.manual_seed(0)
    first, second = nn.Linear(16, 40, device=device), nn.Linear(40, 16, device=device)
    x, scale, shift, gate = (torch.randn(3, *shape, device=device) for shape in ((5, 16), (16,), (16,), (16,)))
    norm, parameters = ModulatedNorm(), [*first.parameters(), *second.parameters()]
    found = []
    for apart in (False, True):
        monkeypatch.setattr(linear_few, "learns", lambda layer, x, apart=apart: apart)
        branch = in_parts(second, gelu_of(first, x))
        assert isinstance(branch, tuple) == apart
        y, tokens = norm.add(x, branch, gate, scale, shift)
        found.append([y, tokens, *torch.autograd.grad((y * shift[:, None]).sum() + tokens.square().sum(), parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
