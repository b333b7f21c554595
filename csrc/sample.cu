// One code from each row of logits, a block a row. Nothing is sorted.
//
// The race comes first. Whoever wins it is the code, if the cuts keep it, and whether they do is two sums: top-k keeps it
// if fewer than k scores are larger, top-p if the mass of those before it is below the goal. If they do not, nor do they
// keep any entry after it, and the race is run again among those before: 1 + ln(1 / kept mass) times on average. The goal is
// a share of what top-k keeps, whose mass a histogram of the scores gives up to the one bin with the k-th in it; where both
// cuts are on, the entries down to that bin become a list, and the rest of the row is done with.
//
// All of this is in float32 with fast exponentials, of which a bound of the error is known: the race leaves one or a few
// entries that may have won, and these are compared exactly; a mass within kSlack of the goal decides nothing. Then the
// row is done again by the definition's numbers (`exact`): the k-th by its digits, weights by float64 exponentials rounded
// once, masses as integers. So codes are those of unifiedar/ops/sample.py, whatever the scores are.
#include "sample.h"

#include <climits>

#include "device/fast.cuh"
#include "device/score.cuh"
#include "device/wide.cuh"

namespace unifiedar {
namespace {

constexpr int kRivals = 32;  // entries that may have won the race
// Sums of weights are off by less than 2^-17 of all there are where a thread adds 16, by 2^-15 where it adds 512.
constexpr float kSlack = 0x1p-15f, kWideSlack = 0x1p-13f;
constexpr float kNear = 1 - 0x1p-13f;  // of the best speed: more than two speeds together are off by
constexpr float kApart = 0x1p-22f;     // scores that are further apart have different weights
constexpr float kReach = 64;           // scores so far below the largest are in the histogram's last bin
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kUnclear = kInfinity;  // a speed that only `exact` can tell

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return wide(narrow<T>(value));
}

// Four entries from `at` on, `other` in place of those beyond the row's end.
template <typename T>
__device__ __forceinline__ void load_four(float* to, const T* row, int at, int end, bool packed, float other) {
  if (packed && at < end) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(row + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = wide(four.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = at + i < end ? wide(row[at + i]) : other;
  }
}

// What threads of a block tell each other, a word of each warp. Who tells anew of what was heard has waited since.
enum About { kTop, kLow, kBefore, kBest, kSure, kMaybe, kLarger, kAll, kFewest, kEarlier, kClose, kWinner, kTold };

template <int kThreads, int kListed_>
struct Block {
  static constexpr int kWarps = kThreads / 32, kBins = 4 * kThreads, kListed = kListed_;
  alignas(16) uint32_t bins[kBins];
  Word told[kTold][kWarps];
  float2 rivals[kRivals], list[kListed];  // score and noise
  int rival_places[kRivals], list_places[kListed];
  uint32_t count, before, room;
  int bin, bits;

  __device__ __forceinline__ void tell(About what, Word value) {
    if (threadIdx.x % 32 == 0) told[what][threadIdx.x / 32] = value;
  }
  __device__ __forceinline__ Word hear(About what, Word none) const {
    return int(threadIdx.x % 32) < kWarps ? told[what][threadIdx.x % 32] : none;
  }
  static __device__ __forceinline__ float sum_of(float value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  }
  static __device__ __forceinline__ Word sum_of(Word value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  }
  static __device__ __forceinline__ Word largest(Word value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value = max(value, __shfl_xor_sync(~0u, value, step));
    return value;
  }
  __device__ __forceinline__ void tell_sum(About what, float value) { tell(what, __float_as_uint(sum_of(value))); }
  __device__ __forceinline__ float hear_sum(About what) const { return sum_of(__uint_as_float(uint32_t(hear(what, 0)))); }
  __device__ __forceinline__ void tell_count(About what, uint32_t value) { tell(what, __reduce_add_sync(~0u, value)); }
  __device__ __forceinline__ uint32_t hear_count(About what) const {
    return __reduce_add_sync(~0u, uint32_t(hear(what, 0)));
  }
  __device__ __forceinline__ Word sum_all(Word value) {
    tell(kTop, sum_of(value));
    __syncthreads();
    return sum_of(hear(kTop, 0));
  }
  __device__ __forceinline__ Word max_all(Word value) {
    tell(kWinner, largest(value));
    __syncthreads();
    return largest(hear(kWinner, 0));
  }

  // The sum of `value` over the lanes up to this one.
  static __device__ __forceinline__ uint32_t sum_up(uint32_t value) {
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint32_t left = __shfl_up_sync(~0u, value, step);
      if (threadIdx.x % 32 >= step) value += left;
    }
    return value;
  }

  __device__ __forceinline__ void clear() { reinterpret_cast<uint4*>(bins)[threadIdx.x] = uint4{}; }

  // The bin at which the sum of the bins reaches `goal`, in `bin`, and the sum of those before it in `before`. Whoever has
  // filled the bins has not waited since.
  __device__ __forceinline__ void find(uint32_t goal) {
    __syncthreads();
    const uint4 four = reinterpret_cast<const uint4*>(bins)[threadIdx.x];
    const uint32_t own[4] = {four.x, four.y, four.z, four.w}, sum = four.x + four.y + four.z + four.w;
    const uint32_t upto = sum_up(sum);
    tell(kBefore, __shfl_sync(~0u, upto, 31));
    __syncthreads();
    const bool earlier = threadIdx.x % 32 < threadIdx.x / 32;  // whether the warp of this lane's number is
    uint32_t above = __reduce_add_sync(~0u, earlier ? uint32_t(hear(kBefore, 0)) : 0u) + upto - sum;
    if (above < goal && above + sum >= goal) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (above < goal && above + own[i] >= goal) bin = int(threadIdx.x) * 4 + i, before = above;
        above += own[i];
      }
    }
    __syncthreads();
  }

  // Calls use(score, noise, place) for the first `listed` of the list.
  template <int kTogether, typename Use>
  __device__ __forceinline__ void look_at_list(int listed, const Use& use) const {
#pragma unroll kTogether
    for (int i = int(threadIdx.x); i < listed; i += kThreads) use(list[i].x, list[i].y, list_places[i]);
  }

  // The draw by the definition's numbers, among what `look` looks at; k and share are 0 where there is no such cut.
  template <typename Look>
  __device__ __forceinline__ int exact(const Look& look, int k, double share, float top, int vocabulary) {
    const Weights weights(vocabulary, top);
    int least = kLeast;
    if (k > 0) {
      constexpr int kDigit = 31 - __builtin_clz(kBins);
      uint32_t prefix = 0, left = k;
      for (int shift = 32; shift > 0;) {
        const int end = shift;
        shift = max(shift - kDigit, 0);
        const uint32_t mask = (1u << (end - shift)) - 1;
        __syncthreads();
        clear();
        __syncthreads();
        look([&](float score, float, int) {
          const uint32_t key = uint32_t(ordered(score)) ^ 0x80000000u;
          if (end == 32 || key >> end == prefix) atomicAdd(bins + (mask - (key >> shift & mask)), 1u);
        });
        find(left);
        left -= before;
        prefix = prefix << (end - shift) | (mask - uint32_t(bin));
      }
      least = int(prefix ^ 0x80000000u);
    }
    // A weight's bits are an integer of the same order.
    const auto weigh = [&](float score) {
      const int key = ordered(score);
      return key >= least ? weights.weight(key) : 0;
    };
    Word goal = 0;
    if (share > 0) {
      Word total = 0;
      look([&](float score, float, int) { total += weights.mass(weigh(score)); });
      goal = Weights::goal(sum_all(total), share);
    }
    // Who may win: entries of more than `floor`, and those of `floor` before entry `end`.
    int floor = 0, end = 0;
    while (true) {
      Word best = kNobody;
      look([&](float score, float noise, int place) {
        const int mine = weigh(score);
        if (mine > floor || (mine == floor && place < end)) best = max(best, racer(mine, noise, place));
      });
      best = max_all(best);
      const int code = int(~uint32_t(best));
      if (share <= 0 || best == kNobody) return code;
      look([&](float score, float, int place) {
        if (place == code) bits = weigh(score);
      });
      __syncthreads();
      floor = bits;
      end = code;
      Word mass = 0;
      look([&](float score, float, int place) {
        const int mine = weigh(score);
        if (mine > floor || (mine == floor && place < end)) mass += weights.mass(mine);
      });
      if (sum_all(mass) < goal) return code;
    }
  }
  __device__ __noinline__ int exact_list(int listed, int k, double share, float top, int vocabulary) {
    const auto look = [&](const auto& use) { look_at_list<1>(listed, use); };
    return exact(look, k, share, top, vocabulary);
  }
};

