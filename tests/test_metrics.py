"""The log of a run: never silent, never in the way, and its files are whole lines of valid JSON."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rlhf_engine import metrics
from rlhf_engine.metrics import RunLog, append_whole, duration

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(path: Path) -> list[dict[str, object]]:
    """Strictly JSON: Python's own reader would take NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_stage_prints_at_once_and_is_timed(stream: io.StringIO) -> None:
    with RunLog(plain=True, stream=stream) as log:
        with log.stage("rank"):
            assert stream.getvalue() == "== rank\n"
            time.sleep(0.02)
        assert 0.02 <= log.seconds["rank"] < 2
        first = log.seconds["rank"]
        with log.stage("rank"):
            pass
        assert log.seconds["rank"] >= first, "a stage that comes again adds up"
    assert re.fullmatch(r"(== rank\n   rank took \d.\d s\n){2}", stream.getvalue())


def test_a_stage_that_fails_is_not_counted(stream: io.StringIO) -> None:
    log = RunLog(plain=True, stream=stream)
    with pytest.raises(ValueError), log.stage("ppo"):
        raise ValueError
    assert log.seconds == {} and "took" not in stream.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == "rlhf-heartbeat"]


def test_progress_is_throttled(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = RunLog(plain=True, stream=stream)
    for done in range(0, 2001, 10):
        log.progress("generate", done, 2000)
        now[0] += 0.125
    shown = stream.getvalue().splitlines()
    assert len(shown) == 6  # at 0, 5, 10, 15, 20 and 25 seconds
    assert shown[0] == "   generate 0/2,000 tokens"
    assert shown[1] == "   generate 400/2,000 tokens, 80 tokens/s, 20 s left"
    assert shown[5] == "   generate 2,000/2,000 tokens, 80 tokens/s"


def test_progress_names_the_step_around_a_phase(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = RunLog(plain=True, stream=stream)
    log.progress_every = 0.0
    for step in range(2):
        log.progress("ppo", step, 4, "steps")
        log.progress("generate", 0, 100)
        now[0] += 5
        log.progress("generate", 50, 100)  # ends early; the next step begins again at 0
        now[0] += 5
    shown = stream.getvalue().splitlines()
    assert shown[1] == "   ppo 0/4 steps; generate 0/100 tokens"
    assert shown[3] == "   ppo 1/4 steps, 30 s left"
    assert shown[-1] == "   ppo 1/4 steps, 45 s left; generate 50/100 tokens, 10 tokens/s, 5.0 s left"


def test_the_rate_of_a_resumed_phase_counts_from_its_beginning(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = RunLog(plain=True, stream=stream)
    log.progress("epoch", 900, 1000, "pairs")
    now[0] = 10.0
    log.progress("epoch", 950, 1000, "pairs")
    assert stream.getvalue().splitlines()[1] == "   epoch 950/1,000 pairs, 5 pairs/s, 10 s left"


def test_heartbeat_breaks_the_silence(stream: io.StringIO) -> None:
    log = RunLog(plain=True, stream=stream)
    log.heartbeat = 0.1
    with log.stage("fetch"):
        time.sleep(0.35)
        log.progress("download", 1, 3, "files")
        time.sleep(0.25)
    text = stream.getvalue()
    assert 2 <= text.count("still fetch (") <= 4 and "still fetch: download 1/3 files (" in text
    after = stream.getvalue()
    time.sleep(0.15)
    assert stream.getvalue() == after, "no heartbeat outside a stage"


def test_no_heartbeat_where_something_is_said(stream: io.StringIO) -> None:
    log = RunLog(plain=True, stream=stream)
    log.heartbeat = 0.4
    with log.stage("ppo"):
        for _ in range(8):
            log.say("step")
            time.sleep(0.1)
    assert "still" not in stream.getvalue()


def test_rich_display() -> None:
    stream = io.StringIO()
    log = RunLog(plain=False, stream=stream)
    with log.stage("ppo"):
        log.progress("generate", 5, 10)
        log.say("a [bold]line[/bold] :smile:")
        log.table("Elo of [x]", ["model", "Elo"], [["ppo \x1b[31m[red]", "1100"]])
        time.sleep(0.3)
    text = stream.getvalue()
    assert "generate 5/10 tokens" in text and "a [bold]line[/bold] :smile:" in text and "ppo took" in text
    assert "Elo of [x]" in text and "[red]" in text and "\x1b[31m" not in text
    assert log.seconds["ppo"] >= 0.3


def test_rich_display_and_printing_threads_do_not_lock_each_other_out() -> None:
    log = RunLog(plain=False, stream=io.StringIO())

    def work() -> None:
        with log.stage("ppo"):
            until = time.monotonic() + 0.6
            while time.monotonic() < until:
                log.progress("generate", 1, 2)
                log.say("x")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_terminals_get_the_display_and_pipes_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert RunLog(stream=Terminal())._console is not None
    assert RunLog(stream=io.StringIO())._console is None
    monkeypatch.setenv("TERM", "dumb")
    assert RunLog(stream=Terminal())._console is None


def test_plain_table(stream: io.StringIO) -> None:
    RunLog(plain=True, stream=stream).table("Elo", ["model", "Elo"], [["ppo", "1100"], ["two\nlines " + "x" * 99, "9"]])
    title, head, first, second = stream.getvalue().splitlines()
    assert title == "Elo" and head.split() == ["model", "Elo"] and first.split() == ["ppo", "1100"]
    assert second.startswith("  two lines xxx") and second.endswith("...  9")
    assert head.index("Elo") == first.index("1100")


def test_control_characters_never_reach_the_terminal(stream: io.StringIO) -> None:
    RunLog(plain=True, stream=stream).say("a\x1b[2Jb\rc\x07\td\x9bm")
    assert stream.getvalue() == "a[2Jbc\tdm\n"


def test_an_ascii_terminal_gets_escapes() -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="ascii")
    RunLog(plain=True, stream=terminal).say("caf\xe9 \u4f60")
    assert raw.getvalue() == b"caf\\xe9 \\u4f60\n"


def test_a_terminal_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, plain=True, stream=stream)
    stream.close()
    with log.stage("ppo"):
        log.say("x")
        log.metrics(1, {"kl": 1.0})
    log.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["kl"] == 1.0


def test_metrics_file(tmp_path: Path, stream: io.StringIO) -> None:
    folder = tmp_path / "made" / "late"
    log = RunLog(folder, plain=True, stream=stream)
    assert not folder.exists(), "the pipeline decides whether the folder may be used"
    log.metrics(1, {"kl": 0.5, "nan": math.nan, "inf": -math.inf, "big": 1e300})
    log.metrics(2, {"tensor": torch.tensor(2.0), "count": 3})  # type: ignore[dict-item]
    first, second = lines(folder / "metrics.jsonl")
    assert first.pop("seconds") >= 0  # type: ignore[operator]
    assert first == {"step": 1, "kl": 0.5, "nan": None, "inf": None, "big": 1e300}
    assert second["tensor"] == 2.0 and second["count"] == 3 and second["seconds"] >= 0  # type: ignore[operator]
    assert not stream.getvalue()


def test_samples_file(tmp_path: Path, stream: io.StringIO) -> None:
    log = RunLog(tmp_path, plain=True, stream=stream)
    log.samples([{"prompt": "caf\xe9\n", "response": "\x1b[31mred\x00", "score": math.nan}, {"lone": "\ud800"}])
    log.samples([])
    log.samples([{"nested": [1, {"x": math.inf}], "other": Path("a")}])
    first, second, third = lines(tmp_path / "samples.jsonl")
    assert first == {"prompt": "caf\xe9\n", "response": "[31mred", "score": None}
    assert second == {"lone": "\ud800"} and third == {"nested": [1, {"x": None}], "other": "a"}
    assert "caf\xe9" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8"), "readable by people"


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(plain=True, stream=io.StringIO())
    log.metrics(1, {"kl": 1.0})
    log.samples([{"x": "y"}])
    assert not list(tmp_path.iterdir())


def test_a_half_written_line_of_a_killed_run_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    RunLog(tmp_path, plain=True, stream=io.StringIO()).metrics(2, {})
    whole, half, new = path.read_text().splitlines()
    assert json.loads(whole)["step"] == 1 and half == '{"ste' and json.loads(new)["step"] == 2


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, stream: io.StringIO) -> None:
    (tmp_path / "file").touch()
    log = RunLog(tmp_path / "file", plain=True, stream=stream)
    for step in range(3):
        log.metrics(step, {"kl": 1.0})
    assert stream.getvalue().count("cannot write") == 1 and "metrics.jsonl" in stream.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_said_once(tmp_path: Path, stream: io.StringIO) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, plain=True, stream=stream)
    log.metrics(1, {"kl": 1.0})
    log.metrics(2, {"kl": 1.0})
    log.samples([{"x": "y"}])
    assert stream.getvalue().count("No space left on device") == 1
    assert len(lines(tmp_path / "samples.jsonl")) == 1


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    """A file-size limit is what an unprivileged process can have of a full disk: writes are cut short, then refused."""
    script = f"""
import io, resource, signal, sys
from pathlib import Path
from rlhf_engine.metrics import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log = RunLog(Path({str(tmp_path)!r}), plain=True, stream=sys.stdout)
for step in range(100):
    log.metrics(step, {{"kl": 0.123456789}})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.metrics(100, {{}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("cannot write") == 1
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == [*range(len(steps) - 1), 100] and 10 < len(steps) < 60


def test_append_is_one_write(tmp_path: Path) -> None:
    for text in (b"a\n", b"b\n"):
        append_whole(tmp_path / "x", text)
    assert (tmp_path / "x").read_bytes() == b"a\nb\n"
    with pytest.raises(OSError):
        append_whole(tmp_path, b"a")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_light_imports() -> None:
    script = "import sys, rlhf_engine.metrics; print(sorted({'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
