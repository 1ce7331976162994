"""`rlhf doctor`: every broken state is made for real where that is possible, and must be told together with its fix.

Most runs put a `torch` that refuses to be imported first on the path, so that only the part before torch takes time.
What needs the real torch is tried in this process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlhf_engine
from rlhf_engine import cli, doctor, fetch, metrics, native
from rlhf_engine.doctor import extension, machine, packages, probes, trials
from rlhf_engine.doctor.check import Check, attempt
from rlhf_engine.ops import backends

ROOT = Path(__file__).parents[1]
PACKAGE = Path(rlhf_engine.__file__).parent
AGAIN = "pip install --no-build-isolation"
BUILT = {"compiler": "g++ 12", "torch": "2.13.0", "nvcc": "release 13.0", "targets": "sm_90a"}
Checks = dict[str, Check]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the package, without its extension, beside a torch that does not import."""
    unwanted = shutil.ignore_patterns("__pycache__", "_C.*")
    shutil.copytree(PACKAGE, tmp_path / "copy/rlhf_engine", ignore=unwanted)
    write(tmp_path / "broken/torch/__init__.py", "raise ImportError('broken on purpose')")
    (tmp_path / "empty").mkdir()
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def library(place: Path, info: dict[str, str] | None) -> None:
    write(place / "copy/rlhf_engine/_C.so", "not a library")
    write(place / "copy/rlhf_engine/_C.json", json.dumps(info))


def metadata(place: Path, *requirements: str, version: str = rlhf_engine.__version__, python: str = ">=3.10") -> None:
    lines = ["Metadata-Version: 2.4", "Name: rlhf_engine", f"Version: {version}", f"Requires-Python: {python}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    write(place / f"copy/rlhf_engine-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def command(place: Path, *words: str, path: tuple[str, ...] = ("broken", "copy"), **env: str) -> Any:
    places = os.pathsep.join(str(place / name) for name in path)
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "RLHF_CACHE")}
    typed = [sys.executable, "-m", "rlhf_engine", "doctor", *words]
    kept |= {"PYTHONPATH": places, "PYTHONUNBUFFERED": ""} | env
    return subprocess.run(typed, cwd=place / "empty", env=kept, capture_output=True, text=True)


def found(place: Path, **options: Any) -> Checks:
    done = command(place, "--json", **options)
    told = json.loads(done.stdout)
    checks = [Check(**check) for check in told["checks"]]
    assert done.returncode == (0 if told["whole"] else 1) and "Traceback" not in done.stderr, done.stderr
    assert told["whole"] == all(check.status != "fail" for check in checks)
    return {check.name: check for check in checks}


def holds(check: Check, status: str, seen: str = "", fix: str = "") -> None:
    assert check.status == status and seen in check.seen and fix in check.fix, check


def test_without_torch_the_rest_is_told_first(place: Path) -> None:
    done = command(place)
    assert done.returncode == 1 and not done.stderr
    before, after = done.stdout.split("tried with torch")
    assert all(f"  {name}  " in before for name in doctor.SEEN)
    assert "import torch raised ImportError: broken on purpose" in after and str(place / "broken") in after
    write(place / "broken/torch/__init__.py", "import os; os._exit(7)")  # not even an exception: a crash
    done = command(place)
    assert done.returncode == 7 and done.stdout.endswith("\ntried with torch\n")
    assert all(f"  {name}  " in done.stdout for name in doctor.SEEN)


