"""PPO against the rewards, and the final matches between the models it went through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_engine import data, evaluation, models, ppo, ranking, rewards, rollout, runs
from rlhf_engine import reward_model as rm
from rlhf_engine.config import RewardSource
from rlhf_engine.engine import PPOEngine
from rlhf_engine.models import LanguageModel
from rlhf_engine.pipeline.job import Job, same_words
from rlhf_engine.rewards import RewardTerm
from rlhf_engine.sft import train_sft
from rlhf_engine.types import Rollout


@dataclass(slots=True)
class Contender:
    """A model in the final matches, by its answers to the held-out prompts."""

    name: str
    step: int
    rollout: Rollout
    scores: Tensor  # (n,) weighted reward
    kl: float  # nats per response, on these answers


def sft_stage(job: Job) -> None:
    with job.log.stage("sft"):
        job.pretrained_samples = sample(job, job.base, job.prompts[1], "pretrained")
        assert job.config.sft.data is not None  # the callers look
        records = data.read_sft(job.config.sft.data)
        outcome = train_sft(
            job.base, job.tokenizer, records, config=job.config.sft, seed=job.config.seed,
            progress=lambda done, total: job.log.progress("sft", done, total, "steps"),
        )  # fmt: skip
        job.base.save_pretrained(job.folder / "sft")
        job.tokenizer.save_pretrained(job.folder / "sft")
        job.summary["sft"] = {
            "records": outcome.records, "cut": outcome.cut, "target_tokens": outcome.target_tokens,
            "loss_first": outcome.losses[0], "loss_last": outcome.losses[-1],
        }  # fmt: skip
        job.tuned = True
        job.log.say(f"loss {outcome.losses[0]:.3f} -> {outcome.losses[-1]:.3f} nats per target token")
        runs.write_card(job.folder / "sft", "Supervised fine-tuned model", [f"Base: {job.config.model}."])


def sample(job: Job, model: LanguageModel, prompts: list[str], phase: str) -> Rollout:
    """Held-out samples of a model outside the engine, with the seed that every compared model gets."""
    c = job.config.ppo
    made = data.make_prompts(prompts, job.tokenizer)
    made.input_ids, made.attention_mask = made.input_ids.to(job.device), made.attention_mask.to(job.device)
    return rollout.sample(
        model, made, tokenizer=job.tokenizer, max_new_tokens=c.max_new_tokens, micro_batch_size=c.micro_batch_size,
        ignore_eos=c.ignore_eos, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
        generator=evaluation_seed(job),
        progress=lambda done, total: job.log.progress(phase, done, total),
    )  # fmt: skip


def evaluation_seed(job: Job) -> torch.Generator:
    return torch.Generator(job.device).manual_seed(job.config.seed + 2)


def reward_terms(job: Job) -> list[RewardTerm]:
    """The configured rewards as objects."""
    return [RewardTerm(source.name, _reward_source(job, source), source.weight) for source in job.config.reward]


def _reward_source(job: Job, source: RewardSource) -> Any:
    if ":" in source.source and not Path(source.source).exists():
        return evaluation.load_function(source.source, f"reward {source.name}")
    if source.source != "reward_model":
        same_words(job, source.source)
        return rm.load_reward_model(source.source, body=job.base).to(job.device)
    if job.reward_model is None:
        folder = job.folder / "reward_model"
        if not folder.is_dir():
            raise ValueError(f"reward: {folder} does not exist; run `rlhf reward` with the same output first")
        if job.summary.get("rm", {}).get("split", job.summary["data"]["split"]) != job.summary["data"]["split"]:
            raise ValueError(
                f"reward: {folder} was trained on another split of the data, so held-out prompts would not be held "
                "out; use the seed and the data settings of that stage, or train it again"
            )
        job.reward_model = rm.load_reward_model(folder, body=job.base)
    return job.reward_model.to(job.device)


def ppo_stage(job: Job) -> None:
    """Trains, samples the contenders on the way, saves, and lets them play each other."""
    prompts = job.prompts[1]
    engine = make_engine(job)
    for name in ("metrics.jsonl", "samples.jsonl"):  # of an earlier PPO in this folder, which this one replaces
        (job.folder / name).unlink(missing_ok=True)
    judge = evaluation.load_judge(job.config.evaluate.judge)
    with job.log.stage("sample before"):
        before = engine.rollout(prompts, generator=evaluation_seed(job))
        normalise(job, engine, before)
        contenders = [Contender("sft" if job.tuned else "pretrained", 0, before, _scores(engine, before), 0.0)]
        if job.pretrained_samples is not None:
            outside = job.pretrained_samples
            contenders.insert(0, Contender("pretrained", 0, outside, _scores(engine, outside), float("nan")))
    with job.log.stage("ppo"):
        contenders += _train(job, engine, prompts, judge)
    with job.log.stage("save"):  # before the evaluation, so that no trouble there can take the models along
        _save(job, engine)
    with job.log.stage("evaluate"):
        final = engine.rollout(prompts, generator=evaluation_seed(job))
        experience = engine.score(final)
        measured = ppo.experience_metrics(experience)
        contenders.append(
            Contender(
                f"ppo-{job.config.ppo.steps}", job.config.ppo.steps, final, experience.scores, measured["kl/sequence"]
            )
        )
        _record(job, engine, contenders, judge, measured)
        _write_cards(job)


def make_engine(job: Job) -> PPOEngine:
    c = job.config.ppo
    models.freeze(job.base, train_layers=c.train_layers, train_embeddings=c.train_embeddings, train_head=c.train_head)
    policy = models.copy_sharing_frozen(job.base)
    job.base.requires_grad_(False)
    return PPOEngine(
        policy, job.base, reward=reward_terms(job), tokenizer=job.tokenizer, config=c, seed=job.config.seed,
        progress=job.log.progress,
    )  # fmt: skip


def normalise(job: Job, engine: PPOEngine, before: Rollout) -> None:
    """Trained reward models score mean 0, std 1 on the reference's own samples; the constants are saved with them."""
    terms = engine.reward_terms(before)
    for term in engine.rewards:
        if term.source is job.reward_model:
            rm.normalise(job.reward_model, terms[term.name])
            job.reward_model.save(job.folder / "reward_model")


