// Where the kernels of attention's gradients work on compute capability 9.0: what a tile is, what it sees or who sees it.
// What they do there is in attention_backward_sm90.cu.
#pragma once

#include "attention_sm90.cuh"

namespace unifiedar {

constexpr uint32_t kHeldBox = kHeldRows * 128;
constexpr int kGroupName = 1;  // of the named barriers: by these each warpgroup waits for its own warps
constexpr int kTurnName = 4;   // by these for its turn at the matrix units

// How a kernel goes about it: any of these.
enum How : int {
  kAlone = 1,    // of keys: no two heads share them, which saves registers
  kNoLook = 2,   // of queries: the exponentials may be put after the wait for the products that they run under
  kByTable = 4,  // tables say who sees whom, and images may be packed
  kLate = 8,     // dP is multiplied when the other products of the step are over
};

// Rows of a tile and of a step.
template <bool kKeysAreHeld, int kGroupCount, int kPassedCount>
struct Sizes {
  static constexpr bool kOfKeys = kKeysAreHeld;
  static constexpr int kGroups = kGroupCount;   // warpgroups that calculate
  static constexpr int kPassed = kPassedCount;  // rows of a step
  static constexpr int kRows = kHeldRows * kGroups;
  static constexpr int kEntry = 2 + kGroups;  // of a plan, in int4
};

template <typename Element, bool kKeysAreHeld, int kGroupCount, int kChannels, int kPassedCount, int kStageCount,
          int kSlotCount, int kManner = 0>
struct Tile : Sizes<kKeysAreHeld, kGroupCount, kPassedCount> {
  using Size = Sizes<kKeysAreHeld, kGroupCount, kPassedCount>;
  using Size::kGroups, Size::kOfKeys, Size::kPassed;
  using T = Element;
  static constexpr int kHow = kManner;
  static constexpr bool kCounted = kGroupCount > 1;  // whether tiles are taken by a counter; else in turns
  static constexpr bool kEarly = kGroupCount == 1;  // what can be loaded before the lengths or the step is, is
  static constexpr bool kInRow = kGroupCount == 1;  // the kernel of the keys begins under that of the queries
  static constexpr int kBlocks = kGroupCount == 1 ? 2 : 1;  // of a multiprocessor
  static constexpr bool kTable = (kHow & kByTable) != 0;
  static constexpr bool kMany = kOfKeys && !(kHow & kAlone);  // whether several heads may share keys
  static constexpr int kWidth = kChannels;  // channels of the products: 64, 96 or 128
  static constexpr int kStages = kStageCount;
  static constexpr int kSlots = kSlotCount;  // 1, or 2: the next tile is copied while this one is worked on
  static constexpr int kThreads = 128 * (kGroups + 1);
  // In loops within loops the compiler forgets that all lanes have an address, if it is not computed anew in each step.
  static constexpr bool kAnew = (kTable || kMany) && kWidth > 64;
  // Registers: 65,536 in all, the kernel starts with an equal share for each thread.
  static constexpr int kFewRegisters = kGroups <= 2 ? 24 : 32;
  static constexpr int kManyRegisters = kGroups == 1 ? 232 : kGroups == 2 ? 240 : 160;
  static constexpr int kBoxes = (kWidth + kBox - 1) / kBox;
  static constexpr uint32_t kHeldBytes = kBoxes * kHeldBox;  // of one of the two tensors
  static constexpr uint32_t kPassedBox = kPassed * 128, kPassedBytes = kBoxes * kPassedBox;
  static constexpr uint32_t kColumnsBytes = kOfKeys ? kPassed * 8 : 0;  // lse' of the queries passed by, then delta
  static constexpr uint32_t kPassedAt = kSlots * kGroups * 2 * kHeldBytes;
  static constexpr uint32_t kColumnsAt = kPassedAt + kStages * 2 * kPassedBytes;
  static constexpr uint32_t kLimitsAt = kColumnsAt + kStages * kColumnsBytes;  // with a table: those of each thread
  static constexpr uint32_t kHeldFull = kLimitsAt + (kTable ? 128 * kGroups * sizeof(int4) : 0);
  static constexpr uint32_t kHeldEmpty = kHeldFull + 8 * kSlots * kGroups;
  static constexpr uint32_t kPassedFull = kHeldEmpty + 8 * kSlots * kGroups;
  static constexpr uint32_t kPassedEmpty = kPassedFull + 8 * kStages;
  static constexpr uint32_t kNumberFull = kPassedEmpty + 8 * kStages;
  static constexpr uint32_t kNumberEmpty = kNumberFull + 8 * kNumbers;
  static constexpr uint32_t kNumberAt = kNumberEmpty + 8 * kNumbers;
  static constexpr uint32_t kBytes = kNumberAt + 4 * kNumbers + 1024;  // to begin at a multiple of 1,024
  static_assert(kBlocks * (kBytes + 1024) <= 228 * 1024 && kPassed % 16 == 0 && kPassed <= 128);
};

struct Result {
  CUtensorMap map;
  void* data;
  int64_t batch_stride, head_stride, row_stride;  // in elements
};

// What the plan of a kernel is made of: [tiles or slots, ranges, an entry], which is the tile's Held, its Span and each
// warpgroup's Part, with zeros behind.
struct Planned {
  const int *table, *offsets;  // [ranges, 2, keys] of what queries see, or who sees keys; [images]
  int4* plan;
  int queries, keys, images, ranges, tiles, columns_of_tile;
};

struct KernelArgs {
  CUtensorMap held[2], passed[2];
  Result result[2];  // the second of keys only
  const void* lengths;
  const int* table;  // of what queries see, or who sees keys
  const int4* plan;
  const void* out;   // of queries only, as lse and grad_lse
  int64_t out_batch, out_head, out_row;
  const float *lse, *grad_lse;
  float* columns;    // [batch, heads, column_tiles, 2, columns of a tile]: lse' and delta of every query, or of slots
  int column_tiles, columns_of_tile;
  unsigned* taken;   // tiles, but for the first of each block
  int queries, keys, width, share, scales, prefix, ranges;
  int tiles, rows, group, heads;  // what place_of wants: of what is held
  float factor, softmax_scale;    // the former in base 2
  bool wide_lengths;
};

// ---- where to work ---------------------------------------------------------------------------------------------------

// Rows of a tile, and of the image that they belong to.
struct Held {
  int begin;      // first row of the tile, which may be before `low`
  int low, high;  // queries of the image, and where it is packed with others its keys: before `low` a tile has no rows
  int columns;    // the first of the image's tiles of columns
};

// Steps by what the rows of a tile see, or by who sees them: those of one range.
struct Span {
  int from;     // first row passed by in the first step
  int steps;    // of the tile; 0 if it has no rows
  int columns;  // of keys: the tile of columns of the first step
};

// A warpgroup's part of them.
struct Part {
  int steps;        // up to the last one that one of its rows has to do with
  int open, whole;  // from step `open` to `whole` no row has a limit
};

// The same, of which the compiler knows that all lanes have it. The warp that copies has no registers for that.
__device__ __forceinline__ Held known(const Held& tile) {
  return {int(of_warp(tile.begin)), int(of_warp(tile.low)), int(of_warp(tile.high)), int(of_warp(tile.columns))};
}
__device__ __forceinline__ Span known(const Span& span) {
  return {int(of_warp(span.from)), int(of_warp(span.steps)), int(of_warp(span.columns))};
}
__device__ __forceinline__ Part known(const Part& part) {
  return {int(of_warp(part.steps)), int(of_warp(part.open)), int(of_warp(part.whole))};
}

__device__ __forceinline__ int steps_for(int rows, int passed) { return (rows + passed - 1) / passed; }

// First row of a tile of `tiles` up to `high`. What is seen by most, or sees most, goes first.
template <typename Shape>
__device__ __forceinline__ int begin_of(int tiles, int rank, int high) {
  return high - (Shape::kOfKeys ? tiles - rank : rank + 1) * Shape::kRows;
}

// By the table, of a row or in place of one that is not there: keys that it sees, or queries that see it.
template <typename Shape, typename Args>
__device__ __forceinline__ Range range_of(const Args& args, const Held& tile, int range, int row) {
  const int offset = args.keys - args.queries;
  if constexpr (!Shape::kOfKeys)
    return non_empty(read_range(args.table, args.keys, range, min(max(row, tile.low), args.queries - 1) + offset));
  const Range seen = read_range(args.table, args.keys, range, min(max(row, tile.low), args.keys - 1));
  return non_empty({max(seen.begin - offset, tile.low), min(seen.end - offset, tile.high)});
}

// Makes an entry of a plan; all lanes of a warp together.
template <typename Shape>
__device__ __forceinline__ void plan_steps(const Planned& args, int entry) {
  constexpr int kPassed = Shape::kPassed, kGroups = Shape::kGroups;
  const int slot = entry / args.ranges, range = entry - slot * args.ranges;
  Held tile{begin_of<Shape>(args.tiles, slot, Shape::kOfKeys ? args.keys : args.queries), 0, args.queries, 0};
  if (args.offsets != nullptr) {
    const Image image = image_of<Shape::kRows>(args, slot);
    const int tiles = steps_for(image.high - image.low, Shape::kRows);
    const int rank = slot - image.low / Shape::kRows - image.number;
    // A slot that is left over has a tile in front of the image.
    const int begin = rank < tiles ? begin_of<Shape>(tiles, rank, image.high) : image.low - Shape::kRows;
    tile = {begin, image.low, image.high, image.low / args.columns_of_tile + image.number};
  }
  Range all{INT_MAX, 0}, own[kGroups];  // from the first to the last
  int latest[kGroups], first_end[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int row = tile.begin + group * kHeldRows + threadIdx.x % 32;
    const Range one = range_of<Shape>(args, tile, range, row), other = range_of<Shape>(args, tile, range, row + 32);
    own[group] = {__reduce_min_sync(kWarp, min(one.begin, other.begin)),
                  __reduce_max_sync(kWarp, max(one.end, other.end))};
    latest[group] = __reduce_max_sync(kWarp, max(one.end > 0 ? one.begin : 0, other.end > 0 ? other.begin : 0));
    first_end[group] = __reduce_min_sync(kWarp, min(one.end, other.end));
    all = {min(all.begin, own[group].begin), max(all.end, own[group].end)};
  }
  // Queries are passed by from the step with the last one on, keys from the first one on.
  const int behind = (tile.high - all.end) / kPassed, top = tile.high - behind * kPassed;
  const auto steps_to = [&](const Range& to) {
    return steps_for(max(Shape::kOfKeys ? top - to.begin : to.end - all.begin, 0), kPassed);
  };
  Span span{all.begin, steps_to(all), 0};
  if (Shape::kOfKeys)
    span = {top - kPassed, span.steps, tile.columns + steps_for(tile.high - tile.low, kPassed) - 1 - behind};
  if (tile.begin + Shape::kRows <= tile.low) span.steps = 0;
  int4* const to = args.plan + int64_t(entry) * Shape::kEntry;
  if (threadIdx.x % 32 != 0) return;
  to[0] = {tile.begin, tile.low, tile.high, tile.columns};
  to[1] = {span.from, span.steps, span.columns, 0};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    Part part{steps_to(own[group]), steps_to({first_end[group], latest[group]}), 0};
    if constexpr (Shape::kOfKeys)  // rows before the first query need no limit
      part.whole = latest[group] <= tile.low ? part.steps : (top - latest[group]) / kPassed;
    else
      part.whole = (first_end[group] - span.from) / kPassed;
    to[2 + group] = {part.steps, part.open, part.whole, 0};
  }
}

