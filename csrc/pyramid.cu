// A step of VAR's residual pyramid for few pictures, where time is chains of loads and waits: many small tiles, all of a
// tile's loads on their way before the first is used, and the convolution's sum divided among the warps of a block.
#include "pyramid.h"

#include <algorithm>

#include "device/wide.cuh"

namespace unifiedar {
namespace {

constexpr int kChannels = kPyramidChannels, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTall = 2, kWide = 4, kPixels = kTall * kWide;  // a tile, a pixel a warp
constexpr int kTaps = 9, kSum = kChannels * kTaps;
constexpr int kBlocks = 132 * 2;  // that are on the device at a time
static_assert(kPixels == kWarps && kChannels == 32, "a thread has one number of a tile");

// Weights of cubic convolution (a = -0.75) of the four neighbours of `at`, of which the second is at floor(at).
__device__ __forceinline__ void cubic(float at, float (&weight)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float d = fabsf(at - floorf(at) - float(i - 1));
    weight[i] = d <= 1 ? (1.25f * d - 2.25f) * d * d + 1 : ((-0.75f * d + 3.75f) * d - 6) * d + 3;
  }
}

// Where 16 bytes of the weights lie: four channels of a row's 288 words, so that eight rows next to each other are read
// from all banks.
__device__ __forceinline__ int weight_at(int row, int pack) { return row * kSum + (pack ^ (row & 7)) * 4; }

// Grid: blocks that take every so many tiles. A warp's lanes are channels.
template <typename T, bool kPhi>
__global__ void __launch_bounds__(kThreads, 2) next_scale_kernel(const __grid_constant__ PyramidArgs args) {
  constexpr int kBorder = kPhi ? 1 : 0, kRow = kWide + 2 * kBorder, kSpots = (kTall + 2 * kBorder) * kRow;
  alignas(16) __shared__ float weights[kPhi ? kChannels * kSum : 1];
  alignas(16) __shared__ float spots[kSpots][kChannels];  // the scale, upsampled
  __shared__ float parts[kPhi ? kWarps : 1][kPixels][kChannels];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int across = (args.width + kWide - 1) / kWide, tiles = (args.height + kTall - 1) / kTall * across;

  for (int tile = int(blockIdx.x); tile < tiles * args.batch; tile += int(gridDim.x)) {
    const int64_t picture = tile / tiles;
    const int top = tile % tiles / across * kTall, left = tile % tiles % across * kWide;
    // This thread's number of the tile.
    const int my_y = top + warp / kWide, my_x = left + warp % kWide;
    const bool present = my_y < args.height && my_x < args.width;
    float base = 0, bias = 0;
    if (present)
      base = wide(static_cast<const T*>(args.base)[picture * args.base_b + lane * args.base_c + my_y * args.base_y +
                                                      my_x * args.base_x]);
    if (kPhi) bias = wide(static_cast<const T*>(args.bias)[lane]);

    constexpr int kOwn = (kSpots + kWarps - 1) / kWarps;
    int source[kOwn];  // lanes 0 to 15: where the row of one of a spot's 16 neighbours begins, -1: zeros
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      const int spot = warp + s * kWarps, y = top - kBorder + spot / kRow, x = left - kBorder + spot % kRow;
      source[s] = -1;
      if (lane >= 16 || y < 0 || y >= args.height || x < 0 || x >= args.width) continue;
      const float at_y = (float(y) + 0.5f) * (float(args.h) / float(args.height)) - 0.5f;
      const float at_x = (float(x) + 0.5f) * (float(args.w) / float(args.width)) - 0.5f;
      const int i = min(max(int(floorf(at_y)) + lane / 4 - 1, 0), args.h - 1);
      const int j = min(max(int(floorf(at_x)) + lane % 4 - 1, 0), args.w - 1);
      int64_t row = i * args.w + j;
      if (args.codes) row = args.codes[picture * args.code_b + row];
      if (row >= 0 && row < args.num_codes) source[s] = int(row) * args.table_entry;
    }
    constexpr int kPacks = kChannels * kSum / 4 / kThreads;
    Four<T> held[kPacks];  // the convolution, once; on its way while codes and rows are
    const bool first = kPhi && tile == int(blockIdx.x);
    if (first) {
#pragma unroll
      for (int n = 0; n < kPacks; ++n)
        held[n] = static_cast<const Four<T>*>(args.weight)[int(threadIdx.x) + n * kThreads];
    }
    __syncthreads();  // nobody reads the last tile's any more
    const T* table = static_cast<const T*>(args.table) + picture * args.table_b + lane * args.table_c;
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      const int spot = warp + s * kWarps, y = top - kBorder + spot / kRow, x = left - kBorder + spot % kRow;
      float value[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int at = __shfl_sync(~0u, source[s], n);
        value[n] = at < 0 ? 0 : wide(table[at]);
      }
      float down[4], along[4], sum = 0;
      cubic((float(y) + 0.5f) * (float(args.h) / float(args.height)) - 0.5f, down);
      cubic((float(x) + 0.5f) * (float(args.w) / float(args.width)) - 0.5f, along);
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float line = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) line += along[b] * value[4 * a + b];
        sum += down[a] * line;
      }
      if (spot < kSpots) spots[spot][lane] = sum;
    }
    if (first) {
#pragma unroll
      for (int n = 0; n < kPacks; ++n) {
        const int pack = int(threadIdx.x) + n * kThreads;
        *reinterpret_cast<float4*>(weights + weight_at(pack / (kSum / 4), pack % (kSum / 4))) = {
            wide(held[n].value[0]), wide(held[n].value[1]), wide(held[n].value[2]), wide(held[n].value[3])};
      }
    }
    __syncthreads();

    float part = spots[(warp / kWide + kBorder) * kRow + warp % kWide + kBorder][lane];
    if constexpr (kPhi) {
      // This warp's four input channels of all pixels; a lane is an output channel.
      float own[4 * kTaps], sum[kPixels] = {};
#pragma unroll
      for (int n = 0; n < kTaps; ++n) {
        const float4 four = *reinterpret_cast<const float4*>(weights + weight_at(lane, warp * kTaps + n));
        own[4 * n] = four.x, own[4 * n + 1] = four.y, own[4 * n + 2] = four.z, own[4 * n + 3] = four.w;
      }
#pragma unroll
      for (int spot = 0; spot < kSpots; ++spot) {
        const float4 four = *reinterpret_cast<const float4*>(&spots[spot][4 * warp]);
        const float input[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int pixel = 0; pixel < kPixels; ++pixel) {
          const int ty = spot / kRow - pixel / kWide, tx = spot % kRow - pixel % kWide;
          if (ty < 0 || ty > 2 || tx < 0 || tx > 2) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[pixel] += input[i] * own[i * kTaps + ty * 3 + tx];
        }
      }
#pragma unroll
      for (int pixel = 0; pixel < kPixels; ++pixel) parts[warp][pixel][lane] = sum[pixel];
      __syncthreads();
      float convolved = bias;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) convolved += parts[other][warp][lane];
      part = (1 - args.ratio) * part + args.ratio * convolved;
    }
    if (!present) continue;
    const int64_t size = int64_t(args.height) * args.width, pixel = int64_t(my_y) * args.width + my_x;
    args.total[(picture * size + pixel) * kChannels + lane] = base + part;
    static_cast<T*>(args.out)[(picture * kChannels + lane) * size + pixel] = narrow<T>(base + part);
  }
}

