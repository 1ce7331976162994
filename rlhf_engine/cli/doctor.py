"""`rlhf doctor` on the terminal, or as JSON. A line is printed as soon as it is known: a crash hides none before it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from rlhf_engine.cli.mistakes import Mistake

if TYPE_CHECKING:
    from rlhf_engine.doctor import Check

HELP = """usage: rlhf doctor [--json]

Say whether this installation is whole, and how to mend what is not.

  --json                          print one JSON object: {"whole": ..., "checks": [{name, status, seen, fix}, ...]}
  --help                          show this and exit

First come the things that can be seen without torch (versions, tools, files), then those that have to be tried. Nothing
is written, nothing is fetched. Statuses: ok, note (good to know), warn (works, but not as well as it could), fail.
Exit code: 1 if something failed, else 0.
"""
COLOURS = {"ok": "32", "note": "36", "warn": "33", "fail": "1;31"}
NAME_WIDTH = 18  # of the longest op


def run(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP, end="")
        return 0
    if words not in ([], ["--json"]):
        raise Mistake(f"doctor takes --json and nothing else, got {' '.join(words)}")
    with _no_bytecode():
        return _as_json() if words else _as_lines()


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """A look at an installation must not change it: no __pycache__ of what is imported for it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _as_json() -> int:
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print when they are imported
        from rlhf_engine import doctor

        checks = [*doctor.without_torch(), *doctor.with_torch()]
    whole = all(check.status != "fail" for check in checks)
    print(json.dumps({"whole": whole, "checks": [asdict(check) for check in checks]}, indent=1))
    return 0 if whole else 1


def _as_lines() -> int:
    from rlhf_engine import doctor
    from rlhf_engine.metrics import is_terminal

    coloured = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    columns = min(120, max(60, shutil.get_terminal_size((120, 0)).columns))
    count: Counter[str] = Counter()
    for title, checks in (("seen without torch", doctor.without_torch()), ("tried with torch", doctor.with_torch())):
        _say(f"\n{title}" if count else title)
        for check in checks:
            count[check.status] += 1
            _say(_lines(check, columns, coloured))
    told = ", ".join(f"{count[status]} {status}" for status in reversed(COLOURS) if count[status])
    _say(f"\n{'something failed' if count['fail'] else 'nothing failed'}: {told}")
    return 1 if count["fail"] else 0


def _lines(check: Check, columns: int, coloured: bool) -> str:
    mark = f"\033[{COLOURS[check.status]}m{check.status:<4}\033[0m" if coloured else f"{check.status:<4}"
    indent = " " * (NAME_WIDTH + 10)
    body = _wrapped(check.seen, indent, columns)
    if check.fix:
        body += _wrapped(f"fix: {check.fix}", indent, columns)
    return "\n".join([f"  {mark}  {check.name:<{NAME_WIDTH}}  {body[0].strip()}", *body[1:]])


def _wrapped(text: str, indent: str, columns: int) -> list[str]:
    """Commands stay whole, so that they can be copied."""
    whole = re.sub("`.*?`", lambda command: command[0].replace(" ", "\0"), text)
    width = columns - len(indent)
    lines = textwrap.wrap(whole, width, break_on_hyphens=False, break_long_words=False) or [""]
    return [indent + line.replace("\0", " ") for line in lines]


def _say(text: str) -> None:
    coding = sys.stdout.encoding or "utf-8"
    print(text.encode(coding, "backslashreplace").decode(coding), flush=True)
