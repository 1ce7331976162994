"""`PPOEngine`: rollout -> score -> update over policy, frozen reference, critic and rewards.

Exactly on-policy: micro-batches are cut once per rollout; `score` and every epoch of `update` run the same ones through
the same code, so before the first optimiser step the ratio is exactly 1. Where policy and reference share frozen
layers, the hidden states at the split are kept from decoding and reused by reference, critic, reward and every epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_engine import data, models, ops, ppo, rewards, rollout
from rlhf_engine.config import PPOConfig
from rlhf_engine.models import Critic, HiddenStates, LanguageModel
from rlhf_engine.reward_model import ClassifierRewardModel, FrozenRewardModel, RewardModel
from rlhf_engine.rewards import RewardFunction, RewardTerm
from rlhf_engine.types import Experience, Prompts, Rollout, StepStats
from rlhf_engine.validation import validate_ppo, validate_rewards

Progress = Callable[[str, int, int, str], None]  # phase, done, total, unit


class PPOEngine:
    """Drives PPO on one device. `step(prompts)` = `update(score(rollout(prompts)))`; each part can be called alone.

    Args:
        policy: causal LM. Without `reference`, its parameters are frozen here as the config says and the reference is a
            copy that shares the frozen ones. With `reference`, requires_grad is taken as it is.
        reference: frozen causal LM of the same family.
        value: a classifier with one output to start the critic from; None builds what `config.critic` says.
        reward: a reward model, a function reward(prompts, responses) -> list of floats, or a list of `RewardTerm`.
        tokenizer: the policy's.
        config: see PPOConfig.
        seed: of sampling and shuffling.
        progress: called with (phase, done, total, unit) while a step runs.

    Raises:
        ValueError: no reward, nothing to train, or models that do not fit together.
    """

    def __init__(
        self,
        policy: LanguageModel,
        reference: LanguageModel | None = None,
        value: LanguageModel | None = None,
        reward: RewardModel | RewardFunction | list[RewardTerm] | None = None,
        tokenizer: Any = None,
        config: PPOConfig | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.config = config or PPOConfig()
        validate_ppo(self.config)
        if reward is None or reward == []:
            raise ValueError(
                "PPOEngine: reward is missing; pass a reward model or a function reward(prompts, responses)"
            )
        if tokenizer is None:
            raise ValueError("PPOEngine: tokenizer is missing; pass the policy's")
        self.rewards = reward if isinstance(reward, list) else [RewardTerm("reward", reward)]
        validate_rewards([(term.name, term.weight) for term in self.rewards])
        self.tokenizer = tokenizer
        if reference is None:
            c = self.config
            models.freeze(
                policy, train_layers=c.train_layers, train_embeddings=c.train_embeddings, train_head=c.train_head
            )
            reference = models.copy_sharing_frozen(policy)
        rewards.keep_still(self.rewards, policy, reference)
        self.policy = policy.eval()  # eval: dropout would make old and new log-probs differ
        self.reference = reference.requires_grad_(False).eval()
        self.reference_checksum = models.checksum(self.reference)
        self.split = self._split()
        self.critic = self._critic(value)
        self.policy_optimiser = ppo.MasterAdamW(policy.parameters(), self.config.lr, self.config)
        self.value_optimiser = ppo.MasterAdamW(self.critic.parameters(), self.config.value_lr, self.config)
        if not self.policy_optimiser.parameters:
            raise ValueError("PPOEngine: the policy has no trainable parameter; raise ppo.train_layers")
        self.kl_controller = ppo.KLController.from_config(self.config)
        self.device = next(policy.parameters()).device
        for term in self.rewards:
            if isinstance(term.source, (FrozenRewardModel, ClassifierRewardModel)):
                term.source.to(self.device).eval()
        self.sampling = torch.Generator(self.device).manual_seed(seed)
        self.shuffling = torch.Generator().manual_seed(seed)
        self.progress = progress or (lambda phase, done, total, unit: None)
        self.step_index = 0
        self.first_ratio_deviation = math.nan  # largest of all steps so far, each before its first optimiser step

    def _split(self) -> int | None:
        """The first layer that is not shared with the reference; None where not even the embeddings are."""
        depth = models.shared_depth(self.policy, self.reference)
        return None if depth is None else min(depth, len(models.decoder_layers(self.policy)) - 1)

    def _critic(self, value: LanguageModel | None) -> Critic:
        if value is not None:
            # A copy: the model given may be a reward model, which must stay as it is.
            critic = models.critic_from_classifier(models.copy_sharing_frozen(value))
        else:
            body = None
            if self.config.critic == "layers":
                # Same weights, split and sharing as the policy at its start; trains by its own loss.
                body = models.copy_sharing_frozen(self.policy)
                body.get_output_embeddings().requires_grad_(False)
            critic = Critic(self.policy.config.get_text_config().hidden_size, body)
        return critic.to(next(self.policy.parameters()).device).eval()  # eval: dropout would be noise in the values

    def _prompts(self, prompts: Prompts | list[str]) -> Prompts:
        made = prompts if isinstance(prompts, Prompts) else data.make_prompts(prompts, self.tokenizer)
        if not len(made):
            raise ValueError("PPOEngine: there are no prompts")
        made.input_ids, made.attention_mask = made.input_ids.to(self.device), made.attention_mask.to(self.device)
        return made

    def rollout(self, prompts: Prompts | list[str], *, generator: torch.Generator | None = None) -> Rollout:
        """Samples one response per prompt, with the engine's own generator unless given one, and cuts micro-batches."""
        c = self.config
        capture = set() if self.split is None else {self.split, *(i for i in self._reward_layers() if i <= self.split)}
        return rollout.sample(
            self.policy, self._prompts(prompts), tokenizer=self.tokenizer, max_new_tokens=c.max_new_tokens,
            micro_batch_size=c.micro_batch_size, ignore_eos=c.ignore_eos,
            temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
            capture=capture, generator=generator or self.sampling,
            progress=lambda done, total: self.progress("generate", done, total, "tokens"),
        )  # fmt: skip

    @torch.no_grad()
    def score(self, batch: Rollout) -> Experience:
        """Log-probs of policy and reference, values, rewards, advantages; nothing is trained."""
        shape = batch.response_mask.shape
        zeros = {k: torch.zeros(shape, device=self.device) for k in ("logprobs", "ref", "entropy", "values")}
        states: list[HiddenStates] = []
        critic_hidden = []
        late = self._reward_layers() - set(batch.hidden)  # read by reward models, not kept by decoding
        for rows in batch.micro_batches:
            zeros["logprobs"][rows], zeros["entropy"][rows] = self._logprobs(
                self.policy, batch, rows, self._body(self.policy, batch, rows)[0]
            )
            ref_hidden, captured = self._body(self.reference, batch, rows, capture=late)
            zeros["ref"][rows], _ = self._logprobs(self.reference, batch, rows, ref_hidden)
            states.append(captured)
            own = ref_hidden if self.critic.body is None else self._body(self.critic.body, batch, rows)[0]
            own = _before_responses(own, batch)
            zeros["values"][rows] = self.critic(own)
            critic_hidden.append(own)
            self.progress("score", rows.stop, len(batch), "responses")
        hidden = {k: torch.cat([s[k] for s in states]) for k in states[0]}
        terms = self.reward_terms(batch, hidden)
        scores = rewards.weighted(self.rewards, terms)
        shaped = ppo.shape_advantages(
            self.config, scores=scores, finished=batch.finished, logprobs=zeros["logprobs"], ref_logprobs=zeros["ref"],
            values=zeros["values"], mask=batch.response_mask, kl_coef=self.kl_controller.coef,
        )  # fmt: skip
        return Experience(
            rollout=batch, logprobs=zeros["logprobs"], ref_logprobs=zeros["ref"], entropy=zeros["entropy"],
            values=torch.where(shaped.value_mask, zeros["values"], 0.0), scores=scores, score_terms=terms,
            rewards=shaped.rewards, kl=shaped.kl,
            advantages=shaped.advantages, returns=shaped.returns, value_mask=shaped.value_mask,
            critic_hidden=torch.cat(critic_hidden) if self.critic.body is None else None,
        )  # fmt: skip

    def _reward_layers(self) -> set[int]:
        return rewards.layers_read(self.rewards, self.reference)

    def reward_terms(self, batch: Rollout, hidden: HiddenStates | None = None) -> dict[str, Tensor]:
        """name -> (B,) unweighted rewards of a rollout; `hidden` are reference states beyond those in the rollout."""
        return rewards.score(self.rewards, batch, self.reference, {**batch.hidden, **(hidden or {})})

    def _body(
        self, model: LanguageModel, batch: Rollout, rows: slice, capture: Iterable[int] = ()
    ) -> tuple[Tensor, HiddenStates]:
        start = None
        if self.split is not None and self.split in batch.hidden and self._shares_trunk(model):
            start = (self.split, batch.hidden[self.split][rows])
        return models.run_body(model, batch.tokens[rows], batch.attention_mask[rows], capture=capture, start=start)

    def _shares_trunk(self, model: LanguageModel) -> bool:
        return (
            model is self.policy or model is self.reference or models.shared_depth(model, self.reference) == self.split
        )

    def _head(self, model: LanguageModel, batch: Rollout, rows: slice) -> dict[str, Any]:
        """Arguments of the head ops besides hidden states."""
        weight, bias = models.output_head(model)
        if self.config.ignore_eos:  # a bias of -inf: as rollout does it
            bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
            bias[self.tokenizer.eos_token_id] = -torch.inf
        targets = batch.tokens[rows, batch.tokens.shape[1] - batch.response_mask.shape[1] :]
        return {
            "weight": weight, "targets": targets, "bias": bias, "rows": batch.sampled_rows(rows),
            "temperature": self.config.temperature, **models.head_options(model),
        }  # fmt: skip

    def _logprobs(self, model: LanguageModel, batch: Rollout, rows: slice, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_logprobs(_before_responses(hidden, batch), **self._head(model, batch, rows))

    def _policy_loss(self, e: Experience, rows: slice, denom: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, _ = self._body(self.policy, e.rollout, rows)
        token_loss = ppo.token_loss(
            self.config, old_logprobs=e.logprobs[rows], ref_logprobs=e.ref_logprobs[rows],
            advantages=e.advantages[rows],
        )  # fmt: skip
        return ops.linear_policy_loss(
            _before_responses(hidden, e.rollout), token_loss=token_loss, denom=denom,
            weights=ppo.weights(self.config, e.rollout.response_mask[rows]),
            **self._head(self.policy, e.rollout, rows),
        )  # fmt: skip

    def update(self, experience: Experience) -> dict[str, float]:
        """All epochs of PPO on one scored rollout, then one step of the schedules; returns the finalised metrics."""
        c = self.config
        parts: list[dict[str, Tensor]] = []
        warm_up = self.step_index < c.critic_warmup_steps
        factor = ppo.lr_factor(self.step_index, c)
        extra: dict[str, float] = {"skipped_steps": 0.0}
        norms: dict[str, list[float]] = {"policy/grad_norm": [], "value/grad_norm": []}
        minibatches = min(c.minibatches, len(experience.rollout.micro_batches))  # a small rollout has fewer
        groups_done, groups_total = 0, c.epochs * minibatches
        for _ in range(c.epochs):
            order = torch.randperm(len(experience.rollout.micro_batches), generator=self.shuffling).tolist()
            for group in [order[i::minibatches] for i in range(minibatches)]:
                metrics = self._minibatch(experience, [experience.rollout.micro_batches[i] for i in group], warm_up)
                if not parts and not warm_up:
                    extra["first_update_ratio_max_abs_dev"] = float(torch.expm1(metrics["log_ratio_max_abs"]))
                    # In this order, because max(x, NaN) is x.
                    self.first_ratio_deviation = max(
                        extra["first_update_ratio_max_abs_dev"], self.first_ratio_deviation
                    )
                parts.append(metrics)
                for key, optimiser in (("policy", self.policy_optimiser), ("value", self.value_optimiser)):
                    if key == "policy" and warm_up:
                        continue
                    norm, taken = optimiser.step(factor=factor, max_grad_norm=c.max_grad_norm)
                    norms[f"{key}/grad_norm"].append(norm)
                    extra["skipped_steps"] += not taken
                groups_done += 1
                self.progress("update", groups_done, groups_total, "minibatches")
        if extra["skipped_steps"] == sum(map(len, norms.values())):
            raise ValueError("update: every gradient was NaN or infinite; look at the rewards, or lower ppo.lr")
        final = {ppo.metric_name(k): v for k, v in ops.finalize_metrics(ops.merge_metrics(parts)).items()}
        for key in ("policy/loss", "value/loss"):
            if key in final:
                final[key] /= len(parts)
        final |= {k: sum(v) / len(v) for k, v in norms.items() if v}
        self.step_index += 1
        kl = ppo.experience_metrics(experience)["kl/token" if c.kl_unit == "token" else "kl/sequence"]
        self.kl_controller.update(kl, len(experience.rollout))
        return final | extra | {"lr": c.lr * factor}

    def _minibatch(self, e: Experience, group: list[slice], warm_up: bool) -> dict[str, Tensor]:
        """Forward and backward over whole micro-batches; gradients add up to those of one big batch."""
        c, batch = self.config, e.rollout
        mask = torch.cat([batch.response_mask[rows] for rows in group])
        value_mask = torch.cat([e.value_mask[rows] for rows in group])
        denom, value_denom = ops.token_denom(mask, c.aggregation), ops.token_denom(value_mask, "token-mean")
        parts = []
        for rows in group:
            if not warm_up:
                loss, metrics = self._policy_loss(e, rows, denom)
                loss.backward()
                parts += [metrics, {"policy_loss_total": loss.detach().double()}]
            own = e.critic_hidden[rows] if e.critic_hidden is not None else self._critic_hidden(batch, rows)
            loss, metrics = ops.value_loss(
                self.critic(own), e.values[rows], e.returns[rows], e.value_mask[rows], clip=c.value_clip,
                denom=value_denom,
            )  # fmt: skip
            loss.backward()
            parts += [metrics, {"value_loss_total": loss.detach().double()}]
        return ops.merge_metrics(parts)

    def _critic_hidden(self, batch: Rollout, rows: slice) -> Tensor:
        return _before_responses(self._body(self.critic.body, batch, rows)[0], batch)

    def step(self, prompts: Prompts | list[str]) -> StepStats:
        """One round of PPO on these prompts."""
        clock = [time.perf_counter()]
        batch = self.rollout(prompts)
        clock.append(time.perf_counter())
        experience = self.score(batch)
        clock.append(time.perf_counter())
        metrics = ppo.experience_metrics(experience) | {"kl/coef": self.kl_controller.coef}
        metrics |= self.update(experience)
        clock.append(time.perf_counter())
        seconds = dict(
            zip(("rollout", "score", "update"), (b - a for a, b in zip(clock, clock[1:], strict=False)), strict=True)
        )
        metrics["tokens_per_second"] = float(batch.response_mask.sum()) / (clock[-1] - clock[0])
        return StepStats(self.step_index, metrics, seconds, batch.texts)


def _before_responses(hidden: Tensor, batch: Rollout) -> Tensor:
    """(B, P + T, H) -> (B, T, H): the states that predict the response's tokens."""
    return hidden[:, batch.prompts.input_ids.shape[1] - 1 : -1]
