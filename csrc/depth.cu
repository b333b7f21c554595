// Depth-transformer decoding in one launch: a block on every multiprocessor streams its share of the weights from the
// first depth to the last. With few rows blocks wait for what they read of each other: each word tells by itself that it is
// there, and the whole grid waits only before and after a draw. With more rows only those wait for words who normalise a row
// or attend a head; what they make of them is copied by all, after a wait of the grid.
//
// A matrix is cut into tiles of 16 outputs and those into chunks of 64 inputs, 2 KB each, which lie packed as the matrix
// units take them (see DepthLayout). A block has a run of tiles, its 8 warps sharing the inputs by chunks, and adds their
// parts up in shared memory in the order of the warps. One more warp does nothing but have chunks brought to a ring in
// shared memory, eight of them at a time, of this matrix and the next ones, as soon as there is room: memory works while
// blocks wait for each other or a code is drawn.
//
// Of the two matrices that are added to the residual stream a block's run may begin and end inside a tile, so that all have
// as much. Where no block has room for all of the MLP's states, a block has a quarter of the columns of its tiles of the
// matrix that takes them. The first block of a tile adds what the stream held; the parts of up to three others lie beside
// it, and whoever reads the stream adds them. No atomics on numbers: one result.
//
// The k-th input of a 64-wide chunk goes where its lane can read eight neighbours at once: piece j (0..3) of the chunk has
// at column slot 2 t + e of the instruction the input 32 (j / 2) + 8 t + 4 (j % 2) + e, and at slot 2 t + 8 + e the one two
// further (t = lane % 4, e = 0, 1). Which input a slot stands for does not matter, as long as both operands agree.
#include "depth.h"

#include <algorithm>

#include "depth_device.cuh"
#include "depth_draw.cuh"
#include "depth_stage.cuh"
#include "device/cluster.cuh"

namespace unifiedar {
namespace {

constexpr int kMostSlots = 8, kLeastSlots = 2;  // stages of the ring
constexpr int kNarrow = 2048;              // up to this width one stage is asked for and not there yet, else two
constexpr int kChunk = 64;                 // inputs that a warp takes at a time
constexpr int kPieces = 4;                 // 16 x 16 pieces of a chunk
constexpr int kChunkLoads = kPieces * 32;  // 16-byte loads of a chunk
constexpr int kChunkBytes = kChunkLoads * 16, kStageBytes = kWarps * kChunkBytes;
constexpr int kBarrierBytes = 2 * kMostSlots * 8;
constexpr int kAccumulators = 4;           // of a warp, each of 16 outputs and 8 rows
constexpr int kAllThreads = kThreads + 32;  // with the warp that brings the weights
constexpr int kShareBytes = 352;            // what a block has of each matrix
constexpr int kMostExtras = 3;             // parts of the residual stream beside it
constexpr int kColumnGroups = 4;           // of the MLP's inputs, where no block has room for all
constexpr int kOwnHeads = 24;               // heads that every block may attend for itself, where rows are few
constexpr int kDirectRows = 4;              // rows that every block may normalise for itself
constexpr int kNormPacks = 5;               // packs of four numbers that a lane then normalises

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
enum Kind { kHidden, kCode, kLayer, kLast = kLayer + 4, kKinds };  // of matrices: a layer's four follow kLayer

// A matrix, and the block's share of it: of tiles from `first_tile` on the chunks from `low` to `high`, but of the first tile
// only those from `column` on, and of the last those before `stop`.
struct Share {
  int chunks;
  int first_tile, own_tiles;  // the latter 0: the block has none
  int low, high, column, stop;
  int number, other_number;  // which block of the first tile this is, and of the others
  int span_first, span_last;  // chunks of the inputs that the block multiplies
};

static_assert(sizeof(Share) * kKinds + 4 <= kShareBytes && kShareBytes % 16 == 0);

// The blocks' share of a matrix: whole tiles or, if it is `divided`, of a tile at least half.
__host__ __device__ __forceinline__ int share_of(int tiles, int chunks, bool divided, int whole) {
  return !divided ? whole * chunks : whole > (chunks + 1) / 2 ? whole : (chunks + 1) / 2;
}

// Division by a number that is known at the launch: exact where value times number is below 2^32.
struct Divisor {
  uint32_t number, inverse;
  explicit Divisor(int number) : number(number), inverse(uint32_t((uint64_t(1) << 32) / number + 1)) {}
  __device__ __forceinline__ int quotient(int value) const {
    return number == 1 ? value : int(uint64_t(uint32_t(value)) * inverse >> 32);
  }
};

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

// A place in the ring, and the parity of the phase of its barriers that is waited for.
struct Place {
  int slot;
  uint32_t parity;

  __device__ __forceinline__ void next(int slots) {
    if (++slot < slots) return;
    slot = 0;
    parity ^= 1;
  }
};

// ---- the kernel ------------------------------------------------------------------------------------------------------

struct Kernel {
  DepthArgs args;
  DepthWorkspace at;
  DepthLayout layout;
  Divisor rows, pairs;          // the latter: rows that share codes
  int free_bytes, slots;        // shared memory before the ring's barriers; stages of the ring
  int norm_shift, norm_span;    // of normalise_posted
  int groups;                   // of the columns of the matrix down, each for a part of the blocks
  int extras[2];                // parts beside the residual stream after the attention, and after the MLP
};

// kDirect: what blocks tell each other within a depth are words that tell by themselves that they are there, and the grid waits
// twice a depth, before and after the draw. Otherwise so are the residual stream, which a block for each row normalises, and
// queries, keys and values, which a warp for each head attends; the grid waits for what they and the MLP make of them, which
// all blocks copy. Each step of each layer has places for such words of its own, which are emptied while a code is drawn:
// whoever read them has waited with the grid since, and nobody writes them before it waits again.
template <typename T, int kGroups, bool kDirect>
struct Decoder {
  const DepthArgs& a;
  const DepthSizes& s;
  const DepthWorkspace& at;
  const DepthLayout& layout;
  const Divisor &all_rows, &pairs;
  unsigned char* const memory;
  const int &free_bytes, &slots, &norm_shift, &norm_span, &groups;
  const int* const extras;
  int rows, dim, warp, lane;
  unsigned char* workspace;

