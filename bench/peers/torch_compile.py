"""torch.compile of the usual way, for the ops that it can fuse: everything but the recurrence of GAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.bench import ops_cases
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.peers import Offer, Peer, answers, packages, torch_eager


def _policy(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """By multiplication with the mask, which a compiler can fuse, where the reference gathers."""
    ratio = (logprobs - old).clamp(-20, 20).exp()
    clip = ratio.clamp(1 - ops_cases.CLIP, 1 + ops_cases.CLIP)
    loss = torch.maximum(-advantages * ratio, -advantages * clip)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * ops_cases.DUAL_CLIP), loss)
    return (loss * mask).sum() / mask.sum()


def _value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clip = old + (values - old).clamp(-ops_cases.CLIP, ops_cases.CLIP)
    return 0.5 * (torch.maximum((values - returns) ** 2, (clip - returns) ** 2) * mask).sum() / mask.sum()


def _estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return reference.kl_estimate(logprobs, ref_logprobs, kind="k3")


def logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return packages.compiled(torch_eager.logprobs)(logits, targets)


def ppo_loss(x: Tensors) -> Answer:
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    return ops_cases.with_gradient(x, "logprobs", lambda x: packages.compiled(_policy)(*(x[name] for name in names)))


def value_loss(x: Tensors) -> Answer:
    names = ("values", "old_values", "returns", "mask")
    return ops_cases.with_gradient(x, "values", lambda x: packages.compiled(_value)(*(x[name] for name in names)))


def kl_estimate(x: Tensors) -> Answer:
    return {"kl": packages.compiled(_estimate)(x["logprobs"], x["ref_logprobs"])}


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs(F.linear(hidden, weight), targets)


PEERS = [
    Peer(
        "torch.compile", "torch", "",
        {f.__name__: Offer(f) for f in (ppo_loss, value_loss, kl_estimate)} | answers.tokens(logprobs)
        | {"linear_policy_loss": answers.heads(head)["linear_policy_loss"]},
        lambda: torch.__version__,
    )
]  # fmt: skip
