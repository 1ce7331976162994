"""The loss-side ops and log-probs from logits, at sizes that trainers have and at awkward ones.

What each op's tensors and answers are called is also what the peers in peers/ are given and return:

    gae            rewards, values (B, T), mask (B, T) bool -> advantages, returns; gamma 1, lambda .95
    gae_whiten     the same, and advantages are whitened
    whiten         x, mask -> whitened: Bessel's correction, 1e-8 added to the variance, 0 where the mask is
    kl_gae         scores (B,), logprobs, ref_logprobs, values, mask -> advantages (whitened without that correction),
                   returns; k1, kl_coef .05, the score at the last token
    kl_estimate    logprobs, ref_logprobs -> kl; k3, no clamps
    ppo_loss       logprobs, old_logprobs, advantages, mask -> loss, d_logprobs; clip .2, dual clip 3, mean over tokens
    value_loss     values, old_values, returns, mask -> loss, d_values; clip .2, half the mean over tokens
    token_logprobs            logits (N, V), targets (N,) -> logprobs, entropy (N,)
    token_logprobs_backward   and upstream_logprobs, upstream_entropy (N,) -> logprobs, entropy, d_logits

Masks have no holes: every trainer treats padding alike, and holes each in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rlhf_engine import ops
from rlhf_engine.bench import peers
from rlhf_engine.bench.case import OURS, Answer, Case, Tensors, Way

GAMMA, LAM, KL_COEF, CLIP, DUAL_CLIP = 1.0, 0.95, 0.05, 0.2, 3.0
BYTES = {"gae": 17, "gae_whiten": 17, "whiten": 9, "kl_gae": 21, "kl_estimate": 12, "ppo_loss": 17, "value_loss": 17}
# Sums of up to 65,536 numbers of size 1 in float32, and of a whole batch in the losses.
BOUND = 2e-5
# Logits of size 10 in bfloat16 are exact inputs here; only the gradient is rounded to their dtype. Plain PyTorch adds
# up 150,000 probabilities in float32 with an error of 3e-5 on CPUs, which entropies and gradients show.
LOGPROB_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
AT_ONCE = 2**26  # logits in float64
SHAPES = {
    "cuda": {
        "Qwen3-8B GRPO batch": (512, 4096), "long context": (16, 65_536), "verl's report": (1024, 32_768),
        "many short": (65_536, 32), "primes": (1021, 1021), "one row": (1, 100_003),
    },
    "cpu": {
        "verl's report": (1024, 32_768), "PPO minibatch": (128, 1024), "primes": (251, 1021), "one row": (1, 100_003),
    },
    "quick": {"PPO minibatch": (128, 1024), "primes": (37, 211)},
}  # fmt: skip
LOGITS = {
    "cuda": {
        "Qwen3": (8192, 151_936), "Llama-3": (8192, 128_256), "SmolLM2": (8192, 49_152), "Gemma-3": (2048, 262_144),
        "GPT-2, odd": (4099, 50_257), "few long rows": (16, 262_144),
    },
    "cpu": {"SmolLM2": (512, 49_152), "Qwen3": (128, 151_936), "GPT-2, odd": (257, 50_257)},
    "quick": {"SmolLM2": (32, 49_152), "odd": (67, 1013)},
}  # fmt: skip
DTYPES = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32, torch.bfloat16), "quick": (torch.float32,)}


def cases(device: torch.device, quick: bool, dtypes: tuple[torch.dtype, ...] | None = None) -> Iterator[Case]:
    """The loss side is float32 everywhere; `dtypes` are those of logits."""
    size = "quick" if quick else device.type
    for shape, (count, length) in SHAPES[size].items():
        for op in BYTES:
            yield loss_side(op, shape, count, length, device)
    for shape, (rows, vocabulary) in LOGITS[size].items():
        for dtype in dtypes or DTYPES[size]:
            yield from logprobs(shape, rows, vocabulary, dtype, device)


def loss_side(op: str, shape: str, count: int, length: int, device: torch.device) -> Case:
    solve = SOLVE[op]
    ours = [Way(OURS, partial(solve, backend=None), ops.backends.chosen(_front(op), device.type))]
    for backend in ops.available(_front(op), device.type):
        if backend not in ("reference", ours[0].version):
            ours.append(Way(f"{OURS}, {backend}", partial(solve, backend=backend), backend))
    return Case(
        "ops", op, shape, {"B": count, "T": length}, torch.float32, partial(MAKE[op], count, length),
        partial(true_loss_side, op), dict.fromkeys(PARTS[op], BOUND),
        [*ours, *peers.ways(op, torch.float32, device)], bytes_moved=BYTES[op] * count * length,
    )  # fmt: skip


def logprobs(shape: str, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    one_read = rows * vocabulary * dtype.itemsize
    for op, passes in (("token_logprobs", 1), ("token_logprobs_backward", 3)):
        bound = {"logprobs": 1e-5, "entropy": 1e-4, "d_logits": LOGPROB_BOUND[dtype]}
        parts = list(bound) if passes == 3 else ["logprobs", "entropy"]
        ours = Way(OURS, partial(SOLVE[op], backend=None), ops.backends.chosen("token_logprobs", device.type))
        yield Case(
            "ops", op, shape, {"N": rows, "V": vocabulary}, dtype, partial(make_logits, rows, vocabulary, dtype),
            partial(true_logprobs, backward=passes == 3), {part: bound[part] for part in parts},
            [ours, *peers.ways(op, dtype, device)], bytes_moved=passes * one_read,
        )  # fmt: skip


def doubled(tensors: Tensors) -> Tensors:
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def true_loss_side(op: str, x: Tensors) -> Answer:
    """In float64. The recurrence is a loop over T of small steps, which a CPU takes faster than a GPU."""
    here = next(iter(x.values())).device
    there = torch.device("cpu") if "gae" in op else here
    exact = SOLVE[op](doubled({name: y.to(there) for name, y in x.items()}), backend="reference")
    return {name: y.to(here) for name, y in exact.items()}


def true_logprobs(tensors: Tensors, backward: bool) -> Answer:
    """In float64, some rows at a time."""
    parts, rows = [], max(1, AT_ONCE // tensors["logits"].shape[1])
    for start in range(0, len(tensors["targets"]), rows):
        part = doubled({name: x[start : start + rows] for name, x in tensors.items()})
        parts.append(SOLVE["token_logprobs_backward" if backward else "token_logprobs"](part, backend="reference"))
    return {name: torch.cat([part[name].float() for part in parts]) for name in parts[0]}


def make_batch(count: int, length: int, generator: torch.Generator, *names: str) -> Tensors:
    """Random (B, T) tensors, and a mask of sequences of half to all of the length."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    lengths = torch.randint((length + 1) // 2, length + 1, (count, 1), generator=generator, device=generator.device)
    found = {name: normal(count, length) for name in names}
    found["mask"] = torch.arange(length, device=generator.device) < lengths
    return found