  static constexpr int kTiles = kRedTiles / kGroups, kColumns = 8 * kGroups;  // added up together
  static constexpr int kOwn = kDirect ? kTiles * kDirectRows * 16 / kThreads : kTiles * kColumns * 16 / kThreads;  // a thread's
  static constexpr int kExtras = kDirect ? 2 : kMostExtras;

  // What is added to an output, as it was read: a warp that uses any of it waits for it.
  struct Addend {
    unsigned short bias;
    float held[1 + kExtras];  // what x held, and what lies beside it; of the input the bits of the position

    __device__ __forceinline__ float sum(Step step) const {
      float all = step == kInput ? unpack_word(__float_as_uint(held[0]), T{}).x : held[0];
#pragma unroll
      for (int e = 0; e < kExtras; ++e) all += held[1 + e];
      return unpack_word(bias, T{}).x + all;
    }
    __device__ __forceinline__ bool absent() const {
      uint32_t most = 0;
#pragma unroll
      for (int e = 0; e <= kExtras; ++e) most = max(most, __float_as_uint(held[e]));
      return most == kAbsent;
    }
  };

  __device__ __forceinline__ explicit Decoder(const Kernel& kernel)
      : a(kernel.args), s(kernel.args.sizes), at(kernel.at), layout(kernel.layout),
        all_rows(kernel.rows), pairs(kernel.pairs),
        memory(reinterpret_cast<unsigned char*>(shared_memory())), free_bytes(kernel.free_bytes), slots(kernel.slots),
        norm_shift(kernel.norm_shift), norm_span(kernel.norm_span), groups(kernel.groups), extras(kernel.extras) {
    look_again();
  }

  // Once a phase: the compiler is not to know that these do not change. Else it computes what every phase derives from them
  // before the first one, and has no registers for it.
  __device__ __forceinline__ void look_again() {
    rows = again(s.rows);
    dim = again(s.dim);
    warp = again(threadIdx.x) / 32;
    lane = again(threadIdx.x) % 32;
    workspace = again(static_cast<unsigned char*>(a.workspace));
  }

  template <typename U>
  __device__ __forceinline__ U* space(size_t offset) const {
    return reinterpret_cast<U*>(workspace + offset);
  }
  __device__ __forceinline__ const T* packed(int64_t offset) const { return static_cast<const T*>(a.packed) + offset; }
  // The residual stream as steps from qkv to proj of a layer read it (the head's is that of one more), or up and down.
  __device__ __forceinline__ float* stream(int layer, bool later) const {
    return space<float>(at.x) + (2 * layer + later) * int64_t(rows) * dim;
  }
  __device__ __forceinline__ T* queries(int layer) const { return space<T>(at.q) + layer * int64_t(rows) * dim; }
  __device__ __forceinline__ T* attention(int layer) const { return space<T>(at.y) + (kDirect ? layer * int64_t(rows) * dim : 0); }
  __device__ __forceinline__ T* normed() const { return space<T>(at.y) + int64_t(rows) * dim; }  // behind the one attention
  __device__ __forceinline__ T* states(int layer) const { return space<T>(at.h) + (kDirect ? layer * int64_t(rows) * dim * 4 : 0); }
  __device__ __forceinline__ T* cache(int layer, int which, int d) const {
    return space<T>(at.cache) + ((int64_t(layer) * 2 + which) * s.depth + d) * rows * dim;
  }

  // The matrix of step `index` of depth d: 0 is the input's, then four a layer, then the head's.
  __device__ __forceinline__ int kind_of(int d, int index) const {
    return index == 0 ? (d ? kCode : kHidden) : index == 4 * s.layers + 1 ? kLast : kLayer + (index - 1) % 4;
  }
  __device__ __forceinline__ const uint4* weights_of(int kind, int index) const {
    int64_t offset;
    switch (kind) {
      case kHidden:
        offset = layout.hidden;
        break;
      case kCode:
        offset = layout.code;
        break;
      case kLast:
        offset = layout.head;
        break;
      default: {
        const int64_t within = kind == kLayer ? layout.qkv : kind == kLayer + 1 ? layout.proj
                               : kind == kLayer + 2 ? layout.up : layout.down;
        offset = layout.blocks + (index - 1) / 4 * layout.block + within;
      }
    }
    return reinterpret_cast<const uint4*>(packed(offset));
  }

  __device__ __forceinline__ Share* share(int kind) const {
    return reinterpret_cast<Share*>(memory + free_bytes + kBarrierBytes) + kind;
  }

  // Computed once, for it takes divisions.
  __device__ __forceinline__ void find_share(int kind) const {
    const int step = kind - kLayer;
    const int outputs = kind == kLast ? s.num_codes : step == 0 ? 3 * dim : step == 2 ? 4 * dim : dim;
    const int inputs = kind == kHidden ? s.hidden_dim : kind == kCode ? s.code_dim : step == 3 ? 4 * dim : dim;
    const bool divided = step == 1 || step == 3;
    const int tiles = (outputs + 15) / 16, chunks = (inputs + kChunk - 1) / kChunk, all = tiles * chunks;
    const int size = share_of(tiles, chunks, divided, ((divided ? all : tiles) + int(gridDim.x) - 1) / int(gridDim.x));
    Share own{chunks};
    if (step == 3 && groups > 1) {
      const int runs = int(gridDim.x) / groups, run = int(blockIdx.x) / groups, group = int(blockIdx.x) % groups;
      const int each = (tiles + runs - 1) / runs;
      own.first_tile = run * each;
      own.own_tiles = max(min(each, tiles - own.first_tile), 0);
      own.low = own.column = own.span_first = group * (chunks / groups);
      own.high = own.stop = own.span_last = own.low + chunks / groups;
      own.number = own.other_number = group;
    } else {
      const int begin = min(int(blockIdx.x) * size, all), end = min(begin + size, all);
      if (begin < end) {
        own.first_tile = begin / chunks;
        own.own_tiles = (end + chunks - 1) / chunks - own.first_tile;
        own.high = chunks;
        own.column = begin - own.first_tile * chunks;
        own.stop = end - (own.first_tile + own.own_tiles - 1) * chunks;
        own.number = own.column > 0 ? int(blockIdx.x) - own.first_tile * chunks / size : 0;
        own.span_first = own.own_tiles == 1 ? own.column : 0;
        own.span_last = own.own_tiles == 1 ? own.stop : chunks;
      }
    }
    *share(kind) = own;
  }

