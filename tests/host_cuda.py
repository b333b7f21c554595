"""CUDA sources on the host: kernels whose threads share nothing run one thread after another, under the sanitizer.

A check of indices, bounds, alignment and arithmetic where no GPU is. It says nothing about races or speed, and CUB's
sort is replaced by the standard library's.
"""

import ctypes
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["compile_on_host"]

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Included first. Threads of a block come in order, blocks in reverse: a kernel must not care.
SHIM = """
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#undef __launch_bounds__
#undef __global__
#undef __device__
#undef __forceinline__
#define __launch_bounds__(...)
#define __global__ static
#define __device__
#define __forceinline__ inline
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
using std::max;
using std::min;
template <class T> void check_aligned(const T* p) { if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) __builtin_trap(); }
template <class T> T __ldg(const T* p) { check_aligned(p); return *p; }
template <class T> void __stcs(T* p, T value) { check_aligned(p); *p = value; }
inline float __uint_as_float(unsigned word) { float value; std::memcpy(&value, &word, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned word; std::memcpy(&word, &value, 4); return word; }
template <class Kernel> cudaError_t launch(dim3 grid, dim3 block, Kernel kernel) {
  if (!grid.x || !grid.y || !block.x || !block.y || block.x * block.y > 1024) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  for (unsigned b = grid.x * grid.y; b-- > 0;)
    for (unsigned t = 0; t < block.x * block.y; ++t) {
      blockIdx = {b % grid.x, b / grid.x, 0};
      threadIdx = {t % block.x, t / block.x, 0};
      kernel();
    }
  return cudaSuccess;
}
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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


def compile_on_host(source: str, exports: str, folder: Path) -> ctypes.CDLL:
    """Compiles a file of csrc/ for the host; skips the test where no C++ compiler or no CUDA header is.

    Args:
        source: the file's name.
        exports: C++ that ends the file: functions in C linkage around its launchers.
        folder: where to build.
    """
    compiler, nvcc = shutil.which("g++"), shutil.which("nvcc")
    if compiler is None or nvcc is None:
        pytest.skip("needs g++ and the CUDA toolkit's headers")
    dry = subprocess.run([nvcc, "-dryrun", "-c", source], cwd=CSRC, capture_output=True, text=True, check=True).stderr
    headers = shlex.split(re.search(r'^#\$ INCLUDES="(.*)"', dry, re.MULTILINE)[1])
    text = (CSRC / source).read_text(encoding="utf-8")
    text, launches = re.subn(r"(\w+(?:<[\w, ]+>)?)<<<(\w+), (\w+), 0, stream>>>\((.*?)\);",
                             r"if (const cudaError_t e = launch(\2, \3, [&] { \1(\4); }); e != cudaSuccess) return e;",
                             text)  # fmt: skip
    assert launches, "found no launch"
    assert "<<<" not in text, "a launch of another form"
    text = text.replace("cudaGetLastError()", "cudaSuccess").replace("#pragma unroll", "//")
    (folder / "cub/device").mkdir(parents=True)
    (folder / "cub/device/device_radix_sort.cuh").write_text(SORT, encoding="utf-8")
    (folder / "on_host.cpp").write_text(SHIM + text + exports, encoding="utf-8")
    flags = ["-O0", "-std=c++17", "-shared", "-fPIC", "-w", "-fsanitize=undefined", "-fno-sanitize-recover"]
    command = [compiler, *flags, f"-I{folder}", f"-I{CSRC}", *headers, "on_host.cpp", "-o", "on_host.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "on_host.so"))
