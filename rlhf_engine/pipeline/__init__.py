"""The whole job, stage by stage: fetch -> (sft) -> rank -> reward -> ppo -> report.

Each stage is a function of a `Job`, so that `rlhf run` does them in one process and every one is a command of its own
that picks up what earlier stages left in the run folder.
"""

from __future__ import annotations

from typing import Any

from rlhf_engine.config import RunConfig
from rlhf_engine.metrics import RunLog
from rlhf_engine.pipeline.generating import generate as generate
from rlhf_engine.pipeline.job import finish, load, load_data, load_tuned, model_folder, rated, start
from rlhf_engine.pipeline.reinforcing import ppo_stage, sft_stage
from rlhf_engine.pipeline.rewarding import compare, rank_stage, reward_stage


def run(config: RunConfig, log: RunLog) -> dict[str, Any]:
    """Everything, from a fresh folder to report.html; returns the summary."""
    job = start(config, log, fresh=True)
    stages = [load, *([sft_stage] if config.sft.data else []), rank_stage, reward_stage, ppo_stage]
    for stage in stages:
        stage(job)
    return finish(job)


def fetch(config: RunConfig, log: RunLog) -> None:
    """Brings model and data of this config into the cache, or checks that they are there."""
    with log.stage("fetch"):
        log.say(f"model: {model_folder(config, log)}")
        rated(config, log)
        log.say(f"data: {config.data.source}")


def sft(config: RunConfig, log: RunLog) -> dict[str, Any]:
    """Supervised fine-tuning alone; leaves sft/."""
    if not config.sft.data:
        raise ValueError("sft.data is not set: name a JSONL file, for example --sft.data train.jsonl")
    return _stages(config, log, load, sft_stage)


def rank(config: RunConfig, log: RunLog) -> dict[str, Any]:
    """Comparisons and their ranking alone; leaves ranking.json."""
    return _stages(config, log, load_data, rank_stage)


def reward(config: RunConfig, log: RunLog) -> dict[str, Any]:
    """The reward model alone; leaves reward_model/."""
    return _stages(config, log, load_tuned, compare, reward_stage)


def ppo(config: RunConfig, log: RunLog) -> dict[str, Any]:
    """PPO alone, with the reward model that an earlier stage left in the run folder where the config names it."""
    return _stages(config, log, load_tuned, ppo_stage)


def _stages(config: RunConfig, log: RunLog, *stages: Any) -> dict[str, Any]:
    job = start(config, log, fresh=False)
    for stage in stages:
        stage(job)
    return finish(job)
