"""The PPO trainer of TRL 1.12.0 in the engine's benchmark: it trains on every token of every prompt that ours gets."""

from __future__ import annotations

import torch
import trainers

from rlhf_engine.bench import engine_trl


def test_a_quick_round_is_right_and_timed() -> None:
    assert trainers.FOLDER
    (line,) = engine_trl.lines(torch.device("cpu"), quick=True)
    assert (line["verdict"], line["version"], line["setting"]) == ("right", "1.12.0", "all layers")
    assert set(line["seconds"]) == {"rollout", "score", "update", "step"} and line["tokens_per_second"] > 0
