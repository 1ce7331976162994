"""System, processor, memory, and the cache folder with the demo's model and ratings."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from rlhf_engine import fetch
from rlhf_engine.doctor.check import Check

DEMO_GB = 3.0  # the demo takes 2.4 at most
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and Arm, as the kernel names them
# What a container may use of the machine, where that is less than all.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
QUOTA = "/sys/fs/cgroup/cpu.max"


def system(name: str) -> Check:
    if platform.system() != "Linux":
        return Check(name, "note", platform.platform(), "use Linux where you can: the tests run nowhere else")
    return Check(name, "ok", platform.platform())


def processor(name: str) -> Check:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    seen = f"{about.get('model name') or platform.machine()}, {cores()} cores for this process"
    features = f"{about.get('flags', '')} {about.get('Features', '')}".split()
    if features and not BFLOAT16 & set(features):
        return Check(name, "note", f"{seen}, no bfloat16 instructions", "stay with float32 on this CPU (the default)")
    return Check(name, "ok", seen)


def cores() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (Path(QUOTA).read_text() if os.path.exists(QUOTA) else "max 1").split()  # microseconds per period
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def memory(name: str) -> Check:
    path = Path("/proc/meminfo")
    if not path.exists():
        return Check(name, "ok", "unknown on this system")
    bytes_of = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in path.read_text().splitlines()}
    free, total = bytes_of["MemAvailable"], bytes_of["MemTotal"]
    texts = [Path(limit).read_text().strip() for limit in LIMITS if Path(limit).exists()]
    limit = min([int(text) for text in texts if text.isdigit()], default=total)  # "max" is none
    seen = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}"
    seen += f", limited to {limit / 1e9:.1f}" if limit < total else ""
    if min(free, limit) < DEMO_GB * 1e9:
        return Check(name, "warn", seen, f"free {DEMO_GB:g} GB for the demo, or run it with --preset tiny")
    return Check(name, "ok", seen)


def cache(name: str) -> Check:
    folder = fetch.cache_dir()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free, wanted = shutil.disk_usage(there).free // 1_000_000, sum(fetch.missing().values())
    seen, elsewhere = f"{folder}, {free / 1000:,.1f} GB free", "set RLHF_CACHE to a folder that you may write to"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "warn", f"{seen}, but {there} cannot be written to", elsewhere)
    if free < wanted:
        fix = "free some space, or set RLHF_CACHE to a folder on another disk"
        return Check(name, "warn", f"{seen}, and what is to be fetched needs {wanted / 1000:.1f}", fix)
    return Check(name, "ok", seen)


def demo_data(name: str) -> Check:
    missing = fetch.missing()
    if missing:
        fix = "`rlhf fetch`, or the first `rlhf run` does it"
        return Check(name, "note", f"not fetched yet: {', '.join(missing)}", fix)
    return Check(name, "ok", "model and ratings are in the cache")
