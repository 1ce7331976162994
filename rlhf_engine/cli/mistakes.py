"""What a mistake says: one sentence with the key, what it takes, and the nearest thing that exists."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from rlhf_engine.config import RewardSource

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Mistake(ValueError):
    """Something in what was asked, told in one sentence."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing. A last part that is right ("lr") outweighs letters in common."""
    choices = list(choices)
    leaf = word.replace("-", "_").rpartition(".")[2]
    close = [c for c in choices if "." in c and c.rpartition(".")[2] == leaf]
    if len(close) > 1:  # lr is in many sections: a section that is nearly right decides
        close = difflib.get_close_matches(word, close, n=1, cutoff=0.8) or close
    if not close:
        close = difflib.get_close_matches(word.replace("-", "_"), choices, n=1)
    if not close:
        by_leaf = {c.rpartition(".")[2]: c for c in reversed(choices)}
        close = [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=1)]
    return f"; did you mean {' or '.join(close[:4])}?" if close else ""


def unknown_key(key: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """What is wrong with a key that is not a setting."""
    known = list(known)
    if any(k.startswith(f"{key}.") for k in known):
        return f"{key} is a section; write one of its settings, for example {members(key, known)}"
    return f"there is no setting {key!r}{nearest(key, [*known, *others])}"


def members(section: str, known: Iterable[str]) -> str:
    return ", ".join([k for k in known if k.startswith(f"{section}.")][:3])


def wrong_value(message: str, known: dict[str, Any], flags: list[str], places: dict[str, str]) -> str:
    """jsonargparse names the key and dumps types; this says what the key takes, and where the value stands.

    Args:
        message: of jsonargparse.
        known: type of every key.
        flags: as they were parsed; a flag wins over a file, so a key found here is blamed on it.
        places: where keys of files stand.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys or keys[0] not in known:
        return " ".join(message.split())
    by_flag = any(flag.startswith((f"--{keys[0]}=", f"--{keys[0]}+=")) for flag in flags)
    where = "" if by_flag or keys[0] not in places else f"{places[keys[0]]}: "
    key, kind = keys[0], known[keys[0]]
    if key == "reward":
        terms = {f"reward.{name}": hint for name, hint in typing.get_type_hints(RewardSource).items()}
        if option := re.search(r"Option '([^']+)' is not accepted", message):
            return where + unknown_key(f"reward.{option[1]}", terms)
        key, kind = (f"reward.{keys[-1]}", terms[f"reward.{keys[-1]}"]) if len(keys) > 1 else (key, kind)
    got = re.findall(r"(?:Got value|Given value): (.*)", message)
    hint = ""
    if typing.get_origin(kind) is typing.Literal and got:
        hint = nearest(got[-1], map(str, typing.get_args(kind)))
    return f"{where}{key} takes {takes(kind)}{f', got {got[-1]!r}' if got else ''}{hint}"


def takes(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if t is type(None) else takes(t) for t in inner)
    if origin is list:
        if is_dataclass(inner[0]):
            return f"a list such as [{{{', '.join(f'{f.name}: ...' for f in fields(inner[0]))}}}]"
        return "a list such as [1, 2]" if inner[0] is int else "a list"
    return WORDS.get(kind, str(kind))
