// The backward of the lookup in one launch of thread-block clusters; codes.cu decides between this and its own kernels.
#pragma once

#include "codes.h"

namespace unifiedar {

inline int64_t tables_of(const LookupBackwardArgs& args) {
  return int64_t(args.num_codes) * (args.shared ? 1 : args.depth);
}

// Chunks of about sqrt(entries) entries bound both what one chunk sums and how many parts one codebook row can have, so
// that all entries choosing one row costs no more than a few times what even choices do.
inline int chunk_log2_of(int entries) {
  int log2 = 5;
  while (log2 < 16 && (entries - 1) >> (2 * log2) != 0) ++log2;
  return log2;
}

// Whether rows of the gradient and of the result can be moved in packs of so many elements.
inline bool packed_backward(const LookupBackwardArgs& args, int vec) {
  const uintptr_t both = reinterpret_cast<uintptr_t>(args.grad) | reinterpret_cast<uintptr_t>(args.out);
  return args.channels % vec == 0 && both % 16 == 0;
}

// How the clusters share the work: a function of the sizes and the device.
struct ClusterPlan {
  int clusters = 0;         // as many as run at the same time; 0 where this way is closed
  uint32_t rows = 0;        // neighbouring codebook rows of one cluster
  uint32_t span = 0;        // entries that one block of a cluster reads
  size_t shared_bytes = 0;  // of a block
  uint32_t room = 0;        // entries that one block keeps in shared memory
  size_t items_at = 0;      // where in the workspace gathered entries are,
  size_t partial_at = 0;    // and where the parts
  size_t workspace_bytes = 0;
};
cudaError_t plan_cluster(const LookupBackwardArgs& args, ClusterPlan* plan);

// `wide`: the result is float32 whatever `dtype` is.
cudaError_t launch_cluster_backward(const LookupBackwardArgs& args, const ClusterPlan& plan, DType dtype, bool wide,
                                    bool cumulative, cudaStream_t stream);

}  // namespace unifiedar
