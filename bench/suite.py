"""Runs cases: every answer is checked before anything is timed, and a wrong one gets no time."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from rlhf_engine.bench.case import OURS, Answer, Case, Tensors, Way, errors, wrong
from rlhf_engine.bench.clock import Broken, Timing, Work, first_call, measure, ratio
from rlhf_engine.bench.machine import Machine
from rlhf_engine.bench.records import UNCHECKED, Record

MOST_SETS = 32


@dataclass(frozen=True)
class Effort:
    """How long a case is timed: until `rounds` rounds or `seconds` have passed, but for three rounds at least."""

    seconds: float = 4.0
    rounds: int = 25


def run(
    cases: Iterable[Case],
    machine: Machine,
    effort: Effort,
    tell: Callable[[Record], None],
    memory: Callable[[Case, str], int | None] = lambda case, way: None,
) -> int:
    """Tells of each way at each size; returns how many of OURS were wrong or failed. On CPUs, where the process does
    not know, `memory` says how much a way needs."""
    bad = 0
    for case in cases:
        for record in run_case(case, machine, effort):
            if record.verdict == "right" and machine.device.type == "cpu":
                record.peak_bytes = memory(case, record.way)
            tell(record)
            bad += record.way.startswith(OURS) and record.verdict != "right"
    return bad


def run_case(case: Case, machine: Machine, effort: Effort) -> list[Record]:
    device, sets = machine.device, input_sets(case, machine)
    records = {way.name: record_of(case, way, len(sets)) for way in case.ways}
    truth = case.truth(sets[0])
    right = [way for way in case.ways if judge(case, way, sets[0], truth, device, records[way.name])]
    del truth
    free(device)
    works: dict[str, Work] = {}
    second: dict[str, tuple[float, int | None]] = {}
    for way in right:
        record = records[way.name]
        with told_in(record):
            works[way.name] = _work(way, sets)
            second[way.name] = first_call(works[way.name], device)  # it allocates, and compiles no more
        if not record.timed:
            works.pop(way.name, None)
            second.pop(way.name, None)
    timings: dict[str, Timing] = {}
    while works and not timings:
        try:
            timings = measure(works, second, device, len(sets), effort.seconds, effort.rounds)
        except Broken as broken:  # the others are timed without it
            tell_failure(records[broken.name], broken.__cause__ or broken)
            del works[broken.name], second[broken.name]
            free(device)
    for name, timing in timings.items():
        _fill(records[name], timing, machine, case, timings.get(OURS))
    del sets, works
    free(device)
    return list(records.values())


@contextmanager
def told_in(record: Record) -> Iterator[None]:
    """A peer's failure is a finding, and must not end the run. What others warn of is their own affair."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if record.way.startswith(OURS) else "ignore")
            yield
    except Exception as error:
        tell_failure(record, error)
    if not record.timed:
        record.first = record.peak_bytes = None


def tell_failure(record: Record, error: BaseException) -> None:
    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
    record.verdict = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {kind}: {text}"
    record.first = record.peak_bytes = None


def input_sets(case: Case, machine: Machine) -> list[Tensors]:
    """As many as exceed the cache three times, but no more than an eighth of the memory holds."""
    generator = torch.Generator(machine.device).manual_seed(0)
    sets = [case.make(generator)]
    size = max(1, sum(x.nbytes for x in sets[0].values()))
    wanted = min(MOST_SETS, math.ceil(3 * machine.cache_bytes / size), machine.memory_bytes // (8 * size))
    return sets + [case.make(generator) for _ in range(wanted - 1)]


def judge(case: Case, way: Way, tensors: Tensors, truth: Answer, device: torch.device, record: Record) -> bool:
    """Runs a way once and compares; the record says what came of it."""
    answers: list[Answer] = []
    before = fingerprint(tensors)
    with told_in(record):
        inputs = way.inputs(tensors)
        record.first, record.peak_bytes = first_call(lambda _: answers.append(way.run(inputs)), device)
        found = errors(answers[0], truth) if way.checked else {}
        record.errors = {part: error if math.isfinite(error) else None for part, error in found.items()}
        off = wrong(found, case.bounds) or ("" if fingerprint(tensors) == before else "it changes its inputs")
        record.verdict = f"wrong: {off}" if off else "right" if way.checked else UNCHECKED
    free(device)
    return record.timed


def fingerprint(tensors: Tensors) -> list[int]:
    """Sums of the bytes: what was overwritten would show."""
    return [int(x.contiguous().view(torch.uint8).sum(dtype=torch.int64)) for x in tensors.values()]


def free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _work(way: Way, sets: list[Tensors]) -> Callable[[int], object]:
    inputs = [way.inputs(tensors) for tensors in sets]
    return lambda number: way.run(inputs[number])


def record_of(case: Case, way: Way, sets: int) -> Record:
    return Record(
        suite=case.suite, op=case.op, shape=case.shape, dims=case.dims,
        dtype=str(case.dtype).removeprefix("torch."), way=way.name, version=way.version, note=way.note,
        bounds=case.bounds, input_sets=sets, bytes_moved=case.bytes_moved, flops=case.flops, convention=case.convention,
    )  # fmt: skip


def _fill(record: Record, timing: Timing, machine: Machine, case: Case, ours: Timing | None) -> None:
    record.call, record.rounds = asdict(timing.call), len(timing.call_rounds)
    record.device = asdict(timing.device) if timing.device else None
    record.peak_bytes = timing.peak_bytes
    if ours:
        record.times_ours = ratio(timing.call_rounds, ours.call_rounds)
        if timing.device_rounds and ours.device_rounds:
            record.times_ours_device = ratio(timing.device_rounds, ours.device_rounds)
    seconds = record.seconds
    if seconds and case.bytes_moved:
        record.copy_share = case.bytes_moved / seconds / machine.copy_rate
    if seconds and case.flops and case.dtype in machine.matmul_rates:
        record.matmul_share = case.flops / seconds / machine.matmul_rates[case.dtype]
