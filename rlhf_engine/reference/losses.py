"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347), token by token and summed up over a global count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.reference.kl import kl_estimate
from rlhf_engine.reference.precision import up

TokenLoss = Callable[[Tensor, Tensor | None, Tensor], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


def ppo_token_loss(
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    is_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
) -> TokenLoss:
    """The clipped objective of each token, as a function of (logprobs (n,), entropy (n,), rows (n,) int64).

    d = clamp(logprobs - old, +-20);  r = exp(d);  pg = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));  for A < 0,
    min(pg, -A dual_clip);  pg * is_weights - entropy_coef * entropy + kl_coef * kl. `rows` indexes flattened inputs.
    """

    def at(x: Tensor, rows: Tensor) -> Tensor:
        return up(x.detach().reshape(-1)[rows])

    def token_loss(logprobs: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        advantage = at(advantages, rows)
        d = (up(logprobs) - at(old_logprobs, rows)).clamp(-20, 20)  # exp(20) = 5e8 leaves room in float32
        ratio = d.exp()
        free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
        clipped = bounded > free
        loss = torch.where(clipped, bounded, free)  # torch.maximum would share the gradient of a tie
        clipped_low = torch.zeros_like(clipped)
        if dual_clip is not None:
            clipped_low = (advantage < 0) & (loss > -advantage * dual_clip)
            loss = torch.where(clipped_low, -advantage * dual_clip, loss)
        if is_weights is not None:
            loss = loss * at(is_weights, rows)
        metrics = {
            "clip_fraction": clipped,
            "clip_fraction_low": clipped_low,
            "approx_kl_k1": -d,
            "approx_kl_k3": d.expm1() - d,
            "ratio_mean": ratio,
            "log_ratio_max_abs": d.abs(),
        }
        if entropy is not None:
            loss = loss - entropy_coef * up(entropy)
            metrics["entropy"] = entropy
        if ref_logprobs is not None and kl_coef:
            loss = loss + kl_coef * kl_estimate(logprobs, at(ref_logprobs, rows), kind=kl_kind)
        return loss, metrics

    return token_loss


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
    **objective: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(weights * token losses) / denom over the mask, and its metrics; `objective` as in ppo_token_loss."""
    rows = mask.reshape(-1).nonzero().squeeze(1)
    token_loss = ppo_token_loss(old_logprobs, advantages, **objective)
    entropy_n = None if entropy is None else entropy.reshape(-1)[rows]
    return reduce_loss(token_loss(logprobs.reshape(-1)[rows], entropy_n, rows), rows, weights, denom)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 max((v - R)^2, (v_old + clip(v - v_old, +-clip) - R)^2); clip 0 or None is plain regression."""
    rows = mask.reshape(-1).nonzero().squeeze(1)
    value, old, target = (up(x.reshape(-1)[rows]) for x in (values, old_values.detach(), returns.detach()))
    free = (value - target).square()
    moved = (value - old).clamp(-clip, clip) if clip else value - old
    # Inside the bound both are the same number; only rounding could make them differ.
    bounded = torch.where(moved == value - old, free, (old + moved - target).square())
    clipped = bounded > free
    error = (target - value).double()
    per_token = {
        "value_mean": value,
        "value_clip_fraction": clipped,
        "value_return": target,
        "value_return_square": target.double().square(),
        "value_error": error,
        "value_error_square": error.square(),
    }
    return reduce_loss((0.5 * torch.where(clipped, bounded, free), per_token), rows, weights, denom, "value_tokens")


def reduce_loss(
    token_loss: Tensor | tuple[Tensor, dict[str, Tensor]],
    rows: Tensor,
    weights: Tensor | None,
    denom: float | Tensor | None,
    count_name: str = "policy_tokens",
    active: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over a global count, so that micro-batches add up to one gradient; metrics as sums and maxima.

    `active` (n,): which rows count, where that is not known before.
    """
    loss_n, per_token = token_loss if isinstance(token_loss, tuple) else (token_loss, {})
    for name, x in {"loss": loss_n, **per_token}.items():  # (n, 1) times weights (n,) would be (n, n)
        if not isinstance(x, Tensor) or x.shape != rows.shape:
            seen = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"linear_policy_loss: token_loss must give {name} {tuple(rows.shape)}, got {seen}")
    loss_n = up(loss_n)
    if weights is not None:
        loss_n = loss_n * up(weights.detach().reshape(-1)[rows])
    if active is not None:
        loss_n = torch.where(active, loss_n, 0)
    count = torch.tensor(rows.numel(), device=loss_n.device) if active is None else active.sum()
    total = torch.as_tensor(count if denom is None else denom).detach().to(loss_n)
    metrics = {count_name: count.double()}
    for name, value_n in per_token.items():
        value_n, largest = value_n.detach().double(), "_max" in name
        if active is not None:
            value_n = torch.where(active, value_n, -torch.inf if largest else 0)
        if not largest:
            metrics[f"{name}_sum"] = value_n.sum()
        else:
            metrics[name] = torch.where(count > 0, value_n.amax(), 0) if rows.numel() else value_n.new_zeros(())
    return loss_n.sum() / torch.where(total <= 0, 1, total), metrics
