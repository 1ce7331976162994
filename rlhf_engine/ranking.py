"""Comparisons -> strengths of items on the Elo scale, with intervals.

Every item has a log-strength t. With d = t_i - t_j and L = log(exp(d/2) + exp(-d/2) + nu),

    log P(i wins) = d/2 - L      log P(j wins) = -d/2 - L      log P(tie) = log nu - L

which is Bradley & Terry (1952) for nu = 0 and Davidson (1970) otherwise. Strengths and log nu maximise the likelihood
minus l2/2 * sum t^2, a concave function (Hunter 2004 says when the maximum exists); Elo = 1000 + 400/ln(10) * t.
Matches count as independent of each other: where one rating decides many of them, the intervals are too narrow, unless
the bootstrap is told which matches belong together.

Shapes: n items, M matches, P pairs of items that met.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_engine.types import Comparisons, Ranking

ELO_PER_LOG = 400 / math.log(10)
MEAN_ELO = 1000.0
DENSE_LIMIT = 4000  # items up to which the sandwich inverts the whole Hessian: 10 s and 0.7 GB on one core there
MAX_ITERATIONS = 1000
WARN_GRADIENT = 1e-4  # in standard errors of an item; rounding leaves 1e-7 to 1e-6


@dataclass(slots=True)
class _Pairs:
    """Matches added up per pair, so that a million of them among few items cost little; the same for any order."""

    lo: Tensor  # (P,) int64, lo < hi
    hi: Tensor  # (P,) int64
    counts: Tensor  # (P, 3) float64: lo won, tie, hi won
    cell: Tensor  # (M,) int64: which of the 3P counts a match went to
    group: Tensor  # (M,) int64: what the bootstrap draws a match with; without groups, its place in sorted order


@dataclass(slots=True)
class _Fit:
    theta: Tensor  # (n,) float64 log-strengths
    log_nu: Tensor  # () float64; -inf: no tie term
    gradient: float  # largest entry left, in standard errors


def fit(
    comparisons: Comparisons,
    *,
    method: Literal["bradley-terry", "elo"] = "bradley-terry",
    l2: float = 0.1,
    ties: Literal["davidson", "half"] = "davidson",
    interval: Literal["sandwich", "bootstrap", "none"] = "sandwich",
    level: float = 0.9,
    bootstrap_samples: int = 200,
    groups: Tensor | None = None,
    seed: int = 0,
) -> Ranking:
    """Ranks items by maximum likelihood, or by online Elo updates in the order of the matches.

    Args:
        comparisons: the matches.
        method: "bradley-terry", or "elo" (see `elo`; no intervals, and the arguments below do not apply).
        l2: precision of the Gaussian prior on each log-strength (sd 1/sqrt(l2); 0.1 is 549 Elo points).
        ties: "davidson" fits nu besides; "half" counts a tie as half a win for either side.
        interval: "sandwich" (robust, Huber 1967), "bootstrap" (refits on resampled matches) or "none". Both count the
            prior as one more observation per item: few games give an interval as wide as the prior says.
        level: coverage that the intervals aim at.
        bootstrap_samples: refits of the bootstrap.
        groups: (M,) int64 >= 0, for the bootstrap: matches of one group (all that an answer played) are drawn together.
        seed: of the bootstrap.

    Raises:
        ValueError: no matches, malformed matches, or l2 = 0 where the likelihood has no maximum.
    """
    _check_options(method, l2, ties, interval, level)
    if method == "elo":
        ranking = elo(comparisons)
        if interval != "none":
            ranking.warnings.append("online Elo gives no intervals; use method='bradley-terry' for them")
        return ranking
    _check_matches(comparisons)
    if groups is not None:
        _check_groups(groups, len(comparisons), interval)
    pairs, ranking = _add_up(comparisons, groups), _blank(comparisons, level)
    davidson = ties == "davidson"
    if not pairs.counts[:, [0, 2]].any():
        ranking.tie = math.inf if davidson else 0.0
        ranking.warnings.append("every match was a tie: all items are rated equal, and there are no intervals")
        return ranking
    if l2 == 0:
        _check_maximum_exists(pairs, ranking.component, davidson, interval)
    best = _maximise(pairs, pairs.counts, len(comparisons.items), l2, davidson)
    if best.gradient > WARN_GRADIENT:
        ranking.warnings.append(
            f"the fit did not converge: a gradient of {best.gradient:.1e} standard errors is left; set a larger l2"
        )
    best.theta -= _group_mean(best.theta, ranking.component)  # l2 > 0 does so by itself, l2 = 0 leaves it open
    ranking.elo = MEAN_ELO + ELO_PER_LOG * best.theta
    ranking.tie = float(best.log_nu.exp())
    if interval == "sandwich":
        half_width = NormalDist().inv_cdf(0.5 + level / 2) * ELO_PER_LOG * _sandwich(pairs, best, l2, ranking).sqrt()
        ranking.low, ranking.high = ranking.elo - half_width, ranking.elo + half_width
    elif interval == "bootstrap":
        ranking.low, ranking.high = _bootstrap(pairs, best, l2, davidson, level, bootstrap_samples, seed)
    return ranking


def elo(comparisons: Comparisons, *, k: float = 32.0) -> Ranking:
    """Online Elo (Elo 1978): after each match, in order, either rating moves by k * (outcome - expected outcome).

    All start at 1000. Cheap and always up to date, but it depends on the order and forgets: for a live board only.
    """
    _check_matches(comparisons)
    rating = [MEAN_ELO] * len(comparisons.items)
    for a, b, outcome in zip(comparisons.a.tolist(), comparisons.b.tolist(), comparisons.outcome.tolist(), strict=True):
        gap = min(max(rating[b] - rating[a], -4000.0), 4000.0)  # odds of 10^10; further out the power may overflow
        change = k * (outcome - 1 / (1 + 10 ** (gap / 400)))
        rating[a] += change
        rating[b] -= change
    ranking = _blank(comparisons, 0.9)
    ranking.elo = torch.tensor(rating, dtype=torch.float64)
    return ranking


def table(ranking: Ranking, top: int | None = None) -> list[dict[str, Any]]:
    """Rows with rank (from 1), item, elo, low, high, games, best first; `top` keeps that many."""
    order = torch.argsort(ranking.elo, descending=True, stable=True).tolist()[:top]
    elo_, low, high, games = (x.tolist() for x in (ranking.elo, ranking.low, ranking.high, ranking.games))
    return [
        {"rank": rank, "item": ranking.items[i], "elo": elo_[i], "low": low[i], "high": high[i], "games": games[i]}
        for rank, i in enumerate(order, start=1)
    ]


def win_probability(ranking: Ranking, i: int, j: int) -> float:
    """P(item i beats item j); a tie takes what this and P(j beats i) leave.

    Raises:
        ValueError: no chain of matches joins the two.
    """
    if ranking.component[i] != ranking.component[j]:
        raise ValueError(
            f"win_probability: no chain of matches joins {_name(ranking.items[i])} and {_name(ranking.items[j])}; "
            "compare items of one component"
        )
    half = min(max(float(ranking.elo[i] - ranking.elo[j]) / ELO_PER_LOG / 2, -300.0), 300.0)  # exp stays finite
    return math.exp(half) / (math.exp(half) + math.exp(-half) + ranking.tie)


def _check_options(method: str, l2: float, ties: str, interval: str, level: float) -> None:
    choices = (("method", method, ("bradley-terry", "elo")), ("ties", ties, ("davidson", "half")),
               ("interval", interval, ("sandwich", "bootstrap", "none")))  # fmt: skip
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"ranking: {name} {value!r} is unknown; choose from {', '.join(allowed)}")
    if not (0 <= l2 < math.inf and 0 < level < 1):
        raise ValueError(f"ranking: needs a finite l2 >= 0 and a level in (0, 1), got l2 {l2} and level {level}")


def _check_matches(comparisons: Comparisons) -> None:
    a, b, outcome, n = comparisons.a, comparisons.b, comparisons.outcome, len(comparisons.items)
    if not a.shape == b.shape == outcome.shape:
        raise ValueError(f"ranking: a, b and outcome have {len(a)}, {len(b)}, {len(outcome)} entries; make them equal")
    if not len(a):
        raise ValueError(f"ranking: there are no comparisons of these {n} items; a ranking needs at least one")
    lowest, highest = int(min(a.min(), b.min())), int(max(a.max(), b.max()))
    if lowest < 0 or highest >= n:
        raise ValueError(f"ranking: a and b hold {lowest}..{highest}, but must index {n} items: 0..{n - 1}")
    if (a == b).any():
        raise ValueError(f"ranking: match {int((a == b).nonzero()[0])} sets an item against itself; drop such matches")
    known = (outcome == 0) | (outcome == 0.5) | (outcome == 1)
    if not known.all():
        raise ValueError(f"ranking: outcomes must be 0, 0.5 or 1, got {float(outcome[~known][0])}; round them")


def _check_groups(groups: Tensor, matches: int, interval: str) -> None:
    if interval != "bootstrap":
        raise ValueError(f"ranking: groups need interval='bootstrap', got {interval!r}")
    if groups.shape != (matches,) or groups.dtype != torch.int64 or int(groups.min()) < 0:
        raise ValueError(
            f"ranking: groups must be ({matches},) int64 and not negative, got {tuple(groups.shape)} {groups.dtype}"
        )


def _add_up(comparisons: Comparisons, groups: Tensor | None) -> _Pairs:
    n = len(comparisons.items)
    swap = comparisons.a > comparisons.b
    lo, hi = torch.minimum(comparisons.a, comparisons.b), torch.maximum(comparisons.a, comparisons.b)
    won = torch.where(swap, 1 - comparisons.outcome, comparisons.outcome)
    key, pair = torch.unique(lo * n + hi, return_inverse=True)
    cell = pair * 3 + (2 - 2 * won).round().long()
    if groups is None:  # sorted, so that the same seed draws the same matches whatever their order
        cell, groups = cell.sort().values, torch.arange(len(cell))
    else:
        groups = torch.unique(groups, return_inverse=True)[1]
    counts = torch.bincount(cell, minlength=3 * len(key)).double().view(-1, 3)
    return _Pairs(key // n, key % n, counts, cell, groups)


def _maximise(
    pairs: _Pairs, counts: Tensor, n: int, l2: float, davidson: bool,
    centre: Tensor | None = None, start: Tensor | None = None, tolerance: float = 1e-7,
) -> _Fit:  # fmt: skip
    """Maximum by LBFGS. `counts` (P, 3) may be a resample, `centre` (n,) is the prior's mean (0), `start` a theta.

    Every coordinate is scaled by its rough standard error, which makes the Hessian's diagonal about 1: items with ten
    and with ten thousand games then converge together, and the gradient reads in standard errors.
    """
    played, tied = counts.sum(1), counts[:, 1]
    net = (counts[:, 0] - counts[:, 2]) / 2
    with_nu = davidson and bool(tied.any())
    centre = torch.zeros(n, dtype=torch.float64) if centre is None else centre
    start = centre if start is None else start
    # With equal strengths a tie has chance nu / (2 + nu), so this is the answer if all are equal; log 0 is -inf.
    first_nu = (2 * tied.sum() / (played - tied).sum() * with_nu).log()
    scale = (_per_item(pairs, played, played, n) / 4 + l2).clamp_min(1e-12).rsqrt()
    if with_nu:
        start, scale = torch.cat([start, first_nu[None]]), torch.cat([scale, tied.sum().rsqrt()[None]])
    x = (start / scale).requires_grad_()

    def closure() -> Tensor:
        z = x.detach() * scale
        theta, log_nu = z[:n], z[n] if with_nu else first_nu
        d = theta[pairs.lo] - theta[pairs.hi]
        log_p, log_total = _log_chances(d, log_nu)
        pull = played * (log_p[:, 0].exp() - log_p[:, 2].exp()) / 2 - net
        gradient = _per_item(pairs, pull, -pull, n) + l2 * (theta - centre)
        loss = (played * log_total - net * d).sum() + l2 / 2 * (theta - centre).square().sum()
        if with_nu:
            loss = loss - tied.sum() * log_nu
            gradient = torch.cat([gradient, ((played * log_p[:, 1].exp()).sum() - tied.sum())[None]])
        x.grad = gradient * scale
        return loss

    optimiser = torch.optim.LBFGS(
        [x], max_iter=MAX_ITERATIONS, history_size=20, tolerance_grad=tolerance, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimiser.step(closure)
    closure()
    assert x.grad is not None
    z = x.detach() * scale
    return _Fit(z[:n], z[n] if with_nu else first_nu, float(x.grad.abs().max()))


def _log_chances(d: Tensor, log_nu: Tensor) -> tuple[Tensor, Tensor]:
    """(P, 3) log-probabilities of win, tie, loss at strength differences d (P,), and L (P,)."""
    scores = torch.stack([d / 2, log_nu.expand_as(d), -d / 2], dim=1)
    log_total = scores.logsumexp(1)
    return scores - log_total[:, None], log_total


def _per_item(pairs: _Pairs, to_lo: Tensor, to_hi: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=to_lo.dtype).index_add_(0, pairs.lo, to_lo).index_add_(0, pairs.hi, to_hi)


def _sandwich(pairs: _Pairs, best: _Fit, l2: float, ranking: Ranking) -> Tensor:
    """(n,) variances of the log-strengths seen from the items' mean: the diagonal of H^-1 (G + l2 I) H^-1.

    H is the Hessian of the penalised likelihood in (t, log nu), G the sum over matches of the outer product of their
    scores. The l2 in the middle is the variance of the prior's score: without it an item nobody played would come out
    as known exactly. No variance is taken below the model's own, H^-1: the residuals of an item that won everything
    are nearly 0, which says nothing of how well it is known. Past DENSE_LIMIT items only the diagonals are used.
    """
    n = len(ranking.items)
    hessian, middle = _information(pairs, best)
    if n > DENSE_LIMIT:
        ranking.warnings.append(
            f"intervals of more than {DENSE_LIMIT} items leave out that opponents' strengths are estimates too: a few "
            "percent too narrow where items met many opponents, more in sparse sets; use interval='bootstrap' for those"
        )
        h, g = (_per_item(pairs, m[0], m[0], n) + l2 for m in (hessian, middle))
        variance = torch.maximum(g, h) / h.square()
    else:
        h, g = (_matrix(pairs, m, n, math.isfinite(best.log_nu)) for m in (hessian, middle))
        h.diagonal()[:n] += l2
        g.diagonal()[:n] += l2
        # Without a prior H is singular along "all items of a component move together": fill that in, take it out again.
        together = (ranking.component[:, None] == ranking.component[None, :]).double() * (l2 == 0)
        together /= together.sum(1, keepdim=True).clamp_min(1)
        h[:n, :n] += together
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        inverse[:n, :n] -= together
        robust = _about_mean((inverse @ g * inverse).sum(1)[:n], inverse[:n] @ (g @ inverse[:, :n].mean(1)))
        model = _about_mean(inverse.diagonal()[:n], inverse[:n, :n].mean(1))
        variance = torch.maximum(robust, model)
    return torch.where((ranking.games == 0) & (l2 == 0), math.inf, variance)


def _about_mean(variance: Tensor, with_mean: Tensor) -> Tensor:
    """Variances (n,) of x - mean(x), from those of x and the covariances (n,) of x with mean(x)."""
    return variance - 2 * with_mean + with_mean.mean()


def _information(pairs: _Pairs, best: _Fit) -> tuple[Tensor, Tensor]:
    """Per pair the (dd, d nu, nu nu) entries of the Hessian and of the summed squared scores, (3, P) either."""
    log_p, _ = _log_chances(best.theta[pairs.lo] - best.theta[pairs.hi], best.log_nu)
    p, played = log_p.exp(), pairs.counts.sum(1)
    lean = (p[:, 0] - p[:, 2]) / 2
    hessian = torch.stack([
        played * ((p[:, 0] + p[:, 2]) / 4 - lean.square()), -played * lean * p[:, 1], played * p[:, 1] * (1 - p[:, 1])
    ])  # fmt: skip
    score_d = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64) - lean[:, None]
    score_nu = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64) - p[:, 1:2]
    products = torch.stack([score_d * score_d, score_d * score_nu, score_nu * score_nu])
    return hessian, (products * pairs.counts).sum(2)


def _matrix(pairs: _Pairs, entries: Tensor, n: int, with_nu: bool) -> Tensor:
    """Dense symmetric (n, n), or (n + 1, n + 1) with log nu last, from per-pair (dd, d nu, nu nu) entries (3, P)."""
    size = n + with_nu
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[pairs.lo, pairs.hi] = -entries[0]
    matrix[pairs.hi, pairs.lo] = -entries[0]
    matrix.diagonal()[:n] = _per_item(pairs, entries[0], entries[0], n)
    if with_nu:
        matrix[n, :n] = matrix[:n, n] = _per_item(pairs, entries[1], -entries[1], n)
        matrix[n, n] = entries[2].sum()
    return matrix


def _bootstrap(
    pairs: _Pairs, best: _Fit, l2: float, davidson: bool, level: float, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Percentile intervals, (n,) low and high in Elo, of refits to resampled groups and a resampled prior mean."""
    generator = torch.Generator().manual_seed(seed)
    n, groups = len(best.theta), int(pairs.group.max()) + 1
    refits = torch.zeros(samples, n, dtype=torch.float64)
    for row in refits:
        times = torch.bincount(torch.randint(groups, (groups,), generator=generator), minlength=groups).double()
        counts = torch.bincount(pairs.cell, times[pairs.group], minlength=pairs.counts.numel()).view(-1, 3)
        centre = torch.randn(n, generator=generator, dtype=torch.float64) / math.sqrt(l2)
        if counts[:, [0, 2]].any():
            row += _maximise(pairs, counts, n, l2, davidson, centre, best.theta, tolerance=1e-3).theta
        else:
            row += centre  # only ties were drawn, which say nothing of strengths once nu is free
    refits = MEAN_ELO + ELO_PER_LOG * (refits - refits.mean(1, keepdim=True))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(refits, tails, dim=0)
    return low, high


