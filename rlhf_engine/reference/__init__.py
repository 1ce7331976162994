"""The specification: every op in plain PyTorch, on any device, in float64 too. Every fast backend is tested against it.

Masked positions are not multiplied away but never read: each op first gathers the active ones, so NaN, inf or a wild
token id under the mask reaches neither a value nor a gradient, and a sum has the same bits whatever the padding.
Statistics are float32 whatever the input (float64 stays), metrics float64. Inputs are trusted: `ops` checks them.

Shapes: B sequences, T response tokens, V vocabulary, H width, N = B * T or the length of a packed row, n active tokens.
"""

from rlhf_engine.reference.advantages import ShapedAdvantages, gae, kl_gae, whiten
from rlhf_engine.reference.kl import Bounds, kl_estimate
from rlhf_engine.reference.logprobs import (
    ROW_TILE,
    active_rows,
    linear_logprob_stats,
    linear_logprobs,
    linear_policy_loss,
    merge_logprob_stats,
    token_logprobs,
    transform_logits,
)
from rlhf_engine.reference.losses import TokenLoss, ppo_loss, ppo_token_loss, reduce_loss, value_loss

__all__ = [
    "Bounds",
    "ROW_TILE",
    "ShapedAdvantages",
    "TokenLoss",
    "active_rows",
    "gae",
    "kl_estimate",
    "kl_gae",
    "linear_logprob_stats",
    "linear_logprobs",
    "linear_policy_loss",
    "merge_logprob_stats",
    "ppo_loss",
    "ppo_token_loss",
    "reduce_loss",
    "token_logprobs",
    "transform_logits",
    "value_loss",
    "whiten",
]
