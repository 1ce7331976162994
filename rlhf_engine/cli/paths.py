"""Files and folders that can be refused before torch is imported and a run folder is made."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_engine.cli.mistakes import Mistake, nearest
from rlhf_engine.config import RunConfig

SOURCES = ("film-reviews", "planted")
MODELS = ("smollm2-135m-instruct", "tiny")
BODIES = ("frozen", "finetuned", "scratch")
JUDGES = ("vader", "none")


def check(config: RunConfig) -> None:
    """Every path that a run will read, and the folder that it will write."""
    check_writable("output", Path(config.output), folder=True)
    check_model("model", config.model, MODELS)
    if config.tokenizer:
        check_model("tokenizer", config.tokenizer)
    elif config.model.endswith(".json"):
        raise Mistake("tokenizer: a model from a .json config has none of its own; name a folder with --tokenizer")
    if config.data.source not in SOURCES:
        check_file("data.source", config.data.source, SOURCES)
    for key, path in (("data.prompts", config.data.prompts), ("sft.data", config.sft.data)):
        if path is not None:
            check_file(key, path)
    check_folder("reward_model.body", config.reward_model.body, BODIES)
    for term in config.reward:
        if ":" not in term.source:
            check_folder(f"reward {term.name}", term.source, ("reward_model",))
    if config.evaluate.judge not in JUDGES and ":" not in config.evaluate.judge:
        wrong = config.evaluate.judge
        raise Mistake(f"evaluate.judge must be vader, none or module:function, got {wrong!r}{nearest(wrong, JUDGES)}")


def check_file(key: str, name: str, names: tuple[str, ...] = ()) -> None:
    path = Path(name)
    if not path.exists():
        others = f" ({', '.join(names)}, or a file)" if names else ""
        raise Mistake(f"{key}: there is no file {name}{others}{nearest(name, names)}")
    if path.is_dir():
        raise Mistake(f"{key}: {name} is a folder; name a file")
    if not os.access(path, os.R_OK):
        raise Mistake(f"{key}: no permission to read {name}")
    if path.is_file() and not path.stat().st_size:  # a pipe has no size either
        raise Mistake(f"{key}: the file {name} is empty")


def check_folder(key: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names and not os.path.isdir(name):
        raise Mistake(f"{key}: there is no folder {name} ({', '.join(names)}, or a folder){nearest(name, names)}")


def check_model(key: str, name: str, names: tuple[str, ...] = ()) -> None:
    """A folder, a .json config, one of `names`, or something that can be a hub name: owner/name, not below here."""
    if name in names:
        return
    if os.path.isdir(name):
        if key == "model" and not os.path.isfile(os.path.join(name, "config.json")):
            raise Mistake(f"{key}: the folder {name} holds no config.json, so it is not a model folder")
        return
    if name.endswith(".json"):
        check_file(key, name)
        return
    owner, _, rest = name.partition("/")
    if not rest or "/" in rest or owner in ("", ".", "..", "~") or os.path.isdir(owner):
        raise Mistake(f"{key}: there is no folder {name} (a hub name has the form owner/name){nearest(name, names)}")


def check_writable(key: str, path: Path, *, folder: bool) -> None:
    if path.exists():
        if path.is_dir() != folder:
            raise Mistake(f"{key}: {path} is a {'file; name a folder' if folder else 'folder; name a file'}")
        there = path
    else:
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir():
            raise Mistake(f"{key}: {there} is a file, so {path} cannot be made")
        if not folder and there != path.absolute().parent:
            raise Mistake(f"{key}: there is no folder {path.parent}")
    if not os.access(there, os.W_OK):
        raise Mistake(f"{key}: no permission to write to {there}")
