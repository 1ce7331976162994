"""The loss-side ops on a GPU, in CUDA and in Triton: as exact as on CPUs, blind under masks, the same bits every time,
and without a wait for the device. `pytest -m gpu` where there is one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE, Results, each_backend, leaf, normal, pick, same_bits
from test_compiled import Case, every_op, padded_and_packed
from torch import Tensor

from rlhf_engine import ops

pytestmark = gpu_tier.marks()
# By a warp; a warp, many; split over several blocks; nothing but padding; a block each of many; one position; and long.
CASES = [
    Case(0, 9, 700, 0.6, True), Case(1, 300, 257, 1.0, True), Case(2, 2, pick(9000, 900), 0.9, False),
    Case(3, 3, 33, 0.0, False), Case(4, 300, pick(4500, 450), 0.95, True), Case(5, 7, 1, 0.7, False),
    Case(6, 1, pick(65_537, 1031), 0.95, True),
]  # fmt: skip
NUMBERS = range(len(CASES))


def largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def on_gpu(case: Case, backend: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Results:
    return every_op(case, case.mask().to(DEVICE), change=lambda x: change(x.to(DEVICE)), backend=backend)


@functools.cache
def truth(number: int) -> Results:
    case = CASES[number]
    return every_op(case, case.mask(), change=lambda x: x.double(), backend="reference")


@pytest.mark.parametrize("number", NUMBERS)
@each_backend
def test_as_exact_as_on_a_cpu(number: int, backend: str) -> None:
    case = CASES[number]
    for (name, ours), (_, exact) in zip(on_gpu(case, backend), truth(number), strict=True):
        # Sums of n numbers of size 1 may cancel; what their own roundings add up to is free.
        free = 2.0**-24 * max(40.0, 4 * (case.count * case.length) ** 0.5, 40 * largest(exact))
        assert largest(ours.cpu().double() - exact.double()) <= free, name


@pytest.mark.parametrize("number", NUMBERS)
@each_backend
def test_again_and_under_poison(number: int, backend: str) -> None:
    case = CASES[number]
    first, mask = on_gpu(case, backend), case.mask().to(DEVICE)
    same_bits(first, on_gpu(case, backend))
    for poison in (torch.nan, torch.inf, 1e38):
        poisoned = on_gpu(case, backend, lambda x, poison=poison: x.where(mask, poison))
        masked = [pair for pair in zip(first, poisoned, strict=True) if not pair[0][0].startswith("kl_estimate")]
        same_bits(*map(list, zip(*masked, strict=True)))


@pytest.mark.parametrize("number", NUMBERS)
@each_backend
def test_any_stride(number: int, backend: str) -> None:
    case = CASES[number]
    same_bits(on_gpu(case, backend), on_gpu(case, backend, lambda x: torch.stack([x, x], -1)[..., 0]))


@pytest.mark.parametrize("number", NUMBERS)
@each_backend
def test_padded_and_packed_have_the_same_bits(number: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("rehearsal: the reference whitens padded and packed rows in sums of their own")
    same_bits(*padded_and_packed(CASES[number], DEVICE, backend))


@each_backend
def test_a_sequence_has_the_same_bits_in_any_batch(backend: str) -> None:
    """Alone it is split over blocks, among many it is a block's."""
    case = Case(7, pick(300, 30), pick(9001, 901), 0.9, True)
    a, b = (x.to(DEVICE) for x in case.tensors(2))
    mask = case.mask().to(DEVICE)
    together = ops.gae(a, b, mask, backend=backend)
    for row in (0, case.count - 1):
        alone = ops.gae(a[row : row + 1], b[row : row + 1], mask[row : row + 1], backend=backend)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[row], y[0]), row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_backend
def test_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Narrow inputs are those numbers in float32, float64 stays so."""
    x = normal(4, 5, 300)
    mask = normal(5, 300, seed=1) > -1
    narrow = x.to(dtype)
    wide = narrow if dtype is torch.float64 else narrow.float()
    name = "reference" if dtype is torch.float64 else backend
    results = []
    for (new, old, advantages, _), chosen in ((narrow, backend), (wide, name)):
        new = leaf(new)
        loss, metrics = ops.ppo_loss(new, old, advantages, mask, backend=chosen)
        (gradient,) = torch.autograd.grad(loss, new)
        results.append([("loss", loss), *metrics.items(), ("gradient", gradient.to(dtype))])
    same_bits(*results)


@each_backend
def test_nothing_waits_for_the_device(backend: str) -> None:
    x, mask = normal(4, 9, 700), torch.ones(9, 700, dtype=torch.bool, device=DEVICE)
    denom, scores = torch.tensor(9.0, device=DEVICE), x[1, :, 0].contiguous()

    def step() -> None:
        new = leaf(x[0])
        shaped = ops.kl_gae(scores, x[0], x[1], x[2], mask, kl_coef=0.1, backend=backend)
        policy, _ = ops.ppo_loss(new, x[1], shaped.advantages, mask, backend=backend)
        value, _ = ops.value_loss(new, x[3], shaped.returns, mask, denom=denom, backend=backend)
        (policy + value + ops.kl_estimate(new, x[1], kind="k3", backend=backend).sum()).backward()
        ops.whiten(shaped.returns, mask, backend=backend)

    step()
    with gpu_tier.no_waiting():
        step()


@each_backend
def test_nothing_of_nothing(backend: str) -> None:
    for shape in ((0, 5), (4, 0)):
        x = torch.empty(shape, device=DEVICE, requires_grad=True)
        mask, zeros = torch.ones(shape, dtype=torch.bool, device=DEVICE), torch.zeros(shape, device=DEVICE)
        policy, metrics = ops.ppo_loss(x, zeros, zeros, mask, backend=backend)
        value, _ = ops.value_loss(x, zeros, zeros, mask, backend=backend)
        (policy + value).backward()
        assert policy == value == metrics["policy_tokens"] == 0 and x.grad.shape == shape
        assert ops.gae(zeros, zeros, mask, backend=backend)[0].shape == shape
        shaped = ops.kl_gae(
            torch.zeros(shape[0], device=DEVICE), zeros, zeros, zeros, mask, kl_coef=0.1, backend=backend
        )
        assert shaped.advantages.shape == ops.whiten(zeros, mask, backend=backend).shape == shape