template <typename Shape>
__device__ __forceinline__ const int4* plan_of(const KernelArgs& args, const Place& place, int range) {
  return args.plan + unsigned(place.rank * args.ranges + range) * Shape::kEntry;
}

template <typename Shape>
__device__ __forceinline__ Held rows_of(const KernelArgs& args, const Place& place) {
  if constexpr (Shape::kTable) {
    const int4 tile = plan_of<Shape>(args, place, 0)[0];
    return {tile.x, tile.y, tile.z, tile.w};
  }
  return {begin_of<Shape>(args.tiles, place.rank, Shape::kOfKeys ? args.keys : args.queries), 0, args.queries, 0};
}

// Query from which on a key's scale is seen.
__device__ __forceinline__ int first_query(const KernelArgs& args, int begin_of_scale, int key) {
  return max(begin_seen_from(begin_of_scale, max(key, 0)) - (args.keys - args.queries), 0);
}

// First row of what is passed by in a step.
template <typename Shape>
__device__ __forceinline__ int passed_begin(const Span& span, int step) {
  return span.from + (Shape::kOfKeys ? -step : step) * Shape::kPassed;
}

// Of all rows of a tile, and the part of warpgroup `group`.
template <typename Shape>
__device__ __forceinline__ Span span_of(const KernelArgs& args, int begin_of_scale, const Place& place,
                                        const Held& tile, int range, int group, Part* part) {
  constexpr int kPassed = Shape::kPassed;
  if constexpr (Shape::kTable) {
    const int4* const plan = plan_of<Shape>(args, place, range);
    const int4 all = plan[1];
    if (part != nullptr) {
      const int4 own = plan[2 + group];
      *part = {own.x, own.y, own.z};
    }
    return {all.x, all.y, all.z};
  }
  const int first = tile.begin + group * kHeldRows;
  Span span{};
  if constexpr (Shape::kOfKeys) {
    const auto steps_of = [&](int row) {
      return steps_for(args.queries - first_query(args, begin_of_scale, row), kPassed);
    };
    span = {args.queries - kPassed, steps_of(tile.begin), args.column_tiles - 1};
    if (part != nullptr) {
      const int last = first_query(args, begin_of_scale, first + kHeldRows - 1);
      part->steps = steps_of(first);
      part->whole = last == 0 ? part->steps : (args.queries - last) / kPassed;
    }
  } else {
    const int offset = args.keys - args.queries;
    const auto end_at = [&](int row) { return end_of(begin_of_scale, row + offset, args.keys); };
    span.steps = steps_for(end_at(tile.begin + Shape::kRows - 1), kPassed);
    if (part != nullptr) {
      part->steps = steps_for(end_at(first + kHeldRows - 1), kPassed);
      part->whole = end_at(max(first, 0)) / kPassed;
    }
  }
  return span;
}

