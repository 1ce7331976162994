"""OpenRLHF 0.11.2 and `preset("openrlhf", ...)`: the same numbers, gradients and metrics at every trainable token."""

from __future__ import annotations

import argparse
import copy
import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainers
from torch import Tensor
from trainers import agree, backends, dtypes, make_batch

from rlhf_engine import ops

MODES = ["token-mean", "seq-mean-token-mean"]


@pytest.fixture(scope="module")
def loss() -> Any:
    return trainers.load("openrlhf.models.loss")


@pytest.fixture(scope="module")
def utils() -> Any:
    return trainers.load("openrlhf.models.utils")


@pytest.fixture(scope="module")
def experience_maker() -> Any:
    return trainers.load("openrlhf.trainer.ppo_utils.experience_maker")


class Parsed(Exception):
    pass


@pytest.fixture(scope="module")
def arguments() -> Any:
    """What the command line means when nothing is given: the script is run up to its parser."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        raise Parsed(parse(parser, []))

    with pytest.MonkeyPatch.context() as patch, trainers.importing(), pytest.raises(Parsed) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    return trainers.load("openrlhf.utils.config").hierarchize(caught.value.args[0])


def aggregation(mask: Tensor, mode: str) -> dict[str, Tensor]:
    return {"weights": ops.token_weights(mask, mode), "denom": ops.token_denom(mask, mode)}


def precision(mode: str, dtype: torch.dtype) -> torch.dtype:
    """Weights are float32; only those that divide are rounded."""
    return torch.float32 if mode == "seq-mean-token-mean" else dtype


def test_presets_are_the_defaults(arguments: Any) -> None:
    advantage = arguments.algo.advantage
    gae = {"gamma": advantage.gamma, "lam": advantage.lambd}
    for op in ("gae", "kl_gae"):
        assert gae.items() <= ops.preset("openrlhf", op).items()
    assert ops.preset("openrlhf", "kl_gae")["score_clip"] == -arguments.reward.clip_range[0]
    assert ops.preset("openrlhf", "kl_gae")["score_clip"] == arguments.reward.clip_range[1]
    assert arguments.actor.eps_clip_low_high is None and advantage.is_correction_level == "off"
    clip = dict.fromkeys(("clip_low", "clip_high"), arguments.actor.eps_clip)
    rest = {"dual_clip": arguments.actor.dual_clip, "kl_kind": arguments.algo.kl.estimator}
    assert clip | rest == ops.preset("openrlhf", "ppo_loss")
    for op in ("kl_reward", "kl_loss"):
        assert ops.preset("openrlhf", op)["kind"] == arguments.algo.kl.estimator
    assert ops.preset("openrlhf", "value_loss") == {"clip": arguments.critic.value_clip}
    assert ops.preset("openrlhf", "token_weights") == {"mode": arguments.actor.loss_agg_mode}


@backends
@dtypes
@pytest.mark.parametrize("options", [{}, {"gamma": 0.99, "lam": 0.95}], ids=str)
def test_advantages_and_returns(
    experience_maker: Any, options: dict[str, float], backend: str, dtype: torch.dtype
) -> None:
    batch = make_batch(dtype)
    flags = ops.preset("openrlhf", "gae") | options
    theirs = experience_maker.RemoteExperienceMaker.get_advantages_and_returns(
        None, batch.values, batch.rewards, batch.mask, flags["gamma"], flags["lam"]
    )
    ours = ops.gae(batch.rewards, batch.values, batch.mask, **flags, backend=backend)
    agree(ours[0][batch.mask], theirs[0][batch.mask], dtype)
    agree(ours[1][batch.mask], theirs[1][batch.mask], dtype)


@backends
@dtypes
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-5])  # the advantages' variance far above, near and below the epsilon
def test_from_scores_to_advantages(
    experience_maker: Any, utils: Any, arguments: Any, scale: float, backend: str, dtype: torch.dtype
) -> None:
    """KL, reward, GAE and whitening across two batches of experience, as the trainer runs them."""
    batch = make_batch(dtype)
    scores, values = scale * batch.scores, scale * batch.values
    logprobs, ref_logprobs = scale * batch.logprobs, scale * batch.ref_logprobs
    if scale == 1:  # beyond the clamp
        ref_logprobs[0, 0], ref_logprobs[0, 1] = logprobs[0, 0] - 15, logprobs[0, 1] + 15
    parts = []
    for index, rows in (([0, 1, 2, 3, 4], slice(0, 5)), ([5, 6, 7, 8, 9, 10], slice(5, 11))):
        kl = utils.compute_approx_kl(logprobs[rows], ref_logprobs[rows], kl_estimator=arguments.algo.kl.estimator)
        fields = {"index": index, "kl": kl, "info": {}}
        tensors = {"rewards": scores[rows], "values": values[rows], "action_mask": batch.mask[rows]}
        parts.append(experience_maker.Experience(**fields, **tensors))
    arguments = copy.deepcopy(arguments)
    arguments.algo.advantage.lambd = 0.9
    controller = SimpleNamespace(value=0.1)
    maker = experience_maker.RemoteExperienceMaker(
        None, None, None, None, controller, SimpleNamespace(args=arguments), None
    )
    raw, plain = [], maker.get_advantages_and_returns
    maker.get_advantages_and_returns = lambda *inputs: raw.append(plain(*inputs)) or raw[-1]
    theirs = torch.cat([part.advantages for part in maker.compute_advantages_and_returns(parts)])
    flags = ops.preset("openrlhf", "kl_gae") | {"lam": 0.9}
    ours = ops.kl_gae(scores, logprobs, ref_logprobs, values, batch.mask, kl_coef=0.1, **flags, backend=backend)
    whitened = ops.whiten(ours.advantages, batch.mask, **ops.preset("openrlhf", "whiten"), backend=backend)
    # Their KL is float32 whatever they are given.
    agree(whitened[batch.mask], theirs[batch.mask])
    agree(ours.returns[batch.mask], torch.cat([returns for _, returns in raw])[batch.mask])
    assert torch.equal(ours.value_mask, batch.mask)
    # From their own advantages, whitening agrees at masked positions too.
    before = torch.cat([advantages for advantages, _ in raw])
    agree(ops.whiten(before, batch.mask, **ops.preset("openrlhf", "whiten"), backend=backend), theirs)


@backends
@dtypes
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k2+", "k3+"])
def test_kl(utils: Any, kind: str, backend: str, dtype: torch.dtype) -> None:
    unbiased = kind.endswith("+")
    # Far beyond both clamps; unbiased, their float32 value first gets d^2 / 2 added, which must not be much larger.
    reach = 5 if unbiased else 30
    d, ref = torch.linspace(-reach, reach, 301, dtype=dtype), torch.linspace(-3, 0, 301, dtype=dtype)
    mine, other = trainers.leaves(ref + d, ref + d)
    # The new policy is the old one: their weight of the gradient is 1.
    theirs = utils.compute_approx_kl(other, ref, other.detach(), kind.removesuffix("+"), unbiased_gradient=unbiased)
    gradient = trainers.gradients(theirs.sum(), [other])
    for op in ("kl_reward", "kl_loss"):
        ours = ops.kl_estimate(mine, ref, **ops.preset("openrlhf", op) | {"kind": kind}, backend=backend)
        agree(ours, theirs)  # theirs is float32 whatever it is given
        agree(trainers.gradients(ours.sum(), [mine]), gradient)


@backends
@dtypes
@pytest.mark.parametrize("op", ["kl_reward", "kl_loss"])
def test_kl_beyond_what_exp_holds(utils: Any, op: str, backend: str, dtype: torch.dtype) -> None:
    d = torch.tensor([-800.0, -100.0, 100.0, 800.0], dtype=dtype)
    mine, other = trainers.leaves(d, d)
    flags = ops.preset("openrlhf", op) | {"kind": "k3"}
    ours = ops.kl_estimate(mine, torch.zeros_like(d), **flags, backend=backend)
    theirs = utils.compute_approx_kl(other, torch.zeros_like(d), kl_estimator="k3")
    assert torch.equal(ours, theirs.to(dtype))
    assert torch.equal(trainers.gradients(ours.sum(), [mine]), trainers.gradients(theirs.sum(), [other]))


@backends
@dtypes
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(
    loss: Any, mode: str, corrected: bool, dual_clip: float | None, backend: str, dtype: torch.dtype
) -> None:
    batch = make_batch(dtype)
    mine, other = trainers.leaves(batch.logprobs, batch.logprobs)
    rest, rollout_logprobs = (batch.old_logprobs, batch.advantages, batch.mask), batch.ref_logprobs
    is_weights = None
    if corrected:  # the ratio of trainer to sampler, 0 outside its band
        ratio = (batch.old_logprobs - rollout_logprobs).exp()
        is_weights = torch.where((ratio >= 0.5) & (ratio <= 1.5), ratio, 0)
    objective = loss.PolicyLoss(
        dual_clip=dual_clip, token_level_loss=mode == "token-mean",
        is_correction_level="token" if corrected else "off", is_correction_threshold=(0.5, 1.5),
    )  # fmt: skip
    theirs, clip_ratio, ppo_kl, _, _ = objective(other, *rest, rollout_logprobs)
    ours, sums_of_metrics = ops.ppo_loss(
        mine, *rest, **ops.preset("openrlhf", "ppo_loss") | {"dual_clip": dual_clip}, is_weights=is_weights,
        **aggregation(batch.mask, mode), backend=backend,
    )  # fmt: skip
    agree(ours, theirs, precision(mode, dtype))
    agree(trainers.gradients(ours, [mine]), trainers.gradients(theirs, [other]), precision(mode, dtype))
    metrics = ops.finalize_metrics(sums_of_metrics)
    agree(metrics["clip_fraction"], clip_ratio)
    agree(metrics["approx_kl_k1"], ppo_kl)
    assert 0.1 < clip_ratio < 0.9


@backends
@dtypes
def test_policy_loss_where_the_log_ratio_is_clamped(loss: Any, backend: str, dtype: torch.dtype) -> None:
    mask, zeros = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=dtype)
    for d in (-25.0, -19.0, 19.0, 20.0, 20.5, 25.0):
        mine, other = trainers.leaves(zeros + d, zeros + d)
        ours, _ = ops.ppo_loss(mine, zeros, zeros - 1, mask, **ops.preset("openrlhf", "ppo_loss"), backend=backend)
        theirs = loss.PolicyLoss()(other, zeros, zeros - 1, mask)[0]
        agree(ours, theirs, dtype)
        agree(trainers.gradients(ours, [mine]), trainers.gradients(theirs, [other]), dtype)


@backends
@dtypes
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_entropy_and_kl_in_the_loss(loss: Any, utils: Any, kind: str, backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    mine, my_entropy, other, their_entropy = trainers.leaves(*[batch.logprobs, batch.entropy] * 2)
    flags = ops.preset("openrlhf", "ppo_loss") | {"kl_kind": kind}
    ours, _ = ops.ppo_loss(
        mine, batch.old_logprobs, batch.advantages, batch.mask, **flags,
        entropy=my_entropy, entropy_coef=0.01, ref_logprobs=batch.ref_logprobs, kl_coef=0.1, backend=backend,
    )  # fmt: skip
    kl = utils.compute_approx_kl(other, batch.ref_logprobs, kl_estimator=kind)
    assert kl[batch.mask].abs().max() < 10, "above, OpenRLHF clamps"
    theirs = loss.PolicyLoss()(other, batch.old_logprobs, batch.advantages, batch.mask)[0]
    theirs = theirs + 0.1 * loss.aggregate_loss(kl, batch.mask) - 0.01 * loss.aggregate_loss(their_entropy, batch.mask)
    agree(ours, theirs)
    agree(trainers.gradients(ours, [mine, my_entropy]), trainers.gradients(theirs, [other, their_entropy]))


@backends
@dtypes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clipped", [True, False])
def test_value_loss(loss: Any, clipped: bool, mode: str, backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype)
    flags = ops.preset("openrlhf", "value_loss") if clipped else {"clip": None}
    mine, other = trainers.leaves(batch.values, batch.values)
    sums = aggregation(batch.mask, mode)
    ours, _ = ops.value_loss(mine, batch.old_values, batch.returns, batch.mask, **flags, **sums, backend=backend)
    objective = loss.ValueLoss(flags["clip"], token_level_loss=mode == "token-mean")
    theirs = objective(other, batch.old_values, batch.returns, batch.mask)
    agree(ours, theirs, precision(mode, dtype))
    agree(trainers.gradients(ours, [mine]), trainers.gradients(theirs, [other]), precision(mode, dtype))


@dtypes
@pytest.mark.parametrize("mode", MODES)
def test_aggregation_over_micro_batches(loss: Any, mode: str, dtype: torch.dtype) -> None:
    """Both add up micro-batches over the counts of the whole batch; their loss of one of two ranks is doubled."""
    batch = make_batch(dtype)
    sums = aggregation(batch.mask, mode)
    ours = (sums["weights"] * batch.advantages).sum() / sums["denom"]
    counts = {"batch_num_tokens": batch.mask.sum(), "global_batch_size": batch.mask.any(1).sum()}
    theirs = sum(
        loss.aggregate_loss(batch.advantages[rows], batch.mask[rows], mode == "token-mean", dp_size=2, **counts) / 2
        for rows in (slice(0, 4), slice(4, 5), slice(5, None))
    )
    agree(ours, theirs, precision(mode, dtype))
