"""TRL 1.12.0 and `preset("trl", ...)`. Its PPO is one method, so that runs, on models of a few hundred weights.

masked_whiten and masked_mean, which it calls at every stage, are replaced by themselves plus a look at the caller's
tensors; gradients are those of its own backward. Then the ops recompute each stage from what went into it.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import trainers
from tokenizers import Tokenizer, models
from torch import Tensor
from trainers import agree, backends, dtypes, make_batch
from transformers import PhiConfig, PhiForCausalLM, PhiForSequenceClassification, PreTrainedTokenizerFast

from rlhf_engine import ops

WORDS, EOS, PAD = 10, 10, 11
RUNS = {
    "defaults": {},
    "reward whitening and k3": {"whiten_rewards": True, "kl_estimator": "k3"},
}


@dataclass
class Run:
    """Tensors of train(), by the names they have there."""

    arguments: Any
    raw_rewards: dict[str, Tensor] = field(default_factory=dict)  # where rewards are whitened, if they are
    batch: dict[str, Tensor] = field(default_factory=dict)  # where advantages are whitened
    steps: list[dict[str, Tensor]] = field(default_factory=list)  # where each micro-batch has its policy loss
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        return ~self.batch["padding_mask"]

    @property
    def value_mask(self) -> Tensor:
        return ~self.batch["padding_mask_p1"]


def tensors(frame: FrameType) -> dict[str, Tensor]:
    return {name: value for name, value in frame.f_locals.items() if isinstance(value, Tensor)}


def watch(patch: pytest.MonkeyPatch, module: Any, run: Run) -> None:
    whiten, mean = module.masked_whiten, module.masked_mean

    def watched_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        (run.batch if shift_mean else run.raw_rewards).update(tensors(sys._getframe(1)))
        return whiten(values, mask, shift_mean)

    def watched_mean(values: Tensor, mask: Tensor) -> Tensor:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train" and values is caller.f_locals.get("pg_loss_max"):
            step = tensors(caller) | {"rows": torch.from_numpy(caller.f_locals["micro_batch_inds"])}
            for name in ("new_logprobs", "vpred"):
                step[name].retain_grad()
            run.steps.append(step)
        return mean(values, mask)

    patch.setattr(module, "masked_whiten", watched_whiten)
    patch.setattr(module, "masked_mean", watched_mean)


def model(kind: Any, dtype: torch.dtype) -> Any:
    config = PhiConfig(
        vocab_size=WORDS + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
    )  # fmt: skip
    built = kind(config).to(dtype)
    if kind is PhiForCausalLM:
        with torch.no_grad():
            built.lm_head.weight *= 10  # far enough from uniform, and the reference from the policy
            built.lm_head.bias[PAD] = -1e4  # TRL takes a sampled pad token for the end
    return built


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in RUNS for dtype in (torch.float32, torch.float64)], ids=str
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rollout of 32 responses and four epochs over them in two micro-batches."""
    name, dtype = request.param
    module = trainers.load("trl.experimental.ppo.ppo_trainer")
    words = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<pad>": PAD}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    np.random.seed(0)  # TRL shuffles with it
    prompts = [{"input_ids": torch.randint(WORDS, (4,)).tolist()} for _ in range(32)]
    kinds = (PhiForCausalLM, PhiForCausalLM, PhiForSequenceClassification, PhiForSequenceClassification)
    policy, reference, value, reward = (model(kind, dtype) for kind in kinds)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # what it is still to learn of newer libraries
        arguments = module.PPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), total_episodes=32, per_device_train_batch_size=16,
            gradient_accumulation_steps=2, response_length=12, stop_token="eos",
            missing_eos_penalty=1.0, learning_rate=0.01, seed=1, bf16=False, use_cpu=True, gradient_checkpointing=False,
            num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True, **RUNS[name],
        )  # fmt: skip
        trainer = module.PPOTrainer(arguments, tokenizer, policy, reference, reward, prompts, value)
        watched = Run(arguments)
        watch(patch, module, watched)
        trainer.train()
    watched.metrics = trainer.state.log_history[-1]
    assert len(watched.steps) == 8 and watched.mask.any(1).all()
    full = watched.mask.all(1)
    assert 0 < full.sum() < len(full), "responses that fill their row, and shorter ones"
    return watched


def same(run: Run) -> torch.dtype:
    return run.batch["values"].dtype


def test_presets_are_the_defaults() -> None:
    config = trainers.load("trl.experimental.ppo.ppo_config").PPOConfig
    for op in ("gae", "kl_gae"):
        assert {"gamma": config.gamma, "lam": config.lam}.items() <= ops.preset("trl", op).items()
    clip = {"clip_low": config.cliprange, "clip_high": config.cliprange, "dual_clip": None}
    assert ops.preset("trl", "ppo_loss") == clip
    assert ops.preset("trl", "value_loss") == {"clip": config.cliprange_value}
    assert ops.preset("trl", "kl_reward")["kind"] == config.kl_estimator
    assert ops.preset("trl", "kl_gae")["kl_kind"] == config.kl_estimator


