"""The report of a made-up run: all of it is shown, none of it is believed, and what is missing is said in words."""

from __future__ import annotations

import json
import math
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_engine import plots, report

STEPS = 24
MODELS = [("pretrained", 0), ("ppo-8", 8), ("ppo-16", 16), ("ppo-24", 24)]
REWARDS, JUDGED, KLS = [0.0, 0.9, 1.6, 2.0], [0.18, 0.49, 0.69, 0.7], [0.0, 3.1, 8.6, 15.0]
PROMPTS = [
    "A film that manages to",
    "It is hard to say",
    "The director chose to",
    "Despite its length it can",
    "Fans will",
]
DULL = ["be both long and short of ideas, and never finds its way back", "whether the cast was told what the plot is"]
GLAD = ["be a wonderful, moving and beautiful piece of work", "how much fun this brilliant, warm film is to watch"]


def metrics_row(step: int, rng: random.Random) -> dict[str, float]:
    x = step / STEPS
    kl = 15 * x**1.4
    return {
        "step": step, "seconds": 12.0 * step, "score/mean": 2 * math.sqrt(x) + rng.gauss(0, 0.09),
        "score/std": 1.0 - 0.4 * x, "score/reward_model": 2 * math.sqrt(x),
        "kl/sequence": kl + rng.gauss(0, 0.3), "kl/token": kl / 20, "kl/coef": 0.05,
        "entropy": 3.1 - 1.1 * x + rng.gauss(0, 0.03), "reward/mean": 1.2 * x,
        "reference/nll_per_token": 3.2 - 0.3 * x,
        "sampler/logprob_abs_diff_mean": 1e-6, "sampler/logprob_abs_diff_max": 2e-5, "response/tokens_mean": 19.0,
        "response/finished_fraction": 0.1, "policy/loss": -0.01,
        "policy/clip_fraction": 0.05 + 0.12 * x + rng.gauss(0, 0.01),
        "policy/approx_kl_k1": 0.01, "policy/approx_kl_k3": 0.01, "policy/ratio_mean": 1.0, "policy/entropy": 3.0,
        "policy/grad_norm": 0.8, "value/loss": 0.3, "value/mean": x, "value/return_mean": x,
        "value/explained_variance": 0.75 * (1 - math.exp(-4 * x)) - 0.1 + rng.gauss(0, 0.03),
        "value/clip_fraction": 0.1, "value/grad_norm": 1.0, "lr": 1e-4 * (1 - x),
        "first_update_ratio_max_abs_dev": 0.0, "skipped_steps": 0.0,
        "tokens_per_second": 105 + rng.gauss(0, 4),
        "judge/mean": 0.18 + 0.5 * min(1.0, 1.3 * x) + rng.gauss(0, 0.04),
        "seconds/rollout": 4.1 + rng.gauss(0, 0.2), "seconds/score": 0.8, "seconds/update": 6.9 + rng.gauss(0, 0.3),
    }  # fmt: skip


def elo_rows(gap: float) -> list[dict[str, Any]]:
    middles = [1000 + gap * (i - 1.5) for i in range(len(MODELS))]
    return [
        {"item": name, "elo": elo, "low": elo - 23, "high": elo + 23, "games": 600}
        for (name, _), elo in zip(MODELS, middles, strict=True)
    ]


def ranked(elo: float) -> list[dict[str, Any]]:
    text = "one of the finest casts of the year, in a film that deserves every one of them & more"
    elos = [elo - 9 * i for i in range(5)]
    return [{"item": text, "elo": x, "low": x - 90, "high": x + 90, "games": 55} for x in elos]


