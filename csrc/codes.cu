#include "codes.h"

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <type_traits>

#include "codes_sm90.h"
#include "device/early.cuh"
#include "device/entries.cuh"

namespace unifiedar {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;   // a multiprocessor; up to 80 registers a thread, which no kernel here exceeds or spills
constexpr int kLevels = 4;   // codebook rows of one output row that a thread has in flight
constexpr int kRows = 2;     // output rows that a thread works on at a time
constexpr int kSegments = 2;  // codebook rows whose gradient a thread works on at a time

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

// Grid: (blocks of rows, slices of channels). A block is blockDim.x packs wide and kRows * blockDim.y rows high; a thread
// owns every (gridDim.y * blockDim.x)-th pack of its rows. Lanes that share a row read the same code: one broadcast.
template <typename T, int kVec, bool kCumulative>
__global__ void __launch_bounds__(kThreads, kBlocks) residual_lookup_kernel(const LookupArgs args) {
  kernels_behind_begin();
  kernels_before_done();
  int64_t row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) row[r] = (int64_t(blockIdx.x) * kRows + r) * blockDim.y + threadIdx.y;
  if (row[0] >= args.rows) return;
  const int stride = gridDim.y * blockDim.x * kVec;
  for (int channel = (blockIdx.y * blockDim.x + threadIdx.x) * kVec; channel < args.channels; channel += stride) {
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

// An entry as it is sorted: above the codebook row that it chose (`tables` if none), which alone is compared; below what
// its gradient is found by: its row or, if cumulative, row * depth + level.
using Word = uint64_t;
__device__ __forceinline__ uint32_t key_of(Word word) { return uint32_t(word >> 32); }

struct Workspace {
  Word* words[2];    // [entries] each: unsorted and sorted, in this order or the other
  uint32_t* begins;  // [tables + 1]: where each codebook row's entries begin
  float* partial;    // [chunks, 2, channels]
  void* sort;
  size_t sort_bytes;
};

// What the kernels take; the words are ascending.
struct Sorted : Entries<Word> {
  const uint32_t* begins;
  float* partial;
  void* out;
  float* counts;
  int entries, tables, chunk_log2;
};

__global__ void __launch_bounds__(kThreads) mark_entries_kernel(const LookupBackwardArgs args, bool cumulative,
                                                                uint32_t tables, Word* words) {
  const uint32_t entry = blockIdx.x * kThreads + threadIdx.x;
  if (entry >= uint32_t(args.entries)) return;
  const uint32_t row = entry / args.depth, level = entry - row * args.depth;
  const uint64_t code = __ldg(args.codes + entry);
  const uint32_t first = args.shared ? 0 : level * args.num_codes;
  const uint32_t key = code < uint64_t(args.num_codes) ? first + uint32_t(code) : tables;
  words[entry] = Word(key) << 32 | (cumulative ? entry : row);
}

// begins[t] = number of entries with a key below t.
__global__ void __launch_bounds__(kThreads) find_begins_kernel(const Word* words, uint32_t entries, uint32_t tables,
                                                               uint32_t* begins) {
  const uint32_t table = blockIdx.x * kThreads + threadIdx.x;
  if (table > tables) return;
  uint32_t low = 0, high = entries;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (key_of(__ldg(words + middle)) < table)
      low = middle + 1;
    else
      high = middle;
  }
  begins[table] = low;
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
__global__ void __launch_bounds__(kThreads, kBlocks) residual_lookup_partial_kernel(const Sorted args) {
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (chunk << args.chunk_log2 >= args.entries) return;
  const int low = int(chunk << args.chunk_log2);
  const int high = int(min(int64_t(low) + (int64_t(1) << args.chunk_log2), int64_t(args.entries)));
  const uint32_t first = key_of(__ldg(args.words + low)), last = key_of(__ldg(args.words + high - 1));
  const uint32_t tables = args.tables;
  int begin[2] = {low, high}, end[2] = {low, high};  // of the head and of the tail
  if (first < tables && int(__ldg(args.begins + first)) < low) end[0] = min(high, int(__ldg(args.begins + first + 1)));
  if (last < tables && int(__ldg(args.begins + last + 1)) > high) {
    const int from = __ldg(args.begins + last);
    if (from >= low) begin[1] = from;
  }
  for (int channel = threadIdx.x * kVec; channel < args.channels; channel += blockDim.x * kVec) {
    float sum[2][kVec] = {};
    add_entries<T, kVec, kCumulative, 2>(args, begin, end, channel, sum);
    float* const partial = args.partial + chunk * 2 * args.channels + channel;
    if (begin[0] < end[0]) store_partial(partial, sum[0]);
    if (begin[1] < end[1]) store_partial(partial + args.channels, sum[1]);
  }
}

// One row of threads per kSegments neighbouring codebook rows: the sum of each one's entries, or of its parts in the
// order of the chunks.
template <typename T, typename Out, int kVec, bool kCumulative>
__global__ void __launch_bounds__(kThreads, kBlocks) residual_lookup_backward_kernel(const Sorted args) {
  const int64_t table = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kSegments;
  if (table >= args.tables) return;
  int begin[kSegments], end[kSegments], first[kSegments], last[kSegments];
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    begin[s] = __ldg(args.begins + min(table + s, int64_t(args.tables)));
    end[s] = __ldg(args.begins + min(table + s + 1, int64_t(args.tables)));
    if (args.counts != nullptr && threadIdx.x == 0 && table + s < args.tables) args.counts[table + s] = end[s] - begin[s];
    // Segments are cut at multiples of the chunk; an empty one lies in no chunk.
    first[s] = begin[s] >> args.chunk_log2;
    last[s] = end[s] > begin[s] ? (end[s] - 1) >> args.chunk_log2 : first[s];
    if (first[s] < last[s]) end[s] = begin[s];
  }
  for (int channel = threadIdx.x * kVec; channel < args.channels; channel += blockDim.x * kVec) {
    float sum[kSegments][kVec] = {};
    add_entries<T, kVec, kCumulative, kSegments>(args, begin, end, channel, sum);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (first[s] < last[s]) {
        const float* const partial = args.partial + channel;
        add_partial(partial + (int64_t(first[s]) * 2 + 1) * args.channels, sum[s]);
#pragma unroll 4
        for (int chunk = first[s] + 1; chunk <= last[s]; ++chunk)
          add_partial(partial + int64_t(chunk) * 2 * args.channels, sum[s]);
      }
      if (table + s < args.tables) store_sum<Out>(args.out, (table + s) * args.channels + channel, sum[s]);
    }
  }
}

