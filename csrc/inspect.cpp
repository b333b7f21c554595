// Python module unifiedar._inspect: what a kernel engineer asks of a build. It needs no GPU and no driver: the figures
// are ptxas's own (kernels.inc, written by build_backend/kernel_report.py), occupancy comes from NVIDIA's calculator.
#include <cuda_occupancy.h>
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kWarp = 32;
constexpr int kMaxBlock = 1024;  // threads a block, on every architecture so far

struct Kernel {
  std::string name;  // mangled
  std::string arch;  // "sm_90a"
  int registers;     // a thread
  int shared;        // static bytes a block
  int stack, spill_stores, spill_loads;  // bytes a thread
};

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> table = {
#include "kernels.inc"
  };
  return table;
}

const std::map<std::string, std::string>& flags() {
  static const std::map<std::string, std::string> table = {
#include "flags.inc"
  };
  return table;
}

std::string demangle(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  std::string readable = status == 0 ? text.get() : name;
  for (const std::string noise : {"(anonymous namespace)::", "unifiedar::", "void "}) {
    for (size_t at; (at = readable.find(noise)) != std::string::npos;) readable.erase(at, noise.size());
  }
  return readable.substr(0, readable.rfind('('));  // the arguments say nothing that the name does not
}

// "sm_90a" -> 90
int compute_capability(const std::string& arch) {
  size_t digits = 0;
  while (3 + digits < arch.size() && std::isdigit(static_cast<unsigned char>(arch[3 + digits]))) ++digits;
  if (arch.rfind("sm_", 0) != 0 || digits == 0) {
    throw std::invalid_argument("occupancy: arch must read like sm_90a, got " + arch);
  }
  return std::stoi(arch.substr(3, digits));
}

// Limits of one multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
cudaOccDeviceProp device(const std::string& arch) {
  struct Limits {
    int threads, shared_kib;
  };
  static const std::map<int, Limits> table = {{80, {2048, 164}}, {86, {1536, 100}},  {87, {1536, 164}},
                                              {89, {1536, 100}}, {90, {2048, 228}},  {100, {2048, 228}},
                                              {103, {2048, 228}}, {120, {1536, 100}}, {121, {1536, 100}}};
  const int capability = compute_capability(arch);
  const auto found = table.find(capability);
  if (found == table.end()) throw std::invalid_argument("occupancy: no limits are known for " + arch);
  cudaOccDeviceProp properties;
  properties.computeMajor = capability / 10;
  properties.computeMinor = capability % 10;
  properties.maxThreadsPerBlock = kMaxBlock;
  properties.maxThreadsPerMultiprocessor = found->second.threads;
  properties.regsPerBlock = properties.regsPerMultiprocessor = 64 * 1024;
  properties.warpSize = kWarp;
  properties.sharedMemPerBlock = 48 * 1024;
  properties.sharedMemPerMultiprocessor = static_cast<size_t>(found->second.shared_kib) * 1024;
  properties.sharedMemPerBlockOptin = properties.sharedMemPerMultiprocessor - 1024;
  properties.reservedSharedMemPerBlock = 1024;  // by the driver, since compute capability 8.0
  properties.numSms = 1;
  return properties;
}

int blocks_per_multiprocessor(const cudaOccDeviceProp& properties, int registers, int shared, int threads, int dynamic_shared) {
  cudaOccFuncAttributes attributes;
  attributes.maxThreadsPerBlock = INT_MAX;
  attributes.numRegs = registers;
  attributes.sharedSizeBytes = static_cast<size_t>(shared);
  attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  attributes.maxDynamicSharedSizeBytes = static_cast<size_t>(dynamic_shared);
  attributes.numBlockBarriers = 1;
  const cudaOccDeviceState state;
  cudaOccResult result;
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, threads,
                                                                     static_cast<size_t>(dynamic_shared));
  if (error != CUDA_OCC_SUCCESS) throw std::invalid_argument("occupancy: the calculator refused these arguments");
  return result.activeBlocksPerMultiprocessor;
}

py::dict occupancy(const std::string& arch, int registers, int shared, int threads, int dynamic_shared) {
  if (threads < 1 || threads > kMaxBlock) {
    throw std::invalid_argument("occupancy: threads must be in 1..1024, got " + std::to_string(threads));
  }
  if (registers < 0 || shared < 0 || dynamic_shared < 0) {
    throw std::invalid_argument("occupancy: registers and shared memory must not be negative");
  }
  const cudaOccDeviceProp properties = device(arch);
  const int blocks = blocks_per_multiprocessor(properties, registers, shared, threads, dynamic_shared);
  const int warps = blocks * ((threads + kWarp - 1) / kWarp);
  py::dict result;
  result["blocks"] = blocks;
  result["warps"] = warps;
  result["share"] = static_cast<double>(warps * kWarp) / properties.maxThreadsPerMultiprocessor;
  return result;
}

// The largest block, in whole warps, that one multiprocessor has the registers for.
int max_threads(const Kernel& kernel) {
  const cudaOccDeviceProp properties = device(kernel.arch);
  int threads = kMaxBlock;
  while (threads > kWarp && blocks_per_multiprocessor(properties, kernel.registers, kernel.shared, threads, 0) == 0) {
    threads -= kWarp;
  }
  return threads;
}

std::vector<py::dict> describe_kernels() {
  std::vector<py::dict> rows;
  for (const Kernel& kernel : kernels()) {
    py::dict row;
    row["name"] = demangle(kernel.name);
    row["symbol"] = kernel.name;
    row["arch"] = kernel.arch;
    row["registers"] = kernel.registers;
    row["shared"] = kernel.shared;
    row["stack"] = kernel.stack;
    row["spill_stores"] = kernel.spill_stores;
    row["spill_loads"] = kernel.spill_loads;
    row["max_threads"] = max_threads(kernel);
    rows.push_back(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_inspect, m) {
  m.doc() = "Build flags, kernel resources and occupancy of the compiled library; no GPU needed.";
  m.def("flags", &flags, "Returns the compilers, versions and flags of this build, as a dict of str.");
  m.def("kernels", &describe_kernels,
        "Returns one dict per kernel and architecture: name, symbol, arch, registers (a thread), shared (static bytes a\n"
        "block), stack, spill_stores, spill_loads (bytes a thread), max_threads (largest block its registers allow).");
  m.def("occupancy", &occupancy, py::arg("arch"), py::arg("registers"), py::arg("shared"), py::arg("threads"),
        py::arg("dynamic_shared") = 0,
        "Returns what one multiprocessor holds at once as a dict: blocks, warps, and share (0..1) of its warp slots.\n\n"
        "arch: such as \"sm_90a\"; registers: a thread; shared, dynamic_shared: bytes a block; threads: a block.\n"
        "Raises ValueError for an unknown architecture or arguments out of range.");
}
