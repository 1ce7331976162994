"""The loss-side ops on CPUs against verl's functions and the reference: `python bench/loss_side.py`.

Answers are compared before a time is printed. verl is optional: `pip install --no-deps verl==0.9.1` and what its
`verl.trainer.ppo.core_algos` imports; without it that row says so.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from measure import check, seconds
from torch import Tensor

from rlhf_engine import ops, reference

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
    verl = core_algos()
    if verl is None:
        return
    start = time.perf_counter()
    gamma, lam = torch.tensor(1.0), torch.tensor(0.95)
    whitened, _ = verl.compute_gae_advantage_return(rewards, values, mask.float(), gamma, lam)
    theirs = time.perf_counter() - start
    check("gae and whitening", given(), whitened, 1e-5)
    print(f"  verl's compute_gae_advantage_return: {theirs:.1f} s, {theirs / ours:.0f}x and {theirs / ours_fresh:.0f}x")


def shaped_advantages() -> None:
    """kl_gae against a copy of as many bytes: three tensors and a mask read, four and a mask written."""
    logprobs, ref_logprobs, values = torch.randn(3, *SHAPE).unbind()
    mask, scores = torch.ones(SHAPE, dtype=torch.bool), torch.randn(SHAPE[0])
    out = ops.ShapedAdvantages(*torch.zeros(4, *SHAPE).unbind(), torch.zeros(SHAPE, dtype=torch.bool))
    inputs = (
        logprobs,
        ref_logprobs,
        values,
        logprobs[:, ::2].contiguous(),
        mask,
    )  # half of a tensor more: as many bytes
    copies = (
        out.rewards,
        out.advantages,
        out.returns,
        out.kl.view(-1)[: inputs[3].numel()].view(inputs[3].shape),
        out.value_mask,
    )

    def run(**more: ops.ShapedAdvantages) -> ops.ShapedAdvantages:
        return ops.kl_gae(scores, logprobs, ref_logprobs, values, mask, kl_coef=0.05, backend="cpu", **more)

    def copy() -> None:
        for place, x in zip(copies, inputs, strict=True):
            place.copy_(x)

    plain = ops.kl_gae(scores, logprobs, ref_logprobs, values, mask, kl_coef=0.05, backend="reference")
    for name in ("rewards", "advantages", "returns", "kl"):
        check(f"kl_gae's {name}", getattr(run(), name), getattr(plain, name), 1e-5)
    given, fresh, copied, cloned = (
        seconds(work) for work in (lambda: run(out=out), run, copy, lambda: [x.clone() for x in inputs])
    )
    print(
        f"kl_gae with whitening {SHAPE}: {given * 1e3:.0f} ms into given tensors, {given / copied:.1f}x of a copy "
        f"({copied * 1e3:.0f} ms); {fresh * 1e3:.0f} ms into fresh ones, {fresh / cloned:.1f}x of clones "
        f"({cloned * 1e3:.0f} ms)"
    )


def core_algos() -> ModuleType | None:
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        print(f"  verl: not measured ({error})")
        return None


def policy_loss() -> None:
    """Forward and backward, of a batch as trainers hold it."""
    shape = (TOKENS // 1024, 1024)
    logprobs = torch.randn(shape, requires_grad=True)
    old, advantage = logprobs.detach() + 0.1 * torch.randn(shape), torch.randn(shape)
    mask = torch.ones(shape, dtype=torch.bool)

    def gradient(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            logprobs.grad = None
            loss().backward()
            assert logprobs.grad is not None
            return logprobs.grad

        return run

    def reference_loss(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return reference.ppo_loss(new, old, advantage, mask, dual_clip=3.0)[0]

    compiled = torch.compile(reference_loss)
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.ppo_loss(logprobs, old, advantage, mask, dual_clip=3.0, backend="cpu")[0],
        "the reference": lambda: reference_loss(logprobs, old, advantage, mask),
        "torch.compile of the reference": lambda: compiled(logprobs, old, advantage, mask),
    }
    verl = core_algos()
    if verl is not None:
        config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={})
        config.get = lambda name, default: default
        losses["verl's compute_policy_loss_vanilla"] = lambda: verl.compute_policy_loss_vanilla(
            old, logprobs, advantage, mask.float(), config=config
        )[0]
    print(f"ppo_loss, {TOKENS:,} tokens, forward and backward")
    runs = {name: gradient(loss) for name, loss in losses.items()}
    for name, run in runs.items():
        check(f"ppo_loss of {name}", runs["ours"](), run(), 1e-5)
    times = {name: seconds(run, 41) for name, run in runs.items()}
    for name, took in times.items():
        print(f"  {name}: {took * 1e3:.2f} ms, {took / times['ours']:.1f}x")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    advantages()
    shaped_advantages()
    policy_loss()
