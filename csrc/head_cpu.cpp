// The head's softmax on the CPU: a segment of a row at a time, in buffers that stay in the first cache. Short loops over
// them, one step each, become vector code; one loop over the whole formula would not.
#include "head.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "exponential.h"
#include "vector.h"

namespace rlhf {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kLanes = 32;  // segments are filled up to a multiple of it

struct Segment {
  float z[kHeadSegment];      // z', behind the last column -inf
  float slope[kHeadSegment];  // dz'/dz without scale and temperature, where there is a cap
  float e[kHeadSegment];
};

RLHF_FN float from_bfloat16(std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

RLHF_FN std::uint16_t to_bfloat16(float x) {  // to the nearest, ties to even; a NaN keeps its sign and stays one
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<std::uint16_t>(x == x ? rounded : (bits >> 16) | 0x40);
}

RLHF_FN float hyperbolic_tangent(float x) {
  // A minimax polynomial below .65, relative error 7e-9; beyond, 1 - 2 / (exp(2 |x|) + 1) loses nothing any more.
  const float a = std::fabs(x), q = x * x;
  float p = -0.0055151586f;
  p = p * q + 0.020469414f;
  p = p * q + -0.05368802f;
  p = p * q + 0.1333083f;
  p = p * q + -0.3333326f;
  const float near = x + x * (q * p), far = 1.f - 2.f / (exponential(2.f * a) + 1.f);
  return a < 0.65f ? near : std::copysign(far, x);
}

RLHF_VECTOR void widen(const std::uint16_t* __restrict logits, int count, float* __restrict z) {
  for (int i = 0; i < count; ++i) z[i] = from_bfloat16(logits[i]);
}

RLHF_VECTOR void narrow(const float* __restrict x, int count, std::uint16_t* __restrict out) {
  for (int i = 0; i < count; ++i) out[i] = to_bfloat16(x[i]);
}

RLHF_VECTOR void add(const float* __restrict bias, int count, float* __restrict z) {
  for (int i = 0; i < count; ++i) z[i] += bias[i];
}

RLHF_VECTOR void multiply(float factor, int count, float* z) {
  for (int i = 0; i < count; ++i) z[i] *= factor;
}

RLHF_VECTOR void cap(float logit_scale, float softcap, float inverse_temperature, int count, Segment& s) {
  const float inner = logit_scale / softcap, outer = softcap * inverse_temperature;
  for (int i = 0; i < count; ++i) {
    const float t = hyperbolic_tangent(s.z[i] * inner);
    s.slope[i] = 1.f - t * t;
    s.z[i] = s.z[i] == -kInf ? s.z[i] : outer * t;
  }
}

RLHF_VECTOR float largest(const float* z, int padded) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInf;
  for (int i = 0; i < padded; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = z[i + l] > lanes[l] ? z[i + l] : lanes[l];
  return *std::max_element(lanes, lanes + kLanes);
}

RLHF_VECTOR void powers(const float* __restrict z, float m, int count, float* __restrict e) {
  for (int i = 0; i < count; ++i) e[i] = exponential(z[i] - m);
}

struct Sums {
  float sum, moment, squares;
};

// Four numbers a lane in float, the rest in double: beside the 1 of a likely token small terms would lose their digits.
template <class F>
RLHF_FN float sum_of(int padded, const F& f) {
  constexpr int kFew = 4 * kLanes;
  double lanes[kLanes] = {};
  for (int i = 0; i < padded; i += kFew) {
    float few[kLanes] = {};
    const int stop = i + kFew < padded ? i + kFew : padded;
    for (int k = i; k < stop; k += kLanes)
      for (int l = 0; l < kLanes; ++l) few[l] += f(k + l);
    for (int l = 0; l < kLanes; ++l) lanes[l] += few[l];
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

RLHF_VECTOR Sums sums_of(const float* __restrict z, const float* __restrict e, float m, int padded, bool squares) {
  const auto moment = [=](int i) RLHF_INLINE {
    const float d = z[i] - m;
    return e[i] * (d == -kInf ? 0.f : d);  // a banned token: 0 * -inf counts as 0
  };
  const auto square = [=](int i) RLHF_INLINE { return e[i] * e[i]; };
  return {sum_of(padded, [=](int i) RLHF_INLINE { return e[i]; }), sum_of(padded, moment), squares ? sum_of(padded, square) : 0.f};
}

// d z into s.z: p (g_e (mu - d) - g_l), the target's own term apart.
RLHF_VECTOR void slopes(float m, float ls, float mu, float g_l, float g_e, int count, Segment& s) {
  for (int i = 0; i < count; ++i) {
    const float d = s.z[i] - m, p = exponential(d - ls);
    s.z[i] = p * (g_e * (mu - (d == -kInf ? 0.f : d)) - g_l);
  }
}

RLHF_VECTOR void chain(float factor, int count, Segment& s) {
  for (int i = 0; i < count; ++i) s.z[i] *= factor * s.slope[i];
}

float inverse_temperature(const HeadTile& op, long row) {
  if (!op.temperature) return op.inverse_temperature;
  return op.temperature[row] > 0.f ? 1.f / op.temperature[row] : kNan;
}

template <class T>
T* row_of(T* tile, long row, long inner, long outer_stride, long stride) {
  return tile + row / inner * outer_stride + row % inner * stride;
}

// z' of a segment of a row. Returns the column of the row's target in it, or -1.
int load(const HeadTile& op, long row, long first, int count, Segment& s) {
  if (op.narrow)
    widen(row_of(static_cast<const std::uint16_t*>(op.logits), row, op.inner, op.outer_stride, op.stride) + first, count, s.z);
  else
    std::memcpy(s.z, row_of(static_cast<const float*>(op.logits), row, op.inner, op.outer_stride, op.stride) + first,
                count * sizeof(float));
  const long y = op.targets[row] - op.start - first;
  const int target = y >= 0 && y < count ? static_cast<int>(y) : -1;
  if (target >= 0 && op.target_logits) s.z[target] = op.target_logits[row];
  if (op.bias) add(op.bias + first, count, s.z);
  const float t = inverse_temperature(op, row);
  if (op.softcap > 0.f) cap(op.logit_scale, op.softcap, t, count, s);
  else if (op.logit_scale * t != 1.f) multiply(op.logit_scale * t, count, s.z);
  return target;
}

void fold(const HeadTile& op, long row, long segment, int fields, float* parts, Segment& s) {
  float* out = parts + segment * fields * op.rows + row;
  if (op.targets[row] == op.ignore_index) {
    for (int f = 0; f < fields; ++f) out[f * op.rows] = 0.f;
    return;
  }
  const long first = segment * kHeadSegment;
  const int count = static_cast<int>(std::min<long>(kHeadSegment, op.columns - first));
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  const int target = load(op, row, first, count, s);
  std::fill(s.z + count, s.z + padded, -kInf);
  const float m = largest(s.z, padded), from = m == -kInf ? 0.f : m;  // nothing but banned tokens: all powers are 0
  powers(s.z, from, padded, s.e);
  const Sums sums = sums_of(s.z, s.e, from, padded, fields > kUsualParts);
  out[kPartMaximum * op.rows] = m;
  out[kPartSum * op.rows] = sums.sum;
  out[kPartMoment * op.rows] = sums.moment;
  out[kPartTarget * op.rows] = target >= 0 ? s.z[target] : 0.f;
  if (fields == kUsualParts) return;
  out[kPartSquares * op.rows] = sums.squares;
  out[kPartBest * op.rows] = static_cast<float>(op.start + first + (std::find(s.z, s.z + count - 1, m) - s.z));
}

void combine(const float* parts, long segments, int fields, long rows, long y, long vocabulary, float* out) {
  const auto part = [=](long segment, int field) -> double { return parts[(segment * fields + field) * rows]; };
  long best = 0;
  for (long i = 1; i < segments; ++i)
    if (part(i, kPartMaximum) > part(best, kPartMaximum)) best = i;
  const double m = segments ? part(best, kPartMaximum) : -kInf;
  double sum = 0.0, moment = 0.0, squares = 0.0;
  for (long i = 0; i < segments; ++i) {
    const double shift = part(i, kPartMaximum) - m, factor = std::exp(shift);
    if (part(i, kPartSum) == 0.0) continue;  // only banned tokens: 0 * -inf counts as 0
    sum += factor * part(i, kPartSum);
    moment += factor * (part(i, kPartMoment) + part(i, kPartSum) * shift);
    if (fields > kUsualParts) squares += factor * factor * part(i, kPartSquares);
  }
  const bool known = y >= 0 && y < vocabulary;
  const double ls = std::log(sum), mu = moment / sum;  // of nothing but banned tokens: -inf and NaN
  const double z_y = known ? part(y / kHeadSegment, kPartTarget) : -kInf;
  const double logprob = (z_y - m) - ls;
  out[kLogprob * rows] = known ? static_cast<float>(logprob > 0.0 ? 0.0 : logprob) : kNan;
  out[kHeadEntropy * rows] = known ? static_cast<float>(ls - mu) : kNan;
  out[kMaximum * rows] = static_cast<float>(m);
  out[kLogSum * rows] = static_cast<float>(ls);
  out[kMean * rows] = static_cast<float>(mu);
  out[kTargetLogit * rows] = static_cast<float>(z_y);
  if (fields == kUsualParts) return;
  out[kTop1 * rows] = segments ? parts[(best * fields + kPartBest) * rows] : 0.f;
  out[kSumOfSquares * rows] = static_cast<float>(squares / (sum * sum));
}

void store(const HeadTile& op, const HeadGradient& g, long row, long first, int count, const float* x) {
  if (g.out_narrow) {
    std::uint16_t* out = row_of(static_cast<std::uint16_t*>(g.out), row, op.inner, g.out_outer_stride, g.out_stride);
    x ? narrow(x, count, out + first) : (void)std::fill_n(out + first, count, std::uint16_t{0});
  } else {
    float* out = row_of(static_cast<float*>(g.out), row, op.inner, g.out_outer_stride, g.out_stride);
    x ? (void)std::memcpy(out + first, x, count * sizeof(float)) : (void)std::fill_n(out + first, count, 0.f);
  }
}

void gradient(const HeadTile& op, const HeadGradient& g, long row, Segment& s) {
  const float g_l = g.grad_logprobs ? g.grad_logprobs[row * g.logprobs_stride] : 0.f;
  const float g_e = g.grad_entropy ? g.grad_entropy[row * g.entropy_stride] : 0.f;
  const bool dead = op.targets[row] == op.ignore_index || (g_l == 0.f && g_e == 0.f);
  const auto statistic = [&](int which) { return g.statistics[which * op.rows + row]; };
  const float unknown = statistic(kLogprob) != statistic(kLogprob) ? kNan : 0.f;
  for (long first = 0; first < op.columns; first += kHeadSegment) {
    const int count = static_cast<int>(std::min<long>(kHeadSegment, op.columns - first));
    if (dead) {
      store(op, g, row, first, count, nullptr);
      continue;
    }
    const int target = load(op, row, first, count, s);
    const bool banned = target >= 0 && s.z[target] == -kInf;  // it stays where it is, whatever moves
    slopes(statistic(kMaximum), statistic(kLogSum) + unknown, statistic(kMean), g_l, g_e, count, s);
    if (target >= 0 && !banned) s.z[target] += g_l;
    const float factor = op.logit_scale * inverse_temperature(op, row);
    if (op.softcap > 0.f) chain(factor, count, s);
    else if (factor != 1.f) multiply(factor, count, s.z);
    store(op, g, row, first, count, s.z);
  }
}

}  // namespace
}  // namespace rlhf

using namespace rlhf;

extern "C" void rlhf_head_fold_cpu(const HeadTile* op, int fields, float* parts, long first, long last) {
  thread_local Segment segment;
  const long segments = head_segments(op->columns);
  for (long i = first; i < last; ++i) fold(*op, i / segments, i % segments, fields, parts, segment);
}

extern "C" void rlhf_head_combine_cpu(const float* parts, long segments, int fields, long rows, const long* targets,
                                      long start, long vocabulary, long ignore_index, float* statistics, long first,
                                      long last) {
  for (long row = first; row < last; ++row) {
    if (targets[row] != ignore_index)
      combine(parts + row, segments, fields, rows, targets[row] - start, vocabulary, statistics + row);
    else
      for (int f = 0; f < fields + 2; ++f) statistics[f * rows + row] = 0.f;
  }
}

extern "C" void rlhf_head_gradient_cpu(const HeadTile* op, const HeadGradient* g, long first, long last) {
  thread_local Segment segment;
  for (long row = first; row < last; ++row) gradient(*op, *g, row, segment);
}
