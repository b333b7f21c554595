#include "codes_sm90.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "device/cluster.cuh"
#include "device/entries.cuh"

// One launch instead of eleven: at the sizes of a training step the sums take 5 to 20 us, and the launches of a sort,
// each waiting for the one before, took 40. A cluster owns a range of codebook rows and reads all codes, each of its blocks an eighth of
// them (all clusters together 16 times 8 bytes a code, from L2). The blocks count, exchange their counts through shared
// memory and put the entries of the range in order: that is all the sorting there is. Then they sum the range's rows,
// each block rows of an eighth of the cost. Blocks wait for others of their cluster only, twice.
namespace unifiedar {
namespace {

constexpr int kThreads = 640;  // 96 registers each, one block a multiprocessor
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kBlocks = 8;      // of a cluster: as many as every such GPU takes
constexpr int kScan = 8;             // codes that a thread has in flight
constexpr int kCounted = 2;          // neighbouring codebook rows whose counts a thread adds up at a time
constexpr int kSegments = 2;         // codebook rows whose gradient a thread works on at a time
constexpr int kShort = 8;            // entries of a row that shares a warp with others
constexpr int kMedium = 64;          // of one summed in packs of 16 bytes; longer ones in packs of 4, by more warps
constexpr int kEntryBits = 15;       // of a listed entry's number in its block; the row in the cluster is above
constexpr uint32_t kNone = ~0u;      // the key of an entry to be left out
constexpr uint32_t kWarp = ~0u;      // all lanes
constexpr int kMostEntries = 1 << 18;  // beyond, reading the codes once a cluster costs more than the sort's launches

struct ClusterArgs : Entries<uint32_t> {
  const int64_t* codes;
  uint32_t* order;  // `words`, to be written: [entries], by codebook row; those to be left out are absent
  float* partial;   // [chunks, 2, channels]
  void* out;
  float* counts;
  uint32_t entries, tables, num_codes, rows, span;
  int chunk_log2;
  int width;  // lanes of a warp that share a row: a power of two
  bool shared;
};

// A block's shared memory.
struct Memory {
  uint32_t* counts;  // [rows]: entries of each row among the block's own; the cluster's other blocks read it
  uint32_t* below;   // [1]: entries among the block's own that chose rows before the cluster's; read by the others too
  uint32_t* next;    // [rows]: place in the order of the block's next entry of a row
  uint32_t* begins;  // [rows + 1]: where each row's entries begin in the order; equal in all blocks of the cluster
  uint32_t* sums;    // [2, kWarps]
  uint32_t* list;    // [span]: the block's own entries of the cluster's rows, in their order

