"""What TRL, Liger, Cut Cross-Entropy and TorchRL offer to benchmarks on CPUs is right."""

from __future__ import annotations

import sys

import bench_offers
import peer_heads
import pytest

from rlhf_engine.bench.peers import Peer

peer_heads.needs_peers()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@bench_offers.on_cpu("trl", "liger-kernel", "cut-cross-entropy", "torchrl")
def test_offers(peer: Peer, op: str) -> None:
    if peer.package == "trl" and sys.version_info < (3, 11):
        pytest.skip("TRL 1.16 needs Python 3.11")
    bench_offers.check(peer, op)
