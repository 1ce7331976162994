"""Estimators of KL(policy || reference) from one sample per token (Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.reference.precision import up

Bounds = float | tuple[float | None, float | None] | None


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: str = "k1", clamp_diff: Bounds = None, clamp_value: Bounds = None
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from one sample; "+": the value of a kind, the gradient of k2."""
    unclamped_d = up(logprobs) - up(ref_logprobs)
    d = clamp(unclamped_d, clamp_diff)
    # k3 is exp(-d) - 1 + d; at d = 1e-3 that form has one right digit in float32.
    formulas = {"k1": lambda: d, "abs": d.abs, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}
    value = clamp(formulas[kind.removesuffix("+")](), clamp_value)
    if not kind.endswith("+"):
        return value
    k2 = unclamped_d.square() / 2
    return value.detach() + (k2 - k2.detach())


def clamp(x: Tensor, bounds: Bounds) -> Tensor:
    if bounds is None:
        return x
    low, high = bounds if isinstance(bounds, tuple) else (-bounds, bounds)
    return x.clamp(low, high)
