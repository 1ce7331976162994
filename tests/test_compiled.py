"""The ops in C++ against the reference in float64: as exact as PyTorch in float32, blind under masks, repeatable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_engine import native, ops
from rlhf_engine.ops import operators

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native extension: {native.why_missing()}")

KINDS = ("k1", "abs", "k2", "k3")
BOUNDS = st.sampled_from([None, 1.0, (-0.5, None), (None, 0.7)])
# 512 tokens are a tile of the losses and of whitening, 4096 positions a block in which they are counted, 1024
# positions a tile of the recursion. The reference steps through time, so its long rows are the few that matter.
LENGTHS = [0, 1, 2, 3, 7, 31, 255, 256, 257, 511, 512, 513, 769, 4097]
LENGTHS_IN_TIME = [0, 1, 2, 3, 7, 31] * 3 + [255, 1023, 1024, 1025, 2049]


@dataclass
class Case:
    """A padded batch; masks with holes, padding, both or neither, and sequences without a token."""

    seed: int
    count: int
    length: int
    keep: float
    padded: bool

    def tensors(self, number: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        return [torch.randn(self.count, self.length, generator=g) for _ in range(number)]

    def mask(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        kept = torch.rand(self.count, self.length, generator=g) < self.keep
        lengths = torch.randint(0, self.length + 1, (self.count, 1), generator=g)
        return kept & (torch.arange(self.length) < lengths) if self.padded else kept

    def per_sequence(self, number: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed + 2)
        return [torch.rand(self.count, generator=g) for _ in range(number)]


def cases_of(lengths: list[int]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case, st.integers(0, 2**20), st.integers(0, 9), st.sampled_from(lengths),
        st.sampled_from([0.0, 0.05, 0.6, 1.0, 1.0]), st.booleans(),
    )  # fmt: skip


cases, cases_in_time = cases_of(LENGTHS), cases_of(LENGTHS_IN_TIME)
# Drawn every time: more than a tile in each row, and more than a block in all, with and without holes.
DENSE, HOLES = Case(7, 9, 2049, 1.0, False), Case(8, 9, 2049, 0.8, True)
recursion = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([1.0, 0.99, 0.5, 0.0]), "lam": st.sampled_from([1.0, 0.95, 0.0, "each"]),
        "holes": st.sampled_from(["carry", "decay"]), "bootstrap": st.booleans(),
    }
)  # fmt: skip


def options(case: Case, drawn: dict[str, Any]) -> dict[str, Any]:
    lam, bootstrap = case.per_sequence(2)
    each = {"each": lam}
    return drawn | {
        "lam": each.get(drawn["lam"], drawn["lam"]), "bootstrap": bootstrap if drawn["bootstrap"] else None,
    }  # fmt: skip


def doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def check(function: Callable[..., Any], *tensors: Tensor, **arguments: Any) -> Any:
    """Ours is no further from float64 than 1.5 times what the reference in float32 is; a few roundings are free, and in
    a sum over tokens so are theirs, which add up like a random walk."""
    with fresh_memory_of_nan():
        ours = function(*tensors, **arguments, backend="cpu")
    plain = function(*tensors, **arguments, backend="reference")
    exact = function(
        *map(doubled, tensors), **{k: doubled(v) for k, v in arguments.items()}, backend="reference"
    )  # fmt: skip
    tokens = sum(int(x.sum()) for x in tensors if x.dtype == torch.bool)
    for (name, a), (_, b), (_, c) in zip(parts(ours), parts(plain), parts(exact), strict=True):
        compare(name, a, b, c, max(tokens, 1) ** 0.5 if c.dim() == 0 else 1.0)
    return ours


@contextlib.contextmanager
def fresh_memory_of_nan() -> Iterator[None]:
    """What an op leaves unwritten in its results is seen: in its deterministic mode, torch fills what it allocates."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def parts(result: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a result by name."""
    if isinstance(result, Tensor):
        return [("result", result)]
    if isinstance(result, tuple):
        return [(f"{i}/{name}", x) for i, each in enumerate(result) for name, x in parts(each)]
    if isinstance(result, dict):
        return sorted(result.items())
    return [(f.name, getattr(result, f.name)) for f in fields(result)]