def _blank(comparisons: Comparisons, level: float) -> Ranking:
    """All that does not depend on the method: games, components, and what to warn of."""
    n = len(comparisons.items)
    games = torch.bincount(torch.cat([comparisons.a, comparisons.b]), minlength=n)
    component = _components(comparisons.a, comparisons.b, n)
    nan = torch.full((n,), math.nan, dtype=torch.float64)
    elo_start = torch.full((n,), MEAN_ELO, dtype=torch.float64)
    ranking = Ranking(list(comparisons.items), elo_start, nan, nan.clone(), games, 0.0, component, level)
    idle = (games == 0).nonzero().squeeze(1).tolist()
    if idle:
        ranking.warnings.append(
            f"{len(idle)} of {n} items played no match and stand at {MEAN_ELO:.0f}: {_names(ranking, idle)}"
        )
    groups = torch.unique(component[games > 0], return_counts=True)
    if len(groups[0]) > 1:
        largest = groups[0][torch.argsort(groups[1], descending=True, stable=True)][:3].tolist()
        shown = [(component == c).nonzero().squeeze(1).tolist() for c in largest]
        ranking.warnings.append(
            f"these items are not connected: {len(groups[0])} groups have no match between them ("
            + "; ".join(f"{len(rows)} items: {_names(ranking, rows)}" for rows in shown)
            + ("; ..." if len(groups[0]) > 3 else "")
            + "), so Elo compares items of one group only"
        )
    return ranking


