"""Texts on their way into a model: prompts cut from texts, tokenised, streamed; records for fine-tuning.

Reading, planting and splitting rated texts is in rated.py; its names are offered here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .rated import deduplicate, film_reviews, json_lines, planted, read_rated, split_by_block, text_field
from .types import Prompts, RatedTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SFTRecord", "deduplicate", "film_reviews", "make_prompts", "planted", "prompt_batches", "prompt_texts",
    "read_rated", "read_sft", "split_by_block",
]  # fmt: skip


def prompt_texts(rated: RatedTexts, words: int) -> list[str]:
    """The first `words` words of every text that goes on after them; each prompt once, in order of appearance.

    Raises:
        ValueError: `words` is not positive.
    """
    if words < 1:
        raise ValueError(f"prompt_texts: a prompt needs at least one word, got words={words}")
    split = (text.split() for text in rated.texts)
    return list(dict.fromkeys(" ".join(parts[:words]) for parts in split if len(parts) > words))


def make_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase, ids: list[str] | None = None) -> Prompts:
    """Tokenises and left-pads. Special tokens are the tokenizer's own, but for an end-of-sequence at the end.

    Lengths decide the mask, never the pad id, which may well be the end-of-sequence id. A prompt without tokens becomes
    the beginning-of-sequence token where the tokenizer has one.

    Raises:
        ValueError: no prompts, ids that repeat or are too few, or an empty prompt that no such token can stand for.
    """
    if not texts:
        raise ValueError("make_prompts: the list of prompts is empty")
    ids = [f"p{i}" for i in range(len(texts))] if ids is None else list(ids)
    if len(ids) != len(texts) or len(set(ids)) != len(ids):
        raise ValueError(f"make_prompts: {len(texts)} prompts need as many different ids, got {len(set(ids))}")
    eos = tokenizer.eos_token_id
    closes = eos is not None and tokenizer("a").input_ids[-1:] == [eos]  # an encoder-decoder habit; it ends a response
    rows = [row[:-1] if closes else row for row in tokenizer(texts).input_ids]
    for i, row in enumerate(rows):
        if not row and tokenizer.bos_token_id is None:
            raise ValueError(f"make_prompts: prompt {ids[i]!r} ({texts[i]!r}) has no tokens")
        rows[i] = row or [tokenizer.bos_token_id]
    candidates = (tokenizer.pad_token_id, eos, 0)
    pad = next(c for c in candidates if c is not None)
    width = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = torch.arange(width) >= width - lengths[:, None]
    return Prompts(ids, list(texts), input_ids, attention_mask)


def prompt_batches(prompts: list[str], batch_size: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    """Batches of (id, prompt) without end: every prompt once per pass, each pass in its own order.

    "p17.2" is prompt 17 in pass 2 (passes count from 1), so no id ever repeats. A batch may span two passes; all have
    `batch_size` entries. The stream depends on the arguments only: to go on after k batches, skip k.

    Raises:
        ValueError: no prompts, or a batch size below 1.
    """
    if not prompts or batch_size < 1:
        raise ValueError(f"prompt_batches: cannot make batches of {batch_size} from {len(prompts)} prompts")
    return _endless(list(prompts), batch_size, seed)


def _endless(prompts: list[str], batch_size: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    number = 0
    while True:
        number += 1
        order = list(range(len(prompts)))
        random.Random(f"prompts {seed} {number}").shuffle(order)
        for i in order:
            batch.append((f"p{i}.{number}", prompts[i]))
            if len(batch) == batch_size:
                yield batch
                batch = []


@dataclass(slots=True)
class SFTRecord:
    """One record for fine-tuning. The model reads prefix + target, joined as they are; loss falls on target alone.

    Example: SFTRecord(prefix="Is it good? ", target="Yes.")
    """

    prefix: str
    target: str


SFT_FORMS = (("text",), ("prompt", "completion"), ("condition", "text"))


def read_sft(path: str | Path) -> list[SFTRecord]:
    """JSONL, all lines of one form: {"text"}, {"prompt", "completion"} or {"condition", "text"}.

    A prompt and its completion are joined as they are. A condition gets a line break after it unless it ends in white
    space already.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names file, line, field, and the accepted form that comes closest.
    """
    records: list[SFTRecord] = []
    form: tuple[str, ...] = ()
    for line, record in json_lines(path):
        where = f"{path}: line {line}"
        found = _sft_form(record, where)
        if records and found != form:
            raise ValueError(f"{where}: {_braces(found)}, but the lines before are {_braces(form)}; use one form")
        form = found
        target = text_field(record, form[-1], where)
        prefix = text_field(record, form[0], where, may_be_empty=True) if len(form) == 2 else ""
        if form[0] == "condition" and prefix and not prefix[-1].isspace():
            prefix += "\n"
        records.append(SFTRecord(prefix, target))
    return records


def _sft_form(record: dict[str, Any], where: str) -> tuple[str, ...]:
    for form in SFT_FORMS:
        if set(form) == set(record):
            return form
    # Closest: most fields in common, then fewest to add.
    closest = max(SFT_FORMS, key=lambda form: (len(set(form) & set(record)), -len(form)))
    missing = [f'field "{key}" is missing' for key in closest if key not in record]
    unknown = [f"field {key[:40]!r} is not known" for key in record if key not in closest]
    raise ValueError(f"{where}: {(missing + unknown)[0]}; the closest accepted form is {_braces(closest)}")


def _braces(form: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{key}"' for key in form) + "}"
