"""Supervised fine-tuning: next-token loss on the targets alone, through the same head op as PPO.

loss = -sum of log-probs of target tokens / number of target tokens in the optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_engine import models, ops
from rlhf_engine.config import PPOConfig, SFTConfig
from rlhf_engine.data import SFTRecord
from rlhf_engine.models import LanguageModel
from rlhf_engine.ppo import MasterAdamW


@dataclass(slots=True)
class SFTReport:
    """What happened: losses in nats per target token, one per optimiser step."""

    losses: list[float]
    records: int
    cut: int  # records longer than max_tokens
    target_tokens: int


@dataclass(slots=True)
class _Row:
    tokens: Tensor  # (S,) int64
    target: Tensor  # (S,) bool: loss falls on this token
    cut: bool  # the record was longer


def train_sft(
    model: LanguageModel,
    tokenizer: Any,
    records: list[SFTRecord],
    *,
    config: SFTConfig | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SFTReport:
    """Trains `model` in place; requires_grad is set by `config.train_layers` (-1: everything, embeddings too).

    Raises:
        ValueError: no records, or none with a target token.
    """
    config = config or SFTConfig()
    rows = [_row(record, tokenizer, config.max_tokens) for record in records]
    cut = sum(row.cut for row in rows)
    rows = [row for row in rows if row.target[1:].any()]
    if not rows:
        raise ValueError("train_sft: no record has a target token within sft.max_tokens")
    everything = config.train_layers < 0
    models.freeze(model, train_layers=config.train_layers, train_embeddings=everything, train_head=everything)
    optimiser = MasterAdamW(model.parameters(), config.lr, PPOConfig(adam_beta2=0.999))
    steps = config.epochs * -(-len(rows) // config.batch_size)
    losses: list[float] = []
    for batch in _batches(rows, config, seed):
        losses.append(_step(model, batch))
        optimiser.step(factor=1 - (len(losses) - 1) / steps, max_grad_norm=1.0)
        if progress is not None:
            progress(len(losses), steps)
    model.requires_grad_(False)
    return SFTReport(losses, len(rows), cut, sum(int(row.target[1:].sum()) for row in rows))


def _row(record: SFTRecord, tokenizer: Any, max_tokens: int) -> _Row:
    eos = tokenizer.eos_token_id
    prefix = tokenizer(record.prefix)["input_ids"] if record.prefix else []
    target = tokenizer(record.target, add_special_tokens=not prefix)["input_ids"]
    # Some tokenizers close every text by themselves: the end belongs behind the target, once.
    prefix, target = (ids[:-1] if ids[-1:] == [eos] else ids for ids in (prefix, target))
    target = [*target, eos]
    ids = prefix + target
    tokens = torch.tensor(ids[:max_tokens], dtype=torch.int64)
    return _Row(tokens, torch.arange(len(tokens)) >= len(prefix), cut=len(ids) > max_tokens)


def _batches(rows: list[_Row], config: SFTConfig, seed: int) -> Iterator[list[_Row]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        for index in torch.randperm(len(rows), generator=generator).split(config.batch_size):
            yield [rows[i] for i in index.tolist()]


def _step(model: LanguageModel, batch: list[_Row]) -> float:
    """Forward and backward of one batch; returns the mean loss per target token."""
    device = next(model.parameters()).device
    tokens = nn.utils.rnn.pad_sequence([row.tokens for row in batch], batch_first=True).to(device)
    target = nn.utils.rnn.pad_sequence([row.target for row in batch], batch_first=True).to(device)
    lengths = torch.tensor([len(row.tokens) for row in batch], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    hidden, _ = models.run_body(model, tokens, mask)
    weight, bias = models.output_head(model)
    scored = target[:, 1:] & mask[:, 1:]
    loss, _ = ops.linear_policy_loss(
        hidden[:, :-1], weight, tokens[:, 1:], lambda logprobs, entropy, rows: -logprobs, bias=bias, mask=scored,
        **models.head_options(model),
    )  # fmt: skip
    loss.backward()
    return float(loss.detach())
