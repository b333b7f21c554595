// Depth-transformer decoding in one launch: a block on every multiprocessor streams its share of the weights from the
// first depth to the last, and all wait for each other between one matrix and the next.
//
// A matrix is cut into tiles of 16 outputs; a block computes whole tiles (every gridDim-th), its 8 warps sharing the
// inputs by chunks of 64, and adds their parts in shared memory in the order of the warps: no partial sums between blocks,
// no atomics on numbers, one result. Weights lie packed as the matrix units take them (see DepthLayout), so that a lane
// loads its 16 bytes of a 16 x 16 piece from global memory to registers. Each warp has four chunks (16 loads a lane, 64 KB
// a block) in flight; the next matrix' first four are asked for before the wait for what it is multiplied with, and the
// ones behind them are fetched into the second cache. So memory works while blocks wait.
//
// The k-th input of a 64-wide chunk goes where its lane can read eight neighbours at once: piece j (0..3) of the chunk has
// at column slot 2 t + e of the instruction the input 32 (j / 2) + 8 t + 4 (j % 2) + e, and at slot 2 t + 8 + e the one two
// further (t = lane % 4, e = 0, 1). Which input a slot stands for does not matter, as long as both operands agree.
#include "depth.h"

#include <algorithm>

#include "depth_device.cuh"
#include "device/cluster.cuh"
#include "device/entries.cuh"

namespace unifiedar {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // few, so that each has registers for its loads in flight
constexpr int kSlots = 4;                  // chunks that a warp has in flight
constexpr int kChunk = 64;                 // inputs that a warp takes at a time
constexpr int kPieces = 4;                 // 16 x 16 pieces of a chunk
constexpr int kChunkLoads = kPieces * 32;  // 16-byte loads of a chunk
constexpr int kRedPitch = 20;              // floats between columns of a tile in shared memory: no bank conflicts
constexpr int kRedTiles = 4;               // tiles that are added up together, times rows / 8
constexpr int kRedBytes = kWarps * kRedTiles * 8 * kRedPitch * 4;
constexpr int kStatBytes = kMaxDepthRows * kWarps * 8;
constexpr int kStageAt = kRedBytes + kStatBytes;
constexpr int kPad = 64;                   // bytes between staged rows: two rows and four lanes of each cover all banks
constexpr int kHeld = 4;                   // packs of four numbers of a row that a lane keeps between the passes of a norm
constexpr int kAhead = 48, kAheadDrawing = 96;  // chunks that a block fetches into the second cache (2 KB each)
constexpr int kAttentionBytes = 160 << 10;  // queries, keys and values that every block may read for itself

__host__ __device__ constexpr int padded(int size, int to) { return (size + to - 1) / to * to; }

// Where `packed` has what, in elements. Matrices are [tiles of 16][chunks of 64][4][32 lanes][8], both sides padded with
// zeros; lane l's eight are rows l / 4, l / 4 + 8 of slots 2 t + e, then of slots 2 t + 8 + e.
struct DepthLayout {
  int64_t code, hidden, blocks, head;                        // matrices
  int64_t position, code_bias, hidden_bias, vectors, norm, head_bias, end;  // vectors; norm: gain and bias
  int64_t block, qkv, proj, up, down;                        // a block's matrices, and where they are in it
  int64_t block_vectors;                                     // norm1 gain, bias; qkv, proj; norm2 gain, bias; up, down

  static int64_t matrix(int64_t outputs, int64_t inputs) {
    return (outputs + 15) / 16 * 16 * ((inputs + kChunk - 1) / kChunk * kChunk);
  }
  explicit DepthLayout(const DepthSizes& s) {
    const int64_t dim = s.dim;
    code = 0;
    hidden = code + matrix(dim, s.code_dim);
    blocks = hidden + (s.hidden_dim ? matrix(dim, s.hidden_dim) : 0);
    qkv = 0;
    proj = qkv + matrix(3 * dim, dim);
    up = proj + matrix(dim, dim);
    down = up + matrix(4 * dim, dim);
    block = down + matrix(dim, 4 * dim);
    head = blocks + s.layers * block;
    position = head + matrix(s.num_codes, dim);
    code_bias = position + s.depth * dim;
    hidden_bias = code_bias + dim;
    vectors = hidden_bias + (s.hidden_dim ? dim : 0);
    block_vectors = 13 * dim;
    norm = vectors + s.layers * block_vectors;
    head_bias = norm + 2 * dim;
    end = head_bias + s.num_codes;
  }
};

enum Step { kInput, kQkv, kProj, kUp, kDown, kHead };

struct Matrix {
  const uint4* weights;
  int tiles, chunks;
};

// Division by a number that is known at the launch: exact where value times number is below 2^32.
struct Divisor {
  uint32_t number, inverse;
  explicit Divisor(int number) : number(number), inverse(uint32_t((uint64_t(1) << 32) / number + 1)) {}
  __device__ __forceinline__ int quotient(int value) const {
    return number == 1 ? value : int(uint64_t(uint32_t(value)) * inverse >> 32);
  }
};

// Tiles of a matrix that are the block's: those from blockIdx.x on, every gridDim.x-th.
__device__ __forceinline__ int own_tiles(const Matrix& matrix, const Divisor& blocks) {
  const int rest = matrix.tiles - int(blockIdx.x);
  return rest > 0 ? blocks.quotient(rest + int(blocks.number) - 1) : 0;
}

template <typename T>
__device__ __forceinline__ float wide(T value);
template <>
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
__device__ __forceinline__ float wide(__half value) { return __half2float(value); }
template <>
__device__ __forceinline__ float wide(float value) { return value; }
template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16(value); }
template <>
__device__ __forceinline__ __half narrow(float value) { return __float2half(value); }
template <>
__device__ __forceinline__ float narrow(float value) { return value; }