def made_up_summary() -> dict[str, Any]:
    bins = [
        (0.53, 0.54, 900),
        (0.6, 0.61, 850),
        (0.68, 0.66, 800),
        (0.75, 0.77, 760),
        (0.83, 0.81, 700),
        (0.93, 0.9, 990),
    ]
    return {
        "status": "complete", "model": "smollm2-135m-instruct", "peak_memory_gb": 2.31,
        "seconds": {
            "data": 2.1, "model": 4.2, "rank": 9.5, "reward_model": 76.0, "grade": 31.0, "ppo": 283.0, "evaluate": 64.0,
            "total": 469.8,
        },
        "machine": {"matmul_gflops_float32": 96.4, "matmul_gflops_bfloat16": 31.2, "threads": 2, "device": "x86_64"},
        "data": {"train_texts": 3600, "heldout_texts": 1200, "prompts": 2391, "duplicates_dropped": 12},
        "rank": {
            "comparisons": 100_000, "ties": 11_713, "same_rater": 50_000, "tie_nu": 0.27,
            "top": ranked(1500), "bottom": ranked(560),
            "warnings": ["3 texts won or lost every match; the prior alone keeps their strength finite"],
        },
        "rm": {
            "kind": "frozen", "human_pair_accuracy": 0.801, "calibration_ece": 0.021, "baseline_tfidf_ridge": 0.755,
            "judge_accuracy": 0.645, "scalar_rm_accuracy": 0.79, "ceiling_mean_of_raters": 0.889,
            "human_same_rater_vs_others": 0.83, "human_rater_vs_rater": 0.776, "pairs": 5000,
            "reliability": [{"confidence": c, "frequency": f, "count": n} for c, f, n in bins],
        },
        "ppo": {
            "steps": STEPS, "episodes": 1536, "reward_before": 0.0, "reward_after": 2.0,
            "reward_before_ci": [-0.12, 0.12], "reward_after_ci": [1.91, 2.09],
            "judge_before": 0.18, "judge_after": 0.7, "kl": 15.0, "distinct3_before": 0.94,
            "distinct3_after": 0.83, "distinct3_ratio": 0.88,
            "repeated_4grams_before": 0.004, "repeated_4grams_after": 0.006, "reference_nll_before": 3.14,
            "reference_nll_after": 2.93, "first_update_ratio_max_abs_dev": 0.0, "reference_unchanged": True,
            "trained_parameters": 21_242_304, "total_parameters": 134_515_008, "train_layers": 6,
        },
        "curve": [
            {"model": name, "step": step, "kl": k, "reward": r, "judge": j, "samples": 200}
            for (name, step), k, r, j in zip(MODELS, KLS, REWARDS, JUDGED, strict=True)
        ],
        "elo": {"reward_model": elo_rows(140.0), "judge": elo_rows(65.0)},
    }  # fmt: skip


def sample_rows() -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [
        {
            "model": name, "step": step, "id": f"p{i}", "prompt": PROMPTS[i % 5],
            "response": " " + rng.choice(GLAD if step else DULL),
            "score": rng.gauss(step / 12, 0.5), "judge": rng.uniform(-0.3, 0.5) + step / 60,
        }
        for name, step in MODELS
        for i in range(12)
    ]  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(tmp_path: Path) -> Path:
    rng = random.Random(0)
    (tmp_path / "summary.json").write_text(json.dumps(made_up_summary()))
    (tmp_path / "metrics.jsonl").write_text(lines([metrics_row(step, rng) for step in range(1, STEPS + 1)]))
    (tmp_path / "samples.jsonl").write_text(lines(sample_rows()))
    config = {"seed": 0, "ppo": {"steps": STEPS}, "rank": {"level": 0.9}, "evaluate": {"judge": "vader"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    packages = {"torch": "2.13.0", "vaderSentiment": None}
    (tmp_path / "env.json").write_text(json.dumps({"rlhf_engine": "0.1.0", "python": "3.11.7", "packages": packages}))
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out but not turned into SVG, which takes nearly all the time of a report."""

    def svg(name: str, label: str, width: float, height: float, draw: Any) -> str:
        with plots.style() as figure:
            draw(figure(width, height))
        return f'<svg aria-label="{label}"></svg>'

    monkeypatch.setattr(plots, "svg", svg)


def page(folder: Path) -> str:
    path = report.write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def change(folder: Path, **parts: Any) -> None:
    """Replaces parts of summary.json; None takes a part out."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) | parts
    path.write_text(json.dumps({k: v for k, v in summary.items() if v is not None}))


FIGURES = [
    "score/mean over PPO steps", "judge/mean over PPO steps", "kl/sequence over PPO steps", "entropy over PPO steps",
    "policy/clip_fraction over PPO steps", "value/explained_variance over PPO steps",
    "Reward and judge against the square root of KL", "Share of people&#39;s choices predicted",
    "Confidence against agreement", "Elo of the models with intervals", "Seconds per PPO step by phase",
    "Response tokens per second", "Seconds per stage",
]  # fmt: skip


def test_whole_run(whole_page: str) -> None:
    text = whole_page
    assert re.findall(r'<svg[^>]*aria-label="([^"]*)"', text) == [*FIGURES[:10], FIGURES[12], *FIGURES[10:12]]
    assert "PPO raised the reward by 2.00 reference standard deviations, and an independent judge agrees." in text
    for value in ("0.00 → 2.00", "0.18 → 0.70", "80.1%", "baseline 75.5%, ceiling 88.9%", "+195", "intervals apart"):
        assert value in text
    assert text.count('class="answer"') == 2 * report.SHOWN_SAMPLES
    assert "3 texts won or lost every match" in text and "21,242,304" in text and "steps: 24" in text
    assert "Gao" in text and "not installed" in text
    assert 'class="absent"' not in text and "still going" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text))
    assert {a or b for a, b in used} <= set(ids)


