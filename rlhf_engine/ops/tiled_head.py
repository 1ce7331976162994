"""The "cpu" backend of linear_logprobs and linear_policy_loss: the head without [rows, V] logits.

linear_logprobs computes its tiles' logits again in the backward: 6NHV with a frozen head, 8NHV otherwise.
linear_policy_loss knows a token's gradient as soon as it knows its log-prob, so it has the gradient before it leaves
the forward: 4NHV and 6NHV. Both fold tiles alike, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.ops import tiles
from rlhf_engine.ops.tiles import ROW_TILE
from rlhf_engine.reference import TokenLoss


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
    if _is_rare(hidden, softcap):
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            mask=mask, ignore_index=ignore_index,
        )  # fmt: skip
    rows = reference.active_rows(targets, mask, ignore_index)
    with torch.autocast("cpu", enabled=False):
        logprobs, entropy = _Logprobs.apply(
            hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias, targets.reshape(-1)[rows].long(),
            logit_scale / temperature,
        )  # fmt: skip
    zeros = logprobs.new_zeros(targets.numel())
    return (
        zeros.index_copy(0, rows, logprobs).view(targets.shape),
        zeros.index_copy(0, rows, entropy).view(targets.shape),
    )


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As reference.linear_policy_loss, with the gradient made in the forward; without one to make, 2NHV."""
    if rows is None:
        rows = reference.active_rows(targets, mask, ignore_index)
    if _is_rare(hidden, softcap):
        return reference.linear_policy_loss(
            hidden, weight, targets, token_loss, bias=bias, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, rows=rows, weights=weights, denom=denom,
        )  # fmt: skip
    objective = _Objective(token_loss, rows, weights, denom)
    inputs = (
        hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias, targets.reshape(-1)[rows].long(),
        logit_scale / temperature,
    )  # fmt: skip
    with torch.autocast("cpu", enabled=False):
        # Inside a Function grad mode is off and needs_input_grad is set regardless, so this is asked out here.
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:3]):
            return _PolicyLoss.apply(*inputs, objective), objective.metrics
        logprobs, entropy = _Logprobs.apply(*inputs)
        return objective(logprobs, entropy, slice(0, len(rows)))


def _is_rare(hidden: Tensor, softcap: float | None) -> bool:
    return softcap is not None or hidden.dtype not in (torch.float32, torch.bfloat16)


class _Objective:
    """The loss of some of the rows as a function of their log-probs and entropies; the whole's metrics."""

    def __init__(
        self, token_loss: TokenLoss, rows: Tensor, weights: Tensor | None, denom: float | Tensor | None
    ) -> None:
        self.token_loss, self.rows, self.weights = token_loss, rows, weights
        self.denom = len(rows) if denom is None else denom
        self.metrics: dict[str, Tensor] = {}

    def __call__(self, logprobs: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.rows[part]
        return reference.reduce_loss(self.token_loss(logprobs, entropy, rows), rows, self.weights, self.denom)

    def gradients(self, logprobs: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        """Of the loss, in (n,) log-probs and entropies; None where it is 0 in all entropies."""
        leaves = [x.detach().requires_grad_() for x in (logprobs, entropy)]
        with torch.enable_grad():
            loss, _ = self(leaves[0], leaves[1], part)
        g_l, g_e = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
        return torch.zeros_like(logprobs) if g_l is None else g_l, g_e if g_e is not None and g_e.any() else None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        buffers = tiles.buffers_for(weight, keep=False)
        statistics = torch.empty(4, hidden.shape[0])
        for rows, kept, tile, wanted in tiles.tiles(hidden, targets):
            fold = tiles.fold_tile(tile, wanted, weight, bias, scale, buffers)
            statistics[:, rows] = torch.stack(fold.statistics())[:, kept]
        ctx.save_for_backward(hidden, weight, bias, targets, statistics)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        fold = tiles.Fold(*statistics)
        return fold.logprobs, fold.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, statistics = ctx.saved_tensors
        sums = tiles.Gradients(hidden, weight, bias, ctx.needs_input_grad)
        buffers = tiles.buffers_for(weight, keep=False)
        for rows, kept, tile, wanted in tiles.tiles(hidden, targets):
            fold = tiles.Fold(*tiles.pad(statistics[:, rows], kept))
            g_l = tile.new_zeros(ROW_TILE) if grad_logprobs is None else tiles.pad(grad_logprobs[rows], kept)
            g_e = None if grad_entropy is None else tiles.pad(grad_entropy[rows], kept)
            grad_tile = torch.zeros_like(tile)
            for segment in tiles.segments(weight, bias, buffers):
                z = segment.fill(tile, ctx.scale)
                grad = tiles.grad_logits(z, segment, fold, wanted, g_l, g_e).mul_(ctx.scale)
                sums.add(segment, grad, tile, kept, grad_tile)
            sums.set_hidden(rows, grad_tile[kept])
        return *sums.cast(), None, None


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float,
        objective: _Objective,
    ) -> Tensor:  # fmt: skip
        sums = tiles.Gradients(hidden, weight, bias, ctx.needs_input_grad)
        buffers = tiles.buffers_for(weight, keep=True)
        logprobs, entropy = torch.empty(2, hidden.shape[0])
        for rows, kept, tile, wanted in tiles.tiles(hidden, targets):
            fold = tiles.fold_tile(tile, wanted, weight, bias, scale, buffers)
            logprobs[rows], entropy[rows] = fold.logprobs[kept], fold.entropy[kept]
            g_l, g_e = objective.gradients(logprobs[rows], entropy[rows], rows)
            g_l, g_e = tiles.pad(g_l, kept), None if g_e is None else tiles.pad(g_e, kept)
            grad_tile = torch.zeros_like(tile)
            for segment in tiles.segments(weight, bias, buffers):
                grad = tiles.grad_logits(segment.logits, segment, fold, wanted, g_l, g_e).mul_(scale)
                sums.add(segment, grad, tile, kept, grad_tile)
            sums.set_hidden(rows, grad_tile[kept])
        loss, objective.metrics = objective(logprobs, entropy, slice(0, hidden.shape[0]))
        ctx.save_for_backward(*sums.cast())
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None, None, None
