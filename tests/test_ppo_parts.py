"""KL control, learning-rate schedule, optimiser and reward shaping, by hand-worked numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_engine import ppo
from rlhf_engine.config import PPOConfig


def test_fixed_kl_coefficient_stays() -> None:
    controller = ppo.KLController.from_config(PPOConfig(kl_coef=0.1))
    controller.update(100.0, 64)
    assert controller.coef == 0.1


@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # a tenth above the target
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),
        (6.0, 0.1),
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # the error is clipped at a fifth
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
        (-3.0, 0.1 * (1 - 0.2 * 64 / 1000)),  # a sampled KL may be negative
    ],
)
def test_adaptive_kl_coefficient(kl: float, want: float) -> None:
    config = PPOConfig(kl_coef=0.1, kl_controller="adaptive", kl_target=6.0, kl_horizon=1000.0)
    controller = ppo.KLController.from_config(config)
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(want, rel=1e-12)
    assert controller.state() == {"coef": controller.coef, "adaptive": True, "target": 6.0, "horizon": 1000.0}
    assert ppo.KLController(**controller.state()) == controller  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
    ],
)
def test_learning_rate_over_six_steps_after_two_of_warm_up(schedule: Any, want: list[float]) -> None:
    config = PPOConfig(steps=6, lr_schedule=schedule, lr_warmup_steps=2)
    assert [ppo.lr_factor(step, config) for step in range(7)] == pytest.approx(want, abs=1e-12)
    assert ppo.lr_factor(99, config) == pytest.approx(want[-1], abs=1e-12)


def test_learning_rate_of_a_warm_up_longer_than_the_run() -> None:
    config = PPOConfig(steps=2, lr_schedule="linear", lr_warmup_steps=9)
    factors = [ppo.lr_factor(step, config) for step in range(12)]
    assert factors[:9] == pytest.approx([k / 10 for k in range(1, 10)]) and all(0 <= f <= 1 for f in factors)
    assert ppo.lr_factor(0, PPOConfig(lr_warmup_steps=0)) == 1.0


def optimiser(*values: Tensor, **options: Any) -> tuple[ppo.MasterAdamW, list[nn.Parameter]]:
    parameters = [nn.Parameter(v) for v in values]
    return ppo.MasterAdamW(parameters, 1e-2, replace(PPOConfig(), **options)), parameters


def test_float32_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(4, 3), torch.randn(5, 4, 3)
    ours, (parameter,) = optimiser(start.clone(), weight_decay=0.1, adam_beta2=0.9)
    theirs = nn.Parameter(start.clone())
    adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1)
    for i, grad in enumerate(grads):
        parameter.grad, theirs.grad = grad.clone(), grad.clone()
        norm, taken = ours.step(factor=1 - i / 5, max_grad_norm=0.5)
        assert taken and norm == pytest.approx(float(grad.norm()), rel=1e-5)
        nn.utils.clip_grad_norm_([theirs], 0.5)
        adam.param_groups[0]["lr"] = 1e-2 * (1 - i / 5)
        adam.step()
        torch.testing.assert_close(parameter, theirs, rtol=1e-6, atol=1e-7)
        assert parameter.grad is None


def test_bfloat16_weights_add_up_updates_that_each_round_away() -> None:
    ours, (parameter,) = optimiser(torch.ones(3, dtype=torch.bfloat16))
    for step in range(1, 101):
        parameter.grad = torch.ones(3, dtype=torch.bfloat16)
        ours.step(factor=0.01, max_grad_norm=0.0)  # 1e-4 a step; bfloat16 resolves 4e-3 below 1
        assert parameter.dtype == torch.bfloat16 and (step > 10 or torch.equal(parameter, torch.ones_like(parameter)))
    torch.testing.assert_close(parameter.float(), torch.full((3,), 0.99), atol=2e-3, rtol=0)
    torch.testing.assert_close(ours.masters[0], torch.full((3,), 0.99), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(dtype: torch.dtype, bad: float) -> None:
    ours, parameters = optimiser(torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype))
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[1].grad[0] = bad
    norm, taken = ours.step(factor=1.0, max_grad_norm=1.0)
    assert not taken and not math.isfinite(norm)
    assert all(torch.equal(p, torch.ones_like(p)) and p.grad is None for p in parameters)
    for p in parameters:  # and the next one goes on as if nothing had been
        p.grad = torch.ones_like(p)
    assert ours.step(factor=1.0, max_grad_norm=0.0) == (pytest.approx(2.0), True)
    assert all(torch.allclose(p.float(), torch.tensor(0.99), atol=2e-3) for p in parameters)


def test_nothing_to_train_is_no_error() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    ours = ppo.MasterAdamW([frozen], 1e-2, PPOConfig())
    assert ours.step(factor=1.0, max_grad_norm=1.0) == (0.0, True) and ours.parameters == []


def shape(config: PPOConfig, scores: list[float], finished: list[bool]) -> Any:
    zeros = torch.zeros(2, 3)
    return ppo.shape_advantages(
        config, scores=torch.tensor(scores), finished=torch.tensor(finished), logprobs=zeros + 0.5, ref_logprobs=zeros,
        values=zeros, mask=torch.tensor([[True, True, True], [True, False, False]]), kl_coef=0.1,
    )  # fmt: skip


def test_rewards_are_kl_per_token_and_the_score_at_the_last() -> None:
    shaped = shape(PPOConfig(), [2.0, -3.0], [True, True])
    torch.testing.assert_close(shaped.rewards, torch.tensor([[-0.05, -0.05, 1.95], [-3.05, 0.0, 0.0]]))
    torch.testing.assert_close(shaped.kl, torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.0, 0.0]]))


def test_only_unfinished_responses_pay_the_penalty_and_the_clip_comes_after_it() -> None:
    shaped = shape(PPOConfig(missing_eos_penalty=1.0), [2.0, 2.0], [True, False])
    torch.testing.assert_close(shaped.rewards.sum(1), torch.tensor([1.85, 0.95]))
    shaped = shape(PPOConfig(missing_eos_penalty=1.0, score_clip=1.5), [2.0, 2.0], [True, False])
    torch.testing.assert_close(shaped.rewards.sum(1), torch.tensor([1.35, 0.95]))
    shaped = shape(PPOConfig(score_clip=0.0), [20.0, -20.0], [True, True])  # 0 is off
    torch.testing.assert_close(shaped.rewards.sum(1), torch.tensor([19.85, -20.05]))


def test_advantages_follow_lambda_and_whitening() -> None:
    shaped = shape(PPOConfig(whiten_advantages=False, lam=0.5), [2.0, -3.0], [True, True])
    want = torch.tensor([[-0.05 + 0.5 * (-0.05 + 0.5 * 1.95), -0.05 + 0.5 * 1.95, 1.95], [-3.05, 0.0, 0.0]])
    torch.testing.assert_close(shaped.advantages, want)
    torch.testing.assert_close(shaped.returns, want)
    white = shape(PPOConfig(lam=0.5), [2.0, -3.0], [True, True])
    kept = white.advantages[torch.tensor([[True, True, True], [True, False, False]])]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.std(correction=0)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(white.returns, want)


def test_constant_aggregation_divides_by_the_longest_response_allowed() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weights = ppo.weights(PPOConfig(aggregation="constant", max_new_tokens=20), mask)
    torch.testing.assert_close(weights, mask / 20.0)


def test_token_loss_by_hand() -> None:
    # ratios 1.5 and 0.5, advantages 1 and -1: clipped at 1.2, and at 0.8
    old, rows = torch.zeros(1, 2), torch.arange(2)
    new = torch.tensor([math.log(1.5), math.log(0.5)], requires_grad=True)
    function = ppo.token_loss(PPOConfig(), old_logprobs=old, ref_logprobs=old, advantages=torch.tensor([[1.0, -1.0]]))
    loss, metrics = function(new, torch.ones(2), rows)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.8]))
    assert not new.grad.any() and metrics
    config = PPOConfig(entropy_coef=0.5, kl_loss_coef=2.0, kl_loss_kind="k2")
    function = ppo.token_loss(config, old_logprobs=old, ref_logprobs=old + 1, advantages=torch.zeros(1, 2))
    torch.testing.assert_close(function(torch.zeros(2), torch.tensor([1.0, 3.0]), rows)[0], torch.tensor([0.5, -0.5]))
