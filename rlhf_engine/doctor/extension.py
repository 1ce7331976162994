"""The compiled extension as it lies on the disk, and the tools that make it. Whether it loads: trials.py."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil

from rlhf_engine.doctor.check import Check
from rlhf_engine.doctor.packages import PACKAGE, ROOT, install_again, is_checkout

LIBRARY, INFO = PACKAGE / "_C.so", PACKAGE / "_C.json"  # as in native.py, which is below ops, and ops imports torch
# Words of the reasons that setup.py leaves, and what to do before building again.
FIRST = {
    "no C++ compiler": "install a C++ compiler (`apt install g++`) or name it in CXX",
    "torch is not installed": "`pip install torch`",
    "no stable ABI headers": "`pip install --upgrade torch`",
    "ninja is not installed": "`pip install ninja`",
    "pybind11 is not installed": "`pip install pybind11`",
    "command failed": "mend what the compiler names (`pip install -v` shows all of it)",
}


def build_tools(name: str) -> Check:
    ninja = importlib.util.find_spec("ninja")
    found = {"C++ compiler": compiler(), "nvcc": nvcc(), "ninja": "ninja" if ninja is not None else None}
    seen = ", ".join(path or f"no {tool}" for tool, path in found.items())
    commands = {"C++ compiler": "`apt install g++`", "ninja": "`pip install ninja`"}
    lacking = [command for tool, command in commands.items() if not found[tool]]
    if lacking:
        return Check(name, "note", seen, f"{' and '.join(lacking)}, if the extension is to be built here")
    return Check(name, "ok", seen)


def compiler() -> str | None:
    """As setup.py looks for it; so does nvcc()."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(shlex.split(name)[0]))), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def on_disk(name: str) -> Check:
    try:
        info = build_info()
    except ValueError:
        return Check(name, "fail", f"{INFO} is damaged", f"build it again: {install_again()}")
    if not LIBRARY.exists():
        return _not_there(name, info.get("not_built", ""))
    seen = f"{info.get('compiler', 'unknown compiler')}, torch {info.get('torch', 'unknown')}"
    seen += f", CUDA for {info['targets']}" if info.get("targets") else ", no CUDA code"
    if is_checkout() and info.get("sources", _sources()) != _sources():
        fix = f"`make setup` in {ROOT}, or {install_again()}"
        return Check(name, "warn", f"made of other sources than {ROOT / 'csrc'} holds now", fix)
    if nvcc() and not info.get("nvcc"):
        why = " ".join(info.get("cuda_not_built", "").split())[-200:]
        seen += f", although there is {nvcc()}" + (f": {why}" if why else "")
        return Check(name, "warn", seen, f"build it again, with a newer CUDA toolkit if it failed: {install_again()}")
    return Check(name, "ok", seen)


def build_info() -> dict[str, str]:
    """How the library was built, or why it was not; empty if nobody tried."""
    info: dict[str, str] = json.loads(INFO.read_text()) if INFO.exists() else {}
    return info


def has_cuda_code() -> bool:
    return LIBRARY.exists() and bool(build_info().get("nvcc"))


def _not_there(name: str, reason: str) -> Check:
    if not reason:
        return Check(name, "warn", f"never built: there is no {LIBRARY}", f"build it: {install_again()}")
    lines = [line.strip() for line in reason.splitlines()]
    told = [lines[0], *[line for line in lines[1:] if "error" in line.lower()][:1]]  # a compiler's output is long
    seen = f"not built: {' '.join(told)[:300]}"
    if "no C++ compiler" in reason and compiler():
        return Check(name, "warn", f"{seen}, but now there is {compiler()}", install_again())
    first = next((f"{what}, then " for words, what in FIRST.items() if words in reason), "")
    return Check(name, "warn", seen, first + install_again())


def _sources() -> str:
    """What setup.py keeps of them: times would miss a file that was put back."""
    files = sorted((ROOT / "csrc").iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
