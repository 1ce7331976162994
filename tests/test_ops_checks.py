"""The front door: what it refuses and in which words, how it picks a backend, that its options are the reference's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops, reference
from rlhf_engine.ops import backends

HIDDEN, WEIGHT = torch.randn(4, 3), torch.randn(9, 3)
TARGETS = torch.arange(4)
X, MASK = torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)
SCORES = torch.zeros(4)
TWO = torch.empty(2, 4, 8)
OFFSETS = torch.tensor([0, 5, 32], dtype=torch.int32)


def negative(logprobs: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
    return -logprobs


def short(x: Tensor) -> Tensor:
    return x[:, :7]


REFUSED: list[tuple[Callable[[], Any], str]] = [
    # shapes
    (lambda: ops.gae(X, short(X), MASK), "gae: values (4, 7) does not match rewards (4, 8)"),
    (lambda: ops.gae(X, X, short(MASK)), "gae: mask (4, 7) does not match rewards (4, 8)"),
    (lambda: ops.gae(X[0], X[0], MASK[0]), "gae: rewards must be (B, T), or (N,) with cu_seqlens, got (8,)"),
    (lambda: ops.gae(X, X, MASK, cu_seqlens=OFFSETS), "gae: rewards must be (N,) with cu_seqlens, got (4, 8)"),
    (lambda: ops.gae(X, X, MASK, lam=torch.ones(3)), "gae: lam (3,) must hold one number per sequence: (4,)"),
    (lambda: ops.gae(X, X, MASK, bootstrap=X), "gae: bootstrap (4, 8) must hold one number per sequence: (4,)"),
    (
        lambda: ops.kl_gae(SCORES[:3], X, X, X, MASK, kl_coef=0.1),
        "kl_gae: scores (3,) must hold one number per sequence: (4,)",
    ),
    (
        lambda: ops.kl_gae(SCORES, X, short(X), X, MASK, kl_coef=0.1),
        "kl_gae: ref_logprobs (4, 7) does not match logprobs (4, 8)",
    ),
    (lambda: ops.whiten(X, short(MASK)), "whiten: mask (4, 7) does not match x (4, 8)"),
    (lambda: ops.kl_estimate(X, short(X)), "kl_estimate: ref_logprobs (4, 7) does not match logprobs (4, 8)"),
    (lambda: ops.ppo_loss(X, X, SCORES, MASK), "ppo_loss: advantages (4,) does not match logprobs (4, 8)"),
    (lambda: ops.ppo_token_loss(X, SCORES), "ppo_token_loss: advantages (4,) does not match old_logprobs (4, 8)"),
    (lambda: ops.value_loss(X, X, short(X), MASK), "value_loss: returns (4, 7) does not match values (4, 8)"),
    (lambda: ops.token_logprobs(X, TARGETS[:3]), "token_logprobs: targets (3,) does not match logits (4, 8)"),
    (
        lambda: ops.linear_logprobs(HIDDEN, WEIGHT.T, TARGETS),
        "linear_logprobs: weight (3, 9) does not match hidden (4, 3)",
    ),
    (lambda: ops.linear_logprobs(HIDDEN, WEIGHT[:0], TARGETS), "linear_logprobs: weight (0, 3) is empty"),
    (
        lambda: ops.token_logprobs(X[:1].expand(4, 8), TARGETS, inplace_backward=True),
        "token_logprobs: rows of expanded logits share memory",
    ),
    (
        lambda: ops.linear_logprobs(HIDDEN, WEIGHT, TARGETS, bias=SCORES),
        "linear_logprobs: bias (4,) does not match weight (9, 3)",
    ),
    # dtypes
    (lambda: ops.gae(X.long(), X, MASK), "gae: rewards must be float16, bfloat16, float32 or float64, got torch.int64"),
    (lambda: ops.gae(X, X, MASK.float()), "gae: mask must be torch.bool, got torch.float32"),
    (lambda: ops.token_weights(MASK.long()), "token_weights: mask must be torch.bool, got torch.int64"),
    (lambda: ops.token_logprobs(X, SCORES), "token_logprobs: targets must be int32 or int64, got torch.float32"),
    (
        lambda: ops.linear_logprobs(HIDDEN.bfloat16(), WEIGHT, TARGETS),
        "linear_logprobs: weight is torch.float32, hidden torch.bfloat16; cast one of them",
    ),
    (
        lambda: ops.linear_policy_loss(HIDDEN, WEIGHT, TARGETS, lambda p, e, r: p, rows=TARGETS.int()),
        "linear_policy_loss: rows must be (n,) int64, got (4,) torch.int32",
    ),
    # devices
    (lambda: ops.gae(X, X.to("meta"), MASK), "gae: values is on meta, rewards on cpu"),
    (
        lambda: ops.linear_logprobs(HIDDEN, WEIGHT.to("meta"), TARGETS),
        "linear_logprobs: weight is on meta, hidden on cpu",
    ),
    # results that are given a place
    (
        lambda: ops.gae(X, X, MASK, out=(X, X.clone())),
        "gae: out[0] shares memory with rewards; give it memory of its own",
    ),
    (
        lambda: ops.gae(X, X, MASK, out=(TWO[0], TWO[0])),
        "gae: out[1] shares memory with out[0]; give it memory of its own",
    ),
    (lambda: ops.gae(X, X, MASK, out=(TWO[0], TWO[1].T)), "gae: out[1] (8, 4) does not match rewards (4, 8)"),
    (
        lambda: ops.gae(X, X, MASK, out=(TWO[0], X.double())),
        "gae: out[1] must be contiguous torch.float32 without gradient",
    ),
    (
        lambda: ops.kl_gae(SCORES, X, X, X, MASK, kl_coef=0.1, out=ops.ShapedAdvantages(*TWO, *TWO, MASK.clone())),
        "kl_gae: out.returns shares memory with out.rewards; give it memory of its own",
    ),
    (
        lambda: ops.kl_gae(SCORES, X, X, X, MASK, kl_coef=0.1, out=ops.ShapedAdvantages(*torch.empty(5, 4, 8))),
        "kl_gae: out.value_mask must be contiguous torch.bool without gradient",
    ),
    (
        lambda: ops.kl_gae(
            TWO[0, :, 0], X, X, X, MASK, kl_coef=0.1, out=ops.ShapedAdvantages(*torch.empty(3, 4, 8), TWO[0], ~MASK)
        ),
        "kl_gae: out.kl shares memory with scores; give it memory of its own",
    ),
    (
        lambda: ops.whiten(X.T, MASK.T, out=X.T),
        "whiten: out must be contiguous torch.float32 without gradient",
    ),
    (lambda: ops.merge_metrics([{"policy_tokens": SCORES}, {"policy_tokens": SCORES, "entropy_sum": SCORES}]), "merge"),
    # values
    (
        lambda: ops.token_logprobs(X, TARGETS + 5),
        "token_logprobs: target 8 at (3,) is outside the vocabulary [0, 8)",
    ),
    (
        lambda: ops.linear_logprobs(HIDDEN, WEIGHT, TARGETS - 1),
        "linear_logprobs: target -1 at (0,) is outside the vocabulary [0, 9)",
    ),
    (
        lambda: ops.linear_policy_loss(HIDDEN, WEIGHT, TARGETS.where(TARGETS != 2, -100), negative, rows=TARGETS),
        "linear_policy_loss: target -100 at (2,) is outside the vocabulary [0, 9)",
    ),
    (
        lambda: ops.token_logprobs(X, TARGETS, temperature=0.0),
        "token_logprobs: temperature must be greater than 0 and finite, got 0.0",
    ),
    (
        lambda: ops.linear_logprobs(HIDDEN, WEIGHT, TARGETS, softcap=-1.0),
        "linear_logprobs: softcap must be greater than 0 and finite, got -1.0",
    ),
    (lambda: ops.gae(X, X, MASK, gamma=1.5), "gae: gamma must lie between 0 and 1, got 1.5"),
    (lambda: ops.gae(X, X, MASK, holes="skip"), "gae: holes must be one of carry, decay, got 'skip'"),
    (
        lambda: ops.gae(X[0], X[0], MASK[0], cu_seqlens=OFFSETS),
        "gae: cu_seqlens must rise from 0 to 8, the length of rewards, got [0, 5, 32]",
    ),
    (
        lambda: ops.gae(X[0], X[0], MASK[0], cu_seqlens=SCORES),
        "gae: cu_seqlens must be (B + 1,) int32 or int64, got (4,) torch.float32",
    ),
    (lambda: ops.kl_estimate(X, X, kind="full"), "kl_estimate: kind must be one of k1, abs, k2, k3, k1+, "),
    (lambda: ops.whiten(X, MASK, eps_mode="none"), "whiten: eps_mode must be one of add, max, got 'none'"),
    (lambda: ops.token_weights(MASK, "mean"), "token_weights: mode must be one of token-mean, seq-mean-token-mean"),
    (
        lambda: ops.token_weights(MASK, "constant"),
        "token_weights: constant_length must be greater than 0, got None",
    ),
    (lambda: ops.ppo_loss(X, X, X, MASK, clip_low=-0.1), "ppo_loss: clip_low must be 0 or greater and finite, got"),
    (lambda: ops.ppo_loss(X, X, X, MASK, dual_clip=0.5), "ppo_loss: dual_clip must be greater than 1, got 0.5"),
    (
        lambda: ops.ppo_loss(X, X, X, MASK, entropy_coef=0.1),
        "ppo_loss: entropy_coef is 0.1, but entropy is not given",
    ),
    (lambda: ops.ppo_loss(X, X, X, MASK, kl_coef=0.1), "ppo_loss: kl_coef is 0.1, but ref_logprobs is not given"),
    (
        lambda: ops.ppo_loss(X, X, X, MASK, weights=X),
        "ppo_loss: weights are given without denom; pass the count of the whole batch (see token_denom)",
    ),
    (lambda: ops.value_loss(X, X, X, MASK, denom=-1.0), "value_loss: denom must be 0 or greater and finite, got -1.0"),
    (
        lambda: ops.value_loss(X, X, X, MASK, denom=SCORES),
        "value_loss: denom must be a number or a 0-d tensor, got (4,)",
    ),
    (
        lambda: ops.linear_policy_loss(
            HIDDEN, WEIGHT, TARGETS, negative, weights=torch.ones(4, requires_grad=True), denom=1.0
        ),
        "linear_policy_loss: weights requires grad, but the loss treats it as a constant; pass weights.detach()",
    ),
    (
        lambda: ops.ppo_loss(X, X, X.clone().requires_grad_(), MASK),
        "ppo_loss: advantages requires grad, but the loss treats it as a constant; pass advantages.detach()",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refusals_name_op_argument_and_what_was_seen(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)


OPS: dict[str, Callable[..., Any]] = {
    "token_logprobs": lambda **o: ops.token_logprobs(X, TARGETS, **o),
    "linear_logprobs": lambda **o: ops.linear_logprobs(HIDDEN, WEIGHT, TARGETS, **o),
    "linear_policy_loss": lambda **o: ops.linear_policy_loss(HIDDEN, WEIGHT, TARGETS, lambda p, e, r: p, **o),
    "kl_estimate": lambda **o: ops.kl_estimate(X, X + 1, **o),
    "gae": lambda **o: ops.gae(X, X + 1, MASK, **o),
    "whiten": lambda **o: ops.whiten(X, MASK, **o),
    "kl_gae": lambda **o: ops.kl_gae(SCORES, X, X + 1, X, MASK, kl_coef=0.1, **o).advantages,
    "ppo_loss": lambda **o: ops.ppo_loss(X, X + 0.1, X, MASK, **o),
    "value_loss": lambda **o: ops.value_loss(X, X + 0.1, X - 1, MASK, **o),
}


def test_a_target_is_looked_at_where_it_counts() -> None:
    bad = TARGETS.where(TARGETS != 2, 99)
    ops.token_logprobs(X, bad, mask=TARGETS != 2)
    ops.token_logprobs(X, bad, ignore_index=99)
    with pytest.raises(ValueError, match=r"target 99 at \(2,\) is outside"):
        ops.token_logprobs(X, bad, mask=TARGETS != 1)


def test_a_temperature_is_looked_at_where_it_counts() -> None:
    wild = torch.ones(4).index_fill(0, torch.tensor(2), 0.0)
    ignored = TARGETS.index_fill(0, torch.tensor(2), -100)
    rows = torch.tensor([0, 1])
    ops.token_logprobs(X, ignored, temperature=wild)
    ops.linear_logprobs(HIDDEN, WEIGHT, ignored, temperature=wild)
    ops.linear_logprob_stats(HIDDEN, WEIGHT, ignored, temperature=wild)
    ops.linear_logprobs(HIDDEN, WEIGHT, TARGETS, temperature=wild, rows=rows)
    for options in ({}, {"rows": rows + 1, "mask": TARGETS != 2}):
        with pytest.raises(ValueError, match="temperature must be greater than 0 and finite, got 0.0"):
            ops.linear_policy_loss(HIDDEN, WEIGHT, TARGETS, negative, temperature=wild, **options)


@pytest.mark.parametrize("backend", ops.available("linear_policy_loss", "cpu"))
def test_rows_that_are_named_are_scored_whatever_their_target(backend: str) -> None:
    """Neither mask nor ignore_index is looked at, even where the latter is a token."""
    loss, _ = ops.linear_policy_loss(
        HIDDEN, WEIGHT, TARGETS, negative, rows=TARGETS, ignore_index=2, mask=TARGETS != 1, backend=backend
    )
    expected = -ops.linear_logprobs(HIDDEN, WEIGHT, TARGETS, backend="reference")[0].mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("op", sorted(OPS))
def test_each_op_runs_here_and_knows_its_backends(op: str) -> None:
    assert "reference" in ops.available(op)
    OPS[op]()
    OPS[op](backend="reference")
    with pytest.raises(ValueError, match=f"^{op}: there is no backend 'gpu'; choose among reference, cuda, triton"):
        OPS[op](backend="gpu")
    for backend in {"cuda", "triton", "cpu"} - set(ops.available(op)):
        with pytest.raises(RuntimeError, match=f"^{op}: backend '{backend}' is not available in this installation;"):
            OPS[op](backend=backend)


def test_a_fast_backend_is_preferred_and_never_given_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(name: str) -> Callable[..., Any]:
        def function(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return reference.gae(*args, **options)

        return function

    for name in ("cpu", "triton"):
        monkeypatch.setitem(backends._TABLE["gae"], name, record(name))
    ops.gae(X, X, MASK)
    ops.gae(X, X, MASK, backend="reference")
    assert calls == ["cpu"]
    with pytest.raises(ValueError, match="^gae: backend 'triton' needs tensors on cuda, got cpu; move them or pass"):
        ops.gae(X, X, MASK, backend="triton")


@pytest.mark.parametrize("op", sorted(OPS))
def test_front_door_and_reference_have_the_same_options(op: str) -> None:
    front = inspect.signature(getattr(ops, op)).parameters
    spec = inspect.signature(getattr(reference, op)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in spec.values())
    for name, parameter in front.items():
        if name == "backend":
            assert parameter.default is None and parameter.kind is parameter.KEYWORD_ONLY
        elif name in spec:
            assert (spec[name].default, spec[name].kind) == (parameter.default, parameter.kind), name
        else:
            assert open_ended, name
    assert {n for n, p in spec.items() if p.kind is not p.VAR_KEYWORD} <= set(front)


def test_merging_takes_maxima_and_sums() -> None:
    a = {"x_sum": torch.tensor(1.0), "y_max_abs": torch.tensor(3.0), "policy_tokens": torch.tensor(2.0)}
    b = {"x_sum": torch.tensor(2.0), "y_max_abs": torch.tensor(1.0), "policy_tokens": torch.tensor(4.0)}
    assert ops.finalize_metrics(ops.merge_metrics([a, b])) == {"x": 0.5, "y_max_abs": 3.0, "policy_tokens": 6.0}
    assert ops.finalize_metrics(ops.merge_metrics([])) == {}
