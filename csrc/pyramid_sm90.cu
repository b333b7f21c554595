#include "pyramid_sm90.h"

#include <algorithm>
#include <atomic>

#include "device/cluster.cuh"
#include "device/mma.cuh"
#include "device/wide.cuh"

// One launch instead of 22. A scale needs the one before, so what a picture takes is a chain; a cluster of blocks goes
// through it with everything in shared memory. Each block keeps its share of the codebook there from the first picture
// to the last, and of what is left of the map some lines. At a scale every block averages all rows from everybody's lines
// (they are few) and searches its own codes; the blocks look at each other's nearest; then each upsamples, convolves and
// subtracts on its own lines.
//
// The search. Code k of a row z scores h_k - z . e_k, h = |e|^2 / 2; the least is nearest. Operands are sums of two
// bfloat16, so off by 2^-18 |v| each, and the product of the two low parts, 2^-18 |z| |e| at most, is left out: 3.02 x
// 2^-18 |z| |e|. Matrix units cut addends off at 2^-23 of the group's largest at worst; 97 addends make 1.13 x 97 such
// cuts. Both, and the float32 roundings of what it starts from, are below w_k = slope (|z| |e_k| + h_k). As in
// `kernels/codes_multiscale.py` what is kept is score - w_k, of the four codes that a lane has in two tiles the least. A
// row's winning four are scored again in float32, off by fine (|z| |e_k| + h_k) at most. Each block says between which
// ends its best score lies, and what all its others are above. Where not all are above the best one's upper end, all
// codes are compared in float64; of equal distances the lowest code is taken.
namespace unifiedar {
namespace {

constexpr int kChannels = 32, kThreads = 512, kWarps = kThreads / 32;
constexpr int kTaps = 9, kSum = kChannels * kTaps;
constexpr int kTile = 8;           // codes of one matrix instruction
constexpr int kChunk = 64;         // codes that a warp searches at least
constexpr int kRows = 32;          // rows that a warp searches at a time
constexpr int kRun = 8;            // neighbouring pixels whose convolution a thread has
constexpr int kUnits = kThreads / 8;  // eight threads work on all channels of a pixel, four each
constexpr uint32_t kWarp = ~0u;    // all lanes
constexpr float kSlope = 3.1f / (1 << 18) + 116.0f / (1 << 23);
constexpr float kFine = (kChannels + 16) * 0x1p-24f;  // with both sums, and roundings of the bounds themselves
constexpr float kLeast = 0x1p-99f;  // what products lose that are smaller than the least numbers

template <typename T>
__device__ __forceinline__ T across(T value, int step) {
  return __shfl_xor_sync(kWarp, value, step);
}

__device__ __forceinline__ float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ float4 scaled(float4 a, float by) { return {a.x * by, a.y * by, a.z * by, a.w * by}; }
__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
template <typename T>
__device__ __forceinline__ float4 load_four(const T* from) {
  const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
  return {wide(four.value[0]), wide(four.value[1]), wide(four.value[2]), wide(four.value[3])};
}

// Where 16 bytes of a convolution lie: four of a row's 288 words, so that eight rows next to each other are read from all
// banks.
__device__ __forceinline__ int weight_at(int row, int pack) { return row * kSum + (pack ^ (row & 7)) * 4; }

// Weights of cubic convolution (a = -0.75) of the four neighbours of `at`, of which the second is at floor(at).
__device__ __forceinline__ float4 cubic(float at) {
  float weight[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float d = fabsf(at - floorf(at) - float(i - 1));
    weight[i] = d <= 1 ? (1.25f * d - 2.25f) * d * d + 1 : ((-0.75f * d + 3.75f) * d - 6) * d + 3;
  }
  return {weight[0], weight[1], weight[2], weight[3]};
}

// The nearest so far, a lower end of its score; the least such of the others; where it is.
struct Nearest {
  float best = INFINITY, other = INFINITY;
  int holder = 0;

  __device__ __forceinline__ void add(float score, int at) {
    other = fminf(other, fmaxf(score, best));
    holder = score < best ? at : holder;
    best = fminf(best, score);
  }
  __device__ __forceinline__ void add(float score, float others, int at) {
    other = fminf(other, others);
    add(score, at);
  }
  __device__ __forceinline__ void add_across(int step) {
    const float score = across(best, step), others = across(other, step);
    add(score, others, across(holder, step));
  }
};

// A code by its distance; of equal ones the lowest. What is not a number is far.
struct alignas(16) Exact {
  double distance = INFINITY;
  int code = INT32_MAX;