def test_answers_at_once() -> None:
    """In seconds of this process, which other work on the machine does not lengthen."""
    script = (
        "import time; start = time.process_time(); from rlhf_engine import doctor; list(doctor.without_torch())\n"
        "import sys; print(time.process_time() - start, 'torch' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(5)]
    answers = [run.stdout.split() for run in runs]
    assert {heavy for _, heavy in answers} == {"False"}
    assert min(float(seconds) for seconds, _ in answers) < 0.3


REASONS = [
    ("torch is not installed in the building environment; ...", "`pip install torch`"),
    ("the torch in /x has no stable ABI headers; torch 2.10 or later has", "--upgrade torch"),
    ("ninja is not installed in the building environment; ...", "`pip install ninja`"),
    ("something new", ""),
]


@pytest.mark.parametrize("reason, first", REASONS)
def test_extension_not_built(reason: str, first: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "LIBRARY", place / "_C.so")
    monkeypatch.setattr(extension, "INFO", write(place / "_C.json", json.dumps({"not_built": reason})))
    holds(extension.on_disk("extension"), "warn", f"not built: {reason}", first)
    assert AGAIN in extension.on_disk("extension").fix


def test_every_reason_of_setup_has_its_fix() -> None:
    raised = [line for line in (ROOT / "setup.py").read_text().splitlines() if "raise NotBuilt(" in line]
    assert len(raised) >= 5
    for line in raised:
        assert any(words in line for words in extension.FIRST), line


@pytest.mark.parametrize(
    "compiler, seen, fix",
    [("no-such", "no C++ compiler", "apt install g++"), ("false", "command failed", "pip install -v")],
)
def test_extension_that_could_not_be_compiled(compiler: str, seen: str, fix: str, place: Path) -> None:
    """The reason that setup.py really leaves. In a checkout the command names its folder."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "copy")
    shutil.copytree(ROOT / "csrc", place / "copy/csrc")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=place / "copy", env=os.environ | {"CXX": compiler}, capture_output=True, check=True)
    check = found(place, PATH="")["extension"]
    holds(check, "warn", seen, fix)
    assert f"{AGAIN} -e {place / 'copy'}" in check.fix
    if compiler == "no-such":
        later = write(place / "bin/g++", "#!/bin/sh\n")
        later.chmod(0o755)
        check = found(place, PATH=str(place / "bin"))["extension"]
        assert f"now there is {later}" in check.seen and check.fix.startswith(f"`{AGAIN}")
    else:
        library(place, BUILT | {"sources": "others"})
        holds(found(place)["extension"], "warn", "made of other sources than", "`make setup`")


def test_extension_never_built_or_unreadable(place: Path) -> None:
    checks = found(place, PATH="")
    holds(checks["extension"], "warn", "never built", AGAIN)
    holds(checks["build tools"], "note", "no C++ compiler, no nvcc", "apt install g++")
    library(place, None)
    write(place / "copy/rlhf_engine/_C.json", "{half")
    checks = found(place)
    holds(checks["extension"], "fail", "_C.json is damaged", AGAIN)


def test_extension_without_cuda_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "LIBRARY", place / "copy/rlhf_engine/_C.so")
    monkeypatch.setattr(extension, "INFO", place / "copy/rlhf_engine/_C.json")
    monkeypatch.setenv("PATH", str(place / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    library(place, BUILT)
    holds(extension.on_disk("x"), "ok", "g++ 12, torch 2.13.0, CUDA for sm_90a")
    library(place, BUILT | {"nvcc": "", "targets": ""})
    holds(extension.on_disk("x"), "ok", "no CUDA code")
    nvcc = write(place / "bin/nvcc", "#!/bin/sh\n")
    nvcc.chmod(0o755)
    holds(extension.on_disk("x"), "warn", f"no CUDA code, although there is {nvcc}", AGAIN)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(place))
    holds(extension.on_disk("x"), "warn", f"there is {nvcc}", AGAIN)


def test_extension_is_looked_for_where_it_is() -> None:
    assert (
        extension.LIBRARY == native.LIBRARY.resolve()
        and extension.INFO == native.LIBRARY.with_suffix(".json").resolve()
    )
    assert extension.build_info() == native.build_info()


@pytest.fixture
def loading() -> Iterator[None]:
    native.why_missing.cache_clear()
    yield
    native.why_missing.cache_clear()


def test_extension_that_does_not_load(loading: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY", write(tmp_path / "_C.so", "garbage"))
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        check = trials.extension_loads("extension loads")
    holds(check, "fail", "_C.so: file too short", AGAIN)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to make an outdated library with")
def test_extension_that_lacks_operators(place: Path) -> None:
    """It loads, but it comes from older sources: nothing of ops can be imported."""
    source = write(place / "old.cpp", "")
    subprocess.run(["g++", "-shared", source, "-o", place / "copy/rlhf_engine/_C.so"], check=True)
    script = (
        "from rlhf_engine.doctor import trials; skip = lambda name: trials.Check(name, 'ok', '')\n"
        "trials.triton = trials.transformers = skip  # they take seconds\n"
        "for check in trials.checks(): print(check.name, check.status, check.seen, check.fix, sep='; ')"
    )
    env = os.environ | {"PYTHONPATH": str(place / "copy")}
    done = subprocess.run([sys.executable, "-c", script], cwd=place / "empty", env=env, capture_output=True, text=True)
    lines = {line.split("; ")[0]: line for line in done.stdout.splitlines()}
    assert "fail; import rlhf_engine.ops raised ImportError: rlhf_engine/_C.so is of another version" in lines["ops"]
    assert AGAIN in lines["ops"], done.stdout + done.stderr
    assert "denormals" in lines and "gae" not in lines


def test_packages(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors come from the metadata, here with ones that nothing meets."""
    metadata(place, "transformers>=99.1", "safetensors >=0.1", "no-such-package", "torch[x]>=2", python=">=3.99")
    checks = found(place)
    assert checks.keys() > set(doctor.SEEN)
    holds(checks["packages"], "fail", "is older than 99.1, no-such-package is missing")
    assert checks["packages"].fix == '`pip install "transformers>=99.1" no-such-package`'
    holds(checks["Python"], "fail", "3.99 is needed", "Python 3.99 or later")
    metadata(place, 'no-such-demo; extra == "demo"')
    monkeypatch.syspath_prepend(place / "copy")
    holds(packages.demo_packages("x"), "warn", "no-such-demo is missing", "`pip install no-such-demo`")
    metadata(place, "torch<3")
    holds(attempt("x", packages.packages), "fail", "'torch<3' is more than a floor", "report it")


KEYS = ("dependencies", "demo", "test", "bench")


def as_metadata(line: str, key: str) -> str:
    """A line of pyproject.toml as setuptools writes it into the metadata."""
    what, _, marker = line.partition("; ")
    markers = [marker] * bool(marker) + [f'extra == "{key}"'] * (key != "dependencies")
    return "; ".join([what] + [" and ".join(markers)] * bool(markers))


def test_the_requirements_of_pyproject_are_understood(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lists = {key: re.findall('^    "(.*?)"', text.split(f"\n{key} = [")[1].split("\n]")[0], re.M) for key in KEYS}
    assert all(len(lines) > 2 for lines in lists.values())
    metadata(place, *(as_metadata(line, key) for key, lines in lists.items() for line in lines))
    monkeypatch.syspath_prepend(place / "copy")
    read = packages.requirements()
    assert {("torch", "2.10", ""), ("jsonargparse", "4.49", ""), ("gguf", "", "demo")} <= {
        (r.name, r.floor, r.extra) for r in read
    }
    assert len(read) == len(lists["dependencies"]) + len(lists["demo"]) and "trl" not in {r.name for r in read}
    holds(packages.packages("packages"), "ok", f"torch {torch.__version__}")


@pytest.mark.parametrize(
    "older, newer", [("2.9", "2.10"), ("5.5.2.dev1", "5.5.3"), ("1", "1.0.1"), ("2.12.1+cpu", "2.13.0+cpu")]
)
def test_versions_compare_by_number(older: str, newer: str) -> None:
    assert packages._numbers(older) < packages._numbers(newer)
    assert packages._numbers("2.10.0+cu130") == packages._numbers("2.10")


def test_copies(place: Path) -> None:
    metadata(place, version="0.0.9")
    checks = found(place, path=("broken", "copy", "empty"))
    if "another copy" not in checks["rlhf_engine"].seen:  # else this environment holds an editable install
        holds(checks["rlhf_engine"], "warn", "its metadata says 0.0.9", AGAIN)
    write(place / "second/rlhf_engine/__init__.py", "")
    check = found(place, path=("broken", "copy", "second"))["rlhf_engine"]
    holds(check, "warn", "another copy in", "PYTHONPATH")  # an editable install is one, too
    assert str(place / "second/rlhf_engine") in check.seen


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_distribution", lambda: None)
    monkeypatch.setattr(packages, "_copies", lambda: {packages.PACKAGE})
    holds(packages.this_package("x"), "warn", "not installed", AGAIN)
    for look in (packages.packages, packages.demo_packages):
        holds(look("x"), "note", "", "install rlhf_engine")
    holds(packages.python("x"), "ok", sys.executable)


def test_shadowing(place: Path) -> None:
    (
        place / "empty/kernels"
    ).mkdir()  # a folder without __init__ hides nothing; python -m finds it, since it runs there
    check = found(place)["shadowing"]
    assert str(place / "broken/torch/__init__.py") in check.seen and "kernels/" not in check.seen
    write(place / "empty/kernels/__init__.py", "")
    holds(found(place)["shadowing"], "warn", "kernels/__init__.py hides the package kernels", "rename or remove")


def test_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = place / "cache"
    monkeypatch.setenv("RLHF_CACHE", str(cache))
    holds(machine.demo_data("x"), "note", f"{fetch.MODEL}, {fetch.REVIEWS}", "`rlhf fetch`")
    holds(machine.cache("x"), "ok", str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=700_000_000))
    holds(machine.cache("x"), "warn", "0.7 GB free, and what is to be fetched needs 0.8", "RLHF_CACHE")
    for folder in (f"models/{fetch.MODEL}", f"data/{fetch.REVIEWS}"):
        write(cache / folder / "a.txt", "four")
        write(cache / folder / "manifest.json", '{"files": {"a.txt": {"bytes": 4}}}')
    holds(machine.demo_data("x"), "ok")
    holds(machine.cache("x"), "ok")
    monkeypatch.setenv("RLHF_CACHE", str(write(place / "file", "") / "below"))
    holds(machine.cache("x"), "warn", "cannot be written to", "set RLHF_CACHE")


def test_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(machine.memory("x"), machine.memory("x").status, "GB free of")
    monkeypatch.setattr(machine, "LIMITS", (write(tmp_path / "limit", "1000000000\n"),))
    holds(machine.memory("x"), "warn", "limited to 1.0", "--preset tiny")
    monkeypatch.setattr(machine, "BFLOAT16", set())
    if Path("/proc/cpuinfo").exists():
        holds(machine.processor("x"), "note", "no bfloat16 instructions", "float32")
    monkeypatch.setattr(machine, "QUOTA", str(write(tmp_path / "quota", "150000 100000\n")))
    assert machine.cores() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    holds(trials.threads("x"), "warn", "2 threads on 1 cores", "OMP_NUM_THREADS=1")


@pytest.mark.parametrize("look, module", [(trials.triton, "triton"), (trials.transformers, "transformers")])
def test_imports(look: Callable[[str], Check], module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = "warn" if module == "triton" else "fail"
    monkeypatch.setitem(sys.modules, module, None)
    holds(look("x"), status, "", "pip install")
    write(tmp_path / module / "__init__.py", "raise RuntimeError('wrong\\nversion')")
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    holds(look("x"), status, "RuntimeError: wrong version", "pip install")


def test_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    holds(trials.torch_imports("x"), "ok", torch.__version__)
    for error, fix in (
        (ModuleNotFoundError("x", name="torch"), "pip install torch"),
        (OSError("x"), "--force-reinstall"),
    ):
        monkeypatch.setattr(trials, "hiding", lambda name: None)
        monkeypatch.setitem(sys.modules, "torch", Raising(error))
        holds(trials.torch_imports("x"), "fail", "raised", fix)


class Raising:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> bool:
        warnings.warn("the driver is too old", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(trials, "_has_driver", lambda: False)
    holds(trials.cuda("x"), "ok", "no device")
    monkeypatch.setattr(trials, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    holds(trials.cuda("x"), "warn", "built for CPUs", "CUDA build of torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    holds(trials.cuda("x"), "warn", "sees no device (the driver is too old)", "update the driver to one for CUDA 13.0")
    card = SimpleNamespace(name="H100", total_memory=80e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    holds(trials.cuda("x"), "ok", "H100 (80 GB, sm_90)")


def test_cuda_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_TABLE", {"gae": {"reference": len}, "whiten": {"reference": len, "cuda": len}})
    monkeypatch.setattr(trials, "has_cuda_code", lambda: False)
    holds(trials.cuda_backends("x"), "warn", "none for gae:", "nvcc")
    monkeypatch.setattr(trials, "has_cuda_code", lambda: True)
    holds(trials.cuda_backends("x"), "note", "none for gae:", "nothing to install")
    del backends._TABLE["gae"]
    holds(trials.cuda_backends("x"), "ok", "every op")


def test_denormals() -> None:
    holds(trials.denormals("x"), "ok")
    assert torch.set_flush_denormal(True)
    try:
        check = trials.denormals("x")
    finally:
        torch.set_flush_denormal(False)
    holds(check, "warn", "1e-40 becomes 0", "-ffast-math")


def test_every_op_is_tried() -> None:
    assert probes.PROBES.keys() == set(backends.names())
    for op in backends.names():
        check = trials.op_is_right(op)
        holds(check, "ok", f"CPU {backends.chosen(op, 'cpu')}")
        assert f"  {', '.join(backends.available(op, 'cpu'))}: " in check.seen


@pytest.mark.parametrize("op", backends.names())
def test_a_wrong_backend_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one part in ten thousand, or not a number, or broken."""
    plain = backends._TABLE[op]["reference"]

    def spoilt(factor: float) -> Callable[..., Any]:
        def run(*tensors: Any, **options: Any) -> Any:
            out = plain(*tensors, **options)
            if isinstance(out, torch.Tensor):
                return out * factor
            if isinstance(out, tuple):
                return out[0] * factor, *out[1:]
            out.advantages *= factor
            return out

        return run

    def broken(*tensors: Any, **options: Any) -> Any:
        raise RuntimeError("illegal instruction")

    for backend, seen in ((spoilt(1.0001), "cpu is off by"), (spoilt(float("nan")), "nan"), (broken, "cpu raised")):
        monkeypatch.setitem(backends._TABLE[op], "cpu", backend)
        holds(trials.op_is_right(op), "fail", seen, 'backend="reference"')


def test_chosen_is_what_select_takes() -> None:
    for op in backends.names():
        for device in ("cpu", "cuda", "mps"):
            assert backends.select(op, None, device) is backends._TABLE[op][backends.chosen(op, device)]
        assert set(backends.available(op, "cpu")) == set(backends.available(op)) - {"cuda", "triton"}
        assert {"reference", backends.chosen(op, "cpu")} <= set(backends.available(op, "cpu"))


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    checks = [
        Check("a", "ok", "fine"),
        Check("linear_policy_loss", "warn", "slow " * 40, "mend it, " * 4 + "`then run this`"),
    ]
    monkeypatch.setattr(doctor, "without_torch", lambda: iter(checks[:1]))

    def with_torch() -> Iterator[Check]:
        print("a library says hello")
        yield from checks[1:]

    monkeypatch.setattr(doctor, "with_torch", with_torch)
    return checks


def test_lines(stubbed: list[Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "\033" not in text and lines[-1] == "nothing failed: 1 warn, 1 ok"
    at = lines[1].index("fine")
    assert any(line[at:].startswith("slow") and line[:at].split() == ["warn", "linear_policy_loss"] for line in lines)
    assert " " * at + "fix: mend it, mend it, mend it, mend it," in lines and " " * at + "`then run this`" in lines
    monkeypatch.setattr(metrics, "is_terminal", lambda stream: True)
    stubbed.append(attempt("b", lambda name: Check(name, "fail", str(1 / 0))))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "\033[1;31mfail\033[0m  b " in text and "ZeroDivisionError:" in text
    assert text.endswith("something failed: 1 fail, 1 warn, 1 ok\n")


def test_json_is_all_there_is(stubbed: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["whole"] and told["checks"][0] == {"name": "a", "status": "ok", "seen": "fine", "fix": ""}
    assert "hello" in err
    stubbed.append(Check("b", "fail", ""))
    assert cli.main(["doctor", "--json"]) == 1 and not json.loads(capsys.readouterr().out)["whole"]


@pytest.mark.parametrize("typed", ["doctor --jsn", "doctor now"])
def test_mistakes(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(typed.split()) == 2
    assert capsys.readouterr().err.startswith("rlhf doctor: doctor takes --json")


def test_a_whole_run_fails_nowhere_and_writes_nothing(place: Path) -> None:
    for name in ("_C.so", "_C.json"):
        if (PACKAGE / name).exists():
            shutil.copy2(PACKAGE / name, place / "copy/rlhf_engine")
    env = {"HOME": str(place / "empty"), "TMPDIR": str(place / "empty"), "PYTHONDONTWRITEBYTECODE": ""}
    assert (
        command(place, "--help", **env).returncode == 0
    )  # as any command does, this leaves __pycache__ of rlhf_engine.cli
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    checks = found(place, path=("copy",), **env)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert not [check for check in checks.values() if check.status == "fail"]
    assert checks.keys() >= {*doctor.SEEN, "torch", "CUDA", "denormals", *backends.names()}
    assert ("extension loads" in checks) == native.LIBRARY.exists()
