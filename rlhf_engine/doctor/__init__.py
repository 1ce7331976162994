"""`rlhf doctor`: is this installation whole, and if not, what to do: one sentence for each thing that is wrong.

In two parts. `without_torch` looks at files and metadata and imports nothing heavy, so it answers at once, even where
torch is broken; `with_torch` tries things out. Nothing is written, and no network is used.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_engine.doctor import extension, machine, packages, trials
from rlhf_engine.doctor.check import Check, attempt

SEEN = {
    "rlhf_engine": packages.this_package,
    "Python": packages.python,
    "system": machine.system,
    "CPU": machine.processor,
    "memory": machine.memory,
    "packages": packages.packages,
    "for the demo": packages.demo_packages,
    "shadowing": packages.shadowing,
    "build tools": extension.build_tools,
    "extension": extension.on_disk,
    "cache": machine.cache,
    "model and ratings": machine.demo_data,
}


def without_torch() -> Iterator[Check]:
    return (attempt(name, look) for name, look in SEEN.items())


def with_torch() -> Iterator[Check]:
    return trials.checks()
