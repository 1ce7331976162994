"""Presets name real flags, all of them, and OAI's are those of its paper. tests/upstream runs the other trainers."""

from __future__ import annotations

import inspect

import numpy as np
import oracle
import pytest
import torch

from rlhf_engine import ops

TRAINERS = ("verl", "openrlhf", "trl", "oai")
FUNCTIONS = {
    "kl_reward": ops.kl_estimate,
    "kl_loss": ops.kl_estimate,
    "whiten_rewards": ops.whiten,
    "gae": ops.gae,
    "whiten": ops.whiten,
    "kl_gae": ops.kl_gae,
    "ppo_loss": ops.ppo_loss,
    "value_loss": ops.value_loss,
    "token_weights": ops.token_weights,
}
# Flags that carry data or where to compute, coefficients, and options that none of the trainers has.
NO_CONVENTION = {
    "backend", "out", "cu_seqlens", "bootstrap", "value_lam", "is_weights", "entropy", "ref_logprobs", "weights",
    "denom", "kl_coef", "entropy_coef", "constant_length",
}  # fmt: skip
MISSING = {
    "verl": {"whiten_rewards"},
    "openrlhf": {"whiten_rewards"},
    "trl": {"kl_loss"},
    "oai": {"kl_loss", "kl_gae"},
}
PAIRS = [(name, op) for name in TRAINERS for op in FUNCTIONS if op not in MISSING[name]]


@pytest.mark.parametrize("name, op", PAIRS)
def test_every_convention_is_set(name: str, op: str) -> None:
    parameters = list(inspect.signature(FUNCTIONS[op]).parameters.values())
    flags = {p.name for p in parameters if p.default is not p.empty} - NO_CONVENTION
    if "kl_loss" in MISSING[name]:
        flags -= {"kl_kind"} if op == "ppo_loss" else set()
    assert ops.preset(name, op).keys() == flags


@pytest.mark.parametrize("name", [name for name in TRAINERS if "kl_gae" not in MISSING[name]])
def test_kl_gae_is_its_parts(name: str) -> None:
    whole = ops.preset(name, "kl_gae")
    parts = {f"kl_{flag}": value for flag, value in ops.preset(name, "kl_reward").items()} | ops.preset(name, "gae")
    assert parts.items() <= whole.items() and whole["whiten"] is False


def test_unknown_names_raise() -> None:
    with pytest.raises(ValueError, match="preset: name must be one of verl, openrlhf, trl, oai, got 'deepspeed'"):
        ops.preset("deepspeed", "gae")
    for name, missing in MISSING.items():
        for op in (*missing, "nonsense"):
            with pytest.raises(ValueError, match=f"preset: op of {name} must be one of .*gae.*, got '{op}'"):
                ops.preset(name, op)


def test_a_preset_is_yours_to_change() -> None:
    ops.preset("verl", "gae")["lam"] = 0.5
    assert ops.preset("verl", "gae")["lam"] == 1.0


def whitened(x: np.ndarray, keep_mean: bool) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-8) + keep_mean * x.mean()  # var: biased


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # at 1e-4 variances are about the epsilon
def test_oai(scale: float, dtype: torch.dtype, tolerance: float, backend: str | None) -> None:
    """One step of Ziegler et al. 2019 on full responses, as arXiv:1909.08593 and its released code have it:

    r_t = -kl_coef (log pi - log rho) + the score at the last token; rewards whitened but for their mean; GAE with
    gamma 1 and lambda .95; returns = A + V; A whitened; the means of both clipped losses, each clip .2. float64, NumPy.
    """
    rng = np.random.default_rng(0)
    shape, kl_coef = (8, 24), 0.15
    logprobs, ref_logprobs, values = (scale * rng.normal(size=shape) for _ in range(3))
    new_logprobs, new_values = logprobs + 0.3 * rng.normal(size=shape), values + 0.3 * rng.normal(size=shape)
    scores = scale * rng.normal(size=8)
    everywhere = np.ones(shape, dtype=bool)

    rewards = -kl_coef * (logprobs - ref_logprobs)
    rewards[:, -1] += scores
    rewards = whitened(rewards, keep_mean=True)
    raw_advantages, returns = oracle.gae(rewards, values, everywhere, gamma=1.0, lam=0.95)
    advantages = whitened(raw_advantages, keep_mean=False)
    ratio = np.exp(new_logprobs - logprobs)
    policy = np.maximum(-advantages * ratio, -advantages * ratio.clip(0.8, 1.2))
    bounded = values + (new_values - values).clip(-0.2, 0.2)
    value = 0.5 * np.maximum((new_values - returns) ** 2, (bounded - returns) ** 2)

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(dtype)

    def agree(ours: torch.Tensor, theirs: np.ndarray, size: float = 0.0) -> None:
        error = np.abs(ours.detach().double().numpy() - theirs).max()
        assert error <= tolerance * max(np.abs(theirs).max(), size)

    mask = torch.ones(shape, dtype=torch.bool)
    kl = ops.kl_estimate(tensor(logprobs), tensor(ref_logprobs), **ops.preset("oai", "kl_reward"), backend=backend)
    our_rewards = -kl_coef * kl
    our_rewards[:, -1] += tensor(scores)
    our_rewards = ops.whiten(our_rewards, mask, **ops.preset("oai", "whiten_rewards"), backend=backend)
    agree(our_rewards, rewards)
    gae = ops.gae(our_rewards, tensor(values), mask, **ops.preset("oai", "gae"), backend=backend)
    agree(gae[1], returns)
    our_advantages = ops.whiten(gae[0], mask, **ops.preset("oai", "whiten"), backend=backend)
    agree(our_advantages, advantages)
    aggregation = {
        "weights": ops.token_weights(mask, **ops.preset("oai", "token_weights")),
        "denom": ops.token_denom(mask, **ops.preset("oai", "token_weights")),
    }
    flags = ops.preset("oai", "ppo_loss") | aggregation
    tensors = (tensor(new_logprobs), tensor(logprobs), our_advantages, mask)
    agree(ops.ppo_loss(*tensors, **flags, backend=backend)[0], policy.mean(), size=np.abs(policy).max())
    flags = ops.preset("oai", "value_loss") | aggregation
    tensors = (tensor(new_values), tensor(values), gae[1], mask)
    agree(ops.value_loss(*tensors, **flags, backend=backend)[0], value.mean())
