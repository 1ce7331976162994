"""From scores and log-probs to advantages: KL estimators, reward shaping, GAE and whitening.

Targets of training, so nothing here but kl_estimate carries a gradient. B sequences, T response tokens; packed inputs
are (N,) with offsets cu_seqlens (B + 1,), and give each sequence the same bits as padded ones.
"""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from rlhf_engine.ops import checks
from rlhf_engine.ops.backends import select
from rlhf_engine.reference import Bounds, ShapedAdvantages

KL_KINDS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")
HOLES = ("carry", "decay")


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: str = "k1",
    clamp_diff: Bounds = None,
    clamp_value: Bounds = None,
    backend: str | None = None,
) -> Tensor:
    """One-sample estimates of KL(policy || reference) per token, nats (Schulman, "Approximating KL divergence", 2020).

    With d = logprobs - ref_logprobs: k1 = d, abs = |d|, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. A "+" ("k1+", "k3+") keeps
    the value of its kind and takes the gradient of k2, unclamped: as a loss, only k2's is that of the KL (verl).

    Args:
        logprobs, ref_logprobs: any one shape, float.
        kind: see above.
        clamp_diff: bounds on d: x for +-x, or (low, high) with None for open. verl 20, OpenRLHF's k3 (-10, None).
        clamp_value: bounds on the estimate. verl's k3 and all of OpenRLHF's 10.
        backend: None, or a name (see `available`).

    Returns:
        The same shape, float32 or better; differentiable.
    """
    op = "kl_estimate"
    checks.floating(op, logprobs=logprobs)
    checks.like(op, {"logprobs": logprobs}, ref_logprobs=ref_logprobs)
    checks.one_of(op, "kind", kind, KL_KINDS)
    function = select(op, backend, logprobs.device.type)
    return function(logprobs, ref_logprobs, kind=kind, clamp_diff=clamp_diff, clamp_value=clamp_value)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438).

        delta_t = r_t + gamma V_tp1 - V_t,   A_t = delta_t + gamma lam A_tp1,   returns = A + V

    Args:
        rewards, values: (B, T), or (N,) with cu_seqlens; float. V_t is the value before token t is chosen.
        mask: same shape, bool: trainable tokens. It may have holes (tool or observation tokens).
        gamma: discount in [0, 1].
        lam: in [0, 1], a number or one per sequence (B,).
        value_lam: likewise, of the returns, where it is not lam (decoupled GAE: VC-PPO, arXiv:2503.01491).
        holes: "carry" steps over masked tokens between trainable ones, tp1 being the next trainable one (verl, NeMo-RL,
            AReaL); "decay" runs through them with r = V = 0 (OpenRLHF). Behind the last trainable token is padding.
        bootstrap: (B,) value after the last trainable token of truncated responses; None is 0.
        cu_seqlens: (B + 1,) int32 or int64 offsets of packed sequences.
        out: contiguous tensors like the results, to be filled and returned.
        backend: None, or a name (see `available`).

    Returns:
        advantages, returns: shaped like rewards, float32 or better, 0 where masked, without gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, gamma or lam outside [0, 1].
    """
    op = "gae"
    checks.floating(op, rewards=rewards)
    checks.like(op, {"rewards": rewards}, values=values, mask=mask)
    count = _check_recursion(op, {"rewards": rewards}, mask, gamma, lam, holes, bootstrap, cu_seqlens)
    if value_lam is not None:
        _check_lambda(op, {"rewards": rewards}, count, value_lam=value_lam)
    if out is not None:
        if len(out) != 2:
            raise ValueError(f"{op}: out must be (advantages, returns), got {len(out)} tensors")
        inputs = {"rewards": rewards, "values": values}
        others = {
            "mask": mask, "lam": lam, "value_lam": value_lam, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens
        }  # fmt: skip
        checks.output(op, inputs, inputs | others, **{"out[0]": out[0], "out[1]": out[1]})
    return select(op, backend, rewards.device.type)(
        rewards, values, mask, gamma=gamma, lam=lam, value_lam=value_lam, holes=holes, bootstrap=bootstrap,
        cu_seqlens=cu_seqlens, out=out,
    )  # fmt: skip


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
    backend: str | None = None,
) -> Tensor:
    """Mean 0 and variance 1 over the mask. Of no token, one token and equal values the deviations are zeros, not NaN.

    Args:
        x: any shape, float. mask: the same shape, bool.
        center: False keeps the mean (OAI whitens rewards so).
        ddof: 0 biased variance (OAI, OpenRLHF), 1 Bessel's (verl, TRL).
        eps: with eps_mode "add", rsqrt(var + eps) (verl, TRL, OAI); with "max", rsqrt(max(var, eps)) (OpenRLHF).
        eps_mode: see eps.
        zero_masked: False shifts and scales masked positions like the others instead (verl, OpenRLHF).
        out: a contiguous tensor like the result, to be filled and returned; may be x.
        backend: None, or a name (see `available`).

    Returns:
        Shaped like x, float32 or better, without gradient.
    """
    op = "whiten"
    checks.floating(op, x=x)
    checks.like(op, {"x": x}, mask=mask)
    checks.one_of(op, "eps_mode", eps_mode, ("add", "max"))
    checks.positive(op, eps=eps)
    if out is not None:
        checks.output(op, {"x": x}, {"mask": mask, "x": None if out is x else x}, out=out)
    return select(op, backend, x.device.type)(
        x, mask, center=center, ddof=ddof, eps=eps, eps_mode=eps_mode, zero_masked=zero_masked, out=out
    )


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
    backend: str | None = None,
) -> ShapedAdvantages:
    """The whole way from scores to advantages: rewards = -kl_coef * kl (+ the score), gae, whitening over the mask.

    KL-shaped rewards: Ziegler et al. 2019, arXiv:1909.08593.

    Args:
        scores: (B,) float, one per sequence.
        logprobs, ref_logprobs, values: (B, T), or (N,) with cu_seqlens; float. mask: the same shape, bool.
        kl_coef: reward per nat. kl_kind, kl_clamp_diff, kl_clamp_value: see kl_estimate.
        whiten: biased variance, eps 1e-8 added; for other kinds pass False and call `whiten`.
        score_at: "last" trainable token, or the slot "after" it (OAI, TRL) if the row has one. That slot then has a
            return and a value (`value_mask`), no advantage, and its V is read from `values`.
        score_clip: bound on |score|; None or 0 is none.
        out: contiguous tensors like the results, to be filled and returned.
        gamma, lam, holes, bootstrap, cu_seqlens, backend: see gae.

    Returns:
        ShapedAdvantages: rewards, advantages, returns, kl, value_mask, shaped like logprobs, without gradient. A
        sequence without a trainable token contributes nothing; its score is not read.
    """
    op = "kl_gae"
    checks.floating(op, logprobs=logprobs)
    checks.like(op, {"logprobs": logprobs}, ref_logprobs=ref_logprobs, values=values, mask=mask)
    count = _check_recursion(op, {"logprobs": logprobs}, mask, gamma, lam, holes, bootstrap, cu_seqlens)
    checks.per_sequence(op, count, {"logprobs": logprobs}, scores=scores)
    checks.one_of(op, "kl_kind", kl_kind, KL_KINDS)
    checks.one_of(op, "score_at", score_at, ("last", "after"))
    checks.not_negative(op, score_clip=score_clip)
    if out is not None:
        inputs = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
        others = {"mask": mask, "scores": scores, "lam": lam, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens}
        places = {f"out.{field.name}": getattr(out, field.name) for field in fields(out)}
        checks.output(op, inputs | {"scores": scores}, inputs | others, **places)
    return select(op, backend, logprobs.device.type)(
        scores, logprobs, ref_logprobs, values, mask, kl_coef=kl_coef, kl_kind=kl_kind, kl_clamp_diff=kl_clamp_diff,
        kl_clamp_value=kl_clamp_value, gamma=gamma, lam=lam, whiten=whiten, score_at=score_at, score_clip=score_clip,
        holes=holes, bootstrap=bootstrap, cu_seqlens=cu_seqlens, out=out,
    )  # fmt: skip


def _check_recursion(
    op: str,
    reference: dict[str, Tensor],
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
    holes: str,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    count = checks.sequences(op, mask, cu_seqlens, name=next(iter(reference)))
    checks.per_sequence(op, count, reference, bootstrap=bootstrap)
    _check_lambda(op, reference, count, lam=lam)
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma must lie between 0 and 1, got {gamma}")
    checks.one_of(op, "holes", holes, HOLES)
    return count


def _check_lambda(op: str, reference: dict[str, Tensor], count: int, **lambdas: float | Tensor) -> None:
    for name, lam in lambdas.items():
        if isinstance(lam, Tensor):
            checks.per_sequence(op, count, reference, **{name: lam})
        elif not 0 <= lam <= 1:
            raise ValueError(f"{op}: {name} must lie between 0 and 1, got {lam}")
