"""An independent float64 oracle of the ops: scalar loops over Python numbers, written from numerics.md alone.

It shares no code and, where possible, no algorithm with the package: GAE here is the sum of discounted residuals, not
the backward recursion. Masked positions are skipped by the loops, so their content is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def logprob_and_entropy(
    logits: Sequence[float],
    target: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[float, float]:
    """One row."""
    z = [logit_scale * float(x) for x in logits]
    if softcap is not None:
        z = [x if x == -math.inf else softcap * math.tanh(x / softcap) for x in z]
    z = [x / temperature for x in z]
    top = max(z)
    total = math.fsum(math.exp(x - top) for x in z)
    logp = [x - top - math.log(total) for x in z]
    entropy = -math.fsum(math.exp(x) * x for x in logp if x != -math.inf)
    return min(0.0, logp[target]), entropy


def kl(logprob: float, ref_logprob: float, kind: str) -> float:
    d = logprob - ref_logprob
    return {"k1": d, "abs": abs(d), "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind.rstrip("+")]


def gae(
    rewards: Array,
    values: Array,
    mask: Mask,
    gamma: float,
    lam: float,
    holes: str = "carry",
    bootstrap: Sequence[float] | None = None,
) -> tuple[Array, Array]:
    """(B, T): the sum over l of (gamma lam)^l delta_{t+l} along the chain of positions that the hole mode visits."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        active = [t for t in range(rewards.shape[1]) if mask[b, t]]
        chain = active if holes == "carry" else list(range(active[-1] + 1)) if active else []
        r = [float(rewards[b, t]) if mask[b, t] else 0.0 for t in chain]
        v = [float(values[b, t]) if mask[b, t] else 0.0 for t in chain]
        v.append(0.0 if bootstrap is None else float(bootstrap[b]))
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(chain))]
        for i, t in enumerate(chain):
            if mask[b, t]:
                advantages[b, t] = math.fsum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(chain)))
                returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def whiten(x: Array, mask: Mask, center: bool = True, ddof: int = 0, eps: float = 1e-8, eps_mode: str = "add") -> Array:
    active = [float(v) for v, m in zip(x.flat, mask.flat, strict=True) if m]
    out = np.zeros(x.shape)
    if not active:
        return out
    mean = math.fsum(active) / len(active)
    variance = math.fsum((v - mean) ** 2 for v in active) / max(len(active) - ddof, 1)
    scale = 1 / math.sqrt(variance + eps if eps_mode == "add" else max(variance, eps))
    for i, m in enumerate(mask.flat):
        if m:
            out.flat[i] = (x.flat[i] - mean) * scale + (0.0 if center else mean)
    return out


def shaped_rewards(
    scores: Array, logprobs: Array, ref_logprobs: Array, mask: Mask, kl_coef: float, kl_kind: str, score_at: str
) -> tuple[Array, Mask]:
    """Rewards, and the mask of positions that hold one."""
    rewards, value_mask = np.zeros(mask.shape), mask.copy()
    for b in range(mask.shape[0]):
        active = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in active:
            rewards[b, t] = -kl_coef * kl(logprobs[b, t], ref_logprobs[b, t], kl_kind)
        if active:
            place = active[-1]
            if score_at == "after" and place + 1 < mask.shape[1]:
                place += 1
            rewards[b, place] += scores[b]
            value_mask[b, place] = True
    return rewards, value_mask


def ppo_token_loss(
    logprob: float,
    old_logprob: float,
    advantage: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    is_weight: float = 1.0,
) -> float:
    ratio = math.exp(min(max(logprob - old_logprob, -20.0), 20.0))
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high))
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * dual_clip)
    return loss * is_weight


def value_token_loss(value: float, old_value: float, target: float, clip: float | None) -> float:
    free = (value - target) ** 2
    if not clip:
        return 0.5 * free
    moved = old_value + min(max(value - old_value, -clip), clip)
    return 0.5 * max(free, (moved - target) ** 2)
