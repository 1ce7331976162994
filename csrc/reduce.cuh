// Sums over a block in a fixed order.
#pragma once

#include "cuda_compat.h"
#include "moments.h"

namespace rlhf {

constexpr int kReduceThreads = 256, kReduceWarps = kReduceThreads / kWarp;

// The sum over a block of kReduceThreads, known to all its threads; `shared` holds kReduceWarps numbers.
__device__ inline double block_sum(double x, double* shared) {
  for (int o = kWarp / 2; o; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  __syncthreads();  // the previous use of `shared` is over
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < kReduceWarps; ++w) sum += shared[w];
  return sum;
}

}  // namespace rlhf
