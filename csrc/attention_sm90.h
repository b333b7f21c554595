// Launchers of the family `attention`, for compute capability 9.0: raw device pointers, sizes, strides and a stream. They
// allocate nothing, never synchronise and return the launch's status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace unifiedar {

// A tensor [batch, heads, length, width]: aligned to 16 bytes, strides in elements, multiples of 8, of the last dimension
// 1. The stride of a dimension of one is not looked at; others must not be 0.
struct HeadsView {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Block-causal attention: unifiedar/ops/attention.py defines it.
struct AttentionArgs {
  HeadsView q;          // [batch, heads, queries, width]
  HeadsView k, v;       // [batch, heads / share, keys, width]
  HeadsView out;        // like q; written
  float* lse;           // [batch, heads, queries], contiguous; written
  unsigned* taken;      // one number of workspace, by which blocks take tiles as they become free; null: in turns
  const void* lengths;  // [scales] of int32, or int64 if `wide_lengths`: tokens of each scale, after the prefix
  bool wide_lengths;
  // In their place, or null: [ranges, 2, keys], begins and ends of the disjoint ranges of what each token sees, itself
  // among it; [images], the first token of each, ascending from 0, with as many queries as keys, or null for one.
  const int *sees, *offsets;
  int ranges, images;
  int batch, heads, share, queries, keys, width, scales, prefix;
  int group;            // heads whose tiles are interleaved, so that long tiles of all go first
  float softmax_scale;
};

// Tiles that the forward can be asked for; kChosen takes one by the sizes. Those of 64 rows are one warpgroup's of the
// others, with the same bits.
enum class AttentionTile : int {
  kChosen = -1,
  kRows192Keys112 = 0,
  kRows128Keys144 = 1,
  kRows128Keys128 = 2,
  kRows64Keys112 = 3,
  kRows64Keys144 = 4
};

// bfloat16 or float16, width a multiple of 8 up to 128, queries at most keys, both at least 1; on a device of another
// compute capability than 9.0, with a width or a table that a tile is not made for, or with sizes beyond 2^31 tiles:
// cudaErrorNotSupported.
cudaError_t launch_attention_forward(const AttentionArgs& args, DType dtype, AttentionTile tile, cudaStream_t stream);

// Its gradients.
struct AttentionBackwardArgs {
  HeadsView grad, out;               // [batch, heads, queries, width]
  HeadsView q, k, v;                 // as the forward's
  HeadsView grad_q, grad_k, grad_v;  // like q, k, v; written
  const float *lse, *grad_lse;       // [batch, heads, queries], contiguous; grad_lse may be null
  float* workspace;     // aligned to 16 bytes, 2 (queries + 127 max(images, 1)) numbers a head; written
  const void* lengths;  // these and what follows as the forward's
  bool wide_lengths;
  // In their place, or null: as the forward's; likewise [seen_by_ranges, 2, keys], of who sees each token.
  const int *sees, *seen_by, *offsets;
  int ranges, seen_by_ranges, images;
  int4* plan;  // with them, 5 (queries / 128 + max(images, 1)) ranges and as many by keys and seen_by_ranges; written
  int batch, heads, share, queries, keys, width, scales, prefix;
  int query_group, key_group;        // as the forward's group, of heads of queries and of heads of keys
  float softmax_scale;
};

// Rows of a tile: of two or three warpgroups, or of one (width up to 64, no table), with the same bits.
enum class AttentionBackwardTile : int { kChosen = -1, kWide = 0, kNarrow = 1 };

// Takes what the forward takes.
cudaError_t launch_attention_backward(const AttentionBackwardArgs& args, DType dtype, AttentionBackwardTile tile,
                                      cudaStream_t stream);

}  // namespace unifiedar
