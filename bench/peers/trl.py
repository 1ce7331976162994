"""TRL 1.16: its scores of logits, and its fused head as models get it.

On GPUs both are Triton kernels, and the head gathers the rows whose label is not -100; on CPUs both are plain torch,
the head scores every row, and logits in bfloat16 are scored in bfloat16.
"""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.bench.peers import Offer, Peer, answers, packages

UTILS = "trl.trainer.utils"


def logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return packages.find(UTILS, "selective_log_softmax_and_entropy")(logits, targets)


class Model(torch.nn.Module):
    """A model that is nothing but its head, for add_fused_lm_head."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    read: Tensor
    weight: Tensor

    def forward(self) -> None:
        """Replaced by the fused head."""

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.read)

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.weight, bias=None)


@cache
def model() -> Model:
    made = Model()
    packages.find(UTILS, "add_fused_lm_head")(made, outputs=("log_probs", "entropy"))
    return made


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    scored: Any = model()
    scored.read, scored.weight = hidden, weight
    found = scored.forward(fused_lm_head=True, shift_labels=targets)
    scored.read = scored.weight = None  # nothing of a case outlives it
    return found.log_probs, found.entropy


def load() -> str:
    packages.find(UTILS, "selective_log_softmax_and_entropy")
    packages.find(UTILS, "add_fused_lm_head")
    return packages.version("trl")


QUARTER = Offer(partial(answers.linear_policy_loss, head), note="on CPUs all rows", prepare=answers.ignored_targets)
PEERS = [
    Peer(
        "TRL", "trl", "1.16.0",
        answers.tokens(logprobs) | answers.heads(head) | {"linear_policy_loss_25": QUARTER}, load,
    )
]  # fmt: skip
