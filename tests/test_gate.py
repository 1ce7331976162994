"""`make gate` sees what it is there to see: an op that takes twice as long, and one with more instructions."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlhf_engine.bench import ops_cases

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate", ROOT / "bench/tools/gate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twice_as_slow_trips_it(gate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors are .7 of what is usual, so half of it is below and the same again is not."""
    name, threads = "gae/gate/64x512/float32", torch.get_num_threads()
    usual = statistics.median(gate.ratios(0.5, [name])[name] for _ in range(3))
    floors = {name: gate.MARGIN * usual}
    assert not gate.below(gate.ratios(1.0, [name]), floors)
    honest = ops_cases.SOLVE["gae"]

    def twice(x: Any, backend: str | None) -> Any:
        if backend is None:
            honest(x, backend)
        return honest(x, backend)

    monkeypatch.setitem(ops_cases.SOLVE, "gae", twice)
    assert "floor is" in gate.below(gate.ratios(1.0, [name]), floors)[name]
    torch.set_num_threads(threads)


def test_what_is_measured_and_what_is_committed_are_the_same(gate: ModuleType) -> None:
    assert gate.below({"a": 1.0}, {"a": 0.5, "b": 2.0}) == {"b": "is not measured any more"}
    assert gate.below({"a": 1.0, "c": 1.0}, {"a": 0.5}) == {"c": "has no floor: renew them"}
    held = json.loads(gate.FLOORS.read_text())
    assert set(held["instructions"]) == set(gate.OPS)
    assert all(op in "".join(held["ratios"]) for op in ("gae", "ppo_loss", "linear_policy_loss", "token_logprobs"))


def test_its_compiler_flags_are_those_of_the_extension(gate: ModuleType) -> None:
    flags = re.search(r"^FLAGS = \[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL | re.MULTILINE)
    assert flags
    of_the_extension = [word.strip(' "\n') for word in flags[1].split(",") if word.strip()]
    about_symbols_and_warnings = ("-fPIC", "-fvisibility", "-W")
    assert [x for x in of_the_extension if not x.startswith(about_symbols_and_warnings)] == gate.FLAGS


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
@pytest.mark.long
def test_more_instructions_trip_it(gate: ModuleType, tmp_path: Path) -> None:
    counts = gate.instructions(tmp_path)
    assert gate.instructions(tmp_path) == counts and not gate.changed(counts, counts)
    csrc = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    text = (csrc / "moments.h").read_text()
    old = "return (x - a.shift) * a.scale + a.back;"
    assert text.count(old) == 1
    (csrc / "moments.h").write_text(text.replace(old, "return ((x - a.shift) * a.scale + a.back) / (1.f + 0.f * x);"))
    slower = gate.changed(gate.instructions(tmp_path, csrc), counts)
    assert "of the committed" in slower.pop("whiten") and not slower
