// The operators on the CPU: torch's own threads for the functions of *_cpu.cpp.
//
// Written against LibTorch's stable ABI, so one build serves every Python and every torch from TORCH_TARGET_VERSION on.
// There is no Python in it: rlhf_engine/native.py loads it with torch.ops.load_library.
#include <algorithm>
#include <vector>

#include "active.h"
#include "operators.h"

namespace rlhf {
namespace {

constexpr long kGrain = 1 << 14;  // elements below which a thread costs more to wake than it saves

template <class F>
void parallel(long size, long grain, const F& f) {
  torch::stable::parallel_for(0, size, grain > 0 ? grain : 1, f);
}

Moments fold(const std::vector<Moments>& parts) {
  Moments all{};
  for (const Moments& part : parts) all = merge(all, part);
  return all;
}

// Tokens in front of every block of kCountBlock positions, and all of them.
std::vector<long> tokens_before(const bool* mask, long size) {
  std::vector<long> before(count_blocks(size) + 1);
  parallel(before.size() - 1, 64, [&](long first, long last) { rlhf_count_cpu(mask, size, before.data() + 1, first, last); });
  for (size_t i = 1; i < before.size(); ++i) before[i] += before[i - 1];
  return before;
}

long tiles_of(long tokens) { return (tokens + kActiveTile - 1) / kActiveTile; }

struct Widths {
  static constexpr int of(const PolicyLoss&) { return kPolicyMetrics; }
  static constexpr int of(const ValueLoss&) { return kValueMetrics; }
  static constexpr int largest(const PolicyLoss&) { return kLogRatioMax; }
  static constexpr int largest(const ValueLoss&) { return -1; }
};

void run_tiles(const PolicyLoss& op, long size, const long* before, double* parts, long first, long last) {
  rlhf_policy_loss_cpu(&op, size, before, parts, first, last);
}

void run_tiles(const ValueLoss& op, long size, const long* before, double* parts, long first, long last) {
  rlhf_value_loss_cpu(&op, size, before, parts, first, last);
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void gae(Gae& op, bool whiten) const {
    const long count = op.sequences.count;
    const long size = op.sequences.offsets ? op.sequences.offsets[count] : count * op.sequences.length;
    std::vector<Moments> moments(whiten ? count : 0);
    op.moments = whiten ? moments.data() : nullptr;
    parallel(count, count ? kGrain * count / (size + 1) : 1, [&](long first, long last) { rlhf_gae_cpu(&op, first, last); });
    if (!whiten) return;
    const Whiten white{op.advantages, op.sequences.mask, kUsualWhitening, fold(moments), op.advantages};
    parallel(size, kGrain, [&](long first, long last) { rlhf_whiten_cpu(&white, first, last); });
  }

  void whiten(Whiten& op, long size) const {
    const std::vector<long> before = tokens_before(op.mask, size);
    std::vector<Moments> moments(tiles_of(before.back()));
    parallel(moments.size(), kGrain / kActiveTile, [&](long first, long last) {
      rlhf_moments_cpu(op.x, op.mask, size, before.data(), moments.data(), first, last);
    });
    op.moments = fold(moments);
    parallel(size, kGrain, [&](long first, long last) { rlhf_whiten_cpu(&op, first, last); });
  }

  void kl(const KlOptions& options, const float* logprobs, const float* ref_logprobs, float* value, float* derivative,
          long size) const {
    parallel(size, kGrain, [&](long first, long last) {
      rlhf_kl_cpu(&options, logprobs, ref_logprobs, value, derivative, first, last);
    });
  }

  template <class Op>
  void loss(Op op, long size, const float* denom, double denom_number, LossOutputs& out) const {
    const int width = Widths::of(op), largest = Widths::largest(op);
    const std::vector<long> before = tokens_before(op.mask, size);
    const long tokens = before.back(), tiles = tiles_of(tokens);
    const double total = denom ? *denom : (denom_number < 0 ? tokens : denom_number);
    op.scale = static_cast<float>(total <= 0 ? 1.0 : 1.0 / total);
    std::vector<double> parts(tiles * width);
    if (tokens == 0)
      for (const Tensor* gradient : {&out.gradient, &out.entropy_gradient})
        std::fill_n(data(*gradient), gradient->numel(), 0.f);
    parallel(tiles, kGrain / kActiveTile, [&](long first, long last) {
      run_tiles(op, size, before.data(), parts.data(), first, last);
    });
    double* sums = static_cast<double*>(out.metrics.data_ptr());
    std::fill_n(sums, width, 0.0);
    for (long tile = 0; tile < tiles; ++tile)
      for (int m = 0; m < width; ++m) {
        const double part = parts[tile * width + m];
        if (m != largest) sums[m] += part;
        else if (part > sums[m] || part != part) sums[m] = part;
      }
    *data(out.loss) = static_cast<float>(sums[0] * op.scale);
    sums[0] = static_cast<double>(tokens);
  }
};

}  // namespace
}  // namespace rlhf

// FRAGMENT: the Python side may define further operators in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_engine, m) { rlhf::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(rlhf_engine, CPU, m) { rlhf::Operators<rlhf::Cpu>::implement(m); }
