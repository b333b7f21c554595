// What the attention kernels for compute capability 9.0 share: the order of tiles, where scales begin and end, the ring
// of stages, small arithmetic, results, and the maps of tensors for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "attention_sm90.h"
#include "device/barrier.cuh"
#include "device/pack.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

namespace unifiedar {

constexpr uint32_t kWarp = ~0u;  // all lanes
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kHeldRows = 64;  // of a warpgroup
constexpr int kBox = 64;       // channels of a box: 128 bytes

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasProducts = true;
#else
constexpr bool kHasProducts = false;
#endif

// The same number, of which the compiler does not know that it is: what is computed from it is not kept in registers
// over a loop that has none to spare.
__device__ __forceinline__ uint32_t again(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The same number, of which the compiler knows that all lanes have it: what is computed from it, above all descriptors
// of operands, takes registers and instructions of the warp and none of its lanes.
__device__ __forceinline__ uint32_t of_warp(uint32_t x) { return __shfl_sync(kWarp, again(x), 0); }

// ---- where to work ---------------------------------------------------------------------------------------------------

struct Place {
  int rank;  // of the tile among those of its heads, longest first
  int row;   // batch and head in one
  int batch, head;
};

// The tile of a number; false when there is none. Tiles lie in groups of heads, in a group the longest first.
template <typename Args>
__device__ __forceinline__ bool place_of(const Args& args, int64_t number, Place* place) {
  if (number >= int64_t(args.tiles) * args.rows) return false;
  const int tile = int(number);
  const int first = tile / (args.group * args.tiles) * args.group;
  const int size = min(args.group, args.rows - first);
  const int within = tile - first * args.tiles;
  place->rank = within / size;
  place->row = first + within - place->rank * size;
  place->batch = place->row / args.heads;
  place->head = place->row - place->batch * args.heads;
  return true;
}

constexpr int kNumbers = 2;  // tiles a block may have taken and not all its warps have seen

// Number of the block's next tile, which the warps that calculate find in shared memory: the first lane of the warp that
// copies tells it all others. With a counter, `taken`, a block takes a tile when it has asked for all copies of the one
// before, for how long tiles take is not known, and blocks are to end together; without, they take them in turns. Which
// block has a tile changes no bit of it.
template <typename Shape, typename Args>
__device__ __forceinline__ unsigned tell_tile(const Args& args, uint32_t memory, char* shared, int turn) {
  unsigned number = 0;
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x, block = blockIdx.x, slot = turn % kNumbers;
    if (turn == 0 || (!Shape::kCounted && args.taken == nullptr))
      number = Shape::kCounted ? block : turn * blocks + (turn % 2 ? blocks - 1 - block : block);
    else
      number = blocks + atomicAdd(args.taken, 1u);
    barrier_wait(memory + Shape::kNumberEmpty + 8 * slot, turn / kNumbers % 2 ^ 1);
    reinterpret_cast<volatile unsigned*>(shared + Shape::kNumberAt)[slot] = number;
    barrier_arrive(memory + Shape::kNumberFull + 8 * slot);
  }
  return __shfl_sync(kWarp, number, 0);
}

// What it told.
template <typename Shape>
__device__ __forceinline__ unsigned hear_tile(uint32_t memory, const char* shared, int turn) {
  const int slot = turn % kNumbers;
  barrier_wait(memory + Shape::kNumberFull + 8 * slot, turn / kNumbers % 2);
  const unsigned number = reinterpret_cast<const volatile unsigned*>(shared + Shape::kNumberAt)[slot];
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(memory + Shape::kNumberEmpty + 8 * slot);
  return __shfl_sync(kWarp, number, 0);  // the compiler learns that it is the same for all
}

// Rows of one image of several that are packed one after another, and its number.
struct Image {
  int number, low, high;
};

// The image of a slot. Those of an image begin at low / kRows + number, which leaves room for all its tiles without
// counting those of others: at most one of them is left over.
template <int kRows, typename Args>
__device__ __forceinline__ Image image_of(const Args& args, int slot) {
  const auto first_of = [&](int image) {
    return image < args.images ? min(args.offsets[image], args.queries) : args.queries;
  };
  int image = 0;
  for (int at = 0; at < args.images; at += 32) {
    const int other = at + threadIdx.x % 32;
    const bool begun = other < args.images && first_of(other) / kRows + other <= slot;
    image = max(image, __reduce_max_sync(kWarp, begun ? other : 0));
  }
  return {image, int(of_warp(first_of(image))), int(of_warp(first_of(image + 1)))};
}

// What a position sees, or who sees it: [begin, end) of a range.
struct Range {
  int begin, end;
};

// Of a table [ranges, 2, keys]; from afar to 0 if it is empty.
__device__ __forceinline__ Range non_empty(Range range) {
  return range.begin < range.end ? range : Range{INT_MAX, 0};
}
__device__ __forceinline__ Range read_range(const int* table, int keys, int range, int position) {
  const int* const at = table + (int64_t(2) * range * keys + position);
  return {at[0], at[keys]};
}

// Length of the scale of this lane's number, 0 of scales that are not there.
template <typename Args>
__device__ __forceinline__ int scale_length(const Args& args) {
  const int lane = threadIdx.x % 32;
  if (lane >= args.scales) return 0;
  return args.wide_lengths ? int(static_cast<const int64_t*>(args.lengths)[lane])
                           : static_cast<const int*>(args.lengths)[lane];
}

// First token of the scale of this lane's number, of `length`; of scales that are not there, a place that no token has.
template <typename Args>
__device__ __forceinline__ int scale_begin(const Args& args, int length) {
  const int lane = threadIdx.x % 32;
  unsigned through = length;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(kWarp, through, step);
    if (lane >= step) through += other;
  }
  return lane < args.scales ? int(args.prefix + through - length) : INT_MAX;
}