  // ---- the ring

  __device__ __forceinline__ unsigned char* stage(int slot) const {
    return memory + free_bytes + kBarrierBytes + kShareBytes + slot * kStageBytes;
  }
  __device__ __forceinline__ unsigned char* full(int slot) const { return memory + free_bytes + slot * 16; }
  __device__ __forceinline__ unsigned char* empty(int slot) const { return full(slot) + 8; }

  __device__ __forceinline__ void begin() const {
    if (threadIdx.x < kKinds && (threadIdx.x != kHidden || s.hidden_dim)) find_share(threadIdx.x);
    if (threadIdx.x == 0) waits() = 0;
    if (threadIdx.x < slots) stage_barriers(full(threadIdx.x), empty(threadIdx.x), kThreads);
    stage_barriers_done();
    __syncthreads();
  }

  // Calls use(tile, column, count) for the stages of a share: chunks of one tile from a column on, each at its warp's place.
  template <typename Use>
  __device__ __forceinline__ void for_stages(const Share& own, const Use& use) const {
    int column = own.column;
#pragma unroll 1
    for (int t = 0; t < own.own_tiles; ++t, column = own.low) {
      const int last = t + 1 == own.own_tiles ? own.stop : own.high;
#pragma unroll 1
      while (column < last) {
        const int count = min(kWarps - column % kWarps, last - column);
        use(own.first_tile + t, column, count);
        column += count;
      }
    }
  }

  // The last warp, from the first depth to the last: fills the ring with what the others will multiply. What is on its way
  // is bounded, for what they read comes through the same queues: it may not be more than the ring has, kLeastSlots.
  __device__ __forceinline__ void bring() const {
    Place place{0, 1}, come{0, 0};
    int ahead = 0;
#pragma unroll 1
    for (int d = 0; d < s.depth; ++d) {
#pragma unroll 1
      for (int index = d == 0 && s.hidden_dim == 0 ? 1 : 0; index < 4 * s.layers + 2; ++index) {
        const int kind = kind_of(d, index);
        const Share own = *share(kind);
        const uint4* weights = weights_of(kind, index);
        for_stages(own, [&](int tile, int column, int count) {
          stage_wait(empty(place.slot), place.parity);
          if (ahead == (s.dim <= kNarrow ? 1 : 2)) {
            stage_wait(full(come.slot), come.parity);
            come.next(slots);
          } else {
            ++ahead;
          }
          stage_copy(stage(place.slot) + column % kWarps * kChunkBytes,
                     weights + (int64_t(tile) * own.chunks + column) * kChunkLoads, count * kChunkBytes, full(place.slot));
          place.next(slots);
        });
      }
    }
  }

  // The block's next stage; then it is free.
  __device__ __forceinline__ const unsigned char* take(const Place& place) const {
    stage_wait(full(place.slot), place.parity);
    return stage(place.slot);
  }
  __device__ __forceinline__ void release(Place& place) const {
    // Every lane for itself: so tools that look for races see that its reads come before, and it costs nothing.
    stage_arrive(empty(place.slot));
    place.next(slots);
  }

  // Of a launch that is stopped before step `index` of depth d: no copy may outlive the block.
  __device__ __forceinline__ void drain(Place& place, int d, int index) const {
    for (; d < s.depth; ++d, index = 0) {
      for (; index < 4 * s.layers + 2; ++index) {
        for_stages(*share(kind_of(d, index)), [&](int, int, int) {
          take(place);
          release(place);
        });
      }
    }
  }

  // How often the grid has waited; in shared memory, for a register is not to be had.
  __device__ __forceinline__ uint32_t& waits() const { return *reinterpret_cast<uint32_t*>(share(kKinds)); }

  // After step `index` - 1; returns whether the launch ends here.
  __device__ __forceinline__ bool wait(int d, int index) {
    const int steps = 4 * s.layers + 2;
    if (!kDirect || index == steps || (index == 0 && d > 0)) {
      grid_wait(space<uint32_t>(at.barrier), [&] { return ++waits() * gridDim.x - 1; }, [] {});
    } else {
      copies_wait();
      block_wait();  // before sums are written again
    }
    return a.stop >= 0 && d * (steps + 1) + index >= a.stop;
  }

  // ---- the residual stream

  // What lies beside it when a step of a layer (the head's is that of one more) reads it.
  struct Extra {
    const float* from;
    int count;
  };
  __device__ __forceinline__ float* part(int layer, int which, int number) const {
    return space<float>(at.parts) + ((2 * layer + which) * kExtras + number) * int64_t(rows) * dim;
  }
  __device__ __forceinline__ Extra beside(int layer, Step step) const {
    if (step == kUp || step == kDown) return {part(layer, 0, 0), extras[0]};
    return {part(layer - 1, 1, 0), layer > 0 ? extras[1] : 0};
  }

  // ---- what a matrix is multiplied with

  __device__ __forceinline__ int stage_at() const { return kVectorsAt + dim * 4; }
  __device__ __forceinline__ bool fits(int bytes) const { return stage_at() + rows * (bytes + kPad) <= free_bytes; }

  __device__ __forceinline__ void stage_norm(int layer, Step step) const {
    const Extra extra = beside(layer, step);
    const float* from = stream(layer, step == kUp);
    if (norm_span <= 64)
      normalise_posted<T, 2>(from, extra.from, extra.count, rows, dim, norm_shift, norm_span, memory);
    else
      normalise_posted<T, kNormPacks>(from, extra.from, extra.count, rows, dim, norm_shift, norm_span, memory);
  }

  __device__ __forceinline__ int first_own(int chunk) const { return chunk + ((warp - chunk) & (kWarps - 1)); }

