"""The operators behind the head ops: fold a tile of logits, merge what folds leave, write a tile's gradient.

They exist as rlhf_engine::* in C++ for CPUs (csrc/bindings_head.cpp) and as rlhf_triton::* (kernels/head.py). A tile is
(rows, n) or (B, T, n), columns [start, start + n) of a vocabulary. csrc/head.h has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TRANSFORM = (
    "Tensor? bias, Tensor? temperature, Tensor? target_logits, float logit_scale, float softcap, "
    "float inverse_temperature, int start, int ignore_index"
)
SCHEMAS = {
    "head_fold": f"(Tensor logits, Tensor targets, {_TRANSFORM}, bool extras) -> Tensor",
    "head_combine": "(Tensor parts, Tensor targets, int start, int vocabulary, int ignore_index) -> Tensor",
    "head_gradient": "(Tensor logits, Tensor targets, Tensor statistics, Tensor? grad_logprobs, Tensor? grad_entropy, "
    f"{_TRANSFORM}, Tensor(a!) out) -> ()",
}
# Only GPUs need these; a CPU looks at the number, and has a dot product.
TRITON_SCHEMAS = SCHEMAS | {
    "target_logits": "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) -> Tensor",
    "head_scale": "(Tensor(a!) x, Tensor factor) -> ()",
}
# Columns of a segment, whose sums have an order of their own.
SEGMENTS = {"rlhf_engine": 2048, "rlhf_triton": 8192}
# Rows of the statistics; the last two are there if asked for.
STATISTICS = ("logprob", "entropy", "maximum", "log_sum", "mean", "target_logit", "top1", "sum_p_squared")
EXTRAS = STATISTICS[6:]


def register(namespace: str) -> None:
    """Shapes for tracing. The ops attach gradients themselves."""

    def fold(logits: Tensor, *rest: Any) -> Tensor:
        segments = -(-logits.shape[-1] // SEGMENTS[namespace])
        rows = logits.shape[:-1].numel()
        return logits.new_empty(segments, 6 if rest[-1] else 4, rows, dtype=torch.float32)

    fakes: dict[str, Callable[..., Any]] = {
        "head_fold": fold,
        "head_combine": lambda parts, *_: parts.new_empty(parts.shape[1] + 2, parts.shape[2]),
        "head_gradient": lambda *_: None,
    }
    if namespace == "rlhf_triton":
        fakes["target_logits"] = lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        fakes["head_scale"] = lambda *_: None
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
