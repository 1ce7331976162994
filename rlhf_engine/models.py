"""Language models as a frozen trunk and trained top layers, for any decoder family of transformers.

Policy, reference, critic and reward model share every frozen parameter (one object, not one copy each), so the hidden
states that enter the first trained layer are computed once and reused. No family is named here: layers are found by
structure, and masks, rotary tables and norms stay the family's own code.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LanguageModel = Any  # a transformers model; its attributes depend on the family
HiddenStates = dict[int, Tensor]  # layer index -> (B, S, H) entering that layer; num_layers -> after the final norm


class ModelError(ValueError):
    """A model that cannot be loaded or has no shape we understand; the message says what to do."""


def load_causal_lm(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A causal language model in eval mode: from a folder or hub name, or with random weights from a .json config."""
    import transformers

    if name.endswith(".json"):
        if not os.path.isfile(name):
            raise ModelError(f"model: no such config file: {name}")
        config = transformers.AutoConfig.from_pretrained(name)
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    check_model_name(name)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"model: cannot load {name}: {first_sentence(error)}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name, padding on the left as generation needs it."""
    import transformers

    check_model_name(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer: cannot load {name}: {first_sentence(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer: {name} has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return tokenizer


def quiet_transformers() -> None:
    """No progress bars for loading and saving weights: they would tear a log apart."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def check_model_name(name: str) -> None:
    """A mistyped folder must not turn into half a minute of attempts to reach a hub."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ModelError(f"model: the folder {name} holds no config.json, so it is not a model folder")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelError(f"model: no such folder: {name} (a hub name has the form owner/name)")


def first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def decoder_layers(model: LanguageModel) -> nn.ModuleList:
    """The list of decoder blocks, found by its length."""
    config = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ModelError(f"{type(model).__name__}: found no list of {config.num_hidden_layers} decoder layers")


def output_head(model: LanguageModel) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of the language-model head."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head")
    return head.weight, getattr(head, "bias", None)


def check_length(model: LanguageModel, tokens: int) -> None:
    """Raises ModelError where prompt and response together need more positions than the model has."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise ModelError(
            f"{tokens} tokens of prompt and response do not fit the model's {most} positions; lower max_new_tokens"
        )


def head_options(model: LanguageModel) -> dict[str, Any]:
    """What the family does to logits besides the matrix product: keyword arguments of ops.linear_logprobs."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": float(scale)}


def freeze(
    model: LanguageModel, *, train_layers: int, train_embeddings: bool = False, train_head: bool = False
) -> None:
    """Sets requires_grad: the last `train_layers` blocks (-1 = all) and the final norm; embeddings and head as asked.

    With tied weights, training either of embeddings and head trains both.
    """
    layers = decoder_layers(model)
    if train_layers > len(layers):
        raise ModelError(f"train_layers is {train_layers}, but the model has only {len(layers)} layers")
    model.requires_grad_(train_layers != 0)
    for layer in layers[: len(layers) - train_layers] if train_layers >= 0 else []:
        layer.requires_grad_(False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    kept = {id(p) for p in layers.parameters()} | {id(p) for p in _after_layers(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:  # token and position tables, and norms that some families put behind them
            parameter.requires_grad_(train_embeddings)
    if head is not None and head.weight is not embeddings.weight:
        head.requires_grad_(train_head)
    elif train_head:
        embeddings.requires_grad_(True)


def copy_sharing_frozen(model: LanguageModel) -> LanguageModel:
    """A copy that owns its trainable parameters and shares the frozen ones (the same objects) with `model`."""
    memo: dict[int, Tensor] = {id(p): p for p in model.parameters() if not p.requires_grad}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def shared_depth(model: LanguageModel, other: LanguageModel) -> int | None:
    """How many leading layers of two models are the same frozen objects; None if not even the embeddings are."""
    if model is other:
        return len(decoder_layers(model))
    same = {id(p) for p in other.parameters() if not p.requires_grad}
    layers = decoder_layers(model)
    inside = {id(p) for p in layers.parameters()}
    norms_and_head = {id(p) for p in _after_layers(model)}
    before = [p for p in model.parameters() if id(p) not in inside and id(p) not in norms_and_head]
    if type(model) is not type(other) or not all(id(p) in same for p in before):
        return None
    depth = 0
    for layer in layers:
        if not all(id(p) in same for p in layer.parameters()):
            break
        depth += 1
    return depth


def _after_layers(model: LanguageModel) -> Iterator[nn.Parameter]:
    """Final norm and an untied head: everything that is registered after the list of layers."""
    layers, seen = decoder_layers(model), False
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if module is layers:
            seen = True
        elif seen and module not in set(layers.modules()):
            yield from (p for p in module.parameters(recurse=False) if p is not embedding)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, S) int64 positions counted from each row's first real token; padding gets 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)


def run_body(
    model: LanguageModel,
    tokens: Tensor,
    attention_mask: Tensor,
    *,
    capture: Iterable[int] = (),
    start: tuple[int, Tensor] | None = None,
    into: HiddenStates | None = None,
) -> tuple[Tensor, HiddenStates]:
    """The model without its head.

    Args:
        tokens: (B, S) int64.
        attention_mask: (B, S) bool, left- or right-padded.
        capture: layer indices whose input is wanted besides; num_layers means the final hidden state.
        start: (k, hidden (B, S, H)): layers before k are skipped and `hidden` enters layer k in their place.
        into: where captures are stored (default: a new dict).

    Returns:
        final hidden state (B, S, H) after the last norm, and the captured inputs.
    """
    base = model.base_model
    captured: HiddenStates = {} if into is None else into
    num_layers = len(decoder_layers(model))
    wanted = set(capture)
    with ExitStack() as stack:
        if start is not None:
            stack.enter_context(_skip_layers(model, *start))
        stack.enter_context(capture_inputs(model, wanted - {num_layers}, captured))
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": attention_mask.long(), "use_cache": False}
        if "position_ids" in inspect.signature(base.forward).parameters:
            arguments["position_ids"] = position_ids(attention_mask)
        hidden = base(**arguments).last_hidden_state
    if num_layers in wanted:
        captured[num_layers] = hidden
    return hidden, captured


@contextmanager
def capture_inputs(model: LanguageModel, wanted: Iterable[int], into: HiddenStates) -> Iterator[None]:
    """While active, every forward pass stores the hidden state entering the wanted layers in `into`."""
    layers = decoder_layers(model)

    def hook(index: int) -> Any:
        def store(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[index] = args[0] if args else kwargs["hidden_states"]

        return store

    handles = [layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in sorted(set(wanted))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a forward pass once all wanted hidden states are there."""


@torch.no_grad()
def run_trunk(model: LanguageModel, tokens: Tensor, attention_mask: Tensor, capture: Iterable[int]) -> HiddenStates:
    """Hidden states entering the wanted layers, without gradient; layers above the last of them are not run."""
    wanted, layers = sorted(set(capture)), decoder_layers(model)
    if not wanted or wanted[-1] == len(layers):
        return run_body(model, tokens, attention_mask, capture=wanted)[1]
    captured: HiddenStates = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured[wanted[-1]] = args[0] if args else kwargs["hidden_states"]
        raise _Stop

    handle = layers[wanted[-1]].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_body(model, tokens, attention_mask, capture=wanted[:-1], into=captured)
    except _Stop:
        pass
    finally:
        handle.remove()
    return captured


class _Skipped(nn.Module):
    """Stands in for a decoder layer that is not run; anything the family reads off a layer is the real layer's."""

    def __init__(self, layer: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["real"] = layer
        self.__dict__["hidden"] = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


@contextmanager
def _skip_layers(model: LanguageModel, k: int, hidden: Tensor) -> Iterator[None]:
    layers = decoder_layers(model)
    real = [layers[i] for i in range(k)]
    stand_ins = [_Skipped(layer, hidden) for layer in real]

    # Some families unpack a tuple from each layer; whatever that makes of a stand-in's output is replaced here.
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = layers[k].register_forward_pre_hook(enter, with_kwargs=True)
    for i, stand_in in enumerate(stand_ins):
        layers[i] = stand_in
    try:
        yield
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer
        handle.remove()


def checksum(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: a reference must keep it for the whole run.

    With `dtype` of the parameters rounded to it: bfloat16 tells whether two models are the same but for their dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().to(dtype or parameter.dtype).cpu().contiguous()
        digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Critic(nn.Module):
    """A scalar head on a body. With `body=None` it reads the reference's hidden states and costs next to nothing."""

    body: LanguageModel | None

    def __init__(self, hidden_size: int, body: LanguageModel | None = None) -> None:
        super().__init__()
        self.body = body
        self.score = nn.Linear(hidden_size, 1)
        # Values start at 0 instead of at noise, so the first advantages are the rewards'.
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) final hidden states -> (...) values in float32."""
        return self.score(hidden.float()).squeeze(-1)


def save_critic(critic: Critic, reference: LanguageModel, folder: str | Path) -> None:
    """Writes what `AutoModelForTokenClassification.from_pretrained(folder)` reads: one value per token.

    Where transformers has no such class for the family, the head alone as value_head.safetensors.
    """
    import transformers

    body = critic.body if critic.body is not None else reference
    config = copy.deepcopy(body.config)
    config.num_labels = 1
    config.architectures = None
    if type(config) not in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {f"score.{name}": value.contiguous() for name, value in critic.score.state_dict().items()}
        save_file(state, Path(folder) / "value_head.safetensors")  # transformers has no such class for this family
        return
    model = transformers.AutoModelForTokenClassification.from_config(config, dtype=next(body.parameters()).dtype)
    model.base_model.load_state_dict(body.base_model.state_dict())
    head = scalar_head(model)
    head.load_state_dict({k: v.to(head.weight.dtype) for k, v in critic.score.state_dict().items()})
    model.save_pretrained(folder)


def scalar_head(model: nn.Module) -> nn.Linear:
    """The one-output linear layer of a sequence or token classifier."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if len(heads) != 1:
        raise ModelError(f"{type(model).__name__} has {len(heads)} linear layers with one output; num_labels must be 1")
    return heads[0]


def critic_from_classifier(model: LanguageModel) -> Critic:
    """A critic from any token or sequence classifier with one output, such as a reward model."""
    head = scalar_head(model)
    critic = Critic(head.in_features, body=model)
    with torch.no_grad():
        critic.score.weight.copy_(head.weight)
        critic.score.bias.copy_(head.bias if head.bias is not None else torch.zeros(1))
    return critic
