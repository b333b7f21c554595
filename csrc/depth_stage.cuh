// What a matrix of the depth kernel is multiplied with, in shared memory: the residual stream normalised, or the attention.
//
// Shared memory begins with the sums of a matrix' tiles, then a norm's statistics, its gain and bias, and the rows staged here.
#pragma once

#include <cstdint>

#include "depth.h"
#include "depth_draw.cuh"
#include "device/pack.cuh"

namespace unifiedar {

constexpr int kRedPitch = 20;              // floats between columns of a tile in shared memory: no bank conflicts
constexpr int kRedTiles = 4;               // tiles that are added up together, times rows / 8
constexpr int kRedBytes = kWarps * kRedTiles * 8 * kRedPitch * 4;
constexpr int kStatBytes = kMaxDepthRows * kWarps * 8;
constexpr int kVectorsAt = kRedBytes + kStatBytes;  // a norm's gain and bias, then what a matrix is multiplied with
constexpr int kPad = 64;                   // bytes between staged rows: two rows and four lanes of each cover all banks

// Activations are written by other blocks: read from the second cache, where they are.
__device__ __forceinline__ uint4 load_shared_by_all(const void* from) { return __ldcg(static_cast<const uint4*>(from)); }

__device__ __forceinline__ uint32_t largest(uint4 words) { return max(max(words.x, words.y), max(words.z, words.w)); }

// Packs of posted words, from the places that place(i) gives, null where there is none.
template <int kCount, typename Place>
__device__ __forceinline__ void read_posted(uint4 (&to)[kCount], const Place& place) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = place(i) != nullptr ? posted(place(i)) : uint4{};
}

// The same until all are there. The first is waited for before the others are looked at again: blocks that wait long are not
// to take the second cache from those that do not.
template <int kCount, typename Place>
__device__ __forceinline__ void wait_posted(uint4 (&to)[kCount], const Place& place) {
  read_until(
      [&] {
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) most = max(most, largest(to[i]));
        return most == kAbsent;
      },
      [&] {
        if (largest(to[0]) == kAbsent) {
          to[0] = posted(place(0));
          return;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (largest(to[i]) == kAbsent) to[i] = posted(place(i));
      });
}

__device__ __forceinline__ float4 floats_of(uint4 words) {
  return {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z), __uint_as_float(words.w)};
}

__device__ __forceinline__ unsigned char* staged_row(unsigned char* memory, int row, int width, int dim) {
  return memory + kVectorsAt + dim * 4 + row * (width * 2 + kPad);
}

// LayerNorm of a row of the residual stream by the whole block, to global memory, once it is posted: x and `extras` tensors
// beside it, each `apart` numbers after the one before. Gain and bias lie at kVectorsAt. kHeld: packs of four numbers that a
// thread keeps; of longer rows it reads the others twice.
template <typename T, int kHeld, int kExtras>
__device__ __forceinline__ void normalise_row(const float* x, const float* beside, int64_t apart, int extras, int dim,
                                              unsigned char* memory, T* out) {
  const int packs = dim / 4;
  const auto read = [&](float4 (&to)[kHeld], int first) {
    uint4 words[(1 + kExtras) * kHeld];
    const auto place = [&](int i) {
      const int pack = first + i % kHeld * kThreads, extra = i / kHeld - 1;
      const float* from = extra < 0 ? x : beside + extra * apart;
      return pack < packs && extra < extras ? reinterpret_cast<const uint4*>(from) + pack : nullptr;
    };
    read_posted(words, place);
    wait_posted(words, place);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      to[i] = floats_of(words[i]);
#pragma unroll
      for (int e = 1; e <= kExtras; ++e) {
        const float4 add = floats_of(words[e * kHeld + i]);
        to[i] = {to[i].x + add.x, to[i].y + add.y, to[i].z + add.z, to[i].w + add.w};
      }
    }
  };
  float4 held[kHeld];
  uint32_t word = posted(reinterpret_cast<const uint32_t*>(x));
  read(held, threadIdx.x);
  read_until([&] { return word == kAbsent; }, [&] { word = posted(reinterpret_cast<const uint32_t*>(x)); });
  // Deviations from the row's first element: a mean far from 0 costs no digits.
  const float origin = __uint_as_float(word);
  float sum = 0, squares = 0;
  const auto count = [&](const float4 (&batch)[kHeld], int first) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kThreads >= packs) continue;
      const float b[4] = {batch[i].x - origin, batch[i].y - origin, batch[i].z - origin, batch[i].w - origin};
      sum += (b[0] + b[1]) + (b[2] + b[3]);
      squares += (b[0] * b[0] + b[1] * b[1]) + (b[2] * b[2] + b[3] * b[3]);
    }
  };
  count(held, threadIdx.x);
