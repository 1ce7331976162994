"""PPO's clipped policy loss and the clipped value loss: value, gradient and metrics in two launches.

    d = clamp(logprob - old, +-20),  r = exp(d);   pg = max(-A r, -A clip(r, 1 - low, 1 + high));  A < 0: min(pg, -A c)
    policy: sum w (pg is_weight - entropy_coef entropy + kl_coef kl) / denom
    value:  sum w max((v - R)^2, (v_old + clip(v - v_old, +-bound) - R)^2) / 2 / denom

The first launch writes gradients and the sums of its programs, the second adds those up, in one order, so results
repeat bit by bit. Where the loss is divided by the number of tokens, that is known only then, and the second launch
divides the gradients too. A program takes every block whose number is its own modulo the number of programs. Masked
positions are not read. Pointers are compiled without regard to their alignment: it would decide how wide the loads are,
and with that the order of the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_engine.kernels.kl import clamp, k3_estimate, kl_derivative, kl_of_token

# Rows of the sums of programs, which are the metrics in their order; the sum of losses comes behind them.
POLICY_METRICS, VALUE_METRICS = 8, 7
LOG_RATIO_MAX = 6  # the one that is a maximum
BLOCK = 512
MOST_PROGRAMS = 1024
OPTIONS = {"num_warps": 8}


@triton.jit
def _magnitude_bits(x):
    """|x| as an integer of the same order, where NaN is the greatest; a float maximum may drop it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(DENOM, scale):
    """1 / the number that the loss is divided by."""
    if DENOM is not None:
        denom = tl.load(DENOM).to(tl.float64)
        scale = (1.0 / tl.where(denom <= 0.0, 1.0, denom)).to(tl.float32)
    return scale


@triton.jit
def _leave(PARTS, row, lanes):
    """The program's sum, to its column of PARTS (rows, programs)."""
    at = PARTS + row * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.sum(lanes, 0).to(tl.float64))


@triton.jit
def _leave_max(PARTS, row, lanes):
    """Likewise the greatest of magnitudes, as the number it is."""
    at = PARTS + row * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.max(lanes, 0).to(tl.float32, bitcast=True).to(tl.float64))


