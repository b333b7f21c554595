#include "codes_sm90.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "device/cluster.cuh"
#include "device/early.cuh"
#include "device/entries.cuh"

// One launch instead of eleven: at the sizes of a training step the sums take 5 to 20 us, and the launches of a sort,
// each waiting for the one before, took 40. A cluster owns a range of codebook rows and reads all codes, each of its
// blocks an eighth of them (all clusters together 16 times 8 bytes a code, from L2). A block lists the range's entries
// among its own and counts them; then the blocks look at each other's counts and lists through shared memory, and each
// takes rows of an eighth of the cost: it gathers their entries in whatever order, puts each row's in order by counting
// which come before, and sums them. Blocks wait for others of their cluster only, and once, unless a row has so many
// entries that the whole cluster orders and sums it.
namespace unifiedar {
namespace {

constexpr int kThreads = 640;  // 96 registers each, one block a multiprocessor
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kBlocks = 8;      // of a cluster: as many as every such GPU takes
constexpr int kScan = 8;             // codes that a thread has in flight
constexpr int kGathered = 4;         // listed entries that a thread has in flight
constexpr int kCounted = 4;          // neighbouring codebook rows whose counts a thread adds up at a time
constexpr int kSegments = 2;         // codebook rows whose gradient a thread works on at a time
constexpr int kShort = 32;           // entries of a row that shares a warp with others
constexpr int kMedium = 64;          // of one summed in packs of 16 bytes; longer ones in packs of 4, by more warps
constexpr int kEntryBits = 18;       // of a listed entry's number; the row in the cluster is above
constexpr uint32_t kNone = ~0u;      // the key of an entry to be left out, or no listed entry
constexpr uint32_t kWarp = ~0u;      // all lanes
constexpr int kMostEntries = 1 << kEntryBits;  // beyond, reading the codes once a cluster costs more than sorting
constexpr uint32_t kMostRows = kNone >> kEntryBits;  // of a cluster
constexpr uint32_t kLine = 128;      // bytes of a line of the L2 cache
constexpr uint32_t kAhead = 16 << 20;  // bytes of the gradient that are fetched while the entries are put in order

static_assert(kMostEntries / kBlocks < 1 << 16, "a block counts in 16 bits");

struct ClusterArgs : Entries<uint32_t> {
  const int64_t* codes;
  uint32_t* order;  // `words`, to be written: [entries], by codebook row; those to be left out are absent
  uint32_t* items;  // [entries]: for blocks whose rows have more entries than there is room for
  float* partial;   // [chunks, 2, channels]
  void* out;
  float* counts;
  uint32_t entries, tables, num_codes, rows, span, room;
  uint32_t lines, fetched;  // of the gradient, to be fetched ahead: in all, and by each block
  int chunk_log2;
  int width;  // lanes of a warp that share a row: a power of two
  bool shared;
};

// A block's shared memory. Words that other blocks of the cluster read come first.
struct Memory {
  uint32_t* counts;  // [count_words]: entries of each row among the block's own, 16 bits each
  uint32_t* below;   // [1]: entries among the block's own that chose rows before the cluster's
  uint32_t* listed;  // [1]: length of the list
  uint32_t* list;    // [span]: the block's own entries of the cluster's rows, in their order
  uint32_t* limits;  // [2]: the block's rows
  uint32_t* sums;    // [2, kWarps]
  uint32_t* begins;  // [rows + 1]: where each row's entries begin in the order; equal in all blocks of the cluster
  uint32_t* next;    // [rows]: place in the order of the next entry of one of the block's rows that is gathered
  uint32_t* items;   // [room]: the entries of the block's rows, by row, as they are gathered
  uint32_t* words;   // [room]: their words, in order

