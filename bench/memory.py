"""How much memory a way needs on a CPU, at its peak and beyond its inputs.

In a process of its own, where nothing freed earlier is kept for later: glibc would hold back freed blocks of up to
32 MB, which would then count for nothing, so it is told to map and unmap each. The way runs once before, for what
libraries set up only once is not the way's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from rlhf_engine.bench.case import Case


def peak_bytes(case: Case, way: str, quick: bool) -> int | None:
    """As a GPU's allocator would count it, by this file run as a program; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    size = "quick" if quick else "full"
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_engine.bench.memory", case.suite, case.name, way, size],
        capture_output=True, text=True, env=os.environ | settings,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the memory of {case.name}, {way}: {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


def status_bytes(field: str) -> int:
    """A line of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main(suite: str, name: str, way: str, size: str) -> None:
    from rlhf_engine.bench.suites import find

    case = find(suite, name, torch.device("cpu"), quick=size == "quick")
    run = next(each.run for each in case.ways if each.name == way)
    tensors = case.make(torch.Generator().manual_seed(0))
    run(tensors)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    run(tensors)
    print(max(0, status_bytes("VmHWM") - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
