"""KL, reward shaping, GAE and whitening in the reference: by hand, against the oracle, and under poison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_engine.reference import ShapedAdvantages, gae, kl_estimate, kl_gae, whiten

GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e38]
T, F = True, False


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def batch(seed: int, count: int, length: int, holes: float = 0.3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two (count, length) float tensors and a mask with holes; some sequences may have no token."""
    g = torch.Generator().manual_seed(seed)
    data = [torch.randn(count, length, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]
    lengths = torch.randint(0, length + 1, (count, 1), generator=g)
    mask = (torch.rand(count, length, generator=g) > holes) & (torch.arange(length) < lengths)
    return [*data, mask]


def pack(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])


# gamma = lam = 1/2, so the recursion decays by 1/4.
def test_three_tokens_by_hand() -> None:
    # t=2: delta = 3 - 6 = -3                A = -3                      R = 3
    # t=1: delta = 2 + 6/2 - 5 = 0           A = 0 - 3/4 = -0.75         R = 4.25
    # t=0: delta = 1 + 5/2 - 4 = -0.5        A = -0.5 - 0.75/4 = -0.6875 R = 3.3125
    got = gae(rows([1, 2, 3]), rows([4, 5, 6]), rows([1, 1, 1]).bool(), gamma=0.5, lam=0.5)
    assert torch.equal(got[0], rows([-0.6875, -0.75, -3.0]))
    assert torch.equal(got[1], rows([3.3125, 4.25, 3.0]))


def test_one_token_and_bootstrap_by_hand() -> None:
    # delta = 3 - 5 = -2;   with a bootstrap of 8: delta = 3 + 8/2 - 5 = 2
    one = rows([3.0]), rows([5.0]), torch.tensor([[T]])
    assert gae(*one, gamma=0.5)[0].item() == -2
    assert gae(*one, gamma=0.5, bootstrap=torch.tensor([8.0]))[0].item() == 2


@pytest.mark.parametrize("trailing", [0, 2])
def test_gap_of_three_by_hand(trailing: int) -> None:
    junk = [9.0] * trailing
    rewards, values = rows([1, 7, 7, 7, 3, *junk]), rows([4, 7, 7, 7, 6, *junk])
    mask = torch.tensor([[T, F, F, F, T, *[F] * trailing]])
    # both:  A_4 = 3 - 6 = -3
    # carry: delta_0 = 1 + 6/2 - 4 = 0, A_0 = 0 - 3/4
    carry = gae(rewards, values, mask, gamma=0.5, lam=0.5, holes="carry")
    assert torch.equal(carry[0], rows([-0.75, 0, 0, 0, -3, *[0] * trailing]))
    assert torch.equal(carry[1], rows([3.25, 0, 0, 0, 3, *[0] * trailing]))
    # decay: A_3 = (0 + 6/2 - 0) - 3/4 = 2.25, A_2 = 2.25/4, A_1 = 2.25/16, A_0 = (1 + 0 - 4) + 2.25/64
    decay = gae(rewards, values, mask, gamma=0.5, lam=0.5, holes="decay")
    assert torch.equal(decay[0], rows([-3 + 2.25 / 64, 0, 0, 0, -3, *[0] * trailing]))


@pytest.mark.parametrize("holes", ["carry", "decay"])
@pytest.mark.parametrize("truncated", [True, False])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    count=st.sampled_from([4, 1, 0]),
    length=st.sampled_from([9, 5, 1, 0]),
    gamma=st.sampled_from([0.9, 1.0, 0.0]),
    lam=st.sampled_from([0.95, 1.0, 0.0]),
)
def test_gae_matches_oracle_padded_and_packed(
    holes: str, truncated: bool, seed: int, count: int, length: int, gamma: float, lam: float
) -> None:
    rewards, values, mask = batch(seed, count, length)
    bootstrap = torch.linspace(-1, 1, count, dtype=torch.float64) if truncated else None
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "holes": holes, "bootstrap": bootstrap}
    got = gae(rewards, values, mask, **options)
    last_values = None if bootstrap is None else bootstrap.tolist()
    expected = oracle.gae(rewards.numpy(), values.numpy(), mask.numpy(), gamma, lam, holes, last_values)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-9)
    lengths = [max([i + 1 for i, m in enumerate(row) if m], default=0) + (n % 2) for n, row in enumerate(mask.tolist())]
    lengths = [min(n, length) for n in lengths]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    if count:
        r, v = rewards.float(), values.float()
        packed = gae(pack(r, lengths), pack(v, lengths), pack(mask, lengths), cu_seqlens=cu_seqlens, **options)
        padded = gae(r, v, mask, **options)
        assert all(torch.equal(a, pack(b, lengths)) for a, b in zip(packed, padded, strict=True))


