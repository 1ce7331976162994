"""The tensor ops of PPO: checked, documented, each with a backend to choose.

Every op takes tensors first and the rest by keyword, accepts any strides, computes in float32 or better whatever the
input dtype, and never reads the content of masked positions. `backend=None` picks by device and by what is installed.
"""

from rlhf_engine.ops.advantages import gae, kl_estimate, kl_gae, whiten
from rlhf_engine.ops.aggregate import finalize_metrics, merge_metrics, token_denom, token_weights
from rlhf_engine.ops.backends import available
from rlhf_engine.ops.heads import linear_logprob_stats, linear_logprobs, linear_policy_loss, token_logprobs
from rlhf_engine.ops.losses import ppo_loss, ppo_token_loss, value_loss
from rlhf_engine.ops.presets import preset
from rlhf_engine.reference import ShapedAdvantages, TokenLoss, merge_logprob_stats

__all__ = [
    "ShapedAdvantages",
    "TokenLoss",
    "available",
    "finalize_metrics",
    "gae",
    "kl_estimate",
    "kl_gae",
    "linear_logprob_stats",
    "linear_logprobs",
    "linear_policy_loss",
    "merge_logprob_stats",
    "merge_metrics",
    "ppo_loss",
    "ppo_token_loss",
    "preset",
    "token_denom",
    "token_logprobs",
    "token_weights",
    "value_loss",
    "whiten",
]
