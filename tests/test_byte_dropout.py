"""Dropout by random bytes: rate, scale, independence, gradient."""

from __future__ import annotations

import pytest
import torch

from rlhf_engine.byte_dropout import ByteDropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 0.999])
def test_rate_and_scale(p: float) -> None:
    torch.manual_seed(0)
    layer, x = ByteDropout(p), torch.ones(401, 1009)
    out = layer(x)
    rate = min(round(256 * p), 255) / 256
    assert float((out == 0).float().mean()) == pytest.approx(rate, abs=3e-3)
    assert abs(rate - p) <= 1 / 256
    assert out[out != 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
    assert torch.equal(layer.eval()(x), x)


def test_elements_are_dropped_independently() -> None:
    torch.manual_seed(1)
    kept = (ByteDropout(0.3)(torch.ones(4000, 64)) != 0).double()
    correlations = torch.corrcoef(kept.t()).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 0.08  # 2,016 pairs of 4,000: 5 standard errors
    assert float((kept.mean(0) - kept.mean()).abs().max()) < 0.04


def test_gradient_goes_where_the_value_went() -> None:
    x = torch.randn(37, requires_grad=True)
    out = ByteDropout(0.5)(x)
    out.sum().backward()
    assert torch.equal(x.grad != 0, out != 0) and x.grad.unique().numel() == 2


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (7,), (8,), (9, 1)])
def test_any_size(shape: tuple[int, ...]) -> None:
    assert ByteDropout(0.5)(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_impossible_rates(p: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        ByteDropout(p)
