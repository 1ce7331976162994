"""Help texts. What a setting means comes from the docstring of its config class, through jsonargparse."""

from __future__ import annotations

import shutil
import textwrap
import typing
from typing import Any

from rlhf_engine.config import PRESETS

ALL = ("data", "sft", "rank", "reward_model", "reward", "ppo", "evaluate")
# command: what it does, and the sections of the config that its help shows
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("everything below in one go, from ratings to report.html", ALL),
    "fetch": ("bring the model and the human ratings into the cache", ("data",)),
    "sft": ("supervised fine-tuning on a JSONL file", ("sft",)),
    "rank": ("comparisons from ratings, and their Elo ranking", ("data", "rank")),
    "reward": ("train the reward model and grade it against people", ("data", "rank", "reward_model", "evaluate")),
    "ppo": ("fine-tune the model against the reward", ("data", "reward", "ppo", "evaluate")),
    "generate": ("sample from a model", ()),
    "report": ("write report.html of a run folder", ()),
    "bench": ("check every op's answer, then time it, beside what other packages do", ()),
    "doctor": ("is this installation whole, and how to mend what is not", ()),
}
COMMON = {
    "config": "a YAML file with any of these settings; flags win over it",
    "preset": f"settings to start from, before file and flags: {', '.join(PRESETS)}",
    "print_config": "print the resulting settings as YAML and exit",
    "help": "show this and exit",
}
METAVARS = {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT", list: "LIST", typing.Literal: "NAME"}
OVERVIEW = """usage: rlhf COMMAND [--preset tiny] [--config FILE] [--key value ...]

RLHF on one machine: ratings -> comparisons -> Elo ranking -> reward model -> PPO -> report.

commands:
{commands}

examples:
  rlhf run --preset tiny                           the whole pipeline on a tiny random model, in seconds
  rlhf run --ppo.steps 40 --output runs/longer     the demo, longer: a real model and real human ratings

rlhf COMMAND --help lists the settings of a command; rlhf run --print_config writes them all as YAML for --config.
"""


def overview() -> str:
    return OVERVIEW.format(commands="\n".join(f"  {name:<10}{text}" for name, (text, _) in COMMANDS.items()))


def settings(command: str, parser: Any, known: dict[str, Any], *, columns: int = 0) -> str:
    """The settings of a command by section, one or two lines each, with their defaults."""
    columns = columns or min(120, max(60, shutil.get_terminal_size((120, 0)).columns))
    text, shown = COMMANDS[command]
    lone = command == "generate"  # its settings have no sections
    flags = "--model FOLDER (--prompts FILE | --prompt TEXT ...)" if lone else "[--preset tiny] [--config FILE]"
    lines = [f"usage: rlhf {command} {flags} [--key value ...]", "", f"{text[0].upper()}{text[1:]}.", ""]
    for name, meaning in COMMON.items():
        if not (lone and name == "preset"):
            metavar = {"config": " FILE", "preset": " NAME"}.get(name, "")
            lines += _entry(name + metavar, meaning, columns)
    titles = {action.dest: group.title for group in parser._action_groups for action in group._group_actions}
    meanings = {action.dest: action.help or "" for action in parser._actions}
    defaults = parser.get_defaults()
    section = ""
    for key, kind in known.items():
        head = key.partition(".")[0] if "." in key or key == "reward" else "general"
        if head != "general" and head not in shown:
            continue
        if head != section:
            section = head
            title = "" if head == "general" or head == key else f" ({titles[key]})"
            lines += ["", "settings:" if lone else f"{section}{title}:"]
        lines += _entry(f"{key} {_metavar(kind)}", _meaning(meanings[key], kind, _default(defaults[key])), columns)
    hidden = [name for name in ALL if name not in shown]
    if hidden and not lone:
        lines += ["", f"Settings of other stages ({', '.join(hidden)}) are accepted too: rlhf run --help."]
    return "\n".join(lines) + "\n"


def _metavar(kind: Any) -> str:
    inner = [k for k in typing.get_args(kind) if k is not type(None)]
    optional = len(inner) < len(typing.get_args(kind))
    kind = inner[0] if optional else kind
    return METAVARS[typing.get_origin(kind) or kind]


def _entry(flag: str, meaning: str, columns: int) -> list[str]:
    indent = " " * 34
    body = textwrap.wrap(meaning, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    head = f"  --{flag}"
    if len(head) < len(indent) - 1 and body:
        return [head.ljust(len(indent)) + body[0].strip(), *body[1:]]
    return [head, *body]


def _meaning(docstring: str, kind: Any, default: str) -> str:
    """The docstring's sentence, the choices where it does not name them, and the default."""
    text = docstring.strip()
    text = text if text.endswith("...") else text.removesuffix(".")
    choices = [c for c in typing.get_args(kind) if isinstance(c, str)]
    if choices and not all(f'"{c}"' in text for c in choices):
        text += f": {', '.join(choices)}"
    return f"{text} [{default}]" if default else text


def _default(value: Any) -> str:
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and isinstance(value[0], dict):
        return ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in term.items()) + "}" for term in value)
    return str(value).strip("[]")
