"""Sampling responses with the policy's own weights: no second copy, no server.

The decode loop keeps what later stages need: the sampler's log-prob of every token, explicit response lengths, and the
hidden states that enter the requested layers (with a frozen trunk they serve scoring and every PPO epoch).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_engine import models
from rlhf_engine.models import LanguageModel
from rlhf_engine.types import Prompts, Rollout

BLOCK = 256  # tokens that are summed first when one is drawn


def sampling_logprobs(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B, V) logits -> (B, V) fp32 log-probs of the distribution that is sampled from; excluded tokens are -inf."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[1]:
        kth = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, index = logits.sort(dim=1, descending=True)
        mass = ordered.softmax(1).cumsum(1)
        # A token stays if the mass before it is still below top_p; the likeliest always stays.
        outside = (mass - ordered.softmax(1)) >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), float("-inf"))
    return logits.log_softmax(1)


def choose(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) int64 drawn from (B, V) probabilities by inverting their cumulative sum at `uniform` (B,) float64.

    One random number a row where torch.multinomial takes V, which on CPUs costs more than the head does. The sum runs
    over blocks of tokens first and then inside one block, in float64. A token of probability 0 is never drawn.
    """
    blocks = F.pad(probabilities, (0, -probabilities.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block, rest = _invert(blocks.sum(2), uniform)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]
    token, _ = _invert(inside, rest)
    return (block * BLOCK + token).clamp_(max=probabilities.shape[1] - 1)  # where everything is NaN


def _invert(masses: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The cell (B,) of masses (B, n) in which uniform * total falls, and how far into that cell, from 0 to 1."""
    cumulative = masses.double().cumsum(1)
    total = cumulative[:, -1:]
    # Strictly below the total, or rounding could lead behind the last cell that has a mass.
    wanted = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    cell = torch.searchsorted(cumulative, wanted, right=True).clamp(max=masses.shape[1] - 1)
    mass = masses.double().gather(1, cell)
    return cell[:, 0], ((wanted - (cumulative.gather(1, cell) - mass)) / mass).clamp(0, 1)[:, 0]


@torch.no_grad()
def sample(
    policy: LanguageModel,
    prompts: Prompts,
    *,
    tokenizer: Any,
    max_new_tokens: int,
    micro_batch_size: int,
    ignore_eos: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    capture: Iterable[int] = (),
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """One response per prompt, at most `max_new_tokens` long, ending early at the tokenizer's eos.

    Args:
        policy: causal LM on the prompts' device.
        ignore_eos: bans eos, so that every response has `max_new_tokens` tokens.
        capture: layer indices whose input is kept in `Rollout.hidden`, shape (B, P + T, H).
        generator: source of randomness, on the policy's device.
        progress: called with (tokens decoded so far, at most) once per decoding step.

    Raises:
        ValueError: temperature <= 0, logits that are NaN, or more tokens than the model has positions.
    """
    if temperature <= 0:
        raise ValueError(
            f"sample: temperature must be greater than 0, got {temperature}; use top_k=1 for greedy decoding"
        )
    tokens, mask = prompts.input_ids, prompts.attention_mask
    models.check_length(policy, int(mask.sum(1).amax()) + max_new_tokens)
    batch, width = tokens.shape
    eos = tokenizer.eos_token_id
    sampled = tokens.new_full((batch, max_new_tokens), eos)
    logprobs = torch.zeros(batch, max_new_tokens, device=tokens.device)
    response_mask = torch.zeros(batch, max_new_tokens, dtype=torch.bool, device=tokens.device)
    alive = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    pieces: dict[int, list[Tensor]] = {i: [] for i in capture}
    step = _decoder(policy, pieces)
    hidden = step(tokens, mask, models.position_ids(mask))
    weight, bias = models.output_head(policy)
    options = models.head_options(policy)
    position = mask.sum(1, keepdim=True)
    for t in range(max_new_tokens):
        logits = _logits(hidden[:, -1], weight, bias, **options)
        if ignore_eos:
            logits[:, eos] = -torch.inf
        distribution = sampling_logprobs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        uniform = torch.rand(batch, dtype=torch.float64, device=tokens.device, generator=generator)
        choice = choose(distribution.exp(), uniform)
        chosen = distribution.gather(1, choice[:, None])[:, 0]
        if torch.isnan(chosen).any():
            raise ValueError("sample: the policy's logits hold NaN; look at its weights, or lower the learning rate")
        sampled[:, t] = torch.where(alive, choice, sampled[:, t])
        logprobs[:, t] = torch.where(alive, chosen, 0.0)
        response_mask[:, t] = alive
        mask = torch.cat([mask, alive[:, None]], 1)
        alive = alive & (sampled[:, t] != eos)
        if progress is not None:
            progress(batch * (t + 1), batch * max_new_tokens)
        # The last token's trunk states are wanted too: reward and critic read the whole response.
        if t + 1 == max_new_tokens and not pieces:
            break
        hidden = step(sampled[:, t : t + 1], mask, position + t)
        if not alive.any() and t + 1 < max_new_tokens:
            break
    return _finish(prompts, sampled, logprobs, response_mask, pieces, micro_batch_size, tokenizer)


def _decoder(policy: LanguageModel, pieces: dict[int, list[Tensor]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A closure over the KV cache: new tokens in, their final hidden states out, captures appended to `pieces`."""
    from transformers import DynamicCache

    base = policy.base_model
    cache = DynamicCache(config=policy.config)
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def step(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        captured: models.HiddenStates = {}
        extra = {"position_ids": positions} if takes_positions else {}
        with models.capture_inputs(policy, pieces, captured):
            out = base(input_ids=tokens, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **extra)
        for index, hidden in captured.items():
            pieces[index].append(hidden)
        return out.last_hidden_state

    return step


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, softcap: float | None, logit_scale: float
) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float() * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _finish(
    prompts: Prompts,
    sampled: Tensor,
    logprobs: Tensor,
    response_mask: Tensor,
    pieces: dict[int, list[Tensor]],
    micro_batch_size: int,
    tokenizer: Any,
) -> Rollout:
    """Cuts the width to the longest response, decodes, and fixes the micro-batches."""
    longest = int(response_mask.sum(1).max())
    sampled, logprobs, response_mask = sampled[:, :longest], logprobs[:, :longest], response_mask[:, :longest]
    width = prompts.input_ids.shape[1] + longest
    lengths = response_mask.sum(1)
    last = sampled.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    return Rollout(
        prompts=prompts,
        tokens=torch.cat([prompts.input_ids, sampled], 1),
        attention_mask=torch.cat([prompts.attention_mask, response_mask], 1),
        response_mask=response_mask,
        sampler_logprobs=logprobs,
        finished=(last == tokenizer.eos_token_id) & (lengths > 0),
        texts=[
            tokenizer.decode(row[m], skip_special_tokens=True) for row, m in zip(sampled, response_mask, strict=True)
        ],
        micro_batches=cut(len(prompts), micro_batch_size),
        hidden={i: torch.cat(chunks, 1)[:, :width] for i, chunks in pieces.items()},
    )


def cut(rows: int, size: int) -> list[slice]:
    """Row ranges of at most `size` rows."""
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
