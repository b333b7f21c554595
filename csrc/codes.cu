#include "codes.h"

#include <algorithm>

#include "device/pack.cuh"

namespace unifiedar {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;   // a multiprocessor; up to 80 registers a thread, which no kernel here exceeds or spills
constexpr int kLevels = 4;   // codebook rows of one output row that a thread has in flight
constexpr int kRows = 2;     // output rows that a thread works on at a time
constexpr int kEntries = 4;  // gradient rows that a thread has in flight

// Sums of kRows rows of the lookup at one pack of channels. Loads come first, so that they are in flight together.
// Addresses are kept in bytes: a gathered row's is then one multiply-add.
template <typename T, int kVec, bool kCumulative>
struct LookupTile {
  const LookupArgs& args;
  const int64_t (&row)[kRows];
  const int64_t* codes[kRows];  // at the next level
  const char* table;            // the next level's codebook, at the tile's channels
  T* out[kRows];                // the next row to be written, at the tile's channels
  float sum[kRows][kVec] = {};

  __device__ __forceinline__ LookupTile(const LookupArgs& args, const int64_t (&row)[kRows], int channel)
      : args(args), row(row), table(static_cast<const char*>(args.codebook) + channel * sizeof(T)) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      codes[r] = args.codes + row[r] * args.depth;
      out[r] = static_cast<T*>(args.out) + row[r] * (kCumulative ? args.depth : 1) * args.channels + channel;
    }
  }

  // Adds kCount levels. kKnown promises that all rows are inside and all codes known, and needs no predicates.
  template <int kCount, bool kKnown>
  __device__ __forceinline__ void add(const int64_t (&code)[kRows][kCount]) {
    Pack<T, kVec> part[kRows][kCount];
#pragma unroll
    for (int l = 0; l < kCount; ++l) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kKnown || uint64_t(code[r][l]) < args.num_codes)
          part[r][l].load(reinterpret_cast<const T*>(table + uint64_t(uint32_t(code[r][l])) * args.book_entry_bytes));
        else
          part[r][l].clear();
      }
      table += args.book_level_bytes;
    }
#pragma unroll
    for (int l = 0; l < kCount; ++l) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        part[r][l].add_to(sum[r]);
        if constexpr (kCumulative) {
          if (kKnown || row[r] < args.rows) store(r);
          out[r] += args.channels;
        }
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void step() {
    int64_t code[kRows][kCount];
    bool known = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int l = 0; l < kCount; ++l) code[r][l] = row[r] < args.rows ? __ldg(codes[r] + l) : -1;
      codes[r] += kCount;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int l = 0; l < kCount; ++l) known &= uint64_t(code[r][l]) < args.num_codes;
    }
    if (known)
      add<kCount, true>(code);
    else
      add<kCount, false>(code);
  }

  __device__ __forceinline__ void store(int r) const {
    Pack<T, kVec> rounded;
    rounded.set(sum[r]);
    rounded.store_streaming(out[r]);
  }
};

// A block is blockDim.x packs wide and kRows * blockDim.y rows high; a thread owns the packs threadIdx.x,
// threadIdx.x + blockDim.x, ... of its rows. Lanes that share a row read the same code, which is one broadcast.
template <typename T, int kVec, bool kCumulative>
__global__ void __launch_bounds__(kThreads, kBlocks) residual_lookup_kernel(const LookupArgs args) {
  int64_t row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) row[r] = (int64_t(blockIdx.x) * kRows + r) * blockDim.y + threadIdx.y;
  if (row[0] >= args.rows) return;
  for (int channel = threadIdx.x * kVec; channel < args.channels; channel += blockDim.x * kVec) {
    LookupTile<T, kVec, kCumulative> tile(args, row, channel);
    int level = 0;
    for (; level + kLevels <= args.depth; level += kLevels) tile.template step<kLevels>();
    for (; level < args.depth; ++level) tile.template step<1>();
    if constexpr (!kCumulative) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (row[r] < args.rows) tile.store(r);
    }
  }
}

// Quotient of an entry's index by the depth; 32-bit division where it will do, a fifth of the instructions.
__device__ __forceinline__ int64_t row_of(int64_t index, int depth) {
  return (index >> 32) == 0 ? int64_t(uint32_t(index) / uint32_t(depth)) : index / depth;
}

