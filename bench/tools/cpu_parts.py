"""What makes the demo's steps fast on CPUs, each against the plain way: `python bench/tools/cpu_parts.py`.

Every answer is checked before its time is printed. Shapes are the demo's: 320 tokens of SmolLM2-135M, 64 rows of its
vocabulary, the reward model's features of 4096 texts.
"""

from __future__ import annotations

import torch
from measure import check, seconds
from torch import Tensor

from rlhf_engine import ops, rollout
from rlhf_engine.byte_dropout import ByteDropout

TOKENS, WIDTH, VOCABULARY = 320, 576, 49_152


def show(what: str, plain: float, ours: float, note: str = "") -> None:
    print(f"{what:34} {plain * 1e3:9.1f} ms {ours * 1e3:9.1f} ms {plain / ours:7.1f}x  {note}", flush=True)


def head() -> None:
    """Scoring, and the update of a frozen head: forward and gradient of the hidden states."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH) / 24
    targets = torch.randint(VOCABULARY, (TOKENS,))
    old, advantages = torch.full((TOKENS,), -10.0), torch.randn(TOKENS)

    def score(backend: str) -> Tensor:
        with torch.no_grad():
            return ops.linear_logprobs(hidden, weight, targets, backend=backend)[0]

    def loss(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        ratio = (logprobs - old[rows]).clamp(-20, 20).exp()
        return torch.maximum(-advantages[rows] * ratio, -advantages[rows] * ratio.clamp(0.8, 1.2))

    def update(backend: str) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        ops.linear_policy_loss(leaf, weight, targets, loss, backend=backend)[0].backward()
        assert leaf.grad is not None
        return leaf.grad

    check("linear_logprobs", score("cpu"), score("reference"), 1e-5)
    check("linear_policy_loss", update("cpu"), update("reference"), 1e-4)
    product = 2 * TOKENS * WIDTH * VOCABULARY
    for name, work, products in (("score the head", score, 1), ("update through the head", update, 2)):
        plain, ours = seconds(lambda work=work: work("reference")), seconds(lambda work=work: work("cpu"))
        show(name, plain, ours, f"{products * product / ours / 1e9:.0f} GFLOP/s")
    bare = seconds(lambda: hidden @ weight.T)
    print(f"{'one bare product':34} {bare * 1e3:9.1f} ms {'':29} {product / bare / 1e9:.0f} GFLOP/s")


def sampling() -> None:
    """One token for every row of a batch."""
    probabilities = torch.softmax(torch.randn(64, VOCABULARY), 1)
    few = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(100_000, 4)
    drawn = rollout.choose(few, torch.rand(len(few), dtype=torch.float64)).bincount(minlength=4) / len(few)
    check("choose", drawn, few[0], 0.02)
    plain = seconds(lambda: torch.multinomial(probabilities, 1))
    show("sample a token", plain, seconds(lambda: rollout.choose(probabilities, torch.rand(64, dtype=torch.float64))))


def dropout() -> None:
    """On the reward model's features."""
    features, ours = torch.randn(4096, 8 * WIDTH), ByteDropout(0.3)
    kept = ours(torch.ones(1000, 1000))
    check("dropout", kept.mean(), torch.ones(()), 0.01)
    plain = seconds(lambda: torch.nn.functional.dropout(features, 0.3))
    show("dropout of the features", plain, seconds(lambda: ours(features)))


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':34} {'plain':>12} {'ours':>12}")
    head()
    sampling()
    dropout()
