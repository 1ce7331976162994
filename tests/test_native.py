"""What the compiled extension refuses, and what loading it must not do to the process. For numbers: test_compiled."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_engine import native

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native extension: {native.why_missing()}")


def gae(rewards: Tensor, values: Tensor, mask: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.ops.rlhf_engine.gae(rewards, values, mask, None, None, None, offsets, 1.0, 0.9, 0.9, False, False)


def test_wrong_input_is_an_error_even_without_the_front_door() -> None:
    good, mask = torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="rewards has size 7 in dimension 1, not 8"):
        gae(torch.zeros(4, 7), good, mask)
    with pytest.raises(RuntimeError, match="rewards must be float32"):
        gae(good.double(), good, mask)
    with pytest.raises(RuntimeError, match="mask must be bool"):
        gae(good, good, good)
    with pytest.raises(RuntimeError, match="rewards must be contiguous"):
        gae(torch.zeros(8, 4).T, good, mask)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to 32"):
        gae(good.flatten(), good.flatten(), mask.flatten(), torch.tensor([0, 40, 32]))


def test_loading_leaves_denormals_alone() -> None:
    """A library linked with -ffast-math switches them off for the whole process, main thread and workers."""
    script = (
        "import torch; from rlhf_engine import native; assert native.load(), native.why_missing()\n"
        "x = torch.full((1 << 20,), 1e-40); assert (x * 1 == x).all() and x[0] > 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_build_info_says_how() -> None:
    info = native.build_info()
    assert {"compiler", "flags", "torch"} <= info.keys() and "fast-math" not in info["flags"], info


def test_bare_addresses_give_what_the_operators_give() -> None:
    """The module for benchmarks, where it was built (it needs Python's headers)."""
    if "raw_not_built" in native.build_info():
        pytest.skip(f"rlhf_engine._raw was not built: {native.build_info()['raw_not_built'][-200:]}")
    raw = native.raw()
    assert raw.targets == native.build_info()["targets"].split()
    (rewards, values, ref), scores = torch.randn(3, 5, 70), torch.randn(5)
    mask = torch.rand(5, 70) < 0.8
    a, b, c, d = torch.empty(4, 5, 70)
    inputs = [x.data_ptr() for x in (rewards, values, mask)]
    raw.gae(*inputs, 5, 70, 0.99, 0.9, a.data_ptr(), b.data_ptr())
    ours = torch.ops.rlhf_engine.gae(rewards, values, mask, None, None, None, None, 0.99, 0.9, 0.9, False, False)
    assert torch.equal(a, ours[0]) and torch.equal(b, ours[1])
    kept = torch.empty(5, 70, dtype=torch.bool)
    places = [x.data_ptr() for x in (a, b, c, d, kept)]
    raw.kl_gae(*(x.data_ptr() for x in (scores, rewards, ref, values, mask)), 5, 70, 0.1, 0.99, 0.9, *places)
    inf = float("inf")
    rest = (None, None, None, 0, -inf, inf, -inf, inf, 0.1, inf, False, 0.99, 0.9, False, False)
    for x, y in zip(
        (a, b, c, d, kept), torch.ops.rlhf_engine.kl_gae(scores, rewards, ref, values, mask, *rest), strict=True
    ):
        assert torch.equal(x, y)
    raw.policy_loss(*(x.data_ptr() for x in (values, ref, rewards, mask)), 350, 0.2, 7.0, c.data_ptr(), a.data_ptr())
    rest = (None, None, None, None, None, 7.0, 0.2, 0.2, inf, 0.0, 0.0, 0, False, True)
    loss, gradient, *_ = torch.ops.rlhf_engine.ppo_loss(values, ref, rewards, mask, *rest)
    assert torch.equal(c[0, 0], loss) and torch.equal(a, gradient)


def test_the_extension_is_made_of_these_sources() -> None:
    """A source put back with its old time, as after a bug planted by hand, is newer than nothing."""
    sources = b"".join(file.read_bytes() for file in sorted((Path(__file__).parents[1] / "csrc").iterdir()))
    made_of = native.build_info().get("sources")
    assert made_of == hashlib.sha256(sources).hexdigest(), "another csrc/ was compiled: pip install -e . once more"
