// Policy and value loss on the GPU: value, gradient and metrics in two launches. The first counts tokens, where the loss
// is divided by their number, and clears a counter; in the second the block that finishes last folds what all have left.
#include "losses.h"

#include "ops.h"
#include "reduce.cuh"

namespace rlhf {
namespace {

constexpr int kMostMetrics = kPolicyMetrics;  // which value losses have fewer of
constexpr int kPerThread = 8, kBlock = kReduceThreads * kPerThread;

struct Workspace {
  unsigned* finished;
  double* tokens;  // per block
  double* parts;   // (blocks, metrics)
};

long blocks_of(long size) { return size ? (size + kBlock - 1) / kBlock : 1; }

Workspace layout(void* memory, long size) {
  unsigned char* bytes = static_cast<unsigned char*>(memory);
  double* tokens = reinterpret_cast<double*>(bytes + 16);
  return {reinterpret_cast<unsigned*>(bytes), tokens, tokens + blocks_of(size)};
}

__device__ int largest_metric(const PolicyLoss*) { return kLogRatioMax; }
__device__ int largest_metric(const ValueLoss*) { return -1; }

__global__ void __launch_bounds__(kReduceThreads) count_tokens(const bool* mask, long size, Workspace work) {
  __shared__ double shared[kReduceWarps];
  double count = 0.0;
  for (int k = 0; k < kPerThread; ++k) {
    const long i = static_cast<long>(blockIdx.x) * kBlock + k * kReduceThreads + threadIdx.x;
    if (i < size && mask[i]) count += 1.0;
  }
  count = block_sum(count, shared);
  if (threadIdx.x) return;
  work.tokens[blockIdx.x] = count;
  if (blockIdx.x == 0) *work.finished = 0;
}

// 1 / the number the loss is divided by.
__device__ float scale_of(const float* denom, double number, const Workspace& work, double* shared) {
  double total = denom ? *denom : number;
  if (!denom && number < 0.0) {
    double count = 0.0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kReduceThreads) count += work.tokens[b];
    total = block_sum(count, shared);
  }
  return static_cast<float>(total <= 0.0 ? 1.0 : 1.0 / total);
}

__device__ void token(const PolicyLoss& op, long i, float scale, double* sums) {
  const float logprob = op.logprobs[i];
  const float old_logprob = op.old_logprobs[i], log_ratio = bounded_log_ratio(logprob, old_logprob);
  const float ratio = exponential(log_ratio);
  const PolicyToken t = policy_token(op.options, logprob - old_logprob, ratio, op.advantages[i]);
  float loss = t.loss, derivative = t.derivative;
  if (op.is_weights) loss *= op.is_weights[i], derivative *= op.is_weights[i];
  if (op.entropy) {
    loss -= op.entropy_coef * op.entropy[i];
    sums[kEntropy] += op.entropy[i];
  }
  if (op.ref_logprobs) {
    const float d = logprob - op.ref_logprobs[i];
    with_kind(op.kl.kind, [&](auto kind) {
      loss += op.kl_coef * kl_estimate<kind.kValue>(op.kl, d);
      derivative += op.kl_coef * kl_derivative<kind.kValue>(op.kl, d);
    });
  }
  const float weight = op.weights ? op.weights[i] : 1.f;
  if (op.grad_logprobs) op.grad_logprobs[i] = derivative * (weight * scale);
  if (op.grad_entropy) op.grad_entropy[i] = -op.entropy_coef * (weight * scale);
  sums[kLoss] += loss * weight;
  sums[kClipped] += t.clipped;
  sums[kClippedLow] += t.clipped_low;
  sums[kKl1Sum] += -log_ratio;
  sums[kKl3Sum] += k3_estimate(-log_ratio, ratio);
  sums[kRatio] += ratio;
  const double size = fabsf(log_ratio);
  if (size > sums[kLogRatioMax] || size != size) sums[kLogRatioMax] = size;
}

__device__ void no_token(const PolicyLoss& op, long i) {
  if (op.grad_logprobs) op.grad_logprobs[i] = 0.f;
  if (op.grad_entropy) op.grad_entropy[i] = 0.f;
}

__device__ void token(const ValueLoss& op, long i, float scale, double* sums) {
  const float value = op.values[i], target = op.returns[i];
  const ValueToken t = value_token(op.bound, value, op.old_values[i], target);
  const float weight = op.weights ? op.weights[i] : 1.f;
  if (op.grad_values) op.grad_values[i] = t.derivative * (weight * scale);
  const double error = static_cast<double>(target) - value;
  sums[kValueLoss] += t.loss * weight;
  sums[kValue] += value;
  sums[kValueClipped] += t.clipped;
  sums[kReturn] += target;
  sums[kReturnSquare] += static_cast<double>(target) * target;
  sums[kError] += error;
  sums[kErrorSquare] += error * error;
}

__device__ void no_token(const ValueLoss& op, long i) {
  if (op.grad_values) op.grad_values[i] = 0.f;
}

__device__ double greater(double a, double b) { return b > a || b != b ? b : a; }  // NaN is the greatest

// The block's sums, of which one may be a maximum, to work.parts.
template <int metrics>
__device__ void leave(const double* sums, int largest, const Workspace& work, double* shared) {
  for (int m = 0; m < metrics; ++m) {
    double x = sums[m];
    if (m != largest) {
      x = block_sum(x, shared);
    } else {
      for (int o = kWarp / 2; o; o /= 2) x = greater(x, __shfl_xor_sync(kAllLanes, x, o));
      __syncthreads();
      if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
      __syncthreads();
      for (int w = 0; w < kReduceWarps; ++w) x = greater(x, shared[w]);
    }
    if (threadIdx.x == 0) work.parts[static_cast<long>(blockIdx.x) * metrics + m] = x;
  }
}

// In the last block: warp m folds metric m.
template <int metrics>
__device__ void fold(int largest, const Workspace& work, float scale, float* loss, double* out) {
  static_assert(metrics <= kReduceWarps, "a warp each");
  const int m = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (m >= metrics) return;
  double x = 0.0, tokens = 0.0;
  for (unsigned b = lane; b < gridDim.x; b += kWarp) {
    const double part = __ldcg(work.parts + static_cast<long>(b) * metrics + m);
    x = m == largest ? greater(x, part) : x + part;
    tokens += work.tokens[b];
  }
  for (int o = kWarp / 2; o; o /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, x, o);
    x = m == largest ? greater(x, other) : x + other;
    tokens += __shfl_xor_sync(kAllLanes, tokens, o);
  }
  if (lane) return;
  if (m == 0) *loss = static_cast<float>(x * scale);
  out[m] = m == 0 ? tokens : x;
}

