#include "attention_sm90.cuh"

// Gradients in two kernels, each sum in one order. A block holds rows of one kind, 64 a warpgroup, and passes by those
// of the other kind, which the first warp copies into a ring of stages: the forward's scheme, with two tensors held
// (first and second) and two passed by.
//
//                first  second   scores            their gradients     sums
//   of queries:  q      grad     S = q k^T         dP = grad v^T       grad_q = dS k
//   of keys:     k      v        S^T = k q^T       dP^T = v grad^T     grad_k = dS^T q, grad_v = P^T grad
//
// with P = 2^(factor S - lse') and dS = P (dP - delta), both packed in registers as the first operand of the products
// that add them up. delta = rowsum(grad out) - grad_lse is found by the kernel of the queries, which leaves it and lse'
// (lse in base 2) to the other one, for whose columns they are. The dS of a step are multiplied together with the scores
// of the next, so that exponentials run under products, dS k and dP. Warpgroups issue the products of a step one after
// the other, so that one's chain of exponentials runs under another's products, too.
//
// Descriptors of operands are computed from what all lanes are known to have (of_warp): else each product of 16 rows
// waits for two or four moves of a register to those of the warp. Blocks take tiles from a counter: which block has one
// does not change a bit of it.
//
// Queries and keys held are counted from the last one, as in the forward; queries passed by too, so that only the first
// can be missing: there lse' is infinite and weights are 0. Keys passed by are counted from the first.
namespace unifiedar {
namespace {

constexpr uint32_t kHeldBox = kHeldRows * 128;
constexpr int kGroupName = 1;  // of the named barriers: by these each warpgroup waits for its own warps
constexpr int kTurnName = 4;   // by these for its turn at the matrix units

// How a kernel goes about it: any of these.
enum How : int {
  kAlone = 1,   // of keys: no two heads share them, which saves registers
  kNoLook = 2,  // of queries: the exponentials may be put after the wait for the products that they run under
};

template <typename Element, bool kKeysAreHeld, int kGroupCount, int kChannels, int kPassedCount, int kStageCount,
          int kSlotCount, int kManner = 0>
struct Tile {
  using T = Element;
  static constexpr bool kOfKeys = kKeysAreHeld;
  static constexpr int kHow = kManner;
  static constexpr bool kMany = kOfKeys && !(kHow & kAlone);  // whether several heads may share keys
  static constexpr int kGroups = kGroupCount;        // warpgroups that calculate
  static constexpr int kWidth = kChannels;           // channels of the products: 64, 96 or 128
  static constexpr int kPassed = kPassedCount;       // rows of a step
  static constexpr int kStages = kStageCount;
  static constexpr int kSlots = kSlotCount;          // 1, or 2: the next tile is copied while this one is worked on
  static constexpr int kRows = kHeldRows * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  // Registers: 65,536 in all, the kernel starts with an equal share for each thread.
  static constexpr int kFewRegisters = kGroups == 2 ? 24 : 32, kManyRegisters = kGroups == 2 ? 240 : 160;
  static constexpr int kBoxes = (kWidth + kBox - 1) / kBox;
  static constexpr uint32_t kHeldBytes = kBoxes * kHeldBox;  // of one of the two tensors
  static constexpr uint32_t kPassedBox = kPassed * 128, kPassedBytes = kBoxes * kPassedBox;
  static constexpr uint32_t kColumnsBytes = kOfKeys ? kPassed * 8 : 0;  // lse' of the queries passed by, then delta
  static constexpr uint32_t kPassedAt = kSlots * kGroups * 2 * kHeldBytes;
  static constexpr uint32_t kColumnsAt = kPassedAt + kStages * 2 * kPassedBytes;
  static constexpr uint32_t kHeldFull = kColumnsAt + kStages * kColumnsBytes;
  static constexpr uint32_t kHeldEmpty = kHeldFull + 8 * kSlots * kGroups;
  static constexpr uint32_t kPassedFull = kHeldEmpty + 8 * kSlots * kGroups;
  static constexpr uint32_t kPassedEmpty = kPassedFull + 8 * kStages;
  static constexpr uint32_t kNumberFull = kPassedEmpty + 8 * kStages;
  static constexpr uint32_t kNumberEmpty = kNumberFull + 8 * kNumbers;
  static constexpr uint32_t kNumberAt = kNumberEmpty + 8 * kNumbers;
  static constexpr uint32_t kBytes = kNumberAt + 4 * kNumbers + 1024;  // to begin at a multiple of 1,024
  static_assert(kBytes <= 227 * 1024 && kPassed % 16 == 0 && kPassed <= 128);
};

struct Result {
  CUtensorMap map;
  void* data;
  int64_t batch_stride, head_stride, row_stride;  // in elements
};

struct KernelArgs {
  CUtensorMap held[2], passed[2];
  Result result[2];  // the second of keys only
  const void* lengths;
  const void* out;   // of queries only, as lse and grad_lse
  int64_t out_batch, out_head, out_row;
  const float *lse, *grad_lse;
  float* columns;    // [batch, heads, column_tiles, 2, columns of a tile]: lse' and delta of every query
  int column_tiles, columns_of_tile;
  unsigned* taken;   // tiles, but for the first of each block
  int queries, keys, width, share, scales, prefix;
  int tiles, rows, group, heads;  // what place_of wants: of what is held
  float factor, softmax_scale;    // the former in base 2
  bool wide_lengths;
};

// ---- where to work ---------------------------------------------------------------------------------------------------

// First row of a tile, which may be before 0. What is seen by most, or sees most, goes first.
template <typename Shape>
__device__ __forceinline__ int begin_of(const KernelArgs& args, const Place& place) {
  return Shape::kOfKeys ? args.keys - (args.tiles - place.rank) * Shape::kRows
                        : args.queries - (place.rank + 1) * Shape::kRows;
}

// Query from which on a key's scale is seen.
__device__ __forceinline__ int first_query(const KernelArgs& args, int begin_of_scale, int key) {
  return max(begin_seen_from(begin_of_scale, max(key, 0)) - (args.keys - args.queries), 0);
}

// Steps of the rows held from `first` on, `count` of them.
template <typename Shape>
__device__ __forceinline__ int steps_of(const KernelArgs& args, int begin_of_scale, int first, int count) {
  const int passed = Shape::kOfKeys
                         ? args.queries - first_query(args, begin_of_scale, first)
                         : end_of(begin_of_scale, first + count - 1 + args.keys - args.queries, args.keys);
  return (passed + Shape::kPassed - 1) / Shape::kPassed;
}

// First row of what is passed by in a step.
template <typename Shape>
__device__ __forceinline__ int passed_begin(const KernelArgs& args, int step) {
  return Shape::kOfKeys ? args.queries - (step + 1) * Shape::kPassed : step * Shape::kPassed;
}

// ---- copies ----------------------------------------------------------------------------------------------------------

// The first warp's work; its first lane copies.
template <typename Shape>
__device__ __forceinline__ void copy_all(const KernelArgs& args, uint32_t memory, char* shared) {
  const bool leads = threadIdx.x == 0;
  const int begin_of_scale = scale_begin(args);
  Stage<Shape::kStages> stage;
  Stage<Shape::kSlots> slot[Shape::kGroups];
  Place place;
  for (int turn = 0; place_of(args, tell_tile<Shape>(args, memory, shared, turn), &place); ++turn) {
    const int begin = begin_of<Shape>(args, place);
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int first = begin + group * kHeldRows;
      if (first <= -kHeldRows) continue;
      const uint32_t at = slot[group].at * Shape::kGroups + group;
      barrier_wait(memory + Shape::kHeldEmpty + 8 * at, slot[group].parity ^ 1);
      slot[group].next();
      if (leads) {
        const uint32_t full = memory + Shape::kHeldFull + 8 * at;
        barrier_expect(full, 2 * Shape::kHeldBytes);
#pragma unroll
        for (int box = 0; box < 2 * Shape::kBoxes; ++box)
          load_box(memory + 2 * at * Shape::kHeldBytes + box * kHeldBox, args.held[box / Shape::kBoxes], full,
                   box % Shape::kBoxes * kBox, first, place.head, place.batch);
      }
      __syncwarp();
    }
    const int steps = steps_of<Shape>(args, begin_of_scale, begin, Shape::kRows);
    const int passes = Shape::kMany ? args.share : 1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      const int head = Shape::kOfKeys ? place.head * args.share + pass : place.head / args.share;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        barrier_wait(memory + Shape::kPassedEmpty + 8 * stage.at, stage.parity ^ 1);
        if (leads) {
          const uint32_t full = memory + Shape::kPassedFull + 8 * stage.at;
          const uint32_t to = memory + Shape::kPassedAt + stage.at * 2 * Shape::kPassedBytes;
          barrier_expect(full, 2 * Shape::kPassedBytes + Shape::kColumnsBytes);
#pragma unroll
          for (int box = 0; box < 2 * Shape::kBoxes; ++box)
            load_box(to + box * Shape::kPassedBox, args.passed[box / Shape::kBoxes], full, box % Shape::kBoxes * kBox,
                     passed_begin<Shape>(args, step), head, place.batch);
          if constexpr (Shape::kOfKeys) {
            const int64_t row = int64_t(place.batch) * args.heads * args.share + head;
            load_bytes(memory + Shape::kColumnsAt + stage.at * Shape::kColumnsBytes,
                       args.columns + (row * args.column_tiles + args.column_tiles - 1 - step) * 2 * Shape::kPassed,
                       Shape::kColumnsBytes, full);
          }
        }
        __syncwarp();
        stage.next();
      }
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

// Both by rows: scores, or their gradients.
template <typename Shape>
__device__ __forceinline__ void score_products(float (&score)[Shape::kPassed / 2], uint32_t held, uint32_t passed) {
  const uint64_t a = describe_rows(held), b = describe_rows(passed);
#pragma unroll
  for (int i = 0; i < Shape::kWidth / 16; ++i) {
    const uint32_t box = i / 4, within = i % 4 * kNextInRow;
    multiply_rows<typename Shape::T, Shape::kPassed>(score, further(a, box * kHeldBox + within),
                                                     further(b, box * Shape::kPassedBox + within), i > 0);
  }
  products_commit();
}

template <typename Shape>
__device__ __forceinline__ void sum_products(float (&sum)[Shape::kWidth / 2], const uint32_t (&word)[Shape::kPassed / 4],
                                             uint32_t passed) {
  const uint64_t b = describe_columns(passed, Shape::kPassedBox);
#pragma unroll
  for (int i = 0; i < Shape::kPassed / 16; ++i)
    multiply_columns<typename Shape::T, Shape::kWidth>(sum, word + 4 * i, further(b, i * kNextRows));
  products_commit();
}

// ---- a warpgroup -----------------------------------------------------------------------------------------------------

// What the kernel of the queries has of a thread's two rows; of the other it is loaded by columns.
struct Rows {
  float lse[2], delta[2];
};

// delta and lse' of a thread's two rows, which are written for the kernel of the keys as well. `grad` is the
// warpgroup's tile of it in shared memory.
template <typename Shape>
__device__ __forceinline__ void find_rows(const KernelArgs& args, const Place& place, int first, const char* grad,
                                          Rows& rows) {
  using T = typename Shape::T;
  const int thread = again(threadIdx.x) % 128, lane = thread % 32, own_row = thread / 32 * 16 + lane / 4;
  const T* const out =
      static_cast<const T*>(args.out) + place.batch * args.out_batch + place.head * args.out_head;
  const int missing = args.column_tiles * args.columns_of_tile - args.queries;
  float* const columns = args.columns + int64_t(place.row) * args.column_tiles * 2 * args.columns_of_tile;
  const auto leave = [&](int query, float lse, float delta, bool is_there) {
    const int at = query + missing, tile = at / args.columns_of_tile;
    float* const to = columns + at + tile * args.columns_of_tile;
    if (is_there) to[0] = lse;
    if (is_there) to[args.columns_of_tile] = delta;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + own_row + 8 * h;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kWidth / 32; ++i) {
      const int unit = 4 * i + lane % 4;
      uint4 one{};
      if (row >= 0 && unit * 8 < args.width)
        one = __ldg(reinterpret_cast<const uint4*>(out + row * args.out_row) + unit);
      const uint4 other = *reinterpret_cast<const uint4*>(grad + unit / 8 * kHeldBox + (own_row + 8 * h) * 128 +
                                                          ((unit % 8 ^ own_row % 8) << 4));
      const uint32_t left[4] = {one.x, one.y, one.z, one.w}, right[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float2 a = unpack_word(left[word], T{}), b = unpack_word(right[word], T{});
        sum = fmaf(a.x, b.x, sum);
        sum = fmaf(a.y, b.y, sum);
      }
    }
    sum = quad_sum(sum);
    const int64_t at = int64_t(place.row) * args.queries + max(row, 0);
    const float lse = args.lse[at] * kLog2E, grad_lse = args.grad_lse == nullptr ? 0.0f : args.grad_lse[at];
    rows.lse[h] = row >= 0 ? lse : INFINITY;
    rows.delta[h] = row >= 0 ? sum - grad_lse : 0.0f;
    leave(row, rows.lse[h], rows.delta[h], row >= 0 && lane % 4 == 0);
  }
  // The columns of queries that are not there.
  leave(thread - missing, INFINITY, 0.0f, first <= 0 && thread < missing);
}

template <typename Shape>
__device__ __forceinline__ void calculate(const KernelArgs& args, uint32_t memory, char* shared) {
  using T = typename Shape::T;
  constexpr bool kOfKeys = Shape::kOfKeys;
  constexpr int kPassed = Shape::kPassed, kWidth = Shape::kWidth;
  const int group = __shfl_sync(kWarp, threadIdx.x / 128, 0) - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int begin_of_scale = scale_begin(args);
  const int offset = args.keys - args.queries;

  const auto passed_at = [&](uint32_t stage) { return memory + Shape::kPassedAt + stage * 2 * Shape::kPassedBytes; };
  const auto done_with = [&](uint32_t stage) {  // each warp says so
    if (lane == 0) barrier_arrive(memory + Shape::kPassedEmpty + 8 * stage);
  };

  // Results may still be on their way out of the place of what was held.
  Stage<Shape::kSlots> slot;
  bool leaving = false;
  const auto free_held = [&] {
    if (leaving) {
      store_wait();  // of the first thread, which stored; see below
      const uint32_t before = Shape::kSlots == 1 ? 0 : slot.at ^ 1;
      if (thread == 0) barrier_arrive(memory + Shape::kHeldEmpty + 8 * (before * Shape::kGroups + group));
    }
    leaving = false;
  };

  // Warpgroups issue the products of a step one after the other, all of them as often.
  const auto wait_for_turn = [&] { named_sync(kTurnName + group, 256); };
  const auto give_turn = [&] { named_arrive(kTurnName + (group + 1) % Shape::kGroups, 256); };
  if (group == Shape::kGroups - 1) give_turn();

  Stage<Shape::kStages> stage;
  Place place;
  for (int turn = 0; place_of(args, hear_tile<Shape>(memory, shared, turn), &place); ++turn) {
    const int begin = begin_of<Shape>(args, place), first = begin + group * kHeldRows;
    const int all_steps = steps_of<Shape>(args, begin_of_scale, begin, Shape::kRows);
    const int passes = Shape::kMany ? args.share : 1;
    const bool works = first > -kHeldRows;
    const int steps = works ? steps_of<Shape>(args, begin_of_scale, first, kHeldRows) : 0;
    const uint32_t at = slot.at * Shape::kGroups + group;
    const uint32_t held = memory + 2 * at * Shape::kHeldBytes;
    char* const held_data = shared + 2 * at * Shape::kHeldBytes;

    // Where what a row sees ends, or where those who see it begin, as columns of step 0; and the steps, the first ones,
    // that no row has a limit in.
    int limit[2] = {}, whole = 0;
    if (works) {
      const int fresh = again(threadIdx.x) % 128;
      const int own_row = fresh / 32 * 16 + fresh % 32 / 4, own_column = fresh % 4 * 2;
      const int ahead = kOfKeys ? 0 : offset;
      const int position[2] = {max(first + own_row, 0) + ahead, max(first + own_row + 8, 0) + ahead};
      if constexpr (kOfKeys) {
        begins_seen_from(begin_of_scale, args.scales, position, limit);
        const int last = first_query(args, begin_of_scale, first + kHeldRows - 1);
        whole = last == 0 ? steps : (args.queries - last) / kPassed;
        limit[0] -= offset + passed_begin<Shape>(args, 0) + own_column;
        limit[1] -= offset + passed_begin<Shape>(args, 0) + own_column;
      } else {
        ends_of(begin_of_scale, args.scales, position, args.keys, limit);
        whole = end_of(begin_of_scale, max(first, 0) + offset, args.keys) / kPassed;
        limit[0] -= own_column;
        limit[1] -= own_column;
      }
    }

    Rows rows;
    float sum[kWidth / 2], value_sum[kOfKeys ? kWidth / 2 : 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] = 0.0f;
    if constexpr (kOfKeys) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) value_sum[i] = 0.0f;
    }
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      if (works) {
        float score[kPassed / 2], grad[kPassed / 2];
        uint32_t word[kPassed / 4];
        Stage<Shape::kStages> before;
        const auto advance = [&](int step, auto is_first, auto masked) {
          constexpr bool kFirst = decltype(is_first)::value, kMasked = decltype(masked)::value;
          const uint32_t passed = of_warp(passed_at(stage.at)), behind = of_warp(passed_at(before.at));
          const uint32_t own = of_warp(held);
          barrier_wait(memory + Shape::kPassedFull + 8 * stage.at, stage.parity);
          settle(score);
          settle(grad);
          settle(sum);
          wait_for_turn();
          products_begin();
          score_products<Shape>(score, own, passed);
          if constexpr (!kFirst) sum_products<Shape>(sum, word, behind);  // with the dS of the step before
          score_products<Shape>(grad, own + Shape::kHeldBytes, passed + Shape::kPassedBytes);
          give_turn();
          if constexpr (kFirst && !kOfKeys)
            find_rows<Shape>(args, place, first, held_data + Shape::kHeldBytes, rows);
          products_wait<kFirst ? 1 : 2>();
          settle(score);

          // Two at a time; the compiler makes two loads of a float2.
          const uint64_t* const columns = reinterpret_cast<const uint64_t*>(shared + Shape::kColumnsAt +
                                                                            stage.at * Shape::kColumnsBytes) +
                                          threadIdx.x % 4;
          const auto column_of = [&](int from, int i) {
            return __uint_as_float(uint32_t(columns[from / 2 + i / 4 * 4] >> i % 2 * 32));
          };
          const int moved = kOfKeys ? -step * kPassed : step * kPassed;
          uint32_t signs = 0;
#pragma unroll
          for (int i = 0; i < kPassed / 2; ++i) {
            const int column = i / 4 * 8 + i % 2, h = i / 2 % 2;
            const float lse = kOfKeys ? column_of(0, i) : rows.lse[h];
            score[i] = exp2_of(fmaf(score[i], args.factor, -lse));
            if constexpr (kMasked) {
              const bool seen = kOfKeys ? column >= limit[h] - moved : column < limit[h] - moved;
              score[i] = seen ? score[i] : 0.0f;
            }
            signs |= __float_as_uint(score[i]);
          }
          // The exponentials are to run under the products: see the forward. Weights are not negative.
          const auto look = [&] { barrier_look(memory + Shape::kHeldFull + (signs >> 31) * 8); };
          if constexpr (kOfKeys) {
            // Weights are packed where dS were, whose products have to be over.
            if constexpr (!kFirst) {
              look();
              products_wait<1>();
              settle(score);
              settle(sum);
              done_with(before.at);
            }
            pack<T>(score, word);
            settle(value_sum);
            products_begin();
            sum_products<Shape>(value_sum, word, passed + Shape::kPassedBytes);
            products_wait<0>();
            settle(grad);
            settle(value_sum);
          } else {
            if constexpr ((Shape::kHow & kNoLook) == 0) look();
            products_wait<0>();
            settle(grad);
            settle(sum);
            if constexpr (!kFirst) done_with(before.at);
          }
#pragma unroll
          for (int i = 0; i < kPassed / 2; ++i) {
            const float delta = kOfKeys ? column_of(kPassed, i) : rows.delta[i / 2 % 2];
            grad[i] = score[i] * (grad[i] - delta);
          }
          pack<T>(grad, word);
          before = stage;
          stage.next();
        };

        if (pass == 0) barrier_wait(memory + Shape::kHeldFull + 8 * at, slot.parity);
        advance(0, std::true_type{}, std::true_type{});
        if (Shape::kSlots > 1 && pass == 0) free_held();
        int step = 1;
#pragma unroll 1
        for (; step < whole; ++step) advance(step, std::false_type{}, std::false_type{});
#pragma unroll 1
        for (; step < steps; ++step) advance(step, std::false_type{}, std::true_type{});

        settle(sum);
        products_begin();
        sum_products<Shape>(sum, word, passed_at(before.at));
        products_wait<0>();
        settle(sum);
        done_with(before.at);
      }
      // Those that other warpgroups need.
#pragma unroll 1
      for (int step = steps; step < all_steps; ++step) {
        barrier_wait(memory + Shape::kPassedFull + 8 * stage.at, stage.parity);
        wait_for_turn();
        give_turn();
        done_with(stage.at);
        stage.next();
      }
    }
    if (!works) continue;

    // Results, through the place of what was held, where no warp of the group reads any more.
    uint32_t word[kWidth / 4], value_word[kOfKeys ? kWidth / 4 : 1];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] *= args.softmax_scale;
    pack<T>(sum, word);
    if constexpr (kOfKeys) pack<T>(value_sum, value_word);
    const auto rows_of = [&](const Result& result) {
      return static_cast<T*>(result.data) + place.batch * result.batch_stride + place.head * result.head_stride;
    };
    named_sync(kGroupName + group, 128);
    if (first >= 0) {
      write_boxes(word, held_data);
      if constexpr (kOfKeys) write_boxes(value_word, held_data + Shape::kHeldBytes);
      shared_written();
      named_sync(kGroupName + group, 128);
      if (thread == 0) {
#pragma unroll
        for (int box = 0; box < (kOfKeys ? 2 : 1) * Shape::kBoxes; ++box)
          store_box(args.result[box / Shape::kBoxes].map, held + box * kHeldBox, box % Shape::kBoxes * kBox, first,
                    place.head, place.batch);
        store_commit();
      }
    } else {
      write_rows(word, rows_of(args.result[0]), args.result[0].row_stride, first, args.width);
      if constexpr (kOfKeys)
        write_rows(value_word, rows_of(args.result[1]), args.result[1].row_stride, first, args.width);
    }
    leaving = true;
    slot.next();
    if constexpr (Shape::kSlots == 1) free_held();
  }
  if (thread == 0) store_wait();
}

