// Count, mean and sum of squared deviations of some numbers, merged in a fixed order so that results repeat bit by bit.
#pragma once

#include <math.h>

#include "host_device.h"

namespace rlhf {

struct Moments {
  double count, mean, squares;  // squares: sum of (x - mean)^2
};

// Chan, Golub, LeVeque 1979. Merging with nothing changes no bit.
RLHF_FN Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.0) return a;
  if (a.count == 0.0) return b;
  const double count = a.count + b.count, apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

struct WhitenOptions {
  int ddof;  // 0 biased variance, 1 Bessel's
  double eps;
  bool add_eps;  // rsqrt(var + eps), else rsqrt(max(var, eps))
  bool center, zero_masked;
};

struct Affine {
  float shift, scale, back;  // (x - shift) * scale + back
};

// No token and one token give finite numbers.
RLHF_FN Affine whitening(const Moments& m, const WhitenOptions& o) {
  const double degrees = m.count - o.ddof, variance = m.squares / (degrees > 1.0 ? degrees : 1.0);
  const double under_root = o.add_eps ? variance + o.eps : (variance > o.eps ? variance : o.eps);
  const float mean = static_cast<float>(m.mean);
  return {mean, static_cast<float>(1.0 / sqrt(under_root)), o.center ? 0.f : mean};
}

RLHF_FN float whitened(float x, const Affine& a) { return (x - a.shift) * a.scale + a.back; }

}  // namespace rlhf
