"""report.html and the README's picture, from the files of a run folder alone: no model, no torch, whenever.

What a run does not have (no judge, no reward model, a single stage, a run half-way) is left out in words.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_engine import plots
from rlhf_engine.plots import Row, duration, finite, rows_of

SHOWN_SAMPLES = 10
# Kept in text: everything but control characters, halves of surrogate pairs and marks that reorder what is read.
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(slots=True)
class Run:
    """A run folder as read; every part may be empty."""

    summary: Row
    metrics: list[Row]
    samples: list[Row]
    environment: Row
    config: Row
    config_text: str

    def part(self, name: str) -> Row:
        found = self.summary.get(name)
        return found if isinstance(found, dict) else {}


def write(folder: str | Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Raises:
        ValueError: the folder is no run, or a file of it is damaged.
    """
    from jinja2 import Environment, FileSystemLoader

    run = read(folder)
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"number": number, "percent": percent, "duration": duration}
    path = Path(folder) / "report.html"
    path.write_text(pages.get_template("report.html.j2").render(content(run)), encoding="utf-8")
    return path


def read(folder: str | Path) -> Run:
    import yaml

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("summary.json", "metrics.jsonl")):
        raise ValueError(f"{folder} is not a run folder: it has neither summary.json nor metrics.jsonl")
    config_text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        raise ValueError(f"{folder / 'config.yaml'} is not valid YAML") from None
    metrics = _lines(folder / "metrics.jsonl")
    by_step = {row["step"]: row for row in metrics if "step" in row}  # a step done twice counts as it was done last
    return Run(
        summary=_object(folder / "summary.json"),
        metrics=list(by_step.values()),
        samples=_lines(folder / "samples.jsonl"),
        environment=_object(folder / "env.json"),
        config=clean(config) if isinstance(config, dict) else {},
        config_text=clean(config_text),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(path: Path) -> Row:
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON") from None
    return clean(found) if isinstance(found, dict) else {}


def _lines(path: Path) -> list[Row]:
    """Records of a JSONL file; half a last line belongs to a run that is writing it right now."""
    rows: list[Row] = []
    lines = _text(path).split("\n")
    for i, line in enumerate(lines):
        try:
            row = json.loads(line or "{}")
        except (ValueError, RecursionError):
            if i == len(lines) - 1:
                break
            raise ValueError(f"{path}: line {i + 1} is not valid JSON") from None
        rows += [clean(row)] if row and isinstance(row, dict) else []
    return rows


def clean(value: Any) -> Any:
    """The same structure without characters that control a terminal or a reader instead of being read."""
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    if not isinstance(value, str):
        return value
    return "".join(c for c in value if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in BIDI))


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """A number for people: long ones in thousands, a true minus, a dash for what is not known."""
    x = round(finite(value), digits) + 0.0  # + 0.0 turns -0 into 0
    if math.isnan(x):
        return "–"
    return f"{x:{'+' if sign else ''}{',' if abs(x) >= 10_000 else ''}.{digits}f}".replace("-", "−")


def content(run: Run) -> Row:
    """All that the template shows."""
    first, last = ends(run)
    elo = elo_table(run)
    config = {name: part if isinstance(part, dict) else {} for name, part in run.config.items()}
    return {
        "headline": headline(run),
        "summary": run.summary,
        "running": run.summary.get("status") != "complete",
        "step": run.metrics[-1]["step"] if run.metrics else 0,
        "steps": config.get("ppo", {}).get("steps"),
        "level": config.get("rank", {}).get("level", 0.9),
        "judge": config.get("evaluate", {}).get("judge", ""),
        **{name: run.part(name) for name in ("data", "rank", "rm", "ppo")},
        "reward": before_after(run, "reward"),
        "judged": before_after(run, "judge"),
        "kl": run.part("ppo").get("kl", run.metrics[-1].get("kl/sequence") if run.metrics else None),
        "gains": {name: elo_gain(run, name) for name in ("judge", "reward_model")},
        "first": first,
        "last": last,
        "pairs": sample_pairs(run, first, last),
        "curves": plots.curves(run.metrics),
        "figures": plots.figures(run.summary, run.metrics),
        "peak": judge_peak(run),
        "checks": checks(run),
        "elo": elo,
        "judges": [name for name in ("judge", "reward_model") if any(row[name] for row in elo)],
        "machine": machine_facts(run),
        "config_text": run.config_text,
    }


