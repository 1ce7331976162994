"""The "cpu" backend of linear_logprobs against the reference: as exact, and untouched by what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_engine import ops, reference
from rlhf_engine.ops import backends, tiles
from rlhf_engine.ops.tiles import SHAPES

ROW_TILE, TALLEST, SEGMENT = SHAPES["cpu"].rows, SHAPES["cpu"].tallest, SHAPES["cpu"].tokens

DTYPES = [torch.float32, torch.bfloat16]
ROWS = ROW_TILE + 7  # one full tile, and a tail that does not fill a vector register
SMALL, LARGE = 131, SEGMENT + 907  # prime-ish vocabularies: within one segment, and over two


def case(vocabulary: int, dtype: torch.dtype, rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    parts = {"hidden": (rows, 24), "weight": (vocabulary, 24), "bias": (vocabulary,)}
    made = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in parts.items()}
    return made | {"targets": torch.randint(0, vocabulary, (rows,), generator=g)}


def run(
    backend: str,
    tensors: dict[str, Tensor],
    *,
    entropy_gradient: bool = True,
    logprob_gradient: bool = True,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """Values, and gradients under upstream gradients that differ from row to row."""
    leaves = {k: v.clone().requires_grad_(k not in frozen) for k, v in tensors.items() if k != "targets"}
    logprobs, entropy = ops.linear_logprobs(targets=tensors["targets"], backend=backend, **leaves, **options)
    upstream = torch.linspace(-1, 2, logprobs.numel()).view(logprobs.shape)
    loss = (logprobs * upstream).sum() * logprob_gradient + (
        (entropy * upstream.flip(0)).sum() if entropy_gradient else 0
    )
    if loss.requires_grad:
        loss.backward()
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach()} | {k: v.grad for k, v in leaves.items()}


def error(got: Tensor | None, truth: Tensor | None) -> float:
    assert got is not None and truth is not None
    return float((got.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_the_reference_in_the_same_dtype(
    dtype: torch.dtype, vocabulary: int, entropy_gradient: bool
) -> None:
    tensors = case(vocabulary, dtype)
    truth = run("reference", {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()},
                entropy_gradient=entropy_gradient)  # fmt: skip
    theirs = run("reference", tensors, entropy_gradient=entropy_gradient)
    ours = run("cpu", tensors, entropy_gradient=entropy_gradient)
    for name in ours:
        assert error(ours[name], truth[name]) <= 1.5 * error(theirs[name], truth[name]) + 1e-9, name
        assert ours[name].dtype == theirs[name].dtype


@pytest.mark.parametrize(
    "options", [{"temperature": 0.6}, {"logit_scale": 0.25}, {"temperature": 2.0, "logit_scale": 3.0}]
)
def test_scale_reaches_values_and_gradients(options: dict[str, float]) -> None:
    tensors = case(SMALL, torch.float32)
    ours, theirs = run("cpu", tensors, **options), run("reference", tensors, **options)
    plain = run("cpu", tensors)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours[name], plain[name], rtol=1e-2), name


def test_only_entropy_has_a_gradient() -> None:
    tensors = case(SMALL, torch.float32)
    ours, theirs = (run(b, tensors, logprob_gradient=False) for b in ("cpu", "reference"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen: tuple[str, ...]) -> None:
    tensors = case(SMALL, torch.bfloat16)
    ours, all_trained = run("cpu", tensors, frozen=frozen), run("cpu", tensors)
    for name in ours:
        if name in frozen:
            assert ours[name] is None
        else:
            assert torch.equal(ours[name], all_trained[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_tokens(dtype: torch.dtype) -> None:
    tensors = case(LARGE, dtype)
    banned = slice(3, SEGMENT + 60)  # a whole segment, and some of the next
    tensors["bias"][banned] = -torch.inf
    tensors["targets"] = tensors["targets"].clamp(min=banned.stop)
    ours, theirs = run("cpu", tensors), run("reference", tensors)
    truth = run("reference", {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()})
    for name in ours:
        assert error(ours[name], truth[name]) <= 1.5 * error(theirs[name], truth[name]) + 1e-9, name
    assert not ours["weight"][banned].any() and not ours["bias"][banned].any()
    tensors["bias"][:] = -torch.inf  # nothing is left to choose
    assert all(run("cpu", tensors)[name].isnan().all() for name in ("logprobs", "entropy"))


@pytest.mark.parametrize("row", [0, 40, ROWS - 1])
def test_a_nan_row_is_visible_and_stays_in_its_row(row: int) -> None:
    tensors = case(SMALL, torch.float32)
    clean = run("cpu", tensors)
    tensors["hidden"] = tensors["hidden"].index_fill(0, torch.tensor([row]), torch.nan)
    ours = run("cpu", tensors)
    others = torch.arange(ROWS) != row
    for name in ("logprobs", "entropy", "hidden"):
        assert ours[name][row].isnan().all(), name
        assert torch.equal(ours[name][others], clean[name][others]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_change_no_bit(dtype: torch.dtype) -> None:
    tensors, wild = case(SMALL, dtype, rows=90), case(SMALL, dtype, rows=90)
    mask = torch.rand(90, generator=torch.Generator().manual_seed(1)) < 0.8
    ignored = torch.arange(90) % 11 == 5
    wild["hidden"][~mask] = torch.nan
    wild["hidden"][ignored] = torch.inf
    wild["targets"][~mask] = 10**9
    for each in (tensors, wild):
        each["targets"][ignored] = -100
    ours, poisoned = run("cpu", tensors, mask=mask), run("cpu", wild, mask=mask)
    for name in ours:
        assert torch.equal(ours[name], poisoned[name]), name
    for name in ("logprobs", "entropy", "hidden"):
        assert not ours[name][~mask | ignored].any() and ours[name][mask & ~ignored].any(), name


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_score(rows: int) -> None:
    ours = run("cpu", case(SMALL, torch.float32, rows=rows), mask=torch.zeros(rows, dtype=torch.bool))
    assert ours["logprobs"].shape == ours["entropy"].shape == (rows,)
    for name, value in ours.items():
        assert not value.any(), name


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocabulary: int, agree: bool
) -> None:
    """Also where products of different heights do not agree, or are not said to."""
    if not agree:
        monkeypatch.setattr("rlhf_engine.ops.tiles.heights_agree", lambda *shape: False)
    rows = 2 * TALLEST + 3
    tensors = case(vocabulary, dtype, rows=rows)
    upstream = torch.linspace(-1, 2, rows)

    def score(index: Tensor) -> tuple[Tensor, ...]:
        hidden = tensors["hidden"][index].requires_grad_()
        out = ops.linear_logprobs(
            hidden, tensors["weight"], tensors["targets"][index], bias=tensors["bias"], backend="cpu"
        )
        (out[0] * upstream[index] + out[1] * upstream[index]).sum().backward()
        return out[0].detach(), out[1].detach(), hidden.grad

    everything = score(torch.arange(rows))
    generator = torch.Generator().manual_seed(2)
    for count in (1, 2, 7, 8, 63, 64, 65, 257, 512, 513):
        index = torch.randperm(rows, generator=generator)[:count]
        for got, want in zip(score(index), everything, strict=True):
            assert torch.equal(got, want[index]), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_grad_mode_change_no_bit(dtype: torch.dtype) -> None:
    tensors = case(SMALL, dtype, rows=66)
    with torch.no_grad():
        flat = ops.linear_logprobs(**tensors, backend="cpu")
        nested = ops.linear_logprobs(
            tensors["hidden"].view(6, 11, -1), tensors["weight"], tensors["targets"].view(6, 11).int(),
            bias=tensors["bias"], backend="cpu",
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            inside = ops.linear_logprobs(**tensors, backend="cpu")
    trained = run("cpu", tensors)
    for i, name in enumerate(("logprobs", "entropy")):
        assert torch.equal(flat[i], trained[name])
        assert torch.equal(nested[i].view(-1), flat[i]) and nested[i].shape == (6, 11)
        assert torch.equal(inside[i], flat[i])


def test_a_graph_can_be_walked_twice_but_not_differentiated_twice() -> None:
    tensors = case(SMALL, torch.float32)
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if k != "targets"}
    logprobs, entropy = ops.linear_logprobs(targets=tensors["targets"], backend="cpu", **leaves)
    loss = (logprobs.square() + entropy).sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (once,) = torch.autograd.grad(loss, [leaves["hidden"]], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()


def test_float64_is_the_references() -> None:
    tensors = case(SMALL, torch.float64)
    ours, theirs = (run(b, tensors, softcap=5.0, temperature=0.7) for b in ("cpu", "reference"))
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype == torch.float64, name


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("softcap", [None, 5.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_caps_scales_and_narrow_logits(dtype: torch.dtype, softcap: float | None, logits_dtype: str) -> None:
    """The last cap is far below most logits, where tanh is flat."""
    tensors = case(LARGE, dtype)
    options = {"softcap": softcap, "logit_scale": 1.5, "logits_dtype": logits_dtype}
    options["temperature"] = torch.linspace(0.5, 2, ROWS)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    truth = run("reference", exact, **options)
    theirs, ours = (run(backend, tensors, **options) for backend in ("reference", "cpu"))
    for name in ours:
        # Gradients pass through a product of rounded factors, in another order; at the cap they all but vanish.
        slack = 1e-9 if logits_dtype == "float32" else 2e-3 * float(truth[name].abs().amax())
        assert error(ours[name], truth[name]) <= 1.5 * error(theirs[name], truth[name]) + slack, name
        assert ours[name].dtype == theirs[name].dtype, name
    assert (ours["logprobs"] <= 0).all()
    if logits_dtype == "input":  # the same rounding, but for products that end next to a tie; the target has none
        torch.testing.assert_close(ours["logprobs"], theirs["logprobs"], rtol=0, atol=2e-3)


def test_it_is_the_default_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case(SMALL, torch.float32)
    for name in ("linear_logprobs", "linear_policy_loss"):
        assert "cpu" in ops.available(name)
        monkeypatch.setitem(backends._TABLE[name], "reference", None)  # would fail if it were taken
    assert torch.equal(ops.linear_logprobs(**tensors)[0], ops.linear_logprobs(**tensors, backend="cpu")[0])
    assert policy_loss(None, tensors)["loss"] == policy_loss("cpu", tensors)["loss"]


def policy_loss(
    backend: str | None,
    tensors: dict[str, Tensor],
    *,
    entropy_coef: float = 0.1,
    upstream: float = 1.0,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """Loss, metrics and gradients of PPO with ratios on both sides of the clip."""
    leaves = {k: v.clone().requires_grad_(k not in frozen) for k, v in tensors.items() if k != "targets"}
    g = torch.Generator().manual_seed(5)
    noise, advantages = (torch.randn(tensors["targets"].shape, generator=g) for _ in range(2))
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    old = (
        reference.linear_logprobs(**exact, temperature=options.get("temperature", 1.0))[0].detach().float()
        + 0.3 * noise
    )
    token_loss = ops.ppo_token_loss(old, advantages, entropy_coef=entropy_coef)
    loss, metrics = ops.linear_policy_loss(
        targets=tensors["targets"], token_loss=token_loss, backend=backend, **leaves, **options
    )
    if loss.requires_grad:
        (loss * upstream).backward()
    return {"loss": loss.detach(), **metrics} | {k: v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_is_no_worse_than_the_reference(dtype: torch.dtype, vocabulary: int, entropy_coef: float) -> None:
    tensors = case(vocabulary, dtype)
    options = {
        "mask": torch.arange(ROWS) % 5 != 0, "weights": torch.linspace(0.5, 2, ROWS), "denom": 31.0,
        "temperature": 0.8, "entropy_coef": entropy_coef,
    }  # fmt: skip
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    truth, theirs, ours = (
        policy_loss(backend, case_, **options)
        for backend, case_ in (("reference", exact), ("reference", tensors), ("cpu", tensors))
    )
    assert ours.keys() == truth.keys()
    for name in ours:
        # A sum of a few hundred terms may be lucky in either; the gradients have many entries.
        luck = 1e-9 if name in ("hidden", "weight", "bias") else 1e-5 * float(truth[name].abs())
        assert error(ours[name], truth[name]) <= 1.5 * error(theirs[name], truth[name]) + luck, name
        assert ours[name].dtype == theirs[name].dtype, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_folds_as_log_probs_do(dtype: torch.dtype) -> None:
    """To the last bit: this is why the ratio is exactly 1 before the first step."""
    tensors = case(LARGE, dtype)
    seen = {}

    def keep(logprobs: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
        seen[len(rows)] = (logprobs.detach(), entropy.detach())
        return -logprobs

    loss, _ = ops.linear_policy_loss(
        tensors["hidden"].requires_grad_(), tensors["weight"], tensors["targets"], keep, bias=tensors["bias"]
    )
    assert loss.requires_grad
    for ours, scored in zip(seen[ROWS], ops.linear_logprobs(**tensors), strict=True):
        assert torch.equal(ours, scored.detach())


def test_policy_loss_scales_with_what_follows_it() -> None:
    tensors = case(SMALL, torch.float32)
    once, scaled = policy_loss("cpu", tensors), policy_loss("cpu", tensors, upstream=-3.0)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(scaled[name], -3 * once[name])


@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")])
def test_policy_loss_gives_frozen_inputs_nothing(frozen: tuple[str, ...]) -> None:
    tensors = case(SMALL, torch.bfloat16)
    ours, all_trained = policy_loss("cpu", tensors, frozen=frozen), policy_loss("cpu", tensors)
    for name in ours:
        if name in frozen:
            assert ours[name] is None
        elif len(frozen) < 3 or name not in ("hidden", "weight", "bias"):
            assert torch.equal(ours[name], all_trained[name]), name


@pytest.mark.parametrize("rows", [0, 5])
def test_policy_loss_of_nothing(rows: int) -> None:
    ours = policy_loss("cpu", case(SMALL, torch.float32, rows=rows), mask=torch.zeros(rows, dtype=torch.bool))
    assert all(not value.any() for value in ours.values())


def test_policy_loss_without_the_log_probs() -> None:
    """A loss that does not read them, or that nothing trains, is a loss all the same."""
    tensors = case(SMALL, torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    loss, _ = ops.linear_policy_loss(hidden, tensors["weight"], tensors["targets"], lambda p, e, r: e)
    loss.backward()
    only_entropy = hidden.grad.clone()
    hidden.grad = None
    (ops.linear_logprobs(hidden, tensors["weight"], tensors["targets"])[1].mean()).backward()
    torch.testing.assert_close(only_entropy, hidden.grad)
    hidden.grad = None
    constant, _ = ops.linear_policy_loss(hidden, tensors["weight"], tensors["targets"], lambda p, e, r: p.detach())
    constant.backward()
    assert not hidden.grad.any()


def test_counted_products() -> None:
    """In NHV: log-probs 2 forward, 6 with the backward through a frozen head, 8 with dW; a policy loss 2, 4, 6."""
    tensors = case(LARGE, torch.float32, rows=ROW_TILE)

    def loss(**leaves: Tensor) -> Tensor:
        return ops.linear_policy_loss(token_loss=lambda p, e, rows: -p, backend="cpu", **leaves)[0]

    def summed(**leaves: Tensor) -> Tensor:
        return ops.linear_logprobs(backend="cpu", **leaves)[0].sum()

    for function, trained, want in (
        (summed, (), 2), (summed, ("hidden",), 6), (summed, ("hidden", "weight"), 8),
        (loss, (), 2), (loss, ("hidden",), 4), (loss, ("hidden", "weight"), 6), (loss, ("weight",), 4),
    ):  # fmt: skip
        leaves = {k: v.clone().requires_grad_(k in trained) for k, v in tensors.items()}
        with FlopCounterMode(display=False) as counter:
            result = function(**leaves)
            if trained:
                result.backward()
        assert counter.get_total_flops() == want * ROW_TILE * 24 * LARGE, (function, trained)


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_products_look_alike_in_every_op(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a result lies may decide how a library sums, so scoring and training must not differ in it."""
    seen = []
    plain = tiles.product

    def watched(a: Tensor, b: Tensor, out: Tensor) -> None:
        if out.shape[1] != 24:  # logits, not a gradient of weights
            seen.append((out.shape, out.stride(), out.data_ptr() % 32))
        plain(a, b, out)

    monkeypatch.setattr(tiles, "product", watched)
    tensors = case(vocabulary, torch.float32)
    run("cpu", tensors)
    scored, seen = seen, []
    token_loss = ops.ppo_token_loss(torch.zeros(ROWS), torch.ones(ROWS))
    weight = tensors.pop("weight").requires_grad_()
    ops.linear_policy_loss(weight=weight, token_loss=token_loss, **tensors)
    assert scored == seen * 2  # forward and backward, and one forward
    assert {stride for _, (stride, _), _ in seen} == {144 if vocabulary == SMALL else SEGMENT}
    assert not any(place for _, _, place in seen)
