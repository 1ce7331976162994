"""What the stages share, how a run starts and ends, and how its model and data are loaded."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from rlhf_engine import data, evaluation, models, report, runs, tiny
from rlhf_engine import fetch as fetching
from rlhf_engine import reward_model as rm
from rlhf_engine.config import RunConfig
from rlhf_engine.metrics import RunLog
from rlhf_engine.models import LanguageModel
from rlhf_engine.types import Comparisons, RatedTexts, Rollout


@dataclass(slots=True)
class Job:
    """What the stages share."""

    config: RunConfig
    log: RunLog
    folder: Path
    device: torch.device
    summary: dict[str, Any] = field(default_factory=dict)
    model_folder: str = ""
    base: LanguageModel = None  # frozen: pretrained, or supervised fine-tuned
    tokenizer: Any = None
    # These have no value before their stage ran.
    parts: tuple[RatedTexts, RatedTexts, RatedTexts] = field(init=False)  # train, held-out, prompts
    prompts: tuple[list[str], list[str]] = field(init=False)  # to train on, to evaluate on
    matches: Comparisons = field(init=False)
    reward_model: rm.RewardModel | None = None
    pretrained_samples: Rollout | None = None  # only kept where SFT changes the base
    tuned: bool = False  # the base is not the config's model but what SFT made of it


def start(config: RunConfig, log: RunLog, *, fresh: bool) -> Job:
    folder = runs.create(config) if fresh else runs.open_or_create(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA device here; use --device cpu or auto")
    evaluation.load_judge(config.evaluate.judge)  # now, rather than after an hour
    for source in config.reward:
        if ":" in source.source and not Path(source.source).exists():
            evaluation.load_function(source.source, f"reward {source.name}")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    models.quiet_transformers()
    job = Job(config, log, folder, device, summary=runs.read_summary(folder))
    machine = runs.describe_machine(device)
    runs.write_environment(folder, machine)
    job.summary |= {"status": "running", "model": config.model, "machine": machine}
    runs.write_summary(folder, job.summary)
    log.say(
        f"run folder {folder}; {machine['threads']} threads, {machine['matmul_gflops_float32']:.0f} GFLOP/s in float32"
    )
    return job


def finish(job: Job) -> dict[str, Any]:
    started = time.perf_counter()
    before = {k: v for k, v in job.summary.get("seconds", {}).items() if k not in ("report", "other")}
    seconds = {**before, **job.log.seconds}
    # Imports, calibration, and whatever else lies between the stages.
    outside = job.log.elapsed() - sum(job.log.seconds.values())
    seconds["other"] = job.summary.get("seconds", {}).get("other", 0.0) + outside
    seconds["total"] = sum(v for k, v in seconds.items() if k != "total")
    job.summary |= {"status": "complete", "seconds": seconds, "peak_memory_gb": round(runs.peak_memory_gb(), 2)}
    runs.write_summary(job.folder, job.summary)
    path = report.write(job.folder)
    job.summary["seconds"]["report"] = time.perf_counter() - started
    job.summary["seconds"]["total"] += job.summary["seconds"]["report"]
    runs.write_summary(job.folder, job.summary)
    job.log.say(f"{job.summary['seconds']['total']:.0f} s in all; report: {path}")
    return job.summary


def model_folder(config: RunConfig, log: RunLog) -> str:
    if config.model == "tiny":
        texts = data.planted(300, config.seed).texts
        return str(tiny.tiny_model_folder(Path(config.output) / "tiny_model", seed=config.seed, texts=texts))
    if config.model == "smollm2-135m-instruct":
        return str(fetching.fetch_model(config.model, log=log.say))
    return config.model


def rated(config: RunConfig, log: RunLog) -> RatedTexts:
    d = config.data
    if d.source == "film-reviews":
        return data.film_reviews(fetching.fetch_film_reviews(log=log.say))
    if d.source == "planted":
        count = max(d.train_texts, 1) + d.heldout_texts + d.prompt_texts
        return data.planted(count + 200, config.seed)  # duplicates and cut blocks cost some
    return data.read_rated(d.source)


def load_data(job: Job) -> None:
    with job.log.stage("data"):
        d = job.config.data
        everything = rated(job.config, job.log)
        sizes = (d.train_texts, d.heldout_texts, d.prompt_texts)
        job.parts = data.split_by_block(everything, sizes, job.config.seed, log=job.log.say)
        job.prompts = split_prompts(job)
        train, heldout, prompts = (len(part) for part in job.parts)
        job.summary["data"] = {
            "source": d.source, "split": _fingerprint(job.parts), "texts": len(everything), "train_texts": train,
            "heldout_texts": heldout, "prompt_texts": prompts,
            "prompts": len(job.prompts[0]), "heldout_prompts": len(job.prompts[1]),
            "duplicates_dropped": len(everything) - len(data.deduplicate(everything)),
        }  # fmt: skip
        job.log.say(f"{train} texts to train on, {heldout} held out, {prompts} for prompts; no block is in two parts")


def _fingerprint(parts: tuple[RatedTexts, ...]) -> str:
    """The same for the same texts in the same parts."""
    return hashlib.sha256(json.dumps([part.texts for part in parts]).encode()).hexdigest()[:16]


def load_tuned(job: Job) -> None:
    """As load, but with the model that an earlier `rlhf sft` left in the run folder, where there is one."""
    tuned = job.folder / "sft"
    load(job, str(tuned) if (tuned / "config.json").is_file() else None)


def load(job: Job, folder: str | None = None) -> None:
    """Data, model and tokenizer; the config's model unless a folder is named."""
    load_data(job)
    with job.log.stage("model"):
        if folder is not None:
            job.log.say(f"continuing from {folder}")
            job.tuned = True
        job.model_folder = folder or model_folder(job.config, job.log)
        job.tokenizer = models.load_tokenizer(job.config.tokenizer or _tokenizer_of(job.model_folder))
        dtype = getattr(torch, job.config.ppo.dtype)
        job.base = models.load_causal_lm(job.model_folder, dtype=dtype, seed=job.config.seed).to(job.device)
        job.base.requires_grad_(False)
        if len(job.tokenizer) > job.base.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"tokenizer: {len(job.tokenizer)} tokens, but the model embeds fewer; they do not belong together"
            )
        _check_depth(job)
        parameters = sum(p.numel() for p in job.base.parameters())
        job.log.say(f"{job.config.model}: {parameters / 1e6:.1f} M parameters in {job.config.ppo.dtype}")