def before_after(run: Run, name: str) -> tuple[float, float]:
    """On held-out prompts once PPO is over; until then, the first and last training step."""
    ppo, key = run.part("ppo"), {"reward": "score/mean", "judge": "judge/mean"}[name]
    if f"{name}_after" in ppo:
        return finite(ppo.get(f"{name}_before")), finite(ppo[f"{name}_after"])
    values = [finite(row.get(key)) for row in run.metrics]
    return (values[0], values[-1]) if values else (math.nan, math.nan)


def elo_gain(run: Run, judge: str) -> tuple[float, bool] | None:
    """(Elo of the last model over the first, whether their intervals are apart upwards or downwards)."""
    rows = {row.get("item"): row for row in rows_of(run.summary, "elo", judge)}
    first, last = ends(run)
    if first == last or first not in rows or last not in rows:
        return None
    a, b = rows[first], rows[last]
    apart = finite(b.get("low")) > finite(a.get("high")) or finite(b.get("high")) < finite(a.get("low"))
    return finite(b.get("elo")) - finite(a.get("elo")), apart


def ends(run: Run) -> tuple[str, str]:
    """Names of the first and the last model: of the curve, else of the samples."""
    points = rows_of(run.summary, "curve") or run.samples
    names = [str(p["model"]) for p in sorted(points, key=lambda p: finite(p.get("step", 0))) if "model" in p]
    return (names[0], names[-1]) if names else ("", "")


def headline(run: Run) -> str:
    """The run in one sentence."""
    ppo, (before, after) = run.part("ppo"), before_after(run, "reward")
    if math.isnan(after - before) or "reward_after" not in ppo:
        return _headline_without_ppo(run, number(before), number(after))
    low, high = ppo.get("reward_before_ci"), ppo.get("reward_after_ci")
    if low and high and finite(high[0]) <= finite(low[1]) and finite(high[1]) >= finite(low[0]):
        return "PPO did not move the reward beyond chance."
    verb = "raised" if after > before else "lowered"
    unit = ppo.get("reward_unit", "reference standard deviations")
    said = f"PPO {verb} the reward by {number(abs(after - before))} {unit}"
    judge_before, judge_after = before_after(run, "judge")
    if math.isnan(judge_after - judge_before):
        return f"{said}; no independent judge was asked."
    gain = elo_gain(run, "judge")
    if gain and not gain[1]:
        return f"{said}; an independent judge sees no clear change."
    if (judge_after > judge_before) == (after > before):
        return f"{said}, and an independent judge agrees."
    return f"{said}, but an independent judge disagrees, a sign of over-optimisation."


def _headline_without_ppo(run: Run, before: str, after: str) -> str:
    if run.metrics:
        return f"PPO is at step {run.metrics[-1]['step']}; the reward went from {before} to {after} so far."
    if "human_pair_accuracy" in run.part("rm"):
        accuracy = percent(run.part("rm")["human_pair_accuracy"])
        return f"The reward model predicts {accuracy} of people’s choices; PPO has not run yet."
    if run.part("rank"):
        return f"{number(run.part('rank').get('comparisons'), 0)} comparisons were ranked; no model is trained yet."
    return "This run has only just begun."


def percent(share: Any) -> str:
    return "–" if math.isnan(finite(share)) else f"{number(100 * finite(share), 1)}%"


