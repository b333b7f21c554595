// Drawing a code from a row of scores: guidance and temperature are in them; top-k, softmax, top-p and the race here.
//
// What is decided is decided by the numbers of unifiedar/ops/sample.py: scores as integers of their order, weights rounded
// to float32, sums of integers. How the entries at a cut are found does not change which they are. Here by bins that are
// linear in the score, as scores lie: the one with the cut in it has few entries, and those are compared with each other.
// Scores that lie otherwise (most of them equal, or too many kept) are cut by the digits of their integers.
//
// A draw runs once a depth: its instructions come from far away, and more of them cost more than loops do.
#pragma once

#include <cstdint>

#include "device/score.cuh"

namespace unifiedar {

constexpr int kBins = 2048;
constexpr int kListed = 2048;  // entries that a list holds
constexpr int kNearest = 512;  // of them those in the bin of a cut
constexpr int kListAt = kBins * 8, kWeightsAt = kListAt + kListed * 8, kNearAt = kWeightsAt + kListed * 4;
constexpr int kMiscAt = kNearAt + kNearest * 4, kKeysAt = kMiscAt + 1024;

// Small numbers that threads of a block tell each other.
struct Misc {
  Word warps[kWarps];
  Word above;
  int bin, near, listed;
};

__device__ __forceinline__ Word block_max(Misc& misc, Word value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = max(value, __shfl_xor_sync(~0u, value, step));
  block_wait();
  if (threadIdx.x % 32 == 0) misc.warps[threadIdx.x / 32] = value;
  block_wait();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value = max(value, misc.warps[w]);
  return value;
}

__device__ __forceinline__ Word block_sum(Misc& misc, Word value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  block_wait();
  if (threadIdx.x % 32 == 0) misc.warps[threadIdx.x / 32] = value;
  block_wait();
  value = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value += misc.warps[w];
  return value;
}

__device__ __forceinline__ uint32_t block_max(Misc& misc, uint32_t value) {
  value = __reduce_max_sync(~0u, value);
  block_wait();
  if (threadIdx.x % 32 == 0) misc.warps[threadIdx.x / 32] = value;
  block_wait();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value = max(value, uint32_t(misc.warps[w]));
  return value;
}

// The sum of the values of the warp's threads up to this one.
template <typename Number>
__device__ __forceinline__ Number warp_upto(Number value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number other = __shfl_up_sync(~0u, value, step);
    if (int(threadIdx.x % 32) >= step) value += other;
  }
  return value;
}

// The sum of the values of all threads before this one.
template <typename Number>
__device__ __forceinline__ Number block_before(Misc& misc, Number value) {
  Number upto = warp_upto(value);
  block_wait();
  if (threadIdx.x % 32 == 31) misc.warps[threadIdx.x / 32] = upto;
  block_wait();
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (w < int(threadIdx.x / 32)) upto += Number(misc.warps[w]);
  return upto - value;
}

// Finds the bin at which the sum of bins reaches `goal`, from bin 0 or, if kDown, from the last one; misc.bin is that bin
// and misc.above the sum of those before it. `value(bin)` is read by one thread. All of the block's threads see the result.
template <int kCount, bool kDown, typename Number, typename Value>
__device__ __forceinline__ void find_bin(Misc& misc, Number goal, Value value) {
  constexpr int kOwn = kCount / kThreads;
  const auto bin_of = [](int i) { return kDown ? kCount - 1 - i : i; };
  Number own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = value(bin_of(int(threadIdx.x) * kOwn + i));
    sum += own[i];
  }
  Number above = block_before(misc, sum);
  if (above < goal && above + sum >= goal) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (above < goal && above + own[i] >= goal) {
        misc.bin = bin_of(int(threadIdx.x) * kOwn + i);
        misc.above = above;
      }
      above += own[i];
    }
  }
  block_wait();
}

// The k-th largest key, by its digits.
__device__ __forceinline__ int find_kth(Misc& misc, uint32_t* bins, const int* keys, int entries, int k) {
  uint32_t prefix = 0;
  int left = k;
  for (int pass = 0;; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, width = pass == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    block_wait();
    for (int i = threadIdx.x; i < entries; i += kThreads) {
      const uint32_t key = uint32_t(keys[i]) ^ 0x80000000u;
      if (pass == 0 || key >> (shift + width) == prefix) atomicAdd(bins + (key >> shift & ((1u << width) - 1)), 1u);
    }
    block_wait();
    find_bin<kBins, true>(misc, uint32_t(left), [&](int bin) { return bins[bin]; });
    left -= int(misc.above);
    prefix = prefix << width | uint32_t(misc.bin);
    block_wait();
    if (shift == 0) return int(prefix ^ 0x80000000u);
  }
}

