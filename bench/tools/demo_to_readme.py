"""Puts the figures and the picture of a finished run into README.md: `python bench/tools/demo_to_readme.py runs/demo`.

The table between the two markers is written by this script alone, from summary.json, which it keeps in bench/results/.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from rlhf_engine import report

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- demo figures: bench/tools/demo_to_readme.py -->", "<!-- end of demo figures -->"


def rows(s: dict[str, Any]) -> list[tuple[str, str]]:
    rm, ppo, elo = s["rm"], s["ppo"], s["elo"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in s["seconds"].items() if name != "total" and value >= 1)
    matches = [f"{judge.replace('_', ' ')}: {_elo(table)}" for judge, table in elo.items()]
    human = (
        f"{rm['human_pair_accuracy']:.3f} (tf-idf and ridge {rm['baseline_tfidf_ridge']:.3f}, VADER "
        f"{rm['judge_accuracy']:.3f}, the other raters' mean {rm['ceiling_mean_of_raters']:.3f})"
    )
    gain = f"{round(ppo['reward_before'], 2) + 0.0:+.2f} to {ppo['reward_after']:+.2f} {ppo['reward_unit']}"
    variety = f"{ppo['distinct3_ratio']:.2f} of the reference's, {ppo['repeated_4grams_after']:.1%}"
    nll = f"{ppo['reference_nll_before']:.2f} to {ppo['reference_nll_after']:.2f} nats a token"
    return [
        ("reward model on human choices", human),
        ("the same head on the raters' scalars", f"{rm['scalar_rm_accuracy']:.3f}"),
        ("its calibration error", f"{rm['calibration_ece']:.3f}"),
        ("one rater with the others", f"{rm['human_same_rater_vs_others']:.3f}"),
        ("rater with rater", f"{rm['human_rater_vs_rater']:.3f}"),
        ("reward on held-out prompts", gain),
        ("independent judge (VADER, continuation alone)", f"{ppo['judge_before']:+.2f} to {ppo['judge_after']:+.2f}"),
        ("distance from the reference", f"{ppo['kl']:.1f} nats a response"),
        ("distinct 3-grams, repeated 4-grams", variety),
        ("reference's NLL of the samples", nll),
        ("first ratio of every step, furthest from 1", f"{ppo['first_update_ratio_max_abs_dev']:g}"),
        ("Elo, first and final model", "; ".join(matches)),
        ("seconds", f"{s['seconds']['total']:.0f} ({seconds}), {s['peak_memory_gb']:.1f} GB at most"),
    ]


def _elo(table: list[dict[str, Any]]) -> str:
    by_step = {row["item"]: row for row in table}
    last = max((name for name in by_step if name.startswith("ppo-")), key=lambda name: int(name.removeprefix("ppo-")))
    return ", ".join(
        f"{by_step[n]['elo']:.0f} ({by_step[n]['low']:.0f} to {by_step[n]['high']:.0f})" for n in ("pretrained", last)
    )


def main(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    machine = summary["machine"]
    table = "\n".join(["| figure | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows(summary))])
    about = f"One run on {machine['threads']} CPU threads at {machine['matmul_gflops_float32']:.0f} GFLOP/s in float32:"
    readme = (ROOT / "README.md").read_text()
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"README.md has no markers {START} and {END}")
    (ROOT / "README.md").write_text(pattern.sub(lambda _: f"{START}\n{about}\n\n{table}\n{END}", readme))
    (ROOT / "docs").mkdir(exist_ok=True)
    report.picture(run, ROOT / "docs" / "demo.png")
    (ROOT / "bench" / "results").mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "summary.json", ROOT / "bench" / "results" / "demo.json")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/tools/demo_to_readme.py RUN_FOLDER")
    main(Path(sys.argv[1]))
