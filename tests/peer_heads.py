"""What the comparisons of the head with other packages share: their released code, a head, and what counts as the same.

`make peers` puts the wheels into a folder and names it in PEERS; without it these tests are skipped. Rows that do not
count are told to each package in its own way and hold loud, finite numbers: some packages multiply by their masks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops
from rlhf_engine.bench.peers import packages

FOLDER = os.environ.get("PEERS", "")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Relative to the largest number of a tensor. Each package sums a logit up in its own order. Logits here reach 15, where
# float32 has steps of 1e-6; what a logit is off by is the relative error of a probability, and so of gradients. Allowed
# are ten steps; five are seen.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-14}
WIDTH, VOCABULARY = 48, 1013
MODES = {  # what TRL and Liger call it -> what we do
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "constant",
    "luspo": "seq-mean-token-sum",
}
Results = dict[str, Tensor | None]


def needs_peers() -> None:
    """Skips the module that calls it where there is nothing to compare with."""
    if not FOLDER:
        pytest.skip("compares with other packages' releases: run make peers", allow_module_level=True)


def load(name: str) -> Any:
    """A module of another package, of the one in that folder."""
    module = packages.module(name)
    assert Path(str(module.__file__)).is_relative_to(Path(FOLDER).resolve()), module.__file__
    return module


def backends(op: str) -> Any:
    return pytest.mark.parametrize("backend", ops.available(op, "cpu"))


@dataclass
class Head:
    """Input of a head, and the gradients that come back to its outputs. B sequences, T tokens."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (B, T), -100 where nothing is scored
    grad_logprobs: Tensor  # (B, T)
    grad_entropy: Tensor  # (B, T)

    @property
    def mask(self) -> Tensor:
        return self.labels != -100

    def leaves(self) -> dict[str, Tensor | None]:
        parts = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: None if x is None else x.clone().requires_grad_() for name, x in parts.items()}


def make_head(dtype: torch.dtype = torch.float32, *, bias: bool = True, length: int = 37) -> Head:
    """Logits with a deviation of 3, so that some 100 of 1013 tokens matter. Rows: full, padded, holes, none, random."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    mask = torch.rand(8, length, generator=rng) < 0.6
    mask[0], mask[1, length // 2 :], mask[2, 5:9], mask[3] = True, False, False, False
    hidden = normal(*mask.shape, WIDTH)
    return Head(
        hidden=torch.where(mask[..., None], hidden, 50 * hidden),
        weight=3 / WIDTH**0.5 * normal(VOCABULARY, WIDTH),
        bias=normal(VOCABULARY) if bias else None,
        labels=torch.randint(VOCABULARY, mask.shape, generator=rng).masked_fill(~mask, -100),
        grad_logprobs=normal(*mask.shape),
        grad_entropy=normal(*mask.shape),
    )


def run(head: Head, score: Callable[..., tuple[Tensor, Tensor | None]]) -> Results:
    """Outputs of score(hidden, weight, bias), and the gradients of what is multiplied with head's own."""
    leaves = head.leaves()
    logprobs, entropy = score(**leaves)
    loss = (logprobs * head.grad_logprobs).sum()
    if entropy is not None:
        loss = loss + (entropy * head.grad_entropy).sum()
    loss.backward()
    return {"logprobs": logprobs, "entropy": entropy} | {n: None if x is None else x.grad for n, x in leaves.items()}


def ours(head: Head, backend: str, **options: Any) -> Results:
    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.linear_logprobs(hidden, weight, head.labels, bias=bias, backend=backend, **options)

    return run(head, score)


def agree(ours: Results, theirs: Results, dtype: torch.dtype = torch.float32) -> None:
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert (mine is None) == (other is None), name
        if mine is None or other is None:
            continue
        mine, other = mine.detach().double(), other.detach().double()
        assert mine.shape == other.shape and other.any(), name
        scale, error = other.abs().max().item(), (mine - other).abs().max().item()
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error:.3g} apart, where the largest is {scale:.3g}"
