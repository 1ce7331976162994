"""From scores and log-probs to advantages: the kernel of gae.py finds the rewards too, that of whiten.py whitens.

    r_t = -kl_coef kl_t, plus the score at one place;   then A and R as in gae.py;   then A whitened over the mask

Two launches, three beyond 1024 sequences: each program leaves the moments of its sequence's advantages, and whitening
folds them in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.kernels.gae import count_of, launch
from rlhf_engine.kernels.whiten import whiten_by


def kl_gae_out(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_kind: int,
    diff_low: float,
    diff_high: float,
    value_low: float,
    value_high: float,
    kl_coef: float,
    score_bound: float,
    after: bool,
    gamma: float,
    lam_all: float,
    decay: bool,
    whiten: bool,
    rewards: Tensor,
    advantages: Tensor,
    returns: Tensor,
    kl: Tensor,
    value_mask: Tensor,
) -> None:
    """`kl_gae` into given tensors, which are none of the inputs."""
    moments = values.new_empty(3, count_of(values, cu_seqlens), dtype=torch.float64) if whiten else None
    launch(
        rewards, values, mask, lam, None, bootstrap, cu_seqlens, gamma, lam_all, lam_all, False, decay, advantages,
        returns, (scores, logprobs, ref_logprobs, kl, value_mask, moments),
        (diff_low, diff_high, value_low, value_high, kl_coef, score_bound), kl_kind, after
    )  # fmt: skip
    if moments is not None and values.numel():
        whiten_by(moments, advantages, mask, 0, 1e-8, True, True, True, advantages)


def kl_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_kind: int,
    diff_low: float,
    diff_high: float,
    value_low: float,
    value_high: float,
    kl_coef: float,
    score_bound: float,
    after: bool,
    gamma: float,
    lam_all: float,
    decay: bool,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rewards, advantages, returns, kl, value_mask): rewards = -kl_coef kl and the score, then `gae`, then whitening.

    Args:
        scores: (B,) float32, of whole sequences, clamped to +-score_bound.
        logprobs, ref_logprobs, values, mask, lam, bootstrap, cu_seqlens, gamma, lam_all, decay: see `gae`.
        kl_kind and the four bounds: see kl.py.
        after: the score goes to the slot after the last trainable token, where the sequence has one; else to the token.
        whiten: the advantages, over the mask, with the biased variance and eps 1e-8.
    """
    rewards, advantages, returns, kl = (torch.empty_like(logprobs) for _ in range(4))
    value_mask = torch.empty_like(logprobs, dtype=torch.bool)
    kl_gae_out(
        scores, logprobs, ref_logprobs, values, mask, lam, bootstrap, cu_seqlens, kl_kind, diff_low, diff_high,
        value_low, value_high, kl_coef, score_bound, after, gamma, lam_all, decay, whiten, rewards, advantages,
        returns, kl, value_mask
    )  # fmt: skip
    return rewards, advantages, returns, kl, value_mask
