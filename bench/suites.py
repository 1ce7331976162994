"""The suites of cases by name, and what of them a run is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from rlhf_engine.bench import head_cases, ops_cases
from rlhf_engine.bench.case import Case

Dtypes = tuple[torch.dtype, ...] | None  # none: those that matter on the device
SUITES: dict[str, Callable[[torch.device, bool, Dtypes], Iterator[Case]]] = {
    "ops": ops_cases.cases,
    "head": head_cases.cases,
    "sweep": head_cases.sweep,
}


def cases(names: list[str], device: torch.device, quick: bool, only: str = "", dtypes: Dtypes = None) -> Iterator[Case]:
    """Those of the suites whose name (op/shape/sizes/dtype) holds the regular expression."""
    for name in names:
        for case in SUITES[name](device, quick, dtypes):
            if re.search(only, case.name):
                yield case


def find(suite: str, name: str, device: torch.device, quick: bool) -> Case:
    dtype = getattr(torch, name.rpartition("/")[2])
    return next(case for case in SUITES[suite](device, quick, (dtype,)) if case.name == name)
