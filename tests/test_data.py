"""Reading, splitting and streaming texts: good and bad files, and what the rest of the pipeline relies on."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_engine import data
from rlhf_engine.data import SFTRecord
from rlhf_engine.types import RatedTexts


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


# Film reviews


def film_folder(folder: Path, texts: list[str], scores: list[str], rating_ids: list[int] | None = None) -> Path:
    """The source's format: CRLF, tabs, no line break at the end."""
    ids = rating_ids or list(range(1, len(scores) + 1))
    lines = [f"{i}\t0.5\t{text}" for i, text in enumerate(texts, 1)]
    write(folder / "movieReviewSnippets_GroundTruth.txt", "\r\n".join(lines))
    lines = [f"{i}\t0.5\t0.1\t{score}" for i, score in zip(ids, scores, strict=True)]
    write(folder / "movieReviewSnippets_anonDataRatings.txt", "\r\n".join(lines))
    return folder


def test_film_reviews_in_file_order_with_blocks_of_30(tmp_path):
    texts = [f"text number {i}" for i in range(61)]
    texts[1] = "The  ''Spy Kids''   sequel &amp; the café    a delight    works "
    texts[2] = "a line\u2028separator stays in one row"
    rated = data.film_reviews(film_folder(tmp_path, texts, [f"[{i % 5 - 2}, -3, 4]" for i in range(61)]))
    assert rated.texts[0] == "text number 0" and rated.texts[60] == "text number 60"
    assert rated.texts[1] == 'The "Spy Kids" -- sequel & the café -- a delight -- works'
    assert rated.ratings[:2] == [[-2.0, -3.0, 4.0], [-1.0, -3.0, 4.0]]
    assert rated.blocks == [0] * 30 + [1] * 30 + [2]


