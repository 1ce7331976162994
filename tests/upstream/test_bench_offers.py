"""What verl and OpenRLHF offer to benchmarks on CPUs is right."""

from __future__ import annotations

import bench_offers
import pytest
import trainers

from rlhf_engine.bench.peers import Peer


@pytest.fixture(scope="module", autouse=True)
def folder() -> None:
    with trainers.importing():  # from here on, peers are found in it too
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@bench_offers.on_cpu("verl", "openrlhf")
def test_offers(peer: Peer, op: str) -> None:
    bench_offers.check(peer, op)
