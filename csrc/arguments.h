// From torch tensors to the plain structs of ops.h, checked: shared by the bindings of all devices.
//
// The front door (rlhf_engine/ops) passes contiguous float32, bool masks and int64 offsets. The checks here are for
// whoever calls the operators otherwise: a wrong shape is an error, never a read out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>
#include <optional>
#include <tuple>

#include "ops.h"

namespace rlhf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr size_t kHugePage = 2 << 20;
constexpr WhitenOptions kUsualWhitening{0, 1e-8, true, true, true};  // of kl_gae

inline void check(const Tensor& x, const char* name, ScalarType type, const char* type_name, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", type_name);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  " is on another device");
}

inline void check_shape(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == like.dim(), name, " has ", x.dim(), " dimensions, not ", like.dim());
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(x.size(d) == like.size(d), name, " has size ", x.size(d), " in dimension ", d, ", not ", like.size(d));
}

inline float* data(const Tensor& x) { return x.numel() ? static_cast<float*>(x.data_ptr()) : nullptr; }

inline float* floats(const Tensor& x, const char* name, const Tensor& like) {
  check(x, name, ScalarType::Float, "float32", like);
  check_shape(x, name, like);
  return data(x);
}

inline const float* floats(const Optional& x, const char* name, const Tensor& like) {
  return x ? floats(*x, name, like) : nullptr;
}

inline bool* mask_of(const Tensor& x, const Tensor& like) {
  check(x, "mask", ScalarType::Bool, "bool", like);
  check_shape(x, "mask", like);
  return x.numel() ? static_cast<bool*>(x.data_ptr()) : nullptr;
}

template <class T>
const T* per_sequence(const Optional& x, const char* name, ScalarType type, const char* type_name, long count,
                      const Tensor& like) {
  if (!x) return nullptr;
  check(*x, name, type, type_name, like);
  STD_TORCH_CHECK(x->numel() == count, name, " must hold one number per sequence, ", count, ", got ", x->numel());
  return static_cast<const T*>(x->data_ptr());
}

// Uninitialised. Large ones on huge pages: faulting them in 4 KiB at a time takes longer than filling them.
inline Tensor fresh(const Tensor& like, std::optional<ScalarType> type = std::nullopt) {
  Tensor x = type ? torch::stable::new_empty(like, like.sizes(), type) : torch::stable::empty_like(like);
#ifdef __linux__
  const size_t bytes = x.numel() * x.element_size();
  if (bytes >= 2 * kHugePage && !x.is_cuda()) {
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = (begin + bytes) & ~(kHugePage - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: no harm where it is not taken
  }
#endif
  return x;
}

inline Tensor fresh_if(bool wanted, const Tensor& like) {
  return wanted ? fresh(like) : torch::stable::new_empty(like, {0});
}

inline Sequences sequences(const Tensor& mask, const Tensor& like, const Optional& cu_seqlens) {
  Sequences s{mask_of(mask, like), nullptr, 0, 0};
  if (!cu_seqlens) {
    STD_TORCH_CHECK(like.dim() == 2, "without cu_seqlens tensors are (B, T), got ", like.dim(), " dimensions");
    s.count = like.size(0), s.length = like.size(1);
    return s;
  }
  STD_TORCH_CHECK(like.dim() == 1, "with cu_seqlens tensors are (N,), got ", like.dim(), " dimensions");
  check(*cu_seqlens, "cu_seqlens", ScalarType::Long, "int64", like);
  STD_TORCH_CHECK(cu_seqlens->numel() > 0, "cu_seqlens is empty");
  s.count = cu_seqlens->numel() - 1;
  s.offsets = static_cast<const long*>(cu_seqlens->data_ptr());
  if (like.is_cuda()) return s;  // a look would wait for the device
  bool rises = s.offsets[0] == 0 && s.offsets[s.count] == like.numel();
  for (long i = 0; i < s.count; ++i) rises &= s.offsets[i] <= s.offsets[i + 1];
  STD_TORCH_CHECK(rises, "cu_seqlens must rise from 0 to ", like.numel());
  return s;
}

struct Lambdas {
  const Optional &each, &value_each;
  double all, value_all;
  bool two;
};

inline Gae gae_arguments(const Tensor& values, const Tensor& mask, const Lambdas& lambdas, const Optional& bootstrap,
                         const Optional& cu_seqlens, double gamma, bool decay, const Tensor& advantages,
                         const Tensor& returns) {
  Gae op{};
  op.sequences = sequences(mask, values, cu_seqlens);
  const long count = op.sequences.count;
  op.values = floats(values, "values", values);
  op.lam = per_sequence<double>(lambdas.each, "lam", ScalarType::Double, "float64", count, values);
  op.value_lam = per_sequence<double>(lambdas.value_each, "value_lam", ScalarType::Double, "float64", count, values);
  op.bootstrap = per_sequence<float>(bootstrap, "bootstrap", ScalarType::Float, "float32", count, values);
  op.gamma = gamma, op.lam_all = lambdas.all, op.value_lam_all = lambdas.value_all, op.two_lambdas = lambdas.two;
  op.decay = decay;
  op.advantages = floats(advantages, "advantages", values), op.returns = floats(returns, "returns", values);
  return op;
}

inline KlOptions kl_options(int64_t kind, bool straight_through, double diff_low, double diff_high, double value_low,
                            double value_high) {
  const auto narrow = [](double x) { return static_cast<float>(x); };
  STD_TORCH_CHECK(kind >= kKl1 && kind <= kKl3, "there is no KL estimator number ", kind);
  return {static_cast<int>(kind), straight_through, narrow(diff_low), narrow(diff_high), narrow(value_low), narrow(value_high)};
}

inline const float* one_number(const Optional& denom, const Tensor& like) {
  if (!denom) return nullptr;
  check(*denom, "denom", ScalarType::Float, "float32", like);
  STD_TORCH_CHECK(denom->numel() == 1, "denom must be one number, got ", denom->numel());
  return static_cast<const float*>(denom->data_ptr());
}

struct LossOutputs {
  Tensor loss, gradient, entropy_gradient, metrics;
};

inline LossOutputs loss_outputs(const Tensor& like, bool gradient, bool entropy_gradient, int metrics) {
  return {torch::stable::new_empty(like, {}), fresh_if(gradient, like), fresh_if(entropy_gradient, like),
          torch::stable::new_empty(like, {metrics}, ScalarType::Double)};
}

}  // namespace rlhf
