"""PPOEngine end to end on tiny models: exactness, sharing, frozen parts, and the fixed point that theory promises."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from tiny_models import ARMS, FAMILIES, tiny_lm, word_tokenizer
from transformers import AutoModelForTokenClassification

from rlhf_engine import models
from rlhf_engine import reward_model as rm
from rlhf_engine.config import PPOConfig
from rlhf_engine.engine import PPOEngine
from rlhf_engine.ppo import experience_metrics
from rlhf_engine.reward_model import FrozenRewardModel
from rlhf_engine.rewards import RewardTerm
from rlhf_engine.types import Rollout


def count_a(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(r.count("a")) for r in responses]


def make_engine(model: torch.nn.Module, **overrides: object) -> PPOEngine:
    reward = overrides.pop("reward", count_a)
    defaults = {"steps": 4, "batch_size": 12, "micro_batch_size": 4, "minibatches": 1, "epochs": 1, "max_new_tokens": 6}
    config = PPOConfig(**{**defaults, "train_layers": 1, "lr": 1e-2, **overrides})  # type: ignore[arg-type]
    return PPOEngine(model, reward=reward, tokenizer=word_tokenizer(), config=config)


PROMPTS = ["a b", "c", "d e f g", "h i", "j", "a a a", "b", "c d", "e", "f f", "g h i j a", "b c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_ratio_is_exactly_one(family: str, dtype: torch.dtype) -> None:
    engine = make_engine(tiny_lm(family, dtype=dtype), dtype=str(dtype).removeprefix("torch."))
    assert engine.split == 2
    for _ in range(2):
        metrics = engine.step(PROMPTS).metrics
        assert metrics["first_update_ratio_max_abs_dev"] == 0.0
        assert metrics["policy/approx_kl_k1"] == 0.0 and metrics["policy/clip_fraction"] == 0.0


def test_neither_scoring_nor_training_calls_the_models_own_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would make [tokens, vocab] logits."""
    engine = make_engine(tiny_lm(), critic="layers", train_head=True)
    batch = engine.rollout(PROMPTS)

    def refuse(*_: object) -> None:
        raise AssertionError("lm_head was called")

    for model in (engine.policy, engine.reference):
        monkeypatch.setattr(model.lm_head, "forward", refuse)
    assert engine.update(engine.score(batch))["policy/approx_kl_k1"] == 0.0


def test_without_an_end_of_sequence_every_response_is_full_and_still_exact() -> None:
    free = make_engine(tiny_lm(), micro_batch_size=6).rollout(PROMPTS)
    assert free.finished.any()  # so there is something to ban
    engine = make_engine(tiny_lm(), ignore_eos=True, entropy_coef=0.01)
    batch = engine.rollout(PROMPTS)
    assert batch.response_mask.all() and not batch.finished.any()
    assert not (batch.tokens[:, batch.prompts.input_ids.shape[1] :] == engine.tokenizer.eos_token_id).any()
    experience = engine.score(batch)
    torch.testing.assert_close(experience.logprobs, batch.sampler_logprobs, atol=2e-5, rtol=1e-4)
    metrics = engine.update(experience)
    assert metrics["first_update_ratio_max_abs_dev"] == 0.0 and metrics["skipped_steps"] == 0


def test_old_logprobs_come_from_score_not_from_the_update() -> None:
    engine = make_engine(tiny_lm())
    experience = engine.score(engine.rollout(PROMPTS))
    with torch.no_grad():
        next(p for p in engine.policy.parameters() if p.requires_grad).view(-1)[3] += 1e-2
    assert engine.update(experience)["first_update_ratio_max_abs_dev"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_trunk_states_equal_a_full_forward(family: str) -> None:
    engine = make_engine(tiny_lm(family))
    torch.nn.init.normal_(engine.critic.score.weight)
    batch = engine.rollout(PROMPTS)
    kept = engine.score(batch)
    batch.hidden = {}
    fresh = engine.score(batch)
    for field in ("logprobs", "ref_logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(kept, field), getattr(fresh, field), atol=2e-5, rtol=1e-4)
    spread = experience_metrics(fresh)["sampler/logprob_abs_diff_max"]
    assert spread < 1e-4, f"decoding and scoring disagree by {spread} nats"


def test_log_probs_equal_transformers_own_on_every_unpadded_row() -> None:
    engine = make_engine(tiny_lm(), temperature=0.7)
    batch = engine.rollout(PROMPTS)
    experience = engine.score(batch)
    for row in range(len(batch)):
        tokens = batch.tokens[row][batch.attention_mask[row]]
        count = int(batch.response_mask[row].sum())
        with torch.no_grad():
            logits = engine.policy(tokens[None]).logits[0] / 0.7
        want = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[-count:, 0]
        torch.testing.assert_close(experience.logprobs[row][batch.response_mask[row]], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"critic": "layers"}, {"train_layers": -1, "train_embeddings": True}])
