"""The kernel of depth decoding on the host, thread by thread: its indices, its waits and its arithmetic."""

import ctypes
from dataclasses import replace

import pytest
import torch
from depth_small import drawn_from, small_case
from host_cuda import DRAW, compile_on_host

from unifiedar.ops.depth import depth_pack

# In place of csrc/depth_device.cuh: a warp's product is computed from what its lanes hold, by its definition in the PTX
# ISA; all blocks are on the device at the same time, and who goes on is drawn at random.
DEVICE = """
#pragma once
#include "device/cluster.cuh"
#include <cstdio>
#include <map>
#include <vector>
#define __grid_constant__
#define __host__
namespace unifiedar {
inline float element(uint32_t word, int high, __nv_bfloat16) {
  return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}
inline float element(uint32_t word, int high, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(high ? word >> 16 : word)));
}
template <typename T> void multiply_tile(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  struct Operands { uint32_t a[4], b[2]; } mine{{a.x, a.y, a.z, a.w}, {b0, b1}};
  const int lane = threadIdx.x % 32;
  exchange(reinterpret_cast<uint64_t>(&mine), false, [&](const uint64_t* all) {
    const auto of = [&](int l) { return reinterpret_cast<const Operands*>(all[l]); };
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k)
        d[i] += element(of(row % 8 * 4 + k % 8 / 2)->a[k / 8 * 2 + row / 8], k % 2, T{}) *
                element(of(column * 4 + k % 8 / 2)->b[k / 8], k % 2, T{});
    }
    return 0;
  });
}
constexpr int kThreads = 256, kWarps = 8;
inline std::map<unsigned, Barrier> own_waits;  // by block
inline void block_wait() { cluster->wait(own_waits[cluster_rank()], kThreads); }
// Stages come when they are waited for, and until then their place holds NaN.
struct Stage { const void* from; void* to; int bytes; };
struct Counted { Barrier barrier; unsigned count; };
inline std::map<void*, Stage> coming;
inline std::map<void*, Counted> counted;
inline void stage_barriers(void* full, void* empty, int users) {
  coming.erase(full);
  counted[full] = {{}, 1};
  counted[empty] = {{}, unsigned(users)};
}
inline void stage_barriers_done() {}
inline void stage_arrive(void* barrier) { cluster->arrive(counted.at(barrier).barrier, counted.at(barrier).count); }
inline void stage_come(void* full) {
  const auto found = coming.find(full);
  if (found == coming.end()) return;
  std::memcpy(found->second.to, found->second.from, found->second.bytes);
  coming.erase(found);
  stage_arrive(full);
}
inline void stage_copy(void* to, const void* from, int bytes, void* full) {
  __syncwarp();
  if (threadIdx.x % 32 > 0) return;
  if (coming.count(full)) __builtin_trap();
  std::memset(to, 255, bytes);
  coming[full] = {from, to, bytes};
  if (!counted.at(full).barrier.waiting.empty()) stage_come(full);
}
inline void stage_wait(void* barrier, uint32_t parity) {
  stage_come(barrier);
  Barrier& own = counted.at(barrier).barrier;
  if (own.phase % 2 == parity) cluster->wait(own);
}
// Copies come when they are waited for, and until then their place holds NaN.
struct Copy { void* to; const void* from; };
inline std::map<unsigned, std::vector<std::vector<Copy>>> copies;  // of a thread, as they were begun
inline std::vector<std::vector<Copy>>& own_copies() {
  auto& own = copies[cluster_rank() * 1024 + threadIdx.x];
  if (own.empty()) own.emplace_back();
  return own;
}
inline void copy_early(void* to, const void* from) {
  check_aligned(static_cast<uint4*>(to));
  std::memset(to, 255, 16);
  own_copies().back().push_back({to, from});
}
inline void copies_begun() { own_copies().emplace_back(); }
inline void copies_wait(int left) {
  auto& own = own_copies();
  for (; int(own.size()) > left + 1; own.erase(own.begin()))
    for (const Copy& copy : own.front()) std::memcpy(copy.to, copy.from, 16);
}
inline void copies_wait() {
  copies_begun();
  copies_wait(0);
}
template <class Value> Value again(Value value) { return value; }
inline void fetch_ahead(const void* from) { volatile char all[2048]; std::memcpy((void*)all, from, 2048); }
// Words that others wait for: whoever found one missing looks again after the next one was posted.
inline Barrier posts;
constexpr uint32_t kAbsent = ~0u;
inline void post(void* to, uint32_t word) {
  check_aligned(static_cast<uint32_t*>(to));
  if (word == kAbsent || *static_cast<uint32_t*>(to) != kAbsent) __builtin_trap();
  *static_cast<uint32_t*>(to) = word;
  cluster->arrive(posts, 1);
}
template <class Words> Words posted(const Words* from) { return __ldg(from); }
template <class Absent, class Read> void read_until(const Absent& absent, const Read& read) {
  if (!absent()) return;
  for (read(), read(); absent(); read(), read()) cluster->wait(posts);  // read() may look at a part only
}
inline Barrier all_waits;
template <class Goal, class Meanwhile> void grid_wait(uint32_t* counter, const Goal& goal, const Meanwhile& meanwhile) {
  block_wait();
  if (threadIdx.x == 0) ++*counter;
  meanwhile();
  cluster->wait(all_waits, kThreads * gridDim.x);
  if (threadIdx.x == 0 && *counter != uint32_t(goal())) __builtin_trap();
  cluster->wait(all_waits, kThreads * gridDim.x);
}
}  // namespace unifiedar
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
#define __expf std::exp
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  check_mask(mask);
  return exchange(value, false, [](const uint64_t* all) { return unsigned(*std::max_element(all, all + 32)); });
}
inline int __popcll(unsigned long long word) { return __builtin_popcountll(word); }
inline int __ffsll(long long word) { return __builtin_ffsll(word); }
extern "C" cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline void (*call_kernel)(const void*, void**);
extern "C" cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t bytes,
                                                   cudaStream_t) {
  if (bytes > host_shared) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  Cluster one;
  one.kernel = [=] { call_kernel(kernel, args); };
  cluster = &one;
  one.run(grid.x, block.x, bytes, 0);
  cluster = nullptr;
  return cudaSuccess;
}
"""