  // What a matrix is multiplied with: where chunk 0 of row 0 would be, in global memory or, if that is null, so many bytes
  // into shared memory; and the bytes from row to row.
  struct Inputs {
    const unsigned char* global;
    int shared, pitch;
    int copies;  // on their way to shared memory, a chunk each
  };

  // Rows of so many numbers as they lie in memory, of them the chunks that the block multiplies; in shared memory if they fit.
  // Each warp copies the chunks that it multiplies, in the order in which it does, and waits for each when it comes to it.
  __device__ __forceinline__ Inputs copy_rows(const T* rows_at, int width, const Share& share) const {
    const int bytes = (share.span_last - share.span_first) * kChunk * 2, own_row = lane / 8;
    if (!fits(bytes)) return {reinterpret_cast<const unsigned char*>(rows_at), 0, width * 2, 0};
    const int begin = stage_at() - share.span_first * kChunk * 2, pitch = bytes + kPad;
    unsigned char* to = memory + begin + own_row * pitch + lane % 8 * 16;
    const T* from = rows_at + int64_t(own_row) * width + lane % 8 * 8;
    int copies = 0;
    const auto copy = [&](int first, int last) {
#pragma unroll 1
      for (int chunk = first_own(first); chunk < last; chunk += kWarps, ++copies) {
#pragma unroll
        for (int row = 0; row < kColumns; row += 4)
          if (row + own_row < rows) copy_early(to + row * pitch + chunk * kChunk * 2, from + int64_t(row) * width + chunk * kChunk);
        copies_begun();
      }
    };
    copy(share.column, share.span_last);
    copy(share.span_first, share.column);
    return {nullptr, begin, pitch, copies};
  }

  // The same where they are posted, or nearly, and fit: many packs of 16 bytes at a time.
  __device__ __forceinline__ Inputs stage_rows(const T* rows_at, int width, const Share& share, bool are_posted) {
    const int bytes = (share.span_last - share.span_first) * kChunk * 2;
    constexpr int kBatch = 8;
    const int first = first_own(share.span_first), own_row = lane / 8;
    const int begin = stage_at() - share.span_first * kChunk * 2;
    unsigned char* to = memory + begin + own_row * (bytes + kPad) + lane % 8 * 16;
    const T* from = rows_at + int64_t(own_row) * width + lane % 8 * 8;
    int row = 0, chunk = first;  // the former of the warp's first lanes
    while (row < rows && first < share.span_last) {
      uint4 held[kBatch];
      int places[kBatch], froms[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const bool there = row + own_row < rows;
        places[j] = there ? row * (bytes + kPad) + chunk * kChunk * 2 : -1;
        froms[j] = row * width + chunk * kChunk;
        held[j] = there ? posted(reinterpret_cast<const uint4*>(from + froms[j])) : uint4{};
        chunk += kWarps;
        if (chunk >= share.span_last) {
          chunk = first;
          row += 4;
        }
      }
      if (are_posted) wait_posted(held, [&](int j) { return reinterpret_cast<const uint4*>(from + froms[j]); });
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (places[j] >= 0) *reinterpret_cast<uint4*>(to + places[j]) = held[j];
    }
    __syncwarp();
    return {nullptr, begin, bytes + kPad, 0};
  }

  __device__ __forceinline__ Attended<T> attended(int layer) const {
    return {queries(layer), cache(layer, 0, 0), cache(layer, 1, 0), rows, dim};
  }

  __device__ __forceinline__ void stage_attention(int layer, int d, const Share& share) {
    if (rows <= 2)
      stage_heads<16>(attended(layer), d, share.span_first, share.span_last, memory);
    else
      stage_heads<4>(attended(layer), d, share.span_first, share.span_last, memory);
  }

  // The norm before step `index`, each row by one block: the last ones, which have the least to multiply.
  __device__ __forceinline__ int first_row() const { return int(gridDim.x) - 1 - int(blockIdx.x); }
  __device__ __forceinline__ void normalise_apart(int index) const {
    const int layer = (index - 1) / 4;
    const Step step = step_of(index);
    const Extra extra = beside(layer, step);
    const float* from = stream(layer, step == kUp);
    const auto normalise = [&](auto held, int row) {
      normalise_row<T, decltype(held)::value, kExtras>(from + int64_t(row) * dim, extra.from + int64_t(row) * dim,
                                                       int64_t(rows) * dim, extra.count, dim, memory,
                                                       normed() + int64_t(row) * dim);
    };
#pragma unroll 1
    for (int row = first_row(); row < rows; row += gridDim.x) {
      if (dim <= 4 * kThreads)
        normalise(std::integral_constant<int, 1>{}, row);
      else
        normalise(std::integral_constant<int, 3>{}, row);
    }
  }

  // Attention, each head by one warp of the grid.
  __device__ __forceinline__ void attend_apart(int layer, int d) {
    const int groups = (rows + 7) / 8;
#pragma unroll 1
    for (int i = warp * gridDim.x + blockIdx.x; i < dim / kHeadDim * groups; i += kWarps * gridDim.x) {
      const int number = i / groups, group = i % groups;
      const Attended<T> from = attended(layer);
      const int64_t place = place_of<4>(from, number, group);
      Head<4> head;
      read_head<4>(head, from, d, place);
      attend<4>(head, from, d, place);
      if (group * 8 + lane / 4 < rows) put_head<kDirect>(head, attention(layer) + place);
    }
  }

  // ---- products

