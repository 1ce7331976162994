"""What a benchmark is made of: a problem of known answer, and the ways to solve it.

A way gets the tensors of a problem and returns everything that the truth holds, gradients too, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Answer = dict[str, Tensor]
OURS = "ours"


@dataclass(frozen=True)
class Way:
    """One of several programs for the same problem."""

    name: str
    run: Callable[[Tensors], Answer]
    version: str = ""
    note: str = ""  # in what its work differs from the others', where it does
    checked: bool = True  # False for a yardstick, which has no answer: it is not called right either
    prepare: Callable[[Tensors], Tensors] | None = None  # to the form its own program has them in; not timed

    def inputs(self, tensors: Tensors) -> Tensors:
        return self.prepare(tensors) if self.prepare else tensors


@dataclass(frozen=True)
class Case:
    """A problem at one size.

    `bytes_moved` counts each input read once and each result written once: nothing that gives this answer moves less.
    `flops` counts the multiplications and additions of the fewest products that give it, as `convention` says.
    """

    suite: str
    op: str
    shape: str  # where the size comes from, as "Qwen3-8B"
    dims: dict[str, int]
    dtype: torch.dtype
    make: Callable[[torch.Generator], Tensors]
    truth: Callable[[Tensors], Answer]
    bounds: dict[str, float]  # part of the answer -> largest error, relative to the part's largest number
    ways: list[Way] = field(default_factory=list)
    bytes_moved: int = 0
    flops: float = 0.0
    convention: str = ""

    @property
    def name(self) -> str:
        sizes = "x".join(str(n) for n in self.dims.values())
        return f"{self.op}/{self.shape}/{sizes}/{str(self.dtype).removeprefix('torch.')}"


def errors(answer: Answer, truth: Answer) -> dict[str, float]:
    """Of each part, the largest difference relative to the largest number; inf if it is missing or not finite."""
    found = {}
    for part, exact in truth.items():
        got = answer.get(part)
        if got is None or got.shape != exact.shape or not bool(got.isfinite().all()):
            found[part] = float("inf")
        elif not exact.numel():
            found[part] = 0.0
        else:
            largest = float(exact.abs().max()) or 1.0
            found[part] = float((got.to(exact.dtype) - exact).abs().max()) / largest
    return found


def wrong(found: dict[str, float], bounds: dict[str, float]) -> str:
    """Why no speed may be shown, as a sentence; empty if the answer is right."""
    bad = {part: error for part, error in found.items() if not error <= bounds[part]}
    return ", ".join(f"{part} is off by {error:.1e}, allowed are {bounds[part]:.0e}" for part, error in bad.items())