  __device__ __forceinline__ void add(double d, int k) {
    if (d < distance || (d == distance && k < code)) {
      distance = d;
      code = k;
    }
  }
  __device__ __forceinline__ void add_across(int step) {
    const double d = across(distance, step);
    add(d, across(code, step));
  }
};

struct Launch {
  EncodeArgs args;
  EncodePlan plan;
};

// What a block has found for a row: ends between which its best score is, what its others are above, the code.
struct alignas(16) Found {
  float low, high, others;
  int code;
};

struct Block {
  const EncodeArgs& args;
  const EncodePlan& plan;
  uint32_t* const memory;
  const int rank, thread, warp, lane;

  __device__ __forceinline__ Block(const EncodeArgs& args, const EncodePlan& plan)
      : args(args),
        plan(plan),
        memory(shared_memory()),
        rank(cluster_rank()),
        thread(threadIdx.x),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {}

  __device__ __forceinline__ float* floats(int at) const { return reinterpret_cast<float*>(memory + at); }
  __device__ __forceinline__ int* ints(int at) const { return reinterpret_cast<int*>(memory + at); }
  __device__ __forceinline__ float4& four(int at, int index) const {
    return reinterpret_cast<float4*>(memory + at)[index];
  }
  // Whether squares of a code are beyond what float32 has, and its scores unknown.
  __device__ __forceinline__ int* beyond() const { return ints(plan.open) + 1 + kPyramidPixels / 4; }
  __device__ __forceinline__ uint16_t* chosen() const { return reinterpret_cast<uint16_t*>(memory + plan.chosen); }
  __device__ __forceinline__ Found* found() const { return reinterpret_cast<Found*>(memory + plan.found); }
  __device__ __forceinline__ const float4* lines_of(int other) const {
    return reinterpret_cast<const float4*>(shared_of(memory + plan.rest, other));
  }
  // The first code of the block, and how many there are.
  __device__ __forceinline__ int first_code() const { return rank * plan.own; }
  __device__ __forceinline__ int codes() const { return max(0, min(plan.own, args.num_codes - first_code())); }
  __device__ __forceinline__ int lines() const { return max(0, min(plan.lines, args.height - rank * plan.lines)); }
};

// The block's codes, split, in the order in which lanes take them; half and length of each.
template <typename T>
__device__ __forceinline__ void load_codes(const Block& block) {
  uint4* const book = reinterpret_cast<uint4*>(block.memory);
  const T* const table = static_cast<const T*>(block.args.codebook) + int64_t(block.first_code()) * block.args.entry;
  const int known = block.codes();
  if (block.thread == 0) *block.beyond() = 0;
  __syncthreads();
#pragma unroll 2
  for (int at = block.thread; at < block.plan.own * 4; at += kThreads) {
    const int code = at / 4, j = at % 4, lane = code % kTile * 4 + j;
    float4 part[2] = {};
    if (code < known) {
      part[0] = load_four(table + int64_t(code) * block.args.entry + 4 * j);
      part[1] = load_four(table + int64_t(code) * block.args.entry + 16 + 4 * j);
    }
    uint4 high, low;
    split(part[0].x, part[0].y, high.x, low.x);
    split(part[0].z, part[0].w, high.y, low.y);
    split(part[1].x, part[1].y, high.z, low.z);
    split(part[1].z, part[1].w, high.w, low.w);
    book[code / kTile * 64 + lane] = high;
    book[code / kTile * 64 + 32 + lane] = low;
    double square = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      square += double(part[h].x) * part[h].x + double(part[h].y) * part[h].y + double(part[h].z) * part[h].z +
                double(part[h].w) * part[h].w;
    square += across(square, 1);
    square += across(square, 2);
    if (j == 0) {
      float* const norm = block.floats(block.plan.norms) + 2 * code;
      norm[0] = code < known ? float(0.5 * square) * (1 - kSlope) : INFINITY;
      norm[1] = sqrtf(float(square));
      if (!(square < 1e37)) *block.beyond() = 1;
    }
  }
}

// The convolution of a scale, for all to read.
template <typename T>
__device__ __forceinline__ void load_weights(const Block& block, int p) {
  constexpr int kPacks = kChannels * kSum / 4;
  const T* const from = static_cast<const T*>(block.args.weight) + p * kChannels * kSum;
#pragma unroll
  for (int n = 0; n < (kPacks + kThreads - 1) / kThreads; ++n) {
    const int pack = block.thread + n * kThreads;
    if (pack < kPacks)
      block.four(block.plan.weights + weight_at(pack / (kSum / 4), pack % (kSum / 4)), 0) = load_four(from + 4 * pack);
  }
}

template <typename T>
__device__ __forceinline__ void load_features(const Block& block, int picture) {
  const EncodeArgs& args = block.args;
  const T* const from = static_cast<const T*>(args.features) + picture * args.features_b;
  const int size = block.lines() * args.width;
  for (int at = block.thread; at < (size + 7) / 8 * 8 * kChannels; at += kThreads) {
    const int pixel = at / (8 * kChannels) * 8 + at % 8, channel = at / 8 % kChannels;
    if (pixel >= size) continue;
    const int y = block.rank * block.plan.lines + pixel / args.width, x = pixel % args.width;
    block.floats(block.plan.rest)[pixel * kChannels + channel] =
        wide(from[channel * args.features_c + y * args.features_y + x * args.features_x]);
  }
}

// The rows of a scale, from the lines of all blocks, to the zone.
__device__ __forceinline__ void average(const Block& block, int h, int w) {
  const EncodeArgs& args = block.args;
  const int count = h * w, q = block.thread % 8;
  int parts = 1;  // of a row, the sums of every so many lines
  while (parts < 16 && count * parts * 2 <= kUnits) parts *= 2;
  const int apart = block.plan.zone + kRows * kChannels;
  for (int at = block.thread / 8; at < count * parts; at += kUnits) {
    const int row = at / parts, i = row / w, j = row % w;
    const int top = i * args.height / h, bottom = ((i + 1) * args.height + h - 1) / h;
    const int left = j * args.width / w, right = ((j + 1) * args.width + w - 1) / w;
    float4 sum = {};
    for (int y = top + at % parts; y < bottom; y += 2 * parts) {
      const float4* line[2];  // none of the second where it is beyond
      bool present[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        present[n] = y + n * parts < bottom;
        const int own = present[n] ? y + n * parts : y, owner = own / block.plan.lines;
        line[n] = block.lines_of(owner) + (own - owner * block.plan.lines) * args.width * 8 + q;
      }
      for (int x = left; x < right; x += 4) {
        float4 value[2][4];  // all on their way before the first is used
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          value[n / 4][n % 4] = {};
          if (present[n / 4] && x + n % 4 < right) value[n / 4][n % 4] = line[n / 4][(x + n % 4) * 8];
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) sum = add(sum, value[n / 4][n % 4]);
      }
    }
    if (parts == 1) {
      const float down = float(bottom - top), wide_ = float(right - left);
      block.four(block.plan.zone, row * 8 + q) = {sum.x / down / wide_, sum.y / down / wide_, sum.z / down / wide_,
                                                 sum.w / down / wide_};
    } else {
      block.four(apart, at * 8 + q) = sum;
    }
  }
  __syncthreads();
  if (parts == 1) return;
  if (block.thread / 8 < count) {
    const int row = block.thread / 8, i = row / w, j = row % w;
    const float down = float(((i + 1) * args.height + h - 1) / h - i * args.height / h);
    const float wide_ = float(((j + 1) * args.width + w - 1) / w - j * args.width / w);
    float4 sum = {};
    for (int part = 0; part < parts; ++part) sum = add(sum, block.four(apart, (row * parts + part) * 8 + q));
    block.four(block.plan.zone, row * 8 + q) = {sum.x / down / wide_, sum.y / down / wide_, sum.z / down / wide_,
                                               sum.w / down / wide_};
  }
  __syncthreads();
}

// Where a warp leaves what it found in a block of rows: behind the rows. Strictly ascending along the way that warps, and
// each in turn, go.
__device__ __forceinline__ Nearest* found_at(const Block& block, int blocks, int warp, int rows) {
  return reinterpret_cast<Nearest*>(block.memory + block.plan.zone + blocks * kRows * kChannels) +
         (warp + rows) * kRows;
}

// The block's codes from tile `tile` to `end`, two tiles at a time, for kHalves times 16 rows.
template <int kHalves>
__device__ __forceinline__ void search_tiles(const Block& block, int tile, int end, const uint32_t (&high)[2][2][4],
                                             const uint32_t (&low)[2][2][4], const float (&radius)[4],
                                             Nearest (&nearest)[4]) {
  const uint4* const book = reinterpret_cast<const uint4*>(block.memory);
  for (; tile < end; tile += 2) {
    float score[2][kHalves][4];
    uint4 upper[2], lower[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float4 norm = block.four(block.plan.norms, (tile + t) * 4 + block.lane % 4);
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) {
        score[t][i / 2][i % 2 * 2] = norm.x - radius[i] * norm.y;
        score[t][i / 2][i % 2 * 2 + 1] = norm.z - radius[i] * norm.w;
      }
      upper[t] = book[(tile + t) * 64 + block.lane];
      lower[t] = book[(tile + t) * 64 + 32 + block.lane];
    }
#pragma unroll
    for (int product = 0; product < 6; ++product) {
#pragma unroll
      for (int n = 0; n < 2 * kHalves; ++n) {
        const int t = n / kHalves, i = n % kHalves, k = product % 2;
        const uint4 book_part = product / 2 == 1 ? lower[t] : upper[t];
        multiply_add(score[t][i], product / 2 == 0 ? low[i][k] : high[i][k], k ? book_part.z : book_part.x,
                     k ? book_part.w : book_part.y);
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * kHalves; ++r) {
      const float(&one)[4] = score[0][r / 2], (&two)[4] = score[1][r / 2];
      const int at = r % 2 * 2;
      nearest[r].add(fminf(fminf(one[at], one[at + 1]), fminf(two[at], two[at + 1])), tile);
    }
  }
}

// Each warp goes through its share of the products of all rows and the block's codes.
__device__ __forceinline__ void search(const Block& block, int count) {
  const int blocks = (count + kRows - 1) / kRows, chunks = block.plan.own / kChunk, items = blocks * chunks;
  const int row = block.lane / 4, j = block.lane % 4;
  const int last = (block.warp + 1) * items / kWarps;
  for (int item = block.warp * items / kWarps; item < last;) {
    const int rows = item / chunks, stop = min(last, (rows + 1) * chunks);
    uint32_t high[2][2][4], low[2][2][4];  // rows 16 i to 16 i + 15 and half of the channels, all times -1
    float radius[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      // Odd rows begin with the other half, so that lanes read from all banks.
      const int at = (rows * kRows + r * 8 + row) * 8 + j;
      const float4 one = block.four(block.plan.zone, at + row % 2 * 4);
      const float4 two = block.four(block.plan.zone, at + 4 - row % 2 * 4);
      const float4 part[2] = {row % 2 ? two : one, row % 2 ? one : two};
      float square = dot(one, one) + dot(two, two);
      square += across(square, 1);
      square += across(square, 2);
      radius[r] = kSlope * sqrtf(square);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        split(-part[k].x, -part[k].y, high[r / 2][k][r % 2], low[r / 2][k][r % 2]);
        split(-part[k].z, -part[k].w, high[r / 2][k][2 + r % 2], low[r / 2][k][2 + r % 2]);
      }
    }
    Nearest nearest[4];
    const int first = (item - rows * chunks) * (kChunk / kTile), end = (stop - rows * chunks) * (kChunk / kTile);
    if (count - rows * kRows > 16) {
      search_tiles<2>(block, first, end, high, low, radius, nearest);
    } else {
      search_tiles<1>(block, first, end, high, low, radius, nearest);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      nearest[r].holder = nearest[r].holder * 4 + j;
      nearest[r].add_across(1);
      nearest[r].add_across(2);
      if (j == 0) found_at(block, blocks, block.warp, rows)[r * 8 + row] = nearest[r];
    }
    item = stop;
  }
  __syncthreads();
}

