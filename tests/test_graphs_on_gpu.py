"""Every op inside a CUDA graph: captured once, replayed on other numbers, with the bits of an ordinary call."""

from __future__ import annotations

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE, HEAD_BACKEND, Results, each_backend, leaf, normal, pick, replayed, same_bits
from test_compiled import every_op_of, parts, with_gradients
from test_head_operators import score

from rlhf_engine import ops

pytestmark = gpu_tier.marks()
# Sequences of a warp each, of a block each, and split over several blocks.
SHAPES = [(5, 300), (pick(260, 26), 700), (2, pick(9000, 900))]
ROWS, H, V = pick(1100, 70), 64, pick(40_000, 3000)


@pytest.mark.parametrize("shape", SHAPES)
@each_backend
def test_loss_ops(shape: tuple[int, int], backend: str) -> None:
    def batch(seed: int) -> list[torch.Tensor]:
        return [*normal(7, *shape, seed=seed), normal(shape[0], seed=seed + 1), normal(*shape, seed=seed + 2) > -0.5]

    def step() -> Results:
        *tensors, scores, mask = inputs
        return every_op_of(tensors, scores, mask, backend)

    inputs = batch(7)
    want = [(name, x.detach().clone()) for name, x in step()]
    inputs, others = batch(0), inputs
    same_bits(replayed(step, inputs, others), want)


@each_backend
def test_packed_and_by_the_sequence(backend: str) -> None:
    def batch(seed: int) -> list[torch.Tensor]:
        lengths = torch.tensor([0, 700, 1, 5, 9000] if seed else [9000, 1, 700, 5, 0])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)
        x = normal(4, 9706, seed=seed)
        return [*x, x[0] > -1, offsets, normal(5, seed=seed + 1).sigmoid(), normal((), seed=seed + 2).abs()]

    def step() -> Results:
        a, b, c, d, mask, offsets, each, denom = inputs
        shaped = ops.kl_gae(
            each, a, b, c, mask, kl_coef=0.1, lam=each, bootstrap=each, score_at="after", cu_seqlens=offsets,
            backend=backend,
        )  # fmt: skip
        policy = with_gradients(ops.ppo_loss, 1)(a, b, d, mask, denom=denom, backend=backend)
        return [*parts(shaped), *parts(policy)]

    inputs = batch(1)
    want = [(name, x.detach().clone()) for name, x in step()]
    inputs, others = batch(0), inputs
    same_bits(replayed(step, inputs, others), want)


@gpu_tier.needs("linear_logprobs", HEAD_BACKEND)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_ops(dtype: torch.dtype, masked: bool) -> None:
    def batch(seed: int) -> list[torch.Tensor]:
        floats = normal(ROWS, H, seed=seed).to(dtype), normal(V, H, seed=seed + 1).to(dtype)
        targets = (normal(ROWS, seed=seed + 2).abs() * 7000).long() % V
        return [*floats, targets, *normal(2, ROWS, seed=seed + 3), normal(ROWS, seed=seed + 4) > 0]

    def step() -> Results:
        hidden, weight, targets, old, advantages, kept = inputs
        options = {"mask": kept if masked else None}
        one, other = (leaf(x) for x in (hidden, weight))
        found = ops.linear_logprobs(one, other, targets, **options)
        gradients = torch.autograd.grad((found[0] - 0.1 * found[1]).sum(), (one, other))
        token_loss = ops.ppo_token_loss(old - 10, advantages)
        loss, metrics = ops.linear_policy_loss(one, other, targets, token_loss, **options)
        trained = torch.autograd.grad(loss, (one, other))
        from_logits = score(weight[:ROWS], targets % H, HEAD_BACKEND, **options)
        return [*parts(found), *parts(gradients), *parts(metrics), *parts(trained), *parts(tuple(from_logits))]

    inputs = batch(7)
    want = [(name, x.detach().clone()) for name, x in step()]
    inputs, others = batch(0), inputs
    same_bits(replayed(step, inputs, others), want)
