"""Pyramids of bitwise quantization: definitions against float64 formulas of another form, every backend, the module."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitwise_formulas import coin, formula, normal
from helpers import assert_as_good_as_eager, guarded, interpreter_skip, kernel_rooms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unifiedar.nn import BitwiseQuantizer, SignQuantizer
from unifiedar.ops import (
    _native,
    bitwise_inputs,
    bitwise_lookup,
    bitwise_pack,
    bitwise_quantize,
    bitwise_unpack,
    next_bitwise_input,
    registry,
)

NAMES = [name for name in registry if name.startswith("bitwise_")]
KERNELS = [name for name in NAMES if name not in ("bitwise_pyramid_backward", "bitwise_sum_backward")]


def chosen(accept):
    return pytest.mark.parametrize("room", [case for case in kernel_rooms() if accept(*case.values[0])], indirect=True)


rooms = chosen(lambda backend, device, dtype: backend != "cuda")
triton_float32 = chosen(lambda backend, device, dtype: backend == "triton" and dtype == torch.float32)
float32_rooms = chosen(lambda backend, device, dtype: backend != "cuda" and dtype == torch.float32)
gpu_triton = chosen(lambda backend, device, dtype: (backend, device) == ("triton", "cuda"))

sphericals = pytest.mark.parametrize("spherical", [True, False], ids=["BSQ", "LFQ"])


# ---- pyramids --------------------------------------------------------------------------------------------------------


def area(size, scale):
    """(scale, size): means over windows [floor(i size / scale), ceil((i + 1) size / scale))."""
    rows = np.zeros((scale, size))
    for i in range(scale):
        low, high = i * size // scale, -(-(i + 1) * size // scale)
        rows[i, low:high] = 1 / (high - low)
    return torch.from_numpy(rows)


def linear(size, scale):
    """(scale, size): linear interpolation, centres of pixels at (i + 1/2) size / scale, edges repeated."""
    rows = np.zeros((scale, size))
    for i in range(scale):
        place = min(max((i + 0.5) * size / scale - 0.5, 0), size - 1)
        low = min(int(place), size - 1)
        rows[i, low] += 1 - (place - low)
        rows[i, min(low + 1, size - 1)] += place - low
    return torch.from_numpy(rows)


def apply(maps, matrix, size):
    """A resize of (B, d, t, h, w) by a matrix a dimension."""
    for axis in (2, 3, 4):
        step = matrix(maps.shape[axis], size[axis - 2]).to(maps.device)
        maps = torch.tensordot(maps, step, ([axis], [1])).movedim(-1, axis)
    return maps


def triples(scales):
    return [tuple(scale) if len(scale) == 3 else (1, *scale) for scale in scales]


def split(tokens, scales):
    return tokens.split([math.prod(scale) for scale in triples(scales)], 1)


def along(x, bits, scales, flips=None, spherical=True, inputs="trilinear"):
    """Float64 sum, inputs and residuals along the path that bits took."""
    maps = x.double() if x.ndim == 5 else x.double().unsqueeze(2)
    size = tuple(maps.shape[2:])
    used = bits.bool() if flips is None else bits.bool() ^ flips
    total, follow, rest = torch.zeros_like(maps), [], []
    magnitude = x.shape[1] ** -0.5 if spherical else 1.0
    resize = linear if inputs == "trilinear" else area
    shapes = triples(scales)
    for s, (part, shape) in enumerate(zip(split(used, scales), shapes, strict=True)):
        rest.append(apply(maps - total, area, shape).flatten(2).mT)
        code = ((2.0 * part.double() - 1) * magnitude).mT.unflatten(2, shape)
        total = total + apply(code, linear, size)
        if s + 1 < len(shapes):
            follow.append(apply(total, resize, shapes[s + 1]).flatten(2).mT)
    total = total if x.ndim == 5 else total.squeeze(2)
    return total, torch.cat(follow, 1) if follow else x.new_zeros(len(x), 0, x.shape[1]).double(), torch.cat(rest, 1)


def check_pyramid(room, x, scales, flips=None, spherical=True, inputs="trilinear"):
    """Every bit is the sign of what float64 says is left along the path, up to rounding; sums by the tolerance rule."""
    backend = room[0]
    options = {"flips": flips, "spherical": spherical, "inputs": inputs, "residuals": True}
    got = bitwise_quantize(x, scales, backend=backend, **options)
    total, follow, rest = along(x, got.bits, scales, flips, spherical, inputs)
    assert got.bits.dtype == torch.uint8
    assert got.bits.shape == rest.shape
    assert not got.bits.numel() or got.bits.max() <= 1
    wrong = got.bits.bool() != (rest > 0)
    scale = x.detach().double().abs().max() + len(scales) if x.numel() else 0
    assert (rest[wrong].abs() <= 1e-6 * scale).all(), "a bit that is not a sign"
    assert wrong.sum() <= 2 + wrong.numel() * 1e-6
    # What eager makes of the same path: the codes are given, so the bits cannot part from each other.
    used = got.bits if flips is None else (got.bits.bool() ^ flips).to(torch.uint8)
    same = torch.promote_types(x.dtype, torch.float32)
    codes = bitwise_lookup(used, dtype=same, spherical=spherical)
    eager = bitwise_lookup(codes, triples(scales) if x.ndim == 5 else [scale[-2:] for scale in scales])
    assert_as_good_as_eager(got.quantized, eager, total)
    reference = bitwise_quantize(x, scales, backend="eager", **options)
    if torch.equal(reference.bits, got.bits):
        assert_as_good_as_eager(got.residuals, reference.residuals, rest)
        assert_as_good_as_eager(got.inputs, reference.inputs, follow)
    torch.testing.assert_close(got.residuals.double(), rest, rtol=0, atol=2e-6 * float(scale))
    torch.testing.assert_close(got.inputs.double(), follow, rtol=0, atol=2e-6 * float(scale))
    if room[:2] == ("triton", "cpu") and inputs == "area":
        return got  # once a case is enough for what an interpreter takes
    plain = bitwise_quantize(x, scales, flips=flips, spherical=spherical, packed=True, backend=backend)
    assert torch.equal(plain.bits, bitwise_pack(got.bits))
    assert torch.equal(plain.quantized, got.quantized)
    assert (plain.inputs, plain.residuals, plain.losses) == (None, None, None)
    return got


SQUARES = [(n, n) for n in (1, 2, 4, 6, 8, 12, 16)]  # Infinity at 256 pixels
# batch, d, scales
PYRAMIDS = {
    "one pixel": (2, 3, [(1, 1)]),
    "one scale": (1, 5, [(6, 7)]),
    "one scale many times": (1, 4, [(5, 5)] * 4),
    "odd": (2, 3, [(1, 1), (2, 3), (4, 4), (5, 9)]),
    "tall": (1, 2, [(1, 1), (5, 2), (9, 3), (12, 4)]),
    "up and down": (1, 3, [(7, 2), (3, 9), (1, 1), (8, 6)]),
    "larger than the map": (2, 2, [(9, 11), (30, 2), (3, 40), (4, 3)]),
    "wide windows": (1, 1, [(1, 1), (2, 2), (3, 1), (37, 61)]),
    "more than a block": (1, 2, [(1, 1), (13, 20), (47, 50)]),
    "wider than a block": (1, 1, [(2, 3), (11, 131), (20, 140)]),
    "no pictures": (0, 3, [(1, 1), (2, 2)]),
}


@rooms
@sphericals
@pytest.mark.parametrize("case", PYRAMIDS.values(), ids=PYRAMIDS)
def test_pyramids(room, case, spherical):
    _, device, dtype = room
    batch, dim, scales = case
    x = (normal(batch, dim, *scales[-1]) * 1.5).to(device, dtype)
    length = sum(h * w for h, w in scales)
    flips = (torch.rand(batch, length, dim, generator=torch.Generator().manual_seed(1)) < 0.2).to(device)
    if not spherical or dtype == torch.float32:
        check_pyramid(room, x, scales, spherical=spherical)
    if spherical or dtype == torch.float32:
        check_pyramid(room, x, scales, flips, spherical, "area")


@rooms
def test_published_schedule_in_small(room):
    """Infinity's scales of 256 pixels; on the CPU few channels, which are independent of each other."""
    backend, device, dtype = room
    x = normal(1 if device == "cpu" else 8, 2 if backend == "triton" and device == "cpu" else 32, 16, 16)
    check_pyramid(room, x.to(device, dtype), SQUARES)
    if dtype == torch.float32:
        check_pyramid(room, x.to(device).requires_grad_(), [(1, *size) for size in SQUARES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames(device, dtype):
    """Three dimensions, which no kernel takes."""
    scales = [(1, 1, 1), (1, 2, 3), (2, 3, 3), (3, 4, 5)]
    x = normal(2, 3, 3, 4, 5).to(device, dtype)
    got = check_pyramid(("eager", device, dtype), x, scales)
    assert torch.equal(bitwise_lookup(got.bits, scales), got.quantized)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 2**32),
)
def test_any_dimension_and_schedule(dim, scales, seed):
    x = normal(2, dim, *scales[-1], seed=seed)
    length = sum(h * w for h, w in scales)
    flips = normal(2, length, dim, seed=seed + 1) > 1
    check_pyramid(("eager", "cpu", torch.float32), x, scales, flips)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 2**32))
