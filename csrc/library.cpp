// The only file that knows torch: tensors in, raw pointers and the current stream out to the launchers. Schemas are
// declared from Python, beside the fakes; this library registers implementations only, so loading two copies of it does
// no harm. The operators' names end in _cuda; outputs and workspace are allocated by the caller, and arguments are
// checked there: what is checked here is what would corrupt memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <climits>
#include <optional>
#include <utility>

#include "attention_sm90.h"
#include "codes.h"
#include "depth.h"
#include "pyramid.h"
#include "pyramid_sm90.h"
#include "sample.h"

// These live in libtorch_cuda.so. Weak, so that the library loads beside a torch built without CUDA, where no CUDA
// tensor exists and they are never called.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace unifiedar {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "needs float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

int int_of(int64_t size) {
  STD_TORCH_CHECK(size >= 0 && size <= INT_MAX, "needs a size below 2^31, got ", size);
  return static_cast<int>(size);
}

uint32_t word_of(int64_t size) {
  STD_TORCH_CHECK(size >= 0 && size <= UINT32_MAX, "needs a size or stride below 2^32, got ", size);
  return static_cast<uint32_t>(size);
}

void residual_lookup(const Tensor& codes, const Tensor& codebook, Tensor out, bool cumulative) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codebook.dim() >= 2 && codebook.dim() <= 3 &&
                      out.is_contiguous(),
                  "residual_lookup_cuda: needs contiguous codes [rows, depth] and out, "
                  "codebook [(depth,) codes, channels]");
  const bool shared = codebook.dim() == 2;
  const int64_t entries = codebook.dim() - 2;
  LookupArgs args;
  args.codes = codes.const_data_ptr<int64_t>();
  args.codebook = codebook.data_ptr();
  args.out = out.data_ptr();
  const int64_t bytes = codebook.element_size();
  args.book_level_bytes = shared ? 0 : codebook.stride(0) * bytes;
  args.book_entry_bytes = word_of(codebook.stride(entries) * bytes);
  args.rows = codes.size(0);
  args.num_codes = word_of(codebook.size(entries));
  args.depth = int_of(codes.size(1));
  args.channels = int_of(codebook.size(entries + 1));
  STD_TORCH_CHECK(shared || codebook.size(0) == args.depth, "residual_lookup_cuda: codes and codebook differ in depth");
  STD_TORCH_CHECK(codebook.stride(entries + 1) == 1 || args.channels == 1,
                  "residual_lookup_cuda: needs contiguous codebook rows");
  STD_TORCH_CHECK(out.scalar_type() == codebook.scalar_type() &&
                      out.numel() == args.rows * args.channels * (cumulative ? args.depth : 1),
                  "residual_lookup_cuda: out does not match");
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  STD_CUDA_CHECK(launch_residual_lookup(args, dtype_of(codebook), cumulative, current_stream(codes)));
}

LookupBackwardArgs backward_sizes(const Tensor& codes, int64_t num_codes, bool shared, int64_t channels) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.numel() > 0 && num_codes > 0,
                  "residual_lookup_backward_cuda: needs contiguous codes [rows, depth], not empty");
  LookupBackwardArgs args{};
  args.codes = codes.const_data_ptr<int64_t>();
  args.entries = int_of(codes.numel());
  args.num_codes = int_of(num_codes);
  args.depth = int_of(codes.size(1));
  args.channels = int_of(channels);
  args.shared = shared;
  return args;
}

int64_t residual_lookup_backward_workspace(const Tensor& codes, int64_t num_codes, bool shared, int64_t channels) {
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  size_t bytes = 0;
  STD_CUDA_CHECK(workspace_residual_lookup_backward(backward_sizes(codes, num_codes, shared, channels), &bytes));
  return static_cast<int64_t>(bytes);
}

// The buffers of the backward and of code_statistics, which are alike.
LookupBackwardArgs backward_args(const Tensor& grad, const Tensor& codes, int64_t num_codes, bool shared,
                                 bool cumulative, Tensor& workspace, Tensor& out) {
  LookupBackwardArgs args = backward_sizes(codes, num_codes, shared, out.size(out.dim() - 1));
  args.workspace = workspace.data_ptr();
  args.workspace_bytes = workspace.numel() * workspace.element_size();
  STD_TORCH_CHECK(grad.is_contiguous() && out.is_contiguous() && workspace.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(args.workspace) % 256 == 0 &&
                      grad.numel() == codes.size(0) * (cumulative ? args.depth : 1) * args.channels &&
                      out.numel() == num_codes * (shared ? 1 : args.depth) * args.channels,
                  "residual_lookup_backward_cuda: needs an aligned workspace and sizes that match");
  args.grad = grad.data_ptr();
  args.out = out.data_ptr();
  return args;
}

