#include "attention_sm90.cuh"

// One block a multiprocessor, which works through tiles of queries. The first warp copies: queries of the next tile, and
// keys and values of this one in a ring of stages. Each of the other warpgroups has 64 rows of the tile and runs through
// the keys up to where its own last row's end; of the ones that others need it says only that it is done with them. The
// scores of one step are formed while the weights of the step before are multiplied with their values, and softmax
// follows; the warpgroups take turns in handing products to the matrix units, so that one's softmax runs under the
// others' products.
//
// Tiles are counted from the last query: there the scales are long, their lengths multiples of 64 as often as not, and
// the tile that begins before the first query is the one that sees least. It is read with zeros in front.
//
// Where there are few tiles, each warpgroup's rows are one, and a multiprocessor has two blocks (narrow_wins).
//
// With a table (kTable) every row has ranges of its own, [begin, end), and images may be packed one after another: their
// tiles are counted from the last query of each, and what is before its first one is read from the image before, and
// not written. A tile runs through the first range of all its rows, then the second, and so on; steps begin where the
// first of the rows does.
namespace unifiedar {
namespace {

constexpr int kTurnsName = 1;  // of the named barriers: by these, one a warpgroup, they take turns
constexpr int kGroupName = 4;  // by these each waits for its own warps

template <typename Element, int kChannels, int kGroupCount, int kKeyCount, int kStageCount, bool kHasTable = false>
struct Tile {
  static_assert(kGroupCount > 1 || !kHasTable);
  static constexpr bool kTable = kHasTable;
  static constexpr bool kCounted = false;  // whether there is a counter is seen at run time
  using T = Element;
  static constexpr int kWidth = kChannels;    // channels of the products: 64, 96 or 128
  static constexpr int kGroups = kGroupCount;  // warpgroups that calculate
  static constexpr int kKeys = kKeyCount;      // of a step
  static constexpr int kStages = kStageCount;
  static constexpr int kRows = kHeldRows * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kBlocks = kGroups == 1 ? 2 : 1;  // of a multiprocessor
  static constexpr int kTurns = kGroups == 1 ? 2 : 1;   // tiles a block for which no counter is worth its launch
  static constexpr int kBoxes = (kWidth + kBox - 1) / kBox;
  static constexpr uint32_t kHeldBox = kHeldRows * 128, kHeldBytes = kBoxes * kHeldBox;
  static constexpr uint32_t kKeysBox = kKeys * 128, kKeysBytes = kBoxes * kKeysBox;
  // Registers: 65,536 in all, the kernel starts with an equal share for each thread.
  // With a table the warp that copies needs more.
  static constexpr int kFewRegisters = kGroups <= 2 ? (kTable ? 40 : 24) : (kTable ? 56 : 32);
  static constexpr int kManyRegisters = kGroups == 1 ? 232 : kGroups == 2 ? (kTable ? 232 : 240) : (kTable ? 152 : 160);
  static_assert(kFewRegisters + kGroups * kManyRegisters <= (kGroups + 1) * (65536 / kBlocks / kThreads / 8 * 8));
  // Shared memory: queries (later their results) of two tiles a warpgroup, keys, values, barriers.
  static constexpr uint32_t kKeysAt = 2 * kGroups * kHeldBytes;
  static constexpr uint32_t kValuesAt = kKeysAt + kStages * kKeysBytes;
  static constexpr uint32_t kBarriersAt = kValuesAt + kStages * kKeysBytes;
  static constexpr uint32_t kHeldFull = kBarriersAt, kHeldEmpty = kHeldFull + 8 * 2 * kGroups;
  static constexpr uint32_t kKeysFull = kHeldEmpty + 8 * 2 * kGroups, kKeysEmpty = kKeysFull + 8 * kStages;
  static constexpr uint32_t kValuesFull = kKeysEmpty + 8 * kStages, kValuesEmpty = kValuesFull + 8 * kStages;
  static constexpr uint32_t kNumberFull = kValuesEmpty + 8 * kStages, kNumberEmpty = kNumberFull + 8 * kNumbers;
  static constexpr uint32_t kNumberAt = kNumberEmpty + 8 * kNumbers;
  static constexpr uint32_t kBytes = kNumberAt + 4 * kNumbers + 1024;  // to begin at a multiple of 1,024
  static_assert(kBlocks * (kBytes + 1024) <= 228 * 1024 && kKeys % 16 == 0 && kKeys <= 256);
};

struct KernelArgs {
  CUtensorMap q, k, v, out;
  const void* lengths;
  const int *sees, *offsets;
  void* out_data;
  int64_t out_batch, out_head, out_row;  // strides, in elements
  float* lse;
  unsigned* taken;  // tiles, but for the first of each block; or null
  int queries, keys, width, heads, share, rows, group, scales, prefix, images, ranges;
  int tiles;     // of a head; with offsets the slots for them
  float factor;  // softmax_scale in base 2
  bool wide_lengths;
};

// ---- where to work ---------------------------------------------------------------------------------------------------

// Rows of a tile.
struct Held {
  int begin;  // first query, which may be before `low`
  int low;    // first query there is: of the image
};

// Steps through the keys, those of one range.
struct Span {
  int from;   // first key of the first step
  int steps;  // of the tile; 0 if it has no rows
};

// A warpgroup's part of them.
struct Part {
  int steps;        // up to the last key that one of its rows sees
  int open, whole;  // from step `open` to `whole` every row sees every key
};

// Of a row of the image, or in place of one that is not there. Queries are the last positions.
__device__ __forceinline__ int position_of(const KernelArgs& args, const Held& rows, int row) {
  return min(max(row, rows.low), args.queries - 1) + args.keys - args.queries;
}

__device__ __forceinline__ Range range_of(const KernelArgs& args, int range, int position) {
  return non_empty(read_range(args.sees, args.keys, range, position));
}

// A slot that is left over has a tile in front of the image.
template <typename Shape>
__device__ __forceinline__ Held rows_of(const KernelArgs& args, const Place& place) {
  if (!Shape::kTable || args.offsets == nullptr) return {args.queries - (place.rank + 1) * Shape::kRows, 0};
  const Image image = image_of<Shape::kRows>(args, place.rank);
  return {image.high - (place.rank - image.low / Shape::kRows - image.number + 1) * Shape::kRows, image.low};
}

// What the rows of a tile see, and of them those of warpgroup `group`.
template <typename Shape>
__device__ __forceinline__ Span span_of(const KernelArgs& args, int begin_of_scale, const Held& rows, int range,
                                        int group, Part* part) {
  constexpr int kKeys = Shape::kKeys;
  Span span{};
  if constexpr (Shape::kTable) {
    int begin = INT_MAX, end = 0, own_latest = 0, own_first_end = INT_MAX, own_end = 0;
#pragma unroll 2
    for (int i = 0; i < Shape::kRows / 32; ++i) {
      const Range seen = range_of(args, range, position_of(args, rows, rows.begin + i * 32 + threadIdx.x % 32));
      begin = min(begin, seen.begin);
      end = max(end, seen.end);
      if (i / 2 == group) {
        own_latest = max(own_latest, seen.end > 0 ? seen.begin : 0);
        own_first_end = min(own_first_end, seen.end);
        own_end = max(own_end, seen.end);
      }
    }
    span.from = __reduce_min_sync(kWarp, begin);
    // No way around all this for a tile without rows: ptxas would take the products for divergent ones.
    span.steps = max(__reduce_max_sync(kWarp, end) - span.from + kKeys - 1, 0) / kKeys;
    if (rows.begin + Shape::kRows <= rows.low) span.steps = 0;
    if (part != nullptr) {
      part->steps = max(__reduce_max_sync(kWarp, own_end) - span.from + kKeys - 1, 0) / kKeys;
      part->open = (__reduce_max_sync(kWarp, own_latest) - span.from + kKeys - 1) / kKeys;
      part->whole = (__reduce_min_sync(kWarp, own_first_end) - span.from) / kKeys;
    }
  } else {
    const auto end_at = [&](int row) { return end_of(begin_of_scale, position_of(args, rows, row), args.keys); };
    span.steps = (end_at(rows.begin + Shape::kRows - 1) + kKeys - 1) / kKeys;
    if (part != nullptr) {
      const int first = rows.begin + group * kHeldRows;
      part->steps = (end_at(first + kHeldRows - 1) + kKeys - 1) / kKeys;
      part->open = 0;
      part->whole = end_at(first) / kKeys;
    }
  }
  return span;
}

// Columns, counted from the first step's first key, that a thread's two rows see: ends, and with a table begins.
template <typename Shape>
__device__ __forceinline__ void columns_of(const KernelArgs& args, int begin_of_scale, const Held& rows, int range,
                                           int from, int row, int (&begin)[2], int (&end)[2]) {
  const int position[2] = {position_of(args, rows, row), position_of(args, rows, row + 8)};
  if constexpr (Shape::kTable) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Range seen = range_of(args, range, position[h]);
      begin[h] = seen.begin - from;
      end[h] = seen.end - from;
    }
  } else {
    ends_of(begin_of_scale, args.scales, position, args.keys, end);
  }
}

