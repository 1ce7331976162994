"""The engine on a GPU: exactly on-policy in every family and dtype, and a reference that never moves."""

from __future__ import annotations

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE
from test_engine import PROMPTS, make_engine
from tiny_models import tiny_lm, word_tokenizer

from rlhf_engine import models
from rlhf_engine import reward_model as rm
from rlhf_engine import reward_training as rt
from rlhf_engine.config import RewardModelConfig, SFTConfig
from rlhf_engine.data import SFTRecord
from rlhf_engine.sft import train_sft
from rlhf_engine.types import Comparisons

pytestmark = gpu_tier.marks()
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox"]  # tied weights, a capped head, learned positions, parallel blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_ratio_is_exactly_one(family: str, dtype: torch.dtype) -> None:
    engine = make_engine(tiny_lm(family, dtype=dtype).to(DEVICE), dtype=str(dtype).removeprefix("torch."))
    for _ in range(2):
        metrics = engine.step(PROMPTS).metrics
        assert metrics["first_update_ratio_max_abs_dev"] == 0.0
        assert metrics["policy/approx_kl_k1"] == 0.0 and metrics["policy/clip_fraction"] == 0.0
        assert metrics["sampler/logprob_abs_diff_max"] < (1e-3 if dtype is torch.float32 else 0.5)
    assert models.checksum(engine.reference) == engine.reference_checksum != models.checksum(engine.policy)


@pytest.mark.parametrize(
    "overrides",
    [
        {"critic": "layers", "train_layers": -1, "train_embeddings": True},
        {"ignore_eos": True, "entropy_coef": 0.01, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"aggregation": "seq-mean-token-mean", "kl_loss_coef": 0.1, "score_at": "after", "kl_controller": "adaptive"},
    ],
)
def test_options_run_and_stay_exact(overrides: dict[str, object]) -> None:
    engine = make_engine(tiny_lm("qwen2").to(DEVICE), minibatches=2, epochs=2, **overrides)
    for _ in range(2):
        engine.step(PROMPTS)
    assert engine.first_ratio_deviation == 0.0 and models.checksum(engine.reference) == engine.reference_checksum
    parameters = [*engine.policy.parameters(), *engine.critic.parameters()]
    assert {p.device.type for p in parameters} == {DEVICE} and all(p.isfinite().all() for p in parameters)


def test_the_parts_agree_with_a_cpu() -> None:
    """The rollout of one device, scored on both."""
    there = make_engine(tiny_lm().to(DEVICE))
    batch = there.rollout(PROMPTS)
    found = there.score(batch)
    here = make_engine(tiny_lm())
    batch.hidden = {k: x.cpu() for k, x in batch.hidden.items()}
    for name in ("tokens", "attention_mask", "response_mask", "sampler_logprobs", "finished"):
        setattr(batch, name, getattr(batch, name).cpu())
    batch.prompts.input_ids, batch.prompts.attention_mask = (
        batch.prompts.input_ids.cpu(), batch.prompts.attention_mask.cpu()
    )  # fmt: skip
    batch.sampled.clear()
    expected = here.score(batch)
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "scores", "rewards", "advantages", "returns", "kl"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("kind", ["frozen", "finetuned"])
def test_a_reward_model_beside_its_body(kind: str) -> None:
    """Trained, scored with as it is, and then a reward."""
    body, tokenizer = tiny_lm().to(DEVICE), word_tokenizer()
    items = ["a b c", "d e", "a a", "f g h i", "b", "j j a"]
    pairs = torch.combinations(torch.arange(6))
    outcome = torch.tensor([float(items[a].count("a") >= items[b].count("a")) for a, b in pairs.tolist()]).double()
    matches = Comparisons(items, pairs[:, 0], pairs[:, 1], outcome, torch.zeros(len(pairs), dtype=torch.bool))
    config = RewardModelConfig(body=kind, layers=[1, 3] if kind == "frozen" else None, epochs=2, batch_size=8)
    model = rt.train_reward_model(matches, body, tokenizer, config=config)
    scores = rm.score_texts(model, items, tokenizer, max_tokens=16, batch_size=4)
    assert scores.shape == (6,) and scores.isfinite().all() and scores.device.type == "cpu"
    engine = make_engine(body, reward=model)
    engine.step(PROMPTS)
    assert engine.first_ratio_deviation == 0.0
    again = rm.score_texts(model, items, tokenizer, max_tokens=16, batch_size=4)
    torch.testing.assert_close(again, scores, rtol=1e-3, atol=1e-3)


def test_supervised_fine_tuning_learns() -> None:
    records = [SFTRecord("a b", " c d"), SFTRecord("e", " f g h")] * 4
    config = SFTConfig(batch_size=4, epochs=4, lr=1e-2)
    report = train_sft(tiny_lm().to(DEVICE), word_tokenizer(), records, config=config)
    assert len(report.losses) == 8 and report.losses[-1] < report.losses[0] - 0.1
