"""Where the tests of the GPU tier run, and what stands in for a GPU where there is none.

`pytest -m gpu` needs a GPU. Without one, RLHF_GPU_REHEARSAL=1 runs the same tests on the CPU, in small shapes and with
the backends that exist there: it shows that a test does what it says, so that on a GPU only the GPU is new.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from rlhf_engine import ops

ON_GPU = torch.cuda.is_available()
REHEARSAL = not ON_GPU and os.environ.get("RLHF_GPU_REHEARSAL") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
LOSS_BACKENDS = ("cuda", "triton") if ON_GPU else ("cpu", "reference")
HEAD_BACKEND = "triton" if ON_GPU else "cpu"

Results = list[tuple[str, Tensor]]
T = TypeVar("T")


def marks(seconds: int = 60) -> list[pytest.MarkDecorator]:
    """Of a test file of the tier; `seconds` is what one of its tests may take."""
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(not (ON_GPU or REHEARSAL), reason="torch sees no CUDA device"),
        pytest.mark.timeout(seconds),
        pytest.mark.filterwarnings("default"),  # of torch and its libraries at their first steps on a GPU: not ours
    ]


def not_rehearsed(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(REHEARSAL, reason=f"rehearsal: {reason}")


def pick(on_gpu: T, rehearsed: T) -> T:
    return on_gpu if ON_GPU else rehearsed


def needs(op: str, backend: str) -> pytest.MarkDecorator:
    reason = f"backend {backend!r} is not in this installation; `rlhf doctor` says why"
    return pytest.mark.skipif(backend not in ops.available(op), reason=reason)


each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs("gae", name)) for name in LOSS_BACKENDS]
)


def needs_memory(gigabytes: float) -> None:
    """Skips where the GPU has less free. What is rehearsed is small."""
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes:.0f} GB of the GPU's memory, {free:.0f} GB are free")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=DEVICE, dtype=dtype)


def same_bits(first: Results, second: Results) -> None:
    for (name, x), (_, y) in zip(first, second, strict=True):
        assert x.shape == y.shape and torch.equal(x, y), name


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, a wait for the GPU is an error."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def side_stream() -> Iterator[None]:
    """What is inside goes to a stream of its own, after all that was asked of this one, which then waits for it."""
    if not ON_GPU:
        yield
        return
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


def main_stream() -> AbstractContextManager[Any]:
    """Inside a side stream: what is inside of this goes to the usual one, beside it."""
    return torch.cuda.stream(torch.cuda.default_stream()) if ON_GPU else nullcontext()


def delay() -> None:
    """Keeps the current stream of the GPU busy, for some 50 milliseconds."""
    if ON_GPU:
        torch.cuda._sleep(100_000_000)  # cycles


def replayed(step: Callable[[], Results], inputs: list[Tensor], others: list[Tensor]) -> Results:
    """What `step` makes of `inputs`, captured in a CUDA graph and replayed once `others` stand in their place."""
    if ON_GPU:
        with side_stream():
            step()  # compiles kernels, and makes what libraries make once
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    if ON_GPU:
        graph.replay()
    else:
        results = step()
    return [(name, x.detach().clone()) for name, x in results]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def on_device(x: Any) -> Any:
    """A tensor there, which requires grad as it did; anything else as it is."""
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
