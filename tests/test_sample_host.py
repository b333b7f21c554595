"""The kernel of the family `sample` on the host, thread by thread: the definition's draws, whatever the scores."""

import ctypes
import math

import pytest
import torch
from host_cuda import DRAW, compile_on_host

from unifiedar.ops import sample_codes

# In place of csrc/device/fast.cuh: as far off as a GPU may be, one way or the other.
FAST = """
#pragma once
namespace unifiedar {
inline float fast_exp2(float x) {
  const float value = std::exp2(double(x)) * (1 + 0x1p-21 * (int(x * 1000) % 3 - 1));
  return value < 0x1p-126f ? 0 : value;
}
inline float fast_inverse(float x) { return std::fabs(x) < 0x1p-126f ? INFINITY : 1 / x; }
template <class T> T anew(T value) { return value; }
}  // namespace unifiedar
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T> T __reduce_max_sync(unsigned, T value) {
  return exchange(uint64_t(unsigned(value)), false, [](const uint64_t* values) {
    T most = T(unsigned(values[0]));
    for (unsigned lane = 1; lane < 32; ++lane) most = std::max(most, T(unsigned(values[lane])));
    return most;
  });
}
inline int __reduce_min_sync(unsigned mask, int value) { return ~__reduce_max_sync(mask, ~value); }
"""

