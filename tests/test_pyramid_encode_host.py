"""The kernel that encodes VAR's pyramid on the host, thread by thread, against the definition."""

import ctypes

import pytest
import torch
from host_cuda import compile_on_host
from pyramid_adversaries import adversaries, adverse, check_adverse

from unifiedar.ops import Phi, multiscale_quantize
from unifiedar.ops.codes_multiscale import _plan

MMA = """
#pragma once
#include <type_traits>
namespace unifiedar {
inline uint16_t narrowed(float value) {
  uint32_t bits = __float_as_uint(value);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float widened(uint32_t bits) { return __uint_as_float(bits << 16); }
inline void split(float x, float y, uint32_t& high, uint32_t& low) {
  const uint32_t hx = narrowed(x), hy = narrowed(y);
  high = hx | hy << 16;
  low = narrowed(x - widened(hx)) | uint32_t(narrowed(y - widened(hy))) << 16;
}
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = threadIdx.x % 32;
  uint32_t all[6][32];
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int r = 0; r < 6; ++r)
    exchange(mine[r], false, [&](const uint64_t* values) { return std::copy(values, values + 32, all[r]), 0; });
  for (int r = 0; r < 4; ++r) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + r % 2;
    float total = sum[r];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned source = k % 8 / 2, shift = k % 2 * 16;
      total += widened(all[k / 8 * 2 + r / 2][row * 4 + source] >> shift & 0xffff) *
               widened(all[4 + k / 8][column * 4 + source] >> shift & 0xffff);
    }
    sum[r] = total;
  }
}
}  // namespace unifiedar
inline int atomicAdd(int* at, int value) { return *at += value, *at - value; }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int step) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const unsigned from = (threadIdx.x % 32) ^ step;
  word = exchange(word, false, [=](const uint64_t* values) { return values[from]; });
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
"""

EXPORTS = """
extern "C" int encode(const void* features, const void* codebook, const void* weight, const void* bias, int64_t* codes,
                      const int64_t* n, const int64_t* scales, float ratio, int dtype) {
  unifiedar::EncodeArgs args{features, codebook, weight, bias, codes, n[0]};
  int* sizes[] = {&args.features_c, &args.features_y, &args.features_x, &args.entry, &args.batch,
                  &args.height, &args.width, &args.num_codes, &args.length, &args.steps};
  for (int i = 0; i < 10; ++i) *sizes[i] = n[1 + i];
  args.ratio = ratio;
  args.convolved = weight != nullptr;
  for (int s = 0; s < args.steps; ++s)
    args.h[s] = scales[3 * s], args.w[s] = scales[3 * s + 1], args.phi[s] = scales[3 * s + 2];
  unifiedar::EncodePlan plan = unifiedar::lay_out(args, n[11]);
  if (4 * plan.words > 232448) return -1;
  plan.clusters = std::min<int>(args.batch, 2);
  return unifiedar::launch_encode(args, plan, unifiedar::DType(dtype), nullptr);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    library = compile_on_host(["pyramid_sm90.cu"], EXPORTS, folder, {"device/mma.cuh": MMA})
    library.use_device(2)
    return library


def encode(library, features, codebook, phi, sizes, blocks):
    batch, _, height, width = features.shape
    codes = torch.full((batch, sum(h * w for h, w in sizes)), -1)
    weight = phi.weight if phi else torch.empty(0)
    plan = _plan(weight, tuple(side for size in sizes for side in size))
    numbers = [*features.stride(), codebook.stride(0), batch, height, width, codebook.shape[0], codes.shape[1]]
    numbers += [len(sizes), blocks]
    tensors = (features, codebook, *((phi.weight, phi.bias) if phi else (None, None)), codes)
    status = library.encode(
        *(ctypes.c_void_p(None if one is None else one.data_ptr()) for one in tensors),
        (ctypes.c_int64 * 12)(*numbers),
        (ctypes.c_int64 * len(plan))(*plan),
        ctypes.c_float(phi.ratio if phi else 0.0),
        (torch.float32, torch.bfloat16, torch.float16).index(features.dtype),
    )
    assert status == 0
    return codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("convolved", [True, False], ids=["phi", "no phi"])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "sizes", [((1, 1), (2, 3), (6, 6), (13, 13), (16, 16)), ((2, 3), (5, 9), (5, 9)), ((4, 1), (7, 2), (7, 3))], ids=str
)
def test_encode(library, sizes, blocks, convolved, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    batch, (height, width), num_codes = 3, sizes[-1], 70
    features = normal(batch, 32, height, width)
    codebook = torch.full((num_codes, 40), torch.nan, dtype=dtype)[:, 4:36]
    codebook.copy_(normal(num_codes, 32, scale=0.7))
    phi = Phi(normal(2, 32, 32, 3, 3, scale=0.1), normal(2, 32, scale=0.1), 0.5) if convolved else None
    want = torch.cat(multiscale_quantize(features, codebook, phi, sizes, backend="eager"), 1)
    assert torch.equal(encode(library, features, codebook, phi, sizes, blocks), want)


def test_ties_go_to_the_lowest_index(library):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(9, 32, generator=generator).repeat(20, 1)
    features = torch.randn(2, 32, 6, 6, generator=generator)
    for blocks in (1, 2, 4):
        codes = encode(library, features, codebook, None, ((1, 1), (6, 6)), blocks)
        assert set(codes.unique().tolist()) <= set(range(9))


@adversaries
@pytest.mark.parametrize("blocks", [1, 4])
def test_adversaries_of_the_search(library, make, blocks):
    features, codebook = adverse(make, 32)
    check_adverse(features, codebook, encode(library, features, codebook, None, ((4, 8),), blocks))
