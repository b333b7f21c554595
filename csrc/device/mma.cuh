// One warp's product on matrix units, in bfloat16 with sums in float32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace unifiedar {

// sum [16, 8] += a [16, 16] b [16, 8]. Of lane 4 i + j: a has rows i (a[0], a[2]) and i + 8 (a[1], a[3]) at columns 2 j,
// 2 j + 1 (a[0], a[1]) and 2 j + 8, 2 j + 9; b column i at these rows; sum rows i and i + 8 at columns 2 j, 2 j + 1.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two numbers as bfloat16 in one word, the first below, and what their rounding left over, likewise rounded.
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  const __nv_bfloat16 hx = __float2bfloat16_rn(x), hy = __float2bfloat16_rn(y);
  const __nv_bfloat16 lx = __float2bfloat16_rn(x - __bfloat162float(hx)), ly = __float2bfloat16_rn(y - __bfloat162float(hy));
  high = uint32_t(__bfloat16_as_ushort(hx)) | uint32_t(__bfloat16_as_ushort(hy)) << 16;
  low = uint32_t(__bfloat16_as_ushort(lx)) | uint32_t(__bfloat16_as_ushort(ly)) << 16;
}

}  // namespace unifiedar