// ---- copies ----------------------------------------------------------------------------------------------------------

template <typename Shape>
__device__ __forceinline__ void load_keys(const CUtensorMap& map, uint32_t to, uint32_t barrier, int key, int head,
                                          int batch) {
  barrier_expect(barrier, Shape::kKeysBytes);
#pragma unroll
  for (int box = 0; box < Shape::kBoxes; ++box)
    load_box(to + box * Shape::kKeysBox, map, barrier, box * kBox, key, head, batch);
}

// The first warp's work; its first lane copies.
template <typename Shape>
__device__ __forceinline__ void copy_all(const KernelArgs& args, uint32_t memory, char* shared) {
  constexpr int kGroups = Shape::kGroups;
  const bool leads = threadIdx.x == 0;
  // With one tile a block or two, what needs no lengths is copied while they are on their way: queries and first keys.
  constexpr bool kSoon = Shape::kGroups == 1;
  const int length_of_scale = Shape::kTable ? 0 : scale_length(args);
  int begin_of_scale = Shape::kTable || kSoon ? 0 : scale_begin(args, length_of_scale);
  Stage<Shape::kStages> keys, values;
  uint32_t held[kGroups] = {};  // tiles that each warpgroup had
  Place place;
  for (int turn = 0; place_of(args, tell_tile<Shape>(args, memory, shared, turn), &place); ++turn) {
    const Held rows = rows_of<Shape>(args, place);
    const int key_head = place.head / args.share;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int first = rows.begin + group * kHeldRows;
      if (first + kHeldRows <= rows.low) continue;
      const uint32_t slot = (held[group] & 1) * kGroups + group, parity = held[group] >> 1 & 1;
      ++held[group];
      barrier_wait(memory + Shape::kHeldEmpty + 8 * slot, parity ^ 1);
      if (leads) {
        const uint32_t full = memory + Shape::kHeldFull + 8 * slot;
        barrier_expect(full, Shape::kHeldBytes);
#pragma unroll
        for (int box = 0; box < Shape::kBoxes; ++box)
          load_box(memory + slot * Shape::kHeldBytes + box * Shape::kHeldBox, args.q, full, box * kBox, first,
                   place.head, place.batch);
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int range = 0; range < (Shape::kTable ? args.ranges : 1); ++range) {
      const auto next_keys = [&](int key) {
        barrier_wait(memory + Shape::kKeysEmpty + 8 * keys.at, keys.parity ^ 1);
        if (leads)
          load_keys<Shape>(args.k, memory + Shape::kKeysAt + keys.at * Shape::kKeysBytes,
                           memory + Shape::kKeysFull + 8 * keys.at, key, key_head, place.batch);
        __syncwarp();
        keys.next();
      };
      if constexpr (kSoon) {
        next_keys(0);  // which every tile has
        if (turn == 0) begin_of_scale = scale_begin(args, length_of_scale);
      }
      const Span span = span_of<Shape>(args, begin_of_scale, rows, range, 0, nullptr);
      // In the order of use: the values of a step after the keys of the next.
#pragma unroll 1
      for (int step = kSoon; step <= span.steps; ++step) {
        if (step < span.steps) next_keys(span.from + step * Shape::kKeys);
        if (step > 0) {
          barrier_wait(memory + Shape::kValuesEmpty + 8 * values.at, values.parity ^ 1);
          if (leads)
            load_keys<Shape>(args.v, memory + Shape::kValuesAt + values.at * Shape::kKeysBytes,
                             memory + Shape::kValuesFull + 8 * values.at, span.from + (step - 1) * Shape::kKeys,
                             key_head, place.batch);
          __syncwarp();
          values.next();
        }
      }
    }
  }
}