// Activations are written by other blocks: read from the second cache, where they are.
__device__ __forceinline__ uint4 load_shared_by_all(const void* from) { return __ldcg(static_cast<const uint4*>(from)); }

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&value)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = unpack_word(words[w], T{});
    value[2 * w] = pair.x;
    value[2 * w + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&value)[8]) {
  return {pack_word(value[0], value[1], T{}), pack_word(value[2], value[3], T{}), pack_word(value[4], value[5], T{}),
          pack_word(value[6], value[7], T{})};
}

// Chunks of a tile that are a warp's.
__device__ __forceinline__ int own_chunks(int chunks, int warp) { return int(uint32_t(chunks - warp + kWarps - 1) / kWarps); }

// The weights that a warp reads of one matrix after another. Unit u of a matrix is chunk warp + 8 (u % own) of the
// block's tile u / own.
struct Stream {
  uint4 ring[kSlots][kPieces];
  const uint4* next;  // of the unit that is asked for next
  int own;            // chunks of a tile that are this warp's
  int chunk, left;    // of those the next one; units not asked for yet
  int64_t over;       // from a tile's last chunk of this warp to the next tile's first
  int tiles;          // of the block
  bool started;

  __device__ __forceinline__ void aim(const Matrix& matrix, const Divisor& blocks) {
    const int warp = threadIdx.x / 32;
    tiles = own_tiles(matrix, blocks);
    own = own_chunks(matrix.chunks, warp);
    chunk = 0;
    left = tiles * own;
    over = (int64_t(gridDim.x) * matrix.chunks - int64_t(own - 1) * kWarps) * kChunkLoads;
    next = matrix.weights + (int64_t(blockIdx.x) * matrix.chunks + warp) * kChunkLoads + threadIdx.x % 32;
    started = false;
  }

  __device__ __forceinline__ void start() {
    started = true;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) ask(slot);
  }

  // The slot must be known to the compiler: registers have no index.
  __device__ __forceinline__ void ask(int slot) {
    if (left <= 0) return;
    --left;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) ring[slot][i] = load_weights(next + i * 32);
    if (++chunk == own) {
      chunk = 0;
      next += over;
    } else {
      next += kWarps * kChunkLoads;
    }
  }
};

// Has chunks first .. last - 1 of the block's share of a matrix fetched into the second cache, by one warp.
__device__ __forceinline__ int fetch_share(const Matrix& matrix, const Divisor& blocks, int first, int last) {
  const int end = min(last, own_tiles(matrix, blocks) * matrix.chunks);
  for (int i = first + int(threadIdx.x % 32); i < end; i += 32) {
    const int tile = i / matrix.chunks, chunk = i - tile * matrix.chunks;
    fetch_ahead(matrix.weights + ((int64_t(tile) * gridDim.x + blockIdx.x) * matrix.chunks + chunk) * kChunkLoads);
  }
  return last - max(end, first);
}

// ---- drawing a code --------------------------------------------------------------------------------------------------
// What is decided here is decided by the numbers of unifiedar/ops/sample.py: scores as integers of their order, weights
// rounded to float32, sums of integers.

constexpr int kNaN = 0x7fffffff, kInfinite = 0x7f800000, kLeast = -0x7f800001;  // as integers: NaN, inf, -inf
constexpr int kBins = 2048, kCopies = 4;  // of a histogram: copies keep lanes from waiting for each other
constexpr int kListed = 4096;             // entries that a list holds
constexpr int kListAt = kBins * kCopies * 4, kMiscAt = kListAt + kListed * 8, kKeysAt = kMiscAt + 1024;

__device__ __forceinline__ int ordered(float score) {
  if (score != score) return kNaN;
  const int bits = __float_as_int(score == 0 ? 0.f : score);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float score_of(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }

using Word = unsigned long long;

// Small numbers that threads of a block tell each other.
struct Misc {
  Word warps[kWarps];
  Word above;
  int bin, count;
};

__device__ __forceinline__ Word block_max(Misc& misc, Word value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = max(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) misc.warps[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value = max(value, misc.warps[w]);
  return value;
}

__device__ __forceinline__ Word block_sum(Misc& misc, Word value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) misc.warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value += misc.warps[w];
  return value;
}

// Finds the bin at which the sum of bins from the highest down reaches `goal`; misc.bin is that bin and misc.above the
// sum of those above it. `value(bin)` is read by one thread. All of the block's threads see the result.
template <int kCount, typename Value>
__device__ __forceinline__ void find_bin(Misc& misc, Word goal, Value value) {
  constexpr int kOwn = kCount / kThreads;
  Word own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = value(kCount - 1 - (int(threadIdx.x) * kOwn + i));
    sum += own[i];
  }
  Word upto = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Word other = __shfl_up_sync(~0u, upto, step);
    if (int(threadIdx.x % 32) >= step) upto += other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 31) misc.warps[threadIdx.x / 32] = upto;
  __syncthreads();
  for (int w = 0; w < int(threadIdx.x / 32); ++w) upto += misc.warps[w];
  Word above = upto - sum;
  if (above < goal && upto >= goal) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (above < goal && above + own[i] >= goal) {
        misc.bin = kCount - 1 - (int(threadIdx.x) * kOwn + i);
        misc.above = above;
      }
      above += own[i];
    }
  }
  __syncthreads();
}

// The k-th largest key, or a smaller one with the same keys above it or equal to it; `count` is how many those are.
__device__ __forceinline__ int find_kth(Misc& misc, uint32_t* bins, const int* keys, int entries, int k, int* count) {
  uint32_t prefix = 0;
  int left = k;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, width = pass == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kBins * kCopies; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < entries; i += kThreads) {
      const uint32_t key = uint32_t(keys[i]) ^ 0x80000000u;
      if (pass == 0 || key >> (shift + width) == prefix)
        atomicAdd(bins + (key >> shift & ((1u << width) - 1)) * kCopies + i % kCopies, 1u);
    }
    __syncthreads();
    const auto total = [&](int bin) {
      const uint32_t* at = bins + bin * kCopies;
      return Word(at[0]) + at[1] + at[2] + at[3];
    };
    find_bin<kBins>(misc, left, total);
    left -= int(misc.above);
    prefix = prefix << width | uint32_t(misc.bin);
    const int inside = int(total(misc.bin));
    *count = k - left + inside;
    __syncthreads();
    if (inside == left || shift == 0) return int((prefix << shift) ^ 0x80000000u);
  }
  return kLeast;
}

