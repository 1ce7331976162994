"""The ways through the head that `bench/head.py` compares: hidden states to a PPO loss with entropy bonus, and back.

As a script, the memory of one of them: `python bench/head_ways.py WAY ROWS DTYPE VOCABULARY WIDTH SHARE`, in MB beyond
inputs and returned gradients. What is freed goes back to the system at once (see `peak_mb`), so an earlier run hides
nothing.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_engine import ops

ENTROPY_COEF = 0.01
Answer = tuple[Tensor, Tensor, Tensor]  # the loss, and its gradients in hidden and weight


@dataclass
class Problem:
    """N rows of a batch, of which `mask` has a response token each; all in one dtype but what PPO keeps."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    mask: Tensor  # (N,)
    old: Tensor  # (N,) log-probs, float32
    advantages: Tensor  # (N,) float32

    def first(self, rows: int) -> Problem:
        parts = {name: getattr(self, name)[:rows] for name in ("hidden", "targets", "mask", "old", "advantages")}
        return replace(self, **parts)

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


def make(rows: int, dtype: torch.dtype, vocabulary: int, width: int, share: float) -> Problem:
    """Logits have a deviation of 3. No ratio is close to a clip: there, rounding decides a whole row's gradient. The
    mean advantage is not 0, or little would be left of the loss."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=rng).to(dtype)
    weight = torch.randn(vocabulary, width, generator=rng).mul_(3 / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=rng)
    mask = torch.rand(rows, generator=rng) < share
    with torch.no_grad():
        logprobs, _ = ops.linear_logprobs(hidden, weight, targets)
    old = logprobs + torch.tensor([-0.5, -0.05, 0.05, 0.5])[torch.randint(4, (rows,), generator=rng)]
    return Problem(hidden, weight, targets, mask, old, 0.5 + torch.randn(rows, generator=rng))


def ppo(logprobs: Tensor, entropy: Tensor, problem: Problem) -> Tensor:
    """In plain PyTorch, for every row; masked at the end."""
    ratio = (logprobs - problem.old).clamp(-20, 20).exp()
    clipped = -problem.advantages * ratio.clamp(0.8, 1.2)
    loss = torch.maximum(-problem.advantages * ratio, clipped) - ENTROPY_COEF * entropy
    return loss.where(problem.mask, 0).sum() / problem.mask.sum()


def usual(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    logprobs = F.log_softmax(F.linear(hidden, weight).float(), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return ppo(logprobs.gather(1, problem.targets[:, None])[:, 0], entropy, problem)


def ours(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    token_loss = ops.ppo_token_loss(problem.old, problem.advantages, entropy_coef=ENTROPY_COEF)
    return ops.linear_policy_loss(hidden, weight, problem.targets, token_loss, mask=problem.mask)[0]


def trl_module() -> ModuleType | str:
    """TRL's, from the folder named in PEERS (see `make peers`), or why it is not there."""
    folder = os.environ.get("PEERS", "")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module("trl.trainer.utils")
    except ImportError as error:
        return str(error)
    return module if hasattr(module, "_ChunkedLogProbFunction") else "this release has no fused head"


def trl_version() -> str:
    return importlib.import_module("trl").__version__


def trl(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """As its add_fused_lm_head does on CPUs: every row is scored, and those that do not count are masked."""
    module = trl_module()
    assert isinstance(module, ModuleType), module
    logprobs, entropy, *_ = module._ChunkedLogProbFunction.apply(
        hidden, weight, None, problem.targets, 1.0, module._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
        ("log_probs", "entropy"),
    )  # fmt: skip
    return ppo(logprobs.masked_fill(~problem.mask, 0), entropy.masked_fill(~problem.mask, 0), problem)


WAYS: dict[str, Callable[[Problem, Tensor, Tensor], Tensor]] = {"usual": usual, "ours": ours, "trl": trl}


def answer(way: str, problem: Problem) -> Answer:
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = WAYS[way](problem, hidden, weight)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def products(problem: Problem) -> None:
    """The three that give both gradients, in float32, each as one: no way with 6 NHV can be much faster."""
    hidden, weight = problem.hidden.float(), problem.weight.float()
    logits = torch.empty(len(hidden), len(weight))
    torch.mm(hidden, weight.t(), out=logits)
    torch.mm(logits, weight)
    torch.mm(logits.t(), hidden)


def peak_mb(way: str, rows: int, dtype: torch.dtype, vocabulary: int, width: int, share: float) -> float:
    """Of a fresh process. glibc would keep freed blocks of up to 32 MB for later, where they would count for nothing;
    with a fixed threshold it maps and unmaps each."""
    shape = [str(x) for x in (rows, str(dtype).removeprefix("torch."), vocabulary, width, share)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, str(Path(__file__)), way, *shape]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise SystemExit(f"the memory of {' '.join(command[1:])}: {done.stderr}")
    return float(done.stdout.split()[-1])


def status_mb(field: str) -> float:
    """A line of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    way, rows, dtype, vocabulary, width, share = sys.argv[1:]
    problem = make(int(rows), getattr(torch, dtype), int(vocabulary), int(width), float(share))
    answer(way, problem.first(max(1, int(rows) // 16)))  # what libraries set up once is not the way's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mb("VmRSS")
    gradients = answer(way, problem)[1:]
    print(status_mb("VmHWM") - before - sum(x.nbytes for x in gradients) / 1e6)


if __name__ == "__main__":
    main()
