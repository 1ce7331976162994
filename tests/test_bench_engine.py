"""The engine's benchmark: right lines where the engine is right, and no seconds where something was planted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_engine.bench import engine_bench, engine_trl, engine_work, learning
from rlhf_engine.bench.engine_bench import WatchedEngine, worse
from rlhf_engine.bench.engine_work import PHASES
from rlhf_engine.types import Experience, Prompts, Rollout, StepStats

CPU = torch.device("cpu")
WHOLE, TRUNK = engine_work.works(CPU, quick=True)


def test_quick_lines_are_right_and_timed() -> None:
    found = list(engine_bench.lines(CPU, quick=True))
    assert [(line["setting"], line["verdict"]) for line in found] == [
        ("all layers", "right"),
        ("frozen trunk", "right"),
    ]
    for line in found:
        json.dumps(line, allow_nan=False)
        assert line["checked"]["first_update_ratio_max_abs_dev"] == 0 and line["steps"] == 2
        assert line["config"]["dtype"] == "float32" and line["config"]["micro_batch"] == 4
        for phase in (*PHASES, "step"):
            spread = line["seconds"][phase]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"] and line["first"][phase] > 0
        assert line["tokens_per_second"] == pytest.approx(8 * 8 / line["seconds"]["step"]["median"])


def nudge_after_scoring(engine: WatchedEngine, patch: pytest.MonkeyPatch) -> None:
    score = engine.score

    def planted(batch: Rollout) -> Experience:
        experience = score(batch)
        with torch.no_grad():
            engine.policy_optimiser.parameters[-1].view(-1)[0] += 0.1
        return experience

    patch.setattr(engine, "score", planted)


def stale_logprobs(engine: WatchedEngine, patch: pytest.MonkeyPatch) -> None:
    """What engines do that learn from the sampler's log-probs."""
    score = engine.score
    patch.setattr(engine, "score", lambda batch: replace(score(batch), logprobs=batch.sampler_logprobs + 1e-6))


def move_the_reference(engine: WatchedEngine, patch: pytest.MonkeyPatch) -> None:
    update = engine.update

    def planted(experience: Experience) -> dict[str, float]:
        with torch.no_grad():
            next(engine.reference.parameters()).view(-1)[0] += 1.0
        return update(experience)

    patch.setattr(engine, "update", planted)


def lose_a_prompt(engine: WatchedEngine, patch: pytest.MonkeyPatch) -> None:
    rollout = engine.rollout

    def planted(prompts: Prompts) -> Rollout:
        rows = [*range(len(prompts) - 1), 0]
        return rollout(replace(prompts, input_ids=prompts.input_ids[rows]))

    patch.setattr(engine, "rollout", planted)


def skip_a_minibatch(engine: WatchedEngine, patch: pytest.MonkeyPatch) -> None:
    score = engine.score

    def planted(batch: Rollout) -> Experience:
        experience = score(batch)
        batch.micro_batches.pop()
        return experience

    patch.setattr(engine, "score", planted)


def lose_a_number(engine: WatchedEngine, patch: pytest.MonkeyPatch) -> None:
    update = engine.update
    patch.setattr(engine, "update", lambda experience: update(experience) | {"value/loss": math.nan})


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (nudge_after_scoring, "first_update_ratio_max_abs_dev is"),
        (stale_logprobs, "first_minibatch_approx_kl is"),
        (move_the_reference, "the reference has changed"),
        (lose_a_prompt, "prompts_lost is 1"),
        (skip_a_minibatch, "tokens_lost is 32"),
        (lose_a_number, "not finite"),
    ],
)
def test_what_is_wrong_gets_no_seconds(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[WatchedEngine, pytest.MonkeyPatch], None], words: str
) -> None:
    make_engine = engine_bench.make_engine

    def planted(work: engine_work.Work, device: torch.device) -> WatchedEngine:
        engine = make_engine(work, device)
        plant(engine, monkeypatch)
        return engine

    monkeypatch.setattr(engine_bench, "make_engine", planted)
    monkeypatch.setattr(engine_bench, "works", lambda device, quick: [TRUNK])
    (line,) = engine_bench.lines(CPU, quick=True, steps=1)
    assert line["verdict"].startswith("wrong: ") and words in line["verdict"]
    assert not {"seconds", "first", "tokens_per_second", "peak_bytes"} & set(line)


