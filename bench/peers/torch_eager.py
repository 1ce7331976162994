"""The usual way in plain PyTorch: what a trainer without kernels does, one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine.bench import head_cases, ops_cases
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.peers import Offer, Peer


def log_softmax_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, through a float32 log-softmax of everything."""
    logprobs = F.log_softmax(logits.float(), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def token_logprobs(x: Tensors) -> Answer:
    with torch.no_grad():
        logprobs, entropy = log_softmax_logprobs(x["logits"], x["targets"])
    return {"logprobs": logprobs, "entropy": entropy}


def token_logprobs_backward(
    x: Tensors, logprobs_of: Callable[..., tuple[Tensor, Tensor]] = log_softmax_logprobs
) -> Answer:
    leaf = x["logits"].detach().requires_grad_()
    logprobs, entropy = logprobs_of(leaf, x["targets"])
    (d_logits,) = torch.autograd.grad([logprobs, entropy], leaf, [x["upstream_logprobs"], x["upstream_entropy"]])
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d_logits": d_logits}


def linear_logprobs(x: Tensors) -> Answer:
    with torch.no_grad():
        logprobs, entropy = log_softmax_logprobs(F.linear(x["hidden"], x["weight"]), x["targets"])
    return {"logprobs": logprobs, "entropy": entropy}


def linear_logprobs_backward(x: Tensors) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], list[Tensor]]:
        logprobs, entropy = log_softmax_logprobs(F.linear(hidden, weight), x["targets"])
        upstream = [x["upstream_logprobs"], x["upstream_entropy"]]
        return {"logprobs": logprobs, "entropy": entropy}, [logprobs, entropy], upstream

    return head_cases.with_gradients(x, outputs)


def clipped(x: Tensors, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """PPO's loss of every row; masked at the end."""
    ratio = (logprobs - x["old_logprobs"]).clamp(-20, 20).exp()
    bounded = -x["advantages"] * ratio.clamp(1 - head_cases.CLIP, 1 + head_cases.CLIP)
    loss = torch.maximum(-x["advantages"] * ratio, bounded) - head_cases.ENTROPY_COEF * entropy
    return loss.where(x["mask"], 0).sum() / x["mask"].sum()


def linear_policy_loss(x: Tensors) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], None]:
        loss = clipped(x, *log_softmax_logprobs(F.linear(hidden, weight), x["targets"]))
        return {"loss": loss}, [loss], None

    return head_cases.with_gradients(x, outputs)


def linear_policy_loss_frozen(x: Tensors) -> Answer:
    hidden = x["hidden"].detach().requires_grad_()
    loss = clipped(x, *log_softmax_logprobs(F.linear(hidden, x["weight"]), x["targets"]))
    return {"loss": loss.detach(), "d_hidden": torch.autograd.grad(loss, hidden)[0]}


def linear_cross_entropy(x: Tensors) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], None]:
        loss = F.cross_entropy(F.linear(hidden, weight).float(), x["targets"])
        return {"loss": loss}, [loss], None

    return head_cases.with_gradients(x, outputs)


# Of the loss-side ops the reference is the plainest PyTorch there is.
LOSS_SIDE = {op: Offer(partial(ops_cases.SOLVE[op], backend="reference")) for op in ops_cases.BYTES}
PEERS = [
    Peer(
        "torch eager", "torch", "", LOSS_SIDE | {
            function.__name__: Offer(function)
            for function in (
                token_logprobs, token_logprobs_backward, linear_logprobs, linear_logprobs_backward, linear_policy_loss,
                linear_policy_loss_frozen, linear_cross_entropy,
            )
        } | {"linear_policy_loss_25": Offer(linear_policy_loss, note="all rows, as it cannot leave any out")},
        lambda: torch.__version__,
    )
]  # fmt: skip
