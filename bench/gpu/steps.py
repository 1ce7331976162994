"""What `make gpu` does, in the order of its worth; each step is a command with a time limit of its own.

The limits are for what hangs; together they are more than one call has. What it does not come to, the next one does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from rlhf_engine.bench.machine import ROOT

ALONE = {"PYTHONPATH": str(ROOT), "PEERS": ""}  # for steps that look at ours alone: to import the rest takes long


@dataclass
class Step:
    """A command; {out} stands for the results folder. Its last line of output is what the summary says of it."""

    name: str
    seconds: float
    words: list[str]
    file: str = "log.txt"
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a tool


def steps(rehearse: bool) -> list[Step]:
    python = [sys.executable, "-u"]
    device = ["--device", "cpu", "--quick"] if rehearse else ["--device", "cuda"]

    def module(name: str, *words: str) -> list[str]:
        return [*python, "-m", f"rlhf_engine.bench.{name}", *words]

    def sanitizer(tool: str, *options: str) -> Step:
        reduced = module("gpu.reduced", *(["--device", "cpu"] if rehearse else []))
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options, *reduced]
        cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a torch tensor's end is then an allocation's end
        needs = "compute-sanitizer" if not rehearse or tool != "memcheck" else ""  # rehearsed once, without the tool
        return Step(f"sanitizer: {tool}", 90, reduced if rehearse else words, "sanitizer.txt", cache | ALONE, needs)

    rehearsal = {"RLHF_GPU_REHEARSAL": "1"} if rehearse else {}
    # The files by name: what other tests import is not there, and one that cannot be collected would end them all.
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*_on_gpu.py"))]
    tests = [*python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    tests += ["--continue-on-collection-errors", *files]
    measured = ["--seconds", "0.1" if rehearse else "0.4", *device, "--append", "--out", "{out}/bench.jsonl"]
    learning = ["--seconds", "5" if rehearse else "60", *device[:2], "--out", "{out}/learning.jsonl"]
    learning += ["--steps", "2"] if rehearse else ["--fetch"]

    def bench(name: str, seconds: float, *words: str) -> Step:
        return Step(f"bench: {name}", seconds, module("__main__", *words, *measured))

    return [
        Step("environment", 60, module("gpu.environment", *device)),
        Step("build", 150, module("gpu.build", *(["--no-cuda"] if rehearse else []))),
        Step("tests", 270, tests, "tests.txt", rehearsal),
        sanitizer("memcheck", "--report-api-errors", "no"),  # libraries ask for what is not there, and go on
        bench("head", 150, "head"),
        bench("logits", 110, "ops", "--only", "^token_logprobs"),
        bench("losses", 90, "ops", "--only", "GRPO|short|primes"),
        bench("engine", 120, "engine"),
        sanitizer("racecheck"),
        Step("learning curve", 75, module("learning", *learning)),
        bench("growth", 90, "sweep", "recompiles"),
        Step("profile", 75, module("gpu.profile", "{out}", *device[:2]), "profile.txt", ALONE),
        # PyTorch's loops over time, and those of the truth, take most of it.
        bench("long losses", 200, "ops", "--only", "report|context|one row|minibatch"),
        sanitizer("initcheck"),
        sanitizer("synccheck"),
    ]


def files_of(steps: list[Step]) -> list[str]:
    """What they write into the results folder, and the summary."""
    named = {word.removeprefix("{out}/") for each in steps for word in each.words if word.startswith("{out}/")}
    return sorted({each.file for each in steps} | named | {"summary.json"})
