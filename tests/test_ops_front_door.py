"""The front door of every loss-side op passes on what it is given, and refuses each argument that does not fit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops, reference
from rlhf_engine.ops import backends, losses
from rlhf_engine.ops.aggregate import MODES

X, Y, Z, W = torch.randn(4, 4, 8).unbind()
MASK, EACH, OFFSETS = torch.ones(4, 8, dtype=torch.bool), torch.rand(4), torch.tensor([0, 3, 32])
POLICY = {
    "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "is_weights": X, "entropy_coef": 0.1, "ref_logprobs": Y,
    "kl_coef": 0.2, "kl_kind": "k2",
}  # fmt: skip
# Every argument of every op, at another value than its default; the first (4, 8) tensor is what others must be like.
DOORS: dict[str, dict[str, Any]] = {
    "kl_estimate": {"logprobs": X, "ref_logprobs": Y, "kind": "k3+", "clamp_diff": 2.0, "clamp_value": (None, 3.0)},
    "gae": {
        "rewards": X, "values": Y, "mask": MASK, "gamma": 0.5, "lam": EACH, "value_lam": EACH, "holes": "decay",
        "bootstrap": EACH, "cu_seqlens": None, "out": (torch.zeros(4, 8), torch.zeros(4, 8)),
    },
    "whiten": {
        "x": X, "mask": MASK, "center": False, "ddof": 1, "eps": 0.5, "eps_mode": "max", "zero_masked": False,
        "out": torch.zeros(4, 8),
    },
    "kl_gae": {
        "scores": EACH, "logprobs": X, "ref_logprobs": Y, "values": Z, "mask": MASK, "kl_coef": 0.1, "kl_kind": "k2",
        "kl_clamp_diff": 1.0, "kl_clamp_value": 2.0, "gamma": 0.5, "lam": EACH, "whiten": False, "score_at": "after",
        "score_clip": 3.0, "holes": "decay", "bootstrap": EACH, "cu_seqlens": None,
        "out": ops.ShapedAdvantages(*torch.zeros(4, 4, 8), MASK.clone()),
    },
    "ppo_loss": {
        "logprobs": X, "old_logprobs": Y, "advantages": Z, "mask": MASK, "entropy": W, "weights": W, "denom": 5.0,
        **POLICY,
    },
    "ppo_token_loss": {"old_logprobs": Y, "advantages": Z, **POLICY},
    "value_loss": {
        "values": X, "old_values": Y, "returns": Z, "mask": MASK, "clip": 0.7, "weights": W, "denom": 5.0
    },
}  # fmt: skip
FLAT = {
    "cu_seqlens": OFFSETS,
    "lam": EACH[:2],
    "value_lam": EACH[2:],
    "bootstrap": EACH[1:3],
    "scores": EACH[:2],
    "out": None,
}
CONSTANTS = {"old_logprobs", "advantages", "is_weights", "ref_logprobs", "old_values", "returns"}  # of the losses


def required(op: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(ops, op)).parameters.values()
    return {p.name: DOORS[op][p.name] for p in parameters if p.default is p.empty}


def packed(op: str) -> dict[str, Any]:
    return {
        name: FLAT[name] if name in FLAT else x.flatten() if isinstance(x, Tensor) else x
        for name, x in DOORS[op].items()
    }


def same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor | ops.ShapedAdvantages) and a == b)


@pytest.fixture
def received(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the backend of CPUs, by name; the argument of the test is the op."""
    op, calls = request.param, list[dict[str, Any]]()
    signature = inspect.signature(getattr(reference, op))

    def record(*tensors: Any, **options: Any) -> None:
        arguments = signature.bind(*tensors, **options).arguments
        calls.append(arguments | arguments.pop("objective", {}))

    if op == "ppo_token_loss":
        monkeypatch.setattr(losses, "PPOTokenLoss", lambda p, a, tensors, options: record(p, a, **tensors, **options))
    else:
        monkeypatch.setitem(backends._TABLE[op], "cpu", record)
    return calls


@pytest.mark.parametrize(("op", "received"), [(op, op) for op in DOORS], ids=DOORS, indirect=["received"])
def test_every_argument_arrives_and_so_do_the_defaults(op: str, received: list[dict[str, Any]]) -> None:
    parameters = inspect.signature(getattr(ops, op)).parameters
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty and p.name != "backend"}
    arguments = [DOORS[op], required(op)] + ([packed(op)] if "cu_seqlens" in DOORS[op] else [])
    for given in arguments:
        getattr(ops, op)(**given)
        arrived, expected = received.pop(), defaults | given
        assert arrived.keys() == expected.keys()
        for name, value in expected.items():
            assert same(arrived[name], value), name
    assert DOORS[op].keys() | {"backend"} >= parameters.keys()


