"""Advantages and returns by GAE, one program to a sequence; with scores, rewards are shaped on the way (kl_gae.py).

    r_t = -kl_coef kl_t, plus the score at one place (kl_gae)
    delta_t = r_t + gamma V_p - V_t        A_t = delta_t + gamma lam A_p        R_t = A_t + V_t

p is the position after t that takes part ("carry": the next trainable token; "decay": the next position, where r and V
count as 0 if it is not trainable). Behind the last trainable token V_p is 0 or given, A_p is 0.

Each position is a map of the advantage behind it, A -> scale A + shift, and an associative scan composes those of a
tile. Tiles are counted from a sequence's own last token, and each hands on to the one in front of it. So the bits of a
sequence depend on it alone: not on padding, other sequences, or where it lies. Positions of a tile are numbered from
its end, which may be anywhere in memory, so no load is wider than one number, and the order inside a scan or a sum is
the same everywhere. Products and sums are not fused: the compiler might do that in one variant of the kernel only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_engine.kernels.kl import clamp, kl_of_token
from rlhf_engine.kernels.whiten import store_moments

TILE = 512
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _limits(OFFSETS, number, T):
    if OFFSETS is None:
        return number * T, number * T + T
    else:
        return tl.load(OFFSETS + number), tl.load(OFFSETS + number + 1)


@triton.jit
def _decay(gamma, LAM, number, decay):
    """gamma lam, with one rounding, as if it were of a number."""
    if LAM is None:
        return decay
    else:
        return (gamma * tl.load(LAM + number)).to(tl.float32)


@triton.jit
def _last_trainable(MASK, begin, end, TILE: tl.constexpr):
    """Its position, or begin - 1."""
    i = tl.arange(0, TILE)
    last = begin - 1
    high = end - 1
    while (last < begin) & (high >= begin):
        inside = i < tl.minimum(high - begin + 1, TILE).to(tl.int32)
        nearest = tl.min(tl.where(tl.load(MASK + high - i, mask=inside, other=0), i, TILE), 0)
        last = tl.where(nearest < TILE, high - nearest, last)
        high -= TILE
    return last


@triton.jit
def _clear(REWARDS, ADVANTAGES, RETURNS, KL, VALUE_MASK, begin, end, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    for start in range(begin, end, TILE):
        inside = i < tl.minimum(end - start, TILE).to(tl.int32)
        tl.store(ADVANTAGES + start + i, 0.0, mask=inside)
        tl.store(RETURNS + start + i, 0.0, mask=inside)
        if KL is not None:
            tl.store(REWARDS + start + i, 0.0, mask=inside)
            tl.store(KL + start + i, 0.0, mask=inside)
            tl.store(VALUE_MASK + start + i, 0, mask=inside)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _next_values(VALUES, MASK, i, i_place, inside, behind, DECAY: tl.constexpr):
    """V_p of each position of the tile that ends where VALUES and MASK point; `behind` where p lies behind the tile."""
    takes_part = inside & (i > 0)
    takes_part &= tl.load(MASK + 1 - i, mask=takes_part, other=0) | (i - 1 == i_place)
    if DECAY:
        values = tl.load(VALUES + 1 - i, mask=takes_part, other=0.0)
        return tl.where(i > 0, values, behind)
    else:
        nearest = tl.associative_scan(tl.where(takes_part, i - 1, -1), 0, _later)
        values = tl.load(VALUES - nearest, mask=nearest >= 0, other=0.0)
        return tl.where(nearest >= 0, values, behind)


@triton.jit
def _compose(scale, shift, next_scale, next_shift):
    return next_scale * scale, next_shift + next_scale * shift


@triton.jit
def _advantages(delta, active, decay, behind):
    """A at each position of a tile; at one that is not active, that of the active one behind it."""
    maps = (tl.where(active, decay, 1.0), tl.where(active, delta, 0.0))
    scale, shift = tl.associative_scan(maps, 0, _compose)
    return shift + scale * behind


@triton.jit
def _merge_tile(count, mean, squares, x, kept):
    """Moments of the tiles so far, and of this one (Chan, Golub, LeVeque 1979)."""
    x = tl.where(kept, x, 0.0).to(tl.float64)
    tile_count = tl.sum(kept.to(tl.int32), 0).to(tl.float64)
    tile_mean = tl.sum(x, 0) / tl.maximum(tile_count, 1.0)
    apart = tl.where(kept, x - tile_mean, 0.0)
    tile_squares = tl.sum(apart * apart, 0)
    total = count + tile_count
    share = tile_count / tl.maximum(total, 1.0)
    apart_means = tile_mean - mean
    squares += tile_squares + apart_means * apart_means * count * share
    return total, mean + apart_means * share, squares


@triton.jit(do_not_specialize=["T"])
def _sequence(
    REWARDS, VALUES, MASK, OFFSETS, T, LAM, VALUE_LAM, BOOTSTRAP, gamma: tl.float64, decay, value_decay, ADVANTAGES,
    RETURNS, SCORES, LOGPROBS, REF_LOGPROBS, KL, VALUE_MASK, MOMENTS, diff_low, diff_high, value_low, value_high,
    kl_coef, score_bound, KIND: tl.constexpr, AFTER: tl.constexpr, TWO: tl.constexpr, DECAY: tl.constexpr,
    TILE: tl.constexpr
):  # fmt: skip
    """REWARDS are read, or, with SCORES, found and written. MOMENTS (3, sequences): of the advantages, if wanted."""
    number = tl.program_id(0).to(tl.int64)
    begin, end = _limits(OFFSETS, number, T)
    decay, value_decay = _decay(gamma, LAM, number, decay), _decay(gamma, VALUE_LAM, number, value_decay)
    gamma_32 = tl.cast(gamma, tl.float32)
    score = 0.0 if SCORES is None else clamp(tl.load(SCORES + number), -score_bound, score_bound)
    next_value = 0.0 if BOOTSTRAP is None else tl.load(BOOTSTRAP + number)

    place = _last_trainable(MASK, begin, end, TILE)
    if AFTER:
        place = tl.where((place >= begin) & (place + 1 < end), place + 1, place)
    _clear(REWARDS, ADVANTAGES, RETURNS, KL, VALUE_MASK, place + 1, end, TILE)
    i = tl.arange(0, TILE)
    behind, value_behind = 0.0, 0.0  # advantages behind the tile
    count, mean, squares = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    for done in range(0, place - begin + 1, TILE):
        high = place - done  # position i of the tile is high - i
        inside = i < tl.minimum(high - begin + 1, TILE).to(tl.int32)
        i_place = tl.where(done == 0, 0, -1)
        trainable = tl.load(MASK + high - i, mask=inside, other=0)
        part = trainable | (i == i_place)
        if SCORES is None:
            rewards = tl.load(REWARDS + high - i, mask=part, other=0.0)
        else:
            d = tl.load(LOGPROBS + high - i, mask=trainable, other=0.0)
            d -= tl.load(REF_LOGPROBS + high - i, mask=trainable, other=0.0)
            kl = kl_of_token(d, diff_low, diff_high, value_low, value_high, KIND)
            rewards = tl.where(trainable & (kl_coef != 0.0), -kl_coef * kl, 0.0) + tl.where(i == i_place, score, 0.0)
            tl.store(KL + high - i, tl.where(trainable, kl, 0.0), mask=inside)
            tl.store(REWARDS + high - i, rewards, mask=inside)
            tl.store(VALUE_MASK + high - i, part, mask=inside)
        values = tl.load(VALUES + high - i, mask=part, other=0.0)
        next_values = _next_values(VALUES + high, MASK + high, i, i_place, inside, next_value, DECAY)
        delta = (rewards + gamma_32 * next_values) - values
        active = inside if DECAY else part
        front = tl.max(tl.where(active, i, -1), 0)  # a tile without any active position hands on what it was given
        next_value = tl.where(front >= 0, tl.sum(tl.where(i == front, values, 0.0), 0), next_value)

        advantages = _advantages(delta, active, decay, behind)
        behind = tl.sum(tl.where(i == TILE - 1, advantages, 0.0), 0)
        value_advantages = advantages
        if TWO:
            value_advantages = _advantages(delta, active, value_decay, value_behind)
            value_behind = tl.sum(tl.where(i == TILE - 1, value_advantages, 0.0), 0)
        tl.store(ADVANTAGES + high - i, tl.where(trainable, advantages, 0.0), mask=inside)
        tl.store(RETURNS + high - i, tl.where(part, value_advantages + values, 0.0), mask=inside)
        if MOMENTS is not None:
            count, mean, squares = _merge_tile(count, mean, squares, advantages, trainable)
    if MOMENTS is not None:
        store_moments(MOMENTS, number, tl.num_programs(0), count, mean, squares)


def launch(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    lam: Tensor | None,
    value_lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam_all: float,
    value_lam_all: float,
    two_lambdas: bool,
    decay: bool,
    advantages: Tensor,
    returns: Tensor,
    shaping: tuple[Tensor | None, ...] = (None,) * 6,
    bounds: tuple[float, ...] = (0.0,) * 6,
    kl_kind: int = 0,
    after: bool = False,
) -> None:
    if not values.numel():
        return
    with torch.cuda.device_of(values):
        _sequence[(count_of(values, cu_seqlens),)](
            rewards, values, mask, cu_seqlens, 0 if cu_seqlens is not None else values.shape[1], lam, value_lam,
            bootstrap, gamma, gamma * lam_all, gamma * value_lam_all, advantages, returns, *shaping, *bounds,
            KIND=kl_kind, AFTER=after, TWO=two_lambdas, DECAY=decay, TILE=TILE, **OPTIONS
        )  # fmt: skip


def count_of(values: Tensor, cu_seqlens: Tensor | None) -> int:
    return values.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def gae_out(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    lam: Tensor | None,
    value_lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam_all: float,
    value_lam_all: float,
    two_lambdas: bool,
    decay: bool,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    """`gae` into `advantages` and `returns`, which are none of the inputs."""
    launch(
        rewards, values, mask, lam, value_lam, bootstrap, cu_seqlens, gamma, lam_all, value_lam_all, two_lambdas,
        decay, advantages, returns
    )  # fmt: skip


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    lam: Tensor | None,
    value_lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam_all: float,
    value_lam_all: float,
    two_lambdas: bool,
    decay: bool,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), 0 where masked.

    Args:
        rewards, values, mask: (B, T), or (N,) with cu_seqlens; contiguous float32, mask bool.
        lam, value_lam: (B,) float64, or None for the numbers lam_all, value_lam_all.
        bootstrap: (B,) float32, the value after the last trainable token; None is 0.
        cu_seqlens: (B + 1,) int64 offsets.
        two_lambdas: returns by value_lam; else by lam, and value_lam is not looked at.
        decay: how the recursion passes masked tokens between trainable ones.
    """
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    gae_out(
        rewards, values, mask, lam, value_lam, bootstrap, cu_seqlens, gamma, lam_all, value_lam_all, two_lambdas,
        decay, advantages, returns
    )  # fmt: skip
    return advantages, returns
