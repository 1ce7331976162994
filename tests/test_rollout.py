"""Sampling: the distribution is the model's own, lengths are explicit, and decoding keeps what scoring reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_lm, word_tokenizer
from torch import Tensor

from rlhf_engine import data, models, rollout
from rlhf_engine.rollout import sampling_logprobs
from rlhf_engine.types import Rollout

PROMPTS = ["a b c d", "e", "f g", "h i j a b"]
EOS = 0


def draw(model: Any, prompts: list[str] = PROMPTS, *, seed: int = 0, **options: Any) -> Rollout:
    tokenizer = word_tokenizer()
    defaults = {"max_new_tokens": 8, "micro_batch_size": 2, "generator": torch.Generator().manual_seed(seed)}
    return rollout.sample(model, data.make_prompts(prompts, tokenizer), tokenizer=tokenizer, **{**defaults, **options})


def insist(model: Any, token: int, after: int | None = None) -> Any:
    """A model that always (or only after a given token) chooses one token."""
    weight = model.get_output_embeddings().weight
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
        if after is None:
            head.weight.zero_()
            head.bias[token] = 50.0
        else:
            head.weight[token] = 0.0
            head.bias[token] = -50.0
    model.lm_head = head
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_transformers_on_every_row_alone(family: str, options: dict[str, Any]) -> None:
    model = tiny_lm(family)
    batch = draw(model, **options)
    for i in range(len(batch)):
        tokens, count = batch.tokens[i][batch.attention_mask[i]], int(batch.response_mask[i].sum())
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, -count - 1 : -1]
        want = sampling_logprobs(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options})
        want = want.gather(1, tokens[-count:, None])[:, 0]
        torch.testing.assert_close(batch.sampler_logprobs[i][batch.response_mask[i]], want, rtol=1e-4, atol=1e-4)
    assert not batch.sampler_logprobs[~batch.response_mask].any()


def test_sampled_frequencies_are_the_models_probabilities() -> None:
    model = tiny_lm()
    batch = draw(model, ["a b"] * 4000, max_new_tokens=1)
    with torch.no_grad():
        want = model(word_tokenizer()("a b", return_tensors="pt").input_ids).logits[0, -1].softmax(0)
    counts = torch.bincount(batch.tokens[:, -1], minlength=12) / 4000
    assert float((counts - want).abs().sum() / 2) < 0.03


def test_end_of_sequence_ends_a_response_and_counts_in_it() -> None:
    batch = draw(tiny_lm(), ["a b", "c", "d e f"] * 20, max_new_tokens=12)
    assert batch.finished.any() and not batch.finished.all()
    responses = batch.tokens[:, -batch.response_mask.shape[1] :]
    for tokens, mask, finished, text in zip(responses, batch.response_mask, batch.finished, batch.texts, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()  # no hole, nothing after the end
        ends = (tokens == EOS).nonzero()[:, 0].tolist()
        assert bool(finished) == (tokens[length - 1] == EOS)
        assert EOS not in tokens[: length - 1] and (bool(finished) or length == 12)
        assert not finished or ends[0] == length - 1
        assert text == word_tokenizer().decode(tokens[: length - bool(finished)])
    width = batch.tokens.shape[1] - batch.response_mask.shape[1]
    assert torch.equal(batch.attention_mask[:, width:], batch.response_mask)
    assert torch.equal(batch.attention_mask[:, :width], batch.prompts.attention_mask)
    assert torch.equal(batch.tokens[:, :width], batch.prompts.input_ids)


def test_decoding_stops_when_all_have_ended() -> None:
    steps: list[tuple[int, int]] = []
    batch = draw(insist(tiny_lm(), EOS), progress=lambda done, total: steps.append((done, total)), capture=[1, 2])
    assert batch.response_mask.shape == (4, 1) and batch.finished.all() and batch.texts == [""] * 4
    assert steps == [(4, 32)]
    assert all(h.shape[1] == batch.tokens.shape[1] for h in batch.hidden.values())


def test_without_an_end_every_response_is_as_long_as_allowed() -> None:
    steps: list[tuple[int, int]] = []
    batch = draw(insist(tiny_lm(), EOS, after=1), progress=lambda done, total: steps.append((done, total)))
    assert batch.response_mask.all() and batch.response_mask.shape == (4, 8) and not batch.finished.any()
    assert steps == [(4 * t, 32) for t in range(1, 9)]


def test_an_end_token_inside_a_prompt_ends_nothing() -> None:
    batch = draw(insist(tiny_lm(), EOS, after=1), [". a", "b . c"])
    assert batch.response_mask.all() and batch.prompts.attention_mask.sum(1).tolist() == [2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_states_line_up_with_a_full_forward(family: str) -> None:
    model = tiny_lm(family)
    batch = draw(model, capture=[0, 2])
    with torch.no_grad():
        _, want = models.run_body(model, batch.tokens, batch.attention_mask, capture=[0, 2])
    assert set(batch.hidden) == {0, 2}
    for layer, states in batch.hidden.items():
        assert states.shape == want[layer].shape
        torch.testing.assert_close(
            states[batch.attention_mask], want[layer][batch.attention_mask], rtol=1e-4, atol=1e-4
        )


def probabilities(p: list[float], **options: Any) -> list[float]:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = sampling_logprobs(torch.tensor([p]).log(), **{**defaults, **options})
    return out.exp()[0].tolist()


P = [0.4, 0.1, 0.3, 0.2]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, P),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 99}, P),
        ({"top_p": 0.65}, [4 / 7, 0, 3 / 7, 0]),  # .4 is not enough, .7 is
        ({"top_p": 0.75}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0, 3 / 7, 0]),  # of .44 .33 .22
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),  # squares
        ({"temperature": 0.5, "top_p": 0.6}, [16 / 25, 0, 9 / 25, 0]),  # temperature comes first
    ],
)
def test_distributions_by_hand(options: dict[str, Any], want: list[float]) -> None:
    assert probabilities(P, **options) == pytest.approx(want, abs=1e-6)


def test_a_banned_token_stays_banned() -> None:
    assert probabilities([0.5, 0.0, 0.5], top_p=0.99, top_k=2) == pytest.approx([0.5, 0.0, 0.5])


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be greater than 0, got .*top_k=1 for greedy"):
        draw(tiny_lm(), temperature=temperature)


def test_top_1_is_greedy_decoding() -> None:
    model = tiny_lm()
    batch = draw(model, top_k=1)
    prompts = data.make_prompts(PROMPTS, word_tokenizer())
    greedy = model.generate(
        prompts.input_ids,
        attention_mask=prompts.attention_mask.long(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=0,
    )
    for i in range(4):
        count = int(batch.attention_mask[i].sum()) + int((~prompts.attention_mask[i]).sum())
        assert torch.equal(batch.tokens[i, :count], greedy[i, :count])


def test_the_generator_decides_everything() -> None:
    model = tiny_lm()

    def tokens(seed: int) -> Tensor:
        return draw(model, seed=seed).tokens

    torch.manual_seed(1)
    first = tokens(5)
    torch.manual_seed(2)
    assert torch.equal(first, tokens(5))
    assert first.shape != tokens(6).shape or not torch.equal(first, tokens(6))


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (4, 3), (5, 5), (5, 99), (7, 2)])
def test_micro_batches_cover_every_row_once(rows: int, size: int) -> None:
    covered = [list(range(rows))[part] for part in rollout.cut(rows, size)]
    assert sum(covered, []) == list(range(rows)) and all(1 <= len(part) <= size for part in covered)
    batch = draw(tiny_lm(), ["a"] * rows, micro_batch_size=size, max_new_tokens=1)
    assert batch.micro_batches == rollout.cut(rows, size)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1031])
def test_choose_inverts_the_cumulative_sum(vocabulary: int) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    p = torch.randn(3, vocabulary, generator=g).mul(3).softmax(1)
    uniform = torch.rand(3, dtype=torch.float64, generator=g)
    want = (p.double().cumsum(1) / p.double().sum(1, keepdim=True) > uniform[:, None]).int().argmax(1)
    assert torch.equal(rollout.choose(p, uniform), want)


def test_choose_draws_as_often_as_the_probabilities_say() -> None:
    p = torch.randn(1, 700, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    count = 200_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # evenly spaced: no noise but the rounding
    seen = torch.bincount(rollout.choose(p.expand(count, -1), uniform), minlength=700)
    assert float((seen - count * p[0]).abs().max()) <= 1.01


@pytest.mark.parametrize("extreme", [0.0, 2.0**-53, 1 - 2.0**-53])
def test_choose_never_takes_what_has_no_probability(extreme: float) -> None:
    for allowed in ([0], [513], [3, 300, 511], [999]):
        p = torch.zeros(1, 1000)
        p[0, allowed] = torch.rand(len(allowed), generator=torch.Generator().manual_seed(1)) / 3
        assert int(rollout.choose(p, torch.tensor([extreme], dtype=torch.float64))) in allowed


def test_logits_that_are_nan_stop_the_rollout() -> None:
    model = tiny_lm()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        draw(model)


def test_a_copy_with_another_mask_finds_its_own_rows() -> None:
    batch = draw(tiny_lm())
    cut = batch.micro_batches[0]
    before = batch.sampled_rows(cut)
    copy = dataclasses.replace(batch, response_mask=batch.response_mask & (torch.arange(len(batch)) > 0)[:, None])
    assert torch.equal(copy.sampled_rows(cut), copy.response_mask[cut].reshape(-1).nonzero().squeeze(1))
    assert batch.sampled_rows(cut) is before
