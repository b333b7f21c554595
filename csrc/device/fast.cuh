// Instructions that are fast and a little off: what is decided by them must allow for that.
#pragma once

namespace unifiedar {

// 2^x, off by two of 2^22 at most; 0 where that is below the least normal number.
__device__ __forceinline__ float fast_exp2(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// 1 / x, off by one of 2^23 at most, for x from 2^-126 to 2^126.
__device__ __forceinline__ float fast_inverse(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// The same value, of which the compiler knows nothing.
__device__ __forceinline__ float anew(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace unifiedar