@pytest.mark.parametrize("holes", ["carry", "decay"])
def test_bits_of_a_sequence_depend_on_it_alone(holes: str) -> None:
    rewards, values, mask = batch(1, 5, 13, dtype=torch.float32)
    bootstrap = torch.arange(1.0, 6.0)
    full = gae(rewards, values, mask, gamma=0.99, holes=holes, bootstrap=bootstrap)
    alone = gae(rewards[3:4], values[3:4], mask[3:4], gamma=0.99, holes=holes, bootstrap=bootstrap[3:4])
    longer = [torch.nn.functional.pad(x, (0, 6)) for x in (rewards, values, mask)]
    padded = gae(longer[0], longer[1], longer[2], gamma=0.99, holes=holes, bootstrap=bootstrap)
    for a, b, c in zip(full, alone, padded, strict=True):
        assert torch.equal(a[3:4], b) and torch.equal(a, c[:, :13])


def test_lambda_per_sequence_equals_separate_calls() -> None:
    rewards, values, mask = batch(2, 3, 8, dtype=torch.float32)
    lams = torch.tensor([0.0, 0.95, 1.0], dtype=torch.float64)
    together = gae(rewards, values, mask, gamma=0.99, lam=lams)
    for i, lam in enumerate(lams.tolist()):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], gamma=0.99, lam=lam)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("holes", ["carry", "decay"])
def test_two_lambdas_are_two_calls_and_places_are_filled(holes: str) -> None:
    rewards, values, mask = batch(14, 3, 8)
    options: dict[str, Any] = {"gamma": 0.9, "holes": holes, "bootstrap": torch.tensor([1.0, -2.0, 3.0]).double()}
    each = torch.tensor([0.2, 0.9, 1.0], dtype=torch.float64)
    for lam, value_lam in ((0.5, 0.8), (0.5, each), (each, 0.8)):
        advantages, returns = gae(rewards, values, mask, lam=lam, value_lam=value_lam, **options)
        assert torch.equal(advantages, gae(rewards, values, mask, lam=lam, **options)[0])
        assert torch.equal(returns, gae(rewards, values, mask, lam=value_lam, **options)[1])
        assert not torch.equal(returns, gae(rewards, values, mask, lam=lam, **options)[1])
        out = torch.full((3, 8), 7.0).double(), torch.full((3, 8), 7.0).double()
        placed = gae(rewards, values, mask, lam=lam, value_lam=value_lam, out=out, **options)
        assert placed[0] is out[0] and placed[1] is out[1]
        assert torch.equal(out[0], advantages) and torch.equal(out[1], returns)
        assert gae(rewards, values, mask, lam=lam, out=out, **options)[0] is out[0]
        assert torch.equal(out[1], gae(rewards, values, mask, lam=lam, **options)[1])


def test_packs_of_one_token_and_of_none() -> None:
    # delta = 3 - 5;  the empty sequence has no token to point at
    one = torch.tensor([3.0]), torch.tensor([5.0]), torch.tensor([T])
    assert gae(*one, cu_seqlens=torch.tensor([0, 1, 1]))[0].tolist() == [-2]
    for offsets in ([0], [0, 0]):
        nothing = torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        assert [x.shape for x in gae(*nothing, cu_seqlens=torch.tensor(offsets))] == [(0,), (0,)]


def test_lambda_one_is_discounted_return_minus_value() -> None:
    rewards, values, _ = batch(3, 4, 7)
    mask = torch.ones(4, 7, dtype=torch.bool)
    discount = 0.9 ** torch.arange(7, dtype=torch.float64)
    returns = torch.stack([(rewards[:, t:] * discount[: 7 - t]).sum(1) for t in range(7)], 1)
    got = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(got, (returns - values, returns))
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    temporal_difference = rewards + 0.9 * next_values - values
    torch.testing.assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.0)[0], temporal_difference)


