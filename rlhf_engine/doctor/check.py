"""One thing that was looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# note: nothing is wrong, but good to know. warn: it works, though slower or not as meant. fail: something is broken.
Status = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    seen: str
    fix: str = ""  # one sentence


def attempt(name: str, look: Callable[[str], Check]) -> Check:
    """The check's result. A check that raises is itself a finding: the others must still be told."""
    try:
        return look(name)
    except Exception as error:
        outside = isinstance(error, OSError)
        fix = "see to the file that it names" if outside else "report it, with what `rlhf doctor --json` prints"
        return Check(name, "fail", f"this check raised {said(error)}", fix)


def said(error: BaseException) -> str:
    """An exception on one line of bearable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'...' if len(text) > 400 else ''}" if text else type(error).__name__
