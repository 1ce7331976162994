"""What a call of a loss-side op costs beyond its kernel: `python bench/tools/overhead.py`.

On 4 sequences of 8 tokens a kernel takes next to nothing, so the time is that of getting there: the checks of the front
door, the adaptor, torch's dispatcher. Three ways in, answers compared first: the op, its operator, bare addresses.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measure import check

from rlhf_engine import native, ops

SHAPE = (4, 8)
INF = float("inf")


def microseconds(work: Callable[[], object], batch: int = 100, repeats: int = 100) -> float:
    """Of one call, the best of some batches: what disturbs only ever adds."""
    for _ in range(batch):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(batch):
            work()
        times.append((time.perf_counter() - start) / batch)
    return min(times) * 1e6


def main() -> None:
    torch.set_num_threads(1)
    a, b, c, advantages, returns = torch.randn(5, *SHAPE).unbind()
    mask, scores, leaf = torch.ones(SHAPE, dtype=torch.bool), torch.randn(SHAPE[0]), a.clone().requires_grad_()
    loss, gradient = torch.empty(()), torch.empty(SHAPE)
    operators, raw = torch.ops.rlhf_engine, native.raw()
    tail = (None, None, None, None, None, -1.0, 0.2, 0.2, INF, 0.0, 0.0, 0, False)
    addresses = [x.data_ptr() for x in (a, b, mask)]
    policy = [x.data_ptr() for x in (a, b, c, mask)]

    def operator_with_gradient() -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return operators.ppo_loss.default(leaf, b, c, mask, *tail, True)

    def with_backward() -> None:
        ops.ppo_loss(leaf, b, c, mask)[0].backward()

    rows: list[tuple[str, Callable[[], object], Callable[[], object] | None, Callable[[], object] | None]] = [
        (
            "gae",
            lambda: ops.gae(a, b, mask, out=(advantages, returns)),
            lambda: operators.gae_out.default(
                a, b, mask, None, None, None, None, 1.0, 0.95, 0.95, False, False, advantages, returns
            ),
            lambda: raw.gae(*addresses, *SHAPE, 1.0, 0.95, advantages.data_ptr(), returns.data_ptr()),
        ),
        (
            "whiten",
            lambda: ops.whiten(a, mask),
            lambda: operators.whiten.default(a, mask, 0, 1e-8, True, True, True),
            None,
        ),
        (
            "kl_gae",
            lambda: ops.kl_gae(scores, a, b, c, mask, kl_coef=0.1),
            lambda: operators.kl_gae.default(
                scores, a, b, c, mask, None, None, None, 0, -INF, INF, -INF, INF, 0.1, INF, False, 1.0, 0.95, False,
                True,
            ),
            None,
        ),
        ("kl_estimate, gradient wanted", lambda: ops.kl_estimate(leaf, b), None, None),
        (
            "ppo_loss, no gradient",
            lambda: ops.ppo_loss(a, b, c, mask),
            lambda: operators.ppo_loss.default(a, b, c, mask, *tail, False),
            lambda: raw.policy_loss(*policy, a.numel(), 0.2, float(a.numel()), loss.data_ptr(), gradient.data_ptr()),
        ),
        ("ppo_loss, gradient wanted", lambda: ops.ppo_loss(leaf, b, c, mask), operator_with_gradient, None),
        ("ppo_loss and its backward", with_backward, None, None),
        ("value_loss, gradient wanted", lambda: ops.value_loss(leaf, b, c, mask), None, None),
    ]  # fmt: skip
    raw.gae(*addresses, *SHAPE, 1.0, 0.95, advantages.data_ptr(), returns.data_ptr())
    check("gae", advantages, ops.gae(a, b, mask)[0], 0.0)
    raw.policy_loss(*policy, a.numel(), 0.2, float(a.numel()), loss.data_ptr(), gradient.data_ptr())
    check("ppo_loss", loss, ops.ppo_loss(a, b, c, mask)[0], 1e-6)
    print(f"microseconds a call, {SHAPE} tokens, torch {torch.__version__}, 1 thread")
    print(f"{'':30}{'op':>8}{'operator':>10}{'addresses':>11}")
    for name, op, operator, bare in rows:
        cells = [microseconds(work) if work else None for work in (op, operator, bare)]
        print(
            f"{name:30}"
            + "".join(f"{'' if x is None else f'{x:.1f}':>{w}}" for x, w in zip(cells, (8, 10, 11), strict=True))
        )


if __name__ == "__main__":
    main()
