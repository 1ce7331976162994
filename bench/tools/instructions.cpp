// Runs one of the CPU ops on fixed inputs, for callgrind to count its instructions: `driver OP`. Everything from making
// the inputs to printing a sum of the results lies outside run_op, whose instructions alone are collected.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "active.h"
#include "head.h"
#include "ops.h"

using namespace rlhf;

namespace {

constexpr long kCount = 16, kLength = 1021, kSize = kCount * kLength;
constexpr long kRows = 8, kColumns = 12'289;
constexpr int kFields = kUsualParts;

struct Random {  // a linear congruential generator: the same numbers on every machine
  unsigned long state = 1;
  float operator()() {
    state = state * 6364136223846793005ul + 1442695040888963407ul;
    return static_cast<float>(state >> 40) / static_cast<float>(1 << 23) - 1.f;
  }
};

std::vector<float> numbers(Random& random, long count, float size = 1.f) {
  std::vector<float> made(count);
  for (float& x : made) x = size * random();
  return made;
}

struct Problem {
  Random random;
  std::vector<float> a = numbers(random, kSize), b = numbers(random, kSize), c = numbers(random, kSize);
  std::vector<float> scores = numbers(random, kCount), out1 = a, out2 = a, out3 = a, out4 = a;
  std::unique_ptr<bool[]> mask{new bool[kSize]}, value_mask{new bool[kSize]};
  std::vector<Moments> moments{std::vector<Moments>(kSize / kActiveTile + kCount)};
  std::vector<long> before{0};
  long tokens = 0;
  std::vector<double> metrics{std::vector<double>(64 * (kSize / kActiveTile + 1))};
  std::vector<float> logits = numbers(random, kRows * kColumns, 10.f), grad = logits, upstream = numbers(random, kRows);
  std::vector<long> targets;
  std::vector<float> parts{std::vector<float>(kAllParts * kRows * head_segments(kColumns))};
  std::vector<float> statistics{std::vector<float>(kAllStatistics * kRows)};

  Problem() {
    for (long i = 0; i < kSize; ++i) mask[i] = i % kLength < kLength - 37 * (i / kLength);  // longer and longer padding
    for (long first = 0; first < kSize; first += kCountBlock)
      before.push_back(tokens += count_true(mask.get(), first, first + kCountBlock < kSize ? first + kCountBlock : kSize));
    for (long row = 0; row < kRows; ++row) targets.push_back(row * 1009 % kColumns);
  }
  long tiles() const { return (tokens + kActiveTile - 1) / kActiveTile; }
  HeadTile tile() const {
    HeadTile op{};
    op.logits = logits.data(), op.rows = kRows, op.columns = kColumns, op.inner = kRows, op.stride = kColumns;
    op.targets = targets.data(), op.logit_scale = 1.f, op.inverse_temperature = 1.f, op.ignore_index = -100;
    return op;
  }
};

Gae recursion(Problem& p) {
  Gae op{};
  op.sequences = {p.mask.get(), nullptr, kCount, kLength};
  op.rewards = p.a.data(), op.values = p.b.data(), op.gamma = 1.0, op.lam_all = op.value_lam_all = 0.95;
  op.advantages = p.out1.data(), op.returns = p.out2.data(), op.moments = p.moments.data();
  return op;
}

}  // namespace

extern "C" __attribute__((noinline)) int run_op(const char* name, Problem& p) {
  const KlOptions k3{kKl3, false, -INFINITY, INFINITY, -INFINITY, INFINITY};
  const auto is = [name](const char* other) { return !std::strcmp(name, other); };
  if (is("gae")) {
    const Gae op = recursion(p);
    rlhf_gae_cpu(&op, 0, kCount);
  } else if (is("kl_gae")) {
    Gae op = recursion(p);
    op.shaped = true;
    op.shaping = {p.scores.data(), p.a.data(), p.c.data(), {kKl1, false, -INFINITY, INFINITY, -INFINITY, INFINITY},
                  0.05f, INFINITY, false, p.out3.data(), p.out4.data(), p.value_mask.get()};
    rlhf_gae_cpu(&op, 0, kCount);
  } else if (is("whiten")) {
    rlhf_moments_cpu(p.a.data(), p.mask.get(), kSize, p.before.data(), p.moments.data(), 0, p.tiles());
    Moments all{};
    for (long i = 0; i < p.tiles(); ++i) all = merge(all, p.moments[i]);
    const Whiten op{p.a.data(), p.mask.get(), {0, 1e-8, true, true, true}, all, p.out1.data()};
    rlhf_whiten_cpu(&op, 0, kSize);
  } else if (is("kl_estimate")) {
    rlhf_kl_cpu(&k3, p.a.data(), p.b.data(), p.out1.data(), nullptr, 0, kSize);
  } else if (is("ppo_loss")) {
    PolicyLoss op{};
    op.logprobs = p.a.data(), op.old_logprobs = p.b.data(), op.advantages = p.c.data(), op.mask = p.mask.get();
    op.options = {0.2f, 0.2f, 3.f}, op.kl = k3, op.scale = 1.f, op.grad_logprobs = p.out1.data();
    rlhf_policy_loss_cpu(&op, kSize, p.before.data(), p.metrics.data(), 0, p.tiles());
  } else if (is("value_loss")) {
    const ValueLoss op{p.a.data(), p.b.data(), p.c.data(), p.mask.get(), nullptr, 0.2f, 1.f, p.out1.data()};
    rlhf_value_loss_cpu(&op, kSize, p.before.data(), p.metrics.data(), 0, p.tiles());
  } else if (is("head_fold")) {
    const HeadTile op = p.tile();
    rlhf_head_fold_cpu(&op, kFields, p.parts.data(), 0, kRows * head_segments(kColumns));
    rlhf_head_combine_cpu(p.parts.data(), head_segments(kColumns), kFields, kRows, p.targets.data(), 0, kColumns, -100,
                          p.statistics.data(), 0, kRows);
  } else if (is("head_gradient")) {
    const HeadTile op = p.tile();
    HeadGradient gradient{};
    gradient.statistics = p.statistics.data(), gradient.grad_logprobs = gradient.grad_entropy = p.upstream.data();
    gradient.logprobs_stride = gradient.entropy_stride = 1;
    gradient.out = p.grad.data(), gradient.out_outer_stride = kRows * kColumns, gradient.out_stride = kColumns;
    rlhf_head_gradient_cpu(&op, &gradient, 0, kRows);
  } else {
    return 2;
  }
  return 0;
}

int main(int count, char** words) {
  static Problem problem;
  for (float& x : problem.statistics) x = 1.f;  // head_gradient alone: any numbers make the same steps
  const int code = count == 2 ? run_op(words[1], problem) : 2;
  double sum = 0;
  for (const auto* out : {&problem.out1, &problem.out2, &problem.grad, &problem.statistics})
    for (const float x : *out) sum += x;
  std::printf("%g\n", sum);
  return code;
}