def test_a_failure_is_a_line_and_the_next_work_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: engine_work.Work, device: torch.device, steps: int) -> dict[str, Any]:
        raise ValueError(f"no {work.setting}")

    monkeypatch.setattr(engine_bench, "measure", fails)
    found = [line["verdict"] for line in engine_bench.lines(CPU, quick=True)]
    assert found == ["failed: ValueError: no all layers", "failed: ValueError: no frozen trunk"]


def test_nan_is_worse_than_anything() -> None:
    assert worse(1.0, -2.0) == -2.0 and math.isnan(worse(math.nan, 0.0)) and math.isnan(worse(0.0, math.nan))


def test_both_trainers_get_the_same_reward_and_no_prompt_twice() -> None:
    words = engine_work.tokenizer(WHOLE.shape)
    batches = list(engine_work.prompts(WHOLE, 3, words))
    rows = [tuple(row) for batch in batches for row in batch.input_ids.tolist()]
    assert len(set(rows)) == 3 * WHOLE.batch and {len(row) for row in rows} == {WHOLE.prompt_tokens}
    responses = torch.randint(0, WHOLE.shape.vocabulary - 1, (4, WHOLE.response_tokens))
    tokens = torch.cat([batches[0].input_ids[:4], responses], 1)
    model = engine_trl.ShareOfEven(WHOLE.prompt_tokens)
    theirs = model.score(model.body(input_ids=tokens).hidden_states[-1])[:, -1, 0]
    ours = engine_work.reward([], [words.decode(row) for row in responses])
    torch.testing.assert_close(theirs, torch.tensor(ours))
    assert words.pad_token_id == WHOLE.shape.vocabulary, "a response must never hold what TRL takes for padding"


def test_without_trl_a_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A folder that holds a later release, without PPO."""
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl/__init__.py").touch()
    monkeypatch.setenv("UPSTREAM", "")
    monkeypatch.setenv("PEERS", str(tmp_path))
    (line,) = engine_trl.lines(CPU, quick=True)
    assert line["verdict"] == "absent: No module named 'trl.experimental'" and "seconds" not in line


def test_a_random_tiny_model_learns() -> None:
    start, *steps, end = learning.lines(CPU, seconds=300, steps=20)
    assert start["model"] == "tiny" and "no model folder was given" in start["notes"][0]
    assert [step["step"] for step in steps] == list(range(1, 21))
    assert all(step["first_update_ratio_max_abs_dev"] == 0 and set(PHASES) == set(step["seconds"]) for step in steps)
    assert end["verdict"] == "right" and end["stopped"] == "all steps"
    # In units of the standard deviation of the untrained model's scores; of 32 scores, a mean is off by .2.
    assert end["score_last"] > end["score_first"] + 0.6


def test_learning_stops_in_time_while_it_prepares() -> None:
    start, end = learning.lines(CPU, seconds=0, model="no/such/folder/here")
    assert "no such folder" in start["notes"][0] and start["model"] == "tiny"
    assert end["stopped"].startswith("out of time before the first step") and "score_first" not in end


def test_no_step_begins_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that steps move on, each by one second more than the last: 1 + 2 + 3 s, and no room for another 3."""
    now = [0.0]
    monkeypatch.setattr(learning, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lengths = iter(range(1, 100))

    def step(prompts: Prompts) -> StepStats:
        now[0] += next(lengths)
        return StepStats(1, dict.fromkeys(learning.KEPT, 0.0), dict.fromkeys(PHASES, 0.0), prompts.texts)

    config = learning.preset("tiny")
    job = SimpleNamespace(
        config=replace(config, ppo=replace(config.ppo, steps=100)), prompts=(["t1"], []),
        tokenizer=engine_work.tokenizer(WHOLE.shape),
    )  # fmt: skip
    assert len(list(learning.curve(job, SimpleNamespace(step=step), None, deadline=8.9))) == 3
    now[0], lengths = 0.0, iter([1] * 100)
    job.config = replace(job.config, ppo=replace(job.config.ppo, steps=4))
    assert len(list(learning.curve(job, SimpleNamespace(step=step), None, deadline=8.9))) == 4


def test_texts_are_made_where_the_reviews_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """With a model, and an archive in the cache that is not the one: nothing may be fetched."""
    from rlhf_engine import fetch
    from rlhf_engine.tiny import tiny_model_folder

    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: pytest.fail("went to the network"))
    model = str(tiny_model_folder(tmp_path / "model"))
    config, notes = learning.settings(model)
    assert config.model == model and config.data.source == "planted" and "not in the cache" in notes[0]
    assert config.ppo == learning.RunConfig().ppo
