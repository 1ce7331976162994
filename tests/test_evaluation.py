"""Grades, n-gram shares and matches, each worked out by hand."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from rlhf_engine import evaluation, ranking
from rlhf_engine.types import Comparisons, RatedTexts


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def pairs(a: list[int], b: list[int], outcome: list[float], items: int) -> Comparisons:
    made = torch.tensor(a), torch.tensor(b), torch.tensor(outcome, dtype=torch.float64)
    return Comparisons([f"t{i}" for i in range(items)], *made, torch.zeros(len(a), dtype=torch.bool))


def test_accuracy_and_calibration_in_two_bins() -> None:
    # Item 0 scores 0; items 1, 2, 3 are beaten by it with confidence .6, .7 and .9; item 4 equals it.
    scores = torch.tensor([0.0, -logit(0.6), -logit(0.7), -logit(0.9), 0.0])
    made = pairs([0, 0, 3, 3, 0], [1, 2, 0, 0, 4], [1.0, 0.0, 0.0, 1.0, 1.0], 5)
    grade = evaluation.grade_pairs(scores, made, bins=2)
    # right: yes; no; yes (0 beats 3); no; half.
    assert grade.accuracy == pytest.approx(2.5 / 5)
    # [.5, .75): confidence .6 .7 .5, right 1 0 .5; [.75, 1]: confidence .9 .9, right 1 0
    assert [row["count"] for row in grade.reliability] == [3, 2]
    assert [row["confidence"] for row in grade.reliability] == pytest.approx([0.6, 0.9])
    assert [row["frequency"] for row in grade.reliability] == pytest.approx([0.5, 0.5])
    assert grade.ece == pytest.approx(3 / 5 * 0.1 + 2 / 5 * 0.4)


def test_perfect_confidence_stays_in_the_last_bin() -> None:
    grade = evaluation.grade_pairs(torch.tensor([1e4, -1e4]), pairs([0, 1], [1, 0], [1.0, 0.0], 2))
    assert grade.accuracy == 1.0 and grade.ece == 0.0 and len(grade.reliability) == 1


def test_grades_do_not_depend_on_the_order_inside_a_pair() -> None:
    g = torch.Generator().manual_seed(0)
    scores, a, b = torch.randn(50, generator=g), *torch.randint(0, 50, (2, 400), generator=g)
    outcome = (torch.rand(400, generator=g) < 0.5).double()
    same = torch.zeros(400, dtype=torch.bool)
    one = evaluation.grade_pairs(scores, Comparisons([""] * 50, a, b, outcome, same))
    other = evaluation.grade_pairs(scores, Comparisons([""] * 50, b, a, 1 - outcome, same))
    assert (one.accuracy, one.ece) == pytest.approx((other.accuracy, other.ece), abs=1e-12)


def test_nothing_to_grade_on() -> None:
    with pytest.raises(ValueError, match="grade_pairs: there are no comparisons"):
        evaluation.grade_pairs(torch.zeros(2), pairs([], [], [], 2))


def test_n_gram_shares_by_hand() -> None:
    texts = ["a b a b", "A b c", "d"]
    # bigrams: ab ba ab | ab bc -> 5 in all, 3 different; repeated inside a text: the second ab
    assert evaluation.distinct_ngrams(texts, 2) == pytest.approx(3 / 5)
    assert evaluation.repeated_ngrams(texts, 2) == pytest.approx(1 / 5)
    # words: a b a b | a b c | d -> 8, 4 different; repeated: a, b
    assert evaluation.distinct_ngrams(texts, 1) == pytest.approx(4 / 8)
    assert evaluation.repeated_ngrams(texts, 1) == pytest.approx(2 / 8)


@pytest.mark.parametrize("texts", [[], [""], ["one two"]])
def test_texts_too_short_for_an_n_gram(texts: list[str]) -> None:
    assert math.isnan(evaluation.distinct_ngrams(texts, 3)) and evaluation.repeated_ngrams(texts, 3) == 0.0


def test_matches_between_all_models_on_every_prompt() -> None:
    scores = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 0.0]), "z": torch.tensor([2.0, -1.0])}
    matches = evaluation.head_to_head(scores)
    assert matches.items == ["x", "y", "z"]
    found = list(zip(matches.a.tolist(), matches.b.tolist(), matches.outcome.tolist(), strict=True))
    assert found == [(0, 1, 1.0), (0, 1, 0.5), (0, 2, 0.0), (0, 2, 1.0), (1, 2, 0.0), (1, 2, 1.0)]
    assert matches.same_rater.all() and len(matches) == 6
    with pytest.raises(ValueError, match="at least two models"):
        evaluation.head_to_head({"x": torch.ones(3)})


def test_the_better_model_gets_the_higher_elo() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 300, generator=g)
    fitted = ranking.fit(evaluation.head_to_head({"low": noise[0], "mid": noise[1] + 1, "high": noise[2] + 2}), seed=0)
    assert fitted.elo.argsort().tolist() == [0, 1, 2]
    # P(N(1, 2) > 0) = .76 is 200 points
    assert float(fitted.elo[1] - fitted.elo[0]) == pytest.approx(200, abs=70)


def test_interval_of_a_mean() -> None:
    low, high = evaluation.mean_interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    half = 1.96 * math.sqrt((4 + 1 + 0 + 9) / 3) / 2
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    assert all(math.isnan(x) for x in evaluation.mean_interval(torch.tensor([1.0])))


def test_a_function_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_judge.py").write_text("def length(texts):\n    return [float(len(t)) for t in texts]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    judge = evaluation.load_judge("my_own_judge:length")
    assert judge is not None and judge(["ab", ""]) == [2.0, 0.0]


@pytest.mark.parametrize("path", ["nothing", ":f", "module:", ""])
def test_a_path_that_names_no_function(path: str) -> None:
    with pytest.raises(ValueError, match="evaluate.judge: .* should read module:function"):
        evaluation.load_function(path, "evaluate.judge")


@pytest.mark.parametrize("path", ["no_such_module_here:f", "math:no_such_function"])
def test_a_function_that_is_not_there(path: str) -> None:
    with pytest.raises(ValueError, match=f"reward mine: cannot load '{path}'"):
        evaluation.load_function(path, "reward mine")


def test_judges_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluation.load_judge("none") is None
    vader = evaluation.load_judge("vader")
    assert vader is not None
    good, bad, empty = vader(["a wonderful, moving film", "an awful, boring mess", ""])
    assert good > 0.3 > -0.3 > bad and empty == 0
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ValueError, match=r"vaderSentiment is missing; run pip install .* to none"):
        evaluation.load_judge("vader")


def test_the_tf_idf_floor_learns_words() -> None:
    train = RatedTexts(
        ["good film", "good plot", "bad film", "bad plot"] * 5, [[2.0, 1.0], [1.0], [-1.0], [-2.0]] * 5, [0] * 20
    )
    good, bad, unknown = evaluation.tfidf_ridge_scores(train, ["a good thing", "a bad thing", "???"]).tolist()
    assert good > 0.5 and bad < -0.5 and abs(unknown) < 0.5


@pytest.mark.parametrize(
    "judge, sentence",
    [
        (lambda texts: [1.0], "returned (1,) values for 2 texts"),
        (lambda texts: [1.0, float("nan")], "not finite"),
    ],
)
def test_a_judge_must_answer_for_every_text(judge: evaluation.Judge, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        evaluation.judged(judge, ["a", "b"])


def test_a_judge_may_count() -> None:
    assert evaluation.judged(lambda texts: [len(t) for t in texts], ["a", "bcd"]).mean() == 2.0
