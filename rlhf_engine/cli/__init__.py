"""The command line: reads what was asked, refuses mistakes in one sentence, and calls the pipeline.

Until a config is accepted nothing heavy is imported, so help and mistakes answer at once.
Exit codes: 0 done, 2 a mistake in what was asked, 1 the environment failed (disk, network, memory) or a bug,
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from rlhf_engine import __version__
from rlhf_engine.bench import command as bench
from rlhf_engine.cli import arguments, doctor, paths
from rlhf_engine.cli import help as helping
from rlhf_engine.cli.mistakes import Mistake, nearest
from rlhf_engine.config import GenerateConfig, RunConfig
from rlhf_engine.validation import validate, validate_generate

# Nobody asked for these: disk, memory, network. Any other errno is about a path that somebody named.
ENVIRONMENT = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    command = words[0] if words else ""
    folder: Path | None = None
    try:
        if command in ("", "-h", "--help", "help"):
            print(helping.overview(), end="", file=sys.stdout if command else sys.stderr)
            return 0 if command else 2
        if command in ("--version", "-V"):
            print(f"rlhf {__version__}")
            return 0
        if command not in helping.COMMANDS:
            hint = nearest(command, helping.COMMANDS) or "; rlhf --help lists them"
            raise Mistake(f"there is no command {command!r}{hint}")
        if command == "report":
            return _report(words[1:])
        if command == "doctor":
            return doctor.run(words[1:])
        if command == "bench":
            return bench.run(words[1:])
        config = arguments.parse(command, words[1:])
        if config is None:
            return 0
        if isinstance(config, GenerateConfig):
            return _generate(config)
        folder = Path(config.output)
        return _train(command, config)
    except KeyboardInterrupt:
        _say(f"rlhf {command}: stopped by Ctrl-C; {_kept(folder)}")
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough; the interpreter must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(command, error, folder)


def _train(command: str, config: RunConfig) -> int:
    validate(config)
    paths.check(config)
    from rlhf_engine.metrics import RunLog

    with RunLog(Path(config.output)) as log:
        log.say(f"rlhf {command}: model {config.model}, data {config.data.source}, output {config.output}")
        if config.device == "cuda":  # before the pipeline makes the run folder
            import torch

            if not torch.cuda.is_available():
                raise Mistake("device: torch sees no CUDA device here; write --device cpu or --device auto")
        from rlhf_engine import pipeline

        getattr(pipeline, command)(config, log)
    return 0


def _generate(config: GenerateConfig) -> int:
    validate_generate(config)
    paths.check_model("model", config.model)
    if config.tokenizer:
        paths.check_model("tokenizer", config.tokenizer)
    prompts = list(config.prompt)
    if config.prompts:
        paths.check_file("prompts", config.prompts)
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Mistake(f"prompts: {config.prompts} is not UTF-8 text (byte {error.start})") from None
        prompts += [line for line in lines if line.strip()]
    if not any(prompt.strip() for prompt in prompts):
        raise Mistake("prompts: there is none with any text")
    if config.output:
        paths.check_writable("output", Path(config.output), folder=False)
    from rlhf_engine import pipeline

    rest = {key: value for key, value in asdict(config).items() if key not in ("prompt", "prompts")}
    pipeline.generate(prompts=prompts, **rest)
    return 0


def _report(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print("usage: rlhf report FOLDER\n\nWrite report.html of a run folder, for example rlhf report runs/demo.")
        return 0
    if len(words) != 1 or words[0].startswith("-"):
        raise Mistake("report takes one run folder, for example rlhf report runs/demo")
    if not Path(words[0]).is_dir():
        raise Mistake(f"there is no run folder {words[0]}")
    from rlhf_engine import report

    print(report.write(Path(words[0])))
    return 0


def _failed(command: str, error: Exception, folder: Path | None) -> int:
    """A sentence for mistakes and failures of the environment; the traceback of a bug is kept with the run."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind, here = type(error), _raised_here(error)
    code = 1
    if isinstance(error, ValueError) and here:
        code = 2
    elif here and kind.__module__.startswith("rlhf_engine"):
        pass
    elif isinstance(error, OSError):
        if error.strerror:  # without the number
            text = error.strerror + (f": {error.filename}" if error.filename else "")
        outside = isinstance(error, (ConnectionError, TimeoutError)) or error.errno is None or error.errno < 0
        code = 1 if outside or error.errno in ENVIRONMENT else 2
    elif isinstance(error, ImportError) and not (error.name or "").startswith("rlhf_engine"):
        text += '; pip install "rlhf_engine[demo]" brings what the demo needs'
    elif isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError":
        text = f"out of memory; lower ppo.micro_batch_size and reward_model.feature_batch ({text[:200]})"
    else:
        return _bug(command, f"{kind.__name__}: {text[:500]}", folder)
    _say(f"rlhf {command}: {text}" if command in helping.COMMANDS else f"rlhf: {text}")
    return code


def _bug(command: str, text: str, folder: Path | None) -> int:
    """Must be called while the exception is handled."""
    details = traceback.format_exc()
    try:
        # Only into a folder that the run made: an error file alone would make a new folder look used.
        if folder is None or not (folder / "config.yaml").is_file():
            raise FileNotFoundError
        (folder / "error.txt").write_text(details, encoding="utf-8", errors="backslashreplace")
        _say(f"rlhf {command}: {text} (a bug; the traceback is in {folder / 'error.txt'})")
    except OSError:
        _say(f"{details}rlhf {command}: {text}")
    return 1


def _raised_here(error: Exception) -> bool:
    """Whether our own code raised it: a ValueError from inside a library is a bug, not somebody's mistake."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__", "")).startswith("rlhf_engine")


def _kept(folder: Path | None) -> str:
    present = sorted(p.name for p in folder.iterdir()) if folder is not None and folder.is_dir() else []
    return f"{folder} keeps {', '.join(present)}" if present else "nothing was written"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