// ---- softmax ---------------------------------------------------------------------------------------------------------

// A thread's two rows: the largest score so far, in base 2, and the lane's share of the sum of weights.
struct Rows {
  float top[2], weight[2];
};

// Makes weights of scores, 2^(factor score - top); `fade` is what earlier sums are to be multiplied with. With kMasked,
// columns (counted from the lane's first) from `limit` on are not seen, nor with kTable those before `start`.
template <bool kMasked, bool kTable, int kCount>
__device__ __forceinline__ void weigh(float (&score)[kCount], Rows& rows, float (&fade)[2], float factor,
                                      const int (&start)[2], const int (&limit)[2]) {
  if constexpr (kMasked) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = i / 4 * 8 + i % 2, h = i / 2 % 2;
      // The product is formed first: 0 times -inf is no number.
      const bool seen = column < limit[h] && (!kTable || column >= start[h]);
      score[i] = seen ? score[i] * factor : -INFINITY;
    }
  }
  float top[2] = {score[0], score[2]};
#pragma unroll
  for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], score[i]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = quad_max(top[h]);
    top[h] = fmaxf(rows.top[h], kMasked ? top[h] : top[h] * factor);
    const float before = rows.top[h];
    rows.top[h] = top[h];
    // A row of a table may have seen no key so far: any number does then, but infinity less infinity is none.
    if constexpr (kMasked && kTable) top[h] = top[h] == -INFINITY ? 0.0f : top[h];
    fade[h] = exp2_of(before - top[h]);
    rows.weight[h] *= fade[h];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int h = i / 2 % 2;
    score[i] = exp2_of(kMasked ? score[i] - top[h] : fmaf(score[i], factor, -top[h]));
    rows.weight[h] += score[i];
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

