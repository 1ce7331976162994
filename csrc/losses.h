// Loss and derivative of one token: PPO's clipped objective, and the clipped value loss.
#pragma once

#include "kl.h"

namespace rlhf {

struct PolicyOptions {
  float clip_low, clip_high;
  float dual_clip;  // infinite: none
};

constexpr float kLogRatioBound = 20.f;  // exp of it is far from overflow, and no policy moves further in one update

RLHF_FN float bounded_log_ratio(float logprob, float old_logprob) {
  return clamp(logprob - old_logprob, -kLogRatioBound, kLogRatioBound);
}

struct PolicyToken {
  float loss, derivative;  // before importance weights; derivative in the log-prob
  float clipped, clipped_low;  // 1 or 0, to be summed
};

// r = exp(bounded log-ratio), pg = max(-A r, -A clip(r)), and for A < 0 min(pg, -A dual_clip). `difference`: the
// log-ratio without its bound, beyond which there is no derivative.
RLHF_FN PolicyToken policy_token(const PolicyOptions& o, float difference, float ratio, float advantage) {
  PolicyToken out;
  const float free = -advantage * ratio;
  const float bounded = -advantage * clamp(ratio, 1.f - o.clip_low, 1.f + o.clip_high);
  const float loss = bounded > free ? bounded : free, lowest = -advantage * o.dual_clip;
  // Where the bound is the greater one the ratio lies outside of it, so it has no derivative there.
  out.clipped = bounded > free ? 1.f : 0.f;
  out.clipped_low = advantage < 0.f ? (loss > lowest ? 1.f : 0.f) : 0.f;
  out.loss = out.clipped_low > 0.f ? lowest : loss;
  out.derivative = bounded > free ? 0.f : free;
  out.derivative = out.clipped_low > 0.f ? 0.f : out.derivative;
  out.derivative = difference < -kLogRatioBound ? 0.f : out.derivative;
  out.derivative = difference > kLogRatioBound ? 0.f : out.derivative;
  return out;
}

struct ValueToken {
  float loss, derivative, clipped;
};

// 0.5 max((v - R)^2, (v_old + clip(v - v_old, +-bound) - R)^2); an infinite bound is plain regression.
RLHF_FN ValueToken value_token(float bound, float value, float old_value, float target) {
  const float error = value - target, moved = clamp(value - old_value, -bound, bound);
  // Inside the bound both are the same number; only rounding could make them differ.
  const float clipped_error = moved == value - old_value ? error : (old_value + moved) - target;
  const float free = error * error, bounded = clipped_error * clipped_error;
  ValueToken out;
  out.loss = 0.5f * (bounded > free ? bounded : free);
  out.derivative = bounded > free ? 0.f : error;
  out.clipped = bounded > free ? 1.f : 0.f;
  return out;
}

}  // namespace rlhf
