"""Builds the optional extension rlhf_engine/_C.so from csrc/; everything else is in pyproject.toml.

The extension is compiled against the headers of the torch that is installed (LibTorch's stable ABI; hence
--no-build-isolation). Without torch or a C++ compiler, or if a compiler fails, the package installs without it: the
reason is printed and kept in rlhf_engine/_C.json, where `python -m rlhf_engine.native` finds it. pip hides what a build
prints unless it is given -v.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp"))
# Only functions that torch 2.10 has: the result then loads into any later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
# No -ffast-math: linking with it makes the whole process flush denormals. No contraction into fused multiply-adds: the
# bits are then the same on every CPU. No -march=native: wheels travel.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter"]


class NotBuilt(Exception):
    """The extension cannot be built here; the message says why and what to do."""


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("torch is not installed in the building environment; install it and use --no-build-isolation")
    folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise NotBuilt(f"the torch in {folder} has no stable ABI headers; torch 2.10 or later has")
    return folder


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if shutil.which(name):
            return name
    raise NotBuilt(f"no C++ compiler found (looked for {', '.join(names)})")


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise NotBuilt(f"this command failed: {' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")


def compile_all(library: Path, objects: Path) -> dict[str, str]:
    """csrc/*.cpp -> library; returns what there is to know about the build."""
    torch, compiler = find_torch(), find_compiler()
    library, objects = library.absolute(), objects.absolute()
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch / "include")]
    built = []
    for source in SOURCES:
        built.append(str(objects / Path(source).with_suffix(".o").name))
        run([compiler, *FLAGS, *include, "-c", source, "-o", built[-1]])
    # --no-as-needed keeps libtorch.so among the needed libraries: where it is a CUDA build it brings CUDA with it.
    libraries = ["-Wl,--no-as-needed", f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run([compiler, "-shared", "-fopenmp", *built, *libraries, "-o", str(library)])
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"compiler": version, "flags": " ".join(FLAGS), "torch": importlib.metadata.version("torch")}


class BuildNative(build_ext):
    info: dict[str, str]

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python version in its name

    def run(self) -> None:
        package = ROOT / "rlhf_engine" if self.inplace else Path(self.build_lib, "rlhf_engine")
        (package / "_C.so").unlink(missing_ok=True)  # a failed build must not leave the previous one in place
        super().run()
        (package / "_C.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)
        try:
            self.info = compile_all(library, Path(self.build_temp))
        except NotBuilt as reason:
            self.info = {"not_built": str(reason)}
            print(f"\n*** rlhf_engine: native extension NOT BUILT: {reason}\n*** Installing without it.\n", flush=True)


setup(
    ext_modules=[Extension("rlhf_engine._C", sources=SOURCES, optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for every Python 3
)