template <typename Shape>
__device__ __forceinline__ void score_products(float (&score)[Shape::kKeys / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int i = 0; i < Shape::kWidth / 16; ++i) {
    const uint32_t box = i / 4, within = i % 4 * kNextInRow;
    multiply_rows<typename Shape::T, Shape::kKeys>(score, further(q, box * Shape::kHeldBox + within),
                                                   further(k, box * Shape::kKeysBox + within), i > 0);
  }
  products_commit();
}

template <typename Shape>
__device__ __forceinline__ void value_products(float (&sum)[Shape::kWidth / 2], const uint32_t (&weight)[Shape::kKeys / 4],
                                               uint64_t v) {
#pragma unroll
  for (int i = 0; i < Shape::kKeys / 16; ++i)
    multiply_columns<typename Shape::T, Shape::kWidth>(sum, weight + 4 * i, further(v, i * kNextRows));
  products_commit();
}

// ---- a warpgroup -----------------------------------------------------------------------------------------------------

template <typename Shape>
__device__ __forceinline__ void attend(const KernelArgs& args, uint32_t memory, char* shared) {
  using T = typename Shape::T;
  constexpr int kGroups = Shape::kGroups, kKeys = Shape::kKeys, kWidth = Shape::kWidth;
  const int group = int(of_warp(threadIdx.x / 128)) - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int own_row = thread / 32 * 16 + lane / 4, own_column = lane % 4 * 2;
  const int begin_of_scale = Shape::kTable ? 0 : scale_begin(args, scale_length(args));

  const auto wait_turn = [&] {
    if constexpr (kGroups > 1) named_sync(kTurnsName + group, 256);
  };
  const auto end_turn = [&] {
    if constexpr (kGroups > 1) named_arrive(kTurnsName + (group + 1 == kGroups ? 0 : group + 1), 256);
  };
  const auto keys_at = [&](uint32_t stage) {
    return describe_rows(memory + Shape::kKeysAt + stage * Shape::kKeysBytes);
  };
  const auto values_at = [&](uint32_t stage) {
    return describe_columns(memory + Shape::kValuesAt + stage * Shape::kKeysBytes, Shape::kKeysBox);
  };
  const auto done_with = [&](uint32_t barrier) {  // each warp says so
    if (lane == 0) barrier_arrive(barrier);
  };

  // What a tile wrote may still be on its way out of the queries' place; that is looked at in the next tile.
  uint32_t held = 0;
  bool leaving = false;
  const auto free_held = [&] {
    if (leaving && thread == 0) {
      store_wait();
      barrier_arrive(memory + Shape::kHeldEmpty + 8 * ((held - 1 & 1) * kGroups + group));
    }
    leaving = false;
  };

  if (group == kGroups - 1) end_turn();  // the first turn is the first group's
  Stage<Shape::kStages> stage;
  Place place;
  for (int turn = 0; place_of(args, hear_tile<Shape>(memory, shared, turn), &place); ++turn) {
    const Held tile = rows_of<Shape>(args, place);
    const int first = tile.begin + group * kHeldRows;
    const bool works = first + kHeldRows > tile.low;
    const uint32_t slot = (held & 1) * kGroups + group;
    const uint64_t q = describe_rows(memory + slot * Shape::kHeldBytes);
    float sum[kWidth / 2];
    Rows rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    if (works) {
      barrier_wait(memory + Shape::kHeldFull + 8 * slot, held >> 1 & 1);
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sum[i] = 0.0f;
    }
#pragma unroll 1
    for (int range = 0; range < (Shape::kTable ? args.ranges : 1); ++range) {
      Part part;
      const Span span = span_of<Shape>(args, begin_of_scale, tile, range, group, &part);
      const int steps = works ? part.steps : 0;
      if (steps > 0) {
        int begin[2] = {}, end[2] = {};
        if (part.open > 0 || part.whole < steps) {
          columns_of<Shape>(args, begin_of_scale, tile, range, span.from, first + own_row, begin, end);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            begin[h] -= own_column;
            end[h] -= own_column;
          }
        }
        float score[kKeys / 2], fade[2];
        uint32_t weight[kKeys / 4];

        barrier_wait(memory + Shape::kKeysFull + 8 * stage.at, stage.parity);
        settle(score);
        products_begin();
        score_products<Shape>(score, q, keys_at(stage.at));
        products_wait<0>();
        settle(score);
        done_with(memory + Shape::kKeysEmpty + 8 * stage.at);
        free_held();
        if (part.open == 0 && part.whole > 0)
          weigh<false, Shape::kTable>(score, rows, fade, args.factor, begin, end);
        else
          weigh<true, Shape::kTable>(score, rows, fade, args.factor, begin, end);
        pack<T>(score, weight);
        if constexpr (Shape::kTable) {  // else it is the first
#pragma unroll
          for (int i = 0; i < kWidth / 2; ++i) sum[i] *= fade[i / 2 % 2];
        }

        const auto advance = [&](int step, auto masked) {
          const Stage<Shape::kStages> before = stage;
          stage.next();
          barrier_wait(memory + Shape::kKeysFull + 8 * stage.at, stage.parity);
          wait_turn();
          settle(score);
          settle(sum);
          products_begin();
          score_products<Shape>(score, q, keys_at(stage.at));
          barrier_wait(memory + Shape::kValuesFull + 8 * before.at, before.parity);
          value_products<Shape>(sum, weight, values_at(before.at));
          end_turn();
          products_wait<1>();
          settle(score);
          done_with(memory + Shape::kKeysEmpty + 8 * stage.at);
          const int start[2] = {begin[0] - step * kKeys, begin[1] - step * kKeys};
          const int limit[2] = {end[0] - step * kKeys, end[1] - step * kKeys};
          weigh<decltype(masked)::value, Shape::kTable>(score, rows, fade, args.factor, start, limit);
          // The exponentials are to run under the products, but ptxas would put them after the wait. It leaves the order
          // of a look at a barrier and the wait alone, and this address (of one barrier or the next: weights are not
          // negative) needs the exponentials.
          const uint32_t signs = __float_as_uint(rows.weight[0]) | __float_as_uint(rows.weight[1]);
          barrier_look(memory + Shape::kHeldFull + (signs >> 31) * 8);
          products_wait<0>();
          settle(sum);
          done_with(memory + Shape::kValuesEmpty + 8 * before.at);
          pack<T>(score, weight);
#pragma unroll
          for (int i = 0; i < kWidth / 2; ++i) sum[i] *= fade[i / 2 % 2];
        };
        int step = 1;
        if constexpr (Shape::kTable) {
#pragma unroll 1
          for (; step < min(part.open, steps); ++step) advance(step, std::true_type{});
        }
#pragma unroll 1
        for (; step < part.whole; ++step) advance(step, std::false_type{});
#pragma unroll 1
        for (; step < steps; ++step) advance(step, std::true_type{});

        barrier_wait(memory + Shape::kValuesFull + 8 * stage.at, stage.parity);
        settle(sum);
        products_begin();
        value_products<Shape>(sum, weight, values_at(stage.at));
        products_wait<0>();
        settle(sum);
        done_with(memory + Shape::kValuesEmpty + 8 * stage.at);
        stage.next();
      }
#pragma unroll 1
      for (int step = steps; step < span.steps; ++step) {
        barrier_wait(memory + Shape::kKeysFull + 8 * stage.at, stage.parity);
        done_with(memory + Shape::kKeysEmpty + 8 * stage.at);
        if (step > 0) {
          wait_turn();
          end_turn();
        }
        barrier_wait(memory + Shape::kValuesFull + 8 * stage.at, stage.parity);
        done_with(memory + Shape::kValuesEmpty + 8 * stage.at);
        stage.next();
      }
    }
    if (works) {
      // Results, through the place of the queries, where no warp of the group reads any more.
      const int64_t at = (int64_t(place.batch) * args.heads + place.head) * args.queries + first + own_row;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rows.weight[h] = quad_sum(rows.weight[h]);
        if (lane % 4 == 0 && first + own_row + 8 * h >= tile.low)
          args.lse[at + 8 * h] = (rows.top[h] + __log2f(rows.weight[h])) * kLn2;
        rows.weight[h] = 1.0f / rows.weight[h];
      }
      uint32_t word[kWidth / 4];
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sum[i] *= rows.weight[i / 2 % 2];
      pack<T>(sum, word);
      named_sync(kGroupName + group, 128);
      if (first >= tile.low) {
        write_boxes(word, shared + slot * Shape::kHeldBytes);
        shared_written();
        named_sync(kGroupName + group, 128);
        if (thread == 0) {
#pragma unroll
          for (int box = 0; box < Shape::kBoxes; ++box)
            store_box(args.out, memory + slot * Shape::kHeldBytes + box * Shape::kHeldBox, box * kBox, first,
                      place.head, place.batch);
          store_commit();
        }
      } else {
        T* const to = static_cast<T*>(args.out_data) + place.batch * args.out_batch + place.head * args.out_head;
        write_rows(word, to + tile.low * args.out_row, args.out_row, first - tile.low, args.width);
      }
      leaving = true;
      ++held;
    }
  }
  if (thread == 0) store_wait();
}

