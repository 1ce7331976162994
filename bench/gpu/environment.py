"""What a GPU run finds: device, driver, versions, tools, and the two rates that everything is compared with."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess

import torch

from rlhf_engine import native, ops
from rlhf_engine.bench import machine, peers, table


def first_line(*words: str) -> str:
    if not shutil.which(words[0]):
        return "not here"
    done = subprocess.run(words, capture_output=True, text=True)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    here = machine.look(torch.device(asked.device), asked.quick)
    about = machine.environment(here, "make gpu")
    print(json.dumps(about, indent=1))
    print(f"nvcc: {first_line('nvcc', '--version')}")
    print(f"compute-sanitizer: {first_line('compute-sanitizer', '--version')}")
    print(f"ncu: {first_line('ncu', '--version')}")
    print(f"extension: {native.build_info() if native.load() else native.why_missing()}")
    for op in ops.backends.names():
        known = ", ".join(ops.available(op, asked.device))
        print(f"{op}: {known}; the default is {ops.backends.chosen(op, asked.device)}")
    for name in peers.present():
        print(f"peer: {name}")
    for peer, why in peers.absent(here.device, (torch.bfloat16, torch.float32)).items():
        print(f"not measured: {peer}: {why}")
    print(table.about(about).replace("\n", "; "))


if __name__ == "__main__":
    main()