  __device__ __forceinline__ explicit Memory(const ClusterArgs& args)
      : counts(shared_memory()),
        below(counts + count_words(args.rows)),
        listed(below + 1),
        list(listed + 1),
        limits(list + args.span),
        sums(limits + 2),
        begins(sums + 2 * kWarps),
        next(begins + args.rows + 1),
        items(next + args.rows),
        words(items + args.room) {}
  __host__ __device__ static constexpr size_t count_words(size_t rows) {
    return (rows + kCounted - 1) / kCounted * (kCounted / 2);
  }
  static size_t bytes(size_t rows, size_t span, size_t room) {
    return 4 * (count_words(rows) + 2 * rows + 5 + 2 * kWarps + span + 2 * room);
  }
};

// What a block of a cluster works on.
struct Place {
  uint32_t rank;      // of the block in the cluster
  uint32_t low;       // first codebook row of the cluster
  uint32_t rows;      // number of them
  uint32_t thread, warp, lane;
  uint32_t earlier;   // the lanes before this one
};

// A line into the L2 cache.
__device__ __forceinline__ void fetch_line(const char* line) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
}

// The block's share of the gradient, of which every row is read soon, into the L2 cache.
__device__ __forceinline__ void fetch_gradient(const ClusterArgs& args, const Place& place) {
  const uint32_t first = blockIdx.x * args.fetched, last = min(first + args.fetched, args.lines);
  for (uint32_t line = first + place.thread; line < last; line += kThreads)
    fetch_line(static_cast<const char*>(args.grad) + line * kLine);
}

// kScan * 32 neighbouring codes; -1 from `end` on.
__device__ __forceinline__ void load_codes(const ClusterArgs& args, const Place& place, uint32_t begin, uint32_t end,
                                           uint64_t (&code)[kScan]) {
#pragma unroll
  for (int s = 0; s < kScan; ++s) {
    const uint32_t entry = begin + s * 32 + place.lane;
    code[s] = entry < end ? __ldg(args.codes + entry) : -1;
  }
}

// The keys of those entries.
__device__ __forceinline__ void find_keys(const ClusterArgs& args, const Place& place, uint32_t begin,
                                          const uint64_t (&code)[kScan], uint32_t (&key)[kScan]) {
#pragma unroll
  for (int s = 0; s < kScan; ++s) {
    key[s] = code[s] < args.num_codes ? uint32_t(code[s]) : kNone;
    if (!args.shared && key[s] != kNone) key[s] += (begin + s * 32 + place.lane) % args.depth * args.num_codes;
  }
}

__device__ __forceinline__ bool is_mine(uint32_t key, const Place& place) { return key - place.low < place.rows; }

// counts, below and list; returns how many entries are listed. Each warp has a run of neighbouring entries. Up to
// kScan * 32 of them stay in registers between counting and listing; longer runs are read twice, from the nearest cache.
__device__ __forceinline__ uint32_t list_entries(const ClusterArgs& args, const Memory& memory, const Place& place) {
  constexpr uint32_t kStep = kScan * 32;
  const uint32_t share = (args.span + kThreads - 1) / kThreads * 32;
  const uint32_t first = min(place.rank * args.span, args.entries), last = min(first + args.span, args.entries);
  const uint32_t begin = min(first + place.warp * share, last), end = min(begin + share, last);
  uint64_t code[kScan];
  uint32_t key[kScan];
  load_codes(args, place, begin, end, code);
  fetch_gradient(args, place);
  for (uint32_t i = place.thread; i < Memory::count_words(place.rows); i += kThreads) memory.counts[i] = 0;
  __syncthreads();
  uint32_t found = 0, below = 0;
  for (uint32_t at = begin; at < end; at += kStep) {
    if (at != begin) load_codes(args, place, at, end, code);
    find_keys(args, place, at, code, key);
#pragma unroll
    for (int s = 0; s < kScan; ++s) {
      const bool mine = is_mine(key[s], place);
      const uint32_t row = key[s] - place.low;
      found += __popc(__ballot_sync(kWarp, mine));
      below += key[s] < place.low;
      if (mine) atomicAdd(memory.counts + row / 2, 1u << row % 2 * 16);
    }
  }
  below = __reduce_add_sync(kWarp, below);
  if (place.lane == 0) {
    memory.sums[place.warp] = found;
    memory.sums[kWarps + place.warp] = below;
  }
  __syncthreads();
  const uint32_t of_warp = place.lane < kWarps ? memory.sums[place.lane] : 0;
  const uint32_t listed = __reduce_add_sync(kWarp, of_warp);
  uint32_t to = __reduce_add_sync(kWarp, place.lane < place.warp ? of_warp : 0);
  if (place.warp == 0) {
    below = __reduce_add_sync(kWarp, place.lane < kWarps ? memory.sums[kWarps + place.lane] : 0);
    if (place.lane == 0) {
      *memory.below = below;
      *memory.listed = listed;
    }
  }
  for (uint32_t at = begin; at < end; at += kStep) {
    if (share > kStep) {
      load_codes(args, place, at, end, code);
      find_keys(args, place, at, code, key);
    }
#pragma unroll
    for (int s = 0; s < kScan; ++s) {
      const bool mine = is_mine(key[s], place);
      const uint32_t peers = __ballot_sync(kWarp, mine);
      if (mine)
        memory.list[to + __popc(peers & place.earlier)] =
            (key[s] - place.low) << kEntryBits | (at + s * 32 + place.lane);
      to += __popc(peers);
    }
  }
  return listed;
}

// The lists of the cluster's blocks, one behind the other, and how many entries chose rows before the cluster's.
struct Lists {
  uint32_t begins[kBlocks + 1];
  uint32_t below;
};

__device__ __forceinline__ Lists find_lists(const Memory& memory, const Place& place) {
  const uint32_t listed = place.lane < kBlocks ? *shared_of(memory.listed, place.lane) : 0;
  const uint32_t below = place.lane < kBlocks ? *shared_of(memory.below, place.lane) : 0;
  Lists lists;
  lists.below = __reduce_add_sync(kWarp, below);
  lists.begins[0] = 0;
#pragma unroll
  for (uint32_t b = 0; b < kBlocks; ++b) lists.begins[b + 1] = lists.begins[b] + __shfl_sync(kWarp, listed, b);
  return lists;
}

// The thread's of kThreads * kGathered neighbouring entries of the lists; kNone behind their end.
__device__ __forceinline__ void load_items(const Memory& memory, const Place& place, const Lists& lists, uint32_t begin,
                                           uint32_t (&item)[kGathered]) {
#pragma unroll
  for (int s = 0; s < kGathered; ++s) {
    const uint32_t at = begin + s * kThreads + place.thread;
    uint32_t block = 0, before = 0;
#pragma unroll
    for (uint32_t b = 1; b < kBlocks; ++b) {
      if (at < lists.begins[b]) continue;
      block = b;
      before = lists.begins[b];
    }
    item[s] = at < lists.begins[kBlocks] ? shared_of(memory.list, block)[at - before] : kNone;
  }
}

// Chunks that a row's entries lie in, less one.
__device__ __forceinline__ uint32_t cuts(const ClusterArgs& args, uint32_t begin, uint32_t end) {
  return begin < end ? ((end - 1) >> args.chunk_log2) - (begin >> args.chunk_log2) : 0;
}
// Rows in more than two chunks are put in order and summed in parts by the whole cluster, other rows by one block, cut
// ones part by part.
__device__ __forceinline__ bool is_huge(const ClusterArgs& args, uint32_t begin, uint32_t end) {
  return cuts(args, begin, end) > 1;
}
__device__ __forceinline__ bool is_long(const ClusterArgs& args, uint32_t begin, uint32_t end) {
  return end - begin > kShort || cuts(args, begin, end) > 0;
}

// begins and next, from the counts of all blocks; returns whether a row of the cluster is huge.
__device__ __forceinline__ bool find_begins(const ClusterArgs& args, const Memory& memory, const Place& place,
                                            uint32_t below) {
  uint32_t carry = below;
  bool huge = false;
  uint32_t* sums = memory.sums;
  for (uint32_t base = 0; base < place.rows; base += kThreads * kCounted) {
    const uint32_t row = base + place.thread * kCounted;
    uint32_t count[kCounted] = {}, own = 0;
    if (row < place.rows) {
#pragma unroll
      for (uint32_t b = 0; b < kBlocks; ++b) {
        // Each block begins with its own, so that not all read the same one's at a time.
        const uint32_t* const counts = shared_of(memory.counts, (place.rank + b) % kBlocks);
        const uint2 packed = *reinterpret_cast<const uint2*>(counts + row / 2);
        count[0] += packed.x & 0xffff;
        count[1] += packed.x >> 16;
        count[2] += packed.y & 0xffff;
        count[3] += packed.y >> 16;
      }
    }
#pragma unroll
    for (int s = 0; s < kCounted; ++s) own += count[s];
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
      memory.begins[row + s] = memory.next[row + s] = begin;
      huge |= is_huge(args, begin, begin + count[s]);
      begin += count[s];
      if (row + s == place.rows - 1) memory.begins[place.rows] = begin;
    }
  }
  return __syncthreads_or(huge);
}

