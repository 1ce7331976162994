"""QuACK 0.6.5 on Hopper: its linear cross-entropy in chunks of rows, and its cross-entropy of all logits at once.

In chunks it takes rows in multiples of 8, and its fastest kernels a vocabulary divisible by 128 and a width by 8; which
of its ways is taken, it chooses. Neither has entropies, so the ops on log-probs are left out. It cannot be imported
unless the CUTLASS DSL lies in a folder called site-packages: other code it takes for its user's, and fingerprints.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlhf_engine.bench.peers import Offer, Peer, answers, packages

MODULE = "quack.linear_cross_entropy"
MULTIPLE = 8  # of rows, as its own layer asks before it takes the chunks


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if any(n % MULTIPLE for n in (*hidden.shape, len(weight))):
        raise ValueError(f"takes rows, widths and vocabularies divisible by {MULTIPLE}")
    return packages.find(MODULE, "chunked_linear_cross_entropy")(hidden, weight, targets)


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return packages.find(MODULE, "linear_cross_entropy_func")(hidden, weight, None, targets)


def load() -> str:
    for name in ("chunked_linear_cross_entropy", "linear_cross_entropy_func"):
        packages.find(MODULE, name)
    return packages.version("quack-kernels")


PEERS = [
    Peer(
        name, "quack-kernels", "0.6.5",
        {"linear_cross_entropy": Offer(
            partial(answers.linear_cross_entropy, loss), ("cuda",), (torch.bfloat16,), capability=90
        )}, load,
    )
    for name, loss in (("QuACK", in_chunks), ("QuACK, all logits", at_once))
]  # fmt: skip
