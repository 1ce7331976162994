"""Mutation testing of the reference and of the ops' front door: `make mutate` writes bench/results/mutation.json.

mutmut changes one expression at a time and runs the tests that reach it, until one fails. A change that no test notices
is a survivor: either the tests lack something, or the change means the same, for a reason in REASONS below. The command
fails while a survivor has none. It works on a copy, since mutmut leaves decorated functions alone: there, what stands
under `@torch.no_grad()` is wrapped behind its definition instead.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/mutation"
RESULT = ROOT / "bench/results/mutation.json"
KILLED = {1: "killed", 3: "killed", -9: "crash", -11: "crash", 24: "timeout", -24: "timeout", 36: "timeout"}
NOT_KILLED = {0: "survived", 5: "no tests", 33: "no tests"}
# (function, what the mutated line holds) -> why nothing can notice; both are regular expressions.
REASONS = {
    ("", r"strict=|zip\(.*, \)|^\)"): "strict= guards against ourselves: these lengths are equal by construction",
    (
        "",
        r"device=None|arange\(.* 0, \)|float64, \)|ones\(\(\), \)",
    ): "on CPUs, where this runs, that is the default device",
    ("_logprob_and_entropy", r"\+1"): "the tensor has two dimensions, so the last is number 1",
    ("_logprob_and_entropy", "-torch.inf, 1.0"): "any finite number does: it is multiplied by exp(-inf)",
    ("_logprob_and_entropy", "max=1"): "d_y <= 0 <= ls, so a bound above 0 is never met, nor is 0",
    ("_score_rows", "preserve_rng_state|use_reentrant=False, "): "no random number is drawn in a tile",
    ("_sequence_tokens", r"\(1, 1\)"): "no offset points behind the end",
    ("_to_padded", "else 1"): "without a sequence there is no row to hold the slot",
    (
        "(gae|whiten|reduce_loss)$",
        r"\.to\(None\)",
    ): "a 0-d number, or what is added to wider ones: promoted all the same",
    ("gae$", "XXlastXX|LAST"): 'the reference asks for "after" alone; the front door refuses other words',
    ("output$", "is_compiling.* and not"): "an empty tensor shares memory with none",
    ("targets$", "and False"): "every tensor differs from None",
    ("per_sequence$", "^break$"): "called with one tensor at a time",
    ("ppo_token_loss$", "<= 0"): "at A = 0 every loss is 0, none greater than another",
    ("ppo_token_loss$", ">= -advantage"): "at equality either is the minimum",
}


def prepare() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    for name in ("rlhf_engine", "tests"):
        shutil.copytree(ROOT / name, WORK / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", WORK)
    decorated = re.compile(r"^@torch\.no_grad\(\)\ndef (\w+)", re.M)
    for module in (WORK / "rlhf_engine/reference").glob("*.py"):
        text = module.read_text()
        wrapped = "".join(f"\n{name} = torch.no_grad()({name})" for name in decorated.findall(text))
        module.write_text(decorated.sub(r"def \1", text) + wrapped + "\n")


def survivor(name: str, path: str) -> dict[str, str]:
    """What was changed: the lines that differ, and the reason why nobody minds."""
    lines = get_diff_for_mutant(name, path=path).splitlines()[3:]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    function = re.sub(r"\.x_(\w+?)__mutmut_\d+$", r".\1", name)
    reasons = [why for (where, what), why in REASONS.items() if re.search(where, function) and re.search(what, after)]
    return {"function": function, "before": before, "after": after, "why": reasons[0] if reasons else ""}


def collect() -> tuple[dict[str, dict[str, int]], list[dict[str, str]]]:
    files, survivors = {}, []
    for meta in sorted(Path("mutants").rglob("*.py.meta")):
        path = str(meta.relative_to("mutants")).removesuffix(".meta")
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        outcomes = {name: (KILLED | NOT_KILLED)[code] for name, code in codes.items()}  # else mutmut itself failed
        files[path] = dict(sorted(Counter(outcomes.values()).items()))
        survivors += [survivor(name, path) for name, code in codes.items() if code in NOT_KILLED]
    return files, survivors


def main() -> None:
    prepare()
    os.chdir(WORK)
    # One thread: tensors here are small, and forks share no pool of threads.
    subprocess.run(
        [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", str(os.cpu_count())],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    files, survivors = collect()
    total = sum(sum(counts.values()) for counts in files.values())
    unexplained = [each for each in survivors if not each["why"]]
    result = {
        "command": "make mutate", "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "mutmut", "hypothesis")},
        "mutants": total, "killed": total - len(survivors), "killed_share": round(1 - len(survivors) / total, 4),
        "unexplained": len(unexplained), "files": files, "survivors": survivors,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{total} mutants, {result['killed_share']:.1%} killed, {len(survivors)} survivors: {RESULT}")
    for each in unexplained:
        print(f"  no test minds {each['function']}: {each['after']}")
    raise SystemExit(bool(unexplained))


if __name__ == "__main__":
    main()
