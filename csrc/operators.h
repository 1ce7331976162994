// Schemas of the operators, and their bodies for any device: a `Device` runs the structs of ops.h.
#pragma once

#include "arguments.h"

namespace rlhf {

#define RLHF_GAE_ARGUMENTS                                                                                     \
  "Tensor rewards, Tensor values, Tensor mask, Tensor? lam, Tensor? value_lam, Tensor? bootstrap, "            \
  "Tensor? cu_seqlens, float gamma, float lam_all, float value_lam_all, bool two_lambdas, bool decay"
#define RLHF_KL_GAE_ARGUMENTS                                                                                      \
  "Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Tensor? lam, "                 \
  "Tensor? bootstrap, Tensor? cu_seqlens, int kl_kind, " RLHF_KL_ARGUMENTS ", float kl_coef, float score_bound, "   \
  "bool after, float gamma, float lam_all, bool decay, bool whiten"
#define RLHF_WHITEN_ARGUMENTS "Tensor x, Tensor mask, int ddof, float eps, bool add_eps, bool center, bool zero_masked"
#define RLHF_KL_ARGUMENTS "float diff_low, float diff_high, float value_low, float value_high"

using Library = torch::stable::detail::StableLibrary;

// Gradients are empty unless asked for. Metrics: the sums of ops.h, with the count of tokens in place of the loss.
inline void define_operators(Library& m) {
  m.def("gae(" RLHF_GAE_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("gae_out(" RLHF_GAE_ARGUMENTS ", Tensor(a!) advantages, Tensor(b!) returns) -> ()");
  m.def("kl_gae(" RLHF_KL_GAE_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("kl_gae_out(" RLHF_KL_GAE_ARGUMENTS
        ", Tensor(a!) rewards, Tensor(b!) advantages, Tensor(c!) returns, Tensor(d!) kl, Tensor(e!) value_mask) -> ()");
  m.def("whiten(" RLHF_WHITEN_ARGUMENTS ") -> Tensor");
  m.def("whiten_out(" RLHF_WHITEN_ARGUMENTS ", Tensor(a!) out) -> ()");
  m.def("kl_estimate(Tensor logprobs, Tensor ref_logprobs, int kind, bool straight_through, " RLHF_KL_ARGUMENTS
        ", bool with_derivative) -> (Tensor, Tensor)");
  m.def("ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? is_weights, "
        "Tensor? entropy, Tensor? ref_logprobs, Tensor? weights, Tensor? denom, float denom_number, float clip_low, "
        "float clip_high, float dual_clip, float entropy_coef, float kl_coef, int kl_kind, bool straight_through, "
        "bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? weights, Tensor? denom, "
        "float denom_number, float bound, bool with_gradient) -> (Tensor, Tensor, Tensor)");
}

template <class Device>
struct Operators {
  static void gae_out(Tensor rewards, Tensor values, Tensor mask, Optional lam, Optional value_lam, Optional bootstrap,
                      Optional cu_seqlens, double gamma, double lam_all, double value_lam_all, bool two_lambdas,
                      bool decay, Tensor advantages, Tensor returns) {
    Gae op = gae_arguments(values, mask, {lam, value_lam, lam_all, value_lam_all, two_lambdas}, bootstrap, cu_seqlens,
                           gamma, decay, advantages, returns);
    op.rewards = floats(rewards, "rewards", values);
    Device(values).gae(op, false);
  }

  static std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, Tensor mask, Optional lam, Optional value_lam,
                                        Optional bootstrap, Optional cu_seqlens, double gamma, double lam_all,
                                        double value_lam_all, bool two_lambdas, bool decay) {
    Tensor advantages = fresh(values), returns = fresh(values);
    gae_out(rewards, values, mask, lam, value_lam, bootstrap, cu_seqlens, gamma, lam_all, value_lam_all, two_lambdas,
            decay, advantages, returns);
    return {advantages, returns};
  }

  static void kl_gae_out(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Optional lam,
                         Optional bootstrap, Optional cu_seqlens, int64_t kl_kind, double diff_low, double diff_high,
                         double value_low, double value_high, double kl_coef, double score_bound, bool after, double gamma,
                         double lam_all, bool decay, bool whiten, Tensor rewards, Tensor advantages, Tensor returns,
                         Tensor kl, Tensor value_mask) {
    Gae op = gae_arguments(values, mask, {lam, std::nullopt, lam_all, lam_all, false}, bootstrap, cu_seqlens, gamma,
                           decay, advantages, returns);
    op.shaped = true;
    op.shaping = {
        per_sequence<float>(scores, "scores", ScalarType::Float, "float32", op.sequences.count, values),
        floats(logprobs, "logprobs", values), floats(ref_logprobs, "ref_logprobs", values),
        kl_options(kl_kind, false, diff_low, diff_high, value_low, value_high), static_cast<float>(kl_coef),
        static_cast<float>(score_bound), after, floats(rewards, "rewards", values), floats(kl, "kl", values),
        mask_of(value_mask, values)};
    Device(values).gae(op, whiten);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kl_gae(
      Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Optional lam, Optional bootstrap,
      Optional cu_seqlens, int64_t kl_kind, double diff_low, double diff_high, double value_low, double value_high,
      double kl_coef, double score_bound, bool after, double gamma, double lam_all, bool decay, bool whiten) {
    Tensor rewards = fresh(values), advantages = fresh(values), returns = fresh(values), kl = fresh(values);
    Tensor value_mask = fresh(values, ScalarType::Bool);
    kl_gae_out(scores, logprobs, ref_logprobs, values, mask, lam, bootstrap, cu_seqlens, kl_kind, diff_low, diff_high,
               value_low, value_high, kl_coef, score_bound, after, gamma, lam_all, decay, whiten, rewards, advantages,
               returns, kl, value_mask);
    return {rewards, advantages, returns, kl, value_mask};
  }

  static void whiten_out(Tensor x, Tensor mask, int64_t ddof, double eps, bool add_eps, bool center, bool zero_masked,
                         Tensor out) {
    Whiten op{floats(x, "x", x), mask_of(mask, x), {static_cast<int>(ddof), eps, add_eps, center, zero_masked}, {},
              floats(out, "out", x)};
    Device(x).whiten(op, x.numel());
  }

  static Tensor whiten(Tensor x, Tensor mask, int64_t ddof, double eps, bool add_eps, bool center, bool zero_masked) {
    Tensor out = fresh(x);
    whiten_out(x, mask, ddof, eps, add_eps, center, zero_masked, out);
    return out;
  }

  static std::tuple<Tensor, Tensor> kl_estimate(Tensor logprobs, Tensor ref_logprobs, int64_t kind, bool straight_through,
                                                double diff_low, double diff_high, double value_low, double value_high,
                                                bool with_derivative) {
    Tensor value = fresh(logprobs), derivative = fresh_if(with_derivative, logprobs);
    Device(logprobs).kl(kl_options(kind, straight_through, diff_low, diff_high, value_low, value_high),
                        floats(logprobs, "logprobs", logprobs), floats(ref_logprobs, "ref_logprobs", logprobs),
                        data(value), data(derivative), logprobs.numel());
    return {value, derivative};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
      Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Optional is_weights, Optional entropy,
      Optional ref_logprobs, Optional weights, Optional denom, double denom_number, double clip_low, double clip_high,
      double dual_clip, double entropy_coef, double kl_coef, int64_t kl_kind, bool straight_through, bool with_gradient) {
    LossOutputs out = loss_outputs(logprobs, with_gradient, with_gradient && entropy, kPolicyMetrics);
    const PolicyLoss op{
        floats(logprobs, "logprobs", logprobs), floats(old_logprobs, "old_logprobs", logprobs),
        floats(advantages, "advantages", logprobs), mask_of(mask, logprobs), floats(is_weights, "is_weights", logprobs),
        floats(entropy, "entropy", logprobs), floats(ref_logprobs, "ref_logprobs", logprobs),
        floats(weights, "weights", logprobs),
        {static_cast<float>(clip_low), static_cast<float>(clip_high), static_cast<float>(dual_clip)},
        kl_options(kl_kind, straight_through, -HUGE_VAL, HUGE_VAL, -HUGE_VAL, HUGE_VAL), static_cast<float>(entropy_coef),
        static_cast<float>(kl_coef), 0.f, data(out.gradient), data(out.entropy_gradient)};
    Device(logprobs).loss(op, logprobs.numel(), one_number(denom, logprobs), denom_number, out);
    return {out.loss, out.gradient, out.entropy_gradient, out.metrics};
  }

  static std::tuple<Tensor, Tensor, Tensor> value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask,
                                                       Optional weights, Optional denom, double denom_number, double bound,
                                                       bool with_gradient) {
    LossOutputs out = loss_outputs(values, with_gradient, false, kValueMetrics);
    const ValueLoss op{floats(values, "values", values), floats(old_values, "old_values", values),
                       floats(returns, "returns", values), mask_of(mask, values), floats(weights, "weights", values),
                       static_cast<float>(bound), 0.f, data(out.gradient)};
    Device(values).loss(op, values.numel(), one_number(denom, values), denom_number, out);
    return {out.loss, out.gradient, out.metrics};
  }

  static void implement(Library& m) {
    m.impl("gae", TORCH_BOX(&gae));
    m.impl("gae_out", TORCH_BOX(&gae_out));
    m.impl("kl_gae", TORCH_BOX(&kl_gae));
    m.impl("kl_gae_out", TORCH_BOX(&kl_gae_out));
    m.impl("whiten", TORCH_BOX(&whiten));
    m.impl("whiten_out", TORCH_BOX(&whiten_out));
    m.impl("kl_estimate", TORCH_BOX(&kl_estimate));
    m.impl("ppo_loss", TORCH_BOX(&ppo_loss));
    m.impl("value_loss", TORCH_BOX(&value_loss));
  }
};

}  // namespace rlhf