// |z - e|^2 in float64.
template <typename T>
__device__ __forceinline__ double distance_of(const Block& block, int row, int code) {
  const T* const entry = static_cast<const T*>(block.args.codebook) + int64_t(code) * block.args.entry;
  float4 part[8];
#pragma unroll
  for (int q = 0; q < 8; ++q) part[q] = load_four(entry + 4 * q);
  double sum[2] = {};
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    const float4 z = block.four(block.plan.zone, row * 8 + q);
    const double x = double(z.x) - part[q].x, y = double(z.y) - part[q].y;
    const double u = double(z.z) - part[q].z, v = double(z.w) - part[q].w;
    sum[0] += x * x + y * y;
    sum[1] += u * u + v * v;
  }
  const double distance = sum[0] + sum[1];
  return distance < INFINITY ? distance : INFINITY;
}

// The block's nearest of every row: found.
template <typename T>
__device__ __forceinline__ void decide(const Block& block, int count) {
  const int blocks = (count + kRows - 1) / kRows, chunks = block.plan.own / kChunk, items = blocks * chunks;
  const int j = block.lane % 4, known = block.codes(), first = block.first_code();
  if (block.thread == 0) *block.ints(block.plan.open) = 0;
  for (int begin = block.warp * 8; begin < count; begin += kThreads / 4) {
    const int row = begin + block.lane / 4, at = min(row, count - 1), rows = at / kRows;
    Nearest nearest;
#pragma unroll
    for (int n = 0; n < kWarps / 4; ++n) {
      const int warp = n * 4 + j, from = warp * items / kWarps, to = (warp + 1) * items / kWarps;
      if (from < to && from < (rows + 1) * chunks && to > rows * chunks) {
        const Nearest one = found_at(block, blocks, warp, rows)[at % kRows];
        nearest.add(one.best, one.other, one.holder);
      }
    }
    nearest.add_across(1);
    nearest.add_across(2);
    // Four lanes have a code each.
    const int mine = (nearest.holder / 4 + j / 2) * kTile + nearest.holder % 4 * 2 + j % 2;
    const T* const entry =
        static_cast<const T*>(block.args.codebook) + int64_t(first + min(mine, known - 1)) * block.args.entry;
    float4 part[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) part[q] = known > 0 ? load_four(entry + 4 * q) : float4{};
    float square = 0, norm = 0, product = 0;
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const float4 z = block.four(block.plan.zone, at * 8 + q);
      square += dot(z, z);
      norm += dot(part[q], part[q]);
      product += dot(z, part[q]);
    }
    float fine = kFine * (sqrtf(square) * sqrtf(norm) + 0.5f * norm) + kLeast;
    const float others = *block.beyond() ? -INFINITY : nearest.other;
    nearest.best = mine < known ? 0.5f * norm - product : INFINITY;
    nearest.other = INFINITY;
    nearest.holder = first + mine;
    fine = mine < known ? fine : 0;
    nearest.add_across(1);
    nearest.add_across(2);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float most = across(fine, step);
      fine = most <= fine ? fine : most + fine * 0;  // what is not a number stays such
    }
    if (row < count && j == 0)
      block.found()[row] = {nearest.best - fine, nearest.best + fine, fminf(others, nearest.other - fine),
                            nearest.holder};
  }
}

