// The recurrence of gae.h over a padded batch on the CPU.
#include "gae.h"

// Below this many elements a thread costs more to wake than it saves (waking one is a few microseconds; an element is
// about a nanosecond).
static constexpr long kMinParallel = 1 << 15;

extern "C" void rlhf_gae_cpu(const float* rewards, const float* values, const bool* mask, long rows, long length,
                             float gamma, float gamma_lam, float* advantages, float* returns) {
#pragma omp parallel for if (rows * length >= kMinParallel)
  for (long row = 0; row < rows; ++row) {
    const long start = row * length;
    rlhf::gae_row(rewards + start, values + start, mask + start, length, gamma, gamma_lam, advantages + start,
                  returns + start);
  }
}
