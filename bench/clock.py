"""Time and memory of a call, on CPUs and on GPUs.

Two times are taken. *Call* is what a program waits for: the host's clock from the call until the result is there.
*Device* is the work on the GPU alone: calls are queued behind a kernel that does nothing for a while, so that events
around them see no gap between launches (of a way that waits for the device itself, its gaps are seen: it has them in
every program). On CPUs both are the same, and only *call* is given.

Ways are timed in turns, round by round, so that what slows a machine down for a while meets all of them; a ratio is the
median of ratios within rounds. Inputs rotate among sets that together exceed the last cache three times, or as many as
fit; the first call, with its compilation, is given apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[int], object]  # does it once, on the set of inputs of that number
LONGEST_QUEUE = 0.02  # seconds of calls that wait behind the idle kernel
TICKS_PER_SECOND = 2e9  # of torch.cuda._sleep, above any clock: it must last longer than the queueing


class Broken(Exception):
    """A work that failed while it was timed, though it had not failed before: its name; the cause says why."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Spread:
    """Seconds: the median, and between which the middle half of the rounds lies."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Seconds of a call in each round; of the device none on a CPU, nor of a work too slow for rounds."""

    call_rounds: list[float]
    device_rounds: list[float]
    peak_bytes: int | None  # on a GPU, beyond what was there before the call

    @property
    def call(self) -> Spread:
        return spread(self.call_rounds)

    @property
    def device(self) -> Spread | None:
        return spread(self.device_rounds) if self.device_rounds else None


def spread(rounds: list[float]) -> Spread:
    if len(rounds) < 2:
        return Spread(rounds[0], rounds[0], rounds[0])
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(rounds: list[float], to: list[float]) -> float:
    """The median of ratios within rounds; of medians, where one side was called once."""
    if len(rounds) != len(to):
        return statistics.median(rounds) / statistics.median(to)
    return statistics.median(a / b for a, b in zip(rounds, to, strict=True))


def first_call(work: Work, device: torch.device) -> tuple[float, int | None]:
    """Seconds, and the most GPU memory beyond what was there: of a call that may compile."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    answer = work(0)
    wait(device)
    took = time.perf_counter() - start
    del answer
    return took, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    works: Mapping[str, Work],
    second: Mapping[str, tuple[float, int | None]],
    device: torch.device,
    sets: int,
    seconds: float,
    rounds: int,
) -> dict[str, Timing]:
    """All ways in turns, for about `seconds` in all or `rounds` rounds, whichever ends first, but at least three.

    `second` is what first_call said of each, at a call that compiled nothing any more. A round of a short work is a
    batch of calls, as long as a clock can tell. A work that takes longer than `seconds` and twenty times as long as the
    fastest is called once, outside the turns.

    Raises:
        Broken: a work failed, and from which exception.
    """
    patience = max(seconds, 20 * min(took for took, _ in second.values()))
    batch = {name: max(1, min(200, int(2e-3 / max(took, 1e-7)))) for name, (took, _) in second.items()}
    calls: dict[str, list[float]] = {name: [] for name in works}
    devices: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    for number in range(max(3, rounds)):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for name, work in works.items():
            if second[name][0] <= patience:
                try:
                    calls[name].append(_call_time(work, device, sets, batch[name]))
                    if device.type == "cuda":
                        devices[name].append(_device_time(work, device, sets, batch[name], calls[name][-1]))
                except Exception as error:
                    raise Broken(name) from error
    return {name: Timing(calls[name] or [second[name][0]], devices[name], second[name][1]) for name in works}


def _call_time(work: Work, device: torch.device, sets: int, batch: int) -> float:
    """Of one call; in a batch each waits for its result."""
    start = time.perf_counter()
    for number in range(batch):
        work(number % sets)
        wait(device)
    return (time.perf_counter() - start) / batch


def _device_time(work: Work, device: torch.device, sets: int, batch: int, call: float) -> float:
    count = max(1, min(batch, int(LONGEST_QUEUE / call)))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda._sleep(int(1.5 * count * min(call, LONGEST_QUEUE) * TICKS_PER_SECOND))
        begin.record()
        for number in range(count):
            work(number % sets)
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count
