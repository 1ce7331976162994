"""The head without [rows, V] logits: log-probs, a policy loss, and the statistics that ranks with a part of the
vocabulary each merge. One class for CPUs and GPUs, over the operators of a namespace.

linear_logprobs computes its tiles' logits again in the backward: 6NHV with a frozen head, 8NHV otherwise, 6 without a
gradient of the hidden states. linear_policy_loss knows a token's gradient as soon as it knows its log-prob, so it has
the gradient before it leaves the forward: 4NHV and 6NHV. Both fold the same tiles, to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.ops.head_operators import EXTRAS, SCHEMAS, STATISTICS, TRITON_SCHEMAS
from rlhf_engine.ops.objective import Objective
from rlhf_engine.ops.products import exact
from rlhf_engine.ops.rows import DEAD, Rows, find, host_knows
from rlhf_engine.ops.tiles import SHAPES, Gradients, Head, Shape
from rlhf_engine.reference import TokenLoss

OPS = ("linear_logprobs", "linear_policy_loss", "linear_logprob_stats")

Op = TypeVar("Op", bound=Callable[..., Any])


def _narrow(method: Op) -> Op:
    """float64, and tiles of float16 on a CPU, go to the reference, which has the same signature."""
    plain = getattr(reference, method.__name__)

    @functools.wraps(method)
    def run(self: TiledHead, hidden: Tensor, *rest: Any, **options: Any) -> Any:
        half = hidden.dtype is torch.float16 and hidden.device.type == "cpu" and options["logits_dtype"] == "input"
        if hidden.dtype is torch.float64 or half:
            return plain(hidden, *rest, **options)
        return method(self, hidden, *rest, **options)

    return cast("Op", run)


class TiledHead:
    """linear_logprobs, linear_policy_loss and linear_logprob_stats by the operators of a namespace ("rlhf_engine",
    "rlhf_triton"); `shape` is for tests, None is the device's."""

    def __init__(self, namespace: str, shape: Shape | None = None) -> None:
        operators = getattr(torch.ops, namespace)
        schemas = TRITON_SCHEMAS if namespace == "rlhf_triton" else SCHEMAS
        self.call = SimpleNamespace(**{name: getattr(operators, name).default for name in schemas})
        self.shape = shape

    @_narrow
    def linear_logprobs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, extras: tuple[str, ...], **options: Any
    ) -> tuple[Any, ...]:
        head, rows = self._prepare(hidden, weight, targets, extras=bool(extras), **options)
        flat = hidden.reshape(-1, hidden.shape[-1])
        with exact(hidden.device.type):
            logprobs, entropy, *more = _Logprobs.apply(flat, weight, options["bias"], targets, head, rows)
        if not extras:
            return logprobs, entropy
        found = dict(zip(EXTRAS, more, strict=True))
        found["top1"] = found["top1"].long()
        return logprobs, entropy, {name: found[name] for name in extras}

    @_narrow
    def linear_logprob_stats(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, vocabulary_start: int, **options: Any
    ) -> tuple[Tensor, ...]:
        head, rows = self._prepare(hidden, weight, targets, rows=None, **options)
        here = rows.targets - vocabulary_start  # behind the look at ignore_index, which is one of the whole vocabulary
        rows = replace(rows, targets=torch.where(rows.targets == DEAD, DEAD, here))
        with exact(hidden.device.type), torch.no_grad():
            statistics = _fold_all(hidden.reshape(-1, hidden.shape[-1]), head, rows)
        named = dict(zip(STATISTICS, statistics, strict=False))
        found = named["maximum"], named["log_sum"].exp(), named["mean"], named["target_logit"]
        return tuple(_in_place(x, rows, targets) for x in found)

    @_narrow
    def linear_policy_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_loss: TokenLoss,
        *,
        weights: Tensor | None,
        denom: float | Tensor | None,
        grad_weight_out: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        head, rows = self._prepare(hidden, weight, targets, **options)
        objective = Objective(token_loss, rows, weights, denom)
        bias = options["bias"]
        flat = hidden.reshape(-1, hidden.shape[-1])
        with exact(hidden.device.type):
            # Inside a Function grad mode is off and needs_input_grad is set regardless, so this is asked out here.
            wanted = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
            if torch.is_grad_enabled() and (wanted or grad_weight_out is not None):
                return _PolicyLoss.apply(flat, weight, bias, head, rows, objective, grad_weight_out), objective.metrics
            with torch.no_grad():
                logprobs, entropy = _fold_all(flat, head, rows)[:2]
            return objective(logprobs, entropy, slice(0, len(rows)))

    def _prepare(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        logit_scale: float,
        mask: Tensor | None,
        ignore_index: int,
        rows: Tensor | None,
        logits_dtype: str,
        count: str,
        memory_budget: int | None,
        extras: bool = False,
    ) -> tuple[Head, Rows]:
        found = find(targets, mask, ignore_index, rows, count == "sync")
        shape = self.shape or SHAPES[hidden.device.type]
        each = temperature if isinstance(temperature, Tensor) else None
        head = Head(
            self.call, weight.detach(), None if bias is None else bias.detach().float().contiguous(),
            1.0 if isinstance(temperature, Tensor) else temperature, found.pick(each), logit_scale, softcap or 0.0,
            torch.float32 if logits_dtype == "float32" else hidden.dtype,
            shape if memory_budget is None else replace(shape, budget=int(memory_budget)), extras,  # 2e9, too
        )  # fmt: skip
        return head, found


