"""Log-prob and entropy in the reference: right against scalar arithmetic, untouched by what must not matter."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_engine import reference
from rlhf_engine.reference import ROW_TILE, linear_logprobs, linear_policy_loss, token_logprobs

GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e38]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=g)


def oracle_rows(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    rows = [oracle.logprob_and_entropy(z, y, **options) for z, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    logprobs, entropy = torch.tensor(rows, dtype=torch.float64).T
    return logprobs, entropy


def test_two_tokens_by_hand() -> None:
    # p = (3/4, 1/4):  log 3/4 = -0.287682;  entropy = 3/4 * 0.287682 + 1/4 * 1.386294 = 0.562335
    logits = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]))
    assert logprobs.item() == pytest.approx(-0.28768207245178)
    assert entropy.item() == pytest.approx(0.56233514461880)
    # temperature 1/2 squares the odds: p = (9/10, 1/10)
    assert token_logprobs(logits, torch.tensor([1]), temperature=0.5)[0].item() == pytest.approx(-2.30258509299404)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(0, 6),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    softcap=st.sampled_from([None, 5.0]),
    logit_scale=st.sampled_from([1.0, 0.25]),
    offset=st.sampled_from([0.0, 1000.0, -1000.0]),
)
def test_matches_oracle(
    seed: int, rows: int, vocabulary: int, temperature: float, softcap: float | None, logit_scale: float, offset: float
) -> None:
    hidden, weight, targets = head(rows, 3, vocabulary, torch.float64, seed)
    bias = torch.full((vocabulary,), offset, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    got = linear_logprobs(hidden, weight, targets, bias=bias, **options)
    expected = oracle_rows(hidden @ weight.T + bias, targets, **options) if rows else got
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if softcap is None and logit_scale == 1.0:
        from_logits = token_logprobs(hidden @ weight.T + bias, targets, temperature=temperature)
        torch.testing.assert_close(from_logits, got, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 997, generator=seeded(1)) * 5).to(dtype)
    targets = torch.randint(0, 997, (5,), generator=seeded(2))
    logprobs, entropy = token_logprobs(logits, targets, temperature=0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = oracle_rows(logits.double(), targets, temperature=0.7)
    torch.testing.assert_close((logprobs.double(), entropy.double()), expected, rtol=1e-5, atol=1e-5)


def test_large_logits_keep_their_digits() -> None:
    # lse - mean(z) loses 3e-2 here.
    logits = torch.randn(8, 1024, generator=seeded(3)) + 1000
    targets = torch.arange(8)
    logprobs, entropy = token_logprobs(logits, targets)
    expected_logprobs, expected_entropy = oracle_rows(logits.double(), targets)
    torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=4e-6)


def test_gradients_in_float64() -> None:
    hidden, weight, targets = head(5, 3, 7, torch.float64)
    bias = torch.randn(7, dtype=torch.float64, generator=seeded(4))
    mask = torch.tensor([True, True, False, True, True])
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=0.7, softcap=4.0, logit_scale=1.5, mask=mask
        )

    assert torch.autograd.gradcheck(linear, inputs)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=seeded(5), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, temperature=1.3, mask=mask), logits)


def test_banned_tokens_have_zero_probability_and_gradient() -> None:
    logits = torch.randn(3, 6, generator=seeded(6))
    logits[:, 4:] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([0, 1, 2])
    logprobs, entropy = token_logprobs(logits, targets)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[:, 4:].any()
    torch.testing.assert_close((logprobs, entropy), token_logprobs(logits[:, :4], targets))
    hidden, weight, _ = head(3, 4, 6)
    bias = torch.zeros(6).index_fill(0, torch.tensor([4, 5]), -torch.inf)
    capped = linear_logprobs(hidden, weight, targets, bias=bias, softcap=2.0)
    torch.testing.assert_close(capped, linear_logprobs(hidden, weight[:4], targets, softcap=2.0))
    assert token_logprobs(logits, torch.tensor([4, 4, 5]))[0].eq(-torch.inf).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_rows_touch_nothing(garbage: float) -> None:
    mask = torch.tensor([True, False, True, True, False, True, False])

    def run(fill: float, token: int) -> list[Tensor]:
        hidden, weight, targets = head(7, 5, 11)
        targets[1], targets[4] = token, token
        targets[6] = -100
        mask_without_6 = mask.index_fill(0, torch.tensor([6]), True)  # row 6 is masked by its target alone
        hidden[~mask] = fill
        logits = hidden @ weight.T
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, logits)]
        linear = linear_logprobs(leaves[0], leaves[1], targets, mask=mask_without_6)
        direct = token_logprobs(leaves[2], targets, mask=mask_without_6)
        scale = torch.arange(1.0, 8.0)
        torch.autograd.backward([(x * scale).sum() for x in (*linear, *direct)])
        return [*linear, *direct, *(x.grad for x in leaves if x.grad is not None)]

    clean, poisoned = run(0.5, 3), run(garbage, 10**9)
    assert len(clean) == 7
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert all(not x[~mask].any() for x in (*clean[:4], clean[4], clean[6]))


def test_nan_and_bad_target_stay_in_their_row() -> None:
    hidden, weight, targets = head(6, 4, 9)
    clean = linear_logprobs(hidden, weight, targets)
    hidden[2] = torch.nan
    targets[4] = 9
    broken = linear_logprobs(hidden, weight, targets)
    for a, b in zip(clean, broken, strict=True):
        assert b[[2, 4]].isnan().all()
        assert torch.equal(a[[0, 1, 3, 5]], b[[0, 1, 3, 5]])
    assert token_logprobs(torch.zeros(1, 1), torch.tensor([5]))[0].isnan()  # a vocabulary of one has no other token
    all_banned = token_logprobs(torch.full((1, 4), -torch.inf), torch.tensor([0]))
    assert all_banned[0].isnan() and all_banned[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [49_152, 1031])  # a real one, and one that leaves every row unaligned
def test_bits_of_a_row_depend_on_that_row_alone(dtype: torch.dtype, vocabulary: int) -> None:
    count = ROW_TILE + 3
    hidden, weight, targets = head(count, 8, vocabulary, dtype)
    full = linear_logprobs(hidden, weight, targets)
    subsets = [[0], [ROW_TILE], [count - 1, 5, ROW_TILE - 1], list(range(count))[::-1]]
    for rows in subsets[: 2 if vocabulary > 2000 else None]:
        part = linear_logprobs(hidden[rows], weight, targets[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(full, part, strict=True))
    if vocabulary < 2000:
        logits = hidden @ weight.T
        alone = [token_logprobs(logits[i : i + 1], targets[i : i + 1]) for i in (1, ROW_TILE + 1)]
        together = token_logprobs(logits, targets)
        for a, i in zip(alone, (1, ROW_TILE + 1), strict=True):
            assert torch.equal(torch.cat(a), torch.stack([together[0][i], together[1][i]]))


def test_gradients_and_autocast_do_not_change_bits() -> None:
    hidden, weight, targets = head(70, 16, 501)
    with torch.no_grad():
        plain = linear_logprobs(hidden, weight, targets, temperature=0.9)
    tracked = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, temperature=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_logprobs(hidden, weight, targets, temperature=0.9)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, tracked, cast, strict=True))
    exact = linear_logprobs(hidden.double(), weight.double(), targets, temperature=0.9)
    torch.testing.assert_close(plain, tuple(x.float() for x in exact), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x[0].sum(), hidden)[0] for x in (tracked, cast)]  # the recomputation too
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_confident_rows_never_exceed_probability_one(dtype: torch.dtype) -> None:
    hidden, weight, _ = head(200, 16, 333, dtype)
    targets = (hidden * 4 @ weight.T).argmax(-1)
    logprobs, entropy = linear_logprobs(hidden * 4, weight, targets)
    assert (logprobs <= 0).all() and (logprobs > -0.1).sum() > 100
    assert (entropy > -1e-6).all()


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_only_one_tile_of_logits_exists() -> None:
    hidden, weight, targets = head(5 * ROW_TILE, 4, 600)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    saved = [0]

    def keep(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs, entropy = linear_logprobs(*leaves, targets)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.numel == ROW_TILE * 600
    assert max(saved) < ROW_TILE * 600  # and none of them waits for the backward


def test_what_is_left_out_does_nothing() -> None:
    hidden, weight, targets = head(6, 4, 9)
    options: dict[str, Any] = {"bias": torch.zeros(9), "temperature": 1.0, "logit_scale": 1.0, "mask": targets >= 0}
    for a, b in zip(
        linear_logprobs(hidden, weight, targets), linear_logprobs(hidden, weight, targets, **options), strict=True
    ):
        assert torch.equal(a, b)


def test_views_and_leading_dimensions() -> None:
    hidden, weight, targets = head(6, 4, 9)
    flat = linear_logprobs(hidden, weight, targets)
    strided = hidden.T.contiguous().T.reshape(2, 3, 4)
    wide = torch.stack([weight, weight], 1).flatten(1)[:, :4]
    shaped = linear_logprobs(strided, wide, targets.int().reshape(2, 3))
    assert all(torch.equal(a.reshape(2, 3), b) for a, b in zip(flat, shaped, strict=True))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (1,)])
def test_empty_and_fully_masked(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(
        logits, torch.zeros(shape, dtype=torch.int64), mask=torch.zeros(shape, dtype=torch.bool)
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == shape
    assert not logprobs.any() and logits.grad is not None and not logits.grad.any()


def test_policy_loss_from_hidden_equals_the_two_step_form() -> None:
    hidden, weight, targets = head(9, 4, 13, torch.float64)
    targets[3] = -7
    mask = torch.arange(9) != 5
    old, advantages, weights = (torch.randn(9, dtype=torch.float64, generator=seeded(i)) for i in (1, 2, 3))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    options: dict[str, Any] = {
        "bias": torch.randn(13, dtype=torch.float64, generator=seeded(4)), "temperature": 0.7, "softcap": 4.0,
        "logit_scale": 1.5, "ignore_index": -7,
    }  # fmt: skip
    token_loss = reference.ppo_token_loss(old - 3, advantages, entropy_coef=0.1)
    scale: dict[str, Any] = {"weights": weights, "denom": 5.0}
    fused, fused_metrics = linear_policy_loss(*leaves, targets, token_loss, mask=mask, **scale, **options)
    logprobs, entropy = linear_logprobs(*leaves, targets, mask=mask, **options)
    active = mask & (targets != -7)
    loss, metrics = reference.ppo_loss(
        logprobs, old - 3, advantages, active, entropy=entropy, entropy_coef=0.1, **scale
    )
    torch.testing.assert_close(fused, loss)
    torch.testing.assert_close(fused_metrics, metrics)
    torch.testing.assert_close(torch.autograd.grad(fused, leaves), torch.autograd.grad(loss, leaves))
    rows = active.nonzero().squeeze(1)
    by_rows, _ = linear_policy_loss(*leaves, targets, token_loss, rows=rows, **scale, **options)
    assert torch.equal(by_rows, fused)
    shaped = linear_policy_loss(hidden.view(3, 3, 4), weight, targets.view(3, 3), token_loss, mask=mask.view(3, 3),
                                **scale, **options)[0]  # fmt: skip
    assert torch.equal(shaped, fused)
