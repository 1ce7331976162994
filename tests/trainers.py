"""What the comparisons with other trainers share: their released code, a batch for it, and what counts as the same.

`make upstream` puts the wheels into a folder and names it in UPSTREAM; without it these tests are skipped. The trainers
also import software for clusters and serving, for which mocks stand in (see bench/peers/packages.py).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import native
from rlhf_engine.bench.peers import packages

FOLDER = os.environ.get("UPSTREAM", "")
if not FOLDER:  # skips the module that imports this one
    pytest.skip("compares with other trainers' releases: run make upstream", allow_module_level=True)

NO_EXTENSION = pytest.mark.skipif(not native.load(), reason=f"no native extension: {native.why_missing()}")
backends = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=NO_EXTENSION), "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# float32: a few roundings of the largest number. float64: verl adds 1e-8 to counts, here of some 200 tokens.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-9}


@contextmanager
def importing() -> Iterator[None]:
    """Inside, a trainer's modules can be imported."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with packages.importing(FOLDER, mocks=True):
        yield


def load(name: str) -> Any:
    with importing():
        return importlib.import_module(name)


@dataclass
class Batch:
    """(B, T) tensors with every kind of row, and everywhere finite numbers: trainers multiply by their masks."""

    mask: Tensor
    rewards: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    scores: Tensor  # (B,)


def make_batch(dtype: torch.dtype, seed: int = 0) -> Batch:
    """Rows: full, padded, with holes, holes and padding, padding in front too, one token, none, random ones."""
    rng = torch.Generator().manual_seed(seed)
    length = 37
    rows = [slice(0, length), slice(0, 20), slice(0, length), slice(0, 25), slice(3, 30), slice(4, 5), slice(0, 0)]
    mask = torch.zeros(len(rows) + 4, length, dtype=torch.bool)
    for row, tokens in zip(mask, rows, strict=False):
        row[tokens] = True
    mask[2, 5:9], mask[3, 10:11], mask[3, 15:20] = False, False, False
    mask[len(rows) :] = torch.rand(4, length, generator=rng) < 0.6

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(mask.shape, generator=rng, dtype=torch.float64).to(dtype)

    old_logprobs, values, advantages = -normal().abs(), normal(), normal()
    return Batch(
        mask=mask,
        rewards=normal(0.3),
        values=values,
        old_values=values + normal(0.5),  # a third beyond a value clip of .5
        returns=values + normal(),
        logprobs=old_logprobs + normal(0.7),  # a fifth of the ratios are above 1.8, some above 3
        old_logprobs=old_logprobs,
        ref_logprobs=old_logprobs + normal(0.3),
        advantages=advantages,
        entropy=normal().abs(),
        scores=12 * torch.randn(len(mask), generator=rng, dtype=torch.float64).to(dtype),  # some beyond a clip of 10
    )


def agree(
    ours: Tensor | float, theirs: Tensor | float, dtype: torch.dtype = torch.float32, *, size: float = 0.0
) -> None:
    """As exact as that dtype, relative to the largest number, or to the `size` of what added up to a small one."""
    ours, theirs = torch.as_tensor(ours).double().detach(), torch.as_tensor(theirs).double().detach()
    assert ours.shape == theirs.shape
    scale, error = max(theirs.abs().max().item(), size), (ours - theirs).abs().max().item()
    assert error <= TOLERANCE[dtype] * scale, f"{error:.3g} apart, where the largest number is {scale:.3g}"


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, inputs))