def make_gae(count: int, length: int, generator: torch.Generator) -> Tensors:
    return make_batch(count, length, generator, "rewards", "values")


def make_whiten(count: int, length: int, generator: torch.Generator) -> Tensors:
    return make_batch(count, length, generator, "x")


def make_kl_gae(count: int, length: int, generator: torch.Generator) -> Tensors:
    found = make_batch(count, length, generator, "logprobs", "ref_logprobs", "values")
    return found | {"scores": torch.randn(count, generator=generator, device=generator.device)}


def make_policy(count: int, length: int, generator: torch.Generator) -> Tensors:
    """No ratio is at a clip: there, rounding decides the gradient."""
    found = make_batch(count, length, generator, "old_logprobs", "advantages")
    steps = torch.tensor([-0.5, -0.05, 0.05, 0.5, 1.5], device=generator.device)
    chosen = torch.randint(5, (count, length), generator=generator, device=generator.device)
    return found | {"logprobs": found["old_logprobs"] + steps[chosen], "advantages": found["advantages"] + 0.5}


def make_values(count: int, length: int, generator: torch.Generator) -> Tensors:
    """The two errors, with and without the clip, are never near each other: there, rounding decides the gradient."""
    found = make_batch(count, length, generator, "old_values", "returns")
    steps = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=generator.device)
    values = (
        found["old_values"] + steps[torch.randint(4, (count, length), generator=generator, device=generator.device)]
    )
    away = found["returns"]
    return found | {"values": values, "returns": values + away + away.sign()}


def make_estimate(count: int, length: int, generator: torch.Generator) -> Tensors:
    found = make_batch(count, length, generator, "logprobs", "ref_logprobs")
    return {name: found[name] for name in ("logprobs", "ref_logprobs")}


