"""The "cpu" backend of linear_logprobs: one tile of logits at a time, and a backward without autograd inside a tile.

    forward   z = tile @ W^T,  m = max z,  ls = log sum exp(z - m),  mu = sum p (z - m)
    backward  dz_v = g_l (1[v = y] - p_v) + g_e p_v (mu - (z_v - m)),   dX = dz W,   dW += dz^T X        (z recomputed)

Against autograd through the same tile this saves passes over [rows, V], which on a CPU cost as much as the products:
6NHV with a frozen head, 8NHV otherwise. Tiles have the reference's shape, so a row's bits depend on that row alone.
Logits are of the input dtype's product; both products of the backward are float32 whatever the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.reference import ROW_TILE

# Rows of a bfloat16 weight that the backward raises to float32 at a time: 9 MiB at width 576 stay in the cache.
WEIGHT_SEGMENT = 4096


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """As reference.linear_logprobs. Softcap, float64 and fp16 are rare on CPU; they take the reference's path."""
    if softcap is not None or hidden.dtype not in (torch.float32, torch.bfloat16):
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            mask=mask, ignore_index=ignore_index,
        )  # fmt: skip
    active = targets != ignore_index
    rows = (active if mask is None else active & mask).reshape(-1).nonzero().squeeze(1)
    with torch.autocast("cpu", enabled=False):
        logprobs, entropy = _Head.apply(
            hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias, targets.reshape(-1)[rows].long(),
            logit_scale / temperature,
        )  # fmt: skip
    zeros = logprobs.new_zeros(targets.numel())
    return (
        zeros.index_copy(0, rows, logprobs).view(targets.shape),
        zeros.index_copy(0, rows, entropy).view(targets.shape),
    )


def _tiles(hidden: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Full tiles, the tail filled with zeros: (rows of the result, (ROW_TILE, H), (ROW_TILE,))."""
    for start in range(0, hidden.shape[0], ROW_TILE):
        rows = slice(start, min(start + ROW_TILE, hidden.shape[0]))
        tail = ROW_TILE - (rows.stop - start)
        yield rows, F.pad(hidden[rows], (0, 0, 0, tail)), F.pad(targets[rows], (0, tail))


def _distance(tile: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """z - max z, (ROW_TILE, V) float32, in one buffer."""
    logits = F.linear(tile, weight, bias).float()
    if scale != 1.0:
        logits.mul_(scale)
    return logits.sub_(logits.amax(1, keepdim=True))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        logprobs, log_sums, means = (torch.empty(count) for _ in range(3))
        for rows, tile, wanted in _tiles(hidden, targets):
            d = _distance(tile, weight, bias, scale)
            d_y = d.gather(1, wanted[:, None])[:, 0]
            p = d.exp()
            total = p.sum(1)
            log_sum = total.log()
            mean = torch.linalg.vecdot(p, d) / total
            if torch.isnan(mean).any():  # a banned token: 0 * -inf counts as 0
                mean = torch.linalg.vecdot(p, d.masked_fill_(d == -torch.inf, 0.0)) / total
            kept = slice(0, rows.stop - rows.start)
            logprobs[rows] = (d_y - log_sum).clamp_(max=0)[kept]
            log_sums[rows], means[rows] = log_sum[kept], mean[kept]
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums, means)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return logprobs, log_sums - means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sums, means = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0]) if needs_bias else None
        for rows, tile, wanted in _tiles(hidden, targets):
            kept = slice(0, rows.stop - rows.start)
            d = _distance(tile, weight, bias, ctx.scale)[kept]
            p = (d - log_sums[rows, None]).exp_()
            grad = _grad_logits(d, p, wanted[kept], means[rows], grad_logprobs, grad_entropy, rows).mul_(ctx.scale)
            if grad_hidden is not None:
                grad_hidden[rows] = _times_weight(grad, weight)[kept].to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad.t() @ tile[kept].float()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        cast = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        return grad_hidden, *cast, None, None


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """(rows, V) float32 @ (V, H) -> (ROW_TILE, H) float32, by a product of the one shape that all tiles share.

    Without bfloat16 instructions the product in bfloat16 takes 70 times as long as this one, and a float32 copy of the
    whole weight would take twice the weight's memory.
    """
    if grad.shape[0] < ROW_TILE:
        grad = F.pad(grad, (0, 0, 0, ROW_TILE - grad.shape[0]))
    if weight.dtype == torch.float32:
        return grad @ weight
    product = grad.new_zeros(grad.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], WEIGHT_SEGMENT):
        segment = slice(start, start + WEIGHT_SEGMENT)
        product.addmm_(grad[:, segment], weight[segment].float())
    return product


def _grad_logits(
    d: Tensor,
    p: Tensor,
    targets: Tensor,
    means: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    rows: slice,
) -> Tensor:
    """dz before the chain through scale, reusing the buffers of d and p."""
    g_l = torch.zeros_like(means) if grad_logprobs is None else grad_logprobs[rows]
    if grad_entropy is None:
        grad = p.mul_(-g_l[:, None])
    else:
        factor = d.masked_fill_(d == -torch.inf, 0.0).neg_().add_(means[:, None]).mul_(grad_entropy[rows, None])
        grad = p.mul_(factor.sub_(g_l[:, None]))
    return grad.scatter_add_(1, targets[:, None], g_l[:, None])