// Bins of scores, the largest first: monotone, for every operation rounds monotonically.
struct Scale {
  float top, factor;
  __device__ __forceinline__ Scale(float top, float low) : top(top), factor((kBins - 1) / (top - low)) {}
  // Whether a score's bin is `last` or one before.
  __device__ __forceinline__ bool upto(float score, int last) const {
    return last == kBins - 1 || (top - score) * factor < float(last + 1);
  }
  // Whether it tells scores apart at all: not if they are equal, or nearly, or infinitely far apart.
  __device__ __forceinline__ bool sound() const { return factor > 0 && factor <= 1e30f; }
  __device__ __forceinline__ int bin(float score) const { return int(min((top - score) * factor, float(kBins - 1))); }
};

// Calls use(i, key) for every key: of two packs of four at a time, which are read together.
template <typename Use>
__device__ __forceinline__ void for_keys(const int* keys, int entries, const Use& use) {
  constexpr int kPacks = 2;
  const int packs = (entries + 3) / 4;
#pragma unroll 1
  for (int first = threadIdx.x; first < packs; first += kPacks * kThreads) {
    int4 four[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      four[j] = first + j * kThreads < packs ? reinterpret_cast<const int4*>(keys)[first + j * kThreads] : int4{};
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int at = 4 * (first + j * kThreads), own[4] = {four[j].x, four[j].y, four[j].z, four[j].w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (at + e < entries) use(at + e, own[e]);
    }
  }
}

struct Draw {
  const float* noise;
  float inverse_temperature;
  int top_k;
  double top_p;
};

// What the ways of drawing share.
struct Row : Weights {
  unsigned char* memory;
  const Draw& draw;
  int entries;

  __device__ __forceinline__ Misc& misc() const { return *reinterpret_cast<Misc*>(memory + kMiscAt); }
  __device__ __forceinline__ Row(unsigned char* memory, const Draw& draw, int entries, float top)
      : Weights(entries, top), memory(memory), draw(draw), entries(entries) {}
  __device__ __forceinline__ Word goal(Word total) const { return Weights::goal(total, draw.top_p); }
  __device__ __forceinline__ bool cuts_mass() const { return draw.top_p > 0 && draw.top_p < 1; }
};

// Of the `equal` entries with a certain weight, those before the result are kept: `wanted` of them.
// `equal_before(place)` counts a thread's own ones before a place.
template <typename Count>
__device__ __forceinline__ int find_bound(const Row& row, Word wanted, Word equal, const Count& equal_before) {
  int bound = row.entries;
  if (wanted >= equal) return bound;
  int short_of = 0;  // fewer than wanted are before this index, wanted before `bound`
  while (bound - short_of > 1) {
    const int place = (short_of + bound) / 2;
    if (block_sum(row.misc(), equal_before(place)) >= wanted)
      bound = place;
    else
      short_of = place;
  }
  return bound;
}

__device__ __forceinline__ int winner(Misc& misc, Word best) { return int(~uint32_t(block_max(misc, best))); }

// Draws among the `count` keys of a list that are `least` or more: thread i has those of number i, i + kThreads, ... Returns
// false if too many have about the weight at the cut of top-p.
__device__ __forceinline__ bool draw_listed(const Row& row, const Scale& scale, int count, int least, int* code) {
  constexpr int kOwn = kListed / kThreads;
  Misc& misc = row.misc();
  Word* sums = reinterpret_cast<Word*>(row.memory);
  Word* masses = sums;  // of the entries at the cut, when the sums are no longer needed
  const int2* list = reinterpret_cast<const int2*>(row.memory + kListAt);
  int* weights = reinterpret_cast<int*>(row.memory + kWeightsAt);
  int* near = reinterpret_cast<int*>(row.memory + kNearAt);
  const auto bin_of = [&](int i) { return scale.bin(score_of(list[i].x)); };
  float noise[kOwn];  // on its way while weights are computed
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = threadIdx.x + j * kThreads;
    noise[j] = 1;
    if (i < count) noise[j] = __ldg(row.draw.noise + list[i].y);
  }
  const bool cuts = row.cuts_mass();
  if (cuts) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) sums[i] = 0;
    if (threadIdx.x == 0) misc.near = misc.listed = 0;
    block_wait();
  }
  Word total = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int key = list[i].x, bits = key >= least ? row.weight(key) : 0;
    weights[i] = bits;
    if (!cuts) continue;
    const Word own = row.mass(bits);
    total += own;
    if (own) atomicAdd(sums + bin_of(i), own);
  }
  // Kept are weights of `low` and more; of those that equal it, the entries before `bound`.
  int low = 1, bound = row.entries;
  if (cuts) {
    Word left = row.goal(block_sum(misc, total));
    find_bin<kBins, false>(misc, left, [&](int bin) { return sums[bin]; });
    const int edge = misc.bin;
    const Word before = misc.above;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (weights[i] == 0 || bin_of(i) != edge) continue;
      const int at = atomicAdd(&misc.near, 1);
      if (at < kNearest) near[at] = weights[i], masses[at] = row.mass(weights[i]);
    }
    block_wait();
    const int inside = misc.near;
    if (inside > kNearest) return false;
    for (int i = threadIdx.x; i < inside; i += kThreads) {
      Word larger = before, equal = 0;
#pragma unroll 4
      for (int j = 0; j < inside; ++j) {
        larger += near[j] > near[i] ? masses[j] : 0;
        equal += near[j] == near[i] ? masses[j] : 0;
      }
      if (larger < left && larger + equal >= left) misc.bin = near[i];  // the same by all who write
    }
    block_wait();
    low = misc.bin;
    // Weights are equal of scores that are not, too, and those may be in the bins around.
    Word larger = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (weights[i] > low) larger += row.mass(weights[i]);
      if (weights[i] != low) continue;
      const int at = atomicAdd(&misc.listed, 1);
      if (at < kNearest) near[at] = list[i].y;
    }
    left -= block_sum(misc, larger);
    // One entry more than fits.
    const Word each = row.mass(low), wanted = (left + each - 1) / each;
    const int equal = misc.listed;
    if (wanted < Word(equal) && equal <= kNearest) {
      for (int i = threadIdx.x; i < equal; i += kThreads) {
        Word earlier = 0;
#pragma unroll 4
        for (int j = 0; j < equal; ++j) earlier += near[j] < near[i];
        if (earlier + 1 == wanted) misc.bin = near[i] + 1;
      }
      block_wait();
      bound = misc.bin;
    } else {
      bound = find_bound(row, wanted, equal, [&](int end) {
        Word own = 0;
        for (int i = threadIdx.x; i < count; i += kThreads) own += weights[i] == low && list[i].y < end;
        return own;
      });
    }
  }
  Word best = kNobody;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i >= count) break;
    const int bits = weights[i], place = list[i].y;
    if (bits > 0 && (bits > low || (bits == low && place < bound))) best = max(best, racer(bits, noise[j], place));
  }
  *code = winner(misc, best);
  return true;
}

