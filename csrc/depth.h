// Launcher of the family `depth`: all codes of a position in one launch that stays on every multiprocessor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/dtype.h"

namespace unifiedar {

constexpr int kMaxDepth = 64;      // codes of a position
constexpr int kMaxDepthRows = 32;  // rows of a launch, unconditional ones included
constexpr int kHeadDim = 64;

struct DepthSizes {
  int rows;        // of `hidden`: with guidance the first half conditional, the second unconditional
  int dim;         // a multiple of 64: heads are 64 wide
  int layers, depth, num_codes;
  int code_dim;    // width of a codebook row
  int hidden_dim;  // width of the hidden state, a multiple of 64; 0: as wide as the blocks, enters without a projection
  bool guided;
};

// Of the tensors only `total` and `codebook` have `book_dtype`; `hidden`, `packed`, `logits` have the launch's.
struct DepthArgs {
  DepthSizes sizes;
  const void* hidden;    // [rows, hidden_dim or dim], contiguous, aligned to 16 bytes
  const void* packed;    // matrices and vectors in the order of DepthLayout (depth.cu), aligned to 16 bytes
  const void* codebook;  // [(depth,) num_codes, code_dim], strides book_level (0: shared), book_entry, 1
  const float* noise;    // [count, depth, num_codes], strides noise_row, noise_depth, 1; null if nothing is drawn
  const float* guidance_rows;  // [count], or null: guidance
  const int64_t* forced;       // [count, depth], contiguous; or null: drawn
  int64_t* codes;        // [count, depth]; count is rows, or half of them if guided
  int* unsound;          // [count]: the first depth at which scores to be drawn from had NaN; -1: none
  void* total;           // [count, code_dim]
  void* logits;          // [rows, depth, num_codes], or null
  void* workspace;       // aligned to 256 bytes, of workspace_depth_decode's size
  int64_t book_level, book_entry, noise_row, noise_depth;
  DType book_dtype;
  float guidance;
  int stop;              // phases to run, for a look at the workspace; -1: all
  float inverse_temperature[kMaxDepth];  // 0: the largest logit
  int top_k[kMaxDepth];                  // 0: off
  double top_p[kMaxDepth];               // 0: off
};

// Where the workspace has what, in bytes. Parts and q are there once a layer, x twice and once more; y and h once a layer where
// rows are few, else h once and y twice: the attention's output, then the residual stream normalised.
struct DepthWorkspace {
  size_t barrier;  // uint32
  size_t parts;    // float [2, 3, rows, dim]: what lies beside the residual stream, after the attention and after the MLP
  size_t x;        // float [rows, dim]: the residual stream
  size_t q, y;     // [rows, dim]: queries, and the attention's output
  size_t h;        // [rows, 4 dim]: inside the MLP
  size_t cache;    // [layers, 2, depth, rows, dim]: keys and values
  size_t sums;     // [rows, code_dim up to a multiple of 64]: what enters at the next depth
  size_t keys;     // int32 [count, num_codes up to a multiple of 4]: scores as integers of their order
  size_t bytes;
};
DepthWorkspace workspace_depth_decode(const DepthSizes& sizes);

// How many elements `packed` has.
int64_t packed_depth_decode(const DepthSizes& sizes);

// How many rows one launch can take on the current device; 0 if it cannot run there, where not all of its blocks would be
// on the device at the same time.
cudaError_t rows_depth_decode(const DepthSizes& sizes, DType dtype, int* rows);

cudaError_t launch_depth_decode(const DepthArgs& args, DType dtype, cudaStream_t stream);

}  // namespace unifiedar
