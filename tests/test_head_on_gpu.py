"""The head ops on a GPU: as exact as the reference there, with a row's bits its own, and without a wait for the device.
`pytest -m gpu` where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops
from rlhf_engine.ops.tiles import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif("triton" not in ops.available("linear_logprobs"), reason="triton is not installed"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS, H, V = 2 * SHAPES["cuda"].rows + 77, 256, SHAPES["cuda"].tokens + 50_257


def case(dtype: torch.dtype, rows: int = ROWS) -> dict[str, Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    made = {
        "hidden": torch.randn(rows, H, generator=g, device="cuda").to(dtype),
        "weight": (torch.randn(V, H, generator=g, device="cuda") * 3 / H**0.5).to(dtype),
    }
    return made | {"targets": torch.randint(V, (rows,), generator=g, device="cuda")}


def logprobs(tensors: dict[str, Tensor], backend: str | None = None, **options: Any) -> dict[str, Tensor]:
    hidden, weight = (tensors[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    found = ops.linear_logprobs(hidden, weight, tensors["targets"], backend=backend, **options)
    upstream = torch.linspace(-1, 2, found[0].numel(), device="cuda").to(found[0].dtype)
    (found[0] * upstream + found[1] * upstream.flip(0)).sum().backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad}
    return {"logprobs": found[0].detach(), "entropy": found[1].detach(), **grads}  # type: ignore[dict-item]


def policy_loss(tensors: dict[str, Tensor], backend: str | None = None, **options: Any) -> dict[str, Tensor]:
    hidden, weight = (tensors[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    rows = len(tensors["targets"])
    old, advantages = torch.full((rows,), -14.0, device="cuda"), torch.linspace(-1, 1, rows, device="cuda")
    token_loss = ops.ppo_token_loss(old, advantages, entropy_coef=0.1)
    loss, metrics = ops.linear_policy_loss(hidden, weight, tensors["targets"], token_loss, backend=backend, **options)
    loss.backward()
    return {"loss": loss.detach(), **metrics, "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [logprobs, policy_loss])
def test_no_worse_than_the_reference(function: Any, dtype: torch.dtype, logits_dtype: str) -> None:
    tensors = case(dtype)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    truth = function(exact, backend="reference")
    theirs, ours = (function(tensors, backend, logits_dtype=logits_dtype) for backend in ("reference", "triton"))
    for name in ours:
        errors = [float((x[name].double() - truth[name]).square().mean().sqrt()) for x in (ours, theirs)]
        # Gradients of narrow inputs are products of rounded factors.
        slack = float(truth[name].double().abs().amax()) * (1e-5 if dtype is torch.float32 else 3e-3)
        assert errors[0] <= 1.5 * errors[1] + (slack if name not in ("logprobs", "entropy") else 1e-6), (name, errors)
    if function is logprobs and logits_dtype == "float32":
        assert float((ours["logprobs"].double() - truth["logprobs"]).abs().amax()) <= 1e-4


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_at_every_position_and_fill(dtype: torch.dtype, logits_dtype: str) -> None:
    tensors = case(dtype)
    with torch.no_grad():
        everything = ops.linear_logprobs(**tensors, logits_dtype=logits_dtype)
        for count in (1, 2, 127, 128, 1000, 1024, 1025, ROWS):
            index = torch.randperm(ROWS, device="cuda")[:count]
            some = {"hidden": tensors["hidden"][index], "targets": tensors["targets"][index]}
            part = ops.linear_logprobs(**(tensors | some), logits_dtype=logits_dtype, memory_budget=1)
            for a, b in zip(part, everything, strict=True):
                assert torch.equal(a, b[index]), count
    trained = logprobs(tensors, logits_dtype=logits_dtype)
    assert torch.equal(trained["logprobs"], everything[0]) and torch.equal(trained["entropy"], everything[1])


@pytest.mark.parametrize("function", [logprobs, policy_loss])
def test_masks_on_either_device(function: Any) -> None:
    tensors = case(torch.bfloat16)
    mask = torch.rand(ROWS) < 0.25
    want = function(tensors, rows=mask.nonzero()[:, 0].cuda())
    wild = tensors | {"hidden": torch.where(mask.cuda()[:, None], tensors["hidden"], torch.nan)}
    for options in ({"mask": mask}, {"mask": mask.cuda()}, {"mask": mask.cuda(), "count": "sync"}):
        got = function(wild, **options)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-3, msg=f"{name} {list(options)}")


def test_no_wait_for_the_device() -> None:
    tensors = case(torch.bfloat16)
    mask = torch.rand(ROWS, device="cuda") < 0.5
    policy_loss(tensors, mask=mask)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy_loss(tensors, mask=mask)
        logprobs(tensors, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_upstream_on_the_device() -> None:
    tensors = case(torch.bfloat16)
    hidden, weight = (tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    want = policy_loss(tensors)["weight"]
    token_loss = ops.ppo_token_loss(
        torch.full((ROWS,), -14.0, device="cuda"), torch.linspace(-1, 1, ROWS, device="cuda"), entropy_coef=0.1
    )
    place = torch.zeros(V, H, device="cuda")
    loss, _ = ops.linear_policy_loss(hidden, weight, tensors["targets"], token_loss, grad_weight_out=place)
    (loss * 0.5).backward()
    assert weight.grad is None and place.isnan().all()
    loss, _ = ops.linear_policy_loss(hidden, weight, tensors["targets"], token_loss)
    (loss * 0.5).backward()
    torch.testing.assert_close(weight.grad, 0.5 * want)


@pytest.mark.parametrize("shape", [(3, 5), (70_000,), (2,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A view, more rows than a grid's second axis holds, and few long ones."""
    vocabulary = 262_145 if shape == (2,) else 1000
    logits = (torch.randn(*shape, vocabulary + 1, device="cuda") * 3).to(dtype)[..., 1:]
    targets, mask = torch.randint(vocabulary, shape, device="cuda"), torch.rand(shape, device="cuda") < 0.8
    results = []
    for backend, x in (("triton", logits), ("reference", logits.double())):
        leaf = x.detach().requires_grad_()
        values = ops.token_logprobs(leaf, targets, mask=mask, temperature=0.7, backend=backend)
        (values[0] + 0.1 * values[1]).sum().backward()
        results.append((*values, leaf.grad))
    for name, a, b in zip(("logprobs", "entropy", "gradient"), *results, strict=True):
        bound = 2e-6 if name != "gradient" or dtype is torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=max(bound, 2e-6), atol=bound, msg=name)
