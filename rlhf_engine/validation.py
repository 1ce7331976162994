"""What settings must hold beyond their types: bounds, names, combinations. Standard library only, like config.py."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, Literal

from rlhf_engine.config import GenerateConfig, PPOConfig, RewardSource, RunConfig

Bounds = dict[str, tuple[Callable[[float], bool], str]]  # rule in words -> (rule, keys that it holds for)

BOUNDS: Bounds = {
    "must be greater than 0": (
        lambda x: x > 0,
        "ppo.steps ppo.batch_size ppo.micro_batch_size ppo.epochs ppo.minibatches ppo.max_new_tokens ppo.temperature "
        "ppo.adam_eps ppo.clip_high ppo.kl_horizon ppo.kl_target data.prompt_words data.heldout_texts "
        "data.prompt_texts rank.comparisons evaluate.human_pairs sft.epochs sft.batch_size "
        "sft.max_tokens reward_model.epochs reward_model.batch_size reward_model.hidden_units reward_model.max_tokens "
        "reward_model.feature_batch",
    ),
    "must be at least 2": (lambda x: x >= 2, "evaluate.samples"),
    "must lie between 0 and 2^63 - 1": (lambda x: 0 <= x < 2**63, "seed"),
    "must lie between 0 and 1024": (lambda x: 0 <= x <= 1024, "threads"),
    "must not be negative": (
        lambda x: x >= 0,
        "data.train_texts rank.l2 sft.lr reward_model.lr reward_model.weight_decay reward_model.margin "
        "reward_model.centering ppo.lr ppo.value_lr ppo.weight_decay ppo.top_k ppo.lr_warmup_steps "
        "ppo.critic_warmup_steps ppo.max_grad_norm ppo.value_clip ppo.entropy_coef ppo.kl_coef ppo.kl_loss_coef "
        "ppo.score_clip ppo.missing_eos_penalty",
    ),
    "must be -1 (all) or more": (lambda x: x >= -1, "sft.train_layers reward_model.train_layers ppo.train_layers"),
    "must lie between 0 and 1": (lambda x: 0 <= x <= 1, "ppo.gamma ppo.lam ppo.clip_low rank.same_rater"),
    "must be at least 0 and below 1": (lambda x: 0 <= x < 1, "ppo.adam_beta1 ppo.adam_beta2 reward_model.dropout"),
    "must lie strictly between 0 and 1": (lambda x: 0 < x < 1, "rank.level"),
    "must be greater than 0 and at most 1": (lambda x: 0 < x <= 1, "ppo.top_p"),
}


GENERATE_BOUNDS: Bounds = {
    "must be greater than 0": (lambda x: x > 0, "samples max_new_tokens temperature"),
    "must not be negative": (lambda x: x >= 0, "top_k"),
    "must lie between 0 and 2^63 - 1": (lambda x: 0 <= x < 2**63, "seed"),
    "must be greater than 0 and at most 1": (lambda x: 0 < x <= 1, "top_p"),
}


METRICS = ("mean", "std")  # what a reward's name may not be: the log has these of the weighted sum


def validate_generate(config: GenerateConfig) -> None:
    """Raises ValueError naming the key and what to write instead."""
    _check_values(config, "", GENERATE_BOUNDS)
    if not config.model:
        raise ValueError("model is missing: name a model folder, for example --model runs/demo/policy")
    if not config.prompts and not config.prompt:
        raise ValueError('prompts are missing: give a file with --prompts, or write one with --prompt "..."')


def validate(config: RunConfig) -> None:
    """Likewise for a whole run."""
    _check_values(config, "", BOUNDS)
    validate_ppo(config.ppo)
    layers = config.reward_model.layers
    if layers is not None and (not layers or min(layers) < 0 or len(set(layers)) != len(layers)):
        raise ValueError(f"reward_model.layers must name different layers, counted from 0, got {layers}")
    if not config.output.strip() or not config.model.strip():
        raise ValueError(f"{'model' if config.output.strip() else 'output'} is empty")
    if not config.reward:
        raise ValueError("reward is empty: name at least one source, for example reward_model")
    validate_rewards([(source.name, source.weight) for source in config.reward])


def validate_rewards(terms: list[tuple[str, float]]) -> None:
    """Names and weights of reward terms; for lists made in Python too."""
    names = [name for name, _ in terms]
    if len(set(names)) != len(names):
        raise ValueError(f"reward names must differ, got {', '.join(names)}")
    for name, weight in terms:
        if not name.strip() or name in METRICS:
            raise ValueError(f"reward names must not be empty, {' or '.join(METRICS)}, got {name!r}")
        if not math.isfinite(weight):
            raise ValueError(f"reward {name}: its weight must be a finite number, got {weight}")


def validate_ppo(p: PPOConfig) -> None:
    """Likewise for PPO alone, however the config was made."""
    bounds = {
        rule: (holds, " ".join(k.removeprefix("ppo.") for k in keys.split() if k.startswith("ppo.")))
        for rule, (holds, keys) in BOUNDS.items()
    }
    _check_values(p, "ppo.", bounds)
    if p.dual_clip is not None and not p.dual_clip > 1:
        raise ValueError(f"ppo.dual_clip must be greater than 1, got {p.dual_clip} (null switches it off)")
    groups = -(-p.batch_size // p.micro_batch_size)
    if p.minibatches > groups:
        lower = (
            f"ppo.micro_batch_size to {p.batch_size // p.minibatches}"
            if p.minibatches <= p.batch_size
            else f"ppo.minibatches to {groups}"
        )
        raise ValueError(
            f"ppo.minibatches is {p.minibatches}, but ppo.batch_size {p.batch_size} in micro-batches of "
            f"{p.micro_batch_size} gives only {groups}: a minibatch takes whole micro-batches, so lower {lower}"
        )
    if p.ignore_eos and p.missing_eos_penalty:
        raise ValueError("ppo.missing_eos_penalty would hit every response, since ppo.ignore_eos lets none end")
    if p.train_layers == 0 and p.critic == "layers":
        raise ValueError("ppo.critic=layers copies the trained layers, but ppo.train_layers is 0; use ppo.critic=head")
    if p.train_layers == 0 and not p.train_embeddings and not p.train_head:
        raise ValueError("ppo.train_layers is 0 and neither embeddings nor head train: PPO would have nothing to train")


def _check_values(config: Any, prefix: str, bounds: Bounds) -> None:
    """Nulls only where they mean something, choices among those there are, numbers inside their bounds."""
    for key, kind, value in _settings(config, prefix):
        if value is None and type(None) not in typing.get_args(kind):
            raise ValueError(f"{key} must not be null")
        if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            raise ValueError(f"{key} must be one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}")
    for rule, (holds, keys) in bounds.items():
        for key in keys.split():
            value = reduce(getattr, key.split("."), config)
            if value is not None and not (math.isfinite(value) and holds(value)):
                rule = rule if math.isfinite(value) else "must be a finite number"
                raise ValueError(f"{prefix}{key} {rule}, got {value}")


def _settings(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, type, value) of every setting."""
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(hints[field.name]):
            if value is None:
                raise ValueError(f"{key} must not be null")
            yield from _settings(value, f"{key}.")
        else:
            yield key, hints[field.name], value
            if hints[field.name] == list[RewardSource]:
                for term in value or []:
                    yield from _settings(term, f"{key}.")
