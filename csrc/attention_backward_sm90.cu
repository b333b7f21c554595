#include "attention_backward_sm90.cuh"

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
// the other, so that one's chain of exponentials runs under another's products, too. Where dP comes late (kLate), when no
// other product is under way, its registers are those of what was packed before: there is room for larger steps, or for
// a warpgroup more, whose products the chain of one runs under.
//
// Descriptors of operands are computed from what all lanes are known to have (of_warp): else each product of 16 rows
// waits for two or four moves of a register to those of the warp. Blocks take tiles from a counter: which block has one
// does not change a bit of it.
//
// Queries and keys held are counted from the last one, as in the forward; queries passed by too, so that only the first
// can be missing: there lse' is infinite and weights are 0. Keys passed by are counted from the first.
//
// Where there are few tiles, each warpgroup's rows are one (narrow_wins), taken in turns and without a memset; the kernel
// of the keys begins while that of the queries runs, and waits for it where it reads the columns.
//
// With tables (kByTable) a tile runs through the ranges of its rows one after another, as in the forward: of what they
// see, or of who sees them. Queries of a range are passed by in tiles that are counted from the last one of the image, of
// which the workspace has the columns. Where the steps of a tile begin and end is found before by a kernel of its own, for
// neither the warp that copies nor those that calculate have registers to spare.
namespace unifiedar {
namespace {

// ---- copies ----------------------------------------------------------------------------------------------------------

// The first warp's work; its first lane copies.
template <typename Shape>
__device__ __forceinline__ void copy_all(const KernelArgs& args, uint32_t memory, char* shared) {
  const bool leads = threadIdx.x == 0;
  const int length_of_scale = Shape::kTable ? 0 : scale_length(args);
  int begin_of_scale = Shape::kTable || Shape::kEarly ? 0 : scale_begin(args, length_of_scale);
  Stage<Shape::kStages> stage;
  uint32_t held[Shape::kGroups] = {};  // tiles that each warpgroup had
  Place place;
  for (int turn = 0; place_of(args, tell_tile<Shape>(args, memory, shared, turn), &place); ++turn) {
    const Held tile = rows_of<Shape>(args, place);
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int first = tile.begin + group * kHeldRows;
      if (first + kHeldRows <= tile.low) continue;
      const uint32_t at = held[group] % Shape::kSlots * Shape::kGroups + group;
      barrier_wait(memory + Shape::kHeldEmpty + 8 * at, held[group] / Shape::kSlots % 2 ^ 1);
      ++held[group];
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
    const int passes = Shape::kMany ? args.share : 1;
    if (Shape::kEarly && turn == 0) begin_of_scale = scale_begin(args, length_of_scale);
#pragma unroll 1
    for (int range = 0; range < (Shape::kTable ? args.ranges : 1); ++range) {
      const Span span = span_of<Shape>(args, begin_of_scale, place, tile, range, 0, nullptr);
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        const int head = Shape::kOfKeys ? place.head * args.share + pass : place.head / args.share;
#pragma unroll 1
        for (int step = 0; step < span.steps; ++step) {
          barrier_wait(memory + Shape::kPassedEmpty + 8 * stage.at, stage.parity ^ 1);
          if (leads) {
            const uint32_t full = memory + Shape::kPassedFull + 8 * stage.at;
            const uint32_t to = memory + Shape::kPassedAt + stage.at * 2 * Shape::kPassedBytes;
            barrier_expect(full, 2 * Shape::kPassedBytes + Shape::kColumnsBytes);
#pragma unroll
            for (int box = 0; box < 2 * Shape::kBoxes; ++box)
              load_box(to + box * Shape::kPassedBox, args.passed[box / Shape::kBoxes], full, box % Shape::kBoxes * kBox,
                       passed_begin<Shape>(span, step), head, place.batch);
            if constexpr (Shape::kOfKeys) {
              const int row = place.row * args.share + pass;
              if constexpr (Shape::kInRow) kernels_before_done();
              load_bytes(memory + Shape::kColumnsAt + stage.at * Shape::kColumnsBytes,
                         args.columns +
                             (int64_t(row) * args.column_tiles + (span.columns - step)) * (2 * Shape::kPassed),
                         Shape::kColumnsBytes, full);
            }
          }
          __syncwarp();
          stage.next();
        }
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

// A place's output, and what a thread has of one of its rows for delta: 8 channels of every 32.
template <typename T>
__device__ __forceinline__ const T* out_of(const KernelArgs& args, const Place& place) {
  return static_cast<const T*>(args.out) + place.batch * args.out_batch + place.head * args.out_head;
}
template <typename T>
__device__ __forceinline__ uint4 load_out(const KernelArgs& args, const T* out, int low, int row, int unit) {
  uint4 loaded{};
  if (row >= low && unit * 8 < args.width)
    loaded = __ldg(reinterpret_cast<const uint4*>(out + row * args.out_row) + unit);
  return loaded;
}

// The same of its two rows, asked for before all else where there is room for it (kEarly).
template <typename Shape>
struct Early {
  uint4 out[2][Shape::kEarly ? Shape::kWidth / 32 : 1];
};
template <typename Shape>
__device__ __forceinline__ void load_early(const KernelArgs& args, const Place& place, const Held& tile, int first,
                                           Early<Shape>& early) {
  const int thread = again(threadIdx.x) % 128, own_row = thread / 32 * 16 + thread % 32 / 4;
  const auto* const out = out_of<typename Shape::T>(args, place);
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < Shape::kWidth / 32; ++i)
      early.out[h][i] = load_out(args, out, tile.low, first + own_row + 8 * h, 4 * i + thread % 4);
}

// delta and lse' of a thread's two rows, which are written for the kernel of the keys as well. `grad` is the
// warpgroup's tile of it in shared memory.
template <typename Shape>
__device__ __forceinline__ void find_rows(const KernelArgs& args, const Place& place, const Held& tile, int first,
                                          const char* grad, const Early<Shape>& early, Rows& rows) {
  using T = typename Shape::T;
  const int thread = again(threadIdx.x) % 128, lane = thread % 32, own_row = thread / 32 * 16 + lane / 4;
  const T* const out = out_of<T>(args, place);
  const int low = tile.low, length = tile.high - tile.low;
  const int tiles = Shape::kTable ? steps_for(length, args.columns_of_tile) : args.column_tiles;
  const int missing = tiles * args.columns_of_tile - length;
  float* const columns =
      args.columns + (int64_t(place.row) * args.column_tiles + tile.columns) * 2 * args.columns_of_tile;
  const auto leave = [&](int query, float lse, float delta, bool is_there) {
    const int at = query - low + missing;
    float* const to = columns + at + at / args.columns_of_tile * args.columns_of_tile;
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
      uint4 one;
      if constexpr (Shape::kEarly)
        one = early.out[h][i];
      else
        one = load_out(args, out, low, row, unit);
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
    const int64_t at = int64_t(place.row) * args.queries + max(row, low);
    const float lse = args.lse[at] * kLog2E, grad_lse = args.grad_lse == nullptr ? 0.0f : args.grad_lse[at];
    rows.lse[h] = row >= low ? lse : INFINITY;
    rows.delta[h] = row >= low ? sum - grad_lse : 0.0f;
    leave(row, rows.lse[h], rows.delta[h], row >= low && lane % 4 == 0);
  }
  // The columns of queries that are not there.
  leave(low + thread - missing, INFINITY, 0.0f, first <= low && thread < missing);
}

template <typename Shape>
__device__ __forceinline__ void calculate(const KernelArgs& args, uint32_t memory, char* shared) {
  using T = typename Shape::T;
  constexpr bool kOfKeys = Shape::kOfKeys;
  constexpr int kPassed = Shape::kPassed, kWidth = Shape::kWidth;
  const int group = __shfl_sync(kWarp, threadIdx.x / 128, 0) - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int begin_of_scale = Shape::kTable ? 0 : scale_begin(args, scale_length(args));

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
  const auto wait_for_turn = [&] {
    if constexpr (Shape::kGroups > 1) named_sync(kTurnName + group, 256);
  };
  const auto give_turn = [&] {
    if constexpr (Shape::kGroups > 1) named_arrive(kTurnName + (group + 1) % Shape::kGroups, 256);
  };
  if (group == Shape::kGroups - 1) give_turn();

  Stage<Shape::kStages> stage;
  Place place;
  for (int turn = 0; place_of(args, hear_tile<Shape>(memory, shared, turn), &place); ++turn) {
    Held tile = rows_of<Shape>(args, place);
    if constexpr (Shape::kTable) tile = known(tile);
    const int first = tile.begin + group * kHeldRows;
    const int passes = Shape::kMany ? args.share : 1;
    const bool works = first + kHeldRows > tile.low;
    const uint32_t at = slot.at * Shape::kGroups + group;
    const uint32_t held = memory + 2 * at * Shape::kHeldBytes;
    char* const held_data = shared + 2 * at * Shape::kHeldBytes;
    if (Shape::kTable && works) barrier_wait(memory + Shape::kHeldFull + 8 * at, slot.parity);

    Rows rows;
    Early<Shape> early;
    if constexpr (Shape::kEarly && !kOfKeys) {
      if (works) load_early<Shape>(args, place, tile, first, early);
    }
    constexpr bool kIsLate = (Shape::kHow & kLate) != 0;
    float sum[kWidth / 2], value_sum[kOfKeys ? kWidth / 2 : 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] = 0.0f;
    if constexpr (kOfKeys) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) value_sum[i] = 0.0f;
    }
#pragma unroll 1
    for (int range = 0; range < (Shape::kTable ? args.ranges : 1); ++range) {
      Part part{};
      Span span = span_of<Shape>(args, begin_of_scale, place, tile, range, group, &part);
      if constexpr (Shape::kTable) {
        span = known(span);
        part = known(part);
      }
      const int steps = works ? part.steps : 0;
      // Columns of step 0, less the thread's first, that its rows have to do with. Those of a table lie in shared
      // memory: most steps have no limit, and registers are short.
      int begin[2] = {}, end[2] = {};
      const auto limits = [&] {
        return reinterpret_cast<int4*>(shared + Shape::kLimitsAt) + (again(threadIdx.x) - 128);
      };
      if (Shape::kTable ? steps > 0 : works) {
        const int fresh = again(threadIdx.x) % 128, own_column = fresh % 4 * 2;
        columns_of<Shape>(args, begin_of_scale, tile, range, span.from, first + fresh / 32 * 16 + fresh % 32 / 4,
                          begin, end);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          begin[h] -= own_column;
          end[h] -= own_column;
        }
        if constexpr (Shape::kTable) *limits() = {begin[0], begin[1], end[0], end[1]};
      }
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        if (Shape::kTable ? steps > 0 : works) {
          float score[kPassed / 2], grad[kPassed / 2];
          uint32_t word[kPassed / 4];
          Stage<Shape::kStages> before;
          const auto advance = [&](int step, auto is_first, auto masked) {
            constexpr bool kFirst = decltype(is_first)::value, kMasked = decltype(masked)::value;
            const uint32_t passed = of_warp(passed_at(stage.at)), behind = of_warp(passed_at(before.at));
            const uint32_t own = of_warp(Shape::kAnew ? memory + 2 * Shape::kHeldBytes * (slot.at * Shape::kGroups +
                                                                                         threadIdx.x / 128 - 1)
                                                     : held);
            barrier_wait(memory + Shape::kPassedFull + 8 * stage.at, stage.parity);
            if constexpr (kIsLate) {
              fresh(score);
            } else {
              settle(score);
              settle(grad);
            }
            settle(sum);
            wait_for_turn();
            products_begin();
            score_products<Shape>(score, own, passed);
            if constexpr (!kFirst) sum_products<Shape>(sum, word, behind);  // with the dS of the step before
            const auto multiply_grad = [&] {
              score_products<Shape>(grad, own + Shape::kHeldBytes, passed + Shape::kPassedBytes);
            };
            if constexpr (!kIsLate) multiply_grad();
            give_turn();
            if constexpr (kFirst && !kOfKeys)
              find_rows<Shape>(args, place, tile, first, held_data + Shape::kHeldBytes, early, rows);
            products_wait<(kFirst ? 0 : 1) + !kIsLate>();
            settle(score);

            // Two at a time; the compiler makes two loads of a float2.
            const uint64_t* const columns = reinterpret_cast<const uint64_t*>(shared + Shape::kColumnsAt +
                                                                              stage.at * Shape::kColumnsBytes) +
                                            threadIdx.x % 4;
            const auto column_of = [&](int from, int i) {
              return __uint_as_float(uint32_t(columns[from / 2 + i / 4 * 4] >> i % 2 * 32));
            };
            const int moved = kOfKeys ? -step * kPassed : step * kPassed;
            if constexpr (kMasked && Shape::kTable) {
              const int4 limit = *limits();
              begin[0] = limit.x;
              begin[1] = limit.y;
              end[0] = limit.z;
              end[1] = limit.w;
            }
            uint32_t signs = 0;
#pragma unroll
            for (int i = 0; i < kPassed / 2; ++i) {
              const int column = i / 4 * 8 + i % 2, h = i / 2 % 2;
              const float lse = kOfKeys ? column_of(0, i) : rows.lse[h];
              score[i] = exp2_of(fmaf(score[i], args.factor, -lse));
              if constexpr (kMasked) {
                const bool begun = !Shape::kTable && !kOfKeys || column >= begin[h] - moved;
                const bool lasts = !Shape::kTable && kOfKeys || column < end[h] - moved;
                score[i] = begun && lasts ? score[i] : 0.0f;
              }
              signs |= __float_as_uint(score[i]);
            }
            // The exponentials are to run under the products: see the forward. Weights are not negative.
            const auto look = [&] { barrier_look(memory + Shape::kHeldFull + (signs >> 31) * 8); };
            if constexpr (kOfKeys) {
              // Weights are packed where dS were, whose products have to be over.
              if constexpr (!kFirst) {
                look();
                products_wait<!kIsLate>();
                settle(score);
                settle(sum);
                done_with(before.at);
              }
              pack<T>(score, word);
              settle(value_sum);
              products_begin();
              sum_products<Shape>(value_sum, word, passed + Shape::kPassedBytes);
              products_wait<0>();
              settle(value_sum);
            } else {
              if constexpr ((Shape::kHow & kNoLook) == 0) look();
              products_wait<0>();
              settle(sum);
              if constexpr (!kFirst) done_with(before.at);
            }
            if constexpr (kIsLate) {
              if constexpr (!kOfKeys) settle(score);
              fresh(grad);
              products_begin();
              multiply_grad();
              products_wait<0>();
            }
            settle(grad);
#pragma unroll
            for (int i = 0; i < kPassed / 2; ++i) {
              const float delta = kOfKeys ? column_of(kPassed, i) : rows.delta[i / 2 % 2];
              grad[i] = score[i] * (grad[i] - delta);
            }
            pack<T>(grad, word);
            before = stage;
            stage.next();
          };

          if (!Shape::kTable && pass == 0) barrier_wait(memory + Shape::kHeldFull + 8 * at, slot.parity);
          advance(0, std::true_type{}, std::true_type{});
          if (Shape::kSlots > 1 && pass == 0) free_held();
          int step = 1;
          if constexpr (Shape::kTable) {
#pragma unroll 1
            for (; step < min(part.open, steps); ++step) advance(step, std::false_type{}, std::true_type{});
          }
#pragma unroll 1
          for (; step < part.whole; ++step) advance(step, std::false_type{}, std::false_type{});
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
        for (int step = steps; step < span.steps; ++step) {
          barrier_wait(memory + Shape::kPassedFull + 8 * stage.at, stage.parity);
          wait_for_turn();
          give_turn();
          done_with(stage.at);
          stage.next();
        }
      }
    }
    if (!works) continue;
    if (Shape::kTable && Shape::kSlots > 1) free_held();  // if there was no step

    // Results, through the place of what was held, where no warp of the group reads any more.
    uint32_t word[kWidth / 4], value_word[kOfKeys ? kWidth / 4 : 1];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] *= args.softmax_scale;
    pack<T>(sum, word);
    if constexpr (kOfKeys) pack<T>(value_sum, value_word);
    const auto rows_to = [&](const Result& result) {
      return static_cast<T*>(result.data) + place.batch * result.batch_stride + place.head * result.head_stride +
             tile.low * result.row_stride;
    };
    named_sync(kGroupName + group, 128);
    if (first >= tile.low) {
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
      const int skipped = first - tile.low;
      write_rows(word, rows_to(args.result[0]), args.result[0].row_stride, skipped, args.width);
      if constexpr (kOfKeys)
        write_rows(value_word, rows_to(args.result[1]), args.result[1].row_stride, skipped, args.width);
    }
    leaving = true;
    slot.next();
    if constexpr (Shape::kSlots == 1) free_held();
  }
  if (thread == 0) store_wait();
}