  __device__ __forceinline__ Memory(uint32_t* base, uint32_t rows)
      : counts(base),
        below(counts + rows),
        next(below + 1),
        begins(next + rows),
        sums(begins + rows + 1),
        list(sums + 2 * kWarps) {}
  static size_t bytes(size_t rows, size_t span) { return 4 * (3 * rows + 2 + 2 * kWarps + span); }
};

// What a block of a cluster works on.
struct Place {
  uint32_t rank;      // of the block in the cluster
  uint32_t low;       // first codebook row of the cluster
  uint32_t rows;      // number of them
  uint32_t thread, warp, lane;
  uint32_t earlier;   // the lanes before this one
};

// Calls use(entry, key) for every entry of the block, with whole warps: each has a run of neighbouring entries and takes
// them 32 at a time, in order. The key is kNone beyond the end.
template <typename Use>
__device__ __forceinline__ void for_own_entries(const ClusterArgs& args, const Place& place, Use use) {
  const uint32_t share = (args.span + kThreads - 1) / kThreads * 32;
  const uint32_t first = min(place.rank * args.span, args.entries), last = min(first + args.span, args.entries);
  const uint32_t begin = min(first + place.warp * share, last), end = min(begin + share, last);
  for (uint32_t at = begin; at < end; at += kScan * 32) {
    uint64_t code[kScan];
#pragma unroll
    for (int s = 0; s < kScan; ++s) {
      const uint32_t entry = at + s * 32 + place.lane;
      code[s] = entry < end ? __ldg(args.codes + entry) : -1;
    }
#pragma unroll
    for (int s = 0; s < kScan; ++s) {
      const uint32_t entry = at + s * 32 + place.lane;
      uint32_t key = code[s] < args.num_codes ? uint32_t(code[s]) : kNone;
      if (!args.shared && key != kNone) key += entry % args.depth * args.num_codes;
      use(entry, key);
    }
  }
}

__device__ __forceinline__ bool is_mine(uint32_t key, const Place& place) { return key - place.low < place.rows; }

// counts, below and list; returns how many entries are listed. Before the first wait for the cluster, which empties the
// nearest cache: the second look at the codes finds them there.
__device__ __forceinline__ uint32_t list_entries(const ClusterArgs& args, const Memory& memory, const Place& place) {
  for (uint32_t row = place.thread; row < place.rows; row += kThreads) memory.counts[row] = 0;
  if (place.thread == 0) *memory.below = 0;
  __syncthreads();
  uint32_t found = 0, below = 0;
  for_own_entries(args, place, [&](uint32_t, uint32_t key) {
    const bool mine = is_mine(key, place);
    found += __popc(__ballot_sync(kWarp, mine));
    below += key < place.low;
    if (mine) atomicAdd(memory.counts + (key - place.low), 1u);
  });
  below = __reduce_add_sync(kWarp, below);
  if (place.lane == 0) {
    memory.sums[place.warp] = found;
    atomicAdd(memory.below, below);
  }
  __syncthreads();
  const uint32_t all = place.lane < kWarps ? memory.sums[place.lane] : 0;
  uint32_t at = __reduce_add_sync(kWarp, place.lane < place.warp ? all : 0);
  for_own_entries(args, place, [&](uint32_t entry, uint32_t key) {
    const bool mine = is_mine(key, place);
    const uint32_t peers = __ballot_sync(kWarp, mine);
    if (mine)
      memory.list[at + __popc(peers & place.earlier)] =
          (key - place.low) << kEntryBits | (entry - place.rank * args.span);
    at += __popc(peers);
  });
  return __reduce_add_sync(kWarp, all);
}

// Chunks that a row's entries lie in, less one.
__device__ __forceinline__ uint32_t cuts(const ClusterArgs& args, uint32_t begin, uint32_t end) {
  return begin < end ? ((end - 1) >> args.chunk_log2) - (begin >> args.chunk_log2) : 0;
}
// Rows in more than two chunks are summed in parts by the whole cluster, other cut rows by one block, part by part.
__device__ __forceinline__ bool is_huge(const ClusterArgs& args, uint32_t begin, uint32_t end) {
  return cuts(args, begin, end) > 1;
}
__device__ __forceinline__ bool is_long(const ClusterArgs& args, uint32_t begin, uint32_t end) {
  return end - begin > kShort || cuts(args, begin, end) > 0;
}

// begins and next, from the counts of all blocks; returns whether a row of the cluster is huge.
__device__ __forceinline__ bool find_begins(const ClusterArgs& args, const Memory& memory, const Place& place) {
  uint32_t carry = 0;
  bool huge = false;
  uint32_t* sums = memory.sums;
  for (uint32_t base = 0; base < place.rows; base += kThreads * kCounted) {
    const uint32_t row = base + place.thread * kCounted;
    uint32_t total[kCounted] = {}, before[kCounted] = {}, below = 0;
#pragma unroll
    for (uint32_t b = 0; b < kBlocks; ++b) {
      const uint32_t* const counts = shared_of(memory.counts, b);
#pragma unroll
      for (int s = 0; s < kCounted; ++s) {
        const uint32_t count = row + s < place.rows ? counts[row + s] : 0;
        total[s] += count;
        if (b < place.rank) before[s] += count;
      }
      if (base == 0) below += *shared_of(memory.below, b);
    }
    carry += below;
    uint32_t own = 0;
#pragma unroll
    for (int s = 0; s < kCounted; ++s) own += total[s];
    uint32_t through = own;  // of the warp's rows up to this thread's
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kWarp, through, step);
      if (place.lane >= uint32_t(step)) through += other;
    }
    if (place.lane == 31) sums[place.warp] = through;
    __syncthreads();
    const uint32_t sum = place.lane < kWarps ? sums[place.lane] : 0;
    const uint32_t earlier = __reduce_add_sync(kWarp, place.lane < place.warp ? sum : 0);
    uint32_t begin = carry + earlier + through - own;
    carry += __reduce_add_sync(kWarp, sum);
    sums = sums == memory.sums ? memory.sums + kWarps : memory.sums;  // so that one barrier a turn will do
#pragma unroll
    for (int s = 0; s < kCounted; ++s) {
      if (row + s >= place.rows) break;
      memory.begins[row + s] = begin;
      memory.next[row + s] = begin + before[s];
      huge |= is_huge(args, begin, begin + total[s]);
      begin += total[s];
      if (row + s == place.rows - 1) memory.begins[place.rows] = begin;
    }
  }
  return __syncthreads_or(huge);
}

