// Matrix products of a warpgroup (compute capability 9.0a): D (64 x N, float32) += A (64 x 16) B (16 x N), bfloat16 or
// float16. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": wgmma.
//
// Registers of D ("Register Fragments and Shared Memory Matrix Layouts for wgmma.mma_async.m64nNk16"): thread t of the
// warpgroup, with warp w = t / 32 and lane l = t % 32, has of row 16 w + l / 4 + 8 h the columns 8 j + 2 (l % 4) + e in
// d[4 j + 2 h + e]. A from registers has four words of two elements: rows as in D, columns 2 (l % 4) + {0, 1} in words 0
// (h = 0) and 1 (h = 1), columns 8 more in words 2 and 3. So columns 16 i .. 16 i + 15 of a D make an A word by word:
// words 0..3 are the pairs d[8 i], d[8 i + 2], d[8 i + 4], d[8 i + 6].
//
// Shared memory is as a box of 64 elements (128 bytes) by rows arrives with the 128-byte swizzle: row r at 128 r, and of
// it the 16-byte unit u at 16 (u ^ r % 8). The pattern repeats every 1,024 bytes and is a function of the address, so
// boxes begin at multiples of 1,024, and an operand may begin within a row.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace unifiedar {

// Describes an operand ("Matrix Descriptor Format"): address, leading and stride offsets in units of 16 bytes at bits
// 0, 16 and 32, swizzle of 128 bytes (1) at bits 62 and 63.
__device__ __forceinline__ uint64_t describe_operand(uint32_t address, uint32_t leading, uint32_t stride) {
  return (uint64_t(1) << 62) | (uint64_t(stride >> 4) << 32) | (uint64_t(leading >> 4) << 16) | (address >> 4);
}

// "Strides": rows of A, or columns of B, are rows of the box, whose 128 bytes hold the dimension that is summed (K-major).
// The stride is between groups of eight rows; the leading offset is not used. 16 elements on are 32 bytes on.
__device__ __forceinline__ uint64_t describe_rows(uint32_t address) { return describe_operand(address, 16, 1024); }
constexpr uint32_t kNextInRow = 32;

// B's rows are rows of the box, whose 128 bytes hold 64 columns of B (MN-major). The stride is between groups of eight
// rows, the leading offset between boxes of 64 columns. 16 rows on are 2,048 bytes on.
__device__ __forceinline__ uint64_t describe_columns(uint32_t address, uint32_t box_bytes) {
  return describe_operand(address, box_bytes, 1024);
}
constexpr uint32_t kNextRows = 2048;

// In 32 bits: the address has room to grow, and the upper half stays the constant that it is.
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t bytes) {
  return (operand >> 32 << 32) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

// Before the first product after other instructions touched its registers.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most so many committed groups are not done.
template <int kGroups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from moving uses of registers across: it does not know that products write them later.
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Gives up what registers hold, before products that begin at 0 write them.
template <int kCount>
__device__ __forceinline__ void fresh(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(d[i]));
}

