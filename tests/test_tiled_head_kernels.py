"""The tiled head over the Triton kernels, in the interpreter: what test_tiled_head.py and test_policy_loss_traps.py ask
of the C++ operators. Only the matrix products are a CPU's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import kernel_script
import pytest
import torch
from torch import Tensor

INPUTS = ("hidden", "weight", "bias")
V, ROWS = 8192 + 77, 11  # two segments, a product each; rows for three products in two blocks


def tensors(dtype: torch.dtype, rows: int = ROWS, banned: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (rows, 16), "weight": (V, 16), "bias": (V,)}
    made: dict[str, Any] = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}
    made["bias"][: 8200 if banned else 7] = -torch.inf  # a whole segment, and more
    return made | {"targets": torch.randint(8200 if banned else 7, V, (rows,), generator=g)}


def ops_of(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from rlhf_engine import reference
    from rlhf_engine.ops import heads  # noqa: F401  (defines the operators)
    from rlhf_engine.ops.tiled_head import TiledHead
    from rlhf_engine.ops.tiles import Shape

    if backend == "reference":
        return reference.linear_logprobs, reference.linear_policy_loss
    head = TiledHead("rlhf_triton", Shape(rows=4, tokens=8192, tallest=4, block=8, budget=10**9))
    return head.linear_logprobs, head.linear_policy_loss


def options(**changed: Any) -> dict[str, Any]:
    usual = {
        "temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None, "ignore_index": -100, "rows": None,
        "logits_dtype": "float32", "count": "device", "memory_budget": None,
    }  # fmt: skip
    return usual | changed


def exact(made: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in made.items()}


def leaves(made: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_(k in INPUTS and k not in frozen) for k, v in made.items()}


def logprobs(backend: str, made: dict[str, Any], frozen: tuple[str, ...] = (), **changed: Any) -> dict[str, Tensor]:
    inputs = leaves(made, frozen)
    found = ops_of(backend)[0](**inputs, extras=("top1", "sum_p_squared"), **options(**changed))
    upstream = torch.linspace(-1, 2, found[0].numel()).to(found[0].dtype)
    (found[0] * upstream + found[1] * upstream.flip(0)).sum().backward()
    grads = {k: v.grad for k, v in inputs.items() if v.grad is not None}
    return {"logprobs": found[0].detach(), "entropy": found[1].detach(), **found[2], **grads}


def policy_loss(backend: str, made: dict[str, Any], frozen: tuple[str, ...] = (), **changed: Any) -> dict[str, Tensor]:
    from rlhf_engine import ops

    inputs, rows = leaves(made, frozen), len(made["targets"])
    old = torch.linspace(-12, -6, rows)
    given: dict[str, Any] = {"weights": None, "denom": None, "grad_weight_out": None} | options(**changed)
    token_loss = ops.ppo_token_loss(old, torch.linspace(-1, 1, rows), entropy_coef=0.1)
    loss, metrics = ops_of(backend)[1](**inputs, token_loss=token_loss, **given)
    loss.backward()
    grads = {k: v.grad for k, v in inputs.items() if v.grad is not None}
    return {"loss": loss.detach(), **metrics, **grads}


def compare(function: Any, dtype: torch.dtype, **changed: Any) -> None:
    """Root mean squares of the errors: at most 1.5 times those of PyTorch in the same dtype."""
    made = tensors(dtype, banned="softcap" in changed)
    truth = function("reference", exact(made), **changed)
    theirs, ours = (function(backend, made, **changed) for backend in ("reference", "triton"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        errors = [float((x[name].double() - truth[name]).square().mean().sqrt()) for x in (ours, theirs)]
        size = float(truth[name].double().abs().amax())
        # Narrow logits are rounded products, which end next to ties in one order and not in another.
        slack = (1e-6 if changed.get("logits_dtype") != "input" else 3e-3) * size
        assert errors[0] <= 1.5 * errors[1] + slack, (name, errors)
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape, name


def case_features(function: Any) -> None:
    each = torch.linspace(0.5, 2, ROWS)
    compare(function, torch.float32, temperature=each, softcap=5.0, logit_scale=1.3)


def case_frozen(frozen: tuple[str, ...]) -> None:
    for function in (logprobs, policy_loss):
        compare(function, torch.bfloat16, frozen=frozen)


def case_same_bits() -> None:
    """Any rows, in any order, in blocks of any size; and scored as they are trained."""
    made = tensors(torch.bfloat16)
    whole = logprobs("triton", made)
    order = torch.tensor([10, 3, 9, 0, 7])
    some = made | {"hidden": made["hidden"][order], "targets": made["targets"][order]}
    part, tight = logprobs("triton", some), logprobs("triton", made, memory_budget=1)
    seen: list[Tensor] = []
    keep = made | {"hidden": made["hidden"].clone().requires_grad_()}
    ops_of("triton")[1](
        **keep, token_loss=lambda p, e, rows: (seen.append(torch.stack([p, e]).detach()), -p)[1], weights=None,
        denom=None, grad_weight_out=None, **options()
    )  # fmt: skip
    for i, name in enumerate(("logprobs", "entropy")):
        assert torch.equal(part[name], whole[name][order]) and torch.equal(tight[name], whole[name]), name
        assert torch.equal(seen[-1][i], whole[name]), name


def case_unread_mask() -> None:
    """As on a GPU: dead rows go through the products as zeros, NaN or not."""
    from rlhf_engine.ops import rows as rows_module
    from rlhf_engine.ops import tiled_head

    made, mask = tensors(torch.float32), torch.arange(ROWS) % 3 != 1
    for function in (logprobs, policy_loss):
        want = function("triton", made, mask=mask)
        wild = made | {"hidden": torch.where(mask[:, None], made["hidden"], torch.nan)}
        rows_module.host_knows = tiled_head.host_knows = lambda x: False
        try:
            got = function("triton", wild, mask=mask)
        finally:
            rows_module.host_knows = tiled_head.host_knows = lambda x: x.device.type == "cpu"
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=name)
        assert not got["hidden"][~mask].any()


def case_any_stride() -> None:
    """A weight held as (H, V), and a bias that is every other number: copied, not misread."""
    for mode in ("float32", "input"):
        made = tensors(torch.bfloat16)
        spread = made | {"weight": made["weight"].t().contiguous().t(), "bias": made["bias"].repeat_interleave(2)[::2]}
        want = ops_of("triton")[0](**made, extras=(), **options(logits_dtype=mode))
        got = ops_of("triton")[0](**spread, extras=(), **options(logits_dtype=mode))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def case_scaled_and_given() -> None:
    """The upstream gradient arrives on the device; where it comes too late, NaN."""
    from rlhf_engine import ops

    made = tensors(torch.float32)
    token_loss = ops.ppo_token_loss(torch.linspace(-12, -6, ROWS), torch.linspace(-1, 1, ROWS))
    results = []
    for factor, given in ((1.0, False), (-2.0, False), (1.0, True), (-2.0, True)):
        inputs, place = leaves(made, ()), torch.zeros(V, 16)
        rest = {"weights": None, "denom": None, "grad_weight_out": place if given else None}
        loss, _ = ops_of("triton")[1](**inputs, token_loss=token_loss, **rest, **options())
        (loss * factor).backward()
        results.append((inputs["hidden"].grad, place if given else inputs["weight"].grad))
    torch.testing.assert_close(results[1][0], -2 * results[0][0])
    torch.testing.assert_close(results[1][1], -2 * results[0][1])
    assert torch.equal(results[2][1], results[0][1]) and results[3][1].isnan().all()


INTERPRETED: dict[str, Callable[[], None]] = {
    **{
        f"{function.__name__}-{dtype}-{mode}": partial(compare, function, getattr(torch, dtype), logits_dtype=mode)
        for function in (logprobs, policy_loss)
        for dtype, mode in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "input"))
    },
    **{f"features-{function.__name__}": partial(case_features, function) for function in (logprobs, policy_loss)},
    **{f"frozen-{'-'.join(frozen)}": partial(case_frozen, frozen) for frozen in (("weight", "bias"), ("hidden",))},
    "same-bits": case_same_bits,
    "unread-mask": case_unread_mask,
    "any-stride": case_any_stride,
    "scaled-and-given": case_scaled_and_given,
}


@pytest.mark.parametrize("case", INTERPRETED)
def test_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


if __name__ == "__main__":
    kernel_script.main(INTERPRETED, {})
