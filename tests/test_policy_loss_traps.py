"""What comes of making a gradient in the forward: once, without a second product, and never a wrong one in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rlhf_engine import ops, reference
from rlhf_engine.ops.tiles import SHAPES

TILE = SHAPES["cpu"]
N, H, V = TILE.rows + 9, 24, TILE.tokens + 107
BACKENDS = ("cpu", "reference")


def case(rows: int = N, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {
        "hidden": torch.randn(rows, H, generator=g).to(dtype).requires_grad_(),
        "weight": torch.randn(V, H, generator=g).to(dtype).requires_grad_(),
        "targets": torch.randint(V, (rows,), generator=g),
    }
    old = reference.linear_logprobs(*(x.detach() for x in made.values()))[0] + 0.3 * torch.randn(rows, generator=g)
    made["token_loss"] = ops.ppo_token_loss(old, torch.randn(rows, generator=g), entropy_coef=0.1)
    return made


def gradients(made: dict[str, Any], **options: Any) -> list[Tensor]:
    loss, _ = ops.linear_policy_loss(**made, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (made["hidden"], made["weight"]))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_second_backward_says_so() -> None:
    loss, _ = ops.linear_policy_loss(**case())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"handed over once; .* linear_logprobs and ppo_loss"):
        loss.backward()


def test_without_gradients_only_the_forward_is_done() -> None:
    made = case(rows=TILE.rows)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss, metrics = ops.linear_policy_loss(**made)
    assert counter.get_total_flops() == 2 * TILE.rows * H * V
    trained, trained_metrics = ops.linear_policy_loss(**made)
    assert torch.equal(loss, trained) and metrics == trained_metrics


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_in_float32(backend: str) -> None:
    """In bfloat16, where the sum of rounded gradients would be off by more than it is from float64's."""
    made = case(dtype=torch.bfloat16)
    exact = case()
    exact |= {k: made[k].detach().double().requires_grad_() for k in ("hidden", "weight")}
    exact["token_loss"] = made["token_loss"]
    truth = gradients(exact, backend="reference")[2]
    total = torch.zeros(V, H)
    for rows in (range(0, 70), range(70, 71), range(71, N)):
        loss, _ = ops.linear_policy_loss(
            **made, rows=torch.tensor(list(rows)), denom=float(N), grad_weight_out=total, backend=backend
        )
        loss.backward()
    assert made["weight"].grad is None and made["hidden"].grad is not None
    whole = gradients(made, backend=backend)[2]
    assert float((total - truth).norm()) <= 0.6 * float((whole - truth).norm())
    assert float((total - truth).norm()) <= 0.01 * float(truth.norm())


def test_a_given_place_and_a_scaled_loss_do_not_go_together() -> None:
    made = case()
    loss, _ = ops.linear_policy_loss(**made, grad_weight_out=torch.zeros(V, H))
    with pytest.raises(ValueError, match=r"backward came with 0.5; .* scale by denom or weights"):
        (loss / 2).backward()
    for wrong in (torch.zeros(V, H + 1), torch.zeros(V, H, dtype=torch.bfloat16), torch.zeros(H, V).T):
        with pytest.raises(ValueError, match="^linear_policy_loss: grad_weight_out"):
            ops.linear_policy_loss(**made, grad_weight_out=wrong)


def test_a_frozen_weight_takes_part_if_there_is_a_place() -> None:
    made = case()
    want = gradients(made)[2]
    made["weight"], made["hidden"] = made["weight"].detach(), made["hidden"].detach()
    place = torch.zeros(V, H)
    ops.linear_policy_loss(**made, grad_weight_out=place)
    assert torch.equal(place, want)


@pytest.mark.parametrize("through", ["leaf", "graph"])
def test_another_tensor_that_wants_a_gradient_is_refused(through: str) -> None:
    made = case()
    beta = torch.ones(N, requires_grad=True)
    used = beta if through == "leaf" else (beta * 2).exp()
    made["token_loss"] = lambda logprobs, entropy, rows: -logprobs * used[rows]
    with pytest.raises(ValueError, match=rf"token_loss uses a tensor \({N},\) that requires grad"):
        ops.linear_policy_loss(**made)
    with torch.no_grad():
        ops.linear_policy_loss(**made)
    made["token_loss"] = lambda logprobs, entropy, rows: -logprobs * used[rows].detach()
    ops.linear_policy_loss(**made)