// Grid: as many blocks as the multiprocessors hold, or tiles.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_forward_sm90_kernel(const __grid_constant__ KernelArgs args) {
  if (!kHasProducts) {  // the launcher starts it on compute capability 9.0 only
    __trap();
    return;
  }
  extern __shared__ uint4 unifiedar_shared[];
  const uint32_t unaligned = shared_address(unifiedar_shared), memory = (unaligned + 1023) / 1024 * 1024;
  char* const shared = reinterpret_cast<char*>(unifiedar_shared) + (memory - unaligned);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * Shape::kGroups; ++i) {
      barrier_init(memory + Shape::kHeldFull + 8 * i, 1);
      barrier_init(memory + Shape::kHeldEmpty + 8 * i, 1);
    }
    for (int i = 0; i < kNumbers; ++i) {
      barrier_init(memory + Shape::kNumberFull + 8 * i, 1);
      barrier_init(memory + Shape::kNumberEmpty + 8 * i, 4 * Shape::kGroups);
    }
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(memory + Shape::kKeysFull + 8 * i, 1);
      barrier_init(memory + Shape::kKeysEmpty + 8 * i, 4 * Shape::kGroups);
      barrier_init(memory + Shape::kValuesFull + 8 * i, 1);
      barrier_init(memory + Shape::kValuesEmpty + 8 * i, 4 * Shape::kGroups);
    }
    barrier_init_done();
    prefetch_map(args.q);
    prefetch_map(args.k);
    prefetch_map(args.v);
    prefetch_map(args.out);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kFewRegisters));
    if (threadIdx.x < 32) copy_all<Shape>(args, memory, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kManyRegisters));
    attend<Shape>(args, memory, shared);
  }
}

