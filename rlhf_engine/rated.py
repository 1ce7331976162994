"""Texts with every single rater's score: read from film reviews or a JSONL file, or planted; then split by block.

A block is a set of texts that one panel rated, column by column, so it is also the unit that a split never divides.
"""

from __future__ import annotations

import html
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .types import RatedTexts

FILM_BLOCK = 30


def film_reviews(folder: str | Path) -> RatedTexts:
    """The film-review snippets of Hutto & Gilbert (ICWSM 2014), in file order, from `fetch_film_reviews`.

    A block is 30 consecutive snippets. The source's README does not say so; the ratings do: residuals of
    neighbouring snippets correlate .31 to .38 within a column at 29 of the 30 offsets and -.01 across the boundary,
    and the number of raters changes at multiples of 30 only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the two files disagree, or a line is not of the format; names file and line.
    """
    folder = Path(folder)
    texts_file = folder / "movieReviewSnippets_GroundTruth.txt"
    ratings_file = folder / "movieReviewSnippets_anonDataRatings.txt"
    text_rows, rating_rows = _tab_rows(texts_file, 3), _tab_rows(ratings_file, 4)
    if len(text_rows) != len(rating_rows):
        raise ValueError(f"{texts_file} has {len(text_rows)} lines, but {ratings_file} has {len(rating_rows)}")
    rated = RatedTexts([], [], [])
    for row, ((text_id, _, text), (rating_id, _, _, scores)) in enumerate(zip(text_rows, rating_rows, strict=True)):
        if text_id != rating_id:
            raise ValueError(f"{ratings_file}: line {row + 1} has id {rating_id}, but {texts_file.name} has {text_id}")
        rated.texts.append(_clean(text))
        rated.ratings.append(_written_scores(scores, f"{ratings_file}: line {row + 1}"))
        rated.blocks.append(row // FILM_BLOCK)
    return rated


def _tab_rows(path: Path, fields: int) -> list[list[str]]:
    try:
        content = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    if not content:
        raise ValueError(f"{path}: the file is empty")
    rows = [line.split("\t") for line in content.split("\n")]
    for number, row in enumerate(rows, 1):
        if len(row) != fields:
            raise ValueError(f"{path}: line {number} has {len(row)} tab-separated fields, not {fields}")
    return rows


def _written_scores(written: str, where: str) -> list[float]:
    try:
        scores = json.loads(written, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not a list of numbers: {written[:40]!r}") from None
    return _scores(scores, where)


def _clean(text: str) -> str:
    """Undoes what the source's export did: '' for a double quote, &amp;, and "--" blanked out (three or four spaces).

    All other hyphens became spaces too ("old fashioned"); those cannot be told from spaces and stay.
    """
    text = html.unescape(text).replace("''", '"').strip()
    return " ".join(re.sub(r" {3,}", " -- ", text).split())


def read_rated(path: str | Path) -> RatedTexts:
    """JSONL, one text a line: {"text": "a joy", "ratings": [3, 4, 2]} and optionally "block" (a number or a string).

    Texts of one block were rated by one panel in one order, so they need equally many ratings. Without "block", every
    text is its own block. Blocks are numbered in order of first appearance.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names file and line.
    """
    rated = RatedTexts([], [], [])
    numbers: dict[Any, int] = {}
    panel: dict[int, int] = {}
    with_block = False
    for line, record in json_lines(path):
        where = f"{path}: line {line}"
        if unknown := sorted(set(record) - {"text", "ratings", "block"}):
            form = '{"text", "ratings"}, with or without "block"'
            raise ValueError(f"{where}: unknown field {unknown[0][:40]!r}; a record is {form}")
        if rated.texts and ("block" in record) != with_block:
            raise ValueError(f'{where}: either every record has a "block" or none has')
        with_block = "block" in record
        label = record.get("block", line)
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f'{where}: "block" must be a whole number or a string, got {_short(label)}')
        rated.texts.append(text_field(record, "text", where))
        rated.ratings.append(_scores(record.get("ratings"), f'{where}: "ratings"'))
        rated.blocks.append(numbers.setdefault(label, len(numbers)))
        raters = len(rated.ratings[-1])
        if panel.setdefault(rated.blocks[-1], raters) != raters:
            raise ValueError(
                f"{where}: {raters} ratings, but block {label!r} has {panel[rated.blocks[-1]]} per text: "
                "the k-th rating of a block must be one person's throughout"
            )
    return rated


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of every line of a JSONL file that is not blank.

    Raises:
        FileNotFoundError, IsADirectoryError: nothing to read there.
        ValueError: not UTF-8, not JSON, NaN or Infinity, not an object, or no record at all; names file and line.
    """
    seen = False
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}: line {number}"
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{path}: the file is UTF-16; save it as UTF-8")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")  # a byte-order mark is dropped
            except UnicodeDecodeError as e:
                raise ValueError(f"{where}: not UTF-8 (byte {raw[e.start]:#04x} at position {e.start})") from None
            if not line.strip():
                continue
            try:
                record = json.loads(line, parse_constant=_no_constant)
            except RecursionError:
                raise ValueError(f"{where}: nested too deeply") from None
            except ValueError as e:
                raise ValueError(f"{where}: not JSON: {e}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected an object like {{...}}, got {_short(record)}")
            seen = True
            yield number, record
    if not seen:
        raise ValueError(f"{path}: the file holds no records")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def text_field(record: dict[str, Any], key: str, where: str, may_be_empty: bool = False) -> str:
    """A string field that can be encoded; ValueError names the place otherwise."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" must be a string, got {_short(value) if key in record else "nothing"}')
    if not may_be_empty and not value.strip():
        raise ValueError(f'{where}: "{key}" is empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'{where}: "{key}" holds half a surrogate pair, which no tokenizer can encode')
    return value


def _scores(value: object, where: str) -> list[float]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of at least one number, got {_short(value)}")
    scores = []
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            raise ValueError(f"{where} holds {_short(entry)}, which is not a number")
        if not abs(entry) <= 1e300 or not math.isfinite(entry):  # compares huge integers without converting them
            raise ValueError(f"{where} holds {_short(entry)}, which is not a finite number")
        scores.append(float(entry))
    return scores


def _short(value: object) -> str:
    """At most 40 characters of a stranger's value; never a huge integer's digits (Python refuses past 4300)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge integer"
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value[:40] if isinstance(value, str) else value)


POSITIVE = {"lovely": 2, "brilliant": 3, "warm": 1, "funny": 2, "gripping": 2, "superb": 3, "charming": 2, "clever": 1}
NEGATIVE = {"dull": -2, "awful": -3, "stale": -1, "clumsy": -2, "boring": -2, "dreadful": -3, "hollow": -1, "tired": -1}
MODIFIERS = ["old", "new", "short", "long", "quiet", "loud", "red", "blue", "northern", "southern", "early", "late"]
NOUNS = ["film", "story", "scene", "song", "plot", "cast", "script", "ending", "drama", "comedy", "sequel", "remake"]


def planted(
    count: int, seed: int, *, block_size: int = 30, raters: int = 10, noise: float = 1.0, bias: float = 0.5
) -> RatedTexts:
    """Made-up reviews with a known utility: "the old film is superb and warm" is worth the mean of its two judgements.

    A rater scores utility + own bias + noise, rounded, within -4..4. The openings are neutral and the texts all
    differ, so that prompts cut from them leave the judgement to the model.

    Raises:
        ValueError: more texts than there are different sentences.
    """
    judgements = POSITIVE | NEGATIVE
    shapes = [
        (start, modifier, noun, first, second)
        for start in ("the", "this", "their")
        for modifier in MODIFIERS
        for noun in NOUNS
        for first in judgements
        for second in judgements
        if first != second
    ]
    if not 0 <= count <= len(shapes):
        raise ValueError(f"planted: {len(shapes)} different texts can be made, not {count}")
    rng = random.Random(seed)
    rated = RatedTexts([], [], [])
    biases: list[float] = []
    for row, (start, modifier, noun, first, second) in enumerate(rng.sample(shapes, count)):
        if row % block_size == 0:  # a new panel
            biases = [rng.gauss(0.0, bias) for _ in range(raters)]
        utility = (judgements[first] + judgements[second]) / 2
        rated.texts.append(f"{start} {modifier} {noun} is {first} and {second}")
        rated.ratings.append([float(min(4, max(-4, round(utility + b + rng.gauss(0.0, noise))))) for b in biases])
        rated.blocks.append(row // block_size)
    return rated


def deduplicate(rated: RatedTexts) -> RatedTexts:
    """Keeps the first of all texts whose words agree, whatever their case and punctuation."""
    first: dict[str, int] = {}
    for row, text in enumerate(rated.texts):
        # Texts without any word characters, "!!!" say, are told apart as they stand.
        first.setdefault(" ".join(re.findall(r"\w+", text.casefold())) or text.strip(), row)
    return rated.select(list(first.values()))


def split_by_block(
    rated: RatedTexts, sizes: tuple[int, int, int], seed: int, log: Callable[[str], None] | None = None
) -> tuple[RatedTexts, RatedTexts, RatedTexts]:
    """Parts for training, held-out evaluation and prompts, of exactly the sizes asked for, shuffled.

    Repeated texts are dropped first (their number goes to `log`). A block's texts go to one part only: where a part is
    full before its last block is, the rest of that block is left out. A size of 0 for training takes all that are left.

    Raises:
        ValueError: the sizes cannot be met.
    """
    unique = deduplicate(rated)
    if log and len(unique) < len(rated):
        log(f"{len(rated) - len(unique)} of {len(rated)} texts repeat another one and were dropped")
    train, heldout, prompts = sizes
    rows_of: dict[int, list[int]] = {}
    for row, block in enumerate(unique.blocks):
        rows_of.setdefault(block, []).append(row)
    blocks = list(rows_of)
    rng = random.Random(seed)
    rng.shuffle(blocks)
    for block in blocks:
        rng.shuffle(rows_of[block])
    parts: list[RatedTexts] = []
    for size in (heldout, prompts, train or None):  # training last: it may take whatever is left
        rows: list[int] = []
        while blocks and (size is None or len(rows) < size):
            rows += rows_of[blocks.pop()]
        if (size is None and not rows) or (size is not None and not 0 <= size <= len(rows)):
            raise ValueError(
                f"{len(unique)} different texts in {len(rows_of)} blocks do not make {train or 'any'} for training, "
                f"{heldout} held out and {prompts} for prompts, as no block may be divided between them"
            )
        rows = rows[:size]
        rng.shuffle(rows)
        parts.append(unique.select(rows))
    return parts[2], parts[0], parts[1]