EXPORTS = """
extern "C" void seed(unsigned value) { host_seed = value; }
extern "C" int64_t packed_elements(const int* n) {
  return unifiedar::packed_depth_decode({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7] != 0});
}
extern "C" int64_t workspace_bytes(const int* n) {
  return unifiedar::workspace_depth_decode({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7] != 0}).bytes;
}
extern "C" int decode(const int* n, void** p, const double* settings, float guidance, int64_t level, int dtype,
                      int book, int stop) {
  using namespace unifiedar;
  call_kernel = [](const void* kernel, void** args) {
    reinterpret_cast<Function>(const_cast<void*>(kernel))(*static_cast<Kernel*>(args[0]));
  };
  DepthArgs args{};
  args.sizes = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7] != 0};
  const DepthSizes& s = args.sizes;
  args.hidden = p[0], args.packed = p[1], args.codebook = p[2], args.noise = static_cast<float*>(p[3]);
  args.guidance_rows = static_cast<float*>(p[4]), args.forced = static_cast<int64_t*>(p[5]);
  args.codes = static_cast<int64_t*>(p[6]), args.total = p[7], args.logits = p[8], args.workspace = p[9];
  args.unsound = static_cast<int*>(p[10]);
  args.book_level = level, args.book_entry = s.code_dim;
  args.noise_row = int64_t(s.depth) * s.num_codes, args.noise_depth = s.num_codes;
  args.book_dtype = DType(book), args.guidance = guidance, args.stop = stop;
  for (int d = 0; d < s.depth; ++d) {
    args.inverse_temperature[d] = float(settings[d]);
    args.top_k[d] = int(settings[s.depth + d]);
    args.top_p[d] = settings[2 * s.depth + d];
  }
  return launch_depth_decode(args, DType(dtype), nullptr);
}
"""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/device/dtype.h numbers them


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_on_host(
        ["depth.cu"], EXPORTS, tmp_path_factory.mktemp("depth"), instead={"depth_device.cuh": DEVICE + DRAW}
    )


