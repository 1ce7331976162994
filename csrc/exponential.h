// exp and the k3 estimator in float32, accurate to about an ulp, without a table or a branch, so that loops over them
// become vector code. libm's expf is a call per element; -ffast-math would flush denormals in the whole process.
#pragma once

#include <math.h>

#include "host_device.h"

#ifndef __CUDA_ARCH__
#include <bit>
#include <cstdint>
#endif

namespace rlhf {

#ifdef __CUDA_ARCH__
RLHF_FN float exponential(float x) { return expf(x); }
#else
RLHF_FN float power_of_two(std::int32_t n) { return std::bit_cast<float>((n + 127) << 23); }

RLHF_FN float exponential(float x) {
  // Beyond these bounds the result is 0 or infinite; NaN fails both comparisons and stays.
  x = x > 89.f ? 89.f : x;
  x = x < -104.f ? -104.f : x;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float n = (x * 1.44269504f + kRound) - kRound;
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9841270e-4f;  // Taylor on |r| <= ln(2) / 2: the next term is below 6e-9
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 5.0e-1f;
  p = (p * (r * r) + r) + 1.f;
  // 2^n in two factors: one alone cannot reach denormal results, nor 2^128.
  const std::int32_t whole = static_cast<std::int32_t>(n), half = whole >> 1;
  return (p * power_of_two(half)) * power_of_two(whole - half);
}
#endif

// exp(-d) - 1 + d >= 0. Near 0 the three terms cancel, so there it is d^2 times a series.
RLHF_FN float k3_estimate(float d, float exp_of_minus_d) {
  float p = 2.4801587e-5f;
  p = p * -d + 1.9841270e-4f;
  p = p * -d + 1.3888889e-3f;
  p = p * -d + 8.3333333e-3f;
  p = p * -d + 4.1666667e-2f;
  p = p * -d + 1.6666667e-1f;
  p = p * -d + 5.0e-1f;
  const float near = p * (d * d), far = (exp_of_minus_d - 1.f) + d;
  return fabsf(d) < 0.5f ? near : far;
}

}  // namespace rlhf
