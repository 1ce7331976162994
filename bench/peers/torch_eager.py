"""The usual way in plain PyTorch: what a trainer without kernels does, one operation after the other."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine.bench import ops_cases
from rlhf_engine.bench.peers import Offer, Peer, answers


def logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, through a float32 log-softmax of everything."""
    found = F.log_softmax(logits.float(), -1)
    entropy = -(found.exp() * found).sum(-1)
    return found.gather(1, targets[:, None])[:, 0], entropy


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs(F.linear(hidden, weight), targets)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


# Of the loss-side ops the reference is the plainest PyTorch there is.
LOSS_SIDE = {op: Offer(partial(ops_cases.SOLVE[op], backend="reference")) for op in ops_cases.BYTES}
PEERS = [
    Peer(
        "torch eager", "torch", "",
        LOSS_SIDE | answers.tokens(logprobs) | answers.heads(head)
        | {"linear_cross_entropy": Offer(partial(answers.linear_cross_entropy, cross_entropy))},
        lambda: torch.__version__,
    )
]  # fmt: skip