def sample_pairs(run: Run, first: str, last: str) -> list[Row]:
    """The first prompts in file order, with what the first and the last model answered."""
    by_id: dict[Any, Row] = {}
    for row in run.samples:
        if row.get("model") in (first, last):
            by_id.setdefault(row.get("id"), {"prompt": row.get("prompt", "")})[row["model"]] = row
    return [pair for pair in by_id.values() if first in pair and last in pair][:SHOWN_SAMPLES]


def judge_peak(run: Run) -> Row | None:
    """The model that the judge liked best, where that is not the last one."""
    points = [p for p in rows_of(run.summary, "curve") if not math.isnan(finite(p.get("judge")))]
    best = max(points, key=lambda p: finite(p["judge"]), default=None)
    return best if best and best is not points[-1] else None


def picture(folder: str | Path, out_png: str | Path) -> Path:
    """One PNG of 1600 x 900 pixels for a README: training, over-optimisation, Elo and the reward model's accuracy.

    Raises:
        ValueError: as `write`.
    """
    run = read(folder)
    return plots.mosaic(Path(out_png), headline(run), run.summary, run.metrics)


def elo_table(run: Run) -> list[Row]:
    """One row per model, best first by the judge (else by the reward model); None where it did not play."""
    by = {
        name: {r["item"]: r for r in rows_of(run.summary, "elo", name) if "item" in r}
        for name in ("judge", "reward_model")
    }
    main = by["judge"] or by["reward_model"]
    items = sorted({**main, **by["reward_model"]}, key=lambda item: -finite(main.get(item, {}).get("elo", 0)))
    return [{"item": item, **{name: rows.get(item) for name, rows in by.items()}} for item in items]


def checks(run: Run) -> list[tuple[str, str, str]]:
    """What was measured, its value, what it should be."""
    p, out = run.part("ppo"), []
    over_steps = [
        ("first_update_ratio_max_abs_dev", "Probability ratio before the first update, largest distance from 1", "0"),
        ("sampler/logprob_abs_diff_max", "Log-probs of sampler and trainer, largest difference", "rounding error"),
        ("skipped_steps", "Updates skipped for gradients that were not finite", "0"),
    ]
    for key, label, wanted in over_steps:
        if values := [finite(row[key]) for row in run.metrics if key in row]:
            value = sum(values) if key == "skipped_steps" else max(values)
            out.append((label, f"{value:.1e}" if 0 < value < 1 else number(value, 0), wanted))
    if "reference_unchanged" in p:
        out.append(("Reference unchanged, by checksum", "yes" if p["reference_unchanged"] else "NO", "yes"))
    pairs = [
        ("distinct3", "Different word triples, share", 3, "not far below its start"),
        ("repeated_4grams", "Word quadruples repeated within a response, share", 3, "not far above its start"),
        ("reference_nll", "Nats per token under the reference", 2, "not far above its start; text stays fluent"),
    ]
    for key, label, digits, wanted in pairs:
        if f"{key}_after" in p:
            change = " → ".join(number(p.get(f"{key}_{when}"), digits) for when in ("before", "after"))
            out.append((label, change, wanted))
    return out


def machine_facts(run: Run) -> list[tuple[str, Any]]:
    """Machine, time and versions; nested values by their last name."""
    rows: list[tuple[str, Any]] = [("Model", run.summary.get("model"))]
    if total := run.part("seconds").get("total"):
        rows.append(("Time in all", duration(total)))
    if peak := run.summary.get("peak_memory_gb"):
        rows.append(("Peak memory", f"{number(peak)} GB"))
    for name, value in run.part("machine").items():
        if name.startswith("matmul_gflops_"):
            name, value = f"matrix product, {name[14:]}", f"{number(value, 0)} GFLOP/s"
        rows.append((name.capitalize(), value))
    for name, value in run.environment.items():
        if name == "packages" and isinstance(value, dict):
            rows += [(package, version or "not installed") for package, version in value.items()]
        elif name != "machine":
            rows.append((name, value))
    return rows