// A row that float32 leaves open, by all codes of all blocks: nearest of the block, to where others look for it.
template <typename T>
__device__ __forceinline__ void compare_all(const Block& block, int row, Exact* exact_of_warp, Exact* found) {
  const int known = block.codes(), first = block.first_code();
  Exact exact;
  for (int code = block.thread; code < known; code += kThreads)
    exact.add(distance_of<T>(block, row, first + code), first + code);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) exact.add_across(step);
  if (block.lane == 0) exact_of_warp[block.warp] = exact;
  __syncthreads();
  if (block.thread == 0) {
    for (int other = 1; other < kWarps; ++other) exact.add(exact_of_warp[other].distance, exact_of_warp[other].code);
    *found = exact;
  }
  __syncthreads();
}

// The nearest of all blocks: chosen, and the result. Weights of the upsampling, if another scale follows.
template <typename T>
__device__ __forceinline__ void choose(const Block& block, int count, int h, int w, int64_t* out, bool part) {
  const EncodeArgs& args = block.args;
  const int border = args.convolved ? 1 : 0;
  int* const open = block.ints(block.plan.open);  // how many rows are, and which
  uint8_t* const open_rows = reinterpret_cast<uint8_t*>(open + 1);
  uint16_t* const chosen = block.chosen();
  for (int row = block.thread; row < count; row += kThreads) {
    Found best{INFINITY, INFINITY, INFINITY, 0};
    float others = INFINITY;
    bool sound = true;
#pragma unroll 4
    for (int other = 0; other < block.plan.blocks; ++other) {
      const Found one = *reinterpret_cast<const Found*>(shared_of(block.memory + block.plan.found + 4 * row, other));
      others = fminf(others, fminf(one.high < best.high ? best.low : one.low, one.others));
      best = one.high < best.high ? one : best;
      sound = sound && one.others == one.others && one.high == one.high;
    }
    if (sound && others > best.high) {
      chosen[row] = best.code;
      if (block.rank == 0) out[row] = best.code;
    } else {
      open_rows[atomicAdd(open, 1)] = row;
    }
  }
  const int down = block.plan.lines + 2 * border;
  for (int at = kThreads - 1 - block.thread; part && at < down + block.plan.stride; at += kThreads) {
    const bool vertical = at < down;
    const int spot = vertical ? block.rank * block.plan.lines + at - border : at - down - border;
    const int low = vertical ? h : w, size = vertical ? args.height : args.width;
    const float place = (float(spot) + 0.5f) * (float(low) / float(size)) - 0.5f;
    const int begin = int(floorf(place)) - 1;
    block.four(block.plan.taps, 2 * at) = cubic(place);
    reinterpret_cast<int4*>(block.memory + block.plan.taps)[2 * at + 1] = {
        min(max(begin, 0), low - 1), min(max(begin + 1, 0), low - 1), min(max(begin + 2, 0), low - 1),
        min(max(begin + 3, 0), low - 1)};
  }
  __syncthreads();
  const int left = *open;  // the same in all blocks
  if (left == 0) return;
  const int blocks = (count + kRows - 1) / kRows;
  uint32_t* const behind = block.memory + block.plan.zone + blocks * kRows * kChannels;  // what the search found is over
  Exact* const exact = reinterpret_cast<Exact*>(behind);
  for (int n = 0; n < left; ++n)
    compare_all<T>(block, open_rows[n], exact + kPyramidPixels, exact + open_rows[n]);
  cluster_arrive();
  cluster_wait();
  for (int n = block.thread; n < left; n += kThreads) {
    const int row = open_rows[n];
    Exact best;
    for (int other = 0; other < block.plan.blocks; ++other) {
      const Exact one = *reinterpret_cast<const Exact*>(shared_of(behind + 4 * row, other));
      best.add(one.distance, one.code);
    }
    chosen[row] = min(best.code, args.num_codes - 1);
    if (block.rank == 0) out[row] = chosen[row];
  }
  cluster_arrive();
  cluster_wait();
}

