"""Reward models: loss, pooling, folders that others read, and learning what was planted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_lm, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from rlhf_engine import comparisons, data, evaluation, models, tiny
from rlhf_engine import reward_model as rm
from rlhf_engine import reward_training as rt
from rlhf_engine.config import PPOConfig, RewardModelConfig
from rlhf_engine.engine import PPOEngine
from rlhf_engine.models import ModelError
from rlhf_engine.types import Comparisons, RatedTexts

FROZEN = RewardModelConfig(body="frozen", layers=[0, 1, 2], hidden_units=128, epochs=3, batch_size=64, dropout=0.0)
SCRATCH = RewardModelConfig(body="scratch", batch_size=64, lr=1e-3)
FINETUNED = RewardModelConfig(body="finetuned", batch_size=128, lr=1e-3, train_layers=1)


def batch(side: str = "right", pad: int = 0) -> tuple[Tensor, Tensor]:
    """Three texts of 6, 3 and 1 tokens."""
    texts = torch.randint(1, 12, (3, 6), generator=torch.Generator().manual_seed(4))
    tokens, mask = torch.full((3, 6), pad), torch.zeros(3, 6, dtype=torch.bool)
    for row, length in enumerate((6, 3, 1)):
        place = slice(0, length) if side == "right" else slice(6 - length, 6)
        tokens[row, place], mask[row, place] = texts[row, :length], True
    return tokens, mask


def frozen_model(seed: int = 0, layers: tuple[int, ...] = (0, 2)) -> rm.FrozenRewardModel:
    body = tiny_lm(seed=seed)
    torch.manual_seed(seed)
    return rm.FrozenRewardModel(body, list(layers), 8).eval()


def classifier(family: str = "llama", seed: int = 0) -> rm.ClassifierRewardModel:
    return rm.new_classifier(tiny_lm(family), scratch=False, train_layers=1, seed=seed)


def test_encoders_read_left_padded_rows_like_any_other() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    model = rm.ClassifierRewardModel(AutoModelForSequenceClassification.from_config(config).eval())
    right, left = model.score(*batch("right")), model.score(*batch("left"))
    torch.testing.assert_close(right, left)
    assert right.std() > 1e-3


def test_a_head_may_lie_elsewhere_than_its_body() -> None:
    """As it does after training beside a body on a GPU; the device without memory stands for one here."""
    model = frozen_model().to("meta")
    assert next(model.body.parameters()).device.type == "cpu"
    assert model.score(*batch()).device.type == "meta"


# The loss


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_pairwise_loss_by_brute_force(margin: float, centering: float) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, generator=g) * 3
    outcome, gap = torch.randint(0, 3, (60,), generator=g) / 2, torch.rand(60, generator=g)
    gap = torch.where(outcome == 0.5, 0.0, gap)

    def lost(winner: float, loser: float, shift: float) -> float:
        return -math.log(1 / (1 + math.exp(-(winner - loser - shift))))

    want = 0.0
    for s_a, s_b, o, d in zip(a.tolist(), b.tolist(), outcome.tolist(), gap.tolist(), strict=True):
        if o == 0.5:
            one = (lost(s_a, s_b, 0.0) + lost(s_b, s_a, 0.0)) / 2
        else:
            one = lost(s_a, s_b, margin * d) if o == 1 else lost(s_b, s_a, margin * d)
        want += (one + centering * (s_a + s_b) ** 2) / 60
    got = rt.pairwise_loss(a, b, outcome, gap=gap, margin=margin, centering=centering)
    assert got.item() == pytest.approx(want, rel=1e-5)
    flipped = rt.pairwise_loss(b, a, 1 - outcome, gap=gap, margin=margin, centering=centering)
    assert flipped.item() == pytest.approx(want, rel=1e-5)


def test_pairwise_loss_without_a_gap_has_no_margin_and_never_overflows() -> None:
    a, b = torch.tensor([200.0, -200.0]), torch.tensor([-200.0, 200.0])
    loss = rt.pairwise_loss(a, b, torch.tensor([1.0, 1.0]), margin=5.0)
    assert loss.item() == pytest.approx(200.0)
    assert rt.pairwise_loss(torch.zeros(1), torch.zeros(1), torch.tensor([0.5])).item() == pytest.approx(math.log(2))


# The frozen kind


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_is_mean_and_last_token_of_the_text_alone(side: str) -> None:
    model = frozen_model()
    tokens, mask = batch(side)
    hidden = {i: torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 2)}
    want = []
    for row in range(3):
        parts = []
        for layer in (0, 2):
            real = [hidden[layer][row, t] for t in range(6) if mask[row, t]]
            parts += [sum(real) / len(real), real[-1]]
        want.append(torch.cat(parts))
    poisoned = {i: torch.where(mask[..., None], h, torch.nan) for i, h in hidden.items()}
    torch.testing.assert_close(model.pool(poisoned, mask), torch.stack(want))
    assert torch.equal(model.pool(poisoned, mask), model.pool(hidden, mask)) and tokens.shape == mask.shape


def test_scores_do_not_depend_on_padding_or_on_who_ran_the_body() -> None:
    model = frozen_model()
    with torch.no_grad():
        model.feature_mean.normal_()
        model.score_mean.fill_(0.3)
        model.score_std.fill_(2.0)
        scores = [model.score(*batch(side, pad)) for side in ("left", "right") for pad in (0, 9)]
        tokens, mask = batch()
        handed = model.score(tokens, mask, models.run_trunk(model.body, tokens, mask, [0, 1, 2]))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(handed, scores[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [[], [-1], [4]])
def test_layers_that_the_body_lacks_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="reward_model.layers must lie between 0 and 3"):
        rm.FrozenRewardModel(tiny_lm(), layers, 8)


def test_a_frozen_model_survives_its_folder_bit_by_bit(tmp_path: Path) -> None:
    model = frozen_model()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.uniform_(0.5, 1.5)
    model.save(tmp_path / "deep" / "rm")
    back = rm.load_reward_model(tmp_path / "deep" / "rm", body=model.body)
    assert isinstance(back, rm.FrozenRewardModel) and back.layers == model.layers and not back.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(model.score(*batch()), back.score(*batch()))
    assert not any("body" in name for name in model.state_dict()), "the body is saved elsewhere"


def test_the_same_body_in_another_dtype_is_the_same_body(tmp_path: Path) -> None:
    model = frozen_model()
    model.save(tmp_path)
    back = rm.load_reward_model(tmp_path, body=tiny_lm().to(torch.bfloat16))
    with torch.no_grad():
        torch.testing.assert_close(back.score(*batch()), model.score(*batch()), atol=0.1, rtol=0.1)


def test_layers_follow_the_depth_unless_they_are_named() -> None:
    def layers(depth: int) -> list[int]:
        shape = LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        shape.num_hidden_layers = depth
        return rm.FrozenRewardModel(AutoModelForCausalLM.from_config(shape), None, 4).layers

    assert layers(30) == [15, 18, 21, 24] and layers(12) == [6, 7, 8, 10]
    assert layers(2) == [1, 2] and layers(1) == [0, 1]


def test_the_schedule_fits_the_body_unless_it_is_named() -> None:
    assert RewardModelConfig().schedule() == (4, 4096, 1e-3)
    assert RewardModelConfig(body="finetuned").schedule() == (1, 32, 2e-5)
    assert RewardModelConfig(body="scratch", lr=0.0).schedule() == (1, 32, 0.0)
    assert RewardModelConfig(epochs=7, batch_size=3).schedule() == (7, 3, 1e-3)


def test_another_body_or_format_is_refused_in_words(tmp_path: Path) -> None:
    frozen_model().save(tmp_path)
    for body in (tiny_lm(seed=1), None):
        with pytest.raises(ValueError, match="other weights; pass the model it was trained on"):
            rm.load_reward_model(tmp_path, body=body)
    about = json.loads((tmp_path / "reward_model.json").read_text())
    (tmp_path / "reward_model.json").write_text(json.dumps(about | {"format": "else"}))
    with pytest.raises(ValueError, match="unknown format 'else'"):
        rm.load_reward_model(tmp_path, body=tiny_lm())


def test_a_folder_without_a_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        rm.load_reward_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match="holds no config.json"):
        rm.load_reward_model(tmp_path)
    config = FAMILIES["llama"]()
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="num_labels must be 1"):
        rm.load_reward_model(tmp_path)


# The classifier kind


@pytest.mark.parametrize("family", FAMILIES)
def test_our_classifier_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    model = classifier(family)
    model.score_mean, model.score_std = 0.25, 2.0
    model.save(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    theirs.config.pad_token_id = 0
    tokens, mask = batch()
    with torch.no_grad():
        logits = theirs(tokens, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(model.raw_tokens(tokens, mask), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.score(tokens, mask), (logits - 0.25) / 2, rtol=1e-4, atol=1e-5)
        back = rm.load_reward_model(tmp_path)
        assert isinstance(back, rm.ClassifierRewardModel) and (back.score_mean, back.score_std) == (0.25, 2.0)
        assert all(torch.equal(p, q) for p, q in zip(back.parameters(), model.parameters(), strict=True))
        for side, pad in (("right", 9), ("left", 0), ("left", 9)):  # by the mask, never by a pad id
            torch.testing.assert_close(model.raw_tokens(*batch(side, pad)), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_their_classifier_is_read_by_us(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FAMILIES["qwen2"]() if kind == "decoder" else BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )  # fmt: skip
    config.num_labels = 1
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = rm.load_reward_model(tmp_path)
    assert isinstance(ours, rm.ClassifierRewardModel) and (ours.score_mean, ours.score_std) == (0.0, 1.0)
    tokens, mask = batch()
    with torch.no_grad():
        want = theirs(tokens, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(ours.score(tokens, mask), want, rtol=1e-4, atol=1e-5)


def test_heads_start_at_one_over_the_root_of_their_width() -> None:
    config = LlamaConfig(
        vocab_size=12, hidden_size=2048, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    body = AutoModelForCausalLM.from_config(config)
    head = rm.new_classifier(body, scratch=True, train_layers=-1, seed=0).head
    assert float(head.weight.detach().std()) == pytest.approx(1 / math.sqrt(2049), rel=0.06)
    last = rm.FrozenRewardModel(tiny_lm(), [1], 4000).head[-1]
    assert float(last.weight.detach().std()) == pytest.approx(1 / math.sqrt(4001), rel=0.05) and not last.bias.any()


def test_a_classifier_starts_from_the_bodys_weights_unless_from_scratch() -> None:
    body = tiny_lm()
    tuned = rm.new_classifier(body, scratch=False, train_layers=1, seed=0)
    scratch = rm.new_classifier(body, scratch=True, train_layers=1, seed=0)
    names = dict(body.base_model.named_parameters())
    for name, parameter in tuned.body.base_model.named_parameters():
        assert torch.equal(parameter, names[name]) and parameter is not names[name]
        assert parameter.requires_grad == (".2." in f".{name}." or name == "norm.weight"), name
    assert tuned.head.weight.requires_grad and all(p.requires_grad for p in scratch.parameters())
    assert not torch.equal(scratch.body.base_model.embed_tokens.weight, body.base_model.embed_tokens.weight)


# Normalisation and batches


@pytest.mark.parametrize("kind", ["frozen", "classifier"])
def test_normalised_scores_have_mean_0_and_std_1_and_stay_so(kind: str, tmp_path: Path) -> None:
    model: Any = frozen_model() if kind == "frozen" else classifier()
    tokens = torch.randint(1, 12, (40, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(2):  # the second time starts from normalised scores and must change nothing
            rm.normalise(model, model.score(tokens, mask))
            scores = model.score(tokens, mask)
            assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
            assert float(scores.std()) == pytest.approx(1, abs=1e-4)
        model.save(tmp_path)
        back = rm.load_reward_model(tmp_path, body=model.body)
        torch.testing.assert_close(back.score(tokens, mask), scores, rtol=1e-5, atol=1e-5)


def test_equal_scores_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"same score \(0.5\): nothing to learn from"):
        rm.normalise(frozen_model(), torch.full((4,), 0.5))


def test_batches_keep_the_order_of_texts_and_empty_texts_count() -> None:
    model, tokenizer = frozen_model(), word_tokenizer()
    texts = ["a b c d e", "", "f", "a b", "g h i j a b c"]
    rows = rm.tokenize(texts, tokenizer, 5)
    assert [row.tolist() for row in rows] == [[1, 2, 3, 4, 5], [0], [6], [1, 2], [7, 8, 9, 10, 1]]
    assert rm.tokenize([], tokenizer, 5) == []
    one = rm.score_texts(model, texts, tokenizer, max_tokens=5, batch_size=1)
    for size in (2, 99):
        torch.testing.assert_close(
            rm.score_texts(model, texts, tokenizer, max_tokens=5, batch_size=size), one, rtol=1e-4, atol=1e-5
        )
    seen: list[tuple[int, int]] = []
    features = rm.pooled_features(model, rows, 2, lambda *now: seen.append(now))
    assert seen[-1] == (14, 14) and features.shape == (5, 2 * 2 * 32)
    with torch.no_grad():
        torch.testing.assert_close(model.raw(features), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (0, 2), (1, 3)])
def test_an_engine_that_hands_over_its_states_scores_as_the_model_alone(layers: tuple[int, ...]) -> None:
    """Layers below the split come from decoding, those above it from the reference's own forward pass."""
    model, tokenizer = frozen_model(layers=layers), word_tokenizer()
    models.freeze(model.body, train_layers=1)
    policy = models.copy_sharing_frozen(model.body)
    config = PPOConfig(batch_size=6, micro_batch_size=1, max_new_tokens=6)
    engine = PPOEngine(policy, model.body, reward=model, tokenizer=tokenizer, config=config, seed=4)
    prompts = ["a b c", "d", "e f", "g h i j", "a", "b b"]
    for _ in range(2):  # the second time the policy has moved, and the reference must still be the one that is read
        batch = engine.rollout(prompts)
        scores = engine.score(batch).score_terms["reward"]
        assert batch.finished.any() and not batch.finished.all()
        for i, (prompt, text) in enumerate(zip(prompts, batch.texts, strict=True)):
            (alone,) = rm.score_texts(model, [f"{prompt} {text}"], tokenizer, max_tokens=64, batch_size=1)
            torch.testing.assert_close(scores[i], alone, rtol=1e-4, atol=1e-4)
        engine.step(prompts)


