// A step of VAR's residual pyramid. For few pictures time is chains of loads and waits: many small tiles, all of a tile's
// loads on their way before the first is used, and the convolution's sum divided among the warps of a block. For many,
// larger tiles, whose borders and weights weigh less.
#include "pyramid.h"

#include <climits>

#include "device/early.cuh"
#include "device/wide.cuh"

namespace unifiedar {
namespace {

constexpr int kChannels = kPyramidChannels, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTaps = 9, kSum = kChannels * kTaps;
static_assert(kChannels == 32, "a channel a lane");

// Pixels that a block computes together. `kPad` are the words from a pixel's sums to the next one's: such that threads
// of different pixels read from different banks.
template <int kTall_, int kWide_, int kPad_>
struct Tile {
  static constexpr int kTall = kTall_, kWide = kWide_, kPad = kPad_;
  static constexpr int kPixels = kTall * kWide, kOwn = kPixels * kChannels / kThreads;  // numbers a thread has at the end
  static int64_t count(const PyramidArgs& args) {
    return int64_t((args.height + kTall - 1) / kTall) * ((args.width + kWide - 1) / kWide) * args.batch;
  }
};
using Small = Tile<2, 4, 36>;
using Large = Tile<4, 8, 33>;

// Of a line of pixels or spots: its four neighbours in the scale, as lines of the part that a block has, and their weights.
struct alignas(16) Neighbours {
  int line[4];
  float weight[4];
};

// Where pixel `at` lies in a scale; `step` is a pixel's size there.
__device__ __forceinline__ float source_of(int at, float step) { return (float(at) + 0.5f) * step - 0.5f; }

__device__ __forceinline__ int within(int at, int size) { return min(max(at, 0), size - 1); }

// Cubic convolution (a = -0.75). `low` is the first line of the scale that the block has.
__device__ __forceinline__ Neighbours neighbours(int at, int size, int whole, float step, int low) {
  Neighbours found;
  const float source = source_of(at, step), below = floorf(source);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float d = fabsf(source - below - float(i - 1));
    found.weight[i] = d <= 1 ? (1.25f * d - 2.25f) * d * d + 1 : ((-0.75f * d + 3.75f) * d - 6) * d + 3;
    found.line[i] = within(int(below) + i - 1, size) - low;
    if (size == whole) {  // the pixel itself, whatever lies beside it, in four quarters, whose sum is it
      found.weight[i] = 0.25f;
      found.line[i] = within(at, size) - low;
    }
  }
  return found;
}

// `step` words lie between lines.
__device__ __forceinline__ float upsampled(const float* lines, int step, const Neighbours& of) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += of.weight[i] * lines[of.line[i] * step];
  return sum;
}

// Where 16 bytes of the weights lie: four channels of a row's 288 words, so that eight rows next to each other are read
// from all banks.
__device__ __forceinline__ int weight_at(int row, int pack) { return row * kSum + (pack ^ (row & 7)) * 4; }

