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
namespace unifiedar {
namespace {

constexpr int kTurnsName = 1;  // of the named barriers: by these, one a warpgroup, they take turns
constexpr int kGroupName = 4;  // by these each waits for its own warps

template <typename Element, int kChannels, int kGroupCount, int kKeyCount, int kStageCount>
struct Tile {
  using T = Element;
  static constexpr int kWidth = kChannels;    // channels of the products: 64, 96 or 128
  static constexpr int kGroups = kGroupCount;  // warpgroups that calculate
  static constexpr int kKeys = kKeyCount;      // of a step
  static constexpr int kStages = kStageCount;
  static constexpr int kRows = kHeldRows * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kBoxes = (kWidth + kBox - 1) / kBox;
  static constexpr uint32_t kHeldBox = kHeldRows * 128, kHeldBytes = kBoxes * kHeldBox;
  static constexpr uint32_t kKeysBox = kKeys * 128, kKeysBytes = kBoxes * kKeysBox;
  // Registers: 65,536 in all, the kernel starts with an equal share for each thread.
  static constexpr int kFewRegisters = kGroups == 2 ? 24 : 32, kManyRegisters = kGroups == 2 ? 240 : 160;
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
  static_assert(kBytes <= 227 * 1024 && kKeys % 16 == 0 && kKeys <= 256);
};

struct KernelArgs {
  CUtensorMap q, k, v, out;
  const void* lengths;
  void* out_data;
  int64_t out_batch, out_head, out_row;  // strides, in elements
  float* lse;
  unsigned* taken;  // tiles, but for the first of each block; or null
  int queries, keys, width, heads, share, rows, group, scales, prefix;
  int tiles;     // of a head
  float factor;  // softmax_scale in base 2
  bool wide_lengths;
};

// ---- where to work ---------------------------------------------------------------------------------------------------

// First query of a tile, which may be before 0.
template <typename Shape>
__device__ __forceinline__ int begin_of(const KernelArgs& args, const Place& place) {
  return args.queries - (place.rank + 1) * Shape::kRows;
}

// Steps through the keys of a tile: up to the end of its last row, which is a query.
template <typename Shape>
__device__ __forceinline__ int steps_of(const KernelArgs& args, int begin_of_scale, int last_row) {
  return (end_of(begin_of_scale, last_row + args.keys - args.queries, args.keys) + Shape::kKeys - 1) / Shape::kKeys;
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
  const int begin_of_scale = scale_begin(args);
  Stage<Shape::kStages> keys, values;
  uint32_t held[kGroups] = {};  // tiles that each warpgroup had
  Place place;
  for (int turn = 0; place_of(args, tell_tile<Shape>(args, memory, shared, turn), &place); ++turn) {
    const int begin = begin_of<Shape>(args, place);
    const int steps = steps_of<Shape>(args, begin_of_scale, begin + Shape::kRows - 1);
    const int key_head = place.head / args.share;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int first = begin + group * kHeldRows;
      if (first <= -kHeldRows) continue;
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
    // In the order of use: the values of a step after the keys of the next.
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      if (step < steps) {
        barrier_wait(memory + Shape::kKeysEmpty + 8 * keys.at, keys.parity ^ 1);
        if (leads)
          load_keys<Shape>(args.k, memory + Shape::kKeysAt + keys.at * Shape::kKeysBytes,
                           memory + Shape::kKeysFull + 8 * keys.at, step * Shape::kKeys, key_head, place.batch);
        __syncwarp();
        keys.next();
      }
      if (step > 0) {
        barrier_wait(memory + Shape::kValuesEmpty + 8 * values.at, values.parity ^ 1);
        if (leads)
          load_keys<Shape>(args.v, memory + Shape::kValuesAt + values.at * Shape::kKeysBytes,
                           memory + Shape::kValuesFull + 8 * values.at, (step - 1) * Shape::kKeys, key_head,
                           place.batch);
        __syncwarp();
        values.next();
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
// columns (counted from the lane's first) from `limit` on are not seen.
template <bool kMasked, int kCount>
__device__ __forceinline__ void weigh(float (&score)[kCount], Rows& rows, float (&fade)[2], float factor,
                                      const int (&limit)[2]) {
  if constexpr (kMasked) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = i / 4 * 8 + i % 2, h = i / 2 % 2;
      // The product is formed first: 0 times -inf is no number.
      score[i] = column < limit[h] ? score[i] * factor : -INFINITY;
    }
  }
  float top[2] = {score[0], score[2]};
#pragma unroll
  for (int i = 0; i < kCount; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], score[i]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = quad_max(top[h]);
    top[h] = fmaxf(rows.top[h], kMasked ? top[h] : top[h] * factor);
    fade[h] = exp2_of(rows.top[h] - top[h]);
    rows.top[h] = top[h];
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
  const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int own_row = thread / 32 * 16 + lane / 4, own_column = lane % 4 * 2;
  const int begin_of_scale = scale_begin(args);
  const int offset = args.keys - args.queries;

  const auto wait_turn = [&] { named_sync(kTurnsName + group, 256); };
  const auto end_turn = [&] { named_arrive(kTurnsName + (group + 1 == kGroups ? 0 : group + 1), 256); };
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

  if (group == kGroups - 1) named_arrive(kTurnsName, 256);  // the first turn is the first group's
  Stage<Shape::kStages> stage;
  Place place;
  for (int turn = 0; place_of(args, hear_tile<Shape>(memory, shared, turn), &place); ++turn) {
    const int begin = begin_of<Shape>(args, place), first = begin + group * kHeldRows;
    const int all_steps = steps_of<Shape>(args, begin_of_scale, begin + Shape::kRows - 1);
    int steps = 0;
    if (first > -kHeldRows) {
      steps = steps_of<Shape>(args, begin_of_scale, first + kHeldRows - 1);
      int end[2];
      end[0] = end[1] = end_of(begin_of_scale, max(first, 0) + offset, args.keys);
      const int whole = end[0] / kKeys;  // steps that every row sees all of
      if (whole < steps) {
        // Rows differ, or all end within a step.
        const int position[2] = {max(first + own_row, 0) + offset, max(first + own_row + 8, 0) + offset};
        ends_of(begin_of_scale, args.scales, position, args.keys, end);
      }
      end[0] -= own_column;
      end[1] -= own_column;

      const uint32_t slot = (held & 1) * kGroups + group, held_parity = held >> 1 & 1;
      const uint64_t q = describe_rows(memory + slot * Shape::kHeldBytes);
      float score[kKeys / 2], sum[kWidth / 2], fade[2];
      uint32_t weight[kKeys / 4];
      Rows rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

      barrier_wait(memory + Shape::kHeldFull + 8 * slot, held_parity);
      barrier_wait(memory + Shape::kKeysFull + 8 * stage.at, stage.parity);
      settle(score);
      products_begin();
      score_products<Shape>(score, q, keys_at(stage.at));
      products_wait<0>();
      settle(score);
      done_with(memory + Shape::kKeysEmpty + 8 * stage.at);
      free_held();
      ++held;
      if (whole > 0)
        weigh<false>(score, rows, fade, args.factor, end);
      else
        weigh<true>(score, rows, fade, args.factor, end);
      pack<T>(score, weight);
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sum[i] = 0.0f;

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
        const int limit[2] = {end[0] - step * kKeys, end[1] - step * kKeys};
        weigh<decltype(masked)::value>(score, rows, fade, args.factor, limit);
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
#pragma unroll 1
      for (; step < whole; ++step) advance(step, std::false_type{});
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

      // Results, through the place of the queries, where no warp of the group reads any more.
      const int64_t at = (int64_t(place.batch) * args.heads + place.head) * args.queries + first + own_row;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rows.weight[h] = quad_sum(rows.weight[h]);
        if (lane % 4 == 0 && first + own_row + 8 * h >= 0)
          args.lse[at + 8 * h] = (rows.top[h] + __log2f(rows.weight[h])) * kLn2;
        rows.weight[h] = 1.0f / rows.weight[h];
      }
      uint32_t word[kWidth / 4];
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sum[i] *= rows.weight[i / 2 % 2];
      pack<T>(sum, word);
      named_sync(kGroupName + group, 128);
      if (first >= 0) {
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
        write_rows(word, to, args.out_row, first, args.width);
      }
      leaving = true;
    }
#pragma unroll 1
    for (int step = steps; step < all_steps; ++step) {
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
  if (thread == 0) store_wait();
}

// Grid: as many blocks as there are multiprocessors, or tiles.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
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
  cudaError_t error = describe(&kernel_args.q, args.q, args.heads, args.queries, kHeldRows);
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
  kernel_args.tiles = (args.queries + Shape::kRows - 1) / Shape::kRows;
  kernel_args.factor = args.softmax_scale * kLog2E;
  const int64_t tiles = int64_t(kernel_args.tiles) * kernel_args.rows;
  if (tiles > INT32_MAX || int64_t(args.group) * kernel_args.tiles > INT32_MAX) return cudaErrorNotSupported;
  if (tiles > processors && args.taken != nullptr) {
    kernel_args.taken = args.taken;
    error = cudaMemsetAsync(args.taken, 0, sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = attention_forward_sm90_kernel<Shape>;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Shape::kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<int(std::min<int64_t>(processors, tiles)), Shape::kThreads, Shape::kBytes, stream>>>(kernel_args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_forward(const AttentionArgs& args, DType dtype, AttentionTile tile, int processors,
                           cudaStream_t stream) {
  if (args.width > 96) {
    if (tile != AttentionTile::kChosen && tile != AttentionTile::kRows128Keys128) return cudaErrorNotSupported;
    return launch_tile<Tile<T, 128, 2, 128, 2>>(args, dtype, processors, stream);
  }
  if (args.width > 64) {
    if (tile != AttentionTile::kChosen && tile != AttentionTile::kRows128Keys128) return cudaErrorNotSupported;
    return launch_tile<Tile<T, 96, 2, 128, 2>>(args, dtype, processors, stream);
  }
  if (tile == AttentionTile::kChosen)
    tile = args.queries <= 256 && args.keys < 1024 ? AttentionTile::kRows128Keys144 : AttentionTile::kRows192Keys112;
  switch (tile) {
    case AttentionTile::kRows192Keys112:
      return launch_tile<Tile<T, 64, 3, 112, 4>>(args, dtype, processors, stream);
    case AttentionTile::kRows128Keys144:
      return launch_tile<Tile<T, 64, 2, 144, 4>>(args, dtype, processors, stream);
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
