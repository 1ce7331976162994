"""Rankings against hand-worked cases, against other programs, and against strengths that were planted.

Planted strengths are drawn afresh in every run; the seed stands in the message of a failure. The bounds leave five or
more standard deviations, so that a failure is news.
"""

from __future__ import annotations

import math
import os
import time

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kendalltau
from torch import Tensor

from rlhf_engine import ranking
from rlhf_engine.ranking import ELO_PER_LOG, elo, fit, table, win_probability
from rlhf_engine.types import Comparisons, Ranking

Z90 = 1.6448536


def matches(num_items: int, results: list[tuple[int, int, float]]) -> Comparisons:
    a, b, outcome = zip(*results, strict=True)
    return from_arrays(num_items, torch.tensor(a), torch.tensor(b), torch.tensor(outcome, dtype=torch.float64))


def from_arrays(num_items: int, a: Tensor, b: Tensor, outcome: Tensor) -> Comparisons:
    return Comparisons([f"item {i}" for i in range(num_items)], a, b, outcome, torch.zeros(len(a), dtype=torch.bool))


def play(theta: Tensor, count: int, generator: torch.Generator, nu: float = 0.0) -> Comparisons:
    """Matches between uniformly drawn items whose log-strengths are theta."""
    n = len(theta)
    a = torch.randint(n, (count,), generator=generator)
    b = (a + 1 + torch.randint(n - 1, (count,), generator=generator)) % n
    half = (theta[a] - theta[b]) / 2
    weights = torch.stack([half.exp(), torch.full_like(half, nu), (-half).exp()], dim=1)
    drawn = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return from_arrays(n, a, b, 1 - drawn.double() / 2)


def fresh() -> tuple[int, torch.Generator]:
    seed = int.from_bytes(os.urandom(4), "little")
    return seed, torch.Generator().manual_seed(seed)


def strengths(result: Ranking) -> np.ndarray:
    """Log-strengths, mean 0."""
    theta = ((result.elo - 1000) / ELO_PER_LOG).numpy()
    return theta - theta.mean()


@pytest.mark.parametrize("l2", [0.0, 0.02, 1.0])
def test_equals_choix(l2: float) -> None:
    """choix penalises alpha * sum t^2, we l2 / 2 * sum t^2, so alpha is l2 / 2."""
    import choix  # here, so that a machine without it can collect the tests of others

    generator = torch.Generator().manual_seed(11)
    played = play(torch.randn(15, generator=generator, dtype=torch.float64), 900, generator)
    a_won = played.outcome == 1
    pairs = torch.stack([played.a.where(a_won, played.b), played.b.where(a_won, played.a)], dim=1).tolist()
    ours = strengths(fit(played, l2=l2, interval="none"))
    theirs = choix.opt_pairwise(15, pairs, alpha=l2 / 2, tol=1e-10)
    np.testing.assert_allclose(ours, theirs - theirs.mean(), atol=1e-6)
    if l2 == 0:
        theirs = choix.ilsr_pairwise(15, pairs, alpha=0, tol=1e-10)
        np.testing.assert_allclose(ours, theirs - theirs.mean(), atol=1e-6)


def test_two_items_with_ties_by_hand() -> None:
    """Two items and three outcomes are fitted exactly: 8 : 2 gives odds of 4, and nu = ties / sqrt(wins * losses)."""
    result = fit(matches(2, [(0, 1, 1.0)] * 6 + [(1, 0, 0.0)] * 2 + [(1, 0, 1.0)] * 2 + [(0, 1, 0.5)] * 6), l2=0)
    assert result.tie == pytest.approx(6 / 4, abs=1e-6)
    assert float(result.elo[0] - result.elo[1]) == pytest.approx(400 * math.log10(4), abs=1e-4)
    assert win_probability(result, 0, 1) == pytest.approx(0.5, abs=1e-6)
    assert win_probability(result, 1, 0) == pytest.approx(0.125, abs=1e-6)
    half = fit(matches(2, [(0, 1, 1.0)] * 8 + [(0, 1, 0.0)] * 2 + [(0, 1, 0.5)] * 6), l2=0, ties="half")
    assert half.tie == 0 and win_probability(half, 0, 1) == pytest.approx(11 / 16, abs=1e-6)