// Grid: (rows of the next scale, of all pictures,). A warp's lanes are channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) next_mean_kernel(const __grid_constant__ PyramidArgs args) {
  __shared__ float parts[kWarps][kChannels];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int rows = args.next_h * args.next_w, picture = int(blockIdx.x) / rows, row = int(blockIdx.x) % rows;
  const int i = row / args.next_w, j = row % args.next_w;
  const int top = i * args.height / args.next_h, bottom = ((i + 1) * args.height + args.next_h - 1) / args.next_h;
  const int left = j * args.width / args.next_w, right = ((j + 1) * args.width + args.next_w - 1) / args.next_w;
  const int across = right - left, count = (bottom - top) * across;
  const float* from = args.total + int64_t(picture) * args.height * args.width * kChannels + lane;
  float sum = 0;
#pragma unroll 8
  for (int n = warp; n < count; n += kWarps)
    sum += from[((top + n / across) * args.width + left + n % across) * kChannels];
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int other = 1; other < kWarps; ++other) sum += parts[other][lane];
  static_cast<T*>(args.following)[int64_t(blockIdx.x) * kChannels + lane] =
      narrow<T>(sum / float(bottom - top) / float(across));
}

template <typename T>
cudaError_t launch_step(const PyramidArgs& args, cudaStream_t stream) {
  const int64_t tiles = int64_t((args.height + kTall - 1) / kTall) * ((args.width + kWide - 1) / kWide) * args.batch;
  const unsigned blocks = unsigned(std::min<int64_t>(tiles, kBlocks));
  if (args.weight) {
    next_scale_kernel<T, true><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    next_scale_kernel<T, false><<<blocks, kThreads, 0, stream>>>(args);
  }
  if (args.following) {
    const unsigned rows = unsigned(args.next_h * args.next_w * args.batch);
    next_mean_kernel<T><<<rows, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_next_scale_input(const PyramidArgs& args, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_step<float>(args, stream);
    case DType::kBFloat16:
      return launch_step<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_step<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace unifiedar
