"""Frozen trunks, shared parameters and partial forward passes on five families, against the families' own forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_lm, word_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from rlhf_engine import models
from rlhf_engine.models import ModelError

UNTIED = {"gpt_neox", "qwen2"}


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Three rows of 7, 4 and 1 real tokens in a width of 7; what fills the rest is no pad id."""
    tokens = torch.randint(1, 12, (3, 7), generator=torch.Generator().manual_seed(1))
    lengths, place = torch.tensor([7, 4, 1])[:, None], torch.arange(7)[None, :]
    return tokens, place < lengths if side == "right" else place >= 7 - lengths


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_trains_the_last_layers_and_the_final_norm(family: str) -> None:
    model = tiny_lm(family)
    layers = models.decoder_layers(model)
    everything = {n for n, _ in model.named_parameters()}
    outside = everything - {n for n in everything for i in range(3) if f".{i}." in n}
    embeddings = {n for n in outside if "embed" in n or ("norm" not in n and "ln_f" not in n)}
    norm = outside - embeddings
    assert len(layers) == 3 and norm and embeddings

    models.freeze(model, train_layers=0)
    assert trained(model) == set()
    models.freeze(model, train_layers=1)
    assert trained(model) == {n for n in everything if ".2." in n} | norm
    models.freeze(model, train_layers=-1)
    assert trained(model) == everything - embeddings
    models.freeze(model, train_layers=3, train_embeddings=True, train_head=True)
    assert trained(model) == everything
    with pytest.raises(ModelError, match="train_layers is 4, but the model has only 3"):
        models.freeze(model, train_layers=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_treats_a_tied_head_and_embeddings_as_one(family: str) -> None:
    model = tiny_lm(family)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = head is embedding
    assert tied == (family not in UNTIED)
    models.freeze(model, train_layers=1, train_head=True)
    assert head.requires_grad and embedding.requires_grad == tied
    models.freeze(model, train_layers=1, train_embeddings=True)
    assert embedding.requires_grad and head.requires_grad == tied
    models.freeze(model, train_layers=1)
    assert not embedding.requires_grad and not head.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_shares_exactly_the_frozen_objects(family: str) -> None:
    model = tiny_lm(family)
    models.freeze(model, train_layers=1)
    other = models.copy_sharing_frozen(model)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert set(mine) == set(theirs)
    for name in mine:
        assert (mine[name] is theirs[name]) == (not mine[name].requires_grad), name
        assert torch.equal(mine[name], theirs[name])
        assert mine[name].requires_grad == theirs[name].requires_grad
    tokens, mask = batch("left")
    with torch.no_grad():
        before = other(tokens, attention_mask=mask.long()).logits
        for name in trained(model):
            mine[name].add_(1.0)
        assert torch.equal(before, other(tokens, attention_mask=mask.long()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_depth_counts_leading_frozen_layers(family: str) -> None:
    model = tiny_lm(family)
    for train_layers, depth in ((3, 0), (2, 1), (1, 2)):
        models.freeze(model, train_layers=train_layers)
        assert models.shared_depth(model, models.copy_sharing_frozen(model)) == depth
    models.freeze(model, train_layers=1, train_embeddings=True)
    assert models.shared_depth(model, models.copy_sharing_frozen(model)) is None
    assert models.shared_depth(model, copy.deepcopy(model)) is None
    assert models.shared_depth(model, model) == 3


def test_layers_that_are_the_same_object_but_trained_are_not_shared() -> None:
    model = tiny_lm()
    models.freeze(model, train_layers=3)
    other = copy.copy(model)  # every parameter is the same object
    assert models.shared_depth(model, other) == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_body_from_any_layer_equals_the_familys_own_forward(family: str, side: str) -> None:
    model = tiny_lm(family)
    tokens, mask = batch(side)
    with torch.no_grad():
        plain, states = models.run_body(model, tokens, mask, capture=range(4))
        alone = [model(tokens[i][mask[i]][None], output_hidden_states=True).hidden_states for i in range(3)]
        theirs = hooks(model)  # transformers leaves its own behind
        for layer in range(3):
            for i in range(3):  # transformers' hidden_states[layer] is the input of that layer
                torch.testing.assert_close(states[layer][i][mask[i]], alone[i][layer][0], rtol=1e-4, atol=1e-5)
            again, late = models.run_body(
                model, tokens, mask, start=(layer, states[layer]), capture=[c for c in (2, 3) if c > layer]
            )
            assert torch.equal(again, plain), f"from layer {layer}"
            assert all(torch.equal(late[c], states[c]) for c in late)
    for i in range(3):
        torch.testing.assert_close(plain[i][mask[i]], alone[i][-1][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(states[3], plain) and hooks(model) == theirs
    assert all(type(layer).__name__ != "_Skipped" for layer in models.decoder_layers(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_options_give_the_familys_own_logits(family: str) -> None:
    model = tiny_lm(family)
    tokens, mask = batch("right")
    with torch.no_grad():
        hidden, _ = models.run_body(model, tokens, mask)
        weight, bias = models.output_head(model)
        options = models.head_options(model)
        logits = nn.functional.linear(hidden, weight, bias) * options["logit_scale"]
        if options["softcap"]:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        torch.testing.assert_close(logits[0], model(tokens[:1]).logits[0], rtol=1e-4, atol=1e-5)
    assert (options["softcap"] == 5.0) == (family == "gemma2")


def test_granite_and_cohere_scales() -> None:
    def scale(**config: Any) -> float:
        class Stub:
            def get_text_config(self) -> Stub:
                return self

        made = Stub()
        made.__dict__.update(config)
        return models.head_options(type("Model", (), {"config": made}))["logit_scale"]

    assert scale(logit_scale=0.0625) == 0.0625 and scale(logits_scaling=8.0) == 0.125 and scale() == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_started_body_reach_the_trained_layers_alone(family: str) -> None:
    model = tiny_lm(family)
    models.freeze(model, train_layers=1)
    tokens, mask = batch("left")
    states = models.run_trunk(model, tokens, mask, [2])
    grads = []
    for start in (None, (2, states[2])):
        model.zero_grad()
        models.run_body(model, tokens, mask, start=start)[0][mask].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) == trained(model)
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_stops_early_and_leaves_no_hooks(family: str) -> None:
    model = tiny_lm(family)
    tokens, mask = batch("left")
    ran: list[int] = []
    layers = models.decoder_layers(model)
    counters = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    states = models.run_trunk(model, tokens, mask, [1, 0, 1])
    assert ran == [0] and sorted(states) == [0, 1]
    ran.clear()
    everything = models.run_trunk(model, tokens, mask, [1, 3])
    assert ran == [0, 1, 2] and sorted(everything) == [1, 3]
    assert torch.equal(states[1], everything[1]) and not everything[3].requires_grad
    for counter in counters:
        counter.remove()
    assert hooks(model) == 0


def test_an_exception_leaves_the_model_whole() -> None:
    model = tiny_lm()
    tokens, mask = batch("left")
    with torch.no_grad():
        want, states = models.run_body(model, tokens, mask, capture=[2])
    layers = models.decoder_layers(model)
    real = list(layers)
    model.base_model.norm.register_forward_hook(fail := lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    for start in (None, (0, states[2]), (2, states[2])):
        with pytest.raises(RuntimeError, match="stop"):
            models.run_body(model, tokens, mask, start=start, capture=[1])
        assert list(layers) == real and all(a is b for a, b in zip(layers, real, strict=True))
    with pytest.raises(IndexError):
        models.run_trunk(model, tokens.fill_(99), mask, [1])
    model.base_model.norm._forward_hooks.clear()
    assert hooks(model) == 0 and callable(fail)
    with torch.no_grad():
        assert torch.equal(models.run_body(model, batch("left")[0], mask)[0], want)


def test_checksum_sees_every_bit_and_nothing_else() -> None:
    model = tiny_lm(dtype=torch.bfloat16)
    before = models.checksum(model)
    assert before == models.checksum(copy.deepcopy(model)) == models.checksum(model.requires_grad_(False))
    with torch.no_grad():
        weight = model.base_model.norm.weight
        weight.view(torch.int16)[3] ^= 1
        assert models.checksum(model) != before
        weight.view(torch.int16)[3] ^= 1
    assert models.checksum(model) == before != models.checksum(tiny_lm(seed=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "~/x", "a/b/c", "owner/"])
def test_a_mistyped_folder_is_named_at_once(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder: " + name):
        models.check_model_name(name)


def test_model_names_and_folders(tmp_path: Path) -> None:
    models.check_model_name("owner/name")
    with pytest.raises(ModelError, match="holds no config.json"):
        models.check_model_name(str(tmp_path))
    with pytest.raises(ModelError, match="no such config file"):
        models.load_causal_lm(str(tmp_path / "x.json"))
    (tmp_path / "config.json").write_text("{}")
    models.check_model_name(str(tmp_path))
    with pytest.raises(ModelError, match="cannot load"):
        models.load_causal_lm(str(tmp_path))
    with pytest.raises(ModelError, match="tokenizer: cannot load"):
        models.load_tokenizer(str(tmp_path))


def test_a_json_config_gives_random_weights_by_seed(tmp_path: Path) -> None:
    FAMILIES["qwen2"]().to_json_file(tmp_path / "small.json")
    a, b, c = (models.load_causal_lm(str(tmp_path / "small.json"), seed=seed) for seed in (1, 1, 2))
    assert models.checksum(a) == models.checksum(b) != models.checksum(c)
    assert not a.training and a.dtype == torch.float32


def test_a_tokenizer_pads_left_and_needs_an_end_token(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    FAMILIES["llama"]().save_pretrained(tmp_path)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path)).padding_side == "left"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        models.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("with_body", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_critic_survives_its_folder(family: str, with_body: bool, tmp_path: Path) -> None:
    reference = tiny_lm(family)
    critic = models.Critic(32, tiny_lm(family, seed=1) if with_body else None)
    assert not critic(torch.randn(2, 3, 32)).any(), "values start at zero"
    with torch.no_grad():
        critic.score.weight.normal_()
        critic.score.bias.fill_(0.5)
    models.save_critic(critic, reference, tmp_path)
    tokens, mask = batch("right")
    back = models.critic_from_classifier(AutoModelForTokenClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(back.score.weight, critic.score.weight) and torch.equal(back.score.bias, critic.score.bias)
    with torch.no_grad():
        want = critic(models.run_body(critic.body or reference, tokens, mask)[0])
        assert torch.equal(back(models.run_body(back.body, tokens, mask)[0]), want)


def test_a_critic_starts_from_a_reward_model_without_a_bias() -> None:
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    critic = models.critic_from_classifier(classifier)
    assert torch.equal(critic.score.weight, classifier.score.weight) and not critic.score.bias.any()
    config.num_labels = 2
    with pytest.raises(ModelError, match="0 linear layers with one output; num_labels must be 1"):
        models.critic_from_classifier(AutoModelForSequenceClassification.from_config(config))
