// Elements of the types that the kernels take, as float32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace unifiedar {

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(__half value) { return __half2float(value); }
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}

// Four that lie together, moved by one instruction.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

}  // namespace unifiedar