def test_any_schedule_by_kernels(scales, seed):
    if torch.cuda.is_available() or interpreter_skip():
        pytest.skip("interpreted kernels are not to be had here")
    x = normal(1, 2, *scales[-1], seed=seed)
    check_pyramid(("triton", "cpu", torch.float32), x, scales)


@float32_rooms
def test_bits_to_sums_inputs_and_steps(room):
    """At once, step by step, from labels of every kind, words and codes: the same numbers, which the quantizer saw."""
    backend, device, _ = room
    scales = [(1, 1), (2, 3), (4, 4), (5, 9)]
    found = bitwise_quantize(normal(2, 3, 5, 9).to(device), scales, inputs="trilinear", backend=backend)
    bits = found.bits
    total, follow = bitwise_lookup(bits, scales, backend=backend), bitwise_inputs(bits, scales, backend=backend)
    assert torch.equal(total, found.quantized)
    assert torch.equal(follow, found.inputs)
    for kind in (torch.bool, torch.int32, torch.int64):
        assert torch.equal(bitwise_lookup(bits.to(kind), scales, backend=backend), total)
    packed = bitwise_pack(bits)
    assert torch.equal(bitwise_lookup(packed, scales, dim=3, backend=backend), total)
    assert torch.equal(bitwise_inputs(packed, scales, dim=3, backend=backend), follow)
    assert torch.equal(bitwise_lookup(bitwise_lookup(bits), scales, backend=backend), total)
    wide = bitwise_lookup(
        [(1, *scale) for scale in scales] and bits, [(1, *scale) for scale in scales], backend=backend
    )
    assert torch.equal(wide, total.unsqueeze(2))
    transposed = bits.mT.contiguous().mT
    assert torch.equal(bitwise_lookup(transposed, scales, backend=backend), total)

    features, each = None, []
    for step, part in enumerate(split(bits, scales)):
        before = None if features is None else features.clone()
        after, following = next_bitwise_input(features, part, scales, step, backend=backend)
        assert features is None or torch.equal(features, before), "the sum given is not written to"
        features = after
        if following is not None:
            each.append(following)
    assert following is None
    assert torch.equal(features, total)
    assert torch.equal(torch.cat(each, 1), follow)


