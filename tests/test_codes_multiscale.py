"""VAR's residual pyramid: definitions against a float64 oracle, kernels against the definitions, the quantizer module.

The oracle is written with matrices made by loops, so that it shares nothing with the definitions but the formula.
"""

import math

import pytest
import torch
from helpers import assert_as_good_as_eager, interpreter_skip, kernel_rooms
from pyramid_adversaries import adversaries, adverse, check_adverse
from torch.nn.functional import conv2d, normalize

from unifiedar.nn import MultiScaleQuantizer
from unifiedar.ops import (
    Phi,
    _native,
    multiscale_inputs,
    multiscale_lookup,
    multiscale_quantize,
    next_scale_input,
    registry,
)

QUANTIZE, LOOKUP, NEXT = (registry[name] for name in ("multiscale_quantize", "multiscale_lookup", "next_scale_input"))
VAR = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

rooms = pytest.mark.parametrize("room", [case for case in kernel_rooms() if case.values[0][0] != "cuda"], indirect=True)
triton_float32 = pytest.mark.parametrize(
    "room",
    [case for case in kernel_rooms() if case.values[0][0] == "triton" and case.values[0][2] == torch.float32],
    indirect=True,
)
gpu_cuda = pytest.mark.parametrize(
    "room", [case for case in kernel_rooms() if case.values[0][0] == "cuda"], indirect=True
)
gpu_triton = pytest.mark.parametrize(
    "room",
    [case for case in kernel_rooms() if case.values[0] == ("triton", "cuda", torch.float32)],
    indirect=True,
)


# ---- oracle ----------------------------------------------------------------------------------------------------------


def area_matrix(size, to):
    """(to, size): row i averages floor(i size / to) up to, not including, ceil((i + 1) size / to)."""
    matrix = torch.zeros(to, size, dtype=torch.float64)
    for i in range(to):
        begin, end = i * size // to, -(-(i + 1) * size // to)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def bicubic_matrix(size, to):
    """(to, size): Keys' kernel with a = -0.75 at half-pixel centres, border samples repeated."""
    matrix = torch.zeros(to, size, dtype=torch.float64)
    a = -0.75
    for i in range(to):
        centre = (i + 0.5) * size / to - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), size - 1)] += weight
    return matrix


def pairs(scales):
    return [(scale, scale) if isinstance(scale, int) else scale for scale in scales]


def resample(maps, size, matrix):
    down, across = matrix(maps.shape[2], size[0]), matrix(maps.shape[3], size[1])
    return torch.einsum("ih,bchw,jw->bcij", down.to(maps.device), maps, across.to(maps.device))


def oracle_parts(codes, codebook, phi, scales):
    """What each scale adds, (B, C, H, W) float64."""
    table, sizes = torch.cat([codebook.double(), torch.zeros_like(codebook[:1]).double()]), pairs(scales)
    for s, (one, (h, w)) in enumerate(zip(codes, sizes, strict=False)):
        maps = table[one].transpose(1, 2).reshape(one.shape[0], codebook.shape[1], h, w)  # code -1: the last row, zero
        maps = resample(maps, sizes[-1], bicubic_matrix)
        if phi is not None:
            p = phi.indices(len(sizes))[s]
            convolved = conv2d(maps, phi.weight[p].double(), phi.bias[p].double(), padding=1)
            maps = (1 - phi.ratio) * maps + phi.ratio * convolved
        yield maps


def oracle_inputs(codes, codebook, phi, scales):
    sums, total = [], 0
    sizes = pairs(scales)
    for part, size in zip(oracle_parts(codes, codebook, phi, scales), sizes[1:], strict=False):
        total = total + part
        sums.append(resample(total, size, area_matrix).flatten(2).transpose(1, 2))
    return torch.cat(sums, dim=1)


def check_codes(features, codebook, phi, scales, codes, metric="l2", tolerance=1e-5):
    """Along the path that the codes took, each is as near as the nearest. Returns how many are not the float64 argmin.

    The tolerance is not 1e-6 because the path is float64's: what was searched has the rounding of the parts before.
    """
    rest, table = features.double(), codebook.double()
    sizes, differ = pairs(scales), 0
    assert [tuple(one.shape) for one in codes] == [(features.shape[0], h * w) for h, w in sizes]
    for one, size, part in zip(codes, sizes, oracle_parts(codes, codebook, phi, scales), strict=True):
        assert one.dtype == torch.int64
        rows = resample(rest, size, area_matrix).flatten(2).transpose(1, 2)
        if metric == "cosine":
            loss = 1 - normalize(rows, dim=2) @ normalize(table, dim=1).T
        else:
            loss = (rows.unsqueeze(2) - table).square().sum(3)
        chosen, best = loss.gather(2, one.unsqueeze(2))[..., 0], loss.amin(2)
        assert (chosen <= best * (1 + tolerance) + 1e-12).all()
        differ += (loss.argmin(2) != one).sum().item()
        rest = rest - part
    return differ


def tensors(batch, channels, num_codes, scales, count, room=("", "cpu", torch.float32), seed=0):
    """features, codebook, phi (None for no convolutions)."""
    _, device, dtype = room
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    features = normal(batch, channels, *pairs(scales)[-1])
    codebook = normal(num_codes, channels, scale=0.7)
    phi = None
    if count:
        phi = Phi(normal(count, channels, channels, 3, 3, scale=0.1), normal(count, channels, scale=0.1), 0.5)
    return features, codebook, phi