// Writes the block's entries where they belong in the order, a block of them at a time. Which entries of a warp are of
// one row all warps find out together (it takes hundreds of clocks); then they take places one after another, so that
// entries of a row keep their order.
template <bool kCumulative>
__device__ __forceinline__ void order_entries(const ClusterArgs& args, const Memory& memory, const Place& place,
                                              uint32_t listed) {
  for (uint32_t base = 0; base < listed; base += kThreads) {
    const bool present = base + place.thread < listed;
    const uint32_t item = present ? memory.list[base + place.thread] : kNone, row = item >> kEntryBits;
    const uint32_t peers = __match_any_sync(kWarp, row), warps = min((listed - base + 31) / 32, uint32_t(kWarps));
    uint32_t to = 0;
    for (uint32_t turn = 0; turn < warps; ++turn) {
      if (turn == place.warp) {
        if (present) to = memory.next[row] + __popc(peers & place.earlier);
        __syncwarp();
        if (present && (peers & place.earlier) == 0) memory.next[row] = to + __popc(peers);
      }
      __syncthreads();
    }
    if (present) {
      const uint32_t entry = place.rank * args.span + (item & ((1u << kEntryBits) - 1));
      args.order[to] = kCumulative ? entry : entry / args.depth;
    }
  }
}

// A block's rows: [first, last) of the cluster's.
struct Rows {
  uint32_t first, last;
};

// The rows with the block's share of the cluster's cost, an entry or a row a unit.
__device__ __forceinline__ Rows own_rows(const Memory& memory, const Place& place) {
  const uint32_t cost = memory.begins[place.rows] - memory.begins[0] + place.rows;
  uint32_t low[2] = {}, high[2] = {place.rows, place.rows};  // both searches at once, for their latency
  while (low[0] < high[0] || low[1] < high[1]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (low[s] == high[s]) continue;
      const uint32_t middle = (low[s] + high[s]) / 2;
      if (memory.begins[middle] - memory.begins[0] + middle < cost * (place.rank + s) / kBlocks)
        low[s] = middle + 1;
      else
        high[s] = middle;
    }
  }
  return {low[0], low[1]};
}

