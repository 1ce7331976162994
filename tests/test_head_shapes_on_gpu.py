"""The head on a GPU at the vocabularies, widths and numbers of rows that models have, or that nobody thinks of; blind
to what stands in rows that do not count."""

from __future__ import annotations

from typing import Any

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE, HEAD_BACKEND, leaf, normal, pick
from test_head_operators import REAL, case, check, score
from torch import Tensor

from rlhf_engine import ops

pytestmark = [*gpu_tier.marks(120), gpu_tier.needs("linear_logprobs", HEAD_BACKEND)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCABULARIES = sorted({v + d for v in (*REAL, 49_152) for d in (-1, 0, 1)}) if gpu_tier.ON_GPU else [2047, 2048, 2049]
FEW = pick([32_000, 50_257, 151_936, 262_145], [1000, 2049])
# A GPU's tanh and exp2 are good to an ulp or two, and sums of a segment are float32: of numbers of size 10, 2e-6.
EPSILON = 2e-6
WILD = [2**40, -5, -101]


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits(dtype: torch.dtype) -> None:
    for vocabulary in (1, 2, 3, 127, 128, 129, *VOCABULARIES):
        logits, targets = (x.to(DEVICE) for x in case(vocabulary, dtype, rows=2))
        check(logits, targets, EPSILON, HEAD_BACKEND)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 127])
def test_from_few_logits(rows: int, dtype: torch.dtype) -> None:
    logits, targets = case(pick(50_257, 2049), dtype, rows)
    check(logits.to(DEVICE), targets.to(DEVICE), EPSILON, HEAD_BACKEND) if rows else None
    ours = score(logits.to(DEVICE), targets.to(DEVICE).int(), HEAD_BACKEND)
    assert [x.shape for x in ours] == [(rows,), (rows,), logits.shape]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_logits_wherever_it_stands(dtype: torch.dtype) -> None:
    """Strides, alignments, three dimensions, int32: the same bits."""
    vocabulary = pick(50_257, 2049)
    logits, targets = (x.to(DEVICE) for x in case(vocabulary, dtype, rows=6))
    want = score(logits, targets, HEAD_BACKEND)
    wide = torch.full((2, 4, vocabulary + 7), torch.nan, device=DEVICE, dtype=dtype)
    for shift in (0, 3, 7):
        view = wide[:, 1:, shift : shift + vocabulary]
        view.copy_(logits.view(2, 3, -1))
        for a, b in zip(score(view, targets.view(2, 3).int(), HEAD_BACKEND), want, strict=True):
            assert torch.equal(a.reshape(b.shape), b), shift
    turned = score(logits.t().contiguous().t(), targets, HEAD_BACKEND)
    assert all(torch.equal(a, b) for a, b in zip(turned, want, strict=True))


