// Barriers in shared memory and named barriers (compute capability 9.0). PTX ISA, "Parallel Synchronization and
// Communication Instructions: mbarrier" and "barrier".
#pragma once

#include <cstdint>

namespace unifiedar {

// Where a pointer to shared memory points, as the instructions below want it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier of 8 bytes completes a phase when so many threads have arrived and all announced bytes are there.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes what barrier_init did visible to the copy engine; before a __syncthreads that makes it visible to the block.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over: the first phase has parity 0. A barrier that nobody has arrived at
// counts as one whose phase of parity 1 is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra OVER;\n"
      "bra AGAIN;\n"
      "OVER:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Looks at a barrier and forgets what it saw.
__device__ __forceinline__ void barrier_look(uint32_t barrier) {
  asm volatile("{\n.reg .pred over;\nmbarrier.test_wait.parity.shared::cta.b64 over, [%0], 0;\n}" ::"r"(barrier)
               : "memory");
}

// Named barriers, of which a block has 16 (0 is __syncthreads'): `threads` of them sync or arrive, whole warps.
__device__ __forceinline__ void named_sync(int name, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int name, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace unifiedar
