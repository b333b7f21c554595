// Drawing a code from a row of scores: guidance and temperature are in them; top-k, softmax, top-p and the race here.
//
// What is decided is decided by the numbers of unifiedar/ops/sample.py: scores as integers of their order, weights rounded
// to float32, sums of integers. How the entries at a cut are found does not change which they are. Here by bins that are
// linear in the score, as scores lie: the one with the cut in it has few entries, and those are compared with each other.
// Of many scores only the largest of every eight go into bins: as many of those as are wanted lie above the cut's bin, so that
// a list of what is as large has all that is wanted and little else. Scores that lie otherwise (most of them equal, or too many
// kept) are cut by the digits of their integers.
//
// A draw runs once a depth: its instructions come from far away, and more of them cost more than loops do.
#pragma once

#include <cstdint>

#include "device/score.cuh"

namespace unifiedar {

constexpr int kBins = 1024;    // of scores
constexpr int kDigits = 2048;  // of integers
constexpr int kNone = -0x7fffffff - 1;  // below all keys
constexpr int kLimb = 21;      // bits of a mass that one of a bin's three sums takes: 2,048 of them fit 32 bits
constexpr int kListed = 2048;  // entries that a list holds
constexpr int kNearest = 512;  // of them those in the bin of a cut
constexpr int kListAt = kBins * 16, kWeightsAt = kListAt + kListed * 8, kNearAt = kWeightsAt + kListed * 4;
constexpr int kMiscAt = kNearAt + kNearest * 4, kKeysAt = kMiscAt + 1024;

// Small numbers that threads of a block tell each other.
struct Misc {
  Word warps[kWarps];
  Word above;
  int bin, near, listed;
  int passed, bound;
};
static_assert(Word(kListed) << kLimb <= Word(1) << 32 && 3 * kLimb >= 62, "sums of a bin");

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

// The same of kBins bins, of which a thread has four: `four(own)` reads them, `goal(total)` is what their sum has to reach.
// Returns the goal.
template <typename Number, typename Four, typename Goal>
__device__ __forceinline__ Number find_bin_of_four(Misc& misc, const Four& four, const Goal& goal_of) {
  static_assert(kBins == 4 * kThreads, "four a thread");
  Number own[4];
  four(own);
  const Number sum = (own[0] + own[1]) + (own[2] + own[3]);
  Number above = block_before(misc, sum), total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += Number(misc.warps[w]);
  const Number goal = goal_of(total);
  if (above < goal && above + sum >= goal) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (above < goal && above + own[i] >= goal) {
        misc.bin = 4 * int(threadIdx.x) + i;
        misc.above = above;
      }
      above += own[i];
    }
  }
  block_wait();
  return goal;
}

