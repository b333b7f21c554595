// The numbers by which a draw is decided, those of unifiedar/ops/sample.py: scores as integers of their order, weights
// rounded to float32, masses as integers.
#pragma once

#include <cstdint>

namespace unifiedar {

using Word = unsigned long long;

constexpr int kNaN = 0x7fffffff, kInfinite = 0x7f800000, kLeast = -0x7f800001;  // as integers: NaN, inf, -inf

__device__ __forceinline__ int ordered(float score) {
  if (score != score) return kNaN;
  const int bits = __float_as_int(score == 0 ? 0.f : score);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float score_of(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }

// Weights of a row and their masses.
struct Weights {
  double peak, units;  // the largest score; what a mass is counted in

  __device__ __forceinline__ Weights(int entries, float top) : peak(top) {
    int bits_of_size = 0;
    while ((entries - 1) >> bits_of_size) ++bits_of_size;
    units = double(Word(1) << (62 - bits_of_size));
  }
  // A weight as an integer of the same order; 0 is what cannot be drawn.
  __device__ __forceinline__ int weight(int key) const {
    const double distance = double(score_of(key)) - peak;
    return distance >= -87 ? __float_as_int(float(exp(distance))) : 0;
  }
  __device__ __forceinline__ Word mass(int bits) const { return Word(double(__int_as_float(bits)) * units); }
  // The mass that top-p keeps at least.
  static __device__ __forceinline__ Word goal(Word total, double share) {
    const double product = double(static_cast<long long>(total)) * share;
    const Word least = Word(product);
    return least + (double(static_cast<long long>(least)) < product);
  }
};

// Who runs, as a number that is larger the earlier it arrives; of those that arrive together the first entry is ahead.
__device__ __forceinline__ Word racer(int bits, float noise, int i) {
  const float speed = __fdiv_rn(__int_as_float(bits), noise);
  return speed > 0 ? Word(__float_as_uint(speed)) << 32 | uint32_t(~i) : 0;
}
constexpr Word kNobody = 0xffffffffu;  // entry 0, which nothing of speed 0 beats

}  // namespace unifiedar
