"""Group norm with SiLU: every backend against the formula in float64, gradients, layouts, odd sizes, bad input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms
from torch import Tensor

from unifiedar.nn import GroupNorm
from unifiedar.ops import add_group_norm, add_maps, group_norm, phase_weights, registry

# (B, C, H, W), groups: groups of 5 channels as VAR has them, and 1 to 16; tails of tiles and of runs; one pixel.
SHAPES = {
    "VAR, lowest": ((2, 160, 5, 3), 32),
    "one pixel, one channel a group": ((2, 32, 1, 1), 32),
    "one group": ((1, 24, 7, 9), 1),
    "several runs": ((1, 20, 30, 29), 4),
    "blocks of channels with a tail": ((2, 200, 6, 7), 8),
    "one channel": ((3, 1, 4, 5), 1),
}
kernel_room = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][0] == "triton"], indirect=True
)
rooms_there_are = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][0] != "cuda"], indirect=True
)


def inputs(shape, dtype, device, *, mean: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + mean
    x = x.to(device, dtype, memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], generator=generator).to(device, dtype) for _ in range(2))
    return x, weight, bias


def formula(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """In float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    split = x.unflatten(1, (groups, -1))
    mean = split.mean((2, 3, 4), keepdim=True)
    variance = (split - mean).square().mean((2, 3, 4), keepdim=True)
    y = ((split - mean) / (variance + eps).sqrt()).flatten(1, 2) * weight[:, None, None] + bias[:, None, None]
    return y * torch.sigmoid(y) if silu else y


@rooms_there_are
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
def test_forward(room, shape, groups, silu):
    backend, device, dtype = room
    x, weight, bias = inputs(shape, dtype, device)
    got = group_norm(x, weight, bias, groups, silu=silu, backend=backend)
    exact = formula(x, weight, bias, groups, 1e-6, silu)
    eager = group_norm(x, weight, bias, groups, silu=silu, backend="eager")
    assert_as_good_as_eager(got, eager, exact)
    if dtype == torch.float32 and (backend == "triton" or shape[2] > 1):  # torch is off where the variance is zero
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    assert got.stride() == x.stride()


@kernel_room
@pytest.mark.parametrize("tiles", [2, 3, 100])
def test_runs_of_several_tiles(room, tiles, monkeypatch):
    """As large maps have them: the last run is short, or ends amid a tile, or has tiles beyond the last pixel."""
    backend, device, dtype = room
    from unifiedar.kernels import norm_group

    monkeypatch.setattr(
        norm_group, "_run", lambda pixels, channels: tiles * norm_group.tile_of(channels).pixels, raising=True
    )
    x, weight, bias = inputs((2, 160, 31, 29), dtype, device, mean=3.0)
    x[..., :9] *= 10  # so that tiles differ
    exact = formula(x, weight, bias, 32, 1e-6, True)
    got = group_norm(x, weight, bias, 32, silu=True, backend=backend)
    assert_as_good_as_eager(got, group_norm(x, weight, bias, 32, silu=True, backend="eager"), exact)


@kernel_room
def test_a_mean_far_from_zero_costs_no_digits(room):
    backend, device, dtype = room
    x, weight, bias = inputs((1, 64, 20, 33), dtype, device, mean=200.0)
    exact = formula(x, weight, bias, 32, 1e-6, True)
    got = group_norm(x, weight, bias, 32, silu=True, backend=backend)
    # What is left is the rounding of the output and, of the mean, float32's.
    allowed = exact.abs().max() * torch.finfo(dtype).eps + 200 * 2**-22
    assert (got.double() - exact).abs().max() <= allowed
    constant = torch.full_like(x, 3.0)
    assert torch.equal(group_norm(constant, weight, bias, 32, backend=backend), bias[:, None, None].expand_as(x))