@pytest.mark.parametrize(
    ("texts", "scores", "ids", "message"),
    [
        (["a", "b"], ["[1]", "[1]"], [1, 3], "anonDataRatings.txt: line 2 has id 3, but movie.* has 2"),
        (["a", "b"], ["[1]"], None, "has 2 lines, but .* has 1"),
        (["a\tb"], ["[1]"], None, "GroundTruth.txt: line 1 has 4 tab-separated fields, not 3"),
        (["a"], ["__import__('os')"], None, "line 1: not a list of numbers"),
        (["a"], ["[1, NaN]"], None, "line 1: not a list of numbers"),
        (["a"], ["[1, 'x']"], None, "line 1: not a list of numbers"),
        (["a"], ["[]"], None, "line 1 must be a list of at least one number"),
        (["a"], ["[[1]]"], None, "line 1 holds list of 1, which is not a number"),
        ([], [], None, "the file is empty"),
    ],
)
def test_film_reviews_that_do_not_fit(texts, scores, ids, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.film_reviews(film_folder(tmp_path, texts, scores, ids))


def test_film_reviews_of_another_encoding_or_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        data.film_reviews(tmp_path)
    film_folder(tmp_path, ["a"], ["[1]"])
    write(tmp_path / "movieReviewSnippets_GroundTruth.txt", "1\t0\tcaf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="GroundTruth.txt: not UTF-8"):
        data.film_reviews(tmp_path)


# Rated JSONL


GOOD = '{"text": "a", "ratings": [1]}\n'


def test_read_rated(tmp_path):
    lines = [{"text": "é", "ratings": [1, 2.5], "block": "b"}, {"text": "x", "ratings": [0, -1], "block": 7}]
    lines.append({"text": "y", "ratings": [3, 3], "block": "b"})
    content = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n"
    rated = data.read_rated(write(tmp_path / "r.jsonl", content))
    assert rated == RatedTexts(["é", "x", "y"], [[1.0, 2.5], [0.0, -1.0], [3.0, 3.0]], [0, 1, 0])
    rated = data.read_rated(write(tmp_path / "r.jsonl", GOOD + '{"text": "b", "ratings": [1, 2]}'))
    assert rated.blocks == [0, 1], "without blocks, no two texts share raters"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "r.jsonl: the file holds no records"),
        ("\n \n", "r.jsonl: the file holds no records"),
        ('{"text": "a", "ratings": [1]}'.encode("utf-16"), "r.jsonl: the file is UTF-16"),
        (GOOD.encode() + b'{"text": "caf\xe9"}', r"r.jsonl: line 2: not UTF-8 \(byte 0xe9 at position 13\)"),
        (GOOD + '{"text": "a", "ratings": [1}', "line 2: not JSON"),
        (GOOD + "[1, 2]", "line 2: expected an object like {...}, got list of 2"),
        ('{"text": "a", "ratings": [NaN]}', "line 1: not JSON: NaN is not a finite number"),
        ('{"text": "a", "ratings": [-Infinity]}', "line 1: not JSON: -Infinity is not a finite number"),
        ('{"text": "a", "ratings": [1e999]}', "holds inf, which is not a finite number"),
        ('{"text": "a", "ratings": [1' + "0" * 400 + "]}", "holds a huge integer, which is not a finite number"),
        ('{"text": "a", "ratings": [1' + "0" * 5000 + "]}", "line 1: not JSON"),
        ('{"text": "a", "ratings": [true]}', "holds True, which is not a number"),
        ('{"text": "a", "ratings": ["4"]}', "holds '4', which is not a number"),
        ('{"text": "a", "ratings": []}', "at least one number, got list of 0"),
        ('{"text": "a", "ratings": 3}', "at least one number, got 3"),
        ('{"text": "a"}', '"ratings" must be a list of at least one number, got None'),
        ('{"ratings": [1]}', 'line 1: "text" must be a string, got nothing'),
        ('{"text": " ", "ratings": [1]}', '"text" is empty'),
        ('{"text": "\\ud800", "ratings": [1]}', "surrogate"),
        ('{"text": "a", "ratings": [1], "blocks": 1}', "unknown field 'blocks'"),
        ('{"text": "a", "ratings": [1], "block": 1.5}', "must be a whole number or a string, got 1.5"),
        ('{"text": "a", "ratings": [1], "block": [[]]}', "got list of 1"),
        (GOOD + '{"text": "a", "ratings": [1], "block": 1}', 'line 2: either every record has a "block" or none has'),
        (
            '{"text": "a", "ratings": [1, 2], "block": 1}\n{"text": "b", "ratings": [1], "block": 1}',
            "line 2: 1 ratings, but block 1 has 2 per text",
        ),
        ("[" * 200_000, "line 1: (nested too deeply|not JSON)"),
    ],
)
def test_bad_rated_files_name_file_and_line(content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        data.read_rated(write(tmp_path / "r.jsonl", content))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 500


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,textraingsblock019.-eE \n', max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", content)
    for read in (data.read_rated, data.read_sft):
        try:
            read(path)
        except ValueError as e:
            assert str(path) in str(e)


# Planted texts


def test_planted_is_deterministic_distinct_and_ordered_by_its_words():
    rated = data.planted(480, 3)
    assert rated == data.planted(480, 3) != data.planted(480, 4)
    assert len(data.deduplicate(rated)) == 480
    assert rated.blocks == [i // 30 for i in range(480)]
    assert {len(scores) for scores in rated.ratings} == {10}
    assert {x for scores in rated.ratings for x in scores} <= {float(x) for x in range(-4, 5)}
    mean = {text: sum(scores) / 10 for text, scores in zip(rated.texts, rated.ratings, strict=True)}
    best = [m for text, m in mean.items() if "superb" in text and "brilliant" in text]
    worst = [m for text, m in mean.items() if "awful" in text and "dreadful" in text]
    assert min(best) > 1.5 and max(worst) < -1.5
    with pytest.raises(ValueError, match="different texts can be made"):
        data.planted(10**6, 0)


def test_planted_residuals_agree_within_a_panel_only():
    """The rater's own bias is shared down a column of a block, and not with the next block."""
    rated = data.planted(3000, 0, bias=1.0)
    residual = [[x - sum(scores) / len(scores) for x in scores] for scores in rated.ratings]

    def correlation(step: int) -> float:
        pairs = [(residual[i], residual[i + step]) for i in range(0, 2900)]
        pairs = [p for (i, p) in enumerate(pairs) if (rated.blocks[i] == rated.blocks[i + step]) == (step == 1)]
        dot = sum(x * y for a, b in pairs for x, y in zip(a, b, strict=True))
        return dot / sum(x * x for a, _ in pairs for x in a)

    assert correlation(1) > 0.3 and abs(correlation(30)) < 0.1


# Splitting


@st.composite
def rated_texts(draw: st.DrawFn) -> RatedTexts:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    blocks = [b for b, size in enumerate(sizes) for _ in range(size)]
    text = st.builds(str.format, st.sampled_from(["it is {}", "It is {}!", '"it  IS" {}.']), st.integers(0, 40))
    texts = draw(st.lists(text, min_size=len(blocks), max_size=len(blocks)))
    return RatedTexts(texts, [[float(i)] for i in range(len(blocks))], blocks)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@settings(max_examples=300, deadline=None)
@given(rated_texts(), st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 6)), st.integers(0, 5))
def test_split_never_mixes_blocks_or_texts(rated, sizes, seed):
    try:
        parts = data.split_by_block(rated, sizes, seed)
    except ValueError as e:
        assert f"{sizes[1]} held out and {sizes[2]} for prompts" in str(e)
        return
    assert [len(parts[1]), len(parts[2])] == list(sizes[1:])
    assert len(parts[0]) == sizes[0] or (sizes[0] == 0 and len(parts[0]) > 0)
    everything = [words(text) for part in parts for text in part.texts]
    assert len(set(everything)) == len(everything), "no text twice, in one part or in two"
    blocks = [set(part.blocks) for part in parts]
    assert not (blocks[0] & blocks[1] or blocks[0] & blocks[2] or blocks[1] & blocks[2])
    for part in parts:  # rows stay whole
        for text, scores, block in zip(part.texts, part.ratings, part.blocks, strict=True):
            row = int(scores[0])
            assert (rated.texts[row], rated.blocks[row]) == (text, block)
    assert parts == data.split_by_block(rated, sizes, seed)