// Draws among the keys that are `least` or more, whatever they are; leaves weights in their place.
__device__ __forceinline__ int draw_any(const Row& row, int* keys, int least) {
  Misc& misc = row.misc();
  const int entries = row.entries;
  for (int i = threadIdx.x; i < entries; i += kThreads) keys[i] = keys[i] >= least ? row.weight(keys[i]) : 0;
  block_wait();
  int low = 1, bound = entries;
  if (row.cuts_mass()) {
    Word* sums = reinterpret_cast<Word*>(row.memory);
    Word total = 0;
    for (int i = threadIdx.x; i < entries; i += kThreads) total += row.mass(keys[i]);
    Word left = row.goal(block_sum(misc, total));
    uint32_t prefix = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
      block_wait();
      for (int i = threadIdx.x; i < 1024; i += kThreads) sums[i] = 0;
      block_wait();
      for (int i = threadIdx.x; i < entries; i += kThreads) {
        const uint32_t bits = keys[i];
        if (bits && (shift == 20 || bits >> (shift + 10) == prefix))
          atomicAdd(sums + (bits >> shift & 1023), row.mass(bits));
      }
      block_wait();
      find_bin<1024, true>(misc, left, [&](int bin) { return sums[bin]; });
      left -= misc.above;
      prefix = prefix << 10 | uint32_t(misc.bin);
    }
    low = int(prefix);
    const auto equal_before = [&](int end) {
      Word count = 0;
      for (int i = threadIdx.x; i < end; i += kThreads) count += keys[i] == low;
      return count;
    };
    const Word each = row.mass(low);  // of `left`, one entry more than fits
    bound = find_bound(row, (left + each - 1) / each, block_sum(misc, equal_before(entries)), equal_before);
  }
  Word best = kNobody;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int bits = keys[i];
    if (bits > 0 && (bits > low || (bits == low && i < bound))) best = max(best, racer(bits, __ldg(row.draw.noise + i), i));
  }
  return winner(misc, best);
}