// What a row is drawn by.
struct Cuts {
  int k;         // 0: off
  double share;  // 0: off
  float top;     // the largest score
  // Places on the histogram: entries below `inner` are kept by top-k, those at `outer` or above are not.
  float factor = 0, inner = kInfinity, outer = kInfinity;

  __device__ __forceinline__ float place(float score) const { return __fmaf_rn(top - score, factor, kShift); }
  static constexpr float kShift = 0x1p23f;  // the bits of a float above it count in ones
};

// A block at one row, whose threads look at kOwn entries together. kHeld: the row is in registers; else it is read again at
// every look.
template <typename T, int kThreads, int kOwn, bool kHeld>
struct Sampler {
  using Memory = Block<kThreads, kHeld ? 2048 : 3072>;
  static constexpr int kBins = Memory::kBins;
  const SampleArgs& args;
  Memory& block;
  const T *own, *other;
  const float* noise;
  float strength;
  bool packed, packed_noise;
  float score[kOwn], rest[kOwn];  // rest: noise
  int begin = 0;                  // of the entries held

  __device__ __forceinline__ Sampler(const SampleArgs& args, Memory& block, int64_t row)
      : args(args), block(block), own(static_cast<const T*>(args.logits) + row * args.logits_row) {
    other = own + args.rows * args.logits_row;
    noise = args.noise + row * args.noise_row;
    strength = args.guidance_rows ? args.guidance_rows[row / args.inner] : args.guidance;
    const auto even = [&](const void* at, size_t size) {
      return args.vocabulary % 4 == 0 && reinterpret_cast<uintptr_t>(at) % (4 * size) == 0;
    };
    packed = even(own, sizeof(T)) && (!args.guided || even(other, sizeof(T)));
    packed_noise = even(noise, sizeof(float));
  }

