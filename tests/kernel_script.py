"""What the tests of Triton kernels share: scripts with a verdict per case, compiling for GPUs that are not there.

TRITON_INTERPRET is read when a kernel file is imported and then holds for the whole process, so no test imports one
into pytest's process. A test file is also a script: run once in the interpreter and once to compile ahead of time, it
prints a verdict per case, empty if the case went well, and each case becomes a test of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
Cases = Mapping[str, Callable[[], None]]


def run(request: pytest.FixtureRequest, mode: str, scratch: Path) -> dict[str, str]:
    """The verdicts of the cases that are tested now, of the test file that asks, run as a script."""
    cases = [
        item.callspec.params["case"]  # type: ignore[attr-defined]
        for item in request.session.items
        if item.path == request.path and request.fixturename in item.fixturenames  # type: ignore[attr-defined]
    ]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(scratch), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    if mode == "interpret":
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, str(request.path), mode, *cases], capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr
    print(done.stderr)
    return json.loads(done.stdout)


def main(interpreted: Cases, compiled: Cases) -> None:
    """The script: `interpret` or `compile` is its argument, and names of cases unless it is to run all; its status says
    whether all went well."""
    import triton

    mode, *names = sys.argv[1:]
    print("triton", triton.__version__, file=sys.stderr)
    if mode == "interpret":
        import interpreter_patch
        import numpy as np

        interpreter_patch.apply()
        torch.set_num_threads(1)  # threads wait for each other longer than such small tensors take
        np.seterr(all="ignore")  # NumPy warns where a GPU quietly makes the NaN that a case asks for
    else:
        print(TABLE.format(*HEADINGS), file=sys.stderr)
    verdicts = {}
    cases = interpreted if mode == "interpret" else compiled
    for name in names or cases:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            cases[name]()
            verdicts[name] = ""
        except Exception:
            verdicts[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - start:.2f} s {verdicts[name]}", file=sys.stderr)
    print(json.dumps(verdicts))
    sys.exit(any(verdicts.values()))


def compiled_cases(cases: Cases) -> list[Any]:
    """For parametrize: what is compiled for other GPUs than sm_90 is left to the long tests."""
    others = ("sm_80", "sm_100")
    return [pytest.param(name, marks=pytest.mark.long if name.startswith(others) else ()) for name in cases]


def check_close(what: str, ours: Tensor, exact: Tensor, torchs: Tensor, epsilon: float, *, times: float = 2.0) -> None:
    """Our largest error is at most twice, or `times`, that of PyTorch at the same precision, plus epsilon."""
    assert ours.shape == exact.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if not ours.numel():
        return
    both_infinite = exact.isinf() & (ours == exact)
    error = (ours.double() - exact).where(~both_infinite, 0.0).abs().max()
    allowed = times * (torchs.double() - exact).nan_to_num(0.0, 0.0, 0.0).abs().max() + epsilon
    if not error <= allowed:
        raise AssertionError(f"{what}: error {error:.3g}, allowed {allowed:.3g}")


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Any]]:
    """Inside, a launch compiles its kernel for that GPU, as it would be there, and runs nothing; yields the kernels.

    Tensors may be on the CPU: alignment and integers are looked at as at any launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Device:
        get_current_device = staticmethod(lambda: capability)  # what Triton keeps compiled kernels by
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    compiled, launch = [], JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Device())
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch


TABLE = "{:16} {:32} {:>9} {:>6} {:>6} {:>11} {:>11}"
HEADINGS = ("kernel", "compiled for", "registers", "shared", "spills", "widest load", "and store")


def widest(kernel: Any, instruction: str) -> int:
    """Bytes that the widest `ld` or `st` of device memory moves for a thread."""
    found = re.findall(rf"\b{instruction}\.global(?:\.L[12]::\w+)*(?:\.v(\d))?\.[bfsu](\d+)\b", kernel.asm["ptx"])
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def check_resources(kernel: Any, what: str) -> None:
    """Prints what a compiled kernel takes. Registers must not spill to memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = resources["STACK"] + resources["LOCAL"]
    row = resources["REG"], kernel.metadata.shared, spills, widest(kernel, "ld"), widest(kernel, "st")
    print(TABLE.format(kernel.metadata.name, what, *row), file=sys.stderr)
    assert resources["REG"] > 0 and not spills, (kernel.metadata.name, resources)


def layouts_of_sums(kernel: Any) -> list[str]:
    """Of what each sum, maximum and scan of a compiled kernel goes over, in its order: the order of its operations."""
    text = kernel.asm["ttgir"]
    names = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r'"tt\.(?:reduce|scan)".*?\}\) : \((tensor<.*?)\) ->', text, re.DOTALL)
    assert len(found) == len(re.findall(r'"tt\.(?:reduce|scan)"', text))
    return [re.sub(r"#\w+", lambda name: names.get(name[0], name[0]), operands) for operands in found]