// A code from one row of keys, of which there are at least `entries` up to a multiple of four; by the whole block.
// `room` is how many keys fit behind kKeysAt; `unsound` becomes whether there is NaN among the scores.
__device__ __forceinline__ int draw_code(unsigned char* memory, int* global_keys, int entries, int room, const Draw& draw,
                                         bool* unsound) {
  uint32_t* bins = reinterpret_cast<uint32_t*>(memory);
  int2* list = reinterpret_cast<int2*>(memory + kListAt);
  int* near = reinterpret_cast<int*>(memory + kNearAt);
  Misc& misc = *reinterpret_cast<Misc*>(memory + kMiscAt);
  const bool held = entries <= room;
  int* keys = held ? reinterpret_cast<int*>(memory + kKeysAt) : global_keys;
  uint32_t most = 0, lowest = 0;  // the latter: of finite scores, from the other end
  block_wait();
  const int packs = (entries + 3) / 4;
  constexpr int kLoads = 16;
  if (held) {
#pragma unroll 1
    for (int first = threadIdx.x; first < packs; first += kLoads * kThreads) {
      int4 four[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        four[j] = first + j * kThreads < packs ? __ldcg(reinterpret_cast<const int4*>(global_keys) + first + j * kThreads) : int4{};
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (first + j * kThreads < packs) reinterpret_cast<int4*>(keys)[first + j * kThreads] = four[j];
    }
  }
  for_keys(keys, entries, [&](int, int signed_key) {  // a thread's own ones
    const uint32_t key = uint32_t(signed_key) ^ 0x80000000u;
    most = max(most, key);
    lowest = max(lowest, signed_key > kLeast ? ~key : 0u);
  });
  const int top = int(block_max(misc, most) ^ 0x80000000u);  // its waits also make the copy of the keys visible
  *unsound = top == kNaN;
  if (draw.inverse_temperature == 0) {
    uint32_t first = 0;  // from the other end
    for_keys(keys, entries, [&](int i, int key) { first = max(first, key == top ? ~uint32_t(i) : 0u); });
    return int(~block_max(misc, first));
  }
  if (top <= kLeast || top >= kInfinite) return 0;

  // The keys of the bins down to the one with the k-th largest make a list, if it is short.
  const Row row(memory, draw, entries, score_of(top));
  const bool cuts = draw.top_k > 0 && draw.top_k < entries;
  const Scale scale(score_of(top), score_of(int(~block_max(misc, lowest) ^ 0x80000000u)));
  if (cuts && scale.sound()) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    if (threadIdx.x == 0) misc.near = misc.listed = 0;
    block_wait();
    for_keys(keys, entries, [&](int, int key) { atomicAdd(bins + scale.bin(score_of(key)), 1u); });
    block_wait();
    find_bin<kBins, false>(misc, uint32_t(draw.top_k), [&](int bin) { return bins[bin]; });
    const int edge = misc.bin, before = int(misc.above), inside = int(bins[edge]), count = before + inside;
    block_wait();  // before anyone clears the bins
    if (count <= kListed && inside <= kNearest) {
      // Each thread notes which of 64 keys it takes, each warp asks for places of the list. Their order does not matter.
#pragma unroll 1
      for (int base = 0; base < packs; base += kLoads * kThreads) {
        Word taken = 0;
#pragma unroll 2
        for (int j = 0; j < kLoads; ++j) {
          const int pack = base + j * kThreads + int(threadIdx.x);
          if (pack >= packs) break;
          const int4 four = reinterpret_cast<const int4*>(keys)[pack];
          const int own[4] = {four.x, four.y, four.z, four.w};
          uint32_t some = 0;
#pragma unroll
          for (int e = 0; e < 4; ++e) some |= uint32_t(4 * pack + e < entries && scale.upto(score_of(own[e]), edge)) << e;
          taken |= Word(some) << 4 * j;
        }
        const uint32_t own = __popcll(taken), upto = warp_upto(own);
        uint32_t at = 0;
        if (threadIdx.x % 32 == 31) at = atomicAdd(reinterpret_cast<uint32_t*>(&misc.listed), upto);
        at = __shfl_sync(~0u, at, 31) + upto - own;
        for (; taken; taken &= taken - 1) {
          const int bit = __ffsll(static_cast<long long>(taken)) - 1;
          const int i = 4 * (base + bit / 4 * kThreads + int(threadIdx.x)) + bit % 4, key = keys[i];
          list[at++] = {key, i};
          if (scale.bin(score_of(key)) == edge) near[atomicAdd(&misc.near, 1)] = key;
        }
      }
      block_wait();
      const int wanted = draw.top_k - before;  // of the edge's bin
      for (int i = threadIdx.x; i < inside; i += kThreads) {
        int larger = 0, equal = 0;
#pragma unroll 4
        for (int j = 0; j < inside; ++j) {
          larger += near[j] > near[i];
          equal += near[j] == near[i];
        }
        if (larger < wanted && larger + equal >= wanted) misc.bin = near[i];  // the same by all who write
      }
      block_wait();
      int code;
      if (draw_listed(row, scale, count, misc.bin, &code)) return code;
    }
  }
  block_wait();
  return draw_any(row, keys, cuts ? find_kth(misc, bins, keys, entries, draw.top_k) : kLeast);
}

}  // namespace unifiedar
