"""The fast backends: what their operators expect, made of what the front door was given.

One class serves both sets of operators, C++ and Triton. float64 goes to the reference, which is made for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.ops.operators import POLICY_METRICS, SCHEMAS, VALUE_METRICS, WithGradient
from rlhf_engine.reference import Bounds, ShapedAdvantages

KINDS = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
OPS = ("kl_estimate", "gae", "whiten", "kl_gae", "ppo_loss", "value_loss")

Op = TypeVar("Op", bound=Callable[..., Any])
_BelowAutograd = torch._C._AutoDispatchBelowAutograd  # where torch.library calls operators, too


def _float32(method: Op) -> Op:
    """float64 tensors go to the reference, which has the same signature."""
    plain = getattr(reference, method.__name__)

    @functools.wraps(method)
    def run(self: Adaptors, *tensors: Tensor, **options: Any) -> Any:
        for x in (*tensors, options.get("entropy"), options.get("ref_logprobs")):
            if x is not None and x.dtype is torch.float64:
                return plain(*tensors, **options)
        return method(self, *tensors, **options)

    return cast("Op", run)


class Adaptors:
    """The ops of a namespace of operators ("rlhf_engine", "rlhf_triton"), with the signatures of the reference."""

    def __init__(self, namespace: str) -> None:
        operators = getattr(torch.ops, namespace)
        try:
            self.call = SimpleNamespace(**{name: getattr(operators, name).default for name in SCHEMAS})
        except AttributeError as error:  # as after an update of the sources alone
            raise ImportError(
                f"rlhf_engine/_C.so is of another version than the package: {error}; build it again with `make setup`, "
                "or `pip install --no-build-isolation -e .`"
            ) from error

    @_float32
    def kl_estimate(
        self, logprobs: Tensor, ref_logprobs: Tensor, *, kind: str, clamp_diff: Bounds, clamp_value: Bounds
    ) -> Tensor:
        wanted = torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)
        p, q = _dense(logprobs), _dense(ref_logprobs)
        arguments = (p, q, *_kind(kind), *_bounds(clamp_diff), *_bounds(clamp_value), wanted)
        if torch.compiler.is_compiling():  # it sees through registered operators only
            return self.call.kl_estimate(*arguments)[0]
        _refuse_transforms("kl_estimate")
        with _BelowAutograd():
            value, derivative = self.call.kl_estimate(*arguments)
            gradients = (derivative, -derivative) if ref_logprobs.requires_grad else (derivative,)
        return WithGradient.apply((value, gradients), *(p, q)[: len(gradients)]) if wanted else value

    @_float32
    def gae(
        self,
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
            _constant(rewards), _constant(values), _dense(mask), each, value_each, _optional(bootstrap),
            _offsets(cu_seqlens), gamma, number, value_number, value_lam is not None, holes == "decay",
        )  # fmt: skip
        if out is None:
            return self.call.gae(*arguments)
        self.call.gae_out(*arguments, *out)
        _written(*out)
        return out

    @_float32
    def whiten(
        self,
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
        arguments = (_constant(x), _dense(mask), ddof, eps, eps_mode == "add", center, zero_masked)
        if out is None:
            return self.call.whiten(*arguments)
        self.call.whiten_out(*arguments, out)
        _written(out)
        return out

    @_float32
    def kl_gae(
        self,
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
        out: ShapedAdvantages | None,
    ) -> ShapedAdvantages:
        each, number = _lambda(lam)
        arguments = (
            _constant(scores), _constant(logprobs), _constant(ref_logprobs), _constant(values), _dense(mask), each,
            _optional(bootstrap), _offsets(cu_seqlens), _kind(kl_kind)[0], *_bounds(kl_clamp_diff),
            *_bounds(kl_clamp_value), kl_coef, score_clip or math.inf, score_at == "after", gamma, number,
            holes == "decay", whiten,
        )  # fmt: skip
        if out is None:
            return ShapedAdvantages(*self.call.kl_gae(*arguments))
        self.call.kl_gae_out(*arguments, *out.tensors())
        _written(*out.tensors())
        return out

    @_float32
    def ppo_loss(
        self,
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
        p, h = _dense(logprobs), None if entropy is None else _dense(entropy)
        loss, metrics = _loss(
            self.call.ppo_loss, (p,) if h is None else (p, h), wanted,
            p, _constant(old_logprobs), _constant(advantages), _dense(mask), _optional(is_weights), h,
            _optional(ref_logprobs) if kl_coef else None, _optional(weights), *_denom(denom), clip_low, clip_high,
            math.inf if dual_clip is None else dual_clip, entropy_coef, kl_coef, *_kind(kl_kind), wanted,
        )  # fmt: skip
        named = dict(zip(POLICY_METRICS, metrics.unbind(), strict=True))
        if entropy is None:
            del named["entropy_sum"]
        return loss, named

    @_float32
    def value_loss(
        self,
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
        v = _dense(values)
        loss, metrics = _loss(
            self.call.value_loss, (v,), wanted,
            v, _constant(old_values), _constant(returns), _dense(mask), _optional(weights), *_denom(denom),
            clip or math.inf, wanted,
        )  # fmt: skip
        return loss, dict(zip(VALUE_METRICS, metrics.unbind(), strict=True))


def _loss(operator: Any, inputs: tuple[Tensor, ...], wanted: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and metrics of an operator that returns (loss, a gradient for each of the inputs, ..., metrics)."""
    if torch.compiler.is_compiling():
        loss, *_, metrics = operator(*arguments)
        return loss, metrics.detach()
    _refuse_transforms(operator.name().split("::")[1])
    with _BelowAutograd():
        loss, *gradients, metrics = operator(*arguments)
    return WithGradient.apply((loss, gradients[: len(inputs)]), *inputs) if wanted else loss, metrics


def _refuse_transforms(op: str) -> None:
    """Below autograd they would lose the derivative without a word."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{op}: this backend knows neither torch.func nor forward-mode derivatives; pass backend='reference'"
        )


def _written(*tensors: Tensor) -> None:
    """So that a backward which still needs what stood there says so."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _dense(x: Tensor) -> Tensor:
    """Contiguous, and float32 unless it is a mask."""
    if x.dtype is not torch.float32 and x.dtype is not torch.bool:
        x = x.float()
    return x if x.is_contiguous() else x.contiguous()


def _constant(x: Tensor) -> Tensor:
    return _dense(x.detach() if x.requires_grad else x)


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
