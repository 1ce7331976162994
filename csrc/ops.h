// What the ops take and do, as plain structs and C functions: raw pointers to contiguous arrays, no torch.
//
// CPU functions do a part of the work, [first, last) of some unit, so that whoever calls them brings the threads. Which
// thread does which part changes no bit of any result.
#pragma once

#include "losses.h"
#include "moments.h"

namespace rlhf {

// Sequences are rows of `length` positions, or, packed, the stretches between neighbouring `offsets`.
struct Sequences {
  const bool* mask;  // trainable tokens
  const long* offsets;  // (count + 1), or null
  long count, length;
};

struct Shaping {
  const float *scores;  // (count), one per sequence
  const float *logprobs, *ref_logprobs;
  KlOptions kl;
  float kl_coef, score_bound;  // bound infinite: scores as they are
  bool after;  // the score goes to the slot after the last trainable token, where the sequence has one
  float *rewards, *kl_out;
  bool* value_mask;
};

struct Gae {
  Sequences sequences;
  const float *rewards, *values;
  const double *lam, *value_lam;  // one per sequence, or null
  const float* bootstrap;         // one per sequence, or null
  double gamma, lam_all, value_lam_all;
  bool two_lambdas;  // returns by value_lam, advantages by lam
  bool decay;        // how the recursion passes masked tokens between trainable ones
  bool shaped;  // rewards come from `shaping`
  Shaping shaping;
  float *advantages, *returns;
  Moments* moments;  // (count), of the trainable tokens' advantages; or null
};

struct Whiten {
  const float* x;
  const bool* mask;
  WhitenOptions options;
  Moments moments;
  float* out;  // may be x
};

// Sums over tokens (and a maximum), finalised by whoever logs them. In the vector an op returns, the number of tokens
// stands in place of the loss.
enum PolicyMetric : int { kLoss, kClipped, kClippedLow, kKl1Sum, kKl3Sum, kRatio, kLogRatioMax, kEntropy, kPolicyMetrics };
enum ValueMetric : int { kValueLoss, kValue, kValueClipped, kReturn, kReturnSquare, kError, kErrorSquare, kValueMetrics };

struct PolicyLoss {
  const float *logprobs, *old_logprobs, *advantages;
  const bool* mask;
  const float *is_weights, *entropy, *ref_logprobs, *weights;  // each may be null
  PolicyOptions options;
  KlOptions kl;
  float entropy_coef, kl_coef;
  float scale;                          // 1 / denom
  float *grad_logprobs, *grad_entropy;  // of the scaled loss; each may be null
};

struct ValueLoss {
  const float *values, *old_values, *returns;
  const bool* mask;
  const float* weights;  // may be null
  float bound, scale;
  float* grad_values;  // may be null
};

// How a batch is laid out on a GPU; a function of its shape alone. `moments` of Gae then has count * chunks entries.
enum GaeMode : int { kWarpEach, kBlockEach, kSplit };

struct GaePlan {
  int mode;
  long chunks, map_bytes;
};

constexpr long kManySequences = 256;  // fill a GPU with a block each

}  // namespace rlhf

#pragma GCC visibility push(default)  // for the module in python.cpp
extern "C" {
// Sequences [first, last).
void rlhf_gae_cpu(const rlhf::Gae* op, long first, long last);
// Positions [first, last).
void rlhf_whiten_cpu(const rlhf::Whiten* op, long first, long last);
void rlhf_kl_cpu(const rlhf::KlOptions* options, const float* logprobs, const float* ref_logprobs, float* value,
                 float* derivative, long first, long last);
// Tokens per block of kCountBlock positions, blocks [first, last).
void rlhf_count_cpu(const bool* mask, long size, long* counts, long first, long last);
// Tiles [first, last) of kActiveTile tokens; `before` as in locate(). What lies in front of the first token and behind
// the last one is cleared by the first and the last tile.
void rlhf_moments_cpu(const float* x, const bool* mask, long size, const long* before, rlhf::Moments* moments, long first,
                      long last);
void rlhf_policy_loss_cpu(const rlhf::PolicyLoss* op, long size, const long* before, double* metrics, long first, long last);
void rlhf_value_loss_cpu(const rlhf::ValueLoss* op, long size, const long* before, double* metrics, long first, long last);

// On the GPU, all at once on `stream`; each returns a cudaError_t.
rlhf::GaePlan rlhf_gae_plan(long count, long length, long size, bool packed);
int rlhf_gae_cuda(const rlhf::Gae* op, rlhf::GaePlan plan, void* maps, void* stream);
// `parts` (count, chunks): moments to be merged, in order; written first, by blocks of kMomentsBlock positions, if `find`.
int rlhf_whiten_cuda(const rlhf::Whiten* op, rlhf::Moments* parts, long count, long chunks, bool find, long size,
                     void* stream);
long rlhf_moments_blocks(long size);
int rlhf_kl_cuda(const rlhf::KlOptions* options, const float* logprobs, const float* ref_logprobs, float* value,
                 float* derivative, long size, void* stream);
// `denom`: on the device, or null for the number `denom_number`, negative for the count of tokens. `workspace` of
// rlhf_loss_workspace(size) bytes, of any content.
long rlhf_loss_workspace(long size);
int rlhf_policy_loss_cuda(const rlhf::PolicyLoss* op, long size, const float* denom, double denom_number, void* workspace,
                          float* loss, double* metrics, void* stream);
int rlhf_value_loss_cuda(const rlhf::ValueLoss* op, long size, const float* denom, double denom_number, void* workspace,
                         float* loss, double* metrics, void* stream);
const char* rlhf_cuda_error(int error);
}
#pragma GCC visibility pop