@triton.jit
def _policy_token(logprobs, old_logprobs, advantages, ratio_low, ratio_high, dual_clip):
    """(loss, derivative, log ratio, ratio, clipped, clipped low), before importance weights; derivative in logprobs."""
    d = logprobs - old_logprobs
    log_ratio = clamp(d, -20.0, 20.0)
    ratio = tl.exp(log_ratio)
    free = -advantages * ratio
    bounded = -advantages * clamp(ratio, ratio_low, ratio_high)
    # Where the bound is the greater one the ratio lies outside of it, so it has no derivative there.
    clipped = bounded > free
    loss, lowest = tl.where(clipped, bounded, free), -advantages * dual_clip
    clipped_low = (advantages < 0.0) & (loss > lowest)
    derivative = tl.where(clipped | clipped_low | (d < -20.0) | (d > 20.0), 0.0, free)
    return tl.where(clipped_low, lowest, loss), derivative, log_ratio, ratio, clipped, clipped_low


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[
        "LOGPROBS", "OLD_LOGPROBS", "ADVANTAGES", "MASK", "IS_WEIGHTS", "ENTROPY", "REF_LOGPROBS", "WEIGHTS",
        "GRADIENT", "ENTROPY_GRADIENT",
    ],
)  # fmt: skip
def _policy_loss(
    LOGPROBS, OLD_LOGPROBS, ADVANTAGES, MASK, IS_WEIGHTS, ENTROPY, REF_LOGPROBS, WEIGHTS, DENOM, GRADIENT,
    ENTROPY_GRADIENT, PARTS, n, scale, ratio_low, ratio_high, dual_clip, entropy_coef, kl_coef, KIND: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    scale = _scale(DENOM, scale)
    counts = tl.zeros([BLOCK], tl.int32)
    tokens, clipped_tokens, clipped_low_tokens, most = counts, counts, counts, counts
    sums = tl.zeros([BLOCK], tl.float64)
    losses, kl1, kl3, ratios, entropies = sums, sums, sums, sums, sums
    inf = float("inf")
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(MASK + at, mask=at < n, other=0)
        logprobs = tl.load(LOGPROBS + at, mask=token, other=0.0)
        old_logprobs = tl.load(OLD_LOGPROBS + at, mask=token, other=0.0)
        advantages = tl.load(ADVANTAGES + at, mask=token, other=0.0)
        loss, derivative, log_ratio, ratio, clipped, clipped_low = _policy_token(
            logprobs, old_logprobs, advantages, ratio_low, ratio_high, dual_clip
        )
        if IS_WEIGHTS is not None:
            is_weights = tl.load(IS_WEIGHTS + at, mask=token, other=0.0)
            loss, derivative = loss * is_weights, derivative * is_weights
        if ENTROPY is not None:
            entropy = tl.load(ENTROPY + at, mask=token, other=0.0)
            loss -= entropy_coef * entropy
            entropies += entropy.to(tl.float64)
        if REF_LOGPROBS is not None:
            d = logprobs - tl.load(REF_LOGPROBS + at, mask=token, other=0.0)
            loss += kl_coef * kl_of_token(d, -inf, inf, -inf, inf, KIND)
            derivative += kl_coef * kl_derivative(d, -inf, inf, -inf, inf, KIND, STRAIGHT_THROUGH)
        weights = tl.full([BLOCK], 1.0, tl.float32)
        if WEIGHTS is not None:
            weights = tl.load(WEIGHTS + at, mask=token, other=0.0)
        if GRADIENT is not None:
            tl.store(GRADIENT + at, tl.where(token, derivative * weights * scale, 0.0), mask=at < n)
        if ENTROPY_GRADIENT is not None:
            tl.store(ENTROPY_GRADIENT + at, tl.where(token, -entropy_coef * weights * scale, 0.0), mask=at < n)
        # A position that is none reads as a token of all zeros: no loss, log ratio 0 and not clipped, but ratio 1.
        tokens += token.to(tl.int32)
        clipped_tokens += clipped.to(tl.int32)
        clipped_low_tokens += clipped_low.to(tl.int32)
        most = tl.maximum(most, _magnitude_bits(log_ratio))
        losses += (loss * weights).to(tl.float64)
        kl1 -= log_ratio.to(tl.float64)
        kl3 += k3_estimate(-log_ratio, ratio).to(tl.float64)
        ratios += tl.where(token, ratio, 0.0).to(tl.float64)
    _leave(PARTS, 0, tokens)
    _leave(PARTS, 1, clipped_tokens)
    _leave(PARTS, 2, clipped_low_tokens)
    _leave(PARTS, 3, kl1)
    _leave(PARTS, 4, kl3)
    _leave(PARTS, 5, ratios)
    _leave_max(PARTS, 6, most)
    _leave(PARTS, 7, entropies)
    _leave(PARTS, 8, losses)


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["VALUES", "OLD_VALUES", "RETURNS", "MASK", "WEIGHTS", "GRADIENT"],
)
def _value_loss(
    VALUES, OLD_VALUES, RETURNS, MASK, WEIGHTS, DENOM, GRADIENT, PARTS, n, scale, bound, BLOCK: tl.constexpr
):
    scale = _scale(DENOM, scale)
    counts, sums = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float64)
    tokens, clipped_tokens = counts, counts
    losses, values, targets, target_squares, errors, error_squares = sums, sums, sums, sums, sums, sums
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(MASK + at, mask=at < n, other=0)
        value = tl.load(VALUES + at, mask=token, other=0.0)
        old_value = tl.load(OLD_VALUES + at, mask=token, other=0.0)
        target = tl.load(RETURNS + at, mask=token, other=0.0)
        error, change = value - target, value - old_value
        moved = clamp(change, -bound, bound)
        # Inside the bound both are the same number; only rounding could make them differ.
        clipped_error = tl.where(moved == change, error, (old_value + moved) - target)
        free, bounded = error * error, clipped_error * clipped_error
        clipped = bounded > free
        loss, derivative = 0.5 * tl.where(clipped, bounded, free), tl.where(clipped, 0.0, error)
        if WEIGHTS is not None:
            weights = tl.load(WEIGHTS + at, mask=token, other=0.0)
            loss, derivative = loss * weights, derivative * weights
        if GRADIENT is not None:
            tl.store(GRADIENT + at, tl.where(token, derivative * scale, 0.0), mask=at < n)
        # A position that is none reads as a token of all zeros, and adds nothing to any sum.
        tokens += token.to(tl.int32)
        clipped_tokens += clipped.to(tl.int32)
        losses += loss.to(tl.float64)
        values += value.to(tl.float64)
        targets += target.to(tl.float64)
        target_squares += target.to(tl.float64) * target.to(tl.float64)
        errors += (-error).to(tl.float64)
        error_squares += error.to(tl.float64) * error.to(tl.float64)
    _leave(PARTS, 0, tokens)
    _leave(PARTS, 1, values)
    _leave(PARTS, 2, clipped_tokens)
    _leave(PARTS, 3, targets)
    _leave(PARTS, 4, target_squares)
    _leave(PARTS, 5, errors)
    _leave(PARTS, 6, error_squares)
    _leave(PARTS, 7, losses)


