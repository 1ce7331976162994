"""The conventions of other trainers as flags of the ops: `ops.gae(rewards, values, mask, **ops.preset("trl", "gae"))`.

                         verl 0.9.1           OpenRLHF 0.11.2      TRL 1.12.0            OAI
    KL in the reward     k1                   k1 within +-10       k1                    k1
    KL in the loss       k3, d +-20, 10 max   k1 within +-10       -                     -
    score at             last token           last token, +-10     slot after, if any    last of a full row
    reward whitening     -                    -                    off; keeps the mean   keeps the mean
    gamma, lambda        1, 1                 1, 1                 1, .95                1, .95
    holes                carry                decay                no holes              no holes
    whitening            Bessel, var + 1e-8   max(var, 1e-8)       Bessel, var + 1e-8    var + 1e-8
      of masked tokens   like the others      like the others      0                     no mask
    ratio clip, dual     .2, 3                .2, -                .2, -                 .2, -
    value clip           .5                   .5                   .2                    .2
    loss is a mean over  tokens of the batch  tokens of the batch  those of micro-batch  those of minibatch

Numbers such as gamma are the trainers' defaults: `ops.preset("verl", "gae") | {"lam": 0.95}` is verl with another one.
Coefficients (of KL, entropy, values) are no conventions and not set. OAI is Ziegler et al. 2019, arXiv:1909.08593, as
in the code released with it: train_policy.py and utils/core.py of openai/lm-human-preferences.

What flags cannot say; but for this, trainable tokens agree:

- verl and OpenRLHF leave numbers at masked positions of advantages and returns, carried or decayed ones, which
  whitening then shifts. gae and kl_gae put 0 there.
- verl's reward managers score the last token of the response; where that is not a trainable one, its GAE drops the
  score. kl_gae scores the last trainable token.
- kl_gae's own whitening is OAI's alone, so the presets leave it to `whiten`. OAI whitens the rewards on the way too,
  and has no kl_gae: call kl_estimate, whiten, gae, whiten.
- ppo_loss does not clamp its KL: with verl's k3 it agrees up to 10 nats a token (d above -2.6), with OpenRLHF's k1 up
  to 10. OpenRLHF can weight the gradient of a KL loss by the ratio to the old policy: "k1+" is that at ratio 1.
- ppo_loss clamps the log-ratio to +-20, in the metrics too. TRL and OAI never do, OpenRLHF not in its metrics.
- TRL and OAI log half the mean square of the log-ratio as approximate KL (kl_estimate's k2), TRL over padding too.
- TRL's values, returns and value loss live on kl_gae's value_mask. It scores an empty response in its first slot;
  kl_gae leaves that response out.
- verl divides by counts + 1e-8, and raises where whitening finds fewer than two tokens; whiten gives zeros.
"""

from __future__ import annotations

from typing import Any

from rlhf_engine.ops import checks

Flags = dict[str, dict[str, Any]]

# verl.trainer.ppo.core_algos, with the defaults of AlgoConfig, ActorConfig and CriticConfig
VERL: Flags = {
    "kl_reward": {"kind": "k1", "clamp_diff": None, "clamp_value": None},  # AlgoConfig.kl_penalty, kl_penalty_forward
    "kl_loss": {"kind": "k3", "clamp_diff": 20.0, "clamp_value": 10.0},  # ActorConfig.kl_loss_type, kl_penalty_forward
    "gae": {"gamma": 1.0, "lam": 1.0, "holes": "carry"},  # compute_gae_advantage_return
    # masked_whiten of verl.utils.torch_functional
    "whiten": {"center": True, "ddof": 1, "eps": 1e-8, "eps_mode": "add", "zero_masked": False},
    # apply_kl_penalty of verl.trainer.ppo.ray_trainer, then the two above
    "kl_gae": {
        "kl_kind": "k1", "kl_clamp_diff": None, "kl_clamp_value": None, "gamma": 1.0, "lam": 1.0, "whiten": False,
        "score_at": "last", "score_clip": None, "holes": "carry",
    },
    # compute_policy_loss_vanilla
    "ppo_loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "kl_kind": "k3"},
    "value_loss": {"clip": 0.5},  # CriticConfig.cliprange_value, compute_value_loss
    "token_weights": {"mode": "token-mean"},  # ActorConfig.loss_agg_mode, agg_loss
}  # fmt: skip

