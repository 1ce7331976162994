"""What the stages hand to each other. Reading this file alone tells the whole pipeline:

    ratings -> Comparisons -> Ranking, RewardModel;   Prompts -> Rollout -> Experience -> StepStats

Shapes: B sequences, P prompt tokens (left-padded), T response tokens, S = P + T, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class RatedTexts:
    """Texts with every single rater's score, before anything is aggregated.

    Example: texts=["a joy", "a mess"], ratings=[[3, 4, 2], [-3, -1, -4]], blocks=[0, 0] says that column k of
    both rows may be the same person (one block of items was rated by one panel).
    """

    texts: list[str]
    ratings: list[list[float]]  # one list per text, one entry per rater, unit: the source's own scale
    blocks: list[int]  # texts of one block share their raters column by column; also the unit of splitting

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: list[int]) -> RatedTexts:
        return RatedTexts(
            [self.texts[i] for i in rows], [self.ratings[i] for i in rows], [self.blocks[i] for i in rows]
        )


@dataclass(slots=True)
class Comparisons:
    """Head-to-head matches between items, as parallel arrays of length M.

    Example: items=["x", "y"], a=[0], b=[1], outcome=[1.0] reads "x was preferred to y".
    """

    items: list[str]  # display names or texts; a and b index into it
    a: Tensor  # (M,) int64
    b: Tensor  # (M,) int64
    outcome: Tensor  # (M,) float64: 1 a won, 0 b won, 0.5 exact tie
    same_rater: Tensor  # (M,) bool: one person saw both
    gap: Tensor | None = None  # (M,) float64 |rating difference|, where ratings made the comparison

    def __len__(self) -> int:
        return self.a.numel()


@dataclass(slots=True)
class Ranking:
    """Strengths of items on the Elo scale (400 points = 10:1 odds), best first nowhere: order is the items' own."""

    items: list[str]
    elo: Tensor  # (n,) float64, mean 1000 over the items
    low: Tensor  # (n,) float64 lower end of the interval; NaN when no interval was asked for
    high: Tensor  # (n,) float64
    games: Tensor  # (n,) int64 matches played
    tie: float  # Davidson's nu >= 0: P(tie) is proportional to nu * sqrt(p_a p_b); 0 where no ties occur
    component: Tensor  # (n,) int64: items are comparable only within one component
    level: float = 0.9  # coverage the interval aims at
    warnings: list[str] = field(default_factory=list)  # e.g. "these items are not connected: ..."


@dataclass(slots=True)
class Prompts:
    """A batch of prompts, ready for the policy."""

    ids: list[str]  # unique; every stage keeps them, so no prompt is lost or reordered unseen
    texts: list[str]
    input_ids: Tensor  # (B, P) int64, left-padded
    attention_mask: Tensor  # (B, P) bool; the only source of lengths (a pad id may equal eos)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(slots=True)
class Rollout:
    """Prompts with sampled responses. Micro-batches are fixed here, once, for scoring and for every epoch."""

    prompts: Prompts
    tokens: Tensor  # (B, S) int64: prompt then response; positions past a response hold any id
    attention_mask: Tensor  # (B, S) bool
    response_mask: Tensor  # (B, T) bool: sampled tokens, the end-of-sequence token included
    sampler_logprobs: Tensor  # (B, T) float32: of the distribution that was really sampled from
    finished: Tensor  # (B,) bool: ended with eos rather than by length
    texts: list[str]  # decoded responses, without special tokens
    micro_batches: list[slice]  # row ranges; no later stage re-cuts them
    hidden: dict[int, Tensor] = field(
        default_factory=dict
    )  # frozen trunk: layer index -> (B, S, H) input of that layer
    sampled: dict[tuple[int, int], Tensor] = field(
        default_factory=dict, init=False
    )  # a micro-batch -> what sampled_rows gave; a copy with another mask (dataclasses.replace) begins anew

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def sampled_rows(self, rows: slice) -> Tensor:
        """(n,) int64: where a micro-batch's flattened response mask is true. Found once: a GPU has to be waited for."""
        cut = rows.start, rows.stop
        if cut not in self.sampled:
            self.sampled[cut] = self.response_mask[rows].reshape(-1).nonzero().squeeze(1)
        return self.sampled[cut]


@dataclass(slots=True)
class Experience:
    """A scored rollout: all that an update needs. Masked positions of every (B, T) tensor hold 0."""

    rollout: Rollout
    logprobs: Tensor  # (B, T) fp32, of the policy before the update
    ref_logprobs: Tensor  # (B, T) fp32, of the frozen reference
    entropy: Tensor  # (B, T) fp32 nats, of the policy before the update
    values: Tensor  # (B, T) fp32, V before each response token is chosen
    scores: Tensor  # (B,) fp32: the weighted sum of all rewards
    score_terms: dict[str, Tensor]  # name -> (B,) each reward by itself, unweighted
    rewards: Tensor  # (B, T) fp32: -kl_coef * kl, plus the score at one place
    advantages: Tensor  # (B, T) fp32, whitened if the config says so
    returns: Tensor  # (B, T) fp32, advantages (unwhitened) + values
    value_mask: Tensor  # (B, T) bool: where returns are defined
    kl: Tensor  # (B, T) fp32 nats, the estimator that the reward uses
    critic_hidden: Tensor | None = None  # (B, T, H) what a critic without a body of its own reads


@dataclass(slots=True)
class StepStats:
    """What one PPO step reports. `metrics` keys are listed in metrics.py."""

    step: int
    metrics: dict[str, float]
    seconds: dict[str, float]  # rollout, score, update
    texts: list[str]  # the responses
