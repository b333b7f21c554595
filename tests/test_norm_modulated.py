"""`modulated_norm`: every backend against a float64 oracle, with and without a branch; gradients; bad input."""

import pytest
import torch
from helpers import assert_as_good_as_eager, guarded, kernel_rooms
from torch import Tensor

from unifiedar.ops import _native, modulated_norm, registry

ROOMS = [case for case in kernel_rooms() if case.values[0][0] != "cuda"]
rooms = pytest.mark.parametrize("room", ROOMS, indirect=True)
triton_rooms = pytest.mark.parametrize("room", [c for c in ROOMS if c.values[0][0] == "triton"], indirect=True)


FORMS = ("plain", "gated", "biased")  # no branch, one, one whose bias is apart
forms = pytest.mark.parametrize("form", FORMS)


def arguments(room, batch, length, width, *, form, dtype=None, seed=0) -> dict[str, Tensor]:
    """Tokens and a branch's bias in float32, a mean far from 0; what is modulated and added is slices in the room's
    dtype."""
    _, device, kind = room
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=generator) * 3 + 20
    six = torch.randn(batch, 6, width, generator=generator).to(device, kind)
    given = {"x": x.to(device, dtype or torch.float32), "scale": six[:, 2], "shift": six[:, 4]}
    if form != "plain":
        branch = torch.randn(batch, length, width, generator=generator)
        given |= {"branch": branch.to(device, kind), "gate": six[:, 0]}
    if form == "biased":
        given["bias"] = torch.randn(width, generator=generator).to(device, dtype or torch.float32)
    return given