// Blocks of about kThreads threads: as wide as a slice of a row has packs, in equal parts where that is more than
// kThreads.
dim3 block_of(int channels, int vec, int slices = 1) {
  const int packs = (channels + vec * slices - 1) / (vec * slices);
  const int passes = (packs + kThreads - 1) / kThreads;
  const int width = (packs + passes - 1) / passes;
  return dim3(width, std::max(1, kThreads / width));
}

// Blocks for so many rows; 0 where a grid cannot have that many.
unsigned grid_of(int64_t rows, int64_t rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return blocks <= INT32_MAX ? unsigned(blocks) : 0;
}

// Slices of the channels that the lookup works through one after the other. Rows that are read many times should be
// found in the L2 cache, of which a multiprocessor has only its half near (20 of 40 MB on an A100, 25 of 50 on an H100);
// outputs pass through it as well.
int slices_of(const LookupArgs& args, int element) {
  constexpr int64_t kNearBytes = 16 << 20, kLeastBytes = 256;
  const int64_t tables = args.book_level_bytes == 0 ? 1 : args.depth;
  const int64_t row = int64_t(args.channels) * element;
  if (args.rows * args.depth < 4 * tables * args.num_codes) return 1;
  const int64_t wanted = (tables * args.num_codes * row + kNearBytes - 1) / kNearBytes;
  return int(std::max<int64_t>(1, std::min(wanted, row / kLeastBytes)));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, int kVec>
cudaError_t lookup(const LookupArgs& args, bool cumulative, cudaStream_t stream) {
  const int slices = kVec > 1 ? slices_of(args, sizeof(T)) : 1;
  const dim3 block = block_of(args.channels, kVec, slices);
  const dim3 grid(grid_of(args.rows, int64_t(block.y) * kRows), slices);
  if (grid.x == 0) return cudaErrorInvalidConfiguration;
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      error != cudaSuccess)
    return error;
  cudaLaunchAttribute early = begins_early();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(
      &config, cumulative ? residual_lookup_kernel<T, kVec, true> : residual_lookup_kernel<T, kVec, false>, args);
}

template <typename T>
cudaError_t lookup(const LookupArgs& args, bool cumulative, cudaStream_t stream) {
  constexpr int kVec = kPackOf<T>;
  const bool packed = args.channels % kVec == 0 && args.book_entry_bytes % 16 == 0 && args.book_level_bytes % 16 == 0 &&
                      aligned(args.codebook) && aligned(args.out);
  return packed ? lookup<T, kVec>(args, cumulative, stream) : lookup<T, 1>(args, cumulative, stream);
}

int bits_of(uint32_t number) {
  int bits = 0;
  for (; number != 0; number >>= 1) ++bits;
  return bits;
}

// Sorts by the keys alone and keeps the order of equal ones: CUB's radix sort, in as many passes as the keys have bytes.
cudaError_t sort_words(Workspace& space, int entries, uint32_t tables, cudaStream_t stream) {
  cub::DoubleBuffer<Word> words(space.words[0], space.words[1]);
  const cudaError_t error = cub::DeviceRadixSort::SortKeys(space.sort, space.sort_bytes, words, entries, 32,
                                                           32 + bits_of(tables), stream);
  space.words[0] = words.Current();
  space.words[1] = words.Alternate();
  return error;
}

