"""Every setting of a run, as frozen dataclasses. Standard library only, so that `--help` and mistakes answer at once.

`RunConfig()` is the demo: SmolLM2-135M-Instruct, film-review snippets with human ratings, PPO towards a learned reward.
`PRESETS["tiny"]` is the same pipeline on a random two-layer model, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where texts, ratings and prompts come from.

    Args:
        source: "film-reviews" (fetched by name), "planted" (made in process), or a JSONL file with
            {"text": ..., "ratings": [...]} and optionally "block" per line.
        train_texts: texts used for comparisons and the reward model (0 = all that are left).
        heldout_texts: texts that only evaluation sees.
        prompt_texts: texts whose first words become prompts.
        prompt_words: words of a text that make a prompt.
        prompts: a text file (one prompt a line) used instead of prompts cut from the source; a fifth of them, at most
            evaluate.samples but two at least, are only evaluated on.
    """

    source: str = "film-reviews"
    train_texts: int = 4800
    heldout_texts: int = 1000
    prompt_texts: int = 2400
    prompt_words: int = 5
    prompts: str | None = None


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning before PPO (off unless a file is given).

    Args:
        data: JSONL. {"text"} continues pretraining; {"prompt", "completion"} trains on completions only;
            {"condition", "text"} puts the condition in front of the text as a prefix that is not trained on.
        epochs: passes over the file.
        batch_size: records per optimiser step.
        lr: peak learning rate of AdamW.
        train_layers: how many of the last layers train (-1 = all).
        max_tokens: longer records are cut here, and counted.
    """

    data: str | None = None
    epochs: int = 1
    batch_size: int = 16
    lr: float = 2e-5
    train_layers: int = -1
    max_tokens: int = 256


@dataclass(frozen=True)
class RankConfig:
    """Comparisons from ratings, and the ranking fitted to them.

    Args:
        comparisons: head-to-head matches drawn from the training texts.
        same_rater: share of them judged by one person (the rest connect the blocks).
        method: "bradley-terry" (maximum likelihood with ties) or "elo" (online updates, in order).
        l2: strength of the Gaussian prior on the log-strengths; keeps unbeaten items finite.
        interval: how the intervals of the strengths are found.
        level: coverage of the intervals.
    """

    comparisons: int = 100_000
    same_rater: float = 0.5
    method: Literal["bradley-terry", "elo"] = "bradley-terry"
    l2: float = 0.1
    interval: Literal["sandwich", "bootstrap", "none"] = "sandwich"
    level: float = 0.9


@dataclass(frozen=True)
class RewardModelConfig:
    """The reward model trained on the comparisons.

    Args:
        body: "frozen" (pooled features of the frozen language model and a small head: nearly free next to a policy that
            shares the trunk), "finetuned" (a sequence classifier with one output), "scratch" (the same, from random
            weights), or a folder of any sequence classifier with one output, used as it is.
        layers: (frozen) the inputs of these layers are pooled, by mean and at the last token (null = those at .5, .6,
            .7 and .8 of the depth).
        hidden_units: (frozen) width of the head.
        epochs: passes over the comparisons (null = 4 for frozen, 1 otherwise).
        batch_size: comparisons per optimiser step (null = 4096 for frozen, 32 otherwise).
        lr: peak learning rate of AdamW (null = 1e-3 for frozen, 2e-5 for finetuned, 3e-4 for scratch).
        weight_decay: AdamW's, on the head.
        dropout: (frozen) on the pooled features.
        margin: asks for score differences of margin * (rating difference), in score units; 0 is plain Bradley-Terry.
        centering: weight of (score_a + score_b)^2, which keeps scores near 0.
        train_layers: (finetuned) how many of the last layers train (-1 = all, null = 6, or all where there are fewer).
        max_tokens: longer texts are cut here, and counted.
        feature_batch: texts per forward pass when features are computed.
    """

    body: str = "frozen"
    layers: list[int] | None = None
    hidden_units: int = 64
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 0.01
    dropout: float = 0.3
    margin: float = 0.0
    centering: float = 0.0
    train_layers: int | None = None
    max_tokens: int = 128
    feature_batch: int = 32

    def schedule(self) -> tuple[int, int, float]:
        """Epochs, batch size and peak learning rate, with what suits the body where they are null."""
        fitting = {"frozen": (4, 4096, 1e-3), "scratch": (1, 32, 3e-4)}.get(self.body, (1, 32, 2e-5))
        epochs, batch_size, lr = (
            usual if given is None else given
            for given, usual in zip((self.epochs, self.batch_size, self.lr), fitting, strict=True)
        )
        return int(epochs), int(batch_size), float(lr)


@dataclass(frozen=True)
class RewardSource:
    """One term of the reward.

    Args:
        name: how it is logged.
        source: "reward_model" (the one this run trains), a folder of a reward model, or "module:function" with the
            signature reward(prompts: list[str], responses: list[str]) -> list[float].
        weight: factor in the sum.
    """

    name: str = "reward_model"
    source: str = "reward_model"
    weight: float = 1.0


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation with a KL penalty to a frozen reference. Defaults are the classic ones.

    Args:
        steps: rollout + update rounds.
        batch_size: episodes per step.
        micro_batch_size: episodes per forward pass; fixed once per rollout, the same for scoring and updates.
        epochs: passes over each rollout.
        minibatches: optimiser steps per pass; each takes whole micro-batches.
        max_new_tokens: response length at most.
        ignore_eos: the end-of-sequence token is never sampled and left out of the distribution everywhere, so every
            response has max_new_tokens tokens: for continuing texts and for timing, not for models that must stop.
        temperature: of sampling; log-probs are those of the tempered distribution everywhere.
        top_k: sample among the k likeliest (0 = all). Anything but 0 makes sampler and trainer log-probs differ.
        top_p: sample inside the smallest set with this mass (1 = all). Likewise.
        train_layers: how many of the last layers train (-1 = all).
        train_embeddings: train the input embeddings too (with tied weights this is the head as well).
        train_head: train the output head too (with tied weights this is the embeddings as well).
        critic: "head" (a value head on the frozen reference's last hidden state) or "layers" (own copies of the trained
            layers on the shared frozen trunk, and a head).
        dtype: weights and compute; trained weights keep float32 masters.
        lr: peak learning rate of the policy.
        value_lr: peak learning rate of the critic.
        adam_beta1: decay of AdamW's mean gradient.
        adam_beta2: decay of its mean square.
        adam_eps: added to its denominator.
        weight_decay: AdamW's, on the policy's trained weights.
        lr_schedule: "constant", "linear" or "cosine" (both to 0).
        lr_warmup_steps: linear warm-up, in PPO steps.
        critic_warmup_steps: first steps that train the critic alone.
        max_grad_norm: gradient clipping by global norm (0 = off).
        gamma: discount per token.
        lam: lambda of generalised advantage estimation.
        clip_low: the probability ratio is clipped to 1 - clip_low ...
        clip_high: ... and 1 + clip_high.
        dual_clip: bound on the loss for negative advantages (null = off; 3 is usual).
        value_clip: clip of value changes (0 = off).
        entropy_coef: weight of the entropy bonus (0 = off).
        whiten_advantages: mean 0, variance 1 over the rollout's tokens.
        aggregation: how token losses are weighted.
        kl_coef: KL penalty inside the reward.
        kl_kind: estimator of that KL per token.
        kl_controller: "fixed" or "adaptive" (towards kl_target).
        kl_target: (adaptive) in nats, see kl_unit.
        kl_horizon: (adaptive) episodes over which the controller reacts.
        kl_unit: "sequence" (summed over a response) or "token" (mean per token).
        kl_loss_coef: KL as a loss besides (0 = off).
        kl_loss_kind: estimator of that KL.
        score_at: "last" response token, or one slot "after" it where there is one.
        score_clip: bound on |score| (0 = off).
        missing_eos_penalty: subtracted from the score of responses that did not end by themselves.
    """

    steps: int = 20
    batch_size: int = 64
    micro_batch_size: int = 16
    epochs: int = 1
    minibatches: int = 4
    max_new_tokens: int = 20
    ignore_eos: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    train_layers: int = 6
    train_embeddings: bool = False
    train_head: bool = False
    critic: Literal["head", "layers"] = "head"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lr: float = 6e-4
    value_lr: float = 1e-3
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    lr_warmup_steps: int = 1
    critic_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float = 0.2
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum", "constant"] = (
        "token-mean"
    )
    kl_coef: float = 0.05
    kl_kind: Literal["k1", "abs", "k2", "k3"] = "k1"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000.0
    kl_unit: Literal["sequence", "token"] = "sequence"
    kl_loss_coef: float = 0.0
    kl_loss_kind: Literal["k1", "abs", "k2", "k3", "k1+", "k3+"] = "k3"
    score_at: Literal["last", "after"] = "last"
    score_clip: float = 0.0
    missing_eos_penalty: float = 0.0


