"""What peers offer to benchmarks, held to the truth of the quick cases of awkward size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_engine.bench import head_cases, ops_cases, peers
from rlhf_engine.bench.case import errors, wrong
from rlhf_engine.bench.peers import Offer, Peer

CPU = torch.device("cpu")


def case(op: str) -> Any:
    """The last of an op's quick cases, which is the small one."""
    module = ops_cases if op in ops_cases.SOLVE else head_cases
    return [case for case in module.cases(CPU, quick=True) if case.op == op][-1]


def on_cpu(*packages: str) -> Any:
    """A parametrisation by all that peers from these packages offer on CPUs."""
    found = [
        pytest.param(peer, op, id=f"{peer.name}, {op}")
        for peer in peers.everyone()
        for op, offer in peer.offers.items()
        if peer.package in packages and not peers.unfit(offer, torch.float32, CPU)
    ]
    return pytest.mark.parametrize(("peer", "op"), found)


def check(peer: Peer, op: str) -> None:
    assert not peers.loaded(peer)[1], peers.loaded(peer)[1]
    offer: Offer = peer.offers[op]
    problem = case(op)
    tensors = problem.make(torch.Generator().manual_seed(0))
    before = {name: x.clone() for name, x in tensors.items()}
    answer = offer.run(offer.prepare(tensors) if offer.prepare else tensors)
    assert not wrong(errors(answer, problem.truth(tensors)), problem.bounds)
    assert all(torch.equal(x, before[name]) for name, x in tensors.items()), "it changed what it was given"
