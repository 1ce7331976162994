// The extension's other side, for Python alone: how it was built, and its functions on bare addresses. Benchmarks time
// these to see what a kernel takes without torch's dispatcher; nothing else needs them, and nothing here is checked.
//
// A module of its own, linked to _C.so: so that stays free of Python and serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "active.h"
#include "ops.h"

namespace {

using namespace rlhf;
using Address = std::uintptr_t;  // of Tensor.data_ptr()
using Stream = std::optional<Address>;  // of torch.cuda.Stream.cuda_stream; none: the CPU, in the calling thread

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef RLHF_CUDA
void check(int error) {
  if (error) throw std::runtime_error(rlhf_cuda_error(error));
}
#else
[[noreturn]] void no_cuda() { throw std::runtime_error("_C was built without CUDA: there was no nvcc"); }
#endif

Gae recursion(Address values, Address mask, long count, long length, double gamma, double lam, Address advantages,
              Address returns) {
  Gae op{};
  op.sequences = {at<bool>(mask), nullptr, count, length};
  op.values = at<float>(values);
  op.gamma = gamma, op.lam_all = op.value_lam_all = lam;
  op.advantages = at<float>(advantages), op.returns = at<float>(returns);
  return op;
}

void run(Gae& op, Address workspace, const Stream& stream) {
  const pybind11::gil_scoped_release released;
  if (!stream) return rlhf_gae_cpu(&op, 0, op.sequences.count);
#ifdef RLHF_CUDA
  const long count = op.sequences.count, length = op.sequences.length;
  check(rlhf_gae_cuda(&op, rlhf_gae_plan(count, length, count * length, false), at<void>(workspace), at<void>(*stream)));
#else
  no_cuda();
#endif
}

long gae_workspace([[maybe_unused]] long count, [[maybe_unused]] long length) {
#ifdef RLHF_CUDA
  return rlhf_gae_plan(count, length, count * length, false).map_bytes;
#else
  no_cuda();
#endif
}

void gae(Address rewards, Address values, Address mask, long count, long length, double gamma, double lam,
         Address advantages, Address returns, Address workspace, const Stream& stream) {
  Gae op = recursion(values, mask, count, length, gamma, lam, advantages, returns);
  op.rewards = at<float>(rewards);
  run(op, workspace, stream);
}

void kl_gae(Address scores, Address logprobs, Address ref_logprobs, Address values, Address mask, long count, long length,
            double kl_coef, double gamma, double lam, Address rewards, Address advantages, Address returns, Address kl,
            Address value_mask, Address workspace, const Stream& stream) {
  const float open = INFINITY;
  Gae op = recursion(values, mask, count, length, gamma, lam, advantages, returns);
  op.shaped = true;
  op.shaping = {at<float>(scores), at<float>(logprobs), at<float>(ref_logprobs), {kKl1, false, -open, open, -open, open},
                static_cast<float>(kl_coef), open, false, at<float>(rewards), at<float>(kl), at<bool>(value_mask)};
  run(op, workspace, stream);
}

void policy_loss(Address logprobs, Address old_logprobs, Address advantages, Address mask, long size, double clip,
                 double denom, Address loss, Address gradient, Address metrics, Address workspace, const Stream& stream) {
  PolicyLoss op{};
  op.logprobs = at<float>(logprobs), op.old_logprobs = at<float>(old_logprobs), op.advantages = at<float>(advantages);
  op.mask = at<bool>(mask), op.grad_logprobs = at<float>(gradient);
  op.options = {static_cast<float>(clip), static_cast<float>(clip), INFINITY};
  op.scale = static_cast<float>(1.0 / denom);
  const pybind11::gil_scoped_release released;
  if (stream) {
#ifdef RLHF_CUDA
    return check(rlhf_policy_loss_cuda(&op, size, nullptr, denom, at<void>(workspace), at<float>(loss), at<double>(metrics),
                                       at<void>(*stream)));
#else
    no_cuda();
#endif
  }
  std::vector<long> before(count_blocks(size) + 1);
  rlhf_count_cpu(op.mask, size, before.data() + 1, 0, count_blocks(size));
  for (size_t i = 1; i < before.size(); ++i) before[i] += before[i - 1];
  const long tiles = (before.back() + kActiveTile - 1) / kActiveTile;
  std::vector<double> parts(tiles * kPolicyMetrics);
  rlhf_policy_loss_cpu(&op, size, before.data(), parts.data(), 0, tiles);
  double sum = 0.0;
  for (long tile = 0; tile < tiles; ++tile) sum += parts[tile * kPolicyMetrics + kLoss];
  *at<float>(loss) = static_cast<float>(sum * op.scale);
}

long policy_loss_workspace([[maybe_unused]] long size) {
#ifdef RLHF_CUDA
  return rlhf_loss_workspace(size);
#else
  no_cuda();
#endif
}

}  // namespace

PYBIND11_MODULE(_raw, m) {
  using namespace pybind11::literals;
  m.doc() = "rlhf_engine's functions on bare addresses of contiguous arrays, unchecked: for benchmarks.";
  m.attr("compiler") = __VERSION__;
  m.attr("cplusplus") = __cplusplus;
#ifdef RLHF_CUDA
  m.attr("targets") = std::vector<std::string>{RLHF_CUDA};
#else
  m.attr("targets") = std::vector<std::string>{};
#endif
  m.def("gae", &gae, "rewards"_a, "values"_a, "mask"_a, "count"_a, "length"_a, "gamma"_a, "lam"_a, "advantages"_a,
        "returns"_a, "workspace"_a = 0, "stream"_a = Stream());
  m.def("kl_gae", &kl_gae, "scores"_a, "logprobs"_a, "ref_logprobs"_a, "values"_a, "mask"_a, "count"_a, "length"_a,
        "kl_coef"_a, "gamma"_a, "lam"_a, "rewards"_a, "advantages"_a, "returns"_a, "kl"_a, "value_mask"_a,
        "workspace"_a = 0, "stream"_a = Stream());
  m.def("gae_workspace", &gae_workspace, "bytes that gae and kl_gae need on CUDA", "count"_a, "length"_a);
  m.def("policy_loss", &policy_loss, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "mask"_a, "size"_a, "clip"_a, "denom"_a,
        "loss"_a, "gradient"_a, "metrics"_a = 0, "workspace"_a = 0, "stream"_a = Stream());
  m.def("policy_loss_workspace", &policy_loss_workspace, "bytes that policy_loss needs on CUDA", "size"_a);
}
