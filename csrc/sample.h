// Launcher of the family `sample`: one code from each row of logits, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace unifiedar {

struct SampleArgs {
  const void* logits;          // [rows, vocabulary], or [2 rows, vocabulary] if guided: the conditional ones first
  const float* noise;          // [rows, vocabulary]
  const float* guidance_rows;  // [rows / inner], or null: guidance
  const int64_t* top_k_rows;   // [rows / inner], or null: top_k
  const void* top_p_rows;      // [rows / inner], float64 if wide_top_p, else float32; or null: top_p
  int64_t* out;                // [rows]
  int64_t rows, inner, logits_row, noise_row;  // strides in elements; entries of a row are contiguous
  int64_t top_k;               // 0, or as many as there are entries: off
  double top_p;                // 0, or 1: off
  float guidance, inverse_temperature;
  int vocabulary;              // at most 2^18
  bool guided, wide_top_p;
};

cudaError_t launch_sample_codes(const SampleArgs& args, DType dtype, cudaStream_t stream);

}  // namespace unifiedar