// The chosen rows of the codebook that the block's lines need, then these lines with their border, upsampled.
template <typename T>
__device__ __forceinline__ void upsample(const Block& block, int h, int w) {
  const EncodeArgs& args = block.args;
  const T* const table = static_cast<const T*>(args.codebook);
  const int border = args.convolved ? 1 : 0, q = block.thread % 8;
  const int down = block.plan.lines + 2 * border, first = block.rank * block.plan.lines - border;
  const int4* const index = reinterpret_cast<const int4*>(block.memory + block.plan.taps);
  const int from = index[1].x * w, to = (index[2 * (down - 1) + 1].w + 1) * w;
  for (int at = block.thread / 8; at < to - from; at += kUnits)
    block.four(block.plan.zone, at * 8 + q) =
        load_four(table + int64_t(block.chosen()[from + at]) * args.entry + 4 * q);
  __syncthreads();
  for (int at = block.thread / 8; at < down * block.plan.stride; at += kUnits) {
    const int y = at / block.plan.stride, x = at % block.plan.stride;
    float4 sum = {};
    if (unsigned(first + y) < unsigned(args.height) && unsigned(x - border) < unsigned(args.width)) {
      const float4 above = block.four(block.plan.taps, 2 * y), beside = block.four(block.plan.taps, 2 * (down + x));
      const int4 rows = index[2 * y + 1], columns = index[2 * (down + x) + 1];
      const float by[4] = {above.x, above.y, above.z, above.w}, along[4] = {beside.x, beside.y, beside.z, beside.w};
      const int i[4] = {rows.x, rows.y, rows.z, rows.w}, j[4] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float4 line = {};
#pragma unroll
        for (int b = 0; b < 4; ++b)
          line = add(line, scaled(block.four(block.plan.zone, (i[a] * w - from + j[b]) * 8 + q), along[b]));
        sum = add(sum, scaled(line, by[a]));
      }
    }
    block.four(block.plan.strip, at * 8 + q) = sum;
  }
  __syncthreads();
}