def both(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """Values and gradients of linear_logprobs and of a policy loss on them."""
    one, other = (x.detach().requires_grad_() for x in (hidden, weight))
    found = ops.linear_logprobs(one, other, targets, backend=backend, **options)
    scored = torch.autograd.grad((found[0] - 0.1 * found[1]).sum(), (one, other))
    shape, dtype = targets.shape, torch.float64 if hidden.dtype is torch.float64 else torch.float32
    formula = ops.ppo_token_loss(
        torch.full(shape, -9.0, device=DEVICE, dtype=dtype),
        torch.linspace(-1, 1, targets.numel(), device=DEVICE, dtype=dtype).view(shape),
        clip_high=1e6, clip_low=1.0, kl_coef=0.0,
    )  # fmt: skip
    loss, _ = ops.linear_policy_loss(one, other, targets, formula, backend=backend, denom=7.0, **options)
    trained = torch.autograd.grad(loss, (one, other))
    return [x.detach() for x in (*found, *scored, loss, *trained)]


def compare(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> None:
    """Errors in float64's terms, at most 1.5 times those of PyTorch, and roundings of gradients that differ."""
    wide = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}
    exact = both(hidden.double(), weight.double(), targets, "reference", **wide)
    theirs, ours = (both(hidden, weight, targets, name, **options) for name in ("reference", HEAD_BACKEND))
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype
        if not a.numel():
            continue
        errors = [float((x.double() - c).abs().amax()) for x in (a, b)]
        roundings = max(1e-5, torch.finfo(hidden.dtype).eps) if i > 1 else 3e-6
        assert errors[0] <= 1.5 * errors[1] + roundings * max(1.0, float(c.abs().amax())), (i, errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [63, 64, 100])
def test_widths(width: int, dtype: torch.dtype) -> None:
    for vocabulary in FEW:
        g = torch.Generator(DEVICE).manual_seed(vocabulary)
        hidden, weight = normal(33, width).to(dtype), (normal(vocabulary, width, seed=1) / 8).to(dtype)
        compare(hidden, weight, torch.randint(vocabulary, (33,), generator=g, device=DEVICE))


@pytest.mark.parametrize("rows", [0, 1, 2, 127, pick(1025, 65)])
def test_numbers_of_rows(rows: int) -> None:
    vocabulary = FEW[1]
    g = torch.Generator(DEVICE).manual_seed(rows)
    hidden, weight = normal(rows, 64).bfloat16(), (normal(vocabulary, 64, seed=1) / 8).bfloat16()
    compare(hidden, weight, torch.randint(vocabulary, (rows,), generator=g, device=DEVICE).int())


def test_options_together() -> None:
    vocabulary, rows = FEW[1], 40
    targets = torch.arange(rows, device=DEVICE).view(8, 5) * 7
    compare(
        normal(8, 5, 64).bfloat16(), (normal(vocabulary, 64, seed=1) / 8).bfloat16(), targets,
        bias=normal(vocabulary, seed=2).bfloat16(), temperature=normal(8, 5, seed=3).abs() + 0.5, softcap=20.0,
        logit_scale=1.3, mask=torch.arange(rows, device=DEVICE).view(8, 5) % 3 > 0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: torch.dtype) -> None:
    """Of hidden states, weight, bias and targets: what their copies give, but for the order of a product's sums."""
    vocabulary = FEW[1]
    hidden, weight = normal(9, 4, 128).to(dtype)[:, 1:, ::2], (normal(64, vocabulary, seed=1) / 8).to(dtype).t()
    targets, bias = torch.arange(54, device=DEVICE).view(9, 6)[:, ::2], normal(2 * vocabulary, seed=2).to(dtype)[::2]
    dense = [x.contiguous() for x in (hidden, weight, targets)]
    for logits_dtype in ("float32", "input"):
        want = both(*dense, HEAD_BACKEND, bias=bias.contiguous(), logits_dtype=logits_dtype)
        got = both(hidden, weight, targets, HEAD_BACKEND, bias=bias, logits_dtype=logits_dtype)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_masked_changes_no_bit(dtype: torch.dtype, poison: float) -> None:
    rows, vocabulary = 65, FEW[1]
    mask, wild = torch.arange(rows, device=DEVICE) % 3 > 0, torch.tensor(WILD, device=DEVICE)
    targets = torch.arange(rows, device=DEVICE) * 11
    odd = torch.where(mask, targets, wild[torch.arange(rows, device=DEVICE) % len(wild)])
    hidden, weight = normal(rows, 64).to(dtype), (normal(vocabulary, 64, seed=1) / 8).to(dtype)
    want = both(hidden, weight, targets, HEAD_BACKEND, mask=mask)
    got = both(torch.where(mask[:, None], hidden, poison), weight, odd, HEAD_BACKEND, mask=mask)
    logits = normal(rows, pick(20_001, 2049), seed=2).to(dtype)
    want += score(logits, targets, HEAD_BACKEND, mask=mask)
    got += score(torch.where(mask[:, None], logits, poison), odd, HEAD_BACKEND, mask=mask)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), i
        assert a.shape[:1] != (rows,) or (not a[~mask].any() and a[mask].any()), i


def test_an_unmasked_target_that_is_not_there_is_nan_in_its_row_alone() -> None:
    if not gpu_tier.ON_GPU:
        pytest.skip("rehearsal: on a CPU the front door refuses it")
    targets = torch.tensor([5, 2**40, 3, -5], device=DEVICE)
    hidden, weight = leaf(normal(4, 64)), leaf(normal(9000, 64, seed=1))
    logits = leaf(normal(4, 9000, seed=2))
    for logprobs, entropy in (ops.linear_logprobs(hidden, weight, targets), ops.token_logprobs(logits, targets)):
        assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, True]
        (logprobs.sum()).backward()
    for gradient in (hidden.grad, logits.grad):
        assert gradient.isnan().any(1).tolist() == [False, True, False, True]