def make_logits(rows: int, vocabulary: int, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    device = generator.device
    logits = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    for part in logits.split(max(1, 2**28 // vocabulary)):  # not all in float32 at once
        part.copy_(3 * torch.randn(part.shape, generator=generator, device=device))
    upstream = torch.randn(2, rows, generator=generator, device=device)
    return {
        "logits": logits, "targets": torch.randint(vocabulary, (rows,), generator=generator, device=device),
        "upstream_logprobs": upstream[0], "upstream_entropy": 0.1 * upstream[1],
    }  # fmt: skip


def gae(x: Tensors, backend: str | None) -> Answer:
    advantages, returns = ops.gae(x["rewards"], x["values"], x["mask"], gamma=GAMMA, lam=LAM, backend=backend)
    return {"advantages": advantages, "returns": returns}


def gae_whiten(x: Tensors, backend: str | None) -> Answer:
    found = gae(x, backend)
    return found | {"advantages": ops.whiten(found["advantages"], x["mask"], ddof=1, backend=backend)}


def whiten(x: Tensors, backend: str | None) -> Answer:
    return {"whitened": ops.whiten(x["x"], x["mask"], ddof=1, backend=backend)}


def kl_gae(x: Tensors, backend: str | None) -> Answer:
    shaped = ops.kl_gae(
        x["scores"], x["logprobs"], x["ref_logprobs"], x["values"], x["mask"],
        kl_coef=KL_COEF, gamma=GAMMA, lam=LAM, backend=backend,
    )  # fmt: skip
    return {"advantages": shaped.advantages, "returns": shaped.returns}


def kl_estimate(x: Tensors, backend: str | None) -> Answer:
    return {"kl": ops.kl_estimate(x["logprobs"], x["ref_logprobs"], kind="k3", backend=backend)}


def with_gradient(x: Tensors, name: str, loss: Callable[[Tensors], Tensor]) -> Answer:
    leaf = x[name].detach().requires_grad_()
    found = loss(x | {name: leaf})
    return {"loss": found.detach(), f"d_{name}": torch.autograd.grad(found, leaf)[0]}


def ppo_loss(x: Tensors, backend: str | None) -> Answer:
    def loss(x: Tensors) -> Tensor:
        return ops.ppo_loss(
            x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"],
            clip_low=CLIP, clip_high=CLIP, dual_clip=DUAL_CLIP, backend=backend,
        )[0]  # fmt: skip

    return with_gradient(x, "logprobs", loss)


def value_loss(x: Tensors, backend: str | None) -> Answer:
    return with_gradient(
        x, "values",
        lambda x: ops.value_loss(x["values"], x["old_values"], x["returns"], x["mask"], clip=CLIP, backend=backend)[0],
    )  # fmt: skip


def token_logprobs(x: Tensors, backend: str | None) -> Answer:
    with torch.no_grad():
        logprobs, entropy, *_ = ops.token_logprobs(x["logits"], x["targets"], backend=backend)
    return {"logprobs": logprobs, "entropy": entropy}


def token_logprobs_backward(x: Tensors, backend: str | None) -> Answer:
    leaf = x["logits"].detach().requires_grad_()
    logprobs, entropy, *_ = ops.token_logprobs(leaf, x["targets"], backend=backend)
    upstream = [x["upstream_logprobs"].to(logprobs.dtype), x["upstream_entropy"].to(entropy.dtype)]
    (d_logits,) = torch.autograd.grad([logprobs, entropy], leaf, upstream)
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d_logits": d_logits}


def _front(op: str) -> str:
    """The op whose backends a case's way uses."""
    return "gae" if op == "gae_whiten" else op


Solve = Callable[..., Answer]
SOLVE: dict[str, Solve] = {
    "gae": gae, "gae_whiten": gae_whiten, "whiten": whiten, "kl_gae": kl_gae, "kl_estimate": kl_estimate,
    "ppo_loss": ppo_loss, "value_loss": value_loss, "token_logprobs": token_logprobs,
    "token_logprobs_backward": token_logprobs_backward,
}  # fmt: skip
MAKE: dict[str, Callable[[int, int, torch.Generator], Tensors]] = {
    "gae": make_gae, "gae_whiten": make_gae, "whiten": make_whiten, "kl_gae": make_kl_gae,
    "kl_estimate": make_estimate, "ppo_loss": make_policy, "value_loss": make_values,
}  # fmt: skip
PARTS = {
    "gae": ("advantages", "returns"), "gae_whiten": ("advantages", "returns"), "whiten": ("whitened",),
    "kl_gae": ("advantages", "returns"), "kl_estimate": ("kl",), "ppo_loss": ("loss", "d_logprobs"),
    "value_loss": ("loss", "d_values"),
}  # fmt: skip
