"""The extension for this GPU: the carried one where it loads and holds CUDA code, else built here; and every import."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys

from rlhf_engine.bench.machine import ROOT

NOT_IMPORTED = ("__main__", "._C", "._raw")  # programs; and libraries that native.py loads
LOADED = (
    "from rlhf_engine import native; print(native.load() and (native.build_info().get('targets') or 'no CUDA code'))"
)


def targets() -> str:
    """GPU code in the extension that is here, asked of a fresh process; empty if it does not load."""
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True)
    found = done.stdout.strip()
    return "" if found in ("False", "None", "") else found


def everything() -> int:
    """Imports every module of the package; those that need a package that is not here are named."""
    import rlhf_engine

    count = 0
    for module in pkgutil.walk_packages(rlhf_engine.__path__, "rlhf_engine."):
        if module.name.endswith(NOT_IMPORTED) or ".bench.tools" in module.name:
            continue
        try:
            importlib.import_module(module.name)
            count += 1
        except ImportError as error:
            if (error.name or "").startswith("rlhf_engine"):
                raise
            print(f"{module.name}: needs {error.name}, which is not here")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-cuda", action="store_true", help="an extension without CUDA code will do")
    asked = parser.parse_args()
    found = targets()
    origin = "carried"
    if not found or ("sm_" not in found and not asked.no_cuda):
        print(f"extension here: {found or 'none that loads'}; building")
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
        found, origin = targets(), "built here"
    if not found or ("sm_" not in found and not asked.no_cuda):
        raise SystemExit("there is no extension with CUDA code; rlhf_engine/_C.json says why")
    print(f"{everything()} modules import; extension {origin}, code for {found}")


if __name__ == "__main__":
    main()