def random_codes(batch, num_codes, scales, device="cpu", low=-1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, num_codes, (batch, h * w), generator=generator).to(device) for h, w in pairs(scales)]


# batch, channels, codes, scales, convolutions; small, because the interpreter takes 10 ms for a program
SHAPES = {
    "square": (2, 8, 70, (1, 2, 3, 4), 4),
    "not square, overlapping windows": (2, 5, 33, ((1, 1), (2, 3), (3, 4), (5, 7)), 2),
    "one scale": (2, 16, 65, (3,), 1),
    "one pixel": (1, 1, 1, (1,), 1),
    "not ascending": (1, 6, 20, (4, (1, 4), 2, 4), 0),
    "wider than a tile, one a scale": (1, 32, 129, (1, 5, (9, 10)), 3),
    "no pictures": (0, 4, 7, (1, 2), 4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# ---- the rule that gives scales their convolutions -------------------------------------------------------------------


def test_phi_indices_are_vars():
    assert Phi.indices_of(4, 10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert Phi.indices_of(4, 14) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert Phi.indices_of(1, 5) == (0,) * 5
    assert Phi.indices_of(4, 1) == (0,)
    for scales in range(2, 20):
        assert Phi.indices_of(scales, scales) == tuple(range(scales)), "one a scale"
        assert Phi.indices_of(2, scales)[0] == 0
        assert Phi.indices_of(2, scales)[-1] == 1
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Phi.indices_of(0, 3)


def test_each_scale_takes_its_convolution():
    """A convolution that is a multiple of the identity says which one it was."""
    count = 4
    weight = torch.zeros(count, 2, 2, 3, 3)
    for p in range(count):
        weight[p, :, :, 1, 1] = (p + 1) * torch.eye(2)
    codebook = torch.ones(1, 2)
    codes = [torch.zeros(1, n * n, dtype=torch.int64) for n in VAR]
    phi = Phi(weight, torch.zeros(count, 2), ratio=1.0)
    sums = multiscale_lookup(codes, codebook, phi, VAR, cumulative=True)
    steps = sums.diff(dim=0, prepend=torch.zeros_like(sums[:1]))
    found = [round(step.mean().item()) - 1 for step in steps]
    assert found == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


# ---- every backend ---------------------------------------------------------------------------------------------------


@rooms
@shapes
def test_codes_are_the_nearest(room, shape):
    batch, channels, num_codes, scales, count = shape
    features, codebook, phi = tensors(batch, channels, num_codes, scales, count, room)
    codes = multiscale_quantize(features, codebook, phi, scales, backend=room[0])
    check_codes(features, codebook, phi, scales, codes)


@rooms
def test_codes_of_one_scale_are_exact(room):
    """No rounding comes before the search: the codes' own rule holds."""
    features, codebook, phi = tensors(3, 12, 300, (5,), 1, room)
    codes = multiscale_quantize(features, codebook, phi, (5,), backend=room[0])
    assert check_codes(features, codebook, phi, (5,), codes, tolerance=1e-6) == 0


@rooms
@shapes
def test_sums(room, shape):
    backend, device, dtype = room
    batch, channels, num_codes, scales, count = shape
    _, codebook, phi = tensors(batch, channels, num_codes, scales, count, room)
    codes = random_codes(batch, num_codes, scales, device)
    exact = list(oracle_parts(codes, codebook, phi, scales))
    exact = torch.stack([sum(exact[: s + 1]) for s in range(len(exact))])
    for cumulative in (False, True):
        got, eager = (
            multiscale_lookup(codes, codebook, phi, scales, cumulative=cumulative, backend=name)
            for name in (backend, "eager")
        )
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert_as_good_as_eager(got, eager, exact if cumulative else exact[-1])
    first = multiscale_lookup(codes[:1], codebook, phi, scales, backend=backend)
    assert_as_good_as_eager(first, first if backend == "eager" else first.clone(), exact[0])


@rooms
@shapes
def test_inputs(room, shape):
    backend, device, dtype = room
    batch, channels, num_codes, scales, count = shape
    _, codebook, phi = tensors(batch, channels, num_codes, scales, count, room)
    codes = random_codes(batch, num_codes, scales, device)
    got = multiscale_inputs(codes, codebook, phi, scales, backend=backend)
    length = sum(one.shape[1] for one in codes[1:])
    assert (got.shape, got.dtype) == ((batch, length, channels), dtype)
    if len(scales) > 1:
        eager = multiscale_inputs(codes, codebook, phi, scales, backend="eager")
        assert_as_good_as_eager(got, eager, oracle_inputs(codes, codebook, phi, scales))
        assert torch.equal(multiscale_inputs(codes[:-1], codebook, phi, scales, backend=backend), got)


@rooms
@shapes
def test_steps_of_a_generation(room, shape):
    """Codes, and any vectors in their place, from a channel-first map as VAR has them."""
    check_steps(room, shape)


@gpu_cuda
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("scales", [VAR, ((1, 1), (3, 5), (17, 23)), ((4, 4), (2, 1), (9, 6))], ids=str)
@pytest.mark.parametrize("batch", [1, 40])
def test_steps_of_32_channels(room, batch, scales, count):
    """What the compiled kernel takes; 40 pictures of VAR's are enough for its larger tiles."""
    check_steps(room, (batch, 32, 70, scales, count))


def check_steps(room, shape):
    backend, device, _ = room
    batch, channels, num_codes, scales, count = shape
    features, codebook, phi = tensors(batch, channels, num_codes, scales, count, room)
    codes, sizes = random_codes(batch, num_codes, scales, device), pairs(scales)
    exact = list(oracle_parts(codes, codebook, phi, scales))
    table = torch.cat([codebook, torch.zeros_like(codebook[:1])])
    for step, (one, size) in enumerate(zip(codes, sizes, strict=True)):
        vectors = table[one].transpose(1, 2).contiguous().view(batch, channels, *size).flatten(2).transpose(1, 2)
        total = features.double() + exact[step]
        for given in (one, vectors):
            kept = features.clone()
            got, eager = (
                next_scale_input(features, given, codebook, phi, scales, step, backend=name)
                for name in (backend, "eager")
            )
            assert torch.equal(features, kept)
            assert_as_good_as_eager(got[0], eager[0], total)
            assert got[0].is_contiguous()
            if step + 1 == len(sizes):
                assert got[1] is None
            else:
                pooled = resample(total, sizes[step + 1], area_matrix).flatten(2).transpose(1, 2)
                assert_as_good_as_eager(got[1], eager[1], pooled)


@rooms
def test_strides(room):
    backend, device, dtype = room
    features, codebook, phi = tensors(2, 6, 40, (1, 2, (3, 4)), 2, room)
    codes = multiscale_quantize(features, codebook, phi, (1, 2, (3, 4)), backend="eager")
    wide = torch.full((41, 9), torch.nan, dtype=dtype, device=device)
    wide[:40, 2:8] = codebook
    last = features.contiguous(memory_format=torch.channels_last)
    turned = codebook.T.contiguous().T
    odd = Phi(phi.weight.transpose(1, 2).contiguous().transpose(1, 2), phi.bias.T.contiguous().T, phi.ratio)
    for x, table, convs in ((last, wide[:40, 2:8], phi), (features, turned, odd)):
        got = multiscale_quantize(x, table, convs, (1, 2, (3, 4)), backend=backend)
        assert all(map(torch.equal, got, codes))
        total, following = next_scale_input(x, codes[1], table, convs, (1, 2, (3, 4)), 1, backend=backend)
        want = next_scale_input(features, codes[1], codebook, phi, (1, 2, (3, 4)), 1, backend="eager")
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (total - want[0]).abs().max() <= tolerance
        assert (following - want[1]).abs().max() <= tolerance


@rooms
def test_ties_go_to_the_lowest_index(room):
    backend = room[0]
    features, codebook, phi = tensors(2, 4, 40, (1, 2, 4), 1, room)
    thrice = codebook.repeat(3, 1)
    codes = multiscale_quantize(features, thrice, phi, (1, 2, 4), backend=backend)
    assert max(one.max() for one in codes) < 40
    if backend != "eager":  # where a matrix product may round equal columns differently
        same = codebook[:1].repeat(70, 1)
        assert not any(one.any() for one in multiscale_quantize(features, same, phi, (1, 2, 4), backend=backend))
    # Whole numbers: every distance is exact, and two codes are equally far from every pixel.
    features = torch.zeros_like(features)
    codes = multiscale_quantize(features, torch.tensor([[3.0], [-1], [1], [-1]]).to(features).expand(4, 4), None, (4,),
                                backend=backend)  # fmt: skip
    assert (codes[0] == 1).all()


@rooms
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_what_is_not_finite_stays_in_its_picture(room):
    features, codebook, phi = tensors(3, 4, 70, (1, 2, 3), 2, room)
    want = multiscale_quantize(features, codebook, phi, (1, 2, 3), backend=room[0])
    features[1, 2, 0, 1] = torch.nan
    got = multiscale_quantize(features, codebook, phi, (1, 2, 3), backend=room[0])
    for one, clean in zip(got, want, strict=True):
        assert torch.equal(one[[0, 2]], clean[[0, 2]])
        assert ((one >= 0) & (one < 70)).all()
    features[1, 2, 0, 1] = torch.inf
    codebook[3, 1] = torch.nan
    for one in multiscale_quantize(features, codebook, phi, (1, 2, 3), backend=room[0]):
        assert ((one >= 0) & (one < 70)).all()


@rooms
def test_autocast_and_tf32_change_nothing_and_are_restored(room):
    backend, device, _ = room
    features, codebook, phi = tensors(1, 32, 200, (1, 2, 5), 4, room)
    want = multiscale_quantize(features, codebook, phi, (1, 2, 5), backend=backend)
    inputs = multiscale_inputs(want, codebook, phi, (1, 2, 5), backend=backend)
    before = torch.get_float32_matmul_precision()
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.conv)
    try:
        torch.set_float32_matmul_precision("medium")
        precisions = [setting.fp32_precision for setting in settings]
        with torch.autocast(device, dtype=torch.bfloat16):
            got = multiscale_quantize(features, codebook, phi, (1, 2, 5), backend=backend)
            again = multiscale_inputs(want, codebook, phi, (1, 2, 5), backend=backend)
        assert [setting.fp32_precision for setting in settings] == precisions
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, got, want))
    assert torch.equal(again, inputs)


