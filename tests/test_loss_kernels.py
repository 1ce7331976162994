"""kernels/kl.py, gae.py, whiten.py and losses.py against the reference, without a GPU; kernel_script.py says how.

They are called as the operators of csrc/operators.h are. In the interpreter a scan takes 0.1 ms an element, so most
cases run with small tiles: these are constants of a module, so results still have the same bits however they are found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import product
from math import inf, prod
from types import ModuleType
from typing import Any

import kernel_script
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_engine import reference

TILE, BLOCK, PROGRAMS = 8, 32, 2  # small ones
KINDS = ("k1", "abs", "k2", "k3")
OPEN = (-inf, inf, -inf, inf)
POLICY_METRICS = (
    "policy_tokens", "clip_fraction_sum", "clip_fraction_low_sum", "approx_kl_k1_sum", "approx_kl_k3_sum",
    "ratio_mean_sum", "log_ratio_max_abs", "entropy_sum",
)  # fmt: skip
VALUE_METRICS = (
    "value_tokens", "value_mean_sum", "value_clip_fraction_sum", "value_return_sum", "value_return_square_sum",
    "value_error_sum", "value_error_square_sum",
)  # fmt: skip


def modules(small: bool = True) -> tuple[ModuleType, ...]:
    """(kl, gae, whiten, losses), with small tiles unless told: several of them, and several rounds of the programs."""
    from rlhf_engine.kernels import gae, kl, losses, whiten

    for module, name, size in (
        (gae, "TILE", TILE), (kl, "BLOCK", BLOCK), (whiten, "BLOCK", BLOCK), (losses, "BLOCK", BLOCK),
        (whiten, "MOST_PARTS", PROGRAMS), (losses, "MOST_PROGRAMS", PROGRAMS),
    ):  # fmt: skip
        real = REAL.setdefault((module.__name__, name), getattr(module, name))
        setattr(module, name, size if small else real)
    return kl, gae, whiten, losses


def kl_gae(*arguments: Any) -> tuple[Tensor, ...]:
    from rlhf_engine.kernels.kl_gae import kl_gae as kernel

    return kernel(*arguments)


REAL: dict[tuple[str, str], int] = {}


def batch(count: int, length: int, keep: float = 0.7, ragged: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(8, count, length) random numbers, (3, count) ones in [0, 1), mask."""
    lengths = torch.randint(length // 2, length + 1, (count, 1)) if ragged else length
    mask = (torch.rand(count, length) < keep) & (torch.arange(length) < lengths)
    return torch.randn(8, count, length), torch.rand(3, count), mask


def close(what: str, ours: Tensor, exact: Tensor, float32: Tensor) -> None:
    """Free are a few roundings of the largest number: sums are made in another order than the reference's."""
    exact = exact.double()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    kernel_script.check_close(what, ours, exact, float32, 8 * 2.0**-24 * max(1.0, largest))


def all_close(names: str, ours: tuple[Tensor, ...], find: Callable[[torch.dtype], tuple[Tensor, ...]]) -> None:
    """`find`: the same by the reference, in a precision."""
    for name, a, b, c in zip(names.split(), ours, find(torch.float64), find(torch.float32), strict=True):
        close(name, a, b, c)


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"output {number}"


def case_kl(kind: str, straight_through: bool) -> None:
    kl, *_ = modules()
    number, name = KINDS.index(kind), kind + "+" * straight_through
    for size, bounds in product((0, 1, BLOCK + 1), (OPEN, (-0.5, 1.0, -inf, inf), (-2.0, inf, -0.25, 0.75))):
        new, ref = torch.randn(2, size)
        ours = kl.kl_estimate(new, ref, number, straight_through, *bounds, True)

        def find(dtype: torch.dtype, new: Tensor = new, ref: Tensor = ref, bounds: Any = bounds) -> tuple[Tensor, ...]:
            leaf = new.to(dtype, copy=True).requires_grad_()
            value = reference.kl_estimate(leaf, ref.to(dtype), kind=name, clamp_diff=bounds[:2], clamp_value=bounds[2:])
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        all_close("value derivative", ours, find)
        value, nothing = kl.kl_estimate(new, ref, number, straight_through, *bounds, False)
        assert torch.equal(value, ours[0]) and nothing.shape == (0,)


def case_k3_near_zero() -> None:
    """Accurate to a few ulp of itself down to d^2 = 1e-14, where exp(-d) - 1 + d has no right digit."""
    kl, *_ = modules()
    d = torch.cat([sign * 10 ** torch.linspace(-7, 1, 30) for sign in (-1, 1)] + [torch.zeros(1)])
    value, _ = kl.kl_estimate(d, torch.zeros_like(d), 3, False, *OPEN, False)
    exact = torch.expm1(-d.double()) + d.double()
    assert (value >= 0).all() and value[-1] == 0
    assert ((value - exact).abs() <= 1e-6 * exact).all()  # exp and two additions where |d| >= 0.5


def case_gae(decay: bool, count: int, length: int, keep: float) -> None:
    _, gae, *_ = modules()
    (rewards, values, *_), (lam, value_lam, bootstrap), mask = batch(count, length, keep)
    variants: tuple[tuple[Tensor | None, Tensor | None, Tensor | None, bool], ...] = (
        (None, None, None, False),
        (None, None, bootstrap, True),
        (lam.double(), value_lam.double(), bootstrap, True),
    )
    for each, value_each, last, two in variants:
        ours = gae.gae(rewards, values, mask, each, value_each, last, None, 0.97, 0.9, 0.6, two, decay)

        def find(dtype: torch.dtype, each: Any = each, value_each: Any = value_each, last: Any = last, two: bool = two):
            return reference.gae(
                rewards.to(dtype), values.to(dtype), mask, gamma=0.97, lam=0.9 if each is None else each,
                value_lam=(0.6 if value_each is None else value_each) if two else None,
                holes="decay" if decay else "carry", bootstrap=None if last is None else last.to(dtype),
            )  # fmt: skip

        all_close("advantages returns", ours, find)
        assert not any(x[~mask].any() for x in ours)


def case_gae_at_the_real_tile() -> None:
    """One token past a tile, with a hole that spans the seam; and a tile whose masked positions are all holes."""
    _, gae, *_ = modules(small=False)
    (rewards, values, *_), _, mask = batch(1, gae.TILE + 1, 1.0, ragged=False)
    mask[0, :5] = False
    mask[0, 0] = True
    for decay in (False, True):
        ours = gae.gae(rewards, values, mask, None, None, None, None, 1.0, 0.95, 0.95, False, decay)
        holes = "decay" if decay else "carry"
        all_close(
            "advantages returns", ours,
            lambda dtype, holes=holes: reference.gae(rewards.to(dtype), values.to(dtype), mask, holes=holes),
        )  # fmt: skip


def case_long_hole(decay: bool) -> None:
    """Tiles without a single token, between ones that have some."""
    _, gae, *_ = modules()
    (rewards, values, *_), _, mask = batch(2, 5 * TILE, 1.0, ragged=False)
    mask[0, 3 : 4 * TILE + 2] = False
    mask[1, : 2 * TILE] = False
    ours = gae.gae(rewards, values, mask, None, None, None, None, 0.99, 0.95, 0.95, False, decay)
    all_close(
        "advantages returns", ours, lambda dtype: reference.gae(
            rewards.to(dtype), values.to(dtype), mask, gamma=0.99, holes="decay" if decay else "carry"
        ),
    )  # fmt: skip


SHAPED = "rewards advantages returns kl value_mask"


def case_kl_gae(kind: str, after: bool, decay: bool) -> None:
    """With a bound that keeps estimates off 0, which masked positions nevertheless have."""
    _, gae, *_ = modules()
    for count, length, whiten in ((1, 1, True), (3, 2 * TILE + 3, True), (2, TILE, False), (2, TILE + 1, True)):
        (new, ref, values, *_), (scores, lam, bootstrap), mask = batch(count, length)
        scores = 4 * scores - 2
        mask[0, -1] = count == 2  # a sequence with, and one without a slot behind its last token
        each = lam.double() if decay else None
        ours = kl_gae(
            scores, new, ref, values, mask, each, bootstrap, None, KINDS.index(kind), -1.5, inf, 0.1, 2.0, 0.3, 1.0,
            after, 0.97, 0.9, decay, whiten,
        )  # fmt: skip

        def find(
            dtype: torch.dtype, x: Any = (scores, new, ref, values), mask: Tensor = mask, each: Any = each,
            bootstrap: Tensor = bootstrap, whiten: bool = whiten,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            found = reference.kl_gae(
                *(tensor.to(dtype) for tensor in x), mask, kl_coef=0.3, kl_kind=kind, kl_clamp_diff=(-1.5, None),
                kl_clamp_value=(0.1, 2.0), score_clip=1.0, gamma=0.97, lam=0.9 if each is None else each,
                whiten=whiten, score_at="after" if after else "last", holes="decay" if decay else "carry",
                bootstrap=bootstrap.to(dtype),
            )  # fmt: skip
            return tuple(getattr(found, name) for name in SHAPED.split())

        all_close(SHAPED, ours, find)
        assert ours[-1].dtype == torch.bool


def every_gae(x: Tensor, each: Tensor, mask: Tensor, offsets: Tensor | None, decay: bool) -> tuple[Tensor, ...]:
    """The first seven results are of sequences alone, the others whitened over the batch."""
    _, gae, *_ = modules()
    lam, scores, bootstrap = each[0].double(), each[1], each[2]
    rest = (3, *OPEN, 0.1, inf)
    return (
        *gae.gae(x[0], x[1], mask, lam, None, bootstrap, offsets, 0.97, 0.0, 0.5, True, decay),
        *kl_gae(scores, x[0], x[1], x[2], mask, None, None, offsets, *rest, False, 0.97, 0.9, decay, False),
        *kl_gae(scores, x[0], x[1], x[2], mask, lam, bootstrap, offsets, *rest, True, 0.97, 0.0, decay, True),
    )


def case_layouts(decay: bool) -> None:
    """The same bits padded, padded further, packed, in another order, and alone."""
    x, each, mask = batch(3, 2 * TILE + 4, ragged=False)
    lengths = torch.tensor([2 * TILE + 4, 0, TILE + 2])
    inside = torch.arange(mask.shape[1]) < lengths[:, None]
    mask &= F.pad(inside, (0, 1))[:, 1:]  # a slot behind the last token, in every layout
    padded = every_gae(x, each, mask, None, decay)
    further = every_gae(F.pad(x, (0, 5)), each, F.pad(mask, (0, 5)), None, decay)
    same_bits(tuple(a[:, :-5] for a in further), padded)
    packed = every_gae(x[:, inside], each, mask[inside], F.pad(lengths.cumsum(0), (1, 0)), decay)
    same_bits(packed, tuple(a[inside] for a in padded))
    turned = every_gae(x.flip(1), each.flip(1), mask.flip(0), None, decay)
    same_bits(tuple(a.flip(0) for a in turned[:7]), padded[:7])
    alone = every_gae(x[:, :1].contiguous(), each[:, :1].contiguous(), mask[:1], None, decay)
    same_bits(alone[:7], tuple(a[:1] for a in padded[:7]))


def losses_with(**changes: Any) -> list[Any]:
    """The arguments of ppo_loss behind the mask: no tensors, and clipping alone, but for the changes."""
    defaults = dict(
        is_weights=None, entropy=None, ref_logprobs=None, weights=None, denom=None, denom_number=-1.0, clip_low=0.2,
        clip_high=0.3, dual_clip=inf, entropy_coef=0.0, kl_coef=0.0, kl_kind=3, straight_through=False,
        with_gradient=True,
    )  # fmt: skip
    assert changes.keys() <= defaults.keys()
    return list((defaults | changes).values())


def check_ppo_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **changes: Any) -> tuple[Tensor, ...]:
    *_, losses = modules()
    arguments = losses_with(**changes)
    named = dict(zip(losses.ppo_loss.__annotations__, [new, old, advantages, mask, *arguments], strict=False))
    ours = losses.ppo_loss(new, old, advantages, mask, *arguments)
    entropy = named["entropy"]

    def find(dtype: torch.dtype) -> tuple[Tensor, ...]:
        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        leaf = new.to(dtype, copy=True).requires_grad_()
        entropy_leaf = None if entropy is None else entropy.to(dtype, copy=True).requires_grad_()
        denom = named["denom"] if named["denom"] is not None else named["denom_number"]
        loss, metrics = reference.ppo_loss(
            leaf, old.to(dtype), advantages.to(dtype), mask, clip_low=named["clip_low"], clip_high=named["clip_high"],
            dual_clip=None if named["dual_clip"] == inf else named["dual_clip"], is_weights=cast(named["is_weights"]),
            entropy=entropy_leaf, entropy_coef=named["entropy_coef"], ref_logprobs=cast(named["ref_logprobs"]),
            kl_coef=named["kl_coef"], kl_kind=KINDS[named["kl_kind"]] + "+" * named["straight_through"],
            weights=cast(named["weights"]), denom=None if denom is named["denom_number"] and denom < 0 else denom,
        )  # fmt: skip
        leaves = [leaf] if entropy_leaf is None else [leaf, entropy_leaf]
        grads = torch.autograd.grad(loss, leaves)
        vector = torch.stack([metrics.get(name, torch.zeros((), dtype=torch.float64)) for name in POLICY_METRICS])
        return loss.detach(), grads[0], grads[1] if entropy is not None else new.new_zeros(0).to(dtype), vector

    all_close("loss gradient entropy_gradient metrics", ours, find)
    assert ours[0].shape == () and ours[0].dtype == torch.float32 and ours[3].dtype == torch.float64
    arguments[-1] = False
    loss, no_gradient, no_entropy_gradient, metrics = losses.ppo_loss(new, old, advantages, mask, *arguments)
    same_bits((loss, metrics), (ours[0], ours[3]))
    assert no_gradient.shape == no_entropy_gradient.shape == (0,)
    return ours


SIZES = (0, 1, BLOCK - 1, BLOCK + 1, 5 * BLOCK + 3)  # a block, one for each program, three rounds of the programs


def case_ppo_sizes(denom: str) -> None:
    for size in SIZES:
        x, _, mask = batch(1, size, ragged=False)
        divisor = {"tokens": {}, "number": {"denom_number": 7.0}, "zero": {"denom_number": 0.0},
                   "tensor": {"denom": torch.tensor(3.0)}}[denom]  # fmt: skip
        check_ppo_loss(x[0], x[1], x[2], mask, entropy=x[3], entropy_coef=0.1, **divisor)
    check_ppo_loss(x[0], x[1], x[2], torch.zeros_like(mask), **divisor)


def case_ppo_options(given: tuple[bool, ...]) -> None:
    """Each tensor there or not, with a spread where clips, dual clips and the bound of 20 on d are all met."""
    x, _, mask = batch(3, 29)
    new = x[1] + 5 * x[0]
    new[0, :4] = x[1][0, :4] + torch.tensor([-30.0, 30.0, 19.0, -19.0])
    tensors = dict(zip(("is_weights", "entropy", "ref_logprobs", "weights"), x[3:7], strict=True))
    changes = {name: x for (name, x), wanted in zip(tensors.items(), given, strict=True) if wanted}
    check_ppo_loss(
        new, x[1], x[2], mask, **changes, dual_clip=1.5, entropy_coef=0.1 * given[1], kl_coef=0.2 * given[2],
        denom=torch.tensor([5.0]).squeeze(),
    )  # fmt: skip


def case_ppo_beyond_the_bound() -> None:
    """Log-ratios beyond +-20 have no gradient, on whichever side of the clip they are."""
    x, _, mask = batch(1, 13, keep=1.0, ragged=False)
    d = torch.tensor([30.0, -30.0, 20.5, -20.5, 19.0]).repeat(3)[:13]
    advantages = torch.tensor([-1.0, 1.0, 1.0]).repeat(5)[:13]
    gradient = check_ppo_loss(x[1] + d, x[1], advantages[None], mask)[1]
    assert not gradient[:, d.abs() > 20].any() and gradient.any()


def case_ppo_kl(kind: str, straight_through: bool) -> None:
    x, _, mask = batch(2, 31)
    check_ppo_loss(
        x[0], x[1], x[2], mask, ref_logprobs=x[3], kl_coef=0.5, kl_kind=KINDS.index(kind),
        straight_through=straight_through,
    )  # fmt: skip


def case_ppo_at_ratio_one() -> None:
    """The first step: every ratio is exactly 1, nothing is clipped, the gradient is -A over the number of tokens."""
    *_, losses = modules()
    x, _, mask = batch(3, 13)
    _, gradient, _, metrics = losses.ppo_loss(x[0], x[0], x[1], mask, *losses_with())
    tokens = float(mask.sum())
    assert metrics.tolist() == [tokens, 0, 0, 0, 0, tokens, 0, 0]
    assert torch.equal(gradient, torch.where(mask, -x[1] * torch.tensor(1 / tokens), 0.0))


def case_visible_nan() -> None:
    """A NaN in a token that counts is NaN in the loss, in its own gradient alone, and the greatest log-ratio."""
    *_, losses = modules()
    x, _, mask = batch(3, 13, keep=1.0, ragged=False)
    x[0, 1, 7] = torch.nan
    loss, gradient, _, metrics = losses.ppo_loss(x[0], x[1], x[2], mask, *losses_with())
    assert loss.isnan() and metrics[losses.LOG_RATIO_MAX].isnan() and metrics[5].isnan()
    assert gradient.isnan().nonzero().tolist() == [[1, 7]]
    loss, gradient, _ = losses.value_loss(x[0], x[1], x[2], mask, None, None, -1.0, 0.2, True)
    assert loss.isnan() and gradient.isnan().nonzero().tolist() == [[1, 7]]


def case_value_loss(weighted: bool) -> None:
    *_, losses = modules()
    divisors = ((None, -1.0), (None, 11.0), (torch.tensor(3.0), -1.0), (torch.tensor(0.0), -1.0), (None, -1.0))
    for size, bound, (denom, number) in zip(SIZES, (0.3, 0.3, inf, 0.3, 0.3), divisors, strict=True):
        (values, old, returns, weights, *_), _, mask = batch(1, size, ragged=False)
        weights = weights if weighted else None
        ours = losses.value_loss(values, old, returns, mask, weights, denom, number, bound, True)

        def find(
            dtype: torch.dtype, x: Any = (values, old, returns), mask: Tensor = mask, weights: Any = weights,
            bound: float = bound, denom: Any = (number if number > 0 else None) if denom is None else denom,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            value, old, target = (y.to(dtype, copy=True) for y in x)
            loss, metrics = reference.value_loss(
                value.requires_grad_(), old, target, mask, clip=None if bound == inf else bound,
                weights=None if weights is None else weights.to(dtype), denom=denom,
            )  # fmt: skip
            gradient = torch.autograd.grad(loss, value)[0]
            return loss.detach(), gradient, torch.stack([metrics[name] for name in VALUE_METRICS])

        all_close("loss gradient metrics", ours, find)
        loss, nothing, metrics = losses.value_loss(values, old, returns, mask, weights, denom, number, bound, False)
        same_bits((loss, metrics), (ours[0], ours[2]))
        assert nothing.shape == (0,)


def case_whiten(center: bool, ddof: int) -> None:
    """Up to three rounds of the programs that find moments; one token, and several."""
    _, _, white, _ = modules()
    for size, (keep, add, zero) in product(SIZES, ((0.0, True, True), (0.7, False, True), (0.7, True, False))):
        x, _, mask = batch(1, size, keep, ragged=False)
        x = 3 * x[0] + 1
        mask[:, 5:6] = True
        ours = white.whiten(x, mask, ddof, 0.01, add, center, zero)
        all_close(
            "whitened", (ours,),
            lambda dtype, x=x, mask=mask, add=add, zero=zero: (
                reference.whiten(
                    x.to(dtype), mask, center=center, ddof=ddof, eps=0.01, eps_mode="add" if add else "max",
                    zero_masked=zero,
                ),
            ),
        )  # fmt: skip
        same_bits((white.whiten_out(x, mask, ddof, 0.01, add, center, zero, x), x)[1:], (ours,))


def case_whiten_equal_numbers() -> None:
    """Their mean is exactly each of them, so nothing is left, whatever eps divides it by."""
    _, _, white, _ = modules()
    x, mask = torch.full((1, 163), 0.1), torch.rand(1, 163) < 0.7
    assert not white.whiten(x, mask, 0, 1e-8, True, True, True).any()


def case_many_sequences() -> None:
    """More than are folded by every program: the whitening of the same numbers, found one way and the other."""
    _, gae, white, _ = modules()
    x, each, mask = batch(2 * white.MOST_PARTS + 1, 5)
    arguments = (each[0], x[0], x[1], x[2], mask, None, None, None, 0, *OPEN, 0.1, inf, False, 0.97, 0.9, False)
    _, plain, *_ = kl_gae(*arguments, False)
    _, whitened, *_ = kl_gae(*arguments, True)
    all_close("whitened", (whitened,), lambda dtype: (reference.whiten(plain.to(dtype), mask),))


def case_out() -> None:
    _, gae, white, _ = modules()
    x, each, mask = batch(3, 20)
    arguments = (x[0], x[1], mask, None, None, None, None, 0.9, 0.9, 0.9, False, False)
    out = torch.full((3, 20), 7.0), torch.full((3, 20), 7.0)
    assert gae.gae_out(*arguments, *out) is None
    same_bits(out, gae.gae(*arguments))
    from rlhf_engine.kernels.kl_gae import kl_gae_out

    rest = (each[0], x[0], x[1], x[2], mask, None, None, None, 0, *OPEN, 0.1, 1.0, True, 0.97, 0.9, False, True)
    places = *(torch.full((3, 20), 7.0) for _ in range(4)), torch.ones(3, 20, dtype=torch.bool)
    assert kl_gae_out(*rest, *places) is None
    same_bits(places, kl_gae(*rest))


def case_ops() -> None:
    """Through the registered operators, with gradients, as the front door calls them on a GPU."""
    from rlhf_engine.ops.backends import _TABLE

    modules()
    (a, b, c, d, e, f, g, *_), each, mask = batch(3, 20)
    chosen, plain = ({op: functions[name] for op, functions in _TABLE.items() if name in functions} for name in
                     ("triton", "reference"))  # fmt: skip
    recursion = dict(gamma=0.97, lam=0.9, holes="carry", bootstrap=each[1], cu_seqlens=None, out=None)
    clamps = dict(kl_kind="k3", kl_clamp_diff=2.0, kl_clamp_value=None)
    rest = dict(whiten=True, score_at="after", score_clip=0.5)
    losses = dict(clip_low=0.2, clip_high=0.3, dual_clip=3.0, is_weights=d, entropy_coef=0.1, kl_coef=0.1)

    def run(op: dict[str, Callable[..., Any]], dtype: torch.dtype) -> list[Tensor]:
        leaf, entropy = (x.to(dtype).requires_grad_() for x in (a, e))
        estimate = op["kl_estimate"](leaf, b, kind="k3", clamp_diff=None, clamp_value=None)
        policy, metrics = op["ppo_loss"](
            leaf, b, c, mask, **losses, entropy=entropy, ref_logprobs=f, kl_kind="k2", weights=g, denom=7.0
        )
        value, value_metrics = op["value_loss"](leaf, b, c, mask, clip=0.2, weights=None, denom=None)
        shaped = op["kl_gae"](each[0], a, b, c, mask, kl_coef=0.1, **clamps, **rest, **recursion)
        gradients = torch.autograd.grad(estimate.sum() + policy + value, (leaf, entropy))
        plain_numbers = (estimate, policy, value, *gradients, *metrics.values(), *value_metrics.values())
        white = op["whiten"](a, mask, center=True, ddof=1, eps=1e-8, eps_mode="max", zero_masked=True, out=None)
        advantages = op["gae"](a, b, mask, value_lam=each[2], **recursion)
        return [x.detach() for x in (*plain_numbers, white, *advantages, *shaped.tensors())]

    assert len(chosen) == 6
    for ours, theirs in zip(run(chosen, torch.float32), run(plain, torch.float32), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def case_empty() -> None:
    kl, gae, white, losses = modules()
    for count, length in ((0, 7), (4, 0), (0, 0)):
        x, each, mask = batch(count, length)
        for outputs in (every_gae(x, each, mask, None, False), (white.whiten(x[0], mask, 0, 1e-8, True, True, True),)):
            assert all(a.shape == (count, length) for a in outputs)
        loss, gradient, _, metrics = losses.ppo_loss(x[0], x[1], x[2], mask, *losses_with())
        assert loss == 0 and gradient.shape == (count, length) and not metrics.any() and metrics.shape == (8,)
        loss, gradient, metrics = losses.value_loss(x[0], x[1], x[2], mask, None, None, -1.0, 0.2, True)
        assert loss == 0 and gradient.shape == (count, length) and not metrics.any() and metrics.shape == (7,)
        assert kl.kl_estimate(x[0], x[1], 3, False, *OPEN, True)[1].shape == (count, length)
    packed = every_gae(
        torch.randn(8, 0), torch.rand(3, 2), torch.zeros(0, dtype=torch.bool), torch.zeros(3).long(), True
    )
    assert all(a.shape == (0,) for a in packed)


def every_op(x: Tensor, each: Tensor, mask: Tensor, after: Tensor | None = None) -> tuple[Tensor, ...]:
    """All ops that know a mask, with all that may be masked; `after`: values, where the score is behind the tokens."""
    _, gae, white, losses = modules()
    rest = (None, None, None, 3, *OPEN, 0.1, inf)
    optional = dict(is_weights=x[3], entropy=x[4], ref_logprobs=x[5], weights=x[6])
    values = x[2] if after is None else after
    return (
        *gae.gae(x[0], x[1], mask, None, None, None, None, 0.97, 0.9, 0.5, True, False),
        *kl_gae(each[0], x[0], x[1], x[2], mask, *rest, False, 0.97, 0.9, False, True),
        *kl_gae(each[0], x[0], x[1], values, mask, *rest, True, 0.97, 0.9, True, False),
        white.whiten(x[0], mask, 0, 1e-8, True, True, True),
        *losses.ppo_loss(x[0], x[1], x[2], mask, *losses_with(**optional, entropy_coef=0.1, kl_coef=0.1)),
        *losses.value_loss(x[0], x[1], x[2], mask, x[3], None, -1.0, 0.2, True),
    )


def case_poison() -> None:
    """What masked positions hold changes no bit; only a score behind the last token reads a value there."""
    x, each, mask = batch(2, TILE + 5)
    mask[0, -1], mask[1, -1] = True, False
    before = x.clone(), each.clone(), mask.clone()
    clean = every_op(x, each, mask)
    same_bits(every_op(x, each, mask), clean)
    same_bits((x, each, mask), before)
    read = clean[11]
    assert read.dtype == torch.bool and (read & ~mask).any()
    for poison in (torch.nan, inf, 1e38):
        same_bits(every_op(x.where(mask, poison), each, mask, after=x[2].where(read, poison)), clean)


def in_memory(layout: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Aligned to 16 bytes, or to no more than a number."""
    size = prod(shape)
    return torch.zeros(size + 1, dtype=dtype)[layout != "aligned" :][:size].view(shape)


class OnlyAllocations(TorchDispatchMode):
    """Between its launches an op may allocate: no work for the device, and no wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name in ("aten::empty_like", "aten::new_empty", "aten::empty"), func
        return func(*args, **(kwargs or {}))


def launch_all(x: Tensor, mask: Tensor, each: Tensor, lam: Tensor, denom: Tensor, offsets: Tensor | None) -> None:
    kl, gae, white, losses = modules(small=False)
    optional = dict(is_weights=x, entropy=x, ref_logprobs=x, weights=x)
    with OnlyAllocations():
        kl.kl_estimate(x, x, 3, False, *OPEN, True)
        gae.gae(x, x, mask, None, None, None, offsets, 0.97, 0.9, 0.9, False, False)
        gae.gae(x, x, mask, lam, lam, each, offsets, 0.97, 0.9, 0.9, True, True)
        kl_gae(each, x, x, x, mask, lam, each, offsets, 3, *OPEN, 0.1, inf, True, 0.97, 0.9, False, True)
        kl_gae(each, x, x, x, mask, None, None, offsets, 0, *OPEN, 0.1, inf, False, 0.97, 0.9, True, False)
        white.whiten(x, mask, 0, 1e-8, True, True, True)
        losses.ppo_loss(x, x, x, mask, *losses_with(**optional, denom=denom))
        losses.ppo_loss(x, x, x, mask, *losses_with())
        losses.value_loss(x, x, x, mask, None, None, -1.0, 0.2, True)


def check_arithmetic(name: str, ptx: str) -> None:
    """No number of a token in float64, only sums of them; nothing fused where variants of a kernel share their bits."""
    if name in ("_estimate", "_policy_loss"):
        assert not re.search(r"(mul|fma)\S*\.f64", ptx), name
    if name in ("_sequence", "_find_moments", "_fold_once", "_apply"):
        assert "fma" not in ptx, name


def compile_all(capability: int, *layouts: str) -> None:
    """Every kernel as it is launched; the order of sums must not hang on how sequences and tensors lie in memory."""
    *_, white, _ = modules(small=False)
    count, orders = 2 * white.MOST_PARTS, []
    each, lam, denom = torch.zeros(count), torch.zeros(count, dtype=torch.float64), torch.tensor(3.0)
    shapes = {"aligned": (count, 16), "unaligned": (count, 17), "packed": (16 * count,)}
    for layout in layouts:
        x, mask = (in_memory(layout, *shapes[layout], dtype=dtype) for dtype in (torch.float32, torch.bool))
        offsets = torch.zeros(count + 1, dtype=torch.long) if layout == "packed" else None
        with kernel_script.compiling_for(capability) as compiled:
            launch_all(x, mask, each, lam, denom, offsets)
        assert len(compiled) == 15  # one for gae and kl_estimate, two for others, and one to fold many sequences
        for kernel in dict.fromkeys(compiled):  # some are launched twice
            kernel_script.check_resources(kernel, f"sm_{capability} {layout}")
            check_arithmetic(kernel.metadata.name, kernel.asm["ptx"])
        orders.append([kernel_script.layouts_of_sums(kernel) for kernel in compiled])
    assert all(order == orders[0] for order in orders) and sum(map(len, orders[0])) > 40


GAE_SHAPES = ((1, 1, 1.0), (3, 7, 0.7), (2, TILE, 1.0), (2, TILE + 1, 0.7), (3, 29, 0.7), (2, 5, 0.0))
GIVEN = [tuple(i == j for j in range(4)) for i in range(5)] + [(True,) * 4]
INTERPRETED: dict[str, Callable[[], None]] = {
    **{f"kl-{k}{'+' * s}": partial(case_kl, k, s) for k in KINDS for s in (False, True)},
    "k3-near-zero": case_k3_near_zero,
    **{
        f"gae-{'decay' if decay else 'carry'}-{count}x{length}-{keep}": partial(case_gae, decay, count, length, keep)
        for decay in (False, True)
        for count, length, keep in GAE_SHAPES
    },
    "gae-at-the-real-tile": case_gae_at_the_real_tile,
    **{f"long-hole-{decay}": partial(case_long_hole, decay) for decay in (False, True)},
    **{
        f"kl_gae-{kind}-{after=}-{decay=}": partial(case_kl_gae, kind, after, decay)
        for kind, after, decay in zip(KINDS, (False, True, True, False), (False, False, True, True), strict=True)
    },
    **{f"layouts-{decay=}": partial(case_layouts, decay) for decay in (False, True)},
    **{f"ppo-denom-{denom}": partial(case_ppo_sizes, denom) for denom in ("tokens", "number", "zero", "tensor")},
    **{f"ppo-given-{''.join('01'[g] for g in given)}": partial(case_ppo_options, given) for given in GIVEN},
    **{f"ppo-kl-{k}{'+' * s}": partial(case_ppo_kl, k, s) for k in KINDS for s in (False, True)},
    "ppo-beyond-the-bound": case_ppo_beyond_the_bound,
    "ppo-at-ratio-one": case_ppo_at_ratio_one,
    "visible-nan": case_visible_nan,
    **{f"value-loss-{weighted=}": partial(case_value_loss, weighted) for weighted in (False, True)},
    **{f"whiten-{center=}-{ddof=}": partial(case_whiten, center, ddof) for center, ddof in ((True, 0), (False, 1))},
    "whiten-equal-numbers": case_whiten_equal_numbers,
    "many-sequences": case_many_sequences,
    "out": case_out,
    "ops": case_ops,
    "empty": case_empty,
    "poison": case_poison,
}
COMPILED: dict[str, Callable[[], None]] = {
    "sm_80": partial(compile_all, 80, "packed"),
    "sm_90": partial(compile_all, 90, "aligned", "unaligned", "packed"),
    "sm_100": partial(compile_all, 100, "packed"),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kernel_script.run(__file__, "interpret", tmp_path_factory.mktemp("interpret"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kernel_script.run(__file__, "compile", tmp_path_factory.mktemp("compile"))


@pytest.mark.parametrize("case", INTERPRETED)
def test_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.parametrize("case", COMPILED)
def test_ahead_of_time(case: str, compiled: dict[str, str]) -> None:
    assert not compiled[case], compiled[case]


if __name__ == "__main__":
    kernel_script.main(INTERPRETED, COMPILED)