def _scores(engine: PPOEngine, batch: Rollout) -> Tensor:
    return rewards.weighted(engine.rewards, engine.reward_terms(batch)).cpu()


def _train(job: Job, engine: PPOEngine, prompts: list[str], judge: evaluation.Judge | None) -> list[Contender]:
    """All steps; returns what the policy answered at one and two thirds of the way."""
    c, found = job.config.ppo, []
    stops = {max(1, c.steps // 3), max(1, 2 * c.steps // 3)} - {c.steps}
    stream = data.prompt_batches(job.prompts[0], c.batch_size, job.config.seed)
    for step in range(1, c.steps + 1):
        job.log.progress("ppo", step - 1, c.steps, "steps")
        ids, texts = zip(*next(stream), strict=True)
        stats = engine.step(data.make_prompts(list(texts), job.tokenizer, list(ids)))
        values = stats.metrics | {f"seconds/{k}": v for k, v in stats.seconds.items()}
        if judge is not None:
            values["judge/mean"] = float(evaluation.judged(judge, stats.texts).mean())
        job.log.metrics(step, values)
        job.log.say(_step_line(step, c.steps, values))
        if step in stops:
            batch = engine.rollout(prompts, generator=evaluation_seed(job))
            experience = engine.score(batch)
            kl = ppo.experience_metrics(experience)["kl/sequence"]
            found.append(Contender(f"ppo-{step}", step, batch, experience.scores.cpu(), kl))
    return found


def _step_line(step: int, steps: int, m: dict[str, float]) -> str:
    judged = f"  judge {m['judge/mean']:+.2f}" if "judge/mean" in m else ""
    seconds = m["seconds/rollout"] + m["seconds/score"] + m["seconds/update"]
    return (
        f"step {step}/{steps}  reward {m['score/mean']:+.2f}{judged}  kl {m['kl/sequence']:.1f} nats"
        f"  entropy {m['entropy']:.2f}  clipped {m.get('policy/clip_fraction', 0):.1%}"
        f"  value fit {m['value/explained_variance']:+.2f}  {seconds:.1f} s"
    )


def _record(
    job: Job, engine: PPOEngine, contenders: list[Contender], judge: evaluation.Judge | None, measured: dict[str, float]
) -> None:
    """Fills summary["ppo"], ["curve"], ["elo"] and samples.jsonl."""
    judged = {k.name: evaluation.judged(judge, k.rollout.texts) for k in contenders} if judge else {}
    for k in contenders:
        job.log.samples(_sample_rows(k, judged.get(k.name)))
    job.summary["curve"] = [
        {
            "model": k.name, "step": k.step, "kl": k.kl, "reward": float(k.scores.mean()),
            "judge": float(judged[k.name].mean()) if judge else None, "samples": len(k.rollout),
        }
        for k in contenders
    ]  # fmt: skip
    base = [k for k in contenders if k.step == 0][-1]
    job.summary["ppo"] = _outcome(job, engine, base, contenders[-1], measured, judged)
    job.summary["elo"] = {"reward_model": _elo(job, {k.name: k.scores.cpu() for k in contenders})}
    if judge:
        job.summary["elo"]["judge"] = _elo(job, judged)
    o = job.summary["ppo"]
    job.log.say(
        f"reward {o['reward_before']:+.2f} -> {o['reward_after']:+.2f} {o['reward_unit']} at {o['kl']:.1f} nats"
    )
    for name, rows in job.summary["elo"].items():
        shown = [[row["item"], f"{row['elo']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}"] for row in rows]
        job.log.table(f"Elo of the models, judged by {name.replace('_', ' ')}", ["model", "Elo", "interval"], shown)


def _sample_rows(k: Contender, judged: Tensor | None) -> list[dict[str, Any]]:
    prompts = k.rollout.prompts
    return [
        {
            "model": k.name, "step": k.step, "id": prompts.ids[i], "prompt": prompts.texts[i],
            "response": k.rollout.texts[i],
            "score": float(k.scores[i]), "judge": None if judged is None else float(judged[i]),
        }
        for i in range(len(k.rollout))
    ]  # fmt: skip


def _outcome(
    job: Job,
    engine: PPOEngine,
    before: Contender,
    after: Contender,
    measured: dict[str, float],
    judged: dict[str, Tensor],
) -> dict[str, Any]:
    c, texts = job.config.ppo, {"before": before.rollout.texts, "after": after.rollout.texts}
    out: dict[str, Any] = {
        "steps": c.steps, "episodes": c.steps * c.batch_size, "train_layers": c.train_layers,
        "trained_parameters": sum(p.numel() for p in engine.policy_optimiser.parameters),
        "total_parameters": sum(p.numel() for p in engine.policy.parameters()),
        "kl": measured["kl/sequence"], "samples": len(after.rollout),
        # Only the reward model of this run is normalised on the reference's samples.
        "reward_unit": "reference standard deviations"
        if [(term.source is job.reward_model, term.weight) for term in engine.rewards] == [(True, 1.0)]
        else "reward units",
        "first_update_ratio_max_abs_dev": engine.first_ratio_deviation,
        "reference_unchanged": models.checksum(engine.reference) == engine.reference_checksum,
        "sampler_logprob_abs_diff_max": measured["sampler/logprob_abs_diff_max"],
        "reference_nll_before": _nll(before), "reference_nll_after": measured["reference/nll_per_token"],
    }  # fmt: skip
    if not out["reference_unchanged"]:
        raise RuntimeError(
            "the reference model changed during training; a parameter that it shares with the policy was trained"
        )
    for when, k in (("before", before), ("after", after)):
        out[f"reward_{when}"] = float(k.scores.mean())
        out[f"reward_{when}_ci"] = evaluation.mean_interval(k.scores)
        if judged:
            out[f"judge_{when}"] = float(judged[k.name].mean())
        out[f"distinct3_{when}"] = evaluation.distinct_ngrams(texts[when], 3)
        out[f"repeated_4grams_{when}"] = evaluation.repeated_ngrams(texts[when], 4)
    out["distinct3_ratio"] = (
        out["distinct3_after"] / out["distinct3_before"] if out["distinct3_before"] else float("nan")
    )
    return out


def _nll(k: Contender) -> float:
    """Nats per token under the model that sampled it, which at step 0 is the reference."""
    mask = k.rollout.response_mask
    return float(-k.rollout.sampler_logprobs.sum() / mask.sum().clamp(min=1))


def _elo(job: Job, scores: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Every model against every other on every prompt; intervals by resampling prompts, with all their matches."""
    matches = evaluation.head_to_head(scores)
    prompts = len(next(iter(scores.values())))
    fitted = ranking.fit(
        matches, l2=0.01, interval="bootstrap", level=job.config.rank.level, seed=job.config.seed,
        groups=torch.arange(prompts).repeat(len(matches) // prompts),
    )  # fmt: skip
    return ranking.table(fitted)


def _save(job: Job, engine: PPOEngine) -> None:
    engine.policy.save_pretrained(job.folder / "policy")
    models.save_critic(engine.critic, engine.reference, job.folder / "critic")
    for name in ("policy", "critic"):
        job.tokenizer.save_pretrained(job.folder / name)


def _write_cards(job: Job) -> None:
    o = job.summary["ppo"]
    base = f"{job.config.model}{', supervised fine-tuned' if job.tuned else ''}"
    facts = [
        f"Base: {base}. Data: {job.config.data.source}. {o['steps']} PPO steps, {o['episodes']} episodes, "
        f"last {o['train_layers']} layers trained ({o['trained_parameters']:,} parameters).",
        "",
        f"Reward on held-out prompts {o['reward_before']:+.2f} -> {o['reward_after']:+.2f} {o['reward_unit']}, "
        f"{o['kl']:.1f} nats from the reference, on {o['samples']} samples.",
        "",
    ]
    load = "    AutoModelFor{}.from_pretrained(folder)"
    runs.write_card(job.folder / "policy", "Policy trained by PPO", [*facts, load.format("CausalLM")])
    runs.write_card(job.folder / "critic", "Critic: value per token", [*facts, load.format("TokenClassification")])
