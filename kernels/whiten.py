"""Whitening by the mean and variance over a mask, from moments (count, mean, squares) of parts of the numbers.

    mean = sum_i n_i mean_i / n;     squares = sum_i squares_i + n_i (mean_i - mean)^2       (of parts i, in float64)
    var = squares / max(n - ddof, 1);    out = (x - mean) * rsqrt(var + eps), or rsqrt(max(var, eps))

Two launches: one finds the moments of parts, and in the other every program folds all of them, in one order, so none
waits for another and results repeat bit by bit. Parts are found here, by position, or by whoever made the numbers:
gae.py finds those of sequences. Pointers that a sum depends on are compiled without regard to their alignment, which
would decide how wide the loads are, and with that the order of the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
MOST_PARTS = 1024  # of positions; and the most that every program folds: above, a launch in between folds them once
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused or not, a product and a sum round in two ways


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["X", "MASK"])
def _find_moments(X, MASK, MOMENTS, n, BLOCK: tl.constexpr):
    """Program i takes every block whose number is i modulo the number of programs."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    first, step = part.to(tl.int64) * BLOCK, parts.to(tl.int64) * BLOCK
    counts = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(first, n, step):
        at = start + lane
        kept = tl.load(MASK + at, mask=at < n, other=0)
        counts += kept.to(tl.int32)
        sums += tl.load(X + at, mask=kept, other=0.0).to(tl.float64)
    count = tl.sum(counts, 0).to(tl.float64)
    mean = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(first, n, step):
        at = start + lane
        kept = tl.load(MASK + at, mask=at < n, other=0)
        apart = tl.load(X + at, mask=kept, other=0.0).to(tl.float64) - mean
        squares += tl.where(kept, apart * apart, 0.0)
    store_moments(MOMENTS, part, parts, count, mean, tl.sum(squares, 0))


@triton.jit
def store_moments(MOMENTS, part, parts, count, mean, squares):
    """MOMENTS is (3, parts)."""
    tl.store(MOMENTS + part, count)
    tl.store(MOMENTS + parts + part, mean)
    tl.store(MOMENTS + 2 * parts + part, squares)


@triton.jit
def _fold(MOMENTS, parts, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    counts, sums = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for start in range(0, parts, LANES):
        part = start + lane
        n = tl.load(MOMENTS + part, mask=part < parts, other=0.0)
        counts += n
        sums += n * tl.load(MOMENTS + parts + part, mask=part < parts, other=0.0)
    count = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros([LANES], tl.float64)
    for start in range(0, parts, LANES):
        part = start + lane
        n = tl.load(MOMENTS + part, mask=part < parts, other=0.0)
        apart = tl.load(MOMENTS + parts + part, mask=part < parts, other=0.0) - mean
        squares += tl.load(MOMENTS + 2 * parts + part, mask=part < parts, other=0.0) + n * (apart * apart)
    return count, mean, tl.sum(squares, 0)


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["MOMENTS"])
def _fold_once(MOMENTS, OUT, parts, LANES: tl.constexpr):
    count, mean, squares = _fold(MOMENTS, parts, LANES)
    store_moments(OUT, 0, 1, count, mean, squares)


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["MOMENTS"])
def _apply(
    X, MASK, OUT, MOMENTS, n, parts, eps: tl.float64, DDOF: tl.constexpr, ADD_EPS: tl.constexpr, CENTER: tl.constexpr,
    ZERO_MASKED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    count, mean, squares = _fold(MOMENTS, parts, LANES)
    variance = squares / tl.maximum(count - DDOF, 1.0)
    under_root = variance + eps if ADD_EPS else tl.maximum(variance, eps)
    shift, scale = mean.to(tl.float32), (1.0 / tl.sqrt(under_root)).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    out = (tl.load(X + at, mask=inside, other=0.0) - shift) * scale
    if not CENTER:
        out += shift
    if ZERO_MASKED:
        out = tl.where(tl.load(MASK + at, mask=inside, other=0), out, 0.0)
    tl.store(OUT + at, out, mask=inside)


def whiten_by(
    moments: Tensor,
    x: Tensor,
    mask: Tensor,
    ddof: int,
    eps: float,
    add_eps: bool,
    center: bool,
    zero_masked: bool,
    out: Tensor,
) -> None:
    """Whitens x into `out`, which may be x, by `moments` (3, parts) of all that the mask holds; see `whiten`."""
    with torch.cuda.device_of(x):
        if moments.shape[1] > MOST_PARTS:
            folded = moments.new_empty(3, 1)
            _fold_once[(1,)](moments, folded, moments.shape[1], LANES=MOST_PARTS, **OPTIONS)
            moments = folded
        _apply[(triton.cdiv(x.numel(), BLOCK),)](
            x, mask, out, moments, x.numel(), moments.shape[1], eps, DDOF=ddof, ADD_EPS=add_eps, CENTER=center,
            ZERO_MASKED=zero_masked, LANES=MOST_PARTS, BLOCK=BLOCK, **OPTIONS
        )  # fmt: skip


def whiten_out(
    x: Tensor, mask: Tensor, ddof: int, eps: float, add_eps: bool, center: bool, zero_masked: bool, out: Tensor
) -> None:
    """`whiten` into `out`, which may be x."""
    if not x.numel():
        return
    parts = min(triton.cdiv(x.numel(), BLOCK), MOST_PARTS)
    moments = x.new_empty(3, parts, dtype=torch.float64)
    with torch.cuda.device_of(x):
        _find_moments[(parts,)](x, mask, moments, x.numel(), BLOCK=BLOCK, **OPTIONS)
    whiten_by(moments, x, mask, ddof, eps, add_eps, center, zero_masked, out)


def whiten(x: Tensor, mask: Tensor, ddof: int, eps: float, add_eps: bool, center: bool, zero_masked: bool) -> Tensor:
    """x, contiguous float32, made to have mean 0 and variance 1 over `mask` (same shape, bool).

    Args:
        ddof: 0 biased variance, 1 Bessel's.
        eps, add_eps: rsqrt(var + eps), else rsqrt(max(var, eps)).
        center: False adds the mean back.
        zero_masked: 0 at masked positions, else they are treated like all.
    """
    out = torch.empty_like(x)
    whiten_out(x, mask, ddof, eps, add_eps, center, zero_masked, out)
    return out