void residual_lookup_backward(const Tensor& grad, const Tensor& codes, int64_t num_codes, bool shared, bool cumulative,
                              Tensor workspace, Tensor out) {
  const LookupBackwardArgs args = backward_args(grad, codes, num_codes, shared, cumulative, workspace, out);
  STD_TORCH_CHECK(out.scalar_type() == grad.scalar_type(), "residual_lookup_backward_cuda: out does not match grad");
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  STD_CUDA_CHECK(launch_residual_lookup_backward(args, dtype_of(grad), cumulative, current_stream(grad)));
}

void code_statistics(const Tensor& residuals, const Tensor& codes, Tensor workspace, Tensor counts, Tensor sums) {
  LookupBackwardArgs args = backward_args(residuals, codes, counts.numel(), true, false, workspace, sums);
  STD_TORCH_CHECK(args.depth == 1 && args.channels > 0 && counts.is_contiguous() &&
                      counts.scalar_type() == ScalarType::Float && sums.scalar_type() == ScalarType::Float,
                  "code_statistics_cuda: needs codes [rows, 1], channels, and float32 counts and sums");
  args.counts = static_cast<float*>(counts.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  STD_CUDA_CHECK(launch_code_statistics(args, dtype_of(residuals), current_stream(residuals)));
}

// A tensor (batch, heads, length, width) of 16-bit elements as the copy engine takes it.
HeadsView heads_view(const Tensor& tensor) {
  bool fits = tensor.dim() == 4 && tensor.element_size() == 2 && tensor.stride(3) == 1 &&
              reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int i = 0; fits && i < 3; ++i) fits = tensor.size(i) == 1 || (tensor.stride(i) > 0 && tensor.stride(i) % 8 == 0);
  STD_TORCH_CHECK(fits, "block_causal_attention_cuda: needs 16-bit tensors [batch, heads, length, width], aligned to 16 "
                        "bytes, of strides that are multiples of 8 but for the last, 1");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// What forward and backward have in common.
template <typename Args>
void attention_sizes(Args& args, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     double softmax_scale) {
  args.q = heads_view(q);
  args.k = heads_view(k);
  args.v = heads_view(v);
  args.out = heads_view(out);
  args.batch = int_of(q.size(0));
  args.heads = int_of(q.size(1));
  args.queries = int_of(q.size(2));
  args.width = int_of(q.size(3));
  args.keys = int_of(k.size(2));
  args.softmax_scale = static_cast<float>(softmax_scale);
  const int64_t key_heads = k.size(1);
  bool matches = q.numel() > 0 && k.numel() > 0 && args.heads % key_heads == 0 && args.queries <= args.keys &&
                 lse.is_contiguous() && lse.scalar_type() == ScalarType::Float &&
                 lse.numel() == int64_t(args.batch) * args.heads * args.queries && args.width % 8 == 0 &&
                 args.width <= 128 && k.size(0) == args.batch && k.size(3) == args.width;
  for (int i = 0; i < 4; ++i) matches = matches && v.size(i) == k.size(i) && out.size(i) == q.size(i);
  for (const Tensor* other : {&k, &v, &out}) matches = matches && other->scalar_type() == q.scalar_type();
  STD_TORCH_CHECK(matches, "block_causal_attention_cuda: sizes or dtypes do not match, or are not such as it takes");
  args.share = args.heads / int_of(key_heads);
  args.lse = static_cast<float*>(lse.data_ptr());
}

template <typename Args>
void attention_schedule(Args& args, const Tensor& lengths, int64_t prefix) {
  args.prefix = int_of(prefix);
  args.scales = int_of(lengths.numel());
  args.wide_lengths = lengths.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(lengths.is_contiguous() && args.scales >= 1 && args.scales <= 32 &&
                      (args.wide_lengths || lengths.scalar_type() == ScalarType::Int),
                  "block_causal_attention_cuda: needs 1 to 32 lengths, contiguous, int32 or int64");
  args.lengths = lengths.data_ptr();
}

int group_of(int64_t group) {
  STD_TORCH_CHECK(group >= 1, "block_causal_attention_cuda: needs a group of at least 1, got ", group);
  return int_of(group);
}

// The forward's launch: `args` has all but the group of heads, the counter of tiles and the tile.
void attend(AttentionArgs& args, const Tensor& q, const std::optional<Tensor>& taken, int64_t group, int64_t tile) {
  if (taken.has_value()) {
    STD_TORCH_CHECK(taken->scalar_type() == ScalarType::Int && taken->numel() == 1,
                    "block_causal_attention_cuda: needs one int32 to count tiles");
    args.taken = static_cast<unsigned*>(taken->data_ptr());
  }
  args.group = group_of(group);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  STD_CUDA_CHECK(launch_attention_forward(args, dtype_of(q), static_cast<AttentionTile>(tile), current_stream(q)));
}

void block_causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths, Tensor out,
                            Tensor lse, const std::optional<Tensor>& taken, int64_t prefix, double softmax_scale,
                            int64_t group, int64_t tile) {
  AttentionArgs args{};
  attention_sizes(args, q, k, v, out, lse, softmax_scale);
  attention_schedule(args, lengths, prefix);
  attend(args, q, taken, group, tile);
}

