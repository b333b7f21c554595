// Launches that begin while the kernel before them ends (programmatic dependent launch, from compute capability 9.0 on):
// what launching takes then passes beside it. Such a kernel waits before it touches memory.
#pragma once

#include <cuda_runtime_api.h>

namespace unifiedar {

// The kernel behind this one may be launched; it waits for this one's end by itself.
__device__ __forceinline__ void kernels_behind_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until kernels before this one have ended and what they wrote is visible.
__device__ __forceinline__ void kernels_before_done() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A launch's attribute that lets it begin early.
inline cudaLaunchAttribute begins_early() {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}

}  // namespace unifiedar
