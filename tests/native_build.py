"""Builds copies of csrc/ for tests: with the CPU path or the shim's kernels, sound or with a bug planted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000")
Change = tuple[str, str, str]  # a file of csrc/, a text in it, what stands there instead


def sources(folder: Path, changes: Iterable[Change] = ()) -> Path:
    """A copy of csrc/ in `folder`, changed. A text that is not there once is an error: no bug goes unplanted."""
    copy = Path(shutil.copytree(ROOT / "csrc", folder / "csrc"))
    for name, old, new in changes:
        text = (copy / name).read_text()
        assert text.count(old) == 1, f"csrc/{name} holds {text.count(old)} times {old!r}"
        (copy / name).write_text(text.replace(old, new))
    return copy


def compile_all(folder: Path, names: Iterable[str], *flags: str) -> dict[str, Path]:
    """Objects by name of source. Kernels, the .cu files, are compiled as C++, for the shim."""

    def compile_one(name: str) -> Path:
        built = (folder / name).with_suffix(".o")
        include = ("-isystem", str(TORCH / "include"), f"-I{ROOT / 'tests'}")
        subprocess.run(
            ["g++", *FLAGS, "-O1", *flags, *include, "-xc++", "-c", str(folder / name), "-o", str(built)], check=True
        )
        return built

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(compile_one, names), strict=True))


def link(objects: Iterable[Path], library: Path, *flags: str) -> Path:
    libraries = ("-Wl,--no-as-needed", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
    subprocess.run(["g++", "-shared", *flags, *map(str, objects), *libraries, "-o", str(library)], check=True)
    return library