// [ranges, 2, keys] of a mask; returns how many ranges.
int attention_table(const int** to, const Tensor& table, int keys) {
  STD_TORCH_CHECK(table.dim() == 3 && table.size(0) > 0 && table.size(1) == 2 && table.size(2) == keys &&
                      table.is_contiguous() && table.scalar_type() == ScalarType::Int,
                  "block_attention_cuda: needs tables [ranges, 2, keys], int32, contiguous");
  *to = static_cast<const int*>(table.data_ptr());
  return int_of(table.size(0));
}

template <typename Args>
void attention_images(Args& args, const std::optional<Tensor>& offsets) {
  if (!offsets.has_value()) return;
  STD_TORCH_CHECK(offsets->is_contiguous() && offsets->scalar_type() == ScalarType::Int && offsets->numel() > 0 &&
                      args.queries == args.keys,
                  "block_attention_cuda: needs offsets of images in int32, contiguous, and as many queries as keys");
  args.offsets = static_cast<const int*>(offsets->data_ptr());
  args.images = int_of(offsets->numel());
}

void block_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sees,
                     const std::optional<Tensor>& offsets, Tensor out, Tensor lse, const std::optional<Tensor>& taken,
                     double softmax_scale, int64_t group, int64_t tile) {
  AttentionArgs args{};
  attention_sizes(args, q, k, v, out, lse, softmax_scale);
  args.ranges = attention_table(&args.sees, sees, args.keys);
  attention_images(args, offsets);
  attend(args, q, taken, group, tile);
}

// The gradients' launch: `args` has the mask, and what forward and backward have in common.
void attend_backward(AttentionBackwardArgs& args, const Tensor& grad, const std::optional<Tensor>& grad_lse,
                     const Tensor& q, const Tensor& k, const Tensor& workspace, const Tensor& grad_q,
                     const Tensor& grad_k, const Tensor& grad_v, int64_t query_group, int64_t key_group, int64_t tile) {
  args.grad = heads_view(grad);
  args.grad_q = heads_view(grad_q);
  args.grad_k = heads_view(grad_k);
  args.grad_v = heads_view(grad_v);
  args.query_group = group_of(query_group);
  args.key_group = group_of(key_group);
  const int64_t columns = args.queries + 127 * int64_t(std::max(args.images, 1));
  bool matches = workspace.is_contiguous() && workspace.scalar_type() == ScalarType::Float &&
                 workspace.numel() >= 2 * int64_t(args.batch) * args.heads * columns &&
                 reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0;
  for (int i = 0; i < 4; ++i)
    matches = matches && grad.size(i) == q.size(i) && grad_q.size(i) == q.size(i) && grad_k.size(i) == k.size(i) &&
              grad_v.size(i) == k.size(i);
  for (const Tensor* other : {&grad, &grad_q, &grad_k, &grad_v})
    matches = matches && other->scalar_type() == q.scalar_type();
  if (grad_lse.has_value()) {
    matches = matches && grad_lse->is_contiguous() && grad_lse->scalar_type() == ScalarType::Float &&
              grad_lse->numel() == int64_t(args.batch) * args.heads * args.queries;
    args.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
  }
  STD_TORCH_CHECK(matches, "block_causal_attention_backward_cuda: sizes or dtypes do not match");
  args.workspace = static_cast<float*>(workspace.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  STD_CUDA_CHECK(launch_attention_backward(args, dtype_of(q), static_cast<AttentionBackwardTile>(tile), current_stream(q)));
}

void block_causal_attention_backward(const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                     const Tensor& lengths, Tensor workspace, Tensor grad_q, Tensor grad_k,
                                     Tensor grad_v, int64_t prefix, double softmax_scale, int64_t query_group,
                                     int64_t key_group, int64_t tile) {
  AttentionBackwardArgs args{};
  attention_sizes(args, q, k, v, out, lse, softmax_scale);
  attention_schedule(args, lengths, prefix);
  attend_backward(args, grad, grad_lse, q, k, workspace, grad_q, grad_k, grad_v, query_group, key_group, tile);
}

void block_attention_backward(const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& q,
                              const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                              const Tensor& sees, const Tensor& seen_by, const std::optional<Tensor>& offsets,
                              Tensor workspace, Tensor plan, Tensor grad_q, Tensor grad_k, Tensor grad_v,
                              double softmax_scale, int64_t query_group, int64_t key_group) {
  AttentionBackwardArgs args{};
  attention_sizes(args, q, k, v, out, lse, softmax_scale);
  args.ranges = attention_table(&args.sees, sees, args.keys);
  args.seen_by_ranges = attention_table(&args.seen_by, seen_by, args.keys);
  attention_images(args, offsets);
  const int64_t images = std::max(args.images, 1);
  const int64_t entries =
      (args.queries / 128 + images) * args.ranges + (args.keys / 128 + images) * args.seen_by_ranges;
  STD_TORCH_CHECK(plan.is_contiguous() && plan.scalar_type() == ScalarType::Int && plan.numel() >= 20 * entries &&
                      reinterpret_cast<uintptr_t>(plan.data_ptr()) % 16 == 0,
                  "block_attention_backward_cuda: needs a plan of ", 20 * entries, " int32");
  args.plan = static_cast<int4*>(plan.data_ptr());
  attend_backward(args, grad, grad_lse, q, k, workspace, grad_q, grad_k, grad_v, query_group, key_group,
                  static_cast<int64_t>(AttentionBackwardTile::kChosen));
}

DepthSizes depth_sizes(int64_t rows, int64_t dim, int64_t layers, int64_t depth, int64_t num_codes, int64_t code_dim,
                       const Tensor& hidden, bool projected, bool guided) {
  DepthSizes sizes;
  sizes.rows = int_of(rows);
  sizes.dim = int_of(dim);
  sizes.layers = int_of(layers);
  sizes.depth = int_of(depth);
  sizes.num_codes = int_of(num_codes);
  sizes.code_dim = int_of(code_dim);
  sizes.hidden_dim = projected ? int_of(hidden.size(1)) : 0;
  sizes.guided = guided;
  STD_TORCH_CHECK(hidden.dim() == 2 && rows > 0 && (!guided || rows % 2 == 0) && dim > 0 && dim % kHeadDim == 0 &&
                      depth > 0 && depth <= kMaxDepth && num_codes > 0 && code_dim > 0 &&
                      (projected ? hidden.size(1) > 0 && hidden.size(1) % 64 == 0 : hidden.size(1) == dim),
                  "depth_decode_cuda: sizes are not such as it takes");
  return sizes;
}

// plan: how many rows a launch takes, the parts of the workspace in the order of DepthWorkspace, and its size.
void depth_decode_plan(const Tensor& hidden, int64_t rows, int64_t dim, int64_t layers, int64_t depth, int64_t num_codes,
                       int64_t code_dim, bool projected, bool guided, Tensor plan) {
  STD_TORCH_CHECK(plan.is_contiguous() && plan.numel() == 11 && plan.scalar_type() == ScalarType::Long && plan.is_cpu(),
                  "depth_decode_plan_cuda: needs eleven int64 on the CPU");
  const DepthSizes sizes = depth_sizes(rows, dim, layers, depth, num_codes, code_dim, hidden, projected, guided);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  int limit = 0;
  STD_CUDA_CHECK(rows_depth_decode(sizes, dtype_of(hidden), &limit));
  const DepthWorkspace at = workspace_depth_decode(sizes);
  const size_t values[11] = {size_t(limit), at.barrier, at.parts, at.x, at.q, at.y, at.h, at.cache, at.sums, at.keys, at.bytes};
  for (int i = 0; i < 11; ++i) static_cast<int64_t*>(plan.data_ptr())[i] = static_cast<int64_t>(values[i]);
}

void depth_decode(const Tensor& hidden, const Tensor& packed, const Tensor& codebook, const std::optional<Tensor>& noise,
                  const std::optional<Tensor>& guidance_rows, const std::optional<Tensor>& forced, const Tensor& settings,
                  int64_t dim, int64_t layers, int64_t num_codes, bool projected, bool guided, double guidance,
                  Tensor workspace, Tensor codes, Tensor total, Tensor unsound, const std::optional<Tensor>& logits,
                  int64_t stop) {
  DepthArgs args{};
  const int64_t depth = settings.size(1), rows = hidden.size(0), count = guided ? rows / 2 : rows;
  args.sizes = depth_sizes(rows, dim, layers, depth, num_codes, codebook.size(codebook.dim() - 1), hidden, projected, guided);
  const DepthSizes& s = args.sizes;
  args.hidden = hidden.data_ptr();
  args.packed = packed.data_ptr();
  args.codebook = codebook.data_ptr();
  args.codes = static_cast<int64_t*>(codes.data_ptr());
  args.total = total.data_ptr();
  args.unsound = static_cast<int*>(unsound.data_ptr());
  args.workspace = workspace.data_ptr();
  args.book_dtype = dtype_of(codebook);
  args.guidance = static_cast<float>(guidance);
  args.stop = static_cast<int>(stop);
  bool matches = hidden.is_contiguous() && packed.is_contiguous() && hidden.element_size() == 2 &&
                 packed.scalar_type() == hidden.scalar_type() && packed.numel() == packed_depth_decode(s) &&
                 reinterpret_cast<uintptr_t>(args.hidden) % 16 == 0 && reinterpret_cast<uintptr_t>(args.packed) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(args.workspace) % 256 == 0 && workspace.is_contiguous() &&
                 size_t(workspace.numel() * workspace.element_size()) >= workspace_depth_decode(s).bytes &&
                 codes.is_contiguous() && codes.scalar_type() == ScalarType::Long && codes.numel() == count * depth &&
                 unsound.is_contiguous() && unsound.scalar_type() == ScalarType::Int && unsound.numel() == count &&
                 total.is_contiguous() && total.scalar_type() == codebook.scalar_type() &&
                 total.numel() == count * s.code_dim && codebook.stride(codebook.dim() - 1) == 1 &&
                 codebook.size(codebook.dim() - 2) == num_codes && rows <= kMaxDepthRows;
  args.book_entry = codebook.stride(codebook.dim() - 2);
  if (codebook.dim() == 3) {
    args.book_level = codebook.stride(0);
    matches = matches && codebook.size(0) == depth;
  }
  if (noise.has_value()) {
    args.noise = static_cast<const float*>(noise->data_ptr());
    args.noise_row = noise->stride(0);
    args.noise_depth = noise->stride(1);
    matches = matches && noise->scalar_type() == ScalarType::Float && noise->dim() == 3 && noise->size(0) == count &&
              noise->size(1) == depth && noise->size(2) == num_codes && (noise->stride(2) == 1 || num_codes == 1);
  }
  if (guidance_rows.has_value()) {
    args.guidance_rows = static_cast<const float*>(guidance_rows->data_ptr());
    matches = matches && guidance_rows->scalar_type() == ScalarType::Float && guidance_rows->is_contiguous() &&
              guidance_rows->numel() == count && guided;
  }
  if (forced.has_value()) {
    args.forced = forced->const_data_ptr<int64_t>();
    matches = matches && forced->is_contiguous() && forced->scalar_type() == ScalarType::Long &&
              forced->numel() == count * depth;
  }
  if (logits.has_value()) {
    args.logits = logits->data_ptr();
    matches = matches && logits->is_contiguous() && logits->scalar_type() == hidden.scalar_type() &&
              logits->numel() == rows * depth * num_codes;
  }
  matches = matches && settings.is_cpu() && settings.is_contiguous() && settings.scalar_type() == ScalarType::Double &&
            settings.dim() == 2 && settings.size(0) == 3;
  STD_TORCH_CHECK(matches, "depth_decode_cuda: sizes or dtypes do not match");
  const double* values = static_cast<const double*>(settings.data_ptr());
  for (int d = 0; d < s.depth; ++d) {
    args.inverse_temperature[d] = static_cast<float>(values[d]);
    args.top_k[d] = static_cast<int>(values[depth + d]);
    args.top_p[d] = values[2 * depth + d];
    STD_TORCH_CHECK(forced.has_value() || noise.has_value() || values[d] == 0, "depth_decode_cuda: needs noise");
  }
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  STD_CUDA_CHECK(launch_depth_decode(args, dtype_of(hidden), current_stream(hidden)));
}

// codes: [batch, h w] int64, or [batch, h w, 32] in place of the codebook's rows. scales: height, width, h, w, next h, w.
void next_scale_input(const Tensor& base, const Tensor& codes, const Tensor& codebook, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, double ratio, int64_t height, int64_t width, int64_t h, int64_t w,
                      int64_t next_h, int64_t next_w, Tensor total, Tensor out, Tensor following) {
  PyramidArgs args{};
  const bool vectors = codes.dim() == 3;
  const Tensor& table = vectors ? codes : codebook;
  args.base = base.data_ptr();
  args.table = table.data_ptr();
  args.total = static_cast<float*>(total.data_ptr());
  args.out = out.data_ptr();
  args.batch = int_of(base.size(0));
  args.height = int_of(height);
  args.width = int_of(width);
  args.h = int_of(h);
  args.w = int_of(w);
  args.next_h = int_of(next_h);
  args.next_w = int_of(next_w);
  args.ratio = static_cast<float>(ratio);
  const int64_t pixels = args.batch * height * width;
  bool matches = base.dim() == 4 && base.size(1) == kPyramidChannels && base.size(2) == height && base.size(3) == width &&
                 pixels > 0 && h > 0 && h <= height && w > 0 && w <= width && codes.dim() >= 2 &&
                 codes.size(0) == args.batch && codes.size(1) == h * w &&
                 table.size(table.dim() - 1) == kPyramidChannels && total.is_contiguous() && out.is_contiguous() &&
                 following.is_contiguous() && total.scalar_type() == ScalarType::Float &&
                 total.numel() == pixels * kPyramidChannels && out.numel() == total.numel() &&
                 following.numel() == args.batch * next_h * next_w * kPyramidChannels && following.numel() <= INT_MAX;
  for (const Tensor* other : {&table, &std::as_const(out), &std::as_const(following)})
    matches = matches && other->scalar_type() == base.scalar_type();
  STD_TORCH_CHECK(matches, "next_scale_input_cuda: sizes or dtypes do not match, or are not such as it takes");
  args.base_b = base.stride(0);
  args.base_c = int_of(base.stride(1));
  args.base_y = int_of(base.stride(2));
  args.base_x = int_of(base.stride(3));
  args.table_entry = int_of(table.stride(table.dim() - 2));
  args.table_c = int_of(table.stride(table.dim() - 1));
  if (vectors) {
    args.table_b = table.stride(0);
    args.num_codes = INT_MAX;
  } else {
    args.codes = codes.const_data_ptr<int64_t>();
    args.code_b = codes.stride(0);
    args.num_codes = int_of(codebook.size(0));
    matches = codes.stride(1) == 1 || codes.size(1) == 1;
  }
  if (weight.has_value()) {
    args.weight = weight->data_ptr();
    args.bias = bias.has_value() ? bias->data_ptr() : nullptr;
    matches = matches && weight->is_contiguous() && weight->scalar_type() == base.scalar_type() &&
              weight->numel() == 9 * kPyramidChannels * kPyramidChannels &&
              reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && bias.has_value() && bias->is_contiguous() &&
              bias->scalar_type() == base.scalar_type() && bias->numel() == kPyramidChannels;
  }
  if (following.numel() > 0) args.following = following.data_ptr();
  STD_TORCH_CHECK(matches, "next_scale_input_cuda: strides do not fit, or the convolution does not");
  const torch::stable::accelerator::DeviceGuard guard(base.get_device_index());
  STD_CUDA_CHECK(launch_next_scale_input(args, dtype_of(base), current_stream(base)));
}

// scales: h, w and convolution of each, on the CPU.
EncodeArgs encode_sizes(const Tensor& features, int64_t num_codes, bool convolved, const Tensor& scales) {
  STD_TORCH_CHECK(features.dim() == 4 && features.size(1) == kPyramidChannels && scales.is_cpu() && scales.dim() == 2 &&
                      scales.size(0) >= 1 && scales.size(0) <= kPyramidScales && scales.size(1) == 3 &&
                      scales.is_contiguous() && scales.scalar_type() == ScalarType::Long && num_codes > 0,
                  "multiscale_quantize_cuda: needs features of 32 channels and 1 to 32 scales");
  EncodeArgs args{};
  args.batch = int_of(features.size(0));
  args.height = int_of(features.size(2));
  args.width = int_of(features.size(3));
  args.num_codes = int_of(num_codes);
  args.steps = int_of(scales.size(0));
  args.convolved = convolved;
  const int64_t* const values = scales.const_data_ptr<int64_t>();
  for (int s = 0; s < args.steps; ++s) {
    const int64_t h = values[3 * s], w = values[3 * s + 1];
    STD_TORCH_CHECK(h > 0 && h <= args.height && w > 0 && w <= args.width && args.height * args.width <= kPyramidPixels,
                    "multiscale_quantize_cuda: needs scales within maps of 256 pixels");
    args.h[s] = static_cast<short>(h);
    args.w[s] = static_cast<short>(w);
    args.phi[s] = static_cast<short>(values[3 * s + 2]);
    args.length += int_of(h * w);
  }
  return args;
}

int64_t multiscale_quantize_blocks(const Tensor& features, int64_t num_codes, bool convolved, const Tensor& scales) {
  EncodePlan plan;
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  STD_CUDA_CHECK(plan_encode(encode_sizes(features, num_codes, convolved, scales), &plan));
  return plan.blocks;
}

void multiscale_quantize(const Tensor& features, const Tensor& codebook, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, double ratio, const Tensor& scales, Tensor codes) {
  EncodeArgs args = encode_sizes(features, codebook.size(0), weight.has_value(), scales);
  const int last = args.steps - 1, count = args.phi[last] + 1;
  const auto element = codebook.element_size();
  bool matches = args.batch > 0 && args.h[last] == args.height && args.w[last] == args.width && codebook.dim() == 2 &&
                 codebook.size(1) == kPyramidChannels && codebook.stride(1) == 1 && codebook.stride(0) % 4 == 0 &&
                 codebook.stride(0) >= 0 && reinterpret_cast<uintptr_t>(codebook.data_ptr()) % (4 * element) == 0 &&
                 codebook.scalar_type() == features.scalar_type() && codes.is_contiguous() &&
                 codes.scalar_type() == ScalarType::Long && codes.numel() == int64_t(args.batch) * args.length;
  for (int s = 0; s < args.steps; ++s) matches = matches && args.phi[s] >= 0 && args.phi[s] < count;
  if (weight.has_value()) {
    matches = matches && weight->is_contiguous() && weight->scalar_type() == features.scalar_type() &&
              weight->numel() >= int64_t(count) * 9 * kPyramidChannels * kPyramidChannels &&
              reinterpret_cast<uintptr_t>(weight->data_ptr()) % 16 == 0 && bias.has_value() && bias->is_contiguous() &&
              bias->scalar_type() == features.scalar_type() && bias->numel() >= count * kPyramidChannels &&
              reinterpret_cast<uintptr_t>(bias->data_ptr()) % 16 == 0;
    args.weight = weight->data_ptr();
    args.bias = bias.has_value() ? bias->data_ptr() : nullptr;
  }
  STD_TORCH_CHECK(matches, "multiscale_quantize_cuda: sizes, strides or dtypes do not match, or are not such as it takes");
  args.features = features.data_ptr();
  args.codebook = codebook.data_ptr();
  args.codes = static_cast<int64_t*>(codes.data_ptr());
  args.ratio = static_cast<float>(ratio);
  args.features_b = features.stride(0);
  args.features_c = int_of(features.stride(1));
  args.features_y = int_of(features.stride(2));
  args.features_x = int_of(features.stride(3));
  args.entry = int_of(codebook.stride(0));
  EncodePlan plan;
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  STD_CUDA_CHECK(plan_encode(args, &plan));
  STD_TORCH_CHECK(plan.blocks > 0, "multiscale_quantize_cuda: there is no room for the codebook");
  STD_CUDA_CHECK(launch_encode(args, plan, dtype_of(features), current_stream(features)));
}

void sample_codes(const Tensor& logits, const Tensor& noise, const std::optional<Tensor>& guidance_rows,
                  const std::optional<Tensor>& top_k_rows, const std::optional<Tensor>& top_p_rows, bool guided, double guidance,
                  double temperature, int64_t top_k, double top_p, int64_t inner, Tensor out) {
  SampleArgs args{};
  args.logits = logits.data_ptr();
  args.out = static_cast<int64_t*>(out.data_ptr());
  args.rows = out.numel();
  args.inner = inner;
  args.guided = guided;
  args.guidance = static_cast<float>(guidance);
  args.inverse_temperature = static_cast<float>(1 / temperature);
  args.top_k = top_k;
  args.top_p = top_p;
  bool matches = logits.dim() == 2 && args.rows > 0 && inner > 0 && args.rows % inner == 0 && args.rows <= INT_MAX &&
                 logits.size(0) == args.rows * (guided ? 2 : 1) && logits.size(1) > 0 && logits.size(1) <= 1 << 18 &&
                 (logits.stride(1) == 1 || logits.size(1) == 1) && out.is_contiguous() &&
                 out.scalar_type() == ScalarType::Long && temperature > 0;
  args.vocabulary = static_cast<int>(logits.size(1));
  args.logits_row = logits.stride(0);
  matches = matches && noise.scalar_type() == ScalarType::Float && noise.dim() == 2 && noise.size(0) == args.rows &&
            noise.size(1) == args.vocabulary && (noise.stride(1) == 1 || args.vocabulary == 1);
  args.noise = static_cast<const float*>(noise.data_ptr());
  args.noise_row = noise.stride(0);
  const auto one_a_row = [&](const std::optional<Tensor>& values, ScalarType dtype) -> const void* {
    if (!values.has_value()) return nullptr;
    matches = matches && values->is_contiguous() && values->scalar_type() == dtype && values->numel() == args.rows / inner;
    return values->data_ptr();
  };
  args.guidance_rows = static_cast<const float*>(one_a_row(guidance_rows, ScalarType::Float));
  args.top_k_rows = static_cast<const int64_t*>(one_a_row(top_k_rows, ScalarType::Long));
  args.wide_top_p = top_p_rows.has_value() && top_p_rows->scalar_type() == ScalarType::Double;
  args.top_p_rows = one_a_row(top_p_rows, args.wide_top_p ? ScalarType::Double : ScalarType::Float);
  STD_TORCH_CHECK(matches, "sample_codes_cuda: sizes, strides or dtypes do not match");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  STD_CUDA_CHECK(launch_sample_codes(args, dtype_of(logits), current_stream(logits)));
}

}  // namespace
}  // namespace unifiedar

