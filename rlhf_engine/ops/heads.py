"""Log-prob and entropy of chosen tokens, from logits or from hidden states, and a policy loss fused to the head.

    z' = softcap(logit_scale * z) / temperature,   softcap(x) = c tanh(x / c),   p = softmax(z')
    logprob = log p_y <= 0,   entropy = -sum_v p_v log p_v   in nats, of the tempered distribution

A row's bits depend on that row alone: not on the rows that share the call, their order, or whether gradients are on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rlhf_engine.ops import checks
from rlhf_engine.ops.backends import select
from rlhf_engine.ops.head_operators import EXTRAS
from rlhf_engine.ops.losses import PPOTokenLoss
from rlhf_engine.reference import TokenLoss

Op = TypeVar("Op", bound=Callable[..., Any])


def _not_compiled(op: Op) -> Op:
    """Under torch.compile the graph breaks here, and all inside runs as ever: loops over tiles would be unrolled."""

    @functools.wraps(op)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # torch._dynamo, seconds to import, is there then
            return torch._dynamo.disable(op)(*arguments, **options)
        return op(*arguments, **options)

    return cast("Op", run)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    extras: Sequence[str] = (),
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Log-prob of each target and entropy of each row; differentiable in the logits.

    Args:
        logits: (..., V) float; -inf bans a token. Scaling happens after the upcast to float32. Views with unit last
            stride, such as logits[:, :-1], are not copied.
        targets: (...) int32 or int64 in [0, V).
        temperature: > 0; divides the logits. A number, or one for each row (...).
        mask: (...) bool; False rows give 0 and no gradient, whatever they hold.
        ignore_index: targets of this value are masked too.
        extras: of "top1", the likeliest token (...) int64, the first if several are; "sum_p_squared", sum_v p_v^2 (...)
            float32. No gradient flows through them.
        inplace_backward: the backward writes the gradient over the logits, where nothing else needs them any more.
        backend: None, or a name (see `available`).

    Returns:
        logprobs, entropy: (...) float32 (float64 for float64 logits), nats. A row with a NaN, or of -inf only, is NaN.
        With extras, a dict of them follows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on CPU, an unmasked target outside [0, V), or a
            temperature that is not positive (on CUDA: NaN).
        RuntimeError: a second backward after one in place.
    """
    op = "token_logprobs"
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"{op}: targets {checks.shape(targets)} does not match logits {checks.shape(logits)}")
    checks.floating(op, logits=logits)
    checks.same_device(op, {"logits": logits}, targets=targets)
    checks.like(op, {"targets": targets}, mask=mask)
    checks.temperature(op, temperature, targets, mask, ignore_index)
    checks.targets(op, targets, mask, ignore_index, logits.shape[-1])
    if inplace_backward and any(n > 1 and not s for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"{op}: rows of expanded logits share memory, so inplace_backward has no place for each")
    checks.each_of(op, "extras", extras, EXTRAS)
    return select(op, backend, logits.device.type)(
        logits, targets, temperature=temperature, mask=mask, ignore_index=ignore_index, extras=tuple(extras),
        inplace_backward=inplace_backward,
    )  # fmt: skip


