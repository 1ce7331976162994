"""Classic RLHF on one machine: comparisons -> Elo ranking -> reward model -> PPO.

Importing this package imports neither torch nor anything else heavy: each public name loads its module when first used
(PEP 562), so `rlhf --help` and mistakes in a config answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from . import ranking as ranking
    from . import types as types
    from .config import PPOConfig as PPOConfig
    from .config import RunConfig as RunConfig
    from .engine import PPOEngine as PPOEngine
    from .policy_head import LinearPolicyHead as LinearPolicyHead
    from .reward_training import train_reward_model as train_reward_model
    from .sft import train_sft as train_sft
    from .types import Comparisons as Comparisons
    from .types import Experience as Experience
    from .types import Prompts as Prompts
    from .types import Ranking as Ranking
    from .types import RatedTexts as RatedTexts
    from .types import Rollout as Rollout
    from .types import StepStats as StepStats

__version__ = "0.1.0"

_MODULES = ("ops", "ranking", "types")
_HOME = {
    "PPOConfig": "config",
    "RunConfig": "config",
    "PPOEngine": "engine",
    "LinearPolicyHead": "policy_head",
    "train_reward_model": "reward_training",
    "train_sft": "sft",
    "Comparisons": "types",
    "Experience": "types",
    "Prompts": "types",
    "Ranking": "types",
    "RatedTexts": "types",
    "Rollout": "types",
    "StepStats": "types",
}
__all__ = ["__version__", *_MODULES, *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")  # the import itself binds the name, so this runs once
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
