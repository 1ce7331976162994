"""Peers of benchmarks: registered, imported only when asked for, and not timed unless they are right."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import bench_offers
import pytest
import torch

from rlhf_engine.bench import head_cases, ops_cases, peers, suite
from rlhf_engine.bench.case import Answer, Tensors
from rlhf_engine.bench.machine import Machine
from rlhf_engine.bench.peers import Offer, Peer, packages
from rlhf_engine.bench.records import Record

FOLDER = Path(peers.__file__).parent
HELPERS = {"__init__", "answers", "packages"}
MACHINE = Machine(bench_offers.CPU, "test", 2**30, 0, 1e9, {})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Peer]:
    """In place of everyone."""
    found: list[Peer] = []
    monkeypatch.setattr(peers, "everyone", lambda: tuple(found))
    return found


def fake(name: str, run: Any, **more: Any) -> Peer:
    return Peer(name, "some-package", "1.0", {"whiten": Offer(run, **more)}, lambda: "1.0")


def right(x: Tensors) -> Answer:
    return ops_cases.whiten(x, backend="reference")


def run_whiten() -> dict[str, Record]:
    records: list[Record] = []
    assert suite.run([bench_offers.case("whiten")], MACHINE, suite.Effort(0.0, 3), records.append) == 0
    return {record.way: record for record in records}


def test_every_file_is_registered() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - HELPERS == set(peers.FILES)
    names = [peer.name for peer in peers.everyone()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("peer", peers.everyone(), ids=lambda peer: peer.name)
def test_offers_are_for_known_ops(peer: Peer) -> None:
    assert peer.offers and peer.offers.keys() <= ops_cases.SOLVE.keys() | head_cases.SOLVE.keys()
    assert all(set(offer.devices) <= {"cpu", "cuda"} and offer.dtypes for offer in peer.offers.values())


@pytest.mark.parametrize("name", peers.FILES)
def test_files_import_no_package(name: str) -> None:
    """Not even inside of functions: packages.find knows the folders where they may lie."""
    outside = set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add((node.module or "").partition(".")[0])
    assert outside - set(sys.stdlib_module_names) <= {"torch", "rlhf_engine"}


def test_absent_packages_have_a_reason_of_one_line(fakes: list[Peer]) -> None:
    def load() -> str:
        return str(packages.find("no_such_package", "function"))

    def fail() -> str:
        raise RuntimeError("several\nlines")

    fakes += [Peer("not there", "a", "1", {}, load), Peer("broken", "b", "2", {}, fail)]
    assert peers.absent(bench_offers.CPU, (torch.float32,)) == {
        "not there (a 1)": "ModuleNotFoundError: No module named 'no_such_package'",
        "broken (b 2)": "RuntimeError: several lines",
    }
    with pytest.raises(ImportError, match="json has no yaml"):
        packages.find("json", "yaml")


def test_what_cannot_run_here_has_a_reason(fakes: list[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    half, hopper = Offer(right, dtypes=(torch.bfloat16,)), Offer(right, ("cuda",), capability=90)
    fakes += [Peer("half", "a", "1", {"whiten": half, "gae": Offer(right)}), Peer("hopper", "b", "2", {"gae": hopper})]
    found = peers.absent(bench_offers.CPU, (torch.float32,))
    assert found == {"half, whiten": "does not take float32", "hopper": "runs on cuda alone"}
    assert peers.absent(bench_offers.CPU, (torch.float32, torch.bfloat16)) == {"hopper": "runs on cuda alone"}
    gpu = torch.device("cuda")
    for capability, why in (((9, 0), ""), ((10, 0), "runs on compute capability 9.0 alone")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert peers.unfit(hopper, torch.float32, gpu) == why


def test_wrong_answers_get_no_time(fakes: list[Peer]) -> None:
    def wrong(x: Tensors) -> Answer:
        return {"whitened": 1.001 * right(x)["whitened"]}

    def fail(x: Tensors) -> Answer:
        raise ValueError("not of this size")

    fakes += [fake("right", right), fake("wrong", wrong), fake("incomplete", lambda x: {}), fake("failing", fail)]
    records = run_whiten()
    assert records["right"].verdict == "right" and records["right"].call and records["right"].times_ours
    assert records["wrong"].verdict == "wrong: whitened is off by 1.0e-03, allowed are 2e-05"
    assert records["incomplete"].verdict == "wrong: whitened is off by inf, allowed are 2e-05"
    assert records["failing"].verdict == "failed: ValueError: not of this size"
    for name in ("wrong", "incomplete", "failing"):
        assert records[name].call is records[name].first is records[name].times_ours is None


def test_inputs_are_prepared_before_the_calls(fakes: list[Peer]) -> None:
    calls = []

    def prepare(x: Tensors) -> Tensors:
        calls.append("prepare")
        return x | {"mask": x["mask"].float()}

    def run(x: Tensors) -> Answer:
        calls.append("run")
        return right(x | {"mask": x["mask"] == 1.0}) if x["mask"].is_floating_point() else {}

    fakes.append(fake("other form", run, prepare=prepare, note="float mask"))
    record = run_whiten()["other form"]
    assert record.verdict == "right" and record.note == "float mask" and record.call
    assert calls[:3] == ["prepare", "run", "prepare"] and set(calls[3:]) == {"run"}  # once to judge, once to time


def test_mocks_stand_in_while_importing() -> None:
    """But not for kernels, which would be called."""
    for name in ("ray", "flash_attn"):
        if importlib.util.find_spec(name):
            pytest.skip(f"{name} is installed")
    with packages.importing(mocks=True):
        importlib.import_module("ray.util.placement_group")
        importlib.import_module("flash_attn.bert_padding")
        with pytest.raises(ImportError):
            importlib.import_module("flash_attn.ops.triton.cross_entropy")
    assert not {"ray", "flash_attn"} & {name.partition(".")[0] for name in sys.modules}
    with pytest.raises(ImportError):
        importlib.import_module("ray")


@bench_offers.on_cpu("torch")
def test_offers_of_torch(peer: Peer, op: str) -> None:
    if peer.name == "torch.compile":
        pytest.skip("compiling takes half a minute: `rlhf bench` checks it each time")
    if peers.loaded(peer)[1]:
        pytest.skip(peers.loaded(peer)[1])
    bench_offers.check(peer, op)
