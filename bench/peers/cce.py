"""Cut Cross-Entropy 25.1.1, with its filter, which skips tiles whose gradients are small, and without.

Its Triton kernels take hidden states in bfloat16. The filter skips tiles of logits whose gradients are all below
2.4e-4, and so most of them where a model is sure of itself. Each call waits to learn which targets are to be ignored.
Beside the kernels it has torch.compile of the plain way, for CPUs too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.bench.peers import Offer, Peer, answers, packages


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return packages.find("cut_cross_entropy", "linear_cross_entropy")(hidden, weight, targets, **options)


def load() -> str:
    packages.find("cut_cross_entropy", "linear_cross_entropy")
    return packages.version("cut-cross-entropy")


def offer(
    devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...], note: str = "", **options: Any
) -> dict[str, Offer]:
    run = partial(answers.linear_cross_entropy, partial(loss_of, **options))
    return {"linear_cross_entropy": Offer(run, devices, dtypes, note=note)}


KERNELS = ("cuda",), (torch.bfloat16,)
PEERS = [
    Peer("CCE", "cut-cross-entropy", "25.1.1", offer(*KERNELS, "skips tiles of small gradients", impl="cce"), load),
    Peer("CCE, unfiltered", "cut-cross-entropy", "25.1.1", offer(*KERNELS, impl="cce", filter_eps=None), load),
    Peer(
        "CCE, torch.compile", "cut-cross-entropy", "25.1.1",
        offer(("cpu", "cuda"), (torch.float32, torch.bfloat16), impl="torch_compile"), load,
    ),
]  # fmt: skip