struct Draw {
  const float* noise;
  float inverse_temperature;
  int top_k;
  double top_p;
};

// A code from one row of keys, of which there are at least `entries` up to a multiple of four; by the whole block.
// `room` is how many keys fit behind kKeysAt; `unsound` becomes whether there is NaN among the scores.
__device__ __forceinline__ int draw_code(unsigned char* memory, int* global_keys, int entries, int room, const Draw& draw,
                                         bool* unsound) {
  uint32_t* bins = reinterpret_cast<uint32_t*>(memory);
  int2* list = reinterpret_cast<int2*>(memory + kListAt);
  Misc& misc = *reinterpret_cast<Misc*>(memory + kMiscAt);
  int* keys = global_keys;
  Word best = 0;
  __syncthreads();
  if (entries <= room) keys = reinterpret_cast<int*>(memory + kKeysAt);
  for (int i = threadIdx.x; i < (entries + 3) / 4; i += kThreads) {
    const int4 four = __ldcg(reinterpret_cast<const int4*>(global_keys) + i);
    if (entries <= room) reinterpret_cast<int4*>(keys)[i] = four;
    const int own[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (4 * i + e < entries)
        best = max(best, Word(uint32_t(own[e]) ^ 0x80000000u) << 32 | uint32_t(~(4 * i + e)));
  }
  best = block_max(misc, best);  // its waits also make the copy of the keys visible
  const int top = int(uint32_t(best >> 32) ^ 0x80000000u);
  *unsound = top == kNaN;
  if (draw.inverse_temperature == 0) return int(~uint32_t(best));
  if (top <= kLeast || top >= kInfinite) return 0;

  int least = kLeast, kept = entries;
  if (draw.top_k > 0 && draw.top_k < entries) least = find_kth(misc, bins, keys, entries, draw.top_k, &kept);

  // From here on an entry is its weight, whose bits are integers of the same order; 0 is what cannot be drawn.
  const bool listed = kept <= kListed;
  const double peak = score_of(top);
  if (threadIdx.x == 0) misc.count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int key = keys[i];
    int bits = 0;
    if (key >= least) {
      const double distance = double(score_of(key)) - peak;
      if (distance >= -87) bits = __float_as_int(float(exp(distance)));
    }
    if (!listed)
      keys[i] = bits;
    else if (bits > 0)
      list[atomicAdd(&misc.count, 1)] = {bits, i};
  }
  __syncthreads();
  const int count = listed ? misc.count : entries;
  const auto entry = [&](int i) { return listed ? list[i] : int2{keys[i], i}; };

  // Kept are weights of `low` and more; of those that equal it, the entries before `bound`.
  int low = 1, bound = entries;
  if (draw.top_p > 0 && draw.top_p < 1) {
    int bits_of_size = 0;
    while ((entries - 1) >> bits_of_size) ++bits_of_size;
    const double units = double(Word(1) << (62 - bits_of_size));
    const auto mass = [&](int bits) { return Word(double(__int_as_float(bits)) * units); };
    Word total = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) total += mass(entry(i).x);
    total = block_sum(misc, total);
    const double product = double(static_cast<long long>(total)) * draw.top_p;
    Word left = Word(product);
    left += double(static_cast<long long>(left)) < product;
    Word* sums = reinterpret_cast<Word*>(memory);
    uint32_t prefix = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
      __syncthreads();
      for (int i = threadIdx.x; i < 1024; i += kThreads) sums[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint32_t bits = entry(i).x;
        if (bits && (shift == 20 || bits >> (shift + 10) == prefix)) atomicAdd(sums + (bits >> shift & 1023), mass(bits));
      }
      __syncthreads();
      find_bin<1024>(misc, left, [&](int bin) { return sums[bin]; });
      left -= misc.above;
      prefix = prefix << 10 | uint32_t(misc.bin);
    }
    low = int(prefix);
    const Word each = mass(low), wanted = (left + each - 1) / each;
    Word equal = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) equal += entry(i).x == low;
    equal = block_sum(misc, equal);
    if (wanted < equal) {
      int short_of = 0;  // fewer than wanted are before this index, wanted before `bound`
      while (bound - short_of > 1) {
        const int place = (short_of + bound) / 2;
        Word before = 0;
        for (int i = threadIdx.x; i < count; i += kThreads) {
          const int2 one = entry(i);
          before += one.x == low && one.y < place;
        }
        if (block_sum(misc, before) >= wanted)
          bound = place;
        else
          short_of = place;
      }
    }
  }

  best = 0xffffffffu;  // entry 0, which nothing of speed 0 beats
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int2 one = entry(i);
    if (one.x <= 0 || one.x < low || (one.x == low && one.y >= bound)) continue;
    const float speed = __fdiv_rn(__int_as_float(one.x), __ldg(draw.noise + one.y));
    if (speed > 0) best = max(best, Word(__float_as_uint(speed)) << 32 | uint32_t(~one.y));
  }
  best = block_max(misc, best);
  return int(~uint32_t(best));
}

// ---- the kernel ------------------------------------------------------------------------------------------------------

template <typename Book>
__device__ __forceinline__ float add_rounded(Book* total, const Book* row, int channel, bool first) {
  const float before = first ? 0.f : wide(total[channel]);
  const Book sum = narrow<Book>(before + (row == nullptr ? 0.f : wide(__ldg(row + channel))));
  total[channel] = sum;
  return wide(sum);
}

