"""Training reward models: on comparisons (Bradley-Terry), and for contrast on the raters' scalars.

    loss = -log sigmoid(s_winner - s_loser - margin * gap)    (ties: half of each order)    + centering * (s_a + s_b)^2

Bradley & Terry 1952; margin as in Llama 2 (Touvron et al. 2023); centering as in Eisenstein et al. 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_engine import reward_model as rm
from rlhf_engine.config import RewardModelConfig
from rlhf_engine.models import LanguageModel
from rlhf_engine.types import Comparisons

Progress = Callable[[int, int], None]
HELD_BACK = 0.2  # share of the texts on which the frozen kind's scale is fitted
ENOUGH_TEXTS = 300  # held back; from 120 of them the factor varied between 1.3 and 2.1 by seed


def quiet(done: int, total: int) -> None:
    """The progress callback of callers that show none."""


def pairwise_loss(
    score_a: Tensor,
    score_b: Tensor,
    outcome: Tensor,
    *,
    gap: Tensor | None = None,
    margin: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Mean loss over (M,) comparisons; outcome 1 means a won, 0 b won, 0.5 an exact tie; gap >= 0 in rating units."""
    difference = score_a - score_b
    shift = margin * gap if gap is not None and margin else torch.zeros_like(difference)
    a_wins, b_wins = F.softplus(shift - difference), F.softplus(shift + difference)
    ties = F.softplus(-difference) + F.softplus(difference)
    loss = torch.where(outcome == 0.5, 0.5 * ties, torch.where(outcome > 0.5, a_wins, b_wins))
    return (loss + centering * (score_a + score_b) ** 2).mean()


