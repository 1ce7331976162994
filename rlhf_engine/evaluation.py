"""Grading: reward models against people, texts against an independent judge, models against each other.

Nothing here is ever trained on. The judge (VADER, Hutto & Gilbert 2014, rule-based) and the tf-idf baseline come from
the extra `[demo]`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.types import Comparisons, RatedTexts

Judge = Callable[[list[str]], Sequence[float]]


@dataclass(slots=True)
class PairGrade:
    """How well scores predict people's choices."""

    accuracy: float  # share of comparisons won by the higher score; equal scores count half
    ece: float  # expected calibration error of sigmoid(score difference), over bins of confidence
    reliability: list[dict[str, float]]  # per bin: mean confidence, frequency of that choice, count


def grade_pairs(scores: Tensor, pairs: Comparisons, *, bins: int = 10) -> PairGrade:
    """Scores (n,) in log-odds units against decided comparisons of the same n items.

    Confidence is max(p, 1 - p), p = sigmoid(score_a - score_b), in equal bins over [0.5, 1] (Guo et al. 2017).
    """
    if not len(pairs):
        raise ValueError("grade_pairs: there are no comparisons to grade on")
    difference = scores[pairs.a].double() - scores[pairs.b].double()
    right = torch.where(difference == 0, 0.5, ((difference > 0) == (pairs.outcome > 0.5)).double())
    confidence = torch.sigmoid(difference.abs())
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    reliability, ece = [], 0.0
    for i in range(bins):
        inside = index == i
        if count := int(inside.sum()):
            mean, frequency = float(confidence[inside].mean()), float(right[inside].mean())
            reliability.append({"confidence": mean, "frequency": frequency, "count": count})
            ece += count / len(pairs) * abs(mean - frequency)
    return PairGrade(float(right.mean()), ece, reliability)


def tfidf_ridge_scores(train: RatedTexts, texts: list[str]) -> Tensor:
    """(n,) scores by ridge regression of mean ratings on tf-idf of words and word pairs: the floor to beat."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=min(2, len(train)))
    target = [sum(r) / len(r) for r in train.ratings]
    model = Ridge(alpha=1.0).fit(vectoriser.fit_transform(train.texts), target)
    return torch.as_tensor(model.predict(vectoriser.transform(texts)))


def load_judge(name: str) -> Judge | None:
    """ "vader", "none", or "module:function" taking and returning a list.

    Raises:
        ValueError: a module or function that cannot be found, or vaderSentiment missing.
    """
    if name == "none":
        return None
    if name != "vader":
        return load_function(name, "evaluate.judge")
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ValueError(
            'evaluate.judge: vaderSentiment is missing; run pip install "rlhf_engine[demo]", or set '
            "evaluate.judge to none"
        ) from error
    analyser = SentimentIntensityAnalyzer()
    return lambda texts: [analyser.polarity_scores(text)["compound"] for text in texts]


def judged(judge: Judge, texts: list[str]) -> Tensor:
    """(n,) float64 scores of n texts.

    Raises:
        ValueError: a judge that does not return one finite number a text.
    """
    scores = torch.as_tensor(judge(texts), dtype=torch.float64)
    if scores.shape != (len(texts),):
        raise ValueError(f"evaluate.judge: returned {tuple(scores.shape)} values for {len(texts)} texts, not one each")
    if not torch.isfinite(scores).all():
        raise ValueError("evaluate.judge: returned a value that is not finite")
    return scores


def load_function(path: str, key: str) -> Any:
    """The function named "module:function"; the working directory counts as a place for modules."""
    import os
    import sys

    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{key}: {path!r} should read module:function, for example my_rewards:politeness")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: cannot load {path!r}: {error}") from error


def distinct_ngrams(texts: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams, pooled over the texts (Li et al. 2016); NaN if there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repeated_ngrams(texts: list[str], n: int) -> float:
    """Share of n-grams that already occurred earlier in the same text; 0 if there are none."""
    per_text = [_ngrams(text, n) for text in texts]
    total = sum(map(len, per_text))
    return sum(len(grams) - len(set(grams)) for grams in per_text) / total if total else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def mean_interval(values: Tensor, z: float = 1.96) -> list[float]:
    """[low, high] of the mean by the normal approximation."""
    values = values.double()
    half = z * float(values.std(correction=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [float(values.mean()) - half, float(values.mean()) + half]


def head_to_head(scores: dict[str, Tensor]) -> Comparisons:
    """Matches between all pairs of models on every prompt; the higher score wins, equal scores tie.

    Args:
        scores: model name -> (n,) one judge's score of that model's answer to each of the same n prompts.
    """
    names = list(scores)
    a, b, outcome = [], [], []
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            difference = scores[names[i]].double() - scores[names[j]].double()
            a.append(torch.full((len(difference),), i))
            b.append(torch.full((len(difference),), j))
            outcome.append((difference.sign() + 1) / 2)
    if not a:
        raise ValueError("head_to_head: at least two models are needed")
    outcomes = torch.cat(outcome)
    return Comparisons(names, torch.cat(a), torch.cat(b), outcomes, torch.ones(len(outcomes), dtype=torch.bool))
