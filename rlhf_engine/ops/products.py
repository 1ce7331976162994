"""Matrix products of the head, and when a row of them has the same bits in products of different heights.

A product's shape decides in which order it sums. A library may well use one order for many heights, and taller products
are faster; whether it does is found out by trying, once for every shape that occurs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def heights_agree(step: int, most: int, width: int, tokens: int, dtype: torch.dtype) -> bool:
    """On this CPU, with as many threads as now: have the rows of hidden (h, width) @ weight (tokens, width)^T, and
    those of d hidden = dz (h, tokens) @ weight, the same bits for every h of step, 2 step, ..., most?"""
    return _heights_agree(step, most, width, tokens, dtype, torch.get_num_threads())


@functools.cache
def _heights_agree(step: int, most: int, width: int, tokens: int, dtype: torch.dtype, threads: int) -> bool:
    rng = torch.Generator().manual_seed(0)
    # Whatever device is the default; and this is not of the work that a counter of operations is to see.
    with torch.device("cpu"), _disable_current_modes(), torch.no_grad():
        hidden, dz, weight = (
            torch.randn(n, m, generator=rng).to(dtype) for n, m in ((most, width), (most, tokens), (tokens, width))
        )
        logits, grad = torch.empty(most, tokens, dtype=dtype), torch.zeros(most, width)
        product(hidden, weight.t(), logits)
        accumulate(grad, dz, weight)
        for height in range(step, most, step):
            lower_logits, lower_grad = torch.empty(height, tokens, dtype=dtype), torch.zeros(height, width)
            product(hidden[:height], weight.t(), lower_logits)
            accumulate(lower_grad, dz[:height], weight)
            if not (torch.equal(lower_logits, logits[:height]) and torch.equal(lower_grad, grad[:height])):
                return False
    return True


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b."""
    if a.dtype is out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":  # which has no product with a wider result
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b. Not by addmm_, which torch's FLOP counter misses."""
    if a.dtype is into.dtype:
        torch.addmm(into, a, b, out=into)
    elif a.device.type == "cpu":
        torch.addmm(into, a.to(into.dtype), b.to(into.dtype), out=into)
    elif torch._C._len_torch_dispatch_stack():  # such as torch's FLOP counter, which the operator below makes fail
        into += torch.mm(a, b, into.dtype)
    else:
        torch.addmm(into, a, b, into.dtype, out=into)


@contextmanager
def exact(device_type: str) -> Iterator[None]:
    """Without the caller's autocast, and without partial sums that cuBLAS rounds to 16 bits: both would change bits."""
    matmul = torch.backends.cuda.matmul
    flags = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    before = {flag: (getattr(matmul, flag), getattr(matmul, f"{flag}_split_k", True)) for flag in flags}

    def allow(flag: str, reduced: bool, split_k: bool) -> None:
        setattr(matmul, flag, reduced if split_k else (reduced, False))  # one number allows splits, too

    try:
        if device_type == "cuda":
            for flag, (_, split_k) in before.items():
                allow(flag, False, split_k)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if device_type == "cuda":
            for flag, (reduced, split_k) in before.items():
                allow(flag, reduced, split_k)