def shape_by_hand(length: int, score_at: str, lam: float) -> ShapedAdvantages:
    return kl_gae(
        torch.tensor([5.0]), rows([-1, -2, -1, -9])[:, :length], rows([-2, -1, -3, -9])[:, :length],
        rows([1, 2, 3, 4])[:, :length], torch.tensor([[T, T, T, F]])[:, :length], kl_coef=0.1, gamma=1.0, lam=lam,
        whiten=False, score_at=score_at,
    )  # fmt: skip


def test_score_on_the_last_token_by_hand() -> None:
    # kl = [1, -1, 2], rewards = [-0.1, 0.1, -0.2 + 5]; lam = 1: returns = suffix sums, A = returns - V
    shaped = shape_by_hand(4, "last", 1.0)
    torch.testing.assert_close(shaped.kl, rows([1, -1, 2, 0.0]))
    torch.testing.assert_close(shaped.rewards, rows([-0.1, 0.1, 4.8, 0.0]))
    torch.testing.assert_close(shaped.returns, rows([4.8, 4.9, 4.8, 0.0]))
    torch.testing.assert_close(shaped.advantages, rows([3.8, 2.9, 1.8, 0.0]))
    assert shaped.value_mask.tolist() == [[T, T, T, F]]


def test_score_after_the_last_token_by_hand() -> None:
    # lam = 1/2:  A_3 = 5 - 4 = 1 (a value slot, no action)     A_2 = (-0.2 + 4 - 3) + 1/2 = 1.3
    #             A_1 = (0.1 + 3 - 2) + 1.3/2 = 1.75            A_0 = (-0.1 + 2 - 1) + 1.75/2 = 1.775
    shaped = shape_by_hand(4, "after", 0.5)
    torch.testing.assert_close(shaped.rewards, rows([-0.1, 0.1, -0.2, 5.0]))
    torch.testing.assert_close(shaped.advantages, rows([1.775, 1.75, 1.3, 0.0]))
    torch.testing.assert_close(shaped.returns, rows([2.775, 3.75, 4.3, 5.0]))
    assert shaped.value_mask.tolist() == [[T, T, T, T]]


def test_score_after_falls_back_when_the_row_is_full() -> None:
    # A response without EOS fills the row: there is no slot after it.
    after, last = (shape_by_hand(3, place, 0.5) for place in ("after", "last"))
    assert torch.equal(after.rewards, last.rewards) and torch.equal(after.advantages, last.advantages)


def test_score_after_never_enters_the_next_packed_sequence() -> None:
    # Lengths 2 (full, no slot after it) and 3 (the last one masked: a slot).
    mask, zeros = torch.tensor([T, T, T, T, F]), torch.zeros(5)
    cu_seqlens = torch.tensor([0, 2, 5])
    shaped = kl_gae(
        torch.tensor([5.0, 7.0]), zeros, zeros, zeros, mask, kl_coef=0.1, score_at="after", cu_seqlens=cu_seqlens
    )
    assert shaped.rewards.tolist() == [0, 5, 0, 0, 7]


def test_score_clip_and_empty_sequence() -> None:
    mask = torch.tensor([[T, T], [F, F]])
    zeros = torch.zeros(2, 2)
    scores = torch.tensor([50.0, float("nan")])
    shaped = kl_gae(scores, zeros, zeros, zeros, mask, kl_coef=0.1, score_clip=3.0, whiten=False)
    assert torch.equal(shaped.rewards, rows([0, 3], [0, 0]).float())
    unclipped = kl_gae(scores, zeros, zeros, zeros, mask, kl_coef=0.1, score_clip=0.0, whiten=False)
    assert torch.equal(unclipped.rewards, rows([0, 50], [0, 0]).float())


