"""The softmax of a language model's head: log-probabilities and entropies of rows of logits, and their gradient.

    z' = c tanh(a (z + bias) / c) / T, or a (z + bias) / T;  banned tokens stay at -inf
    m = max_v z'_v;   d_v = z'_v - m;   s = sum_v exp d_v;   ls = log s;   p_v = exp(d_v - ls);   mu = sum_v p_v d_v
    logprob = min(0, d_y - ls)        entropy = ls - mu        (everything relative to m: lse itself loses the digits)
    dz'_v = g_l ([v = y] - p_v) + g_e p_v (mu - d_v)           (0 * inf counts as 0)

Forward, one program reads one segment of a row, once, holds it in registers, and leaves a few numbers; `head_combine`
folds those from the left. Segments are counted from the first column and all as wide, whoever holds them: so logits may
come in chunks of whole segments, few long rows fill a GPU as well as many short ones, and no program grows with V.

A row's bits depend on that row alone: sums have one order (rows.py), and products are not fused into them but where it
is written, since variants of a kernel might not do so alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_engine.kernels.rows import aligned, load, row_of, store, strides_of, tree, tree_sum, vector_of

SEGMENT = 8192
GRADIENT_BLOCK = 4096
LANES = 32  # rows to a program of `head_combine`
WIDTH_BLOCK = 1024
SCALE_BLOCK, MOST_SCALERS = 4096, 1024
FIELDS, EXTRA_FIELDS = 4, 6
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _exp(x):
    """What tl.exp does, less three instructions of five: they are for results below 2^-126, which are 0 here."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _tanh(x):
    """To an ulp or two. Near 0, where 1 - 2 / (exp(2x) + 1) loses digits, x + x^3 times a minimax polynomial in x^2."""
    square = x * x
    series = tl.fma(square, -5.8951578e-3, 2.0795971e-2)
    series = tl.fma(series, square, -5.378383e-2)
    series = tl.fma(series, square, 1.3331924e-1)
    series = tl.fma(series, square, -3.3333299e-1)
    size = tl.abs(x)
    far = 1.0 - 2.0 / (_exp(size + size) + 1.0)
    return tl.where(size < 0.6, tl.fma(series * square, x, x), tl.where(x < 0.0, -far, far))


@triton.jit
def _factor(TEMPERATURE, row, outside, inverse_temperature):
    if TEMPERATURE is not None:
        temperature = tl.load(TEMPERATURE + row)
        inverse_temperature = tl.where(temperature > 0.0, tl.math.div_rn(1.0, temperature), float("nan"))
    return outside * inverse_temperature


@triton.jit
def _tempered(z, inside, factor, CAPPED: tl.constexpr):
    """(z', its derivative over `factor`)."""
    if CAPPED:
        tanh = _tanh(z * inside)
        return tl.where(z == float("-inf"), z, tanh * factor), inside * (1.0 - tanh * tanh)
    else:
        return z * factor, 1.0