// Grid: as many blocks as the multiprocessors hold, or tiles.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
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
  if constexpr (Shape::kInRow && !Shape::kOfKeys) kernels_behind_begin();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kFewRegisters));
    if (threadIdx.x < 32) copy_all<Shape>(args, memory, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kManyRegisters));
    calculate<Shape>(args, memory, shared);
  }
}

// Makes both kernels' plans, a warp an entry, and sets their counters to 0.
struct PlanArgs {
  Planned of_queries, of_keys;
  unsigned* taken;
};
template <typename OfQueries, typename OfKeys>
__global__ void __launch_bounds__(128) attention_backward_plan_sm90_kernel(PlanArgs args) {
  if (blockIdx.x == 0 && threadIdx.x < 2) args.taken[threadIdx.x] = 0;
  const int warp = int(of_warp((blockIdx.x * blockDim.x + threadIdx.x) / 32));
  const int queries = args.of_queries.tiles * args.of_queries.ranges, keys = args.of_keys.tiles * args.of_keys.ranges;
  if (warp < queries)
    plan_steps<OfQueries>(args.of_queries, warp);
  else if (warp < queries + keys)
    plan_steps<OfKeys>(args.of_keys, warp - queries);
}

// ---- launcher --------------------------------------------------------------------------------------------------------