// Subtracts the part from the block's lines.
template <typename T>
__device__ __forceinline__ void subtract(const Block& block, int p) {
  const EncodeArgs& args = block.args;
  const int runs = (args.width + kRun - 1) / kRun, groups = block.plan.lines * runs;
  const int pairs = (groups + 1) / 2;
  int splits = 1;  // of the input channels
  while (splits < 8 && pairs * splits * 2 <= kWarps) splits *= 2;
  const int kept = max(splits / 2, 1);  // parts of a sum that are left for the end
  if (args.convolved) {
    // A lane has two output channels of a run of pixels; half of a warp another run.
    const int half = block.lane / 16, channel = block.lane % 16;
    for (int begin = 0; begin < pairs * splits; begin += kWarps) {
      const int task = begin + block.warp, share = task / pairs, group = task % pairs * 2 + half;
      const bool present = task < pairs * splits && group < groups;
      float sum[2][kRun] = {};
      if (task < pairs * splits) {
        const int y = min(group, groups - 1) / runs, x = min(group, groups - 1) % runs * kRun;
        for (int q = share * 8 / splits; q < (share + 1) * 8 / splits; ++q) {
          float own[2][4 * kTaps];
#pragma unroll
          for (int n = 0; n < 2 * kTaps; ++n) {
            const int o = n / kTaps, at = n % kTaps;
            const float4 four = block.four(block.plan.weights + weight_at(o * 16 + channel, q * kTaps + at), 0);
            own[o][4 * at] = four.x, own[o][4 * at + 1] = four.y;
            own[o][4 * at + 2] = four.z, own[o][4 * at + 3] = four.w;
          }
#pragma unroll
          for (int ty = 0; ty < 3; ++ty) {
#pragma unroll
            for (int spot = 0; spot < kRun + 2; ++spot) {
              const float4 four = block.four(block.plan.strip, ((y + ty) * block.plan.stride + x + spot) * 8 + q);
              const float input[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
              for (int tx = 0; tx < 3; ++tx) {
                if (spot < tx || spot - tx >= kRun) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  sum[0][spot - tx] += input[i] * own[0][i * kTaps + ty * 3 + tx];
                  sum[1][spot - tx] += input[i] * own[1][i * kTaps + ty * 3 + tx];
                }
              }
            }
          }
        }
      }
      float* const to = block.floats(block.plan.zone) + (share % kept * groups + group) * kRun * kChannels + channel;
      // The later half of the parts first; the others are added where they are.
      if (splits > 1) {
        if (present && share >= kept) {
#pragma unroll
          for (int n = 0; n < 2 * kRun; ++n) to[n / 2 * kChannels + n % 2 * 16] = sum[n % 2][n / 2];
        }
        __syncthreads();
      }
      if (present && share < kept) {
#pragma unroll
        for (int n = 0; n < 2 * kRun; ++n) {
          float& at = to[n / 2 * kChannels + n % 2 * 16];
          at = splits > 1 ? at + sum[n % 2][n / 2] : sum[n % 2][n / 2];
        }
      }
    }
    __syncthreads();
  }
  const int size = block.lines() * args.width, border = args.convolved ? 1 : 0, q = block.thread % 8;
  const float ratio = args.ratio;
  for (int pixel = block.thread / 8; pixel < size; pixel += kUnits) {
    const int y = pixel / args.width, x = pixel % args.width;
    float4 part = block.four(block.plan.strip, ((y + border) * block.plan.stride + x + border) * 8 + q);
    if (args.convolved) {
      float4 convolved = load_four(static_cast<const T*>(args.bias) + p * kChannels + 4 * q);
      const int at = ((y * runs + x / kRun) * kRun + x % kRun) * 8 + q;
      for (int share = 0; share < kept; ++share)
        convolved = add(convolved, block.four(block.plan.zone, at + share * groups * kRun * 8));
      part = add(scaled(part, 1 - ratio), scaled(convolved, ratio));
    }
    float4& rest = block.four(block.plan.rest, pixel * 8 + q);
    rest = {rest.x - part.x, rest.y - part.y, rest.z - part.z, rest.w - part.w};
  }
}