// Grid: as many blocks as there are multiprocessors, or tiles.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ KernelArgs args) {
  if (!kHasProducts) {  // the launcher starts it on compute capability 9.0 only
    __trap();
    return;
  }
  extern __shared__ uint4 unifiedar_shared[];
  const uint32_t unaligned = shared_address(unifiedar_shared), memory = (unaligned + 1023) / 1024 * 1024;
  char* const shared = reinterpret_cast<char*>(unifiedar_shared) + (memory - unaligned);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kSlots * Shape::kGroups; ++i) {
      barrier_init(memory + Shape::kHeldFull + 8 * i, 1);
      barrier_init(memory + Shape::kHeldEmpty + 8 * i, 1);
    }
    for (int i = 0; i < kNumbers; ++i) {
      barrier_init(memory + Shape::kNumberFull + 8 * i, 1);
      barrier_init(memory + Shape::kNumberEmpty + 8 * i, 4 * Shape::kGroups);
    }
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(memory + Shape::kPassedFull + 8 * i, 1);
      barrier_init(memory + Shape::kPassedEmpty + 8 * i, 4 * Shape::kGroups);
    }
    barrier_init_done();
    for (int i = 0; i < 2; ++i) {
      prefetch_map(args.held[i]);
      prefetch_map(args.passed[i]);
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kFewRegisters));
    if (threadIdx.x < 32) copy_all<Shape>(args, memory, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kManyRegisters));
    calculate<Shape>(args, memory, shared);
  }
}