def test_ties_against_an_independent_optimiser() -> None:
    """Davidson's probabilities as he wrote them, in strengths rather than logs, climbed by a derivative-free method."""
    generator = torch.Generator().manual_seed(5)
    played = play(torch.tensor([1.0, 0.3, 0.0, -1.2], dtype=torch.float64), 120, generator, nu=0.8)
    a, b, outcome = played.a.numpy(), played.b.numpy(), played.outcome.numpy()
    l2 = 0.4

    def loss(x: np.ndarray) -> float:
        p, nu = np.exp(x[:4]), np.exp(x[4])
        tie = nu * np.sqrt(p[a] * p[b])
        chance = np.where(outcome == 1, p[a], np.where(outcome == 0, p[b], tie)) / (p[a] + p[b] + tie)
        return float(-np.log(chance).sum() + l2 / 2 * (x[:4] ** 2).sum())

    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}
    found = minimize(loss, np.zeros(5), method="Nelder-Mead", options=options).x
    found = minimize(loss, found, method="Nelder-Mead", options=options).x
    result = fit(played, l2=l2, interval="none")
    np.testing.assert_allclose(strengths(result), found[:4] - found[:4].mean(), atol=1e-5)
    assert result.tie == pytest.approx(math.exp(found[4]), abs=1e-5)
    assert loss(np.append(strengths(result), math.log(result.tie))) <= loss(found) + 1e-9


def test_planted_order_is_recovered() -> None:
    """50 items, 200 games each. Steps of 16/49 log-units (57 Elo) give a mean tau of .977 with sd .0045.

    A bell of strengths N(0, 1.5^2) cannot pass .95: 200 games leave errors of .18, larger than the gaps in its middle.
    """
    for _ in range(3):
        seed, generator = fresh()
        theta = torch.linspace(-8, 8, 50, dtype=torch.float64)[torch.randperm(50, generator=generator)]
        result = fit(play(theta, 5000, generator), interval="none")
        tau = kendalltau(result.elo.numpy(), theta.numpy()).statistic
        assert tau >= 0.95, f"seed {seed}: tau {tau}"


def test_intervals_cover_what_they_say() -> None:
    """70 replications of 50 items, half of them with ties: 3500 intervals, of which 90% should hold the truth.

    The binomial spread is .005. The prior is weak (l2 .01): a strong one would shrink the strengths that are planted
    wider than it. Measured coverage is .905 (no interval is narrower than the model's own, hence a little above .9), so
    that the nearer bound is five spreads away.
    """
    seed, generator = fresh()
    hits = 0
    for replication in range(70):
        theta = 1.5 * torch.randn(50, generator=generator, dtype=torch.float64)
        truth = 1000 + ELO_PER_LOG * (theta - theta.mean())
        result = fit(play(theta, 1250, generator, nu=0.5 * (replication % 2)), l2=0.01)
        hits += int(((result.low <= truth) & (truth <= result.high)).sum())
    assert 0.87 <= hits / 3500 <= 0.93, f"seed {seed}: {hits} of 3500 covered"


def test_sandwich_and_bootstrap_agree() -> None:
    generator = torch.Generator().manual_seed(2)
    played = play(torch.randn(20, generator=generator, dtype=torch.float64), 1500, generator, nu=0.4)
    robust = fit(played, l2=0.05)
    resampled = fit(played, l2=0.05, interval="bootstrap", bootstrap_samples=100)
    ratio = (robust.high - robust.low) / (resampled.high - resampled.low)
    assert 0.9 < float(ratio.mean()) < 1.1 and 0.6 < float(ratio.min()) and float(ratio.max()) < 1.5
    assert torch.equal(robust.elo, resampled.elo)
    again = fit(played, l2=0.05, interval="bootstrap", bootstrap_samples=5, seed=4)
    assert torch.equal(again.low, fit(played, l2=0.05, interval="bootstrap", bootstrap_samples=5, seed=4).low)
    assert not torch.equal(again.low, fit(played, l2=0.05, interval="bootstrap", bootstrap_samples=5, seed=5).low)


