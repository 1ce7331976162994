"""Text from any model folder: what a person looks at first."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlhf_engine import data, models, rollout

BATCH = 32  # prompts decoded together


def generate(
    *,
    model: str,
    prompts: list[str],
    tokenizer: str | None = None,
    samples: int = 1,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    output: str | None = None,
) -> list[dict[str, str]]:
    """`samples` responses to each prompt, in order; printed, or written to `output` as JSONL {prompt, response}."""
    models.quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = models.load_tokenizer(tokenizer or model)
    policy = models.load_causal_lm(model).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    rows: list[dict[str, str]] = []
    wanted = [prompt for prompt in prompts for _ in range(samples)]
    for start in range(0, len(wanted), BATCH):
        texts = wanted[start : start + BATCH]
        made = data.make_prompts(texts, words, ids=[str(start + i) for i in range(len(texts))])
        made.input_ids, made.attention_mask = made.input_ids.to(device), made.attention_mask.to(device)
        batch = rollout.sample(
            policy, made, tokenizer=words, max_new_tokens=max_new_tokens, micro_batch_size=BATCH,
            temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
        )  # fmt: skip
        rows += [{"prompt": p, "response": r} for p, r in zip(texts, batch.texts, strict=True)]
    if output is None:
        for row in rows:
            print(f"{row['prompt']}|{row['response']}\n")
    else:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        Path(output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows
