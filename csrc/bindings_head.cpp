// The head's operators on the CPU; kernels/head.py has those for GPUs. csrc/head.h says what they compute.
#include "arguments.h"
#include "head.h"

namespace rlhf {
namespace {

constexpr long kElementsPerThread = 1 << 13;  // below, a thread costs more to wake than it saves

#define RLHF_HEAD_ARGUMENTS                                                                                     \
  "Tensor? bias, Tensor? temperature, Tensor? target_logits, float logit_scale, float softcap, "                \
  "float inverse_temperature, int start, int ignore_index"

struct Options {
  const Optional &bias, &temperature, &target_logits;
  double logit_scale, softcap, inverse_temperature;
  int64_t start, ignore_index;
};

// Rows of a (rows, n) or (B, T, n) tensor.
struct Rows {
  long count, inner, outer_stride, stride;
};

bool is_narrow(const Tensor& x, const char* name) {
  const bool narrow = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || x.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16");
  return narrow;
}

Rows rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, name, " must be (rows, n) or (B, T, n), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(!x.is_cuda(), name, " must be on the CPU");
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) < 2 || x.stride(last) == 1, name, " must have its columns next to each other");
  if (x.dim() == 2) return {x.size(0), x.size(0) ? x.size(0) : 1, 0, x.stride(0)};
  return {x.size(0) * x.size(1), x.size(1) ? x.size(1) : 1, x.stride(0), x.stride(1)};
}

template <class T>
const T* vector_of(const Optional& x, const char* name, ScalarType type, const char* type_name, long count, const Tensor& like) {
  if (!x) return nullptr;
  check(*x, name, type, type_name, like);
  STD_TORCH_CHECK(x->dim() == 1 && x->numel() == count, name, " must be (", count, ",)");
  return static_cast<const T*>(x->data_ptr());
}

HeadTile tile_of(const Tensor& logits, const Tensor& targets, const Options& o) {
  const Rows rows = rows_of(logits, "logits");
  const long columns = logits.size(logits.dim() - 1);
  const auto floats = [&](const Optional& x, const char* name, long count) {
    return vector_of<float>(x, name, ScalarType::Float, "float32", count, logits);
  };
  return {logits.data_ptr(), is_narrow(logits, "logits"), rows.count, columns, rows.inner, rows.outer_stride, rows.stride,
          vector_of<long>(targets, "targets", ScalarType::Long, "int64", rows.count, logits),
          floats(o.bias, "bias", columns), floats(o.temperature, "temperature", rows.count),
          floats(o.target_logits, "target_logits", rows.count), static_cast<float>(o.logit_scale),
          static_cast<float>(o.softcap), static_cast<float>(o.inverse_temperature), o.start, o.ignore_index};
}

template <class F>
void parallel(long count, long elements_each, const F& f) {
  torch::stable::parallel_for(0, count, std::max(1L, kElementsPerThread / std::max(1L, elements_each)), f);
}

Tensor fold(Tensor logits, Tensor targets, Optional bias, Optional temperature, Optional target_logits, double logit_scale,
            double softcap, double inverse_temperature, int64_t start, int64_t ignore_index, bool extras) {
  const HeadTile op = tile_of(logits, targets, {bias, temperature, target_logits, logit_scale, softcap, inverse_temperature,
                                                start, ignore_index});
  const int fields = extras ? kAllParts : kUsualParts;
  const long segments = head_segments(op.columns);
  Tensor parts = torch::stable::new_empty(logits, {segments, fields, op.rows}, ScalarType::Float);
  parallel(op.rows * segments, kHeadSegment, [&](long first, long last) {
    rlhf_head_fold_cpu(&op, fields, data(parts), first, last);
  });
  return parts;
}

Tensor combine(Tensor parts, Tensor targets, int64_t start, int64_t vocabulary, int64_t ignore_index) {
  check(parts, "parts", ScalarType::Float, "float32", targets);
  STD_TORCH_CHECK(!parts.is_cuda(), "parts must be on the CPU");
  STD_TORCH_CHECK(parts.dim() == 3 && (parts.size(1) == kUsualParts || parts.size(1) == kAllParts),
                  "parts must be (segments, 4 or 6, rows)");
  STD_TORCH_CHECK(parts.size(0) == head_segments(vocabulary), "parts must be those of ", head_segments(vocabulary), " segments");
  const long rows = parts.size(2), fields = parts.size(1), segments = parts.size(0);
  const long* y = vector_of<long>(targets, "targets", ScalarType::Long, "int64", rows, parts);
  Tensor statistics = torch::stable::new_empty(parts, {fields + 2, rows});
  parallel(rows, 64 * segments, [&](long first, long last) {
    rlhf_head_combine_cpu(data(parts), segments, fields, rows, y, start, vocabulary, ignore_index, data(statistics), first, last);
  });
  return statistics;
}

void gradient(Tensor logits, Tensor targets, Tensor statistics, Optional grad_logprobs, Optional grad_entropy, Optional bias,
              Optional temperature, Optional target_logits, double logit_scale, double softcap, double inverse_temperature,
              int64_t start, int64_t ignore_index, Tensor out) {
  const HeadTile op = tile_of(logits, targets, {bias, temperature, target_logits, logit_scale, softcap, inverse_temperature,
                                                start, ignore_index});
  check(statistics, "statistics", ScalarType::Float, "float32", logits);
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) >= kUsualStatistics && statistics.size(1) == op.rows,
                  "statistics must be (6 or 8, ", op.rows, ")");
  check_shape(out, "out", logits);
  const Rows places = rows_of(out, "out");
  HeadGradient g{data(statistics), nullptr, nullptr, 0, 0, out.data_ptr(), is_narrow(out, "out"), places.outer_stride,
                 places.stride};
  const auto upstream = [&](const Optional& x, const char* name, const float*& pointer, long& stride) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && !x->is_cuda() && x->dim() == 1 && x->numel() == op.rows, name,
                    " must be (", op.rows, ",) float32 on the CPU");
    pointer = static_cast<const float*>(x->data_ptr()), stride = x->stride(0);
  };
  upstream(grad_logprobs, "grad_logprobs", g.grad_logprobs, g.logprobs_stride);
  upstream(grad_entropy, "grad_entropy", g.grad_entropy, g.entropy_stride);
  parallel(op.rows, op.columns, [&](long first, long last) { rlhf_head_gradient_cpu(&op, &g, first, last); });
}

}  // namespace
}  // namespace rlhf

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_engine, m) {
  m.def("head_fold(Tensor logits, Tensor targets, " RLHF_HEAD_ARGUMENTS ", bool extras) -> Tensor");
  m.def("head_combine(Tensor parts, Tensor targets, int start, int vocabulary, int ignore_index) -> Tensor");
  m.def("head_gradient(Tensor logits, Tensor targets, Tensor statistics, Tensor? grad_logprobs, Tensor? grad_entropy, "
        RLHF_HEAD_ARGUMENTS ", Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_engine, CPU, m) {
  m.impl("head_fold", TORCH_BOX(&rlhf::fold));
  m.impl("head_combine", TORCH_BOX(&rlhf::combine));
  m.impl("head_gradient", TORCH_BOX(&rlhf::gradient));
}
