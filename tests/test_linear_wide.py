"""`wide_linear`: values and gradients against float64 and autocast; bad input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_eager

from unifiedar.nn import wide_linear

ROOMS = [
    pytest.param((device, x, weight), marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{device}-{x}-{weight}")
    for device in ("cpu", "cuda")
    for x, weight in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    )
]


def arguments(room, *shape, outputs=24, seed=0):
    device, kind, wide = room
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device)

    tensors = [normal(*shape).to(kind), normal(outputs, shape[-1]).to(wide), normal(outputs).to(wide)]
    return [one.requires_grad_() for one in tensors], normal(*shape[:-1], outputs).to(kind)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(room, biased):
    for shape in ((3, 5, 16), (1, 8), (70, 40), (2, 1, 3, 8)):
        tensors, grad = arguments(room, *shape)
        tensors = tensors[: 2 + biased]
        rounded = [tensors[0], *(one.detach().to(room[1]).double() for one in tensors[1:])]
        leaves = [one.detach().double().requires_grad_() for one in rounded]
        exact = F.linear(*leaves)
        right = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
        eager = F.linear(tensors[0], *(one.to(room[1]) for one in tensors[1:]))
        eager = [eager.detach(), *torch.autograd.grad(eager, tensors, grad)]
        got = wide_linear(*tensors)
        got = [got.detach(), *torch.autograd.grad(got, tensors, grad)]
        for triple in zip(got, eager, right, strict=True):
            assert_as_good_as_eager(*triple)


@pytest.mark.gpu
def test_gradients_of_weights_are_not_rounded_to_half_precision():
    (x, weight, bias), grad = arguments(("cuda", torch.bfloat16, torch.float32), 3000, 256, outputs=512)
    found = torch.autograd.grad(wide_linear(x, weight, bias), [weight, bias], grad)
    right = grad.double().mT @ x.detach().double(), grad.double().sum(0)
    for one, exact in zip(found, right, strict=True):
        assert (one.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_under_autocast(device):
    (x, weight, bias), grad = arguments((device, torch.float32, torch.float32), 4, 5, 16)
    found = []
    for function in (wide_linear, F.linear):
        with torch.autocast(device, torch.bfloat16):
            y = function(x, weight, bias)
        assert y.dtype == torch.bfloat16
        found.append((y, *torch.autograd.grad(y, [x, weight, bias], grad.bfloat16())))
    (x, weight, bias), grad = arguments((device, torch.float32, torch.float32), 4, 5, 16)
    y = wide_linear(x, weight, bias)
    with torch.autocast(device, torch.bfloat16):  # that the way back is in it changes nothing
        late = torch.autograd.grad(y, [x, weight, bias], grad, retain_graph=True)
    for one, other in zip(late, torch.autograd.grad(y, [x, weight, bias], grad), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= 0.01 * other.float().norm()


def test_numerically_and_some_alone():
    tensors, _ = arguments(("cpu", torch.float64, torch.float64), 2, 3, 4, outputs=5)
    assert torch.autograd.gradcheck(wide_linear, tensors)
    for i in range(3):
        given = [one.detach().requires_grad_(i == j) for j, one in enumerate(tensors)]
        assert torch.autograd.gradcheck(wide_linear, given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"weight": torch.ones(3, 5)}, ValueError, r"weight must be \(N, K\) with K that of x"),
        ({"weight": torch.ones(4)}, ValueError, "weight must be"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(3,\) to match weight"),
        ({"bias": torch.ones(3, dtype=torch.int64)}, TypeError, "bias must be"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=f"wide_linear: {text}"):
        wide_linear(**{"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)} | change)