def compare(name: str, ours: Tensor, plain: Tensor, exact: Tensor, walk: float) -> None:
    assert ours.shape == exact.shape and ours.dtype == plain.dtype, name
    ours, plain, exact = ours.double(), plain.double(), exact.double()
    free = max(8.0, 2 * walk) * 2.0**-24 * max(1.0, float(exact.abs().max()) if exact.numel() else 0.0)
    error, allowed = (float((x - exact).abs().max()) if exact.numel() else 0.0 for x in (ours, plain))
    assert error <= 1.5 * allowed + free, f"{name}: off by {error:.2e}, the reference in float32 by {allowed:.2e}"


@example(DENSE, {"gamma": 0.99, "lam": 0.95, "holes": "carry", "bootstrap": True}, 0.5)
@example(HOLES, {"gamma": 0.99, "lam": "each", "holes": "decay", "bootstrap": True}, "each")
@given(cases_in_time, recursion, st.sampled_from([None, 0.5, "each"]))
def test_gae(case: Case, drawn: dict[str, Any], value_lam: Any) -> None:
    rewards, values = case.tensors(2)
    value_lam = case.per_sequence(3)[2] if value_lam == "each" else value_lam
    check(ops.gae, rewards, values, case.mask(), **options(case, drawn), value_lam=value_lam)


@example(
    DENSE, {"gamma": 0.99, "lam": "each", "holes": "carry", "bootstrap": True}, "k1", None, None, "last", None, True
)
@example(HOLES, {"gamma": 0.99, "lam": 0.95, "holes": "carry", "bootstrap": False}, "k3", 1.0, 0.7, "after", 0.5, True)
@given(
    cases_in_time, recursion, st.sampled_from(KINDS), BOUNDS, BOUNDS, st.sampled_from(["last", "after"]),
    st.sampled_from([None, 0.5]), st.booleans(),
)  # fmt: skip
def test_kl_gae(
    case: Case, drawn: dict[str, Any], kind: str, diff: Any, value: Any, place: str, clip: float | None, whiten: bool
) -> None:
    logprobs, ref_logprobs, values = case.tensors(3)
    (scores,) = case.per_sequence(1)
    check(
        ops.kl_gae, scores, logprobs, ref_logprobs, values, case.mask(), kl_coef=0.3, kl_kind=kind,
        kl_clamp_diff=diff, kl_clamp_value=value, score_at=place, score_clip=clip, whiten=whiten,
        **options(case, drawn),
    )  # fmt: skip


@example(DENSE, True, 0, 1e-8, "add", True)
@example(HOLES, False, 1, 20.0, "max", True)  # 20: more than the variance
@given(
    cases, st.booleans(), st.sampled_from([0, 1]), st.sampled_from([1e-8, 0.5, 20.0]),
    st.sampled_from(["add", "max"]), st.booleans(),
)  # fmt: skip
def test_whiten(case: Case, center: bool, ddof: int, eps: float, eps_mode: str, zero_masked: bool) -> None:
    x = case.tensors(1)[0] * 3 + 1
    check(ops.whiten, x, case.mask(), center=center, ddof=ddof, eps=eps, eps_mode=eps_mode, zero_masked=zero_masked)


def with_gradients(function: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    """Adds the gradients of the first inputs to the result."""

    def run(*tensors: Tensor, **arguments: Any) -> Any:
        leaves = [x.detach().clone().requires_grad_() for x in tensors[:inputs]]
        extra, wanted = dict(arguments), list(leaves)
        if arguments.get("entropy") is not None:
            extra["entropy"] = arguments["entropy"].detach().clone().requires_grad_()
            wanted.append(extra["entropy"])
        result = function(*leaves, *tensors[inputs:], **extra)
        total = (result[0] if isinstance(result, tuple) else result).sum()
        gradients = (
            torch.autograd.grad(total * 1.5, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
        )
        filled = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True))
        detached = (result[0].detach(), result[1]) if isinstance(result, tuple) else result.detach()
        return detached, filled

    return run


@given(cases, st.sampled_from([k + plus for k in KINDS for plus in ("", "+")]), BOUNDS, BOUNDS)
def test_kl_estimate(case: Case, kind: str, diff: Any, value: Any) -> None:
    check(with_gradients(ops.kl_estimate, 2), *case.tensors(2), kind=kind, clamp_diff=diff, clamp_value=value)