  // What a chunk of weights is multiplied with, of all rows: `from` is the lane's first 16 bytes of row lane / 4.
  template <bool kShared>
  __device__ __forceinline__ void read_inputs(uint4 (&to)[kGroups][2], const unsigned char* from, int pitch) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        to[group][half] = {0, 0, 0, 0};
        const unsigned char* own = from + group * 8 * pitch + half * 64;
        if (group * 8 + lane / 4 < rows)
          to[group][half] = kShared ? *reinterpret_cast<const uint4*>(own) : load_shared_by_all(own);
      }
    }
  }

  // The block's part of one tile, of the chunks from `first` to `last`: of each stage a warp has one. Inputs in global memory
  // are read kAhead stages ahead, to registers in turn.
  template <bool kShared>
  __device__ __forceinline__ void tile(Place& place, int first, int last, float (&sum)[kAccumulators][4],
                                       const unsigned char* from, int pitch, int& copies) {
    constexpr int kSets = kAccumulators / kGroups;  // of accumulators: no product waits for the one before
    constexpr int kAhead = kShared || kGroups == 4 ? 1 : 2;
    uint4 inputs[kAhead][kGroups][2] = {};
    int chunk = first - first % kWarps + warp;
    const auto has = [&](int chunk) { return chunk >= first && chunk < last; };
    const auto at = [&](int chunk) { return from + chunk * kChunk * 2; };
    if (!kShared) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (has(chunk + j * kWarps)) read_inputs<kShared>(inputs[j], at(chunk + j * kWarps), pitch);
    }
    while (chunk - warp < last) {
#pragma unroll
      for (int turn = 0; turn < kAhead; ++turn) {
        if (chunk - warp >= last) break;
        const bool own = has(chunk);
        const uint4* weights_at = reinterpret_cast<const uint4*>(take(place) + warp * kChunkBytes) + lane;
        uint4 weights[kPieces];
        if (own) {
          if (!kDirect && kShared && copies > 0) {
            copies_wait(--copies);
            __syncwarp();
          }
          if (kShared) read_inputs<kShared>(inputs[turn], at(chunk), pitch);
#pragma unroll
          for (int i = 0; i < kPieces; ++i) weights[i] = weights_at[i * 32];
        }
        if (own) {
#pragma unroll
          for (int i = 0; i < kPieces; ++i) {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
              const uint4& b = inputs[turn][group][i / 2];
              multiply_tile<T>(sum[group * kSets + i % kSets], weights[i], i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
            }
          }
        }
        release(place);  // not before all of it is in registers, as products have it
        if (!kShared && has(chunk + kAhead * kWarps))
          read_inputs<kShared>(inputs[turn], at(chunk + kAhead * kWarps), pitch);
        chunk += kWarps;
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& total = sum[group * kSets][i];
        if (kSets == 4)
          total = (total + sum[1][i]) + (sum[2][i] + sum[3][i]);
        else if (kSets == 2)
          total += sum[group * kSets + 1][i];
      }
    }
  }

  // Outputs of tiles that are added up together are the block's threads', of each step in the same way: thread i has those of
  // number i, i + kThreads, ..., which go through a tile's outputs, then its rows, then the tiles.
  struct Output {
    int tile, row, m;     // tile of those that are added up
    bool there, first;    // whether it is one of a row and of the matrix; whether this block is the first of its tile
  };
  __device__ __forceinline__ Output output_of(const Share& share, Step step, int first, int j) const {
    const Divisor sharing = step == kHead ? pairs : all_rows;
    const int i = threadIdx.x + j * kThreads, tile = sharing.quotient(i / 16);
    const int m = (share.first_tile + first + tile) * 16 + i % 16;
    const bool there = tile < min(kTiles, share.own_tiles - first) && (step != kHead || m < s.num_codes);
    return {tile, i / 16 - tile * int(sharing.number), m, there, (first + tile > 0 ? share.other_number : share.number) == 0};
  }
  // Whether any thread has a j-th one.
  __device__ __forceinline__ bool any_has(const Share& share, Step step, int first, int j) const {
    const int shown = step == kHead ? pairs.number : all_rows.number;
    return j * kThreads < min(kTiles, share.own_tiles - first) * shown * 16;
  }
  __device__ __forceinline__ Step step_of(int index) const {
    return index == 0 ? kInput : index == 4 * s.layers + 1 ? kHead : static_cast<Step>(kQkv + (index - 1) % 4);
  }
  // What is added to output m of a step, for one row, besides the product: biases, position, what x held.
  __device__ __forceinline__ Addend read_addend(int d, int layer, Step step, int m, int row, bool there) const {
    const unsigned short* vectors = static_cast<const unsigned short*>(a.packed) + m;
    int64_t bias = layout.vectors + layer * layout.block_vectors;
    if (step == kInput)
      bias = d ? layout.code_bias : layout.hidden_bias;
    else if (step == kHead)
      bias = layout.head_bias;
    else
      bias += (step == kQkv ? 2 : step == kProj ? 5 : step == kUp ? 8 : 12) * dim;
    const bool adds = there && (step == kProj || step == kDown);
    const int place = row * dim + m;
    const Extra extra = beside(layer, step);
    Addend read{};
    if (there) read.bias = __ldg(vectors + bias);
    if (there && step == kInput) read.held[0] = __uint_as_float(__ldg(vectors + layout.position + int64_t(d) * dim));
    const auto number = [](const float* from) { return __uint_as_float(posted(reinterpret_cast<const uint32_t*>(from))); };
    if (adds) read.held[0] = number(stream(layer, step == kDown) + place);
#pragma unroll
    for (int e = 0; e < kExtras; ++e)
      if (adds && e < extra.count) read.held[1 + e] = number(extra.from + e * rows * dim + place);
    return read;
  }

  // Where a thread's output of the tiles that are added up is posted, and what is added; found while inputs are waited for.
  struct Target {
    void* to;           // null: it has none
    int red;            // where its sums are
    int m, row, zeros;  // zeros: parts of the residual stream that no block has, as many as are posted
    Addend addend;
  };
  __device__ __forceinline__ Target target_of(const Share& share, int d, int layer, Step step, int first, int j) const {
    Target target{};
    if (!any_has(share, step, first, j)) return target;
    const Output own = output_of(share, step, first, j);
    const int number = first + own.tile > 0 ? share.other_number : share.number, place = own.row * dim + own.m;
    target.m = own.m;
    if (!own.there) return target;
    target.row = own.row;
    target.red = (own.tile * kColumns + own.row) * kRedPitch + own.m % 16;
    target.addend = read_addend(d, layer, step, own.m, own.row, own.first);
    if (step == kQkv) {
      const int which = int(own.m >= dim) + int(own.m >= 2 * dim);
      target.to = (which ? cache(layer, which - 1, d) : queries(layer)) + place - which * dim;
    } else if (step == kUp) {
      target.to = states(layer) + place + own.row * 3 * dim;
    } else if (step == kProj || step == kDown) {
      target.to = (number > 0 ? part(layer, step == kDown, number - 1) : stream(layer + (step == kDown), step == kProj)) + place;
      // Who has the end of a tile posts zeros for the parts that it has less than others.
      const int last = first + own.tile + 1 == share.own_tiles ? share.stop : share.high;
      if (last == share.chunks) target.zeros = extras[step == kDown] - number;
    } else {
      target.to = stream(0, false) + place;  // of the head: anything
    }
    return target;
  }

  // By all lanes of a warp: neighbours have the two halves of a word.
  __device__ __forceinline__ void post_output(const Target& target, int layer, Step step, float value) const {
    uint32_t word = __float_as_uint(value);
    if (step == kQkv || step == kUp) {
      if (step == kUp) value = 0.5f * value * (1 + erff(value * 0.70710678118654752f));
      word = pack_word(value, __shfl_xor_sync(~0u, value, 1), T{});
      if (target.m % 2 == 1) return;
    }
    if (target.to == nullptr) return;
    if (step == kUp && !kDirect) {
      *static_cast<uint32_t*>(target.to) = word;
      return;
    }
    post(target.to, word == kAbsent ? kAbsent >> 1 : word);
    if (step == kProj || step == kDown)
      for (int e = 0; e < target.zeros; ++e)
        post(part(layer, step == kDown, extras[step == kDown] - 1 - e) + target.row * dim + target.m, 0);
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

  // One matrix; sums of the first tiles go to `targets`.
  __device__ __forceinline__ void product(Place& place, const Share& share, Inputs& inputs, Target (&targets)[kOwn],
                                          int d, int layer, Step step) {
    const int shown = step == kHead ? pairs.number : all_rows.number;
    const int own_inputs = lane / 4 * inputs.pitch + lane % 4 * 16;
    float* red = reinterpret_cast<float*>(memory);
    float* own_red = red + (warp * kTiles * kColumns + lane % 4 * 2) * kRedPitch + lane / 4;
#pragma unroll 1
    for (int first = 0;;) {
      const int count = min(kTiles, share.own_tiles - first);
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        const int begin = first + t == 0 ? share.column : share.low;
        const int end = first + t + 1 == share.own_tiles ? share.stop : share.high;
        float sum[kAccumulators][4] = {};
        if (!kDirect && step == kInput && inputs.global != nullptr)
          tile<false>(place, begin, end, sum, inputs.global + own_inputs, inputs.pitch, inputs.copies);
        else
          tile<true>(place, begin, end, sum, memory + inputs.shared + own_inputs, inputs.pitch, inputs.copies);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          float* to = own_red + (t * kColumns + group * 8) * kRedPitch;
          const float(&own)[4] = sum[group * (kAccumulators / kGroups)];
          to[0] = own[0];
          to[kRedPitch] = own[1];
          to[8] = own[2];
          to[kRedPitch + 8] = own[3];
        }
      }
      block_wait();
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (!any_has(share, step, first, j)) break;
        Target& target = targets[j];
        if (kDirect && (step == kProj || step == kDown))  // it was there when the block's inputs were, or nearly
          read_until([&] { return target.to != nullptr && target.addend.absent(); },
                     [&] { target.addend = read_addend(d, layer, step, target.m, target.row, true); });
        const float more = target.addend.sum(step);
        const auto add = [&](int row) {
          const float* from = red + target.red + row * kRedPitch;
          float sum = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += from[w * kTiles * kColumns * kRedPitch];
          return sum + more;
        };
        if (step != kHead) {
          post_output(target, layer, step, add(0));
        } else if (target.to != nullptr) {
          const float conditional = put_logit(d, target.m, target.row, add(0));
          const float other = s.guided ? put_logit(d, target.m, target.row + shown, add(shown)) : 0.f;
          put_key(d, target.m, target.row, conditional, other);
        }
      }
      first += kTiles;
      if (first >= share.own_tiles) break;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) targets[j] = target_of(share, d, layer, step, first, j);
      block_wait();
    }
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
    constexpr int kBatch = 4;  // channels of a thread that are read before any is written
