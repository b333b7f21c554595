// Clusters of thread blocks (compute capability 9.0): blocks that run at the same time, wait for each other and read
// each other's shared memory. In code for older GPUs these are stubs; the launchers start no cluster there.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace unifiedar {

// The block's dynamic shared memory.
__device__ __forceinline__ uint32_t* shared_memory() {
  extern __shared__ uint4 unifiedar_shared[];
  return reinterpret_cast<uint32_t*>(unifiedar_shared);
}

// The block's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

// Waits for all threads of the cluster; what they wrote before, to shared or global memory, is visible after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __trap();
#endif
}

// The same in two halves, for shared memory alone: who has waited sees what others wrote there before they arrived.
// Waiting until writes are visible in the whole GPU, as above, is left out where the toolkit can say so.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n\tbarrier.cluster.arrive.relaxed;" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Where another block of the cluster has what this one has at `mine`, in shared memory.
__device__ __forceinline__ const uint32_t* shared_of(uint32_t* mine, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

}  // namespace unifiedar
