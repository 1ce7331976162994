"""Reward models: a scalar for a whole text, and their training on head-to-head comparisons.

Two bodies. `FrozenRewardModel`: pooled hidden states of a frozen language model and a small head; where the policy
shares that trunk, scoring is nearly free. `ClassifierRewardModel`: any transformers sequence classifier with one
output, so that other libraries read ours and we read theirs. Both report (raw - mean) / std with constants that are
saved with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_engine import models
from rlhf_engine.byte_dropout import ByteDropout
from rlhf_engine.models import HiddenStates, LanguageModel

USUAL_DEPTHS = (0.5, 0.6, 0.7, 0.8)  # what a text is about is clearest past the middle, next tokens at the end
USUALLY_TRAINED = 6  # layers of a fine-tuned reward model
FORMAT = "rlhf_engine.frozen_reward_model.1"
Progress = Callable[[int, int], None]


class FrozenRewardModel(nn.Module):
    """score = head(standardised [mean, last] pools of hidden states at `layers`)."""

    body: LanguageModel
    feature_mean: Tensor  # (D,)
    feature_std: Tensor  # (D,)
    score_mean: Tensor  # ()
    score_std: Tensor  # ()

    def __init__(self, body: LanguageModel, layers: list[int] | None, hidden_units: int, dropout: float = 0.0) -> None:
        super().__init__()
        config = body.config.get_text_config()
        if layers is None:
            layers = sorted({round(share * config.num_hidden_layers) for share in USUAL_DEPTHS})
        if not layers or min(layers) < 0 or max(layers) > config.num_hidden_layers:
            raise ValueError(f"reward_model.layers must lie between 0 and {config.num_hidden_layers}, got {layers}")
        self.__dict__["body"] = body  # not a submodule: it is shared, frozen, and saved elsewhere
        self.layers = sorted(set(layers))
        width = 2 * len(self.layers) * config.hidden_size
        self.hidden_units = hidden_units
        first, last = nn.Linear(width, hidden_units), nn.Linear(hidden_units, 1)
        nn.init.normal_(last.weight, std=1 / math.sqrt(hidden_units + 1))
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(ByteDropout(dropout), first, nn.GELU(), ByteDropout(dropout), last)
        for name in ("feature_mean", "feature_std"):
            self.register_buffer(name, torch.zeros(width) if name.endswith("mean") else torch.ones(width))
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))

    @torch.no_grad()
    def pool(self, hidden: HiddenStates, mask: Tensor) -> Tensor:
        """Hidden states (B, S, H) per layer and a (B, S) bool mask of the text -> (B, D) fp32 features."""
        count = mask.sum(1, keepdim=True).clamp(min=1)
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
        pools = []
        for layer in self.layers:
            states = torch.where(mask[..., None], hidden[layer].float(), 0.0)
            pools += [states.sum(1) / count, states[torch.arange(len(last), device=last.device), last]]
        return torch.cat(pools, 1)

    def raw(self, features: Tensor) -> Tensor:
        """(B, D) pooled features -> (B,) unnormalised scores."""
        return self.head(self.standardised(features))[:, 0]

    def standardised(self, features: Tensor) -> Tensor:
        """(B, D) pooled features on the scale of the texts that the head was trained on."""
        return (features - self.feature_mean) / self.feature_std

    def score(self, tokens: Tensor, mask: Tensor, hidden: HiddenStates | None = None) -> Tensor:
        """(B, S) token ids and mask -> (B,) normalised scores; hidden states of `body` may be handed over."""
        if hidden is None:
            hidden = models.run_trunk(self.body, tokens, mask, self.layers)
        features = self.pool(hidden, mask).to(self.feature_mean.device)  # a head may lie elsewhere than the body
        return (self.raw(features) - self.score_mean) / self.score_std

    def save(self, folder: str | Path) -> None:
        """Head and constants as safetensors; the body is named by its checksum, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "head.safetensors")
        about = {
            "format": FORMAT, "layers": self.layers, "hidden_units": self.hidden_units,
            "body": self.body.config.name_or_path, "body_sha256": models.checksum(self.body, torch.bfloat16),
        }  # fmt: skip
        (folder / "reward_model.json").write_text(json.dumps(about, indent=2) + "\n")