# openrlhf.models.{utils,loss} and RemoteExperienceMaker, with the defaults of openrlhf.cli.train_ppo_ray
OPENRLHF: Flags = {
    # compute_approx_kl. Its lower bound on d is that of k3; within +-10 of the value it changes nothing for k1 and k2.
    "kl_reward": {"kind": "k1", "clamp_diff": (-10.0, None), "clamp_value": 10.0},
    "kl_loss": {"kind": "k1", "clamp_diff": (-10.0, None), "clamp_value": 10.0},
    "gae": {"gamma": 1.0, "lam": 1.0, "holes": "decay"},  # get_advantages_and_returns
    # the end of compute_advantages_and_returns
    "whiten": {"center": True, "ddof": 0, "eps": 1e-8, "eps_mode": "max", "zero_masked": False},
    # compute_approx_kl, compute_reward, get_advantages_and_returns
    "kl_gae": {
        "kl_kind": "k1", "kl_clamp_diff": (-10.0, None), "kl_clamp_value": 10.0, "gamma": 1.0, "lam": 1.0,
        "whiten": False, "score_at": "last", "score_clip": 10.0, "holes": "decay",
    },
    "ppo_loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "kl_kind": "k1"},  # PolicyLoss
    "value_loss": {"clip": 0.5},  # ValueLoss
    "token_weights": {"mode": "token-mean"},  # aggregate_loss
}  # fmt: skip

# trl.experimental.ppo: PPOTrainer.train and masked_whiten, with the defaults of PPOConfig
TRL: Flags = {
    "kl_reward": {"kind": "k1", "clamp_diff": None, "clamp_value": None},
    "whiten_rewards": {"center": False, "ddof": 1, "eps": 1e-8, "eps_mode": "add", "zero_masked": True},
    "gae": {"gamma": 1.0, "lam": 0.95, "holes": "carry"},
    "whiten": {"center": True, "ddof": 1, "eps": 1e-8, "eps_mode": "add", "zero_masked": True},
    "kl_gae": {
        "kl_kind": "k1", "kl_clamp_diff": None, "kl_clamp_value": None, "gamma": 1.0, "lam": 0.95, "whiten": False,
        "score_at": "after", "score_clip": None, "holes": "carry",
    },
    "ppo_loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "value_loss": {"clip": 0.2},
    "token_weights": {"mode": "token-mean"},
}  # fmt: skip

# PPOTrainer.compute_rewards and PPOTrainer.loss, utils.core.whiten, with the defaults of PpoHParams
OAI: Flags = {
    "kl_reward": {"kind": "k1", "clamp_diff": None, "clamp_value": None},
    "whiten_rewards": {"center": False, "ddof": 0, "eps": 1e-8, "eps_mode": "add", "zero_masked": True},
    "gae": {"gamma": 1.0, "lam": 0.95, "holes": "carry"},
    "whiten": {"center": True, "ddof": 0, "eps": 1e-8, "eps_mode": "add", "zero_masked": True},
    "ppo_loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "value_loss": {"clip": 0.2},
    "token_weights": {"mode": "token-mean"},
}

PRESETS: dict[str, Flags] = {"verl": VERL, "openrlhf": OPENRLHF, "trl": TRL, "oai": OAI}


def preset(name: str, op: str) -> dict[str, Any]:
    """The flags that make an op follow another trainer; how far, and where they disagree, is at the top of this file.

    Args:
        name: "verl", "openrlhf", "trl" or "oai".
        op: "gae", "whiten" (of advantages), "kl_gae", "ppo_loss" (also for ppo_token_loss), "value_loss" or
            "token_weights" (also for token_denom); "kl_reward" and "kl_loss" are for kl_estimate, "whiten_rewards" is
            for whiten. Not every trainer has all of them.

    Returns:
        Keyword arguments, a fresh dictionary.

    Raises:
        ValueError: another name, or an op that the trainer does not have.
    """
    checks.one_of("preset", "name", name, PRESETS)
    checks.one_of("preset", f"op of {name}", op, PRESETS[name])
    return dict(PRESETS[name][op])