// Grid: (tiles of all pictures,). A warp's lanes are channels, but for the end, where a thread has
// neighbouring channels of a pixel and a warp neighbouring pixels, as the maps lie.
template <typename T, bool kPhi, typename Tile>
__global__ void __launch_bounds__(kThreads, 2) next_scale_kernel(const __grid_constant__ PyramidArgs args) {
  constexpr int kTall = Tile::kTall, kWide = Tile::kWide, kPixels = Tile::kPixels, kOwn = Tile::kOwn;
  constexpr int kBorder = kPhi ? 1 : 0, kLines = kTall + 2 * kBorder, kRow = kWide + 2 * kBorder;
  constexpr int kSpots = kLines * kRow, kPad = Tile::kPad, kParts = kPixels * kPad;
  // Of the scale, which is no larger than the map: what a tile's spots have for neighbours.
  constexpr int kHigh = kLines + 4, kBroad = kRow + 4, kLooks = (kHigh * kBroad + kWarps - 1) / kWarps;
  constexpr int kPart = kLooks * kWarps * kChannels, kUsed = kPart + kHigh * kRow * kChannels;
  constexpr int kWeights = kPhi ? kChannels * kSum : 0;
  static_assert(kLooks <= 32 && (!kPhi || kWarps * kParts <= kWeights));
  // The part of the scale and its lines, upsampled; then the weights, until all have theirs; then sums.
  alignas(16) __shared__ float pool[kUsed > kWeights ? kUsed : kWeights];
  alignas(16) __shared__ float spots[kSpots][kChannels + 4];  // the scale, upsampled
  __shared__ Neighbours down[kLines], along[kRow];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int across = (args.width + kWide - 1) / kWide, tiles = (args.height + kTall - 1) / kTall * across;
  const int tile = int(blockIdx.x) % tiles, top = tile / across * kTall, left = tile % across * kWide;
  const int64_t picture = int(blockIdx.x) / tiles;
  kernels_behind_begin();
  kernels_before_done();

  // This thread's numbers of the tile.
  const int my = int(threadIdx.x) % kPixels, my_c = int(threadIdx.x) / kPixels * kOwn;
  const int my_y = top + my / kWide, my_x = left + my % kWide;
  const bool present = my_y < args.height && my_x < args.width;
  float base[kOwn] = {}, bias[kOwn] = {};
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    if (present)
      base[n] = wide(static_cast<const T*>(args.base)[picture * args.base_b + (my_c + n) * args.base_c +
                                                         my_y * args.base_y + my_x * args.base_x]);
    if (kPhi) bias[n] = wide(static_cast<const T*>(args.bias)[my_c + n]);
  }

  const int first_y = top - kBorder, first_x = left - kBorder;
  const int low_i = within(int(floorf(source_of(first_y, args.step_y))) - 1, args.h);
  const int low_j = within(int(floorf(source_of(first_x, args.step_x))) - 1, args.w);
  const int high = within(int(floorf(source_of(first_y + kLines - 1, args.step_y))) + 2, args.h) - low_i + 1;
  const int broad = within(int(floorf(source_of(first_x + kRow - 1, args.step_x))) + 2, args.w) - low_j + 1;
  int source = -1;  // lane n: where the row of this warp's vector n of the scale begins, -1: zeros
  if (const int at = warp + lane * kWarps; at < high * broad) {
    int64_t row = (low_i + at / broad) * args.w + low_j + at % broad;
    if (args.codes) row = args.codes[picture * args.code_b + row];
    if (row >= 0 && row < args.num_codes) source = int(row) * args.table_entry;
  }
  constexpr int kPacks = kChannels * kSum / 4 / kThreads;
  Four<T> held[kPacks];  // the convolution; on its way while codes and rows are
  if (kPhi) {
#pragma unroll
    for (int n = 0; n < kPacks; ++n)
      held[n] = static_cast<const Four<T>*>(args.weight)[int(threadIdx.x) + n * kThreads];
  }
  if (const int at = int(threadIdx.x); at < kLines) {
    down[at] = neighbours(first_y + at, args.h, args.height, args.step_y, low_i);
  } else if (at < kLines + kRow) {
    along[at - kLines] = neighbours(first_x + at - kLines, args.w, args.width, args.step_x, low_j);
  }
  const T* table = static_cast<const T*>(args.table) + picture * args.table_b + lane * args.table_c;
  float value[kLooks];
#pragma unroll
  for (int n = 0; n < kLooks; ++n) {
    const int at = __shfl_sync(~0u, source, n);
    value[n] = at < 0 ? 0 : wide(table[at]);
  }
#pragma unroll
  for (int n = 0; n < kLooks; ++n) pool[(warp + n * kWarps) * kChannels + lane] = value[n];
  __syncthreads();
#pragma unroll 2
  for (int n = warp; n < high * kRow; n += kWarps)
    pool[kPart + n * kChannels + lane] = upsampled(pool + n / kRow * broad * kChannels + lane, kChannels, along[n % kRow]);
  __syncthreads();
#pragma unroll 2
  for (int spot = warp; spot < kSpots; spot += kWarps) {
    const int y = first_y + spot / kRow, x = first_x + spot % kRow;
    float sum = 0;
    if (y >= 0 && y < args.height && x >= 0 && x < args.width)
      sum = upsampled(pool + kPart + spot % kRow * kChannels + lane, kRow * kChannels, down[spot / kRow]);
    spots[spot][lane] = sum;
  }
  __syncthreads();  // nobody reads the lines any more
  if (kPhi) {
#pragma unroll
    for (int n = 0; n < kPacks; ++n) {
      const int pack = int(threadIdx.x) + n * kThreads;
      *reinterpret_cast<float4*>(pool + weight_at(pack / (kSum / 4), pack % (kSum / 4))) = {
          wide(held[n].value[0]), wide(held[n].value[1]), wide(held[n].value[2]), wide(held[n].value[3])};
    }
  }
  if (kPhi) __syncthreads();

  float part[kOwn];
