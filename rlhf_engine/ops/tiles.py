"""Tiles of the head: logits exist for some rows and some tokens at a time, folded as soon as they do.

A matrix product chooses its summation order by its shape. So a product's shape is fixed by the device alone, or its
height is one of several that were found to give a row the same bits; tails are filled up with zero rows, and a row's
bits depend on that row alone. How many logits live at once changes no bit. On CPUs products are float32 whatever the
input: without bfloat16 instructions those in bfloat16 are slower.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine.ops.products import accumulate, heights_agree, product
from rlhf_engine.ops.rows import DEAD, Rows


@dataclass(frozen=True, slots=True)
class Shape:
    """Of products, and of the blocks of rows that go through all of them together."""

    rows: int  # of a product, or a multiple of it
    tokens: int  # of a product; a multiple of the operators' segment
    tallest: int  # rows of a product, where heights agree
    block: int  # rows, if `budget` allows
    budget: int  # bytes of logits


# On two AVX2 cores at width 576 a policy loss takes 25% longer in products of 192 rows than of 512, and the latter are
# as fast as one product of all rows. On GPUs 1024 x 32,768 is 1024 blocks of a usual product, some eight waves.
SHAPES = {"cpu": Shape(64, 2048, 512, 512, 128 << 20), "cuda": Shape(1024, 32_768, 1024, 8192, 1280 << 20)}
ALIGNED = 16  # numbers, 32 bytes of the narrowest


@dataclass
class Head:
    """What turns hidden states into log-probs, and how: the arguments of an op, made ready."""

    call: Any  # the operators of a namespace
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,) float32
    temperature: float
    temperatures: Tensor | None  # (n,) float32, one a row
    logit_scale: float
    softcap: float  # 0: none
    logits_dtype: torch.dtype
    shape: Shape
    extras: bool = False

    @property
    def on_gpu(self) -> bool:
        """Or in Triton's interpreter."""
        return hasattr(self.call, "head_scale")

    def only(self, kept: Tensor) -> Head:
        """Of the rows numbered `kept` (m,)."""
        return replace(self, temperatures=None if self.temperatures is None else self.temperatures[kept])

    def scale(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor (0-d), without a pass over x if that is 1, and without waiting for a GPU."""
        if self.on_gpu:
            self.call.head_scale(x, factor.float())
        elif factor != 1:
            x.mul_(factor)

    @property
    def factors_dtype(self) -> torch.dtype:
        """Of what is multiplied."""
        if self.weight.device.type == "cpu" and self.logits_dtype is torch.float32:
            return torch.float32
        return self.weight.dtype

    def block_rows(self, keep: bool) -> int:
        """Of a block; with `keep` the logits of all tokens live at once."""
        segments, step = -(-self.weight.shape[0] // self.shape.tokens) if keep else 1, self.shape.rows
        most = self.shape.budget // (segments * self.stride * self.logits_dtype.itemsize)
        return max(1, min(most, self.shape.block) // step) * step

    @functools.cached_property
    def stride(self) -> int:
        """From one row of logits to the next, whichever segment they are of, kept or not: by it a library may choose in
        which order a product sums, and where rows are not aligned it is slow."""
        return -(-min(self.shape.tokens, self.weight.shape[0]) // ALIGNED) * ALIGNED

    @functools.cached_property
    def height(self) -> int:
        """Of a product, at most."""
        shape, (vocabulary, width) = self.shape, self.weight.shape
        widths = {min(shape.tokens, vocabulary), vocabulary % shape.tokens or shape.tokens} - {0}
        same = shape.tallest > shape.rows and all(
            heights_agree(shape.rows, shape.tallest, width, tokens, self.factors_dtype) for tokens in widths
        )
        return shape.tallest if same else shape.rows

    @functools.cached_property
    def dense_weight(self) -> Tensor:
        """With its columns next to each other, as the kernel that reads single rows wants it; products take any."""
        return self.weight if self.weight.stride(1) == 1 else self.weight.contiguous()

    def segments(self) -> Iterator[Segment]:
        for start in range(0, self.weight.shape[0], self.shape.tokens):
            tokens = slice(start, min(start + self.shape.tokens, self.weight.shape[0]))
            yield Segment(
                tokens, self.weight[tokens].to(self.factors_dtype), None if self.bias is None else self.bias[tokens]
            )

    def blocks(self, hidden: Tensor, rows: Rows, keep: bool) -> Iterator[Block]:
        """Full products' worth of rows (N, H) each, gathered."""
        step, buffers = self.block_rows(keep), dict[int, Tensor]()
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            tail = -(part.stop - part.start) % self.shape.rows
            h = hidden.index_select(0, rows.index[part]).to(self.factors_dtype)
            if rows.active is not None:  # 0 * NaN would reach dW
                h = torch.where(rows.active[part, None], h, 0)
            targets = F.pad(rows.targets[part], (0, tail), value=DEAD)
            temperatures = None if self.temperatures is None else F.pad(self.temperatures[part], (0, tail), value=1.0)
            block = Block(self, part, F.pad(h, (0, 0, 0, tail)), targets, temperatures, buffers)
            if self.logits_dtype is not torch.float32:
                block.target_logits = self._target_logits(block)
            yield block

    def _target_logits(self, block: Block) -> Tensor:
        """In float32, to stand for the rounded ones: else a likely token's log-prob may come out positive."""
        if self.on_gpu:
            return self.call.target_logits(block.hidden, self.dense_weight, block.targets, DEAD)
        known = (block.targets >= 0) & (block.targets < self.weight.shape[0])
        rows = self.weight[torch.where(known, block.targets, 0)]
        return (block.hidden.float() * rows.float()).sum(1)


@dataclass(frozen=True, slots=True)
class Segment:
    """Some tokens of the vocabulary."""

    tokens: slice
    weight: Tensor  # (n, H)
    bias: Tensor | None  # (n,)


@dataclass(slots=True)
class Block:
    """Some rows, filled up to whole products, and their logits of one segment, or of all."""

    head: Head
    part: slice  # of the op's rows
    hidden: Tensor  # (R, H)
    targets: Tensor  # (R,)
    temperatures: Tensor | None  # (R,)
    buffers: dict[int, Tensor]  # of logits, the same for all blocks: fresh pages would cost as much as a fold
    target_logits: Tensor | None = None  # (R,)
    kept: bool = False  # the buffers hold this block's logits, by the first token of each segment

    @property
    def real(self) -> slice:
        """Rows that do not fill up."""
        return slice(0, self.part.stop - self.part.start)

    def padded(self, x: Tensor) -> Tensor:
        """(..., n) of the block's rows -> (..., R), zeros behind."""
        return F.pad(x, (0, self.hidden.shape[0] - self.real.stop))

    def products(self) -> Iterator[slice]:
        height = self.head.height
        return (slice(i, i + height) for i in range(0, self.hidden.shape[0], height))

    def logits(self, segment: Segment, keep: bool) -> Tensor:
        """(R, n) raw logits of a segment, in a buffer: of its own with `keep`, else the one of all segments."""
        key, (rows, n) = segment.tokens.start if keep else 0, (self.hidden.shape[0], segment.weight.shape[0])
        if key not in self.buffers:  # no later block is larger, nor a later segment
            self.buffers[key] = self.hidden.new_empty(rows, self.head.stride, dtype=self.head.logits_dtype)
        out = self.buffers[key][:rows, :n]
        if not self.kept:
            for part in self.products():
                product(self.hidden[part], segment.weight.t(), out[part])
        return out

    def transform(self, segment: Segment) -> tuple[Any, ...]:
        """The operators' arguments that say what the model does to raw logits."""
        head = self.head
        return (
            segment.bias, self.temperatures, self.target_logits, head.logit_scale, head.softcap,
            1 / head.temperature, segment.tokens.start, DEAD,
        )  # fmt: skip

    def fold(self, keep: bool) -> Tensor:
        """Statistics (6 or 8, R)."""
        parts = []
        for segment in self.head.segments():
            z = self.logits(segment, keep)
            parts.append(self.head.call.head_fold(z, self.targets, *self.transform(segment), self.head.extras))
        self.kept = keep
        vocabulary = self.head.weight.shape[0]
        return self.head.call.head_combine(torch.cat(parts), self.targets, 0, vocabulary, DEAD)

    def backward(self, statistics: Tensor, g_l: Tensor | None, g_e: Tensor | None, sums: Gradients) -> None:
        """Adds up what upstream gradients (n,) give, from the logits kept or computed once more."""
        head = self.head
        g_l, g_e = (None if g is None else self.padded(g) for g in (g_l, g_e))
        grad_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=torch.float32) if sums.hidden is not None else None
        for segment in head.segments():
            z = self.logits(segment, self.kept)
            in_place = z.dtype is head.factors_dtype
            dz = z if in_place else z.new_empty(z.shape[0], head.stride, dtype=head.factors_dtype)[:, : z.shape[1]]
            head.call.head_gradient(z, self.targets, statistics, g_l, g_e, *self.transform(segment), dz)
            if grad_hidden is not None:
                for rows in self.products():
                    accumulate(grad_hidden[rows], dz[rows], segment.weight)
            sums.add(segment, dz[self.real], self.hidden[self.real])
        sums.started = True
        if grad_hidden is not None:
            sums.set_hidden(self.part, grad_hidden[self.real])


