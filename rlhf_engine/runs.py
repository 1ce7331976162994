"""The run folder: created with care, and telling afterwards what ran where."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import time
from dataclasses import asdict
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import torch

import rlhf_engine
from rlhf_engine.config import RunConfig

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "vaderSentiment", "scikit-learn", "gguf")
PARTS = ("sft", "reward_model", "policy", "critic")
FILES = ("config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "summary.json", "ranking.json", "report.html")


def create(config: RunConfig) -> Path:
    """Makes the folder for a fresh run and writes config.yaml.

    Raises:
        ValueError: an earlier run lies there and overwrite is off, or the folder holds files that are no run's.
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    present = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if present and not config.overwrite:
        raise ValueError(f"output: {folder} is not empty; use --overwrite true, or another --output")
    if present and not present & {"config.yaml", "summary.json"}:
        raise ValueError(f"output: {folder} holds files that are not a run's; name another folder")
    _keep_inputs(config, folder)
    for name in present & {*PARTS, *FILES, *(p.name for p in folder.glob("config.*.yaml"))}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return open_or_create(config)


def _keep_inputs(config: RunConfig, folder: Path) -> None:
    """A run must not start by deleting what it is about to read."""
    inputs = [config.model, config.tokenizer, config.reward_model.body, config.sft.data, config.data.prompts]
    inputs += [config.data.source, *(source.source for source in config.reward)]
    for name in inputs:
        if name and Path(name).exists() and folder.resolve() in Path(name).resolve().parents:
            raise ValueError(
                f"output: overwriting {folder} would delete {name}, which this run reads; name another folder"
            )


def open_or_create(config: RunConfig) -> Path:
    """The folder for a single stage: what other stages left there is kept, their settings as config.1.yaml and on."""
    import yaml

    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output: no permission to write to {folder}")
    path, text = folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False)
    if path.is_file() and path.read_text() != text:  # an earlier stage ran with other settings
        path.rename(next(p for i in count(1) if not (p := folder / f"config.{i}.yaml").exists()))
    path.write_text(text)
    return folder


def read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it, or name another --output") from error


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replaces summary.json in one step, so that a reader never sees half of it; NaN and inf become null."""
    temporary = folder / "summary.json.tmp"
    temporary.write_text(json.dumps(finite(summary), indent=2) + "\n")
    os.replace(temporary, folder / "summary.json")


def finite(value: Any) -> Any:
    """The same structure with non-finite numbers as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_gb() -> float:
    """Peak resident memory of this process so far, in 1e9 bytes (Linux reports KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def matmul_gflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.4) -> float:
    """Median rate of the product that dominates the demo, (512, 576) x (576, 1536): it calibrates every time."""
    a, b = torch.randn(512, 576, device=device).to(dtype), torch.randn(1536, 576, device=device).to(dtype)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return 2 * 512 * 576 * 1536 / sorted(times)[len(times) // 2] / 1e9


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "matmul_gflops_float32": round(matmul_gflops(torch.float32, device), 1),
        "matmul_gflops_bfloat16": round(matmul_gflops(torch.bfloat16, device), 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else (platform.processor() or platform.machine()),
    }


def write_environment(folder: Path, machine: dict[str, Any]) -> None:
    """env.json: versions and machine; no paths, no environment variables, so nothing secret can slip in."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    about = {
        "rlhf_engine": rlhf_engine.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "machine": machine,
    }
    (folder / "env.json").write_text(json.dumps(about, indent=2) + "\n")


def write_card(folder: Path, title: str, lines: list[str]) -> None:
    """README.md of a model folder: what it is, made from what, how good, how to load it."""
    (folder / "README.md").write_text("\n".join([f"# {title}", "", *lines, ""]))