@pytest.mark.parametrize("op", DOORS)
def test_the_reference_alone_has_the_same_defaults(op: str) -> None:
    """All tensors are given, and all coefficients that would be 0 or none; left out are the numbers and the modes."""
    tensors = {name: x for name, x in DOORS[op].items() if isinstance(x, Tensor) and name not in ("lam", "value_lam")}
    given = required(op) | {name: x for name, x in tensors.items() if name not in ("out", "weights")}
    if "mask" in given:
        given["mask"] = (torch.arange(32).view(4, 8) % 5 != 1) & (torch.arange(8) < torch.tensor([[8], [7], [3], [0]]))
    for coefficients in ({}, {"entropy_coef": 0.1, "kl_coef": 0.2} if "entropy_coef" in DOORS[op] else {}):
        door, spec = (getattr(module, op)(**given, **coefficients) for module in (ops, reference))
        if op == "ppo_token_loss":
            door, spec = (function(Z[0], W[0], torch.arange(8, 16)) for function in (door, spec))
        # Metrics are float64, but sums of float32 terms: another CPU's exp rounds them another way.
        torch.testing.assert_close(plain(door), plain(spec), rtol=1.3e-6, atol=1e-5)


def plain(result: Any) -> Any:
    return dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # type: ignore[call-overload]


def misfits() -> Iterator[tuple[str, str, Any, str]]:
    """op, argument, a value that does not fit, and the words that say so."""
    floats = "must be float16, bfloat16, float32 or float64, got torch.int64"
    for op, arguments in DOORS.items():
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and name != "out"}
        first = next(name for name, x in tensors.items() if x.shape == (4, 8))
        for name, x in tensors.items():
            each = x.shape == (4,)
            yield op, name, x.long(), "mask must be torch.bool, got torch.int64" if x is MASK else f"{name} {floats}"
            if name == first:
                continue
            shape = "(3,) must hold one number per sequence: (4,)" if each else f"(3, 8) does not match {first} (4, 8)"
            yield op, name, x[:3], f"{name} {shape}"
            yield op, name, x.to("meta"), f"{name} is on meta, {first} on cpu"
            if name in CONSTANTS and op.endswith("_loss"):
                words = f"{name} requires grad, but the loss treats it as a constant; pass {name}.detach()"
                yield op, name, x.clone().requires_grad_(), words
    for name in ("old_logprobs", "advantages"):
        words = f"{name} requires grad, but the loss treats it as a constant; pass {name}.detach()"
        yield "ppo_token_loss", name, X.clone().requires_grad_(), words


MISFITS = list(misfits())


@pytest.mark.parametrize(
    ("op", "name", "value", "words"), MISFITS, ids=[f"{op}-{words[:40]}" for op, _, _, words in MISFITS]
)
def test_a_tensor_that_does_not_fit_is_named(op: str, name: str, value: Tensor, words: str) -> None:
    given = required(op) | {name: value}
    if name == "weights":
        given["denom"] = 5.0
    with pytest.raises(ValueError) as error:
        getattr(ops, op)(**given)
    assert str(error.value) == f"{op}: {words}"
    if value.requires_grad:
        with torch.no_grad():
            getattr(ops, op)(**given)


