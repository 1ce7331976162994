"""Cases of kernels/kl.py, gae.py and whiten.py against the reference, and what all cases of loss-side kernels share.

Part of test_loss_kernels.py. In the interpreter a scan takes 0.1 ms an element, so most cases run with small tiles:
these are constants of a module, so results still have the same bits however they are found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from math import inf
from types import ModuleType
from typing import Any

import kernel_script
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine import reference

TILE, BLOCK, PROGRAMS = 8, 32, 2  # small ones
KINDS = ("k1", "abs", "k2", "k3")
OPEN = (-inf, inf, -inf, inf)
SIZES = (0, 1, BLOCK - 1, BLOCK + 1, 5 * BLOCK + 3)  # a block, one for each program, three rounds of the programs


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


def case_whiten(center: bool, ddof: int) -> None:
    """Up to three rounds of the programs that find moments; one token, and several. In place, too."""
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


GAE_SHAPES = ((1, 1, 1.0), (3, 7, 0.7), (2, TILE, 1.0), (2, TILE + 1, 0.7), (3, 19, 0.7), (2, 5, 0.0))
CASES: dict[str, Callable[[], None]] = {
    **{f"kl-{k}{'+' * s}": partial(case_kl, k, s) for k in KINDS for s in (False, True)},
    "k3-near-zero": case_k3_near_zero,
    **{
        f"gae-{'decay' if decay else 'carry'}-{count}x{length}-{keep}": partial(case_gae, decay, count, length, keep)
        for decay in (False, True)
        for count, length, keep in GAE_SHAPES
    },
    "gae-at-the-real-tile": case_gae_at_the_real_tile,
    **{f"long-hole-{decay=}": partial(case_long_hole, decay) for decay in (False, True)},
    **{
        f"kl_gae-{kind}-{after=}-{decay=}": partial(case_kl_gae, kind, after, decay)
        for kind, after, decay in zip(KINDS, (False, True, True, False), (False, False, True, True), strict=True)
    },
    **{f"layouts-{decay=}": partial(case_layouts, decay) for decay in (False, True)},
    **{f"whiten-{center=}-{ddof=}": partial(case_whiten, center, ddof) for center, ddof in ((True, 0), (False, 1))},
    "whiten-equal-numbers": case_whiten_equal_numbers,
    "many-sequences": case_many_sequences,
    "out": case_out,
}
