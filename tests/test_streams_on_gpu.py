"""Ops go to the caller's stream and to the device of their tensors: they read what was asked for in front of them,
however late it comes, and nobody has to wait for the device in between."""

from __future__ import annotations

from collections.abc import Callable

import gpu_tier
import pytest
import torch
from gpu_tier import (
    DEVICE,
    HEAD_BACKEND,
    LOSS_BACKENDS,
    Results,
    delay,
    leaf,
    main_stream,
    normal,
    same_bits,
    side_stream,
)
from test_compiled import every_op_of, parts
from test_head_operators import score
from torch import Tensor

from rlhf_engine import ops

pytestmark = gpu_tier.marks()
ROWS, H, V = 200, 64, 9000
Step = Callable[[list[Tensor]], Results]


def losses(backend: str) -> Step:
    def step(x: list[Tensor]) -> Results:
        return every_op_of([part.view(5, -1) for part in x[0].chunk(7)], x[1][:5], x[2].view(5, -1) > -1, backend)

    return step


def from_logits(x: list[Tensor]) -> Results:
    return [*parts(tuple(score(x[0].view(ROWS, -1), targets(x[1], 7 * H), HEAD_BACKEND)))]


def scored(x: list[Tensor]) -> Results:
    hidden, weight = leaf(x[2].view(ROWS, H)), leaf(x[3])
    found = ops.linear_logprobs(hidden, weight, targets(x[1], V))
    return [*parts(found), *parts(torch.autograd.grad((found[0] - found[1]).sum(), (hidden, weight)))]


def trained(x: list[Tensor]) -> Results:
    hidden, weight = leaf(x[2].view(ROWS, H)), leaf(x[3])
    formula = ops.ppo_token_loss(x[1] - 9, x[1])
    loss, metrics = ops.linear_policy_loss(hidden, weight, targets(x[1], V), formula, mask=x[1] > -1)
    return [*parts(metrics), *parts(torch.autograd.grad(loss, (hidden, weight)))]


def targets(x: Tensor, vocabulary: int) -> Tensor:
    return (x.abs() * 1000).long() % vocabulary


HEAD = gpu_tier.needs("linear_logprobs", HEAD_BACKEND)
STEPS = [
    *(pytest.param(losses(name), marks=gpu_tier.needs("gae", name), id=name) for name in LOSS_BACKENDS),
    *(pytest.param(step, marks=HEAD, id=step.__name__) for step in (from_logits, scored, trained)),
]


def numbers() -> list[Tensor]:
    return [normal(7 * ROWS * H), normal(ROWS, seed=1), normal(ROWS * H, seed=2), normal(V, H, seed=3)]


@pytest.mark.parametrize("step", STEPS)
def test_what_comes_late_is_read(step: Step) -> None:
    source = numbers()
    want = step(source)  # compiles, too
    with side_stream():
        inputs = [torch.full_like(x, torch.nan) for x in source]
        delay()
        for x, y in zip(inputs, source, strict=True):
            x.copy_(y)
        got = step(inputs)
    same_bits(got, want)


@pytest.mark.parametrize("step", STEPS)
def test_two_streams_at_once(step: Step) -> None:
    """What ops need in between belongs to their own stream: the same memory in another's hands would change bits."""
    source, other = numbers(), [x + 1 for x in numbers()]
    want, wanted_there = step(source), step(other)
    with side_stream():
        delay()
        got = step(source)
        with main_stream():
            there = [step(other) for _ in range(3)]
    same_bits(got, want)
    for found in there:
        same_bits(found, wanted_there)


@pytest.mark.parametrize("backend", [pytest.param(x, marks=gpu_tier.needs("gae", x)) for x in LOSS_BACKENDS])
def test_backward_from_another_stream_than_the_forward(backend: str) -> None:
    """With an upstream gradient that comes late."""
    x, old, advantages = normal(3, 4096)
    mask, factor = advantages > -1, normal((), seed=1)
    hidden, weight, ids = normal(ROWS, H, seed=2), normal(V, H, seed=3), targets(normal(ROWS, seed=4), V)
    formula = ops.ppo_token_loss(old[:ROWS] - 9, advantages[:ROWS])

    def forward() -> tuple[list[Tensor], list[Tensor]]:
        leaves = [leaf(tensor) for tensor in (x, hidden, weight)]
        policy, _ = ops.ppo_loss(leaves[0], old, advantages, mask, backend=backend)
        fused, _ = ops.linear_policy_loss(*leaves[1:], ids, formula)
        logprobs, _ = ops.linear_logprobs(*leaves[1:], ids)
        return leaves, [policy, fused, logprobs.sum()]

    def gradients(leaves: list[Tensor], made: list[Tensor], upstream: Tensor) -> Results:
        torch.autograd.backward(made, [upstream] * 3)
        return [(str(i), tensor.grad) for i, tensor in enumerate(leaves)]

    want = gradients(*forward(), factor)
    with side_stream():
        delay()
        pending = forward()
    with side_stream():
        late = torch.full_like(factor, torch.nan)
        delay()
        late.copy_(factor)
        got = gradients(*pending, late)
    same_bits(got, want)


@gpu_tier.not_rehearsed("a CPU is one device")
@pytest.mark.skipif(gpu_tier.ON_GPU and torch.cuda.device_count() < 2, reason="there is one CUDA device, not two")
@pytest.mark.parametrize("step", STEPS)
def test_tensors_of_another_device_than_the_current_one(step: Step) -> None:
    source = numbers()
    want = step(source)
    got = step([x.to("cuda:1") for x in source])
    assert torch.cuda.current_device() == 0 and DEVICE == "cuda"
    assert all(x.device.index == 1 for _, x in got)
    same_bits([(name, x.to("cuda:0")) for name, x in got], want)
