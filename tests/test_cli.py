"""The command line: what is accepted arrives whole at the pipeline, and every mistake ends in one clear sentence."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf_engine
from rlhf_engine import cli
from rlhf_engine.cli.arguments import keys
from rlhf_engine.cli.help import COMMANDS
from rlhf_engine.config import PRESETS, RewardSource, RunConfig
from rlhf_engine.fetch import FetchError
from rlhf_engine.validation import BOUNDS, validate

ROOT = Path(__file__).parents[1]
TRAINING = ["run", "fetch", "sft", "rank", "reward", "ppo"]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "triton", "rich"}
FILES = {
    "unknown.yaml": "seed: 1\nppo:\n  stps: 3\n",
    "type.yaml": "ppo:\n  steps: abc\n",
    "section.yaml": "ppo: 3\n",
    "hollow.yaml": "ppo:\n",
    "dotted.yaml": "ppo.steps: 3\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "term.yaml": "reward:\n- {nam: x}\n",
    "weight.yaml": "reward:\n- {name: x, weight: big}\n",
    "list.yaml": "- seed\n",
    "text.yaml": "seed\n",
    "broken.yaml": "ppo: {steps: [\nx",
    "tab.yaml": "\tseed: 1\n",
    "range.yaml": "ppo: {lam: 1.5}\n",
    "empty": "",
    "blank.txt": "\n \n",
    "prompts.txt": "one\n\n two \n",
    "some.jsonl": '{"text": "x"}\n',
    "random.json": "{}",
}
MISTAKES: list[tuple[str, list[str]]] = [
    # what is typed, and what the sentence must contain
    ("rn", ["'rn'", "did you mean run?"]),
    ("xyzzy", ["'xyzzy'", "rlhf --help"]),
    ("bench hed", ["'hed'", "did you mean head?"]),
    ("bench xyzzy", ["choose among ops, head"]),
    ("bench --devcie cpu", ["--devcie", "rlhf bench --help"]),
    ("bench --device gpu", ["'gpu'", "auto"]),
    ("bench --only (", ["--only", "no regular expression"]),
    ("bench --seconds -1", ["positive"]),
    ("bench --compare none.jsonl random.json", ["there is no results file none.jsonl"]),
    ("bench --from random.json", ["random.json", "not a results file"]),
    ("run --ppo.stps 3", ["ppo.stps", "did you mean ppo.steps?"]),
    ("run --ppo.max-new-tokens 3", ["did you mean ppo.max_new_tokens?"]),
    ("run --pppo.lr 3", ["did you mean ppo.lr?"]),
    ("run --steps 3", ["did you mean ppo.steps?"]),
    ("run --lr 3", ["sft.lr", "ppo.lr"]),
    ("run --helpp", ["did you mean help?"]),
    ("run --confg x", ["did you mean config?"]),
    ("run --ppo.steps abc", ["ppo.steps takes a whole number", "'abc'"]),
    ("run --ppo.steps 2.5", ["ppo.steps takes a whole number"]),
    ("run --ppo.steps", ["--ppo.steps needs a value"]),
    ("run --ppo.steps+ 3", ["--ppo.steps+"]),
    ("run --ppo 3", ["ppo is a section", "ppo.steps"]),
    ("run --data some.jsonl", ["data is a section", "data.source"]),
    ("run --ppo.dtype float23", ["float32, bfloat16", "did you mean float32?"]),
    ("run --ppo.dual_clip x", ["ppo.dual_clip takes a number or null"]),
    ("run --overwrite maybe", ["overwrite takes true or false"]),
    ("run --reward_model.batch_size 0", ["reward_model.batch_size must be greater than 0"]),
    ("run --reward_model.layers 3", ["reward_model.layers takes a list"]),
    ("run --reward_model.layers [1,1]", ["reward_model.layers must name different layers"]),
    ("run --reward []", ["reward is empty"]),
    ("run --reward [{nam:x}]", ["reward.nam", "did you mean reward.name?"]),
    ("run --reward.nam x", ["reward.nam"]),
    ("run some.yaml", ["--config some.yaml"]),
    ("run ppo.steps=3", ["--ppo.steps=3"]),
    ("run -seed 3", ["--seed"]),
    ("run --preset tny", ["--preset takes tiny", "did you mean tiny?"]),
    ("run --preset", ["--preset needs a value"]),
    ("run --ppo.lam 2", ["ppo.lam must lie between 0 and 1"]),
    ("run --ppo.lr .nan", ["ppo.lr must be a finite number"]),
    ("run --ppo.lr=-1", ["ppo.lr must not be negative"]),
    ("run --seed -1", ["seed must lie between 0"]),
    ("run --ppo.missing_eos_penalty 1", ["ppo.missing_eos_penalty would hit every response"]),
    ("run --ppo.train_layers -2", ["ppo.train_layers must be -1 (all) or more"]),
    ("run --ppo.minibatches 9", ["ppo.minibatches", "ppo.micro_batch_size"]),
    ("run --model=", ["model is empty"]),
    ("run --output=", ["output is empty"]),
    ("run --config absent.yaml", ["config", "absent.yaml"]),
    ("run --config .", ["config", "is a folder"]),
    ("run --config empty", ["config", "empty"]),
    ("run --config unknown.yaml", ["unknown.yaml, line 3", "ppo.stps", "did you mean ppo.steps?"]),
    ("run --config type.yaml", ["type.yaml, line 2", "ppo.steps takes a whole number"]),
    ("run --config section.yaml", ["section.yaml, line 1", "ppo is a section"]),
    ("run --config hollow.yaml", ["hollow.yaml, line 1", "ppo is a section"]),
    ("run --config dotted.yaml", ["dotted.yaml, line 1", "below ppo:"]),
    ("run --config twice.yaml", ["twice.yaml, line 2", "twice"]),
    ("run --config term.yaml", ["term.yaml, line 2", "did you mean reward.name?"]),
    ("run --config weight.yaml", ["weight.yaml", "reward.weight takes a number"]),
    ("run --config list.yaml", ["a list"]),
    ("run --config text.yaml", ["key: value"]),
    ("run --config broken.yaml", ["broken.yaml, line 2", "not valid YAML"]),
    ("run --config tab.yaml", ["tab.yaml, line 1", "not valid YAML"]),
    ("run --config range.yaml", ["ppo.lam"]),
    ("run --config latin.yaml", ["latin.yaml", "UTF-8"]),
    ("run --data.source film-review", ["data.source", "did you mean film-reviews?"]),
    ("run --data.source empty", ["data.source", "empty"]),
    ("run --data.prompts folder", ["data.prompts", "folder"]),
    ("sft --sft.data absent.jsonl", ["sft.data", "absent.jsonl"]),
    ("run --output empty", ["output", "is a file"]),
    ("run --output empty/below", ["output", "is a file"]),
    ("run --model ./absent", ["model", "./absent"]),
    ("run --model folder/absent", ["model", "folder/absent"]),
    ("run --model folder", ["model", "config.json"]),
    ("run --model smollm2-135m-instuct", ["did you mean smollm2-135m-instruct?"]),
    ("run --model random.json", ["tokenizer"]),
    ("run --tokenizer absent", ["tokenizer", "absent"]),
    ("run --reward_model.body fozen", ["reward_model.body", "did you mean frozen?"]),
    ("run --reward [{source:absent}]", ["reward"]),
    ("run --evaluate.judge vadr", ["evaluate.judge", "did you mean vader?"]),
    ("generate", ["model is missing"]),
    ("generate --model folder", ["--prompts"]),
    ("generate --model absent --prompt x", ["model", "absent"]),
    ("generate --model a/b --prompts blank.txt", ["prompts"]),
    ("generate --model a/b --prompts latin.yaml", ["prompts", "UTF-8"]),
    ("generate --model a/b --prompt x --temperature 0", ["temperature must be greater than 0"]),
    ("generate --model a/b --prompt x --output folder", ["output", "is a folder"]),
    ("generate --model a/b --prompt x --output absent/x.jsonl", ["output", "absent"]),
    ("generate --preset tiny", ["preset"]),
    ("report", ["run folder"]),
    ("report absent", ["absent"]),
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A pipeline that only notes what it was called with."""
    made: list[tuple[str, Any]] = []
    stub = types.ModuleType("rlhf_engine.pipeline")
    for name in TRAINING:
        setattr(stub, name, lambda config, log, name=name: made.append((name, config)))
    stub.generate = lambda **options: made.append(("generate", options))  # type: ignore[attr-defined]
    report = types.ModuleType("rlhf_engine.report")
    report.write = lambda folder: made.append(("report", folder)) or folder / "report.html"  # type: ignore[attr-defined]
    for module in (stub, report):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(rlhf_engine, module.__name__.rpartition(".")[2], module, raising=False)
    return made