int tiles_of(int length, int rows) { return (length + rows - 1) / rows; }

// The kernels' two counters lie in the last 16 bytes of the workspace: no tile of columns has more than 112, which
// leaves 32 numbers a head.
unsigned* counters_of(const AttentionBackwardArgs& args) {
  return reinterpret_cast<unsigned*>(args.workspace + int64_t(args.batch) * args.heads * 2 *
                                                          (args.queries + 127 * int64_t(std::max(args.images, 1))) -
                                     4);
}

// Tiles of a length, or slots for those of all images.
int64_t slots_of(const AttentionBackwardArgs& args, int length, int rows) {
  return args.offsets != nullptr ? int64_t(length / rows) + args.images : tiles_of(length, rows);
}

// One of the two kernels. `columns_of_tile` is what the kernel of the keys passes by in a step.
template <typename Shape>
cudaError_t launch_tile(const AttentionBackwardArgs& args, const Planned& planned, DType dtype, int columns_of_tile,
                        int processors, cudaStream_t stream) {
  constexpr bool kOfKeys = Shape::kOfKeys;
  KernelArgs kernel_args{};
  const int key_heads = args.heads / args.share;
  const int held_heads = kOfKeys ? key_heads : args.heads, passed_heads = kOfKeys ? args.heads : key_heads;
  const int held_length = kOfKeys ? args.keys : args.queries, passed_length = kOfKeys ? args.queries : args.keys;
  const HeadsView of_queries[2] = {args.q, args.grad}, of_keys[2] = {args.k, args.v};
  const HeadsView results[2] = {kOfKeys ? args.grad_k : args.grad_q, kOfKeys ? args.grad_v : args.grad_q};
  const auto kernel = attention_backward_sm90_kernel<Shape>;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
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
  kernel_args.table = planned.table;
  kernel_args.plan = planned.plan;
  kernel_args.ranges = planned.ranges;
  kernel_args.out = args.out.data;
  kernel_args.out_batch = args.out.batch_stride;
  kernel_args.out_head = args.out.head_stride;
  kernel_args.out_row = args.out.row_stride;
  kernel_args.lse = args.lse;
  kernel_args.grad_lse = args.grad_lse;
  kernel_args.columns = args.workspace;
  kernel_args.columns_of_tile = columns_of_tile;
  kernel_args.column_tiles = int(slots_of(args, args.queries, columns_of_tile));
  kernel_args.taken = Shape::kCounted ? counters_of(args) + kOfKeys : nullptr;
  kernel_args.queries = args.queries;
  kernel_args.keys = args.keys;
  kernel_args.width = args.width;
  kernel_args.share = args.share;
  kernel_args.scales = args.scales;
  kernel_args.prefix = args.prefix;
  kernel_args.tiles = int(slots_of(args, held_length, Shape::kRows));
  kernel_args.rows = args.batch * held_heads;
  kernel_args.heads = held_heads;
  kernel_args.group = kOfKeys ? args.key_group : args.query_group;
  kernel_args.factor = args.softmax_scale * kLog2E;
  kernel_args.softmax_scale = args.softmax_scale;
  const int64_t tiles = int64_t(kernel_args.tiles) * kernel_args.rows;
  if (tiles > INT32_MAX || int64_t(kernel_args.group) * kernel_args.tiles > INT32_MAX) return cudaErrorNotSupported;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min<int64_t>(int64_t(processors) * Shape::kBlocks, tiles)));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = Shape::kInRow && kOfKeys ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, kernel_args);
}

