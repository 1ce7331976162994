// What the kernels use of CUDA. Under nvcc it is CUDA; under a plain C++ compiler tests/cuda_shim.h supplies the same on
// the CPU, one fiber per thread, so that every line of a kernel runs where there is no GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define RLHF_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define RLHF_LAST_ERROR() static_cast<int>(cudaGetLastError())
#else
#include "cuda_shim.h"
#endif

namespace rlhf {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

}  // namespace rlhf
