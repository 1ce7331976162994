"""The backends in C++ ("cpu", and "cuda" where it was built): what the operators of _C expect, and their gradients.

The operators take contiguous float32, bool masks and int64 offsets. float64 is what the reference is for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rlhf_engine import native, reference
from rlhf_engine.reference import Bounds, ShapedAdvantages

KINDS = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
POLICY_METRICS = (
    "policy_tokens", "clip_fraction_sum", "clip_fraction_low_sum", "approx_kl_k1_sum", "approx_kl_k3_sum",
    "ratio_mean_sum", "log_ratio_max_abs", "entropy_sum",
)  # fmt: skip
VALUE_METRICS = (
    "value_tokens", "value_mean_sum", "value_clip_fraction_sum", "value_return_sum", "value_return_square_sum",
    "value_error_sum", "value_error_square_sum",
)  # fmt: skip
OPS = ("kl_estimate", "gae", "whiten", "kl_gae", "ppo_loss", "value_loss")

_ops = torch.ops.rlhf_engine
Op = TypeVar("Op", bound=Callable[..., Any])


def _float32(function: Op) -> Op:
    """float64 tensors go to the reference, which has the same signature."""
    plain = getattr(reference, function.__name__)

    @functools.wraps(function)
    def run(*tensors: Tensor, **options: Any) -> Any:
        float_options = (options.get("entropy"), options.get("ref_logprobs"))
        double = any(x is not None and x.dtype == torch.float64 for x in (*tensors, *float_options))
        return (plain if double else function)(*tensors, **options)

    return cast("Op", run)


@_float32
def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, kind: str, clamp_diff: Bounds, clamp_value: Bounds
) -> Tensor:
    wanted = torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)
    bounds = (*_bounds(clamp_diff), *_bounds(clamp_value))
    return _ops.kl_estimate(_dense(logprobs), _dense(ref_logprobs), *_kind(kind), *bounds, wanted)[0]


@_float32
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    value_lam: float | Tensor | None,
    holes: str,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    each, number = _lambda(lam)
    value_each, value_number = _lambda(lam if value_lam is None else value_lam)
    arguments = (
        _constant(rewards), _constant(values), mask.contiguous(), each, value_each, _optional(bootstrap),
        _offsets(cu_seqlens), gamma, number, value_number, value_lam is not None, holes == "decay",
    )  # fmt: skip
    if out is None:
        return _ops.gae(*arguments)
    _ops.gae_out(*arguments, *out)
    return out


@_float32
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    center: bool,
    ddof: int,
    eps: float,
    eps_mode: str,
    zero_masked: bool,
    out: Tensor | None,
) -> Tensor:
    arguments = (_constant(x), mask.contiguous(), ddof, eps, eps_mode == "add", center, zero_masked)
    if out is None:
        return _ops.whiten(*arguments)
    _ops.whiten_out(*arguments, out)
    return out


@_float32
def kl_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_kind: str,
    kl_clamp_diff: Bounds,
    kl_clamp_value: Bounds,
    gamma: float,
    lam: float | Tensor,
    whiten: bool,
    score_at: str,
    score_clip: float | None,
    holes: str,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> ShapedAdvantages:
    each, number = _lambda(lam)
    return ShapedAdvantages(
        *_ops.kl_gae(
            _constant(scores), _constant(logprobs), _constant(ref_logprobs), _constant(values), mask.contiguous(),
            each, _optional(bootstrap), _offsets(cu_seqlens), _kind(kl_kind)[0], *_bounds(kl_clamp_diff),
            *_bounds(kl_clamp_value), kl_coef, score_clip or math.inf, score_at == "after", gamma, number,
            holes == "decay", whiten,
        )
    )  # fmt: skip


@_float32
def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    is_weights: Tensor | None,
    entropy: Tensor | None,
    entropy_coef: float,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    weights: Tensor | None,
    denom: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = torch.is_grad_enabled() and (logprobs.requires_grad or (entropy is not None and entropy.requires_grad))
    loss, _, _, metrics = _ops.ppo_loss(
        _dense(logprobs), _constant(old_logprobs), _constant(advantages), mask.contiguous(), _optional(is_weights),
        None if entropy is None else _dense(entropy), _optional(ref_logprobs), _optional(weights), *_denom(denom),
        clip_low, clip_high, math.inf if dual_clip is None else dual_clip, entropy_coef, kl_coef, *_kind(kl_kind),
        wanted,
    )  # fmt: skip
    named = dict(zip(POLICY_METRICS, metrics.detach().unbind(), strict=True))
    if entropy is None:
        del named["entropy_sum"]
    return loss, named


@_float32
def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    weights: Tensor | None,
    denom: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = torch.is_grad_enabled() and values.requires_grad
    loss, _, metrics = _ops.value_loss(
        _dense(values), _constant(old_values), _constant(returns), mask.contiguous(), _optional(weights),
        *_denom(denom), clip or math.inf, wanted,
    )  # fmt: skip
    return loss, dict(zip(VALUE_METRICS, metrics.detach().unbind(), strict=True))


def _dense(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _constant(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _constant(x)


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.long().contiguous()


def _lambda(lam: float | Tensor) -> tuple[Tensor | None, float]:
    return (lam.detach().double().contiguous(), 0.0) if isinstance(lam, Tensor) else (None, lam)


def _kind(kind: str) -> tuple[int, bool]:
    return KINDS[kind.removesuffix("+")], kind.endswith("+")


def _bounds(bounds: Bounds) -> tuple[float, float]:
    if bounds is None:
        return -math.inf, math.inf
    low, high = bounds if isinstance(bounds, tuple) else (-bounds, bounds)
    return -math.inf if low is None else low, math.inf if high is None else high


def _denom(denom: float | Tensor | None) -> tuple[Tensor | None, float]:
    """(tensor, number); a negative number stands for this call's tokens."""
    if isinstance(denom, Tensor):
        return denom.detach().float(), -1.0
    return None, -1.0 if denom is None else float(denom)


