"""The specification: every op in plain PyTorch, on any device, in float64 too. Every fast backend is tested against it.

Masked positions are not multiplied away but never read: each op first gathers the active ones, so NaN, inf or a wild
token id under the mask reaches neither a value nor a gradient, and a sum has the same bits whatever the padding.
Statistics are float32 whatever the input (float64 stays), metrics float64. Inputs are trusted: `ops` checks them.

Shapes: B sequences, T response tokens, V vocabulary, H width, N = B * T or the length of a packed row, n active tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Rows of a head tile, always this many: a GEMM chooses its summation order by its shape, so a row keeps its bits only
# if the shape never depends on how many rows share the call. 64 rows of 49,152 float32 logits are 12 MiB.
ROW_TILE = 64

Bounds = float | tuple[float | None, float | None] | None
TokenLoss = Callable[[Tensor, Tensor | None, Tensor], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    extras: tuple[str, ...] = (),
    inplace_backward: bool = False,
) -> tuple[Any, ...]:
    """logits (..., V), targets and mask (...) -> logprobs and entropy (...) of softmax(logits / temperature).

    With `extras` ("top1", "sum_p_squared") a dict of these follows: the likeliest token, and sum_v p_v^2.
    """
    rows_NV = logits.reshape(-1, logits.shape[-1])
    rows = active_rows(targets, mask, ignore_index)
    return _score_rows(rows_NV, targets, rows, temperature, extras, lambda tile_RV, _: _up(tile_RV))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    extras: tuple[str, ...] = (),
    logits_dtype: str = "float32",
    count: str = "device",
    memory_budget: int | None = None,
) -> tuple[Any, ...]:
    """token_logprobs of hidden (..., H) @ weight (V, H)^T + bias (V,), of which only one tile exists at a time.

    With logits_dtype "input" they are rounded to the dtype of hidden, but for the target's own: a rounded sum and an
    exact target could give a positive log-prob. How faster backends cut their work, `count` and `memory_budget`,
    changes no number.
    """
    exact_weight = _up(weight)

    def head(tile_RH: Tensor, targets_R: Tensor) -> Tensor:
        logits_RV = F.linear(_up(tile_RH), exact_weight)
        if logits_dtype == "input" and tile_RH.dtype in (torch.bfloat16, torch.float16):
            own = F.one_hot(targets_R.clamp(0, weight.shape[0] - 1), weight.shape[0]).bool()
            logits_RV = torch.where(own, logits_RV, _up(logits_RV.to(tile_RH.dtype)))
        return transform_logits(logits_RV, bias, softcap, logit_scale)

    if rows is None:
        rows = active_rows(targets, mask, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):  # the caller's autocast must not change a row's bits
        return _score_rows(hidden.reshape(-1, hidden.shape[-1]), targets, rows, temperature, extras, head)


def transform_logits(logits: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """What a model does to the product's result before a temperature divides it."""
    logits = (logits if bias is None else logits + _up(bias)) * logit_scale
    if softcap is None:
        return logits
    # tanh would lift a banned token's -inf to -softcap
    return torch.where(logits == -torch.inf, logits, softcap * torch.tanh(logits / softcap))


@torch.no_grad()
def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary_start: int = 0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    logits_dtype: str = "float32",
    count: str = "device",
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, s, mu, z_y), each (...): of tokens [vocabulary_start, vocabulary_start + V) the largest logit m, s = sum_v
    exp(z_v - m), mu = sum_v p_v (z_v - m), and the target's logit, -inf where it is not among them."""
    rows = active_rows(targets, mask, ignore_index)
    raw_nV = F.linear(_up(hidden.reshape(-1, hidden.shape[-1])[rows]), _up(weight))
    y_n = targets.reshape(-1)[rows].long() - vocabulary_start
    inside_n = (y_n >= 0) & (y_n < weight.shape[0])
    if logits_dtype == "input":
        own = F.one_hot(torch.where(inside_n, y_n, 0), weight.shape[0]).bool() & inside_n[:, None]
        raw_nV = torch.where(own, raw_nV, raw_nV.to(hidden.dtype).to(raw_nV))
    each = temperature.reshape(-1)[rows, None] if isinstance(temperature, Tensor) else temperature
    z_nV = transform_logits(raw_nV, bias, softcap, logit_scale) / each
    m_n1 = z_nV.amax(-1, keepdim=True)
    d_nV = z_nV - m_n1
    s_n = d_nV.exp().sum(-1)
    mu_n = (d_nV.exp() * torch.where(d_nV == -torch.inf, 0.0, d_nV)).sum(-1) / s_n
    z_y_n = z_nV.gather(1, torch.where(inside_n, y_n, 0)[:, None]).squeeze(1)
    found = m_n1.squeeze(1), s_n, mu_n, torch.where(inside_n, z_y_n, -torch.inf)
    m, s, mu, z_y = (x.new_zeros(targets.numel()).index_copy(0, rows, x).view(targets.shape) for x in found)
    return m, s, mu, z_y


