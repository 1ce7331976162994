"""Comparisons, their ranking, the reward model, and its grade against people."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from rlhf_engine import comparisons, evaluation, ranking, runs
from rlhf_engine import reward_model as rm
from rlhf_engine import reward_training as rt
from rlhf_engine.pipeline.job import Job, same_words
from rlhf_engine.types import RatedTexts


def compare(job: Job) -> None:
    generator = torch.Generator().manual_seed(job.config.seed)
    r = job.config.rank
    job.matches = comparisons.sample_comparisons(
        job.parts[0], r.comparisons, same_rater=r.same_rater, generator=generator
    )


def rank_stage(job: Job) -> None:
    with job.log.stage("rank"):
        compare(job)
        r, matches = job.config.rank, job.matches
        fitted = ranking.fit(
            matches, method=r.method, l2=r.l2, interval=r.interval if r.method == "bradley-terry" else "none",
            level=r.level, seed=job.config.seed,
        )  # fmt: skip
        rows = ranking.table(fitted)
        (job.folder / "ranking.json").write_text(json.dumps(runs.finite(rows), indent=1) + "\n")
        job.summary["rank"] = {
            "comparisons": len(matches), "ties": int((matches.outcome == 0.5).sum()),
            "same_rater": int(matches.same_rater.sum()), "tie_nu": fitted.tie, "warnings": fitted.warnings,
            "top": rows[:5], "bottom": rows[-5:],
        }  # fmt: skip
        for warning in fitted.warnings:
            job.log.say(f"ranking: {warning}")
        shown = [
            [f"{row['elo']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}", row["item"][:90]]
            for row in rows[:3] + rows[-3:]
        ]
        job.log.table("Elo of texts, best and worst three", ["Elo", f"{r.level:.0%} interval", "text"], shown)


def train_reward(job: Job) -> Tensor | None:
    """Gives the job its reward model; returns the features of the training texts where the body is frozen."""
    c, features = job.config.reward_model, None
    if c.body == "frozen":
        probe = rm.FrozenRewardModel(job.base, c.layers, c.hidden_units)
        features = _features(job, probe, job.parts[0].texts)
    if c.body in ("frozen", "finetuned", "scratch"):
        job.reward_model = rt.train_reward_model(
            job.matches, job.base, job.tokenizer, config=c, features=features, seed=job.config.seed,
            progress=lambda done, total: job.log.progress("reward model", done, total, "comparisons"),
        )  # fmt: skip
    else:
        same_words(job, c.body)
        job.reward_model = rm.load_reward_model(c.body, body=job.base)
    return features


def reward_stage(job: Job) -> None:
    c, (train, heldout, _) = job.config.reward_model, job.parts
    with job.log.stage("reward_model"):
        features = train_reward(job)
    model = job.reward_model
    assert model is not None  # train_reward gave it
    model.save(job.folder / "reward_model")
    job.tokenizer.save_pretrained(job.folder / "reward_model")
    with job.log.stage("grade"):
        grade = job.summary["rm"] = _grade(job, model, features, train, heldout)
        grade["split"] = job.summary["data"]["split"]
    facts = [
        f"Body: {job.config.model} ({c.body}). Data: {job.config.data.source}, {len(train)} texts.",
        "",
        f"Predicts {grade['human_pair_accuracy']:.1%} of {grade['pairs']} held-out human choices, calibration error "
        f"{grade['calibration_ece']:.3f}.",
        "",
        "    rlhf_engine.reward_model.load_reward_model(folder, body=model)",
    ]
    runs.write_card(job.folder / "reward_model", "Reward model", facts)


def _features(job: Job, model: rm.FrozenRewardModel, texts: list[str]) -> Tensor:
    c = job.config.reward_model
    rows = rm.tokenize(texts, job.tokenizer, c.max_tokens)
    return rm.pooled_features(
        model, rows, c.feature_batch, lambda done, total: job.log.progress("features", done, total)
    )


def _grade(
    job: Job, model: rm.RewardModel, features: Tensor | None, train: RatedTexts, heldout: RatedTexts
) -> dict[str, Any]:
    """The reward model, and what it must be measured against, on the same held-out comparisons by people."""
    c, generator = job.config.reward_model, torch.Generator().manual_seed(job.config.seed + 1)
    pairs = comparisons.human_pairs(heldout, job.config.evaluate.human_pairs, generator)
    agreement = comparisons.rater_agreement(heldout, generator)
    out: dict[str, Any] = {"kind": c.body, "pairs": len(pairs)}
    if isinstance(model, rm.FrozenRewardModel):
        heldout_features = _features(job, model, heldout.texts)
        scores = _raw_scores(model, heldout_features)
        if features is not None:
            means = torch.tensor([sum(r) / len(r) for r in train.ratings])
            scalar = rt.train_on_ratings(job.base, features, means, config=c, seed=job.config.seed)
            out["scalar_rm_accuracy"] = evaluation.grade_pairs(_raw_scores(scalar, heldout_features), pairs).accuracy
    else:
        normalised = rm.score_texts(
            model, heldout.texts, job.tokenizer, max_tokens=c.max_tokens, batch_size=c.feature_batch
        )
        scores = normalised * model.score_std + model.score_mean  # graded in log-odds
    grade = evaluation.grade_pairs(scores, pairs)
    baseline = evaluation.tfidf_ridge_scores(train, heldout.texts)
    out |= {
        "human_pair_accuracy": grade.accuracy, "calibration_ece": grade.ece, "reliability": grade.reliability,
        "baseline_tfidf_ridge": evaluation.grade_pairs(baseline, pairs).accuracy,
        "ceiling_mean_of_raters": agreement.ceiling, "human_same_rater_vs_others": agreement.rater_vs_others,
        "human_rater_vs_rater": agreement.rater_vs_rater,
    }  # fmt: skip
    if judge := evaluation.load_judge(job.config.evaluate.judge):
        out["judge_accuracy"] = evaluation.grade_pairs(evaluation.judged(judge, heldout.texts), pairs).accuracy
    job.log.say(
        f"human choices predicted: reward model {grade.accuracy:.3f}, tf-idf {out['baseline_tfidf_ridge']:.3f}, "
        f"people's mean {agreement.ceiling:.3f}; calibration error {grade.ece:.3f}"
    )
    return out


@torch.no_grad()
def _raw_scores(model: rm.FrozenRewardModel, features: Tensor) -> Tensor:
    return model.raw(features)
