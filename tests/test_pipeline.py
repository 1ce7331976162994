"""The tiny pipeline, from the command line to folders that transformers loads: minutes of the demo in seconds."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from rlhf_engine import cli, report, runs
from rlhf_engine import reward_model as rm
from rlhf_engine.config import DataConfig, EvalConfig, RunConfig
from rlhf_engine.pipeline.job import split_prompts
from rlhf_engine.types import RatedTexts

ROOT = Path(__file__).parents[1]
FILES = {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "summary.json", "ranking.json", "report.html"}
FOLDERS = {"reward_model", "policy", "critic"}
QUICK = ["--evaluate.judge", "none", "--evaluate.samples", "8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run, as a user starts it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_engine", "run", "--preset", "tiny", "--output", str(folder)],
        cwd=folder.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr and "step 3/3" in done.stderr
    return folder


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside this process need not time the machine; the whole run above does."""
    monkeypatch.setattr(runs, "matmul_gflops", lambda *_: 1.0)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny(command: str, folder: Path, *words: str) -> int:
    return cli.main([command, "--preset", "tiny", "--output", str(folder), *words])


def test_everything_is_there(finished: Path) -> None:
    present = {p.name for p in finished.iterdir()}
    assert FILES | FOLDERS <= present and "error.txt" not in present
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"] == "tiny" and config["ppo"]["steps"] == 3
    assert "<svg" in (finished / "report.html").read_text()
    assert len(json.loads((finished / "ranking.json").read_text())) == 240
    for name in ("policy", "critic"):
        assert "PPO steps" in (finished / name / "README.md").read_text()


def test_summary_keys_types_and_exactness(finished: Path) -> None:
    s = read(finished)
    assert s["status"] == "complete" and s["data"]["train_texts"] == 240
    ppo, reward_model = s["ppo"], s["rm"]
    assert ppo["first_update_ratio_max_abs_dev"] == 0 and ppo["reference_unchanged"] is True
    assert ppo["sampler_logprob_abs_diff_max"] < 1e-3
    assert ppo["episodes"] == 48 and ppo["samples"] == 32
    for key in ("kl", "reward_before", "reward_after", "judge_before", "judge_after", "distinct3_ratio",
                "repeated_4grams_after", "reference_nll_before", "reference_nll_after"):  # fmt: skip
        assert isinstance(ppo[key], float) and math.isfinite(ppo[key]), key
    assert ppo["reward_before"] == pytest.approx(0, abs=1e-4), "normalised on these very samples"
    low, high = ppo["reward_after_ci"]
    assert low < ppo["reward_after"] < high
    for key in ("human_pair_accuracy", "baseline_tfidf_ridge", "scalar_rm_accuracy", "ceiling_mean_of_raters"):
        assert 0.6 < reward_model[key] <= 1, key
    assert 0 <= reward_model["calibration_ece"] < 0.2 and reward_model["pairs"] == 500
    assert s["rank"]["comparisons"] == 4000 and s["rank"]["same_rater"] == 2000
    assert set(s["elo"]) == {"reward_model", "judge"}
    for table in s["elo"].values():
        assert {row["item"] for row in table} == {"pretrained", "ppo-1", "ppo-2", "ppo-3"}
        assert all(row["low"] <= row["elo"] <= row["high"] and row["games"] == 96 for row in table)
    assert [point["model"] for point in s["curve"]] == ["pretrained", "ppo-1", "ppo-2", "ppo-3"]
    parts = [v for k, v in s["seconds"].items() if k != "total"]
    assert s["seconds"]["total"] == pytest.approx(sum(parts)) and s["peak_memory_gb"] > 0


