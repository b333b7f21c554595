// Launchers of the family `codes`: raw device pointers, sizes, strides and a stream. They allocate nothing,
// never synchronise and return the launch's status.
#pragma once

#include <cuda_runtime_api.h>

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

// Gradient of the above in the codebook, from entries (row, level) sorted by the codebook row that they chose. `tables`
// counts codebook rows over all levels. Two launches: entries are cut into chunks; a first kernel sums the parts of
// segments that cross a chunk's edge, a second one sums each codebook row's entries or, where its segment was cut, its
// parts. Every sum has an order that the sizes and the segments fix; no atomics.
struct LookupBackwardArgs {
  const void* grad;       // [rows, channels], or [rows, depth, channels] if cumulative; contiguous
  const int64_t* order;   // [entries]: row * depth + level of each entry
  const int32_t* keys;    // [entries], ascending: codebook row of each entry; `tables` marks an entry to be left out
  const int64_t* begins;  // [tables + 1]: where each codebook row's entries begin
  float* partial;         // [ceil(entries / 2^chunk_log2), 2, channels], workspace
  void* out;              // [tables, channels], contiguous
  int64_t entries, tables;
  int chunk_log2, depth, channels;
};
cudaError_t launch_residual_lookup_backward(const LookupBackwardArgs& args, DType dtype, bool cumulative,
                                            cudaStream_t stream);

}  // namespace unifiedar