#pragma unroll 1
  for (int first = threadIdx.x + kHeld * kThreads; first < packs; first += kHeld * kThreads) {
    float4 batch[kHeld];
    read(batch, first);
    count(batch, first);
  }
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
    squares += __shfl_xor_sync(~0u, squares, distance);
  }
  float2* stats = reinterpret_cast<float2*>(memory + kRedBytes);
  if (threadIdx.x % 32 == 0) stats[threadIdx.x / 32] = {sum, squares};
  copies_wait();  // of gain and bias
  block_wait();
  sum = squares = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sum += stats[w].x;
    squares += stats[w].y;
  }
  const float each = 1.f / dim, deviation = sum * each, mean = origin + deviation;
  const float scale = rsqrtf(max(squares * each - deviation * deviation, 0.f) + 1e-5f);
  const uint2* gains = reinterpret_cast<const uint2*>(memory + kVectorsAt);
  const uint2* biases = gains + packs;
  const auto put_all = [&](const float4 (&batch)[kHeld], int first) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int place = first + i * kThreads;
      if (place >= packs) continue;
      const float4& v = batch[i];
      const uint2 g = gains[place], b = biases[place];
      const float2 g0 = unpack_word(g.x, T{}), g1 = unpack_word(g.y, T{});
      const float2 b0 = unpack_word(b.x, T{}), b1 = unpack_word(b.y, T{});
      reinterpret_cast<uint2*>(out)[place] = {
          pack_word((v.x - mean) * scale * g0.x + b0.x, (v.y - mean) * scale * g0.y + b0.y, T{}),
          pack_word((v.z - mean) * scale * g1.x + b1.x, (v.w - mean) * scale * g1.y + b1.y, T{})};
    }
  };
  put_all(held, threadIdx.x);
#pragma unroll 1
  for (int first = threadIdx.x + kHeld * kThreads; first < packs; first += kHeld * kThreads) {
    float4 batch[kHeld];
    read(batch, first);
    put_all(batch, first);
  }
  block_wait();
}

// The same of all rows, to shared memory, one row for each 2^shift warps; `span` packs of four numbers are
// a warp's, at most 32 kHeld.
template <typename T, int kHeld>
__device__ __forceinline__ void normalise_posted(const float* x, const float* beside, int extras, int rows, int dim, int shift,
                                                 int span, unsigned char* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int packs = dim / 4, part = warp & ((1 << shift) - 1), row = warp >> shift, first = part * span + lane;
  const bool inside = row < rows;
  const int left = inside ? min(packs, (part + 1) * span) - first : 0;  // a lane's are i * 32 below this
  const int begin = (inside ? row : 0) * packs;
  const uint4* from = reinterpret_cast<const uint4*>(x) + begin + first;
  const uint4* more = reinterpret_cast<const uint4*>(beside) + begin + first;
  const uint32_t* origin_at = reinterpret_cast<const uint32_t*>(x) + begin * 4;
  uint4 own[kHeld], other[kHeld] = {};
  const auto own_place = [&](int i) { return i * 32 < left ? from + i * 32 : nullptr; };
  const auto place = [&](int i) { return i * 32 < left ? more + i * 32 : nullptr; };
  read_posted(own, own_place);
  if (extras > 0) read_posted(other, place);
  uint32_t word = posted(origin_at);
  uint32_t most = word;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) most = max(most, max(largest(own[i]), largest(other[i])));
  if (most == kAbsent) {
    wait_posted(own, own_place);
    wait_posted(other, place);
    read_until([&] { return word == kAbsent; }, [&] { word = posted(origin_at); });
  }
  float4 held[kHeld];
  const auto add = [&] {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float4 add = floats_of(other[i]);
      held[i] = {held[i].x + add.x, held[i].y + add.y, held[i].z + add.z, held[i].w + add.w};
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = floats_of(own[i]);
  add();
#pragma unroll 1
  for (int e = 1; e < extras; ++e) {
    more += rows * packs;
    read_posted(other, place);
    wait_posted(other, place);
    add();
  }
  // Deviations from the row's first element: a mean far from 0 costs no digits.
  const float origin = __uint_as_float(word);
  float sums[4] = {}, squared[4] = {};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * 32 >= left) continue;
    const float b[4] = {held[i].x - origin, held[i].y - origin, held[i].z - origin, held[i].w - origin};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[e] += b[e];
      squared[e] += b[e] * b[e];
    }
  }
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), squares = (squared[0] + squared[1]) + (squared[2] + squared[3]);
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
    squares += __shfl_xor_sync(~0u, squares, distance);
  }
  float2* stats = reinterpret_cast<float2*>(memory + kRedBytes);
  if (lane == 0) stats[warp] = {sum, squares};
  block_wait();
  sum = squares = 0;
  stats += row << shift;
