"""verl 0.9.1 and `preset("verl", ...)`: the same numbers, gradients and metrics at every trainable token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trainers
from torch import Tensor
from trainers import agree, backends, dtypes, make_batch

from rlhf_engine import ops

# verl's name -> ours; of the last one verl's factor is the padded length
MODES = {
    "token-mean": "token-mean",
    "token-sum": "token-sum",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum-norm": "constant",
}
KINDS = {"kl": "k1", "low_var_kl": "k3"}


@pytest.fixture(scope="module")
def core() -> Any:
    return trainers.load("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def defaults(core: Any) -> Any:
    """What verl's actor does when nothing is configured."""
    return core.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)


def aggregation(mask: Tensor, mode: str) -> dict[str, Tensor]:
    length = mask.shape[1] if mode == "constant" else None
    return {"weights": ops.token_weights(mask, mode, constant_length=length), "denom": ops.token_denom(mask, mode)}


def precision(mode: str, dtype: torch.dtype) -> torch.dtype:
    """Weights are float32; only those that divide are rounded."""
    return torch.float32 if mode in ("seq-mean-token-mean", "constant") else dtype


def test_presets_are_the_defaults(core: Any, defaults: Any) -> None:
    algorithm, critic = core.AlgoConfig, trainers.load("verl.workers.config").CriticConfig
    gae = {"gamma": algorithm.gamma, "lam": algorithm.lam}
    for op in ("gae", "kl_gae"):
        assert gae.items() <= ops.preset("verl", op).items()
    clip = {"clip_low": defaults.clip_ratio_low, "clip_high": defaults.clip_ratio_high}
    rest = {"dual_clip": defaults.clip_ratio_c, "kl_kind": KINDS[defaults.kl_loss_type]}
    assert clip | rest == ops.preset("verl", "ppo_loss")
    assert ops.preset("verl", "kl_loss")["kind"] == rest["kl_kind"]
    assert ops.preset("verl", "kl_reward")["kind"] == KINDS[algorithm.kl_penalty]
    assert ops.preset("verl", "value_loss") == {"clip": critic.cliprange_value}
    modes = {defaults.loss_agg_mode, critic.loss_agg_mode}
    assert {MODES[mode] for mode in modes} == {ops.preset("verl", "token_weights")["mode"]}


