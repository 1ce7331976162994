"""The tiny model folder loads like any other, and the same arguments give the same bytes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_engine.data import make_prompts
from rlhf_engine.fetch import quiet_transformers
from rlhf_engine.tiny import tiny_model_folder

TEXTS = ["the old film is superb and warm", "this new plot is dull and stale"] * 20


def test_loads_with_the_auto_classes(tmp_path):
    folder = tiny_model_folder(tmp_path / "deep" / "tiny")
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (2, 64, 2)
    assert config.vocab_size == len(tokenizer) <= 512 and config.tie_word_embeddings
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == config.eos_token_id == config.pad_token_id
    text = 'any bytes: "é" 你 \n\t\U0001f600'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("the old film is superb").input_ids) <= 7, "its own words are about one token each"

    prompts = make_prompts(["the old film is", "this"], tokenizer)
    assert prompts.attention_mask.sum(1).tolist() == [4, 1] and prompts.attention_mask[:, -1].all()
    alone = make_prompts(["this"], tokenizer)
    with torch.no_grad():
        together = model(prompts.input_ids, attention_mask=prompts.attention_mask).logits[1, -1]
        # Left padding shifts positions, which rotary embeddings do not see.
        assert torch.allclose(together, model(alone.input_ids).logits[0, -1], atol=1e-4)


def test_deterministic_by_seed_and_leaves_torch_alone(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    folders = [tiny_model_folder(tmp_path / name, seed, TEXTS) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(state, torch.get_rng_state())
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert files[0]["model.safetensors"] != files[2]["model.safetensors"]
    assert files[0]["tokenizer.json"] == files[2]["tokenizer.json"]


@pytest.mark.parametrize(("texts", "size"), [([], 512), (["a"], 100)])
def test_refuses_what_cannot_work(texts, size, tmp_path):
    with pytest.raises(ValueError, match="tiny_model_folder: got"):
        tiny_model_folder(tmp_path / "t", 0, texts, size)
    assert not (tmp_path / "t").exists()