@rooms_there_are
def test_shift(room):
    """Added to the means alone, so that on Triton nothing is rounded in between."""
    backend, device, dtype = room
    x, weight, bias = inputs((2, 40, 20, 33), dtype, device)
    shift = 30 * torch.randn(40, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    exact = formula(x.double() + shift.double()[:, None, None], weight, bias, 8, 1e-6, True)
    got = group_norm(x, weight, bias, 8, shift=shift, silu=True, backend=backend)
    eager = group_norm(x, weight, bias, 8, shift=shift, silu=True, backend="eager")
    assert_as_good_as_eager(got, eager, exact)
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias, shift)]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    found = torch.autograd.grad(group_norm(*leaves[:3], 8, shift=leaves[3], silu=True, backend=backend), leaves, grad)
    wide = [one.detach().double().requires_grad_() for one in leaves]
    right = torch.autograd.grad(
        formula(wide[0] + wide[3][:, None, None], *wide[1:3], 8, 1e-6, True), wide, grad.double()
    )
    plain = [one.detach().requires_grad_() for one in leaves]
    y = torch.group_norm(plain[0] + plain[3][:, None, None], 8, *plain[1:3], 1e-6)
    theirs = torch.autograd.grad(F.silu(y), plain, grad)
    for one, other, exactly in zip(found, theirs, right, strict=True):
        assert_as_good_as_eager(one, other, exactly)