def test_in_a_checkpointed_region_it_runs_twice_and_is_right() -> None:
    made, calls = case(), []
    objective = made["token_loss"]

    def counted(logprobs: Tensor, entropy: Tensor | None, rows: Tensor) -> Any:
        calls.append(len(rows))
        return objective(logprobs, entropy, rows)

    made["token_loss"] = counted
    want = gradients(made)
    once = len(calls)

    def region(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_policy_loss(hidden, weight, made["targets"], counted)[0]

    loss = checkpoint(region, made["hidden"], made["weight"], use_reentrant=False)
    got = torch.autograd.grad(loss, (made["hidden"], made["weight"]))
    assert same([loss.detach(), *got], want) and len(calls) > 2 * once


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_given_place_is_not_added_to_twice(use_reentrant: bool) -> None:
    made, place = case(), torch.zeros(V, H)
    want = gradients(made)[2]

    def region(hidden: Tensor) -> Tensor:
        return ops.linear_policy_loss(**made | {"hidden": hidden}, grad_weight_out=place)[0]

    if use_reentrant:  # whose first run has no gradients
        checkpoint(region, made["hidden"], use_reentrant=True).backward()
        assert torch.equal(place, want)
    else:
        with pytest.raises(ValueError, match="^linear_policy_loss: a checkpointed region would add to grad_weight_out"):
            checkpoint(region, made["hidden"], use_reentrant=False)
        assert not place.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own look, at any break of a graph
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_logprobs"])
def test_autocast_and_compile_change_no_bit(name: str) -> None:
    made = case()
    arguments = [made["hidden"], made["weight"], made["targets"]]

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if name == "linear_policy_loss":
            return ops.linear_policy_loss(hidden * 1.0, weight, targets, made["token_loss"])[0] * 2
        return (ops.linear_logprobs(hidden * 1.0, weight, targets)[0] * 2).sum()

    def results(function: Any) -> list[Tensor]:
        value = function(*arguments)
        return [value.detach(), *torch.autograd.grad(value, arguments[:2])]

    want = results(run)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(results(run), want)
    assert same(results(torch.compile(run, backend="aot_eager")), want)  # the graph breaks around it


@pytest.mark.parametrize("budget", [1, 3e6, 10**9])
def test_memory_changes_no_bit_of_a_row(budget: Any) -> None:
    """Only the sum over rows, dW, depends on how many are added up at a time."""
    made = case(rows=2 * TILE.block + 1)
    want, got = gradients(made), gradients(made, memory_budget=budget)
    assert same(got[:2], want[:2])
    torch.testing.assert_close(got[2], want[2])
    options = [made["hidden"].detach(), made["weight"].detach(), made["targets"]]
    assert same([*ops.linear_logprobs(*options)], [*ops.linear_logprobs(*options, memory_budget=budget)])


def test_work_is_proportional_to_active_rows() -> None:
    made = case(rows=8 * TILE.rows)
    rows = torch.arange(0, 8 * TILE.rows, 4)
    mask = torch.zeros(8 * TILE.rows, dtype=torch.bool).index_fill(0, rows, True)
    ignored = torch.where(mask, made["targets"], -100)
    results = []
    for options in ({"rows": rows}, {"mask": mask}, {"targets": ignored}):
        with FlopCounterMode(display=False) as counter:
            results.append(gradients(made | options))
        assert counter.get_total_flops() == 6 * 2 * TILE.rows * H * V
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_rows_without_an_upstream_gradient_cost_nothing() -> None:
    made = case(rows=2 * TILE.rows)
    del made["token_loss"]
    upstream = torch.zeros(2 * TILE.rows)
    upstream[::2] = 1.0
    with FlopCounterMode(display=False) as counter:
        logprobs, entropy = ops.linear_logprobs(**made)
        (logprobs * upstream + entropy * 0.0).sum().backward()
    assert counter.get_total_flops() == (2 * 2 + 6) * TILE.rows * H * V
    alone = [made[k].detach().clone().requires_grad_() for k in ("hidden", "weight")]
    ops.linear_logprobs(*alone, made["targets"], mask=upstream > 0)[0].sum().backward()
    assert torch.equal(made["hidden"].grad, alone[0].grad) and torch.equal(made["weight"].grad, alone[1].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_named_twice_counts_twice(backend: str) -> None:
    made = case()
    twice, once = torch.tensor([3, 3, 5]), torch.tensor([3, 5])
    got = gradients(made, rows=twice, denom=1.0, backend=backend)
    weights = torch.ones(N).index_fill(0, torch.tensor([3]), 2.0)
    want = gradients(made, rows=once, denom=1.0, weights=weights, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_beyond_the_targets_are_refused() -> None:
    for wrong in (torch.tensor([0, N]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=rf"rows must be in \[0, {N}\)"):
            ops.linear_policy_loss(**case(), rows=wrong)


def test_an_exact_zero_upstream_hides_even_nan() -> None:
    made = case()
    hidden = made["hidden"].detach().index_fill(0, torch.tensor([4]), torch.nan).requires_grad_()
    logprobs, entropy = ops.linear_logprobs(hidden, made["weight"], made["targets"])
    assert logprobs[4].isnan() and entropy[4].isnan()
    kept = torch.arange(N) != 4
    torch.where(kept, logprobs, 0).sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[4].any() and made["weight"].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_token_loss_gives_has_a_number_a_row(backend: str) -> None:
    """(n, 1) times weights (n,) would be (n, n), and a mean would count as one token's loss."""
    made = case() | {"weights": torch.ones(N), "denom": float(N), "backend": backend}
    for wrong, seen in (
        (lambda p, e, r: -p[:, None], r"loss \(\d+,\), got \(\d+, 1\)"),
        (lambda p, e, r: -p.mean(), r"loss \(\d+,\), got \(\)"),
        (lambda p, e, r: None, r"loss \(\d+,\), got NoneType"),
        (lambda p, e, r: (-p, {"kl": p.mean()}), r"kl \(\d+,\), got \(\)"),
    ):
        with pytest.raises(ValueError, match="^linear_policy_loss: token_loss must give " + seen):
            ops.linear_policy_loss(**made | {"token_loss": wrong})
    made["token_loss"] = ops.ppo_token_loss(torch.zeros(N + 1), torch.zeros(N + 1))
    with pytest.raises(ValueError, match=r"^linear_policy_loss: old_logprobs \(74,\) does not match targets \(73,\)"):
        ops.linear_policy_loss(**made)
    narrow = ops.linear_policy_loss(**made | {"token_loss": lambda p, e, r: -p.bfloat16()})[0]
    assert narrow.dtype is torch.float32


@pytest.mark.parametrize("blind", [False, True])
def test_a_largest_number_below_zero(monkeypatch: pytest.MonkeyPatch, blind: bool) -> None:
    monkeypatch.setattr("rlhf_engine.ops.rows.host_knows", lambda x: not blind)
    made = case() | {"token_loss": lambda p, e, r: (-p, {"logprob_max": p})}
    mask = torch.arange(N) % 3 != 1
    want = ops.linear_logprobs(made["hidden"], made["weight"], made["targets"])[0][mask].amax()
    assert ops.linear_policy_loss(**made, mask=mask)[1]["logprob_max"] == want < 0
    assert ops.linear_policy_loss(**made, mask=torch.zeros_like(mask))[1]["logprob_max"] == 0


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("built_in", [True, False])
def test_a_mask_that_the_host_does_not_read(monkeypatch: pytest.MonkeyPatch, blind: bool, built_in: bool) -> None:
    """As on a GPU: dead rows go through the products, and nothing of what they hold comes out."""
    made = case()
    mask = torch.arange(N) % 3 != 1
    want = gradients(made | {"mask": mask})
    want_metrics = ops.linear_policy_loss(**made, mask=mask)[1]
    monkeypatch.setattr("rlhf_engine.ops.rows.host_knows", lambda x: not blind)
    monkeypatch.setattr("rlhf_engine.ops.tiled_head.host_knows", lambda x: not blind)
    wild = torch.where(mask, 0.0, torch.nan)
    made["hidden"] = (made["hidden"].detach() + wild[:, None]).requires_grad_()
    made["token_loss"] = ops.ppo_token_loss(
        made["token_loss"].old_logprobs + wild, made["token_loss"].advantages + wild, entropy_coef=0.1
    )
    if not built_in:
        formula = made["token_loss"]
        made["token_loss"] = lambda logprobs, entropy, rows: formula(logprobs, entropy, rows)
    made["targets"] = torch.where(mask, made["targets"], -100)
    got = gradients(made)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not got[1][~mask].any()
    metrics = ops.linear_policy_loss(**made)[1]
    for name, value in want_metrics.items():
        torch.testing.assert_close(metrics[name], value)
    synced = gradients(made, count="sync")
    torch.testing.assert_close(synced[2], want[2])
