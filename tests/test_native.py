"""What the compiled extension refuses, and what loading it must not do to the process. For numbers: test_compiled."""

from __future__ import annotations

import subprocess
import sys

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