@float32_rooms
def test_several_steps_on_top_of_a_sum(room):
    """The operator beneath takes any run of scales, and adds what it is given once."""
    backend, device, _ = room
    scales = [(1, 1), (2, 3), (4, 4), (5, 9)]
    bits = (normal(2, 68, 3) > 0).to(torch.uint8).to(device)
    start = normal(2, 3, 1, 5, 9).to(device)
    schedule = [size for scale in scales for size in (1, *scale)]
    total, follow = registry["bitwise_sum"](bits[:, 1:23], start, schedule, 1, 3, True, True, backend)
    want, each = start.squeeze(2), []
    for step, part in ((1, bits[:, 1:7]), (2, bits[:, 7:23])):
        want, following = next_bitwise_input(want, part, scales, step, backend="eager")
        each.append(following)
    torch.testing.assert_close(total.squeeze(2), want)
    torch.testing.assert_close(follow, torch.cat(each, 1))


@float32_rooms
def test_flips_are_errors_that_later_scales_answer(room):
    backend, device, _ = room
    scales = [(1, 1), (4, 4), (8, 8)]
    x = normal(2, 4, 8, 8).to(device)
    plain = bitwise_quantize(x, scales, backend=backend)
    flips = torch.zeros(2, 81, 4, dtype=torch.bool, device=device)
    assert torch.equal(bitwise_quantize(x, scales, flips=flips, backend=backend).quantized, plain.quantized)
    flips[:, 0] = True
    noisy = bitwise_quantize(x, scales, flips=flips, backend=backend)
    assert torch.equal(noisy.bits[:, :1], plain.bits[:, :1]), "labels are not flipped"
    assert not torch.equal(noisy.bits[:, 1:], plain.bits[:, 1:])
    used = (noisy.bits.bool() ^ flips).to(torch.uint8)
    assert torch.equal(bitwise_lookup(used, scales, backend=backend), noisy.quantized)


def test_gradcheck_of_pyramids():
    """What is subtracted does not move with the features, so that finite differences see the same constants."""
    scales = [(1, 1), (2, 3), (4, 4), (5, 3)]
    x = normal(1, 2, 5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bitwise_quantize(x, scales, residuals=True).residuals, (x,))
    codes = normal(1, 38, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda codes: bitwise_lookup(codes, scales), (codes,))
    assert torch.autograd.gradcheck(lambda codes: bitwise_inputs(codes, scales), (codes,))
    start = normal(1, 2, 5, 3, seed=1).double().requires_grad_()
    part = codes.detach()[:, 1:7].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: next_bitwise_input(*args, scales, 1), (start, part))
    labels = torch.ones(1, 6, 2, dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda start: next_bitwise_input(start, labels, scales, 1), (start,))
    found = bitwise_quantize(x, scales, inputs="area", residuals=True)
    assert found.residuals.requires_grad
    assert not found.quantized.requires_grad
    assert not found.inputs.requires_grad


@pytest.mark.parametrize("device_type", ["cpu"])
def test_autocast_changes_nothing(device_type):
    x = normal(2, 8, 4, 4)
    scales = [(1, 1), (2, 2), (4, 4)]
    want = bitwise_quantize(x, scales, inputs="trilinear", residuals=True)
    with torch.autocast(device_type, dtype=torch.bfloat16):
        got = bitwise_quantize(x, scales, inputs="trilinear", residuals=True)
        codes = bitwise_lookup(got.bits, scales)
    assert all(torch.equal(*pair) for pair in zip(got[:4], want[:4], strict=True))
    assert torch.equal(codes, want.quantized)


@rooms
def test_empty(room):
    backend, device, dtype = room
    found = bitwise_quantize(torch.zeros(2, 0, 8, device=device, dtype=dtype), inv_temperature=1.0, backend=backend)
    assert found.bits.shape == (2, 0, 8)
    assert [one.abs().max().item() for one in (found.losses.sample_entropy, found.losses.commitment)] == [0, 0]
    assert bitwise_quantize(torch.zeros(0, 8, device=device), packed=True, backend=backend).bits.shape == (0,)
    x = torch.zeros(0, 8, device=device, dtype=dtype, requires_grad=True)
    bitwise_quantize(x, backend=backend).quantized.sum().backward()
    assert x.grad.shape == (0, 8)
    features, follow = next_bitwise_input(
        None, torch.zeros(0, 1, 8, dtype=torch.uint8, device=device), [(1, 1), (2, 2)], 0, backend=backend
    )
    assert (features.shape, follow.shape) == ((0, 8, 2, 2), (0, 4, 8))


# ---- what the kernels write and take ---------------------------------------------------------------------------------


