"""The tiny pipeline on a GPU, from planted ratings to folders that transformers loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from rlhf_engine import models, pipeline
from rlhf_engine.config import PRESETS, RunConfig
from rlhf_engine.metrics import RunLog

MISSING = [name for name in ("sklearn", "matplotlib", "jinja2", "yaml") if importlib.util.find_spec(name) is None]
pytestmark = [*gpu_tier.marks(180), pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")]


def changed(config: Any, key: str, value: object) -> Any:
    """With the setting of a dotted name."""
    first, _, rest = key.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def test_the_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig()
    settings = PRESETS["tiny"] | {
        "output": str(tmp_path / "run"), "device": DEVICE, "evaluate.judge": "none", "evaluate.samples": 8,
    }  # fmt: skip
    for key, value in settings.items():
        config = changed(config, key, value)
    lines = io.StringIO()
    with RunLog(tmp_path / "run", plain=True, stream=lines) as log:
        summary = pipeline.run(config, log)
    assert "step 3/3" in lines.getvalue()
    assert summary["status"] == "complete" and summary["ppo"]["reference_unchanged"] is True
    assert summary["ppo"]["first_update_ratio_max_abs_dev"] == 0
    assert summary["ppo"]["sampler_logprob_abs_diff_max"] < 1e-3
    assert 0.6 < summary["rm"]["human_pair_accuracy"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["skipped_steps"] == 0 for row in rows)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    base, policy = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("tiny_model", "policy"))
    assert models.checksum(base) != models.checksum(policy)
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "critic")
    with torch.no_grad():
        assert critic(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 1)
    answers = pipeline.generate(
        model=str(tmp_path / "run" / "policy"), prompts=["the old film"], samples=2, max_new_tokens=4
    )
    assert len(answers) == 2 and capsys.readouterr().out.count("the old film|") == 2