#pragma unroll 1
    for (int first = threadIdx.x; first < width; first += kBatch * kThreads) {
      Book before[kBatch], more[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int channel = first + j * kThreads;
        before[j] = d > 0 && channel < s.code_dim ? total[channel] : narrow<Book>(0.f);
        more[j] = entry != nullptr && channel < s.code_dim ? __ldg(entry + channel) : narrow<Book>(0.f);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int channel = first + j * kThreads;
        if (channel >= width) continue;
        const Book sum = narrow<Book>(wide(before[j]) + wide(more[j]));
        if (channel < s.code_dim) total[channel] = sum;
        sums[channel] = narrow<T>(wide(sum));
        if (s.guided) sums[int64_t(rows / 2) * width + channel] = narrow<T>(wide(sum));
      }
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
        code = draw_code(memory, space<int>(at.keys) + int64_t(row) * stride, s.num_codes, (free_bytes - kKeysAt) / 4 & ~3,
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

  // In the draw's phase: what was posted at this depth but keys and values is forgotten.
  __device__ __forceinline__ void empty_places() const {
    const int count = s.guided ? rows / 2 : rows, packs = int(((kDirect ? at.cache : at.y) - at.parts) / 16);
    const int first = count < int(gridDim.x) ? count : 0;  // blocks that draw have enough to do
    if (int(blockIdx.x) < first) return;
    uint4* places = space<uint4>(at.parts);
    for (int i = (blockIdx.x - first) * kThreads + threadIdx.x; i < packs; i += (gridDim.x - first) * kThreads)
      places[i] = {kAbsent, kAbsent, kAbsent, kAbsent};
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

  // The same of the noise that a depth's codes are drawn with.
  __device__ __forceinline__ void fetch_noise(int d) const {
    constexpr int kPiece = 512;  // numbers
    const int pieces = s.num_codes / kPiece, count = s.guided ? rows / 2 : rows;
    if (a.noise == nullptr || a.inverse_temperature[d] == 0) return;
    for (int i = blockIdx.x; i < count * pieces; i += gridDim.x) {
      const float* from = a.noise + i / pieces * a.noise_row + d * a.noise_depth + i % pieces * kPiece;
      if (reinterpret_cast<uintptr_t>(from) % 16 == 0) fetch_ahead(from);
    }
  }

  // The gain and bias of the norm before step `index` of a depth; null if it has none.
  __device__ __forceinline__ const T* norm_before(int index) const {
    if (index == 4 * s.layers + 1) return packed(layout.norm);
    if (index == 0 || index % 4 == 2 || index % 4 == 0) return nullptr;
    return packed(layout.vectors + (index - 1) / 4 * layout.block_vectors) + (index % 4 == 1 ? 0 : 6 * dim);
  }

  // The gain and bias of the norm before step `index`, which has one, to where they are expected; by the next wait.
  __device__ __forceinline__ void copy_vectors(int index) const {
    const uint4* from = reinterpret_cast<const uint4*>(norm_before(index));
#pragma unroll 1
    for (int i = threadIdx.x; i < dim / 4; i += kThreads)
      copy_early(memory + kVectorsAt + i * 16, from + i);
  }

  __device__ __forceinline__ void fetch_after(int d, int layer, Step step, int index) const {
    if (warp != kWarps - 1 || lane != 0) return;
    fetch_vectors(layer, step);
    if (index == 4 * s.layers) fetch_noise(d);
  }

  // The matrix of step `index`, and what it is multiplied with. What can be done before that is there is done first.
  __device__ __forceinline__ void multiply(Place& place, int d, int index, Step step) {
    const int layer = (index - 1) / 4;
    const bool norm = step == kQkv || step == kUp || step == kHead;
    if (!norm && (kDirect || first_row() < rows)) copy_vectors(index + 1);
    const bool apart = step == kProj && kDirect && dim > kOwnHeads * kHeadDim;
    if (apart) attend_apart(layer, d);
    const Share now = *share(step == kInput ? (d ? kCode : kHidden) : step == kHead ? kLast : kLayer + step - kQkv);
    if (now.own_tiles > 0) {
      const T* from = step == kProj ? attention(layer) : step == kDown ? states(layer) : step != kInput ? normed()
                      : d == 0 ? static_cast<const T*>(a.hidden) : space<T>(at.sums);
      Inputs inputs{nullptr, stage_at(), dim * 2 + kPad, 0};
      if constexpr (!kDirect) inputs = copy_rows(from, now.chunks * kChunk, now);
      Target targets[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) targets[j] = target_of(now, d, layer, step, 0, j);
      if (kDirect && norm)
        stage_norm(layer, step);
      else if (kDirect && step == kProj && !apart)
        stage_attention(layer, d, now);
      else if (kDirect)
        inputs = stage_rows(from, now.chunks * kChunk, now, step != kInput);
      product(place, now, inputs, targets, d, layer, step);
      if (!kDirect) copies_wait();  // of what is not multiplied: a share may end before it comes round
    }
    fetch_after(d, layer, step, index);
    if (!kDirect && step == kQkv) attend_apart(layer, d);
  }

  // With a way of its own through the code for each kind of step: to choose on the way takes as long as to work.
  __device__ __forceinline__ void multiply_step(Place& place, int d, int index) {
    switch (step_of(index)) {
      case kInput:
        return multiply(place, d, index, kInput);
      case kQkv:
        return multiply(place, d, index, kQkv);
      case kProj:
        return multiply(place, d, index, kProj);
      case kUp:
        return multiply(place, d, index, kUp);
      case kDown:
        return multiply(place, d, index, kDown);
      default:
        return multiply(place, d, index, kHead);
    }
  }

  __device__ __forceinline__ void run() {
    const int steps = 4 * s.layers + 2;
    begin();
    if (threadIdx.x >= kThreads) return bring();
    Place place{0, 0};
    int d = 0, index = 0;
    do {
      look_again();
      if (index == steps) {
        empty_places();
        draw(d);
        if (++d == s.depth) return;
        index = 0;
      } else if (index == 0 && d == 0 && s.hidden_dim == 0) {
        index = 1;
        if (kDirect || first_row() < rows) copy_vectors(index);
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < rows * dim; i += gridDim.x * kThreads) {
          const float sum = wide(static_cast<const T*>(a.hidden)[i]) + wide(packed(layout.position)[i % dim]);
          post(stream(0, false) + i, __float_as_uint(sum) == kAbsent ? kAbsent >> 1 : __float_as_uint(sum));
        }
      } else {
        multiply_step(place, d, index);
        ++index;
      }
      if (!kDirect && norm_before(index) != nullptr) normalise_apart(index);
    } while (!wait(d, index));
    drain(place, d, index);
  }
};

// Grid: as many blocks as there are multiprocessors, all of them there at the same time.
template <typename T, int kGroups, bool kDirect>
__global__ void __launch_bounds__(kAllThreads, 1) depth_decode_kernel(const __grid_constant__ Kernel kernel) {
  Decoder<T, kGroups, kDirect>(kernel).run();
}

using Function = void (*)(Kernel);

Function function_of(DType dtype, int rows, bool direct) {
  const bool half = dtype == DType::kFloat16;
  if (direct) return half ? depth_decode_kernel<__half, 1, true> : depth_decode_kernel<__nv_bfloat16, 1, true>;
  if (rows <= 8) return half ? depth_decode_kernel<__half, 1, false> : depth_decode_kernel<__nv_bfloat16, 1, false>;
  if (rows <= 16) return half ? depth_decode_kernel<__half, 2, false> : depth_decode_kernel<__nv_bfloat16, 2, false>;
  return half ? depth_decode_kernel<__half, 4, false> : depth_decode_kernel<__nv_bfloat16, 4, false>;
}

// How normalise_posted shares rows among warps.
int norm_shift_of(int rows) { return rows == 1 ? 3 : rows == 2 ? 2 : 1; }
int norm_span_of(const DepthSizes& sizes) { return padded(sizes.dim / 4, 32 << norm_shift_of(sizes.rows)) >> norm_shift_of(sizes.rows); }

// Whether rows are so few that every block may normalise them, and the workspace has places for each step.
bool has_places(const DepthSizes& sizes) { return sizes.rows <= kDirectRows && norm_span_of(sizes) <= 32 * kNormPacks; }

struct Plan {
  int blocks, shared, free_bytes, slots, groups;  // groups: of the columns of the matrix down
  bool direct;
};

// The grid and its shared memory; 0 blocks if the sizes do not fit the device.
cudaError_t plan(const DepthSizes& sizes, DType dtype, Plan* plan) {
  *plan = {};
  int device = 0, together = 0, per = 0, shared = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); e != cudaSuccess)
    return e;
  if (!together) return cudaSuccess;
  // A norm's rows and the least that a draw needs have to fit beside two slots; all keys of a row, and the MLP's states,
  // beside six.
  const auto slots_beside = [&](int64_t bytes) { return int((int64_t(shared) - kBarrierBytes - kShareBytes - bytes) / kStageBytes); };
  const auto staged = [&](int64_t width) { return kVectorsAt + sizes.dim * 4 + sizes.rows * (width * 2 + kPad); };
  int slots = std::min({kMostSlots, slots_beside(staged(sizes.dim)), slots_beside(kKeysAt)});
  for (const int64_t more : {int64_t(kKeysAt) + padded(sizes.num_codes, 4) * 4, staged(4 * int64_t(sizes.dim))})
    if (slots_beside(more) >= 6) slots = std::min(slots, slots_beside(more));
  if (slots < kLeastSlots) return cudaSuccess;
  // Words that are waited for are read once: what a matrix is multiplied with has to fit.
  const int free_bytes = shared - kBarrierBytes - kShareBytes - slots * kStageBytes;
  const bool direct = has_places(sizes) && staged(std::max({4 * int64_t(sizes.dim), int64_t(sizes.hidden_dim),
                                                            int64_t(padded(sizes.code_dim, kChunk))})) <= free_bytes;
  const int groups = staged(4 * int64_t(sizes.dim)) <= free_bytes ? 1 : kColumnGroups;
  const Function function = function_of(dtype, sizes.rows, direct);
  if (const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(function),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      e != cudaSuccess)
    return e;
  if (const cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per, function, kAllThreads, shared); e != cudaSuccess)
    return e;
  if (per < 1) return cudaSuccess;
  int blocks = 0;
  if (const cudaError_t e = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  if (blocks >= groups) *plan = {blocks, shared, free_bytes, slots, groups, direct};
  return cudaSuccess;
}

