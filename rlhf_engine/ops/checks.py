"""What the front door refuses. Every message names the op, the argument and what was seen: a wrong shape or dtype that
gets through would broadcast or be misread, and training would go on with wrong numbers."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def floating(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def like(op: str, reference: dict[str, Tensor], **tensors: Tensor | None) -> None:
    """Shape and device of the one reference tensor; floating, but for `mask`, which must be bool."""
    ((reference_name, expected),) = reference.items()
    expected_shape, device = expected.shape, expected.device
    for name, x in tensors.items():
        if x is None:
            continue
        if x.shape != expected_shape:
            raise ValueError(f"{op}: {name} {shape(x)} does not match {reference_name} {shape(expected)}")
        if x.device != device:
            same_device(op, reference, **{name: x})
        if name != "mask":
            if x.dtype not in FLOATS:
                floating(op, **{name: x})
        elif x.dtype is not torch.bool:
            raise ValueError(f"{op}: mask must be torch.bool, got {x.dtype}")


def same_device(op: str, reference: dict[str, Tensor], **tensors: Tensor | None) -> None:
    ((reference_name, expected),) = reference.items()
    for name, x in tensors.items():
        if x is not None and x.device != expected.device:
            raise ValueError(f"{op}: {name} is on {x.device}, {reference_name} on {expected.device}")


def constants(op: str, reference: dict[str, Tensor], **tensors: Tensor | None) -> None:
    """As like; and a gradient that is asked for would be lost."""
    like(op, reference, **tensors)
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires grad, but the loss treats it as a constant; pass {name}.detach()")


def one_of(op: str, name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def each_of(op: str, name: str, values: Collection[str], allowed: Collection[str]) -> None:
    for value in [values] if isinstance(values, str) else values:
        one_of(op, name, value, allowed)
    if isinstance(values, str):
        raise ValueError(f"{op}: {name} must be a sequence of names, such as [{values!r}]")


def mask(op: str, targets: Tensor, mask: Tensor | None) -> None:
    """Shaped like the targets; on their device, or on the CPU."""
    if mask is not None and mask.device.type == "cpu" and targets.device.type != "cpu":
        targets = torch.empty(targets.shape, device="meta")
        mask = mask.to("meta")
    like(op, {"targets": targets}, mask=mask)


def temperature(
    op: str,
    temperature: float | Tensor,
    targets: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    rows: Tensor | None = None,
) -> None:
    """Positive and finite: a number, or a constant for each row. Only a CPU's is read, for rows that count (a GPU gives
    NaN)."""
    if not isinstance(temperature, Tensor):
        positive(op, temperature=temperature)
        return
    constants(op, {"targets": targets}, temperature=temperature)
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((temperature > 0) & (temperature < math.inf))
        if rows is not None:
            named = torch.zeros_like(wrong, memory_format=torch.contiguous_format).view(-1)
            wrong = wrong & named.index_fill_(0, rows, True).view(wrong.shape)
        else:
            wrong = wrong & (targets != ignore_index) if mask is None else wrong & (targets != ignore_index) & mask
        if wrong.any():
            raise ValueError(f"{op}: temperature must be greater than 0 and finite, got {float(temperature[wrong][0])}")


def integers(op: str, targets: Tensor) -> None:
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: targets must be int32 or int64, got {targets.dtype}")


def positive(op: str, **numbers: float | None) -> None:
    for name, x in numbers.items():
        if x is not None and not 0 < x < math.inf:
            raise ValueError(f"{op}: {name} must be greater than 0 and finite, got {x}")


def not_negative(op: str, **numbers: float | Tensor | None) -> None:
    """Tensors pass unread: a look at their value would wait for the device."""
    for name, x in numbers.items():
        if x is not None and not isinstance(x, Tensor) and not 0 <= x < math.inf:
            raise ValueError(f"{op}: {name} must be 0 or greater and finite, got {x}")


def targets(op: str, targets: Tensor, mask: Tensor | None, ignore_index: int | None, vocabulary: int) -> None:
    """int32 or int64; on CPU each scored one must be a token id (on CUDA a look would wait; the op gives NaN there)."""
    integers(op, targets)
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    wrong = wrong if ignore_index is None else wrong & (targets != ignore_index)
    wrong = wrong if mask is None else wrong & mask
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{op}: target {targets[place].item()} at {place} is outside the vocabulary [0, {vocabulary})")


def denominator(op: str, reference: dict[str, Tensor], weights: Tensor | None, denom: float | Tensor | None) -> None:
    """Weights need their denom: most modes divide by something other than the number of tokens."""
    if denom is None:
        if weights is not None:
            raise ValueError(
                f"{op}: weights are given without denom; pass the count of the whole batch (see token_denom)"
            )
    elif not isinstance(denom, Tensor):
        not_negative(op, denom=denom)
    elif denom.dim() != 0 or denom.is_complex():
        seen = shape(denom) if denom.dim() else denom.dtype
        raise ValueError(f"{op}: denom must be a number or a 0-d tensor, got {seen}")
    else:
        same_device(op, reference, denom=denom)


def sequences(op: str, mask: Tensor, cu_seqlens: Tensor | None, name: str = "mask") -> int:
    """Number of sequences of (B, T), or of (N,) with offsets; on CPU the offsets themselves are checked too."""
    if name == "mask" and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be torch.bool, got {mask.dtype}")
    if cu_seqlens is None:
        if mask.dim() != 2:
            raise ValueError(f"{op}: {name} must be (B, T), or (N,) with cu_seqlens, got {shape(mask)}")
        return mask.shape[0]
    if mask.dim() != 1:
        raise ValueError(f"{op}: {name} must be (N,) with cu_seqlens, got {shape(mask)}")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cu_seqlens must be (B + 1,) int32 or int64, got {shape(cu_seqlens)} {cu_seqlens.dtype}"
        )
    same_device(op, {name: mask}, cu_seqlens=cu_seqlens)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != len(mask) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"{op}: cu_seqlens must rise from 0 to {len(mask)}, the length of {name}, got {cu_seqlens.tolist()}"
            )
    return len(cu_seqlens) - 1


def per_sequence(op: str, count: int, reference: dict[str, Tensor], **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None:
            continue
        if x.shape != (count,):
            raise ValueError(f"{op}: {name} {shape(x)} must hold one number per sequence: ({count},)")
        floating(op, **{name: x})
        same_device(op, reference, **{name: x})


def output(op: str, inputs: dict[str, Tensor], read: dict[str, Any], **tensors: Tensor) -> None:
    """What is written to directly: contiguous, of the inputs' shape and device and the result's dtype (a mask: bool),
    and in memory of its own, apart from all that is read."""
    dtype = torch.float64 if any(x.dtype is torch.float64 for x in inputs.values()) else torch.float32
    ((first_name, first), *_) = inputs.items()
    for name, x in tensors.items():
        wanted = torch.bool if name.endswith("mask") else dtype
        if x.shape != first.shape:
            raise ValueError(f"{op}: {name} {shape(x)} does not match {first_name} {shape(first)}")
        if x.device != first.device:
            same_device(op, {first_name: first}, **{name: x})
        if x.dtype is not wanted or not x.is_contiguous() or x.requires_grad:
            raise ValueError(f"{op}: {name} must be contiguous {wanted} without gradient")
    if torch.compiler.is_compiling() or not first.numel():  # no memory to compare
        return
    taken = {name: _memory(x) for name, x in read.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        begin, end = _memory(x)
        for other, (other_begin, other_end) in taken.items():
            if begin < other_end and other_begin < end:
                raise ValueError(f"{op}: {name} shares memory with {other}; give it memory of its own")
        taken[name] = (begin, end)


def _memory(x: Tensor) -> tuple[int, int]:
    """First address and the one behind the last; strides are never negative."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()
