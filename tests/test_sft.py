"""Supervised fine-tuning against transformers' own loss: only target tokens count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_lm, word_tokenizer
from torch import Tensor

from rlhf_engine import data, models, sft
from rlhf_engine.config import SFTConfig
from rlhf_engine.data import SFTRecord

RECORDS = [
    SFTRecord("a b ", "c d"),
    SFTRecord("", "e f g h i"),
    SFTRecord("a a a a ", "b"),
    SFTRecord("j ", "a b c d e f"),
]


def rows(records: list[SFTRecord] = RECORDS, max_tokens: int = 256) -> list[Any]:
    return [sft._row(record, word_tokenizer(), max_tokens) for record in records]


def by_hand(model: Any, batch: list[Any]) -> Tensor:
    """transformers' loss on right-padded rows whose other labels are -100."""
    width = max(len(row.tokens) for row in batch)
    tokens, labels, mask = (torch.full((len(batch), width), fill) for fill in (7, -100, 0))
    for i, row in enumerate(batch):
        n = len(row.tokens)
        tokens[i, :n], mask[i, :n] = row.tokens, 1
        labels[i, :n] = torch.where(row.target, row.tokens, -100)
    return model(input_ids=tokens, attention_mask=mask, labels=labels).loss


def test_what_is_read_and_what_is_trained_on() -> None:
    tokenizer = word_tokenizer()
    got = [(tokenizer.decode(row.tokens), row.target.tolist()) for row in rows()]
    assert got[0] == ("a b c d .", [False, False, True, True, True])
    assert got[1] == ("e f g h i .", [True] * 6)
    assert got[2] == ("a a a a b .", [False] * 4 + [True] * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_masked_labels(family: str) -> None:
    model, theirs = tiny_lm(family), tiny_lm(family)
    loss = sft._step(model, rows())
    want = by_hand(theirs, rows())
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_prefix_tokens_have_no_loss_of_their_own() -> None:
    batch = rows()
    model = tiny_lm()
    with torch.no_grad():
        logits = model(batch[2].tokens[None]).logits[0].log_softmax(-1)
        want = -(logits[3, batch[2].tokens[4]] + logits[4, batch[2].tokens[5]]) / 2
    assert sft._step(model, [batch[2]]) == pytest.approx(want.item(), rel=1e-5)


def test_loss_falls_and_the_answers_are_learned() -> None:
    model, tokenizer = tiny_lm(), word_tokenizer()
    records = [SFTRecord("a ", "b c"), SFTRecord("d ", "e f"), SFTRecord("g ", "h i")] * 4
    config = SFTConfig(epochs=30, batch_size=6, lr=1e-2)
    seen: list[tuple[int, int]] = []
    report = sft.train_sft(model, tokenizer, records, config=config, progress=lambda *now: seen.append(now))
    assert len(report.losses) == 60 and seen == [(k, 60) for k in range(1, 61)]
    assert report.losses[-1] < 0.2 < 1.0 < report.losses[0]
    assert (report.records, report.cut, report.target_tokens) == (12, 0, 36)
    assert not any(p.requires_grad for p in model.parameters())
    prompt = data.make_prompts(["a", "d", "g"], tokenizer)
    out = model.generate(
        prompt.input_ids, attention_mask=prompt.attention_mask.long(), max_new_tokens=3, do_sample=False
    )
    assert tokenizer.batch_decode(out[:, 1:]) == ["b c .", "e f .", "h i ."]


def test_the_seed_decides_and_frozen_layers_stay() -> None:
    def train(seed: int) -> tuple[list[float], set[str]]:
        model = tiny_lm()
        before = {name: p.clone() for name, p in model.named_parameters()}
        report = sft.train_sft(
            model, word_tokenizer(), RECORDS, config=SFTConfig(batch_size=1, lr=1e-2, train_layers=1), seed=seed
        )
        return report.losses, {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    losses, moved = train(1)
    assert (losses, moved) == train(1) and losses != train(2)[0] and len(losses) == 4
    model = tiny_lm()
    models.freeze(model, train_layers=1)
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_longer_records_are_cut_and_counted() -> None:
    records = [
        SFTRecord("", "a b c"),
        SFTRecord("", "a b c d"),
        SFTRecord("a b c d e ", "f"),
        SFTRecord("a b ", "c d e"),
    ]
    assert [row.tokens.tolist() for row in rows(records, 4)] == [[1, 2, 3, 0], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    report = sft.train_sft(tiny_lm(), word_tokenizer(), records, config=SFTConfig(max_tokens=4))
    # The first fits exactly; the third has no target left and is no record.
    assert (report.cut, report.records, report.target_tokens) == (3, 3, 3 + 3 + 2)


@pytest.mark.parametrize("records", [[], [SFTRecord("a b c d ", "e")]])
def test_nothing_to_train_on(records: list[SFTRecord]) -> None:
    with pytest.raises(ValueError, match="no record has a target token within sft.max_tokens"):
        sft.train_sft(tiny_lm(), word_tokenizer(), records, config=SFTConfig(max_tokens=4))


@pytest.mark.parametrize(
    ("lines", "prefix", "target"),
    [
        ([{"text": "a b"}, {"text": "c"}], "", "a b"),
        ([{"prompt": "a ", "completion": "b"}], "a ", "b"),
        ([{"condition": "good", "text": "a b"}], "good\n", "a b"),
    ],
)
def test_all_kinds_of_files_train(lines: list[dict[str, str]], prefix: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = data.read_sft(path)
    assert records[0] == SFTRecord(prefix, target)
    assert sft.train_sft(tiny_lm(), word_tokenizer(), records).records == len(lines)
