// The softmax of a language model's head, from a tile of its logits: what the three operators of bindings_head.cpp do,
// row by row and segment by segment.
//
//     z' = softcap tanh(logit_scale (z + bias) / softcap) / temperature           (without a cap: logit_scale (z + bias))
//     of a segment of columns:  m = max z',  s = sum exp(z' - m),  u = sum exp(z' - m) (z' - m)
//     of a row, merged:         ls = log s,  mu = u / s,  logprob = (z'_y - m) - ls <= 0,  entropy = ls - mu
//     gradient:                 dz'_v = g_l ([v = y] - p_v) + g_e p_v (mu - (z'_v - m)),  p_v = exp(z'_v - m - ls)
//
// Segments are counted from the tile's first column, so a row has the same bits whoever folds it with which others.
#pragma once

#include <cstdint>

namespace rlhf {

constexpr int kHeadSegment = 2048;  // three float arrays of it fit a core's first cache

// What a fold leaves of a segment, in the order of the operators' result; the last two only if asked for.
enum HeadPart : int { kPartMaximum, kPartSum, kPartMoment, kPartTarget, kUsualParts, kPartSquares = kUsualParts, kPartBest, kAllParts };
enum HeadStatistic : int {
  kLogprob, kHeadEntropy, kMaximum, kLogSum, kMean, kTargetLogit, kUsualStatistics, kTop1 = kUsualStatistics, kSumOfSquares,
  kAllStatistics
};

struct HeadTile {
  const void* logits;  // float32, or bfloat16 if `narrow`
  bool narrow;
  long rows, columns;
  long inner, outer_stride, stride;  // row r begins at (r / inner) outer_stride + (r % inner) stride
  const long* targets;               // (rows), in the whole vocabulary
  const float *bias, *temperature, *target_logits;  // (columns), (rows), (rows): each may be null
  float logit_scale, softcap, inverse_temperature;  // softcap 0: none
  long start;                                       // the first column's token
  long ignore_index;
};

struct HeadGradient {
  const float *statistics;  // (kUsualStatistics or more, rows)
  const float *grad_logprobs, *grad_entropy;  // (rows) by stride, may be null
  long logprobs_stride, entropy_stride;
  void* out;  // may be the logits
  bool out_narrow;
  long out_outer_stride, out_stride;
};

inline long head_segments(long columns) { return (columns + kHeadSegment - 1) / kHeadSegment; }

}  // namespace rlhf

#pragma GCC visibility push(default)
extern "C" {
// Pairs (row, segment) [first, last), a row's segments next to each other; parts (segments, fields, rows).
void rlhf_head_fold_cpu(const rlhf::HeadTile* op, int fields, float* parts, long first, long last);
// Rows [first, last): parts (segments, fields, rows) -> statistics (fields + 2, rows).
void rlhf_head_combine_cpu(const float* parts, long segments, int fields, long rows, const long* targets, long start,
                           long vocabulary, long ignore_index, float* statistics, long first, long last);
// Rows [first, last).
void rlhf_head_gradient_cpu(const rlhf::HeadTile* op, const rlhf::HeadGradient* gradient, long first, long last);
}
#pragma GCC visibility pop