def summands(shape, dtype, device, phases: bool, residual: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, shift and residual of a sum of this shape, and the sum in float64."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    stored = (batch, 4 * channels, height // 2 + 1, width // 2 + 1) if phases else shape
    x = torch.randn(stored, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    shift = torch.randn(channels, generator=generator).to(device, dtype)
    other = torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    total = x.double()
    if phases:
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        for i in range(height):
            for j in range(width):
                low = (2 * (i % 2) + j % 2) * channels
                total[:, :, i, j] = x[:, low : low + channels, i // 2 + i % 2, j // 2 + j % 2].double()
    total = total + shift.double()[:, None, None] + (other.double() if residual else 0)
    return x, shift, other if residual else None, total


@rooms_there_are
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize(
    ("shape", "groups", "phases"),
    [((2, 160, 5, 3), 32, False), ((1, 20, 30, 29), 4, False), ((2, 40, 12, 10), 8, True), ((1, 160, 2, 2), 32, True)],
    ids=str,
)
def test_sums(room, shape, groups, phases, residual):
    backend, device, dtype = room
    x, shift, other, exact = summands(shape, dtype, device, phases, residual)
    _, weight, bias = inputs(shape, dtype, device)

    def make(backend: str) -> tuple[Tensor, Tensor]:
        total, normed = add_group_norm(
            x, shift, weight, bias, groups, residual=other, phases=phases, silu=True, backend=backend
        )
        assert torch.equal(add_maps(x, shift, other, phases=phases, backend=backend), total)
        assert total.is_contiguous(memory_format=torch.channels_last)
        assert normed.stride() == total.stride()
        return total, normed

    got, eager = make(backend), make("eager")
    rights = exact, formula(exact, weight, bias, groups, 1e-6, True)
    for one, other_one, right in zip(got, eager, rights, strict=True):
        assert_as_good_as_eager(one, other_one, right)
    # The norm is of the sum as rounded.
    of_rounded = group_norm(got[0], weight, bias, groups, silu=True, backend=backend)
    torch.testing.assert_close(got[1], of_rounded, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@kernel_room
@pytest.mark.parametrize("tile", [(1, 64, 32, 4), (2, 16, 64, 4), (3, 128, 64, 8), (16, 8, 512, 8), (32, 16, 1024, 8)])
@pytest.mark.parametrize("shifted", [True, False])
def test_whole_in_one_launch(room, tile, shifted):
    """Blocks of groups with a tail, one tile of pixels and several, the last one not full; a mean far from zero."""
    _, device, dtype = room
    from unifiedar.kernels import norm_group

    x, weight, bias = inputs((2, 640, 9, 11), dtype, device, mean=30.0)
    x[:, 20:40] += 100
    shift = torch.randn(640, generator=torch.Generator().manual_seed(3)).to(device, dtype) if shifted else None
    out = torch.empty_like(x)
    norm_group.group_norm_whole(x, weight, bias, shift, 32, 1e-6, True, out, norm_group.Whole(*tile))
    exact = formula(x.double() + (0 if shift is None else shift.double()[:, None, None]), weight, bias, 32, 1e-6, True)
    eager = group_norm(x, weight, bias, 32, shift=shift, silu=True, backend="eager")
    assert_as_good_as_eager(out, eager, exact)


@kernel_room
@pytest.mark.parametrize("tiles", [2, 3, 100])
def test_sums_in_runs_of_several_tiles(room, tiles, monkeypatch):
    backend, device, dtype = room
    from unifiedar.kernels import norm_group

    monkeypatch.setattr(
        norm_group, "_run", lambda pixels, channels: tiles * norm_group.tile_of(channels).pixels, raising=True
    )
    x, shift, other, _ = summands((2, 160, 32, 28), dtype, device, True, True)
    _, weight, bias = inputs((1, 160, 1, 1), dtype, device)
    other[..., :9] *= 10
    other += 50
    total, normed = add_group_norm(x, shift, weight, bias, 32, residual=other, phases=True, silu=True, backend=backend)
    exact = formula(total, weight, bias, 32, 1e-6, True)
    assert_as_good_as_eager(normed, group_norm(total, weight, bias, 32, silu=True, backend="eager"), exact)


@rooms_there_are
@pytest.mark.parametrize(("outs", "ins"), [(7, 160), (3, 33), (1, 1030)])
def test_phase_weights(room, outs, ins):
    """Upsampling and the convolution are one 2 x 2 convolution, put together by `add_maps`."""
    backend, device, dtype = room
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outs, ins, 3, 3, generator=generator)
    weight = weight.to(device, dtype, memory_format=torch.channels_last)
    got = phase_weights(weight, backend=backend)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    taken = phase_weights(weight.double(), backend="eager")
    assert_as_good_as_eager(got, taken.to(dtype), taken)
    x = torch.randn(2, ins, 4, 3, generator=generator).to(device, torch.float64)
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight.double(), padding=1)
    zero = torch.zeros(outs, dtype=torch.float64, device=device)
    joined = add_maps(F.conv2d(x, taken, padding=1), zero, phases=True, backend="eager")
    torch.testing.assert_close(joined, want)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x, b: add_maps(x, b[:31]), ValueError, r"add_maps: shift must be \(32,\)"),
        (lambda x, b: add_maps(x[0], b), ValueError, r"add_maps: x must be \(B, C, H, W\)"),
        (lambda x, b: add_maps(x, b, x[1:]), ValueError, r"residual must be \(2, 32, 5, 6\)"),
        (lambda x, b: add_maps(x, b, x.double()), TypeError, "residual must have the dtype of x"),
        (lambda x, b: add_maps(x, b, x, phases=True), ValueError, r"shift must be \(8,\)"),
        (lambda x, b: add_maps(x[:, :30], b, phases=True), ValueError, "x must be four phases"),
        (lambda x, b: add_maps(x, None), TypeError, "shift must be a tensor"),
        (lambda x, b: add_group_norm(x, b, b, b, 5), ValueError, "add_group_norm: groups must divide the 32"),
        (lambda x, b: add_group_norm(x, b, b, b[1:], 8), ValueError, r"bias must be \(32,\)"),
        (lambda x, b: add_group_norm(x, b, b, b, 8, eps=-1), ValueError, "eps must be at least 0"),
        (lambda x, b: phase_weights(x), ValueError, r"weight must be \(O, I, 3, 3\), got \(2, 32, 5, 6\)"),
        (lambda x, b: phase_weights(3), TypeError, "weight must be a tensor"),
        (lambda x, b: group_norm(x, b, b, 8, shift=b[1:]), ValueError, r"shift must be \(32,\)"),
    ],
)
def test_bad_input_of_sums(call, error, text):
    x, _, bias = inputs((2, 32, 5, 6), torch.float32, "cpu")
    with pytest.raises(error, match=text):
        call(x, bias)


