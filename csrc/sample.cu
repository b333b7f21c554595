// One code from each row of logits, a block a row. Nothing is sorted and no cut is looked for.
//
// The race comes first. Whoever wins it among all entries is the code, if the cuts keep it, and whether they do is two
// sums: top-k keeps it if fewer than k scores are larger, top-p if the mass of those before it is below the goal. If they
// do not, nor do they keep any entry that is no larger, and the race is run again among the others: 1 + ln(1 / kept mass)
// times on average. The goal is a share of what top-k keeps, whose mass a histogram of the scores gives up to the one bin
// with the k-th in it.
//
// All of this is in float32 with fast exponentials, of which a bound of the error is known: the race leaves one or a few
// entries that may have won, and these are compared exactly; a mass within kSlack of the goal decides nothing. Then the
// row is done again by the definition's numbers (`exact`): the k-th by its digits, weights by float64 exponentials rounded
// once, masses as integers. So codes are those of unifiedar/ops/sample.py, whatever the scores are.
#include "sample.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "device/fast.cuh"

#include "depth_draw.cuh"

namespace unifiedar {
namespace {

constexpr int kOwn = 16;        // entries that a thread looks at together
constexpr int kRivals = 32;     // entries that may have won the race
constexpr float kSlack = 0x1p-12f;  // of the mass of all that may be kept: more than float32 sums are off by
constexpr float kNear = 1 - 0x1p-12f;  // of the best speed: more than two speeds together are off by
constexpr float kApart = 0x1p-20f;     // scores that are further apart have different weights
constexpr float kReach = 64;           // scores so far below the largest are in the histogram's last bin
constexpr float kUnclear = __builtin_huge_valf();  // a speed that only `exact` can tell

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__float2half_rn(value));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(__float2bfloat16_rn(value));
  else
    return value;
}
__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// Four entries from `at` on, `other` in place of those beyond the row's end.
template <typename T>
__device__ __forceinline__ void load_four(float* to, const T* row, int at, int end, bool packed, float other) {
  struct alignas(4 * sizeof(T)) Four {
    T entry[4];
  };
  if (packed && at < end) {
    const Four four = *reinterpret_cast<const Four*>(row + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = widened(four.entry[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = at + i < end ? widened(row[at + i]) : other;
  }
}

template <int kThreads>
struct Shared {
  static constexpr int kWarps = kThreads / 32, kBins = 4 * kThreads;
  alignas(16) uint32_t bins[kBins];
  Word told[10][kWarps];
  float2 rivals[kRivals];  // score and noise
  int places[kRivals];
  uint32_t count;
  int bin, bits;
  uint32_t before;
};

// A block at one row. kHeld: the row is in registers, an entry a place; else it is read again at every look.
template <typename T, int kThreads, bool kHeld>
struct Sampler {
  static constexpr int kWarps = kThreads / 32, kBins = 4 * kThreads;
  using Memory = Shared<kThreads>;
  const SampleArgs& args;
  Memory& shared;
  const T *own, *other;
  const float* noise;
  float strength;
  bool packed, packed_noise;
  float score[kOwn], rest[kOwn];  // rest: noise
  int begin = 0;                  // of the entries held

  __device__ __forceinline__ Sampler(const SampleArgs& args, Memory& shared, int64_t row)
      : args(args), shared(shared), own(static_cast<const T*>(args.logits) + row * args.logits_row) {
    other = own + args.rows * args.logits_row;
    noise = args.noise + row * args.noise_row;
    strength = args.guidance_rows ? args.guidance_rows[row / args.inner] : args.guidance;
    const auto even = [&](const void* at, size_t size) {
      return args.vocabulary % 4 == 0 && reinterpret_cast<uintptr_t>(at) % (4 * size) == 0;
    };
    packed = even(own, sizeof(T)) && (!args.guided || even(other, sizeof(T)));
    packed_noise = !args.greedy && even(noise, sizeof(float));
  }

  __device__ __forceinline__ int place(int e) const { return begin + (e / 4 * kThreads + int(threadIdx.x)) * 4 + e % 4; }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < kOwn; j += 4) load_four(score + j, own, place(j), args.vocabulary, packed, -__builtin_huge_valf());
    if (args.guided) {
      float base[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; j += 4) load_four(base + j, other, place(j), args.vocabulary, packed, 0.f);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        const float part = rounded<T>(__fmul_rn(rounded<T>(__fsub_rn(score[e], base[e])), strength));
        score[e] = place(e) < args.vocabulary ? rounded<T>(__fadd_rn(base[e], part)) : -__builtin_huge_valf();
      }
    }
    if (args.greedy) return;
#pragma unroll
    for (int j = 0; j < kOwn; j += 4) load_four(rest + j, noise, place(j), args.vocabulary, packed_noise, 1.f);
#pragma unroll
    for (int e = 0; e < kOwn; ++e)
      score[e] = place(e) < args.vocabulary ? __fmul_rn(score[e], args.inverse_temperature) : -__builtin_huge_valf();
  }

  // Calls use(e) for all entries, with entry e's score in score[e] and its noise in rest[e].
  template <typename Use>
  __device__ __forceinline__ void look(const Use& use) {
    if constexpr (kHeld) {
      // Else what is made of the entries is kept for the next look, in registers that nobody has.
#pragma unroll
      for (int e = 0; e < kOwn; ++e) score[e] = anew(score[e]), rest[e] = anew(rest[e]);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) use(e);
    } else {
      for (begin = 0; begin < args.vocabulary; begin += kOwn * kThreads) {
        load();
#pragma unroll
        for (int e = 0; e < kOwn; ++e) use(e);
      }
    }
  }
  // The same in little code, for who is not in registers.
  template <typename Use>
  __device__ __forceinline__ void look_small(const Use& use) {
    for (begin = 0; begin < (kHeld ? 1 : args.vocabulary); begin += kOwn * kThreads) {
      if (!kHeld) load();
#pragma unroll 4
      for (int e = 0; e < kOwn; ++e) use(e);
    }
    if (kHeld) begin = 0;
  }

  // ---- what threads tell each other: a word of each warp. Who tells anew of what was heard has waited for others since.

  enum About { kTop, kLow, kBefore, kBest, kSure, kMaybe, kLarger, kAll, kFewest, kWinner, kTold };

  __device__ __forceinline__ void tell(About what, Word value) {
    if (threadIdx.x % 32 == 0) shared.told[what][threadIdx.x / 32] = value;
  }
  __device__ __forceinline__ Word hear(About what, Word none) const {
    return int(threadIdx.x % 32) < kWarps ? shared.told[what][threadIdx.x % 32] : none;
  }
  static __device__ __forceinline__ float sum_of(float value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  }
  static __device__ __forceinline__ Word largest(Word value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value = max(value, __shfl_xor_sync(~0u, value, step));
    return value;
  }
  __device__ __forceinline__ Word sum_all(Word value) {
    const auto sum = [](Word value) {
#pragma unroll
      for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
      return value;
    };
    tell(kTop, sum(value));
    __syncthreads();
    return sum(hear(kTop, 0));
  }
  __device__ __forceinline__ Word max_all(Word value) {
    tell(kWinner, largest(value));
    __syncthreads();
    return largest(hear(kWinner, 0));
  }

  // The bin at which the sum of the bins reaches `goal`, in shared.bin, and the sum of those before it in shared.before.
  // Whoever has filled the bins has not waited since.
  __device__ __forceinline__ void find(uint32_t goal) {
    __syncthreads();
    const uint4 four = reinterpret_cast<const uint4*>(shared.bins)[threadIdx.x];
    const uint32_t own[4] = {four.x, four.y, four.z, four.w}, sum = four.x + four.y + four.z + four.w;
    uint32_t upto = sum;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint32_t left = __shfl_up_sync(~0u, upto, step);
      if (threadIdx.x % 32 >= step) upto += left;
    }
    const uint32_t whole = __shfl_sync(~0u, upto, 31);
    tell(kBefore, whole);
    __syncthreads();
    uint32_t before =
        __reduce_add_sync(~0u, threadIdx.x % 32 < threadIdx.x / 32 ? uint32_t(hear(kBefore, 0)) : 0u) + upto - sum;
    if (before < goal && before + sum >= goal) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (before < goal && before + own[i] >= goal) shared.bin = int(threadIdx.x) * 4 + i, shared.before = before;
        before += own[i];
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ void clear() { reinterpret_cast<uint4*>(shared.bins)[threadIdx.x] = uint4{}; }

  // ---- the row

  __device__ __forceinline__ int run(int k, double share) {
    const bool cuts = k > 0 && k < args.vocabulary, cuts_mass = share > 0 && share < 1;
    if (kHeld) load();
    clear();
    if (threadIdx.x == 0) shared.count = 0;
    float high = -__builtin_huge_valf(), low = __builtin_huge_valf();
    bool nan = false;
    look([&](int e) {
      high = fmaxf(high, score[e]);
      low = fminf(low, score[e]);
      nan |= !(score[e] == score[e]);
    });
    tell(kTop, Word(uint32_t(__reduce_max_sync(~0u, ordered(high)))));
    tell(kLow, Word(uint32_t(__reduce_min_sync(~0u, ordered(low)))));
    nan = __syncthreads_or(nan);
    const int top_key = __reduce_max_sync(~0u, int(uint32_t(hear(kTop, uint32_t(INT_MIN)))));
    const float top = score_of(top_key);
    low = fmaxf(score_of(__reduce_min_sync(~0u, int(uint32_t(hear(kLow, uint32_t(INT_MAX - 1)))))), top - kReach);
    if (args.greedy) {
      Word first = 0;
      look([&](int e) {
        if (nan ? !(score[e] == score[e]) : score[e] == top) first = max(first, Word(uint32_t(~place(e))));
      });
      return int(~uint32_t(max_all(first)));
    }
    if (nan || top_key <= kLeast || top_key >= kInfinite) return 0;

    // Entries whose place on the histogram is below `inner` are kept by top-k, those at `outer` or above are not.
    float factor = 0, inner = __builtin_huge_valf(), outer = inner;
    const bool histogram = cuts && cuts_mass;
    if (histogram) {
      factor = top > low ? (kBins - 1) / (top - low) : 0;
      if (!(factor <= 1e30f)) factor = 0;
      look([&](int e) { atomicAdd(shared.bins + int(fminf((top - score[e]) * factor, float(kBins - 1))), 1u); });
      find(uint32_t(k));
      inner = float(shared.bin);
      if (shared.bin < kBins - 1) outer = inner + 1;
    }

    float limit = -__builtin_huge_valf();  // entries that are no larger are known not to be kept
    float inside = 0, outside = 0;         // who has less mass before it is kept by top-p, who has more is not
    for (bool again = false;; again = true) {
      float best = 0, sure = 0, maybe = 0;
      look([&](int e) {
        const float distance = score[e] - top, weight = weight_at(distance), at = -distance * factor;
        if (histogram ? at < outer : true) {
          maybe += weight;
          if (at < inner) sure += weight;
          if (score[e] > limit) best = fmaxf(best, speed(weight, rest[e]));
        }
      });
      const uint32_t best_bits = __reduce_max_sync(~0u, __float_as_uint(best));
      tell(kBest, best_bits);
      if (cuts_mass && !again) {
        tell(kSure, __float_as_uint(sum_of(sure)));
        tell(kMaybe, __float_as_uint(sum_of(maybe)));
      }
      __syncthreads();
      const float fastest = __uint_as_float(__reduce_max_sync(~0u, uint32_t(hear(kBest, 0))));
      if (cuts_mass && !again) {
        const float most = sum_of(__uint_as_float(uint32_t(hear(kMaybe, 0))));
        const float least = histogram ? sum_of(__uint_as_float(uint32_t(hear(kSure, 0)))) : most;
        inside = float(share) * least - 2 * kSlack * most;
        outside = float(share) * most + 2 * kSlack * most;
      }
      if (!(fastest > 0x1p-60f && fastest < kUnclear)) break;

      if (best >= fastest * kNear)  // hardly a thread
        look([&](int e) {
          const float distance = score[e] - top;
          if ((histogram && !(-distance * factor < outer)) || !(score[e] > limit)) return;
          if (speed(weight_at(distance), rest[e]) < fastest * kNear) return;
          const uint32_t at = atomicAdd(&shared.count, 1u);
          if (at < kRivals) shared.rivals[at] = {score[e], rest[e]}, shared.places[at] = place(e);
        });
      __syncthreads();
      const int rivals = int(shared.count);
      if (rivals == 0 || rivals > kRivals) break;
      float2 winner = shared.rivals[0];
      int code = shared.places[0];
      if (rivals > 1 || winner.x - top < -80) {
        const int lane = threadIdx.x % 32;
        const Row row(nullptr, {}, args.vocabulary, top);
        Word fate = 0;
        if (lane < rivals) fate = racer(row.weight(ordered(shared.rivals[lane].x)), shared.rivals[lane].y, shared.places[lane]);
        fate = largest(fate);
        if (fate == 0) break;
        code = int(~uint32_t(fate));
        uint32_t holder = 0;
        if (lane < rivals && shared.places[lane] == code) holder = lane;
        winner = shared.rivals[__reduce_max_sync(~0u, holder)];
      }
      if (!cuts && !cuts_mass) return code;

      // Whether it is kept.
      const float from = winner.x - kApart, beyond = winner.x + 2 * kApart;
      uint32_t larger = 0;
      float fewest = 0, all = 0;  // of the mass before it
      look([&](int e) {
        larger += score[e] > winner.x;
        const float weight = weight_at(score[e] - top);
        if (score[e] >= from) all += weight;
        if (score[e] > beyond) fewest += weight;
      });
      tell(kLarger, __reduce_add_sync(~0u, larger));
      if (cuts_mass) {
        tell(kAll, __float_as_uint(sum_of(all)));
        tell(kFewest, __float_as_uint(sum_of(fewest)));
      }
      __syncthreads();
      if (threadIdx.x == 0) shared.count = 0;  // all have read it, and wait before they count again
      larger = __reduce_add_sync(~0u, uint32_t(hear(kLarger, 0)));
      if (cuts_mass) {
        all = sum_of(__uint_as_float(uint32_t(hear(kAll, 0))));
        fewest = sum_of(__uint_as_float(uint32_t(hear(kFewest, 0))));
      }
      bool kept = !cuts || larger < uint32_t(k);
      if (kept && cuts_mass) {
        if (all - weight_at(winner.x - top) < inside) return code;
        if (fewest < outside) break;
        kept = false;
      }
      if (kept) return code;
      limit = winner.x;
    }
    Sampler copy(*this);  // whose address is known, so that this one stays in registers
    return copy.exact(cuts ? k : 0, cuts_mass ? share : 0, top);
  }

  // exp(score - top), about, from their difference.
  static __device__ __forceinline__ float weight_at(float distance) { return fast_exp2(distance * 1.442695041f); }

  // weight / noise, about; the largest where that is not known.
  static __device__ __forceinline__ float speed(float weight, float noise) {
    constexpr uint32_t kLeast = 27u << 23, kMost = 227u << 23;  // 2^-100 and 2^100
    return __float_as_uint(noise) - kLeast < kMost - kLeast ? weight * fast_inverse(noise) : kUnclear;
  }

  // By the definition's numbers: k and share are 0 where there is no such cut.
  __device__ __noinline__ int exact(int k, double share, float top) {
    const Row row(nullptr, {nullptr, 0, k, share}, args.vocabulary, top);
    int least = kLeast;
    if (k > 0) {
      constexpr int kDigit = 31 - __builtin_clz(kBins);
      uint32_t prefix = 0, left = k;
      for (int shift = 32; shift > 0;) {
        const int width = min(kDigit, shift), end = shift;
        shift -= width;
        __syncthreads();
        clear();
        __syncthreads();
        look_small([&](int e) {
          const uint32_t key = uint32_t(ordered(score[e])) ^ 0x80000000u;
          if (end == 32 || key >> end == prefix) atomicAdd(shared.bins + ((1u << width) - 1 - (key >> shift & ((1u << width) - 1))), 1u);
        });
        find(left);
        left -= shared.before;
        prefix = prefix << width | ((1u << width) - 1 - uint32_t(shared.bin));
      }
      least = int(prefix ^ 0x80000000u);
    }
    if (kHeld) look_small([&](int e) { score[e] = __int_as_float(weight_of(row, score[e], least)); });
    // A weight's bits are an integer of the same order.
    const auto bits_of = [&](int e) { return kHeld ? __float_as_int(score[e]) : weight_of(row, score[e], least); };
    Word goal = 0;
    if (share > 0) {
      Word total = 0;
      look_small([&](int e) { total += row.mass(bits_of(e)); });
      goal = row.goal(sum_all(total));
    }
    // Who may win: entries of more than `bits`, and those of `bits` before entry `end`.
    int bits = 0, end = 0;
    while (true) {
      Word best = kNobody;
      look_small([&](int e) {
        const int mine = bits_of(e);
        if (mine > bits || (mine == bits && place(e) < end)) best = max(best, racer(mine, rest[e], place(e)));
      });
      best = max_all(best);
      const int code = int(~uint32_t(best));
      if (share <= 0 || best == kNobody) return code;
      look_small([&](int e) {
        if (place(e) == code) shared.bits = bits_of(e);
      });
      __syncthreads();
      bits = shared.bits;
      end = code;
      Word before = 0;
      look_small([&](int e) {
        const int mine = bits_of(e);
        if (mine > bits || (mine == bits && place(e) < end)) before += row.mass(mine);
      });
      if (sum_all(before) < goal) return code;
    }
  }
  static __device__ __forceinline__ int weight_of(const Row& row, float score, int least) {
    const int key = ordered(score);
    return key >= least ? row.weight(key) : 0;
  }
};