template <typename OfQueries, typename OfKeys>
cudaError_t launch_tiles(const AttentionBackwardArgs& args, DType dtype, int processors, cudaStream_t stream) {
  static_assert(OfKeys::kPassed <= 112 && OfQueries::kTable == OfKeys::kTable);
  // Slots are no more than rows and images, so that these are numbers of 32 bits.
  Planned of_queries{}, of_keys{};
  cudaError_t error = cudaSuccess;
  if constexpr (OfQueries::kTable) {
    int4* plan = args.plan;
    int64_t entries = 0;
    const auto describe = [&](const int* table, int ranges, int length, int rows, int entry) {
      const int64_t slots = slots_of(args, length, rows);
      const Planned planned{table,       args.offsets, plan,       args.queries,    args.keys,
                            args.images, ranges,       int(slots), OfKeys::kPassed};
      plan += slots * ranges * entry;
      entries += slots * ranges;
      return planned;
    };
    of_queries = describe(args.sees, args.ranges, args.queries, OfQueries::kRows, OfQueries::kEntry);
    of_keys = describe(args.seen_by, args.seen_by_ranges, args.keys, OfKeys::kRows, OfKeys::kEntry);
    if (entries > INT32_MAX / 128) return cudaErrorNotSupported;
    const PlanArgs plan_args{of_queries, of_keys, counters_of(args)};
    attention_backward_plan_sm90_kernel<typename OfQueries::Size, typename OfKeys::Size>
        <<<int((entries + 3) / 4), 128, 0, stream>>>(plan_args);
    error = cudaGetLastError();
  } else if constexpr (OfQueries::kCounted) {
    error = cudaMemsetAsync(counters_of(args), 0, 2 * sizeof(unsigned), stream);
  }
  if (error == cudaSuccess)
    error = launch_tile<OfQueries>(args, of_queries, dtype, OfKeys::kPassed, processors, stream);
  if (error != cudaSuccess) return error;
  return launch_tile<OfKeys>(args, of_keys, dtype, OfKeys::kPassed, processors, stream);
}

