"""The compiled extension against a float64 loop in NumPy, and what loading it must not do to the process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_engine import native

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native extension: {native.why_missing()}")


def gae_cpu(*args: object) -> tuple[Tensor, Tensor]:
    return torch.ops.rlhf_engine.gae_cpu(*args)


def loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """The definition, read forward through the trainable positions of each row: a sum of discounted deltas."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row, kept in enumerate(mask.numpy()):
        r, v = (x.numpy()[row][kept].astype(np.float64) for x in (rewards, values))
        deltas = r + gamma * np.append(v[1:], 0.0)[: len(v)] - v
        discounts = (gamma * lam) ** np.arange(len(v))
        advantages[row, kept] = [(deltas[t:] * discounts[: len(v) - t]).sum() for t in range(len(v))]
        returns[row, kept] = advantages[row, kept] + v
    return advantages, returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 37), (2, 513), (600, 64)])  # the last runs on several threads
@pytest.mark.parametrize("kept", [1.0, 0.6, 0.05])
def test_matches_the_float64_loop(shape: tuple[int, int], kept: float, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < kept
    mask[0] = False  # one row without a single token
    expected = loop(rewards, values, mask, gamma, lam)
    for ours, exact in zip(gae_cpu(rewards, values, mask, gamma, lam), expected, strict=True):
        # fp32: each of the up to 513 steps rounds values of size 10 or so
        np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-5, atol=2e-5)
        assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape)
    for out in gae_cpu(empty, empty, empty.bool(), 1.0, 0.95):
        assert out.shape == shape


def test_masked_positions_are_never_read() -> None:
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(9, 50), torch.randn(9, 50), torch.rand(9, 50) < 0.7
    clean = gae_cpu(rewards, values, mask, 0.99, 0.95)
    for poison in (torch.nan, torch.inf, 1e38):
        poisoned = gae_cpu(rewards.where(mask, poison), values.where(mask, poison), mask, 0.99, 0.95)
        for a, b in zip(clean, poisoned, strict=True):
            assert torch.equal(a, b)


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_padding() -> None:
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(700, 60), torch.randn(700, 60), torch.rand(700, 60) < 0.9
    batch = gae_cpu(rewards, values, mask, 0.99, 0.95)
    padded = torch.nn.functional.pad(mask, (0, 9))
    more = gae_cpu(*(torch.nn.functional.pad(x, (0, 9)) for x in (rewards, values)), padded, 0.99, 0.95)
    alone = gae_cpu(rewards[17:18], values[17:18], mask[17:18], 0.99, 0.95)
    for whole, wider, one in zip(batch, more, alone, strict=True):
        assert torch.equal(whole, wider[:, :60]) and torch.equal(whole[17:18], one)


def test_wrong_input_is_named() -> None:
    good, mask = torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"values \(4, 7\) does not match rewards \(4, 8\)"):
        gae_cpu(good, torch.zeros(4, 7), mask, 1.0, 0.95)
    with pytest.raises(RuntimeError, match="rewards must be float32"):
        gae_cpu(good.double(), good, mask, 1.0, 0.95)
    with pytest.raises(RuntimeError, match="mask must be bool"):
        gae_cpu(good, good, good, 1.0, 0.95)
    with pytest.raises(RuntimeError, match="values must be contiguous"):
        gae_cpu(good, torch.zeros(8, 4).T, mask, 1.0, 0.95)


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