  __device__ __forceinline__ int place(int e) const { return begin + (e / 4 * kThreads + int(threadIdx.x)) * 4 + e % 4; }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < kOwn; j += 4) load_four(score + j, own, place(j), args.vocabulary, packed, -kInfinity);
    if (args.guided) {
      float base[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; j += 4) load_four(base + j, other, place(j), args.vocabulary, packed, 0.f);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        const float part = rounded<T>(__fmul_rn(rounded<T>(__fsub_rn(score[e], base[e])), strength));
        score[e] = place(e) < args.vocabulary ? rounded<T>(__fadd_rn(base[e], part)) : -kInfinity;
      }
    }
#pragma unroll
    for (int j = 0; j < kOwn; j += 4) load_four(rest + j, noise, place(j), args.vocabulary, packed_noise, 1.f);
    const int first = anew(place(0));
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const bool present = first + e / 4 * kThreads * 4 + e % 4 < args.vocabulary;
      score[e] = present ? __fmul_rn(score[e], args.inverse_temperature) : -kInfinity;
    }
  }

  // Calls use(score, noise, place) for all entries.
  template <typename Use>
  __device__ __forceinline__ void look(const Use& use) {
    if constexpr (kHeld) {
      // Else what is made of the entries is kept for the next look, in registers that nobody has.
#pragma unroll
      for (int e = 0; e < kOwn; ++e) score[e] = anew(score[e]), rest[e] = anew(rest[e]);
      const int first = anew(place(0));
#pragma unroll
      for (int e = 0; e < kOwn; ++e) use(score[e], rest[e], first + e / 4 * kThreads * 4 + e % 4);
    } else {
      for (begin = 0; begin < args.vocabulary; begin += kOwn * kThreads) {
        load();
#pragma unroll
        for (int e = 0; e < kOwn; ++e) use(score[e], rest[e], place(e));
      }
    }
  }
  // By who is not in registers, and in little code.
  __device__ __noinline__ int exact_row(int k, double share, float top) {
    return block.exact(
        [&](const auto& use) {
          for (begin = 0; begin < (kHeld ? 1 : args.vocabulary); begin += kOwn * kThreads) {
            if (!kHeld) load();
#pragma unroll 1
            for (int e = 0; e < kOwn; ++e) use(score[e], rest[e], place(e));
          }
          if (kHeld) begin = 0;
        },
        k, share, top, args.vocabulary);
  }

  __device__ __forceinline__ int run(int k, double share) {
    if (kHeld) load();
    block.clear();
    if (threadIdx.x == 0) block.count = 0, block.room = 0;
    float high = -kInfinity, low = kInfinity;
    bool nan = false;
    look([&](float score, float, int) {
      high = fmaxf(high, score);
      low = fminf(low, score);
      nan |= !(score == score);
    });
    block.tell(kTop, Word(uint32_t(__reduce_max_sync(~0u, ordered(high)))));
    block.tell(kLow, Word(uint32_t(__reduce_min_sync(~0u, ordered(low)))));
    nan = __syncthreads_or(nan);
    const int top_key = __reduce_max_sync(~0u, int(uint32_t(block.hear(kTop, uint32_t(INT_MIN)))));
    const float top = score_of(top_key);
    low = score_of(__reduce_min_sync(~0u, int(uint32_t(block.hear(kLow, uint32_t(INT_MAX - 1))))));
    if (nan || top_key <= kLeast || top_key >= kInfinite) return 0;

    Cuts cuts{k, share, top};
    int listed = 0;
    if (k > 0 && share > 0) {
      low = fmaxf(low, top - kReach);
      cuts.factor = top > low ? (kBins - 1) / (top - low) : 0;
      if (!(cuts.factor <= 1e30f)) cuts.factor = 0;
      look([&](float score, float, int) {
        const float place = fminf(cuts.place(score), cuts.kShift + float(kBins - 1));
        atomicAdd(block.bins + (__float_as_int(place) - __float_as_int(cuts.kShift)), 1u);
      });
      block.find(uint32_t(k));
      cuts.inner = cuts.kShift + float(block.bin);
      if (block.bin < kBins - 1) cuts.outer = cuts.inner + 1;
      const uint32_t all = block.before + block.bins[block.bin];
      if (all <= uint32_t(block.kListed) && cuts.outer < kInfinity) {
        // A thread's entries lie together, a warp's after those of whichever warp came before.
        listed = int(all);
        if constexpr (kHeld) {
          put(cuts);
        } else {
          for (begin = 0; begin < args.vocabulary; begin += kOwn * kThreads) {
            load();
            put(cuts);
          }
        }
        __syncthreads();
      }
    }
    int code;
    if (listed > 0) {
      code = decide<true>(cuts, [&](const auto& use) { block.template look_at_list<4>(listed, use); });
      return code >= 0 ? code : block.exact_list(listed, k, share, top, args.vocabulary);
    }
    code = decide<false>(cuts, [&](const auto& use) { look(use); });
    if (code >= 0) return code;
    Sampler copy(*this);  // whose address is known, so that this one stays in registers
    return copy.exact_row(k, share, top);
  }

  // Puts the entries held that are below `outer` on the list.
  __device__ __forceinline__ void put(const Cuts& cuts) {
    uint32_t mine = 0;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) mine += cuts.place(score[e]) < cuts.outer;
    const uint32_t upto = block.sum_up(mine);
    uint32_t at = 0;
    if (threadIdx.x % 32 == 31) at = atomicAdd(&block.room, upto);
    at = __shfl_sync(~0u, at, 31) + upto - mine;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      if (!(cuts.place(score[e]) < cuts.outer)) continue;
      block.list[at] = {score[e], rest[e]};
      block.list_places[at] = place(e);
      ++at;
    }
  }

  // The code, or -1 where only `exact` can tell.
  template <bool kList, typename Look>
  __device__ __forceinline__ int decide(const Cuts& cuts, const Look& look) {
    const float top = cuts.top;
    // Entries that are no larger, or are equal and no earlier, are known not to be kept.
    float limit = -kInfinity;
    int limit_place = -1;
    const auto runs = [&](float score, int place) {
      return (kList || cuts.place(score) < cuts.outer) && (score > limit || (score == limit && place < limit_place));
    };
    float inside = 0, outside = 0;  // who has less mass before it is kept by top-p, who has more is not
    for (bool again = false;; again = true) {
      float best = 0, sure = 0, maybe = 0;
      look([&](float score, float noise, int place) {
        const float weight = weight_at(score - top), at = cuts.place(score);
        if (at < cuts.inner) sure += weight;
        if (kList || at < cuts.outer) maybe += weight;
        if (runs(score, place)) best = fmaxf(best, speed(weight, noise));
      });
      block.tell(kBest, __reduce_max_sync(~0u, __float_as_uint(best)));
      if (cuts.share > 0 && !again) block.tell_sum(kSure, sure), block.tell_sum(kMaybe, maybe);
      __syncthreads();
      const float fastest = __uint_as_float(__reduce_max_sync(~0u, uint32_t(block.hear(kBest, 0))));
      if (cuts.share > 0 && !again) {
        const float slack = kHeld || kList ? kSlack : kWideSlack;
        const float least = block.hear_sum(kSure), most = block.hear_sum(kMaybe), share = float(cuts.share);
        inside = share * least - slack * most;
        outside = share * most + slack * most;
      }
      if (!(fastest > 0x1p-60f && fastest < kUnclear)) return -1;

      if (best >= fastest * kNear)  // hardly a thread
        look([&](float score, float noise, int place) {
          if (!runs(score, place) || speed(weight_at(score - top), noise) < fastest * kNear) return;
          const uint32_t at = atomicAdd(&block.count, 1u);
          if (at < kRivals) block.rivals[at] = {score, noise}, block.rival_places[at] = place;
        });
      __syncthreads();
      const int rivals = int(block.count);
      if (rivals == 0 || rivals > kRivals) return -1;
      float winner = block.rivals[0].x;
      int code = block.rival_places[0];
      if (rivals > 1 || winner - top < -80) {
        const int lane = int(threadIdx.x) % 32;
        const Weights weights(args.vocabulary, top);
        Word fate = 0;
        if (lane < rivals)
          fate = racer(weights.weight(ordered(block.rivals[lane].x)), block.rivals[lane].y, block.rival_places[lane]);
        fate = block.largest(fate);
        if (fate == 0) return -1;
        code = int(~uint32_t(fate));
        winner = block.rivals[__reduce_max_sync(~0u, lane < rivals && block.rival_places[lane] == code ? lane : 0)].x;
      }
      if (cuts.k == 0 && cuts.share == 0) return code;

      // Whether it is kept.
      const float from = winner - kApart, beyond = winner + 2 * kApart;
      uint32_t larger = 0;
      float fewest = 0, all = 0;  // of the mass before it
      look([&](float score, float, int) {
        larger += score > winner;
        const float weight = weight_at(score - top);
        if (score >= from) all += weight;
        if (score > beyond) fewest += weight;
      });
      block.tell_count(kLarger, larger);
      if (cuts.share > 0) block.tell_sum(kAll, all), block.tell_sum(kFewest, fewest);
      __syncthreads();
      if (threadIdx.x == 0) block.count = 0;  // all have read it, and wait before they count again
      bool kept = cuts.k == 0 || block.hear_count(kLarger) < uint32_t(cuts.k);
      limit_place = -1;
      if (kept && cuts.share > 0) {
        const float weight = weight_at(winner - top);
        all = block.hear_sum(kAll);
        fewest = block.hear_sum(kFewest);
        if (all - weight < inside) return code;
        if (!(fewest > outside)) {
          // About at the goal, or one of many equal ones.
          float above = 0;
          uint32_t earlier = 0, close = 0;
          look([&](float score, float, int place) {
            if (score > winner) above += weight_at(score - top);
            earlier += score == winner && place < code;
            close += score != winner && score >= from && score <= beyond;
          });
          block.tell_sum(kSure, above);
          block.tell_count(kEarlier, earlier);
          block.tell_count(kClose, close);
          __syncthreads();
          above = block.hear_sum(kSure) + float(block.hear_count(kEarlier)) * weight;
          if (block.hear_count(kClose) > 0) return -1;
          if (above < inside) return code;
          if (!(above > outside)) return -1;
          limit_place = code;
        }
        kept = false;
      }
      if (kept) return code;
      limit = winner;
    }
  }

  // exp(score - top), about, from their difference.
  static __device__ __forceinline__ float weight_at(float distance) { return fast_exp2(distance * 1.442695041f); }

  // weight / noise, about; the largest where that is not known.
  static __device__ __forceinline__ float speed(float weight, float noise) {
    constexpr uint32_t kSlowest = 27u << 23, kFastest = 227u << 23;  // 2^-100 and 2^100
    return __float_as_uint(noise) - kSlowest < kFastest - kSlowest ? weight * fast_inverse(noise) : kUnclear;
  }
};