STABLE_TORCH_LIBRARY_IMPL(unifiedar, CUDA, m) {
  m.impl("residual_lookup_cuda", TORCH_BOX(&unifiedar::residual_lookup));
  m.impl("residual_lookup_backward_cuda", TORCH_BOX(&unifiedar::residual_lookup_backward));
  m.impl("code_statistics_cuda", TORCH_BOX(&unifiedar::code_statistics));
  m.impl("depth_decode_cuda", TORCH_BOX(&unifiedar::depth_decode));
  m.impl("multiscale_quantize_cuda", TORCH_BOX(&unifiedar::multiscale_quantize));
  m.impl("multiscale_quantize_blocks_cuda", TORCH_BOX(&unifiedar::multiscale_quantize_blocks));
  m.impl("next_scale_input_cuda", TORCH_BOX(&unifiedar::next_scale_input));
  m.impl("sample_codes_cuda", TORCH_BOX(&unifiedar::sample_codes));
  m.impl("depth_decode_plan_cuda", TORCH_BOX(&unifiedar::depth_decode_plan));
  m.impl("block_causal_attention_cuda", TORCH_BOX(&unifiedar::block_causal_attention));
  m.impl("block_attention_cuda", TORCH_BOX(&unifiedar::block_attention));
  m.impl("block_causal_attention_backward_cuda", TORCH_BOX(&unifiedar::block_causal_attention_backward));
  m.impl("block_attention_backward_cuda", TORCH_BOX(&unifiedar::block_attention_backward));
  m.impl("residual_lookup_backward_workspace_cuda", TORCH_BOX(&unifiedar::residual_lookup_backward_workspace));
}
#endif  // USE_CUDA