#pragma unroll
  for (int p = 0; p < kWarps; ++p) {
    if (p >> shift > 0) break;
    sum += stats[p].x;
    squares += stats[p].y;
  }
  const float each = 1.f / dim, deviation = sum * each, mean = origin + deviation;
  const float scale = rsqrtf(max(squares * each - deviation * deviation, 0.f) + 1e-5f);
  const uint2* gains = reinterpret_cast<const uint2*>(memory + kVectorsAt) + first;
  const uint2* biases = gains + packs;
  uint2* to = reinterpret_cast<uint2*>(staged_row(memory, row, dim, dim)) + first;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * 32 >= left) continue;
    const float4& v = held[i];
    const uint2 g = gains[i * 32], b = biases[i * 32];
    const float2 g0 = unpack_word(g.x, T{}), g1 = unpack_word(g.y, T{});
    const float2 b0 = unpack_word(b.x, T{}), b1 = unpack_word(b.y, T{});
    to[i * 32] = {pack_word((v.x - mean) * scale * g0.x + b0.x, (v.y - mean) * scale * g0.y + b0.y, T{}),
                  pack_word((v.z - mean) * scale * g1.x + b1.x, (v.w - mean) * scale * g1.y + b1.y, T{})};
  }
  block_wait();
}

// Attention of one head at depth d for the rows from 32 / kLanes times `group` on, kLanes lanes a row. Of its 64 numbers
// a lane of four has 8 (lane % 4) .. + 7 of either half, as a matrix' operand has them, and one of sixteen four in a row.
template <int kLanes>
struct Head {
  static constexpr int kWords = 32 / kLanes;
  static constexpr int kBatch = kLanes == 16 ? 4 : 2;  // depths whose keys and values are in flight
  uint32_t query[kWords], key[kBatch][kWords], value[kBatch][kWords];
};

// Where a layer has its queries, keys and values.
template <typename T>
struct Attended {
  const T *query, *keys, *values;  // [rows, dim], [depth, rows, dim] twice
  int rows, dim;
};

template <int kLanes, typename T>
__device__ __forceinline__ int64_t place_of(const Attended<T>& from, int head, int group) {
  const int lane = threadIdx.x % 32, row = group * (32 / kLanes) + lane / kLanes, rows = from.rows, dim = from.dim;
  return int64_t(row < rows ? row : 0) * dim + head * kHeadDim + lane % kLanes * (kLanes == 16 ? 4 : 8);
}

template <int kWords, typename T>
__device__ __forceinline__ void read(uint32_t (&to)[kWords], const T* from, bool there) {
  if constexpr (kWords == 2) {
    const uint2 raw = there ? posted(reinterpret_cast<const uint2*>(from)) : uint2{};
    to[0] = raw.x, to[1] = raw.y;
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 raw = there ? posted(reinterpret_cast<const uint4*>(from + half * 32)) : uint4{};
      to[4 * half] = raw.x, to[4 * half + 1] = raw.y, to[4 * half + 2] = raw.z, to[4 * half + 3] = raw.w;
    }
  }
}

template <int kWords>
__device__ __forceinline__ bool absent(const uint32_t (&words)[kWords]) {
  uint32_t most = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) most = max(most, words[w]);
  return most == kAbsent;
}

template <int kLanes, typename T>
__device__ __forceinline__ void read_depths(Head<kLanes>& to, const Attended<T>& from, int d, int first, int64_t place) {
  const int64_t level = int64_t(from.rows) * from.dim;
#pragma unroll
  for (int j = 0; j < Head<kLanes>::kBatch; ++j) {
    const bool there = first + j <= d;
    read(to.key[j], from.keys + (first + j) * level + place, there);
    read(to.value[j], from.values + (first + j) * level + place, there);
  }
}

// Waits until the query and those depths, the first of them `first`, are there.
template <int kLanes, typename T>
__device__ __forceinline__ void wait_depths(Head<kLanes>& of, const Attended<T>& from, int first, int64_t place) {
  constexpr int kBatch = Head<kLanes>::kBatch;
  const int64_t level = int64_t(from.rows) * from.dim;
  read_until(
      [&] {
        bool some = absent(of.query);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) some |= absent(of.key[j]) | absent(of.value[j]);
        return some;
      },
      [&] {
        if (absent(of.query)) read(of.query, from.query + place, true);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (absent(of.key[j])) read(of.key[j], from.keys + (first + j) * level + place, true);
          if (absent(of.value[j])) read(of.value[j], from.values + (first + j) * level + place, true);
        }
      });
}