def _register() -> None:
    """Shapes for tracing, and gradients, of the operators in _C."""

    def like(*names: str) -> Any:
        def fake(*arguments: Any) -> Any:
            return tuple(torch.empty_like(arguments[0]) for _ in names)

        return fake

    torch.library.register_fake("rlhf_engine::gae", like("advantages", "returns"))
    torch.library.register_fake("rlhf_engine::gae_out", lambda *arguments: None)
    torch.library.register_fake("rlhf_engine::whiten", lambda x, *_: torch.empty_like(x))
    torch.library.register_fake("rlhf_engine::whiten_out", lambda *arguments: None)
    torch.library.register_fake("rlhf_engine::kl_gae", _kl_gae_fake)
    for name, fake, save, backward in (
        ("kl_estimate", _kl_estimate_fake, _save_one, _kl_estimate_backward),
        ("ppo_loss", _ppo_loss_fake, _save_two, _ppo_loss_backward),
        ("value_loss", _value_loss_fake, _save_one, _value_loss_backward),
    ):
        torch.library.register_fake(f"rlhf_engine::{name}", fake)
        torch.library.register_autograd(f"rlhf_engine::{name}", backward, setup_context=save)


def _kl_gae_fake(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(torch.empty_like(logprobs) for _ in range(4)), torch.empty_like(logprobs, dtype=torch.bool)


def _kl_estimate_fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logprobs), _gradient(logprobs, rest[-1])


def _ppo_loss_fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy, wanted = rest[4], rest[-1]
    metrics = logprobs.new_empty(len(POLICY_METRICS), dtype=torch.float64)
    return (
        logprobs.new_empty(()),
        _gradient(logprobs, wanted),
        _gradient(logprobs, wanted and entropy is not None),
        metrics,
    )


def _value_loss_fake(values: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return values.new_empty(()), _gradient(values, rest[-1]), values.new_empty(len(VALUE_METRICS), dtype=torch.float64)


def _gradient(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(x) if wanted else x.new_empty(0)


def _save_one(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _save_two(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.inputs, ctx.has_entropy = len(inputs), inputs[5] is not None
    ctx.set_materialize_grads(False)


def _kl_estimate_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (derivative,) = ctx.saved_tensors
    gradient = None if upstream is None else upstream * derivative
    return gradient, None if gradient is None else -gradient, *[None] * (ctx.inputs - 2)


def _ppo_loss_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.inputs
    logprobs, entropy = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.inputs
    gradients[0] = upstream * logprobs
    gradients[5] = upstream * entropy if ctx.has_entropy else None
    return tuple(gradients)


def _value_loss_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None if upstream is None else upstream * gradient, *[None] * (ctx.inputs - 1)


AVAILABLE = native.load()
if AVAILABLE:
    _register()
