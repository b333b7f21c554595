// Launcher of VAR's residual pyramid as a whole: features to the codes of all scales, a cluster of blocks a picture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace unifiedar {

constexpr int kPyramidScales = 32;   // at most
constexpr int kPyramidPixels = 256;  // of a map, at most

// All floating tensors have the launch's type.
struct EncodeArgs {
  const void* features;  // [batch, 32, height, width], strides features_b, features_c, features_y, features_x
  const void* codebook;  // [num_codes, 32], strides entry, 1; rows aligned for four elements
  const void* weight;    // [count, 32 out, 32 in, 3, 3], contiguous, aligned to 16 bytes, if `convolved`
  const void* bias;      // [count, 32], likewise
  int64_t* codes;        // [batch, length]: of all scales, one behind the other
  int64_t features_b;
  int features_c, features_y, features_x, entry;
  int batch, height, width, num_codes, length, steps;
  bool convolved;
  float ratio;
  short h[kPyramidScales], w[kPyramidScales], phi[kPyramidScales];  // of each scale
};

// How a cluster shares a picture: a function of the sizes and the device.
struct EncodePlan {
  int blocks = 0;    // of a cluster; 0 where this way is closed
  int clusters = 0;  // of the launch
  int own = 0;       // codes that a block searches
  int lines = 0;     // of the map that a block has
  int stride = 0;    // spots of a line with its border
  // Where in a block's shared memory things begin, in words.
  int norms = 0, rest = 0, weights = 0, found = 0, chosen = 0, open = 0, taps = 0, zone = 0, strip = 0;
  int words = 0;
};
// Looks at sizes only: pointers and strides may be missing.
cudaError_t plan_encode(const EncodeArgs& args, EncodePlan* plan);

cudaError_t launch_encode(const EncodeArgs& args, const EncodePlan& plan, DType dtype, cudaStream_t stream);

}  // namespace unifiedar