// The k-th largest key, by its digits.
__device__ __forceinline__ int find_kth(Misc& misc, uint32_t* bins, const int* keys, int entries, int k) {
  uint32_t prefix = 0;
  int left = k;
  for (int pass = 0;; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, width = pass == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kDigits; i += kThreads) bins[i] = 0;
    block_wait();
    for (int i = threadIdx.x; i < entries; i += kThreads) {
      const uint32_t key = uint32_t(keys[i]) ^ 0x80000000u;
      if (pass == 0 || key >> (shift + width) == prefix) atomicAdd(bins + (key >> shift & ((1u << width) - 1)), 1u);
    }
    block_wait();
    find_bin<kDigits, true>(misc, uint32_t(left), [&](int bin) { return bins[bin]; });
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
  uint32_t* sums = reinterpret_cast<uint32_t*>(row.memory);  // three of each bin, kBins apart
  Word* masses = reinterpret_cast<Word*>(row.memory);  // of the entries at the cut, when the sums are no longer needed
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
#pragma unroll
    for (int limb = 0; limb < 3; ++limb) reinterpret_cast<uint4*>(sums + limb * kBins)[threadIdx.x] = {};
    if (threadIdx.x == 0) misc.near = misc.listed = misc.passed = 0, misc.bound = row.entries;
    block_wait();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int key = list[i].x, bits = key >= least ? row.weight(key) : 0;
    weights[i] = bits;
    if (!cuts) continue;
    // Additions of 64 bits would be tries that fail where many scores are equal.
    const Word own = row.mass(bits);
    uint32_t* to = sums + bin_of(i);
#pragma unroll
    for (int limb = 0; limb < 3; ++limb)
      if (const uint32_t part = uint32_t(own >> limb * kLimb) & ((1u << kLimb) - 1); part) atomicAdd(to + limb * kBins, part);
  }
  // Kept are weights of `low` and more; of those that equal it, the entries before `bound`.
  int low = 1, bound = row.entries;
  if (cuts) {
    block_wait();
    const auto four = [&](Word(&own)[4]) {
      for (int e = 0; e < 4; ++e) own[e] = 0;
#pragma unroll
      for (int limb = 0; limb < 3; ++limb) {
        const uint4 words = reinterpret_cast<const uint4*>(sums + limb * kBins)[threadIdx.x];
        own[0] += Word(words.x) << limb * kLimb;
        own[1] += Word(words.y) << limb * kLimb;
        own[2] += Word(words.z) << limb * kLimb;
        own[3] += Word(words.w) << limb * kLimb;
      }
    };
    Word left = find_bin_of_four<Word>(misc, four, [&](Word total) { return row.goal(total); });
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
      if (larger < left && larger + equal >= left) {  // the same by all who write
        misc.bin = near[i];
        misc.above = larger;
      }
    }
    block_wait();
    low = misc.bin;
    left -= misc.above;
    // Weights are equal of scores that are not, too: some may be in the bins around.
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (weights[i] != low) continue;
      const int at = atomicAdd(&misc.listed, 1);
      if (at < kNearest) near[at] = list[i].y;
      if (bin_of(i) < edge) atomicAdd(&misc.passed, 1);  // counted among the larger ones
    }
    block_wait();
    const Word each = row.mass(low);
    const int equal = misc.listed;
    left += each * Word(misc.passed);
    // One entry more than fits.
    if (equal <= kNearest) {
      for (int i = threadIdx.x; i < equal; i += kThreads) {
        Word earlier = 0;
#pragma unroll 4
        for (int j = 0; j < equal; ++j) earlier += near[j] < near[i];
        if (earlier * each < left && (earlier + 1) * each >= left) misc.bound = near[i] + 1;
      }
      block_wait();
      bound = misc.bound;
    } else {
      bound = find_bound(row, (left + each - 1) / each, equal, [&](int end) {
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
  block_wait();
  const int packs = (entries + 3) / 4;
  // Of every two of its packs a thread keeps the largest key, in the order in which it reads them.
  constexpr int kLoads = 16;
  constexpr int kMostGroups = kListed * 2;  // the list's place has room for so many
  int* maxima = reinterpret_cast<int*>(memory + kListAt) + threadIdx.x;  // a thread's, kThreads apart
  const int groups = (packs + 2 * kThreads - 1) / (2 * kThreads);        // of the first thread
  const bool grouped = groups * kThreads <= kMostGroups;
  int most = kNone, lowest = kNaN;  // the latter: of the finite ones among those
#pragma unroll 1
  for (int first = threadIdx.x; first < packs; first += kLoads * kThreads) {
    int4 four[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int pack = first + j * kThreads;
      four[j] = pack < packs ? __ldcg(reinterpret_cast<const int4*>(global_keys) + pack) : int4{kNone, kNone, kNone, kNone};
    }
    if (entries % 4 != 0) {  // behind the last key there is anything
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (first + j * kThreads != packs - 1) continue;
        if (entries % 4 < 2) four[j].y = kNone;
        if (entries % 4 < 3) four[j].z = kNone;
        four[j].w = kNone;
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; j += 2) {
      const int pack = first + j * kThreads;
      if (pack >= packs) break;
      const int4 &a = four[j], &b = four[j + 1];
      if (held) reinterpret_cast<int4*>(keys)[pack] = a;
      if (held && pack + kThreads < packs) reinterpret_cast<int4*>(keys)[pack + kThreads] = b;
      const int largest = max(max(max(a.x, a.y), max(a.z, a.w)), max(max(b.x, b.y), max(b.z, b.w)));
      most = max(most, largest);
      if (largest > kLeast) lowest = min(lowest, largest);
      if (grouped) maxima[pack / (2 * kThreads) * kThreads] = largest;
    }
  }
  const auto block_most = [&](int key) { return int(block_max(misc, uint32_t(key) ^ 0x80000000u) ^ 0x80000000u); };
  const int top = block_most(most);  // its waits also make the copy of the keys visible
  *unsound = top == kNaN;
  if (draw.inverse_temperature == 0) {
    uint32_t first = 0;  // from the other end
    for_keys(keys, entries, [&](int i, int key) { first = max(first, key == top ? ~uint32_t(i) : 0u); });
    return int(~block_max(misc, first));
  }
  if (top <= kLeast || top >= kInfinite) return 0;

  const Row row(memory, draw, entries, score_of(top));
  const bool cuts = draw.top_k > 0 && draw.top_k < entries;
  // Bins are of the largest of groups if there are twice as many as are wanted, else of all keys.
  const bool of_groups = cuts && grouped && 2 * draw.top_k <= packs / 2;
  const auto for_binned = [&](const auto& use) {
    if (of_groups) {
#pragma unroll 2
      for (int at = 0, pack = threadIdx.x; pack < packs; pack += 2 * kThreads, at += kThreads) use(maxima[at]);
    } else {
      for_keys(keys, entries, [&](int, int key) { use(key); });
    }
  };
  if (cuts && !of_groups) {
    lowest = kNaN;
    for_binned([&](int key) { lowest = key > kLeast ? min(lowest, key) : lowest; });
  }
  if (cuts) lowest = ~block_most(~lowest);
  const Scale scale(score_of(top), score_of(lowest));
  if (cuts && scale.sound()) {
    const auto four = [&](uint32_t(&own)[4]) {
      const uint4 words = reinterpret_cast<const uint4*>(bins)[threadIdx.x];
      own[0] = words.x, own[1] = words.y, own[2] = words.z, own[3] = words.w;
    };
    const auto wanted = [&](uint32_t) { return uint32_t(draw.top_k); };
    reinterpret_cast<uint4*>(bins)[threadIdx.x] = {};
    if (threadIdx.x == 0) misc.near = misc.listed = 0;
    block_wait();
    for_binned([&](int key) { atomicAdd(bins + scale.bin(score_of(key)), 1u); });
    block_wait();
    find_bin_of_four<uint32_t>(misc, four, wanted);
    // What is as large as the least of that bin makes a list, if it is short.
    const int last = misc.bin;
    int least = kNaN;
    for_binned([&](int key) { least = scale.bin(score_of(key)) <= last ? min(least, key) : least; });
    least = ~block_most(~least);
    // The maxima are not needed any more, nor the bins.
    reinterpret_cast<uint4*>(bins)[threadIdx.x] = {};
    // Each thread notes which of 64 keys it takes, each warp asks for places of the list. Their order does not matter.
#pragma unroll 1
    for (int base = 0; base < packs; base += kLoads * kThreads) {
      Word taken = 0;
#pragma unroll 4
      for (int j = 0; j < kLoads; ++j) {
        const int pack = base + j * kThreads + int(threadIdx.x);
        if (pack >= packs) break;
        const int4 four = reinterpret_cast<const int4*>(keys)[pack];
        uint32_t some = uint32_t(four.x >= least) | uint32_t(four.y >= least) << 1 | uint32_t(four.z >= least) << 2 |
                              uint32_t(four.w >= least) << 3;
        if (4 * pack + 4 > entries) some &= (1u << entries % 4) - 1;
        taken |= Word(some) << 4 * j;
      }
      const uint32_t own = __popcll(taken), upto = warp_upto(own);
      uint32_t at = 0;
      if (threadIdx.x % 32 == 31) at = atomicAdd(reinterpret_cast<uint32_t*>(&misc.listed), upto);
      at = __shfl_sync(~0u, at, 31) + upto - own;
      for (; taken; taken &= taken - 1, ++at) {
        const int bit = __ffsll(static_cast<long long>(taken)) - 1;
        const int i = 4 * (base + bit / 4 * kThreads + int(threadIdx.x)) + bit % 4;
        if (at < kListed) list[at] = {keys[i], i};
      }
    }
    block_wait();
    const int count = misc.listed;
    if (count <= kListed) {
      // The k-th of the list: bins again, and who is in the one with the cut against each other.
#pragma unroll 2
      for (int i = threadIdx.x; i < count; i += kThreads)
        atomicAdd(bins + scale.bin(score_of(list[i].x)), 1u);
      block_wait();
      find_bin_of_four<uint32_t>(misc, four, wanted);
      const int edge = misc.bin, before = int(misc.above), short_of = draw.top_k - before;
#pragma unroll 2
      for (int i = threadIdx.x; i < count; i += kThreads) {
        if (scale.bin(score_of(list[i].x)) != edge) continue;
        const int at = atomicAdd(&misc.near, 1);
        if (at < kNearest) near[at] = list[i].x;
      }
      block_wait();
      const int inside = misc.near;
      if (inside <= kNearest) {
        for (int i = threadIdx.x; i < inside; i += kThreads) {
          int larger = 0, equal = 0;
#pragma unroll 4
          for (int j = 0; j < inside; ++j) {
            larger += near[j] > near[i];
            equal += near[j] == near[i];
          }
          if (larger < short_of && larger + equal >= short_of) misc.bin = near[i];  // the same by all who write
        }
        block_wait();
        int code;
        if (draw_listed(row, scale, count, misc.bin, &code)) return code;
      }
    }
  }
  block_wait();
  return draw_any(row, keys, cuts ? find_kth(misc, bins, keys, entries, draw.top_k) : kLeast);
}

}  // namespace unifiedar