def test_split_sizes_seed_and_report():
    rated = data.planted(480, 0)
    parts = data.split_by_block(rated, (240, 120, 120), 0)
    assert [len(part) for part in parts] == [240, 120, 120]
    assert parts != data.split_by_block(rated, (240, 120, 120), 1)
    assert [len(part) for part in data.split_by_block(rated, (0, 100, 50), 0)] == [480 - 120 - 60, 100, 50]
    assert parts[0].blocks != sorted(parts[0].blocks), "shuffled, not block after block"
    said: list[str] = []
    double = RatedTexts(rated.texts + ["The OLD plot"] * 3, rated.ratings + [[0.0]] * 3, rated.blocks + [99] * 3)
    data.split_by_block(double, (0, 30, 30), 0, said.append)
    assert said == ["2 of 483 texts repeat another one and were dropped"]
    with pytest.raises(ValueError, match="480 different texts in 16 blocks do not make 400 for training, 60 held"):
        data.split_by_block(rated, (400, 60, 60), 0)
    with pytest.raises(ValueError, match="do not make any for training"):
        data.split_by_block(rated, (0, 240, 240), 0)
    with pytest.raises(ValueError, match="do not make"):
        data.split_by_block(rated, (10, -1, 10), 0)


# Prompts


class Letters:
    """A tokenizer of one id per letter; `front` and `back` are its special tokens. Its pad id is its eos id."""

    def __init__(self, front: list[int], back: list[int], bos: int | None = None, eos: int | None = 2) -> None:
        self.front, self.back, self.bos_token_id, self.eos_token_id, self.pad_token_id = front, back, bos, eos, eos

    def __call__(self, text: str | list[str]) -> Letters:
        encoded = [self.front + [ord(c) for c in t] + self.back for t in ([text] if isinstance(text, str) else text)]
        out = Letters(self.front, self.back)
        out.input_ids = encoded[0] if isinstance(text, str) else encoded
        return out


def test_prompt_texts():
    rated = RatedTexts(["a b c d", "a  b\nc e", "a b c", "x y z w v", ""], [[0.0]] * 5, [0] * 5)
    assert data.prompt_texts(rated, 3) == ["a b c", "x y z"]
    with pytest.raises(ValueError, match="words=0"):
        data.prompt_texts(rated, 0)


def test_left_padding_when_pad_is_eos():
    eos = "\x02"  # the prompt itself holds the pad id, at both ends
    prompts = data.make_prompts(["abc", eos + "a" + eos, "d"], Letters([], []), ids=["x", "y", "z"])
    assert prompts.input_ids.tolist() == [[97, 98, 99], [2, 97, 2], [2, 2, 100]]
    assert prompts.attention_mask.tolist() == [[True] * 3, [True] * 3, [False, False, True]]
    assert prompts.ids == ["x", "y", "z"] and prompts.texts[2] == "d" and len(prompts) == 3
    assert str(prompts.input_ids.dtype) == "torch.int64" and str(prompts.attention_mask.dtype) == "torch.bool"
    no_pad = data.make_prompts(["ab", "c"], Letters([], [], eos=None))
    assert no_pad.input_ids.tolist() == [[97, 98], [0, 99]] and no_pad.ids == ["p0", "p1"]


