"""token_logprobs by the operators of a namespace: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.ops.head_operators import EXTRAS, SCHEMAS
from rlhf_engine.ops.rows import DEAD


class FromLogits:
    """token_logprobs by the operators of a namespace ("rlhf_engine", "rlhf_triton")."""

    def __init__(self, namespace: str) -> None:
        operators = getattr(torch.ops, namespace)
        self.fold, self.combine, self.gradient = (getattr(operators, name).default for name in SCHEMAS)

    def token_logprobs(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        temperature: float | Tensor,
        mask: Tensor | None,
        ignore_index: int,
        extras: tuple[str, ...],
        inplace_backward: bool,
    ) -> tuple[Any, ...]:
        narrow = logits.dtype is torch.float16 and logits.device.type == "cpu"
        if logits.dtype is torch.float64 or narrow:  # made for neither
            return reference.token_logprobs(
                logits, targets, temperature=temperature, mask=mask, ignore_index=ignore_index, extras=extras,
                inplace_backward=inplace_backward,
            )  # fmt: skip
        active = targets != ignore_index if mask is None else (targets != ignore_index) & mask
        y = torch.where(active, targets.long(), DEAD).reshape(-1)
        each = temperature.detach().float().reshape(-1).contiguous() if isinstance(temperature, Tensor) else None
        inverse = 1.0 if isinstance(temperature, Tensor) else 1 / temperature
        logprobs, entropy, *more = _TokenLogprobs.apply(
            _rows(logits), y, self, (None, each, None, 1.0, 0.0, inverse, 0, DEAD), bool(extras), inplace_backward
        )
        values = logprobs.view(targets.shape), entropy.view(targets.shape)
        if not extras:
            return values
        found = dict(zip(EXTRAS, more, strict=True))
        found["top1"] = found["top1"].long()
        return *values, {name: found[name].view(targets.shape) for name in extras}


def _rows(logits: Tensor) -> Tensor:
    """(rows, V) or (B, T, V) with unit last stride; views such as logits[:, :-1] are not copied."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() in (2, 3):
        return logits
    return logits.reshape(-1, logits.shape[-1])


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, operators: FromLogits, transform: tuple[Any, ...], extras: bool,
        inplace: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        parts = operators.fold(logits, targets, *transform, extras)
        statistics = operators.combine(parts, targets, 0, logits.shape[-1], DEAD)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.operators, ctx.transform, ctx.inplace, ctx.spent = operators, transform, inplace, False
        ctx.set_materialize_grads(False)
        logprobs, entropy, *more = (statistics[i].clone() for i in (0, 1, *range(6, statistics.shape[0])))
        ctx.mark_non_differentiable(*more)
        return logprobs, entropy, *more

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "token_logprobs: with inplace_backward the first backward replaced the logits by their gradient; "
                "a second one needs inplace_backward=False"
            )
        logits, targets, statistics = ctx.saved_tensors
        out = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        upstream = (None if g is None else g.float() for g in (grad_logprobs, grad_entropy))
        ctx.operators.gradient(logits, targets, statistics, *upstream, *ctx.transform, out)
        if ctx.inplace:
            ctx.spent = True
            torch.autograd.graph.increment_version(logits)  # so that who else needs them says so
        return out, *[None] * 5