struct Kernel {
  DepthArgs args;
  DepthWorkspace at;
  DepthLayout layout;
  Divisor blocks, rows, pairs;  // pairs: rows that share codes
  int shared_bytes;
};

template <typename T, int kGroups>
struct Decoder {
  const DepthArgs& a;
  const DepthSizes& s;
  const DepthWorkspace& at;
  const DepthLayout& layout;
  const Divisor &blocks, &all_rows, &pairs;
  unsigned char* const memory;
  const int &shared_bytes, &rows, &dim;
  const int warp, lane;
  uint32_t waits = 0;

  __device__ __forceinline__ explicit Decoder(const Kernel& kernel)
      : a(kernel.args), s(kernel.args.sizes), at(kernel.at), layout(kernel.layout),
        blocks(kernel.blocks), all_rows(kernel.rows), pairs(kernel.pairs),
        memory(reinterpret_cast<unsigned char*>(shared_memory())), shared_bytes(kernel.shared_bytes),
        rows(kernel.args.sizes.rows), dim(kernel.args.sizes.dim), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}

  template <typename U>
  __device__ __forceinline__ U* space(size_t offset) const {
    return reinterpret_cast<U*>(static_cast<unsigned char*>(a.workspace) + offset);
  }
  __device__ __forceinline__ const T* packed(int64_t offset) const { return static_cast<const T*>(a.packed) + offset; }
  __device__ __forceinline__ T* cache(int layer, int which, int d) const {
    return space<T>(at.cache) + ((int64_t(layer) * 2 + which) * s.depth + d) * rows * dim;
  }

  // Step `index` after the beginning of depth d: 0 is the input's, then four a layer, then the head's.
  __device__ __forceinline__ Matrix matrix(int d, int index) const {
    const int steps = 4 * s.layers + 2;
    if (index >= steps) {
      ++d;
      index -= steps;
    }
    if (d >= s.depth) return {nullptr, 0, 1};
    const auto piece = [&](int64_t offset, int outputs, int inputs) {
      return Matrix{reinterpret_cast<const uint4*>(packed(offset)), (outputs + 15) / 16, (inputs + kChunk - 1) / kChunk};
    };
    if (index == 0) {
      if (d > 0) return piece(layout.code, dim, s.code_dim);
      return s.hidden_dim ? piece(layout.hidden, dim, s.hidden_dim) : Matrix{nullptr, 0, 1};
    }
    if (index == steps - 1) return piece(layout.head, s.num_codes, dim);
    const int64_t block = layout.blocks + (index - 1) / 4 * layout.block;
    switch ((index - 1) % 4) {
      case 0:
        return piece(block + layout.qkv, 3 * dim, dim);
      case 1:
        return piece(block + layout.proj, dim, dim);
      case 2:
        return piece(block + layout.up, 4 * dim, dim);
      default:
        return piece(block + layout.down, dim, 4 * dim);
    }
  }

  __device__ __forceinline__ bool wait(Stream& stream) {
    ++waits;
    grid_wait(space<uint32_t>(at.barrier), waits * gridDim.x, [&] {
      if (!stream.started) stream.start();
    });
    return int(waits) == a.stop;
  }

  // ---- what a matrix is multiplied with

  __device__ __forceinline__ unsigned char* staged(int row, int width) const {
    return memory + kStageAt + row * (width * 2 + kPad);
  }
  __device__ __forceinline__ bool fits(int width) const { return kStageAt + rows * (width * 2 + kPad) <= shared_bytes; }

  // LayerNorm of the residual stream. Rows are cut into parts, one a warp, whose sums are added up in order.
  __device__ __forceinline__ void stage_norm(const T* gain) {
    const T* bias = gain + dim;
    const float* x = space<float>(at.x);
    float2* stats = reinterpret_cast<float2*>(memory + kRedBytes);
    int shift = 3;  // warps a row: 8, or fewer for more rows
    static_assert(kWarps == 8, "a power of two");
    while (shift > 0 && rows << shift > kWarps) --shift;
    const int parts = 1 << shift, part = warp & (parts - 1);
    const int packs = dim / 4, step = 32 * parts;
    const int first = part * 32 + lane;
    for (int base = 0; base < rows; base += kWarps >> shift) {
      const int row = base + (warp >> shift);
      const bool inside = row < rows;
      const float4* from = reinterpret_cast<const float4*>(x + int64_t(inside ? row : 0) * dim);
      float4 held[kHeld];
      uint2 gains[kHeld], biases[kHeld];
      // Deviations from the row's first element: a mean far from 0 costs no digits.
      const float origin = __ldcg(reinterpret_cast<const float*>(from));
      float sum = 0, squares = 0;
      const auto count = [&](const float4& v) {
        const float b[4] = {v.x - origin, v.y - origin, v.z - origin, v.w - origin};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum += b[e];
          squares += b[e] * b[e];
        }
      };
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (first + i * step < packs) {
          held[i] = __ldcg(from + first + i * step);
          gains[i] = __ldg(reinterpret_cast<const uint2*>(gain) + first + i * step);
          biases[i] = __ldg(reinterpret_cast<const uint2*>(bias) + first + i * step);
        }
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (first + i * step < packs) count(held[i]);
      for (int i = first + kHeld * step; i < packs; i += step) count(__ldcg(from + i));
#pragma unroll
      for (int distance = 16; distance; distance /= 2) {
        sum += __shfl_xor_sync(~0u, sum, distance);
        squares += __shfl_xor_sync(~0u, squares, distance);
      }
      if (inside && lane == 0) stats[row * kWarps + part] = {sum, squares};
      if (parts > 1)
        __syncthreads();
      else
        __syncwarp();
      if (inside) {
        sum = squares = 0;
        for (int p = 0; p < parts; ++p) {
          sum += stats[row * kWarps + p].x;
          squares += stats[row * kWarps + p].y;
        }
        const float deviation = sum / dim, mean = origin + deviation;
        const float scale = rsqrtf(max(squares / dim - deviation * deviation, 0.f) + 1e-5f);
        unsigned char* to = staged(row, dim);
        const auto put = [&](int i, const float4& v, const uint2& g, const uint2& b) {
          const float2 g0 = unpack_word(g.x, T{}), g1 = unpack_word(g.y, T{});
          const float2 b0 = unpack_word(b.x, T{}), b1 = unpack_word(b.y, T{});
          reinterpret_cast<uint2*>(to)[i] = {
              pack_word((v.x - mean) * scale * g0.x + b0.x, (v.y - mean) * scale * g0.y + b0.y, T{}),
              pack_word((v.z - mean) * scale * g1.x + b1.x, (v.w - mean) * scale * g1.y + b1.y, T{})};
        };
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
          if (first + i * step < packs) put(first + i * step, held[i], gains[i], biases[i]);
        for (int i = first + kHeld * step; i < packs; i += step)
          put(i, __ldcg(from + i), __ldg(reinterpret_cast<const uint2*>(gain) + i),
              __ldg(reinterpret_cast<const uint2*>(bias) + i));
      }
    }
    __syncthreads();
  }

  // Rows as they lie in memory; each warp copies the chunks that it multiplies.
  __device__ __forceinline__ void stage_rows(const T* from, int width) {
    const int own = own_chunks(width / kChunk, warp);
    for (int row = lane / 8; row < rows; row += 4) {
      const T* own_row = from + int64_t(row) * width + warp * kChunk + lane % 8 * 8;
      unsigned char* to = staged(row, width) + (warp * kChunk + lane % 8 * 8) * 2;
#pragma unroll 4
      for (int i = 0; i < own; ++i)
        *reinterpret_cast<uint4*>(to + i * kWarps * kChunk * 2) = load_shared_by_all(own_row + i * kWarps * kChunk);
    }
    __syncwarp();
  }

  // One head's attention at depth d of row 8 group + lane / 4; of its 64 numbers the lane has 8 (lane % 4) .. + 7 of either
  // half, as a matrix' operand has them.
  __device__ __forceinline__ void attend(int layer, int d, int head, int group, uint4 (&out)[2]) {
    const int row = group * 8 + lane / 4;
    const int64_t offset = int64_t(row < rows ? row : 0) * dim + head * kHeadDim + lane % 4 * 8;
    const T* keys = cache(layer, 0, 0) + offset;
    const T* values = cache(layer, 1, 0) + offset;
    const int64_t next = int64_t(rows) * dim;
    constexpr int kBatch = kGroups > 2 ? 2 : 3;  // depths with keys and values in flight; three spill with 32 rows
    uint4 query[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) query[half] = load_shared_by_all(space<T>(at.q) + offset + half * 32);
    float y[2][8] = {}, most = -INFINITY, total = 0;
    for (int first = 0; first <= d; first += kBatch) {
      uint4 key[kBatch][2], value[kBatch][2];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j > d) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          key[j][half] = load_shared_by_all(keys + (first + j) * next + half * 32);
          value[j][half] = load_shared_by_all(values + (first + j) * next + half * 32);
        }
      }
      float q[2][8];