class Gradients:
    """Sums of the gradients in hidden, weight and bias, in float32, as far as they are needed."""

    def __init__(
        self, hidden: Tensor, rows: Rows, head: Head, needs: tuple[bool, ...], weight_out: Tensor | None = None
    ) -> None:
        weight = head.weight
        self.rows = rows
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight, self.given = weight_out, weight_out is not None
        if needs[1] and weight_out is None:
            self.weight = weight.new_empty(weight.shape, dtype=torch.float32)
        self.bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if needs[2] else None
        self.started = self.given
        self.dtype = weight.dtype

    def add(self, segment: Segment, dz: Tensor, hidden: Tensor) -> None:
        """dz (n, tokens) of hidden (n, H)."""
        if self.weight is not None:
            into = self.weight[segment.tokens]
            if self.started:
                accumulate(into, dz.t(), hidden)
            else:
                product(dz.t(), hidden, into)  # the first one fills it: no pass to clear it
        if self.bias is not None:
            # A CPU adds rows one after the other, a GPU in a tree.
            self.bias[segment.tokens] += dz.sum(0, dtype=torch.float64 if dz.device.type == "cpu" else torch.float32)

    def set_hidden(self, part: slice, grad: Tensor) -> None:
        """Adds, so that a row named twice has both gradients."""
        assert self.hidden is not None
        self.hidden.index_add_(0, self.rows.index[part], grad.to(self.hidden.dtype))

    def finish(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of what they are gradients of; None for weights whose gradient went to a place of its own."""
        if self.weight is not None and not self.started:
            self.weight.zero_()
        weight = None if self.weight is None or self.given else self.weight.to(self.dtype)
        return self.hidden, weight, None if self.bias is None or bias is None else self.bias.to(bias.dtype)
