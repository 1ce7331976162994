"""One small input per op: does a backend give what the reference gives in float64?

With gradients where they are cheap: those of the reference's heads would import torch._dynamo, which takes seconds. The
numbers are sines, so they are the same everywhere and no random state is touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_engine import ops

# float32 rounds by up to 6e-8 of a value, and no number here is made by more than 100 roundings. A wrong formula, a
# lost row or code for another machine is off by far more.
LIMIT = 1e-5
B, T, H, V = 3, 9, 8, 11

Draw = Callable[..., Tensor]
Answers = tuple[Tensor, ...]


def largest_error(op: str, backend: str, device: str) -> float:
    """Of float32 on that device, absolute below 1 and relative above."""
    truth, found = _answers(op, "reference", torch.float64, "cpu"), _answers(op, backend, torch.float32, device)
    pairs = [(x.double().cpu(), y.double()) for x, y in zip(found, truth, strict=True)]
    errors = [((x - y) / y.abs().clamp(min=1)).abs().max() for x, y in pairs]
    return float(torch.stack(errors).max())


def _answers(op: str, backend: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What the op returns, and the gradient in its first input if it has one."""
    drawn: list[Tensor] = []
    seeds = itertools.count(1)

    def draw(*shape: int) -> Tensor:
        angles = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + next(seeds)
        drawn.append(angles.sin().float().reshape(shape).to(device, dtype).requires_grad_(not drawn))
        return drawn[-1]

    with torch.enable_grad():
        answers = list(PROBES[op](draw, backend))
        carrying = [answer.sum() for answer in answers if answer.requires_grad]
        answers += torch.autograd.grad(carrying, drawn[0]) if carrying else ()
    return [answer.detach() for answer in answers]


def _mask(like: Tensor) -> Tensor:
    """Holes, padding, and all kinds of lengths."""
    position = torch.arange(B * T).reshape(B, T)
    return ((position % 5 != 3) & (position % T < torch.tensor([[T], [6], [1]]))).to(like.device)


def _targets(like: Tensor) -> Tensor:
    return (torch.arange(B * T).reshape(B, T) * 3 % V).to(like.device)


def _numbers(loss: Tensor, metrics: dict[str, Tensor]) -> Answers:
    return loss, *(metrics[name].detach() for name in sorted(metrics))


@torch.no_grad()
def _token_logprobs(draw: Draw, backend: str) -> Answers:
    logits = draw(B, T, V)
    return ops.token_logprobs(logits, _targets(logits), mask=_mask(logits), temperature=0.7, backend=backend)


@torch.no_grad()
def _linear_logprobs(draw: Draw, backend: str) -> Answers:
    hidden, weight = draw(B, T, H), draw(V, H)
    return ops.linear_logprobs(hidden, weight, _targets(hidden), mask=_mask(hidden), backend=backend)


@torch.no_grad()
def _linear_logprob_stats(draw: Draw, backend: str) -> Answers:
    hidden, weight = draw(B, T, H), draw(V, H)
    return ops.linear_logprob_stats(hidden, weight, _targets(hidden), mask=_mask(hidden), backend=backend)


@torch.no_grad()
def _linear_policy_loss(draw: Draw, backend: str) -> Answers:
    hidden, weight = draw(B, T, H), draw(V, H)
    token_loss = ops.ppo_token_loss(draw(B, T) - 2.4, draw(B, T), entropy_coef=0.1)
    targets, mask = _targets(hidden), _mask(hidden)
    return _numbers(*ops.linear_policy_loss(hidden, weight, targets, token_loss, mask=mask, backend=backend))


def _kl_estimate(draw: Draw, backend: str) -> Answers:
    return (ops.kl_estimate(draw(B, T), draw(B, T), kind="k3", backend=backend),)


def _gae(draw: Draw, backend: str) -> Answers:
    rewards, values = draw(B, T), draw(B, T)
    return ops.gae(rewards, values, _mask(values), gamma=0.9, bootstrap=draw(B), backend=backend)


def _whiten(draw: Draw, backend: str) -> Answers:
    x = draw(B, T)
    return (ops.whiten(x, _mask(x), backend=backend),)


def _kl_gae(draw: Draw, backend: str) -> Answers:
    scores, logprobs, ref_logprobs, values = draw(B), draw(B, T), draw(B, T), draw(B, T)
    mask = _mask(values)
    shaped = ops.kl_gae(scores, logprobs, ref_logprobs, values, mask, kl_coef=0.1, whiten=True, backend=backend)
    return shaped.rewards, shaped.advantages, shaped.returns, shaped.kl, shaped.value_mask


def _ppo_loss(draw: Draw, backend: str) -> Answers:
    logprobs, old_logprobs, advantages = draw(B, T), draw(B, T), draw(B, T)
    return _numbers(*ops.ppo_loss(logprobs, old_logprobs, advantages, _mask(advantages), dual_clip=3, backend=backend))


def _value_loss(draw: Draw, backend: str) -> Answers:
    values, old_values, returns = draw(B, T), draw(B, T), draw(B, T)
    return _numbers(*ops.value_loss(values, old_values, returns, _mask(values), backend=backend))


PROBES: dict[str, Callable[[Draw, str], Answers]] = {
    "token_logprobs": _token_logprobs,
    "linear_logprobs": _linear_logprobs,
    "linear_logprob_stats": _linear_logprob_stats,
    "linear_policy_loss": _linear_policy_loss,
    "kl_estimate": _kl_estimate,
    "gae": _gae,
    "whiten": _whiten,
    "kl_gae": _kl_gae,
    "ppo_loss": _ppo_loss,
    "value_loss": _value_loss,
}