@pytest.mark.parametrize("score_at", ["last", "after"])
@pytest.mark.parametrize("holes", ["carry", "decay"])
@pytest.mark.parametrize("kl_kind", ["k1", "abs", "k2", "k3"])
def test_kl_gae_matches_oracle_padded_and_packed(score_at: str, holes: str, kl_kind: str) -> None:
    logprobs, ref_logprobs, mask = batch(5, 6, 8)
    values, scores = batch(6, 6, 8)[0], torch.arange(6.0, dtype=torch.float64)
    options: dict[str, Any] = {
        "kl_coef": 0.3, "kl_kind": kl_kind, "gamma": 0.9, "lam": 0.8, "score_at": score_at, "holes": holes
    }  # fmt: skip
    shaped = kl_gae(scores, logprobs, ref_logprobs, values, mask, **options)
    rewards, value_mask = oracle.shaped_rewards(
        scores.numpy(), logprobs.numpy(), ref_logprobs.numpy(), mask.numpy(), 0.3, kl_kind, score_at
    )
    advantages, returns = oracle.gae(rewards, values.numpy(), value_mask, 0.9, 0.8, holes)
    expected = rewards, oracle.whiten(advantages, mask.numpy()), returns
    for a, b in zip((shaped.rewards, shaped.advantages, shaped.returns), expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-9)
    assert np.array_equal(shaped.value_mask.numpy(), value_mask)
    flat_logprobs, flat_ref, flat_values, flat_mask = (x.flatten() for x in (logprobs, ref_logprobs, values, mask))
    options["cu_seqlens"] = torch.arange(7) * 8
    packed = kl_gae(scores, flat_logprobs, flat_ref, flat_values, flat_mask, **options)
    for name in ("rewards", "advantages", "returns", "kl", "value_mask"):
        assert torch.equal(getattr(packed, name).view(6, 8), getattr(shaped, name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_cast_before_anything_else(dtype: torch.dtype) -> None:
    rewards, values, mask = batch(15, 4, 9, dtype=dtype)
    ref_logprobs, bootstrap, scores = batch(16, 4, 9, dtype=dtype)[0], values[:, 0].clone(), rewards[:, 1].clone()

    def run(*tensors: Tensor) -> list[Tensor]:
        r, v, ref, last, score = tensors
        shaped = kl_gae(score, r, ref, v, mask, kl_coef=0.3, gamma=0.99, bootstrap=last)
        return [*gae(r, v, mask, gamma=0.99, bootstrap=last), shaped.rewards, shaped.advantages, whiten(v, mask)]

    low = rewards, values, ref_logprobs, bootstrap, scores
    for a, b in zip(run(*low), run(*(x.float() for x in low)), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("score_at", ["last", "after"])
@pytest.mark.parametrize("holes", ["carry", "decay"])
def test_kl_gae_is_kl_estimate_then_gae_then_whiten(score_at: str, holes: str) -> None:
    logprobs, ref_logprobs, mask = batch(12, 6, 9)
    values, scores, bootstrap = batch(13, 6, 9)[0], torch.arange(6.0).double(), torch.linspace(-2, 2, 6).double()
    recursion: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "holes": holes, "bootstrap": bootstrap}
    clamps: dict[str, Any] = {"kl_clamp_diff": (-1.0, 0.5), "kl_clamp_value": 0.7}
    options: dict[str, Any] = {"kl_coef": 0.3, "score_at": score_at, **clamps}
    shaped = kl_gae(scores, logprobs, ref_logprobs, values, mask, **recursion, **options)
    kl = kl_estimate(logprobs, ref_logprobs, clamp_diff=(-1.0, 0.5), clamp_value=0.7)
    assert torch.equal(shaped.kl, kl.where(mask, 0)) and (kl == 0.5).any() and (kl == -0.7).any()
    advantages, returns = gae(shaped.rewards, values, shaped.value_mask, **recursion)
    assert torch.equal(shaped.returns, returns)
    assert torch.equal(shaped.advantages, whiten(advantages, mask))
    out = ShapedAdvantages(*torch.full((4, 6, 9), 7.0).double(), mask.clone())
    assert kl_gae(scores, logprobs, ref_logprobs, values, mask, **recursion, **options, out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out.tensors(), shaped.tensors(), strict=True))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("holes", ["carry", "decay"])
def test_masked_content_changes_no_bit(garbage: float, holes: str) -> None:
    logprobs, ref_logprobs, mask = batch(7, 5, 9, dtype=torch.float32)
    values, scores = batch(8, 5, 9, dtype=torch.float32)[0], torch.arange(5.0)

    def run(fill: float) -> list[Tensor]:
        x, y, z = (torch.where(mask, data, fill) for data in (logprobs, ref_logprobs, values))
        shaped = kl_gae(scores, x, y, z, mask, kl_coef=0.3, kl_kind="k3", holes=holes)
        outputs = [shaped.rewards, shaped.advantages, shaped.returns, shaped.kl]
        return [*outputs, whiten(x, mask), *gae(y, z, mask, holes=holes)]

    for clean, poisoned in zip(run(0.5), run(garbage), strict=True):
        assert torch.equal(clean, poisoned) and not poisoned[~mask].any()


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
def test_kl_kinds_match_oracle_and_differentiate(kind: str) -> None:
    logprobs, ref_logprobs, _ = batch(9, 2, 5)
    got = kl_estimate(logprobs, ref_logprobs, kind=kind)
    expected = [oracle.kl(a, b, kind) for a, b in zip(logprobs.flatten(), ref_logprobs.flatten(), strict=True)]
    np.testing.assert_allclose(got.flatten().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref_logprobs, kind=kind), logprobs.requires_grad_())


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_straight_through_takes_its_own_value_and_the_gradient_of_k2(kind: str) -> None:
    logprobs, ref_logprobs, _ = batch(10, 2, 5, dtype=torch.float32)
    logprobs.requires_grad_()
    straight = kl_estimate(logprobs, ref_logprobs, kind=f"{kind}+", clamp_diff=20.0, clamp_value=10.0)
    assert torch.equal(straight, kl_estimate(logprobs, ref_logprobs, kind=kind))
    k2 = kl_estimate(logprobs, ref_logprobs, kind="k2")
    assert torch.equal(*(torch.autograd.grad(x.sum(), logprobs)[0] for x in (straight, k2)))