// Parts of a divided matrix' tiles beside the first.
int extras_of(const DepthSizes& sizes, int inputs, int blocks) {
  const int tiles = (sizes.dim + 15) / 16, chunks = inputs / kChunk;
  const int share = share_of(tiles, chunks, true, (tiles * chunks + blocks - 1) / blocks);
  int most = 0;
  for (int tile = 0; tile < tiles; ++tile)
    most = std::max(most, ((tile + 1) * chunks - 1) / share - tile * chunks / share);
  return most;
}

}  // namespace

DepthWorkspace workspace_depth_decode(const DepthSizes& s) {
  DepthWorkspace at{};
  const auto take = [&](size_t bytes) {
    const size_t begin = at.bytes;
    at.bytes += (bytes + 255) / 256 * 256;
    return begin;
  };
  const size_t rows = s.rows, dim = s.dim, layers = std::max(s.layers, 1), places = has_places(s) ? layers : 1;
  at.barrier = take(4);
  at.parts = take(rows * dim * 4 * 2 * kMostExtras * layers);
  at.x = take(rows * dim * 4 * (2 * layers + 1));
  at.q = take(rows * dim * 2 * layers);
  at.y = take(rows * dim * 2 * std::max<size_t>(places, 2));
  at.h = take(rows * dim * 8 * places);
  at.cache = take(rows * dim * 2 * 2 * s.layers * s.depth);
  at.sums = take(rows * padded(s.code_dim, kChunk) * 2);
  at.keys = take((s.guided ? rows / 2 : rows) * padded(s.num_codes, 4) * 4);
  return at;
}

