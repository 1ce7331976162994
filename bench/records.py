"""What a benchmark found, as lines of JSON: first the environment, then a line for each way at each size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_engine.runs import finite

RESULTS = Path(__file__).parent / "results"
UNCHECKED = "a yardstick"  # it has no answer that could be wrong


@dataclass
class Record:
    """One way at one size. Times are in seconds, and absent unless the answer was right."""

    suite: str
    op: str
    shape: str
    dims: dict[str, int]
    dtype: str
    way: str
    version: str = ""
    note: str = ""
    verdict: str = "right"  # else why there is no time: a wrong answer, a failure, no memory
    # of each part of the answer, relative to its largest number; None where it is missing or not finite
    errors: dict[str, float | None] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    first: float | None = None  # the first call, with its compilation
    call: dict[str, float] | None = None  # median, low, high (see clock.Spread), by the host's clock
    device: dict[str, float] | None = None  # the same for the work on the GPU alone
    times_ours: float | None = None  # call time over that of ours, median of the ratios within rounds
    times_ours_device: float | None = None
    rounds: int = 0
    input_sets: int = 0
    peak_bytes: int | None = None  # beyond the inputs
    bytes_moved: int = 0  # the least that any way moves
    flops: float = 0.0  # the fewest of any way, see convention
    convention: str = ""
    copy_share: float | None = None  # bytes_moved over the time of the device (or call), of the machine's copy rate
    matmul_share: float | None = None  # flops over it, of the machine's matmul rate in that dtype

    @property
    def name(self) -> str:
        return f"{self.op}/{self.shape}/{'x'.join(str(n) for n in self.dims.values())}/{self.dtype}"

    @property
    def timed(self) -> bool:
        return self.verdict in ("right", UNCHECKED)

    @property
    def seconds(self) -> float | None:
        """Of the device where it was timed, else of the call."""
        spread = self.device or self.call
        return spread["median"] if spread else None


@dataclass
class Run:
    """A results file."""

    environment: dict[str, Any]
    records: list[Record]
    others: list[dict[str, Any]]  # lines of other kinds: recompilations, engine phases, peers that are absent

    @property
    def title(self) -> str:
        where = self.environment
        return f"{where['machine']}, {where['date'][:10]}, commit {where['commit']}"


class Journal:
    """Appends lines as they come: what was found before a crash is kept."""

    def __init__(self, path: Path | None, append: bool = False) -> None:
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:  # refused here, if at all, and not after the first measurement
                file.seek(0)
                whole = file.read().rpartition(b"\n")  # a line that a crash cut off would spoil the next one
                file.truncate(len(whole[0] + whole[1]) if append else 0)

    def add(self, line: Record | dict[str, Any]) -> None:
        if not self.path:
            return
        data = {"kind": "measurement"} | asdict(line) if isinstance(line, Record) else line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(data), allow_nan=False) + "\n")


# What is asked of an environment: by the table, by pictures, and by whoever compares.
KNOWN = ("machine", "folder", "device", "date", "commit", "versions", "copy_rate", "matmul_rates")


def read(path: Path) -> Run:
    """A results file, also one that a crash cut off in its last line. Of what was measured again, the last counts.

    Raises:
        ValueError: the file is not one of these.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
        except ValueError:
            if number < len(lines) or not parsed:
                raise ValueError(f"{path}, line {number}: not JSON, so not a results file of rlhf bench") from None
            continue
        if not isinstance(data, dict):
            raise ValueError(f"{path}, line {number}: not an object, so not a results file of rlhf bench")
        parsed.append(data)
    if not parsed or parsed[0].get("kind") != "environment":
        raise ValueError(f"{path}: not a results file of rlhf bench: its first line is not an environment")
    if missing := [name for name in KNOWN if name not in parsed[0]]:
        raise ValueError(f"{path}: not a results file of this version: its environment lacks {', '.join(missing)}")
    records: dict[tuple[str, str, str], Record] = {}
    others = []
    for data in parsed[1:]:
        kind = data.pop("kind", "")
        if kind == "measurement":
            record = measurement(path, data)
            records[record.suite, record.name, record.way] = record
        elif kind != "environment":  # a later part of the same run repeats it
            others.append({"kind": kind} | data)
    return Run(parsed[0], list(records.values()), others)


def measurement(path: Path, data: dict[str, Any]) -> Record:
    try:
        record = Record(**data)
    except TypeError as error:
        raise ValueError(f"{path}: a measurement of another version ({error}); measure again") from None
    if not isinstance(record.dims, dict) or not all(isinstance(x, dict | None) for x in (record.call, record.device)):
        raise ValueError(f"{path}: a measurement of another version; measure again")
    return record


def latest(folder: Path = RESULTS) -> list[Run]:
    """The newest results of every machine, by the date they hold."""
    newest: dict[str, Run] = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        run = read(path)
        held = newest.get(path.parent.name)
        if held is None or run.environment["date"] > held.environment["date"]:
            newest[path.parent.name] = run
    return list(newest.values())


def place(environment: dict[str, Any], folder: Path = RESULTS) -> Path:
    return folder / environment["folder"] / f"{environment['date'][:10]}-{environment['commit']}.jsonl"
