"""The same rounds by the PPO trainer of TRL 1.12, the last release that has one; in a process of its own.

    UPSTREAM=.upstream python -m rlhf_engine.bench.engine_trl --device cpu

The trainer is used as released; the clock hangs on its calls from outside. The same as ours are the model's shape and
weights, prompts, batch, lengths, passes, optimiser steps, learning rate and reward, and that all of the policy trains,
and all of a critic as large but its embeddings, which ours does not train where they are tied to a head. Not the same:
it shuffles the prompts, generates and scores the batch in one piece (the fastest it can), takes no norm of gradients,
and has no float32 masters, so bfloat16 weights are stepped in bfloat16. The garbage collection after its scoring is
timed; its logging and what follows are not. It has no frozen trunk, so that setting has no peer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_engine.bench import engine_work
from rlhf_engine.bench.clock import wait
from rlhf_engine.bench.engine_work import PHASES, Line, Tell, Work, times, usual_steps, works
from rlhf_engine.bench.peers import packages

WAY = "TRL PPOTrainer"
LIMIT = 1800  # seconds for one setting
NOTE = "no float32 masters, no gradient norm; its logging is not timed"


def lines(
    device: torch.device, quick: bool, steps: int | None = None, tell: Tell = lambda text: None
) -> Iterator[Line]:
    """For each work that trains everything, what a process of its own printed, or why there is none."""
    for number, work in enumerate(works(device, quick)):
        if work.everything:
            tell(f"engine: {work.shape.name}, {work.setting}, {WAY}")
            yield work.line(WAY, "", NOTE) | _elsewhere(number, device, quick, steps or usual_steps(device, quick))


def _elsewhere(number: int, device: torch.device, quick: bool, steps: int) -> Line:
    command = [sys.executable, "-m", "rlhf_engine.bench.engine_trl", "--device", str(device), "--steps", str(steps)]
    command += ["--work", str(number), "--threads", str(torch.get_num_threads()), *(["--quick"] if quick else [])]
    try:
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=LIMIT
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"verdict": f"failed: not done after {LIMIT} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"verdict": f"failed: {said[-1][:300]}"}


def load() -> ModuleType:
    """The module that holds the trainer: from UPSTREAM (see `make upstream`) or PEERS, where this environment has none.

    Raises:
        ImportError: no TRL, or a release without PPO.
    """
    os.environ["PEERS"] = os.pathsep.join([os.environ.get("UPSTREAM", ""), os.environ.get("PEERS", "")])
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    return packages.module("trl.experimental.ppo.ppo_trainer")


class ShareOfEven(nn.Module):
    """The reward as a reward model: at each position the share of even tokens of the response so far."""

    base_model_prefix = "body"

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self.body, self.score = SoFar(prompt_tokens), nn.Identity()


class SoFar(nn.Module):
    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self.prompt_tokens = prompt_tokens

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        even = (input_ids % 2 == 0).float()
        even[:, : self.prompt_tokens] = 0
        count = (torch.arange(even.shape[1], device=even.device) - self.prompt_tokens + 1).clamp(min=1)
        return SimpleNamespace(hidden_states=[(even.cumsum(1) / count)[..., None]])


class Stopwatch:
    """Hangs on the calls of the trainer's module: the generation of a batch, each forward, each optimiser step."""

    def __init__(self, module: Any, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.rounds: list[list[float]] = []  # of each: began, generated, first trained forward, last optimiser step
        self.prompts: list[tuple[int, ...]] = []
        self.tokens: list[int] = []  # response tokens trained, of each round
        self.optimiser_steps: list[int] = []
        module.batch_generation = partial(self.generation, module.batch_generation)
        module.forward = partial(self.forward, module.forward)

    def now(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def generation(self, original: Callable[..., Any], model: Any, queries: Tensor, *rest: Any) -> Any:
        if len(self.rounds) == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.prompts += [tuple(row) for row in queries.tolist()]
        began = self.now()
        made = original(model, queries, *rest)
        generated = self.now()
        self.rounds.append([began, generated, math.nan, math.nan])
        self.tokens.append(0)
        self.optimiser_steps.append(0)
        return made

    def forward(self, original: Callable[..., Any], model: Any, tokens: Tensor, pad: int) -> Any:
        if torch.is_grad_enabled():
            if math.isnan(self.rounds[-1][2]):
                self.rounds[-1][2] = self.now()
            self.tokens[-1] += int((tokens[:, self.work.prompt_tokens :] != pad).sum())
        return original(model, tokens, pad)

    def stepped(self, *_: Any) -> None:
        self.rounds[-1][3] = self.now()
        self.optimiser_steps[-1] += 1

    def seconds(self) -> list[dict[str, float]]:
        return [
            dict(zip(PHASES, (b - a for a, b in zip(row, row[1:], strict=False)), strict=True)) for row in self.rounds
        ]


def measure(module: Any, work: Work, device: torch.device, steps: int) -> Line:
    """The part of a line that running it gives."""
    watch = Stopwatch(module, work, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, given = make_trainer(module, work, device, steps, folder)
        before = [p.detach().clone() for p in trainer.model.policy.parameters()]
        getattr(trainer.optimizer, "optimizer", trainer.optimizer).register_step_post_hook(watch.stepped)
        logs: list[dict[str, float]] = []
        trainer.log = lambda metrics, *_: logs.append(metrics)
        trainer.train()
    losses = [log[name] for log in logs for name in ("loss/policy_avg", "loss/value_avg", "objective/scores")]
    moved = any(not torch.equal(p, q) for p, q in zip(before, trainer.model.policy.parameters(), strict=True))
    checked: dict[str, Any] = {
        "tokens_lost": max(abs(work.tokens_trained - count) for count in watch.tokens),
        "prompts_lost": len(set(given) - set(watch.prompts)),
        "rounds_lost": 1 + steps - len(watch.rounds),
        "optimiser_steps_lost": max(abs(work.epochs * work.minibatches - n) for n in watch.optimiser_steps),
    }
    off = [f"{name} is {count}, not 0" for name, count in checked.items() if count]
    finite = len(losses) == 3 * (1 + steps) and all(map(math.isfinite, losses))
    off += ["a loss is not finite"] * (not finite) + ["the policy has not moved"] * (not moved)
    line = {"checked": checked | {"losses_finite": finite, "policy_moved": moved}}
    if off:
        return line | {"verdict": f"wrong: {', '.join(off)}"}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return line | {"verdict": "right", "peak_bytes": peak} | times(work, watch.seconds())


def make_trainer(
    module: Any, work: Work, device: torch.device, steps: int, folder: str
) -> tuple[Any, list[tuple[int, ...]]]:
    """The trainer and the prompts that it gets, enough for one pass."""
    from transformers import AutoModelForSequenceClassification

    words = engine_work.tokenizer(work.shape)
    batches = engine_work.prompts(work, 1 + steps, words)
    given = [tuple(row) for batch in batches for row in batch.input_ids.tolist()]
    config = engine_work.model_config(work.shape)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config, dtype=work.shape.dtype)
    critic.get_input_embeddings().requires_grad_(False)
    args = module.PPOConfig(
        output_dir=folder, per_device_train_batch_size=work.batch, gradient_accumulation_steps=1,
        num_mini_batches=work.minibatches, num_ppo_epochs=work.epochs, total_episodes=len(given),
        local_rollout_forward_batch_size=work.batch, response_length=work.response_tokens, temperature=1.0,
        learning_rate=work.lr, lr_scheduler_type="constant", num_sample_generations=0, gradient_checkpointing=False,
        bf16=False, use_cpu=device.type == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = module.PPOTrainer(
        args=args, processing_class=words, model=engine_work.policy(work.shape, device),
        ref_model=engine_work.policy(work.shape, device), reward_model=ShareOfEven(work.prompt_tokens),
        value_model=critic.to(device), train_dataset=[{"input_ids": list(row)} for row in given],
    )  # fmt: skip
    return trainer, given


def main() -> None:
    """Runs one work and prints its line; everything else that is said goes to stderr."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, help="timed after the first")
    parser.add_argument("--work", type=int, default=0, help="which of engine_work.works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    work = works(device, given.quick)[given.work]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            module = load()
        except ImportError as error:
            found: Line = {"verdict": f"absent: {' '.join(str(error).split())[:200]}"}
        else:
            found = {"version": importlib.metadata.version("trl")}
            try:
                found |= measure(module, work, device, given.steps or usual_steps(device, given.quick))
            except torch.OutOfMemoryError:
                found["verdict"] = "out of memory"
    print(json.dumps(work.line(WAY, "", NOTE) | found))


if __name__ == "__main__":
    main()