def merge_logprob_stats(stats: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from the statistics (m, s, mu, z_y) of all parts of a vocabulary."""
    m, s, mu, z_y = (torch.stack(x) for x in zip(*stats, strict=True))
    shift = m - m.amax(0)
    # Nothing but banned tokens in a part: its mu is NaN, and its m is -inf, of which 0 times are 0.
    share = torch.where(m == -torch.inf, 0.0, s * shift.exp())
    total = share.sum(0)
    mean = torch.where(m == -torch.inf, 0.0, share * (mu + shift)).sum(0) / total
    counts = (total != 0) | (m.amax(0) != 0)  # rows that do not count have 0 everywhere; a maximum counts 1 in total
    logprobs, entropy = ((z_y.amax(0) - m.amax(0)) - total.log()).clamp(max=0), total.log() - mean
    return torch.where(counts, logprobs, 0), torch.where(counts, entropy, 0)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
    grad_weight_out: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    **head: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum(weights * token_loss(logprobs, entropy, rows)) / denom over the active rows; `head` as in linear_logprobs.

    The weight's gradient is added to `grad_weight_out` (V, H) where that is given.
    """
    if rows is None:
        rows = active_rows(targets, mask, ignore_index)
    hidden_nH, targets_n = hidden.reshape(-1, hidden.shape[-1])[rows], targets.reshape(-1)[rows]
    each = temperature.reshape(-1)[rows] if isinstance(temperature, Tensor) else temperature
    if grad_weight_out is not None:
        weight = _up(weight.detach()).requires_grad_(torch.is_grad_enabled())
    logprobs_n, entropy_n = linear_logprobs(
        hidden_nH, weight, targets_n, temperature=each, rows=torch.arange(len(rows), device=rows.device), **head
    )
    loss, metrics = reduce_loss(token_loss(logprobs_n, entropy_n, rows), rows, weights, denom)
    if grad_weight_out is not None and loss.requires_grad:
        grad_weight_out += torch.autograd.grad(loss, weight, retain_graph=True)[0]
    return loss, metrics


def active_rows(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    active = targets != ignore_index
    return (active if mask is None else active & mask.to(active.device)).reshape(-1).nonzero().squeeze(1)


def _score_rows(
    rows_NX: Tensor,
    targets: Tensor,
    rows: Tensor,
    temperature: float | Tensor,
    extras: tuple[str, ...],
    head: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Any, ...]:
    """Gathers the rows into full tiles (the tail is zeros), scores each, and puts the results in place."""

    def score(tile_RX: Tensor, targets_R: Tensor, temperature_R1: Tensor) -> tuple[Tensor, Tensor]:
        return _logprob_and_entropy(head(tile_RX, targets_R) / temperature_R1, targets_R)

    def tiled(x: Tensor, value: float = 0.0) -> tuple[Tensor, ...]:
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, tail), value=value).split(ROW_TILE)

    def place(x_n: Tensor) -> Tensor:
        return x_n.new_zeros(targets.numel()).index_copy(0, rows, x_n).view(targets.shape)

    tail = -rows.numel() % ROW_TILE
    tiles, targets_tiles = tiled(rows_NX.index_select(0, rows)), tiled(targets.reshape(-1).index_select(0, rows).long())
    dtype = torch.float64 if rows_NX.dtype == torch.float64 else torch.float32
    temperature = torch.as_tensor(temperature, dtype=dtype, device=rows_NX.device).detach()
    temperatures = tiled(temperature.expand(targets.shape).reshape(-1, 1).index_select(0, rows), 1.0)
    parts, more = [], []
    for tile_RX, targets_R, temperature_R1 in zip(tiles, targets_tiles, temperatures, strict=True):
        arguments = tile_RX, targets_R, temperature_R1
        if torch.is_grad_enabled():  # recomputed in the backward: the same operations, so the same bits, in one tile
            parts.append(checkpoint(score, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(*arguments))
        if extras:
            more.append(_extras(head(tile_RX, targets_R) / temperature_R1))
    logprobs, entropy = (place(torch.cat(part)[: rows.numel()]) for part in zip(*parts, strict=True))
    if not extras:
        return logprobs, entropy
    found = {name: place(torch.cat([part[name] for part in more])[: rows.numel()]) for name in extras}
    return logprobs, entropy, found


@torch.no_grad()
def _extras(z_RV: Tensor) -> dict[str, Tensor]:
    return {"top1": z_RV.argmax(-1), "sum_p_squared": z_RV.softmax(-1).square().sum(-1)}


def _logprob_and_entropy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Everything relative to the row maximum m: lse - mean(z) would lose 3e-2 at logits near 1000 in float32.

        d = z - m    ls = log sum_v exp d_v    p_v = exp(d_v - ls)    logprob = d_y - ls    entropy = ls - sum_v p_v d_v

    Both are invariant to a shift of z, so m needs no gradient. A target outside [0, V) gives a NaN row.
    """
    logits_RV = torch.where(logits_RV == -torch.inf, logits_RV.detach(), logits_RV)  # a banned token cannot move
    d_RV = logits_RV - logits_RV.amax(-1, keepdim=True).detach()
    ls_R1 = d_RV.exp().sum(-1, keepdim=True).log()
    # 0 * inf is 0 here, for a banned token's value and gradient alike.
    finite_d_RV = torch.where(d_RV == -torch.inf, 0.0, d_RV)
    mean_R = ((d_RV - ls_R1).exp() * finite_d_RV).sum(-1)
    valid_R = (targets_R >= 0) & (targets_R < logits_RV.shape[-1])
    d_y_R = d_RV.gather(-1, torch.where(valid_R, targets_R, 0)[:, None]).squeeze(-1)
    logprob_R = (d_y_R - ls_R1.squeeze(-1)).clamp(max=0)
    entropy_R = ls_R1.squeeze(-1) - mean_R
    return torch.where(valid_R, logprob_R, torch.nan), torch.where(valid_R, entropy_R, torch.nan)


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: str = "k1", clamp_diff: Bounds = None, clamp_value: Bounds = None
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from one sample; "+": the value of a kind, the gradient of k2."""
    unclamped_d = _up(logprobs) - _up(ref_logprobs)
    d = _clamp(unclamped_d, clamp_diff)
    # k3 is exp(-d) - 1 + d; at d = 1e-3 that form has one right digit in float32.
    formulas = {"k1": lambda: d, "abs": d.abs, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}
    value = _clamp(formulas[kind.removesuffix("+")](), clamp_value)
    if not kind.endswith("+"):
        return value
    k2 = unclamped_d.square() / 2
    return value.detach() + (k2 - k2.detach())


def _clamp(x: Tensor, bounds: Bounds) -> Tensor:
    if bounds is None:
        return x
    low, high = bounds if isinstance(bounds, tuple) else (-bounds, bounds)
    return x.clamp(low, high)


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
    dtype = torch.promote_types(_up(rewards).dtype, _up(values).dtype)
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
    x = _up(x)
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
    scores = _clamp(_up(scores), score_clip or None)
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
        return _up(x.detach().reshape(-1)[rows])

    def token_loss(logprobs: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        advantage = at(advantages, rows)
        d = (_up(logprobs) - at(old_logprobs, rows)).clamp(-20, 20)  # exp(20) = 5e8 leaves room in float32
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
            loss = loss - entropy_coef * _up(entropy)
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
    value, old, target = (_up(x.reshape(-1)[rows]) for x in (values, old_values.detach(), returns.detach()))
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
    loss_n = _up(loss_n)
    if weights is not None:
        loss_n = loss_n * _up(weights.detach().reshape(-1)[rows])
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
