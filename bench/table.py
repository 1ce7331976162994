"""Results for people to read, a line for each way as it comes; and two results files beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rlhf_engine.bench.case import OURS
from rlhf_engine.bench.records import UNCHECKED, Record, Run

COLUMNS = (
    ("call", 10),
    ("device", 10),
    ("spread", 8),
    ("/ ours", 8),
    ("copy", 7),
    ("matmul", 8),
    ("memory", 9),
    ("first", 9),
)
HEAD = f"{'':26}{''.join(f'{name:>{width}}' for name, width in COLUMNS)}  error"
LEGEND = """
call: by the host's clock until the result is there; device: work on the GPU alone; spread: of the middle half
of the rounds, over the median; / ours: median ratio within rounds; copy, matmul: share of this machine's measured
rates, of the least bytes and FLOPs that give the answer; memory: at the peak, beyond the inputs; first: the first call,
compilation included; error: the largest of all parts of the answer, relative to the part's largest number, checked
before timing"""
SLOWER = 1.1


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def heading(record: Record) -> str:
    sizes = ", ".join(f"{name} {count:,}" for name, count in record.dims.items())
    unit = f"; {record.convention}" if record.convention else ""
    return f"{record.op}, {record.shape}: {sizes}, {record.dtype}{unit}"


def line(record: Record) -> str:
    name = f"  {record.way}{' ' + record.version if record.version and not record.way.startswith(OURS) else ''}"[:26]
    if not record.timed:
        return f"{name:26}  no time shown: {record.verdict}"
    timed = record.device or record.call or {"median": math.nan, "low": math.nan, "high": math.nan}
    times = record.times_ours_device if record.device else record.times_ours
    error = (
        record.verdict
        if record.verdict == UNCHECKED
        else f"{max((x or 0.0 for x in record.errors.values()), default=0.0):.0e}"
    )
    cells = [
        f"{duration(record.call['median'] if record.call else None):>10}",
        f"{duration(record.device['median'] if record.device else None):>10}",
        f"{(timed['high'] - timed['low']) / timed['median']:>8.0%}",
        f"{'' if times is None else f'{times:.2f}':>8}",
        f"{share(record.copy_share):>7}", f"{share(record.matmul_share):>8}",
        f"{size(record.peak_bytes):>9}", f"{duration(record.first):>9}", f"  {error}",
    ]  # fmt: skip
    note = f"  ({record.note})" if record.note else ""
    return f"{name:26}{''.join(cells)}{note}"


def about(environment: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in environment["matmul_rates"].items())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"{environment['machine']}: copies {environment['copy_rate'] / 1e9:.4g} GB/s (read and written), "
        f"products {rates}\n"
        f"{versions}; commit {environment['commit']}, {environment['date']}"
    )


def recompiles(found: dict[str, Any]) -> str:
    what = f"  {found['op']}, {found['way']}: "
    if found["verdict"] != "right":
        return what + found["verdict"]
    worst = max(found["first"][2:])
    told = f"compiled again at {found['compiled_later']} of {len(found['sizes']) - 2} new lengths"
    return (
        what + (told if found["compiled_later"] else "nothing new compiled") + f", worst first call {duration(worst)}"
    )


def engine(found: dict[str, Any]) -> str:
    """A step of a trainer by phases, or why there is none."""
    what = f"  {found['way']}, {found['model']}, {found.get('setting', '')}".rstrip(", ")
    if "seconds" not in found:
        return f"{what}: no time shown: {found['verdict']}"
    seconds = {name: x["median"] if isinstance(x, dict) else x for name, x in found["seconds"].items()}
    told = ", ".join(f"{name} {duration(each)}" for name, each in seconds.items())
    rest = "" if "tokens_per_second" not in found else f"; {found['tokens_per_second']:.0f} tokens a second"
    memory = f"; {size(found['peak_bytes'])}" if found.get("peak_bytes") else ""
    return f"{what}: {told}{rest}{memory}" + ("" if found["verdict"] == "right" else f" ({found['verdict']})")


def compare(before: Run, after: Run) -> Iterator[tuple[bool, str]]:
    """A line for each way that both timed, slowest first, and whether ours lost more than noise.

    Slower is what lost a tenth while the middle halves of the rounds do not overlap.

    Raises:
        ValueError: they come from different machines.
    """
    one, other = before.environment["machine"], after.environment["machine"]
    if one != other:
        raise ValueError(
            f"--compare: times of {one} and of {other} say nothing of the code; compare results of one machine"
        )
    held = {(x.name, x.way): x for x in before.records if x.timed}
    pairs = [(held[x.name, x.way], x) for x in after.records if x.timed and (x.name, x.way) in held]
    changes = []
    for old, new in pairs:
        if old.seconds and new.seconds:
            changes.append((new.seconds / old.seconds, old, new))
    for ratio, old, new in sorted(changes, key=lambda change: -change[0]):
        was, now = old.device or old.call, new.device or new.call
        assert was and now  # both were timed
        slower = ratio > SLOWER and now["low"] > was["high"]
        faster = ratio < 1 / SLOWER and now["high"] < was["low"]
        word = "slower" if slower else "faster" if faster else "as before"
        times = f"{duration(old.seconds)} -> {duration(new.seconds)}"
        yield slower and new.way.startswith(OURS), f"{ratio:6.2f}  {word:10}{times:24}{new.name}, {new.way}"
    for name, way in sorted(held.keys() - {(x.name, x.way) for x in after.records if x.timed}):
        yield way.startswith(OURS), f"        gone: {name}, {way}"
