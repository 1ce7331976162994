"""When products of different heights give a row the same bits: found by trying, and believed only then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_engine import ops
from rlhf_engine.ops import products


@pytest.fixture(autouse=True)
def forgetful() -> None:
    products._heights_agree.cache_clear()


def test_a_library_that_sums_in_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One height of four, in one row of either product."""
    product, accumulate = products.product, products.accumulate

    def other_product(a: Tensor, b: Tensor, out: Tensor) -> None:
        product(a, b, out)
        if len(out) == 192:
            out[5] *= 1 + 1e-6

    def other_accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
        accumulate(into, a, b)
        if len(into) == 64:
            into[5] *= 1 + 1e-6

    shape = (64, 256, 48, 96, torch.float32)
    assert products.heights_agree(*shape)
    for name, function in (("product", other_product), ("accumulate", other_accumulate)):
        products._heights_agree.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(products, name, function)
            assert not products.heights_agree(*shape)


def test_whatever_device_is_the_default() -> None:
    hidden, weight, targets = torch.randn(200, 8), torch.randn(300, 8), torch.zeros(200, dtype=torch.int64)
    want = ops.linear_logprobs(hidden, weight, targets)
    products._heights_agree.cache_clear()
    with torch.device("meta"):
        hidden.requires_grad_()
        got = ops.linear_logprobs(hidden, weight, targets)
        got[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and hidden.grad is not None


def test_every_shape_and_number_of_threads_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(tried) // 4 + 1)
    plain = products.product
    monkeypatch.setattr(products, "product", lambda a, b, out: (tried.append(a.shape), plain(a, b, out)))
    for _ in range(2):
        products.heights_agree(64, 256, 8, 96, torch.float32)
    assert len(tried) == 8  # two numbers of threads, four heights each
    products.heights_agree(64, 128, 8, 97, torch.float32)
    assert len(tried) == 10


@pytest.mark.parametrize("device", ["cpu", "meta"])  # the latter takes the path of GPUs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counters_see_every_product(device: str, dtype: torch.dtype) -> None:
    a, b = torch.ones(6, 4, device=device, dtype=dtype), torch.ones(8, 4, device=device, dtype=dtype)
    logits, into = torch.zeros(6, 8, device=device), torch.ones(8, 4, device=device)
    with FlopCounterMode(display=False) as counter:
        products.product(a, b.t(), logits)
        products.accumulate(into, logits.to(dtype).t(), a)
    assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 8
    products.accumulate(into, logits.to(dtype).t(), a)
    if device == "cpu":
        assert (logits == 4).all() and (into == 1 + 2 * 6 * 4).all()


def test_nobody_notices() -> None:
    """Neither a counter of operations nor the global random numbers."""
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        products.heights_agree(64, 128, 8, 96, torch.bfloat16)
    assert counter.get_total_flops() == 0 and torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("allowed", [(True, True), (False, True), (False, False)])  # all that torch takes
def test_what_cublas_may_do_is_as_before(allowed: tuple[bool, bool]) -> None:
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]

    def now() -> list[tuple[bool, bool]]:
        return [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]

    try:
        for name in names:
            setattr(matmul, name, allowed)
        with products.exact("cuda"):
            assert now() == [(False, allowed[1])] * 2
        assert now() == [allowed] * 2
    finally:
        for name in names:
            setattr(matmul, name, True)
