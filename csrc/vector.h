// How CPU loops become vector code on every machine a wheel may land on, with the same bits on each.
#pragma once

#include "moments.h"

// Compiled once for AVX2 and once for the baseline, chosen at load time. Fused multiply-add stays off in both
// (-ffp-contract=off), so the bits are the same.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define RLHF_VECTOR __attribute__((target_clones("avx2", "default")))
#else
#define RLHF_VECTOR
#endif

// On lambdas in such functions: one that is called would be baseline code.
#define RLHF_INLINE __attribute__((always_inline))

namespace rlhf {

constexpr int kSumLanes = 8;

// Eight running sums, folded in a fixed order; of f(i), which must be pure.
template <class F>
inline double lane_sum(int count, const F& f) {
  double lanes[kSumLanes] = {};
  int i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (int l = 0; l < kSumLanes; ++l) lanes[l] += f(i + l);
  for (int l = 0; i < count; ++i, ++l) lanes[l] += f(i);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

inline Moments moments_of(const float* x, int count) {
  if (count == 0) return {};
  const double mean = lane_sum(count, [=](int i) -> double { return x[i]; }) / count;
  return {static_cast<double>(count), mean, lane_sum(count, [=](int i) { return (x[i] - mean) * (x[i] - mean); })};
}

}  // namespace rlhf