// Grid: clusters, each of which takes every so many pictures.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    encode_kernel(const __grid_constant__ Launch launch) {
  const EncodeArgs& args = launch.args;
  const EncodePlan& plan = launch.plan;
  const Block block(args, plan);
  load_codes<T>(block);
  int held = -1;  // the convolution that is there
  for (int picture = blockIdx.x / plan.blocks; picture < args.batch; picture += plan.clusters) {
    load_features<T>(block, picture);
    if (args.convolved && held != args.phi[0]) load_weights<T>(block, held = args.phi[0]);
    int64_t* out = args.codes + int64_t(picture) * args.length;
    for (int step = 0; step < args.steps; ++step) {
      const int h = args.h[step], w = args.w[step], count = h * w;
      const bool part = step + 1 < args.steps;
      cluster_arrive();
      if (step > 0 && part && args.convolved && held != args.phi[step]) load_weights<T>(block, held = args.phi[step]);
      cluster_wait();
      average(block, h, w);
      search(block, count);
      decide<T>(block, count);
      cluster_arrive();
      cluster_wait();
      choose<T>(block, count, h, w, out, part);
      out += count;
      if (!part) continue;
      upsample<T>(block, h, w);
      subtract<T>(block, args.phi[step]);
    }
  }
  cluster_arrive();  // others may still look at this block's memory
  cluster_wait();
}

