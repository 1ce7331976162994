"""What is shipped: a wheel built from a clean copy, imported from elsewhere; and the checkout beside transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
FOLDERS = ("csrc", "kernels", "bench", "rlhf_engine")
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", *FOLDERS)


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_sources(to: Path) -> Path:
    """A copy, since building in the checkout would leave, and pick up, old build results."""
    built = shutil.ignore_patterns("__pycache__", "_C.*", "_raw.*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=built)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)
    return to


def build_wheel(source: Path, to: Path, **env: str) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(to), cwd=source, **env)
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy_sources(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q")
    run(*pip, "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


def test_wheel_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "rlhf_engine/py.typed" in names and "rlhf_engine/_C.json" in names
    assert {f"rlhf_engine/kernels/{name}.py" for name in KERNELS} <= names
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_engine/templates").glob("*.j2")}
    assert templates <= names
    assert "rlhf_engine/bench/command.py" in names and not [name for name in names if "/bench/tools" in name]
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"rlhf_engine"}, f"the wheel must install one top-level name, not {top}"


def test_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    lines = ["import rlhf_engine, rlhf_engine.config, rlhf_engine.types, importlib"]
    lines += [f"assert importlib.import_module('rlhf_engine.kernels.{name}')" for name in KERNELS]
    lines += ["from rlhf_engine import native", "print(rlhf_engine.__file__)", "print(native.why_missing())"]
    path, missing = run(sys.executable, "-c", "\n".join(lines), cwd=tmp_path, PYTHONPATH=str(installed)).split("\n")[:2]
    assert Path(path).is_relative_to(installed), "the test imported another copy"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if any(map(shutil.which, compilers)):
        assert not missing, missing
        assert (installed / "rlhf_engine/_C.so").exists()
    else:
        assert "no C++ compiler" in missing


@pytest.mark.parametrize("compiler, reason", [("false", "command failed"), ("no-such-compiler", "no C++ compiler")])
def test_installs_without_the_extension(compiler: str, reason: str, tmp_path: Path) -> None:
    """Neither a missing nor a failing compiler stops the install, and both leave the reason behind."""
    (tmp_path / "source").mkdir()
    wheel = build_wheel(copy_sources(tmp_path / "source"), tmp_path / "wheel", CXX=compiler)
    with zipfile.ZipFile(wheel) as archive:
        assert "rlhf_engine/_C.so" not in archive.namelist()
        assert reason in archive.read("rlhf_engine/_C.json").decode()


def test_transformers_builds_a_model_from_the_repository_root() -> None:
    """transformers imports a package named `kernels` if it finds one; ours, first on sys.path here, must not be it."""
    script = (
        "import sys; assert sys.path[0] == ''\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,\n"
        "                     num_attention_heads=2)\n"
        "AutoModelForCausalLM.from_config(config)"
    )
    run(sys.executable, "-c", script, cwd=ROOT)


@pytest.mark.long
def test_a_failing_nvcc_costs_the_cuda_code_alone(tmp_path: Path) -> None:
    """As one older than a target; in a folder with a space, by a compiler of two words."""
    toolkit, source = tmp_path / "toolkit/bin", tmp_path / "a folder"
    toolkit.mkdir(parents=True)
    source.mkdir()
    (toolkit / "nvcc").write_text(
        '#!/bin/sh\n[ "$1" = --version ] || { echo "Unsupported gpu architecture"; exit 1; }\n'
    )
    (toolkit / "nvcc").chmod(0o755)
    wheel = build_wheel(copy_sources(source), tmp_path / "wheel", CUDA_HOME=str(toolkit.parent), CXX="env g++")
    with zipfile.ZipFile(wheel) as archive:
        assert "rlhf_engine/_C.so" in archive.namelist()
        info = json.loads(archive.read("rlhf_engine/_C.json"))
    assert "Unsupported gpu architecture" in info["cuda_not_built"] and not info["targets"]
