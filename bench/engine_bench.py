"""`PPOEngine` by the clock: rollout, score, update and the whole step, on random weights in the shapes of real models.

A step is timed only if it was right: the first minibatch of every round has a ratio of exactly 1 and no KL from the
policy that was scored, losses are finite, the reference keeps its checksum, and no prompt and no token is lost. The
first step, which compiles and allocates, is given apart. The device is waited for between phases.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import rlhf_engine
from rlhf_engine import models, ops
from rlhf_engine.bench import engine_work
from rlhf_engine.bench.case import OURS
from rlhf_engine.bench.clock import wait
from rlhf_engine.bench.engine_work import PHASES, Line, Tell, Work, times, usual_steps, works
from rlhf_engine.bench.suite import free
from rlhf_engine.config import PPOConfig
from rlhf_engine.engine import PPOEngine
from rlhf_engine.types import Experience, Prompts, Rollout

# What others say of themselves: verl's quickstart (docs/start/quickstart.rst), the log of step 0. Not measured here.
PUBLISHED: list[Line] = [
    {
        "kind": "engine", "way": "verl", "model": "Qwen2.5-0.5B-Instruct", "verdict": "published, not measured here",
        "source": "verl documentation, docs/start/quickstart.rst, log of step 0",
        "note": "one GPU of at least 24 GB, its name not given; generation by vLLM",
        "config": {"batch": 256, "prompt_tokens": 104.883, "response_tokens": 239.133},
        "seconds": {"gen": 21.470, "ref": 4.360, "values": 5.800, "adv": 0.109, "update_critic": 15.664,
                    "update_actor": 20.314},
    }
]  # fmt: skip
MUST_BE_ZERO = ("first_update_ratio_max_abs_dev", "first_minibatch_approx_kl", "prompts_lost", "tokens_lost")


class WatchedEngine(PPOEngine):
    """Keeps what every minibatch measured: `update` returns means over all of them, and the first is the proof."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[dict[str, Tensor]] = []

    def _minibatch(self, e: Experience, group: list[slice], warm_up: bool) -> dict[str, Tensor]:
        self.seen.append(super()._minibatch(e, group, warm_up))
        return self.seen[-1]


def lines(
    device: torch.device, quick: bool, steps: int | None = None, tell: Tell = lambda text: None
) -> Iterator[Line]:
    """One for each shape and setting; `steps` are timed after the first."""
    steps = steps or usual_steps(device, quick)
    for work in works(device, quick):
        tell(f"engine: {work.shape.name}, {work.setting}")
        line = work.line(OURS, rlhf_engine.__version__)
        try:
            line |= measure(work, device, steps)
        except torch.OutOfMemoryError:
            line["verdict"] = "out of memory"
        except Exception as error:  # a finding, which must not end the run
            line["verdict"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield line
        free(device)


def make_engine(work: Work, device: torch.device) -> WatchedEngine:
    config = PPOConfig(
        steps=1, batch_size=work.batch, micro_batch_size=work.micro_batch, epochs=work.epochs,
        minibatches=work.minibatches, max_new_tokens=work.response_tokens, ignore_eos=True, lr_schedule="constant",
        lr_warmup_steps=0, train_layers=work.train_layers, train_embeddings=work.everything,
        critic="layers" if work.everything else "head", lr=work.lr, value_lr=work.lr,
        dtype="bfloat16" if work.shape.dtype == torch.bfloat16 else "float32",
    )  # fmt: skip
    return WatchedEngine(
        engine_work.policy(work.shape, device), reward=engine_work.reward, tokenizer=engine_work.tokenizer(work.shape),
        config=config,
    )  # fmt: skip


def measure(work: Work, device: torch.device, steps: int) -> Line:
    """The part of a line that running it gives."""
    engine = make_engine(work, device)
    checked: dict[str, float] = dict.fromkeys(MUST_BE_ZERO, 0.0) | {"sampler_logprob_abs_diff_max": 0.0}
    rounds, finite = [], True
    for number, batch in enumerate(engine_work.prompts(work, 1 + steps, engine.tokenizer)):
        if number == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds, experience, metrics = timed_step(engine, batch, device)
        rounds.append(seconds)
        finite &= all(math.isfinite(x) for x in metrics.values()) and metrics["skipped_steps"] == 0
        for name, found in deviations(work, engine.seen[0], batch, experience, metrics).items():
            checked[name] = worse(checked[name], found)
        engine.seen.clear()
    same = models.checksum(engine.reference) == engine.reference_checksum
    off = [f"{name} is {checked[name]:.3g}, not 0" for name in MUST_BE_ZERO if checked[name] != 0]
    off += ["a loss or a gradient is not finite"] * (not finite) + ["the reference has changed"] * (not same)
    line = {"checked": checked | {"losses_finite": finite, "reference_unchanged": same}}
    if off:
        return line | {"verdict": f"wrong: {', '.join(off)}"}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return line | {"verdict": "right", "peak_bytes": peak} | times(work, rounds)


def timed_step(
    engine: PPOEngine, batch: Prompts, device: torch.device
) -> tuple[dict[str, float], Experience, dict[str, float]]:
    """What PPOEngine.step does, waiting for the device after each phase."""
    clock = []

    def tick() -> None:
        wait(device)
        clock.append(time.perf_counter())

    tick()
    sampled: Rollout = engine.rollout(batch)
    tick()
    experience = engine.score(sampled)
    tick()
    metrics = engine.update(experience)
    tick()
    took = (b - a for a, b in zip(clock, clock[1:], strict=False))
    return dict(zip(PHASES, took, strict=True)), experience, metrics


def deviations(
    work: Work, first: dict[str, Tensor], given: Prompts, experience: Experience, metrics: dict[str, float]
) -> dict[str, float]:
    """How far one round is from what it must be; `first` is what its first minibatch measured."""
    batch, start = experience.rollout, ops.finalize_metrics(first)
    kl = worse(abs(start["approx_kl_k1"]), abs(start["approx_kl_k3"]))
    answered = dict(zip(batch.prompts.ids, batch.tokens[:, : work.prompt_tokens].tolist(), strict=True))
    asked = dict(zip(given.ids, given.input_ids.tolist(), strict=True))
    apart = torch.where(batch.response_mask, (experience.logprobs - batch.sampler_logprobs).abs(), 0.0)
    return {
        "first_update_ratio_max_abs_dev": metrics.get("first_update_ratio_max_abs_dev", math.nan),
        "first_minibatch_approx_kl": kl,
        "prompts_lost": float(sum(answered.get(name) != row for name, row in asked.items())),
        "tokens_lost": work.tokens_trained - metrics["policy/tokens"],
        "sampler_logprob_abs_diff_max": float(apart.max()),
    }


def worse(a: float, b: float) -> float:
    """The larger one; NaN where either is, which `max` would lose."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b, key=abs)