def test_logs_hold_every_step_and_every_sample(finished: Path) -> None:
    metrics = rows(finished / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert row["first_update_ratio_max_abs_dev"] == 0 and row["skipped_steps"] == 0
        assert row["score/mean"] == pytest.approx(row["score/reward_model"])
        assert {"kl/sequence", "judge/mean", "seconds/rollout", "policy/clip_fraction", "value/loss"} <= set(row)
    samples = rows(finished / "samples.jsonl")
    assert len(samples) == 4 * 32
    prompts = {name: [s["prompt"] for s in samples if s["model"] == name] for name in ("pretrained", "ppo-3")}
    assert prompts["pretrained"] == prompts["ppo-3"], "all models answer the same prompts"


def test_the_folders_are_transformers_own(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "policy")
    policy = AutoModelForCausalLM.from_pretrained(finished / "policy")
    critic = AutoModelForTokenClassification.from_pretrained(finished / "critic")
    base = AutoModelForCausalLM.from_pretrained(finished / "tiny_model")
    tokens = tokenizer("the old film", return_tensors="pt")
    with torch.no_grad():
        assert policy(**tokens).logits.shape[-1] == len(tokenizer)
        assert critic(**tokens).logits.shape == (1, tokens.input_ids.shape[1], 1)
    moved = {n for (n, p), q in zip(policy.named_parameters(), base.parameters(), strict=True) if not torch.equal(p, q)}
    assert moved and all("layers.1." in n or n == "model.norm.weight" for n in moved)
    model = rm.load_reward_model(finished / "reward_model", body=base)
    assert float(model.score_std) not in (0.0, 1.0), "the normalisation was saved with it"
    texts = ["the old film is superb and brilliant", "the old film is awful and dreadful"]
    good, bad = rm.score_texts(model, texts, tokenizer, max_tokens=128, batch_size=8).tolist()
    assert good > bad


def test_generate_prints_and_writes(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["generate", "--model", str(finished / "policy"), "--max_new_tokens", "4", "--samples", "2"]
    assert cli.main([*words, "--prompt", "the old film", "--prompt", "this"]) == 0
    lines = [line for line in capsys.readouterr().out.split("\n\n") if line.strip()]
    assert [line.lstrip("\n").partition("|")[0] for line in lines] == ["the old film"] * 2 + ["this"] * 2
    assert cli.main([*words, "--prompt", "this", "--output", str(tmp_path / "a.jsonl"), "--top_k", "1"]) == 0
    first, second = rows(tmp_path / "a.jsonl")
    assert set(first) == {"prompt", "response"} and first == second and capsys.readouterr().out == ""


def test_stages_one_after_the_other_in_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "steps"
    monkeypatch.setattr(report, "write", lambda path: path)  # of no concern before the last stage, and slow
    assert tiny("ppo", folder) == 2
    assert "run `rlhf reward` with the same output first" in capsys.readouterr().err
    assert tiny("rank", folder) == 0
    assert set(read(folder)) >= {"rank", "data"} and not {"rm", "ppo"} & set(read(folder))
    assert (folder / "ranking.json").is_file() and not (folder / "reward_model").exists()
    assert tiny("reward", folder, *QUICK) == 0
    assert "rank" in read(folder) and "judge_accuracy" not in read(folder)["rm"]
    monkeypatch.undo()
    assert tiny("ppo", folder, *QUICK, "--ppo.steps", "1") == 0
    s = read(folder)
    assert {"rank", "rm", "ppo", "elo", "curve"} <= set(s) and set(s["elo"]) == {"reward_model"}
    assert [row["item"] for row in s["elo"]["reward_model"]] and s["ppo"]["steps"] == 1
    assert {p.name for p in folder.iterdir()} >= FILES | FOLDERS
    assert {"rank", "reward_model", "ppo", "other"} <= set(s["seconds"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["ppo"]["steps"] == 1
    earlier = [yaml.safe_load(path.read_text())["ppo"]["steps"] for path in folder.glob("config.*.yaml")]
    assert earlier and set(earlier) == {3}, "the settings of earlier stages are kept"


def test_own_prompts_are_split_before_anything_is_trained(tmp_path: Path) -> None:
    prompts = [f"{word} {noun}" for word in ("a", "the", "this") for noun in ("film", "story", "cast", "plot")]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts * 2) + "\n")
    job = SimpleNamespace(config=RunConfig(data=DataConfig(prompts=str(path))))
    train, held = split_prompts(job)
    assert sorted(train + held) == sorted(prompts) and len(held) == 2
    job.config = RunConfig(data=DataConfig(prompts=str(path)), evaluate=EvalConfig(samples=1))
    assert len(split_prompts(job)[1]) == 1
    path.write_text("one\ntwo\none\n")
    with pytest.raises(ValueError, match="needs three different prompts at least"):
        split_prompts(job)


def test_no_prompt_is_both_trained_and_evaluated_on(tmp_path: Path) -> None:
    texts = [f"a film with a {word} ending" for word in ("good", "bad", "sad")]
    part = RatedTexts([*texts, "one of the best this year by far"], [[1.0]] * 4, [0] * 4)
    train, held = split_prompts(SimpleNamespace(config=RunConfig(), parts=(None, part.select([0, 1]), part)))
    assert held == ["a film with a good", "a film with a bad"]
    assert train == ["a film with a sad", "one of the best this"]


def test_a_used_folder_is_refused_and_replaced_only_when_asked(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run starts from supervised fine-tuning and adds a reward of the user's own."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert tiny("run", folder) == 2
    assert "is not empty; use --overwrite true" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    (tmp_path / "politeness.py").write_text(
        "def shortness(prompts, responses):\n    assert len(prompts) == len(responses)\n"
        "    return [-float(len(r)) for r in responses]\n"
    )
    (tmp_path / "sft.jsonl").write_text('{"prompt": "the film ", "completion": "is superb"}\n' * 8)
    reward = [
        {"name": "learned", "source": "reward_model", "weight": 1.0},
        {"name": "short", "source": "politeness:shortness", "weight": 0.5},
    ]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"reward": reward, "sft": {"data": "sft.jsonl", "lr": 1e-3}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert tiny("run", folder, "--overwrite", "true", "--config", "own.yaml", "--ppo.steps", "2", *QUICK) == 0
    s, metrics = read(folder), rows(folder / "metrics.jsonl")
    assert len(metrics) == 2, "the earlier run's log is gone"
    for row in metrics:
        assert row["score/mean"] == pytest.approx(row["score/learned"] + 0.5 * row["score/short"], abs=1e-5)
        assert row["score/short"] < 0 and row["first_update_ratio_max_abs_dev"] == 0
    assert s["sft"]["records"] == 8 and (folder / "sft" / "config.json").is_file()
    assert {row["item"] for row in s["elo"]["reward_model"]} == {"pretrained", "sft", "ppo-1", "ppo-2"}
    assert s["ppo"]["reference_unchanged"] is True


def test_ppo_refuses_a_reward_model_of_another_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("reward", tmp_path / "x", *QUICK) == 0
    capsys.readouterr()
    assert tiny("ppo", tmp_path / "x", "--seed", "1", *QUICK) == 2
    assert "was trained on another split of the data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--ppo.train_layers", "99"], "ppo.train_layers: 99 is more than the 2 layers"),
        (["--reward_model.layers", "[5]"], "reward_model.layers: 5 is more than the 2 layers"),
        (["--evaluate.judge", "nowhere:f"], "evaluate.judge: cannot load"),
        (["--reward", '[{"name": "x", "source": "nowhere:f"}]'], "reward x: cannot load"),
        (["--evaluate.samples", "1"], "evaluate.samples must be at least 2"),
        (["--threads", "100000"], "threads must lie between 0 and 1024"),
    ],
)
def test_what_can_be_known_at_once_is_said_at_once(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny("run", tmp_path / "x", *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and "rank" not in error


def test_models_are_saved_before_anything_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moody.py").write_text("calls = []\n\ndef judge(texts):\n    calls.append(1)\n"
                                       "    return [1.0] * len(texts) if len(calls) < 5 else [1.0]\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert tiny("run", tmp_path / "x", "--evaluate.judge", "moody:judge", "--evaluate.samples", "8") == 2
    assert "evaluate.judge: returned (1,) values for 8 texts" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "policy")