template <int kLanes, typename T>
__device__ __forceinline__ void read_head(Head<kLanes>& to, const Attended<T>& from, int d, int64_t place) {
  read(to.query, from.query + place, true);
  read_depths<kLanes>(to, from, d, 0, place);
}

// From a head of which the first depths are read; leaves the result where the query was.
template <int kLanes, typename T>
__device__ __forceinline__ void attend(Head<kLanes>& head, const Attended<T>& from, int d, int64_t place) {
  constexpr int kWords = Head<kLanes>::kWords, kBatch = Head<kLanes>::kBatch;
  float2 y[kWords] = {};
  float most = -INFINITY, total = 0;
#pragma unroll 1
  for (int first = 0; first <= d; first += kBatch) {
    if (first > 0) read_depths<kLanes>(head, from, d, first, place);
    wait_depths(head, from, first, place);
    // Of depths beyond d keys and values are zeros, and their weights.
    float scores[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      float2 sum = {};
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const float2 q = unpack_word(head.query[w], T{}), k = unpack_word(head.key[j][w], T{});
        sum = {sum.x + q.x * k.x, sum.y + q.y * k.y};
      }
      scores[j] = sum.x + sum.y;
    }
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) scores[j] += __shfl_xor_sync(~0u, scores[j], distance);
    }
    float now = most;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      scores[j] *= 0.125f;  // 1 / sqrt(64)
      if (first + j <= d) now = max(now, scores[j]);
    }
    const float old = __expf(most - now);
    most = now;
    total *= old;
#pragma unroll
    for (int w = 0; w < kWords; ++w) y[w] = {y[w].x * old, y[w].y * old};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float weight = first + j <= d ? __expf(scores[j] - now) : 0.f;
      total += weight;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const float2 v = unpack_word(head.value[j][w], T{});
        y[w] = {y[w].x + weight * v.x, y[w].y + weight * v.y};
      }
    }
  }
  const float share = 1 / total;
#pragma unroll
  for (int w = 0; w < kWords; ++w) head.query[w] = pack_word(y[w].x * share, y[w].y * share, T{});
}

// kPost: where others wait for it.
template <bool kPost, int kLanes>
__device__ __forceinline__ void put_head(const Head<kLanes>& from, void* to) {
  if constexpr (kPost) {
    static_assert(kLanes == 4, "not used otherwise");
#pragma unroll
    for (int i = 0; i < 8; ++i)
      post(static_cast<uint32_t*>(to) + i % 4 + i / 4 * 16, from.query[i] == kAbsent ? kAbsent >> 1 : from.query[i]);
  } else if constexpr (kLanes == 16) {
    *static_cast<uint2*>(to) = {from.query[0], from.query[1]};
  } else {
    static_cast<uint4*>(to)[0] = {from.query[0], from.query[1], from.query[2], from.query[3]};
    static_cast<uint4*>(to)[4] = {from.query[4], from.query[5], from.query[6], from.query[7]};
  }
}

// Each warp the heads that it multiplies, for a chunk of the inputs is a head. With few rows the next head's numbers are on
// their way while one is worked on.
template <int kLanes, typename T>
__device__ __forceinline__ void stage_heads(const Attended<T> from, int d, int begin, int end, unsigned char* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = from.rows, dim = from.dim;
  constexpr int kOwnRows = 32 / kLanes;
  const int groups = (rows + kOwnRows - 1) / kOwnRows;
  int head = begin + ((warp - begin) & (kWarps - 1)), group = 0;
  constexpr bool kAhead = kLanes == 16;
  Head<kLanes> now{}, next{};
  if (kAhead && head < end) read_head<kLanes>(next, from, d, place_of<kLanes>(from, head, group));
#pragma unroll 1
  while (head < end) {
    const int own_head = head, own_group = group;
    const int64_t place = place_of<kLanes>(from, head, group);
    if (++group == groups) {
      group = 0;
      head += kWarps;
    }
    if constexpr (kAhead) {
      now = next;
      if (head < end) read_head<kLanes>(next, from, d, place_of<kLanes>(from, head, group));
    } else {
      read_head<kLanes>(now, from, d, place);
    }
    attend<kLanes>(now, from, d, place);
    const int row = own_group * kOwnRows + lane / kLanes;
    if (row < rows)
      put_head<false>(now, staged_row(memory, row, dim, dim) + own_head * kHeadDim * 2 + lane % kLanes * (kLanes == 16 ? 8 : 16));
  }
  __syncwarp();
}

}  // namespace unifiedar
