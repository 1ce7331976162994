"""Tiles of the head on CPUs: logits exist for ROW_TILE rows at a time, folded in segments that stay in the cache.

    z = scale (x W^T + b);  per segment s: m_s = max z, n_s = sum exp(z - m_s), e_s = sum exp(z - m_s) (z - m_s)
    m = max m_s,  n = sum n_s exp(m_s - m),  mu = sum exp(m_s - m) (e_s + n_s (m_s - m)) / n
    logprob = z_y - m - log n,   entropy = log n - mu
    dz_v = g_l (1[v = y] - p_v) + g_e p_v (mu - (z_v - m)),   dx = scale dz W,   dW += scale dz^T x

A GEMM chooses its summation order by its shape, so a tile's shape never depends on how many rows share the call: a
row's bits depend on that row alone. Products are float32 whatever the input: without bfloat16 instructions those in
bfloat16 are slower, and they would round the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# On two AVX2 cores at width 576: 123 GFLOP/s at 128 x 2048, against 75 at 64 x 49,152 and 142 at 256 x 2048. A taller
# tile wastes more on the rows that fill it up.
ROW_TILE = 128
SEGMENT = 2048


def tiles(hidden: Tensor, targets: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Full tiles, the tail filled with zeros: (rows, the same counted in the tile, (ROW_TILE, H), (ROW_TILE,))."""
    for start in range(0, hidden.shape[0], ROW_TILE):
        rows = slice(start, min(start + ROW_TILE, hidden.shape[0]))
        kept = slice(0, rows.stop - start)
        tail = ROW_TILE - kept.stop
        yield rows, kept, F.pad(hidden[rows].float(), (0, 0, 0, tail)), F.pad(targets[rows], (0, tail))


@dataclass(slots=True)
class Segment:
    """Some tokens of the vocabulary: their weights in float32, and room for a tile's logits."""

    start: int
    weight: Tensor  # (n, H)
    bias: Tensor | None  # (n,)
    logits: Tensor  # (ROW_TILE, n)

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.weight.shape[0])

    def fill(self, tile: Tensor, scale: float) -> Tensor:
        torch.mm(tile, self.weight.t(), out=self.logits)
        if self.bias is not None:
            self.logits.add_(self.bias)
        return self.logits.mul_(scale) if scale != 1.0 else self.logits

    def find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(ROW_TILE,) which targets are in here, and (ROW_TILE,) where."""
        index = targets - self.start
        inside = (index >= 0) & (index < self.weight.shape[0])
        return inside, torch.where(inside, index, 0)


def segments(weight: Tensor, bias: Tensor | None, buffers: Tensor) -> Iterator[Segment]:
    """`buffers` (1 or all segments, ROW_TILE, SEGMENT): the logits of all exist at a time, or those of one."""
    for i, start in enumerate(range(0, weight.shape[0], SEGMENT)):
        w = weight[start : start + SEGMENT].float()
        b = None if bias is None else bias[start : start + SEGMENT].float()
        yield Segment(start, w, b, buffers[min(i, len(buffers) - 1), :, : w.shape[0]])


def buffers_for(weight: Tensor, *, keep: bool) -> Tensor:
    return torch.empty(-(-weight.shape[0] // SEGMENT) if keep else 1, ROW_TILE, SEGMENT)


@dataclass(slots=True)
class Fold:
    """What rows are besides their logits; (n,) each."""

    target: Tensor  # z_y
    maximum: Tensor  # m
    log_sum: Tensor  # log n
    mean: Tensor  # mu

    @property
    def logprobs(self) -> Tensor:
        return (self.target - self.maximum - self.log_sum).clamp(max=0)

    @property
    def entropy(self) -> Tensor:
        return self.log_sum - self.mean

    def statistics(self) -> list[Tensor]:
        return [self.target, self.maximum, self.log_sum, self.mean]


def fold_tile(
    tile: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scale: float, buffers: Tensor
) -> Fold:
    """Fills `buffers` with the tile's logits, segment by segment, and folds them on the way."""
    distances, powers = torch.empty(2, ROW_TILE, SEGMENT)
    target = tile.new_zeros(ROW_TILE)
    parts = []
    for segment in segments(weight, bias, buffers):
        z = segment.fill(tile, scale)
        maximum = z.amax(1)
        finite = torch.where(maximum == -torch.inf, 0.0, maximum)  # nothing but banned tokens: all powers are 0
        d = torch.sub(z, finite[:, None], out=distances[:, : z.shape[1]])
        p = torch.exp(d, out=powers[:, : z.shape[1]])
        moment = torch.linalg.vecdot(p, d)
        if torch.isnan(moment).any():  # a banned token: 0 * -inf counts as 0
            moment = torch.linalg.vecdot(p, d.masked_fill_(d == -torch.inf, 0.0))
        parts.append(torch.stack([maximum, p.sum(1), moment]))
        inside, index = segment.find(targets)
        target = torch.where(inside, z.gather(1, index[:, None])[:, 0], target)
    maxima, sums, moments = torch.stack(parts, 2).unbind(0)  # (ROW_TILE, segments) each
    maximum = maxima.amax(1)
    shift = (maxima - maximum[:, None]).clamp(min=torch.finfo(torch.float32).min)  # -inf times a sum of 0 is 0
    factor = shift.exp()
    total = (sums * factor).sum(1)
    mean = (factor * (moments + sums * shift)).sum(1) / total
    return Fold(target, maximum, total.log(), mean)