#pragma unroll
  for (int n = 0; n < kOwn; ++n) part[n] = spots[(my / kWide + kBorder) * kRow + my % kWide + kBorder][my_c + n];
  if constexpr (kPhi) {
    // This warp's four input channels of all pixels; a lane is an output channel.
    float own[4 * kTaps];
#pragma unroll
    for (int n = 0; n < kTaps; ++n) {
      const float4 four = *reinterpret_cast<const float4*>(pool + weight_at(lane, warp * kTaps + n));
      own[4 * n] = four.x, own[4 * n + 1] = four.y, own[4 * n + 2] = four.z, own[4 * n + 3] = four.w;
    }
    __syncthreads();
    float sum[kPixels] = {};
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
    for (int pixel = 0; pixel < kPixels; ++pixel) pool[warp * kParts + pixel * kPad + lane] = sum[pixel];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      float convolved = bias[n];
#pragma unroll
      for (int other = 0; other < kWarps; ++other) convolved += pool[other * kParts + my * kPad + my_c + n];
      part[n] = (1 - args.ratio) * part[n] + args.ratio * convolved;
    }
  }
  if (!present) return;
  const int64_t size = int64_t(args.height) * args.width, pixel = int64_t(my_y) * args.width + my_x;
  float* total = args.total + (picture * size + pixel) * kChannels + my_c;
  T* out = static_cast<T*>(args.out) + (picture * kChannels + my_c) * size + pixel;
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    part[n] += base[n];
    out[n * size] = narrow<T>(part[n]);
  }
  if constexpr (kOwn == 4) {
    *reinterpret_cast<float4*>(total) = {part[0], part[1], part[2], part[3]};
  } else {
    static_assert(kOwn == 1, "numbers of one or four channels");
    total[0] = part[0];
  }
}

// Grid: (blocks of 8 / kSplit rows of the next scale, of all pictures,). kSplit warps have a row, eight lanes a pixel of
// it and a lane four channels.
template <typename T, int kSplit>
__global__ void __launch_bounds__(kThreads) next_mean_kernel(const __grid_constant__ PyramidArgs args) {
  __shared__ float parts[kWarps][kChannels];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, channel = lane % 8 * 4;
  const int rows = args.next_h * args.next_w, at = (int(blockIdx.x) * kWarps + warp) / kSplit;
  kernels_behind_begin();
  kernels_before_done();
  const bool present = at < rows * args.batch;
  const int picture = present ? at / rows : 0, row = at % rows, i = row / args.next_w, j = row % args.next_w;
  const int top = i * args.height / args.next_h, bottom = ((i + 1) * args.height + args.next_h - 1) / args.next_h;
  const int left = j * args.width / args.next_w, right = ((j + 1) * args.width + args.next_w - 1) / args.next_w;
  const int across = right - left, count = (bottom - top) * across;
  const float* from = args.total + int64_t(picture) * args.height * args.width * kChannels + channel;
  float sum[4] = {};
#pragma unroll 8
  for (int n = warp % kSplit * 4 + lane / 8; n < count; n += 4 * kSplit) {
    const float4 four = *reinterpret_cast<const float4*>(
        from + ((top + n / across) * args.width + left + n % across) * kChannels);
    sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    sum[c] += __shfl_xor_sync(~0u, sum[c], 8);
    sum[c] += __shfl_xor_sync(~0u, sum[c], 16);
  }
  // A lane goes on with one channel.
  if (lane < 8) *reinterpret_cast<float4*>(&parts[warp][channel]) = {sum[0], sum[1], sum[2], sum[3]};
  if (kSplit > 1) __syncthreads();
  if (kSplit == 1) __syncwarp();
  if (!present || warp % kSplit) return;
  float whole = 0;
#pragma unroll
  for (int other = 0; other < kSplit; ++other) whole += parts[warp + other][lane];
  static_cast<T*>(args.following)[int64_t(at) * kChannels + lane] =
      narrow<T>(whole / float(bottom - top) / float(across));
}

cudaError_t start(void (*kernel)(PyramidArgs), int64_t blocks, const PyramidArgs& args, bool early,
                  cudaStream_t stream) {
  cudaLaunchAttribute attribute = begins_early();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T, typename Tile>
auto kernel_of(const PyramidArgs& args) {
  return args.weight ? next_scale_kernel<T, true, Tile> : next_scale_kernel<T, false, Tile>;
}

template <typename T>
cudaError_t launch_step(PyramidArgs args, cudaStream_t stream) {
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      error != cudaSuccess)
    return error;
  args.step_y = float(args.h) / float(args.height);
  args.step_x = float(args.w) / float(args.width);
  // As many blocks as an H100 runs at a time, two a multiprocessor.
  const bool early = major >= 9, many = Small::count(args) > 2 * 132;
  const int64_t tiles = many ? Large::count(args) : Small::count(args);
  const auto kernel = many ? kernel_of<T, Large>(args) : kernel_of<T, Small>(args);
  if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = start(kernel, tiles, args, early, stream); error != cudaSuccess || !args.following)
    return error;
  const int64_t rows = int64_t(args.next_h) * args.next_w, pixels = int64_t(args.height) * args.width;
  if (pixels >= 32 * rows) return start(next_mean_kernel<T, kWarps>, rows * args.batch, args, early, stream);
  return start(next_mean_kernel<T, 1>, (rows * args.batch + kWarps - 1) / kWarps, args, early, stream);
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
