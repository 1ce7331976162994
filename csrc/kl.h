// One-sample KL estimators of one token and their derivatives. d = logprob - ref_logprob.
#pragma once

#include "exponential.h"

namespace rlhf {

enum KlKind : int { kKl1 = 0, kKlAbs = 1, kKl2 = 2, kKl3 = 3 };

// Open bounds are infinite.
struct KlOptions {
  int kind;
  bool straight_through;  // the derivative of k2, unclamped, whatever the kind
  float diff_low, diff_high, value_low, value_high;
};

RLHF_FN float clamp(float x, float low, float high) {  // NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

// `kind` is a number the compiler knows, so that a loop over tokens has no switch in it; see with_kind.
template <int kind>
RLHF_FN float kl_value(float d) {
  if constexpr (kind == kKlAbs) return fabsf(d);
  if constexpr (kind == kKl2) return d * d / 2.f;
  if constexpr (kind == kKl3) return k3_estimate(d, exponential(-d));
  return d;
}

template <int kind>
RLHF_FN float kl_estimate(const KlOptions& o, float d) {
  return clamp(kl_value<kind>(clamp(d, o.diff_low, o.diff_high)), o.value_low, o.value_high);
}

// In d. As in PyTorch, clamp passes the derivative at its bounds, and |d| has none at 0.
template <int kind>
RLHF_FN float kl_derivative(const KlOptions& o, float d) {
  const float x = clamp(d, o.diff_low, o.diff_high), value = kl_value<kind>(x);
  float slope = 1.f;
  if constexpr (kind == kKlAbs) slope = x > 0.f ? 1.f : (x < 0.f ? -1.f : 0.f * x);
  if constexpr (kind == kKl2) slope = x;
  if constexpr (kind == kKl3) slope = 1.f - exponential(-x);
  const bool outside = (d < o.diff_low) | (d > o.diff_high) | (value < o.value_low) | (value > o.value_high);
  slope = outside ? 0.f : slope;
  return o.straight_through ? d : slope;
}

template <int value>
struct Constant {
  static constexpr int kValue = value;
};

// f(Constant<kind>)
template <class F>
RLHF_FN void with_kind(int kind, const F& f) {
  if (kind == kKlAbs) return f(Constant<kKlAbs>{});
  if (kind == kKl2) return f(Constant<kKl2>{});
  if (kind == kKl3) return f(Constant<kKl3>{});
  f(Constant<kKl1>{});
}

}  // namespace rlhf
