"""Tensors of more than 2^31 elements, for real: what stands at their far end is read and written there. Where a test
needs more memory than is free, it says so."""

from __future__ import annotations

from typing import Any

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE, HEAD_BACKEND, each_backend, leaf, needs_memory, normal, pick
from test_head_operators import score
from torch import Tensor

from rlhf_engine import ops

pytestmark = gpu_tier.marks(120)
FAR, TOKENS = pick(2**31, 2**16), 700
BLOCK = (
    2048  # what a block of a kernel takes of positions, or a multiple of it: alone, the last ones meet the same sums
)
ROWS, LENGTH = pick((32_769, 65_537), (9, 513))  # more than 2^31 positions, too
V = pick(151_936, 2500)


def far_apart() -> tuple[Tensor, Tensor, slice]:
    """Numbers and a mask of one dimension, all of it masked but for some tokens behind position 2^31. The rest of the
    numbers is whatever the memory holds."""
    mask = torch.zeros(FAR + BLOCK, dtype=torch.bool, device=DEVICE)
    x = torch.empty(FAR + BLOCK, device=DEVICE)
    mask[FAR : FAR + TOKENS], x[FAR : FAR + TOKENS] = True, normal(TOKENS)
    return x, mask, slice(FAR, FAR + BLOCK)


@each_backend
def test_losses(backend: str) -> None:
    needs_memory(40)
    x, mask, end = far_apart()
    for loss, metric in ((ops.ppo_loss, "policy_tokens"), (ops.value_loss, "value_tokens")):
        results = []
        for part in (slice(None), end):
            new = torch.zeros_like(x[part], requires_grad=True)
            value, metrics = loss(new, x[part], x[part], mask[part], backend=backend)
            (gradient,) = torch.autograd.grad(value, new)
            results.append((value, metrics[metric], gradient[-BLOCK:].clone(), gradient[:BLOCK].any()))
            del new, gradient
        (far, count, gradient, elsewhere), (near, _, expected, _) = results
        torch.testing.assert_close(far, near, rtol=1e-6, atol=0)
        assert count == TOKENS and torch.equal(gradient, expected) and not elsewhere


@each_backend
def test_whiten(backend: str) -> None:
    needs_memory(25)
    x, mask, end = far_apart()
    far = ops.whiten(x, mask, backend=backend)
    near = ops.whiten(x[end], mask[end], backend=backend)
    torch.testing.assert_close(far[end], near, rtol=1e-6, atol=1e-6)
    assert not far[:FAR].any() and far[end].any()


@each_backend
def test_kl_estimate(backend: str) -> None:
    needs_memory(32)
    x, _, end = far_apart()
    x[:BLOCK] = x[end]
    far = ops.kl_estimate(x, x.new_zeros(()).expand_as(x), kind="k2", backend=backend)
    assert torch.equal(far[end][:TOKENS], x[end][:TOKENS].square() / 2) and torch.equal(far[:TOKENS], far[end][:TOKENS])


def rows_of_sequences() -> tuple[Tensor, Tensor]:
    """Only the first and the last of them have tokens."""
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool, device=DEVICE)
    x = torch.empty(ROWS, LENGTH, device=DEVICE)
    for row in (0, -1):
        x[row], mask[row] = normal(LENGTH), normal(LENGTH, seed=1) > -1
    return x, mask


@each_backend
def test_gae(backend: str) -> None:
    needs_memory(35)
    x, mask = rows_of_sequences()
    alone = ops.gae(x[-1:], x[-1:], mask[-1:], backend=backend)
    for found, expected in zip(ops.gae(x, x, mask, backend=backend), alone, strict=True):
        assert torch.equal(found[-1], expected[0]) and torch.equal(found[0], expected[0]) and not found[1:-1].any()


@each_backend
def test_kl_gae(backend: str) -> None:
    needs_memory(55)
    x, mask = rows_of_sequences()
    scores = torch.ones(ROWS, device=DEVICE)
    shaped = ops.kl_gae(scores, x, x, x, mask, kl_coef=0.1, backend=backend)
    two = torch.stack([x[0], x[-1]])
    alone = ops.kl_gae(scores[:2], two, two, two, mask[[0, -1]], kl_coef=0.1, backend=backend)
    for found, expected in zip(shaped.tensors(), alone.tensors(), strict=True):
        torch.testing.assert_close(found[[0, -1]].float(), expected.float(), rtol=1e-5, atol=1e-5)
        assert not found[1:-1].any()


@gpu_tier.needs("token_logprobs", HEAD_BACKEND)
@pytest.mark.parametrize("options", [{}, {"inplace_backward": True}])
def test_logits(options: dict[str, Any]) -> None:
    rows = 2**31 // V + 9 if gpu_tier.ON_GPU else 300
    needs_memory(30)
    logits = normal(rows, V, dtype=torch.bfloat16)
    targets = torch.arange(rows, device=DEVICE) * 7 % V
    ends = torch.cat([torch.arange(5), torch.arange(rows - 5, rows)]).to(DEVICE)
    few, upstream = logits[ends].clone(), torch.linspace(-1, 2, 10, device=DEVICE)
    made = leaf(logits[:1])[0, 0] * 0 + logits if options else logits.requires_grad_()
    del logits
    made.retain_grad()
    found = ops.token_logprobs(made, targets, backend=HEAD_BACKEND, **options)
    (found[0][ends] * upstream + found[1][ends] * upstream.flip(0)).sum().backward()
    for a, b in zip(
        (found[0][ends], found[1][ends], made.grad[ends]), score(few, targets[ends], HEAD_BACKEND), strict=True
    ):
        assert torch.equal(a, b)
    assert not made.grad[5:-5].any() and (found[0] <= 0).all() and found[1].isfinite().all()


@gpu_tier.needs("linear_logprobs", HEAD_BACKEND)
def test_linear() -> None:
    """Logits that never all exist; rows at both ends as if they were alone, and gradients as those few rows give."""
    rows = 2**31 // V + 9 if gpu_tier.ON_GPU else 300
    hidden, weight = normal(rows, 64).bfloat16(), normal(V, 64, seed=1).bfloat16()
    targets = torch.arange(rows, device=DEVICE) * 7 % V
    ends = torch.cat([torch.arange(5), torch.arange(rows - 5, rows)]).to(DEVICE)
    upstream = torch.zeros(rows, device=DEVICE).index_copy_(0, ends, torch.linspace(-1, 2, 10, device=DEVICE))
    results = []
    for index in (torch.arange(rows, device=DEVICE), ends):
        one, other = leaf(hidden[index]), leaf(weight)
        logprobs, entropy = ops.linear_logprobs(one, other, targets[index])
        (logprobs * upstream[index] + entropy * upstream[index]).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), one.grad, other.grad))
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(a[ends], b)
    torch.testing.assert_close(results[0][3], results[1][3])
    old = results[0][0]
    formula = ops.ppo_token_loss(old, normal(rows))
    _, metrics = ops.linear_policy_loss(leaf(hidden), leaf(weight), targets, formula)
    assert metrics["log_ratio_max_abs"] == 0 and metrics["policy_tokens"] == rows
