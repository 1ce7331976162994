"""Liger 0.8.5: the Hopper head for log-probs and entropies, and its heads for cross-entropy.

Its fused PPO and GRPO losses have no entropy bonus, so they have no answer to linear_policy_loss; that op is the Hopper
head with the loss in torch. What each head asks for: the Hopper ones bfloat16, compute capability 9.0 and the CuTe DSL;
that for cross-entropy also rows in multiples of 128 and a vocabulary in multiples of 256. On CPUs the first one is
plain torch, in chunks of 512 rows.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.bench.peers import Offer, Peer, answers, packages

SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
HOPPER = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
FUNCTIONAL = "liger_kernel.transformers.functional"
# In each call it looks through all targets and waits for the verdict; this is its own switch.
UNVALIDATED = {"LIGER_SCALED_CE_SM90_VALIDATE_TARGETS": "0"}


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    temperature, ignore_index, tiles_per_cluster, with_entropy = 1.0, answers.IGNORED, 1, True
    apply = packages.find(SCALED, "LigerFusedLinearScaledCrossEntropyFunction").apply
    nll, entropy = apply(hidden, weight, targets, temperature, ignore_index, tiles_per_cluster, with_entropy)
    return -nll, entropy


def hopper_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return packages.find(HOPPER, "liger_fused_linear_cross_entropy_sm90")(hidden, weight, targets)


def triton_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return packages.find(FUNCTIONAL, "liger_fused_linear_cross_entropy")(hidden, weight, targets)


def load_torch() -> str:
    packages.find(SCALED, "LigerFusedLinearScaledCrossEntropyFunction")
    return packages.version("liger-kernel")


def load_hopper() -> str:
    os.environ.update(UNVALIDATED)
    if torch.cuda.is_available():  # else nothing of it runs, and it cannot even be imported
        packages.find("liger_kernel.ops.cutedsl.ops", "LigerFusedScaledCrossEntropySM90Function")
        packages.find(HOPPER, "liger_fused_linear_cross_entropy_sm90")
    return load_torch()


def load_triton() -> str:
    packages.find(FUNCTIONAL, "liger_fused_linear_cross_entropy")
    return packages.version("liger-kernel")


HOPPERS: dict[str, Any] = {"devices": ("cuda",), "dtypes": (torch.bfloat16,), "capability": 90}
VERSION = "0.8.5"
PEERS = [
    Peer(
        "Liger, Hopper", "liger-kernel", VERSION,
        answers.heads(head, "targets not validated", "targets not validated, the weight's gradient too", **HOPPERS)
        | {"linear_cross_entropy": Offer(partial(answers.linear_cross_entropy, hopper_cross_entropy), **HOPPERS)},
        load_hopper,
    ),
    Peer(
        "Liger, torch", "liger-kernel", VERSION,
        answers.heads(head, frozen_note="the weight's gradient too", devices=("cpu",)), load_torch,
    ),
    Peer(
        "Liger, Triton", "liger-kernel", VERSION,
        {"linear_cross_entropy": Offer(
            partial(answers.linear_cross_entropy, triton_cross_entropy), ("cuda",), note="waits to count the targets"
        )}, load_triton,
    ),
]  # fmt: skip