UNIT = "must lie between 0 and 1, got"
COUNT = "must be 0 or greater and finite, got"
KINDS = "k1, abs, k2, k3, k1+, abs+, k2+, k3+"
# op, argument, values that are refused, with which words, values that are not
NUMBERS: list[tuple[str, str, list[Any], str, list[Any]]] = [
    ("kl_estimate", "kind", ["full"], f"must be one of {KINDS}, got 'full'", KINDS.split(", ")),
    ("gae", "gamma", [-0.1, 1.1], UNIT, [0, 0.0, 1, 1.0]),
    ("gae", "lam", [-0.1, 1.1], UNIT, [0, 0.0, 1, 1.0]),
    ("gae", "value_lam", [-0.1, 1.1], UNIT, [0, 0.0, 1, 1.0]),
    ("gae", "holes", ["skip"], "must be one of carry, decay, got 'skip'", ["carry", "decay"]),
    ("whiten", "eps", [0.0, -1.0, float("inf")], "must be greater than 0 and finite, got", [1e-12, 2.0]),
    ("whiten", "eps_mode", ["none"], "must be one of add, max, got 'none'", ["add", "max"]),
    ("kl_gae", "gamma", [-0.1, 1.1], UNIT, [0, 1]),
    ("kl_gae", "lam", [-0.1, 1.1], UNIT, [0, 1]),
    ("kl_gae", "holes", ["skip"], "must be one of carry, decay, got 'skip'", ["carry", "decay"]),
    ("kl_gae", "kl_kind", ["full"], f"must be one of {KINDS}, got 'full'", KINDS.split(", ")),
    ("kl_gae", "score_at", ["first"], "must be one of last, after, got 'first'", ["last", "after"]),
    ("kl_gae", "score_clip", [-1.0, float("inf")], COUNT, [0, 0.0, 5.0, None]),
    ("ppo_loss", "clip_low", [-0.1, float("inf")], COUNT, [0, 0.0, 2.0]),
    ("ppo_loss", "clip_high", [-0.1, float("nan")], COUNT, [0, 0.0, 2.0]),
    ("ppo_loss", "dual_clip", [1, 1.0, 0.5], "must be greater than 1, got", [1.5, None]),
    ("ppo_loss", "kl_kind", ["full"], f"must be one of {KINDS}, got 'full'", KINDS.split(", ")),
    ("ppo_loss", "denom", [-1.0], COUNT, [0, 0.0, torch.tensor(-1.0)]),
    ("ppo_token_loss", "clip_low", [-0.1], COUNT, [0.0]),
    ("ppo_token_loss", "clip_high", [-0.1], COUNT, [0.0]),
    ("ppo_token_loss", "dual_clip", [1.0], "must be greater than 1, got", [1.5]),
    ("ppo_token_loss", "kl_kind", ["full"], f"must be one of {KINDS}, got 'full'", ["k1+"]),
    ("value_loss", "clip", [-0.1, float("inf")], COUNT, [0, 0.0, None]),
    ("value_loss", "denom", [-1.0, float("nan")], COUNT, [0.0]),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "wrong", "words", "right"), NUMBERS, ids=[f"{x[0]}-{x[1]}" for x in NUMBERS])
def test_an_option_is_refused_beyond_its_bounds_and_no_earlier(
    op: str, name: str, wrong: list[Any], words: str, right: list[Any]
) -> None:
    for value in wrong:
        with pytest.raises(ValueError) as error:
            getattr(ops, op)(**required(op), **{name: value})
        assert str(error.value) == f"{op}: {name} {words}" + ("" if isinstance(value, str) else f" {value}")
    for value in right:
        getattr(ops, op)(**required(op), **{name: value})