// Words of a block's shared memory where clusters have `blocks`.
EncodePlan lay_out(const EncodeArgs& args, int blocks) {
  EncodePlan plan;
  const int border = args.convolved ? 1 : 0;
  plan.blocks = blocks;
  plan.own = ((args.num_codes + blocks - 1) / blocks + kChunk - 1) / kChunk * kChunk;
  plan.lines = (args.height + blocks - 1) / blocks;
  const int runs = (args.width + kRun - 1) / kRun, groups = plan.lines * runs;
  plan.stride = runs * kRun + 2 * border;
  int words = plan.own * kChannels;
  const auto take = [&](int count) {
    const int at = words;
    words += (count + 3) / 4 * 4;
    return at;
  };
  plan.norms = take(2 * plan.own);
  plan.rest = take(plan.lines * args.width * kChannels);
  plan.weights = take(args.convolved ? kChannels * kSum : 0);
  plan.found = take(kPyramidPixels * int(sizeof(Found) / 4));
  plan.chosen = take(kPyramidPixels / 2);
  plan.open = take(2 + kPyramidPixels / 4);
  plan.taps = take((plan.lines + 2 * border + plan.stride) * 8);
  // What the search works on, then in its place the chosen rows or the parts of sums, and the lines upsampled.
  int searched = (kRows + kUnits) * kChannels, upsampled = std::max(groups, kWarps) * kRun * kChannels;
  for (int step = 0; step < args.steps; ++step) {
    const int h = args.h[step], w = args.w[step], rows = (h * w + kRows - 1) / kRows;
    searched = std::max(searched, rows * kRows * kChannels + (kWarps + rows) * kRows * int(sizeof(Nearest) / 4));
    if (step + 1 == args.steps) continue;
    const int most = std::min(h, (plan.lines + 2 * border) * h / args.height + 5);
    upsampled = std::max(upsampled, most * w * kChannels);
  }
  plan.zone = take(0);
  plan.strip = plan.zone + upsampled;
  take(std::max(searched, upsampled + (plan.lines + 2 * border) * plan.stride * kChannels));
  plan.words = words;
  return plan;
}

// Clusters of so many blocks, with all shared memory, that the device runs at the same time; asked once a device.
cudaError_t clusters_of(int device, int shared, int log2, int* clusters) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][4];  // clusters + 1; 0 if not asked yet
  if (device < kDevices && known[device][log2] != 0) {
    *clusters = known[device][log2] - 1;
    return cudaSuccess;
  }
  *clusters = 0;
  int supported = 0, processors = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device);
      error != cudaSuccess)
    return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  if (supported) {
    const auto kernel = encode_kernel<float>;
    if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        error != cudaSuccess)
      return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1u << log2, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(processors >> log2 << log2);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (const cudaError_t error =
            cudaOccupancyMaxActiveClusters(clusters, reinterpret_cast<const void*>(kernel), &config);
        error != cudaSuccess)
      return error;
    *clusters = std::min(*clusters, processors >> log2);
  }
  if (device < kDevices) known[device][log2] = *clusters + 1;
  return cudaSuccess;
}

template <typename T>
cudaError_t launch(const EncodeArgs& args, const EncodePlan& plan, cudaStream_t stream) {
  const auto kernel = encode_kernel<T>;
  if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, 4 * plan.words);
      error != cudaSuccess)
    return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.clusters * plan.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = 4 * plan.words;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Launch{args, plan});
}

}  // namespace

cudaError_t plan_encode(const EncodeArgs& args, EncodePlan* plan) {
  *plan = EncodePlan{};
  if (args.height * args.width > kPyramidPixels || args.steps > kPyramidScales) return cudaSuccess;
  int device = 0, shared = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess)
    return error;
  // By what was measured a picture takes .213 ms with four blocks, .167 with eight: half of the former is shared.
  int64_t least = INT64_MAX;
  for (int log2 = 0; log2 < 4; ++log2) {
    EncodePlan one = lay_out(args, 1 << log2);
    if (4 * one.words > shared) continue;
    int clusters = 0;
    if (const cudaError_t error = clusters_of(device, shared, log2, &clusters); error != cudaSuccess) return error;
    if (clusters == 0) continue;
    one.clusters = std::min(clusters, args.batch);
    const int64_t rounds = (args.batch + clusters - 1) / clusters;
    const int64_t time = rounds * (8 + 32 / one.blocks);
    if (time >= least) continue;
    least = time;
    *plan = one;
  }
  return cudaSuccess;
}

cudaError_t launch_encode(const EncodeArgs& args, const EncodePlan& plan, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(args, plan, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(args, plan, stream);
    case DType::kFloat16:
      return launch<__half>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace unifiedar
