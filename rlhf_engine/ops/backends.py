"""Which function runs an op: a table op -> backend -> function, filled where a backend exists in this installation.

`backend=None` takes the first of a device's list that is in the table. A backend that is asked for by name and is not
there raises: a silent fallback would let a benchmark or a bug report speak of code that never ran.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from rlhf_engine import native, reference
from rlhf_engine.ops import adaptors, from_logits, head_operators, operators, tiled_head

PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_RUNS_ON = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # the device type a backend needs; the reference needs none

_TABLE: dict[str, dict[str, Callable[..., Any]]] = {
    op: {"reference": getattr(reference, op)}
    for op in (
        "token_logprobs",
        "linear_logprobs",
        "linear_policy_loss",
        "linear_logprob_stats",
        "kl_estimate",
        "gae",
        "whiten",
        "kl_gae",
        "ppo_loss",
        "value_loss",
    )
}


def _add(namespace: str, backends: tuple[str, ...], head: str) -> None:
    """The ops of a namespace of operators; those of the head exist for one device, `head`."""
    functions = adaptors.Adaptors(namespace)
    operators.register(namespace)
    for op in adaptors.OPS:
        _TABLE[op] |= dict.fromkeys(backends, getattr(functions, op))
    tiled = tiled_head.TiledHead(namespace)
    head_operators.register(namespace)
    _TABLE["token_logprobs"][head] = from_logits.FromLogits(namespace).token_logprobs
    for op in tiled_head.OPS:
        _TABLE[op][head] = getattr(tiled, op)


if native.load():
    _add("rlhf_engine", ("cpu", "cuda") if native.build_info().get("nvcc") else ("cpu",), "cpu")
if importlib.util.find_spec("triton"):
    _TRITON = operators.define_triton()  # gone with the last reference to it
    _add("rlhf_triton", ("triton",), "triton")


def available(op: str, device_type: str | None = None) -> tuple[str, ...]:
    """Names that `backend=` accepts for this op here; with a device type, those for tensors on such a device."""
    return tuple(name for name in _TABLE[op] if device_type in (None, _RUNS_ON.get(name, device_type)))


def chosen(op: str, device_type: str) -> str:
    """The name that `backend=None` stands for."""
    for name in PREFERENCE.get(device_type, ()):
        if name in _TABLE[op]:
            return name
    return "reference"


def names() -> tuple[str, ...]:
    """Every op that has backends."""
    return tuple(_TABLE)


def extension_missing() -> str:
    """Why the compiled extension is not there, as a sentence; empty if it is."""
    return native.why_missing()


def select(op: str, backend: str | None, device_type: str) -> Callable[..., Any]:
    """The function of `op` for tensors on a device of that type ("cpu", "cuda").

    Raises:
        ValueError: no backend of that name, or one for another device.
        RuntimeError: the backend exists in general, yet not for this op in this installation.
    """
    functions = _TABLE[op]
    if backend is None:
        return functions[chosen(op, device_type)]
    if backend not in ("reference", *_RUNS_ON):
        raise ValueError(f"{op}: there is no backend {backend!r}; choose among reference, {', '.join(_RUNS_ON)}")
    if backend not in functions:
        raise RuntimeError(
            f"{op}: backend {backend!r} is not available in this installation; "
            f"pass backend=None or one of: {', '.join(functions)}"
        )
    if _RUNS_ON.get(backend, device_type) != device_type:
        raise ValueError(
            f"{op}: backend {backend!r} needs tensors on {_RUNS_ON[backend]}, got {device_type}; "
            "move them or pass backend=None"
        )
    return functions[backend]