@dataclass(frozen=True)
class EvalConfig:
    """The final comparison of pretrained, fine-tuned and PPO models.

    Args:
        samples: held-out prompts that every model answers.
        human_pairs: sampled human comparisons the reward model is graded on.
        judge: an independent scorer that training never sees: "vader", "none", or "module:function".
    """

    samples: int = 200
    human_pairs: int = 5000
    judge: str = "vader"


@dataclass(frozen=True)
class RunConfig:
    """The whole of RLHF in one run.

    Args:
        output: folder of the run; created, and refused if it holds another run (see overwrite).
        overwrite: replace an earlier run in that folder.
        model: "smollm2-135m-instruct" (fetched by name), a model folder, a hub name, a .json model config (random
            weights, needs tokenizer), or "tiny" (random two-layer model and tokenizer made in process).
        tokenizer: folder or hub name, where it is not the model's own.
        seed: of everything random; the same seed gives the same run.
        threads: CPU threads (0 = leave to torch).
        device: "auto" takes CUDA where there is one.
        data: texts, ratings and prompts.
        sft: optional supervised fine-tuning.
        rank: comparisons and ranking.
        reward_model: training of the reward model.
        reward: weighted terms of the reward; each is logged.
        ppo: reinforcement learning. The demo continues texts to a fixed length; set ppo.ignore_eos to false for a model
            that must learn to stop.
        evaluate: final comparison.
    """

    output: str = "runs/demo"
    overwrite: bool = False
    model: str = "smollm2-135m-instruct"
    tokenizer: str | None = None
    seed: int = 0
    threads: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    reward: list[RewardSource] = field(default_factory=lambda: [RewardSource()])
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(ignore_eos=True))
    evaluate: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True)
