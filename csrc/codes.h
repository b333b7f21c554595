// Launchers of the family `codes`: raw device pointers, sizes, strides and a stream. They allocate nothing,
// never synchronise and return the launch's status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/dtype.h"

namespace unifiedar {

// Sums of codebook rows over depth, or their running sums.
struct LookupArgs {
  const int64_t* codes;   // [rows, depth], contiguous; a code outside [0, num_codes) adds nothing
  const void* codebook;   // [depth, num_codes, channels], strides book_level_bytes (0: shared), book_entry_bytes, 1
  void* out;              // [rows, channels], or [rows, depth, channels] if cumulative; contiguous
  int64_t rows, book_level_bytes;
  uint32_t num_codes, book_entry_bytes;
  int depth, channels;
};
cudaError_t launch_residual_lookup(const LookupArgs& args, DType dtype, bool cumulative, cudaStream_t stream);

// Gradient of the above in the codebook. The entries (row, level) are sorted by the codebook row that they chose, and
// each codebook row's are added up in float32 in the order of the entries, cut where their place in the sorted list is a
// multiple of a chunk: the parts are added up in their order. So the result depends on nothing but the inputs, whichever
// way it is computed: in one launch by clusters of thread blocks (codes_sm90.h) or, where those cannot be had or the
// sizes are beyond them, by a radix sort and kernels that sum parts and rows. No atomics on features.
struct LookupBackwardArgs {
  const void* grad;        // [rows, channels], or [rows, depth, channels] if cumulative; contiguous
  const int64_t* codes;    // [rows, depth], contiguous; a code outside [0, num_codes) is left out
  void* workspace;         // aligned to 256 bytes
  size_t workspace_bytes;  // at least what `workspace_...` asks for
  void* out;               // [num_codes, channels] if shared, else [depth, num_codes, channels]; contiguous
  int entries;             // rows * depth, at least 1
  int num_codes, depth, channels;
  bool shared;
  float* counts;           // [num_codes (* depth)]: entries that chose each codebook row; or null
};
// num_codes (* depth, if not shared) must be below 2^31.
cudaError_t launch_residual_lookup_backward(const LookupBackwardArgs& args, DType dtype, bool cumulative,
                                            cudaStream_t stream);
// The same of one level and one codebook: `grad` are the vectors that chose, `out` their sums, always float32. There
// must be channels.
cudaError_t launch_code_statistics(const LookupBackwardArgs& args, DType dtype, cudaStream_t stream);
// Bytes of the workspace of either on the current device; looks at the sizes only.
cudaError_t workspace_residual_lookup_backward(const LookupBackwardArgs& args, size_t* bytes);

}  // namespace unifiedar