// The row whose entries `at` is among.
__device__ __forceinline__ uint32_t row_of_entry(const Memory& memory, uint32_t rows, uint32_t at) {
  uint32_t low = 0, high = rows;  // begins[low] <= at < begins[high]
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (memory.begins[middle] <= at)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The words that a block reads, and where among the order's they begin.
struct Words : Entries<uint32_t> {
  uint32_t base;
};

// Copies the words of the block's rows to its shared memory, where each wait for one is a tenth as long, if they fit.
// Only an uneven choice leaves a block more than it has listed room for.
__device__ __forceinline__ Words own_words(const ClusterArgs& args, const Memory& memory, const Place& place,
                                           const Rows& rows) {
  Words words{args, 0};
  const uint32_t base = memory.begins[rows.first], count = memory.begins[rows.last] - base;
  if (count > args.span) return words;
  for (uint32_t i = place.thread; i < count; i += kThreads) memory.list[i] = args.words[base + i];
  __syncthreads();
  words.words = memory.list;
  words.base = base;
  return words;
}

// add_entries for one long segment and a whole warp, whose lanes may lie beyond the channels: the more entries in
// flight, the fewer turns it takes.
template <typename T, int kVec, bool kCumulative>
__device__ __forceinline__ void add_long(const Entries<uint32_t>& args, uint32_t begin, uint32_t end, int channel,
                                         uint32_t lane, float (&sum)[kVec]) {
  constexpr int kFlight = kCumulative ? 16 / kVec : kVec * sizeof(T) == 16 ? 8 : 32;
  const T* const grad = static_cast<const T*>(args.grad) + channel;
  const bool inside = channel < args.channels;
  for (uint32_t i = begin; i < end; i += kFlight) {
    uint32_t word = lane < kFlight && i + lane < end ? args.words[i + lane] : 0;
    if (!kCumulative) word *= args.channels;
    Pack<T, kVec> part[kFlight];
    if constexpr (kCumulative) {
      float tail[kFlight][kVec] = {};
      for (int last = args.depth - 1; last >= 0; --last) {
#pragma unroll
        for (int e = 0; e < kFlight; ++e) {
          const uint32_t entry = __shfl_sync(kWarp, word, e), row = entry / args.depth;
          part[e].clear();
          if (inside && i + e < end && last >= int(entry - row * args.depth))
            part[e].load(grad + (int64_t(row) * args.depth + last) * args.channels);
        }
#pragma unroll
        for (int e = 0; e < kFlight; ++e) part[e].add_to(tail[e]);
      }
#pragma unroll
      for (int e = 0; e < kFlight; ++e) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[v] += tail[e][v];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kFlight; ++e) {
        const uint32_t at = __shfl_sync(kWarp, word, e) + channel;
        part[e].clear();
        if (inside && i + e < end) part[e].load(static_cast<const T*>(args.grad) + at);
      }
#pragma unroll
      for (int e = 0; e < kFlight; ++e) part[e].add_to(sum);
    }
  }
}

// Deals work in so many slices of the channels to the warps of the block in turn.
struct Turns {
  uint32_t slices, next;

  // The warp's first slice of the next work; its others are kWarps apart.
  __device__ __forceinline__ uint32_t deal() {
    const uint32_t mine = next;
    next = (next + kWarps - slices % kWarps) % kWarps;
    return mine;
  }
};

// Sums the parts of huge rows, chunk by chunk: partial[chunk, 0] of the row that began before it, partial[chunk, 1] of
// one that begins in it and goes on after it. The chunks are dealt to the blocks of the cluster in turn.
template <typename T, int kVec, bool kCumulative>
__device__ __forceinline__ void sum_parts(const ClusterArgs& args, const Memory& memory, const Place& place) {
  const uint32_t from = memory.begins[0], to = memory.begins[place.rows];
  const uint32_t slices = (args.channels + 32 * kVec - 1) / (32 * kVec);
  Turns turns{slices, place.warp};
  for (uint32_t chunk = (from >> args.chunk_log2) + place.rank; chunk << args.chunk_log2 < to; chunk += kBlocks) {
    const uint32_t low = chunk << args.chunk_log2, high = min((chunk + 1) << args.chunk_log2, args.entries);
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const uint32_t inside = which == 0 ? max(low, from) : min(high, to) - 1;
      const uint32_t row = row_of_entry(memory, place.rows, inside);
      const uint32_t begin = memory.begins[row], end = memory.begins[row + 1];
      const bool wanted = which == 0 ? begin < low : begin >= low && end > high;
      if (!wanted || !is_huge(args, begin, end)) continue;
      for (uint32_t slice = turns.deal(); slice < slices; slice += kWarps) {
        const int channel = (slice * 32 + place.lane) * kVec;
        float sum[kVec] = {};
        add_long<T, kVec, kCumulative>(args, max(begin, low), min(end, high), channel, place.lane, sum);
        if (channel < args.channels) {
          float* const partial = args.partial + (int64_t(chunk) * 2 + which) * args.channels + channel;
#pragma unroll
          for (int v = 0; v < kVec; ++v) partial[v] = sum[v];
        }
      }
    }
  }
}