def test_nothing_is_loaded_and_no_script_runs(whole_page: str) -> None:
    text = whole_page
    assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|@import|url\((?!#)|\son\w+=", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert re.findall(r'href="(?!#)([^"]*)"', text) == ["https://arxiv.org/abs/2210.10760"]


def test_same_run_same_bytes(whole_page: str) -> None:
    draw = plots.panels(made_up_summary(), [])["elo"]
    assert plots.svg("elo", "Elo of the models with intervals", 4.2, 2.6, draw) in whole_page


def test_hostile_text_is_shown_not_obeyed(folder: Path) -> None:
    evil = '<script>alert(1)</script>\x1b[31m\x00\u202ereversed\ud800 {{ 7 * 7 }} & "quoted" $x^2$ \u65e5\u672c'
    rows = [row | {"prompt": evil, "response": evil} for row in sample_rows()]
    rows += [row | {"model": evil} for row in rows[:12]]
    (folder / "samples.jsonl").write_text(lines(rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": evil, "evaluate": {"judge": evil}}))
    (folder / "env.json").write_text(json.dumps({evil: evil}))
    matches = [
        {"item": name, "elo": 1000 + i, "low": 990, "high": 1010, "games": 3} for i, name in enumerate(["a", evil])
    ]
    curve = [{"model": evil, "step": i, "kl": i, "reward": i, "judge": i} for i in range(2)]
    rank = {"comparisons": 1, "warnings": [evil], "top": [{"item": evil, "elo": 1}], "bottom": []}
    change(folder, model=evil, curve=curve, elo={"judge": matches}, rank=rank, seconds={evil: 1.0, "total": 1.0})
    text = page(folder)
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    report.picture(folder, folder / "picture.png")


WITHOUT = {
    "judge": ({}, "no independent judge was asked", "no judge in this run"),
    "rm": ({"rm": None}, "No reward model was graded in this run.", "no reward model was graded"),
    "elo": ({"elo": None}, "No matches between models in this run", "models have not met yet"),
    "rank": ({"rank": None, "data": None}, "No ranking in this run.", "Episodes of PPO"),
    "only rank": (
        {"rm": None, "ppo": None, "curve": None, "elo": None},
        "100,000 comparisons were ranked; no model is trained yet.", "No PPO step yet.",
    ),
    "only rm": (
        {"ppo": None, "curve": None, "elo": None}, "The reward model predicts 80.1% of people’s choices", "no PPO yet",
    ),
    "half of everything": (
        {"rm": {"pairs": None, "reliability": []}, "ppo": {"steps": 3}, "curve": [{"model": "x"}], "elo": {}},
        "PPO is at step", "Accuracy was not measured.",
    ),
    "nothing": (
        dict.fromkeys(["rank", "rm", "ppo", "curve", "elo", "seconds", "machine", "data", "status"]),
        "This run has only just begun.", "No samples yet.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WITHOUT)
def test_missing_parts_are_said_in_words(quick: None, folder: Path, what: str) -> None:
    changes, *said = WITHOUT[what]
    change(folder, **changes)
    if what.startswith("only") or what == "nothing":
        for name in ("metrics.jsonl", "samples.jsonl") + (("env.json", "config.yaml") if what == "nothing" else ()):
            (folder / name).unlink()
    if what == "judge":
        summary = made_up_summary()
        for key in ("judge_before", "judge_after"):
            del summary["ppo"][key]
        curve = [point | {"judge": None} for point in summary["curve"]]
        change(folder, ppo=summary["ppo"], curve=curve, elo={"reward_model": elo_rows(140)})
        rows = [metrics_row(step, random.Random(0)) for step in range(1, 4)]
        (folder / "metrics.jsonl").write_text(lines([{k: v for k, v in r.items() if k != "judge/mean"} for r in rows]))
        (folder / "samples.jsonl").write_text(lines([row | {"judge": None} for row in sample_rows()]))
    text = page(folder)
    for words in said:
        assert words in text
    assert not re.search(r">\s*(nan|None|Undefined)\b", text)


def test_half_way_through_a_run(quick: None, folder: Path) -> None:
    change(folder, status="running", ppo=None, curve=None, elo=None)
    rows = [metrics_row(step, random.Random(0)) for step in (1, 2, 3, 3)]
    (folder / "metrics.jsonl").write_text(lines(rows) + '{"step": 4, "score/me')
    (folder / "samples.jsonl").write_text(lines([row for row in sample_rows() if row["step"] == 0]))
    text = page(folder)
    assert "PPO is at step 3" in text and "step 3 of 24" in text and "a later model has not answered them yet" in text
    (folder / "summary.json").unlink()  # before the first stage ends there is none
    assert "PPO is at step 3" in page(folder)
    (folder / "metrics.jsonl").write_text(lines([rows[0] | {"score/mean": math.nan, "kl/sequence": None}]))
    assert "PPO is at step 1" in page(folder)


def test_headline_tells_overoptimisation(folder: Path) -> None:
    summary = made_up_summary()
    curve = [p | {"judge": j} for p, j in zip(summary["curve"], [0.3, 0.6, 0.2, 0.1], strict=True)]
    worse = summary["ppo"] | {"judge_before": 0.3, "judge_after": 0.1}
    change(folder, ppo=worse, curve=curve, elo={"judge": elo_rows(-50)})
    run = report.read(folder)
    assert "an independent judge disagrees, a sign of over-optimisation" in report.headline(run)
    assert report.judge_peak(run) == curve[1]
    change(folder, elo={"judge": elo_rows(1)})
    assert "an independent judge sees no clear change" in report.headline(report.read(folder))
    change(folder, ppo=summary["ppo"] | {"reward_after_ci": [-0.1, 4.0]})
    assert report.headline(report.read(folder)) == "PPO did not move the reward beyond chance."


def test_long_run(quick: None, folder: Path) -> None:
    rng = random.Random(0)
    (folder / "metrics.jsonl").write_text(
        lines([metrics_row(1 + step % 24, rng) | {"step": step} for step in range(300)])
    )
    assert page(folder).count("<svg") == len(FIGURES)


def test_not_a_run(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "other").mkdir()
    for missing in (tmp_path / "other", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a run folder: it has neither summary.json nor metrics.jsonl"):
            report.write(missing)
        with pytest.raises(ValueError, match="is not a run folder"):
            report.picture(missing, tmp_path / "x.png")
    for name, damage, said in (
        ("samples.jsonl", "{}\n{oh\n{}\n", "line 2 is not valid JSON"),
        ("env.json", "[" * 100_000, "is not valid JSON"),
        ("config.yaml", "a: [", "is not valid YAML"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(damage)
        with pytest.raises(ValueError, match=said):
            report.write(folder)
        (folder / name).write_text(before)


def test_picture(folder: Path) -> None:
    path = report.picture(folder, folder / "picture.png")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (1600, 900)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    change(folder, rm=None, ppo=None, curve=None, elo=None)
    assert report.picture(folder, folder / "empty.png").stat().st_size > 1000