def test_special_tokens_and_empty_prompts():
    assert data.make_prompts(["a"], Letters([1], [2], bos=1)).input_ids.tolist() == [[1, 97]], "no eos after a prompt"
    assert data.make_prompts(["a"], Letters([2], [], bos=2)).input_ids.tolist() == [[2, 97]], "eos in front is a bos"
    prompts = data.make_prompts(["", "ab"], Letters([], [], bos=1))
    assert prompts.input_ids[0, 1] == 1 and prompts.attention_mask.tolist() == [[False, True], [True, True]]
    with pytest.raises(ValueError, match="prompt 'p1' .* has no tokens"):
        data.make_prompts(["a", ""], Letters([], []))
    with pytest.raises(ValueError, match="list of prompts is empty"):
        data.make_prompts([], Letters([], []))
    for ids in (["x"], ["x", "x"]):
        with pytest.raises(ValueError, match="2 prompts need as many different ids, got 1"):
            data.make_prompts(["a", "b"], Letters([], []), ids=ids)


@given(st.integers(1, 9), st.integers(1, 13), st.integers(0, 3))
def test_prompt_batches_use_every_prompt_once_per_pass(count, batch_size, seed):
    prompts = [f"prompt {i}" for i in range(count)]
    passes = 4
    batches = list(itertools.islice(data.prompt_batches(prompts, batch_size, seed), -(-passes * count // batch_size)))
    assert {len(batch) for batch in batches} == {batch_size}
    stream = [entry for batch in batches for entry in batch]
    assert len({name for name, _ in stream}) == len(stream)
    for number in range(passes):
        part = stream[number * count : (number + 1) * count]
        assert Counter(text for _, text in part) == Counter(prompts)
        assert all(name == f"p{prompts.index(text)}.{number + 1}" for name, text in part)
    again = itertools.islice(data.prompt_batches(prompts, batch_size, seed), len(batches) - 1, None)
    assert batches[-1] == next(again)


def test_prompt_batches_reshuffle_and_refuse():
    stream = data.prompt_batches([str(i) for i in range(50)], 50, 0)
    first, second = next(stream), next(stream)
    assert [t for _, t in first] != [t for _, t in second]
    for prompts, size in (([], 3), (["a"], 0)):
        with pytest.raises(ValueError, match="cannot make batches"):
            data.prompt_batches(prompts, size, 0)


# Records for fine-tuning


@pytest.mark.parametrize(
    ("lines", "records"),
    [
        ([{"text": "abc"}, {"text": "d"}], [SFTRecord("", "abc"), SFTRecord("", "d")]),
        ([{"prompt": "Q: ", "completion": "A"}], [SFTRecord("Q: ", "A")]),
        ([{"prompt": "", "completion": "A"}], [SFTRecord("", "A")]),
        ([{"condition": "good", "text": "abc"}], [SFTRecord("good\n", "abc")]),
        ([{"text": "abc", "condition": "good: "}], [SFTRecord("good: ", "abc")]),
    ],
)
def test_read_sft(lines, records, tmp_path):
    assert data.read_sft(write(tmp_path / "s.jsonl", "\n".join(map(json.dumps, lines)))) == records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', 'line 2: {"prompt", "completion"}, but .* {"text"}'),
        ('{"prompt": "a"}', 'line 1: field "completion" is missing; the closest .* {"prompt", "completion"}'),
        ('{"prompt": "a", "response": "b"}', 'field "completion" is missing; .* {"prompt", "completion"}'),
        ('{"text": "a", "label": "b"}', "field 'label' is not known; the closest accepted form is {\"text\"}"),
        ('{"condition": "a"}', 'field "text" is missing; the closest accepted form is {"condition", "text"}'),
        ("{}", 'field "text" is missing; the closest accepted form is {"text"}'),
        ('{"text": 3}', 'line 1: "text" must be a string, got 3'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ("", "the file holds no records"),
    ],
)
def test_bad_sft_files(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data.read_sft(write(tmp_path / "s.jsonl", content))