@backends
def test_from_scores_to_advantages(run: Run, backend: str) -> None:
    batch, arguments = run.batch, run.arguments
    inputs = (batch["scores"], batch["logprobs"], batch["ref_logprobs"], batch["values"], run.mask)
    flags = ops.preset("trl", "kl_gae") | {"kl_kind": arguments.kl_estimator}
    ours = ops.kl_gae(*inputs, kl_coef=arguments.kl_coef, **flags, backend=backend)
    assert torch.equal(ours.value_mask, run.value_mask)
    agree(ours.kl[run.mask], batch["kl"][run.mask], same(run))
    kl_flags = ops.preset("trl", "kl_reward") | {"kind": arguments.kl_estimator}
    kl = ops.kl_estimate(batch["logprobs"], batch["ref_logprobs"], **kl_flags, backend=backend)
    agree(kl[run.mask], batch["kl"][run.mask], same(run))
    advantages, returns, precision = ours.advantages, ours.returns, same(run)
    if arguments.whiten_rewards:
        agree(ours.rewards, run.raw_rewards["rewards"], same(run))
        flags = ops.preset("trl", "whiten_rewards")
        rewards = ops.whiten(ours.rewards, run.value_mask, **flags, backend=backend)
        flags = ops.preset("trl", "gae")
        advantages, returns = ops.gae(rewards, batch["values"], run.value_mask, **flags, backend=backend)
        precision = torch.float32  # Bessel's correction is a float32 quotient of two integers in TRL
        agree(rewards, batch["rewards"], precision)
    else:
        agree(ours.rewards, batch["rewards"], precision)
    agree(advantages[run.mask], batch["advantages"][run.mask], precision)
    agree(returns, batch["returns"], precision)
    whitened = ops.whiten(advantages, run.mask, **ops.preset("trl", "whiten"), backend=backend)
    for step in run.steps:
        agree(whitened[step["rows"]], step["mb_advantage"], torch.float32)


@backends
@dtypes
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-5])  # the variance far above, at and below the epsilon
def test_whitening(scale: float, dtype: torch.dtype, backend: str) -> None:
    batch, whiten = make_batch(dtype), trainers.load("trl.experimental.ppo.ppo_trainer").masked_whiten
    x, mask = scale * (batch.values + 3), batch.mask
    for op, shift_mean in (("whiten", True), ("whiten_rewards", False)):
        ours = ops.whiten(x, mask, **ops.preset("trl", op), backend=backend)
        agree(ours[mask], whiten(x, mask, shift_mean)[mask])  # Bessel's correction is float32


@backends
def test_policy_loss(run: Run, backend: str) -> None:
    """Their mean of micro-batches' means, and with it their gradient, is one of denom=None."""
    parts, losses, approx_kl, ratios = [], [], [], []
    for step in run.steps:
        mask = run.mask[step["rows"]]
        (logprobs,) = trainers.leaves(step["new_logprobs"])
        inputs = (logprobs, step["mb_logprobs"], step["mb_advantage"], mask)
        assert (logprobs - step["mb_logprobs"]).abs().max() < 20, "above, the ops clamp"
        weights = ops.token_weights(mask, **ops.preset("trl", "token_weights"))
        denom = ops.token_denom(mask, **ops.preset("trl", "token_weights"))
        flags = ops.preset("trl", "ppo_loss")
        loss, metrics = ops.ppo_loss(*inputs, **flags, weights=weights, denom=denom, backend=backend)
        size = step["pg_loss_max"].abs().max().item()  # gains and losses of this size nearly cancel
        agree(loss, step["pg_loss_max"][mask].mean(), same(run), size=size)
        # accelerate divides the loss by the number of micro-batches
        gradient = trainers.gradients(loss / run.arguments.gradient_accumulation_steps, [logprobs])[0]
        agree(gradient, step["new_logprobs"].grad, same(run))
        losses.append(loss)
        parts.append(ops.finalize_metrics(metrics))
        padding = (~mask).sum()  # of which every ratio is 1
        ratios.append((parts[-1]["ratio_mean"] * mask.sum() + padding) / mask.numel())
        approx_kl.append(ops.kl_estimate(*inputs[:2], kind="k2", backend=backend).mean())
    agree(torch.stack(losses).mean(), run.metrics["loss/policy_avg"], size=size)
    agree(torch.stack(approx_kl).mean(), run.metrics["policy/approxkl_avg"])
    agree(torch.stack(ratios).mean(), run.metrics["val/ratio"])
    clipped = sum(part["clip_fraction"] for part in parts) / len(parts)
    agree(clipped, run.metrics["policy/clipfrac_avg"])
    assert 0.05 < clipped < 0.95


@backends
def test_value_loss(run: Run, backend: str) -> None:
    losses, clipped = [], 0.0
    for step in run.steps:
        mask = run.value_mask[step["rows"]]
        (values,) = trainers.leaves(step["vpred"])
        inputs = (values, step["mb_values"], step["mb_return"], mask)
        loss, metrics = ops.value_loss(*inputs, **ops.preset("trl", "value_loss"), backend=backend)
        agree(loss, step["vf_loss"], same(run))
        scale = run.arguments.vf_coef / run.arguments.gradient_accumulation_steps
        agree(trainers.gradients(scale * loss, [values])[0], step["vpred"].grad, same(run))
        losses.append(loss)
        clipped += ops.finalize_metrics(metrics)["value_clip_fraction"] / len(run.steps)
    agree(torch.stack(losses).mean(), run.metrics["loss/value_avg"])
    agree(clipped, run.metrics["val/clipfrac_avg"])
    assert 0.05 < clipped < 0.95


def test_run_is_that_of_the_trainer(run: Run) -> None:
    """The loop that ran is TRL's: what was recorded adds up to what it logged."""
    scores = run.batch["scores"]
    agree(scores.mean(), run.metrics["objective/scores"])
    agree(run.batch["kl"].sum(1).mean(), run.metrics["objective/kl"])
