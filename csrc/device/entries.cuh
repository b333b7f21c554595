// Sums of gradient rows: of the entries (row, level) that chose one codebook row, in their order.
#pragma once

#include "pack.cuh"

namespace unifiedar {

constexpr int kEntries = 4;  // gradient rows of one codebook row that a thread has in flight

// An entry's word holds in its lower half what its gradient is found by: its row or, if cumulative, row * depth + level.
// The loads are not `__ldg`: one kernel writes the words that it reads.
template <typename Word>
struct Entries {
  const void* grad;  // [rows, channels], or [rows, depth, channels] if cumulative
  const Word* words;
  int depth, channels;
};

// Adds the gradients of the entries [begin, end) at one pack of channels, in that order, for kCount segments at a time:
// loads of all of them are in flight together.
template <typename T, int kVec, bool kCumulative, int kCount, typename Word>
__device__ __forceinline__ void add_entries(const Entries<Word>& args, const int (&begin)[kCount],
                                            const int (&end)[kCount], int channel, float (&sum)[kCount][kVec]) {
  const T* const grad = static_cast<const T*>(args.grad) + channel;
  if constexpr (kCumulative) {
    // A row chosen at a level is part of that running sum and of all later ones.
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      for (int i = begin[s]; i < end[s]; ++i) {
        const uint32_t entry = uint32_t(args.words[i]), row = entry / args.depth;
        const int level = entry - row * args.depth;
        float tail[kVec] = {};
        for (int last = args.depth - 1; last >= level; last -= kEntries) {
          Pack<T, kVec> part[kEntries];
#pragma unroll
          for (int e = 0; e < kEntries; ++e) {
            part[e].clear();
            if (last - e >= level) part[e].load(grad + (int64_t(row) * args.depth + last - e) * args.channels);
          }
#pragma unroll
          for (int e = 0; e < kEntries; ++e) part[e].add_to(tail);
        }
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[s][v] += tail[v];
      }
    }
  } else {
    int longest = 0;
#pragma unroll
    for (int s = 0; s < kCount; ++s) longest = max(longest, end[s] - begin[s]);
    for (int i = 0; i < longest; i += kEntries) {
      Pack<T, kVec> part[kCount][kEntries];
      uint32_t row[kCount][kEntries];
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e)
          row[s][e] = begin[s] + i + e < end[s] ? uint32_t(args.words[begin[s] + i + e]) : ~0u;
      }
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          part[s][e].clear();
          if (row[s][e] != ~0u) part[s][e].load(grad + int64_t(row[s][e]) * args.channels);
        }
      }
#pragma unroll
      for (int s = 0; s < kCount; ++s) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) part[s][e].add_to(sum[s]);
      }
    }
  }
}

// Rounds a pack of sums and stores it, in packs of at most 16 bytes.
template <typename Out, int kVec>
__device__ __forceinline__ void store_sum(void* out, int64_t at, const float (&sum)[kVec]) {
  constexpr int kPiece = kVec * sizeof(Out) <= 16 ? kVec : kPackOf<Out>;
#pragma unroll
  for (int v = 0; v < kVec; v += kPiece) {
    Pack<Out, kPiece> rounded;
    rounded.set(sum + v);
    rounded.store_streaming(static_cast<Out*>(out) + at + v);
  }
}

}  // namespace unifiedar
