// Functions marked RLHF_FN hold the formulas; the CPU paths and the CUDA kernels call the same ones.
#pragma once

#ifdef __CUDACC__
#define RLHF_FN __host__ __device__ inline
#else
#define RLHF_FN __attribute__((always_inline)) inline  // also into code compiled for other targets
#endif
