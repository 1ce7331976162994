"""How kernels read and write the rows of a matrix, and how they sum over one: always in the same order.

Loads and stores are 16 bytes wide where every row is aligned to that, which the host finds out and says by VECTOR; so a
kernel is compiled twice at most, whatever strides and widths come. The order inside a tl.sum would follow how registers
lie, and with them the alignment. A sum of two numbers has no order; here all others are trees of those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tree_sum(x, FAR: tl.constexpr, NEAR: tl.constexpr):
    """Sums over axis 0 of (N, K): FAR times the two halves, then neighbours. One thread holds most of these pairs."""
    for _ in tl.static_range(FAR):
        x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 0)
    for _ in tl.static_range(NEAR):
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1)
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def aligned(X, offset, VECTOR: tl.constexpr):
    """X + offset; that VECTOR > 1 is all that tells the compiler that rows are aligned to 16 bytes."""
    at = X + offset
    return tl.multiple_of(at, 16) if VECTOR > 1 else at


@triton.jit
def row_of(X, row, T, stride_b, stride_t, VECTOR: tl.constexpr):
    return aligned(X, (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t, VECTOR)


@triton.jit
def load(X, i, left, other, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """X[i] where i < left, as float32. A load is as wide as its mask is uniform, hence another one for the last few."""
    if left >= BLOCK:
        x = tl.load(X + i)
    else:
        whole = left // VECTOR * VECTOR
        x = tl.load(X + i, mask=i < whole, other=other)
        if VECTOR > 1:
            x = tl.where(i < whole, x, tl.load(X + i, mask=(i >= whole) & (i < left), other=other))
    return x.to(tl.float32)


@triton.jit
def store(X, i, left, x, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    if left >= BLOCK:
        tl.store(X + i, x)
    else:
        whole = left // VECTOR * VECTOR
        tl.store(X + i, x, mask=i < whole)
        if VECTOR > 1:
            tl.store(X + i, x, mask=(i >= whole) & (i < left))


def tree(block: int, warps: int, dtype: torch.dtype) -> dict[str, int]:
    """How `tree_sum` goes over a block: first, as often, the halves that a thread loads 16 bytes at a time."""
    far = max(0, (block * dtype.itemsize // (512 * warps)).bit_length() - 1)
    return {"FAR": far, "NEAR": block.bit_length() - 1 - far, "num_warps": warps}


def vector_of(*tensors: Tensor | None) -> int:
    """Numbers to a load if every row of the tensors is aligned to 16 bytes, else 1."""
    given = [x for x in tensors if x is not None]
    for x in given:
        strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        if any(at * x.dtype.itemsize % 16 for at in strides) or x.data_ptr() % 16:
            return 1
    return max(16 // x.dtype.itemsize for x in given)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """(stride of the first axis, of the second, size of the second) of (R, n) or (B, T, n)."""
    return (0, x.stride(0), x.shape[0]) if x.ndim == 2 else (x.stride(0), x.stride(1), x.shape[1])