@triton.jit(
    do_not_specialize=["stride_b", "stride_t", "T", "n", "start", "ignore"],
    do_not_specialize_on_alignment=["X", "Y", "BIAS", "TEMPERATURE", "TARGET_LOGITS", "PARTS"],
)
def _fold(
    X, Y, BIAS, TEMPERATURE, TARGET_LOGITS, PARTS, stride_b: tl.int64, stride_t: tl.int64, T: tl.int32, n: tl.int32,
    start: tl.int64, ignore: tl.int64, inside, outside, inverse_temperature, CAPPED: tl.constexpr,
    EXTRAS: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, NEAR: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    y = tl.load(Y + row).to(tl.int64)
    m, s, u, z_y, q, top = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if y != ignore:
        i, left = tl.arange(0, BLOCK), n - first
        logits = row_of(X, row, T, stride_b, stride_t, VECTOR) + first
        factor = _factor(TEMPERATURE, row, outside, inverse_temperature)
        z = load(logits, i, left, float("-inf"), BLOCK, VECTOR)
        at = y - start - first
        here = (at >= 0) & (at < tl.minimum(left, BLOCK))
        at = tl.where(here, at, -1).to(tl.int32)
        if TARGET_LOGITS is not None:
            z_y = tl.load(TARGET_LOGITS + row)
            z = tl.where(i == at, z_y, z)
        else:
            z_y = tl.load(logits + at, mask=here, other=0.0).to(tl.float32)
        if BIAS is not None:
            z += load(aligned(BIAS, first, VECTOR), i, left, 0.0, BLOCK, VECTOR)
            z_y += tl.load(BIAS + first + at, mask=here, other=0.0)
        z, _ = _tempered(z, inside, factor, CAPPED)
        z_y, _ = _tempered(z_y, inside, factor, CAPPED)
        z_y = tl.where(here, z_y, 0.0)
        m = tl.max(z, 0)
        if EXTRAS:
            top = (start + first + tl.min(tl.where(z == m, i, BLOCK), 0)).to(tl.float32)
        d = z - tl.where(m == float("-inf"), 0.0, m)
        e = _exp(d)
        # 0 where d is -inf: the bound is finite, and so low that its exponential is 0 as well
        s, u = tl.split(tree_sum(tl.join(e, tl.maximum(d, -1e4) * e), FAR, NEAR))
        if EXTRAS:
            q = tl.sum(tree_sum(tl.reshape(e * e, [BLOCK, 1]), FAR, NEAR), 0)
    rows = tl.num_programs(0).to(tl.int64)
    to = PARTS + tl.program_id(1) * FIELDS * rows + row
    tl.store(to, m)
    tl.store(to + rows, s)
    tl.store(to + 2 * rows, u)
    tl.store(to + 3 * rows, z_y)
    if EXTRAS:
        tl.store(to + 4 * rows, q)
        tl.store(to + 5 * rows, top)


@triton.jit(
    do_not_specialize=["rows", "segments", "start", "vocabulary", "ignore"],
    do_not_specialize_on_alignment=["PARTS", "Y", "STATISTICS"],
)
def _combine(
    PARTS, Y, STATISTICS, rows: tl.int64, segments: tl.int32, start: tl.int64, vocabulary: tl.int64, ignore: tl.int64,
    EXTRAS: tl.constexpr, FIELDS: tl.constexpr, SEGMENT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    y = tl.load(Y + r, mask=r < rows, other=0).to(tl.int64)
    live = (r < rows) & (y != ignore)
    known = (y >= start) & (y < start + vocabulary)
    of_y = PARTS + ((y - start) // SEGMENT * FIELDS + 3) * rows + r
    z_y = tl.load(of_y, mask=live & known, other=float("-inf"))
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u, q, top = s, s, s
    at = PARTS + r
    for _ in tl.range(0, segments, loop_unroll_factor=4):
        m_k, s_k, u_k = tl.load(at, mask=live), tl.load(at + rows, mask=live), tl.load(at + 2 * rows, mask=live)
        m_new = tl.maximum(m, m_k)
        # A maximum of -inf has sums of 0, which stay so: no shift, or it were inf - inf.
        shift = tl.where(m == float("-inf"), 0.0, m - m_new)
        shift_k = tl.where(m_k == float("-inf"), 0.0, m_k - m_new)
        scale, scale_k = _exp(shift), _exp(shift_k)
        u = scale * (u + shift * s) + scale_k * (u_k + shift_k * s_k)
        s = scale * s + scale_k * s_k
        if EXTRAS:
            q = scale * scale * q + scale_k * scale_k * tl.load(at + 4 * rows, mask=live)
            top = tl.where(m_k > m, tl.load(at + 5 * rows, mask=live), top)
        m = m_new
        at += FIELDS * rows
    ls, mu = tl.log(s), tl.math.div_rn(u, s)
    entropy = ls - mu
    logprob = (z_y - m) - ls
    logprob = tl.where(logprob > 0.0, 0.0, logprob)  # tl.minimum may drop a NaN
    nan = float("nan")
    to = STATISTICS + r
    tl.store(to, tl.where(live, tl.where(known, logprob, nan), 0.0), mask=r < rows)
    tl.store(to + rows, tl.where(live, tl.where(known, entropy, nan), 0.0), mask=r < rows)
    tl.store(to + 2 * rows, tl.where(live, m, 0.0), mask=r < rows)
    tl.store(to + 3 * rows, tl.where(live, ls, 0.0), mask=r < rows)
    tl.store(to + 4 * rows, tl.where(live, mu, 0.0), mask=r < rows)
    tl.store(to + 5 * rows, tl.where(live, z_y, 0.0), mask=r < rows)
    if EXTRAS:
        top = tl.where(entropy == entropy, top, nan)
        tl.store(to + 6 * rows, tl.where(live, top, 0.0), mask=r < rows)
        tl.store(to + 7 * rows, tl.where(live, tl.math.div_rn(q, s * s), 0.0), mask=r < rows)


@triton.jit(
    do_not_specialize=[
        "statistics_stride", "grad_stride", "entropy_stride", "stride_b", "stride_t", "T", "out_b", "out_t", "out_T",
        "n", "start", "ignore",
    ],
    do_not_specialize_on_alignment=[
        "X", "Y", "STATISTICS", "GRAD_LOGPROBS", "GRAD_ENTROPY", "BIAS", "TEMPERATURE", "TARGET_LOGITS", "OUT",
    ],
)  # fmt: skip
def _gradient(
    X, Y, STATISTICS, GRAD_LOGPROBS, GRAD_ENTROPY, BIAS, TEMPERATURE, TARGET_LOGITS, OUT, statistics_stride: tl.int64,
    grad_stride: tl.int64, entropy_stride: tl.int64, stride_b: tl.int64, stride_t: tl.int64, T: tl.int32,
    out_b: tl.int64, out_t: tl.int64, out_T: tl.int32, n: tl.int32, start: tl.int64, ignore: tl.int64, inside, outside,
    inverse_temperature, CAPPED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    y = tl.load(Y + row).to(tl.int64)
    g_l, g_e = 0.0, 0.0  # found beside y, not after it: a dead row's are loaded in vain
    if GRAD_LOGPROBS is not None:
        g_l = tl.where(y != ignore, tl.load(GRAD_LOGPROBS + row * grad_stride), 0.0)
    if GRAD_ENTROPY is not None:
        g_e = tl.where(y != ignore, tl.load(GRAD_ENTROPY + row * entropy_stride), 0.0)
    i, left = tl.arange(0, BLOCK), n - first
    dz = tl.zeros([BLOCK], tl.float32)
    if (g_l != 0.0) | (g_e != 0.0):
        z = load(row_of(X, row, T, stride_b, stride_t, VECTOR) + first, i, left, 0.0, BLOCK, VECTOR)
        factor = _factor(TEMPERATURE, row, outside, inverse_temperature)
        at = y - start - first
        hit = i == tl.where((at >= 0) & (at < BLOCK), at, -1).to(tl.int32)
        if TARGET_LOGITS is not None:
            z = tl.where(hit, tl.load(TARGET_LOGITS + row), z)
        if BIAS is not None:
            z += load(aligned(BIAS, first, VECTOR), i, left, 0.0, BLOCK, VECTOR)
        z, slope = _tempered(z, inside, factor, CAPPED)
        of_row, step = STATISTICS + row, statistics_stride
        logprob, m = tl.load(of_row), tl.load(of_row + 2 * step)
        ls, mu = tl.load(of_row + 3 * step), tl.load(of_row + 4 * step)
        g_l = tl.where(logprob == logprob, g_l, float("nan"))  # NaN where the target is outside the vocabulary, too
        d = z - m
        p = _exp(d - ls)
        dz = tl.fma(p, tl.fma(g_e, mu - d, -g_l), tl.where(hit, g_l, 0.0)) * (factor * slope)
        dz = tl.where(d == float("-inf"), 0.0, dz)
    to = row_of(OUT, row, out_T, out_b, out_t, VECTOR) + first
    store(to, i, left, dz.to(OUT.dtype.element_ty), BLOCK, VECTOR)


@triton.jit(
    do_not_specialize=["hidden_stride", "weight_stride", "width", "vocabulary", "ignore"],
    do_not_specialize_on_alignment=["H", "W", "Y", "OUT"],
)
def _target_logits(
    H, W, Y, OUT, hidden_stride: tl.int64, weight_stride: tl.int64, width: tl.int32, vocabulary: tl.int64,
    ignore: tl.int64, BLOCK: tl.constexpr, FAR: tl.constexpr, NEAR: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    y = tl.load(Y + row).to(tl.int64)
    logit = 0.0
    if (y != ignore) & (y >= 0) & (y < vocabulary):
        i = tl.arange(0, BLOCK)
        hidden = row_of(H, row, 1, hidden_stride, 0, VECTOR)
        weight = row_of(W, y, 1, weight_stride, 0, VECTOR)
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            h = load(hidden + first, i, width - first, 0.0, BLOCK, VECTOR)
            w = load(weight + first, i, width - first, 0.0, BLOCK, VECTOR)
            sums = tl.fma(h, w, sums)
        logit = tl.sum(tree_sum(tl.reshape(sums, [BLOCK, 1]), FAR, NEAR), 0)
    tl.store(OUT + row, logit)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["FACTOR"])
def _scale(X, FACTOR, n: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1.0:
        i = tl.arange(0, BLOCK)
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            if n - first >= BLOCK:
                tl.store(X + first + i, _scaled(tl.load(X + first + i), factor))
            else:
                inside = i < n - first
                tl.store(X + first + i, _scaled(tl.load(X + first + i, mask=inside), factor), mask=inside)


@triton.jit
def _scaled(x, factor):
    wide: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    return (x.to(wide) * factor.to(wide)).to(x.dtype)


def _scales(logit_scale: float, softcap: float) -> tuple[float, float]:
    """(inside, outside): outside tanh(inside z), or outside z without a cap. Divided here, where there is float64."""
    return (logit_scale / softcap, softcap) if softcap else (1.0, logit_scale)


def head_fold(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    target_logits: Tensor | None,
    logit_scale: float,
    softcap: float,
    inverse_temperature: float,
    start: int,
    ignore_index: int,
    extras: bool,
) -> Tensor:
    """Parts of columns [start, start + n) of the vocabulary: (segments, 4 or 6, R) float32, to be combined.

    Args:
        logits: (R, n) or (B, T, n) with R = B T; float16, bfloat16 or float32; last stride 1.
        targets: (R,) int32 or int64, contiguous, ids in the whole vocabulary.
        bias: (n,) float32 or None.
        temperature: (R,) float32; None for inverse_temperature in all rows.
        target_logits: (R,) float32, more exact than the target's own column of logits, in whose place they are taken.
        softcap: 0 is none.
        ignore_index: rows of this target are not read, and their parts are 0.
        extras: also those for the most probable token and sum p^2.

    Returns:
        For each segment of 8,192 columns m, s, u = s mu, z'_y (0 if y is in another one), sum (exp d)^2 and the first
        column where z' = m. A temperature that is not > 0 gives NaN.
    """
    n, rows = logits.shape[-1], targets.numel()
    fields = EXTRA_FIELDS if extras else FIELDS
    parts = logits.new_empty(triton.cdiv(n, SEGMENT), fields, rows, dtype=torch.float32)
    # A narrow vocabulary has a narrow segment; a narrow last chunk has not, or bits would hang on the chunks.
    block = SEGMENT if start else min(SEGMENT, max(128, triton.next_power_of_2(n)))
    if parts.numel():
        inside, outside = _scales(logit_scale, softcap)
        with torch.cuda.device_of(logits):
            _fold[(rows, parts.shape[0])](
                logits, targets, bias, temperature, target_logits, parts, *strides_of(logits), n, start, ignore_index,
                inside, outside, inverse_temperature, CAPPED=softcap != 0, EXTRAS=extras, FIELDS=fields, BLOCK=block,
                VECTOR=vector_of(logits, bias), **tree(block, max(1, block // 1024), logits.dtype), **OPTIONS
            )  # fmt: skip
    return parts


def head_combine(parts: Tensor, targets: Tensor, start: int, vocabulary: int, ignore_index: int) -> Tensor:
    """Statistics of each row, (6 or 8, R) float32: logprob, entropy, m, ls, mu, z'_y[, first maximum, sum p^2].

    Args:
        parts: those of all columns [start, start + vocabulary), in order: one `head_fold`, or several concatenated.
        targets: as in head_fold. Outside of these columns they give NaN for logprob and entropy, and z'_y = -inf.
    """
    segments, fields, rows = parts.shape
    statistics = parts.new_empty(fields + 2, rows)
    if rows:
        with torch.cuda.device_of(parts):
            _combine[(triton.cdiv(rows, LANES),)](
                parts.contiguous(), targets, statistics, rows, segments, start, vocabulary, ignore_index,
                EXTRAS=fields == EXTRA_FIELDS, FIELDS=fields, SEGMENT=SEGMENT, LANES=LANES, num_warps=1, **OPTIONS
            )  # fmt: skip
    return statistics


def head_gradient(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor | None,
    target_logits: Tensor | None,
    logit_scale: float,
    softcap: float,
    inverse_temperature: float,
    start: int,
    ignore_index: int,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits, as they were given to `head_fold`, into `out`, which may be the logits.

    Args:
        statistics: of the whole rows, (6 or 8, R); last stride 1.
        grad_logprobs, grad_entropy: (R,) float32 or None, any stride. A row where both are 0 is not read.
        out: (R, n) or the shape of logits; float16, bfloat16 or float32; last stride 1.
    """
    n, rows = logits.shape[-1], targets.numel()
    if logits.numel():
        inside, outside = _scales(logit_scale, softcap)
        block = min(GRADIENT_BLOCK, max(128, triton.next_power_of_2(n)))
        grad_stride, entropy_stride = (0 if g is None else g.stride(0) for g in (grad_logprobs, grad_entropy))
        with torch.cuda.device_of(logits):
            _gradient[(rows, triton.cdiv(n, block))](
                logits, targets, statistics, grad_logprobs, grad_entropy, bias, temperature, target_logits, out,
                statistics.stride(0), grad_stride, entropy_stride, *strides_of(logits), *strides_of(out), n, start,
                ignore_index, inside, outside, inverse_temperature, CAPPED=softcap != 0, BLOCK=block,
                VECTOR=vector_of(logits, bias, out), num_warps=max(1, block // 256), **OPTIONS
            )  # fmt: skip


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """hidden_r . weight[y_r] in float32, (R,); 0 for targets to ignore and those outside of weight.

    Args:
        hidden: (R, H), and weight: (V, H): float16, bfloat16 or float32; last stride 1. targets: (R,) int32 or int64.
    """
    rows, width = hidden.shape
    out = hidden.new_empty(rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(hidden):
            _target_logits[(rows,)](
                hidden, weight, targets, out, hidden.stride(0), weight.stride(0), width, weight.shape[0], ignore_index,
                BLOCK=WIDTH_BLOCK, VECTOR=vector_of(hidden, weight), **tree(WIDTH_BLOCK, 4, hidden.dtype),
                **OPTIONS
            )  # fmt: skip
    return out


def head_scale(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place, for any contiguous x; factor: float32, one number. Where it is 1, x is not touched."""
    if x.numel():
        with torch.cuda.device_of(x):
            _scale[(min(triton.cdiv(x.numel(), SCALE_BLOCK), MOST_SCALERS),)](
                x, factor, x.numel(), BLOCK=SCALE_BLOCK, num_warps=16
            )  # fmt: skip