def test_matches_of_a_group_are_drawn_together() -> None:
    """Every match four times over says no more than once, if the bootstrap knows."""
    generator = torch.Generator().manual_seed(3)
    once = play(torch.randn(6, generator=generator, dtype=torch.float64), 600, generator, nu=0.4)
    four = from_arrays(6, once.a.repeat(4), once.b.repeat(4), once.outcome.repeat(4))
    options = {"l2": 1e-3, "interval": "bootstrap", "bootstrap_samples": 300}
    told = fit(four, groups=10 * torch.arange(600).repeat(4), **options)
    width, blind, honest = (float((r.high - r.low).mean()) for r in (told, fit(four, **options), fit(once, **options)))
    assert width == pytest.approx(honest, rel=0.1) and width == pytest.approx(2 * blind, rel=0.15)
    assert torch.equal(fit(once, groups=torch.arange(600), **options).elo, fit(once, **options).elo)
    for groups, options_, words in (
        (torch.arange(600), {}, "groups need interval='bootstrap'"),
        (torch.arange(599), options, r"groups must be \(600,\) int64"),
        (torch.arange(600) - 1, options, "not negative"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(once, groups=groups, **options_)


def test_level_widens_and_none_gives_nan() -> None:
    played = matches(3, [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0), (0, 2, 1.0)] * 5)
    narrow, wide = fit(played, level=0.5), fit(played, level=0.99)
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert torch.allclose(ratio, torch.full_like(ratio, 2.5758293 / 0.6744898)) and wide.level == 0.99
    assert fit(played, interval="none").low.isnan().all()


def test_two_items_width_by_hand() -> None:
    """n matches at 3 : 1 without prior: var(d) = 1 / (n p (1 - p)), and either item moves half of d."""
    result = fit(matches(2, [(0, 1, 1.0)] * 75 + [(0, 1, 0.0)] * 25), l2=0)
    expected = 2 * Z90 * ELO_PER_LOG * 0.5 / math.sqrt(100 * 0.75 * 0.25)
    assert torch.allclose(result.high - result.low, torch.full((2,), expected, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize(("l2", "nu"), [(0.0, 0.0), (0.0, 0.7), (2.0, 0.7)])
def test_sandwich_against_autograd(l2: float, nu: float) -> None:
    """Hessian and single matches' scores by differentiation. Favourites that lose to the last make the scores large."""
    generator = torch.Generator().manual_seed(9)
    played = play(torch.linspace(2, -2, 5, dtype=torch.float64), 300, generator, nu)
    upset = (torch.minimum(played.a, played.b) == 0) & (torch.maximum(played.a, played.b) == 4)
    played.outcome = torch.where(upset, 1 - played.outcome, played.outcome)
    result = fit(played, l2=l2)
    log_nu = [math.log(result.tie)] if nu else []
    best = torch.tensor([*strengths(result), *log_nu], dtype=torch.float64)
    prior = l2 * torch.diag(torch.tensor([1.0] * 5 + [0.0] * len(log_nu), dtype=torch.float64))

    def losses(x: Tensor) -> Tensor:
        half = (x[played.a] - x[played.b]) / 2
        tie = x[5].expand_as(half) if nu else torch.full_like(half, -math.inf)
        chances = torch.stack([-half, tie, half], dim=1).log_softmax(1)
        return -chances.gather(1, (2 * played.outcome).long()[:, None]).squeeze(1)

    hessian = torch.autograd.functional.hessian(lambda x: losses(x).sum(), best) + prior
    scores = torch.autograd.functional.jacobian(losses, best)
    inverse = torch.linalg.pinv(hessian, hermitian=True)
    about_mean = torch.eye(5, len(best), dtype=torch.float64)
    about_mean[:, :5] -= 1 / 5
    robust = (about_mean @ inverse @ (scores.T @ scores + prior) @ inverse @ about_mean.T).diagonal()
    model = (about_mean @ inverse @ about_mean.T).diagonal()
    assert (robust > 1.05 * model).any()
    expected = 2 * Z90 * ELO_PER_LOG * torch.maximum(robust, model).sqrt()
    assert torch.allclose(result.high - result.low, expected, rtol=1e-5)


@pytest.mark.parametrize("interval", ["sandwich", "bootstrap"])
def test_not_connected_is_said_in_words(interval: str) -> None:
    triangle = [(0, 1, 1.0), (0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0), (0, 2, 1.0), (0, 2, 1.0)] * 40
    pair = [(3, 4, 1.0), (4, 3, 1.0), (4, 3, 1.0)] * 50
    result = fit(matches(5, triangle + pair), interval=interval, bootstrap_samples=60)
    words = [w for w in result.warnings if "not connected" in w]
    assert len(words) == 1 and "2 groups" in words[0]
    assert "3 items: 'item 0', 'item 1', 'item 2'" in words[0] and "2 items: 'item 3', 'item 4'" in words[0]
    assert result.component.tolist() == [0, 0, 0, 3, 3]
    with pytest.raises(ValueError, match="no chain of matches joins 'item 0' and 'item 4'"):
        win_probability(result, 0, 4)
    # Many matches fix the differences inside a group to some 30 Elo; the groups' distance stays as open as the prior.
    assert float((result.high - result.low).min()) > 500
    free = fit(matches(5, triangle + pair), l2=0)
    assert float((free.high - free.low).max()) < 100  # without a prior every group has its own mean of 1000 ...
    assert float(free.elo[:3].mean()) == pytest.approx(1000) and float(free.elo[3:].mean()) == pytest.approx(1000)
    joined = fit(matches(5, triangle + pair + [(0, 3, 1.0), (3, 0, 1.0)]))
    assert joined.warnings == [] and len(set(joined.component.tolist())) == 1


def test_components_of_a_long_chain_and_many_groups() -> None:
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    links = [(int(order[i]), int(order[i + 1]), 1.0) for i in range(1999) if i != 999]
    result = fit(matches(2000, links), method="elo", interval="none")
    groups = torch.unique(result.component[order[:1000]]), torch.unique(result.component[order[1000:]])
    assert len(groups[0]) == len(groups[1]) == 1 and groups[0] != groups[1]
    many = fit(matches(20, [(i, i + 1, 1.0) for i in range(0, 20, 2)]))
    assert "10 groups" in many.warnings[0] and "; ..." in many.warnings[0]


def test_items_without_matches_stay_at_the_prior() -> None:
    played = [(0, 1, 1.0), (1, 0, 1.0), (1, 2, 1.0), (2, 0, 1.0)]
    result = fit(matches(5, played), l2=0.25)
    assert any("2 of 5 items played no match" in w and "'item 3', 'item 4'" in w for w in result.warnings)
    assert not any("not connected" in w for w in result.warnings)
    assert result.elo[3:].tolist() == [1000.0, 1000.0] and result.games.tolist() == [3, 3, 2, 0, 0]
    # The prior's sd is 2 log-units; seen from the mean of 5 items its variance loses a fifth.
    expected = 2 * Z90 * ELO_PER_LOG * 2 * math.sqrt(4 / 5)
    assert float(result.high[3] - result.low[3]) == pytest.approx(expected, rel=1e-6)
    assert fit(matches(5, played), l2=0).high[3] == math.inf


def test_unbeaten_is_finite_with_a_prior_and_refused_without() -> None:
    played = matches(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0), (2, 1, 1.0)] * 10)
    result = fit(played)
    assert result.elo.isfinite().all() and result.elo.argmax() == 0
    # It won all 20, so that its place is known from below only; residuals near 0 must not make it look certain.
    assert (result.high - result.low)[0] > 1.5 * (result.high - result.low)[1:].max()
    with pytest.raises(ValueError, match="set l2 > 0"):
        fit(played, l2=0)
    with pytest.raises(ValueError, match="resamples"):
        fit(matches(2, [(0, 1, 1.0), (0, 1, 0.0)]), l2=0, interval="bootstrap")


def test_a_tie_does_not_make_a_maximum() -> None:
    """One win and one tie: nu and the difference would grow together for ever; half a win is enough for "half"."""
    played = matches(2, [(0, 1, 1.0), (0, 1, 0.5)])
    with pytest.raises(ValueError, match="set l2 > 0"):
        fit(played, l2=0)
    assert win_probability(fit(played, l2=0, ties="half"), 0, 1) == pytest.approx(0.75, abs=1e-6)


def test_a_million_battles_take_seconds() -> None:
    seed, generator = fresh()
    theta = torch.randn(200, generator=generator, dtype=torch.float64)
    played = play(theta, 1_000_000, generator, nu=0.5)
    start = time.process_time()  # CPU seconds: others on the machine do not count
    result = fit(played)
    seconds = time.process_time() - start
    assert seconds < 10, f"{seconds:.1f} s"
    error = strengths(result) - (theta - theta.mean()).numpy()
    assert np.abs(error).max() < 0.15 and abs(result.tie - 0.5) < 0.02, f"seed {seed}"


def test_order_and_sides_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    played = play(torch.randn(12, generator=generator, dtype=torch.float64), 400, generator, nu=0.6)
    shuffled, swap = torch.randperm(400, generator=generator), torch.rand(400, generator=generator) < 0.5
    a, b, outcome = played.a[shuffled], played.b[shuffled], played.outcome[shuffled]
    turned = from_arrays(12, torch.where(swap, b, a), torch.where(swap, a, b), torch.where(swap, 1 - outcome, outcome))
    for interval in ("sandwich", "bootstrap"):
        one, two = (fit(p, interval=interval, bootstrap_samples=5) for p in (played, turned))
        assert torch.equal(one.elo, two.elo) and torch.equal(one.low, two.low) and one.tie == two.tie


def test_many_items_use_the_diagonal_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    played = play(torch.randn(60, generator=generator, dtype=torch.float64), 3000, generator, nu=0.3)
    exact = fit(played)
    monkeypatch.setattr(ranking, "DENSE_LIMIT", 59)
    quick = fit(played)
    ratio = (quick.high - quick.low) / (exact.high - exact.low)
    assert 0.9 < float(ratio.min()) and float(ratio.max()) < 1.1
    assert any("more than 59 items" in w for w in quick.warnings) and exact.warnings == []


def test_no_convergence_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MAX_ITERATIONS", 1)
    generator = torch.Generator().manual_seed(6)
    result = fit(play(torch.randn(10, generator=generator, dtype=torch.float64), 300, generator))
    assert any("did not converge" in w for w in result.warnings)


def test_online_elo_by_hand() -> None:
    """1000 each: A wins, +16. Then B (984) beats A (1016), of whom 0.5459 was expected: 32 * 0.5459 = 17.4695 move."""
    played = matches(2, [(0, 1, 1.0), (1, 0, 1.0)])
    result = fit(played, method="elo", interval="none")
    assert result.elo.tolist() == pytest.approx([998.530498, 1001.469502], abs=1e-5)
    assert result.low.isnan().all() and result.games.tolist() == [2, 2] and result.warnings == []
    assert elo(matches(2, [(0, 1, 1.0)]), k=10).elo.tolist() == [1005.0, 995.0]
    assert elo(matches(2, [(0, 1, 0.5)])).elo.tolist() == [1000.0, 1000.0]
    assert "no intervals" in fit(played, method="elo").warnings[0]


def test_all_ties_have_an_answer() -> None:
    result = fit(matches(3, [(0, 1, 0.5), (1, 2, 0.5)]))
    assert result.elo.tolist() == [1000.0] * 3 and result.tie == math.inf and result.low.isnan().all()
    assert "every match was a tie" in result.warnings[0] and win_probability(result, 0, 2) == 0.0


def test_bootstrap_survives_resamples_of_ties_only() -> None:
    result = fit(matches(2, [(0, 1, 1.0), (0, 1, 0.5), (0, 1, 0.5)]), interval="bootstrap", bootstrap_samples=50)
    assert result.low.isfinite().all() and result.high.isfinite().all()


def test_table_and_win_probability() -> None:
    result = fit(matches(3, [(0, 1, 0.0), (1, 2, 1.0), (2, 0, 1.0), (1, 0, 1.0), (0, 2, 1.0)] * 4))
    rows = table(result)
    assert [row["rank"] for row in rows] == [1, 2, 3] and rows[0]["item"] == "item 1"
    assert rows == sorted(rows, key=lambda row: -row["elo"]) and len(table(result, top=2)) == 2
    assert list(rows[0]) == ["rank", "item", "elo", "low", "high", "games"] and rows[0]["games"] == 12
    assert sum(row["elo"] for row in rows) == pytest.approx(3000)
    assert win_probability(result, 0, 1) + win_probability(result, 1, 0) == pytest.approx(1)
    result.elo = torch.tensor([1400.0, 1000.0, -1e6], dtype=torch.float64)
    assert win_probability(result, 0, 1) == pytest.approx(10 / 11)  # 400 points are odds of 10 : 1
    assert win_probability(result, 0, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("items", "a", "b", "outcome", "words"),
    [
        (1, [], [], [], "no comparisons of these 1 items"),
        (1, [0], [0], [1.0], "match 0 sets an item against itself"),
        (2, [0, 0], [1, 2], [1.0, 1.0], "hold 0..2, but must index 2 items"),
        (2, [0, -1], [1, 1], [1.0, 1.0], "hold -1..1"),
        (2, [0], [1], [0.7], "got 0.7"),
        (2, [0], [1], [math.nan], "got nan"),
        (2, [0], [1], [1.0, 0.0], "1, 1, 2 entries"),
    ],
)
@pytest.mark.parametrize("method", ["bradley-terry", "elo"])
def test_malformed_matches_are_named(
    items: int, a: list[int], b: list[int], outcome: list[float], words: str, method: str
) -> None:
    sides = torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)
    played = from_arrays(items, *sides, torch.tensor(outcome, dtype=torch.float64))
    with pytest.raises(ValueError, match=words):
        fit(played, method=method)


@pytest.mark.parametrize(
    "options", [{"method": "glicko"}, {"ties": "drop"}, {"interval": "yes"}, {"l2": -1.0}, {"level": 1.0}]
)
def test_unknown_options_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match="ranking: "):
        fit(matches(2, [(0, 1, 1.0)]), **options)