def _check_depth(job: Job) -> None:
    """Layers that the config counts must exist."""
    c, depth = job.config, len(models.decoder_layers(job.base))
    counted = {
        "ppo.train_layers": c.ppo.train_layers, "sft.train_layers": c.sft.train_layers if c.sft.data else 0,
        "reward_model.train_layers": c.reward_model.train_layers or 0,
        "reward_model.layers": max(c.reward_model.layers or [0]),
    }  # fmt: skip
    for key, number in counted.items():
        if number > depth:
            raise ValueError(f"{key}: {number} is more than the {depth} layers of {c.model}")


def same_words(job: Job, folder: str) -> None:
    """Token ids go to a reward model as they are, so they must mean the same words there."""
    if not (Path(folder) / "tokenizer.json").is_file():
        return
    if models.load_tokenizer(folder).get_vocab() != job.tokenizer.get_vocab():
        raise ValueError(
            f"reward: {folder} has another tokenizer than the policy; wrap it in a function reward(prompts, responses)"
        )


def _tokenizer_of(model: str) -> str:
    if model.endswith(".json"):
        raise ValueError("tokenizer: a model from a .json config has none of its own; name a folder with --tokenizer")
    return model


def split_prompts(job: Job) -> tuple[list[str], list[str]]:
    """Prompts to train on, and those that only evaluation sees; none is in both."""
    d, most = job.config.data, job.config.evaluate.samples
    if d.prompts:
        lines = list(dict.fromkeys(read_prompts(d.prompts)))
        if len(lines) < 3:
            raise ValueError(f"prompts: {d.prompts} needs three different prompts at least, two of them to evaluate on")
        Random(job.config.seed).shuffle(lines)
        held_out = min(most, max(2, len(lines) // 5))
        return lines[held_out:], lines[:held_out]
    held = data.prompt_texts(job.parts[1], d.prompt_words)[:most]
    if len(held) < 2:
        raise ValueError(f"data: {len(held)} held-out texts have more than {d.prompt_words} words; prompts need two")
    return [text for text in data.prompt_texts(job.parts[2], d.prompt_words) if text not in set(held)], held


def read_prompts(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text (byte {error.start})") from error
    if not any(lines):
        raise ValueError(f"prompts: {path} holds no prompt; write one per line")
    return [line for line in lines if line]
