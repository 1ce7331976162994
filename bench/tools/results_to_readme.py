"""Puts the newest results of every machine into README.md, and their pictures into docs/: run it after a benchmark.

The tables between the two markers are written by this script alone, from bench/results/. What was not measured is not
there, and a kind of machine without results is said to have none.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_engine.bench import plots, records, table
from rlhf_engine.bench.case import OURS
from rlhf_engine.bench.records import UNCHECKED, Record, Run

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- benchmark figures: bench/tools/results_to_readme.py -->", "<!-- end of benchmark figures -->"
NO_GPU = "On a GPU: not yet measured. `make gpu` checks and measures everything there in nine minutes."
PLAIN = "torch eager"


def section(run: Run) -> str:
    """A table of ours at every size, and how many times as long others take."""
    rates = run.environment["matmul_rates"]
    fastest = max(rates, key=lambda name: rates[name])
    versions = run.environment["versions"]
    about = (
        f"{run.title}: torch {versions['torch']}, copies {run.environment['copy_rate'] / 1e9:.0f} GB/s, {fastest} "
        f"products {rates[fastest] / 1e12:.3g} TFLOP/s. Others take so many times as long, in the same run:"
    )
    lines = [
        about,
        "",
        "| op | size | ours | of its limit | plain PyTorch | others |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in run.records:
        if record.way == OURS and record.timed and record.suite != "sweep":
            lines.append(row(record, [x for x in run.records if x.name == record.name and x.timed]))
    return "\n".join(lines)


def row(ours: Record, ways: list[Record]) -> str:
    times = {x.way: x.times_ours_device if x.device else x.times_ours for x in ways if x.verdict != UNCHECKED}
    others = ", ".join(
        f"{way} {factor:.3g}" for way, factor in times.items() if factor and way != PLAIN and not way.startswith(OURS)
    )
    plain = times.get(PLAIN)
    share = plots.roof_share(ours)
    sizes = " x ".join(f"{count:,}" for count in ours.dims.values())
    cells = [
        f"`{ours.op}`", f"{ours.shape}: {sizes}, {ours.dtype}", table.duration(ours.seconds),
        "" if share is None else f"{share:.0%}", f"{plain:.3g}" if plain else "", others,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    runs = records.latest()
    parts = [] if any(run.environment["device"] == "cuda" for run in runs) else [NO_GPU]
    for run in sorted(runs, key=lambda run: run.environment["device"], reverse=True):
        folder = ROOT / "docs/bench" / run.environment["folder"]
        plots.draw(run, folder)
        parts.append(section(run))
        parts += [f"![{path.stem}]({path.relative_to(ROOT)})" for path in sorted(folder.glob("*.png"))]
    readme = (ROOT / "README.md").read_text()
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(readme):
        raise SystemExit(f"README.md has no markers {START} and {END}")
    text = "\n\n".join(parts)
    (ROOT / "README.md").write_text(pattern.sub(lambda _: f"{START}\n{text}\n{END}", readme))


if __name__ == "__main__":
    main()
