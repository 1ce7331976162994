"""The head ops on a GPU: as exact as the reference there, with a row's bits its own, and without a wait for the device.
`pytest -m gpu` where there is one."""

from __future__ import annotations

import contextlib
from typing import Any

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE, HEAD_BACKEND, leaf, normal, pick
from torch import Tensor

from rlhf_engine import ops
from rlhf_engine.ops.tiles import SHAPES

pytestmark = [*gpu_tier.marks(), gpu_tier.needs("linear_logprobs", HEAD_BACKEND)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = SHAPES[DEVICE]
# More than two products of rows, and two segments of which the last is odd.
ROWS, H, V = 2 * SHAPE.rows + 77, pick(256, 24), SHAPE.tokens + pick(17_489, 907)
COUNTS = (1, 2, 127, 128, 1000, 1024, 1025, ROWS) if gpu_tier.ON_GPU else (1, 2, 9, 64, 65, ROWS)


def case(dtype: torch.dtype, rows: int = ROWS) -> dict[str, Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    return {
        "hidden": normal(rows, H).to(dtype), "weight": (normal(V, H, seed=1) * 3 / H**0.5).to(dtype),
        "targets": torch.randint(V, (rows,), generator=g, device=DEVICE),
    }  # fmt: skip


def logprobs(tensors: dict[str, Tensor], backend: str | None = None, **options: Any) -> dict[str, Tensor]:
    hidden, weight = leaf(tensors["hidden"]), leaf(tensors["weight"])
    found = ops.linear_logprobs(hidden, weight, tensors["targets"], backend=backend, **options)
    upstream = torch.linspace(-1, 2, found[0].numel(), device=DEVICE).to(found[0].dtype)
    (found[0] * upstream + found[1] * upstream.flip(0)).sum().backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad}
    return {"logprobs": found[0].detach(), "entropy": found[1].detach(), **grads}  # type: ignore[dict-item]


def token_loss(rows: int) -> ops.TokenLoss:
    """About half of the ratios are clipped."""
    old, advantages = torch.full((rows,), -14.0, device=DEVICE), torch.linspace(-1, 1, rows, device=DEVICE)
    return ops.ppo_token_loss(old, advantages, entropy_coef=0.1)


def policy_loss(tensors: dict[str, Tensor], backend: str | None = None, **options: Any) -> dict[str, Tensor]:
    hidden, weight = leaf(tensors["hidden"]), leaf(tensors["weight"])
    targets = tensors["targets"]
    loss, metrics = ops.linear_policy_loss(
        hidden, weight, targets, token_loss(len(targets)), backend=backend, **options
    )
    loss.backward()
    return {"loss": loss.detach(), **metrics, "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [logprobs, policy_loss])
def test_no_worse_than_the_reference(function: Any, dtype: torch.dtype, logits_dtype: str) -> None:
    tensors = case(dtype)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    truth = function(exact, backend="reference")
    theirs, ours = (function(tensors, backend, logits_dtype=logits_dtype) for backend in ("reference", HEAD_BACKEND))
    for name in ours:
        errors = [float((x[name].double() - truth[name]).square().mean().sqrt()) for x in (ours, theirs)]
        # Gradients of narrow inputs are products of rounded factors, and a ratio next to its bound may fall beyond it.
        slack = float(truth[name].double().abs().amax()) * (1e-5 if dtype is torch.float32 else 3e-3)
        slack += 2.0 * name.startswith("clip_fraction")
        # A tensor core cuts off what it adds up where float32 rounds: half an ulp of a logit at each of 16 steps.
        scored = 1e-6 if dtype is torch.float32 else 3e-6
        assert errors[0] <= 1.5 * errors[1] + (slack if name not in ("logprobs", "entropy") else scored), (name, errors)
    if function is logprobs and logits_dtype == "float32":
        assert float((ours["logprobs"].double() - truth["logprobs"]).abs().amax()) <= 1e-4


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_at_every_position_and_fill(dtype: torch.dtype, logits_dtype: str) -> None:
    tensors = case(dtype)
    with torch.no_grad():
        everything = ops.linear_logprobs(**tensors, logits_dtype=logits_dtype)
        for count in COUNTS:
            index = torch.randperm(ROWS, device=DEVICE)[:count]
            some = {"hidden": tensors["hidden"][index], "targets": tensors["targets"][index]}
            part = ops.linear_logprobs(**(tensors | some), logits_dtype=logits_dtype, memory_budget=1)
            for a, b in zip(part, everything, strict=True):
                assert torch.equal(a, b[index]), count
    trained = logprobs(tensors, logits_dtype=logits_dtype)
    assert torch.equal(trained["logprobs"], everything[0]) and torch.equal(trained["entropy"], everything[1])


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring_and_training_have_the_same_bits(dtype: torch.dtype, logits_dtype: str) -> None:
    """The ratio of a policy to itself is 1, so all of d is 0: however much of the logits lives at once."""
    tensors = case(dtype)
    with torch.no_grad():
        old, _ = ops.linear_logprobs(**tensors, logits_dtype=logits_dtype)
    formula = ops.ppo_token_loss(old, torch.linspace(-1, 1, ROWS, device=DEVICE))
    for options in ({}, {"memory_budget": 1}, {"mask": torch.arange(ROWS, device=DEVICE) % 3 > 0}):
        leaves = tensors | {"hidden": leaf(tensors["hidden"]), "weight": leaf(tensors["weight"])}
        _, metrics = ops.linear_policy_loss(token_loss=formula, logits_dtype=logits_dtype, **leaves, **options)
        assert metrics["log_ratio_max_abs"] == 0 and metrics["ratio_mean_sum"] == metrics["policy_tokens"], options


@pytest.mark.parametrize("function", [logprobs, policy_loss])
def test_masks_on_either_device(function: Any) -> None:
    tensors = case(torch.bfloat16)
    mask = torch.rand(ROWS) < 0.25
    there = mask.to(DEVICE)
    want = function(tensors, rows=there.nonzero()[:, 0])
    wild = tensors | {"hidden": torch.where(there[:, None], tensors["hidden"], torch.nan)}
    for options in ({"mask": mask}, {"mask": there}, {"mask": there, "count": "sync"}):
        got = function(wild, **options)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-3, msg=f"{name} {list(options)}")


def test_no_wait_for_the_device() -> None:
    tensors = case(torch.bfloat16)
    mask = torch.rand(ROWS, device=DEVICE) < 0.5
    each = torch.rand(ROWS, device=DEVICE) + 0.5

    def step() -> None:
        policy_loss(tensors, mask=mask, denom=mask.sum())
        logprobs(tensors, mask=mask, temperature=each)
        policy_loss(tensors, mask=mask, grad_weight_out=torch.zeros(V, H, device=DEVICE))
        with torch.no_grad():
            ops.linear_logprob_stats(**tensors, mask=mask)
        ops.token_logprobs(leaf(tensors["weight"][:ROWS]), tensors["targets"] % H, mask=mask)[0].sum().backward()

    step()  # compiles
    with gpu_tier.no_waiting():
        step()


def test_upstream_on_the_device() -> None:
    tensors = case(torch.bfloat16)
    hidden, weight = leaf(tensors["hidden"]), leaf(tensors["weight"])
    want = policy_loss(tensors)["weight"]
    place = torch.zeros(V, H, device=DEVICE)
    loss, _ = ops.linear_policy_loss(hidden, weight, tensors["targets"], token_loss(ROWS), grad_weight_out=place)
    torch.testing.assert_close(place.bfloat16(), want)
    with pick(contextlib.nullcontext(), pytest.raises(ValueError, match="backward came with 0.5")):
        (loss * 0.5).backward()
    assert weight.grad is None and pick(place.isnan().all(), True)
    loss, _ = ops.linear_policy_loss(hidden, weight, tensors["targets"], token_loss(ROWS))
    (loss * 0.5).backward()
    torch.testing.assert_close(weight.grad, 0.5 * want)


@pytest.mark.parametrize("shape", [(3, 5), (pick(70_000, 700),), (2,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A view, more rows than a grid's second axis holds, and few long ones."""
    vocabulary = pick(262_145, 9001) if shape == (2,) else 1000
    logits = (normal(*shape, vocabulary + 1) * 3).to(dtype)[..., 1:]
    targets, mask = torch.randint(vocabulary, shape, device=DEVICE), torch.rand(shape, device=DEVICE) < 0.8
    results = []
    for backend, x in ((HEAD_BACKEND, logits), ("reference", logits.double())):
        x = x.detach().requires_grad_()
        values = ops.token_logprobs(x, targets, mask=mask, temperature=0.7, backend=backend)
        (values[0] + 0.1 * values[1]).sum().backward()
        results.append((*values, x.grad))
    for name, a, b in zip(("logprobs", "entropy", "gradient"), *results, strict=True):
        bound = 2e-6 if name != "gradient" or dtype is torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=max(bound, 2e-6), atol=bound, msg=name)
