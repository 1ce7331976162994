"""This package, the Python that runs it and what it requires, by metadata: nothing is imported.

The versions that are needed come from this package's own metadata, so no number stands in two places.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from platform import python_version
from shlex import quote

import rlhf_engine
from rlhf_engine.doctor.check import Check

NAME = "rlhf_engine"
PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
SHOWN = ("torch", "triton", "transformers", "numpy", "safetensors")
ELSEWHERE = ("ninja", "pybind11", "triton")  # needed for building only, or by kernels only: they have their own checks
# What others import by name. A folder `kernels` with an __init__.py, for one, is taken for the package of that name.
HIDEABLE = ("kernels", "torch", "triton", "transformers", "numpy")
USED = ("demo",)  # the extras of which `rlhf doctor` says whether they are there
UNKNOWN = f"install {NAME} (see above): its metadata says which versions it needs"


@dataclass(frozen=True)
class Requirement:
    name: str
    floor: str
    extra: str

    def __str__(self) -> str:
        return f'"{self.name}>={self.floor}"' if self.floor else self.name


def install_again() -> str:
    """The command that installs this package, and makes its extension, for this Python."""
    return f"`pip install --no-build-isolation {f'-e {quote(str(ROOT))}`' if is_checkout() else '.` in a checkout'}"


def is_checkout() -> bool:
    return (ROOT / "csrc").is_dir() and (ROOT / "setup.py").is_file()


def this_package(name: str) -> Check:
    seen, mine = f"{rlhf_engine.__version__} in {PACKAGE}", _distribution()
    others = ", ".join(sorted(str(folder) for folder in _copies() - {PACKAGE}))
    if others:
        fix = f"`pip uninstall {NAME}`, or take the copy that is not meant off PYTHONPATH and the working folder"
        return Check(name, "warn", f"{seen}, and another copy in {others}", fix)
    if mine is None:
        setup = f"`make setup` in {ROOT}, or " if is_checkout() else ""
        return Check(name, "warn", f"{seen}, on sys.path but not installed", setup + install_again())
    if mine.version != rlhf_engine.__version__:
        return Check(name, "warn", f"{seen}, but its metadata says {mine.version}", install_again())
    return Check(name, "ok", seen)


def _copies() -> set[Path]:
    """Every folder that `import rlhf_engine` could mean: along sys.path, and by the finders of editable installs."""
    found = [PathFinder.find_spec(NAME, [entry]) for entry in sys.path]
    for finder in sys.meta_path:
        if finder is not PathFinder and hasattr(finder, "find_spec"):
            found.append(finder.find_spec(NAME, None))
    return {Path(spec.origin).resolve().parent for spec in found if spec is not None and spec.origin is not None}


def python(name: str) -> Check:
    seen, mine = f"{python_version()}, {sys.executable}", _distribution()
    floor = str((mine.metadata["Requires-Python"] if mine is not None else None) or "").removeprefix(">=")
    if floor and _numbers(python_version()) < _numbers(floor):
        return Check(name, "fail", f"{seen}; {floor} is needed", f"make an environment with Python {floor} or later")
    return Check(name, "ok", seen)


def packages(name: str) -> Check:
    versions = {package: _version(package) for package in SHOWN}
    seen = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if _distribution() is None:
        return Check(name, "note", seen or f"none of {', '.join(SHOWN)}", UNKNOWN)
    wanted = [r for r in requirements() if not r.extra and r.name not in ELSEWHERE]
    wrong = {r: problem for r in wanted if (problem := _problem(r))}
    if wrong:
        problems = ", ".join(f"{r.name} {problem}" for r, problem in wrong.items())
        return Check(name, "fail", problems, f"`pip install {' '.join(map(str, wrong))}`")
    return Check(name, "ok", seen)


def demo_packages(name: str) -> Check:
    if _distribution() is None:
        return Check(name, "note", "unknown", UNKNOWN)
    wanted = [r for r in requirements() if r.extra == "demo"]
    wrong = {r: problem for r in wanted if (problem := _problem(r))}
    if wrong:
        problems = ", ".join(f"{r.name} {problem}" for r, problem in wrong.items())
        return Check(name, "warn", problems, f"`pip install {' '.join(map(str, wrong))}`, or the demo cannot run")
    return Check(name, "ok", ", ".join(f"{r.name} {_version(r.name)}" for r in wanted))


def requirements() -> list[Requirement]:
    """From lines such as `torch>=2.10` and `gguf; extra == "demo"`. For what users run, pyproject.toml sets floors and
    nothing else; developers' extras (tests, and benchmarks, which pin what they compare with) are left out."""
    mine = _distribution()
    found = []
    for line in (mine.requires if mine is not None else None) or []:
        what, _, marker = line.partition(";")
        condition = re.fullmatch(r"""\s*(?:extra\s*==\s*["'](\w+)["'])?\s*""", marker)
        extra = re.search(r"""\bextra\s*==\s*["'](\w+)["']""", marker)
        if extra is not None and extra[1] not in USED:
            continue
        parts = re.fullmatch(r"([\w.-]+)\s*(?:\[.*\])?\s*(?:>=\s*([\w.]+))?\s*", what)
        if parts is None or condition is None:
            raise ValueError(f"the requirement {line!r} is more than a floor")
        found.append(Requirement(parts[1], parts[2] or "", condition[1] or ""))
    return found


def shadowing(name: str) -> Check:
    found = {package: path for package in HIDEABLE if (path := hiding(package))}
    if found:
        seen = ", ".join(f"{path} hides the package {package}" for package, path in found.items())
        return Check(name, "warn", seen, "rename or remove that, or take its folder off PYTHONPATH")
    return Check(name, "ok", f"nothing hides {', '.join(HIDEABLE)}")


def hiding(package: str) -> Path | None:
    """What would be imported under that name and is not the installed package. Folders without __init__ cannot be."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return origin
    if '"editable"' in (installed.read_text("direct_url.json") or ""):
        return None
    return None if origin.resolve().is_relative_to(Path(str(installed.locate_file(""))).resolve()) else origin


def _problem(wanted: Requirement) -> str:
    version = _version(wanted.name)
    if version is None:
        return "is missing"
    too_old = wanted.floor and _numbers(version) < _numbers(wanted.floor)
    return f"{version} is older than {wanted.floor}" if too_old else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _distribution() -> metadata.Distribution | None:
    try:
        return metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """ "2.10.0+cpu" -> [2, 10]: zeros at the end mean nothing."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
