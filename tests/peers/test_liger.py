"""The heads of liger-kernel 0.8.5 that run on CPUs: its torch fallback, and the chunked loss with its gradients inside.

Its Triton and CuTe kernels need a GPU. Its losses are of GRPO's kind: one advantage for a whole sequence. luspo is left
out: with ratios of tokens it also sums up what stands at masked ones.
"""

from __future__ import annotations

from typing import Any

import peer_heads
import pytest
import torch
from peer_heads import MODES, agree, backends, make_head, ours, run
from torch import Tensor

from rlhf_engine import ops

peer_heads.needs_peers()

LONGEST = 40


@backends("linear_logprobs")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scaled_cross_entropy(backend: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = peer_heads.load("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    monkeypatch.setattr(module, "_FALLBACK_CHUNK_SIZE", 32)
    head = make_head(bias=False)

    def score(hidden: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, Tensor]:
        rows, labels = hidden.flatten(0, 1), head.labels.flatten()
        apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
        nll, entropy = apply(rows, weight, labels, temperature, -100, 1, True)
        return -nll.view_as(head.labels), entropy.view_as(head.labels)

    agree(ours(head, backend, temperature=temperature), run(head, score))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("loss_type", [x for x in MODES if x != "luspo"])
@backends("linear_policy_loss")
def test_policy_loss(backend: str, loss_type: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """compiled=False: what torch.compile would wrap is the arithmetic of the loss, not the head."""
    module = peer_heads.load("liger_kernel.chunked_loss")
    core = peer_heads.load("liger_kernel.chunked_loss.fused_linear_ppo")
    for name, size in (("VOCAB", 300), ("SEQ", 32)):
        monkeypatch.setattr(core, f"_SELECTIVE_LOGPROB_{name}_CHUNK_SIZE", size)
    head, rng = make_head(bias=bias), torch.Generator().manual_seed(1)
    mask, targets = head.mask, head.labels.clamp(min=0)
    now, _ = ops.linear_logprobs(head.hidden, head.weight, targets, bias=head.bias, temperature=0.7)
    noise = torch.randn(2, *mask.shape, generator=rng)
    old, reference = now + 0.7 * noise[0], now + 0.3 * noise[1]
    advantages, is_weights = torch.randn(len(mask), generator=rng) + 0.5, torch.rand(mask.shape, generator=rng)

    leaves = head.leaves()
    loss_module = module.LigerFusedLinearGRPOLoss(
        beta=0.1, compiled=False, chunk_size=3, epsilon_low=0.2, epsilon_high=0.3, loss_type=loss_type,
        max_completion_length=LONGEST, temperature=0.7, delta=1.5,
    )  # fmt: skip
    their_loss, (_, clipped) = loss_module(
        leaves["hidden"], leaves["weight"], targets, mask, advantages, leaves["bias"], ref_per_token_logps=reference,
        old_per_token_logps=old, vllm_is_ratio=is_weights,
    )  # fmt: skip
    (3 * their_loss).backward()
    theirs: dict[str, Any] = {"loss": their_loss} | {n: None if x is None else x.grad for n, x in leaves.items()}

    leaves, mode = head.leaves(), MODES[loss_type]
    token_loss = ops.ppo_token_loss(
        old, advantages[:, None].expand_as(old), clip_low=0.2, clip_high=0.3, dual_clip=1.5, is_weights=is_weights,
        ref_logprobs=reference, kl_coef=0.1,
    )  # fmt: skip
    loss, metrics = ops.linear_policy_loss(
        leaves["hidden"], leaves["weight"], targets, token_loss, bias=leaves["bias"], temperature=0.7, mask=mask,
        weights=ops.token_weights(mask, mode, constant_length=LONGEST if mode == "constant" else None),
        denom=mask.sum() if mode == "token-mean" else len(mask), backend=backend,  # they count empty sequences too
    )  # fmt: skip
    (3 * loss).backward()
    agree({"loss": loss} | {n: None if x is None else x.grad for n, x in leaves.items()}, theirs)
    numbers = ops.finalize_metrics(metrics)
    assert numbers["clip_fraction_low"] > 0
    assert numbers["clip_fraction"] == pytest.approx(clipped.item(), rel=1e-6)
    assert 0.1 < numbers["clip_fraction"] < 0.9
