"""The suites of cases by name, and what of them a run is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from rlhf_engine.bench import head_cases, ops_cases
from rlhf_engine.bench.case import Case

SUITES: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "ops": ops_cases.cases,
    "head": head_cases.cases,
    "sweep": head_cases.sweep,
}


def cases(names: list[str], device: torch.device, quick: bool, only: str = "") -> Iterator[Case]:
    """Those of the suites whose name (op/shape/sizes/dtype) holds the regular expression."""
    for name in names:
        for case in SUITES[name](device, quick):
            if re.search(only, case.name):
                yield case


def find(suite: str, name: str, device: torch.device, quick: bool) -> Case:
    return next(case for case in SUITES[suite](device, quick) if case.name == name)
