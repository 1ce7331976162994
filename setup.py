"""Builds the optional extension rlhf_engine/_C.so from csrc/, and beside it _raw; everything else is in pyproject.toml.

The extension is compiled against the headers of the torch that is installed (LibTorch's stable ABI; hence
--no-build-isolation), with CUDA kernels where there is an nvcc, whether or not there is a GPU. Without torch or a C++
compiler, or if a compiler fails, the package installs without it: the reason is printed and kept in
rlhf_engine/_C.json, where `python -m rlhf_engine.native` finds it. pip hides what a build prints unless it is given -v.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp") if path.name != "python.cpp")
KERNELS = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cu"))
ONLY_WITH_CUDA = {"csrc/bindings_cuda.cpp"}
PYTHON_SIDE = "csrc/python.cpp"
SONAME = "rlhf_engine._C"  # other packages have a _C.so, too
# Only functions that torch 2.10 has: the result then loads into any later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
# No -ffast-math: linking with it makes the whole process flush denormals. No contraction into fused multiply-adds: the
# bits are then the same on every CPU. No -march=native: wheels travel. -fno-trapping-math and -fno-math-errno let
# conditions become vector code; they change no result.
FLAGS = [
    "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno",
    "-Wall", "-Wextra", "-Wno-unused-parameter",
]  # fmt: skip
TARGETS = ("80", "90a", "100")
CUDA_FLAGS = [
    "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--fmad=false", "--threads", "2",
    *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS),
]  # fmt: skip


WHERE = "in the building environment; install it and use --no-build-isolation"


class NotBuilt(Exception):
    """The extension cannot be built here; the message says why and what to do."""


def find_torch() -> Path:
    """The folder of the installed torch, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt(f"torch is not installed {WHERE}")
    folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise NotBuilt(f"the torch in {folder} has no stable ABI headers; torch 2.10 or later has")
    return folder


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):  # CXX may be two words: "ccache g++"
            return name
    raise NotBuilt(f"no C++ compiler found (looked for {', '.join(names)})")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def word(path: Path) -> str:
    """A path in a command."""
    return shlex.quote(str(path)).replace("$", "$$")


