"""What a new length costs: each op is called at sizes it has not seen, as every batch of a trainer is one.

The first call at a size is compared with the second, if the answers are right. A kernel that is compiled for its sizes
shows here, and nowhere else: the benchmarks proper warm up at the one size that they time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlhf_engine.bench import head_cases, ops_cases
from rlhf_engine.bench.case import Answer, Case, Tensors, errors, wrong
from rlhf_engine.bench.clock import wait

SIZES = (1009, 1201, 1511, 2003, 3001, 4001)  # primes, none of them a multiple of 16 as the next one might be
SLOW, TIMES = 0.05, 5.0  # a first call this much slower than the second, in seconds and as a ratio, compiled something


def lines(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """One for each way of each op, the first two sizes being warm-up: even a run-time length compiles once or twice."""
    vocabulary, width = (1013, 64) if quick or device.type == "cpu" else (50_257, 512)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def policy(rows: int) -> Case:
        return head_cases.head("linear_policy_loss", "any", rows, width, vocabulary, dtype, device)

    def logprobs(rows: int) -> Case:
        return list(ops_cases.logprobs("any", rows, vocabulary, dtype, device))[1]

    def loss_side(op: str) -> Callable[[int], Case]:
        return lambda rows: ops_cases.loss_side(op, "any", 7, rows, device)

    makers: list[Callable[[int], Case]] = [policy, logprobs, loss_side("kl_gae"), loss_side("ppo_loss")]
    for make in makers:
        made = [make(rows) for rows in SIZES]
        tensors = [case.make(torch.Generator(device).manual_seed(0)) for case in made]
        problems = [(case, x, case.truth(x)) for case, x in zip(made, tensors, strict=True)]
        for way in made[0].ways:
            if way.checked:
                yield line(way.name, problems, device)


def line(name: str, problems: list[tuple[Case, Tensors, Answer]], device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "recompiles", "op": problems[0][0].op, "way": name, "sizes": list(SIZES)}
    pairs = []
    try:
        for case, tensors, truth in problems:
            way = next(each for each in case.ways if each.name == name)
            inputs = way.inputs(tensors)
            pairs.append((seconds(way.run, inputs, device), seconds(way.run, inputs, device)))
            if off := wrong(errors(way.run(inputs), truth), case.bounds):
                return found | {"verdict": f"wrong: {off}"}
    except Exception as error:
        return found | {"verdict": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    compiled = sum(first > SLOW and first > TIMES * again for first, again in pairs[2:])
    first, again = zip(*pairs, strict=True)
    return found | {"first": first, "again": again, "compiled_later": compiled, "verdict": "right"}


def seconds(run: Callable[[Any], object], tensors: Any, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run(tensors)
    wait(device)
    return time.perf_counter() - start