@triton_float32
@pytest.mark.parametrize(("dim", "offset"), [(32, 64), (32, 3), (13, 64)], ids=["packs", "misaligned", "odd"])
def test_kernels_write_their_outputs_and_nothing_else(room, dim, offset):
    _, device, _ = room
    kernels = _native.kernels("codes_bitwise")
    x = normal(83, dim).to(device)
    for packed in (False, True):
        bits = (83,) if packed else (83, dim)
        codes, check = guarded((83, dim), torch.float32, device, offset)
        labels, check_labels = guarded(bits, torch.int64 if packed else torch.float32, device, offset)
        parts, check_parts = guarded((kernels.losses_parts(83, dim), dim + 2), torch.float32, device, offset)
        kernels.bitwise_quantize(x, 0.5, 3.0, True, labels, codes, parts)
        for one in (check, check_labels, check_parts):
            one()
        assert torch.equal(codes, torch.where(x > 0, 0.5, -0.5))
    gradient, check = guarded((83, dim), torch.float32, device, offset)
    kernels.bitwise_quantize_backward(x, x, torch.ones(dim + 2, device=device), 0.5, 3.0, True, gradient)
    check()

    scales = [(1, 1), (2, 3), (4, 5)]
    x = normal(2, 3, 4, 5).to(device)
    want = bitwise_quantize(x, scales, inputs="area", residuals=True, backend="triton")
    shapes = [(2, 3, 4, 5), (2, 26, 3), (2, 27, 3)]
    (total, *rest), checks = zip(*(guarded(shape, torch.float32, device, offset) for shape in shapes), strict=True)
    workspace, check_workspace = guarded((2, 6, 20), torch.float32, device, offset)
    bits, check_bits = guarded((2, 27, 3), torch.float32, device, offset)
    magnitude = bitwise_lookup(torch.ones(3, dtype=torch.uint8))[0].item()
    kernels.bitwise_pyramid(
        x, None, None, None, _native.integers_on(x.device, (1, 1, 2, 3, 4, 5)).view(3, 2), 3, magnitude,
        "area", workspace, bits, total, rest[0], rest[1],
    )  # fmt: skip
    for one in (*checks, check_workspace, check_bits):
        one()
    assert torch.equal(bits.to(torch.uint8), want.bits)
    for one, other in zip((total, *rest), want[1:4], strict=True):
        assert torch.equal(one, other)


def test_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(_native, "triton_unfit", lambda tensor: None)
    double = torch.zeros(2, 4, 1, 2, 2, dtype=torch.float64)
    schedule = [1, 1, 1, 1, 2, 2]
    pyramid, total = registry["bitwise_pyramid"], registry["bitwise_sum"]
    assert "float64" in pyramid.explain(double, None, schedule, True, "", False)["triton"]
    assert pyramid.explain(double.float(), None, schedule, True, "", False)["triton"] == "fits"
    reason = pyramid.explain(double.float(), None, [2, 1, 1, 1, 2, 2], True, "", False)["triton"]
    assert reason == "needs scales of one frame, got 2"
    assert "float64" in total.explain(double[:, :, 0, 0], None, schedule, 0, 2, True, False)["triton"]
    labels = torch.zeros(2, 5, 4, dtype=torch.uint8)
    assert total.explain(labels, None, schedule, 0, 2, True, False)["triton"] == "fits"
    assert "float64" in total.explain(labels, double, schedule, 0, 2, True, False)["triton"]
    huge = [1, 2**15, 2**15]
    assert (
        total.explain(labels, None, huge, 0, 1, True, False)["triton"] == f"needs fewer than 2^30 pixels, got {2**30}"
    )
    assert "float64" in registry["bitwise_quantize"].explain(double, True, False, None)["triton"]
    assert "float64" in registry["bitwise_lookup"].explain(labels, 0, True, torch.float64)["triton"]
    monkeypatch.undo()
    if interpreter_skip() is None:
        assert "bfloat16" in registry["bitwise_lookup"].explain(labels, 0, True, torch.bfloat16)["triton"]


# ---- torch.library, torch.compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=generator).to(device)
    maps = torch.randn(2, 3, 1, 4, 5, generator=generator).to(device)
    schedule = [1, 1, 1, 1, 2, 3, 1, 4, 5]
    bits = (torch.rand(2, 27, 3, generator=generator) < 0.5).to(device)
    backend = "triton" if device == "cuda" or not interpreter_skip() else "eager"
    codes = torch.randn(2, 6, 3, generator=generator).to(device)
    arguments = {
        "bitwise_pack": [(bits, backend)],
        "bitwise_unpack": [(torch.arange(6, device=device), 3, backend)],
        "bitwise_lookup": [(bits, 0, True, torch.float32, backend), (torch.arange(6, device=device), 3, False,
                                                                     torch.float16, "eager")],
        "bitwise_quantize": [
            (x.clone().requires_grad_(), True, True, 2.0, backend),
            (x.clone().requires_grad_(), False, False, None, "auto"),
        ],
        "bitwise_quantize_backward": [(x, x, torch.ones(8, device=device), True, 2.0, backend), (x, None, None, True,
                                                                                                 None, "eager")],
        "bitwise_pyramid": [
            (maps.clone().requires_grad_(), bits, schedule, True, "area", True, backend),
            (maps, None, schedule, True, "", False, "auto"),
        ],
        "bitwise_pyramid_backward": [(bits.float(), schedule)],
        "bitwise_sum_backward": [
            (maps, torch.ones(2, 20, 3, device=device), schedule, 1, 2, True, True),
            (maps, torch.ones(2, 0, 3, device=device), schedule, 0, 3, False, False),
        ],
        "bitwise_sum": [
            (codes.requires_grad_(), maps.clone().requires_grad_(), schedule, 1, 2, True, True, backend),
            (bits.to(torch.uint8), None, schedule, 0, 3, True, False, "auto"),
        ],
    }[name]  # fmt: skip
    for case in arguments:
        torch.library.opcheck(registry[name].overload, case)


