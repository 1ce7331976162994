"""verl 0.9.1: its advantages and losses, its scores of logits, and its two fused heads.

Left out: kl_estimate, for its k3 is clamped at 10 nats, and kl_gae, which is spread over its trainer. Logits are scored
in their own dtype where flash-attn is not installed, so only those in float32. A mask is float where it says so. In
front of compute_gae_advantage_return nothing is done; after it, padding is set to 0, where verl leaves what it found.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.bench import ops_cases
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.peers import Offer, Peer, answers, packages

CORE, FUNCTIONAL = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
FUSED, TRITON = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
WIDTHS = 128  # which the Triton head's must be divisible by


def find(module: str, name: str) -> Any:
    return packages.find(module, name, mocks=True)


def float_mask(x: Tensors) -> Tensors:
    return x | {"mask": x["mask"].float()}


def gae_whiten(x: Tensors) -> Answer:
    compute = find(CORE, "compute_gae_advantage_return")
    found = compute(x["rewards"], x["values"], x["mask"], ops_cases.GAMMA, ops_cases.LAM)
    return dict(zip(("advantages", "returns"), (y * x["mask"] for y in found), strict=True))


def whiten(x: Tensors) -> Answer:
    return {"whitened": find(FUNCTIONAL, "masked_whiten")(x["x"], x["mask"]) * x["mask"]}


@cache
def actor() -> Any:
    """Its defaults for the loss: clip .2, dual clip 3, mean over tokens."""
    return find(CORE, "ActorConfig")(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)


def ppo_loss(x: Tensors) -> Answer:
    def loss(x: Tensors) -> Tensor:
        compute = find(CORE, "compute_policy_loss_vanilla")
        return compute(x["old_logprobs"], x["logprobs"], x["advantages"], x["mask"], "token-mean", actor())[0]

    return ops_cases.with_gradient(x, "logprobs", loss)


def value_loss(x: Tensors) -> Answer:
    def loss(x: Tensors) -> Tensor:
        return find(CORE, "compute_value_loss")(x["values"], x["returns"], x["old_values"], x["mask"], ops_cases.CLIP)[
            0
        ]

    return ops_cases.with_gradient(x, "values", loss)


def logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As its actor has them: entropies are compiled, and read the logits once more, so that nothing is in place."""
    found = find(FUNCTIONAL, "logprobs_from_logits")(logits, targets, inplace_backward=False)
    return found, packages.compiled(find(FUNCTIONAL, "entropy_from_logits"))(logits)


@cache
def fused() -> Any:
    return find(FUSED, "FusedLinearForPPO")()


def torch_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return fused()(hidden, weight, targets)


def triton_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.shape[1] % WIDTHS:
        raise ValueError(f"takes widths divisible by {WIDTHS}, not {hidden.shape[1]}")
    return find(TRITON, "linear_cross_entropy")(hidden, weight, targets, 1.0, "none", None)


def load() -> str:
    for name in ("compute_gae_advantage_return", "compute_policy_loss_vanilla", "compute_value_loss", "ActorConfig"):
        find(CORE, name)
    for name in ("masked_whiten", "logprobs_from_logits", "entropy_from_logits"):
        find(FUNCTIONAL, name)
    find(FUSED, "FusedLinearForPPO")
    return packages.version("verl")


def load_triton() -> str:
    find(TRITON, "linear_cross_entropy")
    find("verl.utils.kernel.kernels", "efficient_entropy_forward")  # which that one imports when it is called
    return packages.version("verl")


ZEROED = "float mask; padding set to 0"
FROZEN = "the weight's gradient too"
PEERS = [
    Peer(
        "verl", "verl", "0.9.1", {
            "gae_whiten": Offer(gae_whiten, note=ZEROED, prepare=float_mask),
            "whiten": Offer(whiten, note=ZEROED, prepare=float_mask),
            "ppo_loss": Offer(ppo_loss, note="with its metrics, for which it waits"),
            "value_loss": Offer(value_loss, note="with its metric"),
        } | answers.tokens(logprobs, dtypes=(torch.float32,)) | answers.heads(torch_head, frozen_note=FROZEN), load,
    ),
    Peer(
        "verl, Triton", "verl", "0.9.1",
        answers.heads(triton_head, frozen_note=FROZEN, devices=("cuda",)), load_triton,
    ),
]  # fmt: skip