@_not_compiled
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    extras: Sequence[str] = (),
    logits_dtype: str = "float32",
    count: str = "device",
    memory_budget: int | None = None,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """token_logprobs of hidden @ weight^T + bias without those logits: bounded tiles of them exist at a time, in
    forward and backward, and masked rows cost nothing. Differentiable in hidden, weight and bias; autocast is ignored.

    Matrix products of 2NHV operations forward, for N rows that count: 8 with the backward, 6 with a frozen head, or
    with hidden states that need no gradient. On CPUs rows without an upstream gradient cost nothing in the backward.

    Args:
        hidden: (..., H) float.
        weight: (V, H), dtype of hidden.
        targets: (...) int32 or int64 in [0, V).
        bias: (V,), dtype of hidden.
        temperature: > 0; a number, or one for each row (...).
        softcap: > 0 or None; c of the tanh that bounds logits (Gemma 2, arXiv:2408.00118). -inf stays -inf.
        logit_scale: > 0; factor on the logits before softcap (Cohere).
        mask: (...) bool, on the device of hidden or on the CPU; see token_logprobs, as for ignore_index, extras,
            backend, what is returned and raised.
        ignore_index: targets of this value are masked too.
        rows: (n,) int64, the rows to score, each once, where they are known (mask and ignore_index are then not looked
            at). The others give 0.
        logits_dtype: "float32", or "input": tiles of logits are rounded to the dtype of hidden, but for the target's
            own. That is faster where products of that dtype are, and its gradient is rounded alike.
        count: what to do about a mask on a GPU. "device": never wait; all rows go through the matrix products.
            "sync": wait once for the number of rows, and do the work of those alone. With `rows`, or a mask on the
            CPU, the number is known.
        memory_budget: bytes of logits that may live at once; None is 128 MB on a CPU and 1.3 GB on a GPU. It changes no
            bit of the results. One tile of rows always lives: 64 rows on a CPU, 1,024 on a GPU.
    """
    op = "linear_logprobs"
    _check_linear(op, hidden, weight, targets, bias, softcap, logit_scale, mask)
    _check_rows(op, weight, targets, mask, ignore_index, rows)
    checks.temperature(op, temperature, targets, mask, ignore_index, rows)
    _check_tiles(op, logits_dtype, count, memory_budget)
    checks.each_of(op, "extras", extras, EXTRAS)
    return select(op, backend, hidden.device.type)(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        mask=mask, ignore_index=ignore_index, rows=rows, extras=tuple(extras),
        logits_dtype=logits_dtype, count=count, memory_budget=memory_budget,
    )  # fmt: skip


