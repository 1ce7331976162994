"""A PPO update's head on CPUs, three ways: `python bench/head.py [--peers FOLDER] [--json FILE]`.

Hidden states to a PPO loss with entropy bonus, and back to the gradients of hidden states and weights: through all
logits as usual, by `ops.linear_policy_loss`, and by TRL's chunked head (`make peers` puts it into .peers). Ours also
with a quarter of the rows in the loss; the others score every row and mask at the end, in the same time.

Answers are checked before a time is shown. Times are taken in turns in one process; memory is that of one run in a
process of its own. Products are counted in units of NHV: 6 is the least that gives both gradients, and each time the
logits are made again costs 2. Without instructions for bfloat16 the usual way takes minutes a run: it is then timed on
one row in eight, which the table says, and its memory still takes one whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import head_ways
import torch
from head_ways import Problem
from measure import check, interleaved
from torch.utils.flop_counter import FlopCounterMode

from rlhf_engine import __version__, runs

# Of the largest number, against the usual way in float32. In bfloat16 logits up to 15 are rounded by up to .03, and a
# probability by as much of itself.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SLOW_PART = 8
OURS, QUARTER, BARE = "ours", "ours, 25% of rows", "three bare products"


@dataclass
class Line:
    """What is measured of one way, for all rows."""

    way: str
    dtype: str
    seconds: float  # as all times here, a median over rounds
    times_ours: float  # seconds over those of OURS in the same round
    times_quarter: float  # and of QUARTER
    extra_mb: float | None  # at the peak, beyond inputs and returned gradients
    nhv: float
    timed_rows: int  # from which the time of all is scaled up
    cores: float  # that the process had meanwhile


def added_product(into: list[int], a: list[int], b: list[int], **_: Any) -> int:
    """FLOPs of addmm_, from shapes: torch's counter has no entry for products added in place."""
    return 2 * a[0] * a[1] * b[1]


def count(way: str, problem: Problem) -> tuple[head_ways.Answer, float]:
    """The answer, and its products in units of NHV."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        answer = head_ways.answer(way, problem)
    return answer, counter.get_total_flops() / (len(problem.targets) * problem.weight.numel())


def checked(way: str, problem: Problem, name: str) -> float:
    """Compares the answer with the usual one in float32; returns the number of products."""
    truth, (answer, products) = head_ways.answer("usual", problem.to(torch.float32)), count(way, problem)
    dtype = problem.hidden.dtype
    for part, ours, theirs in zip(("loss", "gradient of hidden", "gradient of weight"), answer, truth, strict=True):
        check(f"{name}, {dtype}, {part}", ours.float(), theirs, BOUNDS[dtype])
    return products


def measure(dtype: torch.dtype, slow: bool, with_trl: bool, args: argparse.Namespace) -> list[Line]:
    whole, quarter = (head_ways.make(args.tokens, dtype, args.vocabulary, args.width, share) for share in (1.0, 0.25))
    cases = {"usual": ("usual", whole.first(args.tokens // SLOW_PART) if slow else whole), OURS: ("ours", whole)}
    cases |= {"TRL": ("trl", whole)} if with_trl else {}
    cases |= {QUARTER: ("ours", quarter)}
    products = {name: checked(way, problem, name) for name, (way, problem) in cases.items()}
    works = {name: partial(head_ways.answer, way, problem) for name, (way, problem) in cases.items()}
    works[BARE], products[BARE] = partial(head_ways.products, whole), 6.0
    wall, processor = time.perf_counter(), time.process_time()
    times = interleaved(works, args.rounds)
    cores = (time.process_time() - processor) / (time.perf_counter() - wall)
    print(f"had {cores:.1f} of {args.threads} cores; with less than all, threads wait for each other in small steps")
    lines = []
    for name in works:
        way, problem = cases.get(name, (None, whole))
        rows = len(problem.targets)
        seconds = [args.tokens / rows * x for x in times[name]]
        ratios = [[a / b for a, b in zip(seconds, times[other], strict=True)] for other in (OURS, QUARTER)]
        share, shape = 0.25 if name == QUARTER else 1.0, whole.weight.shape
        memory = round(head_ways.peak_mb(way, args.tokens, dtype, *shape, share), 1) if way else None
        medians = (round(statistics.median(x), 4) for x in (seconds, *ratios))
        kind = str(dtype).removeprefix("torch.")
        lines.append(Line(name, kind, *medians, memory, round(products[name], 4), rows, round(cores, 2)))
    return lines


def show(lines: list[Line], tokens: int) -> None:
    print(f"{'':20}{'':9}{'seconds':>9}{'/ ours':>8}{'/ our 25%':>11}{'extra MB':>10}{'NHV':>7}")
    for x in lines:
        memory = "" if x.extra_mb is None else f"{x.extra_mb:.0f}"
        numbers = f"{x.seconds:9.2f}{x.times_ours:8.2f}{x.times_quarter:11.2f}{memory:>10}{x.nhv:7.2f}"
        print(f"{x.way:20}{x.dtype:9}{numbers}{'' if x.timed_rows == tokens else '  *'}", flush=True)
        if x.timed_rows != tokens:
            print(f"  * the time of {x.timed_rows} of the rows, times {tokens / x.timed_rows:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 2048), ("width", 576), ("vocabulary", 49_152), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", default=os.environ.get("PEERS", ""), help="folder that holds TRL")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["PEERS"] = args.peers  # for the processes that measure memory
    trl, machine = head_ways.trl_module(), runs.describe_machine(torch.device("cpu"))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "rlhf_engine": __version__}
    found: dict[str, Any] = {
        "command": "python bench/head.py",
        "shape": {"tokens": args.tokens, "width": args.width, "vocabulary": args.vocabulary},
        "rounds": args.rounds,
        "machine": machine | {"platform": platform.platform()},
        "versions": versions | {"trl": None if isinstance(trl, str) else head_ways.trl_version()},
    }
    print("\n".join(f"{name}: {what}" for name, what in found.items()))
    if isinstance(trl, str):
        print(f"TRL: not measured ({trl})")
    lines: list[Line] = []
    for name in args.dtypes:
        slow = name == "bfloat16" and machine["matmul_gflops_bfloat16"] < 0.5 * machine["matmul_gflops_float32"]
        part = measure(getattr(torch, name), slow, not isinstance(trl, str), args)
        show(part, args.tokens)
        lines += part
    if args.json:
        args.json.write_text(json.dumps(found | {"ways": [asdict(x) for x in lines]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