template <typename T, int kThreads, int kOwn, bool kHeld, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sample_codes_kernel(const __grid_constant__ SampleArgs args) {
  __shared__ typename Sampler<T, kThreads, kOwn, kHeld>::Memory block;
  const int64_t row = blockIdx.x, group = row / args.inner;
  int64_t k = args.top_k_rows ? args.top_k_rows[group] : args.top_k;
  k = k > 0 && k < args.vocabulary ? k : 0;
  double share = args.top_p;
  if (args.top_p_rows)
    share = args.wide_top_p ? static_cast<const double*>(args.top_p_rows)[group]
                            : double(static_cast<const float*>(args.top_p_rows)[group]);
  Sampler<T, kThreads, kOwn, kHeld> sampler(args, block, row);
  const int code = sampler.run(int(k), share > 0 && share < 1 ? share : 0);
  if (threadIdx.x == 0) args.out[row] = code;
}

template <typename T>
cudaError_t launch_rows(const SampleArgs& args, cudaStream_t stream) {
  const unsigned blocks = unsigned(args.rows);
  if (args.vocabulary <= 4096) {
    sample_codes_kernel<T, 512, 8, true, 3><<<blocks, 512, 0, stream>>>(args);
  } else if (args.vocabulary <= 8192) {
    sample_codes_kernel<T, 512, 16, true, 2><<<blocks, 512, 0, stream>>>(args);
  } else if (args.vocabulary <= 16384) {
    sample_codes_kernel<T, 1024, 16, true, 1><<<blocks, 1024, 0, stream>>>(args);
  } else {
    sample_codes_kernel<T, 512, 16, false, 1><<<blocks, 512, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sample_codes(const SampleArgs& args, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_rows<float>(args, stream);
    case DType::kBFloat16:
      return launch_rows<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_rows<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace unifiedar