// Lays out the workspace from `base` on, which may be null, and returns its size.
cudaError_t lay_out(const LookupBackwardArgs& args, char* base, Workspace* space, size_t* bytes) {
  const int64_t tables = tables_of(args);
  if (args.entries <= 0 || tables <= 0 || tables > INT32_MAX) return cudaErrorInvalidValue;
  const int chunk_log2 = chunk_log2_of(args.entries);
  const int64_t chunks = ((args.entries - 1) >> chunk_log2) + 1;
  size_t used = 0;
  const auto take = [&](size_t size) {
    char* const at = base == nullptr ? nullptr : base + used;
    used += (size + 255) / 256 * 256;
    return at;
  };
  *space = Workspace{};
  // Asked without a workspace, CUB says what it needs.
  if (const cudaError_t error = sort_words(*space, args.entries, uint32_t(tables), nullptr); error != cudaSuccess)
    return error;
  for (Word*& words : space->words) words = reinterpret_cast<Word*>(take(args.entries * sizeof(Word)));
  space->begins = reinterpret_cast<uint32_t*>(take((tables + 1) * sizeof(uint32_t)));
  space->partial = reinterpret_cast<float*>(take(chunks * 2 * args.channels * sizeof(float)));
  space->sort = take(space->sort_bytes);
  *bytes = used;
  return cudaSuccess;
}

template <typename T, typename Out, int kVec, bool kCumulative>
cudaError_t sum_segments(const Sorted& args, cudaStream_t stream) {
  const dim3 block = block_of(args.channels, kVec);
  const int chunks = ((args.entries - 1) >> args.chunk_log2) + 1;
  if (chunks > 1) {
    const unsigned grid = grid_of(chunks, block.y);
    residual_lookup_partial_kernel<T, kVec, kCumulative><<<grid, block, 0, stream>>>(args);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  const unsigned grid = grid_of(args.tables, int64_t(block.y) * kSegments);
  residual_lookup_backward_kernel<T, Out, kVec, kCumulative><<<grid, block, 0, stream>>>(args);
  return cudaGetLastError();
}

// The backward with CUB's sort, for what a cluster cannot sort.
template <typename T, typename Out>
cudaError_t sorted_backward(const LookupBackwardArgs& args, bool cumulative, cudaStream_t stream) {
  Workspace space;
  size_t bytes = 0;
  if (const cudaError_t error = lay_out(args, static_cast<char*>(args.workspace), &space, &bytes); error != cudaSuccess)
    return error;
  if (bytes > args.workspace_bytes) return cudaErrorInvalidValue;
  const uint32_t tables = uint32_t(tables_of(args));
  const unsigned marked = grid_of(args.entries, kThreads), found = grid_of(int64_t(tables) + 1, kThreads);
  mark_entries_kernel<<<marked, kThreads, 0, stream>>>(args, cumulative, tables, space.words[0]);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (const cudaError_t error = sort_words(space, args.entries, tables, stream); error != cudaSuccess) return error;
  find_begins_kernel<<<found, kThreads, 0, stream>>>(space.words[0], args.entries, tables, space.begins);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;

  const Sorted sorted{{args.grad, space.words[0], args.depth, args.channels},
                      space.begins,
                      space.partial,
                      args.out,
                      args.counts,
                      args.entries,
                      int(tables),
                      chunk_log2_of(args.entries)};
  constexpr int kVec = kPackOf<T>;
  const bool packed = packed_backward(args, kVec);
  if constexpr (std::is_same_v<T, Out>) {
    if (cumulative) {
      return packed ? sum_segments<T, Out, kVec, true>(sorted, stream) : sum_segments<T, Out, 1, true>(sorted, stream);
    }
  }
  return packed ? sum_segments<T, Out, kVec, false>(sorted, stream) : sum_segments<T, Out, 1, false>(sorted, stream);
}

template <typename T, typename Out>
cudaError_t lookup_backward(const LookupBackwardArgs& args, DType dtype, bool cumulative, cudaStream_t stream) {
  ClusterPlan plan;
  if (const cudaError_t error = plan_cluster(args, &plan); error != cudaSuccess) return error;
  if (plan.clusters == 0) return sorted_backward<T, Out>(args, cumulative, stream);
  return launch_cluster_backward(args, plan, dtype, !std::is_same_v<T, Out>, cumulative, stream);
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
  if (args.channels == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return lookup_backward<float, float>(args, dtype, cumulative, stream);
    case DType::kBFloat16:
      return lookup_backward<__nv_bfloat16, __nv_bfloat16>(args, dtype, cumulative, stream);
    case DType::kFloat16:
      return lookup_backward<__half, __half>(args, dtype, cumulative, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_code_statistics(const LookupBackwardArgs& args, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return lookup_backward<float, float>(args, dtype, false, stream);
    case DType::kBFloat16:
      return lookup_backward<__nv_bfloat16, float>(args, dtype, false, stream);
    case DType::kFloat16:
      return lookup_backward<__half, float>(args, dtype, false, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t workspace_residual_lookup_backward(const LookupBackwardArgs& args, size_t* bytes) {
  ClusterPlan plan;
  if (const cudaError_t error = plan_cluster(args, &plan); error != cudaSuccess) return error;
  *bytes = plan.workspace_bytes;
  if (plan.clusters > 0) return cudaSuccess;
  Workspace space;
  return lay_out(args, nullptr, &space, bytes);
}

}  // namespace unifiedar
