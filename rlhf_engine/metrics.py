"""What a run says and keeps: lines on the terminal, metrics.jsonl and samples.jsonl. Standard library and rich only.

A log is never worth a run: when the disk is full or the terminal is gone, that is said once and training goes on.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

METRICS = {
    "score/mean": "weighted sum of the rewards per response; should rise",
    "score/std": "its spread inside a batch",
    "score/<name>": "mean of one reward by itself, unweighted",
    "judge/mean": "mean of the judge that training never sees",
    "reward/mean": "score minus the KL penalty, summed over a response",
    "kl/sequence": "nats from the reference, summed over a response; rises slowly, a jump means over-optimisation",
    "kl/token": "the same per token",
    "kl/coef": "weight of the KL penalty",
    "entropy": "nats per token of the policy; a fall towards 0 means collapse",
    "reference/nll_per_token": "how unlikely the reference finds the responses, nats",
    "response/tokens_mean": "length of responses",
    "response/finished_fraction": "share that ended by themselves",
    "sampler/logprob_abs_diff_mean": "|sampler - trainer| per token; 0 when both compute alike",
    "sampler/logprob_abs_diff_max": "the largest of them",
    "first_update_ratio_max_abs_dev": "max |ratio - 1| before anything moved; exactly 0 when on-policy",
    "policy/loss": "clipped objective plus extras, mean over minibatches",
    "policy/clip_fraction": "tokens where the clip stops the gradient; .02 to .3 is usual",
    "policy/clip_fraction_low": "tokens where the dual clip is active",
    "policy/approx_kl_k1": "nats from the policy before the update, per token",
    "policy/approx_kl_k3": "the same, by the estimator that is never negative",
    "policy/ratio_mean": "mean probability ratio; near 1",
    "policy/log_ratio_max_abs": "the largest |log ratio|, at most 20",
    "policy/entropy": "nats per token during the update",
    "policy/tokens": "tokens that the update saw, over all epochs",
    "policy/grad_norm": "before clipping",
    "value/loss": "half the squared error of the critic, clipped",
    "value/mean": "mean value",
    "value/return_mean": "mean return",
    "value/explained_variance": "1 is a perfect critic, 0 no better than the mean",
    "value/clip_fraction": "values that moved further than the clip",
    "value/tokens": "positions that the critic learnt from",
    "value/grad_norm": "before clipping",
    "skipped_steps": "optimiser steps left out because a gradient was not finite",
    "lr": "learning rate of the policy",
    "seconds/<part>": "rollout, score and update of the step",
    "tokens_per_second": "response tokens per second of the whole step",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: they could drive a terminal
OUTER_UNIT = "steps"  # a phase counted in steps spans others (generate, score, update) and stays in the line with them
CELL = 60  # plain tables cut cells here; samples.jsonl keeps the whole text


@dataclass
class _Phase:
    began: float
    first: int  # what was done when the phase began; the rate counts from here, so a resumed run's is right
    done: int
    total: int
    unit: str


class RunLog:
    """Terminal and files of one run.

    Args:
        folder: where metrics.jsonl and samples.jsonl grow; made when first needed. None writes nothing.
        plain: lines instead of a live display; None decides by whether the stream is a terminal.
        stream: where lines go; None is stderr, which leaves stdout to results.
    """

    heartbeat = 8.0  # seconds of silence before a stage says that it is still there
    progress_every = 5.0  # seconds between progress lines at least (plain)

    def __init__(self, folder: Path | None = None, *, plain: bool | None = None, stream: TextIO | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._folder = folder
        self._stream = sys.stderr if stream is None else stream
        self._plain = not is_terminal(self._stream) if plain is None else plain
        self._started = self._spoke = time.monotonic()
        self._progressed = -math.inf  # when the last progress line was printed
        self._lock = threading.RLock()
        self._stage = ""
        self._stage_began = self._started
        self._phases: dict[str, _Phase] = {}
        self._current = ""
        self._warned: set[str] = set()
        self._console: Any = None
        if not self._plain:
            from rich.console import Console

            self._console = Console(file=self._stream, force_terminal=True, highlight=False, emoji=False, markup=False)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is buffered, so this only flushes the stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the run with a name: a line when it begins and ends, and no silence in between."""
        self._stage, self._stage_began = name, time.monotonic()
        self._phases, self._current = {}, ""
        self._print(f"== {name}", style="bold")
        alive = self._spinner() if self._console else self._beating()
        with alive:
            yield
        took = time.monotonic() - self._stage_began
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._print(f"   {name} took {duration(took)}", style="dim")
        self._stage = ""

    def progress(self, phase: str, done: int, total: int, unit: str = "tokens") -> None:
        """How far a phase is. Call it as often as you like; a call costs microseconds."""
        now = time.monotonic()
        with self._lock:
            known = self._phases.get(phase)
            if known is None or done < known.done or (known.done >= known.total and done <= known.done):
                known = self._phases[phase] = _Phase(now, done, done, total, unit)
            known.done, known.total = done, total
            self._current = phase
            if self._plain and now - self._progressed >= self.progress_every:
                self._progressed = now
                self._print(f"   {self._where(now, finished=True)}")

    def elapsed(self) -> float:
        """Seconds since this log began, stages or not."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        self._print(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        if self._console is None:
            self._print("\n".join([title, *_plain_table(columns, rows)]))
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), box=box.SIMPLE, title_justify="left")
        for column in columns:
            table.add_column(Text(column))
        for row in rows:
            table.add_row(*(Text(CONTROL.sub("", cell)) for cell in row))
        self._print(table)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; names and meanings are in METRICS."""
        since = round(time.monotonic() - self._started, 3)
        self._append("metrics.jsonl", [{"step": step, "seconds": since, **values}])

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """One line of samples.jsonl per row."""
        self._append("samples.jsonl", rows)

    def _where(self, now: float, *, finished: bool = False) -> str:
        """ "ppo 3/24 steps, 80 s left; generate 320/1,280 tokens, 95 tokens/s, 10 s left", or just the stage.

        A finished phase is only worth a line when it reports itself: what comes after it may report nothing.
        """
        current, phases = self._current, dict(self._phases)  # a copy: the spinner's thread reads while a stage writes
        outer = [name for name, phase in phases.items() if phase.unit == OUTER_UNIT and name != current]
        named = [name for name in (*outer[-1:], current) if name in phases]
        shown = [name for name in named if finished or phases[name].done < phases[name].total]
        return "; ".join(_phase_text(name, phases[name], now) for name in shown) or self._stage

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """A thread that breaks the silence; a daemon, so that it never keeps a dying process alive."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(max(0.01, self._spoke + self.heartbeat - time.monotonic())):
                with self._lock:
                    now = time.monotonic()
                    if now - self._spoke >= self.heartbeat and not over.is_set():
                        where = self._where(now)
                        label = where if where == self._stage else f"{self._stage}: {where}"
                        self._print(f"   still {label} ({duration(now - self._stage_began)})")

        thread = threading.Thread(target=beat, name="rlhf-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=1.0)

    @contextmanager
    def _spinner(self) -> Iterator[None]:
        from rich.live import Live
        from rich.text import Text

        frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if "utf" in (getattr(self._stream, "encoding", None) or "utf-8").lower() else "|/-\\"

        def line() -> Text:
            # No lock of ours in here: rich holds its own, and a printing thread takes the two the other way round.
            now = time.monotonic()
            text = f"{frames[int(now * 8) % len(frames)]} {self._where(now)} ({duration(now - self._stage_began)})"
            return Text(text, no_wrap=True, overflow="ellipsis")

        # stdout keeps its own way: results printed there may be piped into a file.
        with Live(
            get_renderable=line, console=self._console, refresh_per_second=8, transient=True, redirect_stdout=False
        ):
            yield

    def _print(self, what: Any, style: str | None = None) -> None:
        """One write under the lock, so that the heartbeat never cuts a line in two."""
        with self._lock:
            self._spoke = time.monotonic()
            text = CONTROL.sub("", what) if isinstance(what, str) else what
            try:
                if self._console is not None:
                    self._console.print(text, style=style)
                    return
                try:
                    self._stream.write(text + "\n")
                except UnicodeEncodeError:  # an ASCII terminal
                    coding = self._stream.encoding or "ascii"
                    self._stream.write((text + "\n").encode(coding, "backslashreplace").decode(coding))
                self._stream.flush()
            except (OSError, ValueError):  # the terminal or pipe is gone; there is nobody to tell
                pass

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._folder is None or not rows:
            return
        lines = "".join(json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            append_whole(self._folder / name, lines.encode("utf-8", "backslashreplace"))
        except OSError as error:
            if name not in self._warned:
                self._warned.add(name)
                why = error.strerror or error
                self._print(f"   cannot write {self._folder / name} ({why}); the run goes on without it")


def append_whole(path: Path, data: bytes) -> None:
    """All of the data or, on an error, none of it; a line that a killed run left half-written is ended first."""
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise


def duration(seconds: float) -> str:
    """Example: 3725 -> "1 h 02 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _phase_text(name: str, phase: _Phase, now: float) -> str:
    text = f"{name} {phase.done:,}/{phase.total:,} {phase.unit}"
    moved, took = phase.done - phase.first, now - phase.began
    if moved <= 0 or took <= 0:
        return text
    rate = moved / took
    if phase.unit != OUTER_UNIT:
        text += f", {rate:,.0f} {phase.unit}/s" if rate >= 10 else f", {rate:.2g} {phase.unit}/s"
    return text + (f", {duration((phase.total - phase.done) / rate)} left" if phase.done < phase.total else "")


def _plain_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    def cell(text: str) -> str:
        flat = " ".join(text.split())
        return flat if len(flat) <= CELL else flat[: CELL - 3] + "..."

    grid = [columns, *([cell(text) for text in row] for row in rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(columns))]
    padded = ["  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in grid]
    return [line.rstrip() for line in padded]


def _jsonable(value: Any) -> Any:
    """JSON has no NaN, so what is not finite becomes null; numbers of other libraries become floats."""
    if isinstance(value, str):
        return CONTROL.sub("", value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return CONTROL.sub("", str(value))


def is_terminal(stream: TextIO) -> bool:
    """Whether colours and moving lines make sense there."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False
