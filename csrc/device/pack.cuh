// Packs: kVec neighbouring elements moved by one instruction and added up in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace unifiedar {

// The register type that holds a pack of so many bytes.
template <int kBytes>
struct RawOf;
template <>
struct RawOf<2> {
  using Type = unsigned short;
};
template <>
struct RawOf<4> {
  using Type = unsigned int;
};
template <>
struct RawOf<8> {
  using Type = uint2;
};
template <>
struct RawOf<16> {
  using Type = uint4;
};

// Elements of T per 16-byte pack.
template <typename T>
inline constexpr int kPackOf = 16 / sizeof(T);

// Two 16-bit elements to and from one 32-bit word, lower address in the lower half.
__device__ __forceinline__ float2 unpack_word(unsigned int word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_word(unsigned int word, __half) {
  return {__half2float(__ushort_as_half(static_cast<unsigned short>(word))),
          __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)))};
}
__device__ __forceinline__ unsigned int pack_word(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return static_cast<unsigned int>(__bfloat16_as_ushort(pair.x)) |
         static_cast<unsigned int>(__bfloat16_as_ushort(pair.y)) << 16;
}
__device__ __forceinline__ unsigned int pack_word(float low, float high, __half) {
  return static_cast<unsigned int>(__half_as_ushort(__float2half_rn(low))) |
         static_cast<unsigned int>(__half_as_ushort(__float2half_rn(high))) << 16;
}

template <typename T, int kVec>
struct Pack {
  using Raw = typename RawOf<kVec * sizeof(T)>::Type;
  Raw raw;

  // Through the read-only path; `from` is aligned to the pack.
  __device__ __forceinline__ void load(const T* from) { raw = __ldg(reinterpret_cast<const Raw*>(from)); }

  __device__ __forceinline__ void clear() { raw = Raw{}; }

  // Evict-first: outputs are not read again by the kernel, and what it does read should stay in the cache.
  __device__ __forceinline__ void store_streaming(T* to) const { __stcs(reinterpret_cast<Raw*>(to), raw); }

  __device__ __forceinline__ void add_to(float (&sum)[kVec]) const {
    if constexpr (kVec == 1) {
      sum[0] += scalar(raw);
    } else {
      unsigned int words[kWords];
      if constexpr (kWords == 1) {
        words[0] = raw;
      } else {
        words[0] = raw.x, words[1] = raw.y;
        if constexpr (kWords == 4) words[2] = raw.z, words[3] = raw.w;
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if constexpr (sizeof(T) == 4) {
          sum[w] += __uint_as_float(words[w]);
        } else {
          const float2 pair = unpack_word(words[w], T{});
          sum[2 * w] += pair.x;
          sum[2 * w + 1] += pair.y;
        }
      }
    }
  }

  // Rounds to nearest even.
  __device__ __forceinline__ void set(const float* value) {
    if constexpr (kVec == 1) {
      if constexpr (sizeof(T) == 4) {
        raw = __float_as_uint(value[0]);
      } else {
        raw = static_cast<Raw>(pack_word(value[0], 0.f, T{}) & 0xffffu);
      }
    } else {
      unsigned int words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if constexpr (sizeof(T) == 4) {
          words[w] = __float_as_uint(value[w]);
        } else {
          words[w] = pack_word(value[2 * w], value[2 * w + 1], T{});
        }
      }
      if constexpr (kWords == 1) {
        raw = words[0];
      } else if constexpr (kWords == 2) {
        raw = {words[0], words[1]};
      } else {
        raw = {words[0], words[1], words[2], words[3]};
      }
    }
  }

 private:
  static constexpr int kWords = kVec * sizeof(T) / 4;

  __device__ static __forceinline__ float scalar(Raw bits) {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(bits);
    } else {
      return unpack_word(bits, T{}).x;
    }
  }
};

}  // namespace unifiedar
