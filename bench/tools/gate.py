"""Has the CPU path become slower? `make gate` asks in two ways; `bench/tools/gate.py --write` renews the answers.

Ratios: how many times as long plain PyTorch takes for the same answer, in the same process, in turns, on one thread and
with AVX2 whatever the processor has; of the processor's time, the least of several turns. Committed are .7 of the
median of five runs: under that, something is a third slower than it was. A ratio under its floor is measured once more,
with more patience, before it counts.

Instructions: what callgrind counts in the C++ of each op, which repeats to the digit under one compiler. More than 2%
above the committed count fails, and so does less than 2% below: the floor is then out of date.

Floors live in bench/tools/floors.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLOORS = Path(__file__).with_name("floors.json")
MARGIN, TOLERANCE, RUNS = 0.7, 0.02, 5
OPS = ("gae", "kl_gae", "whiten", "kl_estimate", "ppo_loss", "value_loss", "head_fold", "head_gradient")
# setup.py's flags for these sources; a test holds them to it.
FLAGS = "-O3 -std=c++20 -ffp-contract=off -fno-trapping-math -fno-math-errno".split()
SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "1"}


def ratios(seconds: float, only: Iterable[str] | None = None) -> dict[str, float]:
    """Case -> times ours, of plain PyTorch."""
    import torch

    from rlhf_engine.bench import head_cases, machine, ops_cases, suite
    from rlhf_engine.bench.case import OURS

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    cases = [ops_cases.loss_side(op, "gate", 64, 512, cpu) for op in ops_cases.BYTES]
    cases += ops_cases.logprobs("gate", 16, 49_152, torch.float32, cpu)
    cases += [head_cases.head(op, "gate", 64, 256, 16_384, torch.float32, cpu) for op in head_cases.NHV]
    here = machine.Machine(cpu, "gate", 2**34, 2**20, 1.0, {})  # of small caches: few sets of inputs
    found = {}
    for case in cases:
        if only is None or case.name in only:
            sets, ways = suite.input_sets(case, here), {way.name: way for way in case.ways}
            truth = case.truth(sets[0])
            for way in (ways[OURS], ways["torch eager"]):
                record = suite.record_of(case, way, len(sets))
                if not suite.judge(case, way, sets[0], truth, cpu, record):
                    raise SystemExit(f"{case.name}, {way.name}: {record.verdict}")
            works = [functools.partial(each, ways[name], sets) for name in (OURS, "torch eager")]
            ours, theirs = processor_times(works, seconds)
            found[case.name] = theirs / ours
    return found


def each(way: Any, sets: list[Any]) -> None:
    for tensors in sets:
        way.run(tensors)


def processor_times(works: list[Callable[[], None]], seconds: float) -> list[float]:
    """The least of several turns: of the processor's time, for what else runs there only ever adds."""
    least = [math.inf] * len(works)
    start = time.perf_counter()
    turn = 0
    while turn < 5 or time.perf_counter() - start < seconds:
        for number, work in enumerate(works):
            before = time.process_time()
            work()
            least[number] = min(least[number], time.process_time() - before)
        turn += 1
    return least


def below(found: dict[str, float], floors: dict[str, float]) -> dict[str, str]:
    """Case -> what is wrong with it."""
    missing = {name: "is not measured any more" for name in floors.keys() - found.keys()}
    new = {name: "has no floor: renew them" for name in found.keys() - floors.keys()}
    slow = {
        name: f"plain PyTorch takes {found[name]:.2f} times as long, the floor is {floor:.2f}"
        for name, floor in floors.items()
        if name in found and found[name] < floor
    }
    return missing | new | slow


def compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def instructions(folder: Path, csrc: Path = ROOT / "csrc") -> dict[str, int]:
    """Op -> instructions, by callgrind."""
    sources = [csrc / name for name in ("gae_cpu.cpp", "whiten_cpu.cpp", "losses_cpu.cpp", "head_cpu.cpp")]
    driver = folder / "driver"
    source = Path(__file__).with_name("instructions.cpp")
    subprocess.run(["g++", *FLAGS, f"-I{csrc}", str(source), *map(str, sources), "-o", str(driver)], check=True)
    return {op: _collected(driver, op) for op in OPS}


def _collected(driver: Path, op: str) -> int:
    words = [
        "valgrind",
        "--tool=callgrind",
        "--toggle-collect=run_op",
        "--callgrind-out-file=/dev/null",
        str(driver),
        op,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


def changed(found: dict[str, int], before: dict[str, int]) -> dict[str, str]:
    moved = {op: found[op] / before[op] - 1 for op in found if op in before}
    return {
        op: f"{found[op]:,} instructions, {share:+.1%} of the committed {before[op]:,}"
        + ("" if share > 0 else ": renew the floors")
        for op, share in moved.items()
        if abs(share) > TOLERANCE
    } | {op: "has no committed count: renew them" for op in found.keys() - before.keys()}


def write() -> None:
    runs = [ratios(1.5) for _ in range(RUNS)]
    floors = {name: round(MARGIN * statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    with tempfile.TemporaryDirectory() as folder:
        counts = instructions(Path(folder))
    text = {"ratios": floors, "compiler": compiler(), "instructions": counts}
    FLOORS.write_text(json.dumps(text, indent=1) + "\n")
    print(f"{len(floors)} floors and {len(counts)} counts in {FLOORS}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="measure five times and commit to what was found")
    asked = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):  # torch reads them when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    if asked.write:
        write()
        return 0
    held = json.loads(FLOORS.read_text())
    found = ratios(0.5)
    if again := [name for name, why in below(found, held["ratios"]).items() if "floor is" in why]:
        found |= ratios(3.0, again)
    bad = below(found, held["ratios"])
    for name, ratio in found.items():
        print(f"{ratio:8.2f}  floor {held['ratios'].get(name, 0):7.2f}  {name}")
    if not shutil.which("valgrind"):
        print("instructions: not counted, valgrind is not installed")
    elif compiler() != held["compiler"]:
        print(f"instructions: not compared, {compiler()} is not the {held['compiler']} of the committed counts")
    else:
        with tempfile.TemporaryDirectory() as folder:
            counts = instructions(Path(folder))
        bad |= changed(counts, held["instructions"])
        print("instructions: " + ", ".join(f"{op} {count:,}" for op, count in counts.items()))
    print("\n".join(f"{name}: {why}" for name, why in bad.items()) or "nothing has become slower")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