def on_host(library, case, device=0, forced=None):
    """`depth_decode` by the kernel's code."""
    weights, hidden, codebook = case.weights, case.hidden, case.codebook
    depth, dim = weights.position.shape[1:]
    num_codes, code_dim = codebook.shape[-2:]
    rows, count = len(hidden), len(case.noise)
    sizes = (rows, dim, len(weights.blocks), depth, num_codes, code_dim, hidden.shape[1] * (weights.hidden is not None))
    sizes = (ctypes.c_int * 8)(*sizes, case.guidance is not None)
    packed = depth_pack(weights)
    library.packed_elements.restype = library.workspace_bytes.restype = ctypes.c_int64
    assert library.packed_elements(sizes) == packed.numel()
    logits = torch.full((rows, depth, num_codes), torch.nan, dtype=hidden.dtype)
    codes = torch.full((count, depth), -7)
    total = torch.full((count, code_dim), torch.nan, dtype=codebook.dtype)
    workspace = torch.full((library.workspace_bytes(sizes) + 256,), 127, dtype=torch.uint8)
    rows_of = case.guidance if isinstance(case.guidance, torch.Tensor) else None
    tensors = (hidden, packed, codebook, case.noise, rows_of, forced, codes, total, logits)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    pointers.append(workspace.data_ptr() + -workspace.data_ptr() % 256)
    unsound = torch.full((count,), -9, dtype=torch.int32)
    pointers.append(unsound.data_ptr())
    temperature, top_k, top_p = case.settings
    settings = [*(1 / t if t else 0.0 for t in temperature), *top_k, *top_p]
    library.use_device(device)
    error = library.decode(
        sizes,
        (ctypes.c_void_p * 11)(*pointers),
        (ctypes.c_double * len(settings))(*settings),
        ctypes.c_float(0.0 if case.guidance is None or rows_of is not None else case.guidance),
        ctypes.c_int64(0 if codebook.ndim == 2 else codebook.stride(0)),
        DTYPES[hidden.dtype],
        DTYPES[codebook.dtype],
        -1,
    )
    assert error == 0
    return codes, total, logits, unsound


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one row"),
        pytest.param({"rows": 6, "guidance": 3.0, "dtype": torch.float16}, id="guided"),
        pytest.param({"rows": 9, "dim": 128, "projected": False, "device": 1}, id="nine rows, not projected"),
        pytest.param({"rows": 3, "projected": False, "device": 1}, id="three rows, not projected"),
        pytest.param({"rows": 18, "guidance": "rows", "dim": 64, "layers": 1, "shared": False}, id="eighteen rows"),
        pytest.param(
            {"rows": 32, "guidance": 2.0, "dim": 512, "layers": 1, "device": 2},
            id="a quarter of the states a block, thirty-two rows",
        ),
        pytest.param(
            {"rows": 18, "guidance": 2.0, "dim": 384, "layers": 1, "depth": 2}, id="rows normalised by a block each"
        ),
        pytest.param(
            {"rows": 16, "guidance": 3.0, "dim": 448, "layers": 1, "depth": 2, "num_codes": 401, "device": 2},
            id="a quarter of the states a block, sixteen rows",
        ),
        pytest.param({"layers": 0, "greedy": True}, id="greedy, no layer"),
        pytest.param(
            {"rows": 32, "guidance": 2.7, "dim": 64, "layers": 1, "num_codes": 2000, "greedy": True},
            id="greedy and guided, where rounding decides",
        ),
        pytest.param({"rows": 2, "dim": 640, "layers": 1, "depth": 2, "num_codes": 1100}, id="many chunks, many tiles"),
    ],
)
def test_kernel_on_the_host(library, options):
    options = {"dtype": torch.bfloat16} | options
    device = options.pop("device", 0)
    case = small_case(**options)
    codes, total, logits, unsound = on_host(library, case, device)
    # Through the same codes the logits are those of the definition, as near as its own rounding leaves them.
    exact = case.to(torch.float64).run("eager", forced=codes, return_logits=True).logits
    eager = case.run("eager", forced=codes, return_logits=True)
    error, allowed = ((one.double() - exact).abs().max().item() for one in (logits, eager.logits))
    assert error <= 2 * allowed + 1e-5
    assert torch.equal(codes, drawn_from(logits, case))
    assert torch.equal(total, eager.total)
    assert torch.equal(unsound, eager.unsound)