EXPORTS = """
extern "C" int sample(const void* logits, const float* noise, const float* guidance_rows, const int64_t* top_k_rows,
                      const void* top_p_rows, int64_t* out, const int64_t* n, const double* x) {
  host_waits = true;
  unifiedar::SampleArgs args{logits, noise, guidance_rows, top_k_rows, top_p_rows, out, n[0], n[1], n[2], n[3], n[4]};
  args.top_p = x[0], args.guidance = x[1], args.inverse_temperature = 1 / x[2];
  args.vocabulary = n[5], args.guided = n[6], args.wide_top_p = n[8];
  return unifiedar::launch_sample_codes(args, unifiedar::DType(n[7]), nullptr);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_on_host(["sample.cu"], EXPORTS, tmp_path_factory.mktemp("sample"), {"device/fast.cuh": FAST + DRAW})


def draw(library, logits, noise, guidance=None, temperature=1.0, top_k=0, top_p=0.0):
    """The kernel's codes of logits (rows, V), or (2 rows, V) if guided; options are numbers or tensors (N,)."""

    def pointer(tensor):
        return ctypes.c_void_p(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else None)

    def number(value):
        return value if isinstance(value, int | float) else 0

    rows = len(logits) // (1 if guidance is None else 2)
    by_rows = [x for x in (guidance, top_k, top_p) if isinstance(x, torch.Tensor)]
    out = torch.full((rows,), -1)
    dtype = (torch.float32, torch.bfloat16, torch.float16).index(logits.dtype)
    numbers = [rows, rows // len(by_rows[0]) if by_rows else 1, logits.stride(0), noise.stride(0), number(top_k)]
    numbers += [
        logits.shape[1],
        guidance is not None,
        dtype,
        isinstance(top_p, torch.Tensor) and top_p.dtype == torch.float64,
    ]
    status = library.sample(
        *map(pointer, (logits, noise, guidance, top_k, top_p, out)),
        (ctypes.c_int64 * 9)(*numbers),
        (ctypes.c_double * 3)(number(top_p), number(guidance), temperature),
    )
    assert status == 0
    return out


def check(library, logits, noise, **options):
    got = draw(library, logits, noise, **options)
    want = sample_codes(logits, noise=noise, **options)
    assert torch.equal(got, want), (got, want)


def exponential(rows, size, generator):
    return torch.empty(rows, size).exponential_(generator=generator)


CUTS = {
    "none": {},
    "k": {"top_k": 9},
    "k of most": {"top_k": 0.8},
    "p": {"top_p": 0.7},
    "p of one": {"top_p": 1e-9},
    "both": {"top_k": 0.22, "top_p": 0.96},
    "few": {"top_k": 4, "top_p": 0.3},
    "nearly all": {"top_k": 0.99, "top_p": 0.9999},
}
SCORES = {
    "normal": lambda x: 3 * x,
    "flat": lambda x: 0.05 * x,
    "nearly equal": lambda x: 3e-6 * x,
    "equal": lambda x: 0 * x,
    "far": lambda x: 40 * x,
    "outlier": lambda x: torch.where(torch.arange(x.shape[1]) == 7, 1e4, x),
    "far below": lambda x: torch.where(x < -1, -1e30, x),
    "impossible": lambda x: torch.where(x < 0.8, -math.inf, x),
    "three levels": lambda x: x.round().clamp(-1, 1),
    "large": lambda x: 3 * x + 1e6,
    "one": lambda x: torch.where(torch.arange(x.shape[1]) == 3, x, -math.inf),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_draws(library, cuts, scores):
    generator = torch.Generator().manual_seed(0)
    for rows, size in ((4, 300), (2, 2100)):
        options = {name: int(x * size) if name == "top_k" and x < 1 else x for name, x in cuts.items()}
        logits = scores(torch.randn(rows, size, generator=generator))
        check(library, logits, exponential(rows, size, generator), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 33, 2048, 2049, 4096, 8191, 16384, 16390, 20000])
def test_sizes_and_dtypes(library, size, dtype):
    generator = torch.Generator().manual_seed(size)
    logits = 4 * torch.randn(4, size, generator=generator)
    noise = exponential(2, size, generator)
    check(library, logits.to(dtype), noise, guidance=1.5, top_k=max(1, size // 5), top_p=0.96)
    check(library, logits[:2].to(dtype), noise, temperature=0.7, top_k=max(1, size // 3))


def test_options_one_a_row(library):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(12, 500, generator=generator)
    noise = exponential(6, 500, generator)
    k = torch.tensor([0, 5, 600])
    for p in (torch.tensor([0.5, 0.0, 0.9]), torch.tensor([math.nan, 0.8, 1.0], dtype=torch.float64)):
        got = draw(library, logits, noise, guidance=torch.tensor([1.0, 3.0, 0.0]), top_k=k, top_p=p)
        want = sample_codes(
            logits.view(6, 2, 500),
            noise=noise.view(3, 2, 500),
            guidance=torch.tensor([1.0, 3.0, 0.0]),
            top_k=k,
            top_p=p,
        )
        assert torch.equal(got, want.flatten())


def test_rows_that_are_not_finite(library):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 700, generator=generator)
    logits[0, 40] = math.nan
    logits[1, 40] = math.inf
    logits[2] = -math.inf
    for cuts in ({}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5}):
        got = draw(library, logits, exponential(4, 700, generator), **cuts)
        assert got[:3].tolist() == [0, 0, 0]
        assert 0 <= got[3] < 700


def test_strange_noise(library):
    """Noise that a fast inverse is not sure of, noise of the loser above all, and noise that lets the unlikely win."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(4, 400, generator=generator)
    plain = exponential(4, 400, generator)
    for low in (1e-39, 1e-36, 1e-30):
        noise = plain.clone()
        noise[:, ::5] = low
        for cuts in ({}, {"top_k": 50}, {"top_k": 50, "top_p": 0.8}):
            check(library, logits, noise, **cuts)
    check(library, logits, plain * 1e35, top_k=50, top_p=0.8)
    opposed = (logits.double() * 1.1).exp().float()  # the least likely wins, as long as it may
    for cuts in ({}, {"top_k": 50}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.8}):
        check(library, logits, opposed, **cuts)


def test_narrow_races(library):
    """Of two that tie, or differ by a rounding, the right one wins."""
    generator = torch.Generator().manual_seed(5)
    for seed in range(20):
        logits = torch.zeros(1, 300)
        noise = torch.full((1, 300), 1.0)
        noise += 2.0**-23 * torch.randint(0, 4, (1, 300), generator=torch.Generator().manual_seed(seed))
        noise[:, 20:] = 2
        check(library, logits, noise)
        check(library, logits + 1e-6 * torch.randn(1, 300, generator=generator), noise, top_k=200, top_p=0.9)


def test_the_edge_of_top_p(library):
    """Sums of equal entries are exact multiples of the share: one more, one less would show."""
    for size in (10, 1000):
        for kept in (1, size // 2, size - 1):
            for share in (kept / size, math.nextafter(kept / size, 1)):
                noise = torch.ones(2, size)
                noise[0, kept:] = 0.5  # those beyond the edge are ahead
                noise[1, kept + 1 :] = 0.5
                check(library, torch.zeros(2, size), noise, top_p=share)