// End of what a position sees, which never is before the position's own end. All lanes ask for the same one.
__device__ __forceinline__ int end_of(int begin, int position, int keys) {
  return min(__reduce_min_sync(kWarp, begin > position ? begin : keys), keys);
}

// First position that sees a position, at most that one itself. All lanes ask for the same one.
__device__ __forceinline__ int begin_seen_from(int begin, int position) {
  return max(__reduce_max_sync(kWarp, begin <= position ? begin : 0), 0);
}

// The same of a thread's two rows.
__device__ __forceinline__ void ends_of(int begin_of_scale, int scales, const int (&position)[2], int keys,
                                        int (&end)[2]) {
  end[0] = end[1] = keys;
  for (int i = 0; i < scales; ++i) {
    const int begin = __shfl_sync(kWarp, begin_of_scale, i);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (begin > position[h]) end[h] = min(end[h], begin);
  }
}
__device__ __forceinline__ void begins_seen_from(int begin_of_scale, int scales, const int (&position)[2],
                                                 int (&seen_from)[2]) {
  seen_from[0] = seen_from[1] = 0;
  for (int i = 0; i < scales; ++i) {
    const int begin = __shfl_sync(kWarp, begin_of_scale, i);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (begin <= position[h]) seen_from[h] = max(seen_from[h], begin);
  }
}

// A stage of the ring, and the parity of its barriers' phase.
template <int kStages>
struct Stage {
  uint32_t at = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == kStages) {
      at = 0;
      parity ^= 1;
    }
  }
};

// ---- arithmetic ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}

template <typename T, int kCount>
__device__ __forceinline__ void pack(const float (&weight)[kCount], uint32_t (&word)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) word[i] = pack_word(weight[2 * i], weight[2 * i + 1], T{});
}

// ---- results ---------------------------------------------------------------------------------------------------------

// A warpgroup's rows of a result, packed: into boxes for the copy engine, or row by row, those from 0 on.
template <int kCount>
__device__ __forceinline__ void write_boxes(const uint32_t (&word)[kCount], char* to) {
  const int thread = again(threadIdx.x) % 128, row = thread / 32 * 16 + thread % 32 / 4;
  to += row * 128 + thread % 4 * 4;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int unit = i / 2, h = i % 2;  // rows 8 apart have the same swizzle
    *reinterpret_cast<uint32_t*>(to + unit / 8 * kHeldRows * 128 + h * 1024 + ((unit % 8 ^ row % 8) << 4)) = word[i];
  }
}
template <typename T, int kCount>
__device__ __forceinline__ void write_rows(const uint32_t (&word)[kCount], T* to, int64_t stride, int first, int width) {
  const int thread = again(threadIdx.x) % 128;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 2 * 8 + thread % 4 * 2, row = first + thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
    if (row >= 0 && column < width) *reinterpret_cast<uint32_t*>(to + row * stride + column) = word[i];
  }
}

// ---- on the host -----------------------------------------------------------------------------------------------------

using EncodeTiled = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                             const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, through the runtime: the library is not linked with the driver.
inline EncodeTiled* find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled*>(function)
                                                                      : nullptr;
}

// A tensor [batch, heads, length, width] in boxes of `rows` by 64 channels. The driver wants the thread to have a context,
// which one of autograd's that has launched nothing yet has not: only after a call of the runtime that needs it.
inline cudaError_t describe_tensor(CUtensorMap* map, const HeadsView& view, DType dtype, int batch, int heads,
                                   int length, int width, int rows) {
  static EncodeTiled* const encode = find_encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {cuuint64_t(width), cuuint64_t(length), cuuint64_t(heads), cuuint64_t(batch)};
  const int64_t steps[3] = {view.row_stride, view.head_stride, view.batch_stride};
  cuuint64_t strides[3];
  for (int i = 0; i < 3; ++i) strides[i] = sizes[i + 1] == 1 ? 16 : cuuint64_t(steps[i]) * 2;
  const cuuint32_t box[4] = {kBox, cuuint32_t(rows), 1, 1}, element_strides[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             view.data, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // the runtime has the driver's numbers
}

// Whether tiles of one warpgroup are taken, two blocks a multiprocessor, in place of those of two or three, which share
// what they read and fill in for each other: where those are too few to keep all multiprocessors at work to the end.
inline bool narrow_wins(int length, int64_t rows, int processors) {
  return (length + kHeldRows - 1) / kHeldRows * rows <= int64_t(6) * processors;
}

// Multiprocessors of the device; cudaErrorNotSupported if it is not one of compute capability 9.0.
inline cudaError_t count_processors(int* processors) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return major == 9 && minor == 0 ? cudaSuccess : cudaErrorNotSupported;
}

}  // namespace unifiedar