def test_cosine(device):
    features, codebook, phi = tensors(2, 8, 60, (1, 3, 5), 2, ("", device, torch.float32))
    codes = multiscale_quantize(features, codebook, phi, (1, 3, 5), metric="cosine")
    check_codes(features, codebook, phi, (1, 3, 5), codes, "cosine")
    scaled = torch.cat([codebook, 2 * codebook])
    assert max(one.max() for one in multiscale_quantize(features, scaled, None, (5,), metric="cosine")) < 60


def test_float64(device):
    room = ("", device, torch.float64)
    features, codebook, phi = tensors(2, 8, 60, (1, 3, 5), 2, room)
    codes = multiscale_quantize(features, codebook, phi, (1, 3, 5))
    assert check_codes(features, codebook, phi, (1, 3, 5), codes, tolerance=1e-12) == 0
    exact = oracle_inputs(codes, codebook, phi, (1, 3, 5))
    torch.testing.assert_close(multiscale_inputs(codes, codebook, phi, (1, 3, 5)), exact)


def test_vars_schedule_with_fewer_wrong_codes_than_can_be_seen():
    """The published sizes: 10 scales, 680 codes of 4,096 entries and 32 channels."""
    features, codebook, phi = tensors(1, 32, 4096, VAR, 4)
    codes = multiscale_quantize(features, codebook, phi, VAR)
    assert sum(one.shape[1] for one in codes) == 680
    assert check_codes(features, codebook, phi, VAR, codes) <= 2
    assert multiscale_inputs(codes, codebook, phi, VAR).shape == (1, 679, 32)