// The long rows among the block's with at most `most` entries, and more than `least`.
template <typename T, typename Out, int kVec, bool kCumulative>
__device__ __forceinline__ void sum_long_rows(const ClusterArgs& args, const Words& words, const Memory& memory,
                                              const Place& place, const Rows& rows, uint32_t least, uint32_t most) {
  const uint32_t slices = (args.channels + 32 * kVec - 1) / (32 * kVec);
  Turns turns{slices, place.warp};
  for (uint32_t base = rows.first; base < rows.last; base += 32) {
    const uint32_t own = base + place.lane;  // beyond the last, beginning and end are equal
    const uint32_t own_begin = memory.begins[min(own, rows.last)], own_end = memory.begins[min(own + 1, rows.last)];
    const uint32_t count = own_end - own_begin;
    uint32_t left = __ballot_sync(kWarp, count > least && count <= most && is_long(args, own_begin, own_end));
    for (; left != 0; left &= left - 1) {
      const uint32_t row = base + __ffs(left) - 1;
      const uint32_t begin = memory.begins[row], end = memory.begins[row + 1];
      for (uint32_t slice = turns.deal(); slice < slices; slice += kWarps) {
        const int channel = (slice * 32 + place.lane) * kVec;
        float total[kVec] = {};
        if (is_huge(args, begin, end)) {
          if (channel < args.channels) {
            const uint32_t begun = begin >> args.chunk_log2;
#pragma unroll 8
            for (uint32_t chunk = begun; chunk <= (end - 1) >> args.chunk_log2; ++chunk) {
              const float* const partial =
                  args.partial + (int64_t(chunk) * 2 + (chunk == begun)) * args.channels + channel;
#pragma unroll
              for (int v = 0; v < kVec; ++v) total[v] += partial[v];
            }
          }
        } else {
          for (uint32_t from = begin; from < end;) {
            const uint32_t to = min(((from >> args.chunk_log2) + 1) << args.chunk_log2, end);
            float sum[kVec] = {};
            add_long<T, kVec, kCumulative>(words, from - words.base, to - words.base, channel, place.lane, sum);
#pragma unroll
            for (int v = 0; v < kVec; ++v) total[v] += sum[v];
            from = to;
          }
        }
        if (channel < args.channels) store_sum<Out>(args.out, int64_t(place.low + row) * args.channels + channel, total);
      }
    }
  }
}

// The other rows, kSegments neighbouring ones at a time, with as many lanes as a row has packs.
template <typename T, typename Out, int kVec, bool kCumulative>
__device__ __forceinline__ void sum_short_rows(const ClusterArgs& args, const Words& words, const Memory& memory,
                                               const Place& place, const Rows& rows) {
  const uint32_t first = rows.first, last = rows.last;
  const uint32_t width = args.width, slices = (args.channels + width * kVec - 1) / (width * kVec);
  const uint32_t items = (last - first + kSegments - 1) / kSegments * slices;
  const uint32_t group = place.thread / width, lane = place.thread - group * width;
  for (uint32_t item = group; item < items; item += kThreads / width) {
    const uint32_t pair = item / slices, row = first + pair * kSegments;
    const int channel = ((item - pair * slices) * width + lane) * kVec;
    if (channel >= args.channels) continue;
    int begin[kSegments], end[kSegments];
    bool wanted[kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      begin[s] = memory.begins[min(row + s, last)];
      end[s] = memory.begins[min(row + s + 1, last)];
      wanted[s] = row + s < last && !is_long(args, begin[s], end[s]);
      begin[s] -= words.base;
      end[s] = wanted[s] ? end[s] - words.base : begin[s];
    }
    float sum[kSegments][kVec] = {};
    add_entries<T, kVec, kCumulative, kSegments>(words, begin, end, channel, sum);
#pragma unroll
    for (int s = 0; s < kSegments; ++s)
      if (wanted[s]) store_sum<Out>(args.out, int64_t(place.low + row + s) * args.channels + channel, sum[s]);
  }
}

