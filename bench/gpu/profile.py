"""Where the time goes in the case that is furthest from its limit: torch's profiler, and ncu where it works.

`python -m rlhf_engine.bench.gpu.profile FOLDER` looks for it in the results files of a folder; with `--case` it only
runs that one, for ncu.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from rlhf_engine.bench import records, suites
from rlhf_engine.bench.case import OURS
from rlhf_engine.bench.plots import roof_share
from rlhf_engine.bench.records import Record

NCU = 35  # seconds for it
LONG = 1e-4  # seconds: below it a call is all launches, and its share of a limit says nothing


def worst(folder: Path) -> Record:
    """Of ours, and long enough to have a share worth naming."""
    found = [x for path in sorted(folder.glob("*.jsonl")) for x in read(path)]
    mine = [x for x in found if x.way == OURS and x.timed and roof_share(x) is not None]
    if not mine:
        raise SystemExit(f"no results of ours in {folder}: run the benchmarks first")
    return min([x for x in mine if (x.seconds or 0) > LONG] or mine, key=lambda x: roof_share(x) or 0)


def read(path: Path) -> list[Record]:
    """Nothing, where a file has no results: other steps write there too."""
    try:
        return records.read(path).records
    except ValueError:
        return []


def work(suite: str, name: str, device: torch.device, quick: bool) -> None:
    case = suites.find(suite, name, device, quick)
    tensors = case.make(torch.Generator(device).manual_seed(0))
    run = next(way.run for way in case.ways if way.name == OURS)
    for _ in range(3):
        run(tensors)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            run(tensors)
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", nargs=2, metavar=("SUITE", "NAME"))
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if asked.case:
        suite, name = asked.case
        return work(suite, name, device, device.type == "cpu")
    record = worst(asked.folder)
    work(record.suite, record.name, device, device.type == "cpu")
    told = f"furthest from its limit: {record.name}, at {roof_share(record) or 0:.0%}"
    if device.type == "cuda" and shutil.which("ncu"):
        command = ["ncu", "--clock-control", "none", "--launch-skip", "20", "--launch-count", "6", "--set", "basic"]
        again = [
            sys.executable,
            "-m",
            "rlhf_engine.bench.gpu.profile",
            str(asked.folder),
            "--case",
            record.suite,
            record.name,
        ]
        try:
            done = subprocess.run([*command, *again], capture_output=True, text=True, timeout=NCU)
            print(done.stdout[-12_000:], done.stderr[-2000:])
            told += "" if done.returncode == 0 else f"; ncu ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            told += f"; ncu was not done after {NCU} s"
    elif device.type == "cuda":
        told += "; ncu is not here"
    print(told)


if __name__ == "__main__":
    main()