// ---- launcher --------------------------------------------------------------------------------------------------------

int tiles_of(int length, int rows) { return (length + rows - 1) / rows; }

// The kernels' two counters lie in the last 16 bytes of the workspace: no tile of columns has more than 112, which
// leaves 32 numbers a head.
unsigned* counters_of(const AttentionBackwardArgs& args) {
  return reinterpret_cast<unsigned*>(args.workspace + int64_t(args.batch) * args.heads * 2 * (args.queries + 127) - 4);
}

// One of the two kernels. `columns_of_tile` is what the kernel of the keys passes by in a step.
template <typename Shape>
cudaError_t launch_tile(const AttentionBackwardArgs& args, DType dtype, int columns_of_tile, int processors,
                        cudaStream_t stream) {
  constexpr bool kOfKeys = Shape::kOfKeys;
  KernelArgs kernel_args{};
  const int key_heads = args.heads / args.share;
  const int held_heads = kOfKeys ? key_heads : args.heads, passed_heads = kOfKeys ? args.heads : key_heads;
  const int held_length = kOfKeys ? args.keys : args.queries, passed_length = kOfKeys ? args.queries : args.keys;
  const HeadsView of_queries[2] = {args.q, args.grad}, of_keys[2] = {args.k, args.v};
  const HeadsView results[2] = {kOfKeys ? args.grad_k : args.grad_q, kOfKeys ? args.grad_v : args.grad_q};
  cudaError_t error = cudaSuccess;
  const auto describe = [&](CUtensorMap* map, const HeadsView& view, int heads, int length, int rows) {
    if (error == cudaSuccess)
      error = describe_tensor(map, view, dtype, args.batch, heads, length, args.width, rows);
  };
  for (int i = 0; i < 2; ++i) {
    describe(&kernel_args.held[i], (kOfKeys ? of_keys : of_queries)[i], held_heads, held_length, kHeldRows);
    describe(&kernel_args.passed[i], (kOfKeys ? of_queries : of_keys)[i], passed_heads, passed_length, Shape::kPassed);
    describe(&kernel_args.result[i].map, results[i], held_heads, held_length, kHeldRows);
    kernel_args.result[i].data = results[i].data;
    kernel_args.result[i].batch_stride = results[i].batch_stride;
    kernel_args.result[i].head_stride = results[i].head_stride;
    kernel_args.result[i].row_stride = results[i].row_stride;
  }
  if (error != cudaSuccess) return error;
  kernel_args.lengths = args.lengths;
  kernel_args.wide_lengths = args.wide_lengths;
  kernel_args.out = args.out.data;
  kernel_args.out_batch = args.out.batch_stride;
  kernel_args.out_head = args.out.head_stride;
  kernel_args.out_row = args.out.row_stride;
  kernel_args.lse = args.lse;
  kernel_args.grad_lse = args.grad_lse;
  kernel_args.columns = args.workspace;
  kernel_args.columns_of_tile = columns_of_tile;
  kernel_args.column_tiles = tiles_of(args.queries, columns_of_tile);
  kernel_args.taken = counters_of(args) + kOfKeys;
  kernel_args.queries = args.queries;
  kernel_args.keys = args.keys;
  kernel_args.width = args.width;
  kernel_args.share = args.share;
  kernel_args.scales = args.scales;
  kernel_args.prefix = args.prefix;
  kernel_args.tiles = tiles_of(held_length, Shape::kRows);
  kernel_args.rows = args.batch * held_heads;
  kernel_args.heads = held_heads;
  kernel_args.group = kOfKeys ? args.key_group : args.query_group;
  kernel_args.factor = args.softmax_scale * kLog2E;
  kernel_args.softmax_scale = args.softmax_scale;
  const int64_t tiles = int64_t(kernel_args.tiles) * kernel_args.rows;
  if (tiles > INT32_MAX || int64_t(kernel_args.group) * kernel_args.tiles > INT32_MAX) return cudaErrorNotSupported;
  const auto kernel = attention_backward_sm90_kernel<Shape>;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Shape::kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<int(std::min<int64_t>(processors, tiles)), Shape::kThreads, Shape::kBytes, stream>>>(kernel_args);
  return cudaGetLastError();
}

