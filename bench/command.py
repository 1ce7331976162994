"""`rlhf bench`, which is also `python -m rlhf_engine.bench`: needs nothing but what the ops need."""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib.util
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("ops", "head", "sweep", "recompiles", "engine", "peers")
USAGE = "rlhf bench [ops] [head] [sweep] [recompiles] [engine] [peers] [--quick] [--key value ...]"
ABOUT = """Check the answer of every op, then time it: ours beside what other packages do.

  ops         log-probs from logits, and the loss side: GAE, whitening, KL, PPO and value loss
  head        from hidden states to log-probs and policy loss, without logits
  sweep       the policy loss over numbers of rows and vocabularies, for the pictures
  recompiles  what a length costs that an op has not seen
  engine      whole PPO steps
  peers       which other packages are here, and why the rest is not; nothing is timed

Without a name: all of them. A way whose answer is wrong gets no time, and a wrong one of ours exit code 1.
"""


class Mistaken(ValueError):
    """What was asked for cannot be; the message says what can."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Mistaken(f"{message}; rlhf bench --help lists what there is")


def parser() -> Parser:
    made = Parser("rlhf bench", USAGE, ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    made.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto: cuda where torch sees it]"
    )
    made.add_argument(
        "--quick", action="store_true", help="small sizes, a minute or two: is everything right and alive?"
    )
    made.add_argument("--only", default="", metavar="REGEX", help="cases whose name (op/shape/sizes/dtype) holds this")
    made.add_argument("--seconds", type=float, help="for the timing of each case [4, quick 1]")
    made.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), metavar="DTYPE", help="float32, bfloat16")
    made.add_argument("--threads", type=int, help="of the CPU [torch's choice]")
    made.add_argument("--out", type=Path, help="FILE.jsonl, or a folder for MACHINE/DATE-COMMIT.jsonl [runs/bench]")
    made.add_argument("--append", action="store_true", help="to that file, if it is there")
    made.add_argument("--plots", type=Path, metavar="FOLDER", help="draw pictures there")
    made.add_argument(
        "--from", type=Path, dest="read", metavar="FILE", help="measure nothing: show and draw these results"
    )
    made.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two results files; 1 if ours is slower"
    )
    return made


def run(words: Sequence[str]) -> int:
    """The exit code; Mistaken for what cannot be."""
    try:
        asked = parser().parse_args(list(words))
    except SystemExit as done:  # --help has been printed
        return int(done.code or 0)
    unknown = [name for name in asked.names if name not in NAMES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(NAMES)}"
        raise Mistaken(f"there is no benchmark {unknown[0]!r}; {hint}")
    for name in ("seconds", "threads"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            raise Mistaken(f"--{name} is a positive number, not {value}")
    try:
        re.compile(asked.only)
    except re.error as error:
        raise Mistaken(f"--only {asked.only!r} is no regular expression: {error}") from None
    for path in (*(asked.compare or ()), *([asked.read] if asked.read else [])):
        if not path.is_file():
            raise Mistaken(f"there is no results file {path}")
    if asked.plots:
        if importlib.util.find_spec("matplotlib") is None:
            raise Mistaken("--plots needs matplotlib, which is not installed: pip install matplotlib")
        writable("--plots", asked.plots)
    from rlhf_engine.bench import records, table

    if asked.compare:
        told = list(table.compare(*(records.read(path) for path in asked.compare)))
        print("\n".join(text for _, text in told) or "no way was timed in both files")
        return int(any(bad for bad, _ in told))
    if asked.read:
        found = records.read(asked.read)
        show(found)
        return draw(found, asked.plots)
    return measure(asked, " ".join(["rlhf bench", *map(shlex.quote, words)]))


def writable(flag: str, folder: Path) -> None:
    """Makes the folder, before anything is measured for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistaken(f"{flag} {folder}: {error.strerror}; name another place") from None