class ClassifierRewardModel(nn.Module):
    """Any sequence classifier with one output; the last real token's score, found by the mask and never by a pad id."""

    body: LanguageModel
    layers: tuple[int, ...] = ()

    def __init__(self, classifier: LanguageModel) -> None:
        super().__init__()
        self.body = classifier
        self.head = models.scalar_head(classifier)
        self.score_mean = float(getattr(classifier.config, "rlhf_score_mean", 0.0))
        self.score_std = float(getattr(classifier.config, "rlhf_score_std", 1.0))

    def raw_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, S) -> (B,) unnormalised scores, with gradient."""
        if getattr(self.body, "score", None) is not self.head:
            # Encoders pool in their own way, by a head of another name, and count positions from the left.
            tokens, mask = _flush_left(tokens, mask)
            return self.body(input_ids=tokens, attention_mask=mask.long()).logits[:, 0].float()
        states, _ = models.run_body(self.body, tokens, mask)
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
        return self.head(states[torch.arange(len(last), device=last.device), last])[:, 0].float()

    @torch.no_grad()
    def score(self, tokens: Tensor, mask: Tensor, hidden: HiddenStates | None = None) -> Tensor:
        """(B, S) token ids and mask -> (B,) normalised scores."""
        return (self.raw_tokens(tokens, mask) - self.score_mean) / self.score_std

    def save(self, folder: str | Path) -> None:
        """A folder that AutoModelForSequenceClassification reads; the normalisation travels in its config."""
        self.body.config.rlhf_score_mean = float(self.score_mean)
        self.body.config.rlhf_score_std = float(self.score_std)
        self.body.save_pretrained(folder)


RewardModel = FrozenRewardModel | ClassifierRewardModel


def _flush_left(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) rows with their real tokens in front, in order, and no column that is padding only."""
    order = (~mask).long().argsort(dim=1, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    return tokens.gather(1, order), mask.gather(1, order)


def new_classifier(
    body: LanguageModel, *, scratch: bool, train_layers: int | None = None, seed: int = 0
) -> ClassifierRewardModel:
    """A sequence classifier on a copy of `body` (or on random weights of its shape); head init std 1/sqrt(d + 1)."""
    import copy

    import transformers

    config = copy.deepcopy(body.config)
    config.num_labels = 1
    config.architectures = None
    torch.manual_seed(seed)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    if not scratch:
        classifier.base_model.load_state_dict(body.base_model.state_dict())
    head = models.scalar_head(classifier)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if train_layers is None:
        train_layers = min(USUALLY_TRAINED, config.get_text_config().num_hidden_layers)
    models.freeze(classifier, train_layers=-1 if scratch else train_layers, train_embeddings=scratch)
    head.requires_grad_(True)
    return ClassifierRewardModel(classifier.eval())


def load_reward_model(folder: str | Path, *, body: LanguageModel | None = None) -> RewardModel:
    """Reads either kind. The frozen kind needs the body it was trained on.

    Raises:
        ValueError: no reward model in the folder, more than one output, or another body than it was trained on.
    """
    folder = Path(folder)
    if not (folder / "reward_model.json").is_file():
        return _load_classifier(folder)
    about = json.loads((folder / "reward_model.json").read_text())
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder}/reward_model.json: unknown format {about.get('format')!r}, expected {FORMAT!r}")
    if body is None or models.checksum(body, torch.bfloat16) != about["body_sha256"]:
        raise ValueError(
            f"{folder}: this reward model reads hidden states of {about['body']} (sha256 {about['body_sha256'][:12]}), "
            f"but the model given has other weights; pass the model it was trained on"
        )
    model = FrozenRewardModel(body, about["layers"], about["hidden_units"])
    model.load_state_dict(load_file(folder / "head.safetensors"))
    return model.eval()


def _load_classifier(folder: Path) -> ClassifierRewardModel:
    import transformers

    models.check_model_name(str(folder))
    try:
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a reward model: {models.first_sentence(error)}") from error
    return ClassifierRewardModel(classifier.eval())


def tokenize(texts: list[str], tokenizer: Any, max_tokens: int) -> list[Tensor]:
    """Token ids per text, cut at `max_tokens`; an empty text becomes one eos token."""
    ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    return [torch.tensor(row or [tokenizer.eos_token_id], dtype=torch.int64) for row in ids]


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-padded (B, S) ids and bool mask; the pad id is 0 and never looked at."""
    lengths = torch.tensor([len(r) for r in rows])
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens, torch.arange(tokens.shape[1])[None, :] < lengths[:, None]


def by_length(rows: list[Tensor], batch_size: int) -> list[list[int]]:
    """Batches of indices with little padding, longest first so that memory peaks at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def pooled_features(model: FrozenRewardModel, rows: list[Tensor], batch_size: int, progress: Progress) -> Tensor:
    """(n, D) fp32 features of tokenised texts; the dear part of a frozen reward model, so computed once."""
    device = next(model.body.parameters()).device
    out = torch.empty(len(rows), model.feature_mean.numel())
    total, done = sum(len(r) for r in rows), 0
    for batch in by_length(rows, batch_size):
        tokens, mask = (x.to(device) for x in pad([rows[i] for i in batch]))
        out[batch] = model.pool(models.run_trunk(model.body, tokens, mask, model.layers), mask).cpu()
        done += int(mask.sum())
        progress(done, total)
    return out


def score_texts(model: RewardModel, texts: list[str], tokenizer: Any, *, max_tokens: int, batch_size: int) -> Tensor:
    """(n,) normalised scores of whole texts."""
    device = next(model.body.parameters()).device
    rows, out = tokenize(texts, tokenizer, max_tokens), torch.empty(len(texts))
    for batch in by_length(rows, batch_size):
        tokens, mask = (x.to(device) for x in pad([rows[i] for i in batch]))
        with torch.no_grad():
            out[batch] = model.score(tokens, mask).float().cpu()
    return out


@torch.no_grad()
def normalise(model: RewardModel, normalised_scores: Tensor) -> None:
    """Sets mean and std so that these samples (the reference's own) score mean 0, std 1."""
    if len(normalised_scores) < 2:
        raise ValueError(f"normalise: {len(normalised_scores)} samples of the reference have no spread; take more")
    mean, std = float(normalised_scores.mean()), float(normalised_scores.std())
    if not std > 1e-6:
        raise ValueError(
            f"the reward model gives every reference sample the same score ({mean:.4g}): nothing to learn from"
        )
    new_mean = float(model.score_mean) + mean * float(model.score_std)
    new_std = std * float(model.score_std)
    if isinstance(model, FrozenRewardModel):
        model.score_mean.fill_(new_mean)
        model.score_std.fill_(new_std)
    else:
        model.score_mean, model.score_std = new_mean, new_std
