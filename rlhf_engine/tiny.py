"""A random two-layer Llama and a small tokenizer, made in process: the whole pipeline without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .fetch import quiet_transformers
from .rated import planted

EOS = "<eos>"


def tiny_model_folder(
    out: str | Path, seed: int = 0, texts: Sequence[str] | None = None, vocab_size: int = 512
) -> Path:
    """Writes model and tokenizer to `out`, readable by AutoModelForCausalLM and AutoTokenizer; returns `out` as a Path.

    The same arguments give the same files, byte for byte, and torch's random state is left as it was.

    Args:
        out: created where missing; files of that name are overwritten.
        seed: of the random weights.
        texts: what the tokenizer's merges are learned from; planted reviews where nothing is given.
        vocab_size: at most; few texts have fewer merges than that.

    Raises:
        ValueError: `texts` is empty, or `vocab_size` below the 256 bytes and the end-of-sequence token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = planted(2000, seed=0).texts if texts is None else list(texts)
    if not texts or vocab_size < 257:
        raise ValueError(f"tiny_model_folder: got {len(texts)} texts and vocab_size={vocab_size}; needs 1 and 257")
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte, so that no text is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out