template <typename OfQueries, typename OfKeys>
cudaError_t launch_tiles(const AttentionBackwardArgs& args, DType dtype, int processors, cudaStream_t stream) {
  static_assert(OfKeys::kPassed <= 112);
  cudaError_t error = cudaMemsetAsync(counters_of(args), 0, 2 * sizeof(unsigned), stream);
  if (error == cudaSuccess) error = launch_tile<OfQueries>(args, dtype, OfKeys::kPassed, processors, stream);
  if (error != cudaSuccess) return error;
  return launch_tile<OfKeys>(args, dtype, OfKeys::kPassed, processors, stream);
}

template <typename T>
cudaError_t launch_backward(const AttentionBackwardArgs& args, DType dtype, int processors, cudaStream_t stream) {
  if (args.width > 96) {
    using OfQueries = Tile<T, false, 2, 128, 96, 3, 1>;
    if (args.share == 1)
      return launch_tiles<OfQueries, Tile<T, true, 2, 128, 64, 4, 1, kAlone>>(args, dtype, processors, stream);
    return launch_tiles<OfQueries, Tile<T, true, 2, 128, 64, 4, 1>>(args, dtype, processors, stream);
  }
  if (args.width > 64)
    return launch_tiles<Tile<T, false, 2, 96, 96, 3, 1>, Tile<T, true, 2, 96, 80, 3, 1>>(args, dtype, processors, stream);
  return launch_tiles<Tile<T, false, 3, 64, 64, 5, 2, kNoLook>, Tile<T, true, 2, 64, 96, 4, 2>>(args, dtype, processors,
                                                                                                stream);
}

}  // namespace

cudaError_t launch_attention_backward(const AttentionBackwardArgs& args, DType dtype, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  switch (dtype) {
    case DType::kBFloat16:
      return launch_backward<__nv_bfloat16>(args, dtype, processors, stream);
    case DType::kFloat16:
      return launch_backward<__half>(args, dtype, processors, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace unifiedar