@pytest.mark.parametrize("device", [0, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_of_many_codes_on_the_host(library, device, ties):
    """Rows that fill no list, in shared memory or, on a device that has less of it, in global memory."""
    case = small_case(rows=2, dim=64, layers=1, depth=4, num_codes=9001, code_dim=8, seed=1)
    case = replace(case, settings=([1.0, 0.7, 2.0, 1.0], [0, 6000, 0, 5], [0.0, 0.9, 0.5, 0.99]))
    if ties:
        with torch.no_grad():
            case.weights.head[0].zero_()
            case.weights.head[1].copy_(torch.arange(9001) % 3)
    codes, _, logits, _ = on_host(library, case, device)
    assert torch.equal(codes, drawn_from(logits, case))
    assert len(set(codes.flatten().tolist())) > 4


@pytest.mark.parametrize(
    ("top_k", "top_p", "num_codes"),
    [(200, 0.0, 2000), (0, 0.9, 2000), (300, 0.8, 2000), (1, 0.0, 2000), (300, 0.0, 6001), (230, 0.9, 6002)],
)
def test_cuts_on_the_host(library, top_k, top_p, num_codes):
    """Noise that lets the least of the entries that are kept win: who is at the edge decides the draw."""
    case = small_case(rows=24, guidance=2.7, dim=64, layers=1, depth=1, num_codes=num_codes)
    conditional, unconditional = case.run("eager", return_logits=True).logits.float().chunk(2)
    scores = unconditional + 2.7 * (conditional - unconditional)
    noise = (1.5 * (scores - scores.amax(-1, keepdim=True))).clamp(min=-80).exp()
    case = replace(case, noise=noise.contiguous(), settings=([1.0], [top_k], [top_p]))
    codes, _, logits, _ = on_host(library, case)
    assert torch.equal(codes, drawn_from(logits, case))
    assert len(set(codes.flatten().tolist())) > 8


def test_forced_codes_and_unsound_logits_on_the_host(library):
    case = small_case(rows=3, depth=2, layers=1, seed=2)
    forced = torch.tensor([[4, 100], [-1, 0], [7, 7]])
    codes, total, logits, unsound = on_host(library, case, forced=forced)
    want = case.run("eager", forced=forced, return_logits=True)
    assert torch.equal(codes, forced)
    assert torch.equal(total, want.total)
    assert torch.equal(unsound, want.unsound)
    torch.testing.assert_close(logits, want.logits, rtol=0.05, atol=0.05)
    case.hidden[1, 3] = torch.nan
    codes, _, logits, unsound = on_host(library, case)
    assert unsound.tolist() == [-1, 0, -1]
    assert logits[1].isnan().all()
    assert torch.equal(codes[1], torch.zeros(2, dtype=torch.int64))
    assert torch.equal(codes, drawn_from(logits, case))


def test_turns_do_not_matter_on_the_host(library):
    """Whoever goes on first, the bits are the same."""
    case = small_case(rows=4, guidance=2.0, depth=2, seed=3)
    first = on_host(library, case)
    for seed in range(2, 8):
        library.seed(seed)
        for one, other in zip(first, on_host(library, case), strict=True):
            assert torch.equal(one, other)