// Operand lists of the instructions below: registers %0.. of D, and what they are bound to.
#define UNIFIEDAR_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define UNIFIEDAR_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define UNIFIEDAR_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define UNIFIEDAR_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define UNIFIEDAR_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define UNIFIEDAR_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define UNIFIEDAR_D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define UNIFIEDAR_D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define UNIFIEDAR_D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define UNIFIEDAR_E0 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define UNIFIEDAR_E8 "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define UNIFIEDAR_E16 "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define UNIFIEDAR_E24 "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define UNIFIEDAR_E32 "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define UNIFIEDAR_E40 "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define UNIFIEDAR_E48 "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define UNIFIEDAR_E56 "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define UNIFIEDAR_E64 "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define UNIFIEDAR_DS48 UNIFIEDAR_D0 UNIFIEDAR_D8 UNIFIEDAR_D16
#define UNIFIEDAR_ES48 UNIFIEDAR_E0, UNIFIEDAR_E8, UNIFIEDAR_E16
#define UNIFIEDAR_DS64 UNIFIEDAR_DS48 UNIFIEDAR_D24
#define UNIFIEDAR_ES64 UNIFIEDAR_ES48, UNIFIEDAR_E24
#define UNIFIEDAR_DS80 UNIFIEDAR_DS64 UNIFIEDAR_D32
#define UNIFIEDAR_ES80 UNIFIEDAR_ES64, UNIFIEDAR_E32
#define UNIFIEDAR_DS96 UNIFIEDAR_DS80 UNIFIEDAR_D40
#define UNIFIEDAR_ES96 UNIFIEDAR_ES80, UNIFIEDAR_E40
#define UNIFIEDAR_DS112 UNIFIEDAR_DS96 UNIFIEDAR_D48
#define UNIFIEDAR_ES112 UNIFIEDAR_ES96, UNIFIEDAR_E48
#define UNIFIEDAR_DS128 UNIFIEDAR_DS112 UNIFIEDAR_D56
#define UNIFIEDAR_ES128 UNIFIEDAR_ES112, UNIFIEDAR_E56
#define UNIFIEDAR_DS144 UNIFIEDAR_DS128 UNIFIEDAR_D64
#define UNIFIEDAR_ES144 UNIFIEDAR_ES128, UNIFIEDAR_E64

#define UNIFIEDAR_WGMMA(N, TYPE, A, B, ADD, TRANSPOSED, ...)                                                      \
  asm volatile(                                                                                                   \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" UNIFIEDAR_DS##N "}, " A ", " B         \
      ", add, 1, 1, " TRANSPOSED ";\n}"                                                                           \
      : UNIFIEDAR_ES##N                                                                                           \
      : __VA_ARGS__)

// D = A B (`add` false) or D += A B, A by rows and B with its columns as rows, both in shared memory.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kColumns % 16 == 0 && kColumns >= 48 && kColumns <= 144, "no instruction of this size here");
  if constexpr (kColumns == 48) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(48, "f16", "%24", "%25", "%26", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(48, "bf16", "%24", "%25", "%26", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  } else if constexpr (kColumns == 64) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(64, "f16", "%32", "%33", "%34", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(64, "bf16", "%32", "%33", "%34", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  } else if constexpr (kColumns == 80) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(80, "f16", "%40", "%41", "%42", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(80, "bf16", "%40", "%41", "%42", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  } else if constexpr (kColumns == 96) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(96, "f16", "%48", "%49", "%50", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(96, "bf16", "%48", "%49", "%50", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  } else if constexpr (kColumns == 112) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(112, "f16", "%56", "%57", "%58", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(112, "bf16", "%56", "%57", "%58", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  } else if constexpr (kColumns == 128) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(128, "f16", "%64", "%65", "%66", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(128, "bf16", "%64", "%65", "%66", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  } else if constexpr (kColumns == 144) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(144, "f16", "%72", "%73", "%74", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
      UNIFIEDAR_WGMMA(144, "bf16", "%72", "%73", "%74", "0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
  }
}

// D += A B, A in registers and B by its rows in shared memory.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_columns(float (&d)[kColumns / 2], const uint32_t* a, uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 96 || kColumns == 128, "no instruction of this size here");
  if constexpr (kColumns == 64) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(64, "f16", "{%32, %33, %34, %35}", "%36", "%37", "1",
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    } else {
      UNIFIEDAR_WGMMA(64, "bf16", "{%32, %33, %34, %35}", "%36", "%37", "1",
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    }
  } else if constexpr (kColumns == 96) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(96, "f16", "{%48, %49, %50, %51}", "%52", "%53", "1",
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    } else {
      UNIFIEDAR_WGMMA(96, "bf16", "{%48, %49, %50, %51}", "%52", "%53", "1",
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    }
  } else if constexpr (kColumns == 128) {
    if constexpr (std::is_same_v<T, __half>) {
      UNIFIEDAR_WGMMA(128, "f16", "{%64, %65, %66, %67}", "%68", "%69", "1",
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    } else {
      UNIFIEDAR_WGMMA(128, "bf16", "{%64, %65, %66, %67}", "%68", "%69", "1",
                      "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
    }
  }
}

}  // namespace unifiedar
