"""`make gpu` without a GPU: its steps exist, its limits hold, it goes on where it stopped, and it does not lie."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine.bench import ops_cases
from rlhf_engine.bench.gpu import __main__ as gpu

ROOT = Path(__file__).parents[1]


def step(name: str, code: str, seconds: float = 20, **more: Any) -> gpu.Step:
    return gpu.Step(name, seconds, [sys.executable, "-c", code], **more)


def main(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: list[gpu.Step], *words: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(gpu, "steps", lambda rehearse: steps)
    monkeypatch.setattr(gpu, "CARRIED", tmp_path / "carried")
    for name in ("SITE", "ARCHIVES", "STATE", "KEPT"):
        monkeypatch.setattr(gpu, name, tmp_path / "build" / name.lower())
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("RLHF_COMMIT", "a-commit")
    code = gpu.main()
    found = json.loads((tmp_path / "out/summary.json").read_text())
    return code, {each["step"]: each for each in found["outcomes"]}


def test_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    lasting = f"import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 2; touch {marker}']); time.sleep(60)"
    steps = [
        step("fine", "print('first'); print('all is well')"),
        step("broken", "raise SystemExit('this is why')"),
        step("endless", lasting, seconds=1.0, file="other.txt"),
        step("armed", "print('never')", needs="no-such-tool"),
    ]
    code, found = main(monkeypatch, tmp_path, steps)
    assert code == 1 and {name: x["verdict"] for name, x in found.items()} == {
        "fine": "passed", "broken": "FAILED", "endless": "cut off", "armed": "skipped",
    }  # fmt: skip
    assert (found["fine"]["told"], found["broken"]["told"]) == ("all is well", "this is why")
    assert "no-such-tool is not on this machine" in capsys.readouterr().out
    assert "first" in (tmp_path / "out/log.txt").read_text() and (tmp_path / "out/other.txt").exists()
    time.sleep(2.0)
    assert not marker.exists()  # what a step started ends with it
    assert main(monkeypatch, tmp_path, steps[:1])[0] == 0


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    counted = f"open({str(count)!r}, 'a').write('x')"
    steps = [step("done", counted), step("not yet", "raise SystemExit(1)"), step("late", counted)]
    assert main(monkeypatch, tmp_path, steps)[0] == 1
    steps[1] = step("not yet", "")
    code, found = main(monkeypatch, tmp_path, steps)
    assert code == 0 and count.read_text() == "xx" and found["done"]["verdict"] == "passed"
    assert main(monkeypatch, tmp_path, steps, "--again")[0] == 0 and count.read_text() == "xxxx"
    monkeypatch.setattr(gpu, "code", lambda: "another")  # of other code nothing is known
    assert main(monkeypatch, tmp_path, steps)[0] == 0 and count.read_text() == "xxxxxx"


def test_a_state_that_was_cut_off_and_an_emptied_results_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [step("measure", "print('one')", file="bench.jsonl"), step("look", "raise SystemExit(1)")]
    out, state = tmp_path / "out", tmp_path / "build/state"
    assert main(monkeypatch, tmp_path, steps)[0] == 1
    shutil.rmtree(out)
    steps[1] = step("look", f"assert 'one' in open({str(out / 'bench.jsonl')!r}).read()")
    assert main(monkeypatch, tmp_path, steps)[0] == 0 and "one" in (out / "bench.jsonl").read_text()
    assert main(monkeypatch, tmp_path, steps[:1], "--steps", "measure")[1].keys() == {"measure", "look"}
    state.write_text(state.read_text()[:-20])
    assert main(monkeypatch, tmp_path, steps)[0] == 0
    assert (out / "bench.jsonl").read_text().count("=== measure") == 1  # what came before is of nobody knows what


def test_a_step_at_its_limit_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_x.py").write_text(
        "import time\ndef test_a(): assert 1 == 2\ndef test_b(): time.sleep(60)\ndef test_c(): pass\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    steps = [gpu.Step("tests", 8, [*words, str(tmp_path / "test_x.py")], "tests.txt")]
    code, found = main(monkeypatch, tmp_path, steps)
    assert code == 1 and found["tests"]["verdict"] == "cut off" and "1 failed" in found["tests"]["told"]
    assert "assert 1 == 2" in (tmp_path / "out/tests.txt").read_text()


def test_a_step_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, tmp_path, [step("fine", "")], "--steps", "fein")
    assert ended.value.code == 2 and "there is none of that name; they are fine" in capsys.readouterr().err
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, tmp_path, [step("fine", "")])
    assert ended.value.code == 2 and "name another folder in OUT" in capsys.readouterr().err


def test_every_benchmark_of_a_gpu_is_in_a_step() -> None:
    device = torch.device("cuda")
    asked = [x.words[x.words.index("--only") + 1] for x in gpu.steps(False) if "--only" in x.words]
    names = [case.name for case in ops_cases.cases(device, False)]
    assert all(sum(re.search(only, name) is not None for only in asked) == 1 for name in names)
    for rehearsed in (x.words for x in gpu.steps(True) if "--only" in x.words):
        only = rehearsed[rehearsed.index("--only") + 1]
        assert any(re.search(only, case.name) for case in ops_cases.cases(device, True))


def test_out_of_time_is_said_and_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = main(monkeypatch, tmp_path, [step("never", "")], "--minutes", "0.05")
    assert code == 1 and "no time was left" in found["never"]["told"]


def test_what_was_carried_is_joined_and_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    wheel = tmp_path / "brought-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("brought.py", "told = 'carried in two halves'")
        file.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        file.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("brought-1.0.dist-info/RECORD", "")
    data = wheel.read_bytes()
    asks = [step("ask", "import brought; print(brought.told)")]
    for number, half in enumerate((data[:100], data[100:])):
        folder = tmp_path / "carried" / str(number + 1)
        folder.mkdir(parents=True)
        (folder / f"{wheel.name}.part-{number}-of-2").write_bytes(half)
        code, found = main(monkeypatch, tmp_path, asks)
        assert code == 1 - number
    assert found["ask"]["told"] == "carried in two halves"


def test_results_are_few_and_flat() -> None:
    for rehearse in (True, False):
        files = gpu.files_of(gpu.steps(rehearse))
        assert len(files) <= 8 and not any("/" in name for name in files) and "bench.jsonl" in files
    assert sum(each.seconds for each in gpu.steps(False)[:3]) <= 480  # at their limits the tests still end in a call


@pytest.mark.long
def test_a_wrong_kernel_is_seen(tmp_path: Path) -> None:
    """The rehearsal in a copy of the checkout, where one op has its sign turned."""
    for name in ("bench", "kernels", "rlhf_engine", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "rlhf_engine/ops/adaptors.py"
    text = path.read_text()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out"), "RLHF_COMMIT": "x"}
    command = [sys.executable, "-m", "rlhf_engine.bench.gpu", "--rehearse", "--steps", "memcheck"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    path.write_text(text + PLANTED)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "advantages is off" in done.stdout


PLANTED = """

_right = Adaptors.__init__


def _wrong(self, *words, **more):
    _right(self, *words, **more)
    gae = self.gae
    self.gae = lambda *x, **y: tuple(-z for z in gae(*x, **y))


Adaptors.__init__ = _wrong
"""