def test_kl_clamps() -> None:
    d = torch.tensor([-30.0, -1.0, 30.0])
    clamped = kl_estimate(d, torch.zeros(3), kind="k3", clamp_diff=20.0, clamp_value=10.0)
    torch.testing.assert_close(clamped, torch.tensor([10.0, math.e - 2, 10.0]))
    one_sided = kl_estimate(d, torch.zeros(3), clamp_diff=(-10.0, None))
    assert torch.equal(one_sided, torch.tensor([-10.0, -1.0, 30.0]))


def test_k3_of_a_small_difference_keeps_its_digits() -> None:
    d = torch.tensor([1e-3, -1e-4])
    exact = [oracle.kl(x, 0.0, "k3") for x in d.tolist()]
    np.testing.assert_allclose(kl_estimate(d, torch.zeros(2), kind="k3").numpy(), exact, rtol=1e-3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps_mode", ["add", "max"])
def test_whiten_matches_oracle(center: bool, ddof: int, eps_mode: str) -> None:
    x, _, mask = batch(11, 4, 6)
    got = whiten(x, mask, center=center, ddof=ddof, eps=0.5, eps_mode=eps_mode)
    np.testing.assert_allclose(got.numpy(), oracle.whiten(x.numpy(), mask.numpy(), center, ddof, 0.5, eps_mode))
    everywhere = whiten(x, mask, center=center, ddof=ddof, eps=0.5, eps_mode=eps_mode, zero_masked=False)
    assert torch.equal(everywhere[mask], got[mask]) and everywhere[~mask].all()


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_of_nothing_of_one_and_of_equals(ddof: int) -> None:
    x = torch.full((20, 50), 0.1)  # a float32 mean of a thousand of these is not 0.1, and 1 / sqrt(eps) is 10,000
    for tokens in (0, 1, 1000):
        mask = (torch.arange(1000) < tokens).view(20, 50)
        assert torch.equal(whiten(x, mask, ddof=ddof), torch.zeros(20, 50))
    assert whiten(x.bfloat16(), x > 0).dtype == torch.float32


def test_whiten_two_tokens_by_hand_and_in_place() -> None:
    # mean 2, sum of squares 2: variance 1, or 2 with Bessel's correction
    x, mask = torch.tensor([1.0, 9.0, 3.0]), torch.tensor([T, F, T])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([-1.0, 0.0, 1.0]))
    bessel = torch.tensor([-(0.5**0.5), 0.0, 0.5**0.5])
    torch.testing.assert_close(whiten(x, mask, ddof=1), bessel)
    assert whiten(x, mask, ddof=1, out=x) is x
    torch.testing.assert_close(x, bessel)


def test_large_mean_does_not_eat_the_variance() -> None:
    x = torch.tensor([1e4 - 1, 1e4, 1e4 + 1])
    torch.testing.assert_close(whiten(x, torch.ones(3).bool()), torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5)
