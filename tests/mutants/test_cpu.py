"""The tests of the C++ ops catch bugs: each of those in cpu.txt, planted, turns the tests red that it should."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from forked import Forks, forks
from native_build import ROOT, Change, compile_all, link, sources

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to plant bugs with")

UNITS = ("bindings.cpp", "gae_cpu.cpp", "losses_cpu.cpp", "whiten_cpu.cpp", "bindings_head.cpp", "head_cpu.cpp")
# Where a header's changed lines are compiled. Others include it too, but for its structs.
USED_BY = {
    "active.h": UNITS[2:4], "exponential.h": (*UNITS[1:4], UNITS[5]), "gae.h": UNITS[1:2], "kl.h": UNITS[1:4],
    "losses.h": UNITS[2:3], "moments.h": (*UNITS[:2], UNITS[3]), "operators.h": UNITS[:1],
}  # fmt: skip
SUITES = {
    name: path
    for path in (ROOT / f"tests/test_{suite}.py" for suite in ("compiled", "head_operators", "tiled_head"))
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}
JUDGE = """
import pathlib, pytest, sys
from rlhf_engine import native
native.LIBRARY = pathlib.Path(sys.argv[1])
options = ["-q", "-rf", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "--timeout=0", "--durations=0"]
pytest.main([*options, "--hypothesis-profile=mutants", *sys.argv[2:]])
"""


class Bug(NamedTuple):
    name: str
    change: Change
    tests: frozenset[str]
    together: bool


def read(text: str) -> Iterator[Bug]:
    for section in text.split("\n== ")[1:]:
        file, *bugs = section.strip().split("\n\n")
        for bug in bugs:
            heading, old, new = bug.split("\n")
            assert old.startswith("- ") and new.startswith("+"), bug
            name, tests = heading.removeprefix("* ").split(": ")
            names = frozenset(f"test_{test}" for test in tests.split())
            yield Bug(name, (file, old[2:], new[2:]), names, heading.startswith("* "))


BUGS = list(read(Path(__file__).with_name("cpu.txt").read_text()))


@pytest.fixture(scope="module")
def judges() -> Iterator[Forks]:
    with forks("pytest, rlhf_engine.reference") as process:
        yield process


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return compile_all(sources(tmp_path_factory.mktemp("sound")), UNITS)


def red(judges: Forks, library: Path, tests: frozenset[str]) -> frozenset[str]:
    """Which of these tests fail with that library; all of them where it crashes or hangs."""
    done = judges.run(JUDGE, str(library), *(f"{SUITES[name]}::{name}" for name in sorted(tests)))
    if done.returncode:
        assert done.returncode < 0, done.stderr
        return tests
    assert re.search(r"\d+ (passed|failed)", done.stdout), done.stdout + done.stderr
    return frozenset(re.findall(r"^FAILED .*?::(test_\w+)", done.stdout, re.M))


def test_one_bug_in_each_op_at_once(judges: Forks, tmp_path: Path) -> None:
    """Six bugs that are in no op's way but their own, and so one library and one run."""
    bugs = [bug for bug in BUGS if bug.together]
    tests = frozenset[str]().union(*(bug.tests for bug in bugs))
    assert tests == {f"test_{op}" for op in ("gae", "kl_estimate", "kl_gae", "ppo_loss", "value_loss", "whiten")}
    objects = compile_all(sources(tmp_path, [bug.change for bug in bugs]), UNITS)
    assert red(judges, link(objects.values(), tmp_path / "bugs.so"), tests) == tests


@pytest.mark.long
def test_without_a_bug_nothing_is_red(sound: dict[str, Path], judges: Forks, tmp_path: Path) -> None:
    tests = frozenset[str]().union(*(bug.tests for bug in BUGS))
    assert not red(judges, link(sound.values(), tmp_path / "sound.so"), tests)


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_seen(bug: Bug, sound: dict[str, Path], judges: Forks, tmp_path: Path) -> None:
    file = bug.change[0]
    changed = compile_all(sources(tmp_path, [bug.change]), USED_BY.get(file, (file,)))
    assert red(judges, link((sound | changed).values(), tmp_path / "bug.so"), bug.tests) == bug.tests