def test_reference_never_moves_and_frozen_parts_stay(overrides: dict[str, object]) -> None:
    model = tiny_lm()
    engine = make_engine(model, epochs=2, minibatches=3, **overrides)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(2):
        engine.step(PROMPTS)
    assert models.checksum(engine.reference) == engine.reference_checksum
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    if not overrides:
        assert moved and all("layers.2." in n or n == "model.norm.weight" for n in moved)


def test_tied_embeddings_train_as_one_or_not_at_all() -> None:
    model = tiny_lm()
    models.freeze(model, train_layers=0, train_head=True)
    assert model.get_input_embeddings().weight.requires_grad and engine_split(model) is None
    models.freeze(model, train_layers=1)
    assert not model.get_output_embeddings().weight.requires_grad and engine_split(model) == 2


def engine_split(model: torch.nn.Module) -> int | None:
    return models.shared_depth(model, models.copy_sharing_frozen(model))


def test_gradient_does_not_depend_on_the_micro_batch_split() -> None:
    """Same rollout cut into 1, 3 and 12 micro-batches: the update must be the same to rounding."""
    results = []
    for size in (12, 4, 1):
        engine = make_engine(tiny_lm(), micro_batch_size=12)
        batch = engine.rollout(PROMPTS)
        experience = engine.score(batch)
        batch.micro_batches = [slice(i, i + size) for i in range(0, 12, size)]
        engine._minibatch(experience, batch.micro_batches, warm_up=False)
        grads = [p.grad.flatten() for p in engine.policy_optimiser.parameters]
        results.append(torch.cat([*grads, engine.critic.score.weight.grad.flatten()]))
    for other in results[1:]:
        assert float((other - results[0]).norm() / results[0].norm()) < 1e-6


def test_reward_terms_are_weighted_and_logged() -> None:
    ones = RewardTerm("ones", lambda p, r: [1.0] * len(r), weight=0.5)
    engine = make_engine(tiny_lm(), reward=[RewardTerm("a", count_a, 2.0), ones])
    experience = engine.score(engine.rollout(PROMPTS))
    want = 2 * torch.tensor(count_a([], experience.rollout.texts)) + 0.5
    torch.testing.assert_close(experience.scores, want)
    assert {"score/a", "score/ones"} <= set(experience_metrics(experience))


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda p, r: [1.0], "not one each"),
        (lambda p, r: [float("nan")] * len(r), "not finite"),
        (None, "reward is missing"),
    ],
)
def test_bad_rewards_are_named(reward: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine = make_engine(tiny_lm(), reward=reward)
        engine.score(engine.rollout(PROMPTS))


def test_a_non_finite_gradient_never_reaches_the_weights() -> None:
    engine = make_engine(tiny_lm())
    experience = engine.score(engine.rollout(PROMPTS))
    before = models.checksum(engine.policy)
    experience.advantages[0, 0] = float("inf")
    assert engine.update(experience)["skipped_steps"] == 1
    assert models.checksum(engine.policy) == before


def test_critic_folder_is_read_by_transformers(tmp_path: object) -> None:
    for critic in ("head", "layers"):
        engine = make_engine(tiny_lm(), critic=critic, value_lr=1e-2)
        engine.step(PROMPTS)
        batch = engine.rollout(PROMPTS)
        values = engine.score(batch).values
        models.save_critic(engine.critic, engine.reference, f"{tmp_path}/{critic}")
        loaded = AutoModelForTokenClassification.from_pretrained(f"{tmp_path}/{critic}").eval()
        positions = models.position_ids(batch.attention_mask)
        with torch.no_grad():
            out = loaded(batch.tokens, attention_mask=batch.attention_mask.long(), position_ids=positions).logits[
                ..., 0
            ]
        want = out[:, batch.prompts.input_ids.shape[1] - 1 : -1]
        torch.testing.assert_close(values, torch.where(batch.response_mask, want, 0.0), atol=1e-5, rtol=1e-4)


def test_three_calls_are_one_step() -> None:
    """Schedules and the KL controller move in `update`, so a loop written by hand trains like `step`."""
    options = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100.0}
    one, three = make_engine(tiny_lm(), **options), make_engine(tiny_lm(), **options)
    for _ in range(3):
        one.step(PROMPTS)
        three.update(three.score(three.rollout(PROMPTS)))
    assert models.checksum(one.policy) == models.checksum(three.policy)
    assert one.kl_controller == three.kl_controller and one.step_index == three.step_index == 3


