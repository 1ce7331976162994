"""torch.nn.functional.linear_cross_entropy, new in torch 2.13: minus our log-probs. It knows no temperature.

Nothing has to be fetched for it, so `make test` runs this file too.
"""

from __future__ import annotations

from typing import Any

import peer_heads
import pytest
import torch
import torch.nn.functional as F
from peer_heads import agree, backends, dtypes, make_head, ours, run
from torch import Tensor

from rlhf_engine import ops

if not hasattr(F, "linear_cross_entropy"):
    pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy", allow_module_level=True)

WAYS = {
    "all logits": lambda: {},
    "chunks of rows": lambda: {"options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=32)},
}
ways = pytest.mark.parametrize("way", WAYS)


def cross_entropy(head: peer_heads.Head, way: str, leaves: dict[str, Any], **options: Any) -> Tensor:
    rows, labels = leaves["hidden"].flatten(0, 1), head.labels.flatten()
    return F.linear_cross_entropy(
        rows, leaves["weight"], labels, linear_bias=leaves["bias"], ignore_index=-100, **WAYS[way](), **options
    )


@ways
@dtypes
@backends("linear_logprobs")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_per_token(bias: bool, backend: str, dtype: torch.dtype, way: str) -> None:
    head = make_head(dtype, bias=bias)
    head.grad_entropy.zero_()

    def score(**leaves: Any) -> tuple[Tensor, None]:
        return -cross_entropy(head, way, leaves, reduction="none").view_as(head.labels), None

    agree(ours(head, backend) | {"entropy": None}, run(head, score), dtype)


@ways
@dtypes
@backends("linear_policy_loss")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_summed_up(reduction: str, backend: str, dtype: torch.dtype, way: str) -> None:
    head, found = make_head(dtype), []

    def ours(leaves: Any) -> Tensor:
        return ops.linear_policy_loss(
            leaves["hidden"], leaves["weight"], head.labels, lambda logprobs, *_: -logprobs, bias=leaves["bias"],
            denom=None if reduction == "mean" else 1, backend=backend,
        )[0]  # fmt: skip

    for score in (ours, lambda leaves: cross_entropy(head, way, leaves, reduction=reduction)):
        leaves = head.leaves()
        loss = score(leaves)
        loss.backward()
        found.append({"loss": loss} | {name: x.grad for name, x in leaves.items()})
    agree(*found, dtype)