template <typename T, int kTables>
cudaError_t launch_backward(const AttentionBackwardArgs& args, DType dtype, bool narrow, int processors,
                            cudaStream_t stream) {
  if (args.width > 96) {
    using OfKeys = Tile<T, true, 2, 128, 80, 3, 1, kLate | kTables>;
    if constexpr (kTables != 0) {  // where limits lie in shared memory, 3 x 64 queries do not fit
      return launch_tiles<Tile<T, false, 2, 128, 96, 3, 1, kTables>, OfKeys>(args, dtype, processors, stream);
    } else {
      using OfQueries = Tile<T, false, 3, 128, 64, 4, 1, kLate>;
      using OfKeysAlone = Tile<T, true, 2, 128, 80, 3, 1, kAlone | kLate>;
      return args.share == 1 ? launch_tiles<OfQueries, OfKeysAlone>(args, dtype, processors, stream)
                             : launch_tiles<OfQueries, OfKeys>(args, dtype, processors, stream);
    }
  }
  if (args.width > 64)
    return launch_tiles<Tile<T, false, 2, 96, 96, 3, 1, kTables>, Tile<T, true, 2, 96, 80, 3, 1, kTables>>(
        args, dtype, processors, stream);
  if constexpr (kTables == 0) {
    if (narrow)
      return launch_tiles<Tile<T, false, 1, 64, 64, 4, 2, kNoLook>, Tile<T, true, 1, 64, 64, 4, 2, kLate>>(
          args, dtype, processors, stream);
  }
  return launch_tiles<Tile<T, false, 3, 64, 64, 5, 2, kNoLook | kTables>,
                      Tile<T, true, 3, 64, 64, 5, 2, kLate | kTables>>(args, dtype, processors, stream);
}