def _fold_all(hidden: Tensor, head: Head, rows: Rows) -> Tensor:
    """Statistics (6 or 8, n)."""
    found = hidden.new_empty(8 if head.extras else 6, len(rows), dtype=torch.float32)
    for block in head.blocks(hidden, rows, keep=False):
        found[:, block.part] = block.fold(keep=False)[:, block.real]
    return found


def _in_place(x: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """(n,) -> the shape of `like`, 0 elsewhere."""
    return x.new_zeros(like.numel()).index_copy_(0, rows.index, x).view(like.shape)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, rows: Rows
    ) -> tuple[Tensor, ...]:
        statistics = _fold_all(hidden, head, rows)
        ctx.save_for_backward(hidden, weight, bias, statistics)
        # The weight alone as autograd keeps it: who shards it takes it away meanwhile, and brings it back.
        ctx.head, ctx.rows = replace(head, weight=weight.new_empty(0)), rows
        ctx.set_materialize_grads(False)
        logprobs, entropy, *more = (_in_place(x, rows, targets) for x in (*statistics[:2], *statistics[6:]))
        ctx.mark_non_differentiable(*more)
        return logprobs, entropy, *more

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, statistics = ctx.saved_tensors
        head, rows = replace(ctx.head, weight=weight), ctx.rows
        g_l, g_e = rows.pick(grad_logprobs), rows.pick(grad_entropy)
        if host_knows(hidden):  # rows without an upstream gradient cost nothing
            wanted = sum((g != 0 for g in (g_l, g_e) if g is not None), torch.zeros_like(rows.index, dtype=torch.bool))
            kept = wanted.nonzero().squeeze(1)
            g_l, g_e = (None if g is None else g[kept] for g in (g_l, g_e))
            head, rows, statistics = head.only(kept), rows.only(kept), statistics[:, kept]
        sums = Gradients(hidden, rows, head, ctx.needs_input_grad)
        with exact(hidden.device.type):
            for block in head.blocks(hidden, rows, keep=False):
                part = block.part
                upstream = (None if g is None else g[part] for g in (g_l, g_e))
                block.backward(block.padded(statistics[:, part]), *upstream, sums)
        return *sums.finish(bias), None, None, None


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, rows: Rows, objective: Objective,
        grad_weight_out: Tensor | None,
    ) -> Tensor:  # fmt: skip
        sums = Gradients(hidden, rows, head, ctx.needs_input_grad, grad_weight_out)
        found = hidden.new_empty(2, len(rows), dtype=torch.float32)
        for block in head.blocks(hidden, rows, keep=True):
            statistics = block.fold(keep=True)
            found[:, block.part] = statistics[:2, block.real]
            g_l, g_e = objective.gradients(found[0, block.part], found[1, block.part], block.part)
            block.backward(statistics, g_l, g_e, sums)
        loss, objective.metrics = objective(found[0], found[1], slice(0, len(rows)))
        ctx.gradients, ctx.head, ctx.grad_weight_out = sums.finish(bias), head, grad_weight_out
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_policy_loss: its gradient is made in the forward and handed over once; it does not know "
                "retain_graph and a second backward: call it again, or take linear_logprobs and ppo_loss"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                ctx.head.scale(gradient, upstream)
        if ctx.grad_weight_out is not None:
            _insist_on_one(ctx.head, ctx.grad_weight_out, upstream)
        return *gradients, *[None] * 4


def _insist_on_one(head: Head, sum_of_gradients: Tensor, upstream: Tensor) -> None:
    """What was added in the forward cannot be scaled any more. Never a plausible number: on a GPU it becomes NaN."""
    if head.on_gpu:
        head.scale(sum_of_gradients, torch.where(upstream == 1, 1.0, torch.nan))
    elif upstream != 1:
        raise ValueError(
            f"linear_policy_loss: grad_weight_out holds the gradient of the loss itself, and backward came with "
            f"{float(upstream):g}; call loss.backward() on it alone, and scale by denom or weights"
        )
