// Advantages of one sequence: the recurrence itself, for host and device alike. No torch, no CUDA header.
//
//     delta_t = r_t + gamma V_p - V_t       A_t = delta_t + gamma lam A_p       R_t = A_t + V_t
//
// p is the next unmasked position ("carry": the recursion steps over holes), V_p = A_p = 0 after the last one. Masked
// positions are never read, so their content cannot matter; their outputs are 0. Everything is fp32, from the end.
#pragma once

#ifdef __CUDACC__
#define RLHF_HOST_DEVICE __host__ __device__
#else
#define RLHF_HOST_DEVICE
#endif

namespace rlhf {

RLHF_HOST_DEVICE inline void gae_row(const float* rewards, const float* values, const bool* mask, long length,
                                     float gamma, float gamma_lam, float* advantages, float* returns) {
  float next_value = 0.f, next_advantage = 0.f;
  for (long t = length - 1; t >= 0; --t) {
    if (!mask[t]) {
      advantages[t] = returns[t] = 0.f;
      continue;
    }
    const float value = values[t];
    const float delta = rewards[t] + gamma * next_value - value;
    next_advantage = delta + gamma_lam * next_advantage;
    next_value = value;
    advantages[t] = next_advantage;
    returns[t] = next_advantage + value;
  }
}

}  // namespace rlhf

// Padded (rows, length), contiguous. gae_cpu.cpp; a thread takes whole rows, so bits do not depend on their number.
extern "C" void rlhf_gae_cpu(const float* rewards, const float* values, const bool* mask, long rows, long length,
                             float gamma, float gamma_lam, float* advantages, float* returns);
