"""TorchRL 0.14.1: GAE by a convolution with powers of gamma * lambda, cut off where they fall below 1e-7.

Its tensors are (B, T, 1), with values of next states and flags of where trajectories end. It knows no mask: rewards and
values are 0 in padding, and so is its answer there. All of that is made before any time is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlhf_engine.bench import ops_cases
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.peers import Offer, Peer, packages

MODULE = "torchrl.objectives.value.functional"


def trajectories(x: Tensors) -> Tensors:
    values, rewards = (torch.where(x["mask"], x[name], 0)[..., None] for name in ("values", "rewards"))
    done = torch.zeros_like(values, dtype=torch.bool)
    done[:, -1] = True
    return {"values": values, "next_values": F.pad(values[:, 1:], (0, 0, 0, 1)), "rewards": rewards, "done": done}


def gae(x: Tensors) -> Answer:
    compute = packages.find(MODULE, "vec_generalized_advantage_estimate")
    found = compute(ops_cases.GAMMA, ops_cases.LAM, x["values"], x["next_values"], x["rewards"], x["done"])
    return dict(zip(("advantages", "returns"), (y[..., 0] for y in found), strict=True))


def load() -> str:
    packages.find(MODULE, "vec_generalized_advantage_estimate")
    return packages.version("torchrl")


PEERS = [
    Peer("TorchRL", "torchrl", "0.14.1", {
        "gae": Offer(gae, note="no mask; next values and ends of trajectories given", prepare=trajectories)
    }, load)
]  # fmt: skip
