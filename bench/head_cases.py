"""The language-model head, from hidden states to log-probs or a policy loss, and back.

What the tensors and answers of each op are called, for ours and for the peers in peers/ alike:

    linear_logprobs            hidden (N, H), weight (V, H), targets (N,) -> logprobs, entropy (N,); no gradients
    linear_logprobs_backward   and upstream_logprobs, upstream_entropy (N,) -> and d_hidden, d_weight
    linear_policy_loss         and old_logprobs, advantages (N,), mask (N,) bool -> loss, d_hidden, d_weight: PPO
                               clipped at .2, entropy bonus .01, mean over the mask's rows, which are all of them
    linear_policy_loss_25      the same with a quarter of the rows active
    linear_policy_loss_frozen  the same as the first with a frozen weight: no d_weight
    linear_cross_entropy       -> loss, d_hidden, d_weight: minus the mean log-prob, what pretraining kernels offer

FLOPs are counted in units of NHV, multiplications and additions apart: 2 for one product of all logits. 6 NHV is the
least that gives a loss and both gradients, 4 with a frozen weight, 2 without gradients. Log-probs whose upstream
gradient comes later are counted as 8: all logits twice, for nobody has room to keep them; the way that does spends 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rlhf_engine import ops
from rlhf_engine.bench import peers
from rlhf_engine.bench.case import OURS, Answer, Case, Tensors, Way

CLIP, ENTROPY_COEF = 0.2, 0.01
# Of the largest number. In bfloat16 logits up to 15 are rounded by up to .03 where a way keeps them so, and a
# probability by as much of itself.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# name: rows, width, vocabulary
SHAPES = {
    "cuda": {
        "Qwen3-8B": (8192, 4096, 151_936), "Llama-3.1-8B": (8192, 4096, 128_256), "Qwen3-1.7B": (8192, 2048, 151_936),
        "Qwen2.5-0.5B": (8192, 896, 151_936), "SmolLM2-135M": (8192, 576, 49_152), "odd": (4099, 1000, 50_257),
    },
    "cpu": {"SmolLM2-135M": (2048, 576, 49_152), "odd": (509, 200, 50_257)},
    "quick": {"SmolLM2-135M, few rows": (32, 576, 49_152), "odd": (67, 40, 1013)},
}  # fmt: skip
# rows, width, vocabularies; Qwen2.5-0.5B's width and vocabulary on a GPU, SmolLM2-135M's on a CPU
SWEEP = {
    "cuda": ((1024, 2048, 4096, 8192, 16_384, 32_768), 896, (32_000, 50_257, 128_256, 151_936, 262_144)),
    "cpu": ((64, 256, 1024), 576, (8192, 32_000, 49_152, 128_256)),
    "quick": ((8, 64, 128), 64, (1013, 4096, 8192)),
}
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.float32,), "quick": (torch.float32,)}
NHV = {
    "linear_logprobs": 2, "linear_logprobs_backward": 8, "linear_policy_loss": 6, "linear_policy_loss_25": 1.5,
    "linear_policy_loss_frozen": 4, "linear_cross_entropy": 6,
}  # fmt: skip


def cases(device: torch.device, quick: bool, dtypes: tuple[torch.dtype, ...] | None = None) -> Iterator[Case]:
    size = "quick" if quick else device.type
    for shape, (rows, width, vocabulary) in SHAPES[size].items():
        for dtype in dtypes or DTYPES[size]:
            for op in NHV:
                yield head(op, shape, rows, width, vocabulary, dtype, device)


def sweep(device: torch.device, quick: bool, dtypes: tuple[torch.dtype, ...] | None = None) -> Iterator[Case]:
    """The policy loss over N and over V, for the pictures of time and memory."""
    size = "quick" if quick else device.type
    rows, width, vocabularies = SWEEP[size]
    dtype, middle = (dtypes or DTYPES[size])[0], rows[len(rows) // 2]
    for count in rows:
        yield head("linear_policy_loss", "over N", count, width, vocabularies[-2], dtype, device, suite="sweep")
    for vocabulary in vocabularies:
        yield head("linear_policy_loss", "over V", middle, width, vocabulary, dtype, device, suite="sweep")


def head(
    op: str,
    shape: str,
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    suite: str = "head",
) -> Case:
    solve, share = SOLVE[op], 0.25 if op == "linear_policy_loss_25" else 1.0
    frozen, backward = op == "linear_policy_loss_frozen", op != "linear_logprobs"
    ours = Way(OURS, partial(solve, backend=None), ops.backends.chosen(_front(op), device.type))
    bare = Way("bare products", partial(products, op), note="the products alone, each as one", checked=False)
    return Case(
        suite, op, shape, {"N": rows, "H": width, "V": vocabulary}, dtype,
        partial(make, rows, width, vocabulary, dtype, share), partial(truth, op),
        {part: BOUNDS[dtype] for part in PARTS[op]}, [ours, *peers.ways(op, dtype, device), bare],
        bytes_moved=dtype.itemsize * width * (rows * (1 + backward) + vocabulary * (1 + (backward and not frozen))),
        flops=NHV[op] * rows * width * vocabulary, convention=f"{NHV[op]} NHV",
    )  # fmt: skip


def make(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, share: float, generator: torch.Generator
) -> Tensors:
    """Logits have a deviation of 3. No ratio is close to a clip: there, rounding decides a whole row's gradient. The
    mean advantage is not 0, or little would be left of the loss."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden, weight = normal(rows, width).to(dtype), (3 / width**0.5 * normal(vocabulary, width)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    with torch.no_grad():
        logprobs, _ = ops.linear_logprobs(hidden, weight, targets)
    steps = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=device)
    chosen = torch.randint(4, (rows,), generator=generator, device=device)
    mask = torch.rand(rows, generator=generator, device=device) < share
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "mask": mask,
        "old_logprobs": logprobs + steps[chosen], "advantages": 0.5 + normal(rows),
        "upstream_logprobs": normal(rows), "upstream_entropy": 0.1 * normal(rows),
    }  # fmt: skip


