"""Random three-layer models of six families and a tokenizer of twelve words, for tests of everything above the ops."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ARMS = "abcdefghij"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 12}
KEYS = {
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL, **KEYS, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL, **KEYS),
    "gemma2": lambda: Gemma2Config(**SMALL, **KEYS, head_dim=16, final_logit_softcapping=5.0),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=3, n_head=2, vocab_size=12, n_positions=64, eos_token_id=0, bos_token_id=0
    ),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=3, n_head=2, vocab_size=12, eos_token_id=0, bos_token_id=0),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, max_position_embeddings=64, eos_token_id=0, bos_token_id=0),
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; "." ends a sequence and pads, as many real tokenizers have it."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate("." + ARMS + "z")}, unk_token="z"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".", pad_token=".", padding_side="left")


def tiny_lm(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # default init is nearly uniform over tokens: nothing could go wrong there
            parameter.mul_(3.0) if parameter.ndim > 1 else None
    return model
