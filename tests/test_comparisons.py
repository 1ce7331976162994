"""Comparisons drawn from ratings: who judged what, in which share, and how often people agree."""

from __future__ import annotations

import math
import time

import pytest
import torch

from rlhf_engine.comparisons import human_pairs, rater_agreement, sample_comparisons
from rlhf_engine.types import RatedTexts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def panel(num_blocks: int, texts: int, raters: int, *, bias: float, noise: float, seed: int = 0) -> RatedTexts:
    """Ratings = a text's worth + its rater's bias (one person per block and column) + noise."""
    draw = seeded(seed)
    blocks = [b for b in range(num_blocks) for _ in range(texts)]
    worth = torch.randn(len(blocks), 1, generator=draw, dtype=torch.float64)
    person = bias * torch.randn(num_blocks, raters, generator=draw, dtype=torch.float64)
    ratings = worth + person[blocks] + noise * torch.randn(len(blocks), raters, generator=draw, dtype=torch.float64)
    return RatedTexts([f"text {i}" for i in range(len(blocks))], ratings.tolist(), blocks)


def test_same_rater_matches_use_one_column_of_one_block() -> None:
    # Column k adds 1000 * k * (-1)^k, far more than the texts' 0..5: a match that mixes columns would not follow them.
    ratings = [[text + 1000.0 * k * (-1) ** k for k in range(4)] for text in range(6)]
    rated = RatedTexts([str(i) for i in range(12)], ratings * 2, [7] * 6 + [-3] * 6)
    drawn = sample_comparisons(rated, 5000, same_rater=1.0, generator=seeded())
    assert drawn.same_rater.all()
    assert torch.equal(drawn.a // 6, drawn.b // 6)
    assert torch.equal(drawn.outcome, (drawn.a > drawn.b).double())


def test_cross_rater_matches_never_ask_one_person_twice() -> None:
    # One block of two texts: only the column order decides, and equal columns (one person) would give ties.
    rated = RatedTexts(["x", "y"], [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [0, 0])
    drawn = sample_comparisons(rated, 2000, same_rater=0.0, generator=seeded())
    assert not drawn.same_rater.any()
    assert not (drawn.outcome == 0.5).any()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_share_count_and_order(share: float) -> None:
    rated = panel(20, 10, 5, bias=1.0, noise=1.0)
    drawn = sample_comparisons(rated, 10_000, same_rater=share, generator=seeded())
    assert len(drawn) == 10_000 and drawn.items == rated.texts
    assert int(drawn.same_rater.sum()) == round(10_000 * share)
    assert (drawn.a != drawn.b).all()
    assert abs(float(drawn.same_rater[:5000].double().mean()) - share) < 0.05  # shuffled, not one kind after the other
    blocks = torch.tensor(rated.blocks)
    assert ((blocks[drawn.a] == blocks[drawn.b]) | ~drawn.same_rater).all()
    # Uniform over texts: 20,000 places among 200 texts are 100 each, with a spread of 10.
    games = torch.bincount(torch.cat([drawn.a, drawn.b]), minlength=200).double()
    assert games.min() > 50 and games.max() < 160


def test_cross_rater_connects_blocks() -> None:
    rated = panel(4, 3, 2, bias=0.0, noise=1.0)
    drawn = sample_comparisons(rated, 4000, same_rater=0.0, generator=seeded())
    blocks = torch.tensor(rated.blocks)
    assert abs(float((blocks[drawn.a] != blocks[drawn.b]).double().mean()) - 18 / 20) < 0.05


def test_ties_are_kept_and_outcomes_follow_ratings() -> None:
    rated = RatedTexts(["low", "mid", "also mid", "high"], [[1.0] * 3, [2.0] * 3, [2.0] * 3, [3.0] * 3], [0, 0, 1, 1])
    drawn = sample_comparisons(rated, 3000, same_rater=0.5, generator=seeded())
    worth = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert torch.equal(drawn.outcome, ((worth[drawn.a] - worth[drawn.b]).sign().double() + 1) / 2)
    assert set(drawn.outcome.tolist()) == {0.0, 0.5, 1.0}
    assert drawn.outcome.dtype == torch.float64


def test_ragged_lists_use_shared_columns_and_skip_unrated_texts() -> None:
    # Columns a shorter list lacks hold 1e6 in the longer ones: they would make the longer list win.
    rated = RatedTexts(["none", "one", "two", "three"], [[], [3.0], [2.0, 2.0], [1.0, 1.0, 1e6]], [0, 0, 0, 0])
    drawn = sample_comparisons(rated, 3000, same_rater=1.0, generator=seeded())
    assert torch.equal(drawn.outcome, (drawn.a < drawn.b).double())
    assert set(drawn.a.tolist()) == {1, 2, 3}
    crossed = sample_comparisons(rated, 3000, same_rater=0.0, generator=seeded())
    assert set(crossed.b.tolist()) == {1, 2, 3}
    assert ((crossed.a == 3) & (crossed.outcome == 1)).any()  # its third rater is somebody else for the others


def test_generator_decides_everything() -> None:
    rated = panel(5, 6, 4, bias=1.0, noise=1.0)
    first, again, other = (sample_comparisons(rated, 500, same_rater=0.5, generator=seeded(s)) for s in (1, 1, 2))
    for name in ("a", "b", "outcome", "same_rater"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.a, other.a)
    assert torch.equal(human_pairs(rated, 99, seeded(3)).a, human_pairs(rated, 99, seeded(3)).a)


def test_no_shared_blocks_falls_back_in_words() -> None:
    rated = RatedTexts(["x", "y", "z"], [[1.0, 2.0]] * 3, [0, 1, 2])
    with pytest.warns(UserWarning, match="no block has two rated texts"):
        drawn = sample_comparisons(rated, 100, same_rater=0.5, generator=seeded())
    assert len(drawn) == 100 and not drawn.same_rater.any()
    with pytest.raises(ValueError, match="lower same_rater to 0"):
        sample_comparisons(rated, 100, same_rater=1.0, generator=seeded())


@pytest.mark.parametrize(
    ("rated", "words"),
    [
        (RatedTexts(["x"], [[1.0]], [0]), "two texts with ratings, got 1"),
        (RatedTexts(["x", "y"], [[1.0], []], [0, 0]), "two texts with ratings, got 1"),
        (RatedTexts(["x", "y"], [[1.0], [math.nan]], [0, 0]), "text 1 has ratings"),
        (RatedTexts(["x", "y"], [[1.0], [2.0]], [0]), "got 2 and 1"),
        (RatedTexts(["x", "y"], [[1.0], [2.0]], [0, 0]), "share one rater"),
    ],
)
def test_unusable_ratings_are_named(rated: RatedTexts, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_comparisons(rated, 10, same_rater=0.0, generator=seeded())


def test_bad_arguments_and_none_asked() -> None:
    rated = panel(2, 3, 2, bias=0.0, noise=1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        sample_comparisons(rated, 10, same_rater=1.5, generator=seeded())
    assert len(sample_comparisons(rated, 0, same_rater=0.5, generator=seeded())) == 0


def test_human_pairs_drop_ties_and_keep_the_count() -> None:
    rated = RatedTexts(["a", "b", "c"], [[0.0, 0.0, 1.0]] * 3, [0, 1, 2])
    drawn = human_pairs(rated, 1000, seeded())
    assert len(drawn) == 1000 and not drawn.same_rater.any()
    assert set(drawn.outcome.tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="found 0 of 10"):
        human_pairs(RatedTexts(["a", "b"], [[1.0, 1.0]] * 2, [0, 1]), 10, seeded())


def test_agreement_without_noise_is_perfect_inside_a_block() -> None:
    # Biases of raters cancel inside a block; across blocks they do not, so the ceiling stays below 1.
    agreement = rater_agreement(panel(40, 8, 6, bias=2.0, noise=0.0), seeded(), samples=20_000)
    assert agreement.rater_vs_others == 1.0 and agreement.rater_vs_rater == 1.0
    assert 0.5 < agreement.ceiling < 0.95


def test_agreement_of_normal_ratings_matches_theory() -> None:
    """Worth N(0, 1) and noise N(0, 1): two differences with correlation r agree with chance 1/2 + asin(r)/pi."""
    raters = 5
    agreement = rater_agreement(panel(400, 20, raters, bias=0.0, noise=1.0), seeded(), samples=200_000)
    one_and_mean = 1 / math.sqrt(2 * (1 + 1 / (raters - 1)))
    expected = (0.5 + math.asin(one_and_mean) / math.pi, 0.5 + math.asin(0.5) / math.pi)
    assert agreement.rater_vs_others == pytest.approx(expected[0], abs=0.015)
    assert agreement.rater_vs_rater == pytest.approx(expected[1], abs=0.015)
    assert agreement.ceiling == pytest.approx(expected[0], abs=0.015)  # without biases it is the same question


def test_agreement_says_nan_where_nobody_can_be_compared() -> None:
    alone = rater_agreement(RatedTexts(["x", "y"], [[1.0, 2.0], [3.0, 4.0]], [0, 1]), seeded(), samples=100)
    assert math.isnan(alone.rater_vs_others) and math.isnan(alone.rater_vs_rater) and alone.ceiling == 1.0
    single = rater_agreement(RatedTexts(["x", "y", "z"], [[1.0], [2.0], [3.0]], [0, 0, 1]), seeded(), samples=100)
    assert all(math.isnan(share) for share in single)


def test_a_hundred_thousand_take_well_under_a_second() -> None:
    rated = panel(350, 30, 15, bias=1.0, noise=1.0)
    start = time.process_time()  # CPU seconds: others on the machine do not count
    sample_comparisons(rated, 100_000, same_rater=0.5, generator=seeded())
    assert time.process_time() - start < 1.0