#pragma unroll
      for (int half = 0; half < 2; ++half) unpack<T>(query[half], q[half]);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j > d) continue;
        float score = 0, part[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unpack<T>(key[j][half], part);
#pragma unroll
          for (int e = 0; e < 8; ++e) score += q[half][e] * part[e];
        }
        score += __shfl_xor_sync(~0u, score, 1);
        score += __shfl_xor_sync(~0u, score, 2);
        score *= 0.125f;  // 1 / sqrt(64)
        const float now = max(most, score);
        const float old = __expf(most - now), weight = __expf(score - now);
        most = now;
        total = total * old + weight;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unpack<T>(value[j][half], part);
#pragma unroll
          for (int e = 0; e < 8; ++e) y[half][e] = y[half][e] * old + weight * part[e];
        }
      }
    }
    const float share = 1 / total;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 8; ++e) y[half][e] *= share;
      out[half] = pack<T>(y[half]);
    }
  }

  __device__ __forceinline__ void stage_attention(int layer, int d) {
    for (int head = warp; head < dim / kHeadDim; head += kWarps) {
      for (int group = 0; group < kGroups; ++group) {
        uint4 y[2];
        attend(layer, d, head, group, y);
        const int row = group * 8 + lane / 4;
        if (row < rows) {
          unsigned char* to = staged(row, dim) + head * kHeadDim * 2 + lane % 4 * 16;
          *reinterpret_cast<uint4*>(to) = y[0];
          *reinterpret_cast<uint4*>(to + 64) = y[1];
        }
      }
    }
    __syncwarp();
  }

  // The same for large sizes, each head by one warp of the grid.
  __device__ __forceinline__ void attend_apart(int layer, int d) {
    const int groups = (rows + 7) / 8;
    for (int i = warp * gridDim.x + blockIdx.x; i < dim / kHeadDim * groups; i += kWarps * gridDim.x) {
      const int head = i / groups, group = i % groups, row = group * 8 + lane / 4;
      uint4 y[2];
      attend(layer, d, head, group, y);
      if (row < rows) {
        uint4* to = reinterpret_cast<uint4*>(space<T>(at.y) + int64_t(row) * dim + head * kHeadDim + lane % 4 * 8);
        to[0] = y[0];
        to[4] = y[1];
      }
    }
  }

  // ---- products

  // A chunk of a tile: four pieces times all rows. `from` is the lane's first 16 bytes of row lane / 4.
  __device__ __forceinline__ void multiply(float (&sum)[kGroups][4], const uint4 (&weights)[kPieces],
                                           const unsigned char* from, int64_t pitch, bool in_shared) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint4 b = {0, 0, 0, 0};
        if (group * 8 + lane / 4 < rows) {
          const unsigned char* own = from + group * 8 * pitch + half * 64;
          b = in_shared ? *reinterpret_cast<const uint4*>(own) : load_shared_by_all(own);
        }
        multiply_tile<T>(sum[group], weights[2 * half], b.x, b.y);
        multiply_tile<T>(sum[group], weights[2 * half + 1], b.z, b.w);
      }
    }
  }

  // The warp's chunks of one tile, the first of which is in the ring's slot kFirst.
  template <int kFirst>
  __device__ __forceinline__ void tile(Stream& stream, int own, float (&sum)[kGroups][4], const unsigned char* from,
                                       int64_t pitch, bool in_shared) {
    for (int i = 0; i < own; i += kSlots) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        if (i + j >= own) break;
        multiply(sum, stream.ring[(kFirst + j) % kSlots], from, pitch, in_shared);
        stream.ask((kFirst + j) % kSlots);
        from += kWarps * kChunk * 2;
      }
    }
  }

  // What is added to output m of a step, for one row, besides the product: bias, position, what x held.
  __device__ __forceinline__ float addend(int d, int layer, Step step, int m, int row) const {
    const T* vectors = packed(layout.vectors + layer * layout.block_vectors);
    switch (step) {
      case kInput:
        return wide(__ldg(packed(d ? layout.code_bias : layout.hidden_bias) + m)) +
               wide(__ldg(packed(layout.position) + int64_t(d) * dim + m));
      case kQkv:
        return wide(__ldg(vectors + 2 * dim + m));
      case kUp:
        return wide(__ldg(vectors + 8 * dim + m));
      case kHead:
        return wide(__ldg(packed(layout.head_bias) + m));
      default:
        return wide(__ldg(vectors + (step == kProj ? 5 : 12) * dim + m)) +
               __ldcg(space<float>(at.x) + int64_t(row) * dim + m);
    }
  }

  // What becomes of output m of a step, for one row.
  __device__ __forceinline__ void put(int d, int layer, Step step, int m, int row, float value) const {
    if (step == kQkv) {
      const int which = int(m >= dim) + int(m >= 2 * dim), channel = m - which * dim;
      T* to = which ? cache(layer, which - 1, d) : space<T>(at.q);
      to[int64_t(row) * dim + channel] = narrow<T>(value);
    } else if (step == kUp) {
      space<T>(at.h)[int64_t(row) * 4 * dim + m] = narrow<T>(0.5f * value * (1 + erff(value * 0.70710678118654752f)));
    } else {
      space<float>(at.x)[int64_t(row) * dim + m] = value;
    }
  }

  // Logit m of a row, rounded as it is to be sampled from.
  __device__ __forceinline__ float put_logit(int d, int m, int row, float value) const {
    const T logit = narrow<T>(value);
    if (a.logits != nullptr) static_cast<T*>(a.logits)[(int64_t(row) * s.depth + d) * s.num_codes + m] = logit;
    return wide(logit);
  }

  // Guidance, each of its operations rounded, temperature, and the score's place in the order.
  __device__ __forceinline__ void put_key(int d, int m, int row, float conditional, float unconditional) {
    float score = conditional;
    if (s.guided) {
      const float guidance = a.guidance_rows == nullptr ? a.guidance : __ldg(a.guidance_rows + row);
      score = wide(narrow<T>(__fsub_rn(conditional, unconditional)));
      score = wide(narrow<T>(__fmul_rn(score, guidance)));
      score = wide(narrow<T>(__fadd_rn(unconditional, score)));
    }
    const float inverse = a.inverse_temperature[d];
    if (inverse != 0) score = __fmul_rn(score, inverse);
    space<int>(at.keys)[int64_t(row) * padded(s.num_codes, 4) + m] = ordered(score);
  }

  // One matrix: what it is multiplied with is staged, or at `direct` in global memory if that is not null. `ahead` is called
  // once all products are done, before the last ones are added up.
  template <typename Ahead>
  __device__ __forceinline__ void product(Stream& stream, const T* direct, int d, int layer, Step step, int outputs,
                                          int chunks, const Ahead& ahead) {
    constexpr int kTiles = kRedTiles / kGroups, kColumns = 8 * kGroups;
    const int width = chunks * kChunk, own = stream.own, tiles = stream.tiles;
    const int warps = min(chunks, kWarps);
    const Divisor& sharing = step == kHead ? pairs : all_rows;
    const int shown = int(sharing.number);
    const bool in_shared = direct == nullptr;
    const int64_t pitch = in_shared ? width * 2 + kPad : width * 2;
    const unsigned char* from = in_shared ? memory + kStageAt : reinterpret_cast<const unsigned char*>(direct);
    from += lane / 4 * pitch + (warp * kChunk + lane % 4 * 8) * 2;
    float* red = reinterpret_cast<float*>(memory);
    int slot = 0;
    for (int first = 0; first < tiles; first += kTiles) {
      const int count = min(kTiles, tiles - first);
      const bool last = first + kTiles >= tiles;
      // Output m of a row is this thread's: one of every kThreads. What is added to the first is read while others multiply.
      const auto output_of = [&](int tile, int i) {
        return ((first + tile) * int(gridDim.x) + int(blockIdx.x)) * 16 + i % 16;
      };
      const int early_tile = sharing.quotient(threadIdx.x / 16), early_output = output_of(early_tile, threadIdx.x);
      float early = 0;
      if (early_tile < count && early_output < outputs)
        early = addend(d, layer, step, early_output, int(threadIdx.x / 16) - early_tile * shown);
      for (int t = 0; t < count; ++t) {
        float sum[kGroups][4] = {};
        switch (slot) {
          case 0:
            tile<0>(stream, own, sum, from, pitch, in_shared);
            break;
          case 1:
            tile<1>(stream, own, sum, from, pitch, in_shared);
            break;
          case 2:
            tile<2>(stream, own, sum, from, pitch, in_shared);
            break;
          default:
            tile<3>(stream, own, sum, from, pitch, in_shared);
        }
        slot = (slot + own) % kSlots;
        if (own > 0) {
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            float* to = red + ((warp * kTiles + t) * kColumns + group * 8 + lane % 4 * 2) * kRedPitch + lane / 4;
            to[0] = sum[group][0];
            to[kRedPitch] = sum[group][1];
            to[8] = sum[group][2];
            to[kRedPitch + 8] = sum[group][3];
          }
        }
      }
      if (last) ahead();
      __syncthreads();
      for (int i = threadIdx.x; i < count * shown * 16; i += kThreads) {
        const int m = i % 16, at_tile = sharing.quotient(i / 16), row = i / 16 - at_tile * shown;
        const int output = output_of(at_tile, i);
        if (output >= outputs) continue;
        const float more = i == int(threadIdx.x) ? early : addend(d, layer, step, output, row);
        const auto add = [&](int row) {
          float sum = 0;
          for (int w = 0; w < warps; ++w) sum += red[((w * kTiles + at_tile) * kColumns + row) * kRedPitch + m];
          return sum + more;
        };
        if (step == kHead) {
          const float conditional = put_logit(d, output, row, add(row));
          put_key(d, output, row, conditional, s.guided ? put_logit(d, output, row + shown, add(row + shown)) : 0.f);
        } else {
          put(d, layer, step, output, row, add(row));
        }
      }
      if (!last) __syncthreads();
    }
    if (tiles <= 0) ahead();
  }

  // ---- a row's code, and what it adds

  template <typename Book>
  __device__ __forceinline__ void add_code(int d, int row, int64_t code) {
    Book* total = static_cast<Book*>(a.total) + int64_t(row) * s.code_dim;
    const Book* entry = nullptr;
    if (uint64_t(code) < uint64_t(s.num_codes))
      entry = static_cast<const Book*>(a.codebook) + d * a.book_level + code * a.book_entry;
    const int width = padded(s.code_dim, kChunk);
    T* sums = space<T>(at.sums) + int64_t(row) * width;
    for (int channel = threadIdx.x; channel < width; channel += kThreads) {
      const float sum = channel < s.code_dim ? add_rounded(total, entry, channel, d == 0) : 0.f;
      sums[channel] = narrow<T>(sum);
      if (s.guided) sums[int64_t(rows / 2) * width + channel] = narrow<T>(sum);
    }
  }

  __device__ __forceinline__ void draw(int d) {
    const int count = s.guided ? rows / 2 : rows, stride = padded(s.num_codes, 4);
    for (int row = blockIdx.x; row < count; row += gridDim.x) {
      int64_t code;
      bool unsound = false;
      if (a.forced != nullptr) {
        code = a.forced[int64_t(row) * s.depth + d];
      } else {
        const float* noise = a.noise == nullptr ? nullptr : a.noise + row * a.noise_row + d * a.noise_depth;
        code = draw_code(memory, space<int>(at.keys) + int64_t(row) * stride, s.num_codes, (shared_bytes - kKeysAt) / 4 & ~3,
                         {noise, a.inverse_temperature[d], a.top_k[d], a.top_p[d]}, &unsound);
      }
      if (threadIdx.x == 0) {
        a.codes[int64_t(row) * s.depth + d] = code;
        if (d == 0) a.unsound[row] = -1;
        if (unsound && a.unsound[row] < 0) a.unsound[row] = d;
      }
      switch (a.book_dtype) {
        case DType::kFloat32:
          add_code<float>(d, row, code);
          break;
        case DType::kBFloat16:
          add_code<__nv_bfloat16>(d, row, code);
          break;
        default:
          add_code<__half>(d, row, code);
      }
    }
  }

  // Has vectors that steps to come will read fetched into the second cache, each piece by one block.
  __device__ __forceinline__ void fetch_vectors(int layer, Step step) const {
    int64_t begin = layout.position, end = layout.vectors + layout.block_vectors;
    if (step == kQkv) {
      begin = layout.vectors + (layer + 1) * layout.block_vectors;
      end = layer + 1 < s.layers ? begin + layout.block_vectors : layout.end;
    } else if (step != kHead || s.layers == 0) {
      return;
    }
    for (int64_t i = begin + blockIdx.x * int64_t(1024); i + 1024 <= end; i += gridDim.x * int64_t(1024))
      fetch_ahead(packed(i));
  }

  // The matrix of step `index`, and what it is multiplied with.
  __device__ __forceinline__ void multiply_by(Stream& stream, int d, int index, bool apart) {
    const int steps = 4 * s.layers + 2, layer = (index - 1) / 4;
    const Step step = index == 0 ? kInput : index == steps - 1 ? kHead : static_cast<Step>(kQkv + (index - 1) % 4);
    const Matrix now = matrix(d, index);
    const T* direct = nullptr;
    if (step == kQkv || step == kUp || step == kHead) {
      const int64_t vectors = layout.vectors + layer * layout.block_vectors;
      stage_norm(packed(step == kHead ? layout.norm : step == kQkv ? vectors : vectors + 6 * dim));
    } else if (step == kProj && !apart) {
      stage_attention(layer, d);
    } else {
      direct = step == kProj ? space<T>(at.y) : step == kDown ? space<T>(at.h) : space<T>(at.sums);
      if (index == 0 && d == 0) direct = static_cast<const T*>(a.hidden);
      if (fits(now.chunks * kChunk)) {
        stage_rows(direct, now.chunks * kChunk);
        direct = nullptr;
      }
    }
    product(stream, direct, d, layer, step, step == kHead ? s.num_codes : now.tiles * 16, now.chunks, [&] {
      const Matrix next = matrix(d, index + 1);
      stream.aim(next, blocks);
      if (warp > 0) stream.start();
      if (warp == kWarps - 1) {
        const int budget = step == kHead ? kAheadDrawing : kAhead;
        const int left = fetch_share(next, blocks, kSlots * kWarps, kSlots * kWarps + budget);
        if (left > 0) fetch_share(matrix(d, index + 2), blocks, 0, left);
        if (lane == 0) fetch_vectors(layer, step);
      }
    });
  }

  __device__ __forceinline__ void run() {
    Stream stream;
    const int steps = 4 * s.layers + 2;
    stream.aim(matrix(0, s.hidden_dim ? 0 : 1), blocks);
    stream.start();
    int d = 0, index = 0;
    bool apart = false;  // this layer's attention is done, in a phase of its own
    do {
      if (index == steps) {
        draw(d);
        if (++d == s.depth) return;
        index = 0;
      } else if (index == 0 && d == 0 && s.hidden_dim == 0) {
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < rows * dim; i += gridDim.x * kThreads)
          space<float>(at.x)[i] = wide(static_cast<const T*>(a.hidden)[i]) + wide(packed(layout.position)[i % dim]);
        index = 1;
      } else if (index < steps - 1 && index % 4 == 2 && !apart && rows * dim * (2 * d + 3) * 2 > kAttentionBytes) {
        attend_apart((index - 1) / 4, d);
        apart = true;
      } else {
        multiply_by(stream, d, index, apart);
        apart = false;
        ++index;
      }
    } while (!wait(stream));
  }
};

