"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347), as sums over tokens divided by a global count.

Metrics come back as 0-d sums, counts and maxima on the device; `merge_metrics` adds those of micro-batches up and
`finalize_metrics` divides, so a logged number does not depend on the split either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.ops import checks
from rlhf_engine.ops.advantages import KL_KINDS
from rlhf_engine.ops.backends import select
from rlhf_engine.reference import TokenLoss


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    is_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss, with optional dual clip, entropy bonus and KL loss.

        d = clamp(logprobs - old_logprobs, +-20),   r = exp(d)            (outside +-20 there is no gradient)
        pg = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));          for A < 0: min(pg, -A dual_clip)
        loss = sum weights (pg is_weights - entropy_coef entropy + kl_coef kl) / denom

    Args:
        logprobs: any shape, float; the gradient flows into it, `entropy`, and nothing else.
        old_logprobs, advantages: the same shape, constants.
        mask: the same shape, bool.
        clip_low, clip_high: >= 0; unequal ones are DAPO's (arXiv:2503.14476).
        dual_clip: > 1, bound on the ratio for negative advantages (arXiv:1912.09729); 3 is usual, None is off.
        is_weights: importance weights of the sampler's mismatch, constants; multiply pg.
        entropy: nats; needed for entropy_coef, and logged if given.
        ref_logprobs: needed for kl_coef; kl_kind: see kl_estimate.
        weights: of tokens (see token_weights); None is 1.
        denom: the global count, a number or 0-d tensor, known before the forward; None is this call's number of tokens.
        backend: None, or a name (see `available`).

    Returns:
        loss: 0-d, float32 or better; 0 for no tokens. metrics: see finalize_metrics.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a constant that requires grad; weights without denom.
    """
    op = "ppo_loss"
    expected = {"logprobs": logprobs}
    checks.floating(op, **expected)
    checks.constants(
        op, expected, old_logprobs=old_logprobs, advantages=advantages, is_weights=is_weights,
        ref_logprobs=ref_logprobs, weights=weights,
    )  # fmt: skip
    checks.like(op, expected, mask=mask, entropy=entropy)
    checks.denominator(op, expected, weights, denom)
    _check_coefficients(op, clip_low, clip_high, dual_clip, ref_logprobs, kl_coef, kl_kind)
    if entropy_coef and entropy is None:
        raise ValueError(f"{op}: entropy_coef is {entropy_coef}, but entropy is not given")
    return select(op, backend, logprobs.device.type)(
        logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        is_weights=is_weights, entropy=entropy, entropy_coef=entropy_coef, ref_logprobs=ref_logprobs, kl_coef=kl_coef,
        kl_kind=kl_kind, weights=weights, denom=denom,
    )  # fmt: skip


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
    """The same formula as ppo_loss per token, to plug into linear_policy_loss: see both for arguments and errors."""
    op = "ppo_token_loss"
    expected = {"old_logprobs": old_logprobs}
    checks.constants(op, expected, **expected, advantages=advantages, is_weights=is_weights, ref_logprobs=ref_logprobs)
    _check_coefficients(op, clip_low, clip_high, dual_clip, ref_logprobs, kl_coef, kl_kind)
    return PPOTokenLoss(
        old_logprobs, advantages, {"is_weights": is_weights, "ref_logprobs": ref_logprobs},
        {
            "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "entropy_coef": entropy_coef,
            "kl_coef": kl_coef, "kl_kind": kl_kind,
        },
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class PPOTokenLoss:
    """A token_loss for linear_policy_loss: what ppo_token_loss returns."""

    old_logprobs: Tensor  # of all rows, as is every other tensor here
    advantages: Tensor
    constants: dict[str, Any]
    options: dict[str, Any]

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, rows: Tensor
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Per token, differentiable in logprobs and entropy."""
        formula = reference.ppo_token_loss(self.old_logprobs, self.advantages, **self.constants, **self.options)
        return formula(logprobs, entropy, rows)

    def reduced(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        rows: Tensor,
        active: Tensor | None,
        weights: Tensor | None,
        denom: float | Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """sum(weights * loss) / denom of those rows that are active, and metrics: ppo_loss, and so its backends."""
        mask = torch.ones_like(logprobs, dtype=torch.bool) if active is None else active
        old_logprobs, advantages = (x.detach().reshape(-1)[rows] for x in (self.old_logprobs, self.advantages))
        picked = {
            name: None if x is None else x.detach().reshape(-1)[rows]
            for name, x in (*self.constants.items(), ("weights", weights))
        }
        return select("ppo_loss", None, logprobs.device.type)(
            logprobs, old_logprobs, advantages, mask, entropy=entropy, denom=denom, **picked, **self.options
        )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped value loss of OpenAI Baselines' PPO: the worse of a free and a clipped prediction.

        loss = sum weights 0.5 max((v - R)^2, (v_old + clip(v - v_old, +-clip) - R)^2) / denom

    Args:
        values: any shape, float; the gradient flows into it alone.
        old_values, returns: the same shape, constants. mask: the same shape, bool.
        clip: in units of value; 0 or None is plain regression.
        weights, denom, backend: see ppo_loss.

    Returns:
        loss: 0-d, float32 or better; 0 for no tokens. metrics: see finalize_metrics.

    Raises:
        ValueError: as ppo_loss.
    """
    op = "value_loss"
    expected = {"values": values}
    checks.floating(op, **expected)
    checks.constants(op, expected, old_values=old_values, returns=returns, weights=weights)
    checks.like(op, expected, mask=mask)
    checks.denominator(op, expected, weights, denom)
    checks.not_negative(op, clip=clip)
    function = select(op, backend, values.device.type)
    return function(values, old_values, returns, mask, clip=clip, weights=weights, denom=denom)


def _check_coefficients(
    op: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_kind: str,
) -> None:
    checks.not_negative(op, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"{op}: dual_clip must be greater than 1, got {dual_clip}")
    checks.one_of(op, "kl_kind", kl_kind, KL_KINDS)
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"{op}: kl_coef is {kl_coef}, but ref_logprobs is not given")
