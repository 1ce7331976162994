"""Finding the packages of peers, in folders named by PEERS too, and importing trainers without their clusters.

Trainers import software for clusters and serving of which nothing runs in a comparison: mocks stand in for what is not
installed, while they are imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import site
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

NEVER_RUN = {"ray", "vllm", "deepspeed", "flash_attn", "torchdata", "aiohttp", "fastapi", "uvicorn", "cachetools"}
KERNELS = "flash_attn.ops"  # trainers that cannot import these do without; a mock of them would run


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so anything installed comes first."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in NEVER_RUN or name.startswith(KERNELS):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        self.made.append(spec.name)
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __all__=[])

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def importing(*folders: str, mocks: bool = False) -> Iterator[None]:
    """Inside, other packages can be imported, and their warnings are their own affair. The mocks go at the end."""
    for folder in folders:
        if folder and folder not in sys.path:
            # Last: torch, transformers and all else that is here already stay as they are. With its .pth files, by
            # which the CUTLASS DSL names the folder that it is in.
            site.addsitedir(folder)
    stand_ins = _StandIns()
    if mocks:
        sys.meta_path.append(stand_ins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if mocks:
            sys.meta_path.remove(stand_ins)
        for name in stand_ins.made:
            sys.modules.pop(name, None)  # a failed import has taken it away already


def module(name: str, mocks: bool = False) -> ModuleType:
    """A module of another package.

    Raises:
        ImportError: it is not there.
    """
    with importing(*os.environ.get("PEERS", "").split(os.pathsep), mocks=mocks):
        return importlib.import_module(name)


@cache
def find(name: str, attribute: str, mocks: bool = False) -> Any:
    """A function or class of another package, looked up once: calls are timed.

    Raises:
        ImportError: it is not there.
    """
    found = getattr(module(name, mocks), attribute, None)
    if found is None:
        raise ImportError(f"{name} has no {attribute}")
    return found


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for all sizes. After eight dtypes, kinds of gradient and special sizes torch would give up and run the
    rest uncompiled, without a word: here it may go on. What torch imports for all that warns."""
    with importing():
        config: Any = importlib.import_module("torch._dynamo.config")
        config.recompile_limit = 64
        return torch.compile(function, dynamic=True)


def version(package: str) -> str:
    return importlib.metadata.version(package)