template <typename T>
cudaError_t launch_backward(const AttentionBackwardArgs& args, DType dtype, AttentionBackwardTile tile, int processors,
                            cudaStream_t stream) {
  const bool by_table = args.sees != nullptr, has_narrow = args.width <= 64 && !by_table;
  const int64_t rows = int64_t(args.batch) * args.heads;
  const bool narrow = tile == AttentionBackwardTile::kChosen
                          ? has_narrow && narrow_wins(args.queries, rows, processors) &&
                                narrow_wins(args.keys, rows / args.share, processors)
                          : tile == AttentionBackwardTile::kNarrow;
  if (narrow && !has_narrow) return cudaErrorNotSupported;
  return by_table ? launch_backward<T, kByTable>(args, dtype, narrow, processors, stream)
                  : launch_backward<T, 0>(args, dtype, narrow, processors, stream);
}

}  // namespace

cudaError_t launch_attention_backward(const AttentionBackwardArgs& args, DType dtype, AttentionBackwardTile tile,
                                      cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = count_processors(&processors);
  if (error != cudaSuccess) return error;
  switch (dtype) {
    case DType::kBFloat16:
      return launch_backward<__nv_bfloat16>(args, dtype, tile, processors, stream);
    case DType::kFloat16:
      return launch_backward<__half>(args, dtype, tile, processors, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace unifiedar