@float32_rooms
def test_compiles_whole(room, fresh_compiler):
    backend, device, _ = room
    scales = [(1, 1), (2, 3), (4, 4)]

    def function(x, flips):
        found = bitwise_quantize(x, scales, flips=flips, inputs="trilinear", residuals=True, backend=backend)
        tokens = bitwise_quantize(found.residuals, inv_temperature=1.0, backend=backend)
        out = bitwise_lookup(tokens.quantized, scales, backend=backend)
        _, follow = next_bitwise_input(out, found.bits[:, 1:7], scales, 1, backend=backend)
        words = bitwise_pack(found.bits, backend=backend)
        labels = bitwise_unpack(words, 3, backend=backend)
        loss = out.square().sum() + follow.sum() + found.inputs.sum() + tokens.losses.sample_entropy
        return loss + tokens.losses.codebook_entropy + tokens.losses.commitment + labels.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = normal(batch, 3, 4, 4, seed=batch).to(device)
        flips = (normal(batch, 23, 3, seed=9) > 1).to(device)
        results = []
        for run in (function, compiled):
            leaf = x.clone().requires_grad_()
            out = run(leaf, flips)
            out.backward()
            results.append((out.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])


# ---- bad input -------------------------------------------------------------------------------------------------------

ONE = torch.zeros(2, 4)
MAP = torch.zeros(2, 4, 3, 5)
BITS = torch.zeros(2, 16, 4, dtype=torch.uint8)
SCALES = [(1, 1), (3, 5)]
BAD = {
    "features a list": (lambda: bitwise_quantize([1.0]), TypeError, "features must be a tensor, got list"),
    "features int": (lambda: bitwise_quantize(ONE.long()), TypeError, "features must be float32"),
    "features 0-d": (lambda: bitwise_quantize(torch.tensor(1.0)), ValueError, "d from 1 to 64"),
    "65 channels": (lambda: bitwise_quantize(torch.zeros(2, 65)), ValueError, r"got \(2, 65\)"),
    "no channels": (lambda: bitwise_quantize(torch.zeros(2, 0)), ValueError, "d from 1 to 64"),
    "temperature text": (lambda: bitwise_quantize(ONE, inv_temperature="1"), TypeError, "inv_temperature must be a"),
    "temperature zero": (lambda: bitwise_quantize(ONE, inv_temperature=0), ValueError, "must be positive, got 0"),
    "temperature nan": (lambda: bitwise_quantize(ONE, inv_temperature=math.nan), ValueError, "must be finite"),
    "flips alone": (lambda: bitwise_quantize(ONE, flips=ONE > 0), ValueError, "flips must be left out without scales"),
    "inputs alone": (lambda: bitwise_quantize(ONE, inputs="area"), ValueError, "inputs must be left out"),
    "residuals alone": (lambda: bitwise_quantize(ONE, residuals=True), ValueError, "residuals must be left out"),
    "losses of a pyramid": (lambda: bitwise_quantize(MAP, SCALES, inv_temperature=1.0), ValueError, "with scales"),
    "three dimensions": (lambda: bitwise_quantize(MAP[0], SCALES), ValueError, r"must be \(B, d, H, W\)"),
    "scales a number": (lambda: bitwise_quantize(MAP, 3), ValueError, "scales must be a sequence"),
    "no scales": (lambda: bitwise_quantize(MAP, []), ValueError, "at least one"),
    "scales flat": (lambda: bitwise_quantize(MAP, [1, 3, 5]), ValueError, "got 1 at 0"),
    "scales mixed": (lambda: bitwise_quantize(MAP, [(1, 1), (1, 3, 5)]), ValueError, r"got \(1, 3, 5\) at 1"),
    "scale zero": (lambda: bitwise_quantize(MAP, [(0, 1), (3, 5)]), ValueError, r"scales\[0\] must be at least 1"),
    "scale of floats": (lambda: bitwise_quantize(MAP, [(1.0, 1), (3, 5)]), TypeError, r"scales\[0\] must be an int"),
    "other size": (lambda: bitwise_quantize(MAP, [(1, 1), (3, 4)]), ValueError, r"\(1, 3, 5\), got \(1, 3, 4\)"),
    "inputs unknown": (lambda: bitwise_quantize(MAP, SCALES, inputs="bicubic"), ValueError, "got 'bicubic'"),
    "flips float": (lambda: bitwise_quantize(MAP, SCALES, flips=BITS.float()), TypeError, "flips must be bool"),
    "flips short": (lambda: bitwise_quantize(MAP, SCALES, flips=BITS[:, 1:] > 0), ValueError, r"\(2, 16, 4\)"),
    "flips elsewhere": (lambda: bitwise_quantize(MAP, SCALES, flips=(BITS > 0).to("meta")), ValueError, "device"),
    "backend": (lambda: bitwise_quantize(ONE, backend="fast"), ValueError, "got 'fast'"),
    "no cuda backend": (lambda: bitwise_quantize(ONE, backend="cuda"), ValueError, "one that this operator has"),
    "lookup of floats": (lambda: bitwise_lookup(ONE), TypeError, "bits must be uint8, bool, int64, int32"),
    "lookup dtype": (lambda: bitwise_lookup(BITS, dtype=torch.int32), TypeError, "floating-point"),
    "lookup sum dtype": (lambda: bitwise_lookup(BITS, SCALES, dtype=torch.float16), ValueError, "left out"),
    "lookup of words": (lambda: bitwise_lookup(BITS, dim=4), TypeError, "bits must be int64"),
    "lookup of long words": (lambda: bitwise_lookup(BITS.long(), dim=65), ValueError, "at most 64"),
    "lookup of 65 bits": (lambda: bitwise_lookup(torch.zeros(1, 65).bool()), ValueError, "d from 1 to 64"),
    "lookup short": (lambda: bitwise_lookup(BITS[:, :15], SCALES), ValueError, r"bits must be \(B, 16, d\)"),
    "lookup short words": (lambda: bitwise_lookup(BITS[:, :15, 0].long(), SCALES, dim=4), ValueError, r"\(B, 16\)"),
    "inputs of one picture": (lambda: bitwise_inputs(BITS[0], SCALES), ValueError, r"bits must be \(B, 16, d\)"),
    "pack floats": (lambda: bitwise_pack(ONE), TypeError, "bitwise_pack: bits must be"),
    "pack a scalar": (lambda: bitwise_pack(torch.tensor(1)), ValueError, r"must be \(\.\.\., d\)"),
    "unpack labels": (lambda: bitwise_unpack(BITS, 4), TypeError, "packed must be int64"),
    "unpack nothing": (lambda: bitwise_unpack(BITS.long(), 0), ValueError, "dim must be at least 1"),
    "step": (lambda: next_bitwise_input(None, BITS[:, :1], SCALES, 2), ValueError, "step must be below"),
    "step below": (lambda: next_bitwise_input(None, BITS[:, :1], SCALES, -1), ValueError, "at least 0"),
    "bits of another step": (lambda: next_bitwise_input(None, BITS, SCALES, 0), ValueError, r"\(B, 1, d\)"),
    "sum of another size": (
        lambda: next_bitwise_input(MAP[:, :, 1:], BITS[:, :1], SCALES, 0), ValueError, r"must be \(2, 4, 3, 5\)"
    ),
    "sum in half": (lambda: next_bitwise_input(MAP.half(), BITS[:, :1], SCALES, 0), TypeError, "features_hat must be"),
    "sum elsewhere": (lambda: next_bitwise_input(MAP.to("meta"), BITS[:, :1], SCALES, 0), ValueError, "device"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    call, error, text = case
    with pytest.raises(error, match=text) as raised:
        call()
    assert str(raised.value).split(":")[0].startswith(("bitwise_", "next_bitwise_input"))


# ---- the module ------------------------------------------------------------------------------------------------------


def published(x, scales):
    """The published quantizer's arithmetic in its own order, straight through normalized signs: sum, bits, inputs."""
    dim, size = x.shape[1], tuple(scales[-1])
    rest, total, bits, inputs = x, 0.0, [], []
    for s, scale in enumerate(scales):
        pooled = F.interpolate(rest, size=scale, mode="area") if tuple(scale) != size else rest
        unit = F.normalize(pooled, dim=1)
        code = torch.where(unit > 0, 1.0, -1.0) / math.sqrt(dim)
        code = unit + (code - unit).detach()
        bits.append((code > 0).movedim(1, -1))
        if tuple(scale) != size:
            code = F.interpolate(code, size=size, mode="trilinear")
        rest, total = rest - code.detach(), total + code
        if s + 1 < len(scales):
            inputs.append(F.interpolate(total, size=scales[s + 1], mode="area"))
    return total, bits, inputs


@pytest.mark.parametrize("dim", [14, 32, 64])
def test_the_module_is_the_published_quantizer(dim, device):
    module = BitwiseQuantizer(dim).to(device)
    assert list(module.state_dict()) == ["lfq.mask"]
    assert torch.equal(module.lfq.mask.cpu(), 2 ** torch.arange(dim - 1, -1, -1))
    scales = [(1, n, n) for n in (1, 2, 4, 6, 8)]
    x, grad = normal(2, dim, 8, 8).to(device), normal(2, dim, 8, 8, seed=1).to(device)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    total, bits, inputs = published(theirs.unsqueeze(2), scales)
    (total.squeeze(2) * grad).sum().backward()
    out = module(ours, scales, return_residual_norm_per_scale=True)
    (out.features * grad).sum().backward()
    torch.testing.assert_close(out.features, total.squeeze(2), rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert out.indices == [None] * 5
    assert all(torch.equal(one, other.int()) for one, other in zip(out.bits, bits, strict=True))
    assert {one.dtype for one in out.bits} == {torch.int32}
    for one, other in zip(out.inputs, inputs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=2e-6)
    assert out.losses.tolist() == [0] * 5
    assert len(out.residual_norms) == 5
    pooled = F.interpolate(x.unsqueeze(2), size=(1, 1, 1), mode="area")
    assert out.residual_norms[0] == (pooled.abs() < 0.05 * dim**-0.5).float().mean()
    with torch.no_grad():
        again = module(x.unsqueeze(2), scales)
    assert again.features.shape == (2, dim, 8, 8)
    assert torch.equal(again.features, out.features.detach())
    assert again.residual_norms == []
    assert torch.equal(module.get_codes_from_indices(out.bits, "bit_label").squeeze(2), again.features)
    packed = [bitwise_pack(part) for part in out.bits]
    assert torch.equal(module.get_codes_from_indices(packed).squeeze(2), again.features)
    assert torch.equal(BitwiseQuantizer(dim, [s[1:] for s in scales]).to(device)(x).features, again.features)


def test_the_module_of_one_scale_takes_one():
    out = BitwiseQuantizer(4)(normal(2, 4, 3, 5), [(3, 5)])
    assert (out.inputs, len(out.bits)) == ([], 1)
    with pytest.raises(ValueError, match="scale_schedule must be given"):
        BitwiseQuantizer(4)(normal(2, 4, 3, 5))
    for options, text in (
        ({"inv_temperature": 0.0}, "inv_temperature must be above 0, got 0.0"),
        ({"entropy_weight": "much"}, "entropy_weight must be a number, got str"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"SignQuantizer: {text}"):
            BitwiseQuantizer(4, **options)
    with pytest.raises(TypeError, match=r"BitwiseQuantizer: x must be float32, .* got int64"):
        BitwiseQuantizer(4, [(1, 1)])(torch.ones(1, 4, 1, 1).long())
    with pytest.raises(ValueError, match="dim must be from 1 to 64, got 65"):
        BitwiseQuantizer(65)


@sphericals
def test_losses_of_the_module(spherical):
    """Each scale's, over its own residuals, weighted; their gradient reaches the features."""
    scales = [(1, 1), (2, 2), (4, 4)]
    options = {"spherical": spherical, "entropy_weight": 0.1, "commitment_weight": 0.25, "diversity": 0.7,
               "inv_temperature": 2.0}  # fmt: skip
    module = BitwiseQuantizer(6, scales, **options)
    x = normal(3, 6, 4, 4).double().float().requires_grad_()
    out = module(x)
    rest = along(x.detach(), bitwise_quantize(x, scales, spherical=spherical).bits, scales, spherical=spherical)[2]
    want = []
    for part in split(rest, scales):
        _, sample, commitment, probability = formula(part.flatten(0, 1), spherical, 2.0)
        entropy = sample - 0.7 * coin(torch.logit(probability)).sum()
        want.append(0.1 / 2.0 * entropy + 0.25 * commitment)
    torch.testing.assert_close(out.losses.double(), torch.stack(want), rtol=1e-4, atol=1e-5)
    out.losses.sum().backward()
    assert x.grad.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(module(x).losses, out.losses.detach())


def test_sign_quantizer_shapes():
    sign = SignQuantizer(5)
    for shape, channel in (((2, 7, 5), -1), ((2, 5, 3, 4), 1), ((2, 5, 1, 3, 4), 1)):
        x = normal(*shape)
        out = sign(x)
        assert out.quantized.shape == x.shape
        assert out.indices is None
        assert torch.equal(out.quantized > 0, x > 0)
        assert torch.equal(out.bit_indices.bool(), x.movedim(channel, -1) > 0)
        assert out.entropy_aux_loss == 0
    codes = sign.indices_to_codes(out.bit_indices, "bit_label")
    assert torch.equal(codes, out.quantized)
    assert torch.equal(sign.indices_to_codes(bitwise_pack(out.bit_indices)), out.quantized)
    flat = out.bit_indices.reshape(2, 12, 5)
    assert sign.indices_to_codes(flat, "bit_label").shape == (2, 5, 12), "as published: by the dimensions of the bits"
    assert sign.indices_to_codes(bitwise_pack(flat)).shape == (2, 12, 5)
    with pytest.raises(ValueError, match="label_type must be 'int_label' or 'bit_label', got 'bits'"):
        sign.indices_to_codes(flat, "bits")


def test_self_correction(device):
    scales = [(1, n, n) for n in (2, 4, 8)]
    module = BitwiseQuantizer(3, scales).to(device)
    x = normal(4, 3, 8, 8).to(device)
    flips = module.draw_flips(4, strength=0.3, generator=torch.Generator(device).manual_seed(0), device=device)
    inputs, bits = module.self_correct(x, flips=flips)
    want = bitwise_quantize(x, scales, flips=flips, inputs="trilinear")
    assert torch.equal(inputs, want.inputs)
    assert torch.equal(torch.cat(bits, 1), want.bits)
    drawn, _ = module.self_correct(x, generator=torch.Generator(device).manual_seed(0))
    assert torch.equal(drawn, inputs), "the same generator draws the same flips"
    clean, _ = module.self_correct(x, strength=0.0)
    assert torch.equal(clean, bitwise_quantize(x, scales, inputs="trilinear").inputs)

    patched, labels = module.self_correct(x, flips=flips, patchify=True)
    assert patched.shape == (4, 4 + 16, 12)
    assert [part.shape for part in labels] == [(4, 1, 12), (4, 4, 12), (4, 16, 12)]
    maps = bits[2].view(4, 8, 8, 3)
    for c, dy, dx in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(labels[2][..., 4 * c + 2 * dy + dx], maps[:, dy::2, dx::2, c].flatten(1))
        follow = inputs[:, -64:].view(4, 8, 8, 3)
        assert torch.equal(patched[:, 4:, 4 * c + 2 * dy + dx], follow[:, dy::2, dx::2, c].flatten(1))


def test_drawn_flips_have_one_probability_a_scale():
    module = BitwiseQuantizer(16, [(20, 20)] * 40)
    generator = torch.Generator().manual_seed(0)
    flips = module.draw_flips(4, strength=0.3, noisy_scales=30, generator=generator)
    shares = torch.stack([part.float().mean() for part in split(flips, module.scales)])
    assert shares[30:].max() == 0
    hundredths = shares[:30] * 100
    assert hundredths.max() < 31
    assert hundredths.max() > 20
    assert hundredths.min() < 10
    # 25,600 bits a scale: a share is within .6 hundredths (four deviations at .5) of the drawn one, a whole number.
    assert (hundredths - hundredths.round()).abs().mean() < 0.3
    assert flips.dtype == torch.bool
    least = module.draw_flips(4, strength=0.01, generator=generator)
    shares = torch.stack([part.float().mean() for part in split(least, module.scales)])
    assert {round(100 * share) for share in shares.tolist()} == {0, 1}, "the strength itself is drawn, too"
    assert not module.draw_flips(4, strength=0, generator=generator).any()
    with pytest.raises(ValueError, match="strength must be from 0 to 1, got 2"):
        module.draw_flips(1, strength=2)


# ---- on a GPU: races, graphs, streams, syncs, published sizes --------------------------------------------------------

INFINITY = [(n, n) for n in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)]
TALL = [(1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24), (90, 30),
        (111, 37)]  # fmt: skip


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize("scales", [INFINITY, TALL, [(2 * h, 2 * w) for h, w in INFINITY]], ids=["2B", "tall", "8B"])
@pytest.mark.parametrize("batch", [1, 8])
def test_published_sizes(room, scales, batch):
    _, device, dtype = room
    x = normal(batch, 14 if scales[-1] == (128, 128) else 32, *scales[-1]).to(device, dtype)
    length = sum(h * w for h, w in scales)
    flips = torch.rand(batch, length, x.shape[1], device=device) < 0.1
    check_pyramid(room, x, scales)
    check_pyramid(room, x, scales, flips, inputs="area")


@pytest.mark.gpu
@gpu_triton
def test_two_thousand_launches_agree(room):
    backend, device, dtype = room
    x, maps = normal(5000, 32).to(device, dtype), normal(8, 32, 16, 16).to(device, dtype)
    flips = torch.rand(8, sum(h * w for h, w in SQUARES), 32, device=device) < 0.1
    sums = torch.ones(34, device=device)
    backward = registry["bitwise_quantize_backward"]

    def run():
        found = bitwise_quantize(x, packed=True, inv_temperature=3.0, backend=backend)
        pyramid = bitwise_quantize(maps, SQUARES, flips=flips, inputs="area", residuals=True, backend=backend)
        trilinear = bitwise_quantize(maps, SQUARES, inputs="trilinear", backend=backend)
        again = bitwise_lookup(trilinear.bits, SQUARES, backend=backend)
        return (
            *found[:2], *found.losses, *pyramid[:4], *trilinear[:3], again, backward(x, x, sums, True, 3.0, backend)
        )  # fmt: skip

    first = run()
    differ = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2000):
        for got, want in zip(run(), first, strict=True):
            differ += (got != want).any()
    assert differ.item() == 0


@pytest.mark.gpu
@gpu_triton
@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph(room, warm):
    backend, device, dtype = room
    scales = [(1, 1), (3, 2), (5, 7 if warm else 8)]  # another schedule that nothing has copied to the device yet
    x = normal(2, 5, *scales[-1]).to(device, dtype)
    flips = torch.zeros(2, sum(h * w for h, w in scales), 5, dtype=torch.bool, device=device)

    def run():
        found = bitwise_quantize(x, scales, flips=flips, inputs="trilinear", residuals=True, backend=backend)
        rows = bitwise_quantize(found.residuals, inv_temperature=2.0, packed=True, backend=backend)
        step = next_bitwise_input(found.quantized, found.bits[:, 1:7], scales, 1, backend=backend)
        return *found[:4], *rows[:2], *rows.losses, *step

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if warm:
            run()
        else:  # compiled, but for another schedule
            other = [(1, 1), (2, 2), (5, 8)]
            bitwise_quantize(x, other, flips=flips[:, :45], inputs="trilinear", residuals=True, backend=backend)
            bits = torch.zeros(2, 4, 5, dtype=torch.uint8, device=device)
            next_bitwise_input(torch.zeros_like(x, dtype=torch.float32), bits, other, 1, backend=backend)
            rows = torch.zeros(flips.shape, device=device)  # as many rows: Triton compiles anew for some numbers
            bitwise_quantize(rows, inv_temperature=2.0, packed=True, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        x.copy_(normal(*x.shape, seed=seed))
        flips.copy_(normal(*flips.shape, seed=seed) > 1)
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@gpu_triton
def test_current_stream(room):
    backend, device, dtype = room
    x = normal(8, 32, 16, 16).to(device, dtype)
    want = bitwise_quantize(x, SQUARES, backend=backend)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on any other stream would see zeros
        late.copy_(x)
        got = bitwise_quantize(late, SQUARES, backend=backend)
        rows = bitwise_quantize(late, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(got.bits, want.bits)
    assert torch.equal(rows.bits, (x > 0).to(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_host_sync(backend):
    module = BitwiseQuantizer(8, SQUARES).cuda()
    x = normal(2, 8, 16, 16).cuda()

    def run():
        found = bitwise_quantize(x, SQUARES, inputs="trilinear", residuals=True, backend=backend)
        leaf = found.residuals.detach().requires_grad_()
        rows = bitwise_quantize(leaf, inv_temperature=3.0, backend=backend)
        (rows.quantized.sum() + rows.losses.codebook_entropy).backward()
        bitwise_lookup(bitwise_pack(found.bits, backend=backend), SQUARES, dim=8, backend=backend)
        module.self_correct(x)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
