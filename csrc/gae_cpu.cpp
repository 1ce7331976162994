// kl_gae and gae on the CPU. A sequence is worked off from its end in tiles counted from its own last token, so its bits
// depend on nothing around it. Each tile goes through three passes of which only the middle one is a chain:
//
//     gather    trainable tokens to the end of small arrays; delta_t of each               (vector code)
//     chain     A_t = delta_t + gamma lam A_p, for several sequences at once               (latency of one hides the other)
//     scatter   advantages and returns to their places, 0 at the masked ones, moments      (vector code)
#include <cstring>

#include "gae.h"
#include "ops.h"
#include "vector.h"

namespace rlhf {
namespace {

constexpr int kTile = 1024;
constexpr int kLanes = 8;  // sequences at once: a step of the chain takes eight cycles, and eight chains fill them

struct Lane {
  // The sequence: positions [begin, place] take part, those below `position` are still to do.
  long sequence, begin, place, position;
  float decay, value_decay, next_value, advantage, value_advantage;
  Moments moments;
  // The tile at hand: positions [first, first + length), of which `count` tokens lie at the end of the arrays.
  long first;
  int length, count;
  bool dense;         // all of its positions take part
  const bool* mask;   // which do; differs from the trainable ones in the slot behind the last of those
  const float* values;
  bool own_mask[kTile];
  float gathered_rewards[kTile], gathered_values[kTile], chain[kTile], value_chain[kTile];
};

// The last true position in [begin, end), or begin - 1.
long last_true(const bool* mask, long begin, long end) {
  for (unsigned long word; end - begin >= 8; end -= 8) {
    std::memcpy(&word, mask + end - 8, 8);
    if (word) break;
  }
  while (end > begin && !mask[end - 1]) --end;
  return end - 1;
}

template <class T>
void clear(T* out, long begin, long end) {
  if (out && end > begin) std::memset(out + begin, 0, (end - begin) * sizeof(T));
}

void start(const Gae& op, Lane& lane, long sequence) {
  const Sequences& s = op.sequences;
  lane.sequence = sequence;
  lane.begin = s.offsets ? s.offsets[sequence] : sequence * s.length;
  const long end = s.offsets ? s.offsets[sequence + 1] : lane.begin + s.length;
  lane.place = last_true(s.mask, lane.begin, end);
  if (op.shaped && op.shaping.after && lane.place >= lane.begin && lane.place + 1 < end) ++lane.place;
  lane.position = lane.place + 1;
  clear(op.advantages, lane.position, end);
  clear(op.returns, lane.position, end);
  if (op.shaped) {
    clear(op.shaping.rewards, lane.position, end);
    clear(op.shaping.kl_out, lane.position, end);
    clear(op.shaping.value_mask, lane.position, end);
  }
  lane.decay = static_cast<float>(op.gamma * (op.lam ? op.lam[sequence] : op.lam_all));
  lane.value_decay = static_cast<float>(op.gamma * (op.value_lam ? op.value_lam[sequence] : op.value_lam_all));
  lane.next_value = op.bootstrap ? op.bootstrap[sequence] : 0.f;
  lane.advantage = lane.value_advantage = 0.f;
  lane.moments = {};
}

RLHF_VECTOR void estimates(KlOptions o, const float* __restrict logprobs, const float* __restrict ref_logprobs, int count,
                           float* __restrict kl) {
  with_kind(o.kind, [=](auto kind) RLHF_INLINE {
    for (int i = 0; i < count; ++i) kl[i] = kl_estimate<kind.kValue>(o, logprobs[i] - ref_logprobs[i]);
  });
}

RLHF_VECTOR void zero_masked(const bool* __restrict mask, int count, float* __restrict x) {
  for (int i = 0; i < count; ++i) x[i] = mask[i] ? x[i] : 0.f;
}

RLHF_VECTOR void scaled(const float* __restrict x, float factor, int count, float* __restrict out) {
  for (int i = 0; i < count; ++i) out[i] = factor * x[i];
}

// Rewards and KL of the tile, into their outputs, from where the recursion reads them.
void shape(const Gae& op, const Lane& lane) {
  const Shaping& s = op.shaping;
  const bool* mask = op.sequences.mask + lane.first;
  float *kl = s.kl_out + lane.first, *rewards = s.rewards + lane.first;
  estimates(s.kl, s.logprobs + lane.first, s.ref_logprobs + lane.first, lane.length, kl);
  if (s.kl_coef != 0.f) scaled(kl, -s.kl_coef, lane.length, rewards);
  else clear(s.rewards, lane.first, lane.first + lane.length);  // an infinite penalty too
  if (std::memchr(mask, 0, lane.length)) zero_masked(mask, lane.length, kl), zero_masked(mask, lane.length, rewards);
  for (int i = 0; i < lane.length; ++i) s.value_mask[lane.first + i] = lane.mask[i];
  const long place = lane.place - lane.first;
  if (place < lane.length) rewards[place] += clamp(s.scores[lane.sequence], -s.score_bound, s.score_bound);
}

RLHF_VECTOR void td_errors(const float* __restrict rewards, const float* __restrict values, float gamma, int count,
                           float* __restrict out) {
  for (int i = 0; i < count; ++i) out[i] = td_error(rewards[i], values[i], values[i + 1], gamma);
}

RLHF_VECTOR void add(const float* __restrict a, const float* __restrict b, int count, float* __restrict out) {
  for (int i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

void gather(const Gae& op, Lane& lane) {
  const long end = lane.position;
  lane.length = static_cast<int>(end - lane.begin < kTile ? end - lane.begin : kTile);
  lane.first = lane.position = end - lane.length;
  lane.count = 0;
  if (lane.length == 0) return;
  lane.mask = op.sequences.mask + lane.first;
  const long place = lane.place - lane.first;
  if (place < lane.length && !lane.mask[place]) {
    std::memcpy(lane.own_mask, lane.mask, lane.length);
    lane.own_mask[place] = true;
    lane.mask = lane.own_mask;
  }
  if (op.shaped) shape(op, lane);
  const float *rewards = (op.shaped ? op.shaping.rewards : op.rewards) + lane.first, *values = op.values + lane.first;
  lane.dense = !std::memchr(lane.mask, 0, lane.length);
  if (lane.dense) {
    lane.count = lane.length;
  } else {
    for (int i = 0; i < lane.length; ++i) {
      if (!lane.mask[i] && !op.decay) continue;
      lane.gathered_rewards[lane.count] = lane.mask[i] ? rewards[i] : 0.f;
      lane.gathered_values[lane.count++] = lane.mask[i] ? values[i] : 0.f;
    }
    rewards = lane.gathered_rewards, values = lane.gathered_values;
  }
  lane.values = values;
  if (lane.count == 0) return;
  float* delta = lane.chain + kTile - lane.count;
  const float gamma = static_cast<float>(op.gamma);
  const int last = lane.count - 1;
  td_errors(rewards, values, gamma, last, delta);
  delta[last] = td_error(rewards[last], values[last], lane.next_value, gamma);
  lane.next_value = values[0];
  if (op.two_lambdas) std::memcpy(lane.value_chain + kTile - lane.count, delta, lane.count * sizeof(float));
}

// A_t = delta_t + decay A_p over the last `steps` cells of every lane's tile; those in front of its tokens are not used.
void chain(Lane* lanes, int steps, float (Lane::*tile)[kTile], float Lane::*decay, float Lane::*advantage) {
  float decays[kLanes], a[kLanes];
  float* cells[kLanes];
  for (int l = 0; l < kLanes; ++l) decays[l] = lanes[l].*decay, a[l] = lanes[l].*advantage, cells[l] = lanes[l].*tile;
  for (int t = kTile - 1; t >= kTile - steps; --t)
    for (int l = 0; l < kLanes; ++l) cells[l][t] = a[l] = advance(cells[l][t], decays[l], a[l]);
  for (int l = 0; l < kLanes; ++l)
    if (lanes[l].count) lanes[l].*advantage = cells[l][kTile - lanes[l].count];
}

void scatter(const Gae& op, Lane& lane) {
  if (lane.length == 0) return;
  const bool* trainable = op.sequences.mask + lane.first;
  const float* advantage = lane.chain + kTile - lane.count;
  const float* value_advantage = (op.two_lambdas ? lane.value_chain : lane.chain) + kTile - lane.count;
  float *advantages = op.advantages + lane.first, *returns = op.returns + lane.first;
  if (lane.dense) {
    std::memcpy(advantages, advantage, lane.length * sizeof(float));
    add(value_advantage, lane.values, lane.length, returns);
  } else {
    for (int i = 0, token = 0; i < lane.length; ++i) {
      advantages[i] = lane.mask[i] ? advantage[token] : 0.f;
      returns[i] = lane.mask[i] ? value_advantage[token] + lane.values[token] : 0.f;
      token += lane.mask[i] || op.decay;
    }
  }
  if (lane.mask == lane.own_mask) advantages[lane.place - lane.first] = 0.f;
  if (!op.moments) return;
  if (lane.dense && lane.mask == trainable) {
    lane.moments = merge(lane.moments, moments_of(advantages, lane.length));
    return;
  }
  int count = 0;
  for (int i = 0; i < lane.length; ++i)
    if (trainable[i]) lane.gathered_rewards[count++] = advantages[i];
  lane.moments = merge(lane.moments, moments_of(lane.gathered_rewards, count));
}

}  // namespace
}  // namespace rlhf

extern "C" void rlhf_gae_cpu(const rlhf::Gae* op, long first_sequence, long last_sequence) {
  using namespace rlhf;
  thread_local Lane lanes[kLanes];
  for (long group = first_sequence; group < last_sequence; group += kLanes) {
    const int used = static_cast<int>(last_sequence - group < kLanes ? last_sequence - group : kLanes);
    for (int l = 0; l < kLanes; ++l) lanes[l].begin = lanes[l].position = 0, lanes[l].count = 0;
    for (int l = 0; l < used; ++l) start(*op, lanes[l], group + l);
    for (bool more = true; more;) {
      int steps = 0;
      more = false;
      for (int l = 0; l < used; ++l) {
        gather(*op, lanes[l]);
        steps = lanes[l].count > steps ? lanes[l].count : steps;
        more |= lanes[l].length > 0;
      }
      chain(lanes, steps, &Lane::chain, &Lane::decay, &Lane::advantage);
      if (op->two_lambdas) chain(lanes, steps, &Lane::value_chain, &Lane::value_decay, &Lane::value_advantage);
      for (int l = 0; l < used; ++l) scatter(*op, lanes[l]);
    }
    if (op->moments)
      for (int l = 0; l < used; ++l) op->moments[group + l] = lanes[l].moments;
  }
}