// Adds the gradients of the sorted entries [begin, end) at one pack of channels, in that order.
template <typename T, int kVec, bool kCumulative>
__device__ __forceinline__ void add_entries(const LookupBackwardArgs& args, int64_t begin, int64_t end, int channel,
                                            float (&sum)[kVec]) {
  const T* const grad = static_cast<const T*>(args.grad) + channel;
  if constexpr (kCumulative) {
    // A row chosen at a level is part of that running sum and of all later ones.
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = __ldg(args.order + i);
      const int64_t row = row_of(index, args.depth);
      const int level = int(index - row * args.depth);
      float tail[kVec] = {};
      for (int last = args.depth - 1; last >= level; last -= kEntries) {
        Pack<T, kVec> part[kEntries];
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          part[e].clear();
          if (last - e >= level) part[e].load(grad + (row * args.depth + last - e) * args.channels);
        }
#pragma unroll
        for (int e = 0; e < kEntries; ++e) part[e].add_to(tail);
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum[v] += tail[v];
    }
  } else {
    for (int64_t i = begin; i < end; i += kEntries) {
      int64_t index[kEntries];
      Pack<T, kVec> part[kEntries];
#pragma unroll
      for (int e = 0; e < kEntries; ++e) index[e] = i + e < end ? __ldg(args.order + i + e) : -1;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        part[e].clear();
        if (index[e] >= 0) part[e].load(grad + row_of(index[e], args.depth) * args.channels);
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) part[e].add_to(sum);
    }
  }
}

template <int kVec>
__device__ __forceinline__ void store_partial(float* to, const float (&sum)[kVec]) {
  if constexpr (kVec == 1) {
    *to = sum[0];
  } else {
#pragma unroll
    for (int v = 0; v < kVec; v += 4)
      *reinterpret_cast<float4*>(to + v) = make_float4(sum[v], sum[v + 1], sum[v + 2], sum[v + 3]);
  }
}

template <int kVec>
__device__ __forceinline__ void add_partial(const float* from, float (&sum)[kVec]) {
  if constexpr (kVec == 1) {
    sum[0] += *from;
  } else {
#pragma unroll
    for (int v = 0; v < kVec; v += 4) {
      const float4 part = *reinterpret_cast<const float4*>(from + v);
      sum[v] += part.x;
      sum[v + 1] += part.y;
      sum[v + 2] += part.z;
      sum[v + 3] += part.w;
    }
  }
}

// One row of threads per chunk: partial[chunk, 0] is the chunk's share of a segment that began before it,
// partial[chunk, 1] its share of one that begins in it and goes on after it. Parts that do not exist are not written,
// and not read later.
template <typename T, int kVec, bool kCumulative>
__global__ void __launch_bounds__(kThreads, kBlocks) residual_lookup_partial_kernel(const LookupBackwardArgs args) {
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t low = chunk << args.chunk_log2;
  if (low >= args.entries) return;
  const int64_t high = min(low + (int64_t(1) << args.chunk_log2), args.entries);
  const int32_t first = __ldg(args.keys + low), last = __ldg(args.keys + high - 1);
  const int64_t head_end = first < args.tables && __ldg(args.begins + first) < low
                               ? min(high, __ldg(args.begins + first + 1))
                               : low;
  int64_t tail_begin = high;
  if (last < args.tables && __ldg(args.begins + last + 1) > high) {
    const int64_t begin = __ldg(args.begins + last);
    if (begin >= low) tail_begin = begin;
  }
  for (int channel = threadIdx.x * kVec; channel < args.channels; channel += blockDim.x * kVec) {
    float* const partial = args.partial + chunk * 2 * args.channels + channel;
    if (head_end > low) {
      float sum[kVec] = {};
      add_entries<T, kVec, kCumulative>(args, low, head_end, channel, sum);
      store_partial(partial, sum);
    }
    if (tail_begin < high) {
      float sum[kVec] = {};
      add_entries<T, kVec, kCumulative>(args, tail_begin, high, channel, sum);
      store_partial(partial + args.channels, sum);
    }
  }
}