// Grid: clusters of kBlocks.
template <typename T, typename Out, int kVec, bool kCumulative>
__global__ void __launch_bounds__(kThreads, 1) residual_lookup_backward_cluster_kernel(const ClusterArgs args) {
  constexpr int kNarrow = kVec == 1 ? 1 : 4 / sizeof(T);
  Place place;
  place.rank = cluster_rank();
  place.low = blockIdx.x / kBlocks * args.rows;
  if (place.low >= args.tables) return;
  place.rows = min(args.rows, args.tables - place.low);
  place.thread = threadIdx.x;
  place.warp = threadIdx.x / 32;
  place.lane = threadIdx.x % 32;
  place.earlier = (1u << place.lane) - 1;
  const Memory memory(shared_memory(), args.rows);

  const uint32_t listed = list_entries(args, memory, place);
  cluster_sync();
  const bool huge = find_begins(args, memory, place);
  order_entries<kCumulative>(args, memory, place, listed);
  const Rows rows = own_rows(memory, place);
  // From here on nobody looks at another block's shared memory, so that a block may end before the others.
  cluster_sync();
  if (huge) {
    sum_parts<T, kNarrow, kCumulative>(args, memory, place);
    cluster_sync();
  }
  if (args.counts != nullptr) {
    for (uint32_t row = rows.first + place.thread; row < rows.last; row += kThreads)
      args.counts[place.low + row] = memory.begins[row + 1] - memory.begins[row];
  }
  const Words words = own_words(args, memory, place, rows);
  sum_long_rows<T, Out, kNarrow, kCumulative>(args, words, memory, place, rows, kMedium, ~0u);
  sum_long_rows<T, Out, kVec, kCumulative>(args, words, memory, place, rows, 0, kMedium);
  sum_short_rows<T, Out, kVec, kCumulative>(args, words, memory, place, rows);
}

template <typename T, typename Out, int kVec, bool kCumulative>
cudaError_t launch_clusters(const ClusterArgs& args, const ClusterPlan& plan, cudaStream_t stream) {
  const auto kernel = residual_lookup_backward_cluster_kernel<T, Out, kVec, kCumulative>;
  if (plan.shared_bytes > 48 << 10) {  // more has to be asked for
    if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
        error != cudaSuccess)
      return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.clusters * kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T, typename Out>
cudaError_t launch_clusters(ClusterArgs args, const ClusterPlan& plan, bool packed, bool cumulative,
                            cudaStream_t stream) {
  constexpr int kVec = kPackOf<T>;
  const int packs = packed ? args.channels / kVec : args.channels;
  args.width = 1;
  while (args.width < 32 && args.width < packs) args.width *= 2;
  if constexpr (std::is_same_v<T, Out>) {
    if (cumulative) {
      return packed ? launch_clusters<T, Out, kVec, true>(args, plan, stream)
                    : launch_clusters<T, Out, 1, true>(args, plan, stream);
    }
  }
  return packed ? launch_clusters<T, Out, kVec, false>(args, plan, stream)
                : launch_clusters<T, Out, 1, false>(args, plan, stream);
}

// Clusters that the device runs at the same time, one block a multiprocessor; 0 if it has none. How multiprocessors are
// grouped differs between GPUs of one kind, so the driver is asked: once a device.
cudaError_t clusters_of(int device, int* clusters) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // clusters + 1; 0 if not asked yet
  if (device < kDevices && known[device] != 0) {
    *clusters = known[device] - 1;
    return cudaSuccess;
  }
  *clusters = 0;
  int supported = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device);
      error != cudaSuccess)
    return error;
  if (supported) {
    int processors = 0;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        error != cudaSuccess)
      return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kBlocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(processors / kBlocks * kBlocks);
    config.blockDim = dim3(kThreads);
    config.attrs = &cluster;
    config.numAttrs = 1;
    const auto kernel = residual_lookup_backward_cluster_kernel<float, float, 4, false>;
    if (config.gridDim.x > 0) {
      if (const cudaError_t error =
              cudaOccupancyMaxActiveClusters(clusters, reinterpret_cast<const void*>(kernel), &config);
          error != cudaSuccess)
        return error;
    }
    *clusters = std::min<int>(*clusters, processors / kBlocks);
  }
  if (device < kDevices) known[device] = *clusters + 1;
  return cudaSuccess;
}

}  // namespace

