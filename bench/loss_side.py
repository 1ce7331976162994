"""The loss-side ops on CPUs against verl's functions and the reference: `python bench/loss_side.py`.

Answers are compared before a time is printed. verl is optional: `pip install --no-deps verl==0.9.1` and what its
`verl.trainer.ppo.core_algos` imports; without it that row says so.
"""

from __future__ import annotations

import time

import torch
from measure import check, seconds
from torch import Tensor

from rlhf_engine import ops

SHAPE = (1024, 32_768)
TOKENS = 131_072


def advantages() -> None:
    """GAE and whitening of a big batch."""
    rewards, values, mask = torch.randn(SHAPE), torch.randn(SHAPE), torch.ones(SHAPE, dtype=torch.bool)
    out = (torch.zeros(SHAPE), torch.zeros(SHAPE))

    def given() -> Tensor:
        ops.gae(rewards, values, mask, out=out, backend="cpu")
        return ops.whiten(out[0], mask, ddof=1, out=out[0], backend="cpu")

    def fresh() -> Tensor:
        return ops.whiten(ops.gae(rewards, values, mask, backend="cpu")[0], mask, ddof=1, backend="cpu")

    ours, ours_fresh = seconds(given), seconds(fresh)
    print(f"gae + whitening {SHAPE}: {ours * 1e3:.0f} ms into given tensors, {ours_fresh * 1e3:.0f} ms into fresh ones")
    print(f"  a copy of one such tensor: {seconds(lambda: out[1].copy_(values)) * 1e3:.0f} ms")
    try:
        from verl.trainer.ppo.core_algos import compute_gae_advantage_return
    except ImportError as error:
        print(f"  verl: not measured ({error})")
        return
    start = time.perf_counter()
    gamma, lam = torch.tensor(1.0), torch.tensor(0.95)
    whitened, _ = compute_gae_advantage_return(rewards, values, mask.float(), gamma, lam)
    theirs = time.perf_counter() - start
    check("gae and whitening", given(), whitened, 1e-5)
    print(f"  verl's compute_gae_advantage_return: {theirs:.1f} s, {theirs / ours:.0f}x and {theirs / ours_fresh:.0f}x")


def policy_loss() -> None:
    """Forward and backward."""
    logprobs = torch.randn(TOKENS, requires_grad=True)
    old, advantage = logprobs.detach() + 0.1 * torch.randn(TOKENS), torch.randn(TOKENS)
    mask = torch.ones(TOKENS, dtype=torch.bool)

    def step(backend: str) -> Tensor:
        logprobs.grad = None
        ops.ppo_loss(logprobs, old, advantage, mask, backend=backend)[0].backward()
        assert logprobs.grad is not None
        return logprobs.grad

    check("ppo_loss", step("cpu"), step("reference"), 1e-5)
    ours, plain = seconds(lambda: step("cpu"), 50), seconds(lambda: step("reference"), 20)
    print(
        f"ppo_loss, {TOKENS:,} tokens, forward and backward: {ours * 1e3:.2f} ms, reference {plain * 1e3:.2f} ms, "
        f"{plain / ours:.1f}x"
    )


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    advantages()
    policy_loss()