// ---- launcher --------------------------------------------------------------------------------------------------------

template <typename Shape>
cudaError_t launch_tile(const AttentionArgs& args, DType dtype, int processors, cudaStream_t stream) {
  KernelArgs kernel_args{};
  const int key_heads = args.heads / args.share;
  const auto describe = [&](CUtensorMap* map, const HeadsView& view, int heads, int length, int rows) {
    return describe_tensor(map, view, dtype, args.batch, heads, length, args.width, rows);
  };
  const auto kernel = attention_forward_sm90_kernel<Shape>;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  if (error == cudaSuccess) error = describe(&kernel_args.q, args.q, args.heads, args.queries, kHeldRows);
  if (error == cudaSuccess) error = describe(&kernel_args.k, args.k, key_heads, args.keys, Shape::kKeys);
  if (error == cudaSuccess) error = describe(&kernel_args.v, args.v, key_heads, args.keys, Shape::kKeys);
  if (error == cudaSuccess) error = describe(&kernel_args.out, args.out, args.heads, args.queries, kHeldRows);
  if (error != cudaSuccess) return error;
  kernel_args.lengths = args.lengths;
  kernel_args.wide_lengths = args.wide_lengths;
  kernel_args.out_data = args.out.data;
  kernel_args.out_batch = args.out.batch_stride;
  kernel_args.out_head = args.out.head_stride;
  kernel_args.out_row = args.out.row_stride;
  kernel_args.lse = args.lse;
  kernel_args.queries = args.queries;
  kernel_args.keys = args.keys;
  kernel_args.width = args.width;
  kernel_args.heads = args.heads;
  kernel_args.share = args.share;
  kernel_args.rows = args.batch * args.heads;
  kernel_args.group = args.group;
  kernel_args.scales = args.scales;
  kernel_args.prefix = args.prefix;
  kernel_args.sees = args.sees;
  kernel_args.offsets = args.offsets;
  kernel_args.images = args.images;
  kernel_args.ranges = args.ranges;
  const int64_t slots = args.offsets != nullptr ? int64_t(args.queries / Shape::kRows) + args.images
                                                : (args.queries + Shape::kRows - 1) / Shape::kRows;
  if (slots > INT32_MAX) return cudaErrorNotSupported;
  kernel_args.tiles = int(slots);
  kernel_args.factor = args.softmax_scale * kLog2E;
  const int64_t tiles = int64_t(kernel_args.tiles) * kernel_args.rows;
  if (tiles > INT32_MAX || int64_t(args.group) * kernel_args.tiles > INT32_MAX) return cudaErrorNotSupported;
  const int64_t blocks = int64_t(processors) * Shape::kBlocks;
  if (tiles > Shape::kTurns * blocks && args.taken != nullptr) {
    kernel_args.taken = args.taken;
    error = cudaMemsetAsync(args.taken, 0, sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  kernel<<<int(std::min(blocks, tiles)), Shape::kThreads, Shape::kBytes, stream>>>(kernel_args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_forward(const AttentionArgs& args, DType dtype, AttentionTile tile, int processors,
                           cudaStream_t stream) {
  const bool by_table = args.sees != nullptr;
  if (args.width > 64) {
    if (tile != AttentionTile::kChosen && tile != AttentionTile::kRows128Keys128) return cudaErrorNotSupported;
    if (args.width > 96)
      return by_table ? launch_tile<Tile<T, 128, 2, 128, 2, true>>(args, dtype, processors, stream)
                      : launch_tile<Tile<T, 128, 2, 128, 2>>(args, dtype, processors, stream);
    return by_table ? launch_tile<Tile<T, 96, 2, 128, 2, true>>(args, dtype, processors, stream)
                    : launch_tile<Tile<T, 96, 2, 128, 2>>(args, dtype, processors, stream);
  }
  if (tile == AttentionTile::kChosen) {
    const bool narrow = !by_table && narrow_wins(args.queries, int64_t(args.batch) * args.heads, processors);
    if (args.queries <= 256 && args.keys < 1024)
      tile = narrow ? AttentionTile::kRows64Keys144 : AttentionTile::kRows128Keys144;
    else
      tile = narrow ? AttentionTile::kRows64Keys112 : AttentionTile::kRows192Keys112;
  }
  switch (tile) {
    case AttentionTile::kRows192Keys112:
      return by_table ? launch_tile<Tile<T, 64, 3, 112, 4, true>>(args, dtype, processors, stream)
                      : launch_tile<Tile<T, 64, 3, 112, 4>>(args, dtype, processors, stream);
    case AttentionTile::kRows128Keys144:
      return by_table ? launch_tile<Tile<T, 64, 2, 144, 4, true>>(args, dtype, processors, stream)
                      : launch_tile<Tile<T, 64, 2, 144, 4>>(args, dtype, processors, stream);
    case AttentionTile::kRows64Keys112:
      return by_table ? cudaErrorNotSupported
                      : launch_tile<Tile<T, 64, 1, 112, 3>>(args, dtype, processors, stream);
    case AttentionTile::kRows64Keys144:
      return by_table ? cudaErrorNotSupported
                      : launch_tile<Tile<T, 64, 1, 144, 2>>(args, dtype, processors, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t launch_attention_forward(const AttentionArgs& args, DType dtype, AttentionTile tile, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  switch (dtype) {
    case DType::kBFloat16:
      return launch_forward<__nv_bfloat16>(args, dtype, tile, processors, stream);
    case DType::kFloat16:
      return launch_forward<__half>(args, dtype, tile, processors, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace unifiedar
