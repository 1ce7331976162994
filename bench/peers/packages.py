"""Finding the packages of peers, in folders named by PEERS too."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import warnings
from types import ModuleType


def module(name: str) -> ModuleType:
    """A module of another package; its warnings are its own affair.

    Raises:
        ImportError: it is not there.
    """
    for folder in os.environ.get("PEERS", "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)  # last: what is here already stays as it is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def version(package: str) -> str:
    return importlib.metadata.version(package)