template <typename T, int kThreads, bool kHeld>
__global__ void __launch_bounds__(kThreads, kHeld ? 1024 / kThreads : 1) sample_codes_kernel(const __grid_constant__ SampleArgs args) {
  __shared__ Shared<kThreads> shared;
  const int64_t row = blockIdx.x, group = row / args.inner;
  int64_t k = args.top_k_rows ? args.top_k_rows[group] : args.top_k;
  k = k > 0 && k < args.vocabulary ? k : 0;
  double share = args.top_p;
  if (args.top_p_rows)
    share = args.wide_top_p ? static_cast<const double*>(args.top_p_rows)[group]
                            : double(static_cast<const float*>(args.top_p_rows)[group]);
  Sampler<T, kThreads, kHeld> sampler(args, shared, row);
  const int code = sampler.run(int(k), share);
  if (threadIdx.x == 0) args.out[row] = code;
}

template <typename T>
cudaError_t launch_rows(const SampleArgs& args, cudaStream_t stream) {
  const unsigned blocks = unsigned(args.rows);
  if (args.vocabulary <= 256 * kOwn) {
    sample_codes_kernel<T, 256, true><<<blocks, 256, 0, stream>>>(args);
  } else if (args.vocabulary <= 512 * kOwn) {
    sample_codes_kernel<T, 512, true><<<blocks, 512, 0, stream>>>(args);
  } else if (args.vocabulary <= 1024 * kOwn) {
    sample_codes_kernel<T, 1024, true><<<blocks, 1024, 0, stream>>>(args);
  } else {
    sample_codes_kernel<T, 512, false><<<blocks, 512, 0, stream>>>(args);
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