class GenerateConfig:
    """Answers of a model to prompts.

    Args:
        model: a model folder, for example runs/demo/policy, or a hub name.
        tokenizer: folder or hub name, where it is not the model's own.
        prompts: a text file, one prompt a line.
        prompt: one prompt; repeat the flag for more.
        samples: responses per prompt.
        max_new_tokens: response length at most.
        temperature: of sampling.
        top_k: sample among the k likeliest (0 = all).
        top_p: sample inside the smallest set with this mass (1 = all).
        seed: of sampling.
        output: a JSONL file for the answers; they are printed if there is none.
    """

    model: str = ""
    tokenizer: str | None = None
    prompts: str | None = None
    prompt: list[str] = field(default_factory=list)
    samples: int = 1
    max_new_tokens: int = 40
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    output: str | None = None


PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "output": "runs/tiny",
        "model": "tiny",
        "data.source": "planted",
        "data.train_texts": 240,
        "data.heldout_texts": 120,
        "data.prompt_texts": 120,
        "data.prompt_words": 3,
        "rank.comparisons": 4000,
        "reward_model.batch_size": 256,
        "reward_model.epochs": 3,
        "ppo.steps": 3,
        "ppo.batch_size": 16,
        "ppo.micro_batch_size": 4,
        "ppo.max_new_tokens": 8,
        "ppo.train_layers": 1,
        "ppo.lr": 1e-3,
        "evaluate.samples": 32,
        "evaluate.human_pairs": 500,
    },
}
