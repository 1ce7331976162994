"""Imports point down only. The table below is the architecture; a file that is not in it fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rlhf_engine

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_engine"
# Modules by layer, lowest first; a folder such as "ops" stands for every file in it.
LAYERS = [
    {"kernels", "native"},
    {"types", "config", "validation", "reference"},
    {"ops"},
    {
        "byte_dropout",
        "models",
        "policy_head",
        "rollout",
        "ppo",
        "data",
        "rated",
        "tiny",
        "fetch",
        "checkpoint",
        "metrics",
        "runs",
    },
    {"engine", "reward_model", "rewards", "reward_training", "sft", "ranking", "comparisons", "evaluation"},
    {"plots", "report"},
    {"__main__", "bench", "cli", "doctor", "pipeline", "integrations"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
ONLY_OPS_IMPORTS = {"kernels", "native", "_C"}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "config": set(),
    "validation": set(),
    "types": {"torch"},
    "reference": {"torch"},
}
LINKED = ("kernels", "bench")  # folders of the top level that the package links to: rglob does not follow
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(path for name in LINKED for path in (ROOT / name).rglob("*.py"))])
SOURCES = [path for path in SOURCES if "tools" not in path.parts]  # bench/tools: scripts for this checkout, not shipped


def dotted(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("rlhf_engine", *parts)
    return list(parts)


def unit(path: Path) -> str:
    """Which entry of the table a file belongs to."""
    return dotted(path)[1]


def imports(path: Path) -> set[str]:
    """Every module that the file may import, as dotted names, wherever the statement stands."""
    package = dotted(path)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("rlhf_engine.")}


MODULES = [path for path in SOURCES if path != PACKAGE / "__init__.py"]
IDS = [".".join(dotted(path)[1:]) for path in MODULES]


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    me = unit(path)
    assert me in LAYER, f"{path.relative_to(ROOT)} is in no layer: add it to the table at the top of {__file__}"
    for other in ours(path) - {me, "__version__"}:
        if other in ONLY_OPS_IMPORTS:
            assert me in ("ops", "bench"), f"{me} imports {other}: only ops may; ask ops instead"
            continue
        assert other in LAYER, f"{me} imports rlhf_engine.{other}, which is in no layer: add it to the table"
        assert LAYER[other] <= LAYER[me], f"{me} (layer {LAYER[me]}) imports {other}, which is above it"


def test_no_cycles() -> None:
    names = {".".join(dotted(path)).removesuffix(".__init__"): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        # `from a.b import c` needs the module a.b.c if there is one, else a.b
        found = {target if target in names else target.rpartition(".")[0] for target in imports(path)}
        graph[name] = found & names.keys()
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError and names the cycle


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) in THIRD_PARTY], ids=lambda path: path.stem)
def test_low_layers_import_little(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"rlhf_engine"}
    allowed = THIRD_PARTY[unit(path)]
    assert outside <= allowed, f"{path.name} may import the standard library and {allowed or 'nothing else'}"


def test_device_code_knows_no_torch() -> None:
    """Torch is known to the bindings, and to the two headers that only they include."""
    bindings = {"bindings.cpp", "bindings_cuda.cpp", "bindings_head.cpp", "arguments.h", "operators.h"}
    for path in (ROOT / "csrc").iterdir():
        if path.name not in bindings and path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            text = path.read_text()
            assert not any(word in text for word in ("torch/", '"arguments.h"', '"operators.h"')), path.name


def test_kernels_is_a_link_without_init() -> None:
    """With an __init__.py the folder would shadow the `kernels` package that transformers looks for."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink() and (PACKAGE / "kernels").readlink() == Path("../kernels")


@pytest.mark.parametrize("module", ["rlhf_engine", "rlhf_engine.config", "rlhf_engine.native", "rlhf_engine.doctor"])
def test_light_imports(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'transformers', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"importing {module} also imports {done.stdout}"


@pytest.mark.parametrize("name", rlhf_engine.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(rlhf_engine, name) is not None
    assert name in dir(rlhf_engine)


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rlhf_engine.nonsense