def truth(op: str, x: Tensors) -> Answer:
    """By the reference, in float64 where that is a matter of seconds, else in float32 from the same inputs."""
    work = x["hidden"].numel() * len(x["weight"])
    exact = torch.float64 if work <= 2e10 else torch.float32
    raised = {name: y.to(exact) if name in ("hidden", "weight") else y for name, y in x.items()}
    return SOLVE[op](raised, backend="reference")


def with_gradients(
    x: Tensors, outputs: Callable[[Tensor, Tensor], tuple[Answer, list[Tensor], list[Tensor] | None]]
) -> Answer:
    """`outputs` of two leaves: what is returned, what is differentiated, and with which upstream gradients."""
    hidden, weight = (x[name].detach().requires_grad_() for name in ("hidden", "weight"))
    answer, values, upstream = outputs(hidden, weight)
    d_hidden, d_weight = torch.autograd.grad(values, (hidden, weight), upstream)
    return {name: y.detach() for name, y in answer.items()} | {"d_hidden": d_hidden, "d_weight": d_weight}


def linear_logprobs(x: Tensors, backend: str | None) -> Answer:
    with torch.no_grad():
        logprobs, entropy, *_ = ops.linear_logprobs(x["hidden"], x["weight"], x["targets"], backend=backend)
    return {"logprobs": logprobs, "entropy": entropy}


def linear_logprobs_backward(x: Tensors, backend: str | None) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], list[Tensor]]:
        logprobs, entropy, *_ = ops.linear_logprobs(hidden, weight, x["targets"], backend=backend)
        upstream = [x["upstream_logprobs"].to(logprobs.dtype), x["upstream_entropy"].to(entropy.dtype)]
        return {"logprobs": logprobs, "entropy": entropy}, [logprobs, entropy], upstream

    return with_gradients(x, outputs)


def linear_policy_loss(x: Tensors, backend: str | None) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], None]:
        loss = policy(x, hidden, weight, backend)
        return {"loss": loss}, [loss], None

    return with_gradients(x, outputs)


def linear_policy_loss_frozen(x: Tensors, backend: str | None) -> Answer:
    hidden = x["hidden"].detach().requires_grad_()
    loss = policy(x, hidden, x["weight"].detach(), backend)
    return {"loss": loss.detach(), "d_hidden": torch.autograd.grad(loss, hidden)[0]}


def policy(x: Tensors, hidden: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    token_loss = ops.ppo_token_loss(
        x["old_logprobs"], x["advantages"], clip_low=CLIP, clip_high=CLIP, entropy_coef=ENTROPY_COEF
    )
    return ops.linear_policy_loss(hidden, weight, x["targets"], token_loss, mask=x["mask"], backend=backend)[0]


def linear_cross_entropy(x: Tensors, backend: str | None) -> Answer:
    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Answer, list[Tensor], None]:
        loss, _ = ops.linear_policy_loss(
            hidden, weight, x["targets"], lambda logprobs, entropy, rows: -logprobs, backend=backend
        )
        return {"loss": loss}, [loss], None

    return with_gradients(x, outputs)


def products(op: str, x: Tensors) -> Answer:
    """As many as the op needs, of the rows that count, in the dtype of the inputs."""
    hidden, weight = x["hidden"][: round(NHV[op] / 6 * len(x["hidden"])) if op.endswith("25") else None], x["weight"]
    logits = hidden @ weight.t()
    count = 1 if op == "linear_logprobs" else 2 if op.endswith("frozen") else 3
    answer = {"logits": logits}
    if count > 1:
        answer["d_hidden"] = logits @ weight
    if count > 2:
        answer["d_weight"] = logits.t() @ hidden
    return answer


def _front(op: str) -> str:
    return "linear_logprobs" if op.startswith("linear_logprobs") else "linear_policy_loss"


SOLVE: dict[str, Callable[..., Answer]] = {
    "linear_logprobs": linear_logprobs, "linear_logprobs_backward": linear_logprobs_backward,
    "linear_policy_loss": linear_policy_loss, "linear_policy_loss_25": linear_policy_loss,
    "linear_policy_loss_frozen": linear_policy_loss_frozen, "linear_cross_entropy": linear_cross_entropy,
}  # fmt: skip
PARTS = {
    "linear_logprobs": ("logprobs", "entropy"),
    "linear_logprobs_backward": ("logprobs", "entropy", "d_hidden", "d_weight"),
    "linear_policy_loss": ("loss", "d_hidden", "d_weight"), "linear_policy_loss_25": ("loss", "d_hidden", "d_weight"),
    "linear_policy_loss_frozen": ("loss", "d_hidden"), "linear_cross_entropy": ("loss", "d_hidden", "d_weight"),
}  # fmt: skip
