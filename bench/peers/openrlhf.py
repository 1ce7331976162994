"""OpenRLHF 0.11.2: its advantages and losses, and its scores of logits, raised to float32 as its actor does.

Left out: kl_estimate, for its k3 is clamped at 10 nats. kl_gae is what its experience maker does for a batch: KL,
reward, GAE and whitening, with clamps of KL and scores at 10 that the case does not reach; the whitening is written out
there, and so it is here. Padding is set to 0 after it, where OpenRLHF leaves what it found.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from rlhf_engine.bench import ops_cases
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.peers import Offer, Peer, answers, packages

UTILS, LOSS, MAKER = "openrlhf.models.utils", "openrlhf.models.loss", "openrlhf.trainer.ppo_utils.experience_maker"
SCORE_CLIP = (-10.0, 10.0)


def find(module: str, name: str) -> Any:
    return packages.find(module, name, mocks=True)


def advantages(values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a method that does not look at its object."""
    maker = find(MAKER, "RemoteExperienceMaker")
    return maker.get_advantages_and_returns(None, values, rewards, mask, ops_cases.GAMMA, ops_cases.LAM)


def gae(x: Tensors) -> Answer:
    return dict(zip(("advantages", "returns"), advantages(x["values"], x["rewards"], x["mask"]), strict=True))


def kl_gae(x: Tensors) -> Answer:
    mask = x["mask"]
    kl = find(UTILS, "compute_approx_kl")(x["logprobs"], x["ref_logprobs"], kl_estimator="k1")
    rewards = find(UTILS, "compute_reward")(x["scores"], ops_cases.KL_COEF, kl, mask, SCORE_CLIP)
    raw, returns = advantages(x["values"], rewards, mask)
    count = mask.sum()
    mean = (raw * mask).sum() / count
    variance = ((raw - mean).pow(2) * mask).sum() / count
    return {"advantages": (raw - mean) * variance.clamp(min=1e-8).rsqrt() * mask, "returns": returns}


@cache
def policy_loss() -> Any:
    return find(LOSS, "PolicyLoss")(ops_cases.CLIP, ops_cases.CLIP, ops_cases.DUAL_CLIP)


def ppo_loss(x: Tensors) -> Answer:
    return ops_cases.with_gradient(
        x, "logprobs", lambda x: policy_loss()(x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"])[0]
    )


@cache
def critic_loss() -> Any:
    return find(LOSS, "ValueLoss")(ops_cases.CLIP)


def value_loss(x: Tensors) -> Answer:
    return ops_cases.with_gradient(
        x, "values", lambda x: critic_loss()(x["values"], x["old_values"], x["returns"], x["mask"])
    )


def logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    raised = logits.float()
    entropy = find(UTILS, "compute_entropy")(raised)
    return find(UTILS, "log_probs_from_logits")(raised, targets), entropy


def load() -> str:
    for name in ("compute_approx_kl", "compute_reward", "compute_entropy", "log_probs_from_logits"):
        find(UTILS, name)
    for name in ("PolicyLoss", "ValueLoss"):
        find(LOSS, name)
    find(MAKER, "RemoteExperienceMaker")
    return packages.version("openrlhf")


PEERS = [
    Peer(
        "OpenRLHF", "openrlhf", "0.11.2", {
            "gae": Offer(gae), "kl_gae": Offer(kl_gae, note="padding set to 0"),
            "ppo_loss": Offer(ppo_loss, note="with its metrics"), "value_loss": Offer(value_loss),
        } | answers.tokens(logprobs), load,
    )
]  # fmt: skip
