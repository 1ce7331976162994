"""From token losses to one number and from metric sums to the numbers in a log. Plain sums: there is nothing to fuse.

loss = sum(weights * token losses) / denom, where denom is the count of the whole batch, known before the first
forward. So the gradients of micro-batches add up to that of the batch, and the same holds for metrics: losses return
sums, counts and maxima, and only what is logged is ever divided.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine.ops import checks

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum", "constant")


def token_weights(
    mask: Tensor,
    mode: str = "token-mean",
    *,
    cu_seqlens: Tensor | None = None,
    constant_length: float | None = None,
) -> Tensor:
    """Weight of each token's loss, to be divided by the batch's `token_denom`.

        mode                  weight              denom        used by
        token-mean            1                   tokens       verl and OpenRLHF by default, DAPO
        seq-mean-token-mean   1 / tokens of seq   sequences    GRPO
        seq-mean-token-sum    1                   sequences    verl
        token-sum             1                   1            verl
        constant              1 / constant_length sequences    Dr. GRPO (arXiv:2503.20783)

    Args:
        mask: (B, T) bool, or (N,) with cu_seqlens.
        mode: see above. Sequences without any token count in no mode.
        cu_seqlens: (B + 1,) int32 or int64, offsets of packed sequences.
        constant_length: tokens, for "constant" only: usually the longest response that sampling allows.

    Returns:
        float32, shaped like mask, 0 where masked.
    """
    checks.one_of("token_weights", "mode", mode, MODES)
    checks.sequences("token_weights", mask, cu_seqlens)
    weights = mask.float()
    if mode == "constant":
        if constant_length is None or not constant_length > 0:
            raise ValueError(f"token_weights: constant_length must be greater than 0, got {constant_length}")
        return weights / constant_length
    if mode != "seq-mean-token-mean":
        return weights
    tokens_B = _sequence_tokens(mask, cu_seqlens).clamp(min=1)
    if cu_seqlens is None:
        return weights / tokens_B[:, None]
    return weights / tokens_B.repeat_interleave(cu_seqlens.diff())


def token_denom(mask: Tensor, mode: str = "token-mean", *, cu_seqlens: Tensor | None = None) -> Tensor:
    """The count that `mode` divides by, 0-d float32 on the mask's device. Counts of several batches or ranks add up,
    save for "token-sum", which divides by 1 however many there are. See token_weights."""
    checks.one_of("token_denom", "mode", mode, MODES)
    checks.sequences("token_denom", mask, cu_seqlens)
    if mode == "token-sum":
        return torch.ones((), device=mask.device)
    if mode == "token-mean":
        return mask.sum().float()
    return (_sequence_tokens(mask, cu_seqlens) > 0).sum().float()


def _sequence_tokens(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return mask.sum(1)
    return F.pad(mask.cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def merge_metrics(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of several micro-batches (or losses) as those of one: maxima by maximum, all else by sum. No sync."""
    merged: dict[str, Tensor] = {}
    parts = list(parts)
    with_entropy = {"entropy_sum" in part for part in parts if "policy_tokens" in part}
    if len(with_entropy) > 1:
        raise ValueError("merge_metrics: entropy is in some parts only, so its mean over all tokens is not known")
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                merged[name] = torch.maximum(merged[name], value) if "_max" in name else merged[name] + value
    return merged


def finalize_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over tokens, maxima and explained variance as floats; the one place that waits for the device.

    Args:
        metrics: of ppo_loss, value_loss or linear_policy_loss, merged or not; 0-d tensors on one device.

    Returns:
        policy_tokens, clip_fraction, clip_fraction_low (dual clip active), approx_kl_k1, approx_kl_k3 (nats, of the old
        policy to the new one), ratio_mean, log_ratio_max_abs (nats, at most 20: where the loss clamps) and, if the loss
        was given it, entropy (nats); value_tokens, value_mean, value_clip_fraction, return_mean, explained_variance =
        1 - Var(R - V) / Var(R), 0 where the returns do not vary. Of no tokens at all, every mean is 0.
    """
    if not metrics:
        return {}
    numbers = dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist(), strict=True))
    final: dict[str, float] = {}
    for name, number in numbers.items():
        if name.endswith("_sum"):
            tokens = numbers["value_tokens" if name.startswith("value_") else "policy_tokens"]
            final[name.removesuffix("_sum")] = number / max(tokens, 1)
        else:
            final[name] = number
    if "value_tokens" in final:
        final["return_mean"] = final.pop("value_return")
        return_variance = final.pop("value_return_square") - final["return_mean"] ** 2
        error_variance = final.pop("value_error_square") - final.pop("value_error") ** 2
        varies = return_variance > 1e-12 * final["return_mean"] ** 2  # below: rounding of the moments, no variance
        final["explained_variance"] = 1 - error_variance / return_variance if varies else 0.0
    return final