// Columns, counted from the first step's first, that a thread's two rows have to do with. Without a table only one of
// the limits counts: ends of what queries see, begins of who sees keys.
template <typename Shape>
__device__ __forceinline__ void columns_of(const KernelArgs& args, int begin_of_scale, const Held& tile, int range,
                                           int from, int row, int (&begin)[2], int (&end)[2]) {
  if constexpr (Shape::kTable) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Range seen = range_of<Shape>(args, tile, range, row + 8 * h);
      begin[h] = min(seen.begin, seen.end) - from;
      end[h] = seen.end - from;
    }
  } else {
    const int ahead = Shape::kOfKeys ? 0 : args.keys - args.queries;
    const int position[2] = {max(row, 0) + ahead, max(row + 8, 0) + ahead};
    if constexpr (Shape::kOfKeys) {
      begins_seen_from(begin_of_scale, args.scales, position, begin);
      begin[0] -= args.keys - args.queries + from;
      begin[1] -= args.keys - args.queries + from;
    } else {
      ends_of(begin_of_scale, args.scales, position, args.keys, end);
    }
  }
}

// Of kernels in a row: the one behind may begin, and does what needs no results of this one before it waits for them.
// PTX ISA: griddepcontrol.
__device__ __forceinline__ void kernels_behind_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void kernels_before_done() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace unifiedar
