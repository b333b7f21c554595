"""Bits of bitwise quantization: definitions against float64 formulas of another form, every backend."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitwise_formulas import coin, formula, normal
from helpers import assert_as_good_as_eager, kernel_rooms
from hypothesis import given, settings
from hypothesis import strategies as st

from unifiedar.ops import bitwise_lookup, bitwise_pack, bitwise_quantize, bitwise_unpack


def chosen(accept):
    return pytest.mark.parametrize("room", [case for case in kernel_rooms() if accept(*case.values[0])], indirect=True)


rooms = chosen(lambda backend, device, dtype: backend != "cuda")
float32_rooms = chosen(lambda backend, device, dtype: backend != "cuda" and dtype == torch.float32)
triton_float32 = chosen(lambda backend, device, dtype: backend == "triton" and dtype == torch.float32)

sphericals = pytest.mark.parametrize("spherical", [True, False], ids=["BSQ", "LFQ"])


def words(labels):
    """Labels (..., d) as Python's integers, channel 0 the most significant bit, 64 bits as int64 holds them."""
    rows = labels.reshape(-1, labels.shape[-1]).int().tolist()
    values = [int("".join(map(str, row)), 2) for row in rows]
    return [value - 2**64 if value >= 2**63 else value for value in values]


# ---- rows ------------------------------------------------------------------------------------------------------------

# rows, d
ROWS = {
    "one of everything": (1, 1),
    "odd": (7, 13),
    "Infinity": (70, 32),
    "Infinity-8B": (33, 14),
    "BSQ-ViT": (5, 18),
    "a word": (9, 64),
    "several programs": (517, 16),
    "no rows": (0, 8),
}


@rooms
@sphericals
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_rows(room, shape, spherical):
    backend, device, dtype = room
    x = normal(*shape).to(device, dtype)
    for inv_temperature in (1.0, 100.0):
        code, sample, commitment, probability = formula(x.double(), spherical, inv_temperature)
        for packed in (False, True):
            got, eager = (
                bitwise_quantize(x, spherical=spherical, packed=packed, inv_temperature=inv_temperature, backend=name)
                for name in (backend, "eager")
            )
            labels = (x > 0).to(torch.uint8)
            if packed:
                assert got.bits.dtype == torch.int64
                assert got.bits.tolist() == words(labels)
            else:
                assert torch.equal(got.bits, labels)
            assert torch.equal(got.quantized, eager.quantized), "one value a sign"
            assert got.quantized.dtype == dtype
            assert_as_good_as_eager(got.quantized, eager.quantized, code)
            assert (got.inputs, got.residuals) == (None, None)
            exact = (sample, coin(torch.logit(probability)).sum(), commitment, probability)
            for one, other, right in zip(got.losses, eager.losses, exact, strict=True):
                assert one.dtype == torch.float32
                assert_as_good_as_eager(one, other, right)
                if dtype == torch.float32:
                    torch.testing.assert_close(one.double(), right, rtol=2e-5, atol=2e-5)
    assert bitwise_quantize(x, backend=backend).losses is None


@rooms
@sphericals
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_gradients_of_rows(room, shape, spherical):
    """Of the codes (straight through), of every loss, and of both at once."""
    backend, device, dtype = room
    grad = normal(*shape, seed=1).to(device, dtype)
    weights = (normal(1, seed=2), *normal(2, seed=3), normal(shape[1], seed=4))

    def ours(name):
        def run(x):
            found = bitwise_quantize(x, spherical=spherical, inv_temperature=2.0, backend=name)
            sample, _, commitment, probability = found.losses
            return found.quantized, sample, commitment, probability

        return run

    def gradient(run, x, parts):
        x = x.detach().requires_grad_()
        outputs = run(x)
        values = [
            (one * weight.to(one).view(one.shape)).sum()
            for part, (one, weight) in enumerate(zip(outputs, (grad, *weights[1:]), strict=True))
            if part in parts
        ]
        return torch.autograd.grad(sum(values), x)[0]

    x = normal(*shape).to(device, dtype)
    for parts in ([0], [1], [2], [3], [0, 1, 2, 3]):
        got, eager = (gradient(ours(name), x, parts) for name in (backend, "eager"))
        exact = gradient(lambda x: formula(x, spherical, 2.0), x.double(), parts)
        assert_as_good_as_eager(got, eager, exact)
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


@sphericals
@pytest.mark.parametrize("dim", [1, 2, 5, 9])
def test_sample_entropy_is_that_of_the_whole_table(dim, spherical):
    """Softmax over all 2^d codes, by brute force; and the codebook's entropy is never below that of the mean."""
    x = normal(21, dim).double()
    table = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype=torch.float64)
    unit = F.normalize(x, dim=-1) if spherical else x
    table = table / math.sqrt(dim) if spherical else table
    for inv_temperature in (0.3, 1.0, 10.0, 100.0):
        p = torch.softmax(2 * inv_temperature * unit @ table.T, -1)
        losses = bitwise_quantize(x, spherical=spherical, inv_temperature=inv_temperature).losses
        entropy = -torch.xlogy(p, p).sum(-1).mean()
        torch.testing.assert_close(losses.sample_entropy, entropy, rtol=1e-9, atol=1e-12)
        joint = -torch.xlogy(p.mean(0), p.mean(0)).sum()
        assert losses.codebook_entropy >= joint - 1e-6
        torch.testing.assert_close(losses.probability, p.mean(0) @ (table > 0).double(), rtol=1e-9, atol=1e-12)
        single = bitwise_quantize(x[:1], spherical=spherical, inv_temperature=inv_temperature).losses
        torch.testing.assert_close(single.codebook_entropy, single.sample_entropy, rtol=1e-4, atol=1e-5)