// One row of threads per codebook row: the sum of its entries, or of its parts in the order of the chunks.
template <typename T, int kVec, bool kCumulative>
__global__ void __launch_bounds__(kThreads, kBlocks) residual_lookup_backward_kernel(const LookupBackwardArgs args) {
  const int64_t entry = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (entry >= args.tables) return;
  const int64_t begin = __ldg(args.begins + entry), end = __ldg(args.begins + entry + 1);
  // Segments are cut at multiples of the chunk; an empty one lies in no chunk.
  const int64_t first = begin >> args.chunk_log2, last = end > begin ? (end - 1) >> args.chunk_log2 : first;
  for (int channel = threadIdx.x * kVec; channel < args.channels; channel += blockDim.x * kVec) {
    float sum[kVec] = {};
    if (first == last) {
      add_entries<T, kVec, kCumulative>(args, begin, end, channel, sum);
    } else {
      const float* const partial = args.partial + channel;
      add_partial(partial + (first * 2 + 1) * args.channels, sum);
#pragma unroll 4
      for (int64_t chunk = first + 1; chunk <= last; ++chunk) add_partial(partial + chunk * 2 * args.channels, sum);
    }
    Pack<T, kVec> rounded;
    rounded.set(sum);
    rounded.store_streaming(static_cast<T*>(args.out) + entry * args.channels + channel);
  }
}

// Blocks of about kThreads threads: as wide as a row has packs, in equal parts where that is more than kThreads.
dim3 block_of(int channels, int vec) {
  const int packs = (channels + vec - 1) / vec;
  const int passes = (packs + kThreads - 1) / kThreads;
  const int width = (packs + passes - 1) / passes;
  return dim3(width, std::max(1, kThreads / width));
}

// Blocks for so many rows; 0 where a grid cannot have that many.
unsigned grid_of(int64_t rows, int64_t rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return blocks <= INT32_MAX ? unsigned(blocks) : 0;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, int kVec>
cudaError_t lookup(const LookupArgs& args, bool cumulative, cudaStream_t stream) {
  const dim3 block = block_of(args.channels, kVec);
  const unsigned grid = grid_of(args.rows, int64_t(block.y) * kRows);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  if (cumulative) {
    residual_lookup_kernel<T, kVec, true><<<grid, block, 0, stream>>>(args);
  } else {
    residual_lookup_kernel<T, kVec, false><<<grid, block, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t lookup(const LookupArgs& args, bool cumulative, cudaStream_t stream) {
  constexpr int kVec = kPackOf<T>;
  const bool packed = args.channels % kVec == 0 && args.book_entry_bytes % 16 == 0 && args.book_level_bytes % 16 == 0 &&
                      aligned(args.codebook) && aligned(args.out);
  return packed ? lookup<T, kVec>(args, cumulative, stream) : lookup<T, 1>(args, cumulative, stream);
}

template <typename T, int kVec, bool kCumulative>
cudaError_t lookup_backward(const LookupBackwardArgs& args, cudaStream_t stream) {
  const dim3 block = block_of(args.channels, kVec);
  const int64_t chunks = (args.entries + (int64_t(1) << args.chunk_log2) - 1) >> args.chunk_log2;
  const unsigned cut = grid_of(chunks, block.y), whole = grid_of(args.tables, block.y);
  if ((chunks > 1 && cut == 0) || whole == 0) return cudaErrorInvalidConfiguration;
  if (chunks > 1) {
    residual_lookup_partial_kernel<T, kVec, kCumulative><<<cut, block, 0, stream>>>(args);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  residual_lookup_backward_kernel<T, kVec, kCumulative><<<whole, block, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t lookup_backward(const LookupBackwardArgs& args, bool cumulative, cudaStream_t stream) {
  constexpr int kVec = kPackOf<T>;
  const bool packed = args.channels % kVec == 0 && aligned(args.grad) && aligned(args.out) && aligned(args.partial);
  if (packed)
    return cumulative ? lookup_backward<T, kVec, true>(args, stream) : lookup_backward<T, kVec, false>(args, stream);
  return cumulative ? lookup_backward<T, 1, true>(args, stream) : lookup_backward<T, 1, false>(args, stream);
}

}  // namespace

cudaError_t launch_residual_lookup(const LookupArgs& args, DType dtype, bool cumulative, cudaStream_t stream) {
  if (args.rows == 0 || args.channels == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return lookup<float>(args, cumulative, stream);
    case DType::kBFloat16:
      return lookup<__nv_bfloat16>(args, cumulative, stream);
    case DType::kFloat16:
      return lookup<__half>(args, cumulative, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_residual_lookup_backward(const LookupBackwardArgs& args, DType dtype, bool cumulative,
                                            cudaStream_t stream) {
  if (args.tables == 0 || args.channels == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return lookup_backward<float>(args, cumulative, stream);
    case DType::kBFloat16:
      return lookup_backward<__nv_bfloat16>(args, cumulative, stream);
    case DType::kFloat16:
      return lookup_backward<__half>(args, cumulative, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace unifiedar
