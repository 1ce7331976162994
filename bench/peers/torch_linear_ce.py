"""torch.nn.functional.linear_cross_entropy, new in torch 2.13: in chunks of rows of its choice, and all at once."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine.bench.peers import Offer, Peer, answers


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets)


def load() -> str:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    return torch.__version__


PEERS = [
    Peer(name, "torch", "2.13", {"linear_cross_entropy": Offer(partial(answers.linear_cross_entropy, loss))}, load)
    for name, loss in (("torch linear_cross_entropy", in_chunks), ("torch linear_cross_entropy, all logits", at_once))
]
