"""The benchmark harness: no time without a right answer, times that mean what they say, results that survive."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import cli
from rlhf_engine.bench import (
    clock,
    command,
    head_cases,
    machine,
    ops_cases,
    plots,
    recompiles,
    records,
    suite,
    suites,
    table,
)
from rlhf_engine.bench.case import OURS, Answer, Case, Tensors, Way, errors, wrong

CPU = torch.device("cpu")
HERE = machine.Machine(CPU, "a test, 1 thread", 2**34, 2**20, 1e10, {torch.float32: 1e11})
EFFORT = suite.Effort(0.05, 5)


def square(x: Tensors) -> Answer:
    return {"y": x["x"] * x["x"]}


def case(**ways: Any) -> Case:
    return Case(
        "ops", "square", "any", {"N": 1000}, torch.float32,
        lambda generator: {"x": torch.randn(1000, generator=generator)}, square, {"y": 1e-6},
        [Way(name, run) for name, run in ways.items()], bytes_moved=8000, flops=1000,
    )  # fmt: skip


def run(case: Case) -> dict[str, records.Record]:
    return {record.way: record for record in suite.run_case(case, HERE, EFFORT)}


def timed(works: dict[str, clock.Work], sets: int, seconds: float, rounds: int) -> dict[str, clock.Timing]:
    second = {name: clock.first_call(work, CPU) for name, work in works.items()}
    return clock.measure(works, second, CPU, sets, seconds, rounds)


def overwrites(x: Tensors) -> Answer:
    return {"y": x["x"].square_()}


def raises(x: Tensors) -> Answer:
    raise RuntimeError("no\n such kernel")


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (lambda x: {"y": x["x"] * x["x"] + 1e-4}, "y is off by"),
        (lambda x: {"y": x["x"].square().where(x["x"] > -3, torch.nan)}, "y is off by inf"),
        (lambda x: {}, "y is off by inf"),
        (lambda x: {"y": x["x"][:-1].square()}, "y is off by inf"),
        (raises, "RuntimeError: no such kernel"),
        (overwrites, "it changes its inputs"),
    ],
    ids=["wrong", "nan", "missing", "shape", "raises", "overwrites"],
)
def test_a_wrong_answer_gets_no_time_and_ends_nothing(way: Any, why: str) -> None:
    told = list[records.Record]()
    assert suite.run([case(**{OURS: square, "theirs": way})], HERE, EFFORT, told.append) == 0
    ours, theirs = told
    assert why in theirs.verdict and ours.verdict == "right"
    assert (theirs.first, theirs.call, theirs.times_ours, theirs.peak_bytes) == (None, None, None, None)
    assert ours.call and ours.times_ours == 1.0 and "no time shown" in table.line(theirs)
    assert suite.run([case(**{OURS: way, "theirs": square})], HERE, EFFORT, told.append) == 1


def test_what_fails_at_its_second_call_ends_nothing_either() -> None:
    calls = []

    def once(x: Tensors) -> Answer:
        calls.append(1)
        return square(x) if len(calls) == 1 else raises(x)

    found = run(case(**{OURS: square, "theirs": once}))
    assert found[OURS].call and "no such kernel" in found["theirs"].verdict and found["theirs"].call is None


def test_what_fails_while_it_is_timed_ends_nothing_and_others_keep_their_times() -> None:
    calls = []

    def twice(x: Tensors) -> Answer:
        calls.append(1)
        return square(x) if len(calls) < 3 else raises(x)

    found = run(case(**{OURS: square, "theirs": twice}))
    assert "no such kernel" in found["theirs"].verdict and found["theirs"].call is None
    assert found[OURS].call and found[OURS].rounds >= 3


def test_errors_are_relative_to_the_largest_number_of_a_part() -> None:
    truth = {"a": torch.tensor([1.0, -200.0]), "b": torch.zeros(2), "c": torch.zeros(0)}
    found = errors({"a": torch.tensor([1.0, -199.0]), "b": torch.tensor([0.0, 0.5]), "c": torch.zeros(0)}, truth)
    assert found == {"a": 1 / 200, "b": 0.5, "c": 0.0}
    assert wrong(found, {"a": 1e-2, "b": 1.0, "c": 0.0}) == "" and "a is off" in wrong(
        found, {"a": 1e-3, "b": 1, "c": 0}
    )


def test_times_are_those_of_a_call() -> None:
    works = {"short": lambda _: time.sleep(0.002), "long": lambda _: time.sleep(0.008)}
    found = timed(works, sets=3, seconds=0.2, rounds=50)
    assert 0.002 <= found["short"].call.low <= found["short"].call.median < 0.005
    assert 1.5 < clock.ratio(found["long"].call_rounds, found["short"].call_rounds) < 5
    assert found["short"].device is None and found["short"].peak_bytes is None


def test_a_hopeless_work_is_called_once_and_others_keep_their_rounds() -> None:
    calls: dict[str, int] = {"fast": 0, "hopeless": 0}

    def work(name: str, seconds: float) -> clock.Work:
        def once(number: int) -> None:
            calls[name] += 1
            time.sleep(seconds)

        return once

    found = timed({"fast": work("fast", 0.0), "hopeless": work("hopeless", 0.3)}, 1, 0.05, 9)
    assert calls["hopeless"] == 1 and len(found["fast"].call_rounds) >= 3
    assert clock.ratio(found["hopeless"].call_rounds, found["fast"].call_rounds) > 20


def test_inputs_rotate_until_no_cache_holds_them() -> None:
    small = replace(HERE, cache_bytes=10_000)
    sets = suite.input_sets(case(), small)
    assert len(sets) == math.ceil(30_000 / 4000)
    assert not torch.equal(sets[0]["x"], sets[1]["x"])
    assert len(suite.input_sets(case(), replace(small, memory_bytes=8 * 4000 * 2))) == 2
    seen = set[int]()
    timed({OURS: seen.add}, sets=5, seconds=0.02, rounds=3)
    assert seen == set(range(5))


def test_shares_of_the_machine() -> None:
    record = run(case(**{OURS: square}))[OURS]
    assert record.seconds and record.copy_share == pytest.approx(8000 / record.seconds / 1e10)
    assert record.matmul_share == pytest.approx(1000 / record.seconds / 1e11)
    assert plots.roof_share(record) == max(record.copy_share, record.matmul_share)


def test_a_journal_keeps_what_came_before_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    journal = records.Journal(path)
    environment = machine.environment(HERE, "a test")
    journal.add(environment)
    for record in run(case(**{OURS: square, "theirs": raises})).values():
        journal.add(record)
    journal.add({"kind": "absent", "peer": "someone", "why": "gone"})
    records.Journal(path, append=True).add(environment)
    whole = records.read(path)
    with path.open("a") as file:
        file.write('{"kind": "measurement", "suite": "op')
    cut = records.read(path)
    assert whole == cut and [x.verdict[:6] for x in cut.records] == ["right", "failed"]
    assert cut.others == [{"kind": "absent", "peer": "someone", "why": "gone"}] and cut.environment == environment
    records.Journal(path).add({"kind": "measurement"})
    with pytest.raises(ValueError, match="not a results file"):
        records.read(path)


def test_going_on_in_a_file(tmp_path: Path) -> None:
    """Behind a line that was cut off, in place of what is measured again, and never with another commit's results."""
    path = results(tmp_path / "x.jsonl", {OURS: 1.0, "theirs": 2.0})
    with path.open("a") as file:
        file.write('{"kind": "measurement", "suite": "op')
    again = records.Record("ops", "gae", "any", {"B": 1}, "float32", OURS, call={"median": 3.0, "low": 3, "high": 3})
    records.Journal(path, append=True).add(again)
    assert [(x.way, x.seconds) for x in records.read(path).records] == [(OURS, 3.0), ("theirs", 2.0)]
    here = records.read(path).environment
    assert command.open_journal(here, path, append=True).path == path and len(records.read(path).records) == 2
    with pytest.raises(command.Mistaken, match="--append: .* is of a test, 1 thread at .*; name another --out"):
        command.open_journal(here | {"commit": "another"}, path, append=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "its first line is not an environment"), (b"{garbled", "line 1: not JSON"),
        (b"\xff\x00", "line 1: not JSON"), (b"[1]", "line 1: not an object"),
        (b'{"kind": "environment"}', "its environment lacks machine"),
        (b'ENVIRONMENT\n3\n{"kind": "absent"}', "line 2: not an object"),
        (b'ENVIRONMENT\n{"kind": "measurement", "new": 1}', "a measurement of another version"),
        (b'ENVIRONMENT\n{"kind": "measurement","suite": "", "op": "","shape": "", "dtype": "", "way": "", "dims": []}',
         "a measurement of another version"),
    ],
    ids=["empty", "garbled", "bytes", "list", "bare", "number", "fields", "types"],
)  # fmt: skip
def test_what_is_no_results_file_is_said_so(
    text: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = results(tmp_path / "good.jsonl", {OURS: 1.0}), tmp_path / "bad.jsonl"
    bad.write_bytes(text.replace(b"ENVIRONMENT", good.read_bytes().splitlines()[0]))
    for words in (["--from", str(bad)], ["--compare", str(good), str(bad)], ["--compare", str(bad), str(good)]):
        assert cli.main(["bench", *words]) == 2
        said = capsys.readouterr().err
        assert why in said and str(bad) in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("ops --only nothing", "in the name of no case; names are like 'gae/"),
        ("--seconds 0", "--seconds is a positive"), ("--seconds nan", "--seconds is a positive"),
        ("--seconds inf", "--seconds is a positive"),
        ("--threads 0", "--threads is a positive"), ("peers --out FILE/x.jsonl", "--out FILE/x.jsonl: "),
        ("peers --plots FILE/x", "--plots FILE/x: "), ("peers --append --out FILE", "not a results file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_measured(
    words: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("of another's\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("something was measured"))
    if "append" in words:
        (tmp_path / "FILE").rename("FILE.jsonl")
        words += ".jsonl"
    assert cli.main(["bench", "--device", "cpu", "--quick", *words.split()]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_stopped_run_says_where_its_results_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run", stop)
    out = tmp_path / "x.jsonl"
    words = ["ops", "--quick", "--device", "cpu", "--only", "whiten/primes", "--out", str(out)]
    assert command.run(words) == 130 and f"stopped; what was measured until then is in {out}" in capsys.readouterr().out
    assert records.read(out).environment["device"] == "cpu"


def test_phases_of_the_engine_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*_: Any) -> Any:
        yield {"kind": "engine", "way": OURS, "model": "one", "verdict": "out of memory"}
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_engine.bench.engine_bench.lines", lines)
    out = tmp_path / "x.jsonl"
    assert command.run(["engine", "--quick", "--device", "cpu", "--out", str(out)]) == 130
    assert [x["model"] for x in records.read(out).others if x["kind"] == "engine"] == ["one"]
    assert command.run(["--from", str(out)]) == 0


def test_the_newest_results_of_each_machine(tmp_path: Path) -> None:
    for folder, name, date in (
        ("a", "2026-01-02-x", "2026-01-02T03"),
        ("a", "2026-01-02-w", "2026-01-02T04"),
        ("b", "z", "2025"),
    ):
        environment = machine.environment(HERE, "a test") | {"date": date, "commit": name}
        records.Journal(tmp_path / folder / f"{name}.jsonl").add(environment)
    assert [run.environment["commit"] for run in records.latest(tmp_path)] == ["2026-01-02-w", "z"]


def results(path: Path, times: dict[str, float]) -> Path:
    journal = records.Journal(path)
    journal.add(machine.environment(HERE, "a test"))
    for way, seconds in times.items():
        spread = {"median": seconds, "low": 0.95 * seconds, "high": 1.05 * seconds}
        journal.add(records.Record("ops", "gae", "any", {"B": 1}, "float32", way, call=spread))
    return path


def test_compare_says_what_became_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(tmp_path / "a.jsonl", {OURS: 1.0, "theirs": 1.0, "gone": 1.0})
    for seconds, code, word in ((1.3, 1, "slower"), (1.08, 0, "as before"), (0.5, 0, "faster")):
        after = results(tmp_path / "b.jsonl", {OURS: seconds, "theirs": 3.0})
        assert command.run(["--compare", str(before), str(after)]) == code
        out = capsys.readouterr().out
        assert word in next(line for line in out.splitlines() if line.endswith(OURS)) and "gone: " in out
    assert command.run(["--compare", str(before), str(results(tmp_path / "c.jsonl", {"theirs": 1.0}))]) == 1


def test_machines_are_not_compared_with_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (results(tmp_path / name, {OURS: 1.0}) for name in ("a.jsonl", "b.jsonl"))
    other.write_text(other.read_text().replace("a test, 1 thread", "NVIDIA H100"))
    assert cli.main(["bench", "--compare", str(one), str(other)]) == 2
    assert "times of a test, 1 thread and of NVIDIA H100 say nothing of the code" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pictures = tmp_path / "x.jsonl", tmp_path / "pictures"
    words = ["ops", "--quick", "--device", "cpu", "--only", "^whiten/primes|^kl_estimate/primes", "--seconds", "0.02"]
    assert command.run([*words, "--out", str(out), "--plots", str(pictures)]) == 0
    printed = capsys.readouterr().out
    assert "whiten, primes: B 37, T 211, float32" in printed and "torch eager" in printed and str(out) in printed
    found = records.read(out)
    assert {x.op for x in found.records} == {"whiten", "kl_estimate"} and all(
        x.verdict == "right" for x in found.records
    )
    assert found.environment["command"].startswith("rlhf bench ops --quick")
    assert {path.name for path in pictures.iterdir()} == {"roof.svg", "roof.png", "peers.svg", "peers.png"}
    assert "mathdefault" not in (pictures / "peers.svg").read_text()
    assert command.run(["--from", str(out)]) == 0 and "whiten, primes" in capsys.readouterr().out


def test_a_wrong_op_of_ours_ends_in_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops_cases.SOLVE["whiten"]
    monkeypatch.setitem(
        ops_cases.SOLVE,
        "whiten",
        lambda x, backend: (
            {k: 1.001 * v for k, v in right(x, backend).items()} if backend is None else right(x, backend)
        ),
    )
    out = tmp_path / "x.jsonl"
    assert command.run(["ops", "--quick", "--device", "cpu", "--only", "^whiten/primes", "--out", str(out)]) == 1
    assert [x.verdict[:5] for x in records.read(out).records] == ["wrong", "right"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_and_can_be_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_engine.bench.peers.ways", lambda *_: [])
    for name, make in suites.SUITES.items():
        for quick in (True, False):
            found = [each.name for each in make(torch.device(device), quick)]
            assert len(found) == len(set(found)), name
            assert suites.find(name, found[-1], torch.device(device), quick).name == found[-1]


@pytest.mark.parametrize("op", head_cases.NHV)
def test_counted_products(op: str) -> None:
    """What the FLOP counter sees of ours is what the case says; kept logits would be 6 for the log-probs' backward."""
    from torch.utils.flop_counter import FlopCounterMode

    def added(into: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    made = head_cases.head(op, "any", 256, 32, 512, torch.float32, CPU)
    tensors = made.make(torch.Generator().manual_seed(0))
    if op == "linear_policy_loss_25":
        tensors["mask"] = torch.arange(256) % 4 == 0
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        made.ways[0].run(tensors)
    assert counter.get_total_flops() == made.flops


def test_bytes_are_those_of_inputs_and_results() -> None:
    for op in ops_cases.BYTES:
        made = ops_cases.loss_side(op, "any", 64, 100, CPU)
        tensors = made.make(torch.Generator().manual_seed(0))
        answer = made.ways[0].run(tensors)
        moved = sum(x.nbytes for x in (*tensors.values(), *answer.values()) if x.numel() > 64)
        assert made.bytes_moved == moved, op


@pytest.mark.parametrize("backward", [False, True])
def test_the_truth_in_parts_is_the_truth(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's cases have more logits than float64 holds at once."""
    tensors = ops_cases.make_logits(23, 101, torch.bfloat16, torch.Generator().manual_seed(0))
    whole = ops_cases.true_logprobs(tensors, backward)
    monkeypatch.setattr(ops_cases, "AT_ONCE", 5 * 101)
    found = ops_cases.true_logprobs(tensors, backward)
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in whole.items()}
    assert max(errors(found, whole).values()) < 1e-6


def test_new_lengths_are_timed_for_right_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompiles, "SIZES", (11, 13, 17))
    right = ops_cases.SOLVE["kl_gae"]

    def off(x: Tensors, backend: str | None) -> Answer:
        found = right(x, backend)
        return found if backend or x["mask"].shape[1] < 17 else {name: 1.001 * y for name, y in found.items()}

    monkeypatch.setitem(ops_cases.SOLVE, "kl_gae", off)
    monkeypatch.setattr("rlhf_engine.bench.peers.ways", lambda *_: [])
    found = {line["op"]: line for line in recompiles.lines(CPU, True)}
    assert found["kl_gae"]["verdict"].startswith("wrong: advantages is off") and "first" not in found["kl_gae"]
    assert "advantages is off" in table.recompiles(found["kl_gae"])
    assert found["ppo_loss"]["verdict"] == "right" and len(found["ppo_loss"]["first"]) == 3


def test_memory_of_a_way_in_a_process_of_its_own() -> None:
    from rlhf_engine.bench import memory

    cases = list(suites.cases(["head"], CPU, True, "linear_policy_loss/SmolLM2"))
    whole, ours = (memory.peak_bytes(cases[0], way, True) for way in ("torch eager", OURS))
    weight = 4 * 576 * 49_152
    logits = 4 * 32 * 49_152
    assert whole is not None and ours is not None
    assert 0.99 * (weight + logits) < whole < 2 * weight  # the weight's gradient, and that of logits
    assert weight < ours < 2 * weight


def test_json_has_no_surprises(tmp_path: Path) -> None:
    """A wrong answer may be off by inf, which JSON proper does not know."""
    path = tmp_path / "x.jsonl"
    journal = records.Journal(path)
    journal.add(machine.environment(HERE, "a test"))
    for record in run(case(**{OURS: lambda x: {}})).values():
        journal.add(record)

    def refuse(name: str) -> float:
        raise AssertionError(name)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