@_not_compiled
def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary_start: int = 0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    logits_dtype: str = "float32",
    count: str = "device",
    memory_budget: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a part of the vocabulary contributes: ranks that hold V tokens each merge it (`merge_logprob_stats`).

    With z' as in linear_logprobs: m = max z', s = sum exp(z' - m), mu = sum exp(z' - m) (z' - m) / s.

    Args:
        weight: (V, H), of tokens [vocabulary_start, vocabulary_start + V).
        targets: (...) int32 or int64, in the whole vocabulary.
        vocabulary_start: the first of these tokens.
        hidden, bias, temperature, softcap, logit_scale, mask, ignore_index: see linear_logprobs, as for logits_dtype,
            count, memory_budget, backend.

    Returns:
        m, s, mu, z_y: (...) float32 each (float64 for float64); z_y is the target's z', -inf on ranks that do not have
        it. Rows that do not count give 0.

    Raises:
        ValueError: as linear_logprobs; where a gradient would be lost, since none flows through.
    """
    op = "linear_logprob_stats"
    _check_linear(op, hidden, weight, targets, bias, softcap, logit_scale, mask)
    checks.integers(op, targets)
    checks.temperature(op, temperature, targets, mask, ignore_index)
    _check_tiles(op, logits_dtype, count, memory_budget)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: no gradient flows to {name}; call it under torch.no_grad()")
    return select(op, backend, hidden.device.type)(
        hidden, weight, targets, vocabulary_start=vocabulary_start, bias=bias, temperature=temperature,
        softcap=softcap, logit_scale=logit_scale, mask=mask, ignore_index=ignore_index,
        logits_dtype=logits_dtype, count=count, memory_budget=memory_budget,
    )  # fmt: skip


@_not_compiled
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    denom: float | Tensor | None = None,
    grad_weight_out: Tensor | None = None,
    logits_dtype: str = "float32",
    count: str = "device",
    memory_budget: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A policy loss straight from hidden states: sum(weights * token losses) / denom, and its metrics.

    A token's gradient is known as soon as its log-prob is, so it is made in the forward, and nothing is computed twice:
    6NHV operations in matrix products, 4 with a frozen head, 2 without gradients. It is rounded to the inputs' dtype
    before backward brings a factor, so in float16 scale by denom. It is handed over once: a second backward, as with
    retain_graph, raises. Inside a checkpointed region the forward, and all this with it, runs twice.
    Under torch.compile the graph breaks around it.

    Args:
        token_loss: token_loss(logprobs (n,), entropy (n,), rows (n,)) -> loss (n,), or (loss, {name: (n,) metric}):
            any token-separable objective, e.g. `ppo_token_loss`; called once per block of rows and once for all. rows
            index the flattened targets. A metric is averaged over tokens, or maximised if "_max" is in its name.
        weights: shaped like targets (see token_weights); None is 1.
        denom: the global count, known before the forward; None is this call's number of tokens.
        grad_weight_out: (V, H) float32, contiguous. The gradient in the weight is added to it, in the forward, and
            weight.grad stays as it is: over micro-batches that keeps float32 where weight.grad would be rounded each
            time. backward must then come to this loss with 1: scale by denom or weights, not afterwards. Not in a
            checkpointed region, which would add it twice (use_reentrant=False).
        hidden, weight, targets, bias, temperature, softcap, logit_scale, mask, ignore_index, rows, logits_dtype, count,
            memory_budget, backend: see linear_logprobs.

    Returns:
        loss: 0-d, float32 or better. metrics: 0-d sums, counts and maxima for merge_metrics and finalize_metrics.

    Raises:
        ValueError: as linear_logprobs; weights without denom; in token_loss another tensor that requires grad, or
            tensors of a ppo_token_loss that are not shaped like targets; another shape than (n,) from it; on CPU, a
            backward with other than 1 where grad_weight_out is given (on CUDA it becomes NaN).
        RuntimeError: a second backward.
    """
    op = "linear_policy_loss"
    _check_linear(op, hidden, weight, targets, bias, softcap, logit_scale, mask)
    _check_rows(op, weight, targets, mask, ignore_index, rows)
    checks.temperature(op, temperature, targets, mask, ignore_index, rows)
    _check_tiles(op, logits_dtype, count, memory_budget)
    checks.constants(op, {"targets": targets}, weights=weights)
    checks.denominator(op, {"targets": targets}, weights, denom)
    if isinstance(token_loss, PPOTokenLoss):
        checks.like(op, {"targets": targets}, old_logprobs=token_loss.old_logprobs)
    if grad_weight_out is not None:
        checks.output(op, {"weight": weight}, {"hidden": hidden, "weight": weight}, grad_weight_out=grad_weight_out)
        if torch.is_grad_enabled() and _runs_twice():
            raise ValueError(f"{op}: a checkpointed region would add to grad_weight_out twice; leave the loss outside")
    return select(op, backend, hidden.device.type)(
        hidden, weight, targets, token_loss, bias=bias, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale, mask=mask, ignore_index=ignore_index, rows=rows, weights=weights, denom=denom,
        grad_weight_out=grad_weight_out,
        logits_dtype=logits_dtype, count=count, memory_budget=memory_budget,
    )  # fmt: skip


def _runs_twice() -> bool:
    """In torch.utils.checkpoint with use_reentrant=False; the other kind runs first without gradients."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _check_tiles(op: str, logits_dtype: str, count: str, memory_budget: int | None) -> None:
    checks.one_of(op, "logits_dtype", logits_dtype, ("float32", "input"))
    checks.one_of(op, "count", count, ("device", "sync"))
    checks.positive(op, memory_budget=memory_budget)


def _check_rows(
    op: str, weight: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int, rows: Tensor | None
) -> None:
    if rows is None:
        checks.targets(op, targets, mask, ignore_index, weight.shape[0])
        return
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"{op}: rows must be (n,) int64, got {checks.shape(rows)} {rows.dtype}")
    checks.same_device(op, {"targets": targets}, rows=rows)
    if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < targets.numel():
        raise ValueError(f"{op}: rows must be in [0, {targets.numel()}), got {int(rows.min())} to {int(rows.max())}")
    checks.targets(op, targets.reshape(-1)[rows], None, None, weight.shape[0])


def _check_linear(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
) -> None:
    if hidden.dim() == 0 or targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{op}: targets {checks.shape(targets)} does not match hidden {checks.shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{op}: weight {checks.shape(weight)} does not match hidden {checks.shape(hidden)}")
    if not weight.numel():
        raise ValueError(f"{op}: weight {checks.shape(weight)} is empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {checks.shape(bias)} does not match weight {checks.shape(weight)}")
    checks.floating(op, hidden=hidden)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype}, hidden {hidden.dtype}; cast one of them")
    checks.same_device(op, {"hidden": hidden}, weight=weight, targets=targets, bias=bias)
    checks.mask(op, targets, mask)
    checks.positive(op, softcap=softcap, logit_scale=logit_scale)