@pytest.mark.parametrize("op", ["ppo_loss", "ppo_token_loss"])
def test_coefficients_need_their_tensors(op: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: kl_coef is 0.5, but ref_logprobs is not given$"):
        getattr(ops, op)(**required(op), kl_coef=0.5)
    getattr(ops, op)(**required(op), kl_coef=0.5, ref_logprobs=Z)
    getattr(ops, op)(**required(op), ref_logprobs=Z)


def test_places_for_results_must_fit() -> None:
    good = torch.zeros(4, 8)
    fits = "must be contiguous torch.float32 without gradient"
    wrong: list[tuple[Tensor, str]] = [
        (good[:3], "(3, 8) does not match {} (4, 8)"), (good.to("meta"), "is on meta, {} on cpu"),
        (good.double(), fits), (good.T.contiguous().T, fits), (good.clone().requires_grad_(), fits),
    ]  # fmt: skip
    for place, words in wrong:
        for name, out in (("out[0]", (place, good)), ("out[1]", (good, place))):
            with pytest.raises(ValueError) as error:
                ops.gae(X, Y, MASK, out=out)
            assert str(error.value) == f"gae: {name} {words.format('rewards')}"
        with pytest.raises(ValueError) as error:
            ops.whiten(X, MASK, out=place)
        assert str(error.value) == f"whiten: out {words.format('x')}"
    with pytest.raises(ValueError, match=r"^gae: out must be \(advantages, returns\), got 1 tensors$"):
        ops.gae(X, Y, MASK, out=(good,))  # type: ignore[arg-type]
    for double in ((X.double(), Y), (X, Y.double())):
        with pytest.raises(ValueError, match=r"^gae: out\[0\] must be contiguous torch.float64 without gradient$"):
            ops.gae(*double, MASK, out=(good, good))
        assert ops.gae(*double, MASK, out=(good.double(), good.double()))[0].any()


def test_a_place_may_touch_an_input_but_not_share_memory() -> None:
    """The input has gaps: 63 numbers from its first to its last, and what lies between counts as its own."""
    memory = torch.randn(200)
    rewards = memory.as_strided((4, 8), (16, 2), 40)
    for begin, fits in ((8, True), (9, False), (39, False), (41, False), (102, False), (103, True)):
        out = (memory[begin : begin + 32].view(4, 8), torch.zeros(4, 8))
        if fits:
            ops.gae(rewards, Y, MASK, out=out)
            continue
        with pytest.raises(ValueError, match=r"^gae: out\[0\] shares memory with rewards; give it memory of its own$"):
            ops.gae(rewards, Y, MASK, out=out)


@pytest.mark.parametrize("op", ["gae", "whiten", "kl_gae"])
def test_a_place_in_the_memory_of_any_input_is_refused(op: str) -> None:
    memory, free = torch.ones(4, 8), torch.zeros(4, 4, 8)
    shared_mask = memory.view(-1).view(torch.bool)[:32].view(4, 8)  # bytes of the first numbers
    first = {"gae": "out[0]", "whiten": "out", "kl_gae": "out.rewards"}[op]
    for name, x in required(op).items():
        if not isinstance(x, Tensor) or x.shape != (4, 8):
            continue
        out = {
            "gae": (memory, free[0]), "whiten": memory,
            "kl_gae": ops.ShapedAdvantages(memory, *free[:3], torch.ones(4, 8, dtype=torch.bool)),
        }  # fmt: skip
        shared = shared_mask if x is MASK else memory.view_as(memory)
        with pytest.raises(ValueError) as error:
            getattr(ops, op)(**required(op) | {name: shared, "out": out[op]})
        assert str(error.value) == f"{op}: {first} shares memory with {name}; give it memory of its own"


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
def test_weights_need_a_denominator_of_one_number(op: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: weights are given without denom; pass the count of the whole batch"):
        getattr(ops, op)(**required(op), weights=W)
    with pytest.raises(ValueError, match=rf"^{op}: denom must be a number or a 0-d tensor, got \(4,\)$"):
        getattr(ops, op)(**required(op), denom=EACH)


@pytest.mark.parametrize("op", ["gae", "kl_gae"])
def test_offsets_must_fit(op: str) -> None:
    """They rise from 0 to the end, by nothing too, and say how many sequences there are."""
    first, given = {"gae": "rewards", "kl_gae": "logprobs"}[op], packed(op)
    rises = f"cu_seqlens must rise from 0 to 32, the length of {first}, got"
    wrong: list[tuple[Tensor, str]] = [
        (torch.tensor([1, 3, 32]), f"{rises} [1, 3, 32]"), (torch.tensor([0, 3, 31]), f"{rises} [0, 3, 31]"),
        (torch.tensor([0, 33, 32]), f"{rises} [0, 33, 32]"),
        (OFFSETS.to("meta"), f"cu_seqlens is on meta, {first} on cpu"),
        (OFFSETS[:0], "cu_seqlens must be (B + 1,) int32 or int64, got (0,) torch.int64"),
        (OFFSETS[None], "cu_seqlens must be (B + 1,) int32 or int64, got (1, 3) torch.int64"),
        (OFFSETS.float(), "cu_seqlens must be (B + 1,) int32 or int64, got (3,) torch.float32"),
    ]  # fmt: skip
    for offsets, words in wrong:
        with pytest.raises(ValueError) as error:
            getattr(ops, op)(**given | {"cu_seqlens": offsets})
        assert str(error.value) == f"{op}: {words}"
    for name in ("lam", "bootstrap"):
        with pytest.raises(ValueError) as error:
            getattr(ops, op)(**given | {name: EACH[:3]})
        assert str(error.value) == f"{op}: {name} (3,) must hold one number per sequence: (2,)"
    for offsets in (torch.tensor([0, 0, 32]), OFFSETS.int()):
        getattr(ops, op)(**given | {"cu_seqlens": offsets})


@pytest.mark.parametrize("function", [ops.token_weights, ops.token_denom])
def test_weights_and_denominators_refuse_alike(function: Callable[..., Tensor]) -> None:
    op = function.__name__
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((MASK, "mean"), {}, f"mode must be one of {', '.join(MODES)}, got 'mean'"),
        ((MASK.float(),), {}, "mask must be torch.bool, got torch.float32"),
        ((MASK[0],), {}, "mask must be (B, T), or (N,) with cu_seqlens, got (8,)"),
        ((MASK,), {"cu_seqlens": OFFSETS}, "mask must be (N,) with cu_seqlens, got (4, 8)"),
    ]  # fmt: skip
    for arguments, options, words in wrong:
        with pytest.raises(ValueError) as error:
            function(*arguments, **options)
        assert str(error.value) == f"{op}: {words}"
    assert torch.equal(function(MASK), function(MASK, "token-mean"))
    assert function(MASK.to("meta"), "token-sum").device.type == "meta"


def test_a_constant_length_is_any_positive_number() -> None:
    for wrong in (None, 0, 0.0, -1.0):
        with pytest.raises(ValueError) as error:
            ops.token_weights(MASK, "constant", constant_length=wrong)
        assert str(error.value) == f"token_weights: constant_length must be greater than 0, got {wrong}"
    assert (ops.token_weights(MASK, "constant", constant_length=0.5) == 2).all()
