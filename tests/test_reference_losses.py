"""Policy and value loss, weights and metrics: by hand, against the oracle, by their identities, and under poison."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_engine.ops import finalize_metrics, merge_metrics, token_denom, token_weights
from rlhf_engine.ops.aggregate import MODES
from rlhf_engine.reference import ppo_loss, value_loss

GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e38]


def randn(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_policy_loss_by_hand() -> None:
    # r = 1.5, A = 1:  max(-1.5, -1.2) = -1.2 (clipped)     r = 1, A = 1:  -1
    # r = 0.5, A = -1: max(0.5, 0.8) = 0.8 (clipped)        r = 5, A = -1: max(5, 1.2) = 5, dual clip 3 -> 3
    ratio = torch.tensor([1.5, 1.0, 0.5, 5.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss, metrics = ppo_loss(logprobs, torch.zeros_like(ratio), advantages, ones(4), dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 - 1 + 0.8 + 3) / 4)
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0, -0.25, 0, 0]  # active clips have no gradient
    final = finalize_metrics(metrics)
    assert final == {
        "policy_tokens": 4,
        "clip_fraction": 0.5,
        "clip_fraction_low": 0.25,
        "approx_kl_k1": pytest.approx(-(math.log(1.5) + math.log(0.5) + math.log(5)) / 4),
        "approx_kl_k3": pytest.approx((0.5 + 0 - 0.5 + 4 - math.log(1.5) - math.log(0.5) - math.log(5)) / 4),
        "ratio_mean": pytest.approx(2.0),
        "log_ratio_max_abs": pytest.approx(math.log(5)),
    }


def test_value_loss_by_hand() -> None:
    # v = 2, old = 1, R = 3:     free 1, clipped (1.2 - 3)^2 = 3.24 wins and has no gradient
    # v = 0.5, old = 0.4, R = 0: inside the clip, 0.25; gradient 0.5 / 2
    values = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([[1.0, 0.4], [3.0, 0.0]], dtype=torch.float64)
    loss, metrics = value_loss(values, old, returns, ones(2), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.25) / 2)
    assert values.grad is not None and values.grad.tolist() == [0, 0.25]
    # R - v = [1, -0.5]: variance 0.75^2;  R = [3, 0]: variance 1.5^2
    assert finalize_metrics(metrics) == {
        "value_tokens": 2,
        "value_mean": 1.25,
        "value_clip_fraction": 0.5,
        "return_mean": 1.5,
        "explained_variance": pytest.approx(1 - 0.5625 / 2.25),
    }
    mirrored, _ = value_loss(-values, -old, -returns, ones(2), clip=0.2)
    assert mirrored.item() == loss.item() and torch.autograd.grad(mirrored, values)[0].tolist() == [0, 0.25]
    for off in (None, 0.0):
        assert value_loss(values, old, returns, ones(2), clip=off)[0].item() == pytest.approx(0.5 * 1.25 / 2)


def test_inside_the_bound_rounding_clips_nothing() -> None:
    values, old, returns = randn(3, 1000, dtype=torch.float32)
    values.requires_grad_()
    loss, metrics = value_loss(values, 30 * old, returns, ones(1000), clip=1000.0, denom=1.0)
    assert metrics["value_clip_fraction_sum"] == 0
    assert torch.equal(torch.autograd.grad(loss, values)[0], values - returns)


def test_weights_and_denominator_by_hand() -> None:
    # r = 1 and A = -2, -4: token losses 2 and 4;  v - R = 2, 4: token losses 2 and 8; the third token is masked
    x, mask, weights = torch.tensor([2.0, 4.0, 9.0]), torch.tensor([1, 1, 0]).bool(), torch.tensor([0.5, 3.0, 9.0])
    zeros = torch.zeros(3)
    for denom, divisor in ((0.5, 0.5), (4.0, 4), (torch.tensor(4.0), 4), (0.0, 1), (torch.tensor(0.0), 1)):
        policy, a = ppo_loss(zeros, zeros, -x, mask, weights=weights, denom=denom)
        value, b = value_loss(x, x, zeros, mask, weights=weights, denom=denom)
        assert policy.item() == (0.5 * 2 + 3 * 4) / divisor and value.item() == (0.5 * 2 + 3 * 8) / divisor
        assert {metric.dtype for metric in (*a.values(), *b.values())} == {torch.float64}
    assert ppo_loss(zeros, zeros, -x, mask)[0].item() == 3 and value_loss(x, x, zeros, mask)[0].item() == 5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(0, 7),
    dual_clip=st.sampled_from([None, 1.5]),
    spread=st.sampled_from([0.3, 30.0]),
    value_clip=st.sampled_from([None, 0.2]),
)
def test_losses_match_oracle(
    seed: int, tokens: int, dual_clip: float | None, spread: float, value_clip: float | None
) -> None:
    logprobs, old, advantages, is_weights = randn(4, tokens, seed=seed)
    mask = logprobs > -0.5
    logprobs = old + spread * logprobs
    count = max(int(mask.sum()), 1)
    active = list(zip(*(x[mask].tolist() for x in (logprobs, old, advantages, is_weights)), strict=True))
    loss, _ = ppo_loss(
        logprobs, old, advantages, mask, clip_low=0.1, clip_high=0.3, dual_clip=dual_clip, is_weights=is_weights
    )
    expected = math.fsum(oracle.ppo_token_loss(x, o, a, 0.1, 0.3, dual_clip, w) for x, o, a, w in active) / count
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    loss, _ = value_loss(logprobs, old, advantages, mask, clip=value_clip)
    expected = math.fsum(oracle.value_token_loss(x, o, a, value_clip) for x, o, a, _ in active) / count
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_entropy_bonus_and_kl_loss() -> None:
    logprobs, old, advantages, entropy, ref = randn(5, 6)
    base, _ = ppo_loss(logprobs, old, advantages, ones(6))
    terms: dict[str, Any] = {"entropy": entropy, "entropy_coef": 0.3, "ref_logprobs": ref, "kl_coef": 0.2}
    loss, metrics = ppo_loss(logprobs, old, advantages, ones(6), kl_kind="k2", **terms)
    expected = base - 0.3 * entropy.mean() + 0.2 * ((logprobs - ref).square() / 2).mean()
    torch.testing.assert_close(loss, expected)
    assert finalize_metrics(metrics)["entropy"] == pytest.approx(entropy.mean().item())


def test_gradients_in_float64() -> None:
    logprobs, old, advantages, entropy, ref = randn(5, 7, seed=3)
    mask = torch.arange(7) != 2
    leaves = [logprobs.requires_grad_(), entropy.requires_grad_()]

    def policy(logprobs: Tensor, entropy: Tensor) -> Tensor:
        terms: dict[str, Any] = {"entropy": entropy, "entropy_coef": 0.3, "ref_logprobs": ref, "kl_coef": 0.2}
        return ppo_loss(logprobs, old, advantages, mask, dual_clip=3.0, **terms)[0]

    assert torch.autograd.gradcheck(policy, leaves)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, advantages, mask)[0], logprobs)


def test_ratio_one_is_the_plain_policy_gradient() -> None:
    logprobs, advantages = randn(2, 9, dtype=torch.float32)
    logprobs.requires_grad_()
    loss, metrics = ppo_loss(logprobs, logprobs.detach().clone(), advantages, ones(9), denom=1.0)
    loss.backward()
    assert logprobs.grad is not None and torch.equal(logprobs.grad, -advantages)
    final = finalize_metrics(metrics)
    assert final["ratio_mean"] == 1 and final["approx_kl_k1"] == final["approx_kl_k3"] == final["clip_fraction"] == 0
    assert final["log_ratio_max_abs"] == 0


def test_log_ratio_clamp_stops_the_gradient() -> None:
    logprobs = torch.tensor([200.0, -200.0, 21.0], requires_grad=True)
    loss, metrics = ppo_loss(logprobs, torch.zeros(3), -torch.ones(3), ones(3), clip_high=math.inf)
    loss.backward()
    assert loss.isfinite() and logprobs.grad is not None and not logprobs.grad.any()
    assert finalize_metrics(metrics)["log_ratio_max_abs"] == 20


@pytest.mark.parametrize("garbage", [*GARBAGE, 200.0])
def test_masked_content_changes_no_bit(garbage: float) -> None:
    tensors = randn(6, 3, 5, dtype=torch.float32)
    mask = tensors[0] > -0.4

    def run(fill: float) -> list[Tensor]:
        logprobs, old, advantages, entropy, ref, weights = (torch.where(mask, x, fill) for x in tensors)
        leaves = [x.requires_grad_() for x in (logprobs, entropy, torch.where(mask, tensors[1], fill))]
        policy, policy_metrics = ppo_loss(
            logprobs, old, advantages, mask, entropy=entropy, entropy_coef=0.3, ref_logprobs=ref, kl_coef=0.2,
            is_weights=weights, weights=weights, denom=9.0, dual_clip=3.0,
        )  # fmt: skip
        value, value_metrics = value_loss(leaves[2], old, advantages, mask, weights=weights, denom=torch.tensor(9.0))
        gradients = torch.autograd.grad(policy + value, leaves)
        return [policy, value, *gradients, *policy_metrics.values(), *value_metrics.values()]

    clean, poisoned = run(0.5), run(garbage)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert not clean[2][~mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_any_split_gives_the_same_gradient_and_metrics(mode: str) -> None:
    logprobs, old, advantages, values = randn(4, 8, 6, seed=5, dtype=torch.float32)
    mask = advantages > -0.5
    weights = token_weights(mask, mode, constant_length=6)
    denom = token_denom(mask, mode)

    def run(cuts: list[int]) -> tuple[Tensor, dict[str, float]]:
        leaf = logprobs.clone().requires_grad_()
        parts = []
        for rows in torch.arange(8).tensor_split(cuts):
            m, w = mask[rows], weights[rows]
            policy, a = ppo_loss(leaf[rows], old[rows], advantages[rows], m, weights=w, denom=denom)
            value, b = value_loss(leaf[rows], old[rows], values[rows], m, weights=w, denom=denom)
            (policy + value).backward()
            parts += [a, b]
        assert leaf.grad is not None
        return leaf.grad, finalize_metrics(merge_metrics(parts))

    whole, whole_metrics = run([])
    for cuts in ([4], [1, 2, 7], [0, 3, 3, 5]):
        gradient, metrics = run(cuts)
        torch.testing.assert_close(gradient, whole, rtol=1e-6, atol=0)
        assert metrics == pytest.approx(whole_metrics, rel=1e-12)


def test_weights_by_hand() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]]).bool()
    # tokens 3; sequences with tokens 2
    expected: dict[str, tuple[list[list[float]], float]] = {
        "token-mean": ([[1, 0, 1], [1, 0, 0], [0, 0, 0]], 3),
        "seq-mean-token-mean": ([[0.5, 0, 0.5], [1, 0, 0], [0, 0, 0]], 2),
        "seq-mean-token-sum": ([[1, 0, 1], [1, 0, 0], [0, 0, 0]], 2),
        "token-sum": ([[1, 0, 1], [1, 0, 0], [0, 0, 0]], 1),
        "constant": ([[0.25, 0, 0.25], [0.25, 0, 0], [0, 0, 0]], 2),
    }
    cu_seqlens = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    for mode in MODES:
        weights, denom = expected[mode]
        packed: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        assert token_weights(mask, mode, constant_length=4).tolist() == weights
        assert token_weights(mask.flatten(), mode, constant_length=4, **packed).view(3, 3).tolist() == weights
        assert token_denom(mask, mode) == token_denom(mask.flatten(), mode, **packed) == denom


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 2)])
def test_no_tokens_contribute_zero(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    nan = torch.full(shape, math.nan)
    for denom in (None, 0.0, torch.tensor(0.0)):
        policy, a = ppo_loss(x, nan, nan, mask, denom=denom, entropy=x, entropy_coef=0.1)
        value, b = value_loss(x, nan, nan, mask, denom=denom)
        (policy + value).backward()
        assert policy == value == 0 and x.grad is not None and not x.grad.any()
        final = finalize_metrics(merge_metrics([a, b]))
        assert final["policy_tokens"] == final["value_tokens"] == 0
        assert all(number == 0 for number in final.values())


@pytest.mark.parametrize("value", [0.1, -0.1, 1e4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_equal_returns_explain_nothing_and_stay_finite(value: float, tokens: int) -> None:
    returns = torch.full((tokens,), value)
    _, metrics = value_loss(torch.zeros(tokens), torch.zeros(tokens), returns, ones(tokens))
    final = finalize_metrics(metrics)
    assert final["explained_variance"] == 0 and final["return_mean"] == pytest.approx(value)


def test_nan_in_an_active_token_stays_visible() -> None:
    logprobs = torch.tensor([0.1, math.nan])
    loss, _ = ppo_loss(logprobs, torch.zeros(2), torch.ones(2), ones(2))
    assert loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_reduce_in_float32(dtype: torch.dtype) -> None:
    values = torch.full((4096,), 0.1, dtype=dtype, requires_grad=True)
    loss, metrics = value_loss(values, values.detach(), torch.zeros_like(values), ones(4096), denom=1.0)
    loss.backward()
    assert loss.dtype == torch.float32 and values.grad is not None and values.grad.dtype == dtype
    assert loss.item() == pytest.approx(4096 * 0.5 * values[0].item() ** 2, rel=1e-5)
