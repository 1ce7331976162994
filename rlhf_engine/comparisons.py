"""Ratings -> head-to-head comparisons: which of two texts did people like better?

Raters use a scale differently, so two people's numbers compare badly, while one person's order of two texts compares
well. Comparisons by one rater (inside a block, where column k is one person) carry the clean signal; comparisons across
raters are noisier, and are what connects the blocks into one ranking.

Shapes: N texts, M comparisons, R all single ratings laid end to end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_engine.types import Comparisons, RatedTexts

MAX_ROUNDS = 200  # of redrawing rejected pairs: even 1 usable pair in 100 gets there


class RaterAgreement(NamedTuple):
    """Shares in [0, 1], exact ties dropped; NaN where the ratings allow no such sample."""

    rater_vs_others: float  # one rater's order of two texts against the mean of the other raters'
    rater_vs_rater: float  # one rater's order of two texts against another rater's order of the same two
    ceiling: float  # the other raters' means against two different raters' scalars, one per text: the grader of a model


@dataclass(slots=True)
class _Ratings:
    flat: Tensor  # (R,) float64, text after text
    start: Tensor  # (N,) int64: text t's ratings are flat[start[t] : start[t] + length[t]]
    length: Tensor  # (N,) int64
    total: Tensor  # (N,) float64, sum of a text's ratings
    block: Tensor  # (N,) int64, 0..number of blocks


@dataclass(slots=True)
class _Draw:
    """M pairs of texts and who rated them; columns count inside a text's own list. All (M,) int64."""

    a: Tensor
    b: Tensor
    column_a: Tensor
    column_b: Tensor

    def where(self, keep: Tensor) -> _Draw:
        return _Draw(self.a[keep], self.b[keep], self.column_a[keep], self.column_b[keep])


def sample_comparisons(rated: RatedTexts, count: int, *, same_rater: float, generator: torch.Generator) -> Comparisons:
    """Draws `count` matches between texts; the text rated higher wins, equal ratings are a tie (0.5).

    round(count * same_rater) of them take two texts of one block and the same column of both; the rest take any two
    texts and a rater of each, never the same person. Texts are drawn with equal chances, order is shuffled, texts
    without ratings get no match. Where no block has two rated texts, all matches are cross-rater: a UserWarning says
    so, and so does the `same_rater` field.

    Raises:
        ValueError: fewer than two rated texts, a share outside [0, 1], ratings that are not finite, or a kind of match
            that these ratings cannot give.
    """
    if count < 0 or not 0 <= same_rater <= 1:
        raise ValueError(
            f"sample_comparisons: count {count} must be at least 0 and same_rater {same_rater} lie between 0 and 1"
        )
    ratings = _flatten(rated)
    same = round(count * same_rater)
    if same and not _partners(ratings)[0].numel():
        if same_rater == 1:
            raise ValueError(
                "sample_comparisons: no block has two rated texts, so nobody saw two of them; lower same_rater to 0"
            )
        warnings.warn("no block has two rated texts: all comparisons are cross-rater", UserWarning, stacklevel=2)
        same = 0
    draws = [_draw_same_rater(ratings, same, generator), _draw_cross_rater(ratings, count - same, generator)]
    flags = torch.arange(count) < same
    shuffled = torch.randperm(count, generator=generator)
    return _judge(rated, ratings, _concatenate(draws).where(shuffled), flags[shuffled])


def human_pairs(rated: RatedTexts, count: int, generator: torch.Generator) -> Comparisons:
    """`count` cross-rater matches without ties, one random rater per text: what a reward model is graded against.

    Raises:
        ValueError: fewer than two rated texts, or (nearly) all ratings equal.
    """
    ratings = _flatten(rated)

    def differs(draw: _Draw) -> Tensor:
        return _score(ratings, draw.a, draw.column_a) != _score(ratings, draw.b, draw.column_b)

    draw = _draw_cross_rater(ratings, count, generator, differs)
    return _judge(rated, ratings, draw, torch.zeros(count, dtype=torch.bool))


def rater_agreement(rated: RatedTexts, generator: torch.Generator, samples: int = 100_000) -> RaterAgreement:
    """How far raters agree, each share from up to `samples` drawn pairs of texts; see RaterAgreement for the three.

    The first two compare texts inside a block, the third any texts. The sampled ratings are left out of every mean, so
    that nobody agrees with himself.
    """
    ratings = _flatten(rated)
    vs_others = vs_rater = float("nan")
    if _partners(ratings)[0].numel():
        draw = _draw_same_rater(ratings, samples, generator)
        own = _score(ratings, draw.a, draw.column_a) - _score(ratings, draw.b, draw.column_b)
        vs_others = _sign_agreement(own, _others_mean(ratings, draw))
        shared = torch.minimum(ratings.length[draw.a], ratings.length[draw.b])
        draw, own, shared = draw.where(shared > 1), own[shared > 1], shared[shared > 1]
        other_column = (draw.column_a + 1 + _below(shared - 1, generator)) % shared
        other = _score(ratings, draw.a, other_column) - _score(ratings, draw.b, other_column)
        vs_rater = _sign_agreement(own, other)
    draw = _draw_cross_rater(ratings, samples, generator)
    crossed = _score(ratings, draw.a, draw.column_a) - _score(ratings, draw.b, draw.column_b)
    return RaterAgreement(vs_others, vs_rater, _sign_agreement(crossed, _others_mean(ratings, draw)))


