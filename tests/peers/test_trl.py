"""The head of TRL 1.16.0: its functions on logits, its fused head as models get it, and the loss of its GRPO trainer.

On CPUs TRL scores with torch; its Triton kernels, and the gathering of rows that comes with them, run in Triton's
interpreter (see kernel_script.py). A fused head in float64 keeps float32 statistics, so that comparison is of float32.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import kernel_script
import peer_heads
import pytest
import torch
from peer_heads import MODES, Results, agree, backends, dtypes, make_head, ours, run
from torch import Tensor

from rlhf_engine import ops

peer_heads.needs_peers()
if sys.version_info < (3, 11):
    pytest.skip("TRL 1.16 needs Python 3.11", allow_module_level=True)

# Ours -> what a model's configuration calls it; the temperature is an argument.
CONFIGURED = {"softcap": "final_logit_softcapping", "logit_scale": "logit_scale"}
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},  # logits of up to 15
    "logit scale": {"logit_scale": 0.25},
    "all": {"temperature": 1.3, "softcap": 6.0, "logit_scale": 2.0},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
PROMPT, LONGEST = 5, 40
LENGTH = 9  # of sequences in the interpreter, a hundredth of a second a row


class Policy(torch.nn.Module):
    """A model that is nothing but its head."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, float]) -> None:
        super().__init__()
        text = SimpleNamespace(**{CONFIGURED[name]: x for name, x in options.items() if name in CONFIGURED})
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.hidden, self.head = hidden, SimpleNamespace(weight=weight, bias=bias)

    def forward(self) -> None: ...

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head


@pytest.fixture(scope="module")
def utils() -> Any:
    return peer_heads.load("trl.trainer.utils")


