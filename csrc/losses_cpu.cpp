// Policy and value loss on the CPU: value, gradient and metrics of a tile of tokens in one pass, while it is in cache.
#include "active.h"
#include "ops.h"
#include "vector.h"

namespace rlhf {
namespace {

void clear(float* out, long first, long last) {
  if (out && last > first) std::memset(out + first, 0, (last - first) * sizeof(float));
}

// Everything a tile of the policy loss holds, token by token.
struct PolicyTile {
  float copies[7][kActiveTile];
  float loss[kActiveTile], derivative[kActiveTile], log_ratio[kActiveTile], ratio[kActiveTile], kl3[kActiveTile];
  float clipped[kActiveTile], clipped_low[kActiveTile], grad_entropy[kActiveTile];
};

// Three loops and not one: a core has several tokens in flight only if it can look that far ahead.
RLHF_VECTOR void ratios(const float* __restrict logprobs, const float* __restrict old_logprobs, int count,
                        PolicyTile& __restrict out) {
  for (int i = 0; i < count; ++i) {
    out.log_ratio[i] = bounded_log_ratio(logprobs[i], old_logprobs[i]);
    out.ratio[i] = exponential(out.log_ratio[i]);
  }
  for (int i = 0; i < count; ++i) out.kl3[i] = k3_estimate(-out.log_ratio[i], out.ratio[i]);
}

RLHF_VECTOR void clipped_objective(PolicyOptions options, const float* __restrict logprobs,
                                   const float* __restrict old_logprobs, const float* __restrict advantages, int count,
                                   PolicyTile& __restrict out) {
  for (int i = 0; i < count; ++i) {
    const PolicyToken token = policy_token(options, logprobs[i] - old_logprobs[i], out.ratio[i], advantages[i]);
    out.loss[i] = token.loss, out.derivative[i] = token.derivative;
    out.clipped[i] = token.clipped, out.clipped_low[i] = token.clipped_low;
  }
}

RLHF_VECTOR void add_kl(KlOptions o, float coef, const float* __restrict logprobs, const float* __restrict ref_logprobs,
                        int count, PolicyTile& __restrict out) {
  with_kind(o.kind, [=, &out](auto kind) RLHF_INLINE {
    for (int i = 0; i < count; ++i) {
      const float d = logprobs[i] - ref_logprobs[i];
      out.loss[i] += coef * kl_estimate<kind.kValue>(o, d);
      out.derivative[i] += coef * kl_derivative<kind.kValue>(o, d);
    }
  });
}

RLHF_VECTOR void sums_of(const PolicyTile& tile, int count, double* metrics) {
  metrics[kLoss] = lane_sum(count, [&](int i) -> double { return tile.loss[i]; });
  metrics[kClipped] = lane_sum(count, [&](int i) -> double { return tile.clipped[i]; });
  metrics[kClippedLow] = lane_sum(count, [&](int i) -> double { return tile.clipped_low[i]; });
  metrics[kKl1Sum] = -lane_sum(count, [&](int i) -> double { return tile.log_ratio[i]; });
  metrics[kKl3Sum] = lane_sum(count, [&](int i) -> double { return tile.kl3[i]; });
  metrics[kRatio] = lane_sum(count, [&](int i) -> double { return tile.ratio[i]; });
  std::int32_t most = 0;  // of the bits: without the sign they are in the numbers' order, NaN behind infinity
  for (int i = 0; i < count; ++i) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(fabsf(tile.log_ratio[i]));
    most = bits > most ? bits : most;
  }
  metrics[kLogRatioMax] = std::bit_cast<float>(most);
}

RLHF_VECTOR void policy_tile(const PolicyLoss& op, const ActiveTile& active, PolicyTile& tile, double* metrics) {
  const int count = active.count;
  const float* logprobs = active.gather(op.logprobs, tile.copies[0]);
  const float* old_logprobs = active.gather(op.old_logprobs, tile.copies[1]);
  ratios(logprobs, old_logprobs, count, tile);
  clipped_objective(op.options, logprobs, old_logprobs, active.gather(op.advantages, tile.copies[2]), count, tile);
  if (op.is_weights) {
    const float* w = active.gather(op.is_weights, tile.copies[3]);
    for (int i = 0; i < count; ++i) tile.loss[i] *= w[i], tile.derivative[i] *= w[i];
  }
  metrics[kEntropy] = 0.0;
  if (op.entropy) {
    const float* entropy = active.gather(op.entropy, tile.copies[4]);
    for (int i = 0; i < count; ++i) tile.loss[i] -= op.entropy_coef * entropy[i];
    metrics[kEntropy] = lane_sum(count, [=](int i) -> double { return entropy[i]; });
  }
  if (op.ref_logprobs) add_kl(op.kl, op.kl_coef, logprobs, active.gather(op.ref_logprobs, tile.copies[5]), count, tile);
  const float* weights = op.weights ? active.gather(op.weights, tile.copies[6]) : nullptr;
  for (int i = 0; i < count; ++i) {
    const float w = weights ? weights[i] : 1.f;
    tile.loss[i] *= w;
    tile.derivative[i] *= w * op.scale;
    tile.grad_entropy[i] = -op.entropy_coef * (w * op.scale);
  }
  sums_of(tile, count, metrics);
  if (op.grad_logprobs) active.scatter(tile.derivative, op.grad_logprobs);
  if (op.grad_entropy) active.scatter(tile.grad_entropy, op.grad_entropy);
}

struct ValueTile {
  float copies[4][kActiveTile], loss[kActiveTile], derivative[kActiveTile], clipped[kActiveTile];
};

RLHF_VECTOR void value_tile(const ValueLoss& op, const ActiveTile& active, ValueTile& tile, double* metrics) {
  const int count = active.count;
  const float* values = active.gather(op.values, tile.copies[0]);
  const float* old_values = active.gather(op.old_values, tile.copies[1]);
  const float* returns = active.gather(op.returns, tile.copies[2]);
  const float* weights = op.weights ? active.gather(op.weights, tile.copies[3]) : nullptr;
  for (int i = 0; i < count; ++i) {
    const ValueToken token = value_token(op.bound, values[i], old_values[i], returns[i]);
    const float w = weights ? weights[i] : 1.f;
    tile.loss[i] = token.loss * w;
    tile.derivative[i] = token.derivative * (w * op.scale);
    tile.clipped[i] = token.clipped;
  }
  const auto error = [=](int i) { return static_cast<double>(returns[i] - values[i]); };
  metrics[kValueLoss] = lane_sum(count, [&](int i) -> double { return tile.loss[i]; });
  metrics[kValue] = lane_sum(count, [=](int i) -> double { return values[i]; });
  metrics[kValueClipped] = lane_sum(count, [&](int i) -> double { return tile.clipped[i]; });
  metrics[kReturn] = lane_sum(count, [=](int i) -> double { return returns[i]; });
  metrics[kReturnSquare] = lane_sum(count, [=](int i) { return static_cast<double>(returns[i]) * returns[i]; });
  metrics[kError] = lane_sum(count, error);
  metrics[kErrorSquare] = lane_sum(count, [=](int i) { return error(i) * error(i); });
  if (op.grad_values) active.scatter(tile.derivative, op.grad_values);
}

}  // namespace
}  // namespace rlhf

using namespace rlhf;

extern "C" void rlhf_policy_loss_cpu(const PolicyLoss* op, long size, const long* before, double* metrics, long first,
                                     long last) {
  thread_local PolicyTile tile;
  const auto work = [&](long t, const ActiveTile& active) {
    policy_tile(*op, active, tile, metrics + t * kPolicyMetrics);
  };
  const auto gap = [&](long begin, long end) { clear(op->grad_logprobs, begin, end), clear(op->grad_entropy, begin, end); };
  each_tile(op->mask, size, before, first, last, work, gap);
}

extern "C" void rlhf_value_loss_cpu(const ValueLoss* op, long size, const long* before, double* metrics, long first,
                                    long last) {
  thread_local ValueTile tile;
  const auto work = [&](long t, const ActiveTile& active) {
    value_tile(*op, active, tile, metrics + t * kValueMetrics);
  };
  each_tile(op->mask, size, before, first, last, work, [&](long begin, long end) { clear(op->grad_values, begin, end); });
}
