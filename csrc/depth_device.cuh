// Instructions that the depth kernel is built of: the matrix product of a warp, copies to shared memory, fetches into the
// second cache, and the barrier of a grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "device/barrier.cuh"

namespace unifiedar {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of a block, besides the warp that brings the weights

// d (16 x 8, float32) += a (16 x 16) b (16 x 8). PTX ISA, "Matrix Fragments for mma.m16n8k16": lane l has of d the rows
// l / 4 (words 0, 1) and l / 4 + 8 (words 2, 3), columns 2 (l % 4) + {0, 1}; of a the same rows in words 0, 2 and 1, 3,
// columns 2 (l % 4) + {0, 1} and 8 more; of b the column l / 4, rows 2 (l % 4) + {0, 1} and 8 more.
template <typename T>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
}

// ---- stages of weights on their way to shared memory
//
// A stage has two barriers: `full` says that what was asked for is there, `empty` that the warps have used it. From compute
// capability 9.0 on the copy engine brings the bytes; before, copies of 16 bytes of each lane do.

__device__ __forceinline__ void stage_barriers(void* full, void* empty, int users) {
#if __CUDA_ARCH__ >= 900
  barrier_init(shared_address(full), 1);
#else
  barrier_init(shared_address(full), 32);
#endif
  barrier_init(shared_address(empty), users);
}
__device__ __forceinline__ void stage_barriers_done() {
#if __CUDA_ARCH__ >= 900
  barrier_init_done();
#endif
}

// By all lanes of a warp. Addresses and bytes are multiples of 16.
__device__ __forceinline__ void stage_copy(void* to, const void* from, int bytes, void* full) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0) {
    barrier_expect(shared_address(full), bytes);
    // Weights leave the second cache first, as they are more than it holds; what is read again, instructions among it, stays.
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(full)), "l"(policy)
        : "memory");
  }
#else
  for (int at = threadIdx.x % 32 * 16; at < bytes; at += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + at),
                 "l"(__cvta_generic_to_global(static_cast<const char*>(from) + at))
                 : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full)) : "memory");
#endif
}

// Waits for the phase of this parity of either barrier.
__device__ __forceinline__ void stage_wait(void* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  barrier_wait(shared_address(barrier), parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

__device__ __forceinline__ void stage_arrive(void* empty) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(empty)) : "memory");
}

// Copies of 16 bytes to shared memory that a thread asks for, and a wait for its own.
__device__ __forceinline__ void copy_early(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Those since the one before are one; waits until so many of them are left, or fewer.
__device__ __forceinline__ void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait(int left) {
  if (left == 0)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (left == 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else if (left == 2)
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (left == 3)
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 4;" ::: "memory");
}

// Waits for the block's threads but those of the warp that brings the weights.
__device__ __forceinline__ void block_wait() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Asks for 2,048 bytes, aligned to 16, to be in the second cache.
__device__ __forceinline__ void fetch_ahead(const void* from) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], 2048;" ::"l"(__cvta_generic_to_global(from)) : "memory");
#else
  for (int i = 0; i < 2048; i += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(static_cast<const char*>(from) + i)));
#endif
}

// The same value, of which the compiler knows nothing.
template <typename Value>
__device__ __forceinline__ Value again(Value value) {
  if constexpr (sizeof(Value) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
  return value;
}

// ---- words that tell by themselves that they are there
//
// What blocks tell each other between two waits of the grid lies in words that have all bits set before. Who reads such a
// word reads it again until it has others. A word is all that is waited for, so nothing has to be in order with it.

constexpr uint32_t kAbsent = ~0u;

__device__ __forceinline__ void post(void* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(word) : "memory");
}
__device__ __forceinline__ uint32_t posted(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  return word;
}
__device__ __forceinline__ uint2 posted(const uint2* from) {
  uint2 words;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "l"(__cvta_generic_to_global(from)));
  return words;
}
__device__ __forceinline__ uint4 posted(const uint4* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(from)));
  return words;
}

// Calls read() until absent() is false.
template <typename Absent, typename Read>
__device__ __forceinline__ void read_until(const Absent& absent, const Read& read) {
#ifdef UNIFIEDAR_WATCHDOG
  const long long begin = clock64();
#endif
#pragma unroll 1
  while (absent()) {
    read();
#ifdef UNIFIEDAR_WATCHDOG
    if (clock64() - begin > 2000000000ll) __trap();
#endif
  }
}

// Waits for all blocks of the grid, which must be on the device at the same time; what they wrote before is visible after.
// `counter` was 0 at the launch, or -1; `goal`, called by thread 0, is as much more as blocks times barriers, this one included.
// `meanwhile` is called by all threads once the block has said that it is there. Thread 0 looks at the counter after that.
// Built with UNIFIEDAR_WATCHDOG, a wait of more than about a second ends the kernel with an error.
template <typename Goal, typename Meanwhile>
__device__ __forceinline__ void grid_wait(uint32_t* counter, const Goal& goal, const Meanwhile& meanwhile) {
  block_wait();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  meanwhile();
  if (threadIdx.x == 0) {
    const uint32_t wanted = goal();
    uint32_t arrived;
#ifdef UNIFIEDAR_WATCHDOG
    const long long begin = clock64();
#endif
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
#ifdef UNIFIEDAR_WATCHDOG
      if (clock64() - begin > 2000000000ll) __trap();
#endif
    } while (int(arrived - wanted) < 0);
  }
  block_wait();
}

}  // namespace unifiedar
