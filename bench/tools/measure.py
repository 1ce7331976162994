"""What the benchmarks share: a stopwatch, and the refusal to show a time for a wrong answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import Tensor


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median of some runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(what: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    """Ends the program unless the largest difference is at most `bound` of the largest number."""
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= bound:
        raise SystemExit(
            f"{what}: the answers differ by {error:.1e} of the largest, more than {bound:.0e}; no time shown"
        )


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round: what slows the machine for a while meets all alike. Each has run before."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times