@rooms_there_are
def test_empty_sums(room):
    backend, device, dtype = room
    x, weight, bias = inputs((0, 32, 4, 4), dtype, device)
    total, normed = add_group_norm(x, bias, weight, bias, 8, residual=x, backend=backend)
    assert total.shape == normed.shape == (0, 32, 4, 4)
    one = torch.zeros(2, 128, 1, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    assert add_maps(one, bias, phases=True, backend=backend).shape == (2, 32, 0, 4)
    assert phase_weights(x.new_empty(0, 3, 3, 4).permute(0, 3, 1, 2), backend=backend).shape == (0, 4, 2, 2)


@kernel_room
def test_a_picture_alone_is_equal_to_one_among_others(room):
    backend, device, dtype = room
    x, weight, bias = inputs((3, 48, 10, 30), dtype, device)
    together = group_norm(x, weight, bias, 16, silu=True, backend=backend)
    for b in range(3):
        one = x[b : b + 1]
        assert torch.equal(group_norm(one, weight, bias, 16, silu=True, backend=backend), together[b : b + 1])
    assert torch.equal(group_norm(x, weight, bias, 16, silu=True, backend=backend), together)


@kernel_room
def test_weights_of_another_dtype_and_strides(room):
    backend, device, dtype = room
    x, weight, bias = inputs((2, 64, 5, 6), dtype, device)
    wide = torch.stack([weight.float(), bias.float()], 1)  # columns: strides of 2
    got = group_norm(x, wide[:, 0], wide[:, 1], 32, silu=True, backend=backend)
    exact = formula(x, weight, bias, 32, 1e-6, True)
    assert_as_good_as_eager(got, group_norm(x, wide[:, 0], wide[:, 1], 32, silu=True, backend="eager"), exact)
    assert got.dtype == dtype


@kernel_room
def test_writes_its_output_and_nothing_else(room):
    _, device, dtype = room
    from unifiedar.kernels import norm_group

    for shape, groups in SHAPES.values():
        x, weight, bias = inputs(shape, dtype, device)
        batch, channels, height, width = shape
        runs = norm_group.chunks(height * width, channels)
        out, check_out = guarded((batch, height, width, channels), dtype, device)
        parts, check_parts = guarded((batch, runs, 2, channels), torch.float32, device)
        moments, check_moments = guarded((batch, 2, channels), torch.float32, device)
        norm_group.group_norm(x, weight, bias, None, groups, 1e-6, True, parts, moments, out.permute(0, 3, 1, 2))
        for check in (check_out, check_parts, check_moments):
            check()
        total, check_total = guarded((batch, height, width, channels), dtype, device)
        parts, check_parts = guarded((batch, runs, 2, channels), torch.float32, device)
        norm_group.add_maps(x, bias, x, False, total.permute(0, 3, 1, 2), parts)
        for check in (check_total, check_parts):
            check()
        weights, check_weights = guarded((4 * channels, 2, 2, 24), dtype, device)
        taps = torch.randn(channels, 3, 3, 24, device=device).to(dtype)
        norm_group.phase_weights(taps.permute(0, 3, 1, 2), weights.permute(0, 3, 1, 2))
        check_weights()
        exact = formula(x, weight, bias, groups, 1e-6, True)
        eager = group_norm(x, weight, bias, groups, silu=True, backend="eager")
        assert_as_good_as_eager(out.permute(0, 3, 1, 2), eager, exact)
        if one := norm_group.whole(height * width, channels, groups):
            out, check_out = guarded((batch, height, width, channels), dtype, device)
            norm_group.group_norm_whole(x, weight, bias, None, groups, 1e-6, True, out.permute(0, 3, 1, 2), one)
            check_out()
            assert_as_good_as_eager(out.permute(0, 3, 1, 2), eager, exact)


@rooms_there_are
def test_extreme_values(room):
    """SiLU of what overflows exp is zero from below and the value itself from above; NaN stays in its group."""
    backend, device, dtype = room
    x, weight, bias = inputs((2, 64, 3, 5), dtype, device)
    bias[:2] = torch.tensor([-2000.0, 2000.0])
    got = group_norm(x, weight, bias, 32, silu=True, backend=backend)
    assert (got[:, 0] == 0).all()
    assert_as_good_as_eager(
        got, group_norm(x, weight, bias, 32, silu=True, backend="eager"), formula(x, weight, bias, 32, 1e-6, True)
    )
    x[1, 7] = torch.nan
    got = group_norm(x, weight, bias, 32, silu=True, backend=backend)
    assert got[1, 6:8].isnan().all()
    assert got.isnan().sum() == 2 * 15


@rooms_there_are
@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4)])
def test_empty(room, shape):
    backend, device, dtype = room
    x, weight, bias = inputs(shape, dtype, device)
    x.requires_grad_()
    weight.requires_grad_()
    got = group_norm(x, weight, bias, 32, silu=True, backend=backend)
    assert got.shape == shape
    got.sum().backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()