// Grid: as many blocks as there are multiprocessors, all of them there at the same time.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) depth_decode_kernel(const __grid_constant__ Kernel kernel) {
  Decoder<T, kGroups>(kernel).run();
}

using Function = void (*)(Kernel);

Function function_of(DType dtype, int rows) {
  const bool half = dtype == DType::kFloat16;
  if (rows <= 8) return half ? depth_decode_kernel<__half, 1> : depth_decode_kernel<__nv_bfloat16, 1>;
  if (rows <= 16) return half ? depth_decode_kernel<__half, 2> : depth_decode_kernel<__nv_bfloat16, 2>;
  return half ? depth_decode_kernel<__half, 4> : depth_decode_kernel<__nv_bfloat16, 4>;
}

// Shared memory that a row of a norm needs, and that drawing needs at least.
int least_shared(const DepthSizes& sizes, int rows) { return std::max(kStageAt + rows * (sizes.dim * 2 + kPad), kKeysAt); }

// Blocks of the grid, and their shared memory; 0 blocks if the sizes do not fit the device.
cudaError_t plan(const DepthSizes& sizes, DType dtype, int* blocks, int* shared) {
  *blocks = 0;
  int device = 0, together = 0, per = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); e != cudaSuccess)
    return e;
  if (!together || least_shared(sizes, sizes.rows) > *shared) return cudaSuccess;
  const Function function = function_of(dtype, sizes.rows);
  if (const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(function),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, *shared);
      e != cudaSuccess)
    return e;
  if (const cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per, function, kThreads, *shared); e != cudaSuccess)
    return e;
  if (per < 1) return cudaSuccess;
  return cudaDeviceGetAttribute(blocks, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

DepthWorkspace workspace_depth_decode(const DepthSizes& s) {
  DepthWorkspace at{};
  const auto take = [&](size_t bytes) {
    const size_t begin = at.bytes;
    at.bytes += (bytes + 255) / 256 * 256;
    return begin;
  };
  const size_t rows = s.rows, dim = s.dim;
  at.barrier = take(4);
  at.x = take(rows * dim * 4);
  at.q = take(rows * dim * 2);
  at.y = take(rows * dim * 2);
  at.h = take(rows * dim * 8);
  at.cache = take(rows * dim * 2 * 2 * s.layers * s.depth);
  at.sums = take(rows * padded(s.code_dim, kChunk) * 2);
  at.keys = take((s.guided ? rows / 2 : rows) * padded(s.num_codes, 4) * 4);
  return at;
}

int64_t packed_depth_decode(const DepthSizes& sizes) { return DepthLayout(sizes).end; }

cudaError_t rows_depth_decode(const DepthSizes& sizes, DType dtype, int* rows) {
  DepthSizes one = sizes;
  for (*rows = kMaxDepthRows; *rows > 0; *rows -= 2) {
    int blocks = 0, shared = 0;
    one.rows = *rows;
    if (const cudaError_t e = plan(one, dtype, &blocks, &shared); e != cudaSuccess) return e;
    if (blocks > 0) break;
  }
  return cudaSuccess;
}

cudaError_t launch_depth_decode(const DepthArgs& args, DType dtype, cudaStream_t stream) {
  int blocks = 0, shared = 0;
  if (args.sizes.rows < 1 || args.sizes.rows > kMaxDepthRows || args.sizes.depth > kMaxDepth)
    return cudaErrorInvalidConfiguration;
  if (const cudaError_t e = plan(args.sizes, dtype, &blocks, &shared); e != cudaSuccess) return e;
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  const int rows = args.sizes.rows;
  Kernel kernel{args, workspace_depth_decode(args.sizes), DepthLayout(args.sizes), Divisor(blocks), Divisor(rows),
                Divisor(args.sizes.guided ? rows / 2 : rows), shared};
  void* counter = static_cast<unsigned char*>(args.workspace) + kernel.at.barrier;
  if (const cudaError_t e = cudaMemsetAsync(counter, 0, sizeof(uint32_t), stream); e != cudaSuccess) return e;
  void* arguments[] = {&kernel};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(function_of(dtype, args.sizes.rows)), dim3(blocks),
                                     dim3(kThreads), arguments, kernel.shared_bytes, stream);
}

}  // namespace unifiedar