@example(DENSE, (0.1, 0.4), None, None, (False, False, False), None, 0.3)
@example(HOLES, (0.1, 0.4), 1.5, "k3", (True, True, True), 7.0, 0.3)
@given(
    cases, st.sampled_from([(0.2, 0.2), (0.0, 0.0), (0.1, 0.4)]), st.sampled_from([None, 1.5]),
    st.sampled_from([None, "k1", "abs", "k2", "k3", "k1+", "k3+"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([None, 7.0, "tensor", 0.0]), st.sampled_from([0.3, 15.0]),
)  # fmt: skip
def test_ppo_loss(
    case: Case, clip: tuple[float, float], dual: float | None, kl: str | None, given_: tuple[bool, bool, bool],
    denom: Any, spread: float,
) -> None:  # fmt: skip
    old, noise, advantages, ref, entropy, weights, importance = case.tensors(7)
    has_entropy, has_weights, has_importance = given_
    if has_weights and denom is None:
        denom = 3.0
    check(
        with_gradients(ops.ppo_loss, 1), old + spread * noise, old, advantages, case.mask(), clip_low=clip[0],
        clip_high=clip[1], dual_clip=dual, ref_logprobs=ref if kl else None, kl_coef=0.1 if kl else 0.0,
        kl_kind=kl or "k3", entropy=entropy if has_entropy else None, entropy_coef=0.01 if has_entropy else 0.0,
        weights=weights.abs() if has_weights else None, is_weights=importance.abs() if has_importance else None,
        denom=torch.tensor(5.0) if denom == "tensor" else denom,
    )  # fmt: skip


@example(DENSE, 0.2, False)
@example(HOLES, 0.2, True)
@given(cases, st.sampled_from([None, 0.2, 1.0]), st.booleans())
def test_value_loss(case: Case, clip: float | None, weighted: bool) -> None:
    values, old, returns, weights = case.tensors(4)
    check(
        with_gradients(ops.value_loss, 1), values, old, returns, case.mask(), clip=clip,
        weights=weights.abs() if weighted else None, denom=11.0 if weighted else None,
    )  # fmt: skip


def test_every_mask_of_eight_positions() -> None:
    masks = torch.arange(256)[:, None].bitwise_and(2 ** torch.arange(8)) > 0
    case = Case(11, 256, 8, 1.0, False)
    a, b, c = case.tensors(3)
    for holes in ("carry", "decay"):
        check(ops.gae, a, b, masks, holes=holes)
        check(ops.kl_gae, case.per_sequence(1)[0], a, b, c, masks, kl_coef=0.1, holes=holes, score_at="after")
    for x, y, z, mask in zip(a, b, c, masks, strict=True):
        check(ops.whiten, x, mask, zero_masked=False)
        check(with_gradients(ops.ppo_loss, 1), x, y, z, mask)
        check(with_gradients(ops.value_loss, 1), x, y, z, mask)


def every_op(
    case: Case, mask: Tensor, *, change: Callable[[Tensor], Tensor] = lambda x: x, backend: str = "cpu"
) -> list[tuple[str, Tensor]]:
    """Results and gradients of all ops on one batch; `change` is applied to every input shaped like the mask."""
    scores = case.per_sequence(1)[0].to(mask.device)
    return every_op_of([*map(change, case.tensors(7))], scores, mask, backend)


def every_op_of(tensors: list[Tensor], scores: Tensor, mask: Tensor, backend: str) -> list[tuple[str, Tensor]]:
    a, b, c, d, e, f, g = tensors
    results = {
        "kl_estimate": with_gradients(ops.kl_estimate, 2)(a, b, kind="k3", backend=backend),
        "gae": ops.gae(a, b, mask, backend=backend),
        "gae2": ops.gae(a, b, mask, holes="decay", value_lam=0.5, backend=backend),
        "whiten": ops.whiten(a, mask, backend=backend),
        "kl_gae": ops.kl_gae(scores, a, b, c, mask, kl_coef=0.1, backend=backend),
        "ppo_loss": with_gradients(ops.ppo_loss, 1)(
            a, b, c, mask, dual_clip=2.0, is_weights=d, entropy=e, entropy_coef=0.1, ref_logprobs=f, kl_coef=0.1,
            weights=g, denom=3.0, backend=backend,
        ),
        "value_loss": with_gradients(ops.value_loss, 1)(a, b, c, mask, backend=backend),
    }  # fmt: skip
    return [(f"{op}/{name}", x) for op, result in results.items() for name, x in parts(result)]


SOME = [
    Case(0, 9, 700, 0.6, True),
    Case(1, 3, 257, 1.0, True),
    Case(2, 40, 33, 0.9, False),
    Case(3, 2, 5000, 0.05, False),
]


def assert_same_bits(first: list[tuple[str, Tensor]], second: list[tuple[str, Tensor]]) -> None:
    for (name, x), (_, y) in zip(first, second, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e38, -7.0])
@pytest.mark.parametrize("case", SOME)
def test_what_is_masked_is_never_read(case: Case, poison: float) -> None:
    mask = case.mask()

    def masked_ops(change: Callable[[Tensor], Tensor] = lambda x: x) -> list[tuple[str, Tensor]]:
        return [x for x in every_op(case, mask, change=change) if not x[0].startswith("kl_estimate")]  # it has no mask

    assert_same_bits(masked_ops(), masked_ops(lambda x: x.where(mask, poison)))


@pytest.mark.parametrize("poison", [torch.nan, 1e38])
def test_a_score_behind_the_last_token_reads_the_value_there_and_nothing_else_masked(poison: float) -> None:
    case = SOME[0]
    mask, (scores,) = case.mask(), case.per_sequence(1)
    a, b, c = case.tensors(3)
    clean = ops.kl_gae(scores, a, b, c, mask, kl_coef=0.1, score_at="after", backend="cpu")
    read = clean.value_mask
    dirty = ops.kl_gae(
        scores, a.where(mask, poison), b.where(mask, poison), c.where(read, poison), mask, kl_coef=0.1,
        score_at="after", backend="cpu",
    )  # fmt: skip
    assert (read & ~mask).any()
    assert_same_bits(parts(clean), parts(dirty))


# The last one is enough work for five threads: none of them starts for less than 16,384 positions.
@pytest.mark.parametrize("case", [*SOME, Case(4, 64, 1500, 0.9, False)])
def test_again_and_with_another_number_of_threads(case: Case) -> None:
    mask, threads = case.mask(), torch.get_num_threads()
    first = every_op(case, mask)
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            assert_same_bits(first, every_op(case, mask))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", SOME)
def test_strided_inputs_and_inputs_stay_as_they_are(case: Case) -> None:
    mask = case.mask()
    inputs = case.tensors(7)
    strided = every_op(case, mask.T.contiguous().T, change=lambda x: torch.stack([x, x], -1)[..., 0])
    assert_same_bits(every_op(case, mask), strided)
    for before, after in zip(inputs, case.tensors(7), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("case", SOME)
def test_padded_and_packed_have_the_same_bits(case: Case) -> None:
    assert_same_bits(*padded_and_packed(case))
    a, b, c = case.tensors(3)
    inside = inside_own_lengths(case)
    mask = case.mask() & inside
    for padded, packed in (
        (
            ops.ppo_loss(a, b, c, mask, backend="cpu"),
            ops.ppo_loss(a[inside], b[inside], c[inside], mask[inside], backend="cpu"),
        ),
        (ops.whiten(a, mask, backend="cpu")[inside], ops.whiten(a[inside], mask[inside], backend="cpu")),
    ):  # fmt: skip
        assert_same_bits(parts(padded), parts(packed))


def inside_own_lengths(case: Case) -> Tensor:
    lengths = torch.randint(0, case.length + 1, (case.count,), generator=torch.Generator().manual_seed(9))
    return torch.arange(case.length) < lengths[:, None]


def padded_and_packed(
    case: Case, device: str = "cpu", backend: str = "cpu"
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """What kl_gae makes of sequences of their own lengths, in rows with padding behind and one after the other."""
    inside = inside_own_lengths(case)
    offsets = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0)).to(device)
    mask, inside = (case.mask() & inside).to(device), inside.to(device)
    a, b, c = (x.to(device) for x in case.tensors(3))
    scores = case.per_sequence(1)[0].to(device)
    results: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
    for holes in ("carry", "decay"):
        options = {"kl_coef": 0.1, "holes": holes, "backend": backend}
        padded = ops.kl_gae(scores, a, b, c, mask, **options)
        packed = ops.kl_gae(scores, a[inside], b[inside], c[inside], mask[inside], cu_seqlens=offsets, **options)
        results[0].extend((name, x[inside]) for name, x in parts(padded))
        results[1].extend(parts(packed))
    return results


def test_results_may_be_given_a_place() -> None:
    case = SOME[0]
    a, b = case.tensors(2)
    mask, out = case.mask(), (torch.full((9, 700), 7.0), torch.full((9, 700), 7.0))
    assert ops.gae(a, b, mask, out=out)[0] is out[0]
    assert_same_bits(parts(out), parts(ops.gae(a, b, mask)))
    arguments, (scores,) = (*case.tensors(3), mask), case.per_sequence(1)
    shaped = ops.kl_gae(scores, *arguments, kl_coef=0.1)
    places = ops.ShapedAdvantages(*torch.full((4, 9, 700), 7.0), torch.ones(9, 700, dtype=torch.bool))
    for backend in ("cpu", "reference"):
        assert ops.kl_gae(scores, *arguments, kl_coef=0.1, out=places, backend=backend) is places
        if backend == "cpu":
            assert_same_bits(parts(places), parts(shaped))
        torch.testing.assert_close(places.tensors(), shaped.tensors())
    whitened = ops.whiten(out[0], mask)
    assert ops.whiten(out[0], mask, out=out[0]) is out[0] and torch.equal(out[0], whitened)
    with pytest.raises(ValueError, match=r"gae: out\[1\] must be contiguous torch.float32"):
        ops.gae(a, b, mask, out=(out[0], out[1].T.contiguous().T))


def test_positions_beyond_two_to_the_31() -> None:
    """The tensors are never touched but for their last tokens, so the system commits next to no memory."""
    size, tokens = 2**31 + 4096, 700
    mask, x = torch.zeros(size, dtype=torch.bool), torch.empty(size)
    mask[-tokens:], x[-tokens:] = True, torch.randn(tokens)
    with torch.no_grad():
        far, metrics = ops.ppo_loss(x, x, x, mask, backend="cpu")
        near, _ = ops.ppo_loss(*(x[-tokens:] for _ in range(3)), mask[-tokens:], backend="cpu")
    assert torch.equal(far, near) and metrics["policy_tokens"] == tokens


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k1+"])
def test_kl_derivatives_at_their_edges(kind: str) -> None:
    """As PyTorch has it: a clamp lets the derivative pass where it touches, |d| has none at 0."""
    d = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    for bounds in (
        {},
        {"clamp_diff": (-1.0, 0.5)},
        {"clamp_value": (-0.5, 0.5)},
        {"clamp_diff": 1.0, "clamp_value": 0.5},
    ):
        ours, exact = (
            with_gradients(ops.kl_estimate, 2)(d, torch.zeros(7), kind=kind, **bounds, backend=backend)
            for backend in ("cpu", "reference")
        )
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)
        assert ops.kl_estimate(d * torch.nan, d, kind=kind, **bounds, backend="cpu").isnan().all()