template <class Op, int metrics>
__global__ void __launch_bounds__(kReduceThreads) loss_and_gradient(Op op, long size, const float* denom, double number,
                                                                    Workspace work, float* loss, double* out) {
  __shared__ double shared[kReduceWarps];
  __shared__ bool last;
  const float scale = scale_of(denom, number, work, shared);
  double sums[metrics] = {};
  for (int k = 0; k < kPerThread; ++k) {
    const long i = static_cast<long>(blockIdx.x) * kBlock + k * kReduceThreads + threadIdx.x;
    if (i >= size) break;
    if (op.mask[i]) token(op, i, scale, sums);
    else no_token(op, i);
  }
  const int largest = largest_metric(&op);
  leave<metrics>(sums, largest, work, shared);
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(work.finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) fold<metrics>(largest, work, scale, loss, out);
}

template <class Op, int metrics>
int run(const Op& op, long size, const float* denom, double number, void* memory, float* loss, double* out, void* stream) {
  const Workspace work = layout(memory, size);
  const unsigned blocks = static_cast<unsigned>(blocks_of(size));
  RLHF_LAUNCH(count_tokens, blocks, kReduceThreads, stream, op.mask, size, work);
  RLHF_LAUNCH((loss_and_gradient<Op, metrics>), blocks, kReduceThreads, stream, op, size, denom, number, work, loss, out);
  return RLHF_LAST_ERROR();
}

}  // namespace
}  // namespace rlhf

using namespace rlhf;

extern "C" long rlhf_loss_workspace(long size) {
  return 16 + static_cast<long>(sizeof(double)) * blocks_of(size) * (1 + kMostMetrics);
}

extern "C" int rlhf_policy_loss_cuda(const PolicyLoss* op, long size, const float* denom, double denom_number, void* workspace,
                                     float* loss, double* metrics, void* stream) {
  return run<PolicyLoss, kPolicyMetrics>(*op, size, denom, denom_number, workspace, loss, metrics, stream);
}

extern "C" int rlhf_value_loss_cuda(const ValueLoss* op, long size, const float* denom, double denom_number, void* workspace,
                                    float* loss, double* metrics, void* stream) {
  return run<ValueLoss, kValueMetrics>(*op, size, denom, denom_number, workspace, loss, metrics, stream);
}

#ifdef __CUDACC__
extern "C" const char* rlhf_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#else
extern "C" const char* rlhf_cuda_error(int) { return "on the CPU"; }
#endif
