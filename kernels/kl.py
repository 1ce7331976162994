"""One-sample KL estimators of tokens and their derivatives, and the functions of one token that other kernels share.

    d = logprob - ref_logprob;    k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d >= 0

d and the estimate may be clamped; outside of a bound there is no derivative. "Straight through" keeps the estimate and
takes the derivative of k2, unclamped. Kinds are the numbers below, constants of the compiler, so no token branches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ABS, K2, K3 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # any other number is k1
BLOCK = 1024


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)  # tl.minimum and tl.maximum may drop a NaN
    return tl.where(x > high, high, x)


@triton.jit
def k3_estimate(d, exp_of_minus_d):
    """exp(-d) - 1 + d. Near 0 the three terms cancel, so there it is d^2 times a series."""
    series = 2.4801587e-5  # 1 / 8!, the next ones upwards; the first that is left out is below 1e-8 of the sum
    series = series * -d + 1.9841270e-4
    series = series * -d + 1.3888889e-3
    series = series * -d + 8.3333333e-3
    series = series * -d + 4.1666667e-2
    series = series * -d + 1.6666667e-1
    series = series * -d + 0.5
    return tl.where(tl.abs(d) < 0.5, series * (d * d), (exp_of_minus_d - 1.0) + d)


@triton.jit
def _unclamped(d, KIND: tl.constexpr):
    if KIND == ABS:
        return tl.abs(d)
    elif KIND == K2:
        return d * d * 0.5
    elif KIND == K3:
        return k3_estimate(d, tl.exp(-d))
    else:
        return d


@triton.jit
def kl_of_token(d, diff_low, diff_high, value_low, value_high, KIND: tl.constexpr):
    return clamp(_unclamped(clamp(d, diff_low, diff_high), KIND), value_low, value_high)


@triton.jit
def kl_derivative(d, diff_low, diff_high, value_low, value_high, KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """In d. As in PyTorch, a clamp passes the derivative at its bounds, and |d| has none at 0."""
    if STRAIGHT_THROUGH:
        return d
    x = clamp(d, diff_low, diff_high)
    value = _unclamped(x, KIND)
    if KIND == ABS:
        slope = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0 * x))
    elif KIND == K2:
        slope = x
    elif KIND == K3:
        slope = 1.0 - tl.exp(-x)
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    outside = (d < diff_low) | (d > diff_high) | (value < value_low) | (value > value_high)
    return tl.where(outside, 0.0, slope)


@triton.jit
def _estimate(
    LOGPROBS, REF_LOGPROBS, VALUE, DERIVATIVE, n, diff_low, diff_high, value_low, value_high, KIND: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    d = tl.load(LOGPROBS + at, mask=inside, other=0.0) - tl.load(REF_LOGPROBS + at, mask=inside, other=0.0)
    value = kl_of_token(d, diff_low, diff_high, value_low, value_high, KIND)
    tl.store(VALUE + at, value, mask=inside)
    if DERIVATIVE is not None:
        slope = kl_derivative(d, diff_low, diff_high, value_low, value_high, KIND, STRAIGHT_THROUGH)
        tl.store(DERIVATIVE + at, slope, mask=inside)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: int,
    straight_through: bool,
    diff_low: float,
    diff_high: float,
    value_low: float,
    value_high: float,
    with_derivative: bool,
) -> tuple[Tensor, Tensor]:
    """(estimates, their derivatives in logprobs); the latter are those in ref_logprobs with the other sign.

    Args:
        logprobs, ref_logprobs: contiguous float32 of one shape.
        kind: 0 k1, 1 abs, 2 k2, 3 k3.
        straight_through: derivative of k2 whatever the kind.
        diff_low, diff_high, value_low, value_high: bounds on d and on the estimate; infinite ones are open.
        with_derivative: False leaves the second tensor empty.
    """
    value = torch.empty_like(logprobs)
    derivative = torch.empty_like(logprobs) if with_derivative else logprobs.new_empty(0)
    if logprobs.numel():
        with torch.cuda.device_of(logprobs):
            _estimate[(triton.cdiv(logprobs.numel(), BLOCK),)](
                logprobs, ref_logprobs, value, derivative if with_derivative else None, logprobs.numel(), diff_low,
                diff_high, value_low, value_high, KIND=kind, STRAIGHT_THROUGH=straight_through, BLOCK=BLOCK,
                num_warps=4
            )  # fmt: skip
    return value, derivative
