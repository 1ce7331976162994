"""Log-probs and entropies of tokens, from logits or from hidden states, and a policy loss on top of them.

N rows, of which n are active, in tiles of R; V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_engine.reference.losses import TokenLoss, reduce_loss
from rlhf_engine.reference.precision import up

# Rows of a head tile, always this many: a GEMM chooses its summation order by its shape, so a row keeps its bits only
# if the shape never depends on how many rows share the call. 64 rows of 49,152 float32 logits are 12 MiB.
ROW_TILE = 64


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
    return _score_rows(rows_NV, targets, rows, temperature, extras, lambda tile_RV, _: up(tile_RV))


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
    exact_weight = up(weight)

    def head(tile_RH: Tensor, targets_R: Tensor) -> Tensor:
        logits_RV = F.linear(up(tile_RH), exact_weight)
        if logits_dtype == "input" and tile_RH.dtype in (torch.bfloat16, torch.float16):
            own = F.one_hot(targets_R.clamp(0, weight.shape[0] - 1), weight.shape[0]).bool()
            logits_RV = torch.where(own, logits_RV, up(logits_RV.to(tile_RH.dtype)))
        return transform_logits(logits_RV, bias, softcap, logit_scale)

    if rows is None:
        rows = active_rows(targets, mask, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):  # the caller's autocast must not change a row's bits
        return _score_rows(hidden.reshape(-1, hidden.shape[-1]), targets, rows, temperature, extras, head)


def transform_logits(logits: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """What a model does to the product's result before a temperature divides it."""
    logits = (logits if bias is None else logits + up(bias)) * logit_scale
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
    raw_nV = F.linear(up(hidden.reshape(-1, hidden.shape[-1])[rows]), up(weight))
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
        weight = up(weight.detach()).requires_grad_(torch.is_grad_enabled())
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
