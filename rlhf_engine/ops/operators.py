"""The operators behind the fast backends, whatever they are written in: their schemas, shapes for tracing, gradients.

The same operators exist twice: as rlhf_engine::* in C++ (CPU, and CUDA where nvcc built it; csrc/operators.h defines
them) and as rlhf_triton::* (defined here, kernels/ runs them). They take contiguous float32, bool masks and int64
offsets; `adaptors` makes those of what the front door was given.

A loss finds its gradient in the forward, if the last argument asks for it, so a backward is one product.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.ops.head_operators import TRITON_SCHEMAS

_GAE = (
    "Tensor rewards, Tensor values, Tensor mask, Tensor? lam, Tensor? value_lam, Tensor? bootstrap, "
    "Tensor? cu_seqlens, float gamma, float lam_all, float value_lam_all, bool two_lambdas, bool decay"
)
_WHITEN = "Tensor x, Tensor mask, int ddof, float eps, bool add_eps, bool center, bool zero_masked"
_BOUNDS = "float diff_low, float diff_high, float value_low, float value_high"
_KL_GAE = (
    "Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, Tensor? lam, Tensor? bootstrap, "
    f"Tensor? cu_seqlens, int kl_kind, {_BOUNDS}, float kl_coef, float score_bound, bool after, float gamma, "
    "float lam_all, bool decay, bool whiten"
)
# Operator -> (file in kernels/ that holds its twin, arguments and results). An unwanted gradient is an empty tensor.
SCHEMAS = {
    "gae": ("gae", f"({_GAE}) -> (Tensor, Tensor)"),
    "gae_out": ("gae", f"({_GAE}, Tensor(a!) advantages, Tensor(b!) returns) -> ()"),
    "kl_gae": (
        "kl_gae",
        f"({_KL_GAE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "kl_gae_out": (
        "kl_gae",
        f"({_KL_GAE}, Tensor(a!) rewards, Tensor(b!) advantages, Tensor(c!) returns, Tensor(d!) kl, "
        "Tensor(e!) value_mask) -> ()",
    ),
    "whiten": ("whiten", f"({_WHITEN}) -> Tensor"),
    "whiten_out": ("whiten", f"({_WHITEN}, Tensor(a!) out) -> ()"),
    "kl_estimate": (
        "kl",
        f"(Tensor logprobs, Tensor ref_logprobs, int kind, bool straight_through, {_BOUNDS}, bool with_derivative) "
        "-> (Tensor, Tensor)",
    ),
    "ppo_loss": (
        "losses",
        "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? is_weights, Tensor? entropy, "
        "Tensor? ref_logprobs, Tensor? weights, Tensor? denom, float denom_number, float clip_low, float clip_high, "
        "float dual_clip, float entropy_coef, float kl_coef, int kl_kind, bool straight_through, bool with_gradient) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    ),
    "value_loss": (
        "losses",
        "(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? weights, Tensor? denom, "
        "float denom_number, float bound, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    ),
}
# What stands in the metrics of the losses, in order.
POLICY_METRICS = (
    "policy_tokens", "clip_fraction_sum", "clip_fraction_low_sum", "approx_kl_k1_sum", "approx_kl_k3_sum",
    "ratio_mean_sum", "log_ratio_max_abs", "entropy_sum",
)  # fmt: skip
VALUE_METRICS = (
    "value_tokens", "value_mean_sum", "value_clip_fraction_sum", "value_return_sum", "value_return_square_sum",
    "value_error_sum", "value_error_square_sum",
)  # fmt: skip


def define_triton() -> torch.library.Library:
    """rlhf_triton::*; the kernels are imported, and triton with them, when one is first called."""
    library = torch.library.Library("rlhf_triton", "DEF")
    head = {name: ("head", schema) for name, schema in TRITON_SCHEMAS.items()}
    for name, (module, schema) in (SCHEMAS | head).items():
        library.define(name + schema)
        for key in ("CUDA", "CPU"):  # on a CPU only Triton's interpreter runs them
            library.impl(name, _kernel(module, name), key)
    return library


def _kernel(module: str, name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"rlhf_engine.kernels.{module}"), name)(*arguments)

    return run


def register(namespace: str) -> None:
    """Tells torch.compile and autograd about the operators of a namespace."""
    fakes: dict[str, Callable[..., Any]] = {
        "gae": lambda rewards, *_: (torch.empty_like(rewards), torch.empty_like(rewards)),
        "gae_out": lambda *_: None,
        "kl_gae": _kl_gae_fake,
        "kl_gae_out": lambda *_: None,
        "whiten": lambda x, *_: torch.empty_like(x),
        "whiten_out": lambda *_: None,
        "kl_estimate": lambda logprobs, *rest: (torch.empty_like(logprobs), _gradient(logprobs, rest[-1])),
        "ppo_loss": _ppo_loss_fake,
        "value_loss": _value_loss_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    for name, save, backward in (
        ("kl_estimate", _save_one, _kl_estimate_backward),
        ("ppo_loss", _save_two, _ppo_loss_backward),
        ("value_loss", _save_one, _value_loss_backward),
    ):
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=save)


def _kl_gae_fake(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(torch.empty_like(logprobs) for _ in range(4)), torch.empty_like(logprobs, dtype=torch.bool)


def _ppo_loss_fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    entropy, wanted = rest[4], rest[-1]
    return (
        logprobs.new_empty(()),
        _gradient(logprobs, wanted),
        _gradient(logprobs, wanted and entropy is not None),
        logprobs.new_empty(len(POLICY_METRICS), dtype=torch.float64),
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


class WithGradient(torch.autograd.Function):
    """(value, gradients), found, as a function of the inputs: in eager mode a tenth of what a registered autograd
    formula costs, and the same bits."""

    @staticmethod
    def forward(ctx: Any, found: tuple[Tensor, tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        value, gradients = found
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        return None, *[_scaled(upstream, g) if w else None for g, w in zip(ctx.saved_tensors, wanted, strict=True)]


def _scaled(upstream: Tensor, gradient: Tensor) -> Tensor:
    """Their product; without a pass over the gradient where a look at `upstream` costs nothing and it is 1."""
    if type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.numel() == 1 and upstream.item() == 1:
        return gradient
    return upstream * gradient
