// torch on one side, raw pointers on the other: schemas, checks, registration. The only file here that knows torch.
//
// Written against LibTorch's stable ABI, so one build serves every Python and every torch from TORCH_TARGET_VERSION on.
// There is no Python in it: rlhf_engine/native.py loads it with torch.ops.load_library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "gae.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static void check_input(const Tensor& x, const char* name, ScalarType type, const char* type_name, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == type, "gae_cpu: ", name, " must be ", type_name);
  STD_TORCH_CHECK(x.dim() == 2, "gae_cpu: ", name, " must be (B, T), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.is_contiguous(), "gae_cpu: ", name, " must be contiguous");
  STD_TORCH_CHECK(x.size(0) == like.size(0) && x.size(1) == like.size(1), "gae_cpu: ", name, " (", x.size(0), ", ",
                  x.size(1), ") does not match rewards (", like.size(0), ", ", like.size(1), ")");
}

static std::tuple<Tensor, Tensor> gae_cpu(Tensor rewards, Tensor values, Tensor mask, double gamma, double lam) {
  check_input(rewards, "rewards", ScalarType::Float, "float32", rewards);
  check_input(values, "values", ScalarType::Float, "float32", rewards);
  check_input(mask, "mask", ScalarType::Bool, "bool", rewards);
  Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  rlhf_gae_cpu(static_cast<const float*>(rewards.data_ptr()), static_cast<const float*>(values.data_ptr()),
               static_cast<const bool*>(mask.data_ptr()), rewards.size(0), rewards.size(1), static_cast<float>(gamma),
               static_cast<float>(gamma * lam), static_cast<float*>(advantages.data_ptr()),
               static_cast<float*>(returns.data_ptr()));
  return {advantages, returns};
}

// FRAGMENT: the Python side may define further operators in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_engine, m) {
  m.def("gae_cpu(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_engine, CPU, m) { m.impl("gae_cpu", TORCH_BOX(&gae_cpu)); }