def train_reward_model(
    comparisons: Comparisons,
    body: LanguageModel,
    tokenizer: Any,
    *,
    config: RewardModelConfig | None = None,
    features: Tensor | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> rm.RewardModel:
    """Trains what `config.body` asks for on comparisons of texts.

    Args:
        comparisons: items are texts.
        body: causal language model; only read, and copied where the kind is fine-tuned. A frozen kind keeps reading it,
            so it must not be trained afterwards.
        features: pooled features of the items, where they are at hand (frozen kind only).
        progress: called with (done, total) in comparisons.

    Raises:
        ValueError: no comparisons, or an unknown kind of body.
    """
    config = config or RewardModelConfig()
    if not len(comparisons):
        raise ValueError("train_reward_model: there are no comparisons to train on")
    torch.manual_seed(seed)
    if config.body in ("finetuned", "scratch"):
        model = rm.new_classifier(body, scratch=config.body == "scratch", train_layers=config.train_layers, seed=seed)
        rows = rm.tokenize(comparisons.items, tokenizer, config.max_tokens)
        device = next(body.parameters()).device
        model.to(device)

        def score(index: Tensor) -> Tensor:
            tokens, mask = rm.pad([rows[i] for i in index.tolist()])
            return model.raw_tokens(tokens.to(device), mask.to(device)).cpu()

        fit_scores(model, score, comparisons, config, seed, progress)
        return model.eval()
    if config.body != "frozen":
        raise ValueError(
            f"reward_model.body must be frozen, finetuned or scratch to be trained here, got {config.body}"
        )
    frozen = rm.FrozenRewardModel(body, config.layers, config.hidden_units, config.dropout)
    if features is None:
        rows = rm.tokenize(comparisons.items, tokenizer, config.max_tokens)
        features = rm.pooled_features(frozen, rows, config.feature_batch, quiet)
    standardise(frozen, features)
    features = frozen.standardised(features)
    scale = _calibration_scale(frozen, features, comparisons, config, seed, progress)
    fit_scores(frozen, lambda index: frozen.head(features[index])[:, 0], comparisons, config, seed, progress)
    with torch.no_grad():
        for parameter in frozen.head[-1].parameters():
            parameter.mul_(scale)
    return frozen.eval()


def fit_scores(
    model: nn.Module,
    score: Callable[[Tensor], Tensor],
    comparisons: Comparisons,
    config: RewardModelConfig,
    seed: int,
    progress: Progress,
) -> None:
    """AdamW with linear decay on the pairwise loss; `score` maps item indices to raw scores, each once per batch."""
    epochs, batch_size, lr = config.schedule()
    steps = epochs * -(-len(comparisons) // batch_size)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    done = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(comparisons), generator=generator).split(batch_size):
            a, b = comparisons.a[batch], comparisons.b[batch]
            items, where = torch.unique(torch.cat([a, b]), return_inverse=True)
            scores = score(items)[where]
            loss = pairwise_loss(
                scores[: len(batch)], scores[len(batch) :], comparisons.outcome[batch].float(),
                gap=comparisons.gap[batch].float() if comparisons.gap is not None else None,
                margin=config.margin, centering=config.centering,
            )  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += len(batch)
            progress(done, epochs * len(comparisons))
    model.eval()


def standardise(model: rm.FrozenRewardModel, features: Tensor) -> None:
    """Fixes the feature scale from the training texts."""
    model.feature_mean.copy_(features.mean(0))
    model.feature_std.copy_(features.std(0) if len(features) > 1 else torch.ones_like(model.feature_std))
    model.feature_std.clamp_(min=1e-4)


def _calibration_scale(
    model: rm.FrozenRewardModel,
    features: Tensor,
    comparisons: Comparisons,
    config: RewardModelConfig,
    seed: int,
    progress: Progress,
) -> float:
    """What to multiply scores by, so that sigmoid(difference) is how often people choose so between two texts.

    Learning from ties and with dropout makes differences too small, over-fitting makes them too large. So a copy of the
    untrained head is fitted without some of the texts, and one factor on decided comparisons of two people among those.
    """
    back = torch.rand(len(comparisons.items), generator=torch.Generator().manual_seed(seed)) < HELD_BACK
    graded = back[comparisons.a] & back[comparisons.b] & (comparisons.outcome != 0.5) & ~comparisons.same_rater
    if int(back.sum()) < ENOUGH_TEXTS or not graded.any():
        return 1.0
    without = among_rows(comparisons, ~back[comparisons.a] & ~back[comparisons.b])
    trial = copy.deepcopy(model.head)
    fitted, model.head = model.head, trial
    fit_scores(model, lambda index: trial(features[index])[:, 0], without, config, seed, progress)
    with torch.no_grad():
        scores = trial(features)[:, 0].double()
    model.head = fitted
    difference = scores[comparisons.a[graded]] - scores[comparisons.b[graded]]
    return best_scale(difference, comparisons.outcome[graded].double())


def among_rows(comparisons: Comparisons, keep: Tensor) -> Comparisons:
    """The comparisons selected by a (M,) bool mask; items stay as they are."""
    gap = comparisons.gap[keep] if comparisons.gap is not None else None
    a, b, outcome, same = (x[keep] for x in (comparisons.a, comparisons.b, comparisons.outcome, comparisons.same_rater))
    return Comparisons(comparisons.items, a, b, outcome, same, gap)


def best_scale(difference: Tensor, outcome: Tensor) -> float:
    """The factor on differences (M,) that makes outcomes (M,) likeliest (Platt scaling without offset), by Newton."""
    scale = torch.ones((), dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(scale * difference)
        gradient, curvature = ((p - outcome) * difference).mean(), (p * (1 - p) * difference**2).mean()
        scale = (scale - gradient / curvature.clamp(min=1e-12)).clamp(0.1, 10.0)
    return float(scale)


def train_on_ratings(
    body: LanguageModel, features: Tensor, ratings: Tensor, *, config: RewardModelConfig, seed: int = 0
) -> rm.FrozenRewardModel:
    """The same frozen head by least squares on (n,) mean ratings: what comparing wins or loses against rating."""
    torch.manual_seed(seed)
    model = rm.FrozenRewardModel(body, config.layers, config.hidden_units, config.dropout)
    standardise(model, features)
    features = model.standardised(features)
    target = ((ratings - ratings.mean()) / ratings.std()).float()
    generator = torch.Generator().manual_seed(seed)
    batch_size = max(1, min(64, len(ratings) // 8))
    steps = 20 * -(-len(ratings) // batch_size)
    _, _, lr = config.schedule()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    for _ in range(20):
        for batch in torch.randperm(len(ratings), generator=generator).split(batch_size):
            loss = ((model.head(features[batch])[:, 0] - target[batch]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()