def test_a_rollout_with_fewer_micro_batches_than_minibatches() -> None:
    engine = make_engine(tiny_lm(), minibatches=3)
    assert engine.step(["a b", "c"]).metrics["first_update_ratio_max_abs_dev"] == 0.0


def test_score_after_the_response_uses_the_critic_there() -> None:
    """lam 0, gamma 1, no KL: A_last = V(after) - V(last), and the slot's own return is the score."""
    engine = make_engine(tiny_lm(), score_at="after", kl_coef=0.0, lam=0.0, whiten_advantages=False)
    torch.nn.init.normal_(engine.critic.score.weight)
    e = engine.score(engine.rollout(PROMPTS))
    lengths, width = e.rollout.response_mask.sum(1), e.rollout.response_mask.shape[1]
    rows = [i for i in range(len(PROMPTS)) if lengths[i] < width]
    assert rows, "no response ended early: nothing was tested"
    for i in rows:
        last = int(lengths[i]) - 1
        assert e.value_mask[i, last + 1] and not e.rollout.response_mask[i, last + 1]
        torch.testing.assert_close(e.advantages[i, last], e.values[i, last + 1] - e.values[i, last])
        torch.testing.assert_close(e.returns[i, last + 1], e.scores[i])
    engine.update(e)


def test_a_reward_model_on_the_policy_keeps_reading_the_untrained_model() -> None:
    model = tiny_lm()
    reward_model = FrozenRewardModel(model, [1, 3], hidden_units=4)
    engine = make_engine(model, reward=reward_model, train_layers=-1)
    tokens = torch.arange(1, 9).view(2, 4)
    before = reward_model.score(tokens, torch.ones_like(tokens, dtype=torch.bool))
    engine.step(PROMPTS)
    assert models.checksum(engine.policy) != engine.reference_checksum
    assert torch.equal(reward_model.score(tokens, torch.ones_like(tokens, dtype=torch.bool)), before)


@pytest.mark.parametrize(
    "overrides",
    [
        {"aggregation": "seq-mean-token-mean", "dual_clip": 3.0},
        {"aggregation": "constant", "kl_loss_coef": 0.1, "kl_loss_kind": "k3+"},
        {"kl_unit": "token", "kl_controller": "adaptive", "entropy_coef": 0.01},
        {"critic_warmup_steps": 1, "train_head": True},
    ],
)
def test_options_run_and_stay_exact(overrides: dict[str, object]) -> None:
    engine = make_engine(tiny_lm("qwen2"), minibatches=2, epochs=2, **overrides)
    for _ in range(2):
        engine.step(PROMPTS)
    assert engine.first_ratio_deviation == 0.0 and models.checksum(engine.reference) == engine.reference_checksum


def test_adaptive_kl_coefficient_follows_its_rule() -> None:
    engine = make_engine(tiny_lm(), kl_controller="adaptive", kl_target=0.5, kl_horizon=100.0, lr=3e-2)
    steps = [engine.step(PROMPTS).metrics for _ in range(4)]
    assert steps[0]["kl/coef"] == PPOConfig().kl_coef
    for now, then in zip(steps, steps[1:], strict=False):
        error = min(max(now["kl/sequence"] / 0.5 - 1, -0.2), 0.2)
        assert then["kl/coef"] == pytest.approx(now["kl/coef"] * (1 + error * 12 / 100), rel=1e-12)


