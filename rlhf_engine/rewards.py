"""The reward of a rollout: a weighted list of reward models and functions, each of them logged by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_engine import models
from rlhf_engine.models import HiddenStates, LanguageModel
from rlhf_engine.reward_model import ClassifierRewardModel, FrozenRewardModel, RewardModel
from rlhf_engine.types import Rollout

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(slots=True)
class RewardTerm:
    """One weighted term of the reward: a reward model, or a function of (prompts, responses)."""

    name: str
    source: RewardModel | RewardFunction
    weight: float = 1.0


def keep_still(terms: list[RewardTerm], policy: LanguageModel, reference: LanguageModel) -> None:
    """Moves reward models that were trained on the very policy object, which is about to change, to the reference.

    Raises:
        ValueError: the reference has other weights than the policy, so it cannot stand in.
    """
    for term in terms:
        if isinstance(term.source, FrozenRewardModel) and term.source.body is policy:
            if models.checksum(policy) != models.checksum(reference):
                raise ValueError(
                    f"reward {term.name}: it reads the hidden states of the policy, which training changes, and the "
                    "reference has other weights; give it a copy of the model it was trained on"
                )
            term.source.__dict__["body"] = reference


def layers_read(terms: list[RewardTerm], reference: LanguageModel) -> set[int]:
    """Layers of the reference whose input reward models on that very body read."""
    shared = [t.source for t in terms if isinstance(t.source, FrozenRewardModel) and t.source.body is reference]
    return {layer for source in shared for layer in source.layers}


@torch.no_grad()
def score(terms: list[RewardTerm], batch: Rollout, reference: LanguageModel, known: HiddenStates) -> dict[str, Tensor]:
    """name -> (B,) unweighted rewards; `known` are the reference's states on the rollout, so far as they are at hand.

    Raises:
        ValueError: a function that does not return one finite number a response.
    """
    mask, device = _text_mask(batch), batch.tokens.device
    values = {}
    for term in terms:
        if isinstance(term.source, (FrozenRewardModel, ClassifierRewardModel)):
            ready = term.source.body is reference and set(term.source.layers) <= set(known)
            value = term.source.score(batch.tokens, mask, known if ready and term.source.layers else None)
        else:
            value = torch.as_tensor(term.source(batch.prompts.texts, batch.texts), dtype=torch.float32)
            if value.shape != (len(batch),):
                raise ValueError(
                    f"reward {term.name}: returned {tuple(value.shape)} values for {len(batch)} responses, not one each"
                )
        if not torch.isfinite(value).all():
            raise ValueError(f"reward {term.name}: returned a value that is not finite")
        values[term.name] = value.float().to(device)
    return values


def weighted(terms: list[RewardTerm], values: dict[str, Tensor]) -> Tensor:
    """(B,) sum of the weighted rewards."""
    return torch.stack([term.weight * values[term.name] for term in terms]).sum(0)


def _text_mask(batch: Rollout) -> Tensor:
    """(B, S) bool: prompt and response without a final eos, which texts that train reward models do not have."""
    mask = batch.attention_mask.clone()
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
    mask[torch.arange(len(batch), device=mask.device), last] &= ~batch.finished
    return mask