@rooms_there_are
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_gradients(room, silu):
    backend, device, dtype = room
    x, weight, bias = inputs((2, 40, 5, 7), dtype, device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)

    def gradients(to: torch.dtype, f) -> list[Tensor]:
        leaves = [one.detach().to(to).requires_grad_() for one in (x, weight, bias)]
        return list(torch.autograd.grad(f(*leaves), leaves, grad.to(to)))

    exact = gradients(torch.float64, lambda *one: formula(*one, 8, 1e-6, silu))
    eager = gradients(dtype, lambda a, b, c: (F.silu if silu else torch.clone)(torch.group_norm(a, 8, b, c, 1e-6)))
    got = gradients(dtype, lambda *one: group_norm(*one, 8, silu=silu, backend=backend))
    for one, other, right in zip(got, eager, exact, strict=True):
        assert_as_good_as_eager(one, other, right)


def test_contiguous_input_stays_contiguous():
    x, weight, bias = inputs((2, 32, 5, 6), torch.float32, "cpu")
    flat = x.contiguous()
    got = group_norm(flat, weight, bias, 32)
    assert got.is_contiguous()
    torch.testing.assert_close(got, group_norm(x, weight, bias, 32))
    sliced = torch.cat([flat, flat], 3)[..., 2:8]  # neither dense
    torch.testing.assert_close(group_norm(sliced, weight, bias, 32), group_norm(sliced.contiguous(), weight, bias, 32))