def make_tiles_small(patch: pytest.MonkeyPatch) -> None:
    """So that rows and tokens come in several tiles, the last of each not full."""
    patch.setattr(peer_heads.load("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 300)
    patch.setattr(peer_heads.load("trl.kernels.chunked_logprob"), "TOKEN_CHUNK_SIZE", 32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiles_small(monkeypatch)


def fused(utils: Any, head: peer_heads.Head, **options: float) -> Results:
    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        policy = Policy(hidden, weight, bias, options)
        utils.add_fused_lm_head(policy, options.get("temperature", 1.0), outputs=("log_probs", "entropy"))
        scored = policy(fused_lm_head=True, shift_labels=head.labels)
        assert torch.equal(scored.label_mask, head.mask)
        return scored.log_probs, scored.entropy

    return run(head, score)


def check_logits(score: Any, head: peer_heads.Head, backend: str, temperature: float) -> None:
    """Of a view: the last token of each sequence is not scored."""
    found = []
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    ours = partial(ops.token_logprobs, targets=head.labels, mask=head.mask, backend=backend)
    for each in (ours, partial(score, index=head.labels.clamp(min=0), row_mask=head.mask)):
        leaf = torch.nn.functional.pad(logits, (0, 0, 0, 1)).requires_grad_()
        logprobs, entropy = each(leaf[:, :-1], temperature=temperature)
        (logprobs * head.grad_logprobs + entropy * head.grad_entropy).sum().backward()
        found.append({"logprobs": logprobs, "entropy": entropy, "logits": leaf.grad})
    agree(*found, logits.dtype)


@backends("token_logprobs")
@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits(utils: Any, dtype: torch.dtype, backend: str, temperature: float) -> None:
    check_logits(utils.selective_log_softmax_and_entropy, make_head(dtype), backend, temperature)


@options
@backends("linear_logprobs")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.usefixtures("small_tiles")
def test_fused_head(utils: Any, bias: bool, backend: str, options: dict[str, float]) -> None:
    head = make_head(bias=bias)
    agree(ours(head, backend, **options), fused(utils, head, **options))


@backends("linear_logprobs")
@pytest.mark.usefixtures("small_tiles")
def test_fused_extras(utils: Any, backend: str) -> None:
    """Whether the target is the likeliest token, and the logarithm of the sum of squares."""
    head = make_head()
    hidden = head.hidden.detach().reshape(-1, head.hidden.shape[-1])
    targets = (hidden @ head.weight.detach().T).argmax(1)
    targets[::3] = head.labels.reshape(-1)[::3].clamp(min=0)
    theirs = utils._ChunkedLogProbFunction.apply(
        hidden, head.weight.detach(), None, targets, 0.7, 300, None, 1.0,
        ("log_probs", "entropy", "log_sum_sq_probs", "is_top1"),
    )  # fmt: skip
    *_, extras = ops.linear_logprobs(
        hidden, head.weight.detach(), targets, temperature=0.7, extras=["top1", "sum_p_squared"], backend=backend
    )
    assert torch.equal(extras["top1"] == targets, theirs[4].bool()) and theirs[4].any() and not theirs[4].all()
    agree({"squares": extras["sum_p_squared"].log()}, {"squares": theirs[2]})


@backends("linear_logprobs")
def test_fused_head_in_float64(utils: Any, backend: str) -> None:
    head = make_head(torch.float64)
    agree(ours(head, backend, temperature=0.7), fused(utils, head, temperature=0.7))


class Trainer:
    """GRPOTrainer without a constructor: what its loss reads."""

    use_vllm = vllm_importance_sampling_correction = _entropy_bonus_enabled = True
    importance_sampling_level, top_entropy_quantile, off_policy_mask_threshold = "token", 1.0, None
    aux_loss_enabled = use_adaptive_entropy = False
    current_gradient_accumulation_steps, max_completion_length = 1, LONGEST
    accelerator = SimpleNamespace(
        autocast=nullcontext, gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1, sync_gradients=True
    )

    def __init__(self, kind: type, model: torch.nn.Module, loss_type: str, entropy_coef: float) -> None:
        self.model, self.loss_type, self.entropy_coef = model, loss_type, entropy_coef
        self.epsilon_low, self.epsilon_high, self.beta = 0.2, 0.3, 0.1
        self.args = SimpleNamespace(delta=1.5, use_bias_correction_kl=False, steps_per_generation=1)
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self._get_per_token_logps_and_entropies = lambda *x, **more: scores(self, *x, **more)
        scores = kind._get_per_token_logps_and_entropies.__wrapped__


@pytest.mark.parametrize("loss_type", MODES)
@backends("linear_policy_loss")
@pytest.mark.usefixtures("small_tiles")
def test_policy_loss(utils: Any, backend: str, loss_type: str) -> None:
    """Two-sided clipping is dual clip under another name. The entropy bonus is a mean over tokens in every mode."""
    kind = peer_heads.load("trl.trainer.grpo_trainer").GRPOTrainer
    head, rng = make_head(), torch.Generator().manual_seed(1)
    mode, entropy_coef = MODES[loss_type], 0.05 if MODES[loss_type] == "token-mean" else 0.0
    shape = (head.mask.shape[0], head.mask.shape[1] - PROMPT)
    ids = torch.randint(peer_heads.VOCABULARY, head.mask.shape, generator=rng)
    padding = torch.arange(shape[1]) < torch.tensor([32, 32, 12, 32, 1, 7, 32, 32])[:, None]
    scored = head.mask[:, PROMPT - 1 : -1]
    mask = padding & scored
    read, targets = head.hidden[:, PROMPT - 1 : -1], ids[:, PROMPT:]
    now, _ = ops.linear_logprobs(read, head.weight, targets, bias=head.bias, temperature=0.7)
    noise = torch.randn(3, *shape, generator=rng)  # the mean advantage is not 0, or nothing would be left of the loss
    old, reference, advantages = now + 0.7 * noise[0], now + 0.3 * noise[1], noise[2] + 0.5
    is_weights = torch.rand(shape, generator=rng)

    leaves = head.leaves()
    policy = Policy(**leaves, options={})
    utils.add_fused_lm_head(policy, 0.7, outputs=("log_probs", "entropy"))
    trainer = Trainer(kind, policy, loss_type, entropy_coef)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": targets, "completion_mask": padding.long(), "tool_mask": scored.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "importance_sampling_ratio": is_weights, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    their_loss = kind._compute_loss(trainer, policy, inputs)
    their_loss.backward()
    theirs = {"loss": their_loss} | {name: x.grad for name, x in leaves.items()}

    leaves = head.leaves()
    token_loss = ops.ppo_token_loss(
        old, advantages, clip_low=0.2, clip_high=0.3, dual_clip=1.5, is_weights=is_weights, entropy_coef=entropy_coef,
        ref_logprobs=reference, kl_coef=0.1,
    )  # fmt: skip
    loss, metrics = ops.linear_policy_loss(
        leaves["hidden"][:, PROMPT - 1 : -1], leaves["weight"], targets, token_loss, bias=leaves["bias"],
        temperature=0.7, mask=mask, backend=backend,
        weights=ops.token_weights(mask, mode, constant_length=LONGEST if mode == "constant" else None),
        denom=mask.sum() if mode == "token-mean" else shape[0],  # TRL counts sequences without tokens too
    )  # fmt: skip
    loss.backward()
    agree({"loss": loss} | {name: x.grad for name, x in leaves.items()}, theirs)
    numbers, logged = ops.finalize_metrics(metrics), trainer._metrics["train"]
    assert 0.1 < numbers["clip_fraction"] < 0.9 and numbers["clip_fraction_low"] > 0
    assert numbers["clip_fraction"] == pytest.approx(logged["clip_ratio/region_mean"][0], rel=1e-6)
    assert numbers["entropy"] == pytest.approx(logged["entropy"][0], rel=1e-6)


def case_logits(temperature: float) -> None:
    kernel = peer_heads.load("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    check_logits(kernel, make_head(length=LENGTH), "reference", temperature)


def case_fused_head(options: dict[str, float]) -> None:
    """As on a GPU, where TRL also gathers the rows that count."""
    utils, head = peer_heads.load("trl.trainer.utils"), make_head(length=LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        make_tiles_small(patch)
        for module in (utils, peer_heads.load("trl.kernels.chunked_logprob")):
            patch.setattr(module, "_use_triton", lambda device: True)
        agree(ours(head, "reference", **options), fused(utils, head, **options))


INTERPRETED: dict[str, Callable[[], None]] = {
    **{f"logits, temperature {t}": partial(case_logits, t) for t in (1.0, 0.7)},
    **{f"fused head, {name}": partial(case_fused_head, options) for name, options in OPTIONS.items()},
}


@pytest.mark.parametrize("case", INTERPRETED)
def test_kernels(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


if __name__ == "__main__":
    kernel_script.main(INTERPRETED, {})