def oracle(x, scale, shift, branch=None, gate=None, bias=None, eps=1e-6):
    """In float64, in other words."""
    found = []
    if branch is not None:
        if bias is not None:
            branch = branch + bias
        x = torch.addcmul(x, branch, gate[:, None].expand_as(branch))
        found = [x]
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    unit = centred / (centred.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return [unit + unit * scale[:, None] + shift[:, None], *found]


def outputs(result):
    return [result] if isinstance(result, Tensor) else list(result)


def check(room, given, **settings):
    exact = oracle(**{name: one.double() for name, one in given.items()}, eps=settings.get("eps", 1e-6))
    got = outputs(modulated_norm(**given, **settings, backend=room[0]))
    eager = outputs(modulated_norm(**given, **settings, backend="eager"))
    assert len(got) == len(exact)
    for triple in zip(got, eager, exact, strict=True):
        assert_as_good_as_eager(*triple)
    assert got[0].dtype == settings.get("dtype", given["x"].dtype)
    assert all(one.is_contiguous() for one in got)
    return got


@rooms
@forms
@pytest.mark.parametrize("width", [1, 8, 40, 255, 256, 257, 1024])
def test_every_width(room, width, form):
    check(room, arguments(room, 2, 3, width, form=form), dtype=room[2])


@rooms
@forms
def test_shapes_and_strides(room, form):
    for batch, length in ((1, 1), (3, 7), (5, 1), (1, 9)):
        check(room, arguments(room, batch, length, 48, form=form), eps=1e-3)
    given = arguments(room, 2, 5, 48, form=form)
    plain = check(room, given, dtype=room[2])
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    given["scale"] = torch.stack((given["scale"], given["shift"]), -1)[..., 0]
    for one, other in zip(check(room, given, dtype=room[2]), plain, strict=True):
        assert torch.equal(one, other)
    given["shift"] = given["shift"][:1].expand(2, -1)
    check(room, given)


@rooms
def test_tokens_in_the_dtype_of_the_layers(room):
    for form in FORMS:
        check(room, arguments(room, 2, 4, 64, form=form, dtype=room[2]))


@rooms
def test_nothing_to_do(room):
    for batch, length in ((0, 3), (2, 0)):
        for form in FORMS:
            given = arguments(room, batch, length, 16, form=form)
            assert all(one.shape == (batch, length, 16) for one in outputs(modulated_norm(**given, backend=room[0])))


@triton_rooms
@forms
@pytest.mark.parametrize("width", [40, 257])
def test_writes_what_it_should_and_nothing_else(room, width, form):
    _, device, dtype = room
    given = arguments(room, 2, 5, width, form=form)
    out, check_out = guarded((2, 5, width), dtype, device)
    new, check_new = guarded((2, 5, width), torch.float32, device)
    tensors = (given["x"], given.get("branch"), given.get("gate"), given["scale"], given["shift"])
    new = None if form == "plain" else new
    _native.kernels("norm").modulated_norm(*tensors, 1e-6, out, new, given.get("bias"))
    check_out()
    if new is not None:
        check_new()


@triton_rooms
def test_the_same_every_time_and_for_every_batch(room):
    given = arguments(room, 4, 33, 1024, form="gated")
    first = modulated_norm(**given, backend=room[0])
    for _ in range(2000 if room[1] == "cuda" else 2):
        again = modulated_norm(**given, backend=room[0])
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    alone = modulated_norm(**{name: one[2:3] for name, one in given.items()}, backend=room[0])
    assert all(torch.equal(one[2:3], other) for one, other in zip(first, alone, strict=True))


@forms
def test_gradients(form):
    """Numerically, in float64; and one output's alone."""
    given = arguments(("eager", "cpu", torch.float64), 2, 3, 8, form=form, dtype=torch.float64)
    given["x"] = given["x"] / 10
    leaves = [one.detach().clone().requires_grad_() for one in given.values()]

    def function(*tensors):
        return modulated_norm(**dict(zip(given, tensors, strict=True)), eps=1e-2)

    assert torch.autograd.gradcheck(function, leaves)
    for i in range(1 if form == "plain" else 2):
        assert torch.autograd.gradcheck(lambda *tensors, i=i: outputs(function(*tensors))[i], leaves)


def test_gradients_in_half_precision():
    """They come in the dtype of their tensors, and are as good as autograd's of the formula written out."""
    given = arguments(("eager", "cpu", torch.bfloat16), 2, 30, 64, form="gated")
    leaves = [one.detach().clone().requires_grad_() for one in given.values()]
    grads = [torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    out = modulated_norm(**dict(zip(given, leaves, strict=True)), dtype=torch.bfloat16)
    got = torch.autograd.grad(out, leaves, [grads[0].bfloat16(), grads[1]])
    wide = [one.detach().double().requires_grad_() for one in leaves]
    exact = torch.autograd.grad(oracle(**dict(zip(given, wide, strict=True))), wide, [g.double() for g in grads])
    for one, leaf, right in zip(got, leaves, exact, strict=True):
        assert one.dtype == leaf.dtype
        assert (one.double() - right).norm() <= 0.01 * right.norm()


# ---- gradients by one kernel


def backward_arguments(room, batch, length, width, *, form, dtype=None, seed=0):
    """What the gradient's operator takes, gradients of what comes out in the room's dtype."""
    given = arguments(room, batch, length, width, form=form, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    grads = torch.randn(2, batch, length, width, generator=generator).to(room[1])
    grad, grad_new = grads[0].to(room[2]), grads[1].to(given["x"].dtype)
    rest = (given["x"], given.get("branch"), given.get("gate"), given["scale"])
    return grad, None if form == "plain" else grad_new, *rest, given.get("bias")


def backward(room, given, eps=1e-6):
    return registry["modulated_norm_backward"](*given[:6], eps, given[6], room[0])


def exact_backward(given, eps=1e-6):
    """By autograd, in float64, of the tokens as they were normalized."""
    grad, grad_new, x, branch, gate, scale, bias = (None if one is None else one.double() for one in given)
    leaves = [x.requires_grad_(), scale.requires_grad_(), torch.zeros_like(scale).requires_grad_()]
    if branch is None:
        found = torch.autograd.grad(oracle(x, *leaves[1:], eps=eps), leaves, [grad])
        return found[0], None, torch.stack(found[1:]), None
    leaves += [branch.requires_grad_(), gate.requires_grad_()]
    joined = branch.detach() if bias is None else branch.detach() + bias
    leaves += [] if bias is None else [bias.requires_grad_()]
    before = x.detach() - joined * gate.detach()[:, None]
    leaves[0] = before.requires_grad_()
    found = torch.autograd.grad(oracle(before, *leaves[1:], eps=eps), leaves, [grad, grad_new])
    return found[0], found[3], torch.stack((*found[1:3], found[4])), None if bias is None else found[5]


def check_backward(room, given, eps=1e-6):
    got, eager = backward(room, given, eps), backward(("eager", *room[1:]), given, eps)
    for one, other, right in zip(got, eager, exact_backward(given, eps), strict=True):
        assert one.dtype == other.dtype
        if right is None:
            assert one.numel() == other.numel() == 0
        else:
            assert_as_good_as_eager(one, other, right)
    return got


@rooms
@forms
@pytest.mark.parametrize("width", [1, 8, 40, 255, 256, 257, 1024])
def test_gradient_of_every_width(room, width, form):
    check_backward(room, backward_arguments(room, 2, 5, width, form=form))


@rooms
@forms
def test_gradient_of_shapes_and_strides(room, form):
    for batch, length in ((1, 1), (3, 7), (5, 1), (600, 5)):
        check_backward(room, backward_arguments(room, batch, length, 48, form=form), eps=1e-3)
    given = backward_arguments(room, 2, 5, 48, form=form)
    plain = check_backward(room, given)
    turned = [None if one is None else one.mT.contiguous().mT if one.ndim == 3 else one for one in given]
    turned[5] = torch.stack((given[5], given[5]), -1)[..., 0]
    for one, other in zip(check_backward(room, turned)[:2], plain[:2], strict=True):
        assert torch.equal(one, other)
    turned[5] = given[5][:1].expand(2, -1)
    check_backward(room, turned)
    check_backward(room, backward_arguments(room, 2, 4, 64, form=form, dtype=room[2]))


@rooms
def test_gradient_of_nothing(room):
    for batch, length in ((0, 3), (2, 0)):
        for form in FORMS:
            found = backward(room, backward_arguments(room, batch, length, 16, form=form))
            assert found[0].shape == (batch, length, 16)
            assert found[2].shape == (2 if form == "plain" else 3, batch, 16)
            assert found[3].shape == ((16,) if form == "biased" else (0,))
            assert not any(one.any() for one in found[2:])


@triton_rooms
@forms
@pytest.mark.parametrize("width", [40, 257])
def test_gradient_writes_what_it_should_and_nothing_else(room, width, form):
    _, device, dtype = room
    kernels, given = _native.kernels("norm"), backward_arguments(room, 2, 5, width, form=form)
    programs = kernels.token_shares(2, 5, width)[0]
    out, check_out = guarded((2, 5, width), torch.float32, device)
    branch, check_branch = guarded((2, 5, width), dtype, device)
    parts, check_parts = guarded((2 + FORMS.index(form), 2, programs, width), torch.float32, device)
    branch = None if form == "plain" else branch
    kernels.modulated_norm_backward(*given[:6], 1e-6, out, branch, parts, given[6])
    check_out()
    check_parts()
    if branch is not None:
        check_branch()


@triton_rooms
def test_gradient_is_the_same_every_time(room):
    given = backward_arguments(room, 4, 33, 1024, form="biased")
    first = backward(room, given)
    for _ in range(2000 if room[1] == "cuda" else 2):
        assert all(torch.equal(one, other) for one, other in zip(first, backward(room, given), strict=True))
    alone = backward(room, [*(one[2:3] for one in given[:6]), given[6]])
    assert all(torch.equal(one[2:3], other) for one, other in zip(first[:2], alone[:2], strict=True))


def test_tokens_are_shared_out_whole():
    shares = pytest.importorskip("triton") and _native.kernels("norm").token_shares
    for batch, length in ((1, 1), (1, 680), (64, 680), (16, 680), (4, 2240), (2000, 3), (7, 1055), (1, 10**6)):
        for width, most in ((192, 1584), (1024, 396), (1920, 132), (8192, 132)):
            programs, share = shares(batch, length, width)
            assert programs * share >= length > (programs - 1) * share
            assert programs * batch <= max(most, batch)


@triton_rooms
@forms
def test_gradient_through_the_function(room, form, monkeypatch):
    """Where the environment asks for it; in the dtypes of what it is a gradient of."""
    given = arguments(room, 2, 9, 64, form=form)
    grads = [
        torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(i)).to(room[1])
        for i in range(1 if form == "plain" else 2)
    ]
    found = []
    for name in ("triton", "eager"):
        monkeypatch.setenv("UNIFIEDAR_BACKEND", name)
        leaves = [one.detach().clone().requires_grad_() for one in given.values()]
        out = outputs(modulated_norm(**dict(zip(given, leaves, strict=True))))
        found.append(torch.autograd.grad(out, leaves, grads))
        assert [one.dtype for one in found[-1]] == [one.dtype for one in leaves]
    for one, other in zip(*found, strict=True):
        assert (one - other).float().norm() <= (1e-5 if room[2] == torch.float32 else 1e-2) * other.float().norm()


def test_compiles_and_checks():
    for name, form in zip(("modulated_norm", "gated_modulated_norm", "gated_modulated_norm"), FORMS, strict=True):
        given = arguments(("eager", "cpu", torch.float32), 2, 3, 16, form=form)
        order = ("x", "branch", "gate", "scale", "shift")
        tensors = [given[key].clone().requires_grad_() for key in order if key in given]
        bias = [] if form == "plain" else [given["bias"].clone().requires_grad_() if form == "biased" else None]
        torch.library.opcheck(registry[name].overload, (*tensors, 1e-6, torch.float32, *bias, "auto"))
        backward = backward_arguments(("eager", "cpu", torch.float32), 2, 3, 16, form=form)
        given = (*backward[:6], 1e-6, backward[6], "auto")
        torch.library.opcheck(registry["modulated_norm_backward"].overload, given)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_node_for_the_compiler():
    given = arguments(("eager", "cpu", torch.float32), 2, 3, 16, form="gated")
    compiled = torch.compile(modulated_norm, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(**given), modulated_norm(**given), strict=True):
        assert torch.equal(one, other)


def test_autocast_changes_nothing():
    given = arguments(("eager", "cpu", torch.bfloat16), 2, 3, 16, form="gated")
    want = modulated_norm(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = modulated_norm(**given)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 3, 4).long()}, TypeError, "x must be float32"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, L, C\)"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, "at least one channel"),
        ({"scale": torch.zeros(2, 3)}, ValueError, r"scale must be \(2, 4\) to match x"),
        ({"shift": torch.zeros(1, 4)}, ValueError, r"shift must be \(2, 4\)"),
        ({"shift": torch.zeros(2, 4, device="meta")}, ValueError, "shift must be on the device of x"),
        ({"branch": torch.zeros(2, 3, 4)}, ValueError, "gate must be given with branch"),
        ({"gate": torch.zeros(2, 4)}, ValueError, "branch must be given with gate"),
        ({"branch": torch.zeros(2, 4, 4), "gate": torch.zeros(2, 4)}, ValueError, r"branch must be \(2, 3, 4\)"),
        ({"bias": torch.zeros(4)}, ValueError, "branch must be given with bias"),
        (
            {"branch": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 4), "bias": torch.zeros(2, 4)},
            ValueError,
            r"bias must be \(4,\) to match x",
        ),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"backend": "cuda"}, ValueError, "backend must be one that this operator has"),
    ],
)
def test_bad_input(change, error, text):
    given = {"x": torch.zeros(2, 3, 4), "scale": torch.zeros(2, 4), "shift": torch.zeros(2, 4), **change}
    with pytest.raises(error, match=text):
        modulated_norm(**given)


def test_says_why_a_backend_does_not_fit():
    x, row = torch.zeros(1, 2, 8193), torch.zeros(1, 8193)
    reasons = registry["modulated_norm"].explain(x.double(), row, row, 1e-6, torch.float32)
    assert reasons["eager"] == "fits"
    assert "needs" in reasons["triton"]
