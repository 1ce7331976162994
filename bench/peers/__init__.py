"""Other programs for the same ops, as their released packages have them; one file each.

A peer that is not installed, or cannot run here, is named with the reason. PEERS lists folders with packages, as
`make peers` and `make upstream` fill them, separated like PATH; they are searched last.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

from rlhf_engine.bench.case import Answer, Tensors, Way

FILES = (
    "torch_eager", "torch_compile", "torch_linear_ce", "trl", "liger", "verl", "openrlhf", "cce", "quack", "torchrl",
)  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """A function for one op, with the op's tensors and answers (see ops_cases.py and head_cases.py)."""

    run: Callable[[Tensors], Answer]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    capability: int | None = None  # the only GPU it runs on, as 90
    note: str = ""  # in what its work differs from the others'
    prepare: Callable[[Tensors], Tensors] | None = None  # makes inputs of the form it is given in practice; not timed


@dataclass(frozen=True, eq=False)  # itself alone, so that what it loads can be remembered
class Peer:
    name: str
    package: str  # as package registries call it
    pinned: str  # the version that it was read at; another is used, and its own version said
    offers: dict[str, Offer]
    load: Callable[[], str] = field(default=lambda: "")  # imports it; returns the version, raises ImportError


@cache
def everyone() -> tuple[Peer, ...]:
    return tuple(peer for name in FILES for peer in importlib.import_module(f"rlhf_engine.bench.peers.{name}").PEERS)


@cache
def loaded(peer: Peer) -> tuple[str, str]:
    """Its version, and why it is absent."""
    try:
        return peer.load(), ""
    except Exception as error:  # a broken package is an absent one
        return "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def unfit(offer: Offer, dtype: torch.dtype, device: torch.device) -> str:
    """Why it cannot run on such tensors here; empty if it can."""
    if device.type not in offer.devices:
        return f"runs on {' and '.join(offer.devices)} alone"
    if dtype not in offer.dtypes:
        return f"does not take {str(dtype).removeprefix('torch.')}"
    wanted = offer.capability if device.type == "cuda" else None
    if wanted and torch.cuda.get_device_capability(device) != divmod(wanted, 10):
        return f"runs on compute capability {wanted / 10} alone"
    return ""


def ways(op: str, dtype: torch.dtype, device: torch.device) -> list[Way]:
    """What can run here."""
    found = []
    for peer in everyone():
        offer = peer.offers.get(op)
        if offer and not unfit(offer, dtype, device) and not loaded(peer)[1]:
            found.append(Way(peer.name, offer.run, loaded(peer)[0], offer.note, prepare=offer.prepare))
    return found


def absent(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, str]:
    """Peer, or an op of it -> why it is not measured here."""
    reasons = {}
    for peer in everyone():
        why = loaded(peer)[1]
        if why:
            reasons[f"{peer.name} ({peer.package} {peer.pinned})"] = why
            continue
        unfitting = {
            op: whys[0] for op, offer in peer.offers.items() if all(whys := [unfit(offer, x, device) for x in dtypes])
        }
        if len(unfitting) == len(peer.offers) and len(set(unfitting.values())) == 1:
            reasons[peer.name] = next(iter(unfitting.values()))
        else:
            reasons |= {f"{peer.name}, {op}": why for op, why in unfitting.items()}
    return reasons


def present() -> list[str]:
    return [f"{peer.name} {loaded(peer)[0]}: {', '.join(peer.offers)}" for peer in everyone() if not loaded(peer)[1]]
