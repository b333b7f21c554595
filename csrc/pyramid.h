// Launcher of the step of VAR's residual pyramid: one scale added to the sum so far, and the mean that comes next.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace unifiedar {

constexpr int kPyramidChannels = 32;

// All floating tensors have the launch's type but for `total`. Offsets within a picture and in the table are 32-bit.
struct PyramidArgs {
  const void* base;      // [batch, 32, height, width], strides base_b, base_c, base_y, base_x: the sum so far
  const int64_t* codes;  // [batch, h w], strides code_b, 1; one outside [0, num_codes) stands for zeros; or null: vectors
  const void* table;     // [num_codes, 32], strides table_entry, 1; or vectors [batch, h w, 32], strides table_b, ...
  const void* weight;    // [32 out, 32 in, 3, 3], contiguous, aligned to 16 bytes; or null: no convolution
  const void* bias;      // [32]
  float* total;          // [batch, height width, 32]: the new sum, not rounded
  void* out;             // [batch, 32, height, width]: the new sum
  void* following;       // [batch, next_h next_w, 32]; or null
  int64_t base_b, code_b, table_b;
  int base_c, base_y, base_x, table_entry, table_c;
  int batch, height, width, h, w, next_h, next_w, num_codes;  // h <= height, w <= width
  float ratio;
  float step_y, step_x;  // h / height and w / width: the launcher sets them
};

cudaError_t launch_next_scale_input(const PyramidArgs& args, DType dtype, cudaStream_t stream);

}  // namespace unifiedar
