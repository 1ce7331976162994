"""From the words of a command line to a config: preset, then YAML file, then flags.

Keys are checked here, before jsonargparse is even imported, so that a typing mistake answers at once and names the
nearest key; jsonargparse then reads and checks the values.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_engine.cli import help as helping
from rlhf_engine.cli.mistakes import Mistake, members, nearest, unknown_key, wrong_value
from rlhf_engine.cli.paths import check_file
from rlhf_engine.config import PRESETS, GenerateConfig, RewardSource, RunConfig

if TYPE_CHECKING:
    import jsonargparse

Flag = tuple[str, str | None]


def parse(command: str, words: list[str]) -> RunConfig | GenerateConfig | None:
    """The config that was asked for; None where --help or --print_config already answered."""
    cls: type = GenerateConfig if command == "generate" else RunConfig
    known = dict(keys(cls))
    pairs = list(_flags(words, known))
    preset = _preset(command, [value or "" for name, value in pairs if name == "preset"])
    prompts = [value or "" for name, value in pairs if name == "prompt"]
    ours = {"preset", "prompt"} if cls is GenerateConfig else {"preset"}
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in pairs if name not in ours]
    places: dict[str, str] = {}
    for name, value in pairs:
        if name == "config" and value is not None:
            places |= read_yaml(value, known)
    parser = _parser(command, cls)
    if preset:
        parser.set_defaults(PRESETS[preset])
    if "--help" in flags:
        print(helping.settings(command, parser, known), end="")
        return None
    config = _values(parser, cls, flags, known, places)
    if config is not None and prompts:
        config["prompt"] = prompts
    return None if config is None else cls(**config)


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config class with its type."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def _values(
    parser: jsonargparse.ArgumentParser, cls: type, flags: list[str], known: dict[str, Any], places: dict[str, str]
) -> dict[str, Any] | None:
    import jsonargparse

    try:
        parsed = parser.parse_args(flags)
    except SystemExit:  # --print_config
        return None
    except jsonargparse.ArgumentError as error:
        raise Mistake(wrong_value(str(error), known, flags, places)) from None
    made = dict(vars(parser.instantiate(parsed)))
    return {field.name: made[field.name] for field in fields(cls)}


def _preset(command: str, names: list[str]) -> str:
    if not names:
        return ""
    if command == "generate":
        raise Mistake("generate knows no preset; name a folder with --model")
    if names[-1] not in PRESETS:
        raise Mistake(f"--preset takes {', '.join(PRESETS)}, got {names[-1]!r}{nearest(names[-1], PRESETS)}")
    return names[-1]


def _parser(command: str, cls: type) -> jsonargparse.ArgumentParser:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=f"rlhf {command}", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(cls)
    if cls is RunConfig:  # as plain data, which --print_config can write
        parser.set_defaults({"reward": [asdict(term) for term in RunConfig().reward]})
    return parser


def _flags(words: list[str], known: dict[str, Any]) -> Iterator[Flag]:
    """(key, value) of every flag. A switch alone ("--overwrite") means true."""
    rest = ["--help" if word == "-h" else word for word in words]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise Mistake(f"{word!r} is not understood here; {_stray(word, known)}")
        name, has_value, value = word[2:].partition("=")
        key = name.removesuffix("+")  # --reward+ adds to a list
        if key not in known and key not in helping.COMMON:
            raise Mistake(unknown_key(key, known, helping.COMMON))
        if has_value or key in ("help", "print_config"):
            yield name, value if has_value else None
        elif rest and not rest[0].startswith("--"):
            yield name, rest.pop(0)
        elif known.get(key) is bool:
            yield name, "true"
        else:
            raise Mistake(f"--{key} needs a value")


def _stray(word: str, known: dict[str, Any]) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"write --config {word}"
    if word.partition("=")[0] in known:
        return f"write --{word}"
    if word.lstrip("-") in known or word.lstrip("-") in helping.COMMON:
        return f"write --{word.lstrip('-')}"
    return "settings are written --key value, and lists [1,2]"


def read_yaml(path: str, known: dict[str, Any]) -> dict[str, str]:
    """Where each key of the file stands ("file, line 3"); every key is checked against the known ones."""
    import yaml

    check_file("config", path)
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise Mistake(f"config: {path} is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise Mistake(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "text" if root else "nothing"
        raise Mistake(f"config: {path} holds {found}, but settings are written as key: value")
    places: dict[str, str] = {}
    _walk(root, "", path, known, places)
    return places


def _walk(node: Any, prefix: str, path: str, known: dict[str, Any], places: dict[str, str]) -> None:
    """Checks the keys of one YAML mapping and of those below it, and notes where they stand."""
    import yaml

    for key_node, value in node.value:
        where, key = f"{path}, line {key_node.start_mark.line + 1}", f"{prefix}{key_node.value}"
        section = any(k.startswith(f"{key}.") for k in known)
        if key in known and "." in str(key_node.value):
            head, _, leaf = key.rpartition(".")
            raise Mistake(f"{where}: write {leaf} on a line of its own below {head}:, not as {key}")
        if key not in known and not section:
            raise Mistake(f"{where}: {unknown_key(key, known)}")
        if key in places:
            raise Mistake(f"{where}: {key} stands there twice, first in {places[key]}")
        places[key] = where
        if section and not isinstance(value, yaml.MappingNode):
            raise Mistake(f"{where}: {key} is a section; write settings below it, for example {members(key, known)}")
        if section:
            _walk(value, f"{key}.", path, known, places)
        elif key == "reward" and isinstance(value, yaml.SequenceNode):
            terms = {f"reward.{field.name}": field.type for field in fields(RewardSource)}
            for term in value.value:
                if isinstance(term, yaml.MappingNode):
                    _walk(term, "reward.", path, terms, {})