cudaError_t plan_cluster(const LookupBackwardArgs& args, ClusterPlan* plan) {
  *plan = ClusterPlan{};
  const int64_t tables = tables_of(args);
  if (args.entries <= 0 || tables <= 0 || tables > INT32_MAX) return cudaErrorInvalidValue;
  if (args.entries > kMostEntries) return cudaSuccess;
  int device = 0, clusters = 0, shared = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = clusters_of(device, &clusters); error != cudaSuccess) return error;
  // add_long counts elements of the gradient in 32 bits.
  if (clusters == 0 || int64_t(args.entries) * args.channels > UINT32_MAX) return cudaSuccess;
  if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess)
    return error;
  const int64_t rows = (tables + clusters - 1) / clusters;
  plan->span = (args.entries + kBlocks - 1) / kBlocks;
  plan->shared_bytes = Memory::bytes(rows, plan->span);
  if (int64_t(plan->shared_bytes) > shared) return cudaSuccess;
  plan->rows = uint32_t(rows);
  plan->clusters = clusters;
  const auto aligned_up = [](size_t size) { return (size + 255) / 256 * 256; };
  const int64_t chunks = ((args.entries - 1) >> chunk_log2_of(args.entries)) + 1;
  plan->partial_at = aligned_up(args.entries * sizeof(uint32_t));
  plan->workspace_bytes = plan->partial_at + aligned_up(chunks * 2 * args.channels * sizeof(float));
  return cudaSuccess;
}

cudaError_t launch_cluster_backward(const LookupBackwardArgs& args, const ClusterPlan& plan, DType dtype, bool wide,
                                    bool cumulative, cudaStream_t stream) {
  if (plan.workspace_bytes > args.workspace_bytes) return cudaErrorInvalidValue;
  char* const workspace = static_cast<char*>(args.workspace);
  ClusterArgs cluster{};
  cluster.grad = args.grad;
  cluster.words = cluster.order = reinterpret_cast<uint32_t*>(workspace);
  cluster.depth = args.depth;
  cluster.channels = args.channels;
  cluster.codes = args.codes;
  cluster.partial = reinterpret_cast<float*>(workspace + plan.partial_at);
  cluster.out = args.out;
  cluster.counts = args.counts;
  cluster.entries = args.entries;
  cluster.tables = uint32_t(tables_of(args));
  cluster.num_codes = args.num_codes;
  cluster.rows = plan.rows;
  cluster.span = plan.span;
  cluster.chunk_log2 = chunk_log2_of(args.entries);
  cluster.shared = args.shared;
  switch (dtype) {
    case DType::kFloat32:
      return launch_clusters<float, float>(cluster, plan, packed_backward(args, 4), cumulative, stream);
    case DType::kBFloat16:
      return wide ? launch_clusters<__nv_bfloat16, float>(cluster, plan, packed_backward(args, 8), false, stream)
                  : launch_clusters<__nv_bfloat16, __nv_bfloat16>(cluster, plan, packed_backward(args, 8), cumulative,
                                                                  stream);
    case DType::kFloat16:
      return wide ? launch_clusters<__half, float>(cluster, plan, packed_backward(args, 8), false, stream)
                  : launch_clusters<__half, __half>(cluster, plan, packed_backward(args, 8), cumulative, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace unifiedar