@triton.jit(
    do_not_specialize=["n", "programs"], do_not_specialize_on_alignment=["PARTS", "GRADIENT", "ENTROPY_GRADIENT"]
)
def _finish(
    PARTS, LOSS, METRICS, DENOM, GRADIENT, ENTROPY_GRADIENT, n, programs, scale, ROWS: tl.constexpr,
    MAXIMUM: tl.constexpr, COUNTED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program `row` adds up that row of sums; all of them multiply gradients, where there are some to be multiplied."""
    row, lane = tl.program_id(0), tl.arange(0, LANES)
    if COUNTED:
        tokens = tl.sum(tl.load(PARTS + lane, mask=lane < programs, other=0.0), 0)
        scale = (1.0 / tl.maximum(tokens, 1.0)).to(tl.float32)
    else:
        scale = _scale(DENOM, scale)
    if row <= ROWS:
        parts = tl.load(PARTS + row * programs + lane, mask=lane < programs, other=0.0)
        largest = tl.max(_magnitude_bits(parts.to(tl.float32)), 0).to(tl.float32, bitcast=True).to(tl.float64)
        total = tl.where(row == MAXIMUM, largest, tl.sum(parts, 0))
        tl.store(METRICS + row, total, mask=row < ROWS)
        tl.store(LOSS, (total * scale).to(tl.float32), mask=row == ROWS)
    at = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if GRADIENT is not None:
        tl.store(GRADIENT + at, tl.load(GRADIENT + at, mask=at < n) * scale, mask=at < n)
    if ENTROPY_GRADIENT is not None:
        tl.store(ENTROPY_GRADIENT + at, tl.load(ENTROPY_GRADIENT + at, mask=at < n) * scale, mask=at < n)


def _outputs(like: Tensor, metrics: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, metrics, sums of programs); without tokens the first two are 0 and nothing is launched."""
    make = like.new_empty if like.numel() else like.new_zeros
    programs = min(triton.cdiv(like.numel(), BLOCK), MOST_PROGRAMS)
    parts = like.new_empty(metrics + 1, programs, dtype=torch.float64)
    return make(()), make(metrics, dtype=torch.float64), parts


def _divisor(denom: Tensor | None, denom_number: float) -> tuple[float, bool]:
    """(1 / the number that is known here, or 1, whether tokens are to be counted)."""
    return 1 / denom_number if denom is None and denom_number > 0 else 1.0, denom is None and denom_number < 0


def _add_up(
    parts: Tensor,
    loss: Tensor,
    metrics: Tensor,
    denom: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None],
    n: int,
    scale: float,
    counted: bool,
    maximum: int,
) -> None:
    multiplied = gradients if counted else (None, None)
    rows = metrics.numel()
    blocks = triton.cdiv(n, BLOCK) if any(x is not None for x in multiplied) else 0
    _finish[(max(rows + 1, blocks),)](
        parts, loss, metrics, denom, *multiplied, n, parts.shape[1], scale, ROWS=rows, MAXIMUM=maximum,
        COUNTED=counted, LANES=MOST_PROGRAMS, BLOCK=BLOCK, num_warps=4
    )  # fmt: skip


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    is_weights: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    denom: Tensor | None,
    denom_number: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    entropy_coef: float,
    kl_coef: float,
    kl_kind: int,
    straight_through: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradient in logprobs, its gradient in entropy, metrics).

    Args:
        logprobs, old_logprobs, advantages, is_weights, entropy, ref_logprobs, weights: contiguous float32 of one shape;
            the last four may be None. mask: likewise, bool.
        denom: float32, one number on the device; or None for denom_number, which if negative stands for the tokens.
        dual_clip: infinite is none.
        kl_kind, straight_through: see kl.py.
        with_gradient: False leaves both gradients empty. That in entropy is empty without entropy, too.

    Returns:
        loss: float32, 0-d. metrics: float64 sums over tokens: tokens, clipped ones, ones at the dual clip, -d,
        k3(-d), r, the greatest |d|, entropy.
    """
    gradient = torch.empty_like(logprobs) if with_gradient else logprobs.new_empty(0)
    of_entropy = with_gradient and entropy is not None
    entropy_gradient = torch.empty_like(logprobs) if of_entropy else logprobs.new_empty(0)
    loss, metrics, parts = _outputs(logprobs, POLICY_METRICS)
    if logprobs.numel():
        gradients = gradient if with_gradient else None, entropy_gradient if of_entropy else None
        scale, counted = _divisor(denom, denom_number)
        n = logprobs.numel()
        with torch.cuda.device_of(logprobs):
            _policy_loss[(parts.shape[1],)](
                logprobs, old_logprobs, advantages, mask, is_weights, entropy, ref_logprobs, weights, denom, *gradients,
                parts, n, scale, 1 - clip_low, 1 + clip_high, dual_clip, entropy_coef, kl_coef, KIND=kl_kind,
                STRAIGHT_THROUGH=straight_through, BLOCK=BLOCK, **OPTIONS
            )  # fmt: skip
            _add_up(parts, loss, metrics, denom, gradients, n, scale, counted, LOG_RATIO_MAX)
    return loss, gradient, entropy_gradient, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    denom: Tensor | None,
    denom_number: float,
    bound: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient in values, metrics). Arguments as in `ppo_loss`; `bound`: infinite is plain regression.

    Metrics: float64 sums over tokens: tokens, v, clipped ones, R, R^2, R - v, (R - v)^2.
    """
    gradient = torch.empty_like(values) if with_gradient else values.new_empty(0)
    loss, metrics, parts = _outputs(values, VALUE_METRICS)
    if values.numel():
        wanted = gradient if with_gradient else None
        scale, counted = _divisor(denom, denom_number)
        n = values.numel()
        with torch.cuda.device_of(values):
            _value_loss[(parts.shape[1],)](
                values, old_values, returns, mask, weights, denom, wanted, parts, n, scale, bound, BLOCK=BLOCK,
                **OPTIONS
            )  # fmt: skip
            _add_up(parts, loss, metrics, denom, (wanted, None), n, scale, counted, -1)
    return loss, gradient, metrics
