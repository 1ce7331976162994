"""The parts of PPO that are neither a tensor op nor a model: KL control, schedules, optimiser, shaping by config."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from rlhf_engine import ops
from rlhf_engine.config import PPOConfig
from rlhf_engine.types import Experience


@dataclass(slots=True)
class KLController:
    """The KL coefficient: fixed, or k <- k (1 + clip(kl / target - 1, +-0.2) n / horizon) (Ziegler et al. 2019)."""

    coef: float
    adaptive: bool
    target: float
    horizon: float

    @classmethod
    def from_config(cls, config: PPOConfig) -> KLController:
        return cls(config.kl_coef, config.kl_controller == "adaptive", config.kl_target, config.kl_horizon)

    def update(self, kl: float, episodes: int) -> None:
        """`kl` in nats, per sequence or per token as `target` is; `episodes` seen since the last update."""
        if self.adaptive:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon

    def state(self) -> dict[str, float | bool]:
        return asdict(self)


def lr_factor(step: int, config: PPOConfig) -> float:
    """Learning rate over its peak at PPO step `step` (from 0): linear warm-up, then the schedule, 0 after the last."""
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    progress = min(1.0, (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps))
    if config.lr_schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1.0


def shape_advantages(
    config: PPOConfig,
    *,
    scores: Tensor,
    finished: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> ops.ShapedAdvantages:
    """ops.kl_gae as the config asks for it; the missing-eos penalty is part of the score, before its clip."""
    scores = scores - config.missing_eos_penalty * (~finished).float()
    return ops.kl_gae(
        scores, logprobs, ref_logprobs, values, mask, kl_coef=kl_coef, kl_kind=config.kl_kind, gamma=config.gamma,
        lam=config.lam, whiten=config.whiten_advantages, score_at=config.score_at, score_clip=config.score_clip or None,
    )  # fmt: skip


def token_loss(config: PPOConfig, *, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor) -> ops.TokenLoss:
    """ops.ppo_token_loss as the config asks for it, to plug into ops.linear_policy_loss."""
    return ops.ppo_token_loss(
        old_logprobs, advantages, clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
        entropy_coef=config.entropy_coef, ref_logprobs=ref_logprobs if config.kl_loss_coef else None,
        kl_coef=config.kl_loss_coef, kl_kind=config.kl_loss_kind,
    )  # fmt: skip


def weights(config: PPOConfig, mask: Tensor) -> Tensor:
    """Token weights of the configured aggregation; "constant" divides by the longest response allowed (Dr. GRPO)."""
    return ops.token_weights(mask, config.aggregation, constant_length=float(config.max_new_tokens))


class MasterAdamW:
    """Fused AdamW on float32 masters. Weights that are float32 already are their own masters.

    Updates of 1e-6 relative size vanish in bfloat16 (8 bits of mantissa); the masters keep them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, config: PPOConfig) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.lr = lr
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        self.adam = (
            torch.optim.AdamW(
                self.masters, lr=lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                weight_decay=config.weight_decay, fused=True,
            )
            if self.masters
            else None
        )  # fmt: skip

    @torch.no_grad()
    def step(self, *, factor: float, max_grad_norm: float) -> tuple[float, bool]:
        """Clips, steps at `factor` times the peak rate, zeroes the gradients.

        Returns the gradient norm before clipping, and whether the step was taken: one NaN in one gradient would make
        every parameter NaN, so a non-finite norm skips it.
        """
        if self.adam is None:
            return 0.0, True
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self.masters, max_grad_norm or math.inf))
        finite = math.isfinite(norm)
        if finite:
            for group in self.adam.param_groups:
                group["lr"] = self.lr * factor
            self.adam.step()
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.zero_grad()
        return norm, finite

    def zero_grad(self) -> None:
        for tensor in [*self.parameters, *self.masters]:
            tensor.grad = None


def metric_name(name: str) -> str:
    """Groups of the log: policy/..., value/..."""
    if name.startswith(("value_", "return_", "explained_")):
        return "value/" + name.removeprefix("value_").removesuffix("_total")
    return "policy/" + name.removeprefix("policy_").removesuffix("_total")


def experience_metrics(e: Experience) -> dict[str, float]:
    """What a scored rollout says by itself, in nats, score units and tokens."""
    mask, count = e.rollout.response_mask, e.rollout.response_mask.sum().clamp(min=1)
    spread = torch.where(mask, (e.logprobs - e.rollout.sampler_logprobs).abs(), 0.0)
    k1 = torch.where(mask, e.logprobs - e.ref_logprobs, 0.0)
    out = {
        "score/mean": e.scores.mean(),
        "score/std": e.scores.std(correction=0),
        **{f"score/{name}": value.mean() for name, value in e.score_terms.items()},
        "kl/sequence": k1.sum(1).mean(),
        "kl/token": k1.sum() / count,
        "entropy": e.entropy.sum() / count,
        "reward/mean": e.rewards.sum(1).mean(),
        "reference/nll_per_token": -e.ref_logprobs.sum() / count,
        "sampler/logprob_abs_diff_mean": spread.sum() / count,
        "sampler/logprob_abs_diff_max": spread.max() if spread.numel() else spread.sum(),
        "response/tokens_mean": mask.sum(1).float().mean(),
        "response/finished_fraction": e.rollout.finished.float().mean(),
    }
    return {k: float(v) for k, v in out.items()}
