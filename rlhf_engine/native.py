"""Finds and loads the compiled extension `_C.so` (built from csrc/ by setup.py), or says why it is not there.

It holds no Python module: loading it registers operators, which then are torch.ops.rlhf_engine.gae_cpu and so on. The
package works without it. `python -m rlhf_engine.native` prints its state.
"""

from __future__ import annotations

import importlib
import json
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

LIBRARY = Path(__file__).with_name("_C.so")
_INFO = LIBRARY.with_suffix(".json")


def load() -> bool:
    """Registers the operators, once per process; False if that is impossible (see `why_missing`)."""
    return not why_missing()


def build_info() -> dict[str, str]:
    """Compiler, flags and the torch version of the headers; or `not_built` with the reason; empty if never tried."""
    try:
        info: dict[str, str] = json.loads(_INFO.read_text()) if _INFO.exists() else {}
    except ValueError:  # cut off; `rlhf doctor` tells
        return {}
    return info


@cache
def why_missing() -> str:
    """Why the extension is not available, as a sentence; empty if it is loaded."""
    if not LIBRARY.exists():
        return build_info().get("not_built", f"{LIBRARY} does not exist: the package was never built; run `make setup`")
    import torch  # before the library: it needs libtorch and libc10, which this brings into the process

    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built, yet not loadable: never quietly
        why = error.__cause__ or error  # torch's own message does not say why
        reason = f"{LIBRARY} cannot be loaded into torch {torch.__version__}: {why}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    return ""


def raw() -> ModuleType:
    """The extension's functions on bare addresses, for benchmarks (csrc/python.cpp).

    Raises:
        ImportError: it was not built, for this Python or at all, and why.
    """
    if not load():
        raise ImportError(why_missing())
    try:
        return importlib.import_module("rlhf_engine._raw")
    except ImportError as error:
        why = build_info().get(
            "raw_not_built", "the package was built with another Python; build it again with this one"
        )
        raise ImportError(f"rlhf_engine._raw cannot be imported ({error}): {why}") from error


if __name__ == "__main__":
    print(f"native extension: {f'missing: {why_missing()}' if why_missing() else f'loaded, {build_info()}'}")