def test_not_under_autocast():
    x, weight, bias = inputs((2, 32, 5, 6), torch.bfloat16, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        got = group_norm(x, weight, bias, 32, silu=True)
    assert torch.equal(got, group_norm(x, weight, bias, 32, silu=True))


def test_operator():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = inputs((2, 32, 5, 6), dtype, "cpu")
        for silu in (True, False):
            leaves = [one.requires_grad_() for one in (x.detach(), weight.detach(), bias.detach())]
            torch.library.opcheck(registry["group_norm"].overload, (*leaves, None, 8, 1e-6, silu, "eager"))
            shift = torch.randn(32, requires_grad=True)
            torch.library.opcheck(registry["group_norm"].overload, (*leaves, shift, 8, 1e-6, silu, "eager"))
        x, weight, bias, shift = (one.detach() for one in (x, weight, bias, shift))
        for one in (shift, None):
            backward = (torch.randn_like(x), x, weight, bias, one, 8, 1e-6, True, "eager")
            torch.library.opcheck(registry["group_norm_backward"].overload, backward)
        phases = torch.randn(2, 128, 4, 3).to(dtype)
        for summands in (
            (x, shift, x, False),
            (x, shift, None, False),
            (phases, shift, x[..., :3, :2].repeat(1, 1, 2, 2), True),
        ):
            torch.library.opcheck(registry["add_maps"].overload, (*summands, "eager"))
            torch.library.opcheck(
                registry["add_group_norm"].overload, (*summands, weight, bias, 8, 1e-6, True, "eager")
            )
        torch.library.opcheck(registry["phase_weights"].overload, (torch.randn(8, 16, 3, 3).to(dtype), "eager"))


def test_compiles_whole(fresh_compiler):
    x, weight, bias = inputs((2, 32, 5, 6), torch.float32, "cpu")
    compiled = torch.compile(lambda *one: group_norm(*one, 8, silu=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), group_norm(x, weight, bias, 8, silu=True))


def test_triton_says_what_it_does_not_take():
    if reason := interpreter_skip():
        pytest.skip(reason)
    op = registry["group_norm"]
    x, weight, bias = inputs((2, 32, 5, 6), torch.float32, "cpu")
    assert op.explain(x, weight, bias, None, 8, 1e-6, True) == {"triton": "fits", "eager": "fits"}
    assert "channels-last" in op.explain(x.contiguous(), weight, bias, None, 8, 1e-6, True)["triton"]
    assert "float64" in op.explain(x, weight.double(), bias, None, 8, 1e-6, True)["triton"]
    assert "float64" in op.explain(x, weight, bias, bias.double(), 8, 1e-6, True)["triton"]
    for name, rest in (("add_maps", ()), ("add_group_norm", (weight, bias, 8, 1e-6, True))):
        op = registry[name]
        assert op.explain(x, bias, x, False, *rest) == {"triton": "fits", "eager": "fits"}
        assert "residual dense in" in op.explain(x, bias, x.contiguous(), False, *rest)["triton"]
    assert (
        "1024 channels"
        in op.explain(torch.zeros(1, 2048, 1, 1), bias, None, False, torch.zeros(2048), bias, 1, 1e-6, True)["triton"]
    )
    assert "channels-last" in registry["phase_weights"].explain(torch.zeros(8, 16, 3, 3))["triton"]
    with pytest.raises(ValueError, match="channels-last"):
        group_norm(x.contiguous(), weight, bias, 8, backend="triton")


def arguments(**changes):
    x, weight, bias = inputs((2, 32, 5, 6), torch.float32, "cpu")
    return {"x": x, "weight": weight, "bias": bias, "groups": 8, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 32, 5, 6, dtype=torch.int64)}, TypeError, "x must be float32.*got int64"),
        ({"x": torch.zeros(2, 32, 5)}, ValueError, r"x must be \(B, C, H, W\), got \(2, 32, 5\)"),
        ({"weight": torch.zeros(31)}, ValueError, r"weight must be \(32,\) to match x, got \(31,\)"),
        ({"bias": torch.zeros(1, 32)}, ValueError, r"bias must be \(32,\)"),
        ({"bias": None}, TypeError, "bias must be a tensor"),
        ({"groups": 5}, ValueError, "groups must divide the 32 channels of x, got 5"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": 8.0}, TypeError, "groups must be an integer"),
        ({"eps": -1e-6}, ValueError, "eps must be at least 0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"backend": "cuda"}, ValueError, "triton, eager"),
        ({"weight": torch.zeros(32, device="meta")}, ValueError, "weight must be on the device of x"),
    ],
)
def test_bad_input(changes, error, text):
    with pytest.raises(error, match=f"group_norm: .*{text}"):
        group_norm(**arguments(**changes))


def test_module():
    """As torch's own followed by SiLU, with its keys; without gradients through the operator."""
    x, weight, bias = inputs((2, 64, 5, 6), torch.float32, "cpu")
    theirs, ours, plain = torch.nn.GroupNorm(32, 64, 1e-6), GroupNorm(32, 64, silu=True), GroupNorm(32, 64)
    state = {"weight": weight, "bias": bias}
    for one in (theirs, ours, plain):
        one.load_state_dict(state, strict=True)
    with_gradients = ours(x)
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ours(x), F.silu(theirs(x)))
        torch.testing.assert_close(plain(x), theirs(x))
        torch.testing.assert_close(with_gradients, ours(x))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ours(x)
    assert "unifiedar::group_norm" in {event.key for event in profile.key_averages()}