def _components(a: Tensor, b: Tensor, n: int) -> Tensor:
    """(n,) int64: the smallest item index in each item's connected component, by label propagation with jumps."""
    label = torch.arange(n)
    while True:
        low = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, torch.cat([a, b]), torch.cat([low, low]), "amin")
        new = torch.minimum(new, new[new])
        if torch.equal(new, label):
            return label
        label = new


def _check_maximum_exists(pairs: _Pairs, component: Tensor, davidson: bool, interval: str) -> None:
    """Without a prior, every group of items must have beaten someone outside it, and been beaten (Ford 1957).

    Half a win counts as either. With nu free a tie counts as neither (Davidson 1970): nu and the difference could grow
    together for ever.
    """
    wins, draws, losses = (pairs.counts > 0).unbind(1)
    if davidson:
        draws = torch.zeros_like(draws)
    winner = torch.cat([pairs.lo[wins | draws], pairs.hi[losses | draws]])
    loser = torch.cat([pairs.hi[wins | draws], pairs.lo[losses | draws]])
    roots = component == torch.arange(len(component))
    if not (_reached(winner, loser, roots) & _reached(loser, winner, roots)).all():
        raise ValueError(
            "ranking: with l2=0 these matches fix no finite strengths (some items only won or only lost against the "
            "others); set l2 > 0, e.g. 0.1"
        )
    if interval == "bootstrap":
        raise ValueError(
            "ranking: interval='bootstrap' with l2=0 fails on resamples without finite strengths; set l2 > 0, e.g. 0.01"
        )


def _reached(source: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """(n,) bool: what the edges source -> target lead to from `start` (n,) bool."""
    while True:
        new = start.index_fill(0, target[start[source]], True)
        if torch.equal(new, start):
            return start
        start = new


def _group_mean(values: Tensor, component: Tensor) -> Tensor:
    """(n,) the mean of each item's component."""
    total = torch.zeros_like(values).index_add_(0, component, values)
    return (total / torch.bincount(component, minlength=len(values)).clamp_min(1))[component]


def _name(item: str) -> str:
    return repr(item if len(item) <= 40 else item[:37] + "...")


def _names(ranking: Ranking, rows: list[int]) -> str:
    return ", ".join(_name(ranking.items[i]) for i in rows[:3]) + (", ..." if len(rows) > 3 else "")