int64_t packed_depth_decode(const DepthSizes& sizes) { return DepthLayout(sizes).end; }

cudaError_t rows_depth_decode(const DepthSizes& sizes, DType dtype, int* rows) {
  DepthSizes one = sizes;
  for (*rows = kMaxDepthRows; *rows > 0; *rows -= 2) {
    Plan found;
    one.rows = *rows;
    if (const cudaError_t e = plan(one, dtype, &found); e != cudaSuccess) return e;
    if (found.blocks > 0) break;
  }
  return cudaSuccess;
}

cudaError_t launch_depth_decode(const DepthArgs& args, DType dtype, cudaStream_t stream) {
  if (args.sizes.rows < 1 || args.sizes.rows > kMaxDepthRows || args.sizes.depth > kMaxDepth)
    return cudaErrorInvalidConfiguration;
  Plan found;
  if (const cudaError_t e = plan(args.sizes, dtype, &found); e != cudaSuccess) return e;
  if (found.blocks == 0) return cudaErrorInvalidConfiguration;
  const int rows = args.sizes.rows, dim = args.sizes.dim;
  Kernel kernel{args,
                workspace_depth_decode(args.sizes),
                DepthLayout(args.sizes),
                Divisor(rows),
                Divisor(args.sizes.guided ? rows / 2 : rows),
                found.free_bytes,
                found.slots,
                norm_shift_of(rows),
                norm_span_of(args.sizes),
                found.groups,
                {extras_of(args.sizes, dim, found.blocks),
                 found.groups > 1 ? found.groups - 1 : extras_of(args.sizes, 4 * dim, found.blocks)}};
  // The counter of the barriers, and all places of words that are waited for.
  if (const cudaError_t e = cudaMemsetAsync(static_cast<unsigned char*>(args.workspace) + kernel.at.barrier, 255,
                                            kernel.at.sums - kernel.at.barrier, stream);
      e != cudaSuccess)
    return e;
  void* arguments[] = {&kernel};
  const Function function = function_of(dtype, rows, found.direct);
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(function), dim3(found.blocks), dim3(kAllThreads), arguments,
                                     found.shared, stream);
}

}  // namespace unifiedar