def raising(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setattr(sys.modules["rlhf_engine.pipeline"], "run", function)


def raise_from(module: str, error: Exception) -> None:
    """Raises as if a line of that module did."""
    exec(compile("raise error", module, "exec"), {"__name__": module, "error": error})


@pytest.mark.parametrize("typed, parts", MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_mistakes(typed: str, parts: list[str], calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert cli.main(typed.split()) == 2
    out, err = capsys.readouterr()
    assert not out and not calls
    assert err.count("\n") == 1 and err.startswith("rlhf") and "Traceback" not in err
    for part in parts:
        assert part in err
    assert sorted(Path().rglob("*")) == before, "a mistake must leave nothing behind"


def test_there_are_many_mistakes() -> None:
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands(command: str, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--ppo.steps", "3", "--seed=7", "--output", "out"]) == 0
    ((name, config),) = calls
    assert name == command
    assert isinstance(config, RunConfig) and (config.ppo.steps, config.seed, config.output) == (3, 7, "out")
    assert config.reward == [RewardSource()]
    assert capsys.readouterr().err.startswith(f"rlhf {command}: model smollm2-135m-instruct")


def test_preset_then_file_then_flags(calls: list[Any]) -> None:
    Path("my.yaml").write_text("ppo: {steps: 7, lr: 1e-5, dual_clip: 3}\nreward: [{name: a}, {name: b, weight: 2}]\n")
    assert cli.main("run --config my.yaml --ppo.steps 9 --preset tiny --overwrite --tokenizer null".split()) == 0
    config = calls[0][1]
    assert (config.ppo.steps, config.ppo.lr, config.ppo.dual_clip) == (9, 1e-5, 3.0)
    assert config.model == "tiny" and config.data.source == "planted" and config.overwrite is True
    assert config.reward == [RewardSource("a"), RewardSource("b", weight=2.0)] and config.tokenizer is None


def test_lists(calls: list[Any]) -> None:
    assert cli.main(["run", "--reward_model.layers", "[1, 2]", "--reward+", "{name: b, source: 'm:f'}"]) == 0
    config = calls[0][1]
    assert config.reward_model.layers == [1, 2] and config.reward == [RewardSource(), RewardSource("b", "m:f")]


@pytest.mark.parametrize("preset", ["", *PRESETS])
def test_print_config_is_a_config(preset: str, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--preset={preset}"] if preset else []
    assert cli.main(["run", "--ppo.steps=5", *flags, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert not calls and yaml.safe_load(text)["ppo"]["steps"] == 5
    Path("printed.yaml").write_text(text)
    assert cli.main(["run", "--config", "printed.yaml"]) == 0
    assert cli.main(["run", "--ppo.steps=5", *flags]) == 0
    assert calls[0][1] == calls[1][1]


def test_generate(calls: list[Any]) -> None:
    typed = ["generate", "--model", "a/b", "--prompt", "{not: [yaml", "--prompts", "prompts.txt", "--prompt=--odd"]
    assert cli.main([*typed, "--top_p", "0.9", "--output", "out.jsonl"]) == 0
    assert calls == [
        (
            "generate",
            {
                "model": "a/b", "tokenizer": None, "prompts": ["{not: [yaml", "--odd", "one", " two "], "samples": 1,
                "max_new_tokens": 40, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "seed": 0, "output": "out.jsonl",
            },
        )
    ]  # fmt: skip


def test_report(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "folder"]) == 0
    assert calls == [("report", Path("folder"))] and capsys.readouterr().out.strip() == "folder/report.html"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in COMMANDS) and "--preset tiny" in text
    assert cli.main([]) == 2 and capsys.readouterr().err == text
    assert cli.main(["--version"]) == 0 and rlhf_engine.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([command, "--help"]) == 0
    text, err = capsys.readouterr()
    assert not err and text.startswith(f"usage: rlhf {command}")
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) < 150


def test_help_of_run_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--preset", "tiny", "-h"]) == 0
    text = capsys.readouterr().out
    for key, _ in keys(RunConfig):
        assert f"  --{key} " in text
    assert "rollout + update rounds [3]" in text, "the defaults shown are the preset's"


def test_every_number_has_bounds() -> None:
    """A new setting must say which values make sense; the rest of validate() is about combinations."""
    bounded = {key for _, names in BOUNDS.values() for key in names.split()}
    numbers = {key for key, kind in keys(RunConfig) if kind in (int, float, int | None, float | None)}
    assert bounded == numbers - {"ppo.dual_clip"}  # must be above another number
    validate(RunConfig())


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("rated.jsonl, line 3: not JSON"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1),
        (TimeoutError("timed out"), 1),
        (OSError("cannot reach the hub"), 1),
        (MemoryError(), 1),
        (ImportError("No module named 'gguf'", name="gguf"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_expected_failures(
    error: Exception, code: int, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, lambda config, log: raise_from("rlhf_engine.pipeline", error))
    assert cli.main(["run"]) == code
    (_, sentence) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("rlhf run: ") and "Traceback" not in sentence and "[Errno" not in sentence


def test_our_own_error_classes_are_failures(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = FetchError("pip could not reach\nits index")
    raising(monkeypatch, lambda config, log: raise_from("rlhf_engine.fetch", error))
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err.endswith("rlhf run: pip could not reach its index\n")


@pytest.mark.parametrize("error", [KeyError("lost"), ValueError("inside a library"), RuntimeError("shapes differ")])
def test_bugs_keep_their_traceback(
    error: Exception, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: RunConfig, log: Any) -> None:
        raise error

    raising(monkeypatch, run)
    assert cli.main(["run", "--output", "out"]) == 1
    assert "Traceback" in capsys.readouterr().err and not Path("out").exists(), "no folder yet: to the terminal"
    Path("out").mkdir()
    Path("out/config.yaml").touch()
    assert cli.main(["run", "--output", "out"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and "out/error.txt" in err and type(error).__name__ in err
    assert "Traceback" in Path("out/error.txt").read_text()


def test_interrupt(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: RunConfig, log: Any) -> None:
        with log.stage("ppo"):
            log.metrics(1, {"kl": 0.5})
            raise KeyboardInterrupt

    raising(monkeypatch, run)
    assert cli.main(["run", "--output", "out"]) == 130
    assert capsys.readouterr().err.endswith("rlhf run: stopped by Ctrl-C; out keeps metrics.jsonl\n")


def test_absent_cuda(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert cli.main(["run", "--device", "cuda", "--output", "out"]) == 2
    assert "--device cpu" in capsys.readouterr().err and not calls and not Path("out").exists()


def test_no_permission(calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK
    )  # root may write anywhere, so chmod is no test
    assert cli.main(["run", "--output", "out"]) == 2
    assert "no permission to write" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["--help"]) == 1


def command(*words: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of the processor, which what else runs on the machine does not count into."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    typed = [sys.executable, "-m", "rlhf_engine", *words]
    done = subprocess.run(typed, capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["run", "--help"], 0), (["run", "--ppo.stps", "3"], 2)])
def test_answers_at_once(words: list[str], code: int) -> None:
    tries = [command(*words) for _ in range(5)]
    assert {done.returncode for _, done in tries} == {code}
    assert min(seconds for seconds, _ in tries) <= 0.5


@pytest.mark.parametrize("typed", ["run --help", "run --ppo.steps abc", "run --ppo.lam 2", "run --model ./absent"])
def test_nothing_heavy_is_imported_before_a_config_is_accepted(typed: str) -> None:
    script = f"import sys; from rlhf_engine import cli; code = cli.main({typed.split()!r}); "
    script += f"print(code, sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == ("0 []" if "--help" in typed else "2 []")
