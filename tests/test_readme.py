"""The README's example runs as printed, on a tiny model in place of the downloaded one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny_models
import torch

from rlhf_engine import data, fetch, tiny
from rlhf_engine.bench import command as bench
from rlhf_engine.cli import arguments
from rlhf_engine.config import RunConfig
from rlhf_engine.validation import validate

README = Path(__file__).parent.parent / "README.md"


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.tiny_model_folder(tmp_path / "model", texts=data.planted(100, 0).texts)
    monkeypatch.setattr(fetch, "fetch_model", lambda: folder)
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) <= 12
    exec(compile(code[1].replace("train_layers=4", "train_layers=1"), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) == 3


def test_example_of_the_ops_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    rewards, values, logprobs = torch.randn(3, 4, 8)
    given = {"rewards": rewards, "values": values, "old_logprobs": logprobs - 1, "logprobs": logprobs.requires_grad_()}
    exec(compile(code, "README.md", "exec"), given | {"response_mask": torch.rand(4, 8) < 0.8})
    assert logprobs.grad is not None and float(capsys.readouterr().out) > 0


def test_example_of_the_head_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[2]
    model = tiny_models.tiny_lm()
    tokens = torch.randint(model.config.vocab_size, (3, 9))
    given = {"model": model, "tokens": tokens, "response_mask": torch.rand(3, 8) < 0.8}
    given |= {"old_logprobs": torch.full((3, 8), -4.0), "advantages": torch.randn(3, 8)}
    exec(compile(code, "README.md", "exec"), given)
    assert model.lm_head.weight.grad.any()


def test_every_file_in_the_map_exists() -> None:
    """In a cell, names without a folder stand beside the first one, or beside the README."""
    text = README.read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text[text.index("| file |") :], re.MULTILINE)
    assert len(cells) > 15
    for cell in cells:
        names = re.findall(r"`([^`]+)`", cell)
        beside = (README.parent / names[0]).parent
        for name in names:
            assert (README.parent / name).exists() or (beside / name).exists(), name


def test_every_command_is_understood() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("rlhf ")]
    assert len(commands) >= 4
    for line in commands:
        _, command, *words = shlex.split(line, comments=True)
        if command == "bench":
            bench.parser().parse_args(words)
            continue
        config = arguments.parse(command, words)
        if isinstance(config, RunConfig):
            validate(config)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (README.parent / target).exists(), target