@pytest.mark.parametrize("attempt", [0, *(pytest.param(attempt, marks=pytest.mark.long) for attempt in (1, 2))])
def test_kl_fixed_point(attempt: int) -> None:
    """One token, ten arms, reward r, coefficient b: PPO must end at pi_ref exp(r / b) / Z (Ziegler et al. 2019, eq. 2).

    At that point r - b log(pi / pi_ref) is the same for every arm, so even sampled advantages vanish.
    """
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    model = tiny_lm(seed=seed % 1000)
    generator = torch.Generator().manual_seed(seed)
    b = 1.0
    # A wide clip and no gradient clipping: the point where PPO stops moving is the same, it is only reached sooner.
    config = PPOConfig(
        steps=240, batch_size=128, micro_batch_size=128, minibatches=1, epochs=4, max_new_tokens=1, train_layers=2,
        lr=3e-2, value_lr=3e-2, adam_beta2=0.99, max_grad_norm=0.0, clip_low=0.5, clip_high=1.0, kl_coef=b,
        value_clip=0.0, whiten_advantages=False, lr_schedule="cosine",
    )  # fmt: skip
    tokenizer = word_tokenizer()

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        # Anything that is no arm (the end token, the unknown token) is worth as little as the worst arm.
        return [float(rewards[ARMS.index(r)]) if r and r in ARMS else float(rewards.min()) for r in responses]

    def distribution(of: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(prompt).logits[0, -1].double().softmax(0)

    prompt = tokenizer("a b", return_tensors="pt").input_ids
    raw = torch.randn(len(ARMS), generator=generator)
    start, scale = 0.0, 0.25
    while start < 0.35:  # as far away as asked for, and no further: rare arms only make it slow
        scale *= 1.25
        rewards = scale * raw
        per_token = torch.full((12,), float(rewards.min()), dtype=torch.float64)
        per_token[1 : 1 + len(ARMS)] = rewards.double()
        target = distribution(model) * torch.exp(per_token / b)
        target /= target.sum()
        start = float((distribution(model) - target).abs().sum() / 2)
    engine = PPOEngine(model, reward=reward, tokenizer=tokenizer, config=config, seed=seed)
    for _ in range(config.steps):
        engine.step(["a b"] * config.batch_size)
    end = float((distribution(engine.policy) - target).abs().sum() / 2)
    assert end <= 0.02, f"seed {seed}: total variation {start:.3f} -> {end:.3f}"


def scores_of(engine: PPOEngine, batch: Rollout) -> torch.Tensor:
    return engine.reward_terms(batch)["reward"]


def test_a_reward_model_that_starts_the_critic_stays_as_it_is() -> None:
    model = tiny_lm()
    reward = rm.new_classifier(model, scratch=False, train_layers=1)
    engine = PPOEngine(
        model, value=reward.body, reward=reward, tokenizer=word_tokenizer(),
        config=PPOConfig(steps=3, batch_size=12, micro_batch_size=3, max_new_tokens=6, train_layers=1, value_lr=1e-2),
    )  # fmt: skip
    batch = engine.rollout(PROMPTS)
    before = scores_of(engine, batch)
    for _ in range(3):
        engine.step(PROMPTS)
    assert torch.equal(before, scores_of(engine, batch))
    assert torch.equal(engine.score(batch).values, engine.score(batch).values)  # no dropout in the critic


def test_a_reward_model_on_the_policy_moves_to_the_reference() -> None:
    model = tiny_lm()
    reward = FrozenRewardModel(model, [1, 3], 8)
    engine = PPOEngine(
        model, copy.deepcopy(model), reward=reward, tokenizer=word_tokenizer(),
        config=PPOConfig(steps=3, batch_size=12, micro_batch_size=3, max_new_tokens=6, lr=1e-2),
    )  # fmt: skip
    batch = engine.rollout(PROMPTS)
    before = scores_of(engine, batch)
    engine.step(PROMPTS)
    assert torch.equal(before, scores_of(engine, batch))
    with pytest.raises(ValueError, match="give it a copy of the model"):
        make_engine_with(model, tiny_lm(seed=5), reward=FrozenRewardModel(model, [1], 8))


def make_engine_with(model: torch.nn.Module, reference: torch.nn.Module, reward: object) -> PPOEngine:
    return PPOEngine(model, reference, reward=reward, tokenizer=word_tokenizer(), config=PPOConfig())  # type: ignore


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"critic": "layer"}, "ppo.critic must be one of head, layers, got 'layer'"),
        ({"lr_schedule": "cosin"}, "ppo.lr_schedule must be one of"),
        ({"minibatches": 0}, "ppo.minibatches must be greater than 0, got 0"),
        ({"minibatches": 4, "batch_size": 2, "micro_batch_size": 1}, "so lower ppo.minibatches to 2"),
        ({"steps": None}, "ppo.steps must not be null"),
        ({"train_layers": 0}, "nothing to train"),
        ({"ignore_eos": True, "missing_eos_penalty": 1.0}, "would hit every response"),
    ],
)
def test_settings_are_checked_however_they_were_made(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_engine(tiny_lm(), **overrides)


@pytest.mark.parametrize(
    "terms, sentence",
    [
        ([("r", 1.0), ("r", 1.0)], "reward names must differ"),
        ([("mean", 1.0)], "must not be empty, mean or std"),
        ([("", 1.0)], "must not be empty"),
        ([("r", float("nan"))], "reward r: its weight must be a finite number"),
    ],
)
def test_reward_terms_are_checked(terms: list[tuple[str, float]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_engine(tiny_lm(), reward=[RewardTerm(name, count_a, weight) for name, weight in terms])


def test_a_step_that_learns_nothing_says_so() -> None:
    engine = make_engine(tiny_lm())
    experience = engine.score(engine.rollout(PROMPTS))
    experience.advantages[:] = torch.nan
    experience.returns[:] = torch.nan
    with pytest.raises(ValueError, match="every gradient was NaN"):
        engine.update(experience)