# Learning


@dataclass
class Planted:
    body: Any
    tokenizer: Any
    train: RatedTexts
    fresh: RatedTexts  # no text of these was trained on
    matches: Comparisons
    pairs: Comparisons


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    train, fresh = data.planted(600, 1), data.planted(600, 2)
    fresh = fresh.select([i for i, text in enumerate(fresh.texts) if text not in set(train.texts)])
    folder = str(tiny.tiny_model_folder(tmp_path_factory.mktemp("tiny"), texts=train.texts))
    generator = torch.Generator().manual_seed(0)
    return Planted(
        models.load_causal_lm(folder).requires_grad_(False), models.load_tokenizer(folder), train, fresh,
        comparisons.sample_comparisons(train, 3000, same_rater=0.5, generator=generator),
        comparisons.human_pairs(fresh, 2000, generator),
    )  # fmt: skip


def grade(model: rm.RewardModel, p: Planted) -> evaluation.PairGrade:
    scores = rm.score_texts(model, p.fresh.texts, p.tokenizer, max_tokens=128, batch_size=64)
    return evaluation.grade_pairs(scores, p.pairs)


@pytest.mark.parametrize("config", [SCRATCH, FINETUNED, FROZEN], ids=lambda c: c.body)
def test_what_was_planted_is_learned_and_the_body_stays(config: RewardModelConfig, planted: Planted) -> None:
    before = models.checksum(planted.body)
    seen: list[tuple[int, int]] = []
    model = rt.train_reward_model(
        planted.matches, planted.body, planted.tokenizer, config=config, progress=lambda *now: seen.append(now)
    )
    graded = grade(model, planted)
    assert graded.accuracy >= 0.58 and graded.ece < 0.1
    assert models.checksum(planted.body) == before and not model.training
    assert seen[-1][0] == seen[-1][1]
    if config.body != "scratch":  # random weights do without the body altogether
        again = rt.train_reward_model(planted.matches, planted.body, planted.tokenizer, config=config)
        assert grade(again, planted) == graded, "the seed decides"