def node(path: Path | str) -> str:
    """A path in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def plan(library: Path, objects: Path, torch: Path, compiler: str, nvcc: str | None) -> str:
    """What ninja is to do, in its language."""
    include = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {word(torch / 'include')}"
    # --no-as-needed keeps libtorch.so among the needed libraries: where it is a CUDA build it brings CUDA with it.
    libraries = f"-L{word(torch / 'lib')} -ltorch -ltorch_cpu -lc10"
    cuda_link = f"{nvcc} -shared -cudart static -Xlinker --no-as-needed,-soname={SONAME} {libraries}"
    link = cuda_link if nvcc else f"{compiler} -shared -Wl,--no-as-needed,-soname={SONAME} {libraries}"
    lines = [
        "rule cxx",
        f"  command = {compiler} {' '.join(FLAGS)} {include} -MMD -MF $out.d -c $in -o $out # $content",
        "  depfile = $out.d",
        "rule cuda",
        f"  command = {nvcc} {' '.join(CUDA_FLAGS)} -MMD -MF $out.d -c $in -o $out # $content",
        "  depfile = $out.d",
        "rule link",
        f"  command = {link.replace(' -L', ' $in -L', 1)} -o $out",
    ]
    sources = [*SOURCES, *KERNELS] if nvcc else [s for s in SOURCES if s not in ONLY_WITH_CUDA]
    headers = [file for file in sorted((ROOT / "csrc").iterdir()) if file.suffix in (".h", ".cuh")]
    made = []
    for source in sources:
        made.append(node(objects / f"{Path(source).name}.o"))
        lines.append(f"build {made[-1]}: {'cuda' if source in KERNELS else 'cxx'} {node(ROOT / source)}")
        # Ninja compiles again where the command is another: so too after a source was put back with its old time.
        lines.append(f"  content = {digest(ROOT / source, *headers)}")
    return "\n".join(
        [*lines, f"build {node(library)}: link {' '.join(made)}", *plan_python(library, compiler, nvcc), ""]
    )


def plan_python(library: Path, compiler: str, nvcc: str | None) -> list[str]:
    """The module that benchmarks use, for this Python alone. It needs _C.so, loaded before it and known by SONAME."""
    import pybind11

    targets = ",".join(f'"sm_{target}"' for target in TARGETS)
    flags = [*FLAGS, *(f"-isystem {word(Path(x))}" for x in (pybind11.get_include(), sysconfig.get_path("include")))]
    flags += [f"'-DRLHF_CUDA={targets}'"] if nvcc else []
    return [
        "rule python",
        f"  command = {compiler} {' '.join(flags)} -shared $in -o $out",
        f"build {node(raw_module(library))}: python {node(ROOT / PYTHON_SIDE)} {node(library)}",
    ]


def raw_module(library: Path) -> Path:
    return library.with_name(f"_raw{sysconfig.get_config_var('EXT_SUFFIX')}")


def ninja(objects: Path, target: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(objects), "-v", str(target)], capture_output=True, text=True, cwd=ROOT
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise NotBuilt(f"a compiler's command failed:\n{(done.stdout + done.stderr)[-4000:]}")


def compile_all(library: Path, objects: Path) -> dict[str, str]:
    """csrc/ -> library; returns what there is to know about the build."""
    torch, compiler, nvcc = find_torch(), find_compiler(), find_nvcc()
    library, objects = library.absolute(), objects.absolute()
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("ninja") is None:
        raise NotBuilt(f"ninja is not installed {WHERE}")
    if importlib.util.find_spec("pybind11") is None:
        raise NotBuilt(f"pybind11 is not installed {WHERE}")
    info = {}
    try:
        (objects / "build.ninja").write_text(plan(library, objects, torch, compiler, nvcc))
        ninja(objects, library)
    except NotBuilt as reason:
        if not nvcc:
            raise
        info["cuda_not_built"] = str(reason)  # as by an nvcc older than a target; the CPU's part needs none
        nvcc = None
        (objects / "build.ninja").write_text(plan(library, objects, torch, compiler, nvcc))
        ninja(objects, library)
    info |= {
        "sources": digest(*sorted((ROOT / "csrc").iterdir())),
        "compiler": version_of(compiler), "flags": " ".join(FLAGS), "torch": importlib.metadata.version("torch"),
        "nvcc": version_of(nvcc) if nvcc else "", "targets": " ".join(f"sm_{t}" for t in TARGETS) if nvcc else "",
    }  # fmt: skip
    try:
        ninja(objects, raw_module(library))
    except NotBuilt as reason:  # as where Python came without its headers: only benchmarks want it
        info["raw_not_built"] = str(reason)
    return info


def version_of(compiler: str) -> str:
    """nvcc says it on its last but one line, others on the first."""
    lines = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in reversed(lines) if "release" in line), lines[0] if lines else "unknown")


class BuildNative(build_ext):
    info: dict[str, str]

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_C":
            return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python version in its name
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        package = ROOT / "rlhf_engine" if self.inplace else Path(self.build_lib, "rlhf_engine")
        for old in (package / "_C.so", raw_module(package / "_C.so")):
            old.unlink(missing_ok=True)  # a failed build must not leave the previous one in place
        super().run()
        (package / "_C.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._raw"):
            return  # made together with _C
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)
        try:
            self.info = compile_all(library, Path(self.build_temp))
        except NotBuilt as reason:
            self.info = {"not_built": str(reason)}
            print(f"\n*** rlhf_engine: native extension NOT BUILT: {reason}\n*** Installing without it.\n", flush=True)


setup(
    ext_modules=[
        Extension("rlhf_engine._C", sources=[*SOURCES, *KERNELS], optional=True),
        Extension("rlhf_engine._raw", sources=[PYTHON_SIDE], optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for every Python 3
)