def _flatten(rated: RatedTexts) -> _Ratings:
    length = torch.tensor([len(r) for r in rated.ratings], dtype=torch.int64)
    if len(rated.ratings) != len(rated.texts) or len(rated.blocks) != len(rated.texts):
        raise ValueError(
            f"rated texts: {len(rated.texts)} texts need as many lists of ratings and blocks, got "
            f"{len(rated.ratings)} and {len(rated.blocks)}"
        )
    if (length > 0).sum() < 2:
        raise ValueError(f"rated texts: comparing takes two texts with ratings, got {int((length > 0).sum())}")
    flat = torch.tensor(list(chain.from_iterable(rated.ratings)), dtype=torch.float64)
    text_of = torch.repeat_interleave(torch.arange(len(length)), length)
    if not flat.isfinite().all():
        row = int(text_of[~flat.isfinite()][0])
        raise ValueError(f"rated texts: text {row} has ratings {rated.ratings[row]}; drop those that are not finite")
    total = torch.zeros(len(length), dtype=torch.float64).index_add_(0, text_of, flat)
    block = torch.unique(torch.tensor(rated.blocks, dtype=torch.int64), return_inverse=True)[1]
    return _Ratings(flat, length.cumsum(0) - length, length, total, block)


def _score(ratings: _Ratings, text: Tensor, column: Tensor) -> Tensor:
    return ratings.flat[ratings.start[text] + column]


def _below(bound: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform integer in [0, bound) per entry of bound (int64, >= 1)."""
    uniform = torch.rand(bound.shape, generator=generator, dtype=torch.float64)
    return torch.minimum((uniform * bound).long(), bound - 1)  # the product may round up to the bound itself


def _partners(ratings: _Ratings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rated texts whose block holds another one: (positions in `order`, order, first, size).

    `order` lists the rated texts block by block; position p's block takes order[first[p] : first[p] + size[p]].
    """
    rows = (ratings.length > 0).nonzero().squeeze(1)
    order = rows[torch.argsort(ratings.block[rows], stable=True)]
    size_of_block = torch.bincount(ratings.block[order], minlength=int(ratings.block.max()) + 1)
    first = (size_of_block.cumsum(0) - size_of_block)[ratings.block[order]]
    size = size_of_block[ratings.block[order]]
    return (size > 1).nonzero().squeeze(1), order, first, size


def _draw_same_rater(ratings: _Ratings, count: int, generator: torch.Generator) -> _Draw:
    positions, order, first, size = _partners(ratings)
    if count == 0:
        return _Draw(*(torch.zeros(0, dtype=torch.int64) for _ in range(4)))
    p = positions[torch.randint(len(positions), (count,), generator=generator)]
    q = first[p] + (p - first[p] + 1 + _below(size[p] - 1, generator)) % size[p]
    a, b = order[p], order[q]
    column = _below(torch.minimum(ratings.length[a], ratings.length[b]), generator)
    return _Draw(a, b, column, column)


def _draw_cross_rater(
    ratings: _Ratings, count: int, generator: torch.Generator, keep: Callable[[_Draw], Tensor] | None = None
) -> _Draw:
    """Any two texts and a rater of each; redraws the same person (block and column) and what `keep` refuses."""
    rows = (ratings.length > 0).nonzero().squeeze(1)
    kept: list[_Draw] = [_Draw(*(torch.zeros(0, dtype=torch.int64) for _ in range(4)))]
    missing = count
    for _ in range(MAX_ROUNDS):
        if missing <= 0:
            return _concatenate(kept).where(torch.arange(count))
        batch = missing + 64  # a few spare ones end the loop sooner
        p = torch.randint(len(rows), (batch,), generator=generator)
        q = (p + 1 + torch.randint(len(rows) - 1, (batch,), generator=generator)) % len(rows)
        a, b = rows[p], rows[q]
        draw = _Draw(a, b, _below(ratings.length[a], generator), _below(ratings.length[b], generator))
        draw = draw.where((ratings.block[a] != ratings.block[b]) | (draw.column_a != draw.column_b))
        kept.append(draw if keep is None else draw.where(keep(draw)))
        missing -= len(kept[-1].a)
    raise ValueError(
        f"comparisons: found {count - missing} of {count} matches between different raters"
        f"{'' if keep is None else ' with different ratings'}; these texts share one rater or one rating"
    )


def _concatenate(draws: list[_Draw]) -> _Draw:
    return _Draw(
        torch.cat([d.a for d in draws]), torch.cat([d.b for d in draws]),
        torch.cat([d.column_a for d in draws]), torch.cat([d.column_b for d in draws]),
    )  # fmt: skip


def _judge(rated: RatedTexts, ratings: _Ratings, draw: _Draw, same_rater: Tensor) -> Comparisons:
    difference = _score(ratings, draw.a, draw.column_a) - _score(ratings, draw.b, draw.column_b)
    return Comparisons(list(rated.texts), draw.a, draw.b, (difference.sign() + 1) / 2, same_rater, gap=difference.abs())


def _others_mean(ratings: _Ratings, draw: _Draw) -> Tensor:
    """(M,) mean rating of a minus that of b, each without the sampled rater; NaN where nobody else rated one."""
    mean_a = (ratings.total[draw.a] - _score(ratings, draw.a, draw.column_a)) / (ratings.length[draw.a] - 1)
    mean_b = (ratings.total[draw.b] - _score(ratings, draw.b, draw.column_b)) / (ratings.length[draw.b] - 1)
    return torch.where((ratings.length[draw.a] > 1) & (ratings.length[draw.b] > 1), mean_a - mean_b, torch.nan)


def _sign_agreement(x: Tensor, y: Tensor) -> float:
    """Share of equal signs; differences below 1e-9 (rounding of means) are ties, and those and NaN are dropped."""
    decided = (x.abs() > 1e-9) & (y.abs() > 1e-9)
    return float((x[decided].sign() == y[decided].sign()).double().mean()) if decided.any() else float("nan")