def test_pooling_windows():
    """Windows overlap where the size does not divide: 5 pixels to 3 are [0, 2), [1, 4), [3, 5)."""
    features_hat = torch.arange(5.0).view(1, 1, 1, 5)
    zero = torch.full((1, 5), -1)
    _, following = next_scale_input(features_hat, zero, torch.ones(1, 1), None, ((1, 5), (1, 3), (1, 5)), 0)
    assert following.flatten().tolist() == [0.5, 2.0, 3.5]


# ---- gradients, compilation, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sum", "cumulative", "inputs"])
@pytest.mark.parametrize("count", [0, 2])
def test_gradients(what, count):
    scales = ((1, 1), (2, 3), (3, 4), (4, 5))
    _, codebook, phi = tensors(2, 3, 6, scales, count, ("", "cpu", torch.float64))
    codes = random_codes(2, 6, scales)
    inputs = [codebook.requires_grad_()]
    if phi is not None:
        inputs += [phi.weight.requires_grad_(), phi.bias.requires_grad_()]

    def function(table, *convs):
        phi = Phi(*convs, 0.3) if convs else None
        if what == "inputs":
            return multiscale_inputs(codes, table, phi, scales)
        return multiscale_lookup(codes, table, phi, scales, cumulative=what == "cumulative")

    assert torch.autograd.gradcheck(function, inputs)