def measure(asked: argparse.Namespace, command: str) -> int:
    import torch

    from rlhf_engine.bench import machine, records, suites, table

    if asked.device == "cuda" and not torch.cuda.is_available():
        raise Mistaken("--device cuda: torch sees no CUDA device here")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    kind = asked.device if asked.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    names = asked.names or [name for name in NAMES if not (asked.quick and name == "sweep")]
    dtypes = tuple(getattr(torch, name) for name in asked.dtypes) if asked.dtypes else None
    of_cases = [name for name in names if name in suites.SUITES]
    chosen = list(suites.cases(of_cases, device, asked.quick, asked.only, dtypes))
    if asked.only and of_cases and not chosen:
        some = next(suites.cases(of_cases, device, asked.quick)).name
        raise Mistaken(f"--only {asked.only!r} is in the name of no case; names are like {some!r}")
    here = machine.look(device, asked.quick)
    environment = machine.environment(here, command)
    journal = open_journal(environment, asked.out or Path("runs/bench"), asked.append)
    journal.add(environment)
    print(table.about(environment))
    try:
        bad = perform(asked, names, chosen, here, journal)
    except KeyboardInterrupt:
        print(f"stopped; what was measured until then is in {journal.path}")
        return 130
    print(f"{table.LEGEND}\n\nresults: {journal.path}")
    if bad:
        print(f"{bad} of ours were wrong or failed")
    return draw(records.read(journal.path), asked.plots) or int(bool(bad))


def perform(asked: argparse.Namespace, names: Sequence[str], chosen: list[Any], here: Any, journal: Any) -> int:
    """Writes down and prints everything as it comes; returns how many of ours were wrong or failed."""
    import torch

    from rlhf_engine.bench import engine_bench, engine_trl, memory, peers, recompiles, records, suite, table

    for peer, why in peers.absent(here.device, (torch.float32, torch.bfloat16)).items():
        journal.add({"kind": "absent", "peer": peer, "why": why})
        print(f"not measured: {peer}: {why}")
    if "peers" in names:
        for present in peers.present():
            print(f"here: {present}")
    last = ""

    def tell(record: records.Record) -> None:
        nonlocal last
        journal.add(record)
        if table.heading(record) != last:
            last = table.heading(record)
            print(f"\n{last}\n{table.HEAD}", flush=True)
        print(table.line(record), flush=True)

    effort = suite.Effort(asked.seconds or (1.0 if asked.quick else 4.0), 9 if asked.quick else 25)
    weigh = (
        (lambda case, way: memory.peak_bytes(case, way, asked.quick) if case.suite != "ops" else None)
        if not asked.quick
        else None
    )
    gc.collect()
    gc.freeze()  # what was imported stays: the collection behind each way would walk through it every time
    bad = suite.run(chosen, here, effort, tell, *([weigh] if weigh else []))
    if "recompiles" in names:
        print("\nnew lengths")
        for found in recompiles.lines(here.device, asked.quick):
            journal.add(found)
            print(table.recompiles(found), flush=True)
    if "engine" in names:
        print("\nengine")
        for lines in (engine_bench.lines, engine_trl.lines):
            for found in lines(here.device, asked.quick):
                journal.add(found)
                bad += found["way"] == "ours" and found["verdict"] != "right"
                print(table.engine(found), flush=True)
        for found in engine_bench.PUBLISHED:
            print(table.engine(found))
    return bad


def open_journal(environment: dict[str, Any], out: Path, append: bool) -> Any:
    """A results file for what is to come; what is there is only continued if it is of this machine and commit."""
    from rlhf_engine.bench import records

    path = out if out.suffix == ".jsonl" else records.place(environment, out)
    if append and path.is_file() and path.stat().st_size:
        held = records.read(path).environment
        both = [(x["machine"], x["commit"].removesuffix("-dirty")) for x in (held, environment)]
        if both[0] != both[1]:
            raise Mistaken(
                f"--append: {path} is of {held['machine']} at {held['commit']}, and this is {environment['machine']} "
                f"at {environment['commit']}; name another --out"
            )
    try:
        return records.Journal(path, append)
    except OSError as error:
        raise Mistaken(f"--out {path}: {error.strerror}; name another place") from None


def show(found: Any) -> None:
    from rlhf_engine.bench import table

    print(table.about(found.environment))
    last = ""
    for record in found.records:
        if table.heading(record) != last:
            last = table.heading(record)
            print(f"\n{last}\n{table.HEAD}")
        print(table.line(record))
    lines = {"recompiles": table.recompiles, "engine": table.engine}
    for kind, line in lines.items():
        for other in (other for other in found.others if other["kind"] == kind):
            print(f"{kind}{line(other)}")


def draw(found: Any, folder: Path | None) -> int:
    if folder:
        from rlhf_engine.bench import plots

        for path in plots.draw(found, folder):
            print(path)
    return 0