def grad_logits(z: Tensor, segment: Segment, fold: Fold, targets: Tensor, g_l: Tensor, g_e: Tensor | None) -> Tensor:
    """dz (ROW_TILE, n) in place of z."""
    d = z.sub_(fold.maximum[:, None])
    p = (d - fold.log_sum[:, None]).exp_()
    if g_e is None:
        grad = p.mul_(-g_l[:, None])
    else:
        factor = d.masked_fill_(d == -torch.inf, 0.0).neg_().add_(fold.mean[:, None]).mul_(g_e[:, None])
        grad = p.mul_(factor.sub_(g_l[:, None]))
    inside, index = segment.find(targets)
    return grad.scatter_add_(1, index[:, None], torch.where(inside, g_l, 0.0)[:, None])


class Gradients:
    """Sums up the gradients in hidden, weight and bias, in float32, as far as they are needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> None:
        self.dtypes = [x.dtype if x is not None else None for x in (hidden, weight, bias)]
        self.hidden = torch.empty(hidden.shape) if needs[0] else None
        self.weight = torch.zeros(weight.shape) if needs[1] else None
        self.bias = torch.zeros(weight.shape[0]) if needs[2] else None

    def add(self, segment: Segment, grad: Tensor, tile: Tensor, kept: slice, grad_tile: Tensor) -> None:
        """Adds what dz (ROW_TILE, n) of one segment gives; rows beyond `kept` may be NaN, and reach nothing."""
        if self.hidden is not None:
            torch.addmm(grad_tile, grad, segment.weight, out=grad_tile)  # torch's FLOP counter misses addmm_
        if self.weight is not None:
            into = self.weight[segment.tokens]
            torch.addmm(into, grad[kept].t(), tile[kept], out=into)
        if self.bias is not None:
            self.bias[segment.tokens] += grad[kept].sum(0)

    def set_hidden(self, rows: slice, grad: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[rows] = grad

    def cast(self) -> list[Tensor | None]:
        sums = (self.hidden, self.weight, self.bias)
        return [None if x is None else x.to(dtype) for x, dtype in zip(sums, self.dtypes, strict=True)]


def pad(values: Tensor, kept: slice) -> Tensor:
    """(..., n) -> (..., ROW_TILE), zeros behind: rows that fill up a tile have no gradient."""
    return F.pad(values, (0, ROW_TILE - kept.stop))
