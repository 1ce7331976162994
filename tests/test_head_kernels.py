"""kernels/head.py without a GPU: in the interpreter against PyTorch in float64, and compiled for GPUs.

kernel_script.py says how; the interpreter's cases are in head_kernel_cases.py. This file is a script, too:
`python tests/test_head_kernels.py compile` prints a table of what each kernel takes on each GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import kernel_script
import pytest
import torch
from head_kernel_cases import CASES
from head_kernel_truth import DEAD, module, options
from torch import Tensor

CAPABILITIES = (80, 90, 100)
VOCABULARY = 151936
# Kernels in the order of their launch, and pointers to which a program adds the way to its row.
BY_ROWS = {"_fold": ("X", "PARTS"), "_combine": (), "_gradient": ("X", "OUT"), "_target_logits": "HW", "_scale": "X"}


def logits_of(dtype: str, aligned: bool, rows: int = 2, V: int = VOCABULARY) -> Tensor:
    first, left = (0, 0) if aligned else (1, 1)
    memory = torch.zeros(rows * (V + left) + first, dtype=getattr(torch, dtype))
    return memory[first:].view(rows, V + left)[:, :V]


def launch(x: Tensor, given: bool, temperature: float = 0.7, start: int = 0) -> None:
    """All kernels as they are launched, with every option or none, and the gradient in place."""
    head, rows, V = module(), x.shape[0], x.shape[-1]
    y, numbers, bias = torch.zeros(rows, dtype=torch.long), torch.ones(rows), torch.ones(V)
    tensors = dict(bias=bias, temperature=numbers, target_logits=numbers, softcap=30.0) if given else {}
    arguments = options(**tensors, logit_scale=temperature, inverse_temperature=1 / temperature)
    parts = head.head_fold(x, y, *arguments, start, DEAD, given)
    statistics = head.head_combine(parts, y, start, V, DEAD)
    grads = (numbers, numbers) if given else (numbers, None)
    head.head_gradient(x, y, statistics, *grads, *arguments, start, DEAD, x)
    head.target_logits(x[:, :4096], x[:, :4096], y, DEAD)
    head.head_scale(x, numbers[0])


def check_order(kernel: Any) -> None:
    """No sum of more than two numbers is left to the compiler, which orders it by how registers lie."""
    reduction = r'"tt\.reduce"\(.*?\) <\{axis = (\d+).*?\}> \(\{(.*?)\}\) : \(tensor<([\dx]+)xf32'
    found = re.findall(reduction, kernel.asm["ttgir"], re.DOTALL)
    added = [int(shape.split("x")[int(axis)]) for axis, body, shape in found if "arith.addf" in body]
    assert all(size <= 2 for size in added) and (added or kernel.metadata.name not in ("_fold", "_target_logits"))


def check_offsets(kernel: Any) -> None:
    """The way to a row, its number times a stride, has 64 bits."""
    for pointer in BY_ROWS[kernel.metadata.name]:
        moved = re.findall(rf"tt\.addptr %{pointer}, .* : !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"])
        assert moved and set(moved) == {"i64"}, (kernel.metadata.name, pointer, moved)


def compile_all(capability: int, dtype: str, aligned: bool, given: bool) -> None:
    x = logits_of(dtype, aligned)
    with kernel_script.compiling_for(capability) as compiled:
        launch(x, given)
    assert [kernel.metadata.name for kernel in compiled] == list(BY_ROWS)
    for kernel in compiled:
        name, layout = kernel.metadata.name, "" if aligned else " unaligned"
        kernel_script.check_resources(kernel, f"sm_{capability} {dtype}{layout}{' options' * given}")
        assert ".f64" not in kernel.asm["ptx"] and kernel.metadata.shared <= 48 * 1024
        check_order(kernel)
        check_offsets(kernel)
        if aligned and name != "_combine":
            assert kernel_script.widest(kernel, "ld") == 16, f"{name}: loads are narrow"
            if name in ("_gradient", "_scale"):
                assert kernel_script.widest(kernel, "st") == 16, f"{name}: stores are narrow"
        if name == "_fold" and not given:
            assert "fma" not in kernel.asm["ptx"], "products and sums are fused, which variants may do differently"


def compile_others() -> None:
    """What hosts and tests ask for besides: float16, extras alone, int32 targets, a view of three axes, another out."""
    x, y = torch.zeros(2, 3, 32000, dtype=torch.float16)[:, :-1], torch.zeros(4, dtype=torch.int32)
    with kernel_script.compiling_for(90) as compiled:
        statistics = module().head_combine(module().head_fold(x, y, *options(), 0, DEAD, True), y, 0, 32000, DEAD)
        module().head_gradient(x, y, statistics, None, torch.ones(4), *options(), 0, DEAD, torch.empty(4, 32000))
    for kernel in compiled:
        kernel_script.check_resources(kernel, "sm_90 float16 extras")
        check_order(kernel)


def compile_once() -> None:
    """Another temperature, number of rows, vocabulary or first column takes no other kernel; a bare 1 does not, too."""
    kernels = []
    for rows, V, temperature, start in ((2, VOCABULARY, 0.7, 0), (1, 32000, 1.0, 8192), (48, VOCABULARY + 8, 1.0, 1)):
        with kernel_script.compiling_for(90) as compiled:
            launch(logits_of("bfloat16", True, rows, V), True, temperature, start)
        kernels.append(compiled)
    for others in kernels[1:]:
        assert all(a is b for a, b in zip(kernels[0], others, strict=True))


COMPILED: dict[str, Callable[[], None]] = {
    **{
        f"sm_{capability}-{dtype}{'' if aligned else '-unaligned'}{'-options' * given}": partial(
            compile_all, capability, dtype, aligned, given
        )
        for capability in CAPABILITIES
        for dtype in ("bfloat16", "float32")
        for aligned in (True, False)
        for given in (False, True)
    },
    "others": compile_others,
    "once": compile_once,
}


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.parametrize("case", kernel_script.compiled_cases(COMPILED))
def test_ahead_of_time(case: str, compiled: dict[str, str]) -> None:
    assert not compiled[case], compiled[case]


if __name__ == "__main__":
    kernel_script.main(CASES, COMPILED)