def test_features_at_hand_save_the_forward_pass_and_change_nothing(planted: Planted) -> None:
    probe = rm.FrozenRewardModel(planted.body, FROZEN.layers, 1)
    rows = rm.tokenize(planted.train.texts, planted.tokenizer, FROZEN.max_tokens)
    features = rm.pooled_features(probe, rows, FROZEN.feature_batch, rt.quiet)
    one, other = (
        rt.train_reward_model(planted.matches, planted.body, planted.tokenizer, config=replace(FROZEN, epochs=1),
                              features=f)
        for f in (features, None)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_calibration_makes_a_timid_model_as_bold_as_it_is_right(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, g = data.planted(2500, 1), torch.Generator().manual_seed(3)
    fresh = data.planted(1500, 2)
    fresh = fresh.select([i for i, text in enumerate(fresh.texts) if text not in set(train.texts)])
    matches = comparisons.sample_comparisons(train, 40_000, same_rater=0.5, generator=g)
    case = replace(planted, fresh=fresh, pairs=comparisons.human_pairs(fresh, 10_000, g))
    probe = rm.FrozenRewardModel(planted.body, FROZEN.layers, 1)
    features = rm.pooled_features(probe, rm.tokenize(train.texts, planted.tokenizer, 128), 64, rt.quiet)
    config = replace(FROZEN, epochs=1, batch_size=2048, lr=3e-4)  # far from done: scores are too close together

    def fit() -> evaluation.PairGrade:
        return grade(
            rt.train_reward_model(matches, planted.body, planted.tokenizer, config=config, features=features), case
        )

    calibrated = fit()
    monkeypatch.setattr(rt, "best_scale", lambda difference, outcome: 1.0)
    timid = fit()
    assert timid.ece > 0.06 and calibrated.ece < timid.ece / 2
    assert calibrated.accuracy == timid.accuracy, "a factor reorders nothing"


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_the_best_scale_is_found(factor: float) -> None:
    g = torch.Generator().manual_seed(0)
    difference = torch.randn(20_000, generator=g).double() * 2
    outcome = (torch.rand(20_000, generator=g) < torch.sigmoid(factor * difference)).double()
    assert rt.best_scale(difference, outcome) == pytest.approx(factor, rel=0.06)


def test_ratings_teach_the_same_head(planted: Planted) -> None:
    probe = rm.FrozenRewardModel(planted.body, FROZEN.layers, 1)
    train, fresh = (
        rm.pooled_features(probe, rm.tokenize(t.texts, planted.tokenizer, 128), 64, rt.quiet)
        for t in (planted.train, planted.fresh)
    )
    ratings, truth = (torch.tensor([sum(r) / len(r) for r in t.ratings]) for t in (planted.train, planted.fresh))
    model = rt.train_on_ratings(planted.body, train, ratings, config=FROZEN)
    with torch.no_grad():
        scores = model.raw(fresh)
    assert float(torch.corrcoef(torch.stack([scores, truth]))[0, 1]) > 0.6


def test_nothing_to_train_on_and_unknown_kinds_are_named(planted: Planted) -> None:
    nothing = rt.among_rows(planted.matches, torch.zeros(3000, dtype=torch.bool))
    with pytest.raises(ValueError, match="there are no comparisons to train on"):
        rt.train_reward_model(nothing, planted.body, planted.tokenizer, config=FROZEN)
    with pytest.raises(ValueError, match="must be frozen, finetuned or scratch .* got some/folder"):
        rt.train_reward_model(
            planted.matches, planted.body, planted.tokenizer, config=replace(FROZEN, body="some/folder")
        )
