"""The C++ operators of the head's softmax, through token_logprobs and by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops, reference
from rlhf_engine.ops.head_operators import SEGMENTS
from rlhf_engine.ops.rows import DEAD

DTYPES = [torch.float32, torch.bfloat16]
REAL = [32_000, 50_257, 128_256, 129_920, 151_936, 262_144]
SEGMENT = 2048
PLAIN = (None, None, None, 1.0, 0.0, 1.0, 0, DEAD)


def case(
    vocabulary: int, dtype: torch.dtype = torch.float32, rows: int = 5, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=g) * scale).to(dtype)
    return logits, torch.randint(vocabulary, (rows,), generator=g)


def score(logits: Tensor, targets: Tensor, backend: str = "cpu", **options: Any) -> list[Tensor]:
    """Log-probs, entropies, and the gradient under upstream ones that differ from row to row."""
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = ops.token_logprobs(leaf, targets, backend=backend, **options)
    count, like = logprobs.numel(), {"dtype": logprobs.dtype, "device": logprobs.device}
    upstream = torch.linspace(-1, 2, max(1, count), **like)[:count]
    (logprobs.flatten() * upstream + entropy.flatten() * upstream.flip(0)).sum().backward()
    return [logprobs.detach(), entropy.detach(), leaf.grad]


def check(logits: Tensor, targets: Tensor, epsilon: float = 3e-7, backend: str = "cpu", **options: Any) -> None:
    """The largest error in float64's terms: at most 1.5 times that of PyTorch in float32, plus some roundings."""
    ours, theirs = (score(logits, targets, name, **options) for name in (backend, "reference"))
    truth = score(logits.double(), targets, "reference", **options)
    for name, our, their, exact in zip(("logprob", "entropy", "gradient"), ours, theirs, truth, strict=True):
        worst = [float((x.double() - exact).abs().amax()) for x in (our, their)]
        assert worst[0] <= 1.5 * worst[1] + epsilon * max(1.0, float(exact.abs().amax())), (name, worst)
        assert our.dtype == their.dtype and our.shape == their.shape
    assert (ours[0] <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_vocabulary(dtype: torch.dtype) -> None:
    for vocabulary in range(1, 301):
        check(*case(vocabulary, dtype), temperature=0.7)


@pytest.mark.parametrize(
    "vocabulary",
    [pytest.param(v + d, marks=pytest.mark.long if d < 1 else ()) for v in REAL for d in (-1, 0, 1)]
    + [SEGMENT - 1, SEGMENT, SEGMENT + 1],
)
def test_real_vocabularies(vocabulary: int) -> None:
    check(*case(vocabulary, torch.bfloat16 if vocabulary % 2 else torch.float32, rows=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1000.0, -1000.0, -87.5])
def test_logits_far_from_zero(dtype: torch.dtype, shift: float) -> None:
    logits, targets = case(SEGMENT + 5, dtype)
    check(logits + shift, targets)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_confident_rows(p: float) -> None:
    for seed in range(20):
        logits = torch.randn(4, 999, generator=torch.Generator().manual_seed(seed))
        logits[:, 7] = logits[:, 8:].logsumexp(1) + torch.tensor(p / (1 - p)).log()
        check(logits.bfloat16(), torch.full((4,), 7))
        check(logits.bfloat16(), torch.full((4,), 8))


def test_banned_tokens_and_what_must_be_seen() -> None:
    logits, targets = case(3 * SEGMENT + 9)
    logits[0, : SEGMENT + 3] = -torch.inf
    logits[1, ::2] = -torch.inf
    logits[2, 1:] = -torch.inf
    targets[:3] = torch.tensor([SEGMENT + 3, 1, 0])
    check(logits, targets)
    banned = targets.clone()
    banned[0] = 0
    for backend in ("cpu", "reference"):
        logprobs, entropy, gradient = score(logits, banned, backend)
        assert logprobs[0] == -torch.inf and entropy[0].isfinite()
        assert not gradient[logits == -torch.inf].any() and gradient[0].isfinite().all() and gradient[0].any()
    logits[1], logits[3, 5], logits[4, 6] = -torch.inf, torch.nan, torch.inf
    ours = score(logits, targets)
    for found in (ours[0], ours[1], ours[2].sum(1)):
        assert torch.equal(found.isnan(), torch.tensor([False, True, False, True, True]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_are_not_read(dtype: torch.dtype) -> None:
    logits, targets = case(300, dtype, rows=6)
    mask = torch.tensor([True, False, True, True, False, True])
    holes = torch.where(torch.arange(6) == 3, -100, targets)
    wild, temperature = logits.clone(), torch.full((6,), 0.5)
    wild[[1, 3, 4]] = torch.nan
    temperature[[1, 4]] = torch.nan
    got, want = (score(x, holes, mask=mask, temperature=temperature) for x in (wild, logits))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and not a[[1, 3, 4]].any() and a[[0, 2, 5]].any()


def test_a_row_of_logits_has_the_same_bits_wherever_it_stands() -> None:
    logits, targets = case(SEGMENT + 77, rows=12)
    wide = torch.zeros(4, 4, SEGMENT + 90)
    wide[:, 1:, 3 : SEGMENT + 80] = logits.view(4, 3, -1)
    view, together = wide[:, 1:, 3 : SEGMENT + 80], score(logits, targets)
    for other in (
        score(view, targets.view(4, 3)),
        score(logits.view(2, 2, 3, -1), targets.view(2, 2, 3)),
        score(logits.T.contiguous().T, targets.int()),
    ):
        for a, b in zip(other, together, strict=True):
            assert torch.equal(a.reshape(b.shape), b)
    with torch.no_grad():
        for row in (0, 7, 11):
            alone = ops.token_logprobs(logits[row], targets[row])
            assert torch.equal(alone[0], together[0][row]) and torch.equal(alone[1], together[1][row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_over_the_logits(dtype: torch.dtype) -> None:
    logits, targets = case(SEGMENT + 5, dtype)
    want = score(logits, targets)[2]
    leaf = torch.zeros(()).to(dtype).requires_grad_()
    made = logits + leaf
    made.retain_grad()
    logprobs, entropy = ops.token_logprobs(made, targets, inplace_backward=True)
    upstream = torch.linspace(-1, 2, 5)
    loss = (logprobs * upstream + entropy * upstream.flip(0)).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(made.grad, want) and torch.equal(made.detach(), want)
    with pytest.raises(RuntimeError, match="a second one needs inplace_backward=False"):
        loss.backward()


def test_who_else_needs_the_logits_notices() -> None:
    logits, targets = case(50)
    leaf = logits.requires_grad_()
    made = leaf * 1.0
    other = made.square().sum()  # its backward reads them
    logprobs, _ = ops.token_logprobs(made, targets, inplace_backward=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("vocabulary", [1, 300, 3 * SEGMENT + 1])
def test_extras(vocabulary: int) -> None:
    logits, targets = case(vocabulary, rows=7)
    logits[2] = logits[2].round()  # ties
    mask = torch.arange(7) != 3
    for backend in ("cpu", "reference"):
        *_, found = ops.token_logprobs(
            logits, targets, mask=mask, extras=("sum_p_squared", "top1"), temperature=0.7, backend=backend
        )
        p = (logits.double() / 0.7).softmax(1)
        assert list(found) == ["sum_p_squared", "top1"] and found["top1"].dtype == torch.int64
        torch.testing.assert_close(found["sum_p_squared"].double(), (p * p).sum(1) * mask, rtol=1e-5, atol=0)
        # The first of several, as nonzero finds it; argmax promises none.
        first = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits])
        assert torch.equal(found["top1"], first * mask) or backend == "reference"
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=g), torch.randn(vocabulary, 8, generator=g)
    *plain, found = ops.linear_logprobs(hidden, weight, targets, extras=["top1", "sum_p_squared"])
    *_, want = ops.token_logprobs(hidden @ weight.T, targets, extras=["top1", "sum_p_squared"])
    assert torch.equal(found["top1"], want["top1"])
    torch.testing.assert_close(found["sum_p_squared"], want["sum_p_squared"])
    for a, b in zip(plain, ops.linear_logprobs(hidden, weight, targets), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^token_logprobs: extras must be one of top1, sum_p_squared, got 'top5'"):
        ops.token_logprobs(logits, targets, extras=["top5"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
def test_parts_of_a_vocabulary_merge(backend: str, logits_dtype: str) -> None:
    """Three ranks, one of which holds nothing but banned tokens."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 16, generator=g), torch.randn(SEGMENT + 500, 16, generator=g)
    bias = torch.randn(SEGMENT + 500, generator=g).index_fill(0, torch.arange(90, 300), -torch.inf)
    hidden, weight, bias = (x.bfloat16() for x in (hidden, weight, bias))
    targets = torch.tensor([[0, 89, 300, SEGMENT + 499, 5, 400], [7] * 6])
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 2.0, "logit_scale": 1.1, "logits_dtype": logits_dtype}
    options["mask"] = torch.arange(12).view(2, 6) != 8
    stats = [
        ops.linear_logprob_stats(
            hidden, weight[a:b], targets, bias=bias[a:b], vocabulary_start=a, backend=backend, **options
        )
        for a, b in ((0, 90), (90, 300), (300, SEGMENT + 500))
    ]
    assert torch.equal(stats[0][3] == -torch.inf, (targets >= 90) & options["mask"])
    want = ops.linear_logprobs(hidden, weight, targets, bias=bias, backend="reference", **options)
    for got, expected in zip(ops.merge_logprob_stats(stats), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no gradient flows to weight; call it under"):
        ops.linear_logprob_stats(hidden, weight.requires_grad_(), targets)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_part_of_a_vocabulary_ignores_what_the_whole_ignores(backend: str) -> None:
    """ignore_index is compared with a target as given: the token 100 below a part's first is not ignored there."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=g), torch.randn(300, 8, generator=g)
    targets = torch.tensor([0, 100, -100, 299])
    stats = [
        ops.linear_logprob_stats(hidden, weight[a : a + 100], targets, vocabulary_start=a, backend=backend)
        for a in (0, 100, 200)
    ]
    for part in stats:
        assert not any(x[2] for x in part) and part[0][:2].all()
    want = ops.linear_logprobs(hidden, weight, targets, backend="reference")
    for got, expected in zip(ops.merge_logprob_stats(stats), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_columns_in_one_tile_or_in_several() -> None:
    """To the last bit, with everything that belongs to a column."""
    logits, targets = case(3 * SEGMENT + 9, torch.bfloat16)
    bias, own = torch.randn(3 * SEGMENT + 9), torch.randn(5)
    call, upstream = torch.ops.rlhf_engine, (torch.randn(5), torch.randn(5))
    whole = (bias, None, own, 1.2, 20.0, 0.7, 0, DEAD)
    parts = call.head_fold(logits, targets, *whole, True)
    statistics = call.head_combine(parts, targets, 0, 3 * SEGMENT + 9, DEAD)
    gradient = torch.empty(logits.shape)
    call.head_gradient(logits, targets, statistics, *upstream, *whole, gradient)
    for start, stop in ((0, SEGMENT), (SEGMENT, 3 * SEGMENT), (3 * SEGMENT, 3 * SEGMENT + 9)):
        tile = (bias[start:stop].clone(), None, own, 1.2, 20.0, 0.7, start, DEAD)
        columns = logits[:, start:stop]
        assert torch.equal(call.head_fold(columns, targets, *tile, True), parts[start // SEGMENT : -(-stop // SEGMENT)])
        out = torch.empty(columns.shape)
        call.head_gradient(columns, targets, statistics, *upstream, *tile, out)
        assert torch.equal(out, gradient[:, start:stop])


def test_temperatures_by_row() -> None:
    logits, targets = case(300, rows=6)
    each = torch.tensor([0.5, 1.0, 2.0, 0.5, 3.0, 1.0])
    ours = score(logits, targets, temperature=each)
    upstream = torch.linspace(-1, 2, 6)
    for row, t in enumerate(each.tolist()):
        leaf = logits[row : row + 1].clone().requires_grad_()
        alone = ops.token_logprobs(leaf, targets[row : row + 1], temperature=t)
        (alone[0] * upstream[row] + alone[1] * upstream[5 - row]).sum().backward()
        for a, b in zip(ours, (*alone, leaf.grad), strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-6)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^token_logprobs: temperature must be greater than 0 and finite, got"):
            ops.token_logprobs(logits, targets, temperature=each.index_fill(0, torch.tensor(3), wrong))
    with pytest.raises(ValueError, match="temperature requires grad"):
        ops.token_logprobs(logits, targets, temperature=each.requires_grad_())


def test_numbers_by_row_and_by_token_have_any_stride() -> None:
    logits, targets = case(300, rows=6)
    spread, one = torch.rand(12)[::2] + 0.5, torch.tensor([0.7]).expand(6)
    for each in (spread, one):
        got = ops.token_logprobs(logits, targets, temperature=each)[0]
        assert torch.equal(got, ops.token_logprobs(logits, targets, temperature=each.clone())[0])
    weight = torch.randn(300, 8)
    for bias in (torch.randn(600)[::2], torch.ones(1).expand(300)):
        got = ops.linear_logprobs(logits[:, :8], weight, targets, bias=bias)[0]
        assert torch.equal(got, ops.linear_logprobs(logits[:, :8], weight, targets, bias=bias.clone())[0])


def test_a_target_that_is_not_there_is_never_a_plausible_number() -> None:
    """The front door refuses it; the operators, which a graph may call without, give NaN in that row alone."""
    logits, targets = case(300, rows=4)
    targets[1:3] = torch.tensor([300, -1])
    call = torch.ops.rlhf_engine
    statistics = call.head_combine(call.head_fold(logits, targets, *PLAIN, False), targets, 0, 300, DEAD)
    gradient = torch.empty_like(logits)
    call.head_gradient(logits, targets, statistics, torch.ones(4), None, *PLAIN, gradient)
    for found in (statistics[0], statistics[1], gradient.sum(1)):
        assert torch.equal(found.isnan(), torch.tensor([False, True, True, False]))
    assert statistics[2:5].isfinite().all()  # what other parts of a vocabulary are merged with


def test_no_upstream_gradient_no_gradient_whatever_the_row_holds() -> None:
    logits, targets = case(300, rows=4)
    logits[1], logits[2] = torch.nan, -torch.inf
    leaf = logits.requires_grad_()
    logprobs, _ = ops.token_logprobs(leaf, targets)
    torch.where(torch.tensor([True, False, False, True]), logprobs, 0).sum().backward()
    assert not leaf.grad[1:3].any() and leaf.grad[[0, 3]].any() and leaf.grad.isfinite().all()


def test_nothing_to_score() -> None:
    for shape in ((0, 7), (0, 3, 7), (2, 0, 7)):
        ours = score(torch.empty(shape), torch.empty(shape[:-1], dtype=torch.long))
        assert [x.shape for x in ours] == [shape[:-1], shape[:-1], shape]


def samples(operator: str, namespace: str = "rlhf_engine", device: str = "cpu") -> list[tuple[Any, ...]]:
    vocabulary, call, found = SEGMENTS[namespace] + 9, getattr(torch.ops, namespace), []
    logits, targets = (x.to(device) for x in case(vocabulary))
    bias, each, exact = (x.to(device) for x in (torch.randn(vocabulary), torch.rand(5) + 0.5, torch.randn(5)))
    upstream = torch.randn(5).to(device), None
    for options in (PLAIN, (bias, each, exact, 1.5, 30.0, 1.0, 0, DEAD)):
        for z in (logits, logits.bfloat16(), logits[None].expand(1, 5, -1)):
            parts = call.head_fold(z, targets, *options, True)
            statistics = call.head_combine(parts, targets, 0, vocabulary, DEAD)
            found.append({
                "head_fold": (z, targets, *options, False), "head_combine": (parts, targets, 0, vocabulary, DEAD),
                "head_gradient": (z, targets, statistics, *upstream, *options, torch.empty_like(logits.view(z.shape))),
                "target_logits": (z.flatten(0, -2), z.flatten(0, -2), targets % 5, DEAD),
                "head_scale": (logits.clone(), exact[0]),
            }[operator])  # fmt: skip
    return found


@pytest.mark.parametrize("operator", ["head_fold", "head_combine", "head_gradient"])
def test_operators_are_registered_as_torch_wants_them(operator: str) -> None:
    for arguments in samples(operator):
        torch.library.opcheck(getattr(torch.ops.rlhf_engine, operator).default, arguments)


@pytest.mark.parametrize("change", [{0: "float64"}, {0: "columns"}, {1: "int32"}, {1: "short"}, {-1: "short"}])
def test_operators_refuse_what_they_would_misread(change: dict[int, str]) -> None:
    ((place, how),) = change.items()
    arguments = list(samples("head_gradient")[0])
    wrong = {
        "float64": lambda x: x.double(), "columns": lambda x: x.T.contiguous().T, "int32": lambda x: x.int(),
        "short": lambda x: x[:-1],
    }  # fmt: skip
    arguments[place] = wrong[how](arguments[place])
    with pytest.raises(RuntimeError, match="must|has size"):
        torch.ops.rlhf_engine.head_gradient(*arguments)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")  # torch.compile does
def test_compiled_and_eager_have_the_same_bits() -> None:
    logits, targets = case(SEGMENT + 9)

    def both(x: Tensor, y: Tensor) -> Tensor:
        logprobs, entropy = ops.token_logprobs(x, y, temperature=0.7)
        return (logprobs * 0.5 + entropy).sum()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    results = []
    for function in (both, compiled):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, targets)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_peak_memory_does_not_grow_with_the_vocabulary() -> None:
    """With a budget of one tile, the tensors alive at once are the inputs and that tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.bytes = max(self.bytes, x.untyped_storage().nbytes())
            return out

    seen = []
    for vocabulary in (10_000, 30_000):
        hidden, weight = torch.randn(700, 4), torch.randn(vocabulary, 4)
        with Largest() as largest, torch.no_grad():
            ops.linear_logprobs(hidden, weight, torch.randint(vocabulary, (700,)), memory_budget=1)
        seen.append(largest.bytes)
    assert seen[0] == seen[1] == 64 * SEGMENT * 4


def test_the_reference_knows_all_this() -> None:
    """gradcheck in float64, of everything the fast backends are compared with."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    temperature = torch.rand(4, generator=g, dtype=torch.float64) + 0.5

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return reference.linear_logprobs(
            *tensors[:2], torch.tensor([0, 6, 3, -100]), bias=tensors[2], temperature=temperature, softcap=2.0,
            logit_scale=1.3,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
