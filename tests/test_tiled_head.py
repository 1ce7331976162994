"""The "cpu" backend of linear_logprobs against the reference: as exact, and untouched by what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops, reference
from rlhf_engine.ops import tiled_head
from rlhf_engine.reference import ROW_TILE

DTYPES = [torch.float32, torch.bfloat16]
ROWS = ROW_TILE + 7  # one full tile, and a tail that does not fill a vector register
SMALL, LARGE = 131, tiled_head.WEIGHT_SEGMENT + 907  # prime-ish vocabularies: within one segment, and over two


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
    tensors = case(SMALL, dtype)
    tensors["bias"][3:60] = -torch.inf
    tensors["targets"] = tensors["targets"].clamp(min=60)
    ours, theirs = run("cpu", tensors), run("reference", tensors)
    for name in ours:
        assert ours[name].isfinite().all(), name
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=3e-2, atol=3e-2)
    assert not ours["weight"][3:60].any() and not ours["bias"][3:60].any()
    without = {k: torch.cat([v[:3], v[60:]]) if k in ("weight", "bias") else v for k, v in tensors.items()}
    without["targets"] = tensors["targets"] - 57
    torch.testing.assert_close(run("cpu", without)["entropy"], ours["entropy"], rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_wherever_it_stands(dtype: torch.dtype, vocabulary: int) -> None:
    tensors = case(vocabulary, dtype, rows=2 * ROW_TILE + 3)
    upstream = torch.linspace(-1, 2, 2 * ROW_TILE + 3)

    def score(index: Tensor) -> tuple[Tensor, ...]:
        hidden = tensors["hidden"][index].requires_grad_()
        out = ops.linear_logprobs(
            hidden, tensors["weight"], tensors["targets"][index], bias=tensors["bias"], backend="cpu"
        )
        (out[0] * upstream[index] + out[1] * upstream[index]).sum().backward()
        return out[0].detach(), out[1].detach(), hidden.grad

    everything = score(torch.arange(2 * ROW_TILE + 3))
    generator = torch.Generator().manual_seed(2)
    for count in (1, 2, 7, 8, 63, 64, 65, 131):
        index = torch.randperm(2 * ROW_TILE + 3, generator=generator)[:count]
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


@pytest.mark.parametrize(
    ("dtype", "softcap"), [(torch.float16, None), (torch.float64, None), (torch.float32, 5.0), (torch.bfloat16, 5.0)]
)
def test_rare_inputs_are_the_references(dtype: torch.dtype, softcap: float | None) -> None:
    tensors = case(SMALL, dtype)
    ours, theirs = (run(b, tensors, softcap=softcap, temperature=0.7) for b in ("cpu", "reference"))
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype, name


def test_it_is_the_default_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" in ops.available("linear_logprobs")
    tensors = case(SMALL, torch.float32)
    monkeypatch.setattr(reference, "linear_logprobs", None)  # would fail if it were taken
    assert torch.equal(ops.linear_logprobs(**tensors)[0], ops.linear_logprobs(**tensors, backend="cpu")[0])
