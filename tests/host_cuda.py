"""CUDA sources on the host, under the sanitizer: a check of indices, bounds, alignment and arithmetic where no GPU is.

Kernels whose threads share nothing run one thread after another. Kernels launched as clusters run with every thread of
a cluster on a stack of its own, which it leaves where it waits for others; who goes on is drawn at random, or is the
one that can go furthest, so that a missing barrier shows. It says nothing about speed or the memory model, and CUB's
sort is replaced by the standard library's.
"""

import ctypes
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["CSRC", "DRAW", "compile_on_host"]

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Included first. Threads of a block come in order, blocks in reverse: a kernel must not care.
SHIM = """
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#undef __launch_bounds__
#undef __global__
#undef __device__
#undef __forceinline__
#undef __shared__
#undef __noinline__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static  // of kernels whose blocks come in turn
#define __noinline__
#define __grid_constant__
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
using std::max;
using std::min;
template <class T> void check_aligned(const T* p) { if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) __builtin_trap(); }
template <class T> T __ldg(const T* p) { check_aligned(p); return *p; }
template <class T> void __stcs(T* p, T value) { check_aligned(p); *p = value; }
inline float __uint_as_float(unsigned word) { float value; std::memcpy(&value, &word, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned word; std::memcpy(&word, &value, 4); return word; }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(unsigned word) { return __builtin_ffs(word); }
inline bool host_waits = false;  // whether threads of kernels launched without clusters wait for each other
inline void run_waiting(unsigned block, unsigned threads, std::function<void()> kernel);
template <class Kernel> cudaError_t launch(dim3 grid, dim3 block, Kernel kernel) {
  if (!grid.x || !grid.y || !block.x || !block.y || block.x * block.y > 1024) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  if (host_waits) {
    for (unsigned b = grid.x; b-- > 0;) run_waiting(b, block.x, kernel);
    return cudaSuccess;
  }
  for (unsigned b = grid.x * grid.y; b-- > 0;)
    for (unsigned t = 0; t < block.x * block.y; ++t) {
      blockIdx = {b % grid.x, b / grid.x, 0};
      threadIdx = {t % block.x, t / block.x, 0};
      kernel();
    }
  return cudaSuccess;
}

// ---- clusters: device number n is a GPU that runs n of them at a time
inline int host_device = 0;
inline size_t host_shared = 48 << 10;  // as cudaFuncSetAttribute left it
inline unsigned host_seed = 1;
extern "C" __attribute__((weak)) void use_device(int device) { host_device = device; }
extern "C" __attribute__((weak)) cudaError_t cudaGetDevice(int* device) { return *device = host_device, cudaSuccess; }
extern "C" __attribute__((weak)) cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute == cudaDevAttrCooperativeLaunch) return *value = 1, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMajor) return *value = device > 0 ? 9 : 8, cudaSuccess;
  if (attribute == cudaDevAttrClusterLaunch) return *value = device > 0, cudaSuccess;
  if (attribute == cudaDevAttrMultiProcessorCount) return *value = 8 * device + 4, cudaSuccess;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    return *value = device == 2 ? 101376 : 232448, cudaSuccess;  // 2: as GPUs of compute capability 8.6 have it
  return cudaErrorInvalidValue;
}
extern "C" __attribute__((weak)) cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return host_shared = value, cudaSuccess;
}
extern "C" __attribute__((weak)) cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                                            const cudaLaunchConfig_t*) {
  return *clusters = host_device, cudaSuccess;
}

struct Barrier {
  unsigned arrived = 0, phase = 0;
  std::vector<unsigned> waiting;
};
struct Context {
  jmp_buf registers;
};
struct Cluster {
  static constexpr size_t kStack = 64 << 10;
  std::vector<Context> contexts;
  std::vector<char> started;
  std::vector<std::vector<unsigned>> ready;  // by block
  std::vector<Barrier> warps, blocks;
  Barrier all;
  std::vector<uint64_t> values;  // one a thread, for what warps and blocks exchange
  std::vector<unsigned> phases;  // of `all`, one a thread: in which it arrived
  std::vector<unsigned> lefts;   // threads of each block that have not ended
  std::vector<std::vector<uint32_t>> shared;
  unsigned threads = 0, running = 0, first_block = 0, left = 0, turn = 0;
  size_t shared_words = 0;
  bool hasty = false;
  inline static unsigned runs = 0;
  jmp_buf scheduler;
  std::function<void()> kernel;
  char* stacks = nullptr;

  static char* memory_for(unsigned stacks) {  // kept: touching fresh pages takes longer than the kernel
    static unsigned held = 0;
    static void* memory = nullptr;
    if (stacks > held) {
      if (held) munmap(memory, held * kStack);
      constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      memory = mmap(nullptr, stacks * kStack, PROT_READ | PROT_WRITE, kFlags, -1, 0);
      if (memory == MAP_FAILED) __builtin_trap();
      held = stacks;
    }
    return static_cast<char*>(memory);
  }
  static unsigned draw(unsigned count) {
    host_seed = host_seed * 1664525 + 1013904223;
    return (host_seed >> 8) % count;
  }
  bool arrive(Barrier& barrier, unsigned count) {  // whether all have
    if (++barrier.arrived < count) return false;
    for (const unsigned thread : barrier.waiting) ready[thread / threads].push_back(thread);
    barrier.waiting.clear();
    barrier.arrived = 0;
    ++barrier.phase;
    return true;
  }
  void wait(Barrier& barrier) {
    barrier.waiting.push_back(running);
    if (_setjmp(contexts[running].registers) == 0) _longjmp(scheduler, 1);
  }
  void wait(Barrier& barrier, unsigned count) {
    if (!arrive(barrier, count)) wait(barrier);
  }
  void resume(unsigned thread) {
    running = thread;
    blockIdx = {first_block + thread / threads, 0, 0};
    threadIdx = {thread % threads, 0, 0};
    if (started[thread]) _longjmp(contexts[thread].registers, 1);
    started[thread] = 1;
    ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = stacks + thread * kStack;
    fresh.uc_stack.ss_size = kStack;
    fresh.uc_link = nullptr;
    makecontext(&fresh, enter, 0);
    setcontext(&fresh);
  }
  static void enter();
  void run(unsigned blocks_, unsigned threads_, size_t bytes, unsigned first) {
    threads = threads_;
    first_block = first;
    left = blocks_ * threads;
    contexts = std::vector<Context>(left);
    started.assign(left, 0);
    values.assign(left, 0);
    phases.assign(left, 0);
    lefts.assign(blocks_, threads);
    warps.assign(left / 32, {});
    blocks.assign(blocks_, {});
    shared_words = (bytes + 3) / 4;
    shared.assign(blocks_, std::vector<uint32_t>(shared_words + 64, 0xdeadbeef));
    ready.assign(blocks_, {});
    for (unsigned t = 0; t < left; ++t) ready[t / threads].push_back(t);
    stacks = memory_for(left);
    turn = 0;
    hasty = ++runs % 2;
    _setjmp(scheduler);
    if (left > 0) {
      // A block runs as far as it can before another's turn comes, so that blocks are as far apart as they may be.
      for (unsigned tries = 0; ready[turn].empty(); turn = draw(blocks_))
        if (++tries > 1000 * blocks_) __builtin_trap();  // some wait for what others will never reach
      // So does a warp in every other cluster: those set free last go on first.
      std::vector<unsigned>& own = ready[turn];
      if (!hasty) std::swap(own[draw(own.size())], own.back());
      const unsigned next = own.back();
      own.pop_back();
      resume(next);
    }
    for (const auto& memory : shared)
      for (size_t i = shared_words; i < memory.size(); ++i)
        if (memory[i] != 0xdeadbeef) __builtin_trap();  // wrote beyond its shared memory
  }
};
inline Cluster* cluster = nullptr;
inline void Cluster::enter() {
  cluster->kernel();
  --cluster->left;
  const unsigned block = cluster->running / cluster->threads;
  if (--cluster->lefts[block] == 0)  // nobody may look at the memory of a block that has ended
    std::fill_n(cluster->shared[block].begin(), cluster->shared_words, 0xdeadbeef);
  _longjmp(cluster->scheduler, 1);
}
template <class T> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(T), T args) {
  if (config->numAttrs == 0 || config->attrs[0].id == cudaLaunchAttributeProgrammaticStreamSerialization)
    return launch(config->gridDim, config->blockDim, [&] { kernel(args); });
  const unsigned size = config->attrs[0].val.clusterDim.x, threads = config->blockDim.x;
  if (config->attrs[0].id != cudaLaunchAttributeClusterDimension || threads > 1024 ||
      !config->gridDim.x || config->gridDim.x % size || threads % 32 || config->dynamicSmemBytes > host_shared)
    return cudaErrorInvalidConfiguration;
  host_shared = 48 << 10;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned first = 0; first < gridDim.x; first += size) {
    Cluster one;
    one.kernel = [&] { kernel(args); };
    cluster = &one;
    one.run(size, threads, config->dynamicSmemBytes, first);
    cluster = nullptr;
  }
  return cudaSuccess;
}
inline void run_waiting(unsigned block, unsigned threads, std::function<void()> kernel) {
  Cluster one;
  one.kernel = kernel;
  cluster = &one;
  one.run(1, threads, 0, block);
  cluster = nullptr;
}
inline void __syncthreads() { cluster->wait(cluster->blocks[cluster->running / cluster->threads], cluster->threads); }
inline void __syncwarp() { cluster->wait(cluster->warps[cluster->running / 32], 32); }
// Calls use(values) with one value of each thread of the warp, or of the block.
template <class Use> auto exchange(uint64_t value, bool whole, Use use) {
  const unsigned me = cluster->running, size = whole ? cluster->threads : 32;
  const auto wait = [=] { whole ? __syncthreads() : __syncwarp(); };
  cluster->values[me] = value;
  wait();
  const auto result = use(cluster->values.data() + me / size * size);
  wait();
  return result;
}
inline unsigned match(const uint64_t* values, uint64_t value) {
  unsigned found = 0;
  for (unsigned lane = 0; lane < 32; ++lane) found |= unsigned(values[lane] == value) << lane;
  return found;
}
inline void check_mask(unsigned mask) { if (mask != ~0u) __builtin_trap(); }
inline unsigned __ballot_sync(unsigned mask, bool value) {
  check_mask(mask);
  return exchange(value, false, [](const uint64_t* values) { return match(values, 1); });
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  check_mask(mask);
  return exchange(value, false, [=](const uint64_t* values) { return match(values, value); });
}
inline unsigned __shfl_sync(unsigned mask, unsigned value, int from) {
  check_mask(mask);
  return exchange(value, false, [=](const uint64_t* values) { return unsigned(values[from]); });
}
inline unsigned __shfl_up_sync(unsigned mask, unsigned value, unsigned step) {
  check_mask(mask);
  const unsigned lane = cluster->running % 32, from = lane < step ? lane : lane - step;
  return exchange(value, false, [=](const uint64_t* values) { return unsigned(values[from]); });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  check_mask(mask);
  return exchange(value, false, [](const uint64_t* values) {
    unsigned sum = 0;
    for (unsigned lane = 0; lane < 32; ++lane) sum += unsigned(values[lane]);
    return sum;
  });
}
inline int __syncthreads_or(int value) {
  const unsigned threads = cluster->threads;
  return exchange(value != 0, true, [=](const uint64_t* all) { return int(std::count(all, all + threads, 1)); });
}
inline unsigned atomicAdd(unsigned* at, unsigned value) { return *at += value, *at - value; }
#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""

# What kernels that draw use besides; others would find these overloads ambiguous.
DRAW = """
template <class T> T __ldcg(const T* p) { return __ldg(p); }
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return *at += value, *at - value;
}
inline int atomicAdd(int* at, int value) { return *at += value, *at - value; }
inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int step) {
  const unsigned from = (threadIdx.x % 32) ^ step;
  return exchange(value, false, [=](const uint64_t* values) { return (unsigned long long)values[from]; });
}
inline float __shfl_xor_sync(unsigned mask, float value, int step) {
  return __uint_as_float(unsigned(__shfl_xor_sync(mask, (unsigned long long)__float_as_uint(value), step)));
}
inline unsigned long long __shfl_up_sync(unsigned mask, unsigned long long value, unsigned step) {
  const unsigned lane = threadIdx.x % 32, from = lane < step ? lane : lane - step;
  return exchange(value, false, [=](const uint64_t* values) { return (unsigned long long)values[from]; });
}
"""

# In place of device/cluster.cuh.
CLUSTER = """
#pragma once
namespace unifiedar {
inline uint32_t cluster_rank() { return cluster->running / cluster->threads; }
inline uint32_t* shared_memory() { return cluster->shared[cluster_rank()].data(); }
inline void cluster_sync() { cluster->wait(cluster->all, cluster->threads * cluster->blocks.size()); }
inline void cluster_arrive() {
  cluster->phases[cluster->running] = cluster->all.phase;
  cluster->arrive(cluster->all, cluster->threads * cluster->blocks.size());
}
inline void cluster_wait() {
  if (cluster->phases[cluster->running] == cluster->all.phase) cluster->wait(cluster->all);
}
inline const uint32_t* shared_of(uint32_t* mine, uint32_t rank) {
  return cluster->shared[rank].data() + (mine - shared_memory());
}
}  // namespace unifiedar
"""

# Like the original: stable, compares the given bits only, changes buffers once a pass of 8 bits and spoils the other.
SORT = """
#pragma once
namespace cub {
template <class T> struct DoubleBuffer {
  T* buffers[2];
  int selector = 0;
  DoubleBuffer(T* current, T* alternate) : buffers{current, alternate} {}
  T* Current() { return buffers[selector]; }
  T* Alternate() { return buffers[1 - selector]; }
};
struct DeviceRadixSort {
  template <class T>
  static cudaError_t SortKeys(void* space, size_t& bytes, DoubleBuffer<T>& keys, int n, int low, int high,
                              cudaStream_t) {
    constexpr size_t kBytes = 1000;
    if (space == nullptr) return bytes = kBytes, cudaSuccess;
    if (bytes < kBytes) return cudaErrorInvalidValue;
    std::memset(space, 0x5a, kBytes);
    const T mask = ((T(1) << (high - low)) - 1) << low;
    std::stable_sort(keys.Current(), keys.Current() + n, [=](T a, T b) { return (a & mask) < (b & mask); });
    if ((high - low + 7) / 8 % 2) {
      std::copy(keys.Current(), keys.Current() + n, keys.Alternate());
      keys.selector = 1;
    }
    std::fill(keys.Alternate(), keys.Alternate() + n, ~T(0));
    return cudaSuccess;
  }
};
}  // namespace cub
"""


def _host_source(name: str) -> str:
    """The text of a file of csrc/ with its launches as calls."""
    text = (CSRC / name).read_text(encoding="utf-8")
    text, launches = re.subn(r"(\w+(?:<[\w, ]+>)?)<<<(\w+), (\w+), 0, stream>>>\((.*?)\);",
                             r"if (const cudaError_t e = launch(\2, \3, [&] { \1(\4); }); e != cudaSuccess) return e;",
                             text)  # fmt: skip
    assert launches or re.search("cudaLaunch(KernelEx|CooperativeKernel)", text), "found no launch"
    assert "<<<" not in text, "a launch of another form"
    return SHIM + text.replace("cudaGetLastError()", "cudaSuccess").replace("#pragma unroll", "//")


def compile_on_host(
    sources: list[str], exports: str, folder: Path, instead: dict[str, str] | None = None
) -> ctypes.CDLL:
    """Compiles files of csrc/ for the host; skips the test where no C++ compiler or no CUDA header is.

    Args:
        sources: the files' names.
        exports: C++ that ends the first file: functions in C linkage around its launchers.
        folder: where to build.
        instead: text of files of csrc/ that are included, in place of what they hold.

    Returns:
        The library. Its `use_device(n)` chooses a GPU that runs n clusters at a time; 0, at first, has none.
    """
    compiler, nvcc = shutil.which("g++"), shutil.which("nvcc")
    if compiler is None or nvcc is None:
        pytest.skip("needs g++ and the CUDA toolkit's headers")
    dry = subprocess.run([nvcc, "-dryrun", "-c", sources[0]], cwd=CSRC, capture_output=True, text=True, check=True)
    headers = shlex.split(re.search(r'^#\$ INCLUDES="(.*)"', dry.stderr, re.MULTILINE)[1])
    (folder / "cub/device").mkdir(parents=True)
    (folder / "cub/device/device_radix_sort.cuh").write_text(SORT, encoding="utf-8")
    (folder / "device").mkdir()
    (folder / "device/cluster.cuh").write_text(CLUSTER, encoding="utf-8")
    for name, text in (instead or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    files = []
    for source in sources:
        files.append(f"{Path(source).stem}.cpp")
        (folder / files[-1]).write_text(_host_source(source) + exports * (len(files) == 1), encoding="utf-8")
    # -Bsymbolic: torch brings a CUDA runtime of the same names.
    flags = ["-O1", "-std=c++17", "-shared", "-Wl,-Bsymbolic", "-fPIC", "-w"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover"]
    command = [compiler, *flags, f"-I{folder}", f"-I{CSRC}", *headers, *files, "-o", "on_host.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "on_host.so"))