def test_k3_keeps_its_digits() -> None:
    """exp(-d) - 1 + d loses all of them near 0; elsewhere it needs an exponential as good as float32 allows."""
    size = torch.logspace(-6, 2.3, 20_000)  # to 200: exp is infinite from 88.8 on, and 0
    d = torch.cat([size, -size, torch.tensor([88.7, -88.7, 104.5, -104.5, 0.0])])
    value, (gradient, _) = with_gradients(ops.kl_estimate, 2)(d, torch.zeros_like(d), kind="k3", backend="cpu")
    exact = torch.expm1(-d.double()) + d
    # Next to 88 an ulp of d is 6e-8 of exp(-d) times 88; the formula itself adds three roundings.
    torch.testing.assert_close(value, exact.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, 1.5 * (1 - torch.exp(-d.double())).float(), rtol=1e-6, atol=2e-7)


def test_policy_gradients_vanish_beyond_the_bounds() -> None:
    d = torch.tensor([-40.0, -20.1, -20.0, 20.0, 20.1, 40.0, -40.0, -20.1, -20.0, 20.0, 20.1, 40.0])
    advantages, mask = torch.tensor([1.0] * 6 + [-1.0] * 6), torch.ones(12, dtype=torch.bool)
    _, (ours,) = with_gradients(ops.ppo_loss, 1)(d, torch.zeros(12), advantages, mask, denom=1.5, backend="cpu")
    assert ours.nonzero().squeeze(1).tolist() == [2, 9]
    torch.testing.assert_close(
        ours[[2, 9]], torch.tensor([-20.0, 20.0]).exp() * torch.tensor([-1.0, 1.0]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("place", [0, 100, 700, 1299])
def test_nan_in_a_token_stays_visible_and_alone(place: int, backend: str) -> None:
    x, y, z = torch.randn(3, 1, 1300).unbind()
    x[0, place], mask, others = torch.nan, torch.ones(1, 1300, dtype=torch.bool), torch.arange(1300) != place
    for loss, maximum in ((ops.ppo_loss, "log_ratio_max_abs"), (ops.value_loss, "value_error_sum")):
        (value, metrics), (gradient,) = with_gradients(loss, 1)(x, y, z, mask, backend=backend)
        assert value.isnan() and metrics[maximum].isnan() and gradient[0, others].isfinite().all()
    assert ops.whiten(x, mask, backend=backend).isnan().all()
    assert torch.equal(ops.gae(x, y, mask, backend=backend)[0][0].isnan(), torch.arange(1300) <= place)


def test_denormals_survive() -> None:
    tiny = torch.full((1, 4), 1e-40)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert (ops.gae(tiny, torch.zeros(1, 4), mask, gamma=0.0, backend="cpu")[0] == tiny).all()


def operator_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """Every registered operator with arguments as the front door passes them."""
    case = Case(5, 3, 40, 0.7, True)
    a, b, c, d, e, f, g = case.tensors(7)
    mask, (scores, lam) = case.mask(), case.per_sequence(2)
    inf = float("inf")
    bounds = (-inf, inf, -inf, inf)
    leaf = a.clone().requires_grad_()
    return [
        ("gae", (a, b, mask, lam.double(), None, scores, None, 0.9, 0.0, 0.95, True, True)),
        ("gae_out", (a, b, mask, None, None, None, None, 0.9, 0.9, 0.9, False, False, c.clone(), d.clone())),
        ("whiten", (a, mask, 0, 1e-8, True, True, True)),
        ("whiten_out", (a, mask, 0, 1e-8, True, True, True, c.clone())),
        ("kl_gae", (scores, a, b, c, mask, None, None, None, 2, *bounds, 0.1, inf, True, 0.9, 0.9, False, True)),
        (
            "kl_gae_out",
            (scores, a, b, c, mask, None, None, None, 2, *bounds, 0.1, inf, True, 0.9, 0.9, False, True,
             *(d.clone() for _ in range(4)), mask.clone()),
        ),
        ("kl_estimate", (leaf, b, 3, False, *bounds, True)),
        (
            "ppo_loss",
            (leaf, b, c, mask, d, e.clone().requires_grad_(), f, g, torch.tensor(3.0), -1.0, 0.2, 0.2, 3.0, 0.1, 0.1, 3,
             False, True),
        ),
        ("value_loss", (leaf, b, c, mask, None, None, 5.0, 0.2, True)),
    ]  # fmt: skip


def test_schemas_are_those_of_the_triton_operators() -> None:
    for name, (_, schema) in operators.SCHEMAS.items():
        ours = getattr(torch.ops.rlhf_engine, name).default._schema
        assert str(ours) == str(torch._C.parse_schema(f"rlhf_engine::{name}{schema}"))


@pytest.mark.parametrize("name, arguments", operator_calls(), ids=lambda x: x if isinstance(x, str) else "")
def test_operators_are_registered_as_torch_wants_them(name: str, arguments: tuple[Any, ...]) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    outcome = torch.library.opcheck(getattr(torch.ops.rlhf_engine, name).default, arguments, test_utils=tests)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compiled_functions_give_the_same_bits() -> None:
    assert_same_bits(*eager_and_compiled())


def eager_and_compiled(
    device: str = "cpu", backend: str = "cpu", compiler: str = "inductor"
) -> list[list[tuple[str, Tensor]]]:
    case = Case(6, 5, 300, 0.8, True)
    mask, scores = case.mask().to(device), case.per_sequence(1)[0].to(device)

    def step(new: Tensor, old: Tensor, ref: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        shaped = ops.kl_gae(scores, old, ref, values, mask, kl_coef=0.1, backend=backend)
        policy, metrics = ops.ppo_loss(new, old, shaped.advantages, mask, backend=backend)
        value, _ = ops.value_loss(values * 2, values, shaped.returns, mask, backend=backend)
        kl = ops.kl_estimate(new, ref, kind="k3", backend=backend).where(mask, 0)
        white = ops.whiten(shaped.returns, mask, backend=backend)
        shared = ops.gae(old, values, mask, backend=backend)
        return policy + 0.125 * kl.sum(), policy, value, kl, metrics["approx_kl_k3_sum"], white, *shared

    results = []  # 0.125 times a gradient is exact: a compiler for GPUs may fuse it with the sum that it goes into
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        new, *rest = (x.to(device) for x in case.tensors(4))
        new.requires_grad_()
        out = function(new, *rest)
        out[0].backward()
        results.append([("", x.detach()) for x in (*out[1:], new.grad)])  # the first is torch's own sum
    return results


def test_a_loss_backward_twice_is_pytorchs_own_error() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    loss, _ = ops.ppo_loss(x, x.detach(), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), backend="cpu")
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
def test_a_kept_graph_gives_its_gradient_again(op: str) -> None:
    """The gradient is handed on as it lies where the upstream is 1: later sums into .grad must not reach it."""
    x = torch.randn(5, 7, requires_grad=True)
    mask, others = torch.ones(5, 7, dtype=torch.bool), torch.randn(2, 5, 7)
    loss, _ = getattr(ops, op)(x, *others, mask)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    for times in (2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(x.grad, times * once, rtol=1e-6, atol=0)
    (2 * loss).backward()
    torch.testing.assert_close(x.grad, 5 * once, rtol=1e-6, atol=0)
    assert once.abs().sum() > 0


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    loss, _ = ops.ppo_loss(x, x.detach(), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), backend="cpu")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_what_is_written_to_is_known_to_autograd() -> None:
    x, w, mask = torch.randn(3, 7), torch.randn(3, 7, requires_grad=True), torch.ones(3, 7, dtype=torch.bool)
    for write in (
        lambda: ops.whiten(x, mask, out=x, backend="cpu"),
        lambda: ops.gae(w.detach(), w.detach(), mask, out=(x, torch.empty(3, 7)), backend="cpu"),
    ):
        loss = (w * x).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forward_ad's own
def test_other_derivatives_are_refused_not_lost() -> None:
    x, old = torch.randn(2, 2, 5).unbind()
    mask = torch.ones(2, 5, dtype=torch.bool)
    for function in (
        lambda p: ops.ppo_loss(p, old, old, mask, backend="cpu")[0],
        lambda p: ops.kl_estimate(p, old, backend="cpu").sum(),
    ):
        with pytest.raises(RuntimeError, match="pass backend='reference'"):
            torch.func.jvp(function, (x,), (x,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="pass backend='reference'"):
            function(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("case", SOME)
def test_masks_whose_true_bytes_are_not_1(case: Case) -> None:
    mask = case.mask()
    assert_same_bits(every_op(case, mask), every_op(case, (mask.to(torch.uint8) * 255).view(torch.bool)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_coefficient_of_zero_leaves_its_term_out(backend: str) -> None:
    old, far, mask = torch.zeros(2, 3), torch.full((2, 3), -200.0), torch.ones(2, 3, dtype=torch.bool)
    with_term = ops.ppo_loss(old, old, old + 1, mask, ref_logprobs=-far, kl_coef=0.0, backend=backend)[0]
    assert torch.equal(with_term, ops.ppo_loss(old, old, old + 1, mask, backend=backend)[0])
    shaped = ops.kl_gae(torch.ones(2), far, old, old, mask, kl_coef=0.0, kl_kind="k3", backend=backend)
    assert shaped.rewards[:, -1].tolist() == [1, 1] and not shaped.rewards[:, :-1].any() and shaped.kl.isinf().all()
    nan = torch.tensor(torch.nan)
    assert ops.ppo_loss(old, old, old + 1, mask, denom=nan, backend=backend)[0].isnan()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compiled_for_numbers_that_change() -> None:
    x, mask = torch.randn(3, 4, 6), torch.ones(4, 6, dtype=torch.bool)
    offsets = torch.tensor([0, 10, 24])

    def step(denom: float) -> tuple[Tensor, Tensor]:
        advantages, _ = ops.gae(*x[:2].flatten(1), mask.flatten(), cu_seqlens=offsets, backend="cpu")
        return ops.ppo_loss(*x, mask, denom=denom, backend="cpu")[0], advantages

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for denom in (13.0, 21.0, 34.0):
        assert_same_bits(parts(compiled(denom)), parts(step(denom)))