// A block's rows: [first, last) of the cluster's.
struct Rows {
  uint32_t first, last;
};

// The rows with the block's share of the cluster's cost, an entry or a row a unit: from the first one before which lies
// the share of the blocks before.
__device__ __forceinline__ Rows own_rows(const Memory& memory, const Place& place) {
  const uint32_t from = memory.begins[0], cost = memory.begins[place.rows] - from + place.rows;
  const uint32_t shares[2] = {cost * place.rank / kBlocks, cost * (place.rank + 1) / kBlocks};
  for (uint32_t row = place.thread; row <= place.rows; row += kThreads) {
    const uint32_t before = memory.begins[row] - from + row;
    const uint32_t less = row == 0 ? 0 : memory.begins[row - 1] - from + row - 1;
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (shares[s] <= before && (row == 0 || less < shares[s])) memory.limits[s] = row;
  }
  __syncthreads();
  return {memory.limits[0], memory.limits[1]};
}

template <bool kCumulative>
__device__ __forceinline__ uint32_t word_of(const ClusterArgs& args, uint32_t item) {
  const uint32_t entry = item & ((1u << kEntryBits) - 1);
  return kCumulative ? entry : entry / args.depth;
}

// Writes the block's own entries of huge rows where they belong in the order.
template <bool kCumulative>
__device__ __forceinline__ void order_huge(const ClusterArgs& args, const Memory& memory, const Place& place,
                                           uint32_t listed) {
  const uint32_t share = (listed + kThreads - 1) / kThreads * 32;
  const uint32_t first = min(place.warp * share, listed), last = min(first + share, listed);
  uint32_t* sums = memory.sums;
  for (uint32_t base = 0; base < place.rows; base += 32) {
    const uint32_t own = min(base + place.lane, place.rows - 1);
    const bool mine = base + place.lane < place.rows && is_huge(args, memory.begins[own], memory.begins[own + 1]);
    for (uint32_t left = __ballot_sync(kWarp, mine); left != 0; left &= left - 1) {
      const uint32_t row = base + __ffs(left) - 1;
      uint32_t found = 0;
      for (uint32_t at = first; at < last; at += 32) {
        const uint32_t item = at + place.lane < last ? memory.list[at + place.lane] : kNone;
        found += __popc(__ballot_sync(kWarp, item >> kEntryBits == row));
      }
      if (place.lane == 0) sums[place.warp] = found;
      uint32_t before = place.lane < place.rank ? shared_of(memory.counts, place.lane)[row / 2] : 0;
      before = __reduce_add_sync(kWarp, before >> row % 2 * 16 & 0xffff);
      __syncthreads();
      uint32_t to = memory.begins[row] + before;
      to += __reduce_add_sync(kWarp, place.lane < place.warp ? sums[place.lane] : 0);
      sums = sums == memory.sums ? memory.sums + kWarps : memory.sums;
      for (uint32_t at = first; at < last; at += 32) {
        const uint32_t item = at + place.lane < last ? memory.list[at + place.lane] : kNone;
        const uint32_t peers = __ballot_sync(kWarp, item >> kEntryBits == row);
        if (item >> kEntryBits == row) args.order[to + __popc(peers & place.earlier)] = word_of<kCumulative>(args, item);
        to += __popc(peers);
      }
    }
  }
}

