"""kernels/kl.py, gae.py, whiten.py and losses.py against the reference, without a GPU; kernel_script.py says how.

They are called as the operators of csrc/operators.h are. Here are the losses, and what is asked of all alike: masked
content, empty input, and how they compile. The others' own cases are in advantage_kernel_cases.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import inf, prod
from typing import Any

import kernel_script
import pytest
import torch
from advantage_kernel_cases import CASES as ADVANTAGE_CASES
from advantage_kernel_cases import KINDS, OPEN, SIZES, TILE, all_close, batch, every_gae, kl_gae, modules, same_bits
from torch import Tensor

from rlhf_engine import reference

POLICY_METRICS = (
    "policy_tokens", "clip_fraction_sum", "clip_fraction_low_sum", "approx_kl_k1_sum", "approx_kl_k3_sum",
    "ratio_mean_sum", "log_ratio_max_abs", "entropy_sum",
)  # fmt: skip
VALUE_METRICS = (
    "value_tokens", "value_mean_sum", "value_clip_fraction_sum", "value_return_sum", "value_return_square_sum",
    "value_error_sum", "value_error_square_sum",
)  # fmt: skip


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


def case_ppo_sizes(denom: str) -> None:
    for size in SIZES if denom == "tokens" else SIZES[-1:]:
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

    assert chosen.keys() > {"kl_estimate", "gae", "whiten", "kl_gae", "ppo_loss", "value_loss"}
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


ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}


def in_memory(layout: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Padded tensors aligned to 16 bytes, packed ones to no more than a number."""
    size = prod(shape)
    return torch.zeros(size + 1, dtype=dtype)[layout == "packed" :][:size].view(shape)


def launch_all(x: Tensor, mask: Tensor, each: Tensor, lam: Tensor, denom: Tensor, offsets: Tensor | None) -> None:
    kl, gae, white, losses = modules(small=False)
    optional = dict(is_weights=x, entropy=x, ref_logprobs=x, weights=x)
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
    shapes = {"padded": (count, 16), "packed": (16 * count,)}
    for layout in layouts:
        x, mask = (in_memory(layout, *shapes[layout], dtype=dtype) for dtype in (torch.float32, torch.bool))
        offsets = torch.zeros(count + 1, dtype=torch.long) if layout == "packed" else None
        with kernel_script.compiling_for(capability) as compiled, torch.autograd.profiler.profile() as profile:
            launch_all(x, mask, each, lam, denom, offsets)
        other_work = {event.name for event in profile.function_events} - ALLOCATIONS
        assert not other_work, f"work for the device, or a wait for it, between launches: {other_work}"
        assert len(compiled) == 15  # one for gae and kl_estimate, two for others, and one to fold many sequences
        for kernel in dict.fromkeys(compiled):  # some are launched twice
            kernel_script.check_resources(kernel, f"sm_{capability} {layout}")
            check_arithmetic(kernel.metadata.name, kernel.asm["ptx"])
        orders.append([kernel_script.layouts_of_sums(kernel) for kernel in compiled])
    assert all(order == orders[0] for order in orders) and sum(map(len, orders[0])) > 40


GIVEN = [tuple(i == j for j in range(4)) for i in range(5)] + [(True,) * 4]
INTERPRETED: dict[str, Callable[[], None]] = {
    **ADVANTAGE_CASES,
    **{f"ppo-denom-{denom}": partial(case_ppo_sizes, denom) for denom in ("tokens", "number", "zero", "tensor")},
    **{f"ppo-given-{''.join('01'[g] for g in given)}": partial(case_ppo_options, given) for given in GIVEN},
    **{f"ppo-kl-{k}{'+' * s}": partial(case_ppo_kl, k, s) for k in KINDS for s in (False, True)},
    "ppo-beyond-the-bound": case_ppo_beyond_the_bound,
    "ppo-at-ratio-one": case_ppo_at_ratio_one,
    "visible-nan": case_visible_nan,
    **{f"value-loss-{weighted=}": partial(case_value_loss, weighted) for weighted in (False, True)},
    "ops": case_ops,
    "empty": case_empty,
    "poison": case_poison,
}
COMPILED: dict[str, Callable[[], None]] = {
    "sm_80": partial(compile_all, 80, "packed"),
    "sm_90": partial(compile_all, 90, "padded", "packed"),
    "sm_100": partial(compile_all, 100, "packed"),
}


@pytest.mark.parametrize("case", INTERPRETED)
def test_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.parametrize("case", kernel_script.compiled_cases(COMPILED))
def test_ahead_of_time(case: str, compiled: dict[str, str]) -> None:
    assert not compiled[case], compiled[case]


if __name__ == "__main__":
    kernel_script.main(INTERPRETED, COMPILED)
