"""Rewards shaped by a KL penalty, generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438), whitening.

B sequences of T response tokens, or N tokens in a packed row; n active ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine.reference.kl import Bounds, clamp, kl_estimate
from rlhf_engine.reference.precision import up


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    holes: str = "carry",
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """delta_t = r_t + gamma V_tp1 - V_t;   A_t = delta_t + gamma lam A_tp1;   returns = A + V;   0 where masked.

    All (B, T), or all (N,) with cu_seqlens (B + 1,). p1 is the next active token ("carry"), or the next position of any
    kind with r = V = 0 at the holes ("decay"); after the last active token V is `bootstrap` (B,) or 0. The returns are
    those of `value_lam` where it is given.
    """
    if value_lam is not None or out is not None:
        rest: dict[str, Any] = {"gamma": gamma, "holes": holes, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens}
        found = gae(rewards, values, mask, lam=lam, **rest)
        if value_lam is not None:
            found = found[0], gae(rewards, values, mask, lam=value_lam, **rest)[1]
        return found if out is None else (out[0].copy_(found[0]), out[1].copy_(found[1]))
    if cu_seqlens is not None:
        (rewards, values, mask), inside = _to_padded((rewards, values, mask), cu_seqlens)
        padded = gae(rewards, values, mask, gamma=gamma, lam=lam, holes=holes, bootstrap=bootstrap)
        return padded[0][inside], padded[1][inside]
    dtype = torch.promote_types(up(rewards).dtype, up(values).dtype)
    values = torch.where(mask, values, 0).to(dtype)
    steps = zip(
        torch.where(mask, rewards, 0).to(dtype).unbind(1),
        values.unbind(1),
        mask.unbind(1),
        # Behind the last active token lies padding: the recursion starts there, whatever holes do.
        (mask if holes == "carry" else _at_or_before_last(mask)).unbind(1),
        strict=True,
    )
    decay = (gamma * torch.as_tensor(lam, dtype=torch.float64)).to(values)  # one rounding, as for a Python float
    advantage_tp1 = values.new_zeros(values.shape[0])
    value_tp1 = advantage_tp1 if bootstrap is None else bootstrap.to(dtype)
    advantages = []
    for reward_t, value_t, mask_t, live_t in reversed(list(steps)):
        advantage_t = reward_t + gamma * value_tp1 - value_t + decay * advantage_tp1
        advantages.append(torch.where(mask_t, advantage_t, 0))
        advantage_tp1 = torch.where(live_t, advantage_t, advantage_tp1)
        value_tp1 = torch.where(live_t, value_t, value_tp1)
    advantages_BT = torch.stack(advantages[::-1], 1) if advantages else torch.zeros_like(values)
    return advantages_BT, advantages_BT + values


def _at_or_before_last(mask_BT: Tensor) -> Tensor:
    return mask_BT.flip(1).cumsum(1).flip(1) > 0


def _to_padded(packed: tuple[Tensor, ...], cu_seqlens: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Packed (N,) tensors, the last one the mask, as (B, T) ones, and which positions exist: padded[inside] packs."""
    start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    slot_T = torch.arange(int(length.max()) if len(length) else 0, device=cu_seqlens.device)
    inside = slot_T < length[:, None]
    index = torch.where(inside, start[:, None] + slot_T, 0)
    if index.numel() == 0:
        return tuple(x.new_zeros(index.shape) for x in packed), inside
    *data, mask = (x[index] for x in packed)
    return (*data, mask & inside), inside


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    center: bool = True,
    ddof: int = 0,
    eps: float = 1e-8,
    eps_mode: str = "add",
    zero_masked: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """(x - mean) * rsqrt(var + eps), or rsqrt(max(var, eps)), with mean and variance over the mask."""
    x = up(x)
    active_n = x[mask].double()  # in float64 equal advantages have a mean that is exactly each of them
    count = max(active_n.numel(), 1)
    mean = active_n.sum() / count
    var = (active_n - mean).square().sum() / max(count - ddof, 1)
    rstd = torch.rsqrt(var + eps if eps_mode == "add" else var.clamp(min=eps))
    mean, rstd = mean.to(x.dtype), rstd.to(x.dtype)
    whitened = (x - mean) * rstd if center else (x - mean) * rstd + mean
    whitened = torch.where(mask, whitened, 0) if zero_masked else whitened
    return whitened if out is None else out.copy_(whitened)


_whiten = whiten  # kl_gae has a flag of that name


@dataclass(slots=True)
class ShapedAdvantages:
    """What kl_gae returns: float32, 0 where masked. Shapes are those of logprobs: (B, T), or (N,) when packed."""

    rewards: Tensor  # -kl_coef * kl, plus the score at one place
    advantages: Tensor  # whitened if asked for
    returns: Tensor  # unwhitened advantages + values
    kl: Tensor  # per token, nats
    value_mask: Tensor  # bool: where returns are defined; score_at="after" has one more slot per sequence than mask

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rewards, self.advantages, self.returns, self.kl, self.value_mask


@torch.no_grad()
def kl_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_kind: str = "k1",
    kl_clamp_diff: Bounds = None,
    kl_clamp_value: Bounds = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    whiten: bool = True,
    score_at: str = "last",
    score_clip: float | None = None,
    holes: str = "carry",
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: ShapedAdvantages | None = None,
) -> ShapedAdvantages:
    """rewards = -kl_coef * kl (+ the score (B,) at one place), then gae, then whitening over the mask."""
    inside = None
    if cu_seqlens is not None:
        (logprobs, ref_logprobs, values, mask), inside = _to_padded((logprobs, ref_logprobs, values, mask), cu_seqlens)
    kl = kl_estimate(logprobs, ref_logprobs, kind=kl_kind, clamp_diff=kl_clamp_diff, clamp_value=kl_clamp_value)
    kl = torch.where(mask, kl, 0)
    place = _at_or_before_last(mask)
    place = place & ~F.pad(place, (0, 1))[:, 1:]  # the last active token, nowhere in an empty sequence
    if score_at == "after":  # one slot later, unless the row ends there
        room = torch.ones_like(mask) if inside is None else inside
        fits = (place[:, :-1] & room[:, 1:]).any(1, keepdim=True)
        place = torch.where(fits, F.pad(place, (1, 0))[:, :-1], place)
    scores = clamp(up(scores), score_clip or None)
    rewards = torch.where(mask, -kl_coef * kl if kl_coef else torch.zeros_like(kl), 0) + torch.where(
        place, scores[:, None], 0
    )
    value_mask = mask | place
    advantages, returns = gae(rewards, values, value_mask, gamma=gamma, lam=lam, holes=holes, bootstrap=bootstrap)
    advantages = _whiten(advantages, mask) if whiten else torch.where(mask, advantages, 0)
    fields = (rewards, advantages, returns, kl, value_mask)
    found = ShapedAdvantages(*(fields if inside is None else (x[inside] for x in fields)))
    if out is None:
        return found
    for place, field in zip(out.tensors(), found.tensors(), strict=True):
        place.copy_(field)
    return out