@backends
@dtypes
@pytest.mark.parametrize("options", [{}, {"gamma": 0.99, "lam": 0.95}], ids=str)
def test_advantages_and_returns(core: Any, options: dict[str, float], backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    flags = ops.preset("verl", "gae") | options
    gamma, lam = torch.tensor(flags["gamma"]).to(dtype), torch.tensor(flags["lam"]).to(dtype)
    theirs = core.compute_gae_advantage_return(batch.rewards, batch.values, batch.mask.to(dtype), gamma, lam)
    flags |= {"gamma": gamma.item(), "lam": lam.item()}
    advantages, returns = ops.gae(batch.rewards, batch.values, batch.mask, **flags, backend=backend)
    whitened = ops.whiten(advantages, batch.mask, **ops.preset("verl", "whiten"), backend=backend)
    agree(whitened[batch.mask], theirs[0][batch.mask], dtype)
    agree(returns[batch.mask], theirs[1][batch.mask], dtype)


@backends
@dtypes
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-5])  # the variance far above, at and below the epsilon
def test_whitening(core: Any, scale: float, backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    x, mask, flags = scale * (batch.values + 3), batch.mask, ops.preset("verl", "whiten")
    agree(ops.whiten(x, mask, **flags, backend=backend), core.verl_F.masked_whiten(x, mask.to(dtype)), dtype)
    ours = ops.whiten(x, mask, **flags | {"center": False}, backend=backend)
    agree(ours, core.verl_F.masked_whiten(x, mask.to(dtype), shift_mean=False), dtype)


@backends
@dtypes
@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+"])
def test_kl(core: Any, kind: str, backend: str, dtype: torch.dtype) -> None:
    flags = ops.preset("verl", "kl_loss" if "k3" in kind else "kl_reward") | {"kind": kind}
    d = torch.linspace(-30, 30, 301, dtype=dtype)  # far beyond both clamps
    ref = torch.linspace(-3, 0, 301, dtype=dtype)
    mine, other = trainers.leaves(ref + d, ref + d)
    ours = ops.kl_estimate(mine, ref, **flags, backend=backend)
    theirs = core.kl_penalty(other, ref, kind)
    agree(ours, theirs, dtype)
    agree(trainers.gradients(ours.sum(), [mine]), trainers.gradients(theirs.sum(), [other]), dtype)


@backends
@dtypes
def test_kl_beyond_what_exp_holds(core: Any, backend: str, dtype: torch.dtype) -> None:
    d = torch.tensor([-800.0, -100.0, 100.0, 800.0], dtype=dtype)
    mine, other = trainers.leaves(d, d)
    ours = ops.kl_estimate(mine, torch.zeros_like(d), **ops.preset("verl", "kl_loss"), backend=backend)
    theirs = core.kl_penalty(other, torch.zeros_like(d), "k3")
    assert torch.equal(ours, theirs)
    assert torch.equal(trainers.gradients(ours.sum(), [mine]), trainers.gradients(theirs.sum(), [other]))


@backends
@dtypes
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(core: Any, defaults: Any, mode: str, weighted: bool, backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    mine, other = trainers.leaves(batch.logprobs, batch.logprobs)
    is_weights = batch.values.exp() if weighted else None
    rest = (batch.old_logprobs, batch.advantages, batch.mask)
    theirs, their_metrics = core.compute_policy_loss_vanilla(
        batch.old_logprobs, other, batch.advantages, batch.mask, mode, defaults, is_weights
    )
    sums = aggregation(batch.mask, MODES[mode])
    ours, sums_of_metrics = ops.ppo_loss(
        mine, *rest, **ops.preset("verl", "ppo_loss"), **sums, is_weights=is_weights, backend=backend
    )
    same = precision(MODES[mode], dtype)
    agree(ours, theirs, same)
    agree(trainers.gradients(ours, [mine]), trainers.gradients(theirs, [other]), same)
    metrics = ops.finalize_metrics(sums_of_metrics)
    agree(metrics["clip_fraction"], their_metrics["actor/pg_clipfrac"])
    agree(metrics["clip_fraction_low"], their_metrics["actor/pg_clipfrac_lower"])
    agree(metrics["approx_kl_k1"], their_metrics["actor/ppo_kl"])
    assert 0.01 < metrics["clip_fraction_low"] < metrics["clip_fraction"] < 0.9  # the batch reaches every branch


@backends
@dtypes
def test_policy_loss_where_the_log_ratio_is_clamped(core: Any, defaults: Any, backend: str, dtype: torch.dtype) -> None:
    old = torch.zeros(1, 6, dtype=dtype)
    d = torch.tensor([[-25.0, -19.0, 19.0, 20.0, 20.5, 25.0]], dtype=dtype)
    mask, advantages = torch.ones(1, 6, dtype=torch.bool), -torch.ones(1, 6, dtype=dtype)
    config = core.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=1e12)
    for column in range(6):  # one at a time: beside exp(20) the others would vanish
        mine, other = trainers.leaves(d[:, [column]], d[:, [column]])
        rest = (old[:, [0]], advantages[:, [0]], mask[:, [0]])
        flags = ops.preset("verl", "ppo_loss") | {"dual_clip": 1e12}
        ours, metrics = ops.ppo_loss(mine, *rest, **flags, backend=backend)
        theirs, their_metrics = core.compute_policy_loss_vanilla(rest[0], other, rest[1], rest[2], "token-mean", config)
        agree(ours, theirs, dtype)
        agree(trainers.gradients(ours, [mine]), trainers.gradients(theirs, [other]), dtype)
        agree(ops.finalize_metrics(metrics)["approx_kl_k1"], their_metrics["actor/ppo_kl"])


@backends
@dtypes
def test_entropy_and_kl_in_the_loss(core: Any, defaults: Any, backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    mine, my_entropy, other, their_entropy = trainers.leaves(*[batch.logprobs, batch.entropy] * 2)
    ours, _ = ops.ppo_loss(
        mine, batch.old_logprobs, batch.advantages, batch.mask, **ops.preset("verl", "ppo_loss"), backend=backend,
        entropy=my_entropy, entropy_coef=0.01, ref_logprobs=batch.ref_logprobs, kl_coef=0.1,
    )  # fmt: skip
    pg, _ = core.compute_policy_loss_vanilla(
        batch.old_logprobs, other, batch.advantages, batch.mask, defaults.loss_agg_mode, defaults
    )
    kl = core.kl_penalty(other, batch.ref_logprobs, defaults.kl_loss_type)
    assert kl[batch.mask].max() < 10, "above, verl clamps"
    mode = defaults.loss_agg_mode
    theirs = pg - 0.01 * core.agg_loss(their_entropy, batch.mask, mode) + 0.1 * core.agg_loss(kl, batch.mask, mode)
    agree(ours, theirs, dtype)
    agree(trainers.gradients(ours, [mine, my_entropy]), trainers.gradients(theirs, [other, their_entropy]), dtype)


@backends
@dtypes
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(core: Any, mode: str, backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    flags = ops.preset("verl", "value_loss")
    mine, other = trainers.leaves(batch.values, batch.values)
    sums = aggregation(batch.mask, MODES[mode])
    ours, metrics = ops.value_loss(mine, batch.old_values, batch.returns, batch.mask, **flags, **sums, backend=backend)
    theirs, clipped = core.compute_value_loss(
        other, batch.returns, batch.old_values, batch.mask, flags["clip"], loss_agg_mode=mode
    )
    same = precision(MODES[mode], dtype)
    agree(ours, theirs, same)
    agree(trainers.gradients(ours, [mine]), trainers.gradients(theirs, [other]), same)
    agree(ops.finalize_metrics(metrics)["value_clip_fraction"], clipped)
    assert 0.05 < clipped < 0.95


@dtypes
@pytest.mark.parametrize("mode", MODES)
def test_aggregation_over_micro_batches(core: Any, mode: str, dtype: torch.dtype) -> None:
    """Both add up micro-batches over the counts of the whole batch; verl's loss of one of two ranks is doubled."""
    batch = make_batch(dtype)
    sums = aggregation(batch.mask, MODES[mode])
    loss = batch.advantages
    ours = (sums["weights"] * loss).sum() / sums["denom"]
    counts = {"batch_num_tokens": batch.mask.sum(), "global_batch_size": batch.mask.any(1).sum()}
    theirs = sum(
        core.agg_loss(loss[rows], batch.mask[rows], mode, dp_size=2, **counts) / 2
        for rows in (slice(0, 4), slice(4, 5), slice(5, None))
    )
    agree(ours, theirs, precision(MODES[mode], dtype))


@backends
@dtypes
def test_from_scores_to_advantages(core: Any, backend: str, dtype: torch.dtype) -> None:
    """The trainer's KL penalty in the reward, GAE and whitening in the order of its training loop."""
    batch, flags = make_batch(dtype), ops.preset("verl", "kl_gae") | {"gamma": 0.99, "lam": 0.9}
    trainer = trainers.load("verl.trainer.ppo.ray_trainer")
    token_level_scores = torch.zeros_like(batch.values)
    for row, (mask, score) in enumerate(zip(batch.mask, batch.scores, strict=True)):
        if mask.any():
            token_level_scores[row, mask.nonzero().max()] = score  # where verl's reward managers put it
    data = trainer.DataProto.from_dict({
        "response_mask": batch.mask.to(dtype), "token_level_scores": token_level_scores,
        "old_log_probs": batch.logprobs, "ref_log_prob": batch.ref_logprobs,
    })  # fmt: skip
    shaped, _ = trainer.apply_kl_penalty(data, core.FixedKLController(0.1), core.AlgoConfig.kl_penalty)
    rewards = shaped.batch["token_level_rewards"]
    theirs = core.compute_gae_advantage_return(rewards, batch.values, batch.mask.to(dtype), 0.99, 0.9)
    ours = ops.kl_gae(
        batch.scores, batch.logprobs, batch.ref_logprobs, batch.values, batch.mask, kl_coef=0.1, **flags,
        backend=backend,
    )  # fmt: skip
    whitened = ops.whiten(ours.advantages, batch.mask, **ops.preset("verl", "whiten"), backend=backend)
    agree(ours.rewards[batch.mask], rewards[batch.mask], dtype)
    agree(whitened[batch.mask], theirs[0][batch.mask], dtype)
    agree(ours.returns[batch.mask], theirs[1][batch.mask], dtype)
    assert torch.equal(ours.value_mask, batch.mask)
