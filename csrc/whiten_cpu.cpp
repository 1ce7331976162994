// Whitening and KL estimates on the CPU, and the counting of tokens that the losses need too.
#include "active.h"
#include "ops.h"
#include "vector.h"

namespace rlhf {
namespace {

RLHF_VECTOR void whiten(const Whiten& op, long first, long last) {
  const Affine affine = whitening(op.moments, op.options);
  if (op.options.zero_masked) {
    for (long i = first; i < last; ++i) op.out[i] = op.mask[i] ? whitened(op.x[i], affine) : 0.f;
  } else {
    for (long i = first; i < last; ++i) op.out[i] = whitened(op.x[i], affine);
  }
}

RLHF_VECTOR void kl(KlOptions o, const float* logprobs, const float* ref_logprobs, float* value,
                    float* derivative, long first, long last) {
  with_kind(o.kind, [=](auto kind) RLHF_INLINE {
    for (long i = first; i < last; ++i) value[i] = kl_estimate<kind.kValue>(o, logprobs[i] - ref_logprobs[i]);
    if (!derivative) return;
    for (long i = first; i < last; ++i) derivative[i] = kl_derivative<kind.kValue>(o, logprobs[i] - ref_logprobs[i]);
  });
}

RLHF_VECTOR Moments tile_moments(const float* x, int count) { return moments_of(x, count); }

}  // namespace
}  // namespace rlhf

using namespace rlhf;

extern "C" void rlhf_whiten_cpu(const Whiten* op, long first, long last) { whiten(*op, first, last); }

extern "C" void rlhf_kl_cpu(const KlOptions* options, const float* logprobs, const float* ref_logprobs, float* value,
                            float* derivative, long first, long last) {
  kl(*options, logprobs, ref_logprobs, value, derivative, first, last);
}

extern "C" void rlhf_count_cpu(const bool* mask, long size, long* counts, long first, long last) {
  for (long block = first; block < last; ++block) {
    const long end = (block + 1) * kCountBlock;
    counts[block] = count_true(mask, block * kCountBlock, end < size ? end : size);
  }
}

extern "C" void rlhf_moments_cpu(const float* x, const bool* mask, long size, const long* before, Moments* moments, long first,
                                 long last) {
  thread_local float copy[kActiveTile];
  const auto work = [&](long t, const ActiveTile& tile) { moments[t] = tile_moments(tile.gather(x, copy), tile.count); };
  each_tile(mask, size, before, first, last, work, [](long, long) {});
}