def test_gradient_through_the_kernels_is_the_definitions(device):
    if device == "cpu" and (reason := interpreter_skip()):
        pytest.skip(reason)
    scales = (1, 2, 3)
    _, codebook, phi = tensors(2, 4, 9, scales, 2, ("", device, torch.float32))
    codes, grads = random_codes(2, 9, scales, device), []
    for backend in ("triton", "eager"):
        leaves = [one.clone().requires_grad_() for one in (codebook, phi.weight, phi.bias)]
        out = multiscale_inputs(codes, leaves[0], Phi(*leaves[1:]), scales, backend=backend)
        (out * torch.arange(out.numel(), device=device).view(out.shape).cos()).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def operator_arguments():
    features, codebook, phi = tensors(2, 4, 9, (1, 2, 3), 2)
    convs = (phi.weight, phi.bias, 0.5, [1, 1, 2, 2, 3, 3])
    codes = torch.cat(random_codes(2, 9, (1, 2, 3)), 1)
    learned = (codebook.clone().requires_grad_(), phi.weight.clone().requires_grad_(), phi.bias, *convs[2:])
    rows = torch.randn(2, 4, 4)
    return {
        "quantize": (QUANTIZE, (features, codebook, *convs, "l2")),
        "sum": (LOOKUP, (codes, *learned, "sum")),
        "cumulative": (LOOKUP, (codes[:, :5], *learned, "cumulative")),
        "inputs": (LOOKUP, (codes[:, :5], *learned, "inputs")),
        "backward": (registry["multiscale_lookup_backward"], (features, codes, codebook, *convs, "sum")),
        "step": (NEXT, (features, codes[:, 1:5], codebook, *convs, 1)),
        "last step, vectors": (NEXT, (features[..., :2, :2], rows, codebook, *convs[:3], [1, 1, 2, 2], 1)),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck(name):
    operator, arguments = operator_arguments()[name]
    torch.library.opcheck(operator.overload, arguments)


def test_compiles_as_one_graph(device, fresh_compiler):
    scales = (1, 2, 4)
    features, codebook, phi = tensors(2, 4, 9, scales, 2, ("", device, torch.float32))

    def work(features, codebook, weight, bias):
        phi = Phi(weight, bias)
        codes = multiscale_quantize(features, codebook, phi, scales)
        total, following = next_scale_input(features, codes[0], codebook, phi, scales, 0)
        return codes, multiscale_inputs(codes, codebook, phi, scales).square().sum(), total, following

    arguments = [one.clone().requires_grad_() for one in (features, codebook, phi.weight, phi.bias)]
    want = work(*arguments)
    gradients = torch.autograd.grad(want[1], arguments[1:])
    got = torch.compile(work, fullgraph=True)(*arguments)
    assert all(map(torch.equal, got[0], want[0]))
    torch.testing.assert_close(got[1:], want[1:])
    torch.testing.assert_close(torch.autograd.grad(got[1], arguments[1:]), gradients)


def bad(**changes):
    features, codebook, phi = tensors(2, 4, 9, (1, 2), 2)
    arguments = {"features": features, "codebook": codebook, "phi": phi, "scales": (1, 2)}
    return {**arguments, **changes}


Z = torch.zeros
BAD_QUANTIZE = {
    "features int": (bad(features=Z(2, 4, 2, 2).long()), TypeError, "features must be"),
    "features 3-D": (bad(features=Z(4, 2, 2)), ValueError, r"features must be \(B, 4, H, W\)"),
    "channels differ": (bad(features=Z(2, 5, 2, 2)), ValueError, r"features must be \(B, 4, H, W\)"),
    "empty codebook": (bad(codebook=Z(0, 4)), ValueError, "no empty dimension"),
    "codebook 3-D": (bad(codebook=Z(1, 9, 4)), ValueError, r"codebook must be \(K, C\)"),
    "no scales": (bad(scales=()), ValueError, "scales must be a list"),
    "scale 0": (bad(scales=(0, 2)), ValueError, "at least 1, got 0"),
    "scale of three": (bad(scales=((1, 1, 1), 2)), ValueError, r"pairs \(h, w\), got \(1, 1, 1\)"),
    "scale float": (bad(scales=(1.5, 2)), ValueError, "got 1.5"),
    "scale too large": (bad(scales=(3, 2)), ValueError, r"not be larger than the last, \(2, 2\), got \(3, 3\)"),
    "last scale": (bad(scales=(1, 3)), ValueError, r"must end in the size of features, \(2, 2\), got \(3, 3\)"),
    "phi a tuple": (bad(phi=(1, 2)), TypeError, "phi must be a Phi or None"),
    "phi's weight": (bad(phi=Phi(Z(2, 4, 3, 3, 3), Z(2, 4))), ValueError, r"phi.weight must be \(P, 4, 4, 3, 3\)"),
    "phi's bias": (bad(phi=Phi(Z(2, 4, 4, 3, 3), Z(3, 4))), ValueError, r"phi.bias must be \(2, 4\)"),
    "phi's ratio": (bad(phi=Phi(Z(1, 4, 4, 3, 3), Z(1, 4), math.nan)), ValueError, "phi.ratio must be finite"),
    "metric": (bad(metric="l1"), ValueError, "got 'l1'"),
    "backend": (bad(backend="cuda"), ValueError, "got 'cuda'"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_QUANTIZE.values(), ids=BAD_QUANTIZE)
def test_quantize_refuses(arguments, error, text):
    with pytest.raises(error, match=text) as raised:
        multiscale_quantize(**arguments)
    assert str(raised.value).startswith("multiscale_quantize: ")


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_lookups_refuse(backend):
    if backend == "triton" and (torch.cuda.is_available() or interpreter_skip()):
        pytest.skip("codes are looked at on the CPU only")
    _, codebook, phi = tensors(2, 4, 9, (1, 2), 2)
    codes = random_codes(2, 9, (1, 2))
    for wrong, error, text in (
        ([codes[0].int(), codes[1]], TypeError, "codes must be int64"),
        ([codes[0]] * 3, ValueError, "1 to 2 tensors, one a scale, got 3"),
        ([], ValueError, "got 0"),
        (codes[0], TypeError, "codes must be a list"),
        ([codes[0], codes[1][:1]], ValueError, r"codes\[1\] must be \(B, 4\), one B for all, got \(1, 4\)"),
        ([codes[0], codes[0]], ValueError, r"codes\[1\] must be \(B, 4\)"),
        ([codes[0] * 0 + 9, codes[1]], ValueError, r"must be -1 or in \[0, 9\), got 9"),
        ([codes[0] * 0 - 2, codes[1]], ValueError, "got -2"),
    ):
        for function in (multiscale_lookup, multiscale_inputs):
            with pytest.raises(error, match=text):
                function(wrong, codebook, phi, (1, 2), backend=backend)
    with pytest.raises(ValueError, match="the last may be left out"):
        multiscale_inputs(codes[:1], codebook, phi, (1, 2, 3), backend=backend)
    hat = Z(2, 4, 2, 2)
    for changes, text in (
        ({"step": 2}, "step must be below 2"),
        ({"step": -1}, "step must be at least 0"),
        ({"codes": codes[0]}, r"codes must be \(2, 4\) at step 1, got \(2, 1\)"),
        ({"codes": Z(2, 4, 3)}, r"codes must be \(2, 4, 4\) at step 1"),
        ({"features_hat": Z(2, 4, 2, 3)}, r"features_hat must be \(B, 4, 2, 2\)"),
        ({"codes": codes[1] * 0 + 9}, "got 9"),
    ):
        arguments = {"features_hat": hat, "codes": codes[1], "codebook": codebook, "phi": phi, "scales": (1, 2)}
        with pytest.raises(ValueError, match=text):
            next_scale_input(**{**arguments, "step": 1, **changes}, backend=backend)


def test_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(_native, "triton_unfit", lambda tensor: None)
    features, codebook, phi = tensors(1, 4, 9, (1, 2), 1)
    rest = (phi.weight, phi.bias, 0.5, [1, 1, 2, 2])
    assert QUANTIZE.explain(features, codebook, *rest, "l2")["triton"] == "fits"
    assert "needs the metric 'l2'" in QUANTIZE.explain(features, codebook, *rest, "cosine")["triton"]
    assert "got float64" in QUANTIZE.explain(features.double(), codebook, *rest, "l2")["triton"]
    assert "at most 32 channels, got 33" in QUANTIZE.explain(features, Z(9, 33), *rest, "l2")["triton"]
    assert "at most 2^18 codes" in LOOKUP.explain(Z(1, 5).long(), Z(1, 4).expand(2**18 + 1, 4), *rest, "sum")["triton"]
    assert NEXT.explain(features, Z(1, 4, 4), codebook, *rest, 1)["triton"] == "fits"


# ---- adversaries of the search ---------------------------------------------------------------------------------------


@triton_float32
@adversaries
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # the interpreter's
def test_adversaries_of_the_search(room, make):
    """Every code is float64's choice; equal but for less than the bits of a word that codes take, the lowest's."""
    features, codebook = adverse(make, 8)
    features, codebook = features.to(room[1]), codebook.to(room[1])
    check_adverse(features, codebook, multiscale_quantize(features, codebook, None, ((4, 8),), backend="triton")[0])


def test_a_run_of_codes_is_a_block_at_least_and_covers_all():
    kernels = pytest.importorskip("unifiedar.kernels.codes_multiscale")
    for rows in (1, 3, 32, 169, 256, 1024):
        for batch in (1, 2, 32):
            for num_codes in (1, 63, 4096, 2**18):
                tile = kernels.search_tile(rows)
                count, span = kernels._runs(batch * -(-rows // tile.rows), num_codes, tile)
                assert span % tile.codes == 0
                assert (count - 1) * span < num_codes <= count * span


# ---- the module ------------------------------------------------------------------------------------------------------


def quantizer(**options):
    torch.manual_seed(0)
    module = MultiScaleQuantizer(30, 6, (1, 2, 3, 5), **options)
    torch.nn.init.normal_(module.embedding.weight, std=0.5)
    return module


@pytest.mark.parametrize(
    ("convolutions", "keys"),
    [
        (4, [f"quant_resi.qresi_ls.{p}.{part}" for p in range(4) for part in ("weight", "bias")]),
        (1, ["quant_resi.qresi.weight", "quant_resi.qresi.bias"]),
        (0, [f"quant_resi.{s}.{part}" for s in range(4) for part in ("weight", "bias")]),
    ],
)
def test_keys_are_the_published_ones(convolutions, keys):
    module = quantizer(convolutions=convolutions)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    want = {key: (6, 6, 3, 3) if key.endswith("weight") else (6,) for key in keys}
    assert shapes == {"ema_vocab_hit_SV": (4, 30), **want, "embedding.weight": (30, 6)}
    assert [name for name, _ in module.named_parameters()] == [*keys, "embedding.weight"]
    assert list(quantizer(convolutions=convolutions, ratio=1e-7).state_dict()) == [
        "ema_vocab_hit_SV",
        "embedding.weight",
    ]


def test_counts_for_other_scales_are_dropped():
    module, state = quantizer(), quantizer().state_dict()
    state["ema_vocab_hit_SV"] = torch.ones(10, 30)
    module.load_state_dict(state)
    assert module.ema_vocab_hit_SV.shape == (4, 30)
    assert state["ema_vocab_hit_SV"].shape == (10, 30), "the caller's stays"


def test_the_published_methods_agree():
    """Five ways to the same sums."""
    module = quantizer().eval()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        codes, sums = module.f_to_idxBl_or_fhat(x, False), module.f_to_idxBl_or_fhat(x, True)
        maps = [
            module.embedding(one).transpose(1, 2).reshape(2, 6, n, n)
            for one, n in zip(codes, (1, 2, 3, 5), strict=True)
        ]
        torch.testing.assert_close(module.embed_to_fhat(maps), sums)
        torch.testing.assert_close(module.embed_to_fhat(maps, last_one=True), sums[-1])
        total, read = torch.zeros_like(x), []
        for step, one in enumerate(maps):
            returned, following = module.get_next_autoregressive_input(step, 4, total, one)
            assert returned is total
            torch.testing.assert_close(total, sums[step])
            read.append(following.flatten(2).transpose(1, 2))
        assert following is total
        torch.testing.assert_close(module.idxBl_to_var_input(codes), torch.cat(read[:-1], 1))
        with pytest.raises(ValueError, match="SN must be the number of scales, 4, got 3"):
            module.get_next_autoregressive_input(0, 3, total, maps[0])
        torch.testing.assert_close(module(x).features, sums[-1])
        other = module.f_to_idxBl_or_fhat(x, False, v_patch_nums=[(1, 2), (5, 5)])
        assert [tuple(one.shape) for one in other] == [(2, 2), (2, 25)]
        # Upsampling the sum instead of the parts: with one scale there is no difference.
        one = MultiScaleQuantizer(30, 6, (5,))
        x = torch.randn(2, 6, 5, 5)
        torch.testing.assert_close(one.embed_to_fhat([x], False, True), one.embed_to_fhat([x], True, True))
        assert [tuple(part.shape[2:]) for part in module.embed_to_fhat(maps, False)] == [(1, 1), (2, 2), (3, 3), (5, 5)]


def test_training_forward():
    """Against the loop of the published code, written anew: loss, straight-through gradient, those of the weights."""
    module = quantizer(convolutions=2, beta=0.4)
    x = torch.randn(3, 6, 5, 5, requires_grad=True)
    got = module(x)
    weight = torch.randn_like(got.features)
    parameters = [x, *module.parameters()]
    gradients = torch.autograd.grad((got.features * weight).sum() + got.loss, parameters)

    codes = module.f_to_idxBl_or_fhat(x, False)
    total, loss = torch.zeros(3, 6, 5, 5), 0
    convs = module.quant_resi.qresi_ls
    for one, n, p in zip(codes, (1, 2, 3, 5), (0, 0, 1, 1), strict=True):
        maps = module.embedding(one).transpose(1, 2).reshape(3, 6, n, n)
        maps = torch.nn.functional.interpolate(maps, size=(5, 5), mode="bicubic")
        total = total + 0.5 * maps + 0.5 * convs[p](maps)
        loss = loss + 0.4 * (total.detach() - x).square().mean() + (total - x.detach()).square().mean()
    features = x + (total - x).detach()
    want = torch.autograd.grad((features * weight).sum() + loss / 4, parameters)
    torch.testing.assert_close(got.loss, loss / 4)
    torch.testing.assert_close(got.features, features)
    torch.testing.assert_close(gradients, want)
    assert got.usages is None


def test_usage():
    module = quantizer()
    x = torch.randn(4, 6, 5, 5)
    hits = torch.stack([one.flatten().bincount(minlength=30) for one in module.f_to_idxBl_or_fhat(x, False)]).float()
    expected = torch.zeros(4, 30)
    seen = 0
    for _ in range(30):
        usages = module(x, ret_usages=True).usages
        for s in range(4):  # as published: the counter counts scales
            weight = 1 if seen == 0 else 0.1 if seen < 100 else 0.01
            expected[s] = expected[s] * (1 - weight) + hits[s] * weight
            seen += 1
    torch.testing.assert_close(module.ema_vocab_hit_SV, expected)
    assert usages == pytest.approx([(row >= 100 / 30 * 0.08).float().mean().item() * 100 for row in expected])
    module.eval()
    module(x)
    torch.testing.assert_close(module.ema_vocab_hit_SV, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_module_trains(dtype):
    torch.manual_seed(5)
    module = MultiScaleQuantizer(30, 6, (1, 2, 4))
    module.load_state_dict({name: one.to(dtype) for name, one in module.state_dict().items()})
    x = torch.randn(2, 6, 4, 4).to(dtype).float()
    want = module.train()(x)
    counted = module.ema_vocab_hit_SV.clone()
    module.ema_vocab_hit_SV.zero_()
    module.record_hit.zero_()
    module.to(dtype)
    found = module(x.to(dtype))
    found.loss.backward()
    torch.testing.assert_close(module.ema_vocab_hit_SV.float(), counted, rtol=0.01, atol=0)
    torch.testing.assert_close(found.loss.float(), want.loss, rtol=0.05, atol=0)
    assert module.embedding.weight.grad.dtype == dtype


def test_module_refuses():
    for arguments, options, text in (
        ((0, 6, (1,)), {}, "num_codes must be at least 1, got 0"),
        ((30, 0, (1,)), {}, "dim must be at least 1, got 0"),
        ((30, 6.0, (1,)), {}, "dim must be an integer, got float"),
        ((30, 6, ()), {}, "scales must name at least one, got none"),
        ((30, 6, (1,)), {"convolutions": -1}, "convolutions must be at least 0, got -1"),
        ((30, 6, (1,)), {"ratio": "half"}, "ratio must be a number, got str"),
        ((30, 6, (1,)), {"metric": "l1"}, "metric must be 'l2' or 'cosine', got 'l1'"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"MultiScaleQuantizer: {text}"):
            MultiScaleQuantizer(*arguments, **options)
    with pytest.raises(TypeError, match=r"MultiScaleQuantizer: x must be float32, .* got int64"):
        MultiScaleQuantizer(30, 6, (1, 2))(torch.zeros(1, 6, 2, 2).long())


def test_training_step_compiles_as_one_graph(fresh_compiler):
    module = quantizer(convolutions=2)
    x = torch.randn(2, 6, 5, 5)
    want = module(x)
    again = quantizer(convolutions=2)
    got = torch.compile(again, fullgraph=True)(x)
    torch.testing.assert_close((got.features, got.loss), (want.features, want.loss))
    torch.testing.assert_close(again.ema_vocab_hit_SV, module.ema_vocab_hit_SV)
    got.loss.backward()
    assert again.embedding.weight.grad.abs().sum() > 0


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@gpu_triton
@pytest.mark.parametrize("scales", [VAR, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), ((1, 1), (3, 5), (17, 23))])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_published_sizes(room, scales, batch):
    features, codebook, phi = tensors(batch, 32, 4096, scales, 4, room)
    codes = multiscale_quantize(features, codebook, phi, scales, backend="triton")
    some = min(batch, 2)
    differ = check_codes(features[:some], codebook, phi, scales, [one[:some] for one in codes])
    eager = multiscale_quantize(features[:some], codebook, phi, scales, backend="eager")
    assert differ <= check_codes(features[:some], codebook, phi, scales, eager) + 2
    got, eager = (multiscale_inputs(codes, codebook, phi, scales, backend=name) for name in ("triton", "eager"))
    assert_as_good_as_eager(got, eager, oracle_inputs(codes, codebook, phi, scales))


@gpu_cuda
@pytest.mark.parametrize(
    ("batch", "num_codes", "count", "scales"),
    [
        (1, 4096, 4, VAR),
        (3, 4096, 4, VAR),
        (32, 4096, 4, VAR),
        (70, 1000, 1, VAR),
        (2, 9000, 0, VAR),
        (5, 33, 2, ((1, 1), (2, 3), (3, 4), (5, 7))),
        (2, 300, 1, ((4, 8), (1, 64), (4, 64))),
        (40, 2500, 3, (1, 5, (9, 10))),
        (1, 1, 1, (1,)),
        (0, 7, 1, (1, 2)),
    ],
)
def test_a_cluster_encodes_a_picture(room, batch, num_codes, count, scales):
    features, codebook, phi = tensors(batch, 32, num_codes, scales, count, room)
    features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if batch % 2 else features
    codes = multiscale_quantize(features, codebook, phi, scales, backend="cuda")
    assert all(map(torch.equal, codes, multiscale_quantize(features, codebook, phi, scales)))
    some = features[-2:]  # of the last clusters, or of their second round
    eager = multiscale_quantize(some, codebook, phi, scales, backend="eager")
    differ = check_codes(some, codebook, phi, scales, [one[-2:] for one in codes])
    assert differ <= check_codes(some, codebook, phi, scales, eager) + 2


@gpu_cuda
@adversaries
def test_adversaries_of_the_cluster(room, make):
    features, codebook = adverse(make, 32)
    if room[2] == torch.float32:
        features, codebook = features.to(room[1]), codebook.to(room[1])
        check_adverse(features, codebook, multiscale_quantize(features, codebook, None, ((4, 8),), backend="cuda")[0])


@gpu_cuda
def test_clusters_in_mixed_dtypes_ties_and_what_is_not_finite(room):
    features, codebook, phi = tensors(3, 32, 600, VAR, 4, ("", "cuda", torch.float32))
    features = features.to(room[2])
    got, want = (multiscale_quantize(one, codebook, phi, VAR, backend="cuda") for one in (features, features.float()))
    assert all(map(torch.equal, got, want))
    assert (
        max(one.max() for one in multiscale_quantize(features, codebook.repeat(5, 1), phi, VAR, backend="cuda")) < 600
    )
    features[1] = torch.nan
    features[1, 0, 0, 0] = torch.inf
    broken = multiscale_quantize(features, codebook, phi, VAR, backend="cuda")
    assert all(torch.equal(one[::2], other[::2]) for one, other in zip(broken, got, strict=True))
    assert all(((one >= 0) & (one < 600)).all() for one in broken)


@gpu_cuda
@pytest.mark.parametrize("batch", [1, 32])
def test_2000_launches_of_clusters_are_equal(room, batch):
    features, codebook, phi = tensors(batch, 32, 4096, VAR, 4, room)
    first = multiscale_quantize(features, codebook, phi, VAR, backend="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        codes = multiscale_quantize(features, codebook, phi, VAR, backend="cuda")
        wrong += sum((one != other).sum() for one, other in zip(codes, first, strict=True))
    assert wrong.item() == 0


@gpu_cuda
@pytest.mark.parametrize("batch", [1, 40], ids=["small tiles", "large tiles"])
def test_200_drawings_by_steps_are_equal(room, batch):
    """Each launch begins beside the end of the one before, whose sum it reads."""
    features, codebook, phi = tensors(batch, 32, 4096, VAR, 4, room)
    codes = random_codes(batch, 4096, VAR, "cuda")

    def work():
        total, found = features, []
        for step, one in enumerate(codes):
            total, following = next_scale_input(total, one, codebook, phi, VAR, step, backend="cuda")
            found.append(total if following is None else following)
        return found

    first = work()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        wrong += sum((one != other).sum() for one, other in zip(work(), first, strict=True))
    assert wrong.item() == 0


@gpu_triton
@pytest.mark.parametrize("batch", [1, 4])
def test_2000_launches_are_equal(room, batch):
    features, codebook, phi = tensors(batch, 32, 4096, VAR, 4, room)
    first = multiscale_quantize(features, codebook, phi, VAR, backend="triton")
    inputs = multiscale_inputs(first, codebook, phi, VAR, backend="triton")
    step = next_scale_input(features, first[4], codebook, phi, VAR, 4, backend="triton")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        codes = multiscale_quantize(features, codebook, phi, VAR, backend="triton")
        wrong += sum((one != other).sum() for one, other in zip(codes, first, strict=True))
        wrong += (multiscale_inputs(codes, codebook, phi, VAR, backend="triton") != inputs).sum()
        again = next_scale_input(features, codes[4], codebook, phi, VAR, 4, backend="triton")
        wrong += (again[0] != step[0]).sum() + (again[1] != step[1]).sum()
    assert wrong.item() == 0


@gpu_triton
def test_cuda_graph(room):
    features, codebook, phi = tensors(2, 32, 4096, VAR, 4, room)

    def work():
        codes = multiscale_quantize(features, codebook, phi, VAR, backend="triton")
        step = next_scale_input(features, codes[3], codebook, phi, VAR, 3, backend="triton")
        return *codes, multiscale_inputs(codes, codebook, phi, VAR, backend="triton"), *step

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in (7, 8):
        features.copy_(tensors(2, 32, 4096, VAR, 4, room, seed=seed)[0])
        graph.replay()
        assert all(map(torch.equal, captured, work()))
