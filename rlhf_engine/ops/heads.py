"""Log-prob and entropy of chosen tokens, from logits or from hidden states, and a policy loss fused to the head.

    z' = softcap(logit_scale * z) / temperature,   softcap(x) = c tanh(x / c),   p = softmax(z')
    logprob = log p_y <= 0,   entropy = -sum_v p_v log p_v   in nats, of the tempered distribution

A row's bits depend on that row alone: not on the rows that share the call, their order, or whether gradients are on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.ops import checks
from rlhf_engine.ops.backends import select
from rlhf_engine.reference import TokenLoss


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row; differentiable in the logits.

    Args:
        logits: (..., V) float; -inf bans a token. Scaling happens after the upcast to float32.
        targets: (...) int32 or int64 in [0, V).
        temperature: > 0; divides the logits.
        mask: (...) bool; False rows give 0 and no gradient, whatever they hold.
        ignore_index: targets of this value are masked too.
        backend: None, or a name (see `available`).

    Returns:
        logprobs, entropy: (...) float32 (float64 for float64 logits), nats. A row with a NaN, or of -inf only, is NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on CPU, an unmasked target outside [0, V) (on CUDA: NaN).
    """
    op = "token_logprobs"
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"{op}: targets {checks.shape(targets)} does not match logits {checks.shape(logits)}")
    checks.floating(op, logits=logits)
    checks.same_device(op, {"logits": logits}, targets=targets)
    checks.like(op, {"targets": targets}, mask=mask)
    checks.positive(op, temperature=temperature)
    checks.targets(op, targets, mask, ignore_index, logits.shape[-1])
    function = select(op, backend, logits.device.type)
    return function(logits, targets, temperature=temperature, mask=mask, ignore_index=ignore_index)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """token_logprobs of hidden @ weight^T + bias without those logits: one bounded tile of them exists at a time, in
    forward and backward, and masked rows cost nothing. Differentiable in hidden, weight and bias; autocast is ignored.

    Args:
        hidden: (..., H) float.
        weight: (V, H), dtype of hidden.
        targets: (...) int32 or int64 in [0, V).
        bias: (V,), dtype of hidden.
        temperature: > 0.
        softcap: > 0 or None; c of the tanh that bounds logits (Gemma 2, arXiv:2408.00118). -inf stays -inf.
        logit_scale: > 0; factor on the logits before softcap (Cohere).
        mask: (...) bool; see token_logprobs, as for ignore_index, backend, what is returned and raised.
        ignore_index: targets of this value are masked too.
        backend: None, or a name (see `available`). On CPU a bfloat16 GEMM rounds the logits to bfloat16.
    """
    op = "linear_logprobs"
    _check_linear(op, hidden, weight, targets, bias, temperature, softcap, logit_scale, mask)
    checks.targets(op, targets, mask, ignore_index, weight.shape[0])
    return select(op, backend, hidden.device.type)(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        mask=mask, ignore_index=ignore_index,
    )  # fmt: skip


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
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A policy loss straight from hidden states: sum(weights * token losses) / denom, and its metrics.

    Args:
        token_loss: token_loss(logprobs (n,), entropy (n,), rows (n,)) -> loss (n,), or (loss, {name: (n,) metric}):
            any token-separable objective, e.g. `ppo_token_loss`. rows index the flattened targets; only logprobs and
            entropy may require grad in it. A metric is averaged over tokens, or maximised if "_max" is in its name.
        rows: (n,) int64, the rows to score, where they are known (mask and ignore_index are then not looked at).
        weights: shaped like targets (see token_weights); None is 1.
        denom: the global count, known before the forward; None is this call's number of tokens.
        hidden, weight, targets, bias, temperature, softcap, logit_scale, mask, ignore_index: see linear_logprobs.

    Returns:
        loss: 0-d, float32 or better. metrics: 0-d sums, counts and maxima for merge_metrics and finalize_metrics.

    Raises:
        ValueError: as linear_logprobs; weights without denom.
    """
    op = "linear_policy_loss"
    _check_linear(op, hidden, weight, targets, bias, temperature, softcap, logit_scale, mask)
    if rows is None:
        checks.targets(op, targets, mask, ignore_index, weight.shape[0])
    else:
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(f"{op}: rows must be (n,) int64, got {checks.shape(rows)} {rows.dtype}")
        checks.same_device(op, {"targets": targets}, rows=rows)
        checks.targets(op, targets.reshape(-1)[rows], None, None, weight.shape[0])
    checks.like(op, {"targets": targets}, weights=weights)
    checks.denominator(op, {"targets": targets}, weights, denom)
    return select(op, backend, hidden.device.type)(
        hidden, weight, targets, token_loss, bias=bias, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale, mask=mask, ignore_index=ignore_index, rows=rows, weights=weights, denom=denom,
    )  # fmt: skip


def _check_linear(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
) -> None:
    if hidden.dim() == 0 or targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{op}: targets {checks.shape(targets)} does not match hidden {checks.shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{op}: weight {checks.shape(weight)} does not match hidden {checks.shape(hidden)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {checks.shape(bias)} does not match weight {checks.shape(weight)}")
    checks.floating(op, hidden=hidden)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype}, hidden {hidden.dtype}; cast one of them")
    checks.same_device(op, {"hidden": hidden}, weight=weight, targets=targets, bias=bias)
    checks.like(op, {"targets": targets}, mask=mask)
    checks.positive(op, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
