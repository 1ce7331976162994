// The operators on CUDA: workspaces from torch's allocator, torch's current stream, no wait for the device anywhere.
//
// Tests build this file against the CPU shim as well, as operators of another namespace on CPU tensors.
#include "operators.h"

#ifndef RLHF_SHIM
#include <torch/csrc/stable/accelerator.h>

// Only in libtorch_cuda.so: weak, so that a torch without CUDA loads the extension too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace rlhf {
namespace {

class Cuda {
 public:
#ifdef RLHF_SHIM
  explicit Cuda(const Tensor& like) : like_(like) {}
#else
  explicit Cuda(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    STD_TORCH_CHECK(!aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_), "there is no CUDA stream");
  }
#endif

  void gae(Gae& op, bool whiten) const {
    const long count = op.sequences.count, size = like_.numel();
    const GaePlan plan = rlhf_gae_plan(count, op.sequences.length, size, op.sequences.offsets != nullptr);
    const Tensor maps = workspace(plan.map_bytes), moments = workspace(whiten ? sizeof(Moments) * count * plan.chunks : 0);
    op.moments = whiten ? static_cast<Moments*>(moments.data_ptr()) : nullptr;
    check(rlhf_gae_cuda(&op, plan, maps.data_ptr(), stream_));
    if (!whiten) return;
    const Whiten white{op.advantages, op.sequences.mask, kUsualWhitening, {}, op.advantages};
    check(rlhf_whiten_cuda(&white, op.moments, count, plan.chunks, false, size, stream_));
  }

  void whiten(const Whiten& op, long size) const {
    const long blocks = rlhf_moments_blocks(size);
    const Tensor moments = workspace(sizeof(Moments) * blocks);
    check(rlhf_whiten_cuda(&op, static_cast<Moments*>(moments.data_ptr()), blocks, 1, true, size, stream_));
  }

  void kl(const KlOptions& options, const float* logprobs, const float* ref_logprobs, float* value, float* derivative,
          long size) const {
    check(rlhf_kl_cuda(&options, logprobs, ref_logprobs, value, derivative, size, stream_));
  }

  void loss(const PolicyLoss& op, long size, const float* denom, double denom_number, LossOutputs& out) const {
    run(rlhf_policy_loss_cuda, op, size, denom, denom_number, out);
  }

  void loss(const ValueLoss& op, long size, const float* denom, double denom_number, LossOutputs& out) const {
    run(rlhf_value_loss_cuda, op, size, denom, denom_number, out);
  }

 private:
  template <class Function, class Op>
  void run(Function function, const Op& op, long size, const float* denom, double denom_number, LossOutputs& out) const {
    const Tensor memory = workspace(rlhf_loss_workspace(size));
    check(function(&op, size, denom, denom_number, memory.data_ptr(), data(out.loss),
                   static_cast<double*>(out.metrics.data_ptr()), stream_));
  }

  Tensor workspace(long bytes) const { return torch::stable::new_empty(like_, {bytes}, ScalarType::Byte); }

  static void check(int error) { STD_TORCH_CHECK(error == 0, "a kernel did not start: ", rlhf_cuda_error(error)); }

  const Tensor& like_;
  void* stream_ = nullptr;
#ifndef RLHF_SHIM
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace
}  // namespace rlhf

#ifdef RLHF_SHIM
STABLE_TORCH_LIBRARY(rlhf_shim, m) { rlhf::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(rlhf_shim, CPU, m) { rlhf::Operators<rlhf::Cuda>::implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(rlhf_engine, CUDA, m) { rlhf::Operators<rlhf::Cuda>::implement(m); }
#endif
