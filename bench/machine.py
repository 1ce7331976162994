"""The machine that a benchmark runs on: what it is, and the two rates that every result is compared with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rlhf_engine
from rlhf_engine import ops
from rlhf_engine.bench.clock import wait

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy")
CPU_CACHE = 64 * 2**20  # assumed, where the system does not say


@dataclass(frozen=True)
class Machine:
    """Rates are measured at the start of each run: shared machines differ from hour to hour."""

    device: torch.device
    name: str
    memory_bytes: int
    cache_bytes: int  # of the last cache
    copy_rate: float  # bytes a second, those read and those written
    matmul_rates: dict[torch.dtype, float]  # FLOP a second, two for each multiplication with its addition

    @property
    def folder(self) -> str:
        """Where results of such machines lie."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def look(device: torch.device, quick: bool = False) -> Machine:
    """Measures the rates: a second, on a CPU some."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, memory, cache = about.name, about.total_memory, getattr(about, "L2_cache_size", 50 * 2**20)
    else:
        name, cache = f"{_processor()}, {torch.get_num_threads()} threads", _last_cache()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = {dtype: matmul_rate(device, dtype, quick) for dtype in (torch.bfloat16, torch.float32)}
    return Machine(device, name, memory, cache, copy_rate(device, quick), rates)


def copy_rate(device: torch.device, quick: bool) -> float:
    """Of a tensor far beyond the caches."""
    count = 2**28 if device.type == "cuda" and not quick else 2**25 if not quick else 2**23
    source, place = torch.ones(count, device=device), torch.empty(count, device=device)
    return 8 * count / _seconds(lambda: place.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Of a square product of random numbers (zeros would be faster on a GPU, whose power is limited)."""
    size = 8192 if device.type == "cuda" and not quick else 1024 if not quick else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < 3 or (len(times) < 12 and sum(times) < 1.0):
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)  # what the machine can do: others on it only ever slow it down


def environment(machine: Machine, command: str) -> dict[str, Any]:
    """The first line of a results file."""
    versions = {"python": platform.python_version(), "rlhf_engine": rlhf_engine.__version__}
    versions |= {package: version(package) for package in PACKAGES}
    if machine.device.type == "cuda":
        versions |= {"cuda": torch.version.cuda or "none", "driver": _driver()}
    return {
        "kind": "environment", "command": command, "device": machine.device.type, "machine": machine.name,
        "folder": machine.folder, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(), "versions": versions, "platform": platform.platform(),
        "memory_bytes": machine.memory_bytes, "cache_bytes": machine.cache_bytes, "copy_rate": machine.copy_rate,
        "matmul_rates": {str(k).removeprefix("torch."): v for k, v in machine.matmul_rates.items()},
        "backends": {op: list(ops.available(op, machine.device.type)) for op in ("gae", "linear_policy_loss")},
    }  # fmt: skip


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Of the checkout, with "-dirty" where it was changed since; a copy without git is told by RLHF_COMMIT."""
    if os.environ.get("RLHF_COMMIT"):
        return os.environ["RLHF_COMMIT"]
    try:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.M) if path.exists() else []
    return names[0] if names else platform.machine()


def _last_cache() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) * 1024 for size in sizes if size.endswith("K")), default=CPU_CACHE)


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"
