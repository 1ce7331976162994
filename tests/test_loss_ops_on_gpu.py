"""The loss-side ops on a GPU, in CUDA and in Triton: as exact as on CPUs, blind under masks, the same bits every time,
and without a wait for the device, so a CUDA graph can hold them. `pytest -m gpu` where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_compiled import Case, assert_same_bits, every_op
from torch import Tensor

from rlhf_engine import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
# By a warp, by a block, split over several, many short ones, and one that is nothing but padding.
CASES = [
    Case(0, 9, 700, 0.6, True), Case(1, 300, 257, 1.0, True), Case(2, 2, 9000, 0.9, False), Case(3, 3, 33, 0.0, False),
    Case(4, 16, 65_536, 0.95, True),
]  # fmt: skip
Results = list[tuple[str, Tensor]]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in ops.available("gae"):
        pytest.skip(f"backend {request.param!r} is not in this installation; `rlhf doctor` says why")
    return request.param


def largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def on_gpu(case: Case, backend: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Results:
    return every_op(case, case.mask().cuda(), change=lambda x: change(x.cuda()), backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_on_a_cpu(case: Case, backend: str) -> None:
    truth = every_op(case, case.mask(), change=lambda x: x.double(), backend="reference")
    for (name, ours), (_, exact) in zip(on_gpu(case, backend), truth, strict=True):
        # Sums of n numbers of size 1 may cancel; what their own roundings add up to is free.
        free = 2.0**-24 * max(40.0, 4 * (case.count * case.length) ** 0.5, 40 * largest(exact))
        assert largest(ours.cpu().double() - exact.double()) <= free, name


@pytest.mark.parametrize("case", CASES)
def test_again_and_under_poison(case: Case, backend: str) -> None:
    first, mask = on_gpu(case, backend), case.mask().cuda()
    assert_same_bits(first, on_gpu(case, backend))
    poisoned = on_gpu(case, backend, lambda x: x.where(mask, torch.nan))
    masked = [pair for pair in zip(first, poisoned, strict=True) if not pair[0][0].startswith("kl_estimate")]
    for (name, clean), (_, dirty) in masked:
        assert torch.equal(clean, dirty), name


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(backend: str, no_waiting: None) -> None:
    case = CASES[0]
    x, mask = (
        torch.randn(4, case.count, case.length, device="cuda"),
        torch.ones(9, 700, dtype=torch.bool, device="cuda"),
    )
    leaf, scores = x[0].clone().requires_grad_(), x[1, :, 0].contiguous()
    shaped = ops.kl_gae(scores, x[0], x[1], x[2], mask, kl_coef=0.1, backend=backend)
    policy, _ = ops.ppo_loss(leaf, x[1], shaped.advantages, mask, backend=backend)
    value, _ = ops.value_loss(leaf, x[3], shaped.returns, mask, backend=backend)
    (policy + value).backward()


def test_a_graph_replays_the_same_bits(backend: str) -> None:
    logprobs, old, advantages = torch.randn(3, 4096, device="cuda").unbind()
    mask, leaf = torch.rand(4096, device="cuda") < 0.8, logprobs.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss, _ = ops.ppo_loss(leaf, old, advantages, mask, backend=backend)
        return loss, torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, eager, strict=True))
