// Whitening and KL estimates on the GPU. Moments are found per block of positions and merged by every block that needs
// them, in one order, so that no block waits for another.
#include "ops.h"
#include "reduce.cuh"

namespace rlhf {
namespace {

constexpr int kPerThread = 16, kMomentsBlock = kReduceThreads * kPerThread;
constexpr long kFoldedByAll = 8192;  // parts; more are merged once, by a launch of their own

__global__ void __launch_bounds__(kReduceThreads) find_moments(const float* x, const bool* mask, long size, Moments* parts) {
  __shared__ double shared[kReduceWarps];
  const long first = static_cast<long>(blockIdx.x) * kMomentsBlock + threadIdx.x;
  double sum = 0.0, count = 0.0;
  for (int k = 0; k < kPerThread; ++k) {
    const long i = first + k * kReduceThreads;
    if (i < size && mask[i]) sum += x[i], count += 1.0;
  }
  count = block_sum(count, shared);
  sum = block_sum(sum, shared);
  const double mean = count > 0.0 ? sum / count : 0.0;
  double squares = 0.0;
  for (int k = 0; k < kPerThread; ++k) {
    const long i = first + k * kReduceThreads;
    if (i < size && mask[i]) squares += (x[i] - mean) * (x[i] - mean);
  }
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = {count, mean, squares};
}

// (count, chunks) moments: chunks of each in turn, then every kReduceThreads-th, then those sums one after the other.
__device__ Moments fold(const Moments* parts, long count, long chunks, Moments* shared) {
  Moments mine{};
  for (long i = threadIdx.x; i < count; i += kReduceThreads) {
    Moments one{};
    for (long c = 0; c < chunks; ++c) one = merge(one, parts[i * chunks + c]);
    mine = merge(mine, one);
  }
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kReduceThreads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] = merge(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  return shared[0];
}

__global__ void __launch_bounds__(kReduceThreads) fold_moments(Moments* parts, long count, long chunks) {
  __shared__ Moments shared[kReduceThreads];
  const Moments all = fold(parts, count, chunks, shared);
  if (threadIdx.x == 0) parts[0] = all;
}

__global__ void __launch_bounds__(kReduceThreads) whiten(Whiten op, const Moments* parts, long count, long chunks, long size) {
  __shared__ Moments shared[kReduceThreads];
  const Affine affine = whitening(fold(parts, count, chunks, shared), op.options);
  const long first = static_cast<long>(blockIdx.x) * kMomentsBlock + threadIdx.x;
  for (int k = 0; k < kPerThread; ++k) {
    const long i = first + k * kReduceThreads;
    if (i >= size) break;
    const bool kept = op.mask[i] || !op.options.zero_masked;
    op.out[i] = kept ? whitened(op.x[i], affine) : 0.f;
  }
}

template <int kind>
__global__ void __launch_bounds__(kReduceThreads) estimate_kl(KlOptions o, const float* logprobs, const float* ref_logprobs,
                                                              float* value, float* derivative, long size) {
  const long i = static_cast<long>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= size) return;
  const float d = logprobs[i] - ref_logprobs[i];
  value[i] = kl_estimate<kind>(o, d);
  if (derivative) derivative[i] = kl_derivative<kind>(o, d);
}

unsigned blocks_of(long size, long each) { return static_cast<unsigned>((size + each - 1) / each); }

}  // namespace
}  // namespace rlhf

using namespace rlhf;

extern "C" long rlhf_moments_blocks(long size) { return blocks_of(size, kMomentsBlock); }

extern "C" int rlhf_whiten_cuda(const Whiten* op, Moments* parts, long count, long chunks, bool find, long size, void* stream) {
  if (size == 0) return 0;
  const unsigned blocks = blocks_of(size, kMomentsBlock);
  if (find) RLHF_LAUNCH(find_moments, blocks, kReduceThreads, stream, op->x, op->mask, size, parts);
  if (count * chunks > kFoldedByAll) {
    RLHF_LAUNCH(fold_moments, 1, kReduceThreads, stream, parts, count, chunks);
    count = chunks = 1;
  }
  RLHF_LAUNCH(whiten, blocks, kReduceThreads, stream, *op, parts, count, chunks, size);
  return RLHF_LAST_ERROR();
}

extern "C" int rlhf_kl_cuda(const KlOptions* options, const float* logprobs, const float* ref_logprobs, float* value,
                            float* derivative, long size, void* stream) {
  if (size == 0) return 0;
  const unsigned blocks = blocks_of(size, kReduceThreads);
  const KlOptions o = *options;
  if (o.kind == kKlAbs) RLHF_LAUNCH(estimate_kl<kKlAbs>, blocks, kReduceThreads, stream, o, logprobs, ref_logprobs, value, derivative, size);
  else if (o.kind == kKl2) RLHF_LAUNCH(estimate_kl<kKl2>, blocks, kReduceThreads, stream, o, logprobs, ref_logprobs, value, derivative, size);
  else if (o.kind == kKl3) RLHF_LAUNCH(estimate_kl<kKl3>, blocks, kReduceThreads, stream, o, logprobs, ref_logprobs, value, derivative, size);
  else RLHF_LAUNCH(estimate_kl<kKl1>, blocks, kReduceThreads, stream, o, logprobs, ref_logprobs, value, derivative, size);
  return RLHF_LAST_ERROR();
}