@sphericals
def test_gradcheck_of_the_losses(spherical):
    x = normal(4, 3).double().requires_grad_()

    def losses(x):
        return tuple(bitwise_quantize(x, spherical=spherical, inv_temperature=0.7).losses)

    assert torch.autograd.gradcheck(losses, (x,))


@float32_rooms
def test_certain_bits_have_finite_losses_and_gradients(room):
    """Every token alike and far from zero: probabilities are 0 and 1 to float32, and no logarithm of them shows."""
    backend, device, _ = room
    x = torch.tensor([[5.0, -5.0, 1e-3]], device=device).repeat(11, 1).requires_grad_()
    losses = bitwise_quantize(x, spherical=False, inv_temperature=100.0, backend=backend).losses
    sum(one.sum() for one in losses).backward()
    assert all(one.isfinite().all() for one in losses)
    assert x.grad.isfinite().all()
    zeros = torch.zeros(3, 8, device=device, requires_grad=True)
    found = bitwise_quantize(zeros, inv_temperature=1.0, backend=backend)
    (found.quantized.sum() + found.losses.sample_entropy).backward()
    torch.testing.assert_close(zeros.grad, torch.full_like(zeros, 1e12))  # as F.normalize passes it at length zero


@rooms
def test_which_signs(room):
    """Zero of either sign and NaN are bit 0; infinities and the smallest numbers count by their sign."""
    backend, device, dtype = room
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, tiny, -tiny, 1.0], device=device).to(dtype)
    found = bitwise_quantize(x, backend=backend)
    assert found.bits.tolist() == [0, 0, 0, 1, 0, 1, 0, 1]
    assert torch.equal(found.quantized > 0, found.bits.bool())
    assert bitwise_quantize(x, packed=True, backend=backend).bits.item() == 0b00010101


@rooms
def test_strides_and_leading_dimensions(room):
    backend, device, dtype = room
    x = normal(24, 12).to(device, dtype)
    want = bitwise_quantize(x, inv_temperature=1.0, backend=backend)
    for other in (x.T.contiguous().T, F.pad(x, (3, 4))[:, 3:-4], x.repeat_interleave(2, 0)[::2]):
        got = bitwise_quantize(other, inv_temperature=1.0, backend=backend)
        assert torch.equal(got.bits, want.bits)
        assert torch.equal(got.quantized, want.quantized)
        assert got.quantized.is_contiguous()
        torch.testing.assert_close(list(got.losses), list(want.losses))
    assert torch.equal(bitwise_quantize(x.view(2, 3, 4, 12), backend=backend).bits, want.bits.view(2, 3, 4, 12))
    assert torch.equal(bitwise_quantize(x[5], backend=backend).quantized, want.quantized[5])
    word = bitwise_quantize(x[5], packed=True, backend=backend).bits
    assert (word.shape, word.item()) == ((), words(want.bits[5])[0])


# ---- words and labels ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(0, 5), st.integers(0, 2**32))
def test_words_and_labels(dim, rows, seed):
    labels = (normal(rows, dim, seed=seed) > 0).to(torch.uint8)
    packed = bitwise_pack(labels)
    assert packed.tolist() == words(labels)
    assert torch.equal(bitwise_unpack(packed, dim), labels)
    assert torch.equal(bitwise_quantize(labels - 0.5, packed=True).bits, packed)
    for spherical in (True, False):
        size = dim**-0.5 if spherical else 1.0
        codes = bitwise_lookup(packed, dim=dim, spherical=spherical, dtype=torch.float64)
        torch.testing.assert_close(codes, (2 * labels.double() - 1) * size, rtol=1e-14, atol=0)
        assert torch.equal(codes, bitwise_lookup(labels, spherical=spherical, dtype=torch.float64))


@triton_float32
@pytest.mark.parametrize("dim", [1, 3, 14, 32, 63, 64])
def test_words_and_labels_by_kernels(room, dim):
    backend, device, _ = room
    labels = (normal(3, 47, dim) > 0).to(device)
    packed = bitwise_pack(labels, backend=backend)
    assert packed.shape == (3, 47)
    assert packed.flatten().tolist() == words(labels)
    assert torch.equal(bitwise_unpack(packed, dim, backend=backend), labels.to(torch.uint8))
    for kind in (torch.bool, torch.uint8, torch.int32, torch.int64):
        assert torch.equal(bitwise_pack(labels.to(kind), backend=backend), packed)
        for dtype in (torch.float32, torch.float16):
            got = bitwise_lookup(labels.to(kind), dtype=dtype, backend=backend)
            assert torch.equal(got, bitwise_lookup(labels.to(kind), dtype=dtype))
            assert torch.equal(got, bitwise_lookup(packed, dim=dim, dtype=dtype, backend=backend))
    assert torch.equal(bitwise_pack(labels.mT.contiguous().mT, backend=backend), packed)
    assert bitwise_pack(labels[:0], backend=backend).shape == (0, 47)
    assert bitwise_unpack(packed[:0], dim, backend=backend).shape == (0, 47, dim)


def test_codes_are_those_of_the_published_path_from_labels():
    """2 s b - s, normalized once more in float32: in size one unit in the last place from 1 / sqrt(d) at 32."""
    for dim in range(1, 65):
        bits = (normal(5, dim) > 0).int()
        size = dim**-0.5
        assert torch.equal(bitwise_lookup(bits), F.normalize(bits * size * 2 - size, dim=-1))
    assert bitwise_lookup(torch.ones(32, dtype=torch.uint8))[0].item() != np.float32(32**-0.5)