// The words that a block reads, where among the order's they begin, and whether a row among them is long.
struct Words : Entries<uint32_t> {
  uint32_t base;
  bool any_long;
};

// Gathers the entries of the block's rows, but for huge ones, and puts each row's in order; `item` holds the first that
// the thread looks at. A row has at most two chunks of entries, so that counting which of them come before one takes less
// than summing them. They stay in shared memory, unless an uneven choice leaves the block more than it has room for.
template <bool kCumulative>
__device__ __forceinline__ Words sort_entries(const ClusterArgs& args, const Memory& memory, const Place& place,
                                              const Rows& rows, const Lists& lists, uint32_t (&item)[kGathered],
                                              bool huge) {
  const uint32_t base = memory.begins[rows.first], count = memory.begins[rows.last] - base;
  const bool fits = count <= args.room;
  uint32_t* const items = fits ? memory.items : args.items + base;
  uint32_t* const words = fits ? memory.words : args.order + base;
  if (huge) {
    for (uint32_t i = place.thread; i < count; i += kThreads) items[i] = kNone;
    __syncthreads();
  }
  for (uint32_t begin = 0;;) {
#pragma unroll
    for (int s = 0; s < kGathered; ++s) {
      const uint32_t row = item[s] >> kEntryBits;  // kNone's is no row
      if (row - rows.first >= rows.last - rows.first) continue;
      if (huge && is_huge(args, memory.begins[row], memory.begins[row + 1])) continue;
      items[atomicAdd(memory.next + row, 1u) - base] = item[s];
    }
    begin += kThreads * kGathered;
    if (begin >= lists.begins[kBlocks]) break;
    load_items(memory, place, lists, begin, item);
  }
  __syncthreads();
  bool any_long = huge;
  for (uint32_t i = place.thread; i < count; i += kThreads) {
    const uint32_t own = items[i], row = own >> kEntryBits;
    if (own == kNone) continue;
    const uint32_t begin = memory.begins[row], end = memory.begins[row + 1];
    any_long |= is_long(args, begin, end);
    uint32_t to = begin - base;
#pragma unroll 4
    for (uint32_t other = begin - base; other < end - base; ++other) to += items[other] < own;
    words[to] = word_of<kCumulative>(args, own);
  }
  Words found{args, base, __syncthreads_or(any_long) != 0};
  found.words = words;
  return found;
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
  kernels_behind_begin();
  kernels_before_done();
  Place place;
  place.rank = cluster_rank();
  place.low = blockIdx.x / kBlocks * args.rows;
  if (place.low >= args.tables) return;
  place.rows = min(args.rows, args.tables - place.low);
  place.thread = threadIdx.x;
  place.warp = threadIdx.x / 32;
  place.lane = threadIdx.x % 32;
  place.earlier = (1u << place.lane) - 1;
  const Memory memory(args);

  const uint32_t listed = list_entries(args, memory, place);
  cluster_arrive();
  cluster_wait();
  const Lists lists = find_lists(memory, place);
  uint32_t item[kGathered];
  load_items(memory, place, lists, 0, item);  // on their way while the counts are added up
  const bool huge = find_begins(args, memory, place, lists.below);
  const Rows rows = own_rows(memory, place);
  if (huge) order_huge<kCumulative>(args, memory, place, listed);
  const Words words = sort_entries<kCumulative>(args, memory, place, rows, lists, item, huge);
  // From here on nobody looks at another block's shared memory; a block may end when no other does any more.
  if (huge) {
    cluster_sync();
    sum_parts<T, kNarrow, kCumulative>(args, memory, place);
    cluster_sync();
  } else {
    cluster_arrive();
  }
  if (args.counts != nullptr) {
    for (uint32_t row = rows.first + place.thread; row < rows.last; row += kThreads)
      args.counts[place.low + row] = memory.begins[row + 1] - memory.begins[row];
  }
  if (words.any_long) {
    sum_long_rows<T, Out, kNarrow, kCumulative>(args, words, memory, place, rows, kMedium, ~0u);
    sum_long_rows<T, Out, kVec, kCumulative>(args, words, memory, place, rows, 0, kMedium);
  }
  sum_short_rows<T, Out, kVec, kCumulative>(args, words, memory, place, rows);
  if (!huge) cluster_wait();
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
  cudaLaunchAttribute attributes[2] = {{}, begins_early()};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.clusters * kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T, typename Out>
cudaError_t launch_clusters(ClusterArgs args, const ClusterPlan& plan, bool packed, bool cumulative,
                            cudaStream_t stream) {
  constexpr int kVec = kPackOf<T>;
  const int64_t bytes = int64_t(cumulative ? args.entries : args.entries / args.depth) * args.channels * sizeof(T);
  args.lines = uint32_t((std::min<int64_t>(bytes, kAhead) + kLine - 1) / kLine);
  args.fetched = (args.lines + plan.clusters * kBlocks - 1) / (plan.clusters * kBlocks);
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
  // Four times what even choices leave a block.
  plan->room = std::min<uint32_t>(args.entries, plan->span / 4 + 256);
  plan->shared_bytes = Memory::bytes(rows, plan->span, plan->room);
  if (rows > int64_t(kMostRows) || int64_t(plan->shared_bytes) > shared) return cudaSuccess;
  plan->rows = uint32_t(rows);
  plan->clusters = clusters;
  const auto aligned_up = [](size_t size) { return (size + 255) / 256 * 256; };
  const int64_t chunks = ((args.entries - 1) >> chunk_log2_of(args.entries)) + 1;
  plan->items_at = aligned_up(args.entries * sizeof(uint32_t));
  plan->partial_at = 2 * plan->items_at;
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
  cluster.items = reinterpret_cast<uint32_t*>(workspace + plan.items_at);
  cluster.partial = reinterpret_cast<float*>(workspace + plan.partial_at);
  cluster.out = args.out;
  cluster.counts = args.counts;
  cluster.entries = args.entries;
  cluster.tables = uint32_t(tables_of(args));
  cluster.num_codes = args.num_codes;
  cluster.rows = plan.rows;
  cluster.span = plan.span;
  cluster.room = plan.room;
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
