"""Answers for the cases, put together from what a peer has: a function that gives log-probs and entropies, or a loss.

The rest is plain torch and the same for everyone, so that peers differ in what is theirs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.bench import head_cases
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.peers import Offer

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits, targets -> log-probs, entropies
HeadScore = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # hidden, weight, targets -> the same
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same -> minus the mean log-prob
IGNORED = -100  # the target of a row that does not count


def upstream(x: Tensors, logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
    return [x["upstream_logprobs"].to(logprobs.dtype), x["upstream_entropy"].to(entropy.dtype)]


def token_logprobs(score: Score, x: Tensors) -> Answer:
    with torch.no_grad():
        logprobs, entropy = score(x["logits"], x["targets"])
    return {"logprobs": logprobs, "entropy": entropy}


def token_logprobs_backward(score: Score, x: Tensors) -> Answer:
    leaf = x["logits"].detach().requires_grad_()
    logprobs, entropy = score(leaf, x["targets"])
    (d_logits,) = torch.autograd.grad([logprobs, entropy], leaf, upstream(x, logprobs, entropy))
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d_logits": d_logits}


def linear_logprobs(score: HeadScore, x: Tensors) -> Answer:
    with torch.no_grad():
        logprobs, entropy = score(x["hidden"], x["weight"], x["targets"])
    return {"logprobs": logprobs, "entropy": entropy}


def linear_logprobs_backward(score: HeadScore, x: Tensors) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], list[Tensor]]:
        logprobs, entropy = score(hidden, weight, x["targets"])
        return {"logprobs": logprobs, "entropy": entropy}, [logprobs, entropy], upstream(x, logprobs, entropy)

    return head_cases.with_gradients(x, outputs)


def clipped(x: Tensors, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """PPO's loss of every row; masked at the end."""
    ratio = (logprobs - x["old_logprobs"]).clamp(-20, 20).exp()
    bounded = -x["advantages"] * ratio.clamp(1 - head_cases.CLIP, 1 + head_cases.CLIP)
    loss = torch.maximum(-x["advantages"] * ratio, bounded) - head_cases.ENTROPY_COEF * entropy
    return loss.where(x["mask"], 0).sum() / x["mask"].sum()


def linear_policy_loss(score: HeadScore, x: Tensors) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], None]:
        loss = clipped(x, *score(hidden, weight, x["targets"]))
        return {"loss": loss}, [loss], None

    return head_cases.with_gradients(x, outputs)


def linear_policy_loss_frozen(score: HeadScore, x: Tensors) -> Answer:
    hidden = x["hidden"].detach().requires_grad_()
    loss = clipped(x, *score(hidden, x["weight"].detach(), x["targets"]))
    return {"loss": loss.detach(), "d_hidden": torch.autograd.grad(loss, hidden)[0]}


def linear_cross_entropy(loss_of: Loss, x: Tensors) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], None]:
        loss = loss_of(hidden, weight, x["targets"])
        return {"loss": loss}, [loss], None

    return head_cases.with_gradients(x, outputs)


def ignored_targets(x: Tensors) -> Tensors:
    """The mask as models are told it."""
    return x | {"targets": x["targets"].where(x["mask"], IGNORED)}


def tokens(score: Score, **limits: Any) -> dict[str, Offer]:
    """Offers for the ops on logits."""
    return {f.__name__: Offer(partial(f, score), **limits) for f in (token_logprobs, token_logprobs_backward)}


def heads(score: HeadScore, note: str = "", frozen_note: str | None = None, **limits: Any) -> dict[str, Offer]:
    """Offers for the ops on hidden states, of a head that scores all the rows it is given."""
    functions = (linear_logprobs, linear_logprobs_backward, linear_policy_loss)
    quarter = Offer(partial(linear_policy_loss, score), note=f"{note}, all rows" if note else "all rows", **limits)
    frozen = Offer(
        partial(linear_policy_loss_frozen, score), note=note if frozen_note is None else frozen_note, **limits
    )
    return {f.__name__: Offer(partial(f, score), note=note, **limits) for f in functions} | {
        "linear_policy_loss_25": quarter, "linear_policy_loss_frozen": frozen,
    }  # fmt: skip
